#!/usr/bin/env bash
# PyTorch leaves the weight gradient of a strided bf16 convolution on a map of one place partly unset, on a CPU.
#
# One would guess: a 3 x 3 convolution of stride 2 and padding 1 has the same gradient in bf16 as in float32, up to rounding. On a
# map of one place only the kernel's centre sees a value, so eight of the nine places of the weight have the gradient 0.
# What happens: on a CPU with bf16 instructions (oneDNN) the gradient keeps numbers that were in memory before, often NaN. Stride
# 1, maps of 2 x 2 places, and float32 are right.
# Who is hurt: networks of several strided convolutions on small patches (critics, patch discriminators, encoders of 16-pixel
# pictures) trained with autocast on a CPU: the last maps have one place, and the loss becomes NaN after some steps.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" torch==2.14.1
OMP_NUM_THREADS=1 PYTHONPATH="$place" python3 - <<'PY'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)


def wrong(dtype: torch.dtype, size: int, stride: int) -> int:
    """Count the runs of 40 whose gradient differs from that in float64 by more than a tenth."""
    found = 0
    for seed in range(40):
        torch.manual_seed(seed)
        used = torch.full((64, 64, 3, 3), float("nan"), dtype=dtype)  # memory that the gradient may receive
        del used
        x, w = torch.randn(8, 64, size, size), torch.randn(64, 64, 3, 3) / 24
        gradients = []
        for kind in (dtype, torch.float64):
            weight = w.detach().to(kind).requires_grad_()
            F.conv2d(x.to(kind), weight, stride=stride, padding=1).square().sum().backward()
            gradients.append(weight.grad.double())
        apart = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
        found += not bool(apart < 0.1)  # NaN is not
    return found


seen = {}
for dtype, size, stride in ((torch.bfloat16, 1, 2), (torch.bfloat16, 1, 1), (torch.bfloat16, 2, 2), (torch.float32, 1, 2)):
    seen[str(dtype), size, stride] = wrong(dtype, size, stride)
    print(f"{dtype}, map {size} x {size}, stride {stride}: {seen[str(dtype), size, stride]} of 40 gradients wrong")
first, *others = seen.values()
assert first > 0 and not any(others), seen
PY
