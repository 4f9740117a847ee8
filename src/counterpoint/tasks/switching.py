"""Define learners of the task `chats` that name the modality of an answer, and measure how they route.

    routing_accuracy        accuracy of the most probable flag after "Modality:", averaged over the modalities
    routing_loss            negative log-probability of the right flag among the flags
    text_loss               mean loss of a text's token, as the prompt of a meta-response
    text_loss_before        the same of the model without its adapter, as a plain answer
    text_loss_rise, text_perplexity_rise    relative rise of the loss, and of its exponential
    NAME_accuracy, gain_over_NAME           of the routers that `compare` names

Those of the replies are in `tasks/measures/modalities.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.answers import answer_log_probability
from counterpoint.core.masking import IGNORED
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import Prompt, padded
from counterpoint.encoders.messages import Message
from counterpoint.encoders.meta_responses import MODALITY, TEXT, named_flags, parse_meta_response, render
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks.adapted_chats import AdaptedChatLearner
from counterpoint.tasks.chats import rows_of
from counterpoint.tasks.measures.modalities import keyword_router, logistic_router, macro_accuracy, word_counts
from counterpoint.words import counted

AT_ONCE = 256  # prompts of a pass


class SwitchingLearner(AdaptedChatLearner):
    """A model with an adapter that learns to name modalities.

    Attributes:
        flags: Numbers of the flags' tokens, in the order of the setting `flags`.
        opening: Tokens of a meta-response before its flag, and between flag and prompt.
    """

    flags: list[int]
    opening: tuple[list[int], list[int]]

    @abstractmethod
    def examples(self, survey: Survey) -> Indices:
        """Return the positions of the training chats whose flags are learned."""

    @property
    @abstractmethod
    def tuned(self) -> bool:
        """Whether the flags have been learned, or are being."""

    @torch.no_grad()
    def route(self, prompts: Sequence[Prompt]) -> Float[Tensor, "n flags"]:
        """Compute the probability of each flag after "Modality:", among the flags alone."""
        rows = [[*self.model.tokenizer.prompt(prompt.messages), *self.opening[0]] for prompt in prompts]
        ids, mask = (part.to(self.device) for part in padded(rows, self.model.tokenizer.pad))
        logits = self.model(ids, mask)[torch.arange(len(rows)), mask.sum(1) - 1]
        return logits[:, self.flags].float().softmax(1)

    # --- measures

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the routing probability, the loss of texts before and after tuning, and the routers of `compare`."""
        chats = survey.split(split).chats
        rows = [n for n, chat in enumerate(chats) if chat.kind == "meta" and not chat.pictures]
        flags, config = list(self.config.flags), self.config
        parsed = [parse_meta_response(chats[n].answer, flags, TEXT, strict=True) for n in rows]
        single = [(n, a[0], b[0]) for n, (a, b) in zip(rows, parsed, strict=True) if len(a) == 1]
        if not single:
            return {}
        self.eval()
        prompts, truth = [Prompt(chats[n].prompt) for n, *_ in single], [flag for _, flag, _ in single]
        chance = torch.cat([self.route(prompts[at : at + AT_ONCE]) for at in range(0, len(prompts), AT_ONCE)]).cpu()
        right = torch.tensor([flags.index(flag) for flag in truth])
        found = {
            "routing_accuracy": routed(truth, [flags[n] for n in chance.argmax(1).tolist()]),
            "routing_loss": float(-chance[torch.arange(len(right)), right].clamp(min=1e-12).log().mean()),
        }
        texts = [(chats[n].prompt, prompt) for n, flag, prompt in single if flag == TEXT]
        if texts:
            found |= self._texts(texts)
        if config.compare:
            evaluated = survey.evaluator(split)
            for some in survey.in_batches(split):
                evaluated.take(some, self.answers(survey.batch(split, some)["prompts"], draw=int(some[0])))
            own = evaluated.compute()["modality_accuracy"]
            asked = [chats[n].question for n, *_ in single]
            for name, said in self._routers(survey, asked, prompts).items():
                score = routed(truth, said)
                found |= {f"{name}_accuracy": score, f"gain_over_{name}": own - score}
        return found

    def _texts(self, texts: Sequence[tuple[tuple[Message, ...], str]]) -> dict[str, float]:
        """Measure the mean loss of a text's token: as a plain answer of the base model, and as a prompt."""
        plain = rows_of(self.model.tokenizer, [(*prompt, Message("assistant", text)) for prompt, text in texts])
        meta = rows_of(
            self.model.tokenizer, [(*prompt, Message("assistant", render(TEXT, text))) for prompt, text in texts]
        )
        many = (plain["labels"] != IGNORED).sum(1)
        # The text is the end of the meta-response.
        ends = meta["mask"].sum(1)
        at = torch.arange(meta["labels"].shape[1])[None]
        meta["labels"] = meta["labels"].masked_fill(at < (ends - many)[:, None], IGNORED)

        @torch.no_grad()
        def loss(rows: Mapping[str, Tensor], *, without: Sequence[int] = ()) -> float:
            given = {name: value.to(self.device) for name, value in rows.items()}
            logits = self.logits(given).index_fill(
                2, torch.tensor(without, dtype=torch.int64).to(self.device), -torch.inf
            )
            return float(-answer_log_probability(logits, given["labels"]).sum() / many.sum())

        if not self.tuned:
            return {"text_loss": loss(plain, without=self.flags)}
        found = {"text_loss": loss(meta)}
        if self.config.tuning == "lora":
            with self.model.model.disable_adapter():  # the base model has no flags
                found["text_loss_before"] = loss(plain, without=self.flags)
            found["text_loss_rise"] = found["text_loss"] / max(found["text_loss_before"], 1e-12) - 1
            found["text_perplexity_rise"] = float(np.exp(found["text_loss"] - found["text_loss_before"])) - 1
        return found

    @torch.no_grad()
    def _routers(self, survey: Survey, asked: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, list[str]]:
        """Choose flags by the routers of `compare`, which learn from the same examples."""
        chats = [survey.split("train").chats[n] for n in self.examples(survey).tolist()]
        parsed = [(chat, named_flags(chat.answer)) for chat in chats]
        learned = [(chat, own[0]) for chat, own in parsed if len(own) == 1]
        requests, flags = [chat.question for chat, _ in learned], [flag for _, flag in learned]
        found = {}
        for name in self.config.compare:
            if name == "keywords":
                found[name] = keyword_router(requests, flags, asked)
            elif name == "words":
                one, other = word_counts(requests, asked)
                found[name] = logistic_router(one, flags, other)
            elif name == "shots":
                before = self.demonstrations(survey)
                with self.model.model.disable_adapter():
                    found[name] = [self._by_shots(before, prompt) for prompt in prompts]
            else:
                with self.model.model.disable_adapter():
                    one, other = (
                        self._states(p).cpu().numpy() for p in ([Prompt(c.prompt) for c, _ in learned], prompts)
                    )
                found[name] = logistic_router(one, flags, other)
        return found

    def demonstrations(self, survey: Survey) -> tuple[Message, ...]:
        """Return a request of each modality, with the modality's name as the answer, for the untuned model.

        The untuned model has no flags, so the name is a plain word. Raises CounterpointError where a request of valid or test does
        not fit the context after them.
        """
        chats, chosen = survey.split("train").chats, dict[str, int]()
        for n in self.examples(survey).tolist():
            chosen.setdefault(named_flags(chats[n].answer)[0], n)
        found: list[Message] = []
        for flag in sorted(chosen, key=list(self.config.flags).index):
            found += [*chats[chosen[flag]].prompt, Message("assistant", _plain_name(flag))]
        tokenizer = self.model.tokenizer
        asked = [
            chat.prompt for split in ("valid", "test") for chat in survey.split(split).chats if chat.kind == "meta"
        ]
        longest = max(asked, key=lambda prompt: len(tokenizer.prompt(prompt)), default=())
        tokens = max(
            sum(map(len, tokenizer.chat((*found, *longest, Message("assistant", _plain_name(flag))))))
            for flag in self.config.flags
        )
        if tokens > self.config.context:
            raise CounterpointError(
                f"--compare shots puts {counted(len(chosen), 'demonstration')} before a request, which takes {tokens} tokens, "
                "more than the "
                f"context of {self.config.context}; raise --context, or leave shots out"
            )
        return tuple(found)

    def _by_shots(self, before: tuple[Message, ...], prompt: Prompt) -> str:
        """Return the flag whose name is the most probable answer after demonstrations."""
        flags = list(self.config.flags)
        rows = rows_of(
            self.model.tokenizer,
            [(*before, *prompt.messages, Message("assistant", _plain_name(flag))) for flag in flags],
        )
        given = {name: value.to(self.device) for name, value in rows.items()}
        return flags[int(answer_log_probability(*self.answer_logits(given)).argmax())]

    def _states(self, prompts: Sequence[Prompt]) -> Float[Tensor, "n width"]:
        """Return the model's last state at the end of each prompt."""
        found = []
        for start in range(0, len(prompts), AT_ONCE):
            rows = [self.model.tokenizer.prompt(prompt.messages) for prompt in prompts[start : start + AT_ONCE]]
            ids, mask = (part.to(self.device) for part in padded(rows, self.model.tokenizer.pad))
            states = self.model.model(
                input_ids=ids, attention_mask=mask.long(), output_hidden_states=True
            ).hidden_states
            found.append(states[-1][torch.arange(len(rows)), mask.sum(1) - 1])
        return torch.cat(found)


def _plain_name(flag: str) -> str:
    return f"{MODALITY} {flag.strip('[]').lower()}"


def routed(truth: Sequence[str], said: Sequence[str]) -> float:
    """Return the accuracy of single flags, averaged over the modalities of the truth."""
    return macro_accuracy([frozenset([flag]) for flag in said], [frozenset([flag]) for flag in truth])
