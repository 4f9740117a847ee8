"""Import pyarrow in one place. It has no type annotations, so its objects have the type `Any` here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

pa: Any = pyarrow
pc: Any = pyarrow.compute
pa_csv: Any = pyarrow.csv
pq: Any = pyarrow.parquet


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_numbers(kind: Any) -> bool:
    """Return whether an Arrow type holds lists of numbers."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


# pa.array, pa.scalar and to_numpy would import pandas, which takes a quarter of a second.


def of_numbers(values: NDArray[Any]) -> Any:
    """Convert numbers of int64, float32 or bool to an Arrow array."""
    if values.dtype == bool:
        packed = pa.py_buffer(np.packbits(values, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, packed])
    kind = {"int64": pa.int64(), "float32": pa.float32()}[str(values.dtype)]
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def of_texts(texts: Sequence[str | None]) -> Any:
    """Convert texts to an Arrow array, with null for None."""
    encoded = [b"" if text is None else text.encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    large = offsets[-1] > 1 << 30
    buffers = [
        pa.py_buffer(np.packbits(np.array([text is not None for text in texts], bool), bitorder="little")),
        pa.py_buffer(offsets if large else offsets.astype(np.int32)),
        pa.py_buffer(b"".join(encoded)),
    ]
    return pa.Array.from_buffers(pa.large_string() if large else pa.string(), len(texts), buffers)


def valid(array: Any) -> NDArray[np.bool_]:
    """Return [n] whether each cell of an array is not null."""
    bits = array.buffers()[0]
    if bits is None or not array.null_count:
        return np.ones(len(array), bool)
    return _bits(bits, array.offset, len(array))


def numbers(array: Any) -> NDArray[Any]:
    """Return the numbers of an array of a plain type. The values at nulls are arbitrary; see `valid`."""
    if not len(array):
        return np.zeros(0, np.int64)
    data = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        return _bits(data, array.offset, len(array))
    found = np.frombuffer(data, array.type.to_pandas_dtype())
    return found[array.offset : array.offset + len(array)]


def _bits(buffer: Any, offset: int, count: int) -> NDArray[np.bool_]:
    found = np.unpackbits(np.frombuffer(buffer, np.uint8), count=offset + count, bitorder="little")
    return found[offset:].astype(bool)


def codes_of(encoded: Any) -> NDArray[np.int64]:
    """Return the codes of a dictionary-encoded array, -1 for null."""
    return np.where(valid(encoded.indices), numbers(encoded.indices), -1).astype(np.int64)


def nulled(texts: Any, where: NDArray[np.bool_]) -> Any:
    """Return an array of texts with further rows set to null."""
    rows = np.arange(len(texts))
    keep = ~where & valid(texts)
    index = pa.Array.from_buffers(
        pa.int64(), len(rows), [pa.py_buffer(np.packbits(keep, bitorder="little")), pa.py_buffer(rows)]
    )
    return texts.take(index)
