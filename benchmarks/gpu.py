"""Check and time the kernel on a CUDA GPU; `benchmarks/gpu.sh` calls it.

    python benchmarks/gpu.py [check] [time] [train] [runs] [tilings] [--out FILE] [--rehearse]

`check` compares every function and rule with float64 on the CPU, in float32, tf32, bf16 and fp16. It also compares two runs.
`time` measures forward and backward beside the peers, in turns, in one run. `train` measures SimCLR end to end, beside lightly.
`runs` trains five systems, and measures how fast they are and how long the GPU waits for batches.
`tilings` times the kernels with other shapes of tiles, for `counterpoint.core.chunks.tiling`.

The record has the card, the versions and the clocks as found. A short table is printed last. A part that ends in an error is
named there, and the other parts run all the same.

`--rehearse` runs all parts without a GPU: small matrices, on the processor, in Triton's interpreter. It finds a missing package
before a GPU is at hand. Its times say nothing, so it writes no record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_check import check
from gpu_train import runs, train
from torch import Tensor

from counterpoint.core import chunks
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.operands import class_similarity, positive_similarity, unit
from counterpoint.core.rules import Diagonal
from counterpoint.core.total import pair_logsumexp_total

OUT = Path(__file__).parents[1] / "results" / "bench" / "gpu.json"
DEADLINE = 470.0  # seconds after which nothing new is started

PARTS = ("check", "time", "train", "runs", "tilings")
PEERS = ("memeff", "open_clip", "lightly nt-xent")  # an error of theirs is not ours


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------------- time


def losses(n: int, device: str = "cuda") -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return name -> loss of two batches of unit rows [n, dim] in bf16; peers that are not installed are missing."""
    scale = torch.tensor(math.log(1 / 0.07), device=device)
    numbers = torch.arange(n, device=device) % max(1, n // 8)

    def two_way(q: Tensor, k: Tensor, keep: int | None = None) -> Tensor:
        s = unit(q, 1 / 0.07)
        out = pair_logsumexp(s, unit(k), columns=True, keep=keep, precision="bf16")
        assert out.columns is not None
        return (out.rows + out.columns).mean() / 2 - positive_similarity(s, unit(k)).mean()

    def one_way(q: Tensor, k: Tensor) -> Tensor:
        s = unit(q, 1 / 0.07)
        return pair_logsumexp_total(s, unit(k), target=torch.arange(len(s), device=s.device), precision="bf16")

    def rows_only(q: Tensor, k: Tensor) -> Tensor:
        s = unit(q, 1 / 0.07)
        return pair_logsumexp(s, unit(k), precision="bf16").rows.mean() - positive_similarity(s, unit(k)).mean()

    def nt_xent(q: Tensor, k: Tensor) -> Tensor:
        x = unit(torch.cat([q, k]), 0.1**-0.5)
        return (
            pair_logsumexp(x, exclude=Diagonal(), precision="bf16").rows.mean()
            - positive_similarity(*x.chunk(2)).mean()
        )

    def supcon(q: Tensor, k: Tensor) -> Tensor:
        s = unit(q, 1 / 0.07)
        found, count = class_similarity(s, unit(k), numbers, numbers)
        return pair_logsumexp_total(s, unit(k), precision="bf16") - (found / count).mean()

    def soft(q: Tensor, k: Tensor) -> Tensor:
        s = unit(q, 1 / 0.07)
        index = torch.stack([numbers, (numbers + 1) % n], 1)
        return pair_logsumexp_total(s, unit(k), precision="bf16") - 0.5 * positive_similarity(s, unit(k), index).mean()

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "two-way": two_way,
        "two-way, nothing kept": lambda q, k: two_way(q, k, 0),
        "one-way": one_way,
        "one-way, rows": rows_only,
        "nt-xent": nt_xent,
        "supcon": supcon,
        "soft targets": soft,
    }
    try:
        from memeff import MemoryEfficientCLIPLoss

        theirs = MemoryEfficientCLIPLoss(temperature=0.07, stable=False)
        found["memeff"] = lambda q, k: theirs(q, k)
    except ImportError as error:
        say(f"without memeff: {error}")
    try:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        found["open_clip"] = lambda q, k: clip(unit(q).to(q.dtype), unit(k).to(k.dtype), scale.exp().to(q.dtype))
    except ImportError as error:
        say(f"without open_clip: {error}")
    try:
        from lightly.loss import NTXentLoss

        pair = NTXentLoss(0.1)
        found["lightly nt-xent"] = lambda q, k: pair(q, k)
    except ImportError as error:
        say(f"without lightly: {error}")
    return found


