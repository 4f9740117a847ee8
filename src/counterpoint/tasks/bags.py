"""The task `bags`: find the moments of an event in videos, learned from video-level labels only.

A batch holds B bags padded to a common length; a learner is scored by frame-level average precision on test videos.

    batch["visual"]  [B, T, visual_dim] float32, zero rows at the end are padding
    batch["audio"]   [B, T, audio_dim]  float32
    batch["label"]   [B] float32 in {0, 1}
    batch["name"]    list of B strings

A learner of this task implements `predict(batch) -> {head: logits [C, T]}` for the C crops of one test video; each
head gets its own `<head>_ap` and `<head>_ap_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.world import processes
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.settings import CheckedSettings
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

FEW = 0.1  # share of different scores below which the evaluation adds a note


@dataclass
class BagsConfig(CheckedSettings):
    """Settings of every learner of this task."""

    epochs: int = 50
    """Passes over the training bags."""
    batch_size: int = 128
    """Bags in a batch, over all processes together. The last, smaller batch of an epoch is kept."""
    max_length: int = 200
    """Snippets of a training bag. Longer bags are subsampled evenly, shorter bags are padded with zeros."""
    workers: int = 0
    """Number of processes that load training bags; 0: load in the main process."""
    clip_norm: float | None = None
    """Largest norm of the gradients of all parameters of a network together; larger ones are scaled down. None: no limit."""

    def __post_init__(self) -> None:
        self.need_sound_values()
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise CounterpointError(f"clip_norm must be > 0 or None, got {self.clip_norm}")
        self.need_count("epochs", "batch_size", "max_length")
        self.need_weight("workers")


def fit_length(features: NDArray[np.float32], max_length: int = 200) -> NDArray[np.float32]:
    """Shorten or pad features [T, D] to [max_length, D].

    If T > max_length, take the rows floor(linspace(0, T - 1, max_length)), else append zeros. This is the sampling rule of
    MACIL-SD's and XDVioDet's training data (arXiv 2207.05500; code).
    """
    length = len(features)
    if length > max_length:
        return features[np.linspace(0, length - 1, max_length).astype(np.int64)]
    out = np.zeros((max_length, *features.shape[1:]), dtype=features.dtype)
    out[:length] = features
    return out


def frame_ap(
    crop_logits: Float[Tensor, "crops snippets"] | NDArray[Any],
    video_len: Int[Tensor, " videos"] | NDArray[Any] | Sequence[int],
    gt: NDArray[Any] | Tensor,
    repeat: int = 16,
) -> float:
    """Compute frame-level average precision as XD-Violence reports it: the trapezoidal area under precision over recall.

    The snippet score is the mean over the crops of sigmoid(logit), repeated for the `repeat` frames of its snippet. Rank
    scores by their logarithmic odds in float64, so that large logits do not tie.

    Args:
        crop_logits: all videos' snippets concatenated, one row per crop.
        video_len: number of snippets of each video; the sum is the number of columns of `crop_logits`.
        gt: truth per frame, 0 or 1, length `repeat` times the snippets.
        repeat: number of frames of a snippet, by default 16.

    Returns AP in 0..1; nan if the truth has no positive frame.
    Raises ValueError if the lengths do not fit or a logit is not finite.

    The result is `sklearn.metrics.auc` over `precision_recall_curve`. The trapezoid rewards ties: equal scores get
    (1 + prevalence) / 2, not the prevalence. `frame_ap_step` does not reward ties. If scores tie, compare the two.
    """
    from sklearn.metrics import auc, precision_recall_curve

    score, truth = _ranked(crop_logits, video_len, gt, repeat)
    if not truth.any():
        return float("nan")
    precision, recall, _ = precision_recall_curve(truth, score)
    return float(auc(recall, precision))


def frame_ap_step(
    crop_logits: Float[Tensor, "crops snippets"] | NDArray[Any],
    video_len: Int[Tensor, " videos"] | NDArray[Any] | Sequence[int],
    gt: NDArray[Any] | Tensor,
    repeat: int = 16,
) -> float:
    """Compute frame-level average precision as a step sum: the mean precision at the frames of the event.

    Arguments, ranking and errors are those of `frame_ap`. Equal scores get the share of positive frames, which is chance.
    The result is `sklearn.metrics.average_precision_score`.

    >>> frame_ap_step(torch.zeros(1, 4), [4], [1, 0, 0, 0], repeat=1)
    0.25
    """
    from sklearn.metrics import average_precision_score

    score, truth = _ranked(crop_logits, video_len, gt, repeat)
    return float(average_precision_score(truth, score)) if truth.any() else float("nan")


def snippet_log_odds(crop_logits: Float[Tensor, "crops snippets"]) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of each snippet's score p, the mean over the crops of sigmoid(logit), in float64.

    The order is that of the scores, without ties by rounding. A float32 sigmoid is 1 from a logit of 17 on, a float64
    sigmoid from 37 on.
    """
    logits = torch.as_tensor(crop_logits).double()
    if len(logits) == 1:
        return np.asarray(logits[0].numpy())
    logits = logits.sort(0).values  # so that the order of the crops does not matter
    log_p, log_q = (F.logsigmoid(values).logsumexp(0) for values in (logits, -logits))
    return np.asarray((log_p - log_q).numpy())


