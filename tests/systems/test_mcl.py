"""MCL: the authors' schedule of batches, what pseudo-labels and the representation are, stages, resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog, cli, training
from counterpoint import functional as fn
from counterpoint.data.digits import load_patterns
from counterpoint.engine.evaluation import measure
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.images.mcl import MCL
from counterpoint.views.images import RECIPES, ViewPipeline

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mcl.npz")


@pytest.mark.parametrize("case", range(4))
def test_the_schedule_equals_the_authors(case: int) -> None:
    at = {k.split("/", 1)[1]: PARITY[k] for k in PARITY.files if k.startswith(f"case{case}/")}
    found = fn.grouped_batches(
        at["in/pseudo_label"],
        int(at["param/batch_size"]),
        list(at["in/permutation"]),
        int(at["param/world_size"]),
        int(at["param/rank"]),
    )
    assert len(found) == int(at["out/length"])
    assert np.array_equal(np.array(found), at["out/batches"])
    groups = at["in/pseudo_label"][np.array(found)]
    assert np.array_equal(groups[:, 0], at["out/batch_cluster"])
    assert bool((groups == groups[:, :1]).all())


def test_permutations_must_fit() -> None:
    with pytest.raises(ValueError, match=r"permutations\[0\]"):
        fn.grouped_batches(np.array([0, 0, 1]), 1, [[0, 0], [0]])
    with pytest.raises(ValueError, match="1 group,"):
        fn.grouped_batches(np.array([0, 1]), 1, [[0]])


def test_composed_labels_are_the_same_exactly_where_all_stages_agree() -> None:
    g = torch.Generator().manual_seed(0)
    stages = [torch.randint(4, (200,), generator=g) for _ in range(3)]
    found = fn.compose(stages, 4)
    together = torch.stack(stages)
    same = (together[:, :, None] == together[:, None]).all(0)
    assert torch.equal(found[:, None] == found, same)
    assert torch.equal(fn.compose(stages[:2], 4), stages[0] * 4 + stages[1])
    with pytest.raises(ValueError, match=r"0\.\.2"):
        fn.compose(stages, 3)


def test_stages_are_concatenated_and_normalised() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    twice = fn.integrated([a, a])
    torch.testing.assert_close(twice @ twice.T, F.normalize(a, dim=1) @ F.normalize(a, dim=1).T)
    found = fn.integrated([a, b])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5, dtype=torch.float64))


def _learner(
    restrict: str = "clusters",
    epochs: int = 1,
    stages: int = 1,
    slug: str = "mcl",
    base: dict | None = None,
    **more: object,
):
    system = catalog.load_system(slug)
    config = system.config(
        encoder="mlp-s", recipe="digit-patterns", hidden=8, projection=8, batch_size=32, epochs=epochs, optimizer="adam", lr=0.01,
        bank=200, mcl={"stages": stages, "clusters": 4, "restrict": restrict} | more, **(base or {}),
    )  # fmt: skip
    task = Experiment.resolve(system, "digit-patterns", config=config).task()
    return system.learner(config, SimpleNamespace(**task.facts), 0), task, config


def test_later_stages_are_fresh_and_their_batches_are_of_one_group() -> None:
    learner, task, _ = _learner()
    seen: list[np.ndarray] = []
    loss = learner.loss

    def watched(batch):
        if int(learner.stage) == 1:
            seen.append(learner.groups()[batch["index"].numpy()])
        return loss(batch)

    learner.loss = watched
    rows = fit(learner, task, bar=False)
    assert len(rows) == 2
    assert len(seen) == 969 // 32
    assert all(len(set(groups)) == 1 for groups in seen)
    assert len({int(groups[0]) for groups in seen}) > 1
    assert {"stage_0_class", "stage_1_class", "stage_0_pattern", "pattern_accuracy"} <= {
        k.removeprefix("test/") for k in rows[-1]
    }
    sizes = np.bincount(learner.groups())
    assert rows[0]["train/never_drawn"] == 0
    assert rows[-1]["train/never_drawn"] == sizes[sizes < 32].sum()
    first, second = learner.earlier[0], learner.base.encoder
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    images = torch.randn(4, 3, 8, 8)
    assert learner.embed(images).shape == (4, 128)
    _, evaluator, _ = measure(learner, task, "test", final=True)
    assert "What each stage learned" in evaluator.figures


def test_controls_ignore_the_clusters() -> None:
    shuffled, task, _ = _learner("shuffled")
    fit(shuffled, task, bar=False)
    own = np.bincount(fn.compose(list(shuffled.assigned[:1]), 4).numpy(), minlength=4)
    assert np.array_equal(np.bincount(shuffled.groups(), minlength=4), own)
    assert not np.array_equal(shuffled.groups(), shuffled.assigned[0].numpy())
    ensemble, task, _ = _learner("none")
    fit(ensemble, task, bar=False)
    assert ensemble.groups() is None


def test_over_moco_the_queue_starts_anew() -> None:
    learner, task, _ = _learner(slug="moco-v2+mcl", base={"queue": 64})
    fit(learner, task, bar=False)
    assert int(learner.stage) == 1


def test_each_stage_is_prepared_as_the_base_is() -> None:
    """MLCD labels the training set before its stage; a stage with fresh weights needs the labels too."""
    system = catalog.load_system("mlcd+mcl")
    config = system.config(
        encoder="mlp-s", batch_size=32, epochs=1, clusters=12, labels=3, projection=8, bank=50, teacher="data", recipe="none",
        mcl={"stages": 1, "clusters": 2},
    )  # fmt: skip
    task = Experiment.resolve(system, "digit-canvases?train=96&test=20&grid=2&least=2", config=config).task()
    learner = system.learner(config, SimpleNamespace(**task.facts), 0)
    fit(learner, task, bar=False)
    assert int(learner.stage) == 1
    assert int(learner.base.labels.min()) >= 0


def test_what_the_base_measures_is_measured() -> None:
    learner, task, _ = _learner("none")
    learner.base.measures = lambda survey, split: {"own": float(split == "test")}
    assert fit(learner, task, bar=False)[-1]["test/own"] == 1.0


def test_a_base_of_several_stages_is_an_error() -> None:
    _, task, config = _learner()
    base = SimpleNamespace(stages=lambda: [None, None], config=config)
    with pytest.raises(CounterpointError, match="this one has 2 stages"):
        MCL(config.parts["mcl"], lambda seed: base, SimpleNamespace(**task.facts))


def test_groups_that_no_batch_fits_into_are_an_error() -> None:
    learner, task, _ = _learner(stages=3)
    learner.config.batch_size = 700
    with pytest.raises(CounterpointError, match=r"lower --mcl\.clusters"):
        fit(learner, task, bar=False)


@pytest.mark.usefixtures("drawn")
def test_it_trains_resumes_and_shows_what_was_learned(tmp_path: Path) -> None:
    words = [
        "train",
        "mcl",
        "--data",
        "digit-patterns",
        "--encoder",
        "mlp-s",
        "--recipe",
        "digit-patterns",
        "--epochs",
        "1",
    ]
    assert cli.main([*words, "--batch-size", "64", "--hidden", "8", "--out", str(tmp_path), "--name", "r"]) == 0
    run = Run.open(tmp_path / "r")
    assert training.evaluate(run.path)["linear_accuracy"] == pytest.approx(run.metrics()[-1]["test/linear_accuracy"])
    page = (run.path / "report.html").read_text()
    for heading in ("What each stage learned", "Nearest neighbours", "Map of the test images"):
        assert heading in page


def test_digit_patterns_are_independent_of_the_class() -> None:
    data = load_patterns(seed=3)
    train, valid, test = data.attributes["pattern"]
    assert len(train) == len(data.train)
    assert len(valid) == len(data.valid)
    assert len(test) == len(data.test)
    pixels = data.train.images(np.arange(len(data.train)))
    one = np.flatnonzero(train == train[0])
    assert all(np.array_equal(pixels[one[0], ..., 1], pixels[n, ..., 1]) for n in one)
    assert abs(np.corrcoef(data.train.labels, train)[0, 1]) < 0.1
    with pytest.raises(DataError, match="patterns"):
        load_patterns(patterns=1)
    images = torch.from_numpy(pixels[:50]).permute(0, 3, 1, 2)
    views = ViewPipeline(8, 2, "digit-patterns", mean=None, std=None)(images, torch.Generator().manual_seed(0))
    assert (views[0][:, 1] - images[:, 1] / 255).std() == pytest.approx(0.05, rel=0.05)
    assert (views[0][:, 0] - views[1][:, 0]).std() > 0.2
    assert RECIPES["digit-patterns"][0][0].channels == 1


def test_the_schedule_refuses_what_it_cannot_follow() -> None:
    labels, orders = np.zeros(8, int), [np.arange(8)]
    for given, said in (({"batch_size": 0}, "batch_size"), ({"batch_size": 2, "world_size": 2, "rank": 2}, "rank")):
        with pytest.raises(ValueError, match=said):
            fn.grouped_batches(labels, permutations=orders, **given)
    with pytest.raises(ValueError, match="from 0 on"):
        fn.grouped_batches(np.array([0, 0, -1, -1]), 2, [np.arange(2)])


def test_a_group_that_nobody_is_in_is_passed_over() -> None:
    found = fn.grouped_batches(np.array([2, 0, 2, 0]), 2, [[0, 1], [], [1, 0], []])
    assert found == [[3, 1], [0, 2]]


def test_composed_labels_of_narrow_integers_and_arrays_do_not_overflow() -> None:
    nine = torch.full((2,), 9, dtype=torch.uint8)
    assert fn.compose([nine] * 4, 10).tolist() == [9999, 9999]
    assert fn.compose([np.array([0, 1]), np.array([2, 2])], 3).tolist() == [2, 5]
    with pytest.raises(ValueError, match="exceed 64 bits"):
        fn.compose([nine] * 20, 10)


def test_over_a_base_that_compares_no_projections_features_are_clustered() -> None:
    """MAE's projector is a decoder, and its features are not what its encoder gives when called."""
    system = catalog.load_system("mae+mcl")
    config = system.config(
        encoder="vit-s", recipe="digits-plain", batch_size=8, epochs=1, decoder_width=16, decoder_depth=1,
        decoder_heads=2, mcl={"stages": 1, "clusters": 2},
    )  # fmt: skip
    task = Experiment.resolve(system, "digits?size=16&train=32&held_out=0.02", config=config).task()
    learner = system.learner(config, SimpleNamespace(**task.facts), 0)
    images = torch.randn(2, 3, 16, 16)
    plain = catalog.load_system("mae").learner.embed
    with torch.no_grad():
        torch.testing.assert_close(learner.embed(images), plain(learner.base, images))
    rows = fit(learner, task, bar=False)
    with torch.no_grad():
        now = learner.embed(images)
    assert int(learner.stage) == 1
    torch.testing.assert_close(now[:, now.shape[1] // 2 :], plain(learner.base, images))
    assert "test/embedding_uniformity" not in rows[-1]


def test_normalised_stages_leave_the_embedding_as_it_is() -> None:
    learner, _, _ = _learner(stage_norm=True)
    learner.eval()
    images = torch.randn(3, 3, 8, 8)
    found = learner.predict({"image": images, "part": "test"})
    torch.testing.assert_close(found["feature"].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found["embedding"], learner.base.projector(learner.base.encoder(images)))


def test_features_of_no_stage_are_refused():
    with pytest.raises(ValueError, match="stages must hold"):
        fn.integrated([])
