"""KRR-ST: the authors' numbers, identities, the pool and its ages, the start, resuming, export of the set, what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

import counterpoint as cp
from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.core import ridge as ridge_file
from counterpoint.core.world import leave
from counterpoint.data.distilled import read_set
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback
from counterpoint.engine.stepper import Stepper
from counterpoint.errors import CounterpointError, DataError, Interrupted
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import krr_st as file

PARITY = np.load(Path(__file__).parents[1] / "parity" / "krr-st.npz")
DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
TEACHER = (
    "fit:simclr?data=digits%3Fsize=8%26train=60%26held_out=0.05%26valid=0.05"
    "&encoder=mlp-s&recipe=none&epochs=1&batch_size=30&hidden=8&evaluate_every=9"
)
SMALL: dict[str, Any] = {
    "encoder": "mlp-s", "teacher": TEACHER, "recipe": "none", "pictures": 5, "pool": 2, "most_age": 3, "epochs": 2,
    "batch_size": 20, "pretrain_epochs": 4, "pretrain_batch": 3, "judges": 1, "judge_steps": 2, "bank": 30,
    "normalised_start": False, "standardise": False, "lr": 0.01,
}  # fmt: skip
WORDS = [
    word
    for name, value in SMALL.items()
    for flag in [name.replace("_", "-")]
    for word in ([f"--no-{flag}"] if value is False else [f"--{flag}", str(value)])
]


def draw(*shapes: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def by_hand(feat_syn: Tensor, target_syn: Tensor, feat_real: Tensor, target_real: Tensor, ridge: float) -> Tensor:
    """Compute the outer loss by the kernel's matrices and an explicit inverse."""
    h, x = (torch.cat([part, torch.ones(len(part), 1, dtype=part.dtype)], 1) for part in (feat_syn, feat_real))
    kernel = h @ h.T
    amount = ridge * kernel.detach().trace() * torch.eye(len(h), dtype=h.dtype)
    return (x @ h.T @ torch.linalg.inv(kernel + amount) @ target_syn - target_real).square().mean()


# --- the outer loss


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    def get(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(PARITY[f"case{case}/{name}"])).to(dtype)

    x, y = (get(f"in/{name}_syn").requires_grad_() for name in "xy")

    def features(images: Tensor) -> Tensor:
        return (images @ get("weight/W")).relu() if int(PARITY[f"case{case}/param/has_W"]) else images

    ridge = float(PARITY[f"case{case}/param/ridge"])
    loss = fn.krr_outer_loss(features(x), y, features(get("in/x_real")), get("in/y_real"), ridge)
    loss.backward()
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-9, 1e-12)
    for found, name in ((loss.detach(), "out/loss"), (x.grad, "grad/x_syn"), (y.grad, "grad/y_syn")):
        wanted = get(name)
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("cheap", [2**22, 0])
@pytest.mark.parametrize(("m", "d"), [(7, 3), (3, 7), (4, 3), (1, 5), (6, 8)])
def test_all_three_ways_equal_the_kernel_s_inverse_in_value_and_gradient(
    m: int, d: int, cheap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge_file, "CHEAP", cheap)
    four = draw((m, d), (m, 2), (9, d), (9, 2))
    pairs = []
    for loss in (fn.krr_outer_loss, by_hand):
        x, y = (part.clone().requires_grad_() for part in four[:2])
        value = loss(x, y, *four[2:], 1e-3)
        pairs.append([value.detach(), *torch.autograd.grad(value, (x, y))])
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("m", "d"), [(40, 60), (60, 20), (3, 60)])
def test_large_systems_in_float32_are_near_float64(m: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    four = draw((m, d), (m, 3), (30, d), (30, 3))
    wanted = fn.krr_outer_loss(*four)
    monkeypatch.setattr(ridge_file, "EXACT", 0)
    monkeypatch.setattr(ridge_file, "CHEAP", 0)
    found = fn.krr_outer_loss(*(part.float() for part in four))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)


def test_without_ridge_real_images_equal_to_the_set_s_are_predicted_exactly() -> None:
    x, y, wanted = draw((4, 5), (4, 3), (4, 3))
    torch.testing.assert_close(fn.krr_outer_loss(x, y, x, wanted, 0.0), (y - wanted).square().mean())


