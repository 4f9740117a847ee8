"""`torchrun --nproc_per_node 2` gives the figures of one process, uneven last batches included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from counterpoint.engine.run import Run

# 20 bags in batches of 9 leave a last batch of 2; in batches of 19 one process has none of the last batch's single bag.
OPTIONS = "--data async-bags?train=20&test=6 --seed 3 --epochs 2 --dropout 0 --contrast-delay 0"


@pytest.mark.parametrize("batch", [9, 19])
def test_two_processes_are_as_good_as_one(tmp_path, batch):
    words = f"train macil-sd {OPTIONS} --batch-size {batch} --out {tmp_path}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, head in (
        ("one", [sys.executable, "-m", "counterpoint"]),
        (
            "two",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "counterpoint"],
        ),
    ):
        result = subprocess.run(
            [*head, *words, "--name", name], capture_output=True, text=True, timeout=180, env=environment
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("Run: ") == 1
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    assert len(one.metrics()) == len(two.metrics()) == 2
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, value in one.load_weights().items():
        if name.endswith("linears.1.bias"):
            continue  # the softmax does not see the keys' bias: its gradient is rounding, which Adam blows up
        assert value.numpy() == pytest.approx(two.load_weights()[name].numpy(), rel=1e-3, abs=1e-5), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
