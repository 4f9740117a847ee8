"""The GPU's kernels compile for NVIDIA's devices, and keep their numbers in registers; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.backends import nvidia

TOOL = Path(__file__).parents[2] / "tools" / "compiled_kernels.py"
if not (Path(nvidia.__file__).parent / "bin" / "nvdisasm").is_file():
    pytest.skip("this Triton brings no compiler for NVIDIA's devices", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize(("products", "rows", "columns"), [("bf16", 256, 384), ("bf16", 1, 1), ("exact", 37, 70)])
def test_every_launch_compiles_for_hopper(products: str, rows: int, columns: int) -> None:
    asked = ["--products", products, "--rows", str(rows), "--columns", str(columns)]
    out = subprocess.run([sys.executable, TOOL, *asked], capture_output=True, text=True, check=False, timeout=600)
    assert out.returncode == 0, out.stderr[-2000:]
    found = {row["kernel"]: row for row in map(json.loads, out.stdout.splitlines())}
    assert len(found) == 28
    if (products, rows) == ("bf16", 256):
        assert not {name: row["spilt"] for name, row in found.items() if row["spilt"]}
        # All but one multiply: the kept values of a softplus are the gradient itself.
        assert [name for name, row in found.items() if not row["tensor"]] == ["pull, softplus, kept"]
        # Two thirds of what tl.exp and tl.log took (5,816 and 2,952): 64 similarities a thread, both branches.
        assert found["sums, both ways"]["instructions"] < 4500
        assert found["pull, both ways"]["instructions"] < 2600
