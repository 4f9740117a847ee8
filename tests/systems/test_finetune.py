"""The classic finetune: what trains and what stays, blocks of networks, starts from runs, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import counterpoint as cp
from counterpoint import training
from counterpoint.cli import main
from counterpoint.encoders.taps import block_names
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.classics import finetune
from counterpoint.tasks.labelled import cross_entropy

DATA = "digits?train=64&held_out=0.05&valid=0.05"
SMALL = {"encoder": "resnet-s", "epochs": 1, "batch_size": 32, "recipe": "none"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train SimCLR; the tests start from its encoder."""
    config = Experiment.resolve(
        "simclr", DATA, overrides=SMALL | {"recipe": "digits-plain", "encoder": "resnet-s"}
    ).config
    out = tmp_path_factory.mktemp("runs")
    return training.train("simclr", config, data=DATA, out=out, name="parent", say=lambda _: None).path


@pytest.mark.parametrize(
    ("tune", "kept"), [("head", {0, 1, 2, 3}), ("last", {0, 1}), ("all", set())], ids=["head", "last two", "all"]
)
def test_only_the_chosen_blocks_change(tune: str, kept: set[int], parent: Path, tmp_path: Path) -> None:
    config = Experiment.resolve(
        "finetune", DATA, overrides=SMALL | {"start": str(parent), "tune": tune, "blocks": 2, "lr": 0.1}
    ).config
    run = training.train("finetune", config, data=DATA, out=tmp_path, name="child", say=lambda _: None)
    before, after = load_learner(parent).encoder, load_learner(run).encoder
    names = block_names(before)
    assert names == ["stem", "layer1", "layer2", "layer3"]
    pairs = [(before.get_submodule(name).state_dict(), after.get_submodule(name).state_dict()) for name in names]
    same = {
        number
        for number, (old, new) in enumerate(pairs)
        if all(torch.equal(value, new[name]) for name, value in old.items())  # running statistics included
    }
    assert same == kept


@pytest.mark.parametrize(
    ("name", "first"),
    [("vit-xs", "model.blocks.2"), ("timm:resnet10t", "model.layer3"), ("torchvision:resnet18", "model.layer3")],
)
def test_all_that_follows_the_first_of_the_last_blocks_trains(name: str, first: str) -> None:
    learner = cp.create("finetune", size=32, classes=3, encoder=name, pretrained=False, tune="last", blocks=2)
    trained = [key for key, p in learner.encoder.named_parameters() if p.requires_grad]
    order = [key for key, _ in learner.encoder.named_modules()]
    blocks = {key for key in order[order.index(first) :] if key}
    assert trained
    assert {key.rpartition(".")[0] for key in trained} <= blocks
    frozen = {key for key, p in learner.encoder.named_parameters() if not p.requires_grad}
    assert not {key.rpartition(".")[0] for key in frozen} & blocks
    assert {key for key, module in learner.encoder.named_modules() if module.training} == blocks


def test_a_step_takes_the_smoothed_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def seen(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        given.append(label_smoothing)
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)

    monkeypatch.setattr(finetune, "cross_entropy", seen)
    Experiment.resolve("finetune", DATA, overrides=SMALL | {"label_smoothing": 0.2}).run(0)
    assert set(given) == {0.2}


def test_smoothing_spreads_a_share_of_the_target_over_all_classes() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    target = 0.7 * F.one_hot(labels, 3) + 0.3 / 3
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=0.3), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tune": "last", "blocks": 9}, "the encoder has 4 blocks"),
        ({"tune": "some"}, "unknown tune 'some'"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie in 0..1"),
        ({"tune": "head", "lora": 2, "start": "x"}, "--lora adapts"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(CounterpointError, match=said):
        Experiment.resolve("finetune", DATA, overrides=SMALL | settings).run(0)


@pytest.mark.usefixtures("drawn")
def test_the_command_line_starts_from_a_run(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "finetune", "--from", str(parent), "--data", DATA, "--tune", "head", "--out", str(tmp_path)]
    assert main([*words, "--epochs", "1", "--batch-size", "32", "--name", "a"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_the_command_finetune_needs_a_run_and_data(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    assert "which run?" in capsys.readouterr().err
    assert main(["finetune", str(parent)]) == 2
    assert "which labelled data?" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(parent)]) == 2  # a run to resume names its encoder and its data
    assert "complete; there is nothing to resume" in capsys.readouterr().err
