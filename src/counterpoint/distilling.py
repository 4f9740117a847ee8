"""Distil a teacher into a student by one or several methods, and measure what the student kept of it.

A run directory for each method and seed holds the student. Finished ones are kept, so an interrupted comparison continues. The
record has the metrics of student and teacher, with a t interval over seeds, for each method: the task's headline and, of pairs of
pictures and texts, accuracy by the classes' prompts. It also has the numbers of parameters, pictures a second, and the size of the
exported encoder.
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
from counterpoint.encoders.dual import DualEncoder
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.teachers import parameters
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, Say, load_learner, task_class
from counterpoint.lab import statistics
from counterpoint.lab.runner import continued
from counterpoint.tasks.class_teachers import ClassTextLearner, open_network
from counterpoint.tasks.taught import TaughtLearner
from counterpoint.tasks.tower_pairs import TowerLearner
from counterpoint.words import counted

ROWS = 64  # pictures in a batch whose time is taken
REPEATS = 5
ENCODERS = ("encoder", "image_encoder")  # settings that name the student's network


def distillers() -> list[str]:
    """Return the built systems that learn from a named teacher and train an encoder of pictures."""
    found = []
    for entry in catalog.entries().values():
        if entry.built and entry.module:
            config: Any = catalog.load_system(entry.slug).config
            if _encoder_setting(config):
                found.append(entry.slug)
    return found


def _encoder_setting(config: Any) -> str:
    """Return the setting that names the student's network; "" for a system that learns from no teacher that is named."""
    names = {one.name for one in fields(config)} if is_dataclass(config) else set()  # an addition has a function
    if "teacher" not in names or not getattr(config, "distils", True):
        return ""
    return next((name for name in ENCODERS if name in names), "")


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
    config: Any = catalog.load_system(method).config
    encoder = _encoder_setting(config)
    if not encoder:
        raise CounterpointError(
            f"{method} learns from no teacher that is named; methods that do: {', '.join(distillers())}"
        )
    names = {one.name for one in fields(config)}
    # A method whose names stand for more than two settings interprets them.
    own = config.of_names(teacher, student) if hasattr(config, "of_names") else {"teacher": teacher, encoder: student}
    return own | {name: value for name, value in given.items() if name in names}


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

    Returns the record: {"rows": [one for each method and metric], "runs": paths}. Raises CounterpointError for unknown methods and
    settings, before anything trains. Raises Interrupted after Ctrl-C.
    """
    given = dict(given or {})
    if not methods or len(set(methods)) < len(methods):
        raise CounterpointError("name at least one method, each once")
    if seeds < 1:
        raise CounterpointError(f"seeds must be at least 1, got {seeds}")
    chosen = {method: settings_of(method, teacher, student, given) for method in methods}
    for odd in (key for key in given if all(key not in settings for settings in chosen.values())):
        raise CounterpointError(f"no method has the setting '{odd}'; see counterpoint train {methods[0]} --help")
    experiments = {method: Experiment.resolve(method, data, overrides=settings) for method, settings in chosen.items()}
    rows: list[dict[str, Any]] = []
    paths: list[str] = []
    with continued(lambda: counted(len(paths), "run")):
        for method, experiment in experiments.items():
            runs = []
            for seed in range(seeds):
                runs.append(_trained(experiment, seed, out, f"{name}-{method}-{seed}", loop, say))
                paths.append(str(runs[-1].path))
            rows += [{"method": method} | row for row in _measured(experiment, runs)]
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
    if run.config.get("data") != experiment.data or Experiment.of_run(run).config != experiment.config:
        raise CounterpointError(f"{place} is a run with other settings; choose another --name, or remove it")
    if not run.complete:
        say(f"resuming {place}")
        training.resume(place, loop=loop, say=say)
    return Run.open(place)


def _measured(experiment: Experiment, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Measure the students of a method: a row for each metric, with sizes and speeds in each."""
    learner, last = load_learner(runs[0]), [run.metrics()[-1] for run in runs]
    student, size = _student(learner)
    common: dict[str, Any] = {"parameters": parameters(*student), "images_a_second": images_a_second(student[0], size)}
    common |= {"teacher_parameters": None, "teacher_images_a_second": None}
    if (teacher := _teacher(learner, experiment.config)) is not None:
        common["teacher_parameters"] = parameters(*teacher)
        common["teacher_images_a_second"] = images_a_second(teacher[0], size)
    common["onnx_bytes"] = _exported(runs[0])
    metrics = [task_class(experiment.system).headline]
    if isinstance(learner, TowerLearner):
        metrics += [name for name in (f"{learner.image}_zero_shot",) if f"test/{name}" in last[0]]
    return [_kept(metric, last) | common for metric in metrics]


def _kept(metric: str, last: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return a metric of the students, its interval over runs, and the teacher's."""
    values = [row[f"test/{metric}"] for row in last if f"test/{metric}" in row]
    taught = [row[f"test/teacher_{metric}"] for row in last if f"test/teacher_{metric}" in row]
    mean, low, high = statistics.interval(values) if values else (float("nan"),) * 3
    return {"metric": metric, "mean": mean, "low": low, "high": high, "teacher": fmean(taught) if taught else None}


def _student(learner: Any) -> tuple[list[nn.Module], int]:
    """Return the networks that a student keeps, that of pictures first, and the size of its pictures."""
    if isinstance(learner, TowerLearner):
        names = (learner.image, learner.text)
        networks = [part[name] for part in (learner.encoders, learner.heads) for name in names]
        return networks, int(learner.facts.modalities[learner.image]["size"])
    network = getattr(learner, "encoder", None) or next(iter(learner.encoders.values()))
    return [network], int(getattr(learner, "size", 224))


def _teacher(learner: Any, config: Any) -> list[nn.Module] | None:
    """Return the teacher's networks, that of pictures first; None where it is a file.

    Of a teacher of pictures and texts, a student of pictures is compared with the half for pictures.
    """
    if isinstance(learner, TaughtLearner):
        own: Any = learner.instructing
        return [own.encoder]
    if not isinstance(learner, TowerLearner | ClassTextLearner) or config.teacher.startswith("file:"):
        return None
    network = open_network(config.teacher)
    pictures = _Pictures(network)
    return [pictures, network] if isinstance(learner, TowerLearner) else [pictures]


class _Pictures(nn.Module):
    """The half for pictures of a network of pictures and texts."""

    def __init__(self, network: DualEncoder) -> None:
        super().__init__()
        self.part, self.embed = network.tower, network.eval().images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(images)


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
            export(Encoder.load(run), file, items=0)
    except CounterpointError:
        return None
    found = [path.stat().st_size for path in sorted(run.path.glob("student*.onnx*"))]
    return sum(found) or None