def milliseconds(step: Callable[[], None], device: str) -> float:
    """Return the milliseconds that a step takes on the device."""
    if device != "cuda":
        started = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - started)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def clocked(
    loss: Callable[[Tensor, Tensor], Tensor], n: int, dim: int, rounds: int, device: str = "cuda"
) -> dict[str, float] | None:
    """Return milliseconds of forward and backward (median) and extra memory in MiB; None where it does not fit."""
    g = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=g, device=device), dim=1)
        .bfloat16()
        .requires_grad_()
        for _ in range(2)
    )

    def step() -> None:
        q.grad = k.grad = None
        loss(q, k).backward()

    try:
        for _ in range(2):  # compiles, and lets the allocator settle
            step()
        before = high = 0
        if device == "cuda":
            q.grad = k.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times = [milliseconds(step, device) for _ in range(rounds)]
        if device == "cuda":
            high = torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"ms": statistics.median(times), "extra_mib": (high - before) / 2**20}


SIZES = [
    # rows, width, what is timed there
    (256, 512, ("two-way", "open_clip")),
    (4096, 512, ("two-way", "one-way", "nt-xent", "memeff", "open_clip", "lightly nt-xent")),
    (32768, 512, ("two-way", "two-way, nothing kept", "one-way", "one-way, rows", "nt-xent", "supcon", "soft targets",
                  "memeff", "open_clip")),
    (65536, 768, ("two-way", "memeff", "open_clip")),
    (262144, 512, ("two-way, nothing kept", "memeff")),
]  # fmt: skip


def timed(
    started: float, device: str = "cuda", sizes: Sequence[tuple[int, int, Sequence[str]]] = SIZES
) -> list[dict[str, Any]]:
    """Time every loss of a size in turns, twice; the smaller median counts. A loss that ends in an error is reported."""
    rows = []
    for n, dim, names in sizes:
        there = losses(n, device)
        rounds, again = (1, 1) if device == "cpu" else (20, 2) if n <= 4096 else (5, 2) if n <= 65536 else (2, 1)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names if name in there}
        for _ in range(again):
            for name, taken in found.items():
                if time.monotonic() - started > DEADLINE:
                    say(f"out of time before {name} at {n}")
                    continue
                try:
                    one = clocked(there[name], n, dim, rounds, device)
                except Exception as error:
                    one = {"ms": None, "extra_mib": None, "error": f"{type(error).__name__}: {error}"[:500]}
                if one is not None:
                    taken.append(one)
        for name, taken in found.items():
            best = min(taken, key=lambda x: x["ms"] or math.inf, default={"ms": None, "extra_mib": None})
            rows.append({"loss": name, "rows": n, "dim": dim, **best})
            say(json.dumps(rows[-1]))
    return rows


TILES = [
    # rows, columns, depth, warps, stages, and the most registers of a thread
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4), (64, 256, 64, 8, 3), (64, 256, 64, 4, 4), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4),
    (128, 128, 64, 8, 3, 128),  # two programs to a multiprocessor: the sums of one beside the products of another
]  # fmt: skip


def tilings(
    device: str = "cuda", n: int = 32768, dim: int = 512, tiles: Sequence[tuple[int, ...]] = TILES
) -> list[dict[str, Any]]:
    """Time the losses with other tiles; a tile that does not compile is a result, too."""
    rows = []
    there = losses(n, device)
    for shape in tiles:
        row: dict[str, Any] = {"tile": list(shape)}
        try:
            with mock.patch.object(chunks, "tiling", return_value=chunks.Tiling(*shape)):
                for name in ("two-way", "two-way, nothing kept", "nt-xent"):
                    found = clocked(there[name], n, dim, 3, device)
                    row[name] = found and round(found["ms"], 2)
        except Exception as error:
            row["error"] = str(error)[:200]
        say(json.dumps(row))
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- the run


