#!/usr/bin/env bash
# PyTorch computes binary_cross_entropy_with_logits in the type of the targets, not in the wider of both types.
#
# One would guess: float64 logits with float32 targets give a float64 loss, as mse_loss and smooth_l1_loss do by
# type promotion; or an error, as binary_cross_entropy raises.
# What happens: the loss is float32, and each term has lost nine digits, without a warning. The targets are 0 and 1, which
# float32 holds exactly, so nothing in the input asks for the smaller type.
# Who is hurt: whoever keeps labels in the default type and checks a loss in float64: comparisons with reference numbers fail at
# 1e-8, and finite differences of the loss are wrong in the third digit. Retrieval losses that score a pair as match or not (METER,
# ViLT and distillation after them) are written this way.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" torch==2.14.1
OMP_NUM_THREADS=1 PYTHONPATH="$place" python3 - <<'PY'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
logits = 5 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
narrow, wide = torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)

for name in ("mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"):
    loss = getattr(F, name)
    mixed, exact = loss(logits, narrow, reduction="none"), loss(logits, wide, reduction="none")
    apart = float((mixed.double() - exact).abs().max())
    print(f"{name}: {mixed.dtype}, apart from float64 targets by {apart:.1e}")
    if name.startswith("binary"):
        assert mixed.dtype == torch.float32, mixed.dtype
        assert 1e-8 < apart < 1e-5, apart
    else:
        assert mixed.dtype == torch.float64, mixed.dtype
        assert apart == 0, apart

try:
    F.binary_cross_entropy(logits.sigmoid(), narrow)
except RuntimeError as error:
    print("binary_cross_entropy raises:", str(error).splitlines()[0])
else:
    raise AssertionError("binary_cross_entropy took two types")

step, one = 1e-6, torch.tensor([3.0], dtype=torch.float64)
slopes = [
    float((F.binary_cross_entropy_with_logits(one + step, t[:1]).double() - F.binary_cross_entropy_with_logits(one - step, t[:1]).double()) / (2 * step))
    for t in (narrow, wide)
]
print(f"slope by finite differences: {slopes[0]:.4f} with float32 targets, {slopes[1]:.4f} with float64; exact {float(one.sigmoid()):.4f}")
assert abs(slopes[1] - float(one.sigmoid())) < 1e-6
assert abs(slopes[0] - float(one.sigmoid())) > 1e-3
PY
