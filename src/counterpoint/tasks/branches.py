"""Give each item of a batch a partner of its class or subject, for a second branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor


class Partners:
    """Draws for an item another item of its kind, or two.

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
        return self.two_of(rows, torch.stack([drawn, drawn], 1))[0]

    def two_of(
        self, rows: Int[Tensor, " n"], drawn: Float[Tensor, "n 2"]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return a partner of each row, and another item of its kind that differs from the partner.

        Of three items or more, the row and both items are three different ones. Of two, the second item is the row itself. An item
        alone is both.

        >>> first, second = Partners(torch.tensor([0, 0, 0, 1, 1, 2])).two_of(torch.arange(6), torch.zeros(6, 2))
        >>> first, second
        (tensor([1, 2, 0, 4, 3, 5]), tensor([2, 0, 1, 3, 4, 5]))
        """
        at = rows.cpu().numpy()
        kind = np.searchsorted(self.names, self.kinds[at])
        count = np.where(self.kinds[at] >= 0, self.counts[kind], 1)
        a, b = drawn.cpu().numpy().T

        def chosen(u: NDArray[np.float64], many: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.minimum((u * many).astype(np.int64), np.maximum(many - 1, 0))

        one = np.where(count > 1, 1 + chosen(a, count - 1), 0)
        two = np.where(count > 2, 1 + chosen(b, count - 2), 0)
        two = np.where((count > 2) & (two >= one), two + 1, two)
        begin, place = self.starts[kind], self.place[at]
        found = [self.order[begin + (place - begin + step) % self.counts[kind]] for step in (one, two)]
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])


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
