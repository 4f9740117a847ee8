#!/usr/bin/env bash
# FAISS's flat inner-product index lists equal rows in reverse order, the flat L2 index in order; the first one depends on k.
#
# One would guess: exact search of equal rows gives them by position, and a larger k continues the list of a smaller one.
# What happens: with inner products, k=1 finds row 0, k=5 begins with row 4, k=10 with row 9. L2 begins with row 0 for each.
# Who is hurt: evaluations of retrieval with repeated captions or pictures: R@1 and the hit shown change with k and the metric.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" numpy==2.4.6 faiss-cpu==1.15.1
PYTHONPATH="$place" python3 - <<'PY'
import faiss
import numpy as np

rows = np.tile(np.array([[1, 0, 0, 0]], np.float32), (30, 1))
for kind in (faiss.IndexFlatIP, faiss.IndexFlatL2):
    index = kind(4)
    index.add(rows)
    found = {k: index.search(rows[:1], k)[1][0].tolist() for k in (1, 5, 10)}
    print(f"faiss {faiss.__version__} {kind.__name__}: {found}")
    first = [found[k][0] for k in (1, 5, 10)]
    assert first == ([0, 4, 9] if kind is faiss.IndexFlatIP else [0, 0, 0]), first
PY
