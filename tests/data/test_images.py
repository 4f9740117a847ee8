"""Image data: decoding whatever people have, the contract's splits, cifar10, digits, and the user's own through `datasets`."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterpoint import data
from counterpoint.data import images as room
from counterpoint.data import tables
from counterpoint.data.images import ArrayImages, EncodedImages, FileImages, ImageData, decode, scan_files
from counterpoint.data.pairs import AlignedData
from counterpoint.errors import CounterpointError, DataError

RNG = np.random.default_rng(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(height=40, width=50, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def colour(path, rgb, size=(30, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path, **options)
    return path


def png(array) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_square_of_the_right_size_comes_back_untouched():
    pixels = noise(32, 32)
    np.testing.assert_array_equal(decode(png(pixels), 32), pixels)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_short_side_is_scaled_and_the_middle_cut_out(shape, tmp_path):
    # A smooth picture, so that rounding of the crop does not matter.
    y, x = np.mgrid[: shape[0], : shape[1]]
    picture = Image.fromarray(np.stack([255 * x / shape[1], 255 * y / shape[0], 0 * x], 2).astype(np.uint8))
    picture.save(tmp_path / "a.png")
    scale = 20 / min(shape)
    whole = picture.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 20) // 2, (whole.height - 20) // 2
    wanted = np.asarray(whole.crop((left, top, left + 20, top + 20)))
    found = decode(tmp_path / "a.png", 20)
    assert np.abs(found.astype(int) - wanted).max() <= 3


def test_jpegs_read_at_a_fraction_of_their_size_look_the_same(tmp_path):
    y, x = np.mgrid[:800, :800]
    big = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), x * 255 / 800], 2).astype(np.uint8)
    Image.fromarray(big).save(tmp_path / "a.jpg", quality=95)
    wanted = np.asarray(Image.fromarray(big).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(decode(tmp_path / "a.jpg", 32).astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, tmp_path):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16, 0], upright[:16, 16:, 1], upright[16:, :16, 2] = 255, 255, 255
    undo = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = np.ascontiguousarray(undo.get(orientation, lambda a: a)(upright))
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 32), upright)


def saved(image, kind):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("encoded", "wanted"),
    [
        (saved(Image.new("L", (9, 9), 100), "PNG"), (100, 100, 100)),
        (saved(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255)),
        (saved(Image.new("I;16", (9, 9), 0x8080), "PNG"), (128, 128, 128)),
        (saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
        (saved(Image.new("RGBA", (9, 9), (200, 0, 0, 255)), "PNG"), (200, 0, 0)),
        (saved(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (saved(Image.new("LA", (9, 9), (0, 0)), "PNG"), (255, 255, 255)),
        (
            saved(Image.new("RGB", (9, 9), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
            (10, 200, 30),
        ),
        (saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    ],
    ids=["grey", "bilevel", "16 bit", "float", "opaque", "transparent", "grey alpha", "palette", "CMYK"],
)
def test_every_mode_becomes_rgb(encoded, wanted):
    found = decode(encoded, 9)
    assert found.shape == (9, 9, 3)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == 1
    np.testing.assert_allclose(found[0, 0], wanted, atol=1)


def test_an_animation_gives_its_first_frame():
    out = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), c) for c in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(out.getvalue(), 9)[4, 4], (255, 0, 0))


def bomb() -> bytes:
    """The header of a PNG of 20000 x 20000 pixels, and nothing behind it."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 1000) + b"IDAT" + bytes(8)


def test_bombs_are_refused_unread_even_below_twice_pillow_s_limit(tmp_path):
    with pytest.raises(DataError, match="million pixels"):
        decode(bomb(), 32)
    tall = tmp_path / "tall.png"
    Image.new("1", (9001, 10000)).save(tall)  # 90 million: Pillow itself would only warn
    with pytest.raises(DataError, match="million pixels"):
        decode(tall, 32)


