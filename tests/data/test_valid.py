"""Every source has three splits: nothing of one stands in another, and the test split does not depend on the valid one."""

from __future__ import annotations

import csv
import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from counterpoint import data
from counterpoint.data.bags import Bag
from counterpoint.data.images import ArrayImages, ImageData, split_positions
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import by_content, carve, checked_count, checked_share
from counterpoint.data.xd_violence import _film
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned import AlignedConfig, AlignedTask
from counterpoint.tasks.bags import BagsConfig, BagsTask
from counterpoint.tasks.labelled import LabelledConfig, LabelledTask
from counterpoint.tasks.views import ViewsConfig, ViewsTask

GENERATED = ["async-bags?train=40&test=20", "clusters", "noisy-triplets?train=200&test=50", "latent-views?test=90"]
FINITE = [
    "digits?size=8",
    "digit-patterns",
    "digit-captions",
    "digit-pairs",
    "digit-halves",
    "digit-halves?labelled=500",
]


def items(split) -> list[bytes]:
    """Compute a digest of each item of a split, without labels."""
    rows = np.arange(len(split))
    if isinstance(split, AlignedColumns):
        columns = [split.column(name, rows) for name in split.columns]
        parts = [[c[n].encode() if isinstance(c, list) else c[n].tobytes() for c in columns] for n in rows]
    elif hasattr(split, "images"):
        parts = [[image.tobytes()] for image in split.images(rows)]
    else:
        parts = [[np.asarray(video.visual).tobytes(), video.audio.tobytes()] for video in split]
    return [hashlib.blake2b(b"|".join(part), digest_size=16).digest() for part in parts]


@pytest.mark.parametrize("spec", GENERATED + FINITE)
def test_no_item_stands_in_two_splits(spec):
    found = data.load(spec)
    train, valid, test = (set(items(split)) for split in (found.train, found.valid, found.test))
    assert valid
    assert len(train | valid | test) == len(train) + len(valid) + len(test)


@pytest.mark.parametrize("spec", GENERATED)
def test_generated_sources_draw_valid_items_in_addition(spec):
    found = data.load(spec)
    more = data.load(spec, valid=7)
    for split in ("train", "test"):
        assert items(getattr(more, split)) == items(getattr(found, split))
    assert len(found.valid) == len(found.test)
    assert len(more.valid) == (7 * 12 if spec == "clusters" else 7)


@pytest.mark.parametrize("spec", FINITE)
def test_the_test_split_of_finite_sources_does_not_depend_on_the_valid_one(spec):
    found, more = data.load(spec), data.load(spec, valid=0.3)
    assert items(more.test) == items(found.test)
    assert len(more.valid) >= len(found.valid)
    if "pairs" not in spec and "captions" not in spec and "labelled" not in spec:
        # Both sets read the same items, whatever is cut off.
        assert len(more.valid) > 2 * len(found.valid)
        both = [Counter(items(one.train) + items(one.valid)) for one in (found, more)]
        assert both[0] == both[1]


def test_digits_of_every_class_are_in_the_valid_split_in_proportion():
    found = data.load("digits?size=8")
    counts = np.bincount(found.valid.labels) / (np.bincount(found.valid.labels) + np.bincount(found.train.labels))
    assert counts.min() > 0.08
    assert counts.max() < 0.12


def test_digit_pairs_are_made_of_digits_of_one_split():
    found = data.load("digit-pairs?vectors=1")
    halves = {}
    for name in ("train", "valid", "test"):
        pixels = getattr(found, name).column("image", np.arange(len(getattr(found, name)))).reshape(-1, 8, 2, 8)
        halves[name] = pixels.transpose(0, 2, 1, 3).reshape(-1, 64)
    # The nearest digit without noise: the noise is far smaller than what tells digits apart.
    from sklearn.datasets import load_digits

    digits = (load_digits().data / 16).astype(np.float32)
    length = (digits**2).sum(1)
    named = {name: set((length - 2 * rows @ digits.T).argmin(1).tolist()) for name, rows in halves.items()}
    # The nearest one is another digit now and then.
    assert len(named["train"] & named["valid"]) < 0.1 * len(named["valid"])
    assert len(named["test"] & named["valid"]) < 0.1 * len(named["valid"])


