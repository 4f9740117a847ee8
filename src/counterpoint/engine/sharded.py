"""Divide the parameters of large networks among the processes of a fit, with PyTorch's FSDP2.

Each network is divided block by block. A block's parameters are gathered when it runs, and freed after. Their gradients are
averaged by the backward pass, so `gradients.average` leaves them out. All other parameters stay whole on every process.

Checkpoints and weights are whole. For the final measurement, the networks are replaced by whole ones. A finished run does not
show how it was trained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoint.core.divided import is_sharded, whole
from counterpoint.core.world import processes
from counterpoint.errors import CounterpointError

if TYPE_CHECKING:
    from counterpoint.engine.learner import Learner
    from counterpoint.engine.options import Loop
    from counterpoint.engine.stages import Stage


def check_shardable(learner: Learner, loop: Loop, stages: Sequence[Stage]) -> None:
    """Raise CounterpointError, with the reason, for a learner or options that cannot be combined with --fsdp."""
    name = type(learner).__name__
    if not learner.shardable():
        raise CounterpointError(
            f"--fsdp: {name} has no network that processes can divide among them: it may read parameters itself, or have "
            "additions or adapters; leave out --fsdp"
        )
    if len(stages) > 1 or stages[0].enter is not None or stages[0].trains is not None:
        raise CounterpointError(f"--fsdp: {name} trains in stages, which may replace networks; leave out --fsdp")
    options = {
        "--accumulate": loop.accumulate > 1,
        "--compile": loop.compile,
        "--ema": loop.ema > 0,
        "--patience": loop.patience > 0,
        "--precision 16": loop.precision == "16",
    }
    for option, given in options.items():
        if given:
            raise CounterpointError(f"--fsdp cannot be combined with {option}; leave out one of them")
    optimizer = getattr(learner.config, "optimizer", "adamw").lower()
    if optimizer not in ("sgd", "momentum", "nesterov", "adam", "adamw"):
        raise CounterpointError(
            f"--fsdp: the optimizer {optimizer} takes norms over whole parameters; use sgd, nesterov, adam or adamw"
        )


class Shards:
    """The divided networks of a learner.

    Args:
        learner: A learner whose `shardable` names its networks. They must hold the same weights on all processes.
    """

    def __init__(self, learner: Learner) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # The learners that can be divided change no output of a network in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.learner = learner
        self.empty: dict[str, nn.Module] = {}  # the same networks without values, to hold the whole weights at the end
        mesh = init_device_mesh(learner.device.type, (processes()[1],))
        for path in learner.shardable():
            network = learner.get_submodule(path)
            self.empty[path] = _without_values(network)
            for parameter in network.parameters():  # FSDP refuses the layout of convolutions with channels last
                parameter.data = parameter.data.contiguous()
            for block in _blocks(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
            for method in ("tokens",):
                if hasattr(network, method):
                    register_fsdp_forward_method(network, method)

    def take_up(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide an optimiser's state that was read whole from a checkpoint, as its parameters are divided."""
        from torch.distributed.tensor import distribute_tensor

        for parameter, state in optimizer.state.items():
            if is_sharded(parameter):
                mesh, places = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and not is_sharded(value):
                        state[name] = distribute_tensor(value, mesh, places)

    def gather(self) -> None:
        """Replace the networks by whole ones, with the same weights. All processes call it."""
        for path, empty in self.empty.items():
            network = self.learner.get_submodule(path)
            values = whole(network.state_dict())
            network = empty.to_empty(device=self.learner.device)
            network.load_state_dict(values)
            for name, buffer in network.named_buffers():  # those that no state has
                if name not in values:
                    buffer.copy_(self.learner.get_submodule(path).get_buffer(name))
            network.train(self.learner.training)
            self.learner.set_submodule(path, network)
        self.empty = {}


def _without_values(network: nn.Module) -> nn.Module:
    """Return a copy of a network on the device meta, which takes no memory."""
    held = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad)
        if isinstance(value, nn.Parameter)
        else value.to("meta")
        for value in held
    }
    return copy.deepcopy(network, memo)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks of a network: members of a list or sequence of modules of the same class, with parameters."""
    for child in network.children():
        members = list(child.children())
        alike = len(members) > 1 and len({type(one) for one in members}) == 1
        if (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and alike
            and all(any(True for _ in m.parameters()) for m in members)
        ):
            yield from members
        else:
            yield from _blocks(child)


def need_processes() -> None:
    """Raise CounterpointError where --fsdp is given to a single process."""
    if not (dist.is_available() and dist.is_initialized() and processes()[1] > 1):
        raise CounterpointError(
            "--fsdp divides networks among several processes; start them: torchrun --nproc-per-node 2 -m counterpoint train ..."
        )
