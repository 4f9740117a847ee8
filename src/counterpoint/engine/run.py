"""Read and write a run directory.

    runs/<slug>-<time>/
      config.yaml         the request: system, data, seed, every setting; written first
      environment.json    versions, machine, threads, devices
      facts.json          facts of the data that the learner was built from: widths, classes, a tokenizer
      structure.json      the modules that a stage replaced, where one did (see Learner.structure)
      metrics.csv         a row per epoch; the last one also has the test metrics
      chance.json         the chance level of each metric that has one
      model.safetensors   the trained weights; its metadata names the system
      last.ckpt           everything needed to resume; removed when the run is complete
      state.json          the process that trains, or how its training ended; removed when the run is complete
      calibration.json    map from scores to probabilities, and threshold (see counterpoint calibrate)
      calibration.html    its page
      speed.json          steps, items a second, and the share of the time that the device waited for batches
      figures.json        figures of the last evaluation, besides its metrics (see counterpoint.report.found)
      report.html         curves and figures
      bad-batch.ckpt      a batch whose loss was not finite, for `counterpoint replay`; present only after such a batch
      tensorboard/        curves for TensorBoard, with --log tensorboard
      loggers.json        the run's names at W&B and MLflow, with --log wandb or mlflow

Files are written under a temporary name and renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import counterpoint
from counterpoint.core.weights import read_weights, write_weights
from counterpoint.engine.state import STATE, State, read_state
from counterpoint.errors import RunError
from counterpoint.files import quoted, replacing

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times as fast

(
    CONFIG,
    ENVIRONMENT,
    FACTS,
    STRUCTURE,
    METRICS,
    CHANCE,
    FIGURES,
    WEIGHTS,
    CHECKPOINT,
    REPORT,
    BAD_BATCH,
    CALIBRATION,
    CALIBRATED,
    SPEED,
) = (
    "config.yaml",
    "environment.json",
    "facts.json",
    "structure.json",
    "metrics.csv",
    "chance.json",
    "figures.json",
    "model.safetensors",
    "last.ckpt",
    "report.html",
    "bad-batch.ckpt",
    "calibration.json",
    "calibration.html",
    "speed.json",
)
FILES = (
    *(CONFIG, ENVIRONMENT, FACTS, STRUCTURE, METRICS, CHANCE, FIGURES, SPEED, WEIGHTS, CHECKPOINT, REPORT, BAD_BATCH),
    *(CALIBRATION, CALIBRATED, STATE),
)


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that its numbers depend on. Absent ones are left out."""
    found = {"counterpoint": counterpoint.__version__, "python": platform.python_version()}
    return found | _installed()


@functools.cache  # importlib reads the files of each package again
def _installed() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "av", "arcade"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Describe this machine: the one that a number is measured on."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
    }


def check_new(root: Path, name: str | None) -> None:
    """Raise RunError, before any work, when no run can be made under `root`: its name holds a path or is in use."""
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise RunError(f"--name {name!r} is not the name of one folder; choose the folder of runs with --out")
    if name is not None and (root / name).exists() and int(os.environ.get("RANK", "0")) == 0:
        raise RunError(_taken(root / name))
    if root.exists() and not root.is_dir():
        raise RunError(f"cannot make the run directory: {root} is a file; name a folder with --out")


def _taken(path: Path) -> str:
    """Return the message for a name in use: the command that continues the run there, if it has one."""
    hint = ""
    if (path / CHECKPOINT).is_file():
        hint = f", or resume this run: counterpoint train --resume {quoted(path)}"
    elif (path / WEIGHTS).is_file():
        hint = ", or remove this run, which is complete"
    return f"{path} exists already; choose another --name{hint}"


