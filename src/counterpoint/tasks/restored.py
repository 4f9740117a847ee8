"""Define the task `restored`: learn to enlarge pictures; the evaluation compares enlarged pictures with the originals.

Any source of pictures serves. Its pictures are the truth; the small ones are made of them by bicubic scaling, in 8 bits.

A training batch, before and after the learner has cut its patches:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set
    batch["low"]     [B, 3, patch / scale, patch / scale] float in 0..1
    batch["high"]    [B, 3, patch, patch] float in 0..1

An epoch cuts `repeats` patches of each picture. A test batch holds whole pictures as "low" and "high". For it `predict`
returns "restored" [n, 3, H, W], not clamped. Rows and columns beyond a multiple of the scale are cut off first.

The evaluation measures `psnr`, `ssim` and `high_frequency_error` (tasks/measures/restored.py). The level of each that
bicubic scaling reaches stands beside them. A picture that is restored exactly has no finite PSNR. Such pictures are left out of
the mean of `psnr` and counted in `exact_pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.seeds import seed_torch
from counterpoint.data.images import ImageData, ImageSplit, Indices
from counterpoint.data.shown import png
from counterpoint.encoders.restoration import build_restoration, check_restoration, is_file, layout, load_restoration
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError, diverged
from counterpoint.tasks.images import ImageBatches, ImageTask
from counterpoint.tasks.measures.restored import RESTORED, restoration
from counterpoint.tasks.splits import check_watched
from counterpoint.views.images import zero_to_one
from counterpoint.views.images.degraded import PatchPairs, cropped, downscaled, eight_bit, upscaled
from counterpoint.words import counted

AT_ONCE = 16  # pictures in a batch of the evaluation
SHOWN = 3  # test pictures on a run's page
ZOOM = 32  # pixels of the part that is shown enlarged
CELL = 160  # pixels of a picture on the page

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class RestoredConfig(OptimConfig):
    """Settings of every learner of this task."""

    epochs: int = 600
    """Passes over the training pictures, with `repeats` patches of each."""
    batch_size: int = 16
    """Patches in a batch, over all processes together. The last, smaller batch of an epoch is dropped."""
    repeats: int = 20
    """Patches of each picture in an epoch, at least 1."""
    patch: int = 192
    """Height and width of a large patch in pixels, a multiple of the scale."""
    scale: int = 4
    """Ratio of the sides of the large and the small picture: 2, 3 or 4."""
    network: str = "edsr"
    """The network to train and keep: edsr-s, edsr, hf:NAME (a Swin2SR of transformers), spandrel:NAME (an architecture of the
    library spandrel, such as RCAN), spandrel:FILE (weights of one)."""
    pretrained: bool = False
    """Start from the published weights of an hf: network."""
    weights: str = ""
    """Weights of the network to start from: run:RUN (a finished run of this task), a .safetensors or a .pt file."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 0
    """Number of processes that load pictures; 0: load in the main process."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "repeats", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count(*self.counts)
        self.need_weight("workers")
        if self.scale not in (2, 3, 4):
            raise CounterpointError(f"scale must be 2, 3 or 4, got {self.scale}")
        if self.patch < 4 * self.scale or self.patch % self.scale:
            raise CounterpointError(
                f"patch must be a multiple of the scale {self.scale} and at least {4 * self.scale}, got {self.patch}"
            )

    def check(self) -> None:
        """Raise CounterpointError for unknown names of networks. Runs before data are read."""
        check_restoration(self.network)

    def facts(self, data: ImageData) -> dict[str, Any]:
        """Return the facts of the data that a learner needs, fit for JSON."""
        found = data.spec | {"examples": len(data.train)}
        if is_file(self.network):  # kept with the run, which can be opened when the file is gone
            found["network"] = layout(build_restoration(self.network, self.scale))
        return found


# ---------------------------------------------------------------------------------------------------------- the learner


class RestoredLearner(Learner):
    """A network that enlarges pictures. Subclasses write `loss(batch)` on batch["low"] and batch["high"]."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        seed_torch(seed)
        self.network = build_restoration(
            config.network, config.scale, config.pretrained, getattr(data, "network", None)
        )
        self.pairs = PatchPairs(config.scale, config.patch)
        self.started = False  # whether weights of a run were loaded, which `weights` must not replace

    def begin(self, survey: Survey) -> None:
        if self.config.weights and not self.started:
            start_from(self.network, self.config)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. An export has the network alone: all else stays unchanged."""
        self.started = True
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("network.")}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith("network.")}

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        total, mine = self.share(len(batch["image"]))
        drawn = self.pairs.draw((total, *batch["image"].shape[1:]), generator).take(mine)
        low, high = self.pairs.apply(batch["image"], drawn)
        return batch | {"low": low, "high": high}

    def restore(self, low: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
        """Enlarge pictures in 0..1, for evaluation and export."""
        found: Tensor = self.network(low)
        return found

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"restored": self.restore(batch["low"])}

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.network, "forward")]

    # --- the page

    def columns(self, low: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n 3 H W"]]:
        """Return the restorations that the page compares, by name."""
        return {"output": self.restore(low)}

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show test pictures with the part where bicubic scaling errs most, small, bicubic, restored and true."""
        self.eval()
        many, rows = len(survey.split("test")), []
        for number in np.unique(np.linspace(0, many - 1, min(many, SHOWN)).astype(int)):
            batch = survey.batch("test", [int(number)])
            low, high, scale = batch["low"], batch["high"], self.config.scale
            found = {"bicubic": eight_bit(upscaled(low, scale))}
            found |= {name: eight_bit(values) for name, values in self.columns(low).items()}
            errors = {name: restoration(values, high, scale)["psnr"] for name, values in found.items()}
            window = worst_part((found["bicubic"] - high).square().mean(1)[0], scale)
            named = {"low": low.repeat_interleave(scale, 2).repeat_interleave(scale, 3)} | found | {"original": high}
            cells = [{"png": shown(framed(high, window)[0]), "text": f"test picture {number}"}]
            cells += [
                {
                    "png": shown(values[0, :, *window]),
                    "text": f"{name}, {float(errors[name]):.2f} dB" if name in errors else name,
                }
                for name, values in named.items()
            ]
            rows.append({"cells": cells})
        caption = (
            "A test picture with a frame, and the framed part in each version: where bicubic scaling errs most. PSNR is that of "
            "the whole picture. Beside the test metrics, chance is the level of bicubic scaling."
        )
        return {"Restored pictures": {"kind": "captioned", "rows": rows, "caption": caption}}


