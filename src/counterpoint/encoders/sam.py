"""The image encoder of SAM, by its name in transformers or its folder: `hf:facebook/sam-vit-base`.

Kirillov and others, "Segment Anything", arXiv 2304.02643.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError


class SamEncoder(ImageEncoder):
    """SAM's vision encoder (`model`). Its map is the image embedding that SAM's mask decoder takes.

    Args:
        model: transformers' SamVisionEncoder or SamVisionModel.
        name: its name, for messages.
        size: height and width of the pictures in pixels; the model takes one size alone.

    Raises CounterpointError for pictures of another size.
    """

    def __init__(self, model: Any, name: str, size: int) -> None:
        super().__init__()
        trained = int(model.config.image_size)
        if trained != size:
            raise CounterpointError(
                f"{name} takes pictures of {trained} pixels, not of {size}; read the data at that size (?size={trained})"
            )
        self.model, self.dim = model, int(model.config.output_channels)

    def features(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim h w"]:
        """Compute the image embedding."""
        found: Tensor = self.model(pixel_values=images).last_hidden_state
        return found

    def forward(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim"]:
        return self.features(images).mean((2, 3))
