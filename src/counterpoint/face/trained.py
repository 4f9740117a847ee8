"""Represent a finished run as an object, which `counterpoint.train` and `counterpoint.load` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from numpy.typing import NDArray

from counterpoint.data import distilled
from counterpoint.data.memory import Own, is_memory, plainly, said
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.run import REPORT, Run
from counterpoint.errors import CounterpointError, unknown
from counterpoint.experiment import Experiment, load_learner
from counterpoint.face import finding
from counterpoint.files import check_folder
from counterpoint.search.encoder import BATCH, Encoder
from counterpoint.training import Measured
from counterpoint.use import hub, library_folders, model_cards
from counterpoint.use.export import ENDINGS, ITEMS, Exported, export, export_adapters
from counterpoint.use.export_usage import write_usage_card
from counterpoint.use.restorer import Restorer
from counterpoint.use.segmenter import Segmenter

Rows = NDArray[np.float32] | torch.Tensor


class Trained(ModelHubMixin):
    """A finished run: its metrics, its page, and its networks as functions.

    >>> import counterpoint as cp
    >>> run = cp.load("runs/first")                       # doctest: +SKIP
    >>> run.metrics["knn_accuracy"]                       # doctest: +SKIP
    0.95
    >>> run.encode(images=["a.png", "b.png"]).shape       # doctest: +SKIP
    (2, 512)

    Attributes:
        path: The run directory, or the folder in the layout of a hub.
        slug: The name of the system.
        own: The object in memory that the run was trained on, where it is given; else None.
    """

    def __init__(self, run: Run, own: Own | None = None) -> None:
        self.run, self.own = run, own
        self.path, self.slug = run.path, run.slug

    def __repr__(self) -> str:
        shown = [f"{name} {value:.4f}" for name, value in list(self.metrics.items())[:3]]
        return f"<{self.slug} trained on {self.data}, {self.path}{': ' if shown else ''}{', '.join(shown)}>"

    # --- data, settings, metrics

    @property
    def data(self) -> str:
        """Return the name of the data that the run was trained on."""
        spec = str(self.run.config.get("data", "unknown data"))
        return said(spec) if is_memory(spec) else spec

    @cached_property
    def config(self) -> Any:
        """Return the settings that the run was trained with."""
        return Experiment.of_run(self.run).config

    @property
    def history(self) -> list[dict[str, float]]:
        """Return all metrics, a row for each epoch."""
        return self.run.metrics(required=False)

    @cached_property
    def metrics(self) -> Measured:
        """Return the metrics on the test split by name. `metrics.chance` has the chance level of those that have one."""
        last = (self.history or [{}])[-1]
        found = Measured({k.removeprefix("test/"): v for k, v in last.items() if k.startswith("test/")})
        found.chance = self.run.chance()
        return found

    @property
    def page(self) -> Path:
        """Return the path of the run's HTML page: curves, figures, settings. Write the page if it is missing."""
        from counterpoint.report.run import write_run_report

        file = self.path / REPORT
        return file if file.is_file() else write_run_report(self.run)

    @cached_property
    def learner(self) -> Learner:
        """Return the trained learner, an nn.Module in evaluation mode, initially on the CPU."""
        return load_learner(self.run)

    # --- embeddings

    @cached_property
    def encoder(self) -> Encoder:
        """Return the learner with its pre-processing. CounterpointError for a system without embeddings."""
        return Encoder.load(self.run, self.learner)

    @property
    def modalities(self) -> dict[str, str]:
        """Return the modalities for `encode`: each name with its kind (image, text, audio, vector, history, set, item)."""
        return self.encoder.kinds

    def encode(
        self,
        items: Sequence[Any] | None = None,
        *,
        images: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        sounds: Sequence[Any] | None = None,
        vectors: Sequence[Any] | None = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
        joined: bool = False,
        output: Literal["numpy", "torch"] = "numpy",
        batch_size: int = BATCH,
        device: str | None = None,
        progress: bool = True,
    ) -> Any:
        """Return embeddings: float32 [n, dim] of n items of one modality, or a dictionary by name of several modalities.

        Args:
            items: Items of the run's only modality. For a run with several modalities use the following arguments:
            images: Paths, bytes of files, Pillow images, uint8 arrays [H, W, 3] or [H, W], or torch tensors [C, H, W].
            texts: Strings.
            sounds: Paths, or float arrays [samples] at the run's rate.
            vectors: Paths of .npy files, or float arrays [dim].
            inputs: Items by the name of the modality, for a run with several modalities of one kind (see `modalities`). A history
                or set is a list of names of items.
            joined: Combine the modalities row by row into one array [n, dim], as the system combines them. Default: separate.
            output: "numpy", or "torch" for tensors on the CPU.
            batch_size: Number of items encoded together, at least 1.
            device: Device to compute on: cpu, cuda, cuda:1, mps, or auto (the GPU if there is one). Default: the learner's.
            progress: Show a bar on standard error when encoding takes longer than two seconds.

        Raises CounterpointError for a modality that the run lacks, DataError for an item that cannot be read.
        """
        with plainly():
            encoder = self.encoder
            if batch_size < 1:
                raise CounterpointError(f"batch_size must be at least 1, got {batch_size}")
            if output not in ("numpy", "torch"):
                raise unknown("output", output, ["numpy", "torch"])
            if device is not None:
                self.to(device)
            encoder.batch_size, encoder.progress = batch_size, progress
            if items is not None:
                if len(encoder.kinds) > 1:
                    raise CounterpointError(
                        f"{self.path} takes several modalities, {encoder.listed()}; name the modality of these items, as in "
                        "encode(images=[...]) or encode(inputs={NAME: [...]})"
                    )
                inputs = {next(iter(encoder.kinds)): items} | dict(inputs or {})
            given: dict[str, Any] = {
                "images": images,
                "texts": texts,
                "sounds": sounds,
                "vectors": vectors,
                "inputs": inputs,
            }
            if joined:
                return _as(encoder.encode(**given), output)
            asked = encoder.given(**given)
            found = {name: _as(encoder.rows(name, values), output) for name, values in asked.items()}
        return next(iter(found.values())) if len(found) == 1 else found

    def to(self, device: str) -> Trained:
        """Move the learner to a device (see `encode`) and return the run."""
        self.learner.to(Loop(device=device).on())
        return self

    def embed(self, out: Path | str, *, data: Any = None, split: str = "all", device: str = "cpu") -> Any:
        """Write the embeddings of a whole set to a Parquet file (see `counterpoint.embed`)."""
        return finding.embed(self.run, out, data=data, split=split, device=device)

    def search(self, query: Any, embeddings: Path | str, **options: Any) -> Any:
        """Return the items most similar to a query (see `counterpoint.search`)."""
        return finding.search(self.run, query, embeddings, **options)

    # --- evaluation and export

    def evaluate(self, data: Any = None, *, device: str = "cpu") -> Measured:
        """Measure the run on the test split.

        Args:
            data: Another source of the same kind of items: a name or an object. Default: the data that the run was trained on.
            device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

        Returns the metrics by name, with `chance`. Raises CounterpointError when the data do not fit, or when an object in
        memory is missing.
        """
        from counterpoint import training

        with plainly():
            spec, _held = finding.source_of(data)
            return training.evaluate(self.run, data=spec, device=device, say=lambda _: None)

    def export(
        self,
        out: Path | str | None = None,
        *,
        to: str | None = None,
        format: str | None = None,
        modality: str | None = None,
        items: int = ITEMS,
    ) -> list[Exported]:
        """Write the encoder of each modality for other programs, check it, and write a model card beside it.

        Of a run that restores or segments pictures, write its network. Of a run that distilled a set, the set can be written.

        Args:
            out: The file, such as "encoder.onnx" or "encoder.pt2". With several modalities each file name includes the modality.
                A set of synthetic images goes into a file that ends in .npz or .safetensors, or into a folder of PNG files.
                The formats hf, timm, sentence-transformers and peft take a folder. Default: in the folder `exported` of the run.
            to: The format: onnx; torch for torch.export; hf, timm or sentence-transformers for a folder that this library loads
                (see `counterpoint.use.library_folders`); set; or peft for the adapters alone. Default: from the ending of `out`.
            format: An older name of `to`.
            modality: Export only this modality. Default: all.
            items: Number of items of the run's data to check on, beside random inputs; >= 0.

        Returns a record for each file or folder: path, inputs, the largest difference that the check found, and its number of
        real items. Raises CounterpointError for a format that an encoder cannot take.

        >>> run.export(to="sentence-transformers")            # doctest: +SKIP
        """
        with plainly():
            if to is not None and format is not None and to != format:
                raise CounterpointError(f"to={to!r} and format={format!r} name two formats; give one")
            format = to or format
            if out is not None:
                check_folder(Path(out).parent)
            else:
                out = self._place(format)
            if format == "set" or (format is None and Path(out).suffix in distilled.ENDINGS):
                learner: Any = self.learner
                if not hasattr(learner, "distilled"):
                    said = f"{self.run.path} is a run of {self.run.slug}"
                    raise CounterpointError(f"{said}, which learns no set of images")
                files = distilled.write_set(learner.distilled(), learner.shown(), out)
                return [Exported(path, "set", (), 0.0) for path in files]
            if format in library_folders.TO:
                return library_folders.export_folder(self.encoder, out, to=format, modality=modality, items=items)
            if format == "peft":
                return export_adapters(self.learner, out)
            task = self.run.config.get("task")
            own: Any = {"restored": Restorer, "dense": Segmenter}.get(str(task))
            encoder: Any = self.encoder if own is None else own.load(self.run, self.learner)
            made = export(encoder, out, format=format, modality=modality, items=items, classes=True)
            write_usage_card(self.run, Path(out), made, format or ENDINGS[Path(out).suffix])
            return made

    def _place(self, format: str | None) -> Path:
        """Return the default file or folder of a format. CounterpointError for an unknown format and for none."""
        endings = {form: end for end, form in ENDINGS.items()}
        known = [*endings, *library_folders.TO, "set", "peft"]
        if format is None:
            raise CounterpointError(
                f"name a format (to) or a file such as encoder.onnx (out); formats: {', '.join(known)}"
            )
        if format not in known:
            raise unknown("format", format, known)
        if isinstance(self.run, hub.Published):
            raise CounterpointError(
                f"{self.path} is in the layout of a hub and is not written to; name a file or a folder (out)"
            )
        place = self.path / "exported"
        place.mkdir(exist_ok=True)
        return place / f"encoder{endings[format]}" if format in endings else place / format

    # --- the hub (ModelHubMixin: save_pretrained, from_pretrained, push_to_hub)

    def _save_pretrained(self, save_directory: Path) -> None:
        hub.write(self.run, save_directory, model_cards.over_seeds(self.run))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Trained:
        options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
        folder = Path(model_id)
        if not folder.is_dir():
            folder = hub.downloaded(model_id, local_files_only=local_files_only, **options)
        return cls(hub.Published.open(folder))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card: system, claim, data with licence, metrics, settings, versions."""
        return ModelCard(model_cards.card(self.run))


def _as(rows: NDArray[np.float32], output: str) -> Rows:
    return torch.from_numpy(rows) if output == "torch" else rows
