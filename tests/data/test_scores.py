"""Engraved music and its sound: what is read, whether page and sound agree, the splits, the cache, and bad options."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import zipfile

import numpy as np
import pytest

from counterpoint.data.images import ImageSplit
from counterpoint.data.pairs import AlignedData, WaveSplit
from counterpoint.data.scores import engraving, notes, pairs, renditions, synthesis, windows
from counterpoint.errors import CounterpointError, DataError

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in notes.PACKAGES),
    reason="needs pip install 'counterpoint[music]' and pip install --no-deps tinysoundfont pretty_midi",
)
RATE = synthesis.RATE


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTERPOINT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def small(cache):
    return pairs.load(pieces=6)


@pytest.fixture(scope="module")
def made(small):
    """Return the small set's renditions, with the scores they were made from."""
    found = renditions.stored(6, 0, [])
    return found, {r.name: notes.read(notes.packages()[0] / f"{r.name}.mxl") for r in found}


def every(split):
    return np.arange(len(split))


def splits(found):
    splits = {"train": found.train, "valid": found.valid, "test": found.test}
    return splits | {"real": found.shifts["real"], "unpaired": found.unpaired}


# --- the set


def test_load_returns_aligned_splits_with_its_spec(small):
    assert isinstance(small, AlignedData)
    assert small.spec == {
        "modalities": {
            "sheet": {"kind": "image", "size": 120},
            "audio": {"kind": "audio", "rate": 22050, "samples": 92610},
        },
        "classes": 0,
    }
    assert small.domains == ("clean", "real")
    assert small.notes == []
    for name, split in splits(small).items():
        assert isinstance(split.columns["sheet"], ImageSplit)
        assert isinstance(split.columns["audio"], WaveSplit)
        assert split.labels is None
        assert set(split.domains) == {int(name in ("real", "unpaired"))}
        sheet, audio = (split.column(m, np.array([len(split) - 1, 3, 3])) for m in ("sheet", "audio"))
        assert (sheet.shape, sheet.dtype) == ((3, 120, 120, 3), np.uint8)
        assert (audio.shape, audio.dtype) == ((3, 92610), np.float32)
        assert np.abs(audio).max() <= 1
        np.testing.assert_array_equal(sheet[1], sheet[2])
        np.testing.assert_array_equal(audio[1], audio[2])
        np.testing.assert_array_equal(sheet[..., 0], sheet[..., 2])
        assert all(split.column(m, np.arange(0)).shape[0] == 0 for m in ("sheet", "audio"))


def test_pieces_are_of_one_split_each_and_real_is_the_test_again(small, made):
    groups = {name: set(split.groups.tolist()) for name, split in splits(small).items()}
    assert groups == {"train": {0}, "valid": {1}, "test": {2}, "real": {2}, "unpaired": {3, 4, 5}}
    np.testing.assert_array_equal(small.test.groups, small.shifts["real"].groups)
    names = {r.number: r.name for r in made[0]}
    assert len(set(names.values())) == 6
    tunes = [tune for name in names.values() for tune in made[1][name].tune()]
    assert len(set(tunes)) == 12


def test_unpaired_pieces_are_seen_or_heard_but_not_both(small):
    split = small.unpaired
    seen, heard = (split.present(m, every(split)) for m in ("sheet", "audio"))
    assert (seen ^ heard).all()
    assert set(split.groups[seen]) == {4}
    assert set(split.groups[heard]) == {3, 5}
    assert not split.column("sheet", np.flatnonzero(heard)[:5]).any()
    assert not split.column("audio", np.flatnonzero(seen)[:5]).any()
    assert split.column("sheet", np.flatnonzero(seen)).std((1, 2, 3)).min() > 3
    assert split.column("audio", np.flatnonzero(heard)).std(1).min() > 1e-3
    for part in ("train", "test"):
        whole = splits(small)[part]
        assert whole.present("sheet", every(whole)).all()
        assert whole.present("audio", every(whole)).all()


