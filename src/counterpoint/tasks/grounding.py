"""Words found in pictures: maps of a learner that fuses image and text, and what the run's page shows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.gradcam import attention_maps
from counterpoint.data.shown import png
from counterpoint.encoders.images import VisionTokens
from counterpoint.encoders.words import tokens_of_words
from counterpoint.engine.survey import Survey
from counterpoint.views.images import normalise

DRAWN = 4  # pairs that are drawn, at most


class Grounding(NamedTuple):
    """Maps of the words of each text over the patches of its image; zeros beyond a text's words."""

    maps: Float[Tensor, "n words rows columns"]
    words: list[list[str]]


def grounding_maps(learner: Any, images: Tensor, texts: Sequence[str], layer: int | None = None) -> Grounding:
    """Where in an image each word of its text is found: Grad-CAM of ITM's logit on cross-attention (Sec. 6.4 and Appendix).

    A map is the mean over heads of attention times the positive part of its gradient, and over the tokens of a word.

    Args:
        learner: a `tasks.fused.FusedLearner` that scores pairs; its mode and gradients are left as they are.
        images: [n, 3, size, size], uint8 or normalised already.
        texts: a text for each image.
        layer: which fusion layer, from 0; default: the third, the paper's, or the last but one if there are fewer. Not the
            last: the logit is read off the first token, so what words attend to there does not reach it.

    Maps are not negative, in units of the logit. Raises ValueError for a learner without ITM, numbers that differ, a
    layer that is not there or the last, and a text without words.

    >>> grounding_maps(learner, images, ["a dog on the grass"]).maps.shape   # doctest: +SKIP
    torch.Size([1, 5, 16, 16])
    """
    if not learner.config.scores_pairs or learner.tokenizer is None:
        raise ValueError("learner has no ITM, whose logit the maps explain")
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
            # Nothing before the fusion encoder needs a gradient; attention does, whether or not weights are frozen.
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
        survey: where the pairs come from; they are spread evenly over the test split, and have both sides.
        image, text: names of the two modalities.
        ground: (image [1, 3, size, size] of uint8, its text) -> the words, and their maps [words, rows, columns].
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
