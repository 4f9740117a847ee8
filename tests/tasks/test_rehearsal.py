"""Rehearsal: herding, the size of the memory, batches without an item twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterpoint.engine.loading import Position
from counterpoint.errors import CounterpointError
from counterpoint.tasks.rehearsal import RehearsalBatches, exemplars, herded, need_memory


def test_herding_takes_the_row_that_brings_the_mean_of_the_chosen_closest_to_the_mean():
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    chosen: list[int] = []
    for _ in range(4):
        left = [n for n in range(9) if n not in chosen]
        chosen.append(
            min(left, key=lambda n: float((rows[[*chosen, n]].double().mean(0) - rows.double().mean(0)).norm()))
        )
    assert herded(rows, 4).tolist() == chosen


def test_herding_of_few_equal_or_no_rows():
    assert sorted(herded(torch.randn(3, 2), 5).tolist()) == [0, 1, 2]
    assert herded(torch.ones(4, 2), 3).tolist() == [0, 1, 2]
    assert herded(torch.ones(4, 2), 0).tolist() == []


@pytest.mark.parametrize(
    ("memory", "items", "count"), [(0.01, 1000, 10), (0.01, 7, 1), (0, 7, 0), (1, 7, 1), (20, 7, 7), (0.5, 7, 3)]
)
def test_a_memory_is_a_share_or_a_number_of_items(memory, items, count):
    assert exemplars(memory, items) == count


@pytest.mark.parametrize(
    ("new", "kept", "size", "share"), [(40, 7, 10, 0.3), (9, 3, 8, 0.9), (5, 2, 12, 0.2), (12, 0, 4, 0.2)]
)
def test_batches_never_repeat_an_item_and_use_the_kept_ones_equally(new, kept, size, share):
    made = RehearsalBatches(np.arange(new), 100 + np.arange(kept), size, share)
    for epoch in range(3):
        batches = list(made.bind(0, Position(epoch=epoch), 0, 1))
        assert len(batches) == len(made) == new // made.fresh
        assert all(len(set(batch)) == len(batch) <= size for batch in batches)
        fresh = [row for batch in batches for row in batch if row < 100]
        old = [row for batch in batches for row in batch if row >= 100]
        assert len(set(fresh)) == len(fresh) == len(batches) * made.fresh
        assert len(old) == len(batches) * min(kept, size - 1, round(share * size) or 1)
        counts = np.bincount(np.array(old, np.int64) - 100, minlength=kept) if kept else np.zeros(1)
        assert counts.max() - counts.min() <= 1 + (len(old) % max(1, kept) > 0)


def test_processes_share_the_batches_of_one_and_a_resumed_epoch_continues():
    made = RehearsalBatches(np.arange(40), 100 + np.arange(7), 10, 0.3)
    whole = [list(batch) for batch in made.bind(1, Position(epoch=2), 0, 1)]
    halves = [list(made.bind(1, Position(epoch=2), rank, 2)) for rank in range(2)]
    for batch, one, other in zip(whole, *halves, strict=True):
        assert sorted(one + other) == sorted(batch)
    assert list(made.bind(1, Position(epoch=2, batch=3), 0, 1)) == whole[3:]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((float("nan"), 0.2, "herding"), "memory"),
        ((2, 0.0, "herding"), "rehearsal_share"),
        ((2, 0.2, "nearest"), "selection must be herding or random, got 'nearest'"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        need_memory(*settings)
