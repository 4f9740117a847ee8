"""Keep keys and values of earlier tokens in memory that grows by doubling.

A `DynamicCache` of transformers copies all earlier ones at each new token. Here a new token is written behind them, and attention
reads a view. The numbers are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
            self._take(new, max(2 * held, end + ROOM))
            if held:
                for memory, part in zip(self.memory, earlier, strict=True):
                    memory[..., :held, :].copy_(part)
        for memory, part in zip(self.memory, new, strict=True):
            memory[..., held:end, :].copy_(part)
        keys, values = (memory[..., :end, :] for memory in self.memory)
        self.keys, self.values = self.given = keys, values
        return keys, values

    def _take(self, like: Sequence[Tensor], room: int) -> None:
        self.memory = [part.new_empty((*part.shape[:-2], room, part.shape[-1])) for part in like]

    def join(self, parts: Sequence[Any]) -> None:
        """Take the keys and values of several groups of rows, aligned at their last tokens, with zeros before shorter ones."""
        rows = [(part.keys, part.values) for part in parts]
        end = max(keys.shape[-2] for keys, _ in rows)
        self.lazy_initialization(*rows[0])
        like = [part[:1].expand(sum(len(keys) for keys, _ in rows), -1, -1, -1) for part in rows[0]]
        self._take(like, end + ROOM)
        for memory, groups in zip(self.memory, zip(*rows, strict=True), strict=True):
            for place, group in zip(memory.split([len(group) for group in groups]), groups, strict=True):
                start = end - group.shape[-2]
                place[..., :start, :] = 0.0
                place[..., start:end, :] = group
        self.keys, self.values = self.given = self.memory[0][..., :end, :], self.memory[1][..., :end, :]

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


def join(cache: DynamicCache, parts: Sequence[DynamicCache]) -> None:
    """Let an empty growing cache take what several caches hold, one behind the other in rows."""
    layers: list[Any] = cache.layers
    for n, layer in enumerate(layers):
        layer.join([part.layers[n] for part in parts])
