"""Write the encoders of a run as folders that transformers, timm and sentence-transformers load, and check their outputs.

    to                       a folder for                                                   encoders
    hf                       transformers.AutoModel, with its processor or tokenizer        hf:NAME, minilm
    timm                     timm.create_model("local-dir:FOLDER", pretrained=True)         timm:NAME, vit-s, vit-xs
    sentence-transformers    sentence_transformers.SentenceTransformer                      texts: hf:NAME, minilm

The folders of `hf` and `timm` give the encoder's features. Where the run projects them by one linear layer, that layer lies
beside as projection.safetensors. A folder for sentence-transformers holds pooling, projection and normalisation too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.core.operands import EPS
from counterpoint.encoders.adapters import adapters_merged
from counterpoint.encoders.audio import PretrainedAudio
from counterpoint.errors import CounterpointError, unknown
from counterpoint.search.encoder import Encoder
from counterpoint.use import library_parts as parts
from counterpoint.use.export import ITEMS, LARGEST, Exported, difference_of
from counterpoint.use.export_inputs import real_values
from counterpoint.use.model_cards import card
from counterpoint.use.quiet import only_errors

TO = ("hf", "timm", "sentence-transformers")
PROJECTION = "projection.safetensors"
NEEDS = {"hf": "transformers", "timm": "timm", "sentence-transformers": "sentence_transformers"}
TEXTS = (
    "a",
    "a red house",
    "Two birds, one of them blue; and a much longer sentence about the sea and the hills behind it.",
)


@dataclass(frozen=True)
class Part:
    """An encoder that a library's folder can hold.

    Attributes:
        name: The modality.
        network: The encoder, whose `model` is the library's.
        head: The linear layer between its features and the run's embeddings. None: there is none.
        whole: Whether the normalised output, after the head, is the run's own embedding.
    """

    name: str
    network: Any
    head: nn.Linear | None
    whole: bool

    def embedded(self, features: Tensor) -> Tensor:
        """Return the run's embeddings of features: projected where there is a head, and normalised."""
        return F.normalize(features if self.head is None else self.head(features), dim=1, eps=EPS)


def export_folder(
    encoder: Encoder, out: Path | str, *, to: str, modality: str | None = None, items: int = ITEMS
) -> list[Exported]:
    """Write encoders as folders that another library loads. Load each folder with that library and compare outputs.

    Args:
        encoder: A loaded run.
        out: The folder. A run with several modalities gets a folder in it for each one.
        to: hf, timm or sentence-transformers.
        modality: The only modality to write. Default: all those whose architecture is the library's.
        items: Number of items of the run's data to check on, beside made-up ones; >= 0.

    Returns a record for each folder. Raises CounterpointError, and writes nothing, in three cases. No encoder has an architecture
    of the library. A package is missing. The outputs differ by more than 1e-4 of the largest value.
    """
    out = Path(out)
    if to not in TO:
        raise unknown("format", to, TO)
    if modality is not None and modality not in encoder.kinds:
        raise unknown("modality", modality, encoder.kinds)
    if out.exists() and not out.is_dir():
        raise CounterpointError(f"{out} is a file; name a folder")
    if find_spec(NEEDS[to]) is None:
        extra = {"hf": "'counterpoint[language]'", "timm": "timm"}.get(to, "sentence-transformers")
        raise CounterpointError(f"the format {to} needs the package {NEEDS[to]}: pip install {extra}")
    names = [modality] if modality is not None else list(encoder.kinds)
    refused = {name: said for name in names if (said := parts.refusal(_network(encoder, name), to))}
    taken = [name for name in names if name not in refused]
    if not taken:
        raise CounterpointError(
            f"{'; '.join(f'{name}: {said}' for name, said in refused.items())}. Write the format onnx or torch instead"
        )
    note = "; ".join(f"{name} is left out: {said}; write it as onnx or torch" for name, said in refused.items())
    values, unread = real_values(encoder, taken, items)
    device, training = encoder.learner.device, encoder.learner.training
    encoder.learner.cpu().eval()
    places = {name: out / name if len(encoder.kinds) > 1 else out for name in taken}
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made, quietly():
            with adapters_merged(encoder.learner):
                found = {name: _write(encoder, name, Path(made) / name, to, values.get(name)) for name in taken}
            for name, place in places.items():
                _move(Path(made) / name, place)
    finally:
        encoder.learner.to(device).train(training)
    said = "; ".join(text for text in (unread, note) if text)
    counts = {name: len(values.get(name, ())) for name in taken}
    return [Exported(places[name], name, (to,), found[name], counts[name], said) for name in taken]


def _network(encoder: Encoder, name: str) -> Any:
    """Return the encoder of one modality as the learner holds it, or None."""
    learner: Any = encoder.learner
    if isinstance(held := getattr(learner, "encoders", None), nn.ModuleDict):
        return dict(held.items()).get(name)
    if encoder.task in ("tokens", "dialogs"):
        return getattr(getattr(learner, "model", None), "encoder", None)
    return getattr(learner, "encoder", None)


