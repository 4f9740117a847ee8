"""Define learners of the task `chats` that also train an adapter (LoRA, by peft) on the weights of their model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.encoders.chat_models import ChatModel
from counterpoint.tasks.chats import ChatLearner


def with_adapter(model: ChatModel, rank: int, name: str) -> ChatModel:
    """Put an adapter on the linear layers of a model's language model, and return the model.

    Args:
        model: a model without an adapter.
        rank: rank of the adapter, at least 1; its scale is 2.
        name: name of the adapter.
    """
    from peft import LoraConfig, get_peft_model

    network = model.network
    inner = network.get_decoder() if hasattr(network, "get_decoder") else network
    names = {id(layer): found for found, layer in network.named_modules()}
    targets = [names[id(layer)] for layer in inner.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model.model = get_peft_model(model.model, config, adapter_name=name)
    for parameter in model.model.parameters():
        parameter.requires_grad_(True)
    return model


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
        return nn.ParameterList([p for name, p in self.model.model.named_parameters() if "lora_" in name])

    @property
    def weights(self) -> nn.ParameterList:
        """The model's own parameters."""
        return nn.ParameterList([p for name, p in self.model.model.named_parameters() if "lora_" not in name])

    @torch.no_grad()
    def unadapted(self, batch: dict[str, Any]) -> Tensor:
        """Compute `answer_logits` of a batch without the adapter and without gradient."""
        with self.model.model.disable_adapter():
            return self.answer_logits(batch)[0]
