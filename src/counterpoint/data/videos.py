"""`videos:DIR`: the user's own video files, sorted into folders by label.

    DIR/train/violent/*   DIR/train/normal/*     training videos: one label for each video is enough
    DIR/valid/violent/*   DIR/valid/normal/*     valid videos (or val/, validation/, dev/); may be missing
    DIR/test/violent/*    DIR/test/normal/*      test videos
    DIR/truth.csv         video,start,end        violent intervals in seconds; a video may have several rows

A video may have any container and codec that FFmpeg reads, with or without sound. Links are followed. Unreadable files are left
out. The notes count them and name the first ones, and a table in the cache lists them all. The number read plus the number left
out equals the number found.

Without truth.csv every moment of a violent test video counts as violent, and a note reports this. The same holds for a violent
valid video without a row in truth.csv. Without a folder of valid videos, a tenth of the training videos is cut, violent
ones in proportion. Copies of one file stay together. `?valid=0.2` cuts another share. The cache ($COUNTERPOINT_CACHE or
the user's cache directory) keeps features by the contents of the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import cached
from counterpoint.data.bags import Bag, BagData, LazyItems, TestVideo
from counterpoint.data.devices import chosen_device
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import cache_folder, replacing, walk
from counterpoint.waiting import patient_track
from counterpoint.words import counted

VERSION = 2  # of the feature extraction; increase it with every change, or stale caches are read
FRAMES = 16
LABELS = {"violent": 1, "normal": 0}
VALID = ("valid", "val", "validation", "dev")  # names of the folder of valid videos
_SHOWN = 10
FEW = 50  # training videos; with fewer, scores do not generalise


def load(
    directory: str,
    *,
    visual: str = "light",
    audio: str = "logmel",
    snippet_seconds: float = FRAMES / 24,
    valid: float = -1.0,
) -> BagData:
    """Read the folders; extract features from files that the cache does not have (with a progress bar).

    Args:
        directory: folder of train/, test/ and truth.csv.
        visual: visual backbone, `NAME` or `NAME@WEIGHTS-FILE` (see `counterpoint.encoders`).
        audio: audio backbone, in the same form.
        snippet_seconds: length of a snippet in seconds, above 0: the time resolution of a model.
        valid: share of the training videos in the valid split, between 0 and 1. -1 takes the folder of valid videos, or a
            tenth where there is none.

    Raises DataError when a folder is missing or has no readable file, or when truth.csv is damaged. Raises
    CounterpointError for an invalid option.
    """
    from counterpoint import encoders

    root = Path(directory)
    if "://" in directory and not root.exists():
        raise DataError(f"{directory} is on the net; download it and name the folder")
    if not snippet_seconds > 0:
        raise CounterpointError(f"snippet_seconds must be > 0, got {snippet_seconds}")
    if valid != -1:
        checked_share("videos", valid)
    left_out: list[tuple[Path, str]] = []
    given = _valid_folder(root)
    if given and valid != -1:
        raise CounterpointError(f"videos: {root / given} holds the valid split; remove ?valid={valid:g}, or the folder")
    folders = [name for name in ("train", given, "test") if name]
    files = {(split, label): _files(root, split, label, left_out) for split in folders for label in LABELS}
    _beside(root, folders, left_out)
    truth = _truth(root)
    eye, ear = encoders.build_visual(encoders.parse(visual)), encoders.build_audio(encoders.parse(audio))
    backbones = {"visual": eye.describe(), "audio": ear.describe()}
    notes: list[str] = []
    wanted = [path for paths in files.values() for path in paths]
    kept = extract(wanted, eye, ear, backbones, snippet_seconds, notes, left_out)
    for (split, label), paths in files.items():
        if not any(path in kept for path in paths):
            reasons = [f"{path}: {reason}" for path, reason in left_out if path in set(paths)]
            raise DataError(f"{root / split / label}: no file in it can be read. {'; '.join(reasons[:_SHOWN])}")
    train = [(p, LABELS[label]) for label in LABELS for p in files["train", label] if p in kept]
    test = [(p, LABELS[label]) for label in LABELS for p in files["test", label] if p in kept]
    found = len(wanted) + sum(path not in set(wanted) for path, _ in left_out)
    _account(root, found, len(kept), left_out, notes)
    if len(train) < FEW:
        notes.append(
            f"only {counted(len(train), 'training video')}: too few for scores that generalise; use {FEW} or more"
        )
    of_valid = [(p, LABELS[label]) for label in LABELS for p in files.get((given, label), []) if p in kept]
    test, windows = _matched(root, test, of_valid, truth, notes)
    if not given:
        train, of_valid = _carved(root, train, kept, SHARE if valid == -1 else valid, notes)
    watched = _watched(of_valid, root / (given or "train"), {} if truth is None else truth)

    def bag(index: int) -> Bag:
        path, label = train[index]
        rows = read_features(kept[path], path)
        return Bag(_name(root, path), *rows, label)

    def video(path: Path, label: int, spans: list[tuple[float, float]]) -> TestVideo:
        v, a = read_features(kept[path], path)
        marks = np.zeros(len(a) * FRAMES, np.int8)
        middle = (np.arange(len(marks)) + 0.5) * snippet_seconds / FRAMES
        for start, end in spans:
            marks[(middle >= start) & (middle < end)] = 1
        return TestVideo(_name(root, path), v[None], a, label, marks)

    return BagData(
        name=f"videos:{root}",
        train=LazyItems(len(train), bag),
        valid=LazyItems(len(of_valid), lambda n: video(*of_valid[n], watched[of_valid[n][0]])),
        test=LazyItems(len(test), lambda n: video(*test[n], windows[test[n][0]])),
        visual_dim=eye.dim,
        audio_dim=ear.dim,
        frames_per_snippet=FRAMES,
        snippet_seconds=snippet_seconds,
        backbones=backbones,
        notes=notes,
    )


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _valid_folder(root: Path) -> str:
    """Return the name of the folder of valid videos, empty where there is none; DataError where there are several."""
    found = [name for name in VALID if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(f"{root}: has the folders {' and '.join(found)}, and each would be the valid split; keep one")
    return found[0] if found else ""


def _carved(
    root: Path, train: list[tuple[Path, int]], kept: dict[Path, Path], share: float, notes: list[str]
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Divide the videos of the training folder into training and valid videos. Of fewer than two, none is valid."""
    if len(train) < 2:
        return train, []
    # The contents of a file give the name of its features, so copies have equal names.
    copies = np.unique([str(kept[path]) for path, _ in train], return_inverse=True)[1]
    labels = np.array([label for _, label in train], np.int64)
    rows, cut = carve("videos", np.arange(len(train)), share, labels, copies)
    notes.append(f"{root}: the valid split is made here, {len(cut)} of {counted(len(train), 'training video')}")
    return [train[n] for n in rows], [train[n] for n in cut]


