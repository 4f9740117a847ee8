"""MCLRec: the authors' numbers, identities, views, turns of a step, baselines, resuming, processes, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.core import total
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.recommendation import mclrec
from counterpoint.views.histories import Histories, changed, crop, draws, mask, reorder
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mclrec.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "visits?users=40&items=24&groups=3&longest=8"
nt_xent = fn.of("mclrec").nt_xent
SMALL = {"dim": 8, "length": 8, "inner": 8, "batch_size": 64, "epochs": 2, "evaluate_every": 2}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("mclrec", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def weights(number: int, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    start = f"case{number}/weight/{name}."
    found = {key.removeprefix(start): torch.from_numpy(PARITY[key]) for key in PARITY if key.startswith(start)}
    return {key: value.to(dtype).requires_grad_() for key, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
@pytest.mark.parametrize("number", [0, 1, 2])
def test_contrasts_regulariser_and_gradients_equal_the_authors(number, dtype, rtol):
    at = {name: torch.from_numpy(PARITY[f"case{number}/in/{name}"]).to(dtype).requires_grad_() for name in ("h1", "h2")}
    param = {key.rpartition("/")[2]: PARITY[key].item() for key in PARITY if key.startswith(f"case{number}/param/")}
    augmenters = [weights(number, name, dtype) for name in ("aug1", "aug2")]
    temperature = param["temperature_cl1"]
    views = {f"z{n + 1}": mclrec.augmented(at[f"h{n + 1}"], augmenters[n]) for n in range(2)} | at
    found = {name: views[name] for name in ("z1", "z2")}
    found["contrast_h1_h2_dot"] = nt_xent(at["h1"], at["h2"], temperature, "dot")
    found["contrast_h1_h2_cos_t05"] = nt_xent(at["h1"], at["h2"], 0.5, "cos")
    for a, b in (("h1", "z2"), ("h2", "z1"), ("z1", "z2")):
        found[f"reg_{a}_{b}"] = fn.score_spread_regulariser(views[a], views[b], temperature)
    found["reg_scaled"] = 0.1 * sum(value for name, value in found.items() if name.startswith("reg_"))
    loss = fn.mclrec_contrast(at["h1"], at["h2"], *augmenters, temperature, bool(param["use_regulariser"]))
    found["cl2_plus_reg"] = loss
    for name, value in found.items():
        wanted = torch.from_numpy(np.asarray(PARITY[f"case{number}/out/{name}"])).to(dtype)
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()), msg=name)
    loss.backward()
    leaves = at | {f"aug{n + 1}.{name}": value for n in range(2) for name, value in augmenters[n].items()}
    for key in (key for key in PARITY if key.startswith(f"case{number}/grad/")):
        wanted = torch.from_numpy(PARITY[key]).to(dtype)
        close = {"rtol": rtol, "atol": rtol * float(wanted.abs().max())}
        torch.testing.assert_close(leaves[key.rpartition("/")[2]].grad, wanted, **close, msg=key)


def plain(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Compute R as its definition has it."""
    u = torch.cat([a, b])
    n, products, total = len(a), u @ u.T / temperature, []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        p, others = products[i, partner], torch.stack([products[i, j] for j in range(2 * n) if j not in (i, partner)])
        low, high = torch.minimum(p, others.max()), torch.maximum(p, others.max())
        total.append(torch.stack([(p - low).relu() + (high - others).relu().mean()]))
    return torch.cat(total).mean()


@pytest.mark.parametrize("chunk", [30, 2**22])
def test_the_regulariser_is_its_definition_in_blocks_too(chunk, monkeypatch):
    monkeypatch.setattr(mclrec, "CHUNK", chunk)
    rows = [draw(0, 7, 4).requires_grad_(), draw(1, 7, 4).requires_grad_()]
    found, wanted = fn.score_spread_regulariser(*rows, 0.7), plain(*rows, 0.7)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, rows), torch.autograd.grad(wanted, rows), strict=True):
        torch.testing.assert_close(a, b)


