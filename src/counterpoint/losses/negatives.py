"""Define contrastive losses that keep, synthesise or weight their negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.compared import Compared, Queued
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.memory import Queue, SampleState
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, unit_rows


class MoCo(Loss):
    """MoCo's InfoNCE: each query against its key and a queue of older keys, which this module keeps.

    Args:
        dim: Width of the keys.
        queue: Number of older keys to keep.
        temperature: Divisor of the cosine similarities, > 0. MoCo v1 has 0.07, v2 0.2.
        seed: Seed of the queue's initial noise; the same on every process.
        group: Processes whose keys enter the queue and whose queries are averaged: None (this process), a ProcessGroup, or
            "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | query | [n, dim] | of the network that learns |
        | key | [n, dim] | of the momentum network; no gradient |

    State: `memory` (a queue of unit rows). In training mode the keys enter it after the loss is computed.

    Relations: InfoNCE with a queue as its bank. MoCHi adds negatives that it mixes of the hardest ones.

    Source: He et al., arXiv 1911.05722, Eq. 1.

    >>> loss = MoCo(dim=2, queue=4)
    >>> value = loss(torch.eye(2), torch.eye(2))
    >>> loss.memory.read()[:2]
    tensor([[1., 0.],
            [0., 1.]])
    """

    calls = "moco-v1:moco"

    def __init__(
        self, dim: int, queue: int = 65536, temperature: float = 0.07, *, seed: int = 0, group: Group = None
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.dim, self.queue, self.temperature = dim, queue, temperature
        self.memory = Queue(queue, dim, seed=seed)

    def forward(self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean loss of the queries, then write the keys."""
        with over(self.group):
            loss: Tensor = self.function(query, key, self.memory.read(), self.temperature).loss
            if self.training:
                self.memory.write(key)
        return loss


