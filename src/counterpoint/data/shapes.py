"""`shapes`: pictures of textured shapes with a class for each pixel, boxes and captions; made from the world of shapes."""

from __future__ import annotations

import numpy as np

from counterpoint.data.dense import ArrayScenes, DenseData, hidden
from counterpoint.data.images import checked_size
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import shapes as world
from counterpoint.errors import CounterpointError, unknown

SPLITS = ("train", "valid", "test")


def load(
    argument: None = None,
    *,
    task: str = "dense",
    train: int = 1200,
    valid: int = -1,
    test: int = 200,
    size: int = 32,
    least: int = 2,
    most: int = 4,
    by: str = "texture",
    labelled: int = -1,
    seed: int = 0,
) -> DenseData | AlignedData:
    """Draw the set (about a second).

    Args:
        argument: not used; sources share a signature.
        task: "dense" or "views" for pictures with masks and boxes; "aligned" for pictures and captions.
        train, test: numbers of pictures, at least 2.
        valid: number of valid pictures; -1 for as many as test pictures.
        size: height and width in pixels, 8 to 4096.
        least, most: range of the number of objects in a picture, 1 to 20.
        by: the class of a pixel: "texture" or "shape" of the object that covers it; the background is class 0.
        labelled: number of training pictures with a mask, for learning from few labels. -1: all.
        seed: seed of the scenes, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if by not in world.KINDS:
        raise unknown("kind of class", by, world.KINDS)
    if min(train, test) < 2 or not 1 <= least <= most <= 20 or labelled < -1 or labelled == 0 or seed < 0:
        raise CounterpointError(
            "shapes: train and test must be at least 2. It needs 1 <= least <= most <= 20. labelled is -1 or at least 1, and "
            f"seed is at least 0; got {train=}, {test=}, {least=}, {most=}, {labelled=}, {seed=}"
        )
    counts = (train, checked_count("shapes", valid, test), test)
    drawn = []
    for number, count in enumerate(counts):
        rng = np.random.default_rng([2011_10043, seed, number])
        truths = [world.scene(rng, least, most, named=task == "aligned") for _ in range(count)]
        rendered = [world.render(truth, size, rng) for truth in truths]
        drawn.append((truths, np.stack([pixels for pixels, _ in rendered]), [owner for _, owner in rendered]))
    if task == "aligned":
        columns = [
            AlignedColumns({"image": _pictures(p), "text": [world.caption(t) for t in ts]}) for ts, p, _ in drawn
        ]
        kinds = {"image": Modality("image", size=size), "text": Modality("text")}
        return AlignedData("shapes", columns[0], columns[1], columns[2], kinds)
    splits = []
    for name, (truths, pixels, owners) in zip(SPLITS, drawn, strict=True):
        masks = np.stack([world.mask(truth, owner, by) for truth, owner in zip(truths, owners, strict=True)])
        objects = [world.boxes(truth, owner, by) for truth, owner in zip(truths, owners, strict=True)]
        splits.append(ArrayScenes(pixels, hidden(masks, labelled) if name == "train" else masks, objects))
    regions = ("background", *world.KINDS[by])
    return DenseData("shapes", splits[0], splits[1], splits[2], (), size, regions=regions)


def _pictures(pixels: np.ndarray) -> ArrayScenes:
    return ArrayScenes(pixels, np.zeros(pixels.shape[:3], np.uint8))