def test_splits_are_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np; from counterpoint import data; d = data.load('digits?size=8')\n"
        "print(hashlib.sha256(d.valid.images(np.arange(len(d.valid))).tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    valid = data.load("digits?size=8").valid
    assert out == hashlib.sha256(valid.images(np.arange(len(valid))).tobytes()).hexdigest()


@pytest.mark.parametrize(
    "name", ["digits", "digit-patterns", "digit-captions", "digit-pairs", "digit-halves", "cifar10"]
)
@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_is_none_is_refused_by_name(name, share):
    with pytest.raises(CounterpointError, match=rf"{name}: valid=.*\?valid=0.1"):
        data.load(name, valid=share)


def test_counts_and_shares_are_checked():
    assert checked_count("x", -1, 30) == 30
    assert checked_count("x", 3, 30) == 3
    with pytest.raises(CounterpointError, match="valid=0 leaves a valid split that is empty"):
        checked_count("x", 0, 30)
    with pytest.raises(CounterpointError, match="valid=0 leaves a valid split that is empty"):
        checked_share("x", 0.0)
    with pytest.raises(CounterpointError, match=r"valid split would be empty: 1 training item "):
        carve("x", np.arange(1), 0.1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_carving_partitions_and_never_separates(drawn):
    count = drawn.draw(st.integers(2, 60))
    together = np.array(drawn.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))
    labels = np.array(drawn.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    share = drawn.draw(st.floats(0.05, 0.6))
    rows = np.arange(count) * 3 + 1
    if len(set(together.tolist())) == 1:
        with pytest.raises(CounterpointError, match="valid split would be empty"):
            carve("x", rows, share, labels, together)
        return
    train, valid = carve("x", rows, share, labels, together)
    assert sorted([*train, *valid]) == rows.tolist()
    assert len(train)
    assert len(valid)
    of = dict(zip(rows.tolist(), together.tolist(), strict=True))
    assert not {of[n] for n in train.tolist()} & {of[n] for n in valid.tolist()}
    again = carve("x", rows, share, labels, together)
    assert np.array_equal(train, again[0])
    assert np.array_equal(valid, again[1])


def test_contents_are_numbered_in_their_order():
    assert by_content(np.array([[1, 2], [3, 4], [1, 2]])).tolist() == [0, 1, 0]


# --- the user's own data ----------------------------------------------------------------------------------------------


def table(path, rows):
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, ["image", "caption", "label", "split"], restval="")
        out.writeheader()
        out.writerows(rows)
    return path


def picture(path, number):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for n in range(40):
        picture(root / f"{n}.png", n)
    return root


def captions(split):
    return split.column("text", np.arange(len(split)))


def opened(path, **options):
    return data.load(f"csv:{path}", task="aligned", size=9, **options)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_own_items_that_share_anything_stay_in_one_split(pictures, drawn):
    count = drawn.draw(st.integers(12, 40))
    which = drawn.draw(st.lists(st.integers(0, 25), min_size=count, max_size=count))
    words = drawn.draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    rows = [{"image": f"{i}.png", "caption": f"word {w}", "label": i % 2} for i, w in zip(which, words, strict=True)]
    found = opened(table(pictures / "m.csv", rows))
    splits = [found.train, found.valid, found.test]
    assert sum(map(len, splits)) == count == sum(found.accounts.counts("rows")[1:])
    assert not found.accounts.missing()
    parts = [set(split.rows.tolist()) for split in splits]
    assert len(set.union(*parts)) == count
    if any("separates items" in note for note in found.notes):  # all items are linked, which a note reports
        return
    for cells in (which, words):
        shared = [{cells[n] for n in part} for part in parts]
        assert len(set.union(*shared)) == sum(map(len, shared))
    again = opened(pictures / "m.csv")
    assert [captions(one) for one in (again.train, again.valid, again.test)] == [captions(one) for one in splits]


def numbered(count, **more):
    return [{"image": f"{n}.png", "caption": f"word {n}"} | {k: v(n) for k, v in more.items()} for n in range(count)]


@pytest.mark.parametrize("word", ["valid", "val", "validation", "dev", "Val"])
def test_a_split_column_names_the_valid_rows(pictures, word):
    rows = numbered(20, split=lambda n: "test" if n < 4 else word if n < 7 else "train")
    found = opened(table(pictures / "named.csv", rows))
    assert (captions(found.test), captions(found.valid)) == (
        [f"word {n}" for n in range(4)],
        [f"word {n}" for n in range(4, 7)],
    )
    assert len(found.train) == 13
    assert found.accounts.counts("rows") == (20, 20, 0)
    assert not any("valid split is made here" in note for note in found.notes)


