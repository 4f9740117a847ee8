"""Measure detection on a 720p file with the built-in backbones: speed, share of plain decoding, and memory over length.

    python benchmarks/detection.py        writes results/bench/detection.json

The files are arcade clips of 1280 x 720 at 24 frames a second with film grain, H.264 and AAC. They have two typical extreme
rates: 3 Mbit/s, as 720p on the web, and constant high quality. With the grain, the latter has a camera's 22 Mbit/s. Every
measurement runs in a separate process, files in turn. The reference only decodes the same file with PyAV: detection cannot be
faster than that. Memory over length is the peak with 16 minutes minus that with 4, of one run each: the buffers of the decoder and
of PyTorch fill within the first two minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DRAWN = 30  # seconds that are drawn and encoded; longer files repeat them
# name: (seconds, bits a second of the pictures; None: constant quality)
FILES: dict[str, tuple[int, int | None]] = {
    "web-half-a-minute": (30, 3_000_000),
    "web-4-minutes": (240, 3_000_000),
    "camera-half-a-minute": (30, None),
}
LONG = ("web-16-minutes", 960, 3_000_000)  # measured once, for memory
REPEATS = 3
OUT = Path(__file__).parents[1] / "results" / "bench" / "detection.json"


def draw() -> tuple[list[Any], Any]:
    """Draw the pictures and the sound of DRAWN seconds."""
    import numpy as np

    from counterpoint.data import arcade
    from counterpoint.data.worlds.sprites.drawing import Drawing
    from counterpoint.data.worlds.sprites.scenes import FPS, FRAMES, RATE
    from counterpoint.data.worlds.sprites.sounds import render_audio

    rng = np.random.default_rng(0)
    grain = [rng.normal(0, 6, (720, 1280, 1)).astype(np.int16) for _ in range(16)]
    frames: list[Any] = []
    sound: list[Any] = []
    for number in itertools.count(300):
        clip = arcade.script("test", number)
        drawing = Drawing(clip, (1280, 720))
        sound.append(render_audio(clip))
        for n in range(clip.snippets * FRAMES):
            if len(frames) == DRAWN * FPS:
                return frames, np.concatenate(sound)[: DRAWN * RATE]
            picture = drawing.draw(n / FPS).astype(np.int16) + grain[len(frames) % 16]
            frames.append(picture.clip(0, 255).astype(np.uint8))
    raise AssertionError


def write(path: Path, drawn: tuple[list[Any], Any], seconds: int, bit_rate: int | None) -> None:
    """Write a video of `seconds` seconds that repeats the drawn pictures and sound."""
    import numpy as np

    from counterpoint.data.media import write_video
    from counterpoint.data.worlds.sprites.scenes import FPS, RATE

    frames, sound = drawn
    pictures = itertools.islice(itertools.cycle(frames), seconds * FPS)
    wave = np.tile(sound, seconds // DRAWN)
    write_video(path, pictures, wave, fps=FPS, sample_rate=RATE, bit_rate=bit_rate)


def measure(what: str, path: str, run: str) -> None:
    """Measure in a separate process, and print seconds of work and peak memory."""
    import av
    import torch

    torch.set_num_threads(2)
    if what == "detect":
        from counterpoint.engine.run import Run
        from counterpoint.use.detect import Detector

        detector = Detector(Run.open(run))
        started = time.perf_counter()
        detector.detect(Path(path))
    else:
        started = time.perf_counter()
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for _ in container.decode(container.streams.video[0], container.streams.audio[0]):
                pass
    taken = time.perf_counter() - started
    # Not ru_maxrss: a child begins with its parent's, who drew the pictures.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024
    print(json.dumps({"seconds": taken, "peak_mb": peak}))


def main() -> None:
    from dataclasses import replace

    from counterpoint import training
    from counterpoint.engine.run import machine, versions

    with tempfile.TemporaryDirectory() as folder:
        config = replace(training.default_config("macil-sd", "arcade"), epochs=1)
        run = training.train("macil-sd", config, data="arcade?train=16&test=4", out=Path(folder), say=lambda _: None)
        paths = {name: Path(folder) / f"{name}.mp4" for name in FILES}
        drawn = draw()
        paths[LONG[0]] = Path(folder) / "long.mp4"
        for name, (seconds, bit_rate) in {**FILES, LONG[0]: LONG[1:]}.items():
            print(f"writing {name}: {seconds} s of 720p ...", file=sys.stderr)
            write(paths[name], drawn, seconds, bit_rate)
        del drawn
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        todo = [(name, what) for _ in range(REPEATS) for name in FILES for what in ("detect", "decode")]
        for name, what in [*todo, (LONG[0], "detect")]:
            words = [sys.executable, __file__, what, str(paths[name]), str(run.path)]
            out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            found.setdefault((what, name), []).append(json.loads(out))
        sizes = {name: path.stat().st_size for name, path in paths.items()}

    def median(what: str, name: str, key: str) -> float:
        return statistics.median(m[key] for m in found[what, name])

    record = {
        "what": "1280 x 720, 24 fps, H.264 + AAC, film grain; light + logmel; torch threads 2; medians of 3",
        "goal_times_real_time": 8,
        "files": {
            name: {
                "seconds": seconds,
                "megabits_per_second": round(8 * sizes[name] / seconds / 1e6, 2),
                "times_real_time": round(seconds / median("detect", name, "seconds"), 1),
                "plain_decoding_times_real_time": round(seconds / median("decode", name, "seconds"), 1),
                "time_over_plain_decoding": round(
                    median("detect", name, "seconds") / median("decode", name, "seconds"), 2
                ),
                "peak_mb": round(median("detect", name, "peak_mb")),
            }
            for name, (seconds, _) in FILES.items()
        },
        "growth_mb_from_4_to_16_minutes": round(
            median("detect", LONG[0], "peak_mb") - median("detect", "web-4-minutes", "peak_mb"), 1
        ),
        "cores": os.cpu_count(),
        "versions": versions(),
        "machine": machine(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*sys.argv[1:])
    else:
        main()
