"""TeminAL: teach a pre-trained model of sounds and texts which of two events came first.

"Enhancing Audio-Language Models through Self-Supervised Post-Training with Text-Audio Pairs", 2024, arXiv 2408.09269. No code is
public. The loss is that of TACT, its ancestor for video ("Test of Time", CVPR 2023, code bpiyush/TestOfTime). A third block
is added.

    i, j         two sounds of different events, with the captions c_i and c_j
    F            forward: the sound [a_i; a_j] and "c_i before c_j"
    R            inverted: the sound [a_j; a_i] and "c_j before c_i", the same word with its events swapped
    O            overlapped: the sound a_i + a_j and "c_i while c_j"
    z_a, z_t     unit rows of sounds and texts
    s            scale of the logits, 1 / temperature, learned in pre-training and kept, at most 100
    alpha_same   weight of a pair's own row in another block (consistent term)
    alpha_cross  weight of another pair's row in another block (cross term)

The stages of a fit:

    base   CLAP's contrast of the data's own pairs, unless `--start` names a trained run; a share may be "c_i and c_j"
    A      half of a batch are single sounds, half are two sounds with "c_i and c_j", in a row or at once (`single_dual_nce`)
    B      every item is the first event of a clip, with a partner of another event: F, R and O (`temporal_nce`)

For half of the clips of B the word is "after", and the sounds change places. All networks train, and no row is detached. Each
stage begins with a new optimiser. A ladder of zero-shot tests (tasks/ladder.py) measures each stage.

    counterpoint train teminal --data events
    counterpoint train teminal --start run:runs/clip --data "manifest:sounds.csv?seconds=10"

Choices where the paper's text could not be read: the half of two-event clips in stage A, the ladder's scoring, the third block of
the loss, and masks. Rows of the same events in the same order are no negatives of each other. "a before b" and "b after a"
are such rows.

- In TACT's code beta weights the anchors from row B / 2 on, which is an error. Here it weights the block R.
- Not built: frozen lower layers (TACT), further words for the relations, clips of more than two events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.block_contrast import BlockWeights, anchor_losses
from counterpoint.core.checks import need_alike, need_within
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.engine.loading import Batches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP
from counterpoint.tasks.ladder import SEQUENTIAL
from counterpoint.tasks.phases import PhaseBatches
from counterpoint.tasks.sound_events import NEUTRAL, OVERLAP, EventConfig, EventLearner, Pairs
from counterpoint.views.sounds import at_once, in_a_row

# ------------------------------------------------------------------------------------------------------------ equations


class EventContrast(NamedTuple):
    """The sum of both directions, and each of them: texts among sounds, sounds among texts."""

    loss: Float[Tensor, ""]
    text_anchor: Float[Tensor, ""]
    audio_anchor: Float[Tensor, ""]


@over_group
@full_precision
def temporal_nce(
    audio_fwd: Float[Tensor, "n dim"],
    audio_rev: Float[Tensor, "n dim"],
    text_fwd: Float[Tensor, "n dim"],
    text_rev: Float[Tensor, "n dim"],
    alpha_same: float = 1.0,
    alpha_cross: float = 1.0,
    logit_scale: float | Float[Tensor, ""] = 1.0,
    audio_over: Float[Tensor, "n dim"] | None = None,
    text_over: Float[Tensor, "n dim"] | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    meaning: Int[Tensor, "blocks n"] | None = None,
) -> EventContrast:
    r"""Contrast event pairs with their time-inverted and overlapped versions (TNCE).

    For a text n of a block, with s = logit_scale, m over its block and T over the other blocks,

        l(n) = -log e^{s t_n a_n} / (sum_m e^{s t_n a_m} + alpha_same sum_T e^{s t_n a_T(n)} + alpha_cross sum_T,m e^{s t_n a_T(m)})

    with m != n in the last sum, and likewise for sounds among texts. A direction is a weighted mean over all anchors. Those of F
    count 1, of R beta and of O gamma.

    Args:
        audio_fwd, audio_rev: rows of n sounds, [a_i; a_j] and [a_j; a_i]; used as they are, not normalised here.
        text_fwd, text_rev: rows of their texts.
        alpha_same: weight of a pair's own rows in other blocks, at least 0; 1e-8 is added, as in TACT's code.
        alpha_cross: weight of other pairs' rows in other blocks, at least 0; likewise.
        logit_scale: 1 / temperature, at least 0; it may have a gradient. Default 1, as in TACT.
        audio_over, text_over: rows of the overlapped sounds and their texts. Default: no third block.
        beta, gamma: weights of the anchors of R and of O, at least 0. Default 1.
        meaning: numbers, equal where two rows describe the same events in the same order; rows F, R, O. Such a row is no negative.
            Default: all rows differ.

    Returns (loss, text_anchor, audio_anchor): the sum of both directions, and each. Across processes each row meets the rows of all
    processes. Memory is linear in n. Raises ValueError for shapes that differ, an empty batch, and numbers out of range.

    >>> x = torch.zeros(3, 2)
    >>> temporal_nce(x, x, x, x).loss  # 2 log 6
    tensor(3.5835)
    """
    need_alike("n dim", audio_fwd=audio_fwd, audio_rev=audio_rev, text_fwd=text_fwd, text_rev=text_rev)
    if (audio_over is None) != (text_over is None):
        raise ValueError("audio_over and text_over belong together: give both or neither")
    audios, texts, factors = [audio_fwd, audio_rev], [text_fwd, text_rev], [1.0, float(beta)]
    if audio_over is not None and text_over is not None:
        need_alike("n dim", audio_fwd=audio_fwd, audio_over=audio_over, text_over=text_over)
        audios, texts, factors = [*audios, audio_over], [*texts, text_over], [*factors, float(gamma)]
    need_within(0, math.inf, alpha_same=alpha_same, alpha_cross=alpha_cross, beta=beta, gamma=gamma)
    blocks, n = len(audios), len(audio_fwd)
    if meaning is not None and meaning.shape != (blocks, n):
        raise ValueError(f"meaning must be [{blocks}, {n}], a row for each block, got {list(meaning.shape)}")
    weights = BlockWeights.of(alpha_same, alpha_cross, blocks, n, wide(audio_fwd))
    of_texts, of_sounds = anchor_losses(
        torch.cat(audios), torch.cat(texts), logit_scale, None if meaning is None else meaning.flatten(), weights
    )
    if set(factors) != {1.0}:  # all blocks have equally many rows
        shares = of_texts.new_tensor(factors).repeat_interleave(n) * (blocks / sum(factors))
        of_texts, of_sounds = of_texts * shares, of_sounds * shares
    text_anchor, audio_anchor = global_mean(of_texts), global_mean(of_sounds)
    return EventContrast(text_anchor + audio_anchor, text_anchor, audio_anchor)


@over_group
@full_precision
def single_dual_nce(
    audio: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    logit_scale: float | Float[Tensor, ""] = 1.0,
    meaning: Int[Tensor, " n"] | None = None,
) -> EventContrast:
    r"""Contrast sounds of one and of two events with their texts: the loss of CLAP, summed over both directions (stage A).

    The texts of a clip's single events are negatives of the clip, as the paper intends.

    Args:
        audio, text: rows of n sounds and of their texts; used as they are, not normalised here.
        logit_scale: 1 / temperature, at least 0; it may have a gradient.
        meaning: numbers, equal where two rows describe the same events; such a row is no negative. Default: all rows differ.

    Returns (loss, text_anchor, audio_anchor): the sum of both directions, and each. For n = 1 all are 0. Across processes each row
    meets the rows of all processes. Raises ValueError for shapes that differ, an empty batch and a negative scale.

    >>> single_dual_nce(torch.zeros(4, 2), torch.zeros(4, 2)).text_anchor  # log 4
    tensor(1.3863)
    """
    need_alike("n dim", audio=audio, text=text)
    if meaning is not None and meaning.shape != (len(audio),):
        raise ValueError(f"meaning must be [{len(audio)}], a number for each row, got {list(meaning.shape)}")
    text_anchor, audio_anchor = (global_mean(rows) for rows in anchor_losses(audio, text, logit_scale, meaning))
    return EventContrast(text_anchor + audio_anchor, text_anchor, audio_anchor)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class TeminALConfig(EventConfig):
    """Settings of TeminAL. The paper's sizes are not known; defaults are TACT's: 40 epochs of 32 pairs, Adam at 5e-6."""

    epochs: int = 40
    """Passes over the training items in stage A, and again in stage B."""
    batch_size: int = 32
    """Items in a batch. In stage B each gives a pair of events, and so two or three clips."""
    optimizer: str = "adamw"
    lr: float = 5e-6 * 256 / 32
    weight_decay: float = 0.0
    beta2: float | None = 0.98
    constant_lr: bool = True
    base_epochs: int = 40
    """Passes over the training items in the base stage, where no `start` is given."""
    base_duals: float = 0.0
    """Share of the base stage's items that become two sounds with "and", 0..1; the others are as the data have them."""
    post: Literal["ab", "a", "b", "none"] = "ab"
    """Stages after the base: A and B, one of them, or none."""
    post_rate: float = 1.0
    """Factor of the learning rate in stages A and B, > 0."""
    negatives: Literal["both", "inverted", "none"] = "both"
    """Blocks beside the forward pairs in stage B: inverted and overlapped, inverted alone, or none, which is plain InfoNCE."""
    alpha_same: float = 1.0
    """Weight of a pair's own inverted and overlapped clip among its negatives, at least 0."""
    alpha_cross: float = 1.0
    """Weight of other pairs' inverted and overlapped clips, at least 0."""
    beta: float = 1.0
    """Weight of inverted clips as anchors, at least 0; that of forward clips is 1."""
    gamma: float = 1.0
    """Weight of overlapped clips as anchors, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("base_epochs", "post_rate")
        self.need_share("base_duals")
        self.need_weight("alpha_same", "alpha_cross", "beta", "gamma")
        if self.start and self.post == "none":
            raise CounterpointError("post none with a start leaves nothing to train; choose --post ab")


# ---------------------------------------------------------------------------------------------------------- the learner


class TeminAL(EventLearner):
    """A CLAP that learns one event from two, then the order of two."""

    config: TeminALConfig

    def __init__(self, config: TeminALConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed, slug="teminal", moments=("before", "after A", "after B"))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    # --- stages

    def stages(self) -> list[Stage]:
        config, found = self.config, list[Stage]()
        if not config.start:
            found.append(Stage("base", config.base_epochs, batches=self.batches))
        for name in config.post if config.post != "none" else "":
            enter = partial(self.enter, first=bool(config.start) and not found)
            found.append(Stage(name.upper(), config.epochs, batches=self.batches, enter=enter))
        return found

    def enter(self, survey: Survey, *, first: bool) -> None:
        """Begin stage A or B; as the first stage, start from the given run."""
        if first:
            self.adopt(self.config.start)
            self.note(0, survey)

    def batches(self, survey: Survey) -> Batches:
        """Return batches of the items with a sound, a caption and a known event."""
        return PhaseBatches(np.flatnonzero(self.event_of >= 0), self.config.batch_size)

    def turns(self) -> list[Turn]:
        config, rate = self.config, 1.0 if self.stage_name == "base" else self.config.post_rate
        return [self.turn_of([self], constant=self.parameters() if config.constant_lr else (), rate=rate)]

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Compose clips: of `base_duals` of the items in the base, of half of them in A, of all in B."""
        share = {"base": self.config.base_duals, "A": 0.5, "B": 1.0}[self.stage_name]
        pairs = self.pairs(batch, generator, share)
        clips, texts, meaning = self.ordered(pairs) if self.stage_name == "B" else self.neutral(pairs)
        return batch | {"sounds": clips, "texts": self.encoded(texts), "meaning": meaning.to(clips.device)}

    def neutral(self, pairs: Pairs) -> tuple[Tensor, list[str], Tensor]:
        """Leave some items single; compose others of two events, in a row or at once, with "and" in either order."""
        clips = pairs.one.waves
        if bool(pairs.dual.any()):
            together, in_turn = at_once(pairs.one, pairs.other), in_a_row(pairs.one, pairs.other)
            mixed = torch.where(pairs.column(pairs.coin), together, in_turn)
            clips = torch.where(pairs.column(pairs.dual), mixed, clips)
        texts = [
            NEUTRAL.format(*(two[::-1] if back else two)) if dual else two[0]
            for two, dual, back in zip(pairs.words, pairs.dual.tolist(), pairs.second_coin.tolist(), strict=True)
        ]
        return clips, texts, torch.where(pairs.dual, self.unordered(pairs.i, pairs.j), pairs.i)

    def ordered(self, pairs: Pairs) -> tuple[Tensor, list[str], Tensor]:
        """Compose the blocks F, R and O of clips of two events. With "after" the sounds of F and R change places."""
        (one, other), (i, j), late = (pairs.one, pairs.other), (pairs.i, pairs.j), pairs.coin
        row, back, after = in_a_row(one, other), in_a_row(other, one), pairs.column(late)
        clips = [torch.where(after, back, row), torch.where(after, row, back), at_once(one, other)]
        templates = [SEQUENTIAL[int(word)] for word in late]
        forward = [template.format(*two) for template, two in zip(templates, pairs.words, strict=True)]
        inverted = [template.format(*two[::-1]) for template, two in zip(templates, pairs.words, strict=True)]
        texts = [forward, inverted, [OVERLAP.format(*two) for two in pairs.words]]
        above = len(self.names) * (1 + len(self.names))  # the numbers of single events and of pairs in any order
        leads, follows = above + i * len(self.names) + j, above + j * len(self.names) + i
        both = 2 * above + self.unordered(i, j)
        meaning = [torch.where(late, follows, leads), torch.where(late, leads, follows), both]
        blocks = {"both": 3, "inverted": 2, "none": 1}[self.config.negatives]
        said = [text for block in texts[:blocks] for text in block]
        return torch.cat(clips[:blocks]), said, torch.stack(meaning[:blocks])

    def unordered(self, i: Tensor, j: Tensor) -> Tensor:
        """Number pairs of events whatever their order, above the numbers of single events."""
        size = len(self.names)
        return size + torch.minimum(i, j) * size + torch.maximum(i, j)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, scale = self.config, self.log_scale.exp()
        audio, text = self.rows(self.audio, batch["sounds"]), self.rows(self.text, batch["texts"])
        meaning = batch["meaning"]
        if self.stage_name != "B" or config.negatives == "none":
            found = single_dual_nce(audio, text, scale, meaning.flatten())
        else:
            a, t = audio.chunk(len(meaning)), text.chunk(len(meaning))
            third = [a[2], t[2]] if len(meaning) == 3 else [None, None]
            weights = config.alpha_same, config.alpha_cross, scale
            found = temporal_nce(
                a[0], a[1], t[0], t[1], *weights, third[0], third[1], config.beta, config.gamma, meaning
            )
        anchors = {"text_anchor": found.text_anchor.detach(), "audio_anchor": found.audio_anchor.detach()}
        return {"loss": found.loss, **anchors, "scale": scale.detach()}

    def end_step(self) -> None:
        super().end_step()
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(100))

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if self.survey is not None and epoch == self.epochs - 1:
            self.note({"base": 0, "A": 1, "B": 2}[self.stage_name], self.survey)


# Stages A and B are of equal length, and all layers train, at the base's rate.
SYSTEM = System(
    slug="teminal",
    task="aligned",
    config=TeminALConfig,
    learner=TeminAL,
    data="events",
    recipe=LAPTOP
    | {
        "audio_encoder": "frames-s",
        "text_encoder": "text-64-2-4",
        "embedding": 64,
        "head": "batchnorm",
        "batch_size": 24,
        "base_epochs": 25,
        "base_duals": 0.5,
        "epochs": 8,
        "lr": 2e-3 * 256 / 24,
        "beta2": None,
        "constant_lr": False,
        "schedule": "step",
        "warmup_epochs": 0,
        "evaluate_every": 10,
    },
)
