"""A learner of each task is measured on a GPU that is not there: its measures are those of the processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterpoint.engine.evaluation import measure
from counterpoint.experiment import Experiment
from pretend_gpu import pretend_gpu

WORDS = {"vocabulary": 300, "batch_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr": ("digits?size=8&train=60", {"encoder": "conv-s", "batch_size": 20}),
    "finetune": ("digits?size=8&train=60", {"encoder": "conv-s", "batch_size": 20}),
    "pcl-sr": ("digits?size=20&train=40&held_out=0.05&valid=0.05", {"patch": 20, "batch_size": 8, "critic_width": 4}),
    "global-local-seg": ("phantoms?train=3&test=2&slices=8&size=16", {"encoder": "unet-s", "batch_size": 4}),
    "ctvis": ("moving-shapes?train=8&test=2&frames=5&least=2&most=3&others=1&size=16", {"encoder": "conv-s"}),
    "finetune-det": ("shapes?train=8&test=4&size=64", {"encoder": "conv-s", "batch_size": 4}),
    "wscol": ("shifted-shapes?train=4&target=4&test=2&size=32&proposals=10", {"encoder": "conv-s", "crop": 16}),
    "supremix": ("digit-numbers?train=48&test=24&watched=16", {"encoder": "mlp-s", "batch_size": 12}),
    "clip": ("digit-captions?train=60", {"image_encoder": "conv-s", "batch_size": 20}),
    "teminal": ("events?kinds=6&train=4&test=3&seconds=0.2", {"text_encoder": "text-8-1-2", "batch_size": 8}),
    "macil-sd": ("async-bags?train=32", {"batch_size": 8}),
    "clhe": ("themed-bundles?items=40&train=30&test=12&size=5", {"dim": 8, "length": 8, "batch_size": 10}),
    "vidlankd": ("moving-objects?train=48&grounded=41&test=40&words=20&seed=1", WORDS | {"encoder": "text-8-1-2"}),
    "switchgpt": (
        "media-requests?entities=10&plain=24&requests=16",
        WORDS | {"vocabulary": 320, "model": "llama-16-2-2"},
    ),
    "mend": ("symbol-tasks?symbols=6&train=12&valid=3&test=3&queries=2&texts=24", WORDS | {"model": "llama-8-2-2"}),
    "sinc": ("latent-classes?classes=12&unseen=4&each=3&held=3&slots=2&width=6", WORDS | {"meta": "gpt2-8-1-2"}),
    "space-2": ("task-dialogs?train=24&unlabelled=24&test=40&paths=40&seed=1", WORDS | {"encoder": "text-8-1-2"}),
    "cosmo": ("digit-documents?train=24&documents=8&each=1&test_documents=3", WORDS | {"model": "llama-16-4-2"}),
}


SLOW = {"switchgpt", "cosmo", "clip", "space-2", "teminal"}  # seconds


@pytest.mark.parametrize("slug", [pytest.param(slug, marks=[pytest.mark.slow] * (slug in SLOW)) for slug in CASES])
def test_measures_are_the_processor_s(slug, monkeypatch):
    data, settings = CASES[slug]
    experiment = Experiment.resolve(slug, data, overrides=settings)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    here = measure(learner, task, "test", final=True)[0]
    with pretend_gpu(monkeypatch):
        there = measure(learner.to(torch.device("cuda")), task, "test", final=True)[0]
    assert there == pytest.approx(here, rel=1e-3, abs=1e-3, nan_ok=True)
