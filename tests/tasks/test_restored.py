"""The task `restored`: its measures against a calculation by hand, its batches, its reference, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from counterpoint import data
from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.engine.loading import Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.measures.restored import luma, psnr, restoration, shaved, ssim
from counterpoint.tasks.restored import RestoredConfig, RestoredTask, worst_part
from counterpoint.views.images.degraded import upscaled

SMALL: dict[str, Any] = {"scale": 2, "patch": 16, "batch_size": 8, "network": "edsr-s"}


def pair(seed: int = 0, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 256, (2, 3, size, size + 3)) / 255
    return torch.from_numpy(truth + 0.1 * rng.standard_normal(truth.shape)), torch.from_numpy(truth)


def test_psnr_and_high_frequency_error_equal_a_calculation_by_hand() -> None:
    restored, truth = pair()
    found = restoration(restored, truth, 3)
    ours, theirs = ((x.clamp(0, 1).numpy() * 255).round()[:, :, 3:-3, 3:-3] for x in (restored, truth))
    for n in range(2):
        y = [16 + (65.481 * x[n, 0] + 128.553 * x[n, 1] + 24.966 * x[n, 2]) / 255 for x in (ours, theirs)]
        assert float(found["psnr"][n]) == pytest.approx(10 * np.log10(255**2 / np.mean((y[0] - y[1]) ** 2)))
        d = np.pad((ours - theirs)[n], ((0, 0), (0, 0), (0, 1)), mode="reflect")
        p, q, r, s = d[:, ::2, ::2], d[:, ::2, 1::2], d[:, 1::2, ::2], d[:, 1::2, 1::2]
        bands = np.abs([(p + q - r - s) / 2, (p - q + r - s) / 2, (p - q - r + s) / 2])
        assert float(found["high_frequency_error"][n]) == pytest.approx(bands.mean())


def test_ssim_equals_a_calculation_by_hand() -> None:
    restored, truth = (luma(x.clamp(0, 1)) for x in pair())
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, taps, 0), taps, 1)[5:-5, 5:-5]

    for n in range(2):
        a, b = restored[n, 0].numpy(), truth[n, 0].numpy()
        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        one, two = 2.55**2, 7.65**2
        index = (2 * ma * mb + one) * (2 * cov + two) / ((ma**2 + mb**2 + one) * (va + vb + two))
        assert float(ssim(restored, truth)[n]) == pytest.approx(index.mean())
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1])


@pytest.mark.slow  # its import takes 3 seconds
def test_both_measures_equal_torchmetrics_where_its_window_fits_the_picture() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    restored, truth = (luma(x.clamp(0, 1)) for x in pair())
    options: dict[str, Any] = {"reduction": "none", "data_range": 255.0}
    whole, places = image.structural_similarity_index_measure(restored, truth, **options, return_full_image=True)
    torch.testing.assert_close(ssim(restored, truth), places[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=1e-6, atol=1e-6)
    assert (whole - ssim(restored, truth)).abs().max() > 1e-3  # it also averages over the reflected border
    theirs = image.peak_signal_noise_ratio(restored, truth, dim=(1, 2, 3), **options)
    torch.testing.assert_close(psnr(restored, truth), theirs.double(), rtol=1e-6, atol=1e-6)


def test_white_black_and_sizes_have_their_values() -> None:
    ends = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert luma(ends).flatten().tolist() == pytest.approx([16, 235])
    restored, truth = pair(size=10)
    found = restoration(restored[..., :10], truth[..., :10], 0)
    assert found["ssim"].isnan().all()  # no window of 11 pixels fits
    assert found["psnr"].isfinite().all()
    with pytest.raises(ValueError, match="border"):
        shaved(truth, 5)
    with pytest.raises(ValueError, match="restored must be at least 11"):
        ssim(truth, truth)


def test_bicubic_scaling_reaches_its_own_reference_and_exact_pictures_are_counted() -> None:
    task = RestoredTask(data.load("digits?size=16&train=20"), RestoredConfig(**SMALL))
    evaluator = task.evaluator("valid")
    for batch in task.evaluation_loader("valid"):
        evaluator.update(batch, {"restored": upscaled(batch["low"], 2)})
    assert evaluator.compute() == evaluator.chance()
    assert evaluator.compute()["psnr"] > 15
    evaluator.reset()
    batch = task.evaluation_batch("valid", [0, 1])
    restored = batch["high"].clone()
    restored[1] += 0.1
    evaluator.update(batch, {"restored": restored})
    found = evaluator.compute()
    assert found["exact_pictures"] == 0.5
    assert found["psnr"] == pytest.approx(float(restoration(restored[1:], batch["high"][1:], 2)["psnr"]))
    with pytest.raises(CounterpointError, match="NaN"):
        evaluator.update(batch, {"restored": restored * torch.nan})


def test_an_epoch_cuts_several_patches_of_each_picture_and_drops_a_partial_batch() -> None:
    task = RestoredTask(data.load("digits?size=16&train=20"), RestoredConfig(**SMALL, repeats=3))
    rows = [row for batch in task.train_loader(0, Position()) for row in batch["index"].tolist()]
    assert len(rows) == 56
    counts = np.bincount(rows)
    assert counts.max() == 3
    assert counts.sum() == 56
    assert sorted(rows[:20]) == list(range(20))


def test_pictures_are_cut_to_multiples_of_the_scale() -> None:
    source = data.load("digits?size=17&train=20")
    task = RestoredTask(source, RestoredConfig(**SMALL | {"scale": 3, "patch": 15}))
    batch = task.evaluation_batch("test", [0])
    assert batch["high"].shape == (1, 3, 15, 15)
    assert batch["low"].shape == (1, 3, 5, 5)
    assert torch.equal(batch["high"], batch["image"][..., :15, :15] / 255)


def test_the_part_where_bicubic_errs_most_is_found() -> None:
    error = torch.zeros(80, 60)
    error[50:60, 30:40] = 1
    down, across = worst_part(error, 2)
    assert down.start <= 50
    assert down.stop >= 60
    assert across.start <= 30
    assert across.stop >= 40
    assert (down.stop - down.start, across.stop - across.start) == (32, 32)


def test_data_that_do_not_fit_are_refused_by_name() -> None:
    tiny = data.load("digits?size=8&train=20")
    with pytest.raises(DataError, match="size=32"):
        RestoredTask(tiny, RestoredConfig(**SMALL | {"scale": 4, "patch": 16}))
    for settings, words in (({}, "--patch 16 exceeds the 8 pixels"), ({"patch": 8, "batch_size": 64}, "--repeats")):
        with pytest.raises(DataError, match=words):
            RestoredTask(tiny, RestoredConfig(**SMALL | {"repeats": 1} | settings)).check_training()
    one = ArrayImages(np.zeros((1, 16, 16), np.uint8))
    many = ArrayImages(np.zeros((20, 16, 16), np.uint8))
    with pytest.raises(DataError, match="valid split"):
        RestoredTask(ImageData("mine", many, one, many, (), 16), RestoredConfig(**SMALL)).check_training()
    RestoredTask(tiny, RestoredConfig(**SMALL)).check_facts({"size": 99, "channels": 3})  # any size is restored
