r"""Audio-sheet music retrieval: each pathway learns alone from unlabelled real music, then both learn from clean pairs.

Carvalho, Washüttl, Widmer: "Self-Supervised Contrastive Learning for Robust Audio-Sheet Music Retrieval Systems", ACM
MMSys 2023, arXiv 2309.12134. Code: github.com/luisfvc/ucasr.

Snippets of scores and of recordings are matched in one space. Aligned pairs exist only for engraved and synthesised music, so
models fail on scans and performances.

Stage 1 trains each pathway on unpaired items of real music: two augmented views of a snippet are each other's positive
(NT-Xent). Stage 2 trains both pathways on the aligned pairs, with a hinge on the ranking in the batch. A layer of canonical
correlation analysis (core/cca.py) transforms the embeddings. Before each evaluation it is fitted again on many training
pairs. The augmentations and the spectrogram are in views/music/, the encoder in encoders/snippets.py. The batches of both
stages are those of tasks/aligned/unpaired.py. The votes of its snippets' neighbours identify a piece (tasks/pieces.py).

Two systems have a function `nt_xent`. `counterpoint.functional.of("simclr").nt_xent` normalises its rows. This paper's takes unit
rows: `counterpoint.functional.of("audio-sheet-retrieval").nt_xent`.

The data may be any set of the task `aligned` with one image and one audio modality. Stage 1 takes its `unpaired` items, which
have one of the two. Without such items, stage 1 takes the snippets of the training pairs, one modality at a time.

Differences from the paper:

    - Learning rates fall on half a cosine over a fixed number of epochs in both stages. The paper has steps down, and stops by a
      validation set. No best model is reloaded.
    - An epoch of stage 1 has as many steps as an epoch of the training pairs.
    - Biases and normalisation have no weight decay.
    - "both" trains the pathways in the same steps. They share no parameter, so this equals training one after the other.
    - The CCA layer computes in float64. It takes 1.2 times as long as in float32, 0.2 ms per step (core/cca.py).

Not supported: the attention front end for audio and room impulse responses, both off in the paper; the correlation loss, whose
weight is 0 there; the cap of the hinge at 1000, which unit vectors never reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.cca import CCALayer
from counterpoint.core.checks import need_alike, need_one_type, need_positive, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place, world
from counterpoint.core.hinge import hinge_sum
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Diagonal
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.encoders.snippets import SnippetEncoder, output_layer, projector
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import AlignedConfig, UnpairedLearner, need_finite, one_each, whole_items
from counterpoint.views.images import denormalise
from counterpoint.views.music import AUDIO_PAIRED, SHEET_PAIRED, AudioViews, SheetItems, SheetViews, SoundItems

# ----------------------------------------------------------------------------------------------------------- the losses


@over_group
@full_precision
def nt_xent(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], temperature: float | Tensor = 0.5
) -> Float[Tensor, ""]:
    r"""Compute stage 1's mean over the 2n views i of -log( exp(z_i . z_pos(i) / t) / sum_{k != i} exp(z_i . z_k / t) ).

    Args:
        z1, z2: unit embeddings of the two views, row by row; not normalised here. SimCLR's function of this name normalises
            them, so its gradients differ.
        temperature: > 0; the paper has 0.6 for audio, 0.5 for sheet music.

    Across processes the negatives are those of all processes. Raises ValueError for shapes that differ, and for a single
    snippet, which has no negative. Raises it too for a temperature that is not positive and for values that are not finite.
    Source: the authors' code, utils/losses.py. It overflows in float32 for t < 0.012; log-sum-exp here does not.

    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    need_alike("n dim", z1=z1, z2=z2)
    if place(len(z1), z1.device).total < 2:
        raise ValueError(f"z1 and z2 need two snippets, so that there is a negative, got {shapes(z1=z1, z2=z2)}")
    return _contrast(z1, z2, temperature, "z1 or z2")


def _contrast(z0: Tensor, z1: Tensor, temperature: float | Tensor, names: str) -> Tensor:
    need_positive(temperature=temperature)
    x = scaled(torch.cat([z0, z1]), temperature**0.5)
    positive = positive_similarity(*x.chunk(2))
    loss = global_mean(batch_logsumexp(x, exclude=Diagonal()).rows) - global_mean(positive)
    if holds(~loss.isfinite()):
        raise ValueError(f"{names} holds NaN or infinite values")
    return loss


