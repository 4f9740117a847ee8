"""The task `views`: its measures against scikit-learn and their formulas, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from counterpoint import cli
from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.measures import (
    RocCounts,
    alignment,
    confusion,
    knn_accuracy,
    linear_probe,
    purity,
    tag_precision,
    uniformity,
)
from counterpoint.tasks.views import TASK, ViewsConfig, ViewsEvaluator


@pytest.fixture(scope="module")
def blobs():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=g)
    labels = torch.randint(0, 4, (300,), generator=g)
    x = centres[labels] + 1.1 * torch.randn(300, 12, generator=g)
    return x[:200], labels[:200], x[200:], labels[200:]


def test_knn_votes_as_scikit_learn_does(blobs):
    x, y, test, asked = blobs
    unit, units = (torch.nn.functional.normalize(v, dim=1).numpy() for v in (x, test))
    # |a - b|^2 = 2 - 2 cos: the weights exp(cos / t) in terms of the distance scikit-learn hands over.
    expected = KNeighborsClassifier(7, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit, y.numpy())
    found = knn_accuracy(x, y, test, asked, k=7)
    assert 0.5 < found < 1
    assert found == pytest.approx(expected.score(units, asked.numpy()))
    assert knn_accuracy(x, y, x, y, k=1) == 1.0
    assert knn_accuracy(x[:5], y[:5], test, asked, k=20) == knn_accuracy(x[:5], y[:5], test, asked, k=5)


def test_purity_is_the_share_of_neighbours_of_the_own_group(blobs):
    x, y, *_ = blobs
    rows = torch.nn.functional.normalize(x, dim=1)
    nearest = (rows @ rows.T).fill_diagonal_(-2).topk(10, dim=1).indices
    assert purity(x, y) == pytest.approx(float((y[nearest] == y[:, None]).float().mean()))
    assert purity(x, torch.where(y == 0, -1, y)) == pytest.approx(purity(x[y > 0], y[y > 0]))
    assert purity(torch.ones(6, 2), torch.arange(6) % 2, k=3) == pytest.approx(2 / 5)  # all neighbours tie
    assert math.isnan(purity(x[:1], y[:1]))
    with pytest.raises(ValueError, match="k must"):
        purity(x, y, k=0)


def test_shifts_are_measured_with_the_bank_of_the_training_split_and_only_on_test():
    rng = np.random.default_rng(0)

    def split(classes, domains):
        count = len(classes)
        return ArrayImages(rng.integers(0, 255, (count, 8, 8), np.uint8), np.array(classes), domains=np.array(domains))

    train, held = split([0, 1] * 10, [0, 0, 1, 1] * 5), split([0, 1] * 4, [0, 1] * 4)
    shifts = {"other-style": split([0, 1, 2] * 4, [2] * 12)}  # the class 2 is not in the bank
    task = TASK(ImageData("mine", train, held, held, ("a", "b", "c"), 8, shifts=shifts), ViewsConfig(neighbours=3))
    found = {}
    for name in ("valid", "test"):
        evaluator = task.evaluator(name)
        for batch in task.evaluation_loader(name):
            label = torch.nn.functional.one_hot(batch["label"], 3).float()
            feature = label + 0.01 * batch["image"].flatten(1)[:, :3]
            evaluator.update(batch, {"feature": feature, "pair": [feature, feature]})
        found[name] = evaluator.compute(final=True)
    assert not any(key.startswith("other_style") for key in found["valid"])
    assert found["test"]["other_style_knn_accuracy"] == found["test"]["other_style_linear_accuracy"] == 1.0
    assert found["test"]["other_style_domain_purity"] == 1.0
    assert evaluator.chance()["domain_purity"] == pytest.approx(0.5)
    assert evaluator.chance()["other_style_knn_accuracy"] == pytest.approx(1 / 3)


def test_the_probe_is_logistic_regression(blobs):
    x, y, test, asked = blobs
    accuracy, predicted = linear_probe(x, y, test, asked, regularisation=1e-3)
    scale = StandardScaler().fit(x.numpy() * 1.0)
    # Mean loss + r |w|^2 is scikit-learn's sum of losses + |w|^2 / (2 C) for C = 1 / (2 r n).
    model = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=2000, tol=1e-8).fit(
        scale.transform(x.numpy()), y.numpy()
    )
    expected = model.predict(scale.transform(test.numpy()))
    assert (predicted.numpy() == expected).mean() > 0.98
    assert accuracy == pytest.approx(float((predicted == asked).float().mean()))
    assert confusion(asked, predicted, 4).sum() == 100
    assert confusion(asked, predicted, 4).trace() == pytest.approx(100 * accuracy)


def test_the_probe_of_tags_is_a_logistic_regression_for_each_tag(blobs):
    x, y, test, asked = blobs
    tags, truth = (torch.stack([labels == 0, labels < 2, labels < 9], 1) for labels in (y, asked))
    scale = StandardScaler().fit(x.numpy() * 1.0)
    precisions = []
    for tag in range(2):  # the third tag is on every row and does not count
        model = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=2000, tol=1e-8)
        model.fit(scale.transform(x.numpy()), tags[:, tag].numpy())
        ranked = model.decision_function(scale.transform(test.numpy()))
        precisions.append(average_precision_score(truth[:, tag].numpy(), ranked))
    assert tag_precision(x, tags, test, truth) == pytest.approx(np.mean(precisions), abs=0.01)
    assert tag_precision(x, tags, torch.ones(100, 12), truth) == pytest.approx(float(truth[:, :2].float().mean()))
    assert math.isnan(tag_precision(x, tags[:, 2:], test, truth[:, 2:]))
    with pytest.raises(ValueError, match="test_tags"):
        tag_precision(x, tags, test, truth[:, :2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_roc_area_is_the_share_of_pairs_in_order(seed):
    g = torch.Generator().manual_seed(seed)
    scores, positive = torch.randint(-4, 5, (40,), generator=g) / 4, torch.rand(40, generator=g) < 0.4
    roc = RocCounts()
    roc.add(scores[:7], positive[:7])
    roc.add(scores[7:], positive[7:])
    assert roc.counts.sum() == 40
    low, high = scores[positive][:, None], scores[~positive]
    expected = ((low < high).double() + (low == high).double() / 2).mean()
    assert roc.area() == pytest.approx(expected.item(), nan_ok=True)
    assert math.isnan(RocCounts().area())


def test_alignment_and_uniformity_are_their_formulas():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.nn.functional.normalize(torch.randn(30, 5, generator=g), dim=1) for _ in range(2))
    assert alignment(3 * x, y) == pytest.approx(float((x - y).square().sum(1).mean()), rel=1e-5)
    pairs = torch.pdist(x).square()
    assert uniformity(2 * x) == pytest.approx(float((-2 * pairs).exp().mean().log()), rel=1e-5)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-5)
    assert math.isnan(uniformity(x[:1]))


def images(n: int) -> ArrayImages:
    return ArrayImages(np.zeros((n, 16, 16, 3), np.uint8))


def test_arguments_that_do_not_fit_raise_an_error():
    config = ViewsConfig(batch_size=32, encoder="conv-s")
    with pytest.raises(DataError, match="20 training images, fewer than a batch of 32; use --batch-size 20"):
        TASK(ImageData("own", images(20), images(4), images(4), (), 16), config).check_training()
    with pytest.raises(CounterpointError, match="batch_size must be at least 2"):
        TASK(ImageData("own", images(20), images(4), images(4), (), 16), ViewsConfig(batch_size=1))
    with pytest.raises(DataError, match="at least 2 test images"):
        TASK(ImageData("own", images(40), images(4), images(1), (), 16), config)


def test_images_without_labels_are_judged_by_geometry_alone(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (20, 16, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    words = f"train simclr --data imagefolder:{folder}?size=16 --epochs 1 --batch-size 8 --encoder conv-s".split()
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    last = Run.open(tmp_path / "run").metrics()[-1]
    assert "test/uniformity" in last
    assert "test/knn_accuracy" not in last


def test_test_images_of_no_known_class_are_judged_by_geometry_alone():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (12, 6))
    nothing = np.full(6, -1)
    data = ImageData(
        "half", ArrayImages(train, np.arange(12) % 2), ArrayImages(test, nothing), ArrayImages(test, nothing), ("a", "b"),
        8, attributes={"colour": (np.arange(12) % 3, nothing, nothing)},
    )  # fmt: skip
    evaluator = ViewsEvaluator(ViewsConfig(), data)
    for part, split in (("bank", data.train), ("test", data.test)):
        features = torch.randn(len(split), 5)
        outputs = {"feature": features, "parts": {"stage 0": features, "stage 1": features}}
        labels = torch.from_numpy(split.labels)
        evaluator.update({"part": part, "index": torch.arange(len(split)), "label": labels}, outputs)
    evaluator.update({"part": "pair"}, {"pair": [torch.randn(6, 5), torch.randn(6, 5)]})
    found = evaluator.compute(final=True)
    assert set(found) == {"alignment", "uniformity"}
    shown = evaluator.figures["Nearest neighbours"]["parts"][0]["rows"]
    assert not any(cell["right"] for row in shown for cell in row["found"])


def test_tag_precision_is_one_for_known_tags_and_the_prevalence_for_equal_features():
    tags = (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    assert tag_precision(tags.float(), tags, tags.float(), tags) == pytest.approx(1)
    alike = torch.ones(200, 4)
    assert tag_precision(alike, tags, alike, tags) == pytest.approx(float(tags.float().mean()))
    none = torch.zeros_like(tags)
    assert math.isnan(tag_precision(alike, tags, alike, none))
    some = torch.cat([tags, none[:, :1]], 1)  # a tag that no test item has is left out
    assert tag_precision(tags.float(), some, tags.float(), some) == pytest.approx(1)
    with pytest.raises(ValueError, match="tags must be"):
        tag_precision(alike, tags[:3], alike, tags)
