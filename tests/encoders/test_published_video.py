"""Published backbones of snippets: transformers' video and audio models, timm's picture models, I3D. All tiny or random."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from counterpoint import encoders
from counterpoint.encoders.i3d import I3DNet
from counterpoint.errors import CounterpointError, RunError

transformers = pytest.importorskip("transformers")
RNG = np.random.default_rng(0)


def frames(count, backbone):
    width, height = backbone.frame_size
    return RNG.integers(0, 255, (count, backbone.frames_per_snippet, height, width, 3), dtype=np.uint8)


def videomae(folder):
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        tubelet_size=2,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.VideoMAEModel(config).eval()
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    transformers.VideoMAEImageProcessor(**statistics).save_pretrained(folder)
    return model, statistics


def ast(folder):
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_mel_bins=32,
        max_length=200,
        patch_size=16,
    )
    model = transformers.ASTModel(config).eval()
    model.save_pretrained(folder)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=200)
    extractor.save_pretrained(folder)
    return model, extractor


def test_videomae_s_features_are_those_of_its_library(tmp_path):
    model, statistics = videomae(tmp_path)
    backbone = encoders.build_visual(encoders.parse(f"hf:{tmp_path}"))
    assert (backbone.frames_per_snippet, backbone.frame_size, backbone.dim) == (4, (32, 32), 24)
    pictures = frames(2, backbone)
    processor = transformers.VideoMAEImageProcessor(**statistics, do_resize=False, do_center_crop=False)
    inputs = processor([list(clip) for clip in pictures], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.mean(1)
    np.testing.assert_allclose(backbone(pictures), expected, atol=1e-5)
    again = encoders.build_visual(backbone.describe())
    np.testing.assert_array_equal(again(pictures), backbone(pictures))


def test_ast_s_features_are_those_of_its_library(tmp_path):
    model, extractor = ast(tmp_path)
    backbone = encoders.build_audio(encoders.parse(f"hf:{tmp_path}"))
    assert (backbone.sample_rate, backbone.window_seconds, backbone.dim) == (16000, 2.0, 24)
    wave = RNG.uniform(-1, 1, (3, 32000)).astype(np.float32)
    inputs = extractor(list(wave), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.mean(1)
    np.testing.assert_allclose(backbone(wave), expected, atol=1e-5)
    assert encoders.build_audio(backbone.describe()).describe() == backbone.describe()


def test_a_run_s_weights_must_be_those_of_the_folder(tmp_path):
    videomae(tmp_path)
    described = encoders.build_visual({"name": f"hf:{tmp_path}"}).describe()
    with pytest.raises(CounterpointError, match="does not hold the weights that this run was trained with"):
        encoders.build_visual(described | {"sha256": "0" * 64})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CounterpointError, match="the folder has no weights"):
        encoders.build_visual(described)


def test_models_of_another_kind_are_an_error(tmp_path):
    videomae(tmp_path / "video")
    ast(tmp_path / "audio")
    with pytest.raises(CounterpointError, match="is no video model"):
        encoders.build_visual({"name": f"hf:{tmp_path / 'audio'}"})
    with pytest.raises(CounterpointError, match="could not be loaded"):
        encoders.build_visual({"name": f"hf:{tmp_path / 'gone'}"})
    with pytest.raises(CounterpointError, match=r"could not be loaded|is no audio model"):
        encoders.build_audio({"name": f"hf:{tmp_path / 'video'}"})


def test_timm_s_features_are_the_mean_over_the_frames(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", pretrained=False, num_classes=10).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    backbone = encoders.build_visual(encoders.parse(f"timm:resnet10t@{tmp_path / 'w.pth'}"))
    pictures = frames(1, backbone)
    x = torch.from_numpy(pictures[0]).permute(0, 3, 1, 2).float() / 255
    config = timm.data.resolve_model_data_config(whole)
    x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(x), pre_logits=True).mean(0, keepdim=True)
    np.testing.assert_allclose(backbone(pictures), expected, atol=1e-4)
    torch.save({"conv": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(RunError, match=r"bad\.pth does not fit timm:resnet10t: it lacks"):
        encoders.build_visual({"name": "timm:resnet10t", "weights": str(tmp_path / "bad.pth")})
    with pytest.raises(CounterpointError, match="resnet10t"):
        encoders.build_visual({"name": "timm:resnet10"})


def test_i3d_loads_the_port_s_names_and_pads_as_tensorflow_does(tmp_path):
    torch.manual_seed(0)
    made = I3DNet()
    assert sum(value.numel() for value in made.parameters()) == 12_287_264  # the port's number, without its classifier
    state = made.state_dict()
    assert {"Conv3d_1a_7x7.bn.running_var", "Mixed_5c.b2b.conv3d.weight"} <= set(state)
    logits = {"logits.conv3d.weight": torch.zeros(400, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(400)}
    torch.save({f"module.{name}": value for name, value in (state | logits).items()}, tmp_path / "i3d.pt")
    backbone = encoders.build_visual(encoders.parse(f"i3d@{tmp_path / 'i3d.pt'}"))
    pictures = RNG.integers(0, 255, (1, 16, 64, 64, 3), dtype=np.uint8)
    assert backbone(pictures).shape == (1, 1024)
    net = I3DNet().eval()
    shapes = []
    net.Mixed_5c.register_forward_hook(lambda *found: shapes.append(found[2].shape))
    with torch.no_grad():
        net(torch.zeros(1, 3, 16, 65, 112))
    assert shapes == [(1, 1024, 2, 3, 4)]  # each of five halvings is rounded up, four of them in time
    with pytest.raises(CounterpointError, match="i3d needs its weights"):
        encoders.build_visual({"name": "i3d"})
    torch.save(logits, tmp_path / "bad.pt")
    with pytest.raises(RunError, match="does not hold I3D's weights"):
        encoders.build_visual({"name": "i3d", "weights": str(tmp_path / "bad.pt")})


def test_names_that_are_forms_are_no_backbones():
    for modality, build in (("visual", encoders.build_visual), ("audio", encoders.build_audio)):
        assert "hf:FOLDER" in encoders.names(modality)
        with pytest.raises(CounterpointError, match=f"unknown {modality} backbone"):
            build({"name": "hg:FOLDER"})
