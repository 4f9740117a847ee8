"""Compare the kernel with common libraries: time, memory, distance to the machine's limit, and training end to end.

    python benchmarks/contrast.py [--only time memory limit training] [--peers WORD]

It writes results/bench/contrast.json and .svg.

The extra [bench] installs the peers: open_clip_torch, lightly, pytorch-metric-learning. Each measurement runs in a separate
process, ours and the peer's in turn. It is forward and backward in float32 on two threads. The ratio is the peer's median
time over ours. Extra memory is the process's peak minus its memory before the call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OUT = Path(__file__).parents[1] / "results" / "bench" / "contrast.json"
DIM = 512
SIZES = (256, 1024, 4096, 8192)
ROUNDS = {256: 5, 1024: 3, 4096: 3, 8192: 1}
# peer: (our function of the same mathematics, the goal for their time over ours at 4,096 pairs)
PEERS = {
    "open_clip ClipLoss": ("clip", 2.0),
    # The largest scale that CLIP admits: most exponentials underflow, and rows differ by more than float32 holds.
    "open_clip ClipLoss, scale 100": ("clip 100", 1.8),
    "open_clip SigLipLoss": ("siglip", 1.2),
    "lightly NTXentLoss": ("nt_xent", 3.5),
    "lightly DCLLoss": ("dcl", 4.5),
    "pytorch-metric-learning SupConLoss": ("supcon", 8.0),
    "torch linear_cross_entropy": ("one_way", 1.5),
    # Products of bf16 for the gradients, as autocast asks for; the peer computes in float32.
    "torch linear_cross_entropy, bf16 gradients": ("one_way bf16", 1.5),
    "torch linear_cross_entropy, two ways": ("two_ways", 2.5),
}


# ---------------------------------------------------------------------------------------------------- one measurement


def functions(name: str) -> Callable[[Any, Any], Any]:
    """Return a loss of two views [n, DIM]. For supcon both form one batch of ten classes; rows of an item share one."""
    import torch

    scale = torch.tensor(2.0, requires_grad=True)

    def labels(n: int) -> torch.Tensor:
        return (torch.arange(n) % 10).repeat(2)

    sharp, bias = torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    if name in ("clip", "clip 100"):
        from counterpoint.functional import clip

        return lambda a, b: clip(a, b, sharp.log() if name.endswith("100") else scale)
    if name == "siglip":
        from counterpoint.functional import siglip

        return lambda a, b: siglip(a, b, scale, bias)
    if name == "nt_xent":
        from counterpoint.systems.classics.simclr import nt_xent

        return nt_xent
    if name == "dcl":  # NT-Xent whose denominators leave the positive out
        from torch.nn.functional import normalize

        from counterpoint.core.contrast import pair_logsumexp
        from counterpoint.core.operands import positive_similarity
        from counterpoint.core.rules import Diagonal

        def dcl(a: torch.Tensor, b: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
            x = normalize(torch.cat([a, b]), dim=1) / temperature**0.5
            n = len(a)
            return pair_logsumexp(x, exclude=Diagonal((0, n, -n))).rows.mean() - positive_similarity(*x.chunk(2)).mean()

        return dcl
    if name.startswith("one_way"):
        from counterpoint.core.total import pair_logsumexp_total

        kind: Any = "bf16" if name.endswith("bf16") else "auto"
        return lambda a, b: pair_logsumexp_total(10 * a, b, target=torch.arange(len(a)), precision=kind)
    if name == "two_ways":
        from counterpoint.core.contrast import pair_logsumexp
        from counterpoint.core.operands import positive_similarity

        def two_ways(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out = pair_logsumexp(10 * a, b, columns=True)
            assert out.columns is not None
            return (out.rows.mean() + out.columns.mean()) / 2 - positive_similarity(10 * a, b).mean()

        return two_ways
    if name.startswith("torch linear_cross_entropy"):
        from torch.nn.functional import linear_cross_entropy

        def one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(10 * a, b, torch.arange(len(a)))

        return (lambda a, b: (one(a, b) + one(b, a)) / 2) if name.endswith("two ways") else one
    if name == "supcon":
        from counterpoint.functional import supcon_single_view

        return lambda a, b: supcon_single_view(torch.cat([a, b]), labels(len(a)), 0.1)
    if name.startswith("open_clip ClipLoss"):
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return lambda a, b: loss(a, b, sharp if name.endswith("100") else scale.exp())
    if name.startswith("open_clip SigLipLoss"):
        from open_clip.loss import SigLipLoss

        sigmoid = SigLipLoss()
        return lambda a, b: sigmoid(a, b, scale.exp(), bias)
    if name.startswith("lightly"):
        import lightly.loss

        return {"NTXentLoss": lightly.loss.NTXentLoss(0.5), "DCLLoss": lightly.loss.DCLLoss(0.1)}[name.split()[1]]
    from pytorch_metric_learning.losses import SupConLoss

    metric = SupConLoss(temperature=0.1)
    return lambda a, b: metric(torch.cat([a, b]), labels(len(a)))


def resident() -> float:
    """Return the resident memory of this process, in megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(name: str, n: int, dim: int, repeats: int) -> dict[str, Any]:
    import resource

    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(2)
    loss = functions(name)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, dim, generator=g)
    b = normalize(a + torch.randn(n, dim, generator=g), dim=1).requires_grad_()
    a = normalize(a, dim=1).requires_grad_()
    small = [x[:64].detach().requires_grad_() for x in (a, b)]
    loss(*small).backward()  # imports, thread pools
    before = resident()
    times = []
    for _ in range(repeats + (repeats > 1)):
        a.grad = b.grad = None
        started = time.perf_counter()
        value = loss(a, b)
        value.backward()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": statistics.median(times[1:] or times),
        "extra_mb": peak - before,
        "loss": float(value.detach()),
    }


