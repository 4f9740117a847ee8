"""Assign rows to words by distance, and pool the codes of each bag, without the matrix of distances.

A bag is a set of rows, such as the locations of one picture's feature map. Let d_uk be the squared distance of row u and
word k. Its code is softmax_k(-sharpness d_uk), or one-hot at the nearest word. A bag's code is the maximum or the mean of
its rows' codes. The sharpness may depend on the distances to the nearest words of all rows, so these are computed first.

Blocks of whole bags are processed one after another. Distances are kept for the second pass as long as they fit into a
budget; the others are computed again. `bow_targets` does so for feature maps. `local_words` picks new words from feature
maps, and `perplexity` counts the words in use. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_finite_values, need_rows, need_word, shapes
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.precision import exact, full_precision
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group

Update = Literal["local_average", "no_averaging", "global_average"]

BLOCK = 1 << 20  # distances in a block on a CPU: 4 MiB of float32, which stay in the cache
BLOCK_ON_DEVICE = 1 << 25
KEEP = 256 << 20  # bytes of distances that the first pass keeps for the second
FLOOR = 1e-12  # of the mean distance to the nearest word, which divides


@torch.no_grad()
def pooled_codes(
    rows: Float[Tensor, "bags places dim"],
    words: Float[Tensor, "words dim"],
    sharpen: Callable[[Float[Tensor, "bags places"]], Tensor | float],
    pool: Literal["max", "average"] = "max",
    *,
    hard: bool = False,
    keep: int | None = None,
) -> Float[Tensor, "bags words"]:
    """Compute the pooled code of each bag.

    Args:
        rows: the rows of each bag.
        words: the words, of the same type.
        sharpen: function from the squared distance of each row to its nearest word to the sharpness, >= 0.
        pool: "max" (default) or "average", over the rows of a bag.
        hard: one-hot codes; False (default): soft codes.
        keep: bytes of distances to keep between the two passes; None: 256 MiB.

    The distances are rounded expansions |f|^2 + |w|^2 - 2 f w, so the least may be slightly negative.

    >>> rows, words = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.0], [1.0], [5.0]])
    >>> pooled_codes(rows, words, lambda least: 1.0, hard=True)
    tensor([[1., 1., 0.]])
    """
    bags, places, _ = rows.shape
    left = KEEP if keep is None else keep
    lengths = words.square().sum(1)
    kept: list[Tensor | None] = []
    bow, least = rows.new_zeros(bags, len(words)), rows.new_empty(bags, places)

    def blocks() -> Iterator[slice]:
        most = BLOCK_ON_DEVICE if rows.is_cuda else BLOCK
        size = max(1, most // max(1, places * len(words)))
        return (slice(start, min(start + size, bags)) for start in range(0, bags, size))

    def distances(block: slice, factor: Tensor | float = 1.0) -> Tensor:
        """Compute factor (|w|^2 - 2 f w), [rows of the block, words]."""
        flat = rows[block].flatten(0, 1)
        return torch.addmm(lengths * factor, flat * factor, words.T, alpha=-2)

    with exact(rows.device.type):
        for block in blocks():
            found = distances(block)
            if hard:
                values, nearest = found.min(1)
                least[block] = values.view(-1, places)
                _count(bow[block], nearest.view(-1, places), pool)
                continue
            least[block] = found.amin(1).view(-1, places)
            size = found.numel() * found.element_size()
            fits = size <= left
            kept.append(found if fits else None)
            left -= size if fits else 0
        sharpness = sharpen(least + rows.square().sum(2))
        if hard:
            return bow
        for number, block in enumerate(blocks()):
            whole = kept[number]
            kept[number] = None
            scores = distances(block, -sharpness) if whole is None else whole.mul_(-sharpness)
            codes = scores.softmax(1).view(-1, places, len(words))
            bow[block] = codes.amax(1) if pool == "max" else codes.mean(1)
    return bow


def _count(bow: Tensor, nearest: Tensor, pool: str) -> None:
    """Write pooled one-hot codes: whether a word is the nearest of a row, or the share of such rows."""
    if pool == "max":
        bow.scatter_(1, nearest, 1.0)
    else:
        bow.scatter_add_(1, nearest, torch.full_like(nearest, 1 / nearest.shape[1], dtype=bow.dtype))


def inner(feature_map: Tensor, border: int, least: int = 1) -> Tensor:
    """Leave out the border of a map. Raises ValueError for a map with fewer than `least` locations a side inside."""
    if feature_map.ndim != 4:
        raise ValueError(f"feature_map must be [n, channels, height, width], got {list(feature_map.shape)}")
    need_rows(feature_map=feature_map)
    need = least + 2 * border
    if min(feature_map.shape[2:]) < need:
        raise ValueError(
            f"feature_map must be at least {need} x {need}: a border of {border} and {least} x {least} locations, got "
            f"{list(feature_map.shape)}"
        )
    high, wide_ = feature_map.shape[2:]
    return feature_map[:, :, border : high - border, border : wide_ - border]


class BowTargets(NamedTuple):
    bow: Float[Tensor, "n words"]
    min_dist_mean: Tensor


@over_group
@full_precision(keep=("min_dist_mean",))
@torch.no_grad()
def bow_targets(
    feature_map: Float[Tensor, "n channels height width"],
    dictionary: Float[Tensor, "words channels"],
    min_dist_mean: Tensor | float,
    inv_delta: float | None = 15.0,
    pool: Literal["max", "average"] = "max",
    train: bool = False,
    *,
    border: int = 1,
    momentum: float = 0.99,
) -> BowTargets:
    r"""Compute each picture's bag of visual words t (OBoW, arXiv 2012.11552, Sec. 3.2).

    The code of a location is softmax_k(-(beta / m) d_k). Its maximum or mean over locations, divided by the sum, is t.

    Args:
        feature_map: the teacher's map.
        dictionary: the words.
        min_dist_mean: m, [1] or a number.
        inv_delta: beta > 0, by default 15; None or -1: a location belongs to its nearest word alone.
        pool: "max" (default) or "average" over locations.
        train: first update m to momentum m + (1 - momentum) mean_u min_k d; False (default): leave it.
        border: locations to leave out at each side, by default 1.
        momentum: share of m that an update keeps, 0 to 1, by default 0.99.

    Returns t and m. Nothing has a gradient. The distances are never stored as a whole. Across processes the mean covers all
    pictures. Raises ValueError for shapes that do not fit, NaN, an unknown `pool` and a bad beta.

    >>> found = bow_targets(torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 0.5)
    >>> found.bow.round(decimals=4)
    tensor([[1., 0.]])
    """
    places = inner(feature_map, border).flatten(2).transpose(1, 2)
    if dictionary.ndim != 2 or not len(dictionary) or dictionary.shape[1] != feature_map.shape[1]:
        raise ValueError(
            f"dictionary must be [words, {feature_map.shape[1]}], got {shapes(dictionary=dictionary, feature_map=feature_map)}"
        )
    need_finite_values(feature_map=feature_map, dictionary=dictionary)
    need_word(("max", "average"), pool=pool)
    hard = inv_delta is None or inv_delta == -1
    if inv_delta is not None and not hard and not 0 < inv_delta < float("inf"):
        raise ValueError(f"inv_delta must be positive and finite, or None for hard codes, got {inv_delta}")
    mean = torch.as_tensor(min_dist_mean, dtype=places.dtype, device=places.device)
    if mean.numel() != 1 or holds(~(mean >= 0).all()):
        raise ValueError(f"min_dist_mean must be one number that is not negative, got {min_dist_mean}")

    def sharpness(least: Tensor) -> Tensor:
        nonlocal mean
        if train:
            mean = (momentum * mean + (1 - momentum) * global_mean(least.mean(1))).clamp(min=0)
        return (1.0 if inv_delta is None else inv_delta) / mean.reshape(()).clamp(min=FLOOR)

    bow = pooled_codes(places.contiguous(), dictionary, sharpness, pool, hard=hard)
    return BowTargets(bow / bow.sum(1, keepdim=True), mean)


@full_precision(keep=("random",))
@torch.no_grad()
def local_words(
    feature_map: Float[Tensor, "n channels height width"],
    random: Float[Tensor, " n"],
    update: Update = "local_average",
    *,
    border: int = 1,
) -> Float[Tensor, "n channels"]:
    """Pick one new visual word from each map (OBoW, arXiv 2012.11552, Sec. 3.3).

    Args:
        feature_map: the teacher's map.
        random: a number of 0 to 1 for each picture, 1 not included, which picks the location.
        update: "local_average" (default) averages 3 x 3 locations, "no_averaging" takes one, "global_average" takes all.
        border: locations to leave out at each side, by default 1.

    Raises ValueError for a map that is too small and for an unknown `update`.

    >>> local_words(torch.ones(1, 2, 5, 5), torch.zeros(1))
    tensor([[1., 1.]])
    """
    if update not in ("local_average", "no_averaging", "global_average"):
        raise ValueError(f"update must be local_average, no_averaging or global_average, got {update!r}")
    part = inner(feature_map, border, 3 if update == "local_average" else 1)
    if random.shape != part.shape[:1]:
        raise ValueError(f"random must be a number for each picture, got {shapes(random=random, feature_map=part)}")
    if update == "global_average":
        return part.mean((2, 3))
    flat = (F.avg_pool2d(part, 3, 1) if update == "local_average" else part).flatten(2)
    at = (random.to(flat.device) * flat.shape[2]).long().clamp(max=flat.shape[2] - 1)
    return flat[torch.arange(len(flat), device=flat.device), :, at]


class Perplexity(NamedTuple):
    batch: Float[Tensor, ""]
    image: Float[Tensor, ""]


@over_group
@full_precision
def perplexity(bow: Float[Tensor, "n words"]) -> Perplexity:
    """Compute exp of the entropy of the batch's mean bag, and its mean over bags; 1 where one word has everything.

    Args:
        bow: bags of words, rows that sum to 1.

    Raises ValueError for another shape and an empty batch.

    >>> perplexity(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).image.round()
    tensor(1.)
    """
    if bow.ndim != 2:
        raise ValueError(f"bow must be [n, words], got {list(bow.shape)}")
    need_rows(bow=bow)

    def of(t: Tensor) -> Tensor:
        return (-(t * (t + 1e-5).log()).sum(-1)).exp()

    total = gather_rows(bow.sum(0, keepdim=True)).sum(0)
    return Perplexity(of(total / total.sum()), global_mean(of(bow)))
