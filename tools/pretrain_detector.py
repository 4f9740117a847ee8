"""Train the small detector that the package contains (`src/counterpoint/pretrained/arcade-small`), and measure it.

    pip download --no-deps scikit-image pygame-ce; unzip both into FOLDER
    PYTHONPATH=src python tools/pretrain_detector.py --extra FOLDER

It learns from clips that are drawn here, with one label each. They are scenes of the source `arcade`, the same over moving
photographs, and calm clips. Calm clips show photographs, with speech, music or noise. Nothing of it is real footage of violence.
The photographs are public domain, CC0 or CC BY 2.0 (PICTURES names them). Speech is synthesised by espeak NG, music and noise here.

Other photographs, other voices and other scenes measure it. So do recorded sounds of the package pygame-ce, which are never trained
on: a blast, a punch, a car door, music. The figures go into the card beside the weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint import encoders, training
from counterpoint.data import arcade
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.media import sample_times
from counterpoint.data.worlds.sprites.drawing import Drawing
from counterpoint.data.worlds.sprites.scenes import FPS, FRAMES, HEIGHT, RATE, SNIPPET, WIDTH, Scene, scene, truth
from counterpoint.data.worlds.sprites.sounds import render_audio
from counterpoint.files import patient_threads

ROOT = Path(__file__).parents[1]
HOME = ROOT / "src/counterpoint/pretrained/arcade-small"
# package, file in it, licence; the last three are held out
PICTURES = (
    ("skimage", "data/astronaut.png", "public domain (NASA)"),
    ("skimage", "data/chelsea.png", "CC0"),
    ("skimage", "data/brick.png", "CC0"),
    ("skimage", "data/grass.png", "CC0"),
    ("skimage", "data/gravel.png", "CC0"),
    ("sklearn", "datasets/images/china.jpg", "CC BY 2.0 (danielbuechele)"),
    ("sklearn", "datasets/images/flower.jpg", "CC BY 2.0 (vultilion)"),
    ("skimage", "data/coffee.png", "CC0"),
    ("skimage", "data/rocket.jpg", "CC0 (SpaceX)"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain (U.S. Navy)"),
)
HELD_OUT = 3
VOICES = (
    ("en-us", "en-us+f2", "en-gb-scotland", "en-gb-scotland+m5", "de+f2", "de+m7", "it+m3", "es+f4", "sv+f5", "nl"),
    ("fr+f3", "pl+m1"),
)
WORDS = (
    "Good evening and welcome to the programme.",
    "The train to the coast leaves from platform four.",
    "Please close the door and take a seat at the table.",
    "Yesterday the weather was warm, but rain is expected tomorrow.",
    "Could you tell me where the nearest station is?",
    "We planted three apple trees in the garden last spring.",
)
COUNTS = {"train": (200, 350, 350), "valid": (30, 60, 60), "test": (100, 100, 60)}  # arcade, over photographs, calm
SEED = 2026
ALARMS = 10.0  # false alarms in an hour of the valid clips: the goal of the threshold


class Filmed(Drawing):
    """A scene whose landscape is a part of photographs, under a camera that pans, zooms, shakes and cuts."""

    def __init__(self, drawn: Scene, photographs: Sequence[Image.Image], *, calm: bool) -> None:
        super().__init__(drawn)
        rng = np.random.default_rng([SEED, drawn.seed])
        cuts = [0.0, *np.sort(rng.uniform(1, drawn.duration, rng.poisson(drawn.duration / 9)))]
        self.shots = []
        for at in cuts:
            picture = photographs[rng.integers(len(photographs))]
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            gains = rng.uniform(0.5, 1.3) * rng.uniform(0.8, 1.2, 3)
            levels = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.5)
            tables = [min(255, round(float(level * gain))) for gain in gains for level in levels]
            self.shots.append((float(at), picture, tables, *rng.uniform(0, 1, 6)))
        self.shake = float(rng.exponential(0.006))
        if calm and rng.random() < 0.7:
            self.roamers = []

    def draw(self, time: float) -> NDArray[np.uint8]:
        at, picture, tables, x, y, dx, dy, zoom, rate = max((s for s in self.shots if s[0] <= time), key=lambda s: s[0])
        t = (time - at) / 12
        size = (0.35 + 0.5 * zoom) * (1 + 0.3 * (rate - 0.5) * t)
        wide = min(picture.width, picture.height * WIDTH / HEIGHT) * min(1.0, size)
        high = wide * HEIGHT / WIDTH
        shake = self.shake * picture.width * np.sin([7.1 * time, 9.7 * time + 1])
        left = np.clip((x + (dx - 0.5) * t) * (picture.width - wide) + shake[0], 0, picture.width - wide)
        top = np.clip((y + (dy - 0.5) * t) * (picture.height - high) + shake[1], 0, picture.height - high)
        box = (float(left), float(top), float(left + wide), float(top + high))
        self.base = picture.resize(self.size, Image.Resampling.BILINEAR, box=box).point(tables).convert("RGBA")
        return super().draw(time)


# --- sound ------------------------------------------------------------------------------------------------------------


def speech(voices: Sequence[str]) -> list[NDArray[np.float32]]:
    """Speak every sentence in every voice: waves at 16 kHz in [-1, 1]."""
    from counterpoint.data.espeak import sounds_of

    jobs = [(voice, 150, 50, text) for voice in voices for text in WORDS]
    sounds, _ = sounds_of(jobs, 5 * RATE, RATE)
    return [wave.astype(np.float32) / 32768 for wave in sounds]


def bed(rng: np.random.Generator, length: int, spoken: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Make calm sound: speech, chords, coloured noise, or silence, and sums of them."""
    wave = np.zeros(length, np.float32)
    kinds = rng.random(3) < (0.5, 0.35, 0.6)
    if kinds[0]:
        at = 0
        while at < length:
            part = spoken[rng.integers(len(spoken))][: length - at]
            wave[at : at + len(part)] += part * rng.uniform(0.3, 0.9)
            at += len(part) + round(rng.uniform(0.1, 2.0) * RATE)
    if kinds[1]:
        beat = round(rng.uniform(0.3, 1.2) * RATE)
        t = np.arange(beat) / RATE
        for at in range(0, length, beat):
            tones = 110 * 2 ** (rng.choice((0, 3, 5, 7, 10, 12, 15, 19), 3) / 12)
            part = sum(np.sin(2 * np.pi * tone * t) for tone in tones) * np.exp(-rng.uniform(1, 6) * t) / 6
            wave[at : at + beat] += part[: length - at].astype(np.float32)
    if kinds[2]:
        white = np.fft.rfft(rng.standard_normal(length))
        slope = rng.uniform(0, 2)  # from white noise to a rumble
        shaped = np.fft.irfft(white / np.maximum(1, np.arange(len(white))) ** (slope / 2), length)
        swell = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 0.5) * np.arange(length) / RATE)
        wave += (shaped / np.abs(shaped).max() * swell * 10 ** rng.uniform(-2.5, -0.7)).astype(np.float32)
    return wave


