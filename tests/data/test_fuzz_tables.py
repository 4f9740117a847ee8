"""300 messy folders, tables and archives: nothing is lost or guessed, and two sources read the same file the same way."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from counterpoint.data.manifest import load_manifest
from counterpoint.data.tables import load_csv, load_imagefolder, load_parquet, load_webdataset
from counterpoint.errors import DataError

pytestmark = pytest.mark.usefixtures("undivided")

CUT, JUNK = b"\x89PNG\r\n\x1a\n and no more", b"no picture at all"
WORDS = ["NA", "null", "None", "nan", "True", "01", "1e5", "-1x", "train", "test", "a, b", "x;y", "tab\tbed", "a|b"]
WORDS += [
    'say "so"',
    '"quoted"',
    '12" record',
    "two\nlines",
    "three\n\nlines, and more",
    " spaced ",
    "ünï",
    "#%?*[]::",
    "0.5",
]
LABELS = ["NA", "01", "1", "null", "True", "1e5", "x y", "7", ""]
NAMES = [
    "a b",
    "c[1]",
    "x*y",
    "p::q",
    "#1%",
    "w?z",
    "train",
    "test shot",
    "valid",
    "übung",
    "[2024] new",
    "it's",
    "&",
    "dev",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def encoded(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PICTURES = [encoded(n) for n in range(40)]
JPEGS = [encoded(n, "JPEG") for n in range(40)]


def label_of(split, row, classes):
    return None if split.labels is None or split.labels[row] < 0 else classes[split.labels[row]]


def items(data, image: str, text: str) -> list:
    """Return what a set holds, without regard to splits: name, picture, text and class of every item."""
    found = []
    for split in filter(None, (data.train, data.test, data.unpaired)):
        rows = np.arange(len(split))
        columns = split.row_names(rows), split.column(image, rows), split.column(text, rows)
        here = split.present(image, rows), split.present(text, rows)
        for n, (name, pixels, words) in enumerate(zip(*columns, strict=True)):
            assert bool(words) == bool(here[1][n])
            assert here[0][n] or not pixels.any()
            found.append((name, pixels.tobytes(), words, label_of(split, n, data.classes)))
    return sorted(found, key=repr)


def balanced(data, unit: str, count: int) -> None:
    """Check that the accounts add up to the rows that the test wrote and to the set's items."""
    assert data.accounts.missing() == {}
    found, read, left = data.accounts.counts(unit)
    splits = [data.train, data.test, getattr(data, "unpaired", None)]
    assert (found, read) == (count, sum(len(split) for split in splits if split is not None))
    assert found == read + left
    listed = list(csv.DictReader(data.accounts.file.open(newline=""))) if data.accounts.lines else []
    assert sum(line["what"] == "left out" for line in listed) == sum(
        len(data.accounts.left(name)) for name in data.accounts.found
    )


def separates_nothing(data, *modalities: str) -> None:
    if any("all items are linked" in note for note in data.notes):
        return
    for name in modalities:
        assert not (set(data.train.same(name)) & set(data.test.same(name))) - {-1}


def rows_of(draw: random.Random, folder: Path) -> tuple[list[dict], dict[int, str]]:
    """Make rows of a table with their files, and the list of unusable rows."""
    rows, bad = [], {}
    folder.mkdir(parents=True)
    for n in range(draw.randint(12, 24)):
        name = f"{draw.choice(NAMES)} {n}.png"
        which = draw.randrange(40)
        (folder / name).write_bytes(PICTURES[which])
        image, text = name, f"{draw.choice(WORDS)} {n}" if draw.random() < 0.8 else draw.choice(WORDS)
        if draw.random() < 0.15 and rows:
            image = rows[draw.randrange(len(rows))]["image"]  # which may be bad as well
        fate = draw.random()
        if fate < 0.05:
            image = "gone.png"
        elif fate < 0.1:
            (folder / name).write_bytes(draw.choice([CUT, JUNK, b""]))
            image = name
        elif fate < 0.13:
            image = "https://example.org/a.png"
        elif fate < 0.2:
            image = ""
        elif fate < 0.27:
            text = draw.choice(["", "  "])
        rows.append({"image": image, "caption": text, "label": draw.choice(LABELS)})
    for n, row in enumerate(rows):
        file = folder / row["image"]
        whole = row["image"] and file.is_file() and file.read_bytes() in PICTURES
        if row["image"] and not whole:
            bad[n] = "the picture"
        elif not row["image"] and not row["caption"].strip():
            bad[n] = "nothing there"
    return rows, bad


