r"""Contrast of rows with real-valued labels against each other and against mixtures of them, no mixture ever built.

Legend.

    f_i, y_i    rows [N, D] and their labels, sorted by label in here
    s_ij        f_i . f_j / tau
    n_ik        a_ik f_i + (1 - a_ik) f_k, for all y_k != y_i: mixture of the anchor with a negative, of label a y_i + (1 - a) y_k
    p_ijk       b f_j + (1 - b) f_k, y_j < y_i < y_k within the window: mixture whose label is y_i
    b           (y_k - y_i) / (y_k - y_j)
    W(d)        weight of a term whose label is d away from y_i: d + 1, d^2 + 1 or 1

A product with a mixture is a mixture of products:

    f_i . n_ik / tau  = a_ik s_ii + (1 - a_ik) s_ik
    f_i . p_ijk / tau = b s_ij + (1 - b) s_ik

So the rows' similarities suffice. For p, b depends on labels alone. Rows with one label form a group. A is a group below the
anchor, C is one above it. The sum over all their pairs is a product of two sums:

    sum_{j in A, k in C} exp(b s_ij + (1 - b) s_ik) = (sum_{j in A} exp(b s_ij)) (sum_{k in C} exp((1 - b) s_ik))

Labels that differ in every example cost as many exponentials as there are mixtures; ten examples of a label cost a tenth of it.
Where a block has few mixtures, they are listed one by one instead.

Mixtures count as constants: their gradient reaches the anchor alone. All is computed in blocks of anchors, whose gradient is
made at once: memory is O(N D), and a block is CELLS numbers. The dense form is for torch.func and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.exponentials import exp_
from counterpoint.core.transforms import once, traced

Shares = Tensor | Callable[[Tensor], Tensor]
CELLS = 2**20  # numbers of a block
FLOOR = 1e-9  # smallest denominator of b


@dataclass(frozen=True)
class Terms:
    """The terms of the contrast.

    Args:
        temperature: tau > 0.
        window: largest distance of labels in p, not included.
        power: exponent of the label distance in W: 1 or 2; 0: no weights.
        own: [N, N] shares a_ik of the anchor, or a function from [r] rows to [r, N] of them (`BetaShares`); None: no n.
        between: whether there are mixtures p.
        separate: subtract one maximum from the rows' logits and another one from the mixtures', as the authors' code does. It
            rescales the mixtures' terms. False: the exact value.
    """

    temperature: float
    window: float
    power: int = 1
    own: Shares | None = None
    between: bool = True
    separate: bool = False

    def weight(self, distance: Tensor) -> Tensor:
        """Return W of label distances."""
        return distance**self.power + 1 if self.power else torch.ones_like(distance)

    def shares(self, rows: Tensor) -> Tensor:
        """Return [r, N] shares of some anchors."""
        assert self.own is not None
        return self.own[rows] if isinstance(self.own, Tensor) else self.own(rows)


@dataclass(frozen=True)
class BetaShares:
    """Shares of anchors in their mixtures, drawn from a Beta distribution when a block of anchors needs them.

    An anchor's shares depend on the seed and on its row alone.

    Args:
        seed: seed, at least 0.
        alpha, beta: parameters > 0; the mean is alpha / (alpha + beta).
        count: N, number of shares of an anchor.
    """

    seed: int
    alpha: float
    beta: float
    count: int

    def __call__(self, rows: Int[Tensor, " r"]) -> Float[Tensor, "r n"]:
        drawn = [
            np.random.default_rng([self.seed, row]).beta(self.alpha, self.beta, self.count) for row in rows.tolist()
        ]
        return torch.from_numpy(np.stack(drawn)).float().to(rows.device)


class Groups:
    """Rows sorted by label, and the groups of equal labels.

    Args:
        labels: [N] finite labels, in any order.
        window: largest distance of labels in mixtures p, not included.

    A group's mixtures p are of groups from `low` to below it, and from above it to before `high`.
    """

    def __init__(self, labels: Tensor, window: float) -> None:
        plain = labels.detach().cpu().double().numpy()
        order = plain.argsort(kind="stable")
        self.values, counts = np.unique(plain, return_counts=True)
        self.sizes: NDArray[np.int64] = counts.astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.order = torch.from_numpy(order).to(labels.device)
        self.group = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(labels.device)
        kind = torch.float32 if labels.device.type == "mps" else torch.float64
        self.y = torch.from_numpy(plain[order]).to(kind).to(labels.device)

        number, parts = np.arange(len(self.values)), max(1, CELLS // len(self.values)) if len(counts) else 1
        self.low, self.high = number.copy(), number + 1
        for start in range(0, len(number), parts):
            some = slice(start, start + parts)
            apart = self.values[some, None] - self.values
            self.low[some] -= ((apart > 0) & (apart < window)).sum(1)
            self.high[some] += ((apart < 0) & (-apart < window)).sum(1)

    def rows(self, first: int, stop: int) -> slice:
        """Return the rows of the groups first..stop - 1."""
        return slice(int(self.starts[first]), int(self.starts[stop]))

    def share(self, group: int, below: slice, above: slice) -> NDArray[np.float64]:
        """Return b [groups below, groups above] of a group."""
        low, high = self.values[below][:, None], self.values[above]
        return np.clip((high - self.values[group]) / np.maximum(high - low, FLOOR), 0, 1)


def mixture_counts(labels: Real[Tensor, " n"], window: float) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Count the mixtures n_ik and p_ijk of each anchor.

    Args:
        labels: one finite label for each row.
        window: largest distance of labels in p, not included.

    >>> mixture_counts(torch.tensor([1.0, 2.0, 2.0, 4.0]), 3.0)
    (tensor([3, 2, 2, 3]), tensor([0, 1, 1, 0]))
    """
    groups = Groups(labels, window)
    number = np.arange(len(groups.values))
    below = groups.starts[number] - groups.starts[groups.low]
    above = groups.starts[groups.high] - groups.starts[number + 1]
    of_group = np.stack([len(labels) - groups.sizes, below * above])
    found = torch.from_numpy(of_group).to(labels.device)[:, groups.group]
    counts = torch.empty_like(found)
    counts[:, groups.order] = found
    return counts[0], counts[1]


