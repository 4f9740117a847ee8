"""MLCD: the ancestor's numbers, the identities of its loss, sampled classes, clusters, resuming, what is refused."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import over_processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.core.world import leave
from counterpoint.data.digits import load_canvases
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import DataError, Interrupted
from counterpoint.experiment import Experiment
from counterpoint.systems.images import mlcd as file

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mlcd.npz")
COUNTS = [4, 2]
LABELS = torch.tensor([[3, 5], [5, -1], [0, 8], [8, 8], [-1, -1], [2, 6]])


def draw(many: int, n: int, dim: int = 5) -> list[Tensor]:
    return list(torch.randn(many, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def separated(embedding: Tensor, centers: Tensor, labels: Tensor, scale: float, **options: Any) -> Tensor:
    return fn.mlcd_loss(embedding, centers, labels, scale, 0.0, 1.0, **options)


def by_hand(embedding: Tensor, centers: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B of each row, from all logits."""
    logits = scale * F.normalize(embedding, dim=1) @ F.normalize(centers, dim=1).T
    own = (labels[:, :, None] == torch.arange(len(centers))).any(1)
    return (torch.exp(-logits) * own).sum(1), (logits.exp() * ~own).sum(1)


# --- the ancestor


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ancestor_s_loss_and_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    at = {k.split("/", 1)[1]: torch.from_numpy(PARITY[k]) for k in PARITY.files if k.startswith(f"case{case}/")}
    given = [at[f"in/{name}"].to(dtype).requires_grad_() for name in ("embedding", "class_center")]
    param = [float(at[f"param/{name}"]) for name in ("scale", "m_arc", "m_cos", "filter_threshold")]
    label = at["in/label"].clone()
    loss = fn.margin_cluster_loss(*given, label, *param)
    torch.testing.assert_close(loss, at["out/loss"].to(dtype), rtol=1e-5, atol=0)
    assert torch.equal(label, at["in/label"])
    if "grad/embedding" in at:
        loss.backward()
        for ours, name in zip(given, ("embedding", "class_center"), strict=True):
            torch.testing.assert_close(ours.grad, at[f"grad/{name}"].to(dtype), rtol=1e-5, atol=2e-6)


def plain_ancestor(e: Tensor, w: Tensor, label: Tensor, arc: float, limit: float) -> Tensor:
    """Compute the loss with its formula: a matrix of cosines whose values change without gradient."""
    cosine = F.normalize(e, dim=1) @ F.normalize(w, dim=1).T
    losses = []
    for column in label.T:
        own = F.one_hot(column, len(w)).bool()
        found = torch.where((cosine > limit) & ~own & (limit > 0), 0.0, cosine)
        turned = found + torch.where(own, (found.detach().arccos() + arc).cos() - found.detach(), 0.0)
        losses.append(F.cross_entropy(8 * turned, column))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("arc", "limit"), [(0.0, 0.0), (0.4, 0.1), (0.0, 0.2)])
