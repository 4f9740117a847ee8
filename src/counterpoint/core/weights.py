"""Weights on disk: safetensors, and PyTorch files as long as they hold nothing but tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import counterpoint
from counterpoint.errors import RunError
from counterpoint.files import replacing


def write_weights(path: Path, state: Mapping[str, Tensor], slug: str) -> None:
    """Save a state dict as safetensors, marked with the system it belongs to."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = save(tensors, metadata={"format": "pt", "slug": slug, "counterpoint": counterpoint.__version__})
    # safetensors writes its metadata in an order that changes from call to call: equal weights make equal files here.
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[8 + length :])


def read_weights(path: Path, slug: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a PyTorch file that holds tensors only.

    Raises RunError for a missing or damaged file and for a file of another system. Raises it too for a pickle that would run
    code: files are loaded only with `weights_only`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RunError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                owner = (file.metadata() or {}).get("slug")
                if slug and owner and owner != slug:
                    raise RunError(f"{path} holds weights of '{owner}', not of '{slug}'")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise RunError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # pickle, zip and torch each raise kinds of their own; whatever it is, the file is no good
        raise RunError(
            f"{path} was refused: it is damaged, or a pickle with more in it than tensors, which could run code. "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''})"
        ) from error
    if isinstance(state, dict):  # a checkpoint of a trainer holds the weights under one of these names
        state = next((state[k] for k in ("state_dict", "model") if isinstance(state.get(k), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RunError(f"{path} does not hold a state dict (names to tensors)")
    return {str(name): value for name, value in state.items()}
