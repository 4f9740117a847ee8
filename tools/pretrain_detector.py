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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filmed_clips import COUNTS, VOICES, Made, clips, recorded, speech, struck
from PIL import Image

from counterpoint import training
from counterpoint.data import arcade
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.worlds.sprites.scenes import FRAMES
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
ALARMS = 10.0  # false alarms in an hour of the valid clips: the goal of the threshold


# --- training and figures ---------------------------------------------------------------------------------------------


def split_of(made: Sequence[Made]) -> list[TestVideo]:
    """Return clips as videos with their truth."""
    return [TestVideo(name, v[None], a, label, marks) for name, label, v, a, marks in made]


def figures(detector: Any, source: BagData, made: dict[str, list[Made]], struck_clips: list[Made]) -> dict:
    """Measure on held-out clips at the kept threshold: AP, false alarms an hour, and answers to recorded sounds."""
    from counterpoint.tasks.bags import frame_ap
    from counterpoint.tasks.calibration import Watched, counts, logit
    from counterpoint.use.calibrate import score_video

    def watched(rows_: Sequence[Made]) -> list[Watched]:
        return [score_video(detector, source, video) for video in split_of(rows_)]

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
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "pretrain-detector",
        help="folder for clips and the run",
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
    videos = [calibrate.score_video(detector, source, video) for video in source.valid]
    fitted = calibrate.make_calibration(detector, videos, "drawn clips", "platt", None, ALARMS)
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
