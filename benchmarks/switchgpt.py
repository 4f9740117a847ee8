"""Compare SwitchGPT's step over meta-responses with the plain way on one model: time, value, and peak memory.

    python benchmarks/switchgpt.py [--rounds 7] [--threads 1]      writes results/bench/switchgpt.json

Both take the same Llama with the same adapter of peft and the same requests with answers. A step is the loss and its gradients,
without the optimiser. The plain way is the model's own loss of transformers: logits of every position, labels -100 in the prompts.
Ours computes the logits where answers are predicted. The `ratio` is the plain time over ours: above 1 ours is faster.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sides import Case, Sides, run
from torch import Tensor, nn

from counterpoint.core.answers import flag_weighted_lm_loss
from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.chat_tokenizers import learn_tokenizer
from counterpoint.encoders.flags import flag_ids, with_flags
from counterpoint.encoders.meta_responses import FLAGS
from counterpoint.systems.language.switchgpt import SwitchGPT
from counterpoint.tasks.adapted_chats import with_adapter

OUT = Path(__file__).parents[1] / "results" / "bench" / "switchgpt.json"
ANSWER = 24
SMALL = ("llama-64-2-4", 400, 4, 16)
CASES = {
    f"{name}, {vocabulary:,} tokens, {rows} requests of {prompt}": (name, vocabulary, rows, prompt)
    for name, vocabulary, rows, prompt in (
        ("llama-64-2-4", 800, 32, 16),
        ("llama-256-4-8", 8000, 16, 64),
        ("llama-256-4-8", 32000, 8, 128),
    )
}


def case(name: str, vocabulary: int, rows: int, prompt: int) -> Case:
    """Make both steps over answers of 24 tokens."""
    warnings.filterwarnings("ignore")
    tokenizer = with_flags(learn_tokenizer(["a request and an answer"], 300, 0), FLAGS)
    flags = flag_ids(tokenizer, FLAGS)
    tokenizer.vocabulary = vocabulary
    torch.manual_seed(0)
    model = with_adapter(ChatModel(name, tokenizer, context=prompt + ANSWER), 32, "flags", scale=1.0, tokens=flags)
    for key, parameter in model.model.named_parameters():
        parameter.requires_grad_("lora_" in key or "trainable_tokens_" in key)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, vocabulary, (rows, prompt + ANSWER), generator=g)
    labels = ids.clone()
    labels[:, :prompt] = -100
    batch = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "labels": labels}
    learner = SwitchGPT.__new__(SwitchGPT)
    nn.Module.__init__(learner)
    learner.model = model

    def ours() -> Tensor:
        model.zero_grad()
        return flag_weighted_lm_loss(*learner.answer_logits(batch), flags)

    def plain() -> Tensor:
        model.zero_grad()
        mask = batch["mask"].long()
        found: Tensor = model.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return found

    return ours, plain


if __name__ == "__main__":
    cases = {name: Sides(partial(case, *given), partial(case, *SMALL)) for name, given in CASES.items()}
    run(cases, OUT, __doc__, rounds=7)
