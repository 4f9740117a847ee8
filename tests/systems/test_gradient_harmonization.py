"""Gradient harmonization: the reference numbers, the card's identities, unit by unit against brute force, edges, training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from counterpoint import cli
from counterpoint import functional as fn
from counterpoint.core.world import leave, over
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment.gradient_harmonization import Harmonization, HarmonizationConfig

PARITY = np.load(Path(__file__).parents[1] / "parity" / "gradient-harmonization.npz")
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def number(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PARITY[name])).to(dtype)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_realigned_gradients_equal_the_reference(case, dtype, rtol):
    g1, g2 = (number(f"{case}/in/{name}", dtype) for name in ("grad_va", "grad_vt"))
    merged = fn.realign(g1, g2)
    close(merged, number(f"{case}/out/merged_mean"), rtol)
    assert ((g1 @ g2) < 0) == (case == "case0")
    close(fn.realign(g1, g2, reduction="sum"), 2 * number(f"{case}/out/merged_mean"), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_a_network_with_two_heads_equals_the_reference(dtype, rtol):
    weights = {k.removeprefix("case2/weight/"): number(k, dtype) for k in PARITY if k.startswith("case2/weight/")}
    for weight in weights.values():
        weight.requires_grad_()
    x, *targets = (number(f"case2/in/{name}", dtype) for name in ("x", "y1", "y2"))
    hidden = torch.tanh(F.linear(x, weights["shared.weight"], weights["shared.bias"]))
    flat, losses = [], []
    for n, target in enumerate(targets, 1):
        loss = F.mse_loss(F.linear(hidden, weights[f"head{n}.weight"], weights[f"head{n}.bias"]), target)
        close(loss.detach(), number(f"case2/out/loss{n}"), rtol)
        losses.append(loss)
        parts = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, materialize_grads=True)
        flat.append(torch.cat([part.flatten() for part in parts]))
    shared = torch.cat([torch.full((w.numel(),), name.startswith("shared")) for name, w in weights.items()])
    close((flat[0] * flat[1])[shared].sum(), number("case2/out/shared_dot"), rtol)
    merged = fn.realign(*flat, shared=shared)
    for (name, weight), part in zip(weights.items(), merged.split([w.numel() for w in weights.values()]), strict=True):
        close(part.view_as(weight), number(f"case2/out/grad.{name}"), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_mil_nce_equals_the_reference(dtype, rtol):
    video, text = (number(f"case3/in/{name}_embed", dtype).requires_grad_() for name in ("video", "text"))
    loss = fn.mil_nce(video, text)
    loss.backward()
    close(loss.detach(), number("case3/out/loss"), rtol)
    close(video.grad, number("case3/grad/video_embed"), rtol)
    close(text.grad, number("case3/grad/text_embed"), rtol)


# --------------------------------------------------------------------------------------------------- identities and edges


def test_the_threshold_rises_in_a_straight_line():
    found = [fn.curriculum_threshold(step, 4) for step in range(4)]
    assert found == pytest.approx([-0.3, -0.2, -0.1, 0.0])
    assert fn.curriculum_threshold(0, 1) == 0


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.curriculum_threshold(3, 3), "step"),
        (lambda: fn.curriculum_threshold(0, 3, -2.0), "start"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()


# ------------------------------------------------------------------------------------------ the learner against brute force

NAMES = ("video", "audio", "text")
SMALL = {"tokens": 6, "hidden": 7, "embedding": 5, "batch_size": 8, "chunk": 3, "temperature": 0.3}
PLAIN = {"heads": "none", "objective": "info-nce", "vector_encoder": "as-is"}


def learner(**options) -> Harmonization:
    """Return a learner as if in the middle of a training."""
    facts = SimpleNamespace(modalities={n: {"kind": "vector", "dim": 4} for n in NAMES}, tokenizers={}, classes=0)
    found = Harmonization(HarmonizationConfig(**SMALL | {"vector_encoder": "as-is"} | options), facts).double()
    found.position, found.total_steps = Position(step=2), 5
    return found


def batch_of(n: int = 8, missing: dict[str, list[int]] | None = None) -> dict:
    present = {name: torch.ones(n, dtype=torch.bool) for name in NAMES}
    for name, rows in (missing or {}).items():
        present[name][rows] = False
    inputs = {name: draw(n, 4, seed=k) + draw(n, 4, seed=9) for k, name in enumerate(NAMES)}
    return {
        "inputs": {name: x * present[name][:, None] for name, x in inputs.items()},
        "present": present,
        "index": torch.arange(n),
    }


def one_by_one(system: Harmonization, batch: dict, unit: list[int]) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Compute the gradients the card asks for, from each unit's two losses taken by themselves."""
    config = system.config
    backbone = dict(system.backbone.named_parameters(prefix="backbone"))
    weights = dict(system.named_parameters())
    units = max(unit) + 1
    each, there = [], []
    va, vt = system.spaces(batch["inputs"])
    for space, other in ((va, "audio"), (vt, "text")):
        q, k = space["video"] / config.temperature, space[other]
        asks, answers = batch["present"]["video"], batch["present"][other]
        s = (q @ k.T).masked_fill(~(asks[:, None] & answers[None]), -1e9)
        if config.objective == "info-nce":
            loss = (s.logsumexp(1) + s.logsumexp(0)) / 2 - s.diagonal()
        else:
            loss = torch.cat([s, s.T], 1).logsumexp(1) - s.diagonal()
        each.append(loss)
        there.append(asks & answers)
    kept, sums, counts = [], [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2)], [0, 0]
    for number_ in range(units):
        rows = [i for i, u in enumerate(unit) if u == number_]
        mine = [[i for i in rows if there[n][i]] for n in range(2)]
        gradients = []
        for n in range(2):
            mean = each[n][mine[n]].sum() / max(1, len(mine[n]))
            parts = torch.autograd.grad(mean, list(weights.values()), retain_graph=True, materialize_grads=True)
            gradients.append(dict(zip(weights, parts, strict=True)))
        flat = [torch.cat([g[name].flatten() for name in backbone]) for g in gradients]
        whole = all(x.norm() > 0 for x in flat)
        cosine = fn.gradient_cosine(*flat)
        keep = not config.curriculum or not whole or bool(cosine > system.threshold)
        kept.append(keep)
        if not keep:
            continue
        h = fn.realigned(*flat) if config.realign else flat
        for n in range(2):
            counts[n] += len(mine[n])
            parts = dict(zip(backbone, h[n].split([w.numel() for w in backbone.values()]), strict=True))
            for name, total in sums[n].items():
                g = parts[name].view_as(total) if name in parts else gradients[n][name]
                total += len(mine[n]) * g
    return {name: sum(sums[n][name] / max(1, counts[n]) for n in range(2)) / 2 for name in weights}, kept


