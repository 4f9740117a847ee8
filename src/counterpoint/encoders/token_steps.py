"""The loop over tokens of transformers' `generate`, at less cost for each token. The numbers are the same, up to rounding.

`generate` prepares settings, logits processors, rules of stopping and the cache, and calls the loop (`custom_generate`). The loop
leaves out what a new token does not need:

- Its mask: transformers makes one from positions at each token. A new token sees everything but padding.
- The head of the model for pictures: a new token goes to the language model alone.
- Reading the weights anew for each product of a few rows: `packed_weights` arranges them once.
- Padding of prompts without pictures to the length of those with pictures: two passes read them apart, into one cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from counterpoint.encoders.growing_cache import growing_cache, join
from counterpoint.encoders.packed_weights import packed_weights

PLAIN_KINDS = {
    "gpt2",
    "llama",
    "llava",
    "mistral",
    "qwen2",
    "qwen3",
}  # models that read the mask in attention only, and whose logits are the output layer of the decoder's last state


def loop_of(network: Any, apart: int | None = None) -> Callable[..., Tensor] | None:
    """Return the loop for a network of transformers, as `generate` takes it. None: the network needs transformers' own.

    Args:
        network: the network, in evaluation mode, whose cache is a growing one.
        apart: first row of those without pictures, which a pass of their own reads.
    """
    kinds = {network.config.model_type, getattr(network.config, "text_config", network.config).model_type}
    if not kinds <= PLAIN_KINDS or getattr(network.config, "_attn_implementation", None) != "sdpa":
        return None
    return partial(_steps, apart=apart)


def _steps(
    network: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    apart: int | None = None,
    **given: Any,
) -> Tensor:
    """Return the tokens of prompts and answers [n, tokens]; arguments as transformers' loops have them."""
    name = "cache" if "cache" in given else "past_key_values"
    decoder, head = network.get_decoder(), network.get_output_embeddings()
    (rows, longest), most = input_ids.shape, stopping_criteria.max_length
    pad = generation_config.pad_token_id
    ids = input_ids.new_full((rows, most), 0 if pad is None else pad)
    ids[:, :longest] = input_ids
    shown = given.get("attention_mask")
    mask, positions = None, torch.full((rows, 1), longest, device=ids.device)
    if shown is not None:
        mask = torch.ones(rows, 1, 1, most, dtype=torch.bool, device=ids.device)
        mask[:, 0, 0, :longest] = shown.bool()
        positions = shown.sum(1, keepdim=True)
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    logits = _of_prompts(network, input_ids, given, name, apart)
    with packed_weights([decoder, head], rows, most - longest):
        for length in range(longest, most):
            scores = logits.float()
            for processor in logits_processor:
                scores = processor(ids[:, :length], scores)
            ids[:, length] = scores.argmax(1)
            if pad is not None:
                ids[:, length].masked_fill_(ended, pad)
            ended |= stopping_criteria(ids[:, : length + 1], scores)
            if ended.all():
                return ids[:, : length + 1]
            state = decoder(
                input_ids=ids[:, length : length + 1],
                attention_mask=None if mask is None else mask[..., : length + 1],
                position_ids=positions,
                use_cache=True,
                **{name: given[name]},
            )[0]
            positions = positions + 1
            logits = head(state[:, -1])
    return ids


def _of_prompts(network: Any, ids: Tensor, given: dict[str, Any], name: str, apart: int | None) -> Tensor:
    """Read the prompts into the cache. Return the logits [n, vocabulary] after their last tokens."""
    mask = given.get("attention_mask")
    if apart is None or mask is None:
        found: Tensor = network(input_ids=ids, **given).logits[:, -1]
        return found
    parts, logits = [], []
    for rows in (slice(apart), slice(apart, None)):
        start = int(mask[rows].any(0).int().argmax())
        part = mask[rows, start:]
        cut = {"attention_mask": None if part.all() else part}
        if given.get("position_ids") is not None:
            cut["position_ids"] = given["position_ids"][rows, start:]
        shared = {key: value for key, value in given.items() if rows.stop or key in ("use_cache", "logits_to_keep")}
        parts.append(growing_cache(network)[name])
        out = network(input_ids=ids[rows, start:], **(shared | cut | {name: parts[-1]}))
        logits.append(out.logits[:, -1])
    join(given[name], parts)
    return torch.cat(logits)