def products(n: int, dim: int, repeats: int) -> dict[str, float]:
    """Time of the bare matrix products of a two-sided loss (three: none computed again, four: all) beside the kernel's."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(2)
    from counterpoint.core.contrast import pair_logsumexp
    from counterpoint.core.rules import Diagonal

    q, k = (normalize(torch.randn(n, dim), dim=1) * 3 for _ in range(2))
    grad = torch.randn(n, n)
    out: dict[str, list[float]] = {}

    def clock(name: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        call()
        out.setdefault(name, []).append(time.perf_counter() - started)

    def run(keep: int, symmetric: bool) -> None:
        x, y = q.clone().requires_grad_(), k.clone().requires_grad_()
        if symmetric:
            pair_logsumexp(x, exclude=Diagonal(), keep=keep).rows.sum().backward()
        else:
            found = pair_logsumexp(x, y, columns=True, keep=keep)
            assert found.columns is not None
            (found.rows.sum() + found.columns.sum()).backward()

    for _ in range(repeats + 1):
        clock("similarities", lambda: q @ k.T)
        clock("to query", lambda: grad @ k)
        clock("to key", lambda: grad.T @ q)
        for symmetric in (False, True):
            clock(f"kept {symmetric}", lambda s=symmetric: run(4 * n * n, s))
            clock(f"again {symmetric}", lambda s=symmetric: run(0, s))
    median = {name: statistics.median(values[1:]) for name, values in out.items()}
    three = median["similarities"] + median["to query"] + median["to key"]
    four = three + median["similarities"]
    return {
        "two_sided_kept": three / median["kept False"],
        "two_sided_computed_again": four / median["again False"],
        "symmetric_kept": three / 2 / median["kept True"],
        "symmetric_computed_again": four / 2 / median["again True"],
        "product_seconds": median["similarities"],
    }


# -------------------------------------------------------------------------------------------------- training end to end


def training(whose: str, batch: int, steps: int, workers: int = 0) -> dict[str, float]:
    """Measure images a second of SimCLR on cifar10: our learner, or lightly's transforms and loss in a plain loop."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    from counterpoint import data
    from counterpoint.experiment import task_class
    from counterpoint.systems.classics.simclr import SYSTEM
    from counterpoint.training import default_config

    source = data.load("cifar10")
    config = default_config("simclr", "cifar10")
    learner = SYSTEM.learner(config, SimpleNamespace(**task_class(SYSTEM)(source, config).facts), 0)
    learner.train()
    network = torch.nn.Sequential(learner.encoder, learner.projector)
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9)
    order = np.random.default_rng(0).permutation(len(source.train))
    times = []
    if whose == "ours":
        generator = torch.Generator().manual_seed(0)
        for step in range(steps + 1):
            started = time.perf_counter()
            rows = order[step * batch : (step + 1) * batch]
            images = torch.from_numpy(source.train.images(rows)).permute(0, 3, 1, 2)
            losses = learner.loss(learner.prepare({"image": images, "index": torch.from_numpy(rows)}, generator))
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
    else:
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform
        from PIL import Image

        transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
        loss = NTXentLoss(config.temperature)
        pictures = source.train.images(order[: batch * (steps + 1)])

        class Pictures(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(pictures)

            def __getitem__(self, index: int) -> Any:
                return transform(Image.fromarray(pictures[index]))

        loader = torch.utils.data.DataLoader(Pictures(), batch_size=batch, num_workers=workers)
        started = time.perf_counter()
        for one, two in loader:
            optimizer.zero_grad()
            value = loss(network(one), network(two))
            value.backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
            started = time.perf_counter()
    return {"images_per_second": batch * len(times[1:]) / sum(times[1:])}


# --------------------------------------------------------------------------------------------------------- the whole run


def child(*words: Any) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, words)], check=True, capture_output=True, text=True
    )
    return dict(json.loads(out.stdout.splitlines()[-1]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def time_peers(wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Time the peers whose names contain one of these words; default: all. The record keeps the rows of the others."""
    chosen = {peer: of for peer, of in PEERS.items() if not wanted or any(word in peer for word in wanted)}
    known = json.loads(OUT.read_text()).get("time", []) if OUT.is_file() else []
    rows = [row for row in known if row["peer"] in PEERS and row["peer"] not in chosen]
    for peer, (ours, goal) in chosen.items():
        for n in (*SIZES, 16384) if peer.startswith("torch") else SIZES:
            repeats = {256: 40, 1024: 10, 4096: 3}.get(n, 1)
            pairs = [
                (child("measure", ours, n, DIM, repeats), child("measure", peer, n, DIM, repeats))
                for _ in range(ROUNDS.get(n, 1))
            ]
            our_s, peer_s = (statistics.median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
            row = {
                "peer": peer,
                "ours": ours,
                "pairs": n,
                "dim": DIM,
                "times_faster": round(peer_s / our_s, 2),
                "our_ms": round(1e3 * our_s, 2),
                "peer_ms": round(1e3 * peer_s, 2),
                "our_extra_mb": round(statistics.median(a["extra_mb"] for a, _ in pairs), 1),
                "peer_extra_mb": round(statistics.median(b["extra_mb"] for _, b in pairs), 1),
                "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
                "goal": {256: 0.9, 4096: goal}.get(n),
            }
            say(json.dumps(row))
            rows.append(row)
    return rows


def memory() -> dict[str, Any]:
    import numpy as np

    sizes = (8192, 16384, 32768, 65536)
    found = {n: child("measure", "clip", n, 256, 1) for n in sizes}
    extra = [found[n]["extra_mb"] for n in sizes]
    slope, offset = np.polyfit(sizes, extra, 1)
    rest = np.array(extra) - (slope * np.array(sizes) + offset)
    out = {
        "what": "clip, D = 256, forward and backward",
        "extra_mb": dict(zip(map(str, sizes), (round(x, 1) for x in extra), strict=True)),
        "seconds": {str(n): round(found[n]["seconds"], 1) for n in sizes},
        "mb_per_1000_pairs": round(1000 * float(slope), 3),
        "r_squared_of_a_line": round(1 - float((rest**2).sum() / np.var(extra) / len(extra)), 4),
        "matrix_would_take_mb": round(65536**2 * 4 / 2**20),
    }
    say(json.dumps(out))
    return out


def limit() -> dict[str, Any]:
    out = {"what": "products alone over the kernel's time, N = 8192, D = 512", "goal": 0.8}
    out |= {name: round(value, 3) for name, value in child("products", 8192, DIM, 3).items()}
    say(json.dumps(out))
    return out


def end_to_end() -> dict[str, Any]:
    out: dict[str, Any] = {
        "what": "SimCLR on cifar10, batch 256, the same encoder (resnet-s) and views; ours in one process, lightly's views "
        "in the loop's own process or in two workers",
        "goal": 1.5,
    }
    for workers in (0, 2):
        pairs = [(child("training", "ours", 256, 12), child("training", "lightly", 256, 12, workers)) for _ in range(3)]
        ours, lightly = (statistics.median(pair[side]["images_per_second"] for pair in pairs) for side in (0, 1))
        out[f"workers_{workers}"] = {
            "our_images_per_second": round(ours, 1),
            "lightly_images_per_second": round(lightly, 1),
            "times_faster": round(ours / lightly, 2),
        }
    say(json.dumps(out))
    return out


def draw(record: dict[str, Any], path: Path) -> None:
    """Plot times over batch size, ours and the peers', on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "counterpoint", "font.size": 9}
    figure, grid = plt.subplots(2, 4, figsize=(12, 6), sharey=True, constrained_layout=True)
    axes = grid.ravel()
    for axis in axes[len(PEERS) :]:
        axis.set_visible(False)
    for axis, peer in zip(axes, PEERS, strict=False):
        rows = [row for row in record["time"] if row["peer"] == peer]
        n = [row["pairs"] for row in rows]
        axis.loglog(n, [row["peer_ms"] for row in rows], "o-", color="#b0553a", label=peer)
        axis.loglog(n, [row["our_ms"] for row in rows], "o-", color="#2a6f97", label="counterpoint")
        for row in rows:
            axis.annotate(
                f"{row['times_faster']:.1f}×",
                (row["pairs"], row["our_ms"]),
                xytext=(0, -12),
                textcoords="offset points",
                ha="center",
            )
        axis.set_title(peer, fontsize=9)
        axis.set_xlabel("pairs in the batch")
        axis.set_xticks(n, [f"{x}" for x in n])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[:: grid.shape[1]]:
        axis.set_ylabel("forward + backward, ms")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["time", "memory", "limit", "training"])
    parser.add_argument("--peers", nargs="*", default=(), help="time only peers whose names contain one of these words")
    parser.add_argument("--child", nargs="*")
    words = parser.parse_args()
    if words.child:
        what, *rest = words.child
        call = {"measure": measure, "products": products, "training": training}[what]
        print(json.dumps(call(*(int(x) if x.isdigit() else x for x in rest))))
        return
    from importlib.metadata import PackageNotFoundError, version

    from counterpoint.engine.run import machine, versions

    record = json.loads(OUT.read_text()) if OUT.is_file() else {}
    parts = {"time": lambda: time_peers(words.peers), "memory": memory, "limit": limit, "training": end_to_end}
    for part in words.only:
        record[part] = parts[part]()
        for name in ("open_clip_torch", "lightly", "pytorch-metric-learning"):
            with contextlib.suppress(
                PackageNotFoundError
            ):  # the rows of a peer that is not here stay, so does its version
                record.setdefault("peers", {})[name] = version(name)
        record |= {"threads": 2, "versions": versions(), "machine": machine()}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(record, indent=2) + "\n")  # after each part: the whole takes half an hour
    if "time" in record:
        draw(record, OUT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
