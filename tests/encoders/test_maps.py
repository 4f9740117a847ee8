"""Feature maps of encoders of every library: one vector for each cell, in the picture's order."""

import pytest
import torch

from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.maps import MapDecoder, feature_map, feature_maps, map_channels, vector_and_map
from counterpoint.errors import CounterpointError

CASES = {
    "conv-s": (4, 128),
    "conv-fine": (16, 64),
    "convnet-s": (8, 64),
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


PYRAMIDS = {
    "conv-s": [(32, 16), (64, 8), (128, 4)],
    "conv-cells": [(48, 16), (64, 8)],
    "vit-s": [(128, 8)],
    "timm:test_resnet": [(32, 16), (32, 8), (48, 4), (192, 2), (96, 1)],
    "torchvision:resnet18": [(64, 16), (64, 8), (128, 4), (256, 2), (512, 1)],
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_maps_of_several_resolutions_end_with_the_last_map(name):
    encoder = build_image_encoder(name, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    found = feature_maps(encoder, images)
    assert [(x.shape[1], x.shape[2]) for x in found] == PYRAMIDS[name]
    torch.testing.assert_close(found[-1], feature_map(encoder, images))
    assert map_channels(encoder, 32) == [channels for channels, _ in PYRAMIDS[name]]


def test_segformers_four_maps_are_joined_at_a_quarter_of_the_picture(tmp_path):
    from transformers import SegformerConfig, SegformerModel

    config = SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
                             decoder_hidden_size=16)  # fmt: skip
    SegformerModel(config).save_pretrained(tmp_path)
    encoder = build_image_encoder(f"hf:{tmp_path}", 64, pretrained=True)
    assert map_channels(encoder, 64) == [8, 16, 24, 32]
    found = feature_maps(encoder, torch.randn(2, 3, 64, 64))
    joined = MapDecoder([8, 16, 24, 32], 12)(found)
    assert joined.shape == (2, 12, 16, 16)
    joined.square().sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters())
