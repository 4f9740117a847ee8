"""AugMix: each change, its shares, and what the generator decides."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.augmix import CHANGES, AugMix, AugMixParameters, changed


def pictures(count: int = 6, side: int = 12) -> Tensor:
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_generator_decides_the_mixture_and_a_share_of_the_batch_is_its_rows() -> None:
    images, mixer = pictures(), AugMix()
    one, two = (mixer.draw(6, torch.Generator().manual_seed(1)) for _ in range(2))
    whole = mixer.apply(images, one)
    assert torch.equal(whole, mixer.apply(images, two))
    assert torch.equal(whole[1::2], mixer.apply(images[1::2], one.take(slice(1, None, 2))))
    assert not torch.allclose(whole, mixer.apply(images, mixer.draw(6, torch.Generator().manual_seed(2))), atol=0.02)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1


def test_draws_have_their_ranges_and_shares_sum_to_one() -> None:
    drawn = AugMix(severity=3.0).draw(500, torch.Generator().manual_seed(0))
    lengths = (drawn.change >= 0).sum(2)
    assert set(lengths.unique().tolist()) == {1, 2, 3}
    assert set(drawn.change.unique().tolist()) == set(range(-1, len(CHANGES)))
    assert 0.1 <= float(drawn.level.min()) < 0.2
    assert 2.9 < float(drawn.level.max()) <= 3
    torch.testing.assert_close(drawn.weights.sum(1), torch.ones(500))
    assert float(drawn.weights[:, 0].mean()) == pytest.approx(1 / 3, abs=0.03)
    assert float(drawn.clean.mean()) == pytest.approx(0.5, abs=0.05)


def test_a_mixture_is_the_images_share_and_the_chains() -> None:
    images = pictures(2)
    drawn = AugMixParameters(
        torch.tensor([[[4, -1, -1], [1, 4, -1]]]).expand(2, -1, -1),
        torch.full((2, 2, 3), 5.0),
        torch.ones(2, 2, 3),
        torch.tensor([[0.25, 0.75]]).expand(2, -1),
        torch.tensor([0.0, 0.5]),
    )
    first = tv.solarize(images, 128).float() / 255
    second = tv.solarize(tv.equalize(images), 128).float() / 255
    mix = 0.25 * first + 0.75 * second
    found = AugMix(chains=2).apply(images, drawn)
    torch.testing.assert_close(found[0], mix[0])
    torch.testing.assert_close(found[1], 0.5 * images[1].float() / 255 + 0.5 * mix[1])


@pytest.mark.parametrize("change", ["rotate", "shear-x", "shear-y", "translate-x", "translate-y", "posterize"])
def test_changes_of_place_equal_torchvisions(change: str) -> None:
    images, level = pictures(1, 31), torch.tensor([4.0])
    found = changed(images, change, level, torch.ones(1))
    given = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    if change == "posterize":
        assert torch.equal(found, tv.posterize(images, 3))
        return
    degrees = float(torch.atan(torch.tensor(0.12)).rad2deg())
    given |= {
        "rotate": {"angle": -12.0},
        "shear-x": {"shear": [-degrees, 0.0]},
        "shear-y": {"shear": [0.0, -degrees]},
        "translate-x": {"translate": [-4, 0]},
        "translate-y": {"translate": [0, -4]},
    }[change]
    want = tv.affine(images, **given)
    other = tv.affine(
        images, **{k: [-x for x in v] if isinstance(v, list) else -v if k == "angle" else v for k, v in given.items()}
    )
    equal = [float((found == one).float().mean()) for one in (want, other)]
    assert max(equal) > 0.97, equal


@pytest.mark.parametrize("change", ["autocontrast", "equalize"])
def test_stretched_and_equalised_channels_equal_torchvisions(change: str) -> None:
    images = pictures(3, 40) // 2 + 20
    images[0, 1] = 7
    images[1] = images[1] // 100
    found = changed(images, change, torch.ones(3), torch.ones(3))
    want = getattr(tv, change)(images)
    assert int((found.int() - want.int()).abs().max()) <= (1 if change == "autocontrast" else 0)
    assert not torch.equal(found, images)
    small = pictures(2, 4)  # fewer pixels than levels: no step
    assert torch.equal(changed(small, "equalize", torch.ones(2), torch.ones(2)), tv.equalize(small))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(CounterpointError, match="severity above"):
        AugMix(severity=0.0)
    with pytest.raises(CounterpointError, match="at least one chain"):
        AugMix(chains=0)
