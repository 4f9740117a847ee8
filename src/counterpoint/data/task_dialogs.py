"""`task-dialogs`: booking dialogs with known frames. No path of the valid or the test split is a path of the training split."""

from __future__ import annotations

import numpy as np

from counterpoint.data.dialogs import Dialog, DialogData, DialogSplit, user_turns
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import dialogs as world
from counterpoint.errors import CounterpointError

SCHEMES = ("whole paths", "domains and intents", "slots and values")


def load(
    argument: None = None,
    *,
    train: int = 3000,
    unlabelled: int = 3000,
    valid: int = -1,
    test: int = 1000,
    paths: int = 250,
    turns: int = 1,
    cue: float = 0.7,
    slot_cue: float = 0.8,
    noise: int = 8,
    schemes: int = 1,
    seed: int = 0,
) -> DialogData:
    """Draw the set (about a second).

    Args:
        argument: not used; sources share a signature.
        train: number of training dialogs with annotations, at least 2.
        unlabelled: number of training dialogs without; 0 for none.
        valid: number of valid dialogs; -1 for as many as test dialogs.
        test: number of test dialogs, at least 2.
        paths: number of different paths in the training split, 20 to 2,000. Valid and test share the others by halves.
        turns: largest number of the user's turns in a dialog, 1 to 8; all turns of a dialog have one domain.
        cue: probability that a turn names its domain, and its intent, 0..1.
        slot_cue: probability that a turn names its slot, 0..1.
        noise: number of filler words in a turn, at least 0.
        schemes: number of corpora in the training split, 1 to 3. The first annotates whole paths, the second domains and intents,
            the third slots and values.
        seed: seed of words, paths and dialogs, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    valid = checked_count("task-dialogs", valid, test)
    for name, value, low, high in (
        ("paths", paths, 20, 2000),
        ("turns", turns, 1, 8),
        ("cue", cue, 0, 1),
        ("slot_cue", slot_cue, 0, 1),
        ("schemes", schemes, 1, len(SCHEMES)),
    ):
        if not low <= value <= high:
            raise CounterpointError(f"task-dialogs: {name} must lie in {low}..{high}, got {value}")
    if min(train, test) < 2 or min(unlabelled, noise, seed) < 0:
        raise CounterpointError(
            "task-dialogs: train and test must be at least 2, unlabelled, noise and seed not negative; got "
            f"{train}, {test}, {unlabelled}, {noise} and {seed}"
        )
    rng = np.random.default_rng([2209_06638, seed])
    words = world.fillers(rng, 150)
    every = world.paths(rng, int(np.prod(world.SIZES)))
    half = (len(every) - paths) // 2
    known, watched, held = every[:paths], every[paths : paths + half], every[paths + half :]

    def split(count: int, among: list[world.Path], of: int = 1, *, annotated: bool = True) -> DialogSplit:
        by_domain = [[path for path in among if path[0] == d] for d in range(world.SIZES[0])]
        dialogs: list[Dialog] = []
        for n in range(count):
            first = among[rng.integers(len(among))]
            same = by_domain[first[0]]
            more = [same[k] for k in rng.integers(len(same), size=int(rng.integers(turns)))]
            scheme = n % of if annotated else None
            dialogs.append(world.dialog(rng, [first, *more], (cue, cue, slot_cue), words, noise, scheme))
        return user_turns(dialogs, [n % of for n in range(count)], annotated=annotated)

    return DialogData(
        "task-dialogs",
        train=split(train, known, schemes),
        unlabelled=split(unlabelled, known, annotated=False) if unlabelled else None,
        test=split(test, held),
        valid=split(valid, watched),
        corpora=SCHEMES[:schemes],
    )
