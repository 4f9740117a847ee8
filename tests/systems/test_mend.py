"""MEND: the authors' numbers, identities, stages, truncation, resuming, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mend.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
GIVEN = (
    "student_logits",
    "teacher_logits",
    "query_ids",
    "query_mask",
    "answer_mask",
    "teacher_mask",
    "teacher_demo_mask",
)


def case(number: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def settings(at: dict[str, Tensor]) -> tuple[int, float, float]:
    return int(at["param/num_vectors"]), float(at["param/temperature"]), float(at["param/kl_weight"])


@TYPES
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("number", [0, 1])
def test_losses_and_gradients_equal_the_authors(number, stage, dtype, rtol):
    at = case(number, dtype)
    given = [at[f"in/{name}"] for name in GIVEN]
    given[0].requires_grad_()
    loss = getattr(fn.context_distillation_losses(*given, *settings(at)), stage)
    torch.testing.assert_close(loss, at[f"out/loss_{stage}"], rtol=rtol, atol=rtol)
    loss.backward()
    torch.testing.assert_close(given[0].grad, at[f"grad/student_logits_{stage}"], rtol=10 * rtol, atol=rtol)


@TYPES
def test_scores_equal_the_authors(dtype, rtol):
    at = case(2, dtype)
    found = fn.candidate_scores(
        at["in/student_logits"],
        at["in/candidate_ids"],
        at["in/answer_mask"],
        at["in/real_class_mask"],
        int(at["param/num_vectors"]),
        int(at["param/num_class"]),
    )
    torch.testing.assert_close(found, at["out/class_scores"], rtol=rtol, atol=rtol)
