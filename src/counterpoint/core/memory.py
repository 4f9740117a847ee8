"""The memory of a loss between steps: a queue of keys, a row or a number per training example, class prototypes.

All of it is buffers of modules. It moves with `.to`, the state dict saves and resumes it, and no optimiser changes it. Across
processes every write first gathers all processes' rows, in rank order. So all processes hold the same memory if they
started from the same seed. Writes are in place, so read before you write. (`read` and `lookup` return copies, which a
later backward pass may still need.)
"""

from __future__ import annotations

import importlib
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_numbers, need_positive, need_rows, need_within, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds


def _noise(rows: int, dim: int, seed: int | torch.Generator) -> Float[Tensor, "rows dim"]:
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, device=generator.device)


def unit_noise(rows: int, dim: int, seed: int | torch.Generator) -> Float[Tensor, "rows dim"]:
    """Draw normalised Gaussian rows, uniform on the sphere."""
    return F.normalize(_noise(rows, dim, seed), dim=1)


def _rectified(rows: int, dim: int, seed: int | torch.Generator) -> Float[Tensor, "rows dim"]:
    return _noise(rows, dim, seed).clamp_(min=0)


def latest(index: Int[Tensor, " n"]) -> Int[Tensor, " distinct"]:
    """Return the last position of each distinct value of `index`, so that a write has one defined result.

    >>> latest(torch.tensor([5, 2, 5, 7])).tolist()
    [1, 2, 3]
    """
    order = index.argsort(stable=True)
    run = index[order]
    last = torch.ones_like(run, dtype=torch.bool)
    last[:-1] = run[1:] != run[:-1]
    return order[last]


def moved(rows: Float[Tensor, "n dim"], values: Float[Tensor, "n dim"], momentum: float) -> Float[Tensor, "n dim"]:
    """Compute unit(momentum * rows + (1 - momentum) * values), the step of a moving average on the sphere."""
    return unit(torch.lerp(values.to(rows.dtype), rows, momentum)).to(rows.dtype)


def need_positions(index: Tensor, length: int, **values: Tensor) -> None:
    """Raise ValueError unless `index` is a list of positions below `length` and every tensor has a row for each."""
    if index.ndim != 1 or index.is_floating_point():
        raise ValueError(f"index must be a list of whole numbers, got {index.dtype} of shape {list(index.shape)}")
    for name, value in values.items():
        if value.shape[:1] != index.shape:
            raise ValueError(f"{name} must have a row for each index, got {shapes(index=index, **{name: value})}")
    # A negative index would be read from the end without an error.
    need_numbers(length, index=index)


class Queue(nn.Module):
    """First-in-first-out queue of keys (MoCo, arXiv 1911.05722, Sec. 3.2: the dictionary as a queue).

    Args:
        length: number of keys; the queue is always full, at first of normalised Gaussian noise.
        dim: width of a key.
        seed: seed of the noise, a number or a generator; the same on every process.
        owned: whether `owner` stores the example of each key, -1 for none.
        normalize: normalise keys (default); False: keep them as they are, at first the positive parts of the noise, not
            normalised (OBoW, arXiv 2012.11552).

    >>> queue = Queue(4, 2)
    >>> negatives = queue.read()            # of earlier batches
    >>> queue.write(torch.eye(2))           # over the two oldest
    >>> queue.read()[:2]
    tensor([[1., 0.],
            [0., 1.]])
    """

    rows: Float[Tensor, "length dim"]
    pointer: Int[Tensor, ""]
    owner: Int[Tensor, " length"]

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        seed: int | torch.Generator = 0,
        owned: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        need_positive(length=length, dim=dim)
        self.owned, self.normalize = owned, normalize
        self.register_buffer("rows", unit_noise(length, dim, seed) if normalize else _rectified(length, dim, seed))
        self.register_buffer("pointer", torch.tensor(0))  # where the oldest row is
        if owned:
            self.register_buffer("owner", torch.full((length,), -1))

    def read(self) -> Float[Tensor, "length dim"]:
        """Return a copy of all keys, in the order of the ring, not of age."""
        return self.rows.clone()

    @torch.no_grad()
    def write(self, keys: Float[Tensor, "n dim"], owner: Int[Tensor, " n"] | None = None) -> None:
        """Replace the oldest keys by these (of all processes), normalised by default. An owned queue also stores their owners.

        The number of keys is free: the length need not be a multiple of it, and of too many keys the last ones stay.
        Raises ValueError for keys of another width, for owners without an owned queue, and for an owned queue without owners.
        """
        if (owner is not None) != self.owned:
            raise ValueError("owner goes with a queue made with owned=True, and only with that")
        length, dim = self.rows.shape
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be [n, {dim}], got {list(keys.shape)}")
        keys = gather_rows(keys.detach())
        keys = (unit(keys) if self.normalize else keys).to(self.rows.dtype)
        n = len(keys)
        places = torch.arange(max(n - length, 0), n, device=keys.device)
        self.rows[(self.pointer + places) % length] = keys[places]
        if owner is not None:
            self.owner[(self.pointer + places) % length] = gather_rows(owner.to(keys.device))[places]
        self.pointer.add_(n).remainder_(length)


