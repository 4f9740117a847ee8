"""Sources in phases: by class, domain, group and source; orders, classes, items, and every error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counterpoint import data as sources
from counterpoint.data import streams
from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.errors import CounterpointError, DataError

DIGITS = "digits%3Fsize=8%26train=200"


def pictures(
    classes: tuple[str, ...] = ("a", "b"), domains: tuple[str, ...] = (), count: int = 12, start: int = 0, size: int = 8
) -> ImageData:
    """Return data whose pictures hold their number, with classes and domains in turn."""

    def split(offset: int) -> ArrayImages:
        number = np.arange(count)
        pixels = np.broadcast_to((number + start + offset)[:, None, None], (count, size, size)).astype(np.uint8)
        kinds = {"domains": number // 2 % len(domains)} if domains else {}
        return ArrayImages(pixels, number % len(classes) if classes else None, **kinds)

    return ImageData("set", split(0), split(50), split(100), classes, size, domains=domains)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return an empty mapping, whose sets become sources by name."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(streams, "_loaded", lambda spec, task, seed: made[spec])
    return made


def test_classes_are_divided_into_consecutive_groups_in_every_split():
    found = sources.load(f"stream:{DIGITS}?by=class&phases=5", task="views")
    assert found.stream
    assert found.domains == ("zero to one", "two to three", "four to five", "six to seven", "eight to nine")
    for split in (found.train, found.valid, found.test):
        assert np.array_equal(split.domains, split.labels // 2)
    whole = sources.load("digits?size=8&train=200")
    assert np.array_equal(found.train.images(np.arange(9)), whole.train.images(np.arange(9)))
    assert found.notes[-1].endswith(
        "5 phases in the order zero to one, two to three, four to five, six to seven, eight to nine"
    )


@pytest.mark.parametrize("order", ["transposed,plain,inverted", "2,0,1", "2,plain,1"])
def test_an_order_renames_and_renumbers_the_phases(order):
    plain = sources.load("stream:digit-domains%3Ftrain=20%26test=20%26domains=3", task="views")
    assert plain.domains == ("plain", "inverted", "transposed")
    ordered = sources.load(f"stream:digit-domains%3Ftrain=20%26test=20%26domains=3?order={order}", task="views")
    assert ordered.domains == ("transposed", "plain", "inverted")
    assert np.array_equal(np.array([1, 2, 0])[plain.train.domains], ordered.train.domains)
    assert np.array_equal(plain.train.labels, ordered.train.labels)


def test_domains_may_be_grouped_and_items_without_one_are_left_out_with_a_note(given):
    given["x"] = pictures(domains=("p", "q", "r"))
    given["x"].test.domains[3] = -1
    found = streams.load("x", phases=2)
    assert found.domains == ("p to q", "r")
    assert len(found.test) == 11
    assert any("left out of test, without domain and so without phase: 1 item" in note for note in found.notes)
    assert found.test.images(np.arange(4))[:, 0, 0, 0].tolist() == [100, 101, 102, 104]


def test_sources_are_phases_and_share_the_numbers_of_equal_classes(given):
    given["x"], given["y"] = pictures(("a", "b")), pictures(("b", "c"), start=20)
    found = streams.load("x, y")
    assert found.classes == ("a", "b", "c")
    assert found.domains == ("1. set", "2. set")
    assert found.train.labels.tolist() == [0, 1] * 6 + [1, 2] * 6
    shown = found.train.images(np.array([13, 0, 12]))
    assert shown[:, 0, 0, 0].tolist() == [21, 0, 20]
    taken = found.valid.take(np.array([12, 3]))
    assert taken.images(np.arange(2))[:, 0, 0, 0].tolist() == [70, 53]
    with pytest.raises(
        DataError, match=r"class 'b' is in the phases 1\. set and 2\. set, but .* set \?by=class, or leave out"
    ):
        streams.load("x,y", disjoint=1)
    by_class = streams.load("x,y", by="class", phases=3)
    assert by_class.domains == ("a", "b", "c")
    assert by_class.train.domains.tolist() == by_class.train.labels.tolist()


def aligned(groups: Any = None) -> AlignedData:
    def split(offset: int) -> AlignedColumns:
        rows = (np.arange(8)[:, None] + offset).astype(np.float32)
        texts = [f"item {n + offset}" for n in range(8)]
        return AlignedColumns({"v": rows, "t": texts}, np.arange(8) % 2, {"t": np.arange(8) != 5}, groups=groups)

    kinds = {"v": Modality("vector", dim=1), "t": Modality("text")}
    return AlignedData("pairs", split(0), split(10), split(20), kinds, classes=("a", "b"))


def test_pairs_keep_their_columns_presence_and_groups(given):
    given["x"] = aligned(np.array([7, 7, 3, 3, 7, 7, 3, 3]))
    found = streams.load("x", task="aligned", by="group")
    assert found.domains == ("group 3", "group 7")
    assert found.train.domains.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert found.train.groups.tolist() == [7, 7, 3, 3, 7, 7, 3, 3]
    at = np.array([6, 5])
    assert found.train.column("t", at) == ["item 6", "item 5"]
    assert found.train.present("t", at).tolist() == [True, False]
    given["y"] = aligned()
    both = streams.load("x,y", task="aligned")
    at = np.array([15, 0, 8])
    assert both.train.column("v", at)[:, 0].tolist() == [7, 0, 0]
    assert both.train.column("t", at) == ["item 7", "item 0", "item 0"]
    assert both.train.present("t", np.array([13, 0])).tolist() == [False, True]


def test_a_stream_names_items_as_its_sources_do(given):
    given["x"] = pictures(domains=("p", "q"))
    found = streams.load("x")
    assert found.train.row_names(np.array([2])) == ["item 2"]
    assert found.train.files(np.array([2]), "image") == [None]


def test_the_seed_reaches_the_sources_and_their_names_give_the_recipe():
    one, other = (sources.load("stream:digit-domains%3Ftrain=20%26test=20", task="views", seed=n) for n in (1, 2))
    assert not np.array_equal(one.train.images(np.arange(20)), other.train.images(np.arange(20)))
    assert sources.source_name(f"stream:{DIGITS}?by=class") == "digits"
    assert sources.source_name("stream:digit-domains,digits") == "digit-domains"


def no_item(data: ImageData) -> ImageData:
    data.valid.labels[:] = 0
    return data


@pytest.mark.parametrize(
    ("made", "options", "error", "said"),
    [
        (pictures(), {"by": "colour"}, CounterpointError, "unknown way to divide a stream"),
        (pictures(domains=("p",)), {}, DataError, r"1 phases of 1 domain; a stream needs at least two.*set \?phases=N"),
        (pictures(), {"by": "class", "phases": 1}, DataError, "1 phases of 2 classes; a stream needs at least two"),
        (pictures(), {"by": "class", "phases": 3}, DataError, "3 phases of 2 classes"),
        (pictures(()), {"by": "class"}, DataError, r"has no classes to divide by; set \?by=domain"),
        (pictures(), {"by": "domain"}, DataError, r"has no domains in each of its splits; set \?by=class, or give"),
        (pictures(), {"by": "group"}, DataError, "has no groups in each of its splits"),
        (
            no_item(pictures()),
            {"by": "class", "phases": 2},
            DataError,
            "phase 'b' has no item in the valid split; use fewer",
        ),
        (
            pictures(),
            {"by": "class", "phases": 2, "order": "a"},
            CounterpointError,
            "order must hold each phase once.* are a, b",
        ),
        (
            pictures(),
            {"by": "class", "phases": 2, "order": "a,a"},
            CounterpointError,
            "order must hold each phase once",
        ),
        (
            pictures((), ("p", "q")),
            {"disjoint": 1},
            DataError,
            r"has no classes, so \?disjoint=1 has nothing to compare",
        ),
    ],
)
def test_streams_that_cannot_be_made_are_named(made, options, error, said, given):
    given["x"] = made
    with pytest.raises(error, match=said):
        streams.load("x", **options)


def test_sources_that_differ_and_streams_of_streams_are_named(given, monkeypatch):
    given["x"], given["y"] = pictures(), pictures(size=10)
    with pytest.raises(DataError, match=r"differ: .*give both the same sizes"):
        streams.load("x,y")
    given["y"] = aligned()
    with pytest.raises(DataError, match="differ"):
        streams.load("x,y")
    with pytest.raises(CounterpointError, match="several sources cannot be divided by domain"):
        streams.load("x,x", by="domain")
    monkeypatch.undo()
    with pytest.raises(CounterpointError, match="a stream cannot be part of a stream"):
        sources.load("stream:stream:digits", task="views")
    with pytest.raises(CounterpointError, match="needs a path: --data stream:SOURCE"):
        sources.load("stream", task="views")
