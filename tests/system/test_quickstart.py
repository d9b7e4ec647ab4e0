"""The quickstart as users run it: what it promises is asserted here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.system
@pytest.mark.soak
def test_the_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "splitllm",
        "train",
        "recipes/quickstart.yaml",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss_after"] <= 0.85 * summary["eval_loss_before"]
    for moment in ("before", "after"):
        assert math.isclose(summary[f"unsplit_loss_{moment}"], summary[f"eval_loss_{moment}"], abs_tol=1e-4)
    assert len(list((tmp_path / "run" / "adapter").iterdir())) == 2
    assert "Traceback" not in done.stderr and "next: peft.PeftModel" in done.stdout
