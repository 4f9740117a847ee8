"""Find words in pictures: compute maps with a learner that fuses image and text, and draw them for the run's page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.gradcam import attention_maps
from counterpoint.data.shown import png
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.encoders.words import tokens_of_words
from counterpoint.engine.survey import Survey
from counterpoint.views.images import normalise

DRAWN = 4  # maximum number of pairs to draw


class Grounding(NamedTuple):
    """Maps of the words of each text over the patches of its image; zeros beyond a text's words."""

    maps: Float[Tensor, "n words rows columns"]
    words: list[list[str]]


def grounding_maps(learner: Any, images: Tensor, texts: Sequence[str], layer: int | None = None) -> Grounding:
    """Map each word of a text to places in its image: Grad-CAM of ITM's logit on cross-attention (Sec. 6.4 and Appendix).

    Multiply attention with the positive part of its gradient. A map is the mean over the heads and over a word's tokens.

    Args:
        learner: a `tasks.fused.FusedLearner` that scores pairs; its mode and gradients stay unchanged.
        images: [n, 3, size, size], uint8 or already normalised.
        texts: n texts, one per image.
        layer: number of the fusion layer, from 0. None: the third, as in the paper, or with fewer layers the last but one.
            The last layer is excluded: the logit depends on its first token alone, not on the attention of words there.

    Maps are not negative, in units of the logit. Raises ValueError for a learner without ITM and for numbers of images and
    texts that differ. Raises it too for a missing or the last layer, and for a text without words.

    >>> grounding_maps(learner, images, ["a dog on the grass"]).maps.shape   # doctest: +SKIP
    torch.Size([1, 5, 16, 16])
    """
    if not learner.config.scores_pairs or learner.tokenizer is None:
        raise ValueError("learner has no ITM head, whose logit the maps explain; train with use_itm")
    if len(images) != len(texts) or not len(texts):
        raise ValueError(f"texts must be one for each image, got {len(texts)} for {len(images)}")
    last = learner.config.fusion_layers - 1
    if last == 0:
        raise ValueError("learner has one fusion layer, in which only the first token's attention reaches the logit")
    layer = min(2, last - 1) if layer is None else layer
    if not 0 <= layer < last:
        raise ValueError(f"layer must lie in 0..{last - 1}, before the last, got {layer}")
    ids, mask, owners, words = tokens_of_words(learner.tokenizer, texts, learner.config.context)
    ids, mask, owners = (x.to(learner.device) for x in (ids, mask, owners))
    encoder = cast(VisionTokens, learner.encoders[learner.image])
    networks, training = learner.networks(), learner.training
    learner.eval()
    try:
        with torch.enable_grad():
            pixels = normalise(images) if images.dtype == torch.uint8 else images
            with torch.no_grad():
                v = learner.see(networks, learner.image, pixels.to(learner.device), fused=True).tokens
                w = learner.see(networks, learner.text, (ids, mask), fused=True).tokens
            assert v is not None
            assert w is not None
            kept: list[Tensor] = []
            # Attention needs a gradient even if weights are frozen. Networks before the fusion encoder need none.
            states = learner.fusion(w.requires_grad_(), mask, v, kept)
            logit = learner.itm_head(states[:, 0])[:, 1].sum()
            (gradient,) = torch.autograd.grad(logit, kept[layer])
    finally:
        learner.train(training)
    rows, columns = pixels.shape[2] // encoder.patch, pixels.shape[3] // encoder.patch
    maps = attention_maps(kept[layer], gradient, owners)[..., encoder.prefix :]
    return Grounding(maps.unflatten(2, (rows, columns)), words)


def maps_of_words(
    survey: Survey, image: str, text: str, ground: Callable[[Tensor, str], tuple[list[str], Tensor]]
) -> list[dict[str, Any]]:
    """Draw test pictures with a map for each word of their texts: rows of a figure of the kind "maps".

    Args:
        survey: source of the pairs, which have both modalities and are spread evenly over the test split.
        image, text: names of the two modalities.
        ground: maps an image [1, 3, size, size] of uint8 and its text to the words and their maps [words, rows, columns].
    """
    split, rows = survey.split("test"), []
    at = np.linspace(0, len(split) - 1, min(len(split), 4 * DRAWN)).astype(np.int64)
    texts = [str(words) for words in split.column(text, at)]
    shown = split.present(image, at) & np.array([bool(words.strip()) for words in texts])
    shown &= split.present(text, at)
    for n in np.flatnonzero(shown)[:DRAWN]:
        pixels = np.asarray(split.column(image, at[n : n + 1]))
        words, maps = ground(torch.from_numpy(pixels).permute(0, 3, 1, 2), texts[n])
        drawn = [
            {"text": word, "map": [[round(float(x), 6) for x in line] for line in found]}
            for word, found in zip(words, maps, strict=True)
        ]
        rows.append({"png": png(pixels[0]), "maps": drawn})
    return rows
