"""Read tokens, queries, keys and values inside vision transformers: our own, timm's and those of transformers.

Attention in fused kernels gives no queries, keys and values. So they are recorded behind the linear layers that make them
(`taps.recorded`): `attn.qkv` of timm, `q_proj`, `k_proj` and `v_proj` (or `query`, `key`, `value`) of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.encoders.images import Wrapped
from counterpoint.encoders.taps import recorded
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))  # names in transformers 5 and 4


class QKV(NamedTuple):
    """Queries, keys and values of a layer's heads."""

    query: Float[Tensor, "n heads tokens width"]
    key: Float[Tensor, "n heads tokens width"]
    value: Float[Tensor, "n heads tokens width"]


class Inside(NamedTuple):
    """What a transformer computes for a batch."""

    tokens: Float[Tensor, "n tokens dim"]  # the last output: prefix tokens, then the surviving patches
    layers: dict[int, QKV]  # of the layers asked for
    alive: Int[Tensor, "n alive"] | None  # numbers of the patches that survived; None: all, in order
    alive_at: dict[int, Int[Tensor, "n alive"] | None]  # the same inside each layer asked for


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    """Return (name, module, names of its projections) of every attention in a transformer, in order."""
    found: list[tuple[str, nn.Module, tuple[str, ...]]] = []
    for name, module in model.named_modules():
        for projections in (("qkv",), *PROJECTIONS):
            parts = [getattr(module, each, None) for each in projections]
            if all(
                isinstance(getattr(part, "base_layer", part), nn.Linear) for part in parts
            ):  # with adapters or without
                found.append((name, module, projections))
    return found


