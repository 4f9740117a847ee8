"""CTVIS: the authors' numbers, items of clips one by one, noise, tracking, training, resuming, errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import cli, data, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core.tracks import Tracker
from counterpoint.data.frames import PADDING, ArrayClips, Clip
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.dense import ctvis
from counterpoint.tasks.frames import chosen_frames, matches, track_clip, tracked
from counterpoint.use.export import opened
from counterpoint.views.images import normalise
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "ctvis.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def of(case: str, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.from_numpy(np.asarray(PARITY[f"{case}/{name}"]))
    return found.to(dtype) if found.is_floating_point() else found


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the authors' numbers


@TYPES
@pytest.mark.parametrize("number", range(2))
def test_losses_of_items_and_gradients_equal_the_authors(number, dtype, rtol):
    case, items, inputs = f"reid_loss/case{number}", [], {}
    for n in range(9):
        if f"{case}/in/anchor{n}" in PARITY.files:
            inputs[f"anchor{n}"] = of(case, f"in/anchor{n}", dtype).requires_grad_()
            inputs[f"items{n}"] = of(case, f"in/items{n}", dtype).requires_grad_()
            many = int(of(case, f"in/num_positive{n}"))
            items.append((inputs[f"anchor{n}"], inputs[f"items{n}"][:many], inputs[f"items{n}"][many:]))
    found = fn.reid_loss(items)
    total = (
        float(of(case, "param/weight_contrastive")) * found.contrastive
        + float(of(case, "param/weight_aux")) * found.aux
    )
    total.backward()
    for ours, name in ((found.contrastive, "contrastive"), (found.aux, "aux"), (total, "total")):
        torch.testing.assert_close(ours.detach(), of(case, f"out/{name}", dtype), rtol=rtol, atol=0)
    for name, value in inputs.items():
        torch.testing.assert_close(value.grad, of(case, f"grad/{name}", dtype), rtol=rtol, atol=rtol)


@TYPES
@pytest.mark.parametrize("number", range(2))
def test_memory_equals_the_authors(number, dtype, rtol):
    case = f"similarity_guided_memory/case{number}"
    found = fn.similarity_guided_memory(of(case, "in/embeddings", dtype), of(case, "in/valid"))
    torch.testing.assert_close(found, of(case, "out/memory", dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["memory", "last"])
def test_positives_equal_the_authors(kind):
    case = f"positive_selection/case0_{kind}"
    rows, valid = of(case, "in/embeddings"), of(case, "in/valid")
    memory = fn.similarity_guided_memory(rows, valid)
    for t in range(1, len(valid)):
        found = fn.select_positive(rows, valid, memory, t, bool(of(case, "param/use_memory")))
        status = int(of(case, "out/status")[t - 1])
        assert (found is not None) == (status == 1)
        if found is not None:
            torch.testing.assert_close(found, of(case, "out/positive")[t - 1], rtol=1e-9, atol=1e-12)


@TYPES
def test_tracker_equals_the_authors(dtype, rtol):
    case = "online_tracker/case0"
    rows, scores, count = (of(case, f"in/{name}", dtype) for name in ("embeddings", "scores", "count"))
    names = ("match_threshold", "init_threshold", "cache", "num_dead_frames")
    ids, bank = fn.online_tracker(
        [rows[t, : int(n)] for t, n in enumerate(count)],
        [scores[t, : int(n)] for t, n in enumerate(count)],
        *(of(case, f"param/{name}").item() for name in names),
    )
    for t, n in enumerate(count.tolist()):
        assert ids[t].tolist() == of(case, "out/ids")[t, : int(n)].tolist()
    assert bank.ids.tolist() == of(case, "out/memory_ids").tolist()
    assert bank.frames.tolist() == of(case, "out/memory_frames").tolist()
    np.testing.assert_allclose(bank.memory, of(case, "out/memory", dtype).numpy(), rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------------------- equations


def clip(seed: int = 0, frames: int = 6, number: int = 5, instances: int = 3, clips: int = 2):
    """Return queries, their places, and the query of each instance in each frame, some of them absent."""
    queries = draw(seed, clips, frames, number, 4)
    order = draw(seed + 1, clips, frames, number).argsort(2)[..., :instances]
    gone = draw(seed + 2, clips, frames, instances) > 0.7
    there = torch.ones(clips, frames, number, dtype=torch.bool)
    there[0, -1, int(order[0, -1, 0])] = False
    return queries, there, torch.where(gone | ~there.gather(2, order), -1, order)


def test_losses_of_clips_equal_those_of_their_items_one_by_one():
    queries, there, match = clip()
    coin = draw(9, *match.shape) > 0
    queries.requires_grad_()
    found = ctvis.clip_losses(queries, there, match, coin)
    items = []
    for b in range(2):
        for i in range(match.shape[2]):
            valid = match[b, :, i] >= 0
            own = torch.stack([queries[b, t, max(0, int(match[b, t, i]))] for t in range(6)])
            memory = fn.similarity_guided_memory(own, valid.long())
            for t in range(1, 6):
                positive = fn.select_positive(own, valid.long(), memory, t, bool(coin[b, t, i]))
                if positive is not None:
                    others = [q for q in range(5) if there[b, t - 1, q] and q != int(match[b, t - 1, i])]
                    items.append((own[t][None], positive[None], queries[b, t - 1, others]))
    wanted = fn.reid_loss(items)
    assert len(items) > 10
    for name in ("contrastive", "aux"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(ours, theirs)
        slopes = [torch.autograd.grad(x, queries, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*slopes)


def test_losses_of_references_equal_those_of_their_items_one_by_one():
    queries, there, match = clip(4)
    found = ctvis.reference_losses(queries, there, match)
    items = []
    for b in range(2):
        for i in range(match.shape[2]):
            if match[b, 0, i] >= 0 and (match[b, 1:, i] >= 0).any():
                places = [(t, q) for t in range(1, 6) for q in range(5) if there[b, t, q]]
                own = [(t, q) for t, q in places if q == int(match[b, t, i])]
                rows = [
                    torch.stack([queries[b, t, q] for t, q in part])
                    for part in (own, [p for p in places if p not in own])
                ]
                items.append((queries[b, 0, int(match[b, 0, i])][None], *rows))
    wanted = fn.reid_loss(items)
    torch.testing.assert_close(found.contrastive, wanted.contrastive)
    torch.testing.assert_close(found.aux, wanted.aux)


def test_two_frames_and_the_last_embedding_are_the_single_reference():
    """The card's free check: with a memory that is always the last appearance and T = 2 both items agree, in mirrored time."""
    queries, there, match = clip(7, frames=2, clips=8)
    coin = torch.zeros(match.shape, dtype=torch.bool)
    memory = ctvis.clip_losses(queries.flip(1), there.flip(1), match.flip(1), coin)
    frames = ctvis.reference_losses(queries, there, match)
    assert frames.contrastive > 0
    torch.testing.assert_close(memory, frames)


