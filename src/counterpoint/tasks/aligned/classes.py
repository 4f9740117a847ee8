"""Classify items by prompts, by training items in another modality, and by a linear probe.

all_of     {modality: [items, dim]} embeddings
there      {modality: [items] bool}; True where an item has the modality
labels     [items] classes, -1 for none
prompts    {text modality: [classes, dim]} embeddings of the classes' prompts
examples   {modality: ([n, dim], [n])} embeddings and classes of training items that have the modality
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from counterpoint.tasks.aligned.settings import AlignedConfig
from counterpoint.tasks.class_texts import names_of, templates_of
from counterpoint.tasks.measures import class_chance, class_means, linear_probe, zero_shot_accuracy

Examples = Mapping[str, tuple[Tensor, Tensor]]


def prompts_of(classes: Sequence[str], config: AlignedConfig) -> list[str]:
    """Return the prompts of the classes, those of one class together."""
    names = names_of(classes, config.class_names) if config.class_names else classes
    return [template.replace("{}", name) for name in names for template in templates_of(config.prompt)]


def by_prompts(
    all_of: Mapping[str, Tensor], there: Mapping[str, Tensor], labels: Tensor, prompts: Mapping[str, Tensor]
) -> dict[str, float]:
    """Measure the share of items whose nearest prompt is their class's, in every modality but the text."""
    ((text, of_classes),) = prompts.items()
    return {
        f"{name}_zero_shot": zero_shot_accuracy(value[there[name]], of_classes, labels[there[name]])
        for name, value in all_of.items()
        if name != text
    }


def by_examples(
    all_of: Mapping[str, Tensor], there: Mapping[str, Tensor], labels: Tensor, examples: Examples
) -> dict[str, float]:
    """Measure the share of items whose nearest class mean, over training items in another modality, is their class's."""
    found: dict[str, float] = {}
    for other, (rows, classes) in examples.items():
        if not len(rows):  # no training item of a class has this modality
            continue
        means, numbers = class_means(rows, classes)
        # Leave out the items of a class without an example.
        at = torch.full((int(max(labels.max(), classes.max())) + 2,), -1)  # the last for label -1
        at[numbers] = torch.arange(len(numbers))
        for name in (name for name in all_of if name != other):
            known = there[name]
            found[f"{name}_from_{other}_zero_shot"] = zero_shot_accuracy(all_of[name][known], means, at[labels[known]])
    return found


def by_probe(
    all_of: Mapping[str, Tensor], there: Mapping[str, Tensor], labels: Tensor, examples: Examples
) -> dict[str, float]:
    """Measure the accuracy of logistic regression on training items of the same modality."""
    found: dict[str, float] = {}
    for name, (rows, classes) in examples.items():
        known = there[name] & (labels >= 0)
        if len(classes.unique()) > 1 and bool(known.any()):
            found[f"{name}_linear_accuracy"] = linear_probe(rows, classes, all_of[name][known], labels[known])[0]
    return found


def chance(modalities: Sequence[str], prompts: Mapping[str, Tensor], examples: Examples) -> dict[str, float]:
    """Return the chance level of each accuracy above: 1 / classes."""
    made: dict[str, float] = {}
    for name in modalities:
        for of_classes in prompts.values():
            made[f"{name}_zero_shot"] = class_chance(len(of_classes))
        for other, (_, classes) in examples.items():
            level = class_chance(len(classes.unique()))
            made[f"{name}_from_{other}_zero_shot"] = made[f"{other}_linear_accuracy"] = level
    return made
