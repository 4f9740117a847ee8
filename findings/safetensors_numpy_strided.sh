#!/usr/bin/env bash
# safetensors.numpy writes a transposed or strided array with its numbers in another order.
#
# One would guess: load(save({"a": x.T}))["a"] equals x.T, or an error as safetensors.torch raises for such tensors.
# What happens: the shape is that of x.T, the numbers are those of x in memory order. No error, no warning.
# Who is hurt: whoever exports weights from numpy, where linear layers are often transposed on the way (x.T is no copy).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" numpy==2.4.6 safetensors==0.8.0
PYTHONPATH="$place" python3 - <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, save

x = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, array in (("transposed", x.T), ("every other column", x[:, ::2])):
    back = load(save({"a": array}))["a"]
    print(f"safetensors {safetensors.__version__}, {name}: wrote {array.tolist()}, read {back.tolist()}")
    assert back.shape == array.shape
    assert not np.array_equal(back, array), "mended: what was read is what was written"
    memory = x.ravel()[: array.size] if name == "every other column" else x.ravel()
    assert np.array_equal(back.ravel(), memory)
whole = load(save({"a": np.ascontiguousarray(x.T)}))["a"]
assert np.array_equal(whole, x.T)
print("a contiguous copy comes back as it was")
PY