def test_memory_ignores_disagreement_and_passes_no_gradient_through_it():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.1]], requires_grad=True)
    memory = fn.similarity_guided_memory(rows, torch.tensor([1, 1]))
    assert torch.equal(memory[1], rows[0])
    memory[1].sum().backward()
    assert rows.grad[1].abs().sum() == 0


@pytest.mark.parametrize(("kind", "wanted"), [("last", [0.0, 2.0]), ("momentum", [0.25, 1.5])])
def test_other_memories_follow_their_rule(kind, wanted):
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert fn.similarity_guided_memory(rows, torch.tensor([1, 1]), kind=kind)[1].tolist() == wanted


def test_cache_limits_the_embeddings_that_weigh():
    rows, valid = draw(3, 7, 4), torch.tensor([1, 0, 1, 1, 1, 0, 1])
    found = fn.similarity_guided_memory(rows, valid, cache=2)
    memory, kept = None, []
    for t in range(7):
        if valid[t]:
            unit = rows[t] / rows[t].norm()
            beta = 1.0 if memory is None else max(0.0, float(torch.stack(kept[-2:]).mv(unit).mean()))
            memory = rows[t] if memory is None else (1 - beta) * memory + beta * rows[t]
            kept.append(unit)
        torch.testing.assert_close(found[t], memory)


def test_equal_embeddings_give_the_logarithm_of_the_pairs():
    row = torch.ones(1, 3)
    found = fn.reid_loss([(row, row.expand(2, 3), row.expand(5, 3))])
    torch.testing.assert_close(found.contrastive, torch.tensor(math.log(11.0)))
    torch.testing.assert_close(found.aux, torch.tensor(5 / 7))


def test_large_products_stay_finite():
    row = torch.full((1, 4), 30.0, requires_grad=True)
    found = fn.reid_loss([(row, -row, row.expand(3, 4))])
    found.contrastive.backward()
    assert float(found.contrastive.detach()) == pytest.approx(2 * 3600 + math.log(3), rel=1e-5)
    assert torch.isfinite(row.grad).all()


def test_item_without_negatives_and_no_item_at_all_count_zero():
    row = torch.ones(1, 2, requires_grad=True)
    found = fn.reid_loss([(row, 2 * row, row[:0])])
    found.contrastive.backward()
    assert found.contrastive.item() == 0
    assert torch.isfinite(row.grad).all()
    queries, there, match = clip()
    none = ctvis.clip_losses(queries, there, torch.full_like(match, -1), match > 0)
    assert none.contrastive.item() == none.aux.item() == 0
    one = ctvis.clip_losses(queries[:, :1], there[:, :1], match[:, :1], match[:, :1] > 0)
    assert one.contrastive.item() == 0


