"""Compare ALBEF's momentum contrast with a transcription of its formula that stores whole matrices: time, extra memory.

    python benchmarks/albef.py [--rounds 7]      writes results/bench/albef.json

Both take the same batch, queues and momentum features (256 wide, float32, alpha 0.4). They run forward and backward, in turn,
in one process on one thread. The record has the medians over the rounds and their ratio, the transcription's time over ours:
above 1 ours is faster. Memory is the peak of a separate process of each, minus its memory before the call.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OUT = Path(__file__).parents[1] / "results" / "bench" / "albef.json"
DIM, ALPHA, TEMPERATURE = 256, 0.4, 0.07
SIZES = ((64, 4096), (64, 65536), (256, 16384), (512, 4096), (512, 65536))


def transcription(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    images: Tensor,
    texts: Tensor,
    temp: Tensor,
    alpha: float,
) -> Tensor:
    """Compute the paper's formula line by line: both networks' matrices, hard and soft targets, two cross-entropies."""
    import torch
    from torch.nn.functional import log_softmax, normalize, softmax

    f_v, f_t = normalize(image, dim=1), normalize(text, dim=1)
    with torch.no_grad():
        g_v, g_t = normalize(image_m, dim=1), normalize(text_m, dim=1)
        every_v, every_t = torch.cat([g_v.T, images], 1), torch.cat([g_t.T, texts], 1)
        taught_t, taught_v = g_v @ every_t / temp, g_t @ every_v / temp
        hard = torch.zeros_like(taught_t)
        hard.fill_diagonal_(1)
        target_t = alpha * softmax(taught_t, 1) + (1 - alpha) * hard
        target_v = alpha * softmax(taught_v, 1) + (1 - alpha) * hard
    to_text, to_image = f_v @ every_t / temp, f_t @ every_v / temp
    loss_t = -(log_softmax(to_text, 1) * target_t).sum(1).mean()
    loss_v = -(log_softmax(to_image, 1) * target_v).sum(1).mean()
    return (loss_t + loss_v) / 2


def case(batch: int, queue: int) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Return both losses as functions without arguments, and the inputs that get gradients."""
    import torch
    from torch.nn.functional import normalize

    from counterpoint.systems.alignment.albef import momentum_contrast_soft

    g = torch.Generator().manual_seed(0)
    student = [torch.randn(batch, DIM, generator=g).requires_grad_() for _ in range(2)]
    copy = [torch.randn(batch, DIM, generator=g) for _ in range(2)]
    queues = [normalize(torch.randn(DIM, queue, generator=g), dim=0) for _ in range(2)]
    temp = torch.tensor(TEMPERATURE, requires_grad=True)
    calls = {
        "ours": lambda: momentum_contrast_soft(*student, *copy, *queues, temp, ALPHA),
        "transcription": lambda: transcription(*student, *copy, *queues, temp, ALPHA),
    }
    return calls, [*student, temp]


def step(call: Callable[[], Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Run forward and backward. Return the seconds and the loss."""
    for x in wanted:
        x.grad = None
    started = time.perf_counter()
    loss = call()
    loss.backward()
    return time.perf_counter() - started, float(loss.detach())


def measure(batch: int, queue: int, rounds: int) -> dict[str, Any]:
    calls, wanted = case(batch, queue)
    times: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds, values[name] = step(call, wanted)
            if number:  # the first warms up
                times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    memory = {name: child(name, batch, queue) for name in calls}
    return {
        "batch": batch,
        "queue": queue,
        "our_ms": round(1e3 * median["ours"], 2),
        "transcription_ms": round(1e3 * median["transcription"], 2),
        "times_faster": round(median["transcription"] / median["ours"], 2),
        "our_extra_mb": memory["ours"],
        "transcription_extra_mb": memory["transcription"],
        "loss_difference": abs(values["ours"] - values["transcription"]),
    }


def extra(name: str, batch: int, queue: int) -> float:
    """Return the peak memory of one forward and backward pass, minus the memory before it, in megabytes."""
    small, few = case(8, 64)
    step(small[name], few)
    calls, wanted = case(batch, queue)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    step(calls[name], wanted)
    # Not ru_maxrss: a child begins with its parent's.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return round(int(peak[1]) / 1024 - before, 1)


def child(name: str, batch: int, queue: int) -> float:
    words = [sys.executable, __file__, "--memory", name, str(batch), str(queue)]
    out = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each size")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rounds < 1:
        parser.error("--rounds must be at least 1")
    import torch

    torch.set_num_threads(1)
    if words.memory:
        name, batch, queue = words.memory
        print(extra(name, int(batch), int(queue)))
        return
    from counterpoint.engine.run import machine, versions

    rows = []
    for batch, queue in SIZES:
        rows.append(measure(batch, queue, words.rounds))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    record = {
        "what": f"momentum_contrast_soft, forward and backward, dim {DIM}, alpha {ALPHA}, float32",
        "rows": rows,
        "rounds": words.rounds,
        "threads": 1,
        "versions": versions(),
        "machine": machine(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
