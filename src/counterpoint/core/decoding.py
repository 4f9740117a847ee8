"""Choose the next token of an answer, and score answers and layers by two sets of logits (ICD, DoLa)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_rows, need_within, shapes
from counterpoint.core.precision import full_precision, wide

FLOOR = -1000.0  # score of an implausible token in an answer, as in the authors' codes


def plausible(logits: Float[Tensor, "n vocabulary"], beta: float) -> Bool[Tensor, "n vocabulary"]:
    """Return the tokens whose probability is at least beta times that of the most probable token.

    Args:
        logits: any per-row constant may be added.
        beta: 0..1; 0 keeps all tokens.

    The most probable token is always kept, and ties with it are kept. Raises ValueError for beta outside 0..1.
    Source: adaptive plausibility constraint (Li et al., "Contrastive Decoding", arXiv 2210.15097).

    >>> plausible(torch.tensor([[0.0, -1.0, -5.0]]), 0.1)
    tensor([[ True,  True, False]])
    """
    need_within(0, 1, beta=beta)
    if beta == 0:
        return torch.ones_like(logits, dtype=torch.bool)
    logits = wide(logits)
    return logits >= logits.amax(1, keepdim=True) + math.log(beta)


def sharpened(
    scores: Float[Tensor, "n vocabulary"], temperature: float = 1.0, top_p: float = 1.0
) -> Float[Tensor, "n vocabulary"]:
    """Compute the probabilities that tokens are drawn with.

    Args:
        scores: logits, or minus infinity for tokens that are left out; at least one token of a row is finite.
        temperature: at least 0. At 0 the most probable token has probability 1, the first of equal ones.
        top_p: keep the fewest tokens whose probabilities sum to at least this share, above 0 to 1. The draws are from these.

    >>> sharpened(torch.tensor([[2.0, 1.0, 0.0]]), 0.0)
    tensor([[1., 0., 0.]])
    """
    if not 0 < top_p <= 1 or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and top_p above 0 to 1, got {temperature} and {top_p}")
    scores = wide(scores)
    if temperature == 0:
        return torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
    probabilities = (scores / temperature).softmax(1)
    if top_p < 1:
        ordered, at = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        kept = torch.zeros_like(probabilities).scatter(1, at, ordered.masked_fill(before >= top_p, 0.0))
        probabilities = kept / kept.sum(1, keepdim=True)
    return probabilities


def draw(probabilities: Float[Tensor, "n vocabulary"], uniform: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Draw a token of each row by inverting the cumulative probabilities.

    Args:
        probabilities: rows sum to 1.
        uniform: numbers in 0..1, 1 not included. A row's token depends on its own number alone.

    A token of probability 0 is never drawn.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]), torch.tensor([0.1, 0.9]))
    tensor([0, 2])
    """
    if uniform.shape != probabilities.shape[:1]:
        raise ValueError(
            "uniform must have a number for each row, got " + shapes(uniform=uniform, probabilities=probabilities)
        )
    total = probabilities.double().cumsum(1)
    at = torch.searchsorted(total, (uniform.double() * total[:, -1])[:, None], right=True)[:, 0]
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(1).to(torch.int8).argmax(1)
    return torch.minimum(at, last)


@full_precision
def contrastive_answer_score(
    final_logits: Float[Tensor, "tokens vocabulary"],
    other_logits: Float[Tensor, "tokens vocabulary"],
    answer_ids: Int[Tensor, " tokens"],
    relative_top: float = 0.0,
    post_softmax: bool = False,
    floor: float = FLOOR,
) -> Float[Tensor, ""]:
    """Compute the score of an answer by the difference of two log-probabilities, summed over its tokens.

    Args:
        final_logits: those that predict each token of the answer.
        other_logits: of the amateur (ICD), or of an early layer (DoLa).
        answer_ids: tokens of the answer.
        relative_top: least probability of a token in shares of the largest, 0..1; 0 keeps all.
        post_softmax: normalise the differences over the vocabulary, before implausible tokens get the floor.
        floor: score of implausible tokens.

    >>> x = torch.zeros(1, 2)
    >>> contrastive_answer_score(x, torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    tensor(0.6201)
    """
    need_alike("tokens vocabulary", final_logits=final_logits, other_logits=other_logits)
    if answer_ids.shape != final_logits.shape[:1]:
        raise ValueError(
            "answer_ids must have a token for each row, got " + shapes(answer_ids=answer_ids, final_logits=final_logits)
        )
    scores = final_logits.log_softmax(1) - other_logits.log_softmax(1)
    scores = scores.log_softmax(1) if post_softmax else scores
    scores = scores.masked_fill(~plausible(final_logits, relative_top), floor)
    return scores.gather(1, answer_ids[:, None]).sum()


@full_precision
def select_premature_layer(
    final_logits: Float[Tensor, "n vocabulary"], early_logits: Float[Tensor, "layers n vocabulary"]
) -> Int[Tensor, " n"]:
    """Choose DoLa's early layer for each row: the one whose distribution differs most from the last layer's.

    The difference is Jensen and Shannon's divergence, averaged over the vocabulary. Of equal layers the first is chosen.

    Args:
        final_logits: those of the last layer.
        early_logits: those of the candidates.

    Source: Chuang et al., "DoLa", arXiv 2309.03883.

    >>> select_premature_layer(torch.tensor([[5.0, 0.0]]), torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]]))
    tensor([1])
    """
    need_rows(final_logits=final_logits, early_logits=early_logits)
    if early_logits.ndim != 3 or early_logits.shape[1:] != final_logits.shape:
        raise ValueError(
            "early_logits must be [layers, n, vocabulary], got "
            + shapes(final_logits=final_logits, early_logits=early_logits)
        )
    last, early = final_logits.log_softmax(-1)[None], early_logits.log_softmax(-1)
    middle = (0.5 * (last.exp() + early.exp())).log()
    divergence = (middle.exp() * (2 * middle - last - early)).mean(-1)
    return divergence.argmax(0)
