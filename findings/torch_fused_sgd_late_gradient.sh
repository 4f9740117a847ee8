#!/usr/bin/env bash
# PyTorch's fused SGD with momentum fails where a parameter gets its first gradient later than another one; the others do not.
#
# One would guess: `fused=True` is a faster way to the same step, so what trains without it trains with it.
# What happens: after a step in which only one of two parameters had a gradient, the next step raises a TypeError, because the
# other's momentum buffer is still None. The plain and the foreach step make the buffer and go on. (Fused Adam does, too.)
# Who is hurt: training that freezes layers in its first epochs (DINO's last layer, SwAV's prototypes), thaws a backbone, or has
# branches that some batches do not reach. It fails in mid-training, at the first step after the thaw.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place" torch==2.14.1
PYTHONPATH="$place" python3 - <<'PY'
import torch

print("torch", torch.__version__)
seen = {}
for options in ({}, {"foreach": True}, {"fused": True}):
    first, late = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([first, late], lr=0.1, momentum=0.9, **options)
    first.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.ones(2)
    name = next(iter(options), "plain")
    try:
        optimizer.step()
        seen[name] = [round(p[0].item(), 4) for p in (first, late)]
    except TypeError as error:
        seen[name] = f"TypeError: {error}"
    print(f"{name}: {seen[name]}")
assert seen["plain"] == seen["foreach"] == [0.71, 0.9], seen
assert seen["fused"] == "TypeError: expected Tensor as element 1 in argument 2, but got NoneType", seen
PY
