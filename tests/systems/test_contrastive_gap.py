"""The contrastive gap: the authors' numbers, bounds and identities, the edges, several processes, and training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog, cli
from counterpoint import functional as fn
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.lab.protocol import of_system
from counterpoint.lab.verify import rehearse
from counterpoint.systems.alignment.contrastive_gap import ContrastiveGapConfig

PARITY = np.load(Path(__file__).parents[1] / "parity" / "contrastive-gap.npz")
MODES = {0: (False, False, False), 1: (True, True, False), 2: (True, True, True)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_loss_terms_and_gradients_equal_the_authors(case, dtype, rtol):
    def of(name):
        return torch.from_numpy(np.asarray(PARITY[f"{case}/{name}"]))

    x, y = (of(f"in/{name}_embed").to(dtype).requires_grad_() for name in ("image", "text"))
    switches = MODES[int(PARITY[f"{case}/param/mode"])]
    loss, terms = fn.contrastive_gap_loss(x, y, float(PARITY[f"{case}/param/temperature"]), *switches)
    loss.backward()
    # The sum may nearly cancel: the terms are what is exact to rounding.
    torch.testing.assert_close(loss.detach().double(), of("out/total_loss"), rtol=rtol, atol=rtol)
    assert set(terms) == {"contrastive", "uniformity", "alignment", "cross_uniformity"}
    for name, value in terms.items():
        torch.testing.assert_close(value.detach().double(), of(f"out/{name}"), rtol=rtol, atol=0)
    for name, z in (("image", x), ("text", y)):
        expected = of(f"grad/{name}_embed")
        torch.testing.assert_close(z.grad.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def test_measures_equal_the_authors():
    found = fn.gap_metrics(PARITY["case3/in/image_embed"], torch.from_numpy(PARITY["case3/in/text_embed"]))
    named = {key.removeprefix("case3/out/") for key in PARITY.files if key.startswith("case3/out/")}
    assert set(found) == named | {"linear_separability"}
    for name in named:
        assert found[name] == pytest.approx(float(PARITY[f"case3/out/{name}"]), rel=1e-9)


def test_loss_leaves_out_clip_and_applies_weights():
    x, y = draw(5, 4), draw(5, 4, seed=1)
    loss, terms = fn.contrastive_gap_loss(x, y, 0.1, True, 0.5, 0.25, contrastive=False)
    expected = terms["uniformity"] + 0.5 * terms["alignment"] + 0.25 * terms["cross_uniformity"]
    torch.testing.assert_close(loss, expected)


def test_gradients_are_right():
    x, y = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    for switches in [*MODES.values(), (True, False, True)]:
        assert torch.autograd.gradcheck(lambda a, b, s=switches: fn.contrastive_gap_loss(a, b, 0.2, *s).loss, (x, y))
    terms = fn.contrastive_gap_loss(x, y, 0.2).terms
    assert not terms["cross_uniformity"].requires_grad
    assert terms["uniformity"].requires_grad


def test_terms_are_those_of_distances():
    x, y = draw(6, 4), draw(6, 4, seed=1)
    u, v = F.normalize(x), F.normalize(y)
    between = torch.cdist(u, v).square()[~torch.eye(6, dtype=torch.bool)]
    terms = fn.contrastive_gap_loss(x, y).terms
    torch.testing.assert_close(terms["cross_uniformity"], (-2 * between).exp().mean().log())
    within = [(-2 * torch.pdist(z).square()).exp().mean().log() for z in (u, v)]
    torch.testing.assert_close(terms["uniformity"], sum(within) / 2)
    torch.testing.assert_close(terms["contrastive"], fn.clip(u, v, torch.tensor(100.0, dtype=torch.float64).log()))
    # The length of a row does not matter.
    scaled = fn.contrastive_gap_loss(7 * x, 0.1 * y).loss
    torch.testing.assert_close(scaled, fn.contrastive_gap_loss(x, y).loss)


def test_terms_reach_their_bounds():
    same = torch.ones(5, 3, dtype=torch.float64).requires_grad_()
    loss, terms = fn.contrastive_gap_loss(same, same.clone(), cross_uniformity=True)
    loss.backward()
    assert terms["uniformity"].item() == pytest.approx(0, abs=1e-12)
    assert terms["alignment"].item() == 0
    assert same.grad.abs().max() < 1e-9
    _, terms = fn.contrastive_gap_loss(same, -same, cross_uniformity=True)
    assert terms["cross_uniformity"].item() == pytest.approx(-8)  # the antipodal solution
    assert terms["alignment"].item() == pytest.approx(4)


def test_small_and_zero_batches_stay_finite():
    x, y = draw(1, 3).requires_grad_(), draw(1, 3, seed=1).requires_grad_()
    loss, terms = fn.contrastive_gap_loss(x, y, cross_uniformity=True)
    loss.backward()
    assert terms["uniformity"] == terms["cross_uniformity"] == 0
    assert terms["contrastive"].item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(loss, terms["alignment"] * 1.0)
    assert x.grad.isfinite().all()
    two = fn.contrastive_gap_loss(torch.eye(2), torch.eye(2), cross_uniformity=True).terms
    assert two["uniformity"].item() == pytest.approx(-4)
    assert two["cross_uniformity"].item() == pytest.approx(-4)
    zeros = torch.zeros(3, 4, requires_grad=True)
    fn.contrastive_gap_loss(zeros, torch.eye(3, 4), cross_uniformity=True).loss.backward()
    assert zeros.grad.isfinite().all()
    assert fn.contrastive_gap_loss(draw(3, 3) * math.nan, draw(3, 3)).loss.isnan()
    with pytest.raises(ValueError, match="x and y must be"):
        fn.contrastive_gap_loss(draw(3, 2), draw(2, 2))
    with pytest.raises(ValueError, match="empty batch"):
        fn.contrastive_gap_loss(draw(0, 2), draw(0, 2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        fn.contrastive_gap_loss(draw(3, 2), draw(3, 2), 0.0)
    with pytest.raises(CounterpointError, match="every term of the loss is off"):
        ContrastiveGapConfig(contrastive=False, uniformity=False, alignment=False)


def test_measures_of_plain_arrays_have_known_values():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8))
    apart = fn.gap_metrics(x, x + 6)
    assert apart["linear_separability"] > 0.95
    assert apart["centroid_distance"] > 0.5
    together = fn.gap_metrics(x, rng.standard_normal((200, 8)))
    assert 0.3 < together["linear_separability"] < 0.7
    assert fn.gap_metrics(3 * x, x) == pytest.approx(fn.gap_metrics(x, x), abs=1e-12)
    ratios = fn.explained_variance_ratios(x)
    assert ratios.sum() == pytest.approx(1)
    assert (np.diff(ratios) <= 0).all()
    assert (fn.explained_variance_ratios(np.ones((3, 2))) == 0).all()
    with pytest.raises(ValueError, match="at least 2 pairs"):
        fn.gap_metrics(x[:1], x[:1])
    with pytest.raises(ValueError, match="u holds NaN"):
        fn.gap_metrics(x * np.nan, x)
    with pytest.raises(ValueError, match="v must be"):
        fn.gap_metrics(x, x[0])


# ---------------------------------------------------------------------------------------------------------------- training


def test_it_trains_and_the_run_has_the_measures(tmp_path):
    words = ["train", "contrastive-gap", "--data", "digit-halves?train=320&test=100", "--epochs", "4"]
    words += ["--evaluate-every", "2", "--name", "run"]
    words += ["--cross-uniformity", "--cross-warmup-epochs", "8", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    rows = Run.open(tmp_path / "run").metrics()
    last = rows[-1]
    assert last["train/contrastive"] < rows[0]["train/contrastive"]
    for name in ("separability", "centroid_distance", "uniformity", "alignment"):
        assert math.isfinite(last[f"test/top_bottom_{name}"])
    assert 0.2 < last["test/bottom_from_top_zero_shot"] <= 1


def test_the_cross_term_comes_in_slowly():
    from types import SimpleNamespace

    facts = SimpleNamespace(modalities={name: {"kind": "vector", "dim": 3} for name in "ab"}, tokenizers={})
    system = catalog.load_system("contrastive-gap")
    learner = system.learner(ContrastiveGapConfig(cross_uniformity=True, cross_warmup_epochs=4), facts, 0)
    weights = []
    for epoch in (0, 2, 4, 9):
        learner.position.epoch = epoch
        weights.append(learner.cross_weight())
    assert weights == [0, 0.5, 1, 1]
    # Items without a partner take no part.
    inputs = {name: torch.rand(6, 3) for name in "ab"}
    present = {"a": torch.ones(6).bool(), "b": torch.arange(6) < 4}
    learner.position.epoch = 9
    some = learner.loss({"inputs": inputs, "present": present})
    alone = {name: rows[:4] for name, rows in inputs.items()}
    all_there = {name: torch.ones(4).bool() for name in "ab"}
    torch.testing.assert_close(some["loss"], learner.loss({"inputs": alone, "present": all_there})["loss"])


def test_every_arm_of_the_claim_gives_its_metrics():
    claim = of_system("contrastive-gap")
    metrics = {arm: rehearse("contrastive-gap", claim, arm) for arm in claim.arms}
    for conjunct in claim.compared:
        assert all(conjunct.metric in found for found in metrics.values())
    variant = claim.variants["same-modality"]
    found = rehearse("contrastive-gap", variant, "cua")
    assert all(conjunct.metric in found for conjunct in variant.compared)
