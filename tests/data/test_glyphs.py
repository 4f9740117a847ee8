"""Icons: what is drawn, what is split from what, the cache, and options that cannot be."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import glyphs
from counterpoint.data.images import ImageData
from counterpoint.data.pairs import AlignedData
from counterpoint.errors import CounterpointError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("qtawesome") is None,
    reason="needs the fonts of qtawesome: pip install --no-deps qtawesome",
)
ALL = np.arange


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTERPOINT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def full(cache):
    return data.load("glyphs?size=24", task="aligned")


def texts(split):
    return split.column("text", ALL(len(split)))


def test_full_set_has_its_documented_sizes_and_spec(full):
    assert isinstance(full, AlignedData)
    assert (len(full.train), len(full.valid), len(full.test)) == (13256, 1480, 2000)
    assert len(full.domains) == 14
    assert full.spec == {
        "modalities": {"image": {"kind": "image", "size": 24}, "text": {"kind": "text"}},
        "classes": 50,
    }
    assert set(full.test.domains) == set(range(14))
    assert full.notes == ["glyphs: 194 icons are left out, because they repeat a drawing under another name or style"]


def test_no_name_stands_in_two_splits(full):
    names = [{glyphs.name_key(t.replace(" ", "-")) for t in texts(s)} for s in (full.train, full.valid, full.test)]
    assert len(set.union(*names)) == sum(map(len, names))
    assert {"home", "home outline"} <= set(texts(full.train)) or {"home", "home outline"} <= set(texts(full.test))


def test_no_drawing_stands_twice(full):
    pixels = [
        split.column("image", ALL(len(split))).reshape(len(split), -1) for split in (full.train, full.valid, full.test)
    ]
    every = np.concatenate(pixels)
    assert len(np.unique(every, axis=0)) == len(every)


def test_of_equal_drawings_the_first_that_is_shown_counts():
    grey = np.array([1, 2, 1, 3, 2, 1], np.uint8)[:, None, None]
    assert glyphs._first_drawings(grey, np.zeros(6, bool)).tolist() == [0, 1, 3]
    held_out = np.array([True, False, False, True, False, False])
    assert glyphs._first_drawings(grey, held_out).tolist() == [1, 2, 3]


def test_a_caption_occurs_once_in_a_style(full):
    for split in (full.train, full.test):
        pairs = Counter(zip(texts(split), split.domains.tolist(), strict=True))
        assert max(pairs.values()) == 1
    captions = texts(full.train)
    assert all(c and c == c.strip() and "-" not in c for c in captions)


def test_drawings_are_there_distinct_and_inside_the_margin(full):
    pixels = full.test.column("image", ALL(2000))
    assert pixels.shape == (2000, 24, 24, 3)
    ink = 255 - pixels[..., 0].astype(int)
    assert (ink.sum((1, 2)) > 150).all()
    assert (ink[:, 0].sum(1) == 0).mean() > 0.99
    assert len(np.unique(pixels.reshape(2000, -1), axis=0)) > 1900
    # Centred: the middle of the ink's box is the middle of the picture, give or take a pixel.
    for picture in ink[:200]:
        rows, columns = np.flatnonzero(picture.sum(1) > 20), np.flatnonzero(picture.sum(0) > 20)
        assert abs(rows[0] + rows[-1] - 23) <= 2
        assert abs(columns[0] + columns[-1] - 23) <= 2


def test_captions_belong_to_their_pictures(full):
    # The same name drawn by two styles looks more alike than two names do.
    captions = texts(full.train)
    style = {name: n for n, name in enumerate(full.domains)}
    bold = {
        c.removesuffix(" bold"): i for i, c in enumerate(captions) if full.train.domains[i] == style["phosphor-bold"]
    }
    plain = {c: i for i, c in enumerate(captions) if full.train.domains[i] == style["phosphor-regular"]}
    names = sorted(set(bold) & set(plain))[:300]
    assert len(names) == 300
    a, b = (
        full.train.column("image", np.array([where[n] for n in names]))[..., 0].reshape(300, -1).astype(float)
        for where in (bold, plain)
    )
    a, b = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))
    assert ((a @ b.T).argmax(1) == ALL(300)).mean() > 0.8


def test_labels_are_the_names_subjects(full):
    for split in (full.train, full.test):
        for caption, label in zip(texts(split), split.labels, strict=True):
            first = caption.split()[0]
            assert full.classes[label] == first if label >= 0 else first not in full.classes
    assert "arrow" in full.classes
    assert (full.test.labels >= 0).mean() > 0.25


def test_views_have_the_styles_as_classes(full):
    found = data.load("glyphs?size=24", task="views")
    assert isinstance(found, ImageData)
    assert found.classes == full.domains
    np.testing.assert_array_equal(found.train.labels, full.train.domains)
    np.testing.assert_array_equal(found.test.images(ALL(9)), full.test.column("image", ALL(9)))


def test_held_out_styles_are_a_split_of_their_own(cache):
    found = data.load("glyphs?size=24&held_out=remix,phosphor-thin", task="aligned")
    out = {n for n, name in enumerate(found.domains) if name in ("remix-line", "remix-fill", "phosphor-thin")}
    shift = found.shifts["held-out"]
    assert set(shift.domains) == out
    assert not out & set(found.train.domains)
    assert not out & set(found.test.domains)
    keys = [{glyphs.name_key(t.replace(" ", "-")) for t in texts(s)} for s in (found.train, found.valid, shift)]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert len(shift) > 1000


def test_sizes_and_styles_can_be_chosen(cache):
    found = data.load("glyphs?size=24&styles=phosphor-bold,fa6&train=300&test=100", task="aligned")
    assert (len(found.train), len(found.test)) == (300, 100)
    assert found.domains == ("fa6-regular", "fa6-solid", "fa6-brands", "phosphor-bold")
    again = data.load("glyphs?size=24&styles=phosphor-bold,fa6&train=300&test=100", task="aligned")
    assert texts(again.train) == texts(found.train)
    # A smaller training set is part of a larger one, and the test stays.
    more = data.load("glyphs?size=24&styles=phosphor-bold,fa6&train=600&test=100", task="aligned")
    assert set(texts(found.train)) <= set(texts(more.train))
    assert texts(more.test) == texts(found.test)
    older = data.load("glyphs?size=24&styles=" + ",".join(glyphs.FONTS), task="aligned")
    assert len(older.train) + len(older.valid) + len(older.test) == 18937
    assert len(older.domains) == len(glyphs.STYLES) == 19


def test_drawings_are_cached_and_damaged_ones_redrawn(cache, full, monkeypatch):
    monkeypatch.setattr(glyphs, "_draw", lambda *a: pytest.fail("drawn again"))
    again = data.load("glyphs?size=24", task="aligned")
    np.testing.assert_array_equal(again.test.column("image", ALL(50)), full.test.column("image", ALL(50)))
    monkeypatch.undo()
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(cache))
    file = next((cache / "glyphs").glob("codicon*24px*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    mended = data.load("glyphs?size=24&styles=codicon&test=50", task="aligned")
    assert len(mended.train) + len(mended.test) > 400


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("styles=phosfor", "did you mean phosphor"),
        ("held_out=remx", "did you mean remix"),
        ("styles=codicon&held_out=codicon", "leaves no style"),
        ("styles=codicon&test=100000", "leaves none to train on"),
        ("styles=codicon&test=50&train=100000", "got train=100000"),
        ("test=0", "test >= 1"),
        ("size=4", "pixels"),
    ],
)
def test_options_out_of_range_raise_an_error(cache, options, says):
    with pytest.raises(CounterpointError, match=says):
        data.load(f"glyphs?size=24&{options}" if "size" not in options else f"glyphs?{options}")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    glyphs.fonts_folder.cache_clear()
    with pytest.raises(CounterpointError, match="pip install --no-deps qtawesome"):
        glyphs.fonts_folder()
    glyphs.fonts_folder.cache_clear()


def test_neither_qt_nor_torch_is_imported(cache):
    code = (
        "import sys; from counterpoint import data; data.load('glyphs?size=24&styles=codicon&test=50', task='aligned');"
        "assert not {'torch', 'qtawesome', 'qtpy'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
