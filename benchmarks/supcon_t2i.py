"""Compare the losses of SupCon-T2I with the usual ways of computing them: time, value, and peak memory.

    python benchmarks/supcon_t2i.py [--rounds 9] [--threads 1]      writes results/bench/supcon_t2i.json

"labels" cases: the label-guided contrast of two sets of n rows, 20 rows of each class. The usual way stores the matrix of
similarities and a mask of positives. "words" cases: DAMSM by words of n pairs. AttnGAN's way goes through the captions, repeats the
words of each for all pictures, and makes the contexts. Regions are 8 x 8, captions have 6 to 18 words.

Both ways take the same float32 rows of width 256. They run forward and backward, in turn in one process. The record has the medians
over the rounds and the ratio of the medians. A ratio is the usual time over ours: above 1 ours is faster. Memory is the
peak of a separate process of each, minus its memory before the call.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "supcon_t2i.json"
WIDTH, REGIONS, LONGEST, OF_A_CLASS = 256, 64, 18, 20
GAMMAS = (4.0, 5.0, 10.0)


def stored(anchors: Tensor, candidates: Tensor, labels: Tensor) -> Tensor:
    """Compute the label-guided contrast with the whole matrix and a mask."""
    s = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / 0.1
    positives = (labels[:, None] == labels).float()
    log_p = s - s.logsumexp(1, keepdim=True)
    return -((log_p * positives).sum(1) / positives.sum(1)).mean()


def by_caption(regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    """Compute DAMSM by words in AttnGAN's way, caption by caption."""
    n, columns = len(regions), []
    for caption, length in zip(words, lengths.tolist(), strict=True):
        word = caption[None, :, :length].expand(n, -1, -1)
        a = torch.bmm(regions.transpose(1, 2), word).softmax(2)
        b = (GAMMAS[0] * a.transpose(1, 2)).softmax(2)
        context = torch.bmm(regions, b.transpose(1, 2))
        cosine = F.cosine_similarity(word, context, dim=1)
        columns.append((GAMMAS[1] * cosine).logsumexp(1))
    scores = GAMMAS[2] * torch.stack(columns, 1)
    target = torch.arange(n)
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


def labelled(n: int) -> Case:
    """Make two sets of n rows."""
    x, z = (normal(seed, n, WIDTH).requires_grad_() for seed in (0, 1))
    labels = torch.arange(n) % max(1, n // OF_A_CLASS)
    return lambda: fn.label_guided_contrast(x, z, labels, labels, 0.1), lambda: stored(x, z, labels)


def worded(n: int) -> Case:
    """Make regions and words of n pairs."""
    regions, words = normal(0, n, WIDTH, REGIONS).requires_grad_(), normal(1, n, WIDTH, LONGEST).requires_grad_()
    lengths = 6 + torch.arange(n) % (LONGEST - 5)
    return lambda: sum(fn.damsm_words(regions, words, lengths, GAMMAS)), lambda: by_caption(regions, words, lengths)


if __name__ == "__main__":
    cases = {f"labels, {n:,} rows": (labelled, n) for n in (64, 1024, 4096)}
    cases |= {f"words, {n} pairs": (worded, n) for n in (16, 48)}
    run(
        {name: Sides(partial(make, n), partial(make, 16), 10 if n <= 64 else 1) for name, (make, n) in cases.items()},
        OUT,
        __doc__,
        rounds=3,
        width=WIDTH,
    )
