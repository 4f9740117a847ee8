"""Define losses on the tokens of transformers, of pictures and texts. Teachers get no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.memory import Queue
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss

Mask = Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"] | Float[Tensor, "n tokens"]


class TokenRelation(Loss):
    """Token relations of a layer: the student's attention, and its relations of values, follow the teacher's.

    Args:
        group: Processes whose pictures are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_qkv | three of [n, heads, tokens, d] | queries, keys and values |
        | teacher_qkv | three of [n, heads, tokens, dt] | those of as many heads and tokens; no gradient |

    Relations: KD compares classes of a picture; this loss compares, for each token, all tokens of the picture.

    Source: TinyMIM (Ren et al., CVPR 2023, arXiv 2301.01296), as in Hybrid Distill, arXiv 2306.15876.

    >>> qkv = list(torch.eye(3).expand(3, 1, 1, 3, 3))
    >>> TokenRelation()(qkv, qkv)
    tensor(0.)
    """

    calls = "hybrid-distill:relation_distillation_loss"

    def forward(
        self,
        student_qkv: Sequence[Float[Tensor, "n heads tokens d"]],
        teacher_qkv: Sequence[Float[Tensor, "n heads tokens dt"]],
    ) -> Float[Tensor, ""]:
        """Return the mean over pictures, heads and rows of the two divergences' sum."""
        with over(self.group):
            return self.function(student_qkv, teacher_qkv)


class TokenFeature(Loss):
    """Token features: the student's tokens, mapped by this module's projector, follow the teacher's normalised tokens.

    Args:
        student: Width of the student's tokens.
        teacher: Width of the teacher's tokens.
        transition: Error at which the loss changes from squared to absolute, > 0.
        group: Processes whose pictures are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_tokens | [n, tokens, student] | the student's last tokens |
        | teacher_tokens | [n, tokens, teacher] | the teacher's at the same places; no gradient |

    State: `projector`, whose parameters must be in the optimiser.

    Relations: FitNets compares maps by squared error, without the teacher's normalisation.

    Source: feature distillation (Wei et al., arXiv 2205.14141), as in Hybrid Distill, arXiv 2306.15876.

    >>> TokenFeature(8, 4)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)).shape
    torch.Size([])
    """

    calls = "hybrid-distill:feature_distillation_loss"

    def __init__(self, student: int, teacher: int, *, transition: float = 2.0, group: Group = None) -> None:
        super().__init__(group)
        need_positive(student=student, teacher=teacher, transition=transition)
        self.student, self.teacher, self.transition = student, teacher, transition
        self.projector = nn.Linear(student, teacher)

    def forward(
        self, student_tokens: Float[Tensor, "n tokens student"], teacher_tokens: Float[Tensor, "n tokens teacher"]
    ) -> Float[Tensor, ""]:
        """Return the mean over pictures, tokens and channels."""
        with over(self.group):
            return self.function(student_tokens, teacher_tokens, self.projector, self.transition)


