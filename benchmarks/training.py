"""Measure training steps end to end: examples a second of this build, of another build, and of lightly's own loop.

    python benchmarks/training.py [--base CHECKOUT] [--rounds 5] [--cases simclr clip macil-sd]

"compiled" is this build with `--compile`; its first step, which compiles, is in the record as well.
Every measurement is a separate process, on all cores. Builds take turns, round by round; the record has the ratio of medians.
A step's time is from the end of one step to the end of the next: reading, views, forward, backward and the optimiser. The
data is cifar10 from $COUNTERPOINT_DATA (SimCLR), glyphs (CLIP) and async-bags (MACIL-SD).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    # system: data, settings, steps measured
    "simclr": ("cifar10", {"encoder": "resnet-s", "batch_size": 256, "epochs": 1}, 14),
    "clip": ("glyphs", {"epochs": 1, "batch_size": 256}, 24),
    "macil-sd": ("async-bags?train=640", {"epochs": 6, "batch_size": 32}, 80),
}
COMPILED = ("simclr",)  # measured with --compile as well
STEPS = """
import json, resource, sys, time
import torch
slug, data, settings, wanted, compiled = json.loads(sys.argv[1])
ends = []
class Enough(Exception): pass
from counterpoint.engine.learner import Learner
def ended(self):
    ends.append(time.perf_counter())
    if len(ends) > wanted: raise Enough
try:
    from counterpoint.experiment import Experiment
    from counterpoint.engine.options import Loop
    loop = {"loop": Loop(compile=True)} if compiled else {}
    run = lambda: Experiment.resolve(slug, data, overrides=settings).run(0, **loop)
except ImportError:
    from dataclasses import replace
    from counterpoint import catalog, training
    def run():
        system = catalog.load_system(slug)
        config = replace(training.default_config(slug, data), **settings)
        return training.fit_alone(system, config, training.load_source(system, data), 0)
from counterpoint import catalog
kind = catalog.load_system(slug).learner
plain = kind.end_step
def step(self):
    plain(self)
    ended(self)
kind.end_step = step
begun = time.perf_counter()
try:
    run()
except Enough:
    pass
steps = [b - a for a, b in zip(ends, ends[1:])][3:]
print(json.dumps({"steps": steps, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "first": ends[0] - begun}))
"""
LIGHTLY = """
import json, resource, sys, time
import numpy as np, torch, torchvision
from PIL import Image
from torch import nn
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from counterpoint.data import load
from counterpoint.encoders.images import build_image_encoder
workers, wanted = json.loads(sys.argv[1])
split = load("cifar10", task="views").train
pixels = split.images(np.arange(min(len(split), 256 * (wanted + 2))))
class Images(torch.utils.data.Dataset):
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    def __len__(self): return len(pixels)
    def __getitem__(self, i): return self.transform(Image.fromarray(pixels[i]))
encoder = build_image_encoder("resnet-s", 32)
head = SimCLRProjectionHead(encoder.dim, 512, 128)
loss_of = NTXentLoss(0.5)
both = nn.ModuleList([encoder, head])
optimizer = torch.optim.SGD(both.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
loader = torch.utils.data.DataLoader(Images(), batch_size=256, shuffle=True, drop_last=True, num_workers=workers)
ends = []
for first, second in loader:
    z1, z2 = (head(encoder(x)) for x in (first, second))
    loss = loss_of(z1, z2)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    ends.append(time.perf_counter())
    if len(ends) > wanted: break
print(json.dumps({"steps": [b - a for a, b in zip(ends, ends[1:])][3:],
                  "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def measured(code: str, argument: object, source: Path) -> dict[str, Any]:
    """Run code against a build; return seconds of its steps, peak memory in KiB, and seconds to the end of the first step.

    The compiler's cache is empty at the start.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "PYTHONPATH": f"{source / 'src'}:{os.environ.get('PYTHONPATH', '')}",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        found = subprocess.run(
            [sys.executable, "-c", code, json.dumps(argument)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    figures: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a checkout of the build to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=[*CASES, "lightly"], choices=[*CASES, "lightly"])
    arguments = parser.parse_args()
    report: dict[str, object] = {}
    for name in arguments.cases:
        if name == "lightly":
            data, settings, steps = CASES["simclr"]
            rivals = {
                "counterpoint": (STEPS, ["simclr", data, settings, steps, False], ROOT),
                "lightly, 2 workers": (LIGHTLY, [2, steps], ROOT),
                "lightly, no workers": (LIGHTLY, [0, steps], ROOT),
            }
        else:
            rivals = {"counterpoint": (STEPS, [name, *CASES[name], False], ROOT)}
            if name in COMPILED:
                rivals["compiled"] = (STEPS, [name, *CASES[name], True], ROOT)
            if arguments.base:
                rivals["base"] = (STEPS, [name, *CASES[name], False], arguments.base)
        times: dict[str, list[float]] = {rival: [] for rival in rivals}
        firsts: dict[str, list[float]] = {rival: [] for rival in rivals}
        memory: dict[str, int] = {}
        for _ in range(arguments.rounds):
            for rival, what in rivals.items():
                figures = measured(*what)
                times[rival].append(statistics.median(figures["steps"]))
                firsts[rival] += [figures["first"]] if "first" in figures else []
                memory[rival] = max(figures["memory"], memory.get(rival, 0))
        medians = {rival: statistics.median(values) for rival, values in times.items()}
        own = medians["counterpoint"]
        rows = {
            rival: {"ms": round(1000 * value, 1), "times": round(value / own, 3), "memory_mib": memory[rival] // 1024}
            | ({"first_step_s": round(statistics.median(firsts[rival]), 1)} if firsts[rival] else {})
            for rival, value in medians.items()
        }
        report[name] = rows
        print(name, json.dumps(rows), flush=True)
    file = ROOT / "results" / "bench" / "training.json"
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(held | report, indent=1) + "\n")


if __name__ == "__main__":
    main()
