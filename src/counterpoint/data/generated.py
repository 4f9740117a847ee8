"""Generated images beside real ones: a diffusion model or a mixture fitted to a training split, or a folder made elsewhere.

A generator's images depend on the real images, its settings and a seed. The cache keeps them under a key of all three. A
generator sees only the training split, without labels.

    diffusion   a denoising diffusion model (DDPM, Ho et al. 2020) of the library diffusers: a U-Net of 1 to 3 million weights,
                trained here for `STEPS` steps of 64 images, sampled by DDIM in 50 steps. On a few cores it takes minutes for
                images of 8 pixels, and an hour for some thousands of images of 32 pixels
    mixture     ten Gaussians with one covariance over the first 15 principal components, for a few small images: seconds
    a folder    every image in it and below, links followed, in the order of paths
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import cached
from counterpoint.data.accounts import Accounts
from counterpoint.data.devices import chosen_device
from counterpoint.data.images import ArrayImages, ImageData, ImageSplit, Indices, Pixels
from counterpoint.data.own.contracts import OwnImages
from counterpoint.data.own.folders import PICTURE, plain_folder
from counterpoint.data.own.places import is_folder
from counterpoint.data.own.reader import Reader
from counterpoint.data.own.roles import Role, Roles
from counterpoint.data.own.sources import Wanted
from counterpoint.errors import CounterpointError, DataError
from counterpoint.waiting import patient_track

VERSION = 1
STEPS, BATCH, SAMPLING = 4000, 64, 50


class InflatedImages:
    """`replication` copies of the real images, then the generated ones; each is read from its own split.

    Args:
        real: N real images.
        generated: M generated images; their label is -1.
        replication: number of copies, at least 0.
    """

    def __init__(self, real: ImageSplit, generated: ImageSplit, replication: int) -> None:
        self.real, self.generated, self.replication = real, generated, replication
        self.copied = len(real) * replication
        labels = np.full(len(real), -1, np.int64) if real.labels is None else np.asarray(real.labels)
        self._labels = np.concatenate([np.tile(labels, replication), np.full(len(generated), -1, np.int64)])

    def __len__(self) -> int:
        return self.copied + len(self.generated)

    @property
    def labels(self) -> Indices | None:
        return None if self.real.labels is None else self._labels

    def images(self, indices: Indices) -> Pixels:
        indices = np.asarray(indices, np.int64)
        copied = indices < self.copied
        if not len(indices):  # a batch that was finished before an interruption
            return self.real.images(indices) if len(self.real) else self.generated.images(indices)
        found: Pixels | None = None
        for split, chosen, at in (
            (self.real, copied, indices % max(1, len(self.real))),
            (self.generated, ~copied, indices - self.copied),
        ):
            if chosen.any():
                part = split.images(at[chosen])
                found = np.empty((len(indices), *part.shape[1:]), np.uint8) if found is None else found
                found[chosen] = part
        assert found is not None
        return found


def generated_images(
    data: ImageData, source: str, count: int, seed: int = 0, *, steps: int = STEPS
) -> tuple[ImageSplit, list[str]]:
    """Return generated images like those of a training split, and notes for the user.

    Args:
        data: the generator learns from its training split.
        source: diffusion, mixture, or the path of a folder.
        count: number of images, at least 1; for a folder 0 takes all.
        seed: seed of the generator's training and draws.
        steps: training steps of the diffusion model.

    Raises CounterpointError for a count below 1 without a folder, and DataError for a folder that does not exist.
    """
    if source not in ("diffusion", "mixture"):
        return _folder(Path(source), data.size, count)
    if count < 1:
        raise CounterpointError(f"generated_count must be at least 1 for {source}, got {count}")
    real = data.train.images(np.arange(len(data.train)))
    # The name is for people; it may contain a path of the user's, which must not lead out of the cache.
    name = re.sub(r"[^\w.-]+", "-", data.name).strip("-.")[-60:]

    def build() -> cached.Arrays:
        made = diffusion(real, count, seed, steps=steps) if source == "diffusion" else mixture(real, count, seed)
        return {"images": made}

    def read(arrays: cached.Arrays) -> Pixels:
        found: Pixels = arrays["images"]
        if found.shape != (count, *real.shape[1:]) or found.dtype != np.uint8:
            raise DataError(f"images of shape {list(found.shape)}, expected {[count, *real.shape[1:]]}")
        return found

    key = (VERSION, source, count, seed, steps, real)
    pixels = cached.build_once("generated", key, build, read, name=f"{name}-{source}-{count}", compress=True)
    return ArrayImages(pixels), []


def _folder(folder: Path, size: int, count: int) -> tuple[ImageSplit, list[str]]:
    """Read the folder's first `count` images, 0 for all; a note counts the files left out, and a file lists them."""
    if not is_folder(folder):
        raise DataError(f"{folder}: no such folder; `generated` must be diffusion, mixture or a folder of images")
    accounts = Accounts(str(folder), f"generated {count}")
    table = plain_folder(folder, count, accounts)
    reader = Reader(table, Roles([Role("image", [PICTURE], "image")]), Wanted(size, 16000, 1), accounts)
    reader.judge(None)
    rows = np.flatnonzero(reader.good)
    accounts.read(table.unit, len(rows))
    accounts.check()
    accounts.write()
    return OwnImages(reader, reader.columns[0], rows), accounts.notes()


