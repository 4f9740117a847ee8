"""CLIP-rocket, a better recipe for CLIP, and four non-contrastive losses to add to it: BarLIP, SiamLIP, BYOLIP, SwALIP.

Fini, Astolfi, Romero-Soriano, Verbeek, Drozdzal: "Improved baselines for vision-language pre-training", TMLR 2023, arXiv
2305.08675.

The paper adds Barlow Twins, SimSiam, BYOL or SwAV between image and text to CLIP's loss. Each helps a basic CLIP. But a better
recipe for CLIP itself helps more, and with it they add nothing. The recipe has one weak view and A strong views of image
and text. The strong views are compared in a separate space, behind an MLP, with label smoothing. Symbols: z the global
projections of the weak views, h^a the local projections of the strong views, e the smoothing.

This file has all losses, heads and scales. The terms that they average are in core/: `smoothed_cross_entropies`,
`barlow_cross`, `byol_cross`, `assigned_cross_entropy`. The views of a batch are in tasks/aligned/views.py, the changes of
texts in views/text.py. Differences from the released code:
  - Across processes the code's gathered columns carry no gradient. Here they do, unless `local_gradients` is set.
  - The code clamps the local scale after each step even where there is none; here only existing scales are clamped.
  - Synonyms need WordNet. `augment_text` takes a dictionary of them; without one the other two changes share their weight.
  - SwALIP with prototypes, which the code also has, is not supported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import barlow_cross, byol_cross
from counterpoint.core.assignment import assigned_cross_entropy
from counterpoint.core.checks import need_alike, need_positive, need_within, need_word
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.smoothing import smoothed_cross_entropies
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group
from counterpoint.encoders.simple import Tower, mlp, twin_projector, with_predictor
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.systems.settings import claim_settings
from counterpoint.tasks.aligned import LAPTOP, first_two
from counterpoint.tasks.aligned.views import IMAGE_VIEWS, MultiViewConfig, MultiViewLearner

Views = Sequence[Float[Tensor, "n dim"]]

# ---------------------------------------------------------------------------------------------------- the contrastive loss


class CL2LTerms(NamedTuple):
    """The four means of CLIP-rocket's loss; the local ones are 0 without strong views."""

    image_global: Float[Tensor, ""]
    text_global: Float[Tensor, ""]
    image_local: Float[Tensor, ""]
    text_local: Float[Tensor, ""]


@over_group
@full_precision
def cl2l_terms(
    z_img: Float[Tensor, "n dim"],
    z_txt: Float[Tensor, "n dim"],
    h_imgs: Views = (),
    h_txts: Views = (),
    logit_scale: float | Float[Tensor, ""] = 1 / 0.07,
    local_logit_scale: float | Float[Tensor, ""] = 10.0,
    label_smoothing: float = 0.1,
    *,
    local_gradients: bool = False,
) -> CL2LTerms:
    """Compute the terms of `cl2l_loss`: global ones without smoothing, local ones as means over the A^2 pairs of views."""
    need_alike("n dim", z_img=z_img, z_txt=z_txt)
    need_within(0, 1, label_smoothing=label_smoothing)
    need_positive(logit_scale=logit_scale, local_logit_scale=local_logit_scale)
    if len(h_imgs) != len(h_txts):
        raise ValueError(f"h_imgs and h_txts must have equal numbers of views, got {len(h_imgs)} and {len(h_txts)}")
    pairs = [(h_img, h_txt) for h_img in h_imgs for h_txt in h_txts]
    for h_img, h_txt in pairs:
        need_alike("n dim", h_imgs=h_img, h_txts=h_txt)
    contrast = partial(smoothed_cross_entropies, local_gradients=local_gradients)
    glob = contrast(z_img, z_txt, logit_scale)
    local = [contrast(h_img, h_txt, local_logit_scale, label_smoothing) for h_img, h_txt in pairs]
    zero = glob[0].new_zeros(())
    image, text = (torch.stack(side).mean() for side in zip(*local, strict=True)) if local else (zero, zero)
    return CL2LTerms(*glob, image, text)


