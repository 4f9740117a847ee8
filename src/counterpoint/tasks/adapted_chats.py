"""Define learners of the task `chats` that also train an adapter (LoRA, by peft) on the weights of their model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.encoders.chat_models import ChatModel
from counterpoint.tasks.chats import ChatLearner


class AdaptedChatLearner(ChatLearner):
    """A model with an adapter on the linear layers of its language model. The adapter adds zeros until it trains.

    Class attributes:
        adapter: Name of the adapter.
    """

    adapter = "policy"

    def build(self, data: Any) -> ChatModel:
        """Build the model, with the adapter on it."""
        from peft import LoraConfig, get_peft_model

        model = super().build(data)
        rank = self.config.rank
        inner = model.network.get_decoder() if hasattr(model.network, "get_decoder") else model.network
        names = {id(layer): name for name, layer in model.network.named_modules()}
        targets = [names[id(layer)] for layer in inner.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        model.model = get_peft_model(model.model, config, adapter_name=self.adapter)
        for parameter in model.model.parameters():
            parameter.requires_grad_(True)
        return model

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
        """Compute the logits of a batch without the adapter and without gradient."""
        with self.model.model.disable_adapter():
            found: Tensor = self.logits(batch)
        return found
