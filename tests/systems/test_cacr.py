"""CACR: the authors' numbers, the formulas written out, the card's identities and edges, processes, and every form trained."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from counterpoint.core import expected as kernel
from counterpoint.core.world import leave
from counterpoint.data import digits
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system
from counterpoint.lab.verify import rehearse
from counterpoint.systems.classics.simclr import nt_xent
from counterpoint.systems.images import cacr as room
from counterpoint.systems.images.cacr import (
    SYSTEM,
    CACRConfig,
    cacr,
    cacr_momentum,
    pairwise_nt_xent,
)

PARITY = Path(__file__).parents[1] / "parity" / "cacr.npz"
BOTH = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, unit: bool = True) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return F.normalize(x, dim=-1) if unit else x


def numbers(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    with np.load(PARITY) as found:
        return torch.from_numpy(np.asarray(found[name])).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * expected.abs().max().item())


def both(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute value and gradient of a function at x."""
    x = x.clone().requires_grad_()
    value = function(x)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("dtype", "rtol"), BOTH)
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_values_and_gradients_equal_the_authors(case, dtype, rtol):
    given = [float(numbers(f"{case}/param/{n}")) for n in ("alpha", "beta", "tau_pos", "tau_neg")]
    switches = [bool(numbers(f"{case}/param/{n}")) for n in ("weight_pos", "weight_neg")]
    debiased = float(numbers(f"{case}/param/tau_plus")) if numbers(f"{case}/param/debiased") else None
    views = numbers(f"{case}/in/views", dtype).requires_grad_()
    found = cacr(list(views), *given, *switches, debiased)
    sum(found).backward()
    close(found.attraction.detach(), numbers(f"{case}/out/attraction"), rtol)
    close(found.repulsion.detach(), numbers(f"{case}/out/repulsion"), rtol)
    close(sum(found).detach(), numbers(f"{case}/out/total"), rtol)
    close(views.grad, numbers(f"{case}/grad/views"), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), BOTH)
@pytest.mark.parametrize(("case", "cost"), [("case2", "rbf"), ("case3", "euclidean")])
def test_momentum_form_equals_the_authors(case, cost, dtype, rtol):
    queries = numbers(f"{case}/in/queries", dtype).requires_grad_()
    loss = cacr_momentum(queries, numbers(f"{case}/in/key", dtype), float(numbers(f"{case}/param/temperature")), cost)
    loss.backward()
    close(loss.detach(), numbers(f"{case}/out/loss"), rtol)
    close(queries.grad, numbers(f"{case}/grad/queries"), rtol)


# ---------------------------------------------------------------------------------------------------- the formulas in full


def distances(a, b):
    return (a[:, None] - b[None]).square().sum(2)


def written_out(z, alpha, beta, tau_pos, tau_neg, weight_pos, weight_neg, tau_plus):
    """Compute the card's form A, loop by loop."""
    v, n = len(z), z.shape[1]
    attraction, repulsion = [], []
    for x in range(v):
        for i in range(n):
            d = torch.stack([(z[x, i] - z[y, i]).square().sum() for y in range(v) if y != x])
            w = (tau_pos * d).softmax(0) if weight_pos else torch.full_like(d, 1 / len(d))
            attraction.append(alpha * (w * d).sum())
    for x, y in itertools.combinations(range(v), 2):
        for i in range(n):
            d = torch.stack([(z[x, i] - z[y, j]).square().sum() for j in range(n) if j != i])
            w = (-tau_neg * d).softmax(0) if weight_neg else torch.full_like(d, 1 / len(d))
            r = -beta * (w * d).sum()
            if tau_plus is not None:
                r = (r - tau_plus * (z[x, i] - z[y, i]).square().sum()) / (1 - tau_plus)
            repulsion.append(r)
    return torch.stack(attraction).mean() + torch.stack(repulsion).mean()


