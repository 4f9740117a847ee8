"""`xd-violence:DIR`: the XD-Violence benchmark (Wu et al., ECCV 2020) in its published feature layout.

    DIR/rgb.list  audio.list  rgb_test.list  audio_test.list     one path a line (also in DIR/list)
    DIR/gt.npy or DIR/annotations.txt                            truth of the test videos (also in DIR/list)
    DIR/RGB/NAME__0.npy .. NAME__4.npy, DIR/RGBTest/...          I3D, [T, 1024] each: five crops of a video
    DIR/vggish-features/{train,test}/NAME__vggish.npy            VGGish, [T, 128], shared by the crops

A snippet is 16 frames at 24 frames per second. The name of a normal video holds `_label_A`; the name of a violent one holds the
codes of its violence. Paths in the lists may be those of another machine. The source looks for a file at that path,
then under DIR, then by name in the folders above. A training item is one crop; a valid or test item is one video with its
five crops.

The benchmark has no valid split. So a tenth of the training videos is cut, violent ones in proportion. Parts of one film or
upload (the name before "__#") stay together. Valid videos have a label but no truth per frame. Every frame of a violent one
counts as violent, so AP there measures whole videos. Opening the set checks the headers of all files. Rows are read on access,
so the 60 GB need not fit in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.bags import Bag, BagData, LazyItems, TestVideo
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.errors import DataError
from counterpoint.waiting import patient_track
from counterpoint.words import counted

VISUAL, AUDIO, CROPS, FRAMES = 1024, 128, 5, 16
_LISTS = {"train": ("rgb.list", "audio.list"), "test": ("rgb_test.list", "audio_test.list")}
_FOLDERS = {"visual": ("RGB", "RGBTest"), "audio": ("vggish-features/train", "vggish-features/test")}
_SHOWN = 10  # of a long list of problems


@dataclass
class _Video:
    name: str
    crops: list[Path]
    audio: Path
    lengths: tuple[int, ...] = ()  # snippets of the five crops and of the sound

    @property
    def length(self) -> int:
        return min(self.lengths)

    @property
    def label(self) -> int:
        return int("_label_A" not in self.name)


def load(directory: str, *, valid: float = SHARE) -> BagData:
    """Open the set under a directory.

    Args:
        directory: folder of the set.
        valid: share of the training videos in the valid split, between 0 and 1.

    Features of unequal length are cut to the shortest, and a note reports it. Raises DataError, with the names of all
    wrong lists, files and videos, in these cases:

        - a list is missing or empty;
        - crops are out of order, or the sound is in another order;
        - a file is missing or unreadable;
        - a width is not 1024 or 128;
        - the truth has another length.
    """
    checked_share("xd-violence", valid)
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; the documentation of xd-violence has the expected layout")
    notes: list[str] = []
    splits = {split: _videos(root, split) for split in _LISTS}
    _read_headers([video for videos in splits.values() for video in videos])
    for split, videos in splits.items():
        uneven = [f"{v.name} {v.lengths}" for v in videos if len(set(v.lengths)) > 1]
        if uneven:
            notes.append(
                f"{split}: {counted(len(uneven), 'video has', 'videos have')} crops or sound of different length and are cut to "
                "the shortest "
                f"(snippets of crops 0-4, sound): {_some(uneven)}"
            )
    truth = _truth(root, splits["test"], notes)
    every = splits["train"]
    rows, labels = np.arange(len(every)), np.array([video.label for video in every], np.int64)
    films = np.unique([_film(video.name) for video in every], return_inverse=True)[1]
    kept, cut = carve("xd-violence", rows, valid, labels, films)
    train, watched = [every[n] for n in kept], [every[n] for n in cut]
    notes.append(
        f"the valid split is made here, {len(watched)} of {counted(len(every), 'training video')}; they have no truth per frame, "
        "so every "
        "frame of a violent one counts as violent"
    )
    return BagData(
        name=f"xd-violence:{root}",
        train=LazyItems(CROPS * len(train), lambda i: _bag(train[i // CROPS], i % CROPS)),
        valid=LazyItems(len(watched), lambda i: _test_video(watched[i], _whole(watched[i]))),
        test=LazyItems(len(splits["test"]), lambda i: _test_video(splits["test"][i], truth[i])),
        visual_dim=VISUAL,
        audio_dim=AUDIO,
        frames_per_snippet=FRAMES,
        snippet_seconds=FRAMES / 24,
        notes=notes,
    )


def _bag(video: _Video, crop: int) -> Bag:
    name = f"{video.name}__{crop}"
    return Bag(name, _rows(video.crops[crop], video.length), _rows(video.audio, video.length), video.label)


def _film(name: str) -> str:
    """Return the name of the film or upload that a video was cut from."""
    return name.partition("__#")[0]


def _whole(video: _Video) -> NDArray[np.int8]:
    """Return the truth of a video with only a label: [16 * snippets], the label at every frame."""
    return np.full(FRAMES * video.length, video.label, np.int8)


def _test_video(video: _Video, truth: NDArray[np.int8]) -> TestVideo:
    visual = np.stack([_rows(path, video.length) for path in video.crops])
    return TestVideo(video.name, visual, _rows(video.audio, video.length), video.label, truth[: FRAMES * video.length])


def _open(path: Path) -> NDArray[Any]:
    """Map a file's array into memory without reading it; DataError when the file holds no array."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header with Python's own parser, which raises many errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: not a readable .npy file of numbers ({reason}); extract its features again"
        ) from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path}: an archive, not a .npy file of one array")
    return found


