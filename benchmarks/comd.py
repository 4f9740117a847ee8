"""Compare the costly parts of CoMD's rounds with the plain way, one question at a time: time, value, and peak memory.

    python benchmarks/comd.py [--rounds 3] [--threads 1]      writes results/bench/comd.json

Both ways take the same small LLaVA with random weights, and the same questions about pictures of 64 pixels.

    answers   the model answers questions of the pool, with up to 16 tokens each; the plain way calls `generate` for each
    assess    the model's likelihood scores two answers to each question; the plain way makes all logits of one answer at a time
    imitate   loss of the teacher's answers and its gradients, in a batch; the plain way is transformers' loss: logits everywhere
    filter    ROUGE-L of new questions with all kept ones, until one is too similar; the plain way fills a table for each pair

The `ratio` is the plain time over ours: above 1 ours is faster.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from sides import Case, Sides, run
from torch import Tensor

from counterpoint.core import reviews
from counterpoint.core.answers import masked_lm_loss
from counterpoint.encoders.chat_models import ChatModel, Prompt, stacked
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.decoding import answers
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.tasks.chats import late, rows_of
from counterpoint.tasks.pools import Draft, Pool
from counterpoint.tasks.rounds import HIGHEST, LOWEST, Likelihood

OUT = Path(__file__).parents[1] / "results" / "bench" / "comd.json"
MODELS = {"small": "llava-64-2-4", "larger": "llava-256-4-8"}
SIZE, TOKENS = 64, 16
WORDS = (
    "is",
    "there",
    "a",
    "red",
    "blue",
    "big",
    "small",
    "digit",
    "line",
    "above",
    "below",
    "left",
    "of",
    "the",
    "and",
    "what",
)


def questions(name: str, many: int) -> tuple[ChatModel, list[Prompt], list[list[str]]]:
    """Make a model that never ends its answers, questions about pictures, and two answers to each."""
    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(5, 12)))) for _ in range(3 * many)]
    tokenizer = chat_tokenizer(name, texts, vocabulary=400, size=SIZE)
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, size=SIZE, context=192).eval()
    model.model.lm_head.weight.data[tokenizer.fast.eos_token_id] = 0.0
    pictures = rng.integers(0, 256, (many, SIZE, SIZE, 3)).astype(np.uint8)
    asked = [Prompt((Message("user", f"{IMAGE} {texts[n]}"),), (pictures[n],)) for n in range(many)]
    return model, asked, [texts[many : 2 * many], texts[2 * many :]]


def answering(name: str, many: int) -> Case:
    """Answer questions."""
    model, asked, _ = questions(name, many)

    def told(texts: list[str]) -> Tensor:
        return torch.tensor([hash(text) % 1000 for text in texts]).double().sum()

    def ours() -> Tensor:
        return told([answer.text for answer in answers(model, asked, new_tokens=TOKENS)])

    def plain() -> Tensor:
        return told([model.tokenizer.text(model.generate([one], TOKENS)[0]) for one in asked])

    return ours, plain


def assessing(name: str, many: int) -> Case:
    """Score two answers to each question."""
    model, asked, texts = questions(name, many)
    judge = Likelihood(model)

    @torch.no_grad()
    def plain() -> Tensor:
        rows = []
        for n, prompt in enumerate(asked):
            for of in texts:
                batch = rows_of(model.tokenizer, [(*prompt.messages, Message("assistant", of[n]))])
                ids, learned = batch["ids"], batch["labels"][0, 1:] >= 0
                pixels = model.pixels(prompt.pictures)
                logits = model.model(
                    input_ids=ids, attention_mask=batch["mask"].long(), use_cache=False, **pixels
                ).logits
                logs = logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
                rows.append(LOWEST + (HIGHEST - LOWEST) * logs[learned].mean().exp())
        return torch.stack(rows).sum()

    return lambda: judge(asked, *texts, texts[0]).sum(), plain


def imitating(name: str, many: int) -> Case:
    """Compute the loss of a batch of answers and its gradients."""
    model, asked, texts = questions(name, many)
    chats = [(*prompt.messages, Message("assistant", text)) for prompt, text in zip(asked, texts[0], strict=True)]
    batch, counts = rows_of(model.tokenizer, chats), torch.ones(many, dtype=torch.int64)
    flat = np.stack([prompt.pictures[0] for prompt in asked])
    pictures = stacked(torch.from_numpy(flat), counts)

    def ours() -> Tensor:
        model.zero_grad()
        cut, labels = late(model, batch["labels"])
        return masked_lm_loss(model(batch["ids"], batch["mask"], pictures, counts, **cut), labels)

    def plain() -> Tensor:
        model.zero_grad()
        given = {"input_ids": batch["ids"], "attention_mask": batch["mask"].long(), "labels": batch["labels"]}
        found: Tensor = model.model(**given, **model.pixels(flat), use_cache=False).loss
        return found

    return ours, plain


def filtering(_: str, many: int) -> Case:
    """Leave out new questions that are too similar to one of four times as many kept ones."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(5, 12)))) for _ in range(5 * many)]
    drafts = [Draft((Message("user", text),), (), "", True) for text in texts]
    pool = Pool(0.7, "all")
    for draft in drafts[many:]:
        pool.add(draft)

    def ours() -> Tensor:
        for cached in (reviews.rouge_l, reviews._words, reviews._counted):
            cached.cache_clear()
        return torch.tensor(sum(pool.reason(draft) == "similar" for draft in drafts[:many])).double()

    def plain() -> Tensor:
        words = [text.split() for text in texts]
        return torch.tensor(sum(any(table(one, of) > 0.7 for of in words[many:]) for one in words[:many])).double()

    return ours, plain


def table(one: list[str], other: list[str]) -> float:
    """Compute ROUGE-L's F1 by the whole table of lengths."""
    held = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            same = one[i - 1] == other[j - 1]
            held[i][j] = held[i - 1][j - 1] + 1 if same else max(held[i - 1][j], held[i][j - 1])
    return 2 * held[-1][-1] / (len(one) + len(other))


if __name__ == "__main__":
    kinds = {"answers": (answering, 32), "assess": (assessing, 32), "imitate": (imitating, 32)}
    cases = {
        f"{kind}, {many} questions, {size}": Sides(partial(make, name, many), partial(make, MODELS["small"], 4))
        for kind, (make, many) in kinds.items()
        for size, name in MODELS.items()
    }
    cases["filter, 100 new and 400 kept questions"] = Sides(partial(filtering, "", 100), partial(filtering, "", 4))
    run(cases, OUT, __doc__, rounds=3)
