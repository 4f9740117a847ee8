r"""SepCLR: learn what two sets share in one space, and what only the second set has in another.

Louiset, Duchesnay, Grigis, Gori: "Separating common from salient patterns with Contrastive Representation Learning", ICLR 2024,
arXiv 2402.11928. Code: github.com/neurospin-projects/2024_rlouiset_sep_clr, without a licence; the variant is k-JEM.

    X, Y        background and target pictures, known by their domain alone; t_i = 1 for a target, 0 for a background
    v           view, 1 or 2; B pictures in a batch
    c, s        heads of the common and of the salient encoder, each behind its own projector
    n           c / |c|; heads of the salient space are not normalised
    k_i         s_i of a target, the zero vector of a background: zero is s', the information-less vector
    b           bandwidth, a variance: K(x, y) = exp(-|x - y|^2 / (2 b))

    align(x, y)     mean_i |x_i - y_i|^2 / (2 b)
    unif(x)         log mean_{i<j} K(x_i, x_j)
    jem(n, k)       mean_i log mean_j K(n_i, n_j) K(k_i, k_j), j = i included: minus the joint entropy H(c, s)

    L_C = align(n1, n2) + u mean_v unif(n_v)                    all pictures
    L_S = align(s1, s2 of targets) + u mean_v unif(k_v)         targets repel each other and s'
    L_0 = mean_v align(0, s_v of backgrounds)                   backgrounds are pinned to s'
    L_J = mean_v jem(n_v, k_v)                                  no information common to both spaces
    loss = L_C + w_S L_S + w_0 L_0 + w_J L_J,                   u = 2

I(c; s) = H(c) + H(s) - H(c, s). Uniformity raises H(c) and H(s), so a larger H(c, s) lowers the mutual information. Both
`unif` and `jem` are at most 0; lower is more spread.

Memory is linear in batches of more than 256 rows: |x - y|^2 is expanded, and the kernels are summed in tiles
(`core.gaussian`). The product of two Gaussian kernels is the kernel of the concatenated rows. Equal rows have
gradient 0.

Edges, where the released code gives NaN: a batch without targets has no salient alignment (0), one without backgrounds no L_0
(0). One row has no pair: unif and jem are 0.

Left out: the other estimators of mutual information that the paper compares (vCLUB, vL1Out, vUB, TC, MMD). Set jem_weight 0 for
the ablation without the term. `sup_align` and `discrete_sup_align` of `core.gaussian`, the terms of the supervised extension,
are trained by no setting.

Differences from the authors' code: both views pass through a network together, so batch normalisation sees both. Probes run in
evaluation mode.

In the claim the R2 of salient causes in the common space falls from 0.93 to 0.40. That of common causes in the salient space
falls from 0.93 to 0.65. Neither falls to 0. Without the joint entropy, that of common causes in the salient space falls
further, to 0.57. The common space then stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import mean_where
from counterpoint.core.gap import unit_uniformity
from counterpoint.core.gaussian import align, joint_entropy, uniform
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.engine.optim import constant_rate
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.adapted import adapt
from counterpoint.tasks.images import chosen_bank
from counterpoint.tasks.measures import axes_figure
from counterpoint.tasks.spaces import Cause, known_causes, matrix_figure, probe_matrix
from counterpoint.tasks.views import ViewsConfig, ViewsLearner, mlp
from counterpoint.words import counted

# ----------------------------------------------------------------------------------------------------------- the equations


@over_group
@full_precision
def sepclr_loss(
    common1: Float[Tensor, "n dim"],
    common2: Float[Tensor, "n dim"],
    salient1: Float[Tensor, "n width"],
    salient2: Float[Tensor, "n width"],
    is_target: Bool[Tensor, " n"] | Int[Tensor, " n"],
    salient_weight: float = 1.0,
    background_weight: float = 100.0,
    jem_weight: float = 10.0,
    bandwidth: float = 0.5,
    *,
    uniform_weight: float = 2.0,
) -> dict[str, Tensor]:
    r"""Compute L_C + w_S L_S + w_0 L_0 + w_J L_J of two views of a batch of backgrounds and targets.

    Args:
        common1, common2: heads of the common encoder for both views; normalised here.
        salient1, salient2: heads of the salient encoder for both views; used as given.
        is_target: 1 or True for a target picture, 0 or False for a background.
        salient_weight: w_S, at least 0, by default 1.
        background_weight: w_0, at least 0, by default 100.
        jem_weight: w_J, at least 0, by default 10; 0: without the joint entropy.
        bandwidth: b of all terms, > 0, by default 0.5.
        uniform_weight: u, at least 0, by default 2.

    Returns "loss", and its terms without their weights: common_align, common_uniform, salient_align, salient_uniform,
    background, jem. A batch without targets has salient_align 0, one without backgrounds has background 0. NaN in a head gives
    NaN. Raises ValueError for shapes that do not fit, an empty batch, another membership and numbers out of range.

    >>> rows = torch.eye(2)
    >>> {name: float(x) for name, x in sepclr_loss(rows, rows, rows, rows, torch.tensor([0, 1])).items()}["background"]
    1.0
    """
    need_alike("n dim", common1=common1, common2=common2)
    need_alike("n width", salient1=salient1, salient2=salient2)
    if len(salient1) != len(common1) or is_target.shape != (len(common1),):
        raise ValueError(
            "common, salient and is_target must have one row for each picture, got "
            + shapes(common1=common1, salient1=salient1, is_target=is_target)
        )
    if holds(((is_target != 0) & (is_target != 1)).any()):
        raise ValueError("is_target must hold 0 (background) or 1 (target), and holds other values")
    need_positive(bandwidth=bandwidth)
    weights = {"salient_weight": salient_weight, "background_weight": background_weight, "jem_weight": jem_weight}
    need_within(0, float("inf"), **weights, uniform_weight=uniform_weight)
    target = is_target.bool()
    n = unit(common1), unit(common2)
    s = salient1, salient2
    k = [torch.where(target[:, None], x, 0) for x in s]

    common_align = align(*n, bandwidth)
    common_uniform = (unit_uniformity(n[0], 1 / (2 * bandwidth)) + unit_uniformity(n[1], 1 / (2 * bandwidth))) / 2
    salient_align = mean_where((s[0] - s[1]).square().sum(1), target) / (2 * bandwidth)
    salient_uniform = (uniform(k[0], bandwidth) + uniform(k[1], bandwidth)) / 2
    lengths = (s[0].square().sum(1) + s[1].square().sum(1)) / 2
    background = mean_where(lengths, ~target) / (2 * bandwidth)
    jem = common_align * 0
    if jem_weight:
        jem = (joint_entropy(n[0], k[0], bandwidth) + joint_entropy(n[1], k[1], bandwidth)) / 2
    loss = (
        common_align
        + uniform_weight * common_uniform
        + salient_weight * (salient_align + uniform_weight * salient_uniform)
        + background_weight * background
        + jem_weight * jem
    )
    return {
        "loss": loss,
        "common_align": common_align,
        "common_uniform": common_uniform,
        "salient_align": salient_align,
        "salient_uniform": salient_uniform,
        "background": background,
        "jem": jem,
    }


# ----------------------------------------------------------------------------------------------------------- the learner


@dataclass
class SepCLRConfig(ViewsConfig):
    """Settings of SepCLR. Defaults are the released code's for the eye data set ODIR, with its smaller weights."""

    encoder: str = "torchvision:resnet18"
    optimizer: str = "adam"
    lr: float = 3e-4
    weight_decay: float = 0.0
    epochs: int = 200
    recipe: str = "moco-v1"
    hidden: int = 128
    """Width of the hidden layer of both projectors."""
    projection: int = 32
    """Width of each space, common and salient, and of its projector's output."""
    target: str = ""
    """Name of the domain that has salient patterns; all other domains are background. Empty: the second of two domains."""
    salient_weight: float = 1.0
    """Weight of the salient term, at least 0; 1000 for overlaid digits and accessories of faces in the paper."""
    background_weight: float = 100.0
    """Weight that pins backgrounds to the information-less vector 0, at least 0; 10 to 1000 in the paper."""
    jem_weight: float = 10.0
    """Weight of the joint entropy, which keeps the spaces independent, at least 0; 0: the ablation without it."""
    uniform_weight: float = 2.0
    """Weight of uniformity against alignment in both spaces, at least 0."""
    bandwidth: float = 0.5
    """Bandwidth of all Gaussian kernels, a variance, > 0."""
    space: Literal["both", "common", "salient"] = "both"
    """Features to evaluate and to export: common, salient, or both side by side, the common ones first."""
    membership: bool = True
    """Use the sets. False: every picture is a target, and both spaces are normalised; with jem_weight 0 these are two
    ordinary contrastive encoders, the control of the claim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("bandwidth")
        self.need_weight("salient_weight", "background_weight", "jem_weight", "uniform_weight")


SPACES = ("common", "salient")
SHOWN = 500  # pictures of each set on the map


class SepCLR(ViewsLearner):
    """Two encoders with their projectors, trained together on backgrounds and targets."""

    config: SepCLRConfig
    compares = False

    def __init__(self, config: SepCLRConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        width = config.projection
        self.salient_encoder = self.build_encoder(data)
        if config.lora:
            adapt(self.salient_encoder, self.config, data.size, data.channels)
        self.common, self.salient = (nn.Linear(self.encoder.dim, width) for _ in range(2))
        self.salient_projector = self.build_projector(width)
        self.is_target: Tensor | None = None  # [examples]

    def build_projector(self, dim: int) -> nn.Module:
        width = self.config.projection
        return mlp(width, self.config.hidden, width)

    def take_start(self) -> None:
        """Give both encoders the weights of the run that the settings start from."""
        super().take_start()
        if self.config.start:
            self.salient_encoder.load_state_dict(self.encoder.state_dict())

    # --- the sets

    def target_number(self, survey: Survey) -> int:
        """Return the number of the target domain. Raises CounterpointError where the data or the settings name none."""
        names = survey.domain_names
        if len(names) < 2:
            raise DataError(
                "sepclr learns from two sets of pictures, background and target, but these data have "
                f"{counted(len(names), 'domain')}; name the column that tells the sets with ?domain=COLUMN"
            )
        if self.config.target:
            if self.config.target not in names:
                raise unknown("target", self.config.target, list(names))
            return names.index(self.config.target)
        if len(names) > 2:
            raise CounterpointError(
                f"target: the data have {counted(len(names), 'domain')}, {', '.join(names)}; name the target with --target"
            )
        return 1

    def members(self, survey: Survey, split: str) -> Bool[Tensor, " n"]:
        """Mark the target pictures of a split. Raises DataError for pictures without a domain."""
        number = self.target_number(survey)
        domains = torch.from_numpy(survey.split(split).domains)
        if bool((domains < 0).any()):
            raise DataError(
                f"{split} has {counted(int((domains < 0).sum()), 'picture')} without a domain; give each one, or leave them out"
            )
        return domains == number

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        target = self.members(survey, "train")[torch.from_numpy(survey.rows)]
        for what, there in (("target", target), ("background", ~target)):
            if not bool(there.any()):
                raise DataError(f"the training split has no {what} pictures; sepclr contrasts background with target")
        self.is_target = self.members(survey, "train") | (not self.config.membership)

    # --- the step

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        target = batch.get("is_target")
        if target is None:
            if self.is_target is None:
                raise CounterpointError(
                    'sepclr needs batch["is_target"], 1 for a target and 0 for a background, outside a fit'
                )
            target = self.is_target[batch["index"].cpu()]
        config, images = self.config, torch.cat(batch["views"])
        c1, c2 = self.projector(self.common(self.encoder(images))).chunk(2)
        s1, s2 = self.salient_projector(self.salient(self.salient_encoder(images))).chunk(2)
        if not config.membership:
            s1, s2 = unit(s1), unit(s2)
        weights = config.salient_weight, config.background_weight, config.jem_weight, config.bandwidth
        target = target.to(images.device)
        return sepclr_loss(c1, c2, s1, s2, target, *weights, uniform_weight=config.uniform_weight)

    def turns(self) -> list[Turn]:
        return [self.turn_of([self], curve=constant_rate)]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.encoder, "forward"), (self.salient_encoder, "forward")]

    # --- what each space knows

    def spaces(self, images: Float[Tensor, "n 3 size size"]) -> tuple[Tensor, Tensor]:
        """Compute the common and the salient features [n, projection], before the projectors."""
        return self.common(self.encoder(images)), self.salient(self.salient_encoder(images))

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        common, salient = self.spaces(images)
        return {"both": torch.cat([common, salient], 1), "common": common, "salient": salient}[self.config.space]

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure what both spaces know: each cause of target pictures, and the set of all pictures."""
        found = self.probes(survey, split)[0]
        return {f"{space}_to_{cause}": value for (space, cause), value in found.items()}

    def probes(self, survey: Survey, split: str) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
        """Return the matrix of probes, and the shares of the most frequent class, by cause."""
        at = {"train": chosen_bank(survey.rows, self.config.bank), split: np.arange(len(survey.split(split)))}
        rows = {part: survey.over(part, lambda b: torch.cat(self.spaces(b["image"]), 1), at[part]) for part in at}
        member = {part: self.members(survey, part)[torch.from_numpy(at[part])] for part in at}
        causes = {"set": Cause(*(member[part].long() for part in at))} | known_causes(survey, at, member)
        width = self.config.projection
        spaces = {name: tuple(rows[part].split(width, 1)[n] for part in at) for n, name in enumerate(SPACES)}
        chance = {name: cause.chance for name, cause in causes.items() if cause.chance is not None}
        return probe_matrix(spaces, causes), chance

    def figures(self, survey: Survey) -> dict[str, Any]:
        found, chance = self.probes(survey, "test")
        rows = survey.over("test", lambda b: torch.cat(self.spaces(b["image"]), 1))
        member = self.members(survey, "test")
        shown = {
            "What each space knows": matrix_figure(
                found,
                chance,
                "Probes on held-out target pictures: accuracy by logistic regression, or R2 of numbers by kernel ridge "
                "regression. The column set tells targets from backgrounds. The last row always guesses the most frequent class.",
            )
        }
        sets = {"background": ~member, "target": member}
        for name, part in zip(SPACES, rows.split(self.config.projection, 1), strict=True):
            caption = f"{name.capitalize()} features of test pictures on their first two principal axes."
            groups = {what: part[there] for what, there in sets.items()}
            shown[f"The {name} space"] = axes_figure(groups, caption, SHOWN)
        return shown | super().figures(survey)


SYSTEM = System(
    slug="sepclr",
    task="views",
    config=SepCLRConfig,
    learner=SepCLR,
    data="digit-overlays",
    recipe={"encoder": "conv-s", "recipe": "digits-moved", "epochs": 40, "batch_size": 256, "lr": 1e-3, "evaluate_every": 20},
    recipes={
        "latent-factors": {
            "encoder": "mlp-s", "recipe": "latent-factors", "hidden": 64, "projection": 6, "epochs": 39, "lr": 1e-3,
            "evaluate_every": 39,
        },
    },
)  # fmt: skip
