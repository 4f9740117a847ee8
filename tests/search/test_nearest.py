"""Nearest rows: exact search, indices over repeated rows, and when an index is left for exact search."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from counterpoint import search
from counterpoint.errors import CounterpointError, DataError
from counterpoint.search import nearest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def written(file, rows, there=None):
    """Write a file of embeddings of one modality, as `embed` does."""
    count, dim = rows.shape
    there = np.ones(count, bool) if there is None else there
    vectors = [row if known else None for row, known in zip(rows.astype(np.float32), there, strict=True)]
    column = pa.field("text_embedding", pa.list_(pa.float32()), metadata={"width": str(dim)})
    blank = pa.nulls(count, pa.string())
    names = {
        "item": np.arange(count),
        "split": ["train"] * count,
        "label": blank,
        "source": blank,
        "text": ["t"] * count,
    }
    table = pa.table(names).append_column(column, pa.array(vectors, column.type))
    said = json.dumps({"run": "r", "key": "k", "data": "d", "modalities": {"text": "text"}})
    pq.write_table(table.replace_schema_metadata({b"counterpoint": said.encode()}), file)
    return search.read_embeddings(file)


def expected(rows, query, k):
    """Sort rows by similarity in float64, equal ones in their order."""
    similarity = (rows.astype(np.float64) * query).sum(1)
    return np.argsort(-similarity, kind="stable")[:k].tolist()


@pytest.mark.parametrize("k", [1, 2, 7, 10, 99, 500, 1001, 5000])
@pytest.mark.parametrize(("count", "different"), [(1001, 7), (1001, 1001), (1001, 1), (3, 2)])
def test_exact_search_orders_equal_rows_by_their_position_whatever_k(tmp_path, count, different, k):
    rng = np.random.default_rng(count + different)
    rows = unit(rng.standard_normal((different, 24)))[rng.integers(0, different, count)]
    found = written(tmp_path / "e.parquet", rows)
    for query in unit(rng.standard_normal((3, 24))):
        hits = search.nearest_rows(found, "text", query, k)
        assert [row for _, row in hits] == expected(rows, query, k)
        assert len(hits) == min(k, count)


def test_exact_search_never_finds_items_that_lack_the_modality_or_are_not_finite(tmp_path):
    rows = unit(np.random.default_rng(0).standard_normal((50, 8)))
    there = np.arange(50) % 3 > 0
    rows[4] = np.nan
    rows[5, 0] = np.inf
    found = written(tmp_path / "e.parquet", rows, there)
    hits = search.nearest_rows(found, "text", rows[1], 50)
    assert sorted(row for _, row in hits) == sorted(set(np.flatnonzero(there)) - {4, 5})
    assert np.isfinite([similarity for similarity, _ in hits]).all()
    assert "leaves out 2 embeddings of text with NaN" in found.notes[0]


def test_large_values_that_overflow_leave_no_nan(tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    rows[7] = 3e38 * np.sign(rows[7])
    found = written(tmp_path / "e.parquet", rows)
    query = np.array([3, -3, 3, 3], np.float32)
    hits = search.nearest_rows(found, "text", query, 5)
    assert [row for _, row in hits] == expected(rows, query, 5)


@pytest.mark.parametrize("k", [1, 10, 200])
def test_an_index_over_repeated_rows_finds_what_exact_search_finds(tmp_path, k):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    rng = np.random.default_rng(k)
    kinds = unit(rng.standard_normal((30, 32)))
    rows = kinds[rng.integers(0, 30, 3000)]
    found = written(tmp_path / "e.parquet", rows)
    said = []
    assert search.index(found.path, say=said.append) == [tmp_path / "e.parquet.text.faiss"]
    assert "3000 rows, 30 of them different; recall@10 against exact search 1.000, used for k up to 100" in said[0]
    assert search.stored_index(found, "text").ntotal == 30
    for query in unit(kinds[:8] + 0.1 * rng.standard_normal((8, 32))):
        assert [row for _, row in search.nearest_rows(found, "text", query, k)] == expected(rows, query, k)


def test_an_index_of_different_rows_is_used_with_its_recall_written_down(tmp_path):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((2000, 16)))
    found = written(tmp_path / "e.parquet", rows)
    search.index(found.path)
    report = json.loads((tmp_path / "e.parquet.text.faiss.json").read_text())
    assert report["recall_at_10"] == min(report["recall"]["10"].values()) >= 0.95
    assert report["reach"] in (10, 100)
    queries = unit(rng.standard_normal((50, 16)))
    common = [
        len({row for _, row in search.nearest_rows(found, "text", query, 10)} & set(expected(rows, query, 10)))
        for query in queries
    ]
    assert np.mean(common) / 10 >= 0.95


def test_an_index_with_too_little_recall_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    monkeypatch.setattr(nearest, "ASK", (1,))  # a single list, which lacks most of the neighbours
    rows = unit(np.random.default_rng(0).standard_normal((2000, 48)))
    found = written(tmp_path / "e.parquet", rows)
    (tmp_path / "e.parquet.text.faiss").write_bytes(b"an older graph")
    said = []
    assert search.index(found.path, say=said.append) == []
    report = json.loads((tmp_path / "e.parquet.text.faiss.json").read_text())
    assert report["recall_at_10"] < 0.95
    assert report["reach"] == 0
    assert "below 0.95: exact search is used" in said[0]
    assert not (tmp_path / "e.parquet.text.faiss").exists()
    assert search.stored_index(found, "text") is None
    assert [row for _, row in search.nearest_rows(found, "text", rows[9], 10)] == expected(rows, rows[9], 10)


def test_an_index_that_returns_too_few_or_was_not_measured_for_k_is_left_for_exact_search(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    rows = unit(np.random.default_rng(0).standard_normal((300, 8)))
    found = written(tmp_path / "e.parquet", rows)
    search.index(found.path)

    def asked(made, query, k):
        raise AssertionError("the index was asked for more than it was measured for")

    with monkeypatch.context() as patch:
        patch.setattr(nearest.StoredIndex, "rows", asked)
        assert [row for _, row in search.nearest_rows(found, "text", rows[0], 101)] == expected(rows, rows[0], 101)
    with monkeypatch.context() as patch:
        patch.setattr(nearest.StoredIndex, "rows", lambda made, query, k: None)  # -1 among the answers
        assert [row for _, row in search.nearest_rows(found, "text", rows[0], 20)] == expected(rows, rows[0], 20)


def test_rows_of_two_bits_are_kept_where_they_suffice_and_bytes_elsewhere(tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs the extra [search]")
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((40, 64))
    clustered = unit(groups[rng.integers(0, 40, 2000)] + 0.5 * rng.standard_normal((2000, 64)))
    # A large common part leaves few bits to the rest.
    one_way = (rng.standard_normal((2000, 64)) + 1).astype(np.float32)
    kinds, wider = [], []
    for name, rows in (("a", clustered), ("b", one_way)):
        found = written(tmp_path / f"{name}.parquet", rows)
        search.index(found.path)
        made = search.stored_index(found, "text")
        kinds.append(type(made.index))
        wider.append(made.report.wider)
        assert made.report.recall_at_10 >= nearest.AIM
        assert len(made.rows(rows[0], 10)) == made.report.wider * 10
    assert kinds == [faiss.IndexIVFRaBitQFastScan, faiss.IndexIVFScalarQuantizer]
    assert wider == [5, 2]


@pytest.mark.parametrize("kind", ["IVF12,SQ8", "HNSW32"])
def test_an_index_of_an_older_version_is_read(tmp_path, kind):
    faiss = pytest.importorskip("faiss", reason="needs the extra [search]")
    rows = unit(np.random.default_rng(0).standard_normal((500, 8)))
    found = written(tmp_path / "e.parquet", rows)
    search.index(found.path)
    older = faiss.index_factory(8, kind, faiss.METRIC_INNER_PRODUCT)
    older.train(rows)
    older.add(rows)
    (tmp_path / "e.parquet.text.faiss").write_bytes(faiss.serialize_index(older).tobytes())
    report = json.loads((tmp_path / "e.parquet.text.faiss.json").read_text())
    report.pop("wider")
    (tmp_path / "e.parquet.text.faiss.json").write_text(json.dumps(report | {"ask": 32}))
    read = search.stored_index(search.read_embeddings(found.path), "text")
    assert type(read.index) is type(older)
    candidates = read.rows(rows[3], 10).tolist()
    assert len(candidates) == 20
    assert set(expected(rows, rows[3], 10)) <= set(candidates)


def test_an_index_belongs_to_content_not_to_size_and_time(tmp_path):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    rng = np.random.default_rng(0)
    file = tmp_path / "e.parquet"
    rows = unit(rng.standard_normal((100, 8)))
    found = written(file, rows)
    search.index(file)
    before = file.stat()
    os.utime(file, ns=(1, 1))
    assert search.stored_index(search.read_embeddings(file), "text") is not None
    written(file, rows[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = search.read_embeddings(file)
    assert search.stored_index(found, "text") is None
    assert search.nearest_rows(found, "text", rows[0], 1)[0][1] == 99


def test_a_damaged_graph_is_reported(tmp_path):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    found = written(tmp_path / "e.parquet", unit(np.random.default_rng(0).standard_normal((20, 4))))
    (file,) = search.index(found.path)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"faiss is damaged; make it again: counterpoint index"):
        search.nearest_rows(found, "text", np.ones(4, np.float32), 1)


def test_index_tries_its_outputs_before_the_work(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    found = written(tmp_path / "e.parquet", np.eye(4, dtype=np.float32))
    (tmp_path / "e.parquet.text.faiss").mkdir()
    monkeypatch.setattr(nearest, "_built", None)
    with pytest.raises(CounterpointError, match="is a folder; name a file to write"):
        search.index(found.path)


def test_a_row_of_another_width_is_named(tmp_path):
    file = tmp_path / "e.parquet"
    written(file, np.eye(3))
    table = pq.read_table(file)
    column = table.schema.names.index("text_embedding")
    short = pa.array([[1.0, 0.0, 0.0], [0.0, 1.0], [0.0, 0.0, 1.0]], table.field(column).type)
    pq.write_table(table.set_column(column, table.field(column), short), file)
    with pytest.raises(DataError, match="text_embedding has a row that does not have 3 numbers"):
        search.read_embeddings(file)


def test_rows_that_all_lack_the_modality_keep_its_width(tmp_path):
    found = written(tmp_path / "e.parquet", np.eye(3), np.zeros(3, bool))
    assert found.vectors["text"].shape == (3, 3)
    assert not found.present["text"].any()
