"""Audio-sheet retrieval: the authors' numbers, the card's identities and edges, several processes, both stages."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import over_processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from counterpoint.core import hinge
from counterpoint.core.distributed import Place
from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.encoders.snippets import SnippetEncoder
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, Interrupted
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment import audio_sheet_retrieval as room
from counterpoint.systems.alignment.audio_sheet_retrieval import (
    SYSTEM,
    AudioSheet,
    AudioSheetConfig,
    batch_hinge,
    mixed_nt_xent,
    nt_xent,
)
from counterpoint.tasks.aligned import AlignedTask
from counterpoint.tasks.measures import identification
from counterpoint.tasks.pieces import identify_pieces, retrieval_metrics
from counterpoint.views.images import normalise
from counterpoint.views.music import HOP, RATE

PARITY = np.load(Path(__file__).parents[1] / "parity" / "audio-sheet-retrieval.npz")
COUNTS = [4, 0, 3]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(m: int, n: int, dim: int = 4, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(F.normalize(torch.randn(m, n, dim, generator=g, dtype=torch.float64), dim=2))


def numbers(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PARITY[name])).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def written(x: torch.Tensor, y: torch.Tensor, margin: float) -> torch.Tensor:
    """Compute the hinge as the paper writes it, over the matrix."""
    s = x @ y.T
    terms = F.relu(margin - (s.diagonal()[:, None] - s))
    return terms[~torch.eye(len(s), dtype=torch.bool)].mean()


# ---------------------------------------------------------------------------------------------------------- the numbers

DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


@DTYPES
def test_hinge_equals_the_authors(dtype, rtol):
    x, y = (numbers(f"case0/in/{side}", dtype).requires_grad_() for side in ("sheet", "audio"))
    loss = batch_hinge(x, y, float(PARITY["case0/param/margin"]))
    loss.backward()
    close(loss.detach(), numbers("case0/out/loss"), rtol)
    close(x.grad, numbers("case0/grad/sheet"), rtol)
    close(y.grad, numbers("case0/grad/audio"), rtol)


@DTYPES
def test_nt_xent_equals_the_authors(dtype, rtol):
    z0, z1 = (numbers(f"case1/in/view{n}", dtype).requires_grad_() for n in (0, 1))
    loss = nt_xent(z0, z1, float(PARITY["case1/param/temperature"]))
    loss.backward()
    close(loss.detach(), numbers("case1/out/loss"), rtol)
    close(z0.grad, numbers("case1/grad/view0"), rtol)
    close(z1.grad, numbers("case1/grad/view1"), rtol)


@DTYPES
def test_encoder_equals_the_authors(dtype, rtol):
    network = nn.ModuleDict({"encoder": SnippetEncoder(92, 84, 3), "mlp_head": nn.Linear(800, 32)}).to(dtype)
    prefix = "case3/weight/"
    weights = {name.removeprefix(prefix): numbers(name, dtype) for name in PARITY if name.startswith(prefix)}
    missing, odd = network.load_state_dict(weights, strict=False)
    assert not odd
    assert all("running" in name or "tracked" in name for name in missing)
    x = numbers("case3/in/x", dtype)
    close(network["mlp_head"](network["encoder"](x)).detach(), numbers("case3/out/train_mode"), rtol)
    network.eval()
    found = network["mlp_head"](network["encoder"](x)).detach()
    close(found, numbers("case3/out/eval_after_one_train_step"), rtol)


@DTYPES
def test_metrics_equal_the_authors(dtype, rtol):
    found = retrieval_metrics(*(numbers(f"case4/in/{side}", dtype) for side in ("query", "database")))
    assert found.ranks.tolist() == PARITY["case4/out/ranks"].tolist()
    assert list(found.hits.values()) == PARITY["case4/out/hits_at_1_5_10_25"].tolist()
    assert found.mean_dist == pytest.approx(float(PARITY["case4/out/mean_dist"]), rel=rtol)
    for ours, theirs in ((found.mean_rank, "mean_rank"), (found.med_rank, "med_rank"), (found.map, "map")):
        assert ours == pytest.approx(float(PARITY[f"case4/out/{theirs}"]), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ the hinge


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 20), margin=st.floats(0.05, 1.5), seed=st.integers(0, 9999), tile=st.integers(1, 60))
def test_tiles_change_neither_the_hinge_nor_its_gradient(n, margin, seed, tile):
    x, y = (z.requires_grad_() for z in draw(2, n, 3, seed))
    kept, hinge.TILE = hinge.TILE, tile
    try:
        (2 * batch_hinge(x, y, margin)).backward()
        value = batch_hinge(x, y, margin)
    finally:
        hinge.TILE = kept
    a, b = (z.detach().requires_grad_() for z in (x, y))
    (2 * written(a, b, margin)).backward()
    torch.testing.assert_close(value, written(a, b, margin))
    torch.testing.assert_close((x.grad, y.grad), (a.grad, b.grad))


def test_equal_embeddings_have_the_margin_and_no_gradient_through_normalisation():
    h = torch.full((5, 3), 0.5, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(h, dim=1)
    loss = batch_hinge(unit, unit, 0.6)
    loss.backward()
    assert loss.item() == pytest.approx(0.6)
    assert float(h.grad.abs().max()) < 1e-15


def test_the_hinge_looks_one_way_and_stops_where_the_match_leads():
    x, y = draw(2, 6)
    assert not torch.allclose(batch_hinge(x, y, 0.6), batch_hinge(y, x, 0.6))
    apart = torch.eye(4, requires_grad=True)
    loss = batch_hinge(apart, torch.eye(4), 0.9)
    loss.backward()
    assert loss.item() == 0
    assert not apart.grad.any()
    half = [z.bfloat16() for z in draw(2, 6)]
    assert batch_hinge(*half, 0.6).dtype == torch.float32
    # Autocast would round the similarities to three digits.
    single = [z.float() for z in draw(2, 40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batch_hinge(*single, 0.6)
    torch.testing.assert_close(found, batch_hinge(*single, 0.6), rtol=1e-6, atol=0)


def test_losses_refuse_arguments_that_do_not_fit():
    x, y = draw(2, 5)
    with pytest.raises(ValueError, match="query and key need two pairs"):
        batch_hinge(x[:1], y[:1])
    with pytest.raises(ValueError, match="query and key must be"):
        batch_hinge(x, y[:4])
    with pytest.raises(ValueError, match="query is an empty batch"):
        batch_hinge(x[:0], y[:0])
    with pytest.raises(ValueError, match="margin must be a number, got nan"):
        batch_hinge(x, y, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        batch_hinge(x * torch.tensor([1.0, math.nan, 1, 1]), y)
    # An infinite row whose own similarity closes its hinges: nothing in the sum would tell.
    far, near = torch.tensor([[math.inf], [1.0]]), torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        batch_hinge(far, near)
    with pytest.raises(ValueError, match=r"of one floating type, got torch\.float64 and torch\.float32"):
        batch_hinge(x, y.float())
    with pytest.raises(ValueError, match="z1 or z2 holds NaN or infinite"):
        nt_xent(x * torch.tensor([1.0, math.nan, 1, 1]), y)
    with pytest.raises(ValueError, match="sheet1, sheet2, audio1 or audio2 holds NaN or infinite"):
        mixed_nt_xent(x, y, x * torch.tensor([1.0, math.nan, 1, 1]), y)
    with pytest.raises(ValueError, match="need two snippets"):
        nt_xent(x[:1], y[:1])
    # One in all, whichever process has it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "place", lambda rows, device: Place(0, 1, 1))
        patch.setattr(room, "world", lambda: (0, 2))
        with pytest.raises(ValueError, match="need two snippets"):
            nt_xent(x[:1], y[:1])
    with pytest.raises(ValueError, match="z1 and z2 must be"):
        nt_xent(x, y[:4])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nt_xent(x, y, 0)
    with pytest.raises(ValueError, match="sheet1 and audio1 must be of one width"):
        mixed_nt_xent(x, y, x[:, :2], y[:, :2])
    loss = batch_hinge(x.clone().requires_grad_(), y)
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)


# -------------------------------------------------------------------------------------------------------------- nt-xent


def test_nt_xent_is_the_cross_entropy_over_all_other_views():
    z0, z1 = draw(2, 6)
    z = torch.cat([z0, z1])
    s = (z @ z.T / 0.3).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    target = torch.arange(12).roll(6)
    torch.testing.assert_close(nt_xent(z0, z1, 0.3), F.cross_entropy(s, target))


def test_a_small_temperature_overflows_nothing():
    z0, z1 = (z.float() for z in draw(2, 6))
    z = torch.cat([z0, z1]).double()
    s = (z @ z.T / 0.005).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    torch.testing.assert_close(
        nt_xent(z0, z1, 0.005).double(), F.cross_entropy(s, torch.arange(12).roll(6)), rtol=1e-5, atol=0
    )


def test_mixed_makes_each_modality_the_other_s_negatives():
    a, b = draw(2, 4)
    c, d = draw(2, 3, seed=1)
    z = torch.cat([a, c, b, d])
    s = (z @ z.T / 0.6).masked_fill(torch.eye(14, dtype=torch.bool), -math.inf)
    torch.testing.assert_close(mixed_nt_xent(a, b, c, d), F.cross_entropy(s, torch.arange(14).roll(7)))
    apart = (nt_xent(a, b, 0.6) * 8 + nt_xent(c, d, 0.6) * 6) / 14
    assert mixed_nt_xent(a, b, c, d) > apart


# ----------------------------------------------------------------------------------------- retrieval and identification


def test_collapsed_embeddings_find_nothing():
    same = torch.ones(10, 3)
    found = retrieval_metrics(same, same)
    assert found.ranks.tolist() == [10] * 10
    assert found.hits[1] == 0
    with pytest.raises(ValueError, match="query and database must be"):
        retrieval_metrics(same, same[:3])
    for bad in (math.nan, math.inf):
        broken = torch.eye(10)
        broken[3, 2] = bad
        for found in (retrieval_metrics, lambda q, d: identify_pieces(q, d, torch.arange(10))):
            with pytest.raises(ValueError, match="query holds NaN or infinite values"):
                found(broken, torch.eye(10))
            # The nearest of all, as torch sorts it: every vote would go to its piece.
            with pytest.raises(ValueError, match="database holds NaN or infinite values"):
                found(torch.eye(10), broken)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), dim=st.integers(1, 5), seed=st.integers(0, 9999))
def test_metrics_are_those_of_the_sorted_distances(n, dim, seed):
    query, database = np.random.default_rng(seed).normal(size=(2, n, dim))
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (query, database)]
    distance = 1 - unit[0] @ unit[1].T
    found = retrieval_metrics(torch.from_numpy(query), torch.from_numpy(database))
    # Of equal distances, which one dimension is full of, all come before the match.
    ranks = (distance <= distance.diagonal()[:, None] + 1e-12).sum(1)
    assert found.ranks.tolist() == ranks.tolist()
    assert found.map == pytest.approx(np.mean(1 / ranks))
    assert found.med_rank == np.median(ranks)
    assert found.mean_rank == pytest.approx(ranks.mean())
    assert found.mean_dist == pytest.approx(distance.diagonal().mean(), abs=1e-12)
    assert found.hits == {k: int((ranks <= k).sum()) for k in (1, 5, 10, 25)}


def test_pieces_are_voted_for():
    g = torch.Generator().manual_seed(0)
    pieces = torch.tensor([5] * 40 + [2] * 40 + [9] * 40)
    centre = F.normalize(torch.randn(3, 8, generator=g), dim=1).repeat_interleave(40, 0)
    database = centre + 0.3 * torch.randn(120, 8, generator=g)
    query = centre[40:80] + 0.3 * torch.randn(40, 8, generator=g)
    found = identify_pieces(query, database, pieces)
    assert int(found.pieces[0]) == 2
    assert int(found.votes.sum()) == 40 * 25
    assert found.votes.tolist() == sorted(found.votes.tolist(), reverse=True)
    # Ten snippets, equally spaced, both ends among them.
    few = identify_pieces(query, database, pieces, neighbours=3, snippets=10)
    assert int(few.votes.sum()) == 30
    every = query[torch.linspace(0, 39, 10).round().long()]
    assert few.votes.tolist() == identify_pieces(every, database, pieces, neighbours=3).votes.tolist()
    # The measure of the task is the same vote, asked for all queries together.
    queries = F.normalize(centre + 0.9 * torch.randn(120, 8, generator=g), dim=1)
    unit = F.normalize(database, dim=1)
    ranks = []
    for piece in (2, 5, 9):
        told = identify_pieces(queries[pieces == piece], unit, pieces, neighbours=7)
        ranks.append(int(told.ranks[told.pieces == piece]))
    measured = identification(queries, unit, pieces, pieces, neighbours=7)
    assert measured["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_a_piece_without_a_vote_has_the_last_rank_there_is():
    database, pieces = torch.eye(4), torch.tensor([0, 1, 2, 3])
    found = identify_pieces(torch.eye(4)[:2], database, pieces, neighbours=1)
    assert sorted(found.pieces[:2].tolist()) == [0, 1]
    assert found.ranks.tolist() == [1, 2, 2, 2]
    for query, keys, names, options, message in (
        (torch.ones(2, 3), database, pieces, {}, "query and database must be"),
        (torch.ones(0, 4), database, pieces, {}, "a query and a piece"),
        (torch.eye(4), database, pieces[:3], {}, "a query and a piece"),
        (torch.eye(4), database, pieces, {"neighbours": 0}, "neighbours and snippets"),
    ):
        with pytest.raises(ValueError, match=message):
            identify_pieces(query, keys, names, **options)


# ---------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize(("height", "width", "dim"), [(92, 84, 800), (80, 100, 960), (92, 42, 320)])
def test_widths_are_the_card_s(height, width, dim):
    encoder = SnippetEncoder(height, width, 2)
    assert encoder.dim == dim
    assert encoder(torch.zeros(2, 1, height, width)).shape == (2, dim)


@pytest.mark.parametrize(("height", "width", "filters"), [(92, 84, 3), (80, 100, 2), (33, 18, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_is_its_layers_one_by_one(height, width, filters, training):
    torch.manual_seed(0)
    encoder = SnippetEncoder(height, width, filters).double().train(training)
    x = torch.randn(3, 1, height, width, dtype=torch.float64, requires_grad=True)

    def written(x):
        for block in (encoder.block1, encoder.block2, encoder.block3, encoder.block4):
            x = F.elu(block.bn1(block.conv1(x)))
            x = F.max_pool2d(F.elu(block.bn2(block.conv2(x))), 2)
        return encoder.bn(encoder.conv(x)).flatten(1)

    found, expected = encoder(x), written(x)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    ours, theirs = (torch.autograd.grad((z * weight).sum(), [x, *encoder.parameters()]) for z in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_an_encoder_needs_sixteen_by_sixteen():
    with pytest.raises(ValueError, match="16 x 16"):
        SnippetEncoder(92, 15)
    with pytest.raises(ValueError, match=r"x must be \[n, 1, 92, 32\], got \[2, 1, 92, 48\]"):
        SnippetEncoder(92, 32, 2)(torch.zeros(2, 1, 92, 48))


# ---------------------------------------------------------------------------------------------------- several processes


def losses():
    from counterpoint.core.cca import CCALayer

    def with_cca(x, y):
        layer = CCALayer(2)
        a, b = layer(x[:, :2], y[:, :2])
        return batch_hinge(F.normalize(a, dim=1), F.normalize(b, dim=1), 0.6)

    return {
        "hinge": (2, lambda x, y: batch_hinge(x, y, 0.6)),
        "hinge after cca": (2, with_cca),
        "nt_xent": (2, lambda x, y: nt_xent(x, y, 0.5)),
        "mixed": (4, mixed_nt_xent),
    }


def test_processes_together_have_the_losses_and_the_gradients_of_one(tmp_path):
    over_processes.check(losses, draw, COUNTS, tmp_path)


# ---------------------------------------------------------------------------------------------------------- the learner

SECONDS = 2 * 17 * HOP / RATE  # of an item: a snippet of 17 frames and its margins


@functools.cache
def made(
    n: int = 24, *, unpaired: bool = True, size: int = 120, rate: int = RATE, seconds: float = SECONDS
) -> AlignedData:
    """Draw dots at a height that follows a tone's pitch."""
    rng = np.random.default_rng(0)

    def split(n: int, presence=None) -> AlignedColumns:
        pitch = rng.random(n)
        pictures = np.full((n, size, size, 3), 255, np.uint8)
        for picture, p in zip(pictures, pitch, strict=True):
            row = int((0.25 + 0.5 * (1 - p)) * size)
            picture[row : row + 4, ::2] = 0
        at = np.arange(round(seconds * rate)) / rate
        waves = 0.3 * np.sin(2 * np.pi * 200 * 2 ** (3 * pitch[:, None]) * at) + rng.normal(0, 0.01, (n, len(at)))
        columns = {"sheet": ArrayImages(pictures), "audio": waves.astype(np.float32)}
        return AlignedColumns(columns, presence=presence, groups=np.arange(n) // 4)

    there = np.arange(20) % 2 == 0
    return AlignedData(
        name="made",
        train=split(n),
        valid=split(12),
        test=split(12),
        modalities={
            "sheet": Modality("image", size=size),
            "audio": Modality("audio", rate=rate, samples=round(seconds * rate)),
        },
        shifts={"real": split(8)},
        unpaired=split(20, {"sheet": there, "audio": ~there}) if unpaired else None,
    )


TINY = AudioSheetConfig(
    epochs=2,
    pretrain_epochs=2,
    batch_size=8,
    audio_batch=6,
    sheet_batch=4,
    embedding=3,
    filters=2,
    evaluate_every=1,
)


def learner_of(config: AudioSheetConfig, data: AlignedData, seed: int = 0) -> tuple[AudioSheet, AlignedTask]:
    task = AlignedTask(data, config)
    return AudioSheet(config, SimpleNamespace(**task.facts), seed), task


def begun(learner: AudioSheet, task: AlignedTask) -> None:
    """Bring a learner to where a fit's first step would find it."""
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)


