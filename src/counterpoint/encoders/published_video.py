"""Use published networks as frozen backbones of snippets: video and audio models of transformers, and timm's picture models.

    hf:FOLDER            a video model (VideoMAE, ViViT, TimeSformer, ...) or an audio model (AST, wav2vec 2.0, ...), saved by
                         transformers; also the name of a model that transformers downloads
    timm:NAME            a picture model of timm, downloaded on first use: the mean over the frames of a snippet
    timm:NAME@FILE       the same, with the weights of a file

The vector is the mean of the last layer's states: over all patches of a video model, over time of an audio model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.weights import read_weights
from counterpoint.encoders.on_device import beside
from counterpoint.encoders.published import loaded
from counterpoint.errors import CounterpointError, RunError, needs_extra
from counterpoint.files import fingerprint

AUDIO_SECONDS = 2.0  # of sound before the end of a snippet, for audio models
FRAMES = 4  # of a snippet, for models of single pictures
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # where a folder has no statistics of its pictures


def folder_digest(place: str, expected: str | None) -> str | None:
    """Return the SHA-256 over the weights files of a folder; None for the name of a model that is downloaded.

    Raises CounterpointError where the folder has no weights, or others than `expected`.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    files = sorted(file for ending in ("*.safetensors", "*.bin") for file in folder.glob(ending))
    if not files:
        raise CounterpointError(f"hf:{place}: the folder has no weights (model.safetensors); save the model there")
    digest = hashlib.sha256("".join(fingerprint(file, None) for file in files).encode()).hexdigest()
    if expected and digest != expected:
        raise CounterpointError(f"hf:{place} does not hold the weights that this run was trained with; restore them")
    return digest


class TransformersVideo:
    """A video model of transformers. A snippet has the frames that the model takes.

    Callers scale frames to the square of the model's side, without cropping.

    Args:
        place: a folder that `save_pretrained` wrote, or the name of a model.
        sha256: hash that the folder's weights must have; None: any.
    """

    def __init__(self, place: str, sha256: str | None = None) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError as error:
            raise needs_extra(f"hf:{place}", "language") from error
        self.name = f"hf:{place}"
        self.sha256 = folder_digest(place, sha256)
        self.model = loaded(lambda: AutoModel.from_pretrained(place), self.name).float().eval()
        config = self.model.config
        frames, side = getattr(config, "num_frames", None), getattr(config, "image_size", None)
        if not frames or not side or self.model.main_input_name != "pixel_values":
            raise CounterpointError(f"{self.name} is no video model; VideoMAE, ViViT and TimeSformer are")
        side = int(side[0] if isinstance(side, list | tuple) else side)
        self.frames_per_snippet, self.frame_size = int(frames), (side, side)
        mean, std = MEAN, STD
        folder = Path(place)
        if not folder.is_dir() or (folder / "preprocessor_config.json").is_file():
            processor = loaded(lambda: AutoImageProcessor.from_pretrained(place), self.name)
            mean, std = processor.image_mean or MEAN, processor.image_std or STD
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.dim = int(config.hidden_size)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, F, H, W, 3], uint8 RGB, to features [N, dim], float32."""
        clips = beside(self.model, frames).permute(0, 1, 4, 2, 3).float() / 255
        mean, std = self.mean.to(clips.device), self.std.to(clips.device)
        states: Tensor = self.model(pixel_values=(clips - mean) / std).last_hidden_state
        return states.mean(1).float().cpu().numpy()


class TransformersAudio:
    """An audio model of transformers, on the last 2 seconds of sound before the end of a snippet.

    Args:
        place: a folder that `save_pretrained` wrote, with its feature extractor; or the name of a model.
        sha256: hash that the folder's weights must have; None: any.
    """

    window_seconds = AUDIO_SECONDS

    def __init__(self, place: str, sha256: str | None = None) -> None:
        from counterpoint.encoders.audio import build_audio_encoder

        try:
            from transformers import AutoFeatureExtractor
        except ImportError as error:
            raise needs_extra(f"hf:{place}", "language") from error
        self.name = f"hf:{place}"
        self.sha256 = folder_digest(place, sha256)
        extractor = loaded(lambda: AutoFeatureExtractor.from_pretrained(place), self.name)
        self.sample_rate = int(getattr(extractor, "sampling_rate", 16000))
        samples = round(self.window_seconds * self.sample_rate)
        encoder = build_audio_encoder(self.name, self.sample_rate, samples).eval()
        self.model: Any = encoder
        self.dim = int(cast(Any, encoder).dim)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map mono sound [N, samples] in [-1, 1] to features [N, dim]."""
        found: Tensor = self.model(beside(self.model, wave))
        return found.float().cpu().numpy()


class TimmFrames:
    """A picture model of timm without its classifier, on 4 frames per snippet; the features are averaged.

    Args:
        model: a name of timm, such as resnet18 or vit_small_patch14_dinov2.
        weights: a file with the model's state dict; None: timm downloads the published weights on first use.
        sha256: hash that the file must have; None: any.
    """

    frames_per_snippet = FRAMES

    def __init__(self, model: str, weights: str | None = None, sha256: str | None = None) -> None:
        import timm

        from counterpoint.encoders.images import check_image_encoder, fetched

        self.name, self.weights = f"timm:{model}", weights
        check_image_encoder(self.name)
        self.sha256 = fingerprint(Path(weights), sha256) if weights else None
        self.model: Any = fetched(lambda: timm.create_model(model, pretrained=not weights, num_classes=0), self.name)
        if weights:
            own = self.model.state_dict()
            state = {key: value for key, value in read_weights(Path(weights)).items() if key in own}
            odd = sorted(set(own) - set(state))
            if odd:
                raise RunError(f"{weights} does not fit {self.name}: it lacks {', '.join(odd[:4])}")
            try:
                self.model.load_state_dict(state)
            except RuntimeError as error:
                raise RunError(f"{weights} does not fit {self.name}: {' '.join(str(error).split())[:300]}") from error
        self.model.eval()
        data = timm.data.resolve_model_data_config(self.model)
        _, height, width = data["input_size"]
        self.frame_size = (width, height)
        self.mean, self.std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.dim = int(self.model.num_features)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, 4, H, W, 3], uint8 RGB, to features [N, dim], float32."""
        pictures = beside(self.model, frames).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        mean, std = self.mean.to(pictures.device), self.std.to(pictures.device)
        rows: Tensor = self.model((pictures - mean) / std)
        return rows.view(len(frames), FRAMES, -1).mean(1).float().cpu().numpy()
