"""CLHE: the authors' numbers, identities, missing features, views of bundles, baselines, resuming, processes, sources, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.data import load
from counterpoint.encoders import items
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.recommendation import clhe
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "clhe.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "themed-bundles?items=40&train=30&test=12&size=5"
SMALL = {"dim": 8, "length": 8, "batch_size": 10, "epochs": 2, "evaluate_every": 2}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(name: str, dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(np.asarray(PARITY[name]))
    return found.to(dtype) if found.is_floating_point() else found


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("clhe", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
def test_the_whole_model_equals_the_authors(dtype, rtol):
    names = ("content", "text", "cf", "cold_cf", "membership", "seq_full", "seq_partial")
    start = "case0/weight/"
    weights = {key.removeprefix(start): given(key, dtype) for key in PARITY if key.startswith(start)}
    found = fn.clhe_forward(*(given(f"case0/in/{name}", dtype) for name in names), weights, 0.5, 0.1, 0.05, 2.0, True)
    for name, value in found.items():
        wanted = given(f"case0/out/{name}", dtype)
        # The file has tables and vectors in float32.
        close = rtol if not value.ndim else 2e-6
        torch.testing.assert_close(value, wanted, rtol=close, atol=close * float(wanted.abs().max()), msg=name)


@TYPES
def test_parts_and_gradients_equal_the_authors(dtype, rtol):
    at = {
        name: given(f"case1/in/{name}", dtype)
        for name in ("modal", "tokens", "token_pad", "a", "b", "logits", "targets")
    }
    of = {name: given(f"case1/weight/{name}", dtype) for name in ("fuse.w_q", "fuse.w_k", "bundle.w_q", "bundle.w_k")}
    fused = fn.modality_fusion(at["modal"], of["fuse.w_q"], of["fuse.w_k"])
    torch.testing.assert_close(fused, given("case1/out/fused", dtype), rtol=2e-6, atol=2e-6)
    pooled = fn.set_attention_pool(at["tokens"], at["token_pad"].bool(), of["bundle.w_q"], of["bundle.w_k"])
    torch.testing.assert_close(pooled, given("case1/out/bundle", dtype), rtol=1e-5, atol=1e-5)
    temperature = float(PARITY["case1/param/temperature"])
    contrast = fn.one_way_infonce(at["a"].requires_grad_(), at["b"], temperature)
    recon = fn.multinomial_nll(at["logits"].requires_grad_(), at["targets"])
    for name, value, leaf in (("one_way_infonce", contrast, "a"), ("multinomial", recon, "logits")):
        assert value.item() == pytest.approx(float(PARITY[f"case1/out/{name}"]), rel=rtol)
        value.backward()
        wanted = given(f"case1/grad/{leaf}", dtype)
        torch.testing.assert_close(at[leaf].grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_padding_and_order_do_not_change_a_set_and_an_empty_one_is_zero():
    x, w = draw(0, 2, 4, 8), [draw(1, 8, 8), draw(2, 8, 8)]
    pad = torch.tensor([[False, False, True, True], [True] * 4])
    found = fn.set_attention_pool(x, pad, *w)
    changed = x.clone()
    changed[0, 2:] = 7.0
    torch.testing.assert_close(fn.set_attention_pool(changed, pad, *w), found)
    torch.testing.assert_close(fn.set_attention_pool(x[:1, [1, 0]], pad[:1, :2], *w)[0], found[0])
    assert (found[1] == 0).all()


def test_identities_of_equal_single_and_zero_rows():
    same = torch.ones(6, 3, dtype=torch.float64)
    assert float(fn.one_way_infonce(same, same, 0.5)) == pytest.approx(math.log(6))
    assert float(fn.one_way_infonce(draw(0, 1, 4), draw(1, 1, 4), 0.1)) == pytest.approx(0, abs=1e-12)
    tokens = torch.zeros(2, 3, 8, dtype=torch.float64, requires_grad=True)
    out = fn.modality_fusion(tokens, draw(1, 8, 8), draw(2, 8, 8))
    out.sum().backward()
    assert (out == 0).all()
    assert tokens.grad.isfinite().all()


def test_a_set_without_items_does_not_count():
    logits, targets = draw(0, 3, 5), torch.tensor([[1.0, 0, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1.0]]).double()
    wanted = F.cross_entropy(logits[[0, 2]], targets[[0, 2]] / targets[[0, 2]].sum(1, keepdim=True))
    torch.testing.assert_close(fn.multinomial_nll(logits, targets), wanted)


def test_an_own_mask_leaves_dropped_items_out():
    start = "case0/weight/"
    weights = {key.removeprefix(start): given(key, torch.float64) for key in PARITY if key.startswith(start)}
    names = ("content", "text", "cf", "cold_cf", "membership", "seq_full")
    at = [given(f"case0/in/{name}", torch.float64) for name in names]
    found = fn.clhe_forward(*at, at[-1], weights)
    torch.testing.assert_close(found["bundle"], found["bundle_partial"])
    smaller = fn.clhe_forward(*at, given("case0/in/seq_partial", torch.float64), weights)
    quirk = fn.clhe_forward(*at, given("case0/in/seq_partial", torch.float64), weights, partial_uses_full_mask=True)
    assert not torch.allclose(smaller["bundle_partial"], quirk["bundle_partial"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.one_way_infonce(x, x[:2]), "a and b must be"),
        (lambda x: fn.one_way_infonce(x, x, 0.0), "temperature"),
        (lambda x: fn.multinomial_nll(x, x[:, :2]), "logits and targets must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3))


# ----------------------------------------------------------------------------------------------------------- the learner


def prepared(**settings):
    learner, task = built(**settings)
    learner.begin(Survey(task, learner))
    batch = next(iter(task.train_loader(0, Position())))
    return learner, learner.prepare(batch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("views", "kept"), [("drop", 0.5), ("replace", 0.5), ("drop", 1.0), ("drop", 1.4), ("drop", 0.01)]
)
def test_views_of_bundles_keep_their_share(views, kept):
    learner, batch = prepared(bundle_views=views, kept=kept)
    for ids, view, n in zip(batch["ids"], batch["view"], batch["lengths"].tolist(), strict=True):
        mine, found = set(ids[ids > 0].tolist()), view[view > 0].tolist()
        many = n if kept >= 1 else min(n - 1, max(1, round(kept * n + 0.5)))
        assert len(set(found[:many]) & mine) == many
        assert len(found) == {0.5: n if views == "replace" else many, 1.0: n, 1.4: n + round(0.4 * n), 0.01: 1}[kept]
        assert max(found) <= len(learner.cold)


def test_a_step_trains_by_the_functions_that_equal_the_authors(monkeypatch):
    called = set()
    wanted = {
        "modality_fusion": items,
        "set_attention_pool": clhe,
        "one_way_infonce": clhe,
        "multinomial_nll": clhe,
        "item_vectors": items,
    }
    for name, module in wanted.items():
        real = getattr(module, name)

        def spied(*arguments, real=real, name=name, **more):
            called.add(name)
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, spied)
    learner, task = built(epochs=1)
    before = {name: value.clone() for name, value in learner.named_parameters()}
    fit(learner, task, bar=False)
    assert called == set(wanted)
    still = {name for name, value in learner.named_parameters() if torch.equal(before[name], value)}
    assert still == {"projector.weight", "projector.bias"}  # these views of items have no projection


@pytest.mark.parametrize(
    ("settings", "scalars"),
    [
        ({"item_weight": 0.0, "bundle_weight": 0.0, "sources": "none"}, set()),
        ({"item_views": "dropout", "bundle_weight": 0.0}, {"items"}),
        ({"item_views": "noise", "bundle_views": "replace"}, {"items", "bundles"}),
        ({"item_views": "same", "sources": "cf", "train_bundle_attention": False}, {"items", "bundles"}),
    ],
)
def test_baselines_and_variants_are_settings(settings, scalars):
    learner, task = built(**settings)
    row = fit(learner, task, bar=False)[-1]
    assert {name.removeprefix("train/") for name in row if name.startswith("train/")} == scalars | {"loss", "recon"}
    assert 0 <= row["test/recall_20"] <= 1
    assert "test/unseen_recall_20" in row


def test_an_untrained_attention_stays_as_it_was():
    learner, task = built(train_bundle_attention=False)
    before = learner.bundle_q.weight.clone()
    fit(learner, task, bar=False)
    assert torch.equal(before, learner.bundle_q.weight)


def test_items_without_feedback_take_their_content_and_text():
    learner, task = built()
    learner.begin(Survey(task, learner))
    assert int(learner.cold.sum()) == 8  # a fifth
    tokens = learner.encoder.tokens(learner.features, learner.cold)
    assert torch.equal(tokens[learner.cold][:, 0], tokens[learner.cold][:, 2])
    assert not torch.equal(tokens[~learner.cold][:, 0], tokens[~learner.cold][:, 2])


def test_training_finds_items_of_the_theme():
    learner, task = built(
        "themed-bundles?items=80&train=120&test=40&size=6&unseen=0", epochs=25, dim=16, batch_size=30, lr=0.03
    )
    row = fit(learner, task, evaluate_every=25, bar=False)[-1]
    assert row["test/recall_20"] > 0.4  # chance is 0.25


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("clhe", DATA, overrides=SMALL).config
    need_equal_ends(monkeypatch, clhe.CLHE, "clhe", config, DATA, 4, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    small = SMALL | {"item_views": "same", "epochs": 1, "evaluate_every": 1}
    words = ["train", "clhe", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("clhe", DATA, overrides=small).config
    one = training.train("clhe", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()[-1]
    two = Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "train/items", "train/bundles", "test/ndcg_20"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sources": "content,images"}, "source of features"),
        ({"item_views": "crop"}, "item_views"),
        ({"kept": 0.0}, "kept"),
        ({"drop": 1.0}, "drop"),
        ({"bundle_weight": -1.0}, "bundle_weight"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        Experiment.resolve("clhe", DATA, overrides=SMALL | settings)


def test_histories_are_refused():
    with pytest.raises(CounterpointError, match="completes sets"):
        built("visits?users=9&items=24&groups=3")
    with pytest.raises(CounterpointError, match="learns from histories"):
        Experiment.resolve("mclrec", DATA).learner(Experiment.resolve("mclrec", DATA).task().facts, 0)


# --------------------------------------------------------------------------------------------------------------- sources


def written(folder, rows, columns="playlist,track") -> str:
    (folder / "sets.csv").write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return f"bundles:{folder / 'sets.csv'}"


ROWS = [(f"p{n}", f"t{(n + k) % 9}") for n in range(20) for k in range(4)]


def test_bundles_of_ones_own_are_divided_and_have_features(tmp_path):
    vectors = {"item": np.array([f"t{n}" for n in range(8)]), "text": np.eye(8, 5), "cf": np.ones((8, 3))}
    np.savez(tmp_path / "items.npz", **vectors)
    data = load(f"{written(tmp_path, [*ROWS, ROWS[0], ('p0', '')])}?features={tmp_path / 'items.npz'}")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [16, 2, 2]
    assert data.spec["features"] == {"text": 5, "cf": 3}
    assert (data.features["cf"][data.items.index("t8")] == 0).all()
    assert (data.features["text"][data.items.index("t3")] == np.eye(8, 5)[3]).all()
    assert set(data.test.known[0]) & set(data.test.wanted[0]) == set()
    assert any("1 of 9 items have no features" in note for note in data.notes)
    assert any("occur twice" in note for note in data.notes)
    assert any("no bundle or no item" in note for note in data.notes)
    again = load(f"{written(tmp_path, ROWS)}?seed=3")
    assert list(again.test.names) != list(data.test.names)


@pytest.mark.parametrize(
    ("rows", "columns", "query", "said"),
    [
        (ROWS, "mix,track", "", "no column of bundles"),
        (ROWS, "playlist,track", "?valid=0", "valid and test must be shares"),
        (ROWS[:8], "playlist,track", "?features=none.npz", "no readable .npz"),
        ([("a", "x"), ("b", "y")], "playlist,track", "", "too few"),
    ],
)
def test_sets_that_cannot_be_used_name_the_remedy(rows, columns, query, said, tmp_path):
    with pytest.raises(CounterpointError, match=said):
        load(written(tmp_path, rows, columns) + query)


def test_features_of_other_items_or_shapes_are_refused(tmp_path):
    spec = f"{written(tmp_path, ROWS)}?features={tmp_path / 'items.npz'}"
    for tables, said in (
        ({"item": np.array(["x"]), "cf": np.ones((1, 2))}, "has none of the 9 items"),
        ({"item": np.array(["t1"]), "cf": np.ones((2, 2))}, "must be finite numbers"),
        ({"names": np.array(["t1"])}, "needs 'item'"),
    ):
        np.savez(tmp_path / "items.npz", **tables)
        with pytest.raises(DataError, match=said):
            load(spec)


@pytest.mark.parametrize("query", ["items=20", "size=1", "unseen=0.9", "train=2"])
def test_themed_bundles_out_of_range_are_named(query):
    with pytest.raises(DataError, match="themed-bundles: items must be"):
        load(f"themed-bundles?{query}")
