"""Define learners of the task `chats` that also train an adapter (LoRA, by peft) on the weights of their model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from counterpoint.encoders.adapters import with_adapters
from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.flags import tables
from counterpoint.engine.stages import Stage
from counterpoint.tasks.chats import ChatLearner


def with_adapter(
    model: ChatModel,
    rank: int,
    name: str,
    *,
    scale: float = 2.0,
    dropout: float = 0.0,
    attention: bool = False,
    tokens: Sequence[int] = (),
) -> ChatModel:
    """Put an adapter on the linear layers of a model's language model, and return the model.

    Args:
        model: a model without an adapter.
        rank: rank of the adapter, at least 1.
        name: name of the adapter.
        scale: factor of what the adapter adds.
        dropout: dropout probability of the adapter's inputs.
        attention: put it on the layers of the attention alone.
        tokens: numbers of tokens whose rows in embedding and output layer the adapter also trains, sorted.
    """
    from peft import LoraConfig

    network = model.network
    inner = network.get_decoder() if hasattr(network, "get_decoder") else network
    names = {id(layer): found for found, layer in network.named_modules()}
    targets = [names[id(layer)] for layer in inner.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
    if attention:
        targets = [target for target in targets if "attn" in target]
    rows = {names[id(table)].rpartition(".")[2]: list(tokens) for table in tables(model)} if tokens else None
    alpha: Any = scale * rank  # peft takes any number
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    model.model = with_adapters(model.model, config, name)
    for parameter in model.model.parameters():
        parameter.requires_grad_(True)
    return model


@contextmanager
def adapting_rows(model: ChatModel, name: str, first: Callable[[], int | None]) -> Iterator[None]:
    """Return a context in which an adapter works on the last rows of each batch alone, without gradient.

    peft's own way (`adapter_names`) sorts the rows by adapter in every layer, which takes longer than a small model.

    Args:
        model: a model with the adapter, in evaluation mode.
        name: name of the adapter.
        first: gives the first row with the adapter, at each call; None: no row.
    """

    def lean(layer: Any) -> Callable[[Tensor], Tensor]:
        base, low = layer.base_layer, layer.lora_A[name].weight
        high = layer.lora_B[name].weight * layer.scaling[name]

        def forward(x: Tensor) -> Tensor:
            out: Tensor = base(x)
            start = first()
            if start is not None:
                out[start:] += linear(linear(x[start:], low), high)
            return out

        return forward

    layers = [layer for layer in model.model.modules() if name in getattr(layer, "lora_A", ())]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.forward = lean(layer)
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


TRAINED = ("lora_", "trainable_tokens_")  # in the names of an adapter's parameters


def of_adapter(name: str) -> bool:
    """Return whether the parameter of this name belongs to an adapter."""
    return any(part in name for part in TRAINED)


class AdaptedChatLearner(ChatLearner):
    """A model with an adapter on the linear layers of its language model. The adapter adds zeros until it trains.

    Class attributes:
        adapter: Name of the adapter.
        answers_adapted: Whether the model answers with its adapter, as a teacher of others, too.
    """

    adapter = "policy"
    answers_adapted = True

    def build(self, data: Any) -> ChatModel:
        """Build the model, with the adapter on it."""
        return with_adapter(super().build(data), self.config.rank, self.adapter)

    @property
    def adapters(self) -> nn.ParameterList:
        """The adapter's own parameters."""
        return nn.ParameterList([p for name, p in self.model.model.named_parameters() if of_adapter(name)])

    @property
    def weights(self) -> nn.ParameterList:
        """The model's own parameters."""
        return nn.ParameterList([p for name, p in self.model.model.named_parameters() if not of_adapter(name)])

    def model_stages(self) -> list[Stage]:
        """Return the stage that trains the model itself; none where it has no epochs."""
        epochs, turns = self.config.epochs, lambda: [self.turn([self.weights], self.config)]
        return [Stage("model", epochs, lambda: [self.weights], turns)] if epochs else []

    def adapter_stage(self, name: str, epochs: int, lr: float, **more: Any) -> Stage:
        """Return a stage that trains the adapter alone.

        Args:
            name, epochs: see `Stage`.
            lr: learning rate at a batch of 256.
            more: further arguments of `Stage`.
        """
        config = replace(self.config, lr=lr)
        return Stage(name, epochs, lambda: [self.adapters], lambda: [self.turn([self.adapters], config)], **more)

    @torch.no_grad()
    def unadapted(self, batch: dict[str, Any]) -> Tensor:
        """Compute `answer_logits` of a batch without the adapter and without gradient."""
        with self.model.model.disable_adapter():
            return self.answer_logits(batch)[0]


def plain_name(name: str) -> str:
    """Return the name that a parameter has without peft's wrappers."""
    for part in ("base_model.model.", "token_adapter.", "base_layer."):
        name = name.replace(part, "")
    return name
