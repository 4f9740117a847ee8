"""The user's own items: tables and archives of every kind, what is missing in them, and what is wrong with them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from counterpoint.data import images
from counterpoint.data.images import ImageSplit, decode
from counterpoint.data.manifest import load_manifest
from counterpoint.data.own.roles import known_by_name
from counterpoint.data.own.table import Slice
from counterpoint.data.pairs import AlignedData, Modality, WaveSplit
from counterpoint.data.sounds import decode_sound
from counterpoint.errors import CounterpointError, DataError

pytestmark = pytest.mark.usefixtures("undivided")

ALL = np.arange
WORDS = ("red", "green", "blue", "grey", "pink", "gold", "teal", "navy", "plum", "rust")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(folder))
    return folder


def picture(n: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((12, 10, 3), 20 * n, np.uint8)).save(out, "PNG")
    return out.getvalue()


def sound(n: int, rate: int = 8000, seconds: float = 0.1) -> bytes:
    out = io.BytesIO()
    samples = 0.5 * np.sin(2 * np.pi * (200 + 20 * n) * np.arange(round(rate * seconds)) / rate)
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


@pytest.fixture(scope="session")
def movie(tmp_path_factory) -> Path:
    """Make three seconds that turn from black to white, with a tone."""
    pytest.importorskip("av")
    from counterpoint.data.media import write_video

    path = tmp_path_factory.mktemp("movie") / "a.mp4"
    frames = [np.full((24, 32, 3), 5 * i, np.uint8) for i in range(48)]
    write_video(path, frames, 0.4 * np.sin(np.arange(48000) / 6).astype(np.float32), fps=16)
    return path


@pytest.fixture
def files(tmp_path) -> Path:
    """Make a folder of ten pictures and ten sounds."""
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        (tmp_path / f"{n}.wav").write_bytes(sound(n))
    return tmp_path


def row(n: int) -> dict:
    return {"image": f"{n}.png", "caption": WORDS[n], "audio": f"{n}.wav", "vector": [n / 10, 1.0, -1.0]}


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def opened(place, **options) -> AlignedData:
    return load_manifest(str(place), **({"size": 8, "rate": 8000, "seconds": 0.1} | options))


def everything(data: AlignedData, name: str) -> list:
    """Return a modality of the training items, then of the test items."""
    return [v for split in (data.train, data.test) for v in split.column(name, ALL(len(split)))]


# --- what can be read


def test_four_modalities_of_a_jsonl_are_read(files):
    data = opened(jsonl(files / "m.jsonl", [row(n) for n in range(10)]))
    assert data.modalities == {
        "image": Modality("image", size=8),
        "caption": Modality("text"),
        "audio": Modality("audio", rate=8000, samples=800),
        "vector": Modality("vector", dim=3),
    }
    assert (len(data.train), len(data.test), data.unpaired, data.classes) == (8, 2, None, None)
    assert f"{files / 'm.jsonl'}: the test split is made here, 2 of 10 items" in data.notes
    assert "'image' as image, 'caption' as text, 'audio' as audio, 'vector' as vector" in data.notes[0]
    assert sorted(everything(data, "caption")) == sorted(WORDS)
    rows = ALL(8)
    which = [WORDS.index(w) for w in data.train.column("caption", rows)]
    pixels = data.train.column("image", rows)
    assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 8, 3)
    assert [p.mean() for p in pixels] == [20 * n for n in which]
    np.testing.assert_allclose(data.train.column("vector", rows)[:, 0], np.array(which) / 10, atol=1e-6)
    waves = data.train.column("audio", rows)
    assert waves.dtype == np.float32
    np.testing.assert_array_equal(waves[3], decode_sound(sound(which[3]), 8000, 800).wave)
    assert all(data.train.present(name, rows).all() for name in data.modalities)


def test_opening_twice_gives_the_same_items(files):
    place = jsonl(files / "m.jsonl", [row(n) for n in range(10)])
    assert everything(opened(place), "caption") == everything(opened(place), "caption")


def as_csv(path: Path, rows: list[dict], between: str = ",") -> str:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter=between)
        out.writeheader()
        out.writerows(rows)
    return str(path)


@pytest.mark.parametrize(("name", "between"), [("m.csv", ","), ("m.csv", ";"), ("m.csv", "\t"), ("m.tsv", "\t")])
def test_tables_of_text_are_read_with_any_separator(files, name, between):
    rows = [row(n) | {"vector": str([n / 10, 1.0]).replace(",", "")} for n in range(10)]
    data = opened(as_csv(files / name, rows, between))
    assert sorted(everything(data, "caption")) == sorted(WORDS)
    assert data.modalities["vector"].dim == 2
    assert sorted(v[0] for v in everything(data, "vector")) == pytest.approx([n / 10 for n in range(10)])


def test_parquet_with_bytes_records_and_class_names(files):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "image": [{"bytes": picture(n), "path": None} for n in range(10)],
            "audio": [None if n == 4 else sound(n) for n in range(10)],
            "embedding": pa.array([None if n == 5 else [n, 1.5] for n in range(10)], pa.list_(pa.float32())),
            "label": [n % 2 for n in range(10)],
        }
    )
    features = {"info": {"features": {"label": {"names": ["even", "odd"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, files / "m.parquet", row_group_size=3)
    data = opened(files / "m.parquet")
    assert list(data.modalities) == ["image", "audio", "embedding"] and data.classes == ("even", "odd")
    vectors, here = [], []
    for split in (data.train, data.test):
        rows = ALL(len(split))
        np.testing.assert_array_equal(split.column("image", rows)[:, 0, 0, 0] // 20 % 2, split.labels)
        vectors += list(split.column("embedding", rows)[:, 0])
        here += list(split.present("embedding", rows))
    assert sorted(vectors) == [0, 0, 1, 2, 3, 4, 6, 7, 8, 9] and here.count(False) == 1
    # A column of bytes is spooled to disk where it does not fit.
    assert sum("lack the modality" in note for note in data.notes) == 2


def test_bytes_that_do_not_fit_wait_on_disk(files, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {"image": [picture(n) for n in range(10)], "text": list(WORDS), "wav": [sound(n) for n in range(10)]}
    )
    pq.write_table(table, files / "m.parquet")
    whole = opened(files / "m.parquet")
    monkeypatch.setattr(images, "KEEP", 1000)
    lazy = opened(files / "m.parquet")
    for name in ("image", "wav"):
        np.testing.assert_array_equal(everything(whole, name), everything(lazy, name))
    assert Slice in {type(item) for item in lazy.train.columns["wav"].sources.items}


def as_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("keep", [1 << 30, 0])
def test_webdataset_is_read_with_all_its_modalities(tmp_path, monkeypatch, mode, keep):
    monkeypatch.setattr(images, "KEEP", keep)
    members = {}
    for n in range(10):
        array = io.BytesIO()
        np.save(array, np.array([n, 2.0]))
        members |= {
            f"x/{n}.png": picture(n),
            f"x/{n}.left.jpg": picture(n + 1),
            f"x/{n}.txt": WORDS[n].encode(),
            f"x/{n}.wav": sound(n),
            f"x/{n}.npy": array.getvalue(),
            f"x/{n}.cls": str(n % 3).encode(),
            f"x/{n}.json": json.dumps({"caption": "the same again", "title_id": 3}).encode(),
        }
    place = as_tar(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), members, mode)
    data = opened(place)
    assert list(data.modalities) == ["image", "image_left", "text", "audio", "vector"]
    assert data.classes == ("0", "1", "2")
    for word, image, left, vector in zip(
        *(everything(data, name) for name in ("text", "image", "image_left", "vector")), strict=True
    ):
        n = WORDS.index(word)
        assert (image[0, 0, 0], left[0, 0, 0], vector[0]) == (20 * n, 20 * (n + 1), n)
    assert len(everything(data, "audio")) == 10
    with_json = opened(place, columns="image:image,json.caption:text")
    assert set(everything(with_json, "caption")) == {"the same again"}


def test_a_video_is_its_middle_frame_and_its_sound(tmp_path, movie, monkeypatch):
    place = jsonl(tmp_path / "m.jsonl", [{"clip": str(movie), "caption": word} for word in WORDS])
    data = opened(place, seconds=0.5)
    assert data.modalities == {
        "clip": Modality("image", size=8),
        "caption": Modality("text"),
        "clip_sound": Modality("audio", rate=8000, samples=4000),
    }
    assert any(note.endswith("the sound of the videos in 'clip' is a modality, too: clip_sound") for note in data.notes)
    frame, wave_ = data.test.column("clip", ALL(1))[0], data.test.column("clip_sound", ALL(1))[0]
    assert frame.mean() == pytest.approx(120, abs=10)  # of 0 to 235
    assert 0.2 < wave_.std() < 0.4
    monkeypatch.setattr(images, "KEEP", 0)
    lazy = opened(place, seconds=0.5)
    np.testing.assert_array_equal(lazy.test.column("clip", ALL(1))[0], frame)
    np.testing.assert_array_equal(lazy.test.column("clip_sound", ALL(1))[0], wave_)
    # Where sounds have a column of their own, that one counts.
    (tmp_path / "a.wav").write_bytes(sound(1))
    place = jsonl(tmp_path / "n.jsonl", [{"clip": str(movie), "audio": "a.wav"} for _ in range(4)])
    assert list(opened(place).modalities) == ["clip", "audio"]
    assert not any("is a modality, too" in note for note in opened(place).notes)


def test_videos_as_bytes_and_without_sound(tmp_path, movie):
    from counterpoint.data.media import write_video

    write_video(tmp_path / "mute.mp4", [np.full((16, 16, 3), 9, np.uint8) for _ in range(8)], None)
    mute = (tmp_path / "mute.mp4").read_bytes()
    members = {f"{n}.mp4": mute if n == 2 else movie.read_bytes() for n in range(4)}
    members |= {f"{n}.txt": WORDS[n].encode() for n in range(4)}
    data = opened(as_tar(tmp_path / "a.tar", members))
    assert list(data.modalities) == ["video", "text", "video_sound"]
    here = [h for split in (data.train, data.test) for h in split.present("video_sound", ALL(len(split)))]
    assert here.count(False) == 1
    assert any("1 video without sound" in note for note in data.notes)


def test_columns_option_selects_columns_and_kinds(files):
    rows = [{"a": f"{n}.png", "b": WORDS[n], "c": [n], "image": "nowhere.png"} for n in range(10)]
    data = opened(jsonl(files / "m.jsonl", rows), columns="a:image,b:text,c:vector")
    assert {n: m.kind for n, m in data.modalities.items()} == {"a": "image", "b": "text", "c": "vector"}


def test_several_columns_of_a_kind_are_separate_modalities(files):
    rows = [
        {"image_left": f"{n}.png", "image_right": f"{9 - n}.png", "image_id": n, "img2": f"{n}.png"} for n in range(10)
    ]
    data = opened(jsonl(files / "m.jsonl", rows))
    assert list(data.modalities) == ["image_left", "image_right", "img2"]
    for left, right in zip(everything(data, "image_left"), everything(data, "image_right"), strict=True):
        assert int(left[0, 0, 0]) + int(right[0, 0, 0]) == 180


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("image_embedding", "vector"),
        ("vector_gyro", "vector"),
        ("Caption", "text"),
        ("audio_path", "audio"),
        ("mp4", "video"),
        ("image_url", ""),
        ("split", "split"),
        ("colour", ""),
    ],
)
def test_names_of_columns_determine_their_kinds(column, kind):
    assert known_by_name(column, {}) == kind


def test_names_that_modules_cannot_have_are_replaced(tmp_path):
    rows = [{"values": [n], "a.b": [n], "a b": [n]} for n in range(5)]
    data = opened(jsonl(tmp_path / "m.jsonl", rows), columns="values:vector,a.b:vector,a b:vector")
    assert list(data.modalities) == ["values_", "a_b", "a_b_2"]


def test_sounds_as_arrays_and_vectors_as_files(files):
    np.save(files / "v.npy", np.array([[1.0, 2.0]]))
    rows = [
        {"sound": {"array": [0.1, -0.4] * 100, "sampling_rate": 8000, "path": None}, "features": "v.npy"}
        for _ in range(5)
    ]
    data = opened(jsonl(files / "m.jsonl", rows))
    np.testing.assert_allclose(data.test.column("sound", ALL(1))[0, :200], [0.1, -0.4] * 100, atol=1e-6)
    np.testing.assert_array_equal(data.test.column("features", ALL(1)), [[1, 2]])


# --- splits, classes, what is missing


def test_a_column_or_names_determine_splits(files):
    rows = [row(n) | {"split": "Test" if n < 3 else "val" if n == 3 else "train"} for n in range(10)]
    place = jsonl(files / "m.jsonl", rows)
    data = opened(place)
    assert data.test.column("caption", ALL(3)) == list(WORDS[:3]) and len(data.train) == 6
    assert data.valid.column("caption", ALL(1)) == [WORDS[3]] and len(data.valid) == 1
    assert opened(place, test="validation").test.column("caption", ALL(1)) == [WORDS[3]]
    again = opened(place, test="0.5")
    assert (len(again.train), len(again.test)) == (3, 3)
    assert set(again.train.column("caption", ALL(3))) <= set(WORDS[4:])
    with pytest.raises(CounterpointError, match="has no split 'nope'; it has test, validation, train"):
        opened(place, test="nope")
    for test in ("1.5", "nan"):
        with pytest.raises(CounterpointError, match="fraction between 0 and 1"):
            opened(place, test=test)


def test_files_and_folders_determine_splits(files):
    jsonl(files / "train-0.jsonl", [row(n) for n in range(4)])
    jsonl(files / "train-1.jsonl", [row(n) for n in range(4, 6)])
    jsonl(files / "test.jsonl", [row(n) for n in range(6, 9)])
    for place in (files, files / "t*.jsonl"):
        data = opened(place)
        assert (len(data.train), data.test.column("caption", ALL(3))) == (6, list(WORDS[6:9]))
    inner = files / "set"
    for split, which in (("train", range(3)), ("validation", range(3, 5))):
        (inner / split).mkdir(parents=True)
        for n in which:
            (inner / split / f"{n}.png").write_bytes(picture(n))
        jsonl(inner / split / "items.jsonl", [{"image": f"{n}.png", "text": WORDS[n]} for n in which])
    assert opened(inner).test.column("text", ALL(2)) == list(WORDS[3:5])
    # All there is is called "test": a part of it is cut off to test on.
    assert (len(opened(files / "test.jsonl").train), len(opened(files / "test.jsonl").test)) == (2, 1)


def test_rows_without_a_label_have_no_class(files):
    rows = [row(n) | {"label": None if n == 0 else "ab"[n % 2]} for n in range(10)]
    data = opened(jsonl(files / "m.jsonl", rows))
    assert data.classes == ("a", "b")
    found = dict(zip(everything(data, "caption"), [*data.train.labels, *data.test.labels], strict=True))
    assert found == {word: n % 2 if n else -1 for n, word in enumerate(WORDS)}
    data = opened(as_csv(files / "m.csv", [row(n) | {"vector": "1", "label": str(n + 2)} for n in range(10)]))
    assert data.classes == tuple(str(n + 2) for n in range(10))  # in the order of numbers
    with pytest.raises(DataError, match=r"row 1: the label column 'label' holds 1 number;"):
        opened(jsonl(files / "m.jsonl", [row(n) | {"label": [1]} for n in range(10)]))


def test_truth_values_are_classes(files):
    data = opened(jsonl(files / "m.jsonl", [row(n) | {"label": [True, 1, False][n % 3]} for n in range(10)]))
    found = dict(zip(everything(data, "caption"), [*data.train.labels, *data.test.labels], strict=True))
    assert data.classes is not None
    assert [data.classes[found[word]] for word in WORDS[:3]] == ["True", "1", "False"]


def test_rows_may_lack_any_modality(files):
    rows = [row(n) for n in range(10)]
    del rows[0]["audio"]
    rows[1] |= {"image": None, "vector": []}
    rows[2] |= {"caption": "  ", "vector": None}
    rows[3] = {"caption": "alone"}
    rows[4] = {"image": "4.png"}
    data = opened(jsonl(files / "m.jsonl", rows))
    assert len(data.train) + len(data.test) == 8
    assert data.unpaired is not None and len(data.unpaired) == 2
    assert data.unpaired.column("caption", ALL(2)) == ["alone", ""]
    assert list(data.unpaired.present("image", ALL(2))) == [False, True]
    assert not data.unpaired.column("image", ALL(1)).any() and data.unpaired.column("image", ALL(2))[1].mean() == 80
    said = "\n".join(data.notes)
    assert "the text of caption is empty in 1 of 10 rows" in said
    assert "2 rows have only one modality" in said
    assert "1 of 8 items lack the modality 'audio'" in said
    words = [w for split in (data.train, data.test) for w in split.column("caption", ALL(len(split)))]
    assert words.count("") == 1


def test_test_rows_of_one_modality_stay_in_the_test(files):
    rows = [row(n) | {"split": "test" if n < 3 else "train"} for n in range(10)]
    rows[0] = {"caption": "alone", "split": "test"}
    data = opened(jsonl(files / "m.jsonl", rows))
    assert len(data.test) == 3 and data.unpaired is None
    rows[1], rows[2] = rows[0], rows[0]
    with pytest.raises(DataError, match="no row of its split 'test' has two modalities"):
        opened(jsonl(files / "m.jsonl", rows))


# --- what is wrong


def test_every_bad_row_is_listed(files, cache):
    (files / "torn.png").write_bytes(picture(1)[:-30])
    (files / "empty.png").touch()
    (files / "silent.wav").write_bytes(
        sound(0)[:44] + bytes(1600),
    )
    (files / "broken.wav").write_bytes(b"RIFF and then nothing")
    np.save(files / "bad.npy", np.array([{}], dtype=object))
    rows = [row(n % 10) | {"id": f"row{n}"} for n in range(20)]
    bad = {
        0: ("image", "gone.png", "no such file"),
        1: ("image", "torn.png", "damaged or cut short"),
        2: ("image", "empty.png", "is empty"),
        3: ("image", "https://x.org/a.png", "is on the net"),
        4: ("image", 7, "is neither a path"),
        5: ("audio", "silent.wav", "is silent"),
        6: ("audio", "broken.wav", "not a sound"),
        7: ("audio", "gone.wav", "no such file"),
        8: ("vector", [1.0, None, 2.0], "1 value other than finite numbers, the first at position 2"),
        9: ("vector", [1.0, 2.0], "has 2 numbers, but most rows have 3"),
        10: ("vector", [1e300, 2.0, 3.0], "other than finite"),
        11: ("vector", "bad.npy", "is not a .npy file"),
        12: ("vector", ["a", "b", "c"], "not a list of numbers"),
        13: ("id", "row14", "is not"),  # the one after it is the duplicate
        15: ("caption", {"a": 1}, "is a dict, not a text"),
        16: ("vector", [[1.0, 2.0], [1.0, 3.0]], "has the shape"),
    }
    for n, (column, value, _) in bad.items():
        rows[n][column] = value
    rows[17] = {"id": "row17"}
    path = files / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{not json\n[1, 2]\n")
    with pytest.raises(
        DataError, match=r"19 of 22 rows are bad, more than max_bad=0.1 of 22: m.jsonl row 1 image \(gone.png\)"
    ) as error:
        opened(path)
    reports = list((cache / "reports").iterdir())
    assert len(reports) == 1 and str(reports[0]) in str(error.value) and "and 9 more" in str(error.value)
    data = opened(path, max_bad=19)
    assert len(data.train) + len(data.test) == 3
    assert any("19 of 22 rows left out" in note and str(reports[0]) in note for note in data.notes)
    with reports[0].open(newline="") as file:
        lines = {int(line["row"]) - 1: line for line in csv.DictReader(file)}
    assert sorted(lines) == [*range(13), 14, 15, 16, 17, 20, 21]
    for n, (column, _, said) in bad.items():
        if n != 13:
            assert (lines[n]["column"], said in lines[n]["reason"]) == (column, True), lines[n]
    assert "the id is that of m.jsonl row 14 too" in lines[14]["reason"]
    assert lines[17]["reason"] == "has no modality"
    assert "is not JSON" in lines[20]["reason"] and "is a list, not a record" in lines[21]["reason"]
    with pytest.raises(DataError, match="more than max_bad=17"):
        opened(path, max_bad=17)


def test_a_set_without_fault_leaves_no_report(files, cache):
    place = jsonl(files / "m.jsonl", [row(n) | ({"image": "gone.png"} if n == 3 else {}) for n in range(10)])
    assert "1 of 10 rows left out: 1 no such file: m.jsonl row 4 image (gone.png)" in opened(place).notes[0]
    assert len(list((cache / "reports").iterdir())) == 1
    jsonl(files / "m.jsonl", [row(n) for n in range(10)])
    opened(place)
    assert not list((cache / "reports").iterdir())
    assert sorted(p.suffix for p in files.iterdir()) == [".jsonl"] + [".png"] * 10 + [".wav"] * 10  # nothing of ours


def test_rows_with_too_many_fields_are_left_out(files):
    path = files / "m.csv"
    as_csv(path, [{"image": f"{n}.png", "caption": WORDS[n]} for n in range(10)])
    path.write_text(path.read_text() + "1.png,a,b\n")
    assert "1 of 11 rows left out: 1 has too many fields (3; the header has 2): m.csv row 11" in opened(path).notes[0]


def test_sounds_of_other_rates_are_noted(files, cache):
    (files / "3.wav").write_bytes(sound(3, rate=44100))
    data = opened(jsonl(files / "m.jsonl", [row(n) for n in range(10)]))
    assert any("1 of 10 sounds resampled to 8000 Hz (44100 Hz: 1)" in note for note in data.notes)
    (report,) = (cache / "reports").iterdir()
    (line,) = csv.DictReader(report.open(newline=""))
    assert (line["row"], line["column"], line["what"], line["value"]) == ("4", "audio", "resampled", "44100 Hz")
    assert all(str(report) in note for note in data.notes if "resampled" in note)


def test_items_are_listed_by_their_rows(files, cache):
    rows = [row(n) | {"id": f"i{n}"} for n in range(10)]
    rows[2]["image"] = "gone.png"
    data = opened(jsonl(files / "m.jsonl", rows))
    (report,) = (cache / "reports").iterdir()

    def listed():
        return [(line["row"], line["id"]) for line in csv.DictReader(report.open(newline="")) if line["what"] == "cut"]

    for _ in range(2):  # the same again is not said twice
        for split in (data.train, data.test):
            assert split.list_items("caption", np.array([0]), "cut", "long") == report
        names = [data.train.row_names(np.array([0]))[0], data.test.row_names(np.array([0]))[0]]
        assert sorted(f"m.jsonl row {n} ({key})" for n, key in listed()) == sorted(names)
    data.train.list_items("caption", np.array([], int), "cut", "long")
    assert len(listed()) == 1
    # A report that holds nothing else vanishes with it.
    clean = opened(jsonl(files / "n.jsonl", rows[3:]))
    made = clean.train.list_items("caption", np.array([0]), "cut", "long")
    assert made is not None and made.is_file() and made != report
    clean.train.list_items("caption", np.array([], int), "cut", "long")
    assert not made.exists()


def test_an_id_is_taken_by_the_first_row_that_can_be_used(files):
    rows = [row(n) | {"id": f"i{n}"} for n in range(10)]
    again = [row(3) | {"id": " i2"}, row(4) | {"id": "i2"}]
    rows[2]["image"] = "gone.png"
    data = opened(jsonl(files / "m.jsonl", rows + again), max_bad=0.5)
    assert [(line.row, line.reason) for line in data.accounts.left("rows")] == [
        (3, "no such file"),
        (12, "the id is that of m.jsonl row 11 too, which is used instead"),
    ]


def test_splits_in_files_of_their_own_count_their_rows_anew(files):
    for name in ("train", "test"):
        as_csv(files / f"{name}.csv", [{"id": n, "image": f"{n}.png", "text": f"{name} {n}"} for n in range(10)])
    data = opened(files)
    assert (len(data.train), len(data.test), data.accounts.counts("rows")) == (10, 10, (20, 20, 0))


def test_vectors_written_as_text_are_read(files):
    good = ["[1, 2]", "1;2", "+1 2", "(1,2)", "-.5 2", "1e3 4", ".5 nan", "inf 1", "1 x", "gone.npy"]
    as_csv(files / "m.csv", [{"vector": v, "text": WORDS[n]} for n, v in enumerate(good)])
    left = opened(files / "m.csv", max_bad=0.5).accounts.left("rows")
    assert [(line.row, line.value) for line in left] == [(7, ".5 nan"), (8, "inf 1"), (9, "1 x"), (10, "gone.npy")]
    for line, reason in zip(
        left,
        ["holds 1 value other than finite"] * 2
        + ["is neither a list of numbers nor the name of a .npy file", "no such file"],
        strict=True,
    ):
        assert reason in line.reason


def test_what_has_no_class_says_so_in_text_too(files):
    said = [3, -1, " ", "a", "-1", "", " a ", 3, "a", 3]
    rows = [{"image": f"{n}.png", "text": WORDS[n], "label": str(value)} for n, value in enumerate(said)]
    as_csv(files / "m.csv", rows)
    data = opened(files / "m.csv")
    assert data.classes == ("3", "a")
    assert sorted([*data.train.labels, *data.test.labels]) == [-1] * 4 + [0] * 3 + [1] * 3


def test_classes_of_two_are_no_hindrance_to_a_split(files):
    place = jsonl(files / "m.jsonl", [row(n) | {"label": n // 2} for n in range(10)])
    data = opened(place)
    assert (len(data.train), len(data.test)) == (8, 2)


def test_max_bad_is_a_share_of_the_rows_to_the_last_one(files):
    rows = [row(n % 10) for n in range(100)]
    for n in range(29):
        rows[n] = {"image": "gone.png", "caption": "x"}
    assert 0.29 * 100 < 29  # in floating point
    assert "29 of 100 rows left out" in opened(jsonl(files / "m.jsonl", rows), max_bad=0.29).notes[0]
    with pytest.raises(DataError, match="allow more: --max-bad N, or"):
        opened(files / "m.jsonl", max_bad=0.28)


def test_a_manifest_without_usable_rows_raises_an_error(files):
    rows = [{"image": "gone.png", "caption": None} for _ in range(3)]
    with pytest.raises(DataError, match=r"none of its 3 rows can be used: m\.jsonl row 1 image"):
        opened(jsonl(files / "m.jsonl", rows), max_bad=100)


def test_a_modality_without_rows_raises_an_error(files):
    rows = [row(n) | {"audio": None} for n in range(10)]
    with pytest.raises(DataError, match="no usable row has the modality 'audio'"):
        opened(jsonl(files / "m.jsonl", rows))
    rows = [{"image": f"{n}.png", "caption": "x"} for n in range(9)] + [{"audio": "1.wav"}]
    with pytest.raises(DataError, match="the modality 'audio' is in no training row beside another"):
        opened(jsonl(files / "m.jsonl", rows))
    rows = [{"image": f"{n}.png"} if n % 2 else {"caption": "x"} for n in range(10)]
    with pytest.raises(DataError, match="no usable row has two modalities"):
        opened(jsonl(files / "m.jsonl", rows))


def test_columns_that_do_not_exist_raise_an_error(files):
    place = jsonl(files / "m.jsonl", [{"image": "1.png", "colour": "red"} for _ in range(5)])
    with pytest.raises(DataError, match=r"has only 'image' among image, colour; name them with \?columns="):
        opened(place)
    with pytest.raises(DataError, match="no column 'tint'; it has image, colour"):
        opened(place, columns="image:image,tint:text")
    with pytest.raises(CounterpointError, match="unknown kind of the column 'colour' 'txet'"):
        opened(place, columns="image:image,colour:txet")
    with pytest.raises(CounterpointError, match="'colour' is not NAME:KIND"):
        opened(place, columns="image:image,colour")
    with pytest.raises(CounterpointError, match="two columns as label"):
        opened(place, columns="image:label,colour:label")


def test_unreadable_places_raise_an_error(tmp_path, monkeypatch):
    (tmp_path / "void.csv").touch()
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "header.csv").write_text("image,text\n")
    (tmp_path / "twice.csv").write_text("image,image\n1,2\n")
    (tmp_path / "unnamed.csv").write_text("image,\n1,2\n")
    (tmp_path / "latin.csv").write_bytes("image,text\n1,é\n".encode("latin-1"))
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and more PAR1")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "bad.jsonl").write_text("nothing\nnever\n")
    (tmp_path / "zip.gz").write_bytes(b"x")
    (tmp_path / "bare").mkdir()
    cut = Path(as_tar(tmp_path / "cut.tar", {"1.txt": b"a" * 5000}))
    cut.write_bytes(cut.read_bytes()[:2000])
    for name, said in {
        "gone.csv": "no such file, folder or pattern",
        "*.nope": "no such file, folder or pattern",
        "void.csv": r"is empty \(0 bytes\)",
        "a.xyz": "says no kind that can be read",
        "zip.gz": "says no kind that can be read",
        "header.csv": "holds no rows",
        "twice.csv": "names the column 'image' twice",
        "unnamed.csv": "has only 'image' among image;",
        "latin.csv": "is not text in UTF-8",
        "one.json": "should be a list of records",
        "bad.parquet": "not a Parquet file",
        "bad.tar": "not a tar file",
        "cut.tar": "not a tar file|cut short",
        "bad.jsonl": "none of its rows can be read: row 1 of bad.jsonl is not JSON",
        "": "holds files of several kinds",
        "bare": "bare: holds no table or archive",
    }.items():
        with pytest.raises(DataError, match=said):
            opened(tmp_path / name)
    with pytest.raises(CounterpointError, match="needs a path"):
        load_manifest("")


def test_options_out_of_range_raise_an_error(files):
    place = jsonl(files / "m.jsonl", [row(n) for n in range(10)])
    for options, said in (
        ({"size": 2}, "size is"),
        ({"rate": 1}, "rate is"),
        ({"seconds": 0.0}, "seconds is"),
        ({"max_bad": -1.0}, "max_bad"),
        ({"max_bad": float("nan")}, "max_bad"),
    ):
        with pytest.raises(CounterpointError, match=said):
            opened(place, **options)


# --- sets that do not fit in memory


def test_large_sets_are_decoded_when_asked_for(files, monkeypatch):
    rows = [row(n) for n in range(10)]
    rows[2]["image"] = rows[5]["audio"] = None
    place = jsonl(files / "m.jsonl", rows)
    whole = opened(place)
    monkeypatch.setattr(images, "KEEP", 0)
    lazy = opened(place)
    assert lazy.notes == whole.notes
    for name in whole.modalities:
        np.testing.assert_array_equal(everything(lazy, name), everything(whole, name))
    assert isinstance(lazy.train.columns["image"], ImageSplit) and isinstance(lazy.train.columns["audio"], WaveSplit)
    (files / "0.png").write_bytes(picture(0)[:-30])
    (files / "0.wav").unlink()
    where = lazy.train if "red" in lazy.train.column("caption", ALL(len(lazy.train))) else lazy.test
    at = where.column("caption", ALL(len(where))).index("red")
    for name, said in (("image", ""), ("audio", "no such file")):
        with pytest.raises(DataError, match=f"row 1 {name}: {said}.*--resume"):
            where.column(name, np.array([at]))
    # A header is enough to find this at the start.
    (files / "0.png").write_bytes(b"no picture")
    assert "1 not a picture that can be read (unknown format): m.jsonl row 1 image (0.png)" in opened(place).notes[0]


def test_pictures_are_squares_as_everywhere(files):
    data = opened(jsonl(files / "m.jsonl", [row(n) for n in range(10)]))
    n = WORDS.index(data.test.column("caption", ALL(1))[0])
    np.testing.assert_array_equal(data.test.column("image", ALL(1))[0], decode(files / f"{n}.png", 8))


# --- anything at all

CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["0.png", "0.wav"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "array", "x"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=400),
    st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".tar", ".parquet", ".tar.gz"]),
    st.sampled_from([b"", b"image,text\n", b'[{"image":', b"PAR1", b"\x1f\x8b\x08\x00"]),
)
def test_rubbish_raises_a_clear_error(tmp_path_factory, content, ending, start):
    path = tmp_path_factory.getbasetemp() / f"rubbish{ending}"
    path.write_bytes(start + content)
    try:
        opened(path)
    except CounterpointError as error:
        assert str(error)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["image", "text", "audio", "vector", "video", "label", "split", "id"]), CELLS),
        min_size=1,
        max_size=6,
    )
)
def test_any_cells_are_items_or_a_clear_error(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "cells"
    if not folder.exists():
        folder.mkdir()
        (folder / "0.png").write_bytes(picture(3))
        (folder / "0.wav").write_bytes(sound(3))
    good = [{"image": "0.png", "text": f"n{n}", "audio": "0.wav", "vector": [0.5], "label": "x"} for n in range(6)]
    place = jsonl(folder / "m.jsonl", good + rows)
    try:
        data = opened(place, max_bad=100)
    except CounterpointError as error:
        assert str(error)
        return
    for split in filter(None, (data.train, data.test, data.unpaired)):
        for name, modality in data.modalities.items():
            column = split.column(name, ALL(len(split)))
            assert len(column) == len(split)
            assert modality.kind == "text" or np.isfinite(column).all()