class Run:
    """One run directory."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config

    @staticmethod
    def create(root: Path, config: dict[str, Any], name: str | None = None) -> Run:
        """Make a new run directory under `root`. `config` needs at least `slug`. Default of `name`: system and time."""
        check_new(root, name)
        stem = name or f"{config['slug']}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, number = root / stem, 1
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError as error:
                if name:
                    raise RunError(_taken(path)) from error
                number += 1
                path = root / f"{stem}-{number}"
            except OSError as error:
                raise RunError(
                    f"cannot make the run directory {path} ({error.strerror}); name another folder with --out"
                ) from error
        run = Run(path, config)
        with replacing(path / CONFIG) as file:
            file.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        run.record_environment()
        return run

    @staticmethod
    def open(path: Path | str) -> Run:
        """Open a run directory. RunError when `path` is not one."""
        path = Path(path)
        if not path.exists():
            raise RunError(f"{path}: no such run directory; name a folder that counterpoint train made")
        if not path.is_dir():
            raise RunError(f"{path} is a file, not a run directory; name the folder")
        file = path / CONFIG
        if not file.is_file():
            if (path / "config.json").is_file():
                raise RunError(
                    f"{path} is not a run directory, but it has a config.json, as save_pretrained writes it. Such a folder is for "
                    "detect, predict, export, and counterpoint.load(FOLDER) in Python"
                )
            raise RunError(
                f"{path} is not a run directory: it has no {CONFIG}; name a folder that counterpoint train made"
            )
        for name in FILES:
            if not (path / name).resolve().is_relative_to(path.resolve()):
                raise RunError(
                    f"{path / name} is a link to a file outside the run directory; put a copy of the file in its place"
                )
        try:
            config = yaml.load(file.read_text(encoding="utf-8"), LOADER)  # a safe loader: it makes plain values only
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(
                f"{file} is not readable YAML ({str(error).splitlines()[0]}); restore it from a copy, or train again"
            ) from error
        if not isinstance(config, dict) or not isinstance(config.get("slug"), str):
            raise RunError(f"{file} does not name a system ('slug'); this is not a run of counterpoint")
        return Run(path, config)

    @property
    def slug(self) -> str:
        """The name of the system."""
        return str(self.config["slug"])

    @classmethod
    def finished(cls, path: Path | str) -> Run:
        """Open a run that was trained to its end. RunError for a path that is no run, and for one that is not finished."""
        run = cls.open(path)
        run.need_complete()
        return run

    def need_complete(self) -> None:
        """Raise RunError for a run that is not finished: how its training stands, and what to do."""
        if self.complete:
            return
        state = self.state
        why = f": {state.said}" if state else ""
        what = f"finish it first: counterpoint train --resume {quoted(self.path)}"
        if state and state.alive:
            what = "wait for its end"
        elif state and state.state == "diverged":
            what = "train again with a lower --lr"
        raise RunError(f"{self.path} is not finished{why}; {what}")

    @property
    def state(self) -> State | None:
        """The record of its training. None for a complete run, and for one that an older version trained."""
        return None if self.complete else read_state(self.path)

    @property
    def complete(self) -> bool:
        """Whether the run was trained to its end: it has weights and no checkpoint to resume."""
        return (self.path / WEIGHTS).is_file() and not self.checkpoint.is_file()

    @property
    def begun(self) -> bool:
        """Whether the run has a checkpoint, metrics or weights."""
        return self.checkpoint.is_file() or any((self.path / name).is_file() for name in (METRICS, WEIGHTS))

    @property
    def checkpoint(self) -> Path:
        """The path of last.ckpt, which exists while the run is to be resumed."""
        return self.path / CHECKPOINT

    def record_environment(self) -> None:
        """Write versions and machine to environment.json."""
        with replacing(self.path / ENVIRONMENT) as file:
            file.write(json.dumps({**versions(), **machine()}, indent=2).encode())

    def save_facts(self, facts: Mapping[str, Any]) -> None:
        """Write the task's facts of its data. A resumed run keeps the facts that it began with."""
        if self.path.is_dir() and not (self.path / FACTS).is_file():
            with replacing(self.path / FACTS) as file:
                file.write(json.dumps(facts, indent=1, ensure_ascii=False).encode())

    def facts(self) -> dict[str, Any]:
        """Return the facts of the data that the run's learner was built from. RunError when they are missing or damaged."""
        path = self.path / FACTS
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(
                f"{self.path}: no {FACTS}; the run stopped before its first step, so train it again"
            ) from error
        except (ValueError, UnicodeDecodeError) as error:
            raise RunError(f"{path} is damaged ({error}); restore it from a copy, or train again") from error
        if not isinstance(facts, dict):
            raise RunError(f"{path} is damaged: it holds no facts by name; restore it from a copy, or train again")
        return facts

    def save_structure(self, structure: Mapping[str, Any]) -> None:
        """Write the structure of the learner's modules. Write nothing for a learner that replaced none."""
        if structure:
            with replacing(self.path / STRUCTURE) as file:
                file.write(json.dumps(structure).encode())

    def structure(self) -> dict[str, Any]:
        """Return the structure of modules that the weights fit; {} for the structure that the learner is built with."""
        path = self.path / STRUCTURE
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, UnicodeDecodeError) as error:
            raise RunError(f"{path} is damaged ({error}); restore it from a copy, or train again") from error

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.csv as a whole. Its columns are the union of the rows' keys, in order of appearance."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.path / METRICS) as file:
            file.write(text.getvalue().encode())

    def metrics(self, *, required: bool = True) -> list[dict[str, float]]:
        """Return the rows of metrics.csv without their empty cells.

        Where the file is missing, raise RunError if `required`, else return [].
        """
        path = self.path / METRICS
        if not path.is_file():
            if not required:
                return []
            raise RunError(
                f"{self.path}: no {METRICS}; the run stopped before its first epoch ended, so train it again"
            )
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise RunError(f"{path} is damaged ({error}); restore it from a copy, or train again") from error

    def save_chance(self, levels: Mapping[str, float]) -> None:
        """Write the chance level of each test metric that has one, by name. Write no file when no metric has one."""
        finite = {name: float(value) for name, value in levels.items() if math.isfinite(value)}
        if finite:
            with replacing(self.path / CHANCE) as file:
                file.write(json.dumps(finite, indent=1).encode())

    def chance(self) -> dict[str, float]:
        """Return the chance level of each test metric that has one, by name. RunError when the file is damaged."""
        path = self.path / CHANCE
        if not path.is_file():
            return {}
        try:
            return {str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is damaged ({error}); remove it and measure the run again") from error

    def save_figures(self, figures: Mapping[str, Any]) -> None:
        """Write the page's figures: heading -> {"kind": ...}. Write no file when there is none."""
        if figures:
            with replacing(self.path / FIGURES) as file:
                file.write(json.dumps(figures, allow_nan=False).encode())

    def figures(self) -> dict[str, Any]:
        """Return the page's figures, by heading. RunError when the file is damaged."""
        return self._read(FIGURES, "figures by heading")

    def save_speed(self, figures: Mapping[str, float]) -> None:
        """Write how fast the run was trained. Write no file when it took no step."""
        if figures:
            with replacing(self.path / SPEED) as file:
                file.write(json.dumps(figures, indent=1).encode())

    def speed(self) -> dict[str, Any]:
        """Return how fast the run was trained; {} for a run of an older version. RunError when the file is damaged."""
        return self._read(SPEED, "figures by name")

    def environment(self) -> dict[str, Any]:
        """Return versions and machine, by name. RunError when the file is damaged."""
        return self._read(ENVIRONMENT, "names and values")

    def calibration(self) -> dict[str, Any]:
        """Return the fields of the run's calibration; {} where there is none. RunError when the file is damaged."""
        return self._read(CALIBRATION, "a calibration", "calibrate the run again")

    def save_calibration(self, fields: Mapping[str, Any]) -> Path:
        """Write the fields of a calibration of the run's scores. Return the file."""
        with replacing(self.path / CALIBRATION) as file:
            file.write(json.dumps(fields, indent=1, allow_nan=False).encode())
        return self.path / CALIBRATION

    def _read(self, name: str, what: str, after: str = "write the report again") -> dict[str, Any]:
        """Read a JSON file that must hold an object. Return {} where there is no file."""
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} is not readable JSON ({error}); remove it and {after}") from error
        if not isinstance(found, dict):
            raise RunError(f"{file} is damaged: it should hold {what}; remove it and {after}")
        return found

    def save_weights(self, state: Mapping[str, Tensor]) -> None:
        """Write the trained weights, by name, to model.safetensors. Its metadata names the system."""
        write_weights(self.path / WEIGHTS, state, self.slug)

    def digest(self) -> str:
        """Return the SHA-256 of the file of trained weights."""
        with (self.path / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load_weights(self) -> dict[str, Tensor]:
        """Load the trained weights. RunError when they are missing, damaged, or of another system."""
        path = self.path / WEIGHTS
        if not path.is_file():
            hint = (
                f"resume it: counterpoint train --resume {quoted(self.path)}"
                if self.checkpoint.is_file()
                else "train it first"
            )
            raise RunError(f"{self.path} has no {WEIGHTS}; {hint}")
        return read_weights(path, self.slug)


def trained(root: Path) -> list[Path]:
    """List the run directories in `root`, or one folder below, that hold trained weights, the newest first."""
    files = [file for pattern in (f"*/{WEIGHTS}", f"*/*/{WEIGHTS}") for file in root.glob(pattern)]
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent for file in newest if (file.parent / CONFIG).is_file()]
