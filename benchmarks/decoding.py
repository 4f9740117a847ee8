"""Compare decoding by branches in one batch with the authors' way: a pass and a cache for each branch.

    python benchmarks/decoding.py [--rounds 5] [--threads 1] [--only RULE]      writes results/bench/decoding.json

A small LLaVA with random weights answers one prompt with one picture, as in the authors' evaluation, 32 tokens long. Both ways
combine the branches by the same function, and take the most probable token. The authors' way is a plain loop. At each step it
calls the model once for each branch, with the newest token and the branch's own cache. It has none of the overhead of
transformers' `generate`, which our way includes. Answers of both ways are compared. `ratio` is their time over ours.

`lol` has three branches: a Llama without pictures, the same under an instruction, and its amateur. Our amateur is an adapter in the
batch. Theirs is a second model with merged weights. They read the lower layer from all hidden states.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.chat_models import ChatModel, Prompt, chat_tokenizer
from counterpoint.encoders.decoding import Plain, answers, instructed
from counterpoint.encoders.early_exit import EarlyExit
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.systems.language import lol
from counterpoint.systems.language.ritual import TwoBranches, diffusion_noise
from counterpoint.tasks.adapted_chats import with_adapter
from counterpoint.tasks.chats import without_pictures

OUT = Path(__file__).parents[1] / "results" / "bench" / "decoding.json"
MODELS = {"small": "llava-128-4-4", "larger": "llava-512-8-8"}
TEXT_MODELS = {"small": "llama-128-4-4", "larger": "llama-512-8-8"}
RULES = ("plain", "vcd", "m3id", "lol")
INSTRUCTION = "answer with true and certain facts only"
TOKENS, SIZE = 32, 64


def given(name: str) -> tuple[ChatModel, Prompt]:
    """Return a model that never ends its answers, and a prompt."""
    texts = ["is there a brick ?", "describe the picture ."]
    tokenizer = chat_tokenizer(name, texts, vocabulary=400, size=SIZE)
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, size=SIZE, context=256).eval()
    model.model.lm_head.weight.data[tokenizer.fast.eos_token_id] = 0.0
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    return model, Prompt((Message("user", f"{IMAGE} describe the picture ."),), (picture,))


@torch.no_grad()
def separate(model: ChatModel, prompts: Sequence[Prompt], rule: str, noise: Tensor | None) -> list[int]:
    """Answer by one pass for each branch at each step, with a cache for each."""
    from transformers import DynamicCache

    name = "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"
    rows, caches, media = [], [], []
    for n, prompt in enumerate(prompts):
        rows.append(torch.tensor([model.tokenizer.prompt(prompt.messages)]))
        caches.append(DynamicCache(config=model.model.config))
        pixels = model.pixels(prompt.pictures)
        if n and noise is not None:
            pixels = {"pixel_values": diffusion_noise(pixels["pixel_values"], noise, 500)}
        media.append(pixels)
    found: list[int] = []
    for step in range(TOKENS):
        logits = []
        for n in range(len(prompts)):
            ids = rows[n] if not step else torch.tensor([[found[-1]]])
            more: dict[str, Any] = {name: caches[n], "use_cache": True, "logits_to_keep": 1}
            out = model.model(input_ids=ids, **(media[n] if not step else {}), **more)
            logits.append(out.logits[:, -1].float())
        scores = logits[0] if rule == "plain" else fn.combine_logits(logits[0], logits[1], rule, 1.0, 0.1, step)
        found.append(int(scores.argmax()))
    return found


def timed(name: str, rule: Any, rounds: int) -> dict[str, Any]:
    """Time both ways in turn."""
    model, prompt = given(name)
    other = {"m3id": [prompt, without_pictures(prompt)], "vcd": [prompt, prompt]}.get(rule, [prompt])
    noise = torch.randn((1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) if rule == "vcd" else None
    decoder = Plain() if rule == "plain" else TwoBranches(rule, 1.0, 0.1)
    times: list[tuple[float, float]] = []
    same = True
    for at in range(rounds + 1):
        start = time.perf_counter()
        [answer] = answers(model, [prompt], decoder, new_tokens=TOKENS, generator=torch.Generator().manual_seed(0))
        middle = time.perf_counter()
        theirs = separate(model, other, rule, noise)
        if at:
            times.append((middle - start, time.perf_counter() - middle))
        same &= answer.tokens == tuple(model.tokenizer.words(theirs))
    return told(times, same)


def of_lol(name: str) -> tuple[ChatModel, ChatModel, ChatModel, Prompt]:
    """Return a model with its amateur as an adapter, both as models of their own, and a prompt."""
    texts = [INSTRUCTION, "is there a brick in the house ?"]
    tokenizer = chat_tokenizer(name, texts, vocabulary=400, size=0)
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, context=256).eval()
    model.model.lm_head.weight.data[tokenizer.fast.eos_token_id] = 0.0
    base, merged = copy.deepcopy(model), copy.deepcopy(model)
    with_adapter(model, 8, lol.AMATEUR)
    for key, parameter in model.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    merged.model = copy.deepcopy(model.model).merge_and_unload()
    return model.eval(), base, merged.eval(), Prompt((Message("user", "is there a brick in the house ?"),))


@torch.no_grad()
def of_authors(base: ChatModel, merged: ChatModel, prompt: Prompt, rule: lol.Contrasted) -> list[int]:
    """Answer by three passes at each step, each with its cache: two of the model, one of the amateur."""
    from transformers import DynamicCache

    guided = instructed(prompt, INSTRUCTION)
    parts = [(base, prompt), (base, guided), (merged, prompt)]
    rows = [torch.tensor([model.tokenizer.prompt(one.messages)]) for model, one in parts]
    caches = [DynamicCache(config=model.model.config) for model, _ in parts]
    found: list[int] = []
    for _ in range(TOKENS):
        last, early = [], []
        for n, (model, _) in enumerate(parts):
            ids = torch.tensor([[found[-1]]]) if found else rows[n]
            out = model.model(input_ids=ids, past_key_values=caches[n], use_cache=True, output_hidden_states=True)
            last.append(out.logits[:, -1].float())
            state = out.hidden_states[rule.exit.layers[0]][:, -1:]
            early.append(model.model.lm_head(model.model.model.norm(state))[:, -1].float())
        scores = rule.scores(torch.stack(last), [torch.stack(early)], rule.beta, float("-inf"))
        found.append(int(scores.argmax()))
    return found


def timed_lol(name: str, rounds: int) -> dict[str, Any]:
    """Time both ways of LOL in turn."""
    model, base, merged, prompt = of_lol(name)
    layer = int(name.split("-")[2]) // 2
    rule = lol.Contrasted(EarlyExit(model, [layer]), "lol", INSTRUCTION, 0.3, 0.5, 0.1)
    times: list[tuple[float, float]] = []
    same = True
    for at in range(rounds + 1):
        start = time.perf_counter()
        with rule.exit.watching(last=True):
            [answer] = answers(model, [prompt], rule, new_tokens=TOKENS, adapter_names=rule.adapters)
        middle = time.perf_counter()
        theirs = of_authors(base, merged, prompt, rule)
        if at:
            times.append((middle - start, time.perf_counter() - middle))
        same &= answer.tokens == tuple(model.tokenizer.words(theirs))
    return told(times, same)


def told(times: Sequence[tuple[float, float]], same: bool) -> dict[str, Any]:
    """Return the medians, and the median of the rounds' ratios."""
    ours_s, theirs_s = (statistics.median(one) for one in zip(*times, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    return {"ours_s": round(ours_s, 4), "separate_s": round(theirs_s, 4), "ratio": round(ratio, 2), "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=RULES, help="one rule; its figures replace those of the record")
    given_ = parser.parse_args()
    torch.set_num_threads(given_.threads)
    record: dict[str, Any] = {
        "threads": given_.threads,
        "rounds": given_.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cases": {},
    }
    if given_.only:
        record["cases"] = json.loads(OUT.read_text(encoding="utf-8"))["cases"]
    for rule in (given_.only,) if given_.only else RULES:
        for size, name in (TEXT_MODELS if rule == "lol" else MODELS).items():
            found = timed_lol(name, given_.rounds) if rule == "lol" else timed(name, rule, given_.rounds)
            record["cases"].setdefault(rule, {})[size] = found
            print(rule, name, found, flush=True)
    OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
