"""CTVIS: train embeddings of instances against the memories that the tracker will compare them with.

Ying, Zhong, Mao, Wang, Chen, Wu, Liu, Liu, Shen, Zhu, Lin: "CTVIS: Consistent Training for Online Video Instance
Segmentation", ICCV 2023, arXiv 2307.12616.

    symbol    here          shape            meaning
    e_t       embeddings    [B, T, I, D]     embedding of the query matched to an instance in frame t
    M[t]      memory        [B, T, I, D]     the instance's memory after frame t (`core.tracks`)
    a, p, n                                  anchor e_t; positive from the memory; negatives, the queries of frame t - 1
    l_con     contrastive                    log(1 + sum_p sum_n exp(a.n - a.p)), products not normalised, no temperature
    l_aux     auxiliary                      mean of (cos(a, x) - y)^2 over positives (y = 1) and negatives (y = 0)

An item is an instance in a frame t >= 1 with its positive and its negatives. The positive is the memory M[t - 1] or, by the toss
of a coin, the last embedding; without an earlier one, the first later one. The tracker of the test uses the same memory.

In the claim, memories hold identities better than many references (+8.6 points of detections). Single references over four times
as many clips are better still at equal crops (by 6.4 points). All arms chose the grid's largest rate.

Differences from the authors' code: an instance that appears later is always found (their test compares two counts). Losses are
means over the items of all processes, theirs are means of each process. Not built: the segmenter, Mask2Former. Detections come
from the data, and an encoder of their crops takes the place of its queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.tracks import Memory, memory_positives, similarity_guided_memory
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.frames import FramesConfig, FramesLearner

POSITIVE, NEGATIVE, NONE = 1, 0, -1  # roles of candidates
DRAWN = 128  # instances of a clip with random numbers of their own


class ReidLosses(NamedTuple):
    contrastive: Float[Tensor, ""]
    aux: Float[Tensor, ""]


@over_group
@full_precision
def item_losses(
    products: Float[Tensor, "items candidates"],
    cosines: Float[Tensor, "items candidates"],
    roles: Int[Tensor, "items candidates"],
) -> ReidLosses:
    """Compute the means over items of log(1 + sum_p sum_n exp(a.n - a.p)) and of the mean of (cos - y)^2.

    Args:
        products: dot products a.x of each item's anchor with its candidates.
        cosines: their cosines.
        roles: 1 for a positive, 0 for a negative, -1 for a place without a candidate.

    An item without negatives has the contrastive loss 0. Without items both are 0. Raises ValueError for shapes that differ.

    >>> item_losses(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[1, 0, 0]])).contrastive  # log(1 + 2)
    tensor(1.0986)
    """
    if products.ndim != 2 or products.shape != cosines.shape or products.shape != roles.shape:
        raise ValueError(
            f"products, cosines and roles must be [items, candidates] alike, got "
            f"{shapes(products=products, cosines=cosines, roles=roles)}"
        )
    positive, negative = roles == POSITIVE, roles == NEGATIVE
    both = positive.any(1) & negative.any(1)
    # The sum over pairs is a product of two sums. Items that lack one of them take finite numbers, and count 0.
    lowest = torch.finfo(products.dtype).min / 4
    pushed = products.masked_fill(~negative, lowest).logsumexp(1)
    over = pushed + (-products).masked_fill(~positive, lowest).logsumexp(1)
    contrastive = torch.where(both, F.softplus(torch.where(both, over, 0.0)), 0.0)
    known = positive | negative
    error = (cosines - positive.to(cosines.dtype)).square() * known
    return ReidLosses(global_mean(contrastive), global_mean(error.sum(1) / known.sum(1).clamp(min=1)))


def reid_loss(
    items: Sequence[tuple[Float[Tensor, "_ dim"], Float[Tensor, "_ dim"], Float[Tensor, "_ dim"]]],
) -> ReidLosses:
    """Compute the losses of items (anchor [1, dim], positives [P, dim], negatives [N, dim]).

    It pads the candidates and calls `item_losses`, as training does. Raises ValueError without items.

    >>> reid_loss([(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(3, 2))]).contrastive  # log(1 + 3 / e^2)
    tensor(0.3408)
    """
    if not items:
        raise ValueError("items is empty: there must be at least one (anchor, positives, negatives)")
    most = max(len(p) + len(n) for _, p, n in items)
    products, cosines, roles = [], [], []
    for anchor, positives, negatives in items:
        a, rows = wide(anchor).reshape(1, -1), wide(torch.cat([positives, negatives]))
        room = (0, most - len(rows))
        products.append(F.pad((rows @ a.T)[:, 0], room))
        cosines.append(F.pad((unit(rows) @ unit(a).T)[:, 0], room))
        role = torch.tensor([POSITIVE] * len(positives) + [NEGATIVE] * len(negatives))
        roles.append(F.pad(role, room, value=NONE))
    device = products[0].device
    return item_losses(torch.stack(products), torch.stack(cosines), torch.stack(roles).to(device))


# ------------------------------------------------------------------------------------------------------- items of clips


def clip_losses(
    queries: Float[Tensor, "clips frames queries dim"],
    there: Tensor,
    match: Int[Tensor, "clips frames instances"],
    use_memory: Tensor,
    noise: Int[Tensor, "clips frames instances"] | None = None,
    kind: Memory = "similarity",
) -> ReidLosses:
    """Compute the losses of all items of clips (Sec. 3.2).

    Args:
        queries: embeddings of all queries.
        there: [clips, frames, queries] whether there is a query.
        match: the query of each instance in each frame, -1 where it is absent.
        use_memory: [clips, frames, instances] whether the positive is the memory; else the last embedding.
        noise: a query that enters the memory of an instance that is absent, -1 for none. Default: no noise.
        kind: rule of the memory.
    """
    dim = queries.shape[3]
    valid = match >= 0
    own = queries.gather(2, match.clamp(min=0)[..., None].expand(-1, -1, -1, dim))  # [B, T, I, D]
    entering, present = own, valid
    if noise is not None:
        wrong = queries.gather(2, noise.clamp(min=0)[..., None].expand(-1, -1, -1, dim))
        entering = torch.where((noise >= 0)[..., None], wrong, own)
        present = valid | (noise >= 0)
    by_instance = (1, 2)  # time comes last
    memory = similarity_guided_memory(entering.transpose(*by_instance), present.transpose(*by_instance), kind=kind)
    found = memory_positives(
        own.transpose(*by_instance), valid.transpose(*by_instance), memory, use_memory.transpose(1, 2)
    )
    positive, has = found.rows.transpose(*by_instance), found.has.transpose(*by_instance)
    anchor, before = own[:, 1:], queries[:, :-1]
    anchors, keys = unit(anchor), unit(before)
    products = torch.cat([(anchor * positive[:, 1:]).sum(3, keepdim=True), anchor @ before.mT], 3)
    cosines = torch.cat([(anchors * unit(positive[:, 1:])).sum(3, keepdim=True), anchors @ keys.mT], 3)
    # Negatives are the queries of the frame before but the instance's own.
    mine = match[:, :-1, :, None] == torch.arange(queries.shape[2], device=match.device)
    roles = torch.where(there[:, :-1, None] & ~mine, NEGATIVE, NONE)
    roles = torch.cat([torch.full_like(roles[..., :1], POSITIVE), roles], 3)
    items = has[:, 1:]
    return item_losses(products[items], cosines[items], roles[items])


def reference_losses(
    queries: Float[Tensor, "clips frames queries dim"], there: Tensor, match: Int[Tensor, "clips frames instances"]
) -> ReidLosses:
    """Compute the losses of multi-reference items: an instance of the first frame against all queries of all other frames.

    Arguments are those of `clip_losses`. With two frames it is the single reference of earlier methods.
    """
    number, dim = queries.shape[2:]
    first = queries[:, 0].gather(1, match[:, 0].clamp(min=0)[..., None].expand(-1, -1, dim))  # [B, I, D]
    others = queries[:, 1:].flatten(1, 2)
    mine = match[:, 1:].transpose(1, 2)[..., None] == torch.arange(number, device=match.device)  # [B, I, T - 1, Q]
    roles = torch.where(mine, POSITIVE, torch.where(there[:, None, 1:], NEGATIVE, NONE)).flatten(2)
    items = (match[:, 0] >= 0) & (roles == POSITIVE).any(2)
    products, cosines = first @ others.mT, unit(first) @ unit(others).mT
    return item_losses(products[items], cosines[items], roles[items])


# ---------------------------------------------------------------------------------------------------------- the learner


@dataclass
class CTVISConfig(FramesConfig):
    """Settings of CTVIS. Defaults are those of the authors' configuration for ResNet-50 on YouTube-VIS 2019."""

    optimizer: str = "adamw"
    lr: float = 1.6e-3
    weight_decay: float = 0.05
    clip_norm: float | None = 0.01
    hidden: int = 256
    """Width of the two hidden layers of the head, at least 1."""
    projection: int = 256
    """Width D of an embedding, at least 1."""
    reference: Literal["memory", "frames"] = "memory"
    """memory: positives from memories over the clip. frames: positives from all other frames, without a memory, the baseline; with
    --frames 2 it is the single reference."""
    memory: Memory = "similarity"
    """Rule of the memory: similarity, weights by similarity; last, the last embedding; momentum, a new one weighs 0.75."""
    memory_share: float = 0.5
    """Probability that a positive is the memory, not the last embedding, 0 to 1."""
    noise: float = 0.0
    """Probability that a wrong query enters the memory of an absent instance in a frame, 0 to 1; the authors' code has 0.001
    and leaves it off."""
    contrastive_weight: float = 2.0
    """Weight of the contrastive loss, at least 0."""
    aux_weight: float = 3.0
    """Weight of the auxiliary loss, at least 0."""

    counts = (*FramesConfig.counts, "hidden", "projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("memory_share", "noise")
        if min(self.contrastive_weight, self.aux_weight) < 0:
            raise CounterpointError(
                f"contrastive_weight and aux_weight must not be negative, got {self.contrastive_weight} and {self.aux_weight}"
            )


class CTVIS(FramesLearner):
    """An encoder of crops and a head of three layers, whose output the tracker compares."""

    def __init__(self, config: CTVISConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        widths = (self.encoder.dim, config.hidden, config.hidden, config.projection)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layer = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers[:-1])

    def embed(self, crops: Tensor) -> Tensor:
        return self.head(self.encoder(crops))

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the frames, the coins of the positives, and the noise of the memories."""
        batch = super().prepare(batch, generator)
        match, config = batch["match"], self.config
        total, mine = self.share(len(match))
        # Draw for a fixed number of instances, so that W processes draw as one; more share the numbers of others.
        drawn = torch.rand((total, config.frames, 2, DRAWN), generator=generator)[mine, : match.shape[1]]
        drawn = drawn[..., torch.arange(match.shape[2]) % DRAWN].to(match.device)
        batch["use_memory"] = drawn[:, :, 0] < config.memory_share
        if config.noise:
            batch["noise"] = self._noise(batch, drawn[:, :, 1])
        return batch

    def _noise(self, batch: dict[str, Any], drawn: Tensor) -> Int[Tensor, "clips frames instances"]:
        """Return a wrong query for some absent instances, -1 elsewhere. The draw, 0..1, also chooses the query."""
        match, there = batch["match"], batch["identities"] > -2
        count = there.sum(2)
        rank = (drawn / self.config.noise * count[..., None]).floor().long()
        order = there.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices
        query = order.gather(2, rank.clamp(0, order.shape[2] - 1))
        return torch.where((match < 0) & (drawn < self.config.noise) & (count[..., None] > 0), query, -1)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, there = self.config, batch["identities"] > -2
        queries = self.queries(batch).float()
        if config.reference == "frames":
            found = reference_losses(queries, there, batch["match"])
        else:
            found = clip_losses(queries, there, batch["match"], batch["use_memory"], batch.get("noise"), config.memory)
        loss = config.contrastive_weight * found.contrastive + config.aux_weight * found.aux
        return {"loss": loss, "contrastive": found.contrastive.detach(), "aux": found.aux.detach()}


SYSTEM = System(
    slug="ctvis",
    task="frames",
    config=CTVISConfig,
    learner=CTVIS,
    data="moving-shapes",
    recipe={
        "epochs": 20,
        "batch_size": 6,
        "encoder": "conv-s",
        "frames": 8,
        "window": 12,
        "optimizer": "adam",
        "lr": 0.043,  # 1e-3 for a batch of 6
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "hidden": 64,
        "projection": 32,
        "evaluate_every": 5,
    },
)
