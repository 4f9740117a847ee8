"""AdaInf: the authors' numbers, what an inflated set is, generators, and training on one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint import catalog, cli, training
from counterpoint import functional as fn
from counterpoint.data import generated, load
from counterpoint.data.images import ArrayImages
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Position
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment

PARITY = np.load(Path(__file__).parents[1] / "parity" / "adainf.npz")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_loss_equals_the_authors(case, dtype, rtol):
    at = {
        k.split("/", 1)[1]: torch.from_numpy(np.asarray(PARITY[k]))
        for k in PARITY.files
        if k.startswith(f"case{case}/")
    }
    z = at["in/z"].to(dtype).requires_grad_()
    loss = fn.ntxent_by_index(z, at["in/index"], float(at["param/temperature"]))
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), at["out/loss"].double(), rtol=rtol, atol=0)
    torch.testing.assert_close(z.grad.double(), at["grad/z"], rtol=rtol, atol=rtol)


def test_inflation_equals_the_authors():
    at = {k.split("/", 1)[1]: PARITY[k] for k in PARITY.files if k.startswith("case2/")}
    found = fn.inflate(at["in/real"], at["in/generated"], int(at["param/replication"]), at["in/real_label"])
    assert np.array_equal(found.data.numpy(), at["out/inflated"])
    assert np.array_equal(found.label.numpy(), at["out/label"])
    with pytest.raises(ValueError, match="images of one shape"):
        fn.inflate(np.zeros((2, 3)), np.zeros((2, 4)), 1)


def test_two_views_each_are_nt_xent():
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    found = fn.ntxent_by_index(torch.cat([z1, z2]), torch.arange(6).repeat(2), 0.3)
    torch.testing.assert_close(found, fn.of("simclr").nt_xent(z1, z2, 0.3))
    with pytest.raises(ValueError, match="only view"):
        fn.ntxent_by_index(z1, torch.arange(6))


def test_many_views_are_sought_in_the_matrix(monkeypatch):
    g = torch.Generator().manual_seed(0)
    z, index = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.arange(30) % 7
    few = fn.ntxent_by_index(z, index, 0.3)
    monkeypatch.setattr("counterpoint.systems.images.adainf.FEW", 1)
    torch.testing.assert_close(fn.ntxent_by_index(z, index, 0.3), few)


def test_an_inflated_split_reads_what_inflate_writes():
    rng = np.random.default_rng(0)
    real, made = (rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8) for n in (3, 4))
    labels = np.array([2, 0, 1])
    split = generated.InflatedImages(ArrayImages(real, labels), ArrayImages(made), 2)
    whole = fn.inflate(real, made, 2, labels)
    order = rng.permutation(10)
    assert np.array_equal(split.images(order), whole.data.numpy()[order])
    assert np.array_equal(split.labels, whole.label.numpy())
    alone = generated.InflatedImages(ArrayImages(real), ArrayImages(made), 0)
    assert np.array_equal(alone.images(np.arange(4)), made)
    assert alone.labels is None


def test_a_mixture_looks_like_the_images_and_is_kept(tmp_path):
    data = load("digits?size=8&train=60&held_out=0.05&valid=0.05", task="views")
    one, _ = generated.generated_images(data, "mixture", 300)
    files = list((tmp_path / "cache").rglob("*.npz"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    again, _ = generated.generated_images(data, "mixture", 300)
    assert files[0].stat().st_mtime_ns == stamp
    drawn, real = one.images(np.arange(300)).astype(float), data.train.images(np.arange(60)).astype(float)
    assert np.array_equal(drawn, again.images(np.arange(300)))
    assert np.corrcoef(drawn.mean(0).ravel(), real.mean(0).ravel())[0, 1] > 0.95
    files[0].write_bytes(b"damaged")
    assert len(generated.generated_images(data, "mixture", 300)[0]) == 300


@pytest.mark.slow
def test_diffusion_learns_what_its_images_have_in_common():
    pytest.importorskip("diffusers", reason="the extra [generation] is not installed")
    real = np.zeros((8, 8, 8, 3), np.uint8)
    real[:, :, 4:] = 255  # all of them: the left half black, the right half white

    def drawn(steps: int) -> np.ndarray:
        return generated.diffusion(real, 20, steps=steps, width=8, rate=5e-3, bar=False).astype(float)

    made, untrained = drawn(150), drawn(1)
    assert made.shape == (20, 8, 8, 3)
    assert abs(untrained[:, :, 4:].mean() - untrained[:, :, :4].mean()) < 3
    assert made[:, :, 4:].mean() - made[:, :, :4].mean() > 8
    assert np.array_equal(drawn(1), untrained)
    with pytest.raises(DataError, match="multiple of 4"):
        generated.diffusion(np.zeros((2, 9, 9, 3), np.uint8), 1, steps=1)
    with pytest.raises(CounterpointError, match="diverged"):
        generated.diffusion(real, 1, steps=3, width=8, rate=float("inf"), bar=False)


def test_generated_images_are_read_from_a_folder(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (20, 10), (80 * n, 0, 0)).save(folder / f"{n}.png")
    data = load("digits?size=8", task="views")
    split, _ = generated.generated_images(data, str(folder), 2)
    assert split.images(np.arange(2)).shape == (2, 8, 8, 3)
    for name, count, said in (("missing", 1, "no such folder"), ("made", 4, "has 3")):
        with pytest.raises(DataError, match=said):
            generated.generated_images(data, str(tmp_path / name), count)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        generated.generated_images(data, str(tmp_path / "empty"), 0)


def test_a_generator_needs_a_number():
    with pytest.raises(CounterpointError, match="generated_count must be at least 1"):
        generated.generated_images(load("digits?size=8", task="views"), "mixture", 0)


WORDS = [
    "--data",
    "digits?size=8&train=60&held_out=0.05&valid=0.05",
    "--encoder",
    "mlp-s",
    "--batch-size",
    "20",
    "--epochs",
    "2",
    "--adainf.generated",
    "mixture",
]


@pytest.mark.parametrize("base", [["adainf"], ["simsiam", "--with", "adainf"]])
def test_it_trains_as_many_steps_and_measures_real_images(base, tmp_path):
    words = ["train", *base, *WORDS, "--adainf.generated-count", "100", "--recipe", "digits-s0", "--hidden", "16"]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "r"]) == 0
    run = Run.open(tmp_path / "r")
    assert run.metrics()[-1]["step"] == 2 * 3
    assert run.facts()["real"] == 60


def test_copies_are_positives_on_small_sets():
    system = catalog.load_system("adainf")
    small = {
        "encoder": "mlp-s",
        "recipe": "digits-s0",
        "batch_size": 40,
        "hidden": 8,
        "projection": 4,
        "adainf.generated": "mixture",
    }
    losses = {}
    for copies in ("auto", "positives", "negatives"):
        config = system.config(
            **small, **{"adainf.generated_count": 10, "adainf.replication": 30, "adainf.copies": copies}
        )
        task = Experiment.resolve(system, "digits?size=8&train=60&held_out=0.05&valid=0.05", config=config).task()
        learner = system.learner(config, SimpleNamespace(**task.facts), 0)
        assert len(task.data.train) == 30 * 60 + 10
        assert len(task.data.bank) == task.data.epoch == 60
        batch = next(iter(task.train_loader(0, Position())))
        assert int(batch["index"].max()) >= 60
        losses[copies] = learner.loss(learner.prepare(batch, torch.Generator().manual_seed(0)))["loss"].item()
    assert losses["auto"] == losses["positives"] < losses["negatives"]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        fn.ntxent_by_index(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature)


def test_labels_and_types_must_fit():
    real, made = np.zeros((3, 2, 2, 3), np.uint8), np.zeros((4, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="real_label"):
        fn.inflate(real, made, 2, np.arange(5))
    with pytest.raises(ValueError, match="of one type"):
        fn.inflate(real, made.astype(np.float32), 2)


def test_a_batch_of_nothing_is_read_as_nothing():
    """Batches that were done before an interruption come as empty lists."""
    pictures = ArrayImages(np.zeros((3, 8, 8, 3), np.uint8))
    split = generated.InflatedImages(pictures, pictures, 2)
    assert split.images(np.empty(0, np.int64)).shape == (0, 8, 8, 3)


def test_interrupted_in_mid_epoch_it_ends_the_same(tmp_path, monkeypatch):
    words = {"encoder": "mlp-s", "recipe": "digits-s0", "batch_size": 20, "hidden": 8, "projection": 8, "epochs": 2}
    config = catalog.load_system("adainf").config(**words, adainf={"generated": "mixture", "generated_count": 50})
    quiet = {"data": "digits?size=8&train=60&held_out=0.05&valid=0.05", "out": tmp_path, "say": lambda _: None}
    whole = training.train("adainf", config, name="whole", **quiet).load_weights()
    steps = 0

    def stop(self):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise RuntimeError("the lights go out")

    with monkeypatch.context() as m:
        m.setattr(Learner, "end_step", stop)
        with pytest.raises(RuntimeError, match="lights"):
            training.train("adainf", config, name="halves", loop=Loop(checkpoint_minutes=0.0), **quiet)
    halves = training.resume(tmp_path / "halves", say=lambda _: None).load_weights()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_folder_with_pipes_and_hidden_files_is_no_trap(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "._a.png").write_bytes(b"what a system leaves beside it")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    split, notes = generated.generated_images(load("digits?size=8", task="views"), str(folder), 0)
    assert len(split) == 1
    (note,) = notes
    assert "2 of 3 files left out" in note
    assert "1 hidden" in note
    assert "1 no regular file" in note


def test_fewer_images_than_a_batch_raise_an_error(tmp_path, capsys):
    words = [
        "train",
        "adainf",
        *WORDS,
        "--adainf.generated-count",
        "200",
        "--batch-size",
        "100",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(words) == 2
    assert "60 training images an epoch, fewer than a batch of 100" in capsys.readouterr().err


def _made(slug: str, **settings):
    system = catalog.load_system(slug)
    small = {"encoder": "mlp-s", "recipe": "digits-s0", "batch_size": 20, "hidden": 8, "projection": 4}
    config = system.config(**small, adainf={"generated": "mixture", "generated_count": 10} | settings)
    task = Experiment.resolve(system, "digits?size=8&train=60&held_out=0.05&valid=0.05", config=config).task()
    return system.learner(config, SimpleNamespace(**task.facts), 0), task


def test_an_addition_below_keeps_its_effect():
    """The loss that takes copies for positives would replace what the addition below makes of the batch."""
    learner, task = _made("simclr+hallucinator+adainf")
    batch = next(iter(task.train_loader(0, Position())))
    assert "hallucinated" in learner.loss(learner.prepare(batch, torch.Generator().manual_seed(0)))
    for slug in ("simclr+dcl+adainf", "byol+adainf"):
        with pytest.raises(CounterpointError, match="over SimCLR alone"):
            _made(slug, copies="positives")


def test_what_is_generated_stays_in_the_cache(tmp_path):
    """A set's name may be a path, here one that leads upwards."""
    data = replace(
        load("digits?size=8&train=60&held_out=0.05&valid=0.05", task="views"), name="imagefolder:a/../../../../b"
    )
    generated.generated_images(data, "mixture", 5)
    (file,) = tmp_path.rglob("*.npz")
    assert file.parent == tmp_path / "cache" / "generated"