class _Block:
    """Some anchors and their terms so far: Z, the sum of logits in the numerator, and the gradient of each to similarities."""

    z: Tensor
    total: Tensor
    terms: Tensor
    shifts: Tensor
    mixed: Tensor | None = None  # gradient of Z through mixtures
    drawn: Tensor | None = None  # gradient of the numerator through mixtures

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the gradients through mixtures, zeros before the first."""
        self.mixed = torch.zeros_like(self.logits) if self.mixed is None else self.mixed
        self.drawn = torch.zeros_like(self.logits) if self.drawn is None else self.drawn
        return self.mixed, self.drawn


def _cells(groups: Groups, rows: int, a: tuple[int, int], c: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield pairs of ranges of groups below and above, so that `rows` anchors against each take a block at most."""
    below, above = a[1] - a[0], c[1] - c[0]
    many = [int(groups.starts[stop] - groups.starts[first]) for first, stop in (a, c)]
    if rows * (many[0] * above + many[1] * below) <= CELLS or below == above == 1:
        yield slice(*a), slice(*c)
    elif below >= above:
        middle = (a[0] + a[1]) // 2
        yield from _cells(groups, rows, (a[0], middle), c)
        yield from _cells(groups, rows, (middle, a[1]), c)
    else:
        middle = (c[0] + c[1]) // 2
        yield from _cells(groups, rows, a, (c[0], middle))
        yield from _cells(groups, rows, a, (middle, c[1]))


