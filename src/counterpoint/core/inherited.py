"""Take the weights of a small network out of those of a large one of the same kind, without training."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def inherit_weights(
    student_state: Mapping[str, Tensor], teacher_state: Mapping[str, Tensor], head_dim: int
) -> dict[str, Tensor]:
    """Take the student's weights out of the teacher's: every n-th block, and the leading part of each axis.

    Block i of the student takes block i floor(teacher depth / student depth). A joint weight of queries, keys and values gives each
    of the three its leading heads. Scalars are copied.

    Args:
        student_state: tensors of the student by name, whose shapes count. Blocks are named "...resblocks.N....".
        teacher_state: tensors of the teacher by the same names.
        head_dim: channels of a head, the same in both.

    Raises ValueError for a tensor that the teacher lacks, or that is larger than the teacher's.

    >>> import torch
    >>> inherit_weights({"a.weight": torch.zeros(1, 2)}, {"a.weight": torch.arange(9.0).view(3, 3)}, 4)
    {'a.weight': tensor([[0., 1.]])}
    """
    block = re.compile(r"(.*resblocks\.)(\d+)(\..*)")

    def depths(state: Mapping[str, Tensor]) -> dict[str, int]:
        found: dict[str, int] = {}
        for match in filter(None, map(block.fullmatch, state)):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
        return found

    ours, theirs, found = depths(student_state), depths(teacher_state), dict[str, Tensor]()
    for name, own in student_state.items():
        match, source = block.fullmatch(name), name
        if match and match[1] in theirs:
            step = theirs[match[1]] // ours[match[1]]
            if step < 1:
                raise ValueError(
                    f"the student has {ours[match[1]]} blocks, more than the teacher's {theirs[match[1]]} to inherit from"
                )
            source = f"{match[1]}{int(match[2]) * step}{match[3]}"
        if source not in teacher_state:
            raise ValueError(f"the student's {name} would stay empty: the teacher has no {source}")
        value = teacher_state[source]
        joint = name.endswith(("attn.in_proj_weight", "attn.in_proj_bias"))
        if own.ndim != value.ndim or any(a > b for a, b in zip(own.shape, value.shape, strict=True)):
            raise ValueError(
                f"the student's {name} {list(own.shape)} does not fit into the teacher's {source} {list(value.shape)}"
            )
        if joint:
            if own.shape[0] % (3 * head_dim) or value.shape[0] % (3 * head_dim):
                raise ValueError(f"head_dim {head_dim} does not divide the heads of {name}")
            value, own = value.unflatten(0, (3, -1, head_dim)), own.unflatten(0, (3, -1, head_dim))
        part = value[tuple(slice(size) for size in own.shape)].clone()
        found[name] = part.flatten(0, 2) if joint else part
    return found
