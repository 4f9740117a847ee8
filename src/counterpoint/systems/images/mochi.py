"""MoCHi: generate harder negatives by mixing the hardest ones with each other and with the query.

Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus: "Hard Negative Mixing for Contrastive Learning", NeurIPS 2020, arXiv
2010.01028.

For every query, of its N hardest negatives n (Sec. 4.1 and 4.2):

    type 1, s of them    h  = unit( alpha n_i + (1 - alpha) n_j ),   alpha ~ U(0, 1), i and j drawn with replacement
    type 2, s' of them   h' = unit( beta q + (1 - beta) n ),         beta ~ U(0, 1/2), so that h' stays on the negative's side

They are constants: the query gets gradient only through its similarities with them. cos(q, h') >= cos(q, n) always.

This is an addition: `mochi` alone is MoCo v2 with these negatives (MoCHi (N, s, s')). `simclr+mochi` mixes the other rows of
the batch, `clip+mochi` the other side's. An image's own older keys in the queue are excluded. On a small set they would
always be the hardest. The authors' training code was not found. Tests compare with unofficial code of the same
operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_numbers, need_positive, need_rows
from counterpoint.core.compared import Compared, Direction, Queued, pairs, views
from counterpoint.core.contrast import softplus
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds, need_fixed, once
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig

GATHERED = 2**21  # maximum number of entries of parents' rows in memory


@full_precision(keep=("queue",))
def hardest(
    query: Float[Tensor, "n dim"],
    queue: Float[Tensor, "keys dim"],
    n: int,
    mask: Bool[Tensor, "n keys"] | None = None,
) -> Int[Tensor, "n hard"]:
    """Select for each query the `n` queue rows most similar to it, sorted by position.

    Args:
        query: rows, which this function normalises.
        queue: unit rows.
        n: number of rows, at most the number of allowed rows of every query.
        mask: True where a row is forbidden to a query; None: all rows are allowed.

    Raises ValueError for an empty queue, shapes that do not fit and similarities that are NaN. Raises it too for fewer than n
    allowed rows, because forbidden rows must not be mixed.
    """
    need_rows(query=query)
    if not len(queue):
        raise ValueError("queue holds no keys")
    if mask is not None:
        need_fixed("hardest", mask=mask)
    if mask is not None and mask.shape != (len(query), len(queue)):
        raise ValueError(f"mask must be [{len(query)}, {len(queue)}], got {list(mask.shape)}")
    allowed = len(queue) if mask is None else len(queue) - int(mask.sum(1).amax())
    if not 1 <= n <= allowed:
        raise ValueError(f"n must lie in 1..{allowed}, the keys every query is allowed, got {n}")
    with torch.no_grad():
        q = unit(query)
        s = q @ queue.to(q.dtype).T
        if mask is not None:
            s = s.masked_fill(mask, -torch.inf)
        if holds(s.isnan().any()):
            raise ValueError("query or queue holds NaN")
        return s.topk(n, dim=1).indices.sort(dim=1).values


def mixed(
    one: Float[Tensor, "n s dim"], other: Float[Tensor, "n s dim"], share: Float[Tensor, "n s"]
) -> Float[Tensor, "n s dim"]:
    """Mix rows: unit(share one + (1 - share) other), without gradient."""
    with torch.no_grad():
        found = torch.lerp(other, one, share[..., None].to(one))
        return found / found.norm(dim=2, keepdim=True).clamp(min=1e-12)


def _need_parents(n: int, keys: int, **parts: Tensor) -> None:
    """Raise ValueError unless all parts are [n, s] alike and whole numbers are positions in the queue.

    Unchecked, a negative position would silently count from the end.
    """
    first, *others = parts.values()
    if first.ndim != 2 or len(first) != n or any(other.shape != first.shape for other in others):
        said = ", ".join(str(list(part.shape)) for part in parts.values())
        raise ValueError(f"{', '.join(parts)} must be [{n}, s] alike, got {said}")
    need_numbers(keys, **{name: part for name, part in parts.items() if not part.is_floating_point()})


@full_precision(keep=("queue", "alpha", "beta"))
def mochi_logits(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "n dim"],
    queue: Float[Tensor, "keys dim"],
    pair_i: Int[Tensor, "n s"],
    pair_j: Int[Tensor, "n s"],
    alpha: Float[Tensor, "n s"],
    single: Int[Tensor, "n s2"],
    beta: Float[Tensor, "n s2"],
    temperature: float = 0.2,
    mask: Bool[Tensor, "n keys"] | None = None,
) -> Float[Tensor, "n logits"]:
    """Compute the logits of MoCHi: the positive first, then the queue, type 1, type 2.

    The loss is their cross-entropy with target 0.

    Args:
        query, key: rows, which this function normalises; the key gets no gradient.
        queue: unit rows, no gradient.
        pair_i, pair_j, alpha: positions of queue rows to mix with each other, and the weight of the first, 0 to 1.
        single, beta: positions of queue rows to mix with the query, and the weight of the query, 0 to 1/2.
        temperature: > 0, by default 0.2.
        mask: True where a queue row is forbidden to a query; its logit is -inf. None: all rows are allowed.

    Raises ValueError for an empty queue, a temperature that is not positive, and shapes or positions that do not fit.

    >>> one = torch.eye(2)[:1]
    >>> none = torch.zeros(1, 0, dtype=torch.long)
    >>> mochi_logits(one, one, torch.eye(2)[1:], none, none, none.float(), none, none.float(), 1.0)
    tensor([[1., 0.]])
    """
    need_alike("n dim", query=query, key=key)
    need_positive(temperature=temperature)
    n, keys = len(query), len(queue)
    if not keys or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(f"queue must be [keys, {query.shape[1]}] and hold a key, got {list(queue.shape)}")
    _need_parents(n, keys, pair_i=pair_i, pair_j=pair_j, alpha=alpha)
    _need_parents(n, keys, single=single, beta=beta)
    if mask is not None and mask.shape != (n, keys):
        raise ValueError(f"mask must be [{n}, {keys}], got {list(mask.shape)}")
    # Mixtures with the query are constants.
    q, k = unit(once(query, "mochi_logits") if single.shape[1] else query), unit(key.detach())
    queue = queue.detach().to(q.dtype)
    first = mixed(queue[pair_i], queue[pair_j], alpha)
    second = mixed(q.detach()[:, None].expand(-1, single.shape[1], -1), queue[single], beta)
    known = q @ queue.T
    if mask is not None:
        known = known.masked_fill(mask, -torch.inf)
    made = torch.bmm(torch.cat([first, second], 1), q[:, :, None])[:, :, 0]
    return torch.cat([(q * k).sum(1, keepdim=True), known, made], 1) / temperature


@dataclass
class MoCHiConfig(PartConfig):
    """Settings of MoCHi. Defaults are the paper's for ImageNet-1K."""

    hardest: int = 1024
    """N: number of hardest negatives to mix, or all negatives of a query if it has fewer."""
    mixed: int = 1024
    """s: number of mixtures of two hardest negatives."""
    mixed_query: int = 128
    """s': number of mixtures of one hardest negative and the query."""
    mixing_from: int = 15
    """Number of first epochs without mixing, until the keys of the queue are useful."""

    late: ClassVar = {"mixing_from": ("mixing", 0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hardest < 1 or min(self.mixed, self.mixed_query, self.mixing_from) < 0:
            raise CounterpointError(
                "hardest must be at least 1; mixed, mixed_query and mixing_from must not be negative"
            )


class Mixed(NamedTuple):
    """Results for every anchor.

    `losses` holds the losses. `first` is True where the positive is nearer than all own negatives. `first_of_all` also
    includes the synthetic ones.
    """

    losses: Float[Tensor, " m"]
    first: Bool[Tensor, " m"]
    first_of_all: Bool[Tensor, " m"]


@full_precision(keep=("random",))
def mixed_losses(
    way: Direction, temperature: float | Tensor, random: Float[Tensor, "m s 3"], hardest: int, pairs: int
) -> Mixed:
    """Compute InfoNCE of every anchor with synthetic negatives in addition to its own.

    Args:
        way: anchors, positives and negatives.
        temperature: > 0.
        random: uniform numbers of each synthetic negative: two positions among the hardest, and a share.
        hardest: N; all negatives of an anchor if it has fewer.
        pairs: number of synthetic negatives, from the first, that mix two negatives; the others mix one with the anchor.

    A synthetic negative is a constant u / |u|, where u is a sum of two rows. Its similarity with the anchor is a sum of two
    similarities over |u|. The cosine of the two rows gives |u|^2. The function therefore stores neither the
    negative nor its gradient. It computes a matrix of similarities of moderate size once, and a larger one in parts.
    """
    t, q = temperature, way.query
    positive, whole = way.positives(t), way.whole(t)
    parts = way.parts() if whole is None else iter([(slice(0, len(q)), whole.detach() * t)])
    closest, chosen = [], []
    with torch.no_grad():
        for part, s in parts:
            many = min(hardest, int((s > -torch.inf).sum(1).min()))
            if many < 1:
                raise CounterpointError("a query has no negatives to mix; use a larger batch or queue")
            values, places = s.topk(many if random.shape[1] else 1, dim=1)
            closest.append(values[:, 0] / t)
            at = (random[part, :, :2] * many).long().clamp_(max=many - 1).flatten(1)
            chosen.append(places.gather(1, at).view(*at.shape[:1], -1, 2) if random.shape[1] else at.view(len(s), 0, 2))
    first = positive.detach() > torch.cat(closest)
    own = way.negatives(t) if whole is None else whole.logsumexp(1)
    if not random.shape[1]:
        return Mixed(softplus(own - positive), first, first)
    rows = torch.cat(chosen)

    def similarity(index: Tensor) -> Tensor:
        if whole is not None:
            return whole.gather(1, index)
        return torch.linalg.vecdot(scaled(q, t)[:, None], way.bank[index])

    with torch.no_grad():
        # Process some anchors at a time. Both parents of all anchors would need the most memory, and be slower.
        some = max(1, GATHERED // max(1, pairs * way.bank.shape[1]))
        pairs_apart = torch.cat(
            [
                torch.linalg.vecdot(way.bank[i], way.bank[j])
                for i, j in (r.unbind(2) for r in rows[:, :pairs].split(some))
            ]
        )
    alpha, beta = random[:, :pairs, 2].to(q), random[:, pairs:, 2].to(q) / 2
    one, other = (similarity(rows[:, :pairs, side]) for side in (0, 1))
    single = similarity(rows[:, pairs:, 0])
    itself = (scaled(q, t) * q.detach()).sum(1, keepdim=True)  # the query in a mixture is a constant
    made = torch.cat(
        [
            (alpha * one + (1 - alpha) * other) / _length(alpha, pairs_apart),
            (beta * itself + (1 - beta) * single) / _length(beta, single.detach() * t),
        ],
        1,
    )
    above = first & (positive.detach() > made.detach().amax(1))
    return Mixed(softplus(torch.logaddexp(own, made.logsumexp(1)) - positive), first, above)


def _length(share: Tensor, cosine: Tensor) -> Tensor:
    """Compute |share a + (1 - share) b| of unit rows with this cosine, as a constant that is not 0."""
    with torch.no_grad():
        square = share**2 + (1 - share) ** 2 + 2 * share * (1 - share) * cosine
        return square.clamp(min=1e-24).sqrt()


class MoCHi(Part):
    """The base's comparison with synthetic negatives in addition to its own."""

    config: MoCHiConfig

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        # For both sides of the batch and every synthetic negative: two positions among the hardest and a share.
        return {"random": torch.rand(rows, 2, self.config.mixed + self.config.mixed_query, 3, generator=generator)}

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        config, n = self.config, len(compared.query)
        drawn = step.drawn["random"][:n].to(compared.query.device)
        drawn = drawn if step.epoch >= config.mixing_from else drawn[:, :, :0]
        found = []
        for number, way in enumerate(compared.directions(apart=True)):
            # Either both sides are anchors of one direction, or each side of a separate direction.
            random = drawn.transpose(0, 1).flatten(0, 1) if len(way.query) == 2 * n else drawn[:, number]
            mixed = min(config.mixed, random.shape[1])
            losses, *firsts = mixed_losses(way, compared.temperature, random, config.hardest, mixed)
            found.append(torch.stack([global_mean(losses), *(global_mean(x.float()) for x in firsts)]))
        loss, first, first_of_all = torch.stack(found).mean(0)
        return {"loss": loss, "proxy_accuracy": first.detach(), "proxy_accuracy_mixed": first_of_all.detach()}


SYSTEM = Addition(
    slug="mochi",
    over="moco-v2",
    config=MoCHiConfig,
    part=MoCHi,
    fits=(Queued, views, pairs),
    loss="own",
    recipe={"mochi.hardest": 128, "mochi.mixed": 64, "mochi.mixed_query": 16, "mochi.mixing_from": 2},
)