def trained(config: AudioSheetConfig, data: AlignedData, **options):
    learner, task = learner_of(config, data)
    rows = fit(learner, task, evaluate_every=config.evaluate_every, bar=False, **options)
    return learner, rows


@pytest.mark.parametrize("pretrain", ["none", "audio", "sheet", "both", "mixed"])
def test_every_way_of_pretraining_trains(pretrain):
    config = replace(TINY, pretrain=pretrain, evaluate_every=10)
    before, _ = learner_of(config, made())
    learner, rows = trained(config, made())
    assert len(rows) == (2 if pretrain == "none" else 4)
    first = {
        "none": {"train/loss"},
        "audio": {"train/loss", "train/audio_contrast"},
        "sheet": {"train/loss", "train/sheet_contrast"},
        "both": {"train/loss", "train/audio_contrast", "train/sheet_contrast"},
        "mixed": {"train/loss"},
    }[pretrain]
    assert {name for name in rows[0] if name.startswith("train/")} == first
    assert {name for name in rows[-1] if name.startswith("train/")} == {"train/loss"}
    assert {"test/real_audio_to_sheet_mrr", "test/real_audio_to_sheet_group_accuracy"} <= set(rows[-1])
    assert set(learner.projections) == set(learner.pretrained)
    for name in ("sheet", "audio"):
        assert not torch.equal(before.heads[name].weight, learner.heads[name].weight)
    # All arms of a claim start from the same encoders and heads.
    plain, _ = learner_of(replace(config, pretrain="none"), made())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(before.state_dict()[key], value)