@pytest.mark.parametrize("block", [kernel.BLOCK, 40, 1])
@pytest.mark.parametrize(
    ("weight_pos", "weight_neg", "tau_plus"),
    [(True, True, None), (False, True, None), (True, False, None), (False, False, None), (True, True, 0.3)],
)
def test_every_switch_in_blocks_is_the_formula(weight_pos, weight_neg, tau_plus, block, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    options = (1.5, 0.7, 0.8, 1.3, weight_pos, weight_neg, tau_plus)
    for unit in (True, False):
        z = draw(3, 5, 4, unit=unit)
        found = both(lambda x: sum(cacr(x, *options)), z)
        expected = both(lambda x: written_out(x, *options), z)
        for a, b in zip(found, expected, strict=True):
            close(a, b)


@pytest.mark.parametrize("cost", ["rbf", "euclidean"])
def test_the_momentum_form_is_the_formula(cost):
    n, t = 6, 0.4
    key = draw(n, 5, seed=1, unit=False)

    def full(queries):
        q, k = F.normalize(queries, dim=2), F.normalize(key, dim=1)
        c = q @ k.T
        own = c.diagonal(0, 1, 2)
        p = ((2 - 2 * own) / t).softmax(0).detach()
        if cost == "rbf":
            return sum(
                (2 * t * p[v] * F.cross_entropy(c[v] / t, torch.arange(n), reduction="none")).mean() for v in range(3)
            )
        seen = (c / t).masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
        w = seen.softmax(2).detach()
        return (p * (1 - own - (w * (1 - c)).sum(2))).sum()

    queries = draw(3, n, 5, unit=False)
    expected = both(full, queries)
    for a, b in zip(both(lambda q: cacr_momentum(q, key, t, cost), queries), expected, strict=True):
        close(a, b)
    times = n if cost == "rbf" else 1 / n
    other = both(lambda q: cacr_momentum(list(q), 3 * key, t, cost, "sum" if cost == "rbf" else "mean"), queries)
    for a, b in zip(other, expected, strict=True):
        close(a, b * times)
    key.requires_grad_()
    cacr_momentum(queries.requires_grad_(), key, t, cost).backward()
    assert key.grad is None


# ---------------------------------------------------------------------------------------------------------- the identities


def test_terms_satisfy_their_identities():
    z = draw(4, 7, 5)
    # Factors of 0 weigh uniformly.
    for a, b in zip(
        both(lambda x: sum(cacr(x, positive_sharpness=0, negative_sharpness=0)), z),
        both(lambda x: sum(cacr(x, weight_pos=False, weight_neg=False)), z),
        strict=True,
    ):
        close(a, b)
    # Nearly 0 is nearly that: the two ways to get there agree.
    close(cacr(z, negative_sharpness=1e-7).repulsion, cacr(z, negative_sharpness=0).repulsion, 1e-6)
    # Of two views the attraction is plain alignment.
    close(cacr(z[:2], positive_sharpness=5.0).attraction, (z[0] - z[1]).square().sum(1).mean())
    # Sharp: the farthest positive and the nearest negative.
    away = torch.stack([distances(x, y).fill_diagonal_(math.inf).amin(1) for x, y in itertools.combinations(z, 2)])
    far = torch.stack([torch.stack([(x - y).square().sum(1) for y in z]).amax(0) for x in z])
    close(cacr(z, beta=2, negative_sharpness=1e5).repulsion, -2 * away.mean())
    close(cacr(z, positive_sharpness=1e5).attraction, far.mean())
    # Samples in another order, the sphere turned.
    turned = z[:, torch.randperm(7)] @ torch.linalg.qr(draw(5, 5, unit=False))[0]
    close(torch.stack(cacr(turned)), torch.stack(cacr(z)))
    # Weighing by closeness lessens the distance of negatives, by distance raises that of positives.
    weighed, plain = cacr(z), cacr(z, weight_pos=False, weight_neg=False)
    assert weighed.repulsion > plain.repulsion
    assert weighed.attraction > plain.attraction


def test_terms_reach_their_bounds():
    z = draw(2, 6, 4)
    opposite = torch.stack([z[0], -z[0]])
    assert cacr(opposite, alpha=2).attraction.item() == pytest.approx(8)
    poles = F.normalize(torch.ones(2, 2, 3, dtype=torch.float64), dim=2)
    poles[1] *= -1
    assert cacr(poles, beta=3).repulsion.item() == pytest.approx(-12)


def test_pairwise_nt_xent_is_the_mean_over_pairs():
    z = draw(3, 5, 4, unit=False)
    expected = torch.stack([nt_xent(x, y, 0.3) for x, y in itertools.combinations(z, 2)]).mean()
    close(pairwise_nt_xent(z, 0.3), expected)


def test_no_matrix_is_kept(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 2**12)
    largest = 0

    def keep(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    z = draw(2, 400, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum(cacr(z)).backward()
    assert largest <= z.numel() * 2 < 400**2 / 4


# --------------------------------------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_all_are_equal_nothing_moves(dtype):
    same = F.normalize(torch.ones(3, 5, 7, dtype=dtype), dim=2)
    for options in ({}, {"weight_neg": False}, {"positive_prior": 0.2}, {"negative_sharpness": 100.0}):
        value, gradient = both(lambda x, o=options: sum(cacr(x, **o)), same)
        assert value.abs() < 1e-6
        assert gradient.abs().max() < 1e-6


def test_weights_of_zero_switch_terms_off():
    z = draw(3, 5, 4)
    only = both(lambda x: sum(cacr(x, beta=0)), z)
    close(only[0], cacr(z).attraction)
    assert cacr(z, beta=0).repulsion == 0
    assert cacr(z, alpha=0).attraction == 0
    value, gradient = both(lambda x: sum(cacr(x, alpha=0, beta=0)), z)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("tau", [1e-320, 1e-30, 1e-19, 50.0, 1e4, 1e30])
def test_weights_at_either_end_stay_finite(tau):
    value, gradient = both(
        lambda x: sum(cacr(x, positive_sharpness=tau, negative_sharpness=tau)), draw(3, 6, 4).float()
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_half_precision_is_computed_in_float32_and_nan_stays():
    z = draw(3, 6, 4).bfloat16()
    assert cacr(z).repulsion.dtype == torch.float32
    assert cacr_momentum(z, z[0]).dtype == torch.float32
    broken = draw(3, 6, 4)
    broken[1, 2, 0] = math.nan
    assert sum(cacr(broken)).isnan()
    assert cacr_momentum(broken, broken[0], cost="euclidean").isnan()
    x = draw(3, 6, 4).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        close(cacr(x).repulsion.detach(), cacr(x.detach().double()).repulsion, 1e-5)


def test_no_gradient_is_made_where_none_is_wanted():
    z = draw(3, 6, 4).requires_grad_()
    with torch.no_grad():
        assert not cacr(z).repulsion.requires_grad
    close(cacr(z).repulsion.detach(), cacr(z.detach()).repulsion)
    # A second derivative would lack what the distances do to the weights.
    (gradient,) = torch.autograd.grad(cacr(z).repulsion, z, create_graph=True)
    close(gradient.detach(), both(lambda x: cacr(x).repulsion, z.detach())[1])
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_bad_input_is_named():
    z = draw(3, 5, 4)
    with pytest.raises(ValueError, match=r"views must be at least 2, got 1: a query has no positives"):
        cacr(z[:1])
    with pytest.raises(ValueError, match=r"views must hold at least 2 rows, got 1: a query has no negatives"):
        cacr(z[:, :1])
    with pytest.raises(ValueError, match="at least 2 rows, got 0"):
        cacr(z[:, :0])
    with pytest.raises(ValueError, match=r"views must be \[n, dim\] alike"):
        cacr([z[0], z[1, :3]])
    with pytest.raises(ValueError, match="alike"):
        cacr([])
    with pytest.raises(ValueError, match=r"\[views, n, dim\], got \[5, 4\]"):
        cacr(z[0])
    for name in ("alpha", "beta", "positive_sharpness", "negative_sharpness"):
        with pytest.raises(ValueError, match=f"{name} must lie in 0..1e"):
            cacr(z, **{name: -1.0})
        with pytest.raises(ValueError, match=f"{name} must lie in 0..1e"):
            cacr(z, **{name: math.inf})
    with pytest.raises(ValueError, match="positive_prior must lie in"):
        cacr(z, positive_prior=1.0)
    with pytest.raises(ValueError, match="weight_neg is False"):
        cacr(z, weight_neg=False, positive_prior=0.1)
    with pytest.raises(ValueError, match="temperature must lie in"):
        cacr_momentum(z, z[0], 0.0)
    with pytest.raises(ValueError, match=r"alike, got \[5, 4\] and \[4, 4\]"):
        cacr_momentum(z, z[0, :4])
    with pytest.raises(ValueError, match="cost must be"):
        cacr_momentum(z, z[0], cost="cosine")
    with pytest.raises(ValueError, match="reduction must be"):
        cacr_momentum(z, z[0], reduction="none")
    with pytest.raises(ValueError, match="at least 2 rows for the cost 'euclidean'"):
        cacr_momentum(z[:, :1], z[0, :1], cost="euclidean")
    assert cacr_momentum(z[:, :1], z[0, :1]).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="views must be at least 2"):
        pairwise_nt_xent(z[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "queue"}, "unknown form 'queue'"),
        ({"cost": "cosine"}, "unknown cost 'cosine'"),
        ({"positives": 0}, "positives must be at least 1"),
        ({"negative_sharpness": -1.0}, "negative_sharpness must lie in 0..1e"),
        ({"alpha": math.nan}, "alpha must be finite"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"momentum_teacher": 1.5}, "momentum_teacher must lie"),
        ({"positive_prior": 1.0}, "positive_prior must be"),
        ({"positive_prior": 0.1, "weight_neg": False}, "needs weight_neg"),
        ({"form": "momentum", "positives": 1, "keys": 3}, r"keys \(3\) must not be more than the views \(2\)"),
    ],
)
def test_settings_that_make_no_sense_raise_an_error(options, message):
    with pytest.raises(CounterpointError, match=message):
        CACRConfig(**options)


