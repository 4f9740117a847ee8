"""Aligned data: columns of any kind side by side, what is missing, and what does not fit together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.errors import CounterpointError, DataError


@pytest.fixture
def split():
    pixels = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return AlignedColumns(
        {
            "image": ArrayImages(pixels),
            "text": ["zero", "one", ""],
            "sound": np.arange(12, dtype=np.float32).reshape(3, 4),
            "sensor": np.eye(3, dtype=np.float64),
        },
        labels=np.array([4, -1, 5]),
        presence={"text": np.array([True, True, False])},
        domains=np.array([0, 0, 1]),
    )


def test_columns_are_read_by_position(split):
    rows = np.array([2, 0, 2])
    assert split.column("image", rows)[:, 0, 0, 0].tolist() == [2, 0, 2]
    assert split.column("text", rows) == ["", "zero", ""]
    assert split.column("sound", rows).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert split.column("sensor", rows).dtype == np.float32
    assert split.present("text", rows).tolist() == [False, True, False]
    assert split.present("image", rows).all()
    assert len(split) == 3
    assert split.labels.tolist() == [4, -1, 5]
    assert split.domains.tolist() == [0, 0, 1]


def test_unknown_modalities_and_uneven_columns_are_refused(split):
    for read in (split.column, split.present):
        with pytest.raises(CounterpointError, match="unknown modality 'imag'; did you mean image"):
            read("imag", np.array([0]))
    with pytest.raises(DataError, match="text 2, vector 3"):
        AlignedColumns({"text": ["a", "b"], "vector": np.zeros((3, 2), np.float32)})
    with pytest.raises(DataError, match="presence of text 1"):
        AlignedColumns({"text": ["a", "b"]}, presence={"text": np.array([True])})
    with pytest.raises(DataError, match="labels"):
        AlignedColumns({"text": ["a", "b"]}, labels=np.array([1]))
    with pytest.raises(DataError, match="at least one modality"):
        AlignedColumns({})


def test_the_spec_is_json_and_says_what_a_learner_needs(split):
    kinds = {
        "image": Modality("image", size=8),
        "text": Modality("text"),
        "sound": Modality("audio", rate=8000, samples=4),
        "sensor": Modality("vector", dim=3),
    }
    spec = AlignedData("made", split, split, split, kinds, classes=("a", "b")).spec
    assert json.loads(json.dumps(spec)) == spec
    assert spec == {
        "modalities": {
            "image": {"kind": "image", "size": 8},
            "text": {"kind": "text"},
            "sound": {"kind": "audio", "rate": 8000, "samples": 4},
            "sensor": {"kind": "vector", "dim": 3},
        },
        "classes": 2,
    }
    assert list(spec["modalities"]) == list(kinds)
