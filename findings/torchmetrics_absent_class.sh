#!/usr/bin/env bash
# Average precision of a class without examples: left out of the mean for multiclass input, counted as 0 for multilabel input.
#
# One would guess: the same truth gives the same macro average, whether it is written as class numbers or one-hot.
# What happens: a perfect ranking with one class that does not occur scores 1.0 as multiclass and 0.67 as multilabel; the
#   absent class is nan in one and -0.0 in the other.
# Who is hurt: long-tailed and audio-tagging benchmarks, whose rare classes are missing from small test splits.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 torchmetrics==1.9.0
"$place/env/bin/python" - <<'PY'
import math
import warnings

import torch
import torchmetrics
from torchmetrics.classification import MulticlassAveragePrecision, MultilabelAveragePrecision

warnings.simplefilter("ignore")
scores = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
classes = torch.tensor([0, 0, 1])  # class 2 does not occur
one_hot = torch.nn.functional.one_hot(classes, 3)
single = MulticlassAveragePrecision(3, average=None)(scores, classes)
several = MultilabelAveragePrecision(3, average=None)(scores, one_hot)
means = [float(MulticlassAveragePrecision(3)(scores, classes)), float(MultilabelAveragePrecision(3)(scores, one_hot))]
print(f"torchmetrics {torchmetrics.__version__}: multiclass {single.tolist()}, multilabel {several.tolist()}, means {means}")
assert math.isnan(single[2]) and several[2] == 0
assert means[0] == 1.0 and abs(means[1] - 2 / 3) < 1e-6
PY
