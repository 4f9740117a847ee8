"""Items of one modality, drawn with or without their partners, and the modalities that a method needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned import need_finite, one_each
from counterpoint.tasks.aligned.unpaired import pool


def split(n: int, presence: dict[str, Any] | None = None) -> AlignedColumns:
    pictures = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((n, 4, 5, 3), np.uint8)
    columns = {"picture": ArrayImages(pictures), "vector": np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)}
    return AlignedColumns(columns, presence=presence)


def survey(train: Any, unpaired: Any = None) -> Any:
    return SimpleNamespace(split=lambda name: {"train": train, "unpaired": unpaired}[name])


def test_a_pool_has_the_unpaired_items_of_its_modality():
    there = np.arange(6) % 2 == 0
    unpaired = split(6, {"picture": there, "vector": np.zeros(6, bool)})
    found = pool(survey(split(4), unpaired), "picture")
    assert found.split is unpaired
    assert found.rows.tolist() == [0, 2, 4]
    values = found.values(np.array([4, 2]))
    assert values.shape == (2, 3, 4, 5)
    assert values[:, 0, 0, 0].tolist() == [4, 2]


def test_a_pool_without_unpaired_items_has_those_of_the_training_split():
    train = split(4)
    for unpaired in (None, split(3, {"picture": np.ones(3, bool), "vector": np.zeros(3, bool)})):
        found = pool(survey(train, unpaired), "vector")
        assert found.split is train
        assert found.values(found.rows[1:2]).tolist() == [[2, 3]]
    with pytest.raises(DataError, match="has 1 item of vector to pre-train on"):
        pool(survey(split(4, {"picture": np.ones(4, bool), "vector": np.arange(4) == 2})), "vector")


def test_draws_are_different_items_and_repeatable():
    found = pool(survey(split(9)), "vector")
    draws = [found.draw(5, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    assert sorted(found.draw(99, torch.Generator())) == list(range(9))


def test_a_method_gets_its_modalities_by_kind():
    modalities = {"tone": {"kind": "audio"}, "page": {"kind": "image"}}
    assert one_each(modalities, "m", "image", "audio") == ["page", "tone"]
    for other in ({"page": {"kind": "image"}}, {"a": {"kind": "image"}, "b": {"kind": "image"}}):
        with pytest.raises(
            CounterpointError, match=r"m aligns one image and one audio modality, the data has \w+ \(image\)"
        ):
            one_each(other, "m", "image", "audio")


def test_embeddings_that_are_not_finite_raise_an_error():
    need_finite(torch.ones(2, 3), "page")
    with pytest.raises(CounterpointError, match="embeddings of page hold NaN or infinite"):
        need_finite(torch.tensor([[1.0, torch.inf]]), "page")
