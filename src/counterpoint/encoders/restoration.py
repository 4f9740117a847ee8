"""Build networks that enlarge pictures, by name: pictures in 0..1 to pictures `scale` times as large.

    name       network
    edsr-s     a small EDSR over bicubic scaling: 4 residual blocks of 24 channels, about 0.1 M parameters
    edsr       EDSR-baseline (Lim et al. 2017, arXiv 1707.02921): 16 residual blocks of 64 channels
    hf:NAME    an image-to-image model of transformers (Swin2SR), by its name on the Hub or its folder

Outputs are not clamped. The names of EDSR's parameters, and its range 0..255 inside, are those of its authors' code. So their
weights can be loaded (`load_restoration`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.images import fetched
from counterpoint.errors import CounterpointError, RunError, needs_extra, unknown

SCALES = (2, 3, 4)
OWN = {"edsr-s": (4, 24, True), "edsr": (16, 64, False)}  # blocks, channels, whether over bicubic scaling
LIBRARIES = ("hf",)
MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training pictures
DEEPER = ("model", "state_dict", "params", "params_ema")  # places of the weights in files of others


def check_restoration(name: str) -> None:
    """Raise CounterpointError, with near matches, for a name that `build_restoration` does not know. Build nothing."""
    library, colon, model = name.partition(":")
    if not colon and name not in OWN:
        raise unknown("restoration network", name, [*OWN, *(f"{library}:NAME" for library in LIBRARIES)])
    if colon and (library not in LIBRARIES or not model):
        raise unknown("library of restoration networks", library, LIBRARIES)


def build_restoration(name: str, scale: int, pretrained: bool = False) -> nn.Module:
    """Build a network that maps pictures [n, 3, h, w] in 0..1 to [n, 3, scale h, scale w].

    Args:
        name: name from the module's table.
        scale: 2, 3 or 4.
        pretrained: load the published weights of an hf: model; False (default): random weights.

    Raises CounterpointError for an unknown name or scale, a model of another scale, and weights that cannot be loaded.
    """
    check_restoration(name)
    if scale not in SCALES:
        raise CounterpointError(f"scale must be 2, 3 or 4, got {scale}")
    if name in OWN:
        if pretrained:
            raise CounterpointError(f"there are no pretrained weights of {name}; name a file or a run: --weights FILE")
        blocks, width, over = OWN[name]
        return EDSR(scale, blocks, width, over_bicubic=over)
    return _transformers(name.partition(":")[2], scale, pretrained)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(True), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class EDSR(nn.Module):
    """EDSR without batch normalisation: residual blocks at the small size, then pixel shuffles.

    Args:
        scale: 2, 3 or 4.
        blocks: number of residual blocks.
        width: number of channels.
        over_bicubic: add the output to the bicubic picture, for short training. False (default): as published.
    """

    def __init__(self, scale: int, blocks: int, width: int, *, over_bicubic: bool = False) -> None:
        super().__init__()
        self.scale, self.over_bicubic = scale, over_bicubic
        steps: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            steps += [nn.Conv2d(width, width * factor**2, 3, 1, 1), nn.PixelShuffle(factor)]
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1))
        self.body = nn.Sequential(*(_Block(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, 1, 1))
        self.tail = nn.Sequential(nn.Sequential(*steps), nn.Conv2d(width, 3, 3, 1, 1))
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    mean: Tensor

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
        x = self.head((images * 255 - self.mean).contiguous(memory_format=torch.channels_last))
        out = self.tail(x + self.body(x))
        if self.over_bicubic:
            return out / 255 + F.interpolate(images, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return (out + self.mean) / 255


class Reconstructed(nn.Module):
    """An image-to-image model of transformers (`model`), with its `reconstruction` as the output."""

    def __init__(self, model: nn.Module, scale: int) -> None:
        super().__init__()
        self.model, self.scale = model, scale
        self.window = int(getattr(model.config, "window_size", 1))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
        # The model takes whole windows alone; the added rows and columns are cut off again.
        height, width = images.shape[2:]
        more = (0, -width % self.window, 0, -height % self.window)
        padded = F.pad(images, more, mode="reflect" if more[1] < width and more[3] < height else "replicate")
        found: Tensor = self.model(pixel_values=padded).reconstruction
        return found[..., : height * self.scale, : width * self.scale]


def _transformers(name: str, scale: int, pretrained: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForImageToImage
    except ImportError as error:
        raise needs_extra(f"hf:{name}", "language") from error
    settings = fetched(lambda: AutoConfig.from_pretrained(name), f"hf:{name}")
    own = getattr(settings, "upscale", None)
    if own != scale:
        raise CounterpointError(
            f"hf:{name} enlarges {own} times; set --scale {own}"
            if own in SCALES
            else f"hf:{name} is no model that enlarges pictures 2, 3 or 4 times"
        )
    if pretrained:
        model = fetched(lambda: AutoModelForImageToImage.from_pretrained(name), f"hf:{name}")
    else:
        model = fetched(lambda: AutoModelForImageToImage.from_config(settings), f"hf:{name}")
    return Reconstructed(model.float(), scale)


def load_restoration(network: nn.Module, path: Path | str) -> None:
    """Load weights into a network from a file: .safetensors, or a PyTorch file of tensors.

    Args:
        network: what `build_restoration` made. For hf: models the file holds the library's names.
        path: the file. Weights of EDSR's authors fit; their `sub_mean` and `add_mean` are left out.

    Raises RunError, naming the file, for a file that is missing, damaged or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such file of weights; name a run (run:RUN), a .safetensors or a .pt file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Mapping[str, Any] = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds
        raise RunError(f"{path} cannot be read as weights: {str(error).splitlines()[0][:200]}") from error
    while deeper := next((name for name in DEEPER if isinstance(found.get(name), Mapping)), None):
        found = found[deeper]
    held = {name: value for name, value in found.items() if name.split(".")[0] not in ("sub_mean", "add_mean")}
    target = network.model if isinstance(network, Reconstructed) else network
    try:
        target.load_state_dict(held)
    except (RuntimeError, AttributeError) as error:
        raise RunError(f"{path}: its weights do not fit the network: {' '.join(str(error).split())[:300]}") from error
