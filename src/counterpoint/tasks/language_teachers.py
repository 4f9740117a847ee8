"""Define students of the task `tokens`, which learn from a language model that does not learn with them.

Sources of the teacher:

    --teacher KIND      train it first, in the same run, for `teacher_epochs` epochs on the texts with clips; the system names kinds
    --teacher run:RUN   the language model of a finished run
    --teacher hf:NAME   a text model of transformers
    --teacher none      no teacher

A finished teacher brings its tokenizer, and the student reads with it. The teacher runs in evaluation mode and without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.data.tokens import TokenData
from counterpoint.encoders.text import Tokenizer, build_text_encoder, build_tokenizer, check_text_encoder
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, frozen, parameters
from counterpoint.errors import CounterpointError, DataError, RunError, unknown
from counterpoint.tasks.tokens import TEXT, LanguageModel, PairBatches, TokensConfig, TokensLearner, outputs


@dataclass
class LanguageTeacherConfig(TokensConfig):
    """Settings of every student of a language model."""

    teacher: str = "none"
    """The teacher: none, run:RUN, hf:NAME, or a kind that is trained first."""
    teacher_encoder: str = ""
    """Language model of a teacher that is trained here. Default: the student's."""
    teacher_epochs: int = 20
    """Passes of such a teacher over the texts with clips."""
    teacher_lr: float = 1e-4
    """Learning rate of such a teacher at a batch of 256."""

    distils: ClassVar[bool] = False  # by name: `counterpoint distill` is for students of pictures
    trained: ClassVar[tuple[str, ...]] = ()  # kinds of teachers that are trained in the run
    counts: ClassVar[tuple[str, ...]] = (*TokensConfig.counts, "teacher_epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("teacher_lr")
        kind, _, rest = self.teacher.partition(":")
        if self.teacher not in (*self.trained, "none") and not (kind in ("run", "hf") and rest):
            raise unknown("teacher", self.teacher, [*self.trained, "none", "run:RUN", "hf:NAME"])
        if not self.taught and not self.mask_probability:
            raise CounterpointError("mask_probability is 0 and teacher is none: raise it or name a teacher")

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher != "none"

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher trains in this run."""
        return self.teacher in self.trained

    def check(self) -> None:
        super().check()
        if self.teacher_encoder:
            check_text_encoder(self.teacher_encoder)
        if self.teacher.startswith("hf:"):
            check_text_encoder(self.teacher)

    def tokenizer(self, data: TokenData) -> Tokenizer:
        kind, _, rest = self.teacher.partition(":")
        if kind == "run":
            run = Run.open(rest)
            if run.config.get("task") != "tokens":
                raise RunError(
                    f"{rest} is no run of a language model and cannot teach one; name a run of the task tokens"
                )
            return Tokenizer.from_json(run.facts()["tokenizers"][TEXT])
        return build_tokenizer(self.teacher) if kind == "hf" else super().tokenizer(data)

    def facts(self, data: TokenData, tokenizer: Tokenizer) -> dict[str, Any]:
        if self.trains_teacher and data.grounded is None:
            raise DataError(
                f"{data.name} has no texts with clips, on which the teacher learns; add some (?videos=items.csv), or name another "
                "teacher (--teacher none, run:RUN or hf:NAME)"
            )
        if self.teacher == "video" and data.grounded is not None and len(data.grounded) < 2:
            raise DataError(f"{data.name} has one text with a clip; the hinge compares two, so add another one")
        found = super().facts(data, tokenizer)
        if not self.taught or self.trains_teacher:
            return found
        teacher = finished(self.teacher)
        network: Any = teacher.module
        length = network.length if self.teacher.startswith("hf:") else _model_of(network).encoder.length
        if length < self.context:
            raise CounterpointError(
                f"the teacher {self.teacher} reads {length} tokens, fewer than context ({self.context}); lower --context"
            )
        return found | {"teacher_widths": {self.teacher: teacher.width}}


class LanguageTeacherLearner(TokensLearner):
    """A student and its teacher. Subclasses write `teacher_loss` and `student_loss`, and add parts to what each trains.

    Attributes:
        teacher: The teacher, if it trains in this run.
        teacher_dim: Width of the teacher's states; the student's without a teacher.
    """

    config: Any
    instructor: Frozen | None = None

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.texts, self.pairs = data.examples, data.pairs
        self.teacher: LanguageModel | None = None
        self.teacher_dim = self.model.dim
        if config.trains_teacher:
            self.teacher = LanguageModel(config, config.teacher_encoder or config.encoder, data.vocabulary)
            self.teacher_dim = self.teacher.dim
        elif config.taught:
            # A run that continues another one may have another teacher than its facts know.
            known = getattr(data, "teacher_widths", {}).get(config.teacher)
            self.teacher_dim = known or self._finished().width or self.teacher_dim

    def teacher_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return named scalars of a batch of texts with clips, for the teacher."""
        raise NotImplementedError

    def student_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return named scalars of a batch of texts, for the student."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.teacher_loss(batch) if self.at_teacher else self.student_loss(batch)

    def _finished(self) -> Frozen:
        """Load a teacher that was trained elsewhere, once. A finished run does without it."""
        if self.instructor is None:
            self.instructor = finished(self.config.teacher)
        return self.instructor

    @torch.no_grad()
    def instruct(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n tokens dim"]:
        """Compute the teacher's states, in evaluation mode."""
        found: Tensor = (self._finished() if self.teacher is None else self.teacher.eval())(ids, mask)
        return found

    def sizes(self) -> tuple[int, int] | None:
        if not self.config.taught:
            return None
        return parameters(self.model), parameters(self._finished().module if self.teacher is None else self.teacher)

    # --- stages

    @property
    def at_teacher(self) -> bool:
        """Whether the current stage trains the teacher."""
        return bool(self.config.trains_teacher) and self.survey is not None and self.position.stage == 0

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.taught and self.teacher is None:
            self._finished().to(self.device)

    def stages(self) -> list[Stage]:
        student = Stage("student", self.config.epochs, trains=self.of_student)
        if self.teacher is None:
            return [student]

        def batches(survey: Survey) -> PairBatches:
            return PairBatches(self.texts, self.pairs, self.config.batch_size)

        teacher = Stage("teacher", self.config.teacher_epochs, self.of_teacher, self._teacher_turns, batches)
        return [teacher, student]

    def of_teacher(self) -> list[nn.Module]:
        """Return the modules that the teacher's stage trains."""
        return [] if self.teacher is None else [self.teacher]

    def of_student(self) -> list[nn.Module]:
        """Return the modules that the student's stage trains."""
        return [self.model]

    def turns(self) -> list[Turn]:
        return [self.turn(self.of_student(), self.config)]

    def _teacher_turns(self) -> list[Turn]:
        return [self.turn(self.of_teacher(), replace(self.config, lr=self.config.teacher_lr))]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        model = self.teacher if self.at_teacher and self.teacher is not None else self.model
        return [(model.encoder, "tokens")]

    # --- evaluation and saving

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        # While the teacher trains, the student has no outputs. A finished run has no teacher any more.
        found = {} if self.at_teacher else super().predict(batch)
        if self.teacher is not None and self.survey is not None:
            found |= outputs(self.teacher, batch, "teacher_")
        return found

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith("model.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. An export has the student alone: the other parts stay unchanged."""
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)


def finished(name: str) -> Frozen:
    """Load a teacher run:RUN or hf:NAME: a function from numbers and mask to states."""
    if name.startswith("run:"):
        teacher = frozen(name, _model_of)
        teacher.width = int(_model_of(teacher.module).dim)
        return teacher
    encoder: Any = build_text_encoder(name)
    return Frozen(encoder, name, encoder.tokens, encoder.dim)


def _model_of(learner: nn.Module) -> Any:
    """Return the language model of a trained learner."""
    return learner.model
