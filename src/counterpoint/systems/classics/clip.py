"""CLIP: embed images and texts in one space, and discriminate each pair from all other pairings of the batch.

Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

The loss is that of Figure 3. One pass of the kernel computes both directions without storing the matrix.
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
from counterpoint.core.compared import Compared, pairs
from counterpoint.core.distributed import batch_pair_loss
from counterpoint.core.operands import scaled
from counterpoint.core.precision import full_precision, scalar
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.systems.parts import ContrastiveLearner
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner, chosen


@over_group
@full_precision
def clip(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    log_scale: float | Float[Tensor, ""],
    *,
    ring: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute symmetric cross-entropy over S = exp(log_scale) I T^T: (CE(S) + CE(S^T)) / 2 with the diagonal as targets.

    Args:
        image, text: unit rows, which this function does not normalise, as in open_clip; row i of one belongs to row i of the
            other.
        log_scale: log(1 / temperature), a learnable scalar or a number. The paper starts at ln(1/0.07)
            and keeps it below ln 100.
        ring: across processes, pass keys round instead of gathering them; by default gather.

    Across processes, negatives come from all processes. For n = 1, the loss is 0. Raises ValueError for different shapes or
    types and for an empty batch.

    >>> import torch
    >>> clip(torch.eye(3), torch.eye(3), torch.tensor(0.0))
    tensor(0.5514)
    """
    need_alike("n dim", image=image, text=text)
    return batch_pair_loss(scaled(image, (-scalar(log_scale, image)).exp()), text, ring=ring)


@dataclass
class CLIPConfig(AlignedConfig):
    """Settings of CLIP. Defaults are the paper's for ResNet-50 (Table 18), as far as this library has such settings."""

    batch_size: int = 32768
    optimizer: str = "adamw"
    lr: float = 5e-4 * 256 / 32768
    weight_decay: float = 0.2
    embedding: int = 1024
    ring: bool = False
    """Across processes, pass keys round instead of gathering them, so that no process holds all."""


class CLIP(ContrastiveLearner, AlignedLearner):
    """Contrast of two modalities with a learnable temperature. With more modalities, the mean over every two."""

    def __init__(self, config: CLIPConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        temperature = (-self.log_scale).exp()
        rows = self.paired_rows(self.embed(batch), batch)
        return [Compared(a, b, pairs, temperature, chosen(batch["index"], both, len(a))) for a, b, both in rows]

    def objective(self, compared: Compared) -> dict[str, Tensor]:
        loss = clip(compared.query, compared.key, self.log_scale, ring=self.config.ring)
        return {"loss": loss, "scale": self.log_scale.detach().exp()}

    def shardable(self) -> Sequence[str]:
        return self.encoder_paths()

    def end_step(self) -> None:
        super().end_step()
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(100))


SYSTEM = System(
    slug="clip", task="aligned", config=CLIPConfig, learner=CLIP, data="glyphs", recipe=LAPTOP, compares=pairs
)
