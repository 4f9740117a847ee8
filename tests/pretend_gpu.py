"""A GPU that is not there, whose tensors have values: the processor computes them under the name of a CUDA device.

PyTorch's fake tensors have no values, so a loop over tokens cannot run on them. As on a GPU, it is an error where a tensor of the
GPU meets one of the processor. So is a draw on the GPU from a generator of the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
PACK = torch.ops.aten._pack_padded_sequence.default
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class OnGPU(Tensor):
    """A tensor of the GPU, whose values a tensor of the processor holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        more = {"dtype": held.dtype, "device": THERE, "strides": held.stride(), "storage_offset": held.storage_offset()}
        made: OnGPU = Tensor._make_wrapper_subclass(cls, held.shape, **more)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGPU({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("lstm", "gru"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        # Their kernels for a GPU have no counterpart on the processor. Sizes of packed batches are there on a GPU, too.
        assert all(
            x.dtype == torch.int64 or isinstance(x, OnGPU) for x in tree_flatten(args)[0] if isinstance(x, Tensor)
        )
        with unset_fake_temporarily():
            return tree_map(OnGPU, func(*tree_map(_held, args)))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor of the GPU after the GPU has gone")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value


class _Mode(TorchDispatchMode):
    computed = 0  # operations on the GPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations that consist of others arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        given = tree_flatten((args, kwargs))[0]
        tensors = [value for value in given if isinstance(value, Tensor)]
        there = [value for value in tensors if isinstance(value, OnGPU)]
        if func in INDEXED and there and isinstance(args[0], OnGPU):
            tensors = [args[0], *args[2:3]]  # a GPU takes indices of the processor
        if func is PACK:
            tensors = [args[0]]  # lengths and sizes are on the processor
        if there and func not in MOVES and any(x.ndim and not isinstance(x, OnGPU) for x in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        named = kwargs.get("device")
        on_gpu = bool(there) if named is None else torch.device(named).type == "cuda"
        if func is torch.ops.aten.copy_.default:
            on_gpu = isinstance(args[0], OnGPU)
        if on_gpu and any(isinstance(value, torch.Generator) for value in given):
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
        if named is not None:
            kwargs = kwargs | {"device": HERE}
        inside = tree_map(_held, (args, kwargs))
        # A view of a tensor from outside of inference mode is one, too.
        self.computed += on_gpu and func not in MOVES
        with unset_fake_temporarily(), torch.inference_mode(mode=False), torch.no_grad():
            found = func(*inside[0], **inside[1])
            if func._schema.is_mutable and isinstance(found, Tensor):
                return next((x for x in there if x.held is found), found)
            if func is PACK and on_gpu:
                return OnGPU(found[0]), found[1]
            return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) and on_gpu else x, found)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return a context in which this machine has a CUDA device. AssertionError where nothing is computed on it."""
    if torch.__version__ < (2, 11):
        pytest.skip("CUDA tensors ask older PyTorch for a driver")
    with monkeypatch.context() as patched, FakeTensorMode(allow_non_fake_inputs=True), _Mode() as mode:
        patched.setattr(torch.cuda, "device_count", lambda: 1)
        patched.setattr(torch.backends.cudnn, "enabled", False)  # its operations are of a GPU alone
        # A network then gets new parameters; the data of old ones cannot become those of another class.
        patched.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        yield
    assert mode.computed, "nothing was computed on the GPU"
