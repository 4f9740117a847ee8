"""`--lora` of learners of several modalities: bases stay bit for bit, heads and other encoders train, runs continue, errors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoint import cli, training
from counterpoint.encoders import adapters
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.text import build_text_encoder, train_bpe
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra [adapters]")

DATA = "digit-streams?train=64&test=20"
SMALL: dict[str, Any] = {
    "epochs": 2, "batch_size": 32, "recipe": "none", "evaluate_every": 9, "warmup_epochs": 0, "embedding": 8, "lr": 0.05,
    "context": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Save folders with small networks of transformers, of pictures and of texts with its tokenizer."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

    out = tmp_path_factory.mktemp("networks")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(out / "vit")
    words = train_bpe(["one two three"], 270)
    BertModel(BertConfig(**sizes, vocab_size=words.vocabulary, max_position_embeddings=32)).save_pretrained(
        out / "bert"
    )
    PreTrainedTokenizerFast(tokenizer_object=words.model, pad_token="[PAD]").save_pretrained(out / "bert")
    return {"image_encoder": f"hf:{out / 'vit'}", "text_encoder": f"hf:{out / 'bert'}"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run whose encoder of pictures has batch normalisation, and whose encoder of texts is our own."""
    settings = SMALL | {"image_encoder": "timm:test_resnet", "text_encoder": "text-16-1-2"}
    config = Experiment.resolve("clip", DATA, overrides=settings).config
    return training.train("clip", config, data=DATA, out=tmp_path_factory.mktemp("parent"), say=lambda _: None)


