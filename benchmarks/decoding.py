"""Compare decoding by branches in one batch with the authors' way: a pass and a cache for each branch.

    python benchmarks/decoding.py [--rounds 5] [--threads 1] [--only RULE]      writes results/bench/decoding.json

A LLaVA with random weights answers one prompt with one picture, as in the authors' evaluation, 128 tokens long. Our way and two
others combine the branches by the same function, and take the most probable token:

    authors   the loop of transformers' `generate`, in which every further branch prepares its inputs, calls the model and keeps its
              cache, as the released codes of VCD and RITUAL have it in their `sample`
    loop      a plain loop without anything of `generate`: at each step a call of the model for each branch

Answers of all ways are compared. Times are of the processor. `ratio` is the authors' time over ours, `loop_ratio` that of the loop.

`lol` has three branches: a Llama without pictures, the same under an instruction, and its amateur. Our amateur is an adapter on
rows of the batch. Theirs is a second model with merged weights. The loop reads the lower layer from all hidden states.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.decoding import Plain, answers, instructed
from counterpoint.encoders.early_exit import EarlyExit
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.systems.language import lol
from counterpoint.systems.language.ritual import TwoBranches, diffusion_noise
from counterpoint.tasks.adapted_chats import adapting_rows, with_adapter
from counterpoint.tasks.chats import without_pictures

OUT = Path(__file__).parents[1] / "results" / "bench" / "decoding.json"
MODELS = {"small": "llava-128-4-4", "larger": "llava-512-8-8", "large": "llava-1024-8-16"}
TEXT_MODELS = {size: name.replace("llava", "llama") for size, name in MODELS.items()}
RULES = ("plain", "vcd", "m3id", "lol")
INSTRUCTION = "answer with true and certain facts only"
TOKENS, SIZE = 128, 64


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


@dataclass
class Branches:
    """A logits processor that calls the model once for each further branch, with its own inputs and cache.

    Attributes:
        parts: For each further branch its network, prompt and media.
        combine: Makes scores of the logits of all branches and the step.
    """

    parts: Sequence[tuple[Any, Tensor, dict[str, Tensor]]]
    combine: Callable[[list[Tensor], int], Tensor]
    step: int = 0
    ids: list[Tensor] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = [scores]
        for n, (network, prompt, media) in enumerate(self.parts):
            if not self.step:
                self.ids.append(prompt)
                self.kept.append({"use_cache": True, "logits_to_keep": 1, **media})
                more: dict[str, Any] = {"is_first_iteration": True}
            else:
                self.ids[n] = torch.cat([self.ids[n], input_ids[:, -1:]], 1)
                more = {"next_sequence_length": 1}
            inputs = network.prepare_inputs_for_generation(self.ids[n], **more, **self.kept[n])
            out = network(**inputs, return_dict=True)
            self.kept[n] = network._update_model_kwargs_for_generation(out, self.kept[n])
            logits.append(out.logits[:, -1].float())
        self.step += 1
        return self.combine(logits, self.step - 1)


def by_transformers(model: ChatModel, prompt: Prompt, processor: Branches) -> list[int]:
    """Answer by the loop and the cache of transformers. Return the tokens of the answer."""
    ids = torch.tensor([model.tokenizer.prompt(prompt.messages)])
    found: list[int] = model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=model.tokenizer.fast.eos_token_id,
        pad_token_id=model.tokenizer.pad,
        logits_processor=[processor],
        **model.pixels(prompt.pictures),
    )[0, ids.shape[1] :].tolist()
    return found


def measured(
    rounds: int, ours: Callable[[], Any], authors: Callable[[], Any], loop: Callable[[], Any]
) -> dict[str, Any]:
    """Time the three ways in turn; return medians, and the ratios of the medians."""
    times: list[list[float]] = []
    same = True
    for at in range(rounds + 1):
        taken, said = [], []
        for way in (ours, authors, loop):
            start = time.process_time()
            with torch.inference_mode():  # as the authors' scripts have it
                said.append(way())
            taken.append(time.process_time() - start)
        times += [taken] if at else []
        same &= said[0] == said[1] == said[2]
    names = ("ours_s", "authors_s", "loop_s")
    found: dict[str, Any] = {
        name: round(statistics.median(one), 4) for name, one in zip(names, zip(*times, strict=True), strict=True)
    }
    found |= {"ratio": round(found["authors_s"] / found["ours_s"], 2)}
    found |= {"loop_ratio": round(found["loop_s"] / found["ours_s"], 2)}
    return found | {"same": same}


def timed(name: str, rule: Any, rounds: int) -> dict[str, Any]:
    """Time the ways of one rule."""
    model, prompt = given(name)
    both = {"m3id": [prompt, without_pictures(prompt)], "vcd": [prompt, prompt]}.get(rule, [prompt])
    noise = torch.randn((1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) if rule == "vcd" else None
    decoder = Plain() if rule == "plain" else TwoBranches(rule, 1.0, 0.1)
    words = model.tokenizer.words

    def ours() -> Any:
        [answer] = answers(model, [prompt], decoder, new_tokens=TOKENS, generator=torch.Generator().manual_seed(0))
        return answer.tokens

    def authors() -> Any:
        parts = []
        for one in both[1:]:
            pixels = model.pixels(one.pictures)
            if noise is not None:
                pixels = {"pixel_values": diffusion_noise(pixels["pixel_values"], noise, 500)}
            parts.append((model.model, torch.tensor([model.tokenizer.prompt(one.messages)]), pixels))

        def combine(logits: list[Tensor], step: int) -> Tensor:
            return logits[0] if rule == "plain" else fn.combine_logits(logits[0], logits[1], rule, 1.0, 0.1, step)

        return tuple(words(by_transformers(model, prompt, Branches(parts, combine))))

    return measured(rounds, ours, authors, lambda: tuple(words(separate(model, both, rule, noise))))


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
    """Time the ways of LOL."""
    model, base, merged, prompt = of_lol(name)
    layer = int(name.split("-")[2]) // 2
    rule = lol.Contrasted(EarlyExit(model, [layer]), "lol", INSTRUCTION, 0.3, 0.5, 0.1)
    exits = EarlyExit(base, [layer]), EarlyExit(merged, [layer])
    words = model.tokenizer.words

    def ours() -> Any:
        with rule.exit.watching(last=True), adapting_rows(model, lol.AMATEUR, lambda: rule.first):
            return answers(model, [prompt], rule, new_tokens=TOKENS)[0].tokens

    def authors() -> Any:
        parts, early = [], list[Tensor]()

        def kept(number: int) -> Callable[..., None]:
            return lambda *_: early.append(exits[number].logits(layer)[:, -1].float())

        def combine(logits: list[Tensor], step: int) -> Tensor:
            found = rule.scores(torch.stack(logits), [torch.stack(early)], rule.beta, float("-inf"))
            early.clear()
            return found

        for one, messages in ((base, instructed(prompt, INSTRUCTION).messages), (merged, prompt.messages)):
            parts.append((one.model, torch.tensor([model.tokenizer.prompt(messages)]), {}))
        handles = [one.model.register_forward_hook(kept(n)) for n, one in enumerate((base, merged))]
        with exits[0].watching(last=True), exits[1].watching(last=True):
            found = by_transformers(base, prompt, Branches(parts, combine))
        for handle in handles:
            handle.remove()
        return tuple(words(found))

    return measured(rounds, ours, authors, lambda: tuple(words(of_authors(base, merged, prompt, rule))))


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
