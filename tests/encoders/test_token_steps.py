"""The loop over tokens: the answers of transformers' own loop, at fewer calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.tasks.adapted_chats import with_adapter

KINDS = ["llama-32-2-2", "qwen2-32-2-2", "gpt2-32-2-2", "llava-32-2-2"]
WORDS = ["is there a brick ?", "describe the picture with all of its things ."]


def model_of(name):
    size = 16 if name.startswith("llava") else 0
    tokenizer = chat_tokenizer(name, WORDS, vocabulary=300, size=size)
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, size=size, context=256).eval()
    model.network.get_output_embeddings().weight.data[tokenizer.fast.eos_token_id] = (
        0.0  # answers do not end by themselves
    )
    return model


def asked(*texts):
    return [Prompt((Message("user", text),)) for text in texts]


def pictured(text, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    return Prompt((Message("user", f"{IMAGE} {text}"),), (picture,))


def by_transformers(monkeypatch):
    monkeypatch.setattr("counterpoint.encoders.token_steps.PLAIN_KINDS", set())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("texts", [WORDS[:1], WORDS], ids=["one", "padded"])
def test_answers_are_those_of_the_loop_of_transformers(name, texts, monkeypatch):
    model = model_of(name)
    seen, calls = [], []
    decoder = model.network.get_decoder()
    decoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["attention_mask"]), with_kwargs=True)
    model.network.register_forward_pre_hook(lambda *_: calls.append(None))
    found = model.generate(asked(*texts), 20)
    assert len(calls) == 1  # reads the prompts; a step needs the decoder alone
    assert [None if mask is None else tuple(mask.shape[:3]) for mask in seen[1:]] == [
        None if len(texts) == 1 else (2, 1, 1)
    ] * 19
    by_transformers(monkeypatch)
    assert found == model.generate(asked(*texts), 20)
    assert len(calls) == 21


def test_a_processor_sees_the_tokens_so_far_and_decides(monkeypatch):
    model, seen = model_of("llama-32-2-2"), []

    def processor(ids, scores):
        seen.append(ids.tolist())
        return scores.flip(1)

    found = model.generate(asked(*WORDS), 6, processor=processor)
    first = list(seen)
    by_transformers(monkeypatch)
    assert found == model.generate(asked(*WORDS), 6, processor=processor)
    assert first == seen[len(first) :]


def test_rows_end_apart_and_the_loop_with_the_last(monkeypatch):
    model, stop = model_of("llama-32-2-2"), []
    end = model.tokenizer.fast.eos_token_id

    def processor(ids, scores):
        stop.append(ids.shape[1])
        out = scores.clone()
        out[:, end] = -torch.inf
        out[0, end] = torch.inf if len(stop) % 100 == 3 else -torch.inf
        out[1, end] = torch.inf if len(stop) % 100 == 5 else -torch.inf
        return out

    found = model.generate(asked(*WORDS), 50, processor=processor)
    assert [len(row) for row in found] == [3, 5]
    assert len(stop) == 5
    stop.clear()
    by_transformers(monkeypatch)
    assert found == model.generate(asked(*WORDS), 50, processor=processor)


def test_a_further_argument_of_generate_takes_the_loop_of_transformers():
    model, calls = model_of("llama-32-2-2"), []
    model.network.register_forward_pre_hook(lambda *_: calls.append(None))
    plain = model.generate(asked(WORDS[0]), 8)
    assert len(calls) == 1
    assert model.generate(asked(WORDS[0]), 8, repetition_penalty=1.0) == plain
    assert len(calls) == 9


def test_prompts_without_pictures_are_read_apart_with_the_same_numbers():
    model = model_of("llava-32-2-2")
    prompts = [pictured(WORDS[0], 0), pictured(WORDS[1], 1), *asked(*WORDS)]
    logits: dict[str, list[torch.Tensor]] = {}
    lengths: dict[str, list[int]] = {}

    def answered(name, **more):
        def kept(ids, scores):
            logits.setdefault(name, []).append(scores)
            return scores

        handle = model.network.get_decoder().register_forward_pre_hook(
            lambda _, __, named: (
                lengths.setdefault(name, []).append(named["inputs_embeds"].shape[1])
                if named.get("inputs_embeds") is not None
                else None
            ),
            with_kwargs=True,
        )
        found = model.generate(prompts, 12, processor=kept, **more)
        handle.remove()
        return found

    assert answered("together") == answered("apart", apart=2)
    assert len(lengths["together"]) == 1
    first, second = lengths["apart"]
    assert first == lengths["together"][0]
    assert second < first
    for one, other in zip(logits["together"], logits["apart"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_with_an_adapter_takes_the_loop(monkeypatch):
    model, calls = with_adapter(model_of("llama-32-2-2"), 2, "extra"), []
    model.network.register_forward_pre_hook(lambda *_: calls.append(None))
    found = model.generate(asked(*WORDS), 12)
    assert len(calls) == 1
    by_transformers(monkeypatch)
    assert found == model.generate(asked(*WORDS), 12)
    assert len(calls) == 13
