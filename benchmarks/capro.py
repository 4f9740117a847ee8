"""Compare CAPro's step with the authors' way, and smooth the texts of 100,000 pictures over approximate neighbours.

    python benchmarks/capro.py [--rounds 9] [--threads 1] [--pictures 100000]      writes results/bench/capro.json

`step`: forward and backward of all losses on float32 rows of width 128, with a queue of 8,192 keys. Both run in turn. Nine
tenths of the labels score high, so most rows are kept, as in training. The transcription follows the authors' code: it copies the
queue for each use, takes rows out by masks, and moves prototypes in a loop over rows. A ratio is the ratio of the medians,
its time over ours: above 1 ours is faster. Memory is the peak of a separate process of each, minus its memory before the call.

`smoothing`: visual features of width 64 in 1,000 clusters, and texts of width 384. Neighbours are searched, ranked again and used
to average the texts. Each way runs once, in a process of its own. Recall is the share of the exact 20 neighbours that the
approximate search has, over all pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from sides import Case, Sides, compared, normal, parser_of, peak, status, written
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.neighbours import nearest_rows, rerank_lists
from counterpoint.core.operands import unit

OUT = Path(__file__).parents[1] / "results" / "bench" / "capro.json"
LOW, DIM, KEYS = 128, 512, 8192
CASES = {
    "256 rows, 100 classes": (256, 100),
    "256 rows, 1,000 classes": (256, 1000),
    "1,024 rows, 1,000 classes": (1024, 1000),
}
NEIGHBOURS, KEPT, FEATURES, TEXT = 20, 5, 64, 384


def case(n: int, classes: int) -> Case:
    """Make the rows of a step."""
    z, key = (F.normalize(normal(k, n, LOW), dim=1) for k in (0, 1))
    low = normal(3, n, classes).requires_grad_()
    likely = F.one_hot(torch.arange(n) % classes, classes) * (torch.arange(n) % 10 > 0)[:, None]
    logits = (normal(2, n, classes) + 10 * likely).requires_grad_()
    feature, rebuilt = normal(4, n, DIM), normal(5, n, DIM).requires_grad_()
    z.requires_grad_()
    labels, trusted = torch.arange(n) % classes, torch.arange(n) % 9 == 0
    queue, weight = F.normalize(normal(6, LOW, KEYS), dim=0), normal(7, classes, LOW)
    prototypes = F.normalize(normal(8, classes, LOW), dim=1)

    def ours() -> Tensor:
        found = fn.capro_step(
            logits, z, key, low, feature, rebuilt, labels, trusted, queue, prototypes, weight, threshold=0.3
        )
        loss: Tensor = found["loss"]
        return loss

    def plain() -> Tensor:
        t, a, beta, m = 0.1, 0.5, 0.1, 0.999
        held, own = queue.clone(), labels.clone()
        positive = torch.einsum("nc,nc->n", [z, key])[:, None]
        inst = torch.cat([positive, torch.einsum("nc,ck->nk", [z, held.detach().clone()])], 1) / t
        with torch.no_grad():
            held[:, :n] = key.T
            held = F.normalize(held, dim=0)
            r = torch.clamp(torch.einsum("nc,ck->nk", [z, held.clone()]), min=0, max=1) + 1e-7
            r = r / r.sum(1, keepdim=True)
            of_low = F.softmax(held.clone().t() @ weight.T, dim=1)
            of_prototypes = F.softmax(torch.mm(held.clone().t(), prototypes.clone().t()) / t, dim=1)
            b = torch.clamp(torch.einsum("nc,ck->nk", [r, a * of_low + (1 - a) * of_prototypes]), min=0, max=1)
            b = b / b.sum(1, keepdim=True)
        g = torch.mm(z, prototypes.clone().t()) / t
        with torch.no_grad():
            score = a * F.softmax(logits, dim=1) + (1 - a) * F.softmax(g, dim=1)
            clean = (score[torch.arange(n), own] >= 1 / classes) | trusted
            best, guess = score.max(1)
            correct = (best >= 0.3) & ~trusted
            own[correct] = guess[correct]
            clean = clean | correct
            moved = prototypes.clone()
            for row, label in zip(z[clean], own[clean], strict=True):
                moved[int(label)] = moved[int(label)] * m + (1 - m) * row
            F.normalize(moved, dim=1)
        y, chosen = own[clean], low[clean]
        hard = F.cross_entropy(chosen, y, reduction="none").mean()
        soft = (-torch.sum(b[clean] * F.log_softmax(chosen, dim=1), dim=1)).mean()
        return (
            F.cross_entropy(logits[clean], y, reduction="none").mean()
            + F.cross_entropy(inst, torch.zeros(n, dtype=torch.long), reduction="none").mean()
            + (1 - beta) * hard
            + beta * soft
            + F.mse_loss(rebuilt[clean], feature[clean])
            + F.cross_entropy(g[clean], y, reduction="none").mean()
        )

    return ours, plain


SIDES = {name: Sides(partial(case, *sizes), partial(case, 8, 3)) for name, sizes in CASES.items()}


def smoothing(way: str, pictures: int, file: str) -> dict[str, float]:
    """Smooth the texts of so many pictures in one way. Write the neighbours to a file."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, FEATURES, generator=generator)
    group = torch.randint(1000, (pictures,), generator=generator)
    features = centres[group] + 0.7 * torch.randn(pictures, FEATURES, generator=generator)
    texts = unit(torch.randn(1000, TEXT, generator=generator)[group] + torch.randn(pictures, TEXT, generator=generator))
    fn.approximate_rows(features[:500], NEIGHBOURS)  # imports
    before, start = status("VmRSS"), time.perf_counter()
    near = (
        nearest_rows(features, NEIGHBOURS) if way == "exact" else fn.approximate_rows(features, NEIGHBOURS).neighbours
    )
    searched = time.perf_counter()
    lists = rerank_lists(features, near.rows, KEPT)
    ranked = time.perf_counter()
    smooth = fn.graph_smooth(lists.rows, lists.similarity, texts)
    end = time.perf_counter()
    np.save(file, near.rows.numpy().astype(np.int32))
    assert smooth.shape == texts.shape
    return {
        "search_s": round(searched - start, 2),
        "rerank_s": round(ranked - searched, 2),
        "smooth_s": round(end - ranked, 2),
        "total_s": round(end - start, 2),
        "megabytes": round(status("VmHWM") - before, 1),
    }


