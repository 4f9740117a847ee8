"""All measures where scores tie: constant scores give chance, the order of items changes nothing, no tie counts for a method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint.core.gap import gap_metrics
from counterpoint.core.rows import Keys, distinct_rows
from counterpoint.data.bags import BagData, TestVideo
from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.tasks import measures
from counterpoint.tasks.aligned import AlignedEvaluator
from counterpoint.tasks.bags import FrameAP, frame_ap, frame_ap_step
from counterpoint.tasks.labelled import LabelledConfig, LabelledEvaluator, recall_at_1, recall_at_1_chance
from counterpoint.tasks.measures import (
    EVALUATORS,
    confusion_of,
    decided,
    decided_shares,
    identification,
    knn_accuracy,
    linear_probe,
    retrieval,
    retrieval_chance,
    retrieval_ranks,
    zero_shot_accuracy,
)
from counterpoint.tasks.views import ViewsConfig, ViewsEvaluator

CLASSES, EACH, DIM = 5, 11, 16
LABELS = torch.arange(CLASSES * EACH) % CLASSES


def alike(count, seed=0):
    """Make rows that are all one row, whose products a matrix multiplication rounds differently at its edges."""
    return torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed)).repeat(count, 1)


def tied_items(seed):
    """Make rows of which many are equal, of items of five classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(9, DIM, generator=generator)
    return centres[torch.randint(0, 9, (len(LABELS),), generator=generator)]


# -------------------------------------------------------------------------------------------------------- constant scores


def test_equal_rows_have_equal_products():
    for count in (7, 33, 1001):
        found = Keys(alike(count)).products(torch.randn(5, DIM))
        assert bool((found == found[:, :1]).all())
    first, number = distinct_rows(torch.tensor([[0.0, 1.0], [2.0, 3.0], [-0.0, 1.0], [2.0, 3.0]]))
    assert first.tolist() == [0, 1]
    assert number.tolist() == [0, 1, 0, 1]


def test_constant_embeddings_find_nothing_by_retrieval():
    found = retrieval(alike(60), alike(60))
    assert [found[f"r{k}"] for k in (1, 5, 10)] == [0, 0, 0]
    assert found["median_rank"] == 60


def test_constant_embeddings_identify_by_chance():
    found = identification(alike(55, 1), alike(55, 1), LABELS, LABELS)
    assert found["accuracy"] == pytest.approx(1 / CLASSES)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, CLASSES + 1)) / CLASSES)
    # Groups of different sizes: the largest gets all, which is right for one group in three.
    sizes = torch.tensor([0] * 30 + [1] * 10 + [2] * 5)
    assert identification(alike(45), alike(45), sizes, sizes)["accuracy"] == pytest.approx(1 / 3)


def test_constant_embeddings_classify_by_chance():
    rows = alike(len(LABELS))
    assert zero_shot_accuracy(rows, alike(CLASSES), LABELS) == pytest.approx(1 / CLASSES)
    assert knn_accuracy(rows, LABELS, rows, LABELS) == pytest.approx(1 / CLASSES)
    assert knn_accuracy(rows, LABELS, rows, torch.zeros_like(LABELS)) == pytest.approx(1 / CLASSES)
    assert linear_probe(rows, LABELS, rows, LABELS)[0] == pytest.approx(1 / CLASSES)
    assert linear_probe(rows, LABELS, rows, torch.zeros_like(LABELS))[0] == pytest.approx(1 / CLASSES)
    assert recall_at_1(rows, LABELS) == pytest.approx(recall_at_1_chance(LABELS)) == pytest.approx((EACH - 1) / 54)


def test_constant_embeddings_have_no_gap():
    found = gap_metrics(alike(20).numpy(), alike(20).numpy())
    assert found["linear_separability"] == 0.5
    assert found["centroid_distance"] == found["alignment"] == pytest.approx(0, abs=1e-9)
    assert found["total_uniformity_loss"] == found["cross_encoder_uniform_loss"] == pytest.approx(0, abs=1e-9)
    assert EVALUATORS["uniformity"](alike(20)) == pytest.approx(0, abs=1e-5)
    assert EVALUATORS["alignment"](alike(20), alike(20)) == 0
    assert EVALUATORS["tolerance"](alike(20), torch.arange(20) % 2) == pytest.approx(1)