def load_both(face, place: Path):
    """Return the set through its own source and as a manifest; None where both refuse it with the same words."""
    told = []
    found = []
    for load, options in ((face, {"task": "aligned"}), (load_manifest, {"max_bad": 1e9})):
        try:
            found.append(load(str(place), size=8, **options))
        except DataError as error:
            told.append(str(error))
    assert len(told) in (0, 2), told
    return found


@pytest.mark.parametrize("part", range(5))
def test_tables_are_the_same_through_two_sources(tmp_path, part):
    compared = 0
    for seed in range(part * 22, part * 22 + 22):
        draw = random.Random(seed)
        folder = tmp_path / str(seed) / draw.choice(NAMES)
        rows, bad = rows_of(draw, folder)
        if seed % 2:
            place = folder / f"{draw.choice(NAMES)}.parquet"
            blobs = draw.random() < 0.5
            column = [
                (folder / r["image"]).read_bytes() if blobs and (folder / r["image"]).is_file() else r["image"]
                for r in rows
            ]
            if blobs and all(isinstance(cell, bytes) or not cell for cell in column):
                values = pa.array([None if cell == "" else cell for cell in column], pa.binary())
            else:
                values = pa.array([r["image"] or None for r in rows])
            table = {"image": values, "caption": [r["caption"] for r in rows], "label": [r["label"] for r in rows]}
            pq.write_table(pa.table(table), place, row_group_size=draw.choice([3, 100]))
            face = load_parquet
        else:
            place = folder / f"{draw.choice(NAMES)}{draw.choice(['.csv', '.tsv'])}"
            between = "\t" if place.suffix == ".tsv" else draw.choice(",;|")
            quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
            with place.open("w", newline="", encoding=draw.choice(["utf-8", "utf-8-sig"])) as file:
                out = csv.DictWriter(
                    file, list(rows[0]), delimiter=between, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"])
                )
                out.writeheader()
                out.writerows(rows)
            face = load_csv
        found = load_both(face, place)
        if not found:
            continue
        mine, manifest = found
        compared += 1
        assert items(mine, "image", "text") == items(manifest, "image", "caption")
        good = [
            (r["caption"] if r["caption"].strip() else "", r["label"] or None)
            for n, r in enumerate(rows)
            if n not in bad
        ]
        key = lambda pair: (pair[0], pair[1] or "")  # noqa: E731
        assert sorted([(w, c) for _, _, w, c in items(mine, "image", "text")], key=key) == sorted(good, key=key)
        for data in found:
            balanced(data, "rows", len(rows))
            assert len(data.accounts.left("rows")) == len(bad)
        separates_nothing(mine, "image", "text")
    assert compared > 18


