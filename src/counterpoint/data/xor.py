"""`xor`: three vectors of bits of which the third is known from the other two together and from neither alone.

The setting of Symile's claim (arXiv 2411.01053). a and b are uniform bits; c is a XOR b with probability `p`, else
a, one draw for all bits of an item. With p = 1 any two of the three are independent, and any two determine the third. With
p = 0 c is a, and b has to do with nothing.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

MOST = 16  # bits: 65,536 candidates


def load(
    argument: None = None,
    *,
    p: float = 1.0,
    bits: int = 3,
    train: int = 4096,
    valid: int = -1,
    test: int = 1000,
    seed: int = 0,
) -> AlignedData:
    """`train`, `valid` and `test` items of three modalities a, b, c of `bits` zeros and ones, drawn with `seed`.

    -1 draws as many valid items as test items. Of few bits there are few items: every split holds all of them many times.
    """
    if not 0 <= p <= 1 or not 1 <= bits <= MOST or min(train, test) < 1:
        raise CounterpointError(
            f"xor wants p in 0..1, bits in 1..{MOST}, train and test at least 1; got p={p}, {bits=}, {train=}, {test=}"
        )
    valid = checked_count("xor", valid, test)
    rng = np.random.default_rng([2411_01053, seed])

    def split(count: int) -> AlignedColumns:
        a, b = rng.integers(0, 2, (2, count, bits))
        c = np.where(rng.random((count, 1)) < p, a ^ b, a)
        return AlignedColumns({name: bit.astype(np.float32) for name, bit in (("a", a), ("b", b), ("c", c))})

    trained, tested = split(train), split(test)
    kinds = {name: Modality("vector", dim=bits) for name in "abc"}
    return AlignedData("xor", trained, split(valid), tested, kinds)
