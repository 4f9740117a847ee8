"""Compare MCLRec's loss with the authors' way, and full ranking with a loop over users; measure the ranking's memory.

    python benchmarks/mclrec.py [--rounds 7] [--threads 1]      writes results/bench/mclrec.json

The method is that of benchmarks/alignment.py: "learned views" is the contrast of n histories with both augmenters and the
regulariser, of width 64. The transcription builds the matrix of 2n x 2n products of each pair twice. As in the authors'
code, a mask takes the negatives out of it.

The second part ranks 100,000 items of width 64 for 10,000 users. Each has 50 known items and 1 to find. The loop ranks for
one user at a time: products with all items, known items hidden, items with a product as large counted. A separate process
for each number of users measures `extra_bytes`, the rise of the peak of resident memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.ranking import ranks_of_wanted
from counterpoint.encoders.histories import Augmenter

OUT = Path(__file__).parents[1] / "results" / "bench" / "mclrec.json"
DIM, ITEMS, KNOWN = 64, 100_000, 50
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of each of 2n rows with its partner [2n, 1] and with its negatives [2n, 2n - 2]."""
    n, u = len(a), torch.cat([a, b])
    scores = u @ u.T
    positive = torch.cat([scores.diagonal(n), scores.diagonal(-n)])[:, None]
    mask = torch.ones(2 * n, 2 * n, dtype=torch.bool).fill_diagonal_(False)
    rows = torch.arange(n)
    mask[rows, rows + n] = mask[rows + n, rows] = False
    return positive, scores[mask].view(2 * n, -1)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    logits = torch.cat(products(a, b), 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def spread(a: Tensor, b: Tensor) -> Tensor:
    positive, negative = products(a, b)
    hardest = negative.max(1, keepdim=True).values
    low, high = torch.minimum(positive, hardest), torch.maximum(positive, hardest)
    return (positive - low).relu().mean() + (high - negative).relu().mean()


def given(n: int) -> Case:
    torch.manual_seed(0)
    h1, h2 = (torch.randn(n, DIM, requires_grad=True) for _ in range(2))
    first, second = Augmenter(DIM), Augmenter(DIM)

    def ours() -> Tensor:
        return fn.mclrec_contrast(h1, h2, first, second)

    def plain() -> Tensor:
        pairs = [(h1, z2 := second(h2)), (h2, z1 := first(h1)), (z1, z2)]
        return torch.stack([contrast(a, b) + 0.1 * spread(a, b) for a, b in pairs]).sum()

    return [h1, h2], ours, plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {"learned views": (given, (64, 256, 1024, 2048))}


def asked(users: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return vectors of users and items, the items to find, and the known items."""
    torch.manual_seed(0)
    query, items = torch.randn(users, DIM), torch.randn(ITEMS, DIM)
    return query, items, torch.randint(ITEMS, (users, 1)), torch.randint(ITEMS, (users, KNOWN))


def one_by_one(query: Tensor, items: Tensor, wanted: Tensor, hidden: Tensor) -> Tensor:
    found = []
    for n in range(len(query)):
        scores = items @ query[n]
        own = scores[wanted[n]].clone()
        scores[hidden[n]] = -torch.inf
        scores[wanted[n]] = own
        found.append((scores >= own).sum())
    return torch.stack(found)[:, None]


def ranking(rounds: int) -> dict[str, Any]:
    """Time both ways of ranking in turn: 10,000 users at once, and 500 of them by the loop, counted twenty times."""
    given = asked(10_000)
    some = [x if len(x) == ITEMS else x[:500] for x in given]
    pairs = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = ranks_of_wanted(*given)
        middle = time.perf_counter()
        loop = one_by_one(*some)
        pairs.append((middle - start, 20 * (time.perf_counter() - middle)))
    differ = int((found[:500] != loop).sum())
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    record = {"users": 10_000, "items": ITEMS, "ours_s": round(ours, 2), "loop_s": round(theirs, 2)}
    return record | {"ratio": round(theirs / ours, 2), "ranks_that_differ_of_500": differ}


STEP = """
import json, re, sys
sys.path.insert(0, "benchmarks")
import torch
torch.set_num_threads(1)
from mclrec import asked, ranks_of_wanted
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
given = asked(int(sys.argv[1]))
ranks_of_wanted(*[x if len(x) == len(given[1]) else x[:200] for x in given])
before = status("VmHWM")
ranks_of_wanted(*given)
print(json.dumps({"users": len(given[0]), "extra_bytes": status("VmHWM") - before}))
"""


def memory() -> list[dict[str, Any]]:
    """Measure the extra memory of ranking for several numbers of users, beside that of 200."""
    found = []
    for users in (1000, 10_000, 50_000):
        said = subprocess.run(
            [sys.executable, "-c", STEP, str(users)], check=True, capture_output=True, text=True, cwd=OUT.parents[2]
        )
        found.append(json.loads(said.stdout))
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM)
    record = json.loads(OUT.read_text())
    record["full ranking"] = ranking(3)
    print(record["full ranking"], flush=True)
    record["memory"] = memory()
    OUT.write_text(json.dumps(record, indent=1) + "\n")
