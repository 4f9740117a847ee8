"""MAE: reconstruct the pixels of hidden patches, three quarters of an image.

He, Chen, Xie, Li, Dollar, Girshick: "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

Patches, random masking and the loss are those of Sec. 3. Inside a patch the values are in the order of the authors' code: row,
column, channel. The encoder sees only the visible patches. Its positions, and the decoder's, are fixed sines and cosines. The
evaluation uses the mean of the whole image's patch tokens. The authors' code offers this mean and the class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImagesConfig
from counterpoint.tasks.views import ViewsLearner


def patchify(images: Float[Tensor, "n channels height width"], patch: int) -> Float[Tensor, "n patches values"]:
    """Cut images into patch x patch squares, row by row; values = patch^2 * channels, in the order row, column, channel.

    Raises ValueError for sides that are not multiples of `patch`.

    >>> patchify(torch.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 1]
    tensor([2., 3., 6., 7.])
    """
    need_positive(patch=patch)
    if images.ndim != 4 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"images must be [n, channels, height, width] with sides in {patch}s, got {list(images.shape)}"
        )
    squares = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # n, channels, down, row, across, column
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Float[Tensor, "n patches values"], patch: int, grid: tuple[int, int] | None = None
) -> Float[Tensor, "n channels height width"]:
    """Join the patches of images that `patchify` cut.

    Args:
        patches: values of the patches, row by row.
        patch: side of a patch in pixels.
        grid: number of patches down and across; None: as many down as across.

    Raises ValueError if patches do not fit the grid, or if patch^2 does not divide the number of values.

    >>> images = torch.rand(2, 3, 8, 4)
    >>> torch.equal(unpatchify(patchify(images, 2), 2, (4, 2)), images)
    True
    """
    need_positive(patch=patch)
    if patches.ndim != 3 or patches.shape[2] % patch**2:
        raise ValueError(f"patches must be [n, patches, {patch}^2 * channels], got {list(patches.shape)}")
    side = round(patches.shape[1] ** 0.5)
    grid = (side, side) if grid is None else grid
    if grid[0] * grid[1] != patches.shape[1]:
        raise ValueError(
            f"{patches.shape[1]} patches do not form a grid of {grid[0]} x {grid[1]}; set `grid` to (down, across)"
        )
    squares = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # n, down, across, row, column, channels
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Masking(NamedTuple):
    """The tokens to keep."""

    keep: Int[Tensor, "n kept"]  # positions of the kept tokens, in the order of their noise
    mask: Float[Tensor, "n tokens"]  # 1 where a token is removed
    ids_restore: Int[Tensor, "n tokens"]  # position of each token in the list of kept, then removed tokens


def masking(noise: Float[Tensor, "n tokens"], mask_ratio: float) -> Masking:
    """Keep the int(tokens * (1 - mask_ratio)) tokens of the lowest noise; see `random_masking`."""
    kept = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1, stable=True)
    mask = noise.new_ones(noise.shape).scatter_(1, order[:, :kept], 0.0)
    return Masking(order[:, :kept], mask, order.argsort(dim=1))


class Masked(NamedTuple):
    """The kept tokens and their positions."""

    visible: Float[Tensor, "n kept dim"]
    mask: Float[Tensor, "n tokens"]  # 1 where a token was removed
    ids_restore: Int[Tensor, "n tokens"]  # position of each token in the list of kept, then removed tokens


def random_masking(
    tokens: Float[Tensor, "n tokens dim"], noise: Float[Tensor, "n tokens"], mask_ratio: float = 0.75
) -> Masked:
    """Keep the int(tokens * (1 - mask_ratio)) tokens of the lowest noise, in the order of their noise (Sec. 3, "Masking").

    Args:
        tokens: the tokens of n images.
        noise: one random number per token, for instance from torch.rand.
        mask_ratio: share of the tokens to remove, at least 0 and below 1; by default 0.75.

    With equal noise, the earlier token is kept. Raises ValueError for shapes that do not fit or a ratio out of range.

    >>> random_masking(torch.eye(4)[None], torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 0.5).mask
    tensor([[1., 0., 1., 0.]])
    """
    if tokens.ndim != 3 or noise.shape != tokens.shape[:2]:
        raise ValueError(
            f"tokens must be [n, tokens, dim] and noise [n, tokens], got {shapes(tokens=tokens, noise=noise)}"
        )
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in 0..1, 1 not included, got {mask_ratio}")
    if holds(noise.isnan().any()):
        raise ValueError("noise holds NaN, which cannot be sorted")
    keep, mask, ids_restore = masking(noise, mask_ratio)
    return Masked(tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2])), mask, ids_restore)


class MAEOutput(NamedTuple):
    loss: Float[Tensor, ""]
    mask: Float[Tensor, "n tokens"]
    ids_restore: Int[Tensor, "n tokens"]
    visible: Float[Tensor, "n kept dim"]


@over_group
@full_precision(keep=("mask",))
def reconstruction(
    images: Float[Tensor, "n channels height width"],
    prediction: Float[Tensor, "n tokens values"],
    mask: Float[Tensor, "n tokens"],
    patch: int = 16,
    norm_pix: bool | int = True,
) -> Float[Tensor, ""]:
    """Compute the mean over the removed patches of the mean squared error of their pixels (Sec. 3, "Reconstruction target").

    Args:
        images: the images to reconstruct; no gradient.
        prediction: pixels of every patch, in the order of `patchify`.
        mask: 1 where a patch was removed, the same number in every image.
        patch: side of a patch in pixels, by default 16.
        norm_pix: standardise each patch's target by its mean and unbiased variance (+ 1e-6); by default True.

    Raises ValueError for shapes that do not fit, a mask that removes nothing, and norm_pix with patches of one value.

    >>> reconstruction(torch.ones(1, 1, 2, 2), torch.zeros(1, 4, 1), torch.ones(1, 4), patch=1, norm_pix=False)
    tensor(1.)
    """
    target = wide(patchify(images.detach(), patch))
    need_alike("n patches values", prediction=prediction, target=target)
    if mask.shape != target.shape[:2]:
        raise ValueError(f"mask must be [n, patches], got {shapes(mask=mask, prediction=prediction)}")
    removed = mask.sum(1)
    if holds((removed <= 0).any()):
        raise ValueError("mask removes no patch of some image: there is nothing to reconstruct; raise mask_ratio")
    if norm_pix:
        if target.shape[2] < 2:
            raise ValueError(
                "norm_pix needs patches of at least two values, because one value has no variance; set norm_pix=False"
            )
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (wide(prediction) - target).square().mean(-1)
    return global_mean((error * mask).sum(1) / removed)


@over_group
@full_precision(keep=("tokens", "noise"))
def mae(
    images: Float[Tensor, "n channels height width"],
    tokens: Float[Tensor, "n tokens dim"],
    noise: Float[Tensor, "n tokens"],
    prediction: Float[Tensor, "n tokens values"],
    patch: int = 16,
    norm_pix: bool | int = True,
    mask_ratio: float = 0.75,
) -> MAEOutput:
    """Mask the tokens by the noise, and score a prediction of all patches on the removed ones.

    A training step calls `random_masking` before its decoder and `reconstruction` after it. They describe the arguments.

    >>> images = torch.arange(64.0).reshape(1, 1, 8, 8)
    >>> out = mae(images, torch.eye(4)[None], torch.rand(1, 4), patchify(images, 4), patch=4, norm_pix=False)
    >>> out.loss, out.visible.shape
    (tensor(0.), torch.Size([1, 1, 4]))
    """
    need_rows(images=images)
    masked = random_masking(tokens, noise, mask_ratio)
    loss = reconstruction(images, prediction, masked.mask, patch, norm_pix)
    return MAEOutput(loss, masked.mask, masked.ids_restore, masked.visible)


@dataclass
class MAEConfig(ImagesConfig):
    """Settings of MAE. Defaults are the paper's for ViT-L/16 on ImageNet (Sec. 4 and Appendix A.1)."""

    epochs: int = 800
    batch_size: int = 4096
    encoder: str = "timm:vit_large_patch16_224"
    """The network to train and keep, a vision transformer: vit-s, timm:vit_..."""
    recipe: str = "mae"
    optimizer: str = "adamw"
    lr: float = 1.5e-4
    weight_decay: float = 0.05
    beta2: float | None = 0.95
    warmup_epochs: int = 40
    mask_ratio: float = 0.75
    """Share of the patches to hide, above 0 and below 1."""
    norm_pix: bool = True
    """Standardise each patch's target by its mean and variance."""
    decoder_width: int = 512
    """Width of the decoder, a multiple of 4 and of decoder_heads."""
    decoder_depth: int = 8
    """Number of transformer blocks of the decoder, at least 1."""
    decoder_heads: int = 16
    """Number of attention heads of the decoder, at least 1."""

    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "decoder_width", "decoder_depth", "decoder_heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise CounterpointError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise CounterpointError(
                f"decoder_width must be a multiple of 4 and of decoder_heads ({self.decoder_heads}), got "
                f"{self.decoder_width}"
            )


