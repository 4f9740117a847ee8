r"""MCLRec: recommend the next item, with learned views of histories that are trained in turns with the encoder.

Qin, Yuan, Zhao, Liu, Zhuang, Sheng: "Meta-optimized Contrastive Learning for Sequential Recommendation", SIGIR 2023, arXiv
2304.07763; code QinHsiu/MCLRec (MIT).

    h            [n, dim] states of n histories by the encoder f, here SASRec; E [items, dim] are its embeddings of items
    h1, h2       states of two random views of each history: cropped, masked or reordered
    w1, w2       augmenters, two small networks; z1 = w1(h1) and z2 = w2(h2) are unit rows
    con(a, b)    NT-Xent of 2n rows with the dot product, T = tau for h1 with h2, and 1 elsewhere
    p_i, n_ij    positive and negative products of row i of the 2n, divided by tau; m_i = max_j n_ij

    L_rec = cross-entropy of h E^T over all items with the next item
    L_cl1 = con(h1, h2)                                                                             (random views)
    L_cl2 = con(h1, z2) + con(h2, z1) + con(z1, z2)                                                 (learned views)
    R     = mean_i relu(p_i - min(p_i, m_i)) + mean_ij relu(max(p_i, m_i) - n_ij)                    (regulariser)
    R_tot = 0.1 [R(h1, z2) + R(h2, z1) + R(z1, z2)]

    L0    = L_rec + lambda L_cl1 + beta (L_cl2 + R_tot)          of the encoder
    L1    = L_cl2 + R_tot                                        of the augmenters

A step has three turns, each with new dropout, on the same random views:

1. The augmenters are frozen: minimise L0, and update the encoder.
2. Encode again with the updated encoder: minimise L1, and update the augmenters alone.
3. The augmenters are frozen: minimise L0 again, and update the encoder.

R keeps products from spreading: no positive above the hardest negative, no negative far below the largest product.

Three known methods are settings: `--view-weight 0 --learned-weight 0` is SASRec, `--learned-weight 0` is CL4SRec (arXiv
2010.14395), and `--learned-weight 0 --views same-target` is DuoRec (arXiv 2110.05730). DuoRec's code also leaves out negatives
of the same target, which is not here.

- As in the code, where the paper differs: con is a mean over 2n rows. R has all three pairs, and each row has its own margin. The
  paper's algorithm lacks the third turn (`--update two-turns`).
- Computed otherwise, equal in value: max(p_i, m_i) is at least every n_ij. So R's second term is the mean of max(p_i, m_i)
  minus that of n_ij. The latter is a product of sums. No 2n x 2n matrix is kept for R.
- Mended: the normalisation of an augmenter has a floor of 1e-12; widths follow dim; one history alone has con = R = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.class_logits import next_item_loss
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.nt_xent import nt_xent
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import over_group
from counterpoint.encoders.histories import Augmenter, HistoryEncoder, augmented
from counterpoint.engine.optim import constant_rate
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.histories import Beginnings, SameTarget
from counterpoint.tasks.sequences import SequencesConfig, SequencesLearner
from counterpoint.views.histories import Histories, changed, draws

CHUNK = 2**22  # products of the search for the hardest negatives that are held at a time
Augment = Callable[[Tensor], Tensor]

# --------------------------------------------------------------------------------------------------------------- equations


@over_group
@full_precision
def score_spread_regulariser(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], temperature: float | Tensor = 1.0
) -> Float[Tensor, ""]:
    r"""Compute R of the module: penalise positives above the hardest negative, and negatives below the largest product.

    Args:
        a, b: rows of n pairs, not normalised here. Each of the 2n rows has 1 positive and 2n - 2 negatives.
        temperature: tau > 0, divisor of the products; by default 1.

    Across processes, negatives come from all processes. One pair alone has no negative, and R is 0. Memory is O(n dim) and a block.
    Raises ValueError for different shapes or types, an empty batch and a temperature that is not positive and finite.

    >>> score_spread_regulariser(torch.eye(3), torch.eye(3))
    tensor(2.)
    """
    need_alike("n dim", a=a, b=b)
    need_positive(temperature=temperature)
    rows = wide(torch.cat([a, b]))
    every, at = gather_rows(rows), place(len(rows), rows.device)
    partner = torch.cat([b, a]).to(rows.dtype)
    positive = (rows * partner).sum(1) / temperature
    if len(every) == 2:
        return global_mean(positive * 0)
    hardest = (rows * every[_hardest(rows.detach(), every.detach(), at.offset)]).sum(1) / temperature
    others = rows @ every.sum(0) - (rows * rows).sum(1)  # products with all other rows
    mean = (others / temperature - positive) / (len(every) - 2)
    excess = (positive - hardest).relu()
    return global_mean(hardest + 2 * excess - mean)


def _hardest(rows: Float[Tensor, "n dim"], every: Float[Tensor, "m dim"], offset: int) -> Int[Tensor, " n"]:
    """Return the number in `every` of each row's most similar negative; row i has the number offset + i."""
    half, own = len(rows) // 2, torch.arange(len(rows), device=rows.device)
    found = []
    for some in own.split(max(1, CHUNK // len(every))):
        products, line = rows[some] @ every.T, torch.arange(len(some), device=rows.device)
        products[line, offset + some] = -math.inf
        products[line, offset + (some + half) % len(rows)] = -math.inf
        found.append(products.argmax(1))
    return torch.cat(found)


@over_group
@full_precision
def mclrec_contrast(
    h1: Float[Tensor, "n dim"],
    h2: Float[Tensor, "n dim"],
    augmenter1: Augment | Mapping[str, Tensor],
    augmenter2: Augment | Mapping[str, Tensor],
    temperature: float = 1.0,
    use_regulariser: bool = True,
    *,
    temperature_cl2: float = 1.0,
    reg_weight_inside: float = 0.1,
) -> Float[Tensor, ""]:
    r"""Compute L_cl2 + R_tot of the module.

    Args:
        h1, h2: states of two views of n histories.
        augmenter1, augmenter2: functions from [n, dim] to unit rows [n, dim], or weights by name (see `augmented`).
        temperature: tau > 0 of the regulariser, by default 1.
        use_regulariser: add R_tot; by default yes.
        temperature_cl2: divisor of the contrasts' products, > 0, by default 1.
        reg_weight_inside: weight of R, by default 0.1.

    Raises ValueError as `nt_xent` and `score_spread_regulariser`.

    >>> loss = mclrec_contrast(torch.eye(2), torch.eye(2), lambda h: h, lambda h: h, use_regulariser=False)
    >>> torch.allclose(loss, 3 * (torch.tensor(1.0).exp() + 2).log() - 3)
    True
    """
    need_alike("n dim", h1=h1, h2=h2)
    need_positive(temperature=temperature, temperature_cl2=temperature_cl2)
    z1, z2 = (augmented(h, by) if isinstance(by, Mapping) else by(h) for h, by in ((h1, augmenter1), (h2, augmenter2)))
    pairs = ((h1, z2), (h2, z1), (z1, z2))
    loss = sum((nt_xent(a, b, temperature_cl2, "dot") for a, b in pairs), torch.zeros((), device=h1.device))
    if use_regulariser:
        for a, b in pairs:
            loss = loss + reg_weight_inside * score_spread_regulariser(a, b, temperature)
    return loss


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class MCLRecConfig(SequencesConfig):
    """Settings of MCLRec. Defaults are those of the authors' code for the Sports data."""

    optimizer: str = "adam"
    lr: float = 1e-3
    """Learning rate of the encoder at a batch of 256; it is scaled with batch_size / 256."""
    weight_decay: float = 0.0
    layers: int = 2
    """Number of blocks of the encoder."""
    heads: int = 2
    """Number of attention heads; it divides dim."""
    inner: int = 256
    """Width of the inner layer of a block."""
    dropout: float = 0.5
    """Probability of dropout in the encoder, 0 to 1."""
    objective: Literal["cross-entropy", "bpr"] = "cross-entropy"
    """L_rec: cross-entropy over all items, or BPR, the comparison with one random other item."""
    view_weight: float = 0.04
    """lambda: weight of the contrast of random views, at least 0."""
    learned_weight: float = 0.4
    """beta: weight of the contrast and the regulariser of learned views, at least 0; 0: no augmenters."""
    update: Literal["three-turns", "two-turns", "joint"] = "three-turns"
    """Turns of a step, as the code has them or as the paper has them; joint: one turn for encoder and augmenters together."""
    augmenter_lr: float = 1e-3
    """Learning rate of the augmenters at a batch of 256."""
    temperature: float = 1.0
    """tau: divisor of the products of random views and of the regulariser, > 0."""
    similarity: Literal["dot", "cos"] = "dot"
    """Similarity of random views: the product of states, or their cosine."""
    regulariser: float = 0.1
    """Weight of R beside the contrast of learned views, at least 0."""
    views: Literal["random", "same-target"] = "random"
    """random: two changes of a history. same-target: the history with new dropout, and another history with the same next
    item."""
    crop: float = 0.5
    """Share of a history that a crop keeps, 0 to 1."""
    mask: float = 0.5
    """Share of a history that is masked, 0 to 1."""
    reorder: float = 0.8
    """Share of a history that is shuffled, 0 to 1."""

    counts = (*SequencesConfig.counts, "layers", "heads", "inner")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "augmenter_lr")
        self.need_share("dropout", "crop", "mask", "reorder")
        self.need_weight("view_weight", "learned_weight", "regulariser")
        if self.dim % self.heads or self.dim < 4:
            raise CounterpointError(f"dim must be at least 4 and a multiple of heads, got {self.dim} and {self.heads}")


# ------------------------------------------------------------------------------------------------------------- the learner


def frozen(augmenter: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an augmenter as constants."""
    return {name: weight.detach() for name, weight in augmenter.named_parameters()}


class MCLRec(SequencesLearner):
    """SASRec's encoder, and two augmenters where their weight is above 0."""

    config: MCLRecConfig

    def __init__(self, config: MCLRecConfig, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        seed_torch(seed)
        self.config = config
        if not getattr(data, "ordered", True):
            raise CounterpointError("mclrec learns from histories, and these data are sets; name a source of histories")
        self.encoder = HistoryEncoder(
            data.items, config.length, config.dim, config.layers, config.heads, config.inner, config.dropout
        )
        self.augmenters = nn.ModuleList(Augmenter(config.dim) for _ in range(2 if config.learned_weight else 0))

    # --- turns and losses

    def turns(self) -> list[Turn]:
        encoder = self.turn_of([self.encoder], curve=constant_rate)
        if not self.config.learned_weight:
            return [encoder]
        if self.config.update == "joint":
            return [self.turn_of([self.encoder, self.augmenters], curve=constant_rate)]
        rate = self.config.augmenter_lr / self.config.lr
        augmenters = self.turn_of([self.augmenters], rate=rate, curve=constant_rate)
        augmenters.loss, augmenters.minimise = self.augmenter_loss, "augmenters"
        again = [Turn(encoder.optimizers)] if self.config.update == "three-turns" else []
        return [encoder, augmenters, *again]

    def row_wise(self) -> list[tuple[nn.Module, str]]:
        return [(self.encoder, "forward")]

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return L0. Augmenters are constants, unless all is trained jointly."""
        config = self.config
        recommended = self._recommended(self.encoder(batch["ids"], batch["lengths"]), batch)
        found = {"loss": recommended, "next_item": recommended.detach()}
        if not (config.view_weight or config.learned_weight):
            return found
        h1, h2 = self.states(batch)
        if config.view_weight:
            contrast = nt_xent(h1, h2, config.temperature, config.similarity)
            found["loss"] = found["loss"] + config.view_weight * contrast
            found["random_views"] = contrast.detach()
        if config.learned_weight:
            joint = config.update == "joint"
            contrast = self._contrast(h1, h2, *(a if joint else frozen(a) for a in self.augmenters))
            found["loss"] = found["loss"] + config.learned_weight * contrast
            found["learned_views"] = contrast.detach()
        return found

    def augmenter_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return L1, in which the encoder's states are constants."""
        with torch.no_grad():
            h1, h2 = self.states(batch)
        return {"augmenters": self._contrast(h1, h2, *self.augmenters)}

    def states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return h1 and h2: the states of both views."""
        first, second = (self.encoder(*view) for view in batch["views"])
        return first, second

    def _contrast(self, h1: Tensor, h2: Tensor, first: Any, second: Any) -> Tensor:
        config = self.config
        return mclrec_contrast(
            h1, h2, first, second, config.temperature, config.regulariser > 0, reg_weight_inside=config.regulariser
        )

    def _recommended(self, state: Tensor, batch: dict[str, Any]) -> Tensor:
        items, target = self.encoder.table, batch["target"]
        if self.config.objective == "cross-entropy":
            return next_item_loss(state, items, target)
        better = (state * (items[target] - items[batch["other"]])).sum(1)
        return global_mean(F.softplus(-better))

    # --- views

    def begin(self, survey: Survey) -> None:
        if self.config.views == "same-target":
            self.examples = SameTarget(Beginnings(survey.split()))

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        config, given = self.config, Histories(batch["ids"], batch["lengths"])
        total, mine = self.share(len(given.ids))
        if config.objective == "bpr":  # another item than the target
            other = torch.randint(len(self.encoder.table) - 1, (total,), generator=generator)[mine].to(self.device)
            batch = batch | {"other": other + (other >= batch["target"]).long()}
        if not (config.view_weight or config.learned_weight):
            return batch
        if config.views == "random":
            drawn = draws(total, config.length, generator).part(mine, given.ids.shape[1])
            drawn = type(drawn)(*(x.to(self.device) for x in drawn))
            shares = {"crop_share": config.crop, "mask_share": config.mask, "reorder_share": config.reorder}
            return batch | {"views": changed(given, drawn, **shares)}
        return batch | {"views": (given, self._same_target(batch, torch.rand(total, generator=generator)[mine]))}

    def _same_target(self, batch: dict[str, Any], drawn: Tensor) -> Histories:
        """Return another history with the same next item for each, or the same one where there is no other."""
        target, own = batch["target"].cpu().numpy(), batch["index"].cpu().numpy()
        found = self.examples.other(target, own, drawn.numpy(), self.config.length)
        return Histories(found["ids"].to(self.device), found["lengths"].to(self.device))

    # --- predictions

    def represent(self, ids: Tensor, lengths: Tensor) -> Tensor:
        found: Tensor = self.encoder(ids, lengths)
        return found

    def item_table(self) -> Tensor:
        return self.encoder.table


# Settings for data of a few hundred users, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "epochs": 30, "batch_size": 128, "dim": 32, "length": 20, "dropout": 0.3, "lr": 4e-3, "evaluate_every": 2,
    "view_weight": 0.01, "learned_weight": 0.02,
}  # fmt: skip
RECIPES = {"visits": LAPTOP, "movielens": LAPTOP | {"length": 50}}

SYSTEM = System(slug="mclrec", task="sequences", config=MCLRecConfig, learner=MCLRec, data="visits", recipes=RECIPES)
