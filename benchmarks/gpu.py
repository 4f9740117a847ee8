"""Check and time the kernel on a CUDA GPU; `benchmarks/gpu.sh` calls it.

    python benchmarks/gpu.py [check] [time] [train] [--out FILE] [--tilings]

`check` compares every function and rule with float64 on the CPU, in float32, tf32, bf16 and fp16. It also compares two runs.
`time` measures forward and backward beside the peers, in turns, in one run. `train` measures SimCLR end to end.
`--tilings` times the kernels with other shapes of tiles, for `counterpoint.core.chunks.tiling`.
The record has the card, the versions and the clocks as found. A short table is printed last.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from counterpoint.core import chunks
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import pair_logsumexp, pair_logsumexp_towards, pair_softplus
from counterpoint.core.operands import class_similarity, positive_similarity, unit
from counterpoint.core.precision import Products, products
from counterpoint.core.rules import Diagonal, Labels, Listed, Rule, Targets, Views, Where
from counterpoint.core.total import pair_logsumexp_total

OUT = Path(__file__).parents[1] / "results" / "bench" / "gpu.json"
# Largest error of values (absolute, of logs) and of gradients (relative to the largest), by type of product.
ALLOWED = {"exact": (5e-6, 5e-6), "tf32": (5e-2, 5e-2), "bf16": (2e-1, 1e-1), "fp16": (5e-2, 3e-2)}
TYPES: dict[Products, torch.dtype | None] = {
    "exact": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
DEADLINE = 470.0  # seconds after which nothing new is started

Function = Callable[..., list[Tensor]]


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ correctness


def cases(n: int, m: int, dim: int) -> dict[str, tuple[Function, list[tuple[int, int]]]]:
    """Return name -> (function of operands, shapes of the operands). A function works on the operands' device and type."""

    def labels(rows: int, like: Tensor) -> Tensor:
        return torch.arange(rows, device=like.device) % 37 - 5

    def rule_case(rules: Callable[[Tensor], tuple[Rule, ...]], **asked: Any) -> Function:
        def run(q: Tensor, k: Tensor) -> list[Tensor]:
            plain = "plain" if q.dtype == torch.float64 else "auto"
            out = pair_logsumexp(q, k, exclude=rules(q), columns=True, method=plain, **asked)
            return [x for x in out if x is not None]

        return run

    def itself(q: Tensor) -> list[Tensor]:
        plain = "plain" if q.dtype == torch.float64 else "auto"
        return [pair_logsumexp(q, exclude=Diagonal(), method=plain).rows]

    def grid(r: slice, c: slice, like: Tensor) -> Tensor:
        rows = torch.arange(r.start, r.stop, device=like.device)[:, None]
        return rows + torch.arange(c.start, c.stop, device=like.device)

    def weighted(q: Tensor, k: Tensor) -> list[Tensor]:
        plain = "plain" if q.dtype == torch.float64 else "auto"
        weight = lambda r, c: 0.5 + grid(r, c, q) % 4  # noqa: E731
        return [pair_logsumexp(q, k, weight=weight, method=plain).rows]

    def targets(q: Tensor, k: Tensor) -> list[Tensor]:
        index = torch.stack([torch.arange(n), (torch.arange(n) + 3) % m], 1).to(q.device)
        share = torch.full((n, 2), 0.5, dtype=q.dtype, device=q.device)
        if q.dtype == torch.float64:
            s = q @ k.T
            return [s.logsumexp(1), (s.gather(1, index) * share).sum(1)]
        out = pair_logsumexp_towards(q, k, Targets(index, share, 0, m))
        return [out.rows, out.towards]

    def softplus(q: Tensor, k: Tensor) -> list[Tensor]:
        if q.dtype == torch.float64:
            return [torch.nn.functional.softplus(q @ k.T, threshold=100.0).sum(1)]
        return [pair_softplus(q, k)]

    def total(q: Tensor, k: Tensor) -> list[Tensor]:
        return [(q @ k.T).logsumexp(1).mean() if q.dtype == torch.float64 else pair_logsumexp_total(q, k)]

    def targeted(q: Tensor, k: Tensor) -> list[Tensor]:
        own = torch.arange(n, device=q.device) * 7 % m
        if q.dtype == torch.float64:
            return [torch.nn.functional.cross_entropy(q @ k.T, own)]
        return [pair_logsumexp_total(q, k, target=own)]

    def cross(q: Tensor, k: Tensor, tq: Tensor, tk: Tensor) -> list[Tensor]:
        if q.dtype == torch.float64:
            s, t = q @ k.T, tq @ tk.T
            return [-(t.softmax(d) * s.log_softmax(d)).sum(d) for d in (1, 0)]
        out = pair_cross_entropy(q, k, tq, tk, columns=True, teacher_gradient=True)
        assert out.columns is not None
        return [out.rows, out.columns]

    def by_class(q: Tensor, k: Tensor) -> list[Tensor]:
        return [class_similarity(q, k, labels(n, q), labels(m, q))[0]]

    two = [(n, dim), (m, dim)]
    listed = torch.stack([torch.arange(n) % m, torch.full((n,), -1), (torch.arange(n) * 7) % m], 1)
    return {
        "no rule": (rule_case(lambda q: ()), two),
        "nothing kept": (rule_case(lambda q: (), keep=0), two),
        "diagonals": (rule_case(lambda q: (Diagonal((0, 3, -2)),)), two),
        "views": (rule_case(lambda q: (Views(n // 2, 4),)), two),
        "own label": (rule_case(lambda q: (Labels(labels(n, q), labels(m, q)),)), two),
        "other labels": (rule_case(lambda q: (Labels(labels(n, q), labels(m, q), same=False),)), two),
        "listed": (rule_case(lambda q: (Listed(listed.to(q.device)),)), two),
        "where": (rule_case(lambda q: (Where(lambda r, c: grid(r, c, q) % 3 == 0), Diagonal((1,)))), two),
        "weights": (weighted, two),
        "itself": (itself, [(n, dim)]),
        "targets": (targets, two),
        "softplus": (softplus, two),
        "total": (total, two),
        "total with targets": (targeted, two),
        "by class": (by_class, two),
        "cross-entropy": (cross, [*two, (n, dim // 2), (m, dim // 2)]),
    }


def graded(value: Function, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    out = value(*leaves)
    total = torch.stack([(torch.sin(torch.arange(x.numel(), device=x.device) + 1.0).to(x.dtype).view_as(x)
                          * x.masked_fill(x == -math.inf, 0.0)).sum() for x in out]).sum()  # fmt: skip
    return [x.detach() for x in out], list(torch.autograd.grad(total, leaves))


def check(device: str, sizes: tuple[int, int, int] = (1403, 1797, 200)) -> list[dict[str, Any]]:
    """Compare each case and type with float64, and with itself run again."""
    rows = []
    for name, (value, shapes) in cases(*sizes).items():
        torch.manual_seed(0)
        operands = [torch.randn(*shape) * 0.4 for shape in shapes]
        # The reference has the rounded operands: what remains is the error of the computation.
        for kind, dtype in TYPES.items():
            given = [x if dtype is None else x.to(dtype).float() for x in operands]
            wanted = graded(value, [x.double().requires_grad_() for x in given])
            with products(kind):
                leaves = [x.to(device).requires_grad_() for x in given]
                found, again = graded(value, leaves), graded(value, leaves)
            allowed = ALLOWED[kind]
            empty = all(torch.equal(x.cpu() == -math.inf, y == -math.inf)
                        for x, y in zip(found[0], wanted[0], strict=True))  # fmt: skip
            clean = [x.masked_fill(x == -math.inf, 0.0) for x in (*found[0], *wanted[0])]
            half = len(found[0])
            values = max(float((x.cpu().double() - y).abs().max() / (1 + y.abs().max()))
                         for x, y in zip(clean[:half], clean[half:], strict=True))  # fmt: skip
            gradients = max(float((x.cpu().double() - y).abs().max() / y.abs().max())
                            for x, y in zip(found[1], wanted[1], strict=True))  # fmt: skip
            equal = all(torch.equal(x, y) for x, y in zip((*found[0], *found[1]), (*again[0], *again[1]), strict=True))
            good = empty and values <= allowed[0] and gradients <= allowed[1] and equal
            rows.append(
                {"case": name, "products": kind, "value": values, "gradient": gradients, "equal": equal, "good": good}
            )
            if not good:
                say(f"WRONG {json.dumps(rows[-1])}")
    say(f"{sum(row['good'] for row in rows)} of {len(rows)} checks are good")
    return rows


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
    except ImportError:
        say("memeff is not installed")
    try:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        found["open_clip"] = lambda q, k: clip(unit(q).to(q.dtype), unit(k).to(k.dtype), scale.exp().to(q.dtype))
    except ImportError:
        say("open_clip is not installed")
    try:
        from lightly.loss import NTXentLoss

        pair = NTXentLoss(0.1)
        found["lightly nt-xent"] = lambda q, k: pair(q, k)
    except ImportError:
        say("lightly is not installed")
    return found


def clocked(loss: Callable[[Tensor, Tensor], Tensor], n: int, dim: int, rounds: int) -> dict[str, float] | None:
    """Return milliseconds of forward and backward (median) and extra memory in MiB; None where it does not fit."""
    g = torch.Generator(device="cuda").manual_seed(0)
    q, k = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=g, device="cuda"), dim=1)
        .bfloat16()
        .requires_grad_()
        for _ in range(2)
    )
    try:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = []
        for _ in range(rounds + 2):
            q.grad = k.grad = None
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            loss(q, k).backward()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        del q, k
        torch.cuda.empty_cache()
    return {"ms": statistics.median(times[2:]), "extra_mib": extra}


SIZES = [
    # rows, width, what is timed there
    (256, 512, ("two-way", "open_clip")),
    (4096, 512, ("two-way", "one-way", "nt-xent", "memeff", "open_clip", "lightly nt-xent")),
    (32768, 512, ("two-way", "two-way, nothing kept", "one-way", "one-way, rows", "nt-xent", "supcon", "soft targets",
                  "memeff", "open_clip")),
    (65536, 768, ("two-way", "memeff", "open_clip")),
    (262144, 512, ("two-way, nothing kept", "memeff")),
]  # fmt: skip


def timed(started: float) -> list[dict[str, Any]]:
    """Time every loss of a size in turns, twice; the smaller median counts."""
    rows = []
    for n, dim, names in SIZES:
        there = losses(n)
        for name in names:
            if name not in there:
                continue
            if time.monotonic() - started > DEADLINE:
                say("out of time")
                return rows
            rounds = 20 if n <= 4096 else 5 if n <= 65536 else 2
            both = [clocked(there[name], n, dim, rounds) for _ in range(2 if n < 262144 else 1)]
            good = [x for x in both if x is not None]
            row: dict[str, Any] = {"loss": name, "rows": n, "dim": dim}
            row |= min(good, key=lambda x: x["ms"]) if good else {"ms": None, "extra_mib": None}
            rows.append(row)
            say(json.dumps(row))
    return rows


def tilings() -> list[dict[str, Any]]:
    """Time the two-way loss with other tiles; a tile that does not compile is reported."""
    rows = []
    for tile in [
        chunks.Tiling(*shape)
        for shape in (
            (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3),
            (128, 256, 64, 8, 4), (64, 256, 64, 8, 3), (64, 256, 64, 4, 4), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4),
            (128, 128, 64, 8, 3, 128),  # two programs to a multiprocessor: the sums of one beside the products of another
        )
    ]:  # fmt: skip
        row: dict[str, Any] = {"tile": list(tile)}
        try:
            with mock.patch.object(chunks, "tiling", return_value=tile):
                for name in ("two-way", "two-way, nothing kept", "nt-xent"):
                    found = clocked(losses(32768)[name], 32768, 512, 3)
                    row[name] = found and round(found["ms"], 2)
        except Exception as error:  # a tile that does not fit is a result
            row["error"] = str(error)[:200]
        say(json.dumps(row))
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- training


def train(
    device: str = "cuda", encoder: str = "torchvision:resnet18", batch: int = 512, steps: int = 12
) -> list[dict[str, Any]]:
    """Measure images a second of SimCLR in bf16 on random pictures of 32 pixels.

    Ours draws views on the device. The other loop has the same network, lightly's transforms in worker processes, and its loss.
    """
    from types import SimpleNamespace

    import numpy as np

    from counterpoint.systems.classics.simclr import SYSTEM

    config = SYSTEM.config(encoder=encoder, batch_size=batch, recipe="simclr-cifar")
    facts = SimpleNamespace(channels=3, size=32, examples=batch * steps, classes=10, class_names=list("0123456789"))
    learner = SYSTEM.learner(config, facts, 0).to(device)
    network = torch.nn.Sequential(*(getattr(learner, name) for name in ("encoder", "projector")))
    pictures = np.random.default_rng(0).integers(0, 256, (batch * steps, 32, 32, 3), np.uint8)
    found: dict[str, list[float]] = {"counterpoint": [], "lightly": []}

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def update(loss: Callable[..., Tensor], *given: Any) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss(*given)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    optimizer, generator = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9), torch.Generator().manual_seed(0)
    for step in range(steps):
        started = wait()
        rows = slice(step * batch, (step + 1) * batch)
        images = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).to(device, non_blocking=True)
        prepared = learner.prepare({"image": images, "index": torch.arange(batch)}, generator)
        update(lambda given: learner.loss(given)["loss"], prepared)
        found["counterpoint"].append(wait() - started)
    try:
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform
        from PIL import Image
    except ImportError:
        say("lightly is not installed: no loop to compare training with")
    else:
        transform, contrast = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0), NTXentLoss(0.1)

        class Pictures(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(pictures)

            def __getitem__(self, index: int) -> Any:
                return transform(Image.fromarray(pictures[index]))

        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        loader = torch.utils.data.DataLoader(Pictures(), batch, num_workers=workers, pin_memory=device == "cuda")
        started = wait()
        for pair in loader:
            one, two = (view.to(device, non_blocking=True) for view in pair)
            update(lambda a, b: contrast(network(a), network(b)), one, two)
            found["lightly"].append(wait() - started)
            started = wait()
    rows_found = []
    for name, times in found.items():
        if times:
            # All steps but the first count: those of a loader that lags behind come in bursts.
            rate = batch * (len(times) - 1) / sum(times[1:])
            rows_found.append({"loop": name, "encoder": encoder, "batch": batch, "images_per_second": rate})
            say(json.dumps(rows_found[-1]))
    return rows_found


# --------------------------------------------------------------------------------------------------------------- the run


def facts() -> dict[str, Any]:
    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
        )
        card = said.stdout.strip()
    except OSError:
        card = torch.cuda.get_device_name()
    import triton

    return {"card": card, "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}


def table(record: dict[str, Any]) -> None:
    """Print the times and their ratios to the peers."""
    rows = record.get("time", [])
    for row in rows:
        ours = next((x["ms"] for x in rows if x["loss"].startswith("two-way") and x["rows"] == row["rows"]), None)
        ratio = f"{row['ms'] / ours:6.2f} x two-way" if row["ms"] and ours else "does not fit"
        size = f"{row['rows']:>7} x {row['dim']}"
        print(
            f"{size}  {row['loss']:<24}{row['ms'] or math.nan:9.2f} ms {row['extra_mib'] or math.nan:9.0f} MiB  {ratio}"
        )
    wrong = [row for row in record.get("check", []) if not row["good"]]
    print(f"{len(record.get('check', []))} checks, {len(wrong)} wrong: {sorted({row['case'] for row in wrong})}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="check, time, train (default: all three)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tilings", action="store_true", help="time the kernels with other shapes of tiles")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA GPU; tests/core/test_chunks.py runs the kernels without one", file=sys.stderr)
        return 2
    started = time.monotonic()
    record: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    record |= facts()
    for part in asked.parts or ["check", "time", "train"]:
        record[part] = {"check": lambda: check("cuda"), "time": lambda: timed(started), "train": train}[part]()
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    if asked.tilings:
        record["tilings"] = tilings()
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    table(record)
    return 0 if all(row["good"] for row in record.get("check", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
