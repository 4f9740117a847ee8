"""Define learners of the task `aligned` that score pairs of items, such as a picture and a text.

A pair scorer has an encoder and a linear map for each of two modalities. Its scorer reads both items (`encoders/pair_scorers.py`).
It gives no embeddings. To retrieve, it scores every pair of the split: recall at 1, 5 and 10 of both directions. In training, each
picture is scored with a few captions of the training set, its own first. Captions of the same picture or with the same words are
never drawn. Below, "picture" is the first modality and "caption" the second where the data have others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.distributed import place
from counterpoint.core.rows import token_numbers
from counterpoint.data.images import Indices
from counterpoint.data.pairs import rows_with
from counterpoint.encoders.pair_scorers import FUSIONS, PairScorer, build_scorer
from counterpoint.encoders.text import Tokenizer
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.engine.survey import BATCH, Survey
from counterpoint.errors import CounterpointError, diverged, unknown
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, first_two, taken
from counterpoint.tasks.measures import RECALL, retrieval

SPARE = 16  # captions drawn beyond the needed ones, to replace those that may not be used
LOSS_SEED = 0  # of the random captions of the loss on an evaluated split
Score = Callable[..., Tensor]


@dataclass
class PairConfig(AlignedConfig):
    """Settings of every learner that scores pairs."""

    embedding: int = 768
    """Width of the tokens that the scorer reads, a multiple of heads."""
    fusion: str = "coattention"
    """The scorer: coattention (tokens of both items attend to each other) or mlp (layers on both first tokens)."""
    fusion_layers: int = 6
    """Layers of the scorer, or of the teacher's scorer where the run trains one. At least 1."""
    heads: int = 12
    """Attention heads of co-attention."""
    dropout: float = 0.1
    """Dropout probability within co-attention, 0 to 1, 1 not included."""
    candidates: int = 64
    """Captions for each picture and step: its own, and random others. At least 2."""
    pairs: int = 1024
    """Pairs that are scored at once without gradient, which bounds the memory. At least 1."""
    retrieved: int = 0
    """Items of a split among which retrieval is measured, the first ones; all their pairs are scored. 0: all items."""

    distils: ClassVar[bool] = False  # by name: a student shares its teacher's encoders

    adapts: ClassVar[bool] = False  # student and teacher share its encoders

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in FUSIONS:
            raise unknown("fusion", self.fusion, FUSIONS)
        self.need_below_one("dropout")
        for name, least in (("candidates", 2), ("pairs", 1), ("retrieved", 0), ("fusion_layers", 1), ("heads", 1)):
            if getattr(self, name) < least:
                raise CounterpointError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.fusion == "coattention" and self.embedding % self.heads:
            raise CounterpointError(f"embedding ({self.embedding}) must be a multiple of heads ({self.heads})")

    def check_batch(self) -> None:
        """Accept a batch of one picture: its negatives are captions of the training set."""


class Side(NamedTuple):
    """Tokens of some items of one modality, as a scorer reads them."""

    states: Float[Tensor, "n tokens width"]
    mask: Bool[Tensor, "n tokens"] | None

    def rows(self, at: Tensor) -> Side:
        """Return the tokens of these items."""
        return Side(self.states[at], None if self.mask is None else self.mask[at])


class Captions:
    """The captions of a set of items, of which every picture gets random ones of other pictures.

    Args:
        alike: [items, 2] numbers of each item's picture and caption; equal for the same one.
        there: positions of the items that have a caption.

    Raises CounterpointError where every caption belongs to one picture.
    """

    def __init__(self, alike: Indices, there: Indices) -> None:
        self.alike, self.there = alike, there
        counts = [np.unique(column[there], return_counts=True)[1].max(initial=0) for column in alike.T]
        # Each picture can have at least this number of other captions.
        self.least = len(there) - (int(sum(counts)) - 1 if len(there) else 0)
        if self.least < 1:
            exact = [int((alike[there] != alike[one]).all(1).sum()) for one in there]
            self.least = min(exact, default=0)
        if self.least < 1:
            raise CounterpointError(
                "a picture has no caption of another picture to be contrasted with: use a larger set or batch, with captions "
                "that differ"
            )

    def draw(
        self, rows: Indices, count: int, generator: np.random.Generator, share: tuple[int, slice] | None = None
    ) -> Indices:
        """Draw captions for the pictures of a batch, uniformly and without repetition.

        Args:
            rows: positions of this process's pictures.
            count: captions for each picture, its own first; at most 1 + `least`.
            generator: the whole batch's numbers are drawn from it.
            share: number of pictures of the whole batch, and the slice of it that `rows` are. Default: all of it.

        Returns [rows, count] positions.
        """
        need, (total, mine) = count - 1, share or (len(rows), slice(None))
        drawn = generator.integers(len(self.there), size=(total, 2 * need + SPARE))[mine]
        seed = int(generator.integers(1 << 62))
        found = self.there[drawn]
        bad = (self.alike[found] == self.alike[rows][:, None]).any(2)
        order = np.argsort(found, axis=1, kind="stable")
        sorted_ = np.take_along_axis(found, order, 1)
        again = np.zeros_like(bad)
        np.put_along_axis(again, order[:, 1:], sorted_[:, 1:] == sorted_[:, :-1], 1)
        bad |= again
        kept = np.argsort(bad, axis=1, kind="stable")[:, :need]
        chosen = np.take_along_axis(found, kept, 1)
        for row in np.flatnonzero((~bad).sum(1) < need):  # a small set
            allowed = self.there[(self.alike[self.there] != self.alike[rows[row]]).all(1)]
            chosen[row] = np.random.default_rng([seed, int(rows[row])]).permutation(allowed)[:need]
        return np.concatenate([rows[:, None], chosen], 1)


