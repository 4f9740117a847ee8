"""The task `regression`: its measures, its evaluation, views of numbers, and data that it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from counterpoint.data.targets import TargetData, Targets
from counterpoint.encoders.series import build_series_encoder, build_table_encoder
from counterpoint.errors import CounterpointError, DataError
from counterpoint.lab.compare import comparisons
from counterpoint.systems.supervision.supremix import SupReMixConfig
from counterpoint.tasks.measures.regression import (
    correlation,
    distance_order,
    fit_ridge,
    rank_correlation,
    shot_regions,
)
from counterpoint.tasks.regression import RegressionConfig, RegressionTask
from counterpoint.views.numbers import NumberViews


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- the measures


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_ridge_probe_is_the_closed_solution_on_standardised_features(ridge):
    x, y = draw(0, 40, 5) * torch.tensor([1.0, 10.0, 0.1, 2.0, 5.0]) + 3, draw(1, 40)
    found = fit_ridge(x, y, x, y, (ridge,))
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    weight = np.linalg.solve(z.T @ z + 40 * ridge * np.eye(5), z.T @ (y - y.mean()).numpy())
    np.testing.assert_allclose(found(x).numpy(), z @ weight + float(y.mean()), rtol=1e-9)


def test_the_probe_s_ridge_is_the_best_on_watched_items_and_the_largest_of_equals():
    x, y = draw(0, 20, 15), draw(1, 20)
    other, wanted = draw(2, 50, 15), torch.zeros(50).double()
    assert fit_ridge(x, y, other, wanted, (1e-4, 1.0, 1e3)).ridge == 1e3  # targets that features do not tell
    assert fit_ridge(x, x[:, 0], other, other[:, 0], (1e-9, 1.0, 1e3)).ridge == 1e-9
    assert fit_ridge(torch.ones(4, 2), torch.arange(4), torch.ones(4, 2), torch.arange(4)).ridge == 100.0


def test_constant_and_collinear_features_are_harmless():
    x = torch.cat([draw(0, 30, 2), torch.full((30, 1), 7.0), draw(0, 30, 2)], 1)
    found = fit_ridge(x, x[:, 0] * 2 + 1, x, x[:, 0] * 2 + 1)
    torch.testing.assert_close(found(x), x[:, 0] * 2 + 1, rtol=1e-3, atol=1e-3)


def test_correlations_equal_scipy_s_with_ties():
    a, b = draw(0, 50).round(decimals=0), draw(1, 50) + 0.5 * draw(0, 50)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert rank_correlation(torch.ones(4), b[:4]) == 0.0


def test_the_order_of_distances_is_1_on_an_arc_and_0_of_equal_features():
    turn = torch.linspace(0, 3, 20)
    arc = torch.stack([turn.cos(), turn.sin()], 1)
    assert distance_order(3 * arc, turn) > 0.999
    assert abs(distance_order(arc[torch.randperm(20, generator=torch.Generator().manual_seed(0))], turn)) < 0.3
    assert distance_order(torch.ones(5, 2), torch.arange(5.0)) == 0.0
    assert distance_order(arc[:2], turn[:2]) == 0.0


def test_items_of_bins_without_training_items_are_few():
    trained = torch.tensor([0.5] * 30 + [1.5] * 5 + [-2.5] * 20)
    found = shot_regions(torch.tensor([0.1, 1.9, 2.0, -2.1, -9.0, 99.0]), trained, 1.0, 25, 6)
    assert found["many"].tolist() == [True, False, False, False, False, False]
    assert found["medium"].tolist() == [False, False, False, True, False, False]
    assert found["few"].tolist() == [False, True, True, False, True, True]


# -------------------------------------------------------------------------------------------------------- the evaluation


def made(**parts: Any) -> TargetData:
    def split(n: int, seed: int) -> Targets:
        x = draw(seed, n, 3).float().numpy()
        return Targets(x, x[:, 0] * 10)

    three = {"train": split(60, 0), "valid": split(20, 1), "test": split(30, 2)} | parts
    return TargetData("made", **three, kind="table", columns=("a", "b", "c"))


def evaluated(data: TargetData, split: str = "test", *, final: bool = False, **settings: Any) -> tuple[dict, Any]:
    """Evaluate a learner whose features are the columns."""
    task = RegressionTask(data, RegressionConfig(batch_size=8, **settings))
    evaluator = task.evaluator(split)
    for batch in task.evaluation_loader(split):
        evaluator.update(batch, {"feature": batch["input"], "prediction": batch["target"] * 0})
    return evaluator.compute(final=final), evaluator


def test_the_probe_reads_the_target_from_features_that_tell_it():
    found, evaluator = evaluated(made(), final=True)
    assert found["mae"] < 0.01
    assert found["spearman"] > 0.999
    assert evaluator.chance()["mae"] > 4
    assert set(found) == {"mae", "pearson", "spearman", "distance_order"}
    assert len(evaluator.figures["Predicted and true targets"]["points"]["test items"]) == 30


def test_the_test_split_has_no_part_in_the_choice_of_the_ridge():
    noise = Targets(draw(5, 40, 3).float().numpy(), draw(6, 40).numpy())
    data = made(valid=noise)
    task = RegressionTask(data, RegressionConfig(batch_size=8))
    parts = [batch["part"] for batch in task.evaluation_loader("test")]
    assert parts == ["bank", "watched", "test"]
    assert evaluated(data)[0]["mae"] > 1  # chosen for the noise
    assert [batch["part"] for batch in task.evaluation_loader("valid")] == ["bank", "test"]


def test_a_regressor_of_the_learner_has_figures_of_its_own():
    found, _ = evaluated(made(), regressor="fine-tuned")
    assert found["regressor_mae"] == pytest.approx(float(np.abs(made().test.targets).mean()), rel=1e-5)
    assert found["regressor_spearman"] == 0.0


def test_errors_by_frequency_are_there_where_frequencies_differ():
    found, _ = evaluated(made(), bin_width=5.0, many_shot=8, few_shot=3)
    assert {"mae_many", "mae_few"} <= set(found)
    assert not [name for name in evaluated(made(), bin_width=5.0, many_shot=0, few_shot=0)[0] if name == "mae_medium"]


def test_nan_features_are_named():
    task = RegressionTask(made(), RegressionConfig(batch_size=8))
    evaluator = task.evaluator("test")
    for batch in task.evaluation_loader("test"):
        evaluator.update(batch, {"feature": batch["input"] * torch.nan})
    with pytest.raises(CounterpointError, match="a feature is NaN or infinite: training diverged"):
        evaluator.compute()


def test_constant_targets_and_too_few_items_are_named():
    flat = Targets(np.zeros((30, 3), np.float32), np.full(30, 5.0))
    with pytest.raises(DataError, match="the target 'target' is constant, 5, in the train split"):
        RegressionTask(made(train=flat), RegressionConfig())
    with pytest.raises(DataError, match="constant, 5, in the test split"):
        RegressionTask(made(test=flat), RegressionConfig())
    one = Targets(np.zeros((1, 3), np.float32), np.zeros(1))
    with pytest.raises(DataError, match="needs at least 2 test items, has 1"):
        RegressionTask(made(test=one), RegressionConfig())
    with pytest.raises(DataError, match=r"fewer than a batch of 64; use --batch-size 60"):
        RegressionTask(made(), RegressionConfig(batch_size=64)).check_training()
    with pytest.raises(DataError, match="at least 2 items in its valid split"):
        RegressionTask(made(valid=one), RegressionConfig(batch_size=8)).check_training()


def test_a_run_refuses_data_of_other_columns():
    task = RegressionTask(made(), RegressionConfig())
    task.check_facts(task.facts)
    with pytest.raises(CounterpointError, match="has the columns"):
        task.check_facts(task.facts | {"columns": ["a", "b", "d"]})


def test_a_comparison_of_errors_calls_the_smaller_one_better():
    results = {slug: {str(s): {"mae": level + 0.01 * s} for s in range(5)} for slug, level in (("a", 5.0), ("b", 3.0))}
    (lower,) = comparisons(results, ["a", "b"], "mae", 5, lower=True)
    (higher,) = comparisons(results, ["a", "b"], "mae", 5)
    assert (lower["verdict"], higher["verdict"]) == ("better", "worse")
    assert lower["mean"] == pytest.approx(2.0)
    assert RegressionTask.lower


# ------------------------------------------------------------------------------------------------------- encoders, views


def test_encoders_standardise_and_take_flat_series():
    x = draw(0, 6, 8, 2).float() * 5 + 30
    mean, deviation = x.mean((0, 1)).tolist(), x.std((0, 1)).tolist()
    encoder = build_series_encoder("conv-s", 8, mean, deviation).eval()
    assert encoder(x).shape == (6, encoder.dim)
    torch.testing.assert_close(encoder(x), encoder(x.flatten(1)))
    rows = x[:, 0]
    plain = build_table_encoder("relu-4", mean, deviation)
    torch.testing.assert_close(plain.standardise(rows), (rows - torch.tensor(mean)) / torch.tensor(deviation))
    assert plain(rows).shape == (6, 4)


def views(pipeline: NumberViews, x: Tensor, mine: slice = slice(None)) -> list[Tensor]:
    return pipeline(x[mine], x, mine, torch.Generator().manual_seed(0))


def test_views_of_numbers_have_noise_in_units_of_each_column():
    x = torch.zeros(4000, 2)
    one, two = views(NumberViews([1.0, 100.0], noise=0.1), x)
    torch.testing.assert_close(one.std(0), torch.tensor([0.1, 10.0]), rtol=0.1, atol=0)
    assert not torch.equal(one, two)
    assert torch.equal(views(NumberViews([1.0, 1.0], noise=0.0), x)[0], x)


def test_swapped_numbers_are_those_of_their_column_and_shifts_are_cyclic():
    x = torch.arange(200.0).view(100, 2)
    one, _ = views(NumberViews([1.0, 1.0], 0.0, swapped=0.5), x)
    assert 0.3 < float((one != x).float().mean()) < 0.6
    assert torch.equal(one % 2, x % 2)
    series = torch.arange(10.0).expand(50, 10)[..., None]
    moved, _ = views(NumberViews([1.0], 0.0, shift=0.3), series)
    steps = set((moved[:, 0, 0]).tolist())
    assert steps == {0.0, 1.0, 2.0, 3.0, 7.0, 8.0, 9.0}
    assert torch.equal(moved.sort(1).values, series)


def test_processes_draw_the_views_of_one():
    x = draw(0, 6, 3).float()
    pipeline = NumberViews([1.0, 1.0, 1.0], 0.1, 0.5)
    whole = views(pipeline, x)
    for rank in (0, 1):
        for one, all_rows in zip(views(pipeline, x, slice(rank, None, 2)), whole, strict=True):
            torch.testing.assert_close(one, all_rows[rank::2])


def test_settings_of_the_form_belong_to_every_system_of_it():
    assert issubclass(SupReMixConfig, RegressionConfig)
