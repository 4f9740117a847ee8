"""Routes to two experts: the numbers of DeepSpeed's gate, capacity, balance, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.routing import capacity_of

PARITY = np.load(Path(__file__).parents[1] / "parity" / "llava-mod.npz")


def case(number: int, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))


# The vectors are float32, so float64 is exact to their rounding.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
@pytest.mark.parametrize("number", [3, 4])
def test_gate_equals_deepspeed_in_weights_balance_and_gradient(number, dtype, rtol):
    logits = case(number, "in/gate_logits").to(dtype).requires_grad_()
    numbers = float(case(number, "param/capacity_factor")), int(case(number, "param/min_capacity"))
    gate = fn.top2_gate(logits, case(number, "in/gumbel_noise").to(dtype), *numbers)
    torch.testing.assert_close(gate.combine, case(number, "out/combine_weights").to(dtype), rtol=rtol, atol=1e-7)
    torch.testing.assert_close(gate.balance, case(number, "out/aux_loss").to(dtype), rtol=rtol, atol=0)
    assert torch.equal((gate.combine > 0), case(number, "out/dispatch_mask").bool())
    routes = fn.top2_routes(logits)
    assert torch.equal(routes.experts[:, 0].bincount(minlength=4), case(number, "out/exp_counts"))
    gate.balance.backward()
    torch.testing.assert_close(logits.grad, case(number, "grad/gate_logits_aux").to(dtype), rtol=1e-5, atol=1e-7)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_sum_to_one_without_a_capacity():
    routes = fn.top2_routes(normal(50, 5))
    torch.testing.assert_close(routes.weights.sum(1), torch.ones(50, dtype=torch.float64))
    assert bool((routes.experts[:, 0] != routes.experts[:, 1]).all())
    assert routes.capacity is None


def test_a_capacity_that_drops_nothing_changes_no_weight():
    logits = normal(50, 5)
    routes = fn.top2_routes(logits, None, 5.0)
    torch.testing.assert_close(routes.weights, fn.top2_routes(logits).weights)


def test_a_token_with_one_dropped_choice_has_weight_one_at_the_other_and_none_with_two():
    # All tokens choose expert 0 first and expert 1 second; each takes one.
    routes = fn.top2_routes(torch.tensor([[3.0, 2.0, 0.0, -1.0]] * 3), None, 0.5)
    assert routes.capacity == 1
    assert routes.weights[0].sum() == pytest.approx(1)
    assert routes.weights[1:].tolist() == [[0, 0], [0, 0]]
    mixed = fn.top2_routes(torch.tensor([[3.0, 2.0, 0.0, -1.0], [3.0, 0.0, 2.0, -1.0]]), None, 0.5)
    assert mixed.weights[1].tolist() == [0, 1]


def test_noise_changes_the_second_choice_alone():
    logits = normal(40, 4)
    noisy, plain = fn.top2_routes(logits, 5 * normal(40, 4, seed=1)), fn.top2_routes(logits)
    assert torch.equal(noisy.experts[:, 0], plain.experts[:, 0])
    assert not torch.equal(noisy.experts[:, 1], plain.experts[:, 1])


def test_balance_is_one_for_even_choices_and_the_number_of_experts_for_one_dead_set():
    even = torch.eye(4, dtype=torch.float64) * 1e-9
    assert float(fn.top2_routes(even).balance) == pytest.approx(1)
    assert float(fn.top2_routes(torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6)).balance) == pytest.approx(4)


def test_least_capacity_counts_for_few_tokens():
    assert capacity_of(1, 4, 1.5, 0) == 1
    assert capacity_of(1, 4, 1.5, 4) == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fn.top2_routes(torch.zeros(3, 1)), "at least two experts"),
        (lambda: fn.top2_routes(torch.zeros(3, 4), torch.zeros(3, 3)), "noise must have the shape"),
        (lambda: fn.top2_routes(torch.zeros(3, 4), None, -1.0), "capacity_factor"),
        (lambda: fn.top2_routes(torch.zeros(3, 4), None, 1.0, -1), "min_capacity"),
        (lambda: fn.top2_routes(torch.zeros(0, 4)), "empty batch"),
    ],
)
def test_bad_input_raises_an_error_that_names_the_argument(call, said):
    with pytest.raises(ValueError, match=said):
        call()
