"""The source `scores`: renditions cut into windows, in the form that the task `aligned` takes."""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.scores.engraving import HEIGHT
from counterpoint.data.scores.renditions import DOMAINS, role_of, stored
from counterpoint.data.scores.synthesis import RATE
from counterpoint.data.scores.windows import SheetWindows, SoundWindows
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.errors import CounterpointError


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    pieces: int = 108,
    valid: float = SHARE,
    seconds: float = 2.1,
    hop: int = 1,
    seed: int = 0,
) -> AlignedData:
    """Open the set; draw and play it where it is not in the cache (under a minute).

    Args:
        argument: not used; sources share a signature.
        task: "aligned"; sources share a signature.
        pieces: number of pieces, at least 6: a third for training and valid, a sixth for test, the rest unpaired.
        valid: share of the training pieces that form the valid split, between 0 and 1; at least one piece.
        seconds: length of a snippet's sound, 0.1 to 30; a window holds twice as much.
        hop: every hop-th onset of a piece becomes an item, at least 1.
        seed: seed of the choice, playing and printing of pieces, at least 0; another seed gives another set.

    Raises CounterpointError when a package is not installed, an option is out of range or there are too few pieces.

    >>> data = load(pieces=12)  # doctest: +SKIP
    >>> data.train.column("sheet", np.arange(2)).shape, data.train.column("audio", np.arange(2)).shape  # doctest: +SKIP
    ((2, 120, 120, 3), (2, 92610))
    """
    if task != "aligned":
        raise CounterpointError(f"scores is for the task aligned, not for {task}")
    if pieces < 6:
        raise CounterpointError(f"scores needs pieces >= 6 (a third train, a sixth test, half unpaired), got {pieces}")
    if not 0.1 <= seconds <= 30:
        raise CounterpointError(f"seconds is the length of a snippet of sound, 0.1 to 30; got {seconds:g}")
    if hop < 1 or seed < 0:
        raise CounterpointError(f"scores needs hop >= 1 and seed >= 0, got {hop} and {seed}")
    checked_share("scores", valid)
    third = pieces // 3
    last = min(third - 1, third - max(1, round(valid * third)))  # of the pieces that are trained on
    if last < 1:
        raise CounterpointError(
            f"scores: valid={valid:g} leaves none of {third} pieces to train on; set a smaller share"
        )
    notes: list[str] = []
    made = stored(pieces, seed, notes)
    samples = round(2 * seconds * RATE)
    roles = {"valid": ("train", 0), "test": ("test", 0), "real": ("test", 1), "unpaired": ("unpaired", 1)}

    def columns(part: str) -> AlignedColumns:
        role, domain = roles.get(part, ("train", 0))
        chosen = [r for r in made if role_of(r.number, pieces) == role and r.domain == domain]
        if role == "train":
            chosen = [r for r in chosen if (r.number >= last) == (part == "valid")]
        # A piece may have only a score or only a sound.
        seen = np.concatenate([np.full(len(r.at[::hop]), r.strip.size > 0) for r in chosen])
        heard = np.concatenate([np.full(len(r.at[::hop]), r.wave.size > 0) for r in chosen])
        return AlignedColumns(
            {
                "sheet": SheetWindows([r.strip for r in chosen], [r.x[::hop] for r in chosen]),
                "audio": SoundWindows([r.wave for r in chosen], [r.at[::hop] for r in chosen], samples),
            },
            presence={"sheet": seen, "audio": heard},
            domains=np.full(len(seen), domain, np.int64),
            groups=np.concatenate([np.full(len(r.at[::hop]), r.number, np.int64) for r in chosen]),
        )

    return AlignedData(
        name="scores",
        train=columns("train"),
        valid=columns("valid"),
        test=columns("test"),
        modalities={
            "sheet": Modality("image", size=HEIGHT),
            "audio": Modality("audio", rate=RATE, samples=samples),
        },
        notes=notes,
        domains=DOMAINS,
        shifts={"real": columns("real")},
        unpaired=columns("unpaired"),
    )