def _rows(path: Path, length: int) -> NDArray[np.float32]:
    rows = _open(path)
    if rows.ndim != 2 or len(rows) < length:
        raise DataError(f"{path}: changed on disk since the set was opened")
    with np.errstate(over="ignore"):  # values out of range become infinite; a later check names and refuses them
        return np.array(rows[:length], dtype=np.float32)


# --- lists ------------------------------------------------------------------------------------------------------------


def _find(root: Path, name: str) -> Path | None:
    return next((p for p in (root / name, root / "list" / name) if p.is_file()), None)


def _lines(root: Path, name: str) -> tuple[Path, list[str]]:
    file = _find(root, name)
    if file is None:
        raise DataError(f"{root}: has no {name}, here or in {root / 'list'}; it ships with the benchmark's code")
    # Film names are in many scripts; a name must find its file whatever its bytes are.
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise DataError(f"{file}: the list is empty; write one feature file's path a line")
    return file, lines


def _videos(root: Path, split: str) -> list[_Video]:
    rgb_file, rgb = _lines(root, _LISTS[split][0])
    audio_file, audio = _lines(root, _LISTS[split][1])
    problems: list[str] = []
    if len(rgb) % CROPS:
        raise DataError(f"{rgb_file}: {counted(len(rgb), 'line')}, not a multiple of five; each video needs five crops")
    names = []
    for start in range(0, len(rgb), CROPS):
        stems = [_stem(line) for line in rgb[start : start + CROPS]]
        name, _, crop = stems[0].rpartition("__")
        if crop != "0" or stems != [f"{name}__{c}" for c in range(CROPS)]:
            problems.append(f"line {start + 1}: {stems[0]}")
        names.append(name)
    if problems:
        raise DataError(
            f"{rgb_file}: five lines in a row must be crops NAME__0 .. NAME__4 of one video; wrong at {_some(problems)}"
        )
    if len(audio) != len(names):
        raise DataError(
            f"{audio_file}: {counted(len(audio), 'line')} for the {counted(len(names), 'video')} of {rgb_file.name}"
        )
    for i, (name, line) in enumerate(zip(names, audio, strict=True)):
        if _stem(line).removesuffix("__vggish") != name:
            problems.append(f"line {i + 1}: {_stem(line)} (the video is {name})")
    if problems:
        raise DataError(
            f"{audio_file}: its videos must come in the order of {rgb_file.name}; wrong at {_some(problems)}"
        )
    again = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if again:
        raise DataError(f"{rgb_file}: listed twice: {_some(again)}")
    missing: list[str] = []

    def file(line: str, kind: str) -> Path:
        found = _resolve(root, line, _FOLDERS[kind])
        if found is None:
            missing.append(line)
        return found or Path(line)

    videos = [
        _Video(name, [file(line, "visual") for line in rgb[CROPS * i : CROPS * (i + 1)]], file(audio[i], "audio"))
        for i, name in enumerate(names)
    ]
    if missing:
        raise DataError(
            f"{counted(len(missing), 'file')} listed in {rgb_file.name} and {audio_file.name} are not under {root}: "
            f"{_some(missing)}. "
            "Unpack the feature archives there, or take the videos out of the lists"
        )
    return videos


