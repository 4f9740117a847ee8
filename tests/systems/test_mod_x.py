"""Mod-X: the authors' numbers, identities, phases, measures of a stream, resuming, processes, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.continual import mod_x
from counterpoint.tasks.streams import stream_figures
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mod-x.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "digit-streams?vectors=1&train=40&test=20&phases=3"
SMALL = {
    "vector_encoder": "relu-8",
    "embedding": 4,
    "batch_size": 16,
    "epochs": 2,
    "first_epochs": 2,
    "warmup_epochs": 0,
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("mod-x", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_its_parts_and_gradients_equal_the_authors(number, dtype, rtol):
    names = ("image_emb", "text_emb", "image_emb_old", "text_emb_old")
    at = {name: torch.from_numpy(PARITY[f"case{number}/in/{name}"]).to(dtype) for name in names}
    leaves = [at[name].requires_grad_() for name in ("image_emb", "text_emb")]
    scale, alpha = (float(PARITY[f"case{number}/param/{name}"]) for name in ("logit_scale_log", "alpha"))
    found = fn.mod_x(*at.values(), scale, alpha)
    found.loss.backward()
    for name, value in (
        ("loss", found.loss),
        ("loss_contrastive", found.contrastive),
        ("loss_alignment", found.alignment),
    ):
        assert value.item() == pytest.approx(float(PARITY[f"case{number}/out/{name}"]), rel=rtol)
    for name, leaf in zip(("image_emb", "text_emb"), leaves, strict=True):
        wanted = torch.from_numpy(PARITY[f"case{number}/grad/{name}"]).to(dtype)
        torch.testing.assert_close(leaf.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    old = [unit(at[name].detach()) for name in ("image_emb_old", "text_emb_old")]
    for name, rows in (("i2t", old), ("t2i", old[::-1])):
        assert (~fn.trusted_rows(*rows)).tolist() == PARITY[f"case{number}/out/rows_replaced_{name}"].tolist()


def plain(u: Tensor, w: Tensor, old_u: Tensor, old_w: Tensor) -> Tensor:
    total = u.new_zeros(())
    u, w, old_u, old_w = map(unit, (u, w, old_u, old_w))
    for new, old in ((u @ w.T, old_u @ old_w.T), (w @ u.T, old_w @ old_u.T)):
        for i in range(len(new)):
            if int(old[i].argmax()) == i:
                p = old[i].softmax(0)
                total = total + (p * (p.log() - new[i].log_softmax(0))).sum() / 2
    return total


@pytest.mark.parametrize("few", [0, 512])  # by the kernel, and by whole matrices
def test_the_alignment_is_the_divergence_of_trusted_rows_of_any_width(few, monkeypatch):
    monkeypatch.setattr(mod_x, "FEW", few)
    new = [draw(0, 9, 5).requires_grad_(), draw(1, 9, 5).requires_grad_()]
    base = draw(2, 9, 3)
    old = [base, base + 0.5 * draw(3, 9, 3)]
    found = fn.mod_x(*new, *old, 1.0, alpha=1.0)
    torch.testing.assert_close(found.alignment, plain(*new, *old))
    mine = torch.autograd.grad(found.alignment, new, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(plain(*new, *old), new), strict=True):
        torch.testing.assert_close(a, b)
    mean = fn.mod_x(*new, *old, 1.0, alpha=1.0, reduction="mean").alignment
    torch.testing.assert_close(mean * 9, found.alignment)


def test_equal_networks_and_a_network_that_is_never_right_have_no_alignment():
    x, y = draw(0, 6, 4).requires_grad_(), draw(1, 6, 4)
    found = fn.mod_x(x, y, x, y, 1.0)
    assert found.alignment.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(found.alignment, x)[0].abs().max() < 1e-12
    wrong = torch.eye(6, dtype=torch.float64)
    assert fn.mod_x(x, y, wrong, wrong.roll(1, 0), 1.0).alignment.item() == 0


def test_without_weight_it_is_clip():
    x, y = draw(0, 6, 4), draw(1, 6, 4)
    found = fn.mod_x(x, y, draw(2, 6, 4), draw(3, 6, 4), 1.3, alpha=0.0)
    torch.testing.assert_close(found.loss, fn.clip(unit(x), unit(y), 1.3))


def test_rotations_of_new_and_old_pairs_change_nothing():
    turn, other = (torch.linalg.qr(draw(seed, 4, 4)).Q for seed in (7, 8))
    new, old = [draw(0, 6, 4), draw(1, 6, 4)], [draw(2, 6, 4), draw(3, 6, 4)]
    before = fn.mod_x(*new, *old, 1.0)
    after = fn.mod_x(*(x @ turn for x in new), *(x @ other for x in old), 1.0)
    torch.testing.assert_close(after.loss, before.loss)


def test_numbers_of_any_kind_keep_the_type_of_the_embeddings():
    rows = [draw(seed, 5, 3).float() for seed in range(4)]
    expected = fn.mod_x(*rows, 1.5, 20.0)
    for number in (np.float64, np.float32, np.array, lambda x: torch.tensor(x, dtype=torch.float64)):
        found = fn.mod_x(*rows, number(1.5), number(20.0))
        assert all(
            ours.dtype is torch.float32 and torch.equal(ours, wanted)
            for ours, wanted in zip(found, expected, strict=True)
        )


def test_one_pair_and_equal_embeddings_are_finite():
    one = [draw(seed, 1, 4) for seed in range(4)]
    assert fn.mod_x(*one, 1.0).loss.item() == pytest.approx(0, abs=1e-12)
    same = torch.ones(5, 4, dtype=torch.float64)
    assert fn.trusted_rows(unit(same), unit(same)).tolist() == [True, False, False, False, False]
    assert fn.mod_x(same, same, same, same, 1.0).loss.isfinite()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.mod_x(x, x[:3], x, x, 1.0), "image_emb and text_emb must be"),
        (lambda x: fn.mod_x(x, x, x[:3], x[:3], 1.0), "equally many rows"),
        (lambda x: fn.mod_x(x, x, x, x, 1.0, reduction="max"), "reduction must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3))


# ---------------------------------------------------------------------------------------------------------------- phases


def test_each_phase_sees_its_own_items_and_the_network_of_the_phase_before(monkeypatch):
    learner, task = built()
    seen, real = [], mod_x.mod_x

    def spied(*arguments, **more):
        seen.append((learner.phase, learner.current, arguments))
        return real(*arguments, **more)

    loss = mod_x.ModXLearner.loss

    def watched(self, batch):
        self.current = batch["index"]
        return loss(self, batch)

    monkeypatch.setattr(mod_x, "mod_x", spied)
    monkeypatch.setattr(mod_x.ModXLearner, "loss", watched)
    fit(learner, task, bar=False)
    domains = task.split("train").domains
    for phase, index, _ in seen:
        assert set(domains[index.numpy()]) == {phase}
    assert [phase for phase, *_ in seen] == [0] * 4 + [1] * 4 + [2] * 4
    # The first step of a phase compares the network with its equal copy; a later one does not.
    first, later = seen[4][2], seen[7][2]
    torch.testing.assert_close(unit(first[0]), unit(first[2]))
    assert not torch.allclose(unit(later[0]), unit(later[2]))
    assert (later[5], later[6]) == (20.0, "sum")
    assert 0 <= learner.log_scale.item() <= np.log(100)


def test_the_history_gives_the_measures_of_the_stream():
    learner, task = built()
    row = fit(learner, task, bar=False)[-1]
    history = learner.history[:, :, 0].numpy()
    assert (history >= 0).all()
    assert row["valid/first_image_to_text_r1"] == pytest.approx(history[2, 0], abs=1e-6)
    assert row["valid/last_image_to_text_r1"] == pytest.approx(history[2, 2], abs=1e-6)
    assert row["valid/mean_image_to_text_r1"] == pytest.approx(history[2].mean(), abs=1e-6)
    wanted = stream_figures(history.astype(np.float64))
    for name in ("average", "transfer", "forgetting"):
        assert row[f"valid/{name}"] == pytest.approx(wanted[name], abs=1e-6)
        assert f"test/{name}" not in row
    assert 0 <= row["test/rotation_gap"] <= 180
    figure = learner.figures(Survey(task, learner))["Recall after each phase"]
    assert (figure["names"], np.shape(figure["values"])) == (["zero-one", "two-three", "four-five"], (3, 3))


def test_forgetting_is_the_loss_from_the_best_to_the_last():
    found = stream_figures(np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.9]]))
    assert found["forgetting"] == pytest.approx((0.1 + 0.3) / 2)
    assert found["transfer"] == pytest.approx((0.2 + 0.1 + 0.3) / 3)
    assert found["average"] == pytest.approx((0.9 + 0.75 + 2.2 / 3) / 3)


def test_items_without_domains_are_cut_into_consecutive_parts_and_domains_into_groups():
    learner, task = built("digit-halves", phases=4, batch_size=64, epochs=1, first_epochs=1, image_encoder="mlp-s")
    phase = learner.phase_of(Survey(task, learner), "train")
    assert np.array_equal(phase, np.sort(phase))
    assert np.bincount(phase).tolist() == [315] * 4
    row = fit(learner, task, bar=False)[-1]
    way = f"{learner.first}_to_{learner.second}_r1"
    assert row[f"test/first_{way}"] == row[f"test/last_{way}"]  # one test set for all phases
    learner, task = built(phases=2)
    assert np.bincount(learner.phase_of(Survey(task, learner), "train")).tolist() == [80, 40]
    assert learner.names == ["phase 1", "phase 2"]


def test_a_manifest_s_domains_are_the_phases(tmp_path):
    lines = ["vector_a,vector_b,phase"]
    for n in range(60):
        numbers = " ".join(f"{float(v):.2f}" for v in draw(n, 3))
        lines.append(f'"{numbers}","{numbers}",{10 if n % 2 else 9}')
    (tmp_path / "items.csv").write_text("\n".join(lines))
    learner, task = built(f"manifest:{tmp_path / 'items.csv'}", batch_size=8)
    assert learner.names == ["9", "10"]
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row[f"test/first_{learner.first}_to_{learner.second}_r1"])
    assert "train/alignment" in row


def test_all_phases_at_once_are_one_stage():
    learner, task = built(joint=True, batch_size=60)  # a phase has 40 items
    assert [stage.name for stage in learner.stages()] == ["all phases"]
    row = fit(learner, task, bar=False)[-1]
    assert "train/alignment" not in row
    assert np.isfinite(row["test/first_image_to_text_r1"])


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("mod-x", DATA, overrides=SMALL).config
    # In the second and the third phase.
    need_equal_ends(monkeypatch, mod_x.ModXLearner, "mod-x", config, DATA, (5, 10), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "mod-x", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("mod-x", DATA, overrides=SMALL).config
    one = training.train("mod-x", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()[-1]
    two = Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "train/alignment"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("data", "settings", "error", "said"),
    [
        ("digit-halves", {}, DataError, "have no domains, which are the phases of a stream; set --phases"),
        (DATA, {"phases": 9}, DataError, "--phases 9 exceeds the 3 domains"),
        (DATA, {"alpha": -1.0}, CounterpointError, "alpha must be at least 0"),
        (DATA, {"reduction": "max"}, CounterpointError, "unknown reduction 'max'"),
        (DATA, {"first_epochs": -1}, CounterpointError, "must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_named(data, settings, error, said):
    with pytest.raises(error, match=said):
        built(data, **settings)


def test_a_phase_with_fewer_items_than_a_batch_is_named():
    learner, task = built(batch_size=41)
    with pytest.raises(DataError, match="zero-one has 40 training items, fewer than a batch of 41"):
        learner.begin(Survey(task, learner))
    assert learner.position == Position()


def test_a_phase_of_one_item_asks_for_fewer_phases():
    learner, task = built("digit-halves?train=40&test=40", phases=30)
    with pytest.raises(DataError, match=r"phase \d+ has 1 training item; use fewer --phases"):
        learner.begin(Survey(task, learner))
