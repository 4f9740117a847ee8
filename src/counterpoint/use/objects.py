"""Detect the objects of pictures with a finished run of the task `boxes`: `counterpoint predict` with such a run.

>>> from counterpoint.use.objects import ObjectDetector
>>> ObjectDetector.load("runs/boxes").detect(["a.jpg"])[0].objects[0].label   # doctest: +SKIP
'car'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterpoint.data.coco_files import Square, square
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import replacing
from counterpoint.search.stored import arrow
from counterpoint.use.trained import TrainedRun
from counterpoint.views.images import normalise
from counterpoint.waiting import patient_track

BATCH = 32
COLUMNS = ("picture", "label", "score", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Object:
    """An object that was detected in a picture."""

    label: str
    """Its class."""
    score: float
    """0 to 1."""
    left: float
    top: float
    right: float
    bottom: float
    """Its box, in pixels of the picture."""


@dataclass(frozen=True)
class Seen:
    """A picture and its objects, the surest first."""

    picture: str
    """Path of the file."""
    width: int
    height: int
    """Of the picture, in pixels."""
    objects: tuple[Object, ...]


class ObjectDetector(TrainedRun):
    """A finished run that detects objects, of finetune-det."""

    def detect(
        self, pictures: Sequence[Path | str], *, least: float = 0.5, progress: bool = False
    ) -> tuple[list[Seen], list[tuple[str, str]]]:
        """Return the objects of each picture that can be read, and the name and fault of each other file.

        A picture is scaled so that its longer side is the run's size, as `coco:` scales it.

        Args:
            pictures: paths of files.
            least: least score of an object, 0 to 1.
            progress: show a bar on standard error when it takes longer than two seconds.

        Raises CounterpointError for a least score out of range.
        """
        if not 0 <= least <= 1:
            raise CounterpointError(f"the least score of an object lies in 0..1, got {least}")
        found: list[Seen] = []
        faults: list[tuple[str, str]] = []
        steps = range(0, len(pictures), BATCH)
        for at in patient_track(steps, "detecting") if progress else steps:
            good: list[tuple[str, Square]] = []
            for path in pictures[at : at + BATCH]:
                try:
                    good.append((str(path), square(Path(path), self.learner.size)))
                except DataError as error:
                    faults.append((str(path), str(error)))
            if good:
                found += self._detected(good, least)
        return found, faults

    @torch.no_grad()
    def _detected(self, given: list[tuple[str, Square]], least: float) -> list[Seen]:
        learner = self.learner
        pixels = np.stack([one.pixels for _, one in given])
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(learner.device))
        found = []
        for (name, one), boxes in zip(given, learner.detect(images), strict=True):
            factor, limit = max(one.own) / learner.size, np.array([*one.own, *one.own])
            corners = np.clip(boxes["boxes"].float().cpu().numpy() * factor, 0, limit)
            objects = [
                Object(learner.regions[label], score, *corner)
                for corner, label, score in zip(
                    corners.tolist(), boxes["labels"].tolist(), boxes["scores"].float().tolist(), strict=True
                )
                if score >= least
            ]
            found.append(Seen(name, *one.own, tuple(sorted(objects, key=lambda of: -of.score))))
        return found


def write_objects(found: Sequence[Seen], out: Path, classes: Sequence[str]) -> None:
    """Write the objects of pictures: as .json in COCO's layout with scores, else a row for each object.

    Args:
        found: pictures with their objects.
        out: a file that ends in .json, .csv, .jsonl or .parquet.
        classes: names of the classes, without the background.

    The file takes the place of an older one only when it is complete.
    """
    rows = [{"picture": one.picture, **asdict(of)} for one in found for of in one.objects]
    with replacing(out) as file:
        if out.suffix in (".json", ".jsonl"):
            whole = json.dumps(coco_layout(found, classes), indent=1)
            text = whole if out.suffix == ".json" else "\n".join(map(json.dumps, rows))
            file.write((text + "\n").encode())
            return
        pa, pq = arrow()
        texts = ("picture", "label")
        schema = pa.schema([(name, pa.string() if name in texts else pa.float64()) for name in COLUMNS])
        table = pa.Table.from_pylist(rows, schema=schema)
        if out.suffix == ".parquet":
            pq.write_table(table, file)
        else:
            from pyarrow import csv

            csv.write_csv(table, file)


def coco_layout(found: Sequence[Seen], classes: Sequence[str]) -> dict[str, Any]:
    """Return pictures and their objects in COCO's layout; each annotation also has its score."""
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    annotations = [
        {
            "image_id": row,
            "category_id": numbers[of.label],
            "bbox": [of.left, of.top, of.right - of.left, of.bottom - of.top],
            "area": (of.right - of.left) * (of.bottom - of.top),
            "iscrowd": 0,
            "score": of.score,
        }
        for row, one in enumerate(found, start=1)
        for of in one.objects
    ]
    return {
        "images": [
            {"id": row, "file_name": one.picture, "width": one.width, "height": one.height}
            for row, one in enumerate(found, start=1)
        ],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