def _stem(line: str) -> str:
    return PurePosixPath(line.replace("\\", "/")).name.removesuffix(".npy")


def _resolve(root: Path, line: str, folders: Sequence[str]) -> Path | None:
    line = line.replace("\\", "/")
    parts = PurePosixPath(line).parts
    try:
        places = [Path(line)] if Path(line).is_absolute() else [root / line]
        places += [root.joinpath(*parts[-3:]), root.joinpath(*parts[-2:]), *(root / f / parts[-1] for f in folders)]
        return next((place for place in places if place.is_file()), None)
    except (ValueError, OSError):  # a line that cannot be a file name
        return None


def _some(items: Sequence[str], between: str = "; ") -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return between.join([*items[:_SHOWN], *more])


def _read_headers(videos: list[_Video]) -> None:
    """Fill in the lengths from the files' headers; DataError lists every file that cannot be used."""
    problems: list[str] = []
    for video in patient_track(videos, "checking features"):
        lengths = []
        for path, width in [*((crop, VISUAL) for crop in video.crops), (video.audio, AUDIO)]:
            try:
                rows = _open(path)
                if rows.ndim != 2 or rows.shape[1] != width:
                    raise DataError(f"{path}: its shape is {list(rows.shape)}, expected [snippets, {width}]")
                if rows.dtype.kind not in "fiu":
                    raise DataError(f"{path}: holds {rows.dtype}, not numbers")
                if len(rows) == 0:
                    raise DataError(f"{path}: has no snippet; take the video out of the lists")
                lengths.append(len(rows))
            except DataError as error:
                problems.append(str(error))
        video.lengths = tuple(lengths)
    if problems:
        raise DataError(f"{counted(len(problems), 'feature file')} cannot be used:\n  " + _some(problems, "\n  "))


# --- truth ------------------------------------------------------------------------------------------------------------


