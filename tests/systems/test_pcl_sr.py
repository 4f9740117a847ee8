"""PCL-SR against the authors' numbers, its identities and edges, its two turns; it trains in all variants and resumes."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from counterpoint import cli, training
from counterpoint.core.wavelets import haar_high_frequency
from counterpoint.encoders import critics
from counterpoint.encoders.critics import HaarCritic, fixed
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.dense import pcl_sr as room
from counterpoint.systems.dense.pcl_sr import PCLSRConfig, contrastive_discriminator, feature_ratio, patch_nce

NUMBERS = np.load(Path(__file__).parents[1] / "parity" / "pcl-sr.npz")
DATA = "digits?size=20&train=40&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {
    "patch": 20, "batch_size": 8, "repeats": 1, "critic_width": 4, "pretrain_epochs": 1, "epochs": 1, "evaluate_every": 9,
}  # fmt: skip
TYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def case(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    found = {
        k.removeprefix(f"{name}/"): torch.from_numpy(NUMBERS[k]) for k in NUMBERS.files if k.startswith(f"{name}/")
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**settings: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("pcl-sr", DATA, overrides=SMALL | settings)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.epochs = learner.steps_per_epoch = 1
    learner.position.stage = len(learner.stages()) - 1  # the contrast
    return learner, task


def batch_of(learner: Any, task: Any) -> dict[str, Any]:
    return learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))


# --- equations


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
def test_patch_nce_equals_the_authors_numbers(number: int, dtype: torch.dtype, rtol: float) -> None:
    at = case(f"patch_nce/case{number}", dtype)
    anchor = at["in/anchor"].requires_grad_()
    for others in ((at["in/positives"], at["in/negatives"]), (list(at["in/positives"]), list(at["in/negatives"]))):
        loss = patch_nce(anchor, *others, not bool(at["param/lmcl"]))
        torch.testing.assert_close(loss, at["out/loss"], rtol=rtol, atol=0)
        (slope,) = torch.autograd.grad(loss, anchor)
        torch.testing.assert_close(slope, at["grad/anchor"], rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
def test_feature_ratio_equals_the_authors_numbers(number: int, dtype: torch.dtype, rtol: float) -> None:
    at = case(f"feature_ratio/case{number}", dtype)
    anchors = [at[f"in/anchor_layer{n}"].requires_grad_() for n in (0, 1)]
    sides = [[at[f"in/{side}_layer{n}"] for n in (0, 1)] for side in ("positives", "negatives")]
    found = feature_ratio(anchors, *sides, int(at["param/kind"]), bool(at["param/layer_weight"]))
    for name in ("loss", "positive", "negative"):
        torch.testing.assert_close(getattr(found, name), at[f"out/{name}"], rtol=rtol, atol=rtol)
    (slope,) = torch.autograd.grad(found.loss, anchors[0])
    torch.testing.assert_close(slope, at["grad/anchor_layer0"], rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
def test_the_critic_s_loss_and_the_bands_equal_the_authors_numbers(dtype: torch.dtype, rtol: float) -> None:
    at = case("contrastive_discriminator/case0", dtype)
    real, fake = at["in/real"].requires_grad_(), at["in/fake"].requires_grad_()
    loss = contrastive_discriminator(real, fake)
    torch.testing.assert_close(loss, at["out/loss"], rtol=rtol, atol=0)
    for slope, name in zip(torch.autograd.grad(loss, (real, fake)), ("real", "fake"), strict=True):
        torch.testing.assert_close(slope, at[f"grad/{name}"], rtol=rtol, atol=rtol * 1e-2)
    at = case("haar_high_frequency/case0", dtype)
    torch.testing.assert_close(haar_high_frequency(at["in/image"]), at["out/bands"], rtol=1e-5, atol=1e-6)


def test_one_positive_and_one_negative_give_the_softplus_of_their_difference() -> None:
    a, p, n = (draw(3, 4, 2, 5, seed=seed) for seed in range(3))
    s_p, s_n = (F.cosine_similarity(a, other, dim=1).mean((1, 2)) for other in (p, n))
    torch.testing.assert_close(patch_nce(a, [p], [n]), F.softplus(s_n - s_p).mean())
    torch.testing.assert_close(patch_nce(a, [p], [n], False), (s_n - s_p).mean())
    l2 = feature_ratio([a], [[p]], [[n]], "l2").loss
    torch.testing.assert_close(l2, (1 - s_p.mean()) / (1 - s_n.mean() + 3e-7))
    r, f = draw(1), draw(1, seed=1)
    torch.testing.assert_close(contrastive_discriminator(r, f), 2 * F.softplus(f - r)[0])


def test_equal_similarities_give_the_logarithm_of_the_candidates_and_no_negative_gives_zero() -> None:
    a = draw(2, 4, 3, 3).requires_grad_()
    found = patch_nce(a, [a, a], [a, a, a])
    torch.testing.assert_close(found, torch.tensor(math.log(4), dtype=torch.float64))
    none = patch_nce(a, [a], torch.empty(0, 2, 4, 3, 3, dtype=torch.float64))
    assert float(none.detach()) == 0
    assert torch.equal(torch.autograd.grad(none, a)[0], torch.zeros_like(a))


def test_places_of_zeros_have_similarity_zero_and_no_gradient() -> None:
    a = draw(2, 4, 3, 3)
    a[:, :, 1, 2] = 0
    a.requires_grad_()
    p = draw(2, 4, 3, 3, seed=1)
    found = patch_nce(a, [p], [torch.zeros_like(p)])
    s = F.cosine_similarity(a, p, dim=1).mean((1, 2))
    torch.testing.assert_close(found, F.softplus(-s).mean())
    (slope,) = torch.autograd.grad(found, a)
    assert torch.equal(slope[:, :, 1, 2], torch.zeros(2, 4, dtype=torch.float64))
    assert slope.isfinite().all()
    assert slope.abs().max() < 1


def test_a_ratio_of_negatives_equal_to_the_anchor_is_huge_and_finite() -> None:
    a, p = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    found = feature_ratio([a], [[p]], [[a]], "l1")
    assert float(found.negative) == 0
    torch.testing.assert_close(found.loss, (a - p).abs().mean() / 3e-7)


def test_bands_of_odd_pictures_are_those_of_the_reflected_picture() -> None:
    image = draw(2, 3, 5, 7)
    assert torch.equal(haar_high_frequency(image), haar_high_frequency(F.pad(image, (0, 1, 0, 1), mode="reflect")))
    assert torch.equal(haar_high_frequency(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 3, 2, 2))


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    a = draw(2, 4, 3, 3)
    for call, words in (
        (lambda: patch_nce(a[0], [a[0]], []), "anchor must be"),
        (lambda: patch_nce(a, [a[:1]], [a]), "positives must each"),
        (lambda: patch_nce(a, [a], [a[:, :2]]), "negatives must each"),
        (lambda: patch_nce(a, [], [a]), "positives must hold"),
        (lambda: patch_nce(a, [a], [], False), "LMCL"),
        (lambda: patch_nce(a[:0], [a[:0]], [a[:0]]), "empty batch"),
        (lambda: feature_ratio([a], [[a]], [[a]], "l3"), "kind must be"),
        (lambda: feature_ratio([a], [[a]], [[a]], 3), "kind must be"),
        (lambda: feature_ratio([a], [[a], [a]], [[a]]), "one entry for each layer"),
        (lambda: feature_ratio([a], [[a]], [[]]), "negatives of layer 0"),
        (lambda: contrastive_discriminator(draw(0), draw(3)), "real is an empty batch"),
        (lambda: haar_high_frequency(draw(1, 3, 1, 4)), "2 x 2"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- the critic and its turn


def test_the_critic_has_eight_blocks_and_sixteen_logits() -> None:
    critic = HaarCritic(8)
    assert critic(torch.rand(2, 3, 33, 48)).shape == (2, 16)
    shapes = [tuple(x.shape[1:]) for x in critic.features(torch.rand(2, 3, 32, 48), range(8))]
    assert shapes == [
        (8, 16, 24), (8, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6), (32, 2, 3), (64, 2, 3), (64, 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("norm", ["shared", "each"])
def test_the_network_s_turn_changes_nothing_of_the_critic_and_gradient_reaches_the_network(norm: str) -> None:
    learner, task = built(norm=norm)
    batch = batch_of(learner, task)
    before = {name: value.clone() for name, value in learner.critic.state_dict().items()}
    found = learner.loss(batch)
    slopes = torch.autograd.grad(found["contrast"], list(learner.network.parameters()), retain_graph=True)
    assert all(slope.abs().sum() > 0 for slope in slopes[:-1])  # a constant shift is no high frequency
    found["loss"].backward()
    assert all(p.grad is None for p in learner.critic.parameters())
    assert all(p.requires_grad for p in learner.critic.parameters())
    assert learner.critic.training
    after = learner.critic.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    learner.critic_loss(batch)
    assert not torch.equal(after["blocks.0.1.running_mean"], before["blocks.0.1.running_mean"])  # the first turn does


def test_statistics_of_each_set_make_the_features_of_a_picture_independent_of_the_other_sets() -> None:
    critic, x = HaarCritic(4), torch.rand(2, 3, 16, 16)
    with fixed(critic, own_statistics=True), torch.no_grad():
        (alone,) = critic.features(x, [1])
    wanted = critic.train().features(x, [1])[0].detach()
    torch.testing.assert_close(alone, wanted)


def test_the_critic_learns_from_originals_and_copies_against_outputs_and_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, task = built()
    batch, seen = batch_of(learner, task), []
    monkeypatch.setattr(
        learner.critic, "forward", lambda images: (seen.append(images), torch.zeros(len(images), 16))[1]
    )
    learner.critic_loss(batch)
    restored, k, n = learner.network(batch["low"]), learner.config.copies, len(batch["high"])
    assert len(seen[0]) == (2 + 2 * k) * n
    sets = seen[0].split(n)
    assert torch.equal(sets[0], batch["high"])
    assert torch.equal(sets[k], batch["positives"][k])
    torch.testing.assert_close(sets[k + 1], restored)
    assert torch.equal(sets[-1], batch["negatives"][-1])
    assert not any(torch.equal(x, batch["negatives"][0]) for x in sets)  # the input itself is never a fake


def test_the_functions_that_pass_are_the_functions_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {"patch_nce": [], "contrastive_discriminator": []}

    def counted(name: str) -> Any:
        function = getattr(room, name)
        return lambda *args: (calls[name].append([np.shape(x) for x in args]), function(*args))[1]

    for name in calls:
        monkeypatch.setattr(room, name, counted(name))
    bands: list[Any] = []
    haar = critics.haar_high_frequency
    monkeypatch.setattr(critics, "haar_high_frequency", lambda x: (bands.append(x.shape), haar(x))[1])
    rows = Experiment.resolve("pcl-sr", DATA, overrides=SMALL).run(0)
    assert calls["patch_nce"][0] == [(8, 16, 3, 3), (4, 8, 16, 3, 3), (4, 8, 16, 3, 3), ()]
    assert calls["contrastive_discriminator"][0] == [(32, 16), (32, 16)]
    assert len(bands) == 3 * 5  # three passes of the critic in each of five steps
    assert {"train/contrast", "train/critic_loss", "test/psnr", "lr/1"} <= set(rows[-1])
    assert "train/contrast" not in rows[0]


def test_the_second_turn_sees_the_critic_that_the_first_has_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    for name in ("critic_loss", "loss"):
        function = getattr(room.PCLSR, name)
        monkeypatch.setattr(
            room.PCLSR, name,
            lambda self, batch, f=function: (seen.append(self.critic.head.weight.detach().clone()), f(self, batch))[1],
        )  # fmt: skip
    Experiment.resolve("pcl-sr", DATA, overrides=SMALL | {"pretrain_epochs": 0}).run(0)
    assert len(seen) == 10
    assert all(not torch.equal(seen[n], seen[n + 1]) for n in range(0, 10, 2))
    assert all(torch.equal(seen[n], seen[n + 1]) for n in range(1, 9, 2))  # the second turn leaves it


# --- variants


def network_after(**settings: Any) -> dict[str, Tensor]:
    experiment = Experiment.resolve("pcl-sr", DATA, overrides=SMALL | settings)
    task, kept = experiment.task(), []
    learner = experiment.learner(task.facts, 0)
    from counterpoint.engine.fit import fit

    fit(learner, task, bar=False, callbacks=[SimpleNamespace(
        on_start=lambda *_: None, on_step=lambda *_: None, on_epoch=lambda _: None, on_end=lambda _: kept.append(learner)
    )])  # fmt: skip
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def test_the_released_fault_trains_exactly_as_l1_alone_and_the_contrast_does_not() -> None:
    alone = network_after(contrast="none")
    fault, contrast = network_after(gradient_bug=True), network_after()
    assert all(torch.equal(value, fault[name]) for name, value in alone.items())
    assert not any(torch.equal(value, contrast[name]) for name, value in alone.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"contrast": "lmcl", "layers": (1, 4)},
        {"contrast": "cosine", "layers": (0, 2), "layer_weights": True},
        {"contrast": "l1", "copies": 0},
        {"contrast": "l2", "shuffled": True},
        {"norm": "each", "noisy": True, "critic_copies": False},
        {"scale": 4, "batch_size": 1, "shuffled": True},
    ],
    ids=str,
)
def test_every_variant_takes_a_step_with_a_finite_gradient(settings: dict[str, Any]) -> None:
    learner, task = built(**settings)
    batch = batch_of(learner, task)
    losses = learner.critic_loss(batch)["critic_loss"], learner.loss(batch)["loss"]
    for loss, network in zip(losses, (learner.critic, learner.network), strict=True):
        slopes = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        assert loss.isfinite()
        assert all(slope is None or slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("contrast", ["infonce", "lmcl", "cosine", "l1", "l2"])
def test_the_contrast_is_the_named_function_of_the_critic_s_features(contrast: str) -> None:
    learner, task = built(contrast=contrast, layers=(1, 4), layer_weights=True)
    batch = batch_of(learner, task)
    found = learner.loss(dict(batch))["contrast"]
    learner.critic.eval()
    anchors = learner.critic.features(learner.network(batch["low"]), [1, 4])
    sides = [[learner.critic.features(x, [1, 4]) for x in batch[name]] for name in ("positives", "negatives")]
    positives, negatives = ([torch.stack([maps[n] for maps in side]) for n in (0, 1)] for side in sides)
    if contrast in ("infonce", "lmcl"):
        each = zip(anchors, positives, negatives, strict=True)
        wanted = sum(patch_nce(*maps, contrast == "infonce") for maps in each) / 2
    else:
        wanted = feature_ratio(anchors, positives, negatives, contrast, True).loss
    torch.testing.assert_close(found, wanted)


def test_shuffled_negatives_are_those_of_other_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, task = built(shuffled=True, copies=1)
    batch, seen = batch_of(learner, task), []
    monkeypatch.setattr(room, "patch_nce", lambda a, p, n, include: (seen.append(n), a.sum())[1])
    learner.loss(batch)
    assert len(seen[0]) == 4
    assert torch.equal(seen[0][2:], seen[0][:2][:, batch["order"]])
    assert not torch.equal(batch["order"], torch.arange(8))


def test_vgg19_embeds_without_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(True), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(True))
    monkeypatch.setattr(critics, "_downloaded", lambda tv: SimpleNamespace(features=layers))
    learner, task = built(embedding="vgg19", contrast="l1", layers=(0, 3), copies=0)
    assert learner.critic is None
    assert len(learner.turns()) == 1
    found = learner.loss(batch_of(learner, task))
    assert any(s.abs().sum() > 0 for s in torch.autograd.grad(found["contrast"], list(learner.network.parameters())))
    assert not any(name.startswith("vgg") for name in learner.state_dict())
    images = torch.rand(1, 3, 8, 8)
    before, after = learner.vgg.module.features(images, [0, 1])
    assert torch.equal(after, before.relu())
    assert (before < 0).any()  # the next layer does not overwrite it


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    for settings, words in (
        ({"contrast": "nce"}, "contrast"),
        ({"layers": (8,)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"alpha": -1.0}, "alpha"),
        ({"copies": -1}, "copies"),
        ({"sharpness": (3.0, 0.5)}, "sharpness"),
        ({"blur": (0.0, 2.0)}, "blur"),
        ({"scale": 5}, "scale"),
        ({"patch": 50}, "patch"),
        ({"patch": 16, "scale": 2}, "patch must be at least 17"),
        ({"restart_weight": 2.0}, "restart_weight"),
        ({"rgb_range": 0.0}, "rgb_range"),
        ({"repeats": 0}, "repeats"),
        ({"norm": "each", "batch_size": 1, "patch": 32}, "--norm shared"),
    ):
        with pytest.raises(CounterpointError, match=words):
            PCLSRConfig(**settings)
    with pytest.raises(CounterpointError, match="did you mean edsr"):
        Experiment.resolve("pcl-sr", DATA, overrides={"network": "edrs"})


def test_learning_rates_follow_cycles_and_the_critic_s_stays() -> None:
    learner, _ = built(cycles=2, restart_weight=0.5, least_lr=0.0)
    learner.epochs = 8
    critic, network = learner.turns()
    rates = []
    for _ in range(8):
        rates.append(network.optimizers[0].param_groups[0]["lr"])
        for turn in (critic, network):
            turn.optimizers[0].step()
            turn.schedules[0].step()
    base = learner.config.lr * 8 / 256
    half = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert rates == pytest.approx([base * x for x in half] + [base * x / 2 for x in half])
    assert critic.optimizers[0].param_groups[0]["lr"] == pytest.approx(base)


def test_gradients_are_clipped_by_value() -> None:
    learner, _ = built(clip_value=0.5)
    (optimizer,) = learner.turns()[1].optimizers
    weight = learner.network.head[0].weight
    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    assert float(weight.grad.max()) == 0.5


# --- runs


def test_interrupted_in_either_stage_and_resumed_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    config = Experiment.resolve("pcl-sr", DATA, overrides=SMALL).config
    count, loss, stops = 0, room.PCLSR.loss, set[int]()

    def counted(self: Any, batch: Any) -> Any:
        nonlocal count
        if count in stops:
            stops.discard(count)
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(room.PCLSR, "loss", counted)
    options: dict[str, Any] = {"data": DATA, "seed": 3, "out": tmp_path, "say": lambda _: None}
    whole = training.train("pcl-sr", config, name="whole", **options)
    assert count == 10
    count, stops = 0, {2, 7}
    with pytest.raises(Interrupted):
        training.train("pcl-sr", config, name="halves", **options)
    with pytest.raises(Interrupted):
        training.resume(tmp_path / "halves", say=lambda _: None)
    state = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    halves = training.resume(tmp_path / "halves", say=lambda _: None)
    assert count == 10
    first = Experiment.resolve("pcl-sr", DATA, config=config)
    began = first.learner(first.task().facts, 3).network.state_dict()
    before = state["teachers"]["before"]["weights"]
    assert not torch.equal(before["head.0.weight"], began["head.0.weight"])  # that of the pre-trained network
    assert len(state["turns"]) == 2
    assert whole.metrics() == halves.metrics()
    mine = halves.load_weights()
    assert all(torch.equal(value, mine[name]) for name, value in whole.load_weights().items())
    assert all(name.startswith("network.") for name in mine)  # the critic is not kept


@pytest.mark.usefixtures("drawn")
@pytest.mark.slow
def test_from_the_command_line_on_a_folder_then_from_the_run_s_weights(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 255, (33, 41, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    words = ["train", "pcl-sr", "--data", f"imagefolder:{tmp_path / 'pictures'}?size=33", "--batch-size", "4"]
    words += ["--patch", "20", "--repeats", "1", "--critic-width", "4", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main([*words, "--pretrain-epochs", "1", "--name", "a"]) == 0
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "Restored pictures" in page
    assert "before the contrast" in page
    assert "sharpened, factor" in page
    assert cli.main([*words, "--weights", f"run:{tmp_path / 'a'}", "--name", "b"]) == 0
    first, second = (load_learner(tmp_path / name) for name in "ab")
    assert len(second.stages()) == 1  # no pre-training
    x = torch.rand(1, 3, 7, 9)
    apart = (first.restore(x) - second.restore(x)).abs().max()
    assert 0 < float(apart.detach()) < 0.05
    assert cli.main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "a.pt2")]) == 0
    program = torch.export.load(tmp_path / "a.pt2").module()
    pixels = torch.randint(0, 256, (2, 3, 12, 21), dtype=torch.uint8)
    torch.testing.assert_close(program(pixels), first.restore(pixels / 255).clamp(0, 1), rtol=0, atol=1e-5)
    assert cli.main([*words, "--weights", f"run:{tmp_path / 'a'}", "--scale", "4", "--name", "c"]) == 2
    assert "at scale 4" in capsys.readouterr().err
