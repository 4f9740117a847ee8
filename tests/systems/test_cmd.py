"""CMD: the authors' numbers, the inter-level terms against their formulas, edges, training, resuming, figures, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import cli, data, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core.region_bags import attention, bag_terms
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.images import cmd
from counterpoint.tasks.region_figures import region_figures
from counterpoint.views.images import Recipe, ViewPipeline
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "cmd.npz")
NAMES = ("student_cls", "student_region", "student_feat", "teacher_cls", "teacher_region", "teacher_feat")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", range(3))
def test_loss_gradients_and_centres_equal_the_authors(number, dtype, rtol):
    def of(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))

    def close(ours: Tensor, name: str) -> None:
        theirs = of(name).to(dtype)
        torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))

    tensors = [of(f"in/{name}").to(dtype) for name in NAMES]
    student = [x.requires_grad_() for x in tensors[:2]]
    center, center_grid = (of(f"in/{name}").to(dtype) for name in ("center", "center_grid"))
    regions = [int(of("param/regions_global")), int(of("param/regions_local"))]
    temperatures = float(of("param/student_temp")), float(of("param/teacher_temp_used"))
    given = (*tensors, regions, int(of("param/num_crops")), center, center_grid, *temperatures)
    loss = fn.esvit_loss(*given, literal_mil=bool(of("param/literal_mil")))
    close(loss, "out/loss")
    for slope, name in zip(torch.autograd.grad(loss, student), NAMES, strict=False):
        close(slope, f"grad/{name}")
    inter = "literal" if of("param/literal_mil") else "none"
    assert torch.equal(loss, fn.cmd_loss(*given, inter=inter).loss)
    momentum = float(of("param/center_momentum"))
    close(fn.moved_center(center, tensors[3], momentum), "out/center_after")
    close(fn.moved_center(center_grid, tensors[4], momentum), "out/center_grid_after")


# ------------------------------------------------------------------------------------------------------------- equations

B, V, K, P, REGIONS = 3, 4, 7, 5, (4, 2)
COUNTS = (4, 4, 2, 2)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(b: int = B, crops: int = V, regions: tuple[int, int] = REGIONS) -> dict:
    rows, teacher = b * (2 * regions[0] + (crops - 2) * regions[1]), 2 * b * regions[0]
    return {
        "student_cls": draw(0, crops * b, K), "student_region": draw(1, rows, K), "student_feat": draw(2, rows, P),
        "teacher_cls": draw(3, 2 * b, K), "teacher_region": draw(4, teacher, K), "teacher_feat": draw(5, teacher, P),
        "regions": regions, "num_crops": crops, "center": draw(6, 1, K), "center_grid": draw(7, 1, K),
        "student_temp": 0.5, "teacher_temp": 0.3,
    }  # fmt: skip


def by_formula(at: dict, inter: str, pooling: str = "mean") -> Tensor:
    """Compute the inter-level term pair by pair, with a picture at a time."""
    sides, start = [], 0
    for count in COUNTS:
        sides.append(slice(start, start := start + B * count))
    p = ((at["teacher_cls"] - at["center"]) / 0.3).softmax(1).view(2, B, K)
    grid = ((at["teacher_region"] - at["center_grid"]) / 0.3).softmax(1).view(2, B, 4, K)
    total, pairs = torch.zeros((), dtype=torch.float64), 0

    def bag(members: Tensor, features: Tensor) -> Tensor:
        weight = torch.full((len(members),), 1 / len(members)).double()
        if pooling == "attention":
            weight = (F.cosine_similarity(features, features.mean(0, keepdim=True)) / 0.1).softmax(0)
        return weight @ members

    def kl(a: Tensor, c: Tensor) -> Tensor:
        return (a * (a.log() - c.log())).sum()

    for q in range(2):
        for v in range(V):
            if q == v:
                continue
            pairs += 1
            for b in range(B):
                own = (at["student_region"][sides[v]].view(B, -1, K)[b] / 0.5).softmax(1)
                beta = bag(own, at["student_feat"][sides[v]].view(B, -1, P)[b])
                whole = (at["student_cls"].view(V, B, K)[v, b] / 0.5).softmax(0)
                if inter == "within":
                    total = total + kl(beta, whole) / B
                else:
                    theirs = bag(grid[q, b], at["teacher_feat"].view(2, B, 4, P)[q, b])
                    total = total + (kl(theirs, whole) + kl(p[q, b], beta)) / B
    return total / pairs


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("inter", ["within", "across"])
def test_inter_level_terms_and_gradients_equal_their_formulas(inter, pooling):
    at = inputs()
    student = [at[name].requires_grad_() for name in NAMES[:3]]
    found = fn.cmd_loss(**at, inter=inter, pooling=pooling, inter_weight=0.7, region_weight=0.2)
    wanted = by_formula(at, inter, pooling)
    torch.testing.assert_close(found.inter, wanted)
    torch.testing.assert_close(found.loss, 0.8 * found.image + 0.2 * found.region + 0.7 * wanted)
    through = student if pooling == "attention" else student[:2]
    slopes, others = (torch.autograd.grad(x, through, retain_graph=True) for x in (found.inter, wanted))
    torch.testing.assert_close(slopes, others, rtol=1e-8, atol=1e-11)
    whole = torch.autograd.grad(found.loss, student[1])[0]  # both terms of the regions in one buffer
    torch.testing.assert_close(whole, torch.autograd.grad(fn.cmd_loss(**at, inter="none").region, student[1])[0] * 0.2
                               + 0.7 * others[1], rtol=1e-8, atol=1e-11)  # fmt: skip


def test_inter_level_term_is_zero_where_regions_equal_their_image():
    at = inputs()
    image = at["student_cls"].view(V, B, 1, K)
    at["student_region"] = torch.cat([image[v].expand(B, count, K).reshape(-1, K) for v, count in enumerate(COUNTS)])
    for pooling in ("mean", "attention"):
        assert float(fn.cmd_loss(**at, pooling=pooling).inter) == pytest.approx(0, abs=1e-12)


def test_inter_level_term_of_one_region_is_the_divergence_of_region_and_image():
    at = inputs(crops=2, regions=(1, 1))
    log_q, log_p = ((at[name] / 0.5).log_softmax(1) for name in ("student_cls", "student_region"))
    wanted = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(fn.cmd_loss(**at).inter, wanted)


def test_loss_is_invariant_to_the_order_of_regions():
    at = inputs(crops=2, regions=(4, 4))
    turned = dict(at)
    for name in ("student_region", "student_feat", "teacher_region", "teacher_feat"):
        turned[name] = at[name].view(2, B, 4, -1)[:, :, [2, 0, 3, 1]].reshape(at[name].shape)
    for options in ({"pooling": "attention"}, {"inter": "across"}):
        torch.testing.assert_close(fn.cmd_loss(**turned, **options), fn.cmd_loss(**at, **options))


def test_a_region_learns_from_its_match_alone():
    """The features are one-hot, and the teacher's stand in reverse order."""
    at = inputs(b=1, crops=2, regions=(P, P))
    at["student_feat"] = 3 * torch.eye(P).double().repeat(2, 1)
    at["teacher_feat"] = torch.eye(P).double().flip(0).repeat(2, 1)
    targets = ((at["teacher_region"] - at["center_grid"]) / 0.3).softmax(1).view(2, P, K).flip(1)
    logs = (at["student_region"] / 0.5).log_softmax(1).view(2, P, K)
    wanted = -(targets * logs.flip(0)).sum(2).mean()
    torch.testing.assert_close(fn.cmd_loss(**at).region, wanted)


