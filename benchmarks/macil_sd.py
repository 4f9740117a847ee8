"""Measure the speed of MACIL-SD's training step, and of its semi-bag contrast against a loop over the bags.

A and B are timed alternately in this process. Times are medians, and ratios are those of the medians.
Run with `make bench`; the record goes to results/bench/macil-sd.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sides import ratio
from torch import Tensor

from counterpoint.core.mil import topk_mil_pool
from counterpoint.encoders.bags import MacilSDNet, VisualNet
from counterpoint.engine.run import machine, versions
from counterpoint.files import replacing
from counterpoint.systems.alignment.macil_sd import semi_bag_contrast

BATCH, TIME, VISUAL, AUDIO = 128, 200, 1024, 128


def per_bag_loop(
    bag_prob: Tensor, audio_prob: Tensor, visual_prob: Tensor, seq_len: Tensor, audio_rep: Tensor, visual_rep: Tensor
) -> tuple[Tensor, ...]:
    """Compute the contrast as the paper describes it: bag by bag, violent means repeated k times."""

    def mine(prob: Tensor, rep: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        violent, background, normal = [], [], []
        for i in range(len(bag_prob)):
            n = int(seq_len[i])
            k = n // 16 + 1
            background.append(rep[i][prob[i, :n].topk(k, largest=False).indices])
            top = rep[i][prob[i, :n].topk(k).indices]
            if bag_prob[i] > 0.5:
                violent.append(top.mean(0, keepdim=True).expand(k, -1))
            else:
                normal.append(top)
        return violent, background, normal

    def nce(query: list[Tensor], positive: list[Tensor], negative: list[Tensor]) -> Tensor:
        q, p, n = (F.normalize(torch.cat(part), dim=1) for part in (query, positive, negative))
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T], dim=1) / 0.1
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    a, v = mine(audio_prob, audio_rep), mine(visual_prob, visual_rep)
    return nce(a[0], v[0], v[1]), nce(a[0], v[0], v[2]), nce(v[0], a[0], a[1]), nce(v[0], a[0], a[2])


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each function, one after another in every round, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/bench/macil-sd.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    seq_len = torch.randint(40, TIME + 1, (BATCH,), generator=g)
    seq_len[0] = TIME

    # The contrast alone, forward and backward.
    inside = torch.arange(TIME) < seq_len[:, None]
    probs = [torch.rand(BATCH, TIME, generator=g) * inside for _ in range(2)]
    reps = [torch.randn(BATCH, TIME, 128, generator=g, requires_grad=True) for _ in range(2)]
    bag_prob = torch.rand(BATCH, generator=g)

    def contrast(function: Callable[..., tuple[Tensor, ...]]) -> float:
        for rep in reps:
            rep.grad = None
        loss = torch.stack(function(bag_prob, *probs, seq_len, *reps)).sum()
        loss.backward()
        return float(loss.detach())

    if abs(contrast(per_bag_loop) - contrast(semi_bag_contrast)) > 1e-3:
        raise SystemExit("the two contrasts do not agree; nothing was measured")
    alone = alternate(
        {"loop": lambda: contrast(per_bag_loop), "ours": lambda: contrast(semi_bag_contrast)}, 3 * args.rounds
    )

    # The whole step: both networks, all losses, backward, both optimisers.
    visual = torch.randn(BATCH, TIME, VISUAL, generator=g) * inside[..., None]
    audio = torch.randn(BATCH, TIME, AUDIO, generator=g) * inside[..., None]
    label = (torch.rand(BATCH, generator=g) < 0.5).float()
    av, v = MacilSDNet(), VisualNet()
    optimizers = [torch.optim.Adam(av.parameters(), 4e-4), torch.optim.Adam(v.parameters(), 8e-5)]

    def step(function: Callable[..., tuple[Tensor, ...]]) -> None:
        out = av(audio, visual, seq_len)
        # The label decides what is mined here, so that both kinds of bags are there however far training is.
        terms = function(label, out.audio_prob, out.visual_prob, seq_len, out.audio_out, out.visual_out)
        loss = F.binary_cross_entropy(out.mmil_prob, label) + torch.stack(terms).sum()
        visual_loss = F.binary_cross_entropy(v(visual, seq_len).mil_prob, label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + visual_loss).backward()
        for optimizer in optimizers:
            optimizer.step()

    # The same step without its networks: pooling, losses and their backward down to the networks' outputs, and Adam.
    step(semi_bag_contrast)  # leaves gradients for the optimisers to use
    with torch.no_grad():
        first, second = av(audio, visual, seq_len), v(visual, seq_len)
    leaves = [x.detach().requires_grad_() for x in (first.av_logit, first.visual_out, first.audio_out, second.logit)]

    def outside() -> None:
        for leaf in leaves:
            leaf.grad = None
        av_logit, visual_out, audio_out, logit = leaves
        terms = semi_bag_contrast(label, first.audio_prob, first.visual_prob, seq_len, audio_out, visual_out)
        loss = F.binary_cross_entropy(topk_mil_pool(av_logit, seq_len), label) + torch.stack(terms).sum()
        (loss + F.binary_cross_entropy(topk_mil_pool(logit, seq_len), label)).backward()
        for optimizer in optimizers:
            optimizer.step()

    whole = alternate(
        {"loop": lambda: step(per_bag_loop), "ours": lambda: step(semi_bag_contrast), "outside": outside}, args.rounds
    )
    share = ratio(whole["outside"], whole["ours"])
    record = {
        "what": f"batch {BATCH}, {TIME} snippets of which 40..{TIME} valid, width 128, float32, {args.threads} threads",
        "contrast_ms": {name: round(1e3 * statistics.median(s), 2) for name, s in alone.items()},
        "contrast_times_faster_than_loop": round(ratio(alone["loop"], alone["ours"]), 2),
        "step_ms": {name: round(1e3 * statistics.median(s), 1) for name, s in whole.items()},
        "step_times_faster_than_with_loop": round(ratio(whole["loop"], whole["ours"]), 3),
        "share_outside_networks": round(share, 4),
        "goals": {"contrast_times_faster_than_loop": ">= 5", "share_outside_networks": "< 0.10"},
        "versions": versions(),
        "machine": machine(),
    }
    with replacing(args.out) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    print(json.dumps({k: v for k, v in record.items() if k not in ("versions", "machine")}, indent=2))


if __name__ == "__main__":
    main()
