"""`benchmarks/gpu.sh`, which measures on a GPU, rehearsed without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_the_processor() -> None:
    """A lent GPU is there for minutes: a renamed function or a missing package must be found before."""
    pytest.importorskip("triton")
    done = run("--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 of 36 checks are good" in done.stdout
    for loss in ("two-way", "one-way", "nt-xent", "supcon", "soft targets"):
        assert f"64 x 32  {loss} " in done.stdout
    assert "images a second" in done.stdout
    assert done.stdout.count("items a second") == 5


@pytest.mark.slow
def test_without_a_gpu_the_script_names_the_rehearsal() -> None:
    done = run("check")
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
