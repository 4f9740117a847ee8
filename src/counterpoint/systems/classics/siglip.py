"""SigLIP: every pairing of an image and a text judged on its own by a sigmoid, no softmax over the batch.

Zhai, Mustafa, Kolesnikov, Beyer: "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike
from counterpoint.core.contrast import pair_softplus
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.operands import positive_similarity, scaled, with_bias
from counterpoint.core.precision import full_precision, scalar
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner


@over_group
@full_precision
def siglip(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Sigmoid loss (Eq. 1): (1/n) sum_ij softplus(-y_ij (exp(log_scale) I_i . T_j + bias)), y = 1 on the diagonal, else -1.

    Args:
        image, text: unit rows (not normalised here); row i of one belongs to row i of the other.
        log_scale, bias: learnable scalars, or numbers; the paper starts at ln 10 and -10.

    The sum over all pairs is divided by n, not n^2. Across processes the negatives are everybody's.
    Raises ValueError for shapes or types that differ and for an empty batch.

    >>> import torch
    >>> siglip(torch.eye(2), torch.eye(2), torch.tensor(0.0), torch.tensor(0.0))
    tensor(1.0064)
    """
    need_alike("n dim", image=image, text=text)
    log_scale, bias = scalar(log_scale, image), scalar(bias, image)
    query, key = scaled(image, (-log_scale).exp()), text
    own = positive_similarity(query, key) + bias
    # softplus(-s) = softplus(s) - s turns the diagonal's positives into negatives like all others, less their logits.
    query, key = with_bias(query, key, row=bias.expand(len(query)))
    return global_mean(pair_softplus(query, gather_rows(key)) - own)


@dataclass
class SigLIPConfig(AlignedConfig):
    """Settings of SigLIP. Defaults are the paper's where they do not hang on its data (Sec. 3.2 and 4)."""

    batch_size: int = 32768
    optimizer: str = "adamw"
    lr: float = 1e-3 * 256 / 32768
    weight_decay: float = 1e-4
    embedding: int = 768
    bias: float = -10.0
    """Where the bias starts: at the log odds of a pair being a match, about -ln of the batch size."""


class SigLIP(AlignedLearner):
    """Every pairing of two modalities judged on its own, with a learnable scale and bias; of more, the mean over every two."""

    def __init__(self, config: SigLIPConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pairs = self.paired_rows(self.embed(batch), batch)
        loss = torch.stack([siglip(a, b, self.log_scale, self.bias) for a, b, _ in pairs]).mean()
        return {"loss": loss, "scale": self.log_scale.detach().exp(), "bias": self.bias.detach()}


SYSTEM = System(slug="siglip", task="aligned", config=SigLIPConfig, learner=SigLIP, data="glyphs", recipe=LAPTOP)
