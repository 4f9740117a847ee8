"""Distil a teacher into a student by one or several methods, and measure what the student kept of it.

A run directory for each method and seed holds the student. Finished ones are kept, so an interrupted comparison continues. The
record has the headline metric of student and teacher, with a t interval over seeds, for each method. It also has the
numbers of parameters, pictures a second, and the size of the exported encoder.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from counterpoint import catalog, training
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, Say, load_learner, task_class
from counterpoint.lab import statistics
from counterpoint.systems.settings import stored
from counterpoint.tasks.taught import TaughtConfig

ROWS = 64  # pictures in a batch whose time is taken
REPEATS = 5
ENCODERS = ("encoder", "image_encoder")  # settings that name the student's network


def distillers() -> list[str]:
    """Return the built systems that learn from a named teacher and train an encoder of pictures."""
    found = []
    for entry in catalog.entries().values():
        if entry.built and entry.module:
            config: Any = catalog.load_system(entry.slug).config
            names = (
                {one.name for one in fields(config)} if is_dataclass(config) else set()
            )  # an addition has a function
            if "teacher" in names and names & set(ENCODERS) and getattr(config, "trains_encoder", True):
                found.append(entry.slug)
    return found


def settings_of(method: str, teacher: str, student: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings for a teacher and a student by name.

    Args:
        method: slug of a system with a setting `teacher`.
        teacher: run:RUN, fit:SLUG?data=SOURCE, hf:NAME or another kind that the method knows.
        student: name of the student's encoder. Where a method adapts a network of pictures and texts (promptkd), run:RUN, fit:...,
            hf:NAME and open_clip:NAME name such a network.
        given: further settings; those that the method lacks are left out.

    Raises CounterpointError for a system that learns from no named teacher.
    """
    config = catalog.load_system(method).config
    names = {one.name for one in fields(config)} if is_dataclass(config) else set()
    encoder = next((name for name in ENCODERS if name in names), "")
    if "teacher" not in names or not encoder or not getattr(config, "trains_encoder", True):
        raise CounterpointError(
            f"{method} learns from no teacher that is named; methods that do: {', '.join(distillers())}"
        )
    if isinstance(config, type) and issubclass(config, TaughtConfig):  # its setting is the folder of a run
        kind, _, place = teacher.partition(":")
        if kind != "run":
            raise CounterpointError(
                f"{method} learns from a run of a labelled system: --teacher run:RUN; got '{teacher}'. For other teachers see "
                "vl2v-adip, vlm-ood-distill and kd3"
            )
        teacher = place
    named = {encoder: student}
    if "student" in names:  # a network of pictures and texts, whose place an encoder takes where there is none
        both = student.partition(":")[0] in ("run", "fit", "hf", "open_clip")
        named = {"student": student} if both else {"student": "", **named}
    return {"teacher": teacher, **named} | {name: value for name, value in given.items() if name in names}