def mixture(real: Pixels, count: int, seed: int = 0, *, components: int = 10, kept: int = 15) -> Pixels:
    """Draw images from a Gaussian mixture with one covariance over principal components of the real images.

    Args:
        real: [n, H, W, 3] images, n >= 2.
        count: number of images to draw.
        seed: seed of the fit and the draws.
        components: maximum number of Gaussians.
        kept: maximum number of principal components.

    Returns [count, H, W, 3]. Raises DataError for fewer than two real images.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    if len(real) < 2:
        raise DataError(f"mixture needs at least two images to fit, got {len(real)}; add images")
    rows = real.reshape(len(real), -1).astype(np.float64) / 255
    pca = PCA(min(kept, len(rows) - 1, rows.shape[1]), random_state=seed).fit(rows)
    model = GaussianMixture(min(components, len(rows)), covariance_type="tied", reg_covar=1e-4, random_state=seed)
    model.fit(pca.transform(rows))
    drawn = pca.inverse_transform(model.sample(count)[0])
    drawn = drawn[np.random.default_rng(seed).permutation(count)]
    return np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8).reshape(count, *real.shape[1:])


def _moving(average: Any, new: Any, count: Any) -> Any:
    """Update the moving average of the weights that images are sampled with; it spans few steps at the start."""
    return average + (1 - min(0.995, float((1 + count) / (10 + count)))) * (new - average)


def diffusion(
    real: Pixels,
    count: int,
    seed: int = 0,
    *,
    steps: int = STEPS,
    width: int = 32,
    rate: float = 1e-3,
    bar: bool = True,
) -> Pixels:
    """Train a diffusion model on real images and sample from it.

    Args:
        real: [n, H, W, 3] training images, n >= 1, H = W a multiple of 4.
        count, seed, steps: see `generated_images`.
        width: channels of the U-Net's first level, a multiple of 8; the levels below have twice as many.
        rate: maximum of the learning rate.
        bar: show a progress bar.

    Returns [count, H, W, 3]. Raises CounterpointError when the library diffusers is not installed, or when training
    diverges; DataError for a side that is not a multiple of 4.
    """
    try:
        library: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise CounterpointError(
            "a diffusion model needs the library diffusers: pip install 'counterpoint[generation]'; or name a folder of "
            "generated images"
        ) from error
    import torch

    side = real.shape[1]
    if side % 4:
        raise DataError(f"diffusion needs images whose side is a multiple of 4 pixels, got {side}; set another size")
    device = chosen_device()

    def told(many: int, what: str) -> Any:
        return patient_track(range(many), what) if bar else range(many)

    before = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = library.UNet2DModel(
            sample_size=side,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ).to(device)
        pixels = torch.from_numpy(real).permute(0, 3, 1, 2)  # uint8; only a batch at a time becomes float32
        noising = library.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps), pct_start=0.05)
        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=_moving)
        for _ in told(steps, "training the generator"):
            clean = pixels[torch.randint(len(pixels), (BATCH,))].to(device).float().div_(127.5).sub_(1)
            noise, at = torch.randn_like(clean), torch.randint(1000, (BATCH,), device=device)
            found = model(noising.add_noise(clean, noise, at), at).sample
            loss = torch.nn.functional.mse_loss(found, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if not all(bool(weight.isfinite().all()) for weight in average.parameters()):
            raise CounterpointError("the generator's training diverged: its weights are not finite; try another seed")
        sampler = library.DDIMScheduler.from_config(noising.config)
        sampler.set_timesteps(SAMPLING)
        out: list[NDArray[np.uint8]] = []
        network = average.module.eval()
        with torch.no_grad():
            for number in told(-(-count // 256), "drawing images"):
                x = torch.randn(min(256, count - 256 * number), 3, side, side).to(device)
                for t in sampler.timesteps:
                    x = sampler.step(network(x, t).sample, t, x).prev_sample
                grey = x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
                out.append(grey.permute(0, 2, 3, 1).cpu().numpy())
    finally:
        torch.random.set_rng_state(before)
    return np.concatenate(out)
