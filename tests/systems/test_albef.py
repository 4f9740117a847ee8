"""ALBEF: the authors' numbers, the card's identities, the edges, a step's order, checkpoints in the authors' layout, maps."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from counterpoint import catalog, cli, training
from counterpoint.core import affinities, kernel
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.masking import mask_tokens
from counterpoint.core.rows import token_numbers
from counterpoint.data.digit_pairs import load_pairs
from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.worlds.digits import NAMES
from counterpoint.encoders.albef_weights import load_albef_checkpoint
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment.albef import (
    ALBEF,
    SYSTEM,
    ALBEFConfig,
    hard_negative_weights,
    mlm_distill,
    momentum_contrast_soft,
)
from counterpoint.tasks import fused
from counterpoint.tasks.aligned import AlignedTask
from counterpoint.tasks.fused import Seen
from counterpoint.tasks.grounding import grounding_maps
from counterpoint.tasks.reranking import rerank

PARITY = np.load(Path(__file__).parents[1] / "parity" / "albef.npz")
TINY = {
    "epochs": 1,
    "batch_size": 8,
    "queue": 16,
    "image_encoder": "vit-s",
    "text_encoder": "text-s",
    "pretrained": False,
    "embedding": 6,
    "context": 8,
    "vocabulary": 300,
    "recipe": "none",
    "depth": 4,
    "width": 16,
    "heads": 2,
    "fusion_layers": 2,
    "dropout": 0.0,
    "rerank": 4,
}
VECTORS = TINY | {"use_itm": False, "use_mlm": False, "vector_encoder": "relu-16"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PARITY[name]))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int = 5, dim: int = 4, queue: int = 7) -> list[torch.Tensor]:
    four = [draw(n, dim, seed=seed) for seed in range(4)]
    return four + [F.normalize(draw(dim, queue, seed=seed), dim=0) for seed in (5, 6)]


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ the numbers


# Hard targets are float32 in the authors' code, so their numbers are good to 1e-7.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_momentum_contrast_equals_the_authors(case, dtype, rtol):
    names = ("image_emb", "text_emb", "image_emb_m", "text_emb_m", "image_queue", "text_queue")
    given = {name: of(f"{case}/in/{name}").to(dtype) for name in names}
    for name in names[:2]:
        given[name].requires_grad_()
    temp = of(f"{case}/param/temp").to(dtype).requires_grad_()
    ids = {}
    if case == "case1":
        ids = {"idx": of("case1/in/idx"), "idx_queue": of("case1/in/idx_queue")}
    loss = momentum_contrast_soft(**given, temperature=temp, alpha=float(of(f"{case}/param/alpha")), **ids)
    loss.backward()
    close(loss.detach(), of(f"{case}/out/loss_ita"), rtol)
    for name in names[:2]:
        close(given[name].grad, of(f"{case}/grad/{name}"), rtol)
    close(temp.grad, of(f"{case}/grad/temp"), rtol)

    f_v, f_t, g_v, g_t = (given[name].detach() for name in names[:4])
    found = hard_negative_weights(f_v, f_t, g_t, g_v, temp.detach(), ids.get("idx"))
    close(found.image_weights, of(f"{case}/out/neg_image_weights"), 1e-7 if dtype == torch.float64 else 3e-5)
    close(found.text_weights, of(f"{case}/out/neg_text_weights"), 1e-7 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_queues_equal_the_authors(case):
    from counterpoint.core.memory import Queue

    for side in ("image", "text"):
        before = of(f"{case}/in/{side}_queue")
        queue = Queue(before.shape[1], before.shape[0]).double()
        queue.rows.copy_(before.T)
        queue.pointer.fill_(int(of(f"{case}/param/queue_ptr")))
        queue.write(of(f"{case}/in/{side}_emb_m"))
        close(queue.rows.T, of(f"{case}/out/{side}_queue_after"))
        assert int(queue.pointer) == int(of(f"{case}/out/queue_ptr_after"))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_masked_words_equal_the_authors(dtype, rtol):
    logits = of("case2/in/logits").to(dtype).requires_grad_()
    loss = mlm_distill(logits, of("case2/in/logits_m").to(dtype), of("case2/in/labels"), float(of("case2/param/alpha")))
    loss.backward()
    close(loss.detach(), of("case2/out/loss_mlm"), rtol)
    close(logits.grad, of("case2/grad/logits"), rtol)


# ---------------------------------------------------------------------------------------------------------- the identities


def test_momentum_contrast_satisfies_its_identities():
    f_v, f_t, g_v, g_t, images, texts = inputs()
    empty = torch.zeros(4, 0, dtype=torch.float64)
    u, v, p, q = (F.normalize(x, dim=1) for x in (f_v, f_t, g_v, g_t))
    at = torch.arange(5)
    plain = (F.cross_entropy(u @ q.T / 0.1, at) + F.cross_entropy(v @ p.T / 0.1, at)) / 2
    close(momentum_contrast_soft(f_v, f_t, g_v, g_t, empty, empty, 0.1, 0.0), plain)

    # A teacher that is the student, soft targets alone: the entropy of its rows.
    loss = momentum_contrast_soft(f_v, f_t, f_v, f_t, images, texts, 0.1, 1.0)
    to_text = (u @ torch.cat([v, texts.T]).T / 0.1).softmax(1)
    to_image = (v @ torch.cat([u, images.T]).T / 0.1).softmax(1)
    close(loss, -sum((p * p.log()).sum(1).mean() for p in (to_text, to_image)) / 2)

    alike = torch.ones(5, 4, dtype=torch.float64)
    queue = torch.full((4, 7), 0.5, dtype=torch.float64)
    for alpha in (0.0, 0.4, 1.0):
        found = momentum_contrast_soft(alike, alike, alike, alike, queue, queue, 0.07, alpha)
        assert found.item() == pytest.approx(math.log(5 + 7))


@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("block", [1, 30, 2**22])
def test_blocks_of_any_size_and_either_layout_of_the_queue_are_one_loss(block, layout, monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 0)
    monkeypatch.setattr(affinities, "STRIPE", block)
    f_v, f_t, g_v, g_t, *queues = inputs()
    if layout == "rows":
        queues = [queue.T.contiguous().T for queue in queues]
    temp = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = momentum_contrast_soft(f_v.requires_grad_(), f_t, g_v, g_t, *queues, temp, 0.3)
    found = torch.autograd.grad(loss, [f_v, temp])
    # The same in the plain way: soft and hard cross-entropy, mixed.
    monkeypatch.setattr(kernel, "SMALL", 10**6)
    rows = []
    for f, g, own, queue in ((f_v, g_v, g_t, queues[1]), (f_t, g_t, g_v, queues[0])):
        key = torch.cat([F.normalize(own, dim=1), queue.T])
        q, t = (F.normalize(x, dim=1) / s for x, s in ((f, temp), (g, 0.2)))
        hard = F.cross_entropy(q @ key.T, torch.arange(5), reduction="none")
        rows.append(0.3 * pair_cross_entropy(q, key, t, key).rows + 0.7 * hard)
    expected = torch.cat(rows).mean()
    close(loss.detach(), expected.detach())
    for a, b in zip(found, torch.autograd.grad(expected, [f_v, temp]), strict=True):
        close(a, b)


def test_gradients_are_right_and_reach_the_query_side_alone():
    f_v, f_t, g_v, g_t, *queues = (x.requires_grad_() for x in inputs(3, 3, 4))
    temp = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(a, b, t):
        return momentum_contrast_soft(a, b, g_v, g_t, *queues, t, 0.0)

    assert torch.autograd.gradcheck(loss, (f_v, f_t, temp))
    momentum_contrast_soft(f_v, f_t, g_v, g_t, *queues, temp, 0.4).backward()
    assert f_v.grad.abs().max() > 0
    assert all(x.grad is None for x in (g_v, g_t, *queues))


def test_identity_of_captions_shares_the_target():
    f_v, f_t, g_v, g_t, images, texts = inputs()
    ids, slots = torch.tensor([3, 1, 3, 2, 1]), torch.tensor([3, -100, -100, 2, 9, 9, 3])
    y = (ids[:, None] == torch.cat([ids, slots])).double()
    y = y / y.sum(1, keepdim=True)
    u, v, p, q = (F.normalize(x, dim=1) for x in (f_v, f_t, g_v, g_t))
    rows = [
        -(y * (a @ torch.cat([k, queue.T]).T / 0.2).log_softmax(1)).sum(1).mean()
        for a, k, queue in ((u, q, texts), (v, p, images))
    ]
    close(momentum_contrast_soft(f_v, f_t, g_v, g_t, images, texts, 0.2, 0.0, ids, slots), sum(rows) / 2)
    alone = momentum_contrast_soft(f_v, f_t, g_v, g_t, images, texts, 0.2, 0.4, torch.arange(5), torch.full((7,), -100))
    close(alone, momentum_contrast_soft(f_v, f_t, g_v, g_t, images, texts, 0.2, 0.4))


# --------------------------------------------------------------------------------------------------------------- the edges


def test_momentum_contrast_handles_edge_cases():
    f_v, f_t, g_v, g_t, images, texts = given = inputs()
    one = momentum_contrast_soft(*(x[:1] for x in given[:4]), images[:, :0], texts[:, :0], 0.07, 0.4)
    assert one.item() == pytest.approx(0, abs=1e-12)
    half = momentum_contrast_soft(*(x.to(torch.bfloat16) for x in given), 0.07, 0.4)
    assert half.dtype == torch.float32
    assert half.isfinite()
    with pytest.raises(ValueError, match=r"image_emb and text_emb and .* alike"):
        momentum_contrast_soft(f_v, f_t[:3], g_v, g_t, images, texts, 0.07, 0.4)
    with pytest.raises(ValueError, match=r"text_queue must be \[dim, queue\]"):
        momentum_contrast_soft(f_v, f_t, g_v, g_t, images, texts.T, 0.07, 0.4)
    with pytest.raises(ValueError, match="empty batch"):
        momentum_contrast_soft(*(x[:0] for x in given[:4]), images, texts, 0.07, 0.4)
    with pytest.raises(ValueError, match=r"alpha must lie in 0..1, got 1.5"):
        momentum_contrast_soft(*given, 0.07, 1.5)
    with pytest.raises(ValueError, match="temperature must be positive"):
        momentum_contrast_soft(*given, 0.0, 0.4)
    with pytest.raises(ValueError, match="go together"):
        momentum_contrast_soft(*given, 0.07, 0.4, torch.arange(5))
    with pytest.raises(ValueError, match="idx and idx_queue must be"):
        momentum_contrast_soft(*given, 0.07, 0.4, torch.arange(5), torch.arange(5))
    with pytest.raises(ValueError, match="idx holds -100"):
        momentum_contrast_soft(*given, 0.07, 0.4, torch.arange(5) - 100, torch.arange(7))


def test_hard_negatives_that_do_not_exist_raise_an_error():
    f_v, f_t, g_v, g_t = inputs()[:4]
    with pytest.raises(ValueError, match="image_emb is one row"):
        hard_negative_weights(f_v[:1], f_t[:1], g_t[:1], g_v[:1], 0.07)
    with pytest.raises(ValueError, match="idx holds one identity only"):
        hard_negative_weights(f_v, f_t, g_t, g_v, 0.07, torch.ones(5, dtype=torch.long))
    with pytest.raises(ValueError, match="idx must be a number for each row"):
        hard_negative_weights(f_v, f_t, g_t, g_v, 0.07, torch.ones(4, dtype=torch.long))
    broken = f_t.clone()
    broken[0, 0] = math.nan
    with pytest.raises(ValueError, match="text_emb and image_key hold numbers that are not finite"):
        hard_negative_weights(f_v, broken, g_t, g_v, 0.07)


def test_weights_that_underflow_keep_their_proportions():
    x = torch.eye(4) + torch.tensor([0.0, 0.02, 0.04, 0.06])[:, None] * torch.ones(4, 4)
    found = hard_negative_weights(x, x, x, x, 0.001)
    expected = hard_negative_weights(*[x.double()] * 4, 0.001)
    for mine, theirs in zip(found, expected, strict=True):
        assert bool((mine.sum(1) > 0).all())
        assert mine.diagonal().abs().max() == 0
        ratio = theirs / theirs.sum(1, keepdim=True)
        torch.testing.assert_close((mine / mine.sum(1, keepdim=True)).double(), ratio, rtol=0.01, atol=1e-6)
    # A softmax of float32 alone would have left nothing.
    u = F.normalize(x, dim=1)
    assert bool(((u @ u.T / 0.001).softmax(1).fill_diagonal_(0).sum(1) == 0).any())


def test_masked_words_handle_edge_cases():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = mlm_distill(logits, torch.randn(2, 3, 5), torch.full((2, 3), -100), 0.4)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
    with pytest.raises(ValueError, match=r"labels must be -100 or lie in 0..4, got 5..5"):
        mlm_distill(logits, logits, torch.full((2, 3), 5), 0.4)
    with pytest.raises(ValueError, match="logits and logits_m must be"):
        mlm_distill(logits, logits[:1], torch.full((2, 3), 1), 0.4)
    with pytest.raises(ValueError, match=r"alpha must lie in 0..1"):
        mlm_distill(logits, logits, torch.full((2, 3), 1), -0.1)


def test_masking_draws_as_bert_does():
    ids = torch.full((400, 50), 7)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, 0] = False
    g = torch.Generator().manual_seed(0)
    new, labels = mask_tokens(ids, maskable, 3, 1000, 0.15, generator=g)
    chosen = labels != -100
    assert bool((labels[chosen] == 7).all())
    assert not bool(chosen[:, 0].any())
    assert bool((new[~chosen] == 7).all())
    assert chosen[:, 1:].float().mean().item() == pytest.approx(0.15, abs=0.01)
    share = {"mask": (new[chosen] == 3), "same": (new[chosen] == 7)}
    assert share["mask"].float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert share["same"].float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (~share["mask"] & ~share["same"]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert bool((ids == 7).all())
    with pytest.raises(ValueError, match="maskable must be bool"):
        mask_tokens(ids, maskable.long(), 3, 1000)


def test_rerank_scores_the_nearest_alone():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.2, 0.3]])
    found = rerank(similarity, lambda query, key: 10.0 * query + key, 2)
    assert found.tolist() == [[0.0, 1.0, -100.0], [-100.0, 11.0, 12.0]]
    assert bool((rerank(similarity, lambda query, key: key.float(), 9) >= 0).all())
    with pytest.raises(ValueError, match="k must be positive"):
        rerank(similarity, lambda query, key: key, 0)


# ------------------------------------------------------------------------------------------------------------ the data


def test_digit_pairs_have_their_sizes_and_swaps():
    data = load_pairs(train=40, swapped=0.5, seed=1)
    assert (len(data.train), len(data.test)) == (40, 500)
    rows = np.arange(500)
    captions = data.test.column("text", rows)
    assert len(set(captions)) == 100
    assert data.test.column("image", rows).shape == (500, 16, 16, 3)
    clean = load_pairs(train=40, seed=1).train.column("text", np.arange(40))
    other = [a != b for a, b in zip(clean, data.train.column("text", np.arange(40)), strict=True)]
    assert 15 <= sum(other) <= 20
    assert "20 of 40" in data.notes[0]
    flat = load_pairs(train=40, swapped=0.5, vectors=1, seed=1)
    words = flat.train.column("text", np.arange(40))
    assert words.shape == (40, 20)
    assert [f"{NAMES[w[:10].argmax()]} {NAMES[w[10:].argmax()]}" for w in words] == list(
        data.train.column("text", np.arange(40))
    )
    again = load_pairs(train=40, swapped=0.5, vectors=1, seed=1)
    np.testing.assert_array_equal(flat.train.column("image", np.arange(40)), again.train.column("image", np.arange(40)))
    for options in ({"train": 1}, {"swapped": 1.5}):
        with pytest.raises(CounterpointError, match="train of at least 2 and swapped in"):
            load_pairs(**options)


# ---------------------------------------------------------------------------------------------------------------- a step


def built(options=TINY, data=None, seed: int = 0, **more) -> tuple[ALBEF, AlignedTask]:
    config = ALBEFConfig(**(options | more))
    task = AlignedTask(data or load_pairs(train=32), config)
    learner = ALBEF(config, SimpleNamespace(**task.facts), seed)
    learner.begin(Survey(task, learner))
    return learner, task


def batch_of(learner: ALBEF, task: AlignedTask, rows=range(8)) -> dict:
    found = task._batches(task.data.train)[list(rows)]
    return learner.prepare(found, torch.Generator().manual_seed(0))


def test_a_step_clamps_moves_the_copy_and_then_enqueues_what_it_says():
    learner, task = built(momentum_teacher=0.9)
    learner.train()
    batch = batch_of(learner, task)
    with torch.no_grad():
        learner.temperature.fill_(3.0)
        for parameter in learner.encoders.parameters():
            parameter.add_(0.01)
    before = {name: p.clone() for name, p in learner.teacher.module.named_parameters()}
    noise = learner.queues["image"].rows.clone()
    found = learner.loss(batch)
    assert learner.temperature.item() == 0.5
    for name, parameter in learner.student.named_parameters():
        copy_of = dict(learner.teacher.module.named_parameters())[name]
        torch.testing.assert_close(copy_of, 0.9 * before[name] + 0.1 * parameter.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        keys = learner.embedded(learner.teacher.module, batch)
    for name in ("image", "text"):
        torch.testing.assert_close(learner.queues[name].rows[:8], keys[name], rtol=1e-4, atol=1e-5)
        assert int(learner.queues[name].pointer) == 8
    torch.testing.assert_close(learner.queues["image"].rows[8:], noise[8:])
    assert set(found) == {"loss", "itc", "itm", "mlm", "temperature", "alpha"}
    torch.testing.assert_close(found["loss"], found["itc"] + found["itm"] + found["mlm"])
    found["loss"].backward()
    lacking = [name for name, p in learner.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert all(p.grad is None for p in learner.teacher.parameters())


@pytest.mark.parametrize(
    "off", [("use_itc",), ("use_itm",), ("use_mlm",), ("use_itm", "use_mlm"), ("use_itc", "use_mlm")]
)
def test_losses_can_be_switched_off_and_leave_nothing_without_a_gradient(off):
    learner, task = built(**dict.fromkeys(off, False))
    found = learner.loss(batch_of(learner, task))
    assert {f"use_{name}" for name in found} >= {"use_itc", "use_itm", "use_mlm"} - set(off)
    assert not {f"use_{name}" for name in found} & set(off)
    found["loss"].backward()
    assert [name for name, p in learner.named_parameters() if p.requires_grad and p.grad is None] == []


def test_itm_draws_by_similarity_or_all_alike(monkeypatch):
    asked = []
    true = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda rows, n: asked.append(rows) or true(rows, n))
    for options in ({}, {"hard_negatives": False}, {"use_itc": False}):
        learner, task = built(**options)
        with torch.no_grad():
            learner.temperature.fill_(0.001)
        learner.loss(batch_of(learner, task))
    hard, even = asked[:2], asked[2:]
    assert len(even) == 4
    assert all(rows.diagonal().abs().max() == 0 for rows in asked)
    assert all(torch.equal(rows, 1 - torch.eye(8)) for rows in even)
    assert all((rows / rows.sum(1, keepdim=True)).max() > 0.5 for rows in hard)


def test_alpha_rises_over_the_first_epoch():
    learner, _ = built()
    learner.steps_per_epoch = 4
    found = []
    for step in (0, 1, 2, 4, 9):  # four steps an epoch
        learner.position.step = step
        found.append(learner.alpha)
    assert found == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert built(alpha_ramp=0)[0].alpha == 0.4


def test_items_that_lack_a_side_are_as_if_they_were_not_there():
    options = VECTORS | {"use_itm": False, "use_mlm": False}
    one, task = built(options)
    two, _ = built(options)
    batch = batch_of(one, task)
    batch["present"]["text"] = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]).bool()
    there = batch_of(two, task, [0, 1, 3, 4, 6, 7])
    torch.testing.assert_close(one.loss(batch)["loss"], two.loss(there)["loss"])
    torch.testing.assert_close(one.queues["text"].rows, two.queues["text"].rows)
    learner, task = built()
    batch = batch_of(learner, task)
    batch["present"]["image"] = torch.arange(8) == 2
    with pytest.raises(CounterpointError, match="1 item with image and text, ITM needs two"):
        learner.loss(batch)


def test_items_of_the_same_words_count_as_one():
    learner, task = built(same_text=True)
    ids, mask = learner.tokenizer.encode(["one two", "two one", "one two"], 8)
    wider = F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    found = token_numbers(ids, mask)
    assert found[0] == found[2] != found[1]
    torch.testing.assert_close(token_numbers(*wider), found)
    batch = batch_of(learner, task)
    learner.loss(batch)
    torch.testing.assert_close(learner.queue_ids[:8], token_numbers(*batch["inputs"]["text"]))
    assert bool((learner.queue_ids[8:] == -100).all())
    batch["inputs"]["text"] = tuple(part[:1].expand(8, -1) for part in batch["inputs"]["text"])
    with pytest.raises(CounterpointError, match="ITM finds no negatives: idx holds one identity only"):
        learner.loss(batch)


def test_what_is_saved_goes_on_as_if_nothing_had_happened():
    learner, task = built(dropout=0.1)
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], 0.1)

    def step(which, opt, rows):
        torch.manual_seed(7)
        loss = which.loss(batch_of(which, task, rows))["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    step(learner, optimizer, range(8))
    state = copy.deepcopy(learner.state_dict())
    other, _ = built(dropout=0.1, seed=5)
    other.load_state_dict(state)
    second = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], 0.1)
    for rows in (range(8, 16), range(16, 24)):
        assert step(learner, optimizer, rows) == step(other, second, rows)
    after = other.state_dict()
    assert {"queues.image.rows", "queues.text.pointer", "queue_ids", "temperature"} <= set(after)
    assert any(name.startswith("teacher.module.fusion.") for name in after)
    for name, value in learner.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert not torch.equal(state["queues.image.rows"], after["queues.image.rows"])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 20}, r"queue \(20\) must be a multiple of batch_size \(8\); use --queue 16"),
        ({"queue": 4}, "multiple of batch_size"),
        ({"alpha": 1.4}, r"alpha must lie in 0..1"),
        ({"temperature": 1.0}, r"temperature must lie in 0.001..0.5"),
        ({"use_itc": False, "use_itm": False, "use_mlm": False}, "turn on at least one"),
        ({"width": 15}, r"width \(15\) must be a multiple of heads"),
        ({"fusion_layers": 0}, "fusion_layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must lie in 0..1"),
        ({"rerank": -1}, "must not be negative"),
    ],
)
def test_settings_that_make_no_sense_raise_an_error(options, message):
    with pytest.raises(CounterpointError, match=message):
        ALBEFConfig(**(TINY | options))


def test_data_and_encoders_that_do_not_fit_raise_an_error():
    with pytest.raises(
        CounterpointError, match=r"albef fuses images and texts, the data has image \(vector\), text \(vec"
    ):
        built(data=load_pairs(train=32, vectors=1))
    with pytest.raises(CounterpointError, match=r"image_encoder conv-s has no tokens .* use vit-s"):
        built(image_encoder="conv-s")
    with pytest.raises(CounterpointError, match=r"fusion_layers \(4\) must leave layers .* out of 4"):
        built(fusion_layers=4)
    with pytest.raises(CounterpointError, match="same_text compares the words"):
        built(VECTORS, load_pairs(train=32, vectors=1), same_text=True)
    three = SimpleNamespace(modalities={name: {"kind": "vector", "dim": 2} for name in "abc"}, tokenizers={})
    with pytest.raises(CounterpointError, match="aligns two modalities, the data has a, b, c"):
        ALBEF(ALBEFConfig(**VECTORS), three, 0)
    with pytest.raises(CounterpointError, match="batch_size must be at least 2"):
        built(batch_size=1)
    learner, task = built()
    with pytest.raises(CounterpointError, match="longer than the encoder's 8"):
        learner.encoders["text"](torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool))
    with torch.no_grad():
        learner.heads["image"].weight.fill_(math.nan)
    with pytest.raises(CounterpointError, match="not finite: training diverged"):
        learner.loss(batch_of(learner, task))


# --------------------------------------------------------------------------------------------------------------- training


def test_pictures_and_captions_train_and_are_ranked_again(tmp_path):
    data = load_pairs(train=32)
    few = AlignedData("few", data.train, data.valid, _first(data.test, 300), data.modalities)
    rows = Experiment.resolve(SYSTEM, config=ALBEFConfig(**TINY)).run(0, source=few)
    last = rows[-1]
    for name in ("itc", "itm", "mlm", "loss"):
        assert math.isfinite(last[f"train/{name}"])
    # 300 items come in two batches; what is ranked again is all of them.
    for name in ("reranked_image_to_text_r1", "reranked_text_to_image_r10", "teacher_image_to_text_r1"):
        assert 0 <= last[f"test/{name}"] <= 1
    assert last["test/reranked_text_to_image_r10"] >= last["test/reranked_text_to_image_r1"]


def _first(split, n: int) -> AlignedColumns:
    rows = np.arange(n)
    return AlignedColumns({"image": ArrayImages(split.column("image", rows)), "text": split.column("text", rows)})


def test_ranking_again_is_of_all_items_however_they_are_cut_or_of_the_first(monkeypatch):
    data = load_pairs(train=32)
    learner, _ = built(data=data)
    learner.eval()

    def measured(count: int) -> dict[str, float]:
        few = AlignedData("few", data.train, data.valid, _first(data.test, count), data.modalities)
        _, task = built(data=few)
        with torch.no_grad():
            return learner.measures(Survey(task, learner), "test")

    apart = measured(300)  # in two parts
    assert set(apart) == {
        "reranked_mean_recall",
        *(f"reranked_{way}_{name}" for way in ("image_to_text", "text_to_image") for name in ("r1", "r5", "r10")),
    }
    monkeypatch.setattr(fused, "BATCH", 300)
    assert measured(300) == apart
    first = measured(100)
    assert first != apart
    monkeypatch.setattr(fused, "RERANKED", 100)
    assert measured(300) == first


def test_ranking_again_follows_the_fusion_encoder():
    learner, task = built(rerank=500)
    learner.eval()
    batch = next(iter(task.evaluation_loader("test")))
    batch = batch | {
        "inputs": {"image": batch["inputs"]["image"][::5], "text": tuple(p[::5] for p in batch["inputs"]["text"])},
        "present": {name: mask[::5] for name, mask in batch["present"].items()},
    }

    class Told(nn.Module):
        """A fusion encoder that knows the pairs: its states say whether image and text have one number."""

        def forward(self, text, mask, image, kept=None):
            return (text[:, :1, :1] == image[:, :1, :1]).float().expand(-1, -1, 2)

    n = len(batch["present"]["image"])
    number = torch.arange(float(n))[:, None, None]
    learner.see = lambda networks, name, values, fused=False: Seen(
        torch.randn(n, 16 if name == "text" else 128), number.expand(-1, 8, 1) if fused else None
    )
    learner.fusion = Told()
    learner.itm_head = nn.Identity()
    found = learner._reranked([learner._fused_rows(batch)], None)
    assert found["reranked_image_to_text_r1"] == found["reranked_text_to_image_r1"] == 1


def test_vectors_train_without_fusion():
    system_data = load_pairs(train=64, vectors=1, swapped=0.4)
    last = Experiment.resolve(SYSTEM, config=ALBEFConfig(**VECTORS)).run(0, source=system_data)[-1]
    assert {"test/image_to_text_r1", "test/teacher_image_to_text_r1"} <= set(last)
    assert "test/reranked_mean_recall" not in last


def test_the_claim_s_setting_learns():
    claim = of_system("albef")
    assert claim.setting["epochs"] == 12
    data = load_pairs(vectors=1, swapped=0.4)
    config = ALBEFConfig(**(claim.setting | claim.arms["distilled"] | {"epochs": 4, "evaluate_every": 4}))
    last = Experiment.resolve(SYSTEM, config=config).run(0, source=data)[-1]
    assert last[f"test/{claim.conjuncts[0].metric}"] > 0.05  # chance is 0.01


@pytest.mark.usefixtures("drawn")
@pytest.mark.slow
def test_a_run_through_the_command_line_is_saved_resumed_and_measured(tmp_path):
    if catalog.get("albef").state == "planned":
        pytest.skip("albef is not in the catalogue as built yet")
    words = [
        "train",
        "albef",
        "--data",
        "digit-pairs?train=16",
        "--epochs",
        "1",
        "--name",
        "run",
        "--out",
        str(tmp_path),
    ]
    for name, value in TINY.items():
        if name not in ("epochs", "pretrained"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    last = run.metrics()[-1]
    assert 0 <= last["test/reranked_mean_recall"] <= 1
    assert isinstance(training.load_learner(run), ALBEF)
    found = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert found["Where words are found"]["kind"] == "maps"
    measured = training.evaluate(tmp_path / "run", say=lambda text: None)
    assert measured["reranked_mean_recall"] == pytest.approx(last["test/reranked_mean_recall"], abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- checkpoints


WIDTH, HEADS, LAYERS, LOWER, IMAGE = 16, 2, 4, 2, 128


def authors_state(vocabulary: int, grid: int = 4, queue: int = 16, dim: int = 6) -> dict[str, torch.Tensor]:
    """Draw random weights under the names of the authors' released files, without the copies."""
    g = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs_: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs_, generator=g) * 0.2
        state[f"{name}.bias"] = torch.randn(outputs, generator=g) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=g)

    v = "visual_encoder"
    state[f"{v}.cls_token"] = torch.randn(1, 1, IMAGE, generator=g)
    state[f"{v}.pos_embed"] = torch.randn(1, 1 + grid * grid, IMAGE, generator=g)
    state[f"{v}.patch_embed.proj.weight"] = torch.randn(IMAGE, 3, 4, 4, generator=g) * 0.1
    state[f"{v}.patch_embed.proj.bias"] = torch.randn(IMAGE, generator=g) * 0.1
    for n in range(4):
        for name, shape in (("attn.qkv", (3 * IMAGE, IMAGE)), ("attn.proj", (IMAGE, IMAGE))):
            linear(f"{v}.blocks.{n}.{name}", *shape)
        linear(f"{v}.blocks.{n}.mlp.fc1", 4 * IMAGE, IMAGE)
        linear(f"{v}.blocks.{n}.mlp.fc2", IMAGE, 4 * IMAGE)
        norm(f"{v}.blocks.{n}.norm1", IMAGE)
        norm(f"{v}.blocks.{n}.norm2", IMAGE)
    norm(f"{v}.norm", IMAGE)
    bert = "text_encoder.bert"
    for name, length in (("word", vocabulary), ("position", 12), ("token_type", 2)):
        state[f"{bert}.embeddings.{name}_embeddings.weight"] = torch.randn(length, WIDTH, generator=g)
    norm(f"{bert}.embeddings.LayerNorm", WIDTH)
    state[f"{bert}.embeddings.position_ids"] = torch.arange(12)[None]
    for n in range(LAYERS):
        at = f"{bert}.encoder.layer.{n}"
        for part, source in (("attention", WIDTH), ("crossattention", IMAGE))[: 1 + (n >= LOWER)]:
            linear(f"{at}.{part}.self.query", WIDTH, WIDTH)
            linear(f"{at}.{part}.self.key", WIDTH, source)
            linear(f"{at}.{part}.self.value", WIDTH, source)
            linear(f"{at}.{part}.output.dense", WIDTH, WIDTH)
            norm(f"{at}.{part}.output.LayerNorm", WIDTH)
        linear(f"{at}.intermediate.dense", 4 * WIDTH, WIDTH)
        linear(f"{at}.output.dense", WIDTH, 4 * WIDTH)
        norm(f"{at}.output.LayerNorm", WIDTH)
    head = "text_encoder.cls.predictions"
    linear(f"{head}.transform.dense", WIDTH, WIDTH)
    norm(f"{head}.transform.LayerNorm", WIDTH)
    state[f"{head}.bias"] = torch.randn(vocabulary, generator=g)
    state[f"{head}.decoder.weight"] = state[f"{bert}.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    linear("vision_proj", dim, IMAGE)
    linear("text_proj", dim, WIDTH)
    linear("itm_head", 2, WIDTH)
    state["temp"] = torch.tensor(0.05)
    for side in ("image", "text"):
        state[f"{side}_queue"] = F.normalize(torch.randn(dim, queue, generator=g), dim=0)
    state["queue_ptr"] = torch.tensor([8])
    return state


def bert_attention(state, at: str, x, source, hidden=None):
    """Compute nn.MultiheadAttention with a layer's weights, and the operations that follow."""
    own = {name: state[f"{at}.self.{name}.{kind}"] for name in ("query", "key", "value") for kind in ("weight",)}
    layer = nn.MultiheadAttention(
        WIDTH, HEADS, kdim=own["key"].shape[1], vdim=own["key"].shape[1], batch_first=True
    ).eval()
    with torch.no_grad():
        if own["key"].shape[1] == WIDTH:
            layer.in_proj_weight.copy_(torch.cat(list(own.values())))
        else:
            for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
                getattr(layer, f"{short}_proj_weight").copy_(own[name])
        layer.in_proj_bias.copy_(torch.cat([state[f"{at}.self.{n}.bias"] for n in ("query", "key", "value")]))
        layer.out_proj.weight.copy_(state[f"{at}.output.dense.weight"])
        layer.out_proj.bias.copy_(state[f"{at}.output.dense.bias"])
    out = layer(x, source, source, key_padding_mask=hidden, need_weights=False)[0]
    return layer_norm(state, f"{at}.output.LayerNorm", x + out)


def layer_norm(state, at: str, x):
    return F.layer_norm(x, (x.shape[-1],), state[f"{at}.weight"], state[f"{at}.bias"], 1e-12)


def fused_by_hand(state, w, v, mask):
    for n in range(LOWER, LAYERS):
        at = f"text_encoder.bert.encoder.layer.{n}"
        w = bert_attention(state, f"{at}.attention", w, w, ~mask)
        w = bert_attention(state, f"{at}.crossattention", w, v)
        up = F.gelu(F.linear(w, state[f"{at}.intermediate.dense.weight"], state[f"{at}.intermediate.dense.bias"]))
        down = F.linear(up, state[f"{at}.output.dense.weight"], state[f"{at}.output.dense.bias"])
        w = layer_norm(state, f"{at}.output.LayerNorm", w + down)
    return w


@torch.no_grad()
def test_the_authors_checkpoint_computes_what_its_layout_says(tmp_path):
    from safetensors.torch import save_file
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertConfig, BertModel

    learner, task = built()
    vocabulary = learner.size.vocabulary
    state = authors_state(vocabulary)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, tmp_path / "ALBEF.safetensors")
    learner.load_state_dict(load_albef_checkpoint(tmp_path / "ALBEF.safetensors", learner))
    learner.eval()
    batch = batch_of(learner, task)
    images, (ids, mask) = batch["inputs"]["image"], batch["inputs"]["text"]
    mask = mask.clone()
    mask[3, 3:] = False

    vision = VisionTransformer(img_size=16, patch_size=4, num_classes=0, embed_dim=IMAGE, depth=4, num_heads=4).eval()
    vision.load_state_dict({k[15:]: x for k, x in state.items() if k.startswith("visual_encoder.")})
    v = vision.forward_features(images)
    found = learner.see(learner.student, "image", images, fused=True)
    torch.testing.assert_close(found.tokens, v)

    half = BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            num_hidden_layers=LOWER,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=12,
        ),
        add_pooling_layer=False,
    ).eval()
    wanted = set(half.state_dict())
    named = {k.removeprefix("text_encoder.bert."): x for k, x in state.items()}
    half.load_state_dict({k: x for k, x in named.items() if k in wanted})
    w = half(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    mine = learner.see(learner.student, "text", (ids, mask), fused=True).tokens
    torch.testing.assert_close(mine[mask], w[mask], rtol=1e-4, atol=1e-5)

    fused = fused_by_hand(state, w, v, mask)
    got = learner.fusion(mine, mask, found.tokens)
    torch.testing.assert_close(got[mask], fused[mask], rtol=1e-4, atol=1e-5)
    p = "text_encoder.cls.predictions"
    hidden = F.gelu(F.linear(fused[0], state[f"{p}.transform.dense.weight"], state[f"{p}.transform.dense.bias"]))
    hidden = layer_norm(state, f"{p}.transform.LayerNorm", hidden)
    words = F.linear(hidden, state[f"{p}.decoder.weight"], state[f"{p}.decoder.bias"])
    torch.testing.assert_close(
        learner.fusion.words(got[0], learner.encoders["text"].embeddings.word.weight), words, rtol=1e-4, atol=1e-4
    )
    match = F.linear(fused[:, 0], state["itm_head.weight"], state["itm_head.bias"])
    torch.testing.assert_close(learner.itm_head(got[:, 0]), match, rtol=1e-4, atol=1e-5)
    embedding = F.normalize(F.linear(v[:, 0], state["vision_proj.weight"], state["vision_proj.bias"]), dim=1)
    torch.testing.assert_close(learner.embed(batch)["image"], embedding)
    torch.testing.assert_close(learner.queues["text"].rows, state["text_queue"].T)
    assert int(learner.queues["image"].pointer) == 8
    assert learner.temperature.item() == pytest.approx(0.05)
    # The file has no copies: the student's are taken.
    torch.testing.assert_close(learner.embedded(learner.teacher.module, batch)["image"], embedding)


def test_checkpoints_with_copies_other_sizes_and_what_is_wrong_with_them():
    from timm.layers import resample_abs_pos_embed

    learner, _ = built()
    state = authors_state(learner.size.vocabulary, grid=6)
    copies = {
        f"{name.partition('.')[0]}_m.{name.partition('.')[2]}": value + 1
        for name, value in state.items()
        if name.startswith(("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj."))
        and "position_ids" not in name
    }
    found = load_albef_checkpoint({"model": state | copies}, learner)
    place = "encoders.image.model.pos_embed"
    expected = resample_abs_pos_embed(
        state["visual_encoder.pos_embed"], [4, 4], [6, 6], num_prefix_tokens=1, antialias=False
    )
    torch.testing.assert_close(found[place], expected)
    torch.testing.assert_close(found[f"teacher.module.{place}"], expected + 1, rtol=1e-4, atol=1e-5)
    assert found["encoders.text.embeddings.position.weight"].shape == (8, WIDTH)

    # A learner without some of the parts takes what it has.
    aligned, _ = built(use_mlm=False)
    aligned.load_state_dict(load_albef_checkpoint(state, aligned))

    short = {
        name: value for name, value in state.items() if not name.startswith(("image_queue", "text_queue", "queue"))
    }
    torch.testing.assert_close(load_albef_checkpoint(short, learner)["queues.image.rows"], learner.queues["image"].rows)

    lacking = {name: value for name, value in state.items() if name != "itm_head.weight"}
    with pytest.raises(CounterpointError, match=r"does not fit this model; it lacks: itm_head.weight$"):
        load_albef_checkpoint(lacking, learner)
    with pytest.raises(CounterpointError, match=r"it has unknown weights: text_decoder\.bert\.embeddings"):
        load_albef_checkpoint(state | {"text_decoder.bert.embeddings": torch.zeros(1)}, learner)
    with pytest.raises(CounterpointError, match=r"of another shape: temperature \[2\], wanted \[\]"):
        load_albef_checkpoint(state | {"temp": torch.zeros(2)}, learner)
    with pytest.raises(CounterpointError, match=r"queues.image.rows \[32, 6\], wanted \[16, 6\]"):
        load_albef_checkpoint(authors_state(learner.size.vocabulary, queue=32), learner)
    with pytest.raises(CounterpointError, match="no such weights file"):
        built(checkpoint="/nowhere/ALBEF.pth")


@torch.no_grad()
def test_a_published_bert_is_cut_into_text_encoder_and_fusion():
    try:
        learner, task = built(text_encoder="minilm", context=12, fusion_layers=3)
    except CounterpointError as error:
        pytest.skip(str(error))
    from counterpoint.encoders.text import build_text_encoder

    learner.eval()
    published = build_text_encoder("minilm").model.eval()
    ids, mask = batch_of(learner, task)["inputs"]["text"]
    states = published(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    found = learner.encoders["text"].tokens(ids, mask)
    torch.testing.assert_close(found[mask], states[3][mask], rtol=1e-3, atol=1e-4)
    upper = learner.fusion.layers[0].attention.query.weight
    torch.testing.assert_close(upper, published.encoder.layer[3].attention.self.query.weight)
    assert learner.mask_token == 103
    assert learner.loss(batch_of(learner, task))["loss"].isfinite()


# --------------------------------------------------------------------------------------------------------------- the maps


def test_maps_belong_to_the_words_of_each_text():
    learner, task = built(fusion_layers=3)
    pixels = torch.from_numpy(task.data.test.column("image", np.arange(3))).permute(0, 3, 1, 2)
    learner.train()
    maps, words = grounding_maps(learner, pixels, ["three seven", "one", "two nine five"])
    assert maps.shape == (3, 3, 4, 4)
    assert words == [["three", "seven"], ["one"], ["two", "nine", "five"]]
    assert bool((maps >= 0).all())
    assert maps[0, :2].amax() > 0
    assert maps[1, 1:].abs().max() == 0
    assert learner.training
    assert all(p.grad is None for p in learner.parameters())
    again, _ = grounding_maps(learner, pixels, ["seven three", "one", "two nine five"])
    assert not torch.allclose(again[0], maps[0])
    torch.testing.assert_close(again[1:], maps[1:])
    assert maps[2].amax() > 0
    first, _ = grounding_maps(learner, pixels[:1], ["three seven"], layer=0)
    assert not torch.allclose(first[0], maps[0, :2])
    # A normalised picture gives what its bytes give.
    from counterpoint.views.images import normalise

    same, _ = grounding_maps(learner, normalise(pixels), ["three seven", "one", "two nine five"])
    torch.testing.assert_close(same, maps)


def test_a_map_is_attention_times_the_positive_part_of_its_gradient():
    learner, task = built(fusion_layers=2, heads=1, width=8)
    learner.eval()
    pixels = torch.from_numpy(task.data.test.column("image", np.arange(1))).permute(0, 3, 1, 2)
    maps, _ = grounding_maps(learner, pixels, ["three seven"])
    ids, mask = learner.tokenizer.encode(["three seven"], 8)
    from counterpoint.views.images import normalise

    with torch.no_grad():
        v = learner.encoders["image"].tokens(normalise(pixels))
        w = learner.encoders["text"].tokens(ids, mask)
    layer = learner.fusion.layers[0]
    x = layer.attention(w, w, mask)
    cross = layer.crossattention
    a = (cross.query(x) @ cross.key(v).mT / 8**0.5).softmax(-1).detach()

    def logit(attention):
        y = cross.norm(x + cross.dense(attention @ cross.value(v)))
        y = layer.norm(y + layer.output(F.gelu(layer.intermediate(y))))
        return learner.itm_head(learner.fusion.layers[1](y, mask, v)[:, 0])[0, 1]

    gradient = torch.zeros_like(a)
    step = 1e-2
    with torch.no_grad():
        for token in range(a.shape[1]):
            for patch in range(a.shape[2]):
                moved = [a.clone(), a.clone()]
                moved[0][0, token, patch] += step
                moved[1][0, token, patch] -= step
                gradient[0, token, patch] = (logit(moved[0]) - logit(moved[1])) / (2 * step)
    encoding = learner.tokenizer.model.encode("three seven")
    cam = (a * gradient.clamp(min=0))[0, :, 1:]
    for word in range(2):
        tokens = [n for n, owner in enumerate(encoding.word_ids) if owner == word]
        expected = cam[tokens].mean(0)
        assert expected.max() > 0
        torch.testing.assert_close(maps[0, word].flatten(), expected, rtol=0.02, atol=0.02 * expected.max().item())


def test_maps_refuse_what_they_cannot_explain():
    learner, task = built()
    pixels = torch.from_numpy(task.data.test.column("image", np.arange(2))).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"texts\[1\] has no words"):
        grounding_maps(learner, pixels, ["one", "  "])
    with pytest.raises(ValueError, match="texts must be one for each image, got 1 for 2"):
        grounding_maps(learner, pixels, ["one"])
    with pytest.raises(ValueError, match=r"layer must lie in 0..0, before the last, got 1"):
        grounding_maps(learner, pixels, ["one", "two"], layer=1)
    with pytest.raises(ValueError, match="learner has one fusion layer"):
        grounding_maps(built(fusion_layers=1)[0], pixels, ["one", "two"])
    with pytest.raises(ValueError, match="learner has no ITM"):
        grounding_maps(built(use_itm=False)[0], pixels, ["one", "two"])


def test_figures_are_maps_fit_for_json():
    learner, task = built()
    found = learner.figures(task)["Where words are found"]
    assert found["kind"] == "maps"
    assert len(found["rows"]) == 4
    assert [part["text"] for part in found["rows"][0]["maps"]] == ["zero", "zero"]
    assert np.asarray(found["rows"][0]["maps"][0]["map"]).shape == (4, 4)
    json.dumps(found, allow_nan=False)
    assert built(use_itm=False)[0].figures(task) == {}
    assert built(fusion_layers=1)[0].figures(task) == {}


def test_what_a_text_modality_of_another_name_and_order_needs():
    pixels = np.zeros((40, 16, 16, 3), np.uint8)

    def split(part):
        return AlignedColumns(
            {"words": [f"word{n % 5}" for n in range(40)][part], "picture": ArrayImages(pixels[part])}
        )

    kinds = {"words": Modality("text"), "picture": Modality("image", size=16)}
    data = AlignedData("own", split(slice(20)), *[split(slice(20, 40))] * 2, kinds)
    last = Experiment.resolve(SYSTEM, config=ALBEFConfig(**TINY)).run(0, source=data)[-1]
    assert 0 <= last["test/reranked_picture_to_words_r1"] <= 1
