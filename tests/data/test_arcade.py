"""Arcade clips: scripts, truth, pictures, sound, files, features and their cache."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from counterpoint.data import arcade
from counterpoint.data.worlds.sprites import scenes
from counterpoint.data.worlds.sprites.artwork import assets
from counterpoint.data.worlds.sprites.drawing import render_frames
from counterpoint.data.worlds.sprites.sounds import render_audio
from counterpoint.errors import CounterpointError

SCRIPTS = [arcade.script("train", i) for i in range(300)]

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("arcade") is None, reason="draws with the package arcade: pip install --no-deps arcade"
)


def test_scripts_are_the_same_for_the_same_seed_and_differ_else():
    assert arcade.script("train", 3) == SCRIPTS[3]
    others = [arcade.script("train", 4), arcade.script("test", 3), arcade.script("train", 3, seed=1)]
    assert all(other.events != SCRIPTS[3].events for other in others)


def test_clips_have_the_lengths_labels_and_events_the_docstring_says():
    assert {c.snippets for c in SCRIPTS} == set(range(24, 49))
    assert 0.4 < np.mean([c.label for c in SCRIPTS]) < 0.6
    for clip in SCRIPTS:
        violent = [e for e in clip.events if e.violent]
        assert bool(violent) == bool(clip.label)
        assert len(violent) <= 2
        assert not violent or any(e.visible and e.audible for e in violent)
        for event in clip.events:
            assert event.visible or event.audible
            for start, end in filter(None, (event.visible, event.audible)):
                assert 0 <= start < end <= clip.duration + 1e-9
                assert end - start < 5.0 + 1e-9
            assert event.beats[0] == 0
            assert list(event.beats) == sorted(set(event.beats))
            if event.visible:  # the last beat has time to be seen; sound may be cut off by the clip's end
                assert event.visible[0] + event.beats[-1] < event.visible[1] - 0.6


def test_sound_lags_up_to_five_snippets_and_some_events_are_half():
    violent = [e for c in SCRIPTS for e in c.events if e.violent]
    lags = np.array([e.audible[0] - e.visible[0] for e in violent if e.audible and e.visible])
    assert (lags >= 0).all()
    assert lags.max() < 5 * scenes.SNIPPET
    assert 0.35 < (lags > 0).mean() < 0.65
    assert any(e.visible is None for e in violent)
    assert any(e.audible is None for e in violent)
    assert {e.kind for e in violent} == set(scenes.VIOLENT)
    confusers = [sum(e.kind in (*scenes.LOUD, *scenes.BRIGHT) for e in c.events) for c in SCRIPTS]
    assert 0.35 < np.mean(confusers) < 0.65


def test_truth_is_the_union_of_the_violent_windows():
    for clip in SCRIPTS[:60]:
        truth = scenes.truth(clip)
        assert truth.shape == (16 * clip.snippets,)
        assert truth.any() == bool(clip.label)
        for n in range(0, len(truth), 7):
            middle = (n + 0.5) / 24
            inside = any(
                a <= middle < b for e in clip.events if e.violent for a, b in filter(None, (e.visible, e.audible))
            )
            assert truth[n] == inside


@needs_package
def test_frames_at_any_time_and_size():
    clip = SCRIPTS[0]
    one = render_frames(clip, [3.0, 1.0], (160, 90))
    assert one.shape == (2, 90, 160, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one[::-1], render_frames(clip, [1.0, 3.0], (160, 90)))
    assert (one[0] != one[1]).any()


@needs_package
@pytest.mark.parametrize("kind", [*scenes.VIOLENT, "coin", "jump", "upgrade", *scenes.BRIGHT])
def test_an_event_is_seen_while_it_is_visible_and_not_outside(kind):
    clip, event = next((c, e) for c in SCRIPTS for e in c.events if e.kind == kind and e.visible)
    without = scenes.Scene(**(vars(clip) | {"events": tuple(e for e in clip.events if e is not event)}))
    start, end = event.visible
    # A flash is dark between its beats; a meteor takes a moment to come into the picture.
    inside = 0.6 if kind == "meteors" else 0.05
    times = [start + inside, start + event.beats[-1] + inside, start - 0.01, end + 0.01]
    changed = (render_frames(clip, times) != render_frames(without, times)).any((1, 2, 3))
    assert changed.tolist() == [True, True, False, False]


@needs_package
def test_sound_is_heard_in_its_window_and_never_clips():
    for clip in SCRIPTS[:30]:
        wave = render_audio(clip)
        assert wave.shape == (round(clip.duration * 16000),)
        assert np.abs(wave).max() < 1
        quiet = np.ones(len(wave), bool)
        for event in clip.events:
            if event.audible:
                a, b = (round(t * 16000) for t in event.audible)
                assert wave[a:b].std() > 2 * clip.noise * min(1, 0.98 / np.abs(wave).max()) * 0.9 or clip.noise > 5e-3
                quiet[a : b + 1] = False
        if quiet.sum() > 8000:
            assert wave[quiet].std() <= 1.05 * clip.noise


@needs_package
def test_a_clip_becomes_a_real_video_file(tmp_path):
    from counterpoint.data.media import SnippetReader, probe

    class Eye:
        name, dim, frames_per_snippet, frame_size = "eye", 1, 4, (96, 54)

    class Ear:
        name, dim, sample_rate, window_seconds = "ear", 1, 16000, 16 / 24

    clip = min(SCRIPTS[:60], key=lambda c: c.snippets)
    arcade.write_clip(clip, tmp_path / "clip.mp4")
    info = probe(tmp_path / "clip.mp4")
    assert (info.width, info.height, info.has_audio) == (320, 180, True)
    assert info.duration == pytest.approx(clip.duration, abs=0.1)
    with SnippetReader(tmp_path / "clip.mp4", Eye(), Ear(), snippet_seconds=scenes.SNIPPET) as reader:
        snippets = list(reader.snippets())
        assert reader.notes == []
    assert len(snippets) == clip.snippets
    # Training features come from the script, detection's from the file: both must see and hear the same.
    from counterpoint.data.media import sample_times

    shown = np.floor(sample_times(clip.snippets, 4, scenes.SNIPPET) * 24) / 24
    drawn = render_frames(clip, shown)
    for snippet in snippets[::5]:
        for frame, original in zip(snippet.frames, drawn[4 * snippet.number :], strict=False):
            small = arcade._scaled(original, (96, 54))
            assert np.abs(frame.astype(float) - small).mean() < 6
    played = render_audio(clip)
    ends = [round((s.number + 1) * scenes.SNIPPET * 16000) for s in snippets]
    windows = [played[end - len(s.wave) : end] for s, end in zip(snippets, ends, strict=True)]
    pairs = [(s.wave[-len(w) :], w) for s, w in zip(snippets, windows, strict=True) if w.std() > 0.02]
    assert len(pairs) > 3
    assert min(np.corrcoef(heard, window)[0, 1] for heard, window in pairs) > 0.9


@needs_package
@pytest.mark.slow
def test_export_is_what_the_videos_source_reads(tmp_path, monkeypatch):
    from counterpoint import data

    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    arcade.export(tmp_path / "mine", split="train", count=3, size=(64, 36))
    paths = arcade.export(tmp_path / "mine", split="test", count=3, size=(64, 36))
    assert all(path.is_file() for path in paths)
    found = data.load(f"videos:{tmp_path / 'mine'}")
    assert [note for note in found.notes if "training videos: too few" not in note and "valid split" not in note] == []
    assert (len(found.train) + len(found.valid), len(found.test)) == (3, 3)
    for video in found.test:
        number = int(video.name.rpartition("-")[2].removesuffix(".mp4"))
        np.testing.assert_array_equal(video.truth, scenes.truth(arcade.script("test", number)))


@pytest.mark.slow
@needs_package
def test_features_are_built_once_and_rebuilt_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    first = arcade.load(train=3, test=2)
    assert [b.name for b in first.train] == ["train-0000", "train-0001", "train-0002"]
    assert [v.visual.shape[:2] for v in first.test] == [(1, arcade.script("test", i).snippets) for i in range(2)]
    assert [b.label for b in first.train] == [c.label for c in SCRIPTS[:3]]
    monkeypatch.setattr(arcade, "features", lambda *a: pytest.fail("built again"))
    again = arcade.load(train=3, test=2)
    np.testing.assert_array_equal(first.train[2].audio, again.train[2].audio)
    np.testing.assert_array_equal(first.test[1].truth, again.test[1].truth)
    with pytest.raises(pytest.fail.Exception):
        arcade.load(train=3, test=2, seed=1)
    monkeypatch.undo()
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    files = list((tmp_path / "arcade").glob("*.npz"))
    assert len(files) == 2  # the valid clips are kept apart
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    mended = arcade.load(train=3, test=2)
    assert all("damaged" in note for note in mended.notes)
    np.testing.assert_array_equal(first.train[2].visual, mended.train[2].visual)


def test_the_package_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assets.cache_clear()
    with pytest.raises(CounterpointError, match="pip install --no-deps arcade"):
        arcade.load(train=1, test=1)
    assets.cache_clear()
    assert not list((tmp_path).rglob("*.npz"))


@pytest.mark.slow
@needs_package
def test_clips_are_told_apart_by_sight_and_sound_together(tmp_path, monkeypatch):
    """Neither trivial nor hopeless: snippet classifiers with the truth at hand do well, better with both senses."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score

    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    found = arcade.load(train=0, test=48)  # more than 40, so that worker processes build them
    names = {
        "sight": [v.visual[0] for v in found.test],
        "sound": [v.audio for v in found.test],
        "both": [np.hstack([v.visual[0], v.audio]) for v in found.test],
    }
    truth = [v.truth.reshape(-1, 16)[:, 8] for v in found.test]
    scores = {}
    for name, rows in names.items():
        model = LogisticRegression(max_iter=500, C=0.02).fit(np.concatenate(rows[:32]), np.concatenate(truth[:32]))
        scores[name] = average_precision_score(
            np.concatenate(truth[32:]), model.decision_function(np.concatenate(rows[32:]))
        )
    chance = np.concatenate(truth[32:]).mean()
    assert min(scores.values()) > 1.5 * chance
    assert scores["both"] > 3 * chance
    assert scores["both"] > max(scores["sight"], scores["sound"]) - 0.05
    assert scores["both"] < 0.98


@needs_package
def test_clips_are_items_of_two_modalities_too(tmp_path, monkeypatch):
    from counterpoint import data

    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    bags = arcade.load(train=3, test=2)
    found = data.load("arcade?train=3&test=2", task="aligned")
    assert list(found.modalities) == ["video", "audio"]
    assert found.train.labels.tolist() == [bag.label for bag in bags.train]
    for name, rows in (("video", bags.train[1].visual), ("audio", bags.train[1].audio)):
        (vector,) = found.train.column(name, np.array([1]))
        np.testing.assert_allclose(vector, np.concatenate([rows.mean(0), rows.max(0)]), rtol=1e-6)
        assert found.modalities[name].dim == len(vector)
