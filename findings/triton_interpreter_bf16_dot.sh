#!/usr/bin/env bash
# Triton's interpreter multiplies bf16 matrices wrongly, without an error.
#
# One would guess: TRITON_INTERPRET=1 runs a kernel on the processor, slowly, with the results of a GPU up to rounding.
# What happens: numpy has no bf16, so the interpreter holds it as 16-bit integers. tl.dot multiplies these integers: the result is
# off by a factor of a million and more. float32 and float16 operands are right. So is a bf16 load, a cast and a store.
# Who is hurt: everybody who tests kernels for half precision in CI, where there is no GPU. A test that compares two runs of the
# interpreter passes. One way round it: cast both operands to float32 in the kernel under test.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cat > run.py <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, CAST: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    if CAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(out + at, tl.dot(x, y))


torch.manual_seed(0)
x, y = torch.randn(16, 16), torch.randn(16, 16)
found = {}
for name, dtype, cast in (("float32", torch.float32, False), ("float16", torch.float16, False),
                          ("bfloat16", torch.bfloat16, False), ("bfloat16, cast", torch.bfloat16, True)):
    a, b = x.to(dtype), y.to(dtype)
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, CAST=cast)
    wanted = a.double() @ b.double()
    found[name] = float((out - wanted).abs().max() / wanted.abs().max())
    print(f"{name:15} largest error / largest entry: {found[name]:.2g}")
print("triton", triton.__version__, "torch", torch.__version__)
assert found["float32"] < 1e-5 and found["float16"] < 1e-5 and found["bfloat16, cast"] < 1e-5, "changed"
assert found["bfloat16"] > 1e3, "the interpreter multiplies bf16 rightly now"
PY
env/bin/python run.py
