"""Add low-rank adapters (LoRA) to any network, by peft. The network's own weights and statistics stay as they are.

    names = add_adapters(network, LoRA(8), lambda: network(images))   # the adapters train, nothing else of the network does
    with adapters_off(network):                                       # the outputs before the training, bit for bit
        before = network(images)
    with adapters_merged(network):                                    # plain layers with the sums of both, for an export
        ...

An adapter adds (alpha / rank) B A to a layer's weight W, with A of `rank` rows. B starts at 0, so the outputs do not change at
first. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

Layers that can be adapted:

- Linear layers, convolutions without groups, and Conv1D of transformers. Layers of peft replace them.
- `torch.nn.MultiheadAttention`, by a parametrisation of its weights. The layer of peft (0.21) adds and subtracts the adapter at
  each step, so rounding moves the weights. It also adds the adapter of the output layer twice.

A layer whose weights other code reads directly cannot be adapted: an adapter would have no effect. With `run`, only layers
that it calls are adapted.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from counterpoint.errors import CounterpointError, needs_extra
from counterpoint.files import replacing

KINDS = ("attention", "linear", "conv")
LEAST = 0.1  # share of a network's weights that adapters must fit by default
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = re.compile(r"attn|attention|qkv|(^|\.)(q|k|v|o|out|query|key|value)(_proj|_lin)?$", re.IGNORECASE)
_SHOWN = 6  # layers in a message


@dataclass(frozen=True)
class LoRA:
    """Settings of adapters.

    Attributes:
        rank: Rank of each adapter, at least 1 and at most the smaller width of its layer.
        alpha: An adapter is multiplied by alpha / rank; > 0. None: twice the rank.
        targets: Layers to adapt: kinds (attention, linear, conv), names or ends of names ("fc1"), patterns ("blocks.1?.*"). Empty:
            attention and linear layers of a transformer, convolutions and linear layers of another network.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CounterpointError(f"the rank of adapters (lora) must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise CounterpointError(f"lora_alpha must be > 0 and finite, got {self.alpha}")

    @property
    def factor(self) -> float:
        """The factor of B A."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


class LowRank(nn.Module):
    """A parametrisation that adds a low-rank matrix to a weight.

    Args:
        weight: [rows, columns] the weight to adapt.
        lora: settings.
    """

    def __init__(self, weight: Tensor, lora: LoRA) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(lora.rank, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, lora.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.factor, self.on = lora.factor, True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * (self.lora_B @ self.lora_A) if self.on else weight


# --- which layers


def kind_of(name: str, layer: nn.Module) -> str:
    """Return the kind of a layer that can be adapted: attention, linear or conv; "" for one that cannot."""
    if type(layer) in _CONVOLUTIONS:
        return "conv" if layer.groups == 1 and layer.padding_mode == "zeros" else ""
    if type(layer) is nn.MultiheadAttention:
        return "attention" if layer.in_proj_weight is not None else ""
    if type(layer) is nn.Linear or _is_conv1d(layer):
        return "attention" if _ATTENTION.search(name) else "linear"
    return ""


def adaptable(network: nn.Module, run: Callable[[], Any] | None = None) -> dict[str, nn.Module]:
    """Return the layers that can be adapted, by name.

    Args:
        network: any network.
        run: a forward pass of the network. Layers that it does not call are left out. None: take all layers.
    """
    found = {name: layer for name, layer in network.named_modules() if name and kind_of(name, layer)}
    # PyTorch's own block may read the weights of its layers without calling them.
    closed = [f"{name}." for name, layer in network.named_modules() if isinstance(layer, nn.TransformerEncoderLayer)]
    found = {name: layer for name, layer in found.items() if not name.startswith(tuple(closed))}
    if run is None:
        return found
    called: set[str] = set()
    handles = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in found.items()]
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return {name: layer for name, layer in found.items() if name in called}


def chosen_layers(layers: Mapping[str, nn.Module], targets: Sequence[str] = ()) -> list[str]:
    """Return the names of the layers that targets select (see `LoRA.targets`).

    Raises CounterpointError for a network without layers to adapt, and for a target that matches no layer.
    """
    if not layers:
        raise CounterpointError("the network has no layer that adapters fit: none is linear or a plain convolution")
    kinds = {name: kind_of(name, layer) for name, layer in layers.items()}
    if not targets:
        size: Counter[bool] = Counter()
        for name, layer in layers.items():
            size[kinds[name] == "conv"] += _size(layer)
        targets = KINDS if size[True] > size[False] else KINDS[:2]
        return [name for name in layers if kinds[name] in targets]
    chosen: set[str] = set()
    for target in targets:
        mine = {name for name in layers if kinds[name] == target or _matches(name, target)}
        if not mine:
            ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
            shown = ", ".join([*sorted(set(kinds.values())), *ends][: 3 + _SHOWN])
            raise CounterpointError(
                f"lora_targets: '{target}' matches no layer that can be adapted; there are {shown}, such as {next(iter(layers))}"
            )
        chosen |= mine
    return [name for name in layers if name in chosen]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def _is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is the linear layer of GPT-2 in transformers, whose weight is transposed."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def _width(layer: Any) -> int:
    """Return the largest useful rank: the smaller side of the weight as a matrix."""
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.embed_dim)
    rows = layer.weight.shape[0]
    return min(int(rows), int(layer.weight.numel() // rows))


# --- add, switch off, merge


def add_adapters(network: nn.Module, lora: LoRA, run: Callable[[], Any] | None = None) -> list[str]:
    """Add adapters to a network in place. Return the names of the adapted layers.

    Afterwards the adapters alone require gradients. Heads outside of `network` are not affected. The initial values of A come
    from torch's global generator.

    Args:
        network: any network without adapters.
        lora: settings.
        run: a forward pass of the network; see `adaptable`.

    Raises CounterpointError for targets that match no layer, and for a rank larger than the width of a layer. Raises it too for
    a network with adapters, and for a missing extra. Without targets, it also raises it for a network of which adapters fit
    less than a tenth.
    """
    check_extra()
    if adapted(network):
        raise CounterpointError("the network has adapters already: merge or remove them first")
    layers = adaptable(network, run)
    names = chosen_layers(layers, lora.targets)
    whole = sum(p.numel() for p in network.parameters())
    if not lora.targets and (reached := sum(_size(layers[name]) for name in names)) < LEAST * whole:
        raise CounterpointError(
            f"adapters fit only {reached / whole:.0%} of the network's weights, as other code reads the rest without calling its "
            f"layers; choose another network, or name the layers with lora_targets: {', '.join(names[:_SHOWN])}"
        )
    narrow = min(names, key=lambda name: _width(layers[name]))
    if lora.rank > _width(layers[narrow]):
        raise CounterpointError(
            f"the rank {lora.rank} of adapters (lora) is larger than the width {_width(layers[narrow])} of the layer {narrow}; use "
            "a smaller rank, or name wider layers with lora_targets"
        )
    import peft

    network.requires_grad_(False)
    attention = [name for name in names if isinstance(layers[name], nn.MultiheadAttention)]
    if plain := [name for name in names if name not in attention]:
        names_only = "|".join(map(re.escape, plain))  # peft compares it with whole names
        options: Any = {"r": lora.rank, "lora_alpha": lora.factor * lora.rank, "target_modules": names_only}
        transposed = all(_is_conv1d(layers[name]) for name in plain)
        peft.inject_adapter_in_model(peft.LoraConfig(**options, fan_in_fan_out=transposed), network)
    for name in attention:
        layer: Any = layers[name]
        parametrize.register_parametrization(layer, "in_proj_weight", LowRank(layer.in_proj_weight, lora))
        parametrize.register_parametrization(layer.out_proj, "weight", LowRank(layer.out_proj.weight, lora))
    return names


def check_extra() -> None:
    """Raise CounterpointError where peft is missing."""
    if find_spec("peft") is None:
        raise needs_extra("an adapter", "adapters")


def adapted(network: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted layers of a network by name."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if _of_peft(layer) or (isinstance(layer, nn.MultiheadAttention) and _low_ranks(layer))
    }


def _of_peft(layer: nn.Module) -> bool:
    return hasattr(layer, "base_layer") and hasattr(layer, "lora_A")


def _low_ranks(layer: nn.Module) -> list[LowRank]:
    return [module for module in layer.modules() if isinstance(module, LowRank)]


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapters by name."""
    return {name: p for name, p in network.named_parameters() if _of_adapter(name)}


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Return a context in which a network computes what it computed before it got adapters, bit for bit."""
    learning = [(p, p.requires_grad) for p in network.parameters()]
    _switch(network, on=False)
    try:
        yield
    finally:
        _switch(network, on=True)
        for parameter, learns in learning:
            parameter.requires_grad_(learns)


def _switch(network: nn.Module, *, on: bool) -> None:
    for layer in adapted(network).values():
        if isinstance(layer, nn.MultiheadAttention):
            for low in _low_ranks(layer):
                low.on = on
        else:
            cast(Any, layer).enable_adapters(on)


@contextmanager
def adapters_merged(network: nn.Module) -> Iterator[None]:
    """Return a context in which plain layers replace the adapted ones; their weights are the sums W + (alpha / rank) B A."""
    swapped = []
    try:
        for name, layer in adapted(network).items():
            parent, last = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(parent, last, _merged(layer))
            swapped.append((parent, last, layer))
        yield
    finally:
        for parent, last, layer in swapped:
            setattr(parent, last, layer)


def _merged(layer: nn.Module) -> nn.Module:
    twin: Any = copy.deepcopy(layer)
    if isinstance(twin, nn.MultiheadAttention):
        _bake(twin, "in_proj_weight")
        _bake(twin.out_proj, "weight")
        return twin
    twin.merge()
    found: nn.Module = twin.get_base_layer()
    return found


def _bake(layer: Any, name: str) -> None:
    """Replace a parametrised weight by its value. PyTorch's own function would change the class, which copies share."""
    weight = getattr(layer, name).detach().clone()
    del layer.parametrizations
    layer.__class__ = type(layer).__mro__[1]
    layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))


