"""Measure how a sparse model uses its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def expert_measures(counts: NDArray[np.int64]) -> dict[str, float]:
    """Compute the balance of the experts.

    Args:
        counts: [layers, experts] choices of each expert; a token chooses two.

    Returns `idle_experts`, the number of experts of all layers without a token. `least_expert_share` is the smallest share of a
    layer's choices that an expert has.

    >>> expert_measures(np.array([[2, 2, 4, 0], [2, 2, 2, 2]]))
    {'idle_experts': 1.0, 'least_expert_share': 0.0}
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return {"idle_experts": float((counts == 0).sum()), "least_expert_share": float(share.min())}


def expert_figure(counts: NDArray[np.int64], layers: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    """Draw the share of tokens by layer, kind of token and expert.

    Args:
        counts: [layers, kinds, experts] choices of each expert.
        layers: Numbers of the layers.
        kinds: Names of the kinds of tokens. Kinds without a token are left out.
    """
    whole = counts.sum(1)
    idle = [f"expert {e} of layer {layers[n]}" for n, e in np.argwhere(whole == 0).tolist()]
    rows, names = [], []
    for n, layer in enumerate(layers):
        for k, kind in enumerate(kinds):
            if counts[:, k].sum():
                rows.append((counts[n, k] / max(1, counts[n, k].sum())).tolist())
                names.append(f"layer {layer} {kind}")
    said = f"No token chose {', '.join(idle)}." if idle else "Every expert has tokens."
    caption = (
        f"Share of the tokens' choices by layer and expert on the test chats; each token chooses two experts. {said}"
    )
    columns = [f"expert {n}" for n in range(counts.shape[2])]
    return {"kind": "matrix", "values": rows, "names": names, "columns": columns, "caption": caption}
