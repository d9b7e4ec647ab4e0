"""What every test shares: one torch thread a process, no network, and the path of the shared data."""

import gc
import os

# Before torch and huggingface_hub are imported anywhere, and inherited by every child process: two processes
# whose threads spin on the same cores run ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from splitllm.model import machine

ROOT = Path(__file__).resolve().parent.parent
IN_CI = bool(os.environ.get("CI"))

torch.set_num_threads(1)
settings.register_profile("splitllm", deadline=None, derandomize=IN_CI, print_blob=True)
settings.load_profile("splitllm")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data sets in ../shared/data, which are not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def predictions_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that a test before has used leaves the allocator set in this process."""
    monkeypatch.setattr(machine, "_returning", False)


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a run in which every test was skipped counts as a run without tests: it proves nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IN_CI and reporter is not None and exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
