"""Answer prompts by several branches at once: one forward pass of all branches, one cache, one answer.

The branches of all prompts form one batch for transformers' `generate`. At each step a logits processor combines the branches'
logits to scores and draws a token. It makes this token the only one of every branch. So all branches continue with the same token,
and `generate` keeps positions, masks and the cache. Authors' loops call the model once for each branch, with separate caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.decoding import draw, sharpened
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.messages import Message

SHOWN = 3  # alternatives of a token that are kept
MOST_HELD = 2**21  # scores that wait for their probabilities


class Branch(NamedTuple):
    """One condition: the prompts as this branch sees them, and a change of their pixels.

    The last branch may be `apart`: its prompts have no pictures, and a pass of their own reads them. Other branches are longer, and
    padding to their length would cost as much as a picture.
    """

    prompts: Sequence[Prompt]
    disturb: Callable[[Tensor], Tensor] | None = None
    apart: bool = False


class Answer(NamedTuple):
    """A decoded answer."""

    text: str
    tokens: tuple[str, ...]  # with the end, if it came before the limit
    probabilities: tuple[float, ...]  # that each token was drawn with, before top_p and at temperature 1
    others: tuple[tuple[tuple[str, float], ...], ...]  # most probable tokens at each step
    ended: bool  # False for an answer that was cut at the limit


@runtime_checkable
class Decoder(Protocol):
    """A rule of decoding. `branches` chooses the conditions, `combine` makes scores of their logits."""

    def branches(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Branch]:
        """Return the conditions of the prompts, the unchanged one first."""
        ...

    def combine(self, logits: Float[Tensor, "branches n vocabulary"], step: int) -> Float[Tensor, "n vocabulary"]:
        """Return the scores of the next token, the logits of the distribution that it is drawn from."""
        ...


@dataclass
class Plain:
    """Decode by the model's own logits."""

    def branches(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Branch]:
        return [Branch(prompts)]

    def combine(self, logits: Float[Tensor, "branches n vocabulary"], step: int) -> Float[Tensor, "n vocabulary"]:
        return logits[0]


@dataclass
class Combined:
    """A logits processor of transformers that combines branches and draws their common token.

    The probabilities that an answer reports are computed for several steps at once.

    Attributes:
        decoder: The rule.
        rows: Number of prompts.
        temperature, top_p: As in `core.decoding.sharpened`.
        generator: Source of the draws.
    """

    decoder: Decoder
    rows: int
    temperature: float
    top_p: float
    generator: torch.Generator
    count: int = 0  # steps so far
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # scores and tokens of the latest steps
    done: list[tuple[list[Any], list[Any], list[Any]]] = field(default_factory=list)  # see `steps`

    def __call__(
        self, input_ids: Int[Tensor, "all tokens"], scores: Float[Tensor, "all vocabulary"]
    ) -> Float[Tensor, "all vocabulary"]:
        """Return scores that leave one token for each prompt, the same in all of its branches."""
        combined = self.decoder.combine(scores.float().view(-1, self.rows, scores.shape[1]), self.count)
        uniform = torch.rand(self.rows, generator=self.generator)
        if self.temperature == 0:
            token = combined.argmax(1)  # the one that `sharpened` leaves
        else:
            token = draw(sharpened(combined, self.temperature, self.top_p), uniform.to(scores.device))
        self.count += 1
        self.held.append((combined, token))
        if len(self.held) * combined.numel() > MOST_HELD:
            self._compute()
        every = token.repeat(len(scores) // self.rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, every[:, None], 0.0)

    def _compute(self) -> None:
        """Compute the probabilities of the steps that are held."""
        if not self.held:
            return
        combined, tokens = (torch.stack(part) for part in zip(*self.held, strict=True))
        self.held.clear()
        likely = combined.softmax(2)
        best = likely.topk(min(SHOWN, likely.shape[2]), 2)
        own = likely.gather(2, tokens[:, :, None])[:, :, 0]
        self.done += zip(own.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)

    @property
    def steps(self) -> list[tuple[list[Any], list[Any], list[Any]]]:
        """For each step the probability [n] of the token, and those [n, 3] of the best tokens, with their numbers."""
        self._compute()
        return self.done


@torch.inference_mode()
def answers(
    model: ChatModel,
    prompts: Sequence[Prompt],
    decoder: Decoder | None = None,
    *,
    new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    **more: Any,
) -> list[Answer]:
    """Answer prompts.

    Args:
        model: the model; its mode is the caller's.
        prompts: of any lengths, with any numbers of pictures.
        decoder: the rule. Default: the model's own logits.
        new_tokens: maximum number of tokens of an answer, at least 1.
        temperature: 0 for the most probable token at each step; above 0, tokens are drawn.
        top_p: draw from the fewest tokens whose probabilities sum to this share; 1 for all.
        generator: source of the draws. Default: seed 0.
        more: further arguments of transformers' `generate`.

    The draws depend on the generator and on the number of prompts, not on the branches. Raises CounterpointError for a prompt that
    leaves no room for an answer.
    """
    if not prompts:
        return []
    decoder = decoder or Plain()
    generator = generator or torch.Generator().manual_seed(0)
    branches = decoder.branches(prompts, generator)
    chosen = Combined(decoder, len(prompts), temperature, top_p, generator)
    counts = [sum(len(prompt.pictures) for prompt in branch.prompts) for branch in branches]

    def disturb(media: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = media.get("pixel_values")
        if pixels is None:
            return media
        parts = pixels.split([count * len(pixels) // max(1, sum(counts)) for count in counts])
        changed = [
            part if branch.disturb is None else branch.disturb(part)
            for part, branch in zip(parts, branches, strict=True)
        ]
        return media | {"pixel_values": torch.cat(changed)}

    every = [prompt for branch in branches for prompt in branch.prompts]
    apart = {"apart": len(every) - len(prompts)} if branches[-1].apart and counts[0] else {}
    found = model.generate(every, new_tokens, processor=chosen, disturb=disturb, **apart, **more)[: len(prompts)]
    stop, tokenizer = model.tokenizer.fast.eos_token_id, model.tokenizer
    out = []
    for row, ids in enumerate(found):
        steps = chosen.steps[: len(ids)]
        others = tuple(tuple(zip(tokenizer.words(best[row]), values[row], strict=True)) for _, values, best in steps)
        chance = tuple(likely[row] for likely, _, _ in steps)
        out.append(Answer(tokenizer.text(ids), tuple(tokenizer.words(ids)), chance, others, ids[-1:] == [stop]))
    return out


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """Put an instruction before a prompt, as a message of the system; "" changes nothing."""
    if not instruction:
        return prompt
    role, text = prompt.messages[0]
    if role == "system":
        return Prompt((Message("system", f"{instruction} {text}"), *prompt.messages[1:]), prompt.pictures)
    return Prompt((Message("system", instruction), *prompt.messages), prompt.pictures)
