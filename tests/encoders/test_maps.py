"""Feature maps of encoders of every library: one vector for each cell, in the picture's order."""

import pytest
import torch

from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.maps import feature_map, vector_and_map
from counterpoint.errors import CounterpointError

CASES = {
    "conv-s": (4, 128),
    "conv-fine": (16, 64),
    "resnet-s": (4, 128),
    "vit-s": (8, 128),
    "timm:test_vit": (2, 64),
    "timm:test_resnet": (1, 96),
    "torchvision:mobilenet_v3_small": (1, 576),
    "torchvision:squeezenet1_0": (1, 512),
}


@pytest.mark.parametrize("name", CASES)
def test_map_has_a_vector_for_each_cell(name):
    encoder = build_image_encoder(name, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    found = feature_map(encoder, images)
    assert found.requires_grad
    side, dim = CASES[name]
    assert found.shape == (2, dim, side, side)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_the_vector_and_the_map(name):
    torch.manual_seed(0)
    encoder = build_image_encoder(name, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    vector, found = vector_and_map(encoder, images)
    torch.testing.assert_close(vector, encoder(images))
    torch.testing.assert_close(found, feature_map(encoder, images))


@pytest.mark.parametrize("name", ["conv-s", "resnet-s"])
def test_mean_of_the_map_is_the_feature(name):
    encoder = build_image_encoder(name, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(feature_map(encoder, images).mean((2, 3)), encoder(images), atol=1e-6)


@pytest.mark.parametrize("name", ["conv-fine", "vit-s", "timm:test_vit"])
def test_cells_are_in_the_order_of_the_picture(name):
    """A change in one corner changes the map's cell of that corner most."""
    torch.manual_seed(0)
    encoder = build_image_encoder(name, 32).eval()
    plain = torch.zeros(1, 3, 32, 32)
    changed = plain.clone()
    changed[:, :, :4, -4:] = 3.0
    with torch.no_grad():
        difference = (feature_map(encoder, changed) - feature_map(encoder, plain)).square().sum(1)[0]
    side = difference.shape[-1]
    row, column = divmod(int(difference.argmax()), side)
    assert row < side / 2 <= column


def test_map_of_a_channels_last_network_has_channels_first():
    encoder = build_image_encoder("timm:swin_tiny_patch4_window7_224", 64).eval()
    assert feature_map(encoder, torch.zeros(1, 3, 64, 64)).shape == (1, 768, 2, 2)


def test_maps_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    encoder = build_image_encoder(f"hf:{tmp_path}", 32).eval()
    assert feature_map(encoder, torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)


def test_encoder_without_a_map_is_refused():
    encoder = build_image_encoder("mlp-s", 32)
    with pytest.raises(CounterpointError, match="has no feature map; choose an encoder with one"):
        feature_map(encoder, torch.zeros(1, 3, 32, 32))
