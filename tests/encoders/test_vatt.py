"""VATT's heads: the spaces of each modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from counterpoint.encoders.vatt import TwoSpaces, side_by_side

NAMES = ("video", "audio", "text")


def rows(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def test_the_second_modality_reaches_the_other_space_outside_of_training_alone():
    heads = TwoSpaces(NAMES, 4)
    inputs = {name: rows(n) for n, name in enumerate(NAMES)}
    second, third = heads(inputs)
    assert list(second) == ["video", "audio"]
    assert list(third) == ["video", "text"]
    assert list(heads.eval()(inputs)[1]) == ["video", "audio", "text"]
    second, third = heads({"text": inputs["text"]})
    assert not second
    torch.testing.assert_close(third["text"], heads.third_to_third(inputs["text"]))


def test_rows_side_by_side_have_the_mean_similarity_of_shared_spaces():
    second = {name: F.normalize(rows(n), dim=1) for n, name in enumerate(NAMES[:2])}
    third = {name: F.normalize(rows(9 + n), dim=1) for n, name in enumerate(NAMES)}
    found = side_by_side(second, third)
    both = second["video"] @ second["audio"].T + third["video"] @ third["audio"].T
    torch.testing.assert_close(found["video"] @ found["audio"].T, both / 2)
    torch.testing.assert_close(found["video"] @ found["text"].T, third["video"] @ third["text"].T / 2**0.5)
