"""Convert files, arrays and words to the inputs of a trained run's encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoint.data.images import decode, square
from counterpoint.data.pictures import as_picture
from counterpoint.encoders.text import Tokenizer
from counterpoint.errors import DataError, unknown
from counterpoint.tasks.histories import ids_of, items_read
from counterpoint.views.images import normalise


@dataclass(frozen=True)
class Transform:
    """The conversion of a modality's items to the inputs of the run's encoder, by the run's facts.

    The same functions convert training data, queries and items of a file of embeddings.
    """

    modalities: Mapping[str, Mapping[str, Any]]  # name -> kind, and size, rate and samples, or dim
    tokenizers: Mapping[str, Tokenizer]  # name of a modality of text -> its tokenizer
    context: int  # maximum number of tokens of a text
    items: Mapping[str, int] = field(default_factory=dict)  # names of items -> their numbers, for histories and sets

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], config: Any) -> Transform:
        """Make the transform of a run from its facts and settings."""
        modalities = facts.get("modalities")
        if not modalities or not isinstance(modalities, Mapping):  # dense data list the names of pictures alone
            modalities = {"image": {"kind": "image", "size": facts["size"]}}
        tokenizers = {name: Tokenizer.from_json(text) for name, text in facts.get("tokenizers", {}).items()}
        items = {name: number for number, name in enumerate(facts.get("names", ()))}
        return cls(modalities, tokenizers, getattr(config, "context", 0), items)

    def of_kind(self, kind: str) -> list[str]:
        """List the modalities of a kind, such as image, text, audio or vector."""
        return [name for name, spec in self.modalities.items() if spec["kind"] == kind]

    def __call__(self, name: str, values: Sequence[Any] | np.ndarray) -> Any:
        """Return the inputs of n items of one modality as a batch: a tensor, or numbers and mask for text.

        Args:
            name: Name of the modality.
            values: The n items. An image is a path, the bytes of a file, a Pillow image, a uint8 array [H, W, 3] or [H, W], or a
                torch tensor [C, H, W], uint8 or float in 0..1. A text is a string. A sound is a path or a float array
                [samples], mono in [-1, 1] at the run's rate. A vector is a .npy path or a float array [dim]. A history or set is
                a list of items. An item to recommend is its name, or its number in the data.

        Raises DataError, naming the item, when an item cannot be read. Raises CounterpointError for an unknown modality.
        """
        if name not in self.modalities:
            raise unknown("modality", name, self.modalities)
        spec = self.modalities[name]
        kind = spec["kind"]
        if kind == "text":
            return self.tokenizers[name].encode([str(text) for text in values], self.context)
        if kind == "item":
            return torch.from_numpy(self.numbers(values))
        if kind in ("history", "set"):
            lists = [items_read(self.numbers(value), spec["length"], ordered=kind == "history") for value in values]
            return ids_of(lists)
        if not isinstance(values, np.ndarray):
            read = {"image": self._image, "audio": self._sound, "vector": self._vector}[kind]
            values = np.stack([_named(value, number, name, spec, read) for number, value in enumerate(values)])
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return normalise(tensor.permute(0, 3, 1, 2).contiguous()) if kind == "image" else tensor

    def numbers(self, items: Sequence[Any] | np.ndarray) -> NDArray[np.int64]:
        """Return the numbers of items that are given by name or by number.

        Raises CounterpointError for an unknown name, DataError for no item and for a number out of range.
        """
        if isinstance(items, str) or not len(items):
            raise DataError(f"a history or set is a list of at least one item, got {items!r}")
        found = []
        for item in items:
            if isinstance(item, str) and item not in self.items:
                raise unknown("item", item, self.items)
            found.append(self.items[item] if isinstance(item, str) else int(item))
            if not 0 <= found[-1] < len(self.items):
                raise DataError(f"the number of an item must lie in 0..{len(self.items) - 1}, got {found[-1]}")
        return np.array(found, np.int64)

    def _image(self, value: Any, name: str, spec: Mapping[str, Any]) -> np.ndarray:
        size = spec["size"]
        if isinstance(value, str | Path):
            return np.array(decode(Path(value), size))
        if isinstance(value, bytes):
            return np.array(decode(value, size))
        # The code that reads files crops and scales it.
        return np.array(square(as_picture(value), size))

    def _sound(self, value: Any, name: str, spec: Mapping[str, Any]) -> np.ndarray:
        from counterpoint.data.sounds import decode_sound

        if isinstance(value, str | Path):
            return np.array(decode_sound(Path(value), spec["rate"], spec["samples"]).wave, np.float32)
        wave = np.asarray(value, np.float32)
        if wave.shape != (spec["samples"],) or not np.isfinite(wave).all():
            raise DataError(
                f"a sound must be {spec['samples']} finite samples at {spec['rate']} Hz, got {list(wave.shape)}; give the file "
                "instead to have it cropped and resampled"
            )
        return wave

    def _vector(self, value: Any, name: str, spec: Mapping[str, Any]) -> np.ndarray:
        from counterpoint.data.manifest import read_vector

        found = read_vector(Path(value)) if isinstance(value, str | Path) else np.asarray(value, np.float32)
        if found.shape != (spec["dim"],):
            raise DataError(f"has {found.size} numbers, but the run's {name} has {spec['dim']}")
        if not np.isfinite(found).all():
            raise DataError("holds NaN or infinite values")
        return found


def _named(value: Any, number: int, name: str, spec: Mapping[str, Any], read: Any) -> Any:
    """Read one item. Errors name the item."""
    try:
        return read(value, name, spec)
    except DataError as error:
        item = str(value) if isinstance(value, str | Path) else f"{name}, item {number}"
        raise DataError(f"{item}: {error}") from error
