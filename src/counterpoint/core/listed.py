"""Operations on listed rows of a memory: each row of a batch has its own list of positions.

    draw       positions of examples of other classes (`OtherClasses`)
    compare    dot products with the listed rows (`listed_products`)
    combine    weighted sums of the listed rows (`listed_sums`), the gradient of the products

No function stores the array [n, listed, dim] of all listed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

# Maximum number of entries of a block of an intermediate result, so that it stays in the cache.
BLOCK = 2**20


def _fetched(memory: Tensor, index: Tensor) -> bool:
    """Return whether to fetch each row's list instead of multiplying with the whole memory."""
    return len(memory) > 64 * index.shape[1]  # measured: with 50,000 rows, 1,024 listed ones are too many to fetch


def listed_products(
    query: Float[Tensor, "n dim"], memory: Float[Tensor, "samples dim"], index: Int[Tensor, "n listed"]
) -> Float[Tensor, "n listed"]:
    """Compute the dot products query_b . memory[index_bk].

    Args:
        query: one row for each list.
        memory: the rows that the lists name.
        index: positions in `memory`, not checked here.

    >>> listed_products(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 1]]))
    tensor([[1., 3.],
            [4., 4.]])
    """
    if not _fetched(memory, index):
        return (query @ memory.T).gather(1, index)
    step = max(1, BLOCK // (index.shape[1] * query.shape[1]))
    parts = [slice(start, start + step) for start in range(0, len(query), step)]
    return torch.cat(
        [torch.bmm(memory[index[part]], query[part, :, None]).squeeze(2) for part in parts]
        or [query.new_empty(index.shape)]
    )


def listed_sums(
    weight: Float[Tensor, "n listed"], memory: Float[Tensor, "samples dim"], index: Int[Tensor, "n listed"]
) -> Float[Tensor, "n dim"]:
    """Compute sum_k weight_bk memory[index_bk]. Arguments are those of `listed_products`, with a weight for each position.

    >>> listed_sums(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[0, 0]]))
    tensor([[3., 0.]])
    """
    if _fetched(memory, index):
        return F.embedding_bag(index, memory, mode="sum", per_sample_weights=weight)
    return weight.new_zeros(len(weight), len(memory)).scatter_add_(1, index, weight) @ memory


class OtherClasses(nn.Module):
    """Draw examples of other classes than an example's own, uniformly and with replacement.

    Args:
        labels: class of every training example.

    Buffers hold the order of the examples by class. They move with `.to`, and the state dict does not contain them. Raises
    ValueError for labels of one class.

    >>> OtherClasses(torch.tensor([0, 1, 0])).draw(torch.tensor([0, 2]), 3, torch.Generator().manual_seed(0))
    tensor([[1, 1, 1],
            [1, 1, 1]])
    """

    by_class: Int[Tensor, " examples"]
    first: Int[Tensor, " examples"]
    count: Int[Tensor, " examples"]

    def __init__(self, labels: Int[Tensor, " examples"]) -> None:
        super().__init__()
        inverse, counts = labels.unique(return_inverse=True, return_counts=True)[1:]
        if len(counts) < 2:
            raise ValueError("labels holds one class: there are no samples of another class to draw")
        # For each example, the start and the length of its class in the order of classes.
        self.register_buffer("by_class", inverse.argsort(stable=True), persistent=False)
        self.register_buffer("first", (counts.cumsum(0) - counts)[inverse], persistent=False)
        self.register_buffer("count", counts[inverse], persistent=False)

    def draw(self, index: Int[Tensor, " n"], number: int, generator: torch.Generator) -> Int[Tensor, "n number"]:
        """Draw `number` positions for each example of `index`. The cost does not depend on the number of examples."""
        # Draw positions in the order of classes without the example's class, then move later ones past that class.
        free = len(self.by_class) - self.count[index][:, None]
        uniform = torch.rand((len(index), number), dtype=torch.float64, generator=generator, device=generator.device)
        places = (uniform.to(index.device) * free).long().clamp_(max=free - 1)
        places += (places >= self.first[index][:, None]) * self.count[index][:, None]
        return self.by_class[places]
