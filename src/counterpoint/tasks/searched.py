"""Define students of the task `labelled` whose network a search finds, before a teacher distils it.

Stages of a run:

    search     each step scores one candidate of a search space; nothing trains. Left out where `encoder` names the student
    teacher    as in `tasks.taught`
    student    the network that was found; left out with `epochs` 0

The search is ageing evolution (Real et al. 2019, arXiv 1802.01548), random search, or every member in turn. The history of all
candidates is part of the run: a run continues its search where it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows, global_max
from counterpoint.core.seeds import seed_torch
from counterpoint.data import students
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.spaces import OPERATORS, Member, Space
from counterpoint.engine.loading import Batches, Steps
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks import taught
from counterpoint.tasks.adapted import check_adapters
from counterpoint.tasks.taught import TaughtConfig, TaughtLearner
from counterpoint.views.images import check_recipe
from counterpoint.words import counted

SHOWN = 5  # candidates of the page's table
SEED = 2303_15678  # of a network that no stage trains


@dataclass
class SearchedConfig(TaughtConfig):
    """Settings of the search, of its space and of the distillation of what it finds."""

    epochs: int = 240
    """Passes over the training images by the student; 0: search alone."""
    encoder: str = ""
    """The student. Empty (default): the one that the search finds. Otherwise no search: resnet-s, conv-s, conv-group,
    conv-fine, conv-cells, unet, unet-s, mlp-s, vit-s, resnet-cifar:A-B-C, nas-201:OPERATORS, timm:NAME, torchvision:NAME,
    hf:NAME."""
    teacher_encoder: str = "resnet-cifar:9-9-9"
    """The teacher's encoder, here ResNet-56; with --teacher, the run's encoder replaces it."""
    space: Literal["resnet-cifar", "nas-201"] = "resnet-cifar"
    """Search space: resnet-cifar, blocks in three stages; nas-201, cells of six edges with one of five operators each."""
    choices: tuple[int, ...] = ()
    """Choices at each place. Default: 1 3 5 7 blocks; operators 0 to 4 (none, skip, conv 1x1, conv 3x3, average 3x3)."""
    width: int = 16
    """Channels of a candidate's first stage; the last map has four times as many."""
    cells: int = 5
    """Cells in a stage of nas-201."""
    flops_limit: float = 0.0
    """Maximum multiply-adds of a candidate's encoder for one picture, in millions; 0: no limit."""
    search: Literal["evolution", "random", "all"] = "evolution"
    """evolution: ageing evolution. random: members at random, each once. all: every member in turn."""
    candidates: int = 1000
    """Budget: candidates to score, repeated ones included. The search also ends when every member is scored."""
    seconds: float = 0.0
    """Budget in seconds of scoring; 0: `candidates` alone. Only a budget in candidates repeats exactly."""
    population: int = 36
    """Candidates that live; the first are drawn at random, all different."""
    sample: int = 8
    """Candidates drawn from the population, with replacement, at each step."""
    parents: int = 5
    """Number of the best of the drawn candidates, of which one at random is the parent."""
    crossover: float = 0.0
    """Probability that a child mixes the places of two parents instead of changing one place; an option of this library."""

    adapts: ClassVar[bool] = False  # the student is found by a search
    counts: ClassVar[tuple[str, ...]] = (
        *(name for name in TaughtConfig.counts if name != "epochs"),
        *("candidates", "population", "sample", "parents"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choices = tuple(self.choices)
        self.need_share("crossover")
        self.need_weight("epochs", "flops_limit", "seconds")
        if self.encoder and not self.epochs:
            raise CounterpointError("epochs 0 is a search alone, and encoder names the student: leave out one of them")
        self.searched()

    def searched(self) -> Space:
        """Return the search space."""
        return Space(self.space, self.choices, self.width, self.cells)

    def check(self) -> None:
        for name in filter(None, (self.encoder, self.teacher_encoder)):
            check_image_encoder(name)
        check_recipe(self.recipe)
        check_adapters(self)
        self.check_batch()


# Settings for a small set of small pictures on a few cores, which replace the paper's.
RECIPE: dict[str, Any] = taught.LAPTOP | {
    "encoder": "",
    "teacher_encoder": "resnet-cifar:9-9-9?width=8",
    "width": 8,
}


def propose(
    history: Sequence[tuple[Member, float]],
    space: Space,
    within: Sequence[Member],
    config: Any,
    rng: np.random.Generator,
) -> tuple[Member, Member | None]:
    """Choose the next candidate: one of the first population, or a changed parent. Return it and its parent.

    Args:
        history: candidates and their scores, the oldest first.
        space: the search space.
        within: its members within the limits, of which at least one is not in the history.
        config: `search`, `population`, `sample`, `parents` and `crossover`.
        rng: the source of randomness.
    """
    tried = {member for member, _ in history}
    new = [member for member in within if member not in tried]
    if config.search == "all":
        return new[0], None
    if config.search == "random" or len(history) < min(config.population, len(within)):
        return new[int(rng.integers(len(new)))], None
    alive = history[-config.population :]

    def parent() -> Member:
        drawn = [alive[int(n)] for n in rng.integers(len(alive), size=config.sample)]
        best = sorted(drawn, key=lambda one: -one[1])[: config.parents]
        return best[int(rng.integers(len(best)))][0]

    one, allowed = parent(), set(within)
    if config.crossover and rng.random() < config.crossover:
        pair = np.array([one, parent()])
        child = tuple(int(n) for n in pair[rng.integers(2, size=len(one)), np.arange(len(one))])
        if child in allowed:
            return child, one
    near = [member for member in space.neighbours(one) if member in allowed] or list(within)
    return near[int(rng.integers(len(near)))], one


class SearchedLearner(TaughtLearner):
    """A search that trains nothing, then a teacher and the student that was found. Subclasses write `score`.

    Attributes:
        space: the search space.
        within: its members with at most `flops_limit` multiply-adds.
        costs: multiply-adds and parameters of each member.
        history: one dict for each candidate: member, parent, and what `score` returned.
        student: name of the student's encoder; "" while it is not found.
    """

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        self.space, self.student, self.spent = config.searched(), config.encoder, 0.0
        self.history: list[dict[str, Any]] = []
        super().__init__(config, data, seed)
        self.facts = data
        if config.encoder:
            return
        self.costs = self.space.costs(data.size, data.channels)
        limit = config.flops_limit * 1e6 or math.inf
        self.within = [member for member, (flops, _) in self.costs.items() if flops <= limit]
        if not self.within:
            least = min(flops for flops, _ in self.costs.values()) / 1e6
            raise CounterpointError(
                f"flops_limit {config.flops_limit:g}: no candidate has so few multiply-adds; raise it above {least:.3g} million"
            )
        if len(self.within) == 1:
            name = self.space.name(self.within[0])
            raise CounterpointError(
                f"the search space has one member, {name}: there is nothing to search. Name more --choices, raise "
                f"--flops-limit, or distil it without a search: --encoder '{name}'"
            )

    def build_encoder(self, data: Any) -> ImageEncoder:
        # Before the search, any member holds the place of the student.
        name = self.student or self.space.name(self.space.members()[0])
        return build_image_encoder(name, data.size, channels=data.channels, pretrained=self.config.pretrained)

    def score(self, member: Member) -> dict[str, float]:
        """Return the "score" of a member, higher is better, and other numbers to keep beside it."""
        raise NotImplementedError

    # --- the search

    def stages(self) -> list[Stage]:
        later = super().stages() if self.config.epochs else []
        if self.config.encoder:
            return later
        if later:
            later[-1].enter = lambda survey: None if self.student else self.adopt(self.best())
        turns = [Turn([], loss=self.search, minimise="distance")]
        return [Stage("search", 1, turns=lambda: turns, batches=self._steps, evaluated=not later, learns=False), *later]

    def _steps(self, survey: Survey) -> Batches:
        once = self.config.search != "evolution"  # each member once
        return Steps(min(self.config.candidates, len(self.within)) if once else self.config.candidates)

    @property
    def at_search(self) -> bool:
        """Whether the current stage searches."""
        return self.survey is not None and not self.config.encoder and self.position.stage == 0

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.at_search:
            return {"draw": int(torch.randint(2**62, (), generator=generator))}
        return super().prepare(batch, generator)

    def search(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Choose a candidate and score it, unless the budget is spent. A member that was scored before keeps its score."""
        config, known = self.config, {tuple(one["member"]): one for one in self.history}
        late = bool(config.seconds) and bool(global_max(int(self.spent >= config.seconds), self.device))
        # A run that starts from another one's weights keeps the student that was found there.
        if not self.student and len(known) < len(self.within) and not (late and self.history):
            history = [(tuple(one["member"]), float(one["score"])) for one in self.history]
            rng = np.random.default_rng(batch["draw"])
            member, parent = propose(history, self.space, self.within, config, rng)
            started = time.monotonic()
            found = known[member] if member in known else self._agreed(self.score(member))
            self.spent += time.monotonic() - started
            self.history.append(found | {"member": list(member), "parent": None if parent is None else list(parent)})
        return {"distance": torch.tensor(-float(self.history[-1]["score"]))}

    def _agreed(self, found: dict[str, float]) -> dict[str, float]:
        """Return numbers that are equal on all processes, to the last bit."""
        values = torch.tensor([list(found.values())], device=self.device)
        return dict(zip(found, gather_rows(values).mean(0).tolist(), strict=True))

    def best(self) -> str:
        """Return the name of the candidate with the highest score, the first of equals."""
        return self.space.name(tuple(max(self.history, key=lambda one: float(one["score"]))["member"]))

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if self.at_search and not self.config.epochs and not self.student:
            with torch.random.fork_rng(devices=[]):
                seed_torch(SEED)
                self.adopt(self.best())

    def adopt(self, name: str) -> None:
        """Replace the student's network by a new one of this name."""
        self.student = name
        self.encoder = self.build_encoder(self.facts).to(self.device)
        self.classifier = nn.Linear(self.encoder.dim, self.facts.classes).to(self.device)

    def structure(self) -> dict[str, Any]:
        if not self.history:
            return {}
        return {"history": self.history, "spent": self.spent} | ({"encoder": self.student} if self.student else {})

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.history, self.spent = list(structure.get("history", [])), float(structure.get("spent", 0.0))
        if structure.get("encoder"):
            self.adopt(str(structure["encoder"]))

    # --- what is measured and shown

    def sizes(self) -> tuple[int, int] | None:
        return super().sizes() if self.student else None

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure rank correlations of scores with published accuracies, where the search scored that whole space."""
        scores = {tuple(one["member"]): float(one["score"]) for one in self.history}
        if self.space != Space("resnet-cifar") or len(scores) != len(students.DEPTHS):
            return {}
        ranked = [scores[depths] for depths in students.DEPTHS]
        found = {
            "kendall": stats.kendalltau(ranked, students.DISTILLED),
            "spearman": stats.spearmanr(ranked, students.DISTILLED),
            "pearson": stats.pearsonr(ranked, students.DISTILLED),
            "kendall_plain": stats.kendalltau(ranked, students.PLAIN),
        }
        return {name: float(value.statistic) for name, value in found.items()}

    def figures(self, survey: Survey) -> dict[str, Any]:
        if not self.history or self.config.encoder:
            return super().figures(survey)
        scores = [float(one["score"]) for one in self.history]
        best = [*np.maximum.accumulate(scores).tolist()]
        count = list(range(1, len(scores) + 1))
        ranked = list(
            {tuple(one["member"]): one for one in sorted(self.history, key=lambda one: -one["score"])}.values()
        )
        place = {tuple(one["member"]): [self.costs[tuple(one["member"])][1] / 1e6, one["score"]] for one in ranked}
        found = tuple(ranked[0]["member"])
        rows = []
        for one in ranked[:SHOWN]:
            flops, parameters = self.costs[tuple(one["member"])]
            distances = [round(float(one[key]), 5) if key in one else "" for key in ("score", "relation", "semantic")]
            sizes = [f"{number / 1e6:.3g}" for number in (flops, parameters)]
            rows.append([self._said(one["member"]), *distances, *sizes])
        drawn: dict[str, Any] = {
            "Scores in the order of the search": {
                "kind": "curves",
                "series": {"candidate": [count, scores], "best so far": [count, best]},
                "xlabel": "candidate",
                "caption": f"{counted(len(scores), 'candidate')}, {len(ranked)} of {counted(len(self.within), 'member')}, "
                           f"{self.spent:.1f} s.",
            },
            "Candidates by size and score": {
                "kind": "points",
                "points": {
                    "candidates": [at for member, at in place.items() if member != found], "found": [place[found]]
                },
                "axes": ["million parameters", "score"],
                "caption": f"The student is {self.space.name(found)}.",
            },
            "Best candidates": {
                "kind": "table",
                "columns": ["member", "score", "D_rel", "D_sem", "million multiply-adds", "million parameters"],
                "rows": rows,
            },
        }  # fmt: skip
        if self.measures(survey, "test"):
            of = dict(zip(students.DEPTHS, students.DISTILLED, strict=True))
            drawn["Scores and published accuracy"] = {
                "kind": "points",
                "points": {"students": [[of[tuple(one["member"])], one["score"]] for one in ranked]},
                "axes": ["accuracy of the distilled student on CIFAR-100, %", "score"],
                "caption": "Accuracies are published ones (counterpoint.data.students); scores are this run's.",
            }
        return super().figures(survey) | drawn

    def _said(self, member: Sequence[int]) -> str:
        if self.space.kind == "resnet-cifar":
            return "-".join(map(str, member))
        return ", ".join(OPERATORS[number] for number in member)