class PairedHinge(Loss):
    """VidLanKD's hinge: each token is nearer to its text's video than to the video of one other text of the batch.

    Args:
        margin: Margin of the hinge.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | lang | [n, tokens, dim] | tokens, unit vectors |
        | video | [n, dim] or [n, tokens, dim] | the video of each text, or one for each token; unit vectors |
        | mask | [n, tokens] | not 0 at tokens, 0 at padding; default: all are tokens |

    Relations: BatchHinge compares with all others of the batch, this loss with one.

    Source: Tang et al., arXiv 2107.02681, Sec. 3.1.

    >>> PairedHinge()(torch.eye(2)[:, None], torch.eye(2))
    tensor(0.)
    """

    calls = "vidlankd:paired_hinge_loss"

    def __init__(self, margin: float = 1.0, *, group: Group = None) -> None:
        super().__init__(group)
        self.margin = margin

    def forward(
        self,
        lang: Float[Tensor, "n tokens dim"],
        video: Float[Tensor, "n dim"] | Float[Tensor, "n tokens dim"],
        mask: Mask | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over tokens of the hinge."""
        with over(self.group):
            return self.function(lang, video, mask, self.margin)


class NST(Loss):
    """NST of tokens: the student's neurons have the teacher's activations over a sentence, by a kernel of degree 2.

    Args:
        reduction: "sum" over sentences (the authors') or "mean".
        group: Processes whose sentences are reduced together: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_tokens | [n, tokens, dim] | of any norm |
        | teacher_tokens | [n, tokens, teacher_dim] | of the same sentences, of any width; no gradient |
        | mask | [n, tokens] | not 0 at tokens, 0 at padding; default: all are tokens |

    Relations: TokenRelation compares attention between tokens, this loss neurons.

    Source: Huang and Wang, arXiv 1707.01219, as in VidLanKD, arXiv 2107.02681.

    >>> NST()(torch.eye(2)[None], torch.eye(2)[None])
    tensor(-0.2500)
    """

    calls = "vidlankd:nst_loss"

    def __init__(self, reduction: Literal["sum", "mean"] = "sum", *, group: Group = None) -> None:
        super().__init__(group)
        self.reduction = reduction

    def forward(
        self,
        student_tokens: Float[Tensor, "n tokens dim"],
        teacher_tokens: Float[Tensor, "n tokens teacher_dim"],
        mask: Mask | None = None,
    ) -> Float[Tensor, ""]:
        """Return the reduced discrepancy; it may be negative."""
        with over(self.group):
            return self.function(student_tokens, teacher_tokens, mask, self.reduction)


class TokenContrast(Loss):
    """Contrast of tokens: at each position, a sentence's student is nearer to its own teacher than to other sentences.

    Args:
        temperature: Temperature, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_tokens | [n, tokens, dim] | of any norm |
        | teacher_tokens | [n, tokens, dim] | of the same sentences; no gradient |
        | mask | [n, tokens] | not 0 at tokens, 0 at padding; default: all are tokens |

    Relations: NTXent at each position, divided by 2 n, as VidLanKD's code does.

    Source: the code of VidLanKD, arXiv 2107.02681.

    >>> TokenContrast()(torch.eye(2)[:, None], torch.eye(2)[:, None])
    tensor(0.1379)
    """

    calls = "vidlankd:token_contrastive_loss"

    def __init__(self, temperature: float = 1.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        student_tokens: Float[Tensor, "n tokens dim"],
        teacher_tokens: Float[Tensor, "n tokens dim"],
        mask: Mask | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over positions."""
        with over(self.group):
            return self.function(student_tokens, teacher_tokens, self.temperature, mask)


class TokenCRD(Loss):
    """CRD of tokens: a token's teacher against tokens of earlier batches, one by one, in a bank.

    Args:
        dim: Width of the tokens.
        bank: Number of tokens in the bank, all of which are negatives.
        temperature: Temperature, > 0.
        seed: Seed of the bank's initial noise; the same on every process.
        group: Processes whose batches together form the batch and enter the bank: None (this process), a ProcessGroup, or
            "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_tokens | [n, tokens, dim] | of any norm |
        | teacher_tokens | [n, tokens, dim] | of the same sentences; no gradient |
        | mask | [n, tokens] | not 0 at tokens, 0 at padding; default: all are tokens |

    State: `bank`, a queue of unit rows. In training mode the teacher's tokens enter it after the loss is computed.

    Relations: CRD has a memory for each sample; this loss keeps the latest tokens.

    Source: Tian et al., arXiv 1910.10699, as in VidLanKD, arXiv 2107.02681.

    >>> TokenCRD(dim=2, bank=4)(torch.eye(2)[None], torch.eye(2)[None]).shape
    torch.Size([])
    """

    calls = "vidlankd:token_crd_loss"

    def __init__(
        self, dim: int, bank: int = 16384, temperature: float = 0.07, *, seed: int = 0, group: Group = None
    ) -> None:
        super().__init__(group)
        need_positive(dim=dim, bank=bank, temperature=temperature)
        self.dim, self.temperature = dim, temperature
        self.bank = Queue(bank, dim, seed=seed)

    def extra_repr(self) -> str:
        """Return the settings by name, with the size of the bank."""
        return f"bank={len(self.bank.rows)}, " + super().extra_repr()

    def forward(
        self,
        student_tokens: Float[Tensor, "n tokens dim"],
        teacher_tokens: Float[Tensor, "n tokens dim"],
        mask: Mask | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over tokens, then write the bank."""
        with over(self.group):
            rows = self.bank.rows
            loss: Tensor = self.function(student_tokens, teacher_tokens, rows, self.temperature, None, mask)
            if self.training:
                real = torch.ones(teacher_tokens.shape[:2], dtype=torch.bool) if mask is None else mask != 0
                self.bank.write(teacher_tokens[real])
        return loss
