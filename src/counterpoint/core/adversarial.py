"""Train a critic to tell real examples from made ones: losses of its logits, and a penalty of its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group


@over_group
@full_precision
def contrastive_discriminator(real: Float[Tensor, ...], fake: Float[Tensor, ...]) -> Float[Tensor, ""]:
    r"""Compute half(r, f) + half(-f, -r): each logit of one kind is contrasted with all logits of the other.

    half(r, f) = mean_i [ -r_i + log( e^{r_i} + sum_j e^{f_j} ) ]

    Args:
        real: logits r of original pictures, of any shape.
        fake: logits f of restored pictures, of any shape.

    Returns:
        The loss, a scalar; for one logit each it is 2 log(1 + e^(f - r)). Time and memory are linear in the logits.

    Raises ValueError where one kind has no logits. Source: PCL-SR's code (arXiv
    2111.13924), after the dual contrastive loss of Yu et al., arXiv 2103.16748.

    >>> contrastive_discriminator(torch.zeros(1), torch.zeros(1))  # 2 log 2
    tensor(1.3863)
    """
    r, f = real.flatten(), fake.flatten()
    need_rows(real=r, fake=f)
    r, f = gather_rows(r), gather_rows(f)
    return F.softplus(f.logsumexp(0) - r).mean() + F.softplus((-r).logsumexp(0) + f).mean()


@over_group
@full_precision
def hinge_discriminator(
    real: Float[Tensor, " n"], fake: Float[Tensor, " n"], wrong: Float[Tensor, " m"]
) -> Float[Tensor, ""]:
    """Compute mean relu(1 - real) + [ mean relu(1 + fake) + mean relu(1 + wrong) ] / 2.

    Args:
        real, fake: logits of real and of made pictures, each with its condition.
        wrong: logits of real pictures with the condition of another picture; any number of them.

    Raises ValueError for an empty batch of real or made pictures. Source: the code of DF-GAN and GALIP (arXiv 2301.12959).

    >>> hinge_discriminator(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    tensor(2.)
    """
    need_rows(real=real, fake=fake)
    others = global_mean(F.relu(1 + fake)) + global_mean(F.relu(1 + wrong))
    return global_mean(F.relu(1 - real)) + others / 2


def gradient_penalty(
    logits: Float[Tensor, " n"], inputs: Sequence[Float[Tensor, n * rest]], weight: float = 2.0, power: float = 6.0
) -> Float[Tensor, ""]:
    """Compute weight mean_b |g_b|^power, with g_b the gradient of a real pair's logit with respect to its inputs.

    With a picture's features and its condition as inputs it is the matching-aware gradient penalty. It makes the critic smooth
    where the target of training lies.

    Args:
        logits: logits of real pairs, each a function of its own row of the inputs.
        inputs: the inputs, which require a gradient. g_b is the concatenation of the gradients of row b.
        weight, power: factor and exponent; by default 2 and 6, as published.

    Source: Tao et al., "DF-GAN", CVPR 2022, arXiv 2008.05865.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> gradient_penalty((2 * x).sum(1), [x], weight=1.0, power=2.0).item()
    12.0
    """
    slopes = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    squares = torch.stack([slope.float().flatten(1).square().sum(1) for slope in slopes]).sum(0)
    return weight * global_mean(squares.clamp(min=torch.finfo(squares.dtype).tiny) ** (power / 2))


@over_group
@full_precision
def conditional_discriminator(
    real: Float[Tensor, " n"],
    matched: Float[Tensor, " n"],
    fake: Float[Tensor, " n"],
    matched_fake: Float[Tensor, " n"],
    wrong: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Compute (real + matched) / 2 + (fake + matched_fake + wrong) / 3, each a mean binary cross-entropy.

    Args:
        real, fake: logits of real and of made pictures without a condition.
        matched, matched_fake: logits of the same pictures with their conditions.
        wrong: logits of real pictures with the condition of another picture; any number of them.

    Raises ValueError for an empty batch. Source: AttnGAN's code, discriminator_loss.

    >>> conditional_discriminator(*[torch.zeros(2)] * 5)  # 2 log 2
    tensor(1.3863)
    """
    need_rows(real=real, matched=matched, fake=fake, matched_fake=matched_fake)
    true = global_mean(F.softplus(-real)) + global_mean(F.softplus(-matched))
    false = global_mean(F.softplus(fake)) + global_mean(F.softplus(matched_fake)) + global_mean(F.softplus(wrong))
    return true / 2 + false / 3
