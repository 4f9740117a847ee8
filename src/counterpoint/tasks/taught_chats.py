"""Define students of the task `chats`, which learn from a larger model that answers, and not only from references.

Sources of the teacher:

    --teacher llava-W-D-H   trained first, in the same run, for `teacher_epochs` epochs on the same chats; also the other kinds of
                            models that are built here
    --teacher run:RUN       the model of a finished run of the task chats
    --teacher fit:SLUG?...  one that is trained once and kept
    --teacher hf:NAME       a model of transformers, by name or folder

Student and teacher need one vocabulary. A finished teacher brings its tokenizer, and a student that is built here reads with it.
The teacher runs in evaluation mode and without gradient. A run keeps the student alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.answers import masked_lm_loss
from counterpoint.data.chats import ChatData
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_names import check_chat_model, takes_pictures
from counterpoint.encoders.chat_tokenizers import ChatTokenizer, chat_tokenizer
from counterpoint.encoders.decoding import Answer, answers
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, frozen, parameters
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.chats import ChatLearner, ChatsConfig, answer_measures, finished_chat
from counterpoint.words import counted

FINISHED = ("run:", "fit:", "hf:")


@dataclass
class TaughtChatsConfig(ChatsConfig):
    """Settings of every student of a model that answers."""

    teacher: str = "llava-96-3-4"
    """The teacher: run:RUN, fit:SLUG?data=SOURCE, hf:NAME, or a model that is built here and trained first, such as llava-W-D-H."""
    teacher_epochs: int = 20
    """Passes of such a teacher over the training chats."""
    teacher_lr: float = 2.4e-2
    """Learning rate of such a teacher, at a batch of 256."""

    distils: ClassVar[bool] = False  # by name: `counterpoint distill` is for students of pictures
    counts: ClassVar[tuple[str, ...]] = (*ChatsConfig.counts, "teacher_epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("teacher_lr")

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher trains in this run."""
        return not self.teacher.startswith(FINISHED)

    def check(self) -> None:
        super().check()
        if self.teacher.startswith("run:"):
            finished_chat(self.teacher)
        elif not self.teacher.startswith("fit:"):
            check_chat_model(self.teacher)

    def facts(self, data: ChatData) -> dict[str, Any]:
        """Return the facts of the data, with the tokenizer that student and teacher share."""
        if self.trains_teacher:
            if data.size and not takes_pictures(self.teacher):
                raise CounterpointError(
                    f"the teacher {self.teacher} takes no pictures, which {data.name} has; name llava-W-D-H"
                )
            return super().facts(data)
        theirs = tokenizer_of(finished_teacher(self.teacher, data.size, self.context))
        if not self.model.startswith(("run:", "hf:")):
            return data.spec | {"built": self.model, "tokenizer": theirs.to_json()}
        found = super().facts(data)
        need_one_vocabulary(ChatTokenizer.from_json(found["tokenizer"]), theirs, self.model, self.teacher)
        return found