# --- weights by the names of the network without adapters


def plain_names(network: nn.Module) -> dict[str, str]:
    """Return plain name -> name for every tensor of the state except the adapters'."""
    layers = {name: layer for name, layer in network.named_modules() if _of_peft(layer)}
    found = {}
    for name in network.state_dict():
        place, inside, last = name.rpartition(".base_layer.")
        if inside and place in layers:
            found[f"{place}.{last}"] = name
        elif not _of_adapter(name):
            found[re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)] = name
    return found


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of the network without its adapters, by plain names."""
    state = network.state_dict()
    return {plain: state[name] for plain, name in plain_names(network).items()}


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of the network with its adapters merged, by plain names."""
    with adapters_merged(network):
        return dict(network.state_dict())


def load_base(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state of a network without adapters under the adapters of this one. They stay.

    Raises RuntimeError for a state of another network, as `load_state_dict` does.
    """
    names = plain_names(network)
    own = {name: value for name, value in network.state_dict().items() if _of_adapter(name)}
    network.load_state_dict(own | {names.get(plain, plain): value for plain, value in state.items()})


def write_adapters(network: nn.Module, folder: Path) -> list[Path]:
    """Write the adapters in the layout of peft, and return the files: adapter_model.safetensors, adapter_config.json.

    `peft.PeftModel.from_pretrained` reads the folder, given the network without adapters.

    Args:
        network: a network with adapters.
        folder: a folder, which is made where it is missing.

    Raises CounterpointError for a network without adapters, and for one with adapted layers of PyTorch's own attention.
    """
    layers: dict[str, Any] = adapted(network)
    if any(isinstance(layer, nn.MultiheadAttention) for layer in layers.values()):
        raise CounterpointError(
            "this network has PyTorch's own attention, and peft would add the adapter of its output twice; export it as onnx or "
            "torch, with merged adapters"
        )
    if not layers:
        raise CounterpointError("there are no adapters to write: the run was trained without --lora")
    import peft
    from safetensors.torch import save

    state = {}
    for name, parameter in adapter_parameters(network).items():
        name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)
        state[f"base_model.model.{name}"] = parameter.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank, factor = first.r["default"], first.scaling["default"]
    transposed = all(getattr(layer, "fan_in_fan_out", False) for layer in layers.values())
    options: Any = {"r": rank, "lora_alpha": factor * rank, "target_modules": "|".join(map(re.escape, layers))}
    config = peft.LoraConfig(**options, fan_in_fan_out=transposed)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        texts = save(state, {"format": "pt"}), (Path(place) / files[1].name).read_bytes()
    for path, text in zip(files, texts, strict=True):
        with replacing(path) as file:
            file.write(text)
    return files


# --- statistics


def keep_statistics(network: nn.Module) -> None:
    """Put every layer with running statistics into evaluation mode: it uses them, and they stay."""
    for layer in network.modules():
        if isinstance(getattr(layer, "running_var", None), Tensor):
            layer.eval()


def with_adapters(model: Any, config: Any, name: str = "default") -> Any:
    """Wrap a language model of transformers by peft, with a new adapter of this configuration."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft reads a property whose name transformers has changed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config, adapter_name=name)
