"""Answers of language models: the divergence from a teacher at chosen positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.core.answers import masked_token_kl

MASK = torch.tensor([[True, False, True, True], [False, True, False, False]])


def logits(seed: int, tokens: int = 4) -> Tensor:
    return 3 * torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_is_the_sum_over_words_and_the_mean_over_chosen_positions():
    student, teacher = logits(0), logits(1)
    p = (teacher[MASK] / 2).softmax(-1)
    wanted = (p * (p.log() - F.log_softmax(student[MASK] / 2, -1))).sum(-1).mean()
    torch.testing.assert_close(masked_token_kl(student, teacher, MASK, 2.0), wanted, rtol=1e-12, atol=0)


def test_only_the_student_gets_a_gradient_and_only_at_chosen_positions():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    masked_token_kl(student, teacher, MASK).backward()
    assert teacher.grad is None
    assert bool((student.grad[~MASK] == 0).all())
    difference = (student[MASK].softmax(-1) - teacher[MASK].softmax(-1)) / MASK.sum()
    torch.testing.assert_close(student.grad[MASK], difference.detach())


def test_logits_at_other_positions_may_be_nan():
    student, teacher = logits(0).masked_fill(~MASK[..., None], torch.nan), logits(1)
    assert bool(masked_token_kl(student, teacher, MASK).isfinite())


def test_equal_logits_at_different_places_have_no_divergence():
    student = logits(0, 6)
    there = torch.zeros(2, 6, dtype=torch.bool)
    there[:, 2:] = MASK
    assert float(masked_token_kl(student[:, 2:], student, MASK, teacher_mask=there)) == pytest.approx(0, abs=1e-15)


def test_a_high_temperature_makes_the_divergence_vanish():
    assert float(masked_token_kl(logits(0), logits(1), MASK, 1e6)) < 1e-9


def test_the_divergence_without_a_chosen_position_is_zero():
    student = logits(0).requires_grad_()
    found = masked_token_kl(student, logits(1), torch.zeros_like(MASK))
    found.backward()
    assert float(found.detach()) == 0
    assert bool((student.grad == 0).all())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"teacher": logits(1)[..., :4]}, "teacher"),
        ({"mask": MASK[:, :3]}, r"mask must be bool of \[2, 4\]"),
        ({"mask": MASK.long()}, "mask must be bool"),
        ({"teacher_mask": MASK.flip(0)}, "as many positions in each row"),
        ({"student": logits(0)[:0], "teacher": logits(1)[:0], "mask": MASK[:0]}, "student is an empty batch"),
    ],
)
def test_bad_input_raises_an_error_that_names_the_argument(changed, said):
    given = {"student": logits(0), "teacher": logits(1), "mask": MASK} | changed
    with pytest.raises(ValueError, match=said):
        masked_token_kl(**given)
