"""Define losses that contrast a row's positive with negatives: of the batch, of a bank, or of given similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.distributed import gather_rows
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, unit_rows


class NTXent(Loss):
    """NT-Xent (SimCLR): two views of an example are each other's positive; all other rows of the batch are negatives.

    Args:
        temperature: Divisor of the similarities, > 0.
        similarity: "cos", the cosine, or "dot", the product of the rows as they are.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim] | projections of the first views, of any norm |
        | z2 | [n, dim] | projections of the second views, in the same order |

    Relations: DCL is this loss without the positive in its denominator. SupCon is this loss with the whole class as
    positives. CLIP contrasts only the two sides with each other. MoCo takes its negatives from a queue.

    Source: Chen et al., arXiv 2002.05709, Eq. 1.

    >>> NTXent(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.9048)
    """

    calls = "simclr:nt_xent"

    def __init__(
        self,
        temperature: float = 0.5,
        similarity: Literal["cos", "dot"] = "cos",
        *,
        ring: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.similarity, self.ring = temperature, similarity, ring

    def forward(self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean loss of all 2n rows."""
        with over(self.group):
            return self.function(z1, z2, self.temperature, self.similarity, ring=self.ring)


class ColumnInfoNCE(Loss):
    """BSS's loss for SimCLR: on a grid of contents and views, positives share the row and negatives share the column.

    Args:
        temperature: Divisor of the similarities, > 0.
        normalize: Divide projections by their norm.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z | [n, views, dim] | projections of at least two views; all images of a view have one style |

    Relations: NTXent also has the other views of other contents as negatives. `counterpoint.functional.transfer_style` makes
    the views.

    Source: Scalbert et al., arXiv 2303.06088.

    >>> ColumnInfoNCE()(torch.eye(4)[:, None].expand(4, 2, 4))
    tensor(0.3408)
    """

    calls = "bss:column_infonce"

    def __init__(self, temperature: float = 0.5, *, normalize: bool = True, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.normalize = temperature, normalize

    def forward(self, z: Float[Tensor, "n views dim"]) -> Float[Tensor, ""]:
        """Return the mean loss over all rows and ordered pairs of columns."""
        with over(self.group):
            return self.function(z, self.temperature, self.normalize)


class InfoNCE(Loss):
    """InfoNCE with a bank of negatives that all queries share.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        group: Processes whose queries and negatives together are compared: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | query | [n, dim] | anchors |
        | positive | [n, dim] | the positive of each query |
        | negatives | [negatives, dim] | rows that are no query's positive; without any row the loss is 0 |

    All rows are normalised. Relations: MoCo is this loss with a queue as the bank. NTXent makes the other rows of the batch
    negatives. MACILSD is four of these losses between semi-bags.

    Source: van den Oord et al., arXiv 1807.03748.

    >>> InfoNCE(temperature=1.0)(torch.eye(2), torch.eye(2), torch.zeros(1, 2))
    tensor(0.3133)
    """

    calls = "macil-sd:info_nce"

    def __init__(self, temperature: float = 0.1, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self, query: Float[Tensor, "n dim"], positive: Float[Tensor, "n dim"], negatives: Float[Tensor, "negatives dim"]
    ) -> Float[Tensor, ""]:
        """Return the mean loss of all queries."""
        with over(self.group):
            rows = (gather_rows(x) for x in (query, positive, negatives))
            return self.function(*rows, self.temperature)


class DCL(Loss):
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator. With `weight_sigma` it is DCLW.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        weight_sigma: Sigma of DCLW's weights on the positives (0.5 in the paper). None: no weights.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        detach_weight: Treat the weights as constants. False: differentiate them, too.
        symmetric: Use the rows of both sides as anchors. False: only those of z1.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim], n >= 2 | projections of the first views |
        | z2 | [n, dim] | projections of the second views, in the same order |

    Relations: NTXent has the positive in its denominator too. The loss has no lower bound.

    Source: Yeh et al., arXiv 2110.06848, Eqs. 6 and 7.

    >>> DCL(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.3863)
    """

    calls = "dcl:dcl"

    def __init__(
        self,
        temperature: float = 0.1,
        weight_sigma: float | None = None,
        *,
        normalize: bool = True,
        detach_weight: bool = True,
        symmetric: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.weight_sigma, self.normalize = temperature, weight_sigma, normalize
        self.detach_weight, self.symmetric = detach_weight, symmetric

    def forward(self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean loss of all anchors."""
        with over(self.group):
            return self.function(
                z1, z2, self.temperature, self.weight_sigma, self.normalize, self.detach_weight, self.symmetric
            )


