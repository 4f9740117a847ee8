"""RITUAL: answer from a picture and from a random transformation of it, so that fewer absent objects are named.

Woo, Jang, Kim, Choi, Kim: "RITUAL: Random Image Transformations as a Universal Anti-hallucination Lever in LVLMs", arXiv
2405.17821. Code of the authors: github sangminwoo/RITUAL (MIT).

    l     [n, V] logits of the next token from the picture
    l'    [n, V] those of another branch with the same text so far
    beta  plausibility: tokens with less than beta times the largest probability under l are left out

    ritual   s = l + alpha l'                      l' from a transformed picture, alpha = 3
    vcd      s = (1 + alpha) l - alpha l'          l' from a noised picture, alpha = 1
    m3id     s = l + (l - l') (1 - g) / g          l' without the picture, g = exp(-decay t) at token t = 0, 1, ...

A transformation is drawn once for an answer: a flip, a rotation, colours, a blur or a crop. Nothing is trained.

- Certain: the rules, their order before temperature and top_p, the six transformations, noise, alpha, beta, decay.
- RITUAL+ asks the model which transformation suits the question. The paper shows the question; the code does not hold it. Chosen:
  its wording, and a random transformation where the reply names none.
- Paper and page describe a mixture of distributions; the code and this file combine logits.
- A prompt without pictures is decoded plainly.

The method "same", a control, takes the unchanged picture twice: s = (1 + alpha) l, which divides the temperature by 1 + alpha.
Compare with it before a gain is credited to the transformation. "greedy" takes the most probable token, "plain" draws from l.

Runs without `--model` of a finished run first train a small model on the chats. The loop over branches and tokens is in
encoders/decoding.py, plausibility in core/decoding.py, the transformations are in views/transformed.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_rows, need_within, shapes
from counterpoint.core.decoding import plausible
from counterpoint.core.precision import full_precision, wide
from counterpoint.data.shown import captioned, png
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import Answer, Branch, Decoder, Plain
from counterpoint.encoders.messages import Message
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.chats import ChatLearner, ChatsConfig, answer_measures, without_pictures
from counterpoint.views.transformed import TRANSFORMS, Transform, transformed

Rule = Literal["ritual", "vcd", "m3id"]
Method = Literal["ritual", "ritual+", "same", "vcd", "m3id", "plain", "greedy"]
METHODS = get_args(Method)
SAID = {  # as RITUAL+ offers them
    "horizontal": "horizontal flip",
    "vertical": "vertical flip",
    "rotation": "rotation",
    "colours": "colour jitter",
    "blur": "gaussian blur",
    "crop": "crop",
}
LONGEST = 80.0  # largest exponent of m3id's g, so that it is never 0
STEPS = 1000  # of the diffusion that VCD's noise is taken from
REPLY = 8  # maximum number of tokens of RITUAL+'s choice
SHOWN = 4  # questions on the page
NAMED = ("accuracy", "chair_i")  # measures of further methods


# ------------------------------------------------------------------------------------------------------------- equations


@full_precision
def combine_logits(
    logits: Float[Tensor, "n vocabulary"],
    other: Float[Tensor, "n vocabulary"],
    rule: Rule = "ritual",
    alpha: float = 3.0,
    beta: float = 0.1,
    step: int = 0,
    decay: float = 0.02,
) -> Float[Tensor, "n vocabulary"]:
    r"""Combine the logits of two branches to scores of the next token; minus infinity for implausible tokens.

    Args:
        logits: those of the unchanged picture. They alone decide which tokens are plausible.
        other: those of the second branch.
        rule: "ritual", "vcd" or "m3id" (see the module).
        alpha: weight of the second branch, at least 0; m3id ignores it.
        beta: least probability of a token in shares of the largest, 0..1; 0 keeps all.
        step: number of tokens of the answer so far, for m3id.
        decay: decay of m3id's g, at least 0.

    Raises ValueError for shapes that differ, an unknown rule, and a weight out of range.

    >>> combine_logits(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), alpha=3.0)
    tensor([[1., 3.]])
    """
    need_alike("n vocabulary", logits=logits, other=other)
    need_within(0, math.inf, alpha=alpha, decay=decay, step=step)
    if rule == "ritual":
        scores = logits + alpha * other
    elif rule == "vcd":
        scores = (1 + alpha) * logits - alpha * other
    elif rule == "m3id":
        g = float(torch.exp(torch.tensor(-min(decay * step, LONGEST))))  # in float32, as the authors' code has it
        scores = logits + (1 - g) / g * (logits - other)
    else:
        raise ValueError(f"rule must be ritual, vcd or m3id, got {rule!r}")
    return scores.masked_fill(~plausible(logits, beta), -math.inf)


@full_precision
def diffusion_noise(image: Float[Tensor, ...], noise: Float[Tensor, ...], noise_step: int = 500) -> Float[Tensor, ...]:
    r"""Mix a picture with noise as a diffusion does at one step: sqrt(a) image + sqrt(1 - a) noise.

    Args:
        image: normalised pixels, of any shape.
        noise: of the same shape, from N(0, 1).
        noise_step: 0 (nearly clean) to 999 (nearly pure noise). a is the product of 1 - beta_i over steps i <= noise_step.
            beta_i = 1e-5 + (0.005 - 1e-5) sigmoid(u_i), u_i from -6 to 6.

    Source: VCD (Leng et al., arXiv 2311.16922).

    >>> diffusion_noise(torch.ones(1), torch.zeros(1), 0)
    tensor([1.0000])
    """
    need_rows(image=image, noise=noise)
    if image.shape != noise.shape:
        raise ValueError("image and noise must have one shape, got " + shapes(image=image, noise=noise))
    need_within(0, STEPS - 1, noise_step=noise_step)
    steps = torch.linspace(-6, 6, STEPS, device=image.device)
    betas = steps.sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[int(noise_step)].to(image.dtype)
    return kept.sqrt() * image + (1 - kept).sqrt() * noise


# ------------------------------------------------------------------------------------------------------- transformations


def offer(prompt: Prompt, transforms: Sequence[str]) -> Prompt:
    """Return RITUAL+'s question: the prompt's own, and the list of transformations."""
    listed = " ".join(f"{n}) {SAID.get(name, name)}" for n, name in enumerate(transforms, 1))
    *before, (role, text) = prompt.messages
    asked = (
        f"{text} Which one change of the picture helps most to answer this question? Reply with its number. {listed}"
    )
    return Prompt((*before, Message(role, asked)), prompt.pictures)


def parse_choice(reply: str, transforms: Sequence[str]) -> str:
    """Return the transformation that a reply to `offer` names first, by its number or its name; "" where it names none.

    >>> parse_choice("2) vertical flip", TRANSFORMS), parse_choice("the rotation", TRANSFORMS), parse_choice("yes", TRANSFORMS)
    ('vertical', 'rotation', '')
    """
    number = re.search(r"\d+", reply)
    if number and 1 <= int(number[0]) <= len(transforms):
        return transforms[int(number[0]) - 1]
    said = {name: reply.lower().find(SAID.get(name, name)) for name in transforms}
    named = [name for name in transforms if said[name] >= 0]
    return min(named, key=lambda name: said[name], default="")


@dataclass
class TwoBranches:
    """Decode by the picture and one other branch.

    Attributes:
        rule: "ritual", "vcd" or "m3id".
        alpha, beta, decay: As in `combine_logits`.
        transforms: Names for `transformed`, of which one is drawn for each answer.
        noise_step: As in `diffusion_noise`.
        ask: Answers RITUAL+'s questions; None: draw the transformation.
        chosen: Transformation of each prompt of the last call.
        seen: Prompts of the second branch of the last call.
        unparsed: Number of replies of RITUAL+ that named no transformation.
    """

    rule: Rule = "ritual"
    alpha: float = 3.0
    beta: float = 0.1
    decay: float = 0.02
    transforms: tuple[str, ...] = TRANSFORMS
    noise_step: int = 500
    ask: Callable[[Sequence[Prompt]], Sequence[Answer]] | None = None
    chosen: list[str] = field(default_factory=list)
    seen: list[Prompt] = field(default_factory=list)
    unparsed: int = 0
    blind: Tensor | None = None  # [n] True for prompts without pictures; None where all have some

    def branches(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Branch]:
        blind = [not prompt.pictures for prompt in prompts]
        self.blind = torch.tensor(blind) if any(blind) else None
        if self.rule == "m3id":
            return [Branch(prompts), Branch([without_pictures(prompt) for prompt in prompts], apart=True)]
        if self.rule == "vcd":

            def noised(pixels: Tensor) -> Tensor:
                noise = torch.randn(pixels.shape, generator=generator).to(pixels)
                return diffusion_noise(pixels, noise, self.noise_step)

            return [Branch(prompts), Branch(prompts, noised)]
        drawn = torch.randint(len(self.transforms), (len(prompts),), generator=generator).tolist()
        self.chosen = [self.transforms[n] for n in drawn]
        if self.ask is not None and any(prompt.pictures for prompt in prompts):
            replies = self.ask([offer(prompt, self.transforms) for prompt in prompts])
            named = [parse_choice(reply.text, self.transforms) for reply in replies]
            self.unparsed += sum(not name for name in named)
            self.chosen = [name or random for name, random in zip(named, self.chosen, strict=True)]
        self.seen = [
            Prompt(prompt.messages, tuple(transformed(picture, name, generator) for picture in prompt.pictures))
            for prompt, name in zip(prompts, self.chosen, strict=True)
        ]
        return [Branch(prompts), Branch(self.seen)]

    def combine(self, logits: Float[Tensor, "branches n vocabulary"], step: int) -> Float[Tensor, "n vocabulary"]:
        scores = combine_logits(logits[0], logits[1], self.rule, self.alpha, self.beta, step, self.decay)
        if self.blind is None:
            return scores
        return torch.where(self.blind.to(scores.device)[:, None], wide(logits[0]), scores)


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class RitualConfig(ChatsConfig):
    """Settings of RITUAL. Defaults of decoding are the paper's for LLaVA-1.5; the model that is trained here is small."""

    weight_decay: float = 0.01
    sampling: float = 1.0
    method: Method = "ritual"
    """ritual: a random transformation; ritual+: the one that the model names; same: the same picture twice, a control; vcd: a
    noised picture, subtracted; m3id: no picture, subtracted; plain: one branch; greedy: its most probable tokens."""
    compare: tuple[Method, ...] = ()
    """Further methods to measure on the same model; `gain_over_METHOD` is the difference in the main measure."""
    alpha: float | None = None
    """Weight of the second branch, at least 0. Default: 3 for ritual, 1 for vcd."""
    beta: float = 0.1
    """Least probability of a token in shares of the largest one, from the unchanged picture, 0 to 1; 0: keep all."""
    decay: float = 0.02
    """Decay of m3id's g for each token, at least 0; a larger one subtracts more of the answer without the picture."""
    transforms: tuple[Transform, ...] = TRANSFORMS
    """Transformations to draw from: horizontal, vertical, rotation, colours, blur, crop."""
    noise_step: int = 500
    """Step of the diffusion that vcd's noise is taken from, 0 to 999."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("beta")
        self.need_weight("decay", *([] if self.alpha is None else ["alpha"]))
        if not self.transforms:
            raise CounterpointError(f"transforms is empty; name some of {', '.join(TRANSFORMS)}")
        if not 0 <= self.noise_step < STEPS:
            raise CounterpointError(f"noise_step must lie in 0..{STEPS - 1}, got {self.noise_step}")


class Ritual(ChatLearner):
    """A model that is trained first or finished elsewhere, and answers by two branches."""

    config: RitualConfig

    def decoder(self) -> Decoder:
        return decoder_of(self, self.config.method, self.config)

    def answers(
        self, prompts: Sequence[Prompt], *, decoder: Decoder | None = None, draw: int = 0, **changed: Any
    ) -> list[Answer]:
        if decoder is None and self.config.method == "greedy":
            changed = {"temperature": 0.0} | changed
        return super().answers(prompts, decoder=decoder, draw=draw, **changed)

    def by(self, method: str, prompts: Sequence[Prompt], draw: int = 0) -> list[Answer]:
        """Answer prompts by another method, with the settings' weights and the same draws."""
        changed = {"temperature": 0.0} if method == "greedy" else {}
        return self.answers(prompts, decoder=decoder_of(self, method, self.config), draw=draw, **changed)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the further methods that `compare` names, on the same chats."""
        found: dict[str, float] = {}
        compared = self.config.compare
        main = answer_measures(survey, split, partial(self.by, self.config.method)) if compared else {}
        for method in compared:
            other = answer_measures(survey, split, partial(self.by, method))
            found |= {f"{method}_{name}": other[name] for name in NAMED if name in other}
            if "accuracy" in other:
                found[f"gain_over_{method}"] = main["accuracy"] - other["accuracy"]
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show what several methods answer to some questions, with the transformed pictures."""
        split = survey.split("test")
        rows = [n for n, chat in enumerate(split.chats) if chat.pictures][:SHOWN]
        if not rows:
            return super().figures(survey)
        prompts = survey.batch("test", rows)["prompts"]
        texts = [f"{split.chats[n].question} Reference: {split.chats[n].answer}." for n in rows]
        views: list[dict[str, str]] = []
        for method in ("plain", "ritual", "vcd", "m3id"):
            rule = decoder_of(self, method, self.config)
            for n, answer in enumerate(self.answers(prompts, decoder=rule)):
                said = f"{method}: {answer.text} ({answer.probabilities[0]:.0%})"
                texts[n] += f" {said}."
                if isinstance(rule, TwoBranches) and rule.rule == "ritual":
                    views.append({"png": png(rule.seen[n].pictures[0]), "text": f"{rule.chosen[n]}; {said}"})
        pictures = [{"png": png(prompt.pictures[0]), "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        pairs = [cell for pair in zip(pictures, views, strict=True) for cell in pair]
        caption = (
            "A picture with the answers of four methods, and the transformed picture of RITUAL's second branch. Numbers are the "
            "probabilities of the first token."
        )
        return super().figures(survey) | {"Branches": captioned(pairs, 4, caption)}


def decoder_of(learner: Any, method: str, config: Any = None) -> Decoder:
    """Return the rule of a method for any learner of chats, or another model that has `answers`.

    Args:
        learner: Answers RITUAL+'s questions.
        method: One of METHODS; "plain" and "greedy" have the same rule, and greedy answers take temperature 0.
        config: Settings with the weights. Default: the paper's.
    """
    config = config or RitualConfig()
    rules: dict[str, Rule] = {"ritual": "ritual", "ritual+": "ritual", "same": "ritual", "vcd": "vcd", "m3id": "m3id"}
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method not in rules:
        return Plain()
    rule = rules[method]
    alpha = config.alpha if config.alpha is not None else (3.0 if rule == "ritual" else 1.0)
    views = ("none",) if method == "same" else tuple(config.transforms)
    found = TwoBranches(rule, alpha, config.beta, config.decay, views, config.noise_step)
    if method == "ritual+":
        found.ask = lambda prompts: learner.answers(prompts, decoder=Plain(), temperature=0.0, new_tokens=REPLY)
    return found


RECIPE = {
    "epochs": 15,
    "context": 96,
    "vocabulary": 400,
    "model": "llava-64-2-4",
    "evaluate_every": 5,
    "compare": ("plain", "same", "greedy", "vcd", "m3id"),
}
SYSTEM = System(
    slug="ritual", task="chats", config=RitualConfig, learner=Ritual, data="grid-chats", recipes={"grid-chats": RECIPE}
)
