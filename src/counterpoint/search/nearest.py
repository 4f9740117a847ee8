"""Find the nearest rows of embeddings: exactly, or by an index with a measured recall.

Exact search orders hits by similarity, and equal rows by their position in the file, for every k. Similarities of the
candidates are summed again in float64, row by row. A matrix product would round equal rows differently at its edges.

An index (FAISS's inverted file, IVF) divides the rows into lists of neighbours. It stores two bits for each number (RaBitQ). A
search reads the lists nearest to the query. The exact rows order its candidates, five times as many as it needs. It holds each
distinct row once, so that repeated rows leave room for others. When it is built, its recall is measured on three kinds of queries:

- rows of the file with a little noise;
- rows with noise of the same norm as the row;
- rows of other modalities of the same width.

The least of the three recalls counts. Where two bits do not reach 98 %, an index of bytes is built, too, and the better one kept.
An index is used only for the same content and for k up to the largest measured k. It must find at least 95 % of the exact
neighbours. Indices of older versions are read, too: bytes, and graphs (FAISS's HNSW).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoint.core.rows import distinct_rows
from counterpoint.errors import CounterpointError, DataError, needs_extra
from counterpoint.files import check_writable, quoted, replacing
from counterpoint.search.stored import Embeddings, read_embeddings
from counterpoint.words import counted

LISTS = 4  # lists of an index, in multiples of the square root of its rows
LEAST = 39  # rows of a list at least, on average: what k-means wants
ASK = (8, 16, 32, 64, 128, 256)  # lists read in a search: the first value with a recall of AIM is used, else the last
AIM = 0.98  # above ENOUGH, because other queries may be harder than the measured ones
# How FAISS stores numbers in the lists -> candidates of a search, in multiples of k.
STORED = {"RaBitQfs2": 5, "SQ8": 2}
MEASURED = (10, 100)  # values of k for which recall is measured
ENOUGH = 0.95  # share of the exact neighbours that an index must find
QUERIES = 200  # number of queries of each kind for measuring recall
NOISE = {"rows with little noise": 0.1, "rows with as much noise": 1.0}  # relative to the norm of a row
CHUNK = 1 << 16  # rows whose similarities are summed in float64 at a time

Found = list[tuple[float, int]]


@dataclass(frozen=True)
class IndexReport:
    """The measurements of an index from its build, kept beside it as JSON."""

    stamp: str
    modality: str
    rows: int  # items that have the modality
    distinct: int  # different rows among them, which the index holds
    recall_at_10: float  # against exact search, the least of all kinds of queries
    recall: dict[str, dict[str, float]]  # k -> kind of queries -> recall
    ask: int  # lists read in a search; of a graph, candidates kept
    reach: int  # largest k that the index is used for; 0: exact search is used
    how: str
    wider: int = 2  # candidates of a search, in multiples of k

    def __str__(self) -> str:
        used = f"used for k up to {self.reach}" if self.reach else f"below {ENOUGH}: exact search is used"
        repeated = f", {self.distinct} of them different" if self.distinct < self.rows else ""
        return (
            f"{self.modality}: {counted(self.rows, 'row')}{repeated}; recall@10 against exact search {self.recall_at_10:.3f}, "
            f"{used}"
        )


@dataclass(frozen=True)
class StoredIndex:
    """An index over the distinct rows of a modality (nodes), with the rows of the file that each node represents."""

    index: Any
    report: IndexReport
    order: NDArray[np.int64]  # rows of the file, sorted by their node
    starts: NDArray[np.int64]  # [nodes + 1] where each node's rows begin in `order`

    @property
    def ntotal(self) -> int:
        """Count the nodes."""
        return int(self.index.ntotal)

    def rows(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64] | None:
        """Return the rows of at least the k nearest nodes; None when the index finds fewer nodes than exist."""
        k = min(k, self.ntotal)
        nodes = self.index.search(query[None], min(self.report.wider * k, self.ntotal))[1][0]
        nodes = nodes[nodes >= 0]
        if len(nodes) < k:
            return None
        return np.concatenate([self.order[self.starts[n] : self.starts[n + 1]] for n in nodes])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise needs_extra("an index", "search") from error
    return faiss


def index_file(path: Path, modality: str) -> Path:
    """Return the path of an index: beside a file of embeddings, or in a folder of shards. The path of its report ends in .json."""
    if path.is_dir():
        return path / f"{modality}.faiss"
    return path.with_name(f"{path.name}.{modality}.faiss")


def _report_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


# ---------------------------------------------------------------------------------------------------------------- exact


def nearest_rows(found: Embeddings, modality: str, query: NDArray[np.float32], k: int) -> Found:
    """Return (similarity, row) of the k nearest rows, fewer only if there are fewer. Ties are in the order of the file.

    Use the index where it is measured for k, else search exactly.
    """
    made = stored_index(found, modality)
    if made is not None and k <= made.report.reach:
        rows = made.rows(np.asarray(query, np.float32), k)
        if rows is not None:
            return _ranked(found.vectors[modality], np.sort(rows), query, k)
    return exact_nearest(found, modality, query, k)


def exact_nearest(found: Embeddings, modality: str, query: NDArray[np.float32], k: int) -> Found:
    """Return (similarity, row) of the k nearest of all rows that have the modality."""
    vectors, there = found.vectors[modality], found.present[modality]
    with np.errstate(over="ignore", invalid="ignore"):  # values that overflow are summed again in float64
        similarity = vectors @ np.asarray(query, np.float32)
    total = int(np.count_nonzero(there))
    if total < len(there):
        similarity[~there] = -np.inf
    if k >= total:
        return _ranked(vectors, np.flatnonzero(there), query, k)
    similarity[np.isnan(similarity)] = -np.inf
    last = np.partition(similarity, len(similarity) - k)[len(similarity) - k]
    # Also take rows that rounding may have moved below the last position.
    slack = 2 * vectors.shape[1] * np.finfo(np.float32).eps * found.largest(modality) * float(np.linalg.norm(query))
    close = similarity >= last - slack if np.isfinite(last) and np.isfinite(slack) else there.copy()
    return _ranked(vectors, np.flatnonzero(close & there), query, k)


def _ranked(vectors: NDArray[np.float32], rows: NDArray[np.int64], query: NDArray[np.float32], k: int) -> Found:
    """Order ascending rows by similarity, summed in float64 row by row. Return the first k, without NaN."""
    wide = np.asarray(query, np.float64)
    parts = [(vectors[rows[at : at + CHUNK]] * wide).sum(1) for at in range(0, len(rows), CHUNK)]
    similarity = np.concatenate(parts) if parts else np.zeros(0)
    known = ~np.isnan(similarity)
    similarity, rows = similarity[known], rows[known]
    best = np.argsort(-similarity, kind="stable")[:k]
    return [(float(similarity[n]), int(rows[n])) for n in best]


# ---------------------------------------------------------------------------------------------------------------- indices


def index(path: Path | str, *, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Build an index over each modality of embeddings. Return the files of the usable ones.

    They are beside a file, and inside a folder of shards.

    The measurements are written beside each index (FILE.MODALITY.faiss.json) and reported. An index that finds fewer than
    95 % of the exact neighbours is not kept: search stays exact. It is used only for the content that it was made from.
    """
    faiss = _faiss()
    found = read_embeddings(path)
    for note in found.notes:
        say(f"note: {note}")
    for name in found.vectors:
        check_writable(index_file(found.path, name))
    files = []
    for name in found.vectors:
        if not found.present[name].any():
            say(f"note: no item has {name}, so it gets no index")
            continue
        file = index_file(found.path, name)
        built, report = _built(faiss, found, name)
        if report.reach:
            with replacing(file) as out:
                out.write(faiss.serialize_index(built).tobytes())
            files.append(file)
        else:
            file.unlink(missing_ok=True)
        with replacing(_report_file(file)) as out:
            out.write(json.dumps(asdict(report), indent=1).encode())
        say(str(report))
    return files


