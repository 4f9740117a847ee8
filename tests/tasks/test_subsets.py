"""Subsets of modalities, by name, and corruptions of one."""

import torch

from counterpoint.tasks.subsets import corrupted, corruptions, initials, subsets
from counterpoint.views.images import denormalise, normalise


def test_subsets_are_named_by_first_letters_from_one_to_all():
    found = subsets(["rgb", "depth", "event", "lidar"])
    assert len(found) == 15
    assert found["r"] == (0,)
    assert found["del"] == (1, 2, 3)
    assert list(found)[-1] == "rdel"


def test_names_with_a_common_beginning_are_told_apart():
    assert initials(["image", "aolp", "dolp", "nir", "depth"]) == ["i", "a", "do", "n", "de"]
    assert initials(["nir", "nir2"]) == ["nir", "nir2"]
    assert len(subsets(["nir", "nir2"])) == 3


def test_many_modalities_are_measured_alone_without_one_and_together():
    assert len(subsets([f"{n} sensor" for n in range(8)])) == 17


def test_a_single_modality_is_not_corrupted():
    assert corruptions(["image"]) == {}
    assert list(corruptions(["rgb", "depth"])) == ["night", "noise_r", "noise_d"]


def test_noise_depends_on_the_position_alone():
    pictures = normalise(torch.rand(3, 3, 4, 4))
    one = corrupted(pictures, "noise", torch.tensor([4, 5, 6]))
    other = corrupted(pictures[1:] * 0, "noise", torch.tensor([5, 6]))
    assert torch.equal(one[1:], other)
    assert not torch.equal(one[0], one[1])
    assert 0 <= denormalise(one).min() < denormalise(one).max() <= 1


def test_a_night_is_a_twentieth_as_bright():
    pictures = normalise(torch.rand(2, 3, 4, 4))
    dark = corrupted(pictures, "night", torch.tensor([0, 1]))
    torch.testing.assert_close(denormalise(dark), 0.05 * denormalise(pictures), atol=1e-6, rtol=1e-4)
