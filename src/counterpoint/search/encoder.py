"""Embed items with a trained run: `embed`, `search` and your own code use this module."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.operands import EPS
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.survey import moved
from counterpoint.errors import CounterpointError, RunError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.search.transform import Transform
from counterpoint.waiting import patient_track

BATCH = 256  # items encoded at a time
TASKS = (
    "aligned",
    "views",
    "labelled",
    "regression",
    "tokens",
    "dialogs",
    "sequences",
    "federations",
    "boxes",
    "frames",
    "regions",
)  # whose runs embed
PARTS = ("boxes", "frames", "regions")  # of these, pictures are whole ones or crops of them
ARGUMENT = {"image": "images", "text": "texts", "audio": "sounds", "vector": "vectors"}


def embeddable(run: Run) -> Experiment:
    """Return the experiment of a run. CounterpointError for a run of a task without embeddings."""
    experiment = Experiment.of_run(run)
    if experiment.system.task not in TASKS:
        if experiment.system.task == "bags":
            raise CounterpointError(
                f"{run.path} is a run of {run.slug}, which finds moments in videos and has no embeddings: counterpoint detect. "
                "Its network in Python: counterpoint.load(RUN).learner"
            )
        raise CounterpointError(
            f"{run.path} is a run of the task {experiment.system.task}; this needs a run of {', '.join(TASKS[:-1])} or {TASKS[-1]}"
        )
    return experiment


@dataclass
class Encoder:
    """A trained run, loaded once, that embeds items of its modalities.

    Runs of the task `aligned` give the embeddings that retrieval is measured on. Runs of `views` and `labelled` give unit
    features of images, as their nearest-neighbour evaluation uses them. Runs of `regression` give those of images or vectors. Runs
    of `tokens` give unit means of a text's states. Runs of `dialogs` give unit vectors of texts, each as a single turn of a user.
    Runs of `sequences` give vectors of histories (or sets) and of items, whose dot product ranks items; they are not unit rows.
    Runs of `federations` give the embeddings of the server. Runs of `boxes`, `frames` and `regions` give unit rows of pictures as
    they are: whole ones, crops of instances, or crops of proposals.

    >>> Encoder.load("runs/first").encode(images=["a.png", "b.png"]).shape   # doctest: +SKIP
    (2, 128)
    """

    run: Run
    learner: Any
    config: Any
    transform: Transform
    task: str
    batch_size: int = BATCH  # items encoded at a time
    progress: bool = False  # show a bar on standard error when encoding takes longer than two seconds

    @classmethod
    def load(cls, path: Run | Path | str, learner: Any = None, device: str | None = None) -> Encoder:
        """Load a finished run.

        Args:
            path: An open run, or the path of its directory.
            learner: Its trained learner, where it is loaded already. Default: load it.
            device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. Default: the learner's.

        Raises RunError for a folder that is no finished run, CounterpointError for a run of a task without embeddings.
        """
        run = path if isinstance(path, Run) else Run.open(path)
        experiment = embeddable(run)
        config = experiment.config
        learner = load_learner(run) if learner is None else learner
        if device is not None:
            learner.to(Loop(device=device).on())
        task, facts = experiment.system.task, dict(run.facts())
        if task == "regions":
            facts["size"] = config.crop
        return cls(run, learner, config, Transform.of_facts(facts, config), task)

    @property
    def kinds(self) -> dict[str, str]:
        """Name each modality with its kind, in the run's order."""
        return {name: spec["kind"] for name, spec in self.transform.modalities.items()}

    @cached_property
    def key(self) -> str:
        """The digest of the weights. Embeddings of other weights cannot be compared."""
        digest = hashlib.sha256()
        for name, value in sorted(self.run.load_weights().items()):
            digest.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    @torch.no_grad()
    def item_table(self) -> Tensor:
        """The vectors of all items of a run of the task sequences, [I, dim]."""
        found: Tensor = self.learner.item_table()
        return found.float()

    def encode(
        self,
        *,
        images: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        sounds: Sequence[Any] | None = None,
        vectors: Sequence[Any] | None = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
    ) -> NDArray[np.float32]:
        """Return embeddings [n, dim] of n items.

        Args:
            images: Paths, bytes of files, Pillow images, uint8 arrays [H, W, 3] or [H, W], or torch tensors [C, H, W].
            texts: Strings.
            sounds: Paths, or float arrays [samples] at the run's rate.
            vectors: Paths of .npy files, or float arrays [dim].
            inputs: Items by the name of the modality, for a run with several modalities of one kind, and for histories and
                sets (see `Transform`).

        Several modalities must have the same number of items. They are combined row by row, as the run's system combines them.
        Raises CounterpointError for a modality that the run lacks, DataError for an item that cannot be read.
        """
        given = self.given(images=images, texts=texts, sounds=sounds, vectors=vectors, inputs=inputs)
        if len({len(values) for values in given.values()}) > 1:
            counts = ", ".join(f"{name} {len(values)}" for name, values in given.items())
            raise CounterpointError(f"combined modalities need the same number of items, got {counts}")
        return self.joined({name: self.rows(name, values) for name, values in given.items()})

    def given(
        self,
        *,
        images: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        sounds: Sequence[Any] | None = None,
        vectors: Sequence[Any] | None = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, list[Any]]:
        """Return the items by the name of their modality (see `encode` for the arguments).

        Raises CounterpointError for a modality that the run lacks, without items, and for an item outside a list.
        """
        given = dict(inputs or {})
        for kind, values in {"image": images, "text": texts, "audio": sounds, "vector": vectors}.items():
            if values is None:
                continue
            names = [name for name in self.transform.of_kind(kind) if name not in given]
            if not names:
                raise CounterpointError(f"{self.run.path} has no modality for {ARGUMENT[kind]}; it has {self.listed()}")
            given[names[0]] = values
        if not given:
            raise CounterpointError("nothing to encode: give images, texts, sounds, vectors or inputs")
        for name, values in given.items():
            if isinstance(values, str | bytes | Path) or not hasattr(values, "__len__"):
                raise CounterpointError(
                    f"{name}: give a list of items, even for one item; got a {type(values).__name__}"
                )
        return {name: list(values) for name, values in given.items()}

    def rows(self, name: str, values: Sequence[Any] | np.ndarray) -> NDArray[np.float32]:
        """Return embeddings [n, dim] of n items of one modality (see `Transform` for what an item is).

        Raises RunError when an embedding is not finite.
        """
        starts: Iterable[int] = range(0, len(values), self.batch_size)
        if self.progress:
            starts = patient_track(starts, f"encoding {name}")
        parts = [self._batch(name, values[at : at + self.batch_size]) for at in starts]
        found = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        if not np.isfinite(found).all():
            raise RunError(f"{self.run.path}: its embeddings of {name} hold NaN or infinite values; training diverged")
        return found

    @torch.no_grad()
    def _batch(self, name: str, values: Sequence[Any] | np.ndarray) -> NDArray[np.float32]:
        inputs = moved(self.transform(name, values), self.learner.device)
        return np.ascontiguousarray(self.embedded(name, inputs).cpu().numpy())

    def embedded(self, name: str, inputs: Any) -> Tensor:
        """Return embeddings [n, dim] of inputs that the run's transform made: a tensor, or token numbers and mask."""
        if self.task == "sequences":
            if self.kinds[name] == "item":
                return self.item_table.to(inputs.device)[inputs]
            rows: Tensor = self.learner.represent(inputs, (inputs != 0).sum(1))
            return rows.float()
        if self.task in ("aligned", "federations"):
            found: Tensor = self.learner.predict({"inputs": {name: inputs}, "part": "embedded"})["embedding"][name]
            return found.float()
        if self.task in ("tokens", "dialogs"):
            return F.normalize(self.learner.embed(*inputs).float(), dim=1, eps=EPS)
        if self.task in PARTS:
            return F.normalize(self.learner.embed(inputs).float(), dim=1, eps=EPS)
        named = "input" if self.task == "regression" else "image"
        feature = self.learner.predict({named: inputs, "part": "bank"})["feature"]
        return F.normalize(feature.float(), dim=1, eps=EPS)

    @torch.no_grad()
    def joined(self, embeddings: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Combine embeddings of the same items in several modalities into one query for another modality."""
        made = [torch.from_numpy(rows).to(self.learner.device) for rows in embeddings.values()]
        return np.ascontiguousarray((made[0] if len(made) == 1 else self.learner.joint(made)).float().cpu().numpy())

    def listed(self) -> str:
        """Return the modalities with their kinds as text, for messages."""
        return ", ".join(f"{name} ({kind})" for name, kind in self.kinds.items())


def encode(
    run: Path | str,
    *,
    images: Sequence[Any] | None = None,
    texts: Sequence[str] | None = None,
    sounds: Sequence[Any] | None = None,
    vectors: Sequence[Any] | None = None,
    inputs: Mapping[str, Sequence[Any]] | None = None,
) -> NDArray[np.float32]:
    """Return embeddings [n, dim] of n items by a finished run; see `Encoder.encode`. For many calls load an `Encoder`."""
    return Encoder.load(run).encode(images=images, texts=texts, sounds=sounds, vectors=vectors, inputs=inputs)