def test_domains_differ_in_print_and_sound_but_not_in_content(small):
    clean, real = small.test, small.shifts["real"]
    assert len(clean) == len(real)
    sheets = [split.column("sheet", every(clean))[..., 0].astype(float) for split in (clean, real)]
    # White paper against grey.
    assert np.median(sheets[0]) == 255
    assert np.median(sheets[1]) < 245
    # The strict tempo repeats; the expressive one does not.
    at = {r.domain: r.at for r in renditions.stored(6, 0, []) if r.number == 2}
    strict, free = (np.diff(at[domain]) for domain in (0, 1))
    assert len(np.unique(strict.round(3))) < len(np.unique(free.round(3))) / 3


def test_hop_and_seconds_select_windows(small):
    fewer = pairs.load(pieces=6, hop=5, seconds=1.0)
    assert fewer.modalities["audio"].samples == 44100
    for name, split in splits(fewer).items():
        whole = splits(small)[name]
        rows = np.concatenate([np.flatnonzero(whole.groups == g)[::5] for g in np.unique(whole.groups)])
        np.testing.assert_array_equal(split.groups, whole.groups[rows])
        np.testing.assert_array_equal(split.column("sheet", every(split)), whole.column("sheet", rows))
        centre = slice((92610 - 44100) // 2, (92610 + 44100) // 2)
        np.testing.assert_array_equal(split.column("audio", every(split)), whole.column("audio", rows)[:, centre])


# --- page and sound agree


def rise(wave, pitch):
    """Measure decibels by which a pitch is louder in 120 ms after the middle of a wave than before it."""
    middle, length = len(wave) // 2, round(0.12 * RATE)
    tone = np.hanning(length) * np.exp(-2j * np.pi * 440 * 2 ** ((pitch - 69) / 12) * np.arange(length) / RATE)
    gap = round(0.01 * RATE)
    before, after = (abs(wave[a : a + length] @ tone) for a in (middle - gap - length, middle + gap))
    return 20 * math.log10((after + 1e-3) / (before + 1e-3))


def test_the_pitch_of_an_onset_rises_at_the_middle_of_its_sound(made):
    renditions, read = made
    for rendition in (r for r in renditions if r.wave.size):
        score = read[rendition.name]
        lowest = [min(n.pitch for n in score.notes if n.onset == onset) for onset in score.onsets]
        share = {}
        for shift in (-0.25, 0.0, 0.25):
            waves = windows.SoundWindows([rendition.wave], [rendition.at + np.float32(shift)], RATE)
            found = waves.waves(np.arange(len(lowest)))
            share[shift] = np.mean([rise(wave, pitch) > 3 for wave, pitch in zip(found, lowest, strict=True)])
        assert share[0.0] >= 0.95, rendition.name
        assert max(share[-0.25], share[0.25]) < 0.6, rendition.name


def test_a_head_stands_in_the_middle_of_a_window_as_high_as_it_sounds(made):
    from scipy.ndimage import minimum_filter
    from scipy.stats import spearmanr

    renditions, read = made
    for rendition in (r for r in renditions if r.strip.size and r.domain == 0):
        score = read[rendition.name]
        sheets = windows.SheetWindows([rendition.strip], [rendition.x]).images(np.arange(len(score.onsets)))[..., 0]
        height, pitch = [], []
        for onset, sheet in zip(score.onsets, sheets, strict=True):
            # Black in all of 3 x 3 pixels: a head, not a line or a stem. Stems of the soprano go up from its heads.
            solid = minimum_filter(255 - sheet[:62, 50:70], 3)[:, 8:13].max(1) > 100
            sung = [n.pitch for n in score.notes if n.onset == onset and n.voice == 0]
            if sung and solid.any():
                height.append(-np.flatnonzero(solid)[0])
                pitch.append(sung[0])
        assert len(pitch) > 0.6 * sum(n.voice == 0 for n in score.notes)
        assert spearmanr(height, pitch)[0] > 0.7, rendition.name


def test_the_grand_staff_fills_the_snippet(made):
    for rendition in (r for r in made[0] if r.strip.size and r.domain == 0):
        # Staff lines are dark along most of the strip.
        rows = np.flatnonzero((rendition.strip[:, 80:-80] < 235).mean(1) > 0.7)
        assert 20 <= rows[0] < 40
        assert 80 < rows[-1] < 100
        assert abs(rows[0] + rows[-1] - 119) <= 2
        ink = (255 - rendition.strip.astype(float)).sum(1)
        assert ink[20:100].sum() > 0.95 * ink.sum()


def test_onsets_go_on_along_strip_and_sound(made):
    for rendition in made[0]:
        if rendition.strip.size:
            assert (np.diff(rendition.x) > 2).all()
            assert rendition.x[0] >= 60
            assert rendition.x[-1] <= rendition.strip.shape[1] - 60
        if rendition.wave.size:
            assert (np.diff(rendition.at) > 0.05).all()
            assert rendition.at[0] == synthesis.LEAD
            assert rendition.at[-1] < len(rendition.wave) / RATE - synthesis.TAIL


# --- windows


def test_windows_end_in_white_and_silence():
    strip = np.arange(300, dtype=np.uint8)[None].repeat(120, 0) // 2
    sheets = windows.SheetWindows(
        [strip, strip[:, :0]], [np.array([10, 150, 295], np.float32), np.zeros(1, np.float32)]
    )
    found = sheets.images(np.array([2, 0, 1, 3]))[:, 7, :, 0]
    assert (found[1][:50] == 255).all()
    np.testing.assert_array_equal(found[1][50:], strip[0, :70])
    np.testing.assert_array_equal(found[2], strip[0, 90:210])
    np.testing.assert_array_equal(found[0][:65], strip[0, 235:])
    assert (found[0][65:] == 255).all()
    assert (found[3] == 0).all()

    wave = np.arange(1, 1001, dtype=np.int16)
    times = np.array([0, 500 / RATE, 1000 / RATE, 9.0], np.float32)
    sounds = windows.SoundWindows([wave, wave[:0]], [times, times[:1]], 200)
    found = sounds.waves(np.arange(5)) * 32767
    np.testing.assert_allclose(found[0], [0] * 100 + list(range(1, 101)), rtol=1e-6)
    np.testing.assert_allclose(found[1], range(401, 601), rtol=1e-6)
    np.testing.assert_allclose(found[2], list(range(901, 1001)) + [0] * 100, rtol=1e-6)
    assert not found[3:].any()


# --- reading


def note(step, octave, duration, extra="", kind="quarter"):
    pitch = f"<pitch><step>{step}</step><octave>{octave}</octave></pitch>"
    ties = "".join(f'<tie type="{t}"/>' for t in ("stop", "start") if t in extra)
    hold = "<notations><fermata/></notations>" if "hold" in extra else ""
    chord = "<chord/>" if "chord" in extra else ""
    return f"<note>{chord}{pitch}<duration>{duration}</duration>{ties}<type>{kind}</type>{hold}</note>"


REST = "<note><rest/><duration>2</duration><type>quarter</type></note>"
GRACE = "<note><grace/><pitch><step>F</step><octave>5</octave></pitch><type>eighth</type></note>"
PARTS = [
    # (divisions, first measure, second measure): each measure two quarters long.
    (2, note("C", 5, 2) + GRACE + note("D", 5, 2, "start"), note("D", 5, 2, "stop") + note("E", 5, 2, "hold")),
    (1, note("A", 4, 1) + note("F", 4, 1, "chord") + note("G", 4, 1), note("G", 4, 2, kind="half")),
    (2, REST + note("E", 4, 2), note("E", 4, 2) + "<forward><duration>2</duration></forward>"),
    (4, note("C", 3, 8, "hold", "half"), note("C", 3, 4) + note("C", 3, 4)),
]
TIME = "<time><beats>2</beats><beat-type>4</beat-type></time>"


def musicxml(parts, between="</measure><measure>"):
    body = "".join(
        f"<part><measure><attributes><divisions>{divisions}</divisions>{TIME}</attributes>"
        f"{first}{between}{second}</measure></part>"
        for divisions, first, second in parts
    )
    return f"<score-partwise>{body}</score-partwise>"


def test_what_is_read_from_a_file(tmp_path):
    file = tmp_path / "tune.xml"
    file.write_text(musicxml(PARTS))
    score = notes.read(file)
    found = [(n.onset, n.length, n.pitch, n.voice) for n in score.notes]
    assert found == [
        (0, 1, 72, 0),
        (0, 1, 65, 1),
        (0, 1, 69, 1),
        (0, 2, 48, 3),
        (1, 2, 74, 0),  # tied over the bar
        (1, 1, 67, 1),
        (1, 1, 64, 2),
        (2, 2, 67, 1),  # not tied: struck again
        (2, 1, 64, 2),
        (2, 1, 48, 3),
        (3, 1, 76, 0),
        (3, 1, 48, 3),
    ]
    assert score.quarters == 4
    assert score.holds == ((3, 4),)
    assert score.onsets.tolist() == [0, 1, 2, 3]
    with zipfile.ZipFile(tmp_path / "tune.mxl", "w") as packed:
        packed.writestr("META-INF/container.xml", "<container/>")
        packed.writestr("tune.musicxml", file.read_text())
    assert notes.read(tmp_path / "tune.mxl") == score

    strip, x = engraving.engrave(score)
    assert strip.shape[0] == engraving.FINE * engraving.HEIGHT
    assert (np.diff(x) > 10).all()


def test_what_is_not_four_single_voices_is_passed_over(tmp_path):
    file = tmp_path / "trio.xml"
    file.write_text(musicxml(PARTS[:3]))
    assert notes.read(file) is None
    file.write_text(musicxml([*PARTS[:3], (4, PARTS[3][1] + "<backup><duration>8</duration></backup>", PARTS[3][2])]))
    assert notes.read(file) is None
    file.write_text(musicxml([*PARTS[:3], (2, REST + REST, REST + REST)]))
    assert notes.read(file) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<score-partwise><part>", "ParseError"),
        (musicxml([(d, a, b.replace("duration", "length")) for d, a, b in PARTS]), "a note without duration"),
        (musicxml([(d, a, b.replace("octave>", "height>")) for d, a, b in PARTS]), "without pitch/octave"),
        (musicxml([*PARTS[:3], (4, PARTS[3][1], note("C", 3, 4))]), "measure 2 differ in length"),
        (
            musicxml(PARTS[:3]).replace("</score", musicxml(PARTS[3:], "")[16:] + "</score", 1)[:-17],
            "number of measures",
        ),
        (musicxml([*PARTS[:3], (11, note("C", 3, 20), note("C", 3, 22))]), "11 divisions"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(tmp_path, text, message):
    file = tmp_path / "torn.xml"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"torn\.xml.*{message}"):
        notes.read(file)


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "torn.mxl").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"torn\.mxl.*BadZipFile"):
        notes.read(tmp_path / "torn.mxl")
    with pytest.raises(DataError, match=r"gone\.mxl.*FileNotFoundError"):
        notes.read(tmp_path / "gone.mxl")


