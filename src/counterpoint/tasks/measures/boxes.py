"""Measure detections as COCO does, through pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import Boxes
from counterpoint.errors import needs_extra


class Detections(NamedTuple):
    """The detections in a picture, n of them."""

    corners: NDArray[np.float32]  # [n, 4] left, top, right, bottom in pixels
    labels: NDArray[np.int64]  # [n] class numbers
    scores: NDArray[np.float32]  # [n] 0 to 1


def average_precision(
    truth: Sequence[Boxes], found: Sequence[Detections]
) -> tuple[dict[str, float], dict[int, tuple[float, float]]]:
    """Compute COCO's average precision of detections over all pictures.

    Args:
        truth: the objects of each picture.
        found: its detections. The best 100 of each picture and class count.

    Returns the measures, and AP and AP50 of each class that has an object:

    - "ap": the mean over the classes, and over ten thresholds of IoU from 0.5 to 0.95, of the average precision.
    - "ap50", "ap75": the same at an IoU of 0.5 and of 0.75.
    - "ar100": the mean over the classes and thresholds of the largest recall with 100 detections a picture.

    Each is 0 without an object. Raises CounterpointError without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise needs_extra("the average precision of boxes", "dense") from error

    own: list[dict[str, Any]] = [
        {
            "id": number,
            "image_id": row,
            "category_id": int(label),
            "bbox": _sides(box),
            "area": _area(box),
            "iscrowd": 0,
        }
        for number, (row, box, label) in enumerate(
            (
                (row, box, label)
                for row, one in enumerate(truth)
                for box, label in zip(one.corners, one.labels, strict=True)
            ),
            start=1,
        )
    ]
    numbers = sorted({entry["category_id"] for entry in own})
    if not own:
        return dict.fromkeys(("ap", "ap50", "ap75", "ar100"), 0.0), {}
    given = [
        {"image_id": row, "category_id": int(label), "bbox": _sides(box), "score": float(score)}
        for row, one in enumerate(found)
        for box, label, score in zip(one.corners, one.labels, one.scores, strict=True)
        if int(label) in numbers
    ]
    if not given:
        return dict.fromkeys(("ap", "ap50", "ap75", "ar100"), 0.0), dict.fromkeys(numbers, (0.0, 0.0))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        known = COCO()
        known.dataset = {
            "info": {},
            "images": [{"id": row} for row in range(len(truth))],
            "annotations": own,
            "categories": [{"id": number} for number in numbers],
        }
        known.createIndex()
        measured: Any = COCOeval(known, known.loadRes(given), "bbox")
        measured.params.areaRng, measured.params.areaRngLbl = [[0, 1e10]], ["all"]
        measured.params.maxDets = [100]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][..., 0, 0]  # [thresholds, recalls, classes]
    recall = measured.eval["recall"][..., 0, 0]
    each = {n: (float(precision[:, :, k].mean()), float(precision[0, :, k].mean())) for k, n in enumerate(numbers)}
    values = {"ap": precision.mean(), "ap50": precision[0].mean(), "ap75": precision[5].mean(), "ar100": recall.mean()}
    return {name: float(value) for name, value in values.items()}, each


def _sides(box: NDArray[np.float32]) -> list[float]:
    """Return a box as left, top, width and height."""
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def _area(box: NDArray[np.float32]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
