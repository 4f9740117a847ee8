"""Teachers of images by name: a library's network gets images as it was trained, and a run must have features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterpoint.encoders import images
from counterpoint.tasks.image_teachers import features_of, image_teacher
from counterpoint.views.images import normalise

PIXELS = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_network_of_transformers_gets_the_means_and_deviations_of_its_processor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **small)).eval()
    network.save_pretrained(tmp_path)
    plain = image_teacher(f"hf:{tmp_path}", 16)
    torch.testing.assert_close(
        features_of(plain, {"image": normalise(PIXELS)}), network(normalise(PIXELS)).pooler_output.detach()
    )
    transformers.ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    teacher = image_teacher(f"hf:{tmp_path}", 16)
    wanted = network(normalise(PIXELS, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))).pooler_output
    torch.testing.assert_close(
        features_of(teacher, {"image": normalise(PIXELS)}), wanted.detach(), rtol=1e-4, atol=1e-5
    )


def test_a_network_of_timm_gets_the_means_and_deviations_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    build = images.build_image_encoder
    monkeypatch.setattr(images, "build_image_encoder", lambda name, size, pretrained: build(name, size))
    teacher = image_teacher("timm:test_vit", 160)
    known = teacher.module.model.pretrained_cfg
    assert known["mean"] == (0.5, 0.5, 0.5)
    pixels = PIXELS.repeat(1, 1, 10, 10)
    wanted = teacher.module(normalise(pixels, known["mean"], known["std"]))
    torch.testing.assert_close(features_of(teacher, {"image": normalise(pixels)}), wanted, rtol=1e-4, atol=1e-5)
