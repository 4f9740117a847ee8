"""SupReMix: the authors' numbers, identities, blocks, edges, training on all inputs, both regressors, resuming, processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import counterpoint as cp
from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core import label_mixtures
from counterpoint.core.label_mixtures import BetaShares, Groups, Terms
from counterpoint.core.world import leave
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.search import Encoder
from counterpoint.systems.supervision import supremix as file
from counterpoint.tasks.regression import RegressionEvaluator
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "supremix.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "digit-numbers?train=48&test=24&watched=16"
SMALL: dict[str, Any] = {
    "encoder": "mlp-s", "recipe": "digits-plain", "epochs": 2, "finetune_epochs": 1, "batch_size": 12, "projection": 8,
    "evaluate_every": 9,
}  # fmt: skip


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int, n: int = 6, dim: int = 5) -> Tensor:
    return F.normalize(draw(seed, n, 2, dim), dim=2)


def shares(n: int, seed: int = 9) -> Tensor:
    return draw(seed, 2 * n, 2 * n).sigmoid()


TARGETS = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 2.5], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- authors' numbers


def case(number: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a case, and all of its arrays."""
    prefix = f"case{number}/"
    names = [name for name in PARITY if name.startswith(prefix)]
    at: dict[str, Any] = {name.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[name])) for name in names}
    given = [at["in/features"].to(dtype).requires_grad_(), at["in/labels"].to(dtype)]
    alpha = at["in/alpha_neg"].to(dtype) if "in/alpha_neg" in at else None
    return [*given, float(at["param/temperature"]), float(at["param/window"]), alpha, int(at["param/weight_power"])], at


