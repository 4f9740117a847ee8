"""Feature backbones: shapes, determinism, weights from files, and files that are not what they should be."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from counterpoint import encoders
from counterpoint.encoders.light import Light
from counterpoint.encoders.sound import LogMel, VGGish
from counterpoint.errors import CounterpointError, RunError
from counterpoint.files import fingerprint

RNG = np.random.default_rng(0)


def frames(count, backbone):
    width, height = backbone.frame_size
    return RNG.integers(0, 255, (count, backbone.frames_per_snippet, height, width, 3), dtype=np.uint8)


def wave(count, backbone):
    return RNG.uniform(-1, 1, (count, round(backbone.window_seconds * backbone.sample_rate))).astype(np.float32)


def test_light_and_logmel_need_nothing_and_know_their_width():
    eye, ear = encoders.build_visual({"name": "light"}), encoders.build_audio({"name": "logmel"})
    assert eye(frames(3, eye)).shape == (3, eye.dim)
    assert ear(wave(3, ear)).shape == (3, ear.dim)
    assert encoders.build_visual(eye.describe()).dim == eye.dim


def test_a_snippet_s_features_do_not_depend_on_its_batch():
    eye, ear = Light(), LogMel()
    pictures, sound = frames(4, eye), wave(4, ear)
    np.testing.assert_allclose(eye(pictures)[2:3], eye(pictures[2:3]), atol=1e-4)
    np.testing.assert_allclose(ear(sound)[2:3], ear(sound[2:3]), atol=1e-5)
    assert not np.allclose(eye(pictures)[0], eye(pictures)[1], atol=0.05)


def test_light_s_filters_are_the_same_everywhere():
    # Runs record the name alone: features of last year's run must be this year's.
    assert Light().filters.double().sum().item() == pytest.approx(2.1000, abs=1e-4)


def test_light_sees_motion_and_logmel_hears_pitch():
    eye, ear = Light(), LogMel()
    still = np.repeat(frames(1, eye)[:, :1], 4, 1)
    assert np.linalg.norm(eye(still) - eye(frames(1, eye))) > 1
    t = np.arange(round(ear.window_seconds * 16000)) / 16000
    low, high = (ear(np.sin(2 * np.pi * f * t, dtype=np.float32)[None]) for f in (300, 3000))
    assert low[0, :64].argmax() < high[0, :64].argmax()
    assert np.isfinite(ear(np.zeros((1, len(t)), np.float32))).all()


@pytest.fixture(scope="module")
def r3d(tmp_path_factory):
    import torchvision.models as tv

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "r3d.pth"
    torch.save(tv.get_model("r3d_18", weights=None).state_dict(), path)
    return path


@pytest.mark.slow
def test_a_torchvision_network_with_weights_from_a_file(r3d):
    backbone = encoders.build_visual(encoders.parse(f"r3d_18@{r3d}"))
    assert (backbone.dim, backbone.frames_per_snippet) == (512, 16)
    pictures = frames(2, backbone)
    features = backbone(pictures)
    assert features.shape == (2, 512)
    described = backbone.describe()
    assert described["sha256"] == fingerprint(r3d, None)
    again = encoders.build_visual(described)
    np.testing.assert_allclose(again(pictures[:1]), features[:1], rtol=1e-4, atol=1e-5)


def test_weights_that_changed_since_the_run_are_refused(r3d, tmp_path):
    described = {"name": "r3d_18", "weights": str(r3d), "sha256": "0" * 64}
    with pytest.raises(CounterpointError, match="not the file this run was trained with"):
        encoders.build_visual(described)
    with pytest.raises(CounterpointError, match="no such weights file"):
        encoders.build_visual(described | {"weights": str(tmp_path / "gone.pth")})


def test_weights_of_another_network_are_refused(r3d):
    with pytest.raises(RunError, match="does not fit mc3_18"):
        encoders.build_visual({"name": "mc3_18", "weights": str(r3d)})
    with pytest.raises(RunError, match="does not hold VGGish weights"):
        encoders.build_audio({"name": "vggish", "weights": str(r3d)})


class _Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weights": _Evil()}))
    for spec in ({"name": "r3d_18", "weights": str(path)}, {"name": "vggish", "weights": str(path)}):
        with pytest.raises(RunError, match="could run code"):
            (encoders.build_visual if spec["name"] == "r3d_18" else encoders.build_audio)(spec)
    torch.save({"weights": _Evil()}, path)
    with pytest.raises(RunError, match="could run code"):
        encoders.build_visual({"name": "r3d_18", "weights": str(path)})
    assert "must not run" not in capsys.readouterr().out


def test_vggish_loads_weights_from_a_file(tmp_path, monkeypatch):
    # 4096-wide layers make 280 MB; the same network, narrower, is loaded in the same way.
    linear = torch.nn.Linear
    monkeypatch.setattr(
        "counterpoint.encoders.sound.nn.Linear",
        lambda a, b: linear(min(a, 64) if a == 4096 else a, min(b, 64) if b == 4096 else b),
    )
    torch.manual_seed(0)
    monkeypatch.setattr("counterpoint.encoders.sound.read_weights", lambda path: state)
    state: dict[str, torch.Tensor] = {}
    (tmp_path / "v.pth").write_bytes(b"weights")
    layers = {}
    with pytest.raises(RunError, match="does not hold VGGish weights"):
        VGGish(tmp_path / "v.pth")
    for name, module in (("features", (0, 3, 6, 8, 11, 13)), ("embeddings", (0, 2, 4))):
        for number in module:
            layers[f"{name}.{number}"] = None
    shapes = {
        "features.0": (64, 1, 3, 3),
        "features.3": (128, 64, 3, 3),
        "features.6": (256, 128, 3, 3),
        "features.8": (256, 256, 3, 3),
        "features.11": (512, 256, 3, 3),
        "features.13": (512, 512, 3, 3),
        "embeddings.0": (64, 512 * 24),
        "embeddings.2": (64, 64),
        "embeddings.4": (128, 64),
    }
    assert set(shapes) == set(layers)
    for name, shape in shapes.items():
        state[f"{name}.weight"] = 0.05 * torch.randn(shape)
        state[f"{name}.bias"] = torch.zeros(shape[0])
    state["pproc.pca_means"] = torch.zeros(128)  # what published weights carry besides
    net = VGGish(tmp_path / "v.pth")
    assert net(wave(2, net)).shape == (2, 128)
    assert net.window_seconds == pytest.approx(0.975)


def test_unknown_names_get_near_matches():
    with pytest.raises(CounterpointError, match="did you mean r3d_18"):
        encoders.build_visual({"name": "r3d18"})
    with pytest.raises(CounterpointError, match="did you mean vggish"):
        encoders.build_audio({"name": "vgish"})
    with pytest.raises(CounterpointError, match="needs its weights"):
        encoders.build_audio({"name": "vggish"})
