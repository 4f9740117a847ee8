"""Tables, archives and folders of the user's own: what is the same, what quotation marks mean, what names mean, accounts."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint import data
from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.images import Listed
from counterpoint.data.manifest import load_manifest
from counterpoint.data.own.places import file_splits, matches
from counterpoint.data.tables import load_csv, load_imagefolder, load_webdataset
from counterpoint.errors import DataError
from counterpoint.tasks.aligned import AlignedEvaluator

pytestmark = pytest.mark.usefixtures("undivided")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def encoded(n: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(encoded(n))


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return str(path)


def said(data) -> str:
    return "\n".join(data.notes)


# --- what is the same


def measured(found, **embeddings):
    evaluator = AlignedEvaluator(found)
    there = {name: torch.from_numpy(found.test.present(name, np.arange(len(found.test)))) for name in found.modalities}
    evaluator.update({"part": "items", "split": "", "present": there, "label": None}, {"embedding": embeddings})
    return evaluator.compute()


def test_five_captions_of_a_picture_are_all_right_for_it(tmp_path):
    pictures(tmp_path, 12)
    # The last picture stands there as a copy of another name too.
    (tmp_path / "copy.png").write_bytes(encoded(11))
    rows = [
        {"image": "copy.png" if n == 11 and k == 4 else f"{n}.png", "caption": f"way {k} of {n}", "split": "test"}
        for n in range(12)
        for k in range(5)
    ]
    rows += [{"image": "0.png", "caption": "something else", "split": "train"}] * 2
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    z = torch.eye(12).repeat_interleave(5, 0)
    values = measured(found, image=z, caption=z)
    assert values["image_to_caption_r1"] == values["caption_to_image_r1"] == values["mean_recall"] == 1.0
    wrong = measured(found, image=z, caption=z.roll(5, 0))
    assert wrong["image_to_caption_r1"] == wrong["caption_to_image_r1"] == 0.0
    assert "of 60 test items 5 the image is that of a training item too" in said(found)


def test_one_caption_of_two_pictures_is_right_for_both_and_for_no_third(tmp_path):
    pictures(tmp_path, 6)
    rows = [{"image": f"{n}.png", "caption": "one and the same" if n < 2 else f"word {n}"} for n in range(6)]
    rows = [row | {"split": "test"} for row in rows] + [{"image": "0.png", "caption": "x", "split": "train"}] * 2
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    images, captions = torch.eye(6), torch.eye(6)[[0, 0, 2, 3, 4, 5]]
    values = measured(found, image=images, caption=captions)
    assert values["image_to_caption_r1"] == pytest.approx(5 / 6)  # the second picture's own place is empty
    assert values["caption_to_image_r1"] == 1.0
    # Sharing reaches no further than one step: 2 has nothing in common with 0 or 1.
    far = measured(found, image=torch.eye(6)[[2, 1, 2, 3, 4, 5]], caption=captions)
    assert far["caption_to_image_r1"] < 1.0


def test_of_three_modalities_only_the_two_at_hand_count(tmp_path):
    pictures(tmp_path, 4)
    rows = [
        {"image": f"{n}.png", "caption": f"word {n}", "vector": [float(n // 2), 1.0], "split": split}
        for split in ("test", "train")
        for n in range(4)
    ]
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    x, pairs = torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]
    values = measured(found, image=x, caption=pairs, vector=pairs)
    # Vectors of 0 and 1 are the same, pictures and captions are not.
    assert (values["image_to_caption_r1"], values["image_to_vector_r1"]) == (0.0, 1.0)


def test_splits_made_here_keep_together_what_shares_anything(tmp_path):
    pictures(tmp_path, 40)
    (tmp_path / "again.png").write_bytes(encoded(3))
    rng = np.random.default_rng(0)
    rows = [{"image": f"{n}.png", "caption": f"word {n}", "label": "ab"[n % 2]} for n in range(40) for _ in range(2)]
    for n in range(0, 80, 9):
        rows[n]["caption"] = f"shared {rng.integers(3)}"
    rows[20]["image"] = "again.png"
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    for name in ("image", "caption"):
        assert not set(found.train.same(name)) & set(found.test.same(name))
    assert 12 <= len(found.test) <= 20
    assert abs(int((found.test.labels == 0).sum()) - int((found.test.labels == 1).sum())) <= 4
    assert len(set(found.train.same("image")) | set(found.test.same("image"))) == 40


def test_folders_keep_copies_of_a_picture_together(tmp_path):
    for n in range(24):
        (tmp_path / "mine" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "ab"[n % 2] / f"{n}.png").write_bytes(encoded(n // 4))
    found = load_imagefolder(str(tmp_path / "mine"), size=8)
    assert not set(found.train.same) & set(found.test.same)
    assert len(set(found.train.same) | set(found.test.same)) == 6


def test_items_that_are_all_linked_by_a_caption_are_split_with_a_note(tmp_path):
    pictures(tmp_path, 20)
    rows = [{"image": f"{n}.png", "caption": "the same"} for n in range(20)]
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    assert (len(found.train), len(found.test)) == (16, 4)
    assert "separates items of the same text" in said(found)


# --- notes


def test_few_captions_and_few_items_draw_notes(tmp_path):
    pictures(tmp_path, 200)
    few = [{"image": f"{n}.png", "caption": f"word {n % 8}", "split": "test" if n < 9 else "train"} for n in range(200)]
    found = load_manifest(jsonl(tmp_path / "few.jsonl", few), size=8)
    assert "8 different values of caption stand in 191 training items" in said(found)
    assert "too few to learn from" not in said(found)
    dozen = [{"image": f"{n}.png", "caption": f"word {n}"} for n in range(15)]
    found = load_manifest(jsonl(tmp_path / "dozen.jsonl", dozen), size=8)
    assert "12 training items are too few to learn from" in said(found)
    assert "different values" not in said(found)


def test_columns_that_are_taken_by_their_names_are_named(tmp_path):
    pictures(tmp_path, 10)
    rows = [{"photo": f"{n}.png", "title": f"a {n}", "label": "x", "colour": "red"} for n in range(10)]
    found = load_manifest(jsonl(tmp_path / "m.jsonl", rows), size=8)
    assert "'photo' as image, 'title' as text, 'label' as label; ?columns=" in said(found)
    found = load_manifest(str(tmp_path / "m.jsonl"), size=8, columns="photo:image,title:text")
    assert "by their names" not in said(found)


# --- cells


def test_cells_of_text_are_what_they_are(tmp_path):
    pictures(tmp_path, 12)
    words = ["NA", "null", "None", "nan", "NaN", "True", "01", "1", "1e5", "0x1", "#N/A", "-"]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["image", "caption", "label"])
        out.writerows([f"{n}.png", word, word] for n, word in enumerate(words))
    for found, name in (
        (load_csv(str(tmp_path / "m.csv"), task="aligned", size=8), "text"),
        (load_manifest(str(tmp_path / "m.csv"), size=8), "caption"),
    ):
        for split in (found.train, found.test):
            texts = split.column(name, np.arange(len(split)))
            assert [found.classes[n] for n in split.labels] == texts
        assert sorted(found.classes) == sorted(words)


def test_a_table_that_changed_under_its_old_time_is_read_anew(tmp_path):
    pictures(tmp_path, 10)
    for word in ("old", "new"):
        (tmp_path / "m.csv").write_text("image,caption\n" + "".join(f"{n}.png,{word} {n}\n" for n in range(10)))
        os.utime(tmp_path / "m.csv", (1e9, 1e9))
        found = load_csv(str(tmp_path / "m.csv"), task="aligned", size=8)
        assert all(text.startswith(word) for text in found.train.column("text", np.arange(len(found.train))))


MARKS = {
    "an unpaired mark at the start": ('"the blue one', '"the blue one'),
    "marks in the middle": ('a dog called "Rex"', 'a dog called "Rex"'),
    "a mark at the end": ('a pipe of 3"', 'a pipe of 3"'),
    "a quotation that goes on": ('"Hello" she said', '"Hello" she said'),
    "a quoted delimiter": ('"a{d}b"', "a{d}b"),
    "doubled marks": ('"say ""so"""', 'say "so"'),
    "a quoted line break": ('"two\nlines"', "two\nlines"),
    "quoted lines with delimiters": ('"one{d} two\nthree"', "one{d} two\nthree"),
    "empty quotes": ('""', ""),
}


