"""Make a weak view and several strong views of a batch's items, one modality at a time.

All parameters are drawn for the whole batch. Each process makes the views of its share: rows `mine` of `total` items
(`Learner.share`). Each function returns a list of views, the weak one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.dropout import dropping_before
from counterpoint.encoders.simple import build_simple_encoder
from counterpoint.encoders.text import Tokenizer
from counterpoint.errors import CounterpointError
from counterpoint.tasks.aligned.learner import AlignedLearner
from counterpoint.tasks.aligned.settings import AlignedConfig
from counterpoint.views.images import Handled, Recipe, ViewPipeline, normalise
from counterpoint.views.text import augment_text

ImageRecipes = tuple[Recipe, Recipe] | Handled
# Views of images by name: (weak, strong).
IMAGE_VIEWS: dict[str, ImageRecipes] = {
    "paper": (Recipe(scale=(0.5, 1.0), flip=0.0), Recipe(jitter=0.8, grey=0.2, blur=0.5)),  # arXiv 2305.08675
    # Icons and digits lose their meaning when they are mirrored, made grey or cut to a twelfth.
    "small": (Recipe(scale=(0.8, 1.0), flip=0.0), Recipe(scale=(0.5, 1.0), flip=0.0, jitter=0.8)),
    "handled": Handled(),
}
Text = tuple[Int[Tensor, "n tokens"], Bool[Tensor, "n tokens"]]


def image_views(
    images: Tensor,
    strong: int,
    recipes: ImageRecipes,
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


@dataclass
class MultiViewConfig(AlignedConfig):
    """Settings of a learner of a weak view and strong views of each item."""

    augmentations: int = 2
    """Number of strong views of each item; 0: the weak view alone."""
    text_views: bool = True
    """Augment texts: weak views drop stop words, strong views change more."""
    text_dropout: float = 0.0
    """Dropout before each layer of text-s, for strong texts only."""
    towers: Literal["named", "simple"] = "named"
    """The named encoders, or the claim's: pixels and bags of tokens through one hidden layer each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_below_one("text_dropout")


class MultiViewLearner(AlignedLearner):
    """A learner whose batches hold `views`: {modality: [weak view, strong views...]}.

    Args:
        config: the settings.
        data: the task's facts.
        seed: seed of initialisation.
        images: recipes of the weak view of images and of the strong ones.
    """

    config: MultiViewConfig

    def __init__(self, config: MultiViewConfig, data: Any, seed: int = 0, *, images: ImageRecipes) -> None:
        super().__init__(config, data, seed)
        self.image_recipes = images
        self.tokenizers = {name: Tokenizer.from_json(text) for name, text in data.tokenizers.items()}
        self.texts = [name for name, kind in self.kinds.items() if kind == "text"]
        if config.text_dropout and not all(hasattr(self.encoders[name], "blocks") for name in self.texts):
            raise CounterpointError("text_dropout works in text-s only: --text-dropout 0")

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        simple = build_simple_encoder(spec, tokenizer) if self.config.towers == "simple" else None
        return super().build_encoder(spec, tokenizer) if simple is None else simple

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        total, mine = self.share(len(batch["index"]))
        views = {name: self.varied(name, batch["inputs"][name], total, mine, generator) for name in self.kinds}
        return batch | {"views": views}

    def varied(self, name: str, values: Any, total: int, mine: slice, generator: torch.Generator) -> list[Any]:
        """Return the weak view and the strong ones: drawn for the whole batch of `total` items, cut to rows `mine`."""
        config, kind = self.config, self.kinds[name]
        strong, share = config.augmentations, (total, mine, generator)
        if kind == "image":
            return image_views(values, strong, self.image_recipes, *share)
        if kind == "text" and config.text_views:
            return text_views(values, strong, self.tokenizers[name], config.context, *share)
        if kind == "vector" and config.vector_noise:
            return vector_views(values, strong, config.vector_noise, *share)
        return [values] * (1 + strong)

    def view_features(self, name: str, views: Sequence[Any]) -> list[Float[Tensor, "n dim"]]:
        """Encode the views of a modality, the strong ones of a text with `text_dropout`."""
        weak, *strong = views
        p = self.config.text_dropout
        blocks: Any = self.encoders[name].blocks if p and name in self.texts else ()
        with dropping_before(blocks, p):
            local = [self.features(name, view) for view in strong]
        return [self.features(name, weak), *local]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        # Dropout changes a text encoder during a call, so the encoder must run once, on all rows.
        whole = [self.encoders[name] for name in self.texts if self.config.text_dropout]
        return [(encoder, method) for encoder, method in super().row_wise() if encoder not in whole]
