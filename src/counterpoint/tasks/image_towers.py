"""Take the picture half of a network of pictures and texts, as a student that stays frozen.

Its sources are those of a teacher (see counterpoint.tasks.class_teachers) but files: run:RUN, fit:SLUG?data=SOURCE, hf:NAME,
open_clip:MODEL/WEIGHTS. A run keeps the settings of a run's half, and so it can be loaded when that run is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.dual import DualEncoder, build_dual_encoder
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.images import build_image_encoder
from counterpoint.errors import CounterpointError
from counterpoint.tasks.class_teachers import AlignedDual, open_network

TEXT_PARTS = (
    "text_model",
    "text_projection",
    "transformer",
    "token_embedding",
    "positional_embedding",
    "ln_final",
    "text",
)


class _RunHalf(DualEncoder):
    """The encoder and the head of a run of the task `aligned`, with random weights."""

    def __init__(self, encoder: str, dim: int, size: int) -> None:
        super().__init__(dim, 1.0, size)
        self.encoder = build_image_encoder(encoder, size)
        self.head = nn.Linear(self.encoder.dim, dim, bias=False)

    def image_rows(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    @property
    def tower(self) -> nn.Module:
        return self.encoder


class ImageTower(ImageEncoder):
    """The picture half of a network of pictures and texts (`network`), with its projection into their space.

    Args:
        facts: what `tower_facts` returned.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        if "name" in facts:
            self.network: DualEncoder = picture_half(build_dual_encoder(str(facts["name"])))
        else:
            self.network = _RunHalf(facts["encoder"], facts["dim"], facts["size"])
        self.dim = self.network.dim

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of normalised pictures of any size. They are not normalised."""
        return self.network.images(images)

    def take(self, network: DualEncoder, name: str) -> None:
        """Take the weights of a run's network. Raises CounterpointError for a run whose projection is not linear."""
        if not isinstance(self.network, _RunHalf) or not isinstance(network, AlignedDual):
            return
        learner = network.learner
        try:
            self.network.encoder.load_state_dict(learner.encoders[network.image].state_dict())
            self.network.head.load_state_dict(learner.heads[network.image].state_dict())
        except RuntimeError as error:
            raise CounterpointError(
                f"--student {name}: the run has no linear projection of its pictures; name a run of clip or siglip"
            ) from error


def tower_facts(name: str) -> dict[str, Any]:
    """Return what `ImageTower` needs to build the picture half of a network, fit for JSON.

    Args:
        name: run:RUN, fit:SLUG?data=SOURCE, hf:NAME or open_clip:MODEL/WEIGHTS.

    Raises CounterpointError for a run without pictures and texts.
    """
    if name.partition(":")[0] in ("hf", "open_clip"):
        return {"name": name}
    network: Any = open_network(name)
    return {"encoder": network.learner.config.image_encoder, "dim": network.dim, "size": network.size}


def text_tower(network: DualEncoder) -> nn.Module:
    """Return the text encoder of a network, whose blocks take prompts."""
    if isinstance(network, AlignedDual):
        return network.learner.encoders[network.text]
    model: Any = network.model
    found = (getattr(model, name, None) for name in ("text_model", "text", "transformer"))
    return next(part for part in found if isinstance(part, nn.Module))


def picture_half(network: DualEncoder) -> DualEncoder:
    """Return a copy of a library's network without its texts."""
    model: Any = network.model
    kept = {name: getattr(model, name) for name in TEXT_PARTS if getattr(model, name, None) is not None}
    for name in kept:
        setattr(model, name, None)
    try:
        return copy.deepcopy(network)
    finally:
        for name, part in kept.items():
            setattr(model, name, part)
