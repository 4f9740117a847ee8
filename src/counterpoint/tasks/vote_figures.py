"""Draw the votes of a picture's transformed copies for its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def vote_figures(
    joint: Float[Tensor, "n copies classes transformations"], labels: Int[Tensor, " n"], names: Sequence[str]
) -> dict[str, Any]:
    """Show how accuracy grows with the copies that vote, and which transformations joint logits recognise.

    Args:
        joint: logits of each copy of test pictures, for each pair of a class and a transformation.
        labels: classes of the pictures.
        names: names of the transformations, in the order of the copies.
    """
    copies = len(names)
    votes = joint.diagonal(dim1=1, dim2=3).transpose(1, 2)  # [n, copies, classes]
    alone = (votes.argmax(2) == labels[:, None]).double().mean(0)
    together = ((votes.cumsum(1).argmax(2)) == labels[:, None]).double().mean(0)
    count = list(range(1, copies + 1))
    seen = joint.logsumexp(2).argmax(2)
    table = torch.stack([seen[:, i].bincount(minlength=copies) for i in range(copies)])
    return {
        "Votes of the copies": {
            "kind": "curves",
            "series": {
                "first copies together": [count, together.tolist()],
                "each copy alone": [count, alone.tolist()],
            },
            "xlabel": "copy",
            "caption": f"Accuracy on test, over the copies in order: {', '.join(names)}.",
        },
        "Transformations that the joint head recognises": {
            "kind": "matrix",
            "values": table.tolist(),
            "names": list(names),
            "caption": "Rows: transformation of a copy. Columns: the one that its joint logits name, over all classes.",
        },
    }
