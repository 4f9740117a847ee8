"""Published checkpoints in half precision become float32 networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from counterpoint.encoders.audio import build_audio_encoder
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.text import build_text_encoder

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_and_have_the_values_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **small)).to(dtype)
    bert.save_pretrained(tmp_path / "text")
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **small)).to(dtype)
    vit.save_pretrained(tmp_path / "image")
    wav = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            **small,
            conv_dim=(8,),
            conv_kernel=(10,),
            conv_stride=(5,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=2,
            num_conv_pos_embedding_groups=2,
        )
    ).to(dtype)
    wav.save_pretrained(tmp_path / "audio")
    (tmp_path / "audio" / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": 16000})
    )
    encoders = {
        "text": build_text_encoder(f"hf:{tmp_path / 'text'}"),
        "image": build_image_encoder(f"hf:{tmp_path / 'image'}", 16, pretrained=True),
        "audio": build_audio_encoder(f"hf:{tmp_path / 'audio'}", 16000, 8000),
    }
    for name, encoder in encoders.items():
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}, name
    kept = dict(bert.named_parameters())
    for name, value in encoders["text"].model.named_parameters():
        torch.testing.assert_close(value, kept[name].float(), rtol=0, atol=0)
    ids = torch.tensor([[3, 5, 0]])
    assert encoders["text"](ids, ids > 0).dtype == torch.float32
    assert encoders["image"](torch.zeros(2, 3, 16, 16)).dtype == torch.float32
    assert encoders["audio"](torch.randn(1, 8000)).dtype == torch.float32
