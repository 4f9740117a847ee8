"""Decode the mask of each picture by the query of its modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.query_decoder import QueryDecoder, query_decoupled_decoder
from counterpoint.encoders.prefix_windows import tensors_of


def masks_of_modalities(
    maps: Float[Tensor, "n dim rows columns"],
    position: Float[Tensor, "1 dim rows columns"],
    modality: Int[Tensor, " n"],
    keys: Sequence[str],
    queries: nn.ParameterDict,
    mask_mlps: nn.ModuleDict,
    decoder: QueryDecoder,
    alone: bool = False,
) -> Float[Tensor, "n fine wide"]:
    """Decode the mask of each picture by its modality's query.

    Args:
        maps: maps of the pictures.
        position: positional encoding of their cells.
        modality: number of each picture's modality.
        keys: key of each modality in `queries`; one key alone is that of all modalities.
        queries: queries [1, dim] by key. Those without a modality come last.
        mask_mlps: MLPs of the masks by the same keys, or one MLP for all.
        decoder: shared weights.
        alone: leave the other queries out of the decoder. Default: all queries attend to each other.
    """
    rows = torch.arange(len(maps), device=maps.device)
    if not alone:
        tokens = torch.stack([queries[key] for key in queries], 1)
        which = modality if len(keys) > 1 else torch.zeros_like(modality)
        weights = _weights(decoder, list(mask_mlps.values()))
        return query_decoupled_decoder(maps, position, tokens, weights, decoder.heads)[rows, which]
    order, found = [], []
    for number in modality.unique().tolist():
        mine, key = rows[modality == number], keys[number]
        mlp = mask_mlps[key] if key in mask_mlps else next(iter(mask_mlps.values()))
        token = queries[key][None]
        weights = _weights(decoder, [mlp])
        found.append(query_decoupled_decoder(maps[mine], position, token, weights, decoder.heads, 1)[:, 0])
        order.append(mine)
    return torch.cat(found)[torch.cat(order).argsort()]


def _weights(decoder: QueryDecoder, mask_mlps: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the decoder's weights by name, with the MLPs of the masks in order."""
    found = tensors_of(decoder)
    for number, mlp in enumerate(mask_mlps):
        for name, value in mlp.named_parameters():
            found[f"output_hypernetworks_mlps.{number}.{name}"] = value
    return found
