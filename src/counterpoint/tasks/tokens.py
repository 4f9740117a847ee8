"""Define the task `tokens`: learn from texts; the evaluation predicts masked words and probes what words know.

A training batch, before and after the learner has masked it:

    batch["ids"]        [B, T] token numbers
    batch["mask"]       [B, T] True at tokens, False at padding
    batch["index"]      [B] positions: below the number of texts a text alone, from there on a text with a clip
    batch["clip"]       [B, seconds, width] with batch["clip_mask"] [B, seconds], in a batch of texts with clips
    batch["masked"]     [B, T] the numbers after masking
    batch["labels"]     [B, T] the old number where a token was chosen, -100 elsewhere

An evaluation batch has masks that depend on the text alone, and `batch["word"]` [B, T]: the number of the probed word that a token
belongs to, or -1. A learner's `predict` returns, for itself and, with "teacher_" before the names, for its teacher:

- "logits" [m, vocabulary] at the m chosen tokens, in order;
- "states" [B, T, dim] of the text without masks.

The evaluation measures `word_accuracy` and `word_loss` (nats) of masked words. Where words have attributes, it also measures
`probe_accuracy`, the mean over attributes: the vector of a word is the mean of its states over the split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.distributed import global_max, global_mean
from counterpoint.core.masking import IGNORED, mask_tokens
from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import processes
from counterpoint.data.images import Indices
from counterpoint.data.tokens import TokenData, TokenSplit
from counterpoint.encoders.clips import padded
from counterpoint.encoders.masked_words import WordHead, mask_token, word_embedding
from counterpoint.encoders.text import Tokenizer, build_text_encoder, build_tokenizer, check_text_encoder, pool
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig, on_lines
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.measures import principal_axes
from counterpoint.tasks.measures.words import most_common, probe_attributes
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

TEXT = "text"  # the one modality
AT_ONCE = 256  # texts in a batch of the evaluation
SHOWN = 300  # words on the map


@dataclass
class TokensConfig(OptimConfig):
    """Settings of every learner from texts."""

    epochs: int = 40
    """Passes over the training texts."""
    batch_size: int = 256
    """Texts in a batch, over all processes together."""
    encoder: str = "text-768-12-12"
    """The language model: text-s, text-W-D-H (width, layers, heads), minilm, hf:NAME."""
    pretrained: bool = False
    """Start from published weights if the encoder has them."""
    vocabulary: int = 30522
    """Maximum number of tokens of a vocabulary that is learned from the texts."""
    context: int = 128
    """Maximum number of tokens of a text, with the special ones; the rest is cut."""
    dropout: float = 0.1
    """Dropout probability in encoders that are built here."""
    mask_probability: float = 0.15
    """Share of a text's tokens that are masked, 0 to 1."""
    warmup: float = 0.01
    """Share of a stage's steps over which the learning rate rises; then it falls to 0 on a line."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "vocabulary", "context", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("dropout", "mask_probability", "warmup")
        if 1.0 in (self.dropout, self.warmup):
            raise CounterpointError(f"dropout and warmup must be below 1, got {self.dropout} and {self.warmup}")
        self.need_count(*self.counts)
        if self.context < 3:
            raise CounterpointError(f"context must be at least 3, got {self.context}: two of its tokens are special")

    def check(self) -> None:
        """Raise CounterpointError for an unknown encoder. Runs before data are read."""
        check_text_encoder(self.encoder)

    def tokenizer(self, data: TokenData) -> Tokenizer:
        """Return the tokenizer; encoders that are built here learn theirs from the training texts."""
        texts = [*data.train.texts, *(data.grounded.texts if data.grounded else ())]
        return build_tokenizer(self.encoder, texts, vocabulary=self.vocabulary)

    def facts(self, data: TokenData, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        mask, vocabulary = mask_token(tokenizer, self.encoder)
        specials = tokenizer.model.encode("").ids
        words = {"mask": mask, "vocabulary": vocabulary, "specials": specials}
        named = {"modalities": {TEXT: {"kind": "text"}}, "tokenizers": {TEXT: tokenizer.to_json()}}
        return data.spec | words | named


# ---------------------------------------------------------------------------------------------------------- the learner


class LanguageModel(nn.Module):
    """A text encoder and a head that predicts masked words."""

    def __init__(self, config: Any, name: str, vocabulary: int, *, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder: Any = build_text_encoder(
            name, vocabulary=vocabulary, length=config.context, pretrained=pretrained, dropout=config.dropout
        )
        if not hasattr(self.encoder, "tokens"):
            raise CounterpointError(f"{name} gives no state for each token; name text-s, text-W-D-H or hf:NAME")
        if self.encoder.length < config.context:
            raise CounterpointError(
                f"{name} reads {self.encoder.length} tokens, fewer than context ({config.context}); lower --context"
            )
        if self.encoder.vocabulary < vocabulary:
            raise CounterpointError(
                f"{name} has {self.encoder.vocabulary} tokens, fewer than the vocabulary of the tokenizer ({vocabulary}); name a "
                "student and a teacher that share a tokenizer"
            )
        self.words = WordHead(self.encoder.dim, self.encoder.vocabulary)

    @property
    def dim(self) -> int:
        """The width of a token's state."""
        return int(self.encoder.dim)

    def forward(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n tokens dim"]:
        """Compute the last state of each token; zeros at padding."""
        states: Tensor = self.encoder.tokens(ids, mask)
        return states

    def logits(
        self, states: Float[Tensor, "n tokens dim"], labels: Int[Tensor, "n tokens"]
    ) -> Float[Tensor, "m vocabulary"]:
        """Compute the logits of the words at the chosen tokens."""
        found: Tensor = self.words(states[labels != IGNORED], word_embedding(self.encoder).weight)
        return found

    def word_loss(self, states: Float[Tensor, "n tokens dim"], labels: Int[Tensor, "n tokens"]) -> Float[Tensor, ""]:
        """Compute the cross-entropy of masked words, averaged over the chosen tokens of all processes; 0 without any."""
        logits = self.logits(states, labels).float()
        return global_mean(F.cross_entropy(logits, labels[labels != IGNORED], reduction="none"))


class PairBatches(Batches):
    """Batches of all texts with clips, whose positions follow those of the texts alone.

    Args:
        texts: number of texts alone.
        pairs: number of texts with clips.
        batch_size: number of texts in a batch, over all processes.
    """

    def __init__(self, texts: int, pairs: int, batch_size: int) -> None:
        super().__init__(pairs, batch_size)
        self.texts = texts

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return self.texts + generator.permutation(self.examples)


class TokensLearner(Learner):
    """A language model that predicts masked words. Subclasses add to `loss`."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config, self.mask_number, self.vocabulary = config, data.mask, data.vocabulary
        self.specials = torch.tensor(data.specials)
        seed_torch(seed)
        self.model = LanguageModel(config, config.encoder, data.vocabulary, pretrained=config.pretrained)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Mask words of the whole batch, and take this process's share."""
        length = global_max(batch["ids"].shape[1], self.device)
        ids, mask = (F.pad(batch[name], (0, length - batch[name].shape[1])) for name in ("ids", "mask"))
        whole = self.whole(ids)
        maskable = self.whole(mask) & ~torch.isin(whole, self.specials.to(whole.device))
        chosen = self.config.mask_probability
        masked = mask_tokens(whole, maskable, self.mask_number, self.vocabulary, chosen, generator=generator)
        _, mine = self.share(len(ids))
        return batch | {"ids": ids, "mask": mask, "masked": masked.ids[mine], "labels": masked.labels[mine]}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": self.model.word_loss(self.model(batch["masked"], batch["mask"]), batch["labels"])}

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return outputs(self.model, batch)

    def embed(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n dim"]:
        """Compute the mean state of each text's tokens; zeros for a text without tokens."""
        return pool(self.model(ids, mask), mask, "mean")

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.model.encoder, "tokens")]

    def turns(self) -> list[Turn]:
        return [self.turn([self.model], self.config)]

    def turn(self, modules: Sequence[nn.Module], config: Any) -> Turn:
        """Return a turn over these modules, whose rate rises and falls on lines."""
        return on_lines(config, modules, self.epochs, self.steps_per_epoch)