def test_noise_enters_the_memory_alone():
    queries, there, match = clip(2, frames=4)
    there[:] = True
    match = torch.full_like(match, -1)
    match[0, :, 0] = torch.tensor([0, 1, -1, 2])
    noise = torch.full_like(match, -1)
    noise[0, 2, 0] = 3
    memory, plain = torch.ones_like(match).bool(), torch.zeros_like(match).bool()
    for coin, differs in ((memory, True), (plain, False)):
        with_noise = ctvis.clip_losses(queries, there, match, coin, noise).contrastive
        without = ctvis.clip_losses(queries, there, match, coin).contrastive
        assert bool((with_noise - without).abs() > 1e-9) == differs


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="valid must be"):
        fn.similarity_guided_memory(draw(0, 4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="items is empty"):
        fn.reid_loss([])
    with pytest.raises(ValueError, match="alike"):
        fn.item_losses(draw(0, 2, 3), draw(0, 2, 3), torch.ones(2, 2).long())
    with pytest.raises(ValueError, match="t must lie"):
        fn.select_positive(draw(0, 4, 2), torch.ones(4), draw(0, 4, 2), 0)
    with pytest.raises(ValueError, match="cache must be"):
        Tracker(cache=0)


# ------------------------------------------------------------------------------------------------------------- tracking


def test_tracker_forgets_and_never_reuses_a_number():
    tracker = Tracker(dead=1)
    one = np.array([[1.0, 0.0]])
    none = np.zeros((0, 2))
    assert tracker.step(one, np.array([0.9])).tolist() == [0]
    for _ in range(2):
        assert tracker.step(none, np.zeros(0)).tolist() == []
    assert len(tracker.bank.ids) == 0
    assert tracker.step(one, np.array([0.9])).tolist() == [1]
    assert tracker.step(-one, np.array([0.005])).tolist() in ([1], [-1])


def test_detection_that_fits_no_track_and_is_weak_is_dropped():
    tracker = Tracker(match_threshold=0.9)
    tracker.step(np.eye(2), np.array([0.9, 0.9]))
    assert tracker.step(np.ones((1, 2)), np.array([0.001])).tolist() == [-1]
    assert tracker.step(np.ones((1, 2)), np.array([0.5])).tolist() == [2]


def test_scores_of_tracks_count_assignments_switches_and_returns():
    identities = np.array([[0, 1], [0, 1], [0, -1], [0, 1]])
    tracks = np.array([[3, 4], [3, 4], [5, 5], [3, 3]])
    found = tracked(identities, tracks)
    assert (found.right, found.true, found.linked) == (5, 7, 8)
    assert (found.switches, found.instances) == (3, 2)
    assert (found.back, found.back_right) == (1, 0)


def test_perfect_embeddings_are_tracked_without_a_mistake():
    found = data.load("moving-shapes?train=2&test=2&frames=8")
    for number in range(2):
        truth = found.test.clip(number)
        rows = np.zeros((*truth.identities.shape, 20))
        for t, q in np.argwhere(truth.identities >= 0).tolist():
            rows[t, q, truth.identities[t, q]] = 8.0
        tracks = track_clip(rows, truth.scores, truth.identities != PADDING, 0.3)
        result = tracked(truth.identities, tracks)
        assert result.right == result.true
        assert result.switches == 0


# ----------------------------------------------------------------------------------------------------------------- data


def test_frames_are_drawn_in_order_from_one_window_of_the_clip():
    there = torch.ones(50, 12, dtype=torch.bool)
    there[0, 2:] = False
    found = chosen_frames(there, 4, 6, torch.rand(50, 20, generator=torch.Generator().manual_seed(0)))
    assert sorted(found[0].tolist()) == [-1, -1, 0, 1]
    for row in found[1:]:
        assert (row.diff() > 0).all()
        assert row.max() - row.min() < 6
    assert found[1:].max() == 11
    assert found[1:].min() == 0


def test_matches_name_the_detection_of_each_instance():
    assert matches(torch.tensor([[[-2, 1, 0], [1, -1, -2]]])).tolist() == [[[2, 1], [-1, 0]]]
    assert matches(torch.full((1, 2, 3), -1)).shape == (1, 2, 0)


def test_clips_have_absent_and_covered_instances_and_others():
    found = data.load("moving-shapes?train=8&test=2&seed=3")
    same = data.load("moving-shapes?train=8&test=2&seed=3")
    kinds = {"absent": 0, "back": 0}
    for number in range(8):
        truth = found.train.clip(number)
        assert (truth.crops == same.train.clip(number).crops).all()
        assert ((truth.identities == -1).sum(1) == 6).all()
        for instance in range(int(truth.identities.max()) + 1):
            seen = (truth.identities == instance).any(1)
            kinds["absent"] += not seen.all()
            kinds["back"] += bool((np.diff(np.flatnonzero(seen)) > 1).any())
    assert kinds["absent"] > 5
    assert kinds["back"] > 5


@pytest.mark.parametrize("options", ["frames=1", "least=0", "absent=2", "others=-1", "train=1", "size=4", "alike=-1"])
def test_options_of_clips_out_of_range_are_refused(options):
    with pytest.raises(CounterpointError):
        data.load(f"moving-shapes?{options}")


def test_clips_of_another_shape_are_refused():
    with pytest.raises(DataError, match="clip 0: identities"):
        ArrayClips(
            [Clip(np.zeros((2, 3, 8, 8, 3), np.uint8), np.zeros((2, 2), np.int64), np.zeros((2, 3), np.float32))]
        )
    with pytest.raises(DataError, match="clip 0: crops"):
        ArrayClips([Clip(np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32))])


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "moving-shapes?train=8&test=2&frames=5&least=2&most=3&others=1&size=16"
SMALL = {
    "encoder": "conv-s", "batch_size": 4, "frames": 4, "window": 5, "epochs": 2, "evaluate_every": 2, "hidden": 8,
    "projection": 4,
}  # fmt: skip


