"""Mixtures of a batch with itself (inputs, hidden layers or embeddings), and their targets.

x~_i = lam_i x_i + (1 - lam_i) x_perm(i), lam ~ Beta(alpha, alpha).

    mixup            on inputs (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018, arXiv 1710.09412)
    manifold mixup   on hidden layers (Verma et al., ICML 2019, arXiv 1806.05236)
    CutMix           pastes a box of one image into another; lam is the share that remains (Yun et al., ICCV 2019, arXiv
                     1905.04899)

`mix_distribution` mixes the mean and the deviation of a picture's channels, not its pixels: MixStyle (Zhou et al., ICLR 2021, arXiv
2104.02008) on pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds, once


class Mix(NamedTuple):
    """The partner of each row, and each row's own share."""

    permutation: Int[Tensor, " n"]
    lam: Float[Tensor, " n"]


def draw_mix(
    n: int,
    alpha: float | tuple[float, float],
    generator: torch.Generator,
    *,
    per_sample: bool = False,
    probability: float = 1.0,
) -> Mix:
    """Draw a random permutation of n rows and lam ~ Beta(alpha, alpha).

    Args:
        n: number of rows.
        alpha: both parameters of the distribution, or a pair of them; 0 does not mix (lam = 1).
        generator: the only source of randomness; results are on its device.
        per_sample: draw one lam for each row. Default: one for the batch.
        probability: probability, 0..1, that lam is drawn; otherwise it is 1.

    Raises ValueError for a negative n or alpha and a probability outside 0..1.

    >>> draw_mix(3, 0.4, torch.Generator().manual_seed(0)).permutation.sort().values
    tensor([0, 1, 2])
    """
    first, second = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    if n < 0 or first < 0 or second < 0 or (first == 0) != (second == 0):
        raise ValueError(f"n and alpha must not be negative, got n {n} and alpha {alpha}")
    need_within(0, 1, probability=probability)
    device = generator.device
    permutation = torch.randperm(n, generator=generator, device=device)
    # torch's Beta takes no generator: numpy's does, and stays finite for the smallest alpha. Seeded by a draw of ours.
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    numbers = np.random.default_rng(seed)
    count = n if per_sample else 1
    lam = numbers.beta(first, second, count) if first > 0 else np.ones(count)
    lam = np.where(numbers.random(count) < probability, lam, 1.0)
    return Mix(permutation, torch.from_numpy(lam).to(device, torch.float32).expand(n))


def _per_row(lam: float | Tensor, x: Tensor) -> Tensor:
    lam = torch.as_tensor(lam, device=x.device).to(wide(x).dtype)
    if lam.ndim > 1 or (lam.ndim == 1 and len(lam) != len(x)):
        raise ValueError(f"lam must be one number, or one for each of the {len(x)} rows, got {list(lam.shape)}")
    return lam.reshape(-1, *[1] * (x.ndim - 1))


def _need_permutation(permutation: Tensor, n: int) -> None:
    if permutation.shape != (n,):
        raise ValueError(f"permutation must have one entry for each of the {n} rows, got {list(permutation.shape)}")


