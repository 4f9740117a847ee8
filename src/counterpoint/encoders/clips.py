"""Encode clips, features of a video at successive seconds, by a transformer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.encoders.text import TextTransformer
from counterpoint.errors import CounterpointError


class ClipEncoder(nn.Module):
    """Two linear maps of each second, position and type embeddings, a transformer, and an MLP on its first state.

    Args:
        features: width of a clip's rows.
        dim: width of the result.
        width, depth, heads: sizes of the transformer.
        length: maximum number of seconds.
        hidden: width between the two linear maps, by default 1,024.
        dropout: probability in the transformer, by default 0.1.
        head_dropout: probability in the MLP, by default 0.3.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        width: int,
        depth: int,
        heads: int,
        length: int = 384,
        hidden: int = 1024,
        dropout: float = 0.1,
        head_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.length = length
        self.project = nn.Sequential(nn.Linear(features, hidden), nn.Linear(hidden, width))
        # Its embedding of words has one row, the type of all seconds.
        self.body = TextTransformer(1, length, width=width, depth=depth, heads=heads, dropout=dropout)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Dropout(head_dropout), nn.Linear(dim, dim))

    def forward(
        self, clips: Float[Tensor, "n seconds features"], mask: Bool[Tensor, "n seconds"]
    ) -> Float[Tensor, "n dim"]:
        """Compute a unit vector for each clip.

        Args:
            clips: features of each second.
            mask: True at seconds, False at padding.

        Raises CounterpointError for clips that are longer than `length`.
        """
        if clips.shape[1] > self.length:
            raise CounterpointError(f"clips of {clips.shape[1]} seconds are longer than the encoder's {self.length}")
        kind, places = self.body.embed.weight[0], self.body.position[: clips.shape[1]]
        states = self.body.states(self.dropout(self.norm(self.project(clips) + places + kind)), mask)
        return unit(self.head(self.pooler(states[:, 0])))


def padded(clips: list[Float[Tensor, "seconds features"]], length: int) -> tuple[Tensor, Tensor]:
    """Stack clips of different lengths, cut to `length` seconds, and return the mask of their seconds.

    >>> padded([torch.ones(2, 1), torch.ones(1, 1)], 9)[1]
    tensor([[ True,  True],
            [ True, False]])
    """
    clips = [clip[:length] for clip in clips]
    mask = torch.zeros(len(clips), max(map(len, clips)), dtype=torch.bool)
    for row, clip in zip(mask, clips, strict=True):
        row[: len(clip)] = True
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), mask