def _built(faiss: Any, found: Embeddings, name: str) -> tuple[Any, IndexReport]:
    """Build an index over the distinct rows of a modality, and measure its recall."""
    vectors = found.vectors[name][found.present[name]]
    first, _ = distinct_rows(torch.from_numpy(vectors))
    nodes = np.ascontiguousarray(vectors[first.numpy()])
    lists = max(1, min(round(LISTS * len(nodes) ** 0.5), len(nodes) // LEAST))
    queries = _queries(found, name, nodes)
    right = {k: {kind: _kth(nodes, rows, k) for kind, rows in queries.items()} for k in MEASURED}
    tried: list[tuple[Any, IndexReport]] = []
    for stored, wider in STORED.items():
        made = faiss.index_factory(nodes.shape[1], f"IVF{lists},{stored}", faiss.METRIC_INNER_PRODUCT)
        made.cp.min_points_per_centroid, made.cp.max_points_per_centroid, made.cp.niter = 1, 2 * LEAST, 10
        made.train(nodes)
        made.add(nodes)
        for ask in ASK:
            made.nprobe = ask
            recall = {
                k: {kind: _recall(made, nodes, rows, right[k][kind], k, wider) for kind, rows in queries.items()}
                for k in MEASURED
            }
            least = {k: min(by_kind.values()) for k, by_kind in recall.items()}
            if least[MEASURED[0]] >= AIM:
                break
        report = IndexReport(
            stamp=found.stamp(name),
            modality=name,
            rows=len(vectors),
            distinct=len(nodes),
            recall_at_10=least[10],
            recall={str(k): by_kind for k, by_kind in recall.items()},
            ask=ask,
            reach=max((k for k in MEASURED if all(least[m] >= ENOUGH for m in MEASURED if m <= k)), default=0),
            how=f"{QUERIES} queries of each kind at most, from a fixed seed; neighbours among distinct rows; the least counts",
            wider=wider,
        )
        tried.append((made, report))
        if least[MEASURED[0]] >= AIM and report.reach == max(MEASURED):
            break
    return max(tried, key=lambda one: (one[1].reach, one[1].recall_at_10))


def _queries(found: Embeddings, name: str, nodes: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return the queries for measuring recall, by kind (see the module's docstring)."""
    rng = np.random.default_rng(0)
    chosen = nodes[rng.permutation(len(nodes))[:QUERIES]]
    length = np.linalg.norm(chosen, axis=1, keepdims=True)
    queries = {}
    for kind, size in NOISE.items():
        noise = rng.standard_normal(chosen.shape).astype(np.float32) / np.float32(np.sqrt(chosen.shape[1]))
        queries[kind] = np.ascontiguousarray(chosen + np.float32(size) * length * noise)
    for other, rows in found.vectors.items():
        there = np.flatnonzero(found.present[other])
        if other != name and rows.shape[1] == nodes.shape[1] and len(there):
            queries[f"rows of {other}"] = np.ascontiguousarray(rows[rng.permutation(there)[:QUERIES]])
    return queries


def _kth(nodes: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return each query's exact k-th largest similarity, [q]."""
    k = min(k, len(nodes))
    found = np.empty(len(queries), np.float32)
    step = max(1, (1 << 24) // len(nodes))
    for at in range(0, len(queries), step):
        similarity = queries[at : at + step] @ nodes.T
        found[at : at + step] = np.partition(similarity, len(nodes) - k, axis=1)[:, len(nodes) - k]
    return found


def _recall(
    index: Any, nodes: NDArray[np.float32], queries: NDArray[np.float32], kth: NDArray[np.float32], k: int, wider: int
) -> float:
    """Return the share of the exact k nearest nodes among the candidates of an index."""
    k = min(k, len(nodes))
    found = 0
    for query, own, last in zip(queries, index.search(queries, min(wider * k, len(nodes)))[1], kth, strict=True):
        slack = 1e-5 * max(abs(float(last)), 1e-12)
        found += min(k, int((nodes[own[own >= 0]] @ query >= last - slack).sum()))
    return found / (k * len(queries))


def stored_index(found: Embeddings, modality: str) -> StoredIndex | None:
    """Return the usable index of this content; None without one. DataError when its file is damaged.

    An index is read once for each `found`, until one of its files changes.
    """
    file = index_file(found.path, modality)
    stamp = [_changed(file), _changed(_report_file(file))]
    name = f"index of {modality}"
    if name not in found.memo or found.memo[name][0] != stamp:
        found.memo[name] = stamp, _read_index(found, modality, file)
    kept: StoredIndex | None = found.memo[name][1]
    return kept


def _changed(file: Path) -> tuple[int, int] | None:
    """Return the time of change and the size of a file; None where it is missing."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def _read_index(found: Embeddings, modality: str, file: Path) -> StoredIndex | None:
    try:
        report = IndexReport(**json.loads(_report_file(file).read_text()))
        if not report.reach or not file.is_file() or report.stamp != found.stamp(modality):
            return None
        faiss = _faiss()
        read = np.frombuffer(file.read_bytes(), np.uint8)
    except (OSError, ValueError, KeyError, TypeError, CounterpointError):
        return None  # the report is of an older version, or FAISS is absent: search is exact
    try:
        made = faiss.deserialize_index(read)
        if isinstance(made, faiss.IndexIVF):
            made.nprobe = report.ask
        else:  # a graph of an older version
            made.hnsw.efSearch = report.ask
    except (RuntimeError, AttributeError) as error:
        raise DataError(f"{file} is damaged; make it again: counterpoint index {quoted(found.path)}") from error
    there = np.flatnonzero(found.present[modality])
    if report.distinct == report.rows:
        order, starts = there, np.arange(len(there) + 1)
    else:
        _, number = distinct_rows(torch.from_numpy(found.vectors[modality][there]))
        node = number.numpy()
        order, starts = (
            there[np.argsort(node, kind="stable")],
            np.searchsorted(np.sort(node), np.arange(made.ntotal + 1)),
        )
    if made.ntotal != report.distinct or int(starts[-1]) != len(there):
        raise DataError(f"{file} does not fit {found.path}; make it again: counterpoint index {quoted(found.path)}")
    return StoredIndex(made, report, order, starts)
