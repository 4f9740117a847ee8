"""TinyCLIP: the authors' numbers, both ways to inherit, the cut, stages, resuming, bad input."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core import hard_concrete as hc
from counterpoint.core.masked_transformer import cut_transformer_block
from counterpoint.encoders.towers import Gates, ImageTower, Shape, TextTower
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.distillation import tinyclip as file

PARITY = np.load(Path(__file__).parents[1] / "parity" / "tinyclip.npz")
ROWS = ("student_image", "student_text", "teacher_image", "teacher_text")


def get(case: int, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(np.asarray(PARITY[f"case{case}/{name}"])).clone()
    return value.to(dtype) if value.is_floating_point() else value


def number(case: int, name: str) -> float:
    return PARITY[f"case{case}/param/{name}"].item()


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}


# --- equations


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affinity_loss_and_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    u, v, taught_u, taught_v = (get(case, f"in/{name}", dtype) for name in ROWS)
    scale = torch.tensor(number(case, "student_scale"), dtype=dtype, requires_grad=True)
    u.requires_grad_()
    v.requires_grad_()
    found = fn.affinity_mimicking_loss(u, v, scale, taught_u, taught_v, number(case, "teacher_scale"))
    for name in ("loss", "loss_i2t", "loss_t2i"):
        torch.testing.assert_close(getattr(found, name), get(case, f"out/{name}", dtype), **close(dtype))
    found.loss.backward()
    for value, name in ((u, "student_image"), (v, "student_text"), (scale, "student_scale")):
        torch.testing.assert_close(
            value.grad,
            get(case, f"grad/{name}", dtype),
            rtol=close(dtype)["rtol"],
            atol=1e-5 if dtype == torch.float32 else 1e-12,
        )
    torch.testing.assert_close(file._pairs_loss(u, v, scale), get(case, "out/clip_loss", dtype), **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_sizes_and_pressure_equal_the_authors(dtype: torch.dtype) -> None:
    kinds = ("hidden", "heads", "intermediate")
    logits = [get(2, f"in/{kind}_loga", dtype).requires_grad_() for kind in kinds]
    for kind, logit in zip(kinds, logits, strict=True):
        z = fn.hard_concrete_sample(logit, get(2, f"in/u_{kind}", dtype))
        torch.testing.assert_close(z, get(2, f"out/z_train_{kind}", dtype), **close(dtype))
        torch.testing.assert_close(
            fn.hard_concrete_eval_mask(logit), get(2, f"out/z_eval_{kind}", dtype), **close(dtype)
        )
    C, I, H, layers = (int(number(2, name)) for name in ("hidden_size", "intermediate_size", "num_heads", "num_layers"))  # noqa: E741
    size = fn.expected_model_size(*logits, C, I, H, layers)
    torch.testing.assert_close(size, get(2, "out/expected_size", dtype), **close(dtype))
    whole = hc.prunable_size(C, I, H, layers)
    assert whole == float(get(2, "out/prunable_size"))
    sparsity = 1 - size / whole
    torch.testing.assert_close(sparsity, get(2, "out/expected_sparsity", dtype), **close(dtype))
    target = hc.scheduled_sparsity(
        number(2, "start_sparsity"), number(2, "target_sparsity"), number(2, "step"), number(2, "warmup")
    )
    assert target == pytest.approx(float(get(2, "out/target_sparsity")))
    multipliers = [torch.tensor(number(2, name), dtype=dtype, requires_grad=True) for name in ("lambda_1", "lambda_2")]
    loss = fn.sparsity_lagrangian(sparsity, target, *multipliers)
    torch.testing.assert_close(loss, get(2, "out/lagrangian", dtype), **close(dtype))
    loss.backward()
    names = [f"grad/{kind}_loga" for kind in kinds] + ["grad/lambda_1", "grad/lambda_2"]
    for value, name in zip([*logits, *multipliers], names, strict=True):
        torch.testing.assert_close(value.grad, get(2, name, dtype), **close(dtype))


def test_the_pressure_pushes_a_network_that_is_too_large() -> None:
    e, one, two = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 10.0, 4.0))
    loss = fn.sparsity_lagrangian(e, 0.5, one, two)
    loss.backward()
    assert loss.item() == pytest.approx(10 * 0.3 + 4 * 0.09)
    assert (e.grad, one.grad, two.grad) == (pytest.approx(-10 - 8 * 0.3), pytest.approx(0.3), pytest.approx(0.09))


def test_manual_inheritance_equals_the_authors_exactly() -> None:
    teacher = {
        name.removeprefix("case3/in/teacher."): torch.from_numpy(PARITY[name])
        for name in PARITY
        if name.startswith("case3/in/teacher.")
    }
    expected = {
        name.removeprefix("case3/out/student."): torch.from_numpy(PARITY[name])
        for name in PARITY
        if name.startswith("case3/out/student.")
    }
    found = fn.inherit_weights(
        {name: torch.zeros_like(value) for name, value in expected.items()}, teacher, int(number(3, "head_dim"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name.removeprefix("case4/weight/"): torch.from_numpy(PARITY[name]).to(dtype)
        for name in PARITY
        if name.startswith("case4/weight/")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_block_equals_the_authors(dtype: torch.dtype) -> None:
    z = [get(4, f"in/{name}", dtype) for name in ("hidden_z", "heads_z", "intermediate_z")]
    found = fn.masked_transformer_block(
        get(4, "in/x", dtype), weights(dtype), *z, int(number(4, "num_heads")), bool(number(4, "causal"))
    )
    torch.testing.assert_close(found, get(4, "out/y", dtype), **close(dtype))


@pytest.mark.parametrize("absent", ["nothing", "heads", "neurons"])
def test_a_cut_block_computes_what_the_masked_block_does(absent: str) -> None:
    hidden, heads, neurons = (get(4, f"in/{name}") for name in ("hidden_z", "heads_z", "intermediate_z"))
    heads, neurons = heads * (absent != "heads"), neurons * (absent != "neurons")
    x, whole = get(4, "in/x"), weights(torch.float64)
    masked = fn.masked_transformer_block(x, whole, hidden, heads, neurons, 2, True)
    at = hidden.nonzero().flatten()
    cut = cut_transformer_block(whole, hidden, heads, neurons)
    smaller = fn.masked_transformer_block(x[..., at], cut, None, None, None, int((heads != 0).sum()), True)
    torch.testing.assert_close(smaller, masked[..., at], rtol=1e-12, atol=1e-12)
    assert torch.equal(masked[..., hidden == 0], x[..., hidden == 0])