def start_from(network: nn.Module, config: Any) -> None:
    """Load the weights that the setting `weights` names into a network. RunError where they do not fit."""
    kind, _, path = config.weights.partition(":")
    if kind != "run":
        load_restoration(network, config.weights)
        return
    run = Run.open(path)
    held = {name.removeprefix("network."): value for name, value in run.load_weights().items()}
    own = run.config.get("config") or {}
    if run.config.get("task") != "restored" or (own.get("network"), own.get("scale")) != (config.network, config.scale):
        raise RunError(
            f"{path} does not hold weights of {config.network} at scale {config.scale}: it is a run of {run.slug} with network "
            f"{own.get('network')} at scale {own.get('scale')}"
        )
    network.load_state_dict(held)


def worst_part(error: Float[Tensor, "h w"], scale: int) -> tuple[slice, slice]:
    """Return rows and columns of the square of ZOOM pixels with the largest mean error, in steps of the scale."""
    side = min(ZOOM, *error.shape) // scale * scale
    means = torch.nn.functional.avg_pool2d(error[None, None].double(), side, scale)[0, 0]
    top, left = (int(n) * scale for n in np.unravel_index(int(means.argmax()), means.shape))
    return slice(top, top + side), slice(left, left + side)


def framed(images: Tensor, window: tuple[slice, slice]) -> Tensor:
    """Draw a frame of a pixel around a part of images in 0..1."""
    drawn = images.clone()
    (top, bottom), (left, right) = ((part.start, part.stop - 1) for part in window)
    colour = images.new_tensor([1.0, 0.2, 0.2]).view(3, 1)
    for line in ((slice(top, bottom + 1), left), (slice(top, bottom + 1), right)):
        drawn[:, :, line[0], line[1]] = colour
    for row in (top, bottom):
        drawn[:, :, row, left : right + 1] = colour
    return drawn


