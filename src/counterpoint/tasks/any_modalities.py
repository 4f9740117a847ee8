"""Define the base of learners of the task `dense` that segment from any subset of several modalities.

One encoder and one decoder serve all modalities, which are folded into the batch. A subclass fuses their maps and classifies. The
evaluation measures every subset of the modalities, and each corruption of one (`tasks/subsets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.map_sums import Map, Maps
from counterpoint.data.shown import png
from counterpoint.encoders.maps import MapDecoder, feature_maps, map_channels
from counterpoint.encoders.text import exporting
from counterpoint.engine.survey import Survey
from counterpoint.tasks.dense import DenseConfig, DenseLearner
from counterpoint.tasks.dense_figures import enlarged, painted
from counterpoint.tasks.subsets import corrupted, corruptions, subsets

SHOWN = 6  # scenes on the page
COLOURS = {  # of modalities on the page
    "blue": (60, 110, 230),
    "orange": (240, 150, 40),
    "green": (50, 165, 75),
    "purple": (150, 80, 190),
    "red": (215, 55, 55),
    "brown": (140, 90, 60),
    "pink": (240, 140, 190),
    "olive": (150, 150, 40),
}


@dataclass
class AnyModalitiesConfig(DenseConfig):
    """Settings of learners from any modalities."""

    width: int = 768
    """Channels of the decoder's features."""
    level: Literal["logits", "features"] = "logits"
    """Fuse the class logits of the modalities, or every map of the encoder, before the decoder."""
    random_subset: bool = False
    """Train each step on a random non-empty subset of the modalities."""

    counts = (*DenseConfig.counts, "width")


class Outputs(NamedTuple):
    """Results of the network for a batch."""

    logits: Map
    features: Map  # before the classifier
    correlation: Float[Tensor, "modalities n"] | None  # of each modality with the fused map
    selected: Int[Tensor, "n rows columns"] | None  # number of the modality that a fusion selects
    maps: list[Map]  # the fused maps, of each level