# ------------------------------------------------------------------------------------------------------------ the processes

COUNTS = [4, 0, 3]


def losses():
    return {
        "plain": lambda z: sum(cacr(z, 1.5, 0.7)),
        "uniform": lambda z: sum(cacr(z, weight_pos=False, weight_neg=False)),
        "debiased": lambda z: sum(cacr(z, positive_prior=0.2)),
        "rbf": lambda z: cacr_momentum(z[1:], z[0], 0.4),
        "euclidean": lambda z: cacr_momentum(z[1:], z[0], 0.4, "euclidean"),
        "euclidean mean": lambda z: cacr_momentum(z[1:], z[0], 0.4, "euclidean", "mean"),
    }


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    from counterpoint.core.distributed import over

    with over("world"):
        share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        torch.save(
            {name: both(f, draw(3, sum(COUNTS), 4)[:, share]) for name, f in losses().items()}, f"{folder}/{rank}.pt"
        )
    leave()


def test_processes_together_have_the_losses_and_the_gradients_of_one(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=len(COUNTS), start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(COUNTS))]
    for name, f in losses().items():
        value, gradient = both(f, draw(3, sum(COUNTS), 4))
        for found in results:
            close(found[name][0], value)
        together = torch.cat([found[name][1] for found in results], 1) / len(COUNTS)
        close(together, gradient)


