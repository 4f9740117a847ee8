"""Read the logits of lower layers of a language model: their states through the output layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from counterpoint.encoders.chat_models import ChatModel
from counterpoint.errors import CounterpointError


class EarlyExit:
    """Reads the logits of lower layers of a model, beside those of its last layer.

    Args:
        model: a causal language model.
        layers: numbers of layers, from 1; 0 is the embedding.
        early_norm: apply the final normalisation before the output layer.
    """

    def __init__(self, model: ChatModel, layers: Sequence[int], *, early_norm: bool = True) -> None:
        network = model.network
        self.inner = network.get_decoder() if hasattr(network, "get_decoder") else network.model
        self.head = network.get_output_embeddings()
        self.norm = getattr(self.inner, "norm", None) or getattr(self.inner, "ln_f", None) if early_norm else None
        blocks = getattr(self.inner, "layers", None)
        self.blocks: Sequence[nn.Module] = blocks if blocks is not None else self.inner.h
        if layers and not 0 < max(layers) < len(self.blocks):
            raise CounterpointError(
                f"layer {max(layers)}: early exit takes a layer from 1 to {len(self.blocks) - 1} of {len(self.blocks)}"
            )
        self.layers = list(layers)
        self.states: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, *, last: bool) -> Iterator[None]:
        """Keep the layers' states of each forward pass; `last`: of the last token alone."""
        handles = []

        def keep(number: int) -> Any:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                state = out[0] if isinstance(out, tuple) else out
                self.states[number] = state[:, -1:] if last else state

            return hook

        try:
            handles = [self.blocks[number - 1].register_forward_hook(keep(number)) for number in self.layers]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, number: int) -> Tensor:
        """Return the logits [n, tokens, vocabulary] of a layer, of the last forward pass."""
        state = self.states[number]
        found: Tensor = self.head(state if self.norm is None else self.norm(state))
        return found
