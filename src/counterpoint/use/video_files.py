"""List the video files that the arguments of a command name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import walk
from counterpoint.words import counted


class Listed(NamedTuple):
    """The videos that the arguments of the command line name."""

    videos: list[Path]
    failures: list[tuple[Path | str, str]]  # names without a video, with the reason
    left_out: list[tuple[Path, str]]  # files and entries of folders that are not videos, with the reason


# Endings of video files. In a folder such files are processed or reported as failed; other files are opened to find their type.
# fmt: off
VIDEO_ENDINGS = frozenset([
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v", ".m1v", ".vob",
    ".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".ogm", ".mxf", ".h264", ".264", ".h265", ".265",
    ".hevc", ".mjpeg", ".mjpg", ".dv", ".divx", ".rm", ".rmvb", ".y4m", ".ivf", ".nut", ".gif",
])
# fmt: on


def find_videos(names: Sequence[Path | str]) -> Listed:
    """List the video files among files and folders. Links in folders are followed.

    Every entry of a folder is a video or is left out with a reason. A file that several names and links lead to is listed once. A
    web address and a folder that cannot be read are failures.
    """
    found = _listed(names)
    first: dict[Path, Path] = {}
    for video in found.videos:
        if first.setdefault(video.resolve(), video) is not video:
            found.left_out.append((video, f"the same file as {first[video.resolve()]}"))
    return found._replace(videos=list(first.values()))


def _listed(names: Sequence[Path | str]) -> Listed:
    found = Listed([], [], [])
    for name in names:
        if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://", str(name)):
            found.failures.append(
                (str(name), "is a web address, which is not supported; download the file and name it")
            )
            continue
        path = Path(name)
        try:
            if not path.exists():
                found.failures.append((path, "no such file or folder"))
                continue
            if not path.is_dir():
                found.videos.append(path)
                continue
            inside = walk(path)
        except (CounterpointError, OSError, ValueError) as error:
            found.failures.append((path, str(error).removeprefix(f"{path} ")))
            continue
        found.left_out.extend(inside.left_out)
        before = len(found.videos)
        for file in inside.files:
            reason = None if file.suffix.lower() in VIDEO_ENDINGS else _no_video(file)
            if reason is None:
                found.videos.append(file)
            else:
                found.left_out.append((file, reason))
        if len(found.videos) == before:
            found.failures.append((path, f"a folder without a video file ({counted(len(inside.files), 'other file')})"))
    return found


def _no_video(file: Path) -> str | None:
    """Return the reason why a file with an unusual ending is not a video; None when it is one."""
    from counterpoint.data.media.opened import Opened

    try:
        source = Opened(file)
    except DataError as error:
        return str(error).removeprefix(f"{file}: ")
    with source.container:
        kind = source.container.format.name
    return "a still picture" if kind.startswith("image2") or kind.endswith("_pipe") else None
