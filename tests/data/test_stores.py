"""Tables of Lance and folders of litdata: the same items as from Parquet, bad rows, splits, errors that name the mend."""

from __future__ import annotations

import io
import json
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from counterpoint import cli, data
from counterpoint.errors import CounterpointError, DataError

KINDS = ("lance", "litdata")


def encoded(n: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (12, 10, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def sound(n: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 4000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(n).integers(-9000, 9000, 400, np.int16).tobytes())
    return out.getvalue()


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "image": encoded(n), "caption": f"word {n}", "wav": sound(n), "label": "abc"[n % 3],
            "features": np.full(4, n, np.float32), "age": float(n),
        }
        for n in range(first, first + count)
    ]  # fmt: skip


def of_arrow(items: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: [row[name] for row in items] for name in items[0]})


def write_lance(folder: Path, items: list[dict[str, Any]]) -> Path:
    lance = pytest.importorskip("lance", reason="needs the package pylance")
    lance.write_dataset(of_arrow(items), str(folder), max_rows_per_file=5)
    return folder


def write_litdata(folder: Path, items: list[Any], size: int = 5) -> Path:
    pytest.importorskip("litdata", reason="needs the package litdata")
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_size=size)
    for n, item in enumerate(items):
        writer[n] = item
    writer.done()
    writer.merge()
    return folder


