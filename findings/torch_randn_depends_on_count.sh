#!/usr/bin/env bash
# torch.randn on a CPU: the first numbers of a seed depend on how many are drawn at once, from 16 numbers on.
#
# One would guess: with one seed, the first picture's noise is the same whether one, two or eight pictures are drawn. So it is for
#   torch.rand.
# What happens: below 16 numbers in all, normal numbers are drawn one after another. From 16 on they are made in blocks of 16, and
#   the last 16 are drawn again where 16 does not divide the number. So the first row of [1, 8], [2, 8] and [3, 8] is not one row.
# Who is hurt: generators with small latent vectors (GANs, tabular diffusion) whose "same seed, same picture" holds for one number of
#   pictures only; tests that compare a batch with its single rows.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" torch==2.14.1 numpy==2.4.6
PYTHONPATH="$place" python3 - <<'PY'
import torch


def first(make, rows, width):
    """Return the first row of so many rows, drawn with seed 0."""
    return make(rows, width, generator=torch.Generator().manual_seed(0))[0].tolist()


normal = [first(torch.randn, rows, 8) for rows in (1, 2, 3)]
wide = [first(torch.randn, rows, 16) for rows in (1, 2, 3)]
uniform = [first(torch.rand, rows, 8) for rows in (1, 2, 3)]
print(f"torch {torch.__version__}, first number of the first row of 1, 2 and 3 rows")
print("randn, rows of 8: ", [round(row[0], 4) for row in normal], "equal rows:", [row == normal[0] for row in normal])
print("randn, rows of 16:", [round(row[0], 4) for row in wide], "equal rows:", [row == wide[0] for row in wide])
print("rand, rows of 8:  ", [round(row[0], 4) for row in uniform], "equal rows:", [row == uniform[0] for row in uniform])
assert normal[0] != normal[1], normal
assert wide[0] == wide[1] == wide[2]
assert uniform[0] == uniform[1] == uniform[2]
PY
