"""Compare TinyCLIP's affinity mimicking with the authors' way, which keeps four matrices: time, value, memory.

    python benchmarks/tinyclip.py [--rounds 7] [--threads 1]      writes results/bench/tinyclip.json
    python benchmarks/tinyclip.py --large                         measures memory alone, again; the times stay

The method is that of benchmarks/alignment.py: float32 rows 256 wide, forward and backward. The student's rows have a gradient, the
teacher's have none. Memory is the growth of the peak over one forward and backward pass, in MiB. Each number is of a process of its
own, and from `VmHWM` of Linux: `ru_maxrss` of a child process starts at the peak of its parent. Both ways are measured at 8,192
pairs, and ours at 32,768. There the record has 16 times the authors' memory, because their matrices have 16 times as many entries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import rows, run
from sides import status
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.engine.run import machine, versions

OUT = Path(__file__).parents[1] / "results" / "bench" / "tinyclip.json"
SCALE = 50.0
FEW, MANY = 8192, 32768
SIDES = ("ours", "transcription")


def affinity(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    u, v = rows(2, n)
    taught = [x.detach() for x in rows(2, n, seed=1)]

    def plain() -> Tensor:
        image, text = SCALE * u @ v.T, SCALE * v @ u.T
        with torch.no_grad():
            target, other = (SCALE * taught[0] @ taught[1].T).softmax(1), (SCALE * taught[1] @ taught[0].T).softmax(1)
        return (F.cross_entropy(image, target) + F.cross_entropy(text, other)) / 2

    return [u, v], lambda: fn.affinity_mimicking_loss(u, v, SCALE, *taught, SCALE).loss, plain


def measured(side: str, n: int) -> dict[str, float]:
    """Run forward and backward once at n pairs; return seconds and the growth of the peak memory in MiB."""
    torch.set_num_threads(1)
    place = 1 + SIDES.index(side)
    affinity(512)[place]().backward()
    loss = affinity(n)[place]
    before, started = status("VmRSS"), time.perf_counter()
    loss().backward()
    seconds = time.perf_counter() - started
    return {"s": round(seconds, 1), "mb": round(status("VmHWM") - before, 1)}


def large() -> dict[str, Any]:
    """Measure memory in processes of their own, and compute the authors' at 32,768 pairs."""
    found: dict[str, Any] = {"matrix_mb": {str(n): n * n * 4 / 2**20 for n in (FEW, MANY)}}
    for side, n in (("ours", FEW), ("transcription", FEW), ("ours", MANY)):
        words = [sys.executable, __file__, "--alone", side, str(n)]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found.setdefault(str(n), {})[side] = json.loads(text)
        print(side, n, text, flush=True)
    found[str(MANY)]["transcription_computed"] = {"mb": found[str(FEW)]["transcription"]["mb"] * (MANY // FEW) ** 2}
    return found


if __name__ == "__main__":
    if "--alone" in sys.argv:
        print(json.dumps(measured(sys.argv[-2], int(sys.argv[-1]))))
    else:
        if "--large" not in sys.argv:
            run({"tinyclip": (affinity, (256, 1024, 4096))}, OUT, __doc__)
        record = json.loads(OUT.read_text()) | {"large": large(), "machine": machine(), "versions": versions()}
        OUT.write_text(json.dumps(record, indent=1) + "\n")
