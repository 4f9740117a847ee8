"""Write video files (PyAV over FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.media.opened import load_av
from counterpoint.errors import DataError


def write_video(
    path: Path | str,
    frames: Iterable[NDArray[np.uint8]],
    wave: NDArray[np.float32] | None,
    *,
    fps: float = 24,
    sample_rate: int = 16000,
    bit_rate: int | None = None,
    comment: str = "",
) -> None:
    """Write frames and sound as H.264 and AAC in .mp4, or in the container of the path's ending.

    Args:
        path: The file to write, as a whole or not at all.
        frames: RGB frames [H, W, 3] with even sides.
        wave: Mono sound [samples] in [-1, 1]. None: no sound.
        fps: Frames per second.
        sample_rate: Samples per second of the sound.
        bit_rate: Average bits per second of the pictures. Default: constant quality, with the bit rate that it needs.
        comment: Text that the file keeps as its comment.

    Where FFmpeg was built without H.264, MPEG-4 replaces it.
    """
    av = load_av()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".half-{path.name}")
    webm = path.suffix == ".webm"
    codec = "libvpx-vp9" if webm else "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov", ".m4v") else {}
    try:
        with av.open(str(half), "w", options=options) as container:
            video: Any = None
            audio = None
            if comment:
                container.metadata["comment"] = comment
            if wave is not None:
                audio = container.add_stream(
                    "libopus" if webm else "aac", rate=48000 if webm else sample_rate, layout="mono"
                )
            position = 0
            for number, pixels in enumerate(frames):
                if video is None:
                    video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                    video.height, video.width = pixels.shape[:2]
                    video.pix_fmt = "yuv420p"
                    if bit_rate is not None or codec != "libx264":
                        video.bit_rate = bit_rate or 2_000_000
                    if codec == "libx264":
                        video.options = {"preset": "veryfast"} | ({} if bit_rate else {"crf": "20"})
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                if audio is not None and wave is not None:
                    stop = min(len(wave), round((number + 1) / fps * sample_rate))
                    container.mux(_sound_packets(av, audio, wave, position, stop, sample_rate))
                    position = stop
            if video is None:
                raise DataError(f"{path}: no frames to write")
            container.mux(video.encode(None))
            if audio is not None and wave is not None:
                container.mux(_sound_packets(av, audio, wave, position, len(wave), sample_rate))
                container.mux(audio.encode(None))
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _sound_packets(av: Any, stream: Any, wave: NDArray[np.float32], start: int, stop: int, rate: int) -> list[Any]:
    if start >= stop:
        return []
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(wave[None, start:stop], np.float32), format="flt", layout="mono"
    )
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return list(stream.encode(frame))
