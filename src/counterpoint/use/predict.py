"""Predict the classes of pictures with a finished run: `counterpoint predict`.

    classifier   a run of a labelled system with a classifier; the score is the softmax probability of the class
    prompts      a run that aligns pictures with texts, and names of classes; the score is the cosine of picture and class
    neighbours   any run that embeds pictures, and labelled pictures; the score is the class's share of the neighbours' votes

>>> from counterpoint.use.predict import Predictor
>>> Predictor.load("runs/first").predict(["a.png", "b.png"])[0].label   # doctest: +SKIP
'cat'
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from counterpoint import data as sources
from counterpoint.core.operands import unit
from counterpoint.data.images import ImageData, ImageSplit, Listed, decode
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.experiment import Experiment
from counterpoint.files import check_writable, replacing, walk
from counterpoint.search.asking import PICTURES
from counterpoint.search.encoder import Encoder
from counterpoint.search.stored import arrow
from counterpoint.tasks.class_texts import names_of, templates_of
from counterpoint.tasks.images import chosen_bank
from counterpoint.tasks.measures import knn_votes
from counterpoint.waiting import patient_track

Method = Literal["classifier", "prompts", "neighbours"]
SCORES = {"classifier": "probability", "prompts": "cosine", "neighbours": "share of votes"}
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
BATCH = 256
TEMPLATE = "a photo of a {}"
BANK = 10_000  # labelled pictures that vote at most


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of a picture."""

    item: str
    """Path of the file, its row of a table, or its split and position."""
    label: str
    """The class with the highest score."""
    score: float
    """Its score; see the method."""
    others: dict[str, float]
    """The classes that follow, best first, with their scores."""
    true: str | None = None
    """The class in the data, where it is known."""
    neighbours: tuple[str, ...] = ()
    """The nearest labelled pictures, nearest first, of the method neighbours."""


class Asked(NamedTuple):
    """Pictures to classify: their names, known classes, and a function that reads those at some positions."""

    names: list[str]
    true: list[str | None]
    read: Callable[[Sequence[int]], np.ndarray]


