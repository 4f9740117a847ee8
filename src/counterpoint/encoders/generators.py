"""Build networks that make pictures of captions, and the networks that judge them: small versions of two families.

    name       generator and critic
    galip-s    one stage: blocks whose features a noise and a sentence shift and scale, and a critic of frozen features of pictures
    attngan-s  two scales: the second attends to the words of the caption; each scale has a critic, with and without a condition

Both begin with a map of 4 x 4 cells and double it, so pictures have 8 pixels or more, a power of 2. Pictures are in -1..1.

    made = generator(noise, sentence, words, mask)          # Made: pictures of each scale, and the KL term of the condition
    logits = critic(pictures, features, sentence)            # galip-s
    logits, conditional = critics[scale](pictures, sentence)  # attngan-s

Sources: GALIP (Tao et al., arXiv 2301.12959) and DF-GAN (arXiv 2008.05865); AttnGAN (Xu et al., arXiv 1711.10485).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.errors import CounterpointError, unknown

BACKBONES = ("galip-s", "attngan-s")
CELLS = 4  # cells of a side of a generator's first map


class Made(NamedTuple):
    """Pictures of a generator, and the divergence of its condition from a normal distribution."""

    pictures: list[Float[Tensor, "n 3 height width"]]  # of each scale, the largest last
    divergence: Float[Tensor, ""]


def check_backbone(name: str) -> None:
    """Raise CounterpointError for an unknown name."""
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)


def build_generator(name: str, size: int, noise: int, condition: int, width: int) -> nn.Module:
    """Build a generator.

    Args:
        name: name from the module's table.
        size: height and width of its pictures in pixels, a power of 2 and at least 8.
        noise: numbers of the noise.
        condition: width of sentences and words.
        width: channels of its maps.

    Raises CounterpointError for an unknown name and a size that does not fit.
    """
    check_backbone(name)
    if size < 2 * CELLS or size & (size - 1):
        raise CounterpointError(
            f"{name} makes pictures of 8, 16, 32, ... pixels, the data have {size}; set ?size=16 or another power of 2"
        )
    kind = OneStage if name == "galip-s" else Attentional
    return kind(size, noise, condition, width)


def build_critics(name: str, channels: Sequence[int], condition: int, width: int, scales: int) -> nn.ModuleList:
    """Build the critics of a generator: one, or one for each scale.

    Args:
        name: name from the module's table.
        channels: of the frozen feature maps, the finest first (galip-s).
        condition: width of sentences.
        width: channels of their maps.
        scales: number of scales of the generator.
    """
    if name == "galip-s":
        return nn.ModuleList([FeatureCritic(channels, condition, width)])
    return nn.ModuleList(ScaleCritic(condition, width) for _ in range(scales))


def doubled(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    """Double height and width by repeating each cell."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# ------------------------------------------------------------------------------------------------- one stage (galip-s)


