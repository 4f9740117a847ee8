"""One experiment: how settings are resolved, runs of a system's own, and starts that are refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from counterpoint import catalog, cli, training
from counterpoint.data.optical import load_digits
from counterpoint.engine.optim import OptimConfig, optimisers
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, Interrupted, RunError
from counterpoint.experiment import Experiment, fitted, load_learner
from counterpoint.systems.settings import flat, with_settings


@dataclass
class PartConfig:
    """Settings of a part."""

    hardest: int = 64


@dataclass
class WholeConfig:
    """Settings of a composed system."""

    lr: float = 0.1
    widths: tuple[int, ...] = (4, 2)
    parts: dict[str, PartConfig] = field(default_factory=lambda: {"hard-part": PartConfig()})


def test_settings_are_the_papers_then_the_recipes_then_the_overrides():
    system = catalog.load_system("simclr")
    paper = Experiment.resolve("simclr", "digits", recipe=False)
    recipe = Experiment.resolve("simclr", "digits")
    assert paper.config == system.config()
    assert recipe.config == system.config(**system.recipe_for("digits"))
    assert recipe.follows_recipe
    mine = Experiment.resolve("simclr", "digits", overrides={"epochs": 3})
    assert mine.config == replace(recipe.config, epochs=3)
    assert mine.changed["epochs"] == 3
    assert not mine.follows_recipe


def test_a_dotted_name_and_a_mapping_set_the_settings_of_a_part():
    for values in ({"hard-part.hardest": 8}, {"hard-part": {"hardest": 8}}, {"parts": {"hard-part": {"hardest": 8}}}):
        assert flat(with_settings(WholeConfig(), values, "x")) == {"lr": 0.1, "widths": (4, 2), "hard-part.hardest": 8}
    assert with_settings(WholeConfig(), {"widths": [3]}, "x").widths == (3,)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lrr", "x has no setting lrr"),
        ("hard-part.hardst", r"x has no setting hard-part\.hardst; did you mean hard-part\.hardest"),
        ("soft-part.hardest", "x has no part soft-part"),
        ("lr.hardest", r"x has no setting lr\.hardest"),
    ],
)
def test_an_unknown_setting_is_refused_by_name(name, said):
    with pytest.raises(CounterpointError, match=said):
        with_settings(WholeConfig(), {name: 1}, "x")


def test_settings_are_checked_before_data_are_read():
    with pytest.raises(CounterpointError, match="temperature must be > 0"):
        Experiment.resolve("macil-sd", "xd-violence:/nowhere", overrides={"temperature": 0.0})


def test_options_of_the_source_win_over_those_in_its_name():
    made = Experiment.resolve("symile", "xor?train=64", options={"train": 32})
    assert len(made.source().train) == 32


@pytest.fixture
def searching(monkeypatch):
    """Add a system to the catalogue that searches instead of training."""
    asked = []

    def search(experiment, seed, *, run, say):
        asked.append((experiment.config.epochs, experiment.data, seed))
        if seed == 13:
            raise CounterpointError("nothing can be searched with seed 13")
        say("note: searched")
        return [{"epoch": 0, "step": 1, "test/found": 0.25 * seed}]

    system = replace(catalog.load_system("simclr"), run=search)
    monkeypatch.setattr(catalog, "load_system", lambda slug: system)
    return asked


def test_a_systems_own_run_takes_the_place_of_training(searching, tmp_path):
    experiment = Experiment.resolve("simclr", "digits", overrides={"epochs": 2})
    assert experiment.run(2) == [{"epoch": 0, "step": 1, "test/found": 0.5}]
    said = []
    run = training.train("simclr", data="digits", seed=3, out=tmp_path, name="r", say=said.append)
    assert searching[0] == (2, "digits", 2)
    assert run.metrics() == [{"epoch": 0, "step": 1, "test/found": 0.75}]
    assert run.complete
    assert "found 0.7500" in " ".join(said)
    with pytest.raises(RunError, match="trains no network"):
        load_learner(Run.open(tmp_path / "r"))


def test_a_system_with_its_own_run_continues_no_finished_one(searching, tmp_path):
    parent = training.train("simclr", data="digits", seed=3, out=tmp_path, name="r", say=lambda _: None)
    with pytest.raises(CounterpointError, match="leave out --continue"):
        training.train("simclr", parent=parent.path, out=tmp_path, name="s", say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_start_that_its_system_refuses_leaves_nothing(searching, tmp_path):
    with pytest.raises(CounterpointError, match="seed 13"):
        training.train("simclr", data="digits", seed=13, out=tmp_path, name="r", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_does_not_fit_the_data_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "simclr", "--data", "digits?size=8&train=60", "--batch-size", "100", "--encoder", "mlp-s"]
    assert cli.main(words) == 2
    assert "fewer than a batch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits as theirs

    ours, found = load_digits(), theirs()
    for name in ("data", "images", "target"):
        assert np.array_equal(getattr(ours, name), getattr(found, name))
        assert getattr(ours, name).dtype == getattr(found, name).dtype


@pytest.mark.parametrize(("name", "theirs"), [("sgd", "momentum"), ("nesterov", "nesterov"), ("adamw", "adamw")])
def test_optimisers_of_torch_are_those_that_timm_makes(name, theirs):
    from timm.optim import create_optimizer_v2

    module = torch.nn.Linear(3, 2)
    (ours,) = optimisers(OptimConfig(optimizer=name, beta2=0.95), [module], 2, 256).optimizers
    options = {"betas": (0.9, 0.95)} if name.startswith("adam") else {}
    made = create_optimizer_v2(
        list(module.parameters()), opt=theirs, lr=0.03, momentum=0.9, weight_decay=1e-4, **options
    )
    assert isinstance(ours, type(made))
    faster = {"lr": 0, "fused": True}
    assert ours.defaults | faster == made.defaults | faster


def test_a_small_learner_is_not_fitted_by_several_processes(monkeypatch):
    monkeypatch.setattr("counterpoint.experiment.processes", lambda: (0, 2))
    with pytest.raises(CounterpointError, match=r"fit:simclr.* is trained in one process"):
        fitted("simclr?data=digits&epochs=1&seed=7777")


def test_a_small_learner_that_is_interrupted_is_continued_by_the_same_command(monkeypatch, tmp_path):
    def stopped(self, seed, **services):
        assert services["title"] == "simclr (once)"
        raise Interrupted("Continue it: counterpoint train --resume a folder of the cache")

    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(Experiment, "run", stopped)
    with pytest.raises(Interrupted, match=r"^interrupted; the same command or call continues$"):
        fitted("simclr?data=digits&epochs=1&seed=7777")


@pytest.mark.parametrize(
    ("slug", "settings", "notes"),
    [
        (
            "moco-v2+mochi",
            {"epochs": 2, "mochi.mixing_from": 2},
            ["mochi.mixing_from is 2, so mixing never begins in 2 epochs"],
        ),
        ("moco-v2+mochi", {"epochs": 3, "mochi.mixing_from": 2}, []),
        (
            "macil-sd",
            {"epochs": 8, "contrast_delay": 7},
            ["contrast_delay is 7, so the contrast never begins in 8 epochs"],
        ),
        ("macil-sd", {"epochs": 9, "contrast_delay": 7}, []),
        ("simclr", {"epochs": 1}, []),
    ],
)
def test_a_part_of_the_method_that_would_begin_after_the_last_epoch_is_named(slug, settings, notes):
    found = Experiment.resolve(slug, overrides=settings).unreached
    assert [note.partition(";")[0] for note in found] == notes
