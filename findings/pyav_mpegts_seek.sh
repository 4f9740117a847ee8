#!/usr/bin/env bash
# A backward seek in an MPEG transport stream lands so that the first picture decoded is later than the time asked for.
#
# One would guess: seek(t, backward=True) and then decoding gives a picture at or before t first, as it does in mp4 and mkv.
# What happens: in .ts FFmpeg finds a place by byte and time stamp, not a key picture. The next key picture follows, up to a
#   key interval after t. With one key picture at the start of the stream there is none at all.
# Who is hurt: whoever samples frames of broadcast or camera recordings by time: the picture is seconds off, without an error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" numpy==2.4.6 av==18.1.0
cd "$place"
PYTHONPATH="$place" python3 - <<'PY'
from fractions import Fraction

import av
import numpy as np


def write(name, interval):
    """10 s at 25 pictures a second, a key picture every `interval` pictures."""
    with av.open(name, "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"g": str(interval), "keyint_min": str(interval), "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(250):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def landed(name, seconds):
    """Time of the first picture after a backward seek, from the start of the stream; None when there is none."""
    with av.open(name) as container:
        stream = container.streams.video[0]
        start = stream.start_time or 0
        container.seek(start + round(seconds / stream.time_base), stream=stream, backward=True)
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError:
            frame = None
        return None if frame is None else round(float((frame.pts - start) * stream.time_base), 2)


found = {}
for interval in (100, 250):
    for ending in ("mp4", "mkv", "ts"):
        name = f"g{interval}.{ending}"
        write(name, interval)
        found[name] = landed(name, 5.0)
        print(f"PyAV {av.__version__}, {name}: asked for 5.0 s, first picture at {found[name]}")
assert found["g100.mp4"] == found["g100.mkv"] == 4.0
assert found["g250.mp4"] == found["g250.mkv"] == 0.0
assert found["g100.ts"] == 8.0
assert found["g250.ts"] is None
PY
