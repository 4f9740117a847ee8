"""The core's contrast, pooling, teachers and gathers on their own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core.contrast import info_nce
from counterpoint.core.distributed import gather_rows, global_max, over
from counterpoint.core.mil import extreme_snippets, sequence_lengths, topk_mil_pool
from counterpoint.core.teacher import blend, cosine_momentum
from counterpoint.core.world import leave


def direct_info_nce(q, p, n, t):
    q, p, n = (torch.nn.functional.normalize(x, dim=1) for x in (q, p, n))
    positive = ((q * p).sum(1) / t).exp()
    return -(positive / (positive + (q @ n.T / t).exp().sum(1))).log().mean()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 7), st.integers(1, 9), st.floats(0.05, 2.0))
def test_info_nce_is_its_formula(rows, negatives, dim, temperature):
    g = torch.Generator().manual_seed(rows * 100 + negatives * 10 + dim)
    q, p, n = (torch.randn(k, dim, dtype=torch.float64, generator=g) for k in (rows, rows, negatives))
    torch.testing.assert_close(info_nce(q, p, n, temperature), direct_info_nce(q, p, n, temperature))


def test_info_nce_gradients_are_right():
    q, p, n = (torch.randn(k, 5, dtype=torch.float64, requires_grad=True) for k in (3, 3, 4))
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, 0.3, weight=weight), (q, p, n))


def test_info_nce_weights_are_repeated_rows():
    q, p, n = (torch.randn(k, 5, dtype=torch.float64) for k in (3, 3, 4))
    repeated = info_nce(q[[0, 0, 0, 1, 2, 2]], p[[0, 0, 0, 1, 2, 2]], n)
    torch.testing.assert_close(info_nce(q, p, n, weight=torch.tensor([3.0, 1.0, 2.0]).double()), repeated)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_info_nce_is_finite_at_extremes(scale):
    q, p, n = (scale * torch.randn(k, 5) for k in (3, 3, 4))
    q[0] = 0
    q.requires_grad_()
    loss = info_nce(q, p, n, 1e-3)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(q.grad).all()


def test_info_nce_without_negatives_is_zero():
    q = torch.randn(3, 4, requires_grad=True)
    assert info_nce(q, q, torch.zeros(0, 4)) == 0
    with pytest.raises(ValueError, match="query is an empty batch"):
        info_nce(q[:0], q[:0], q)
    for bad in ((torch.zeros(2, 4), q, q), (q, q, torch.zeros(2, 3)), (q[0], q[0], q)):
        with pytest.raises(ValueError, match="must be"):
            info_nce(*bad)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(q, q, q, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.booleans())
def test_extremes_are_those_of_sorting(bags, time, largest):
    g = torch.Generator().manual_seed(bags * 100 + time)
    score = torch.randn(bags, time, generator=g)
    seq_len = torch.randint(1, time + 1, (bags,), generator=g)
    count = seq_len // 16 + 1
    index, keep = extreme_snippets(score, seq_len, count, largest=largest)
    for b in range(bags):
        expected = score[b, : seq_len[b]].sort(descending=largest).values[: count[b]]
        torch.testing.assert_close(score[b][index[b][keep[b]]], expected)
    pooled = topk_mil_pool(score, seq_len)
    for b in range(bags):
        top = score[b, : seq_len[b]].sort(descending=True).values[: count[b]]
        torch.testing.assert_close(pooled[b], torch.sigmoid(top.mean()))


def test_bags_without_snippets_are_refused():
    with pytest.raises(ValueError, match="seq_len must lie in 1"):
        topk_mil_pool(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="fewer snippets"):
        extreme_snippets(torch.zeros(1, 3), torch.tensor([2]), torch.tensor([3]), largest=True)


def test_lengths_count_the_rows_that_hold_anything():
    features = torch.zeros(2, 5, 3)
    features[0, :4] = 1
    features[0, 2] = 0
    features[1, 0, 1] = -1e-8
    assert sequence_lengths(features).tolist() == [3, 1]


def test_momentum_rises_on_a_cosine_and_blending_is_an_average():
    assert cosine_momentum(0, 10, 0.9) == pytest.approx(0.9)
    assert cosine_momentum(10, 10, 0.9) == 1.0
    assert cosine_momentum(5, 10, 0.9) == pytest.approx(0.95)
    assert cosine_momentum(3, 10, 0.5) == pytest.approx(1 - 0.25 * (1 + math.cos(0.3 * math.pi)))
    with pytest.raises(ValueError, match="step"):
        cosine_momentum(11, 10, 0.9)
    target, source = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "c": torch.zeros(2)}
    blend(target, source, 0.75)
    assert target["a"].tolist() == [0.75, 0.75]
    assert target["b"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="share no parameter"):
        blend(target, {"z": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match="'a' is"):
        blend(target, {"a": torch.ones(3)}, 0.5)


WHOLE = torch.linspace(-1, 1, 7 * 3, dtype=torch.float64).reshape(7, 3)


def _loss(rows):
    return (rows @ rows.T).logsumexp(1).mean()


def _process(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with over("world"):
        own = WHOLE[rank::size].clone().requires_grad_()  # 7 rows over 3 processes: uneven shares
        gathered = gather_rows(own)
        order = torch.cat([torch.arange(7)[r::size] for r in range(size)])
        assert torch.equal(gathered.detach(), WHOLE[order])
        loss = _loss(gathered)
        loss.backward()
        labels = gather_rows(torch.arange(7)[rank::size])
        assert labels.tolist() == order.tolist()
        assert global_max(rank) == size - 1
        torch.save((loss.detach(), own.grad), f"{folder}/{rank}.pt")
    leave()


def test_processes_together_have_the_loss_and_the_gradients_of_one(tmp_path):
    size = 3
    mp.start_processes(_process, (size, str(tmp_path)), nprocs=size, start_method="forkserver")
    whole = WHOLE.clone().requires_grad_()
    loss = _loss(whole)
    loss.backward()
    for rank in range(size):
        shared, grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(shared, loss.detach(), rtol=1e-12, atol=0)
        # Summed over processes; DistributedDataParallel divides by their number.
        torch.testing.assert_close(grad / size, whole.grad[rank::size], rtol=1e-10, atol=1e-12)


def test_alone_nothing_is_gathered():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert global_max(5) == 5


def test_gloo_gets_time_to_release_its_tensors_before_the_group_ends(monkeypatch):
    from counterpoint.core import world

    calls = []
    monkeypatch.setattr(world.time, "sleep", lambda seconds: calls.append("pause"))
    monkeypatch.setattr(world.dist, "destroy_process_group", lambda: calls.append("end"))
    world.leave()
    assert calls == ["pause", "end"]