def test_zero_targets_predict_zero_and_a_rotation_changes_nothing() -> None:
    x, y, real, wanted = four = draw((6, 4), (6, 2), (8, 4), (8, 2))
    torch.testing.assert_close(fn.krr_outer_loss(x, torch.zeros_like(y), real, wanted), wanted.square().mean())
    q = torch.linalg.qr(draw((4, 4))[0]).Q
    torch.testing.assert_close(fn.krr_outer_loss(x @ q, y, real @ q, wanted), fn.krr_outer_loss(*four))


def test_the_trace_and_the_real_side_have_no_gradient() -> None:
    x, y, real, wanted = (part.requires_grad_() for part in draw((3, 4), (3, 2), (8, 4), (8, 2)))
    loss = fn.krr_outer_loss(x, y, real, wanted, 0.5)
    assert torch.autograd.grad(loss, (real, wanted), retain_graph=True, allow_unused=True) == (None, None)
    (found,) = torch.autograd.grad(loss, x)
    (fixed,) = torch.autograd.grad(by_hand(x, y, real, wanted, 0.5), x)
    torch.testing.assert_close(found, fixed)


def test_duplicates_and_zero_features_are_finite_and_one_image_is_accepted() -> None:
    x, y, real, wanted = draw((3, 4), (3, 2), (8, 4), (8, 2))
    twice = torch.cat([x, x])
    assert bool(fn.krr_outer_loss(twice.float(), torch.cat([y, y]).float(), real.float(), wanted.float()).isfinite())
    # Features of zeros leave the column of ones: the prediction is the mean target.
    zero = fn.krr_outer_loss(x * 0, y, real * 0, wanted, 1e-9)
    torch.testing.assert_close(zero, (y.mean(0) - wanted).square().mean(), rtol=1e-6, atol=0)
    assert bool(fn.krr_outer_loss(x[:1], y[:1], real, wanted).isfinite())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"feat_syn": torch.zeros(0, 4), "target_syn": torch.zeros(0, 2)}, "feat_syn is an empty set"),
        ({"feat_real": torch.zeros(0, 4), "target_real": torch.zeros(0, 2)}, "feat_real is an empty batch"),
        ({"target_syn": torch.zeros(2, 2)}, "feat_syn and target_syn need one row for each image"),
        ({"target_real": torch.zeros(5, 2)}, "feat_real and target_real need one row for each image"),
        ({"feat_real": torch.zeros(8, 5)}, "feat_syn and feat_real must have one width"),
        ({"target_syn": torch.zeros(3, 3)}, "target_syn and target_real must have one width"),
        ({"feat_syn": torch.zeros(3, 4, 1)}, "feat_syn must be a matrix"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"ridge": 0.0, "feat_syn": torch.zeros(3, 4)}, "ridge 0.0 leaves a singular system of 3 equations"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Any], said: str) -> None:
    names = ("feat_syn", "target_syn", "feat_real", "target_real")
    given = dict(zip(names, (part.float() for part in draw((3, 4), (3, 2), (8, 4), (8, 2))), strict=True))
    with pytest.raises(ValueError, match=said):
        fn.krr_outer_loss(**given | changed)


# --- the learner


def begun(seed: int = 0, **changes: Any) -> tuple[Any, Stepper]:
    """Return a learner at the beginning of its first stage, and its stepper."""
    experiment = Experiment.resolve("krr-st", DATA, overrides=SMALL | changes)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, seed)
    stepper = Stepper(learner, task, Loop())
    stepper.begin(torch.device("cpu"))
    stepper.enter(0)
    return learner, stepper


def steps(learner: Any, stepper: Stepper, many: int) -> list[dict[str, float]]:
    found = []
    for _ in range(many):
        batch = next(iter(stepper.loader))
        found.append({name: float(value) for name, value in stepper.step(batch).items()})
        learner.position.step += 1
        stepper.advance(per_step=True)
    return found


def test_training_calls_the_function_that_equals_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, stepper = begun()
    seen = []
    own = fn.krr_outer_loss

    def spied(*given: Any) -> Tensor:
        seen.append([part.detach().clone() for part in given[:4]])
        assert given[0].requires_grad
        assert given[1].requires_grad
        return own(*given)

    monkeypatch.setattr(file, "krr_outer_loss", spied)
    batch = stepper.prepared(next(iter(stepper.loader)))
    member = learner.pool[batch["member"]]
    found = learner.loss(batch)["loss"]
    assert member.training
    member.eval()
    ((syn, targets, real, wanted),) = seen
    torch.testing.assert_close(real, member.encoder(batch["views"][0]))  # in evaluation mode
    torch.testing.assert_close(syn, member.encoder(learner.synthetic.pictures))
    torch.testing.assert_close(wanted, learner.teacher({"image": batch["views"][0]})["feature"])
    torch.testing.assert_close(found.double(), by_hand(*(part.double() for part in seen[0]), 1e-6), rtol=1e-3, atol=0)
    assert torch.equal(targets, learner.synthetic.targets)
    learner.pool.zero_grad()  # of the steps before distillation
    found.backward()
    assert all(p.grad is None for p in learner.pool.parameters())


