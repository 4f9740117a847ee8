"""Compare the vector indices FAISS, usearch and LanceDB for `counterpoint index`, on vectors like our embeddings.

    python benchmarks/search.py [--rows 10000 100000] [--dim 128]

Unit vectors in clusters, the queries near some of them. For each library: the exact search of one query and of a hundred at
once, then its graph or inverted index: time to build, one query, recall of the exact 10 nearest, size on disk, time to open.
One thread each. Writes results/bench/search.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

K, QUERIES = 10, 100


def vectors(rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(10, rows // 100), dim))
    found = centres[rng.integers(len(centres), size=rows + QUERIES)] + 0.7 * rng.standard_normal((rows + QUERIES, dim))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found[:rows].astype(np.float32), found[rows:].astype(np.float32)


def seconds(call: Callable[[], Any], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def recall(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, right, strict=True)]))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def numpy_exact(x: np.ndarray, q: np.ndarray, folder: Path, right: np.ndarray) -> dict[str, float]:
    def ask(queries: np.ndarray) -> np.ndarray:
        similarity = queries @ x.T
        return np.argpartition(-similarity, K, axis=1)[:, :K]

    return {"exact_one_ms": 1e3 * seconds(lambda: ask(q[:1])), "exact_hundred_ms": 1e3 * seconds(lambda: ask(q))}


def faiss_(x: np.ndarray, q: np.ndarray, folder: Path, right: np.ndarray) -> dict[str, float]:
    import faiss

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(x)
    out = {
        "exact_one_ms": 1e3 * seconds(lambda: flat.search(q[:1], K)),
        "exact_hundred_ms": 1e3 * seconds(lambda: flat.search(q, K)),
    }
    graph = faiss.IndexHNSWFlat(x.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 128, 64
    out["build_s"] = seconds(lambda: graph.add(x), 1)
    out["one_ms"] = 1e3 * seconds(lambda: graph.search(q[:1], K), 50)
    out["recall"] = recall(graph.search(q, K)[1], right)
    file = folder / "faiss"
    faiss.write_index(graph, str(file))
    out["disk_mb"] = size_of(file) / 1e6
    out["open_ms"] = 1e3 * seconds(lambda: faiss.read_index(str(file), faiss.IO_FLAG_MMAP), 3)
    return out


def usearch_(x: np.ndarray, q: np.ndarray, folder: Path, right: np.ndarray) -> dict[str, float]:
    from usearch.index import Index, MetricKind, search

    out = {
        "exact_one_ms": 1e3 * seconds(lambda: search(x, q[:1], K, MetricKind.IP, exact=True, threads=1)),
        "exact_hundred_ms": 1e3 * seconds(lambda: search(x, q, K, MetricKind.IP, exact=True, threads=1)),
    }
    graph = Index(ndim=x.shape[1], metric="ip", dtype="f32", connectivity=32, expansion_add=128, expansion_search=64)
    keys = np.arange(len(x))
    out["build_s"] = seconds(lambda: graph.add(keys, x, threads=1), 1)
    out["one_ms"] = 1e3 * seconds(lambda: graph.search(q[0], K, threads=1), 50)
    out["recall"] = recall(graph.search(q, K, threads=1).keys, right)
    file = folder / "usearch"
    graph.save(str(file))
    out["disk_mb"] = size_of(file) / 1e6
    out["open_ms"] = 1e3 * seconds(lambda: Index.restore(str(file), view=True), 3)
    return out


def lancedb_(x: np.ndarray, q: np.ndarray, folder: Path, right: np.ndarray) -> dict[str, float]:
    import lancedb
    import pyarrow as pa

    base = lancedb.connect(str(folder / "lance"))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    table = base.create_table("x", pa.table({"item": np.arange(len(x)), "vector": flat}))

    def ask(one: np.ndarray, **nprobes: int) -> list[int]:
        query = table.search(one).distance_type("dot").limit(K)
        query = query.nprobes(nprobes["nprobes"]).refine_factor(10) if nprobes else query
        return query.select(["item"]).to_arrow()["item"].to_pylist()

    out = {
        "exact_one_ms": 1e3 * seconds(lambda: ask(q[0])),
        "exact_hundred_ms": 1e3 * seconds(lambda: [ask(one) for one in q], 1),
    }
    parts = max(2, int(len(x) ** 0.5))
    out["build_s"] = seconds(
        lambda: table.create_index(metric="dot", num_partitions=parts, num_sub_vectors=x.shape[1] // 8), 1
    )
    out["one_ms"] = 1e3 * seconds(lambda: ask(q[0], nprobes=20), 50)
    out["recall"] = recall(np.array([ask(one, nprobes=20) for one in q]), right)
    out["disk_mb"] = size_of(folder / "lance") / 1e6
    out["open_ms"] = 1e3 * seconds(lambda: lancedb.connect(str(folder / "lance")).open_table("x"), 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("results/bench/search.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {"dim": options.dim, "k": K, "threads": 1, "rows": {}}
    for rows in options.rows:
        x, q = vectors(rows, options.dim)
        right = np.argsort(-(q @ x.T), axis=1)[:, :K]
        record["rows"][str(rows)] = {}
        for name, measure in (("numpy", numpy_exact), ("faiss", faiss_), ("usearch", usearch_), ("lancedb", lancedb_)):
            folder = Path(tempfile.mkdtemp())
            try:
                found = measure(x, q, folder, right)
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
            finally:
                shutil.rmtree(folder)
            record["rows"][str(rows)][name] = {key: round(value, 4) for key, value in found.items()}
            print(f"{rows:>8} {name:8}", "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