def test_stage_one_moves_only_the_pathways_it_trains_and_stage_two_starts_its_optimisers_anew():
    config = replace(TINY, pretrain="audio", epochs=1, pretrain_epochs=1)
    learner, task = learner_of(config, made())
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    seen: dict[str, object] = {}
    made_in: list[list[torch.optim.Optimizer]] = []

    class Watched(AudioSheet):
        def _turns(self, *arguments):
            turns = super()._turns(*arguments)
            made_in.append([o for turn in turns for o in turn.optimizers])
            return turns

        def before_step(self) -> None:
            super().before_step()
            if self.position.stage == 1 and self.position.step == 0:
                seen["anew"] = [len(o.state) for o in made_in[-1]]

        def end_epoch(self, epoch: int) -> None:
            super().end_epoch(epoch)
            if self.position.stage == 0:
                seen["moments"] = [len(o.state) for o in made_in[-1]]
                seen["state"] = {key: value.clone() for key, value in self.state_dict().items()}

    learner.__class__ = Watched
    rows = fit(learner, task, bar=False)
    assert len(made_in) == 2
    assert seen["moments"][0] == 0 < seen["moments"][1]
    assert seen["anew"] == [0, 0]
    assert [len(o.state) > 0 for o in made_in[1]] == [True, True]
    for key, value in seen["state"].items():
        if value.is_floating_point() and "running" not in key:
            still = key.startswith(("encoders.sheet", "heads.", "cca."))
            assert torch.equal(value, before[key]) == still, key
    assert len(rows) == 2
    assert not torch.equal(learner.encoders["sheet"].conv.weight, before["encoders.sheet.conv.weight"])


