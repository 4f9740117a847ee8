"""What an optimiser does besides stepping: schedules by epoch, clipping, rates and decays by kind of parameter."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from counterpoint.engine import optim
from counterpoint.engine.optim import OptimConfig, optimisers
from counterpoint.errors import CounterpointError


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_rate_and_decay_follow_their_cosines_and_what_is_saved_is_numbers(tmp_path):
    config = OptimConfig(lr=0.1, weight_decay=0.04, final_weight_decay=0.4, warmup_epochs=2)
    net = network()
    turn = optimisers(config, [net], 10, 512, constant=net[2].parameters())
    (optimizer,), (schedule,) = turn.optimizers, turn.schedules
    for epoch in range(10):
        share = (epoch + 1) / 2 if epoch < 2 else 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        decay = 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * epoch / 10))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.2 if group["still"] else 0.2 * share)
            assert group["weight_decay"] == pytest.approx(0.0 if group["flat"] else decay)
        optimizer.step()
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "schedule")
    state = torch.load(tmp_path / "schedule", weights_only=True)
    (other,) = optimisers(config, [net], 10, 512, constant=net[2].parameters()).schedules
    other.load_state_dict(state)
    assert other.last_epoch == 10


def test_decay_stays_and_biases_have_a_rate_of_their_own():
    config = OptimConfig(optimizer="adamw", lr=0.2, bias_lr=0.005, beta2=0.95)
    turn = optimisers(config, [network()], 10, 256)
    (optimizer,), (schedule,) = turn.optimizers, turn.schedules
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        assert group["initial_lr"] == (0.005 if group["flat"] else 0.2)
        assert all((p.ndim < 2) == group["flat"] for p in group["params"])
        assert group["weight_decay"] == (0.0 if group["flat"] else 1e-4)
        assert group["betas"] == (0.9, 0.95)
    optimisers(OptimConfig(optimizer="sgd", beta2=0.95), [network()], 10, 256)  # has no beta


@pytest.mark.parametrize("norm", [None, 0.5, 1e6])
def test_gradients_are_clipped_by_the_norm_of_all(norm):
    net = network()
    config = OptimConfig(optimizer="momentum", lr=1.0, weight_decay=0, clip_norm=norm)
    (optimizer,) = optimisers(config, [net], 1, 256).optimizers
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, net.parameters(), strict=True)])
    whole = math.sqrt(len(moved))
    assert moved.norm().item() == pytest.approx(min(norm or whole, whole), rel=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"clip_norm": 0.0}, {"bias_lr": -1.0}, {"beta2": 1.0}, {"final_weight_decay": -0.1}, {"lr": 0.0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(CounterpointError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def test_sgd_is_plain_momentum_and_nesterov_is_named():
    for name, nesterov in (("sgd", False), ("SGD", False), ("momentum", False), ("nesterov", True)):
        (optimizer,) = optimisers(OptimConfig(optimizer=name), [network()], 10, 256).optimizers
        assert all(group["nesterov"] is nesterov and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_sgd_steps_as_the_papers_write_it():
    """Two steps on f(w) = w: v = 1, then v = 1 + 0.9; w = -lr (1 + 1.9)."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)
    (optimizer,) = optimisers(OptimConfig(lr=1.0, weight_decay=0.0), [weight], 10, 256).optimizers
    for _ in range(2):
        optimizer.zero_grad()
        weight.weight.sum().backward()
        optimizer.step()
    assert weight.weight.item() == pytest.approx(-2.9)


@pytest.mark.parametrize("constant", [True, False])
def test_a_factor_scales_the_rate_throughout(constant):
    fixed = network()
    plain, third = (
        optimisers(OptimConfig(lr=0.3), [fixed], 4, 256, fixed.parameters() if constant else (), rate=rate)
        for rate in (1.0, 1 / 3)
    )
    for epoch in range(4):
        rates = [turn.optimizers[0].param_groups[0]["lr"] for turn in (plain, third)]
        assert rates[0] == pytest.approx(3 * rates[1])
        assert (rates[0] == 0.3) == (constant or epoch == 0)
        for turn in (plain, third):
            turn.optimizers[0].step()
            turn.schedules[0].step()


