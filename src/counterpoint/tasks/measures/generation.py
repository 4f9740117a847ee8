"""Measure generated pictures by judges that were trained apart from the learner.

    frechet_distance   distance between two sets of features, as normal distributions (FID: Heusel et al., arXiv 1706.08500)
    class_accuracy     share of generated pictures that the judge gives the class of their caption
    r_precision        share of generated pictures that match their own caption best among 30 (AttnGAN, arXiv 1711.10485)

A `Judge` learns from the training pictures: a classifier, whose features the distance uses, and a network that matches pictures
and captions. It is trained once for a set and kept in the cache. Features of larger judges, such as Inception's, need downloads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.seeds import seed_torch
from counterpoint.data.cached import build_once
from counterpoint.data.generation import GenerationSplit
from counterpoint.encoders.images import build_image_encoder
from counterpoint.views.images import normalise

CANDIDATES = 30  # captions that a picture is matched with
STEPS, PASSES, BATCH, MOST = (
    400,
    24,
    64,
    20000,
)  # of a judge's training: steps at most, passes, pictures in a step, of all
LOOK = "conv-cells"  # its image encoders
WIDTH = 64  # of the space in which a judge matches
VERSION = 1  # of the judge, for the cache


def frechet_distance(real: Float[Tensor, "n dim"], fake: Float[Tensor, "m dim"]) -> float:
    """Compute |mu_r - mu_f|^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)) of features' means and covariances.

    Raises ValueError for fewer than two rows of a kind, and for NaN.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3)
    9.0
    """
    for name, rows in (("real", real), ("fake", fake)):
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must hold at least two finite rows, got {list(rows.shape)}")
    (a, one), (b, other) = ((rows.double().mean(0), rows.double().T.cov()) for rows in (real, fake))
    one, other = (torch.atleast_2d(x) for x in (one, other))
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # tr (S_r S_f)^(1/2) = tr (root S_f root)^(1/2)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((a - b).square().sum() + one.trace() + other.trace() - 2 * cross)


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return re.findall(r"\w+", text.lower())


class Judge(nn.Module):
    """A classifier of pictures, and a network that matches pictures with captions as bags of words.

    Args:
        size: height and width of pictures in pixels.
        classes: number of classes; 0 for no classifier, whose features are then the matching network's.
        words: known words.
    """

    def __init__(self, size: int, classes: int, words: Sequence[str]) -> None:
        super().__init__()
        self.words = {word: n for n, word in enumerate(words)}
        looks = [build_image_encoder(LOOK, size) for _ in range(2)]
        self.looks = nn.ModuleList(looks)
        dim = looks[0].dim
        self.classify = nn.Linear(dim, classes) if classes else None
        self.image, self.text = nn.Linear(dim, WIDTH), nn.EmbeddingBag(len(words) + 1, WIDTH, mode="sum")

    def features(self, pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute the features that the distance compares."""
        return self.looks[0 if self.classify is not None else 1](normalise(pictures))

    def matched(self, pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute unit rows of pictures in the shared space."""
        return F.normalize(self.image(self.looks[1](normalise(pictures))), dim=1)

    def read(self, captions: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Compute unit rows of captions in the shared space. Unknown words count as one word."""
        ids = [[self.words.get(word, len(self.words)) for word in words_of(text)] for text in captions]
        offsets = np.cumsum([0, *map(len, ids)])[:-1]
        flat = torch.tensor([n for row in ids for n in row], dtype=torch.int64)
        return F.normalize(self.text(flat, torch.from_numpy(offsets)), dim=1)


def trained_judge(split: GenerationSplit, classes: int) -> Judge:
    """Train a judge on a split, or read it from the cache. It depends on the split alone.

    Args:
        split: training pictures with captions and labels; of many, MOST at random.
        classes: number of classes; 0 without labels.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(split))[:MOST])
    pixels, labels = split.images(rows), split.labels[rows]
    captions = [split.captions[row] for row in rows]
    words = sorted({word for text in captions for word in words_of(text)})
    key = VERSION, STEPS, pixels, labels, captions, classes

    def build() -> dict[str, NDArray[np.float32]]:
        with torch.random.fork_rng(devices=[]):
            seed_torch(0)
            judge = Judge(pixels.shape[1], classes, words)
            _train(judge, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), captions)
        return {name: value.numpy() for name, value in judge.state_dict().items()}

    def read(arrays: dict[str, NDArray[np.float32]]) -> Judge:
        with torch.random.fork_rng(devices=[]):
            judge = Judge(pixels.shape[1], classes, words)
        judge.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
        return judge.eval().requires_grad_(False)

    return build_once("judges", key, build, read)


def _train(judge: Judge, pictures: Tensor, labels: Tensor, captions: Sequence[str]) -> None:
    """Train the classifier by cross-entropy and the matching by CLIP's loss."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    steps = min(STEPS, max(10, PASSES * len(pictures) // BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            at = torch.randperm(len(pictures), generator=generator)[:BATCH]
            logits = 10 * judge.matched(pictures[at]) @ judge.read([captions[n] for n in at.tolist()]).T
            target = torch.arange(len(at))
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            known = labels[at] >= 0
            if judge.classify is not None and bool(known.any()):
                found = judge.classify(judge.features(pictures[at][known]))
                loss = loss + F.cross_entropy(found, labels[at][known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def judged(
    judge: Judge,
    real: UInt8[Tensor, "n 3 h w"],
    fake: UInt8[Tensor, "n 3 h w"],
    captions: Sequence[str],
    labels: Int[Tensor, " n"],
) -> dict[str, float]:
    """Compute the measures of pictures that were generated for captions.

    Args:
        judge: the trained judge.
        real: real pictures of the captions.
        fake: generated pictures, in the same order.
        captions: their captions.
        labels: their classes, -1 for none; these do not count for the accuracy.
    """
    found = {"frechet_distance": frechet_distance(judge.features(real), judge.features(fake))}
    known = labels >= 0
    if judge.classify is not None and bool(known.any()):
        said = judge.classify(judge.features(fake)).argmax(1)
        found["class_accuracy"] = float((said == labels)[known].double().mean())
    found["r_precision"] = r_precision(judge.matched(fake), judge.read(captions), captions)
    return found


def r_precision(
    pictures: Float[Tensor, "n dim"],
    captions: Float[Tensor, "n dim"],
    texts: Sequence[str],
    candidates: int = CANDIDATES,
) -> float:
    """Compute the share of pictures whose own caption is the nearest among `candidates`; a tie counts as wrong.

    Args:
        pictures, captions: rows to compare by cosine, in the same order.
        texts: the captions; equal ones never compete.
        candidates: number of captions, with the own one. The others are drawn at random, always the same.
    """
    similarity = F.normalize(pictures.float(), dim=1) @ F.normalize(captions.float(), dim=1).T
    rng, right = np.random.default_rng(0), []
    for row, text in enumerate(texts):
        others = [n for n in rng.permutation(len(texts)) if texts[n] != text][: candidates - 1]
        right.append(not others or bool(similarity[row, row] > similarity[row, others].max()))
    return float(np.mean(right))