def facts() -> dict[str, Any]:
    """Return the card with its clocks and temperature as found, and the versions."""
    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
        )
        card = said.stdout.strip()
    except OSError:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    import triton

    return {"card": card, "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}


def table(record: dict[str, Any]) -> None:
    """Print the times and their ratios to ours, the checks, and the parts that ended in an error."""
    rows = record.get("time", [])
    for row in rows:
        ours = next((x["ms"] for x in rows if x["loss"].startswith("two-way") and x["rows"] == row["rows"]), None)
        missing = _last(row) or "not timed, or does not fit"
        ratio = f"{row['ms'] / ours:6.2f} x two-way" if row["ms"] and ours else missing
        time_, extra = (math.nan if row[name] is None else row[name] for name in ("ms", "extra_mib"))
        print(f"{row['rows']:>7} x {row['dim']}  {row['loss']:<24}{time_:9.2f} ms {extra:9.0f} MiB  {ratio}")
    for row in record.get("train", []):
        print(f"{row['loop']:<24}{row['items_per_second']:9.0f} images a second")
    for row in record.get("runs", []):
        rate, share = row.get("items_per_second", math.nan), row.get("waiting_share", math.nan)
        print(f"{row['system']:<24}{rate:9.0f} items a second, {share:4.0%} of the time waiting {_last(row)}")
    wrong = [row for row in record.get("check", []) if not row["good"]]
    print(f"{len(record.get('check', []))} checks, {len(wrong)} wrong: {sorted({row['case'] for row in wrong})}")
    for part, error in record["errors"].items():
        print(f"{part} ended in an error: {_last({'error': error})}")


def _last(row: dict[str, Any]) -> str:
    """Return the last line of a row's error, or nothing."""
    return str(row.get("error", "")).strip().rpartition("\n")[2]


def run(parts: dict[str, Callable[[], Any]], out: Path | None) -> dict[str, Any]:
    """Run the parts; write the record, over an older one's other parts, after each of them."""
    record: dict[str, Any] = json.loads(out.read_text()) if out and out.is_file() else {}
    record |= {**facts(), "errors": {}}
    for name, part in parts.items():
        started = time.monotonic()
        try:
            record[name] = part()
        except Exception:
            record["errors"][name] = traceback.format_exc()[-4000:]
            say(record["errors"][name])
        say(f"{name}: {time.monotonic() - started:.0f} s")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} (default: the first four)")
    parser.add_argument("--out", type=Path, default=OUT, help="the record; default: results/bench/gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="run on the processor, on small matrices; no record")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)}; there are {', '.join(PARTS)}")
    started = time.monotonic()
    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        chunks.interpreted, chunks.SMALL = True, 0
        parts: dict[str, Callable[[], Any]] = {
            # The interpreter's product of bf16 is wrong. memeff takes CUDA tensors alone.
            "check": lambda: check("cpu", (37, 70, 24), ("exact", "fp16"), processes=1),
            "time": lambda: timed(started, "cpu", [(64, 32, [name for name in losses(64, "cpu") if name != "memeff"])]),
            "train": lambda: train("cpu", batch=8, steps=4),
            "runs": lambda: runs("cpu", small=True),
            "tilings": lambda: tilings("cpu", 64, 32, [(32, 64, 16, 4, 1)]),
        }
    elif torch.cuda.is_available():
        parts = {"check": check, "time": lambda: timed(started), "train": train, "runs": runs, "tilings": tilings}
    else:
        print("gpu.py needs a CUDA GPU; --rehearse runs without one", file=sys.stderr)
        return 2
    chosen = asked.parts or (PARTS if asked.rehearse else PARTS[:4])
    record = run({name: parts[name] for name in PARTS if name in chosen}, None if asked.rehearse else asked.out)
    table(record)
    rows = [row for part in ("check", "time", "runs") for row in record.get(part, [])]
    wrong = [row for row in rows if not row.get("good", "error" not in row) and row.get("loss") not in PEERS]
    return 1 if wrong or record["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
