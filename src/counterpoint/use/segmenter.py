"""Segment pictures with a trained run of the task `dense`, and give its network the form that `export` writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from counterpoint.use.trained import TrainedRun
from counterpoint.views.images import normalise


class Segmenter(TrainedRun):
    """A trained run that classifies pixels.

    >>> segmenter = Segmenter.load("runs/first")                           # doctest: +SKIP
    >>> segmenter(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).argmax(1)  # doctest: +SKIP
    """

    def __call__(
        self, pixels: UInt8[Tensor, "n *modalities 3 h w"], present: Bool[Tensor, "n modalities"] | None = None
    ) -> Float[Tensor, "n classes h w"]:
        """Return the logits of the classes of each pixel.

        Args:
            pixels: squares of the run's size; with an axis of modalities where the run has several.
            present: whether a picture is there, where the run has several modalities. Default: all are.
        """
        if pixels.ndim == 4:
            return self.learner.segment(normalise(pixels))
        seen = normalise(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return self.learner.segment(seen, None if present is None else present.T)

    # --- what `export` reads of a run

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of the only input: "scene", or "scenes" of several modalities."""
        return {"image": "scenes" if len(self.learner.modalities) > 1 else "scene"}

    @property
    def transform(self) -> Any:
        """Modalities, tokenizers and context, as a search encoder has them."""
        learner = self.learner
        facts = {"size": learner.size, "modalities": list(learner.modalities), "classes": list(learner.regions)}
        modalities = {"image": {"kind": self.kinds["image"]} | facts}
        return SimpleNamespace(modalities=modalities, tokenizers={}, context=0)

    def embedded(self, name: str, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits of the pixels; `name` is not used."""
        return self(*inputs) if isinstance(inputs, tuple) else self(inputs)
