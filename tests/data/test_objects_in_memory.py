"""Data that are objects in memory: every kind, their splits, their digest, and what is refused."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

import counterpoint as cp
from counterpoint import data as sources
from counterpoint.data.images import ImageData
from counterpoint.data.memory import Own, plain, same_again
from counterpoint.data.own.objects import Held, file_of
from counterpoint.data.pairs import AlignedData
from counterpoint.errors import CounterpointError, DataError

COUNT = 90
WORDS = ["red", "green", "blue"]
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
KINDS = np.arange(COUNT) % 3
CAPTIONS = [f"a {WORDS[n % 3]} thing {n}" for n in range(COUNT)]
VECTORS = np.random.default_rng(1).normal(size=(COUNT, 5)).astype(np.float32)


class Labelled(Dataset):
    """Pictures with numbers of classes, as torchvision's."""

    classes = WORDS

    def __init__(self, form="tensor"):
        self.form = form

    def __len__(self):
        return COUNT

    def __getitem__(self, n):
        tensor = torch.from_numpy(PICTURES[n]).permute(2, 0, 1)
        picture = {"tensor": tensor / 255, "bytes": tensor, "pil": Image.fromarray(PICTURES[n])}[self.form]
        return picture, int(KINDS[n])


class Captioned(Dataset):
    """Dictionaries of modalities."""

    def __len__(self):
        return COUNT

    def __getitem__(self, n):
        return {"image": Image.fromarray(PICTURES[n]), "caption": CAPTIONS[n], "imu": torch.from_numpy(VECTORS[n])}


def frame():
    pandas = pytest.importorskip("pandas")
    pictures = [Image.fromarray(picture) for picture in PICTURES]
    columns = {"image": pictures, "caption": CAPTIONS, "imu": list(VECTORS), "label": [WORDS[k] for k in KINDS]}
    return pandas.DataFrame(columns)


def hugging():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=WORDS),
            "caption": datasets.Value("string"),
            "imu_vector": datasets.Sequence(datasets.Value("float32")),
        }
    )
    rows = {
        "photo": [Image.fromarray(p) for p in PICTURES],
        "kind": KINDS.tolist(),
        "caption": CAPTIONS,
        "imu_vector": VECTORS.tolist(),
    }
    return datasets.Dataset.from_dict(rows, features=features)


OBJECTS = {
    "tuple of arrays": lambda: (PICTURES, KINDS),
    "dictionary of arrays": lambda: {"image": PICTURES, "label": [WORDS[k] for k in KINDS]},
    "list of pictures": lambda: {"image": [Image.fromarray(p) for p in PICTURES], "label": KINDS},
    "list of records": lambda: [
        {"image": Image.fromarray(p), "label": WORDS[k]} for p, k in zip(PICTURES, KINDS, strict=True)
    ],
    "DataFrame": frame,
    "datasets.Dataset": hugging,
    "torch Dataset of floats": Labelled,
    "torch Dataset of bytes": lambda: Labelled("bytes"),
    "torch Dataset of Pillow images": lambda: Labelled("pil"),
}


def read(split) -> dict[bytes, int]:
    """Return the pictures of a split, with their classes."""
    rows = np.arange(len(split))
    labels = split.labels if split.labels is not None else [-1] * len(rows)
    return {picture.tobytes(): int(label) for picture, label in zip(split.images(rows), labels, strict=True)}


def apart(parts) -> bool:
    """Return whether no two of three sets share anything."""
    return len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts))


@pytest.mark.parametrize("name", OBJECTS)
def test_every_kind_of_object_gives_the_same_pictures_classes_and_splits(name):
    own = cp.own(OBJECTS[name](), size=16)
    found = own.load("views")
    assert isinstance(found, ImageData)
    assert (len(found.train), len(found.valid), len(found.test)) == (66, 6, 18)
    wanted = {picture.tobytes(): WORDS[kind] for picture, kind in zip(PICTURES, KINDS, strict=True)}
    names = dict(zip("012", WORDS, strict=True)) | dict(zip(WORDS, WORDS, strict=True))
    for part in (found.train, found.valid, found.test):
        for picture, kind in read(part).items():
            assert names[found.classes[kind]] == wanted.pop(picture)
    assert wanted == {}


