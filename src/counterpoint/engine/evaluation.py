"""Measure a learner on a split: during a fit, at its end, or after loading a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.core.world import alone
from counterpoint.engine.learner import Learner
from counterpoint.engine.survey import Survey, moved

WATCHED = 512  # number of embeddings of an evaluation that are checked for collapse
RANK = 1.5  # an effective rank below this is a collapse
UNIFORMITY = -1e-4  # a uniformity above this is a collapse: unit rows nearer to each other than 0.01

Track = Callable[[Iterable[Any]], Iterable[Any]]


def measure(
    learner: Learner, task: Any, split: str, *, final: bool, track: Track | None = None
) -> tuple[dict[str, float], Any, dict[str, float]]:
    """Measure a learner on a split of a task, without gradient and in float32.

    Args:
        learner: The learner to measure. Its mode (training or evaluation) is restored afterwards.
        task: Provides `evaluation_loader` and `evaluator`.
        split: "valid" or "test".
        final: Also compute the metrics that are computed once, such as linear probes, and draw figures.
        track: Wraps the batches, for a progress bar. Default: no progress bar.

    Returns three values:

    - the metrics, by name;
    - the task's evaluator, with `figures`, `chance()` and `notes` where it has them;
    - signs of a collapse: `rank`, the effective rank of the embeddings (RankMe: Garrido et al., arXiv 2210.02885), and
      `uniformity`.
    """
    evaluator = task.evaluator(split)
    seen: list[Tensor] = []
    training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            with alone():  # every process sees the whole split, and would count it once for each process
                loader = task.evaluation_loader(split)
                for batch in track(loader) if track else loader:
                    batch = moved(batch, learner.device)
                    found = learner.predict(batch)
                    evaluator.update(batch, found)
                    if sum(map(len, seen)) < WATCHED:
                        seen += _embeddings(found)
                figures = dict(evaluator.compute(final=final))
            figures |= learner.measures(Survey(task, learner), split)  # its passes over splits are shared
    finally:
        learner.train(training)
    return figures, evaluator, signs_of_collapse(seen)


def _embeddings(found: dict[str, Any]) -> list[Tensor]:
    """Return the first rows of the embeddings, or else of the features; an empty list for a learner that gives scores."""
    value = found.get("embedding", found.get("feature"))
    parts = list(value.values())[:1] if isinstance(value, dict) else [] if value is None else [value]
    return [part.detach().float().cpu()[:WATCHED] for part in parts if part.ndim == 2]


def signs_of_collapse(parts: list[Tensor]) -> dict[str, float]:
    """Compute the effective rank and the uniformity of embeddings; return {} for fewer than two rows.

    The rank is the exponential of the entropy of the centred unit rows' singular values. It lies between 1 and the width,
    and is 1 where all rows are the same. The uniformity is log mean exp(-2 d^2) over pairs of rows (Wang and Isola,
    arXiv 2005.10242).
    """
    parts = [part for part in parts if part.shape[1] == parts[0].shape[1]] if parts else []
    if sum(map(len, parts)) < 2:
        return {}
    rows = nn.functional.normalize(torch.cat(parts)[:WATCHED], dim=1)
    rows = rows[rows.isfinite().all(1)]
    there = rows.any(1)  # an item that lacks the modality has a row of zeros
    rows = rows[there] if bool(there.any()) else rows
    if len(rows) < 2:
        return {}
    centred = (rows - rows.mean(0)).double()
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(spectrum.sum())
    rank = 1.0
    if total > 1e-5 * math.sqrt(len(rows)):
        share = spectrum[spectrum > 0] / total
        rank = float((-(share * share.log()).sum()).exp())
    return {"rank": rank, "uniformity": float(torch.pdist(rows).square().mul(-2).exp().mean().log())}


def collapse(signs: dict[str, float]) -> str:
    """Return a warning when the signs show collapsed embeddings, else ""."""
    if not signs or (signs["rank"] >= RANK and signs["uniformity"] <= UNIFORMITY):
        return ""
    return (
        f"the embeddings are collapsing: effective rank {signs['rank']:.2f}, uniformity {signs['uniformity']:.3f} (0: all are "
        "equal). Lower --lr, raise the temperature, or check that views differ"
    )