def melody(*steps):
    """Return the piece of PARTS with another soprano."""
    a, b, c, d = (note(step, 4, 2) for step in steps)
    return musicxml([(2, a + b, c + d), *PARTS[1:]])


def test_pieces_with_one_tune_or_of_another_length_are_passed_over(tmp_path, monkeypatch):
    files = {
        "bwv1.xml": melody("C", "D", "E", "C"),
        "bwv2.xml": melody("G", "A", "B", "C"),
        "bwv3.xml": melody("F", "G", "A", "F"),  # the tune of the first, in F
        "bwv4.xml": "torn",
        "bwv5.xml": musicxml([(d, a + REST * d, b) for d, a, b in PARTS]),  # six quarters
        "other.xml": melody("C", "B", "A", "G"),
        "bwv6.krn": "another format",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(notes, "packages", lambda: (tmp_path, tmp_path))
    monkeypatch.setattr(notes, "QUARTERS", (4, 4))
    orders = set()
    for seed in range(9):
        left_out = []
        found = [score.name for score in notes.candidates(seed, left_out)]
        assert len(found) == 2
        assert len({"bwv1", "bwv3"} & set(found)) == 1
        assert "bwv2" in found
        assert len(left_out) == 1
        assert "bwv4.xml" in left_out[0]
        orders.add(tuple(found))
    assert len(orders) > 2
    monkeypatch.setattr(notes, "QUARTERS", (5, 9))
    assert [score.name for score in notes.candidates(0, [])] == ["bwv5"]


def test_an_engraving_without_the_notes_is_refused(made):
    score = next(iter(made[1].values()))
    ghost = notes.Note(0.0, 1.0, 60, 0, "no-such-head")
    altered = notes.Score(score.name, score.xml, (*score.notes, ghost), score.holds, score.quarters)
    with pytest.raises(DataError, match=r"1 of .* notes are not in the engraving"):
        engraving.engrave(altered)
    with pytest.raises(DataError, match=r"verovio cannot read it|not have the expected form"):
        engraving.engrave(notes.Score("nothing", "", score.notes, (), score.quarters))


# --- playing and printing


def peak_hertz(wave):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 2**18))
    return np.argmax(spectrum) * RATE / 2**18


