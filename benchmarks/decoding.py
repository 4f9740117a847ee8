"""Compare decoding by branches in one batch with the authors' way: a pass and a cache for each branch.

    python benchmarks/decoding.py [--rounds 5] [--threads 1]      writes results/bench/decoding.json

A small LLaVA with random weights answers one prompt with one picture, as in the authors' evaluation, 32 tokens long. Both ways
combine the branches by the same function, and take the most probable token. The authors' way is a plain loop. At each step it
calls the model once for each branch, with the newest token and the branch's own cache. It has none of the overhead of
transformers' `generate`, which our way includes. Answers of both ways are compared. `ratio` is their time over ours.
"""

from __future__ import annotations

import argparse
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
from counterpoint.encoders.decoding import Plain, answers
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.systems.language.ritual import TwoBranches, diffusion_noise
from counterpoint.tasks.chats import without_pictures

OUT = Path(__file__).parents[1] / "results" / "bench" / "decoding.json"
MODELS = {"small": "llava-128-4-4", "larger": "llava-512-8-8"}
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
    ours_s, theirs_s = (statistics.median(one) for one in zip(*times, strict=True))
    return {
        "ours_s": round(ours_s, 4),
        "separate_s": round(theirs_s, 4),
        "ratio": round(theirs_s / ours_s, 2),
        "same": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given_ = parser.parse_args()
    torch.set_num_threads(given_.threads)
    record: dict[str, Any] = {
        "threads": given_.threads,
        "rounds": given_.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cases": {},
    }
    for size, name in MODELS.items():
        for rule in ("plain", "vcd", "m3id"):
            record["cases"].setdefault(rule, {})[size] = timed(name, rule, given_.rounds)
            print(rule, name, record["cases"][rule][size], flush=True)
    OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