@pytest.mark.parametrize("name", ["DataFrame", "datasets.Dataset", "torch Dataset", "dictionary of arrays"])
def test_aligned_modalities_of_every_kind_of_object(name):
    make = {
        "DataFrame": lambda: cp.own(frame(), columns={"image": "image", "caption": "text", "imu": "vector"}, size=16),
        "datasets.Dataset": lambda: cp.own(hugging(), size=16),
        "torch Dataset": lambda: cp.own(Captioned(), size=16),
        "dictionary of arrays": lambda: cp.own({"image": PICTURES, "caption": CAPTIONS, "imu": VECTORS}),
    }
    found = make[name]().load("aligned")
    assert isinstance(found, AlignedData)
    assert sorted(spec.kind for spec in found.modalities.values()) == ["image", "text", "vector"]
    picture, text, vector = sorted(found.modalities, key=lambda m: found.modalities[m].kind)
    seen = 0
    for part in (found.train, found.valid, found.test):
        rows = np.arange(len(part))
        for pixels, caption, values in zip(
            part.column(picture, rows), part.column(text, rows), part.column(vector, rows), strict=True
        ):
            n = CAPTIONS.index(caption)
            np.testing.assert_array_equal(pixels, PICTURES[n])
            np.testing.assert_allclose(values, VECTORS[n])
            seen += 1
    assert seen == COUNT


def test_equal_pictures_and_rows_of_a_group_stay_in_one_split():
    twice = np.concatenate([PICTURES, PICTURES])
    found = cp.own((twice, np.concatenate([KINDS, KINDS]))).load("views")
    parts = [set(read(part)) for part in (found.train, found.valid, found.test)]
    assert all(parts)
    assert apart(parts)
    groups = np.arange(COUNT) // 6
    table = dict(zip([p.tobytes() for p in PICTURES], groups.tolist(), strict=True))
    for given in (groups, groups.tolist()):
        found = cp.own((PICTURES, KINDS), groups=given).load("views")
        parts = [{table[picture] for picture in read(part)} for part in (found.train, found.valid, found.test)]
        assert all(parts)
        assert apart(parts)
    named = cp.own({"image": PICTURES, "label": KINDS, "patient": groups}, groups="patient").load("views")
    assert {len(named.train), len(named.valid), len(named.test)} == {
        len(found.train),
        len(found.valid),
        len(found.test),
    }


def test_given_splits_are_taken_and_what_they_share_is_said():
    parts = {"train": (PICTURES[:60], KINDS[:60]), "test": (PICTURES[50:], KINDS[50:])}
    found = cp.own(parts).load("views")
    assert len(found.test) == 40
    assert len(found.train) + len(found.valid) == 60
    assert any("of 40 test items" in note and "too good" in note for note in found.notes)
    split = ["train"] * 50 + ["valid"] * 20 + ["test"] * 20
    found = cp.own({"image": PICTURES, "label": KINDS, "split": split}).load("views")
    assert (len(found.train), len(found.valid), len(found.test)) == (50, 20, 20)
    datasets = pytest.importorskip("datasets")
    rows = hugging()
    both = datasets.DatasetDict(train=rows.select(range(70)), test=rows.select(range(70, 90)))
    assert len(cp.own(both).load("views").test) == 20


def test_a_subset_keeps_the_names_of_classes():
    found = cp.own(Subset(Labelled(), range(50))).load("views")
    assert found.classes == tuple(WORDS)


def test_sizes_come_from_arrays_or_are_chosen():
    assert cp.own(PICTURES).load("views").size == 16
    assert cp.own(PICTURES, size=24).load("views").size == 24
    assert cp.own({"image": [Image.fromarray(p) for p in PICTURES]}).load("views").size == 64
    assert cp.own(PICTURES[..., 0]).load("views").train.images(np.arange(2)).shape == (2, 16, 16, 3)
    assert cp.own(torch.from_numpy(PICTURES)).load("views").size == 16


def test_sounds_are_arrays_at_the_rate():
    waves = np.random.default_rng(0).uniform(-1, 1, (40, 800)).astype(np.float32)
    found = cp.own({"audio": waves, "vector": VECTORS[:40]}, rate=1000, seconds=0.5).load("aligned")
    assert found.modalities["audio"].samples == 500
    assert found.train.column("audio", np.arange(3)).shape == (3, 500)


def test_what_is_missing_in_a_row_is_missing_in_the_item():
    pandas = pytest.importorskip("pandas")
    table = frame()[["image", "caption", "imu"]]
    table["caption"] = table["caption"].astype("string")
    table.loc[:9, "caption"] = pandas.NA
    found = cp.own(table, columns="image:image,caption:text,imu:vector").load("aligned")
    lacking = sum(
        int((~part.present("caption", np.arange(len(part)))).sum()) for part in (found.train, found.valid, found.test)
    )
    assert lacking == 10


