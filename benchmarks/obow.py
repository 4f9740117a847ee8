"""Compare OBoW's targets and loss with transcriptions of the authors' way: time, value, and peak memory.

    python benchmarks/obow.py [--rounds 3] [--threads 1]      writes results/bench/obow.json

Both take the same float32 rows in turn in one process. The record has the medians over the rounds and the ratio of the
medians. A ratio is the transcription's time over ours: above 1 ours is faster. There are 8,192 words. The transcription computes
all distances by a 1 x 1 convolution, then a softmax and a maximum over locations. Its loss makes logits and the divergence from
repeated targets. Memory is the peak of a separate process of each, minus its memory before the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.systems.images.obow import WordGenerator

OUT = Path(__file__).parents[1] / "results" / "bench" / "obow.json"
WORDS, BETA, KAPPA, MEAN = 8192, 15.0, 8.0, 40.0


def targets(n: int, dim: int, side: int) -> Case:
    """Make the targets of n pictures from maps of `side` x `side` locations, in training mode."""
    feature_map, words = normal(0, n, dim, side, side).relu_(), normal(1, WORDS, dim).relu_()

    def plain() -> Tensor:
        part = feature_map[:, :, 1:-1, 1:-1].contiguous()
        lengths = part.square().sum(1, keepdim=True)
        distances = F.conv2d(part, -2 * words[:, :, None, None], words.square().sum(1)) + lengths
        mean = 0.99 * MEAN + 0.01 * distances.min(1).values.mean()
        codes = F.softmax(-(BETA / mean) * distances, dim=1)
        return F.normalize(codes.flatten(2).max(2).values, p=1.0, dim=1)

    return lambda: fn.bow_targets(feature_map, words, MEAN, BETA, train=True).bow, plain


def loss(n: int, dim: int, width: int) -> Case:
    """Make the loss of two crops and five patches of n pictures, with its gradients."""
    words, bow = normal(1, WORDS, dim).relu_(), (4 * normal(2, n, WORDS)).softmax(1)
    feats = [normal(3, 2 * n, width).relu_().requires_grad_(), normal(4, 5 * n, width).relu_().requires_grad_()]
    head = WordGenerator(dim, width)

    def plain() -> Tensor:
        weight, total = head(words), torch.zeros(())
        for group in feats:
            logs = F.log_softmax(KAPPA * group @ weight.T, dim=1)
            total = total + F.kl_div(logs, bow.repeat_interleave(len(group) // n, 0), reduction="batchmean")
        return total

    return lambda: fn.obow_loss(feats, [words], [bow], [head], KAPPA).loss, plain


CASES: dict[str, tuple[Callable[..., Case], tuple[int, int, int]]] = {
    "targets, 32 maps of 7 x 7 x 512": (targets, (32, 512, 7)),
    "targets, 16 maps of 14 x 14 x 256": (targets, (16, 256, 14)),
    "targets, 128 maps of 14 x 14 x 256": (targets, (128, 256, 14)),
    "targets, 32 maps of 14 x 14 x 1024": (targets, (32, 1024, 14)),
    "loss, 32 pictures": (loss, (32, 256, 512)),
    "loss, 128 pictures": (loss, (128, 256, 512)),
}


SIDES = {name: Sides(partial(make, *sizes), partial(make, 2, *sizes[1:])) for name, (make, sizes) in CASES.items()}

if __name__ == "__main__":
    run(SIDES, OUT, __doc__, rounds=3, other="transcription", words=WORDS)
