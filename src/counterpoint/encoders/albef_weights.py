"""Convert ALBEF's published weights to our names.

The authors' files contain these names:

- `visual_encoder.`: timm's vision transformer.
- `text_encoder.bert.` and `text_encoder.cls.predictions.`: transformers' BERT with cross-attention.
- `vision_proj`, `text_proj`, `itm_head`, `temp`.
- The same names with `_m`: the momentum copies.
- `image_queue`, `text_queue`, `idx_queue`, `queue_ptr`: the queues.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.core.weights import read_weights
from counterpoint.encoders.fusion import bert_name
from counterpoint.errors import CounterpointError


@dataclass(frozen=True)
class Wanted:
    """The model that a file of weights must fit.

    Args:
        own: the model's state dict.
        image, text: names of the model's two modalities.
        lower: number of layers of the text transformer that do not read the image.
        prefix: number of tokens before the patches' tokens.
        grid: number of patches in a column and in a row.
        queues: whether the model has queues of keys.
    """

    own: Mapping[str, Tensor]
    image: str
    text: str
    lower: int
    prefix: int
    grid: tuple[int, int]
    queues: bool


def converted(source: Path | str | Mapping[str, Any], wanted: Wanted) -> dict[str, Tensor]:
    """Convert the authors' weights to a state dict with all names of `wanted.own`.

    Interpolate the image's position embeddings (bicubic) to the wanted patches, and cut the text's. Where the file lacks
    the momentum copies, copy the student's weights. Where the file lacks the queues, keep the model's own. Discard weights
    of other parts.

    Args:
        source: a file (.pth with tensors only, .safetensors), or a mapping of names to tensors, directly or under "model".
        wanted: the model that the weights must fit.

    Raises CounterpointError that lists missing weights, unknown weights and weights of another shape. Raises RunError for
    an unreadable file.
    """
    held: Mapping[str, Any] = read_weights(Path(source)) if isinstance(source, Path | str) else source
    held = held["model"] if isinstance(held.get("model"), Mapping) else held
    own = wanted.own
    state: dict[str, Tensor] = {}
    odd: list[str] = []
    for name, value in held.items():
        if not isinstance(value, Tensor):
            odd.append(name)
            continue
        target = _own_name(name, wanted)
        if target is None:
            odd.append(name)
        elif target in own:
            state[target] = _fitted(name, value, own[target], wanted)
    if "queue_ptr" in held and wanted.queues:
        for side in (wanted.image, wanted.text):
            state[f"queues.{side}.pointer"] = held["queue_ptr"].reshape(()).to(torch.int64)
    copies = [name for name in own if name.startswith("teacher.")]
    if not any(name in state for name in copies):
        state |= {name: state[name.removeprefix("teacher.module.")] for name in copies if name[15:] in state}
    for name in own:
        if name.startswith("queue") and name not in state:
            state[name] = own[name]
    missing = [name for name in own if name not in state]
    wrong = [
        f"{name} {list(state[name].shape)}, wanted {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    said = [
        f"{what}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        for what, names in (("it lacks", missing), ("it has unknown weights", odd), ("of another shape", wrong))
        if names
    ]
    if said:
        raise CounterpointError("the checkpoint does not fit this model; " + "; ".join(said))
    return {name: state[name].to(own[name].dtype) for name in own}


# Entries of the authors' files that are no weights, or that repeat another weight.
_LEFT_OUT = re.compile(r"(.*\.position_ids|queue_ptr|text_encoder(_m)?\.cls\.predictions\.decoder\.(weight|bias))$")


def _own_name(name: str, wanted: Wanted) -> str | None:
    """Return our name of one of the authors' weights, "" for one to discard, None for an unknown name."""
    if _LEFT_OUT.match(name):
        return ""
    single = {
        "temp": "temperature",
        "image_queue": f"queues.{wanted.image}.rows",
        "text_queue": f"queues.{wanted.text}.rows",
        "idx_queue": "queue_ids",
    }
    if name in single:
        return single[name]
    part, _, rest = name.partition(".")
    prefix = "teacher.module." if part.endswith("_m") else ""
    part = part.removesuffix("_m")
    if part == "visual_encoder":
        # The classifier of ImageNet, from whose encoder pretraining starts.
        return "" if rest.startswith("head.") else f"{prefix}encoders.{wanted.image}.model.{rest}"
    if part in ("vision_proj", "text_proj"):
        return f"{prefix}heads.{wanted.image if part == 'vision_proj' else wanted.text}.{rest}"
    if part == "itm_head":
        return f"itm_head.{rest}"
    if part == "text_encoder" and rest.startswith("bert."):
        above, found = bert_name(rest.removeprefix("bert."), wanted.lower)
        return f"{prefix}fusion.{found}" if above else f"{prefix}encoders.{wanted.text}.{found}"
    head = {"transform.dense.": "dense.", "transform.LayerNorm.": "norm.", "bias": "bias"}
    if part == "text_encoder" and rest.startswith("cls.predictions."):
        rest = rest.removeprefix("cls.predictions.")
        found_head = next((new + rest.removeprefix(old) for old, new in head.items() if rest.startswith(old)), None)
        return None if found_head is None else f"{prefix}fusion.{found_head}"
    return None


def _fitted(name: str, value: Tensor, own: Tensor, wanted: Wanted) -> Tensor:
    """Convert a weight to the wanted form: queues as rows, positions for the wanted number of patches and tokens."""
    if name in ("image_queue", "text_queue"):
        return value.T.contiguous()
    if name.endswith("embeddings.position_embeddings.weight"):
        return value[: len(own)]
    if not name.endswith(".pos_embed") or value.shape == own.shape or value.shape[::2] != own.shape[::2]:
        return value
    first, patches = value[:, : wanted.prefix], value[:, wanted.prefix :]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        return value
    grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), wanted.grid, mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2).to(value.dtype)], 1)


def load_albef_checkpoint(source: Path | str | Mapping[str, Any], learner: Any) -> dict[str, Tensor]:
    """Convert the authors' weights to a state dict of `learner`, for its `load_state_dict`.

    Args:
        source: a file (.pth with tensors only, .safetensors), or a mapping of names to tensors, directly or under "model".
        learner: a `tasks.fused.FusedLearner`. It determines the wanted parts and the number of patches.

    `converted` describes the conversion of each weight, and the errors.

    >>> learner.load_state_dict(load_albef_checkpoint("ALBEF.pth", learner))   # doctest: +SKIP
    """
    encoder = learner.encoders[learner.image]
    wanted = Wanted(
        learner.state_dict(),
        image=learner.image,
        text=learner.text,
        lower=learner.lower,
        prefix=getattr(encoder, "prefix", 0),
        grid=getattr(encoder, "grid", (0, 0)),
        queues=learner.config.use_itc,
    )
    return converted(source, wanted)