def test_region_weight_zero_is_dino_and_no_regions_leave_the_image_level():
    at = inputs()
    found = fn.cmd_loss(**at, region_weight=0.0, inter="none")
    crops = at["student_cls"].view(V, B, K), at["teacher_cls"].view(2, B, K), at["center"][0]
    torch.testing.assert_close(found.loss, fn.dino(*crops, 0.5, 0.3).loss)
    none = at | {"regions": [0, 0]} | {name: at[name][:0] for name in NAMES if not name.endswith("cls")}
    torch.testing.assert_close(fn.esvit_loss(**none), found.loss / 2)


def test_equal_features_and_confident_logits_give_finite_gradients():
    at = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs(b=1).items()}
    at["student_feat"], at["teacher_feat"] = torch.ones(12, P), torch.ones(8, P)
    student = [(300 * at[name]).requires_grad_() for name in NAMES[:2]]
    for options in ({}, {"inter": "across"}, {"pooling": "attention"}):
        loss = fn.cmd_loss(**(at | dict(zip(NAMES, student, strict=False))), **options).loss
        assert all(bool(x.isfinite().all()) for x in (loss, *torch.autograd.grad(loss, student)))


def test_the_literal_term_is_nan_where_a_bag_has_negative_logits_and_nan_features_give_nan():
    at = inputs()
    assert bool(fn.esvit_loss(**at).isfinite())
    assert bool(fn.esvit_loss(**at, literal_mil=True).isnan())
    at["student_feat"] = at["student_feat"].clone()
    at["student_feat"][0] = torch.nan
    assert bool(fn.esvit_loss(**at).isnan())


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_pass():
    logits = draw(0, 2, 6, 500).requires_grad_()
    table, number = draw(1, 12, 500).softmax(1), torch.arange(12).view(2, 6, 1)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        bag_terms(logits, table, number, attention(draw(2, 2, 6, 4)), 0.1)
    own = {x.data_ptr() for x in (logits, table)}
    assert sum(x.numel() for x in kept if x.data_ptr() not in own) < logits.numel() / 2


