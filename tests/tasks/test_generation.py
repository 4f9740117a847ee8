"""The form `generation`: judges and their measures, partners of a class, pictures and captions of aligned data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint import data as sources
from counterpoint.data.generation import GenerationSplit, of_aligned
from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.encoders.text import train_words
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.branches import Partners, joined
from counterpoint.tasks.measures import generation as measures
from counterpoint.tasks.measures.generation import frechet_distance, judged, r_precision, trained_judge


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_of_normal_distributions_has_its_closed_form():
    from scipy.linalg import sqrtm

    a, b = draw(0, 40, 5), draw(1, 50, 5) @ draw(2, 5, 5) + 1
    one, other = a.T.cov().numpy(), b.T.cov().numpy()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + np.trace(one + other - 2 * np.real(sqrtm(one @ other)))
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)
    assert frechet_distance(a[:3], a[:3] + 2) == pytest.approx(20, abs=1e-6)  # fewer rows than columns
    with pytest.raises(ValueError, match="fake must hold at least two finite rows"):
        frechet_distance(a, a[:1])


def test_r_precision_counts_ties_as_wrong_and_equal_captions_never_compete():
    rows = torch.eye(4)
    texts = ["a", "b", "c", "d"]
    assert r_precision(rows, rows, texts) == 1.0
    assert r_precision(torch.ones(4, 4), rows, texts) == 0.0
    assert r_precision(rows[[0, 0]], rows[[0, 0]], ["a", "a"]) == 1.0
    assert r_precision(rows, rows.roll(1, 0), texts, candidates=2) < 1


def test_a_judge_depends_on_the_set_alone_and_learns_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    data = sources.load("styled-shapes?label=colour&drop=0&train=96&test=40&valid=40", task="generation")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    judge = trained_judge(data.train, len(data.classes))
    assert torch.equal(torch.random.get_rng_state(), before)
    real = torch.from_numpy(data.test.images(np.arange(40))).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.test.labels)
    found = judged(judge, real, real, data.test.captions, labels)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["class_accuracy"] > 0.5
    assert judged(judge, real, real.roll(1, 0), data.test.captions, labels)["class_accuracy"] < found["class_accuracy"]
    monkeypatch.setattr(measures, "_train", lambda *_: pytest.fail("trained again"))
    again = trained_judge(data.train, len(data.classes))
    assert judged(again, real, real, data.test.captions, labels) == found


def test_a_judge_without_classes_measures_distance_and_match(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    pictures = ArrayImages(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8))
    split = GenerationSplit(pictures, [f"picture {n}" for n in range(12)])
    real = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2)
    found = judged(trained_judge(split, 0), real, real, split.captions, torch.from_numpy(split.labels))
    assert found.keys() == {"frechet_distance", "r_precision"}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.integers(0, 100))
def test_a_partner_is_another_item_of_the_kind_or_the_item_itself(kinds, seed):
    numbers, rows = torch.tensor(kinds), torch.arange(len(kinds))
    drawn = torch.rand(len(kinds), generator=torch.Generator().manual_seed(seed))
    partners = Partners(numbers)
    found = partners.of(rows, drawn)
    for row, partner in enumerate(found.tolist()):
        alone = kinds[row] < 0 or kinds.count(kinds[row]) == 1
        assert kinds[partner] == kinds[row]
        assert (partner == row) == alone
    assert partners.single == sum(kinds.count(kind) == 1 for kind in set(kinds) if kind >= 0)


def test_every_other_item_of_a_kind_is_drawn_equally_often():
    partners = Partners(torch.tensor([0, 0, 1, 0, 0]))
    drawn = (torch.arange(300) + 0.5) / 300
    found = partners.of(torch.ones(300, dtype=torch.int64), drawn)
    assert found.bincount(minlength=5).tolist() == [100, 0, 0, 100, 100]


def test_joined_batches_have_words_of_one_length():
    one = {"ids": torch.ones(2, 3), "label": torch.zeros(2)}
    other = {"ids": torch.ones(2, 5), "label": torch.ones(2)}
    found = joined(one, other, "ids", "label")
    assert found["ids"].shape == (4, 5)
    assert torch.equal(found["ids"][:2], F.pad(torch.ones(2, 3), (0, 2)))
    assert found["label"].tolist() == [0, 0, 1, 1]


def test_words_are_whole_lower_case_and_known_or_unknown():
    tokenizer = train_words(["A red fox, running.", "a blue fox"], 6)
    assert tokenizer.vocabulary == 6  # padding, unknown, a, fox and two more
    ids, mask = tokenizer.encode(["a FOX!", "Fox"], 5)
    assert mask.tolist() == [[True, True], [True, False]]
    assert ids[0, 1] == ids[1, 0]
    with pytest.raises(CounterpointError, match="no captions"):
        train_words([" "])
    with pytest.raises(CounterpointError, match="at least 3 tokens"):
        train_words(["a"], 2)


def aligned(captions: list[str], present: list[bool]) -> AlignedData:
    pictures = ArrayImages(np.zeros((len(captions), 8, 8, 3), np.uint8))
    split = AlignedColumns(
        {"image": pictures, "text": captions}, np.arange(len(captions)) - 1, {"image": np.array(present)}
    )
    kinds = {"image": Modality("image", size=8), "text": Modality("text")}
    return AlignedData("mine", split, split, split, kinds, classes=("a", "b", "c"))


def test_rows_without_a_picture_or_a_caption_are_left_out_and_counted():
    data = of_aligned(aligned(["one", "", "three", "four"], [True, True, True, False]))
    assert data.train.captions == ["one", "three"]
    assert data.train.labels.tolist() == [-1, 1]
    assert data.notes[:2] == [
        "mine: 2 train rows lack a picture or a caption and are left out",
        "mine: 2 valid rows lack a picture or a caption and are left out",
    ]
    said = "mine: 1 of 2 train captions have no known class, the first is number 0, 'one'; each counts as a class of its own"
    assert said in data.notes
    with pytest.raises(DataError, match="no train row has a picture and a caption"):
        of_aligned(aligned(["", ""], [True, True]))


def test_captions_that_do_not_fit_their_pictures_are_refused():
    pictures = ArrayImages(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="2 pictures have 1 caption;"):
        GenerationSplit(pictures, ["one"])
    with pytest.raises(DataError, match="1 caption is empty, the first is number 1"):
        GenerationSplit(pictures, ["one", " "])
