"""Build audio encoders by name: each maps a waveform to one vector, for the task `aligned`.

    name      encoder
    sound-s   a log-mel spectrogram and the small ResNet of the images, 0.30 M parameters, 128 wide, trained here
    frames-s  a log-mel spectrogram, two convolutions and a GRU over time, 0.15 M parameters, 128 wide, trained here
    hf:NAME   any audio model of transformers that takes waveforms (Wav2Vec 2.0, HuBERT, WavLM) or the features of its own
              extractor (Whisper, AST); NAME is its name on the Hub or its folder

    encoder = build_audio_encoder("sound-s", rate=16000, samples=16000)
    vectors = encoder(torch.zeros(2, 16000))                                     # [2, 128]

An encoder is a module with `dim`, the width of its vectors. It takes float32 [batch, samples], mono in [-1, 1], at the
rate it was built for. `frames-s` and `hf:` also have `states(wave)`: vectors over time, and where the sound is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.encoders.published import loaded
from counterpoint.encoders.small_images import ResNetS
from counterpoint.encoders.sound import mel_filterbank
from counterpoint.errors import CounterpointError, needs_extra, unknown

BANDS = 64
FRAMES = 128  # of a spectrogram, at most
HOP_SECONDS = 0.010
OFFSET = 1e-4  # added before the logarithm; sets the value of silence
LEAST = 0.05  # shortest sound, in seconds


class LogMelSpectrogram(nn.Module):
    """Map sound [batch, samples] to log-mel magnitudes [batch, 1, 64 bands, frames] of mean 0 and standard deviation 1.

    Hops last 10 ms, or longer so that there are at most 128 frames. The Hann window spans three hops, at least 30 ms. Bands
    reach from 50 Hz to 8 kHz, or to half the rate if that is lower. The normalisation of each spectrogram removes loudness.
    Silence gives zeros.

    Args:
        rate: samples per second.
        samples: number of samples of every sound.
    """

    def __init__(self, rate: int, samples: int) -> None:
        super().__init__()
        self.hop = max(round(rate * HOP_SECONDS), -(-samples // FRAMES))
        # The lowest bands are narrow. Only a window of 30 ms or more separates them, whatever the hop.
        self.width = max(3 * self.hop, round(0.03 * rate))
        self.fft = 1 << (self.width - 1).bit_length()
        bank = mel_filterbank(rate, self.fft, BANDS, 50.0, min(8000.0, rate / 2))
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(self.width), persistent=False)

    def forward(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch 1 bands frames"]:
        assert isinstance(self.window, Tensor)
        assert isinstance(self.bank, Tensor)
        spectrum = torch.stft(
            wave.float(),
            self.fft,
            self.hop,
            self.width,
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        # Silence is 0 before the mean is taken. The mean of another number is rounded, differently in other programs, and the
        # difference would be divided by 1e-3.
        bands = torch.log(spectrum.abs().transpose(1, 2) @ self.bank + OFFSET).transpose(1, 2) - math.log(OFFSET)
        bands = bands - bands.mean((1, 2), keepdim=True)
        return (bands / bands.std((1, 2), keepdim=True).clamp(min=1e-3))[:, None]


class SoundS(nn.Module):
    """A log-mel spectrogram, encoded by the small ResNet of the images."""

    def __init__(self, rate: int, samples: int) -> None:
        super().__init__()
        self.spectrogram = LogMelSpectrogram(rate, samples)
        self.model = ResNetS(BANDS, channels=1)
        self.dim = self.model.dim

    def forward(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch dim"]:
        return self.model(self.spectrogram(wave))


class FramesS(nn.Module):
    """A log-mel spectrogram, two convolutions that halve the time, and a GRU in both directions.

    Zeros at the end of a sound are padding. The vector is the mean over the other frames.
    """

    def __init__(self, rate: int, samples: int, dim: int = 128) -> None:
        super().__init__()
        self.dim = dim
        self.spectrogram = LogMelSpectrogram(rate, samples)
        self.convolutions = nn.Sequential(
            nn.Conv1d(BANDS, dim, 3, 2, 1), nn.GELU(), nn.Conv1d(dim, dim, 3, 2, 1), nn.GELU()
        )
        self.recurrent = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)

    def states(
        self, wave: Float[Tensor, "batch samples"]
    ) -> tuple[Float[Tensor, "batch time dim"], Bool[Tensor, "batch time"]]:
        """Compute a vector for each frame, and whether it is a frame of the sound; the first always is."""
        x = self.convolutions(self.spectrogram(wave)[:, 0]).transpose(1, 2)
        numbers = torch.arange(1, wave.shape[1] + 1, device=wave.device)
        frames = ((wave != 0) * numbers).amax(1) // (4 * self.spectrogram.hop)
        there = torch.arange(x.shape[1], device=x.device) <= frames[:, None]
        return self.recurrent(x * there[..., None])[0], there

    def forward(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch dim"]:
        return mean_state(*self.states(wave))


def mean_state(
    states: Float[Tensor, "batch time dim"], there: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch dim"]:
    """Average the states of each sound over the time that it lasts; zeros where it has none."""
    return (states * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)


class PretrainedAudio(nn.Module):
    """An audio model of transformers, as the submodule `model`; its output is averaged over time."""

    def __init__(self, model: Any, extractor: Any, rate: int) -> None:
        super().__init__()
        self.model, self.extractor, self.rate = model, extractor, rate
        self.dim = int(model.config.hidden_size)
        # Models of waveforms need only normalised waveforms. Other models need the features of their extractor.
        self.raw = model.main_input_name == "input_values" and hasattr(model.config, "conv_stride")

    def forward(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch dim"]:
        return self.states(wave)[0].mean(1)

    def states(
        self, wave: Float[Tensor, "batch samples"]
    ) -> tuple[Float[Tensor, "batch time dim"], Bool[Tensor, "batch time"]]:
        """Compute a vector for each frame; all frames count."""
        if self.raw:
            wave = wave - wave.mean(1, keepdim=True)
            inputs = wave / wave.std(1, keepdim=True).clamp(min=1e-5)
        else:
            made = self.extractor(list(wave.cpu().numpy()), sampling_rate=self.rate, return_tensors="pt")
            inputs = made[self.model.main_input_name].to(wave.device)
        found = self.model(**{self.model.main_input_name: inputs}).last_hidden_state
        return found, torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)


OWN: dict[str, Callable[[int, int], nn.Module]] = {"sound-s": SoundS, "frames-s": FramesS}


def build_audio_encoder(name: str, rate: int, samples: int, pretrained: bool = True) -> nn.Module:
    """Build an encoder that maps sounds [B, samples] to vectors [B, dim].

    Args:
        name: name from the module's table.
        rate: samples per second, at least 1,000.
        samples: number of samples of every sound.
        pretrained: load the published weights of an hf: model (default); False: random weights in its architecture.

    Raises CounterpointError for an unknown name, sounds shorter than 50 ms, or a rate that differs from the model's. Raises
    it too for a missing extra and weights that cannot be downloaded.
    """
    if rate < 1000 or samples < LEAST * rate:
        raise CounterpointError(
            f"sounds need at least {LEAST:g} s at 1,000 samples a second or more, got {samples} samples at {rate}"
        )
    check_audio_encoder(name)
    if name in OWN:
        return OWN[name](rate, samples)
    return _transformers(name, name.partition(":")[2], rate, samples, pretrained)


def check_audio_encoder(name: str) -> None:
    """Raise CounterpointError for a name that `build_audio_encoder` does not know."""
    library, _, model = name.partition(":")
    if name not in OWN and (library != "hf" or not model):
        raise unknown("audio encoder", name, [*OWN, "hf:NAME"])


def _transformers(name: str, place: str, rate: int, samples: int, pretrained: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
    except ImportError as error:
        raise needs_extra(name, "language") from error
    extractor = loaded(lambda: AutoFeatureExtractor.from_pretrained(place), name)
    if pretrained:
        model = loaded(lambda: AutoModel.from_pretrained(place), name)
    else:
        model = loaded(lambda: AutoModel.from_config(AutoConfig.from_pretrained(place)), name)
    model = model.float()  # transformers 5 keeps the type of the file; see encoders/text.py
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if model.main_input_name not in ("input_values", "input_features"):
        raise CounterpointError(f"{name} is no audio model; its input is {model.main_input_name}")
    if extractor.sampling_rate != rate:
        raise CounterpointError(
            f"{name} needs {extractor.sampling_rate} samples a second, the data has {rate}; set "
            f"?rate={extractor.sampling_rate} for a source that generates or resamples its sounds"
        )
    encoder = PretrainedAudio(model, extractor, rate)
    try:
        with torch.inference_mode():
            training = model.training
            encoder.eval()(torch.zeros(1, samples))
            encoder.train(training)
    except (RuntimeError, ValueError) as error:
        raise CounterpointError(f"{name} cannot take sounds of {samples} samples ({str(error)[:200]})") from error
    return encoder
