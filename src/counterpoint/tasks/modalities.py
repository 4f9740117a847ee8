"""Segment one class in pictures of several kinds of imaging, here called modalities; measure and draw each of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.mask_losses import patch_labels
from counterpoint.data.dense import IGNORE, labelled_rows
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.tasks.dense import DenseLearner
from counterpoint.tasks.dense_figures import enlarged, painted
from counterpoint.words import counted


class ModalityLearner(DenseLearner):
    """A segmenter of pictures of known modalities. Subclasses write `segmented` and `loss`.

    Attributes:
        names: names of the modalities, in the order of their numbers.

    Raises CounterpointError for data without modalities, and for masks of several classes.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        self.names = tuple(getattr(data, "domains", ()) or ())
        if not self.names:
            raise CounterpointError(
                "this system needs pictures of named kinds of imaging; use medical-shapes, or your own: "
                "'masks:DIR?domain=folder'. Without data, give domains=['xray', 'scan'] (their names)"
            )
        if len(data.regions) != 2:
            raise CounterpointError(
                f"this system segments one class from the background; the masks have {', '.join(data.regions)}; write "
                "one class as 1, everything else as 0"
            )
        super().__init__(config, data, seed)

    def begin(self, survey: Survey) -> None:
        """Check that every mask is of a modality."""
        super().begin(survey)
        for split in ("train", "valid", "test"):
            of = survey.split(split)
            if bad := int((of.domains[labelled_rows(of)] < 0).sum()):
                raise DataError(
                    f"{split} has {counted(bad, 'picture')} with a mask but no kind of imaging; put each into its folder"
                )

    def segmented(
        self, images: Tensor, modality: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n size size"], Float[Tensor, "n coarse wide"] | None]:
        """Compute the logits of the pixels and, where there are some, of coarse patches."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch.get("domain") is None:
            raise CounterpointError("this system needs the modality of each picture: batch['domain']")
        logits, _ = self.segmented(batch["image"], batch["domain"])
        return {"logits": torch.stack([torch.zeros_like(logits), logits], 1)}

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure Dice of each modality and IoU, both with 1 added above and below, as means over pictures."""

        def row(batch: dict[str, Any]) -> Tensor:
            logits, patches = self.segmented(batch["image"], batch["domain"])
            known = batch["mask"] != IGNORE
            p, y = (logits > 0) & known, (batch["mask"] != 0) & known
            both, total = (p & y).sum((1, 2)), p.sum((1, 2)) + y.sum((1, 2))
            each = [(2 * both + 1) / (total + 1), (both + 1) / (total - both + 1)]
            if patches is not None:
                truth = patch_labels(batch["mask"], *patches.shape[1:])
                right = (truth == (patches >= 0)) & (truth != IGNORE)
                each.append(right.sum((1, 2)) / (truth != IGNORE).sum((1, 2)).clamp(min=1))
            return torch.stack([part.double() for part in each], 1)

        by = by_modality(survey, split, row)
        means = torch.stack(list(by.values())).mean(0)
        names = ["dice", "iou", "patch_accuracy"][: len(means)]
        found = {f"modality_{name}": float(value) for name, value in zip(names, means, strict=True)}
        return found | {f"dice_{self.names[number]}": float(values[0]) for number, values in by.items()}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw two pictures of each modality with predicted patches, truth and prediction."""
        split = survey.split("test")
        drawn = []
        training = self.training
        self.eval()
        for number in range(len(self.names)):
            chosen = masked_rows(split, [number])[:2]
            if not len(chosen):
                continue
            batch = survey.batch("test", chosen)
            with torch.no_grad():
                logits, patches = self.segmented(batch["image"], batch["domain"])
            coarse = torch.zeros_like(logits) if patches is None else patches
            coarse = F.interpolate(coarse[:, None], logits.shape[1:])[:, 0]
            shown = [(value >= 0).byte().cpu().numpy() for value in (coarse, logits)]
            pictures, masks = split.images(chosen), split.masks(chosen)
            for n in range(len(chosen)):
                parts = [pictures[n], *(painted(part, 2) for part in (shown[0][n], masks[n], shown[1][n]))]
                drawn.append([png(enlarged(part)) for part in parts])
        self.train(training)
        return {
            "Modalities": {
                "kind": "pictures",
                "columns": ["picture", "self-prompt", "truth", "prediction"],
                "rows": drawn,
                "caption": f"Two test pictures of each modality, in the order {', '.join(self.names)}.",
            }
        }


def chosen_modalities(setting: str, given: str, names: Sequence[str]) -> list[str]:
    """Return the modalities that a setting names, between commas; all where it is empty. CounterpointError for an unknown one."""
    found = [name.strip() for name in given.split(",") if name.strip()]
    if odd := [name for name in found if name not in names]:
        raise unknown(f"modality ({setting})", odd[0], list(names))
    return found or list(names)


def masked_rows(split: Any, numbers: Sequence[int]) -> Indices:
    """Return the positions of the pictures with a mask that are of one of these modalities."""
    rows = labelled_rows(split)
    return rows[np.isin(split.domains[rows], numbers)]


def by_modality(survey: Survey, split: str, row: Callable[[dict[str, Any]], Tensor]) -> dict[int, Tensor]:
    """Return the mean of a function of pictures over those of each modality, by its number.

    Args:
        survey: access to the data.
        split: its pictures with a mask count.
        row: computes a number, or a row of numbers, for each picture of a batch.
    """
    rows = labelled_rows(survey.split(split))
    values, domains = survey.over(split, row, rows), survey.split(split).domains[rows]
    return {int(n): values[torch.from_numpy(domains == n)].mean(0) for n in np.unique(domains)}


def start_modalities(learner: ModalityLearner, start: str, key: Callable[[str], str]) -> None:
    """Give a learner the weights of a finished run by name. Modalities that the run lacks keep their random weights.

    Args:
        learner: the learner, of the run's class.
        start: RUN or run:RUN.
        key: maps a modality's name to that of its modules.

    Raises CounterpointError for a run of another system, and for one whose networks do not fit.
    """
    before = importlib.import_module("counterpoint.experiment").load_learner(start.removeprefix("run:"))
    if not isinstance(before, type(learner)):
        raise CounterpointError(f"--from {start}: it is a run of another system")
    old, mine = before.state_dict(), learner.state_dict()
    new = [key(name) for name in learner.names if name not in before.names]
    lacking = [
        name
        for name, value in mine.items()
        if (name not in old or old[name].shape != value.shape) and not any(part in new for part in name.split("."))
    ]
    if lacking:
        raise CounterpointError(
            f"--from {start}: its weights do not fit these settings: {', '.join(lacking[:3])}; keep the settings of its networks"
        )
    learner.load_state_dict(mine | {name: value for name, value in old.items() if name in mine})
