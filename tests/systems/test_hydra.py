"""Hydra against the authors' numbers, its identities and edges; every form and gate trains."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import cli
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.images import hydra as room
from counterpoint.systems.images.hydra import (
    WEIGHTS,
    FeatureFilter,
    HydraConfig,
    draw_partners,
    gated_pair_infonce,
    pair_gate,
)
from interrupted import need_equal_ends

NUMBERS = np.load(Path(__file__).parents[1] / "parity" / "hydra.npz")
CASES = sorted({name.split("/")[0] for name in NUMBERS.files})
DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {"encoder": "mlp-s", "batch_size": 30, "epochs": 1, "evaluate_every": 1, "hidden": 32,
                         "projection": 16, "label_dim": 8, "filter_hidden": 16}  # fmt: skip


def case(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    at = {k.split("/", 1)[1]: NUMBERS[k] for k in NUMBERS.files if k.startswith(f"{name}/")}
    tensors = {
        k: torch.from_numpy(v) for k, v in at.items() if k.startswith(("in/", "weight/", "grad/", "out/")) and v.ndim
    }
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors, {k: float(v) for k, v in at.items() if not v.ndim}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_gate_loss_and_gradients_equal_the_authors_numbers(name: str, dtype: torch.dtype, rtol: float) -> None:
    at, number = case(name, dtype)
    weights = {k: at[f"weight/{k}"].requires_grad_() for k in WEIGHTS}
    z1 = at["in/z1"].requires_grad_()
    z2 = z1 if number["param/same_view"] else at["in/z2"].requires_grad_()
    y1, y2 = at["in/y1"], at["in/y2"]
    gate = pair_gate(y1, y2, weights)
    torch.testing.assert_close(gate.detach(), at["out/gate"], rtol=rtol, atol=rtol)
    options = number["param/temperature"], bool(number["param/renormalise"]), bool(number["param/row_mean"])
    loss = gated_pair_infonce(z1, z2, y1, y2, gate, *options, number["param/alpha"])
    assert float(loss.detach()) == pytest.approx(number["out/loss"], rel=rtol)
    leaves = {"z1": z1, "label_embedding": weights["label_embedding"], "fc2_weight": weights["fc2_weight"]}
    if not number["param/same_view"]:
        leaves["z2"] = z2
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        wanted = at[f"grad/{leaf}"]
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("renormalise", [True, False])
def test_blocks_of_anchors_equal_the_formula_with_a_gated_key_for_each_anchor(
    renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    z1, z2, g = draw(14, 6).requires_grad_(), draw(14, 6, seed=1).requires_grad_(), draw(14, 6, seed=2).sigmoid()
    y1, y2 = torch.arange(14) % 4, (torch.arange(14) + 1) % 4
    if renormalise:
        s = F.cosine_similarity((g * z1)[:, None], g[:, None] * z2[None], dim=2)
    else:
        s = (F.normalize(z1, dim=1) * (g * g - 0.3)) @ F.normalize(z2, dim=1).T
    logits = s / 0.2
    positive, negative = y1 == y2[:, None], (y1 != y1[:, None]) & (y1 != y2[:, None])
    every = torch.stack(
        [-torch.log(x[j].exp() / (x[j].exp() + x[n].exp().sum())) for x, p, n in zip(logits, positive, negative, strict=True)
         for j in p.nonzero().flatten()]
    )  # fmt: skip
    wanted = torch.autograd.grad(every.mean(), (z1, z2), retain_graph=True)
    monkeypatch.setattr(room, "BLOCK", 14 * 4)
    found = gated_pair_infonce(z1, z2, y1, y2, g, 0.2, renormalise, alpha=0.3)
    torch.testing.assert_close(found, every.mean())
    for ours, theirs in zip(torch.autograd.grad(found, (z1, z2)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_without_positives_or_negatives_add_nothing() -> None:
    z, y = draw(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    gone = torch.full((6,), 7)
    ones = torch.ones(6, 4, dtype=torch.float64)
    assert gated_pair_infonce(z, z, y, gone, ones) == 0
    assert gated_pair_infonce(z, z, y, gone, ones, row_mean=True) == 0
    two = z.clone().requires_grad_()
    loss = gated_pair_infonce(two, two, y // 2, 1 - y // 2, ones)  # classes 0 and 1 alone: no negatives in any pair
    assert torch.autograd.grad(loss, two)[0].isfinite().all()
    rows = y < 2
    alone = gated_pair_infonce(two[rows], two[rows], y[rows], 1 - y[rows], ones[rows])
    assert alone == 0
    assert (torch.autograd.grad(alone, two)[0] == 0).all()


def test_equal_rows_and_closed_gates_are_finite() -> None:
    y1, y2 = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([1, 1, 0, 3, 2])
    same = torch.ones(5, 4, dtype=torch.float64)
    # Anchors of classes 0 and 1 see the two others as negatives; those of classes 2 and 3 three.
    expected = torch.tensor([3.0, 3.0, 3.0, 3.0, 4.0, 4.0]).log().mean()
    torch.testing.assert_close(gated_pair_infonce(same, same, y1, y2, same).float(), expected)
    z = draw(5, 4).requires_grad_()
    for renormalise in (True, False):
        loss = gated_pair_infonce(z, z, y1, y2, 0 * same, renormalise=renormalise)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_partners_are_drawn_as_asked() -> None:
    y, g = torch.arange(40) % 5, torch.Generator().manual_seed(0)
    assert torch.equal(draw_partners(y, 5, "identical", g), y)
    assert (draw_partners(y, 5, "distinct", g) != y).all()
    drawn = draw_partners(y, 5, "arbitrary", g)
    assert torch.equal(drawn.bincount(), y.bincount())
    assert not torch.equal(drawn, y)


def test_one_pair_takes_the_running_statistics() -> None:
    module = FeatureFilter(4, 6, 8, 8)
    module(torch.arange(4), torch.arange(4).roll(1))
    mean = module.mean1.clone()
    one = module(torch.tensor([1]), torch.tensor([2]))
    assert torch.equal(module.mean1, mean)
    torch.testing.assert_close(one, module.eval()(torch.tensor([1]), torch.tensor([2])))
    torch.testing.assert_close(one, module(torch.tensor([2]), torch.tensor([1])))
    with pytest.raises(ValueError, match="running"):
        pair_gate(torch.tensor([1]), torch.tensor([2]), {name: getattr(module, name) for name in WEIGHTS})


def test_arguments_and_settings_that_do_not_fit_are_refused_by_name() -> None:
    z, y, g = draw(4, 3), torch.arange(4), torch.ones(4, 3, dtype=torch.float64)
    for call, words in (
        (lambda: gated_pair_infonce(z, z[:3], y, y, g), "z1 and z2 and gate"),
        (lambda: gated_pair_infonce(z, z, y[:2], y, g), "y1 and y2 must be"),
        (lambda: gated_pair_infonce(z, z, y, y, g, 0.0), "temperature"),
        (lambda: FeatureFilter(3, 2, 4, 4)(torch.tensor([0, 3]), torch.tensor([0, 1])), r"0\.\.2"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for settings, words in (
        ({"pairs": "any"}, "pairs"),
        ({"gate": "open"}, "gate"),
        ({"residual": True}, "--form plain"),
        ({"gate_penalty": -1.0}, "gate_penalty"),
    ):
        with pytest.raises(CounterpointError, match=words):
            HydraConfig(**settings)
    with pytest.raises(DataError, match="three classes"):
        room.Hydra(HydraConfig(encoder="mlp-s"), SimpleNamespace(size=8, channels=3, classes=2), 0)


def test_the_functions_that_pass_are_the_functions_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {"pair_gate": [], "gated_pair_infonce": []}

    def counted(name: str) -> Any:
        function = getattr(room, name)

        def call(*args: Any) -> Any:
            found = function(*args)
            calls[name].append((args, found))
            return found

        return call

    for name in calls:
        monkeypatch.setattr(room, name, counted(name))
    rows = Experiment.resolve("hydra", DATA, overrides=SMALL | {"pairs": "distinct"}).run(0)
    ((y1, y2, *_), gates), ((_, _, own, partner, gate, *_), _) = calls["pair_gate"][0], calls["gated_pair_infonce"][0]
    assert (y1 != y2).all()
    assert torch.equal(own, y1)
    assert torch.equal(partner, y2)
    assert torch.equal(gate, gates)
    assert math.isfinite(rows[-1]["train/loss"])
    assert 0 < rows[-1]["train/gate"] < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "none", "pairs": "identical"},
        {"gate": "product", "pairs": "distinct", "symmetric": True, "gate_penalty": 0.1},
        {"form": "plain", "residual": True, "learn_temperature": True, "row_mean": True, "images_per_class": 3},
    ],
)
def test_every_gate_and_form_trains(settings: dict[str, Any]) -> None:
    rows = Experiment.resolve("hydra", DATA, overrides=SMALL | settings).run(0)
    assert math.isfinite(rows[-1]["train/loss"])


@pytest.mark.usefixtures("drawn")
def test_a_run_from_the_command_line_shows_the_gates(tmp_path: Path) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main(["train", "hydra", "--data", DATA, *words, "--out", str(tmp_path), "--name", "one"]) == 0
    assert "Gates of class pairs" in (tmp_path / "one" / "report.html").read_text(encoding="utf-8")


def test_interrupted_and_resumed_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Experiment.resolve("hydra", DATA, overrides=SMALL | {"epochs": 2}).config
    need_equal_ends(monkeypatch, room.Hydra, "hydra", config, DATA, (1, 2), tmp_path)
