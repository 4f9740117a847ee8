"""Compare SPACE-2's scores and ten-view contrast with a transcription of the authors' way: time, value, and peak memory.

    python benchmarks/space_2.py [--rounds 5] [--threads 1]      writes results/bench/space_2.json

`contrast` takes float32 rows of ten subspaces of width 768 for two passes. It runs forward and backward, in turn in one
process. Ours computes the scores from the annotations in each call. The transcription has them already, as ten matrices. For
each view it holds several matrices of twice the batch by twice the batch. `scores` are all scores of a batch. Ours are ten
matrices. The transcription's are made by Python sets, pair by pair, each pair once.

The record has the medians over the rounds and the ratio of the medians. A ratio is the transcription's time over ours:
above 1 ours is faster. Memory is the peak of a separate process of each, minus its memory before the call.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, compared, normal, parser_of, peak, written
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.tree_scores import LEVELS, VIEWS

OUT = Path(__file__).parents[1] / "results" / "bench" / "space_2.json"
WIDTH, TAU = 768, 0.07
CASES = {"contrast": (128, 256, 512, 1024), "scores": (128, 512)}


def frames(n: int) -> Tensor:
    """Draw frames of one or two paths, of the sizes of the built-in world."""
    g = torch.Generator().manual_seed(0)
    paths = torch.stack([torch.randint(1, many + 1, (n, 2), generator=g) for many in (5, 4, 6, 20)], 2)
    return paths.masked_fill(
        (torch.rand(n, generator=g) < 0.5)[:, None, None] & torch.tensor([0, 1])[:, None].bool(), -2
    )


def by_sets(paths: Tensor) -> Tensor:
    """Score all pairs by Python sets."""
    found = torch.zeros(len(VIEWS), len(paths), len(paths), dtype=torch.float64)
    for k, view in enumerate(VIEWS):
        at = [LEVELS.index(level) for level in view]
        sets = [{"-".join(str(row[n]) for n in at) for row in frame if row[0] > 0} for frame in paths.tolist()]
        for i, a in enumerate(sets):
            for j in range(i):
                union = len(a | sets[j])
                found[k, i, j] = found[k, j, i] = len(a & sets[j]) / union if union else 0
        found[k].fill_diagonal_(1)
    return found


def case(what: str, n: int) -> Case:
    paths = frames(n)
    if what == "scores":
        return lambda: fn.tree_scores(paths), lambda: by_sets(paths)
    rows = normal(0, n, 2, len(VIEWS), WIDTH).requires_grad_()
    scores = fn.tree_scores(paths).float()

    def plain() -> Tensor:
        rows.grad = None
        losses = []
        off = 1 - torch.eye(2 * n)
        for both, score in zip(rows.unbind(2), scores, strict=True):
            e = F.normalize(torch.cat(both.unbind(1)), dim=1)
            weights = score.repeat(2, 2) * off
            logits = e @ e.T / TAU
            logits = logits - logits.max(1, keepdim=True).values.detach()
            logs = logits - (logits.exp() * off).sum(1, keepdim=True).log()
            losses.append(-((weights * logs).sum(1) / weights.sum(1)).mean())
        return torch.stack(losses).mean()

    def ours() -> Tensor:
        rows.grad = None
        return fn.tree_contrast(rows, paths)

    return ours, plain


def main() -> None:
    parser = parser_of(__doc__, 5, OUT)
    parser.add_argument("--peak", nargs=3, metavar=("SIDE", "CASE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        side, what, n = options.peak
        print(peak(Sides(partial(case, what, int(n)), partial(case, what, 32)), int(side)))
        return
    record: dict[str, Any] = {
        "what": "float32, forward and backward, medians; ratio above 1: ours is faster; megabytes: peak of a process",
        "width": WIDTH, "threads": options.threads, "rounds": options.rounds, "cases": {},
    }  # fmt: skip
    for what, sizes in CASES.items():
        record["cases"][what] = {}
        for n in sizes:
            found = compared(case(what, n), options.rounds, [what, str(n)], "transcription")
            record["cases"][what][str(n)] = found
            print(f"{what} of {n}: {json.dumps(found)}", flush=True)
    written(record, options.out)


if __name__ == "__main__":
    main()
