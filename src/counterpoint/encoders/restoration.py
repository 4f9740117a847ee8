"""Build networks that enlarge pictures, by name: pictures in 0..1 to pictures `scale` times as large.

    name             network
    edsr-s           a small EDSR over bicubic scaling: 4 residual blocks of 24 channels, about 0.1 M parameters
    edsr             EDSR-baseline (Lim et al. 2017, arXiv 1707.02921): 16 residual blocks of 64 channels
    hf:NAME          an image-to-image model of transformers (Swin2SR), by its name on the Hub or its folder
    spandrel:NAME    an architecture of the library spandrel with random weights: RCAN, SwinIR, HAT and about twenty more
    spandrel:FILE    a file of weights of any of its architectures (.pth, .safetensors), by which the library knows the network

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
LIBRARIES = ("hf", "spandrel")
FILES = (".pth", ".pt", ".ckpt", ".safetensors")
# The settings of spandrel's networks without weights: names of the factor, and what networks lack or need beside their defaults.
FACTORS = ("scale", "upscale", "upscaling_factor", "upscale_factor", "up_scale")
GIVEN = {
    **dict.fromkeys(("num_in_ch", "num_out_ch", "in_chans"), 3),
    "img_size": 64,
    "window_size": 8,
    "upsampler": "pixelshuffle",
}
WINDOWS = {"MMRealSR": 4}  # of networks whose windows the library does not name
PROBE = 64  # pixels of the picture on which a network is tried
MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training pictures
DEEPER = ("model", "state_dict", "params", "params_ema")  # places of the weights in files of others


def check_restoration(name: str) -> None:
    """Raise CounterpointError, with near matches, for a name that `build_restoration` does not know. Build nothing."""
    library, colon, model = name.partition(":")
    if not colon and name not in OWN:
        raise unknown(
            "restoration network", name, [*OWN, *(f"{library}:NAME" for library in LIBRARIES), "spandrel:FILE"]
        )
    if colon and library not in LIBRARIES:
        raise unknown("library of restoration networks", library, LIBRARIES)
    if colon and not model:
        raise CounterpointError(f"{name} names no network; write {library}:NAME")


def is_file(name: str) -> bool:
    """Tell whether a network is named by a file of its weights."""
    return name.startswith("spandrel:") and name.lower().endswith(FILES)


def layout(network: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a network's weights, by which spandrel knows its architecture when the file is gone; fit for JSON."""
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def build_restoration(
    name: str, scale: int, pretrained: bool = False, shapes: Mapping[str, list[int]] | None = None
) -> nn.Module:
    """Build a network that maps pictures [n, 3, h, w] in 0..1 to [n, 3, scale h, scale w].

    Args:
        name: name from the module's table.
        scale: 2, 3 or 4.
        pretrained: load the published weights of an hf: model; False (default): random weights. Weights of a file are always
            loaded.
        shapes: what `layout` returned of the network of spandrel:FILE. Where that file is gone, the network has these shapes and
            random weights. None (default): a missing file is an error.

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
    library, _, model = name.partition(":")
    return _transformers(model, scale, pretrained) if library == "hf" else _spandrel(model, scale, pretrained, shapes)


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
    """A model of a library (`model`), which takes pictures of whole windows alone.

    Rows and columns are added at the right and below, and cut off again. An image-to-image model of transformers gives its
    `reconstruction`, and a network with several outputs its first.

    Args:
        model: the network.
        scale: 2, 3 or 4.
        window: height and width of its windows in pixels.
        least: least height and width of its pictures in pixels.
    """

    def __init__(self, model: nn.Module, scale: int, window: int = 1, least: int = 1) -> None:
        super().__init__()
        self.model, self.scale, self.window = model, scale, window
        self.least = -(-least // window) * window

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
        height, width = images.shape[2:]
        across, down = (max(side + -side % self.window, self.least) - side for side in (width, height))
        mode = "reflect" if across < width and down < height else "replicate"
        found: Any = self.model(F.pad(images, (0, across, 0, down), mode=mode))
        pictures: Tensor = found[0] if isinstance(found, tuple) else getattr(found, "reconstruction", found)
        return pictures[..., : height * self.scale, : width * self.scale]


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
    return Reconstructed(model.float(), scale, int(getattr(model.config, "window_size", 1)))


def _spandrel(name: str, scale: int, pretrained: bool, shapes: Mapping[str, list[int]] | None) -> nn.Module:
    """Build a network of the library spandrel, by its architecture or by a file of weights."""
    try:
        import spandrel
    except ImportError as error:
        raise needs_extra(f"spandrel:{name}", "dense") from error
    called = f"spandrel:{name}"
    if name.lower().endswith(FILES):
        gone = shapes is not None and not Path(name).is_file()
        state = (
            {key.removeprefix("model."): torch.zeros(of) for key, of in (shapes or {}).items()}
            if gone
            else read_weights(name)
        )
        try:
            found: Any = spandrel.ModelLoader(device="cpu").load_from_state_dict(
                spandrel.canonicalize_state_dict(dict(state))
            )
        except Exception as error:  # each architecture raises its own kinds
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise CounterpointError(
                f"{called} cannot be read as weights of an architecture of spandrel: {said}"
            ) from error
    elif pretrained:
        raise CounterpointError(f"there are no pretrained weights of {called}; name a file: spandrel:FILE.pth")
    else:
        found = _untrained(called, name, scale)
    if found.purpose not in ("SR", "FaceSR") or found.input_channels != 3 or found.output_channels != 3:
        raise CounterpointError(f"{called} does not enlarge pictures of three colours")
    if found.scale != scale:
        possible = f"; set --scale {found.scale}" if found.scale in SCALES else ", not 2, 3 or 4"
        raise CounterpointError(f"{called} enlarges {found.scale} times{possible}")
    needs = found.size_requirements
    if needs.square:
        raise CounterpointError(f"{called} takes square pictures alone; name a network without fixed sizes")
    window = max(needs.multiple_of, WINDOWS.get(str(found.architecture.id), 1))
    return Reconstructed(found.model.float().requires_grad_(True), scale, window, needs.minimum)


def _untrained(called: str, name: str, scale: int) -> Any:
    """Return an architecture of spandrel with random weights, as the library describes it."""
    import importlib
    import inspect

    import spandrel

    known = sorted(str(entry.architecture.id) for entry in spandrel.MAIN_REGISTRY.architectures())
    if name not in known and Path(name).suffix:
        raise CounterpointError(f"{called}: a file of weights ends in {', '.join(FILES)}")
    if name not in known:
        raise unknown("architecture of spandrel", name, known)
    network = getattr(importlib.import_module(f"spandrel.architectures.{name}"), name, None)
    options = inspect.signature(network).parameters if network is not None else {}
    factor = next((option for option in FACTORS if option in options), None)
    if network is None or factor is None:
        raise CounterpointError(f"{called} has no setting for how much it enlarges; name a file of its weights")
    more = {option: value for option, value in GIVEN.items() if option in options}
    try:
        try:
            made = network(**{factor: scale}, **more)
        except Exception:  # it has other upsamplers
            made = network(**{factor: scale}, **{option: more[option] for option in more if option != "upsampler"})
        found: Any = spandrel.ModelLoader(device="cpu").load_from_state_dict(made.state_dict())
        with torch.no_grad():  # some networks are built for a factor at which they cannot run
            found.model.eval()(torch.zeros(1, found.input_channels, PROBE, PROBE))
        return found
    except Exception as error:  # each architecture raises its own kinds
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CounterpointError(
            f"{called} cannot be built for scale {scale} ({said}); name a file of its weights"
        ) from error


def read_weights(path: Path | str) -> Mapping[str, Any]:
    """Read a file of weights: .safetensors, or a PyTorch file of tensors. Raises RunError, naming the file, for any other."""
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
    return found


def load_restoration(network: nn.Module, path: Path | str) -> None:
    """Load weights into a network from a file: .safetensors, or a PyTorch file of tensors.

    Args:
        network: what `build_restoration` made. For hf: models the file holds the library's names.
        path: the file. Weights of EDSR's authors fit; their `sub_mean` and `add_mean` are left out.

    Raises RunError, naming the file, for a file that is missing, damaged or of another network.
    """
    found = read_weights(path)
    while deeper := next((name for name in DEEPER if isinstance(found.get(name), Mapping)), None):
        found = found[deeper]
    held = {name: value for name, value in found.items() if name.split(".")[0] not in ("sub_mean", "add_mean")}
    target = network.model if isinstance(network, Reconstructed) else network
    try:
        target.load_state_dict(held)
    except (RuntimeError, AttributeError) as error:
        raise RunError(f"{path}: its weights do not fit the network: {' '.join(str(error).split())[:300]}") from error
