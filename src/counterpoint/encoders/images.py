"""Build image encoders by name: each maps a normalised picture to one vector, without a classifier's head.

    name               encoder
    mlp-s              layers of 128 and 64 units with batch normalisation, for pictures of a few pixels, 64 wide
    conv-s             three strided convolutions, 0.09 M parameters, 128 wide
    conv-group         conv-s with group normalisation, which uses no statistics of the batch
    conv-fine          three convolutions, of which one halves the picture, 0.06 M parameters, 64 wide, for small pictures
    conv-cells         four convolutions, of which two halve the picture, 0.08 M parameters, 64 wide, for its feature map
    convnet            three blocks of convolution and average pooling, 128-256-512 (from 64 pixels on a fourth, 64), flattened
    convnet-s          two such blocks, 32-64, 256 wide for pictures of 8 pixels
    unet, unet-s       the contracting path of a U-Net of six or three levels (encoders/unet.py)
    resnet-s           a ResNet for 32 to 64 pixels, 0.30 M parameters, 128 wide
    vit-s              timm's VisionTransformer, small: patches of 4 (8 from 64 pixels on), 4 blocks of width 128
    vit-xs             the same with patches of 2 (4 from 32 pixels on) and 4 blocks of width 48, for pictures of a few pixels
    tower-W-D-H        CLIP's tower of pictures, D blocks of width W with heads of H channels (encoders/towers.py)
    vit-conv           2 blocks of width 64 behind strided convolutions, which halve the picture 2 times (3 from 64 pixels on)
    resnet-cifar:A-B-C, nas-201:E-E-E-E-E-E   networks of two search spaces (encoders/spaces.py)
    timm:NAME          any timm model (timm:resnet18, timm:vit_tiny_patch16_224)
    torchvision:NAME   any torchvision classifier without its head
    hf:NAME            any vision model of transformers, by its name on the Hub or its folder; of SAM, its image encoder

An encoder is a module with `dim`, the width of its vectors. An encoder from a library holds the library's model as `model`,
with the library's names of submodules. The submodules of the convolutional ones and resnet-s are `stem`, `layer1`,
`layer2`, ..., as in torchvision's ResNet. Hooks may rely on these names.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders import towers
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.small_images import MLPS, ConvNet, ConvS, ResNetS
from counterpoint.encoders.unet import WIDTHS, UNetEncoder
from counterpoint.encoders.vision_transformers import VisionTokens, vit_s
from counterpoint.errors import CounterpointError, needs_extra, unknown

OWN = (
    "mlp-s",
    "conv-s",
    "conv-group",
    "conv-fine",
    "conv-cells",
    "convnet",
    "convnet-s",
    "unet",
    "unet-s",
    "resnet-s",
    "vit-s",
    "vit-xs",
    "vit-conv",
)
SPACES = ("resnet-cifar", "nas-201")
LIBRARIES = ("timm", "torchvision", "hf")


def build_image_encoder(name: str, size: int, channels: int = 3, pretrained: bool = False) -> ImageEncoder:
    """Build an encoder that maps normalised pictures [B, channels, size, size] to vectors [B, dim].

    Args:
        name: name from the module's table.
        size: height and width of the pictures in pixels.
        channels: number of channels; 3 (default) for RGB, other numbers if the encoder allows them.
        pretrained: load the library's published weights, downloaded on first use; False (default): random weights.

    Raises CounterpointError for an unknown name (with near matches) and for pictures the encoder cannot take. Raises it too
    for weights that cannot be downloaded and for a missing library.
    """
    if size < 1 or channels < 1:
        raise CounterpointError(f"an encoder needs pictures with pixels and channels, got size={size}, {channels=}")
    check_image_encoder(name)
    library, colon, model = name.partition(":")
    if not colon or library in SPACES:
        if pretrained:
            raise CounterpointError(f"there are no pretrained weights of {name}; name a timm: or torchvision: model")
        if size < 8:
            raise CounterpointError(f"{name} takes pictures of 8 pixels and more, got {size}")
        if colon:
            from counterpoint.encoders.spaces import build_member

            return build_member(name, channels)
        if name == "mlp-s":
            return MLPS(size, channels)
        if name.startswith("tower-"):
            shape, patch = towers.parse(name)
            return towers.ImageTower(shape, size, channels, patch)
        if name.startswith("unet"):
            return UNetEncoder(size, channels, WIDTHS[name])
        if name == "conv-s":
            return ConvS(channels)
        if name == "conv-group":
            return ConvS(channels, groups=8)
        if name == "conv-fine":
            return ConvS(channels, (32, 64, 64), (1, 2, 1))
        if name == "conv-cells":
            return ConvS(channels, (24, 48, 64, 64), (2, 1, 2, 1))
        if name == "vit-conv":
            return vit_s(size, channels, width=64, depth=2, stem=True)
        if name == "vit-xs":
            return vit_s(size, channels, patch=2 if size < 32 else 4, width=48)
        if name.startswith("convnet"):
            return ConvNet(size, channels, (32, 64) if name == "convnet-s" else None)
        return ResNetS(size, channels) if name == "resnet-s" else vit_s(size, channels)
    build = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}[library]
    return build(model, size, channels, pretrained)


def check_image_encoder(name: str) -> None:
    """Raise CounterpointError, with near matches, for a name that `build_image_encoder` does not know. Build nothing.

    Only `build_image_encoder` checks whether a model of transformers (`hf:NAME`) exists.
    """
    library, colon, model = name.partition(":")
    if name.startswith("tower-"):
        towers.parse(name)
    elif not colon:
        if name not in OWN:
            names = [*(f"{space}:MEMBER" for space in SPACES), *(f"{library}:NAME" for library in LIBRARIES)]
            raise unknown("image encoder", name, [*OWN, towers.FORM, *names])
    elif library in SPACES:
        from counterpoint.encoders.spaces import parsed

        parsed(name)
    elif library not in LIBRARIES:
        raise unknown("library of image encoders", library, LIBRARIES)
    elif library == "timm":
        import timm

        if not timm.is_model(model.partition(".")[0]) and not model.startswith(("hf-hub:", "local-dir:")):
            raise _near("timm", model, timm.list_models())
    elif library == "torchvision":
        import torchvision.models as tv

        known = tv.list_models(module=tv)
        if model not in known:
            raise _near("torchvision", model, known)


def need_size(encoder: ImageEncoder, name: str, size: int, channels: int = 3) -> None:
    """Raise CounterpointError if an encoder cannot take pictures of this size.

    Args:
        encoder: the encoder, possibly built for another size.
        name: its name, for the message.
        size: height and width in pixels.
        channels: number of channels, by default 3.
    """
    _width(encoder, _call, size, channels, name)


# --- libraries --------------------------------------------------------------------------------------------------------


class Wrapped(ImageEncoder):
    """A library's model (`model`) and the function that computes vectors with it."""

    def __init__(self, model: nn.Module, dim: int, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.dim, self._read = model, dim, read

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return self._read(self.model, images)


def _call(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _near(library: str, name: str, known: list[str]) -> CounterpointError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [other for other in known if other.startswith(name) and other not in near][: 3 - len(near)]
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"{library} lists its models with {library}'s list_models()"
    )
    return CounterpointError(f"{library} has no model '{name}'; {hint}")


def fetched(build: Callable[[], Any], what: str) -> Any:
    """Build a model whose weights or configuration may have to be downloaded."""
    try:
        return build()
    except CounterpointError:
        raise
    except Exception as error:  # the three libraries' and their HTTP clients' own kinds
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = (
            ". A model that is not on this machine is downloaded. If there is no network, name a folder with the model, or "
            "build it without published weights (--no-pretrained)"
            if isinstance(error, OSError)  # errors of the network included
            else ""
        )
        raise CounterpointError(f"{what} could not be built: {said[:300].rstrip('.')}{advice}") from error


def _width(model: nn.Module, read: Callable[[nn.Module, Tensor], Tensor], size: int, channels: int, what: str) -> int:
    """Measure the encoder's width on a black picture. Raises CounterpointError if it cannot take the picture."""
    training = model.training
    try:
        with torch.inference_mode():
            found = read(model.eval(), torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{what} cannot take pictures of {channels} x {size} x {size} ({said[:200]})"
        ) from error
    finally:
        model.train(training)
    if found.ndim != 2:
        raise CounterpointError(f"{what} must return one vector per picture, got {list(found.shape)}")
    return int(found.shape[1])


def _timm(name: str, size: int, channels: int, pretrained: bool) -> ImageEncoder:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": channels, "num_classes": 0}

    def build() -> nn.Module:
        # Transformers need the size. Some take other sizes by interpolating positions, and Swin by padding its windows.
        # Convolutional networks accept none of these arguments.
        other_sizes = ("dynamic_img_size", True), ("strict_img_size", False)
        sizes: list[dict[str, Any]] = [{"img_size": size, name: value} for name, value in other_sizes]
        sizes.append({"img_size": size})
        for more in sizes:
            with contextlib.suppress(TypeError):
                return timm.create_model(name, **options, **more)
        return timm.create_model(name, **options)

    model = fetched(build, f"timm:{name}")
    if isinstance(model, VisionTransformer):
        _width(model, _call, size, channels, f"timm:{name}")
        return VisionTokens(model)
    return Wrapped(model, _width(model, _call, size, channels, f"timm:{name}"), _call)


def _torchvision(name: str, size: int, channels: int, pretrained: bool) -> ImageEncoder:
    import torchvision.models as tv

    if channels != 3:
        raise CounterpointError(f"torchvision:{name} takes RGB pictures, not {channels} channels")
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "image_size" in inspect.signature(tv.get_model_builder(name)).parameters or name.startswith("vit_"):
        options["image_size"] = size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception warn of their initialisation
        model = fetched(lambda: tv.get_model(name, **options), f"torchvision:{name}")
    head = next((h for h in ("fc", "classifier", "heads", "head") if hasattr(model, h)), None)
    if head is None:
        raise CounterpointError(f"torchvision:{name} has no head to remove; name another model")
    old = getattr(model, head)
    if isinstance(old, nn.Sequential) and any(isinstance(m, (nn.Flatten, nn.LayerNorm)) for m in old):
        # ConvNeXt normalises and flattens in its head, so remove only the classifier.
        old[-1] = nn.Identity()
    else:
        setattr(model, head, nn.Flatten(1))

    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # the side classifiers of googlenet and inception
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    return Wrapped(model, _width(model, _call, size, 3, f"torchvision:{name}"), _call)


def _transformers(name: str, size: int, channels: int, pretrained: bool) -> ImageEncoder:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise needs_extra(f"hf:{name}", "language") from error
    if pretrained:
        model = fetched(lambda: AutoModel.from_pretrained(name), f"hf:{name}")
    else:
        model = fetched(lambda: AutoModel.from_config(AutoConfig.from_pretrained(name)), f"hf:{name}")
    if model.config.model_type == "sam":
        from counterpoint.encoders.sam import SamEncoder

        return SamEncoder(model.vision_encoder.float(), f"hf:{name}", size)
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0  # its pre-training hides patches at random, in evaluation mode as well
    # transformers 5 keeps the type of the file, transformers 4 converted to float32: widen half-precision files.
    model = getattr(model, "vision_model", model).float()  # of CLIP and similar models, the image encoder
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise CounterpointError(f"hf:{name} is no vision model; its input is not pixel_values")
    trained = getattr(model.config, "image_size", size)
    trained = trained[0] if isinstance(trained, (list, tuple)) else trained
    stretch = trained != size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if stretch else {}

    def read(model: nn.Module, images: Tensor) -> Tensor:
        out = model(pixel_values=images, **options)
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last = out.last_hidden_state
        return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)

    return Wrapped(model, _width(model, read, size, channels, f"hf:{name}"), read)
