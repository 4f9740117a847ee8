"""embed into a folder of shards: the rows of one file, continuation after a kill, several processes, bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.launch import exit_code

from counterpoint import cli, search
from counterpoint.errors import CounterpointError, DataError
from counterpoint.search import table as rows_of
from counterpoint.search.nearest import stored_index

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("undrawn")
SHARD = 300  # rows: shards of one batch each, or of a batch and the short end of a split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of vectors and texts, and its embeddings in one file. Many texts occur more than once, some are absent."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    lines = ["id,imu,words,split"]
    for n in range(1100):
        words = ["", f"only number {n} has this", "a walk", f"run {n % 40}"][rng.integers(4)]
        numbers = " ".join(f"{value:.3f}" for value in rng.standard_normal(6))
        lines.append(f'{n},"[{numbers.replace(" ", ", ")}]",{words},{"test" if n % 4 == 0 else "train"}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    spec = f"manifest:{folder}/table.csv?columns=imu:vector,words:text,split:split"
    more = ["--epochs", "1", "--batch-size", "256", "--embedding", "8", "--out", str(folder), "--name", "run"]
    assert cli.main(["train", "clip", "--data", spec, *more]) == 0
    search.embed(folder / "run", folder / "one.parquet")
    return folder


def same(one: Path, other: Path) -> None:
    """Check that two places hold the same rows, bit for bit."""
    first, second = search.read_embeddings(one), search.read_embeddings(other)
    for name in ("split", "label", "texts", "source", "files", "modalities", "key", "data"):
        assert getattr(first, name) == getattr(second, name), name
    np.testing.assert_array_equal(first.item, second.item)
    for name in first.modalities:
        np.testing.assert_array_equal(first.present[name], second.present[name])
        np.testing.assert_array_equal(first.vectors[name].view(np.uint32), second.vectors[name].view(np.uint32))
        assert first.stamp(name) == second.stamp(name)


def _killed(run: str, out: str) -> None:
    """Embed, and be killed in the middle of the third shard."""
    count, write = 0, pq.ParquetWriter.write_table

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        write(self, *arguments, **options)
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    pq.ParquetWriter.write_table = counted
    search.embed(run, out, shard_rows=SHARD)


def test_a_killed_embed_continues_with_the_first_missing_shard_and_ends_as_one_file(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert exit_code(_killed, str(folder / "run"), f"{out}/") == -signal.SIGKILL
    assert [file.name for file in search.stored.shards_of(out)] == ["part-00000.parquet", "part-00001.parquet"]
    assert list(out.glob(".part-00002*"))  # the torn third one
    with pytest.raises(
        DataError, match=r"has 2 of 5 shards; the command that wrote them continues: counterpoint embed"
    ):
        search.read_embeddings(out)
    times = [file.stat().st_mtime_ns for file in search.stored.shards_of(out)]
    said: list[str] = []

    def say(line: str) -> None:
        said.extend([] if line.startswith("note") else [line])

    assert search.embed(folder / "run", out, shard_rows=SHARD, say=say) == 1100
    assert said[0] == f"2 of 5 shards are in {out}"
    assert [line.partition(":")[0] for line in said[1:]] == [str(out / f"part-0000{n}.parquet") for n in (2, 3, 4)]
    assert [file.stat().st_mtime_ns for file in search.stored.shards_of(out)][:2] == times
    assert sorted(file.name for file in out.iterdir() if file.name != ".lock") == [
        f"part-0000{n}.parquet" for n in range(5)
    ]
    same(out, folder / "one.parquet")
    counts = [pq.read_metadata(file).num_rows for file in search.stored.shards_of(out)]
    assert max(counts) <= SHARD
    assert search.embed(folder / "run", f"{out}/", shard_rows=SHARD, say=say) == 1100  # nothing is left to do
    assert said[-1] == f"5 of 5 shards are in {out}"


def test_equal_texts_are_equal_across_shards_and_a_folder_is_searched_and_indexed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="needs the extra [search]")
    run, out = str(folder / "run"), str(tmp_path / "e")
    assert cli.main(["embed", run, "-o", out, "--shard-rows", "1"]) == 0  # at least a batch
    assert f"1100 items: {out}" in capsys.readouterr().out
    found = search.read_embeddings(out)
    rows = found.vectors["words"][[n for n, text in enumerate(found.texts["words"]) if text == "a walk"]]
    assert len(rows) > 200
    assert (rows == rows[0]).all()
    exact = search.search(run, ["a walk"], out, modality="imu", k=5)[1]
    assert exact == search.search(run, ["a walk"], folder / "one.parquet", modality="imu", k=5)[1]
    assert cli.main(["index", out]) == 0
    assert sorted(file.name for file in Path(out).glob("*.faiss")) == ["imu.faiss", "words.faiss"]
    assert stored_index(search.read_embeddings(out), "imu") is not None
    assert search.search(run, ["a walk"], out, modality="imu", k=5)[1] == exact


def test_shards_of_other_weights_data_or_settings_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "run", tmp_path / "out"
    search.embed(run, out, split="test", shard_rows=SHARD)
    with pytest.raises(
        CounterpointError, match=r"part-00000\.parquet has embeddings of another split \(test\); name another"
    ):
        search.embed(run, out, shard_rows=SHARD)
    with pytest.raises(CounterpointError, match=r"with another number of rows a shard \(300\)"):
        search.embed(run, out, split="test")
    changed = tmp_path / "table.csv"
    changed.write_text((folder / "table.csv").read_text().replace("a walk", "a stroll"))
    spec = f"manifest:{changed}?columns=imu:vector,words:text,split:split"
    with pytest.raises(CounterpointError, match=r"of other data \(manifest:"):
        search.embed(run, out, split="test", shard_rows=SHARD, data=spec)
    search.embed(run, tmp_path / "mine", shard_rows=SHARD, data=spec)
    changed.write_text((folder / "table.csv").read_text())
    with pytest.raises(CounterpointError, match="of data that have changed since; name another"):
        search.embed(run, tmp_path / "mine", shard_rows=SHARD, data=spec)
    shard = out / "part-00000.parquet"
    read = pq.read_table(shard)
    said = json.loads(read.schema.metadata[b"counterpoint"]) | {"key": "other", "run": "runs/x"}
    pq.write_table(read.replace_schema_metadata({b"counterpoint": json.dumps(said).encode()}), shard)
    with pytest.raises(CounterpointError, match=r"of other weights \(runs/x\)"):
        search.embed(run, out, split="test", shard_rows=SHARD)
    shutil.copy(folder / "table.csv", shard)
    with pytest.raises(DataError, match=r"part-00000\.parquet: not a shard that counterpoint embed wrote"):
        search.embed(run, out, split="test", shard_rows=SHARD)
    with pytest.raises(CounterpointError, match="is a file; name a folder, -o embeddings/"):
        search.embed(run, tmp_path / "x.parquet", shard_rows=SHARD)
    with pytest.raises(CounterpointError, match="several processes write shards: name a folder"):
        search.embed(run, tmp_path / "x.parquet", jobs=2)
    with pytest.raises(DataError, match="is a folder without shards"):
        search.read_embeddings(folder)


@pytest.mark.slow
def test_processes_write_the_shards_of_one(folder: Path, tmp_path: Path) -> None:
    assert search.embed(folder / "run", tmp_path / "out", shard_rows=SHARD, jobs=2) == 1100
    same(tmp_path / "out", folder / "one.parquet")


def test_the_memory_of_a_table_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    width = 512
    encoder: Any = SimpleNamespace(rows=lambda name, values: np.zeros((len(values), width), np.float32))

    def peak(count: int) -> tuple[int, int]:
        items: Any = SimpleNamespace(
            kinds={"vector": "vector"},
            column=lambda split, name, rows: np.zeros((len(rows), 1), np.float32),
            present=lambda split, name, rows: np.ones(len(rows), bool),
            labels=lambda split, rows: [None] * len(rows),
            names=lambda split, rows: [f"row {n}" for n in rows],
            files=lambda split, name, rows: [None] * len(rows),
            splits={"train": range(count)},
        )
        batches = rows_of.batches_of(items)
        maker = rows_of.Maker(items, encoder, rows_of.Layout(batches, (), {"vector": width}, ""), tmp_path)
        before = pa.total_allocated_bytes()
        most = 0

        def watch(rows: int) -> None:
            nonlocal most
            most = max(most, pa.total_allocated_bytes() - before)

        maker.progress = watch
        tracemalloc.start()
        assert maker.write(batches, tmp_path / f"{count}.parquet", {}) == count
        _, ours = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return ours, most

    small, large = peak(10_000), peak(40_000)  # the vectors alone take 82 MB
    assert max(*small, *large) < 25e6
    assert large[0] < 1.2 * small[0] + 1e6
    assert large[1] < 1.2 * small[1] + 1e6
