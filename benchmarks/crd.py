"""Compare the step of CRD's contrast with a transcription of the authors' way: time, values, gradients, memories.

    python benchmarks/crd.py [--rounds 7] [--threads 1]      writes results/bench/crd.json

A batch has 64 pictures of a set of 50,000, embeddings have 128 numbers, and each picture has K negatives. Both ways embed the
same features of student and teacher. They contrast each side with the other side's memory, take the gradients, and update both
memories.

The authors' way fetches K + 1 rows of each memory for each picture. It multiplies them one picture at a time (bmm), takes the
exponential and divides it by Z. In both ways each picture has its own negatives. A case is timed twice:

    step    both ways get the same lists of negatives
    drawn   each way draws its negatives first, the authors' from an alias table

In the first two steps, our loss, gradients and memories must agree to 1e-5 with the authors' way in float64. The record has the
differences of both ways from it: in float32 the authors' sum of small logarithms loses digits.

Ratios are the medians of the authors' way over ours, in turn in one process: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.systems.classics.crd import CRDLoss

OUT = Path(__file__).parents[1] / "results" / "bench" / "crd.json"
BATCH, DIM, N, STUDENT, TEACHER = 64, 128, 50_000, 128, 256
TEMPERATURE, MOMENTUM, EPS = 0.07, 0.5, 1e-7
AGREE = 1e-5


class Alias:
    """Draw positions with given probabilities in constant time each (Walker's alias method)."""

    def __init__(self, weights: Tensor) -> None:
        count = len(weights)
        scaled = (weights * count / weights.sum()).tolist()
        self.keep, self.other = torch.ones(count), torch.arange(count)
        small = [i for i, value in enumerate(scaled) if value < 1]
        large = [i for i, value in enumerate(scaled) if value >= 1]
        while small and large:
            low, high = small.pop(), large.pop()
            self.keep[low], self.other[low] = scaled[low], high
            scaled[high] -= 1 - scaled[low]
            (small if scaled[high] < 1 else large).append(high)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(len(self.keep), (count,), generator=generator)
        stays = torch.bernoulli(self.keep[column], generator=generator).bool()
        return torch.where(stays, column, self.other[column])


class Authors(nn.Module):
    """The authors' way: fetched rows, bmm, exponentials, NCE."""

    def __init__(self, like: CRDLoss) -> None:
        super().__init__()
        self.embed_student, self.embed_teacher = nn.Linear(STUDENT, DIM), nn.Linear(TEACHER, DIM)
        self.embed_student.load_state_dict(like.embed_student.state_dict())
        self.embed_teacher.load_state_dict(like.embed_teacher.state_dict())
        self.memory = [like.memory_student.rows.clone(), like.memory_teacher.rows.clone()]
        self.z: list[float] = []
        self.alias = Alias(torch.ones(N))

    def draw(self, index: Tensor, K: int, generator: torch.Generator) -> Tensor:
        lists = self.alias.draw(len(index) * (K + 1), generator).view(len(index), K + 1)
        lists[:, 0] = index
        return lists

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, lists: Tensor) -> Tensor:
        rows = [self.embed_student(student), self.embed_teacher(teacher)]
        rows = [x / x.pow(2).sum(1, keepdim=True).sqrt() for x in rows]
        scores = []
        for own, other in ((0, 1), (1, 0)):
            fetched = self.memory[other].index_select(0, lists.view(-1)).view(*lists.shape, DIM)
            scores.append(torch.exp(torch.bmm(fetched, rows[own].unsqueeze(2)).squeeze(2) / TEMPERATURE))
        if not self.z:
            self.z = [float(x.detach().mean()) * N for x in scores]
        with torch.no_grad():
            for memory, x in zip(self.memory, rows, strict=True):
                moved = memory.index_select(0, index) * MOMENTUM + x * (1 - MOMENTUM)
                memory.index_copy_(0, index, moved / moved.pow(2).sum(1, keepdim=True).sqrt())
        return sum(self.nce(x / z) for x, z in zip(scores, self.z, strict=True))

    @staticmethod
    def nce(scores: Tensor) -> Tensor:
        noise = (scores.shape[1] - 1) / N
        positive, negative = scores[:, 0], scores[:, 1:]
        of_data = torch.log(positive / (positive + noise + EPS))
        of_noise = torch.log(noise / (negative + noise + EPS))
        return -(of_data.sum() + of_noise.sum()) / len(scores)


def timed(module: nn.Module, inputs: list[Tensor], loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    """Return the time of a step; its loss and gradients."""
    learnt = [*inputs, *module.parameters()]
    for x in learnt:
        x.grad = None
    started = time.perf_counter()
    value = loss()
    value.backward()
    taken = time.perf_counter() - started
    return taken, [value.detach(), *(x.grad for x in learnt if x.grad is not None)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference between tensors, each relative to its largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def measured(K: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = CRDLoss(STUDENT, TEACHER, N, dim=DIM, K=K, temperature=TEMPERATURE, momentum=MOMENTUM)
    theirs = Authors(ours)
    student, teacher = F.relu(torch.randn(BATCH, STUDENT)).requires_grad_(), F.relu(torch.randn(BATCH, TEACHER))
    index = torch.randperm(N)[:BATCH]
    lists = ours.draw(index, torch.Generator().manual_seed(1))
    found = {"step": {"ours_apart": 0.0, "authors_apart": 0.0}}

    exact, wide = copy.deepcopy(theirs).double(), student.detach().double().requires_grad_()
    exact.memory = [x.double() for x in exact.memory]
    for _ in range(2):  # the first step chooses Z, the second uses it
        wanted = timed(exact, [wide], lambda: exact(wide, teacher.double(), index, lists))[1] + exact.memory
        a = timed(ours, [student], lambda: ours(student, teacher, index, lists))[1]
        a += [ours.memory_student.rows, ours.memory_teacher.rows]
        b = timed(theirs, [student], lambda: theirs(student, teacher, index, lists))[1] + theirs.memory
        for name, values in (("ours_apart", a), ("authors_apart", b)):
            found["step"][name] = max(found["step"][name], float(f"{apart(values, wanted):.1e}"))
    assert found["step"]["ours_apart"] <= AGREE, f"K {K}: ours differs: {found}"

    draws = torch.Generator().manual_seed(2)
    steps: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "step": (lambda: ours(student, teacher, index, lists), lambda: theirs(student, teacher, index, lists)),
        "drawn": (
            lambda: ours(student, teacher, index, ours.draw(index, draws)),
            lambda: theirs(student, teacher, index, theirs.draw(index, K, draws)),
        ),
    }
    for name, (mine, other) in steps.items():
        pairs = [(timed(ours, [student], mine)[0], timed(theirs, [student], other)[0]) for _ in range(rounds + 1)]
        one, two = (statistics.median(pair[side] for pair in pairs[1:]) for side in (0, 1))
        times = {"ours_s": round(one, 5), "authors_s": round(two, 5), "ratio": round(two / one, 2)}
        found[name] = times | found.get(name, {})
        print(f"K {K:6}  {name:6} {found[name]}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"batch": BATCH, "dim": DIM, "examples": N, "threads": options.threads}
    record |= {
        "rounds": options.rounds,
        "negatives": {str(K): measured(K, options.rounds) for K in (1024, 4096, 16384)},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
