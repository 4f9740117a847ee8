"""Define the task `frames`: learn embeddings of detections from clips; the evaluation tracks instances through other clips.

A training batch, before and after the learner has drawn its frames:

    batch["crops"]       [B, T, Q, 3, S, S] uint8 crops of the detections of T frames
    batch["identities"]  [B, T, Q] instance numbers of a clip; -1 for other detections, -2 for none
    batch["scores"]      [B, T, Q] confidence of the detections
    batch["match"]       [B, T, I] the detection of each instance in each frame, -1 where it is absent

A learner returns "embedding" [B, T, Q, dim] from `predict`. A fixed tracker (`core.tracks.Tracker`) links the detections of each
clip by their embeddings, in the order of their scores. The evaluation measures:

- `id_accuracy`: the share of an instance's detections that have its track. Tracks are assigned to instances so that this share
  is largest, as IDF1 does (Ristani et al. 2016, arXiv 1609.01775).
- `idf1`: the same, in relation to the mean number of true and tracked detections; other detections with a track lower it.
- `id_switches`: the mean number of changes of the track of an instance.
- `back_accuracy`: the share of right detections among those in the first frame after an absence.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.seeds import seed_torch
from counterpoint.core.tracks import Tracker
from counterpoint.core.world import processes
from counterpoint.data.frames import PADDING, Clip, ClipData, ClipSplit
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.views.images import normalise

AT_ONCE = 8  # clips in a batch of the evaluation
SHOWN = 8  # instances on the page


@dataclass
class FramesConfig(OptimConfig):
    """Settings of every learner from clips."""

    epochs: int = 12
    """Passes over the training clips; each takes other frames of a clip."""
    batch_size: int = 16
    """Clips in a batch, over all processes together."""
    encoder: str = "torchvision:resnet50"
    """The network for crops: conv-s, resnet-s, vit-s, timm:NAME, torchvision:NAME, hf:NAME."""
    pretrained: bool = False
    """Start from published weights if the encoder has them."""
    frames: int = 10
    """Frames of a training clip, at least 2."""
    window: int = 20
    """Successive frames that these are drawn from, at least `frames`."""
    flip: float = 0.5
    """Probability that a clip is mirrored, 0 to 1."""
    match_threshold: float = 0.3
    """Least value of the tracker's match, 0 to 1."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 0
    """Number of processes that load clips; 0: load in the main process."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("flip", "match_threshold")
        if self.frames < 2 or self.window < self.frames or self.workers < 0:
            raise CounterpointError(
                f"frames must be at least 2, window at least frames, and workers not negative; got {self.frames}, "
                f"{self.window} and {self.workers}"
            )
        self.need_count(*self.counts)

    def check(self) -> None:
        """Raise CounterpointError for an unknown encoder. Runs before data are read."""
        check_image_encoder(self.encoder)

    def facts(self, data: ClipData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        return data.spec | {"examples": len(data.train), "longest": int(data.train.frames.max(initial=2))}


# ---------------------------------------------------------------------------------------------------------- the learner


def chosen_frames(
    there: Bool[Tensor, "clips frames"], number: int, window: int, drawn: Float[Tensor, "clips _"]
) -> Int[Tensor, "clips number"]:
    """Choose frames in their order from a window of successive frames of each clip; -1 where a clip has too few.

    Args:
        there: whether a frame belongs to the clip; the first ones do.
        number: frames to choose.
        window: length of the window.
        drawn: uniform numbers in 0..1, one for the window and one for each frame; further ones are not used.
    """
    frames = there.shape[1]
    start = (drawn[:, 0] * (there.sum(1) - window + 1).clamp(min=1)).floor().long()
    at = torch.arange(frames, device=there.device)
    inside = there & (at >= start[:, None]) & (at < start[:, None] + window)
    keys = torch.where(inside, drawn[:, 1 : frames + 1], 2.0)
    chosen = keys.argsort(1)[:, :number]
    chosen = torch.where(keys.gather(1, chosen) < 2, chosen, frames)
    chosen = chosen.sort(1).values
    return torch.where(chosen < frames, chosen, -1)


def matches(identities: Int[Tensor, "clips frames queries"]) -> Int[Tensor, "clips frames instances"]:
    """Return the detection of each instance in each frame; -1 where it is absent."""
    instances = max(0, int(identities.max()) + 1) if identities.numel() else 0
    same = identities[..., None] == torch.arange(instances, device=identities.device)
    return torch.where(same.any(2), same.to(torch.uint8).argmax(2), -1)


class FramesLearner(Learner):
    """An encoder of crops. Subclasses add a head, and write `loss(batch)` and `embed(crops)`."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config, self.size = config, data.size
        self.longest: int | None = getattr(data, "longest", None)  # frames of the longest training clip
        seed_torch(seed)
        self.encoder = build_image_encoder(config.encoder, data.size, pretrained=config.pretrained)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the frames of each clip, and mirror some clips."""
        config, rows = self.config, len(batch["crops"])
        total, mine = self.share(rows)
        device = batch["crops"].device
        there = (batch["identities"] != PADDING).any(2)
        # A number for each frame of the longest clip, so that W processes draw the same as one.
        uniform = torch.rand(total, 2 + (self.longest or there.shape[1]), generator=generator)[mine].to(device)
        frames = chosen_frames(there, min(config.frames, there.shape[1]), config.window, uniform[:, 1:])
        mirrored = uniform[:, 0] < config.flip
        number = torch.arange(rows, device=device)[:, None]
        found = {name: batch[name][number, frames.clamp(min=0)] for name in ("crops", "identities", "scores")}
        found["identities"] = found["identities"].masked_fill((frames < 0)[..., None], PADDING)
        found["crops"] = torch.where(mirrored.view(-1, 1, 1, 1, 1, 1), found["crops"].flip(-1), found["crops"])
        return batch | found | {"match": matches(found["identities"])}

    def embed(self, crops: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of normalised crops."""
        return self.encoder(crops)

    def queries(self, batch: dict[str, Any]) -> Float[Tensor, "clips frames queries dim"]:
        """Compute the embeddings of all detections of a batch; zeros where there is none."""
        there = batch["identities"] != PADDING
        rows = self.embed(normalise(batch["crops"][there]))
        return rows.new_zeros(*there.shape, rows.shape[1]).index_put((there.nonzero(as_tuple=True)), rows)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"embedding": self.queries(batch)}

    def turns(self) -> list[Turn]:
        return [self.turn_of([self])]