def test_learning_rates_follow_their_stage():
    config = replace(TINY, audio_lr=2e-3, sheet_lr=1e-3, lr=4e-3, epochs=4, pretrain_epochs=4)
    learner, _ = learner_of(config, made())
    rates = []
    for stage in learner.stages():
        learner.epochs = stage.epochs
        (turn,) = (stage.turns or learner.turns)()
        for _ in range(4):
            rates.append([o.param_groups[0]["lr"] for o in turn.optimizers])
            for o, s in zip(turn.optimizers, turn.schedules, strict=True):
                o.step()
                s.step()
    rates.append([o.param_groups[0]["lr"] for o in turn.optimizers])
    assert rates[0] == pytest.approx([1e-3 * 4 / 256, 2e-3 * 6 / 256])
    assert rates[2] == pytest.approx([0.5 * r for r in rates[0]])
    assert rates[4] == pytest.approx([4e-3 * 8 / 256] * 2)
    assert rates[6] == pytest.approx([2e-3 * 8 / 256] * 2)
    assert rates[8] == pytest.approx([0, 0])
    steady, _ = learner_of(replace(config, constant_lr=True), made())
    steady.epochs = 4
    (turn,) = steady.stages()[0].turns()
    for o, s in zip(turn.optimizers, turn.schedules, strict=True):
        o.step()
        s.step()
    assert [o.param_groups[0]["lr"] for o in turn.optimizers] == pytest.approx(rates[0])