def loudness(rng: np.random.Generator, wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a wave to a random level of at most full scale."""
    top = float(np.abs(wave).max())
    return wave * np.float32(10 ** rng.uniform(-0.9, 0) * min(1.0, 0.98 / top) if top else 1.0)


def recorded(extra: Path) -> dict[str, NDArray[np.float32]]:
    """Read the recordings of pygame's examples at 16 kHz."""
    import av

    found = {}
    for name in ("boom", "punch", "car_door", "whiff", "house_lo"):
        sampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        with av.open(str(extra / "pygame/examples/data" / f"{name}.wav")) as file:
            parts = [out.to_ndarray()[0] for frame in file.decode(audio=0) for out in sampler.resample(frame)]
            parts += [out.to_ndarray()[0] for out in sampler.resample(None)]
        found[name] = np.concatenate(parts)
    return found


# --- clips ------------------------------------------------------------------------------------------------------------

Made = tuple[str, int, NDArray[np.float32], NDArray[np.float32], NDArray[np.int8]]


def rows(drawing: Drawing, wave: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the feature rows of a drawn clip and its sound."""
    eye, ear = encoders.build_visual({"name": "light"}), encoders.build_audio({"name": "logmel"})
    snippets = drawing.scene.snippets
    shown = np.floor(sample_times(snippets, eye.frames_per_snippet, SNIPPET) * FPS) / FPS
    frames = np.stack(
        [
            np.asarray(Image.fromarray(drawing.draw(float(t))).resize(eye.frame_size, Image.Resampling.BOX))
            for t in shown
        ]
    )
    length = round(ear.window_seconds * RATE)
    padded = np.concatenate([np.zeros(length, np.float32), wave])
    stops = length + np.rint((np.arange(snippets) + 1) * SNIPPET * RATE).astype(int)
    windows = np.stack([padded[stop - length : stop] for stop in stops])
    return eye(frames.reshape(snippets, eye.frames_per_snippet, *frames.shape[1:])), ear(windows)


def clips(split: str, photographs: Sequence[Image.Image], spoken: Sequence[NDArray[np.float32]]) -> Iterator[Made]:
    """Make the clips of a split: arcade scenes, scenes over photographs, calm clips."""
    drawn, filmed, calm = COUNTS[split]
    number = arcade.SPLITS.index(split)
    for index in range(drawn):
        clip = arcade.script(split, index)
        yield (clip.name, clip.label, *rows(Drawing(clip), render_audio(clip)), truth(clip))
    for index in range(filmed + calm):
        rng = np.random.default_rng([SEED, number, index])
        clip = scene((SEED, number, index), f"{split}-{'filmed' if index < filmed else 'calm'}-{index}")
        own = np.zeros(0, np.float32)
        if index < filmed:
            own = render_audio(clip)
        else:
            clip = replace(clip, label=0, events=())
        wave = bed(rng, round(clip.duration * RATE), spoken)
        if index < filmed:
            wave = 0.7 * wave * (rng.random() < 0.7) + own
        wave = loudness(rng, wave.astype(np.float32))
        made = Filmed(clip, photographs, calm=index >= filmed)
        yield (clip.name, clip.label, *rows(made, wave), truth(clip))


def struck(
    photographs: Sequence[Image.Image], spoken: Sequence[NDArray[np.float32]], sounds: dict[str, NDArray[np.float32]]
) -> Iterator[Made]:
    """Make calm held-out clips in which one recorded sound is heard three times. The truth lies around it."""
    for name, effect in sounds.items():
        for index in range(12):
            rng = np.random.default_rng([SEED, 9, index])
            clip = replace(scene((SEED, 9, index), f"{name}-{index}"), label=1, events=(), snippets=30)
            wave = 0.3 * bed(rng, round(clip.duration * RATE), spoken)
            marks = np.zeros(clip.snippets * FRAMES, np.int8)
            for beat in range(3):
                at = round((8.0 + 0.8 * beat) * RATE)
                part = effect[: 6 * RATE if beat == 0 else RATE]
                wave[at : at + len(part)] += 0.8 * part[: len(wave) - at]
            marks[round(8.0 * FPS) : round((9.6 + min(1.2, len(effect) / RATE)) * FPS)] = 1
            top = max(1.0, float(np.abs(wave).max()))
            yield (clip.name, 1, *rows(Filmed(clip, photographs, calm=True), wave / np.float32(top)), marks)


# --- training and figures ---------------------------------------------------------------------------------------------


def split_of(made: Sequence[Made]) -> list[TestVideo]:
    return [TestVideo(name, v[None], a, label, marks) for name, label, v, a, marks in made]


def figures(detector: Any, source: BagData, made: dict[str, list[Made]], struck_clips: list[Made]) -> dict:
    """Measure on held-out clips at the kept threshold: AP, false alarms an hour, and answers to recorded sounds."""
    from counterpoint.tasks.bags import frame_ap
    from counterpoint.tasks.calibration import Watched, counts, logit
    from counterpoint.use.calibrate import _watched

    def watched(rows_: Sequence[Made]) -> list[Watched]:
        return [_watched(detector, source, video) for video in split_of(rows_)]

    found: dict[str, Any] = {}
    for kind in ("test-0", "filmed"):
        part = [m for m in made["test"] if (kind in m[0])]
        scores = watched(part)
        marks = np.concatenate([m[4] for m in part])
        every = np.concatenate([logit(w.score) for w in scores])
        key = "arcade" if kind == "test-0" else "over held-out photographs"
        found[key] = {
            "clips": len(part),
            "average_precision": round(frame_ap(every[None], [len(every)], marks, FRAMES), 3),
            "chance": round(float(marks.mean()), 3),
        }
    at = np.array([detector.threshold])
    calm = watched([m for m in made["test"] if "calm" in m[0]])
    count = counts(calm, [detector.calibration(w.score) for w in calm])
    chosen = int(np.searchsorted(count.grid, at[0]))
    hours = float(count.hours.sum())
    found["calm, held-out photographs and voices"] = {
        "clips": len(calm),
        "hours": round(hours, 2),
        "false_alarms_per_hour": round(float(count.alarms[:, min(chosen, len(count.grid) - 1)].sum() / hours), 1),
    }
    for name in dict.fromkeys(m[0].rpartition("-")[0] for m in struck_clips):
        part = [m for m in struck_clips if m[0].rpartition("-")[0] == name]
        hits = [bool((detector.calibration(w.score)[w.truth] > detector.threshold).any()) for w in watched(part)]
        found[f"recorded {name}"] = {"clips": len(part), "alarmed": sum(hits)}
    return found


def stored(file: Path, make: Callable[[], list[Made]]) -> list[Made]:
    """Make clips once, and keep them in a file without pickles."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **arcade._pack(make()))
    with np.load(file, allow_pickle=False) as kept:
        return arcade._unpack(dict(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", type=Path, required=True, help="folder with the unpacked wheels")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/pretrain-detector"), help="folder for clips and the run"
    )
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    sys.path.append(str(options.extra))
    began = time.process_time()
    pictures = []
    for package, file, _ in PICTURES:
        spec = importlib.util.find_spec(package)
        folder = Path((spec.submodule_search_locations or [""])[0]) if spec else options.extra / package
        pictures.append(Image.open(folder / file).convert("RGB"))
    shown = {"train": pictures[:-HELD_OUT], "valid": pictures[:-HELD_OUT], "test": pictures[-HELD_OUT:]}
    voices = {"train": speech(VOICES[0]), "test": speech(VOICES[1])}
    voices["valid"] = voices["train"]
    made = {
        split: stored(
            options.work / f"{split}.npz", lambda split=split: list(clips(split, shown[split], voices[split]))
        )
        for split in COUNTS
    }
    beaten = stored(
        options.work / "recorded.npz", lambda: list(struck(shown["test"], voices["test"], recorded(options.extra)))
    )
    clock = options.work / "seconds"
    if not clock.is_file():
        clock.write_text(f"{time.process_time() - began:.0f}")
    spent = float(clock.read_text())
    began = time.process_time()
    print(f"clips: {spent:.0f} s of processor time")
    source = BagData(
        name="arcade clips and photographs",
        train=[Bag(name, v, a, label) for name, label, v, a, _ in made["train"]],
        valid=split_of(made["valid"]),
        test=split_of(made["test"]),
        visual_dim=made["train"][0][2].shape[1],
        audio_dim=made["train"][0][3].shape[1],
        backbones={"visual": {"name": "light"}, "audio": {"name": "logmel"}},
    )
    run = train(source, options)
    publish(run, source, made, beaten, began - spent)


def train(source: BagData, options: argparse.Namespace) -> Any:
    """Train MACIL-SD on the clips."""
    from unittest import mock

    from counterpoint.experiment import Experiment

    shutil.rmtree(options.work / "runs", ignore_errors=True)
    config = replace(training.default_config("macil-sd", "arcade"), epochs=options.epochs, dropout=0.3)
    with mock.patch.object(Experiment, "source", return_value=source):
        return training.train("macil-sd", config, data="arcade", seed=0, out=options.work / "runs", name="arcade-small")


def publish(run: Any, source: BagData, made: Any, beaten: Any, began: float) -> None:
    """Calibrate the run, measure it, and copy what detection needs into the package, with a card."""
    from counterpoint.engine.run import CALIBRATION, CONFIG, FACTS, WEIGHTS, Run
    from counterpoint.use import calibrate
    from counterpoint.use.detect import Detector

    detector = Detector(run)
    videos = [calibrate._watched(detector, source, video) for video in source.valid]
    fitted = calibrate._calibration(detector, videos, "drawn clips", "platt", None, ALARMS)
    run.save_calibration(fitted.as_dict())
    detector = Detector(Run.open(run.path))
    found = figures(detector, source, made, beaten)
    HOME.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, FACTS, WEIGHTS, CALIBRATION):
        shutil.copy(run.path / name, HOME / name)
    card = {
        "name": "arcade-small",
        "is": "a small audio-visual detector, trained on drawn arcade clips; not validated on real footage",
        "trained_on": {
            "clips": {"arcade": COUNTS["train"][0], "over photographs": COUNTS["train"][1], "calm": COUNTS["train"][2]},
            "sprites and sounds": "package arcade, CC0 (Kenney)",
            "photographs": {f"{p}/{f}": licence for p, f, licence in PICTURES[:-HELD_OUT]},
            "speech": "synthesised by espeak NG",
            "music and noise": "made by tools/pretrain_detector.py",
        },
        "measured_on": {
            "photographs": {f"{p}/{f}": licence for p, f, licence in PICTURES[-HELD_OUT:]},
            "recorded sounds": "examples of the package pygame-ce, never trained on",
        },
        "figures": found,
        "threshold": round(detector.threshold, 4),
        "threshold_chosen_for": fitted.facts["said"],
        "recall_of_valid_moments": {k: round(v, 2) for k, v in fitted.facts["recall"].items()},
        "false_alarms_per_hour_of_valid_clips": {
            k: round(v, 1) for k, v in fitted.facts["false_alarms_per_hour"].items()
        },
        "licence": "Apache-2.0",
        "processor_seconds": round(time.process_time() - began),
    }
    (HOME / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=1))
    size = sum(file.stat().st_size for file in HOME.iterdir())
    print(f"{HOME}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    patient_threads()
    main()
