#!/usr/bin/env bash
# A missing embedding in a list of a fixed size: pyarrow 24 refuses to write it to Parquet, and cannot read it from pyarrow 26.
#
# One would guess: FixedSizeList is the type for embeddings of one width, and a null in it survives a Parquet file, as in Arrow IPC.
# What happens: pyarrow 24 raises an error on writing. pyarrow 26 writes and reads such a file (arrow issue 35692), and pyarrow 24
#   cannot read it. Plain lists of the same rows pass through both versions.
# Who is hurt: whoever stores embeddings of pairs where some items lack a modality, and hands the file to older readers.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
for version in 24.0.0 26.0.1; do
  python3 -m pip install --quiet --disable-pip-version-check --target "$place/$version" numpy==2.4.6 "pyarrow==$version"
done
cat > write.py <<'PY'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

numbers = pa.array(np.arange(6, dtype=np.float32))
fixed = pa.FixedSizeListArray.from_arrays(numbers, 2, mask=pa.array([False, True, False]))
plain = pa.array([[0, 1], None, [4, 5]], pa.list_(pa.float32()))
for name, array in (("fixed", fixed), ("plain", plain)):
    try:
        pq.write_table(pa.table({"embedding": array}), f"{sys.argv[1]}-{name}.parquet")
        print(f"pyarrow {pa.__version__} wrote {name}")
    except pa.ArrowException as error:
        print(f"pyarrow {pa.__version__} did not write {name}: {type(error).__name__}: {error}")
PY
cat > read.py <<'PY'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

for file in sys.argv[1:]:
    try:
        print(f"pyarrow {pa.__version__} read {file}: {pq.read_table(file)['embedding'].to_pylist()}")
    except pa.ArrowException as error:
        print(f"pyarrow {pa.__version__} did not read {file}: {type(error).__name__}: {error}")
PY
{
  PYTHONPATH=24.0.0 python3 write.py old
  PYTHONPATH=26.0.1 python3 write.py new
  PYTHONPATH=26.0.1 python3 read.py new-fixed.parquet new-plain.parquet old-plain.parquet
  PYTHONPATH=24.0.0 python3 read.py new-fixed.parquet new-plain.parquet old-plain.parquet
} | tee said.txt
grep -q "^pyarrow 24.0.0 did not write fixed: ArrowNotImplementedError" said.txt
grep -q "^pyarrow 24.0.0 did not read new-fixed.parquet: ArrowInvalid" said.txt
grep -qF "pyarrow 26.0.1 read new-fixed.parquet: [[0.0, 1.0], None, [4.0, 5.0]]" said.txt
test "$(grep -cE 'read (new|old)-plain.parquet: \[\[0.0, 1.0\], None, \[4.0, 5.0\]\]' said.txt)" = 4
