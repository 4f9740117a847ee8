"""The world of sprites and its source: what stands where, identities, captions, sounds, and the forms that tasks take."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import sprites
from counterpoint.data.worlds.sprites import scenes
from counterpoint.data.worlds.sprites.captions import EVENTS, caption, word
from counterpoint.data.worlds.sprites.drawing import Drawing, Thing, render_frames
from counterpoint.data.worlds.sprites.sounds import render_audio
from counterpoint.errors import CounterpointError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("arcade") is None, reason="draws with the package arcade: pip install --no-deps arcade"
)
SMALL = "sprites?train=30&valid=8&test=12&size=32"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTERPOINT_CACHE", str(folder))
        yield folder


def items(count):
    return np.arange(count)


# --- what stands where


def quiet(scene):
    """Draw the scene without light, which changes the colour of every pixel."""
    drawing = Drawing(scene)
    drawing.flicker = 0.0
    for _, cast in drawing.actors:
        cast.light = lambda t: 1.0
    return drawing


@needs_package
@pytest.mark.parametrize("number", range(4))
def test_a_mask_holds_the_pixels_that_change_with_its_event(number):
    truth = sprites.moment("test", number)
    with_it = quiet(truth.scene)
    without = quiet(replace(truth.scene, events=tuple(e for e in truth.scene.events if e is not truth.event)))
    changed = (with_it.draw(truth.time) != without.draw(truth.time)).any(2)
    mask = with_it.look(truth.time).mask(with_it.identity(truth.event))
    assert changed[mask].mean() > 0.95  # a sprite may have the colour of what is behind it
    # The rest of the change is the sprites' soft edges, and their parts behind other sprites.
    left, top, right, bottom = with_it.look(truth.time).box(with_it.identity(truth.event))
    inside = np.zeros_like(mask)
    inside[max(0, top - 8) : bottom + 8, max(0, left - 8) : right + 8] = True
    assert changed[inside].sum() > 0.8 * changed.sum()


@needs_package
def test_boxes_are_tight_and_every_pixel_belongs_to_one_thing():
    look = sprites.moment("train", 3).look
    assert set(np.unique(look.owner)) - {0} == set(look.things)
    total = np.zeros_like(look.owner)
    for identity in look.things:
        mask = look.mask(identity)
        left, top, right, bottom = look.box(identity)
        assert not mask[:, :left].any()
        assert not mask[:, right:].any()
        assert not mask[:top].any()
        assert not mask[bottom:].any()
        assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))
        total += mask
    assert np.array_equal(total > 0, look.owner > 0)
    assert total.max() == 1


@needs_package
def test_an_identity_follows_a_thing_that_moves():
    scene = replace(scenes.scene((7,)), events=())
    drawing = Drawing(scene)
    first = 1 + len(drawing.fixtures)
    followed = 0
    for identity, (name, size, _, speed, _, phase) in enumerate(drawing.roamers, first):
        for time in (1.0, 2.0):
            one, two = drawing.look(time), drawing.look(time + 0.25)
            x = (phase + speed * time) % (scenes.WIDTH + 60) - 30
            alone = all(look.things.get(identity) and look.mask(identity).sum() > 0.2 * size**2 for look in (one, two))
            if not alone or not size < x + 0.25 * speed < scenes.WIDTH - size or not size < x < scenes.WIDTH - size:
                continue
            assert one.things[identity] == two.things[identity] == Thing(identity, "roamer", name)
            middles = [sum(look.box(identity)[::2]) / 2 for look in (one, two)]
            assert middles[1] - middles[0] == pytest.approx(0.25 * speed, abs=4)
            assert middles[0] == pytest.approx(x, abs=0.3 * size)
            followed += 1
    assert followed >= 2


@needs_package
def test_looking_does_not_change_the_picture():
    truth = sprites.moment("valid", 0)
    (frame,) = render_frames(truth.scene, [truth.time])
    np.testing.assert_array_equal(truth.look.pixels, frame)
    np.testing.assert_array_equal(Drawing(truth.scene).draw(truth.time), frame)


@needs_package
def test_an_event_has_an_identity_while_it_is_seen_and_none_if_it_is_only_heard():
    scene = next(s for s in (scenes.scene((n,)) for n in range(100)) if any(e.visible is None for e in s.events))
    drawing = Drawing(scene)
    with pytest.raises(ValueError, match="not in list"):
        drawing.identity(next(e for e in scene.events if e.visible is None))
    for event in (e for e in scene.events if e.visible):
        thing = drawing.things[drawing.identity(event)]
        assert (thing.kind, thing.name) == ("event", event.kind)


def test_scenes_depend_on_their_seed_alone_and_a_name_changes_nothing():
    one, named, other = scenes.scene((1, 2)), scenes.scene((1, 2), "a"), scenes.scene((1, 3))
    assert one == replace(named, name="")
    assert one.events != other.events


# --- words


@pytest.mark.parametrize(
    ("things", "tile", "expected"),
    [
        ([], None, "nothing in space"),
        ([("roamer", "enemies/bee")], "grassMid", "a bee on grass"),
        (
            [
                ("roamer", "enemies/bee"),
                ("event", "explosion"),
                ("roamer", "topdown_tanks/tank_blue"),
                ("roamer", "enemies/bee"),
            ],
            "grassMid",
            "two bees and a blue tank on grass, an explosion",
        ),
        (
            [("fixture", "tiles/bush"), ("fixture", "tiles/bush"), ("roamer", "space_shooter/playerShip2_orange")],
            "snowMid",
            "two bushes and an orange ship on snow",
        ),
        (
            [("roamer", "female_person"), ("roamer", "female_person"), ("roamer", "enemies/slimeBlue")],
            "dirtMid",
            "a blue slime and two female people on dirt",
        ),
        ([("event", "hurt"), ("event", "meteors")], "sandMid", "nothing on sand, a fight and a meteor shower"),
    ],
)
def test_captions_count_and_name(things, tile, expected):
    assert caption([Thing(n, kind, name) for n, (kind, name) in enumerate(things, 1)], tile) == expected


@needs_package
def test_every_thing_of_many_scenes_has_a_word_of_its_own():
    names = {thing for n in range(60) for thing in Drawing(scenes.scene((n, 1))).things.values()}
    words = {(thing.kind, thing.name): word(thing) for thing in names}
    assert all(text.islower() and "_" not in text and "/" not in text for text in words.values())
    # The two orange ships have the same words.
    assert len(set(words.values())) >= len(words) - 1


# --- the source


@pytest.fixture(scope="module")
def small(cache):
    return data.load(SMALL + "&sound=1", task="aligned")


@needs_package
def test_pictures_captions_and_sounds_belong_to_one_moment(small):
    assert {name: modality.kind for name, modality in small.modalities.items()} == {
        "image": "image",
        "text": "text",
        "audio": "audio",
    }
    assert [len(split) for split in (small.train, small.valid, small.test)] == [30, 8, 12]
    assert small.train.column("image", items(30)).shape == (30, 32, 32, 3)
    assert small.train.column("audio", items(30)).shape == (30, 16000)
    for n, (text, label) in enumerate(zip(small.test.column("text", items(12)), small.test.labels, strict=True)):
        truth = sprites.moment("test", n)
        assert sprites.CLASSES[label] == truth.event.kind
        assert EVENTS.get(truth.event.kind, truth.event.kind) in text.partition(", ")[2]
        np.testing.assert_array_equal(small.test.column("image", np.array([n]))[0], sprites.picture(truth, 32))
        assert bool(small.test.present("audio", np.array([n]))[0]) == (sprites.heard(truth) is not None)


@needs_package
def test_a_sound_is_the_second_of_its_event_however_late(small):
    heard = 0
    for n in range(30):
        truth = sprites.moment("train", n)
        found = sprites.heard(truth)
        if truth.event.audible is None:
            assert found is None
            continue
        assert truth.event.visible is not None
        start = truth.event.audible[0] + truth.time - truth.event.visible[0]
        if found is not None:
            wave = render_audio(truth.scene)[round(start * 16000) :][:16000]
            np.testing.assert_allclose(found[: len(wave)] / 32767, wave, atol=1e-4)
            heard += 1
    assert heard == small.train.present("audio", items(30)).sum()
    assert 10 < heard < 30


@needs_package
def test_the_views_form_has_the_same_pictures_with_the_events_as_labels(small):
    views = data.load(SMALL, task="views")
    for split in ("train", "valid", "test"):
        one, other = getattr(views, split), getattr(small, split)
        np.testing.assert_array_equal(one.images(items(8)), other.column("image", items(8)))
        np.testing.assert_array_equal(one.labels, other.labels)
    assert views.classes == sprites.CLASSES


@needs_package
def test_the_splits_and_seeds_differ_and_the_set_is_drawn_once(small, monkeypatch):
    assert small.train.column("text", items(8)) != small.test.column("text", items(8))
    monkeypatch.setattr(sprites, "moment", lambda *a: pytest.fail("drawn again"))
    again = data.load(SMALL + "&sound=1", task="aligned")
    np.testing.assert_array_equal(again.train.column("audio", items(30)), small.train.column("audio", items(30)))
    with pytest.raises(pytest.fail.Exception):
        data.load(SMALL + "&sound=1&seed=1", task="aligned")


@needs_package
@pytest.mark.parametrize(
    ("spec", "task", "says"),
    [
        ("sprites?train=1", "aligned", "train and test of at least 2"),
        ("sprites?sound=2", "aligned", "sound of 0 or 1"),
        ("sprites?seed=-1", "aligned", "a seed of at least 0"),
        ("sprites?size=4", "aligned", "pixels"),
        ("sprites?sound=1", "views", "for the task aligned"),
        ("sprites?valid=-2", "aligned", "valid"),
    ],
)
def test_options_that_do_not_fit_are_refused(spec, task, says):
    with pytest.raises(CounterpointError, match=says):
        data.load(spec, task=task)
