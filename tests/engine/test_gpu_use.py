"""A finished run on a GPU that is not there: backbones of video, detectors and encoders, on PyTorch's fake tensors.

A fake CUDA tensor that meets a CPU tensor raises an error, as on a GPU. Results are copied to the processor, where they have no
values: `numpy` gives zeros of their shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_steps import move_weights, needs_fakes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from counterpoint.encoders.i3d import I3D, I3DNet
from counterpoint.encoders.on_device import move
from counterpoint.encoders.published_video import TimmFrames, TransformersAudio, TransformersVideo
from counterpoint.encoders.sound import VGGish, _Spectrogram
from counterpoint.engine.survey import mapped
from counterpoint.experiment import Experiment
from counterpoint.search.encoder import Encoder
from counterpoint.search.transform import Transform
from counterpoint.use.detect import Detector

pytestmark = needs_fakes


@pytest.fixture(autouse=True)
def values(monkeypatch: pytest.MonkeyPatch) -> None:
    def numpy(x: Tensor, *, force: bool = False) -> Any:
        assert x.device.type == "cpu", "only a tensor of the CPU becomes an array"
        return np.zeros(tuple(x.shape), np.float32)

    monkeypatch.setattr(Tensor, "numpy", numpy)


def with_network(kind: type, network: nn.Module | None = None, **fields: Any) -> Any:
    """Make a backbone without reading weights."""
    made = object.__new__(kind)
    if network is not None:
        made.model = network.eval()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def vggish() -> Any:
    made = object.__new__(VGGish)
    nn.Module.__init__(made)
    made.features = nn.Sequential(nn.Conv2d(1, 512, 3, padding=1), nn.MaxPool2d(16))
    made.embeddings = nn.Sequential(nn.Linear(512 * 4 * 6, 128))
    made.spectrogram = _Spectrogram()
    return made


def videomae() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    mean = torch.full((3, 1, 1), 0.5)
    return with_network(TransformersVideo, transformers.VideoMAEModel(config), mean=mean, std=mean)


def timm_frames() -> Any:
    import timm

    mean = torch.full((3, 1, 1), 0.5)
    return with_network(TimmFrames, timm.create_model("test_resnet", num_classes=0), mean=mean, std=mean)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: with_network(I3D, I3DNet()), (2, 16, 224, 224, 3)),
        (videomae, (2, 4, 32, 32, 3)),
        (timm_frames, (2, 4, 64, 64, 3)),
        (vggish, (2, 15600)),
        (lambda: with_network(TransformersAudio, nn.Sequential(nn.Linear(400, 8))), (2, 400)),
    ],
    ids=["i3d", "videomae", "timm", "vggish", "audio of transformers"],
)
def test_a_backbone_computes_where_its_network_is(make: Any, shape: tuple[int, ...]) -> None:
    backbone = make()
    given = np.zeros(shape, np.uint8 if len(shape) == 5 else np.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in {"mean", "std"} & set(vars(backbone)):
            setattr(backbone, name, torch.empty(3, 1, 1))
        move_weights(backbone if isinstance(backbone, nn.Module) else backbone.model)
        assert backbone(given).shape[0] == 2


def learner_of(slug: str, data: str, **settings: Any) -> tuple[Any, Any, Experiment]:
    experiment = Experiment.resolve(slug, data, overrides=settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0).eval(), task.facts, experiment


def test_a_backbone_without_a_network_stays() -> None:
    from counterpoint.encoders.light import Light

    move(Light(), torch.device("meta"))
    moved = with_network(I3D, nn.Linear(2, 2))
    move(moved, torch.device("meta"))
    assert moved.model.weight.device.type == "meta"


def test_a_detector_scores_where_its_network_is() -> None:
    learner, facts, _ = learner_of("macil-sd", "async-bags?train=32", batch_size=8)
    detector = with_network(Detector, learner=learner)
    visual, audio = (np.zeros((5, width), np.float32) for width in (facts["visual_dim"], facts["audio_dim"]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_weights(learner)
        scores = detector.score_rows(visual, audio)
    assert {name: rows.shape for name, rows in scores.items()} == {"score": (5,), "audio": (5,), "visual": (5,)}


@pytest.mark.parametrize(
    ("slug", "data", "settings", "kind"),
    [
        ("simclr", "digits?size=8&train=60", {"encoder": "conv-s", "batch_size": 20}, "image"),
        ("clip", "digit-captions?train=60", {"image_encoder": "conv-s", "batch_size": 20}, "image"),
        ("clip", "digit-captions?train=60", {"image_encoder": "conv-s", "batch_size": 20}, "text"),
    ],
)
def test_an_encoder_embeds_where_its_network_is(slug: str, data: str, settings: dict[str, Any], kind: str) -> None:
    learner, facts, experiment = learner_of(slug, data, **settings)
    transform = Transform.of_facts(dict(facts), experiment.config)
    encoder = with_network(Encoder, learner=learner, transform=transform, task=experiment.system.task)
    name = next(name for name, of in encoder.kinds.items() if of == kind)
    values = [np.zeros((8, 8, 3), np.uint8)] * 3 if kind == "image" else ["one", "two", "three"]
    inputs = transform(name, values)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_weights(learner)
        fakes = mapped(inputs, lambda x: torch.empty(x.shape, dtype=x.dtype))
        encoder.transform = lambda name, values: fakes
        assert encoder._batch(name, values).shape[0] == 3