def test_the_set_starts_as_raw_images_with_the_teacher_s_features() -> None:
    learner, stepper = begun()
    images = stepper.survey.split("train").images(learner.origin.numpy())
    assert len(set(learner.origin.tolist())) == 5
    raw = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(learner.synthetic.pictures.detach(), raw)
    batch = stepper.survey.batch("train", learner.origin.numpy())
    torch.testing.assert_close(learner.synthetic.targets.detach(), learner.teacher(batch)["feature"])
    assert np.array_equal(learner.shown(), images)
    normal, _ = begun(normalised_start=True, standardise=True)
    torch.testing.assert_close(normal.synthetic.pictures.detach(), batch["image"])
    assert np.array_equal(normal.shown(), images)
    known = normal.known(stepper.survey, "train")
    torch.testing.assert_close(
        normal.wanted(stepper.survey.batch("train", range(60))["image"]).mean(0), known.mean(0) * 0, rtol=0, atol=1e-5
    )
    random, _ = begun(start_targets="random")
    assert not torch.allclose(random.synthetic.targets, learner.synthetic.targets)


def test_a_step_moves_the_set_and_the_drawn_network_alone() -> None:
    learner, stepper = begun(most_age=100)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    ages = learner.ages.clone()
    batch = next(iter(stepper.loader))
    drawn = stepper.prepared(batch)["member"]
    stepper.step(batch)
    moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    assert {"synthetic.pictures", "synthetic.targets"} <= moved
    assert {name.split(".")[1] for name in moved if name.startswith("pool.")} == {str(drawn)}
    assert not any(name.startswith(("encoder.", "projector.")) for name in moved)
    ages[drawn] += 1
    assert torch.equal(learner.ages, ages)


@pytest.mark.parametrize(("learn", "fixed"), [("targets", "pictures"), ("pictures", "targets")])
def test_images_or_targets_alone_are_learnt(learn: str, fixed: str) -> None:
    learner, stepper = begun(learn=learn)
    first = {name: value.clone() for name, value in learner.synthetic.state_dict().items()}
    steps(learner, stepper, 2)
    last = learner.synthetic.state_dict()
    assert not torch.equal(first[learn], last[learn])
    assert torch.equal(first[fixed], last[fixed])


@pytest.mark.parametrize("reset", [True, False])
def test_an_old_network_is_replaced_with_its_optimiser_and_its_age_is_set_back_on_demand(reset: bool) -> None:
    learner, stepper = begun(pool=1, most_age=3, reset_age=reset)
    learner.ages.fill_(3)
    weight = learner.pool[0].head.weight
    first, place = weight.detach().clone(), weight.data_ptr()
    assert weight in learner.inner.state
    (found,) = steps(learner, stepper, 1)
    assert found["pool_loss"] == 0
    assert weight.data_ptr() == place
    assert not torch.equal(weight, first)
    assert not learner.inner.state
    assert all(float(m.running_mean.abs().max()) == 0 for m in learner.pool.modules() if hasattr(m, "running_mean"))
    second = weight.detach().clone()
    steps(learner, stepper, 1)
    assert int(learner.ages) == (1 if reset else 3)
    assert bool(learner.inner.state) is reset
    assert not torch.equal(weight, second)
    steps(learner, stepper, 3)
    assert int(learner.ages) == (0 if reset else 3)


def test_the_rate_falls_linearly_and_networks_keep_theirs() -> None:
    learner, stepper = begun(lr=0.1, final_rate=0.5)
    rates = [stepper.rates()]
    for _ in range(learner.total_steps):
        steps(learner, stepper, 1)
        rates.append(stepper.rates())
    scale = 0.1 * 20 / 256
    assert [row["lr"] for row in rates] == pytest.approx([scale * (1 - 0.5 * n / 6) for n in range(7)])
    assert {row["lr/1"] for row in rates} == {0.1}


def test_the_pool_starts_at_random_ages_below_the_limit() -> None:
    learner, _ = begun(pool=6, most_age=4)
    assert set(learner.ages.tolist()) <= {1, 2, 3}
    assert len(set(learner.ages.tolist())) > 1
    tracked = [
        int(value) for name, value in learner.pool.state_dict().items() if name.endswith("layer1.1.num_batches_tracked")
    ]
    assert tracked == learner.ages.tolist()


