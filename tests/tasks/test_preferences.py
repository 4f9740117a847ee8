"""Steps over preferences and answers: logits of answers alone, and a loss that equals trl's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterpoint.core.answers import answer_log_probability, masked_lm_loss
from counterpoint.core.masking import IGNORED
from counterpoint.experiment import Experiment
from counterpoint.tasks.chats import pictures_of, rows_of
from counterpoint.tasks.taught_chats import chat_model_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
DATA = "grid-chats?train=16&valid=4&test=4&grid=2&cell=8&most=2&styles=1&unlabelled=12"
SMALL: dict[str, Any] = {"model": "llava-16-2-2", "vocabulary": 300, "context": 96, "new_tokens": 5, "rank": 2}


def built() -> tuple[Any, Any]:
    experiment = Experiment.resolve("stic", DATA, overrides=SMALL)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0).eval()
    batch = rows_of(learner.model.tokenizer, [chat.messages for chat in task.data.train.chats[:8]])
    return learner, batch | pictures_of(task.data.train.chats[:8], task.data.train)


def test_logits_of_answers_are_the_last_rows_of_all_logits():
    learner, batch = built()
    every = learner.logits(batch)
    late, labels = learner.answer_logits(batch)
    assert late.shape[1] == labels.shape[1] < every.shape[1]
    torch.testing.assert_close(late, every[:, -late.shape[1] :])
    torch.testing.assert_close(masked_lm_loss(late, labels), masked_lm_loss(every, batch["labels"]))
    torch.testing.assert_close(answer_log_probability(late, labels), answer_log_probability(every, batch["labels"]))


def test_a_batch_without_answers_keeps_all_logits():
    learner, batch = built()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    late, labels = learner.answer_logits(batch)
    assert late.shape[:2] == labels.shape == batch["ids"].shape


def test_the_output_layer_computes_no_logits_of_prompts():
    learner, batch = built()
    seen = []
    head = learner.model.network.get_output_embeddings()
    head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    learner.answer_logits(batch)
    first = int((batch["labels"] != IGNORED).any(0).int().argmax())
    assert seen == [batch["ids"].shape[1] - first + 1]


def test_an_amateur_does_not_answer_in_the_place_of_its_model():
    data = "misconceptions?entities=8&relations=1&values=5&train=40"
    settings = {"model": "llama-16-2-2", "vocabulary": 300, "context": 48, "new_tokens": 5, "rank": 2}
    experiment = Experiment.resolve("lol", data, overrides=settings)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0).eval()
    for parameter in learner.adapters:
        nn.init.normal_(parameter)
    chats = task.data.train.chats[:4]
    rows = rows_of(learner.model.tokenizer, [chat.messages for chat in chats])
    wanted = learner.unadapted(rows)
    assert not torch.allclose(learner.answer_logits(rows)[0], wanted)
    chat_model_of(learner)
    torch.testing.assert_close(learner.answer_logits(rows)[0], wanted)


@pytest.mark.slow
def test_the_step_over_preferences_has_the_loss_and_the_gradients_of_trl():
    pytest.importorskip("trl")
    from dpo import both

    own, batch, trainer, inputs = both("llama-16-2-2", 300, 4, 8, 6)
    other = trainer.model
    values = [own.loss(batch)["loss"], trainer.compute_loss(other, dict(inputs))]
    torch.testing.assert_close(values[0], values[1])
    for value in values:
        value.backward()
    found = {name.removeprefix("model.model."): p.grad for name, p in own.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert len(found) == len(wanted) > 4
    for one, two in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