@pytest.mark.parametrize(("name", "between"), [("m.csv", ","), ("m.tsv", "\t"), ("m.txt", ";")])
def test_quotation_marks_are_cells_only_where_they_enclose_one(tmp_path, name, between):
    pictures(tmp_path, 40)
    wanted = {n: f"thing {n}" for n in range(40)}
    lines = [f"thing {n}" for n in range(40)]
    for at, (written, read) in enumerate(MARKS.values()):
        for n in (3 + at, 25 + at):
            lines[n], wanted[n] = written.format(d=between), read.format(d=between)
    text = f"image{between}caption\n" + "".join(f"{n}.png{between}{line}\n" for n, line in enumerate(lines))
    (tmp_path / name).write_text(text)
    found = load_csv(str(tmp_path / name), task="aligned", size=8)
    texts = {}
    for split in filter(None, (found.train, found.test, found.unpaired)):
        rows = np.arange(len(split))
        files = split.files(rows, "image")
        texts |= {int(Path(f).stem): t for f, t in zip(files, split.column("text", rows), strict=True)}
    assert texts == wanted
    assert "the quotation marks of 4 lines are read as text" in said(found)
    assert found.accounts.counts("rows") == (40, 40, 0)


def test_a_mark_that_closes_far_below_swallows_no_rows(tmp_path):
    pictures(tmp_path, 30)
    rows = [f"{n}.png\tthing {n}" for n in range(30)]
    rows[5], rows[20] = '5.png\t"the one', '20.png\tthing of 20"'
    (tmp_path / "m.tsv").write_text("image\tcaption\n" + "\n".join(rows) + "\n")
    found = load_manifest(str(tmp_path / "m.tsv"), size=8)
    assert found.accounts.counts("rows") == (30, 30, 0)