def test_rate_follows_the_same_curve_by_steps():
    """Four steps an epoch: at the end of each epoch both schedules agree; within it the rate moves."""
    by_epoch, by_step = (
        optimisers(OptimConfig(lr=0.1, warmup_epochs=2, schedule=unit), [network()], 10, 256, steps_per_epoch=4)
        for unit in ("epoch", "step")
    )
    (whole,), (fine,) = by_epoch.schedules, by_step.schedules
    assert (whole.per_step, fine.per_step) == (False, True)
    seen = []
    for turn in (by_epoch, by_step):
        turn.optimizers[0].step()
    for epoch in range(10):
        for _ in range(4):
            seen.append(by_step.optimizers[0].param_groups[0]["lr"])
            fine.step()
        if epoch < 2:  # the warm-up ends its epoch at the rate that the whole epoch has
            assert seen[-1] == pytest.approx(by_epoch.optimizers[0].param_groups[0]["lr"])
        whole.step()
        if epoch >= 1:
            assert by_step.optimizers[0].param_groups[0]["lr"] == pytest.approx(
                by_epoch.optimizers[0].param_groups[0]["lr"]
            )
    assert seen[0] == pytest.approx(0.1 / 8)
    assert max(seen) == pytest.approx(0.1)
    assert len(set(seen)) > 30
    with pytest.raises(CounterpointError, match="schedule"):
        OptimConfig(schedule="week")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
        (torch.optim.AdamW, {"weight_decay": 1e-2, "fused": True}),
        (torch.optim.LBFGS, {"history_size": 4, "line_search_fn": "strong_wolfe"}),
    ],
)
def test_a_light_optimiser_takes_the_same_steps(kind, options):
    def trained(made):
        network = nn.Linear(5, 3)
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimizer, hooked = made(network.parameters(), lr=0.1, **options), []
        optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
        x, y = torch.sin(torch.arange(40.0)).view(8, 5), torch.arange(8) % 3

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return [p.detach() for p in network.parameters()], optimizer.state_dict()["state"], len(hooked)

    plain, light = trained(kind), trained(optim.light(kind))
    assert light[2] == plain[2] == 4
    for a, b in zip(light[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(light[1], plain[1], rtol=0, atol=0)


def test_training_does_not_import_the_compiler(tmp_path):
    code = (
        "import sys; from counterpoint.cli import main; "
        "main(['train', 'simclr', '--data', 'digits?size=8&train=64', '--epochs', '1', '--batch-size', '32', "
        f"'--out', {str(tmp_path / 'run')!r}]); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_curve_of_ones_own_follows_the_warm_up():
    from counterpoint.engine.optim import restarts

    config = OptimConfig(optimizer="adam", lr=1.0, warmup_epochs=2)
    turn = optimisers(config, [nn.Linear(2, 2)], 8, 256, curve=restarts(8, 2, weight=0.5))
    rates = []
    for _ in range(8):
        rates.append(turn.optimizers[0].param_groups[0]["lr"])
        turn.optimizers[0].step()
        turn.schedules[0].step()
    half = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert rates == pytest.approx([half[0] / 2, half[1], *half[2:], *(x / 2 for x in half)])
    assert restarts(8, 1, floor=0.1)(8) == pytest.approx(0.1)


def test_first_epochs_are_held_and_a_short_fit_has_none():
    from counterpoint.engine.optim import held_then_cosine

    curve = held_then_cosine(5, 2, 0.01)
    assert [curve(epoch) for epoch in range(6)] == pytest.approx([0.01, 0.01, 1.0, 0.75, 0.25, 0.0])
    assert held_then_cosine(2, 2, 0.01)(0) == 1