class MoCHi(Loss):
    """MoCo with synthetic negatives, mixed from the hardest negatives of the queue and from the query.

    Args:
        dim: Width of the keys.
        queue: Number of older keys to keep.
        hardest: Number of each query's hardest negatives to mix from.
        mixed: Number of negatives mixed from two of them.
        mixed_query: Number of negatives mixed from one of them and the query.
        temperature: Divisor of the cosine similarities, > 0.
        seed: Seed of the queue's initial noise; the same on every process.
        group: Processes whose keys enter the queue and whose queries are averaged: None (this process), a ProcessGroup, or
            "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | query | [n, dim] | of the network that learns |
        | key | [n, dim] | of the momentum network; no gradient |
        | generator | | a torch.Generator on the CPU for the mixtures; None: torch's default one |

    State: `memory` (a queue of unit rows). In training mode the keys enter it after the loss is computed.

    Relations: with mixed=0 and mixed_query=0 this is MoCo.

    Source: Kalantidis et al., arXiv 2010.01028.

    >>> loss = MoCHi(dim=4, queue=16, hardest=4, mixed=2, mixed_query=1)
    >>> loss(torch.eye(4), torch.eye(4), torch.Generator().manual_seed(0)).shape
    torch.Size([])
    """

    calls = "mochi:mixed_losses"

    def __init__(
        self,
        dim: int,
        queue: int = 65536,
        hardest: int = 1024,
        mixed: int = 1024,
        mixed_query: int = 128,
        temperature: float = 0.2,
        *,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, hardest=hardest)
        self.dim, self.queue, self.temperature = dim, queue, temperature
        self.hardest, self.mixed, self.mixed_query = hardest, mixed, mixed_query
        self.memory = Queue(queue, dim, seed=seed)

    def forward(
        self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the mean loss of the queries, then write the keys."""
        with over(self.group):
            random = torch.rand(len(query), self.mixed + self.mixed_query, 3, generator=generator).to(query.device)
            (way,) = Compared(query, key, Queued(self.memory.read()), self.temperature).directions()
            loss = global_mean(self.function(way, self.temperature, random, self.hardest, self.mixed).losses)
            if self.training:
                self.memory.write(key)
        return loss


class HardContrastive(Loss):
    """Contrastive loss of given similarities, over only the nearest negatives.

    Args:
        temperature: Divisor of the similarities, > 0.
        keep_fraction: Share of the negatives to keep, the nearest ones; above 0, at most 1 (all).
        group: Processes whose anchors are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | positive | [n] | similarity of each anchor with its positive |
        | negatives | [n, negatives] | similarities with its negatives; -inf for one that does not count |

    Relations: InfoNCE, of similarities instead of rows, restricted to the nearest negatives. The system trains with the same
    loss of rows, block by block. SimpleContrastive has no exponentials.

    Source: Wang and Liu, arXiv 2012.09740, Eqs. 1 and 8.

    >>> HardContrastive(temperature=0.5)(torch.tensor([1.0]), torch.tensor([[0.0]]))
    tensor(0.1269)
    """

    calls = "hard-contrastive:contrastive"

    def __init__(self, temperature: float = 0.3, keep_fraction: float = 0.0819, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, keep_fraction=keep_fraction)
        self.temperature, self.keep_fraction = temperature, keep_fraction

    def forward(self, positive: Float[Tensor, " n"], negatives: Float[Tensor, "n negatives"]) -> Float[Tensor, ""]:
        """Return the mean loss of all anchors."""
        with over(self.group):
            return self.function(gather_rows(positive), gather_rows(negatives), self.temperature, self.keep_fraction)


class CACR(Loss):
    """Contrastive attraction and contrastive repulsion, without logarithm: far positives and near negatives weigh most.

    Args:
        alpha, beta: Weights of attraction and repulsion, in 0..1e30.
        positive_sharpness, negative_sharpness: Factors of the distances in the weights, in 0..1e30. 0: uniform weights.
        weight_pos, weight_neg: False: uniform weights of the positives, or of the negatives.
        positive_prior: Share of supposed negatives that are positives, in 0..1; the loss corrects for them. None: no correction.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | views | [views, n, dim], or a list of [n, dim] | embeddings of two views or more, n >= 2 |

    Relations: with two views the attraction is plain alignment. CACRMomentum is the form with a momentum encoder.

    Source: Zheng et al., arXiv 2105.03746.

    >>> CACR()(torch.eye(2).expand(2, 2, 2))
    tensor(-2.)
    """

    calls = "cacr:cacr"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        positive_sharpness: float = 1.0,
        negative_sharpness: float = 0.9,
        *,
        weight_pos: bool = True,
        weight_neg: bool = True,
        positive_prior: float | None = None,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        self.alpha, self.beta = alpha, beta
        self.positive_sharpness, self.negative_sharpness = positive_sharpness, negative_sharpness
        self.weight_pos, self.weight_neg = weight_pos, weight_neg
        self.positive_prior, self.normalize = positive_prior, normalize

    def forward(self, views: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"]) -> Float[Tensor, ""]:
        """Return attraction plus repulsion."""
        with over(self.group):
            terms = self.function(
                [unit_rows(view, normalize=self.normalize) for view in views],
                self.alpha,
                self.beta,
                self.positive_sharpness,
                self.negative_sharpness,
                self.weight_pos,
                self.weight_neg,
                self.positive_prior,
            )
        return terms.attraction + terms.repulsion


class CACRMomentum(Loss):
    """CACR of several views' predictions with a momentum encoder's keys of another view.

    Args:
        temperature: Temperature, > 0.
        cost: "rbf" (cross-entropy) or "euclidean" (expected costs).
        reduction: Reduction over examples, "mean" or "sum". None: the authors' choice, "mean" for "rbf" and "sum" for
            "euclidean".
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | queries | [views, n, dim], or a list of [n, dim] | predictions of one view or more |
        | key | [n, dim] | of the momentum encoder; no gradient |

    Relations: CACR is the form without a momentum encoder. With one view and "rbf", MoCo v3's loss without its symmetry.

    Source: Zheng et al., arXiv 2105.03746.

    >>> CACRMomentum()(torch.eye(2)[None], torch.eye(2))
    tensor(0.6265)
    """

    calls = "cacr:cacr_momentum"

    def __init__(
        self,
        temperature: float = 1.0,
        cost: Literal["rbf", "euclidean"] = "rbf",
        reduction: Literal["mean", "sum"] | None = None,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.cost, self.reduction = temperature, cost, reduction

    def forward(
        self,
        queries: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"],
        key: Float[Tensor, "n dim"],
    ) -> Float[Tensor, ""]:
        """Return the loss of all views."""
        with over(self.group):
            return self.function(queries, key, self.temperature, self.cost, self.reduction)


class IsoGCLR(Loss):
    """iSogCLR: a global contrastive loss in which every training example learns its own temperature.

    Args:
        examples: Number of training examples.
        temperature: Initial temperature of every example. None: 0.1, or 0.01 with pairs.
        pairs: The two sides are two modalities, each with its own temperatures (form B of the authors' code). False: two
            views (form A).
        rho: Divergence at which a temperature does not change. None: 0.4, or 6 with pairs.
        gamma: Share of a new value in an example's moving average, in 0..1.
        eta: Learning rate of the temperatures. 0: fixed temperatures (SogCLR).
        beta_u: Share of a new gradient in a temperature's momentum, in 0..1.
        temperature_min: Smallest temperature. None: 0.05, or 0.005 with pairs.
        temperature_max: Largest temperature.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all). Each
            process keeps all states.

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim], n >= 2 | embeddings of the first views, or of the first modality |
        | z2 | [n, dim] | embeddings of the second, in the same order |
        | index | [n] | positions of the examples in the training set, all different |

    State: `states`, numbers for each example: the moving average s, the momentum u, the temperature tau (and b with pairs).
    `temperatures()` returns the temperatures. In training mode a forward pass updates the states of its batch.

    The gradient is that of the paper's loss. The value is that of a surrogate and may be negative.

    Relations: with eta=0 it is SogCLR. With eta=0 and gamma=1, its gradient is NTXent's without the positive in the
    denominator (DCL's).

    Source: Qiu et al., arXiv 2305.11965, Algorithm 1.

    >>> loss = IsoGCLR(examples=10)
    >>> value = loss(torch.eye(2), torch.eye(2), torch.tensor([4, 2]))
    >>> loss.temperatures().shape
    torch.Size([10])
    """

    calls = "isogclr:isogclr_step"

    def __init__(
        self,
        examples: int,
        temperature: float | None = None,
        *,
        pairs: bool = False,
        rho: float | None = None,
        gamma: float = 0.8,
        eta: float = 0.03,
        beta_u: float = 0.9,
        temperature_min: float | None = None,
        temperature_max: float = 1.0,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        self.examples, self.pairs, self.normalize = examples, pairs, normalize
        self.rho = (6.0 if pairs else 0.4) if rho is None else rho
        self.gamma, self.eta, self.beta_u = gamma, eta, beta_u
        self.temperature_min = (0.005 if pairs else 0.05) if temperature_min is None else temperature_min
        self.temperature_max = temperature_max
        self.temperature = (0.01 if pairs else 0.1) if temperature is None else temperature
        need_positive(temperature=self.temperature, temperature_min=self.temperature_min)
        if not self.temperature_min <= self.temperature <= temperature_max:
            raise ValueError(
                f"temperature must lie in {self.temperature_min}..{temperature_max}, got {self.temperature}"
            )
        names = [a + b for a in ("s", "u", "tau", "b") for b in ("_I", "_T")] if pairs else ["s", "u", "tau"]
        self.states = nn.ModuleDict(
            {n: SampleState(examples, initial=self.temperature if n.startswith("tau") else 0.0) for n in names}
        )

    def temperatures(self) -> Float[Tensor, " examples"]:
        """Return the temperature of every example; with pairs, the mean of its two temperatures."""
        values = [state.values for name, state in self._states().items() if name.startswith("tau")]
        return torch.stack(values).mean(0)

    def _states(self) -> dict[str, SampleState]:
        return {name: state for name, state in self.states.items() if isinstance(state, SampleState)}

    def forward(
        self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], index: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Return the surrogate loss, and update the states of these examples in training mode."""
        sides = [unit_rows(z, normalize=self.normalize) for z in (z1, z2)]
        state = {name: kept.values for name, kept in self._states().items()}
        with over(self.group):
            loss, after = self.function(
                state,
                index,
                tuple(sides) if self.pairs else torch.stack(sides, 1),
                self.rho,
                self.gamma,
                self.eta,
                self.beta_u,
                self.temperature_min,
                self.temperature_max,
                5.0 if self.pairs else 3.0,
                fresh=True,
            )
            if self.training:
                for name, kept in self._states().items():
                    kept.update(index, after[name][index])
        found: Tensor = loss
        return found