# --- archives


def test_what_the_first_samples_lack_is_read_all_the_same(tmp_path):
    members = [
        (f"{n:03d}.{ending}", content)
        for n in range(20)
        for ending, content in (("png", encoded(n)), ("txt", b"word %d" % n), ("cls", b"ab"[n % 2 : n % 2 + 1]))
        if not (ending == "cls" and n < 6) and not (ending == "txt" and n == 2)
    ]
    place = tar(tmp_path / "a.tar", members)
    found = load_webdataset(place, task="aligned", size=8)
    assert found.classes == ("a", "b")
    assert sorted([*found.train.labels, *found.test.labels, *found.unpaired.labels]) == [-1] * 6 + [0] * 7 + [1] * 7
    assert (len(found.train) + len(found.test), len(found.unpaired)) == (19, 1)
    views = load_webdataset(place, size=8)
    assert (len(views.train) + len(views.test), views.classes) == (20, ("a", "b"))


def test_archives_of_one_kind_each_are_parts_of_the_same_samples(tmp_path):
    tar(tmp_path / "pictures.tar", [(f"x/{n}.{'png' if n % 2 else 'jpg'}", encoded(n)) for n in range(12)])
    tar(tmp_path / "texts.tar", [(f"x/{n}.txt", b"word %d" % n) for n in reversed(range(12))])
    found = load_manifest(str(tmp_path / "*.tar"), size=8)
    assert len(found.train) + len(found.test) == 12
    for split in (found.train, found.test):
        rows = np.arange(len(split))
        wanted = [np.asarray(Image.open(io.BytesIO(encoded(int(t.split()[1]))))) for t in split.column("text", rows)]
        np.testing.assert_array_equal(split.column("image", rows), wanted)
    # Shards that count anew each hold samples of their own.
    for shard in range(2):
        tar(tmp_path / f"s-{shard}.tar", [(f"{n}.{e}", c) for n in range(8) for e, c in (
            ("png", encoded(100 * shard + n)), ("txt", b"%d %d" % (shard, n)))])  # fmt: skip
    found = load_webdataset(str(tmp_path / "s-*.tar"), task="aligned", size=8)
    assert len(found.train) + len(found.test) == 16


def test_braces_and_colons_name_shards_as_webdataset_does(tmp_path):
    for shard in range(12):
        tar(tmp_path / f"s-{shard:03d}.tar", [(f"{shard}-{n}.{e}", c) for n in range(4) for e, c in (
            ("png", encoded(10 * shard + n)), ("txt", b"%d %d" % (shard, n)))])  # fmt: skip

    def shards(place):
        found = load_manifest(f"{tmp_path}/{place}", size=8)
        texts = [
            t for part in (found.train, found.valid, found.test) for t in part.column("text", np.arange(len(part)))
        ]
        return sorted({int(text.split()[0]) for text in texts})

    assert shards("s-{008..010}.tar") == [8, 9, 10]
    assert shards("s-{000,011}.tar") == [0, 11]
    assert shards(f"s-00{{1..2}}.tar::{tmp_path}/s-01*.tar") == [1, 2, 10, 11]
    with pytest.raises(DataError, match=r"s-\{010..013\}.tar: .*s-012.tar: no such file, folder or pattern"):
        shards("s-{010..013}.tar")
    with pytest.raises(DataError, match="names more than 1,000,000 files"):
        shards("s-{0..999}{0..1000}.tar")
    tar(
        tmp_path / "{1..2}.tar",
        [(f"{n}.{e}", c) for n in range(6) for e, c in (("png", encoded(n)), ("txt", b"77 %d" % n))],
    )
    assert shards("{1..2}.tar") == [77]  # a name that exists is no pattern


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_what_can_be_read_of_a_damaged_archive_is_read(tmp_path, damage):
    place = Path(tar(tmp_path / "a.tar", [m for n in range(20) for m in (
        (f"{n:02d}.png", encoded(n)), (f"{n:02d}.txt", b"word %d" % n))]))  # fmt: skip
    content = place.read_bytes()
    at = content.index(b"15.png")
    place.write_bytes(content[: at + 600] if damage == "cut" else content[:at] + b"\xff" * 512 + content[at + 512 :])
    found = load_manifest(str(place), size=8)
    assert len(found.train) + len(found.test) == 15
    assert "1 the archive is damaged" in said(found)
    assert found.accounts.missing() == {}


