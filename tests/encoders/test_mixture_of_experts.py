"""Experts of transformers' decoders: up-cycled models equal dense ones, capacity, padding, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.messages import Message
from counterpoint.encoders.mixture_of_experts import (
    MixtureOfExperts,
    feed_forward_of,
    loads,
    mixtures_of,
    routing,
    upcycle,
)
from counterpoint.errors import CounterpointError

TEXTS = ["is there a brick ?", "brick , pond ."] * 4


def model_of(name: str) -> tuple[ChatModel, dict[str, Any]]:
    torch.manual_seed(0)
    size = 24 if name.startswith("llava") else 0
    tokenizer = chat_tokenizer(name, TEXTS, vocabulary=300, size=size)
    model = ChatModel(name, tokenizer, size=size, context=40).eval()
    batch: dict[str, Any] = {"ids": torch.randint(200, (2, 16)), "mask": torch.ones(2, 16, dtype=torch.bool)}
    batch["mask"][0, 12:] = False
    if size:
        batch["ids"][:, :9] = tokenizer.image_id
        batch |= {"pictures": torch.randint(256, (2, 1, 24, 24, 3)).byte(), "counts": torch.ones(2).long()}
    return model, batch


@pytest.mark.parametrize("name", ["llava-16-3-2", "llama-16-3-2", "qwen2-16-3-2", "gpt2-16-3-2"])
def test_an_upcycled_model_equals_the_dense_one(name):
    model, batch = model_of(name)
    before = model(**batch)
    assert len(upcycle(model.network, 3)) == 2  # layers 0 and 2
    with routing(model, batch["mask"]) as routes:
        after = model(**batch)
    torch.testing.assert_close(after[batch["mask"]], before[batch["mask"]], rtol=1e-4, atol=1e-5)
    assert len(routes) == 2
    assert len(feed_forward_of(model.network)) == 3


def test_upcycling_twice_changes_nothing():
    model, _ = model_of("llama-16-2-2")
    first = upcycle(model.network, 3)
    assert upcycle(model.network, 3) == first
    assert mixtures_of(model) == first


def test_an_upcycled_model_answers():
    model, _ = model_of("llama-16-2-2")
    prompts = [Prompt((Message("user", "is there a brick ?"),)), Prompt((Message("user", "pond"),))]
    dense = model.generate(prompts, 5)
    upcycle(model.network, 4)
    assert model.generate(prompts, 5) == dense


def layer_of(**options: Any) -> MixtureOfExperts:
    torch.manual_seed(1)
    layer = MixtureOfExperts(nn.Linear(6, 6, bias=False), 6, 4, **options).double()
    for expert in layer.experts:
        nn.init.normal_(expert.weight)
    return layer


def test_the_layer_equals_deepspeeds_dense_dispatch_with_a_capacity():
    layer = layer_of(capacity_factor=0.25).train()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    rows = x.view(-1, 6)
    combine = fn.top2_gate(layer.router(rows).float(), None, 0.25, 0).combine.double()
    assert bool((combine.sum((1, 2)) == 0).any())  # some tokens are dropped
    sent = torch.einsum("sec,sm->ecm", (combine > 0).double(), rows)
    done = torch.stack([expert(part) for expert, part in zip(layer.experts, sent, strict=True)])
    wanted = torch.einsum("sec,ecm->sm", combine, done).view_as(x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(layer.eval()(x), wanted)  # nothing is dropped in evaluation


def test_every_expert_and_the_router_get_a_gradient_and_padding_gets_none():
    layer = layer_of()
    x = torch.randn(2, 30, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 10:] = False
    with routing(layer, mask) as routes:
        y = layer(x)
    y.square().sum().backward()
    assert bool((y[~mask] == 0).all())
    assert bool((x.grad[~mask] == 0).all())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())
    counts = loads(routes[0], mask, (torch.arange(30) < 5).long().expand(2, 30), 2, 4)
    assert counts.shape == (2, 2, 4)
    assert counts.sum((1, 2)).tolist() == [60, 20]
    assert counts[:, 1].sum(1).tolist() == [10, 10]


def test_an_expert_without_tokens_has_no_gradient():
    layer = layer_of()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 6))
    x = torch.zeros(1, 5, 6, dtype=torch.float64)
    x[..., 0], x[..., 1] = 3.0, 2.0
    layer(x).sum().backward()
    assert [expert.weight.grad is None for expert in layer.experts] == [False, False, True, True]


def test_routers_compute_in_float32_under_autocast():
    layer = layer_of().float()
    seen: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16), routing(layer) as routes:
        out = layer(torch.randn(2, 5, 6))
        seen += [route.weights for route in routes]
    assert seen[0].dtype == torch.float32
    assert out.dtype == torch.float32


def test_noise_acts_in_training_alone():
    layer, x = layer_of(noise=True), torch.randn(1, 40, 6, dtype=torch.float64)
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_too_few_experts_and_models_without_layers_are_refused():
    with pytest.raises(CounterpointError, match="experts must be at least 2, got 1"):
        MixtureOfExperts(nn.Linear(2, 2), 2, 1)
    with pytest.raises(CounterpointError, match="Linear has no layers with a feed-forward network"):
        upcycle(nn.Linear(2, 2))
