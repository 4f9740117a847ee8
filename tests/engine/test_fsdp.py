"""`--fsdp`: two processes that divide networks train as one process does, resume, and write a normal run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from counterpoint import cli
from counterpoint.core.divided import is_sharded
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.sharded import check_shardable
from counterpoint.errors import CounterpointError
from counterpoint.search import Encoder
from launch import command_over_processes, free_port

WORDS = "--epochs 2 --batch-size 16 --embedding 8 --seed 3 --evaluate-every 1 --clip-norm 0.5"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write a table of vectors and texts. Return the command that trains on it."""
    folder = tmp_path_factory.mktemp("fsdp")
    rng = np.random.default_rng(0)
    lines = ["id,imu,words,split"]
    for n in range(72):
        numbers = ", ".join(f"{value:.3f}" for value in rng.standard_normal(6))
        lines.append(f'{n},"[{numbers}]",number {n} of {n % 7},{"test" if n % 4 == 0 else "train"}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    spec = f"manifest:{folder}/table.csv?columns=imu:vector,words:text,split:split"
    return ["train", "clip", "--data", spec, *WORDS.split(), "--out", str(folder)]


def _stopped(rank: int, words: list[str], port: int) -> None:
    """Train on process `rank` of two, check that networks are divided, and be interrupted in the second epoch."""
    from counterpoint.systems.classics.clip import CLIP

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    count, loss = 0, CLIP.loss

    def counted(self: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:  # both stop one step later, within the second epoch
            held = list(self.encoders.parameters())
            assert all(map(is_sharded, held))
            assert sum(p.to_local().numel() for p in held) < 0.6 * sum(p.numel() for p in held)
            if rank == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    CLIP.loss = counted
    assert cli.main(words) == 130


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["clip", "siglip"])
def test_two_processes_with_divided_networks_train_as_one(words: list[str], tmp_path: Path, slug: str) -> None:
    words = ["train", slug, *words[2:-1], str(tmp_path)]
    assert cli.main([*words, "--name", "one"]) == 0
    assert command_over_processes([*words, "--name", "two", "--fsdp"], tmp_path).count("Run: ") == 1
    one, two = (Run.open(tmp_path / name) for name in ("one", "two"))
    assert two.complete
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    mine, its = one.load_weights(), two.load_weights()
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        assert value.numpy() == pytest.approx(its[name].numpy(), rel=1e-3, abs=1e-5), name
    if slug != "clip":  # `_stopped` counts CLIP's steps
        return
    mp.start_processes(
        _stopped, ([*words, "--name", "halves", "--fsdp"], free_port()), nprocs=2, start_method="forkserver"
    )
    halves = Run.open(tmp_path / "halves")
    assert not halves.complete
    assert 0 < len(halves.metrics()) < 2
    command_over_processes(["train", "--resume", str(halves.path)], tmp_path)
    assert halves.metrics() == two.metrics()
    rows = [Encoder.load(run).encode(texts=["number 3 of 3"]) for run in (one, two)]
    np.testing.assert_allclose(*rows, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_convolutions_with_channels_last_are_divided(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = ["image,words,split"]
    for n in range(48):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,number {n} of {n % 7},{'test' if n % 4 == 0 else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    data = f"manifest:{tmp_path}/table.csv?columns=image:image,words:text&size=16"
    words = ["train", "clip", "--data", data, *WORDS.split(), "--image-encoder", "conv-s", "--out", str(tmp_path)]
    assert cli.main([*words, "--name", "one"]) == 0
    said = command_over_processes([*words, "--name", "two", "--fsdp"], tmp_path)
    assert "Warning" not in said
    mine, its = (Run.open(tmp_path / name).load_weights() for name in ("one", "two"))
    for name, value in mine.items():
        assert value.numpy() == pytest.approx(its[name].numpy(), rel=1e-3, abs=1e-4), name


def test_learners_and_options_that_cannot_be_divided_are_refused_by_name(words: list[str], capsys: Any) -> None:
    for slug, data, said in (
        ("simclr", "digits?train=64", "SimCLR has no network that processes can divide among them"),
        ("clip", words[3], "several processes; start them: torchrun --nproc-per-node 2 -m counterpoint train"),
    ):
        assert (
            cli.main(
                [
                    "train",
                    slug,
                    "--data",
                    data,
                    "--batch-size",
                    "16",
                    "--epochs",
                    "1",
                    "--fsdp",
                    "--out",
                    f"{words[-1]}/no",
                ]
            )
            == 2
        )
        assert said in capsys.readouterr().err
    learner: Any = SimpleNamespace(shardable=lambda: ["encoder"], config=SimpleNamespace(optimizer="lars"))
    stage: Any = SimpleNamespace(enter=None, trains=None)
    with pytest.raises(CounterpointError, match="--fsdp cannot be combined with --ema"):
        check_shardable(learner, Loop(fsdp=True, ema=0.9), [stage])
    with pytest.raises(CounterpointError, match="the optimizer lars takes norms over whole parameters"):
        check_shardable(learner, Loop(fsdp=True), [stage])
    with pytest.raises(CounterpointError, match="trains in stages"):
        check_shardable(learner, Loop(fsdp=True), [stage, stage])