class TaughtChatLearner(ChatLearner):
    """A student and its teacher. Subclasses add the stages after that of the teacher, and losses.

    Attributes:
        teacher: The teacher, if it trains in this run.
        instructor: The teacher, if it was trained elsewhere; loaded when a fit begins.
    """

    config: Any
    instructor: Frozen | None = None

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher: ChatModel | None = None
        self.of_teacher: dict[str, dict[str, float]] = {}  # measures of the teacher, which stay, by split
        self.said: dict[int, Answer] = {}  # answers of the evaluation that is under way
        if config.trains_teacher:
            tokenizer = ChatTokenizer.from_json(data.tokenizer)
            self.teacher = ChatModel(config.teacher, tokenizer, size=data.size, context=config.context)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.teacher is None and self.instructor is None:
            self.instructor = finished_teacher(self.config.teacher, self.size, self.config.context)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that student and teacher share; heads may be padded to more."""
        return self.model.tokenizer.vocabulary

    def part(self, name: str) -> nn.Module | None:
        """Return a part of the student's network by name; None for a network without it."""
        return next((module for at, module in self.model.network.named_modules() if at.endswith(name)), None)

    @torch.no_grad()
    def instruct(self, batch: dict[str, Any]) -> Float[Tensor, "n tokens vocabulary"]:
        """Compute the teacher's logits of a batch, in evaluation mode."""
        given = batch["ids"], batch["mask"], batch.get("pictures"), batch.get("counts")
        found: Tensor = self.teacher.eval()(*given) if self.teacher is not None else self._instructor()(*given)
        return found

    def _instructor(self) -> Frozen:
        assert self.instructor is not None
        return self.instructor

    def sizes(self) -> tuple[int, int]:
        return parameters(self.model), parameters(self._answering())

    def _answering(self) -> ChatModel:
        return self.teacher if self.teacher is not None else chat_model_of(self._instructor().module)

    # --- stages

    def teacher_stages(self) -> list[Stage]:
        """Return the stage of a teacher that trains in this run; [] for a finished one."""
        teacher = self.teacher
        if teacher is None:
            return []
        config = replace(self.config, lr=self.config.teacher_lr)
        turns = [teacher]
        return [
            Stage(
                "teacher",
                config.teacher_epochs,
                lambda: turns,
                lambda: [self.turn(turns, config)],
                batches=lambda survey: RowBatches(answered(survey), config.batch_size),
                evaluated=False,
            )
        ]

    def teacher_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a teacher that trains: the next token's cross-entropy."""
        assert self.teacher is not None
        logits = self.teacher(batch["ids"], batch["mask"], batch.get("pictures"), batch.get("counts"))
        return {"loss": masked_lm_loss(logits, batch["labels"])}

    # --- evaluation and saving

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        if self.survey is not None:
            self.said |= dict(zip(batch["index"].tolist(), found["answers"], strict=True))
        return found

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the teacher on the same chats, once for each split, and compare the student's captions with its.

        Returns the teacher's measures. Of captions there are two more. `chair_reduction` is 1 - chair_s of the student / chair_s of
        the teacher. `recall_kept` is the student's recall of objects minus the teacher's.
        """
        said, self.said = self.said, {}
        if self.survey is None:  # a finished run has no teacher any more
            return {}
        if split not in self.of_teacher:
            config, teacher = self.config, self._answering().eval()
            usual = {"new_tokens": config.new_tokens, "temperature": config.sampling, "top_p": config.top_p}

            def answer(prompts: Sequence[Prompt], draw: int) -> list[Answer]:
                return answers(teacher, prompts, generator=torch.Generator().manual_seed(draw), **usual)

            self.of_teacher[split] = answer_measures(survey, split, answer)
        its = self.of_teacher[split]
        found = {f"teacher_{name}": value for name, value in its.items() if name != "cut"}
        if "object_recall" in its:
            evaluator = survey.evaluator(split)
            evaluator.take(list(said), list(said.values()))
            own = evaluator.compute()
            found["recall_kept"] = own["object_recall"] - its["object_recall"]
            if its["chair_s"]:
                found["chair_reduction"] = 1 - own["chair_s"] / its["chair_s"]
        return found

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith("model.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. An export has the student alone: the teacher stays unchanged."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("teacher.")}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)


# ---------------------------------------------------------------------------------------------------------- the teacher


def chat_model_of(learner: Any) -> ChatModel:
    """Return the model of a trained learner, or the model itself. Raises CounterpointError for one that does not answer."""
    found = learner if isinstance(learner, ChatModel) else getattr(learner, "model", None)
    if not isinstance(found, ChatModel):
        raise CounterpointError(
            f"the teacher is a {type(learner).__name__}, which does not answer; name one of the task chats"
        )
    if not getattr(learner, "answers_adapted", True):
        found.model.disable_adapter_layers()
    return found


def tokenizer_of(teacher: Frozen) -> ChatTokenizer:
    """Return the tokenizer of a finished teacher."""
    return chat_model_of(teacher.module).tokenizer


def finished_teacher(name: str, size: int, context: int) -> Frozen:
    """Load a teacher run:RUN, fit:SLUG?... or hf:NAME: a function from ids, mask, pictures and counts to logits.

    Args:
        name: its name.
        size: height and width of the pictures in pixels; 0 without pictures.
        context: number of tokens that it must read.

    Raises CounterpointError for a model that does not answer, takes other pictures, or reads fewer tokens.
    """
    if name.startswith("hf:"):
        tokenizer = chat_tokenizer(name, (), vocabulary=0, size=size)
        return Frozen(ChatModel(name, tokenizer, size=size, context=context), name)
    teacher = frozen(name, chat_model_of)
    model = chat_model_of(teacher.module)
    if model.size != size:
        raise CounterpointError(
            f"the teacher {name} takes pictures of {model.size} pixels, these data have {size} (0: none); use data of its size"
        )
    if model.context < context:
        raise CounterpointError(
            f"the teacher {name} reads {model.context} tokens, fewer than context ({context}); lower --context"
        )
    return teacher


def need_one_vocabulary(student: ChatTokenizer, teacher: ChatTokenizer, model: str, name: str) -> None:
    """Raise CounterpointError unless two tokenizers give every token the same number and write chats alike."""
    own, its = student.fast.get_vocab(), teacher.fast.get_vocab()
    apart = {token for token, _ in own.items() ^ its.items()}
    if apart:
        raise CounterpointError(
            f"the student {model} and the teacher {name} differ in the numbers of {counted(len(apart), 'token')}, such as "
            f"'{min(apart)}'; "
            "name models with one tokenizer"
        )
    if (student.mark, student.fast.chat_template) != (teacher.mark, teacher.fast.chat_template):
        raise CounterpointError(
            f"the student {model} and the teacher {name} write chats or pictures with other tokens; name models with one chat "
            "template and as many tokens of a picture"
        )


# -------------------------------------------------------------------------------------------------------------- chats


def answered(survey: Survey) -> Indices:
    """Return the training chats that answers are learned from: those without a rejected answer, or all where each has one."""
    chats = survey.split("train").chats
    rows = survey.rows
    found = [n for n in rows.tolist() if not chats[n].rejected]
    return np.array(found, np.int64) if found else np.asarray(rows)


def captioned(survey: Survey) -> Indices:
    """Return the training chats whose answer is a caption."""
    chats = survey.split("train").chats
    return np.array([n for n in survey.rows.tolist() if chats[n].kind == "caption"], np.int64)


def preferred(survey: Survey, tokenizer: ChatTokenizer, context: int) -> tuple[Indices, list[str]]:
    """Return the training chats with a better and a worse answer, and what was left out.

    Pairs of equal answers, and worse answers that do not fit the context, are left out and counted. Raises DataError where no
    pair remains.
    """
    chats = survey.split("train").chats
    pairs = [n for n in survey.rows.tolist() if chats[n].rejected]
    differ = [n for n in pairs if chats[n].rejected.split() != chats[n].answer.split()]
    fit = [n for n in differ if sum(map(len, tokenizer.chat(chats[n].worse))) <= context]
    equal, long = len(pairs) - len(differ), len(differ) - len(fit)
    if not pairs:
        raise DataError(
            "no training chat has a rejected answer, so there is nothing to prefer; add a field rejected, as in preferences, or "
            "leave the stage out (--preference-epochs 0)"
        )
    if not fit:
        raise DataError(
            f"of {counted(len(pairs), 'preference pair')} {equal} have two equal answers and {long} a rejected answer longer "
            "than the "
            "context; correct the pairs, or raise --context"
        )
    notes = []
    if equal:
        notes.append(
            f"{equal} of {counted(len(pairs), 'preference pair has', 'preference pairs have')} two equal answers and are left out"
        )
    if long:
        notes.append(
            f"{long} of {counted(len(pairs), 'preference pair has', 'preference pairs have')} a rejected answer longer than the "
            "context and are left out"
        )
    return np.array(fit, np.int64), notes