@TYPES
@pytest.mark.parametrize("number", range(4))
def test_the_loss_and_its_gradient_equal_the_authors(number, dtype, rtol):
    given, at = case(number, dtype)
    loss = fn.supremix_loss(*given, separate_max=True)
    loss.backward()
    torch.testing.assert_close(loss.detach(), at["out/loss"].to(dtype), rtol=rtol, atol=0)
    wanted = at["grad/features"].to(dtype)
    torch.testing.assert_close(given[0].grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@pytest.mark.parametrize("number", [0, 1])
def test_the_numbers_of_mixtures_and_their_sums_equal_the_authors(number):
    (features, labels, _, window, alpha, _), at = case(number, torch.float64)
    x, y = features.detach().transpose(0, 1).flatten(0, 1), labels.repeat(2)
    drawn, between = fn.mixture_counts(y, window)
    assert drawn.tolist() == at["out/n_mix_neg"].tolist()
    assert between.tolist() == at["out/n_mix_pos"].tolist()
    of_neg, of_label, of_pos = torch.zeros_like(x), torch.zeros(len(x)).double(), torch.zeros_like(x)
    for i in range(len(x)):
        for k in (y != y[i]).nonzero()[:, 0]:
            of_neg[i] += alpha[i, k] * x[i] + (1 - alpha[i, k]) * x[k]
            of_label[i] += alpha[i, k] * y[i] + (1 - alpha[i, k]) * y[k]
        for j in ((y < y[i]) & (y[i] - y < window)).nonzero()[:, 0]:
            for k in ((y > y[i]) & (y - y[i] < window)).nonzero()[:, 0]:
                b = (y[k] - y[i]) / (y[k] - y[j])
                of_pos[i] += b * x[j] + (1 - b) * x[k]
    torch.testing.assert_close(of_neg, at["out/sum_mix_neg"])
    torch.testing.assert_close(of_label, at["out/sum_label_neg"])
    torch.testing.assert_close(of_pos, at["out/sum_mix_pos"])


# ------------------------------------------------------------------------------------------------------------- identities


def written_out(
    features: Tensor, labels: Tensor, tau: float, window: float, alpha: Tensor | None, power: int
) -> Tensor:
    """Compute the loss term by term, with the mixtures as vectors."""
    x, y = features.transpose(0, 1).flatten(0, 1), labels.repeat(features.shape[1])
    losses = []
    for i in range(len(x)):
        positive, weighted = [], []
        for j in range(len(x)):
            if j == i:
                continue
            s, d = x[i] @ x[j] / tau, float((y[i] - y[j]).abs())
            weighted.append((d**power + 1 if power else 1) * s.exp())
            if d == 0:
                positive.append(s)
            elif alpha is not None:
                a = alpha[i, j]
                mixed = a * y[i] + (1 - a) * y[j]
                d = float((y[i] - mixed).abs())
                s = x[i] @ (a * x[i] + (1 - a) * x[j]).detach() / tau
                weighted.append((d**power + 1 if power else 1) * s.exp())
        for j in range(len(x)):
            for k in range(len(x)):
                if y[j] < y[i] < y[k] and y[i] - y[j] < window and y[k] - y[i] < window and alpha is not None:
                    b = (y[k] - y[i]) / (y[k] - y[j])
                    positive.append(x[i] @ (b * x[j] + (1 - b) * x[k]).detach() / tau)
                    weighted.append(positive[-1].exp())
        log_z = torch.stack(weighted).sum().log()
        losses.append(-torch.stack([s - log_z for s in positive]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("power", [0, 1, 2])
def test_with_one_stabiliser_the_loss_is_the_paper_s_term_by_term(power):
    x, alpha = rows(0).requires_grad_(), shares(6)
    loss = fn.supremix_loss(x, TARGETS, 0.2, 2.6, alpha, power, separate_max=False)
    wanted = written_out(x, TARGETS, 0.2, 2.6, alpha, power)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(value, x) for value in (loss, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_mixtures_and_weights_it_is_supcon():
    x, y = rows(1), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = fn.supremix_loss(x, y.double(), 0.3, 5.0, None, 0)
    torch.testing.assert_close(loss, fn.supcon(x, y, 0.3, 0.3), rtol=1e-9, atol=0)


def test_orthonormal_pairs_have_the_closed_value():
    pairs = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, 2)
    loss = fn.supremix_loss(pairs, torch.tensor([20.0, 27.0]), 0.5, 5.0)
    assert float(loss) == pytest.approx(math.log(1 + 2 * 8 * math.exp(-2)), rel=1e-12)


@pytest.mark.parametrize("separate", [True, False])
def test_blocks_of_any_size_and_the_dense_form_agree(separate, monkeypatch):
    x = F.normalize(draw(3, 24, 5), dim=1).requires_grad_()
    found = []
    for y in (torch.arange(24).double() * 0.7, torch.arange(24).double() % 5, torch.zeros(24).double()):
        terms = Terms(0.15, 4.0, 1, shares(12), True, separate)
        for cells in (2**20, 90, 1, 0):  # 0: the dense form
            monkeypatch.setattr(label_mixtures, "CELLS", max(1, cells))
            loss, counted = (label_mixtures.mixture_contrast if cells else label_mixtures._dense)(x, y, terms)
            found.append((loss.detach(), counted, *torch.autograd.grad(loss, x)))
    for start in (0, 4, 8):
        for other in found[start + 1 : start + 4]:
            torch.testing.assert_close(found[start], other, rtol=1e-9, atol=1e-11)


def test_drawn_shares_depend_on_their_row_alone_and_enter_as_given_ones_do():
    drawn = BetaShares(5, 2.0, 8.0, 12)
    whole = drawn(torch.arange(12))
    assert torch.equal(drawn(torch.tensor([7, 2])), whole[[7, 2]])
    assert 0.1 < float(BetaShares(0, 2.0, 8.0, 4000)(torch.arange(2)).mean() * 1) < 0.3
    given = rows(2), TARGETS, 0.3, 5.0
    torch.testing.assert_close(fn.supremix_loss(*given, drawn), fn.supremix_loss(*given, whole.double()))


def test_parts_of_a_batch_have_their_own_losses():
    x, alpha = rows(4), shares(6)
    whole = fn.supremix_loss(x, TARGETS, 0.3, 5.0, alpha, pool=2, reduction="sum")
    first, second = [0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]
    parts = [
        fn.supremix_loss(x[at], TARGETS[at], 0.3, 5.0, alpha[own][:, own])
        for at, own in ((slice(0, 3), first), (slice(3, 6), second))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    torch.testing.assert_close(fn.supremix_loss(x, TARGETS, 0.3, 5.0, alpha, pool=2), whole / 2)


def test_the_window_is_open_at_its_end():
    y = torch.tensor([0.0, 2.0, 4.0])
    assert fn.mixture_counts(y, 2.0)[1].tolist() == [0, 0, 0]
    assert fn.mixture_counts(y, 2.0001)[1].tolist() == [0, 1, 0]
    for targets in ([0.0, 2.0, 3.0], [0.0, 1.0, 3.0]):  # at the end below, and above
        assert fn.mixture_counts(torch.tensor(targets), 2.0)[1].tolist() == [0, 0, 0]
    groups = Groups(torch.tensor([0.1, 0.3, 0.2]), 0.15)
    assert (groups.low.tolist(), groups.high.tolist()) == ([0, 0, 1], [2, 3, 3])


# ------------------------------------------------------------------------------------------------------------------ edges


def test_equal_targets_are_all_positives_without_mixtures():
    x = rows(5)
    loss = fn.supremix_loss(x, torch.full((6,), 30.0), 0.3, 5.0, shares(6), separate_max=False)
    torch.testing.assert_close(loss, fn.supcon(x, torch.zeros(6, dtype=torch.long), 0.3, 0.3))


def test_one_example_has_loss_0_and_one_view_without_positives_too_with_gradient():
    for x in (rows(6, 1), rows(6, 4)[:, :1], rows(6, 1)[:, :1]):
        x = x.clone().requires_grad_()
        loss = fn.supremix_loss(x, torch.arange(len(x)).double(), 0.3, 0.5, None)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert float(x.grad.abs().max()) < 1e-12


def test_anchors_without_a_positive_do_not_count_in_the_mean():
    x = rows(7, 3)[:, :1]
    y = torch.tensor([1.0, 2.0, 3.0])
    loss = fn.supremix_loss(x, y, 0.3, 5.0, None, 0, False, mix_pos=True)  # the middle one has a Mix-pos
    (s,) = (x[:, 0] @ x[:, 0].T / 0.3)[1:2]
    mixed = (s[0] + s[2]) / 2
    assert float(loss) == pytest.approx(float(torch.stack([s[0], s[2], mixed]).logsumexp(0) - mixed), rel=1e-10)


def test_equal_embeddings_give_the_log_of_the_weighted_count():
    x = F.normalize(torch.ones(2, 2, 3, dtype=torch.float64), dim=2).requires_grad_()
    loss = fn.supremix_loss(x, torch.tensor([0.0, 4.0]), 0.1, 5.0, torch.full((4, 4), 0.25), separate_max=False)
    loss.backward()
    # One positive of weight 1, two rows of weight 5, two Mix-neg of weight 1 + 0.75 x 4.
    assert float(loss.detach()) == pytest.approx(math.log(1 + 2 * 5 + 2 * 4), rel=1e-9)
    assert bool(x.grad.isfinite().all())


def test_low_temperatures_do_not_overflow():
    x = rows(8).float().requires_grad_()
    for separate in (False, True):
        loss = fn.supremix_loss(x, TARGETS, 1e-3, 3.0, shares(6), separate_max=separate)
        (gradient,) = torch.autograd.grad(loss, x)
        assert bool(loss.isfinite() and gradient.isfinite().all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.tensor([1.0, float("nan")])}, "labels must be finite targets, got 1 that are not"),
        ({"labels": torch.tensor([1.0, float("inf")])}, "labels must be finite"),
        ({"labels": torch.ones(3)}, r"features \[2, 2, 3\] and labels \[3\]"),
        ({"features": torch.ones(2, 3)}, r"\[n, views, dim\]"),
        ({"features": torch.ones(0, 2, 3), "labels": torch.ones(0)}, "features is an empty batch"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"window": -1.0}, "window must be at least 0"),
        ({"window": float("nan")}, "window"),
        ({"weight_power": 3}, "weight_power"),
        ({"alpha_neg": torch.ones(2, 2)}, r"alpha_neg must be \[4, 4\]"),
        ({"pool": 3}, "pool must divide the 2 examples"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_arguments_are_named(change, said):
    given = {"features": torch.ones(2, 2, 3), "labels": torch.tensor([1.0, 2.0]), "temperature": 0.3, "window": 5.0}
    with pytest.raises(ValueError, match=said):
        fn.supremix_loss(**(given | change))


# --------------------------------------------------------------------------------------------------------------- training


def built(data: str = DATA, **settings: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("supremix", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_training_minimises_the_exact_function(monkeypatch):
    learner, task = built(epochs=1)
    calls, function = [], file.supremix_loss

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(file, "supremix_loss", noted)
    row = fit(learner, task, bar=False)[-1]
    assert len(calls) == 4
    (features, targets, temperature, window, own, power, separate), kwargs = calls[0]
    assert (tuple(features.shape), tuple(targets.shape)) == ((12, 2, 8), (12,))
    torch.testing.assert_close(features.norm(dim=2), torch.ones(12, 2))
    assert (temperature, window, power, separate, kwargs["mix_pos"]) == (0.3, 5.0, 1, False, True)
    assert own.count == 24
    assert calls[1][0][4].seed != own.seed
    assert {"test/mae", "test/pearson", "test/spearman", "test/distance_order", "train/mix_pos"} <= set(row)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("diabetes?train=60", {"table_encoder": "relu-16", "window": 40.0, "swapped": 0.3}),
        ("pulses?train=48&test=20", {"series_encoder": "conv-s", "window": 15.0}),
        (DATA, {"mix_neg": False, "mix_pos": False, "weight_power": 0}),
        (DATA, {"mix_neg": False, "weight_power": 2, "pool": 2, "reduction": "sum", "separate_max": True}),
        (DATA, {"mix_pos": False, "drop_at": 0.5, "hidden": 5}),
        (DATA, {"epochs": 0, "regressor": "fine-tuned"}),
    ],
)
def test_inputs_and_options_train(data, settings):
    learner, task = built(data, **({"epochs": 1} | settings))
    row = fit(learner, task, bar=False)[-1]
    assert math.isfinite(row["train/loss"])
    assert row["test/mae"] > 0
    assert ("test/regressor_mae" in row) == (settings.get("regressor") == "fine-tuned")


def test_only_a_fine_tuned_regressor_changes_the_encoder_after_the_contrast():
    found = {}
    for regressor in ("frozen", "fine-tuned"):
        learner, task = built(epochs=1, regressor=regressor)
        fit(learner, task, bar=False)
        found[regressor] = dict(learner.state_dict())
    name = "encoder.layer1.0.weight"
    assert not torch.equal(found["frozen"][name], found["fine-tuned"][name])
    assert torch.equal(found["frozen"]["head.0.weight"], found["fine-tuned"]["head.0.weight"])


def test_early_stopping_waits_for_a_smaller_error(monkeypatch):
    learner, task = built(epochs=5, regressor="frozen")
    errors = iter([5.0, 4.0, 3.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(RegressionEvaluator, "compute", lambda self, final=False: {"mae": next(errors)})
    assert len(fit(learner, task, bar=False, evaluate_every=1, loop=Loop(patience=2))) == 5
    learner, task = built(epochs=5)
    errors = iter([1.0, 2.0, 3.0, 4.0])
    assert len(fit(learner, task, bar=False, evaluate_every=1, loop=Loop(patience=2))) == 3


def test_the_learning_rate_falls_to_a_tenth_once():
    learner, _ = built(epochs=10)
    learner.epochs = 10
    assert [learner.curve()(epoch) for epoch in (0, 7, 8, 9)] == [1.0, 1.0, 0.1, 0.1]


@pytest.mark.parametrize(("regressor", "interrupt_at"), [("frozen", 5), ("fine-tuned", 2), ("fine-tuned", 9)])
def test_interrupted_and_resumed_it_ends_the_same(regressor, interrupt_at, tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("supremix", DATA, overrides=SMALL | {"regressor": regressor}).config
    need_equal_ends(monkeypatch, file.SupReMix, "supremix", config, DATA, interrupt_at, tmp_path)


def trained() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train by the plain steps of momentum, as Adam would blow up gradients that are zero but for rounding."""
    more = {
        "encoder": "vit-xs",
        "recipe": "none",
        "optimizer": "momentum",
        "lr": 0.5,
        "epochs": 1,
        "batch_size": 9,
        "pool": 3,
    }
    learner, task = built("diabetes?train=36", **more, table_encoder="relu-8", window=40.0, swapped=0.2)
    return fit(learner, task, bar=False, say=lambda _: None, loop=Loop(device="cpu")), learner.state_dict()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(trained(), f"{folder}/{rank}.pt")
    leave()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    rows_of_one, weights = trained()
    for rank in range(2):
        found, mine = torch.load(tmp_path / f"{rank}.pt")
        assert found[-1]["train/mix_pos"] == rows_of_one[-1]["train/mix_pos"]
        assert found[-1]["train/loss"] == pytest.approx(rows_of_one[-1]["train/loss"], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_saved_run_predicts_embeds_and_exports(tmp_path, undrawn):
    config = Experiment.resolve("supremix", "diabetes?train=60", overrides=SMALL | {"table_encoder": "relu-16"}).config
    run = training.train("supremix", config, data="diabetes?train=60", out=tmp_path, name="x", say=lambda _: None)
    learner = load_learner(run)
    task = Experiment.of_run(run).task()
    predicted = learner.predict(task.evaluation_batch("test", np.arange(110)))["prediction"]
    error = float((predicted.double() - torch.from_numpy(task.data.test.targets)).abs().mean())
    assert error == pytest.approx(run.metrics()[-1]["test/mae"], rel=1e-4)  # the frozen regressor is kept with the run
    assert training.evaluate(run, say=lambda _: None)["mae"] == pytest.approx(error, rel=1e-4)
    vectors = task.data.test.inputs(np.arange(3))
    found = Encoder.load(run).encode(vectors=list(vectors))
    assert found.shape == (3, 16)
    assert cli.main(["export", str(run.path), "-o", str(tmp_path / "x.pt2")]) == 0
    program = torch.export.load(tmp_path / "x.pt2").module()
    torch.testing.assert_close(program(torch.from_numpy(vectors)), torch.from_numpy(found))


def test_windows_that_do_not_fit_the_targets_warn_once():
    for window, said in ((0.5, "have no Mix-pos"), (500.0, r"more than N\^2 / 8")):
        learner, task = built(epochs=1, window=window)
        lines: list[str] = []
        fit(learner, task, bar=False, say=lines.append)
        (one,) = [line for line in lines if "--window" in line]
        assert one.startswith("warning: half of the anchors")
        assert said.replace("\\", "") in one


def test_figures_compare_encoder_and_head():
    learner, task = built()
    found = learner.figures(Survey(task, learner))
    assert set(found["Similarity by difference of targets"]["series"]) == {"encoder", "head"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"window": -1.0}, "window"),
        ({"weight_power": 4}, "weight_power"),
        ({"alpha": 0.0}, "alpha"),
        ({"pool": 5}, "pool must divide batch_size"),
        ({"drop_at": 2.0}, "drop_at"),
        ({"reduction": "max"}, "reduction"),
        ({"regressor": "tuned"}, "regressor 'tuned'"),
        ({"epochs": 0}, "nothing would be trained"),
        ({"regressor": "fine-tuned", "finetune_epochs": 0}, "finetune_epochs"),
        ({"noise": -1.0}, "noise"),
        ({"swapped": 2.0}, "swapped"),
        ({"few_shot": 200}, "few_shot"),
        ({"bin_width": 0.0}, "bin_width"),
        ({"series_encoder": "lstm"}, "lstm"),
        ({"table_encoder": "trees"}, "trees"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


def test_data_without_targets_are_named():
    with pytest.raises(CounterpointError, match="'digits' is for the task views, not for targets"):
        built("digits")
    with pytest.raises(DataError, match="fewer than a batch of 100"):
        built(batch_size=100)


def test_defaults_are_the_paper_s():
    config = load_system("supremix").config()
    assert (config.epochs, config.batch_size, config.lr * config.batch_size / 256) == (100, 64, 1e-3)
    assert (config.temperature, config.window, config.alpha, config.beta, config.projection) == (
        0.3,
        5.0,
        2.0,
        8.0,
        128,
    )
    assert (config.drop_at, config.weight_decay, config.optimizer, config.pool) == (0.8, 0.0, "adam", 1)


def test_trains_from_python_on_a_table_in_memory(tmp_path, undrawn):
    table = {"a": np.arange(60.0), "b": np.arange(60.0) ** 2, "age": np.arange(60.0) * 2}
    run = cp.train(
        "supremix", data=cp.own(table, columns="age:target"), out=tmp_path, epochs=1, batch_size=8, quiet=True
    )
    assert run.metrics["mae"] < 20


def test_a_learner_of_tables_or_series_is_created_from_facts():
    learner = cp.create(
        "supremix", kind="series", mean=[0.0], deviation=[2.0], length=8, batch_size=8, series_encoder="conv-s"
    )
    batch = {"input": torch.randn(8, 8, 1), "index": torch.arange(8), "target": torch.arange(8).double()}
    prepared = learner.prepare(batch, torch.Generator().manual_seed(0))
    assert float(learner.loss(prepared)["loss"].detach()) > 0
    with pytest.raises(CounterpointError, match=r"missing: mean=.*; deviation="):
        cp.create("supremix", kind="table")
    with pytest.raises(CounterpointError, match=r"missing: length="):
        cp.create("supremix", kind="series", mean=[0.0], deviation=[1.0])


def test_the_encoder_starts_from_a_run_on_pictures_and_not_on_tables(tmp_path, undrawn):
    small = {"encoder": "mlp-s", "recipe": "none", "epochs": 1, "batch_size": 12, "warmup_epochs": 0}
    config = Experiment.resolve("simclr", "digits?size=16&train=24", overrides=small).config
    run = training.train("simclr", config, data="digits?size=16&train=24", out=tmp_path, name="x", say=lambda _: None)
    learner, task = built(start=str(run.path), encoder="conv-s")
    learner.begin(Survey(task, learner))
    torch.testing.assert_close(learner.encoder.state_dict(), load_learner(run).encoder.state_dict())
    with pytest.raises(CounterpointError, match="--from is for encoders of pictures, and diabetes is a table"):
        built("diabetes?train=60", start=str(run.path))
