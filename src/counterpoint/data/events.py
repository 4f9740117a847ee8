"""`events`: short synthetic sounds, one event each, with its name as label and caption. Their world is `worlds.events`.

Every sound begins with its event and has zeros after it. An event lasts at most half of the sound, so that two of them fit in
one. Systems that compose clips of several events draw from these.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, ArrayWaves, Modality
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import events as world
from counterpoint.errors import CounterpointError


def load(
    argument: None = None,
    *,
    kinds: int = 40,
    train: int = 12,
    valid: int = -1,
    test: int = 4,
    seconds: float = 0.4,
    rate: int = 8000,
    noise: float = 0.1,
    seed: int = 0,
) -> AlignedData:
    """Draw the set (about a second).

    Args:
        argument: not used; sources share a signature.
        kinds: number of kinds of events, 2 to 60.
        train, test: numbers of sounds of each kind, at least 1.
        valid: number of valid sounds of each kind; -1 for as many as test sounds.
        seconds: length of a sound, 0.1 to 10; an event lasts 0.3 to 0.5 of it.
        rate: samples per second, 7,000 to 48,000.
        noise: standard deviation of the noise in a sound, at least 0, against a level of 1.
        seed: seed of motifs and sounds, at least 0; another seed gives another world.

    Raises CounterpointError for an option out of range.

    >>> data = load(kinds=2, train=3, test=1)
    >>> data.classes, data.train.column("audio", np.arange(6)).shape
    (('bang', 'beep'), (6, 3200))
    """
    if not 2 <= kinds <= len(world.NAMES):
        raise CounterpointError(f"events: kinds must lie in 2..{len(world.NAMES)}, got {kinds}")
    if min(train, test) < 1 or noise < 0 or seed < 0:
        raise CounterpointError(
            f"events needs train and test of at least 1, noise and seed of at least 0; got {train=}, {test=}, {noise=}, {seed=}"
        )
    if not 0.1 <= seconds <= 10 or not 7000 <= rate <= 48_000:
        raise CounterpointError(
            f"events needs seconds of 0.1 to 10 and a rate of 7000 to 48000; got {seconds=}, {rate=}"
        )
    valid, samples = checked_count("events", valid, test), round(seconds * rate)
    rng = np.random.default_rng([2408_09269, seed])
    motifs, names = world.motifs(rng, kinds), world.NAMES[:kinds]

    def columns(many: int) -> AlignedColumns:
        labels = np.tile(np.arange(kinds), many)
        sounds = np.zeros((len(labels), samples), np.int16)
        for row, kind in enumerate(labels):
            truth = world.scene(rng, [int(kind)], (0.3 * seconds, 0.5 * seconds))
            sounds[row] = np.rint(32767 * world.render(rng, truth, motifs, rate, samples, noise))
        return AlignedColumns({"audio": ArrayWaves(sounds), "text": [names[kind] for kind in labels]}, labels=labels)

    return AlignedData(
        name="events",
        train=columns(train),
        valid=columns(valid),
        test=columns(test),
        modalities={"audio": Modality("audio", rate=rate, samples=samples), "text": Modality("text")},
        classes=names,
    )
