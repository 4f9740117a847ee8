"""Runs that classify pixels: their networks as files for other programs."""

import pytest
import torch

from counterpoint import cli, training
from counterpoint.engine.run import Run
from counterpoint.experiment import Experiment
from counterpoint.use.export import opened
from counterpoint.use.segmenter import Segmenter
from counterpoint.views.images import normalise

SMALL = {"encoder": "conv-s", "batch_size": 8, "epochs": 1, "evaluate_every": 1, "warmup_epochs": 0}


def trained(slug: str, data: str, folder, **settings):
    config = Experiment.resolve(slug, data, overrides=SMALL | settings).config
    return training.train(slug, config, data=data, out=folder, name=slug, say=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_network_of_several_modalities_is_exported_with_their_presence(tmp_path, undrawn, ending):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
    data = "sensors?train=8&test=4&size=16"
    run = trained("any2seg", data, tmp_path, width=8, inter_weight=0.0, intra_weight=0.0)
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / f"run.{ending}")]) == 0
    program = opened(tmp_path / f"run.{ending}", "torch" if ending == "pt2" else "onnx")
    pixels = torch.randint(0, 256, (5, 4, 3, 16, 16), dtype=torch.uint8)
    there = torch.rand(5, 4) < 0.5
    there[:, 2] = True
    with torch.no_grad():
        seen = normalise(pixels.flatten(0, 1)).unflatten(0, (5, 4))
        wanted = training.load_learner(run).segment(seen, there.T)
    torch.testing.assert_close(program(pixels, there), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, training.load_learner(run).segment(seen))


def test_network_of_single_pictures_is_exported(tmp_path, undrawn):
    run = trained("finetune-seg", "shapes?train=8&test=4&size=16", tmp_path)
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "run.pt2")]) == 0
    program = opened(tmp_path / "run.pt2", "torch")
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted = Segmenter.load(Run.open(run.path))(pixels)
    assert wanted.shape == (3, 5, 16, 16)
    torch.testing.assert_close(program(pixels), wanted, rtol=1e-4, atol=1e-4)