class TokenNetwork(nn.Module):
    """A vision transformer with access to its tokens and to the queries, keys and values of its layers.

    Args:
        encoder: vit-s, vit-xs, a VisionTransformer of timm, or a vision transformer of transformers, as
            `build_image_encoder` builds them.
        name: name of the encoder, for messages.
        size: height and width of the pictures, in pixels.

    Attributes:
        depth: number of layers.
        heads: number of heads of a layer; `width` is the width of all of them together.
        dim: width of the last tokens.
        grid: number of patches down and across.
        prefix: number of tokens before the patches; `classes` is whether the first of them is a class token.

    Raises CounterpointError for a network that is no plain vision transformer, and for one with rotary positions.
    """

    def __init__(self, encoder: nn.Module, name: str, size: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.name = name
        self.size, self._options = size, {}
        self._found = _attentions(encoder)
        plain = isinstance(encoder, VisionTokens) or (isinstance(encoder, Wrapped) and hasattr(encoder.model, "config"))
        if not plain or not self._found:
            raise CounterpointError(
                f"{name} is no plain vision transformer with queries, keys and values in every layer; use vit-s, vit-xs, "
                "timm:vit_..., or a ViT, ViT-MAE, DINO, DINOv2, DeiT, CLIP or SigLIP of transformers"
            )
        if any("rope" in type(module).__name__.lower() for module in encoder.modules()):
            raise CounterpointError(
                f"{name} has rotary positions, which act between its queries and keys; name a transformer with learned positions"
            )
        attention: Any = self._found[0][1]
        self.depth = len(self._found)
        self.heads = int(getattr(attention, "num_heads", 0) or attention.num_attention_heads)
        first: Any = getattr(attention, self._found[0][2][0])
        self.width = int(first.out_features) // (3 if self._found[0][2] == ("qkv",) else 1)
        if isinstance(encoder, VisionTokens):
            self.patch, self.prefix = encoder.patch, encoder.prefix
            self.classes = bool(encoder.model.has_class_token)
        else:
            config = cast(Any, encoder.model).config
            self.patch = int(config.patch_size[0] if isinstance(config.patch_size, list | tuple) else config.patch_size)
            trained = getattr(config, "image_size", size)
            trained = trained[0] if isinstance(trained, list | tuple) else trained
            self._options = {"interpolate_pos_encoding": True} if trained != size else {}
        self.grid = (size // self.patch, size // self.patch)
        training = encoder.training
        encoder.eval()
        with torch.no_grad():
            tokens = self(torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)).tokens
        encoder.train(training)
        self.dim = int(tokens.shape[2])
        if not isinstance(encoder, VisionTokens):
            self.prefix = tokens.shape[1] - self.grid[0] * self.grid[1]
            self.classes = self.prefix > 0
        if self.prefix < 0 or tokens.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise CounterpointError(
                f"{name} gives {tokens.shape[1]} tokens for {self.grid[0]} x {self.grid[1]} patches; name a transformer whose "
                "last layer has a token for each patch"
            )

    def forward(self, images: Float[Tensor, "n 3 size size"], layers: Sequence[int] = ()) -> Inside:
        """Compute the last tokens, and queries, keys and values of these layers (0 is the first)."""
        with recorded(self.encoder, self._names(layers)) as seen:
            tokens = self._tokens(images)
        return Inside(tokens, self._read(seen, layers), None, dict.fromkeys(layers))

    def dropping(
        self,
        images: Float[Tensor, "n 3 size size"],
        choose: dict[int, Callable[[Tensor], Tensor]],
        layers: Sequence[int] = (),
    ) -> Inside:
        """Compute the same, and drop tokens before some layers. Dropped tokens never return.

        Args:
            images: normalised pictures.
            choose: for a layer, a function from its input tokens [n, tokens, dim] to the positions [n, kept] of those to
                keep, prefix tokens included and first.
            layers: numbers of the layers whose queries, keys and values are needed.

        Raises CounterpointError for a transformer of transformers, whose blocks cannot be run one by one.
        """
        if not isinstance(self.encoder, VisionTokens):
            raise CounterpointError("only vit-s, vit-xs and timm:vit_... can drop tokens between their layers")
        model = self.encoder.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        alive: Tensor | None = None
        alive_at: dict[int, Tensor | None] = {}
        with recorded(self.encoder, self._names(layers)) as seen:
            for number, block in enumerate(model.blocks):
                if number in choose:
                    kept = choose[number](x)
                    x = gathered(x, kept)
                    patches = kept[:, self.prefix :] - self.prefix
                    alive = patches if alive is None else alive.gather(1, patches)
                alive_at |= {number: alive} if number in layers else {}
                x = block(x)
        return Inside(model.norm(x), self._read(seen, layers), alive, alive_at)

    def numbered(self, setting: str, given: Sequence[int]) -> list[int]:
        """Return the numbers of layers, sorted; negative ones count from the end.

        Raises CounterpointError, which names the setting, for a layer that the network lacks, and for one that is named twice.
        """
        found = [n + self.depth if n < 0 else n for n in given]
        if any(not 0 <= n < self.depth for n in found) or len(set(found)) < len(found):
            raise CounterpointError(
                f"{setting} must name layers 0 to {self.depth - 1} of {self.name}, each once, got {list(given)}"
            )
        return sorted(found)

    def places(
        self, tokens: Float[Tensor, "n tokens _"], alive: Int[Tensor, "n alive"] | None, prefixed: bool
    ) -> Int[Tensor, "n places"]:
        """Return the positions of patches among tokens, after that of the class token where `prefixed`.

        Args:
            tokens: all tokens of this network, or those that it kept.
            alive: numbers of the patches; None: all patches that `tokens` holds.
            prefixed: whether the class token comes first.
        """
        if alive is None:
            alive = torch.arange(tokens.shape[1] - self.prefix, device=tokens.device).expand(len(tokens), -1)
        patches = alive + self.prefix
        return torch.cat([patches.new_zeros(len(patches), 1), patches], dim=1) if prefixed else patches

    def regrouped(self, qkv: QKV, alive: Int[Tensor, "n alive"] | None, prefixed: bool, heads: int) -> list[Tensor]:
        """Select tokens of q, k and v, and split their joined heads into another number of heads.

        Args:
            qkv: queries, keys and values of a layer.
            alive, prefixed: the tokens, see `places`.
            heads: number of heads, which divides their joined width.
        """
        joined = [x.transpose(1, 2).flatten(2) for x in qkv]
        places = self.places(joined[0], alive, prefixed)
        return [gathered(x, places).unflatten(2, (heads, -1)).transpose(1, 2) for x in joined]

    def layer_at(self, layer: int, depth: int) -> int:
        """Return the layer at the share of this network's depth that `layer` has in a network of `depth` layers."""
        return min(self.depth - 1, (2 * layer * self.depth + depth) // (2 * depth))

    def _tokens(self, images: Tensor) -> Tensor:
        if isinstance(self.encoder, VisionTokens):
            return self.encoder.tokens(images)
        model = self.encoder.model
        more: dict[str, Any] = dict(self._options)
        if (
            model.config.model_type == "vit_mae"
        ):  # its patches are shuffled by this noise; a rising one leaves the order
            count = self.grid[0] * self.grid[1]
            more["noise"] = torch.arange(count, device=images.device, dtype=torch.float32).expand(len(images), count)
        found: Tensor = model(pixel_values=images, **more).last_hidden_state
        return found

    def _names(self, layers: Sequence[int]) -> list[str]:
        return [f"{name}.{each}" for n in layers for name, _, each_of in [self._found[n]] for each in each_of]

    def _read(self, seen: dict[str, Tensor], layers: Sequence[int]) -> dict[int, QKV]:
        found = {}
        for n in layers:
            name, attention, projections = self._found[n]
            if projections == ("qkv",):
                parts = seen[f"{name}.qkv"].unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
                at: Any = attention
                found[n] = QKV(at.q_norm(parts[0]), at.k_norm(parts[1]), parts[2])
            else:
                heads = (seen[f"{name}.{each}"].unflatten(2, (self.heads, -1)).transpose(1, 2) for each in projections)
                found[n] = QKV(*heads)
        return found


def gathered(tokens: Float[Tensor, "n tokens dim"], index: Int[Tensor, "n kept"]) -> Float[Tensor, "n kept dim"]:
    """Select tokens by their positions."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def need_common_heads(setting: str, count: int, student: TokenNetwork, teacher: TokenNetwork) -> None:
    """Raise CounterpointError, which names the setting, for a number of heads that does not divide the widths of both networks."""
    if student.width % count or teacher.width % count:
        common = math.gcd(student.width, teacher.width)
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise CounterpointError(
            f"{setting}: {count} heads do not divide both the student's width of {student.width} and the teacher's of "
            f"{teacher.width}; choose one of {fit}"
        )