def test_files_that_a_frame_names_are_read_from_the_working_folder(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    for n, picture in enumerate(PICTURES[:40]):
        Image.fromarray(picture).save(tmp_path / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    table = pandas.DataFrame({"path": [f"{n}.png" for n in range(40)], "label": KINDS[:40]})
    found = cp.own(table, size=16, columns="path:image,label:label").load("views")
    assert set(read(found.train)) < {picture.tobytes() for picture in PICTURES[:40]}
    table.loc[3, "path"] = "gone.png"
    found = cp.own(table, size=16, columns="path:image,label:label").load("views")
    assert any("no such file" in note and "pandas.DataFrame row 4" in note for note in found.notes)


def test_a_list_of_files_is_pictures(tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(30)]
    for file, picture in zip(files, PICTURES, strict=False):
        Image.fromarray(picture).save(file)
    found = cp.own(files, size=16).load("views")
    assert set(read(found.train)) < {picture.tobytes() for picture in PICTURES[:30]}
    assert found.train.labels is None


# --- names and digests


def test_the_digest_is_of_the_contents_alone_and_the_same_in_every_process():
    own = cp.own((PICTURES, KINDS))
    assert cp.own((PICTURES.copy(), KINDS.tolist())).digest == own.digest
    changed = PICTURES.copy()
    changed[5, 3, 3, 0] ^= 1
    assert cp.own((changed, KINDS)).digest != own.digest
    assert cp.own((PICTURES, KINDS[::-1])).digest != own.digest
    code = (
        "import numpy as np, counterpoint as cp;"
        "x = np.random.default_rng(0).integers(0, 256, (90, 16, 16, 3), np.uint8);"
        "print(cp.own((x, np.arange(90) % 3)).spec)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == own.spec


def test_rows_of_a_dataset_that_is_selected_have_the_digest_of_a_copy():
    rows = hugging()
    assert cp.own(rows.select(range(COUNT))).digest == cp.own(rows).digest
    assert cp.own(rows.select(range(COUNT - 1, -1, -1))).digest != cp.own(rows).digest


def test_a_name_leads_to_the_object_while_somebody_holds_it():
    own = cp.own((PICTURES, KINDS))
    assert sources.load(own.spec, task="views") is own.load("views")
    spec = own.spec
    del own
    with pytest.raises(
        CounterpointError, match=r"the data was an object in memory: arrays of 90 rows .* Pass the same object"
    ):
        sources.load(spec, task="views")


def test_the_same_object_is_known_again_with_its_options():
    own = cp.own((PICTURES, KINDS), size=24, test=0.3)
    assert same_again(own.spec, (PICTURES, KINDS)).spec == own.spec
    assert same_again(own.spec, own) is own
    with pytest.raises(DataError, match="this is other data than the run's"):
        same_again(own.spec, (PICTURES[:-1], KINDS[:-1]))
    grouped = cp.own((PICTURES, KINDS), groups=KINDS)
    with pytest.raises(CounterpointError, match=r"pass it as counterpoint.own\(OBJECT, groups=\.\.\.\)"):
        same_again(grouped.spec, (PICTURES, KINDS))
    assert same_again(grouped.spec, cp.own((PICTURES, KINDS), groups=KINDS)).spec == grouped.spec


def test_data_in_the_form_of_a_task_are_taken_as_they_are():
    made = cp.own((PICTURES, KINDS)).load("views")
    own = cp.own(made)
    assert own.load("views") is made
    assert own.rows == COUNT
    with pytest.raises(DataError, match="ImageData does not fit this system, which learns from AlignedData"):
        own.load("aligned")
    assert cp.own(cp.own((PICTURES[::-1].copy(), KINDS)).load("views")).digest != own.digest


# --- bags


def bags(count=40):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 7, count)
    rows = {
        name: [rng.normal(size=(n, width)).astype(np.float32) for n in lengths]
        for name, width in (("visual", 4), ("audio", 3))
    }
    return {**rows, "label": (np.arange(count) % 2).tolist()}


def test_bags_are_split_with_their_truth():
    value = bags()
    value["truth"] = [np.arange(len(v)) % 2 * label for v, label in zip(value["visual"], value["label"], strict=True)]
    found = cp.own(value).load("bags")
    assert (len(found.train), len(found.valid), len(found.test)) == (28, 4, 8)
    assert (found.visual_dim, found.audio_dim) == (4, 3)
    video = next(v for v in found.test if v.label)
    assert len(video.truth) == 16 * video.visual.shape[1]
    assert video.truth[16:32].all()
    assert not video.truth[:16].any()
    assert {v.label for v in found.test} == {0, 1}


def test_equal_bags_and_bags_of_a_group_stay_in_one_split():
    value = bags()
    twice = {name: [*column, *column] for name, column in value.items()}
    found = cp.own(twice).load("bags")
    seen = [{np.asarray(b.audio).tobytes() for b in part} for part in (found.train, found.valid, found.test)]
    assert apart(seen)
    groups = [n // 4 for n in range(40)]
    found = cp.own({**value, "group": groups, "name": [str(n) for n in range(40)]}).load("bags")
    seen = [{groups[int(b.name)] for b in part} for part in (found.train, found.valid, found.test)]
    assert all(seen)
    assert apart(seen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": [2] * 40}, "labels must be 0"),
        ({"label": [1] * 39}, "39 labels and 40 of visual"),
        ({"truth": [[2]] * 40}, r"the truth of bag \d+ must be"),
        ({"colour": [0] * 40}, "unknown column of bags 'colour'"),
        ({"audio": [np.zeros((9, 3), np.float32)] * 40}, "audio snippets; pass equal numbers"),
        ({"audio": [np.full((3, 3), np.nan, np.float32)] * 40}, "must be finite numbers"),
    ],
)
def test_bags_that_do_not_fit_are_refused(change, said):
    with pytest.raises(CounterpointError, match=said):
        cp.own({**bags(), **change}).load("bags")


# --- what is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


class Odd(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, n):
        return object()


class Normalised(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, n):
        return torch.full((3, 8, 8), -1.5), 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: 5, r"data is a int, which is not supported; give a source's name.* see help\(counterpoint\.own\)"),
        (lambda: [1, 2], "data is a list"),
        (list, "data is a list"),
        (Stream, "Stream is a torch dataset without length"),
        (Odd, "item 0: holds a object, which shows no role"),
        (Normalised, "item 0: a float tensor must be a picture with values in 0..1.*remove Normalize"),
        (lambda: PICTURES.astype(np.float64), "pictures are uint8"),
        (lambda: torch.zeros(4, 3, 8, 8), r"give pictures as uint8 \[N, H, W, 3\], such as x\.permute"),
        (lambda: (PICTURES,), r"a tuple must be \(pictures, labels\), got 1 part;"),
        (lambda: (PICTURES, KINDS[:3]), "the columns differ in length: image 90, label 3"),
        (lambda: {"image": "a.png"}, "give an array or a list"),
        (lambda: (PICTURES[:0], KINDS[:0]), "has no rows"),
    ],
)
def test_objects_of_no_known_form_are_refused(make, said):
    with pytest.raises(DataError, match=said):
        cp.own(make())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sise": 3}, "unknown option of data in memory 'sise'; did you mean size"),
        ({"size": 3}, "size is the pictures' height and width"),
        ({"groups": "patient"}, "unknown column of groups 'patient'"),
        ({"groups": [1, 2]}, "90 rows have 2 groups"),
        ({"columns": "image:picture"}, "unknown kind of the column 'image' 'picture'"),
        ({"columns": "photo:image,label:label"}, "no column 'photo'"),
        ({"valid": 0.0}, r"valid=0\.0 leaves a valid split that is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused_without_question_marks(options, said):
    with pytest.raises(CounterpointError, match=said) as caught:
        cp.own({"image": PICTURES, "text": CAPTIONS, "label": KINDS}, **options).load("aligned")
    assert not re.search(r"\?\w+=", str(caught.value))


def test_messages_are_put_in_the_words_of_python():
    assert plain("use --batch-size 3, or ?valid=0.2") == "use batch_size 3, or valid=0.2"
    kept = "finish it first: counterpoint train --resume runs/x"
    assert plain(kept) == kept


def test_a_picture_in_memory_can_be_sent_to_another_process():
    held = Held(PICTURES[0])
    assert pickle.loads(pickle.dumps(held)).read() == held.read()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_pictures_of_every_mode_become_files_without_loss(mode):
    from counterpoint.data.images import decode, square

    base = Image.fromarray(PICTURES[0])
    picture = Image.fromarray(PICTURES[0, :, :, 0].astype(np.uint16) * 257) if mode == "I;16" else base.convert(mode)
    np.testing.assert_array_equal(decode(file_of(picture), 16), square(picture, 16))


def test_a_picture_of_ycbcr_is_no_tiff():
    """Pillow below 13 writes a TIFF of this mode that it cannot read."""
    assert file_of(Image.fromarray(PICTURES[0]).convert("YCbCr")).startswith(b"P6")


def test_a_picture_is_turned_upright_as_its_file_would_be(tmp_path):
    from counterpoint.data.images import decode

    picture = Image.fromarray(PICTURES[0])
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    np.testing.assert_array_equal(decode(file_of(opened), 16), decode(tmp_path / "turned.png", 16))
    assert not np.array_equal(decode(file_of(opened), 16), PICTURES[0])


def test_an_own_is_taken_as_it_is():
    own = cp.own(PICTURES)
    assert Own.of(own) is own
    assert "arrays of 90 rows" in repr(own)