def mix(x: Float[Tensor, "n ..."], permutation: Int[Tensor, " n"], lam: float | Tensor) -> Float[Tensor, "n ..."]:
    """Compute lam_i x_i + (1 - lam_i) x_permutation(i), with gradients to both; not normalised again.

    Args:
        x: one row per example: images, hidden layers, embeddings, soft labels.
        permutation: [n] partner of each row.
        lam: one number, or one per row [n]; 1 leaves a row unchanged.

    Raises ValueError for shapes that do not fit and for whole numbers, whose mixture would be rounded.

    >>> mix(torch.tensor([[0.0], [4.0]]), torch.tensor([1, 0]), 0.75)
    tensor([[1.],
            [3.]])
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must hold floating-point rows, got {x.dtype} of shape {list(x.shape)}")
    _need_permutation(permutation, len(x))
    own = wide(x)  # mixed in float32 at least, returned in the type of x
    return torch.lerp(own.index_select(0, permutation), own, _per_row(lam, own)).to(x.dtype)


@contextmanager
def mixing_at(module: nn.Module, permutation: Int[Tensor, " n"], lam: float | Tensor) -> Iterator[None]:
    """Mix the output of `module` inside the `with` block: manifold mixup at any layer of any network.

    >>> layer = nn.Identity()
    >>> with mixing_at(layer, torch.tensor([1, 0]), 0.75):
    ...     layer(torch.tensor([[0.0], [4.0]]))
    tensor([[1.],
            [3.]])
    """
    hook = module.register_forward_hook(lambda _module, _args, output: mix(output, permutation, lam))
    try:
        yield
    finally:
        hook.remove()


@full_precision
def mixed_targets(
    permutation: Int[Tensor, " n"], lam: float | Tensor, *, accumulate: bool = True
) -> Float[Tensor, "n n"]:
    """Make soft targets of mixed rows among the unmixed ones: row i has lam_i at i and 1 - lam_i at permutation(i).

    Args:
        permutation: [n] partner of each row.
        lam: one number, or one per row; its dtype is the result's.
        accumulate: where permutation(i) = i, both add up to 1. False: the second replaces the first, as in the published
            code of M3CoL (arXiv 2409.17777), and the row sums to 1 - lam_i.

    >>> mixed_targets(torch.tensor([1, 0, 2]), torch.tensor([0.75, 0.5, 0.25]))
    tensor([[0.7500, 0.2500, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    n = len(permutation)
    lam = torch.as_tensor(lam, dtype=getattr(lam, "dtype", torch.float32), device=permutation.device)
    lam = _per_row(lam, lam.new_empty(n)).expand(n)
    _need_permutation(permutation, n)
    targets = torch.diag(lam)
    other = (permutation[:, None], (1 - lam)[:, None])
    return targets.scatter_add_(1, *other) if accumulate else targets.scatter_(1, *other)


def mix_labels(
    labels: Int[Tensor, " n"] | Float[Tensor, "n classes"],
    permutation: Int[Tensor, " n"],
    lam: float | Tensor,
    classes: int | None = None,
) -> Float[Tensor, "n classes"]:
    """Make labels of mixed rows, as probabilities for `torch.nn.functional.cross_entropy`.

    Args:
        labels: class numbers (then pass `classes`) or probabilities.
        permutation, lam: as of `mix`.
        classes: number of classes; only for class numbers.

    >>> mix_labels(torch.tensor([0, 2]), torch.tensor([1, 0]), 0.75, classes=3)
    tensor([[0.7500, 0.0000, 0.2500],
            [0.2500, 0.0000, 0.7500]])
    """
    if labels.is_floating_point():
        return mix(labels, permutation, lam)
    if classes is None or labels.ndim != 1:
        raise ValueError(f"class numbers must be [n] with `classes` given, got {list(labels.shape)} and {classes}")
    own = torch.as_tensor(lam)
    return mix(F.one_hot(labels, classes).to(own.dtype if own.is_floating_point() else torch.float32), permutation, lam)


class Boxes(NamedTuple):
    """The boxes to paste, in pixels, ends not included, and the share of each image that remains."""

    top: Int[Tensor, " n"]
    left: Int[Tensor, " n"]
    bottom: Int[Tensor, " n"]
    right: Int[Tensor, " n"]
    lam: Float[Tensor, " n"]


class Pasted(NamedTuple):
    """Images with boxes of their partners, the partners, and the share of each image that remains."""

    images: Float[Tensor, "n channels height width"]
    permutation: Int[Tensor, " n"]
    lam: Float[Tensor, " n"]


def draw_cutmix(
    images: Float[Tensor, "n channels height width"], beta: float, generator: torch.Generator, probability: float = 1.0
) -> Pasted:
    """Draw partners and boxes for a whole batch, and paste them (CutMix, arXiv 1905.04899).

    Args:
        images: the images of all processes.
        beta: both parameters of the Beta distribution of the pasted share, > 0.
        generator: source of the random numbers, on the CPU.
        probability: probability of pasting, one draw for the batch; by default 1.
    """
    mix = draw_mix(len(images), beta, generator, probability=probability)
    boxes = cutmix_boxes(images.shape[2], images.shape[3], mix.lam, generator)
    boxes = Boxes(*(part.to(images.device) for part in boxes))
    permutation = mix.permutation.to(images.device)
    return Pasted(cutmix(images, permutation, boxes), permutation, boxes.lam)


def cutmix_boxes(height: int, width: int, lam: Float[Tensor, " n"], generator: torch.Generator) -> Boxes:
    """Draw boxes of (1 - lam) of an image's area around a uniform centre, cut at its edges (CutMix, Eq. 2).

    Sides are sqrt(1 - lam) of the image's, rounded down. Where an edge cuts a box, lam grows to the share that remains.
    Rows with equal lam (one for the batch) still get different boxes.

    >>> cutmix_boxes(8, 8, torch.tensor([0.75, 1.0]), torch.Generator().manual_seed(0)).lam[1]
    tensor(1.)
    """
    need_positive(height=height, width=width)
    if lam.ndim != 1 or not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam must be [n], within 0..1, got {list(lam.shape)}")
    share = (1 - lam).sqrt()
    edges = []
    for size in (height, width):
        side = (size * share).long()
        start = torch.randint(size, lam.shape, generator=generator, device=generator.device).to(lam.device) - side // 2
        edges.append((start.clamp(min=0), (start + side).clamp(max=size)))
    (top, bottom), (left, right) = edges
    pasted = (bottom - top) * (right - left)
    return Boxes(top, left, bottom, right, 1 - pasted / (height * width))


def cutmix(
    images: Float[Tensor, "n channels height width"], permutation: Int[Tensor, " n"], boxes: Boxes
) -> Float[Tensor, "n channels height width"]:
    """Paste image permutation(i) into image i within box i. Labels are mixed with `boxes.lam` (see `mix_labels`).

    >>> boxes = Boxes(*(torch.tensor([x, 0]) for x in (0, 0, 1, 1)), lam=torch.tensor([0.75, 1.0]))
    >>> cutmix(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2), torch.tensor([1, 0]), boxes)[0, 0]
    tensor([[2., 1.],
            [1., 1.]])
    """
    if images.ndim != 4 or len(boxes.lam) != len(images):
        raise ValueError(
            f"images must be [n, channels, height, width] with n boxes, got {shapes(images=images, lam=boxes.lam)}"
        )
    _need_permutation(permutation, len(images))
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    down = (row >= boxes.top[:, None]) & (row < boxes.bottom[:, None])
    across = (column >= boxes.left[:, None]) & (column < boxes.right[:, None])
    inside = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(inside, images.index_select(0, permutation), images)


def picture_statistics(x: Float[Tensor, "n channels height width"], eps: float = 1e-6) -> Float[Tensor, "n channels 2"]:
    """Return the mean and sqrt(unbiased variance + eps) over the positions of each channel, without gradient.

    Args:
        x: pictures of at least two pixels.
        eps: >= 0, by default 1e-6.
    """
    variance, mean = torch.var_mean(wide(x.detach()), (2, 3), correction=1)
    return torch.stack([mean, (variance + eps).sqrt()], 2)


@full_precision
def mix_distribution(
    x: Float[Tensor, "n channels height width"],
    lam: Float[Tensor, " n"],
    perm: Int[Tensor, " n"],
    eps: float = 1e-6,
    *,
    statistics: Float[Tensor, "whole channels 2"] | None = None,
) -> Float[Tensor, "n channels height width"]:
    """Give each picture statistics between its own and a partner's: x' = (x - mu) / sigma * sigma' + mu'.

    mu' = lam mu + (1 - lam) mu[perm], and sigma' likewise, for each picture and channel. Statistics have no gradient.

    Args:
        x: pictures, in any range.
        lam: each picture's own share, 0 to 1; 1 leaves it unchanged.
        perm: the partner of each picture.
        eps: added to variances, >= 0; a constant channel takes the partner's mean.
        statistics: `picture_statistics` of the pictures that `perm` numbers, for a batch over several processes. Default: of x.

    There is no second derivative. Raises ValueError for shapes that do not fit, an empty batch, pictures of one pixel and
    partners out of range.

    >>> x = torch.tensor([[0.0, 1.0], [4.0, 8.0]]).view(2, 1, 1, 2)
    >>> mix_distribution(x, torch.tensor([0.0, 1.0]), torch.tensor([1, 0])).flatten(1)
    tensor([[4.0000, 8.0000],
            [4.0000, 8.0000]])
    """
    if x.ndim != 4 or lam.shape != x.shape[:1] or perm.shape != x.shape[:1]:
        raise ValueError(
            f"x must be [n, channels, height, width], lam and perm [n], got {shapes(x=x, lam=lam, perm=perm)}"
        )
    need_rows(x=x)
    if x.shape[2] * x.shape[3] < 2 or eps < 0:
        raise ValueError(
            f"x must have at least two pixels, of which a variance is taken, and eps must not be negative; got {shapes(x=x)}"
        )
    own = picture_statistics(x, eps)
    whole = own if statistics is None else statistics.detach()
    if holds((perm < 0).any() | (perm >= len(whole)).any()):
        raise ValueError(f"perm must number the {len(whole)} pictures from 0, got {perm.tolist()}")
    mu, sigma = own[..., None, None].unbind(2)
    share = wide(lam).to(own.dtype)[:, None, None]
    new_mu, new_sigma = torch.lerp(whole[perm].to(own.dtype), own, share)[..., None, None].unbind(2)
    # The statistics are constants of the gradient, so a second derivative would be wrong.
    return torch.addcmul(new_mu, once(wide(x), "mix_distribution") - mu, new_sigma / sigma).to(x.dtype)
