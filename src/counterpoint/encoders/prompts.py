"""Insert learned prompts into the tokens of frozen transformers, which stay as they are (deep prompt tuning).

    with appended_prompts(encoder, prompts):        # pictures: n more tokens at the end, renewed before the first blocks
        rows = encoder(pictures)
    with replaced_prompts(encoder, prompts, 1):     # texts: the n tokens from position 1 on, renewed before block 1, 2, ...
        rows = encoder(ids, mask)

Outside the context the encoder computes what it computed before, bit for bit. Sources: VPT (Jia et al. 2022, arXiv 2203.12119),
MaPLe (Khattak et al. 2023, arXiv 2210.03117). `build_prompts` makes prompts of a picture (GOPro). `prompted_vit` learns prompts of
a tower, and `prompt_projector` maps its features to the teacher's space (PromptKD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import place
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision, wide
from counterpoint.encoders.simple import mlp
from counterpoint.encoders.taps import block_names, tokens_first
from counterpoint.errors import CounterpointError
from counterpoint.words import counted

INITIAL = ("norm_pre", "ln_pre", "pre_layrnorm")  # the norm before the blocks in timm, open_clip and transformers
TINY = 2.3e-8  # added to the sum of squares of a style
Layers = Float[Tensor, "layers n tokens width"] | Sequence[Float[Tensor, "n _ _"]]


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """Return a transformer's blocks, first to last. Raises CounterpointError for a network without attention."""
    found = [tower.get_submodule(name) for name in block_names(tower)]
    attentive = [any("attention" in type(module).__name__.lower() for module in block.modules()) for block in found]
    if not all(attentive):
        raise CounterpointError(
            f"{type(tower).__name__} has no blocks with attention, which take prompts; name a transformer such as vit-s"
        )
    return found


def prompt_width(tower: nn.Module) -> int:
    """Return the width of a transformer's tokens."""
    found = (getattr(module, "normalized_shape", None) for module in blocks_of(tower)[0].modules())
    return int(next(shape[-1] for shape in found if shape))


def new_prompts(count: int, widths: Sequence[int]) -> nn.ParameterList:
    """Make a set of `count` prompts of each width, normal with standard deviation 0.02."""
    return nn.ParameterList(nn.Parameter(0.02 * torch.randn(count, width)) for width in widths)


def need_prompts(tower: nn.Module, prompts: Sequence[Tensor], name: str = "prompts") -> None:
    """Raise ValueError for more sets of prompts than blocks, and for another shape than [n, width]."""
    count, width = len(blocks_of(tower)), prompt_width(tower)
    if len(prompts) > count:
        raise ValueError(f"{name} has {counted(len(prompts), 'set')} for {counted(count, 'block')}")
    found = {tuple(one.shape) for one in prompts}
    if len(found) > 1 or any(len(shape) != 2 or shape[1] != width for shape in found):
        raise ValueError(f"{name} must be sets of equal shape [n, {width}], got {sorted(found)}")


def _axis(block: nn.Module) -> int:
    """Return the axis of the tokens in a block's input: 0 where they lie before the batch."""
    return 0 if tokens_first(block) else 1


def _wide(prompt: Tensor, like: Tensor, axis: int) -> Tensor:
    """Repeat a set of prompts for every item of a batch of tokens."""
    return (
        prompt.to(like.dtype)
        .unsqueeze(1 - axis)
        .expand(*((-1, like.shape[1], -1) if axis == 0 else (like.shape[0], -1, -1)))
    )


