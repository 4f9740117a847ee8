"""Networks of the two search spaces: published sizes, names, neighbours, costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.maps import vector_and_map
from counterpoint.encoders.spaces import Space, cost, parsed
from counterpoint.errors import CounterpointError


@pytest.mark.parametrize(
    ("name", "millions", "parameters"),
    [
        ("resnet-cifar:9-9-9", 125.75, 855_770 - 650),  # the published ones have a classifier of ten classes
        ("nas-201:3-3-3-3-3-3", 220.12, 1_531_546 - 650),
        ("nas-201:1-1-1-1-1-1", 7.78, 73_306 - 650),
    ],
)
def test_costs_are_the_published_ones(name: str, millions: float, parameters: int) -> None:
    flops, found = cost(name, 32)
    assert flops / 1e6 == pytest.approx(millions, abs=0.005)
    assert found == parameters


@pytest.mark.parametrize("kind", ["resnet-cifar", "nas-201"])
def test_costs_of_all_members_are_sums_over_their_places(kind: str) -> None:
    space = Space(kind, (1, 3), width=4, cells=1)
    costs = space.costs(8)
    assert len(costs) == len(space.members()) == len(set(costs))
    for member in (space.members()[5], space.members()[-2]):
        assert costs[member] == cost(space.name(member), 8)


@pytest.mark.parametrize("name", ["resnet-cifar:1-2-1?width=4", "nas-201:3-1-2-4-0-3?width=4&cells=1"])
@pytest.mark.parametrize("size", [8, 10])
def test_a_member_has_a_map_and_its_mean_for_any_size(name: str, size: int) -> None:
    encoder = build_image_encoder(name, size).eval()
    images = torch.randn(2, 3, size, size)
    vector, found = vector_and_map(encoder, images)
    assert found.shape == (2, 16, -(-size // 4), -(-size // 4))
    assert encoder.dim == 16
    torch.testing.assert_close(vector, encoder(images))


def test_each_operator_of_a_cell_is_the_one_its_number_names() -> None:
    x = torch.randn(2, 4, 6, 6)
    for number, wanted in ((0, torch.zeros_like(x)), (1, x), (4, None)):
        # The last node gets the picture through the edge 0>3 alone.
        cell = build_image_encoder(f"nas-201:0-0-0-{number}-0-0?width=4&cells=1", 8).layer1[0].eval()
        wanted = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if wanted is None else wanted
        torch.testing.assert_close(cell(x), wanted)
    # Skips on the edges 0>1, 1>2 and 2>3 lead through both inner nodes.
    cell = build_image_encoder("nas-201:1-0-1-0-0-1?width=4&cells=1", 8).layer1[0].eval()
    torch.testing.assert_close(cell(x), x)
    cell = build_image_encoder("nas-201:1-1-1-1-1-1?width=4&cells=1", 8).layer1[0].eval()
    torch.testing.assert_close(cell(x), 4 * x)
    shapes = [tuple(p.shape) for p in build_image_encoder("nas-201:2-0-0-3-0-0?width=4&cells=1", 8).layer1.parameters()]
    assert shapes == [(4, 4, 1, 1), (4,), (4,), (4, 4, 3, 3), (4,), (4,)]


def test_names_are_read_back_and_neighbours_differ_at_one_place() -> None:
    space = Space("nas-201", width=8, cells=2)
    assert parsed(space.name((0, 1, 2, 3, 4, 0))) == (space, (0, 1, 2, 3, 4, 0))
    assert space.name((0, 1, 2, 3, 4, 0)) == "nas-201:0-1-2-3-4-0?width=8&cells=2"
    near = space.neighbours((0, 1, 2, 3, 4, 0))
    assert len(set(near)) == 24
    assert {sum(a != b for a, b in zip(other, (0, 1, 2, 3, 4, 0), strict=True)) for other in near} == {1}
    assert len(Space("resnet-cifar").members()) == 64
    assert len(space.members()) == 15_625


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet-cifar:3-3", "takes A-B-C"),
        ("resnet-cifar:3-3-0", "takes A-B-C"),
        ("resnet-cifar:a-b-c", "takes A-B-C"),
        ("nas-201:3-3-3-3-3-5", "six operators 0 to 4"),
        ("resnet-cifar:3-3-3?cells=2", "unknown option of resnet-cifar 'cells'"),
        ("nas-201:3-3-3-3-3-3?width=0", "must be at least 1"),
        ("resnet-cifar:3-3-3?width", "options as"),
        ("resnet-cifr:3-3-3", "library of image encoders"),
    ],
)
def test_names_that_mean_no_member_are_explained(name: str, said: str) -> None:
    with pytest.raises(CounterpointError, match=said):
        check_image_encoder(name)


def test_a_member_has_no_published_weights_and_a_space_only_its_choices() -> None:
    with pytest.raises(CounterpointError, match="no pretrained weights"):
        build_image_encoder("resnet-cifar:1-1-1", 8, pretrained=True)
    with pytest.raises(CounterpointError, match=r"choices of nas-201 must lie in 0\.\.4, got 1, 7"):
        Space("nas-201", (1, 7))
    with pytest.raises(CounterpointError, match="unknown search space 'darts'"):
        Space("darts")
    with pytest.raises(CounterpointError, match="width and cells must be at least 1"):
        Space("nas-201", width=0)


@pytest.mark.parametrize("size", [48, 33])
def test_the_shortcuts_of_a_narrow_member_have_the_gradient_of_float64(size: int) -> None:
    torch.manual_seed(0)
    shortcut: Any = build_image_encoder("resnet-cifar:1-1-1?width=8", size).get_submodule("layer2.0.downsample.0")
    x = torch.randn(4, 8, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = shortcut(x)
    weight, other = (value.detach().double().requires_grad_() for value in (shortcut.weight, x))
    wanted = torch.nn.functional.conv2d(other.contiguous(), weight, stride=2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(shortcut.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