@torch.no_grad()
def _part(encoder: Encoder, name: str, values: Any) -> Part:
    """Return the encoder of a modality, and find out how the run makes embeddings of its features."""
    network = _network(encoder, name)
    inputs = encoder.transform(name, values)
    features = network(*inputs) if isinstance(inputs, tuple) else network(inputs)
    heads = getattr(encoder.learner, "heads", None)
    head = heads[name] if isinstance(heads, nn.ModuleDict) and name in heads else None
    wanted = encoder.embedded(name, inputs)
    for candidate in (None, head):
        if candidate is None or isinstance(candidate, nn.Linear):
            part = Part(name, network, candidate, True)
            fits = candidate is None or candidate.in_features == features.shape[1]
            if fits and difference_of(part.embedded(features), wanted) <= LARGEST:
                return part
    return Part(name, network, None, False)


def _write(encoder: Encoder, name: str, folder: Path, to: str, real: Any) -> float:
    """Write one encoder, load it with its library and compare. Return the largest difference."""
    spec = encoder.transform.modalities[name]
    made_up = made_up_values(spec)
    part = _part(encoder, name, made_up)
    folder.mkdir()
    if to == "timm":
        parts.write_timm(part.network, folder, spec["size"], bool(getattr(encoder.config, "pretrained", False)))
        load: Callable[[], Callable[[Any], Tensor]] = lambda: parts.load_timm(folder)  # noqa: E731
    elif to == "hf":
        parts.write_hf(part.network, folder, encoder, name)
        load = lambda: parts.load_hf(part.network, folder, encoder, name)  # noqa: E731
    else:
        if not part.whole:
            raise CounterpointError(
                f"{encoder.run.slug} makes its embeddings of {name} by more than pooling and a linear layer, which "
                "sentence-transformers has no module for. Write the format onnx, or hf for the encoder alone"
            )
        parts.write_sentences(part.network, part.head, folder, encoder, name)
        load = lambda: parts.load_sentences(folder)  # noqa: E731
    try:
        again = load()
        differences = [_compare(encoder, part, to, again, values) for values in (made_up, real) if values is not None]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{NEEDS[to]} cannot use the folder of {name}: {said[:300]}; nothing was written. Write the format onnx instead"
        ) from error
    if not max(differences) <= (limit := _limit(part.network)):
        raise CounterpointError(
            f"the encoder of {name} gives other outputs in {NEEDS[to]}: they differ by {max(differences):.1e} of the largest "
            f"value, more than {limit:g}; nothing was written. Write the format onnx instead"
        )
    if to != "sentence-transformers" and part.head is not None:
        from safetensors.torch import save_file

        save_file(
            {key: value.detach().contiguous() for key, value in part.head.state_dict().items()}, folder / PROJECTION
        )
    lines = parts.usage(to, part.network, spec, projected=part.head is not None, whole=part.whole)
    (folder / "README.md").write_text(
        card(encoder.run, library=NEEDS[to].replace("_", "-"), use=lines), encoding="utf-8"
    )
    return max(differences)


def _limit(network: Any) -> float:
    """Return the largest difference allowed. Extractors of waveforms divide by a deviation that differs a little from ours."""
    return 10 * LARGEST if isinstance(network, PretrainedAudio) and network.raw else LARGEST


@torch.no_grad()
def _compare(encoder: Encoder, part: Part, to: str, again: Callable[[Any], Tensor], values: Any) -> float:
    """Return the largest difference between a folder's outputs for some items and those of the run."""
    found = again(values)
    if to == "sentence-transformers":
        return difference_of(found, torch.from_numpy(encoder.rows(part.name, values)))
    if part.whole:
        return difference_of(part.embedded(found), torch.from_numpy(encoder.rows(part.name, values)))
    inputs = encoder.transform(part.name, values)
    return difference_of(found, part.network(*inputs) if isinstance(inputs, tuple) else part.network(inputs))


def made_up_values(spec: dict[str, Any] | Any) -> Any:
    """Return made-up items of a modality, as `Encoder.rows` takes them: pictures, sounds or texts."""
    rng = np.random.default_rng(0)
    if spec["kind"] == "image":
        return rng.integers(0, 256, (3, spec["size"], spec["size"], 3), np.uint8)
    if spec["kind"] == "audio":
        return rng.uniform(-1, 1, (3, spec["samples"])).astype(np.float32)
    return list(TEXTS)


def _move(made: Path, place: Path) -> None:
    """Move the content of a folder into another one, which may exist. Other files there stay."""
    place.mkdir(parents=True, exist_ok=True)
    for file in sorted(made.rglob("*")):
        if file.is_file():
            target = place / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the bars, the log and the warnings of the libraries."""
    bars: Any = None
    if find_spec("transformers") is not None:
        from transformers.utils import logging as bars
    shown = bars is not None and bars.is_progress_bar_enabled()
    try:
        if shown:
            bars.disable_progress_bar()
        with only_errors("transformers", "sentence_transformers", "timm"):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()
