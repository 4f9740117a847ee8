"""Keep the keys and values of attention in memory that grows by doubling, for the decoding of transformers.

A `DynamicCache` of transformers copies all earlier keys and values at each new token. Here a new token is written behind the
earlier ones, and attention reads a view. The numbers are the same.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens beyond the first ones


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