# ------------------------------------------------------------------------------------------------------------- measures


class Tracked(NamedTuple):
    """Counts of one tracked clip."""

    right: int  # detections of instances with their instance's track
    true: int  # detections of instances
    linked: int  # detections with a track
    switches: int  # changes of the track of an instance
    instances: int
    back: int  # detections in the first frame after an absence
    back_right: int


def tracked(identities: Int[np.ndarray, "frames queries"], tracks: Int[np.ndarray, "frames queries"]) -> Tracked:
    """Compare tracks with identities.

    Args:
        identities: instance numbers of the detections, negative for others.
        tracks: tracks of the detections, negative for none.

    >>> tracked(np.array([[0, 1], [0, 1]]), np.array([[5, 6], [5, 5]])).right
    3
    """
    from scipy.optimize import linear_sum_assignment

    own = identities >= 0
    numbers, at = np.unique(identities[own], return_inverse=True)
    linked = tracks >= 0
    names, to = np.unique(tracks[own & linked], return_inverse=True)
    table = np.zeros((len(numbers), len(names)), np.int64)
    np.add.at(table, (at[linked[own]], to), 1)
    rows, columns = linear_sum_assignment(-table)
    track_of = {int(numbers[row]): int(names[column]) for row, column in zip(rows, columns, strict=True)}
    switches = back = back_right = 0
    for number in numbers.tolist():
        frames, places = np.nonzero(identities == number)
        mine = tracks[frames, places]
        switches += int((mine[1:] != mine[:-1]).sum())
        returned = np.flatnonzero(np.diff(frames) > 1) + 1
        back += len(returned)
        back_right += int((mine[returned] == track_of.get(number, -9)).sum())
    right = int(table[rows, columns].sum())
    return Tracked(right, int(own.sum()), int(linked.sum()), switches, len(numbers), back, back_right)


