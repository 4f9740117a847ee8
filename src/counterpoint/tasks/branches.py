"""Give each item of a batch a partner of its class or subject, for a second branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Partners:
    """Draws for an item another item of its kind.

    Args:
        kinds: [examples] numbers of classes or subjects, below 0 for none.

    `single` counts the kinds with one item, which is its own partner. So is an item without a kind.
    """

    def __init__(self, kinds: Int[Tensor, " examples"]) -> None:
        self.kinds = kinds.numpy()
        self.order = np.argsort(self.kinds, kind="stable")
        self.names, self.starts, self.counts = np.unique(self.kinds[self.order], return_index=True, return_counts=True)
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(self.order))  # of an item in `order`
        self.single = int((self.counts[self.names >= 0] == 1).sum())

    def of(self, rows: Int[Tensor, " n"], drawn: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return a partner of each row, chosen by numbers drawn from 0..1.

        >>> Partners(torch.tensor([0, 1, 0, -1])).of(torch.arange(4), torch.rand(4))
        tensor([2, 1, 0, 3])
        """
        at = rows.cpu().numpy()
        kind = np.searchsorted(self.names, self.kinds[at])
        others = self.counts[kind] - 1
        step = 1 + np.minimum((drawn.cpu().numpy() * others).astype(np.int64), np.maximum(others - 1, 0))
        inside = (self.place[at] - self.starts[kind] + step) % self.counts[kind]
        found = self.order[self.starts[kind] + inside]
        return torch.from_numpy(np.where((others > 0) & (self.kinds[at] >= 0), found, at))


def joined(first: dict[str, Any], second: dict[str, Any], *names: str) -> dict[str, Tensor]:
    """Return these tensors of two batches, the second batch's rows after the first's; shorter rows of words get padding."""
    found = {}
    for name in names:
        parts = [first[name], second[name]]
        if parts[0].ndim == 2:
            longest = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, longest - part.shape[1])) for part in parts]
        found[name] = torch.cat(parts)
    return found
