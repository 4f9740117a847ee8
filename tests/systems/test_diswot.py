"""DisWOT: the authors' numbers, identities of its distances, the search, resuming in both parts, what is refused."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.core import grams
from counterpoint.encoders.spaces import Space
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import diswot as file
from counterpoint.tasks.searched import propose
from counterpoint.tasks.taught import Classifier

pytestmark = pytest.mark.filterwarnings("ignore:the student")
PARITY = np.load(Path(__file__).parents[1] / "parity" / "diswot.npz")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- distances


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_score_and_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}

    def held(name: str) -> Tensor:
        return torch.from_numpy(PARITY[f"case{case}/{name}"])

    def equal(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found.double(), held(name), **tolerance)

    teacher, student = (held(f"in/feat_{side}").to(dtype) for side in ("teacher", "student"))
    x = student.clone().requires_grad_()
    distance = fn.relation_distance(teacher, x)
    distance.backward()
    equal(distance.detach(), "out/relation_distance")
    equal(x.grad, "grad/feat_student")
    slopes = []
    for maps, side in ((teacher, "teacher"), (student, "student")):
        pooled, weight = maps.mean((2, 3)), held(f"weight/W_{side}").to(dtype)
        slopes.append(fn.classifier_gradient(pooled, pooled @ weight.T, held("in/labels")))
        equal(slopes[-1], f"out/grad_W_{side}")
    if case:
        equal(fn.semantic_distance(*slopes), "out/semantic_distance")
        equal(fn.diswot_score(teacher, student, *slopes), "out/score")
    if case == 2:
        equal(fn.channel_correlation(student, teacher), "out/ickd_features")


def rows_of_length_one(x: Tensor) -> Tensor:
    return F.normalize(x @ x.mT, dim=-1, eps=1e-12)


@pytest.mark.parametrize("block", [1, 7, 40, 2**22])
def test_distances_in_blocks_equal_whole_matrices(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "BLOCK", block)
    t, s = draw(5, 3, 4, 2), draw(5, 3, 2, 3, seed=1).requires_grad_()
    for found, wanted in (
        (
            fn.relation_distance(t, s),
            (rows_of_length_one(t.flatten(1)) - rows_of_length_one(s.flatten(1))).square().mean(),
        ),
        (
            fn.channel_correlation(s, t),
            (rows_of_length_one(t.flatten(2)) - rows_of_length_one(s.flatten(2))).square().sum() / 15,
        ),
    ):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (found, wanted)))


def test_rows_too_short_to_normalise_have_the_gradient_of_their_quotient() -> None:
    t, s = draw(4, 3), (1e-7 * draw(4, 3, seed=1)).requires_grad_()
    wanted = (rows_of_length_one(t) - rows_of_length_one(s)).square().mean()
    found = fn.relation_distance(t, s)
    assert float(torch.linalg.vector_norm(s @ s.mT, dim=1).max().detach()) < 1e-12
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (found, wanted)))


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-18, 1e-30])
def test_the_semantic_distance_equals_all_matrices_of_all_classes(size: float) -> None:
    t, s = draw(4, 6), size * draw(4, 6, seed=1)
    s[1], s[2, 3] = 0, 0
    s.requires_grad_()
    matrices = [F.normalize(g[:, :, None] * g[:, None], dim=2, eps=1e-12) for g in (t, s)]
    wanted = (matrices[0] - matrices[1]).square().sum() / t.numel()
    found = fn.semantic_distance(t, s)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    rest = torch.ones_like(s).bool()
    rest[1], rest[2, 3] = False, False  # there the matrices have a kink
    slopes = [torch.autograd.grad(x, s)[0][rest] for x in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9 * float(slopes[1].abs().max()))
    assert fn.semantic_distance(t.float(), s.detach().float()).isfinite()


def test_equal_networks_are_at_distance_zero_and_scores_ignore_scale_rotation_and_sign() -> None:
    t, s, g, h = draw(6, 2, 3, 3), draw(6, 8, seed=1), draw(5, 4, seed=2), draw(5, 4, seed=3)
    assert fn.relation_distance(t, t) == fn.semantic_distance(g, g) == fn.channel_correlation(t, t) == 0
    rotation = torch.linalg.qr(draw(8, 8, seed=4)).Q
    torch.testing.assert_close(fn.relation_distance(3 * t, -7 * s @ rotation), fn.relation_distance(t, s))
    factors = torch.tensor([-1.0, 2.0, 0.5, -3.0, 1e3], dtype=torch.float64)[:, None]
    torch.testing.assert_close(fn.semantic_distance(g, factors * h), fn.semantic_distance(g, h))
    torch.testing.assert_close(fn.diswot_score(t, s, g, h), -fn.relation_distance(t, s) - fn.semantic_distance(g, h))
    # Any widths, by classes.
    assert fn.semantic_distance(g, torch.cat([g, g], 1), "classes") == pytest.approx(0, abs=1e-15)
    matrices = [rows_of_length_one(x) for x in (g, h[:, :3])]
    torch.testing.assert_close(
        fn.semantic_distance(g, h[:, :3], "classes"), (matrices[0] - matrices[1]).square().mean()
    )


def test_edges_have_the_right_value() -> None:
    equal, t = torch.ones(4, 3), draw(4, 5).float()
    assert fn.relation_distance(equal, 2 * torch.ones(4, 7)) == pytest.approx(0, abs=1e-12)  # images all alike
    assert fn.relation_distance(t[:1], t[1:2]) == pytest.approx(0, abs=1e-12)  # a batch of one
    dead = t.clone()
    dead[0] = 0  # its row of the Gram matrix stays 0
    wanted = (rows_of_length_one(t) - rows_of_length_one(dead)).square().mean()
    torch.testing.assert_close(fn.relation_distance(t, dead), wanted)
    assert rows_of_length_one(dead)[0].tolist() == [0, 0, 0, 0]
    x = torch.zeros(3, 4, requires_grad=True)
    for distance in (fn.relation_distance(t[:3], x), fn.semantic_distance(t[:3, :4], x)):
        assert distance > 0
        distance.backward()
        assert x.grad.isfinite().all()
    one_class = fn.classifier_gradient(t, torch.zeros(4, 2), torch.zeros(4).long())
    torch.testing.assert_close(one_class[0], -t.mean(0) / 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fn.relation_distance(draw(3, 2), draw(4, 2)), "feat_teacher and feat_student must be"),
        (lambda: fn.relation_distance(draw(0, 2), draw(0, 2)), "feat_student is an empty batch"),
        (lambda: fn.channel_correlation(draw(3, 2, 4), draw(3, 5, 4)), "with as many channels"),
        (
            lambda: fn.semantic_distance(draw(3, 2), draw(3, 5)),
            "grad_W_teacher and grad_W_student must be of equal width",
        ),
        (lambda: fn.semantic_distance(draw(3, 2), draw(4, 2)), "grad_W_teacher and grad_W_student"),
        (lambda: fn.semantic_distance(draw(3, 2), draw(4, 2), "classes"), "the same classes"),
        (lambda: fn.semantic_distance(draw(3, 2), draw(3, 2), "rows"), "compare must be"),
        (lambda: fn.classifier_gradient(draw(3, 2), draw(3, 5), torch.tensor([0, 1, 5])), r"labels must lie in 0\.\.4"),
        (lambda: fn.classifier_gradient(draw(3, 2), draw(2, 5), torch.tensor([0, 1, 2])), "feature, logits and labels"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# --- the search

DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {
    "teacher_encoder": "resnet-cifar:2-2-2?width=4", "width": 4, "choices": (1, 2, 3), "batch_size": 20, "epochs": 1,
    "teacher_epochs": 1, "score_batch": 8, "repeats": 1, "candidates": 12, "population": 5, "evaluate_every": 1,
}  # fmt: skip


def learner(**settings: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("diswot", DATA, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 3), task


def evolved(steps: int, **settings: Any) -> tuple[list[tuple[Any, float]], list[Any], Space]:
    """Run an evolution on a known score, the sum of the places."""
    space = Space("nas-201", tuple(range(5)))
    within = [member for member in space.members() if sum(member) <= 20]
    config = SimpleNamespace(
        **{"search": "evolution", "population": 12, "sample": 6, "parents": 2, "crossover": 0.0} | settings
    )
    rng, history, parents = np.random.default_rng(0), [], []
    for _ in range(steps):
        member, parent = propose(history, space, within, config, rng)
        parents.append(parent)
        history.append((member, float(sum(member))))
    assert all(sum(member) <= 20 for member, _ in history)
    return history, parents, space


def test_evolution_changes_one_place_of_a_good_parent_that_is_alive() -> None:
    history, parents, space = evolved(120)
    first = [member for member, _ in history[:12]]
    assert len(set(first)) == 12
    assert parents[:12] == [None] * 12
    better = []
    for at in range(12, 120):
        alive = [member for member, _ in history[at - 12 : at]]
        assert parents[at] in alive
        assert history[at][0] in space.neighbours(parents[at])
        better.append(sum(parents[at]) - np.mean([sum(member) for member in alive]))
    assert np.mean(better) > 0.5  # the best of a sample, not the worst
    assert np.mean([score for _, score in history[-12:]]) > np.mean([score for _, score in history[:12]]) + 2.5


def test_crossover_takes_every_place_from_one_of_two_parents() -> None:
    history, _, space = evolved(80, crossover=1.0)
    children, mixed = [member for member, _ in history], 0
    for at in range(12, 80):
        alive = children[at - 12 : at]
        near = any(children[at] in space.neighbours(one) for one in alive)
        of_two = any(
            all(c in pair for c, pair in zip(children[at], zip(a, b, strict=True), strict=True))
            for a in alive
            for b in alive
        )
        assert near or of_two
        mixed += of_two
    assert mixed > 50


def test_random_and_exhaustive_search_try_every_member_once() -> None:
    for search in ("random", "all"):
        model, task = learner(search=search, candidates=100, metric="flops", epochs=0, choices=(1, 3))
        fit(model, task, bar=False)
        members = [tuple(one["member"]) for one in model.history]
        assert sorted(members) == sorted(model.space.members())
        assert (members == model.space.members()) == (search == "all")
        assert model.student == "resnet-cifar:3-3-3?width=4"
        assert len(model.encoder.layer3) == 3


def test_a_score_is_that_of_gradients_through_the_whole_networks() -> None:
    model, task = learner(initialisation="normal", repeats=2)
    model.survey = Survey(task, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.score((1, 3, 2))
    totals = []
    for repeat in range(2):
        seen = []
        rows = np.random.default_rng([3, repeat]).permutation(60)[:8]
        batch = model.survey.batch("train", rows)
        for name, drawn in (("resnet-cifar:2-2-2?width=4", ()), ("resnet-cifar:1-3-2?width=4", (1, 3, 2))):
            torch.manual_seed(int(np.random.SeedSequence([3, repeat, *drawn]).generate_state(1)[0]))
            network = Classifier(name, model.facts).train()
            for module in network.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    torch.nn.init.normal_(module.weight)
            torch.nn.init.zeros_(network.classifier.bias)
            maps = network.encoder.features(batch["image"])
            F.cross_entropy(network.classifier(maps.mean((2, 3))), batch["label"]).backward()
            seen.append((maps.detach(), network.classifier.weight.grad))
        (a, g), (b, h) = seen
        totals.append(float(fn.diswot_score(a, b, g, h)))
    assert found["score"] == pytest.approx(np.mean(totals), rel=1e-4)
    assert found["score"] == pytest.approx(-found["relation"] - found["semantic"], rel=1e-5)
    assert model.score((1, 3, 2)) == found  # the same teacher and batch again
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("metric", ["relation", "semantic"])
def test_each_metric_alone_is_the_score(metric: str) -> None:
    model, task = learner(metric=metric)
    model.survey = Survey(task, model)
    found = model.score((1, 1, 2))
    assert found["score"] == -found[metric]


def test_training_calls_the_functions_that_equal_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {"relation_distance": [], "channel_correlation": [], "semantic_distance": []}
    for name in calls:
        function = getattr(file, name)

        def seen(*given: Any, name: str = name, function: Any = function) -> Tensor:
            calls[name].append(given)
            return function(*given)

        monkeypatch.setattr(file, name, seen)
    model, task = learner(candidates=4, gradient_weight=0.5, teacher_epochs=0, relation_weight=2.0)
    rows = fit(model, task, bar=False)
    assert [row["stage"] for row in rows] == [0, 1]
    assert len(calls["relation_distance"]) == len(calls["semantic_distance"]) == 4 + 3  # candidates and steps
    assert len(calls["channel_correlation"]) == 3
    last = calls["relation_distance"][-1]
    assert last[0].shape == last[1].shape == (20, 16, 2, 2)
    assert last[1].requires_grad
    assert not last[0].requires_grad
    terms = [rows[1][f"train/{name}"] for name in ("ce", "kd", "relation", "channel", "gradient")]
    assert sum(terms) == pytest.approx(rows[1]["train/loss"], rel=1e-5)
    mean = np.mean([float(fn.relation_distance(*given).detach()) for given in calls["relation_distance"][-3:]])
    assert rows[1]["train/relation"] == pytest.approx(2 * mean, rel=1e-4)


def test_the_search_trains_nothing_and_stops_when_every_member_or_the_time_is_spent() -> None:
    model, task = learner(metric="parameters", candidates=90, epochs=0, choices=(1, 2))
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    adopt = model.adopt

    def unchanged(name: str) -> None:
        assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
        adopt(name)

    model.adopt = unchanged
    fit(model, task, bar=False)
    members = [tuple(one["member"]) for one in model.history]
    assert len(set(members)) == 8
    assert 8 < len(members) < 90  # some more than once, with the same score
    scores = {(tuple(one["member"]), one["score"]) for one in model.history}
    assert len(scores) == 8
    model, task = learner(metric="parameters", seconds=1e-9, epochs=0)
    fit(model, task, bar=False)
    assert len(model.history) == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stop", ["in the search", "in the student's stage"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Experiment.resolve("diswot", DATA, overrides=SMALL | {"choices": (1, 2), "candidates": 8}).config
    count, at, score, loss = 0, -1, file.DisWOT.score, file.DisWOT.loss
    scored: list[Any] = []

    def struck() -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1

    def seen(self: Any, member: Any) -> dict[str, float]:
        if stop == "in the search":
            struck()
        scored.append(member)
        return score(self, member)

    def step(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        if stop != "in the search" and not self.at_teacher:
            struck()
        return loss(self, batch)

    monkeypatch.setattr(file.DisWOT, "score", seen)
    monkeypatch.setattr(file.DisWOT, "loss", step)
    options: dict[str, Any] = {
        "data": DATA,
        "seed": 3,
        "out": tmp_path,
        "say": lambda _: None,
        "loop": Loop(checkpoint_minutes=9),
    }
    whole = training.train("diswot", config, name="whole", **options)
    once = scored.copy()
    scored.clear()
    count, at = 0, 3 if stop == "in the search" else 1
    with pytest.raises(Interrupted):
        training.train("diswot", config, name="halves", **options)
    halves = training.resume(tmp_path / "halves", say=lambda _: None)
    assert scored == once  # nothing is scored twice
    assert whole.metrics() == halves.metrics()
    one, other = whole.structure(), halves.structure()
    assert one["history"] == other["history"]
    assert one["encoder"] == other["encoder"]
    weights = halves.load_weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.load_weights().items())
    assert len(once) == len({tuple(each["member"]) for each in one["history"]})


def test_all_of_the_published_space_is_compared_with_published_accuracies() -> None:
    model, task = learner(metric="parameters", width=16, choices=(), search="all", candidates=64, epochs=0)
    rows = fit(model, task, bar=False)
    found = {name.removeprefix("test/"): value for name, value in rows[-1].items() if name.startswith("test/")}
    assert found["kendall"] == pytest.approx(0.873, abs=5e-4)
    assert found["spearman"] > found["pearson"] > found["kendall_plain"] > 0.7
    shown = model.eval().figures(model.survey or Survey(task, model))
    assert len(shown["Scores and published accuracy"]["points"]["students"]) == 64
    model.history = model.history[:-1]
    assert model.measures(Survey(task, model), "test") == {}


@pytest.mark.usefixtures("undrawn")
def test_a_run_from_another_one_s_weights_keeps_its_student(tmp_path: Path) -> None:
    config = Experiment.resolve("diswot", DATA, overrides=SMALL | {"choices": (1, 2), "candidates": 4}).config
    options: dict[str, Any] = {"seed": 3, "out": tmp_path, "say": lambda _: None}
    first = training.train("diswot", config, data=DATA, name="first", **options)
    again = training.train("diswot", name="again", parent=first.path, **options)
    assert again.structure() == first.structure()
    before, after = first.load_weights(), again.load_weights()
    moved = float((after["encoder.stem.0.weight"] - before["encoder.stem.0.weight"]).norm())
    assert 0 < moved < 0.5 * float(before["encoder.stem.0.weight"].norm())


def test_unequal_maps_are_projected_and_a_named_student_is_not_searched() -> None:
    model, task = learner(encoder="conv-s", teacher_epochs=0)
    assert [stage.name for stage in model.stages()] == ["student"]
    assert model.regressor.weight.shape == (16, 128, 1, 1)
    notes: list[str] = []
    rows = fit(model, task, bar=False, say=notes.append)
    assert len(notes) == 1
    assert re.fullmatch(r"note: the student has [\d,]+ parameters, more than its teacher with [\d,]+", notes[0])
    assert rows[0]["train/channel"] > 0
    plain, task = learner(
        encoder="mlp-s", teacher_encoder="mlp-s", teacher_epochs=0, relation_weight=0.0, channel_weight=0.0
    )
    assert set(fit(plain, task, bar=False)[0]) >= {"train/ce", "train/kd", "test/accuracy"}


# --- from the command line


def words(settings: dict[str, Any]) -> list[str]:
    said = []
    for name, value in settings.items():
        said += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return said


def test_on_a_folder_of_images_a_cell_is_found_shown_and_teaches_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "mine" / name / f"{number}.png")
    data = ["--data", f"imagefolder:{tmp_path / 'mine'}?size=8", "--out", str(tmp_path)]
    cells = {"space": "nas-201", "cells": 1, "choices": (0, 1, 3), "flops_limit": 0.05, "teacher_epochs": 0}
    said = ["train", "diswot", *data, *words(SMALL | cells)]
    assert cli.main([*said, "--name", "r"]) == 0
    run = Run.open(tmp_path / "r")
    page = (run.path / "report.html").read_text()
    for heading in ("Scores in the order of the search", "Candidates by size and score", "Best candidates"):
        assert heading in page
    assert len(run.structure()["history"]) == 12
    assert run.structure()["encoder"].startswith("nas-201:")
    assert training.evaluate(run.path)["accuracy"] == pytest.approx(run.metrics()[-1]["test/accuracy"])
    found = training.load_learner(run.path)
    assert found.costs[tuple(max(found.history, key=lambda one: one["score"])["member"])][0] <= 50_000
    again = [
        "train",
        "kd",
        *data,
        "--teacher",
        str(run.path),
        "--encoder",
        "conv-s",
        "--epochs",
        "1",
        "--batch-size",
        "20",
    ]
    assert cli.main([*again, "--name", "k"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"choices": (2,)}, "the search space has one member, resnet-cifar:2-2-2?width=4: there is nothing to search"),
        ({"flops_limit": 0.06}, "the search space has one member, resnet-cifar:1-1-1?width=4"),
        ({"flops_limit": 1e-6}, "flops_limit 1e-06: no candidate has so few multiply-adds"),
        ({"width": 8}, "candidates have 32 channels, the teacher resnet-cifar:2-2-2?width=4 has 16"),
        ({"choices": (1, 0)}, "choices of resnet-cifar must lie in 1..1000"),
        ({"encoder": "conv-s", "epochs": 0}, "epochs 0 is a search alone"),
        ({"encoder": "mlp-s"}, "MLPS has no feature map"),
        ({"crossover": 2.0}, "crossover must lie in 0..1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"seconds": -1.0}, "seconds must be at least 0"),
        ({"flops_limit": float("nan")}, "flops_limit must be finite"),
        ({"teacher_encoder": "resnet-cifar:3"}, "takes A-B-C"),
        ({"channel_weight": -1.0}, "weights must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_named_and_leave_nothing(
    settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--out", str(tmp_path / "runs")]
    assert cli.main(["train", "diswot", "--data", DATA, *words(SMALL | settings), *place]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_unequal_widths_are_compared_by_classes_or_not_at_all() -> None:
    for changed in ({"semantic": "classes"}, {"metric": "relation"}):
        model, task = learner(width=2, **changed)
        model.survey = Survey(task, model)
        found = model.score((1, 1, 1))
        assert ("semantic" in found) == ("semantic" in changed)


def test_a_score_that_is_not_finite_names_its_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = learner(initialisation="normal")
    model.survey = Survey(task, model)
    monkeypatch.setattr(file, "relation_distance", lambda *given: torch.tensor(torch.nan))
    with pytest.raises(CounterpointError, match=r"score of resnet-cifar:1-1-3\?width=4 is nan with normal weights"):
        model.score((1, 1, 3))
