"""Image data: decoding whatever people have, the contract's splits, cifar10, digits, and the user's own."""

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
from counterpoint.data.images import ArrayImages, ImageData, decode
from counterpoint.data.own.contracts import OwnImages
from counterpoint.data.pairs import AlignedData
from counterpoint.errors import CounterpointError, DataError

pytestmark = pytest.mark.usefixtures("undivided")

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
    """Make the header of a PNG of 20000 x 20000 pixels, and nothing behind it."""
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
        ArrayImages(np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(DataError, match="labels have shape \\[3\\], expected \\[2\\]"):
        ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))


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


def test_splits_made_here_keep_together_what_belongs_together():
    rng = np.random.default_rng(3)
    labels, together = rng.integers(0, 4, 900), rng.integers(0, 250, 900)
    train, test = room.split_positions(900, 0.2, labels, together)
    assert sorted([*train, *test]) == list(range(900))
    assert not set(together[train]) & set(together[test])
    share = np.bincount(labels[test], minlength=4) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.02
    np.testing.assert_array_equal(test, room.split_positions(900, 0.2, labels, together)[1])
    # Where nothing belongs together the split is that of before.
    alone = room.split_positions(900, 0.2, labels, np.arange(900))[1]
    np.testing.assert_array_equal(alone, room.split_positions(900, 0.2, labels)[1])
    # A set that is too large for the test split stays in training.
    assert len(room.split_positions(100, 0.2, None, np.where(np.arange(100) < 70, 0, np.arange(100)))[1]) == 20


def test_the_smallest_set_is_tested_on_where_none_fits():
    train, test = room.split_positions(30, 0.1, None, np.repeat([0, 1, 2], [8, 12, 10]))
    assert (test.tolist(), len(train)) == (list(range(8)), 22)


# --- built in ---------------------------------------------------------------------------------------------------------


def test_digits_keep_their_split_at_every_size():
    found = data.load("digits", task="views")
    assert isinstance(found, ImageData)
    assert found.spec == {"size": 32, "channels": 3, "classes": 10}
    assert (len(found.train), len(found.test)) == (1295, 359)
    assert found.train.images(np.array([0, 5])).shape == (2, 32, 32, 3)
    small = data.load("digits?size=8")
    np.testing.assert_array_equal(small.test.labels, found.test.labels)
    few = data.load("digits?size=8&train=60&labelled=200")
    assert (len(few.train), len(few.bank), len(few.test)) == (60, 200, 359)
    known = {image.tobytes() for image in few.bank.pixels}
    assert {image.tobytes() for image in few.train.pixels} <= known
    assert not {image.tobytes() for image in few.test.pixels} & known
    assert data.load("digits?size=8&train=60").bank is None
    with pytest.raises(DataError, match="labelled must be 2 to"):
        data.load("digits?size=8&labelled=1")
    # Nearest class means tell them apart: pictures and labels belong together.
    x, y = found.train.pixels.reshape(1295, -1).astype(float), found.train.labels
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    t = found.test.pixels.reshape(359, -1)
    assert (((t[:, None] - means) ** 2).sum(2).argmin(1) == found.test.labels).mean() > 0.85


def test_cifar10_subset_is_found_through_counterpoint_data():
    if not (Path(os.environ.get("COUNTERPOINT_DATA", "")) / "cifar10-12k.npz").is_file():
        pytest.skip("needs cifar10-12k.npz in $COUNTERPOINT_DATA")
    found = data.load("cifar10")
    assert (len(found.train), len(found.test)) == (9000, 2000)
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
    with pytest.raises(DataError, match="holds no CIFAR-10"):  # not the files whose sums torchvision knows
        data.load(f"cifar10:{tmp_path}")
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for place in (tmp_path, folder):
        found = data.load(f"cifar10:{place}")
        # The two pictures of a class are equal, and are not separated.
        assert found.train.labels.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
        assert found.valid.labels.tolist() == [1, 1]
        assert found.train.images(np.array([7]))[0, 0, 0].tolist() == [4, 4, 4]
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