def continued(parent: Run, out: Path, **settings: Any) -> Run:
    config = Experiment.resolve("clip", DATA, overrides=vars(Experiment.of_run(parent).config) | settings).config
    return training.train("clip", config, data=DATA, parent=parent.path, out=out, say=lambda _: None)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_command_line_adapts_published_encoders_and_trains_new_heads(
    networks: Mapping[str, str], tmp_path: Path, undrawn: None
) -> None:
    words = ["train", "clip", "--data", DATA, "--pretrained", "--lora", "2", "--out", str(tmp_path), "--name", "run"]
    for name, value in (SMALL | networks).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    learner: Any = load_learner(tmp_path / "run")
    assert learner.adapted == ["image", "text"]
    size = learner.facts.modalities["image"]["size"]
    x = {
        "image": (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),),
        "text": (torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)),
    }
    bases = {
        "image": build_image_encoder(networks["image_encoder"], size, pretrained=True).eval(),
        "text": build_text_encoder(networks["text_encoder"]).eval(),
    }
    first: Any = Experiment.of_run(Run.open(tmp_path / "run")).learner(Run.open(tmp_path / "run").facts(), 0)
    for name, base in bases.items():
        encoder = learner.encoders[name]
        assert equal(adapters.base_state(encoder), base.state_dict())
        with torch.no_grad():
            before = base(*x[name])
            assert not torch.allclose(encoder(*x[name]), before)
            with adapters.adapters_off(encoder):
                assert torch.equal(encoder(*x[name]), before)
        assert not torch.equal(learner.heads[name].weight, first.heads[name].weight)

    assert cli.main(["export", str(tmp_path / "run"), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    from peft import PeftModel
    from transformers import ViTModel

    theirs = PeftModel.from_pretrained(
        ViTModel.from_pretrained(networks["image_encoder"][3:]), tmp_path / "peft" / "image"
    )
    ours = adapters.merged_state(learner.encoders["image"].model)
    assert equal({name: ours[name] for name in ours}, theirs.merge_and_unload().state_dict())
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["image", "text"]


def test_a_run_continues_with_adapters_and_its_statistics_stay(parent: Run, tmp_path: Path, undrawn: None) -> None:
    before: Any = load_learner(parent)
    run = continued(parent, tmp_path, lora=2, lora_modalities=("image",))
    learner: Any = load_learner(run)
    assert equal(adapters.base_state(learner.encoders["image"]), before.encoders["image"].state_dict())
    assert any(bool(p.any()) for n, p in adapters.adapter_parameters(learner).items() if "lora_B" in n)
    assert not equal(learner.encoders["text"].state_dict(), before.encoders["text"].state_dict())
    assert not torch.equal(learner.heads["image"].weight, before.heads["image"].weight)
    learner.train()
    assert not any(layer.training for layer in learner.modules() if isinstance(layer, torch.nn.BatchNorm2d))

    after = training.train("clip", replaced(run, lora=0, lora_modalities=(), epochs=1, lr=1e-30), data=DATA, parent=run.path,
                           out=tmp_path, say=lambda _: None)  # fmt: skip
    ours, merged = load_learner(after).state_dict(), adapters.merged_state(learner)
    same = [
        torch.allclose(ours[n], merged[n], atol=1e-6) for n in ours if "running" not in n and "num_batches" not in n
    ]
    assert all(same)


def replaced(run: Run, **settings: Any) -> Any:
    return Experiment.resolve("clip", DATA, overrides=vars(Experiment.of_run(run).config) | settings).config


def test_statistics_move_where_they_are_asked_to(parent: Run, tmp_path: Path, undrawn: None) -> None:
    before: Any = load_learner(parent)
    learner: Any = load_learner(
        continued(parent, tmp_path, lora=2, lora_modalities=("image",), lora_statistics="train")
    )
    base, after = before.encoders["image"].state_dict(), adapters.base_state(learner.encoders["image"])
    changed = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, base[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("slug", ["siglip", "mod-x", "improved-vlp-baselines", "contrastive-gap"])
def test_other_systems_train_adapters_heads_and_the_other_encoder_alone(slug: str, networks: Mapping[str, str]) -> None:
    settings = {name: value for name, value in SMALL.items() if name != "lr"}
    settings |= {
        "image_encoder": networks["image_encoder"],
        "pretrained": True,
        "lora": 2,
        "text_encoder": "text-16-1-2",
    }
    settings |= {"towers": "named"} if slug == "improved-vlp-baselines" else {}
    experiment = Experiment.resolve(slug, DATA, overrides=settings | {"epochs": 1})
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    assert learner.adapted == ["image"]
    first = {name: value.clone() for name, value in learner.state_dict().items()}
    from counterpoint.engine.fit import fit

    fit(learner, task, bar=False)
    after = learner.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, first[name])}
    mine = {name for name in moved if name.startswith("encoders.image")}
    assert mine
    assert all(".lora_" in name for name in mine)
    assert any(name.startswith("encoders.text") for name in moved)
    assert any(name.startswith("heads.image") for name in moved)


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("clip", {"lora": -1}, "at least 1, got -1"),
        ("clip", {"lora_modalities": ("image",)}, "lora_modalities needs adapters"),
        ("clip", {"lora_statistics": "train"}, "lora_statistics needs adapters"),
        *[
            (slug, {"lora": 4}, "trains no encoder of its own")
            for slug in ("tinyclip", "albef", "dcd", "teminal", "audio-sheet-retrieval", "creamfl")
        ],
    ],
)
def test_settings_that_do_not_fit_are_named(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve(slug, None, overrides=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "all encoders that train have random ones; give --pretrained"),
        ({"lora_modalities": ("sound",)}, "unknown modality of lora_modalities 'sound'"),
        ({"lora_modalities": ("image",)}, "the encoder of image has random ones; start from a run with --continue"),
    ],
)
def test_adapters_of_random_weights_leave_nothing_on_disk(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = SMALL | {"image_encoder": "vit-s", "text_encoder": "text-16-1-2", "lora": 2} | settings
    config = Experiment.resolve("clip", DATA, overrides=given).config
    with pytest.raises(CounterpointError, match=message):
        training.train("clip", config, data=DATA, out=tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_frozen_tower_gets_no_adapters(networks: Mapping[str, str]) -> None:
    settings = {"pretrained": True, **networks, "frozen": "text", "embedding": 16, "lora": 2}
    experiment = Experiment.resolve("cwcl", DATA, overrides=settings)
    learner: Any = experiment.learner(experiment.task().facts, 0)
    assert learner.adapted == ["image"]
    with pytest.raises(CounterpointError, match="the encoder of text is frozen"):
        experiment_with(experiment, lora_modalities=("text",))


def experiment_with(experiment: Experiment, **settings: Any) -> Any:
    other = Experiment.resolve("cwcl", DATA, overrides=vars(experiment.config) | settings)
    return other.learner(other.task().facts, 0)
