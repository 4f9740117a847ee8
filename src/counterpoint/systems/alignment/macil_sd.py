"""MACIL-SD: find the violent moments of a video from video-level labels only.

Yu, Liu, Cheng, Feng, Zhang: "Modality-Aware Contrastive Instance Learning with Self-Distillation for
Weakly-Supervised Audio-Visual Violence Detection", ACM Multimedia 2022, arXiv 2207.05500.

A video is a bag of snippets. A two-stream cross-attention network scores every snippet; top-k MIL relates the scores to the
video's label. The method adds two parts. First, snippets are mined per modality into *semi-bags* (violent, background, normal).
The violent mean of one modality is contrasted with that of the other, against the other's background and normal snippets. So a
scream that follows the blow still finds its partner (Sec. 3.3). Second, a visual-only network is trained at the same time. Once
per epoch it is blended into the audio-visual network (self-distillation, Sec. 3.4).

This file has semi-bags, the four terms, ramps, blending and both optimisers. Top-k pooling and the selection of snippets are in
core/mil.py, InfoNCE is in core/contrast.py. Both networks, with the published parameter names, are in encoders/bags.py. The
released code and the paper differ, or the code fails, in three places:
  - `feature_order`: the released loop passes the two feature streams to the contrast under exchanged names.
    "paper" (default) lets audio scores select audio features; "released" exchanges them as the code does.
  - Attention includes padding (`mask_padding=False`), as in the code; True masks it, which the paper does not do.
  - A bag without snippets crashes the released code; here it raises an error that names the video.
The I3D and VGGish feature extractors are not part of the method, which takes features as input. `counterpoint detect` has
other backbones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.contrast import info_nce
from counterpoint.core.distributed import gather_rows, global_max
from counterpoint.core.mil import bag_cross_entropy, extreme_snippets, sequence_lengths, topk_count
from counterpoint.core.precision import full_precision
from counterpoint.core.seeds import seed_torch
from counterpoint.core.teacher import blend, cosine_momentum
from counterpoint.core.transforms import holds, need_fixed
from counterpoint.data.bags import BagData
from counterpoint.encoders.bags import MacilSDNet, VisualNet
from counterpoint.engine.learner import Learner
from counterpoint.engine.optim import clip, light
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.bags import BagsConfig

# ------------------------------------------------------------------------------------------ contrastive instance learning


class SemiBags(NamedTuple):
    """The features of one modality that one modality's scores select, over a batch (Sec. 3.3)."""

    violent: Float[Tensor, "violent_bags hidden"]  # mean of the top snippets of each bag predicted violent
    weight: Float[Tensor, " violent_bags"]  # k of that bag: the paper repeats the mean k times
    background: Float[Tensor, "background hidden"]  # bottom snippets of every bag
    normal: Float[Tensor, "normal hidden"]  # top snippets of the bags predicted normal


def semi_bags(
    bag_prob: Float[Tensor, " bags"],
    prob: Float[Tensor, "bags time"],
    seq_len: Int[Tensor, " bags"],
    rep: Float[Tensor, "bags time hidden"],
) -> SemiBags:
    """Extract the semi-bags of one modality. Selection uses only values; gradients flow through the selected rows.

    The network's own prediction, bag_prob > 0.5, decides whether a bag counts as violent, not the label.
    """
    bags, time, hidden = rep.shape
    count = topk_count(seq_len)
    rows = rep.reshape(bags * time, hidden)
    offset = torch.arange(bags, device=rep.device)[:, None] * time

    bottom, keep = extreme_snippets(prob, seq_len, count, largest=False)
    background = rows.index_select(0, (bottom + offset)[keep])

    top, keep = extreme_snippets(prob, seq_len, count, largest=True)
    top = top + offset
    violent = bag_prob.detach() > 0.5
    normal = rows.index_select(0, top[~violent][keep[~violent]])
    # One row of weight k replaces k equal rows: the same mean over rows with 1 / k of the work.
    weight = count[violent].to(rep.dtype)
    chosen = rows.index_select(0, top[violent].flatten()).view(len(weight), top.shape[1], hidden)
    mean = (chosen * keep[violent].unsqueeze(-1)).sum(1) / weight.unsqueeze(-1)
    return SemiBags(mean, weight, background, normal)


