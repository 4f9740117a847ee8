"""Define students that score pairs of items, and learn from a deeper scorer, their teacher. Both share the encoders, frozen.

Sources of the teacher:

    default                    train it first, in the same run: stage `teacher`, then stage `student`
    --teacher run:RUN, fit:    the scorer of a finished run; its encoders become the student's
    --teacher none             train a scorer alone, by cross-entropy among random captions
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import wide
from counterpoint.encoders.pair_scorers import PairScorer, copy_layers
from counterpoint.engine.optim import on_lines
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, frozen, parameters
from counterpoint.errors import CounterpointError
from counterpoint.tasks.pair_figures import pair_figures
from counterpoint.tasks.pair_scorers import PairConfig, PairLearner, Score, Side

# Settings that decide the shapes of the shared encoders.
SHARED = (
    "fusion", "embedding", "heads", "context", "image_encoder", "text_encoder", "audio_encoder", "vector_encoder",
)  # fmt: skip

# Small networks for small pictures and captions, from random weights.
SMALL: dict[str, Any] = {
    "image_encoder": "vit-s",
    "pretrained": False,
    "embedding": 64,
    "heads": 4,
    "fusion_layers": 4,
    "student_layers": (0, 3),
    "dropout": 0.0,
    "candidates": 16,
    "teacher_candidates": 8,
    "batch_size": 64,
    "epochs": 10,
    "teacher_epochs": 20,
    "lr": 4e-3,
    "teacher_lr": 4e-3,
    "fusion_lr": 1.0,
    "weight_decay": 0.01,
    "warmup_epochs": 0,
    "retrieved": 200,
    "evaluate_every": 10,
}


@dataclass
class TaughtScorerConfig(PairConfig):
    """Settings of every student. Rates are at a batch of 256."""

    fusion_lr: float = 5.0
    """Factor of the learning rate of the scorer's layers and poolers, > 0."""
    warmup: float = 0.1
    """Share of a stage's steps over which the learning rate rises; then it falls to 0 on a line. 0 to 1, 1 not included."""
    teacher: str = ""
    """run:RUN or fit:SLUG?data=SOURCE&...: a finished scorer. none: train a scorer of `fusion_layers` by cross-entropy, without
    a teacher. Default: train the teacher first, in this run."""
    teacher_epochs: int = 10
    """Passes over the training items in stage `teacher`, which trains the encoders and the teacher's scorer; at least 0."""
    teacher_candidates: int = 16
    """Captions for each picture in stage `teacher`, its own included; at least 2."""
    teacher_lr: float = 5e-6 * 256 / 512
    """Learning rate of stage `teacher` at a batch of 256, > 0."""
    student_layers: tuple[int, ...] = (0, 3, 5)
    """Layers of the teacher's scorer that the student starts from, counted from 0; it has as many layers."""
    from_teacher: bool = True
    """Start the student's scorer from the teacher's weights. Off: from random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student_layers = tuple(self.student_layers)
        self.need_positive("fusion_lr", "teacher_lr")
        self.need_below_one("warmup")
        for name, least in (("teacher_epochs", 0), ("teacher_candidates", 2)):
            if getattr(self, name) < least:
                raise CounterpointError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.teacher not in ("", "none") and not self.teacher.startswith(("run:", "fit:")):
            raise CounterpointError(f"teacher must be run:RUN, fit:SLUG?..., none, or left out, got '{self.teacher}'")
        # Another run's layers are counted when it is opened.
        last = math.inf if self.teacher else self.fusion_layers - 1
        if not self.student_layers or not all(0 <= number <= last for number in self.student_layers):
            known = "0 or more" if self.teacher else f"0 to {last}"
            raise CounterpointError(
                f"student_layers must name layers of the teacher, {known}, got {list(self.student_layers)}"
            )


class TaughtScorerLearner(PairLearner):
    """Unimodal encoders, the student's scorer, and the teacher's, of this run or of another. Subclasses write `lesson`.

    Attributes:
        teacher: the scorer that this run trains; None where the teacher is another run's.
        student: the student's scorer or, without a teacher, the only one.
        master: another run's learner, during a fit; it calls that run's scorer.
    """

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = None if config.teacher else self.scorer(config.fusion_layers)
        self.student = self.scorer(config.fusion_layers if self.alone else len(config.student_layers))
        self.master: Frozen | None = None

    def lesson(self, image: Side, text: Side, at: Int[Tensor, "n candidates"]) -> dict[str, Tensor]:
        """Return the student's loss on pictures and the captions that `at` counts, the own one first."""
        raise NotImplementedError

    def shown(self, scores: Float[Tensor, "n candidates"]) -> Int[Tensor, "n kept"]:
        """Select the captions of the page's gallery by the teacher's scores, the own caption first."""
        raise NotImplementedError

    # --- which scorer learns, and from whom

    @property
    def alone(self) -> bool:
        """Whether a scorer is trained without a teacher."""
        return bool(self.config.teacher == "none")

    @property
    def teaching(self) -> bool:
        """Whether the current stage trains the teacher."""
        return self.survey is not None and len(self.stages()) == 2 and self.position.stage == 0

    @property
    def candidates(self) -> int:
        return int(self.config.teacher_candidates if self.teaching or self.alone else self.config.candidates)

    @property
    def instructing(self) -> PairScorer | None:
        """The teacher's scorer, of this run or of another one; None while there is none."""
        found: Any = self.teacher if self.master is None else self.master.module.student
        return found

    @property
    def taught(self) -> Score:
        """The teacher's scorer, in evaluation mode."""
        return cast(Score, self.master if self.teacher is None else self.teacher.eval())

    def sizes(self) -> tuple[int, int] | None:
        return None if self.instructing is None else (parameters(self.student), parameters(self.instructing))

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        name, own = self.config.teacher, type(self)
        if not name or self.alone:
            return
        self.master = frozen(name, call=lambda found: found.student if isinstance(found, own) else found)
        module: Any = self.master.module
        if not isinstance(module, own):
            raise CounterpointError(f"the teacher {name} is no run of {self.slug}, whose scorers of pairs can teach")
        for setting in SHARED:
            mine, its = getattr(self.config, setting), getattr(module.config, setting)
            if mine != its:
                raise CounterpointError(
                    f"the teacher {name} has {setting} {its}, this student {mine}: both share the encoders; use "
                    f"--{setting.replace('_', '-')} {its}"
                )
        if module.facts.modalities != self.facts.modalities or module.facts.tokenizers != self.facts.tokenizers:
            raise CounterpointError(
                f"the teacher {name} was trained on other modalities, sizes or tokens than this data has: train it on the "
                "same captions, or choose a published text encoder"
            )
        if self.config.from_teacher:  # a wrong layer raises before the first step
            copy_layers(self.student, module.student, self.config.student_layers)

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        if self.alone:
            return [Stage("train", config.epochs)]
        student = Stage("student", config.epochs, lambda: [self.student], enter=self.start)
        if self.teacher is None or not config.teacher_epochs:
            return [student]
        teacher = self.teacher
        modules = [self.encoders, self.heads, self.types, teacher]
        return [Stage("teacher", config.teacher_epochs, lambda: modules, turns=lambda: [self._turn(teacher)]), student]

    def start(self, survey: Survey) -> None:
        """Copy the teacher's encoders and the chosen layers of its scorer."""
        if self.master is not None:
            source: Any = self.master.module
            for name in ("encoders", "heads", "types"):
                getattr(self, name).load_state_dict(getattr(source, name).state_dict())
        if self.config.from_teacher:
            copy_layers(self.student, cast(PairScorer, self.instructing), self.config.student_layers)

    def turns(self) -> list[Turn]:
        return [self._turn(self.student)]

    def _turn(self, scorer: Any) -> Turn:
        """Return one update of the scorer's layers, at their own rate, and of all other parameters of the stage."""
        config, steps, epochs = self.config, self.steps_per_epoch, self.epochs
        config = replace(config, lr=config.teacher_lr) if self.teaching else config
        rest = [scorer.head, *([self.encoders, self.heads, self.types] if self.teaching or self.alone else [])]
        found = [
            on_lines(config, modules, epochs, steps, rate=rate)
            for modules, rate in ((rest, 1.0), (scorer.below_head(), config.fusion_lr))
        ]
        return Turn(
            [one for turn in found for one in turn.optimizers], [one for turn in found for one in turn.schedules]
        )

    def row_wise(self) -> list[tuple[Any, str]]:
        if self.teaching or self.alone:
            return [*super().row_wise(), (self.teacher if self.teaching else self.student, "forward")]
        return [(self.student, "forward")]

    # --- a step

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "candidates" not in batch:
            batch = batch | self.drawn(batch, self.candidates, np.random.default_rng(self.position.step))
        rows = self.both(batch)
        at = batch["candidates"][rows]
        if self.teaching or self.alone:
            scorer = self.student if self.alone else cast(PairScorer, self.teacher).train()
            sides = self.pictures(batch, rows), self.side(self.text, batch["pool"])
            return {"loss": own_cross_entropy(self.scores(scorer, *sides, at))}
        self.encoders.eval()
        with torch.no_grad():
            sides = self.pictures(batch, rows), self.side(self.text, batch["pool"])
        return self.lesson(*sides, at)

    # --- what it learned

    def evaluated(self) -> dict[str, tuple[Score, bool]]:
        if self.teaching:
            return {"teacher_": (cast(Score, self.teacher), True)}
        known = not self.alone and self.instructing is not None
        return {"": (cast(Score, self.student), True)} | ({"teacher_": (self.taught, False)} if known else {})

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show the captions that the teacher finds hardest, and compare student and teacher."""
        if self.alone or self.instructing is None:
            return {}
        networks: Mapping[str, PairScorer] = {"teacher": self.instructing, "student": self.student}
        return pair_figures(self, survey, networks, self.shown)


def own_cross_entropy(scores: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy of the own caption, column 0, over the batch of all processes."""
    return global_mean(-wide(scores).log_softmax(1)[:, 0])
