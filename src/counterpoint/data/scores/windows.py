"""Windows of strips and of recordings, cut on access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices, Pixels
from counterpoint.data.scores.engraving import HEIGHT
from counterpoint.data.scores.synthesis import RATE, Wave


class SheetWindows:
    """Windows of strips, cut on access: an `ImageSplit`.

    Args:
        strips: for each piece, grey [HEIGHT, W]; empty for a piece without a score, whose windows are zeros.
        centres: for each piece, [items] pixels from the strip's left end.
    """

    labels = None

    def __init__(self, strips: Sequence[Pixels], centres: Sequence[NDArray[np.float32]]) -> None:
        self.strips = list(strips)
        self.piece = _numbers(centres)
        self.start = np.rint(np.concatenate(list(centres))).astype(np.int64) - HEIGHT // 2

    def __len__(self) -> int:
        return len(self.piece)

    def images(self, indices: Indices) -> Pixels:
        """Return the windows at [n] positions: [n, HEIGHT, HEIGHT, 3], white beyond a strip's ends."""
        out = np.full((len(indices), HEIGHT, HEIGHT), 255, np.uint8)
        for row, (piece, start) in enumerate(zip(self.piece[indices], self.start[indices], strict=True)):
            strip = self.strips[piece]
            if not strip.size:
                out[row] = 0
                continue
            least, most = max(start, 0), min(start + HEIGHT, strip.shape[1])
            out[row, :, least - start : most - start] = strip[:, least:most]
        return np.repeat(out[..., None], 3, axis=3)


class SoundWindows:
    """Windows of recordings, cut on access: a `WaveSplit`.

    Args:
        recordings: for each piece, int16 [n]; empty for a piece without sound, whose windows are silent.
        centres: for each piece, [items] seconds from the recording's start.
        samples: number of samples of a window.
    """

    def __init__(
        self, recordings: Sequence[NDArray[np.int16]], centres: Sequence[NDArray[np.float32]], samples: int
    ) -> None:
        self.recordings = list(recordings)
        self.samples = samples
        self.piece = _numbers(centres)
        self.start = np.rint(np.concatenate(list(centres)) * RATE).astype(np.int64) - samples // 2

    def __len__(self) -> int:
        return len(self.piece)

    def waves(self, indices: Indices) -> Wave:
        """Return the windows at [n] positions: [n, samples] in [-1, 1], zero beyond a recording's ends."""
        out = np.zeros((len(indices), self.samples), np.float32)
        for row, (piece, start) in enumerate(zip(self.piece[indices], self.start[indices], strict=True)):
            wave = self.recordings[piece]
            least, most = max(start, 0), min(start + self.samples, len(wave))
            if least < most:
                np.divide(wave[least:most], 32767, out=out[row, least - start : most - start])
        return out


def _numbers(centres: Sequence[NDArray[np.float32]]) -> Indices:
    return np.repeat(np.arange(len(centres)), [len(c) for c in centres])