@over_group
@full_precision
def cl2l_loss(
    z_img: Float[Tensor, "n dim"],
    z_txt: Float[Tensor, "n dim"],
    h_imgs: Views = (),
    h_txts: Views = (),
    logit_scale: float | Float[Tensor, ""] = 1 / 0.07,
    local_logit_scale: float | Float[Tensor, ""] = 10.0,
    label_smoothing: float = 0.1,
    reduction: Literal["mean", "sum"] = "mean",
    *,
    local_gradients: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute CLIP-rocket's loss (CL2L): global to global and local to local contrast.

        L_img = (L_img^glob + A L_img^loc) / (1 + A), the same for text;  L = (L_img + L_txt) / 2, or their sum.

    Args:
        z_img, z_txt: global projections of the weak views; all projections are normalised here.
        h_imgs, h_txts: local projections of the A strong views of each. Empty: plain CLIP.
        logit_scale, local_logit_scale: 1 / temperature of global and local terms, > 0, not its logarithm.
        label_smoothing: e of the local terms, 0..1: targets are 1 - e on the match plus e / n everywhere.
        reduction: "sum" doubles the loss, as the recipe does.
        local_gradients: across processes, only a process's own rows carry gradient, as in the released code.

    Every pair of views is one pass of the kernel for both directions. For a batch of one the loss is 0. Raises ValueError for
    shapes and numbers that do not fit.

    >>> cl2l_loss(torch.eye(2), torch.eye(2), logit_scale=1.0)
    tensor(0.3133)
    """
    need_word(("mean", "sum"), reduction=reduction)
    terms = cl2l_terms(
        z_img, z_txt, h_imgs, h_txts, logit_scale, local_logit_scale, label_smoothing, local_gradients=local_gradients
    )
    views = len(h_imgs)
    loss = (terms.image_global + terms.text_global + views * (terms.image_local + terms.text_local)) / (1 + views)
    return loss if reduction == "sum" else loss / 2


# ----------------------------------------------------------------------------------------------- the non-contrastive terms


@over_group
@full_precision
def barlip_loss(
    v_img: Float[Tensor, "n dim"], v_txt: Float[Tensor, "n dim"], v_imgs: Views = (), v_txts: Views = ()
) -> Float[Tensor, ""]:
    """Compute BarLIP: `barlow_cross` averaged over the global pair and the A^2 local pairs of projections."""
    pairs = [(v_img, v_txt), *((a, b) for a in v_imgs for b in v_txts)]
    return torch.stack([barlow_cross(a, b) for a, b in pairs]).mean()


@over_group
@full_precision
def siamlip_loss(
    p_img: Float[Tensor, "n dim"],
    p_txt: Float[Tensor, "n dim"],
    v_img: Float[Tensor, "n dim"],
    v_txt: Float[Tensor, "n dim"],
    p_imgs: Views = (),
    p_txts: Views = (),
    v_imgs: Views = (),
    v_txts: Views = (),
) -> Float[Tensor, ""]:
    """Compute SiamLIP: `byol_cross` averaged over 2 + 2 A^2 terms of global and local views.

    Image predicts text, and text predicts image. BYOLIP is the same with v from a momentum copy of the model.
    """
    pairs = [(p_img, v_txt), (p_txt, v_img)]
    pairs += [(p, v) for p in p_imgs for v in v_txts] + [(p, v) for p in p_txts for v in v_imgs]
    return torch.stack([byol_cross(p, v) for p, v in pairs]).mean()


@over_group
@full_precision
def swalip_loss(
    h_imgs: Views,
    h_txts: Views,
    local_logit_scale: float | Float[Tensor, ""],
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Tensor, ""]:
    r"""Compute SwALIP without prototypes: the rows of one modality are assigned to the batch of the other.

        L = 1/4 sum_{a,b} 1/2 [ H(K(M_x^{1-a,1-b}), softmax(s M_x^{ab})) + H(K(M_t^{1-a,1-b}), softmax(s M_t^{ab})) ]

    M_x^{ab} are the cosines of image view a with text view b, M_t those of text with image. K is `sinkhorn` (no gradient). H is
    the mean cross-entropy of rows. So a pair of views predicts the assignment of the pair of the other views.

    Args:
        h_imgs, h_txts: local projections of exactly two views each; normalised here.
        local_logit_scale: s = 1 / temperature of the local views, > 0, not its logarithm.
        epsilon, iterations: arguments of `sinkhorn`.

    `assigned_cross_entropy` is the term of a pair (a, b). Raises ValueError for another number of views than two.
    """
    if len(h_imgs) != 2 or len(h_txts) != 2:
        raise ValueError(f"h_imgs and h_txts must hold two views each, got {len(h_imgs)} and {len(h_txts)}")
    need_alike(
        "n dim",
        **{f"h_imgs[{n}]": h for n, h in enumerate(h_imgs)},
        **{f"h_txts[{n}]": h for n, h in enumerate(h_txts)},
    )
    need_positive(local_logit_scale=local_logit_scale)
    image, text = ([unit(gather_rows(once(h, "swalip_loss"))) for h in views] for views in (h_imgs, h_txts))
    total = [
        assigned_cross_entropy(image[a] * local_logit_scale, text[b], image[1 - a], text[1 - b], epsilon, iterations)
        for a in (0, 1)
        for b in (0, 1)
    ]
    return torch.stack(total).mean()


# --------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class RocketConfig(MultiViewConfig):
    """Settings of CLIP-rocket. Defaults are the paper's for YFCC15M.

    A is `augmentations`: 0 is the basic recipe, CLIP on weak views. The paper's `text_dropout` is 0 to 0.2.
    """

    epochs: int = 32
    batch_size: int = 4096
    optimizer: str = "adamw"
    beta2: float | None = 0.98
    lr: float = 3e-3 * 256 / 4096
    weight_decay: float = 0.1
    warmup_epochs: int = 1
    image_encoder: str = "timm:vit_base_patch16_224"
    embedding: int = 256
    image_views: Literal["paper", "small", "handled"] = "paper"
    """Augmentation of images: the paper's, one for small pictures (small), or the claim's for tiny ones (handled)."""
    separate_projector: bool = True
    """Compare strong views behind a separate MLP, with a separate scale."""
    local_hidden: int = 4096
    """Width of that MLP's two hidden layers."""
    label_smoothing: float = 0.1
    """Label smoothing of the local loss, 0 to 1."""
    reduction: Literal["mean", "sum"] = "sum"
    """"sum" doubles the contrastive loss."""
    extra: Literal["none", "barlip", "siamlip", "byolip", "swalip"] = "none"
    """A non-contrastive loss to add."""
    swalip_weight: float = 0.2
    """Weight of SwALIP, at least 0; the other losses have weight 1."""
    extra_hidden: int = 0
    """Width of the extra projectors' hidden layers; 0: the paper's, 3000 for BarLIP and 2048 for SiamLIP and BYOLIP."""
    extra_dim: int = 0
    """Width of the extra projectors' output; 0: the paper's, 8192 for BarLIP and 128 for SiamLIP and BYOLIP."""
    momentum_teacher: float = 0.99
    """Share of the momentum copy that stays at each step (BYOLIP)."""
    local_gradients: bool = False
    """Across processes, only a process's own rows carry gradient, as in the released code."""
    mixture: float = 0.5
    """Share of the global similarity, 0 to 1, in a mixture of global and local similarity, which is also measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("local_hidden")
        self.need_share("label_smoothing", "momentum_teacher", "mixture")
        self.need_weight("augmentations", "extra_hidden", "extra_dim", "swalip_weight")
        if self.extra == "swalip" and (self.augmentations != 2 or self.label_smoothing):
            raise CounterpointError(
                "swalip needs two strong views and no label smoothing: --augmentations 2 --label-smoothing 0, got "
                f"{self.augmentations} and {self.label_smoothing}"
            )


class Rocket(MultiViewLearner):
    """CLIP on a weak view and strong views of image and text."""

    config: RocketConfig

    def __init__(self, config: RocketConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed, images=IMAGE_VIEWS[config.image_views])
        self.pair = first_two(data.modalities)
        separate = config.separate_projector and config.augmentations > 0
        dims = {name: int(cast(Any, self.encoders[name]).dim) for name in self.pair}
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.local_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.1))) if separate else None
        self.local_heads = nn.ModuleDict(
            {n: mlp(dims[n], *[config.local_hidden] * 2, config.embedding) for n in self.pair if separate}
        )
        self.extra_heads, self.predictors, self.teachers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        hidden, width = config.extra_hidden, config.extra_dim
        for name in self.pair:
            if config.extra == "barlip":
                self.extra_heads[name] = twin_projector(dims[name], hidden or 3000, width or 8192)
            elif config.extra in ("siamlip", "byolip"):
                self.extra_heads[name], self.predictors[name] = with_predictor(dims[name], hidden or 2048, width or 128)
            if config.extra == "byolip":
                self.teachers[name] = EMATeacher(Tower(self.encoders[name], self.extra_heads[name]))

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Inverse temperatures, global and local."""
        local = self.log_scale if self.local_log_scale is None else self.local_log_scale
        return self.log_scale.exp(), local.exp()

    def local_project(self, name: str, features: Tensor) -> Tensor:
        """Project strong views with their own MLP, or else with the global one."""
        return (self.local_heads if self.local_heads else self.heads)[name](features)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        features = {name: self.view_features(name, batch["views"][name]) for name in self.pair}
        z_img, z_txt = (self.heads[name](features[name][0]) for name in self.pair)
        h_imgs, h_txts = ([self.local_project(name, part) for part in features[name][1:]] for name in self.pair)
        scale, local_scale = self.scales
        rows, own = (z_img, z_txt, h_imgs, h_txts), config.local_gradients
        contrast = cl2l_loss(*rows, scale, local_scale, config.label_smoothing, config.reduction, local_gradients=own)
        losses = {"loss": contrast, "contrast": contrast, "scale": scale.detach(), "local_scale": local_scale.detach()}
        if config.extra != "none":
            swalip = config.extra == "swalip"
            added = swalip_loss(h_imgs, h_txts, local_scale) if swalip else self.added(batch["views"], features)
            losses |= {config.extra: added, "loss": contrast + (config.swalip_weight if swalip else 1.0) * added}
        return losses

    def added(self, views: dict[str, list[Any]], features: dict[str, list[Tensor]]) -> Tensor:
        """Compute BarLIP, SiamLIP or BYOLIP of the features of all views."""
        v = [[self.extra_heads[name](part) for part in features[name]] for name in self.pair]
        if self.config.extra == "barlip":
            return barlip_loss(v[0][0], v[1][0], v[0][1:], v[1][1:])
        p = [[self.predictors[name](part) for part in side] for name, side in zip(self.pair, v, strict=True)]
        if self.config.extra == "byolip":
            v = [[self.teachers[name](view) for view in views[name]] for name in self.pair]
        return siamlip_loss(p[0][0], p[1][0], v[0][0], v[1][0], p[0][1:], p[1][1:], v[0][1:], v[1][1:])

    def end_step(self) -> None:
        with torch.no_grad():
            for scale in (self.log_scale, self.local_log_scale):
                if scale is not None:
                    scale.clamp_(0, math.log(100))
        for name, teacher in self.teachers.items():
            assert isinstance(teacher, EMATeacher)
            teacher.update(Tower(self.encoders[name], self.extra_heads[name]), self.config.momentum_teacher)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = {name: self.features(name, values) for name, values in batch["inputs"].items()}
        z = {name: unit(self.heads[name](x)) for name, x in features.items()}
        if not self.local_heads:
            return {"embedding": z}
        h = {name: unit(self.local_project(name, x)) for name, x in features.items()}
        # Rows whose dot products are the mixture of both similarities.
        share = self.config.mixture
        mixed = {name: torch.cat([share**0.5 * z[name], (1 - share) ** 0.5 * h[name]], 1) for name in z}
        return {"embedding": z, "local_embedding": h, "mixed_embedding": mixed}


# ----------------------------------------------------------------------------------------------------------------- settings

SYSTEM = System(
    slug="improved-vlp-baselines",
    task="aligned",
    config=RocketConfig,
    learner=Rocket,
    data="glyphs",
    recipes={"digit-captions": claim_settings("improved-vlp-baselines")},
    recipe=LAPTOP | {"image_views": "small", "local_hidden": 256, "extra_hidden": 256, "extra_dim": 256},
)
