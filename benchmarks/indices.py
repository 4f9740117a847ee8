"""Choose the index of `counterpoint index` by measurement: memory, build and queries a second at a recall of 0.95.

    python benchmarks/indices.py --rows 200000                          every index; about half an hour on 2 cores
    python benchmarks/indices.py --rows 1000000 --only NAME NAME        two of them

The vectors are made as embeddings are: unit rows of 512 numbers, in groups within groups of very different sizes (Zipf), with
noise whose spectrum falls. The timed queries are rows of the same kind, moved by a constant, as those of another modality are.

Every index returns candidates, and the exact rows order them, because `search` holds the rows anyway. For each index the
fastest setting is found with recall@10 >= 0.95 on three kinds of queries, as `counterpoint index` asks: the timed ones, rows with
a little noise, and rows with noise of the same norm. Then all are timed in turn, so that the machine's load meets all alike.
Where usearch and pylance are installed, they take part. Writes results/bench/indices.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads do not compete with others on the machine

import faiss
import numpy as np

THREADS = int(os.environ["OMP_NUM_THREADS"])
K, QUERIES, ENOUGH, ROUNDS = 10, 1000, 0.95, 5
WIDER = (1, 2, 5, 10, 20)  # candidates, in multiples of K
FACTORY = {  # name -> how FAISS names it, and the settings that trade recall for speed
    "ivf-sq8": "IVF{lists},SQ8",
    "ivf-hnsw-sq8": "IVF{lists}_HNSW32,SQ8",
    "ivf-pq-fastscan": "IVF{lists},PQ256x4fs",
    "opq-ivf-pq-fastscan": "OPQ128_512,IVF{lists},PQ128x4fs",
    "ivf-pq64": "IVF{lists},PQ64",
    "ivf-rabitq": "IVF{lists},RaBitQ",
    "ivf-rabitq-fastscan": "IVF{lists},RaBitQfs",
    "ivf-rabitq2-fastscan": "IVF{lists},RaBitQfs2",
    "ivf-hnsw-rabitq-fastscan": "IVF{lists}_HNSW32,RaBitQfs",
    "ivf-hnsw-rabitq2-fastscan": "IVF{lists}_HNSW32,RaBitQfs2",
}
GRAPHS = {"hnsw-flat": None, "hnsw-sq8": "QT_8bit", "hnsw-fp16": "QT_fp16", "hnsw-bf16": "QT_bf16"}
USEARCH = {"usearch-f32": "f32", "usearch-bf16": "bf16", "usearch-f16": "f16", "usearch-i8": "i8"}
Search = Callable[[np.ndarray, int], np.ndarray]


@dataclass
class Built:
    """An index, its settings and how to search with them."""

    search: Callable[[dict[str, int]], Search]
    settings: list[dict[str, int]]
    build_s: float
    megabytes: float
    effort: str  # the setting that is searched for, for each number of candidates: "ef" or "probes"
    chosen: dict[str, int] = field(default_factory=dict)
    recall: float = 0.0
    taken: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)


def vectors(rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make rows and queries, in blocks."""
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    spectrum /= np.linalg.norm(spectrum)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)

    def drawn(count: int) -> np.ndarray:
        noise: np.ndarray = (rng.standard_normal((count, dim), dtype=np.float32) * spectrum) @ turn
        return noise

    coarse, fine = drawn(max(10, rows // 5000)), drawn(max(100, rows // 100))
    home = rng.integers(0, len(coarse), len(fine))
    share = 1.0 / np.arange(1, len(fine) + 1)
    shift = 0.3 * drawn(1)

    def some(count: int) -> np.ndarray:
        found = np.empty((count, dim), np.float32)
        for at in range(0, count, 65_536):
            here = slice(at, min(at + 65_536, count))
            group = rng.choice(len(fine), here.stop - at, p=share / share.sum())
            found[here] = coarse[home[group]] + 0.7 * fine[group] + 0.6 * drawn(len(group))
        return found

    def unit(found: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)

    return unit(some(rows)), unit(some(QUERIES) + shift + 0.2 * drawn(QUERIES))


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_faiss(index: Any, x: np.ndarray) -> tuple[float, float]:
    """Train and fill an index. Return the seconds and the megabytes of its file."""
    taken = timed(lambda: (index.is_trained or index.train(x), index.add(x)))
    return taken, len(faiss.serialize_index(index)) / 1e6


def graph(x: np.ndarray, kind: str | None) -> Built:
    """Build a graph over float32 rows (kind None), or over scalars of fewer bits."""
    dim = x.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT
    index = (
        faiss.IndexHNSWFlat(dim, 32, metric)
        if kind is None
        else faiss.IndexHNSWSQ(dim, getattr(faiss.ScalarQuantizer, kind), 32, metric)
    )
    index.hnsw.efConstruction = 128
    build, size = in_faiss(index, x)

    def search(setting: dict[str, int]) -> Search:
        index.hnsw.efSearch = max(setting["ef"], setting["wide"] * K)
        return lambda q, count: index.search(q, count)[1]

    return Built(search, [{"ef": ef, "wide": wide} for ef in (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
                          for wide in WIDER if wide * K <= ef], build, size, "ef")  # fmt: skip


def inverted(x: np.ndarray, name: str) -> Built:
    """Build an inverted file."""
    lists = int(2 ** round(np.log2(4 * len(x) ** 0.5)))
    index = faiss.index_factory(x.shape[1], FACTORY[name].format(lists=lists), faiss.METRIC_INNER_PRODUCT)
    inner = faiss.extract_index_ivf(index)
    inner.cp.niter = 10
    build, size = in_faiss(index, x)

    centres = faiss.downcast_index(inner.quantizer)

    def search(setting: dict[str, int]) -> Search:
        inner.nprobe = setting["probes"]
        if hasattr(centres, "hnsw"):
            centres.hnsw.efSearch = 2 * setting["probes"]
        return lambda q, count: index.search(q, count)[1]

    probes = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
    return Built(search, [{"probes": n, "wide": wide} for n in probes for wide in WIDER], build, size, "probes")


def of_usearch(x: np.ndarray, dtype: str) -> Built:
    """Build a graph of usearch."""
    from usearch.index import Index

    index = Index(ndim=x.shape[1], metric="cos", dtype=dtype, connectivity=32, expansion_add=128, expansion_search=64)
    keys = np.arange(len(x))
    build = timed(lambda: index.add(keys, x, threads=THREADS))
    with tempfile.TemporaryDirectory() as folder:
        index.save(f"{folder}/index")
        size = Path(folder, "index").stat().st_size / 1e6

    def search(setting: dict[str, int]) -> Search:
        index.expansion_search = max(setting["ef"], setting["wide"] * K)
        return lambda q, count: np.atleast_2d(index.search(q, count, threads=THREADS).keys).astype(np.int64)

    return Built(search, [{"ef": ef, "wide": wide} for ef in (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
                          for wide in WIDER if wide * K <= ef], build, size, "ef")  # fmt: skip


def of_lance(x: np.ndarray) -> Built:
    """Build an index of pylance, in files."""
    import lance
    import pyarrow as pa

    folder = tempfile.mkdtemp()
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    data = lance.write_dataset(pa.table({"item": np.arange(len(x)), "vector": column}), f"{folder}/x.lance")
    lists = int(4 * len(x) ** 0.5) // 8
    build = timed(
        lambda: data.create_index(
            "vector", "IVF_HNSW_SQ", metric="dot", num_partitions=lists, ef_construction=128, m=32
        )
    )
    size = sum(f.stat().st_size for f in Path(folder, "x.lance", "_indices").rglob("*") if f.is_file()) / 1e6
    opened = lance.dataset(f"{folder}/x.lance")

    def search(setting: dict[str, int]) -> Search:
        def ask(q: np.ndarray, count: int) -> np.ndarray:
            near = {"column": "vector", "k": count, "nprobes": setting["probes"], "ef": max(64, count)}
            found = [opened.to_table(columns=["item"], nearest={**near, "q": one})["item"].to_numpy() for one in q]
            return np.stack([np.pad(one, (0, count - len(one)), constant_values=-1) for one in found])

        return ask

    return Built(search, [{"probes": n, "wide": wide} for n in (2, 8, 24) for wide in (1, 5)], build, size, "probes")


def ordered(x: np.ndarray, q: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Order candidates by the exact rows, and keep K."""
    if rows.shape[1] == K:
        return rows
    similarity = np.concatenate([np.matmul(x[rows[at : at + 64]], q[at : at + 64, :, None])[..., 0]
                                 for at in range(0, len(q), 64)])  # fmt: skip
    similarity[rows < 0] = -np.inf
    return np.take_along_axis(rows, np.argsort(-similarity, axis=1)[:, :K], 1)


def exact(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(x)
    found: np.ndarray = flat.search(q, K)[1]
    return found


Kinds = dict[str, tuple[np.ndarray, np.ndarray]]  # kinds of queries, with their nearest rows


def kinds_of(x: np.ndarray, q: np.ndarray, count: int = 200) -> Kinds:
    """Return the timed queries, and rows with noise of 0.1 and of 1 times their norm."""
    rng = np.random.default_rng(1)
    some = x[rng.permutation(len(x))[:count]]
    found = {"moved rows": q}
    for size in (0.1, 1.0):
        noise = rng.standard_normal(some.shape, dtype=np.float32) / np.float32(some.shape[1] ** 0.5)
        found[f"rows with noise of {size} times their norm"] = some + np.float32(size) * noise
    return {name: (rows, exact(x, rows)) for name, rows in found.items()}


def recall_of(built: Built, setting: dict[str, int], x: np.ndarray, kinds: Kinds) -> float:
    """Return the least recall of all kinds of queries."""
    search, least = built.search(setting), 1.0
    for rows, right in kinds.values():
        found = ordered(x, rows, search(rows, setting["wide"] * K))
        least = min(least, float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, right, strict=False)])))
        if least < ENOUGH:
            break
    return least


def choose(built: Built, x: np.ndarray, q: np.ndarray, kinds: Kinds) -> None:
    """Find, for each number of candidates, the cheapest setting with enough recall; the fastest of them is the index's.

    The settings are tried from the cheapest on. The first with enough recall and the one before it enclose the least that
    suffices. Their middle is tried until they differ by a sixteenth. So the recalls of all indices are nearly equal.
    """
    able: dict[int, tuple[dict[str, int], float]] = {}
    below: dict[int, int] = {}
    for setting in built.settings:
        wide = setting["wide"]
        if wide in able:
            continue
        recall = recall_of(built, setting, x, kinds)
        built.recall = max(built.recall, recall)
        if recall < ENOUGH:
            below[wide] = setting[built.effort]
            continue
        able[wide] = setting, recall
        least, most = below.get(wide, 0), setting[built.effort]
        while most - least > max(1, most // 16):
            middle = (least + most) // 2
            recall = recall_of(built, tried := setting | {built.effort: middle}, x, kinds)
            if recall < ENOUGH:
                least = middle
            else:
                most, able[wide] = middle, (tried, recall)
    if not able:
        return

    def taken(setting: dict[str, int]) -> float:
        search = built.search(setting)
        return min(timed(lambda: ordered(x, q, search(q, setting["wide"] * K))) for _ in range(3))

    built.chosen, built.recall = min(able.values(), key=lambda one: taken(one[0]))


def ask(built: Built, x: np.ndarray, q: np.ndarray) -> None:
    """Time queries together, and a hundred of them one by one."""
    search, count = built.search(built.chosen), built.chosen["wide"] * K
    built.taken.append(timed(lambda: ordered(x, q, search(q, count))) / len(q))
    single = [timed(lambda row=row: ordered(x, row, search(row, count))) for row in q[:100, None]]
    built.one.append(statistics.median(single))


def builders(x: np.ndarray) -> Iterator[tuple[str, Callable[[], Built]]]:
    for name, kind in GRAPHS.items():
        yield name, lambda kind=kind: graph(x, kind)
    for name in FACTORY:
        yield name, lambda name=name: inverted(x, name)
    for name, dtype in USEARCH.items():
        yield name, lambda dtype=dtype: of_usearch(x, dtype)
    yield "lance-ivf-hnsw-sq", lambda: of_lance(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=(), help="names of indices; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/bench/indices.json"))
    options = parser.parse_args()
    faiss.omp_set_num_threads(THREADS)
    x, q = vectors(options.rows, options.dim)
    kinds = kinds_of(x, q)
    made: dict[str, Built] = {}
    for name, build in builders(x):
        if options.only and name not in options.only:
            continue
        try:
            made[name] = build()
        except (ImportError, RuntimeError, AttributeError) as error:
            print(f"{name}: left out ({str(error).splitlines()[0][:100]})", flush=True)
            continue
        one = made[name]
        some = (
            {kind: (rows[:100], right[:100]) for kind, (rows, right) in kinds.items()}
            if name.startswith("lance")
            else kinds
        )
        choose(one, x, some["moved rows"][0], some)
        print(
            f"{name:22} built in {one.build_s:.0f} s, {one.megabytes:.0f} MB, {one.chosen}, recall {one.recall:.3f}",
            flush=True,
        )
    for _, (name, one) in itertools.product(range(ROUNDS), made.items()):
        if not one.chosen:  # its recall is too small with every setting
            one.taken, one.one = [math.inf], [math.inf]
            continue
        ask(one, x, q[:100] if name.startswith("lance") else q)
    found = {
        name: {
            "build_s": round(one.build_s, 1),
            "megabytes": round(one.megabytes, 1),
            "queries_a_second": round(1 / statistics.median(one.taken)) if one.chosen else None,
            "one_ms": round(1e3 * statistics.median(one.one), 3) if one.chosen else None,
            "recall": round(one.recall, 4),
            "setting": one.chosen or None,
        }
        for name, one in made.items()
    }
    for name, row in found.items():
        print(f"{name:22}", "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    record = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    record |= {"dim": options.dim, "k": K, "recall": ENOUGH, "threads": THREADS}
    record["rows"].setdefault(str(options.rows), {}).update(found)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
