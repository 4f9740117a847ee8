"""Distances between surfaces: values by hand, by brute force with uneven spacing, edges, and volumes in the evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData
from counterpoint.tasks.dense_figures import DenseEvaluator
from counterpoint.tasks.measures.surfaces import hausdorff, surface_distances, volume_distances

SPACING = (3.0, 0.5, 1.25)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.meshgrid(*(np.arange(n) for n in (7, 14, 12)), indexing="ij")
    rng = np.random.default_rng(seed)
    made = [
        ((z - 3 - rng.normal(0, 0.3)) / 2.2) ** 2
        + ((y - 7 - rng.normal()) / 4) ** 2
        + ((x - 6 - rng.normal()) / 3.5) ** 2
        for _ in range(2)
    ]
    return made[0] < 1, made[1] < 1


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_all_pairs_of_surface_voxels(seed):
    truth, predicted = blobs(seed)
    points = [np.argwhere(mask & ~binary_erosion(mask)) * SPACING for mask in (truth, predicted)]
    pairs = cdist(*points)
    found = surface_distances(truth, predicted, SPACING)
    np.testing.assert_allclose(found[0], pairs.min(1))
    np.testing.assert_allclose(found[1], pairs.min(0))
    whole = max(pairs.min(1).max(), pairs.min(0).max())
    assert hausdorff(truth, predicted, SPACING, 100) == pytest.approx(whole)
    assert hausdorff(truth, predicted, SPACING) <= whole
    assert hausdorff(predicted, truth, SPACING) == hausdorff(truth, predicted, SPACING)


def test_a_shift_along_each_axis_is_its_spacing_and_a_stray_voxel_moves_the_maximum_alone():
    mask = np.zeros((9, 24, 24), bool)
    mask[2:6, 4:16, 4:16] = True
    for axis, mm in enumerate(SPACING):
        assert hausdorff(mask, np.roll(mask, 1, axis), SPACING, 100) == pytest.approx(mm)
    stray = mask.copy()
    stray[8, 23, 23] = True
    assert hausdorff(mask, stray, (1, 1, 1)) == 0
    assert hausdorff(mask, stray, (1, 1, 1), 100) == pytest.approx(math.dist((5, 15, 15), (8, 23, 23)))


def test_empty_masks_have_the_diagonal_or_no_distance():
    mask, empty = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    assert hausdorff(mask, empty, (1, 2, 3)) == hausdorff(empty, mask, (1, 2, 3)) == pytest.approx(math.hypot(2, 6, 12))
    assert math.isnan(hausdorff(empty, empty, (1, 1, 1)))
    assert hausdorff(mask, mask, (1, 1, 1)) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.ones((2, 2), bool), np.ones((2, 3), bool), (1, 1)), "must have one shape"),
        ((np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 0)), "a spacing > 0"),
        ((np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1), 101), "percentile must lie"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        hausdorff(*arguments)


def test_unknown_voxels_belong_to_no_class():
    truth, predicted = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    truth[0, 0, 0], predicted[0, 0, 0] = 1, 1
    truth[1, 3, 3], predicted[1, 3, 3] = IGNORE, 1
    found = volume_distances(truth, predicted, 3, (1, 1, 1))
    assert found[1] == 0
    assert np.isnan(found[[0, 2]]).all()


def test_the_evaluation_measures_whole_volumes_in_mm_at_the_end():
    masks = np.zeros((4, 8, 8), np.uint8)
    masks[:2, 2:5, 2:5] = 1
    masks[2:, 2:5, 2:5] = 1
    predicted = torch.from_numpy(masks).long().clone()
    predicted[2:] = torch.roll(predicted[2:], 1, 2)
    spacings = np.array([[2.0, 1, 1], [2, 1, 1.5]])
    split = ArrayScenes(np.zeros((4, 8, 8, 3), np.uint8), masks, groups=np.array([0, 0, 1, 1]), spacings=spacings)
    data = DenseData("made", split, split, split, (), 8, regions=("ground", "a"))
    evaluator = DenseEvaluator(data, "test")
    logits = F.one_hot(predicted, 2).permute(0, 3, 1, 2).float()
    for at in ([0, 1, 2], [3]):
        evaluator.update(
            {"mask": torch.from_numpy(masks[at]), "index": torch.tensor(at), "part": "test"}, {"logits": logits[at]}
        )
    assert "hd95" not in evaluator.compute()
    assert evaluator.compute(final=True)["hd95"] == pytest.approx((0 + 1.5) / 2)
    table = evaluator.figures["Classes"]
    assert table["columns"][-1] == "HD95 in mm"
    assert table["rows"][1][-1] == pytest.approx(0.75)
    evaluator.reset()
    evaluator.update(
        {"mask": torch.from_numpy(masks[:1]), "index": torch.tensor([0]), "part": "test"}, {"logits": logits[:1]}
    )
    assert "hd95" not in evaluator.compute(final=True)  # one of two slices