def test_constant_logits_have_the_prevalence_as_step_ap():
    truth = np.arange(400) % 10 == 0
    assert frame_ap_step(torch.full((1, 400), 23.0), [400], truth, repeat=1) == pytest.approx(0.1)
    assert frame_ap(torch.full((1, 400), 23.0), [400], truth, repeat=1) == pytest.approx(0.55)  # the benchmark's


# ------------------------------------------------------------------------------------------------------ average precision


@pytest.mark.parametrize("shift", [0, 20, 200, 1e4, -200])
@pytest.mark.parametrize("crops", [1, 5])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_ap_of_a_perfect_order_is_one_however_large_the_logits(shift, crops, kind):
    logits = (torch.linspace(-3, 3, 60, dtype=torch.float64) + shift).to(kind).repeat(crops, 1)
    truth = np.arange(60) >= 50
    assert frame_ap(logits, [60], truth, repeat=1) == pytest.approx(1)
    assert frame_ap_step(logits, [60], truth, repeat=1) == pytest.approx(1)


def test_ap_ranks_by_the_mean_probability_of_the_crops():
    logits = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) * 3
    truth = np.random.default_rng(0).random(80) < 0.3
    from sklearn.metrics import average_precision_score

    expected = average_precision_score(truth, logits.double().sigmoid().mean(0).numpy())
    assert frame_ap_step(logits, [80], truth, repeat=1) == pytest.approx(expected)
    shuffled = logits[torch.tensor([3, 1, 4, 0, 2])]
    assert frame_ap_step(shuffled, [80], truth, repeat=1) == pytest.approx(expected, abs=1e-12)


