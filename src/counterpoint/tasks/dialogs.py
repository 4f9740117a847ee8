"""Define the task `dialogs`: learn from dialogs, some of them annotated by a semantic tree of domains, intents, slots and values.

A training batch, before and after the learner has masked it:

    batch["ids"]        [B, T] token numbers of the last turn and the turns before it; an utterance stands between two markers
    batch["mask"]       [B, T] True at tokens, False at padding
    batch["place"]      [B, T] place in the utterance, from 0
    batch["speaker"]    [B, T] 1 for the user, 0 for the other speaker
    batch["turn"]       [B, T] 1 in the last turn, and counted back from there
    batch["value"]      [B, T] True at the tokens of annotated values, with batch["told"]: True in utterances that have some
    batch["frames"]     [B, R, 4] paths of the last turn in the tree; -2 is padding (see `counterpoint.data.dialogs.Tree`)
    batch["intent"]     [B] number of the last turn's domain and intent, or -1
    batch["index"]      [B] positions: below the number of annotated examples one of these, from there on one without annotation
    batch["masked"]     [B, T] the numbers after masking
    batch["labels"]     [B, T] the old number where a token was chosen, -100 elsewhere

A learner's `predict` returns "z" [B, dim], the vector of each dialog. With a classifier of intents it also returns "logits".

The evaluation learns linear probes on the first half of a split, at most 200 examples. It asks them on the rest:

    intent_accuracy       of domain and intent together, the headline
    slot_accuracy         of the set of slots
    neighbour_score       mean combined score in the tree of the 10 nearest other examples, by cosine; of the first 2,000
    classifier_accuracy   of the learner's own classifier
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.operands import EPS
from counterpoint.core.tree_scores import combined_tree_score
from counterpoint.core.world import processes
from counterpoint.data.dialogs import (
    USER,
    Dialog,
    DialogData,
    DialogSplit,
    Tree,
    Turn,
    intent_of,
    slots_of,
    spans,
    values_of,
)
from counterpoint.data.images import Indices
from counterpoint.encoders.dialogs import DialogEmbedding
from counterpoint.encoders.masked_words import mask_token
from counterpoint.encoders.text import Tokenizer, build_tokenizer
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.measures import linear_probe, principal_axes
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.tasks.tokens import TEXT, LanguageModel, TokensConfig
from counterpoint.words import counted

AT_ONCE = 256  # dialogs in a batch of the evaluation
PROBED = 200  # examples on which a probe learns
NEAREST, COMPARED = 10, 2000  # neighbours, and examples that are compared with each other
SHOWN = 500  # dialogs on the map
PADDING = -2  # of frames


@dataclass
class DialogsConfig(TokensConfig):
    """Settings of every learner from dialogs."""

    epochs: int = 60
    """Passes over the annotated turns."""
    batch_size: int = 256
    """Turns in a step, over all processes: half of them annotated, half not. Without unannotated ones, all are annotated."""
    context: int = 256
    """Maximum number of tokens of a dialog, the last ones."""
    utterance: int = 50
    """Maximum number of tokens of an utterance, the first ones, without its two markers."""
    turns: int = 16
    """Maximum number of turns of a dialog, the last ones."""
    dropout: float = 0.2
    """Dropout probability in encoders that are built here."""
    warmup: float = 0.1

    counts: ClassVar[tuple[str, ...]] = (*TokensConfig.counts, "utterance", "turns")

    def tokenizer(self, data: Any) -> Tokenizer:
        """Return the tokenizer; encoders that are built here learn theirs from the training dialogs."""
        texts = [*data.train.texts, *(data.unlabelled.texts if data.unlabelled else ())]
        return build_tokenizer(self.encoder, texts, vocabulary=self.vocabulary)

    def facts(self, data: Any, tokenizer: Tokenizer) -> dict[str, Any]:
        mask, vocabulary = mask_token(tokenizer, self.encoder)
        named = {"modalities": {TEXT: {"kind": "text"}}, "tokenizers": {TEXT: tokenizer.to_json()}}
        return data.spec | {"mask": mask, "vocabulary": vocabulary} | named


class DialogModel(LanguageModel):
    """A text encoder of dialogs with a [CLS] state, and a head that predicts masked words."""

    def __init__(self, config: Any, vocabulary: int) -> None:
        super().__init__(config, config.encoder, vocabulary, pretrained=config.pretrained)
        self.embedding = DialogEmbedding(
            self.encoder, vocabulary, places=config.utterance + 2, turns=config.turns, dropout=config.dropout
        )
        if self.embedding.own:
            self.encoder.position.requires_grad_(False)  # the places of utterances replace it

    def forward(  # type: ignore[override]
        self,
        ids: Int[Tensor, "n tokens"],
        place: Int[Tensor, "n tokens"],
        speaker: Int[Tensor, "n tokens"],
        turn: Int[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"],
    ) -> Float[Tensor, "n tokens dim"]:
        """Compute the last state of each token, without a [CLS] state in front; zeros at padding."""
        found: Tensor = self.embedding(self.encoder, ids, place, speaker, turn, mask, first=False)
        return found

    def summary(
        self,
        ids: Int[Tensor, "n tokens"],
        place: Int[Tensor, "n tokens"],
        speaker: Int[Tensor, "n tokens"],
        turn: Int[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"],
    ) -> Float[Tensor, "n dim"]:
        """Compute z, the state at [CLS]."""
        found: Tensor = self.embedding(self.encoder, ids, place, speaker, turn, mask, first=True)[:, 0]
        return found


class MixedBatches(Batches):
    """Batches of annotated examples of one corpus, and of as many without annotation.

    Corpora are visited one after another, in the order of the data. The shorter of the two streams begins again.

    Args:
        corpora: number of the corpus of each annotated example.
        unlabelled: number of examples without annotation, whose positions follow; 0 for batches of annotated ones alone.
        batch_size: number of examples in a batch, over all processes.
    """

    def __init__(self, corpora: NDArray[np.int64], unlabelled: int, batch_size: int) -> None:
        half = max(1, batch_size // 2) if unlabelled else batch_size
        self.corpora, self.unlabelled, self.half = corpora, unlabelled, half
        counts = np.unique(corpora, return_counts=True)[1]
        self.labelled_steps = int(sum(-(-int(count) // half) for count in counts))
        steps = max(self.labelled_steps, -(-unlabelled // half))
        super().__init__(steps * batch_size, batch_size)

    def epoch(self, generator: np.random.Generator) -> Any:
        steps = len(self)
        labelled: list[NDArray[np.int64]] = []
        while len(labelled) < steps:
            for corpus in np.unique(self.corpora):
                order = generator.permutation(np.flatnonzero(self.corpora == corpus))
                labelled += [order[start : start + self.half] for start in range(0, len(order), self.half)]
        if not self.unlabelled:
            yield from labelled[:steps]
            return
        turns = -(-steps * self.half // self.unlabelled)
        order = np.concatenate([generator.permutation(self.unlabelled) for _ in range(turns)]) + len(self.corpora)
        for n in range(steps):
            yield np.concatenate([labelled[n], order[n * self.half : (n + 1) * self.half]])


# ------------------------------------------------------------------------------------------------------------- measures


class DialogsEvaluator:
    """Probes and neighbours of one split."""

    def __init__(self, split: DialogSplit, paths: Sequence[Any]) -> None:
        frames = [split.frame(n) for n in range(len(split))]
        self.named = {"intent": [intent_of(frame) for frame in frames], "slot": [slots_of(frame) for frame in frames]}
        self.paths = paths
        self.reset()

    def reset(self) -> None:
        self.rows: list[Tensor] = []
        self.right: list[Tensor] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        z = outputs["z"].float().cpu()
        if not bool(torch.isfinite(z).all()):
            raise diverged("the vectors hold NaN or infinite values")
        self.rows.append(z)
        if "logits" in outputs:
            self.right.append((outputs["logits"].argmax(1) == batch["intent"]).cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        z = torch.cat(self.rows)
        many = min(PROBED, len(z) // 2)
        found: dict[str, float] = {}
        for name, labels in self.named.items():
            numbers = _numbers(labels)
            if many and len(set(labels)) > 1:
                of = z[:many], numbers[:many], z[many:], numbers[many:]
                found[f"{name}_accuracy"] = linear_probe(*of)[0]
        if len(z) > 1:
            found["neighbour_score"] = self.neighbours(z)
        if self.right:
            found["classifier_accuracy"] = float(torch.cat(self.right).float().mean())
        if final and len(z) > 3:
            self.figures = self._map(z[:SHOWN])
        return found

    def neighbours(self, z: Float[Tensor, "n dim"]) -> float:
        """Compute the mean score of each example with its nearest others."""
        rows = F.normalize(z[:COMPARED], dim=1, eps=EPS)
        similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
        nearest = similarity.topk(min(NEAREST, len(rows) - 1), dim=1).indices
        return float(self.scores.gather(1, nearest).mean())

    @cached_property
    def scores(self) -> Float[Tensor, "n n"]:
        """Combined scores of all pairs of the first examples."""
        return combined_tree_score(frames_of(self.paths[:COMPARED])).float()

    def chance(self) -> dict[str, float]:
        """Return the share of the most common label among the asked examples, and the mean score of two examples."""
        many = min(PROBED, len(self.paths) // 2)
        found = {}
        for name, labels in self.named.items():
            asked = labels[many:]
            if many and len(set(labels)) > 1:
                found[f"{name}_accuracy"] = max(map(asked.count, set(asked))) / len(asked)
        n = min(COMPARED, len(self.paths))
        if n > 1:
            found["neighbour_score"] = float((self.scores.sum() - n) / (n * (n - 1)))
        return found

    def _map(self, z: Tensor) -> dict[str, Any]:
        flat, axes = principal_axes(z.double())
        points: dict[str, list[list[float]]] = {}
        for label, at in zip(self.named["intent"], flat.numpy().round(4).tolist(), strict=False):
            points.setdefault(label.partition(" ")[0], []).append(at)
        common = dict(sorted(points.items(), key=lambda item: -len(item[1]))[:8])
        return {
            "Dialogs by domain": {
                "kind": "points",
                "points": common,
                "axes": axes,
                "caption": f"Vectors of {counted(sum(map(len, common.values())), 'test dialog')} on their first two principal "
                "axes.",
            }
        }


SHARED = ("nothing", "domain", "domain and intent", "domain to slot", "the whole path")


def shared_path_figure(
    paths: Int[Tensor, "n 4"], rows: Float[Tensor, "n subspaces width"], names: Sequence[str]
) -> dict[str, Any]:
    """Draw the mean cosine of two examples in each subspace, by the levels that their paths share from the root.

    Args:
        paths: first path of each example.
        rows: unit vectors; the first 500 examples are compared.
        names: name of each subspace.
    """
    rows, paths = rows[:SHOWN], paths[:SHOWN]
    depth = ((paths[:, None] == paths) & (paths[:, None] > 0)).cumprod(2).sum(2)
    off = ~torch.eye(len(rows), dtype=torch.bool)
    there = [n for n in range(len(SHARED)) if bool((off & (depth == n)).any())]
    series = {}
    for name, part in zip(names, rows.unbind(1), strict=True):
        cosine = part @ part.T
        series[name] = [there, [round(float(cosine[off & (depth == n)].mean()), 4) for n in there]]
    steps = ", ".join(f"{n} {SHARED[n]}" for n in there)
    caption = (
        f"Mean cosine of pairs of {counted(len(rows), 'test turn')}. Levels shared from the root of the tree: {steps}."
    )
    return {"kind": "curves", "series": series, "xlabel": "levels shared", "caption": caption}


def _numbers(labels: Sequence[str]) -> Tensor:
    names = {name: n for n, name in enumerate(sorted(set(labels)))}
    return torch.tensor([names[label] for label in labels])


def frames_of(paths: Sequence[Sequence[tuple[int, int, int, int]]]) -> Int[Tensor, "n rows 4"]:
    """Stack the paths of frames, padded with -2."""
    found = torch.full((len(paths), max([1, *map(len, paths)]), 4), PADDING)
    for n, rows in enumerate(paths):
        if rows:
            found[n, : len(rows)] = torch.tensor(rows)
    return found


# ------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class _Utterance:
    """An encoded utterance: token numbers with markers, and whether each belongs to an annotated value."""

    ids: list[int]
    value: list[bool]
    cut: bool  # whether its end is left out


class _Dialogs(Dataset[dict[str, Any]]):
    """Batches of examples by lists of positions: annotated ones, then ones without annotation."""

    def __init__(
        self, splits: Sequence[DialogSplit], paths: Sequence[Sequence[Any]], task: DialogsTask, config: DialogsConfig
    ) -> None:
        self.splits, self.paths, self.config = splits, paths, config
        self.encode, self.intents = task.encode, task.intents

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        first = len(self.splits[0])
        places = [(0, int(n)) if n < first else (1, int(n) - first) for n in positions]
        rows = [self._row(self.splits[part].context(n)) for part, n in places]
        longest = max([1, *(len(row[0]) for row in rows)])
        columns = np.zeros((5, len(rows), longest), np.int64)
        for n, row in enumerate(rows):
            for column, values in zip(columns, row, strict=True):
                column[n, : len(values)] = values
        lengths = torch.tensor([len(row[0]) for row in rows], dtype=torch.int64)
        ids, place, speaker, turn, value = torch.from_numpy(columns)
        told = value == 2
        frames = [self.splits[part].frame(n) for part, n in places]
        intents = [-1 if frame is None else self.intents.get(intent_of(frame), -1) for frame in frames]
        return {
            "ids": ids,
            "mask": torch.arange(longest) < lengths[:, None],
            "place": place,
            "speaker": speaker,
            "turn": turn,
            "value": value == 1,
            "told": told | (value == 1),
            "frames": frames_of([self.paths[n] if not part else () for part, n in places]),
            "intent": torch.tensor(intents, dtype=torch.int64),
            "index": torch.tensor(list(map(int, positions)), dtype=torch.int64),
        }

    def _row(self, dialog: Dialog) -> tuple[list[int], ...]:
        """Return the columns of an example: numbers, places, speakers, turns, and 1 at values, 2 beside them."""
        kept = dialog[-self.config.turns :]
        columns: tuple[list[int], ...] = ([], [], [], [], [])
        for back, turn in zip(range(len(kept), 0, -1), kept, strict=True):
            said = self.encode(turn)
            beside = 2 if any(said.value) else 0
            for column, values in zip(
                columns,
                (
                    said.ids,
                    range(len(said.ids)),
                    [int(turn.role == USER)] * len(said.ids),
                    [back] * len(said.ids),
                    [1 if value else beside for value in said.value],
                ),
                strict=True,
            ):
                column += values
        return tuple(column[-self.config.context :] for column in columns)


class DialogsTask:
    """Loaders and evaluator of one source of dialogs."""

    name = "dialogs"
    headline = "intent_accuracy"  # the measure it judges by
    contract = "dialogs"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: DialogData, config: Any) -> None:
        if not isinstance(data, DialogData):
            raise CounterpointError(
                f"{data.name} has no dialogs, which the task dialogs needs; name a source of dialogs"
            )
        if not len(data.train) or not len(data.test):
            raise DataError(
                f"{data.name}: needs annotated turns for training and test, has {len(data.train)} and {len(data.test)}"
            )
        self.data, self.config = data, config
        self.notes: list[str] = []
        self._said: dict[tuple[str, str, int], _Utterance] = {}
        self._paths: dict[int, list[list[tuple[int, int, int, int]]]] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: of these dialogs, or of a trained run (`check_facts`)."""
        found: Tokenizer = self.config.tokenizer(self.data)
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data, self.tokenizer)
        return found

    @property
    def intents(self) -> dict[str, int]:
        """Number of each domain and intent of the training turns."""
        return {name: n for n, name in enumerate(self.facts["class_names"])}

    @cached_property
    def tree(self) -> Tree:
        """Numbers of all names, the same on every process."""
        splits = (self.data.train, self.data.valid, self.data.test)
        return Tree(split.frame(n) for split in splits for n in range(len(split)))

    def encode(self, turn: Turn) -> _Utterance:
        """Encode an utterance between its speaker's markers, and find its values. Kept, because every epoch needs it again."""
        key = turn.role, turn.text, id(turn.frame) if turn.frame else 0
        if key not in self._said:
            found = self.tokenizer.model.encode(turn.text, add_special_tokens=False)
            ids, most = found.ids, self.config.utterance
            at = spans(turn.text, values_of(turn.frame))
            value = [any(start < last and first < end for first, last in at) for start, end in found.offsets]
            start = self.facts["vocabulary"] + (0 if turn.role == USER else 2)
            self._said[key] = _Utterance(
                [start, *ids[:most], start + 1], [False, *value[:most], False], len(ids) > most
            )
        return self._said[key]

    def split(self, name: str) -> DialogSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: DialogSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small to monitor training; count the examples that are cut."""
        check_watched(self.data.name, len(self.data.valid), "annotated turns")
        config, train = self.config, self.data.train
        dialogs = [[self.encode(turn) for turn in train.context(n)[-config.turns :]] for n in range(len(train))]
        lengths = [sum(len(said.ids) for said in dialog) for dialog in dialogs]
        turns = counted(len(train), "annotated training turn")
        if ends := sum(any(said.cut for said in dialog) for dialog in dialogs):
            self.notes.append(
                f"{ends} of {turns} or their dialogs have an utterance of more than {config.utterance} tokens, of which the end is "
                "not read; raise --utterance"
            )
        if cut := sum(length > config.context for length in lengths):
            self.notes.append(
                f"{cut} of {turns} and the turns before have more than {config.context} tokens, of which the first are not read; "
                f"--context {max(lengths)} reads all"
            )

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer and the names of intents of a trained run, whose model these data are measured by."""
        self.tokenizer = Tokenizer.from_json(trained["tokenizers"][TEXT])
        self.facts = dict(trained)

    def paths(self, split: DialogSplit) -> list[list[tuple[int, int, int, int]]]:
        """Return the paths of each example of a split. Kept, because every batch needs them."""
        if id(split) not in self._paths:
            self._paths[id(split)] = [self.tree.paths(split.frame(n)) for n in range(len(split))]
        return self._paths[id(split)]

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        data = self.data
        if batches is None:
            free = 0 if data.unlabelled is None else len(data.unlabelled)
            batches = MixedBatches(data.train.corpora, free, self.config.batch_size)
        splits = [data.train, *([data.unlabelled] if data.unlabelled else [])]
        dialogs = _Dialogs(splits, self.paths(data.train), self, self.config)
        return DataLoader(dialogs, batch_size=None, sampler=batches.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | DialogSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these examples of a split as a learner's `predict` takes them."""
        found = self.split(split) if isinstance(split, str) else split
        return _Dialogs([found], self.paths(found), self, self.config)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the examples of a split, in order."""
        found = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(found)))) for start in range(0, len(found), AT_ONCE)]
        return DataLoader(_Dialogs([found], self.paths(found), self, self.config), batch_size=None, sampler=at)

    def evaluator(self, split: str) -> DialogsEvaluator:
        found = self.split(split)
        return DialogsEvaluator(found, self.paths(found))


TASK = DialogsTask