@pytest.mark.parametrize("side", ["audio", "text"])
def test_the_losses_are_mil_nce_of_the_embeddings(side):
    system = learner(curriculum=False, realign=False, statistics=False)
    for missing in ({}, {side: [1, 4]}):
        batch = batch_of(missing=missing)
        second, third = system.spaces(batch["inputs"])
        space = second if side == "audio" else third
        expected = fn.mil_nce(space["video"] / 0.3, space[side], batch["present"][side])
        torch.testing.assert_close(system.loss(batch)[f"video_{side}"], expected)


@pytest.mark.parametrize("missing", [None, {"audio": [1, 4, 7], "text": [4, 6], "video": [0]}])
@pytest.mark.parametrize("unit", ["sample", "microbatch"])
@pytest.mark.parametrize(
    "options",
    [
        PLAIN | {"curriculum": False},
        PLAIN | {"realign": False},
        PLAIN,
        {},
        {"curriculum": False},
        PLAIN | {"curriculum": False, "realign": False},
        PLAIN | {"curriculum": False, "realign": False, "statistics": False},
    ],
)
def test_one_backward_pass_gives_what_units_one_by_one_do(options, unit, missing):
    options = options | {"unit": unit, "micro_batch": 2, "threshold_start": -0.6, "threshold_end": 0.2}
    system, batch = learner(**options), batch_of(missing=missing)
    numbers = list(range(8)) if unit == "sample" else [i // 2 for i in range(8)]
    expected, kept = one_by_one(system, batch, numbers)
    losses = system.loss(batch)
    losses["loss"].backward()
    for name, weight in system.named_parameters():
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(
            found, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    if system.config.curriculum:
        assert losses["kept"].item() == pytest.approx(np.mean(kept))
        assert losses["threshold"].item() == pytest.approx(-0.2)
    assert ("conflict" in losses) == system.config.statistics
    assert all(value.isfinite() for value in losses.values())


def test_some_units_conflict_in_these_tests():
    losses = learner(**PLAIN).loss(batch_of())
    assert 0 < losses["conflict"] < 1
    assert losses["video_audio"] > 0
    assert losses["video_text"] > 0


def test_realignment_leaves_the_value_of_the_loss():
    plain, real = (learner(**PLAIN, curriculum=False, realign=on).loss(batch_of())["loss"] for on in (False, True))
    torch.testing.assert_close(plain, real)


def test_the_proxy_compares_embeddings():
    system = learner(**PLAIN, gradients="embedding", curriculum=False)
    losses = system.loss(batch_of())
    losses["loss"].backward()
    assert 0 <= losses["conflict"] <= 1
    assert all(weight.grad.isfinite().all() for weight in system.parameters())


def test_without_a_kept_unit_nothing_moves():
    system = learner(**PLAIN, threshold_start=1.0, threshold_end=1.0)
    losses = system.loss(batch_of())
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert losses["kept"] == 0
    system.before_step()
    assert all(weight.grad is None for weight in system.parameters())


def test_what_lacks_a_modality_is_kept_and_a_batch_of_one_has_no_gradient():
    system = learner(**PLAIN, threshold_start=1.0, threshold_end=1.0)
    losses = system.loss(batch_of(missing={"audio": [2], "text": [5]}))
    assert losses["kept"].item() == pytest.approx(2 / 8)
    nothing = learner(**PLAIN).loss(batch_of(missing={"audio": list(range(8)), "text": list(range(8))}))
    nothing["loss"].backward()
    assert nothing["loss"] == 0
    alone = learner(**{**PLAIN, "objective": "mil-nce"}).loss(batch_of(1))
    assert alone["loss"].item() == pytest.approx(math.log(2))
    assert alone["conflict"] == 0


def test_nan_is_an_error():
    batch = batch_of()
    batch["inputs"]["video"][3] = math.nan
    with pytest.raises(CounterpointError, match="NaN"):
        learner(**PLAIN).loss(batch)


def test_settings_and_data_that_make_no_sense_are_refused():
    for options, names in (
        ({"threshold_start": 0.5}, "threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"unit": "microbatch", "micro_batch": 3}, "micro_batch"),
        ({"chunk": 0}, "chunk"),
    ):
        with pytest.raises(CounterpointError, match=names):
            HarmonizationConfig(**{"batch_size": 8} | options)
    with pytest.raises(CounterpointError, match="--first sound is none of them"):
        learner(first="sound")
    two = SimpleNamespace(modalities={n: {"kind": "vector", "dim": 4} for n in NAMES[:2]}, tokenizers={}, classes=0)
    with pytest.raises(CounterpointError, match="the data has video, audio"):
        Harmonization(HarmonizationConfig(**SMALL), two)


def test_the_first_modality_can_be_named():
    system = learner(first="text", **PLAIN)
    assert set(system.loss(batch_of())) >= {"text_video", "text_audio"}


def test_two_spaces_side_by_side_have_the_similarities_of_each():
    system = learner().eval()
    batch = batch_of()
    second, third = system.spaces(batch["inputs"])
    found = system.predict(batch)["embedding"]
    for x in found.values():
        torch.testing.assert_close(x.norm(dim=1), torch.ones(8, dtype=torch.float64))
    similarity = second["video"] @ second["audio"].T + third["video"] @ third["audio"].T
    torch.testing.assert_close(found["video"] @ found["audio"].T, similarity / 2)
    torch.testing.assert_close(found["video"] @ found["text"].T, third["video"] @ third["text"].T / 2**0.5)


# ---------------------------------------------------------------------------------------------------------------- training


def test_conflict_marks_what_does_not_belong_together(tmp_path, capsys):
    words = (
        f"train gradient-harmonization --data noisy-triplets?train=800&test=200 --epochs 3 --out {tmp_path} --name run"
    )
    assert cli.main(words.split()) == 0
    run = Run.open(tmp_path / "run")
    first, *_, last = run.metrics()
    assert last["train/video_audio"] < first["train/video_audio"]
    assert last["test/misaligned_auc"] > 0.7
    assert 0.2 < last["train/conflict"] < 0.8
    assert last["train/kept"] < first["train/kept"] < 1
    assert last["test/to_video_r10"] > 0.3
    assert "conflict from" in (tmp_path / "run" / "report.html").read_text()  # the caption of the curve
    capsys.readouterr()
    assert cli.main(["evaluate", str(run.path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["misaligned_auc"] == pytest.approx(last["test/misaligned_auc"])
    assert again["to_video_r10"] == pytest.approx(last["test/to_video_r10"])


def test_every_arm_of_the_claim_has_valid_settings():
    claim = of_system("gradient-harmonization")
    for arm in claim.arms:
        HarmonizationConfig(**claim.settings(arm))


# ------------------------------------------------------------------------------------------------------- several processes

BATCH = 7  # uneven shares


def _step(share: slice) -> list[tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]]:
    found = []
    for options in (PLAIN, PLAIN | {"unit": "microbatch", "micro_batch": 2}):
        system = learner(**options)
        system.misaligned = torch.arange(BATCH) % 2 == 0
        whole = batch_of(BATCH, {"audio": [1], "text": [4]})
        batch = {
            key: value[share] if isinstance(value, torch.Tensor) else {n: x[share] for n, x in value.items()}
            for key, value in whole.items()
        }
        losses = system.loss(batch)
        losses["loss"].backward()
        found.append(
            (
                {name: value.detach() for name, value in losses.items()},
                [weight.grad for weight in system.parameters()],
                system.roc.counts,
            )
        )
    return found


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with over("world"):
        torch.save(_step(slice(rank, None, size)), f"{folder}/{rank}.pt")
    leave()


def test_processes_together_take_the_step_of_one(tmp_path):
    mp.start_processes(_process, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number_, (losses, gradients, counts) in enumerate(_step(slice(None))):
        for part in parts:
            torch.testing.assert_close(part[number_][0], losses, rtol=1e-9, atol=1e-12)
            assert torch.equal(part[number_][2], counts)
        # The engine averages.
        mean = [(a + b) / 2 for a, b in zip(*(part[number_][1] for part in parts), strict=True)]
        torch.testing.assert_close(mean, gradients, rtol=1e-9, atol=1e-12)
