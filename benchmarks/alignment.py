"""Compare the losses of the alignment systems with direct transcriptions of their formulas: time and value.

    python benchmarks/alignment.py [--rounds 7] [--threads 1]      writes results/bench/alignment.json

Each pair takes the same float32 rows, forward and backward, in turn in one process. The record has the medians over the rounds
(more rounds than requested where both are fast). It also has the ratio of the medians and the difference of the values. The
ratio is the transcription's time over ours: above 1 ours is faster. A transcription stores the matrices of its formula, as the
authors' code does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.systems.alignment.symile import draw_permutations

OUT = Path(__file__).parents[1] / "results" / "bench" / "alignment.json"
DIM = 256
SCALE = 10.0


def rows(count: int, n: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, DIM, generator=g), dim=1).requires_grad_() for _ in range(count)]


def symile_n(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x = rows(3, n)
    drawn = draw_permutations(3, n, torch.Generator().manual_seed(1))

    def plain() -> Tensor:
        losses = []
        for a in range(3):
            others = [x[m] for m in range(3) if m != a]
            keys = others[0][drawn[a, 0]] * others[1][drawn[a, 1]]
            positive = (x[a] * others[0] * others[1]).sum(1)
            logits = torch.where(torch.eye(n, dtype=torch.bool), positive, x[a] @ keys.T) * SCALE
            losses.append(F.cross_entropy(logits, torch.arange(n)))
        return torch.stack(losses).mean()

    return x, lambda: fn.symile(x, SCALE, "n", drawn), plain


def symile_n_squared(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x = rows(3, n)

    def plain() -> Tensor:
        losses = []
        for a in range(3):
            b, c = (x[m] for m in range(3) if m != a)
            logits = torch.einsum("id,jd,kd->ijk", x[a], b, c).flatten(1) * SCALE
            losses.append(F.cross_entropy(logits, torch.arange(n) * (n + 1)))
        return torch.stack(losses).mean()

    return x, lambda: fn.symile(x, SCALE, "n_squared"), plain


def cwcl(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    p, q, frozen = rows(3, n)
    frozen = frozen.detach()
    scale = torch.tensor(SCALE).log()

    def plain() -> Tensor:
        f = F.normalize(frozen, dim=1)
        w = (1 + f @ f.T) / 2
        s = scale.exp() * (p @ q.T)
        target = w / w.sum(1, keepdim=True)
        return -(target * s.log_softmax(1)).sum(1).mean() + F.cross_entropy(s.T, torch.arange(n))

    return [p, q], lambda: fn.cwcl(p, q, frozen, scale), plain


def contrastive_gap(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x, y = rows(2, n)

    def plain() -> Tensor:
        s, at = x @ y.T * SCALE, torch.arange(n)
        clip = (F.cross_entropy(s, at) + F.cross_entropy(s.T, at)) / 2
        uniform = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (x, y)]
        apart = torch.cdist(x, y).square()[~torch.eye(n, dtype=torch.bool)].mul(-2).exp().mean().log()
        return clip + sum(uniform) / 2 + (x - y).square().sum(1).mean() + apart

    return [x, y], lambda: fn.contrastive_gap_loss(x, y, 1 / SCALE, True, True, True)[0], plain


def m3co(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x, y = rows(2, n)
    g = torch.Generator().manual_seed(2)
    perm, lam = torch.randperm(n, generator=g), torch.rand(n, generator=g)
    perm = perm.roll(1) if (perm == torch.arange(n)).any() else perm

    def plain() -> Tensor:
        s = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * SCALE
        target = torch.diag(lam)
        target[torch.arange(n), perm] = 1 - lam
        return -((target * s.log_softmax(1)).sum(1).mean() + (target * s.log_softmax(0)).sum(0).mean()) / 2

    return [x, y], lambda: fn.m3co_loss(x, y, perm, lam, 1 / SCALE), plain


def multisclip(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x, y = rows(2, n)

    def plain() -> Tensor:
        p, g = F.normalize(x, dim=1), F.normalize(y, dim=1)
        target, s = (g @ g.T * SCALE).softmax(1), p @ g.T * SCALE
        return -((target * s.log_softmax(1)).sum(1).mean() + (target * s.T.log_softmax(1)).sum(1).mean()) / 2

    return [x, y], lambda: fn.multisclip_loss(x, y, 1 / SCALE), plain


def mil_nce(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    video, text = rows(1, n)[0], rows(1, 3 * n, seed=1)[0]

    def plain() -> Tensor:
        s = (SCALE * video @ text.T).view(n, n, 3)
        own = s[torch.arange(n), torch.arange(n)].logsumexp(1)
        return (torch.cat([s.flatten(1), s.transpose(0, 1).flatten(1)], 1).logsumexp(1) - own).mean()

    return [video, text], lambda: fn.mil_nce(SCALE * video, text), plain


def cl2l(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x = rows(6, n)

    def both(a: Tensor, b: Tensor, scale: float, smoothing: float) -> Tensor:
        s, at = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, torch.arange(n)
        sides = [F.cross_entropy(part, at, label_smoothing=smoothing) for part in (s, s.T)]
        return torch.stack(sides)

    def plain() -> Tensor:
        local = torch.stack([both(a, b, 10.0, 0.1) for a in x[2:4] for b in x[4:6]]).mean(0)
        return ((both(x[0], x[1], SCALE, 0.0) + 2 * local) / 3).mean()

    return x, lambda: fn.cl2l_loss(x[0], x[1], x[2:4], x[4:6], SCALE, 10.0, 0.1), plain


def swalip(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    x = rows(4, n)

    def assigned(scores: Tensor) -> Tensor:
        q = (scores / 0.05).exp().T
        for _ in range(3):
            q = q / q.sum(1, keepdim=True)
            q = q / q.sum(0, keepdim=True)
        return q.T

    def plain() -> Tensor:
        image, text = ([F.normalize(v, dim=1) for v in part] for part in (x[:2], x[2:]))
        total = []
        for a in (0, 1):
            for b in (0, 1):
                with torch.no_grad():
                    scores = image[1 - a] @ text[1 - b].T
                    to_text, to_image = assigned(scores), assigned(scores.T)
                s = SCALE * image[a] @ text[b].T
                one, other = (t * p.log_softmax(1) for t, p in ((to_text, s), (to_image, s.T)))
                total.append(-(one.sum(1).mean() + other.sum(1).mean()) / 2)
        return torch.stack(total).mean()

    return x, lambda: fn.swalip_loss(x[:2], x[2:], SCALE), plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "symile, n": (symile_n, (256, 1024, 4096)),
    "symile, n_squared": (symile_n_squared, (64, 128, 256)),
    "cwcl": (cwcl, (256, 1024, 4096)),
    "contrastive-gap": (contrastive_gap, (256, 1024, 4096)),
    "m3co": (m3co, (256, 1024, 4096)),
    "multisclip": (multisclip, (256, 1024, 4096)),
    "mil-nce": (mil_nce, (256, 1024, 2048)),
    "cl2l": (cl2l, (256, 1024, 2048)),
    "swalip": (swalip, (256, 1024, 2048)),
}


def timed(inputs: list[Tensor], loss: Callable[[], Tensor], calls: int = 1) -> tuple[float, float]:
    """Return the seconds of a call, the mean of several in a row, and its value. With one thread, seconds of the processor."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(calls):
        for x in inputs:
            x.grad = None
        value = loss()
        if value.requires_grad:
            value.backward()
    return (clock() - started) / calls, value.item()