class _Listed:
    """The mixtures p of some anchors, one by one, where there are few.

    Args:
        groups: all rows.
        anchors: [r] groups of the anchors.
        logits: [r, N] the anchors' similarities.
    """

    def __init__(self, groups: Groups, anchors: NDArray[np.int64], logits: Tensor) -> None:
        starts, first = groups.starts, groups.starts[groups.low[anchors]]
        below, above = starts[anchors] - first, starts[groups.high[anchors]] - starts[anchors + 1]
        pairs = below * above
        i = np.repeat(np.arange(len(anchors)), pairs)
        at = np.arange(len(i)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        j, k = first[i] + at // above[i], starts[anchors + 1][i] + at % above[i]
        value = groups.values[np.repeat(np.arange(len(groups.values)), groups.sizes)]
        b = np.clip((value[k] - groups.values[anchors][i]) / np.maximum(value[k] - value[j], FLOOR), 0, 1)
        self.b = torch.from_numpy(b).to(logits)
        self.anchor, self.pairs = (torch.from_numpy(x).to(logits.device) for x in (i, pairs))
        self.below, self.above = (self.anchor * logits.shape[1] + torch.from_numpy(x).to(logits.device) for x in (j, k))
        flat = logits.reshape(-1)
        self.logits = self.b * flat[self.below] + (1 - self.b) * flat[self.above]

    def lift(self, top: Tensor) -> None:
        """Raise the anchors' maxima to those of these mixtures."""
        top.scatter_reduce_(0, self.anchor, self.logits, "amax")

    def add(self, block: _Block, shift: Tensor) -> None:
        """Add these mixtures' terms, with this shift of each anchor's logits."""
        e = exp_(self.logits - shift[self.anchor])
        block.z.index_add_(0, self.anchor, e)
        block.total.index_add_(0, self.anchor, self.logits)
        rest = 1 - self.b
        for gradient, low, high in zip(block.both(), (self.b * e, self.b), (rest * e, rest), strict=True):
            flat = gradient.view(-1)
            flat.index_add_(0, self.below, low)
            flat.index_add_(0, self.above, high)
        block.terms += self.pairs
        block.shifts += self.pairs * shift


class _Between:
    """The mixtures p of anchors of one group, rows of a block, with the groups of one cell."""

    def __init__(
        self, groups: Groups, group: int, rows: slice, below: slice, above: slice, logits: Tensor, top: Tensor
    ) -> None:
        self.anchors, logits, top = rows, logits[rows], top[rows]
        self.below, self.above = groups.rows(below.start, below.stop), groups.rows(above.start, above.stop)
        self.a, self.c = groups.group[self.below] - below.start, groups.group[self.above] - above.start
        b = torch.from_numpy(groups.share(group, below, above)).to(logits)
        self.b_rows, self.c_rows = (
            b[self.a],
            (1 - b).T[self.c],
        )  # [below rows, above groups], [above rows, below groups]
        high, low = top[:, below], top[:, above]
        self.largest = b * high[:, :, None] + (1 - b) * low[:, None]  # [anchors, below groups, above groups]
        self.down, self.up = logits[:, self.below] - high[:, self.a], logits[:, self.above] - low[:, self.c]
        sizes = torch.from_numpy(groups.sizes).to(logits)
        self.below_counts, self.above_counts = self.b_rows @ sizes[above], self.c_rows @ sizes[below]
        self.pairs = float(sizes[below].sum() * sizes[above].sum())

    def lift(self, top: Tensor) -> None:
        """Raise the anchors' maxima to those of these mixtures."""
        top[self.anchors] = torch.maximum(top[self.anchors], self.largest.amax((1, 2)))

    def add(self, block: _Block, shift: Tensor) -> None:
        """Add these mixtures' terms, with this shift of each anchor's logits."""
        rows, shift = self.anchors, shift[self.anchors]
        e1 = exp_(self.down[:, :, None] * self.b_rows)  # [anchors, below rows, above groups]
        e2 = exp_(self.up[:, :, None] * self.c_rows)  # [anchors, above rows, below groups]
        shape = self.largest.shape
        s1 = e1.new_zeros(shape).index_add_(1, self.a, e1)
        s2 = e2.new_zeros(shape[0], shape[2], shape[1]).index_add_(1, self.c, e2).transpose(1, 2)
        f = exp_(self.largest - shift[:, None, None])
        block.z[rows] += (f * s1 * s2).sum((1, 2))
        mixed, drawn = block.both()
        mixed[rows, self.below] += (e1.mul_(self.b_rows) * (f * s2)[:, self.a]).sum(2)
        mixed[rows, self.above] += (e2.mul_(self.c_rows) * (f * s1).transpose(1, 2)[:, self.c]).sum(2)
        logits = block.logits[rows]
        block.total[rows] += logits[:, self.below] @ self.below_counts + logits[:, self.above] @ self.above_counts
        drawn[rows, self.below] += self.below_counts
        drawn[rows, self.above] += self.above_counts
        block.terms[rows] += self.pairs
        block.shifts[rows] += self.pairs * shift


def _betweens(groups: Groups, first: int, logits: Tensor) -> Iterator[_Listed | _Between]:
    """Yield the mixtures p of a block's anchors: all at once where they are few, otherwise cell by cell."""
    stop = first + len(logits)
    anchors = np.searchsorted(groups.starts, np.arange(first, stop), "right") - 1
    below = groups.starts[anchors] - groups.starts[groups.low[anchors]]
    above = groups.starts[groups.high[anchors]] - groups.starts[anchors + 1]
    many = int((below * above).sum())
    if not many:
        return
    if many <= CELLS:
        yield _Listed(groups, anchors, logits)
        return
    index = groups.group.expand(len(logits), -1)
    top = logits.new_full((len(logits), len(groups.values)), -torch.inf).scatter_reduce_(1, index, logits, "amax")
    for group in np.unique(anchors).tolist():
        low, high = int(groups.low[group]), int(groups.high[group])
        if low == group or high == group + 1:
            continue
        rows = slice(max(int(groups.starts[group]), first) - first, min(int(groups.starts[group + 1]), stop) - first)
        for cell in _cells(groups, rows.stop - rows.start, (low, group), (group + 1, high)):
            yield _Between(groups, group, rows, *cell, logits, top)


class _MixtureContrast(torch.autograd.Function):
    """The sum of the anchors' losses, and how many have a positive. The gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, terms: Terms) -> tuple[Tensor, Tensor]:
        n, tau = len(x), terms.temperature
        order = groups.order
        f = x[order]
        gradient, loss, counted = torch.zeros_like(f), x.new_zeros(()), x.new_zeros(())
        chunk = max(1, CELLS // max(1, n))
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            here = torch.arange(start, stop, device=x.device)
            block = _Block(f[start:stop] @ f.T / tau)
            to_rows, to_mixed, lost, has = _anchors(block, here, groups, terms)
            loss, counted = loss + lost, counted + has
            gradient[start:stop].addmm_(to_rows if to_mixed is None else to_rows + to_mixed, f, alpha=1 / tau)
            gradient.addmm_(to_rows.T, f[start:stop], alpha=1 / tau)
        back = torch.empty_like(gradient)
        back[order] = gradient
        ctx.save_for_backward(back)
        ctx.mark_non_differentiable(counted)
        return loss, counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0] * back, None, None


def _anchors(block: _Block, here: Tensor, groups: Groups, terms: Terms) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradient of a block's loss to similarities of rows and of mixtures, the loss, and the anchors counted."""
    logits, local = block.logits, torch.arange(len(here), device=here.device)
    distance = (groups.y[here, None] - groups.y).abs_().to(logits)
    same = groups.group[here, None] == groups.group
    rest = logits.index_put((local, here), logits.new_tensor(-torch.inf))
    shift = (logits if terms.separate else rest).amax(1)
    shift = torch.where(torch.isneginf(shift), 0.0, shift)
    top = shift if not terms.separate else torch.zeros_like(shift)
    drawn = share = None
    if terms.own is not None:
        share = terms.shares(groups.order[here])[:, groups.order].to(logits)
        drawn = torch.lerp(logits, logits[local, here, None], share).masked_fill_(same, -torch.inf)
        top = torch.maximum(top, drawn.amax(1))
    first: list[_Listed | _Between] = []
    between = _betweens(groups, int(here[0]), logits) if terms.between else iter(())
    if terms.separate:
        for found in between:
            found.lift(top)
            first = [found]
        # Listed mixtures are kept for the terms, cells are made again.
        listed = bool(first) and isinstance(first[0], _Listed)
        between = iter(first) if listed or not first else _betweens(groups, int(here[0]), logits)
    shift = shift if terms.separate else top
    real = exp_(rest.sub_(shift[:, None])).mul_(terms.weight(distance))
    same[local, here] = False  # positives, without the anchor itself
    block.z, block.total, block.terms = real.sum(1), logits.masked_fill(~same, 0.0).sum(1), same.sum(1).to(logits)
    block.shifts = block.terms * shift
    if drawn is not None:
        assert share is not None
        e = exp_(drawn.sub_(top[:, None])).mul_(terms.weight((1 - share) * distance))
        block.z += e.sum(1)
        own = share * e
        block.mixed = e.sub_(own)
        block.mixed[local, here] += own.sum(1)
    for found in between:
        found.add(block, top)
    has = block.terms > 0
    each = block.terms.clamp(min=1)
    z = torch.where(block.z > 0, block.z, 1.0)  # an anchor without any other row has no loss
    lost = torch.where(has, z.log() - (block.total - block.shifts) / each, 0.0)
    part = (has / z)[:, None]
    to_rows = real.mul_(part).sub_(same / each[:, None])
    if block.mixed is not None:
        block.mixed *= part
        if block.drawn is not None:
            block.mixed -= block.drawn / each[:, None]
    return to_rows, block.mixed, lost.sum(), has.sum().to(logits)


def _dense(x: Tensor, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Compute the same by PyTorch's own operations, with [N, N, N] numbers."""
    s = x @ x.T / terms.temperature
    constant = x @ x.detach().T / terms.temperature  # products of anchors with rows of mixtures
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    y = y.to(torch.float32 if y.device.type == "mps" else torch.float64)
    signed = y - y[:, None]
    distance = signed.abs().to(x)
    same, near = signed == 0, signed.abs() < terms.window
    positive = same & ~own
    logits, weights, counts = [s], [terms.weight(distance).masked_fill(own, 0.0)], [positive]
    if terms.own is not None:
        share = terms.shares(torch.arange(len(x), device=x.device)).to(x)
        logits.append(share * constant.diagonal()[:, None] + (1 - share) * constant)
        weights.append(terms.weight((1 - share) * distance).masked_fill(same, 0.0))
        counts.append(torch.zeros_like(same))
    if terms.between:
        low, high = y[:, None], y
        b = ((high - y[:, None, None]) / (high - low).clamp(min=FLOOR)).clamp(0, 1).to(x)
        there = ((signed < 0) & near)[:, :, None] & ((signed > 0) & near)[:, None]
        logits.append((b * constant[:, :, None] + (1 - b) * constant[:, None]).flatten(1))
        weights.append(there.flatten(1).to(x))
        counts.append(there.flatten(1))
    kept = [weight > 0 for weight in weights]
    if terms.separate:  # the code's maximum of the rows is that with itself
        kept[0] = kept[0] | own
    tops = [v.detach().masked_fill(~k, -torch.inf).amax(1) for v, k in zip(logits, kept, strict=True)]
    mixed = torch.stack([*tops[1:], torch.zeros_like(tops[0]) if terms.separate else tops[0]]).amax(0)
    shifts = [tops[0] if terms.separate else mixed, *[mixed] * (len(tops) - 1)]
    parts = []
    for v, w, c, m in zip(logits, weights, counts, shifts, strict=True):
        shifted = v - torch.where(m.isinf(), 0.0, m)[:, None]
        summed = (w * shifted.masked_fill(w == 0, 0.0).exp()).sum(1)
        parts.append(torch.stack([summed, torch.where(c, shifted, 0.0).sum(1), c.sum(1).to(x)]))
    z, total, number = torch.stack(parts).sum(0)
    has = number > 0
    lost = torch.where(has, torch.where(has, z, 1.0).log() - total / number.clamp(min=1), 0.0)
    return lost.sum(), has.sum().to(x)


def mixture_contrast(
    x: Float[Tensor, "n dim"], labels: Real[Tensor, " n"], terms: Terms
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum the anchors' losses, and count the anchors with a positive (a row or a mixture p of their label).

    Args:
        x: rows, which are not normalised here. Each is an anchor.
        labels: finite labels.
        terms: the terms of the contrast.

    Returns the sum of -(1 / T_i) (sum of the T_i positives' s - log Z_i) over anchors i, and their number. In Z_i all other rows
    and all mixtures count with their weight; that of p is 1. The gradient must not be differentiated again.

    >>> loss, _ = mixture_contrast(torch.eye(2).repeat(2, 1), torch.tensor([0.0, 3.0]).repeat(2), Terms(1.0, 1.0, between=False))
    >>> bool((loss / 4 - (1 + 2 * 4 * torch.tensor(-1.0).exp()).log()).abs() < 1e-6)
    True
    """
    if traced():
        return _dense(x, labels, terms)
    return _MixtureContrast.apply(once(x, "a contrast with mixtures"), Groups(labels, terms.window), terms)