def _ranked(
    crop_logits: Any, video_len: Any, gt: NDArray[Any] | Tensor, repeat: int
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Check the arguments of an average precision; return score and truth of each frame."""
    logits = torch.as_tensor(crop_logits)
    truth = np.asarray(gt)
    total = int(np.sum(np.asarray(video_len)))
    if logits.ndim != 2 or logits.shape[1] != total or not len(logits):
        raise ValueError(f"crop_logits must be [crops, {total}] (video_len adds up to that), got {tuple(logits.shape)}")
    if truth.shape != (repeat * total,):
        raise ValueError(f"gt must hold {repeat} x {total} = {repeat * total} frames, got {truth.shape}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("crop_logits holds NaN or infinite values")
    return snippet_log_odds(logits).repeat(repeat), truth


def checked(bag: Bag | TestVideo, data: BagData) -> None:
    """Raise a DataError that names the item if its features are unusable."""
    visual, audio = bag.visual, bag.audio
    if visual.shape[-1] != data.visual_dim or audio.shape[-1] != data.audio_dim:
        raise DataError(
            f"{bag.name}: the features have widths {visual.shape[-1]} (visual) and {audio.shape[-1]} (audio), "
            f"those of the set have {data.visual_dim} and {data.audio_dim}; extract them with the same backbones"
        )
    if visual.shape[-2] != len(audio):
        raise DataError(f"{bag.name}: {visual.shape[-2]} visual but {counted(len(audio), 'audio snippet')}")
    for kind, values in (("visual", visual), ("audio", audio)):
        if not np.isfinite(values).all():
            raise DataError(f"{bag.name}: {kind} features hold NaN or infinite values; extract them again or remove it")
    if not visual.any():
        raise DataError(f"{bag.name}: all visual features are zero, so it has no snippet; remove it from the list")


class _Padded(Dataset[dict[str, Any]]):
    def __init__(self, data: BagData, max_length: int) -> None:
        self.data = data
        self.max_length = max_length

    def __getitem__(self, index: int) -> dict[str, Any]:
        bag = self.data.train[index]
        checked(bag, self.data)
        return {
            "visual": fit_length(np.asarray(bag.visual, np.float32), self.max_length),
            "audio": fit_length(np.asarray(bag.audio, np.float32), self.max_length),
            "label": float(bag.label),
            "name": bag.name,
        }

    def __len__(self) -> int:
        return len(self.data.train)


class _Collate:
    """Stack items. An empty share of a small last batch becomes tensors without rows, so that no process waits."""

    def __init__(self, data: BagData, max_length: int) -> None:
        self.visual = (0, max_length, data.visual_dim)
        self.audio = (0, max_length, data.audio_dim)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if not items:
            return {
                "visual": torch.zeros(self.visual),
                "audio": torch.zeros(self.audio),
                "label": torch.zeros(0),
                "name": [],
            }
        return {
            "visual": torch.from_numpy(np.stack([item["visual"] for item in items])),
            "audio": torch.from_numpy(np.stack([item["audio"] for item in items])),
            "label": torch.tensor([item["label"] for item in items], dtype=torch.float32),
            "name": [item["name"] for item in items],
        }


class _Videos(Dataset[dict[str, Any]]):
    """Videos, one per batch. Its crops form the batch, in full length and without padding.

    A training bag is a video of one crop. It has no truth per frame.
    """

    def __init__(self, data: BagData, videos: Sequence[Bag] | Sequence[TestVideo]) -> None:
        self.data, self.videos = data, videos

    def __getitem__(self, index: int) -> dict[str, Any]:
        video = self.videos[index]
        checked(video, self.data)
        visual = torch.from_numpy(np.asarray(video.visual, np.float32))
        audio = torch.from_numpy(np.asarray(video.audio, np.float32))
        visual = visual if isinstance(video, TestVideo) else visual[None]
        found = {"visual": visual, "audio": audio.expand(len(visual), -1, -1), "name": video.name}
        return found | ({"truth": np.asarray(video.truth)} if isinstance(video, TestVideo) else {})

    def __len__(self) -> int:
        return len(self.videos)


class FrameAP:
    """Evaluator: frame-level AP of every head of the learner, over all videos of a split.

    `<head>_ap` is the benchmark's trapezoid (`frame_ap`). `<head>_ap_step` is the step sum, which ties do not raise. After
    `compute`, `notes` names the heads for which fewer than a tenth of the snippets' scores are different.
    """

    def __init__(self, data: BagData) -> None:
        self.repeat, self.seconds = data.frames_per_snippet, data.snippet_seconds
        self.reset()

    def reset(self) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        self.truth: list[NDArray[Any]] = []
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> None:
        length = batch["visual"].shape[1]
        for head, logits in outputs.items():
            self.logits.setdefault(head, []).append(logits.detach().double().cpu())
        self.truth.append(torch.as_tensor(batch["truth"]).cpu().numpy())  # loaders make tensors of arrays
        self.names.append(str(batch.get("name", "")))
        self.lengths.append(length)

    def compute(self, *, final: bool = False) -> dict[str, float]:
        truth = np.concatenate(self.truth)
        found: dict[str, float] = {}
        ties: list[list[Any]] = []
        for head, parts in self.logits.items():
            logits = torch.cat(parts, 1)
            found[f"{head}_ap"] = frame_ap(logits, self.lengths, truth, self.repeat)
            found[f"{head}_ap_step"] = frame_ap_step(logits, self.lengths, truth, self.repeat)
            different, total = len(np.unique(snippet_log_odds(logits))), logits.shape[1]
            if different < FEW * total:
                ties.append([head, different, total])
        self.notes = [
            f"{head}: only {different} of {total} scores differ; {head}_ap rewards ties, so use {head}_ap_step"
            for head, different, total in ties
        ]
        self.figures = self._timeline() if final else {}
        if ties:
            self.figures["Scores that tie"] = {
                "kind": "table",
                "columns": ["head", "different scores", "snippets"],
                "rows": ties,
                "caption": "Fewer than a tenth of the scores differ. <head>_ap, the trapezoid, rewards ties; <head>_ap_step "
                "does not.",
            }
        return found

    def _timeline(self) -> dict[str, Any]:
        """Draw the scores of every head, and the truth, of the first video that is violent in part."""
        truths = [np.asarray(truth) != 0 for truth in self.truth]
        at = next((number for number, truth in enumerate(truths) if 0 < truth.mean() < 1), None)
        if at is None:
            return {}
        times = (np.arange(self.lengths[at]) * (self.seconds or 1.0)).tolist()
        shown = {head: parts[at].sigmoid().mean(0).flatten() for head, parts in self.logits.items()}
        series = {head: (times, values.tolist()) for head, values in shown.items() if len(values) == len(times)}
        truth = truths[at][:: self.repeat][: len(times)]
        series["truth"] = (times[: len(truth)], truth.astype(float).tolist())
        return {
            "Scores over time": {
                "kind": "curves",
                "title": "score",
                "xlabel": "seconds" if self.seconds else "snippets",
                "series": series,
                "caption": f"Scores of the snippets of {self.names[at] or 'a test video'}, a mean over its crops, and its truth.",
            }
        }

    def chance(self) -> dict[str, float]:
        """Return the chance level of every AP: the share of positive frames."""
        truth = np.concatenate(self.truth) if self.truth else np.zeros(0)
        share = float((truth != 0).mean()) if len(truth) else float("nan")
        return {f"{head}_{name}": share for head in self.logits for name in ("ap", "ap_step")}


class BagsTask:
    """Loaders and evaluator of one source of bags."""

    name = "bags"
    headline = "av_ap"  # the measure it judges by
    contract = "bags"  # the form of data it takes (see counterpoint.data.load)
    at_once = 1  # videos of an `evaluation_batch`: their lengths differ

    def __init__(self, data: BagData, config: BagsConfig) -> None:
        if len(data.train) == 0 or len(data.test) == 0:
            raise DataError(f"{data.name}: needs training and test videos, has {len(data.train)} and {len(data.test)}")
        self.data = data
        self.config = config
        # A learner is built from these facts, and detection recomputes the features from them. The run keeps them.
        self.facts: dict[str, Any] = {
            "visual_dim": data.visual_dim,
            "audio_dim": data.audio_dim,
            "snippet_seconds": data.snippet_seconds,
            "backbones": data.backbones,
        }

    def split(self, name: str) -> Sequence[Bag] | Sequence[TestVideo]:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: Sequence[Bag] | Sequence[TestVideo] = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError if the valid split is too small to monitor training."""
        check_watched(self.data.name, len(self.data.valid), "videos")

    def evaluation_batch(
        self, split: str | Sequence[Bag] | Sequence[TestVideo], rows: Sequence[int] | NDArray[np.int64]
    ) -> dict[str, Any]:
        """Return one video of a split as a learner's `predict` takes it: its crops, in full length.

        Raises ValueError for more or fewer than one row.
        """
        if len(rows) != 1:
            raise ValueError(f"rows must name one video, because videos differ in length, got {len(rows)}")
        return _Videos(self.data, self.split(split) if isinstance(split, str) else split)[int(rows[0])]

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise CounterpointError if these data do not fit a run that was trained on other data."""
        for name in ("visual_dim", "audio_dim"):
            if trained[name] != self.facts[name]:
                raise CounterpointError(
                    f"{self.data.name} has {name} {self.facts[name]}, the run was trained on {trained[name]}; use data with "
                    "the run's features"
                )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        workers = self.config.workers
        chosen = Batches(len(self.data.train), self.config.batch_size) if batches is None else batches
        return DataLoader(
            _Padded(self.data, self.config.max_length),
            batch_sampler=chosen.bind(seed, position, *processes()),
            collate_fn=_Collate(self.data, self.config.max_length),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the videos of the split valid or test, in order, one per batch."""
        return DataLoader(_Videos(self.data, self.split(split)), batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> FrameAP:
        return FrameAP(self.data)


# Every task module names its task TASK.
TASK = BagsTask
