"""Queue, bank, per-sample state, prototypes and k-means."""

from __future__ import annotations

import collections
import math
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core.memory import Bank, Prototypes, Queue, SampleState, kmeans, latest, moved
from counterpoint.core.world import leave, over


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=8))
def test_the_queue_holds_the_last_keys_written(length, batches):
    queue, reference = Queue(length, 3), collections.deque(maxlen=length)
    reference.extend(queue.read())
    for number, n in enumerate(batches):
        keys = draw(n, 3, seed=number)
        queue.write(keys)
        reference.extend(F.normalize(keys))
    oldest_first = queue.read().roll(-int(queue.pointer), 0)
    torch.testing.assert_close(oldest_first, torch.stack(list(reference)))


def test_the_queue_starts_as_unit_noise_of_its_seed():
    a, b, c = Queue(50, 4, seed=1), Queue(50, 4, seed=torch.Generator().manual_seed(1)), Queue(50, 4, seed=2)
    torch.testing.assert_close(a.read().norm(dim=1), torch.ones(50))
    assert torch.equal(a.read(), b.read())
    assert not torch.equal(a.read(), c.read())


def test_what_was_read_outlives_the_next_write():
    queue, query = Queue(4, 3), draw(2, 3).requires_grad_()
    keys = queue.read()
    loss = (query @ keys.T).logsumexp(1).sum()
    queue.write(draw(2, 3, seed=1))
    loss.backward()
    expected = (query @ keys.T).softmax(1) @ keys
    torch.testing.assert_close(query.grad, expected)
    assert not any(p.requires_grad for p in (keys, queue.rows))


def test_memories_are_saved_and_resumed():
    class Everything(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.queue, self.bank = Queue(5, 3, seed=seed), Bank(6, 3, seed=seed)
            self.state, self.prototypes = SampleState(6), Prototypes(2, 3)

    def step(net, seed):
        net.queue.write(draw(3, 3, seed=seed))
        net.bank.update(torch.tensor([1, 4]), draw(2, 3, seed=seed))
        net.state.update(torch.tensor([1, 4]), draw(2, seed=seed))
        net.prototypes.update(draw(2, 3, seed=seed), torch.tensor([1, 1]))

    first, second = Everything(0), Everything(1)
    step(first, 10)
    second.load_state_dict(first.state_dict())
    step(first, 11)
    step(second, 11)
    assert not list(first.parameters())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12))
def test_latest_is_where_each_was_seen_last(index):
    expected = sorted({value: place for place, value in enumerate(index)}.values())
    assert latest(torch.tensor(index, dtype=torch.long)).sort().values.tolist() == expected


