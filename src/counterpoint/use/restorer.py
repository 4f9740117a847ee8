"""Restore pictures with a trained run of the task `restored`, and give its network the form that `export` writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from counterpoint.use.trained import TrainedRun
from counterpoint.views.images import zero_to_one


class Restorer(TrainedRun):
    """A trained run that enlarges pictures.

    >>> restorer = Restorer.load("runs/first")                       # doctest: +SKIP
    >>> restorer(torch.zeros(1, 3, 20, 30, dtype=torch.uint8)).shape  # doctest: +SKIP
    torch.Size([1, 3, 40, 60])
    """

    def __call__(self, pixels: UInt8[Tensor, "n 3 h w"] | Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
        """Return enlarged pictures in 0..1, of pictures of any size as uint8 or in 0..1."""
        found: Tensor = self.learner.restore(zero_to_one(pixels))
        return found.clamp(0, 1)

    # --- what `export` reads of a run

    kinds = {"image": "picture"}  # noqa: RUF012

    @property
    def transform(self) -> Any:
        """Modalities, tokenizers and context, as a search encoder has them."""
        modalities = {"image": {"kind": "picture", "scale": self.learner.config.scale}}
        return SimpleNamespace(modalities=modalities, tokenizers={}, context=0)

    def embedded(self, name: str, inputs: Tensor) -> Tensor:
        """Return the restored pictures of the modality `name`."""
        return self(inputs)