def test_without_named_valid_rows_a_tenth_of_training_is_set_apart_with_a_note(pictures):
    rows = numbered(34, split=lambda n: "test" if n < 4 else "train")
    found = opened(table(pictures / "two.csv", rows))
    assert captions(found.test) == [f"word {n}" for n in range(4)]
    assert (len(found.train), len(found.valid)) == (27, 3)
    assert any("the valid split is made here, 3 of 30 training items" in note for note in found.notes)
    more = opened(pictures / "two.csv", valid="0.5")
    assert (len(more.train), len(more.valid), captions(more.test)) == (15, 15, captions(found.test))


def test_the_test_split_is_what_it_was_before_there_was_a_valid_one(pictures):
    place = table(pictures / "none.csv", numbered(40, label=lambda n: n % 2))
    _, test = split_positions(40, 0.2, np.arange(40) % 2)
    expected = [f"word {n}" for n in test]
    for valid in ("", "0.3"):
        assert captions(opened(place, valid=valid).test) == expected


def test_validation_rows_without_test_rows_are_tested_on_and_another_valid_split_is_made(pictures):
    place = table(pictures / "val.csv", numbered(30, split=lambda n: "val" if n < 6 else "train"))
    found = opened(place)
    assert captions(found.test) == [f"word {n}" for n in range(6)]
    assert (len(found.train), len(found.valid)) == (22, 2)
    assert any("there is no split 'test', so the split 'validation' is tested on" in note for note in found.notes)
    turned = opened(place, valid="val")
    assert captions(turned.valid) == [f"word {n}" for n in range(6)]
    assert len(turned.test) == 5  # a fifth of the others
    with pytest.raises(CounterpointError, match="'validation' cannot be both tested on and watched"):
        opened(place, valid="val", test="val")


def test_an_empty_valid_split_is_refused_with_what_mends_it(pictures):
    place = table(
        pictures / "named.csv", numbered(20, split=lambda n: "test" if n < 4 else "dev" if n < 6 else "train")
    )
    for valid, said in (
        ("0", r"valid=0 leaves a valid split that is empty; .*\?valid=0.1"),
        ("1.5", "between 0 and 1"),
        ("nan", "between 0 and 1"),
        ("0.001", r"valid split would be empty: 0.001 of 14 .*ask for a larger share"),
        ("train", "would leave nothing to train on"),
        ("nope", "has no split 'nope'; it has test, validation, train"),
    ):
        with pytest.raises(CounterpointError, match=said):
            opened(place, valid=valid)


def test_items_that_given_splits_share_draw_a_note(pictures):
    rows = numbered(20, split=lambda n: "test" if n < 4 else "dev" if n < 6 else "train")
    rows[4]["image"], rows[5]["image"] = rows[0]["image"], rows[9]["image"]
    said = "\n".join(opened(table(pictures / "shared.csv", rows)).notes)
    assert "of 4 test items 1 the image is that of a valid item too" in said
    assert "of 2 valid items 1 the image is that of a training item too" in said


def test_too_few_items_are_embedded_but_not_trained_on(pictures):
    rows = numbered(3, split=lambda n: "test" if n else "train")
    found = opened(table(pictures / "few.csv", rows))
    assert (len(found.train), len(found.valid), len(found.test)) == (1, 0, 2)
    assert any("too few to set a valid split apart" in note for note in found.notes)
    task = AlignedTask(found, AlignedConfig(batch_size=2, image_encoder="conv-s", text_encoder="text-s"))
    with pytest.raises(DataError, match=r"at least 2 items in its valid split.*is empty.*\?valid=0.2"):
        task.check_training()


@pytest.mark.parametrize("name", ["valid", "val", "validation", "dev"])
def test_folders_of_pictures_name_the_valid_split(tmp_path, name):
    number = itertools.count()
    for split, count in (("train", 4), (name, 2), ("test", 3)):
        for label in "ab":
            for n in range(count):
                picture(tmp_path / split / label / f"{n}.png", next(number))
    found = data.load(f"imagefolder:{tmp_path}?size=9")
    assert (len(found.train), len(found.valid), len(found.test)) == (8, 4, 6)
    assert found.accounts.counts("pictures") == (18, 18, 0)
    assert np.bincount(found.valid.labels).tolist() == [2, 2]


