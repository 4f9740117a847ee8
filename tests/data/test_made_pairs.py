"""Sources made for claims: bits of which two determine the third, and halves of digits."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint.data import load
from counterpoint.errors import CounterpointError


def column(split, name):
    return split.column(name, np.arange(len(split)))


def test_two_determine_the_third_and_one_says_nothing():
    data = load("xor?train=4000&test=10")
    a, b, c = (column(data.train, name).astype(int) for name in "abc")
    assert (c == a ^ b).all()
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs((x[:, 0] == y[:, 0]).mean() - 0.5) < 0.04
    data = load("xor?p=0&bits=5&train=100&test=10")
    assert (column(data.train, "c") == column(data.train, "a")).all()
    assert data.modalities["b"].dim == 5
    half = load("xor?p=0.5&train=4000&test=10").train
    assert 0.5 < (column(half, "a") == column(half, "c")).all(1).mean() < 0.63  # a half, and an eighth of the rest


def test_sources_are_the_same_for_a_seed_and_others_for_another():
    for spec, name in (
        ("xor?train=50&test=20", "c"),
        ("digit-halves?labelled=100&train=50&test=20", "top"),
        ("noisy-triplets?train=50&test=20", "audio"),
        ("latent-views?train=50&test=20", "third"),
        ("clustered-pairs?train=50&test=20", "second"),
        ("digit-captions?train=50", "text"),
    ):
        one, again, other = load(spec, seed=3), load(spec, seed=3), load(spec, seed=4)
        for split in ("train", "test"):
            x, y, z = (column(getattr(data, split), name) for data in (one, again, other))
            assert np.array_equal(x, y)
            assert not np.array_equal(x, z)


def test_halves_belong_to_one_digit_and_the_tower_s_digits_are_not_among_the_pairs():
    from sklearn.datasets import load_digits

    pixels, names = load_digits(return_X_y=True)
    data = load("digit-halves")
    assert (len(data.train), len(data.valid), len(data.test)) == (1260, 140, 397)
    known = {row.tobytes(): name for row, name in zip((pixels / 16).astype(np.float32), names, strict=True)}
    for split in (data.train, data.valid, data.test):
        whole = np.concatenate([column(split, "top"), column(split, "bottom")], 1)
        assert [known[row.tobytes()] for row in whole] == split.labels.tolist()
    frozen = load("digit-halves?labelled=700&train=400&test=397")
    assert frozen.modalities["top"].dim == frozen.modalities["bottom"].dim == 32
    assert np.array_equal(column(frozen.test, "bottom"), column(data.test, "bottom"))
    assert not {r.tobytes() for r in column(frozen.test, "bottom")} & {
        r.tobytes() for r in column(frozen.train, "bottom")
    }
    (note,) = frozen.notes
    assert 80 < int(note.split("%")[0].split()[-1]) < 95
    both = load("digit-halves?whole=1&train=20&test=10")
    assert np.array_equal(column(both.train, "first"), column(both.train, "second"))


def test_a_tower_leaves_the_run_s_own_draws_alone():
    import torch

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load("digit-halves?labelled=50&train=20&test=10")
    assert torch.equal(torch.rand(3), expected)


def test_triplets_are_broken_where_their_domain_says_so_and_in_training_alone():
    data = load("noisy-triplets?train=400&test=50&misaligned=0.5")
    whole = load("noisy-triplets?train=400&test=50&misaligned=0")
    domains = data.train.domains
    assert [int((domains == n).sum()) for n in range(3)] == [200, 100, 100]
    assert not data.test.domains.any()
    for number, name in ((1, "audio"), (2, "text")):
        x, truth = column(data.train, name), column(whole.train, name)
        moved = (x != truth).any(1)
        assert np.array_equal(moved, domains == number)
        rows = {row.tobytes() for row in truth}
        assert all(row.tobytes() in rows for row in x[moved])
    assert np.array_equal(column(data.train, "video"), column(whole.train, "video"))


def test_views_share_the_hidden_numbers_that_decide_the_class():
    data = load("latent-views")
    assert (len(data.train), len(data.test), len(data.classes)) == (240, 800, 5)
    assert {m.dim for m in data.modalities.values()} == {120}
    # A linear map of one view tells something of another, and some of the class.
    first, second = (column(data.test, name) for name in ("first", "second"))
    known, asked = slice(0, 600), slice(600, 800)
    guess = first[asked] @ np.linalg.lstsq(first[known], second[known], rcond=None)[0]
    assert np.corrcoef(guess.ravel(), second[asked].ravel())[0, 1] > 0.2


def test_items_of_a_cluster_are_closer_than_others_in_both_modalities():
    data = load("clustered-pairs?train=400&test=20")
    labels = data.train.labels
    same = (labels[:, None] == labels) & ~np.eye(400, dtype=bool)
    for name in ("first", "second"):
        x = column(data.train, name)
        distance = np.linalg.norm(x[:, None] - x, axis=2)
        assert 0 < distance[same].mean() < 0.5 * distance[~same].mean()


def test_captions_name_their_digit_among_other_words():
    data = load("digit-captions")
    assert (len(data.train), len(data.test)) == (300, 359)
    for split in (data.train, data.test):
        for text, label in zip(column(split, "text"), split.labels, strict=True):
            words = text.split()
            assert len(set(words)) == 7
            assert [word for word in words if word in data.classes] == [data.classes[label]]
    assert data.train.column("image", np.arange(2)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("xor?p=1.5", "p in 0..1"),
        ("xor?bits=0", "bits in 1..16"),
        ("xor?train=0", "at least 1"),
        ("digit-halves?train=1500&test=397", "1797 digits; train 1500 \\+ test 397"),
        ("digit-halves?labelled=-1", "at least 0"),
        ("digit-halves?train=1300", "140 digits for the valid split"),
        ("digit-halves?valid=0", "valid=0 leaves a valid split that is empty"),
        ("digit-pairs?valid=0.001", "with valid=0.001 a digit has no picture"),
        ("xor?valid=0", "valid=0 leaves a valid split that is empty"),
        ("xor?valid=-2", "at least 1, or -1"),
        ("digit-halves?whole=1&labelled=10&train=20", "remove whole=1 or labelled"),
        ("noisy-triplets?misaligned=1.5", "misaligned must lie in 0..1"),
        ("noisy-triplets?train=1", "at least 2"),
        ("latent-views?test=0", "at least 2"),
        ("clustered-pairs?train=1", "at least 2"),
        ("clustered-pairs?spread=0", "spread > 0"),
        ("digit-captions?train=2000", "train must be 2 to 1295 digits, got 2000"),
    ],
)
def test_options_out_of_range_raise_an_error(spec, said):
    with pytest.raises(CounterpointError, match=said):
        load(spec)
