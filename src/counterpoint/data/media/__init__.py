"""Read video files as a stream of snippets in bounded memory, and write them (PyAV over FFmpeg).

Presentation times, not frame counts, define the snippets. Variable frame rates, gaps and late sound are therefore handled
correctly. Let each snippet have F frames and s seconds. Then sample n is the latest frame at or before (n + 1/2) s / F.
Second 0 is the container's start, for pictures and sound alike (`clock`).
"""

from counterpoint.data.media.cut import cut
from counterpoint.data.media.opened import MediaInfo
from counterpoint.data.media.random import frame_at, frames_at, measured_length, probe
from counterpoint.data.media.snippets import Snippet, SnippetReader, sample_times
from counterpoint.data.media.write import write_video

__all__ = [
    "MediaInfo",
    "Snippet",
    "SnippetReader",
    "cut",
    "frame_at",
    "frames_at",
    "measured_length",
    "probe",
    "sample_times",
    "write_video",
]