@over_group
@full_precision
def mixed_nt_xent(
    sheet1: Float[Tensor, "n dim"],
    sheet2: Float[Tensor, "n dim"],
    audio1: Float[Tensor, "m dim"],
    audio2: Float[Tensor, "m dim"],
    temperature: float | Tensor = 0.6,
) -> Float[Tensor, ""]:
    """Compute stage 1's loss of both pathways at once: NT-Xent of all 2(n + m) views.

    So the views of each modality are also negatives of the other modality. Arguments and errors are those of `nt_xent`; n
    and m may differ.

    >>> mixed_nt_xent(torch.eye(4)[:2], torch.eye(4)[:2], torch.eye(4)[2:], torch.eye(4)[2:], 1.0)
    tensor(1.1654)
    """
    need_alike("n dim", sheet1=sheet1, sheet2=sheet2)
    need_alike("m dim", audio1=audio1, audio2=audio2)
    if sheet1.shape[1] != audio1.shape[1]:
        raise ValueError(f"sheet1 and audio1 must be of one width, got {shapes(sheet1=sheet1, audio1=audio1)}")
    views = torch.cat([sheet1, audio1]), torch.cat([sheet2, audio2])
    return _contrast(*views, temperature, "sheet1, sheet2, audio1 or audio2")


@over_group
@full_precision
def batch_hinge(query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"], margin: float = 0.7) -> Float[Tensor, ""]:
    r"""Compute stage 2's mean over i and j != i of max(0, m - (S_ii - S_ij)), S = query key'.

    There is one direction: sheet anchors (query) against the audio of the batch (key). Zeros count in the mean.

    Args:
        query, key: unit rows, not normalised here; row i of both is one pair.
        margin: m; the paper's runs have 0.6, its function 0.7.

    Memory is O(n dim), forward and backward. Across processes the batch is that of all processes. If all rows are equal, the
    loss is m. Raises ValueError for shapes or types that differ, and for a batch of one, which has no j. Raises it too
    for a margin or rows that are not finite. Not differentiable twice. Source: the authors' code, utils/losses.py.

    >>> batch_hinge(torch.eye(2), torch.eye(2).flip(0), margin=0.5)
    tensor(1.5000)
    """
    need_alike("n dim", query=query, key=key)
    need_one_type(query=[query], key=[key])
    if not math.isfinite(margin):
        raise ValueError(f"margin must be a number, got {margin}")
    query, key = wide(query), wide(key)
    here = place(len(query), query.device)
    if here.total < 2:
        raise ValueError(
            f"query and key need two pairs, so that there is another to rank, got {shapes(query=query, key=key)}"
        )
    total = hinge_sum(query, gather_rows(key), margin, here.offset)
    loss = (total if world()[1] == 1 else gather_rows(total[None]).sum()) / (here.total * (here.total - 1))
    if holds(~loss.isfinite()):
        raise ValueError("query or key holds NaN or infinite values")
    return loss


# ---------------------------------------------------------------------------------------------------------- the learner


@dataclass
class AudioSheetConfig(AlignedConfig):
    """Settings of audio-sheet retrieval. Defaults are the paper's, learning rates at a batch of 256."""

    epochs: int = 300
    """Epochs of stage 2, over the aligned pairs; the paper stops by a validation set, after at most 1,000."""
    batch_size: int = 128
    embedding: int = 32
    optimizer: str = "adam"
    lr: float = 8e-4
    weight_decay: float = 1e-5
    pretrain: Literal["none", "audio", "sheet", "both", "mixed"] = "both"
    """Pathways that stage 1 trains; mixed contrasts the views of both with each other."""
    pretrain_epochs: int = 300
    """Epochs of stage 1; each has as many steps as an epoch over the aligned pairs."""
    audio_batch: int = 128
    """Sounds in a batch of stage 1, over all processes; mixed uses it for both. 0: batch_size. Fewer items: all of them."""
    sheet_batch: int = 256
    """Images in a batch of stage 1, over all processes. 0: batch_size. Fewer items: all of them."""
    audio_lr: float = 2e-3
    """Learning rate of audio in stage 1 at a batch of 256; mixed uses it for both."""
    sheet_lr: float = 5e-4
    """Learning rate of sheet music in stage 1 at a batch of 256."""
    audio_temperature: float = 0.6
    """Temperature of audio's NT-Xent; mixed uses it for both."""
    sheet_temperature: float = 0.5
    """Temperature of sheet music's NT-Xent."""
    margin: float = 0.6
    """Margin of the hinge."""
    cca: bool = True
    """Transform the embeddings by canonical correlation analysis before they are normalised. A batch should be many times
    larger than the embedding's width: with batches of 96 and 32 dimensions, CCA makes retrieval far worse."""
    regulariser: float = 1e-3
    """Number that CCA adds to the diagonals of the covariances."""
    refine_pairs: int = 25_000
    """Training pairs on which CCA is fitted before an evaluation."""
    filters: int = 24
    """F: channels of an encoder's first block."""
    margins: bool = True
    """Items are windows with margins for shifts, rotations and stretching: the image is 3/2 as high and 6/5 as wide as
    the snippet, the sound twice as long. Off: items are snippets, and beyond them are white and silence."""
    vary_pairs: bool = True
    """Augment the aligned pairs: the image's scale by 5 %, its height by 2.5 pixels, the sound by one frame."""

    adapts: ClassVar[bool] = False  # its pathways are its own

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("pretrain_epochs", "filters")
        if self.refine_pairs < 2:
            raise CounterpointError(f"refine_pairs must be at least 2, got {self.refine_pairs}")
        for name in ("audio_batch", "sheet_batch"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise CounterpointError(f"{name} must be at least 2, or 0 for batch_size; got {getattr(self, name)}")
        self.need_positive("audio_lr", "sheet_lr", "audio_temperature", "sheet_temperature", "regulariser")
        if not 0 < self.margin <= 2:
            raise CounterpointError(f"margin must lie in 0..2, 0 not included, got {self.margin}")
        if self.cca and self.batch_size <= self.embedding:
            raise CounterpointError(
                f"CCA needs batches larger than the embedding's {self.embedding} dimensions, better several times, got "
                f"--batch-size {self.batch_size}: use a larger one, or --no-cca"
            )

    def first(self, kind: str) -> tuple[int, float, float]:
        """Return batch size, learning rate at that batch and temperature of a pathway in stage 1; kind: audio or image."""
        audio = kind == "audio" or self.pretrain == "mixed"
        batch = (self.audio_batch if audio else self.sheet_batch) or self.batch_size
        rate = (self.audio_lr if audio else self.sheet_lr) * batch / 256
        return batch, rate, self.audio_temperature if audio else self.sheet_temperature


class AudioSheet(UnpairedLearner):
    """A pathway for scores and one for sounds: trained first separately, then together."""

    config: AudioSheetConfig

    def __init__(self, config: AudioSheetConfig, data: Any, seed: int = 0) -> None:
        self.sheet, self.audio = one_each(data.modalities, "audio-sheet-retrieval", "image", "audio")
        sound = data.modalities[self.audio]
        sounds = SoundItems(sound["rate"], sound["samples"], config.margins)
        self.items = {self.sheet: SheetItems(config.margins), self.audio: sounds}
        super().__init__(config, data, seed)
        frames = sounds.frames
        self.first_views = {self.sheet: SheetViews(), self.audio: AudioViews(frames)}
        pair_views = {self.sheet: SheetViews(SHEET_PAIRED), self.audio: AudioViews(frames, AUDIO_PAIRED)}
        self.pair_views = pair_views if config.vary_pairs else {}
        self.cca = CCALayer(config.embedding, config.regulariser) if config.cca else None
        only = {"none": (), "audio": (self.audio,), "sheet": (self.sheet,)}
        self.pretrained = only.get(config.pretrain, (self.sheet, self.audio))
        # Made last, so that the other parameters start with equal values with and without them.
        self.projections = nn.ModuleDict(
            {name: projector(cast(Any, self.encoders[name]).dim, config.embedding) for name in self.pretrained}
        )

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        height, width = self.items[self.sheet if spec["kind"] == "image" else self.audio].size
        return SnippetEncoder(height, width, self.config.filters)

    def build_head(self, dim: int) -> nn.Module:
        return output_layer(dim, self.config.embedding)

    def first(self, name: str) -> tuple[int, float]:
        return self.config.first(self.kinds[name])[:2]

    def seen(self, name: str, values: Tensor) -> Tensor:
        """Return the input of a pathway for items in evaluation, whose images come normalised."""
        items = self.items[name]
        return items.snippets(items.windows(denormalise(values) if name == self.sheet else values))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self._first_loss(batch["views"]) if "views" in batch else self._second_loss(batch)

    def _first_loss(self, views: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        found: dict[str, tuple[Tensor, ...]] = {}
        for name, pair in views.items():
            # Both views in one pass: batch normalisation sees them together, as in the authors' code.
            z = self.projections[name](self.encoders[name](torch.cat(list(pair))))
            need_finite(z, name)
            found[name] = unit(z).chunk(2)
        if self.config.pretrain == "mixed":
            sheet, audio = found[self.sheet], found[self.audio]
            return {"loss": mixed_nt_xent(sheet[0], sheet[1], audio[0], audio[1], self.config.audio_temperature)}
        terms = {
            f"{name}_contrast": nt_xent(pair[0], pair[1], self.config.first(self.kinds[name])[2])
            for name, pair in found.items()
        }
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    def _second_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        count, inputs = whole_items(batch, (self.sheet, self.audio))
        least = self.config.embedding if self.cca is not None else 1
        if (pairs := place(count, self.device).total) <= least:
            raise CounterpointError(
                f"a batch has {pairs} whole pairs, {least + 1} are needed: use a larger --batch-size"
            )
        h = [self.output(name, values) for name, values in inputs.items()]
        x, y = h if self.cca is None else self.cca(*h)
        return {"loss": batch_hinge(unit(x), unit(y), self.config.margin)}

    def output(self, name: str, values: Tensor) -> Float[Tensor, "n embedding"]:
        """Return a pathway's output before CCA and normalisation."""
        h = super().projected(name, values)
        need_finite(h, name)
        return h

    def projected(self, name: str, values: Tensor) -> Float[Tensor, "n embedding"]:
        """Return a pathway's output on the stored axes of CCA."""
        h = self.output(name, values)
        if self.cca is None:
            return h
        return self.cca.first(h) if name == self.sheet else self.cca.second(h)

    def begin_evaluation(self, survey: Survey) -> None:
        """Fit CCA on many training pairs, in the form of evaluation. The next step overwrites it."""
        if self.cca is not None and not self.by_itself:
            rows = (self.sheet, self.audio), lambda name, x: self.output(name, self.seen(name, x))
            self.cca.refine(*self.training_rows(survey, *rows, self.config.refine_pairs))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: self.seen(name, values) for name, values in batch["inputs"].items()}
        return super().predict(batch | {"inputs": inputs})


# ------------------------------------------------------------------------------------------------------------ settings

RATE = 1e-3 * 256 / 96  # learning rate at a batch of 256 that is 1e-3 at one of 96

SYSTEM = System(
    slug="audio-sheet-retrieval",
    task="aligned",
    config=AudioSheetConfig,
    learner=AudioSheet,
    data="scores",
    # The batch is the card's. The claim has batches of 48, with 212 steps in stage 1 and 265 in stage 2, to save time. Without
    # the CCA layer: batches of 96 are too small for it (see `cca` and the claim's variant).
    recipes={
        "scores": {
            "epochs": 15,
            "pretrain_epochs": 15,
            "batch_size": 96,
            "audio_batch": 0,
            "sheet_batch": 0,
            "filters": 8,
            "lr": RATE,
            "audio_lr": RATE,
            "sheet_lr": RATE,
            "audio_temperature": 0.5,
            "cca": False,
        }
    },
    recipe={"epochs": 30, "pretrain_epochs": 30, "warmup_epochs": 1, "filters": 8, "margins": False},
)
