"""A survey's passes equal a plain loop, for every form of data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import Task, Toy

from counterpoint.engine.survey import Survey
from counterpoint.experiment import Experiment


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(slug, data, **settings):
    experiment = Experiment.resolve(slug, data, overrides=settings)
    task = experiment.task()
    return Survey(task, experiment.learner(task.facts, 0)), task


def test_survey_gives_the_facts_of_the_data():
    survey = Survey(Task(), Toy())
    assert (survey.examples, survey.batch_size) == (10, 4)
    assert survey.rows.tolist() == list(range(10))
    assert survey.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert survey.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert survey.domains.tolist() == [0, 1] * 5
    assert survey.classes == ("a", "b", "c")
    assert survey.domain_names == ("here", "there")
    assert survey.split("unpaired") is None
    bare = Task()
    del bare.splits["train"].labels
    assert Survey(bare, Toy()).labels is None


def test_over_is_the_loop_in_order(monkeypatch):
    task, toy = Task(examples=11), Toy()
    monkeypatch.setattr("counterpoint.engine.survey.BATCH", 4)
    toy.train()
    seen = []

    def function(batch):
        assert not toy.training
        assert not torch.is_grad_enabled()
        seen.append(len(batch["x"]))
        return toy.encoder(batch["x"])

    survey = Survey(task, toy)
    found = survey.over("train", function)
    assert toy.training
    assert seen == [4, 4, 3]
    expected = toy.eval().encoder(task.split("train").x).detach()
    torch.testing.assert_close(found, expected)
    some = np.array([9, 2, 2, 0, 5])
    torch.testing.assert_close(survey.over("train", function, some), expected[some])
    assert not toy.training  # as it was
    assert survey.over("valid", function).shape == (7, 5)
    toy.train()
    with pytest.raises(ZeroDivisionError):
        survey.over("train", lambda batch: 1 / 0)
    assert toy.training


def test_over_equals_one_picture_at_a_time():
    survey, task = made("simclr", "digits?size=16&train=40&held_out=0.02", encoder="conv-s", hidden=8, batch_size=8)
    learner = survey._learner.eval()
    found = survey.over("train", lambda batch: learner.embed(batch["image"]))
    with torch.no_grad():
        rows = [learner.embed(task.evaluation_batch("train", [n])["image"]) for n in range(survey.examples)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert survey.labels.tolist() == task.data.train.labels.tolist()


def test_over_equals_one_pair_at_a_time():
    settings = {"vector_encoder": "relu-16", "embedding": 6, "batch_size": 8}
    survey, task = made("cwcl", "digit-halves", **settings)
    learner = survey._learner.eval()
    name = next(iter(task.facts["modalities"]))
    rows = np.array([5, 3, 11, 3])
    found = survey.over("test", lambda batch: learner.embed(batch)[name], rows)
    with torch.no_grad():
        plain = [learner.embed(task.evaluation_batch("test", [n]))[name] for n in rows]
    torch.testing.assert_close(found, torch.cat(plain), rtol=1e-4, atol=1e-5)


def test_over_equals_one_bag_at_a_time():
    survey, task = made("macil-sd", "async-bags?train=6&test=3", batch_size=4)
    lengths = survey.over("train", lambda batch: torch.tensor([batch["visual"].shape[1]]))
    assert lengths.tolist() == [task.evaluation_batch("train", [n])["visual"].shape[1] for n in range(6)]
    learner = survey._learner.eval()

    def mean(batch):
        (first, *_) = learner.predict(batch).values()
        return first.mean()[None]

    found = survey.over("valid", mean)
    with torch.no_grad():
        plain = torch.cat([mean(survey.batch("valid", [n])) for n in range(len(task.split("valid")))])
    torch.testing.assert_close(found, plain)
