"""PixPro: cells of two crops that show the same place agree, after the student's cell is smoothed over its own map.

Xie, Lin, Zhang, Cao, Lin, Hu: "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation
Learning", CVPR 2021, arXiv 2011.10043.

    symbol    here            shape           meaning
    x_i       proj            [n, C, H, W]    the student's projection of cell i, T = H W cells
    g         value_transform                 the transform of the propagated values, by default one 1 x 1 convolution
    s_ij      similarity      [n, T, T]       max(cos(x_i, x_j), c) ^ gamma, within one picture
    y_i       prop            [n, C, H, W]    sum_j s_ij g(x_j) / |g(x_j)|, the propagated cell (Eq. 3)
    x'_j      key             [n, C, H, W]    the moving-average teacher's projection of the other crop
    A         near_cells                      pairs closer than `pos_ratio` cell diagonals in the picture
    L_PixPro  pixpro_loss                     -2 mean cos(y_i, x'_j) over A, in both directions (Eq. 5, twice)
    L_Pix     pix_contrast                    InfoNCE with the cells of A as positives (Eq. 1 and 2)

`core.cells.near_cells` lists the pairs of A; the matrix of all distances is never made. `--instance-weight` adds the instance
branch: alpha times BYOL's loss of the maps' means, with a projector and a predictor of its own.

Differences from the paper are those of the authors' code: the values of Eq. 3 are normalised, and a direction counts twice.
PixContrast is not in their code. It follows the paper; a cell without a near cell has no term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import negative_cosine
from counterpoint.core.cells import CellPairs, cell_rows, near_cells_both_ways, near_contrast, near_sums
from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.world import over_group
from counterpoint.encoders.maps import feature_map, map_shape
from counterpoint.encoders.simple import conv_mlp
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.cells import match_figure
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner

Maps = Float[Tensor, "n channels rows columns"]
Transform = Callable[[Tensor], Tensor] | Mapping[str, Tensor] | None


@full_precision
def pixel_propagation(proj: Maps, value_transform: Transform = None, p: float = 2.0, clamp: float = 0.0) -> Maps:
    """Smooth every cell over its own map: y_i = sum_j max(cos(x_i, x_j), c)^p v_j, v_j = g(x_j) / |g(x_j)| (Eq. 3).

    Args:
        proj: projections x of a map's cells.
        value_transform: g, from maps to maps of the same shape. Also tensors by name, `value_weight` [C, C, 1, 1] and
            `value_bias` [C], of a 1 x 1 convolution. None (default): the identity.
        p: exponent gamma > 0 of the similarity, by default 2. Below 1, 1e-6 is added, so that gradients stay finite.
        clamp: lower bound c of the similarity, at most 1; by default 0. A whole-numbered p alone allows a bound below 0.

    Returns y, not normalised. Memory is n (H W)^2. Raises ValueError for a number out of range.

    >>> pixel_propagation(torch.ones(1, 1, 1, 2))
    tensor([[[[2., 2.]]]])
    """
    need_positive(p=p)
    if clamp > 1 or (clamp < 0 and p != int(p)):
        raise ValueError(
            f"clamp must be at most 1, and at least 0 where p is no whole number; got clamp {clamp} and p {p}"
        )
    if isinstance(value_transform, Mapping):
        value = F.conv2d(proj, wide(value_transform["value_weight"]), wide(value_transform["value_bias"]))
    else:
        value = proj if value_transform is None else wide(value_transform(proj))
    x, v = unit(cell_rows(proj)), unit(cell_rows(value))
    similarity = (x @ x.transpose(1, 2)).clamp(min=clamp)
    if p < 1:
        similarity = similarity + 1e-6
    similarity = similarity if p == 1 else similarity.square() if p == 2 else similarity.pow(p)
    return (similarity @ v).transpose(1, 2).unflatten(2, proj.shape[2:])


def _directions(first: CellPairs, second: CellPairs, one: Tensor, two: Tensor, key_1: Tensor, key_2: Tensor) -> Tensor:
    """Sum the two directions: -2 sum over A of cos(y_i, x'_j), divided by the pairs of each picture; the mean over pictures."""
    total = one.new_zeros(len(one))
    for pairs, rows, keys in ((first, one, key_2), (second, two, key_1)):
        towards = near_sums(pairs, keys.flatten(0, 1)).view_as(rows)
        total = total - 2 * (rows * towards).sum((1, 2)) / (pairs.counts + 1e-6)
    return global_mean(total)


def _check(maps: Mapping[str, Tensor], coord_1: Tensor, coord_2: Tensor, pos_ratio: float) -> None:
    first = next(iter(maps.values()))
    if first.ndim != 4 or any(each.shape != first.shape for each in maps.values()):
        raise ValueError(f"maps must be [n, channels, rows, columns] alike, got {shapes(**maps)}")
    need_rows(**maps)
    if coord_1.shape != (len(first), 4) or coord_2.shape != (len(first), 4):
        raise ValueError(f"coordinates must be [{len(first)}, 4], got {shapes(coord_1=coord_1, coord_2=coord_2)}")
    need_positive(pos_ratio=pos_ratio)


@over_group
@full_precision(keep=("coord_1", "coord_2"))
def pixpro_loss(
    proj_1: Maps,
    proj_2: Maps,
    key_1: Maps,
    key_2: Maps,
    coord_1: Float[Tensor, "n 4"],
    coord_2: Float[Tensor, "n 4"],
    value_transform: Transform = None,
    p: float = 2.0,
    clamp: float = 0.0,
    pos_ratio: float = 0.7,
) -> Float[Tensor, ""]:
    """Compute the consistency of propagated cells with the teacher's near cells of the other crop (Eq. 5).

    Args:
        proj_1, proj_2: the student's projections of the two crops.
        key_1, key_2: the teacher's projections; no gradient.
        coord_1, coord_2: left, top, right, bottom of the crops in the picture; a flip exchanges left and right.
        value_transform, p, clamp: see `pixel_propagation`.
        pos_ratio: largest distance of a pair, in cell diagonals, > 0; by default 0.7.

    A picture whose crops share no place counts as 0. The result lies in -4 to 4. Raises ValueError for shapes that do not fit
    and numbers out of range.

    >>> maps, whole = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> pixpro_loss(maps, maps, maps, maps, whole, whole, pos_ratio=0.2)
    tensor(-4.0000)
    """
    _check({"proj_1": proj_1, "proj_2": proj_2, "key_1": key_1, "key_2": key_2}, coord_1, coord_2, pos_ratio)
    one, two = (unit(cell_rows(pixel_propagation(x, value_transform, p, clamp))) for x in (proj_1, proj_2))
    keys = [unit(cell_rows(key.detach())) for key in (key_1, key_2)]
    return _directions(
        *near_cells_both_ways(coord_1, coord_2, (proj_1.shape[2], proj_1.shape[3]), pos_ratio), one, two, *keys
    )


@over_group
@full_precision(keep=("coord_1", "coord_2"))
def pixel_regression(
    prediction_1: Maps,
    prediction_2: Maps,
    key_1: Maps,
    key_2: Maps,
    coord_1: Float[Tensor, "n 4"],
    coord_2: Float[Tensor, "n 4"],
    pos_ratio: float = 0.7,
) -> Float[Tensor, ""]:
    """Compute `pixpro_loss` of cells that are already predicted, by any predictor in place of the propagation.

    Args:
        prediction_1, prediction_2: the student's predictions for the two crops.
        key_1, key_2, coord_1, coord_2, pos_ratio: as in `pixpro_loss`.

    Raises ValueError for shapes that do not fit and numbers out of range.
    """
    maps = {"prediction_1": prediction_1, "prediction_2": prediction_2, "key_1": key_1, "key_2": key_2}
    _check(maps, coord_1, coord_2, pos_ratio)
    one, two, *keys = (unit(cell_rows(x)) for x in (prediction_1, prediction_2, key_1.detach(), key_2.detach()))
    return _directions(
        *near_cells_both_ways(coord_1, coord_2, (prediction_1.shape[2], prediction_1.shape[3]), pos_ratio),
        one,
        two,
        *keys,
    )


@over_group
@full_precision(keep=("coord_1", "coord_2"))
def pix_contrast(
    proj_1: Maps,
    proj_2: Maps,
    key_1: Maps,
    key_2: Maps,
    coord_1: Float[Tensor, "n 4"],
    coord_2: Float[Tensor, "n 4"],
    temperature: float = 0.3,
    pos_ratio: float = 0.7,
) -> Float[Tensor, ""]:
    """Compute PixContrast: -log(sum over near cells of e^s / sum over all cells of e^s), s = cos / temperature (Eqs. 1, 2).

    Args:
        proj_1, proj_2, key_1, key_2, coord_1, coord_2, pos_ratio: as in `pixpro_loss`.
        temperature: > 0, by default 0.3.

    The mean is over the cells of a picture that have a near cell, then over pictures; both directions are summed and halved.
    A picture without near cells counts as 0. Raises ValueError as `pixpro_loss` does.

    >>> maps, whole = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> pix_contrast(maps, maps, maps, maps, whole, whole, temperature=1.0, pos_ratio=0.2)  # log(1 + 1/e)
    tensor(0.3133)
    """
    _check({"proj_1": proj_1, "proj_2": proj_2, "key_1": key_1, "key_2": key_2}, coord_1, coord_2, pos_ratio)
    need_positive(temperature=temperature)
    total = proj_1.new_zeros(len(proj_1))
    near = near_cells_both_ways(coord_1, coord_2, (proj_1.shape[2], proj_1.shape[3]), pos_ratio)
    for pairs, proj, key in zip(near, (proj_1, proj_2), (key_2, key_1), strict=True):
        cells = proj.shape[2] * proj.shape[3]
        each, has = near_contrast(unit(cell_rows(proj), temperature**-1), unit(cell_rows(key.detach())), pairs)
        number = has.view(-1, cells).sum(1).clamp(min=1)
        total = total + each.view(-1, cells).sum(1) / number / 2
    return global_mean(total)


@dataclass
class PixProConfig(ViewsConfig):
    """Settings of PixPro. Defaults are those of the authors' scripts for ResNet-50 on ImageNet."""

    epochs: int = 100
    batch_size: int = 1024
    recipe: str = "byol"
    optimizer: str = "lars"
    lr: float = 1.0
    weight_decay: float = 1e-5
    warmup_epochs: int = 5
    hidden: int = 4096
    """Width of the hidden layers of projectors and predictors, at least 1."""
    projection: int = 256
    """Channels C of the projected maps, at least 1."""
    loss: Literal["pixpro", "pixcontrast"] = "pixpro"
    """pixpro: consistency of propagated cells. pixcontrast: contrast of cells without propagation."""
    propagation: Literal["attention", "predictor", "none"] = "attention"
    """With the loss pixpro, propagate the student's cells (attention), predict each cell alone (predictor), or neither (none)."""
    gamma: float = 2.0
    """Exponent of the similarity in the propagation, > 0."""
    clamp: float = 0.0
    """Lower bound c of the similarity in the propagation, at most 1; below 0 only for a whole number gamma."""
    value_layers: int = 1
    """Layers of the transform of the propagated values: 0 (none), 1 or 2."""
    pos_ratio: float = 0.7
    """Largest distance of two cells that agree, in cell diagonals, > 0."""
    temperature: float = 0.3
    """Temperature of the loss pixcontrast, > 0."""
    pixel_weight: float = 1.0
    """Weight of the loss of cells, at least 0; 0 leaves the instance branch alone."""
    instance_weight: float = 0.0
    """Weight alpha of the instance branch, at least 0; the paper's combined model has 1."""
    momentum_teacher: float = 0.99
    """Momentum of the teacher at the first step, 0 to 1; it rises to 1 on half a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("gamma", "pos_ratio")
        self.need_share("momentum_teacher")
        if self.value_layers not in (0, 1, 2):
            raise CounterpointError(f"value_layers must be 0, 1 or 2, got {self.value_layers}")
        self.need_weight("pixel_weight", "instance_weight")
        if not self.pixel_weight + self.instance_weight:
            raise CounterpointError("pixel_weight and instance_weight are both 0: nothing trains; set one above 0")
        if self.clamp > 1 or (self.clamp < 0 and self.gamma != int(self.gamma)):
            raise CounterpointError(
                f"clamp must be at most 1, and at least 0 where gamma is no whole number; got {self.clamp} and {self.gamma}"
            )


class PixPro(ViewsLearner):
    """A student with a propagation module, and a teacher that is its moving average without that module."""

    compares = False
    projector: nn.Module

    def __init__(self, config: PixProConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        dim, width, hidden = self.encoder.dim, config.projection, config.hidden
        map_shape(self.encoder, self.size)  # an error if it has no map
        self.value: nn.Module = nn.Identity()
        if config.value_layers == 1:
            self.value = nn.Conv2d(width, width, 1)
        elif config.value_layers == 2:
            self.value = conv_mlp(width, width, width)
        single = config.loss == "pixpro" and config.propagation == "predictor"
        self.predictor = conv_mlp(width, hidden, width) if single else None
        self.instance = nn.ModuleDict()
        if config.instance_weight:
            self.instance["projector"] = conv_mlp(dim, hidden, width)
            self.instance["predictor"] = conv_mlp(width, hidden, width)
        self.teacher = EMATeacher(self.network)

    def build_projector(self, dim: int) -> nn.Module:
        return conv_mlp(dim, self.config.hidden, self.config.projection)

    @property
    def network(self) -> nn.ModuleDict:
        """The networks that the teacher copies."""
        found = {"encoder": self.encoder, "projector": self.projector}
        return nn.ModuleDict(found | ({"instance": self.instance["projector"]} if self.instance else {}))

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the two crops, and their places in the picture."""
        drawn = self.drawn(batch["image"], generator)
        coords = [view.coordinates(*batch["image"].shape[2:]) for view in drawn]
        return batch | {"views": self.views.apply(batch["image"], drawn), "coords": coords}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        student = [feature_map(self.encoder, view) for view in batch["views"]]
        network = self.network
        self.teacher.update(network, cosine_momentum(self.position.step, self.total_steps, config.momentum_teacher))
        copy: Any = self.teacher.module
        with torch.no_grad():
            theirs = [feature_map(copy["encoder"], view) for view in batch["views"]]
            keys = [copy["projector"](x) for x in theirs]
        found: dict[str, Tensor] = {}
        loss = student[0].new_zeros(())
        if config.pixel_weight:
            found["pixel"] = self.of_cells([self.projector(x) for x in student], keys, batch["coords"])
            loss = loss + config.pixel_weight * found["pixel"]
        if config.instance_weight:
            predicted = [self.instance["predictor"](self.instance["projector"](x)).mean((2, 3)) for x in student]
            with torch.no_grad():
                targets = [copy["instance"](x).mean((2, 3)) for x in theirs]
            both = negative_cosine(predicted[0], targets[1]) + negative_cosine(predicted[1], targets[0])
            found["instance"] = 2 * both
            loss = loss + config.instance_weight * found["instance"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}

    def of_cells(self, rows: list[Tensor], keys: list[Tensor], coords: list[Tensor]) -> Tensor:
        """Compute the loss of the student's projections `rows` and the teacher's, `keys`, of both crops."""
        config, ratio = self.config, self.config.pos_ratio
        rows = [self.predictor(x) for x in rows] if self.predictor is not None else rows
        both = rows[0], rows[1], keys[0], keys[1], coords[0], coords[1]
        if config.loss == "pixcontrast":
            return pix_contrast(*both, config.temperature, ratio)
        if config.propagation == "attention":
            return pixpro_loss(*both, self.value, config.gamma, config.clamp, ratio)
        return pixel_regression(*both, ratio)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw for some cells of a crop the cells of the other crop that its features are nearest to."""
        return match_figure(self.encoder, survey, self.views)


SYSTEM = System(
    slug="pixpro",
    task="views",
    config=PixProConfig,
    learner=PixPro,
    data="shapes",
    recipe=LAPTOP | {"epochs": 20, "projection": 64, "hidden": 256, "recipe": "shapes", "momentum_teacher": 0.97},
)
