"""`styled-shapes`: one coloured shape in one of four drawing styles; made from the world of styled shapes.

For the task `labelled` the class is a colour and a shape ("red star"), and the style is the domain. For the task `aligned` each
picture has a caption. So one source trains a teacher of pictures and texts, and its students.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, checked_size
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import styles as world
from counterpoint.errors import CounterpointError, unknown

LABELS = ("both", "shape", "colour", "colour-shape")


def load(
    argument: None = None,
    *,
    task: str = "views",
    train: int = 2048,
    valid: int = -1,
    test: int = 1024,
    size: int = 16,
    label: str = "both",
    styles: str = "",
    unseen: str = "",
    drop: float = 0.1,
    noise: float = 8.0,
    seed: int = 0,
) -> ImageData | AlignedData:
    """Draw the set (a second). Each class and each style is equally frequent.

    Args:
        argument: not used; sources share a signature.
        task: "views" for pictures with classes and domains; "aligned" for pictures and captions.
        train, test: numbers of pictures, at least 2.
        valid: number of valid pictures; -1 for half as many as test pictures.
        size: height and width in pixels, 8 to 4096.
        label: class of a picture: both (64 classes, ordered by shape), shape (8) or colour (8). With colour-shape the classes are
            the 8 colours ("red thing"), then the 8 shapes. Training pictures have their colour as class, and every second valid
            and test picture its shape.
        styles: names of the styles to draw, such as "plain-bright"; default: all.
        unseen: styles to leave out of the splits, such as "outline". They form `shifts["unseen"]`, as many pictures as the
            test split (task views). Default: none.
        drop: probability that a caption lacks a word, 0 to 1.
        noise: standard deviation of the noise, in intensities of 0..255.
        seed: seed of the pictures, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    chosen = [word for word in styles.split("-") if word] or list(world.STYLES)
    apart = [word for word in unseen.split("-") if word]
    for odd in (word for word in [*chosen, *apart] if word not in world.STYLES):
        raise unknown("style of styled-shapes", odd, list(world.STYLES))
    chosen = [word for word in chosen if word not in apart]
    if not chosen:
        raise CounterpointError("styled-shapes: unseen leaves no style for training")
    if label not in LABELS:
        raise unknown("label of styled-shapes", label, list(LABELS))
    if min(train, test) < 2 or not 0 <= drop <= 1 or noise < 0 or seed < 0:
        raise CounterpointError(
            "styled-shapes needs train and test of at least 2, drop in 0..1, noise and seed of at least 0; "
            f"got {train=}, {test=}, {drop=}, {noise=}, {seed=}"
        )
    shapes, colours = world.SHAPES, tuple(world.COLOURS)
    classes = {
        "both": tuple(world.name(s, c) for s in range(len(shapes)) for c in range(len(colours))),
        "shape": shapes,
        "colour": colours,
        "colour-shape": (*(f"{colour} thing" for colour in colours), *shapes),
    }[label]
    counts = (train, checked_count("styled-shapes", valid, max(2, test // 2)), test)
    splits: list[ArrayImages] = []
    words: list[list[str]] = []
    for number, count in enumerate((*counts, test) if apart else counts):
        rng = np.random.default_rng([2310_08255, seed, number])
        pair = rng.permutation(np.arange(count) % (len(shapes) * len(colours)))
        styled = [world.STYLES.index(word) for word in (apart if number == len(counts) else chosen)]
        truth = world.scenes(count, rng, pair // len(colours), pair % len(colours), styled)
        second = (np.arange(count) % 2 == 1) & (number > 0)
        mixed = np.where(second, len(colours) + truth.shape, truth.colour)
        labels = {"both": pair, "shape": truth.shape, "colour": truth.colour, "colour-shape": mixed}[label]
        splits.append(ArrayImages(world.render(truth, size, noise, rng), labels, domains=truth.style))
        words.append([world.caption(truth, row, drop, rng) for row in range(count)] if task == "aligned" else [])
    if task != "aligned":
        shifts = dict(zip(["unseen"], splits[3:], strict=False))
        return ImageData(
            "styled-shapes", splits[0], splits[1], splits[2], classes, size, shifts=shifts, domains=world.STYLES
        )
    columns = [
        AlignedColumns({"image": ArrayImages(split.pixels), "text": texts}, split.labels)
        for split, texts in zip(splits, words, strict=True)
    ]
    kinds = {"image": Modality("image", size=size), "text": Modality("text")}
    return AlignedData("styled-shapes", columns[0], columns[1], columns[2], kinds, classes=classes)