def test_pre_training_takes_a_new_network_and_sees_each_image_once_a_pass() -> None:
    learner, stepper = begun()
    old = learner.encoder
    learner.position.next_stage()
    stepper.enter(1)
    assert learner.encoder is not old
    assert len(learner.pool) == 0
    seen = []
    for number in range(4):
        learner.position.step = number
        seen.append(stepper.prepared({})["rows"].tolist())
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(5))
    assert seen[:2] != seen[2:]
    kept = {name: value.clone() for name, value in learner.synthetic.state_dict().items()}
    learner.position.step = 0
    stepper.step({})
    assert all(torch.equal(value, kept[name]) for name, value in learner.synthetic.state_dict().items())


def test_learning_lowers_the_outer_loss_of_held_out_images() -> None:
    rows = {}
    for learn in ("both", "none"):
        changes = {"learn": learn, "epochs": 30, "lr": 0.2, "standardise": True, "most_age": 20, "judge_steps": 20}
        rows[learn] = Experiment.resolve("krr-st", DATA, overrides=SMALL | changes).run(0)[-1]["valid/krr_mse"]
    assert rows["both"] < 0.8 * rows["none"]


# --- runs


class Stopper(Callback):
    """A callback that interrupts a fit after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, learner: Any, batch: Any, losses: Any) -> None:
        self.after -= 1
        if not self.after:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_interrupted_in_and_between_its_stages_ends_as_an_uninterrupted_one(
    tmp_path: Path, undrawn: None
) -> None:
    config = Experiment.resolve("krr-st", DATA, overrides=SMALL).config
    more: dict[str, Any] = {"say": lambda _: None, "bar": False}
    whole = training.train("krr-st", config, name="whole", data=DATA, out=tmp_path, **more)
    place = tmp_path / "parts"
    with pytest.raises(Interrupted):
        training.train("krr-st", config, name="parts", data=DATA, out=tmp_path, callbacks=[Stopper(2)], **more)
    seen = []
    for after in (2, 2, 3):  # in distillation, at its last step, in pre-training
        with pytest.raises(Interrupted):
            training.resume(place, callbacks=[Stopper(after)], **more)
        state = torch.load(place / "last.ckpt", weights_only=True)["position"]
        seen.append((state["stage"], state["step"]))
    assert seen == [(0, 4), (0, 6), (1, 3)]
    parts = training.resume(place, **more)
    assert whole.metrics() == parts.metrics()
    mine = parts.load_weights()
    assert all(torch.equal(value, mine[name]) for name, value in whole.load_weights().items())


@pytest.mark.usefixtures("drawn")
def test_a_run_shows_and_exports_its_set_from_which_another_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "krr-st", "--data", DATA, *WORDS, "--out", str(tmp_path), "--name", "r"]) == 0
    run = Run.open(tmp_path / "r")
    assert {"valid/krr_mse", "test/knn_accuracy", "train/pretrain_loss"} <= set(run.metrics()[-1])
    assert {"train/loss", "train/pool_loss"} <= set(run.metrics()[0])
    assert "Synthetic images" in (run.path / "report.html").read_text()
    assert not any(name.startswith("pool.") for name in run.load_weights())
    assert training.evaluate(run.path)["krr_mse"] == pytest.approx(run.metrics()[-1]["test/krr_mse"])
    learner: Any = cp.load(run.path).learner
    assert cli.main(["export", str(run.path), "--format", "set", "--out", str(tmp_path / "set")]) == 0
    assert "5 pictures" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / "0004.png")), learner.shown()[4])
    cp.load(run.path).export(tmp_path / "set.npz")
    for place in (tmp_path / "set", tmp_path / "set.npz"):
        held = read_set(place, 8)
        assert np.array_equal(held.pictures, learner.distilled().pictures)
        assert np.array_equal(held.targets, learner.distilled().targets)
    cp.load(run.path).export(tmp_path / "encoder.pt2")
    other, _ = begun(start=str(tmp_path / "set"), learn="none", encoder="conv-fine", pictures=99)
    assert torch.equal(other.synthetic.pictures, learner.synthetic.pictures)
    assert other.figures(other.survey)["Synthetic images"]["rows"][0]["cells"][0]["text"] == "distilled"
    assert cli.main(["train", "--continue", str(run.path), "--out", str(tmp_path), "--name", "s"]) == 0
    for place, said in ((tmp_path / "no.npz", "holds no distilled set"), (tmp_path / "a.txt", "ends in .npz")):
        with pytest.raises(DataError, match=said):
            begun(start=str(place))
    with pytest.raises(DataError, match="pictures of shape"):
        read_set(tmp_path / "set", 9)
    np.savez(tmp_path / "bad.npz", pictures=np.zeros((2, 3, 8, 8)), targets=np.full((2, 64), np.nan))
    with pytest.raises(DataError, match="targets hold NaN"):
        begun(start=str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "wide.npz", pictures=np.zeros((2, 3, 8, 8)), targets=np.zeros((2, 9)))
    with pytest.raises(CounterpointError, match="gives 64 features, and the set to start from has targets of 9"):
        begun(start=str(tmp_path / "wide.npz"))
    with pytest.raises(CounterpointError, match="goes into a folder"):
        cp.load(run.path).export(tmp_path / "set.csv", format="set")


def test_a_folder_of_images_is_distilled_by_the_features_of_a_run(tmp_path: Path, undrawn: None) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "mine" / f"{number}.png")
    data = f"imagefolder:{tmp_path / 'mine'}?size=8"
    config = training.default_config("simclr", data)
    given = {"epochs": 1, "batch_size": 10, "hidden": 8, "encoder": "mlp-s", "recipe": "none"}
    config = Experiment.resolve("simclr", data, overrides=given).config
    training.train("simclr", config, data=data, out=tmp_path, name="t", say=lambda _: None, bar=False)
    words = [*WORDS, "--teacher", f"run:{tmp_path / 't'}", "--no-reset-age"]
    assert cli.main(["train", "krr-st", "--data", data, *words, "--out", str(tmp_path), "--name", "r"]) == 0
    assert (tmp_path / "r" / "model.safetensors").is_file()
    with pytest.raises(CounterpointError, match=r"trained on images of 8 pixels, this data has 9: give .* size=8"):
        Experiment.resolve(
            "krr-st",
            "digits?size=9&train=60&held_out=0.05&valid=0.05",
            overrides=SMALL | {"teacher": f"run:{tmp_path / 't'}"},
        ).run(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pictures": 61}, "60 training images, fewer than 61 synthetic ones; lower --pictures"),
        ({"pictures": 1}, "--pictures 1 is too few for this network"),
        ({"most_age": 1}, "most_age must be at least 2"),
        ({"ridge": 0.0}, "ridge must be > 0"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"judges": -1}, "judges must not be negative"),
        ({"learn": "all"}, "learn"),
        ({"start_targets": "zero"}, "unknown start_targets 'zero'"),
        ({"teacher": "data"}, "features of changed images need a network"),
        ({"teacher": "nothing"}, "teacher"),
        ({"extractor": "nothing"}, "image encoder"),
        ({"encoder": "convnet", "extractor": "mlp-s", "batch_size": 61}, "fewer than a batch"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CounterpointError, match=said):
        begun(**changes)


def test_features_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, stepper = begun()
    for part in learner.teacher.module.parameters():
        part.fill_(torch.nan)
    with pytest.raises(CounterpointError, match="gives features that are NaN or infinite"):
        stepper.enter(0)


def of_two(rank: int, folder: str) -> None:
    """Compare the loss of a share's batch with one process's, then train as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y, real, wanted = draw((3, 4), (3, 2), (5, 4), (5, 2))
    pairs = []
    for share, group in ((slice(rank, None, 2), "world"), (slice(None), None)):
        own = x.clone().requires_grad_()
        loss = fn.krr_outer_loss(own, y, real[share], wanted[share], group=group)
        loss.backward()
        dist.all_reduce(own.grad)
        pairs.append((loss.detach(), own.grad))
    torch.testing.assert_close(*pairs)
    experiment = Experiment.resolve("krr-st", DATA, overrides=SMALL | {"pretrain_batch": 5})
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    fit(learner, task, bar=False)
    if rank == 0:
        torch.save(learner.state_dict(), f"{folder}/weights.pt")
    leave()


@pytest.mark.slow
def test_two_processes_learn_the_set_and_the_encoder_of_one(tmp_path: Path) -> None:
    experiment = Experiment.resolve("krr-st", DATA, overrides=SMALL | {"pretrain_batch": 5})
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    fit(learner, task, bar=False)
    mp.start_processes(of_two, (str(tmp_path),), nprocs=2, start_method="forkserver")
    both = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(
            both[name], value, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )
