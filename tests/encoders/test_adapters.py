"""Adapters: no effect at first and when off, merging, chosen layers, running statistics, errors."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint.encoders import adapters
from counterpoint.encoders.adapters import LoRA, adapters_merged, adapters_off, add_adapters
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.inside import TokenNetwork
from counterpoint.errors import CounterpointError

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra [adapters]")

IDS = torch.arange(14).view(2, 7)


class Last(nn.Module):
    """A model of transformers that returns its last states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


class Attentive(nn.Module):
    """PyTorch's own attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attend(x, x, x, need_weights=False)[0])


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return Last(GPT2Model(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Last(LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return Last(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)))


NETWORKS: dict[str, Any] = {
    "vit-s": (lambda: build_image_encoder("vit-s", 16), (2, 3, 16, 16)),
    "resnet-s": (lambda: build_image_encoder("resnet-s", 16), (2, 3, 16, 16)),
    "timm": (lambda: build_image_encoder("timm:test_resnet", 32), (2, 3, 32, 32)),
    "vit of transformers": (vit, (2, 3, 16, 16)),
    "timm with a base_layer of its own": (lambda: build_image_encoder("timm:dla46x_c", 32), (2, 3, 32, 32)),
    "gpt2": (gpt2, None),
    "llama": (llama, None),
    "attention of torch": (Attentive, (2, 5, 16)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    return network, IDS if shape is None else torch.randn(shape)


@torch.no_grad()
def outputs(network: nn.Module, x: Tensor) -> Tensor:
    """Compute without gradient: with frozen weights, PyTorch's attention takes another way where gradients are on."""
    found: Tensor = network(x)
    return found


def moved(network: nn.Module) -> None:
    """Change the adapters, as training does."""
    for parameter in adapters.adapter_parameters(network).values():
        nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_add_nothing_at_first_and_nothing_when_off(name: str) -> None:
    network, x = built(name)
    plain, before = copy.deepcopy(network), outputs(network, x)
    names = add_adapters(network, LoRA(2), lambda: network(x))
    assert names == list(adapters.adapted(network))
    assert {n for n, p in network.named_parameters() if p.requires_grad} == set(adapters.adapter_parameters(network))
    assert torch.equal(outputs(network, x), before)
    moved(network)
    after = outputs(network, x)
    assert not torch.allclose(after, before, atol=1e-3)
    with adapters_off(network):
        assert torch.equal(outputs(network, x), before)
    assert torch.equal(outputs(network, x), after)
    state = adapters.base_state(network)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_adapters_compute_the_same_in_plain_layers(name: str) -> None:
    network, x = built(name)
    plain = copy.deepcopy(network)
    add_adapters(network, LoRA(2, alpha=6.0), lambda: network(x))
    moved(network)
    after = network(x)
    with adapters_merged(network):
        assert not adapters.adapted(network)
        torch.testing.assert_close(network(x), after, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(x), after)
    plain.load_state_dict(adapters.merged_state(network))
    torch.testing.assert_close(plain(x), after, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x), after)


@pytest.mark.parametrize("name", ["resnet-s", "llama", "attention of torch"])
def test_every_adapter_learns_and_the_base_stays_over_steps(name: str) -> None:
    network, x = built(name)
    before = outputs(network, x)
    add_adapters(network, LoRA(2), lambda: network(x))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    first = {n: p.detach().clone() for n, p in adapters.adapter_parameters(network).items()}
    for _ in range(4):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    for parameter_name, parameter in adapters.adapter_parameters(network).items():
        assert not torch.equal(parameter, first[parameter_name]), parameter_name
    with adapters_off(network):
        assert torch.equal(outputs(network, x), before)


def test_an_adapter_is_the_scaled_product_of_its_matrices() -> None:
    layer = nn.Linear(6, 4)
    network = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    add_adapters(network, LoRA(2, alpha=3.0))
    moved(network)
    a, b = adapters.adapter_parameters(network).values()
    wanted = weight + 1.5 * b @ a
    torch.testing.assert_close(adapters.merged_state(network)["0.weight"], wanted)


def test_weights_of_a_plain_network_load_under_adapters() -> None:
    network, x = built("attention of torch")
    torch.manual_seed(1)
    other = Attentive().eval()
    add_adapters(network, LoRA(2))
    adapters.load_base(network, other.state_dict())
    assert torch.equal(network(x), other(x))
    with pytest.raises(RuntimeError, match="mlp"):
        adapters.load_base(network, {k: v for k, v in other.state_dict().items() if not k.startswith("mlp")})


