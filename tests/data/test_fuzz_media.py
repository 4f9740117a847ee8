"""Hundreds of mutated media files: each is read or refused by name, none crashes, hangs or gives nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from counterpoint.data.media import write_video

FILES = 240
LIMIT = 60.0  # seconds for any one file

# Read the listed files in a separate process, because a crash in a decoder must not end the tests.
READER = """
import json, sys
import numpy as np
from counterpoint.data.media import SnippetReader, frame_at, probe
from counterpoint.errors import DataError

class Eye:
    name, dim, frames_per_snippet, frame_size = "eye", 1, 4, (32, 16)
    def __call__(self, frames): return frames.mean((1, 2, 3, 4))[:, None].astype(np.float32)

class Ear:
    name, dim, sample_rate, window_seconds = "ear", 1, 16000, 0.5
    def __call__(self, wave): return wave.mean(1, keepdims=True)

for line in sys.stdin:
    path = line.rstrip("\\n")
    try:
        with SnippetReader(path, Eye(), Ear(), snippet_seconds=0.5) as reader:
            rows = sum(len(v) for v, _ in reader.features())
            assert rows > 0, "nothing was read and nothing said"
        probe(path)
        frame_at(path, 0.7, width=20)
        answer = {"rows": rows, "notes": reader.notes}
    except DataError as error:
        answer = {"refused": str(error)}
    except BaseException as error:
        answer = {"broken": repr(error)}
    print(json.dumps(answer), flush=True)
"""


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(0, len(data))) if rng.random() < 0.6 else int(min(len(data) - 1, rng.exponential(200)))
        kind = rng.integers(6)
        if kind == 0:
            data[at : at + 4] = rng.bytes(4)
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2 and len(data) > 300:
            del data[at : at + int(rng.integers(1, 100))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 60)))
        elif kind == 4 and len(data) > 300 and rng.random() < 0.3:
            del data[max(100, at) :]
        else:
            data[at : at + 4] = rng.choice([b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        if len(data) < 16:
            data += bytes(16)
    return bytes(data)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(1)
    frames = [np.kron(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(36)]
    wave = rng.uniform(-0.3, 0.3, 24000).astype(np.float32)
    for suffix in ("mp4", "mkv", "avi", "mov", "ts"):
        write_video(folder / f"a.{suffix}", frames, wave)
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_mutated_media_files_are_read_or_refused(originals, tmp_path):
    rng = np.random.default_rng(7)
    process: subprocess.Popen[str] | None = None
    outcomes = {"read": 0, "noted": 0, "refused": 0}
    for number in range(FILES):
        original = originals[number % len(originals)]
        path = tmp_path / f"{number}{original.suffix}"
        path.write_bytes(mutated(original.read_bytes(), rng) if number >= len(originals) else original.read_bytes())
        if process is None:
            process = subprocess.Popen(
                [sys.executable, "-c", READER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        watchdog = threading.Timer(LIMIT, process.kill)
        watchdog.start()
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        watchdog.cancel()
        kept = f"the file is {path}"
        assert line, f"the reader died or took more than {LIMIT:.0f} s; {kept}"
        answer = json.loads(line)
        assert "broken" not in answer, f"{answer}; {kept}"
        if number < len(originals):
            assert answer == {"rows": 3, "notes": []}, f"{answer}; {kept}"
        if "refused" in answer:
            assert str(path) in answer["refused"]
            outcomes["refused"] += 1
        else:
            outcomes["noted" if answer["notes"] else "read"] += 1
        path.unlink()
    process.stdin.close()
    process.wait(timeout=30)
    # The mutations bite, and what can be read is.
    assert outcomes["refused"] > 10, outcomes
    assert outcomes["noted"] > 10, outcomes
    assert outcomes["read"] > 10, outcomes