def positions(dim: int, grid: tuple[int, int], prefix: int) -> Float[Tensor, "1 tokens dim"]:
    """Compute fixed sines and cosines of each patch's row and column; zeros for the `prefix` tokens before them."""
    from timm.layers import build_sincos2d_pos_embed

    return torch.cat([torch.zeros(prefix, dim), build_sincos2d_pos_embed(list(grid), dim)])[None]


class Decoder(nn.Module):
    """A decoder from the encoded visible patches to the pixels of all: blocks with a mask token in every hidden place."""

    positions: Tensor

    def __init__(self, config: MAEConfig, encoder: VisionTokens) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        width, self.prefix = config.decoder_width, encoder.prefix
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_buffer("positions", positions(width, encoder.grid, encoder.prefix))
        blocks = (Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.predict = nn.Linear(width, encoder.patch**2 * 3)

    def forward(
        self, tokens: Float[Tensor, "n visible dim"], ids_restore: Int[Tensor, "n tokens"]
    ) -> Float[Tensor, "n tokens values"]:
        x = self.embed(tokens)
        before, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = self.mask_token.expand(len(x), ids_restore.shape[1] - visible.shape[1], -1)
        places = ids_restore[..., None].expand(-1, -1, x.shape[2])
        patches = torch.cat([visible, hidden], dim=1).gather(1, places)
        x = self.blocks(torch.cat([before, patches], dim=1) + self.positions)
        return self.predict(x[:, self.prefix :])


class MAE(ViewsLearner):
    """A learner that encodes the visible patches and reconstructs the others."""

    crops = 1
    compares = False
    encoder: VisionTokens

    def build_projector(self, dim: int) -> Decoder:
        encoder: Any = self.encoder
        if not isinstance(encoder, VisionTokens):
            raise CounterpointError(
                f"MAE hides patches, so its encoder must be a vision transformer (vit-s, timm:vit_...), got "
                f"{self.config.encoder}"
            )
        patches = encoder.grid[0] * encoder.grid[1]
        if not 0 < int(patches * (1 - self.config.mask_ratio)) < patches:
            raise CounterpointError(
                f"mask_ratio {self.config.mask_ratio} leaves all or none of an image's {patches} patches; change mask_ratio"
            )
        if not self.config.pretrained:
            place = encoder.model.pos_embed.requires_grad_(False)
            place.copy_(positions(dim, encoder.grid, encoder.prefix))
        return Decoder(self.config, encoder)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        total, mine = self.share(len(batch["image"]))
        down, across = self.encoder.grid
        noise = torch.rand(total, down * across, generator=generator)[mine]
        return batch | {"noise": noise.to(batch["image"].device)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (images,) = batch["views"]
        keep, mask, ids_restore = masking(batch["noise"], self.config.mask_ratio)
        prediction = self.projector(self.encoder.tokens(images, keep), ids_restore)
        return {"loss": reconstruction(images, prediction, mask, self.encoder.patch, self.config.norm_pix)}

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        return self.encoder.tokens(images)[:, self.encoder.prefix :].mean(1)


SYSTEM = System(
    slug="mae",
    task="views",
    config=MAEConfig,
    learner=MAE,
    data="cifar10",
    recipe={
        "epochs": 14,
        "batch_size": 256,
        "encoder": "vit-s",
        "lr": 1e-3,
        "warmup_epochs": 2,
        "evaluate_every": 7,
        "decoder_width": 96,
        "decoder_depth": 2,
        "decoder_heads": 3,
    },
)