def distil(
    methods: Sequence[str],
    teacher: str,
    student: str,
    data: str,
    *,
    seeds: int = 1,
    given: Mapping[str, Any] | None = None,
    out: Path = Path("runs"),
    name: str = "distill",
    loop: Loop | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Train a student by each method on each seed, and measure it.

    Args:
        methods: slugs of at least one system with a setting `teacher`.
        teacher, student: names, see `settings_of`.
        data: data source.
        seeds: number of seeds, at least 1.
        given: further settings for the methods that have them. Each must be known to one method at least.
        out: folder of the run directories.
        name: beginning of their names, which method and seed follow.
        loop: options of the training loop.
        say: receives messages, a line each.

    Returns the record: {"rows": [one for each method], "runs": paths}. Raises CounterpointError for unknown methods and settings,
    before anything trains.
    """
    given = dict(given or {})
    if not methods or len(set(methods)) < len(methods):
        raise CounterpointError("name at least one method, each once")
    if seeds < 1:
        raise CounterpointError(f"seeds must be at least 1, got {seeds}")
    chosen = {method: settings_of(method, teacher, student, given) for method in methods}
    for odd in (key for key in given if all(key not in settings for settings in chosen.values())):
        raise CounterpointError(f"no method has the setting '{odd}'")
    experiments = {method: Experiment.resolve(method, data, overrides=settings) for method, settings in chosen.items()}
    rows, paths = [], []
    for method, experiment in experiments.items():
        runs = [_trained(experiment, seed, out, f"{name}-{method}-{seed}", loop, say) for seed in range(seeds)]
        paths += [str(run.path) for run in runs]
        rows.append({"method": method} | _measured(experiment, runs))
    return {"teacher": teacher, "student": student, "data": data, "seeds": seeds, "rows": rows, "runs": paths}


def _trained(experiment: Experiment, seed: int, out: Path, name: str, loop: Loop | None, say: Say) -> Run:
    """Return the run of this name: finished, resumed, or new. CounterpointError for one with other settings."""
    place = out / re.sub(r"[^\w.-]+", "-", name)
    if not (place / "config.yaml").is_file():
        return training.train(
            experiment.system.slug, experiment.config, data=experiment.data, seed=seed, out=out, name=place.name, loop=loop,
            say=say,
        )  # fmt: skip
    run = Run.open(place)
    kept = run.config
    if kept.get("data") != experiment.data or kept.get("config") != stored(experiment.config):
        raise CounterpointError(f"{place} is a run with other settings; choose another --name, or remove it")
    if not run.complete:
        say(f"resuming {place}")
        training.resume(place, loop=loop, say=say)
    return Run.open(place)


def _measured(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """Measure the students of a method."""
    metric = task_class(experiment.system).headline
    last = [run.metrics()[-1] for run in runs]
    values = [row[f"test/{metric}"] for row in last if f"test/{metric}" in row]
    taught = [row[f"test/teacher_{metric}"] for row in last if f"test/teacher_{metric}" in row]
    mean, low, high = statistics.interval(values) if values else (float("nan"),) * 3
    learner = load_learner(runs[0])
    found = {
        "metric": metric,
        "mean": mean,
        "low": low,
        "high": high,
        "teacher": fmean(taught) if taught else None,
        "parameters": _size(_encoder(learner)),
        "images_a_second": images_a_second(_encoder(learner), int(runs[0].facts().get("size", 224))),
        "teacher_parameters": None,
        "teacher_images_a_second": None,
        "onnx_bytes": None,
    }
    if (network := _teacher(learner, experiment.config)) is not None:
        found["teacher_parameters"] = _size(network)
        found["teacher_images_a_second"] = images_a_second(network, int(runs[0].facts().get("size", 224)))
    found["onnx_bytes"] = _exported(runs[0])
    return found


def _encoder(learner: Any) -> nn.Module:
    """Return the network of pictures that a student keeps."""
    network: nn.Module = getattr(learner, "encoder", None) or next(iter(learner.encoders.values()))
    return network


def _teacher(learner: Any, config: Any) -> nn.Module | None:
    """Return the teacher's network of pictures, where it can be loaded as one."""
    if isinstance(config, TaughtConfig):
        own: nn.Module = learner.instructing.encoder
        return own
    from counterpoint.tasks.class_teachers import ClassTextConfig, open_network

    if not isinstance(config, ClassTextConfig) or config.teacher.startswith("file:"):
        return None
    network = open_network(config.teacher)

    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner: Any = network
            learner = getattr(inner, "learner", None)
            self.part = inner.model if learner is None else learner.encoders[inner.image]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return network.images(images)

    return Pictures().eval()


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def images_a_second(network: nn.Module, size: int) -> float:
    """Return the number of pictures that a network embeds in a second: the median of five batches of 64.

    Args:
        network: maps [n, 3, size, size] to rows; it is put into evaluation mode.
        size: height and width in pixels.
    """
    network.eval()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    pictures = torch.zeros(ROWS, 3, size, size, device=device)
    network(pictures)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        network(pictures)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return ROWS / sorted(times)[REPEATS // 2]


def _exported(run: Run) -> int | None:
    """Return the size of the student as an ONNX file, which is kept beside its weights; None without the extra `export`."""
    from counterpoint.search.encoder import TASKS, Encoder
    from counterpoint.use.export import export

    if run.config.get("task") not in TASKS:
        return None
    file = run.path / "student.onnx"
    try:
        if not file.is_file():
            export(Encoder.load(run), file)
    except CounterpointError:
        return None
    found = [path.stat().st_size for path in sorted(run.path.glob("student*.onnx*"))]
    return sum(found) or None