def _watched(
    videos: list[tuple[Path, int]], folder: Path, truth: dict[str, list[tuple[float, float]]]
) -> dict[Path, list[tuple[float, float]]]:
    """Return the violent windows of valid videos: their rows of truth.csv; without rows, a violent video as a whole."""
    found = {path: _spans(path, folder, truth) for path, _ in videos}
    return {path: found[path] or ([(0.0, float("inf"))] if label else []) for path, label in videos}


def _spans(path: Path, folder: Path, truth: dict[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the windows of a video in truth.csv, which may name the file alone or with its folders."""
    return [span for name in dict.fromkeys(_names(path, folder)) for span in truth.get(name, [])]


def _names(path: Path, folder: Path) -> list[str]:
    return [path.name, str(path.relative_to(folder.parent)), str(path.relative_to(folder))]


def _files(root: Path, split: str, label: str, left_out: list[tuple[Path, str]]) -> list[Path]:
    """Return the files below a folder, links followed; add the rest to `left_out` with the reason."""
    folder = root / split / label
    if not folder.is_dir():
        layout = ", ".join(
            f"{s}/{name}" for s in ("train", *([split] if split in VALID else []), "test") for name in LABELS
        )
        raise DataError(f"{root}: has no folder {split}/{label}; sort your videos into {layout}")
    inside = walk(folder)
    left_out.extend(inside.left_out)
    if not inside.files:
        raise DataError(f"{folder}: is empty; it should hold {label} videos")
    return inside.files


def _beside(root: Path, folders: list[str], left_out: list[tuple[Path, str]]) -> None:
    """Add to `left_out` all files outside the folders of videos, except truth.csv."""
    inside = walk(root)
    reason = "lies in none of the folders of videos"
    for path, why in [*((path, reason) for path in inside.files), *inside.left_out]:
        parts = path.relative_to(root).parts
        ours = len(parts) > 2 and parts[0] in folders and parts[1] in LABELS
        if not ours and parts != ("truth.csv",):
            left_out.append((path, why))


def _account(root: Path, found: int, read: int, left_out: list[tuple[Path, str]], notes: list[str]) -> None:
    """Add a note on the files left out, with reasons, and list them in a table in the cache."""
    if not left_out:
        return
    place = hashlib.sha256(os.fspath(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
    table = cache_folder() / "videos" / f"left-out-{place}.csv"
    with replacing(table) as file:
        lines = io.StringIO(newline="")
        out = csv.writer(lines, lineterminator="\n")
        out.writerow(["file", "reason"])
        out.writerows((os.fspath(path), reason) for path, reason in sorted(left_out))
        file.write(lines.getvalue().encode(errors="surrogateescape"))
    shown = _some([f"{_name(root, path)}: {reason}" for path, reason in sorted(left_out)])
    notes.append(f"{read} of {found} files read, {len(left_out)} left out: {shown}; all are listed in {table}")


# --- truth ------------------------------------------------------------------------------------------------------------


def _truth(root: Path) -> dict[str, list[tuple[float, float]]] | None:
    """Read truth.csv as file name -> windows [start, end) in seconds; None when there is no such file."""
    file = root / "truth.csv"
    if not file.is_file():
        return None
    found: dict[str, list[tuple[float, float]]] = {}
    wrong = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            if not {"video", "start", "end"} <= set(rows.fieldnames or ()):
                raise DataError(
                    f"{file}: its first line must be video,start,end; it is {','.join(rows.fieldnames or ())!r}"
                )
            for row in rows:
                try:
                    start, end = float(row["start"]), float(row["end"])
                    if not 0 <= start < end < float("inf"):
                        raise ValueError
                except (ValueError, TypeError):
                    wrong.append(f"line {rows.line_num}")
                    continue
                found.setdefault(str(row["video"]), []).append((start, end))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    if wrong:
        raise DataError(f"{file}: start and end must be seconds, start before end: {_some(wrong)}")
    return found


def _matched(
    root: Path,
    test: list[tuple[Path, int]],
    valid: list[tuple[Path, int]],
    truth: dict[str, list[tuple[float, float]]] | None,
    notes: list[str],
) -> tuple[list[tuple[Path, int]], dict[Path, list[tuple[float, float]]]]:
    """Return the test videos with known truth, and their violent windows.

    Without truth.csv a violent video is violent as a whole, and all test videos are returned. Raises DataError for
    windows of a normal video.
    """
    if truth is None:
        notes.append(
            f"no {root / 'truth.csv'}: every moment of a violent test video counts as violent, so AP measures whole videos"
        )
        return test, {path: [(0.0, float("inf"))] if label else [] for path, label in test}
    windows: dict[Path, list[tuple[float, float]]] = {}
    used: set[str] = set()
    for path, _ in test:
        used.update(_names(path, root / "test"))
        windows[path] = _spans(path, root / "test", truth)
    normal = [_name(root, path) for path, label in test if not label and windows[path]]
    for path, label in valid:
        folder = root / path.relative_to(root).parts[0]
        used.update(_names(path, folder))
        normal += [_name(root, path)] if not label and _spans(path, folder, truth) else []
    if normal:
        raise DataError(
            f"{root / 'truth.csv'}: has violent moments of videos in normal/: {_some(normal)}; move the videos or remove the rows"
        )
    unknown = [_name(root, path) for path, label in test if label and not windows[path]]
    if unknown:
        notes.append(f"left out of the test split, because truth.csv has no row for a violent video: {_some(unknown)}")
        test = [(path, label) for path, label in test if not label or windows[path]]
    strangers = sorted(set(truth) - used)
    if strangers:
        where = "test/ or among the valid videos," if valid else "test/"
        notes.append(f"rows of truth.csv for videos that are not in {where} or cannot be read: {_some(strangers)}")
    return test, windows


def _some(items: list[str]) -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return ", ".join([*items[:_SHOWN], *more])


# --- features ---------------------------------------------------------------------------------------------------------


def extract(
    paths: list[Path],
    eye: Any,
    ear: Any,
    backbones: dict[str, Any],
    snippet_seconds: float,
    notes: list[str],
    left_out: list[tuple[Path, str]],
) -> dict[Path, Path]:
    """Return video file -> file of its features, for all readable videos; add the others to `left_out`.

    The networks move to the device of `data.devices`.
    """
    from counterpoint.encoders.on_device import move

    kept = {}
    # Under torchrun one process extracts, and the others find its files.
    with cached.locked(cache_folder() / "videos"):
        todo = []
        for path in paths:
            try:
                kept[path] = _place(path, backbones, snippet_seconds)
            except OSError as error:
                left_out.append((path, f"cannot be read ({error.strerror or error})"))
                continue
            if not _whole(kept[path]):
                todo.append(path)
        for network in (eye, ear) if todo else ():
            move(network, chosen_device())
        for path in patient_track(todo, "watching videos"):
            try:
                visual, audio, said = _watch(path, eye, ear, snippet_seconds)
                found = {"visual": visual, "audio": audio}
            except DataError as error:
                said, found = [str(error).removeprefix(f"{path}: ")], {}  # kept too, because it would fail again
            cached.save(kept[path], {"notes": np.array(said), "failed": np.array(not found), **found})
    for path, file in list(kept.items()):
        about = cached.load(file, "notes", "failed")
        if about["failed"]:
            left_out.append((path, "; ".join(map(str, about["notes"]))))
            del kept[path]
        else:
            notes += [f"{path}: {note}" for note in about["notes"]]
    return kept


def _watch(
    path: Path, eye: Any, ear: Any, snippet_seconds: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    from counterpoint.data.media import SnippetReader

    with SnippetReader(path, eye, ear, snippet_seconds=snippet_seconds) as reader:
        parts = list(reader.features())
    return np.concatenate([v for v, _ in parts]), np.concatenate([a for _, a in parts]), reader.notes


def _place(path: Path, backbones: dict[str, Any], snippet_seconds: float) -> Path:
    """Return the file of a video's features. The video's contents give its name: a changed video may keep its size and time."""
    with path.open("rb") as file:
        contents = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
    # FFmpeg also uses the file's ending.
    return cached.place("videos", VERSION, contents, path.suffix.lower(), backbones, snippet_seconds)


def _whole(file: Path) -> bool:
    """Return whether the cache has this file, undamaged."""
    try:
        return bool(cached.load(file, "notes", "failed"))
    except (FileNotFoundError, DataError):
        return False


def read_features(features: Path, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the visual and audio rows that `extract` kept. DataError when the file is damaged.

    Args:
        features: the kept file.
        path: the video, for the message.
    """
    try:
        found = cached.load(features, "visual", "audio")
        return found["visual"], found["audio"]
    except (FileNotFoundError, DataError) as error:
        raise DataError(
            f"{features}: the cached features of {path} are damaged; remove the file and start again"
        ) from error