class Predictor:
    """A finished run that classifies pictures.

    Attributes:
        method: How it classifies.
        classes: Names of the classes.
        size: Height and width of its pictures, in pixels.
    """

    def __init__(self, encoder: Encoder, method: Method, classes: Sequence[str], top: int, k: int) -> None:
        self.encoder, self.method, self.classes, self.top, self.k = encoder, method, list(classes), top, k
        found = encoder.transform.of_kind("image")
        if len(found) != 1:
            raise CounterpointError(
                f"{encoder.run.path} has {'no' if not found else 'several'} modalities of pictures ({encoder.listed()}); "
                "predict needs a run with one"
            )
        self.image = found[0]
        self.size = int(encoder.transform.modalities[self.image]["size"])
        self.rows = torch.zeros(0, 1)  # embeddings of the classes' prompts, or of the labelled pictures
        self.labels, self.named = torch.zeros(0, dtype=torch.int64), list[str]()

    @classmethod
    def load(
        cls,
        run: Run | Path | str,
        *,
        classes: Path | str | None = None,
        templates: str = TEMPLATE,
        bank: str | None = None,
        method: Method | None = None,
        top: int = 3,
        k: int = 20,
        device: str | None = None,
    ) -> Predictor:
        """Load a finished run, and choose how it classifies.

        Args:
            run: An open run, or the path of its directory.
            classes: A text file with a class name a line, for `prompts`. Default: the classes of the run's data.
            templates: Prompts with {} for the class, several between "|", or a text file with one a line.
            bank: A data source whose labelled training pictures vote, for `neighbours`. Default: the run's own data.
            method: classifier, prompts or neighbours. Default: prompts where `classes` is given, neighbours where `bank` is
                given; otherwise the first of the three that the run can.
            top: Number of classes to give, at least 1.
            k: Number of neighbours that vote, at least 1.
            device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. Default: the CPU.

        Raises CounterpointError for a run that cannot classify pictures in this way, DataError for files that cannot be read.
        """
        if method is not None and method not in get_args(Method):
            raise unknown("method", method, get_args(Method))
        if top < 1 or k < 1:
            raise CounterpointError(f"top and k must be at least 1, got {top} and {k}")
        encoder = Encoder.load(run, device=device)
        if method is None:
            method = "prompts" if classes else "neighbours" if bank else _method(encoder)
        if classes and method != "prompts":
            raise CounterpointError(
                f"--classes names classes for the method prompts, not for {method}; leave out one of them"
            )
        if bank and method != "neighbours":
            raise CounterpointError(f"--bank gives neighbours, not the method {method}; leave out one of them")
        if templates != TEMPLATE and method != "prompts":
            raise CounterpointError(
                f"--templates are for the method prompts, not for {method}; leave them out, or add --classes FILE"
            )
        if method == "classifier":
            names = encoder.run.facts().get("class_names")
            if encoder.task != "labelled" or not names or not getattr(encoder.config, "classifies", False):
                raise CounterpointError(
                    f"{encoder.run.path} is a run of {encoder.run.slug}, which has no classifier; "
                    "use --method neighbours, or train one: counterpoint finetune"
                )
            return cls(encoder, method, names, top, k)
        if method == "prompts":
            return cls(encoder, method, (), top, k)._with_prompts(classes, templates)
        return cls(encoder, method, (), top, k)._with_bank(bank)

    def _with_prompts(self, classes: Path | str | None, templates: str) -> Predictor:
        texts = self.encoder.transform.of_kind("text")
        if self.encoder.task != "aligned" or not texts:
            raise CounterpointError(
                f"{self.encoder.run.path} is a run of {self.encoder.run.slug}, which encodes no texts; prompts need a run that "
                "aligns pictures with texts, such as clip"
            )
        if classes is None:
            self.classes = [str(name) for name in self.encoder.run.facts().get("class_names") or self._own_classes()]
        else:
            self.classes = [line.strip() for line in _lines(classes) if line.strip()]
        if len(self.classes) < 2:
            raise CounterpointError(f"{classes or 'the data'} must name at least two classes, got {len(self.classes)}")
        names, forms = names_of(self.classes), templates_of(templates)
        rows = self.encoder.rows(texts[0], [form.replace("{}", name) for name in names for form in forms])
        means = unit(torch.from_numpy(rows)).unflatten(0, (len(names), len(forms))).mean(1)
        self.rows = unit(means)
        return self

    def _own_classes(self) -> Sequence[str]:
        """Return the classes of the run's own data. CounterpointError where they name none."""
        try:
            return tuple(self._source(None).classes)
        except CounterpointError as error:
            raise CounterpointError(
                f"the data of {self.encoder.run.path} name no classes for prompts; "
                "name them with --classes FILE, a class name on each line"
            ) from error

    def _with_bank(self, bank: str | None) -> Predictor:
        source = self._source(bank)
        labels = None if source.train.labels is None else np.asarray(source.train.labels)
        known = np.flatnonzero(np.empty(0) if labels is None else labels >= 0)
        if labels is None or not len(known) or len(source.classes) < 2:
            raise CounterpointError(
                f"{source.name} has no pictures of at least two classes, which must vote; name labelled data with --bank"
            )
        rows = chosen_bank(known, BANK)
        steps = range(0, len(rows), BATCH)
        parts = [
            self._embedded(source.train.images(rows[at : at + BATCH]))
            for at in patient_track(steps, "embedding the bank")
        ]
        self.classes, self.rows, self.labels = list(source.classes), torch.cat(parts), torch.from_numpy(labels[rows])
        self.named = _names(source.train, "train", rows)
        return self

    def _source(self, spec: str | None) -> Any:
        """Load pictures: another source's, or those of the run's own data. DataError for pictures of another size."""
        spec = spec or Experiment.of_run(self.encoder.run).data
        try:
            source = sources.load(spec, task="views")
        except CounterpointError as error:
            raise CounterpointError(f"{spec} has no pictures for predict: {error}") from error
        if not isinstance(source, ImageData) or source.size != self.size:
            size = getattr(source, "size", "unknown")
            raise DataError(
                f"{spec} has pictures of size {size}, the run was trained on {self.size}; add ?size={self.size}"
            )
        return source

    # --- pictures

    def asked(self, source: str, split: str = "test") -> Asked:
        """Return the pictures of a split (train, valid, test or all) of a data source."""
        found = self._source(source)
        if split not in ("all", "train", "valid", "test"):
            raise unknown("split", split, ("all", "train", "valid", "test"))
        parts = {name: getattr(found, name) for name in ("train", "valid", "test") if split in (name, "all")}
        at = [(part, row) for part in parts.values() for row in range(len(part))]
        names = [name for key, part in parts.items() for name in _names(part, key, np.arange(len(part)))]
        true: list[str | None] = []
        for part, row in at:
            label = -1 if part.labels is None else int(part.labels[row])
            true.append(found.classes[label] if label >= 0 and found.classes else None)

        def read(rows: Sequence[int]) -> np.ndarray:
            parts = itertools.groupby((at[n] for n in rows), key=lambda one: id(one[0]))
            inside = [list(group) for _, group in parts]
            return np.concatenate([group[0][0].images(np.array([row for _, row in group])) for group in inside])

        return Asked(names, true, read)

    def predict(self, pictures: Sequence[Any] | Asked, *, progress: bool = False) -> list[Prediction]:
        """Return the prediction of each picture.

        Args:
            pictures: Paths, bytes of files, Pillow images, uint8 arrays [H, W, 3] or [H, W], or torch tensors [C, H, W]; or
                what `asked` returned.
            progress: Show a bar on standard error when it takes longer than two seconds.

        Raises DataError, naming the picture, when one cannot be read.
        """
        count = len(pictures.names) if isinstance(pictures, Asked) else len(pictures)
        steps = range(0, count, BATCH)
        found: list[Prediction] = []
        for at in patient_track(steps, "classifying") if progress else steps:
            rows = range(at, min(at + BATCH, count))
            if isinstance(pictures, Asked):
                values: Any = pictures.read(rows)
                names, true = [pictures.names[n] for n in rows], [pictures.true[n] for n in rows]
            else:
                values = [pictures[n] for n in rows]
                names = [
                    str(v) if isinstance(v, str | Path) else f"picture {n}" for n, v in zip(rows, values, strict=True)
                ]
                true = [None] * len(names)
            found += self._predicted(names, true, values)
        return found

    def _predicted(self, names: Sequence[str], true: Sequence[str | None], values: Any) -> Iterator[Prediction]:
        if self.method == "classifier":
            scores, nearest = self._logits(values).softmax(1), None
        else:
            z = self._embedded(values)
            nearest = (z @ self.rows.T).topk(min(self.top, len(self.rows))).indices if self.named else None
            votes = self.method == "neighbours"
            scores = knn_votes(self.rows, self.labels, z, len(self.classes), k=self.k) if votes else z @ self.rows.T
        best, order = scores.topk(min(self.top, len(self.classes)))
        for n, name in enumerate(names):
            pairs = [(self.classes[c], value) for c, value in zip(order[n].tolist(), best[n].tolist(), strict=True)]
            like = () if nearest is None else tuple(self.named[row] for row in nearest[n].tolist())
            yield Prediction(name, pairs[0][0], pairs[0][1], dict(pairs[1:]), true[n], like)

    @torch.no_grad()
    def _logits(self, values: Any) -> Tensor:
        learner = self.encoder.learner
        images = self.encoder.transform(self.image, values).to(learner.device)
        found = learner.predict({"image": images, "part": "survey", "index": torch.arange(len(images)), "label": None})
        return found["logits"].float().cpu()

    def _embedded(self, values: Any) -> Tensor:
        return unit(torch.from_numpy(self.encoder.rows(self.image, values)))


