"""MoCHi, the hallucinator and hard contrastive learning: their numbers and identities; additions over several bases."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from counterpoint import catalog, cli, training
from counterpoint import functional as fn
from counterpoint.commands.train import without_additions
from counterpoint.core.compared import Compared, Queued, Ways, pairs, predicted, views
from counterpoint.core.memory import Queue
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.base import Addition
from counterpoint.systems.images.hard_contrastive import Below, nearest, thresholds
from counterpoint.systems.images.mochi import mixed_losses
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig, flat, stored, with_settings

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mochi.npz")
SMALL = ["--encoder", "mlp-s", "--recipe", "digits-plain", "--batch-size", "64", "--epochs", "1", "--hidden", "16"]


def _rows(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


# --- MoCHi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_mochi_equals_the_reference(case: int, dtype: torch.dtype, rtol: float) -> None:
    at = {
        k.split("/", 1)[1]: torch.from_numpy(np.asarray(PARITY[k]))
        for k in PARITY.files
        if k.startswith(f"case{case}/")
    }
    query = at["in/query"].to(dtype).requires_grad_()
    queue = at["in/queue"].to(dtype)
    hard = fn.hardest(query, queue, int(at["param/n_hard"]), at["in/queue_mask"])
    assert torch.equal(hard, at["out/hard_index"])
    logits = fn.mochi_logits(
        query,
        at["in/key"].to(dtype),
        queue,
        at["in/pair_i"],
        at["in/pair_j"],
        at["in/alpha"].to(dtype),
        at["in/single"],
        at["in/beta"].to(dtype),
        float(at["param/temperature"]),
        at["in/queue_mask"],
    )
    loss = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    loss.backward()
    torch.testing.assert_close(logits.detach().double(), at["out/logits"], rtol=rtol, atol=rtol * 10)
    torch.testing.assert_close(loss.detach().double(), at["out/loss"].double(), rtol=rtol, atol=0)
    assert query.grad is not None
    torch.testing.assert_close(query.grad.double(), at["grad/query"], rtol=rtol, atol=rtol)


def test_a_mixture_with_the_query_is_harder_than_its_parent() -> None:
    query, queue = _rows(20, 5), _rows(30, 5, seed=1)
    single = torch.randint(30, (20, 7), generator=torch.Generator().manual_seed(0))
    beta = 0.5 * torch.rand(20, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    none = torch.zeros(20, 0, dtype=torch.long)
    logits = fn.mochi_logits(query, query, queue, none, none, none.double(), single, beta, 1.0)
    c = (query @ queue.T).gather(1, single)
    made = logits[:, 31:]
    assert bool((made >= c - 1e-12).all())
    torch.testing.assert_close(
        made, (beta + (1 - beta) * c) / (beta**2 + (1 - beta) ** 2 + 2 * beta * (1 - beta) * c).sqrt()
    )


@pytest.mark.parametrize("held", [True, False])
def test_losses_without_vectors_are_those_of_the_vectors(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not held:
        monkeypatch.setattr("counterpoint.core.compared.WHOLE", 0)
        monkeypatch.setattr("counterpoint.systems.images.mochi.GATHERED", 2 * 6 * 6)  # two anchors at a time
    g = torch.Generator().manual_seed(0)
    query, key, queue = _rows(5, 6).requires_grad_(), _rows(5, 6, seed=1), _rows(40, 6, seed=2)
    random = torch.rand(5, 9, 3, generator=g, dtype=torch.float64)
    (way,) = Compared(query, key, Queued(queue), 0.2).directions()
    found = mixed_losses(way, 0.2, random, 8, 6)
    hard = (query.detach() @ queue.T).topk(8, dim=1).indices
    at = (random[..., :2] * 8).long()
    one, other = hard.gather(1, at[..., 0]), hard.gather(1, at[..., 1])
    logits = fn.mochi_logits(
        query, key, queue, one[:, :6], other[:, :6], random[:, :6, 2], one[:, 6:], random[:, 6:, 2] / 2, 0.2
    )
    losses = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(found.losses, losses)
    wanted = torch.autograd.grad(losses.sum(), query)[0]
    torch.testing.assert_close(torch.autograd.grad(found.losses.sum(), query)[0], wanted)
    assert torch.equal(found.first, logits[:, 0] > logits[:, 1:41].amax(1))
    assert torch.equal(found.first_of_all, logits[:, 0] > logits[:, 1:].amax(1))


def test_forbidden_keys_are_not_mixed() -> None:
    queue = _rows(6, 4)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, :4] = True
    assert fn.hardest(queue[:2], queue, 2, mask)[0].tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"1\.\.2"):
        fn.hardest(queue[:2], queue, 3, mask)
    with pytest.raises(ValueError, match="no keys"):
        fn.hardest(queue[:2], queue[:0], 1)


def test_opposite_parents_give_no_nan() -> None:
    queue = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    half = torch.full((1, 1), 0.5)
    none = torch.zeros(1, 0, dtype=torch.long)
    logits = fn.mochi_logits(
        queue[:1], queue[:1], queue, torch.tensor([[0]]), torch.tensor([[1]]), half, none, none.float()
    )
    assert logits.isfinite().all()


# --- hard contrastive -------------------------------------------------------------------------------------------------


def _similarities(n: int = 4, k: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    pos = torch.rand(n, generator=g, dtype=torch.float64).requires_grad_()
    neg = (2 * torch.rand(n, k, generator=g, dtype=torch.float64) - 1).requires_grad_()
    return pos, neg


def test_the_pull_is_the_sum_of_the_pushes() -> None:
    pos, neg = _similarities()
    pull, push = torch.autograd.grad(fn.contrastive(pos, neg, 0.3) * len(pos), (pos, neg))
    torch.testing.assert_close(pull, -push.sum(1))
    p = (torch.cat([pos[:, None], neg], 1) / 0.3).softmax(1)
    torch.testing.assert_close(push, p[:, 1:] / 0.3)
    torch.testing.assert_close(push / -pull[:, None], fn.penalty_distribution(neg, 0.3))


def test_entropy_of_the_pushes_rises_with_temperature() -> None:
    _, neg = _similarities(1)
    r = [fn.penalty_distribution(neg[0], t) for t in (0.05, 0.1, 0.5, 1.0, 100.0)]
    entropy = [-(x * x.log()).sum().item() for x in r]
    assert entropy == sorted(entropy)
    assert entropy[-1] == pytest.approx(math.log(9), abs=1e-4)


def test_contrastive_reaches_its_limits_in_the_temperature() -> None:
    pos, neg = _similarities()
    k = neg.shape[1]
    large = 1e4 * (fn.contrastive(pos, neg, 1e4) - math.log(1 + k))
    torch.testing.assert_close(large, (k / (1 + k) * fn.simple_contrastive(pos, neg)), atol=1e-4, rtol=0)
    small = 1e-3 * fn.contrastive(pos, neg, 1e-3)
    torch.testing.assert_close(small, (neg.amax(1) - pos).clamp(min=0).mean(), atol=1e-6, rtol=0)


def test_keeping_one_is_a_softplus_and_keeping_all_is_the_loss() -> None:
    pos, neg = _similarities()
    torch.testing.assert_close(fn.contrastive(pos, neg, 0.2, 0.01), F.softplus((neg.amax(1) - pos) / 0.2).mean())
    assert fn.contrastive(pos, neg, 0.2, 1.0).item() == fn.contrastive(pos, neg, 0.2).item()
    values = [fn.contrastive(pos, neg, 0.2, m / 9).item() for m in range(1, 10)]
    assert values == sorted(values)
    equal = torch.zeros(2), torch.zeros(2, 10)
    assert fn.contrastive(*equal, 0.1, 0.5).item() == pytest.approx(math.log(6))
    assert fn.contrastive(torch.ones(2), torch.zeros(2, 1), 0.5).item() == pytest.approx(0.126928, abs=1e-6)


def test_no_negative_or_no_share_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fn.contrastive(torch.zeros(2), torch.zeros(2, 0), 0.1)
    with pytest.raises(ValueError, match="keep_fraction"):
        fn.simple_contrastive(torch.zeros(2), torch.zeros(2, 3), keep_fraction=0.0)
    for loss in (lambda *x: fn.contrastive(*x, 0.1), fn.simple_contrastive):
        with pytest.raises(ValueError, match="only excluded negatives"):
            loss(torch.zeros(2), torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]))
        with pytest.raises(ValueError, match="no anchors"):
            loss(torch.zeros(0), torch.zeros(0, 3))


@pytest.mark.parametrize("weight", [None, 0.3])
def test_what_does_not_count_pushes_nothing_in_the_simple_loss_either(weight: float | None) -> None:
    pos, neg = _similarities()
    gone = torch.cat([neg, torch.full_like(neg[:, :2], -math.inf)], 1)
    torch.testing.assert_close(fn.simple_contrastive(pos, gone, weight), fn.simple_contrastive(pos, neg, weight))
    assert fn.contrastive(pos, gone, 0.2).item() == pytest.approx(fn.contrastive(pos, neg, 0.2).item())


def test_tolerance_is_the_mean_cosine_within_classes() -> None:
    x, labels = _rows(12, 3), torch.arange(12) % 3
    same = (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool)
    assert fn.tolerance(x, labels) == pytest.approx(float((x @ x.T)[same].mean()))
    assert fn.tolerance(np.ones((4, 1)), np.zeros(4, int)) == 1.0
    with pytest.raises(ValueError, match="two examples"):
        fn.tolerance(x, torch.arange(12))


@pytest.mark.parametrize("ways", [views, pairs, Queued(_rows(30, 4, seed=5), torch.arange(30) % 6)])
def test_the_kept_are_the_nearest_in_every_way_of_comparison(ways: Ways) -> None:
    made = Compared(_rows(5, 4), _rows(5, 4, seed=1), ways, 0.2, torch.arange(5))
    for way in made.directions(apart=True):
        found, parted = nearest(way, 0.5)
        for share in (0.1, 0.5, 1.0):
            torch.testing.assert_close(thresholds(way, share), nearest(way, share)[1])
        ((_, s),) = way.parts()
        losses = F.softplus(way.negatives(0.2, Below(parted / 0.2)) - way.positives(0.2))
        for i, row in enumerate(s):
            admitted = row[row > -math.inf]
            kept = admitted.topk(len(admitted) // 2).values
            assert int((found[i] >= 0).sum()) == len(kept)
            wanted = fn.contrastive((way.query[i] @ way.positive[i])[None], admitted[None], 0.2, 0.5)
            torch.testing.assert_close(losses[i], wanted)


# --- the hallucinator -------------------------------------------------------------------------------------------------


def test_extrapolation_moves_away_from_the_partner() -> None:
    z1, z2 = _rows(500, 16), _rows(500, 16, seed=1)
    c, last = (z1 * z2).sum(1), torch.full((500,), 2.0, dtype=torch.float64)
    for lam in (0.0, 0.3, 1.0, 5.0, 1e6):
        e = fn.extrapolate_positive(z1, z2, lam)
        found = F.cosine_similarity(e, z2)
        closed = ((1 + lam) * c - lam) / ((1 + lam) ** 2 + lam**2 - 2 * lam * (1 + lam) * c).sqrt()
        torch.testing.assert_close(found, closed)
        assert bool((found <= last + 1e-12).all())
        assert bool((e.norm(dim=1) >= 1 - 1e-12).all())
        last = found
    torch.testing.assert_close(last, -((1 - c) / 2).sqrt(), atol=2e-6, rtol=0)
    assert torch.equal(fn.extrapolate_positive(z1, z1, 0.7), z1)


def _learner(slug: str, **settings: object) -> tuple[object, object, object]:
    system = catalog.load_system(slug)
    small = {"encoder": "mlp-s", "recipe": "digits-plain", "batch_size": 16, "hidden": 8, "projection": 8, "epochs": 1}
    if "moco" in slug or slug == "mochi":
        small |= {"queue": 64}
    config = with_settings(system.config(), small | settings, slug)
    source = Experiment.resolve(system, "digits?size=8").source()
    task = Experiment.resolve(system, config=config).task(source)
    return system.learner(config, SimpleNamespace(**task.facts), 0), task, config


def _loss(slug: str, **settings: object) -> dict[str, torch.Tensor]:
    learner, task, _ = _learner(slug, **settings)
    from counterpoint.engine.loading import Position

    batch = next(iter(task.train_loader(0, Position())))
    prepared = learner.prepare(batch, torch.Generator().manual_seed(1))
    return learner.loss(prepared)


@pytest.mark.parametrize("base", ["simclr", "moco-v2", "simsiam"])
def test_neither_moved_nor_smoothed_it_is_the_base_twice(base: str) -> None:
    found = _loss(f"{base}+hallucinator", hallucinator={"reach": 0.0, "nonlinear": False})
    torch.testing.assert_close(found["loss"], 2 * found["base"], rtol=1e-4, atol=1e-5)


def test_the_smoothing_is_trained() -> None:
    learner, _task, _ = _learner("hallucinator")
    learner.epochs = learner.steps_per_epoch = 1
    optimizer = learner.turns()[0].optimizers[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in learner.parts["hallucinator"].parameters())


def test_extrapolated_pairs_share_less() -> None:
    found = _loss("simclr+hallucinator")
    assert found["extrapolated_cosine"] < found["pair_cosine"]


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["moco-v2+mochi", "simclr+mochi"])
def test_mixing_makes_the_task_harder(slug: str) -> None:
    off, on = (
        _loss(slug, mochi={"mixing_from": start, "hardest": 8, "mixed": 8, "mixed_query": 8}) for start in (5, 0)
    )
    assert on["loss"] > off["loss"]
    assert on["proxy_accuracy_mixed"] <= on["proxy_accuracy"] == off["proxy_accuracy"]


@pytest.mark.parametrize("base", ["simclr", "moco-v2"])
def test_switched_off_an_addition_is_the_base(base: str) -> None:
    plain = _loss(base)["loss"]
    for addition, off in (("hard-contrastive", {"keep_fraction": 1.0}), ("dcl", {"decoupled": False})):
        assert torch.equal(_loss(f"{base}+{addition}", **{addition: off})["loss"], plain)


def test_additions_stack_in_their_order() -> None:
    found = _loss("simclr+hard-contrastive+hallucinator", **{"hard-contrastive.keep_fraction": 0.5})
    assert found["loss"].isfinite()
    assert found["base"] < _loss("simclr+hallucinator")["base"]  # fewer negatives


def test_compositions_that_do_not_fit_raise_an_error() -> None:
    for slug, said in (
        ("byol+mochi", "does not go over byol"),
        ("simclr+moco-v2", "it is no addition"),
        ("simclr+mochi+mochi", "already"),
        ("simclr+mochi+dcl", "leave mochi of simclr.mochi without effect"),
        ("simclr+hallucinator+isogclr", "leave hallucinator"),
        ("simclr+mochl", "mochi"),
    ):
        with pytest.raises(CounterpointError, match=said):
            catalog.load_system(slug)


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        (["moco-v2", "--with", "mochi", "--queue", "128", "--mochi.mixing-from", "0"], "moco-v2+mochi"),
        (["simclr", "--with", "dcl", "hallucinator"], "simclr+dcl+hallucinator"),
        (["mochi", "--queue", "128"], "mochi"),
    ],
)
def test_with_composes_systems_on_the_command_line(words: list[str], slug: str, tmp_path: Path) -> None:
    assert (
        cli.main(
            [
                "train",
                *words,
                "--data",
                "digits?size=8&train=320&held_out=0.05&valid=0.05",
                *SMALL,
                "--out",
                str(tmp_path),
                "--name",
                "r",
            ]
        )
        == 0
    )
    run = Run.open(tmp_path / "r")
    assert run.slug == slug
    assert training.evaluate(run.path)["knn_accuracy"] == pytest.approx(run.metrics()[-1]["test/knn_accuracy"])


@pytest.mark.parametrize("addition", ["hard-contrastive", "mochi", "hallucinator", "dcl"])
def test_clip_with_an_addition_trains(addition: str, tmp_path: Path) -> None:
    words = [
        "train",
        "clip",
        "--with",
        addition,
        "--data",
        "digit-captions?train=128",
        "--epochs",
        "1",
        "--batch-size",
        "64",
    ]
    assert cli.main([*words, "--image-encoder", "conv-s", "--out", str(tmp_path), "--name", "r"]) == 0


def test_with_without_a_system_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--with", "mochi"]) == 2
    assert "needs a system" in capsys.readouterr().err
    for words in (["simclr", "--with"], ["simclr", "--with", "--epochs", "1"], ["simclr", "--with="]):
        assert cli.main(["train", *words]) == 2
        assert "needs the name of an addition" in capsys.readouterr().err


def test_an_owned_queue_knows_whose_its_keys_are() -> None:
    queue = Queue(4, 2, owned=True)
    queue.write(torch.eye(2), torch.tensor([7, 3]))
    assert queue.owner.tolist() == [7, 3, -1, -1]
    with pytest.raises(ValueError, match="owned"):
        queue.write(torch.eye(2))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("slug", ["isogclr", "mcl", "mochi", "simclr+hallucinator"])
def test_interrupted_and_resumed_it_ends_the_same(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"encoder": "mlp-s", "recipe": "digits-plain", "batch_size": 40, "hidden": 8, "projection": 8, "epochs": 2}
    small |= {"queue": 80, "mochi.mixing_from": 0} if slug == "mochi" else {}
    small |= {"mcl.stages": 1, "mcl.clusters": 2} if slug == "mcl" else {}
    config = catalog.load_system(slug).config(**small)
    quiet = {"data": "digits?size=8&train=120&held_out=0.05&valid=0.05", "out": tmp_path, "say": lambda _: None}
    one = training.train(slug, config, name="whole", **quiet).load_weights()

    def stop(self: Learner) -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            raise RuntimeError("the lights go out")

    for at in (3, 5):
        steps, run = 0, tmp_path / f"stopped-{at}"
        with monkeypatch.context() as m:
            m.setattr(Learner, "end_step", stop)
            with pytest.raises(RuntimeError, match="lights"):
                training.train(slug, config, name=run.name, loop=Loop(checkpoint_minutes=0.0), **quiet)
        two = training.resume(run, say=lambda _: None).load_weights()
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=f"{name}, stopped in step {at}")


def _never(compared: Compared) -> Losses:
    pytest.fail("the base's loss was asked for")


def test_dcl_over_a_queue_and_over_pairs_leaves_the_positive_out() -> None:
    learner, _, _ = _learner("moco-v2+dcl")
    part, none = learner.parts["dcl"], Step({})
    query, key, queue = _rows(5, 6), _rows(5, 6, seed=1), _rows(20, 6, seed=2)
    found = part.loss(Compared(query, key, Queued(queue), 0.2), none, below=_never)["loss"]
    positive = (query * key).sum(1) / 0.2
    torch.testing.assert_close(found, ((query @ queue.T / 0.2).logsumexp(1) - positive).mean())
    found = part.loss(Compared(query, key, pairs, 0.2), none, below=_never)["loss"]
    s = (query @ key.T / 0.2).masked_fill(torch.eye(5, dtype=torch.bool), -math.inf)
    torch.testing.assert_close(found, ((s.logsumexp(1) + s.logsumexp(0)) / 2 - positive).mean())


def test_a_collapse_raises_an_error(tmp_path: Path) -> None:
    learner, task, config = _learner("hard-contrastive")
    learner.encoder.layer2[1].weight.data.zero_()
    learner.projector[-1].weight.data.zero_()
    config.lr = 0.0
    from counterpoint.engine.fit import fit

    with pytest.raises(CounterpointError, match="nearly the same"):
        fit(learner, task, bar=False)


def test_evaluation_does_not_make_the_training_data_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    words = [
        "adainf",
        "--adainf.generated",
        "mixture",
        "--adainf.generated-count",
        "80",
        "--data",
        "digits?size=8&train=100&held_out=0.05&valid=0.05",
        *SMALL,
    ]
    assert cli.main(["train", *words, "--out", str(tmp_path), "--name", "r"]) == 0
    monkeypatch.setattr("counterpoint.systems.images.adainf.generated_images", lambda *a: pytest.fail("made again"))
    run = Run.open(tmp_path / "r")
    assert training.evaluate(run.path)["knn_accuracy"] == pytest.approx(run.metrics()[-1]["test/knn_accuracy"])


def test_what_a_system_changed_of_the_data_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (8, 8), (80 * n, 0, 0)).save(folder / f"{n}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    words = [
        "adainf",
        "--adainf.generated",
        str(folder),
        "--data",
        "digits?size=8&train=100&held_out=0.05&valid=0.05",
        *SMALL,
    ]
    assert cli.main(["train", *words, "--out", str(tmp_path), "--name", "r"]) == 0
    said = capsys.readouterr().out
    assert "bad.png" in said
    assert "3 generated images" in said


@pytest.mark.parametrize(
    ("words", "rest", "additions"),
    [
        ("moco-v2 --with mochi hallucinator --epochs 2", "moco-v2 --epochs 2", ["mochi", "hallucinator"]),
        ("--with mochi moco-v2", "moco-v2", ["mochi"]),
        ("moco-v2 --with=mochi --with dcl", "moco-v2", ["mochi", "dcl"]),
        ("moco-v2 --with mochl", "moco-v2", ["mochl"]),  # the catalogue says what it may have meant
        ("mochi --epochs 2", "mochi --epochs 2", []),
    ],
)
def test_words_after_with_name_additions(words: str, rest: str, additions: list[str]) -> None:
    assert without_additions(words.split()) == (rest.split(), additions)


def test_logits_and_the_hardest_refuse_what_does_not_fit() -> None:
    query, queue = _rows(2, 3), _rows(4, 3, seed=1)
    none, nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.float64)
    one, half = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 0.5, dtype=torch.float64)
    good = {
        "query": query, "key": query, "queue": queue, "pair_i": one, "pair_j": one, "alpha": half, "single": none,
        "beta": nothing,
    }  # fmt: skip
    assert fn.mochi_logits(**good).shape == (2, 6)
    for wrong, said in (
        ({"queue": queue[:0]}, "hold a key"),
        ({"queue": queue[:, :2]}, "queue must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"key": query[:1]}, "query and key"),
        ({"pair_j": none}, "pair_i, pair_j, alpha"),
        ({"pair_i": one - 1}, r"pair_i must lie in 0\.\.3"),
        ({"single": one + 4, "beta": half}, r"single must lie in 0\.\.3"),
        ({"mask": torch.zeros(1, 4, dtype=torch.bool)}, "mask must be"),
    ):
        with pytest.raises(ValueError, match=said):
            fn.mochi_logits(**(good | wrong))
    with pytest.raises(ValueError, match="mask must be"):
        fn.hardest(query, queue, 2, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        fn.hardest(query * math.nan, queue, 2)


def test_a_reach_is_one_for_each_row() -> None:
    z = _rows(3, 4)
    lam = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.equal(fn.extrapolate_positive(z, z.flip(0), lam), fn.extrapolate_positive(z, z.flip(0), lam[:, None]))
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        fn.extrapolate_positive(z, z.flip(0), torch.ones(2))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_settings_of_parts_are_read_changed_and_stored_by_name() -> None:
    system = catalog.load_system("moco-v2+mochi")
    config = with_settings(system.config(), {"lr": 0.1, "mochi.hardest": 64, "mochi": {"mixed": 3}}, system.slug)
    assert (config.lr, config.parts["mochi"].hardest, config.parts["mochi"].mixed) == (0.1, 64, 3)
    assert flat(config)["mochi.hardest"] == 64
    assert stored(config)["mochi"]["hardest"] == 64
    assert with_settings(system.config(), stored(config), system.slug) == config
    assert replace(config, lr=0.2).parts == config.parts
    assert system.config().parts["mochi"].hardest == 1024  # the paper's stay


def test_a_setting_that_is_not_there_is_refused_by_name() -> None:
    config = catalog.load_system("moco-v2+mochi").config()
    for name, said in (
        ("dcl.decoupled", r"no part dcl, so there is no setting dcl\.decoupled; its parts: mochi"),
        ("hardest", r"no setting hardest; did you mean mochi\.hardest"),
        ("mochi.hardst", r"no setting mochi\.hardst; did you mean mochi\.hardest"),
        ("tmperature", "no setting tmperature; did you mean temperature"),
    ):
        with pytest.raises(CounterpointError, match=said):
            with_settings(config, {name: 1}, "moco-v2+mochi")
    with pytest.raises(CounterpointError, match=r"no part mochi.*its parts: none"):
        with_settings(catalog.load_system("moco-v2").config(), {"mochi.hardest": 1}, "moco-v2")
    with pytest.raises(CounterpointError, match="hardest must be at least 1"):
        with_settings(config, {"mochi.hardest": 0}, "moco-v2+mochi")


class _Recorded(Part):
    """Adds 1 to the loss below and writes down when it is asked."""

    asked: ClassVar[list[tuple[str, object]]] = []

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"number": torch.rand(rows, generator=generator)}

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        self.asked.append((type(self.config).__name__, step.drawn["number"]))
        found = below(compared)
        return found | {"loss": found["loss"] + 1}


@dataclass
class _FirstConfig(PartConfig):
    """Settings of nothing."""


@dataclass
class _SecondConfig(PartConfig):
    """Settings of nothing."""


def test_parts_stand_over_each_other_in_the_order_of_the_name() -> None:
    first = Addition("first", "simclr", _FirstConfig, part=_Recorded, fits=(views,), loss="over")
    second = Addition("second", "simclr", _SecondConfig, part=_Recorded, fits=(views,), loss="over")
    system = second.onto(first.onto(catalog.load_system("simclr")))
    assert system.slug == "simclr+first+second"
    config = system.config(encoder="mlp-s", hidden=8, projection=8)
    learner = system.learner(config, SimpleNamespace(size=8, channels=3, examples=50), 0)
    assert list(learner.parts) == ["first", "second"]
    plain = catalog.load_system("simclr").learner(config, SimpleNamespace(size=8, channels=3, examples=50), 0)
    image = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"image": image, "index": torch.arange(6)}
    _Recorded.asked.clear()
    losses = [one.loss(one.prepare(batch, torch.Generator().manual_seed(1)))["loss"] for one in (learner, plain)]
    assert losses[0] == losses[1] + 2
    (outer, later), (inner, earlier) = _Recorded.asked
    assert (outer, inner) == ("_SecondConfig", "_FirstConfig")
    assert not torch.equal(earlier, later)  # each draws numbers of its own


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("dcl", "dcl.dcl"),
        ("mochi", "mochi.mixed_losses"),
        ("hard-contrastive", "hard_contrastive.hard_losses"),
        ("hallucinator", "hallucinator.extrapolate_positive"),
        ("isogclr", "isogclr._views"),
    ],
)
def test_the_function_that_is_checked_is_the_one_that_trains(
    slug: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = f"counterpoint.systems.images.{name}".rsplit(".", 1)
    real, calls = getattr(importlib.import_module(module), function), []
    monkeypatch.setattr(f"{module}.{function}", lambda *args, **named: calls.append(1) or real(*args, **named))
    assert _loss(slug)["loss"].requires_grad
    assert calls


def test_a_comparison_without_negatives_has_empty_banks() -> None:
    query, key = _rows(5, 4), 3 * _rows(5, 4, seed=1)
    one, two = Compared(query, key, predicted).directions()
    assert len(one.bank) == len(two.bank) == 0
    assert one.positive is key
    assert two.query is key  # as long as it was
    moved = Compared(query, key, predicted, targets=(query + 1, key + 1)).directions()
    assert torch.equal(moved[0].positive, key + 1)
    assert torch.equal(moved[1].positive, query + 1)


def test_own_older_keys_are_left_out_where_a_part_asks_for_it() -> None:
    query, queue, owner = _rows(2, 4), _rows(3, 4, seed=1), torch.tensor([7, -1, 9])
    compared = Compared(query, query, Queued(queue, owner), index=torch.tensor([9, 3]))
    ((_, whole),) = compared.directions()[0].parts()
    ((_, apart),) = compared.directions(apart=True)[0].parts()
    assert bool(whole.isfinite().all())
    assert apart.isinf().tolist() == [[False, False, True], [False, False, False]]
