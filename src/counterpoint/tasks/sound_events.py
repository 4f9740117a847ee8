"""Learn from clips of two sound events, which each step composes of labelled sounds and their captions.

An event is a class of the data or, where the data have no classes, a caption. Training items without a known class form no clip;
they are counted and named. A learner may start from another: `--start`

    run:RUN                 a finished run of clip, siglip or a system alike, on sounds and texts of the same form
    fit:SLUG?data=SOURCE    such a run, which is trained once and kept in the cache
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.operands import EPS
from counterpoint.encoders.audio import build_audio_encoder
from counterpoint.encoders.text import Tokenizer, build_text_encoder
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, one_each
from counterpoint.tasks.class_texts import names_of
from counterpoint.tasks.ladder import CLIPS, RUNGS, SEQUENTIAL, Space, ladder, ladder_figures
from counterpoint.views.sounds import Sounds, other_kind, sounding
from counterpoint.words import counted

Rows = NDArray[np.int64]
NEUTRAL, OVERLAP = "{} and {}", "{} while {}"


class Pairs(NamedTuple):
    """A batch's items, each with a partner of another event, and draws for each pair."""

    one: Sounds
    other: Sounds
    words: list[tuple[str, str]]  # both captions
    i: Int[Tensor, " n"]  # number of the item's event
    j: Int[Tensor, " n"]  # number of the partner's event
    coin: Bool[Tensor, " n"]
    second_coin: Bool[Tensor, " n"]
    dual: Bool[Tensor, " n"]  # whether the item becomes a clip of two events, in stages that also have single sounds

    def column(self, values: Bool[Tensor, " n"]) -> Bool[Tensor, "n 1"]:
        """Return values for each pair beside its samples."""
        return values[:, None].to(self.one.start.device)


@dataclass
class EventConfig(AlignedConfig):
    """Settings of learners of clips of two events."""

    audio_encoder: str = "frames-s"
    """The network for sounds: sound-s, frames-s, hf:NAME. It must see the order of time: frames-s does, sound-s hardly."""
    start: str = ""
    """Run to start from in place of training a base model: run:RUN or fit:SLUG?data=SOURCE, of sounds and texts."""

    head: Literal["linear", "batchnorm"] = "linear"
    """The projection: a linear map, or batch normalisation before it, with which a small base model learns in fewer steps."""

    adapts: ClassVar[bool] = False  # a base model is trained first, or replaces it

    def check(self) -> None:
        super().check()
        if self.start and self.start.partition(":")[0] not in ("run", "fit"):
            raise CounterpointError(
                f"--start {self.start}: name a run of sounds and texts, run:RUN or fit:SLUG?data=SOURCE"
            )

    def tokenizer(self, captions: Sequence[str]) -> Tokenizer:
        """Return the tokenizer of the run to start from; else learn one from captions and the words between events."""
        if self.start:
            begun, _, text = started(self.start)
            return Tokenizer.from_json(begun.facts.tokenizers[text])
        some = sorted({caption for caption in captions if caption.strip()})[:2]
        templates = (NEUTRAL, OVERLAP, *SEQUENTIAL)
        return super().tokenizer([*captions, *(words.format(a, a) for words in templates for a in some * 2)])


def started(start: str) -> tuple[AlignedLearner, str, str]:
    """Load the learner to start from, and the names of its sounds and its texts.

    Raises CounterpointError for a learner of other modalities, and what loading a run raises.
    """
    kind, _, rest = start.partition(":")
    room: Any = importlib.import_module("counterpoint.experiment")  # above this package
    found = room.load_learner(rest) if kind == "run" else room.fitted(rest)
    if not isinstance(found, AlignedLearner) or not found.embeds:
        raise CounterpointError(
            f"--start {start}: it does not embed sounds and texts; name a run of clip, siglip or teminal"
        )
    audio, text = one_each(found.facts.modalities, f"--start {start}: a start", "audio", "text")
    return found, audio, text


