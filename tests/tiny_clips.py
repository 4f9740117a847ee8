"""Tiny CLIPs of transformers with random weights, saved in a folder as `hf:FOLDER` takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoint.encoders.text import Tokenizer, train_bpe

TEXTS = ["a photo of a cat", "a drawing of a dog"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def saved_clip(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    kind: str = "CLIP",
    length: int = 12,
    *,
    size: int = 16,
    dim: int = 8,
    blocks: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """Save a network and its tokenizer, and return both.

    Args:
        folder: where.
        dtype: type of the weights.
        kind: CLIP or Siglip.
        length: tokens of the context.
        size: side of its pictures in pixels.
        dim: width of the space; CLIP alone.
        blocks: number of blocks of each tower.
        mean, std: statistics of its pictures; None: none are saved.
    """
    transformers = pytest.importorskip("transformers")
    # With number 2 for the end, transformers would pool the token of the largest number.
    text = train_bpe(TEXTS * 3, 300).to_json()
    for old, new in (('"[END]":2', '"[END]":9'), ('"[UNK]":3', '"[UNK]":2'), ('"[END]":9', '"[END]":3')):
        text = text.replace(old, new)
    parts = json.loads(text)
    for added in parts["added_tokens"]:
        added["id"] = parts["model"]["vocab"][added["content"]]
    parts["post_processor"]["special_tokens"]["[END]"]["ids"] = [3]
    tokenizer = Tokenizer.from_json(json.dumps(parts))
    small = SMALL | {"num_hidden_layers": blocks}
    words = {
        "vocab_size": tokenizer.vocabulary,
        "max_position_embeddings": length,
        "eos_token_id": tokenizer.model.token_to_id("[END]"),
    }
    vision = small | {"image_size": size, "patch_size": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=small | words | {"pad_token_id": 0, "bos_token_id": 1},
        vision_config=vision,
        **({"projection_dim": dim} if kind == "CLIP" else {}),
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.to(dtype).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.model, pad_token="[PAD]")
    fast.save_pretrained(folder)
    if mean is not None:
        transformers.CLIPImageProcessor(image_mean=mean, image_std=std).save_pretrained(folder)
    return model, fast