@pytest.mark.parametrize("cut", [0, 1, 10, 60, 200, 400, -1])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_is_a_data_error_or_a_picture(kind, cut):
    whole = saved(Image.fromarray(noise()), kind)
    if cut == -1:  # a last byte may not matter
        with contextlib.suppress(DataError):
            assert decode(whole[:cut], 16).shape == (16, 16, 3)
    else:
        with pytest.raises(DataError, match="damaged|not a picture" if cut else "0 bytes"):
            decode(whole[:cut], 16)


def test_flipped_bytes_raise_nothing_but_data_errors():
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = bytearray(saved(Image.fromarray(noise()), kind))
        for _ in range(40):
            broken = bytearray(whole)
            for at in RNG.integers(0, len(whole), 3):
                broken[at] = RNG.integers(256)
            with contextlib.suppress(DataError):
                decode(bytes(broken), 16)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_array_images_checks_what_it_is_given():
    grey = ArrayImages(np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4), np.array([1, 0]))
    found = grey.images(np.array([1, 1, 0]))
    assert found.shape == (3, 4, 4, 3)
    assert (found[0] == found[1]).all()
    assert (found[..., 0] == found[..., 2]).all()
    with pytest.raises(DataError, match="uint8"):
        ArrayImages(np.zeros((2, 4, 4, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 items have labels"):
        ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))


@pytest.mark.parametrize("keep", [1 << 30, 0], ids=["in memory", "lazily"])
def test_scanning_leaves_out_and_names_what_cannot_be_read(tmp_path, keep):
    paths = [colour(tmp_path / f"{n}.png", (n, 0, 0)) for n in range(12)]
    paths[3].write_bytes(b"")
    paths[5].write_text("no picture")
    split, notes = scan_files(paths, 16, np.arange(12), keep=keep)
    assert type(split) is (ArrayImages if keep else FileImages)
    assert len(split) == 10
    assert split.labels.tolist() == [n for n in range(12) if n not in (3, 5)]
    assert split.images(np.array([9, 3, 0]))[:, 0, 0, 0].tolist() == [11, 4, 0]
    assert "2 of 12 left out" in notes[0]
    assert "3.png: is empty (0 bytes)" in notes[0]
    assert "5.png: not a picture" in notes[0]


def test_what_breaks_after_the_scan_is_named_when_read(tmp_path):
    paths = [colour(tmp_path / f"{n}.png", (n, 0, 0)) for n in range(3)]
    split, _ = scan_files(paths, 16, keep=0)
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(DataError, match=r"1\.png.*(damaged|not a picture)"):
        split.images(np.array([0, 1]))
    paths[1].unlink()
    with pytest.raises(DataError, match=r"1\.png: no such file"):
        split.images(np.array([1]))


def test_nothing_usable_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(DataError, match=r"none of 1 image files.*a\.png"):
        scan_files([tmp_path / "a.png"], 16)


def test_splits_made_here_are_stratified_and_stable():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    train, test = room.split_positions(154, 0.2, labels)
    assert sorted([*train, *test]) == list(range(154))
    assert np.bincount(labels[test], minlength=4).tolist() == [20, 10, 1, 0]
    np.testing.assert_array_equal(test, room.split_positions(154, 0.2, labels)[1])
    assert test[:5].tolist() == room.split_positions(154, 0.2, labels)[1][:5].tolist()
    assert room.split_positions(10, 0.2)[1].tolist() == [2, 8]  # written down: must not change with versions
    for fraction in (0.0, 1.0, 3.0, float("nan")):
        with pytest.raises(CounterpointError, match="fraction"):
            room.split_positions(10, fraction)
    with pytest.raises(DataError, match="cannot be split"):
        room.split_positions(1, 0.2)


# --- built in ---------------------------------------------------------------------------------------------------------


def test_digits_keep_their_split_at_every_size():
    found = data.load("digits", task="views")
    assert isinstance(found, ImageData)
    assert found.spec == {"size": 32, "channels": 3, "classes": 10}
    assert (len(found.train), len(found.test)) == (1438, 359)
    assert found.train.images(np.array([0, 5])).shape == (2, 32, 32, 3)
    small = data.load("digits?size=8")
    np.testing.assert_array_equal(small.test.labels, found.test.labels)
    few = data.load("digits?size=8&train=60&labelled=200")
    assert (len(few.train), len(few.bank), len(few.test)) == (60, 200, 359)
    known = {image.tobytes() for image in few.bank.pixels}
    assert {image.tobytes() for image in few.train.pixels} <= known
    assert not {image.tobytes() for image in few.test.pixels} & known
    assert data.load("digits?size=8&train=60").bank is None
    with pytest.raises(DataError, match="labelled is 2 to"):
        data.load("digits?size=8&labelled=1")
    # Nearest class means tell them apart: pictures and labels belong together.
    x, y = found.train.pixels.reshape(1438, -1).astype(float), found.train.labels
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    t = found.test.pixels.reshape(359, -1)
    assert (((t[:, None] - means) ** 2).sum(2).argmin(1) == found.test.labels).mean() > 0.85


def test_cifar10_subset_is_found_through_counterpoint_data():
    if not (Path(os.environ.get("COUNTERPOINT_DATA", "")) / "cifar10-12k.npz").is_file():
        pytest.skip("needs cifar10-12k.npz in $COUNTERPOINT_DATA")
    found = data.load("cifar10")
    assert (len(found.train), len(found.test)) == (10000, 2000)
    assert found.classes == data.load(f"cifar10:{os.environ['COUNTERPOINT_DATA']}").classes
    assert np.bincount(found.test.labels).tolist() == [200] * 10
    assert found.train.images(np.array([9])).shape == (1, 32, 32, 3)
    assert "subset" in found.notes[0]


def test_cifar10_reads_the_standard_download(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for n, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        (folder / name).write_bytes(pickle.dumps({"data": np.full((2, 3072), n, np.uint8), "labels": [n, n]}))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": np.full((3, 3072), 9, np.uint8), "labels": [7, 8, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(DataError, match="no CIFAR-10 there"):  # not the files whose sums torchvision knows
        data.load(f"cifar10:{tmp_path}")
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for place in (tmp_path, folder):
        found = data.load(f"cifar10:{place}")
        assert found.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert found.train.images(np.array([9]))[0, 0, 0].tolist() == [4, 4, 4]
        assert found.test.labels.tolist() == [7, 8, 9]


def test_cifar10_says_what_to_do_without_the_net(tmp_path, cache, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)

    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"no route to host.*cifar10:DIR"):
        data.load("cifar10")
    with pytest.raises(DataError, match="no such directory"):
        data.load(f"cifar10:{tmp_path / 'nowhere'}")
    (tmp_path / "cifar10-12k.npz").write_bytes(b"junk")
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cifar10-12k\.npz"):
        data.load("cifar10")


# --- the user's own ---------------------------------------------------------------------------------------------------

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def folder(tmp_path, cache):
    pytest.importorskip("datasets")
    root = tmp_path / "mine"
    for name, rgb in COLOURS.items():
        for n in range(10):
            colour(root / name / f"{n}.png", rgb)
    return root


def right_colours(split, classes):
    pixels = split.images(np.arange(len(split)))[:, 4, 4]
    return [tuple(p) for p in pixels.tolist()] == [COLOURS[classes[label]] for label in split.labels]


def test_imagefolder_makes_a_split_that_stays(folder):
    found = data.load(f"imagefolder:{folder}?size=16", task="views")
    assert found.classes == ("blue", "green", "red")
    assert (len(found.train), len(found.test)) == (24, 6)
    assert np.bincount(found.test.labels).tolist() == [2, 2, 2]
    assert found.spec == {"size": 16, "channels": 3, "classes": 3}
    assert right_colours(found.train, found.classes)
    assert right_colours(found.test, found.classes)
    assert "split is made here" in found.notes[0]
    other = data.load(f"imagefolder:{folder}?size=16&test=0.5")
    assert len(other.test) == 15


def test_a_loose_picture_that_takes_all_labels_is_said(tmp_path):
    for name in (*(f"{letter}/{number}.png" for letter in "ab" for number in range(6)), "stray.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = data.load(f"imagefolder:{tmp_path}?size=8")
    assert found.classes == ()
    assert any("1 pictures beside the folders (stray.png)" in note for note in found.notes)
    (tmp_path / "stray.png").unlink()
    found = data.load(f"imagefolder:{tmp_path}?size=8")
    assert found.classes == ("a", "b")
    assert not any("beside the folders" in note for note in found.notes)


def test_imagefolder_takes_splits_from_folders(folder):
    root = folder.parent / "split"
    for split, count in (("train", 4), ("test", 2), ("validation", 3)):
        for name, rgb in COLOURS.items():
            for n in range(count):
                colour(root / split / name / f"{n}.png", rgb)
    found = data.load(f"imagefolder:{root}")
    assert (len(found.train), len(found.test), found.size) == (12, 6, 64)
    assert found.notes == []
    assert len(data.load(f"imagefolder:{root}?test=validation").test) == 9
    with pytest.raises(CounterpointError, match="no split 'tset'; it has"):
        data.load(f"imagefolder:{root}?test=tset")


def test_imagefolder_names_what_it_leaves_out(folder):
    (folder / "red" / "0.png").write_bytes(b"")
    (folder / "red" / "1.png").write_bytes((folder / "red" / "2.png").read_bytes()[:50])
    (folder / "red" / "bomb.png").write_bytes(bomb())
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "red" / "cmyk.jpg")
    found = data.load(f"imagefolder:{folder}?size=16")
    assert len(found.train) + len(found.test) == 29
    said = "\n".join(found.notes)
    assert "3 of 32 left out" in said
    for name in ("0.png", "1.png", "bomb.png"):
        assert f"{folder / 'red' / name} (train row" in said
    assert "cmyk" not in said


def test_imagefolder_too_large_for_memory_is_read_when_asked(folder, monkeypatch):
    whole = data.load(f"imagefolder:{folder}?size=16")
    monkeypatch.setattr(tables, "KEEP", 0)
    lazy = data.load(f"imagefolder:{folder}?size=16")
    assert isinstance(lazy.train, EncodedImages)
    rows = np.arange(24)
    np.testing.assert_array_equal(lazy.train.images(rows), whole.train.images(rows))
    np.testing.assert_array_equal(lazy.train.labels, whole.train.labels)
    (folder / "green" / "4.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"green/4\.png"):
        lazy.train.images(rows)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a.txt").touch())])
def test_imagefolder_without_images_is_refused(tmp_path, cache, make):
    pytest.importorskip("datasets")
    make(tmp_path / "none")
    with pytest.raises(DataError, match="none"):
        data.load(f"imagefolder:{tmp_path / 'none'}")


def test_imagefolder_of_nothing_but_damage_is_refused(tmp_path, cache):
    pytest.importorskip("datasets")
    for name in "ab":
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"none of the 2 rows.*0\.png"):
        data.load(f"imagefolder:{tmp_path / 'bad'}")


def test_unlabelled_images_have_no_classes(tmp_path, cache):
    pytest.importorskip("datasets")
    for n in range(10):
        colour(tmp_path / "flat" / f"{n}.png", (n, 0, 0))
    found = data.load(f"imagefolder:{tmp_path / 'flat'}?size=8")
    assert found.classes == ()
    assert found.train.labels is None
    assert (len(found.train), len(found.test)) == (8, 2)


def test_csv_with_paths_labels_and_captions(folder):
    rows = ["picture,kind,caption"]
    rows += [f"{name}/{n}.png,{name},a {name} thing number {n}" for name in COLOURS for n in range(10)]
    rows += ["red/nowhere.png,red,lost", "red/0.png,,no label", "https://example.org/x.png,red,far away"]
    (folder / "list.csv").write_text("\n".join(rows))
    found = data.load(f"csv:{folder / 'list.csv'}?size=16&label=kind", task="views")
    assert isinstance(found, ImageData)
    assert (len(found.train), len(found.test)) == (24, 6)
    assert right_colours(found.train, found.classes)
    said = found.notes[0]
    assert "3 of 33 left out" in said
    assert "nowhere.png (train row 31): no such file" in said
    assert "red/0.png (train row 32): no label in kind" in said
    assert "train row 33: is on the net" in said
    pairs = data.load(f"csv:{folder / 'list.csv'}?size=16", task="aligned")
    assert isinstance(pairs, AlignedData)
    assert len(pairs.train) + len(pairs.test) == 31  # captions are all there, labels are not asked for
    captions = pairs.test.column("text", np.arange(len(pairs.test)))
    pixels = pairs.test.column("image", np.arange(len(pairs.test)))[:, 4, 4]
    for caption, pixel in zip(captions, pixels.tolist(), strict=True):
        if caption.startswith("a "):
            assert COLOURS[caption.split()[1]] == tuple(pixel)


def test_csv_errors_name_the_file_and_the_columns(folder):
    file = folder / "list.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no image column among a, b"):
        data.load(f"csv:{file}")
    with pytest.raises(DataError, match="no column 'c'; it has a, b"):
        data.load(f"csv:{file}?image=c")
    file.write_text("image,label\nx.png,1\ny.png,1,2,3\n")
    with pytest.raises(DataError, match=r"list\.csv: cannot be read as csv"):
        data.load(f"csv:{file}")
    file.write_text("image,label\nred/0.png,0.25\nred/1.png,0.5\n")
    with pytest.raises(DataError, match=r"holds 0\.25; labels are names or whole numbers"):
        data.load(f"csv:{file}")
    with pytest.raises(DataError, match="no such file"):
        data.load(f"csv:{folder / 'nothing.csv'}")
    file.write_text("image,label\nred/0.png,1\nred/1.png,1\n")
    with pytest.raises(DataError, match="no text column among image, label"):
        data.load(f"csv:{file}", task="aligned")