class NTXentByIndex(Loss):
    """NT-Xent with any number of views of an example: its positives are summed inside the logarithm (AdaInf).

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z | [n, dim] | projections of all views |
        | index | [n] | number of the example that each row is a view of; every number occurs at least twice |

    Relations: with two views of each example this is NTXent. SupCon has the sum over positives outside the logarithm.

    Source: Wang, Zhang and Wang, arXiv 2403.12448, as in the authors' code.

    >>> NTXentByIndex(temperature=1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    tensor(0.5514)
    """

    calls = "adainf:ntxent_by_index"

    def __init__(self, temperature: float = 0.2, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, z: Float[Tensor, "n dim"], index: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean loss of all rows."""
        with over(self.group):
            return self.function(z, index, self.temperature)


class PairwiseNTXent(Loss):
    """The mean of NT-Xent over every pair of views: the baseline of CACR.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | views | [views, n, dim], or a list of [n, dim] | projections of two views or more |

    Relations: with two views this is NTXent.

    Source: Zheng et al., arXiv 2105.03746 (the baseline).

    >>> PairwiseNTXent(temperature=1.0)(torch.eye(3).expand(2, 3, 3))
    tensor(0.9048)
    """

    calls = "cacr:pairwise_nt_xent"

    def __init__(self, temperature: float = 0.2, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, views: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"]) -> Float[Tensor, ""]:
        """Return the mean over all pairs of views."""
        with over(self.group):
            return self.function(views, self.temperature)


class SnippetNTXent(Loss):
    """NT-Xent as audio-sheet retrieval trains with it. It requires at least two rows and finite values.

    Args:
        temperature: Divisor of the similarities, > 0. The paper uses 0.6 for audio and 0.5 for sheet music.
        normalize: Divide each row by its norm. False: use the rows unchanged, for encoders that end in unit rows.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim], n >= 2 | embeddings of the first views |
        | z2 | [n, dim] | embeddings of the second views, in the same order |

    Relations: equals NTXent, which also accepts a single row. MixedNTXent is this loss of two modalities at once.

    Source: Carvalho, Washuettl and Widmer, arXiv 2309.12134.

    >>> SnippetNTXent(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.9048)
    """

    calls = "audio-sheet-retrieval:nt_xent"

    def __init__(self, temperature: float = 0.5, *, normalize: bool = True, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.normalize = temperature, normalize

    def forward(self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean loss of all 2n rows."""
        with over(self.group):
            rows = (unit_rows(z, normalize=self.normalize) for z in (z1, z2))
            return self.function(*rows, self.temperature)


class MixedNTXent(Loss):
    """NT-Xent of two modalities at once: each modality's views are also negatives of the other modality.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | sheet1, sheet2 | [n, dim] | two views of n items of one modality, in the same order |
        | audio1, audio2 | [m, dim] | two views of m items of the other modality, not necessarily the same items |

    Relations: SnippetNTXent of all 2(n + m) rows.

    Source: Carvalho, Washuettl and Widmer, arXiv 2309.12134.

    >>> MixedNTXent(temperature=1.0)(torch.eye(4)[:2], torch.eye(4)[:2], torch.eye(4)[2:], torch.eye(4)[2:])
    tensor(1.1654)
    """

    calls = "audio-sheet-retrieval:mixed_nt_xent"

    def __init__(self, temperature: float = 0.6, *, normalize: bool = True, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.normalize = temperature, normalize

    def forward(
        self,
        sheet1: Float[Tensor, "n dim"],
        sheet2: Float[Tensor, "n dim"],
        audio1: Float[Tensor, "m dim"],
        audio2: Float[Tensor, "m dim"],
    ) -> Float[Tensor, ""]:
        """Return the mean loss of all rows."""
        with over(self.group):
            rows = (unit_rows(z, normalize=self.normalize) for z in (sheet1, sheet2, audio1, audio2))
            return self.function(*rows, self.temperature)


class SimpleContrastive(Loss):
    """Linear contrastive loss of given similarities: the mean of -s+ plus the weighted nearest negatives.

    Args:
        weight: Lambda, the weight of the summed negatives. None: 1 / (number of kept negatives that count).
        keep_fraction: Share of the negatives to keep, the nearest ones; above 0, at most 1 (all).
        group: Processes whose anchors are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | positive | [n] | similarity of each anchor with its positive |
        | negatives | [n, negatives] | similarities with its negatives; -inf for one that does not count |

    Relations: the limit of HardContrastive for a large temperature.

    Source: Wang and Liu, arXiv 2012.09740, Eqs. 6 and 9.

    >>> SimpleContrastive(keep_fraction=1.0)(torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]))
    tensor(-0.7500)
    """

    calls = "hard-contrastive:simple_contrastive"

    def __init__(self, weight: float | None = None, keep_fraction: float = 0.0819, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(keep_fraction=keep_fraction)
        self.weight, self.keep_fraction = weight, keep_fraction

    def forward(self, positive: Float[Tensor, " n"], negatives: Float[Tensor, "n negatives"]) -> Float[Tensor, ""]:
        """Return the mean loss of all anchors."""
        with over(self.group):
            return self.function(gather_rows(positive), gather_rows(negatives), self.weight, self.keep_fraction)
