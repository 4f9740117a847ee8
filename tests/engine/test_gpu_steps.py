"""The loss of a step on a GPU that is not there: PyTorch's fake tensors have a device, shapes and types, and no values.

A fake CUDA tensor that meets a CPU tensor raises an error, as on a GPU. So does an operation that would make the processor wait,
because it needs a value. The kernels do nothing here; tests/core/test_chunks.py tests them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from counterpoint.engine.options import Loop
from counterpoint.engine.stepper import Stepper
from counterpoint.experiment import Experiment

needs_fakes = pytest.mark.skipif(torch.__version__ < (2, 11), reason="fake CUDA tensors ask older PyTorch for a driver")
pytestmark = [pytest.mark.usefixtures("no_kernels"), needs_fakes]

DIGITS, CAPTIONS = "digits?size=8&train=60&held_out=0.05&valid=0.05", "digit-captions?train=60"
SMALL = {"encoder": "conv-s", "batch_size": 20}
TAUGHT = SMALL | {"teacher_encoder": "conv-s"}
PAIRS = {"image_encoder": "conv-s", "batch_size": 20}
VIEWS = ["simclr", "moco-v2", "byol", "simsiam", "barlow-twins", "vicreg", "swav", "dino"]
ADDED = ["supcon", "sla", "dcl", "hallucinator", "cmd"]
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys([*VIEWS, *ADDED], (DIGITS, SMALL)),
    **dict.fromkeys(["kd", "rkd", "crd"], (DIGITS, TAUGHT)),
    "mae": (DIGITS, {"encoder": "vit-s", "batch_size": 20}),
    "obow": (
        "digits?size=16&train=60&held_out=0.05&valid=0.05",
        SMALL | {"levels": ["stem", "layer1"], "words": 40, "patch_size": 8},
    ),
    "mean-teacher": (DIGITS, SMALL | {"labels_per_class": 3, "labelled_batch": 8}),
    **dict.fromkeys(["clip", "siglip", "contrastive-gap", "symile"], (CAPTIONS, PAIRS)),
}
# These need a value on the processor, and so wait for the GPU once or more in a step.
WAITING = {
    "hard-contrastive": (DIGITS, SMALL),
    "mochi": (DIGITS, SMALL),
    "isogclr": (DIGITS, SMALL),
    "macil-sd": ("arcade", {"batch_size": 8}),
}


def on_gpu(value: Any) -> Any:
    """Return a fake CUDA tensor in place of every tensor."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if isinstance(value, dict):
        return {name: on_gpu(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [on_gpu(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def move_weights(learner: nn.Module) -> None:
    seen: dict[int, Tensor] = {}
    for module in learner.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is None:
                    continue
                if id(tensor) not in seen:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    parameter = isinstance(tensor, nn.Parameter)
                    seen[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
                held[name] = seen[id(tensor)]


def loss_on_gpu(slug: str, data: str, settings: dict[str, Any]) -> Tensor:
    experiment = Experiment.resolve(slug, data, overrides=settings)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    stepper = Stepper(learner, task, Loop())
    stepper.begin(torch.device("cpu"))
    if stepper.stages[0].enter is None:
        stepper.prepare(0)
    # Views are drawn and made on the processor here: their random numbers have values.
    batch = stepper.prepared(next(iter(stepper.loader)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_weights(learner)
        batch = on_gpu(batch)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found: Tensor = learner.loss(batch)["loss"]
        return found


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("slug", STEPS)
def test_a_step_uses_one_device_and_never_waits(slug: str) -> None:
    loss = loss_on_gpu(slug, *STEPS[slug])
    assert loss.device.type == "cuda"
    assert loss.ndim == 0


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("slug", WAITING)
def test_these_systems_still_wait(slug: str) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        loss_on_gpu(slug, *WAITING[slug])


def test_views_are_made_on_the_images_device() -> None:
    from counterpoint.views.images import ViewPipeline

    for recipe in ("simclr", "byol", "dino", "digits-hard", "adainf"):
        pipeline = ViewPipeline(32, crops=2, recipe=recipe)
        drawn = pipeline.draw((4, 3, 32, 32), torch.Generator().manual_seed(0))
        # The meta device has no values either; numbers that were drawn on the processor must be moved to it.
        views = pipeline.apply(torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta"), drawn)
        assert {view.device.type for view in views} == {"meta"}
