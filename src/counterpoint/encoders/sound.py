"""Build audio backbones: a log-mel summary without weights, and the VGGish network, which needs a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.weights import read_weights
from counterpoint.errors import RunError
from counterpoint.files import fingerprint

RATE, WINDOW, HOP, FFT, BANDS = 16000, 400, 160, 512, 64
LOWEST, HIGHEST = 125.0, 7500.0
OFFSET = 0.01  # added before the logarithm; sets the value of silence


def _mel(hertz: NDArray[np.float64] | float) -> Any:
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


def mel_filterbank(
    rate: int = RATE, fft: int = FFT, bands: int = BANDS, lowest: float = LOWEST, highest: float = HIGHEST
) -> Tensor:
    """Compute triangular filters [fft / 2 + 1, bands], equally wide on the mel scale (HTK), as in VGGish.

    Args:
        rate: samples per second.
        fft: samples of a Fourier transform.
        bands: number of filters.
        lowest, highest: range of the filters in hertz.
    """
    edges = np.linspace(_mel(lowest), _mel(highest), bands + 2)
    bins = _mel(np.linspace(0.0, rate / 2, fft // 2 + 1))[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0.0, np.minimum(rising, falling))
    bank[0] = 0.0
    return torch.from_numpy(bank.astype(np.float32))


class _Spectrogram:
    """Map sound [N, samples] at 16 kHz to log-mel magnitudes [N, frames, 64].

    Windows last 25 ms and begin every 10 ms. Bands reach from 125 to 7500 Hz.
    """

    def __init__(self) -> None:
        self.bank = mel_filterbank()
        self.window = torch.hann_window(WINDOW, periodic=True)

    def __call__(self, wave: NDArray[np.float32]) -> Tensor:
        frames = torch.from_numpy(np.ascontiguousarray(wave)).unfold(1, WINDOW, HOP) * self.window
        return torch.log(torch.fft.rfft(frames, n=FFT).abs() @ self.bank + OFFSET)


class LogMel:
    """A descriptor of 128 numbers without learned weights: mean and maximum over the snippet of 64 log-mel bands.

    The numbers are scaled to unit order. `window_seconds` is the length of sound per snippet, by default 2/3 s.
    """

    name = "logmel"
    dim = 2 * BANDS
    sample_rate = RATE

    def __init__(self, window_seconds: float = 16 / 24) -> None:
        self.window_seconds = window_seconds
        self.spectrogram = _Spectrogram()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map mono sound [N, samples] in [-1, 1] to features [N, 128]. Silence gives a constant row."""
        bands = self.spectrogram(wave)
        return (torch.cat([bands.mean(1) + 3.0, bands.amax(1) + 2.0], dim=1) / 2.0).numpy()


class VGGish(nn.Module):
    """The VGGish network (Hershey et al. 2017) on 96 x 64 log-mel patches of 0.975 s: 128 numbers per snippet.

    The file `weights` holds a state dict with the names of the usual PyTorch port (`features.N`, `embeddings.N`). If
    `sha256` is not None, the file must have that hash. The network applies neither PCA nor 8-bit quantisation, unlike some
    published VGGish features.
    """

    name = "vggish"
    dim = 128
    sample_rate = RATE
    window_seconds = (WINDOW + 95 * HOP) / RATE

    def __init__(self, weights: Path, sha256: str | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for item in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M"):
            if isinstance(item, int):
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
                width = item
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU()
        )
        self.weights = weights
        self.sha256 = fingerprint(weights, sha256)
        own = set(self.state_dict())
        state = {name: value for name, value in read_weights(weights).items() if not name.startswith("pproc.")}
        if set(state) != own:
            odd = sorted(own.symmetric_difference(state))[:4]
            raise RunError(f"{weights} does not hold VGGish weights; differs in {', '.join(odd)}")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise RunError(f"{weights} does not fit VGGish: {' '.join(str(error).split())[:300]}") from error
        self.spectrogram = _Spectrogram()
        self.eval()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": str(self.weights), "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map mono sound [N, samples] in [-1, 1] to features [N, 128]."""
        patch = self.spectrogram(wave)[:, None].to(next(self.parameters()).device)
        # The original flattens with channels last.
        flat = self.features(patch).permute(0, 2, 3, 1).flatten(1)
        return self.embeddings(flat).cpu().numpy()
