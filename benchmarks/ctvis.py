"""Compare CTVIS's memories, losses and tracker with loops over instances, as in the authors' code.

    python benchmarks/ctvis.py [--rounds 7] [--threads 1]      writes results/bench/ctvis.json

The sizes are the authors': clips of 10 frames with 100 queries of width 256. n is the number of instances of a clip. The loops
follow the authors' code: a memory and an item for each instance and frame, and one pass over all tracks for each detection.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.systems.dense.ctvis import clip_losses

OUT = Path(__file__).parents[1] / "results" / "bench" / "ctvis.json"
FRAMES, QUERIES, DIM = 10, 100, 256


def made(n: int, clips: int = 1) -> tuple[Tensor, Tensor]:
    """Draw queries [clips, frames, queries, dim] and matches [clips, frames, n], a fifth of them absent."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(clips, FRAMES, QUERIES, DIM, generator=generator) / 8
    match = torch.rand(clips, FRAMES, QUERIES, generator=generator).argsort(2)[..., :n]
    gone = torch.rand(match.shape, generator=generator) < 0.2
    return queries.requires_grad_(), torch.where(gone, -1, match)


def one_memory(rows: list[Tensor | None]) -> list[Tensor | None]:
    """Update one memory frame by frame."""
    found: list[Tensor | None] = []
    memory: Tensor | None = None
    seen: list[Tensor] = []
    for row in rows:
        if row is not None:
            if memory is None:
                memory = row
            else:
                similar = sum(F.cosine_similarity(x, row, dim=0) for x in seen) / len(seen)
                beta = max(0, similar)
                memory = (1 - beta) * memory + beta * row
            seen.append(row)
        found.append(memory)
    return found


def rows_of(queries: Tensor, match: Tensor, clip: int, instance: int) -> list[Tensor | None]:
    return [queries[clip, t, m] if (m := int(match[clip, t, instance])) >= 0 else None for t in range(FRAMES)]


def memories(n: int) -> Any:
    queries, match = made(n)

    def ours() -> Tensor:
        own = queries.gather(2, match.clamp(min=0)[..., None].expand(-1, -1, -1, DIM)).transpose(1, 2)
        return fn.similarity_guided_memory(own, (match >= 0).transpose(1, 2)).sum()

    def plain() -> Tensor:
        each = [one_memory(rows_of(queries, match, 0, i)) for i in range(n)]
        return torch.stack([row for rows in each for row in rows if row is not None]).sum()

    return [queries], ours, plain


def losses(n: int) -> Any:
    queries, match = made(n)
    there = torch.ones(queries.shape[:3], dtype=torch.bool)
    coin = torch.rand(match.shape, generator=torch.Generator().manual_seed(1)) < 0.5

    def ours() -> Tensor:
        found = clip_losses(queries, there, match, coin)
        return 2 * found.contrastive + 3 * found.aux

    def plain() -> Tensor:
        contrastive, aux = [], []
        for i in range(n):
            rows = rows_of(queries, match, 0, i)
            memory = one_memory(rows)
            for t in range(1, FRAMES):
                anchor, earlier = rows[t], [r for r in rows[:t] if r is not None]
                later = [r for r in rows[t + 1 :] if r is not None]
                if anchor is None or not (earlier or later):
                    continue
                last = earlier[-1] if earlier else later[0]
                before = memory[t - 1]
                positive = before if earlier and coin[0, t, i] and before is not None else last
                keep = [q for q in range(QUERIES) if q != int(match[0, t - 1, i])]
                items = torch.cat([positive[None], queries[0, t - 1, keep]])
                products = items @ anchor
                pairs = products[1:] - products[:1]
                contrastive.append(torch.logsumexp(F.pad(pairs, (1, 0)), 0))
                label = torch.zeros(len(items))
                label[0] = 1
                aux.append((F.cosine_similarity(items, anchor[None]) - label).square().mean())
        return 2 * torch.stack(contrastive).mean() + 3 * torch.stack(aux).mean()

    return [queries], ours, plain


class LoopTracker:
    """Track with a dictionary of tracks, one comparison and one update at a time."""

    def __init__(self) -> None:
        self.tracks: dict[int, dict[str, Any]] = {}
        self.next = 0

    def step(self, rows: Tensor, scores: Tensor) -> list[int]:
        ids = [-1] * len(rows)
        names = list(self.tracks)
        if names:
            memory = torch.stack([self.tracks[name]["memory"] for name in names])
            similarity = rows @ memory.T
            match = (similarity.softmax(1) + similarity.softmax(0)) / 2
            frames = torch.tensor([float(len(self.tracks[name]["seen"])) for name in names])
            for i in range(len(rows)):
                values = match[i].clone()
                over = values > 0.3
                if over.sum() > 1:
                    values = torch.where(over, values * frames, values * frames[over].mean())
                best = int(values.argmax())
                if values[best] > 0.3:
                    ids[i] = names[best]
                    match[:i, best] = 0
                    match[i + 1 :, best] = 0
        for i, row in enumerate(rows):
            if ids[i] < 0 and scores[i] > 0.01:
                ids[i] = self.next
                self.tracks[self.next] = {"memory": row, "seen": [row]}
                self.next += 1
            elif ids[i] >= 0:
                track = self.tracks[ids[i]]
                past = track["seen"][-10:]
                beta = max(0, sum(F.cosine_similarity(x, row, dim=0) for x in past) / len(past))
                track["memory"] = (1 - beta) * track["memory"] + beta * row
                track["seen"].append(row)
        return ids


def tracking(n: int) -> Any:
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n, DIM, generator=generator) / 4
    clips = [centres + torch.randn(n, DIM, generator=generator) / 10 for _ in range(30)]
    scores = [torch.full((n,), 0.9)] * 30

    def ours() -> Tensor:
        ids, _ = fn.online_tracker(clips, scores)
        return torch.stack(ids).float().sum()

    def plain() -> Tensor:
        tracker = LoopTracker()
        return (
            torch.tensor(np.array([tracker.step(rows, s) for rows, s in zip(clips, scores, strict=True)])).float().sum()
        )

    return [], ours, plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "memories": (memories, (5, 20)),
    "losses": (losses, (5, 20)),
    "tracker, 30 frames": (tracking, (5, 20)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM)