# --- names and places


def test_names_are_splits_only_where_nothing_else_is_there(tmp_path):
    def opened(*names, **options):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for n, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(encoded(n))
        return load_imagefolder(str(root), size=8, **options)

    classes = [f"{c}/{i}.png" for c in ("bus", "train", "test") for i in range(8)]
    found = opened(*classes)
    assert found.classes == ("bus", "test", "train")
    assert len(found.train) + len(found.test) == 24
    assert "the folders test, train are taken for classes" in said(found)
    found = opened(*[f"{s}/{c}/{i}.png" for s in ("Train", "val") for c in ("cat", "dog") for i in range(4)])
    assert (found.classes, len(found.train), len(found.test)) == (("cat", "dog"), 8, 8)
    deep = opened(*[f"{c}/{i}.png" for c in ("cat", "dog") for i in range(8)], "cat/a/b/test 9.png")
    assert (deep.classes, int((deep.train.labels == 0).sum() + (deep.test.labels == 0).sum())) == (("cat", "dog"), 9)
    assert file_splits("d", [Path("d/train-0.csv"), Path("d/test.csv")])[0] == ["train", "test"]
    assert file_splits("d", [Path("d/test shots.csv"), Path("d/more.csv")]) == (["", ""], [])
    assert file_splits("d", [Path("d/test.csv"), Path("d/more.csv")])[1] != []


def test_a_stray_picture_does_not_make_classes_of_splits(tmp_path):
    for n, name in enumerate([f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(4)]):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(encoded(n))
    (tmp_path / "a" / "stray.png").write_bytes(encoded(99))
    found = load_imagefolder(str(tmp_path / "a"), size=8)
    assert (found.classes, len(found.train), len(found.test)) == (("cat", "dog"), 9, 8)
    assert sorted(found.train.labels.tolist()) == [-1, *[0] * 4, *[1] * 4]
    assert "the folders test, train are splits, not classes" in said(found)
    assert "1 picture stands beside the folders" in said(found)


def test_folders_without_one_to_train_on_are_classes(tmp_path):
    for n, name in enumerate([f"{c}/{i}.png" for c in ("test", "val") for i in range(6)]):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(encoded(n))
    found = load_imagefolder(str(tmp_path / "a"), size=8)
    assert found.classes == ("test", "val")
    assert "none of them is the training split" in said(found)
    with pytest.raises(DataError, match=r"^https://x\.org/a is on the net"):
        load_imagefolder("https://x.org/a")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"in any format that Pillow reads$"):
        load_imagefolder(str(tmp_path / "b"))


@pytest.mark.parametrize("header", [",image,caption", "image,caption,", ",image,caption,"])
def test_columns_without_a_name_are_not_read(tmp_path, header):
    cells = [[name and f"{n}.png" if name == "image" else f"w {n}" for name in header.split(",")] for n in range(8)]
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(encoded(n))
    (tmp_path / "m.csv").write_text("\n".join([header, *(",".join(row) for row in cells)]))
    found = load_manifest(str(tmp_path / "m.csv"), size=8)
    assert sorted([*found.train.column("caption", np.arange(len(found.train)))]) != []
    assert list(found.modalities) == ["image", "caption"]
    assert "no name and is not read" in said(found) or "without a name are not read" in said(found)


