"""Load published classifiers of pictures with their own last layer: timm:NAME, torchvision:NAME, hf:NAME.

`build_image_encoder` removes the last layer of a network. A teacher whose classifier a student uses keeps it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.images import Wrapped, fetched
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError, needs_extra, unknown
from counterpoint.views.images import MEAN, STD

LIBRARIES = ("timm", "torchvision", "hf")


class Published(NamedTuple):
    """A classifier in two parts, and the pictures that it was trained on."""

    encoder: ImageEncoder
    classifier: nn.Linear
    size: int  # pixels, height and width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]  # names; empty where the library has none


def published_classifier(name: str) -> Published:
    """Load a classifier with its published weights.

    Args:
        name: timm:NAME, torchvision:NAME or hf:NAME; the last also a folder.

    Raises CounterpointError for an unknown name, and for weights that cannot be loaded. Raises it too for a network whose last
    layer is not a linear map of one vector.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise unknown("published classifier", name, [f"{known}:NAME" for known in LIBRARIES])
    build = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}[library]
    return build(model, name)


def _parts(network: nn.Module, name: str, size: int, logits: Any) -> nn.Linear:
    """Replace the last linear layer by the identity and return it. The two parts must compute what the whole computed."""
    linear = [(place, module) for place, module in network.named_modules() if isinstance(module, nn.Linear)]
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    network.eval()
    with torch.inference_mode():
        whole = logits(network, pictures)
        place, head = linear[-1] if linear else ("", nn.Linear(1, 1))
        if place:
            parent, _, own = place.rpartition(".")
            setattr(network.get_submodule(parent), own, nn.Identity())
        vector = logits(network, pictures)
        fits = bool(place) and vector.shape[1:] == (head.in_features,)
        if not fits or not torch.allclose(head(vector), whole, rtol=1e-3, atol=1e-4):
            raise CounterpointError(f"{name} cannot teach: its last layer is not a linear map of one vector")
    return head


def _call(network: nn.Module, pictures: Tensor) -> Tensor:
    return network(pictures)


def _hf_logits(network: nn.Module, pictures: Tensor) -> Tensor:
    return network(pixel_values=pictures).logits.flatten(1)


def _timm(model: str, name: str) -> Published:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    network: Any = fetched(lambda: timm.create_model(model, pretrained=True), name)
    settings = network.pretrained_cfg
    size = int(settings["input_size"][1])
    head = _parts(network, name, size, _call)
    if isinstance(network, VisionTransformer):
        encoder: ImageEncoder = VisionTokens(network)
    else:
        encoder = Wrapped(network, head.in_features, _call)
    return Published(encoder, head, size, tuple(settings["mean"]), tuple(settings["std"]), ())


def _torchvision(model: str, name: str) -> Published:
    import torchvision.models as tv

    network = fetched(lambda: tv.get_model(model, weights="DEFAULT"), name)
    weights = tv.get_model_weights(model).DEFAULT
    seen = weights.transforms()
    size = int(seen.crop_size[0])
    head = _parts(network, name, size, _call)
    names = tuple(str(one) for one in weights.meta.get("categories", ()))
    return Published(Wrapped(network, head.in_features, _call), head, size, tuple(seen.mean), tuple(seen.std), names)


def _transformers(model: str, name: str) -> Published:
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise needs_extra(name, "language") from error
    # transformers 5 keeps the type of the file: widen half-precision files.
    network: Any = fetched(lambda: AutoModelForImageClassification.from_pretrained(model), name).float()
    try:
        seen: Any = AutoImageProcessor.from_pretrained(model)
        sides = getattr(seen, "crop_size", None) or getattr(seen, "size", None) or {}
        size = int(sides.get("height") or sides.get("shortest_edge") or 0)
        mean, std = tuple(seen.image_mean or MEAN), tuple(seen.image_std or STD)
    except (OSError, ValueError):  # a folder with the weights alone
        size, mean, std = 0, tuple(MEAN), tuple(STD)
    trained = getattr(network.config, "image_size", None)
    size = size or (trained if isinstance(trained, int) else 224)
    head = _parts(network, name, size, _hf_logits)
    names = tuple(str(network.config.id2label[n]) for n in range(head.out_features))
    return Published(Wrapped(network, head.in_features, _hf_logits), head, size, mean, std, names)
