"""Define the task `demonstrations`: answer a query after demonstrations of its task. The splits have different tasks.

A training batch:

    batch["ids"]       [B, L] token numbers of the demonstrations, one after another, padded on the left
    batch["mask"]      [B, L] True at tokens, False at padding
    batch["query"]     the query with its answer, a `Query` [B, ...] padded on the right
    batch["cut"]       [B] number of demonstrations that were shortened or left out for lack of room
    batch["index"]     [B] positions: first the queries, then the plain texts, then the queries again, with others after them

A plain text is cut in two: its first part takes the place of the demonstrations, the rest that of the query, all of it an answer.

An evaluation batch also has "other", a pair (ids, mask) of demonstrations of another task. "candidates" is a `Query` [B * C, ...],
each query with each of its candidate answers. "there" [B, C] is True at the candidates that a query has. "ends" [B, K] counts the
tokens up to the end of each demonstration. A learner's `predict` returns "scores" [B, C], and "NAME_scores" of other methods.

Demonstrations are drawn anew in each epoch of training, and once for the evaluation. The query is never among them, and is never
cut. Where demonstrations exceed the room, one loses the beginning of its input, and the further ones are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.answers import masked_lm_loss
from counterpoint.core.masking import IGNORED
from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import processes
from counterpoint.data.demonstrations import DemonstrationData, DemonstrationSplit, Example
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import padded
from counterpoint.encoders.context_models import ContextModel, Query, check_context_model, decoder_start
from counterpoint.encoders.text import Tokenizer, build_tokenizer, train_bpe
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position, RowBatches
from counterpoint.engine.optim import OptimConfig, on_lines
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.tasks.measures.candidates import CandidateEvaluator
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

SHOWN = 8  # batches of the figure
AT_ONCE = 32  # queries in a batch of the evaluation
DRAWN = 2403_06914  # part of the seed of the evaluation's demonstrations


@dataclass
class DemonstrationsConfig(OptimConfig):
    """Settings of every learner from demonstrations."""

    epochs: int = 20
    """Passes over the training queries."""
    batch_size: int = 8
    """Queries in a batch, over all processes together."""
    model: str = "gpt2-s"
    """The model that answers: gpt2-W-D-H, llama-W-D-H, qwen2-W-D-H, t5-W-D-H (width, layers, heads), hf:NAME, or run:RUN."""
    model_epochs: int = 20
    """Passes of a model that is built here over the training queries, with demonstrations before them."""
    model_queries: int = 1
    """Maximum number of queries of a task that such a model answers one after another, within the context. An encoder-decoder
    model answers the first alone."""
    model_lr: float = 3e-3
    """Learning rate of such a model at a batch of 256."""
    vocabulary: int = 2000
    """Maximum number of tokens that a model built here learns from the training examples."""
    context: int = 1024
    """Maximum number of tokens of demonstrations and query together."""
    demonstrations: int = 16
    """Number of demonstrations of a query; 0 for none."""
    example_tokens: int = 256
    """Maximum number of tokens of a demonstration; the beginning of its input is cut, its output stays."""
    separator: str = " "
    """Text before each input and each output."""
    beta: float = 0.8
    """Share of a plain text's tokens that take the place of demonstrations."""
    dropout: float = 0.0
    """Dropout probability in models that are built here."""
    warmup: float = 0.0
    """Share of a stage's steps over which the learning rate rises; then it falls to 0 on a line."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = (
        *("batch_size", "vocabulary", "context", "example_tokens", "model_queries", "evaluate_every"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("dropout", "warmup", "beta")
        self.need_positive("model_lr")
        for name in ("dropout", "warmup", "beta"):
            if getattr(self, name) == 1.0:
                raise CounterpointError(f"{name} must be below 1, got 1.0")
        self.need_count(*self.counts)
        if min(self.epochs, self.model_epochs, self.demonstrations) < 0:
            raise CounterpointError(
                f"epochs, model_epochs and demonstrations must be at least 0, got {self.epochs}, {self.model_epochs} and "
                f"{self.demonstrations}"
            )

    @property
    def trains_model(self) -> bool:
        """Whether the model is built here, and so trains in the run."""
        return not self.model.startswith(("run:", "hf:"))

    @property
    def reads_texts(self) -> bool:
        """Whether a stage learns from plain texts."""
        return False

    @property
    def room(self) -> int:
        """Maximum number of tokens of the demonstrations alone."""
        return self.context

    @property
    def before(self) -> int:
        """Number of positions that a query needs before it besides those of its demonstrations."""
        return 0

    def check(self) -> None:
        """Raise CounterpointError for an unknown model. Runs before data are read."""
        if self.model.startswith("run:"):
            finished_model(self.model)
            return
        check_context_model(self.model)
        if self.trains_model and not self.model_epochs:
            raise CounterpointError(
                f"{self.model} has random weights, and model_epochs is 0; raise it, or name a finished model: run:RUN or hf:NAME"
            )

    def facts(self, data: DemonstrationData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        if self.model.startswith("run:"):
            theirs = finished_model(self.model).facts()
            return data.spec | {name: theirs[name] for name in ("built", "tokenizer", "start")}
        if self.model.startswith("hf:"):
            tokenizer = build_tokenizer(self.model)
        else:
            texts = [text for one in data.train.examples for text in (one.input, one.output, *one.options)]
            tokenizer = train_bpe([*texts, *data.texts], self.vocabulary, lowercase=False)
        start = decoder_start(self.model, tokenizer)
        return data.spec | {"built": self.model, "tokenizer": tokenizer.to_json(), "start": start}


def finished_model(name: str) -> Run:
    """Open the run that `run:RUN` names. RunError where it is not finished, or is of another task."""
    run = Run.finished(name.removeprefix("run:"))
    if run.config.get("task") != DemonstrationsTask.name:
        raise RunError(
            f"{run.path} is a run of the task {run.config.get('task')}, whose model reads none; name one of demonstrations"
        )
    return run


# ---------------------------------------------------------------------------------------------------------- the learner


class DemonstrationLearner(Learner):
    """A model that answers queries after demonstrations. Subclasses add stages, a loss and scores.

    Attributes:
        model: The model that answers.
        reads: What it reads in place of the demonstrations, for the figure.
    """

    config: Any
    reads = "its own context"

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        seed_torch(seed)
        self.config = config
        self.tokenizer = Tokenizer.from_json(data.tokenizer)
        self.texts = getattr(data, "plain_texts", 0)
        self.model = ContextModel(data.built, self.tokenizer, self.positions, config.dropout)

    @property
    def positions(self) -> int:
        """Number of positions that the model needs."""
        return int(self.config.context)

    def begin(self, survey: Survey) -> None:
        """Take the weights of the run that `model` names. DataError without texts that a stage learns from."""
        config = self.config
        if config.reads_texts and not len(survey.text_rows):
            raise DataError(
                "the first stage learns from plain texts that can be cut in two, and these data have none; add some "
                "(?texts=FILE), or set --pretrain-epochs 0"
            )
        if not config.model.startswith("run:"):
            return
        run = finished_model(self.config.model)
        weights = {k.removeprefix("model."): v for k, v in run.load_weights().items() if k.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"{run.path}: its weights do not fit: {str(error)[:200]}") from error

    def full(self, batch: dict[str, Any], query: Query | None = None, each: int = 1) -> Tensor:
        """Compute the logits of queries after all demonstrations.

        Args:
            batch: the batch.
            query: queries. Default: the batch's.
            each: number of queries for each row of the batch.
        """
        rows = self.model.embed(batch["ids"]).repeat_interleave(each, 0)
        found: Tensor = self.model(rows, batch["mask"].repeat_interleave(each, 0), query or batch["query"])
        return found

    def model_loss(self, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of a model that is built here: of the answers after all demonstrations."""
        query: Query = batch["query"]
        return masked_lm_loss(self.full(batch), torch.where(query.answer, query.ids, IGNORED))

    def model_stage(self) -> Stage:
        """Return the stage of a model that is built here."""
        config = self.config
        changed = replace(config, lr=config.model_lr)

        def batches(survey: Survey) -> Batches:
            return RowBatches(survey.examples + self.texts + survey.rows, config.batch_size)

        return Stage(
            "model", config.model_epochs, lambda: [self.model], lambda: [self.turn([self.model], changed)], batches
        )

    def turn(self, modules: Sequence[nn.Module], config: Any) -> Turn:
        """Return a turn over these modules, whose rate rises and falls on lines."""
        return on_lines(config, modules, self.epochs, self.steps_per_epoch)

    def scores(self, batch: dict[str, Any], method: str = "") -> Tensor:
        """Return the scores [n, candidates] of a batch's candidates. "full": after all demonstrations."""
        raise NotImplementedError

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the accuracy by the number of demonstrations, of the learner's own method and of all demonstrations."""
        most = self.config.demonstrations
        counts = sorted({0, most, *(2**n for n in range(10) if 2**n < most)})
        series: dict[str, list[list[float]]] = {name: [[], []] for name in (self.reads, "all demonstrations")}
        for count in counts:
            for name, method in zip(series, ("", "full"), strict=True):
                evaluator = survey.evaluator("test")
                for rows in survey.in_batches("test")[:SHOWN]:
                    batch = first(survey.batch("test", rows), count)
                    evaluator.choose("", rows.tolist(), self.scores(batch, method).detach())
                series[name][0].append(count)
                series[name][1].append(round(evaluator.compute()["accuracy"], 4))
        caption = f"Accuracy on test tasks by the number of demonstrations. The model reads {self.reads}, or the demonstrations."
        figure = {"kind": "curves", "series": series, "xlabel": "demonstrations", "caption": caption}
        return super().figures(survey) | {"Accuracy by demonstrations": figure}


