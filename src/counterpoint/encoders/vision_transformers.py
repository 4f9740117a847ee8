"""Give access to the tokens of timm's vision transformers, and build small ones."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.encoders.channels_last import conv
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError


def set_drop_path(blocks: Any, most: float) -> None:
    """Skip blocks of a transformer of timm by chance in training, with a probability that rises from 0 to `most`."""
    from timm.layers import DropPath

    for n, block in enumerate(blocks):
        rate = most * n / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


class VisionTokens(ImageEncoder):
    """A timm VisionTransformer (`model`), with access to its tokens.

    Attributes:
        patch: side of a patch in pixels.
        grid: number of patches in a column and in a row.
        prefix: number of tokens before the patches' tokens (the class token, registers).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.dim = int(model.num_features)
        self.patch = int(model.patch_embed.patch_size[0])
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.prefix = int(model.num_prefix_tokens)

    def forward(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim"]:
        return self.model(images)

    def head(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Compute the vector of a picture from all of its `tokens`."""
        found: Tensor = self.model.forward_head(tokens)
        return found

    def tokens(
        self, images: Float[Tensor, "batch channels size size"], keep: Int[Tensor, "batch kept"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Compute the last block's normalised output: prefix tokens, then the patches row by row.

        Args:
            images: normalised pictures.
            keep: numbers of the patches that enter the blocks, in their order (MAE's encoder); None: all patches.
                Positions are added before the selection.

        Raises CounterpointError for `keep` with a model without learned positions or without a class token.
        """
        if keep is None:
            return self.model.forward_features(images)
        model = self.model
        if model.no_embed_class or getattr(model, "rope", None) is not None:
            raise CounterpointError(
                "only a vision transformer with learned positions and a class token can select patches; use vit-s"
            )
        x = model._pos_embed(model.patch_embed(images))
        patches = x[:, self.prefix :].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        x = model.norm_pre(torch.cat([x[:, : self.prefix], patches], dim=1))
        for block in model.blocks:
            x = block(x)
        return model.norm(x)


def vit_s(
    size: int,
    channels: int = 3,
    *,
    patch: int | None = None,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    stem: bool = False,
) -> VisionTokens:
    """Build a small VisionTransformer.

    Args:
        size: height and width of the pictures in pixels.
        channels: number of channels, by default 3.
        patch: side of a patch in pixels; None: 4 below 64 pixels, 8 below 160, else 16.
        width: width of a token, by default 128.
        depth: number of blocks, by default 4.
        heads: number of attention heads, by default 4.
        stem: strided 3 x 3 convolutions with batch normalisation instead of one linear map of a patch, which learn faster (Xiao
            et al. 2021, arXiv 2106.14881). By default off.

    Raises CounterpointError if `size` is not a multiple of the patch.
    """
    from timm.models.vision_transformer import VisionTransformer

    patch = patch or (4 if size < 64 else 8 if size < 160 else 16)
    if size % patch:
        raise CounterpointError(f"vit-s cuts pictures into patches of {patch} pixels; {size} is not a multiple of that")
    model = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        dynamic_img_size=True,
    )
    if stem:
        halvings = patch.bit_length() - 1
        widths = [channels, *(width >> (halvings - n) for n in range(1, halvings + 1))]
        layers = [conv(a, b, 2) for a, b in itertools.pairwise(widths)]
        model.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 1))
    return VisionTokens(model)