def test_unpaired_marks_swallow_nothing(tmp_path):
    for seed in range(80):
        draw = random.Random(seed)
        suffix, between = draw.choice([(".csv", ","), (".tsv", "\t"), (".txt", ";"), (".csv", "|")])
        lines, wanted = [between.join(("image", "caption"))], []
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "0.png").write_bytes(PICTURES[0])
        for n in range(draw.randint(10, 40)):
            words = f"thing {n}"
            kind = draw.random()
            if kind < 0.1:
                said = words = f'"the unpaired {n}'
            elif kind < 0.2:
                said = words = f'a dog called "Rex" {n}'
            elif kind < 0.3:
                said = words = f'{n} of 12"'
            elif kind < 0.4:
                said, words = f'"number {n}{between} quoted, ""so"""', f'number {n}{between} quoted, "so"'
            elif kind < 0.45:
                said, words = f'"over {n}\nlines"', f"over {n}\nlines"
            elif kind < 0.5:
                said = words = f'"he said" {n}'
            else:
                said = words
            # One picture a row, so that no two are the same.
            (folder / f"{n}.png").write_bytes(encoded(1000 + n))
            lines.append(f"{n}.png{between}{said}")
            wanted.append(words)
        place = folder / f"list{suffix}"
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = load_csv(str(place), task="aligned", size=8)
        assert sorted(w for _, _, w, _ in items(data, "image", "text")) == sorted(wanted), seed
        balanced(data, "rows", len(wanted))
        plain = sum(words.startswith('"') for words in wanted)
        assert any("are read as text" in note for note in data.notes) == bool(plain)


def test_archives_are_the_same_through_two_sources(tmp_path):
    compared = 0
    for seed in range(50):
        draw = random.Random(seed)
        members, whole = [], {}
        for n in range(draw.randint(8, 16)):
            key = f"{draw.choice(['', 'x/', 'x y/z/', '[1]/'])}{n:04d}"
            which, text = draw.randrange(40), f"{draw.choice(WORDS)} {n}"
            jpeg = draw.random() < 0.5
            parts = {("jpg" if jpeg else "png"): (JPEGS if jpeg else PICTURES)[which], "txt": text.encode()}
            parts["cls"] = draw.choice(["01", "1", "NA"]).encode()
            for name in list(parts):
                if draw.random() < 0.12:
                    del parts[name]
            if set(parts) & {"jpg", "png", "txt"}:
                whole[key] = (text if "txt" in parts else "", bool(set(parts) & {"jpg", "png"}))
            if parts:
                members.append([(f"{key}.{ending}", content) for ending, content in parts.items()])
        odd = [("readme.md", b"about"), (".hidden.png", PICTURES[0]), ("x/noending", b"1")]
        flat = [member for group in members for member in group] + odd[: draw.randint(0, 3)]
        order = draw.choice(["samples", "kinds", "any"])
        if order == "kinds":
            flat.sort(key=lambda member: member[0].rpartition(".")[2])
        elif order == "any":
            draw.shuffle(flat)
        folder = tmp_path / f"{seed} [s]"
        folder.mkdir()
        # Several shards hold whole samples, or a kind each.
        shards = draw.choice([1, 2])
        half = {key.partition(".")[0] for group in members[::2] for key, _ in group}
        for shard in range(shards):
            with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
                for name, content in flat:
                    first = (
                        (name.rpartition(".")[2] in ("jpg", "png"))
                        if order == "kinds"
                        else name.partition(".")[0] in half
                    )
                    if shards == 1 or first == (shard == 0):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        place = draw.choice([folder, folder / "s-*.tar"])
        found = load_both(load_webdataset, place)
        if not found:
            continue
        mine, manifest = found
        compared += 1
        assert items(mine, "image", "text") == items(manifest, "image", "text"), seed
        assert sorted(words for _, _, words, _ in items(mine, "image", "text")) == sorted(
            text for text, _ in whole.values()
        )
        for data in found:
            assert data.accounts.missing() == {}
            assert data.accounts.counts("members")[0] == len(flat)
            assert data.accounts.counts("rows")[1] == len(whole)
            assert data.accounts.counts("files") == (shards, shards, 0)
    assert compared > 45