def test_several_labels_margin_and_filter_equal_the_matrix_of_cosines(arc: float, limit: float) -> None:
    e, w = draw(1, 7)[0].requires_grad_(), draw(1, 9)[0].flip(1).requires_grad_()
    label = torch.tensor([[1, 4, 4], [0, 2, 3], [8, 8, 8], [5, 6, 7], [2, 1, 0], [3, 3, 1], [7, 0, 8]])
    ours, theirs = fn.margin_cluster_loss(e, w, label, 8.0, arc, 0.0, limit), plain_ancestor(e, w, label, arc, limit)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [e, w]), torch.autograd.grad(theirs, [e, w]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_and_rows_without_a_label_are_accepted() -> None:
    e, w = draw(1, 2)[0], draw(1, 4)[0]
    one = fn.margin_cluster_loss(e[:1], w, torch.tensor([2]), 8.0)
    torch.testing.assert_close(fn.margin_cluster_loss(e, w, torch.tensor([2, -1]), 8.0), one)


# --- the loss


def test_the_loss_equals_its_two_terms_and_the_coupled_one_the_pairs() -> None:
    e, w = draw(1, 6)[0], draw(1, 9)[0].flip(1)
    a, b = by_hand(e, w, LABELS, 3.0)
    torch.testing.assert_close(separated(e, w, LABELS, 3.0), (a.log1p() + b.log1p()).mean())
    torch.testing.assert_close(separated(e, w, LABELS, 3.0), (1 + a + b + a * b).log().mean())
    coupled = separated(e, w, LABELS, 3.0, coupled=True)
    torch.testing.assert_close(coupled, (a * b).log1p().mean())
    assert coupled < separated(e, w, LABELS, 3.0)


def test_with_one_label_the_coupled_loss_is_the_softmax_s() -> None:
    e, w = draw(1, 6)[0], draw(1, 9)[0].flip(1)
    label = torch.tensor([0, 4, 4, 7, 8, 2])
    logits = 8 * F.normalize(e, dim=1) @ F.normalize(w, dim=1).T
    torch.testing.assert_close(separated(e, w, label[:, None], 8.0, coupled=True), F.cross_entropy(logits, label))
    torch.testing.assert_close(fn.margin_cluster_loss(e, w, label, 8.0), F.cross_entropy(logits, label))


def test_with_logits_of_zero_the_loss_counts_the_labels() -> None:
    e, w, labels = torch.zeros(2, 4), torch.randn(7, 4, generator=generator()), torch.tensor([[0, 1, 2], [4, 5, 6]])
    assert separated(e, w, labels, 64.0).item() == pytest.approx(math.log(1 + 3) + math.log(1 + 4))
    assert separated(e, w, labels, 64.0, coupled=True).item() == pytest.approx(math.log(1 + 3 * 4))


def test_equal_differences_cost_the_coupled_loss_the_same_and_the_separated_one_more_when_negatives_are_near() -> None:
    def loss(positive: float, negative: float, *, coupled: bool) -> float:
        rest = math.sqrt(1 - positive**2), math.sqrt(1 - negative**2)
        w = torch.tensor([[positive, rest[0], 0], [negative, 0, rest[1]]], dtype=torch.float64)
        e = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
        return separated(e, w, torch.tensor([[0]]), 16.0, coupled=coupled).item()

    assert loss(0.4, 0.1, coupled=True) == pytest.approx(0.0082, abs=5e-5)
    assert loss(0.8, 0.5, coupled=True) == pytest.approx(0.0082, abs=5e-5)
    assert loss(0.4, 0.1, coupled=False) == pytest.approx(1.786, abs=5e-4)
    assert loss(0.8, 0.5, coupled=False) == pytest.approx(8.000, abs=5e-4)


def test_gradients_of_positives_do_not_depend_on_negatives() -> None:
    # Orthogonal centres: the gradient of a class's centre is that of its cosine alone.
    e, w, labels = draw(1, 1, 6)[0], torch.eye(6, dtype=torch.float64), torch.tensor([[0, 1]])

    def slope(classes: int, *, coupled: bool) -> Tensor:
        x = w[:classes].clone().requires_grad_()
        separated(e, x, labels, 3.0, coupled=coupled).backward()
        assert x.grad is not None
        return x.grad[0]

    torch.testing.assert_close(slope(4, coupled=False), slope(6, coupled=False))
    assert not torch.allclose(slope(4, coupled=True), slope(6, coupled=True))
    a, _ = by_hand(e, w, labels, 3.0)
    cosine = F.normalize(e, dim=1)[0, 0]
    # d loss / d cosine = -3 exp(-s) / (1 + A), and the gradient lies in the plane at the centre.
    wanted = -3 * (-3 * cosine).exp() / (1 + a[0]) * (F.normalize(e, dim=1)[0] - cosine * w[0])
    torch.testing.assert_close(slope(4, coupled=False), wanted)


def test_large_scales_do_not_overflow_and_equal_embeddings_are_finite() -> None:
    e = torch.ones(3, 4, requires_grad=True)
    loss = fn.mlcd_loss(e, torch.ones(5, 4), torch.tensor([[0, 1]] * 3), 1000.0, 0.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000 + math.log(3), rel=1e-4)
    assert bool(e.grad.isfinite().all())
    assert bool(fn.mlcd_loss(-e, torch.ones(5, 4), torch.tensor([[0, 1]] * 3), 1000.0, 0.3, 1.0).isfinite())


def test_rows_without_labels_are_negatives_and_masked_rows_are_left_out() -> None:
    e, w = draw(1, 6)[0], draw(1, 9)[0].flip(1)
    x = e.clone().requires_grad_()
    _, b = by_hand(e, w, LABELS, 3.0)
    alone = separated(x[4:5], w, LABELS[4:5], 3.0)
    torch.testing.assert_close(alone, b[4].log1p())
    assert separated(x[4:5], w, LABELS[4:5], 3.0, coupled=True).item() == 0
    alone.backward()
    assert bool(x.grad.isfinite().all())
    mask = torch.tensor([False, False, False, False, True, False])
    kept = separated(e, w, LABELS, 3.0, mask=mask)
    torch.testing.assert_close(kept, separated(e[~mask], w, LABELS[~mask], 3.0))


def test_with_all_classes_as_labels_only_the_positives_count() -> None:
    e, w = draw(1, 1)[0], draw(1, 2)[0].flip(1)
    a, _ = by_hand(e, w, torch.tensor([[0, 1]]), 3.0)
    x = e.clone().requires_grad_()
    loss = separated(x, w, torch.tensor([[0, 1]]), 3.0)
    loss.backward()
    torch.testing.assert_close(loss, a.log1p().mean())
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": torch.tensor([[0, 9]])}, r"labels must lie in -1\.\.8"),
        ({"labels": torch.tensor([0])}, "labels must be whole numbers"),
        ({"embedding": torch.ones(1, 4)}, "embedding and class_center"),
        ({"embedding": torch.ones(0, 5), "labels": torch.zeros(0, 2, dtype=torch.long)}, "embedding is an empty batch"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"margin": 4.0}, "below pi"),
        ({"sample_rate": 1.5}, "sample_rate must lie in"),
        ({"sample_rate": 0.9}, "generator"),
        ({"filter_threshold": -0.1}, "filter_threshold"),
        ({"mask": torch.ones(2).bool()}, "mask must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Any], said: str) -> None:
    given = {"embedding": torch.ones(1, 5), "class_center": torch.ones(9, 5), "labels": torch.tensor([[0, 1]])}
    with pytest.raises(ValueError, match=said):
        fn.mlcd_loss(**(given | {"sample_rate": 1.0} | changed))


# --- classes that take part


def test_sampled_classes_hold_the_batch_s_and_are_uniform() -> None:
    labels = torch.tensor([[3, 5], [5, -1]])
    counts = torch.zeros(10)
    for seed in range(300):
        found = fn.sampled_classes(labels, 10, 0.4, generator(seed))
        assert len(found) == 4
        assert found.tolist() == sorted(set(found.tolist()))
        counts[found] += 1
    others = torch.tensor([0, 1, 2, 4, 6, 7, 8, 9])
    assert counts[[3, 5]].tolist() == [300, 300]
    assert 40 < counts[others].min() <= counts[others].max() < 115  # 75 expected
    assert fn.sampled_classes(labels, 10, 0.1, generator()).tolist() == [3, 5]
    assert fn.sampled_classes(labels, 10, 1.0, None).tolist() == list(range(10))


def test_a_step_s_gradient_is_that_of_the_classes_drawn() -> None:
    e, w = draw(1, 6)[0], draw(1, 40)[0].flip(1)
    labels = LABELS
    thin, full = (w.clone().requires_grad_() for _ in range(2))
    drawn = fn.sampled_classes(labels, 40, 0.5, generator(3))
    loss = fn.mlcd_loss(e, thin, labels, 8.0, 0.3, 0.5, generator(3), sparse=True)
    loss.backward()
    fn.mlcd_loss(e, full, labels, 8.0, 0.3, 0.5, generator(3)).backward()
    assert thin.grad.is_sparse
    assert torch.equal(thin.grad.coalesce().indices()[0], drawn)
    torch.testing.assert_close(thin.grad.to_dense(), full.grad)
    at = torch.searchsorted(drawn, labels.clamp(min=0)).masked_fill(labels < 0, -1)
    torch.testing.assert_close(loss, fn.mlcd_loss(e, w[drawn], at, 8.0, 0.3, 1.0))


def losses() -> dict[str, tuple[int, Any]]:
    from counterpoint import functional as fn

    def centers() -> Tensor:
        return draw(1, 20)[0].flip(1)

    def mlcd(e: Tensor) -> Tensor:
        return fn.mlcd_loss(e, centers(), over_processes.mine(LABELS, COUNTS), 8.0, 0.3, 0.5, generator())

    def ancestor(e: Tensor) -> Tensor:
        return fn.margin_cluster_loss(
            e, centers(), over_processes.mine(LABELS, COUNTS), 8.0, sample_rate=0.5, generator=generator()
        )

    return {"mlcd": (1, mlcd), "ancestor": (1, ancestor)}


def test_processes_together_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    over_processes.check(losses, draw, COUNTS, tmp_path)


# --- clusters


def test_labels_are_the_nearest_clusters_in_order() -> None:
    features, centers = torch.tensor([[2.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.0, 9.0], [1.0, 0.0], [1.0, 1.0]])
    assert fn.nearest_clusters(features, centers, 2).tolist() == [[1, 2], [0, 2]]
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.2"):
        fn.nearest_clusters(features, centers, 3)
    with pytest.raises(ValueError, match="NaN"):
        fn.nearest_clusters(features * torch.nan, centers, 1)


def test_a_teacher_s_features_of_canvases_are_near_for_common_digits() -> None:
    data = load_canvases(train=300, test=4, grid=2, least=2, seed=1)
    assert data.tags is not None
    tags, features = data.tags.train, data.train.features
    assert tags.shape == (300, 10)
    assert set(tags.sum(1)) <= {1, 2, 3}
    assert len(data.valid) == 4
    assert data.train.images(np.arange(3)).shape == (3, 16, 16, 3)
    same = tags.astype(float) @ tags.T
    near = features @ features.T
    assert np.corrcoef(same[np.triu_indices(300, 1)], near[np.triu_indices(300, 1)])[0, 1] > 0.6
    again = load_canvases(train=300, test=4, grid=2, least=2, seed=1)
    assert np.array_equal(again.train.features, features)
    assert np.array_equal(again.train.pixels, data.train.pixels)
    assert not np.array_equal(load_canvases(train=300, test=4, grid=2, least=2, seed=2).train.pixels, data.train.pixels)
    with pytest.raises(DataError, match="teacher_noise"):
        load_canvases(teacher_noise=-1)


# --- the learner

DATA = "digit-canvases?train=96&test=20&grid=2&least=2"
SMALL = {"encoder": "mlp-s", "batch_size": 32, "epochs": 1, "clusters": 12, "labels": 3, "projection": 8, "bank": 50}


def learner(**settings: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("mlcd", DATA, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


@pytest.mark.parametrize(
    ("objective", "name"), [("mlcd", "mlcd_loss"), ("mlc", "mlcd_loss"), ("softmax", "margin_cluster_loss")]
)
def test_training_calls_the_function_that_equals_the_authors(
    objective: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    function = getattr(file, name)

    def seen(*given: Any, **options: Any) -> Tensor:
        calls.append((given, options))
        return function(*given, **options)

    monkeypatch.setattr(file, name, seen)
    model, task = learner(objective=objective, margin=0.2)
    before = model.centers.detach().clone()
    fit(model, task, bar=False)
    assert len(calls) == 3
    given, options = calls[0]
    assert given[3:5] == (16.0, 0.2)
    assert options.get("coupled", False) == (objective == "mlc")
    assert set(map(tuple, given[2].tolist())) <= set(map(tuple, model.labels.tolist()))
    assert not torch.equal(model.centers, before)
    drawing = [options.get("generator", given[-1]) for given, options in calls]
    assert len({generator.initial_seed() for generator in drawing}) == 3


def test_only_drawn_centres_move() -> None:
    model, task = learner(sample_rate=0.0, labels=1, batch_size=2, clusters=40)
    steps: list[tuple[set[int], set[int]]] = []
    end, state = model.end_step, {}

    def before(batch: dict[str, Any], step: Any = model.loss) -> dict[str, Tensor]:
        state["centers"], state["labels"] = (
            model.centers.detach().clone(),
            set(model.labels[batch["index"]].flatten().tolist()),
        )
        return step(batch)

    def after() -> None:
        end()
        changed = (model.centers.detach() != state["centers"]).any(1).nonzero().flatten().tolist()
        steps.append((set(changed), state["labels"]))

    model.loss, model.end_step = before, after
    fit(model, task, bar=False)
    assert len(steps) == 48
    assert all(changed == labels for changed, labels in steps)


def test_the_table_holds_clusters_of_the_teacher_and_one_process_draws_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = learner()
    fit(model, task, bar=False)
    tags = task.data.tags.train
    assert int(model.labels.min()) >= 0
    assert int(model.labels.max()) < 12
    shared = [
        (tags[i] & tags[j]).any() for i in range(96) for j in range(i) if model.labels[i, 0] == model.labels[j, 0]
    ]
    chance = [(tags[i] & tags[j]).any() for i in range(96) for j in range(i)]
    assert np.mean(shared) > np.mean(chance) + 0.2
    # The first process alone makes the figures: a pass of all processes would wait for the others.
    monkeypatch.delattr(Survey, "over")
    found = model.eval().figures(Survey(task, model))
    (part,) = found["Images and their clusters"]["parts"]
    assert len(part["rows"]) == 8
    nearest = [[cell["similarity"] for cell in row["found"]] for row in part["rows"]]
    assert nearest == [sorted(row, reverse=True) for row in nearest]
    assert set(found["Cosines with class centres"]["series"]) == {"own clusters", "other clusters"}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Experiment.resolve("mlcd", DATA, overrides=SMALL | {"epochs": 2}).config
    count, stop, loss = 0, -1, file.MLCD.loss
    clustered: list[int] = []
    cluster = file.MLCD._cluster

    def counted(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        nonlocal count
        if count == stop:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(file.MLCD, "loss", counted)
    monkeypatch.setattr(file.MLCD, "_cluster", lambda self, survey: (clustered.append(1), cluster(self, survey)))
    options: dict[str, Any] = {"data": DATA, "seed": 3, "out": tmp_path, "say": lambda _: None}
    whole = training.train("mlcd", config, name="whole", **options)
    count, stop = 0, 4
    with pytest.raises(Interrupted):
        training.train("mlcd", config, name="halves", **options)
    state = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    halves = training.resume(tmp_path / "halves", say=lambda _: None)
    assert count == 6
    assert len(clustered) == 2  # a resumed run keeps its clusters
    assert "centers" in state["learner"]
    assert whole.metrics() == halves.metrics()
    mine = halves.load_weights()
    assert all(torch.equal(value, mine[name]) for name, value in whole.load_weights().items())


@pytest.mark.usefixtures("drawn")
def test_a_run_shows_its_clusters_and_is_measured_without_them(tmp_path: Path) -> None:
    words = [
        "train",
        "mlcd",
        "--data",
        DATA,
        "--batch-size",
        "32",
        "--clusters",
        "12",
        "--labels",
        "3",
        "--epochs",
        "1",
    ]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "r"]) == 0
    run = Run.open(tmp_path / "r")
    assert {"test/tag_precision", "train/positive_cosine"} <= set(run.metrics()[-1])
    page = (run.path / "report.html").read_text()
    assert "Images and their clusters" in page
    assert "Cosines with class centres" in page
    assert not {"centers", "labels"} & set(run.load_weights())
    assert training.evaluate(run.path)["tag_precision"] == pytest.approx(run.metrics()[-1]["test/tag_precision"])


@pytest.mark.slow
def test_on_a_folder_of_images_another_run_teaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "find_spec", lambda name: None)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{number}.png")
    data = [
        "--data",
        f"imagefolder:{tmp_path / 'mine'}?size=8",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--encoder",
        "mlp-s",
    ]
    place = ["--out", str(tmp_path)]
    assert cli.main(["train", "simclr", *data, "--hidden", "8", "--recipe", "digits-plain", *place, "--name", "t"]) == 0
    words = ["train", "mlcd", *data, "--clusters", "6", "--labels", "2", *place, "--name", "r"]
    assert cli.main([*words, "--teacher", f"run:{tmp_path / 't'}"]) == 0
    assert "test/linear_accuracy" in Run.open(tmp_path / "r").metrics()[-1]
    capsys.readouterr()
    for wrong, said in (
        (["--clusters", "100"], "fewer than the 100 clusters; lower --clusters"),
        (["--labels", "6"], "labels must lie below clusters (6)"),
        (["--teacher", "data"], "the source brings no features"),
        (["--teacher", "clip"], "unknown teacher 'clip'"),
        (["--teacher", f"run:{tmp_path / 'none'}"], "Any finished run can teach"),
        (["--cluster-library", "faiss"], "faiss is not installed"),
        (["--margin", "4"], "margin must lie in 0..pi"),
        (["--sample-rate", "2"], "sample_rate must lie in 0..1"),
        (["--temperature", "0"], "temperature must be > 0"),
    ):
        assert cli.main([*words[:-1], "no", *wrong]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "no").exists()


# --- gradients of the drawn centres over processes


def _sparse_mean(rank: int, folder: str) -> None:
    from counterpoint.engine.gradients import average

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for rows in ([[1, 3], [1, 3]], [[1, 3], [3]], [[0], None]):
        parameter = torch.nn.Parameter(torch.zeros(4, 2))
        if rows[rank] is not None:
            chosen = torch.tensor(rows[rank])
            (F.embedding(chosen, parameter, sparse=True) * (rank + 1)).sum().backward()
        average([parameter])
        assert parameter.grad is not None
        assert parameter.grad.is_sparse
        found.append(parameter.grad.to_dense()[:, 0])
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_sparse_gradients_are_averaged_over_processes_row_by_row(tmp_path: Path) -> None:
    mp.start_processes(_sparse_mean, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        found = torch.stack(torch.load(tmp_path / f"{rank}.pt"))
        assert found.tolist() == [[0, 1.5, 0, 1.5], [0, 0.5, 0, 1.5], [0.5, 0, 0, 0]]