def _four_terms(audio: SemiBags, visual: SemiBags, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(audio.weight) == 0 or len(audio.normal) == 0:
        # Also where L1 and L3 would be defined, as in the released code.
        zero = audio.violent.new_zeros(())
        return zero, zero, zero, zero

    def contrast(query: SemiBags, key: SemiBags, negatives: Tensor) -> Tensor:
        return info_nce(query.violent, key.violent, negatives, temperature, weight=query.weight)

    return (
        contrast(audio, visual, visual.background),
        contrast(audio, visual, visual.normal),
        contrast(visual, audio, audio.background),
        contrast(visual, audio, audio.normal),
    )


@full_precision
def semi_bag_contrast(
    bag_prob: Float[Tensor, " bags"],
    audio_prob: Float[Tensor, "bags time"],
    visual_prob: Float[Tensor, "bags time"],
    seq_len: Int[Tensor, " bags"],
    audio_rep: Float[Tensor, "bags time hidden"],
    visual_rep: Float[Tensor, "bags time hidden"],
    temperature: float = 0.1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the four contrastive terms over semi-bags (Sec. 3.3, Eq. 5-8).

    Args:
        bag_prob: the network's violence probability of each bag.
        audio_prob, visual_prob: each modality's snippet probabilities; each selects in its own `rep`.
        seq_len: number n of valid snippets of each bag; k = floor(n / 16) + 1 are selected at the top and at the bottom.
        audio_rep, visual_rep: snippet features; normalised here.
        temperature: > 0.

    Returns (L1, L2, L3, L4): audio to visual against background, against normal; visual to audio against background,
    against normal. All four are 0 when no bag is predicted violent, or none normal.

    Raises ValueError for shapes that do not fit, a bag without snippets, or values that are not finite.

    >>> p, rep = torch.rand(4, 20), torch.randn(4, 20, 8)
    >>> terms = semi_bag_contrast(torch.tensor([0.9, 0.1, 0.8, 0.2]), p, p, torch.full((4,), 20), rep, rep)
    >>> len(terms)
    4
    """
    if audio_prob.shape != visual_prob.shape or audio_rep.shape != visual_rep.shape:
        raise ValueError("audio and visual must have the same shapes; cut both to the shorter one first")
    if audio_rep.shape[:2] != audio_prob.shape or bag_prob.shape != seq_len.shape or len(bag_prob) != len(audio_prob):
        raise ValueError(
            f"bag_prob {tuple(bag_prob.shape)}, seq_len {tuple(seq_len.shape)}, probabilities {tuple(audio_prob.shape)} "
            f"and features {tuple(audio_rep.shape)} do not belong to the same bags and snippets"
        )
    need_rows(bag_prob=bag_prob)
    need_fixed("semi_bag_contrast", bag_prob=bag_prob, audio_prob=audio_prob, visual_prob=visual_prob)
    for name, value in (("bag_prob", bag_prob), ("audio_prob", audio_prob), ("visual_prob", visual_prob)):
        if holds(~torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    need_positive(temperature=temperature)
    terms = _four_terms(
        semi_bags(bag_prob, audio_prob, seq_len, audio_rep),
        semi_bags(bag_prob, visual_prob, seq_len, visual_rep),
        temperature,
    )
    if holds(~torch.isfinite(torch.stack(terms)).all()):
        raise ValueError("audio_rep or visual_rep holds NaN or infinite values")
    return terms


# ------------------------------------------------------------------------------------------------------ self-distillation


def distillation_momentum(epoch: int, total_epochs: int, base: float = 0.91) -> float:
    """Compute the momentum m(e) = 1 + (m0 - 1)(1 + cos(pi e / E)) / 2: from m0 at epoch 0 towards 1 (Sec. 3.4)."""
    return cosine_momentum(epoch, total_epochs, base)


def _av_name(visual_name: str) -> str:
    """Return the audio-visual network's name for a parameter of the visual one; only the scorer's names differ."""
    return f"att_mmil.{visual_name}" if visual_name.startswith("fc.") else visual_name


def parameter_distillation(
    av_state: Mapping[str, Tensor], visual_state: Mapping[str, Tensor], momentum: float
) -> dict[str, Tensor]:
    """Blend theta_AV <- m theta_AV + (1 - m) theta_V for parameters with a partner; others (fc_a) stay (Sec. 3.4).

    Returns a new state dict; AV `att_mmil.fc.*` pairs with V `fc.*`. No gradient flows back.
    Raises ValueError when shapes differ or no parameter has a partner.
    """
    result = {name: value.clone() for name, value in av_state.items()}
    blend(result, {_av_name(name): value for name, value in visual_state.items()}, momentum)
    return result


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class MacilSDConfig(BagsConfig):
    """Settings of MACIL-SD. Defaults are the paper's (full XD-Violence, 155 steps an epoch)."""

    hidden: int = 128
    """Width D of both networks."""
    heads: int = 4
    """Attention heads; must divide `hidden`."""
    ffn: int = 128
    """Inner width of the feed-forward part."""
    dropout: float = 0.1
    """Dropout on attention weights, inside the feed-forward part and on both residuals."""
    lr: float = 4e-4
    """Adam's learning rate for the audio-visual network."""
    visual_lr: float = 8e-5
    """Adam's learning rate for the visual network."""
    cosine_epochs: int = 60
    """Epochs over which a cosine brings both learning rates to 0; 0 keeps them constant."""
    contrast: bool = True
    """Contrast the semi-bags of both modalities; off: multiple-instance learning alone."""
    temperature: float = 0.1
    """Temperature of the contrast, > 0."""
    contrast_delay: int = 0
    """Epochs after the first in which the contrast's weight stays 0, until MIL has learnt."""
    late: ClassVar = {"contrast_delay": ("the contrast", 1)}
    contrast_step: float = 0.1
    """Increase of the contrast's weight in each epoch after that."""
    contrast_max: float = 1.5
    """Maximum of the contrast's weight."""
    distillation: bool = True
    """Train the visual network, and blend it into the audio-visual one after each epoch."""
    base_momentum: float = 0.91
    """Momentum of the blending in epoch 0, 0 to 1; it rises to 1 over the epochs."""
    feature_order: Literal["paper", "released"] = "paper"
    """Features that the audio scores select from: audio's ("paper") or, as in the released code, visual's ("released")."""
    mask_padding: bool = False
    """Mask padding in the attention. The published network does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("hidden", "heads", "ffn")
        if self.hidden % self.heads:
            raise CounterpointError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        self.need_positive("temperature", "lr", "visual_lr")
        self.need_share("dropout", "base_momentum")
        self.need_weight("cosine_epochs", "contrast_delay", "contrast_step", "contrast_max")


class MacilSD(Learner):
    """The audio-visual network, and the visual network whose weights are blended into it after every epoch."""

    def __init__(self, config: MacilSDConfig, data: BagData, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        shape = {name: getattr(config, name) for name in ("hidden", "heads", "ffn", "dropout", "mask_padding")}
        seed_torch(seed)
        self.av = MacilSDNet(data.visual_dim, data.audio_dim, **shape)
        self.visual: VisualNet | None = None
        if config.distillation:
            self.visual = VisualNet(data.visual_dim, **shape)

    def contrast_weight(self, epoch: int) -> float:
        """Return lambda(e), the weight of all four terms in epoch e (the paper's lambda_a2b and lambda_a2n are equal)."""
        config = self.config
        return min(config.contrast_max, config.contrast_step * max(0, epoch - config.contrast_delay))

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Cut the bags to the longest of the whole batch; add their lengths, and the labels of all processes' bags."""
        seq_len = sequence_lengths(batch["visual"])
        if bool((seq_len == 0).any()):
            names = [name for name, n in zip(batch["name"], seq_len.tolist(), strict=True) if n == 0]
            raise DataError(f"no snippet in {', '.join(names[:5])}: all visual features are zero")
        longest = global_max(int(seq_len.max()) if len(seq_len) else 0, seq_len.device)
        cut = {name: batch[name][:, :longest] for name in ("visual", "audio")}
        return batch | cut | {"seq_len": seq_len, "labels": gather_rows(batch["label"])}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the audio-visual network: MIL plus the weighted contrast of semi-bags (Eq. 9)."""
        config, seq_len = self.config, batch["seq_len"]
        out = self.av(batch["audio"], batch["visual"], seq_len)
        mil = bag_cross_entropy(gather_rows(out.mmil_prob), batch["labels"])
        losses = {"loss": mil, "mil": mil}
        if config.contrast:
            # The contrast is computed even while its weight is 0, so that the curves show its initial value.
            audio_rep, visual_rep = out.audio_out, out.visual_out
            if config.feature_order == "released":
                audio_rep, visual_rep = visual_rep, audio_rep
            mined = (
                semi_bags(out.mmil_prob, out.audio_prob, seq_len, audio_rep),
                semi_bags(out.mmil_prob, out.visual_prob, seq_len, visual_rep),
            )
            of_audio, of_visual = (SemiBags(*(gather_rows(part) for part in side)) for side in mined)
            terms = _four_terms(of_audio, of_visual, config.temperature)
            weight = self.contrast_weight(self.position.epoch)
            losses["loss"] = mil + weight * torch.stack(terms).sum()
            losses |= dict(zip(("a2v_a2b", "a2v_a2n", "v2a_a2b", "v2a_a2n"), terms, strict=True))
        return losses

    def visual_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the visual network: MIL alone."""
        assert self.visual is not None
        prob = gather_rows(self.visual(batch["visual"], batch["seq_len"]).mil_prob)
        return {"visual_loss": bag_cross_entropy(prob, batch["labels"])}

    def predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = {"av": self.av(batch["audio"], batch["visual"]).av_logit}
        if self.visual is not None:
            logits["visual"] = self.visual(batch["visual"]).logit
        return logits

    def timeline(self, audio: Tensor, visual: Tensor) -> dict[str, Tensor]:
        """Return the curves that detection plots: violence probabilities [bags, time], fused and of each stream."""
        out = self.av(audio, visual)
        return {"score": torch.sigmoid(out.av_logit), "audio": out.audio_prob, "visual": out.visual_prob}

    def end_epoch(self, epoch: int) -> None:
        if self.visual is None:
            return
        momentum = distillation_momentum(epoch, self.config.epochs, self.config.base_momentum)
        if momentum < 1:
            source = {_av_name(name): value for name, value in self.visual.named_parameters()}
            blend(dict(self.av.named_parameters()), source, momentum)

    def turns(self) -> list[Turn]:
        turns = [self._turn(self.av, self.config.lr)]
        if self.visual is not None:
            turns.append(self._turn(self.visual, self.config.visual_lr, self.visual_loss, "visual_loss"))
        return turns

    def _turn(self, network: nn.Module, lr: float, *loss: Any) -> Turn:
        config = self.config
        optimizer = light(torch.optim.Adam)(network.parameters(), lr=lr, fused=True)
        epochs = config.cosine_epochs
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)] if epochs else []
        clip([optimizer], config.clip_norm)
        return Turn([optimizer], schedules, *loss)

    def row_wise(self) -> list[tuple[nn.Module, str]]:
        return [(network, "forward") for network in (self.av, self.visual) if network is not None]


# -------------------------------------------------------------------------------------------------------------- settings

_LAPTOP = {
    "epochs": 40,
    "batch_size": 32,
    "max_length": 48,
    "hidden": 32,
    "ffn": 32,
    "lr": 1e-3,
    "visual_lr": 1e-3,
    "cosine_epochs": 0,
    "contrast_delay": 7,
    "contrast_step": 0.02,
    "contrast_max": 0.3,
}

SYSTEM = System(
    slug="macil-sd",
    task="bags",
    config=MacilSDConfig,
    learner=MacilSD,
    data="arcade",
    # A small set has few steps. The paper's ramp (weight 0.1 after one epoch) would dominate MIL before it has learnt.
    recipes={"async-bags": _LAPTOP, "arcade": _LAPTOP, "videos": _LAPTOP | {"max_length": 200}},
)