def test_a_key_sounds_at_its_pitch_from_its_start():
    strike = synthesis.Strike(0.25, 1.25, 69, 90, 0)
    wave = synthesis.play([strike])
    assert len(wave) == round(1.25 * RATE) + round(synthesis.TAIL * RATE)
    assert np.abs(wave[: round(0.25 * RATE)]).max() < 1e-4
    assert np.abs(wave[round(0.25 * RATE) : round(0.3 * RATE)]).max() > 1e-2
    body = slice(round(0.3 * RATE), round(1.2 * RATE))
    plain, sharp = peak_hertz(wave[body]), peak_hertz(synthesis.play([strike], cents=50)[body])
    assert 1200 * math.log2(sharp / plain) == pytest.approx(50, abs=5)
    assert 1200 * math.log2(plain / 440) == pytest.approx(0, abs=15)
    assert not np.array_equal(synthesis.play([strike], program=6), wave)


def test_a_repeated_key_is_struck_again_though_the_first_stops_late():
    twice = [synthesis.Strike(0.1, 0.65, 60, 90, 0), synthesis.Strike(0.6, 1.1, 60, 90, 0)]
    wave = synthesis.play(twice)
    level = [np.sqrt((wave[round(t * RATE) : round((t + 0.1) * RATE)] ** 2).mean()) for t in (0.45, 0.7)]
    assert level[1] > level[0]


