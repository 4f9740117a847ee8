"""Models of chats: batches without a row."""

from __future__ import annotations

import pytest
import torch

from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.chat_tokenizers import chat_tokenizer

TEXTS = ["is there a brick ?", "describe the picture ."]


@pytest.mark.parametrize("name", ["llama-16-2-2", "gpt2-16-2-2", "llava-16-2-2"])
def test_batch_without_a_row_has_no_logits_and_gradients_of_zero(name):
    size = 12 if name.startswith("llava") else 0
    model = ChatModel(name, chat_tokenizer(name, TEXTS, vocabulary=300, size=size), size=size, context=40)
    ids = torch.zeros(0, 3, dtype=torch.long)
    found = model(ids, ids.bool())
    assert found.shape == (0, 3, model.text_config.vocab_size)
    found.sum().backward()
    reached = [p.grad for p in model.parameters() if p.grad is not None]
    assert reached
    assert not any(grad.any() for grad in reached)


def test_batch_without_a_row_reaches_a_projector_that_learns_alone():
    model = ChatModel(
        "llava-16-2-2", chat_tokenizer("llava-16-2-2", TEXTS, vocabulary=300, size=12), size=12, context=40
    )
    model.requires_grad_(False)
    projector = next(part for name, part in model.named_modules() if name.endswith("multi_modal_projector"))
    projector.requires_grad_(True)
    ids = torch.zeros(0, 3, dtype=torch.long)
    model(ids, ids.bool()).sum().backward()
    assert not any(p.grad.any() for p in projector.parameters())
