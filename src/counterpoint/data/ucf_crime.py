"""`ucf-crime:DIR`: the UCF-Crime benchmark (Sultani et al., CVPR 2018), its videos and the authors' lists.

    DIR/Anomaly_Train.txt                                      one training video a line, CLASS/NAME.mp4
    DIR/Temporal_Anomaly_Annotation_for_Testing_Videos.txt     NAME.mp4  CLASS  start end  start end; frame numbers, -1 for none
    DIR/.../NAME.mp4                                           the videos, in any folders below DIR

A training video has a label alone: its folder's name holds "Normal", or it is anomalous. A test video's lines give up to two
windows of frames, counted at the video's own rate; both ends belong to the window. The lists may also be in a folder below DIR.
Training and test videos are found by the path of the list, else by their name. Most of the videos have no sound.

The benchmark has no valid split. So a tenth of the training videos is cut, anomalous ones in proportion. They have no windows, so
every frame of an anomalous one counts. The backbones are those of the source `videos`, and the same cache keeps the features.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.bags import Bag, BagData, LazyItems, TestVideo
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.data.videos import FRAMES, extract, read_features
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import walk
from counterpoint.words import counted

TRAIN = "Anomaly_Train.txt"
TEST = ("Temporal_Anomaly_Annotation_for_Testing_Videos.txt", "Temporal_Anomaly_Annotation.txt")
SHOWN = 10  # of a long list of problems


class Annotated(NamedTuple):
    """A line of the annotation: a test video and its windows of frames, both ends included."""

    name: str
    kind: str
    windows: list[tuple[int, int]]

    @property
    def label(self) -> int:
        return int("normal" not in self.kind.lower())


def load(
    directory: str,
    *,
    visual: str = "light",
    audio: str = "logmel",
    snippet_seconds: float = FRAMES / 24,
    valid: float = SHARE,
) -> BagData:
    """Read the lists, find the videos, and extract the features that the cache does not have.

    Args:
        directory: folder of the lists and the videos.
        visual: visual backbone, `NAME` or `NAME@WEIGHTS-FILE` (see `counterpoint.encoders`).
        audio: audio backbone, in the same form.
        snippet_seconds: length of a snippet in seconds, above 0.
        valid: share of the training videos in the valid split, between 0 and 1.

    Videos that cannot be read are left out, and a note names them. Raises DataError for lists that are missing or damaged, and for
    listed videos that are not there.
    """
    from counterpoint import encoders

    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; the documentation of ucf-crime has the expected layout")
    if not snippet_seconds > 0:
        raise CounterpointError(f"snippet_seconds must be > 0, got {snippet_seconds}")
    checked_share("ucf-crime", valid)
    files = walk(root).files
    listed = training_list(_list(root, files, (TRAIN,)))
    annotated = annotated_windows(_list(root, files, TEST))
    found = _found(root, files, [*listed, *(video.name for video in annotated)])
    eye, ear = encoders.build_visual(encoders.parse(visual)), encoders.build_audio(encoders.parse(audio))
    backbones = {"visual": eye.describe(), "audio": ear.describe()}
    notes: list[str] = []
    left_out: list[tuple[Path, str]] = []
    kept = extract(list(found.values()), eye, ear, backbones, snippet_seconds, notes, left_out)
    if left_out:
        notes.append(
            f"{len(left_out)} of {counted(len(found), 'video')} left out: {some([f'{p.name}: {why}' for p, why in left_out])}"
        )
    every = [(name, int("normal" not in name.lower())) for name in listed if found[name] in kept]
    test = [video for video in annotated if found[video.name] in kept]
    if not every or not test:
        raise DataError(f"{root}: none of the {'test' if every else 'training'} videos can be read; {left_out[0][1]}")
    copies = np.unique([str(kept[found[name]]) for name, _ in every], return_inverse=True)[1]
    labels = np.array([label for _, label in every], np.int64)
    rows, cut = carve("ucf-crime", np.arange(len(every)), valid, labels, copies)
    train, watched = [every[n] for n in rows], [every[n] for n in cut]
    notes.append(
        f"the valid split is made here, {len(watched)} of {counted(len(every), 'training video')}; they have no windows, so "
        "every frame of an "
        "anomalous one counts"
    )

    def features(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return read_features(kept[found[name]], found[name])

    def whole(name: str, label: int) -> TestVideo:
        seen, heard = features(name)
        return TestVideo(name, seen[None], heard, label, np.full(FRAMES * len(heard), label, np.int8))

    def marked(video: Annotated) -> TestVideo:
        seen, heard = features(video.name)
        truth = marks(len(heard), snippet_seconds, video.windows, _rate(found[video.name]) if video.windows else 0.0)
        return TestVideo(video.name, seen[None], heard, video.label, truth)

    return BagData(
        name=f"ucf-crime:{root}",
        train=LazyItems(len(train), lambda i: Bag(train[i][0], *features(train[i][0]), train[i][1])),
        valid=LazyItems(len(watched), lambda i: whole(*watched[i])),
        test=LazyItems(len(test), lambda i: marked(test[i])),
        visual_dim=eye.dim,
        audio_dim=ear.dim,
        frames_per_snippet=FRAMES,
        snippet_seconds=snippet_seconds,
        backbones=backbones,
        notes=notes,
    )


# --- lists ------------------------------------------------------------------------------------------------------------


def training_list(file: Path) -> list[str]:
    """Read the list of training videos: one path a line. DataError for an empty list, or a video that is listed twice."""
    names = [line.strip().replace("\\", "/") for line in _lines(file)]
    again = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if again:
        raise DataError(f"{file}: listed twice: {some(again)}")
    labels = {"normal" in name.lower() for name in names}
    if len(labels) < 2:
        raise DataError(
            f"{file}: holds {'normal' if True in labels else 'anomalous'} videos alone; training needs both kinds"
        )
    return names


def annotated_windows(file: Path) -> list[Annotated]:
    """Read the annotation of the test videos. DataError names the lines that are none.

    A line is a name, a class and pairs of frame numbers. A pair of -1 is no window.
    """
    found, wrong = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S.*?\.\w+)\s+(\S+)((?:\s+-?\d{1,9})+)", line.strip())
        frames = [int(word) for word in match[3].split()] if match else []
        pairs = list(zip(frames[::2], frames[1::2], strict=False))
        windows = [pair for pair in pairs if pair != (-1, -1)]
        bad = not match or len(frames) % 2 or any(not 0 <= a <= b for a, b in windows)
        video = None if bad or match is None else Annotated(match[1], match[2], windows)
        if video is None or bool(windows) != bool(video.label):
            wrong.append(f"line {number}: {line.strip()[:80]}")
            continue
        found.append(video)
    if wrong:
        raise DataError(
            f"{file}: not 'NAME CLASS start end start end', with windows for anomalous videos alone: {some(wrong)}"
        )
    if not found:
        raise DataError(f"{file}: the list is empty; write one test video a line")
    names = [video.name for video in found]
    if len(set(names)) < len(names):
        raise DataError(f"{file}: listed twice: {some(sorted({n for n in names if names.count(n) > 1}))}")
    return found


def marks(snippets: int, seconds: float, windows: list[tuple[int, int]], rate: float) -> NDArray[np.int8]:
    """Return the truth of a video, [16 * snippets], from windows of frames.

    Args:
        snippets: number of snippets.
        seconds: length of a snippet in seconds.
        windows: first and last frame of each window.
        rate: frames a second of the video, > 0 where there is a window.
    """
    truth = np.zeros(FRAMES * snippets, np.int8)
    middle = (np.arange(len(truth)) + 0.5) * seconds / FRAMES
    for first, last in windows:
        truth[(middle >= first / rate) & (middle < (last + 1) / rate)] = 1
    return truth


def _lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError(f"{file}: the list is empty; write one video a line")
    return lines


def _list(root: Path, files: list[Path], names: tuple[str, ...]) -> Path:
    """Return the first file below a folder that has one of the names."""
    found = next((file for name in names for file in files if file.name == name), None)
    if found is None:
        raise DataError(f"{root}: has no {names[0]}, here or in a folder below; it ships with the benchmark")
    return found


def _found(root: Path, files: list[Path], names: list[str]) -> dict[str, Path]:
    """Return the file of each listed video, by its path or else by its name. DataError names those that are missing."""
    by_name: dict[str, Path] = {}
    for file in files:
        by_name.setdefault(file.name, file)
    places = {name: root / name if (root / name).is_file() else by_name.get(name.rpartition("/")[2]) for name in names}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {counted(len(names), 'listed video is', 'listed videos are')} not under {root}: {some(missing)}. "
            "Unpack the archives there, or "
            "take the videos out of the lists"
        )
    return {name: place for name, place in places.items() if place is not None}


def _rate(file: Path) -> float:
    """Return the frames a second of a video. DataError where it declares none."""
    from counterpoint.data.media import probe

    rate = probe(file).fps
    if not rate > 0:
        raise DataError(f"{file}: declares no frame rate, so windows of frames have no times; convert it to MP4")
    return rate


def some(items: list[str]) -> str:
    """Join the first ten of a list, and count the others."""
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
