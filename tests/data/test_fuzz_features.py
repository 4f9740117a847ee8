"""Mutated feature files, lists and truths: each set is read whole or refused with a DataError, never anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from counterpoint import data
from counterpoint.errors import DataError
from counterpoint.tasks.bags import checked

ROUNDS = 400


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut, duplicate, move or insert some bytes; more often near the front, where headers are."""
    raw = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(min(len(raw), rng.exponential(60)) if rng.random() < 0.7 else rng.integers(0, len(raw) + 1))
        kind = rng.integers(5)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            raw[at : at + 8] = rng.bytes(8)
        elif kind == 2:
            del raw[at : at + int(rng.integers(1, 200))]
        elif kind == 3:
            raw[at:at] = rng.bytes(int(rng.integers(1, 40)))
        else:
            raw[at:at] = raw[max(0, at - 100) : at]
    return bytes(raw)


def read_whole(root: Path) -> str | None:
    """Return None if every item could be read, else the message of the refusal."""
    try:
        found = data.load(f"xd-violence:{root}")
        for item in [*found.train, *found.valid, *found.test]:
            checked(item, found)
    except DataError as error:
        return str(error)
    # No silent skip: what was accepted holds every line of the lists, and every frame a truth.
    lines = (root / "rgb.list").read_bytes().decode(errors="replace").splitlines()
    assert len(found.train) + 5 * len(found.valid) == sum(bool(line.strip()) for line in lines)
    assert sum(len(v.truth) for v in found.test) == 16 * sum(len(v.audio) for v in found.test)
    return None


@pytest.mark.parametrize("part", range(4))
def test_mutated_sets_are_read_whole_or_refused(xd_tree, tmp_path, part):
    rng = np.random.default_rng(part)
    files = sorted(p for p in xd_tree.root.rglob("*") if p.is_file())
    special = [f for f in files if f.parent == xd_tree.root]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(ROUNDS // 4):
        victim = (special if rng.random() < 0.5 else files)[rng.integers(len(special))]
        kept = tmp_path / "kept"
        shutil.copy(victim, kept)
        victim.write_bytes(mutated(kept.read_bytes(), rng))
        try:
            with np.errstate(all="ignore"):
                said = read_whole(xd_tree.root)
        finally:
            shutil.copy(kept, victim)
        outcomes["read" if said is None else "refused"] += 1
        assert said is None or str(xd_tree.root) in said or "__" in said, f"the message names no file: {said}"
    assert outcomes["refused"] > 20
    assert outcomes["read"] + outcomes["refused"] == ROUNDS // 4
