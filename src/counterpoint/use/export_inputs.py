"""Make the inputs on which `export` compares a written encoder with its run: random ones, and items of the run's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.search.encoder import Encoder
from counterpoint.search.items import Items

LOOKED = 256  # rows of a split that are looked through for items with a modality
Checked = tuple[
    tuple[Tensor, ...], Tensor
]  # inputs in the form that a file takes, and the run's own embeddings of them


def random_inputs(encoder: Encoder, name: str, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random inputs of a modality in the form that the file takes.

    Args:
        encoder: A loaded run.
        name: Name of the modality.
        count: Number of items, at least 1. More items have longer texts.
        seed: Seed of the generator.
    """
    spec, draw = encoder.transform.modalities[name], torch.Generator().manual_seed(seed + count)
    if spec["kind"] == "image":
        return (torch.randint(256, (count, 3, spec["size"], spec["size"]), generator=draw, dtype=torch.uint8),)
    if spec["kind"] == "picture":
        return (torch.randint(256, (count, 3, 16 + count, 17 + 2 * count), generator=draw, dtype=torch.uint8),)
    if spec["kind"] in ("scene", "scenes"):
        several = len(spec["modalities"])
        shape = (count, *((several,) if several > 1 else ()), 3, spec["size"], spec["size"])
        pixels = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
        there = torch.rand(count, several, generator=draw) < 0.5
        there[:, count % several] = True
        return (pixels, there) if several > 1 else (pixels,)
    if spec["kind"] == "audio":
        return (torch.rand(count, spec["samples"], generator=draw) * 2 - 1,)
    if spec["kind"] == "vector":
        return (torch.randn(count, spec["dim"], generator=draw),)
    items = len(encoder.transform.items)
    if spec["kind"] == "item":
        return (torch.randint(items, (count,), generator=draw),)
    if spec["kind"] in ("history", "set"):
        length = min(spec["length"], 4 + count)
        ids = torch.randint(1, items + 1, (count, length), generator=draw)
        lengths = torch.randint(1, length + 1, (count, 1), generator=draw)
        lengths[0] = length
        return (ids.masked_fill(torch.arange(length) >= lengths, 0),)
    length = min(encoder.transform.context, 4 + count)
    tokens = torch.randint(encoder.transform.tokenizers[name].vocabulary, (count, length), generator=draw)
    mask = torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=draw)
    mask[0] = True
    return tokens, mask


def real_items(encoder: Any, names: Sequence[str], count: int) -> tuple[dict[str, Checked], str]:
    """Return items of a run's data as inputs of the exported file, with the run's own embeddings of them.

    Args: see `real_values`. Returns inputs and embeddings by name, and a note for the user.
    """
    values, note = real_values(encoder, names, count)
    found: dict[str, Checked] = {}
    for name, items in values.items():
        if not isinstance(encoder, Encoder):
            with torch.no_grad():
                found[name] = (pixels_of(items),), encoder(pixels_of(items))
            continue
        inputs: Any = pixels_of(items) if encoder.kinds[name] == "image" else encoder.transform(name, items)
        rows = torch.from_numpy(encoder.rows(name, items))
        found[name] = (tuple(inputs) if isinstance(inputs, tuple) else (inputs,)), rows
    return found, note


def real_values(encoder: Any, names: Sequence[str], count: int) -> tuple[dict[str, Any], str]:
    """Return items of a run's data as `Encoder.rows` takes them.

    Args:
        encoder: A loaded run.
        names: Names of the modalities.
        count: Largest number of items for each modality, at least 0. Items of the test split come first.

    Returns items by name, and a note for the user. The note is "" where every modality has items. It gives the reason where data
    are missing, or where the run's task has no items of this kind.
    """
    if count < 0:
        raise CounterpointError(f"items must be at least 0, got {count}")
    if not count:
        return {}, "checked on random inputs only, as asked"
    if not isinstance(encoder, Encoder) and "scenes" in encoder.kinds.values():
        return {}, "checked on random inputs only, as items of several pictures are not read here"
    try:
        source = Experiment.of_run(encoder.run).source()
        if not isinstance(encoder, Encoder):
            return {names[0]: source.test.images(np.arange(min(len(source.test), count)))}, ""
        items = Items.of(source, encoder, "all")
        found = {name: made for name in names if (made := _of_split(items, name, count)) is not None}
    except (CounterpointError, OSError, ImportError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return {}, f"checked on random inputs only, as the run's data cannot be read: {said[:200]}"
    missing = [name for name in names if name not in found]
    return found, f"the data have no items of {', '.join(missing)} to check on" if missing else ""


def _of_split(items: Items, name: str, count: int) -> Any:
    """Return items of one modality from the first split that has some (test, valid, train or another one), or None."""
    for split in sorted(items.splits, key=lambda split: ("test", "valid", "train", split).index(split)):
        rows = np.arange(min(len(items.splits[split]), LOOKED))
        rows = rows[items.present(split, name, rows)][:count]
        if len(rows):
            return items.column(split, name, rows)
    return None


def pixels_of(images: Any) -> Tensor:
    """Return pictures [n, height, width, 3] as the uint8 tensor [n, 3, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
