"""Define students of the task `chats` that become a sparse mixture of experts (`encoders/mixture_of_experts.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.encoders.mixture_of_experts import feed_forward_of, layers_of, loads, mixtures_of, routing, upcycle
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks.chats import finished_chat
from counterpoint.tasks.measures.experts import expert_figure, expert_measures
from counterpoint.tasks.taught_chats import TaughtChatLearner, TaughtChatsConfig

KINDS = ("text", "image")  # of tokens


@dataclass
class SparseChatsConfig(TaughtChatsConfig):
    """Settings of every student with experts."""

    experts: int = 4
    """Number of experts of a layer; two of them compute each token."""
    capacity_factor: float = 0.0
    """An expert takes at most 2 factor tokens / experts of a batch's tokens in training; 0: any number. LLaVA-MoD's: 1.5."""
    min_capacity: int = 0
    """Least number of tokens that an expert takes, with a capacity factor."""
    router_noise: bool = False
    """Add Gumbel noise to the second choice in training, as DeepSpeed does."""
    router_weight: float = 0.01
    """Weight of the loss of load balance, summed over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 2:
            raise CounterpointError(f"experts must be at least 2, got {self.experts}: two of them compute each token")
        if min(self.capacity_factor, self.min_capacity, self.router_weight) < 0:
            raise CounterpointError("capacity_factor, min_capacity and router_weight must not be negative")


class SparseChatLearner(TaughtChatLearner):
    """A student that `become_sparse` gives experts, in a stage or from the run that `model` names."""

    config: Any

    def begin(self, survey: Survey) -> None:
        if self.config.model.startswith("run:"):
            self.restructure(finished_chat(self.config.model).structure())
        super().begin(survey)

    def become_sparse(self, survey: Survey | None = None) -> None:
        """Replace every second feed-forward network by experts that copy it. The `enter` of a stage."""
        config = self.config
        options = {"capacity_factor": config.capacity_factor, "min_capacity": config.min_capacity}
        upcycle(self.model.network, config.experts, noise=config.router_noise, **options)

    @property
    def feed_forward(self) -> nn.ModuleList:
        """The feed-forward networks of all layers: experts with their routers, and dense ones."""
        return feed_forward_of(self.model.network)

    def routed(
        self, batch: dict[str, Any], **more: Any
    ) -> tuple[Float[Tensor, "n tokens vocabulary"], Float[Tensor, ""]]:
        """Compute the student's logits, and the loss of load balance, summed over layers; 0 for a dense student."""
        with routing(self.model, batch["mask"]) as routes:
            logits = super().logits(batch, **more)
        balance: Tensor = sum((layer.balance for layer in routes), logits.new_zeros(()))
        return logits, balance

    def logits(self, batch: dict[str, Any], **more: Any) -> Float[Tensor, "n tokens vocabulary"]:
        return self.routed(batch, **more)[0]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return ()  # the loss of load balance depends on all rows

    def structure(self) -> dict[str, Any]:
        layers = mixtures_of(self.model)
        return {"experts": len(layers[0].experts)} if layers else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        experts = structure.get("experts", self.config.experts)
        if experts != self.config.experts:
            raise CounterpointError(
                f"the weights are of {experts} experts, the settings name {self.config.experts}; use --experts {experts}"
            )
        if structure:
            self.become_sparse()

    # --- evaluation

    def loads(self, survey: Survey, split: str) -> NDArray[np.int64]:
        """Count the choices of experts on the chats of a split: [layers, kinds of tokens, experts]."""

        def counted(batch: dict[str, Any]) -> Tensor:
            kinds = (batch["ids"] == self.model.tokenizer.image_id).long()
            with routing(self.model, batch["mask"]) as routes:
                super(SparseChatLearner, self).logits(batch)
            found = [loads(layer, batch["mask"], kinds, len(KINDS), self.config.experts) for layer in routes]
            return torch.stack(found, 1)

        return np.asarray(survey.over(split, counted).sum(0).numpy())

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        found = super().measures(survey, split)
        return found | (expert_measures(self.loads(survey, split).sum(1)) if mixtures_of(self.model) else {})

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show the share of tokens by layer and expert."""
        found = super().figures(survey)
        if not mixtures_of(self.model):
            return found
        numbers = range(0, len(layers_of(self.model.network)), 2)
        return found | {"Experts": expert_figure(self.loads(survey, "test"), numbers, KINDS)}