class Bank(nn.Module):
    """One unit row per training example, addressed by its position in the data set; a moving average of its embeddings.

    Args:
        length: number of training examples.
        dim: width of a row; rows start as normalised Gaussian noise.
        momentum: share of the old row that stays, 0..1; 0 replaces it.
        seed: seed of the noise, a number or a generator; the same on every process.

    Source: the memory bank of instance discrimination (Wu et al., CVPR 2018, arXiv 1805.01978) and CRD (arXiv 1910.10699).

    >>> bank = Bank(10, 2, momentum=0.0)
    >>> bank.update(torch.tensor([7]), torch.tensor([[0.0, 3.0]]))
    >>> bank.lookup(torch.tensor([7]))
    tensor([[0., 1.]])
    """

    rows: Float[Tensor, "length dim"]

    def __init__(self, length: int, dim: int, *, momentum: float = 0.5, seed: int | torch.Generator = 0) -> None:
        super().__init__()
        need_positive(length=length, dim=dim)
        need_within(0, 1, momentum=momentum)
        self.momentum = momentum
        self.register_buffer("rows", unit_noise(length, dim, seed))

    def lookup(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """Return a copy of the rows of these examples. Raises ValueError for a position outside the bank."""
        need_positions(index, len(self.rows))
        return self.rows[index]

    @torch.no_grad()
    def update(self, index: Int[Tensor, " n"], values: Float[Tensor, "n dim"]) -> None:
        """Set rows[index] <- unit(momentum * rows[index] + (1 - momentum) * values), over all processes' examples.

        If an example occurs twice in a batch, only the last of its values counts (in rank order across processes).
        Raises ValueError for shapes that do not fit or a position outside the bank.
        """
        need_positions(index, len(self.rows), values=values)
        if values.shape[1:] != self.rows.shape[1:]:
            raise ValueError(f"values must be [n, {self.rows.shape[1]}], got {list(values.shape)}")
        index, values = gather_rows(index.long()), gather_rows(values.detach())
        last = latest(index)
        self.rows[index[last]] = moved(self.rows[index[last]], values[last], self.momentum)


class SampleState(nn.Module):
    """One number per training example, addressed by its position in the data set: a temperature, a moving average.

    >>> temperature = SampleState(10, initial=0.1)
    >>> temperature.update(torch.tensor([3, 3]), torch.tensor([0.2, 0.3]))
    >>> temperature.lookup(torch.tensor([2, 3]))
    tensor([0.1000, 0.3000])
    """

    values: Float[Tensor, " length"]

    def __init__(self, length: int, *, initial: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        need_positive(length=length)
        self.register_buffer("values", torch.full((length,), initial, dtype=dtype))

    def lookup(self, index: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return a copy of the numbers of these examples. Raises ValueError for a position outside the data set."""
        need_positions(index, len(self.values))
        return self.values[index]

    @torch.no_grad()
    def update(self, index: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> None:
        """Set the numbers of these examples, of all processes. If an example occurs twice, its last number counts.

        Raises ValueError for shapes that do not fit or a position outside the data set.
        """
        need_positions(index, len(self.values), value=value)
        if value.ndim != 1:
            raise ValueError(f"value must be one number for each index, got {list(value.shape)}")
        index, value = gather_rows(index.long()), gather_rows(value.detach())
        last = latest(index)
        self.values[index[last]] = value[last].to(self.values.dtype)


class Prototypes(nn.Module):
    """One unit row per class, the moving average of its examples; a class without an example has a row of zeros.

    Args:
        classes, dim: shape of `rows`. Copy into `rows` to start from other values, such as the centres of `kmeans`.
        momentum: share of a row that stays when one example arrives, 0 to below 1.

    Source: MoPro (Li, Xiong, Hoi, ICLR 2021, arXiv 2009.07995).

    >>> prototypes = Prototypes(3, 2, momentum=0.9)
    >>> prototypes.update(torch.eye(2), torch.tensor([2, 0]))
    >>> prototypes.rows
    tensor([[0., 1.],
            [0., 0.],
            [1., 0.]])
    """

    rows: Float[Tensor, "classes dim"]

    def __init__(self, classes: int, dim: int, *, momentum: float = 0.999) -> None:
        super().__init__()
        need_positive(classes=classes, dim=dim)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in 0..1, 1 not included, got {momentum}")
        self.momentum = momentum
        self.register_buffer("rows", torch.zeros(classes, dim))

    @torch.no_grad()
    def update(self, features: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> None:
        """Set row <- momentum row + (1 - momentum) feature for each example in batch order (of all processes, in rank order).

        Rows are normalised once, at the end; those of other classes stay unchanged. Raises ValueError for shapes that
        do not fit or a label that is no class.
        """
        need_positions(labels, len(self.rows), features=features)
        if features.shape[1:] != self.rows.shape[1:]:
            raise ValueError(f"features must be [n, {self.rows.shape[1]}], got {list(features.shape)}")
        features, labels = gather_rows(features.detach()).to(self.rows.dtype), gather_rows(labels.long())
        # The j-th from last example of a class has decayed j times: all steps at once.
        order = labels.argsort(stable=True)
        classes, place, counts = labels[order].unique_consecutive(return_inverse=True, return_counts=True)
        age = counts.cumsum(0)[place] - 1 - torch.arange(len(labels), device=labels.device)
        weight = (1 - self.momentum) * self.momentum ** age.to(features.dtype)
        rows = self.rows[classes] * self.momentum ** counts.to(features.dtype)[:, None]
        rows.index_add_(0, place, weight[:, None] * features[order])
        self.rows[classes] = unit(rows).to(self.rows.dtype)


class Clusters(NamedTuple):
    centers: Float[Tensor, "k dim"]
    labels: Int[Tensor, " n"]  # the centre nearest to each row


def kmeans(
    features: Float[Tensor, "n dim"], k: int, seed: int = 0, *, library: Literal["sklearn", "faiss"] = "sklearn"
) -> Clusters:
    """Cluster rows with k-means by scikit-learn, or by faiss (faster on millions of rows).

    The two libraries find different clusters of the same data. So the choice never depends on the installed packages.

    Args:
        features: [n, dim] rows.
        k: number of clusters, at most n.
        seed: seed of the initial centres.
        library: sklearn, or faiss, which must be installed.

    Raises ValueError for fewer rows than clusters and for features that are not finite, ImportError without faiss.

    >>> kmeans(torch.tensor([[0.0], [0.1], [5.0]]), 2).centers.sort(0).values.squeeze(1)
    tensor([0.0500, 5.0000])
    """
    need_positive(k=k)
    if features.ndim != 2 or len(features) < k:
        raise ValueError(
            f"features must be [n, dim] with a row for each of the {k} clusters, got {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features holds numbers that are not finite, which belong to no cluster")
    points = features.detach().float().cpu().numpy()
    if library == "faiss":
        found = importlib.import_module("faiss").Kmeans(points.shape[1], k, seed=seed)
        found.train(points)
        centers, labels = found.centroids, found.index.search(points, 1)[1][:, 0]
    else:
        from sklearn.cluster import KMeans

        found = KMeans(k, n_init="auto", random_state=seed).fit(points)
        centers, labels = found.cluster_centers_, found.labels_
    return Clusters(
        torch.from_numpy(centers).to(features), torch.from_numpy(labels).to(device=features.device, dtype=torch.long)
    )


@full_precision
@torch.no_grad()
def nearest_clusters(
    features: Float[Tensor, "n dim"], centers: Float[Tensor, "k dim"], count: int = 8
) -> Int[Tensor, "n count"]:
    """Return the nearest clusters of each row by cosine, the nearest first.

    Args:
        features: rows of a teacher, which this function normalises.
        centers: rows to choose from, such as those of `kmeans`, which this function normalises.
        count: number of clusters of each row, 1 to k - 1; by default 8.

    Raises ValueError for shapes that do not fit, a number out of range, and features that are not finite.

    >>> nearest_clusters(torch.tensor([[1.0, 0.1]]), torch.eye(2), 1)
    tensor([[0]])
    """
    if features.ndim != 2 or centers.ndim != 2 or features.shape[1] != centers.shape[1]:
        raise ValueError(
            f"features and centers must be [n, dim] and [k, dim], got {list(features.shape)}, {list(centers.shape)}"
        )
    need_rows(features=features, centers=centers)
    if not 1 <= count < len(centers):
        raise ValueError(f"count must lie in 1..{len(centers) - 1}, below the number of clusters, got {count}")
    if holds(~(features.isfinite().all() & centers.isfinite().all())):
        raise ValueError("features or centers hold numbers that are not finite, NaN or infinite")
    w = unit(centers)
    found = [(unit(part) @ w.T).topk(count).indices for part in features.split(1024)]
    return torch.cat(found)
