"""Every public function on a GPU that is not there: fake tensors have a device, shapes and types, and no values.

An operation that needs a value makes the processor wait for a GPU. A fake tensor raises an error there, and where a CUDA tensor
meets a CPU tensor. The kernels do nothing here; tests/core/test_compiled_kernels.py compiles them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map

from function_cases import CASES
from test_functional import arguments, floats, function_of

# These select rows by values, or count them, and so wait for a GPU in each call. A function that no longer waits is taken off.
WAITING = {
    "answer_log_probability", "flag_weighted_lm_loss", "masked_lm_loss", "masked_token_kl", "dynamic_selection",
    "regularized_dpo", "runner_up_log_probability", "weak_guided_contrast", "local_region_contrastive_loss",
    "token_contrastive_loss", "token_crd_loss", "mlm_distill", "semi_bag_contrast", "crd", "triplet_hard",
    "partition_contrastive_loss", "pix_contrast", "pixel_regression", "pixpro_loss", "paired_hinge_loss", "ntxent_by_index",
    "transfer_style", "cacr", "margin_cluster_loss", "mlcd_loss", "mimic_loss", "candidate_scores",
    "context_distillation_losses", "tree_contrast", "supremix_loss",
}  # fmt: skip


def on_gpu(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value


def waits(place: str) -> bool:
    """Return whether a function needs a value. Raises its error where tensors of two devices meet."""
    case = CASES[place]
    given = arguments(case, 24, torch.float32)
    function_of(place)(*arguments(case, 24, torch.float32))  # tables that are made once get values
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = [tree_map(on_gpu, argument) for argument in given]
        for number in case.through:
            if isinstance(moved[number], Tensor):
                moved[number].requires_grad_()
        try:
            found = floats(function_of(place)(*moved))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
        except RuntimeError as error:
            if ".numpy()" not in str(error):
                raise
            return True
    assert {x.device.type for x in found} <= {"cuda"}, place
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.filterwarnings("ignore")
def test_functions_keep_to_one_device_and_only_the_named_ones_wait() -> None:
    assert {place.split(":")[1] for place in CASES if waits(place)} == WAITING