# ---------------------------------------------------------------------------------------------------------------- training

SMALL = {"encoder": "mlp-s", "recipe": "digits-shifted", "hidden": 16, "projection": 8, "lr": 1e-2, "optimizer": "adam"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_pos": False, "weight_neg": False, "positives": 1},
        {"positive_prior": 0.1, "positives": 2},
        {"form": "momentum", "positives": 2},
        {"form": "momentum", "cost": "euclidean", "keys": 3, "positives": 2, "momentum_teacher": 0.9},
        {"form": "nt_xent", "positives": 2, "temperature": 0.2},
    ],
)
def test_every_form_trains(options):
    config = CACRConfig(**(SMALL | {"epochs": 2, "batch_size": 32, "evaluate_every": 2} | options))
    last = Experiment.resolve(SYSTEM, config=config).run(0, source=digits.load(size=8, train=128))[-1]
    assert math.isfinite(last["train/loss"])
    assert 0.2 < last["test/knn_accuracy"] <= 1
    if config.form == "plain":
        assert last["train/loss"] == pytest.approx(last["train/attraction"] + last["train/repulsion"], abs=1e-5)
        assert 0 < last["train/attraction"] < 4 * config.alpha
        assert -4.3 * config.beta < last["train/repulsion"] < 0


def learner(**options):
    return SYSTEM.learner(CACRConfig(**(SMALL | options)), SimpleNamespace(size=8, channels=3), 0)


def test_an_image_has_one_view_more_than_positives():
    for positives in (1, 4):
        batch = {"image": torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)}
        views = learner(positives=positives).prepare(batch, torch.Generator().manual_seed(0))["views"]
        assert len(views) == positives + 1
        assert not torch.equal(views[0], views[1])


def test_each_key_s_own_view_asks_nothing_of_it(monkeypatch):
    found = learner(form="momentum", positives=2, keys=2, cost="rbf")
    found.total_steps = 10
    views = [torch.rand(5, 3, 8, 8) for _ in range(3)]
    seen = []
    monkeypatch.setattr(room, "cacr_momentum", lambda q, k, *_: seen.append((len(q), k)) or q[0].sum())
    found.loss({"views": views})
    assert [count for count, _ in seen] == [2, 2]
    # The key network has moved onto the student (they begin alike) and gives keys without gradient.
    for view, (_, key) in zip(views, seen, strict=False):
        torch.testing.assert_close(key, found.teacher(view))
        assert not key.requires_grad


@pytest.mark.slow
def test_the_claim_s_arms_differ_where_it_says():
    claim = of_system("cacr")
    metrics = {arm: rehearse("cacr", claim, arm) for arm in claim.arms}
    assert set(metrics) == {"none", "full", "no_pos", "no_neg", "nt_xent"}
    assert len({found["train_loss"] for found in metrics.values()}) == 5
    for conjunct in claim.compared:
        assert all(0 <= metrics[arm][conjunct.metric] <= 1 for arm in conjunct.arms)