def tree(draw: random.Random, root: Path) -> tuple[int, list[Path]]:
    """Make a messy folder; return the number of entries that are no folders, and its pictures."""
    entries, pictures = 0, []
    root.mkdir(parents=True)
    classes = draw.sample(NAMES, draw.randint(1, 4))
    for n in range(draw.randint(10, 26)):
        folder = root / draw.choice(classes)
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            folder = folder / draw.choice(NAMES)
        if draw.random() < 0.06:
            folder = root
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{draw.choice(NAMES)} {n}{draw.choice(['.png', '.jpg', '.PNG', '.jpeg'])}"
        which = draw.randrange(40)
        file.write_bytes(JPEGS[which] if "j" in file.suffix else PICTURES[which])
        entries += 1
        fate = draw.random()
        if fate < 0.06:
            file.write_bytes(draw.choice([CUT, JUNK, b""]))
        elif fate < 0.12:
            file.rename(file.with_suffix(".txt"))
            continue
        elif fate < 0.18:
            file.rename(file.parent / f".{file.name}")
            continue
        elif fate < 0.24:
            file.unlink()
            file.symlink_to(root / "nowhere.png")
            continue
        elif fate < 0.3:
            (root.parent / "elsewhere").mkdir(exist_ok=True)
            file.replace(root.parent / "elsewhere" / f"{n}.png")
            file.symlink_to(root.parent / "elsewhere" / f"{n}.png")
        pictures.append(file)
    if draw.random() < 0.3:
        (root / draw.choice(classes) / "loop").parent.mkdir(exist_ok=True)
        (root / draw.choice(classes)).mkdir(exist_ok=True)
        loop = root / draw.choice([c for c in classes if (root / c).is_dir()]) / "loop"
        loop.symlink_to(root)
        entries += 1
    return entries, pictures


def test_folders_are_the_same_as_their_manifest(tmp_path):
    compared = 0
    for seed in range(60):
        draw = random.Random(seed)
        root = tmp_path / str(seed) / draw.choice(NAMES)
        entries, pictures = tree(draw, root)
        captions = {path: f"{draw.choice(WORDS)} {n}" for n, path in enumerate(pictures)}
        with (root / "metadata.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["file_name", "text"])
            out.writerows([path.relative_to(root), words] for path, words in captions.items())
            out.writerow(["nowhere.png", "is not there"])
        good = [path for path in pictures if path.read_bytes() in PICTURES or path.read_bytes() in JPEGS]
        if len(good) < 4:
            continue
        compared += 1
        mine = load_imagefolder(str(root), task="aligned", size=8)
        listed = tmp_path / str(seed) / "list.jsonl"
        tops = {path.relative_to(root).parts[0] for path in pictures if path.parent != root}
        # The only folders are splits, of one kind or with one to train on; a picture beside them is trained on.
        kinds = {{"dev": "valid"}.get(top, top) for top in tops}
        split = bool(tops) and tops <= {"train", "valid", "dev", "test"} and (len(kinds) == 1 or "train" in kinds)
        with listed.open("w") as file:
            for path, words in captions.items():
                inside = path.relative_to(root).parts
                label = inside[split] if len(inside) > 1 + split else None
                row = {"image": os.fspath(path), "text": words, "label": label}
                part = inside[0] if len(inside) > 1 else "train"
                file.write(json.dumps(row | ({"split": part} if split else {})) + "\n")
        other = load_manifest(str(listed), size=8, max_bad=1e9)
        mine_items, others = items(mine, "image", "text"), items(other, "image", "text")
        assert [item[1:] for item in sorted(mine_items, key=lambda item: repr(item[1:]))] == [
            item[1:] for item in sorted(others, key=lambda item: repr(item[1:]))
        ], seed
        assert {name for name, *_ in mine_items} <= set(map(str, good))
        unused = sum("is not used" in line.reason for line in mine.accounts.left("pictures"))
        assert len(mine_items) + unused == len(good)
        balanced(mine, "pictures", len(pictures))
        found, read, left = mine.accounts.counts("files")
        assert (found, found - left) == (entries + 1, len(pictures) + 1)
        assert found == read + left
        assert mine.accounts.counts("metadata rows") == (len(pictures) + 1, len(pictures), 1)
        separates_nothing(mine, "image", "text")
    assert compared > 50