class FramesEvaluator:
    """Tracks the clips of a split, and compares the tracks with the identities."""

    def __init__(self, config: FramesConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.counts: list[Tracked] = []
        self.shown: tuple[Clip, NDArray[np.int64]] | None = None
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        embeddings = outputs["embedding"].detach().float().cpu().numpy()
        if not np.isfinite(embeddings).all():
            raise diverged("the embeddings hold NaN or infinite values")
        identities, scores = (batch[name].cpu().numpy() for name in ("identities", "scores"))
        for n in range(len(embeddings)):
            tracks = track_clip(embeddings[n], scores[n], identities[n] != PADDING, self.config.match_threshold)
            self.counts.append(tracked(identities[n], tracks))
            if self.shown is None:
                crops = batch["crops"][n].permute(0, 1, 3, 4, 2).cpu().numpy()
                self.shown = Clip(crops, identities[n], scores[n]), tracks

    def compute(self, *, final: bool = False) -> dict[str, float]:
        total = Tracked(*(sum(values) for values in zip(*self.counts, strict=True)))
        found = {
            "id_accuracy": total.right / max(1, total.true),
            "idf1": 2 * total.right / max(1, total.true + total.linked),
            "id_switches": total.switches / max(1, total.instances),
        }
        if total.back:
            found["back_accuracy"] = total.back_right / total.back
        if final and self.shown is not None:
            self.figures = tracks_figure(*self.shown)
        return found


def track_clip(
    embeddings: Float[np.ndarray, "frames queries dim"],
    scores: Float[np.ndarray, "frames queries"],
    there: Bool[np.ndarray, "frames queries"],
    threshold: float,
) -> NDArray[np.int64]:
    """Return the track of each detection of a clip, -1 for none. Detections choose in the order of their scores."""
    tracker = Tracker(threshold)
    found = np.full(there.shape, -1, np.int64)
    for t in range(len(embeddings)):
        order = np.flatnonzero(there[t])
        order = order[np.argsort(-scores[t, order], kind="stable")]
        found[t, order] = tracker.step(embeddings[t, order], scores[t, order])
    return found


def tracks_figure(clip: Clip, tracks: NDArray[np.int64]) -> dict[str, Any]:
    """Draw the instances of a clip over time; the colour of a frame is that of the track."""
    numbers = np.unique(clip.identities[clip.identities >= 0])[:SHOWN]
    size = clip.crops.shape[2]
    larger = max(1, 48 // size)
    edge = 4
    blank = np.full((size * larger + 2 * edge,) * 2 + (3,), 255, np.uint8)
    rows = []
    for number in numbers.tolist():
        row = []
        for t in range(len(clip.crops)):
            at = np.flatnonzero(clip.identities[t] == number)
            picture = blank.copy()
            if len(at):
                track = int(tracks[t, at[0]])
                colour = colorsys.hsv_to_rgb(track * 0.618 % 1, 0.8, 0.85) if track >= 0 else (0.0, 0.0, 0.0)
                picture[:] = [round(255 * part) for part in colour]
                crop = clip.crops[t, at[0]].repeat(larger, 0).repeat(larger, 1)
                picture[edge:-edge, edge:-edge] = crop
            row.append(png(picture))
        rows.append(row)
    return {
        "Instances over time": {
            "kind": "pictures",
            "columns": [f"{t + 1}" for t in range(len(clip.crops))],
            "rows": rows,
            "caption": "A row for each instance of a clip. The colour of a frame is that of the track; a change is a switch. "
            "White: the instance is absent.",
        }
    }


# ------------------------------------------------------------------------------------------------------------- the task


class _Clips(Dataset[dict[str, Any]]):
    """Clips of a split by lists of positions, padded to the longest clip and the most detections."""

    def __init__(self, split: ClipSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        clips = [self.split.clip(int(index)) for index in indices]
        frames, most = (max((c.identities.shape[axis] for c in clips), default=1) for axis in (0, 1))
        size = (clips or [self.split.clip(0)])[0].crops.shape[2]
        crops = np.zeros((len(clips), frames, most, size, size, 3), np.uint8)
        identities = np.full((len(clips), frames, most), PADDING, np.int64)
        scores = np.zeros((len(clips), frames, most), np.float32)
        for n, clip in enumerate(clips):
            place = (n, slice(len(clip.crops)), slice(clip.crops.shape[1]))
            crops[place], identities[place], scores[place] = clip
        return {
            "crops": torch.from_numpy(crops).permute(0, 1, 2, 5, 3, 4),
            "identities": torch.from_numpy(identities),
            "scores": torch.from_numpy(scores),
            "index": torch.from_numpy(np.asarray(indices, np.int64)),
        }


class FramesTask:
    """Loaders and evaluator of one source of clips."""

    name = "frames"
    headline = "id_accuracy"  # the measure it judges by
    contract = "frames"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: ClipData, config: FramesConfig) -> None:
        if not isinstance(data, ClipData):
            raise CounterpointError(f"{data.name} has no clips, which the task frames needs; name a source of clips")
        if not len(data.train) or not len(data.test):
            raise DataError(f"{data.name}: needs training and test clips, has {len(data.train)} and {len(data.test)}")
        self.data, self.config = data, config
        self.facts = config.facts(data)

    def split(self, name: str) -> ClipSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: ClipSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where training would see no second frame, or the valid split is too small."""
        check_watched(self.data.name, len(self.data.valid), "clips")
        if (self.data.train.frames < 2).all():
            raise DataError(f"{self.data.name}: no training clip has two frames; identities need at least two")

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise CounterpointError if these data do not fit a run that was trained on other data."""
        if trained["size"] != self.data.size:
            raise CounterpointError(
                f"{self.data.name} has crops of {self.data.size} pixels, the run was trained on {trained['size']}"
            )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = Batches(len(self.data.train), self.config.batch_size) if batches is None else batches
        bound = chosen.bind(seed, position, *processes())
        workers = self.config.workers
        clips = _Clips(self.data.train)
        return DataLoader(clips, batch_size=None, sampler=bound, num_workers=workers, persistent_workers=workers > 0)

    def evaluation_batch(self, split: str | ClipSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these clips of a split as a learner's `predict` takes them."""
        return _Clips(self.split(split) if isinstance(split, str) else split)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the clips of a split, in order."""
        clips = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(clips)))) for start in range(0, len(clips), AT_ONCE)]
        return DataLoader(_Clips(clips), batch_size=None, sampler=at)

    def evaluator(self, split: str) -> FramesEvaluator:
        return FramesEvaluator(self.config)


TASK = FramesTask
