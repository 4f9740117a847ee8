"""Inject a subject into the cross-attention of a diffusion model: Q-formers of both modalities, their fusion, and the processors.

    f              patch tokens of the reference: the encoder's maps of every resolution, pooled to one grid, as one row a cell
    V_cls, V       Visual-Qformer: learned queries attend to f
    T_cls, s_l     Textual-Qformer: queries with embeddings of layer l and timestep t attend to the placeholder's word and f
    fused_l        TV fusion: softmax([T_cls, s_l] W_q (V W_k)^T / sqrt(d)) V, the visual tokens that layer l attends to
    layer l        mask_l (TextAttention(h, caption with s_l) + VisualAttention(h, fused_l)), by a processor of diffusers
    mask_l         sigmoid of a small convolutional network of the subject word's attention map and the timestep

Source: CustomContrast (Chen et al., arXiv 2409.05606). Inner sizes and the form of the mask are choices, as the paper's were not
available.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.maps import feature_maps
from counterpoint.errors import CounterpointError

HEADS = 4
GRID = 4  # cells of a side of the patch tokens


def diffusers() -> Any:
    """Import the library diffusers. CounterpointError where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise CounterpointError(
            "this learner needs the library diffusers; install it: pip install 'counterpoint[generation]'"
        ) from error


class Subject(NamedTuple):
    """The codes of reference pictures."""

    visual: Float[Tensor, "n dim"]  # V_cls
    textual: Float[Tensor, "n dim"]  # T_cls, the mean over layers
    words: Float[Tensor, "layers n dim"]  # s_l, the pseudo-words
    fused: Float[Tensor, "layers n two dim"]  # visual tokens of each layer


class Injection(NamedTuple):
    """What the cross-attention of every layer receives."""

    texts: Float[Tensor, "layers n tokens dim"]  # the encoded caption with each layer's pseudo-word
    padding: Tensor  # bool [n, tokens], True where there is no word
    place: Tensor  # int [n], number of the subject's word in the caption
    time: Float[Tensor, "n dim"]  # embedding of the timestep
    fused: Tensor | None  # [layers, n, two, dim]; None: the caption alone


class Patches(nn.Module):
    """Compute patch tokens of pictures: maps of an image encoder, pooled to a grid, with positions.

    Args:
        name: an image encoder with a feature map (see `counterpoint.encoders.images`).
        size: height and width of pictures in pixels.
        dim: width of the tokens.
        pretrained: load published weights of the encoder.
    """

    def __init__(self, name: str, size: int, dim: int, pretrained: bool) -> None:
        super().__init__()
        self.encoder = build_image_encoder(name, size, pretrained=pretrained)
        with torch.no_grad():
            found = feature_maps(self.encoder.eval(), torch.zeros(1, 3, size, size))
        self.project = nn.Linear(sum(one.shape[1] for one in found), dim)
        self.place = nn.Parameter(0.02 * torch.randn(GRID * GRID, dim))

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n cells dim"]:
        """Compute the tokens of normalised pictures."""
        maps = [F.adaptive_avg_pool2d(one, GRID) for one in feature_maps(self.encoder, pictures)]
        tokens: Tensor = self.project(torch.cat(maps, 1).flatten(2).transpose(1, 2)) + self.place
        return tokens