class EventLearner(AlignedLearner):
    """A learner of one audio and one text modality whose steps compose clips of two events.

    Args:
        slug: name of the system, for messages.
        moments: moments of a fit at which it keeps the ladder (`note`).

    Attributes:
        audio, text: names of the modalities.
        event_of: [training items] number of each item's event, -1 for one without; during a fit.
        names: texts of the events.
        base: names and sizes of the networks that a start replaced; {} while they are its own.
    """

    log_scale: nn.Parameter
    history: Tensor

    def __init__(self, config: Any, data: Any, seed: int = 0, *, slug: str, moments: Sequence[str]) -> None:
        self.audio, self.text = one_each(data.modalities, slug, "audio", "text")
        super().__init__(config, data, seed)
        self.slug, self.tokenizer = slug, Tokenizer.from_json(data.tokenizers[self.text])
        self.event_of: Rows = np.zeros(0, np.int64)
        self.names: list[str] = []
        self.base: dict[str, Any] = {}
        self.cut = torch.zeros(2, dtype=torch.long)  # sounds of this epoch that lose their end, and all
        self.moments = tuple(moments)
        # The ladder on `valid` at each moment; -1 where it was not measured.
        self.register_buffer("history", torch.full((len(self.moments), len(RUNGS)), -1.0))
        self.told = False  # whether the user knows of them

    def build_head(self, dim: int) -> nn.Module:
        return _head(dim, self.config.embedding, self.config.head)

    # --- events

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        self.event_of, self.names, texts = self.events(survey, "train")
        usable = self.event_of >= 0
        known = np.unique(self.event_of[usable])
        if len(known) < 2:
            raise DataError(
                f"{self.slug} composes clips of two different events, and the training items have {len(known)}: give items "
                "with a sound, a caption and one of at least two classes. A manifest keeps equal captions in one split, unless its "
                "column `split` divides them"
            )
        if int(usable.sum()) < self.config.batch_size:
            raise DataError(
                f"{self.slug}: {counted(int(usable.sum()), 'training item has', 'training items have')} a sound, a caption and a "
                "known class, fewer than a batch "
                f"of {self.config.batch_size}; use --batch-size {int(usable.sum())} or less"
            )
        without = np.flatnonzero(~usable)
        if len(without):
            self.warnings.append(
                f"{self.slug}: {len(without)} of {counted(len(usable), 'training item has', 'training items have')} no sound, no "
                "caption or no known class, and are "
                f"in no clip of two events; the first is item {without[0]}"
            )
        if not survey.classes:
            self.warnings.append(
                f"{self.slug}: the data have no classes, so each of the {counted(len(known), 'different caption')} is an event "
                "of its own"
            )
        pairs = [SEQUENTIAL[0].format(text, text) for text in sorted(set(texts)) if text]
        long = self.tokenizer.too_long(pairs, self.config.context)
        if long:
            self.warnings.append(
                f"{self.slug}: {len(long)} of {counted(len(pairs), 'caption is', 'captions are')} so long that a text of two "
                "such events exceeds the context "
                f"of {self.config.context} tokens and loses its end, such as '{pairs[long[0]][:60]}'; use a larger --context"
            )

    def events(self, survey: Survey, split: str) -> tuple[Rows, list[str], list[str]]:
        """Return the event of each item of a split, -1 for none, the texts of all events, and the captions."""
        items = survey.split(split)
        at = np.arange(len(items))
        texts = [str(text).strip() for text in items.column(self.text, at)]
        both = items.present(self.audio, at) & items.present(self.text, at) & np.array([bool(t) for t in texts])
        if survey.classes:
            labels = np.full(len(at), -1) if items.labels is None else np.asarray(items.labels)
            return np.where(both, labels, -1), names_of(survey.classes, self.config.class_names), texts
        if not self.names:
            known = survey.split("train")
            self.names = sorted({str(text).strip() for text in known.column(self.text, np.arange(len(known)))} - {""})
        names = self.names
        number = {name: n for n, name in enumerate(names)}
        kinds = np.array([number.get(text, -1) for text in texts], np.int64)
        return np.where(both, kinds, -1), names, texts

    def captions(self, index: Tensor) -> list[str]:
        """Return the captions of training items."""
        assert self.survey is not None
        return [str(text).strip() for text in self.survey.split().column(self.text, index.cpu().numpy())]

    def encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers and mask of texts, on the learner's device."""
        ids, mask = self.tokenizer.encode(texts, self.config.context)
        return ids.to(self.device), mask.to(self.device)

    def count_cut(self, sounds: Sounds) -> None:
        """Count the sounds that last longer than half of a clip."""
        long = sounds.length > sounds.waves.shape[1] // 2
        self.cut += torch.stack([long.sum(), torch.tensor(len(long), device=long.device)]).cpu()

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if int(self.cut[0]) and not self.told:
            self.told = True
            spec = self.facts.modalities[self.audio]
            self.warnings.append(
                f"{self.slug}: {int(self.cut[0])} of {counted(int(self.cut[1]), 'sound lasts', 'sounds last')} longer than half "
                "of a clip, "
                f"{spec['samples'] / spec['rate'] / 2:g} s. A clip of two in a row keeps their beginning; longer clips (?seconds=) "
                "keep all"
            )
        self.cut.zero_()

    # --- clips

    def pairs(self, batch: dict[str, Any], generator: torch.Generator, share: float) -> Pairs:
        """Find a partner for each item of the whole batch, and return this process's pairs.

        Args:
            batch: items.
            generator: the source of randomness.
            share: share of the items that are `dual`; 0: no partner is needed, and each item is its own.

        Raises CounterpointError for a batch of one event.
        """
        total, mine = self.share(len(batch["index"]))
        index = self.whole(batch["index"]).cpu()
        sounds = sounding(self.whole(batch["inputs"][self.audio]))
        kinds, partner = torch.from_numpy(self.event_of[index.numpy()]), torch.arange(total)
        if share:
            if len(kinds.unique()) < 2:
                raise CounterpointError(
                    f"all {counted(total, 'item')} of a batch are of one event, so none has a partner of another; use a larger "
                    "--batch-size"
                )
            partner = other_kind(kinds, generator)
            self.count_cut(sounds)
        texts = self.captions(index)
        words = [(texts[n], texts[m]) for n, m in enumerate(partner.tolist())][mine]
        dual = torch.randperm(total, generator=generator) < round(share * total)
        coins = torch.rand(2, total, generator=generator) < 0.5
        both = sounds.at(mine), sounds.at(partner[mine].to(sounds.start.device))
        return Pairs(*both, words, kinds[mine], kinds[partner][mine], coins[0, mine], coins[1, mine], dual[mine])

    def rows(self, name: str, values: Any) -> Float[Tensor, "n embedding"]:
        """Compute unit embeddings of composed sounds, or of texts as token numbers and mask."""
        return F.normalize(self.projected(name, values), dim=1, eps=EPS)

    # --- the ladder

    @torch.no_grad()
    def climbed(self, survey: Survey, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Measure the ladder on the items of a split, and its chance levels; {} where fewer than two events are there."""
        kinds, names, _ = self.events(survey, split)
        known = np.flatnonzero(kinds >= 0)
        if not len(known):
            return {}, {}
        known = np.random.default_rng(0).permutation(known)[:CLIPS]  # memory does not grow with the split
        waves = survey.batch(split, known)["inputs"][self.audio]
        training = self.training
        self.eval()
        try:
            space = Space(
                lambda clips: self.rows(self.audio, clips).float(),
                lambda texts: self.rows(self.text, self.encoded(texts)).float(),
            )
            return ladder(space, waves, torch.from_numpy(kinds[known]), names)
        finally:
            self.train(training)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        return {f"ladder_{name}": value for name, value in self.climbed(survey, split)[0].items()}

    def note(self, moment: int, survey: Survey) -> None:
        """Keep the ladder on `valid` at a moment."""
        found = self.climbed(survey, "valid")[0]
        if found:
            self.history[moment] = torch.tensor([found[name] for name in RUNGS]).to(self.history)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the ladder on `valid` at every moment, with chance."""
        rows = zip(self.moments, self.history.cpu(), strict=True)
        kept = {name: row.tolist() for name, row in rows if bool((row >= 0).all())}
        return super().figures(survey) | ladder_figures(kept, self.climbed(survey, "valid")[1])

    # --- another run to start from

    def adopt(self, start: str) -> None:
        """Replace the networks and the scale by those of a run. CounterpointError where its sounds have another form."""
        other, audio, text = started(start)
        own, theirs = (dict(facts.modalities[name]) for facts, name in ((self.facts, self.audio), (other.facts, audio)))
        if own != theirs:
            raise CounterpointError(
                f"--start {start}: its sounds have {theirs['samples']} samples at {theirs['rate']} Hz, those of the data "
                f"{own['samples']} at {own['rate']} Hz; give the same ?rate= and ?seconds="
            )
        config = other.config
        if self.config.context > config.context:
            raise CounterpointError(
                f"--start {start}: its texts have at most {config.context} tokens; use --context {config.context} or less, got "
                f"{self.config.context}"
            )
        inherited = getattr(other, "base", {})
        names = ("audio_encoder", "text_encoder", "embedding", "context")
        own_head = {"head": getattr(config, "head", "linear")}
        self.restructure(inherited or {name: getattr(config, name) for name in names} | own_head)
        for mine, name in ((self.audio, audio), (self.text, text)):
            self.encoders[mine].load_state_dict(other.encoders[name].state_dict())
            self.heads[mine].load_state_dict(other.heads[name].state_dict())
        scale = getattr(other, "log_scale", None)
        if isinstance(scale, Tensor) and not scale.ndim:
            with torch.no_grad():
                self.log_scale.copy_(scale)

    def structure(self) -> dict[str, Any]:
        return dict(self.base)

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if not structure:
            return
        self.base, device = dict(structure), self.device
        spec = self.facts.modalities[self.audio]
        self.encoders[self.audio] = build_audio_encoder(structure["audio_encoder"], spec["rate"], spec["samples"])
        self.encoders[self.text] = build_text_encoder(
            structure["text_encoder"], vocabulary=self.tokenizer.vocabulary, length=structure["context"]
        )
        for name in (self.audio, self.text):
            encoder: Any = self.encoders[name]
            self.heads[name] = _head(encoder.dim, structure["embedding"], structure["head"])
        self.to(device)


def _head(dim: int, embedding: int, kind: str) -> nn.Module:
    linear = nn.Linear(dim, embedding, bias=False)
    return nn.Sequential(nn.BatchNorm1d(dim), linear) if kind == "batchnorm" else linear
