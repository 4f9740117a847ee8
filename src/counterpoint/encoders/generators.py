"""Build networks that make pictures of captions, and the networks that judge them: small versions of two families.

    name       generator and critic
    galip-s    one stage: blocks whose features a noise and a sentence shift and scale, and a critic of frozen features of pictures
    attngan-s  two scales: the second attends to the words of the caption; each scale has a critic, with and without a condition

Both begin with a map of 4 x 4 cells and double it. So pictures have 8 pixels or more, a power of 2, in -1..1.

    made = generator(noise, sentence, words, mask)          # Made: pictures of each scale, and the KL term of the condition
    maps = critic.maps(pictures, encoder)                   # of the frozen encoder (galip-s), or of the critic itself
    critic.loss(real, fake, sentence, wrong, kept)          # of maps, for the turn of the critic
    critic.generator_loss(fake, sentence)                   # for the turn of the generator

Sources: GALIP (Tao et al., arXiv 2301.12959) and DF-GAN (arXiv 2008.05865); AttnGAN (Xu et al., arXiv 1711.10485).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.adversarial import conditional_discriminator, gradient_penalty, hinge_discriminator
from counterpoint.core.distributed import global_mean
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.maps import feature_maps
from counterpoint.errors import CounterpointError, unknown
from counterpoint.views.images import normalise

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


def build_generator(name: str, size: int, noise: int, condition: int, width: int) -> OneStage | Attentional:
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
    """Repeat each cell of a map twice, down and across."""
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


Maps = list[Float[Tensor, "n _ _ _"]]


class FeatureCritic(nn.Module):
    """D of galip-s: the frozen encoder's maps, joined from the finest to the coarsest, with the sentence at each cell.

    Args:
        channels: channels of the maps, the finest first.
        condition: width of a sentence.
        width: channels of its own maps.
    """

    def __init__(self, channels: Sequence[int], condition: int, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(n, width, 1) for n in channels)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in channels)
        self.join = nn.Conv2d(width + condition, width, 3, 1, 1)
        self.judge = nn.Conv2d(width, 1, CELLS)

    def maps(self, pictures: Float[Tensor, "n 3 h w"], encoder: Callable[[Tensor], Maps]) -> Maps:
        """Compute the frozen encoder's maps of pictures."""
        return encoder(pictures)[: len(self.project)]

    def forward(self, maps: Maps, sentence: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Compute the logits of pictures' maps with sentences."""
        x: Any = 0.0
        for project, body, one in zip(self.project, self.body, maps, strict=True):
            if isinstance(x, Tensor):
                x = F.adaptive_avg_pool2d(x, (one.shape[2], one.shape[3]))
            x = project(one) + x
            x = x + body(F.leaky_relu(x, 0.2))
        return self.judge(F.leaky_relu(self.join(with_sentence(x, sentence)), 0.2)).flatten()

    def loss(
        self, real: Maps, fake: Maps, sentence: Tensor, wrong: Tensor, kept: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Compute the hinge of matched, generated and mismatched pairs, with the gradient penalty of matched ones.

        Args:
            real, fake: maps of real and generated pictures.
            sentence, wrong: their sentences, and those of other pairs.
            kept: the rows that have a wrong sentence.
        """
        inputs = [x.detach().requires_grad_() for x in (*real, sentence)]
        logits = self(inputs[:-1], inputs[-1])
        mismatched = self([one[kept] for one in real], wrong[kept])
        return hinge_discriminator(logits, self(fake, sentence), mismatched) + gradient_penalty(logits, inputs)

    def generator_loss(self, fake: Maps, sentence: Tensor) -> Float[Tensor, ""]:
        """Compute minus the mean logit of generated pairs."""
        return -global_mean(self(fake, sentence))


def with_sentence(maps: Float[Tensor, "n c h w"], sentence: Float[Tensor, "n d"]) -> Float[Tensor, "n e 4 4"]:
    """Pool maps to 4 x 4 cells, and put the sentence beside the features of each cell."""
    pooled = F.leaky_relu(F.adaptive_avg_pool2d(maps, CELLS), 0.2)
    return torch.cat([pooled, sentence[:, :, None, None].expand(-1, -1, CELLS, CELLS)], 1)


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
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, width, 4, 2, 1), nn.Conv2d(width, width, 3, 1, 1)]
        )
        self.alone = nn.Conv2d(width, 1, CELLS)
        self.join = nn.Conv2d(width + condition, width, 3, 1, 1)
        self.judge = nn.Conv2d(width, 1, CELLS)

    def maps(self, pictures: Float[Tensor, "n 3 h w"], encoder: Callable[[Tensor], Maps] | None = None) -> Maps:
        """Compute its own map of half the size."""
        x = pictures
        for number, layer in enumerate(self.layers):
            x = layer(F.leaky_relu(x, 0.2) if number else x)
        return [x]

    def plain(self, maps: Maps) -> Float[Tensor, " n"]:
        """Compute the logits of maps without a condition."""
        return self.alone(F.leaky_relu(F.adaptive_avg_pool2d(maps[0], CELLS), 0.2)).flatten()

    def forward(self, maps: Maps, sentence: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Compute the logits of maps with sentences."""
        return self.judge(F.leaky_relu(self.join(with_sentence(maps[0], sentence)), 0.2)).flatten()

    def loss(
        self, real: Maps, fake: Maps, sentence: Tensor, wrong: Tensor, kept: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Compute the cross-entropies of both logits; arguments are those of `FeatureCritic.loss`."""
        given = self(real, sentence), self(fake, sentence), self([real[0][kept]], wrong[kept])
        return conditional_discriminator(self.plain(real), given[0], self.plain(fake), *given[1:])

    def generator_loss(self, fake: Maps, sentence: Tensor) -> Float[Tensor, ""]:
        """Compute the cross-entropies of both logits of generated pictures with the answer real."""
        return global_mean(F.softplus(-self.plain(fake))) + global_mean(F.softplus(-self(fake, sentence)))


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
    """E_I: an image encoder whose last maps are projected to codes and regions.

    The code is the mean of the last map. Regions are the cells of the last map with 4 cells a side or more.

    Args:
        name: name of an image encoder with a feature map (see `counterpoint.encoders.images`).
        size: height and width of pictures in pixels.
        dim: width of codes and regions.
        pretrained: load published weights of the encoder.
    """

    def __init__(self, name: str, size: int, dim: int, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder = build_image_encoder(name, size, pretrained=pretrained)
        with torch.no_grad():
            found = feature_maps(self.encoder.eval(), torch.zeros(1, 3, size, size))
        self.encoder.train()
        self.fine = max(1, sum(one.shape[2] >= CELLS for one in found))
        self.channels = [one.shape[1] for one in found[: self.fine]]
        self.code = nn.Linear(found[-1].shape[1], dim)
        self.region = nn.Conv2d(self.channels[-1], dim, 1, bias=False)

    def maps(self, pictures: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Compute the encoder's maps of pictures in -1..1, the finest first."""
        return feature_maps(self.encoder, normalised(pictures))

    def codes(self, maps: Sequence[Tensor]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d h w"]]:
        """Compute codes and regions of maps."""
        return self.code(maps[-1].mean((2, 3))), self.region(maps[self.fine - 1])

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d h w"]]:
        """Compute codes and regions of pictures in -1..1."""
        return self.codes(self.maps(pictures))


def normalised(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Convert pictures in -1..1 to the values that image encoders take."""
    return normalise((pictures + 1) / 2)