class QFormer(nn.Module):
    """Let queries attend to each other and to tokens in transformer layers."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, HEADS, 2 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Float[Tensor, "n q dim"], tokens: Float[Tensor, "n t dim"]) -> Float[Tensor, "n q dim"]:
        for layer in self.layers:
            queries = layer(queries, tokens)
        found: Tensor = self.norm(queries)
        return found


class SubjectEncoder(nn.Module):
    """The multimodal feature injection (MFI) encoder.

    Args:
        layers: number of cross-attention layers, at least 1.
        dim: width of all tokens, a multiple of 4.
        depth: transformer layers of each Q-former.
        tokens: number of visual tokens beside V_cls.
    """

    def __init__(self, layers: int, dim: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.visual_queries = nn.Parameter(0.02 * torch.randn(1 + tokens, dim))
        self.textual_queries = nn.Parameter(0.02 * torch.randn(2, dim))
        self.layer = nn.Parameter(0.02 * torch.randn(layers, dim))
        self.time = nn.Linear(dim, dim)
        self.visual, self.textual = QFormer(dim, depth), QFormer(dim, depth)
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, patches: Float[Tensor, "n cells dim"], word: Float[Tensor, " dim"], time: Float[Tensor, "n dim"]
    ) -> Subject:
        """Compute a subject's codes.

        Args:
            patches: patch tokens of the reference.
            word: embedding of the placeholder, the textual input.
            time: embedding of the timestep.
        """
        n, many = len(patches), len(self.layer)
        visual = self.visual(self.visual_queries.expand(n, -1, -1), patches)
        asked = self.textual_queries + self.layer[:, None, None] + self.time(time)[None, :, None]
        seen = torch.cat([word.expand(n, 1, -1), patches], 1)
        textual = self.textual(asked.flatten(0, 1), seen.repeat(many, 1, 1)).unflatten(0, (many, n))
        values = visual[:, 1:]
        shares = (self.query(textual) @ self.key(values).transpose(1, 2) / math.sqrt(values.shape[2])).softmax(-1)
        return Subject(visual[:, 0], textual[:, :, 0].mean(0), textual[:, :, 1], shares @ values)


class Locator(nn.Module):
    """Compute mask_l of a layer from the subject word's attention map and the timestep; near 1 at the beginning."""

    def __init__(self, dim: int, channels: int = 8) -> None:
        super().__init__()
        self.first, self.time = nn.Conv2d(1, channels, 3, 1, 1), nn.Linear(dim, channels)
        self.last = nn.Conv2d(channels, 1, 3, 1, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(cast(Tensor, self.last.bias), 3.0)

    def forward(self, attention: Float[Tensor, "n cells"], time: Float[Tensor, "n dim"]) -> Float[Tensor, "n cells"]:
        side = math.isqrt(attention.shape[1])
        shown = (attention / attention.amax(1, keepdim=True).clamp(min=1e-6)).view(-1, 1, side, side)
        found: Tensor = self.last(F.silu(self.first(shown) + self.time(time)[:, :, None, None]))
        return found.flatten(1).sigmoid()


class InjectedAttention(nn.Module):
    """An attention processor of diffusers for cross-attention layer l: caption and subject, under the mask of the subject's place.

    It takes an `Injection` as `ip_hidden_states`, the name that diffusers hands through quietly.

    Args:
        number: l, from 0.
        channels: width of the layer.
        dim: width of the tokens.
        located: compute the mask; otherwise it is 1.
    """

    def __init__(self, number: int, channels: int, dim: int, located: bool) -> None:
        super().__init__()
        self.number = number
        self.key, self.value = (nn.Linear(dim, channels, bias=False) for _ in range(2))
        nn.init.zeros_(self.value.weight)  # at the beginning the subject changes nothing
        self.locate = Locator(dim) if located else None

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "n cells channels"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Injection | None = None,
    ) -> Float[Tensor, "n cells channels"]:
        assert ip_hidden_states is not None
        given, n = ip_hidden_states, len(hidden_states)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query, text = heads(attn.to_q(hidden_states)), given.texts[self.number]
        scores = query @ heads(attn.to_k(text)).transpose(2, 3) * attn.scale
        shares = scores.masked_fill(given.padding[:, None, None], -math.inf).softmax(-1)
        found = shares @ heads(attn.to_v(text))
        if given.fused is not None:
            fused = given.fused[self.number]
            found = found + F.scaled_dot_product_attention(query, heads(self.key(fused)), heads(self.value(fused)))
            if self.locate is not None:
                attention = shares.mean(1)[torch.arange(n), :, given.place]
                found = found * self.locate(attention, given.time)[:, None, :, None]
        out: Tensor = attn.to_out[0](found.transpose(1, 2).flatten(2))
        return out


def build_unet(size: int, width: int, dim: int, located: bool) -> tuple[Any, int]:
    """Build a small UNet2DConditionModel of diffusers with injected cross-attention; return it and the number of such layers.

    Args:
        size: height and width of pictures in pixels, a multiple of 2.
        width: channels of the first resolution, a multiple of 8; the second has twice as many, and the attention.
        dim: width of text and subject tokens.
        located: give each layer a mask of the subject's place.
    """
    unet = diffusers().UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=HEADS,
        cross_attention_dim=dim,
    )
    found, many = {}, 0
    for name, processor in unet.attn_processors.items():
        if ".attn2." in name:
            processor = InjectedAttention(many, 2 * width, dim, located)
            many += 1
        found[name] = processor
    unet.set_attn_processor(found)
    return unet, many


class CaptionEncoder(nn.Module):
    """Encode a caption whose placeholder may be replaced by a pseudo-word.

    Args:
        vocabulary: number of words.
        dim: width of words, a multiple of 4.
        context: maximum number of words.
        depth: transformer layers.
    """

    def __init__(self, vocabulary: int, dim: int, context: int, depth: int = 1) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(context, dim)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.place.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, HEADS, 2 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        ids: Int[Tensor, "n t"],
        padding: Tensor,
        place: Int[Tensor, " n"],
        words: Float[Tensor, "layers n dim"] | None,
    ) -> Float[Tensor, "layers n t dim"]:
        """Encode captions once for each layer's pseudo-word; once without pseudo-words."""
        rows = self.embed(ids)[None]
        if words is not None:
            at = F.one_hot(place, ids.shape[1]).bool()[None, :, :, None]
            rows = torch.where(at, words[:, :, None], rows)
        x = (rows + self.place.weight[: ids.shape[1]]).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding.repeat(len(rows), 1))
        found: Tensor = self.norm(x)
        return found.unflatten(0, (len(rows), len(ids)))


def time_embedding(steps: Int[Tensor, " n"], dim: int) -> Float[Tensor, "n dim"]:
    """Embed timesteps by cosines and sines of geometric frequencies, as diffusers does."""
    found: Tensor = diffusers().models.embeddings.get_timestep_embedding(
        steps, dim, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return found
