"""Define the task `regression`: learn from pictures, tables or series with a real-valued target; the evaluation predicts it.

It is the form `labelled` with numbers in place of classes. A training batch, before and after the learner has drawn its views:

    batch["input"]    [B, 3, H, W] uint8, [B, columns] or [B, length, channels] float32
    batch["index"]    [B] positions in the training set
    batch["target"]   [B] float64
    batch["views"]    list of V float tensors, as the encoder takes them

`predict` returns "feature" [n, dim], and "prediction" [n] where the learner has a regressor of its own. The evaluation measures:

- `mae`: the mean absolute error of ridge regression on frozen features, whose ridge is chosen on valid; `pearson`, `spearman`.
- `mae_many`, `mae_medium`, `mae_few`: this error where training targets are frequent, less frequent and rare, if they differ.
- `distance_order`: Spearman's correlation of feature distances with target distances.
- `regressor_mae`, ...: the same errors of the learner's own regressor.

The valid split chooses the ridge and is measured, so its `mae` is slightly low. That of the test split is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tyro.conf import Suppress

from counterpoint.core.distributed import global_mean
from counterpoint.core.world import processes
from counterpoint.data.images import Indices
from counterpoint.data.targets import TargetData, TargetSplit
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.series import build_series_encoder, build_table_encoder, check_series_encoder
from counterpoint.encoders.vectors import build_vector_encoder
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.images import BATCH, ImageLearner, ImagesConfig, chosen_bank
from counterpoint.tasks.measures.regression import (
    Ridge,
    correlation,
    distance_order,
    fit_ridge,
    rank_correlation,
    shot_regions,
)
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.views.images import ViewPipeline, normalise
from counterpoint.views.numbers import NumberViews
from counterpoint.words import counted

Regressor = Literal["frozen", "fine-tuned"]
SHOWN = 1000  # predictions of the picture
NAMES = ("kind", "size", "length", "columns")  # facts in which other data must agree with a run's

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class RegressionConfig(ImagesConfig):
    """Settings of every learner of this task."""

    epochs: int = 200
    """Passes over the training items before those of a fine-tuned regressor; 0, with such a regressor: it alone is trained."""
    batch_size: int = 256
    """Items in a batch, over all processes together. The last, smaller batch of an epoch is dropped."""
    bank: int = 10000
    """Maximum number of training items on whose features the linear probe is fitted."""
    neighbours: Annotated[int, Suppress] = 20
    """Not used by this task."""
    recipe: str = "weak"
    """Augmentation of pictures: simclr, simclr-cifar, supcon, moco-v1, moco-v2, byol, swav, dino, dino-cifar, adainf,
    adainf-cifar, obow, obow-cifar, mae, supervised, weak, none; for small digits digits-moved, digits-easy, digits-plain,
    digits-shifted, digits-hard, digits-s0, digits-s25, digits-s50, digits-s100, digit-patterns, digit-styles, obow-canvases,
    tile-canvases; shapes; clusters; latent-factors (see counterpoint.views.images.RECIPES)."""
    table_encoder: str = "relu-128-128"
    """The network of tables: mlp, linear, relu-W-W-... (layers of these widths)."""
    series_encoder: str = "conv"
    """The network of series: conv (three convolutions, 256 wide) or conv-s (two, 64 wide)."""
    noise: float = 0.1
    """Noise on the views of tables and series, in deviations of each column; at least 0."""
    swapped: float = 0.0
    """Chance of a number in a table's view to be that of another row, 0 to 1."""
    shift: float = 0.25
    """Largest cyclic shift of a series' view in time, as a share of its length, 0 to 1."""
    regressor: Regressor = "frozen"
    """frozen: fit ridge regression to the encoder's features after training. fine-tuned: train encoder and a linear layer
    together in a second stage, by the absolute error."""
    finetune_epochs: int = 20
    """Epochs of the second stage; regressor fine-tuned needs at least 1."""
    finetune_lr: float = 0.0
    """Learning rate of the second stage at a batch of 256; 0: the same as lr."""
    many_shot: int = 100
    """A target is frequent where more training targets than this are in its bin."""
    few_shot: int = 20
    """A target is rare where fewer training targets than this are in its bin; at most many_shot."""
    bin_width: float = 1.0
    """Width of the bins in which training targets are counted, in units of the target, > 0."""

    counts: ClassVar[tuple[str, ...]] = tuple(name for name in ImagesConfig.counts if name != "epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("bin_width")
        if self.finetune_lr < 0:
            raise CounterpointError(f"finetune_lr must be at least 0, got {self.finetune_lr}")
        NumberViews([], self.noise, self.swapped, self.shift)
        if self.finetune_epochs < (self.regressor == "fine-tuned"):
            raise CounterpointError(f"finetune_epochs must be at least 1, got {self.finetune_epochs}")
        if self.epochs < (self.regressor == "frozen"):
            raise CounterpointError(
                f"epochs must be at least 1, or 0 with a fine-tuned regressor, got {self.epochs}: nothing would be trained"
            )
        if not 0 <= self.few_shot <= self.many_shot:
            raise CounterpointError(
                f"few_shot must lie between 0 and many_shot, got {self.few_shot} and {self.many_shot}"
            )

    def check(self) -> None:
        super().check()
        check_series_encoder(self.series_encoder)
        build_vector_encoder(self.table_encoder, 1)

    def facts(self, data: Any) -> dict[str, Any]:
        for name, given in (("--from", self.start), ("--lora", self.lora)):
            if given and data.kind != "image":
                raise CounterpointError(f"{name} is for encoders of pictures, and {data.name} is a {data.kind}")
        return super().facts(data)


# ---------------------------------------------------------------------------------------------------------- the learner


class RegressionLearner(ImageLearner):
    """An encoder of pictures, tables or series, its views, and a linear regressor. Subclasses write `contrast(batch)`.

    Its stages: "train" minimises `contrast`. "regressor", if the regressor is fine-tuned, minimises the absolute error.
    """

    crops: ClassVar[int] = 2

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        self.kind: str = getattr(data, "kind", "image")
        if self.kind != "image":
            data.size = getattr(data, "size", 0)
        super().__init__(config, data, seed)
        self.centre = float(getattr(data, "target_mean", 0.0))
        self.spread = max(float(getattr(data, "target_deviation", 1.0)), 1e-12)
        self.regressor = nn.Linear(self.encoder.dim, 1)

    def build_encoder(self, data: Any) -> Any:
        config = self.config
        if self.kind == "table":
            return build_table_encoder(config.table_encoder, data.mean, data.deviation)
        if self.kind == "series":
            return build_series_encoder(config.series_encoder, data.length, data.mean, data.deviation)
        channels = getattr(data, "channels", 3)
        return build_image_encoder(config.encoder, data.size, channels=channels, pretrained=config.pretrained)

    def build_views(self) -> Any:
        if self.kind == "image":
            return ViewPipeline(self.size, crops=self.crops, recipe=self.config.recipe)
        encoder: Any = self.encoder  # of columns
        return NumberViews(
            encoder.standardise.deviation.tolist(),
            self.config.noise,
            self.config.swapped,
            self.config.shift,
            self.crops,
        )

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.kind == "image":
            return super().prepare(batch | {"image": batch["input"]}, generator)
        rows = batch["input"]
        total, mine = self.share(len(rows))
        # Other rows are needed for swapped numbers alone.
        every = self.whole(rows) if self.config.swapped else rows.new_empty(total, *rows.shape[1:])
        views: Any = self.views
        return batch | {"views": views(rows, every, mine, generator)}

    # --- stages and losses

    def stages(self) -> list[Stage]:
        config = self.config
        found = [Stage("train", config.epochs)] if config.epochs else []
        if config.regressor == "fine-tuned":
            found.append(Stage("regressor", config.finetune_epochs))
        return found

    def contrast(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the losses of a batch before the regressor."""
        raise CounterpointError(f"{type(self).__name__} has no loss; write its method `contrast`")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if not self.in_tuning():
            return self.contrast(batch)
        wanted = ((batch["target"] - self.centre) / self.spread).float()
        found = self.regressor(self.encoder(batch["views"][0]))[:, 0]
        error = global_mean(F.l1_loss(found, wanted, reduction="none"))
        return {"loss": error, "regressor_error": error.detach() * self.spread}

    def in_tuning(self) -> bool:
        """Return whether the stage of the regressor is trained."""
        return self.config.regressor == "fine-tuned" and self.position.stage == bool(self.config.epochs)

    def turns(self) -> list[Turn]:
        config, tuning = self.config, self.in_tuning()
        networks = [self.encoder, self.regressor] if tuning else self.networks()
        rate, curve = ((config.finetune_lr or config.lr) / config.lr, None) if tuning else (1.0, self.curve())
        return [self.turn_of(networks, rate=rate, curve=curve)]

    def curve(self) -> Callable[[float], float] | None:
        """Return the factor of the first stage's learning rate by epoch; None: half a cosine."""
        return None

    def networks(self) -> list[nn.Module]:
        """Return the networks that the first stage trains."""
        return [self.encoder]

    # --- predictions

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = {"feature": self.embed(batch["input"] if "input" in batch else batch["image"])}
        value = self.regressor(found["feature"].float())[:, 0] * self.spread + self.centre
        return found | {"prediction": value}

    @torch.no_grad()
    def begin_evaluation(self, survey: Survey) -> None:
        """Fit the frozen regressor, so that the saved run predicts targets."""
        if self.config.regressor == "fine-tuned":
            return
        rows = chosen_bank(np.arange(survey.examples), self.config.bank)
        features, watched = (survey.over(name, lambda b: self.embed(b["input"]), at) for name, at in
                             (("train", rows), ("valid", None)))  # fmt: skip
        targets, known = (torch.from_numpy(survey.split(name).targets) for name in ("train", "valid"))
        if bool(torch.isfinite(features).all() and torch.isfinite(watched).all()):  # otherwise the evaluator reports it
            found = fit_ridge(features, targets[rows], watched, known)
            self.regressor.weight.copy_(found.weight[None] / self.spread)
            self.regressor.bias.copy_((found.bias - self.centre) / self.spread)


# ------------------------------------------------------------------------------------------------------------- the task


class TargetBatches(Dataset[dict[str, Any]]):
    """Items of a split by lists of positions; pictures as the encoder takes them if `ready`, otherwise uint8."""

    def __init__(self, split: TargetSplit, kind: str, *, ready: bool = False) -> None:
        self.split, self.kind, self.ready = split, kind, ready

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)
        found = torch.from_numpy(np.ascontiguousarray(self.split.inputs(rows)))
        if self.kind == "image":
            found = found.permute(0, 3, 1, 2).contiguous()
            found = normalise(found) if self.ready else found
        return {"input": found, "index": torch.from_numpy(rows), "target": torch.from_numpy(self.split.targets[rows])}

    def __len__(self) -> int:
        return len(self.split)


class _Evaluated(Dataset[dict[str, Any]]):
    """Batches of several parts in turn; batch["part"] is the part's name."""

    def __init__(self, parts: Sequence[tuple[str, TargetSplit, Indices]], kind: str) -> None:
        self.kind = kind
        self.at = [
            (name, split, rows[start : start + BATCH])
            for name, split, rows in parts
            for start in range(0, len(rows), BATCH)
        ]

    def __getitem__(self, number: int) -> dict[str, Any]:
        name, split, rows = self.at[number]
        return TargetBatches(split, self.kind, ready=True)[rows.tolist()] | {"part": name}

    def __len__(self) -> int:
        return len(self.at)


class RegressionEvaluator:
    """Errors of a ridge probe and of the learner's regressor, and the order of distances."""

    def __init__(self, config: RegressionConfig, data: TargetData) -> None:
        self.config, self.data = config, data
        self.reset()

    def reset(self) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.figures: dict[str, Any] = {}
        self.chances: dict[str, float] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        part = batch["part"]
        for name in ("feature", "prediction"):
            if name in outputs:
                self.found.setdefault(f"{part}/{name}", []).append(outputs[name].detach().float().cpu())
        self.found.setdefault(f"{part}/target", []).append(batch["target"].cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = {name: torch.cat(parts) for name, parts in self.found.items()}
        for name, values in found.items():
            if not bool(torch.isfinite(values).all()):
                what = name.partition("/")[2]
                raise diverged(f"a {what} is NaN or infinite")
        test, targets = found["test/feature"], found["test/target"]
        watched = "watched" if "watched/feature" in found else "test"
        probe: Ridge = fit_ridge(
            found["bank/feature"],
            found["bank/target"],
            found[f"{watched}/feature"],
            found[f"{watched}/target"],
        )
        predicted = probe(test)
        figures = self._errors("", predicted, targets) | {"distance_order": distance_order(test, targets)}
        self.chances["distance_order"] = 0.0
        if self.config.regressor == "fine-tuned":
            predicted = found["test/prediction"].double()
            figures |= self._errors("regressor_", predicted, targets)
        if final:
            self.figures |= self._picture(predicted, targets)
        return figures

    def _errors(self, prefix: str, predicted: Tensor, targets: Tensor) -> dict[str, float]:
        known = torch.from_numpy(self.data.train.targets)
        error, guess = (predicted - targets).abs(), (known.median() - targets).abs()
        found = {f"{prefix}mae": float(error.mean())}
        self.chances[f"{prefix}mae"] = float(guess.mean())
        for name, of in (("pearson", correlation), ("spearman", rank_correlation)):
            found[prefix + name] = of(predicted, targets)
            self.chances[prefix + name] = 0.0
        config = self.config
        regions = shot_regions(targets, known, config.bin_width, config.many_shot, config.few_shot)
        if sum(bool(inside.any()) for inside in regions.values()) > 1:
            for name, inside in regions.items():
                if bool(inside.any()):
                    found[f"{prefix}mae_{name}"] = float(error[inside].mean())
                    self.chances[f"{prefix}mae_{name}"] = float(guess[inside].mean())
        return found

    def chance(self) -> dict[str, float]:
        """Return the level of every figure of `compute` without features: the training targets' median, and no order."""
        return dict(self.chances)

    def _picture(self, predicted: Tensor, targets: Tensor) -> dict[str, Any]:
        pairs = torch.stack([targets, predicted], 1)[:: max(1, len(targets) // SHOWN)]
        low, high = float(targets.min()), float(targets.max())
        line = [[low + (high - low) * n / 40] * 2 for n in range(41)]
        return {
            "Predicted and true targets": {
                "kind": "points",
                "points": {"test items": pairs.tolist(), "equal": line},
                "axes": [f"true {self.data.target}", f"predicted {self.data.target}"],
                "caption": f"{counted(len(pairs), 'test item')}, predicted by the regressor.",
            }
        }


class RegressionTask:
    """Loaders and evaluator of one source with real-valued targets."""

    name: ClassVar[str] = "regression"
    headline: ClassVar[str] = "mae"  # the measure it judges by
    lower: ClassVar[bool] = True  # and the smaller it is, the better
    contract: ClassVar[str] = "targets"
    at_once: ClassVar[int] = BATCH

    def __init__(self, data: TargetData, config: RegressionConfig) -> None:
        if not isinstance(data, TargetData):
            raise CounterpointError(
                f"{getattr(data, 'name', data)} has no real-valued targets, which the task regression needs"
            )
        self.data, self.config = data, config
        for name in ("train", "test"):
            known = self.split(name).targets
            if len(known) < 2:
                raise DataError(f"{data.name}: needs at least 2 {name} items, has {len(known)}")
            if not np.ptp(known) > 0:
                raise DataError(
                    f"{data.name}: the target '{data.target}' is constant, {known[0]:g}, in the {name} split; there is "
                    "nothing to predict"
                )

    def split(self, name: str) -> TargetSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: TargetSplit = named_split(self.data, name)
        return found

    @property
    def rows(self) -> Indices:
        """Positions of the training items."""
        return np.arange(len(self.data.train))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        return self.config.facts(self.data)

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise CounterpointError if these data do not fit a run that was trained on other data."""
        for name in NAMES:
            if name in trained and trained[name] != self.data.spec.get(name, trained[name]):
                raise CounterpointError(
                    f"{self.data.name} has the {name} {self.data.spec[name]}, the run was trained on {trained[name]}"
                )

    def check_training(self) -> None:
        """Raise DataError if an epoch would have no step, or if the valid split is too small to monitor training."""
        check_watched(self.data.name, len(self.data.valid), "items")
        count = len(self.data.train)
        if count < self.config.batch_size:
            raise DataError(
                f"{self.data.name} has {counted(count, 'training item')}, fewer than a batch of {self.config.batch_size}; use "
                f"--batch-size {max(2, count)} or less"
            )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        if batches is None:
            batches = Batches(len(self.data.train), self.config.batch_size, drop_last=True)
        items, workers = TargetBatches(self.data.train, self.data.kind), self.config.workers
        bound = batches.bind(seed, position, *processes())
        return DataLoader(items, batch_size=None, sampler=bound, num_workers=workers, persistent_workers=workers > 0)

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`: the bank, valid items for the choice of the ridge, and the split."""
        bank = chosen_bank(self.rows, self.config.bank)
        parts = [("bank", self.data.train, bank), ("test", self.split(split), np.arange(len(self.split(split))))]
        if split != "valid" and len(self.data.valid):
            parts.insert(1, ("watched", self.data.valid, np.arange(len(self.data.valid))))
        return DataLoader(_Evaluated(parts, self.data.kind), batch_size=None, shuffle=False)

    def evaluation_batch(self, split: str | TargetSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as a learner's `predict` takes them: no augmentation."""
        found = self.split(split) if isinstance(split, str) else split
        return TargetBatches(found, self.data.kind, ready=True)[list(map(int, rows))] | {"part": "survey"}

    def evaluator(self, split: str) -> RegressionEvaluator:
        return RegressionEvaluator(self.config, self.data)


TASK = RegressionTask