@pytest.mark.parametrize("name", ["g [2024]", "a*b", "a::b", "a{0..2}", "a{b,c}", "w?t=1", "#1 %20", "..x"])
def test_marks_of_patterns_in_a_name_that_exists_are_part_of_it(tmp_path, name):
    for letter in "ab":
        pictures(tmp_path / name / letter, 6)
        for n in range(6):
            (tmp_path / name / letter / f"{n}.png").write_bytes(encoded(100 * ord(letter) + n))
    (tmp_path / name / "m.csv").write_text("image,caption\n" + "".join(f"a/{n}.png,w {n}\n" for n in range(6)))
    assert len(data.load(f"imagefolder:{tmp_path / name}?size=8").classes) == 2
    for place in (tmp_path / name / "m.csv", tmp_path / name / "*.csv"):
        found = data.load(f"csv:{place}?size=8", task="aligned")
        assert len(found.train) + len(found.test) == 6
    assert matches(str(tmp_path / name / "*" / "[12].png")) == [
        tmp_path / name / letter / f"{n}.png" for letter in "ab" for n in (1, 2)
    ]


def test_what_is_on_the_net_or_cannot_be_looked_into_is_named_as_that(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"https://example\.org/a\.csv is on the net; download it"):
        load_csv("https://example.org/a.csv")
    (tmp_path / "mine").mkdir()
    real = os.scandir

    def refused(place):
        if os.fspath(place) == str(tmp_path / "mine"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", refused)
    for load in (load_imagefolder, load_csv, load_manifest):
        with pytest.raises(DataError, match=r"mine cannot be read \(Permission denied\)"):
            load(str(tmp_path / "mine"))


def test_one_file_that_cannot_be_read_among_many_is_left_out(tmp_path):
    pictures(tmp_path, 10)
    rows = "".join(f"{n}.png,word {n}\n" for n in range(10))
    (tmp_path / "a.csv").write_text("image,caption\n" + rows)
    (tmp_path / "b.csv").write_bytes("image,caption\n1.png,é\n".encode("latin-1"))
    (tmp_path / "c.csv").touch()
    found = load_csv(str(tmp_path), task="aligned", size=8)
    assert found.accounts.counts("files") == (3, 1, 2)
    assert {Path(line.file).name: line.reason.partition(" (")[0] for line in found.accounts.left("files")} == {
        "b.csv": "is not text in UTF-8",
        "c.csv": "is empty",
    }
    assert "2 of 3 files left out" in said(found)


def test_own_splits_name_their_items(tmp_path):
    pictures(tmp_path, 10)
    place = jsonl(tmp_path / "m.jsonl", [{"image": f"{n}.png", "caption": f"word {n}"} for n in range(10)])
    found = load_manifest(place, size=8)
    assert isinstance(found.train, Listed)
    (name,), (file,) = found.train.row_names(np.array([0])), found.train.files(np.array([0]), "image")
    assert name == f"m.jsonl row 1 ({Path(file).name})"
    assert file == str(tmp_path / "0.png")
    assert found.train.files(np.array([0]), "caption") == [None]


# --- accounts


def test_accounts_show_what_does_not_add_up(tmp_path):
    accounts = Accounts(str(tmp_path / "m.csv"))
    accounts.find("rows", 5)
    accounts.read("rows", 3)
    accounts.leave(Line("m.csv", 2, "no such file", value="a.png"))
    accounts.leave(Line("m.csv", 3, "empty text", what="missing"))
    assert accounts.missing() == {"rows": 1}
    with pytest.raises(RuntimeError, match=r"do not add up: \{'rows': 1\}"):
        accounts.check()
    accounts.leave(Line("m \udcff.csv", 4, "has 3 fields"))
    accounts.check()
    (note,) = accounts.notes()
    assert "2 of 5 rows left out: 1 no such file: m.csv row 2 (a.png); 1 has 3 fields" in note
    with accounts.write().open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["file"], line["row"], line["what"]) for line in lines] == [
        ("m.csv", "2", "left out"),
        ("m.csv", "3", "missing"),
        ("m \\udcff.csv", "4", "left out"),
    ]


def test_labels_in_records_of_an_archive_are_found_by_every_source(tmp_path):
    members = []
    for n in range(12):
        record = json.dumps({"label": "ab"[n % 2], "caption": f"w {n}"}).encode()
        members += [(f"x/{n}.png", encoded(n)), (f"x/{n}.json", record)]
    place = tar(tmp_path / "s.tar", [*members, ("x/0.xyz", b"?"), ("README", b"?")])
    for task in ("views", "aligned"):
        found = load_webdataset(place, task=task, size=8)
        assert found.classes == ("a", "b")
        assert "'json.label' as label" in said(found)
    assert "s.tar x/0.xyz" in said(found)
    assert "s.tar README" in said(found)
    assert load_manifest(place, size=8).classes == ("a", "b")
