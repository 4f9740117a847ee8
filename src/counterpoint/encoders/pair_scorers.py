"""Score a pair of items, such as a picture and a text, by one network that reads both: a cross-encoder.

    scorer = build_scorer("coattention", width=128, layers=6, heads=4)
    scores = scorer(image, text, None, text_mask)                    # image [n, p, 128], text [n, t, 128] -> [n]
    smaller = build_scorer("coattention", width=128, layers=3, heads=4)
    copy_layers(smaller, scorer, (0, 3, 5))                          # starts from these layers and the rest of `scorer`

A scorer reads the tokens of two unimodal encoders, mapped to its width. A modality may have one token, its feature vector. In a
mask, True marks a token and False marks padding; None means no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.encoders.fusion import Layer
from counterpoint.errors import CounterpointError, unknown
from counterpoint.words import counted

FUSIONS = ("coattention", "mlp")


class PairScorer(nn.Module):
    """Layers that read both items, and a linear head that scores the pair."""

    layers: nn.ModuleList
    head: nn.Linear

    def below_head(self) -> list[nn.Module]:
        """Return all modules but the head."""
        return [module for name, module in self.named_children() if name != "head"]


class CoAttentionLayer(nn.Module):
    """A layer for each modality, whose cross-attention reads the other modality's states before this layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.image = Layer(width, heads, 4 * width, dropout, width)
        self.text = Layer(width, heads, 4 * width, dropout, width)

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return (
            self.image(image, image_mask, text, None, text_mask),
            self.text(text, text_mask, image, None, image_mask),
        )


class CoAttention(PairScorer):
    """Co-attention layers, a pooler of each modality's first token, and a linear head (METER, arXiv 2111.02387)."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CoAttentionLayer(width, heads, dropout) for _ in range(layers))
        self.image_pooler, self.text_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(2 * width, 1)

    def forward(
        self,
        image: Float[Tensor, "n patches width"],
        text: Float[Tensor, "n tokens width"],
        image_mask: Bool[Tensor, "n patches"] | None = None,
        text_mask: Bool[Tensor, "n tokens"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Compute the score of each pair."""
        image_mask, text_mask = _seen(image_mask), _seen(text_mask)
        for layer in self.layers:
            image, text = layer(image, text, image_mask, text_mask)
        pooled = torch.cat([self.text_pooler(text[:, 0]).tanh(), self.image_pooler(image[:, 0]).tanh()], 1)
        return self.head(pooled)[:, 0]


class PairMLP(PairScorer):
    """Residual layers on [u, v, u * v], the first tokens of both modalities and their product, and a linear head."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(3 * width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(
        self,
        image: Float[Tensor, "n patches width"],
        text: Float[Tensor, "n tokens width"],
        image_mask: Bool[Tensor, "n patches"] | None = None,
        text_mask: Bool[Tensor, "n tokens"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Compute the score of each pair; masks have no effect."""
        u, v = image[:, 0], text[:, 0]
        x = self.inlet(torch.cat([u, v, u * v], 1))
        for layer in self.layers:
            x = x + layer(F.gelu(x))
        return self.head(self.norm(F.gelu(x)))[:, 0]


def _seen(mask: Tensor | None) -> Tensor | None:
    """Make the first token of every row visible, because a row of attention without any key is NaN."""
    return None if mask is None else mask | (torch.arange(mask.shape[1], device=mask.device) == 0)


def build_scorer(fusion: str, width: int, layers: int, heads: int = 1, dropout: float = 0.0) -> PairScorer:
    """Build a scorer from random weights.

    Args:
        fusion: "coattention" (both items' tokens attend to each other) or "mlp" (layers on both first tokens).
        width: width of the tokens, at least 1.
        layers: number of layers, at least 1.
        heads: attention heads of co-attention, which divide the width; by default 1.
        dropout: probability within co-attention, 0 to 1; by default 0.

    Raises CounterpointError for an unknown fusion, and for numbers that do not fit.
    """
    if fusion not in FUSIONS:
        raise unknown("fusion", fusion, FUSIONS)
    if layers < 1 or width < 1:
        raise CounterpointError(f"a scorer needs a width and layers of at least 1, got {width} and {layers}")
    if fusion == "mlp":
        return PairMLP(width, layers)
    if heads < 1 or width % heads:
        raise CounterpointError(f"the width of a scorer ({width}) must be a multiple of heads ({heads})")
    return CoAttention(width, layers, heads, dropout)


@torch.no_grad()
def copy_layers(student: PairScorer, teacher: PairScorer, layers: Sequence[int]) -> None:
    """Give a scorer the weights of a deeper one: its layers of these numbers, and all that is not a layer.

    Args:
        student: the scorer to change; its weights remain its own storage.
        teacher: the scorer to copy from, of the same fusion and width.
        layers: a layer of the teacher for each layer of the student, counted from 0. A layer may occur twice.

    Raises CounterpointError for other numbers of layers, and for scorers that differ in more than their layers.
    """
    if len(layers) != len(student.layers) or not all(0 <= number < len(teacher.layers) for number in layers):
        raise CounterpointError(
            f"student_layers {list(layers)} must name {counted(len(student.layers), 'layer')} of the teacher, which has the "
            "layers 0 to "
            f"{len(teacher.layers) - 1}"
        )
    chosen = copy.copy(teacher)
    chosen._modules = dict(teacher._modules) | {"layers": nn.ModuleList(teacher.layers[number] for number in layers)}
    try:
        student.load_state_dict(chosen.state_dict())
    except RuntimeError as error:
        raise CounterpointError(
            f"the teacher's scorer differs from the student's in more than its layers: {' '.join(str(error).split())[:200]}"
        ) from error
