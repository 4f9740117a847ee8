"""Build pre-norm transformers whose channels, heads and neurons can be masked, learned to be masked, and cut: CLIP's two towers.

    name                          encoder
    tower-WIDTH-DEPTH-HEAD        blocks of this width with heads HEAD channels wide; pictures in patches of 4 pixels below 64
                                  pixels, 8 below 160, else 16
    tower-WIDTH-DEPTH-HEAD-PATCH  the same for pictures in patches of PATCH pixels

`ImageTower` has a class token and a norm before the blocks. `TextTower` is causal, and returns the last token's vector. Their
parameters have the names of open_clip's.

    tower.gates = Gates(tower.shape)     # masks are drawn in training, and fixed in evaluation
    tower.gates.drawn = tower.gates.draw(generator)
    smaller = tower.cut()                # computes what `tower` does in evaluation, to rounding
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core import hard_concrete as hc
from counterpoint.core.masked_transformer import cut_transformer_block, masked_layer_norm, masked_transformer_block
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError

NAME = re.compile(r"tower-(\d+)-(\d+)-(\d+)(?:-(\d+))?")
FORM = "tower-WIDTH-DEPTH-HEAD"
START, GONE = 10.0, -math.inf  # log alpha of a unit at the beginning, and of one that was cut
KINDS = ("hidden", "heads", "neurons")


def _count(parts: tuple[tuple[int, ...], ...]) -> int:
    return sum(map(len, parts))


@dataclass(frozen=True)
class Shape:
    """The units of a whole tower, and those that are left.

    Attributes:
        width, neurons, heads, layers: channels, neurons of a block, heads of a block, blocks, of the whole tower.
        head_dim: channels of a head.
        kept: positions of the units that are left: channels, heads of each block, neurons of each block.
    """

    width: int
    neurons: int
    heads: int
    layers: int
    head_dim: int
    kept: tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]

    @classmethod
    def whole(cls, width: int, layers: int, head_dim: int) -> Shape:
        """Return the shape of a tower with four neurons for each channel, of which nothing is cut."""
        neurons, heads = 4 * width, width // head_dim
        kept = tuple(range(width)), (tuple(range(heads)),) * layers, (tuple(range(neurons)),) * layers
        return cls(width, neurons, heads, layers, head_dim, kept)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Shape:
        """Return the shape that `vars` described, after a passage through JSON."""
        hidden, heads, neurons = found["kept"]
        kept = tuple(hidden), tuple(map(tuple, heads)), tuple(map(tuple, neurons))
        return cls(**{**found, "kept": kept})

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut."""
        return len(self.kept[0]) == self.width and all(
            len(part) == count
            for parts, count in zip(self.kept[1:], (self.heads, self.neurons), strict=True)
            for part in parts
        )

    @property
    def prunable(self) -> float:
        """The number of parameters in the blocks of the whole tower."""
        return hc.prunable_size(self.width, self.neurons, self.heads, self.layers)

    @property
    def left(self) -> float:
        """The number of parameters in its blocks, as the budget counts them: without neurons' biases."""
        hidden, heads, neurons = (torch.tensor(float(n)) for n in (len(self.kept[0]), *map(_count, self.kept[1:])))
        return float(hc.size_of(hidden, heads, neurons, self.width, self.heads))

    def on(self) -> dict[str, Bool[Tensor, "*units"]]:
        """Return True for units that are left, by kind."""
        sizes = {"hidden": (self.width,), "heads": (self.layers, self.heads), "neurons": (self.layers, self.neurons)}
        found = {kind: torch.zeros(size, dtype=torch.bool) for kind, size in sizes.items()}
        found["hidden"][list(self.kept[0])] = True
        for kind, parts in zip(KINDS[1:], self.kept[1:], strict=True):
            for layer, part in enumerate(parts):
                found[kind][layer, list(part)] = True
        return found


