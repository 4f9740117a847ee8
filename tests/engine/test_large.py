"""`--accumulate N`: the gradients of the whole batch, for every learner whose networks see each row by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint import catalog, cli
from counterpoint.engine.large import check_row_wise, running
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.stepper import Stepper
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from embedded import embeddings
from launch import command_over_processes

IMAGES = {"encoder": "vit-xs", "batch_size": 12, "epochs": 1}
ALIGNED = {"image_encoder": "vit-xs", "batch_size": 12, "epochs": 1}
PICTURES = "digits?size=8&train=60"
TEACHER = (
    "fit:SLUG?data=digits%3Fsize=8%26train=24%26held_out=0.05%26valid=0.05"
    "&encoder=vit-xs&epochs=1&batch_size=12&warmup_epochs=0&recipe=none"
)
CAPTIONS = "digit-captions?train=60"


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(doubled(part) for part in value)
    if hasattr(value, "_fields"):
        return type(value)(*(doubled(part) for part in value))
    return value


SOURCES: dict[tuple[str, str], Any] = {}  # by task and data: loaded once for all systems


def resolved(slug: str, data: str | None, settings: dict[str, Any]) -> tuple[Experiment, Any]:
    """Return an experiment and its task."""
    experiment = Experiment.resolve(slug, data, overrides=settings)
    key = experiment.system.task, experiment.data
    if key not in SOURCES:
        SOURCES[key] = experiment.source()
    return experiment, experiment.task(SOURCES[key])


def started(slug: str, data: str | None, settings: dict[str, Any], parts: int) -> tuple[Stepper, dict[str, Any]]:
    """Return a stepper before its first step, in float64, and its batch."""
    experiment, task = resolved(slug, data, settings)
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.double()
    prepare = learner.prepare
    learner.prepare = lambda batch, generator: doubled(prepare(batch, generator))
    stepper = Stepper(learner, task, Loop(accumulate=parts))
    stepper.stand_at(learner.position.state())
    return stepper, next(iter(stepper.loader))


def compared(slug: str, data: str | None, settings: dict[str, Any], batch_changed: Any = None) -> None:
    """Check that one step in three parts equals one step of the whole batch: losses, gradients, weights, buffers."""
    found = []
    for parts in (1, 3):
        stepper, batch = started(slug, data, settings, parts)
        if batch_changed is not None:
            batch = batch_changed(batch)
        gradients: dict[str, Tensor] = {}
        before_step = stepper.learner.before_step

        def noted(
            stepper: Stepper = stepper, gradients: dict[str, Tensor] = gradients, then: Any = before_step
        ) -> None:
            then()
            gradients |= {n: p.grad.clone() for n, p in stepper.learner.named_parameters() if p.grad is not None}

        stepper.learner.before_step = noted
        losses = stepper.step(batch)
        found.append((losses, gradients, dict(stepper.learner.state_dict())))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert one
        for name, value in one.items():
            torch.testing.assert_close(
                other[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


# Every system that is built stands in one of these lists: compared with N = 1, or refused for a reason.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("simclr", "simsiam", "byol", "moco-v1", "moco-v2", "barlow-twins", "vicreg", "cacr", "swav", "msn", "dino"),
        (PICTURES, IMAGES),
    ),
    **dict.fromkeys(("dcl", "hard-contrastive", "hallucinator", "isogclr", "mochi", "mcl", "bss"), (PICTURES, IMAGES)),
    "sepclr": ("digit-overlays?train=24&test=8&size=8", IMAGES),
    "cmd": (PICTURES, IMAGES | {"pooling": "attention"}),
    "mlcd": ("digit-canvases?train=24&test=4", IMAGES | {"clusters": 8, "labels": 2, "projection": 8}),
    "pcl-sr": (
        "digits?size=20&train=24",
        {"patch": 20, "batch_size": 12, "epochs": 1, "repeats": 1, "critic_width": 4, "pretrain_epochs": 0},
    ),
    "capro": ("query-digits?train=24", IMAGES | {"hidden": 16, "projection": 8, "queue": 24, "frozen_epochs": 0}),
    "supremix": ("digit-numbers?train=24&test=8&watched=8", IMAGES | {"projection": 8}),
    "mclrec": (
        "visits?users=40&items=24&groups=3",
        {"dim": 8, "length": 8, "inner": 8, "dropout": 0.0, "batch_size": 12, "epochs": 1},
    ),
    "mae": (PICTURES, IMAGES | {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}),
    **dict.fromkeys(("supcon", "triplet", "sla", "hydra", "finetune"), (PICTURES, IMAGES)),
    "mean-teacher": (PICTURES, IMAGES | {"labelled_batch": 4}),
    "diswot": (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "vit-xs", "gradient_weight": 0.5}),
    **dict.fromkeys(("kd", "rkd", "crd"), (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "vit-xs"})),
    "kd3": (
        "web-digits?train=24&web=12&others=12&size=16",
        IMAGES | {"teacher_epochs": 0, "teacher_encoder": "vit-xs", "contrast_weight": 0.1, "select": False},
    ),
    **dict.fromkeys(
        ("vl2v-adip", "vlm-ood-distill"),
        (
            "styled-shapes?train=24&test=8&size=16&label=shape",
            {"encoder": "vit-s", "batch_size": 12, "epochs": 1, "recipe": "none", "teacher": embeddings(24, 8)},
        ),
    ),
    "cosmo": (
        "digit-documents?train=24&documents=4&each=1&test_documents=2",
        {
            "model": "llama-8-2-2",
            "vocabulary": 300,
            "context": 48,
            "batch_size": 12,
            "epochs": 1,
            "heads": 2,
            "dim_head": 4,
        }
        | {"media_tokens": 2, "depth": 1, "embedding": 4, "vision": "patches-8", "new_tokens": 4},
    ),
    "stic": (
        "grid-chats?train=12&valid=4&test=4&grid=2&cell=8&most=2&styles=1",
        {"model": "llava-8-1-2", "vocabulary": 300, "context": 64, "batch_size": 12, "epochs": 1, "rank": 2},
    ),
    "comd": (
        "digit-questions?train=12&captions=12&test=1&watched=1",
        {
            "model": "llava-8-1-2",
            "teacher": "llava-8-1-2",
            "vocabulary": 300,
            "context": 48,
            "batch_size": 12,
            "epochs": 1,
        },
    ),
    "lol": (
        "misconceptions?entities=8&relations=1&values=5&train=24",
        {"model": "llama-8-2-2", "vocabulary": 300, "context": 40, "batch_size": 12, "epochs": 1, "rank": 2},
    ),
    "switchgpt": (
        "media-requests?entities=8&plain=24&requests=12",
        {"model": "llama-8-2-2", "vocabulary": 320, "context": 64, "batch_size": 12, "epochs": 1, "rank": 2}
        | {"tuning_epochs": 1, "lora_dropout": 0.0},
    ),
    "mend": (
        "symbol-tasks?symbols=6&train=12&valid=3&test=3&queries=2&texts=24",
        {
            "model": "llama-8-2-2",
            "model_queries": 2,
            "vocabulary": 300,
            "context": 24,
            "vectors": 3,
            "demonstrations": 4,
        }
        | {"distiller_context": 20, "batch_size": 12, "epochs": 1, "model_epochs": 1, "pretrain_epochs": 1},
    ),
    "ritual": (
        "grid-chats?train=12&valid=4&test=4&grid=2&cell=8&most=2",
        {"model": "llava-8-1-2", "vocabulary": 300, "context": 48, "new_tokens": 4, "batch_size": 12, "epochs": 1},
    ),
    "vidlankd": (
        "moving-objects?train=24&grounded=24&test=24&words=20",
        {"encoder": "text-8-1-2", "vocabulary": 300, "batch_size": 12, "epochs": 1, "teacher_epochs": 1, "dropout": 0.0}
        | {"video_dropout": 0.0},
    ),
    "space-2": (
        "task-dialogs?train=24&unlabelled=24&test=20&paths=20",
        {"encoder": "text-8-1-2", "vocabulary": 300, "subspace": 4, "batch_size": 12, "epochs": 1, "dropout": 0.0}
        | {"mask_probability": 0.5},
    ),
    "creamfl": (
        "digit-parties?vectors=1&train=24&test=20&items=20",
        {"vector_encoder": "relu-8", "embedding": 4, "batch_size": 12, "epochs": 1, "rounds": 1, "lr": 1e-3},
    ),
    "mod-x": (
        "digit-streams?vectors=1&train=24&test=20&phases=2",
        {"vector_encoder": "relu-8", "embedding": 4, "batch_size": 12, "epochs": 1, "warmup_epochs": 0},
    ),
    "coconut": (
        "digit-words?train=12&test=6",
        {"head": "classifier", "vector_encoder": "relu-8", "embedding": 4, "batch_size": 12, "epochs": 1, "phases": 2},
    ),
    "teminal": (
        "events?kinds=6&train=4&test=2&seconds=0.2",
        {"text_encoder": "text-8-1-2", "embedding": 4, "batch_size": 12, "base_epochs": 1, "epochs": 1},
    ),
    "mulki": (
        "digit-domains?train=24&test=20&domains=2",
        {
            "teacher": "fit:clip?data=digit-domains%3Forigin=1%26train=20%26test=20%26domains=2&image_encoder=tower-16-1-8"
            "&text_encoder=tower-16-1-8&embedding=8&recipe=none&epochs=1&batch_size=12&context=16",
            "batch_size": 12,
            "epochs": 1,
            "warmup_epochs": 0,
            "recipe": "none",
        },
    ),
    **dict.fromkeys(("clip", "siglip", "contrastive-gap", "improved-vlp-baselines"), (CAPTIONS, ALIGNED)),
    "tinyclip": (
        "styled-shapes?train=24&test=8&size=8",
        {
            "teacher": "fit:clip?data=styled-shapes%3Ftrain=24%26test=8%26size=8&image_encoder=tower-16-1-8"
            "&text_encoder=tower-16-1-8&embedding=8&recipe=none&epochs=1&batch_size=12&context=16",
            "inherit": "none",
            "image_encoder": "tower-16-1-8",
            "text_encoder": "tower-16-1-8",
            "batch_size": 12,
            "context": 16,
            "recipe": "none",
        },
    ),
    "albef": (CAPTIONS, ALIGNED | {"queue": 48, "dropout": 0.0}),
    "dcd": (
        "digit-captions?train=24",
        {
            **dict(ALIGNED),
            "embedding": 16,
            "heads": 2,
            "fusion_layers": 2,
            "student_layers": (1,),
            "teacher_epochs": 0,
            "dropout": 0.0,
            "candidates": 6,
            "num_hard": 2,
            "weight_decay": 0.0,
        },
    ),
    "m3col": ("digit-halves", {"batch_size": 12, "epochs": 1}),
    "symile": ("xor", {"batch_size": 12, "epochs": 1}),
    "gradient-harmonization": ("noisy-triplets", {"batch_size": 12, "epochs": 1, "realign": True}),
    "macil-sd": ("async-bags?train=24&test=4", {"batch_size": 12, "epochs": 1, "dropout": 0.0}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    # Its U-Net and Q-formers take several tensors, and its stages differ in what they encode.
    "customcontrast": (
        "digit-subjects?train=8&test=4&frames=3",
        {"embedding": 8, "width": 8, "tokens": 2, "sampling": 1, "batch_size": 12, "pretrain_epochs": 1, "epochs": 1},
    ),
    # Its networks have feature maps, and the turns of its second phase share what the generator made.
    "supcon-t2i": (
        "digit-scenes?train=24&test=8",
        {"embedding": 8, "width": 8, "noise": 4, "batch_size": 12, "pretrain_batch_size": 12, "epochs": 1},
    ),
    # It draws its views of items within the loss, and encodes the distinct items of a batch.
    "clhe": ("themed-bundles?items=40&train=30&test=12&size=5", {"dim": 8, "length": 8, "batch_size": 10, "epochs": 1}),
    # One function takes the prompts of a batch, and the names of all classes.
    "sinc": (
        "latent-classes?classes=12&unseen=3&each=2&held=2",
        {"meta": "gpt2-8-1-2", "fuser": 8, "fuser_heads": 2, "word_width": 4, "batch_size": 12, "epochs": 1},
    ),
    # The loss of load balance depends on all tokens.
    "llava-mod": (
        "grid-chats?train=12&valid=4&test=4&grid=2&cell=8&most=2&questions=0&pairs=12",
        {
            "model": "llava-8-1-2",
            "teacher": "llava-8-1-2",
            "vocabulary": 300,
            "context": 48,
            "batch_size": 12,
            "epochs": 1,
        },
    ),
    # Its prompts enter between the blocks, outside the network that would be run again.
    "promptkd": (
        "styled-shapes?train=24&test=8&size=16&label=shape",
        {
            "student": "",
            "encoder": "vit-s",
            "prompt_depth": 2,
            "batch_size": 12,
            "epochs": 1,
            "recipe": "none",
            "teacher": embeddings(24, 8),
        },
    ),
    # It reads layers inside its networks.
    "hybrid-distill": (
        "digits?size=8&train=24",
        {
            "encoder": "vit-xs",
            "batch_size": 12,
            "epochs": 1,
            "warmup_epochs": 0,
            "feature_teacher": TEACHER.replace("SLUG", "mae"),
            "relation_teacher": TEACHER.replace("SLUG", "mae"),
        },
    ),
    # Their networks have feature maps.
    "any2seg": (
        "sensors?train=24&test=8&size=16",
        {"encoder": "conv-s", "batch_size": 12, "epochs": 1, "width": 8, "inter_weight": 0.0, "intra_weight": 0.0},
    ),
    "pixpro": ("shapes?train=24&test=8", {"encoder": "conv-cells", "batch_size": 12, "epochs": 1, "hidden": 8}),
    "ctvis": (
        "moving-shapes?train=12&test=2&size=16",
        {"encoder": "conv-s", "batch_size": 12, "epochs": 1, "hidden": 8},
    ),
    "wscol": (
        "shifted-shapes?train=12&target=12&test=2&size=32&proposals=8",
        {"encoder": "conv-s", "layer": "", "crop": 16, "batch_size": 12, "source_batch": 12, "epochs": 0, "hidden": 8},
    ),
    "esp-medsam": (
        "medical-shapes?train=12&test=2&natural=12",
        {
            "encoder": "prefix-s",
            "dim": 16,
            "batch_size": 12,
            "epochs": 1,
            "steps": 1,
            "mlp_width": 8,
            "common_epochs": 0,
            "controller_epochs": 0,
        },
    ),
    "global-local-seg": (
        "phantoms?train=3&test=2&slices=8&size=16",
        {"encoder": "unet-s", "batch_size": 8, "epochs": 1, "steps": 1, "pretrain_batch": 8, "blocks": 1, "hidden": 8},
    ),
    "finetune-seg": ("shapes?train=24&test=8", {"encoder": "conv-cells", "batch_size": 12, "epochs": 1}),
    "finetune-det": ("shapes?train=24&test=8", {"encoder": "conv-s", "width": 32, "batch_size": 12, "epochs": 1}),
    # Its projector normalises by the batch, and a frozen network computes nearly all.
    "gopro": (
        "styled-shapes?train=24&test=8&size=16&label=shape",
        {
            "teacher": "fit:clip?data=styled-shapes%3Ftrain=16%26valid=8%26test=8&image_encoder=conv-s&embedding=8&recipe=none"
            "&epochs=1&batch_size=8",
            "batch_size": 12,
            "epochs": 1,
        },
    ),
    # A step trains the set, and a network of the pool on all of it.
    "krr-st": (
        "digits?size=8&train=24",
        {
            "encoder": "mlp-s",
            "teacher": "fit:simclr?data=digits%3Fsize=8%26train=60%26held_out=0.05%26valid=0.05"
            "&encoder=mlp-s&recipe=none&epochs=1&batch_size=30&hidden=8"
            "&evaluate_every=9",
            "pictures": 5,
            "pool": 1,
            "batch_size": 12,
            "epochs": 1,
            "lr": 0.01,
        },
    ),
    "attention-transfer": (
        PICTURES,
        IMAGES | {"teacher_epochs": 0, "teacher_encoder": "resnet-s", "encoder": "resnet-s"},
    ),
    "fitnets": (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "resnet-s", "encoder": "resnet-s"}),
    "audio-sheet-retrieval": ("scores", {"batch_size": 12, "epochs": 1}),
    # Its networks have feature maps, and batch statistics.
    "obow": (
        "digit-canvases?train=24&test=8",
        {
            "encoder": "conv-s",
            "levels": ["stem", "layer1"],
            "words": 40,
            "recipe": "obow-canvases",
            "large_size": 8,
            "patches": 2,
            "patch_size": 8,
            "batch_size": 12,
            "epochs": 1,
            "warmup_epochs": 0,
        },
    ),
}
# Their networks are another system's: adainf's data take minutes to make, cwcl's text tower is a package of 90 MB.
LIKE_ANOTHER = {"adainf": "simclr", "cwcl": "clip"}


def test_every_system_is_compared_or_refused() -> None:
    built = {row.slug for row in catalog.entries().values() if row.built}
    assert built == set(EXACT) | set(REFUSED) | set(LIKE_ANOTHER)


@pytest.mark.parametrize("slug", sorted(EXACT))
def test_a_step_in_parts_is_the_step_of_the_whole_batch(slug: str) -> None:
    compared(slug, *EXACT[slug])


@pytest.mark.parametrize("slug", sorted(EXACT | REFUSED))
def test_a_step_in_bfloat16_is_near_the_step_in_float32(slug: str) -> None:
    data, settings = (EXACT | REFUSED)[slug]
    found = []
    experiment, task = resolved(slug, data, settings)
    for precision in ("32", "bf16"):
        learner = experiment.learner(task.facts, 0)
        learner.survey = Survey(task, learner)
        learner.begin(learner.survey)
        stepper = Stepper(learner, task, Loop(precision=precision))
        stepper.stand_at(learner.position.state())
        found.append(stepper.step(next(iter(stepper.loader))))
        assert all(p.isfinite().all() for p in learner.parameters())
        assert {p.dtype for p in learner.parameters()} == {torch.float32}
    exact, near = found
    assert exact.keys() == near.keys()
    for name, value in exact.items():
        torch.testing.assert_close(near[name].double(), value.double(), rtol=0.05, atol=0.05)


def test_items_that_lack_a_modality_change_nothing() -> None:
    def holed(batch: dict[str, Any]) -> dict[str, Any]:
        present = {name: there.clone() for name, there in batch["present"].items()}
        for number, there in enumerate(present.values()):
            there[number::4] = False
        return batch | {"present": present, "whole": frozenset()}

    compared("clip", *EXACT["clip"], holed)


@pytest.mark.parametrize("slug", ["attention-transfer", "fitnets"])
def test_a_learner_that_looks_at_layers_inside_is_refused(slug: str) -> None:
    with pytest.raises(CounterpointError, match=r"--accumulate: .* cannot split its batches, because it uses layers"):
        started(slug, *REFUSED[slug], 2)


def test_a_learner_whose_networks_have_batch_statistics_is_refused() -> None:
    with pytest.raises(CounterpointError, match="--accumulate: "):
        started("audio-sheet-retrieval", *REFUSED["audio-sheet-retrieval"], 2)


def test_batch_statistics_are_refused_by_name() -> None:
    with pytest.raises(
        CounterpointError, match=r"--accumulate: the network has batch statistics \(BatchNorm2d .*vit-s"
    ):
        started("simclr", PICTURES, IMAGES | {"encoder": "resnet-s"}, 2)
    layer = nn.BatchNorm1d(2)
    with pytest.raises(CounterpointError, match="batch statistics"):
        check_row_wise("it", [(layer, "forward")])
    check_row_wise("it", [(layer.eval(), "forward")])  # its statistics are fixed


def held(network: nn.Module, x: Tensor, parts: int) -> int:
    """Count bytes that autograd keeps for the backward pass, besides weights and inputs."""
    seen: dict[int, int] = {}
    known = {value.data_ptr() for value in [*network.parameters(), x]}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in known:
            seen[value.data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), running([(network, "forward")], parts):
        out = network(x)
        kept = sum(seen.values())
        out.square().mean().backward()
    return kept


def test_parts_hold_less_for_the_backward_pass() -> None:
    network = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())])
    x = torch.randn(96, 64)
    assert held(network, x, 4) * 8 < held(network, x, 1)


def test_dropout_is_replayed_and_a_network_that_changes_is_refused() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.ones(6, 4, requires_grad=True)
    with running([(network, "forward")], 3):
        out = network(x)
        out.sum().backward()
    masks = (out != 0).float() * 2
    assert x.grad is not None
    torch.testing.assert_close(x.grad, masks @ network[0].weight)

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    counting = Counting(4, 4)
    with running([(counting, "forward")], 3), pytest.raises(CounterpointError, match="another output"):
        counting(x).sum().backward()


def test_two_processes_in_parts_are_as_good_as_one(tmp_path: Path) -> None:
    options = (
        "--data async-bags?train=18&test=4 --epochs 1 --dropout 0 --contrast-delay 0 --batch-size 9 --accumulate 2"
    )
    words = f"train macil-sd {options} --out {tmp_path}".split()
    assert cli.main([*words, "--name", "one"]) == 0
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = (Run.open(tmp_path / name).metrics() for name in ("one", "two"))
    assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-5)
