"""LLaVA-MoD: the authors' numbers, identities, stages, teachers, balance, preferences, resuming, errors."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.core.distil import soft_cross_entropies
from counterpoint.data import grid_chats
from counterpoint.data.chats import mentioned
from counterpoint.encoders.mixture_of_experts import mixtures_of
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import llava_mod
from counterpoint.tasks.measures.experts import expert_figure, expert_measures
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "llava-mod.npz")
DATA = "grid-chats?train=16&valid=4&test=4&grid=2&cell=8&most=2&questions=0&pairs=16"
SMALL: dict[str, Any] = {
    "model": "llava-16-2-2",
    "teacher": "llava-24-1-2",
    "vocabulary": 300,
    "context": 64,
    "batch_size": 16,
    "new_tokens": 4,
    "epochs": 1,
    "teacher_epochs": 1,
    "adaptor_epochs": 1,
    "sparse_epochs": 1,
    "preference_epochs": 1,
}
LOG_PROBABILITIES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
CASES = pytest.mark.parametrize("number", [0, 1, 2])


def case(number: int, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))


# ----------------------------------------------------------------------------------------------------------- equations


def test_soft_cross_entropies_have_right_derivatives_also_where_the_student_gives_no_probability():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropies(x, teacher), student)
    assert torch.autograd.gradgradcheck(lambda x: soft_cross_entropies(x, teacher), student)
    student = student.detach()
    student[0, 1], student[2, :3] = -math.inf, -math.inf
    student.requires_grad_()
    own = student.log_softmax(1)
    expected = -torch.where(own == -math.inf, 0, teacher.softmax(1) * own.clamp(min=-1e9)).sum(1)
    found = soft_cross_entropies(student, teacher)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), student) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mimic_loss_and_gradient_equal_the_authors(number, dtype):
    # The authors' numbers are float32.
    student, teacher = (case(number, f"in/{name}_logits").to(dtype) for name in ("student", "teacher"))
    labels, everywhere = case(number, "in/labels"), bool(case(number, "param/distill_all_tokens"))
    student.requires_grad_()
    found = fn.mimic_loss(student, teacher, labels, everywhere, shift=False)
    torch.testing.assert_close(found, case(number, "out/align_loss").to(dtype), rtol=1e-5, atol=1e-6)
    found.backward()
    torch.testing.assert_close(student.grad, case(number, "grad/student_logits_align").to(dtype), rtol=1e-4, atol=1e-6)
    language = fn.masked_lm_loss(student.detach(), labels)
    torch.testing.assert_close(language, case(number, "out/lm_loss").to(dtype), rtol=1e-5, atol=1e-6)
    # The authors add the router's loss twice.
    router = float(case(number, "param/router_loss"))
    assert float((found + language).detach()) + 2 * router == pytest.approx(
        float(case(number, "out/kd_lm_total_official")), rel=1e-5
    )


@TYPES
@CASES
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_preference_losses_and_gradients_equal_the_authors(number, kind, dtype, rtol):
    given = [case(number, f"in/{name}_logps").to(dtype).clone() for name in LOG_PROBABILITIES]
    for policy in given[:2]:
        policy.requires_grad_()
    losses = fn.preference_loss(*given, float(case(number, "param/beta")), kind)
    wanted = case(number, f"out/pref_{kind}_losses").to(dtype)
    torch.testing.assert_close(losses, wanted, rtol=rtol, atol=10 * rtol)
    losses.mean().backward()
    for name, policy in zip(("chosen", "rejected"), given, strict=False):
        place = f"case{number}/grad/{kind}_policy_{name}_logps"
        if place in PARITY.files:
            torch.testing.assert_close(
                policy.grad, torch.from_numpy(PARITY[place]).to(dtype), rtol=10 * rtol, atol=rtol
            )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([[-100, -100, 1, 2, 3], [-100, 4, 5, 6, -100]])


def test_a_student_equal_to_its_teacher_has_the_teachers_entropy_and_no_gradient():
    teacher = normal(2, 5, 7)
    student = teacher.clone().requires_grad_()
    found = fn.mimic_loss(student, teacher, LABELS)
    found.backward()
    rows = teacher[:, :-1][LABELS[:, 1:] != -100].log_softmax(-1)
    torch.testing.assert_close(found, -(rows.exp() * rows).sum(-1).mean())
    assert float(student.grad.abs().max()) < 1e-12


def test_the_shift_takes_the_positions_that_predict_an_answer():
    student, teacher = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    moved = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)
    torch.testing.assert_close(
        fn.mimic_loss(student, teacher, LABELS), fn.mimic_loss(student, teacher, moved, shift=False)
    )
    everywhere = fn.mimic_loss(student, teacher, LABELS, all_tokens=True)
    torch.testing.assert_close(everywhere, fn.mimic_loss(student, teacher, torch.ones_like(LABELS), shift=False))


def test_impossible_tokens_do_not_count_and_no_answer_gives_zero():
    student, teacher = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    student[..., 3] = -torch.inf
    student.requires_grad_()
    found = fn.mimic_loss(student, teacher, LABELS)
    found.backward()
    assert bool(found.isfinite())
    assert bool(student.grad.isfinite().all())
    assert float(fn.mimic_loss(student, teacher, torch.full_like(LABELS, -100)).detach()) == 0


def test_a_policy_equal_to_its_reference_has_the_loss_of_a_coin():
    x, y = normal(4), normal(4, seed=1)
    torch.testing.assert_close(fn.preference_loss(x, y, x, y), torch.full((4,), np.log(2), dtype=torch.float64))
    assert fn.preference_loss(x, y, x, y, kind="kto_pair").tolist() == [0.5] * 8


def test_label_smoothing_mixes_both_orders():
    given = [normal(4, seed=n) for n in range(4)]
    swapped = [given[1], given[0], given[3], given[2]]
    wanted = 0.9 * fn.preference_loss(*given) + 0.1 * fn.preference_loss(*swapped)
    torch.testing.assert_close(fn.preference_loss(*given, label_smoothing=0.1), wanted)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"beta": 0.0}, "beta"),
        ({"kind": "best"}, "kind must be one of sigmoid, hinge, ipo, kto_pair"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "for kind sigmoid alone"),
    ],
)
def test_values_out_of_range_raise_an_error_that_names_the_argument(changed, said):
    with pytest.raises(ValueError, match=said):
        fn.preference_loss(*(normal(3, seed=n) for n in range(4)), **changed)


def test_logits_that_differ_in_shape_raise_an_error():
    with pytest.raises(ValueError, match="student_logits and teacher_logits must be"):
        fn.mimic_loss(normal(2, 5, 7), normal(2, 5, 6), LABELS)
    with pytest.raises(ValueError, match="labels must be"):
        fn.mimic_loss(normal(2, 5, 7), normal(2, 5, 7), LABELS[:, 1:])


# ------------------------------------------------------------------------------------------------------------- learner


def config(data: str = DATA, **changed: Any) -> Any:
    return Experiment.resolve("llava-mod", data, overrides=SMALL | changed).config


def trained(folder: Path, data: str = DATA, name: str | None = None, **changed: Any) -> Run:
    return training.train("llava-mod", config(data, **changed), data=data, out=folder, name=name, say=lambda _: None)


def built(**changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("llava-mod", DATA, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("first"))


def test_the_functions_that_equal_the_authors_are_those_that_train(monkeypatch):
    from counterpoint.encoders import mixture_of_experts

    called: list[tuple[str, Any]] = []
    rooms = ((llava_mod, "mimic_loss"), (llava_mod, "preference_loss"), (mixture_of_experts, "top2_routes"))
    for room, name in rooms:
        real = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *x, n=name, f=real: called.append((n, x[-3:])) or f(*x))
    learner, task = built()
    rows = fit(learner, task, bar=False)
    assert [n for n, _ in called].count("mimic_loss") == 2
    assert ("preference_loss", (0.1, "kto_pair", 0.0)) in called
    assert "top2_routes" in {n for n, _ in called}
    assert {"train/mimic_loss", "train/lm_loss", "train/balance_loss"} <= set(rows[3])
    assert {"train/chosen_reward", "train/rejected_reward", "train/reward_accuracy"} <= set(rows[4])
    assert {"test/reward_accuracy", "test/idle_experts", "test/least_expert_share", "test/teacher_chair_s"} <= set(
        rows[4]
    )


def changed_in(learner: Any, task: Any) -> list[set[str]]:
    """Return the names of the parameters that each stage changed."""
    kept: list[dict[str, Tensor]] = [{n: p.detach().clone() for n, p in learner.named_parameters()}]
    learner.end_epoch = lambda _: kept.append({n: p.detach().clone() for n, p in learner.named_parameters()})
    fit(learner, task, bar=False)
    both = itertools.pairwise(kept)
    return [{n for n, p in after.items() if n in before and not torch.equal(p, before[n])} for before, after in both]


def test_each_stage_trains_its_own_part():
    learner, task = built(batch_size=8, preference_epochs=1)
    teacher, adaptor, dense, sparse, preferences = changed_in(learner, task)
    assert all(name.startswith("teacher.") for name in teacher)
    assert adaptor
    assert all("multi_modal_projector" in name for name in adaptor)
    assert any("vision_tower" in name for name in dense)
    assert any("mlp.router" in name or ".experts." in name or ".mlp." in name for name in sparse | preferences)
    assert all(".mlp." in name and "vision_tower" not in name for name in sparse | preferences)


def test_a_frozen_network_of_pictures_stays():
    learner, task = built(batch_size=8, freeze_pictures=True, learns="all", teacher_epochs=1)
    changed = set().union(*changed_in(learner, task)[1:])
    assert not any("vision_tower" in name for name in changed)
    assert any("self_attn" in name for name in changed)


def test_the_loss_of_balance_counts_once_with_its_weight():
    learner, task = built()
    survey_batches: list[dict[str, Tensor]] = []
    real = llava_mod.LLaVAMoD.loss
    learner.loss = lambda batch: survey_batches.append(real(learner, batch)) or survey_batches[-1]
    fit(learner, task, bar=False)
    sparse = survey_batches[3]
    wanted = sparse["mimic_loss"] + sparse["lm_loss"] + 0.01 * sparse["balance_loss"]
    torch.testing.assert_close(sparse["loss"], wanted)


# Two steps in each of the stages teacher, adaptor, dense, sparse and preferences.
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("at", "reference"), [((1, 6), "teacher"), ((7, 8), "student")])
def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch, at, reference):
    chosen = config(batch_size=12, reference=reference, router_noise=True, capacity_factor=1.0)
    need_equal_ends(monkeypatch, llava_mod.LLaVAMoD, "llava-mod", chosen, DATA, at, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "llava-mod", "--data", DATA, "--out", str(tmp_path), "--name", "two"]
    settings = SMALL | {"batch_size": 5}  # of 16 chats, the last batch of an epoch has one
    command_over_processes(
        [*words, *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())], tmp_path
    )
    one, two = trained(tmp_path, name="one", batch_size=5).metrics(), Run.open(tmp_path / "two").metrics()
    assert len(one) == len(two) == 5
    for mine, other in zip(one, two, strict=True):
        for name in mine:
            assert other[name] == pytest.approx(mine[name], rel=2e-3, abs=1e-5), name


def test_a_finished_run_is_the_sparse_student_alone_and_shows_its_experts(finished):
    weights = finished.load_weights()
    assert all(name.startswith("model.") for name in weights)
    assert any(".experts.3." in name for name in weights)
    learner: Any = load_learner(finished)
    assert len(mixtures_of(learner.model)) == 1
    figure = finished.figures()["Experts"]
    assert figure["names"] == ["layer 0 text", "layer 0 image"]
    assert np.allclose(np.sum(figure["values"], 1), 1)
    assert "chose" in figure["caption"] or "Every expert has tokens" in figure["caption"]


def test_a_finished_student_learns_preferences_from_a_finished_teacher(finished, tmp_path):
    given = {"model": f"run:{finished.path}", "teacher": f"run:{finished.path}"}
    stages = {"epochs": 0, "adaptor_epochs": 0, "sparse_epochs": 0, "preference_epochs": 1}
    second = trained(tmp_path, **given, **stages)
    before, after = finished.load_weights(), second.load_weights()
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    assert second.metrics()[0]["train/reward_accuracy"] == 0  # no pair is preferred more than by itself


def test_a_teacher_of_another_vocabulary_is_refused(finished, tmp_path):
    data = DATA.replace("train=16", "train=18").replace("pairs=16", "pairs=3") + "&questions=2"
    other = trained(tmp_path, data, vocabulary=280)
    with pytest.raises(CounterpointError, match=r"differ in the numbers of \d+ tokens"):
        trained(tmp_path, model=f"run:{other.path}", teacher=f"run:{finished.path}")


def test_a_teacher_that_does_not_fit_is_refused(finished, tmp_path):
    with pytest.raises(CounterpointError, match=r"takes pictures of 16 pixels, these data have 24"):
        trained(tmp_path, DATA.replace("grid=2", "grid=3"), teacher=f"run:{finished.path}")
    with pytest.raises(CounterpointError, match=r"reads 64 tokens, fewer than context \(80\)"):
        trained(tmp_path, teacher=f"run:{finished.path}", context=80)
    with pytest.raises(CounterpointError, match="teacher llama-16-1-2 takes no pictures"):
        trained(tmp_path, teacher="llama-16-1-2")
    with pytest.raises(CounterpointError, match="the weights are of 4 experts, the settings name 2"):
        trained(tmp_path, model=f"run:{finished.path}", experts=2)


# ---------------------------------------------------------------------------------------------------------- preferences


def preferences(folder: Path, equal: int, others: int, long: int = 0) -> str:
    """Write preference pairs and some chats of text; return the source."""
    lines = [{"prompt": f"name {n}", "chosen": f"a {n}", "rejected": f"a {n}"} for n in range(equal)]
    lines += [{"prompt": f"name {n}", "chosen": f"a {n}", "rejected": f"b {n}"} for n in range(others)]
    lines += [
        {"prompt": f"name {n}", "chosen": f"a {n}", "rejected": "b c d e f g h i j k l m n o p " * 9}
        for n in range(long)
    ]
    turns = ("user", "assistant")
    chats = [{"messages": [{"role": r, "content": f"{r} {n}"} for r in turns]} for n in range(8)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(x) for x in (lines + chats if name == "train" else chats))
        )
    return f"chats:{folder}"


TEXT = {"model": "qwen2-16-2-2", "teacher": "qwen2-24-1-2"}


def test_equal_pairs_are_left_out_and_counted(tmp_path):
    said: list[str] = []
    data = preferences(tmp_path, 2, 5, 1)
    run = training.train("llava-mod", config(data, **TEXT), data=data, out=tmp_path / "runs", say=said.append)
    assert any("2 of 8 preference pairs have two equal answers" in line for line in said)
    assert any("1 of 8 preference pairs have a rejected answer longer" in line for line in said)
    assert run.figures()["Experts"]["names"] == ["layer 0 text"]


def test_pairs_that_are_all_equal_are_refused_before_training(tmp_path):
    data = preferences(tmp_path, 3, 0)
    with pytest.raises(DataError, match="of 3 preference pairs 3 have two equal answers"):
        training.train("llava-mod", config(data, **TEXT), data=data, out=tmp_path / "runs", say=lambda _: None)


def test_chats_without_a_rejected_answer_are_refused_and_the_stage_can_be_left_out(tmp_path):
    data = preferences(tmp_path, 0, 0)
    with pytest.raises(DataError, match="no training chat has a rejected answer"):
        training.train("llava-mod", config(data, **TEXT), data=data, out=tmp_path / "runs", say=lambda _: None)
    run = training.train(
        "llava-mod", config(data, preference_epochs=0, **TEXT), data=data, out=tmp_path / "more", say=lambda _: None
    )
    assert "test/reward_accuracy" not in run.metrics()[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"experts": 1}, "experts must be at least 2"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"objective": "kl"}, "unknown objective"),
        ({"preference": "dpo"}, "unknown preference"),
        ({"reference": "none"}, "unknown reference"),
        ({"label_smoothing": 0.1}, "--preference sigmoid alone"),
        ({"preference_epochs": -1}, "must not be negative"),
        ({"teacher": "vit-s"}, "unknown model"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(changed, said):
    with pytest.raises(CounterpointError, match=said):
        config(**changed)


# ------------------------------------------------------------------------------------------------------ data and measures


def test_pairs_of_the_built_in_chats_differ_by_an_object_that_the_picture_does_not_show():
    data, plain = (
        grid_chats.load(train=5, valid=3, test=3, questions=0, pairs=4),
        grid_chats.load(train=5, valid=3, test=3, questions=0),
    )
    assert len(data.train.images) == 9
    assert [bool(chat.rejected) for chat in data.train.chats] == [False] * 5 + [True] * 4
    assert all(chat.rejected for chat in data.test.chats)
    assert data.train.chats[:5] == plain.train.chats
    for chat in data.train.chats[5:] + data.test.chats:
        assert set(mentioned(chat.answer, data.objects)) == set(chat.objects)
        assert len(set(mentioned(chat.rejected, data.objects)) - set(chat.objects)) == 1


def test_experts_without_a_token_are_counted_and_named():
    counts = np.array([[[3, 1, 0], [0, 0, 0]], [[1, 1, 2], [0, 0, 0]]])
    assert expert_measures(counts.sum(1)) == {"idle_experts": 1.0, "least_expert_share": 0.0}
    figure = expert_figure(counts, (0, 2), ("text", "image"))
    assert figure["names"] == ["layer 0 text", "layer 2 text"]  # no picture
    assert figure["values"][0] == [0.75, 0.25, 0.0]
    assert "No token chose expert 2 of layer 0." in figure["caption"]