def test_paper_is_turned_not_sheared_and_its_middle_stays():
    grid = np.zeros((240, 3000), np.float32)
    grid[:, 200::200] = 1
    grid[118:122] = 1
    turned = engraving._turned(grid, np.random.default_rng(1))
    down = np.arange(240)

    def slope_across(x):  # of the horizontal line, near x
        columns = np.r_[x - 40 : x - 8, x + 8 : x + 40]
        rows = [(turned[90:150, c] * down[90:150]).sum() / turned[90:150, c].sum() for c in columns]
        return np.polyfit(columns, rows, 1)[0]

    def slope_down(x):  # of the vertical line at x: pixels to the side for a pixel down
        rows = np.r_[20:100, 140:220]
        near = np.arange(x - 10, x + 11)
        places = turned[rows][:, near] @ near / turned[rows][:, near].sum(1)
        fit = np.polyfit(rows - 120, places, 1)
        assert fit[1] == pytest.approx(x, abs=0.6)
        return fit[0]

    lines = range(400, 2700, 200)
    across, downward = (np.array([slope(x) for x in lines]) for slope in (slope_across, slope_down))
    np.testing.assert_allclose(downward, -across, atol=0.004)
    assert 0.005 < np.abs(across).max() <= math.tan(math.radians(1.6))


