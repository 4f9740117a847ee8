"""`moving-objects`: sentences on invented objects, some with clips that show how large, fast and bouncy they are.

Half of the words are probed in the valid split, half in the test split. All occur in every split. Plain texts say an attribute
of an object in a small share of sentences, texts with clips in none.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.tokens import TokenData, TokenSplit
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import moving_objects as world
from counterpoint.errors import CounterpointError


def load(
    argument: None = None,
    *,
    train: int = 10000,
    grounded: int = 5000,
    valid: int = -1,
    test: int = 2400,
    words: int = 120,
    said: float = 0.03,
    frames: int = 12,
    noise: float = 0.1,
    seed: int = 0,
) -> TokenData:
    """Draw the set (about a second).

    Args:
        argument: not used; sources share a signature.
        train: number of plain training texts, at least 2.
        grounded: number of training texts with a clip, at least 2.
        valid: number of valid texts, which have clips; -1 for as many as test texts.
        test: number of test texts, which have clips, at least 2.
        words: number of objects, even, 20 to 2,000; half of them are probed in each of valid and test.
        said: share of the plain texts that say an attribute of the object, 0..1.
        frames: number of a clip's frames, at least 2.
        noise: standard deviation of a clip's noise, at least 0.
        seed: seed of words, texts and clips, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    valid = checked_count("moving-objects", valid, test)
    if min(train, grounded, test) < 2 or frames < 2 or noise < 0 or not 0 <= said <= 1 or seed < 0:
        raise CounterpointError(
            "moving-objects: train, grounded, test and frames must be at least 2, noise and seed not negative and said in 0..1; "
            f"got {train}, {grounded}, {test}, {frames}, {noise}, {seed} and {said}"
        )
    if not 20 <= words <= 2000 or words % 2:
        raise CounterpointError(f"moving-objects: words must be even and lie in 20..2000, got {words}")
    rng = np.random.default_rng([2107_02681, seed])
    names = world.names(rng, words)
    counts = [len(levels) for levels in world.LEVELS.values()]
    half = words // 2
    # Of each half, every level of an attribute has nearly as many words as another.
    drawn = [np.stack([rng.permutation(np.arange(half) % count) for count in counts], 1) for _ in range(2)]
    levels = np.concatenate(drawn)

    def split(count: int, *, clips: bool, share: float = 0.0, probed: slice | None = None) -> TokenSplit:
        chosen = np.concatenate([rng.permutation(words) for _ in range(-(-count // words))])[:count]
        texts, seen = [], []
        for thing in chosen.tolist():
            adjective = ""
            if rng.random() < share:
                which = int(rng.integers(len(counts)))
                adjective = list(world.LEVELS.values())[which][levels[thing, which]]
            texts.append(world.sentence(rng, names[thing], adjective))
            if clips:
                seen.append(world.clip(rng, tuple(levels[thing].tolist()), frames, noise))
        attributes = {
            attribute: {names[n]: each[levels[n, at]] for n in range(words)[probed]}
            for at, (attribute, each) in enumerate(world.LEVELS.items())
            if probed is not None
        }
        return TokenSplit(texts, seen if clips else None, attributes)

    return TokenData(
        "moving-objects",
        train=split(train, clips=False, share=said),
        grounded=split(grounded, clips=True),
        test=split(test, clips=True, probed=slice(half, None)),
        valid=split(valid, clips=True, probed=slice(half)),
    )