def alike(split: Any, image: str, text: str, kinds: Mapping[str, str]) -> Indices:
    """Number the pictures and the captions of a split, [items, 2]; equal numbers mark the same picture or caption.

    Args:
        split: an `AlignedSplit`.
        image, text: the two modalities.
        kinds: kind of each modality. Equal texts and vectors are recognised, equal pictures and sounds only where the
            source knows them.
    """
    rows = np.arange(len(split))

    def numbers(name: str) -> NDArray[np.int64]:
        known = split.same(name) if hasattr(split, "same") else None
        if known is not None:
            return np.where(known < 0, -1 - rows, known)
        if kinds[name] == "text":
            first: dict[str, int] = {}
            return np.array([first.setdefault(str(t), n) for n, t in enumerate(split.column(name, rows))], np.int64)
        if kinds[name] == "vector":
            found = np.unique(np.asarray(split.column(name, rows)), axis=0, return_inverse=True)[1]
            return np.asarray(found, np.int64).reshape(-1)
        return rows

    return np.stack([numbers(image), numbers(text)], 1)


def scored_retrieval(
    first: str, second: str, scores: Float[Tensor, "n n"], groups: Int[Tensor, "n kinds"]
) -> dict[str, float]:
    """Measure recall at 1, 5 and 10 of both directions by the scores of all pairs.

    Args:
        first, second: names of both modalities.
        scores: row i holds the scores of the first modality of item i with the second modality of every item.
        groups: numbers of each item; items that share a number in any column are right for each other.

    Returns `<first>_to_<second>_r1` and so on, `mean_r1`, the mean of both directions, and `mean_recall`, the mean of all.
    """
    everyone = torch.eye(len(scores))
    found: dict[str, float] = {}
    for a, b, rows in ((first, second, scores), (second, first, scores.T)):
        measured = retrieval(rows.float().cpu(), everyone, groups, groups)
        found |= {f"{a}_to_{b}_r{k}": measured[f"r{k}"] for k in RECALL}
    mean = [value for name, value in found.items() if name.endswith("_r1")]
    return found | {"mean_r1": float(np.mean(mean)), "mean_recall": float(np.mean(list(found.values())))}