def test_parquet_with_bytes_and_captions(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name for name in COLOURS for _ in range(10)]
    blobs = [(folder / name / "0.png").read_bytes() for name in names]
    blobs[7] = b"junk"
    captions = [[f"{name} one", f"{name} two"] for name in names]
    captions[12] = []
    captions[13] = ["  "]
    table = pa.table({"image": blobs, "label": [list(COLOURS).index(n) for n in names], "caption": captions})
    pq.write_table(table, folder.parent / "x.parquet")
    found = data.load(f"parquet:{folder.parent / 'x.parquet'}?size=16")
    assert found.classes == ("0", "1", "2")
    assert len(found.train) + len(found.test) == 29
    pairs = data.load(f"parquet:{folder.parent / '*.parquet'}?size=16", task="aligned")
    assert len(pairs.train) + len(pairs.test) == 27
    assert "3 of 30 left out" in pairs.notes[0]
    assert "train row 13: no text in caption" in pairs.notes[0]
    assert pairs.classes == ("0", "1", "2")
    for split in (pairs.train, pairs.test):
        rows = np.arange(len(split))
        texts = split.column("text", rows)
        assert all(text.endswith(" one") for text in texts)
        assert [list(COLOURS).index(t.split()[0]) for t in texts] == split.labels.tolist()
        assert [tuple(p) for p in split.column("image", rows)[:, 4, 4].tolist()] == [
            COLOURS[t.split()[0]] for t in texts
        ]
    (folder.parent / "bad.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        data.load(f"parquet:{folder.parent / 'bad.parquet'}")


def test_parquet_with_images_of_datasets(folder):
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder.parent / "hf"))["train"]
    table.to_parquet(folder.parent / "hf.parquet")
    found = data.load(f"parquet:{folder.parent / 'hf.parquet'}?size=16")
    assert found.classes == ("blue", "green", "red")
    assert right_colours(found.train, found.classes)


