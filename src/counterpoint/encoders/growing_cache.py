"""Decode with transformers at less cost for each token. The numbers are the same.

- Keys and values: a `DynamicCache` of transformers copies all earlier ones at each new token. Here a new token is written behind
  them, in memory that grows by doubling, and attention reads a view.
- The mask of padded prompts: transformers makes it from positions at each new token. A new token sees everything but padding, so
  here the mask of padding is used as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens beyond the first ones
USE_MASK_ALONE = {
    "gpt2",
    "llama",
    "llava",
    "mistral",
    "qwen2",
    "qwen3",
}  # kinds of models that read the mask in attention only


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, as views of memory with room for further tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory: list[Tensor] = []  # of keys and of values, [batch, heads, room, width]
        self.given: tuple[Tensor | None, Tensor | None] = (None, None)  # the latest views of it

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, heads, new, width] behind the earlier ones. Return all, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        # transformers may have replaced the keys, for instance to choose rows. Then the memory does not begin with them.
        if self.keys is None or self.values is None or not self.keys.numel():
            held, earlier, known = 0, new, False
        else:
            held, earlier = self.keys.shape[-2], (self.keys, self.values)
            known = self.keys is self.given[0] and self.values is self.given[1]
        end = held + key_states.shape[-2]
        if not known or end > self.memory[0].shape[-2]:
            room = max(2 * held, end + ROOM)
            self.memory = [part.new_empty((*part.shape[:-2], room, part.shape[-1])) for part in new]
            if held:
                for memory, part in zip(self.memory, earlier, strict=True):
                    memory[..., :held, :].copy_(part)
        for memory, part in zip(self.memory, new, strict=True):
            memory[..., held:end, :].copy_(part)
        keys, values = (memory[..., :end, :] for memory in self.memory)
        self.keys, self.values = self.given = keys, values
        return keys, values

    def reset(self) -> None:
        """Drop all keys and values."""
        super().reset()
        self.memory, self.given = [], (None, None)


def growing_cache(model: Any) -> dict[str, DynamicCache]:
    """Return an empty cache as an argument of the model's `generate`. Return {} where the model needs a cache of another kind.

    Layers with a sliding window, layers with states instead of keys, and encoder-decoder models keep the cache of transformers.
    """
    names = inspect.signature(type(model).forward).parameters
    name = next(
        (one for one in ("cache", "past_key_values") if one in names), None
    )  # the second before transformers 5.2x
    if name is None or model.config.is_encoder_decoder:
        return {}
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return {name: cache}


@contextmanager
def padding_masks(network: Any) -> Iterator[None]:
    """Give the network at each new token the mask of padding, [n, 1, 1, tokens], within the context."""
    kinds = {network.config.model_type, getattr(network.config, "text_config", network.config).model_type}
    if not kinds <= USE_MASK_ALONE or getattr(network.config, "_attn_implementation", None) != "sdpa":
        yield
        return

    def ready(_: Any, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if ids is not None and ids.shape[1] == 1 and mask is not None and mask.ndim == 2:
            named["attention_mask"] = mask[:, None, None].bool()
        return values, named

    handle = network.register_forward_pre_hook(ready, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