WRITE: dict[str, Callable[..., Path]] = {"lance": write_lance, "litdata": write_litdata}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_those_of_parquet(tmp_path: Path, kind: str) -> None:
    items = rows(30)
    items[7]["image"] = b"no picture"
    pq.write_table(of_arrow(items), tmp_path / "items.parquet")
    place = WRITE[kind](tmp_path / f"items.{kind}", items)
    columns = "columns=image:image,caption:text,wav:audio,features:vector,label:label&size=8&rate=4000&seconds=0.1"
    found = data.load(f"{kind}:{place}?{columns}", task="aligned")
    wanted = data.load(f"manifest:{tmp_path / 'items.parquet'}?{columns}")
    assert [*found.modalities] == [*wanted.modalities] == ["image", "caption", "wav", "features"]
    assert found.accounts.counts("rows") == wanted.accounts.counts("rows") == (30, 29, 1)
    (bad,) = found.accounts.left("rows")
    assert (bad.row, bad.column) == (8, "image")
    for split in ("train", "valid", "test"):
        one, other = getattr(found, split), getattr(wanted, split)
        assert len(one) == len(other) > 0
        at = np.arange(len(one))
        for name in found.modalities:
            a, b = one.column(name, at), other.column(name, at)
            assert [*a] == [*b] if name == "caption" else np.array_equal(a, b)
        np.testing.assert_array_equal(one.labels, other.labels)
    # The task of pictures takes one picture a row, and a tenth of bad rows at most.
    images = data.load(f"{kind}:{place}?size=8")
    same = data.load(f"parquet:{tmp_path / 'items.parquet'}?size=8")
    at = np.arange(len(same.train))
    np.testing.assert_array_equal(images.train.images(at), same.train.images(at))
    pairs = data.load(f"{kind}:{place}?image=image&text=caption&size=8", task="aligned")
    assert [*pairs.modalities] == ["image", "text"]
    assert len(data.load(f"{kind}:{place}?target=age&series=features", task="targets").train) > 10
    with pytest.raises(DataError, match=r"1 of 30 rows are bad, more than max_bad=0 of 30: .*row 8 image"):
        data.load(f"{kind}:{place}?max_bad=0")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_them_are_splits_and_one_epoch_trains(tmp_path: Path, kind: str, capsys: Any) -> None:
    for split, first in (("train", 0), ("test", 40), ("val", 60)):
        WRITE[kind](tmp_path / "set" / (f"{split}.lance" if kind == "lance" else split), rows(24 - first // 4, first))
    found = data.load(f"manifest:{tmp_path / 'set'}?size=8&rate=4000&seconds=0.1")
    assert [len(found.train), len(found.test), len(found.valid)] == [24, 14, 9]
    options = ["--epochs", "1", "--batch-size", "8", "--encoder", "conv-s", "--max-bad", "0"]
    spec = f"{kind}:{tmp_path / 'set'}?size=8"
    assert cli.main(["train", "simclr", "--data", spec, *options, "--out", str(tmp_path), "--name", "r"]) == 0
    assert "knn_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_folder_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "items.parquet"
    pq.write_table(of_arrow(rows(2)), file)
    with pytest.raises(DataError, match=r"items\.parquet: is a file; .* is a folder"):
        data.load(f"{kind}:{file}")
    with pytest.raises(DataError, match=f"is not .* {kind}, and holds none".replace("lance", "Lance")):
        data.load(f"{kind}:{tmp_path}")
    with pytest.raises(DataError, match=r"no such file, folder or pattern; name an? .* of (Lance|litdata)$"):
        data.load(f"{kind}:{tmp_path}/none")
    with pytest.raises(CounterpointError, match="either by columns=NAME:KIND"):
        data.load(f"{kind}:{tmp_path}?columns=a:image&text=b", task="aligned")
    other = {"lance": "litdata", "litdata": "lance"}[kind]
    place = WRITE[other](tmp_path / "other", rows(3))
    with pytest.raises(DataError, match=f"holds files of the kind {other}, not {kind}"):
        data.load(f"{kind}:{place}")
    monkeypatch.setitem(sys.modules, other, None)
    with pytest.raises(CounterpointError, match=rf"needs the extra \[{other}\]: pip install 'counterpoint\[{other}\]'"):
        data.load(f"{other}:{place}")


def test_lance_reads_blobs_and_the_newest_version_without_deleted_rows(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance", reason="needs the package pylance")
    table = of_arrow(rows(20)).drop_columns(["wav", "features", "age"])
    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = table.set_column(0, blob, table["image"].cast(pa.large_binary()))
    made = lance.write_dataset(table, str(tmp_path / "b.lance"), data_storage_version="2.1")
    made.delete("caption = 'word 3'")
    found = data.load(f"manifest:{tmp_path / 'b.lance'}?size=8")
    texts = [
        text
        for split in (found.train, found.valid, found.test)
        for text in split.column("caption", np.arange(len(split)))
    ]
    assert sorted(texts) == sorted(f"word {n}" for n in range(20) if n != 3)
    (tmp_path / "b.lance" / "data").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b\.lance: not a table of Lance that can be read"):
        data.load(f"lance:{tmp_path / 'b.lance'}")


def test_litdata_never_opens_a_pickle_and_does_not_wait_for_chunks(tmp_path: Path) -> None:
    litdata = pytest.importorskip("litdata", reason="needs the package litdata")
    items = [row | {"label": {n}} for n, row in enumerate(rows(20))]  # a set has no form but a pickle
    place = write_litdata(tmp_path / "p", items)
    assert "pickle" in json.loads((place / "index.json").read_text())["config"]["data_format"]
    found = data.load(f"manifest:{place}?columns=image:image,caption:text&size=8")
    assert found.accounts.counts("rows") == (20, 20, 0)
    with pytest.raises(DataError, match="is a pickle, which could run code; it is not read"):
        data.load(f"manifest:{place}?columns=image:image,label:text")
    chunk = sorted(place.glob("*.bin"))[1]
    chunk.write_bytes(chunk.read_bytes()[:-9])
    found = data.load(f"manifest:{place}?columns=image:image,caption:text&size=8&max_bad=5")
    assert found.accounts.counts("rows") == (20, 15, 5)
    assert f"5 its chunk {chunk.name} is cut short" in found.notes[0]
    chunk.unlink()
    with pytest.raises(DataError, match=f"its chunk {chunk.name} is missing"):
        data.load(f"manifest:{place}?columns=image:image,caption:text&size=8&max_bad=4")
    # Tuples are named by the kinds of their parts; a picture may be Pillow's.
    parts = [(Image.open(io.BytesIO(row["image"])).convert("RGB"), n % 2) for n, row in enumerate(rows(20))]
    images = data.load(f"litdata:{write_litdata(tmp_path / 't', parts)}?size=8")
    assert images.classes == ("0", "1")
    assert litdata.constants._LITDATA_DISABLE_VERSION_CHECK == 1