def shown(image: Float[Tensor, "3 h w"]) -> str:
    """Encode a picture in 0..1 for the page, enlarged by whole pixels where it is small."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    larger = max(1, CELL // max(pixels.shape[:2]))
    return png(pixels.repeat(larger, axis=0).repeat(larger, axis=1), largest=2 * CELL)


# ------------------------------------------------------------------------------------------------------------- the task


class RepeatedBatches(Batches):
    """Batches of an epoch with `repeats` passes over the examples, each in a new order."""

    def __init__(self, examples: int, batch_size: int, repeats: int) -> None:
        super().__init__(examples, batch_size, drop_last=True)
        self.repeats = repeats
        self.counted = examples * repeats // batch_size * batch_size

    def order(self, generator: np.random.Generator) -> Indices:
        return np.concatenate([generator.permutation(self.examples) for _ in range(self.repeats)])


def measured(split: ImageSplit, rows: Sequence[int] | Indices, scale: int) -> dict[str, Any]:
    """Return whole pictures of a split as an evaluation batch: in 0..1, cut to multiples of the scale, with small copies."""
    batch = ImageBatches(split)[list(map(int, rows))]
    high = cropped(zero_to_one(batch["image"]), scale)
    return batch | {"high": high, "low": downscaled(high, scale), "part": "test"}


class _Asked(Dataset[dict[str, Any]]):
    """Evaluation batches of a whole split."""

    def __init__(self, split: ImageSplit, scale: int) -> None:
        self.split, self.scale = split, scale
        self.starts = range(0, len(split), AT_ONCE)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start = self.starts[number]
        return measured(self.split, range(start, min(start + AT_ONCE, len(self.split))), self.scale)

    def __len__(self) -> int:
        return len(self.starts)


class RestoredEvaluator:
    """PSNR, SSIM and high-frequency error of restored pictures, and of bicubic scaling."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.reset()

    def reset(self) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        low, high = batch["low"].float(), batch["high"].float()
        for name, restored in (("", outputs["restored"].float()), ("bicubic_", upscaled(low, self.scale))):
            if not bool(restored.isfinite().all()):
                raise diverged("the restored pictures hold NaN or infinite values")
            for measure, values in restoration(restored, high, self.scale).items():
                self.found.setdefault(name + measure, []).append(values.double().cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = {name: self._mean(name) for name in RESTORED}
        exact = float((~torch.cat(self.found["psnr"]).isfinite()).double().mean())
        return found | ({"exact_pictures": exact} if exact else {})

    def chance(self) -> dict[str, float]:
        """Return the level of each measure that bicubic scaling reaches."""
        return {name: self._mean(f"bicubic_{name}") for name in RESTORED if self.found}

    def _mean(self, name: str) -> float:
        values = torch.cat(self.found[name])
        finite = values[~values.isinf()]
        return float((finite if len(finite) else values).mean())


class RestoredTask(ImageTask):
    """Loaders and evaluator of one source of pictures to restore."""

    name = "restored"
    headline = "psnr"  # the measure it judges by
    at_once = AT_ONCE

    def __init__(self, data: ImageData, config: RestoredConfig) -> None:
        super().__init__(data, config)
        whole = data.size // config.scale * config.scale
        if whole < 2 * config.scale + 2:
            raise DataError(
                f"{data.name} has pictures of {data.size} pixels, of which a border of {config.scale} is not measured; enlarge "
                f"them (?size={8 * config.scale} or more) or set a smaller --scale"
            )

    def check_training(self) -> None:
        whole = self.data.size // self.config.scale * self.config.scale
        if self.config.patch > whole:
            raise DataError(
                f"--patch {self.config.patch} exceeds the {whole} pixels of {self.data.name}'s pictures; set --patch {whole} or "
                "less, or larger pictures (?size=N)"
            )
        seen = len(self.rows) * self.config.repeats
        if seen < self.config.batch_size:
            raise DataError(
                f"{self.data.name} gives {counted(seen, 'patch')} an epoch, fewer than a batch of {self.config.batch_size}; "
                "raise --repeats "
                f"or set --batch-size {seen} or less"
            )
        check_watched(self.data.name, len(self.split("valid")), self.watched)

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Accept data of any size: the networks take every size."""

    def batches(self) -> Batches:
        return RepeatedBatches(len(self.rows), self.config.batch_size, self.config.repeats)

    def evaluation_batch(self, split: str | ImageSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these pictures of a split as a learner's `predict` takes them: whole, with small copies."""
        return measured(self.split(split) if isinstance(split, str) else split, rows, self.config.scale)

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Asked(self.split(split), self.config.scale), batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> RestoredEvaluator:
        return RestoredEvaluator(self.config.scale)


TASK = RestoredTask