def annotated(file: Path) -> dict[str, list[tuple[int, int]]]:
    """Read the benchmark's annotations: video name -> windows [start, end) in frames, in the order of the file.

    A line is a name followed by pairs of frame numbers. DataError names all other lines.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    wrong = []
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S.*?)((?:\s+\d{1,9})+)", line.strip())
        frames = [int(word) for word in match[2].split()] if match else []
        if not match or len(frames) % 2 or any(a > b for a, b in zip(frames[::2], frames[1::2], strict=True)):
            wrong.append(f"line {number}")
            continue
        name = match[1].removesuffix(".mp4")
        found.setdefault(name, []).extend(zip(frames[::2], frames[1::2], strict=True))
    if wrong:
        raise DataError(f"{file}: not 'NAME start end [start end ...]': {_some(wrong)}")
    return found


def make_gt(annotations: Path | str, frames: Mapping[str, int]) -> NDArray[np.float64]:
    """Make the truth vector of test videos, the content of `gt.npy`, from the benchmark's annotation file.

    Args:
        annotations: path of `annotations.txt`; whole names must match.
        frames: video name -> number of frames F (as OpenCV counts), in the order of the test list.

    Returns 16 floor((F - 1) / 16) values 0.0 or 1.0 for each video, one after another. Raises DataError with the names of
    violent videos without a line.
    """
    known = annotated(Path(annotations))
    missing = [name for name in frames if "_label_A" not in name and name not in known]
    if missing:
        raise DataError(f"{annotations}: no line for the violent videos {_some(missing)}")
    parts = [_marked(FRAMES * ((count - 1) // FRAMES), known.get(name, [])) for name, count in frames.items()]
    return np.concatenate(parts).astype(np.float64)


def _marked(length: int, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int8]:
    out = np.zeros(max(0, length), np.int8)
    for start, end in pairs:
        out[start:end] = 1
    return out


def _truth(root: Path, videos: list[_Video], notes: list[str]) -> list[NDArray[np.int8]]:
    """Return each test video's truth per frame, from gt.npy, or else from the annotations."""
    file, annotations = _find(root, "gt.npy"), _find(root, "annotations.txt")
    # The visual features determine a video's length in gt.npy; it is cut later where sound or a crop is shorter.
    lengths = [FRAMES * max(video.lengths[:CROPS]) for video in videos]
    if file is None:
        if annotations is None:
            raise DataError(f"{root}: has neither gt.npy nor annotations.txt, here or in {root / 'list'}")
        frames = {video.name: length + 1 for video, length in zip(videos, lengths, strict=True)}
        notes.append(f"no gt.npy: the truth is made from {annotations}")
        return _split(make_gt(annotations, frames).astype(np.int8), lengths)
    gt = _open(file)
    if gt.ndim != 1 or gt.dtype.kind not in "fiub":
        raise DataError(f"{file}: must be one row of 0 and 1, is {gt.dtype} of shape {list(gt.shape)}")
    if not np.isin(gt, (0, 1)).all():
        raise DataError(f"{file}: holds values other than 0 and 1")
    truth = np.asarray(gt).astype(np.int8)
    # Lists and truth match only in one order; a normal video with violent frames shows a mismatch.
    wrong = _contradictions(truth, videos, lengths, annotations)
    if len(truth) != sum(lengths):
        off = len(truth) - sum(lengths)
        uneven = [f"{v.name} {v.lengths}" for v in videos if len(set(v.lengths)) > 1]
        raise DataError(
            f"{file}: {counted(len(truth), 'frame')}, but the {counted(len(videos), 'test video has', 'test videos have')} 16 x "
            f"{sum(lengths) // FRAMES} = "
            f"{sum(lengths)}: {abs(off)} too {'many' if off > 0 else 'few'}."
            + (f" Lengths (crops 0-4, sound) differ in {_some(uneven)}." if uneven else "")
            + (f" The truth first disagrees with the list at {wrong[0]}." if wrong else "")
            + " Make gt.npy for these features and this list, or replace it by the benchmark's annotations.txt"
        )
    if wrong:
        raise DataError(f"{file} is not in the order of the test list: {_some(wrong)}")
    return _split(truth, lengths)


def _split(truth: NDArray[np.int8], lengths: Sequence[int]) -> list[NDArray[np.int8]]:
    return np.split(truth, np.cumsum(lengths)[:-1])


def _contradictions(
    truth: NDArray[np.int8], videos: list[_Video], lengths: list[int], annotations: Path | None
) -> list[str]:
    """Return the videos whose part of the truth contradicts their label or their annotation."""
    known = annotated(annotations) if annotations else None
    wrong = []
    for video, length, part in zip(videos, lengths, _split(truth, lengths), strict=True):
        if video.label == 0 and part.any():
            wrong.append(f"{video.name} (a normal video with {counted(int(part.sum()), 'violent frame')})")
        elif known is not None and len(part) and video.name in known:
            told = _marked(length, known[video.name])[: len(part)]
            if (told != part).any():
                wrong.append(f"{video.name} ({counted(int((told != part).sum()), 'frame')} unlike its annotation)")
    return wrong
