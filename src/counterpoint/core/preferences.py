"""Losses of preferences: a better and a worse answer to one prompt, against a reference model.

Source: Direct Preference Optimization (Rafailov et al., arXiv 2305.18290); further losses where they stand.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.answers import answer_log_probability
from counterpoint.core.checks import need_alike, need_positive, need_rows, need_within, need_word, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group

Preference = Literal["sigmoid", "hinge", "ipo", "kto_pair"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
Scoring = Literal["label", "runner_up"]


@full_precision
def runner_up_log_probability(
    logits: Float[Tensor, "n tokens vocabulary"], labels: Int[Tensor, "n tokens"]
) -> Float[Tensor, " n"]:
    """Compute the log-probability of the most probable other tokens, summed over an answer's tokens.

    Args:
        logits, labels: as in `counterpoint.core.answers.masked_lm_loss`. At each token of the answer the most probable token that
            is not the answer's counts, in place of the answer's.

    >>> runner_up_log_probability(torch.zeros(1, 2, 4), torch.tensor([[-100, 1]]))
    tensor([-1.3863])
    """
    need_rows(logits=logits)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError("labels must be [n, tokens] of logits, got " + shapes(logits=logits, labels=labels))
    if logits.shape[2] < 2:
        raise ValueError("a vocabulary of one token has no other token, got " + shapes(logits=logits))
    here = labels[:, 1:] != IGNORED
    found = logits[:, :-1][here]
    other = found.detach().scatter(1, labels[:, 1:][here][:, None], -torch.inf).argmax(1)
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(here)[here]
    return found.new_zeros(len(labels)).index_add(0, rows, -F.cross_entropy(found, other, reduction="none"))


@full_precision
def preference_margin(
    policy_chosen: Float[Tensor, " n"],
    policy_rejected: Float[Tensor, " n"],
    reference_chosen: Float[Tensor, " n"],
    reference_rejected: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Compute how much more the policy prefers the better answers than the reference does.

    Args:
        policy_chosen, policy_rejected: log-probabilities of the answers by the model that learns.
        reference_chosen, reference_rejected: the same by the reference.

    >>> preference_margin(*torch.tensor([[1.0], [0.0], [0.5], [0.5]]))
    tensor([1.])
    """
    given = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    need_alike("n", **given)
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


@full_precision
def dpo_loss(margin: Float[Tensor, " n"], beta: float = 0.1, *, hinge: bool = False) -> Float[Tensor, " n"]:
    """Compute DPO's loss of each pair: -log sigmoid(beta margin), or max(0, 1 - beta margin).

    Args:
        margin: of `preference_margin`.
        beta: > 0.
        hinge: take the hinge.

    >>> dpo_loss(torch.zeros(1))
    tensor([0.6931])
    """
    need_rows(margin=margin)
    need_positive(beta=beta)
    scaled = beta * margin
    return (1 - scaled).clamp(min=0) if hinge else F.softplus(-scaled)