@pytest.mark.parametrize("name", ["timm", "vit-s", "gpt2"])
def test_peft_reads_written_adapters(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    network, x = built(name)
    network = getattr(network, "model", network)
    plain = copy.deepcopy(network)
    add_adapters(network, LoRA(2, alpha=3.0), lambda: network(x))
    moved(network)
    files = adapters.write_adapters(network, tmp_path / "new" / "adapters")
    assert [file.name for file in files] == ["adapter_model.safetensors", "adapter_config.json"]
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "new" / "adapters")).eval()
    ours, read = (getattr(y, "last_hidden_state", y) for y in (network(x), theirs(x)))
    torch.testing.assert_close(read, ours, rtol=1e-4, atol=1e-5)


# --- which layers


def test_transformers_get_linear_layers_and_convolutional_networks_all() -> None:
    network, x = built("vit-s")
    names = add_adapters(network, LoRA(2), lambda: network(x))
    assert len(names) == 16
    assert not any("patch_embed" in name for name in names)
    network, x = built("resnet-s")
    assert add_adapters(network, LoRA(2), lambda: network(x))[:2] == ["stem.0", "layer1.conv1"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("attention",), 8),
        (("linear",), 8),
        (("conv",), 1),
        (("fc1",), 4),
        (("model.blocks.1.*",), 4),
        (("qkv", "fc2"), 8),
    ],
)
def test_targets_name_kinds_ends_and_patterns(targets: tuple[str, ...], count: int) -> None:
    network, x = built("vit-s")
    assert len(add_adapters(network, LoRA(2, targets=targets), lambda: network(x))) == count


def test_layers_whose_weights_are_read_directly_are_left_out() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.Linear(16, 16), block)
    assert list(adapters.adaptable(network)) == ["0"]
    network, _ = built("attention of torch")
    assert list(adapters.adaptable(network)) == ["attend", "mlp"]
    unused = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    assert list(adapters.adaptable(unused, lambda: unused["used"](torch.ones(1, 4)))) == ["used"]


def test_looking_for_called_layers_changes_nothing() -> None:
    network, x = built("resnet-s")
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adapters.adaptable(network, lambda: network(x))
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_inside_of_an_adapted_transformer_is_read_as_before() -> None:
    network, x = built("vit-s")
    before = TokenNetwork(network, "vit-s", 16)(x, layers=(3,)).layers[3]
    add_adapters(network, LoRA(2), lambda: network(x))
    after = TokenNetwork(network, "vit-s", 16)(x, layers=(3,)).layers[3]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# --- running statistics


def test_a_still_encoder_keeps_its_statistics_in_training_mode() -> None:
    encoder = build_image_encoder("resnet-s", 16)
    encoder.still = True
    twin = copy.deepcopy(encoder)
    for network in (encoder, twin):
        network.train()
        assert network.training
        before = {name: value.clone() for name, value in network.named_buffers()}
        network(torch.randn(4, 3, 16, 16))
        assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


# --- errors


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": -1}, {"rank": 2, "alpha": 0.0}])
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(CounterpointError, match="lora"):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(17), "rank 17 .* width 16 of the layer attend"),
        (LoRA(2, targets=("mlp", "fc9")), "'fc9' matches no layer .* such as attend"),
    ],
)
def test_a_refused_network_stays_as_it_was(lora: LoRA, message: str) -> None:
    network, _ = built("attention of torch")
    with pytest.raises(CounterpointError, match=message):
        add_adapters(network, lora)
    assert not adapters.adapted(network)
    assert all(p.requires_grad for p in network.parameters())


def test_networks_that_adapters_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = built("attention of torch")
    add_adapters(network, LoRA(2))
    with pytest.raises(CounterpointError, match="adapters already"):
        add_adapters(network, LoRA(2))
    with pytest.raises(CounterpointError, match="no layer that adapters fit"):
        add_adapters(nn.Sequential(nn.ReLU()), LoRA(2))
    tower = build_image_encoder("tower-64-2-32", 32)
    with pytest.raises(CounterpointError, match=r"only .* of the network's weights"):
        add_adapters(tower, LoRA(2), lambda: tower(torch.zeros(1, 3, 32, 32)))
    with pytest.raises(CounterpointError, match="PyTorch's own attention"):
        adapters.write_adapters(network, Path("nowhere"))
    with pytest.raises(CounterpointError, match="no adapters to write"):
        adapters.write_adapters(tower, Path("nowhere"))
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(CounterpointError, match=r"counterpoint\[adapters\]"):
        add_adapters(nn.Sequential(nn.Linear(2, 2)), LoRA(1))
