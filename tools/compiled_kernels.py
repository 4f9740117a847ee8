"""Compile the GPU's kernels without a GPU, and count what the compiler made of them.

    python tools/compiled_kernels.py [--architecture 90] [--tile 128 256 64 8 3]

For each kernel as `counterpoint.core.chunks` launches it: registers of a thread, bytes of registers spilt to memory, bytes of
shared memory, and instructions. A spill, or one instruction more for each similarity, is seen here before a GPU is at hand.
Both branches of a kernel count, also the one that rows far below their tile's reference take.

Triton brings the compiler for NVIDIA's devices. Architectures: 80 (A100), 90 (H100, H200), 100 (B200).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from counterpoint.core import chunked_affinities, chunks, triton_kernels
from counterpoint.core.precision import Products
from counterpoint.core.rules import Diagonal, Labels, Views

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        return self.arguments.update


def recorded(names: Sequence[str], call: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Return the arguments of the last launch of each of these kernels in a call."""
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(mock.patch.object(triton_kernels, name, Recorder())) for name in names}
        call()
    return {name: recorder.arguments for name, recorder in found.items()}


def launches(kind: Products, n: int, m: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, kernel and arguments of each kind of launch for n rows and m columns."""
    query, key, label = torch.zeros(n, 512), torch.zeros(m, 512), torch.zeros(m, dtype=torch.long)
    one, other = (torch.zeros(n),) * 2, (torch.zeros(m),) * 2

    def numbers(rows: slice, columns: slice) -> Tensor:
        return torch.ones(rows.stop - rows.start, columns.stop - columns.start)

    # name: (what the matrix gets, whether columns are summed, whether exponentials are kept)
    cases: dict[str, tuple[dict[str, Any], bool, bool]] = {
        "both ways": ({}, True, False),
        "both ways, kept": ({}, True, True),
        "rows": ({}, False, False),
        "labels": ({"rules": (Labels(label[:n], label),)}, False, False),
        "own label": ({"rules": (Labels(label[:n], label, same=False),)}, False, False),
        "views": ({"rules": (Views(max(1, n // 2)),)}, False, False),
        "weights": ({"weight": numbers}, False, True),
        "targets": ({"target": numbers}, True, False),
        "softplus": ({"softplus": True}, False, False),
        "softplus, kept": ({"softplus": True}, False, True),
        "symmetric": ({"symmetric": True, "rules": (Diagonal(),)}, True, False),
        "symmetric, kept": ({"symmetric": True, "rules": (Diagonal(),)}, True, True),
    }
    for name, (asked, columns, keep) in cases.items():
        matrix = chunks.Matrix(query, query if "symmetric" in asked else key, kind=kind, **asked)
        chunk = next(matrix.chunks())
        across = one if "symmetric" in asked else other if columns else None

        def both(
            matrix: Any = matrix, chunk: Any = chunk, across: Any = across, columns: Any = columns, keep: Any = keep
        ) -> None:
            held = matrix.sums(chunk, columns=columns, keep=keep)[3]
            matrix.pull(chunk, one, across, one[0] if matrix.target else None, held)

        for kernel, arguments in recorded(("sums", "pull"), both).items():
            yield f"{kernel}, {name}", getattr(triton_kernels, kernel), arguments
    pair = chunked_affinities.Pair(query, key, query, key, kind)
    sides = [(torch.zeros(4, n), torch.zeros(n)) for n in (n, m)]
    for name, columns, taught in (("rows", False, False), ("both ways, taught", True, True)):

        def crossed(columns: bool = columns, taught: bool = taught) -> None:
            pair.forward(columns=columns)
            pair.backward(sides[0], sides[1] if columns else None, 1.0, (True, True, taught, taught))

        for kernel, arguments in recorded(("cross_sums", "cross_pull"), crossed).items():
            yield f"{kernel}, {name}", getattr(triton_kernels, kernel), arguments


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel for the arguments of a launch."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    types, values, whole = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        # Triton makes a constant of every number that is 1.
        if name in constants or (isinstance(value, int) and value == 1):
            types[name], values[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], whole[(place,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            if not isinstance(value, float) and value and value % 16 == 0:
                whole[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, types, constexprs=values, attrs=whole), GPUTarget("cuda", architecture, 32), options
    )


def counted(binary: bytes) -> dict[str, int]:
    """Count registers, spilt bytes and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def read(*command: str) -> str:
            return subprocess.run(
                [TOOLS / command[0], *command[1:], file.name], capture_output=True, check=True, text=True
            ).stdout

        usage, code = read("cuobjdump", "-res-usage"), read("nvdisasm", "-c")
    used = {word: int(number) for word, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    tensor = sum(name in ("HGMMA", "HMMA", "UTCHMMA") for name in names)
    return {"registers": used["REG"], "spilt": used["STACK"], "instructions": len(names), "tensor": tensor}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90, help="90 for H100 and H200 (default), 80, 100")
    parser.add_argument("--tile", type=int, nargs="+", help="rows, columns, depth, warps, stages and most registers")
    parser.add_argument("--products", choices=["bf16", "fp16", "tf32", "exact"], default="bf16", help="default: bf16")
    parser.add_argument(
        "--rows", type=int, default=256, help="rows of the matrix; 1 is a case of its own; default: 256"
    )
    parser.add_argument("--columns", type=int, default=384, help="columns of the matrix; default: 384")
    asked = parser.parse_args()
    tile = (
        mock.patch.object(chunks, "tiling", return_value=chunks.Tiling(*asked.tile)) if asked.tile else mock.MagicMock()
    )
    with tile:
        for name, kernel, arguments in launches(asked.products, asked.rows, asked.columns):
            found = compiled(kernel, arguments, asked.architecture)
            print(
                json.dumps({"kernel": name, **counted(found.asm["cubin"]), "shared": found.metadata.shared}), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
