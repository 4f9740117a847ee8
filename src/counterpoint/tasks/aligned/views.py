"""Make a weak view and several strong views of the items of a batch, one modality at a time.

All parameters are drawn for the whole batch. Each process makes the views of its share: rows `mine` of `total` items
(`Learner.share`). Each function returns a list of views, the weak one first.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.encoders.text import Tokenizer
from counterpoint.views.images import Handled, Recipe, ViewPipeline, normalise
from counterpoint.views.text import augment_text

Text = tuple[Int[Tensor, "n tokens"], Bool[Tensor, "n tokens"]]


def image_views(
    images: Tensor,
    strong: int,
    recipes: tuple[Recipe, Recipe] | Handled,
    total: int,
    mine: slice,
    generator: torch.Generator,
) -> list[Tensor]:
    """Make views of images, normalised.

    Args:
        images: uint8 or floating point in [0, 1], [n, 3, size, size]; this process's share.
        strong: number of strong views, at least 0.
        recipes: settings of the weak view and of the strong ones. `Handled` leaves images unchanged in the weak view.
        total, mine: number of items of the whole batch, and this process's rows of it.
        generator: a generator of the CPU.
    """
    size = images.shape[2]
    if isinstance(recipes, Handled):
        drawn = [recipes.draw(total, size, generator) for _ in range(strong)]
        return [normalise(images), *(recipes.apply(images, (a[mine], n[mine])) for a, n in drawn)]
    weak, strongly = recipes
    pipeline = ViewPipeline(size, crops=1 + strong, recipe=[weak, *[strongly] * strong])
    parameters = pipeline.draw((total, *images.shape[1:]), generator)
    return pipeline.apply(images, [view.take(mine) for view in parameters])


def text_views(
    values: Text, strong: int, tokenizer: Tokenizer, length: int, total: int, mine: slice, generator: torch.Generator
) -> list[Text]:
    """Make views of texts by `augment_text`, as token numbers and masks.

    Args:
        values: token numbers and mask of this process's share.
        strong: number of strong views, at least 0.
        tokenizer: converts token numbers to words and back.
        length: maximum number of tokens of a view; longer ones are cut.
        total, mine: number of items of the whole batch, and this process's rows of it.
        generator: a generator of the CPU.
    """
    ids, mask = values
    texts = [tokenizer.decode(row[there].tolist()) for row, there in zip(ids, mask, strict=True)]
    # A generator for each item, so that the draw for one item does not depend on the words of others.
    seeds = torch.randint(2**62, (total,), generator=generator)[mine].tolist()
    made: list[list[str]] = [[] for _ in range(1 + strong)]
    for text, seed in zip(texts, seeds, strict=True):
        own = torch.Generator().manual_seed(seed)
        for number, view in enumerate(made):
            view.append(augment_text(text, own, strong=number > 0))
    encoded = [tokenizer.encode(view, length) if view else (ids, mask) for view in made]
    return [(ids_.to(ids.device), mask_.to(ids.device)) for ids_, mask_ in encoded]


def vector_views(
    values: Float[Tensor, "n dim"], strong: int, noise: float, total: int, mine: slice, generator: torch.Generator
) -> list[Any]:
    """Make views of vectors: the vectors themselves, and strong views with Gaussian noise.

    Args:
        values: this process's share.
        strong: number of strong views, at least 0.
        noise: standard deviation of the noise, at least 0.
        total, mine: number of items of the whole batch, and this process's rows of it.
        generator: a generator of the CPU.
    """
    drawn = torch.randn(strong, total, *values.shape[1:], generator=generator)[:, mine].to(values.device)
    return [values, *(values + noise * drawn)]
