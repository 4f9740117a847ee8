"""Insert learned prompts into the tokens of frozen transformers, which stay as they are (deep prompt tuning).

    with appended_prompts(encoder, prompts):        # pictures: n more tokens at the end, renewed before the first blocks
        rows = encoder(pictures)
    with replaced_prompts(encoder, prompts, 1):     # texts: the n tokens from position 1 on, renewed before block 1, 2, ...
        rows = encoder(ids, mask)

Outside the context the encoder computes what it computed before, bit for bit. Sources: VPT (Jia et al. 2022, arXiv 2203.12119),
MaPLe (Khattak et al. 2023, arXiv 2210.03117).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.taps import block_names
from counterpoint.errors import CounterpointError

INITIAL = ("norm_pre", "ln_pre", "pre_layrnorm")  # the norm before the blocks in timm, open_clip and transformers


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
    shapes = (getattr(module, "normalized_shape", None) for module in blocks_of(tower)[0].modules())
    return int(next(shape[-1] for shape in shapes if shape))


def new_prompts(count: int, widths: Sequence[int]) -> nn.ParameterList:
    """Make a set of `count` prompts of each width, normal with standard deviation 0.02."""
    return nn.ParameterList(nn.Parameter(0.02 * torch.randn(count, width)) for width in widths)


def need_prompts(tower: nn.Module, prompts: Sequence[Tensor], name: str = "prompts") -> None:
    """Raise ValueError for more sets of prompts than blocks, and for another shape than [n, width]."""
    count, width = len(blocks_of(tower)), prompt_width(tower)
    if len(prompts) > count:
        raise ValueError(f"{name} has {len(prompts)} sets for {count} blocks")
    shapes = {tuple(one.shape) for one in prompts}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[1] != width for shape in shapes):
        raise ValueError(f"{name} must be sets of equal shape [n, {width}], got {sorted(shapes)}")


def _axis(block: nn.Module) -> int:
    """Return the axis of the tokens in a block's input: 0 where its attention has the tokens before the batch."""
    return 0 if getattr(getattr(block, "attn", None), "batch_first", True) is False else 1


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
        raise ValueError(f"prompts has {len(prompts)} sets for the {len(blocks) - 1} blocks after the first")

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