def test_stage_one_takes_unpaired_items_and_training_items_where_there_are_none():
    data = made()
    learner, task = learner_of(TINY, data)
    begun(learner, task)
    assert learner.pools["sheet"].rows.tolist() == list(range(0, 20, 2))
    assert learner.pools["audio"].rows.tolist() == list(range(1, 20, 2))
    views = learner.prepare({}, torch.Generator().manual_seed(0))["views"]
    assert [len(view) for view in views["sheet"]] == [4, 4]
    assert [tuple(view.shape) for view in views["audio"]] == [(6, 1, 92, 17)] * 2
    again = learner.prepare({}, torch.Generator().manual_seed(0))["views"]
    torch.testing.assert_close(views, again)
    learner, task = learner_of(TINY, made(unpaired=False))
    begun(learner, task)
    assert learner.pools["audio"].split is task.data.train
    assert len(learner.pools["sheet"].rows) == 24


def test_cca_is_fitted_on_training_pairs_before_it_is_measured():
    learner, rows = trained(replace(TINY, pretrain="none"), made())
    task = AlignedTask(made(), TINY)
    batch = task.evaluation_batch(task.data.train, range(24))
    learner.eval()
    with torch.no_grad():
        h = [learner.output(name, learner.seen(name, batch["inputs"][name])) for name in ("sheet", "audio")]
        z = learner.predict(batch)["embedding"]
    from counterpoint.core.cca import canonical_projections

    found = canonical_projections(*h, TINY.regulariser)
    torch.testing.assert_close(learner.cca.u, found.u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.cca.mean2, found.mean2, rtol=1e-4, atol=1e-5)
    expected = F.normalize((h[0].double() - found.mean1) @ found.u, dim=1)
    torch.testing.assert_close(z["sheet"].double(), expected, rtol=1e-4, atol=1e-5)
    assert learner_of(replace(TINY, cca=False), made())[0].cca is None
    assert "valid/audio_to_sheet_mrr" in rows[0]
    assert "test/audio_to_sheet_mrr" in rows[-1]


