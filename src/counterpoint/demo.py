"""Run the demo: `python -m counterpoint.demo`, or `make demo`.

1. Draw the arcade clips.
2. Train multiple-instance learning and MACIL-SD on the same seeds, from video-level labels alone.
3. Report the frame-level AP of each on the test clips.
4. Detect violent moments in two held-out video files, and write one page.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from counterpoint.errors import CounterpointError
from counterpoint.files import patient_threads
from counterpoint.words import counted

ARMS = ("mil", "macil-sd")
TEST = 200  # clips that the models are measured on; the files to watch are drawn with later indices


def main(*, seeds: int = 2, out: Path = Path("runs/demo"), size: tuple[int, int] = (640, 360)) -> int:
    """Train on rendered game clips, find the violent moments in a video file, write a page. About 4 minutes on 2 cores.

    Args:
        seeds: Number of runs of each of the two methods; at least 1.
        out: Folder for runs, videos and the page. An older demo's page is replaced; its runs are kept.
        size: Width and height of the videos to watch, in pixels; even numbers.
    """
    from counterpoint import training
    from counterpoint.data import arcade
    from counterpoint.data.worlds.sprites.scenes import spans
    from counterpoint.engine.run import machine, versions
    from counterpoint.lab.protocol import of_system
    from counterpoint.lab.runner import figures
    from counterpoint.report.demo import write_demo_report
    from counterpoint.use.detect import Detector
    from counterpoint.use.detections import detect_files

    started = time.monotonic()
    arms = of_system("macil-sd").arms
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    if seeds < 1:
        raise CounterpointError(f"--seeds must be at least 1, got {seeds}")
    say("1. Drawing game clips from sprites and sound effects (kept for the next time).")
    data = arcade.load(test=TEST)  # with the valid clips that `train` watches
    violent = sum(bag.label for bag in data.train)
    say(
        f"   {counted(len(data.train), 'training clip')}, {violent} of them labelled violent, without times; "
        f"{counted(len(data.test), 'test clip')}."
    )

    say(f"2. Training {' and '.join(ARMS)}, {counted(seeds, 'seed')} each.")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    results: list[dict[str, Any]] = []
    histories, runs = {}, {}
    for seed in range(seeds):
        for arm in ARMS:
            config = replace(training.default_config("macil-sd", "arcade"), **arms[arm])
            run = training.train(
                "macil-sd",
                config,
                data="arcade",
                seed=seed,
                out=out,
                name=f"{arm}-seed{seed}-{stamp}",
                say=lambda _: None,
            )
            rows = run.metrics()
            results.append({"arm": arm, "seed": seed, "av_ap": figures(rows)["av_ap"]})
            histories[f"{arm}, seed {seed}"] = rows
            runs[arm, seed] = run
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("frame-level AP on the test clips")
    for arm in ARMS:
        table.add_column(arm, justify="right")
    for seed in range(seeds):
        found = [next(r["av_ap"] for r in results if (r["arm"], r["seed"]) == (arm, seed)) for arm in ARMS]
        table.add_row(f"seed {seed}", *(f"{value:.3f}" for value in found))
    means = [sum(r["av_ap"] for r in results if r["arm"] == arm) / seeds for arm in ARMS]
    table.add_row("mean", *(f"{value:.3f}" for value in means), style="bold")
    guess = sum(int(v.truth.sum()) for v in data.test) / sum(len(v.truth) for v in data.test)
    table.add_row("guessing", *(f"{guess:.3f}" for _ in ARMS), style="dim")
    console.print(table)

    say("3. Watching two video files that neither model has seen.")
    clips = [arcade.script("test", number) for number in range(TEST, TEST + 100)]
    # The first with two violent moments, and the first without any.
    chosen = [next(c for c in clips if len(spans(c)) == 2), next(c for c in clips if not c.label)]
    truths = {}
    for clip in chosen:
        path = out / "videos" / f"{clip.name}-{'violent' if clip.label else 'normal'}.mp4"
        if not path.is_file():
            arcade.write_clip(clip, path, size=size)
        truths[path] = spans(clip)
    detector = Detector(runs["macil-sd", 0])
    detections, failures = detect_files(detector, list(truths), truths=truths)
    for detection in detections:
        said = ", ".join(f"{i.start:.1f}-{i.end:.1f} s" for i in detection.intervals) or "none"
        told = ", ".join(f"{a:.1f}-{b:.1f} s" for a, b in detection.truth or []) or "none"
        say(f"   {detection.video}  ({detection.duration:.0f} s, {detection.speed:.0f} x real time)")
        say(f"     found violent: {said}\n     true:          {told}")

    page = write_demo_report(
        out / "report.html",
        results=results,
        histories=histories,
        detections=detections,
        environment={**versions(), **machine()},
        failures=failures,
    )
    say(f"\n{(time.monotonic() - started) / 60:.1f} minutes. Open the report: {page.resolve()}")
    return 2 if failures else 0


if __name__ == "__main__":
    patient_threads()
    try:
        sys.exit(tyro.cli(main, prog="python -m counterpoint.demo"))
    except CounterpointError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
