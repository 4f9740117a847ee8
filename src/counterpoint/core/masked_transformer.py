"""Compute a pre-norm transformer block whose channels, heads and neurons are masked, and cut what the masks remove.

Weights have the names of CLIP's: ln_1, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj, ln_2, mlp.c_fc, mlp.c_proj.
x is [length, batch, channels]. A mask entry of 0 removes the unit. Other entries scale its output.

    hidden_z         [channels]   of the residual stream, the same in all blocks
    heads_z          [heads]      of the block's attention
    intermediate_z   [neurons]    of the block's feed-forward layer

A block may lack units altogether. Without heads its attention adds a constant, the bias of its output; likewise without neurons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LN_EPS = 1e-5
SHORT = 64  # tokens up to which plain products are faster than PyTorch's fused attention on a CPU


def masked_layer_norm(
    x: Float[Tensor, "... channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    hidden_z: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "... channels"]:
    """Normalise over the channels whose mask is not 0; the others become 0. The mask's values do not scale the result.

    Args:
        x: the states.
        weight, bias: the affine map after the normalisation.
        hidden_z: mask; None: all channels.
    """
    if hidden_z is None:
        return F.layer_norm(x, weight.shape, weight, bias, LN_EPS)
    on = (hidden_z.detach() != 0).to(x.dtype)
    count = on.sum()
    centred = (x - (x * on).sum(-1, keepdim=True) / count) * on
    variance = centred.square().sum(-1, keepdim=True) / count
    return centred * (variance + LN_EPS).rsqrt() * (weight * on) + bias * on


def _attention(
    x: Float[Tensor, "length batch channels"],
    weights: Mapping[str, Tensor],
    heads_z: Tensor | None,
    heads: int,
    causal: bool,
) -> Float[Tensor, "length batch inner"]:
    """Return the outputs of the heads, side by side."""
    length, batch, _ = x.shape
    inside = F.linear(x, weights["attn.in_proj_weight"], weights["attn.in_proj_bias"])
    q, k, v = inside.view(length, batch, 3, heads, -1).permute(2, 1, 3, 0, 4)  # [batch, heads, length, head_dim]
    if x.device.type == "cpu" and length <= SHORT and not torch.compiler.is_compiling():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = scores.softmax(-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if heads_z is not None:
        mixed = mixed * heads_z[:, None, None]
    return mixed.permute(2, 0, 1, 3).reshape(length, batch, -1)


def masked_transformer_block(
    x: Float[Tensor, "length batch channels"],
    weights: Mapping[str, Tensor],
    hidden_z: Float[Tensor, " channels"] | None,
    heads_z: Float[Tensor, " heads"] | None,
    intermediate_z: Float[Tensor, " neurons"] | None,
    num_heads: int,
    causal: bool = False,
) -> Float[Tensor, "length batch channels"]:
    """Compute x + attention, then + feed-forward with the exact GELU; each sum's new part is masked by hidden_z.

    Args:
        x: states, already masked.
        weights: the block's weights by name. Those of absent parts may be missing.
        hidden_z, heads_z, intermediate_z: masks; None: all ones.
        num_heads: number of heads; 0: the block has no attention but its output's bias.
        causal: let a token attend to itself and earlier tokens alone; default no.

    Raises ValueError for states of another width than the weights', and for a mask without any channel.

    >>> import torch
    >>> w = {"attn.out_proj.bias": torch.ones(2), "mlp.c_proj.bias": torch.ones(2)}
    >>> masked_transformer_block(torch.zeros(1, 1, 2), w, None, None, None, 0)
    tensor([[[2., 2.]]])
    """
    width = weights["attn.out_proj.bias"].shape[0]
    if x.ndim != 3 or x.shape[2] != width:
        raise ValueError(f"x must be [length, batch, {width}], got {list(x.shape)}")
    if hidden_z is not None and x.device.type == "cpu" and not bool(hidden_z.any()):
        raise ValueError("hidden_z must keep at least one channel")
    z: float | Tensor = 1.0 if hidden_z is None else hidden_z
    if num_heads:
        normed = masked_layer_norm(x, weights["ln_1.weight"], weights["ln_1.bias"], hidden_z)
        mixed = _attention(normed, weights, heads_z, num_heads, causal)
        added = F.linear(mixed, weights["attn.out_proj.weight"], weights["attn.out_proj.bias"])
    else:
        added = weights["attn.out_proj.bias"]
    x = x + (added if hidden_z is None else added * z)
    if "mlp.c_fc.weight" in weights:
        normed = masked_layer_norm(x, weights["ln_2.weight"], weights["ln_2.bias"], hidden_z)
        inner = F.gelu(F.linear(normed, weights["mlp.c_fc.weight"], weights["mlp.c_fc.bias"]))
        inner = inner if intermediate_z is None else inner * intermediate_z
        added = F.linear(inner, weights["mlp.c_proj.weight"], weights["mlp.c_proj.bias"])
    else:
        added = weights["mlp.c_proj.bias"]
    return x + (added if hidden_z is None else added * z)


def cut_transformer_block(
    weights: Mapping[str, Tensor],
    hidden_z: Float[Tensor, " channels"],
    heads_z: Float[Tensor, " heads"],
    intermediate_z: Float[Tensor, " neurons"],
) -> dict[str, Tensor]:
    """Remove masked units from a block, and multiply the masks' other values into its weights.

    The cut block computes on the kept channels the same as the masked block, to rounding.

    Args:
        weights: the block's weights by name.
        hidden_z, heads_z, intermediate_z: its masks.

    Returns the weights of the cut block. A part without units keeps only its output's bias.
    """
    hidden, heads, neurons = (z.nonzero().flatten() for z in (hidden_z, heads_z, intermediate_z))
    z = hidden_z[hidden]
    found = {name: weights[f"{name}.bias"][hidden] * z for name in ("attn.out_proj", "mlp.c_proj")}
    found = {f"{name}.bias": value for name, value in found.items()}
    if len(heads):
        inside = weights["attn.in_proj_weight"].unflatten(0, (3, len(heads_z), -1))[:, heads][..., hidden]
        out = weights["attn.out_proj.weight"].unflatten(1, (len(heads_z), -1))[hidden][:, heads]
        found |= {
            "ln_1.weight": weights["ln_1.weight"][hidden],
            "ln_1.bias": weights["ln_1.bias"][hidden],
            "attn.in_proj_weight": inside.flatten(0, 2),
            "attn.in_proj_bias": weights["attn.in_proj_bias"].unflatten(0, (3, len(heads_z), -1))[:, heads].flatten(),
            "attn.out_proj.weight": (out * heads_z[heads][:, None]).flatten(1) * z[:, None],
        }
    if len(neurons):
        found |= {
            "ln_2.weight": weights["ln_2.weight"][hidden],
            "ln_2.bias": weights["ln_2.bias"][hidden],
            "mlp.c_fc.weight": weights["mlp.c_fc.weight"][neurons][:, hidden],
            "mlp.c_fc.bias": weights["mlp.c_fc.bias"][neurons],
            "mlp.c_proj.weight": weights["mlp.c_proj.weight"][hidden][:, neurons]
            * intermediate_z[neurons]
            * z[:, None],
        }
    return found
