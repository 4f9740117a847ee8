"""The task labelled: its measures, its batches, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics, neighbors

from counterpoint import data as sources
from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.engine.loading import Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.labelled import (
    EmbeddingConfig,
    LabelledConfig,
    LabelledEvaluator,
    LabelledTask,
    SemiSupervisedConfig,
    known_labels,
    macro_recall,
    recall_at_1,
)

CLASSES = ("circle", "line", "cross")


def images(labels, test_labels=None, classes=CLASSES, size=8, valid_labels=None):
    def split(values):
        values = None if values is None else np.asarray(values)
        pixels = np.arange(len(labels if values is None else values), dtype=np.uint8)
        return ArrayImages(np.tile(pixels[:, None, None], (1, size, size)), values)

    test_labels = labels if test_labels is None else test_labels
    valid_labels = test_labels if valid_labels is None else valid_labels
    return ImageData("shapes", split(labels), split(valid_labels), split(test_labels), classes, size)


def evaluated(config, batches, final=True):
    evaluator = LabelledEvaluator(config, CLASSES)
    for part, label, outputs in batches:
        evaluator.update({"part": part, "label": label}, outputs)
    return evaluator.compute(final=final), evaluator.figures


def test_classifiers_are_measured_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 200, 3, generator=generator)
    labels = torch.randint(3, (200,), generator=generator).clamp(max=1)  # of the third class there is none
    outputs = [
        {"logits": logits[rows], "teacher_logits": teacher[rows], "feature": logits[rows]}
        for rows in (slice(0, 120), slice(120, 200))
    ]
    found, figures = evaluated(
        LabelledConfig(), [("test", labels[:120], outputs[0]), ("test", labels[120:], outputs[1])]
    )
    for head, values in (("", logits), ("teacher_", teacher)):
        told = values.argmax(1)
        assert found[f"{head}accuracy"] == pytest.approx(metrics.accuracy_score(labels, told))
        recall = metrics.recall_score(labels, told, labels=[0, 1], average="macro")
        assert found[f"{head}macro_recall"] == pytest.approx(recall)
        table = metrics.confusion_matrix(labels, told, labels=[0, 1, 2])
        assert figures["Confusion (teacher)" if head else "Confusion"]["values"] == table.tolist()
    assert len(found) == 4


def test_embeddings_are_measured_by_their_neighbours():
    generator = torch.Generator().manual_seed(0)
    labels, test_labels = torch.randint(3, (150,), generator=generator), torch.randint(3, (80,), generator=generator)
    bank = torch.randn(150, 4, generator=generator) + torch.eye(3, 4)[labels]
    test = torch.randn(80, 4, generator=generator) + torch.eye(3, 4)[test_labels]
    config = EmbeddingConfig(neighbours=5)
    batches = [("bank", labels, {"feature": bank}), ("test", test_labels, {"feature": test})]
    found, figures = evaluated(config, batches)
    unit = [torch.nn.functional.normalize(x, dim=1).numpy() for x in (bank, test)]
    votes = neighbors.KNeighborsClassifier(5, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(
        unit[0], labels.numpy()
    )
    assert found["accuracy"] == found["knn_accuracy"] == pytest.approx(votes.score(unit[1], test_labels.numpy()))
    nearest = neighbors.NearestNeighbors(n_neighbors=2).fit(unit[1]).kneighbors(unit[1])[1][:, 1]
    assert found["recall_at_1"] == pytest.approx((test_labels.numpy()[nearest] == test_labels.numpy()).mean())
    assert np.sum(figures["Confusion"]["values"]) == 80
    assert np.trace(figures["Confusion"]["values"]) / 80 == pytest.approx(found["linear_accuracy"])
    assert "linear_accuracy" not in evaluated(config, batches, final=False)[0]


def test_measures_handle_edge_cases():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert recall_at_1(x, torch.tensor([0, 0, 1])) == 1  # the one alone in its class is not asked
    assert math.isnan(recall_at_1(x, torch.tensor([0, 1, 2])))
    assert macro_recall(torch.tensor([[3, 1, 0], [0, 2, 2], [0, 0, 0]])) == pytest.approx((3 / 4 + 2 / 4) / 2)
    with pytest.raises(CounterpointError, match=r"the logits hold NaN .* lower --lr"):
        evaluated(LabelledConfig(), [("test", torch.tensor([0]), {"logits": torch.full((1, 3), math.nan)})])


def batches(task, seed=0, position=None):
    return list(task.train_loader(seed, position or Position()))


def test_batches_leave_out_what_has_no_class():
    labels = np.array([0, 1, -1, 2, 0, -1, 1, 2, 2])
    task = LabelledTask(images(labels), LabelledConfig(batch_size=3))
    assert task.facts == {
        "size": 8,
        "channels": 3,
        "classes": 3,
        "class_names": list(CLASSES),
        "examples": 9,
    }
    found = batches(task)
    assert [len(batch["index"]) for batch in found] == [3, 3]
    index = torch.cat([batch["index"] for batch in found])
    assert len(set(index.tolist())) == 6
    assert set(index.tolist()) <= set(np.flatnonzero(labels >= 0))
    for batch in found:
        assert batch["label"].tolist() == labels[batch["index"]].tolist()
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()  # its own picture
        assert batch["image"].shape == (3, 3, 8, 8)
    asked = [batch["index"].tolist() for batch in task.evaluation_loader("test")]
    assert asked == [np.flatnonzero(labels >= 0).tolist()]
    later = batches(task, position=Position(epoch=1, batch=1))
    assert [len(batch["index"]) for batch in later] == [3]  # what is done is not read again
    assert [b["index"].tolist() for b in batches(task)] == [b["index"].tolist() for b in found]
    assert [b["index"].tolist() for b in batches(task, seed=1)] != [b["index"].tolist() for b in found]


def test_evaluation_of_embeddings_reads_the_bank_first():
    labels = np.array([0, 1, -1, 2] * 5)
    task = LabelledTask(images(labels, [0, 1, 1, 2]), EmbeddingConfig(batch_size=4, bank=7))
    bank, test = list(task.evaluation_loader("test"))
    assert (bank["part"], test["part"]) == ("bank", "test")
    assert len(bank["index"]) == 7
    assert -1 not in bank["label"]
    assert test["label"].tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(("per_class", "counts"), [(2, [2, 2, 1]), (0, [5, 2, 1]), (9, [5, 2, 1])])
def test_known_labels_are_so_many_of_each_class(per_class, counts):
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2, -1])
    kept = known_labels(labels, per_class, seed=3)
    assert [int((kept == c).sum()) for c in range(3)] == counts
    assert ((kept == labels) | (kept == -1)).all()
    assert (kept == known_labels(labels, per_class, seed=3)).all()
    if per_class == 2:
        assert any((kept != known_labels(labels, per_class, seed=s)).any() for s in range(5))


def test_two_streams_put_known_before_unknown():
    labels = np.repeat([0, 1, 2], 12)
    config = SemiSupervisedConfig(batch_size=8, labelled_batch=3, labels_per_class=2)
    task = LabelledTask(images(labels), config)
    found = batches(task, seed=5)
    assert len(found) == 30 // 5
    known = np.flatnonzero(known_labels(labels, 2, 5) >= 0)
    for batch in found:
        assert (batch["label"] >= 0).tolist() == [True] * 3 + [False] * 5
        assert set(batch["index"][:3].tolist()) <= set(known)
        assert batch["label"][:3].tolist() == labels[batch["index"][:3]].tolist()
    unknown = torch.cat([batch["index"][3:] for batch in found]).tolist()
    assert sorted(unknown) == sorted(set(range(36)) - set(known.tolist()))  # each exactly once
    again = torch.cat([batch["index"][:3] for batch in found]).tolist()
    assert {again.count(row) for row in known} == {3}  # 18 places, 6 of them
    alike = LabelledTask(images(labels), SemiSupervisedConfig(batch_size=8, labelled_batch=0, labels_per_class=2))
    assert sum(int((batch["label"] >= 0).sum()) for batch in batches(alike)) <= 6
    everything = LabelledTask(images(labels), SemiSupervisedConfig(batch_size=8, labelled_batch=3, labels_per_class=0))
    assert all((batch["label"] >= 0).all() for batch in batches(everything))
    few = SemiSupervisedConfig(batch_size=8, labelled_batch=3, labels_per_class=11)
    with pytest.raises(DataError, match="has 3 training images of unknown class, fewer than the 5 of a batch"):
        batches(LabelledTask(images(labels), few))


def test_class_batches_have_equal_numbers_of_each_class():
    labels = np.array([0] * 30 + [1] * 6 + [2] * 3 + [-1] * 3)
    task = LabelledTask(images(labels), EmbeddingConfig(batch_size=12, images_per_class=4))
    found = batches(task)
    assert len(found) == 39 // 12
    for batch in found:
        assert sorted(batch["label"].bincount().tolist()) == [4, 4, 4]
        assert (torch.from_numpy(labels)[batch["index"]] == batch["label"]).all()
        own = batch["index"][batch["label"] == 0]
        assert len(set(own.tolist())) == 4
    assert batches(task)[0]["index"].tolist() == found[0]["index"].tolist()


@pytest.mark.parametrize(
    "config",
    [
        LabelledConfig(batch_size=8),
        EmbeddingConfig(batch_size=8, images_per_class=2),
        SemiSupervisedConfig(batch_size=8, labelled_batch=3, labels_per_class=3),
    ],
    ids=["plain", "classes", "streams"],
)
def test_processes_share_the_batch_of_one(config, monkeypatch):
    labels = np.arange(40) % 3
    whole = batches(LabelledTask(images(labels), config))
    shares = []
    for rank in range(2):
        for module in ("images", "labelled"):
            monkeypatch.setattr(f"counterpoint.tasks.{module}.processes", lambda rank=rank: (rank, 2))
        shares.append(batches(LabelledTask(images(labels), config)))
    for batch, one, two in zip(whole, *shares, strict=True):
        assert batch["index"][0::2].tolist() == one["index"].tolist()
        assert batch["index"][1::2].tolist() == two["index"].tolist()


def test_data_that_do_not_fit_raise_an_error():
    with pytest.raises(DataError, match=r"shapes has no labels; .* of the task views"):
        LabelledTask(images(np.full(9, -1), classes=CLASSES), LabelledConfig(batch_size=2))
    unlabelled = ArrayImages(np.zeros((9, 8, 8), np.uint8))
    with pytest.raises(DataError, match="shapes has no labels"):
        LabelledTask(ImageData("shapes", unlabelled, unlabelled, unlabelled, (), 8), LabelledConfig(batch_size=2))
    with pytest.raises(DataError, match="shapes has one class"):
        LabelledTask(images([0] * 9, classes=("circle",)), LabelledConfig(batch_size=2))
    with pytest.raises(DataError, match=r"has 4 training images, fewer than a batch of 8; use --batch-size 4"):
        LabelledTask(images([0, 1, 2, 0, -1]), LabelledConfig(batch_size=8)).check_training()
    with pytest.raises(DataError, match="at least 2 labelled test images, has 1"):
        LabelledTask(images([0, 1, 2], [0, -1]), LabelledConfig(batch_size=2))
    with pytest.raises(CounterpointError, match="has no single images, which the task labelled needs"):
        LabelledTask(sources.load("async-bags?train=4&test=2"), LabelledConfig())
    with pytest.raises(CounterpointError, match=r"images_per_class must be 0 or divide batch_size \(10\), got 4"):
        EmbeddingConfig(batch_size=10, images_per_class=4)
    with pytest.raises(CounterpointError, match="labelled_batch must lie below batch_size"):
        SemiSupervisedConfig(batch_size=8, labelled_batch=8)
    with pytest.raises(CounterpointError, match="hidden must be at least 1"):
        EmbeddingConfig(hidden=0)


def test_a_run_is_measured_on_the_classes_it_knows():
    task = LabelledTask(images([0, 1, 2]), LabelledConfig(batch_size=2))
    task.check_facts(task.facts)
    with pytest.raises(CounterpointError, match=r"other classes \(circle, line, cross\) than .* \(a, b\)"):
        task.check_facts(task.facts | {"class_names": ["a", "b"]})
    with pytest.raises(CounterpointError, match="size 8, the run was trained on 32"):
        task.check_facts(task.facts | {"size": 32})
    # An embedding can be tried on classes it has never seen.
    LabelledTask(images([0, 1, 2]), EmbeddingConfig(batch_size=2)).check_facts(task.facts | {"class_names": ["a", "b"]})