# Two epochs of three steps, then one.
STAGES = replace(TINY, epochs=1, pretrain_epochs=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_ = Run.create(tmp_path_factory.mktemp("runs"), {"slug": SYSTEM.slug}, "whole")
    trained(STAGES, made(), run=run_)
    return run_


@pytest.mark.parametrize(
    "at",
    [
        1,
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(6, marks=pytest.mark.slow),
        pytest.param(7, marks=pytest.mark.slow),
        8,
    ],
)  # in stage 1, as it ends, as stage 2 begins, in stage 2
def test_interrupted_in_either_stage_or_between_it_ends_the_same(at, uninterrupted, tmp_path, monkeypatch):
    calls, stop, loss = 0, at - 1, AudioSheet.loss

    def counted(self, batch):
        nonlocal calls
        if calls == stop:
            os.kill(os.getpid(), signal.SIGINT)
        calls += 1
        return loss(self, batch)

    monkeypatch.setattr(AudioSheet, "loss", counted)
    halves = Run.create(tmp_path, {"slug": SYSTEM.slug}, "halves")
    with pytest.raises(Interrupted):
        trained(STAGES, made(), run=halves)
    assert calls == at
    trained(STAGES, made(), run=halves)
    assert calls == 9
    assert uninterrupted.metrics() == halves.metrics()
    theirs = halves.load_weights()
    for name, value in uninterrupted.load_weights().items():
        assert torch.equal(value, theirs[name]), name


def test_an_export_has_no_projection_heads_and_loads(tmp_path):
    run_ = Run.create(tmp_path, {"slug": SYSTEM.slug}, "run")
    learner, _ = trained(TINY, made(), run=run_)
    weights = run_.load_weights()
    assert not [name for name in weights if name.startswith("projections")]
    other, task = learner_of(TINY, made(), seed=1)
    other.load_state_dict(weights)
    batch = task.evaluation_batch(task.data.test, range(12))
    with torch.no_grad():
        torch.testing.assert_close(other.eval().predict(batch), learner.eval().predict(batch))
    del weights["heads.sheet.weight"]
    with pytest.raises(RuntimeError, match=r"heads\.sheet\.weight"):
        other.load_state_dict(weights)


@pytest.mark.parametrize("vary", [True, False])
def test_data_of_the_user_s_own_of_any_size_and_rate(vary):
    data = made(unpaired=False, size=64, rate=16000, seconds=17 * HOP / RATE)
    config = replace(TINY, margins=False, vary_pairs=vary, pretrain_epochs=1, epochs=1)
    learner, rows = trained(config, data)
    assert learner.items["audio"].frames == 17
    assert math.isfinite(rows[-1]["test/audio_to_sheet_mrr"])
    pictures = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    pictures[:, :, 16:32] = 0
    window = learner.items["sheet"].windows(pictures)
    assert bool((window[:, :, :20] == 1).all())
    seen = learner.seen("sheet", normalise(pictures))
    assert seen.shape == (1, 1, 80, 100)
    torch.testing.assert_close(seen, window[:, :, 20:100, 10:110], atol=1e-5, rtol=0)
    assert float(seen[0, 0, 30].max()) < 1e-3
    # With margins, windows of another size are brought to the size of windows.
    learner, _ = learner_of(TINY, made(size=60))
    assert learner.items["sheet"].windows(torch.full((1, 3, 60, 60), 255, dtype=torch.uint8)).shape == (1, 1, 120, 120)


def test_missing_modalities_leave_the_pair_out():
    data = made()
    rng = np.random.default_rng(1)
    columns = data.train.columns
    presence = {"sheet": rng.random(24) < 0.8, "audio": rng.random(24) < 0.8}
    half = replace(data, train=AlignedColumns(columns, presence=presence))
    learner, rows = trained(replace(TINY, pretrain="none", batch_size=12), half)
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    batch = AlignedTask(half, TINY).evaluation_batch(half.train, range(24))
    z = learner.eval().predict(batch)["embedding"]
    assert not z["sheet"][~torch.from_numpy(presence["sheet"])].any()
    none = replace(
        data, train=AlignedColumns(columns, presence={"sheet": np.arange(24) < 12, "audio": np.arange(24) >= 12})
    )
    with pytest.raises(CounterpointError, match="0 whole pairs, 4 are needed"):
        trained(replace(TINY, pretrain="none"), none)


def test_settings_that_do_not_fit_raise_an_error():
    for changes, message in (
        ({"batch_size": 3}, "CCA needs batches larger than the embedding's 3 dimensions"),
        ({"audio_batch": 1}, "audio_batch must be at least 2, or 0"),
        ({"margin": 0}, "margin must lie in 0..2"),
        ({"sheet_temperature": 0}, "sheet_temperature must be > 0"),
        ({"pretrain_epochs": 0}, "pretrain_epochs must be at least 1, got 0"),
        ({"pretrain": "sheets"}, "unknown pretrain 'sheets'; did you mean sheet"),
    ):
        with pytest.raises(CounterpointError, match=message):
            replace(TINY, **changes)
    assert replace(TINY, batch_size=3, cca=False).cca is False
    spec = {"sheet": {"kind": "image", "size": 120}, "text": {"kind": "text"}}
    with pytest.raises(
        CounterpointError, match=r"one image and one audio modality, the data has sheet \(image\), text"
    ):
        AudioSheet(TINY, SimpleNamespace(modalities=spec, tokenizers={}))
    with pytest.raises(CounterpointError, match=r"16 frames, 0\.8 seconds, at least; these have 0\.40 seconds"):
        learner_of(TINY, made(seconds=0.8))
    data = made()
    only = replace(data, unpaired=AlignedColumns(data.unpaired.columns, presence={"sheet": np.arange(20) < 1}))
    learner, task = learner_of(TINY, only)
    with pytest.raises(DataError, match="has 1 item of sheet to pre-train on"):
        begun(learner, task)
    learner, task = learner_of(TINY, data)
    begun(learner, task)
    with torch.no_grad():
        learner.projections["sheet"][0].weight.fill_(math.nan)
    with pytest.raises(CounterpointError, match="embeddings of sheet hold NaN"):
        learner.loss(learner.prepare({}, torch.Generator()))


def test_the_record_shows_what_the_setting_of_cca_says():
    record = json.loads((Path(__file__).parents[2] / "results" / "claims" / f"{SYSTEM.slug}.json").read_text())
    cca = record["variants"]["cca"]
    assert (cca["setting"]["batch_size"], AudioSheetConfig().embedding) == (96, 32)
    with_it, without = (
        np.mean([run["audio_to_sheet_mrr"] for run in part["results"]["none"].values()]) for part in (cca, record)
    )
    assert with_it < without / 3


def test_the_claim_s_arms_have_settings_that_exist():
    claim = of_system(SYSTEM.slug)
    for one in (claim, *claim.variants.values()):
        for arm in one.arms:
            AudioSheetConfig(**one.settings(arm))
            AudioSheetConfig(**one.settings(arm, quick=True))
    assert claim.conjuncts[0].arm == "both"
    for recipe in (SYSTEM.recipe, *SYSTEM.recipes.values()):
        AudioSheetConfig(**recipe)