class PairLearner(AlignedLearner):
    """An encoder and a linear map of each modality's tokens, for scorers that subclasses build by `build_scorer`."""

    slug: ClassVar[str]  # for messages
    embeds: ClassVar[bool] = False

    def __init__(self, config: PairConfig, data: Any, seed: int = 0) -> None:
        kinds = {name: spec["kind"] for name, spec in data.modalities.items()}
        first, second = first_two(kinds)
        super().__init__(config, data, seed)
        swapped = (kinds[first], kinds[second]) == ("text", "image")
        self.image, self.text = (second, first) if swapped else (first, second)
        # BERT's types of segments: which modality a token is of.
        self.types = nn.Embedding(2, config.embedding)
        nn.init.normal_(self.types.weight, std=0.02)
        self.tokenizer = Tokenizer.from_json(data.tokenizers[self.text]) if self.kinds[self.text] == "text" else None
        self.captions: Captions | None = None

    def build_head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.embedding)

    def scorer(self, layers: int) -> PairScorer:
        """Build a scorer of this number of layers."""
        config = self.config
        return build_scorer(config.fusion, config.embedding, layers, config.heads, config.dropout)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        split, text = survey.split("train"), self.text
        rows = np.arange(len(split))
        self.captions = Captions(alike(split, self.image, text, self.kinds), rows[split.present(text, rows)])

    # --- tokens and scores

    def side(self, name: str, values: Any) -> Side:
        """Encode items of one modality: a tensor or, for text, token numbers and mask."""
        encoder: Any = self.encoders[name]
        mask = None
        if self.kinds[name] == "text":
            mask = values[1]
            states = encoder.tokens(*values)
        elif isinstance(encoder, VisionTokens):
            states = encoder.tokens(values)
            if encoder.prefix < 1:  # no class token: put the picture's vector first
                states = torch.cat([encoder.head(states)[:, None], states], 1)
        else:
            states = encoder(values)[:, None]
        return Side(self.heads[name](states) + self.types.weight[int(name == self.text)], mask)

    def score(self, scorer: Score, image: Side, text: Side) -> Float[Tensor, " n"]:
        """Score picture i with caption i, for every i."""
        return scorer(image.states, text.states, image.mask, text.mask)

    def scores(
        self, scorer: Score, image: Side, text: Side, at: Int[Tensor, "n candidates"]
    ) -> Float[Tensor, "n candidates"]:
        """Score each picture with its captions, all pairs at once.

        Args:
            scorer: the scorer.
            image: tokens of the pictures.
            text: tokens of the captions that `at` counts.
            at: the captions of each picture.
        """
        rows = torch.arange(len(at), device=at.device).repeat_interleave(at.shape[1])
        return self.score(scorer, image.rows(rows), text.rows(at.flatten())).view(at.shape)

    @torch.no_grad()
    def chunked(
        self, scorer: Score, image: Side, text: Side, at: Int[Tensor, "n candidates"]
    ) -> Float[Tensor, "n candidates"]:
        """Compute `scores` without gradient, `config.pairs` at a time."""
        rows = torch.arange(len(at), device=at.device).repeat_interleave(at.shape[1])
        parts = zip(rows.split(self.config.pairs), at.flatten().split(self.config.pairs), strict=True)
        found = [self.score(scorer, image.rows(a), text.rows(b)) for a, b in parts]
        return torch.cat(found).view(at.shape) if found else image.states.new_zeros(at.shape)

    # --- the captions of a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        found = super().prepare(batch, generator)
        seed = int(torch.randint(1 << 62, (1,), generator=generator))
        return found | self.drawn(found, self.candidates, np.random.default_rng(seed))

    @property
    def candidates(self) -> int:
        """Captions for each picture at this step, its own included."""
        return int(self.config.candidates)

    def drawn(self, batch: Mapping[str, Any], count: int, generator: np.random.Generator) -> dict[str, Any]:
        """Draw each picture's captions from the training set; outside a fit, from the batch.

        Returns "candidates", [n, count] positions in "pool", the inputs of all drawn captions.
        """
        if self.captions is None or self.survey is None:
            captions = self.of_batch(batch)
            rows, share = np.arange(len(batch["present"][self.text])), None
        else:
            captions, rows = self.captions, batch["index"].cpu().numpy()
            share = self.share(len(rows))
        at = captions.draw(rows, min(count, 1 + captions.least), generator, share)
        if captions is not self.captions:
            return {"candidates": torch.from_numpy(at).to(self.device), "pool": batch["inputs"][self.text]}
        which, places = np.unique(at, return_inverse=True)
        pool = self.inputs(which)
        return {"candidates": torch.from_numpy(places.reshape(at.shape)).to(self.device), "pool": pool}

    def of_batch(self, batch: Mapping[str, Any]) -> Captions:
        """Return the captions of a batch."""
        values, n = batch["inputs"][self.text], len(batch["present"][self.text])
        words = token_numbers(*values).cpu().numpy() if self.kinds[self.text] == "text" else np.arange(n)
        there = batch["present"][self.text].nonzero().flatten().cpu().numpy()
        return Captions(np.stack([np.arange(n), words], 1), there)

    def inputs(self, rows: Indices) -> Any:
        """Read the captions of these training items, on the learner's device."""
        assert self.survey is not None
        kind, split, device = self.kinds[self.text], self.survey.split("train"), self.device
        if kind == "text":
            assert self.tokenizer is not None
            texts = [str(text) for text in split.column(self.text, rows)]
            return tuple(part.to(device) for part in self.tokenizer.encode(texts, self.config.context))
        if kind == "vector":
            return torch.from_numpy(np.asarray(split.column(self.text, rows))).to(device)
        return self.survey.batch("train", rows)["inputs"][self.text]

    def both(self, batch: Mapping[str, Any]) -> Int[Tensor, " m"]:
        """Return the positions in a batch of the items that have both modalities.

        Raises CounterpointError where no item of the whole batch has both.
        """
        rows = (batch["present"][self.image] & batch["present"][self.text]).nonzero().flatten()
        if not place(len(rows), rows.device).total:
            raise CounterpointError(
                f"no item of a batch has both {self.image} and {self.text}; use a larger batch or data with more complete items"
            )
        return rows

    def pictures(self, batch: Mapping[str, Any], rows: Int[Tensor, " m"]) -> Side:
        """Encode the pictures of these items of a batch."""
        inputs = batch["inputs"][self.image]
        if len(rows):
            return self.side(self.image, taken(inputs, rows))
        return self.side(self.image, inputs).rows(rows)  # of another process alone; networks need an item

    # --- evaluation

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch.get("part") == "embedded":
            raise CounterpointError(
                f"{self.slug} scores pairs of items and has no embeddings to write or to search; use clip, siglip or albef"
            )
        return {}

    def evaluated(self) -> dict[str, tuple[Score, bool]]:
        """Return the scorers to measure, by the prefix of their figures, and whether to measure them on `valid`."""
        raise NotImplementedError

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure retrieval by the scores of all pairs, and the loss among random captions."""
        chosen = {name: scorer for name, (scorer, watched) in self.evaluated().items() if watched or split == "test"}
        sides, groups = self.sides(survey, split)
        if len(groups) < 2 or not chosen:
            return {}
        found: dict[str, float] = {}
        for prefix, scorer in chosen.items():
            scores = self.all_pairs(scorer, *sides)
            if not bool(scores.isfinite().all()):
                raise diverged("the scores hold NaN or infinite values")
            measured = scored_retrieval(self.image, self.text, scores, torch.from_numpy(groups))
            measured["candidate_loss"] = self._candidate_loss(scores, groups)
            found |= {f"{prefix}{name}": value for name, value in measured.items()}
        return found

    def all_pairs(self, scorer: Score, image: Side, text: Side) -> Float[Tensor, "n m"]:
        """Score every picture with every caption, without gradient."""
        everything = torch.arange(len(text.states), device=text.states.device)
        return self.chunked(scorer, image, text, everything.expand(len(image.states), -1))

    def sides(self, survey: Survey, split: str) -> tuple[tuple[Side, Side], Indices]:
        """Encode the items of a split that have both modalities. Return the tokens, and the numbers of their content."""
        items = survey.split(split)
        rows = rows_with(items, self.image, self.text)[: self.config.retrieved or None]
        parts: list[list[Side]] = [[], []]
        training = self.encoders.training
        self.encoders.eval()
        with torch.no_grad():
            for start in range(0, len(rows), BATCH):
                inputs = survey.batch(split, rows[start : start + BATCH])["inputs"]
                for part, name in zip(parts, (self.image, self.text), strict=True):
                    part.append(self.side(name, inputs[name]))
        self.encoders.train(training)
        groups = alike(items, self.image, self.text, self.kinds)[rows] if len(rows) else np.empty((0, 2), np.int64)
        return (joined(parts[0]), joined(parts[1])), groups

    def _candidate_loss(self, scores: Tensor, groups: Indices) -> float:
        """Compute the cross-entropy of each picture's own caption among random ones of the split."""
        captions, rows = Captions(groups, np.arange(len(groups))), np.arange(len(groups))
        count = min(self.config.candidates, 1 + captions.least)
        at = captions.draw(rows, count, np.random.default_rng(LOSS_SEED))
        return float(-scores.cpu().gather(1, torch.from_numpy(at)).log_softmax(1)[:, 0].mean())

    def speed(self, scorer: Score, image: Side, text: Side) -> float:
        """Measure the milliseconds that a scorer takes for 1,000 pairs."""
        n = min(len(image.states), 32)
        at = torch.arange(n, device=image.states.device).expand(n, -1)
        self.chunked(scorer, image, text, at)
        started = time.perf_counter()
        for _ in range(3):
            self.chunked(scorer, image, text, at).sum().item()
        return 1e6 * (time.perf_counter() - started) / (3 * n * n)


def joined(parts: Sequence[Side]) -> Side:
    """Concatenate the tokens of several batches, whose texts may differ in length."""
    if not parts:
        return Side(torch.zeros(0, 1, 1), None)
    most = max(part.states.shape[1] for part in parts)
    states = torch.cat([F.pad(part.states, (0, 0, 0, most - part.states.shape[1])) for part in parts])
    if parts[0].mask is None:
        return Side(states, None)
    masks = [F.pad(cast(Tensor, part.mask), (0, most - part.states.shape[1])) for part in parts]
    return Side(states, torch.cat(masks))