def both_smoothings(pictures: int, threads: int) -> dict[str, Any]:
    """Smooth in both ways, each in a process of its own, and compare their neighbours."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for way in ("exact", "approximate"):
            words = [sys.executable, __file__, "--threads", str(threads), "--pictures", str(pictures), "--smooth"]
            words += [way, f"{place}/{way}.npy"]
            found[way] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        exact, near = (np.sort(np.load(f"{place}/{way}.npy"), axis=1) for way in ("exact", "approximate"))
    same = sum(np.intersect1d(a, b).size for a, b in zip(exact, near, strict=True))
    found["recall"] = round(float(same / exact.size), 4)
    for part in ("search", "total"):
        found[f"{part}_ratio"] = round(found["exact"][f"{part}_s"] / found["approximate"][f"{part}_s"], 2)
    return {f"{pictures:,} pictures": found}


def main() -> None:
    parser = parser_of(__doc__, 9, OUT)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--smooth", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(SIDES[options.peak[1]], int(options.peak[0])))
        return
    if options.smooth:
        print(json.dumps(smoothing(options.smooth[0], options.pictures, options.smooth[1])))
        return
    record: dict[str, Any] = {
        "what": "float32; step: forward and backward, medians; ratio above 1: ours (or approximate search) is faster",
        "queue": KEYS, "threads": options.threads, "rounds": options.rounds, "cases": {},
    }  # fmt: skip
    for name, sides in SIDES.items():
        record["cases"][name] = found = compared(sides.make(), options.rounds, [name], "transcription")
        print(f"{name}: {json.dumps(found)}", flush=True)
    record["smoothing"] = both_smoothings(options.pictures, options.threads)
    print(json.dumps(record["smoothing"]), flush=True)
    written(record, options.out)


if __name__ == "__main__":
    main()
