"""M3CoL: the authors' numbers, of the losses and of the whole model, the card's identities, the edges, training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint import cli
from counterpoint import functional as fn
from counterpoint.core import kernel
from counterpoint.core.mixing import Mix, mixed_targets
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment.m3col import M3CoL, M3CoLConfig

PARITY = np.load(Path(__file__).parents[1] / "parity" / "m3col.npz")
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def part(case: str, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{case}/{kind}/"
    return {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[key])) for key in PARITY if key.startswith(prefix)
    }


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize(
    ("case", "name"), [("case0", "m3co_loss"), ("case1", "m3co_loss"), ("case2", "multisclip_loss")]
)
def test_losses_equal_the_authors(case, name, dtype, rtol):
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in part(case, "in").items()}
    gradients = part(case, "grad")
    for key in gradients:
        inputs[key].requires_grad_()
    loss = getattr(fn, name)(**inputs, **{k: v.item() for k, v in part(case, "param").items()})
    loss.backward()
    close(loss.detach(), part(case, "out")["loss"], rtol)
    for key, expected in gradients.items():
        close(inputs[key].grad, expected, rtol)


def facts(*dims: int, classes: int) -> SimpleNamespace:
    names = ("first", "second", "third", "fourth")
    kinds = {name: {"kind": "vector", "dim": dim} for name, dim in zip(names, dims, strict=False)}
    return SimpleNamespace(modalities=kinds, tokenizers={}, classes=classes)


def small(**settings) -> M3CoLConfig:
    return M3CoLConfig(**{"embedding": 8, "hidden": 8, "hidden_layers": 1, "batch_size": 7} | settings)


def published(name: str) -> str:
    """Return our name of a weight of the released model."""
    room, layer, *_, kind = name.split(".")
    place = 0 if layer.endswith("1") else 2
    modality = ("first", "second", "third")[int(room[-1]) - 1] if room[-1].isdigit() else ""
    owner = {"fe": f"encoders.{modality}", "cl": f"single.{modality}", "mm": "fused"}[room[:2]]
    return f"{owner}.{place}.{kind}"


@pytest.mark.parametrize("case", ["case3", "case4"])
def test_whole_model_equals_the_authors(case):
    learner = M3CoL(small(mix_keys=True), facts(6, 5, 4, classes=3)).double()
    learner.load_state_dict({published(name): value for name, value in part(case, "weight").items()})
    learner.position = Position(epoch=0 if case == "case3" else 49)
    inputs = part(case, "in")
    names = ("first", "second", "third")
    batch = {
        "inputs": {name: inputs[f"x{n}"] for n, name in enumerate(names)},
        "present": {name: torch.ones(7, dtype=torch.bool) for name in names},
        "label": inputs["label"],
        "index": torch.arange(7),
        "mixes": {name: Mix(inputs[f"perm{n}"], inputs[f"lam{n}"]) for n, name in enumerate(names)} if case == "case3" else {},
    }  # fmt: skip
    losses = learner.loss(batch)
    losses["loss"].backward()
    expected = part(case, "out")
    close(losses["loss"].detach(), expected["total_loss"], 1e-9)
    close(losses["fused"].detach(), expected["fused_ce_per_sample"].mean(), 1e-9)
    close(learner.predict(batch)["logits"].detach(), expected["fused_logits"], 1e-9)
    weights = dict(learner.named_parameters())
    gradients = part(case, "grad")
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        close(weights[published(name)].grad, gradient, 1e-9)


# --------------------------------------------------------------------------------------------------- identities and edges


def with_a_matrix(mixed, fixed, targets, temperature, bidirectional):
    s = F.normalize(mixed) @ F.normalize(fixed).T / temperature
    row = -(targets * s.log_softmax(1)).sum() / len(s)
    return (row - (targets * s.log_softmax(0)).sum() / len(s)) / 2 if bidirectional else row


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_two_entries_a_row_are_the_whole_matrix_of_targets(n, bidirectional, accumulate, seed):
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))  # fixed points are common in small ones
    lam = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lam[::3] = 1.0
    mixed, fixed = (draw(n, 4, seed=seed + k).requires_grad_() for k in range(2))
    found = fn.m3co_loss(mixed, fixed, perm, lam, 0.2, bidirectional, accumulate_targets=accumulate)
    expected = with_a_matrix(mixed, fixed, mixed_targets(perm, lam, accumulate=accumulate), 0.2, bidirectional)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(found, (mixed, fixed)), torch.autograd.grad(expected, (mixed, fixed)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", [(512, 2048), (3, 4)])
def test_soft_targets_have_a_gradient_without_their_matrix(monkeypatch, tile):
    monkeypatch.setattr(kernel, "TILE", tile)
    p, g = (draw(9, 4, seed=k).requires_grad_() for k in range(2))
    found = fn.multisclip_loss(p, g, 0.3)
    a, b = F.normalize(p), F.normalize(g)
    s, q = a @ b.T / 0.3, (b @ b.T / 0.3).softmax(1)
    expected = -((q * s.log_softmax(1)).sum() + (q * s.T.log_softmax(1)).sum()) / 18
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, (p, g)), torch.autograd.grad(expected, (p, g)), strict=True):
        torch.testing.assert_close(one, other)


def test_unmixed_is_the_symmetric_contrast_and_a_lone_item_has_none():
    a, b = draw(5, 4), draw(5, 4, seed=1)
    nobody = torch.arange(5)
    found = fn.m3co_loss(a, b, nobody, torch.ones(5), 0.5, accumulate_targets=True)
    expected = fn.clip(F.normalize(a), F.normalize(b), -torch.tensor(0.5, dtype=torch.float64).log())
    torch.testing.assert_close(found, expected)
    # As released, an unmixed sample that was drawn as its own partner has no target at all.
    assert fn.m3co_loss(a, b, nobody, torch.ones(5)).item() == 0
    one = draw(1, 4).requires_grad_()
    for loss in (
        fn.m3co_loss(one, draw(1, 4, seed=1), torch.tensor([0]), torch.tensor([0.3])),
        fn.multisclip_loss(one, draw(1, 4, seed=1)),
    ):
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert torch.autograd.grad(loss, one)[0].abs().max() < 1e-12


def test_gradients_are_right_and_a_zero_embedding_is_no_nan():
    perm, lam = torch.tensor([1, 2, 0, 3]), torch.tensor([0.2, 1.0, 0.7, 0.4], dtype=torch.float64)
    a, b = (draw(4, 3, seed=k).requires_grad_() for k in range(2))
    assert torch.autograd.gradcheck(lambda x, y: fn.m3co_loss(x, y, perm, lam, 0.5), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: fn.multisclip_loss(x, y, 0.5), (a, b))
    zero = torch.cat([torch.zeros(1, 3), torch.eye(3)]).requires_grad_()
    loss = fn.m3co_loss(zero, torch.eye(4, 3), perm, lam) + fn.multisclip_loss(zero, torch.eye(4, 3))
    loss.backward()
    assert loss.isfinite()
    assert zero.grad.isfinite().all()
    assert fn.m3co_loss(zero * torch.nan, torch.eye(4, 3), perm, lam).isnan()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.m3co_loss(draw(2, 3), draw(2, 4), torch.arange(2), torch.ones(2)), "mixed and fixed"),
        (lambda: fn.m3co_loss(draw(2, 3), draw(2, 3), torch.arange(3), torch.ones(2)), "perm and lam"),
        (lambda: fn.m3co_loss(draw(2, 3), draw(2, 3), torch.tensor([0, 2]), torch.ones(2)), r"perm must lie in 0\.\.1"),
        (lambda: fn.m3co_loss(draw(2, 3), draw(2, 3), torch.arange(2), torch.ones(2), 0.0), "temperature"),
        (lambda: fn.m3co_loss(draw(0, 3), draw(0, 3), torch.arange(0), torch.ones(0)), "empty batch"),
        (lambda: fn.multisclip_loss(draw(2, 3), draw(3, 3)), "preds and targs"),
        (lambda: fn.multisclip_loss(draw(2, 3), draw(2, 3), -1.0), "temperature"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_settings_that_make_no_sense_are_refused():
    for settings_, names in (
        ({"temperature": 0.0}, "temperature"),
        ({"beta": -1.0}, "beta"),
        ({"mixed_share": 2.0}, "mixed_share"),
        ({"hidden_layers": 0}, "hidden_layers"),
    ):
        with pytest.raises(CounterpointError, match=names):
            small(**settings_)
    with pytest.raises(CounterpointError, match="no classes"):
        M3CoL(small(), facts(3, 3, classes=0))


# ---------------------------------------------------------------------------------------------------------------- training


def batch_of(n: int, *dims: int) -> dict:
    names = ("first", "second", "third")[: len(dims)]
    return {
        "inputs": {name: draw(n, dim, seed=dim).float() for name, dim in zip(names, dims, strict=True)},
        "present": {name: torch.ones(n, dtype=torch.bool) for name in names},
        "label": torch.arange(n) % 3,
        "index": torch.arange(n),
    }


def test_mixtures_give_way_to_soft_targets_after_a_third():
    learner = M3CoL(small(epochs=10), facts(3, 4, classes=3))
    phases = []
    for epoch in range(10):
        learner.position = Position(epoch=epoch)
        phases.append(learner.phase())
    assert phases == ["m3co"] * 3 + ["multisclip"] * 7
    assert M3CoL(small(contrast="plain"), facts(3, 4, classes=3)).phase() == "plain"


def test_the_keys_are_mixed_only_if_asked():
    batch = batch_of(7, 3, 4)
    losses = {}
    for keys in (False, True):
        learner = M3CoL(small(mix_keys=keys, beta=1.0, mixed_probability=1.0), facts(3, 4, classes=3))
        prepared = learner.prepare(batch, torch.Generator().manual_seed(1))
        losses[keys] = learner.loss(prepared)["contrast"].item()
        z = learner.represent(batch)
        mixed = {}
        for name, drawn in prepared["mixes"].items():
            mixed[name] = drawn.lam[:, None] * z[name] + (1 - drawn.lam[:, None]) * z[name][drawn.permutation]
        other = mixed if keys else z
        expected = sum(fn.m3co_loss(mixed[a], other[b], *prepared["mixes"][a]) for a, b in itertools.permutations(z, 2))
        assert losses[keys] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[False] != losses[True]


def test_inputs_are_mixed_only_if_asked():
    batch = batch_of(7, 3, 4)
    learner = M3CoL(small(mix_inputs=True, beta=1.0, mixed_probability=1.0), facts(3, 4, classes=3))
    prepared = learner.prepare(batch, torch.Generator().manual_seed(1))
    z, mixed = learner.represent(batch), {}
    for name, drawn in prepared["mixes"].items():
        x, lam = batch["inputs"][name], drawn.lam[:, None]
        (mixed[name],) = learner.represent({"inputs": {name: lam * x + (1 - lam) * x[drawn.permutation]}}).values()
    expected = sum(fn.m3co_loss(mixed[a], z[b], *prepared["mixes"][a]) for a, b in itertools.permutations(z, 2))
    assert learner.loss(prepared)["contrast"].item() == pytest.approx(expected.item(), rel=1e-5)
    words = torch.arange(7)[:, None], torch.ones(7, 1, dtype=torch.bool)  # words cannot be mixed: their embeddings are
    drawn = prepared["mixes"]["first"]
    torch.testing.assert_close(
        learner.mixture("first", z["first"], words, drawn),
        torch.lerp(z["first"][drawn.permutation], z["first"], drawn.lam[:, None]),
    )


def test_what_lacks_a_modality_is_named():
    batch = batch_of(4, 3, 4)
    batch["present"]["second"][2] = False
    learner = M3CoL(small(), facts(3, 4, classes=3))
    with pytest.raises(CounterpointError, match="item 2 has no second"):
        learner.loss(batch | {"mixes": {}})


@pytest.mark.parametrize("arm", list(of_system("m3col").arms))
def test_every_arm_of_the_claim_learns(arm):
    claim = of_system("m3col")
    config = M3CoLConfig(**claim.setting | {"epochs": 6, "evaluate_every": 3} | claim.arms[arm])
    rows = Experiment.resolve("m3col", "latent-views", config=config).run(0)
    assert rows[-1]["train/fused"] < rows[0]["train/fused"]
    assert rows[-1]["test/accuracy"] > 0.25  # of five classes
    assert ("train/contrast" in rows[0]) == (config.contrast != "none")
    assert ("train/first" in rows[0]) == config.unimodal


@pytest.mark.usefixtures("drawn")
def test_pictures_and_captions_train_from_the_command_line(tmp_path, capsys):
    words = (
        f"train m3col --data digit-captions?train=96 --epochs 3 --batch-size 32 --image-encoder conv-s --embedding 32 \
        --evaluate-every 3 --out {tmp_path} --name run".split()
    )
    assert cli.main(words) == 0
    last = Run.open(tmp_path / "run").metrics()[-1]
    assert 0 <= last["test/accuracy"] <= 1
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(last["test/accuracy"])
