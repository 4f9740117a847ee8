"""Compare audio-sheet retrieval's loss with a direct transcription: time, memory and value.

    python benchmarks/audio_sheet_retrieval.py [--rounds 7] [--threads 1]

writes results/bench/audio_sheet_retrieval.json. Both sides take the same float32 numbers, forward and backward, in turn
in one process. The record has the medians over the rounds, their ratio, and the difference of the two values. The ratio is the
transcription's time over ours: above 1 ours is faster. The transcription of the hinge stores the matrix of similarities, as
the authors' code does. `bytes` is the peak of each side's allocations besides its inputs, by torch's profiler.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run, timed
from torch import Tensor

from counterpoint.systems.alignment.audio_sheet_retrieval import batch_hinge

OUT = Path(__file__).parents[1] / "results" / "bench" / "audio_sheet_retrieval.json"
DIM = 32  # of the paper's embeddings
MARGIN = 0.6


def hinge(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, DIM, generator=g), dim=1).requires_grad_() for _ in range(2))

    def plain() -> Tensor:
        s = x @ y.T
        terms = (MARGIN - s.diagonal()[:, None] + s).clamp(0, 1000)
        return (terms * (1 - torch.eye(n))).sum() / (n * (n - 1))

    return [x, y], lambda: batch_hinge(x, y, MARGIN), plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "batch_hinge": (hinge, (128, 1024, 4096)),
}


def peak(inputs: list[Tensor], loss: Callable[[], Tensor]) -> int:
    """Return the peak memory of forward and backward, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        timed(inputs, loss)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=peak)