def test_the_teacher_s_divergence_is_reported_without_a_gradient():
    at = inputs()
    teacher = [at[name].requires_grad_() for name in NAMES[3:]]
    found = fn.cmd_loss(**(at | {"student_cls": at["student_cls"].requires_grad_()}))
    assert float(found.teacher_divergence) > 0
    assert torch.autograd.grad(found.loss, teacher, allow_unused=True) == (None,) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_cls": draw(0, 11, K)}, "student_cls"),
        ({"student_cls": draw(0, 0, K)}, "student_cls is an empty batch"),
        ({"student_region": draw(0, 35, K)}, "student_region"),
        ({"student_feat": draw(0, 36, P + 1)}, "student_feat"),
        ({"teacher_cls": draw(0, 6, K + 1)}, "teacher_cls"),
        ({"teacher_region": draw(0, 23, K)}, "teacher_region"),
        ({"teacher_feat": draw(0, 23, P)}, "teacher_feat"),
        ({"center": draw(0, K + 1)}, "center must be"),
        ({"center_grid": draw(0, 2, K)}, "center_grid must be"),
        ({"regions": [4]}, "regions"),
        ({"regions": [4, 0]}, "regions"),
        ({"num_crops": 1}, "num_crops"),
        ({"student_temp": 0.0}, "student_temp"),
        ({"teacher_temp": -1.0}, "teacher_temp"),
        ({"attention_temperature": 0.0}, "attention_temperature"),
        ({"region_weight": 1.5}, "region_weight"),
        ({"inter_weight": -1.0}, "inter_weight"),
        ({"inter": "both"}, "inter"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fn.cmd_loss(**(inputs() | change))


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "digits?size=16&train=60&held_out=0.05&valid=0.05"
SMALL = {
    "encoder": "conv-s", "recipe": "tile-canvases", "hidden": 24, "bottleneck": 16, "projection": 32, "local_crops": 2,
    "local_size": 8, "batch_size": 16, "epochs": 2, "evaluate_every": 2, "warmup_epochs": 0, "bank": 60,
}  # fmt: skip


def built(**overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("cmd", DATA, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("cmd").learner(experiment.config, SimpleNamespace(**task.facts), 0), task


def test_a_step_trains_with_the_public_function_and_centres_follow_the_loss(monkeypatch):
    learner, task = built(epochs=1, center_momentum=0.8, freeze_epochs=0)
    calls, centres, function = [], [], cmd.cmd_loss

    def watched(*args, **kwargs):
        calls.append(args)
        centres.append((args[8].clone(), args[9].clone()))
        return function(*args, **kwargs)

    monkeypatch.setattr(cmd, "cmd_loss", watched)
    fit(learner, task, bar=False)
    assert len(calls) == 60 // 16
    student_cls, student_region, student_feat, teacher_cls, teacher_region, _, regions, crops = calls[0][:8]
    assert (regions, crops) == ([4, 1], 4)
    assert student_cls.shape == (4 * 16, 32)
    assert student_region.shape == ((2 * 4 + 2 * 1) * 16, 32)
    assert student_feat.shape == (160, 128)
    assert not centres[0][0].any()
    for n, outputs in enumerate((teacher_cls, teacher_region)):  # the first step's loss saw the centres before it
        torch.testing.assert_close(centres[1][n], 0.2 * outputs.mean(0))


def test_crops_of_a_size_are_read_in_the_order_of_the_loss():
    learner, _ = built()
    learner.eval()
    large, small = torch.randn(4, 3, 16, 16), torch.randn(2, 3, 8, 8)
    found = learner.network([large, small])
    for n, group in enumerate(large.chunk(2)):
        alone = learner.network([group])
        torch.testing.assert_close(found.image[2 * n : 2 * n + 2], alone.image)
        torch.testing.assert_close(found.region[8 * n : 8 * n + 8], alone.region)
    torch.testing.assert_close(found.region[16:], learner.network([small]).region)
    torch.testing.assert_close(found.feature[:8].view(2, 4, -1).mean(1), learner.encoder(large[:2]))


def test_both_last_layers_are_frozen_in_the_first_epoch_and_the_teacher_follows_all_parameters():
    learner, task = built(epochs=1)
    before = {name: value.clone() for name, value in learner.named_parameters()}
    fit(learner, task, bar=False)
    moved = {name for name, value in learner.named_parameters() if not torch.equal(value, before[name])}
    assert {"projector.last.weight", "region_projector.last.weight"}.isdisjoint(moved)
    assert {"projector.mlp.0.weight", "region_projector.mlp.0.weight", "encoder.stem.0.weight"} <= moved
    assert {"teacher.module.encoder.stem.0.weight", "teacher.module.region.mlp.0.weight"} <= moved


@pytest.mark.parametrize(
    "settings",
    [
        {"inter": "across", "pooling": "attention", "head_norm": True},
        {"inter": "none", "region_weight": 0.0, "local_crops": 0},
        {"inter_weight": 0.1, "teacher_warmup": 3},
    ],
)
def test_options_train(settings):
    learner, task = built(epochs=1, **settings)
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["train/loss"])
    assert (row["train/inter"] > 0) == (settings["inter"] != "none" if "inter" in settings else True)
    assert row["valid/bag_divergence"] > 0
    assert row["valid/key_divergence"] > 0


def test_the_literal_term_stops_a_run_that_it_makes_nan():
    learner, task = built(epochs=1, inter="literal")
    with pytest.raises(CounterpointError, match="loss"):
        fit(learner, task, bar=False)


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("cmd", DATA, overrides=SMALL).config
    run = need_equal_ends(monkeypatch, cmd.CMD, "cmd", config, DATA, 4, tmp_path)  # in the second epoch
    assert {"center", "center_grid", "teacher.module.region.last.weight"} <= set(run.load_weights())


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line_on_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    words = ["train", "cmd", "--data", f"imagefolder:{tmp_path / 'pictures'}?size=16", "--pooling", "attention"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    run = Run.open(tmp_path / "run")
    rows = run.metrics()
    assert {"train/image", "train/region", "train/inter", "train/teacher_divergence"} <= set(rows[-1])
    learner = training.load_learner(run)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(
        learner.eval().predict({"image": images})["feature"], learner.teacher.module.encoder(images)
    )
    assert training.evaluate(run.path, say=lambda _: None)["bag_divergence"] == rows[-1]["test/bag_divergence"]
    page = (run.path / "report.html").read_text()
    assert "Key patches" in page
    assert "Which region of the teacher" in page


def test_equal_crops_match_region_by_region_in_the_figures_and_flips_are_followed():
    pictures = data.load("digits?size=16&train=60&held_out=0.05&valid=0.05", task="views").valid
    for flip in (0.0, 1.0):
        pipeline = ViewPipeline(16, 2, [Recipe(scale=None, flip=0.0), Recipe(scale=None, flip=flip)])
        found = region_figures(pictures, lambda x: F.pixel_unshuffle(x, 4), pipeline)
        joined, maps = found.values()
        lines = np.array([line for row in joined["rows"] for line in row["lines"]], float)
        here = np.stack([1 - lines[:, 0] if flip else lines[:, 0], lines[:, 1]], 1)
        near = (np.abs(here - lines[:, 2:4]) <= 0.2501).all(1)
        assert (near == lines[:, 4].astype(bool)).all()
        assert near.all() or flip
        assert all(np.sum(row["maps"][0]["map"]) == pytest.approx(1) for row in maps["rows"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "mlp-s", "local_crops": 0}, "has no feature map; choose an encoder with one"),
        ({"inter": "both"}, "inter"),
        ({"inter_weight": -1.0}, "inter_weight"),
        ({"pooling": "max"}, "pooling"),
        ({"region_weight": 2.0}, "region_weight"),
        ({"attention_temperature": 0.0}, "attention_temperature"),
        ({"student_temperature": 0.0}, "student_temperature"),
        ({"local_crops": -1}, "local_crops"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_defaults_are_those_of_the_released_code():
    config = load_system("cmd").config()
    assert (config.projection, config.local_crops, config.inter_weight, config.momentum_teacher) == (
        65536,
        8,
        1.0,
        0.996,
    )
    assert (config.teacher_temperature_start, config.teacher_temperature, config.teacher_warmup) == (0.04, 0.07, 30)
