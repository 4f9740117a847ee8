"""`xor`: three vectors of bits; only together do the first two determine the third: data of Symile's claim (arXiv 2411.01053).

a and b are uniform bits. c is a XOR b with probability `p`, else a; one draw decides for all bits of an item. With p = 1 any two
of the three are independent, and any two determine the third. With p = 0, c equals a, and b is independent of both.
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
    """Draw items of three modalities a, b, c, each a vector of `bits` zeros and ones.

    With few bits there are few distinct items, and every split holds all of them many times.

    Args:
        argument: not used; sources share a signature.
        p: probability of c = a XOR b, 0 to 1.
        bits: number of bits of each vector, 1 to 16.
        train: number of training items, at least 1.
        valid: number of valid items; -1 for as many as test items.
        test: number of test items, at least 1.
        seed: seed of all items.

    Raises CounterpointError for a number out of range.
    """
    if not 0 <= p <= 1 or not 1 <= bits <= MOST or min(train, test) < 1:
        raise CounterpointError(
            f"xor needs p in 0..1, bits in 1..{MOST}, train and test of at least 1; got p={p}, {bits=}, {train=}, {test=}"
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
