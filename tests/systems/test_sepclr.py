"""SepCLR: the authors' numbers, identities, edges, training, resuming, the probe matrix, own folders."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterpoint import cli
from counterpoint import functional as fn
from counterpoint.core import gaussian
from counterpoint.data import load
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.supervision import sepclr as module
from counterpoint.tasks.spaces import Cause, probe_matrix
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "sepclr.npz")
HEADS = ("common1", "common2", "salient1", "salient2")
WEIGHTS = ("salient_weight", "background_weight", "jem_weight", "bandwidth")
TYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
sepclr = fn.of("sepclr")


def of(number: int, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    theirs = theirs.to(ours.dtype)
    torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
@pytest.mark.parametrize("number", [0, 1])
def test_loss_terms_and_gradients_equal_the_authors(number, dtype, rtol):
    heads = [of(number, f"in/{name}").to(dtype).requires_grad_() for name in HEADS]
    weights = {name: float(of(number, f"param/{name}")) for name in WEIGHTS}
    found = sepclr.sepclr_loss(*heads, of(number, "in/is_target"), **weights)
    for name, value in found.items():
        close(value, of(number, f"out/{name}"), rtol)
    for slope, name in zip(torch.autograd.grad(found["loss"], heads), HEADS, strict=True):
        close(slope, of(number, f"grad/{name}"), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
def test_single_terms_equal_the_authors(dtype, rtol):
    x, y, s, latent, attribute, discrete = (
        of(2, f"in/{name}").to(dtype) for name in ("x", "y", "s", "latent", "attribute", "attribute_discrete")
    )
    bandwidth = float(of(2, "param/bandwidth"))
    x.requires_grad_()
    s.requires_grad_()
    close(gaussian.align(x, y, bandwidth), of(2, "out/align"), rtol)
    close(gaussian.uniform(x, bandwidth), of(2, "out/uniform"), rtol)
    close(
        gaussian.sup_align(latent, attribute, float(of(2, "param/attribute_bandwidth"))), of(2, "out/sup_align"), rtol
    )
    close(gaussian.discrete_sup_align(latent, discrete), of(2, "out/discrete_sup_align"), rtol)
    jem = gaussian.joint_entropy(x, s, bandwidth)
    close(jem, of(2, "out/jem"), rtol)
    for slope, name in zip(torch.autograd.grad(jem, (x, s)), ("x", "s"), strict=True):
        close(slope, of(2, f"grad/jem_{name}"), rtol)


# ------------------------------------------------------------------------------------------------------------- identities


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_joint_entropy_with_a_constant_space_is_that_of_the_other_space():
    c = draw(0, 9, 4)
    kernel = (-torch.cdist(c, c).square()).exp()
    torch.testing.assert_close(gaussian.joint_entropy(c, torch.zeros(9, 2).double()), kernel.mean(1).log().mean())


def test_joint_entropy_of_far_rows_is_minus_the_log_of_their_number():
    c = draw(0, 9, 4)
    far = 1e3 * torch.arange(9.0).double()[:, None]
    assert float(gaussian.joint_entropy(c, far)) == pytest.approx(-math.log(9), rel=1e-12)
    assert float(gaussian.joint_entropy(far, c)) == pytest.approx(-math.log(9), rel=1e-12)


def test_uniformity_of_orthonormal_rows_is_minus_two():
    assert float(gaussian.uniform(torch.eye(5))) == pytest.approx(-2, rel=1e-6)


@pytest.mark.parametrize("n", [40, 300])
def test_kernels_in_tiles_equal_the_matrix_in_value_and_gradient(n):
    x = draw(1, n, 3).requires_grad_()
    matrix = (-(x[:, None] - x).square().sum(2) / (2 * 0.7)).exp()
    off = ~torch.eye(n, dtype=torch.bool)
    plain = torch.stack([matrix[off].mean().log(), matrix.mean(1).log().mean()])
    ours = torch.stack([gaussian.log_mean_kernel(x, 0.7), gaussian.mean_log_density(x, 0.7)])
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0)
    for number in (0, 1):
        one, other = (torch.autograd.grad(f[number], x, retain_graph=True)[0] for f in (ours, plain))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_supervised_alignment_in_chunks_equals_all_pairs_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(gaussian, "CHUNK", 50)
    z, y = draw(0, 20).requires_grad_(), draw(1, 20)
    i, j = torch.triu_indices(20, 20, 1)
    plain = ((-(y[i] - y[j]).square() / (2 * 0.3)).exp() * (z[i] - z[j]).square()).mean()
    ours = gaussian.sup_align(z, y, 0.3)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(f, z)[0] for f in (ours, plain)))
    (slope,) = torch.autograd.grad(gaussian.sup_align(z, y), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(slope.sum(), z)


# ------------------------------------------------------------------------------------------------------------------ edges


def heads(n: int = 6) -> list[Tensor]:
    return [draw(seed, n, width).requires_grad_() for seed, width in enumerate((4, 4, 3, 3))]


def test_batch_without_targets_has_no_salient_alignment_and_finite_gradients():
    given = heads()
    found = sepclr.sepclr_loss(*given, torch.zeros(6, dtype=torch.long))
    assert found["salient_align"].item() == 0 < found["background"].item()
    assert abs(found["salient_uniform"].item()) < 1e-12
    for slope in torch.autograd.grad(found["loss"], given):
        assert bool(slope.isfinite().all())


def test_batch_without_backgrounds_has_no_background_term():
    given = heads()
    found = sepclr.sepclr_loss(*given, torch.ones(6, dtype=torch.bool))
    assert found["background"].item() == 0
    torch.testing.assert_close(found["salient_align"], gaussian.align(given[2], given[3]))
    for slope in torch.autograd.grad(found["loss"], given):
        assert bool(slope.isfinite().all())


def test_one_picture_has_no_pairs():
    found = sepclr.sepclr_loss(*heads(1), torch.ones(1, dtype=torch.long))
    assert all(found[name].item() == 0 for name in ("common_uniform", "salient_uniform", "jem"))


def test_equal_rows_have_the_largest_terms_and_no_gradient():
    x = torch.ones(5, 3, requires_grad=True)
    total = gaussian.uniform(x) + gaussian.joint_entropy(x, x)
    assert total.item() == pytest.approx(0, abs=1e-6)
    assert float(torch.autograd.grad(total, x)[0].abs().max()) < 1e-6


def test_far_salient_rows_do_not_underflow():
    x = torch.tensor([[0.0], [100.0]], requires_grad=True)
    assert gaussian.uniform(x).item() == pytest.approx(-1e4, rel=1e-6)
    assert float(torch.autograd.grad(gaussian.uniform(x), x)[0][1, 0]) == pytest.approx(-200, rel=1e-3)


def test_backgrounds_get_no_gradient_from_uniformity_and_joint_entropy():
    given, target = heads(), torch.tensor([0, 1, 1, 0, 1, 0])
    found = sepclr.sepclr_loss(*given, target, background_weight=0.0)
    for slope in torch.autograd.grad(found["loss"], given[2:]):
        assert bool((slope[target == 0] == 0).all())
        assert bool((slope[target == 1] != 0).any())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"is_target": torch.tensor([0, 1, 2, 0, 1, 0])}, "is_target"),
        ({"is_target": torch.zeros(6)}, "is_target"),
        ({"is_target": torch.zeros(5, dtype=torch.long)}, "is_target"),
        ({"common2": draw(0, 6, 5)}, "common2"),
        ({"salient2": draw(0, 5, 3)}, "salient2"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"jem_weight": -1.0}, "jem_weight"),
        ({"uniform_weight": -1.0}, "uniform_weight"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    given = dict(zip(HEADS, heads(), strict=True)) | {"is_target": torch.tensor([0, 1, 1, 0, 1, 0])}
    with pytest.raises(ValueError, match=named):
        sepclr.sepclr_loss(**given | change)


# --------------------------------------------------------------------------------------------------------------- training

DATA = "digit-overlays?size=8&train=64&test=24"
SMALL = {
    "encoder": "mlp-s",
    "recipe": "none",
    "batch_size": 16,
    "epochs": 2,
    "hidden": 8,
    "projection": 4,
    "evaluate_every": 2,
}
WORDS = [
    "--encoder", "mlp-s", "--recipe", "none", "--batch-size", "16", "--epochs", "1", "--hidden", "8", "--projection", "4",
]  # fmt: skip


def silent(_: object) -> None:
    return None


def task_and_learner(spec: str = DATA, **changes: Any) -> tuple[Any, module.SepCLR]:
    experiment = Experiment.resolve("sepclr", spec, overrides=SMALL | changes)
    task = experiment.task(experiment.source())
    return task, module.SepCLR(experiment.config, SimpleNamespace(**task.facts), 0)


def test_a_training_step_calls_the_function_that_passes(monkeypatch):
    task, learner = task_and_learner(salient_weight=2.0, bandwidth=0.7)
    learner.begin(Survey(task, learner))
    calls: list[tuple[Any, ...]] = []

    def noted(*args: Any, **more: Any) -> dict[str, Tensor]:
        calls.append((*args, more))
        return sepclr.sepclr_loss(*args, **more)

    monkeypatch.setattr(module, "sepclr_loss", noted)
    views = [torch.randn(6, 3, 8, 8) for _ in range(2)]
    learner.loss({"views": views, "index": torch.tensor([0, 1, 3, 5, 8, 9])})["loss"].backward()
    (call,) = calls
    assert call[4].tolist() == [False, True, True, True, False, True]
    assert call[5:] == (2.0, 100.0, 10.0, 0.7, {"uniform_weight": 2.0})
    assert all(p.grad is not None for p in learner.parameters())


def test_the_encoders_share_no_weights_and_features_are_taken_before_the_projectors():
    _, learner = task_and_learner()
    images = torch.randn(3, 3, 8, 8)
    learner.eval()
    common, salient = learner.spaces(images)
    with torch.no_grad():
        for p in [*learner.salient_encoder.parameters(), *learner.projector.parameters()]:
            p.mul_(3)
    torch.testing.assert_close(learner.spaces(images)[0], common)
    assert not torch.allclose(learner.spaces(images)[1], salient)


@pytest.mark.parametrize(("space", "width"), [("both", 8), ("common", 4), ("salient", 4)])
def test_features_are_those_of_the_space_that_is_asked_for(space, width):
    assert task_and_learner(space=space)[1].embed(torch.randn(3, 3, 8, 8)).shape == (3, width)


def test_without_membership_every_picture_is_a_target():
    task, learner = task_and_learner(membership=False)
    learner.begin(Survey(task, learner))
    assert learner.is_target is not None
    assert bool(learner.is_target.all())


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    config = Experiment.resolve("sepclr", DATA, overrides=SMALL).config
    need_equal_ends(monkeypatch, module.SepCLR, "sepclr", config, DATA, 5, tmp_path)  # in the second epoch


@pytest.mark.usefixtures("drawn")
def test_trains_on_an_own_folder_and_draws_the_matrix(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("healthy/a", "healthy/b", "ill/a", "ill/b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    source = f"imagefolder:{tmp_path / 'pictures'}?domain=folder&size=8"
    assert cli.main(["train", "sepclr", "--data", source, *WORDS, "--out", str(tmp_path), "--name", "r"]) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "What each space knows" in page
    assert "The salient space" in page
    header = (tmp_path / "r" / "metrics.csv").read_text()
    for name in ("common_to_set", "salient_to_set", "common_to_class", "salient_to_class"):
        assert f"test/{name}" in header


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("digits?size=8&train=60", {}, "domain=COLUMN"),
        ("styled-shapes?train=60&test=20&size=8", {}, "--target"),
        ("styled-shapes?train=60&test=20&size=8", {"target": "striqed"}, "striped"),
    ],
)
def test_data_that_do_not_tell_the_sets_are_refused(spec, changes, message):
    task, learner = task_and_learner(spec, **changes)
    with pytest.raises(CounterpointError, match=message):
        learner.begin(Survey(task, learner))


def test_one_of_several_domains_can_be_the_target():
    task, learner = task_and_learner("styled-shapes?train=60&test=20&size=8", target="striped")
    learner.begin(Survey(task, learner))
    wanted = torch.from_numpy(task.data.train.domains) == task.data.domains.index("striped")
    assert torch.equal(learner.is_target, wanted)


@pytest.mark.parametrize(("domains", "message"), [(0, "no target"), (1, "no background"), (-1, "without a domain")])
def test_an_empty_set_and_pictures_without_a_set_are_refused(domains, message):
    task, learner = task_and_learner()
    task.data.train.domains = np.full(64, domains)
    with pytest.raises(DataError, match=message):
        learner.begin(Survey(task, learner))


@pytest.mark.parametrize(
    "changes", [{"bandwidth": 0.0}, {"jem_weight": -1.0}, {"salient_weight": float("nan")}, {"space": "all"}]
)
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(CounterpointError, match=next(iter(changes))):
        module.SepCLRConfig(**changes)


# ------------------------------------------------------------------------------------------------------ probes and sources


def test_ridge_regression_finds_what_a_space_holds_and_not_what_it_lacks():
    x, other = draw(0, 600, 2), draw(1, 600, 2)
    found = probe_matrix(
        {"space": (x[:400], x[400:])}, {"own": Cause(x[:400], x[400:]), "other": Cause(other[:400], other[400:])}
    )
    assert found["space", "own"] > 0.9
    assert found["space", "other"] < 0.1


def test_probes_leave_out_pictures_without_the_cause():
    x = torch.cat([torch.ones(4, 2), -torch.ones(4, 2), torch.zeros(2, 2)])
    label = torch.tensor([0] * 4 + [1] * 4 + [-1] * 2)
    assert probe_matrix({"s": (x, x)}, {"a": Cause(label, label)}) == {("s", "a"): 1.0}
    assert probe_matrix({"s": (x, x)}, {"a": Cause(label * 0 - 1, label)}) == {}


def test_overlays_are_in_targets_alone():
    found = load("digit-overlays?size=8&train=40&test=20", task="views")
    domains, (overlay, *_) = found.train.domains, found.attributes["overlay"]
    assert np.array_equal(overlay >= 0, domains == 1)
    assert domains.mean() == 0.5
    brightness = found.train.images(np.arange(40)).mean((1, 2, 3))
    assert brightness[domains == 1].mean() > 1.5 * brightness[domains == 0].mean()
    with pytest.raises(DataError, match="digit-overlays"):
        load("digit-overlays?train=2", task="views")


def test_latent_factors_make_the_pictures_and_backgrounds_have_no_salient_ones():
    found = load("latent-factors?train=40&test=20&seed=3", task="views")
    common, salient = found.factors["common_causes"][0], found.factors["salient_causes"][0]
    assert np.array_equal(np.abs(salient).sum(1) > 0, found.train.domains == 1)
    assert np.array_equal(found.train.labels, (common > 0) @ np.array([1, 2, 4]))
    again = load("latent-factors?train=40&test=20&seed=4", task="views")
    assert not np.array_equal(found.train.images(np.arange(40)), again.train.images(np.arange(40)))
    with pytest.raises(DataError, match="latent-factors"):
        load("latent-factors?test=1", task="views")