def warm_allocator() -> None:
    """Release a block of almost 32 MiB, as training does. From then on glibc keeps up to 62 MiB of released memory.

    A new process returns each matrix of a MiB at once. The next call pays for its pages again.
    """
    torch.empty(31 * 2**18)


def run(
    cases: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]],
    out: Path,
    said: str | None,
    *,
    dim: int = DIM,
    memory: Callable[[list[Tensor], Callable[[], Tensor]], int] | None = None,
    rounds: int = 7,
    lasts: float = 0.0,
) -> None:
    """Time every case at its sizes, ours and the transcription in turn, and write the record.

    Args:
        cases: by name, what makes inputs, our way and the transcription, and its sizes.
        out: the record to write, unless the command line names another.
        said: text for --help.
        dim: width of the rows, for the record.
        memory: says the bytes that a call holds; None: not recorded.
        rounds: least number of timings of a way.
        lasts: seconds. A quick way is called several times in a row, so that each timing lasts so long; 50 times at most. Then it
            runs in its own steady state. Default: one call.
    """
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warm_allocator()
    record: dict[str, Any] = {"dim": dim, "threads": options.threads, "rounds": options.rounds, "cases": {}}
    for name, (make, sizes) in cases.items():
        for n in sizes:
            inputs, ours, plain = make(n)
            timed(inputs, ours), timed(inputs, plain)
            calls = [max(1, min(50, round(lasts / timed(inputs, way)[0]))) for way in (ours, plain)]
            pairs, started = [], time.perf_counter()
            # What is quick is taken more often: for a second, a hundred times at most.
            while len(pairs) < options.rounds or (len(pairs) < 101 and time.perf_counter() - started < 1):
                pairs.append((timed(inputs, ours, calls[0]), timed(inputs, plain, calls[1])))
            a, b = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
            apart = abs(pairs[0][0][1] - pairs[0][1][1])
            held = [memory(inputs, loss) for loss in (ours, plain)] if memory else []
            record["cases"].setdefault(name, {})[str(n)] = {
                "ours_s": round(a, 5),
                "transcription_s": round(b, 5),
                "ratio": round(b / a, 2),
                **({"calls": calls} if lasts else {}),
                **({"ours_bytes": held[0], "transcription_bytes": held[1]} if held else {}),
                "values_apart": float(f"{apart:.1e}"),
            }
            told = f"  {held[0] / 2**20:.1f} and {held[1] / 2**20:.1f} MiB" if held else ""
            print(
                f"{name:20} n {n:5}  ours {a:8.4f} s  transcription {b:8.4f} s  {b / a:5.2f}x  apart {apart:.1e}{told}",
                flush=True,
            )
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(CASES, OUT, __doc__)
