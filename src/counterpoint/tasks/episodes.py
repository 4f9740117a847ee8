"""Define the task `episodes`: classify a query after demonstrations, for classes of which the model knows the names alone.

A training batch has positions, and the learner's `prepare` adds the prompts:

    batch["index"]         [B] positions in the training set
    batch["query"]         [B, S, F] features, with "query_slots" [B, S], True at the slots that an item has
    batch["label"]         [B] number of the class among the known ones
    batch["demos"]         [B, E, S, F], with "demo_slots" [B, E, S] and "demo_labels" [B, E]
    batch["in_demo"]       whether demonstrations are informative: one coin for the batch

An evaluation batch has "class_tokens" and "class_token_mask", the names of the known classes, and "prompts": for each measure a
batch of the same form. Prompts of episodes have "words" [b, ways], the known names that stand for their classes, and "truth" [b].

    episode       an unseen class: E / ways demonstrations each of it and of ways - 1 others, under random known names
    shuffled      the same with the demonstrations' labels in random order
    in_weight     a known class, after random demonstrations, among all known classes
    neighbour     a known class, after the most similar training items

Demonstrations of the evaluation are drawn once. The query is never among its demonstrations. A learner's `predict` returns
"NAME_logits" of each kind: [b, ways] of episodes, [b, classes] of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.neighbours import nearest_rows
from counterpoint.core.operands import unit
from counterpoint.core.world import processes
from counterpoint.data.episodes import EpisodeData, EpisodeSplit
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import padded
from counterpoint.encoders.text import Tokenizer, build_tokenizer, train_bpe
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.measures.episodes import OWN, EpisodeEvaluator
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

DRAWN = 2307_07742  # part of the seed of the evaluation's draws
BLOCK = 1024  # queries whose similarities are computed at once
LEARNT = "learnt"
SHOWN = 8  # batches of the figure


@dataclass
class EpisodesConfig(OptimConfig):
    """Settings of every learner from episodes."""

    epochs: int = 10
    """Passes over the training items."""
    batch_size: int = 64
    """Queries in a batch, over all processes together."""
    demonstrations: int = 8
    """Number of demonstrations of a query, a multiple of `ways`; 0 for none."""
    ways: int = 2
    """Number of classes of an episode."""
    bursty_ratio: float = 0.1
    """Probability that the demonstrations of a batch are informative."""
    label_informed: float = 0.5
    """Share of informative prompts whose demonstrations are chosen by class; the others are neighbours of the query."""
    neighbours: int = 32
    """Length of the list of neighbours from which demonstrations are drawn."""
    words: str = LEARNT
    """Tokens of class names: learnt from the names, or the tokenizer and the embedding of a published model: hf:NAME."""
    vocabulary: int = 2000
    """Maximum number of tokens that are learnt from the names."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "neighbours", "vocabulary", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("bursty_ratio", "label_informed")
        self.need_count(*self.counts)
        if self.ways < 2:
            raise CounterpointError(f"ways must be at least 2, got {self.ways}")
        if self.demonstrations < 0 or self.demonstrations % self.ways:
            raise CounterpointError(
                f"demonstrations must be 0 or a multiple of ways ({self.ways}), got {self.demonstrations}; every class of an "
                "episode has as many"
            )

    def check(self) -> None:
        """Raise CounterpointError for an unknown name. Runs before data are read."""
        if self.words != LEARNT and not self.words.startswith("hf:"):
            raise CounterpointError(f"words must be {LEARNT} or hf:NAME, got {self.words}")

    def facts(self, data: EpisodeData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        return data.spec | {"tokenizer": self.tokenizer(data.spec["class_names"]).to_json()}

    def tokenizer(self, names: Sequence[str]) -> Tokenizer:
        """Return the tokenizer of class names: learnt from these, or of the model that `words` names."""
        if self.words == LEARNT:
            return train_bpe(names, self.vocabulary, lowercase=False)
        return build_tokenizer(self.words)


def name_tokens(
    tokenizer: Tokenizer, names: Sequence[str]
) -> tuple[Int[Tensor, "classes tokens"], Bool[Tensor, "classes tokens"]]:
    """Return the tokens of class names without special tokens, padded. DataError for a name without a token."""
    rows = [list(one.ids) for one in tokenizer.model.encode_batch(list(names), add_special_tokens=False)]
    empty = next((n for n, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise DataError(f"the class name '{names[empty]}' has no token, and so no label; rename the class")
    return padded(rows, tokenizer.pad)


# ------------------------------------------------------------------------------------------------------------ the draws


def episode_classes(
    split: EpisodeSplit, row: int, ways: int, generator: np.random.Generator, among: Indices
) -> NDArray[np.int64]:
    """Draw the classes of an episode: the query's own, and ways - 1 others.

    Args:
        split: the items.
        row: position of the query.
        ways: number of classes.
        generator: generator of the draws.
        among: numbers of the classes.

    Returns none where the query is the only item of its class, or other classes are too few.
    """
    own = int(split.labels[row])
    others = among[among != own]
    if split.counts[own] < 2 or len(others) < ways - 1:
        return np.empty(0, np.int64)
    return np.concatenate([[own], generator.choice(others, ways - 1, replace=False)])


def informed(
    split: EpisodeSplit, row: int, count: int, classes: NDArray[np.int64], generator: np.random.Generator
) -> tuple[Indices, NDArray[np.int64]]:
    """Draw as many demonstrations of each class, with replacement and never the query.

    Args:
        split: the items.
        row: position of the query.
        count: number of demonstrations, a multiple of the number of classes.
        classes: numbers of the classes.
        generator: generator of the draws.

    Returns their positions in random order, and the place of the class of each in `classes`.
    """
    each = count // len(classes)
    rows = [split.members.draw(n, each, generator, without=row, replace=True) for n in classes.tolist()]
    order = generator.permutation(each * len(classes))
    return np.concatenate(rows)[order], np.repeat(np.arange(len(classes)), each)[order]


def demonstrations(
    split: EpisodeSplit,
    row: int,
    config: EpisodesConfig,
    neighbours: Int[NDArray[np.int64], "items k"],
    in_demo: bool,
    generator: np.random.Generator,
) -> Indices:
    """Draw the demonstrations of a training item (see the system), with replacement and never the item itself.

    Where demonstrations by class are impossible, since the class has one item, they are neighbours.
    """
    count = config.demonstrations
    if not in_demo:
        drawn = generator.integers(len(split) - 1, size=count)
        return drawn + (drawn >= row)
    if generator.random() < config.label_informed:
        classes = episode_classes(split, row, config.ways, generator, split.members.numbers)
        if len(classes):
            return informed(split, row, count, classes, generator)[0]
    return generator.choice(neighbours[row], count)


def neighbours_of(split: EpisodeSplit, k: int) -> NDArray[np.int64]:
    """Return the k most similar other items of each item, by the cosine of all slots."""
    rows = torch.from_numpy(split.features).flatten(1)
    return nearest_rows(rows, min(k + 1, len(split))).rows[:, 1:].numpy()


def nearest_in(split: EpisodeSplit, asked: EpisodeSplit, k: int) -> NDArray[np.int64]:
    """Return the k items of a split that are most similar to each item of another."""
    keys = unit(torch.from_numpy(split.features).flatten(1))
    rows = unit(torch.from_numpy(asked.features).flatten(1))
    found = [(part @ keys.T).topk(min(k, len(keys)), 1).indices for part in rows.split(BLOCK)]
    return torch.cat(found).numpy()


def prompts(
    split: EpisodeSplit, rows: Indices, pool: EpisodeSplit, demos: Sequence[Indices], labels: NDArray[np.int64]
) -> dict[str, Tensor]:
    """Return prompts of these queries of a split, with demonstrations of a pool under these labels (see the module)."""
    at = np.stack(demos) if len(rows) else np.empty((0, 0), np.int64)
    found = {
        "query": split.features[rows],
        "query_slots": split.present[rows],
        "demos": pool.features[at],
        "demo_slots": pool.present[at],
        "demo_labels": labels,
    }
    return {name: torch.from_numpy(value) for name, value in found.items()}


def fewer(prompt: Mapping[str, Tensor], count: int, ways: int) -> dict[str, Tensor]:
    """Return episodes with the first count / ways demonstrations of each class alone."""
    labels = prompt["demo_labels"]
    if not len(labels) or not count:  # without queries, `demos` may be narrower than the labels
        return {**prompt, **{name: prompt[name][:, :0] for name in ("demos", "demo_slots", "demo_labels")}}
    rank = (labels[:, :, None] == labels[:, None]).tril().sum(2)  # of a demonstration among those of its label
    kept = rank <= count // ways
    each = {name: prompt[name][kept].unflatten(0, (len(labels), -1)) for name in ("demos", "demo_slots", "demo_labels")}
    return {**prompt, **each}


def by_demonstrations(learner: Learner, survey: Survey) -> dict[str, Any]:
    """Return the curves of accuracy in test episodes of unseen classes by the number of demonstrations."""
    ways, most = learner.config.ways, learner.config.demonstrations
    counts = sorted({0, most, *(ways * 2**n for n in range(10) if ways * 2**n < most)})
    series: dict[str, list[list[float]]] = {"their labels": [[], []], "labels in random order": [[], []]}
    for count in counts:
        evaluator = survey.evaluator("test")
        for rows in survey.in_batches("test")[:SHOWN]:
            batch = survey.batch("test", rows)
            batch["prompts"] = {k: fewer(v, count, ways) for k, v in batch["prompts"].items() if "words" in v}
            evaluator.update(batch, learner.predict(batch))
        found = evaluator.compute()
        for name, measure in zip(series, ("accuracy", "shuffled_accuracy"), strict=True):
            if measure in found:
                series[name][0].append(count)
                series[name][1].append(round(found[measure], 4))
    caption = (
        "Accuracy in episodes of unseen classes by the number of demonstrations, which have their labels or others."
    )
    return {"kind": "curves", "series": series, "xlabel": "demonstrations", "caption": caption}


# ------------------------------------------------------------------------------------------------------------- the task


class _Positions(Dataset[dict[str, Any]]):
    """Training batches by lists of positions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        return {"index": torch.tensor(list(map(int, positions)), dtype=torch.int64)}


class _Asked(Dataset[dict[str, Any]]):
    """Batches of the evaluation by lists of positions."""

    def __init__(self, task: EpisodesTask, split: EpisodeSplit) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        return self.task.evaluation_batch(self.split, positions)


class EpisodesTask:
    """Loaders and evaluator of one source of episodes."""

    name = "episodes"
    headline = "accuracy"  # the measure it judges by
    contract = "episodes"  # the form of data it takes (see counterpoint.data.load)
    at_once = 128

    def __init__(self, data: EpisodeData, config: Any) -> None:
        if not isinstance(data, EpisodeData):
            raise CounterpointError(
                f"{data.name} has no items with features and named classes, which the task episodes needs; name a source of them"
            )
        if len(data.train) < 2:
            raise DataError(f"{data.name}: needs at least 2 training items, has {len(data.train)}")
        self.data, self.config = data, config
        self.notes: list[str] = []
        self.number = {int(n): at for at, n in enumerate(data.known.tolist())}  # among the known classes
        if len(self.number) < config.ways:
            raise DataError(
                f"{data.name}: has {counted(len(self.number), 'known class')}, fewer than the {config.ways} ways of an episode; "
                "lower --ways, or add classes"
            )
        for name in ("valid", "test"):
            if not len(self.unseen(self.split(name))):
                raise DataError(
                    f"{data.name}: the {name} split has no episode: it needs {config.ways} unseen classes, one of them with at "
                    "least 2 items; hold out more classes, or lower --ways"
                )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data)
        return found

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer of a trained run. CounterpointError for features of another shape."""
        theirs, here = [trained["slots"], trained["feature_width"]], list(self.data.train.features.shape[1:])
        if theirs != here:
            raise CounterpointError(
                f"{self.data.name}: items have {here[0]} slots of {here[1]} features, and the run was trained on {theirs[0]} of "
                f"{theirs[1]}; use the same encoders"
            )
        self.facts = self.data.spec | {"tokenizer": trained["tokenizer"]}
        self.__dict__.pop("names", None)

    @cached_property
    def names(self) -> tuple[Tensor, Tensor]:
        """Tokens and mask of the names of the known classes."""
        return name_tokens(Tokenizer.from_json(self.facts["tokenizer"]), self.facts["class_names"])

    def split(self, name: str) -> EpisodeSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: EpisodeSplit = named_split(self.data, name)
        return found

    def unseen(self, split: EpisodeSplit) -> Indices:
        """Return the numbers of the classes of a split that training lacks, if there are enough for an episode."""
        found = np.setdiff1d(split.members.numbers, self.data.known)
        fine = len(found) >= self.config.ways and max(split.counts[n] for n in found.tolist()) > 1
        return found if fine else found[:0]

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small; note items that cannot be in an episode."""
        check_watched(self.data.name, len(self.data.valid), "items")
        single = sum(count == 1 for count in self.data.train.counts.values())
        if single:
            self.notes.append(
                f"{single} of {counted(len(self.number), 'known class has', 'known classes have')} one training item, which is "
                "never demonstrated to itself"
            )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = Batches(len(self.data.train), self.config.batch_size) if batches is None else batches
        sampler = chosen.bind(seed, position, *processes())
        return DataLoader(_Positions(len(self.data.train)), batch_size=None, sampler=sampler)

    def evaluation_batch(self, split: str | EpisodeSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as a learner's `predict` takes them."""
        chosen = self.split(split) if isinstance(split, str) else split
        at = np.asarray(list(map(int, rows)), np.int64)
        tokens, mask = self.names
        found = self.episodes(chosen, at)
        if chosen is not self.data.train:
            found |= self.known(chosen, at)
        return {"index": torch.from_numpy(at), "class_tokens": tokens, "class_token_mask": mask, "prompts": found}

    def episodes(self, split: EpisodeSplit, rows: Indices) -> dict[str, dict[str, Tensor]]:
        """Return the episodes of the queries of unseen classes."""
        ways, count, unseen = self.config.ways, self.config.demonstrations, self.unseen(split)
        demos, labels, shuffled, words, truth, kept = [], [], [], [], [], []
        for row in rows[np.isin(split.labels[rows], unseen)].tolist():
            generator = np.random.default_rng([DRAWN, row])
            classes = generator.permutation(episode_classes(split, row, ways, generator, unseen))
            if not len(classes):
                continue
            drawn, place = informed(split, row, count, classes, generator)
            names = generator.choice(len(self.number), ways, replace=False)  # arbitrary: they never meant these classes
            kept.append(row)
            demos.append(drawn)
            words.append(names)
            labels.append(names[place])
            shuffled.append(names[generator.permutation(place)])
            truth.append(int((classes == split.labels[row]).argmax()))
        at = np.array(kept, np.int64)
        more = {
            "words": torch.from_numpy(np.array(words, np.int64).reshape(len(kept), ways)),
            "truth": torch.tensor(truth, dtype=torch.int64),
        }
        shape = len(kept), count
        return {
            name: prompts(split, at, split, demos, np.array(of, np.int64).reshape(shape)) | more
            for name, of in ((OWN, labels), ("shuffled", shuffled))
        }

    def known(self, split: EpisodeSplit, rows: Indices) -> dict[str, dict[str, Tensor]]:
        """Return the prompts of queries of known classes, with demonstrations of the training set."""
        at = rows[np.isin(split.labels[rows], self.data.known)]
        pool, count = self.data.train, self.config.demonstrations
        near = nearest_in(pool, split.take(at), count)
        near = near[:, np.arange(count) % near.shape[1]] if near.shape[1] else near
        drawn = [np.random.default_rng([DRAWN, row]).integers(len(pool), size=count) for row in at.tolist()]
        truth = {"truth": self.numbers(split.labels[at])}
        found = {}
        for name, demos in (("in_weight", drawn), ("neighbour", list(near))):
            labels = self.numbers(pool.labels[np.stack(demos)]).numpy() if len(at) else np.empty((0, count), np.int64)
            found[name] = prompts(split, at, pool, demos, labels) | truth
        return found

    def numbers(self, labels: NDArray[np.int64]) -> Int[Tensor, ...]:
        """Return the numbers of classes among the known ones."""
        return torch.from_numpy(np.searchsorted(self.data.known, labels))

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the items of a split, in order."""
        found = self.split(split)
        at = [list(range(s, min(s + self.at_once, len(found)))) for s in range(0, len(found), self.at_once)]
        return DataLoader(_Asked(self, found), batch_size=None, sampler=at)

    def evaluator(self, split: str) -> EpisodeEvaluator:
        return EpisodeEvaluator(self.config.ways, len(self.number))


TASK = EpisodesTask