def test_bank_moves_its_rows_and_the_last_of_equal_positions_counts():
    bank = Bank(8, 3, momentum=0.25)
    before, values = bank.rows.clone(), draw(4, 3)
    bank.update(torch.tensor([5, 2, 5, 0]), values)
    expected = before.clone()
    for place, value in ((2, 1), (5, 2), (0, 3)):
        expected[place] = F.normalize(0.25 * before[place] + 0.75 * values[value], dim=0)
    torch.testing.assert_close(bank.rows, expected)
    kept = bank.lookup(torch.tensor([5, 5]))
    bank.update(torch.tensor([5]), values[:1])
    torch.testing.assert_close(kept, expected[[5, 5]])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_bank_at_the_ends_of_its_momentum(momentum):
    bank, value = Bank(3, 2, momentum=momentum), torch.tensor([[0.0, 5.0]])
    expected = F.normalize(value) if momentum == 0 else bank.rows[1:2].clone()
    bank.update(torch.tensor([1]), value)
    torch.testing.assert_close(bank.lookup(torch.tensor([1])), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Queue(0, 3), "length"),
        (lambda: Queue(4, 3).write(torch.ones(2, 4)), "keys"),
        (lambda: Bank(4, 3, momentum=1.5), "momentum"),
        (lambda: Bank(4, 3).lookup(torch.tensor([-1])), "index must lie in 0..3, got -1"),
        (lambda: Bank(4, 3).lookup(torch.tensor([4])), "index must lie"),
        (lambda: Bank(4, 3).lookup(torch.tensor([0.0])), "index must be a list"),
        (lambda: Bank(4, 3).update(torch.tensor([0]), torch.ones(2, 3)), "values"),
        (lambda: Bank(4, 3).update(torch.tensor([0]), torch.ones(1, 2)), "values"),
        (lambda: SampleState(4).update(torch.tensor([0, 1]), torch.ones(1)), "value"),
        (lambda: SampleState(4).update(torch.tensor([0]), torch.ones(1, 1)), "value"),
        (lambda: Prototypes(3, 2, momentum=1.0), "momentum"),
        (lambda: Prototypes(3, 2).update(torch.ones(1, 2), torch.tensor([3])), "index"),
        (lambda: Prototypes(3, 2).update(torch.ones(1, 3), torch.tensor([0])), "features"),
        (lambda: kmeans(torch.ones(2, 3), 3), "features"),
        (lambda: kmeans(torch.full((2, 3), math.nan), 1), "not finite"),
        (lambda: kmeans(torch.ones(2, 3), 0), "k must"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_state_of_samples_keeps_its_precision():
    state = SampleState(4, initial=0.1, dtype=torch.float64)
    value = torch.tensor([1 / 3], dtype=torch.float64, requires_grad=True)
    state.update(torch.tensor([2]), value)
    assert torch.equal(state.lookup(torch.tensor([2, 0])), torch.tensor([1 / 3, 0.1], dtype=torch.float64))
    state.update(torch.tensor([], dtype=torch.long), torch.tensor([]))
    assert not state.values.requires_grad


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=15), st.floats(0.0, 0.99))
def test_prototypes_move_by_one_example_after_another(labels, momentum):
    prototypes = Prototypes(5, 3, momentum=momentum)
    prototypes.rows[0] = torch.tensor([1.0, 0.0, 0.0])
    expected, features = prototypes.rows.clone(), draw(len(labels), 3)
    for label, feature in zip(labels, features, strict=True):
        expected[label] = momentum * expected[label] + (1 - momentum) * feature
    prototypes.update(features, torch.tensor(labels, dtype=torch.long))
    torch.testing.assert_close(prototypes.rows, F.normalize(expected), rtol=1e-4, atol=1e-5)
    assert (prototypes.rows[4] == 0).all()  # never seen


def test_kmeans_finds_what_lies_apart_the_same_each_time():
    points = torch.cat([draw(20, 2) + 10 * k for k in range(3)]).double()
    found = kmeans(points, 3, seed=0)
    assert found.centers.dtype == points.dtype
    assert sorted(found.labels.bincount().tolist()) == [20, 20, 20]
    nearest = torch.cdist(points, found.centers).argmin(1)
    assert torch.equal(nearest, found.labels)
    assert torch.equal(found.centers, kmeans(points, 3, seed=0).centers)


def test_faiss_is_used_when_asked_for(monkeypatch):
    class Kmeans:
        def __init__(self, dim, k, seed):
            self.k = k

        def train(self, points):
            self.centroids = points[: self.k]
            self.index = types.SimpleNamespace(search=lambda x, n: (None, torch.zeros(len(x), n).long().numpy()))

    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(Kmeans=Kmeans))
    found = kmeans(draw(4, 2), 2, library="faiss")
    assert torch.equal(found.centers, draw(4, 2)[:2])
    assert found.labels.tolist() == [0] * 4
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError):
        kmeans(draw(4, 2), 2, library="faiss")


def _write(share):
    queue, bank, prototypes = Queue(5, 3), Bank(9, 3), Prototypes(3, 3)
    keys, index = draw(7, 3), torch.tensor([3, 1, 4, 1, 5, 8, 2])
    queue.write(keys[share])
    bank.update(index[share], keys[share])
    prototypes.update(keys[share], index[share] % 3)
    return [queue.rows, queue.pointer, bank.rows, prototypes.rows]


def _process(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with over("world"):
        torch.save(_write(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    leave()


def test_all_processes_hold_the_memory_of_one(tmp_path):
    # Shares of 3, 3 and 1.
    mp.start_processes(_process, (3, str(tmp_path)), nprocs=3, start_method="forkserver")
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), _write(slice(None)))


def test_a_memory_of_half_precision_stays_one():
    queue = Queue(8, 4).half()
    queue.write(torch.eye(4))
    assert queue.rows.dtype == torch.float16
    torch.testing.assert_close(queue.rows[:4], torch.eye(4, dtype=torch.float16))
    assert moved(torch.eye(2).half(), torch.eye(2), 0.5).dtype == torch.float16
