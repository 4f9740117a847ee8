"""The growing cache: the numbers of transformers' own cache, after growth, choice of rows, cuts and resets."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.growing_cache import ROOM, GrowingLayer, growing_cache
from counterpoint.encoders.messages import Message


def tokens(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 3, count, 4, generator=generator) for _ in range(2))


def test_keys_and_values_equal_those_of_transformers_and_are_not_copied():
    ours, theirs = GrowingLayer(), DynamicLayer()
    memories: list[torch.Tensor] = []  # held here, so that no later one can take an earlier one's address
    for step, count in enumerate([5, *[1] * (2 * ROOM), 7]):
        new = list(tokens(count, seed=step))
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        if not memories or ours.memory[0] is not memories[-1]:
            memories.append(ours.memory[0])
        assert ours.keys.data_ptr() == memories[-1].data_ptr()
    assert len(memories) == 3  # the memory is taken three times, not 130 times
    assert ours.get_seq_length() == theirs.get_seq_length() == 12 + 2 * ROOM


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.reset(),
    ],
    ids=["select", "repeat", "reorder", "crop", "reset"],
)
def test_rows_chosen_by_transformers_are_kept(change):
    ours, theirs = GrowingLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*tokens(6))
        layer.update(*tokens(1, seed=1))
        change(layer)
    batch = len(theirs.keys) if theirs.keys is not None else 2
    for step in range(2):
        new = list(tokens(1, batch, seed=2 + step))
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["llama-32-2-2", "qwen2-32-2-2", "gpt2-32-2-2"])
def test_answers_are_those_of_the_cache_of_transformers(name, monkeypatch):
    words = ["is there a brick ?", "describe the picture ."]
    tokenizer = chat_tokenizer(name, words, vocabulary=300, size=0)
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, context=256).eval()
    assert list(growing_cache(model.model)) in (["cache"], ["past_key_values"])
    prompts = [Prompt((Message("user", one),)) for one in words]
    found = model.generate(prompts, 100)
    monkeypatch.setattr("counterpoint.encoders.growing_cache.growing_cache", lambda _: {})
    assert found == model.generate(prompts, 100)


def test_groups_of_rows_join_at_their_last_tokens():
    parts, whole = [GrowingLayer(), GrowingLayer()], GrowingLayer()
    for part, count in zip(parts, (6, 2), strict=True):
        part.update(*tokens(count, seed=count))
    whole.join(parts)
    assert whole.keys.shape == (4, 3, 6, 4)
    assert torch.equal(whole.values[:2], parts[0].values)
    assert torch.equal(whole.keys[2:, :, 4:], parts[1].keys)
    assert not whole.keys[2:, :, :4].any()
    held, new = whole.memory[0], list(tokens(1, 4, seed=9))
    keys, values = whole.update(*new)
    assert whole.memory[0] is held  # there was room
    assert torch.equal(keys[:, :, :6], whole.keys[:, :, :6])
    assert torch.equal(values[:, :, 6:], new[1])
