"""Video files, read as a stream of snippets in bounded memory, and written (PyAV over FFmpeg).

Snippets go by presentation time, not by counting frames, so variable frame rates, gaps and late sound come out right:
with F frames per snippet of s seconds, sample n shows the latest frame at or before (n + 1/2) s / F. Second 0 is the
container's start, for pictures and sound alike (`clock`).
"""

from counterpoint.data.media.opened import MediaInfo
from counterpoint.data.media.random import frame_at, frames_at, measured_length, probe
from counterpoint.data.media.snippets import Snippet, SnippetReader, sample_times
from counterpoint.data.media.write import write_video

__all__ = [
    "MediaInfo",
    "Snippet",
    "SnippetReader",
    "frame_at",
    "frames_at",
    "measured_length",
    "probe",
    "sample_times",
    "write_video",
]
