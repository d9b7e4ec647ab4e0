"""Memory: a shard costs little more than its own bytes, and an embedding table costs nothing (measured, see docs)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
SLACK = 32 * MIB  # pages of libraries and Python objects that the first load and step bring in
TABLE_SHARE = 0.05


def measured(folder: Path, *cases: str) -> dict[str, dict[str, float]]:
    """Cases of scripts/bench_memory.py, each measured in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), "--json", "--folder", str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures: dict[str, dict[str, float]] = json.loads(done.stdout)
    for name, case in figures.items():
        mib = {key: round(value / MIB, 1) for key, value in case.items() if value is not None and value >= MIB}
        sys.stdout.write(f"{name}, MiB: {mib}\n")
    assert not list(folder.iterdir()), "the checkpoints are removed"
    return figures


def test_a_client_of_a_gemma_2b_sized_model_fits_a_phone() -> None:
    """A real `splitllm client` with a table of 256,000 x 2,048, one block with LoRA, bf16, micro-batches of 1 x 128."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_roles.py"), "--json", "--modes", "client"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    client, imports = figures["client"]["client"], figures["interpreter"]["imports"]
    sys.stdout.write(f"client: {client['measured'] / MIB:.0f} MiB, its imports {imports / MIB:.0f} MiB\n")
    assert client["measured"] <= 850 * MIB
    assert client["measured"] - imports <= 350 * MIB
    assert client["heavy_imports"] == 0, "neither datasets nor deepspeed"
    for role in figures["client"].values():
        assert abs(role["predicted"] / role["measured"] - 1) <= 0.15


def assert_middle_shard(case: dict[str, float]) -> None:
    """Peak growth by load and step: at most 1.1 x the shard's bytes plus its activations; nothing mapped."""
    assert case["checkpoint"] >= 1e9
    assert case["weights"] < 0.5 * case["checkpoint"]
    assert case["growth"] <= 1.1 * case["weights"] + case["activations"]
    assert case["load growth"] <= 1.05 * case["weights"]
    assert case["file growth"] < SLACK


def test_middle_shard_needs_its_own_bytes_and_activations(tmp_path: Path) -> None:
    figures = measured(tmp_path, "middle-small-batch", "middle")
    assert_middle_shard(figures["middle-small-batch"])  # 32 tokens, glibc's default allocator
    assert_middle_shard(figures["middle"])  # 512 tokens, an allocator that gives freed blocks back


@pytest.mark.soak
def test_a_shard_converted_on_load_is_never_in_memory_twice(tmp_path: Path) -> None:
    assert_middle_shard(measured(tmp_path, "middle-fp32-to-bf16")["middle-fp32-to-bf16"])


@pytest.mark.soak
def test_client_never_holds_the_embedding_table(tmp_path: Path) -> None:
    figures = measured(tmp_path, "client-cold", "client-warm")
    for name, case in figures.items():
        assert case["table"] == 2**30
        allowed = TABLE_SHARE * case["table"]
        needed = case["weights"] + case["adapter"] + case["activations"]
        assert case["lookup growth"] < allowed, name
        assert case["growth"] - needed < allowed, name
        assert case["file growth"] < SLACK, name
    cold, warm = figures["client-cold"]["cached"], figures["client-warm"]["cached"]
    if cold is None or cold > 0.1:
        pytest.skip("held with a warm page cache; this file system cannot drop a file from it, or cannot say so")
    assert warm > 0.9