def parse(name: str) -> tuple[Shape, int | None]:
    """Return the shape and the patch that a name asks for; None for a patch by the pictures' size.

    Raises CounterpointError for another form of name, and for a width that is no multiple of the heads'.
    """
    found = NAME.fullmatch(name)
    width, depth, head, patch = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    if not (width and depth and head) or width % head:
        raise CounterpointError(
            f"'{name}' is no tower: write {FORM}, such as tower-64-4-16; the width must be a multiple of the heads' width"
        )
    return Shape.whole(width, depth, head), patch or None


class Masks(NamedTuple):
    """Masks of the units that are left."""

    hidden: Float[Tensor, " channels"]
    heads: tuple[Float[Tensor, " heads"], ...]
    neurons: tuple[Float[Tensor, " neurons"], ...]


class Gates(nn.Module):
    """Logits of a tower's masks, and the two multipliers of its budget.

    Attributes:
        hidden, heads, neurons: log alpha of the whole tower's units: [width], [layers, heads], [layers, neurons].
        multipliers: [2] lambda_1 and lambda_2.
        drawn: the step's uniform numbers by kind, in training.
    """

    def __init__(self, shape: Shape, multiplier: float = 10.0) -> None:
        super().__init__()
        self.shape, self.drawn = shape, dict[str, Tensor]()
        for kind, on in shape.on().items():
            self.register_parameter(kind, nn.Parameter(torch.full(on.shape, START)))
            self.register_buffer(f"{kind}_on", on, persistent=False)
        self.multipliers = nn.Parameter(torch.full((2,), multiplier))

    def logits(self) -> list[Float[Tensor, "*units"]]:
        """Return log alpha by kind, -inf for units that were cut before."""
        return [getattr(self, kind).masked_fill(~getattr(self, f"{kind}_on"), GONE) for kind in KINDS]

    def draw(self, generator: torch.Generator) -> dict[str, Float[Tensor, "*units"]]:
        """Draw the uniform numbers of a step."""
        return {
            kind: torch.rand(getattr(self, kind).shape, generator=generator) * (1 - 2 * hc.EPS) + hc.EPS
            for kind in KINDS
        }

    def masks(self) -> Masks:
        """Return masks of the units that are left: drawn in training, fixed in evaluation."""
        found = []
        for kind, logits in zip(KINDS, self.logits(), strict=True):
            if self.training and self.drawn:
                found.append(hc.hard_concrete_sample(logits, self.drawn[kind].to(logits)))
            else:
                found.append(hc.hard_concrete_eval_mask(logits))
        hidden, heads, neurons = found
        # At least one channel stays, else there is nothing to normalise.
        last = F.one_hot(self.logits()[0].argmax(), len(hidden)) * ~hidden.any()
        at, of_heads, of_neurons = self.shape.kept
        return Masks(
            (hidden + last)[list(at)],
            tuple(z[list(part)] for z, part in zip(heads, of_heads, strict=True)),
            tuple(z[list(part)] for z, part in zip(neurons, of_neurons, strict=True)),
        )

    def expected_size(self) -> Float[Tensor, ""]:
        """Compute the expected number of parameters that the masks leave."""
        shape = self.shape
        hidden, heads, neurons = self.logits()
        return hc.expected_model_size(hidden, heads, neurons, shape.width, shape.neurons, shape.heads, shape.layers)

    @torch.no_grad()
    def lead(self) -> None:
        """Keep as many units as the masks do, but the leading ones, unscaled."""
        for kind, logits in zip(KINDS, self.logits(), strict=True):
            count = (hc.hard_concrete_eval_mask(logits) != 0).sum(-1, keepdim=True)
            on = getattr(self, f"{kind}_on")
            leading = on & (on.cumsum(-1) <= count.clamp(min=1 if kind == "hidden" else 0))
            getattr(self, kind).copy_(torch.where(leading, 1e4, -1e4))

    @torch.no_grad()
    def bound(self) -> None:
        """Keep log alpha within its bounds, after a step."""
        for kind in KINDS:
            getattr(self, kind).clamp_(*hc.BOUNDS)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter under a dotted name."""
    for part in name.split(".")[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(name.rpartition(".")[2], nn.Parameter(value))


class Block(nn.Module):
    """A block, with the initial weights of CLIP. Absent parts have no weights but the bias of their output."""

    tokens_first = True  # the axis of the tokens lies before that of the batch

    def __init__(self, width: int, heads: int, neurons: int, head_dim: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        inner = heads * head_dim
        narrow = width**-0.5 * (2 * layers) ** -0.5
        normal = {
            "attn.in_proj_weight": ((3 * inner, width), width**-0.5),
            "attn.out_proj.weight": ((width, inner), narrow),
            "mlp.c_fc.weight": ((neurons, width), (2 * width) ** -0.5),
            "mlp.c_proj.weight": ((width, neurons), narrow),
        }
        flat = {
            "ln_1.weight": width, "ln_1.bias": width, "attn.in_proj_bias": 3 * inner, "attn.out_proj.bias": width,
            "ln_2.weight": width, "ln_2.bias": width, "mlp.c_fc.bias": neurons, "mlp.c_proj.bias": width,
        }  # fmt: skip
        absent = (() if heads else ("ln_1.", "attn.in_", "attn.out_proj.weight")) + (
            () if neurons else ("ln_2.", "mlp.c_fc", "mlp.c_proj.weight")
        )
        for name, (size, deviation) in normal.items():
            if not name.startswith(absent):
                _set(self, name, torch.randn(size) * deviation)
        for name, length in flat.items():
            if not name.startswith(absent):
                fill = 1.0 if name in ("ln_1.weight", "ln_2.weight") else 0.0
                _set(self, name, torch.full((length,), fill))

    def forward(
        self, x: Float[Tensor, "length batch width"], masks: Masks | None = None, number: int = 0
    ) -> Float[Tensor, "length batch width"]:
        hidden, heads, neurons = (None,) * 3 if masks is None else (masks.hidden, *(z[number] for z in masks[1:]))
        weights = dict(self.named_parameters())
        return masked_transformer_block(x, weights, hidden, heads, neurons, self.heads, self.causal)


class Tower(ImageEncoder):
    """What both towers share: blocks, masks, the cut. Subclasses write `again` and `forward`.

    Attributes:
        shape: its units.
        dim: width of its output.
        gates: the masks' logits while they are learned, else None.
        made: the arguments that it was made with, after the shape.
    """

    gates: Gates | None
    made: tuple[int, ...]
    causal = False
    channels_last: tuple[str, ...] = ()  # parameters whose last axis is the channels, and which masks scale
    channels_first: tuple[str, ...] = ()  # likewise the first axis
    unscaled: tuple[str, ...] = ()  # norms, which masks cut but do not scale

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, heads, neurons = shape.kept
        self.shape, self.dim, self.gates = shape, len(hidden), None
        counts = zip(heads, neurons, strict=True)
        sizes = [(len(h), len(n), shape.head_dim, shape.layers) for h, n in counts]
        self.resblocks = nn.ModuleList(Block(len(hidden), *size, self.causal) for size in sizes)

    def again(self, shape: Shape) -> Tower:
        """Return a new tower of this kind and another shape."""
        raise NotImplementedError

    def masks(self) -> Masks | None:
        """Return the masks of the current step; None: there are none."""
        return None if self.gates is None else self.gates.masks()

    def through(self, x: Float[Tensor, "length batch width"], masks: Masks | None) -> Tensor:
        """Apply the blocks."""
        for number, block in enumerate(self.resblocks):
            x = block(x, masks, number)
        return x

    @property
    def size(self) -> int:
        """The number of its parameters, without masks."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("gates."))

    @torch.no_grad()
    def cut(self) -> Tower:
        """Return the tower without the units that the masks remove, with the masks' values in its weights."""
        if self.gates is None:
            raise CounterpointError("this tower has no masks to cut by")
        self.gates.eval()
        masks = self.gates.masks()
        hidden = masks.hidden.nonzero().flatten()

        def left(of: tuple[int, ...], z: Tensor) -> tuple[int, ...]:
            return tuple(of[place] for place in z.nonzero().flatten().tolist())

        old = self.shape
        kept = (
            left(old.kept[0], masks.hidden),
            tuple(left(of, z) for of, z in zip(old.kept[1], masks.heads, strict=True)),
            tuple(left(of, z) for of, z in zip(old.kept[2], masks.neurons, strict=True)),
        )
        found = self.again(Shape(old.width, old.neurons, old.heads, old.layers, old.head_dim, kept)).to(masks.hidden)
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("gates.")}
        new: dict[str, Tensor] = {}
        for number, block in enumerate(self.resblocks):
            z = masks.hidden, masks.heads[number], masks.neurons[number]
            part = cut_transformer_block(dict(block.named_parameters()), *z)
            new |= {f"resblocks.{number}.{name}": value for name, value in part.items()}
        scale = masks.hidden[hidden]
        for name in self.channels_last:
            new[name] = state[name][..., hidden] * scale
        for name in self.channels_first:
            new[name] = state[name][hidden] * scale.view(-1, *[1] * (state[name].ndim - 1))
        new |= {f"{name}.{end}": state[f"{name}.{end}"][hidden] for name in self.unscaled for end in ("weight", "bias")}
        found.load_state_dict(new)
        return found.train(self.training)


