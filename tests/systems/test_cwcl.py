"""CWCL: a re-implementation's numbers, the card's identities, the edges, several processes, and training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.lab.protocol import of_system
from counterpoint.lab.verify import rehearse
from counterpoint.systems.alignment import cwcl as room

PARITY = np.load(Path(__file__).parents[1] / "parity" / "cwcl.npz")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return F.normalize(draw(n, 5)), F.normalize(draw(n, 5, seed=1)), draw(n, 3, seed=2)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def written_out(p, q, f, log_scale, row_feat=None, sharpness=1.0):
    """Compute the card's listing, with the weights as an array."""

    def targets(features):
        unit = F.normalize(features)
        w = (unit @ unit.T / 2 + 0.5) ** sharpness
        return w / w.sum(1, keepdim=True)

    s = log_scale.exp() * p @ q.T
    back = torch.eye(len(p), dtype=p.dtype) if row_feat is None else targets(row_feat)
    return -(targets(f) * s.log_softmax(1)).sum(1).mean() - (back * s.T.log_softmax(1)).sum(1).mean()


# The re-implementation guards norms by 1e-8 and keeps weights in float32, so its own numbers are good to about 1e-7.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_loss_terms_and_gradients_equal_the_authors(case, dtype):
    def of(name):
        return torch.from_numpy(np.asarray(PARITY[f"{case}/{name}"]))

    tensors = {k: of(f"in/{k}").to(dtype).requires_grad_() for k in ("row_embed", "col_embed", "frozen_feat")}
    log_scale = (-of("param/temperature").log()).to(dtype).requires_grad_()
    rtol = 1e-6 if dtype == torch.float64 else 1e-5
    loss = fn.cwcl(**tensors, log_scale=log_scale)
    loss.backward()
    terms = fn.cwcl_terms(**tensors, log_scale=log_scale)
    for found, name in ((loss, "loss"), *((getattr(terms, field), field) for field in terms._fields)):
        torch.testing.assert_close(found.detach(), of(f"out/{name}").to(dtype), rtol=rtol, atol=0)
    for name in ("row_embed", "col_embed"):
        expected = of(f"grad/{name}").to(dtype)
        torch.testing.assert_close(tensors[name].grad, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    torch.testing.assert_close(log_scale.grad, of("grad/log_inv_temperature").to(dtype), rtol=rtol, atol=0)
    assert tensors["frozen_feat"].grad is None


@pytest.mark.parametrize(
    "options",
    [{}, {"sharpness": 3.0}, {"row_feat": draw(9, 4, seed=7)}, {"row_feat": draw(9, 4, seed=7), "sharpness": 3.0}],
)
@pytest.mark.parametrize("dense", [0, 100])
def test_the_weights_are_those_of_the_array(options, dense, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 4)
    monkeypatch.setattr(room, "DENSE", dense)
    mine, theirs = ([x.clone().requires_grad_() for x in batch(9)[:2]] for _ in range(2))
    f, s = batch(9)[2], number(1.5)
    found, expected = fn.cwcl(*mine, f, s, **options), written_out(*theirs, f, s, **options)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_gradients_are_right(sharpness):
    p, q, f = batch(4)
    inputs = (p.requires_grad_(), q.requires_grad_(), number(1.0).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b, s: fn.cwcl(a, b, f, s, sharpness=sharpness), inputs)


def test_no_array_of_pairs_is_held():
    n, largest = 300, 0
    p, q, f = (x.requires_grad_() for x in batch(n))

    def keep(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fn.cwcl(p, q, f, number(1.0)).backward()
    assert largest < n * n / 10


def test_loss_satisfies_its_identities():
    p, q, _ = batch(2)
    s = number(1.2)
    opposite = draw(1, 4).repeat(2, 1) * torch.tensor([[1.0], [-2.0]])
    logits = s.exp() * p @ q.T
    both = F.cross_entropy(logits, torch.arange(2)) + F.cross_entropy(logits.T, torch.arange(2))
    torch.testing.assert_close(fn.cwcl(p, q, opposite, s), both)
    p, q, f = batch(6)
    assert fn.cwcl(p, q, f, number(-60.0)).item() == pytest.approx(2 * math.log(6))
    one = p[:1].expand(6, -1)
    assert fn.cwcl(one, one, f, s).item() == pytest.approx(2 * math.log(6))
    logits = s.exp() * p @ q.T
    flat = -logits.log_softmax(1).mean() + F.cross_entropy(logits.T, torch.arange(6))
    torch.testing.assert_close(fn.cwcl(p, q, f[:1].expand(6, -1), s), flat)


def test_edge_cases_have_their_values_or_raise_an_error():
    p, q, f = batch(1)
    p.requires_grad_()
    loss = fn.cwcl(p, q, f, number(2.0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert p.grad.abs().max() < 1e-12
    p, q, f = batch(4)
    f[1] = 0
    torch.testing.assert_close(fn.cwcl(p, q, f, number(1.0)), written_out(p, q, f, number(1.0)))
    assert fn.cwcl(p, q, f * math.nan, number(1.0)).isnan()
    with pytest.raises(ValueError, match="row_embed and col_embed must be"):
        fn.cwcl(p, q[:3], f, number(1.0))
    with pytest.raises(ValueError, match="frozen_feat must be a row of features for each of row_embed"):
        fn.cwcl(p, q, f[:3], number(1.0))
    with pytest.raises(ValueError, match="row_feat must be"):
        fn.cwcl(p, q, f, number(1.0), row_feat=f[:2])
    with pytest.raises(ValueError, match="empty batch"):
        fn.cwcl(p[:0], q[:0], f[:0], number(1.0))
    with pytest.raises(ValueError, match="sharpness must be positive"):
        fn.cwcl(p, q, f, number(1.0), sharpness=0.0)
    for sharpness in (0.0, 101.0):
        with pytest.raises(CounterpointError, match="sharpness must lie in"):
            room.CWCLConfig(sharpness=sharpness)


# ---------------------------------------------------------------------------------------------------------------- training


def test_it_trains_against_a_tower_that_stays(tmp_path):
    words = ["train", "cwcl", "--epochs", "20", "--evaluate-every", "20", "--name", "run", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 0
    run = Run.open(tmp_path / "run")
    rows = run.metrics()
    assert rows[-1]["test/bottom_from_top_zero_shot"] > 0.4
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    learner = training.load_learner(run)
    assert (learner.frozen, learner.trained) == ("top", ["bottom"])
    assert not list(learner.encoders["top"].parameters())
    assert learner.heads["bottom"].out_features == 32


def test_every_arm_of_the_claim_gives_its_metric():
    claim = of_system("cwcl")
    metrics = {arm: rehearse("cwcl", claim, arm) for arm in claim.arms}
    assert all(0 <= found[claim.conjuncts[0].metric] <= 1 for found in metrics.values())
    assert metrics["cwcl"] != metrics["ordinary"]


def test_a_tower_of_random_weights_is_refused(tmp_path, capsys):
    data = "glyphs?train=64&test=32&size=32&styles=codicon"
    words = ["train", "cwcl", "--data", data, "--text-encoder", "text-s", "--batch-size", "32", "--out", str(tmp_path)]
    assert cli.main(words) == 2
    assert "teach nothing: use --pretrained" in capsys.readouterr().err
    assert cli.main(["train", "cwcl", "--frozen", "sound", "--out", str(tmp_path)]) == 2
    assert "unknown modality 'sound'" in capsys.readouterr().err


def test_the_frozen_tower_is_not_trained(tmp_path):
    """With a projection on it the shared space is learnt; the tower itself stays in eval mode."""
    words = ["train", "cwcl", "--projection", "--embedding", "8", "--epochs", "2", "--evaluate-every", "2"]
    words += ["--frozen", "bottom", "--name", "run", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 0
    learner = training.load_learner(Run.open(tmp_path / "run")).train()
    assert learner.training
    assert not learner.encoders["bottom"].training
    assert learner.heads["bottom"].out_features == learner.heads["top"].out_features == 8