class Affine(nn.Module):
    """Scale and shift the channels of a map as a condition says. At the beginning it changes nothing."""

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Float[Tensor, "n c h w"], condition: Float[Tensor, "n d"]) -> Float[Tensor, "n c h w"]:
        scale, shift = self.layer(condition)[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class FusedBlock(nn.Module):
    """Double a map, then two convolutions, each after an affine change by the condition; with a residual."""

    def __init__(self, condition: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.changes = nn.ModuleList(Affine(condition, n) for n in (inputs, outputs))
        self.layers = nn.ModuleList(nn.Conv2d(n, outputs, 3, 1, 1) for n in (inputs, outputs))
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"], condition: Float[Tensor, "n d"]) -> Float[Tensor, "n k h2 w2"]:
        x = doubled(x)
        found = x
        for change, layer in zip(self.changes, self.layers, strict=True):
            found = layer(F.leaky_relu(change(found, condition), 0.2))
        return self.short(x) + found


class OneStage(nn.Module):
    """G of galip-s: a map of the noise, doubled by blocks that noise and sentence condition."""

    scales = 1

    def __init__(self, size: int, noise: int, condition: int, width: int) -> None:
        super().__init__()
        self.width, both = width, noise + condition
        self.first = nn.Linear(noise, 2 * width * CELLS**2)
        blocks = int(math.log2(size // CELLS))
        self.blocks = nn.ModuleList(FusedBlock(both, width if n else 2 * width, width) for n in range(blocks))
        self.last = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(
        self,
        noise: Float[Tensor, "n z"],
        sentence: Float[Tensor, "n d"],
        words: Float[Tensor, "n d t"] | None = None,
        mask: Bool[Tensor, "n t"] | None = None,
    ) -> Made:
        x = self.first(noise).view(len(noise), -1, CELLS, CELLS)
        both = torch.cat([noise, sentence], 1)
        for block in self.blocks:
            x = block(x, both)
        return Made([torch.tanh(self.last(F.leaky_relu(x, 0.2)))], noise.new_zeros(()))


class FeatureCritic(nn.Module):
    """D of galip-s: the frozen encoder's maps, joined at their last resolution, with the sentence at each cell.

    Args:
        channels: channels of the maps, the finest first.
        condition: width of a sentence.
        width: channels of its own maps.
    """

    def __init__(self, channels: Sequence[int], condition: int, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(n, width, 1) for n in channels)
        self.body = nn.Conv2d(width, width, 3, 1, 1)
        self.judge = nn.Sequential(nn.Conv2d(width + condition, width, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, CELLS))

    def forward(self, maps: Sequence[Float[Tensor, "n _ _ _"]], sentence: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        x = sum(F.adaptive_avg_pool2d(layer(one), CELLS) for layer, one in zip(self.project, maps, strict=True))
        x = F.leaky_relu(x + self.body(F.leaky_relu(x, 0.2)), 0.2)
        joined = torch.cat([x, sentence[:, :, None, None].expand(-1, -1, CELLS, CELLS)], 1)
        return self.judge(joined).flatten()


# ----------------------------------------------------------------------------------------------- two scales (attngan-s)


class Attentional(nn.Module):
    """G of attngan-s: a first scale of half the size from a drawn condition, a second one that attends to words.

    Conditioning augmentation draws the condition from a normal distribution whose mean and variance a layer computes of the
    sentence. Its divergence from the standard normal is a term of the loss.
    """

    scales = 2

    def __init__(self, size: int, noise: int, condition: int, width: int) -> None:
        super().__init__()
        self.augment = nn.Linear(condition, 2 * condition)
        self.first = nn.Sequential(nn.Linear(noise + condition, 2 * width * CELLS**2), nn.LeakyReLU(0.2))
        steps = int(math.log2(size // 2 // CELLS))
        self.body = nn.ModuleList(_conv(width if n else 2 * width, width) for n in range(max(1, steps)))
        self.steps = steps
        self.attend = nn.Linear(condition, width)
        self.refine = nn.Sequential(_conv(2 * width, 2 * width), _conv(2 * width, width))
        self.after = _conv(width, width)
        self.pictures = nn.ModuleList(nn.Conv2d(width, 3, 3, 1, 1) for _ in range(2))

    def forward(
        self,
        noise: Float[Tensor, "n z"],
        sentence: Float[Tensor, "n d"],
        words: Float[Tensor, "n d t"],
        mask: Bool[Tensor, "n t"],
    ) -> Made:
        mean, log_variance = self.augment(sentence).chunk(2, 1)
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
        x = self.first(torch.cat([noise, drawn], 1)).view(len(noise), -1, CELLS, CELLS)
        for layer in self.body:
            x = layer(doubled(x) if self.steps else x)
        keys = self.attend(words.transpose(1, 2))  # [n, t, width]
        scores = torch.einsum("nchw,ntc->nthw", x, keys)
        shares = scores.masked_fill(~mask[:, :, None, None], -math.inf).softmax(1)
        context = torch.einsum("nthw,ntc->nchw", shares, keys)
        refined = x + self.refine(torch.cat([x, context], 1))
        maps = x, self.after(doubled(refined))
        found = [torch.tanh(layer(one)) for layer, one in zip(self.pictures, maps, strict=True)]
        return Made(found, divergence)


class ScaleCritic(nn.Module):
    """D of one scale of attngan-s: a logit without and a logit with the sentence."""

    def __init__(self, condition: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.down = nn.Conv2d(width, width, 4, 2, 1)
        self.body = nn.Conv2d(width, width, 3, 1, 1)
        self.join = nn.Conv2d(width + condition, width, 3, 1, 1)
        self.judges = nn.ModuleList(nn.Conv2d(width, 1, CELLS) for _ in range(2))

    def features(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c 4 4"]:
        """Compute a map of 4 x 4 cells."""
        x = F.leaky_relu(self.down(F.leaky_relu(self.first(pictures), 0.2)), 0.2)
        x = F.adaptive_avg_pool2d(x, CELLS)
        return F.leaky_relu(x + self.body(x), 0.2)

    def judged(self, maps: Float[Tensor, "n c 4 4"], sentence: Float[Tensor, "n d"] | None = None) -> Float[Tensor, " n"]:
        """Compute the logits of maps, with a sentence or without."""
        if sentence is None:
            return self.judges[0](maps).flatten()
        joined = torch.cat([maps, sentence[:, :, None, None].expand(-1, -1, CELLS, CELLS)], 1)
        return self.judges[1](F.leaky_relu(self.join(joined), 0.2)).flatten()


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.LeakyReLU(0.2))


# ------------------------------------------------------------------------------------------------- sentences and words


class WordEncoder(nn.Module):
    """E_T: a bidirectional LSTM over word vectors; words are its states, the sentence its last states in both directions.

    Args:
        vocabulary: number of words.
        dim: width of words and sentence, even.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.lstm = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor, mask: Bool[Tensor, "n t"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d t"]]:
        """Return sentences and words. Each text needs a word."""
        lengths = mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=ids.shape[1])
        return last.transpose(0, 1).flatten(1), padded.transpose(1, 2)


class PictureEncoder(nn.Module):
    """E_I: projections of an encoder's vector and of its last map to a shared width.

    Args:
        encoder: an encoder of `build_image_encoder` with a feature map.
        channels: channels of its `feature_maps`, the finest first.
        dim: width of codes and regions.
    """

    def __init__(self, encoder: Any, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.code = nn.Linear(encoder.dim, dim)
        self.region = nn.Conv2d(channels[-1], dim, 1, bias=False)

    def forward(self, maps: Sequence[Tensor], vector: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d h w"]]:
        """Return codes and regions of the encoder's vector and maps."""
        return self.code(vector), self.region(maps[-1])