def test_identities_of_orthonormal_equal_and_single_rows():
    eye, same = torch.eye(5, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    assert float(nt_xent(eye, eye, 0.5, "dot")) == pytest.approx(math.log(1 + 8 * math.exp(-2)))
    assert float(nt_xent(same, same, 1.0, "dot")) == pytest.approx(math.log(9))
    assert float(fn.score_spread_regulariser(same, same)) == pytest.approx(0, abs=1e-12)
    one = draw(0, 1, 4)
    assert float(nt_xent(one, draw(1, 1, 4), 1.0, "dot")) == 0
    assert float(fn.score_spread_regulariser(one, draw(1, 1, 4))) == 0


def test_cosines_are_products_of_unit_rows():
    a, b = draw(0, 6, 4), draw(1, 6, 4)
    unit = [F.normalize(x, dim=1) for x in (a, b)]
    torch.testing.assert_close(nt_xent(a, b, 0.3), nt_xent(*unit, 0.3, "dot"))


@pytest.mark.parametrize("most", [0, 2**24])  # by the kernel, and by the whole matrix
def test_the_next_item_loss_is_cross_entropy_over_all_items(most, monkeypatch):
    monkeypatch.setattr(total, "SMALL", most)
    state, items, target = (
        draw(0, 6, 4).requires_grad_(),
        draw(1, 9, 4).requires_grad_(),
        torch.tensor([3, 0, 8, 3, 1, 5]),
    )
    found, wanted = fn.next_item_loss(state, items, target), F.cross_entropy(state @ items.T, target)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, [state, items]), torch.autograd.grad(wanted, [state, items]), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.score_spread_regulariser(x, x[:2]), "a and b must be"),
        (lambda x: fn.score_spread_regulariser(x, x, 0.0), "temperature must be"),
        (lambda x: fn.next_item_loss(x, x, torch.tensor([0, 1, 3, 4])), "from 0 to 3, got 0..4"),
        (lambda x: fn.next_item_loss(x, x[:, :2], torch.tensor([0, 1, 2, 3])), "state, items and target"),
        (lambda x: nt_xent(x, x, 0.5, "l2"), "similarity must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3))


# ----------------------------------------------------------------------------------------------------------------- views


def test_a_crop_keeps_consecutive_items_and_a_mask_keeps_the_length():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]])
    given = Histories(ids, torch.tensor([6, 3]))
    for first, wanted in ((0.0, [[1, 2, 3], [7]]), (0.999, [[4, 5, 6], [9]])):
        found = crop(given, 0.5, torch.full((2,), first))
        assert [row[:n].tolist() for row, n in zip(*found, strict=True)] == wanted
        assert not any(row[n:].any() for row, n in zip(*found, strict=True))
    found = mask(given, 0.5, torch.arange(12.0).view(2, 6) / 12)
    assert found.ids.tolist() == [[0, 0, 0, 4, 5, 6], [0, 8, 9, 0, 0, 0]]
    assert found.lengths.tolist() == [6, 3]


def test_reordering_shuffles_a_window_alone():
    given = Histories(torch.arange(1, 11).repeat(50, 1), torch.full((50,), 10))
    generator = torch.Generator().manual_seed(0)
    found = reorder(given, 0.5, torch.zeros(50), torch.rand(50, 10, generator=generator)).ids
    assert torch.equal(found.sort(1).values, given.ids)
    assert torch.equal(found[:, 5:], given.ids[:, 5:])
    assert (found[:, :5] != given.ids[:, :5]).any(1).float().mean() > 0.8


def test_two_views_have_different_changes_and_one_item_stays():
    given = Histories(torch.tensor([[1, 2, 3, 4, 5, 6]] * 40 + [[7, 0, 0, 0, 0, 0]]), torch.tensor([6] * 40 + [1]))
    drawn = draws(41, 9, torch.Generator().manual_seed(1)).part(slice(None), 6)
    views = changed(given, drawn, crop_share=0.5, mask_share=0.5, reorder_share=1.0)
    for view in views:
        assert view.ids[-1].tolist() == [7, 0, 0, 0, 0, 0]
    kinds = [
        [(int(n) == 3, bool((row[: int(n)] == 0).any())) for row, n in zip(*view, strict=True)][:40] for view in views
    ]
    assert all(a != b for a, b in zip(*kinds, strict=True))
    assert {kind for view in kinds for kind in view} == {(True, False), (False, True), (False, False)}


