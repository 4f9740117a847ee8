"""Compare TinyCLIP's affinity mimicking with the authors' way, which keeps four matrices: time, value, memory.

    python benchmarks/tinyclip.py [--rounds 7] [--threads 1]      writes results/bench/tinyclip.json

The method is that of benchmarks/alignment.py: float32 rows 256 wide, forward and backward. The student's rows have a gradient, the
teacher's have none. Beyond that, ours runs once at 32,768 pairs in a process of its own. The record has its seconds, and the growth
of the process's peak memory in MiB. The authors' matrices alone would take 16 GiB there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alignment import rows, run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "tinyclip.json"
SCALE = 50.0
MANY = 32768


def affinity(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    u, v = rows(2, n)
    taught = [x.detach() for x in rows(2, n, seed=1)]

    def plain() -> Tensor:
        image, text = SCALE * u @ v.T, SCALE * v @ u.T
        with torch.no_grad():
            target, other = (SCALE * taught[0] @ taught[1].T).softmax(1), (SCALE * taught[1] @ taught[0].T).softmax(1)
        return (F.cross_entropy(image, target) + F.cross_entropy(text, other)) / 2

    return [u, v], lambda: fn.affinity_mimicking_loss(u, v, SCALE, *taught, SCALE).loss, plain


def large() -> dict[str, float]:
    """Run forward and backward once at 32,768 pairs; return seconds and the growth of the peak memory in MiB."""
    torch.set_num_threads(1)
    _, warm, _ = affinity(512)
    warm().backward()
    _, ours, _ = affinity(MANY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    ours().backward()
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"pairs": MANY, "ours_s": round(seconds, 1), "ours_extra_mb": round(grown, 1)}


if __name__ == "__main__":
    if "--large" in sys.argv:
        print(json.dumps(large()))
    else:
        run({"tinyclip": (affinity, (256, 1024, 4096))}, OUT, __doc__)
        found = subprocess.run([sys.executable, __file__, "--large"], check=True, capture_output=True, text=True).stdout
        record = json.loads(OUT.read_text()) | {"large": json.loads(found)}
        OUT.write_text(json.dumps(record, indent=1) + "\n")
        print(record["large"])