class ImageTower(Tower):
    """A transformer of patches, whose class token is the output.

    Args:
        shape: its units.
        size: height and width of the pictures in pixels, a multiple of the patch.
        channels: channels of a picture, by default 3.
        patch: side of a patch in pixels; None: by the size, see the module's table.
    """

    channels_last = ("class_embedding", "positional_embedding")
    channels_first = ("conv1.weight",)
    unscaled = ("ln_pre", "ln_post")

    def __init__(self, shape: Shape, size: int, channels: int = 3, patch: int | None = None) -> None:
        super().__init__(shape)
        patch = patch or (4 if size < 64 else 8 if size < 160 else 16)
        if size % patch:
            raise CounterpointError(f"a tower cuts pictures into patches of {patch} pixels; {size} is not a multiple")
        self.made = size, channels, patch
        self.conv1 = nn.Conv2d(channels, self.dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(self.dim) * self.dim**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, self.dim) * self.dim**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(self.dim), nn.LayerNorm(self.dim)

    def again(self, shape: Shape) -> ImageTower:
        return ImageTower(shape, *self.made)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        masks = self.masks()
        z = None if masks is None else masks.hidden
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], -1), x]) + self.positional_embedding[:, None]
        x = masked_layer_norm(x if z is None else x * z, self.ln_pre.weight, self.ln_pre.bias, z)
        return masked_layer_norm(self.through(x, masks)[0], self.ln_post.weight, self.ln_post.bias, z)


