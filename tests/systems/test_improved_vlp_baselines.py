"""CLIP-rocket and its four companions: the authors' numbers, the card's identities, the edges, views, training."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.core import assignment, kernel
from counterpoint.data import load
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment.improved_vlp_baselines import SYSTEM, Rocket, RocketConfig
from counterpoint.tasks.aligned import TASK
from counterpoint.views.text import STOP_WORDS

PARITY = np.load(Path(__file__).parents[1] / "parity" / "improved-vlp-baselines.npz")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(case: int, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"case{case}/{kind}/"
    return {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[key])) for key in PARITY if key.startswith(prefix)
    }


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("case", "extra"), [(0, None), (1, "barlip_loss"), (2, "siamlip_loss"), (3, "swalip_loss")])
@pytest.mark.parametrize("whole", [0, 1024])
def test_losses_and_gradients_equal_the_authors(case, extra, dtype, rtol, whole, monkeypatch):
    monkeypatch.setattr(assignment, "WHOLE", whole)
    x = {name: value.to(dtype).requires_grad_() for name, value in part(case, "in").items()}
    setting = {name: value.item() for name, value in part(case, "param").items()}
    expected = part(case, "out")

    def local(name: str) -> list[torch.Tensor]:
        return [x[f"{name}0"], x[f"{name}1"]]

    def both(name: str, end: str = "") -> list:
        sides = ("image", "text")
        return [x[f"{name}_{s}{end}"] for s in sides] + [local(f"{name}_{s}_local{end}") for s in sides]

    given = (x["z_image_global"], x["z_text_global"], local("h_image_local"), local("h_text_local"))
    scales = (setting["logit_scale"], setting["h_logit_scale"], setting["label_smoothing"])
    for name, term in fn.cl2l_terms(*given, *scales)._asdict().items():
        side, where = name.split("_")
        close(term.detach(), expected[f"clip_loss_{side}_{where}"], rtol)
    close(fn.cl2l_loss(*given, *scales).detach(), expected["clip_loss"], rtol)
    loss = fn.cl2l_loss(*given, *scales, reduction="sum" if setting["loss_is_sum"] else "mean")
    if extra == "barlip_loss":
        added = fn.barlip_loss(*both("v"))
    elif extra == "siamlip_loss":
        p, v = both("p"), both("v", "_momentum")
        added = fn.siamlip_loss(*p[:2], *v[:2], *p[2:], *v[2:])
    elif extra == "swalip_loss":
        added = fn.swalip_loss(*given[2:], setting["h_logit_scale"])
        unit = [F.normalize(views[0]) for views in given[2:]]
        close(fn.sinkhorn(unit[0] @ unit[1].T), expected["sinkhorn_image0_text0"], rtol)
    if extra:
        close(added.detach(), expected[extra], rtol)
        loss = loss + (0.2 if extra == "swalip_loss" else 1.0) * added
    close(loss.detach(), expected["loss"], rtol)
    loss.backward()
    gradients = part(case, "grad")
    for name, gradient in gradients.items():
        close(x[name].grad, gradient, rtol)
    assert all(value.grad is None for name, value in x.items() if name not in gradients)


# --------------------------------------------------------------------------------------------------- identities and edges


def test_without_strong_views_it_is_clip():
    a, b = draw(5, 4), draw(5, 4, seed=1)
    expected = fn.clip(F.normalize(a), F.normalize(b), torch.tensor(7.0, dtype=torch.float64).log())
    torch.testing.assert_close(fn.cl2l_loss(a, b, logit_scale=7.0), expected)
    torch.testing.assert_close(fn.cl2l_loss(a, b, logit_scale=7.0, reduction="sum"), 2 * expected)
    assert fn.cl2l_terms(a, b).image_local == 0


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_local_loss_is_smoothed_cross_entropy_over_all_pairs_of_views(monkeypatch, views):
    monkeypatch.setattr(kernel, "TILE", (3, 4))
    monkeypatch.setattr(kernel, "SMALL", 0)
    hs = [[draw(7, 4, seed=10 * side + n).requires_grad_() for n in range(views)] for side in range(2)]
    z = [draw(7, 4, seed=50 + side) for side in range(2)]
    terms = fn.cl2l_terms(*z, *hs, 1.0, 5.0, 0.2)
    target = torch.arange(7)
    image, text = (
        torch.stack(
            [F.cross_entropy(5 * F.normalize(a) @ F.normalize(b).T, target, label_smoothing=0.2) for a in x for b in y]
        ).mean()
        for x, y in (hs, hs[::-1])
    )
    torch.testing.assert_close(torch.stack([terms.image_local, terms.text_local]), torch.stack([image, text]))
    leaves = [h for side in hs for h in side]
    found, expected = (torch.autograd.grad(a + 2 * b, leaves) for a, b in (terms[2:], (image, text)))
    torch.testing.assert_close(found, expected)


def test_a_batch_of_one_has_its_exact_losses():
    one, other = draw(1, 4).requires_grad_(), draw(1, 4, seed=1)
    assert fn.cl2l_loss(one, other, [one], [other], label_smoothing=0.0).item() == pytest.approx(0, abs=1e-12)
    assert fn.swalip_loss([one, one], [other, other], 10.0).item() == pytest.approx(0, abs=1e-12)


def test_gradients_are_right_and_nan_stays_nan():
    x = [draw(4, 3, seed=n).requires_grad_() for n in range(4)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, c, d, s: fn.cl2l_loss(a, b, [c], [d], s, 2 * s), (*x, scale))
    assert fn.cl2l_loss(x[0] * torch.nan, x[1]).isnan()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.cl2l_loss(draw(2, 3), draw(2, 4)), "z_img and z_txt"),
        (
            lambda: fn.cl2l_loss(draw(2, 3), draw(2, 3), [draw(2, 3)]),
            "h_imgs and h_txts must have equal numbers of views",
        ),
        (lambda: fn.cl2l_loss(draw(2, 3), draw(2, 3), [draw(2, 3)], [draw(3, 3)]), "h_imgs and h_txts must be"),
        (lambda: fn.cl2l_loss(draw(2, 3), draw(2, 3), reduction="none"), "reduction"),
        (lambda: fn.cl2l_loss(draw(2, 3), draw(2, 3), label_smoothing=1.5), "label_smoothing"),
        (lambda: fn.cl2l_loss(draw(2, 3), draw(2, 3), logit_scale=0.0), "scale"),
        (lambda: fn.swalip_loss([draw(2, 3)], [draw(2, 3)], 1.0), "two views each"),
        (lambda: fn.swalip_loss([draw(2, 3)] * 2, [draw(3, 3)] * 2, 1.0), "h_imgs"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()


# ------------------------------------------------------------------------------------------------------------------- views


def test_texts_lose_their_stop_words_and_change_in_one_way():
    text = "a Red arrow on the wall of a house"
    content = ["Red", "arrow", "wall", "house"]
    assert {"a", "on", "the", "of"} <= STOP_WORDS
    weak = {fn.augment_text(text, torch.Generator().manual_seed(n), strong=False) for n in range(40)}
    assert weak == {text, " ".join(content)}
    kinds = {"same words": 0, "fewer": 0, "synonym": 0}
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        words = fn.augment_text(text, g, drop_stop_words=1.0, synonyms={"red": ["scarlet"]}).split()
        assert set(words) <= {*content, "scarlet"}
        kind = "synonym" if "scarlet" in words else "fewer" if len(words) < 4 else "same words"
        kinds[kind] += 1
    assert 80 < kinds["synonym"] < 160
    assert 5 < kinds["fewer"] < 60  # a fifth delete, and each word goes with probability 0.1
    once = [fn.augment_text(text, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert once[0] == once[1]


def test_texts_that_leave_little_to_change():
    for text in ("", "the of a", "arrow"):
        for seed in range(20):
            found = fn.augment_text(text, torch.Generator().manual_seed(seed))
            assert set(found.split()) <= set(text.split())
            assert bool(found) == bool(text)
    assert fn.augment_text("arrow", torch.Generator().manual_seed(0), share=1.0) == "arrow"


def learner(data: str = "digit-captions?train=64", **options) -> tuple[Rocket, TASK]:
    config = RocketConfig(**of_system("improved-vlp-baselines").setting | {"batch_size": 32} | options)
    task = TASK(load(data, task="aligned"), config)
    return Rocket(config, SimpleNamespace(**task.facts)), task


@pytest.mark.parametrize("views", ["handled", "small", "paper"])
def test_a_batch_has_a_weak_view_and_two_strong_ones(views):
    system, task = learner(image_views=views)
    batch = system.prepare(task._batches(task.data.train)[list(range(8))], torch.Generator().manual_seed(3))
    assert {name: len(made) for name, made in batch["views"].items()} == {"image": 3, "text": 3}
    assert {view.shape for view in batch["views"]["image"]} == {batch["inputs"]["image"].shape}


def test_an_empty_caption_stays_empty():
    system, _ = learner()
    empty = system.tokenizers["text"].encode(["", "the of a"], 32)
    weak, *strong = system.varied("text", empty, 2, slice(None), torch.Generator().manual_seed(0))
    for ids, mask in (weak, *strong):
        assert system.tokenizers["text"].decode(ids[0][mask[0]].tolist()) == ""


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("extra", ["none", "barlip", "siamlip", "byolip", "swalip"])
def test_each_companion_trains(extra):
    smoothing = 0.0 if extra == "swalip" else 0.1
    config = RocketConfig(
        **of_system("improved-vlp-baselines").setting
        | {"epochs": 4, "batch_size": 32, "evaluate_every": 4, "extra": extra, "label_smoothing": smoothing}
    )
    rows = Experiment.resolve(SYSTEM, config=config).run(0, source=load("digit-captions?train=128", task="aligned"))
    assert rows[-1]["train/contrast"] < rows[0]["train/contrast"]
    assert math.isfinite(rows[-1]["train/loss"])
    assert (f"train/{extra}" in rows[0]) == (extra != "none")
    for head in ("", "local_", "mixed_"):
        assert 0 <= rows[-1][f"test/{head}image_zero_shot"] <= 1


def test_the_momentum_copy_follows_and_scales_stay_in_their_bounds():
    system, _ = learner(extra="byolip", momentum_teacher=0.9)
    teacher = system.teachers["image"].module.encoder.layers[0].weight
    own = system.encoders["image"].layers[0].weight
    with torch.no_grad():
        own += 1.0
        system.log_scale.fill_(9.0)
        system.local_log_scale.fill_(-1.0)
    before = teacher.clone()
    system.end_step()
    torch.testing.assert_close(teacher, 0.9 * before + 0.1 * own)
    assert [round(scale.item(), 4) for scale in system.scales] == [100.0, 1.0]
    assert not teacher.requires_grad


def test_the_mixture_is_that_of_the_similarities():
    system, task = learner(mixture=0.3)
    batch = next(iter(task.evaluation_loader("test")))
    out = system.eval().predict(batch)
    z, h, mixed = (out[f"{name}embedding"] for name in ("", "local_", "mixed_"))
    expected = 0.3 * z["image"] @ z["text"].T + 0.7 * h["image"] @ h["text"].T
    torch.testing.assert_close(mixed["image"] @ mixed["text"].T, expected)


def test_without_a_separate_projector_there_is_one_scale_and_one_head():
    system, task = learner(separate_projector=False)
    assert system.local_log_scale is None
    assert torch.equal(*system.scales)
    batch = task._batches(task.data.train)[list(range(32))]
    losses = system.loss(system.prepare(batch, torch.Generator().manual_seed(0)))
    losses["loss"].backward()
    system.end_step()
    assert "local_embedding" not in system.predict(next(iter(task.evaluation_loader("test"))))


def test_dropout_is_for_strong_texts_alone():
    system, task = learner(towers="named", image_encoder="conv-s", text_dropout=0.5, extra="none")
    ids = task._batches(task.data.train)[list(range(4))]["inputs"]["text"]
    plain = system.features("text", ids)
    weak, *strong = system.view_features("text", [ids, ids, ids])
    torch.testing.assert_close(weak, plain)
    assert not torch.allclose(strong[0], plain)
    assert not torch.allclose(strong[0], strong[1])
    torch.testing.assert_close(system.features("text", ids), plain)
    assert system.encoders["text"] not in [module for module, _ in system.row_wise()]
    with pytest.raises(CounterpointError, match="text_dropout works in text-s only"):
        learner(text_dropout=0.5)


def test_settings_that_make_no_sense_are_refused():
    for options, names in (
        ({"extra": "swalip"}, "swalip needs two strong views"),
        ({"extra": "swalip", "label_smoothing": 0.0, "augmentations": 3}, "swalip needs two strong views"),
        ({"augmentations": -1}, "augmentations"),
        ({"mixture": 1.5}, "mixture"),
        ({"swalip_weight": -1.0}, "swalip_weight must be at least 0"),
        ({"text_dropout": 1.0}, "text_dropout"),
    ):
        with pytest.raises(CounterpointError, match=names):
            RocketConfig(**options)


@pytest.mark.usefixtures("drawn")
def test_from_the_command_line_on_icons_and_on_vectors(tmp_path):
    common = f"--epochs 2 --batch-size 32 --embedding 16 --local-hidden 32 --evaluate-every 2 --out {tmp_path}".split()
    for name, words in (
        ("icons", ["--data", "glyphs?train=96&test=40&size=32&styles=codicon", "--image-encoder", "conv-s"]),
        ("vectors", ["--data", "digit-halves?train=96&test=40", "--vector-noise", "0.5"]),
    ):
        assert cli.main(["train", "improved-vlp-baselines", *words, *common, "--name", name]) == 0
        run = Run.open(tmp_path / name)
        last = run.metrics()[-1]
        assert math.isfinite(last["train/loss"])
        assert last["test/mixed_mean_recall"] > 0
        assert training.load_learner(run).local_heads