def bag_evaluator(logits, truth):
    video = TestVideo(
        "t", np.zeros((1, len(truth) // 2, 2), np.float32), np.zeros((len(truth) // 2, 2), np.float32), 1, truth
    )
    data = BagData(name="x", train=[], valid=[], test=[video], visual_dim=2, audio_dim=2, frames_per_snippet=2)
    evaluator = FrameAP(data)
    evaluator.update({"visual": torch.zeros(1, len(truth) // 2, 2), "truth": truth}, {"av": logits})
    return evaluator


def test_the_evaluator_reports_both_aps_chance_and_scores_that_tie():
    truth = (np.arange(200) % 8 == 0).astype(np.int8)
    evaluator = bag_evaluator(torch.zeros(1, 100), truth)
    found = evaluator.compute()
    assert found["av_ap_step"] == pytest.approx(0.125)
    assert found["av_ap"] == pytest.approx((1 + 0.125) / 2)
    assert evaluator.chance() == {"av_ap": 0.125, "av_ap_step": 0.125}
    assert evaluator.notes == ["av: only 1 of 100 scores differ; av_ap rewards ties, so use av_ap_step"]
    assert evaluator.figures["Scores that tie"]["rows"] == [["av", 1, 100]]
    evaluator = bag_evaluator(torch.linspace(30, 50, 100)[None], truth)
    evaluator.compute()
    assert evaluator.notes == []
    assert evaluator.figures == {}


# ------------------------------------------------------------------------------------------------------------------- ties


def test_a_tie_between_classes_counts_one_part_of_them():
    logits = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 4.0]])
    labels = torch.tensor([0, 2, 1, 2])
    assert decided_shares(logits, labels).tolist() == pytest.approx([0.5, 0, 1 / 3, 1])
    assert decided(logits, labels).tolist() == [1, 0, 0, 2]  # the true class is never taken where others are as good
    table = confusion_of(labels, logits)
    assert table[0].tolist() == [0.5, 0.5, 0]
    assert table.sum() == 4


@pytest.mark.parametrize("true", range(CLASSES))
def test_no_class_is_favoured_by_its_number(true):
    labels = torch.full((8,), true)
    evaluator = LabelledEvaluator(LabelledConfig(encoder="conv-s"), tuple("abcde"))
    evaluator.update({"part": "test", "label": labels}, {"logits": torch.zeros(8, CLASSES)})
    found = evaluator.compute()
    assert found == pytest.approx({"accuracy": 0.2, "macro_recall": 0.2})
    assert evaluator.chance() == pytest.approx(found)


def test_neighbours_that_tie_for_the_last_place_share_it():
    # Two of class 1 and one of class 0 are equally near; one vote is shared among them, class 0 stands first in the bank.
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    asked = torch.tensor([[1.0, 0.0]])
    for k in (1, 2):
        assert knn_accuracy(bank, labels, asked, torch.tensor([1]), k=k) == 1
        assert knn_accuracy(bank, labels, asked, torch.tensor([0]), k=k) == 0


def test_votes_do_not_overflow_at_any_temperature():
    generator = torch.Generator().manual_seed(0)
    centres = 0.8 * torch.randn(4, DIM, generator=generator)
    bank, test = (3 + centres[torch.arange(n) % 4] + 0.3 * torch.randn(n, DIM, generator=generator) for n in (200, 40))
    for temperature in (1.0, 0.07, 0.011, 1e-3, 1e-5, 1e-30):
        assert (
            knn_accuracy(bank, torch.arange(200) % 4, test, torch.arange(40) % 4, k=100, temperature=temperature) > 0.9
        )
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            knn_accuracy(bank, torch.arange(200) % 4, test, torch.arange(40) % 4, temperature=wrong)


# -------------------------------------------------------------------------------------------------------- the order of items

ITEM_MEASURES = {
    "retrieval": lambda x, y, labels: retrieval(x, y, labels, labels)["mrr"],
    "identification": lambda x, y, labels: identification(x, y, labels, labels, neighbours=4)["mrr"],
    "zero-shot": lambda x, y, labels: zero_shot_accuracy(x, torch.eye(CLASSES, DIM).round(), labels),
    "knn": lambda x, y, labels: knn_accuracy(x, labels, y, labels, k=4),
    "purity": lambda x, y, labels: EVALUATORS["purity"](x, labels, k=4),
    "linear-probe": lambda x, y, labels: linear_probe(x, labels, y, labels)[0],
    "tags": lambda x, y, labels: EVALUATORS["tags"](x, F.one_hot(labels), y, F.one_hot(labels)),
    "gap": lambda x, y, labels: sum(gap_metrics(x.numpy(), y.numpy()).values()),
    "alignment": lambda x, y, labels: EVALUATORS["alignment"](x, y),
    "uniformity": lambda x, y, labels: EVALUATORS["uniformity"](x),
    "tolerance": lambda x, y, labels: EVALUATORS["tolerance"](x, labels),
    "recall_at_1": lambda x, y, labels: recall_at_1(x, labels),
    "frame_ap": lambda x, y, labels: frame_ap(x[:, :1].T, [len(x)], labels == 0, repeat=1),
    "frame_ap_step": lambda x, y, labels: frame_ap_step(x[:, :1].T, [len(x)], labels == 0, repeat=1),
}


def test_every_measure_by_name_is_tried():
    assert set(EVALUATORS) <= set(ITEM_MEASURES)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ITEM_MEASURES)
def test_the_order_of_items_changes_no_measure(name, seed):
    x, y = tied_items(seed), tied_items(seed + 100) if seed % 2 else tied_items(seed)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(seed))
    measure = ITEM_MEASURES[name]
    assert measure(x[order], y[order], LABELS[order]) == pytest.approx(measure(x, y, LABELS), abs=1e-6)


def test_renaming_classes_changes_no_accuracy():
    x, names = tied_items(3), torch.tensor([3, 0, 4, 2, 1])
    assert knn_accuracy(x, names[LABELS], x, names[LABELS], k=3) == pytest.approx(
        knn_accuracy(x, LABELS, x, LABELS, k=3)
    )
    prompts = tied_items(3)[:CLASSES]
    renamed = torch.empty_like(prompts)
    renamed[names] = prompts
    assert zero_shot_accuracy(x, renamed, names[LABELS]) == pytest.approx(zero_shot_accuracy(x, prompts, LABELS))


# ------------------------------------------------------------------------------------------------------------------ chance


@pytest.mark.parametrize("groups", [torch.arange(30), torch.arange(30) % 7, torch.tensor([0] * 20 + list(range(10)))])
def test_retrieval_chance_is_the_mean_over_random_orders(groups):
    generator = torch.Generator().manual_seed(0)
    drawn = [
        retrieval(torch.randn(30, 3, generator=generator), torch.randn(30, 3, generator=generator), groups, groups)
        for _ in range(300)
    ]
    found = retrieval_chance(groups, groups)
    for name, value in found.items():
        assert value == pytest.approx(np.mean([one[name] for one in drawn]), abs=0.03), name
    assert retrieval_chance(torch.arange(3), torch.arange(3))["r5"] == 1
    assert math.isnan(retrieval_chance(torch.zeros(2).long(), torch.ones(2).long())["r1"])