# ------------------------------------------------------------------------------------------------------------- the task


def fitted(examples: Sequence[tuple[list[int], list[int]]], room: int, most: int) -> tuple[list[list[int]], int]:
    """Shorten demonstrations to a number of tokens.

    Args:
        examples: tokens of each input and of its output.
        room: maximum number of tokens of all of them.
        most: maximum number of tokens of each.

    Returns the tokens of those that fit, and the number that were shortened or left out. The first that does not fit loses the
    beginning of its input; further ones are left out.

    >>> fitted([([1, 2], [3]), ([4, 5], [6]), ([7], [8])], room=5, most=9)
    ([[1, 2, 3], [5, 6]], 2)
    """
    found: list[list[int]] = []
    cut = used = 0
    for number, (before, after) in enumerate(examples):
        kept = before[max(0, len(before) + len(after) - most) :]
        shortened = len(kept) < len(before)
        missing = used + len(kept) + len(after) - room
        if missing > 0:
            if len(kept) > missing:
                found.append([*kept[missing:], *after])
            return found, cut + len(examples) - number
        found.append([*kept, *after])
        used += len(found[-1])
        cut += shortened
    return found, cut


class _Episodes(Dataset[dict[str, Any]]):
    """Batches of queries with their demonstrations, or of plain texts, by lists of positions.

    Args:
        task: encodes texts.
        split: the queries.
        draw: numbers that seed the draws, besides the position; a `Position` counts as its epoch.
        asked: for the evaluation.
    """

    def __init__(
        self, task: DemonstrationsTask, split: DemonstrationSplit, draw: Sequence[int | Position], asked: bool
    ) -> None:
        self.task, self.split, self.draw, self.asked = task, split, draw, asked

    def __len__(self) -> int:
        return len(self.split) * (1 if self.asked else 2) + (0 if self.asked else len(self.task.data.texts))

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = [self._row(int(n)) for n in positions]
        ids, mask = padded([[t for one in row["demos"] for t in one] for row in rows], self.task.pad, left=True)
        if not any(row["demos"] for row in rows):
            ids, mask = ids[:, :0], mask[:, :0]
        batch: dict[str, Any] = {
            "ids": ids,
            "mask": mask,
            "cut": torch.tensor([row["cut"] for row in rows], dtype=torch.int64),
            "index": torch.tensor(list(map(int, positions)), dtype=torch.int64),
            "query": self.task.query([row["query"] for row in rows]),
        }
        if not self.asked:
            return batch
        others = [[t for one in row["other"] for t in one] for row in rows]
        other, there = padded(others, self.task.pad, left=True)
        batch["other"] = (other, there) if any(others) else (other[:, :0], there[:, :0])
        most = max(len(row["candidates"]) for row in rows)
        nothing: tuple[list[int], list[int]] = (rows[0]["query"][0][0], [])
        filled = [[*row["candidates"], *[nothing] * (most - len(row["candidates"]))] for row in rows]
        batch["candidates"] = self.task.query([[one] for row in filled for one in row])
        counts = torch.tensor([len(row["candidates"]) for row in rows])
        batch["there"] = torch.arange(most) < counts[:, None]
        ends = [np.cumsum([len(one) for one in row["demos"]] or [0]) for row in rows]
        longest = max(map(len, ends))
        batch["ends"] = torch.tensor(np.array([np.pad(one, (0, longest - len(one)), mode="edge") for one in ends]))
        return batch

    def _row(self, n: int) -> dict[str, Any]:
        config, split, texts = self.task.config, self.split, len(self.task.data.texts)
        alone = n < len(split)
        if not alone:
            n -= len(split)
            if n < texts:
                return self.task.text_row(n)
            n -= texts
        at = int(split.queries[n])
        example, group = split.examples[at], int(split.groups[at])
        seeds = [part.all_epochs if isinstance(part, Position) else part for part in self.draw]
        generator = np.random.default_rng([*seeds, n])
        room = min(config.room, config.context - self.task.length(split, example))
        drawn = split.members.draw(group, config.demonstrations, generator, without=at)
        demos, cut = self._fitted(drawn, room)
        before = self.task.encoded(example.input)
        found: dict[str, Any] = {"demos": demos, "cut": cut, "query": [(before, self.task.encoded(example.output))]}
        if not alone:
            among = split.queries[split.groups[split.queries] == group]
            free = config.context - sum(map(len, demos)) - sum(map(len, found["query"][0]))
            for pair in map(self._pair, generator.choice(among, config.model_queries - 1).tolist()):
                free -= sum(map(len, pair))
                if free < 0:
                    break
                found["query"].append(pair)
        if self.asked:
            found["candidates"] = [(before, self.task.encoded(option)) for option in split.options(example)]
            another = split.members.draw(
                split.members.other(group, generator), config.demonstrations, generator, without=at
            )
            found["other"] = self._fitted(another, room)[0]
        return found

    def _pair(self, n: int) -> tuple[list[int], list[int]]:
        example = self.split.examples[n]
        return self.task.encoded(example.input), self.task.encoded(example.output)

    def _fitted(self, drawn: Indices, room: int) -> tuple[list[list[int]], int]:
        return fitted([self._pair(n) for n in drawn.tolist()], room, self.task.config.example_tokens)