class AnyModalitiesLearner(DenseLearner):
    """One encoder and decoder for all modalities. Subclasses write `fused` and `loss`.

    Args:
        config: settings.
        data: facts of the data.
        seed: seed of the initialisation.
        beside: number of maps that lie side by side after the fusion, 1 unless the fusion concatenates.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0, beside: int = 1) -> None:
        super().__init__(config, data, seed)
        early = config.level == "features"
        channels = map_channels(self.encoder, self.size)
        self.decoder = MapDecoder([each * (beside if early else 1) for each in channels], config.width)
        self.classifier = nn.Conv2d(config.width * (1 if early else beside), len(self.regions), 1)

    def fused(self, maps: list[Maps], present: Bool[Tensor, "modalities n"]) -> Outputs:
        """Combine maps of the modalities that are there, and classify."""
        raise NotImplementedError

    def row_wise(self) -> list[Any]:
        return []  # the decoder's batch statistics are those of the whole batch

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        count = len(self.modalities)
        if self.config.random_subset:
            number = int(torch.randint(1, 2**count, (), generator=generator))
            batch = batch | {"use": torch.tensor([bool(number >> n & 1) for n in range(count)])}
        return super().prepare(batch, generator)

    # --- the network

    def encoded(self, pictures: Tensor, present: Bool[Tensor, "modalities n"]) -> list[Maps]:
        """Compute the maps to fuse, of the modalities that are there; zeros for the others.

        Args:
            pictures: [n, M, 3, H, W], normalised.
            present: which pictures to encode.
        """
        whole = exporting() or bool(present.all())  # an exported program must not depend on values
        flat = pictures.transpose(0, 1)
        maps = feature_maps(self.encoder, flat.flatten(0, 1) if whole else flat[present])
        if self.config.level == "logits":
            maps = [self.decoder(maps)]
        if not whole:
            at = present.flatten().nonzero()[:, 0]
            maps = [x.new_zeros(present.numel(), *x.shape[1:]).index_copy(0, at, x) for x in maps]
        maps = [x.unflatten(0, present.shape) for x in maps]
        return [torch.where(present[..., None, None, None], x, 0.0) for x in maps] if exporting() else maps

    def seen(self, batch: dict[str, Any]) -> Bool[Tensor, "modalities n"]:
        """Return which modalities a batch has; in training, which it uses."""
        here = torch.ones(len(self.modalities), len(batch["index"]), dtype=torch.bool, device=self.device)
        if "present" in batch:
            here = batch["present"].T.to(self.device)
        if "use" not in batch:
            return here
        some = here & batch["use"].to(here.device)[:, None]
        return torch.where(some.any(0), some, here)  # a picture without these modalities keeps its own

    def forward(self, pictures: Tensor, present: Tensor | None = None) -> Outputs:
        """Compute the results for pictures [n, M, 3, H, W]; `present` [M, n] marks the modalities that are there."""
        here = pictures.new_ones(pictures.shape[1], len(pictures), dtype=torch.bool) if present is None else present
        return self.fused(self.encoded(pictures, here), here)

    def segment(self, images: Tensor, present: Tensor | None = None) -> Float[Tensor, "n classes h w"]:
        """Compute logits of the pixels of pictures [n, M, 3, H, W], or [n, 3, H, W] of one modality.

        Args:
            images: normalised pictures; those of absent modalities are not read.
            present: [M, n] whether a picture is there. Default: all.
        """
        return self.upsampled(self(images if images.ndim == 5 else images[:, None], present).logits)

    def upsampled(self, logits: Map) -> Float[Tensor, "n classes h w"]:
        return F.interpolate(logits, (self.size, self.size), mode="bilinear", align_corners=False)

    # --- evaluation

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        pictures = batch["modalities"] if "modalities" in batch else batch["image"][:, None]
        here = self.seen(batch)
        maps = self.encoded(pictures, here)
        found = {"logits": self.upsampled(self.fused(maps, here).logits)}
        if len(self.modalities) == 1 or batch.get("part") == "survey":
            return found
        for name, at in subsets(self.modalities).items():
            alone = torch.zeros_like(here)
            alone[list(at)] = here[list(at)]
            found[f"{name}_logits"] = self.upsampled(self.fused(maps, alone).logits)
        for name, change in corruptions(self.modalities).items():
            worse = self.changed(maps, here, batch, change.kind, change.modality)
            found[f"{name}_logits"] = self.upsampled(self.fused(worse, here).logits)
        return found

    def changed(self, maps: list[Maps], here: Tensor, batch: dict[str, Any], kind: str, n: int) -> list[Maps]:
        """Return the maps with those of modality n, corrupted."""
        bad = corrupted(batch["modalities"][:, n], kind, batch["index"])
        new = self.encoded(bad[:, None], torch.ones_like(here[:1]))
        kept = here[n, :, None, None, None]
        parts = [(x[:n], torch.where(kept, y[0], 0.0)[None], x[n + 1 :]) for x, y in zip(maps, new, strict=True)]
        return [torch.cat(each) for each in parts]

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show the selected modality of each pixel, as it is and with the first modality dark, for some scenes."""
        split, count = survey.split("test"), len(self.modalities)
        rows = np.unique(np.linspace(0, len(split) - 1, SHOWN).astype(np.int64))
        batch = survey.batch("test", rows)
        here = self.seen(batch)
        if count == 1:
            return {}
        training = self.training
        with torch.no_grad():
            maps = self.eval().encoded(batch["modalities"], here)
            both = [self.fused(x, here) for x in (maps, self.changed(maps, here, batch, "night", 0))]
        self.train(training)
        plain, dark = both
        if plain.selected is None or dark.selected is None or plain.correlation is None:
            return {}
        colours = np.array(list(COLOURS.values()), np.uint8)
        columns = [split.modality(name, rows) for name in self.modalities]
        columns.append(painted(split.masks(rows), len(self.regions)))
        for out in both:
            assert out.selected is not None
            chosen = F.interpolate(out.selected[:, None].float(), (self.size, self.size), mode="nearest-exact")[:, 0]
            columns.append(colours[chosen.long().cpu().numpy() % len(colours)])
            columns.append(painted(self.upsampled(out.logits).argmax(1).cpu().numpy(), len(self.regions)))
        first, rho = self.modalities[0], plain.correlation.mean(1).tolist()
        shares = [[(out == n).float().mean().item() for out in (plain.selected, dark.selected)] for n in range(count)]
        named = zip([*COLOURS] * count, self.modalities, strict=False)
        headings = ["truth", "selected", "prediction", "selected, dark", "prediction, dark"]
        return {
            "Selected modality": {
                "kind": "pictures",
                "columns": [*self.modalities, *headings],
                "rows": [[png(enlarged(column[n])) for column in columns] for n in range(len(rows))],
                "caption": "The modality that the fusion selects at each pixel: "
                + ", ".join(f"{colour} is {name}" for colour, name in named)
                + f". On the right {first} is dark.",
            },
            "Modalities": {
                "kind": "table",
                "columns": ["modality", "correlation", "share of pixels selected", f"share, {first} dark"],
                "rows": [[name, rho[n], *shares[n]] for n, name in enumerate(self.modalities)],
                "caption": "Of the scenes above. Correlation: mean cosine of a modality's maps with the fused map.",
            },
        }
