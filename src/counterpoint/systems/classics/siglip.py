"""SigLIP: classify every pairing of an image and a text separately by a sigmoid, without a softmax over the batch.

Zhai, Mustafa, Kolesnikov, Beyer: "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343.

The loss (Eq. 1) is `siglip`. Scale and bias learn, without bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike
from counterpoint.core.contrast import pair_softplus
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.operands import scaled
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
    r"""Compute the sigmoid loss (Eq. 1): (1/n) sum_ij softplus(-y_ij (exp(log_scale) I_i . T_j + bias)).

    y is 1 on the diagonal, else -1.

    Args:
        image, text: unit rows, which this function does not normalise; row i of one belongs to row i of the other.
        log_scale: log(1 / temperature), a learnable scalar or a number; the paper starts at ln 10.
        bias: a learnable scalar or a number; the paper starts at -10.

    The sum over all pairs is divided by n, not n^2. Across processes, negatives come from all processes.
    Raises ValueError for different shapes or types and for an empty batch.

    >>> import torch
    >>> siglip(torch.eye(2), torch.eye(2), torch.tensor(0.0), torch.tensor(0.0))
    tensor(1.0064)
    """
    need_alike("n dim", image=image, text=text)
    query = scaled(image, (-scalar(log_scale, image)).exp())
    # With softplus(-s) = softplus(s) - s, treat the diagonal's positives as negatives and subtract their logits.
    first = place(len(text), text.device).offset
    return global_mean(pair_softplus(query, gather_rows(text), bias, own=first))


@dataclass
class SigLIPConfig(AlignedConfig):
    """Settings of SigLIP. Defaults are the paper's, except those that depend on its data (Sec. 3.2 and 4)."""

    batch_size: int = 32768
    optimizer: str = "adamw"
    lr: float = 1e-3 * 256 / 32768
    weight_decay: float = 1e-4
    embedding: int = 768
    bias: float = -10.0
    """Initial value of the bias: the log odds of a matching pair, about -ln of the batch size."""


class SigLIP(AlignedLearner):
    """Separate classification of every pairing of two modalities, with a learnable scale and bias.

    With more modalities, the loss is the mean over every two.
    """

    def __init__(self, config: SigLIPConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def shardable(self) -> Sequence[str]:
        return self.encoder_paths()

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pairs = self.paired_rows(self.embed(batch), batch)
        loss = torch.stack([siglip(a, b, self.log_scale, self.bias) for a, b, _ in pairs]).mean()
        return {"loss": loss, "scale": self.log_scale.detach().exp(), "bias": self.bias.detach()}


SYSTEM = System(slug="siglip", task="aligned", config=SigLIPConfig, learner=SigLIP, data="glyphs", recipe=LAPTOP)