def built(seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("ctvis", DATA, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("ctvis").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def test_share_of_a_batch_without_a_clip_has_its_crops_size_and_no_detection():
    learner, task = built()
    clips = task.train_loader(0, learner.position).dataset
    found = clips[[]]
    assert found["crops"].shape == (0, 1, 1, 3, 16, 16)
    assert found["identities"].shape == found["scores"].shape == (0, 1, 1)


def test_a_step_trains_with_the_public_functions(monkeypatch):
    learner, task = built(epochs=1)
    calls = {"item_losses": [], "similarity_guided_memory": [], "memory_positives": []}
    for name in calls:
        function = getattr(ctvis, name)
        monkeypatch.setattr(ctvis, name, lambda *a, _f=function, _n=name, **k: (calls[_n].append(a), _f(*a, **k))[1])
    fit(learner, task, bar=False)
    assert {name: len(found) for name, found in calls.items()} == dict.fromkeys(calls, 2)
    rows, _valid = calls["similarity_guided_memory"][0][:2]
    assert rows.requires_grad
    assert rows.shape[2:] == (4, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "frames"},
        {"reference": "frames", "frames": 2},
        {"noise": 0.5, "memory_share": 1.0},
        {"memory": "last"},
        {"memory": "momentum", "aux_weight": 0.0},
        {"encoder": "vit-s"},
    ],
)
def test_options_train(settings):
    learner, task = built(epochs=1, **settings)
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["train/loss"])
    assert 0 <= row["test/id_accuracy"] <= 1
    assert row["test/id_switches"] >= 0


def test_noise_is_drawn_for_absent_instances_only():
    learner, task = built(noise=1.0)
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(1))
    noise, match = batch["noise"], batch["match"]
    assert ((noise >= 0) == (match < 0)).all()
    there = batch["identities"] != PADDING
    assert there.gather(2, noise.clamp(min=0))[noise >= 0].all()


def test_embeddings_of_places_without_a_detection_are_zero():
    learner, task = built()
    batch = task.evaluation_batch("test", [0, 1])
    rows = learner.eval().predict(batch)["embedding"]
    there = batch["identities"] != PADDING
    assert (rows[~there] == 0).all()
    assert (rows[there].abs().sum(1) > 0).all()


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    config = Experiment.resolve("ctvis", DATA, overrides=SMALL | {"noise": 0.2}).config
    run = need_equal_ends(monkeypatch, ctvis.CTVIS, "ctvis", config, DATA, 3, tmp_path)
    assert "Instances over time" in (run.path / "report.html").read_text()


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line(tmp_path):
    words = ["train", "ctvis", "--data", DATA, "--out", str(tmp_path), "--name", "run"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    assert training.evaluate(run.path, say=lambda _: None)["id_accuracy"] == run.metrics()[-1]["test/id_accuracy"]
    # Its encoder of crops is exported, and embeds crops.
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "crops.pt2")]) == 0
    learner = load_learner(run)
    crops = torch.randint(0, 256, (2, 3, learner.size, learner.size), dtype=torch.uint8)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(learner.embed(normalise(crops)), dim=1)
    torch.testing.assert_close(opened(tmp_path / "crops.pt2", "torch")(crops), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 1}, "frames must be at least 2"),
        ({"window": 3}, "window at least frames"),
        ({"noise": 1.5}, "noise"),
        ({"aux_weight": -1.0}, "aux_weight"),
        ({"encoder": "conv-x"}, "conv-x"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_source_without_clips_is_refused():
    with pytest.raises(CounterpointError, match="not for frames"):
        Experiment.resolve("ctvis", "digits", overrides=SMALL).task()
