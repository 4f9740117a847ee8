"""The bags task: length rule, average precision, batches, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import counterpoint.functional as fn
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import DataError
from counterpoint.tasks.bags import BagsConfig, BagsTask, FrameAP

PARITY = np.load(Path(__file__).parents[1] / "parity" / "macil-sd.npz")


def test_length_rule_equals_the_authors():
    expected = PARITY["case4/out/picked_row_plus_one"]
    for length, row in zip(PARITY["case4/in/lengths"], expected, strict=True):
        features = np.arange(1, length + 1, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(fn.fit_length(features, 200)[:, 0], row)


@pytest.mark.parametrize("head", ["av", "visual"])
def test_frame_ap_equals_the_authors(head):
    ap = fn.frame_ap(PARITY[f"case5/in/{head}_logit"], PARITY["case5/in/video_len"], PARITY["case5/in/gt_frames"])
    assert ap == pytest.approx(float(PARITY[f"case5/out/{head}_ap"]), rel=1e-9)


def test_frame_ap_handles_edge_cases():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    assert fn.frame_ap(logits, [3], [1, 0, 0], repeat=1) == pytest.approx(1.0)
    assert np.isnan(fn.frame_ap(logits, [3], [0, 0, 0], repeat=1))
    with pytest.raises(ValueError, match="gt must hold"):
        fn.frame_ap(logits, [3], [0, 1], repeat=1)
    with pytest.raises(ValueError, match="crop_logits must be"):
        fn.frame_ap(logits, [2], [0, 1], repeat=1)
    with pytest.raises(ValueError, match="NaN"):
        fn.frame_ap(logits * torch.nan, [3], [0, 1, 0], repeat=1)


def bags(count=5, visual=4, audio=3, **changed):
    rng = np.random.default_rng(0)

    def features(length, dim):
        return rng.standard_normal((length, dim)).astype(np.float32)

    train = [Bag(f"bag{i}", features(3 + i, visual), features(3 + i, audio), i % 2) for i in range(count)]
    test = [TestVideo("t", features(6, visual)[None], features(6, audio), 1, np.zeros(96, np.int8))]
    return BagData(
        **(
            {"name": "x", "train": train, "valid": test, "test": test, "visual_dim": visual, "audio_dim": audio}
            | changed
        )
    )


def test_every_bag_is_seen_once_an_epoch_and_padded():
    task = BagsTask(bags(), BagsConfig(batch_size=2, max_length=6))
    batches = list(task.train_loader(0, Position()))
    assert [len(b["name"]) for b in batches] == [2, 2, 1]
    assert sorted(n for b in batches for n in b["name"]) == [f"bag{i}" for i in range(5)]
    for batch in batches:
        assert batch["visual"].shape[1:] == (6, 4)
        for name, row in zip(batch["name"], batch["visual"], strict=True):
            assert int((row.abs().amax(1) > 0).sum()) == min(6, 3 + int(name[3:]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_share_the_same_global_batches(size):
    alone = list(Batches(11, 4).bind(7, Position(epoch=2), 0, 1))
    shares = [list(Batches(11, 4).bind(7, Position(epoch=2), rank, size)) for rank in range(size)]
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert sorted(whole) == sorted(i for part in parts for i in part)


def test_resuming_in_mid_epoch_passes_over_what_is_done():
    whole = list(Batches(10, 3).bind(1, Position(epoch=4), 0, 1))
    rest = list(Batches(10, 3).bind(1, Position(epoch=4, batch=2), 0, 1))
    assert rest == whole[2:]


def test_epochs_and_seeds_differ():
    orders = {tuple(next(iter(Batches(50, 50).bind(s, Position(epoch=e), 0, 1)))) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def spoil(data, what):
    bag = data.train[1]
    visual, audio = bag.visual.copy(), bag.audio.copy()
    if what == "nan":
        audio[1, 1] = np.nan
    elif what == "zero":
        visual[:] = 0
    elif what == "width":
        visual = visual[:, :-1]
    elif what == "length":
        audio = audio[:-1]
    data.train[1] = Bag(bag.name, visual, audio, bag.label)
    return data


@pytest.mark.parametrize(
    ("what", "said"), [("nan", "NaN"), ("zero", "no snippet"), ("width", "have widths"), ("length", "audio snippets")]
)
def test_spoiled_features_are_named(what, said):
    task = BagsTask(spoil(bags(), what), BagsConfig(batch_size=8))
    with pytest.raises(DataError, match=f"bag1.*{said}"):
        list(task.train_loader(0, Position()))


def test_empty_sets_are_refused():
    with pytest.raises(DataError, match="needs training and test"):
        BagsTask(bags(train=[]), BagsConfig())


def test_a_final_evaluation_draws_the_scores_of_a_video_that_is_violent_for_a_part_of_its_time():
    found = FrameAP(SimpleNamespace(frames_per_snippet=2, snippet_seconds=0.5))
    for name, truth in (("calm", [0, 0, 0, 0]), ("partly", [0, 0, 1, 1])):
        logits = torch.tensor([[-2.0, 2.0], [-2.0, 4.0]])
        found.update({"visual": torch.zeros(2, 2, 3), "truth": np.array(truth), "name": name}, {"av": logits})
    found.compute()
    assert "Scores over time" not in found.figures
    found.compute(final=True)
    drawn = found.figures["Scores over time"]
    assert drawn["series"]["truth"] == ([0.0, 0.5], [0.0, 1.0])
    times, scores = drawn["series"]["av"]
    assert times == [0.0, 0.5]
    assert scores == pytest.approx(logits.sigmoid().mean(0).tolist())  # of both crops
    assert "partly" in drawn["caption"]
