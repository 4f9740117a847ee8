"""Batch normalisation over processes has the values, gradients and running figures of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from counterpoint.core.world import leave
from counterpoint.engine.batchnorm import synchronise

COUNTS = (5, 2, 1)


def network() -> nn.Module:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        BatchNormAct2d(4),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6, affine=False),
    ).double()


def images() -> torch.Tensor:
    # A large mean: a variance as a difference of squares would lose digits.
    return 1000 + torch.randn(sum(COUNTS), 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weights() -> torch.Tensor:
    return torch.randn(sum(COUNTS), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def step(net: nn.Module, part: slice) -> dict[str, torch.Tensor]:
    """Compute one step of a loss that is a sum over examples; every process returns its part."""
    (net(images()[part]) * weights()[part]).sum().backward()
    found = {f"grad {name}": p.grad for name, p in net.named_parameters()}
    return {**found, **{f"buffer {name}": b for name, b in net.named_buffers()}}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    net = network()
    assert synchronise(net, cuda=False) == 3
    start = sum(COUNTS[:rank])
    torch.save(step(net, slice(start, start + COUNTS[rank])), f"{folder}/{rank}.pt")
    net.eval()
    torch.save(net(images()), f"{folder}/eval{rank}.pt")
    leave()


def test_processes_with_uneven_shares_equal_one_process(tmp_path: Path) -> None:
    mp.start_processes(work, (str(tmp_path),), nprocs=len(COUNTS), start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(COUNTS))]
    net = network()
    whole = step(net, slice(None))
    for name, value in whole.items():
        # Gradients of a sum over examples add up; buffers are the same everywhere.
        found = sum(part[name] for part in parts) if name.startswith("grad") else parts[0][name]
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    net.eval()
    torch.testing.assert_close(torch.load(tmp_path / "eval1.pt"), net(images()), rtol=1e-8, atol=1e-8)


def test_without_processes_a_synchronised_network_is_the_plain_one() -> None:
    plain, synced = network(), network()
    names = list(synced.state_dict())
    assert synchronise(synced, cuda=False) == 3
    assert list(synced.state_dict()) == names
    found = step(synced, slice(None))
    for name, value in step(plain, slice(None)).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_network_without_batch_normalisation_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert synchronise(net, cuda=False) == 0
    assert type(net[1]) is nn.LayerNorm


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_every_kind_keeps_its_checks_of_shape(kind: type[nn.Module]) -> None:
    net = nn.Sequential(kind(2))
    synchronise(net, cuda=False)
    with pytest.raises(ValueError, match="expected"):
        net(torch.zeros(2))


def encoder_gradients(part: slice, synced: bool) -> tuple[float, dict[str, torch.Tensor]]:
    from counterpoint import functional as fn
    from counterpoint.encoders.images import build_image_encoder

    torch.manual_seed(0)
    net = build_image_encoder("resnet-s", 16).double()
    if synced:
        synchronise(net, cuda=False)
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, 3, 16, 16, generator=draw, dtype=torch.float64)[part] for _ in range(2))
    loss = fn.of("simclr").nt_xent(net(x), net(y), 0.5)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters()}


def encoder_work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from counterpoint.core.distributed import over

    with over("world"):
        torch.save(encoder_gradients(slice(rank, None, 2), True), f"{folder}/{rank}.pt")
    leave()


def test_two_processes_have_the_loss_and_mean_gradient_of_one_for_a_convolutional_encoder(tmp_path: Path) -> None:
    mp.start_processes(encoder_work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    loss, gradients = encoder_gradients(slice(None), False)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [part[0] for part in parts] == pytest.approx([loss, loss], rel=1e-10)
    for name, value in gradients.items():
        torch.testing.assert_close((parts[0][1][name] + parts[1][1][name]) / 2, value, rtol=1e-8, atol=1e-12)