def test_webdataset_with_several_kinds_of_images(folder):
    def add(tar, name, blob):
        info = tarfile.TarInfo(name)
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))

    shards = folder.parent / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"s-{shard}.tar", "w") as tar:
            for n in range(6):
                name = list(COLOURS)[n % 3]
                add(tar, f"{shard}{n}.png", (folder / name / "0.png").read_bytes())
                add(tar, f"{shard}{n}.cls", str(n % 3).encode())
                add(tar, f"{shard}{n}.json", b'{"caption": "%s"}' % name.encode())
    found = data.load(f"webdataset:{shards}/s-*.tar?size=16", task="views")
    assert len(found.train) + len(found.test) == 12
    assert found.classes == ("0", "1", "2")
    pairs = data.load(f"webdataset:{shards}/s-*.tar?size=16&text=json.caption", task="aligned")
    texts = pairs.train.column("text", np.arange(len(pairs.train)))
    assert [list(COLOURS)[n] for n in pairs.train.labels] == texts
    with pytest.raises(DataError, match="no such file, folder or pattern"):
        data.load(f"webdataset:{shards}/t-*.tar")


def test_imagefolder_with_a_metadata_file_gives_captions(folder):
    lines = ["file_name,caption"] + [f"{name}/{n}.png,{name} {n}" for name in COLOURS for n in range(10)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    pairs = data.load(f"imagefolder:{folder}?size=16", task="aligned")
    rows = np.arange(len(pairs.test))
    texts = pairs.test.column("text", rows)
    assert [tuple(p) for p in pairs.test.column("image", rows)[:, 4, 4].tolist()] == [
        COLOURS[t.split()[0]] for t in texts
    ]


def test_a_source_serves_the_tasks_it_says():
    with pytest.raises(CounterpointError, match=r"'digits' is for the task views, not for aligned; .*glyphs"):
        data.load("digits", task="aligned")
    with pytest.raises(CounterpointError, match="unknown 'digits' option 'task'"):
        data.load("digits?task=views")
    with pytest.raises(CounterpointError, match="size"):
        data.load("digits?size=3")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no file"):
        decode(tmp_path / "pipe.png", 8)


@pytest.mark.parametrize("value", [0, 200, 65535])
def test_dark_greys_of_16_bits_are_dark(value):
    found = decode(saved(Image.new("I;16", (9, 9), value), "PNG"), 9)
    assert found.max() == round(value / 257)


@pytest.mark.parametrize("value", [-3.0, 70000.0])
def test_values_that_are_no_greys_are_refused(value):
    with pytest.raises(DataError, match="no greys"):
        decode(saved(Image.fromarray(np.full((9, 9), value, np.float32)), "TIFF"), 9)


def test_a_long_tail_needs_items_of_every_class():
    assert len(room.long_tailed(np.repeat([0, 1], 10), 10)) == 11
    with pytest.raises(CounterpointError, match="no items"):
        room.long_tailed(np.repeat([0, 2], 10), 10)


def test_a_run_is_not_resumed_on_other_images(folder, tmp_path, monkeypatch):
    """Positions would be those of other pictures, and state kept by position another's."""
    from counterpoint import catalog, training
    from counterpoint.engine.learner import Learner

    settings = {
        "encoder": "mlp-s",
        "recipe": "digits-plain",
        "batch_size": 2,
        "hidden": 8,
        "projection": 8,
        "epochs": 1,
    }
    source, out = f"imagefolder:{folder}?size=8", tmp_path / "runs"

    def stop(self):
        raise RuntimeError("the lights go out")

    with monkeypatch.context() as m:
        m.setattr(Learner, "end_step", stop)
        with pytest.raises(RuntimeError, match="lights"):
            training.train(
                "isogclr", catalog.load_system("isogclr").config(**settings), data=source, out=out, name="r", say=str
            )
    (out / "r" / "last.ckpt").write_bytes(b"")  # as if it had been saved
    next(iter(sorted(folder.rglob("*.*")))).unlink()
    with pytest.raises(DataError, match="this run was begun on"):
        training.resume(out / "r", say=str)


def test_a_long_list_of_damage_is_written_down_whole(tmp_path, cache):
    bad = [f"picture {n} \udcff: damaged" for n in range(30)]
    note = room.left_out(bad, 50)
    assert "30 of 50 left out" in note
    assert "and 20 more" in note
    written = note.partition("All of them: ")[2]
    assert Path(written).read_text(encoding="utf-8").splitlines()[29] == "picture 29 \\udcff: damaged"
    assert "All of them" not in room.left_out(bad[:3], 50)


def test_a_cell_that_is_no_path_is_a_data_error(tmp_path):
    """A column of texts taken for one of paths: longer than a file's name may be."""
    with pytest.raises(DataError, match="not a picture"):
        decode(tmp_path / ("word " * 100), 8)