@contextmanager
def _hooked(
    hooks: Sequence[tuple[nn.Module, Callable[[Any], Any]]], last: tuple[nn.Module, Any] | None
) -> Iterator[None]:
    """Change the first input of modules, and the output of one, in the forward passes inside the context."""
    handles = [
        module.register_forward_pre_hook(lambda _, given, change=change: change(given)) for module, change in hooks
    ]
    if last is not None:
        module, change = last
        handles.append(module.register_forward_hook(lambda _, given, output: change(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def appended_prompts(tower: nn.Module, prompts: Sequence[Float[Tensor, "n width"]]) -> Iterator[None]:
    """Append prompts to the tokens of pictures in the forward passes inside the context.

    Args:
        tower: a vision transformer of timm, open_clip or transformers.
        prompts: J sets; the first passes through the initial norm, set i replaces the appended tokens before block i. None
            changes nothing.

    From block J on the tokens go on. The last block's output loses them. Raises ValueError for sets that do not fit.
    """
    need_prompts(tower, prompts)
    if not prompts:
        yield
        return
    blocks, count = blocks_of(tower), len(prompts[0])
    initial = [module for name, module in tower.named_modules() if name.rpartition(".")[2] in INITIAL]
    first = initial[0] if initial else blocks[0]

    def append(given: Any) -> Any:
        axis = 1 if initial else _axis(first)
        return (torch.cat([given[0], _wide(prompts[0], given[0], axis)], axis), *given[1:])

    def renew(number: int) -> Callable[[Any], Any]:
        def change(given: Any) -> Any:
            axis = _axis(blocks[number])
            kept = given[0].narrow(axis, 0, given[0].shape[axis] - count)
            return (torch.cat([kept, _wide(prompts[number], kept, axis)], axis), *given[1:])

        return change

    def drop(output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        axis = _axis(blocks[-1])
        kept = tokens.narrow(axis, 0, tokens.shape[axis] - count)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    with _hooked([(first, append), *((blocks[n], renew(n)) for n in range(1, len(prompts)))], (blocks[-1], drop)):
        yield


@contextmanager
def replaced_prompts(tower: nn.Module, prompts: Sequence[Float[Tensor, "n width"]], at: int) -> Iterator[None]:
    """Replace n tokens of every text before block 1, 2, ... in the forward passes inside the context.

    Args:
        tower: a text transformer: text-s, or one of open_clip or transformers.
        prompts: set i replaces the tokens before block i + 1. Vectors before block 0 are `DualEncoder.texts_with_context`'s.
        at: position of the first replaced token.

    Raises ValueError for sets that do not fit.
    """
    need_prompts(tower, prompts)
    blocks = blocks_of(tower)
    if len(prompts) >= len(blocks):
        raise ValueError(f"prompts has {counted(len(prompts), 'set')} for the {len(blocks) - 1} blocks after the first")

    def renew(number: int) -> Callable[[Any], Any]:
        prompt, axis = prompts[number - 1], _axis(blocks[number])

        def change(given: Any) -> Any:
            x = given[0]
            if x.ndim == 2:  # text-s: tokens of all texts one after another, then their positions among [texts, tokens]
                column = given[1] % given[2].shape[1] - at
                own = (column >= 0) & (column < len(prompt))
                placed = prompt.to(x.dtype)[column.clamp(0, len(prompt) - 1)]
                return (torch.where(own[:, None], placed, x), *given[1:])
            after = at + len(prompt)
            parts = [x.narrow(axis, 0, at), _wide(prompt, x, axis), x.narrow(axis, after, x.shape[axis] - after)]
            return (torch.cat(parts, axis), *given[1:])

        return change

    with _hooked([(blocks[n], renew(n)) for n in range(1, len(prompts) + 1)], None):
        yield


# --- CLIP's image encoder, computed from named weights


class _Norm(nn.Module):
    """Layer normalisation by given weights."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.given = [weight, bias]
        self.normalized_shape = (len(weight),)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.given
        return F.layer_norm(x, self.normalized_shape, weight, bias)


class _Attention(nn.Module):
    """A block of CLIP by given weights: pre-norm attention and MLP with x sigmoid(1.702 x)."""

    def __init__(self, weights: Mapping[str, Tensor], place: str, heads: int) -> None:
        super().__init__()
        prefix, self.heads = f"{place}.", heads
        self.given = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        self.norms = nn.ModuleList(_Norm(self.given[f"ln_{n}.weight"], self.given[f"ln_{n}.bias"]) for n in (1, 2))

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        w = self.given
        inside = F.linear(self.norms[0](x), w["attn.in_proj_weight"], w["attn.in_proj_bias"])
        q, k, v = inside.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        hidden = F.linear(self.norms[1](x), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        return x + F.linear(hidden * torch.sigmoid(1.702 * hidden), w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])


class ClipWeights(nn.Module):
    """The image encoder of CLIP, computed from weights by OpenAI's names.

    Args:
        weights: conv1.weight, class_embedding, positional_embedding, ln_pre.*, transformer.resblocks.N.*, ln_post.*, proj.
        patch: side of a patch in pixels.
        heads: number of attention heads.

    Raises ValueError that names a missing array, or heads that do not divide the width.
    """

    def __init__(self, weights: Mapping[str, Tensor], patch: int, heads: int) -> None:
        super().__init__()
        self.weights, self.patch = weights, patch
        try:
            width = len(weights["class_embedding"])
            if heads < 1 or width % heads:
                raise ValueError(f"num_heads must divide the width {width}, got {heads}")
            places = {".".join(name.split(".")[:3]) for name in weights if name.startswith("transformer.resblocks.")}
            ordered = sorted(places, key=lambda place: int(place.rpartition(".")[2]))
            self.ln_pre, self.ln_post = (
                _Norm(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("ln_pre", "ln_post")
            )
            self.resblocks = nn.ModuleList(_Attention(weights, place, heads) for place in ordered)
        except KeyError as error:
            raise ValueError(f"weights lack {error.args[0]}") from error

    def forward(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n out"]:
        """Compute the features of normalised pictures. ValueError for a size that the positions do not fit."""
        w = self.weights
        patches = F.conv2d(images, w["conv1.weight"], stride=self.patch).flatten(2).transpose(1, 2)
        tokens = torch.cat([w["class_embedding"].expand(len(images), 1, -1), patches], 1)
        if tokens.shape[1:] != w["positional_embedding"].shape:
            raise ValueError(
                f"image gives {tokens.shape[1]} tokens with patch {self.patch}, positional_embedding has "
                f"{len(w['positional_embedding'])}"
            )
        x = self.ln_pre(tokens + w["positional_embedding"])
        for block in self.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ w["proj"]


@full_precision
def style_content_token(
    layer_features: Layers, weights: Mapping[str, Tensor | Sequence[Tensor]]
) -> Float[Tensor, "n text_width"]:
    """Compute the token of each picture: sum_l rho_l (A_l((mu + sd) / 2) + C_l(mu)) / 2 + rho_0.

    Args:
        layer_features: tokens of each block; blocks may differ in tokens and width. They have no gradient.
        weights: style_weight, style_bias, content_weight, content_bias (one for each block), rho_weight [1, layers] and
            rho_bias [1].

    Raises ValueError without blocks, and for weights of another number of blocks.
    """
    names, count = ("style_weight", "style_bias", "content_weight", "content_bias"), len(layer_features)
    lengths = {name: len(weights[name]) for name in names} | {"rho_weight": weights["rho_weight"][0].shape[-1]}
    if not count or set(lengths.values()) != {count}:
        raise ValueError(
            f"weights must be of {counted(count, 'block')}, as layer_features, and at least of one, got {lengths}"
        )
    fused = []
    for z, *linear in zip(layer_features, *(weights[name] for name in names), strict=True):
        z, (a, a0, c, c0) = z.detach(), map(wide, linear)  # A_l and C_l with their biases
        mean = z.mean(1)
        spread = ((z - mean[:, None]).square_().sum(1).add_(TINY) / z.shape[1]).sqrt()  # in place: a third of the time
        style, content = F.linear((mean + spread) / 2, a, a0), F.linear(mean, c, c0)
        fused.append((style + content) / 2)
    rho, bias = (wide(cast("Tensor", weights[name])) for name in ("rho_weight", "rho_bias"))
    return F.linear(torch.stack(fused, 2), rho, bias)[..., 0]


@full_precision
def shifted_context(
    token: Float[Tensor, "n text_width"], ctx: Float[Tensor, "m text_width"]
) -> Float[Tensor, "n m text_width"]:
    """Add each picture's token to every context vector. Raises ValueError for widths that differ."""
    if token.ndim != 2 or ctx.ndim != 2 or token.shape[1] != ctx.shape[1]:
        raise ValueError(f"token must be [n, width] and ctx [m, width], got {shapes(token=token, ctx=ctx)}")
    need_rows(token=token)
    return ctx + token[:, None]


@full_precision
def build_prompts(
    token: Float[Tensor, "n text_width"],
    ctx: Float[Tensor, "m text_width"],
    prefix: Float[Tensor, "classes 1 text_width"],
    suffix: Float[Tensor, "classes s text_width"],
) -> Float[Tensor, "n classes length text_width"]:
    """Build the vectors that the text encoder reads: [start, ctx + token, rest] for every picture and class.

    Training writes `shifted_context` into the encoder's own vectors, with the same result.

    Args:
        token: of each picture.
        ctx: context vectors.
        prefix: vector of each class's start token.
        suffix: vectors of the class's name, of the end and of the padding.

    Raises ValueError for widths that differ, and for other classes in prefix than in suffix.
    """
    n, classes = len(token), len(prefix)
    if len(suffix) != classes or {prefix.shape[-1], suffix.shape[-1]} != {ctx.shape[-1]}:
        found = shapes(prefix=prefix, suffix=suffix, ctx=ctx)
        raise ValueError(f"prefix and suffix must be of the same classes, and as wide as ctx, got {found}")
    middle = shifted_context(token, ctx)[:, None].expand(-1, classes, -1, -1)
    return torch.cat([prefix.expand(n, -1, -1, -1), middle, suffix.expand(n, -1, -1, -1)], 2)


class PromptGenerator(nn.Module):
    """The context vectors, and the layers that shift them by a picture's content and style."""

    def __init__(self, words: int, text_width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(words, text_width))
        self.style = nn.ModuleList(nn.Linear(width, text_width) for width in widths)
        self.content = nn.ModuleList(nn.Linear(width, text_width) for width in widths)
        self.rho = nn.Linear(len(widths), 1)

    def weights(self) -> dict[str, Any]:
        """Return the weights by the names of `style_content_token`."""
        found: dict[str, Any] = {"rho_weight": self.rho.weight, "rho_bias": self.rho.bias}
        for name, layers in (("style", self.style), ("content", self.content)):
            found |= {f"{name}_weight": [one.weight for one in layers], f"{name}_bias": [one.bias for one in layers]}
        return found

    def forward(self, layer_features: Sequence[Tensor]) -> Float[Tensor, "n words text_width"]:
        return shifted_context(style_content_token(layer_features, self.weights()), self.context)


def prompted_vit(
    image: Float[Tensor, "n 3 size size"],
    weights: Mapping[str, Tensor],
    patch: int,
    num_heads: int,
    depth: int,
    n_ctx: int,
    *,
    tower: nn.Module | None = None,
) -> Float[Tensor, "n out"]:
    """Compute a vision transformer's features with deep prompts, not normalised (independent vision prompting).

    Args:
        image: normalised pictures.
        weights: the prompts VPT [n_ctx, width] and transformer.resblocks.N.VPT_shallow for 1 <= N < depth, and the
            transformer's weights by OpenAI's names.
        patch: side of a patch in pixels.
        num_heads: number of attention heads.
        depth: J, number of sets of prompts, 0 (no prompts) to the number of blocks.
        n_ctx: n, number of prompts in a set, at least 1 where depth > 0.
        tower: a transformer that replaces the weights, `patch` and `num_heads`. Default: CLIP's, by the weights.

    Prompts stand after all other tokens. The first set passes through the initial norm. Raises ValueError for missing weights and
    for sets of another shape.
    """
    names = prompt_names(depth)
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"weights lack {missing[0]}, which depth {depth} needs")
    prompts = [weights[name] for name in names]
    if any(len(one) != n_ctx or n_ctx < 1 for one in prompts):
        raise ValueError(f"n_ctx is {n_ctx}, the prompts are {shapes(**dict(zip(names, prompts, strict=True)))}")
    network = ClipWeights(weights, patch, num_heads) if tower is None else tower
    with appended_prompts(network, prompts):
        found: Tensor = network(image)
    return found


def prompt_names(depth: int) -> list[str]:
    """Return the names of J = depth sets of prompts in the authors' checkpoints. ValueError for a negative depth."""
    if depth < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    return ["VPT", *(f"transformer.resblocks.{n}.VPT_shallow" for n in range(1, depth))][:depth]


class Projector(nn.Module):
    """The projector's layers: linear layers with batch normalisation and ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.conv1 = mlp(*widths)

    def forward(self, h: Float[Tensor, "n width"]) -> Float[Tensor, "n dim"]:
        return self.conv1(h)


def prompt_projector(
    h: Float[Tensor, "n width"], weights: Mapping[str, Tensor], train: bool, *, layers: nn.Module | None = None
) -> Float[Tensor, "n dim"]:
    """Compute u = unit(projector(h)).

    Args:
        h: the student's features, not normalised.
        weights: conv1.N.weight [out, in] or [out, in, 1, 1] and conv1.N.bias of the linear layers N = 0, 3, ...; of the batch
            normalisation N = 1, 4, ... also running_mean and running_var.
        train: normalise by the statistics of the batch. A single row, and False, take the running ones.
        layers: the projector itself, whose running statistics then follow; default: built from the weights, which stay.

    Raises ValueError for an empty batch, for missing weights and for widths that do not fit.
    """
    if layers is None:
        need_rows(h=h)
        linear = sorted((n for n in weights if weights[n].ndim > 1), key=lambda name: int(name.split(".")[1]))
        if not linear or weights[linear[0]].shape[1] != h.shape[1]:
            raise ValueError(f"weights must map rows of width {h.shape[1]}, got {shapes(**dict(weights))}")
        layers = Projector(h.shape[1], *(len(weights[name]) for name in linear)).to(h)
        weights = {n: w.flatten(1) if n in linear else w.clone() for n, w in weights.items()}
        missing = {n for n in layers.state_dict() if not n.endswith("tracked")} - weights.keys()
        if missing:
            raise ValueError(f"weights lack {min(missing)}")
    layers.train(bool(train) and place(len(h), h.device).total > 1)
    return F.normalize(functional_call(layers, dict(weights), (h,)), dim=1, eps=EPS)
