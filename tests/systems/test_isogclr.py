"""iSogCLR: the authors' sequences of steps, the meaning of rho, the edges, and what becomes of its state."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog, cli, training
from counterpoint import functional as fn
from counterpoint.data import clusters, load
from counterpoint.data.images import long_tailed
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment

PARITY = np.load(Path(__file__).parents[1] / "parity" / "isogclr.npz")
NAMES = ("rho", "gamma", "eta", "beta_u", "tau_min", "tau_max", "grad_clip")


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_equals_the_authors_over_several_steps(case: int, dtype: torch.dtype, rtol: float) -> None:
    at = {
        k.split("/", 1)[1]: torch.from_numpy(np.asarray(PARITY[k]))
        for k in PARITY.files
        if k.startswith(f"case{case}/")
    }
    names = [k.removeprefix("out/") for k in at if k.startswith("out/") and k not in ("out/loss", "out/grad_tau_mean")]
    if (
        case == 1 and dtype == torch.float32
    ):  # temperatures of 0.01: inputs rounded to float32 alone move exp(s / t) by this
        rtol = 2e-4
    n = int(at["param/n_samples"])
    state = {
        name: torch.full((n,), float(at["param/tau_init"]) if name.startswith("tau") else 0.0, dtype=torch.float64)
        for name in names
    }
    options = {name.replace("tau_", "temperature_"): float(at[f"param/{name}"]) for name in NAMES}
    inputs = [k for k in at if k.startswith("in/") and k not in ("in/index", "in/epoch")]
    for step, index in enumerate(at["in/index"]):
        given = [at[k][step].to(dtype).requires_grad_() for k in inputs]
        first = "in/epoch" in at and int(at["in/epoch"][step]) == 0
        whole = tuple(given) if len(given) == 2 else given[0]
        loss, state = fn.isogclr_step(state, index, whole, **options, first_epoch=first)
        torch.testing.assert_close(loss.double(), at["out/loss"][step], rtol=rtol, atol=rtol)
        for name in names:
            torch.testing.assert_close(state[name], at[f"out/{name}"][step], rtol=rtol, atol=rtol)
        for name, gradient in zip(inputs, torch.autograd.grad(loss, given), strict=True):
            torch.testing.assert_close(gradient.double(), at["grad/" + name[3:]][step], rtol=rtol, atol=rtol)


def test_at_rest_the_divergence_is_rho() -> None:
    g = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(40, 2, 6, generator=g, dtype=torch.float64), dim=2)
    state = {name: torch.full((40,), v, dtype=torch.float64) for name, v in (("s", 0.0), ("u", 0.0), ("tau", 0.3))}
    for _ in range(4000):
        _, state = fn.isogclr_step(
            state, torch.arange(40), features, rho=0.3, gamma=1.0, eta=0.02, beta_u=0.5, temperature_min=0.01
        )
    x = features.transpose(0, 1).flatten(0, 1)
    s = x @ x.T
    own = torch.arange(80)
    s[own, own] = s[own, (own + 40) % 80] = -torch.inf
    tau = state["tau"].repeat(2)
    p = (s / tau[:, None]).softmax(1)
    kl = torch.where(p > 0, p * (p * 78).clamp(min=1e-300).log(), 0.0).sum(1)
    mean = (kl[:40] + kl[40:]) / 2
    inside = (state["tau"] > 0.011) & (state["tau"] < 0.99)
    assert int(inside.sum()) > 30
    torch.testing.assert_close(mean[inside], torch.full_like(mean[inside], 0.3), atol=1e-4, rtol=0)


def test_rho_zero_raises_the_temperature_and_equal_embeddings_lower_it() -> None:
    features = F.normalize(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    state = {"s": torch.zeros(6), "u": torch.zeros(6), "tau": torch.full((6,), 0.5)}
    _, after = fn.isogclr_step(state, torch.arange(6), features, rho=0.0, gamma=1.0)
    assert bool((after["tau"] > 0.5).all())
    same = torch.ones(6, 2, 4).div(2).requires_grad_()
    loss, after = fn.isogclr_step(state, torch.arange(6), same, rho=0.4, gamma=1.0)
    assert bool((after["tau"] < 0.5).all())
    assert loss.isfinite()


def test_an_average_starts_from_its_first_value_where_asked() -> None:
    features = F.normalize(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    state = {"s": torch.zeros(3), "u": torch.zeros(3), "tau": torch.full((3,), 0.5)}
    first = fn.isogclr_step(state, torch.arange(3), features, first_epoch=True)[1]["s"]
    torch.testing.assert_close(fn.isogclr_step(state, torch.arange(3), features)[1]["s"], 0.8 * first)
    torch.testing.assert_close(fn.isogclr_step(state, torch.arange(3), features, fresh=True)[1]["s"], first)


def test_bad_input_is_named() -> None:
    state = {"s": torch.zeros(3), "u": torch.zeros(3), "tau": torch.ones(3)}
    with pytest.raises(ValueError, match="no negatives"):
        fn.isogclr_step(state, torch.tensor([0]), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="twice"):
        fn.isogclr_step(state, torch.tensor([0, 0]), torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="index"):
        fn.isogclr_step(state, torch.tensor([0, 3]), torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="features"):
        fn.isogclr_step(state, torch.tensor([0, 1]), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="image and text"):
        fn.isogclr_step(state, torch.tensor([0, 1]), (torch.ones(2, 3), torch.ones(3, 3)))
    with pytest.raises(ValueError, match="image and text"):
        fn.isogclr_step(state, torch.tensor([0, 1]), [torch.ones(2, 3), torch.ones(3, 3)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau_init": 0.0}, "tau_init must be > 0"),
        ({"tau_init": 0.01}, "between tau_min 0.05"),
        ({"rho": math.nan}, "rho must be finite"),
        ({"tau_max": 0.02}, "tau_max 0.02 lies below tau_min"),
        ({"tau_min": 0.005}, "at least 0.012"),
    ],
)
def test_temperatures_out_of_range_raise_an_error(settings: dict[str, float], said: str) -> None:
    system = catalog.load_system("isogclr")
    source = Experiment.resolve(system, "digits?size=8").source()

    def made() -> None:
        own = {f"isogclr.{name}": value for name, value in settings.items()}
        config = system.config(**system.recipe_for("digits"), **own)
        system.learner(config, SimpleNamespace(**Experiment.resolve(system, config=config).task(source).facts), 0)

    with pytest.raises(CounterpointError, match=said):
        made()


def test_clusters_have_their_long_tail() -> None:
    data = clusters.load(seed=1)
    counts = np.bincount(data.train.labels)
    assert counts[0] == 120
    assert counts[-1] == 4
    assert sorted(counts, reverse=True) == counts.tolist()
    assert len(data.test) == 480
    again = clusters.load(seed=1)
    assert np.array_equal(again.train.images(np.arange(5)), data.train.images(np.arange(5)))
    with pytest.raises(DataError, match="clusters"):
        clusters.load(clusters=1)


SMALL = ["--encoder", "mlp-s", "--recipe", "clusters", "--batch-size", "32", "--hidden", "8", "--projection", "8"]


@pytest.mark.usefixtures("drawn")
def test_state_is_kept_and_drawn(tmp_path: Path) -> None:
    words = ["train", "isogclr", "--data", "clusters", *SMALL, "--epochs", "2", "--out", str(tmp_path), "--name", "r"]
    assert cli.main(words) == 0
    learner = training.load_learner(Run.open(tmp_path / "r"))
    tau = learner.parts["isogclr"].sample_states["tau"].values
    assert len(tau) == 440
    assert len(tau.unique()) > 100
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Temperatures by class" in page
    assert "temperature_rank" in (tmp_path / "r" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("slug", "data"),
    [("moco-v2+isogclr", "clusters"), ("clip+isogclr", "digit-captions"), ("simclr+isogclr", "clusters")],
)
def test_temperatures_move_over_other_bases(slug: str, data: str, tmp_path: Path) -> None:
    small = SMALL if "clip" not in slug else ["--image-encoder", "conv-s", "--batch-size", "64"]
    small = [*small, "--queue", "64"] if "moco" in slug else small
    base, _, addition = slug.partition("+")
    words = ["train", base, "--with", addition, "--data", data, *small, "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main([*words, "--name", "r"]) == 0
    learner = training.load_learner(Run.open(tmp_path / "r"))
    moved = [s.values for n, s in learner.parts["isogclr"].sample_states.items() if n.startswith("tau")]
    # A pair's temperatures of 0.01 go to the one bound or the other at their first step.
    assert all(len(values.unique()) > (1 if base == "clip" else 10) for values in moved)


def test_more_than_two_modalities_are_refused() -> None:
    system = catalog.load_system("clip+isogclr")
    source = Experiment.resolve(system, "xor").source()
    config = system.config(**system.recipe_for("xor"))
    task = Experiment.resolve(system, config=config).task(source)
    with pytest.raises(CounterpointError, match="two modalities"):
        system.learner(config, SimpleNamespace(**task.facts), 0)


def test_long_tailed_split_has_its_counts() -> None:
    labels = np.repeat(np.arange(5), 100)
    rows = long_tailed(labels, 16.0, seed=3)
    assert np.bincount(labels[rows]).tolist() == [100, 50, 25, 12, 6]
    assert np.array_equal(rows, long_tailed(labels, 16.0, seed=3))
    assert not np.array_equal(rows, long_tailed(labels, 16.0, seed=4))
    counts = np.bincount(load("digits?size=8&imbalance=20", task="views").train.labels)
    assert counts[0] > 15 * counts[9]
    with pytest.raises(CounterpointError, match="at least 1"):
        load("digits?size=8&imbalance=0.5", task="views")
