"""Map a first modality into two spaces: one that it shares with a second modality, and one that it shares with a third.

These are the heads of VATT (Akbari et al., NeurIPS 2021, arXiv 2104.11178), there of video, audio and text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

Rows = dict[str, Float[Tensor, "n width"]]


class TwoSpaces(nn.Module):
    """VATT's heads. The space of first and second leads to that of first and third.

    Args:
        names: the three modalities.
        width: width of the inputs and of both spaces.
    """

    def __init__(self, names: tuple[str, str, str], width: int) -> None:
        super().__init__()
        self.names = names
        self.first_to_second = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
        )
        self.second_to_second = nn.Linear(width, width)
        self.second_to_third = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width))
        self.third_to_third = nn.Linear(width, width)

    def forward(self, inputs: Mapping[str, Float[Tensor, "n width"]]) -> tuple[Rows, Rows]:
        """Map each modality that is there into its spaces: that of first and second, and that of first and third.

        Outside of training the second modality is also mapped into the other space.
        """
        first, _, last = self.names
        second: Rows = {}
        third: Rows = {}
        for name, x in inputs.items():
            if name == last:
                third[name] = self.third_to_third(x)
                continue
            second[name] = self.first_to_second(x) if name == first else self.second_to_second(x)
            # In training a loss needs only the first here, and batch statistics must come from it alone.
            if name == first or not self.training:
                third[name] = self.second_to_third(second[name])
        return second, third


def side_by_side(
    second: Mapping[str, Float[Tensor, "n width"]], third: Mapping[str, Float[Tensor, "n width"]]
) -> dict[str, Float[Tensor, "n doubled"]]:
    """Join unit rows of both spaces. A dot product is then the similarity in the spaces that both modalities have, halved.

    >>> row = torch.tensor([[1.0]])
    >>> side_by_side({}, {"text": row})
    {'text': tensor([[0., 1.]])}
    """
    return {
        name: torch.cat([second[name], x], 1) / 2**0.5 if name in second else torch.cat([torch.zeros_like(x), x], 1)
        for name, x in third.items()
    }
