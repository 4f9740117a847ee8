"""Share what learners of a downstream test have in common: a head on an encoder that trains with it, or stays as it is."""

from __future__ import annotations

from typing import Any, Self

from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError
from counterpoint.tasks.images import ImageLearner


def check_frozen(config: Any) -> None:
    """Raise CounterpointError for settings that both keep the encoder and adapt it."""
    if config.frozen and config.lora:
        raise CounterpointError("--frozen keeps the encoder as it is, and --lora adapts it; give one of them")


class DownstreamLearner(ImageLearner):
    """An ImageLearner with `head`. With the setting `frozen` the encoder keeps its weights and its running statistics.

    Subclasses build the head, then call `begin_training`.
    """

    head: Any  # a module

    def begin_training(self) -> None:
        """Set the training mode, and keep the encoder where the settings freeze it."""
        self.train()
        if self.config.frozen:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.config.frozen:
            self.encoder.eval()  # running statistics stay, too
        return self

    def turns(self) -> list[Turn]:
        return [self.turn_of([self.head if self.config.frozen else self])]
