"""A trained run as a function from items to embeddings: what `embed`, `search` and your own code call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from counterpoint.engine.run import Run
from counterpoint.engine.survey import moved
from counterpoint.errors import CounterpointError, RunError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.search.transform import Transform

BATCH = 256  # items encoded at a time
TASKS = ("aligned", "views", "labelled")  # whose runs embed
ARGUMENT = {"image": "images", "text": "texts", "audio": "sounds", "vector": "vectors"}


@dataclass
class Encoder:
    """A trained run, loaded once: items of any of its modalities in, embeddings out.

    Runs of the task `aligned` give the embeddings that retrieval is measured on. Runs of `views` and `labelled` give unit
    features of pictures, as their nearest-neighbour evaluation compares them.

    >>> Encoder.load("runs/first").encode(images=["a.png", "b.png"]).shape   # doctest: +SKIP
    (2, 128)
    """

    run: Run
    learner: Any
    config: Any
    transform: Transform
    task: str
    batch_size: int = BATCH  # items encoded at a time
    progress: bool = False  # show a bar on standard error once encoding has taken two seconds

    @classmethod
    def load(cls, path: Run | Path | str, learner: Any = None) -> Encoder:
        """Load a finished run.

        Args:
            path: An open run, or the path of its directory.
            learner: Its trained learner, where it is loaded already. Default: load it.

        Raises RunError for a folder that is no finished run, CounterpointError for a run of a task without embeddings.
        """
        run = path if isinstance(path, Run) else Run.open(path)
        experiment = Experiment.of_run(run)
        system, config = experiment.system, experiment.config
        if system.task not in TASKS:
            raise CounterpointError(
                f"{run.path} is a run of the task {system.task}; only runs of {', '.join(TASKS)} embed and search"
            )
        learner = load_learner(run) if learner is None else learner
        return cls(run, learner, config, Transform.of_facts(run.facts(), config), system.task)

    @property
    def kinds(self) -> dict[str, str]:
        """Name each modality with its kind, in the run's order."""
        return {name: spec["kind"] for name, spec in self.transform.modalities.items()}

    @cached_property
    def key(self) -> str:
        """Digest of the weights: embeddings of other weights cannot be compared."""
        digest = hashlib.sha256()
        for name, value in sorted(self.run.load_weights().items()):
            digest.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

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
            images: paths, bytes of files, Pillow images, uint8 arrays [H, W, 3] or [H, W], or torch tensors [C, H, W].
            texts: strings.
            sounds: paths, or float arrays [samples] at the run's rate.
            vectors: .npy paths or float arrays [dim].
            inputs: the same by the name of the modality, where a run has several of one kind.

        Items given in several modalities must be equally many. They are joined row by row, as the run's system joins them.
        Raises CounterpointError for a modality that the run lacks, DataError for an item that cannot be read.
        """
        given = self.given(images=images, texts=texts, sounds=sounds, vectors=vectors, inputs=inputs)
        if len({len(values) for values in given.values()}) > 1:
            counts = ", ".join(f"{name} {len(values)}" for name, values in given.items())
            raise CounterpointError(f"modalities that are joined need equally many items, got {counts}")
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
        """Return the items by the name of their modality (arguments as of `encode`).

        Raises CounterpointError for a modality that the run lacks, for no items at all, and for one item without a list.
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
                    f"{name}: give a list of items, also of one item; got a {type(values).__name__}"
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
        if self.task == "aligned":
            found: Tensor = self.learner.predict({"inputs": {name: inputs}, "part": "embedded"})["embedding"][name]
            return found.float()
        feature = self.learner.predict({"image": inputs, "part": "bank"})["feature"]
        return F.normalize(feature.float(), dim=1, eps=EPS)

    @torch.no_grad()
    def joined(self, embeddings: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Join embeddings of the same items in several modalities into what a further modality is searched by."""
        made = [torch.from_numpy(rows).to(self.learner.device) for rows in embeddings.values()]
        return np.ascontiguousarray((made[0] if len(made) == 1 else self.learner.joint(made)).float().cpu().numpy())

    def listed(self) -> str:
        """Name the modalities with their kinds, for messages."""
        return ", ".join(f"{name} ({kind})" for name, kind in self.kinds.items())


def patient_track(steps: Iterable[int], what: str, patience: float = 2.0) -> Iterator[int]:
    """Go through steps; show a bar on standard error once they have taken longer than `patience` seconds.

    Args:
        steps: A sequence of known length.
        what: The words beside the bar.
        patience: Seconds, >= 0.
    """
    from rich.console import Console
    from rich.progress import Progress

    whole = list(steps)
    started = time.monotonic()
    shown: tuple[Progress, Any] | None = None
    try:
        for done, step in enumerate(whole):
            if shown is None and time.monotonic() - started >= patience:
                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                shown = bar, bar.add_task(what, total=len(whole))
            if shown is not None:
                shown[0].update(shown[1], completed=done)
            yield step
    finally:
        if shown is not None:
            shown[0].stop()


def encode(
    run: Path | str,
    *,
    images: Sequence[Any] | None = None,
    texts: Sequence[str] | None = None,
    sounds: Sequence[Any] | None = None,
    vectors: Sequence[Any] | None = None,
    inputs: Mapping[str, Sequence[Any]] | None = None,
) -> NDArray[np.float32]:
    """Return embeddings [n, dim] of n items by a finished run; see `Encoder.encode`. Load an `Encoder` to call it often."""
    return Encoder.load(run).encode(images=images, texts=texts, sounds=sounds, vectors=vectors, inputs=inputs)
