"""Measure classification after demonstrations (see `counterpoint.tasks.episodes` for the kinds of prompts).

The learner's own answers are of episodes: unseen classes, among the names of the episode.

    accuracy              share of right answers in episodes
    shuffled_accuracy     the same, where labels have a random order
    gain_over_shuffled    difference of the two
    in_weight_accuracy    share of known classes recognised among all of them, after random demonstrations
    neighbour_accuracy    the same, after similar items
"""

from __future__ import annotations

from typing import Any

import torch

from counterpoint.errors import diverged

OWN = "episode"  # the kind of prompt by which a run is judged


class EpisodeEvaluator:
    """Measure the classes of best logit.

    Args:
        ways: number of classes of an episode.
        classes: number of known classes.
    """

    def __init__(self, ways: int, classes: int) -> None:
        self.ways, self.classes = ways, classes
        self.reset()

    def reset(self) -> None:
        self.right: dict[str, list[int]] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        for name, prompts in batch["prompts"].items():
            logits = outputs[f"{name}_logits"]
            if not bool(torch.isfinite(logits).all()):
                raise diverged("the logits hold NaN or infinite values")
            right = logits.argmax(1) == prompts["truth"].to(logits.device)
            self.right.setdefault(name, []).extend(right.int().cpu().tolist())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = {name: sum(right) / len(right) for name, right in self.right.items() if right}
        named = {"accuracy" if name == OWN else f"{name}_accuracy": value for name, value in found.items()}
        if {OWN, "shuffled"} <= set(found):
            named["gain_over_shuffled"] = found[OWN] - found["shuffled"]
        return named

    def chance(self) -> dict[str, float]:
        """Return the accuracy of a guess."""
        each = {OWN: 1 / self.ways, "shuffled": 1 / self.ways}
        return {
            "accuracy" if name == OWN else f"{name}_accuracy": each.get(name, 1 / self.classes)
            for name, right in self.right.items()
            if right
        }
