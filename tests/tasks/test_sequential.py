"""Any system over a stream: phases, headlines after each, systems of several stages, resuming, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterpoint import training
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.classics import clip, supcon
from counterpoint.tasks.phases import task_figures
from counterpoint.tasks.sequential import Sequential
from interrupted import need_equal_ends
from launch import command_over_processes

PAIRS = "stream:digit-domains%3Ftrain=40%26test=20%26domains=3?order=2,0,1"
DIGITS = "stream:digits%3Fsize=8%26train=300?by=class&phases=3"
CLIP = {"image_encoder": "mlp-s", "text_encoder": "tower-16-1-8", "embedding": 8, "recipe": "none", "epochs": 2}
CLIP |= {"batch_size": 20, "context": 16, "evaluate_every": 9, "warmup_epochs": 0}
SUPCON = {"encoder": "mlp-s", "batch_size": 40, "epochs": 1, "hidden": 8, "projection": 8, "recipe": "none"}
SUPCON |= {"evaluate_every": 9, "warmup_epochs": 0}


def streamed(slug, data, settings):
    """Return a learner over a stream and its task, as a run builds them."""
    experiment = Experiment.resolve(slug, data, overrides=settings)
    source = experiment.source()
    task = experiment.task(source)
    return experiment._over_stream(experiment.learner(task.facts, 0), task, task.facts), task


def test_each_phase_trains_on_its_own_items_and_fills_a_row(monkeypatch):
    learner, task = streamed("clip", PAIRS, CLIP)
    assert [stage.name for stage in learner.stages()] == ["transposed", "plain", "inverted"]
    seen, loss = [], clip.CLIP.loss

    def watched(self, batch):
        seen.append((self.position.stage, set(task.data.train.domains[batch["index"].numpy()])))
        return loss(self, batch)

    monkeypatch.setattr(clip.CLIP, "loss", watched)
    row = fit(learner, task, bar=False)[-1]
    # The learner's own code counts its one stage in every phase.
    assert seen == [(0, {phase}) for phase in (0, 1, 2) for _ in range(4)]
    for at, split in enumerate(("valid", "test")):
        matrix = learner.stream_history[at].double().numpy()
        assert np.isfinite(matrix).all()
        for name, value in task_figures(matrix).items():
            assert row[f"{split}/stream_{name}"] == pytest.approx(value, abs=1e-6)


def test_the_last_row_is_the_headline_on_each_phase_s_items():
    learner, task = streamed("supcon", DIGITS, SUPCON)
    fit(learner, task, bar=False)
    for phase, part in enumerate(learner.stream_tasks):
        assert set(part.split("test").domains) == {phase}
        assert learner._measured(part, "test") == pytest.approx(learner.stream_history[1, -1, phase].item())
    shown = learner.figures(learner.survey)["What each phase kept"]
    assert (shown["names"], np.shape(shown["values"])) == (["zero to three", "four to six", "seven to nine"], (3, 3))


def test_a_system_of_several_stages_repeats_them_in_every_phase():
    settings = {"encoder": "mlp-s", "teacher_encoder": "mlp-s", "teacher_epochs": 1, "epochs": 1, "batch_size": 40}
    learner, task = streamed("kd", DIGITS, settings | {"recipe": "none", "evaluate_every": 9})
    names = [stage.name for stage in learner.stages()]
    assert len(names) == 6
    assert names[0].startswith("zero to three, ")
    rows = fit(learner, task, bar=False)
    assert "test/teacher_accuracy" in rows[-1]
    assert np.isfinite(rows[-1]["test/stream_last"])


def test_a_run_over_a_stream_is_loaded_and_measured_as_its_system(tmp_path):
    config = Experiment.resolve("clip", PAIRS, overrides=CLIP).config
    run = training.train("clip", config, data=PAIRS, out=tmp_path, name="one", say=lambda _: None)
    assert not isinstance(load_learner(run), Sequential)
    found, last = training.evaluate(run.path, say=lambda _: None), run.metrics()[-1]
    assert found["mean_recall"] == pytest.approx(last["test/mean_recall"], abs=1e-6)
    assert "What each phase kept" in (run.path / "report.html").read_text()
    assert Run.open(run.path).config["data"] == PAIRS  # the order is on record
    begun = training.train("clip", config, data=PAIRS, parent=run.path, out=tmp_path, name="two", say=lambda _: None)
    assert begun.metrics()[-1].keys() == last.keys()


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("clip", PAIRS, overrides=CLIP).config
    # In each phase.
    need_equal_ends(monkeypatch, clip.CLIP, "clip", config, PAIRS, (1, 6, 10), tmp_path)


def test_a_learner_of_phases_takes_a_stream_as_it_is():
    settings = {
        "image_encoder": "mlp-s",
        "text_encoder": "tower-16-1-8",
        "embedding": 8,
        "recipe": "none",
        "batch_size": 20,
    }
    learner, _ = streamed("mod-x", PAIRS, settings | {"context": 16})
    assert not isinstance(learner, Sequential)
    assert learner.names == ["transposed", "plain", "inverted"]


@pytest.mark.parametrize(
    ("slug", "data", "settings", "error", "said"),
    [
        ("mean-teacher", DIGITS, {"encoder": "mlp-s"}, CounterpointError, "composes its batches by labels"),
        ("supcon", DIGITS, SUPCON | {"images_per_class": 4}, CounterpointError, "set --images-per-class 0"),
        (
            "adainf",
            DIGITS,
            {"encoder": "mlp-s"},
            CounterpointError,
            "adainf changes its data, so it cannot be run over",
        ),
        ("supcon", DIGITS, SUPCON | {"batch_size": 200}, DataError, "fewer than a batch of 200; use --batch-size"),
    ],
)
def test_systems_and_phases_that_do_not_fit_are_named(slug, data, settings, error, said):
    experiment = Experiment.resolve(slug, data, overrides=settings)
    with pytest.raises(error, match=said):
        experiment.run(0)


def test_a_stage_with_batches_of_its_own_is_refused(monkeypatch):
    from counterpoint.engine.stages import Stage

    monkeypatch.setattr(supcon.SupCon, "stages", lambda self: [Stage("own", 1, batches=lambda survey: None)])
    learner, _ = streamed("supcon", DIGITS, SUPCON)
    with pytest.raises(CounterpointError, match="chooses the batches of its stage 'own' by itself"):
        learner.stages()
    assert torch.isnan(learner.stream_history).all()


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "clip", "--data", PAIRS, "--out", str(tmp_path), "--name", "two"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in CLIP.items()]
    command_over_processes(words, tmp_path)
    config = Experiment.resolve("clip", PAIRS, overrides=CLIP).config
    one = training.train("clip", config, data=PAIRS, out=tmp_path, name="one", say=lambda _: None).metrics()[-1]
    two = Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "test/stream_last", "test/stream_transfer"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=0.02), name
