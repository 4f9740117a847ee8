"""Turn a dense language model into a sparse mixture of experts, with routing to two experts for each token.

`upcycle` replaces the feed-forward network of every second layer, beginning with the first. Each expert starts as a copy of the
network that it replaces. The gates of a token sum to 1, so the model computes the same function as before. A dropped token
ends this.

By default no token is dropped. Tokens are sorted by expert, and each expert computes its own rows. So memory and time are linear in
the tokens; the dense form of DeepSpeed multiplies a tensor [tokens, experts, capacity], which is quadratic in them.

Routers compute in float32. Capacity and noise act in training alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.precision import exact
from counterpoint.core.routing import Routes, top2_routes
from counterpoint.core.world import alone
from counterpoint.errors import CounterpointError


class MixtureOfExperts(nn.Module):
    """A layer of experts, of which two compute each token.

    Args:
        ffn: the feed-forward network that every expert copies.
        width: width of a token.
        experts: number of experts, at least 2.
        capacity_factor: an expert takes at most 2 factor tokens / experts of the tokens in training; 0: any number.
        min_capacity: least capacity.
        noise: add Gumbel noise to the second choice in training.
    """

    def __init__(
        self,
        ffn: nn.Module,
        width: int,
        experts: int = 4,
        *,
        capacity_factor: float = 0.0,
        min_capacity: int = 0,
        noise: bool = False,
    ) -> None:
        super().__init__()
        if experts < 2:
            raise CounterpointError(f"experts must be at least 2, got {experts}: two of them compute each token")
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(experts))
        self.router = nn.Linear(width, experts, bias=False)
        self.capacity_factor, self.min_capacity, self.noise = capacity_factor, min_capacity, noise
        self.mask: Bool[Tensor, "n tokens"] | None = None  # of the tokens that count, within `routing`
        self.found: list[Routes] | None = None  # receives the routes, within `routing`

    def routes(self, rows: Float[Tensor, "tokens width"]) -> Routes:
        """Choose two experts for each token."""
        with exact(rows.device.type):
            logits = F.linear(rows.float(), self.router.weight.float())
        noise = None
        if self.training and self.noise:
            noise = -torch.empty_like(logits).exponential_().log()
        factor = self.capacity_factor if self.training and self.capacity_factor else None
        found: Routes = top2_routes(logits, noise, factor, self.min_capacity)
        return found

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        """Compute the weighted outputs of two experts of each token; 0 for padding and for tokens that both dropped."""
        rows = x.reshape(-1, x.shape[-1])
        kept = None if self.mask is None else self.mask.reshape(-1).nonzero()[:, 0]
        if kept is not None:
            rows = rows[kept]
        # Shares of an evaluation may have other numbers of batches: no process waits for the others there.
        with nullcontext() if self.training else alone():
            routes = self.routes(rows)
        if self.found is not None:
            self.found.append(routes)
        return self._computed(rows, routes, kept, x)

    def _computed(self, rows: Tensor, routes: Routes, kept: Tensor | None, x: Tensor) -> Tensor:
        """Compute each expert on its own tokens, which one sort makes neighbours."""
        weights, chosen = routes.weights.reshape(-1), routes.experts.reshape(-1)
        order = chosen.argsort(stable=True)
        if routes.capacity is not None:
            order = order[weights.detach()[order] > 0]
        of = chosen[order].bincount(minlength=len(self.experts)).tolist()
        tokens = order // 2
        parts = rows[tokens].split(of)
        # An expert without tokens computes nothing and gets no gradient.
        done = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
        y = torch.cat(done) * weights[order, None].to(rows.dtype) if done else rows[:0]
        out = torch.zeros(x.shape[:-1].numel(), x.shape[-1], dtype=y.dtype, device=x.device)
        return out.index_add(0, tokens if kept is None else kept[tokens], y).view(x.shape).to(x.dtype)


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a decoder of transformers, each with a feed-forward network `mlp`."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    inner = getattr(inner, "language_model", inner)
    found = next((getattr(inner, name) for name in ("layers", "h") if hasattr(inner, name)), None)
    if found is None or not all(hasattr(layer, "mlp") for layer in found):
        raise CounterpointError(
            f"{type(model).__name__} has no layers with a feed-forward network `mlp`, so it cannot be up-cycled; name a model of "
            "Llama's, Qwen2's or GPT-2's kind"
        )
    return list(found)


def upcycle(model: Any, experts: int = 4, **options: Any) -> list[MixtureOfExperts]:
    """Replace the feed-forward networks of layers 0, 2, 4 ... by experts that copy them, and return the new layers.

    Args:
        model: a decoder of transformers, or a model of pictures and text around one.
        experts: number of experts, at least 2.
        options: of `MixtureOfExperts`.

    A model that has experts already stays as it is. Raises CounterpointError for a model without such layers.
    """
    layers: list[Any] = layers_of(model)[::2]
    config = getattr(model.config, "text_config", model.config)
    for layer in layers:
        if not isinstance(layer.mlp, MixtureOfExperts):
            mixture = MixtureOfExperts(layer.mlp, int(config.hidden_size), experts, **options)
            device = next(layer.parameters()).device
            layer.mlp = mixture.to(device).train(layer.training)
    return [layer.mlp for layer in layers]


def mixtures_of(model: nn.Module) -> list[MixtureOfExperts]:
    """Return the layers of experts of a model, in order; [] of a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def feed_forward_of(model: Any) -> nn.ModuleList:
    """Return the feed-forward networks of all layers: experts with their routers, and dense ones."""
    return nn.ModuleList(layer.mlp for layer in layers_of(model))


@contextmanager
def routing(model: nn.Module, mask: Bool[Tensor, "n tokens"] | None = None) -> Iterator[list[Routes]]:
    """Collect the routes of all layers of a forward pass within a `with` block.

    Args:
        model: a model with experts.
        mask: True at the tokens that are routed. Others get 0 from the experts. Default: all.
    """
    found: list[Routes] = []
    layers = mixtures_of(model)
    for layer in layers:
        layer.mask, layer.found = mask, found
    try:
        yield found
    finally:
        for layer in layers:
            layer.mask, layer.found = None, None


def loads(
    routes: Routes, mask: Bool[Tensor, "n tokens"], kinds: Int[Tensor, "n tokens"], many: int, experts: int
) -> Int[Tensor, "n many experts"]:
    """Count the choices of each expert, by row of the batch and kind of token; dropped choices do not count.

    Args:
        routes: of the tokens in `mask`.
        mask: True at the tokens that were routed.
        kinds: kind of each token, 0 to many - 1.
        many: number of kinds.
        experts: number of experts.
    """
    row = (torch.arange(len(mask), device=mask.device)[:, None] * many + kinds)[mask]
    taken = (routes.weights.detach() > 0).long().reshape(-1)
    at = (row[:, None] * experts + routes.experts).reshape(-1)
    return taken.new_zeros(len(mask) * many * experts).index_add(0, at, taken).view(len(mask), many, experts)
