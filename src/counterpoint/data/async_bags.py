"""`async-bags`: synthetic bags with audio-visual asynchrony and known truth: data of MACIL-SD's claim.

A bag is a scene: Gaussian noise around one of six scene prototypes, which change every eight snippets. Violent bags hold one
or two events. An event is one of three kinds, each with a visual and an audio prototype. Its sound lags its sight by up to five
snippets. Every bag also holds confusers, Poisson(0.5) of them: a sight alone or a sound alone that resembles violence
(cosine 0.6) but is not violent. A snippet is violent while an event is seen or heard.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.valid import checked_count

VISUAL, AUDIO = 48, 32
SCENES, KINDS = 6, 3
SCENE_LENGTH = 8
AMPLITUDE = 1.2
FRAMES = 16


def _prototypes(rng: np.random.Generator, count: int, dim: int) -> NDArray[np.float64]:
    """Draw `count` random directions of length 0.35 sqrt(dim): [count, dim]."""
    rows = rng.standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * 0.35 * np.sqrt(dim)


def _near(rng: np.random.Generator, prototypes: NDArray[np.float64], cosine: float) -> NDArray[np.float64]:
    """Draw, for each prototype, one vector of equal length at the given cosine to it."""
    length = np.linalg.norm(prototypes, axis=1, keepdims=True)
    unit = prototypes / length
    other = rng.standard_normal(prototypes.shape)
    other -= (other * unit).sum(1, keepdims=True) * unit
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return length * (cosine * unit + np.sqrt(1 - cosine**2) * other)


class _World:
    def __init__(self, rng: np.random.Generator) -> None:
        self.scene = {m: _prototypes(rng, SCENES, d) for m, d in (("visual", VISUAL), ("audio", AUDIO))}
        self.event = {m: _prototypes(rng, KINDS, d) for m, d in (("visual", VISUAL), ("audio", AUDIO))}
        self.confuser = {m: _near(rng, rows, 0.6) for m, rows in self.event.items()}

    def bag(self, rng: np.random.Generator) -> tuple[dict[str, NDArray[np.float32]], int, NDArray[np.int8]]:
        length = int(rng.integers(24, 49))
        scenes = np.repeat(rng.integers(SCENES, size=-(-length // SCENE_LENGTH)), SCENE_LENGTH)[:length]
        rows = {m: p[scenes] + rng.standard_normal((length, p.shape[1])) for m, p in self.scene.items()}
        truth = np.zeros(length, np.int8)
        label = int(rng.random() < 0.5)
        for _ in range(rng.integers(1, 3) if label else 0):
            kind, span, lag = rng.integers(KINDS), int(rng.integers(3, 9)), int(rng.integers(0, 6))
            start = int(rng.integers(0, length - span + 1))
            for modality, at in (("visual", start), ("audio", start + lag)):
                rows[modality][at : at + span] += AMPLITUDE * self.event[modality][kind]
                truth[at : at + span] = 1
        for _ in range(rng.poisson(0.5)):
            modality = "visual" if rng.random() < 0.5 else "audio"
            kind, span = rng.integers(KINDS), int(rng.integers(3, 9))
            start = int(rng.integers(0, length - span + 1))
            rows[modality][start : start + span] += AMPLITUDE * self.confuser[modality][kind]
        return {m: r.astype(np.float32) for m, r in rows.items()}, label, truth


def load(argument: str | None = None, *, train: int = 320, valid: int = -1, test: int = 200, seed: int = 0) -> BagData:
    """Draw labelled training bags, and valid and test bags with truth, from one set of prototypes.

    Args:
        argument: not used; sources share a signature.
        train: number of training bags.
        valid: number of valid bags; -1 for as many as test bags.
        test: number of test bags.
        seed: seed of the prototypes and of all bags.
    """
    valid = checked_count("async-bags", valid, test)
    rng = np.random.default_rng([2207_05500, seed])
    world = _World(rng)
    bags = []
    for number in range(train):
        rows, label, _ = world.bag(rng)
        bags.append(Bag(f"train-{number}", rows["visual"], rows["audio"], label))

    def videos(split: str, count: int) -> list[TestVideo]:
        found = []
        for number in range(count):
            rows, label, truth = world.bag(rng)
            truth = truth.repeat(FRAMES)
            found.append(TestVideo(f"{split}-{number}", rows["visual"][None], rows["audio"], label, truth))
        return found

    tested = videos("test", test)  # drawn before the valid bags, so that it does not depend on their number
    return BagData("async-bags", bags, videos("valid", valid), tested, VISUAL, AUDIO, frames_per_snippet=FRAMES)