# --- groups -----------------------------------------------------------------------------------------------------------


def test_parts_of_one_film_stay_in_one_split(xd_tree):
    found = data.load(f"xd-violence:{xd_tree.root}")
    films = [{_film(video.name) for video in split} for split in (found.train, found.valid)]
    assert films[1]
    assert not films[0] & films[1]
    for video in found.valid:
        assert video.truth.shape == (16 * len(video.audio),)
        assert set(video.truth.tolist()) == {video.label}
    with pytest.raises(CounterpointError, match="xd-violence: valid=0 leaves a valid split that is empty"):
        data.load(f"xd-violence:{xd_tree.root}?valid=0")


# --- tasks ------------------------------------------------------------------------------------------------------------


def shades(count, start=0):
    pixels = (np.arange(count, dtype=np.uint8) + start)[:, None, None, None]
    return ArrayImages(np.tile(pixels, (1, 8, 8, 3)), np.arange(count) % 2)


def test_pictures_are_evaluated_on_the_split_that_is_named():
    made = ImageData("shades", shades(20), shades(6, 50), shades(9, 100), ("even", "odd"), 8)
    for task in (
        ViewsTask(made, ViewsConfig(batch_size=4, encoder="mlp-s", bank=12)),
        LabelledTask(made, LabelledConfig(batch_size=4, encoder="mlp-s")),
    ):
        for name, count in (("valid", 6), ("test", 9)):
            assert task.split(name) is getattr(made, name)
            batches = list(task.evaluation_loader(name))
            (asked,) = (batch for batch in batches if batch["part"] == "test")
            assert asked["index"].tolist() == list(range(count))
            alone = task.evaluation_batch(name, [1, 3])
            assert np.array_equal(alone["image"], asked["image"][[1, 3]])
            assert np.array_equal(task.evaluation_batch(made.valid, np.array([2]))["index"], [2])
        banks = [batch["index"] for batch in batches if batch["part"] == "bank"]
        assert all(len(bank) == 12 and bank.max() < 20 for bank in banks)
        with pytest.raises(CounterpointError, match="unknown split 'tests'"):
            task.split("tests")


def test_aligned_items_are_evaluated_on_the_split_that_is_named():
    def split(count):
        rows = np.random.default_rng(count).random((count, 3), np.float32)
        return AlignedColumns({"a": rows, "b": rows})

    kinds = {name: Modality("vector", dim=3) for name in "ab"}
    made = AlignedData("made", split(20), split(6), split(9), kinds, shifts={"far": split(5)}, unpaired=split(4))
    task = AlignedTask(made, AlignedConfig(batch_size=4))
    sizes = {
        name: [(batch["split"], len(batch["index"])) for batch in task.evaluation_loader(name)]
        for name in ("valid", "test")
    }
    assert sizes == {"valid": [("", 6)], "test": [("", 9), ("far_", 5)]}
    assert set(task.evaluator("valid").seen) == {""}
    assert task.evaluator("valid").split is made.valid
    assert set(task.evaluator("test").seen) == {"", "far_"}
    assert task.split("unpaired") is made.unpaired
    (valid,) = task.evaluation_loader("valid")
    evaluator = task.evaluator("valid")
    evaluator.update(valid, {"embedding": valid["inputs"]})
    assert evaluator.compute()["a_to_b_r1"] > 0
    assert task.evaluation_batch("unpaired", [2])["inputs"]["a"].shape == (1, 3)


def test_videos_are_evaluated_on_the_split_that_is_named():
    made = data.load("async-bags?train=6&valid=3&test=4")
    task = BagsTask(made, BagsConfig(batch_size=2))
    names = {split: [batch["name"] for batch in task.evaluation_loader(split)] for split in ("valid", "test")}
    assert names == {"valid": [f"valid-{n}" for n in range(3)], "test": [f"test-{n}" for n in range(4)]}
    bag = made.train[2]
    assert isinstance(bag, Bag)
    batch = task.evaluation_batch("train", [2])
    assert batch["visual"].shape == (1, *bag.visual.shape)
    assert "truth" not in batch
    with pytest.raises(ValueError, match="must name one video"):
        task.evaluation_batch("valid", [0, 1])
    with pytest.raises(DataError, match="at least 2 videos in its valid split"):
        BagsTask(data.load("async-bags?train=6&valid=1&test=4"), BagsConfig()).check_training()
