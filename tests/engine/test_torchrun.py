"""`torchrun --nproc_per_node 2` gives the figures of one process, uneven last batches included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint import cli
from counterpoint.engine.run import Run
from launch import command_over_processes

# 20 bags in batches of 9 leave a last batch of 2; in batches of 19 one process has none of the last batch's single bag.
OPTIONS = "--data async-bags?train=20&test=6 --seed 3 --epochs 2 --dropout 0 --contrast-delay 0"


def by_torchrun(words: list[str], folder: Path) -> str:
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "counterpoint"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*head, *words], capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# The second set of processes has the environment of torchrun without torchrun, which takes ten seconds to start.
@pytest.mark.parametrize(
    ("batch", "launch"), [pytest.param(9, by_torchrun, marks=pytest.mark.slow), (19, command_over_processes)]
)
def test_two_processes_are_as_good_as_one(tmp_path, capsys, batch, launch):
    words = f"train macil-sd {OPTIONS} --batch-size {batch} --out {tmp_path}/runs".split()
    assert cli.main([*words, "--name", "one"]) == 0
    assert capsys.readouterr().out.count("Run: ") == 1
    assert launch([*words, "--name", "two"], tmp_path).count("Run: ") == 1
    one, two = Run.open(tmp_path / "runs" / "one"), Run.open(tmp_path / "runs" / "two")
    assert len(one.metrics()) == len(two.metrics()) == 2
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, value in one.load_weights().items():
        if name.endswith("linears.1.bias"):
            continue  # the softmax does not see the keys' bias: its gradient is rounding, which Adam blows up
        assert value.numpy() == pytest.approx(two.load_weights()[name].numpy(), rel=1e-3, abs=1e-5), name
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["one", "two"]


def test_a_system_with_a_run_of_its_own_refuses_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train", "creamfl", "--data", "digit-parties?train=40&test=20&items=40&pairs=1&images=1&texts=1"]
    assert cli.main([*words, "--out", str(tmp_path / "runs")]) == 2
    assert "creamfl has a run of its own, which is one process: start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        "compare simclr dcl --data digits",
        "sweep simclr --data digits --over lr=1e-3..1:log",
        "verify symile",
        "embed runs/a -o a.npz",
    ],
)
def test_commands_that_divide_their_tasks_refuse_torchrun(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words.split()) == 2
    assert (
        "this command divides its tasks itself: start it without torchrun, with --workers N" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_distill_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        cli.main(["distill", "--teacher", "run:runs/big", "--student", "conv-s", "--data", "digits", "--method", "kd"])
        == 2
    )
    assert (
        "distill trains its students one after another, each in one process: start it without"
        in capsys.readouterr().err
    )
