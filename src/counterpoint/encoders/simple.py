"""Build networks of one or two hidden layers: encoders for small claims, and heads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.encoders.text import Tokenizer


class PixelMLP(nn.Module):
    """A network with one hidden layer on the mean of a picture's channels."""

    def __init__(self, size: int, hidden: int = 128, dim: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(size * size, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, images: Float[Tensor, "n channels size size"]) -> Float[Tensor, "n dim"]:
        return self.layers(images.mean(1).flatten(1))


class BagOfTokens(nn.Module):
    """A network that averages the tokens' vectors (the hidden layer) and maps the mean to `dim` numbers."""

    def __init__(self, vocabulary: int, hidden: int = 128, dim: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "n dim"]:
        mean = (self.embed(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.layers(mean)


def build_simple_encoder(spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module | None:
    """Build the network with one hidden layer for images or texts; return None for another kind of modality.

    Args:
        spec: kind and, for an image, size of the modality, as in a task's facts.
        tokenizer: the tokenizer of a text as JSON.
    """
    if spec["kind"] == "image":
        return PixelMLP(spec["size"])
    if spec["kind"] == "text":
        assert tokenizer is not None
        return BagOfTokens(Tokenizer.from_json(tokenizer).vocabulary)
    return None


class Tower(nn.Module):
    """An encoder followed by a head, as one module to copy."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, values: Any) -> Tensor:
        return self.head(self.encoder(*values) if isinstance(values, tuple | list) else self.encoder(values))


def mlp(*widths: int, bias: bool = True, last: nn.Module | None = None) -> nn.Sequential:
    """Build linear layers of these widths, with batch normalisation and ReLU between them.

    Args:
        widths: width of the input, of each hidden layer and of the output.
        bias: whether the linear layers have a bias.
        last: module to append; None: nothing.
    """
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b, bias=bias), nn.BatchNorm1d(b), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    return nn.Sequential(*layers, *([] if last is None else [last]))


def twin_projector(dim: int, hidden: int, width: int) -> nn.Sequential:
    """Build a projector of redundancy reduction (Barlow Twins): two hidden layers, and batch normalisation at the end."""
    return mlp(dim, hidden, hidden, width, last=nn.BatchNorm1d(width))


def with_predictor(dim: int, hidden: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Build a projector whose output has batch normalisation without parameters, and a predictor of it (SimSiam, BYOL)."""
    projector = mlp(dim, hidden, width, bias=False, last=nn.BatchNorm1d(width, affine=False))
    return projector, mlp(width, hidden, width)


def conv_mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Build a head that treats cells alike: 1 x 1 convolution, batch normalisation, ReLU, 1 x 1 convolution."""
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 1)
    )


class LearnedWeights(nn.Module):
    """An ordinary head in place of one that is generated from words: a learned weight of unit length for each word."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(words, width))

    def forward(self, words: Float[Tensor, "words dim"]) -> Float[Tensor, "words width"]:
        return unit(self.weight)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_layer(module: nn.Module) -> None:
    """Draw a linear layer's weights by He et al. (arXiv 1502.01852), and set its biases to 0.01, as CAPro's authors do.

    PyTorch's own smaller weights leave its projections nearly parallel for hundreds of steps.
    """
    if isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.01)


class Stack(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        pairs = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        super().__init__(*[layer for pair in pairs for layer in (pair, nn.ReLU())][:-1])
        self.dim = widths[-1]
        self.apply(_xavier)
