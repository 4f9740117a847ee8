"""Compare our batched views with kornia's, and with torchvision's transforms image by image.

    python benchmarks/views.py        writes results/bench/views.json

The recipes are those of SimCLR for CIFAR (crop, flip, colour jitter, grey) and for ImageNet (blur as well). Each makes two views
of 256 uint8 images, as normalised floats, on 2 threads. The three take turns in one process. Times are medians over the rounds,
and ratios are those of the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

BATCH, ROUNDS = 256, 9
OUT = Path(__file__).parents[1] / "results" / "bench" / "views.json"


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    import kornia
    import kornia.augmentation as K
    import torch
    import torchvision.transforms.v2 as T
    from sides import ratio

    from counterpoint.engine.run import machine, versions
    from counterpoint.views.images import MEAN, RECIPES, STD, ViewPipeline

    torch.set_num_threads(2)
    torch.zeros(8_000_000)  # as training would, lets the allocator keep its memory instead of returning it each time

    def ours(size: int, name: str) -> Callable[[torch.Tensor], object]:
        pipeline, generator = ViewPipeline(size, 2, name), torch.Generator().manual_seed(0)
        return lambda images: pipeline(images, generator)

    def kornias(size: int, name: str) -> Callable[[torch.Tensor], object]:
        r = RECIPES[name][0][0]
        taps = max(3, round(size / 10) // 2 * 2 + 1)
        steps = [
            K.RandomResizedCrop((size, size), scale=r.scale, ratio=r.ratio),
            K.RandomHorizontalFlip(p=r.flip),
            K.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue, p=r.jitter),
            K.RandomGrayscale(p=r.grey),
        ]
        steps += [K.RandomGaussianBlur((taps, taps), r.sigma, p=r.blur)] if r.blur else []
        run = torch.nn.Sequential(*steps, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
        return lambda images: [run(images.float() / 255) for _ in range(2)]

    def torchvisions(size: int, name: str) -> Callable[[torch.Tensor], object]:
        r = RECIPES[name][0][0]
        taps = max(3, round(size / 10) // 2 * 2 + 1)
        steps = [
            T.RandomResizedCrop(size, scale=r.scale, ratio=r.ratio, antialias=False),
            T.RandomHorizontalFlip(r.flip),
            T.RandomApply([T.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue)], r.jitter),
            T.RandomGrayscale(r.grey),
        ]
        steps += [T.RandomApply([T.GaussianBlur(taps, r.sigma)], r.blur)] if r.blur else []
        run = T.Compose([*steps, T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])
        return lambda images: [torch.stack([run(image) for image in images]) for _ in range(2)]

    found = {}
    for size in (32, 64):
        images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
        for name in ("simclr-cifar", "simclr"):
            runs = {
                "ours": ours(size, name),
                "kornia": kornias(size, name),
                "torchvision, image by image": torchvisions(size, name),
            }
            times: dict[str, list[float]] = {who: [] for who in runs}
            for round_ in range(ROUNDS + 1):
                for who, run in runs.items():
                    started = time.perf_counter()
                    run(images)
                    if round_:  # the first warms up
                        times[who].append(time.perf_counter() - started)
            found[f"{name}, {size} px"] = {
                who: {
                    "milliseconds": round(1000 * statistics.median(t), 1),
                    "views_per_second": round(2 * BATCH / statistics.median(t)),
                    "times_ours": round(ratio(t, times["ours"]), 2),
                }
                for who, t in times.items()
            }
            print(f"{name}, {size} px: {json.dumps(found[f'{name}, {size} px'])}")
    record = {
        "what": f"two views of {BATCH} uint8 images to normalised floats, 2 threads, medians of {ROUNDS} rounds",
        "settings": found,
        "machine": machine(),
        "versions": {**versions(), "kornia": kornia.__version__},
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