def _method(encoder: Encoder) -> Method:
    """Return the first way in which a run can classify pictures."""
    if encoder.task == "labelled" and getattr(encoder.config, "classifies", False):
        return "classifier"
    return "prompts" if encoder.task == "aligned" and encoder.transform.of_kind("text") else "neighbours"


def _names(split: ImageSplit, key: str, rows: np.ndarray) -> list[str]:
    return list(split.row_names(rows)) if isinstance(split, Listed) else [f"{key} {row}" for row in rows.tolist()]


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; give a text file with a class name a line") from error


# --- files


def find_pictures(places: Sequence[Path | str]) -> tuple[list[Path], list[str]]:
    """Find the pictures of files and folders. Return them in order, and the files of the folders that are no pictures.

    Raises DataError for a place that does not exist, and where there is no picture.
    """
    found: list[Path] = []
    others: list[str] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = walk(place).files
            found += [path for path in inside if path.suffix.lower() in PICTURES]
            others += [str(path) for path in inside if path.suffix.lower() not in PICTURES]
        elif place.is_file():
            found.append(place)
        else:
            raise DataError(f"{place}: no such file or folder")
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: no picture ({', '.join(PICTURES)})")
    return found, others


def read_pictures(files: Sequence[Path], size: int) -> tuple[Asked, list[tuple[str, str]]]:
    """Check that files can be read as pictures. Return those that can, and the name and fault of each other file."""
    good: list[Path] = []
    faults: list[tuple[str, str]] = []
    for at in patient_track(range(len(files)), "checking files"):
        try:
            decode(files[at], size)
            good.append(files[at])
        except DataError as error:
            faults.append((str(files[at]), str(error)))

    def read(rows: Sequence[int]) -> np.ndarray:
        return np.stack([decode(good[n], size) for n in rows])

    return Asked([str(path) for path in good], [None] * len(good), read), faults


def write_predictions(found: Sequence[Prediction], out: Path | str) -> Path:
    """Write predictions as CSV, JSON, JSON lines or Parquet, by the file's ending. CounterpointError for another ending."""
    out = Path(out)
    if out.suffix not in ENDINGS:
        raise CounterpointError(f"{out} has no known ending; name a file that ends in {', '.join(ENDINGS)}")
    check_writable(out)
    rows = [asdict(one) for one in found]
    with replacing(out) as file:
        if out.suffix in (".json", ".jsonl"):
            text = json.dumps(rows, indent=2) if out.suffix == ".json" else "\n".join(map(json.dumps, rows))
            file.write((text + "\n").encode())
            return out
        # A table has plain columns: the classes that follow, and the neighbours, are texts.
        for row in rows:
            row["others"] = "; ".join(f"{name} {score:.4f}" for name, score in row["others"].items())
            row["neighbours"] = "; ".join(row["neighbours"])
        pa, pq = arrow()
        texts = ("item", "label", "others", "true", "neighbours")
        schema = pa.schema([(n, pa.string() if n in texts else pa.float64()) for n in Prediction.__dataclass_fields__])
        table = pa.Table.from_pylist(rows, schema=schema)
        if out.suffix == ".parquet":
            pq.write_table(table, file)
        else:
            from pyarrow import csv

            csv.write_csv(table, file)
    return out
