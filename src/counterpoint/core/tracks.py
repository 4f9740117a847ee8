"""Memories of instances over time, and a tracker that links detections of successive frames by their embeddings.

A memory is a running mean whose weight for a new embedding is its similarity with earlier ones. Training and tracking use the
same rule (CTVIS, arXiv 2307.12616, Sec. 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.checks import need_within, shapes
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision

Memory = Literal["similarity", "last", "momentum"]
MOMENTUM = 0.75  # weight of a new embedding in the memory "momentum"


def _weights(embeddings: Tensor, valid: Tensor, cache: int | None, kind: Memory) -> Tensor:
    """Return the weight [..., T] of each embedding when it enters the memory: 1 at first, 0 where it is not valid."""
    order = valid.long().cumsum(-1)
    before = order - valid.long()  # number of earlier valid embeddings
    if kind == "similarity":
        u = unit(embeddings)
        earlier = torch.ones(u.shape[-2], u.shape[-2], dtype=torch.bool, device=u.device).tril(-1) & valid[..., None, :]
        if cache is not None:
            earlier = earlier & (order[..., None, :] > before[..., :, None] - cache)
        mean = (u @ u.mT).masked_fill(~earlier, 0.0).sum(-1) / earlier.sum(-1).clamp(min=1)
        weight = F.relu(mean)
    else:
        weight = torch.full_like(embeddings[..., 0], 1.0 if kind == "last" else MOMENTUM)
    return torch.where(before == 0, 1.0, weight) * valid


@full_precision
def similarity_guided_memory(
    embeddings: Float[Tensor, "*instances frames dim"],
    valid: Int[Tensor, "*instances frames"],
    cache: int | None = None,
    kind: Memory = "similarity",
) -> Float[Tensor, "*instances frames dim"]:
    """Compute an instance's memory after each frame: m <- (1 - beta) m + beta e, beta = max(0, mean cos(earlier, e)).

    Args:
        embeddings: an embedding e for each frame; those of frames where an instance is absent do not count.
        valid: 1 where an instance is in a frame, else 0.
        cache: number of the last earlier embeddings whose mean cosine counts; None (default): all.
        kind: "similarity" (default); "last", the last embedding; "momentum", beta = 0.75.

    The first embedding is the memory (beta = 1). Before it the memory is zero. Gradients flow through time, also through
    beta. Raises ValueError for shapes that do not fit.

    >>> similarity_guided_memory(torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0]]), torch.tensor([1, 1, 1]))[-1]
    tensor([3., 0.])
    """
    if embeddings.ndim < 2 or valid.shape != embeddings.shape[:-1]:
        raise ValueError(f"valid must be [..., frames] of embeddings, got {shapes(embeddings=embeddings, valid=valid)}")
    beta = _weights(embeddings, valid.bool(), cache, kind)
    rows: list[Tensor] = []
    share = torch.zeros_like(beta)  # of each frame's embedding in the memory
    own = torch.eye(beta.shape[-1], dtype=beta.dtype, device=beta.device)
    for t in range(beta.shape[-1]):
        now = beta[..., t, None]
        share = (1 - now) * share + now * own[t]
        rows.append(share)
    if not rows:
        return embeddings
    return torch.stack(rows, -2) @ embeddings


class Positives(NamedTuple):
    """The positive of each instance in each frame."""

    rows: Float[Tensor, "*instances frames dim"]
    has: Bool[Tensor, "*instances frames"]  # whether there is one: the instance is in the frame and in another one


@full_precision
def memory_positives(
    embeddings: Float[Tensor, "*instances frames dim"],
    valid: Int[Tensor, "*instances frames"],
    memory: Float[Tensor, "*instances frames dim"],
    use_memory: Bool[Tensor, "*instances frames"],
) -> Positives:
    """Select the positive of each instance in each frame from 1 on.

    If the instance was in an earlier frame, the positive is its last memory or its last embedding. Else it is its first
    later embedding.

    Args:
        embeddings, valid: as in `similarity_guided_memory`.
        memory: memories after each frame.
        use_memory: whether to take the memory; else the last embedding.

    Raises ValueError for shapes that do not fit.
    """
    if memory.shape != embeddings.shape or valid.shape != embeddings.shape[:-1] or use_memory.shape != valid.shape:
        raise ValueError(
            f"memory must be as embeddings, got {shapes(embeddings=embeddings, memory=memory, valid=valid)}"
        )
    there, frames = valid.bool(), valid.shape[-1]
    at = torch.arange(frames, device=valid.device).expand(valid.shape)
    seen = torch.where(there, at, -1).cummax(-1).values
    last = F.pad(seen[..., :-1], (1, 0), value=-1)  # most recent earlier frame, or -1
    later = torch.where(there, at, frames).flip(-1).cummin(-1).values.flip(-1)
    following = F.pad(later[..., 1:], (0, 1), value=frames)  # first later frame, or `frames`
    before = F.pad(memory[..., :-1, :], (0, 0, 1, 0))
    source = torch.where(last >= 0, last, following.clamp(max=frames - 1))
    single = embeddings.gather(-2, source[..., None].expand(embeddings.shape))
    rows = torch.where((use_memory & (last >= 0))[..., None], before, single)
    return Positives(rows, there & (at > 0) & ((last >= 0) | (following < frames)))


def select_positive(
    embeddings: Float[Tensor, "frames dim"],
    valid: Int[Tensor, " frames"],
    memory: Float[Tensor, "frames dim"],
    t: int,
    use_memory: bool = True,
) -> Float[Tensor, " dim"] | None:
    """Return the positive of one instance in frame t >= 1, by `memory_positives`; None where it is absent or has none.

    Raises ValueError for a frame out of range.
    """
    need_within(1, len(valid) - 1, t=t)
    found = memory_positives(embeddings, valid, memory, torch.full(valid.shape, bool(use_memory)))
    return found.rows[t] if bool(found.has[t]) else None


# ----------------------------------------------------------------------------------------------------------- the tracker


class Bank(NamedTuple):
    """The memories of a tracker, m tracks in the order of their ids."""

    ids: NDArray[np.int64]  # [m]
    memory: NDArray[np.floating]  # [m, dim]
    frames: NDArray[np.int64]  # [m] number of frames in which a track was seen


class Tracker:
    """Link the detections of successive frames to tracks.

    Similarities are dot products with the tracks' memories. A match is the mean of their softmax over tracks and their
    softmax over detections. Detections choose in their order, which should be that of their scores.

    Args:
        match_threshold: least value of a match, 0 to 1; by default 0.3.
        init_threshold: least score of a detection that starts a track, 0 to 1; by default 0.01.
        cache: number of earlier embeddings that weigh a new one in the memory; by default 10.
        dead: number of frames without a detection after which a track is forgotten; by default 20.
        kind: rule of the memory, see `similarity_guided_memory`.
    """

    def __init__(
        self,
        match_threshold: float = 0.3,
        init_threshold: float = 0.01,
        cache: int = 10,
        dead: int = 20,
        kind: Memory = "similarity",
    ) -> None:
        need_within(0, 1, match_threshold=match_threshold, init_threshold=init_threshold)
        if cache < 1 or dead < 0:
            raise ValueError(f"cache must be at least 1 and dead at least 0, got {cache} and {dead}")
        self.threshold, self.start, self.dead, self.kind = match_threshold, init_threshold, dead, kind
        self.cache = cache
        self.next = self.time = 0
        self.ids = self.frames = self.seen = np.zeros(0, np.int64)
        self.memory: NDArray[np.floating] = np.zeros((0, 0))
        self.past: NDArray[np.floating] = np.zeros((0, cache, 0))  # unit rows of the last embeddings

    @property
    def bank(self) -> Bank:
        return Bank(self.ids.copy(), self.memory.copy(), self.frames.copy())

    def step(self, embeddings: Float[np.ndarray, "n dim"], scores: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the track of each detection of the next frame; -1 where it fits no track and starts none."""
        found = np.full(len(embeddings), -1, np.int64)
        places = self._matched(embeddings) if len(self.ids) and len(embeddings) else np.full(len(embeddings), -1)
        linked = places >= 0
        found[linked] = self.ids[places[linked]] if linked.any() else -1
        self._update(places[linked], embeddings[linked])
        self._begin(found, embeddings, np.flatnonzero(~linked & (scores > self.start)))
        self.time += 1
        alive = self.time - 1 - self.seen <= self.dead
        if not alive.all():
            self.ids, self.frames, self.seen = self.ids[alive], self.frames[alive], self.seen[alive]
            self.memory, self.past = self.memory[alive], self.past[alive]
        return found

    def _matched(self, embeddings: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the place of each detection's track in the bank, or -1. Each track is taken once."""
        similarity = embeddings @ self.memory.T
        match = (_softmax(similarity, 1) + _softmax(similarity, 0)) / 2
        chosen = np.full(len(embeddings), -1, np.int64)
        for row, values in enumerate(match):
            over = values > self.threshold
            if over.sum() > 1:  # prefer tracks that were seen often
                values = values * np.where(over, self.frames, self.frames[over].mean())
            best = int(values.argmax())
            if values[best] > self.threshold:
                chosen[row] = best
                match[row + 1 :, best] = 0
        return chosen

    def _update(self, places: NDArray[np.int64], rows: NDArray[np.floating]) -> None:
        if not len(places):
            return
        unit_rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        if self.kind == "similarity":
            known = np.minimum(self.frames[places], self.cache)
            beta = np.einsum("ncd,nd->n", self.past[places], unit_rows) / known
            beta = np.maximum(beta, 0)[:, None]
        else:
            beta = np.full((len(places), 1), 1.0 if self.kind == "last" else MOMENTUM)
        self.memory[places] = (1 - beta) * self.memory[places] + beta * rows
        self.past[places, self.frames[places] % self.cache] = unit_rows
        self.frames[places] += 1
        self.seen[places] = self.time

    def _begin(self, found: NDArray[np.int64], embeddings: NDArray[np.floating], rows: NDArray[np.int64]) -> None:
        """Start a track for each of these detections."""
        if not len(rows):
            return
        new = embeddings[rows]
        past = np.zeros((len(rows), self.cache, new.shape[1]), new.dtype)
        past[:, 0] = new / np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-12)
        found[rows] = np.arange(self.next, self.next + len(rows))
        if not len(self.ids):
            self.memory, self.past = new.copy(), past
        else:
            self.memory, self.past = np.concatenate([self.memory, new]), np.concatenate([self.past, past])
        self.ids = np.concatenate([self.ids, found[rows]])
        self.frames = np.concatenate([self.frames, np.ones(len(rows), np.int64)])
        self.seen = np.concatenate([self.seen, np.full(len(rows), self.time)])
        self.next += len(rows)


def online_tracker(
    embeddings: Sequence[Float[Tensor, "n dim"]],
    scores: Sequence[Float[Tensor, " n"]],
    match_threshold: float = 0.3,
    init_threshold: float = 0.01,
    cache: int = 10,
    dead: int = 20,
    kind: Memory = "similarity",
) -> tuple[list[Int[Tensor, " n"]], Bank]:
    """Track the detections of all frames of a clip with a `Tracker`, which describes the arguments.

    Args:
        embeddings: for each frame those of its detections, in the order in which they choose a track.
        scores: for each frame those of its detections.

    Returns the track of each detection, -1 for none, and the memories after the last frame.
    """
    tracker = Tracker(match_threshold, init_threshold, cache, dead, kind)
    ids = [
        torch.from_numpy(tracker.step(rows.detach().cpu().numpy(), score.detach().cpu().numpy()))
        for rows, score in zip(embeddings, scores, strict=True)
    ]
    return ids, tracker.bank


def _softmax(values: NDArray[np.floating], axis: int) -> NDArray[np.floating]:
    shares = np.exp(values - values.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)