def unlike(path, rgb, n):
    """Make a picture of one colour that differs from others outside its middle square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (30, 20), rgb)
    image.putpixel((0, 0), (n, 7, 9))
    image.save(path)


@pytest.fixture
def folder(tmp_path, cache):
    root = tmp_path / "mine"
    for name, rgb in COLOURS.items():
        for n in range(10):
            unlike(root / name / f"{n}.png", rgb, n)
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
    assert found.accounts.counts("files") == found.accounts.counts("pictures") == (30, 30, 0)
    assert found.train.row_names(np.array([0])) == found.train.files(np.array([0])) == [str(folder / "blue" / "0.png")]
    other = data.load(f"imagefolder:{folder}?size=16&test=0.5")
    assert len(other.test) == 15


def test_a_picture_beside_the_folders_has_no_class(tmp_path, cache):
    for n, name in enumerate((*(f"{letter}/{number}.png" for letter in "ab" for number in range(6)), "stray.png")):
        unlike(tmp_path / "mine" / name, (9, 9, 9), n)
    found = data.load(f"imagefolder:{tmp_path / 'mine'}?size=8")
    assert found.classes == ("a", "b")
    assert sorted([*found.train.labels, *found.test.labels]) == [-1] + [0] * 6 + [1] * 6
    assert any("1 picture stands beside the folders of classes" in note for note in found.notes)
    assert any("1 picture has no class" in note for note in found.notes)


def test_imagefolder_takes_splits_from_folders(folder):
    root = folder.parent / "split"
    for split, count in (("train", 4), ("test", 2), ("validation", 3)):
        for name, rgb in COLOURS.items():
            for n in range(count):
                unlike(root / split / name / f"{n}.png", rgb, n)
    found = data.load(f"imagefolder:{root}")
    assert (len(found.train), len(found.test), found.size) == (12, 6, 64)
    said = "\n".join(found.notes)
    assert (len(found.valid), "left out" in said) == (9, False)
    # The pictures of the splits are the same by their numbers.
    assert "of 6 test items 6 the image is that of a training item too" in said
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
    assert "3 of 32 pictures left out" in found.notes[0]
    listed = found.accounts.file.read_text()
    for name in ("0.png", "1.png", "bomb.png"):
        assert str(folder / "red" / name) in listed
    assert "cmyk" not in listed


def test_imagefolder_too_large_for_memory_is_read_when_asked(folder, monkeypatch):
    whole = data.load(f"imagefolder:{folder}?size=16")
    monkeypatch.setattr(room, "KEEP", 0)
    lazy = data.load(f"imagefolder:{folder}?size=16")
    assert isinstance(lazy.train, OwnImages)
    rows = np.arange(24)
    np.testing.assert_array_equal(lazy.train.images(rows), whole.train.images(rows))
    np.testing.assert_array_equal(lazy.train.labels, whole.train.labels)
    (folder / "green" / "4.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"green/4\.png"):
        lazy.train.images(rows)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a.txt").touch())])
def test_imagefolder_without_images_is_refused(tmp_path, cache, make):
    make(tmp_path / "none")
    with pytest.raises(DataError, match="none"):
        data.load(f"imagefolder:{tmp_path / 'none'}")


def test_imagefolder_of_nothing_but_damage_is_refused(tmp_path, cache):
    for name in "ab":
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"none of its 2 pictures.*0\.png"):
        data.load(f"imagefolder:{tmp_path / 'bad'}")


def test_unlabelled_images_have_no_classes(tmp_path, cache):
    for n in range(10):
        colour(tmp_path / "flat" / f"{n}.png", (n, 0, 0))
    found = data.load(f"imagefolder:{tmp_path / 'flat'}?size=8")
    assert found.classes == ()
    assert found.train.labels is None
    assert (len(found.train), len(found.test)) == (8, 2)


def test_csv_with_paths_labels_and_captions_is_read(folder):
    rows = ["picture,kind,caption"]
    rows += [f"{name}/{n}.png,{name},a {name} thing number {n}" for name in COLOURS for n in range(10)]
    rows += ["red/nowhere.png,red,lost", "red/0.png,,no label", "https://example.org/x.png,red,far away"]
    (folder / "list.csv").write_text("\n".join(rows))
    found = data.load(f"csv:{folder / 'list.csv'}?size=16&label=kind", task="views")
    assert isinstance(found, ImageData)
    # A row without a label is a picture all the same.
    assert len(found.train) + len(found.test) == 31
    assert sorted(np.concatenate([found.train.labels, found.test.labels]))[:2] == [-1, 0]
    for split in (found.train, found.test):
        known = np.flatnonzero(split.labels >= 0)
        pixels = split.images(known)[:, 4, 4].tolist()
        assert [tuple(p) for p in pixels] == [COLOURS[found.classes[label]] for label in split.labels[known]]
    assert [(line.row, line.reason) for line in found.accounts.left("rows")] == [
        (31, "no such file"),
        (33, "is on the net; download it and name the file"),
    ]
    assert "2 of 33 rows left out" in found.notes[0]
    assert "'image'" not in found.notes[1]
    assert "'picture' as image" in found.notes[1]
    names = {
        name: file
        for split in (found.train, found.test)
        for name, file in zip(split.row_names(np.arange(len(split))), split.files(np.arange(len(split))), strict=True)
    }
    assert names["list.csv row 13 (green/2.png)"] == str(folder / "green" / "2.png")
    pairs = data.load(f"csv:{folder / 'list.csv'}?size=16", task="aligned")
    assert isinstance(pairs, AlignedData)
    assert len(pairs.train) + len(pairs.test) == 31
    captions = pairs.test.column("text", np.arange(len(pairs.test)))
    pixels = pairs.test.column("image", np.arange(len(pairs.test)))[:, 4, 4]
    for caption, pixel in zip(captions, pixels.tolist(), strict=True):
        if caption.startswith("a "):
            assert COLOURS[caption.split()[1]] == tuple(pixel)
    # Two rows of one picture are never in two splits.
    both = {"a red thing number 0", "no label"}
    assert len(both & set(captions)) in (0, 2)


def test_csv_errors_name_the_file_and_the_columns(folder):
    file = folder / "list.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no image column among a, b"):
        data.load(f"csv:{file}")
    with pytest.raises(DataError, match="no column 'c'; it has a, b"):
        data.load(f"csv:{file}?image=c")
    file.write_text("image,label\nx.png,1\ny.png,1,2,3\n")
    with pytest.raises(DataError, match=r"none of its 2 rows.*row 2: has too many fields"):
        data.load(f"csv:{file}")
    file.write_text("image,label\nred/0.png,0.25\nred/1.png,01\nred/2.png,1\nred/3.png,NA\n")
    assert data.load(f"csv:{file}").classes == ("01", "1", "0.25", "NA")  # the written text is the class
    with pytest.raises(DataError, match="no such file"):
        data.load(f"csv:{folder / 'nothing.csv'}")
    file.write_text("image,label\nred/0.png,1\nred/1.png,1\n")
    with pytest.raises(DataError, match="no text column among image, label"):
        data.load(f"csv:{file}", task="aligned")


def test_parquet_with_bytes_and_captions_is_read(folder):
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
    assert pairs.accounts.counts("rows") == (30, 29, 1)
    # As in a manifest, a picture without a caption is kept apart, and an empty caption is listed.
    assert len(pairs.unpaired) == 2
    assert any("the text of caption is empty in 1 of 30 rows" in note for note in pairs.notes)
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
    with pytest.raises(DataError, match=r"bad\.parquet: not a Parquet file that can be read"):
        data.load(f"parquet:{folder.parent / 'bad.parquet'}")


def test_parquet_written_by_datasets_is_read(folder):
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder.parent / "hf"))["train"]
    table.to_parquet(folder.parent / "hf.parquet")
    found = data.load(f"parquet:{folder.parent / 'hf.parquet'}?size=16")
    assert found.classes == ("blue", "green", "red")
    assert right_colours(found.train, found.classes)


def test_webdataset_with_several_kinds_of_images_is_read(folder):
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
    with pytest.raises(DataError, match="outside the greys"):
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
    source, out = f"imagefolder:{folder}?size=8&valid=0.2", tmp_path / "runs"

    def stop(self):
        raise RuntimeError("the lights go out")

    with monkeypatch.context() as m:
        m.setattr(Learner, "end_step", stop)
        with pytest.raises(RuntimeError, match="lights"):
            training.train(
                "isogclr", catalog.load_system("isogclr").config(**settings), data=source, out=out, name="r", say=str
            )
    (out / "r" / "last.ckpt").write_bytes(b"")  # as if it had been saved
    for file in sorted(folder.rglob("*.*"))[:4]:
        file.unlink()
    with pytest.raises(DataError, match="this run was begun on"):
        training.resume(out / "r", say=str)


def test_a_cell_that_is_no_path_is_a_data_error(tmp_path):
    """A column of texts taken for one of paths: longer than a file's name may be."""
    with pytest.raises(DataError, match="not a picture"):
        decode(tmp_path / ("word " * 100), 8)
