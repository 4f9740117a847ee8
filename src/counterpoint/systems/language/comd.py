"""CoMD: a small model of pictures and text learns from a large one, in rounds, on questions that it answers worse.

"Unlock the Power: Competitive Distillation for Multi-Modal Large Language Models", arXiv 2311.08213. The paper has no code; its
loop is that of Lion (Jiang et al., arXiv 2305.12870; github YJiangcm/Lion, MIT).

    v, x        pictures, a question
    y_T, y_S    answers of teacher and student
    A           assessor: two scores from 1 to 10; G: augmentor
    s_T, s_S    mean scores of both over the two orders of the answers

    imitate     L = -1/|y_T| sum_t log p_S(y_T,t | v, x, y_T,<t)
    assess      gap = s_T - s_S; an item is difficult where gap >= threshold, else easy
    augment     new items G(v, x): half from difficult items, half from easy ones; filters
    update      the next round learns from the new items, and from a share of the former ones

Gaps, reviews and filters are in core/reviews.py, assessors and augmentors in tasks/rounds.py, the pool in tasks/pools.py.

Stages:

    teacher      chats; left out where `teacher` names a finished model
    captions     the projector learns chats with captions
    round k      from round 2 on, assess, augment and update first; then imitate

- Certain: the loop, four rounds, L on the teacher's texts alone. Lion's: both orders, threshold 1, halves, filters, ROUGE-L 0.7.
- Chosen: reviews off the format are counted and left out (Lion: gap 0). A question is compared with those about the same pictures.
  Former items are learned again (`replay`; Lion: 0). An item seeds at most `max_uses` items.
- `selection`: other choices of seeds are controls. They make as many items. With `equal_calls`, they make one more for each call of
  the teacher that an assessment would have cost.
- A round without a difficult item adds items from easy ones and is the last. So is one that adds none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.core.reviews import score_gap, split_by_difficulty
from counterpoint.data.chats import ChatData
from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.decoding import answers
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.chats import ChatsConfig
from counterpoint.tasks.pooled_chats import PooledChatLearner
from counterpoint.tasks.pools import Item, Scope, draw_alike, draw_seeds
from counterpoint.tasks.rounds import Agreement, Assessor, Augmentor, Judge, Likelihood, Rewriter, check_reviews
from counterpoint.tasks.taught_chats import TaughtChatsConfig, captioned, chat_model_of, finished_teacher

SHOWN = 3  # difficult items of a round on the page


@dataclass
class CoMDConfig(TaughtChatsConfig):
    """Settings of CoMD. `epochs` are the passes of each round over its items."""

    epochs: int = 3
    """Passes of each round over its items, at least 0; 0: measure the model as it is."""
    warmup: float = 0.03
    rounds: int = 4
    """Number of rounds, at least 1; the first learns the seeds: the training chats without captions."""
    caption_epochs: int = 1
    """Passes over the chats with captions before the rounds; none where the data have no caption."""
    caption_lr: float = 2.4e-2
    """Learning rate of captions at a batch of 256, > 0."""
    caption_learns: Literal["projector", "all"] = "projector"
    """What learns from captions: the projector (the paper), or all, for a student that is built here."""
    new_items: int = 200
    """Number of questions that a round makes, at least 1."""
    difficult_share: float = 0.5
    """Share of them whose seeds are difficult, 0 to 1."""
    threshold: float = 1.0
    """Smallest gap of a difficult item, in points of the assessor; -inf: all items are difficult."""
    selection: Literal["competitive", "random", "uniform", "easy"] = "competitive"
    """Seeds: competitive (the paper); controls: random seeds of the first round, uniform over kinds of questions, or easy items."""
    equal_calls: bool = False
    """Let selections without an assessment make one more item for each call of the teacher that an assessment would cost."""
    assessor: Literal["likelihood", "agreement", "judge"] = "agreement"
    """agreement with the teacher's answer, likelihood under the teacher, or judge: a model that writes reviews."""
    judge: str = ""
    """The model that reviews: run:RUN, fit:SLUG?... or hf:NAME; "": the teacher."""
    written_tokens: int = 96
    """Maximum number of tokens of a review, and of a question that the teacher writes; at least 1."""
    review_sampling: float = 0.2
    """Temperature of reviews, at least 0; 0: the most probable tokens."""
    augmentor: Literal["relatives", "rewrite"] = "relatives"
    """relatives: a question of the same kind about other pictures; rewrite: the teacher writes a question about the same ones."""
    writing_sampling: float = 1.0
    """Temperature of questions that the teacher writes, at least 0; 0: the most probable tokens."""
    probe: int = 0
    """Assess so many questions of the pool about other pictures; 0: assess the pool itself, as Lion does."""
    max_similarity: float = 0.7
    """Leave out a question whose ROUGE-L to a kept one is higher, 0 to 1."""
    similar_to: Scope = "picture"
    """Compare with kept questions about the same pictures, or with all, as Lion does."""
    max_uses: int = 3
    """Maximum number of items that one item seeds in all rounds, at least 1."""
    replay: float = 1.0
    """Share of the former items that a round learns again, 0 to 1; 0: the new ones alone, as Lion does."""

    counts: ClassVar[tuple[str, ...]] = (*TaughtChatsConfig.counts, "rounds", "new_items", "written_tokens", "max_uses")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("caption_lr")
        self.need_share("difficult_share", "replay", "max_similarity")
        self.need_weight("caption_epochs", "probe", "review_sampling", "writing_sampling")
        if math.isnan(self.threshold):
            raise CounterpointError("threshold must be a number, got nan")

    def facts(self, data: ChatData) -> dict[str, Any]:
        """Return the facts of the data. The teacher gives texts alone, so a finished student keeps its own tokenizer."""
        own = not self.trains_teacher and self.model.startswith(("run:", "hf:"))
        return ChatsConfig.facts(self, data) if own else super().facts(data)


