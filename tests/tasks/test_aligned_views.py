"""Weak and strong views of aligned items: each process makes the views of its share of the whole batch."""

from __future__ import annotations

import pytest
import torch

from counterpoint.encoders.text import train_bpe
from counterpoint.tasks.aligned.views import image_views, text_views, vector_views
from counterpoint.views.images import Handled, Recipe, normalise

TOTAL, STRONG = 8, 2
SHARES = [slice(0, None, 2), slice(1, None, 2)]
WORDS = [f"a red arrow on the wall of house {n} and one more" for n in range(TOTAL)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    "recipes", [Handled(), (Recipe(scale=(0.8, 1.0), flip=0.0), Recipe(jitter=0.8, grey=0.2, blur=0.5))]
)
def test_images_have_the_views_of_the_whole_batch(recipes):
    images = torch.randint(0, 256, (TOTAL, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    whole = image_views(images, STRONG, recipes, TOTAL, slice(None), generator())
    assert len(whole) == 1 + STRONG
    assert torch.equal(whole[0], normalise(images)) == isinstance(recipes, Handled)
    assert not torch.equal(whole[1], whole[2])
    for share in SHARES:
        part = image_views(images[share], STRONG, recipes, TOTAL, share, generator())
        torch.testing.assert_close(part, [view[share] for view in whole])


def test_texts_have_the_views_of_the_whole_batch():
    tokenizer = train_bpe(WORDS, 400)

    def views(share: slice) -> list[list[str]]:
        made = text_views(tokenizer.encode(WORDS[share], 32), STRONG, tokenizer, 32, TOTAL, share, generator())
        return [[tokenizer.decode(ids[m].tolist()) for ids, m in zip(*view, strict=True)] for view in made]

    whole = views(slice(None))
    assert len(whole) == 1 + STRONG
    assert whole[1] != whole[2]
    for share in SHARES:
        assert views(share) == [view[share] for view in whole]


def test_vectors_have_noise_in_strong_views_alone():
    x = torch.randn(TOTAL, 4, generator=generator())
    whole = vector_views(x, STRONG, 0.5, TOTAL, slice(None), generator())
    assert whole[0] is x
    assert all(0.2 < float((view - x).std()) < 0.8 for view in whole[1:])
    assert not torch.equal(whole[1], whole[2])
    for share in SHARES:
        torch.testing.assert_close(
            vector_views(x[share], STRONG, 0.5, TOTAL, share, generator()), [view[share] for view in whole]
        )
