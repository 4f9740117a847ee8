"""Pairs of items: captions that are drawn, retrieval by all pairs, scorers and the layers that they take over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterpoint.data.pairs import AlignedColumns
from counterpoint.encoders.pair_scorers import build_scorer, copy_layers
from counterpoint.errors import CounterpointError
from counterpoint.tasks.pair_scorers import Captions, Side, alike, joined, scored_retrieval


def captions(pictures: list[int], words: list[int]) -> Captions:
    return Captions(np.stack([pictures, words], 1), np.arange(len(words)))


def test_captions_of_the_same_picture_or_words_are_never_drawn_and_none_twice() -> None:
    found = captions([0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 3, 4, 5, 6])
    rows = np.array([0, 3, 5])
    for seed in range(50):
        drawn = found.draw(rows, 6, np.random.default_rng(seed))
        assert (drawn[:, 0] == rows).all()
        assert all(len(set(row)) == 6 for row in drawn.tolist())
        assert not {1, 3} & set(drawn[0, 1:].tolist())
        assert 0 not in drawn[1, 1:]


def test_every_allowed_caption_is_equally_likely() -> None:
    found = captions(list(range(12)), list(range(12)))
    generator = np.random.default_rng(0)
    drawn = np.concatenate([found.draw(np.full(100, 4), 4, generator)[:, 1:].ravel() for _ in range(30)])
    counts = np.bincount(drawn, minlength=12)
    assert counts[4] == 0
    expected = len(drawn) / 11
    assert np.abs(np.delete(counts, 4) - expected).max() < 5 * np.sqrt(expected)


def test_processes_draw_the_captions_of_one_process() -> None:
    found, rows = captions(list(range(20)), list(range(20))), np.arange(7)
    whole = found.draw(rows, 5, np.random.default_rng(3), (7, slice(None)))
    for rank in range(2):
        share = slice(rank, None, 2)
        assert np.array_equal(found.draw(rows[share], 5, np.random.default_rng(3), (7, share)), whole[share])


def test_a_set_of_one_picture_is_refused() -> None:
    with pytest.raises(CounterpointError, match="no caption of another picture"):
        captions([0, 0, 0], [0, 1, 2])


def test_equal_words_and_known_pictures_get_equal_numbers() -> None:
    split = AlignedColumns(
        {"a": np.eye(4, 3, dtype=np.float32), "b": ["x", "y", "x", ""]}, same={"a": np.array([7, 7, 8, -1])}
    )
    found = alike(split, "a", "b", {"a": "vector", "b": "text"})
    assert found[0, 0] == found[1, 0] != found[2, 0]
    assert found[0, 1] == found[2, 1] != found[1, 1]


def test_recalls_are_those_of_the_ranks_of_each_row_and_column() -> None:
    scores = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.5, 4.0]])
    found = scored_retrieval("image", "text", scores, torch.arange(3)[:, None])
    assert found["image_to_text_r1"] == pytest.approx(2 / 3)
    assert found["text_to_image_r1"] == 1
    assert found["mean_r1"] == pytest.approx(5 / 6)


def test_another_caption_of_the_same_picture_is_right_and_ties_find_nothing() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    groups = torch.tensor([[0, 0], [0, 1], [1, 2]])
    assert scored_retrieval("a", "b", scores, groups)["a_to_b_r1"] == 1
    assert scored_retrieval("a", "b", torch.zeros(3, 3), torch.arange(3)[:, None])["a_to_b_r1"] == 0


@pytest.mark.parametrize("fusion", ["coattention", "mlp"])
def test_the_score_of_a_pair_depends_on_both_items_and_not_on_padding(fusion: str) -> None:
    torch.manual_seed(0)
    scorer = build_scorer(fusion, 8, 2, 2).double()
    image, text = torch.randn(3, 4, 8).double(), torch.randn(3, 5, 8).double()
    mask = torch.arange(5).expand(3, -1) < 3
    found = scorer(image, text, None, mask)
    assert not torch.allclose(found, scorer(image.flip(0), text, None, mask))
    assert not torch.allclose(found, scorer(image, text.flip(0), None, mask))
    changed = text.clone()
    changed[:, 3:] = 9
    torch.testing.assert_close(scorer(image, changed, None, mask), found)


@pytest.mark.parametrize("fusion", ["coattention", "mlp"])
def test_copied_layers_are_the_teachers_in_their_own_storage(fusion: str) -> None:
    teacher, student = build_scorer(fusion, 8, 3, 2), build_scorer(fusion, 8, 2, 2)
    copy_layers(student, teacher, (2, 0))
    state = teacher.state_dict()
    for name, value in student.state_dict().items():
        source = (
            name.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.2.")
        )
        assert torch.equal(value, state[source])
        assert value.data_ptr() != state[source].data_ptr()
    assert len(teacher.layers) == 3
    with pytest.raises(CounterpointError, match="must name 2 layers of the teacher, which has the layers 0 to 2"):
        copy_layers(student, teacher, (0, 3))
    with pytest.raises(CounterpointError, match="differs from the student's"):
        copy_layers(build_scorer(fusion, 16, 2, 2), teacher, (0, 1))


def test_sides_of_several_lengths_are_padded() -> None:
    parts = [Side(torch.ones(1, n, 2), torch.ones(1, n, dtype=torch.bool)) for n in (2, 3)]
    found = joined(parts)
    assert found.states.shape == (2, 3, 2)
    assert found.mask is not None
    assert found.mask.sum(1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("given", "message"), [(("sum", 8, 1), "fusion"), (("mlp", 8, 0), "layers"), (("coattention", 9, 1, 2), "heads")]
)
def test_scorers_that_do_not_exist_are_refused(given: tuple, message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        build_scorer(*given)