def first(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a batch of the evaluation with the first demonstrations of each query alone."""
    ids, mask, ends = batch["ids"], batch["mask"], batch["ends"]
    many = ends[:, min(count, ends.shape[1]) - 1].tolist() if count else [0] * len(ids)
    rows = [row[there][:end].tolist() for row, there, end in zip(ids, mask, many, strict=True)]
    kept, there = padded(rows, 0, left=True)
    at = slice(None) if any(many) else slice(0, 0)
    return {**batch, "ids": kept[:, at].to(ids.device), "mask": there[:, at].to(ids.device)}


class DemonstrationsTask:
    """Loaders and evaluator of one source of demonstrations."""

    name = "demonstrations"
    headline = "accuracy"  # the measure it judges by
    contract = "demonstrations"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: DemonstrationData, config: Any) -> None:
        if not isinstance(data, DemonstrationData):
            raise CounterpointError(
                f"{data.name} has no demonstrations, which the task demonstrations needs; name a source of them"
            )
        if not len(data.train) or not len(data.test):
            raise DataError(f"{data.name}: needs training and test queries, has {len(data.train)} and {len(data.test)}")
        self.data, self.config = data, config
        self.notes: list[str] = []
        self._encoded: dict[str, list[int]] = {}
        for name in ("train", "valid", "test"):
            lonely = self.split(name).without_pool() if config.demonstrations else []
            if lonely:
                raise DataError(
                    f"{data.name}: the {name} split has {counted(len(lonely), 'task')} without an example besides a query, so "
                    f"without demonstrations, such as '{lonely[0]}'; add examples, or set --demonstrations 0"
                )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data)
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: of these examples, or of a trained run (`check_facts`)."""
        return Tokenizer.from_json(self.facts["tokenizer"])

    @property
    def pad(self) -> int:
        """The number of the padding token."""
        return self.tokenizer.pad

    def encoded(self, text: str) -> list[int]:
        """Return the tokens of an input or output, with the separator before it. Kept, because every epoch needs them again."""
        if text not in self._encoded:
            found = self.tokenizer.model.encode(f"{self.config.separator}{text}", add_special_tokens=False)
            self._encoded[text] = list(found.ids)
        return self._encoded[text]

    def length(self, split: DemonstrationSplit, example: Example) -> int:
        """Return the number of tokens of a query with its longest candidate."""
        answers = split.options(example) if split is not self.data.train else (example.output,)
        return len(self.encoded(example.input)) + max(len(self.encoded(answer)) for answer in answers)

    def query(self, rows: Sequence[Sequence[tuple[list[int], list[int]]]]) -> Query:
        """Return queries as the model takes them. A row is pairs of input and answer; an encoder-decoder model takes the first."""
        start = int(self.facts["start"])
        if start >= 0:  # an encoder reads the input
            source = padded([row[0][0] for row in rows], self.pad)
            rows = [[([start], row[0][1])] for row in rows]
        else:
            source = (torch.zeros(len(rows), 0, dtype=torch.int64), torch.zeros(len(rows), 0, dtype=torch.bool))
        ids, mask = padded([[t for pair in row for part in pair for t in part] for row in rows], self.pad)
        flags = [[f for before, after in row for f in (*(0,) * len(before), *(1,) * len(after))] for row in rows]
        return Query(*source, ids, mask, padded(flags, 0)[0].bool())

    @cached_property
    def text_rows(self) -> Indices:
        """Numbers of the plain texts that can be cut in two."""
        many = np.array([len(self.text_tokens(n)) for n in range(len(self.data.texts))], np.int64)
        return np.flatnonzero(many * self.config.beta >= 1)

    def text_row(self, n: int) -> dict[str, Any]:
        """Return a plain text, cut in two."""
        ids = self.text_tokens(n)
        at = min(int(self.config.beta * len(ids)), self.config.room)
        return {"demos": [ids[:at]], "cut": 0, "query": [([], ids[at:])]}

    def text_tokens(self, n: int) -> list[int]:
        """Return the tokens of a plain text, at most as many as the context holds."""
        return self.encoded(self.data.texts[n])[: self.config.context]

    def split(self, name: str) -> DemonstrationSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: DemonstrationSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small, or no query fits the context; count training queries that do not."""
        check_watched(self.data.name, len(self.data.valid), "queries")
        for name in ("valid", "test"):
            self.check_asked(name)
        for name in ("valid", "test"):
            split = self.split(name)
            episodes = _Episodes(self, split, (DRAWN,), True)
            cut = np.array([episodes._row(n)["cut"] for n in range(len(split))])
            if cut.any():
                self.notes.append(
                    f"shortened or left out, because they exceed the context of {self.config.context}: "
                    f"{counted(int(cut.sum()), 'demonstration')} of {int((cut > 0).sum())} of {len(cut)} {name} queries; raise "
                    "--context, or lower --demonstrations"
                )
        left = len(self.data.train) - len(self.rows)
        if not len(self.rows):
            raise DataError(
                f"{self.data.name}: no training query fits the context of {self.config.context}; raise --context"
            )
        if left:
            self.notes.append(
                f"{left} of {counted(len(self.data.train), 'training query has', 'training queries have')} more tokens than the "
                f"context of {self.config.context} "
                "holds, and are left out; raise --context to use them"
            )

    def check_asked(self, name: str) -> None:
        """Raise DataError for a query of an evaluated split that cannot be scored. A query is never cut."""
        split = self.split(name)
        for at in split.queries.tolist():
            example = split.examples[at]
            options = split.options(example)
            where = f"{self.data.name}: the query '{example.input[:60]}' of the task '{example.task}' ({name} split)"
            if len(options) < 2:
                raise DataError(f"{where} has one candidate answer, and needs two; give it options")
            empty = [option for option in options if not self.encoded(option)]
            if empty:
                raise DataError(f"{where} has the candidate '{empty[0]}', which has no token and cannot be scored")
            many = self.length(split, example) + self.config.before
            if many > self.config.context:
                raise DataError(
                    f"{where} needs {many} positions with its longest candidate, more than the context of {self.config.context}; a "
                    "query is never cut: raise --context, or shorten it"
                )

    @cached_property
    def rows(self) -> Indices:
        """Positions of the training queries that fit the context, and have an input and an answer."""
        split = self.data.train
        chosen = [split.examples[at] for at in split.queries.tolist()]
        fits = [
            self.length(split, one) + self.config.before <= self.config.context and bool(self.encoded(one.output))
            for one in chosen
        ]
        return np.flatnonzero(np.array(fits, bool))

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer of a trained run, whose model these data are measured by."""
        self.facts = dict(trained)

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = RowBatches(self.rows, self.config.batch_size) if batches is None else batches
        episodes = _Episodes(self, self.data.train, (seed, position), False)
        return DataLoader(episodes, batch_size=None, sampler=chosen.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | DemonstrationSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these queries of a split as a learner's `predict` takes them."""
        chosen = self.split(split) if isinstance(split, str) else split
        return _Episodes(self, chosen, (DRAWN,), True)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the queries of a split, in order."""
        self.check_asked(split)
        found = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(found)))) for start in range(0, len(found), AT_ONCE)]
        return DataLoader(_Episodes(self, found, (DRAWN,), True), batch_size=None, sampler=at)

    def evaluator(self, split: str) -> CandidateEvaluator:
        return CandidateEvaluator(self.split(split))


TASK = DemonstrationsTask