def test_a_rendition_is_the_same_each_time_and_another_with_another_seed(made):
    score = next(iter(made[1].values()))
    one, two, other = (renditions.render(score, 0, 1, seed) for seed in (3, 3, 4))
    for part in ("strip", "x", "wave", "at"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    assert not np.array_equal(one.wave[:9999], other.wave[:9999])
    assert one.strip.shape != other.strip.shape or not np.array_equal(one.strip, other.strip)


# --- the cache, and what can go wrong


def test_a_damaged_cache_is_built_again_to_the_same_bytes(cache, small):
    (file,) = (cache / "scores").glob("*.npz")
    whole = file.read_bytes()
    digest = hashlib.sha256(whole).digest()
    file.write_bytes(whole[: len(whole) // 2])
    again = pairs.load(pieces=6)
    assert len(again.notes) == 1
    assert f"{file} was damaged" in again.notes[0]
    assert hashlib.sha256(file.read_bytes()).digest() == digest
    np.testing.assert_array_equal(again.train.column("audio", np.arange(3)), small.train.column("audio", np.arange(3)))


def rendition(score, number, domain, seed=0, *, sheet=True, sound=True):
    """Replace `render` by a cheap stand-in."""
    if score.name == "b":
        raise DataError("b: verovio cannot read it")
    strip, wave = np.zeros((120, 200 * sheet), np.uint8), np.zeros(99 * sound, np.int16)
    return renditions.Rendition(
        score.name, number, domain, strip, np.zeros(2, np.float32), wave, np.ones(2, np.float32)
    )


def candidates(names):
    return lambda seed, left_out: (notes.Score(n, "", (), (), 1.0) for n in names)


def test_what_cannot_be_drawn_is_named_and_another_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(renditions, "render", rendition)
    monkeypatch.setattr(renditions, "candidates", candidates("abcdefgh"))
    for _ in range(2):  # built, then from the cache
        said = []
        found = renditions.stored(6, 0, said)
        assert [r.name for r in found] == list("acddefg")
        assert said == ["pieces left out (1): b: verovio cannot read it"]


def test_more_pieces_than_exist_raise_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(renditions, "render", rendition)
    monkeypatch.setattr(renditions, "candidates", candidates("acdefg"))
    with pytest.raises(CounterpointError, match=r"scores has 6 pieces of fitting length.*got pieces=7"):
        pairs.load(pieces=7)
    monkeypatch.setattr(renditions, "candidates", candidates("abdefg"))
    with pytest.raises(CounterpointError, match=r"scores has 5 pieces of fitting length.*got pieces=6"):
        pairs.load(pieces=6)
    assert not list((tmp_path / "scores").glob("*.npz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pieces": 5}, "pieces >= 6"),
        ({"seconds": 0.0}, "0.1 to 30"),
        ({"seconds": math.nan}, "0.1 to 30"),
        ({"seconds": 31.0}, "0.1 to 30"),
        ({"hop": 0}, "hop >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"task": "views"}, "for the task aligned"),
    ],
)
def test_options_out_of_range_raise_an_error(options, message):
    with pytest.raises(CounterpointError, match=message):
        pairs.load(**options)


@pytest.fixture
def fresh():
    notes.packages.cache_clear()
    yield
    notes.packages.cache_clear()


def test_a_missing_package_is_named(monkeypatch, fresh):
    find = importlib.util.find_spec
    gone = ("tinysoundfont", "verovio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    with pytest.raises(CounterpointError) as caught:
        pairs.load(pieces=6)
    assert "needs verovio, tinysoundfont, not installed" in str(caught.value)
    assert "pip install 'counterpoint[music]'" in str(caught.value)
    assert "pip install --no-deps tinysoundfont pretty_midi" in str(caught.value)


def test_packages_without_their_files_are_named(monkeypatch, fresh, tmp_path):
    find = importlib.util.find_spec

    class Bare:
        submodule_search_locations = (str(tmp_path),)

    bare = {"music21"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: Bare if name in bare else find(name, *a))
    with pytest.raises(CounterpointError, match="this copy of music21 has no chorales"):
        notes.packages()
    bare.clear()
    bare.add("pretty_midi")
    with pytest.raises(CounterpointError, match=r"TimGM6mb\.sf2: no such file"):
        notes.packages()