class TextTower(Tower):
    """A causal transformer of tokens, whose last token is the output.

    Args:
        shape: its units.
        vocabulary: number of tokens in the vocabulary.
        length: maximum number of tokens of a text.
    """

    causal = True
    channels_last = ("token_embedding.weight", "positional_embedding")
    unscaled = ("ln_final",)

    def __init__(self, shape: Shape, vocabulary: int, length: int) -> None:
        super().__init__(shape)
        self.vocabulary, self.length = vocabulary, length
        self.made = vocabulary, length
        self.token_embedding = nn.Embedding(vocabulary, self.dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(torch.randn(length, self.dim) * 0.01)
        self.ln_final = nn.LayerNorm(self.dim)

    def again(self, shape: Shape) -> TextTower:
        return TextTower(shape, *self.made)

    def tokens(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Compute the last layer's output for every token; zeros at padding."""
        if ids.shape != mask.shape or ids.shape[1] > self.length:
            raise CounterpointError(
                f"this tower reads {self.length} tokens at most, and a mask alike, got {list(ids.shape)} and {list(mask.shape)}"
            )
        masks = self.masks()
        z = None if masks is None else masks.hidden
        x = (self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]).transpose(0, 1)
        x = self.through(x if z is None else x * z, masks)
        x = masked_layer_norm(x, self.ln_final.weight, self.ln_final.bias, z)
        return x.transpose(0, 1) * mask[..., None]

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Compute one vector per text; zeros for a text without tokens."""
        found = self.tokens(ids, mask)
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
        return found.gather(1, last[:, None, None].expand(-1, 1, found.shape[2])).squeeze(1)