def test_recall_chance_is_the_mean_over_random_neighbours():
    labels = torch.tensor([0] * 9 + [1] * 3 + [2])
    drawn = [recall_at_1(torch.randn(13, 4, generator=torch.Generator().manual_seed(n)), labels) for n in range(400)]
    assert recall_at_1_chance(labels) == pytest.approx(np.mean(drawn), abs=0.04)


def test_every_accuracy_of_the_task_views_has_its_chance():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    split = ArrayImages(pixels, labels)
    data = ImageData("x", split, split, split, tuple("abcd"), 8, attributes={"shape": (labels % 2,) * 3})
    evaluator = ViewsEvaluator(ViewsConfig(encoder="conv-s", neighbours=3), data)
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for part in ("bank", "test"):
        batch = {"part": part, "index": torch.arange(40), "label": torch.from_numpy(labels)}
        evaluator.update(batch, {"feature": rows, "parts": {"stage 0": rows[:, :2]}})
    evaluator.update({"part": "pair"}, {"pair": [rows, rows]})
    found = evaluator.compute(final=True)
    chance = evaluator.chance()
    accuracies = {name for name in found if "accuracy" in name or name.startswith("stage_0")}
    assert set(chance) == accuracies
    assert chance["knn_accuracy"] == chance["linear_accuracy"] == 0.25
    assert chance["shape_accuracy"] == chance["stage_0_shape"] == 0.5


def test_embedding_learners_have_a_chance_for_each_figure():
    evaluator = LabelledEvaluator(LabelledConfig(encoder="conv-s"), tuple("abcde"))
    for part in ("bank", "test"):
        evaluator.update({"part": part, "label": LABELS}, {"feature": F.one_hot(LABELS).float()})
    found, chance = evaluator.compute(final=True), evaluator.chance()
    assert set(found) == set(chance)
    assert chance["accuracy"] == 0.2
    assert chance["recall_at_1"] == pytest.approx(10 / 54)


def test_aligned_items_have_a_chance_for_each_recall_and_accuracy():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(24) % 3, np.arange(24) // 6
    split = AlignedColumns(
        {name: rng.normal(size=(24, 2)).astype(np.float32) for name in "abc"}, labels=labels, groups=groups
    )
    data = AlignedData("x", *[split] * 3, {name: Modality("vector", dim=2) for name in "abc"}, classes=tuple("uvw"))
    evaluator = AlignedEvaluator(data)
    present = {name: torch.ones(24, dtype=torch.bool) for name in "abc"}
    batch = {"split": "", "present": present, "label": torch.from_numpy(labels)}
    z = {name: alike(24) for name in "abc"}
    outputs = {"embedding": z, "joint": z, "logits": torch.zeros(24, 3), "measures": {"own": 1.0}}
    evaluator.update(batch | {"part": "items"}, outputs)
    evaluator.update(batch | {"part": "examples"}, {"embedding": z})
    found, chance = evaluator.compute(final=True), evaluator.chance()
    ends = ("r1", "r5", "r10", "_recall", "accuracy", "zero_shot", "_to_a_mrr", "_to_b_mrr", "_to_c_mrr")
    assert set(chance) == {name for name in found if name.endswith(ends)}
    assert chance["a_to_b_r5"] == chance["b_and_c_to_a_r5"] == pytest.approx(5 / 24)
    assert chance["a_to_b_group_accuracy"] == pytest.approx(found["a_to_b_group_accuracy"]) == 0.25
    for name in ("accuracy", "a_from_b_zero_shot", "a_linear_accuracy"):
        assert chance[name] == pytest.approx(found[name]) == pytest.approx(1 / 3), name
    assert chance["b_and_c_to_a_class_r1"] == pytest.approx(1 / 3)
    assert chance["mean_recall"] == pytest.approx((1 + 5 + 10) / 3 / 24)
    assert found["mean_recall"] <= chance["mean_recall"]


def test_ranks_count_ties_against_a_query():
    assert retrieval_ranks(torch.ones(3, 2), torch.ones(3, 2)).tolist() == [3, 3, 3]
    assert measures.RECALL == (1, 5, 10)
