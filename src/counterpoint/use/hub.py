"""Read and write a finished run in the layout of a model hub: config.json, model.safetensors, README.md.

`config.json` holds the content of several files of a run directory, so a folder of three files rebuilds the learner. Folder
names of the machine that trained the run are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counterpoint.engine.run import WEIGHTS, Run
from counterpoint.errors import RunError
from counterpoint.files import replacing

CONFIG, CARD = "config.json", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
LIBRARY = "counterpoint"


class Published(Run):
    """A run in the layout of a hub. It is always complete, and its folder is never written to."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(path, dict(content["run"]))
        self.content = content

    @staticmethod
    def open(path: Path | str) -> Published:
        """Open a folder in the layout of a hub.

        Raises RunError when a file is missing or damaged, or is of another library.
        """
        path = Path(path)
        file = path / CONFIG
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{path} has no {CONFIG}; name a folder that save_pretrained wrote") from error
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); save or download the folder again") from error
        library = content.get("library_name") if isinstance(content, dict) else None
        if library != LIBRARY:
            raise RunError(f"{path} is not a run of counterpoint: the library_name in its {CONFIG} is {library!r}")
        run = content.get("run")
        if (
            not isinstance(run, dict)
            or not isinstance(run.get("slug"), str)
            or not isinstance(content.get("facts"), dict)
        ):
            raise RunError(
                f"{file} is damaged: it names no system or holds no facts; save or download the folder again"
            )
        if not (path / WEIGHTS).is_file():
            raise RunError(f"{path} has no {WEIGHTS}; download the whole folder")
        return Published(path, content)

    @property
    def complete(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        return dict(self.content["facts"])

    def structure(self) -> dict[str, Any]:
        return dict(self.content.get("structure", {}))

    def metrics(self, *, required: bool = True) -> list[dict[str, float]]:
        return [dict(self.content.get("metrics", {}))]

    def chance(self) -> dict[str, float]:
        return dict(self.content.get("chance", {}))

    def environment(self) -> dict[str, Any]:
        return dict(self.content.get("environment", {}))

    def figures(self) -> dict[str, Any]:
        return {}

    def calibration(self) -> dict[str, Any]:
        return dict(self.content.get("calibration", {}))


def opened(path: Path | str) -> Run:
    """Open a run directory, or a folder in the layout of a hub. RunError when it is neither."""
    return Published.open(path) if is_published(Path(path)) else Run.open(path)


def is_published(path: Path) -> bool:
    """Return whether a folder is in the layout of a hub and is not a run directory."""
    return (path / CONFIG).is_file() and not (path / "config.yaml").is_file()


def write(run: Run, folder: Path, over_seeds: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors of a complete run.

    Args:
        run: The run.
        folder: The folder, which is made.
        over_seeds: Its figures over several seeds, for the card (see `model_cards.over_seeds`); {}: there are none.

    Raises RunError when the run has no weights, OSError when the folder cannot be written.
    """
    run.need_complete()
    weights = run.path / WEIGHTS
    rows = run.metrics(required=False)
    content = {
        "library_name": LIBRARY,
        "run": public(run.config),
        "facts": run.facts(),
        "structure": run.structure(),
        "metrics": rows[-1] if rows else {},
        "chance": run.chance(),
        "environment": run.environment(),
        **({"over_seeds": dict(over_seeds)} if over_seeds else {}),
        **({"calibration": _unplaced(calibration)} if (calibration := run.calibration()) else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
    if weights.resolve() != (folder / WEIGHTS).resolve():
        with replacing(folder / WEIGHTS) as file, weights.open("rb") as kept:
            while block := kept.read(1 << 20):
                file.write(block)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run without folder names: only the last part of each path is kept.

    >>> public({"slug": "clip", "data": "manifest:/home/me/items.csv?size=32", "parent": {"run": "runs/a", "weights": "0f"}})
    {'slug': 'clip', 'data': 'manifest:items.csv?size=32', 'parent': {'run': 'a', 'weights': '0f'}}
    """
    found = dict(config)
    if isinstance(found.get("data"), str):
        found["data"] = _nameless(found["data"])
    if isinstance(found.get("parent"), Mapping) and "run" in found["parent"]:
        found["parent"] = {**found["parent"], "run": Path(str(found["parent"]["run"])).name}
    return found


def _unplaced(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calibration without the folders of this machine."""
    facts = dict(calibration.get("facts", {}))
    data = str(facts.get("data", ""))
    if data:
        facts |= {"data": _nameless(data), "said": str(facts.get("said", "")).replace(data, _nameless(data))}
    return {**calibration, "facts": facts}


def _nameless(spec: str) -> str:
    """Return the name of a data source without the folders of its path."""
    head, mark, options = spec.partition("?")
    name, colon, place = head.partition(":")
    return f"{name}{colon}{Path(place).name if colon else ''}{mark}{options}"


def found(name: str, **options: Any) -> Path:
    """Return the folder behind "hf:NAME": a folder of this machine where it exists, else a downloaded one.

    Args:
        name: A model of the hub, "user/name", or a folder.
        options: See `downloaded`.

    Raises RunError for a name that is neither, and see `downloaded`.
    """
    if name and Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RunError(f"hf:{name} is no folder, and no model of a hub; write hf:USER/NAME, or the folder's path")
    return downloaded(name, **options)


def downloaded(model: str, **options: Any) -> Path:
    """Download the files of a model from the hub, or find them in its cache. Return their folder.

    Args:
        model: The model's name, "user/name".
        options: Options of `huggingface_hub.snapshot_download`: revision, cache_dir, token and others.

    Raises RunError when the hub cannot be reached or has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES), **options))
    except Exception as error:  # the library's and its HTTP client's own kinds
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"hf:{model} cannot be downloaded: {said[:200].rstrip('.')}. Check the name and the network, or download the folder "
            "elsewhere and load its path"
        ) from error
