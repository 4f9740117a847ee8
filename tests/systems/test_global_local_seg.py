"""Global-Local: the authors' numbers, the card's identities, volumes and batches, three stages, resuming, errors."""

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
from counterpoint.core.operands import unit
from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData, labelled_rows
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.unet import UNetDecoder
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.dense import global_local_seg as module
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "global-local-seg.npz")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", range(4))
def test_losses_and_gradients_equal_the_authors(number, dtype, rtol):
    def at(name):
        found = torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))
        return found.to(dtype) if found.is_floating_point() else found

    def number_of(name):
        return at(f"param/{name}").item()

    if number_of("kind") == 0:
        x = at("in/embedding").requires_grad_()
        loss = fn.partition_contrastive_loss(x, number_of("n_parts"), number_of("strategy"), number_of("temperature"))
        wanted = at("grad/embedding")
    else:
        x = at("in/feature_map").requires_grad_()
        regions = fn.grid_regions(x.shape[1], x.shape[2], number_of("region_size"))
        assert torch.equal(regions.positive, at("out/positive_index").long())
        assert torch.equal(regions.negative, at("out/negative_index").long())
        loss = fn.local_region_contrastive_loss(
            x,
            at("out/positive_index"),
            at("out/negative_index")[:, : number_of("num_negative_regions")],
            number_of("strategy"),
            number_of("region_size"),
            number_of("temperature"),
            at("weight/dense") if number_of("use_dense") else None,
        )
        wanted = at("grad/feature_map")
    loss.backward()
    torch.testing.assert_close(loss.detach(), at("out/loss"), rtol=rtol, atol=0)
    torch.testing.assert_close(x.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(("strategy", "rows", "pairs"), [(1, 12, 2), (2, 16, 4)])
def test_equal_slices_give_the_logarithm_of_the_candidates(strategy, rows, pairs):
    negatives = rows // 2  # of two partitions
    found = fn.partition_contrastive_loss(torch.ones(rows, 3), 2, strategy)
    torch.testing.assert_close(found, torch.tensor(pairs * math.log(1 + negatives)), rtol=1e-5, atol=0)


def test_strategy_random_is_nt_xent_of_adjacent_rows():
    z = draw(0, 10, 4)
    first, second = z[::2], z[1::2]
    wanted = fn.of("simclr").nt_xent(first, second, 0.1)
    torch.testing.assert_close(fn.partition_contrastive_loss(z, 4, 0, 0.1), wanted)


def test_slices_of_the_same_partition_are_never_negatives():
    z = draw(1, 24, 4)
    base = fn.partition_contrastive_loss(z, 3, 2)
    rows = unit(z) @ unit(z).T / 0.1
    total = 0.0
    for p in range(24):
        if p % 6 < 3:
            a, b, c, d = p, (p + 3) % 24, (p + 6) % 24, (p + 9) % 24
            for x, y in ((a, b), (b, a), (a, c), (c, a), (c, d), (d, c), (b, d), (d, b)):
                others = [k for k in range(24) if k % 3 != p % 3]
                total = total + torch.logsumexp(rows[x, [y, *others]], 0) - rows[x, y]
    torch.testing.assert_close(base, total / 24)


@pytest.mark.parametrize(("negatives", "wanted"), [(5, 11), (3, 7)])
def test_equal_regions_give_the_logarithm_of_the_neighbours(negatives, wanted):
    regions = fn.grid_regions(12, 12, negatives=negatives)
    found = fn.local_region_contrastive_loss(torch.ones(2, 12, 12, 2), *regions)
    torch.testing.assert_close(found, torch.tensor(math.log(wanted)))


def test_negative_at_the_anchor_s_own_place_is_left_out():
    regions = fn.grid_regions(5, 5)  # many corners coincide
    x = draw(2, 2, 5, 5, 3)
    found = fn.local_region_contrastive_loss(x, *regions)
    total = 0.0
    vectors = {}
    for n in range(2):
        for corner in {tuple(c) for c in torch.cat([regions.positive, regions.negative.flatten(0, 1)]).tolist()}:
            patch = x[n, corner[0] : corner[0] + 3, corner[1] : corner[1] + 3].flatten()
            vectors[n, corner] = patch / patch.norm()
    for n in range(2):
        for r in range(13):
            own = tuple(regions.positive[r].tolist())
            a, p = vectors[n, own], vectors[1 - n, own]
            keep = [tuple(c) for c in regions.negative[r].tolist() if tuple(c) != own]
            s = [a @ p, *(a @ vectors[m, c] for m in (n, 1 - n) for c in keep)]
            s = torch.stack(s) / 0.1
            total = total + s.logsumexp(0) - s[0]
    torch.testing.assert_close(found, total / 13 / 2)


def test_soft_dice_equals_the_formula_and_ignores_unknown_pixels():
    logits, masks = draw(0, 2, 3, 4, 4), (draw(1, 2, 4, 4) * 10).long().remainder(3)
    p = logits.softmax(1)
    y = torch.nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).double()
    dice = 2 * (p * y).sum((2, 3)) / (p.sum((2, 3)) + y.sum((2, 3)))
    torch.testing.assert_close(fn.soft_dice_loss(logits, masks), 1 - dice.mean())
    torch.testing.assert_close(fn.soft_dice_loss(logits, masks, True), 1 - dice[:, 1:].mean())
    unknown = masks.clone()
    unknown[:, 0] = IGNORE
    torch.testing.assert_close(fn.soft_dice_loss(logits, unknown), fn.soft_dice_loss(logits[:, :, 1:], masks[:, 1:]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.partition_contrastive_loss(draw(0, 10, 4)), "multiple of 16 rows"),
        (lambda: fn.partition_contrastive_loss(draw(0, 16, 4), strategy=3), "strategy must be"),
        (lambda: fn.partition_contrastive_loss(draw(0, 16, 4), temperature=0.0), "temperature"),
        (lambda: fn.partition_contrastive_loss(draw(0, 16, 4), 1), "n_parts"),
        (lambda: fn.partition_contrastive_loss(draw(0, 0, 4)), "empty batch"),
        (lambda: fn.grid_regions(4, 9), "at least 5 cells"),
        (lambda: fn.grid_regions(9, 9, negatives=6), "1..5"),
        (lambda: fn.local_region_contrastive_loss(draw(0, 3, 9, 9, 2), *fn.grid_regions(9, 9)), "multiple of 2"),
        (lambda: fn.local_region_contrastive_loss(draw(0, 2, 7, 7, 2), *fn.grid_regions(9, 9)), "lie outside maps"),
        (lambda: fn.soft_dice_loss(draw(0, 2, 3, 4, 4), torch.zeros(2, 4, 3).long()), "masks must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------- network and batches


def test_unet_gives_a_map_at_each_scale_and_the_decoder_joins_them():
    encoder = build_image_encoder("unet-s", 16)
    levels = encoder.levels(torch.zeros(2, 3, 16, 16))
    assert [tuple(x.shape[1:]) for x in levels] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    decoder = UNetDecoder(encoder.widths)
    assert decoder(levels, 1).shape == (2, 16, 8, 8)
    assert decoder(levels).shape == (2, 8, 16, 16)
    with pytest.raises(CounterpointError, match="not a multiple of 4"):
        build_image_encoder("unet-s", 18)


def test_batches_have_a_slice_of_each_partition_of_different_volumes():
    groups = np.repeat([3, 5, 9], [10, 9, 13])
    starts = {3: 0, 5: 10, 9: 19}
    batches = module.PartitionBatches(groups, 4, 8, 50)
    seen = set()
    for rows in batches:
        for run in (rows[:4], rows[4:]):
            (volume,) = set(groups[run].tolist())
            length = int((groups == volume).sum()) // 4
            assert [(row - starts[volume]) // length for row in run] == [0, 1, 2, 3]
            seen |= set(run)
        assert groups[rows[0]] != groups[rows[4]]
    assert len(seen) == 4 * (2 + 2 + 3)  # the remainder of a volume is never used
    assert len(batches) == 50


def test_volume_with_fewer_slices_than_partitions_is_refused():
    with pytest.raises(DataError, match="volume 2 has 3 slices, fewer than 4 partitions"):
        module.PartitionBatches(np.repeat([0, 1], [8, 3]), 4, 8, 2)


def test_phantoms_drift_alike_and_have_one_labelled_volume():
    found = data.load("phantoms?train=6&test=4&slices=8&seed=2")
    assert len(labelled_rows(found.train)) == 8
    masks = found.test.masks(np.arange(32)).reshape(4, 8, 48, 48)
    areas = np.stack([(masks == c).sum((2, 3)) for c in (1, 2, 3)], 2)
    assert (areas[:, 1:-1] > 0).all()
    # The areas along the axis are alike in all subjects.
    ring = areas[..., 0] / areas[..., 0].sum(1, keepdims=True)
    assert np.abs(ring - ring.mean(0)).max() < 0.05
    assert found.test.groups.tolist() == np.repeat(np.arange(4), 8).tolist()


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "phantoms?train=3&test=2&slices=8&size=16"
SMALL = {
    "encoder": "unet-s", "epochs": 1, "global_epochs": 1, "local_epochs": 1, "steps": 2, "batch_size": 4,
    "pretrain_batch": 8, "blocks": 1, "hidden": 8, "projection": 4, "evaluate_every": 1,
}  # fmt: skip


def built(source: str = DATA, seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("global-local-seg", source, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("global-local-seg").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def test_each_stage_trains_its_own_parts_with_its_own_function(monkeypatch):
    learner, task = built()
    calls: list[str] = []
    kept: dict[str, dict[str, Tensor]] = {}
    for name in ("partition_contrastive_loss", "local_region_contrastive_loss", "soft_dice_loss"):
        function = getattr(module, name)

        def call(*args, _name=name, _function=function):
            if _name not in calls:
                kept[_name] = {k: v.detach().clone() for k, v in learner.named_parameters()}
            calls.append(_name)
            return _function(*args)

        monkeypatch.setattr(module, name, call)
    fit(learner, task, bar=False)
    assert calls == [name for name in kept for _ in range(2)]
    after = dict(learner.named_parameters())
    before, middle, last = kept.values()

    def moved(a, b):
        return {name.partition(".")[0] for name in a if not torch.equal(a[name], b[name])}

    assert moved(before, middle) == {"encoder", "projector"}
    assert moved(middle, last) == {"decoder", "local_head", "dense"}
    assert moved(last, after) == {"encoder", "decoder", "classifier"}


def test_slices_of_other_volumes_are_positives_of_the_right_rows(monkeypatch):
    """The rows reach the loss in runs: originals of a volume, their views, originals of the next volume, their views."""
    learner, task = built()
    seen = []
    monkeypatch.setattr(module, "partition_contrastive_loss", lambda rows, *a: seen.append(rows) or rows.sum())
    learner.projector = torch.nn.Identity()
    learner.encoder.features = lambda x: x.flatten(1)
    groups = task.split("train").groups
    rows = next(iter(module.PartitionBatches(groups, 4, 8, 1)))
    from counterpoint.tasks.dense import DenseBatches

    batch = learner.prepare(DenseBatches(task.split("train"), ("image",))[rows], torch.Generator().manual_seed(0))
    learner.of_slices(batch)
    ordered = seen[0].unflatten(1, (3, 16, 16))
    assert torch.equal(ordered[:4], batch["plain"][:4])
    assert torch.equal(ordered[4:8], batch["views"][0][:4])
    assert torch.equal(ordered[8:12], batch["plain"][4:])
    assert torch.equal(ordered[12:], batch["views"][0][4:])


def test_fine_tuning_sees_labelled_slices_alone(monkeypatch):
    learner, task = built(global_epochs=0, local_epochs=0)
    seen = []
    monkeypatch.setattr(module, "soft_dice_loss", lambda logits, masks, _: (seen.append(masks), logits.sum() * 0)[1])
    fit(learner, task, bar=False)
    assert len(seen) == 2
    assert all((masks != IGNORE).any((1, 2)).all() for masks in seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "random", "local_strategy": "volumes", "pretrain_batch": 12},
        {"strategy": "not-same", "local_dense": False, "region": 1},
        {"supervision": "cross-entropy", "negatives": 3},
        {"supervision": "dice-foreground", "global_epochs": 0},
    ],
)
def test_options_train(settings):
    learner, task = built(**settings)
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/loss"])
    assert 0 <= rows[-1]["test/dice"] <= 1
    assert 0 <= rows[-1]["test/partition_retrieval"] <= 1


def test_a_single_volume_has_no_positives_of_others(monkeypatch):
    learner, task = built("phantoms?train=1&test=2&slices=8&size=16")
    strategies = []
    function = module.partition_contrastive_loss
    monkeypatch.setattr(
        module, "partition_contrastive_loss", lambda z, n, s, t: (strategies.append(s), function(z, n, s, t))[1]
    )
    fit(learner, task, bar=False)
    assert strategies == [1, 1]


def test_pictures_that_are_no_slices_are_refused():
    learner, task = built("shapes?train=16&test=4&size=16")
    with pytest.raises(DataError, match="no slices of volumes"):
        fit(learner, task, bar=False)


def test_interrupted_in_any_stage_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    config = Experiment.resolve("global-local-seg", DATA, overrides=SMALL).config
    run = need_equal_ends(monkeypatch, module.GlobalLocal, "global-local-seg", config, DATA, (1, 3, 5), tmp_path)
    assert "Partitions of different volumes" in (run.path / "report.html").read_text()


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line(tmp_path):
    words = ["train", "global-local-seg", "--data", DATA, "--out", str(tmp_path), "--name", "run"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    assert training.evaluate(run.path, say=lambda _: None)["dice"] == run.metrics()[-1]["test/dice"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partitions": 1}, "partitions"),
        ({"pretrain_batch": 12}, "multiple of 8"),
        ({"local_strategy": "volumes"}, "multiple of 24"),
        ({"encoder": "conv-s"}, "unet or unet-s"),
        ({"blocks": 3}, "blocks must be below"),
        ({"negatives": 6}, "negatives"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


@pytest.mark.parametrize("options", ["labelled=0", "labelled=9&train=3", "slices=1", "test=0", "seed=-1", "size=4"])
def test_options_of_phantoms_out_of_range_are_refused(options):
    with pytest.raises(CounterpointError):
        data.load(f"phantoms?{options}")


def test_dense_data_without_groups_has_none():
    pixels, masks = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8)
    split = ArrayScenes(pixels, masks)
    assert DenseData("made", split, split, split, (), 8, regions=("a", "b")).train.groups is None
