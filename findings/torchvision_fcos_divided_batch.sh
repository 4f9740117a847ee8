#!/usr/bin/env bash
# A batch that is divided over processes trains another loss with torchvision's FCOS, but the same loss with its RetinaNet.
#
# One would guess: the mean over processes with one picture each, as DistributedDataParallel takes it, is the loss of both pictures
#   in one process, for every detector of the library.
# What happens: FCOS divides its sums by the objects' places in the process's own pictures, and by 1 where there are none. With an
#   empty picture on the second process, the mean is half of the loss of the batch: 1.42 in place of 2.84. RetinaNet divides by
#   the places of each picture, so its loss stays 0.8933. FCOS's authors divide by the mean count over all processes.
# Who is hurt: people who train FCOS on several GPUs with small batches of each: pictures with few objects weigh more than in one
#   process, and pictures without objects lower the weight of all others. Learning rates do not carry over.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
import torchvision
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator


class Averages(torch.nn.Module):
    """A backbone without weights: averages of 8 x 8 pixels, repeated to 32 channels."""

    out_channels = 32

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, 8).repeat(1, 11, 1, 1)[:, :32]


torch.manual_seed(0)
pictures = [torch.rand(3, 64, 64) for _ in range(2)]
objects = [
    {
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0], [30.0, 20.0, 60.0, 50.0], [8.0, 34.0, 40.0, 62.0]]),
        "labels": torch.tensor([1, 2, 1]),
    },
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
]
anchors = {FCOS: (((8,),), ((1.0,),)), RetinaNet: (((16, 32),), ((0.5, 1.0, 2.0),))}
found = {}
for kind, (sizes, ratios) in anchors.items():
    torch.manual_seed(1)
    detector = kind(Averages(), 3, min_size=64, max_size=64, anchor_generator=AnchorGenerator(sizes, ratios)).train()
    whole = sum(detector(pictures, objects).values()).item()
    each = [sum(detector([one], [of]).values()).item() for one, of in zip(pictures, objects)]
    found[kind] = whole, sum(each) / 2
    print(
        f"torchvision {torchvision.__version__} {kind.__name__}: both pictures {whole:.4f}, one by one "
        f"{each[0]:.4f} and {each[1]:.4f}, their mean {sum(each) / 2:.4f}"
    )
assert abs(found[FCOS][1] / found[FCOS][0] - 0.5) < 0.01
assert abs(found[RetinaNet][1] / found[RetinaNet][0] - 1) < 1e-5
PY