class CoMD(PooledChatLearner):
    """A student, its teacher and its pool.

    Attributes:
        assessor, augmentor: The callables of the rounds; set others before a fit begins. Default: as the settings say.
    """

    config: CoMDConfig
    judging: Frozen | None = None
    assessor: Assessor
    augmentor: Augmentor

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        if config.judge and self.judging is None:
            self.judging = finished_teacher(config.judge, self.size, config.context)
        if not self.seeds(survey):
            raise DataError("every training chat is a caption, so no question is left for the rounds; add questions")
        if config.caption_epochs and config.epochs and not len(captioned(survey)):
            raise DataError("no training chat is a caption, from which the projector learns; set --caption-epochs 0")
        if not hasattr(self, "assessor"):
            self.assessor = self._assessor()
            if config.assessor == "judge" and config.epochs:
                asked = [self.shown(survey, seed) for seed in self.seeds(survey)]
                check_reviews(self._judge(), asked, config.new_tokens, config.written_tokens)
        if not hasattr(self, "augmentor"):
            rewriter = Rewriter(
                partial(self.ask, temperature=config.writing_sampling, new_tokens=config.written_tokens),
                partial(self.shown, survey),
            )
            self.augmentor = rewriter if config.augmentor == "rewrite" else self.relatives(survey)

    def _assessor(self) -> Assessor:
        config = self.config
        if config.assessor == "agreement":
            return Agreement()
        if config.assessor == "likelihood":
            return Likelihood(self._answering())
        most, temperature = config.written_tokens, config.review_sampling
        if self.judging is None:
            return Judge(partial(self.ask, new_tokens=most, temperature=temperature))
        return Judge(partial(answers, self._judge(), new_tokens=most, temperature=temperature))

    def _judge(self) -> ChatModel:
        """Return the model that reviews."""
        return self._answering() if self.judging is None else chat_model_of(self.judging.module)

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        if not config.epochs:
            return [self.measured_only()]
        found = self.teacher_stages()
        if config.caption_epochs:
            found.append(
                Stage(
                    "captions",
                    config.caption_epochs,
                    self._learning,
                    lambda: [self.turn(self._learning(), replace(config, lr=config.caption_lr))],
                    batches=lambda survey: RowBatches(captioned(survey), config.batch_size),
                )
            )
        for number in range(1, config.rounds + 1):
            enter = partial(self._enter, number)
            found.append(
                Stage(
                    f"round {number}",
                    config.epochs,
                    lambda: [self.model],
                    self._turns,
                    batches=self.pool_steps,
                    enter=enter,
                )
            )
        return found

    def _learning(self) -> Sequence[nn.Module]:
        """Return what learns from captions; a model without pictures has no projector."""
        projector = self.part("multi_modal_projector") if self.config.caption_learns == "projector" else None
        return [self.model if projector is None else projector]

    def _turns(self) -> list[Turn]:
        # After the end of the rounds the gradient is 0, which moves nothing without weight decay.
        return [self.turn([self.model], self.config if self.rows else replace(self.config, weight_decay=0.0))]

    # --- a round

    def _enter(self, number: int, survey: Survey) -> None:
        """Begin a round: assess, augment and update. The first one takes the seeds."""
        if self.ended:
            self.rows = []
            return
        self.eval()
        rng = np.random.default_rng([self.seed, 2311_08213, number])
        record: dict[str, Any] = {"round": number, "calls": 0}
        if number == 1:
            self.pool.items, self.records = [], []
            new = [self.pool.add(seed) for seed in self.seeds(survey)]
        else:
            new = self._grow(survey, record, rng)
        former = [item.number for item in self.pool if item.answer]
        again = rng.permutation(former)[: round(self.config.replay * len(former))].tolist() if new else []
        learned = self.label(survey, new, record) if new else []
        self.rows = [int(n) for n in again] + [item.number for item in learned]
        self.records.append(record | {"items": len(self.pool), "new": len(new)})
        self.train()

    def _grow(self, survey: Survey, record: dict[str, Any], rng: np.random.Generator) -> list[Item]:
        """Make new questions of seeds, and add those that pass the filters."""
        config = self.config
        if config.selection in ("random", "uniform"):
            seeds, hows = self._controls(rng)
        else:
            seeds, hows = self._choose(*self.assess(survey, record, rng), rng)
        drafts = self.augmentor(seeds, [how == "easy" for how in hows], rng) if seeds else []
        record["calls"] += len(seeds) * (config.augmentor == "rewrite")
        for seed in seeds:
            seed.uses += 1
        added, record["left_out"] = self.pool.grow(drafts, seeds, hows, record["round"], self.fits)
        if not added:
            left = ", ".join(f"{many} {why}" for why, many in record["left_out"].items()) or "no seed is left"
            self.warnings.append(f"round {record['round']} adds no item ({left}), so the rounds end")
            self.ended = True
        return added

    @torch.no_grad()
    def assess(self, survey: Survey, record: dict[str, Any], rng: np.random.Generator) -> tuple[list[Item], list[Item]]:
        """Score the answers of teacher and student; return difficult and easy items."""
        items = [item for item in self.pool if item.answer]
        if self.config.probe:
            chosen = [items[n] for n in rng.integers(len(items), size=self.config.probe)]
            drafts = self.relatives(survey)(chosen, [False] * len(chosen), rng)
            fresh = [Item(-1, draft.messages, draft.pictures, draft.group) for draft in drafts]
            items = self.label(survey, fresh, record) or items
        self.say(survey, items)
        prompts, judge = [self.shown(survey, item) for item in items], self.assessor
        its, own = [item.answer for item in items], [item.said for item in items]
        first = judge(prompts, its, own, its)
        second = judge(prompts, own, its, its) if judge.sees_order else first.flip(1)
        record["calls"] += self._cost(len(items))
        read = ((first >= 0) & (second >= 0)).all(1)
        for n, item in enumerate(items):
            means = (first[n] + second[n].flip(0)) / 2
            item.scores = (float(means[0]), float(means[1])) if read[n] else None
        items = [item for item in items if item.scores]
        gaps = score_gap(first[read], second[read]) if items else first.new_zeros(0)
        hard, easy = (rows.tolist() for rows in split_by_difficulty(gaps, self.config.threshold))
        self._record(record, items, hard, int((~read).sum()))
        return [items[n] for n in hard], [items[n] for n in easy]

    def _cost(self, pairs: int) -> int:
        """Return the calls of a model that the reviews of some pairs cost."""
        return pairs * self.assessor.calls * (2 if self.assessor.sees_order else 1)

    def _record(self, record: dict[str, Any], items: list[Item], hard: list[int], unread: int) -> None:
        """Record an assessment, and warn of reviews off the format."""
        gaps: dict[str, list[float]] = {}
        for item in items:
            gaps.setdefault(item.group, []).append(item.gap or 0.0)
        record |= {"assessed": len(items) + unread, "off_format": unread, "difficult": len(hard)}
        record |= {
            "easy": len(items) - len(hard),
            "gaps": {name: float(np.mean(of)) for name, of in sorted(gaps.items())},
        }
        picked = [items[n] for n in hard[:: max(1, len(hard) // SHOWN)][:SHOWN]]
        record["shown"] = [[item.question, list(item.pictures), item.answer, item.said, item.gap] for item in picked]
        if unread:
            told = f"round {record['round']}: {unread} of {record['assessed']} reviews are off the format"
            if not items:
                raise CounterpointError(f"{told}; name another --judge or --assessor, or raise --written-tokens")
            self.warnings.append(f"{told} and are left out")

    def _choose(
        self, difficult: list[Item], easy: list[Item], rng: np.random.Generator
    ) -> tuple[list[Item], list[str]]:
        """Draw the seeds of a round, the difficult ones first; each item at most as often as it may still seed."""
        config = self.config
        if config.selection == "easy":
            difficult = []
        elif not difficult:
            self.warnings.append("no item is difficult any more: this round takes easy ones, and is the last")
            self.ended = True

        many = round(config.new_items * config.difficult_share) if easy else config.new_items
        hard = draw_seeds(difficult, many, config.max_uses, rng)
        soft = draw_seeds(easy, config.new_items - len(hard), config.max_uses, rng)
        return [*hard, *soft], ["difficult"] * len(hard) + ["easy"] * len(soft)

    def _controls(self, rng: np.random.Generator) -> tuple[list[Item], list[str]]:
        """Draw seeds without an assessment: the seeds of the first round, at random or uniformly over kinds of questions."""
        config = self.config
        probed = config.probe or sum(bool(item.answer) for item in self.pool)
        many = config.new_items + config.equal_calls * (self._cost(probed) + config.probe)
        first = [item for item in self.pool if not item.origin]
        return draw_alike(first, many, config.selection == "uniform", rng), [config.selection] * many

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return self.pool_batch() if self.stage_name.startswith("round") else batch

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.stage_name == "teacher":
            return self.teacher_loss(batch)
        return super().loss(batch) if batch else self.still()


RECIPE = {
    "model": "llava-32-1-2",
    "teacher": "fit:ritual?data=digit-questions%3Ftrain=3000%26captions=1000%26exponent=0&model=llava-48-2-4&context=48&epochs=12"
    "&vocabulary=300&new_tokens=6&evaluate_every=12&lr=0.024",
    "context": 48,
    "vocabulary": 300,
    "new_tokens": 6,
    "caption_learns": "all",
    "caption_epochs": 8,
    "evaluate_every": 99,
}
SYSTEM = System(
    slug="comd",
    task="chats",
    config=CoMDConfig,
    learner=CoMD,
    data="digit-questions?captions=1000",
    recipes={"digit-questions": RECIPE},
)