def outputs(model: LanguageModel, batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return what the evaluation needs of a language model, with `prefix` before the names."""
    logits = model.logits(model(batch["masked"], batch["mask"]), batch["labels"])
    return {f"{prefix}logits": logits, f"{prefix}states": model(batch["ids"], batch["mask"])}


# ------------------------------------------------------------------------------------------------------------- measures


class TokensEvaluator:
    """Masked words and probes of one split, of each model that `predict` has outputs of."""

    def __init__(self, split: TokenSplit, words: Sequence[str]) -> None:
        self.attributes, self.words = split.attributes, list(words)
        self.reset()

    def reset(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}
        self.right: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        labels = batch["labels"][batch["labels"] != IGNORED]
        for name in (name for name in outputs if name.endswith("logits")):
            prefix, logits = name.removesuffix("logits"), outputs[name].float()
            if not bool(torch.isfinite(logits).all()):
                raise diverged("the logits hold NaN or infinite values")
            self.losses.setdefault(prefix, []).append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
            self.right.setdefault(prefix, []).append((logits.argmax(1) == labels).cpu())
            if not self.words:
                continue
            states, owner = outputs[f"{prefix}states"].double().cpu(), batch["word"].cpu()
            here = owner >= 0
            if prefix not in self.sums:
                self.sums[prefix] = states.new_zeros(len(self.words), states.shape[2])
                self.counts[prefix] = torch.zeros(len(self.words), dtype=torch.int64)
            self.sums[prefix].index_add_(0, owner[here], states[here])
            self.counts[prefix] += torch.bincount(owner[here], minlength=len(self.words))

    def vectors(self, prefix: str = "") -> dict[str, NDArray[np.float64]]:
        """Return the mean state of each probed word that occurs."""
        sums, counts = self.sums[prefix], self.counts[prefix]
        return {word: (sums[n] / counts[n]).numpy() for n, word in enumerate(self.words) if counts[n]}

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, losses in self.losses.items():
            loss, right = torch.cat(losses), torch.cat(self.right[prefix])
            if len(loss):
                found[f"{prefix}word_loss"], found[f"{prefix}word_accuracy"] = (
                    float(loss.mean()),
                    float(right.float().mean()),
                )
            if prefix not in self.sums:
                continue
            vectors = self.vectors(prefix)
            probes = probe_attributes(vectors, self.attributes)
            if not probes:
                continue
            found[f"{prefix}probe_accuracy"] = float(np.mean(list(probes.values())))
            found |= {f"{prefix}{name}_accuracy": value for name, value in probes.items()}
            if final:
                permuted = probe_attributes(vectors, self.attributes, permuted=True)
                found[f"{prefix}probe_control"] = float(np.mean(list(permuted.values())))
        if final and self.sums:
            self.figures = self._maps()
        return found

    def chance(self) -> dict[str, float]:
        """Return the share of the most common level, which a guess would reach."""
        share = most_common(self.attributes)
        return {} if math.isnan(share) else {f"{prefix}probe_accuracy": share for prefix in self.sums}

    def _maps(self) -> dict[str, Any]:
        """Draw the words of each model by the attribute that it separates best."""
        found = {}
        for prefix in self.sums:
            vectors = dict(list(self.vectors(prefix).items())[:SHOWN])
            probes = probe_attributes(vectors, self.attributes)
            if len(vectors) < 4 or not probes:
                continue
            best = max(probes, key=lambda name: probes[name])
            flat, axes = principal_axes(torch.from_numpy(np.stack(list(vectors.values()))))
            points: dict[str, list[list[float]]] = {}
            for word, at in zip(vectors, flat.numpy().round(4).tolist(), strict=True):
                points.setdefault(self.attributes[best].get(word, "unknown"), []).append(at)
            who = "the teacher" if prefix else "the model"
            found[f"Words by {best}, as {who} knows them"] = {
                "kind": "points",
                "points": dict(sorted(points.items())),
                "axes": axes,
                "caption": f"Mean states of {counted(len(vectors), 'word')} on their first two principal axes, coloured by "
                f"{best}. A probe "
                f"tells it of unseen words in {probes[best]:.0%} of cases.",
            }
        return found


# ------------------------------------------------------------------------------------------------------------- the task


class _Texts(Dataset[dict[str, Any]]):
    """Batches of texts by lists of positions: texts alone, then texts with clips."""

    def __init__(self, splits: Sequence[TokenSplit], tokenizer: Tokenizer, context: int) -> None:
        self.splits, self.tokenizer, self.context = splits, tokenizer, context
        self.first = len(splits[0])

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        index = torch.tensor(list(positions), dtype=torch.int64)
        if not len(index):  # more processes than texts in a last batch
            none = index.new_zeros(0, 1, dtype=torch.bool)
            found = {"ids": index.new_zeros(0, 1), "mask": none, "index": index}
            width = next((split.clips[0].shape[1] for split in self.splits if split.clips), None)
            return found if width is None else found | {"clip": torch.zeros(0, 1, width), "clip_mask": none}
        places = [(0, int(n)) if n < self.first else (1, int(n) - self.first) for n in positions]
        texts = [self.splits[part].texts[n] for part, n in places]
        ids, mask = self.tokenizer.encode(texts, self.context)
        found = {"ids": ids, "mask": mask, "index": index}
        clips = self.splits[places[0][0]].clips
        if clips is not None:
            rows = [torch.from_numpy(np.asarray(clips[n], np.float32)) for _, n in places]
            found["clip"], found["clip_mask"] = padded(rows, max(map(len, rows)))
        return found


class _Asked(_Texts):
    """Batches of a split as `predict` takes them: with masks, and with the probed words."""

    def __init__(self, split: TokenSplit, words: Sequence[str], facts: Mapping[str, Any], *more: Any) -> None:
        super().__init__([split], *more)
        self.facts, self.chosen = facts, 0.15
        self.number = {word: n for n, word in enumerate(words)}

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        batch = super().__getitem__(positions)
        ids, mask = batch["ids"], batch["mask"]
        maskable = mask & ~torch.isin(ids, torch.tensor(self.facts["specials"]))
        batch["masked"], batch["labels"] = ids.clone(), torch.full_like(ids, IGNORED)
        for row, position in enumerate(positions):  # each text has its own draws, whatever batch it is in
            draws = torch.Generator().manual_seed(int(position))
            many = int(mask[row].sum())
            where = (row, slice(many))
            found = mask_tokens(
                *(ids[where], maskable[where], self.facts["mask"], self.facts["vocabulary"], self.chosen),
                generator=draws,
            )
            batch["masked"][where], batch["labels"][where] = found
        batch["word"] = torch.full_like(ids, -1)
        if self.number:
            self._find(batch["word"], [self.splits[0].texts[n] for n in positions])
        return batch

    def _find(self, owner: Tensor, texts: list[str]) -> None:
        """Write the number of each probed word at its tokens."""
        model = self.tokenizer.model
        for row, (text, found) in enumerate(zip(texts, model.encode_batch(texts), strict=True)):
            spans: dict[int, list[int]] = {}
            for token, word in enumerate(found.word_ids[: owner.shape[1]]):
                if word is not None and not found.special_tokens_mask[token]:
                    spans.setdefault(word, []).append(token)
            for tokens in spans.values():
                said = text[found.offsets[tokens[0]][0] : found.offsets[tokens[-1]][1]].strip().lower()
                if said in self.number:
                    owner[row, tokens] = self.number[said]


class TokensTask:
    """Loaders and evaluator of one source of texts."""

    name = "tokens"
    headline = "word_accuracy"  # the measure it judges by; `probe_accuracy` where words have attributes
    contract = "tokens"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: TokenData, config: TokensConfig) -> None:
        if not isinstance(data, TokenData):
            raise CounterpointError(f"{data.name} has no texts, which the task tokens needs; name a source of texts")
        if not len(data.train) or not len(data.test):
            raise DataError(f"{data.name}: needs training and test texts, has {len(data.train)} and {len(data.test)}")
        self.data, self.config = data, config
        if data.valid.attributes:
            self.headline = "probe_accuracy"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: of these texts, or of a trained run (`check_facts`), which needs neither its teacher nor clips."""
        found: Tokenizer = self.config.tokenizer(self.data)
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data, self.tokenizer)
        return found

    def split(self, name: str) -> TokenSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: TokenSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small to monitor training."""
        check_watched(self.data.name, len(self.data.valid), "texts")

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer of a trained run, whose model these data are measured by."""
        self.tokenizer = Tokenizer.from_json(trained["tokenizers"][TEXT])
        self.facts = dict(trained)

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = Batches(len(self.data.train), self.config.batch_size) if batches is None else batches
        splits = [self.data.train, *([self.data.grounded] if self.data.grounded else [])]
        texts = _Texts(splits, self.tokenizer, self.config.context)
        return DataLoader(texts, batch_size=None, sampler=chosen.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | TokenSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these texts of a split as a learner's `predict` takes them."""
        return self._asked(self.split(split) if isinstance(split, str) else split)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the texts of a split, in order."""
        texts = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(texts)))) for start in range(0, len(texts), AT_ONCE)]
        return DataLoader(self._asked(texts), batch_size=None, sampler=at)

    def _asked(self, split: TokenSplit) -> _Asked:
        return _Asked(split, _words(split), self.facts, self.tokenizer, self.config.context)

    def evaluator(self, split: str) -> TokensEvaluator:
        found = self.split(split)
        return TokensEvaluator(found, _words(found))


def _words(split: TokenSplit) -> list[str]:
    """Return all words that a split probes."""
    return list(dict.fromkeys(word for levels in split.attributes.values() for word in levels))


TASK = TokensTask