@over_group
@full_precision
def preference_loss(
    policy_chosen: Float[Tensor, " n"],
    policy_rejected: Float[Tensor, " n"],
    reference_chosen: Float[Tensor, " n"],
    reference_rejected: Float[Tensor, " n"],
    beta: float = 0.1,
    kind: Preference = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " losses"]:
    """Compute the losses of pairs by the gains u+ and u- of log-probability over the reference.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: as in `preference_margin`.
        beta: > 0.
        kind: "sigmoid": -log sigmoid(beta (u+ - u-)), DPO. "hinge": max(0, 1 - beta (u+ - u-)). "ipo":
            ((u+ - u-) - 1 / (2 beta))^2. "kto_pair": 1 - sigmoid(beta (u+ - K-)) of the better answers, then
            1 - sigmoid(beta (K+ - u-)) of the worse ones. K+ and K- are the batch's means of u+ and u-, at least 0, with gradient.
        label_smoothing: share of wrong preferences, 0..0.5, for "sigmoid" alone.

    Returns a loss for each pair; "kto_pair": two. Raises ValueError for shapes that differ and values out of range.
    Source: DPO; SLiC (arXiv 2305.10425); IPO (arXiv 2310.12036), not divided by lengths; KTO (arXiv 2402.01306) in the form of
    pairs that LLaVA-MoD (arXiv 2408.15881) trains with.

    >>> x = torch.zeros(1)
    >>> preference_loss(x, x, x, x), preference_loss(x, x, x, x, kind="kto_pair")
    (tensor([0.6931]), tensor([0.5000, 0.5000]))
    """
    need_word(PREFERENCES, kind=kind)
    need_positive(beta=beta)
    need_within(0, 0.5, label_smoothing=label_smoothing)
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"label_smoothing is for kind sigmoid alone, got {label_smoothing} for {kind}")
    margin = preference_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    if kind == "sigmoid":
        found = dpo_loss(margin, beta)
        return found if not label_smoothing else found + label_smoothing * beta * margin
    if kind == "hinge":
        return dpo_loss(margin, beta, hinge=True)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    better, worse = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    # Gathered: the gradient of a mean must hold the losses of all processes.
    mean_better, mean_worse = (gather_rows(rows).mean().clamp(min=0) for rows in (better, worse))
    return torch.cat([torch.sigmoid(-beta * (better - mean_worse)), torch.sigmoid(-beta * (mean_better - worse))])


@full_precision
def regularized_dpo(
    policy_chosen_logits: Float[Tensor, "n tokens vocabulary"],
    policy_rejected_logits: Float[Tensor, "n others vocabulary"],
    reference_chosen_logits: Float[Tensor, "n tokens vocabulary"],
    reference_rejected_logits: Float[Tensor, "n others vocabulary"],
    chosen_labels: Int[Tensor, "n tokens"],
    rejected_labels: Int[Tensor, "n others"],
    beta: float = 0.1,
    alpha: float = 1 / 1024,
    rejected_scoring: Scoring = "label",
    hinge: bool = False,
) -> Float[Tensor, " n"]:
    """Compute the loss of each pair: DPO, and the likelihood of the better answer.

    Args:
        policy_chosen_logits, policy_rejected_logits: logits of the model that learns, for both answers.
        reference_chosen_logits, reference_rejected_logits: those of the reference, without gradient.
        chosen_labels, rejected_labels: tokens of the answers, -100 elsewhere.
        beta: > 0, strength of the reference.
        alpha: at least 0, weight of the negative log-probability of the better answer, summed over its tokens.
        rejected_scoring: "label": the worse answer's own tokens. "runner_up": at each of them, the most probable other token.
        hinge: as in `dpo_loss`.

    Raises ValueError for shapes that do not fit and numbers out of range.
    Source: STIC (Deng et al., arXiv 2405.19716): the paper scores labels, its code runners-up.

    >>> x, y = torch.zeros(1, 2, 4), torch.tensor([[-100, 1]])
    >>> regularized_dpo(x, x, x, x, y, y, alpha=0.0)
    tensor([0.6931])
    """
    need_within(0, float("inf"), alpha=alpha)
    if rejected_scoring not in ("label", "runner_up"):
        raise ValueError(f"rejected_scoring must be label or runner_up, got {rejected_scoring!r}")
    worse = answer_log_probability if rejected_scoring == "label" else runner_up_log_probability
    chosen = answer_log_probability(policy_chosen_logits, chosen_labels)
    with torch.no_grad():
        reference = answer_log_probability(reference_chosen_logits, chosen_labels)
        reference_worse = worse(reference_rejected_logits, rejected_labels)
    margin = preference_margin(chosen, worse(policy_rejected_logits, rejected_labels), reference, reference_worse)
    return dpo_loss(margin, beta, hinge=hinge) - alpha * chosen