def test_a_view_of_the_same_target_is_another_history_with_it():
    learner, task = built(views="same-target", learned_weight=0.0)
    learner.begin(Survey(task, learner))
    batch = next(iter(task.train_loader(0, Position())))
    found = learner.prepare(batch, torch.Generator().manual_seed(0))["views"][1]
    beginnings = learner.examples.beginnings
    every = [beginnings.at(np.array([n]), 8) for n in range(len(beginnings))]
    for row, (ids, length, target, own) in enumerate(zip(*found, batch["target"], batch["index"], strict=True)):
        same = [n for n in range(len(every)) if every[n]["target"] == target and n != own] or [int(own)]
        assert any(ids[: int(length)].tolist() == every[n]["ids"][0].tolist() for n in same), row


# ------------------------------------------------------------------------------------------------------------- the turns


def test_augmenters_learn_on_the_updated_encoder_in_a_turn_of_their_own(monkeypatch):
    learner, task = built(epochs=1)
    steps, seen, real = [], [], mclrec.mclrec_contrast

    def spied(h1, h2, *more, **named):
        seen.append((h1.requires_grad, isinstance(more[0], dict)))
        return real(h1, h2, *more, **named)

    def watched(turns):
        def note(name):
            return lambda *_: steps.append((name, {n: p.detach().clone() for n, p in learner.named_parameters()}))

        for number, turn in enumerate(turns[:2]):
            turn.optimizers[0].register_step_post_hook(note(number))
        return turns

    turns = learner.turns
    monkeypatch.setattr(mclrec, "mclrec_contrast", spied)
    monkeypatch.setattr(learner, "turns", lambda: watched(turns()))
    before = {n: p.detach().clone() for n, p in learner.named_parameters()}
    fit(learner, task, bar=False)
    assert [name for name, _ in steps[:3]] == [0, 1, 0]
    for name, weights in steps[:3]:
        moved = {n.partition(".")[0] for n in before if not torch.equal(before[n], weights[n])}
        assert moved == {"augmenters" if name else "encoder"}
        before = weights
    # The encoder's turns have gradients of states and constant augmenters; the augmenters' turn the reverse.
    assert seen[:3] == [(True, True), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("settings", "turns", "scalars"),
    [
        ({"view_weight": 0.0, "learned_weight": 0.0}, 1, set()),
        ({"learned_weight": 0.0}, 1, {"random_views"}),
        ({"learned_weight": 0.0, "views": "same-target"}, 1, {"random_views"}),
        ({"view_weight": 0.0, "update": "two-turns"}, 2, {"learned_views", "augmenters"}),
        ({"update": "joint", "objective": "bpr"}, 1, {"random_views", "learned_views"}),
        ({"similarity": "cos", "regulariser": 0.0}, 3, {"random_views", "learned_views", "augmenters"}),
    ],
)
def test_baselines_and_variants_are_settings(settings, turns, scalars):
    learner, task = built(**settings)
    row = fit(learner, task, bar=False)[-1]
    assert len(learner.turns()) == turns
    assert {name.removeprefix("train/") for name in row if name.startswith("train/")} == scalars | {"loss", "next_item"}
    assert 0 <= row["test/ndcg_20"] <= 1


@pytest.mark.slow
def test_training_finds_next_items_of_chains():
    learner, task = built("visits?users=200&items=60&groups=6&noise=0.1", epochs=12, lr=0.03, dim=16, dropout=0.1)
    row = fit(learner, task, bar=False)[-1]
    assert row["test/recall_5"] > 0.5  # chance is 0.08


@pytest.mark.parametrize("update", ["three-turns", "joint"])
def test_interrupted_and_resumed_it_ends_the_same(update, tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("mclrec", DATA, overrides=SMALL | {"update": update}).config
    need_equal_ends(monkeypatch, mclrec.MCLRec, "mclrec", config, DATA, 5, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    small = SMALL | {"dropout": 0.0, "epochs": 1, "evaluate_every": 1}
    words = ["train", "mclrec", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("mclrec", DATA, overrides=small).config
    one = training.train("mclrec", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()[-1]
    two = Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "train/learned_views", "train/random_views", "train/augmenters", "test/ndcg_20"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learned_weight": -1.0}, "learned_weight"),
        ({"heads": 3}, "multiple of heads"),
        ({"views": "mask"}, "views"),
        ({"crop": 1.5}, "crop"),
        ({"temperature": 0.0}, "temperature"),
        ({"length": 0}, "length"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        Experiment.resolve("mclrec", DATA, overrides=SMALL | settings)
