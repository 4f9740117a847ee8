"""The task `aligned`: items seen in several modalities at once, brought together in one space.

    batch["inputs"]   {modality: tensor, or (ids, mask) for text}; images uint8 [B, 3, H, W] until the learner prepares them
    batch["present"]  {modality: [B] bool}; what stands where a modality is missing is zeros, and is not encoded
    batch["index"]    [B] positions in the training set
    batch["label"]    [B] int64, -1 where there is none, or None

A learner's `predict` gives {"embedding": {modality: [n, dim] unit rows}}. Measured (tasks/measures.py) are retrieval from
every modality to every other (recall at 1, 5 and 10, mean reciprocal rank), how far two modalities lie apart (core/gap.py),
and, where items have classes, zero-shot classification: by prompts if a modality is text, else by the mean embedding of each
class in another modality over training items. At the end a linear probe is fitted.

Of the user's own data a found item is right where it is the query's own, or has in common with it the picture, sound, text
or vector in the modality that is asked with or searched in: all five captions of a picture are right for it. Of built-in
data, items with the very same words or vector count as the same.

Where items were cut from something larger (`groups`), the votes of what they retrieve name it.
Test splits of other domains (`shifts`) are measured alike, their figures named <shift>_....
A learner may also give
    "joint"              {modality: [n, dim]}, what all other modalities together look for it by: retrieval from several to one
    "<name>_embedding"   a further embedding of the same form, measured alike: its figures are named <name>_...
    "logits"             [n, classes], where it classifies: the share of labelled items told right is its `accuracy`
    "measures"           {name: number}, what it has measured itself
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tyro.conf import Suppress

from counterpoint.core.contrast import EPS
from counterpoint.core.distributed import place
from counterpoint.core.gap import gap_metrics
from counterpoint.core.world import processes
from counterpoint.data.images import Indices
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.data.shown import shown
from counterpoint.encoders.audio import build_audio_encoder, check_audio_encoder
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.text import Tokenizer, build_text_encoder, build_tokenizer, check_text_encoder
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig, optimisers
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.tasks.measures import (
    RECALL,
    class_chance,
    class_means,
    decided_shares,
    gallery_rows,
    identification,
    linear_probe,
    principal_axes,
    retrieval,
    retrieval_chance,
    zero_shot_accuracy,
)
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.views.images import ViewPipeline, check_recipe, normalise

BATCH = 256  # of evaluation
EXAMPLES = 2048  # training items that stand for their classes, at most
# What of the gap between two modalities is reported, under which name.
GAP = {
    "centroid_distance": "centroid_distance",
    "separability": "linear_separability",
    "uniformity": "total_uniformity_loss",
    "alignment": "alignment",
}
SHOWN = 6  # queries of the gallery for each direction, and what each found
DRAWN = 400  # items of each modality in the picture of the space
GAP_PAIRS = 1000  # test items that the gap between two modalities is measured on, at most


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class AlignedConfig(OptimConfig):
    """What every learner of this task can be told."""

    epochs: int = 32
    """Passes over the training items."""
    batch_size: int = 256
    """Items in a batch, over all processes together. The last, smaller batch of an epoch is left out."""
    image_encoder: str = "torchvision:resnet50"
    """The network for images: resnet-s, conv-s, mlp-s, vit-s, timm:NAME, torchvision:NAME, hf:NAME."""
    text_encoder: str = "text-s"
    """The network for text: text-s, minilm, hf:NAME."""
    audio_encoder: str = "sound-s"
    """The network for sounds: sound-s, hf:NAME."""
    vector_encoder: str = "mlp"
    """The network for vectors: mlp (normalised, 256 wide, GELU), linear, relu-WIDTH-WIDTH..., or as-is: features already."""
    vector_noise: float = 0.0
    """Standard deviation of the noise that is added to training vectors."""
    pretrained: bool = False
    """Start from published weights where the image encoder has them."""
    embedding: int = 512
    """Width of the shared space."""
    context: int = 77
    """Tokens of a text that are read at most."""
    vocabulary: int = 2000
    """Tokens that text-s learns from the training captions."""
    recipe: str = "weak"
    """How training images are varied: simclr, simclr-cifar, supcon, moco-v1, moco-v2, byol, swav, dino, dino-cifar, adainf,
    adainf-cifar, mae, supervised, weak, none; for small digits digits-easy, digits-plain, digits-shifted, digits-hard,
    digits-s0, digits-s25, digits-s50, digits-s100, digit-patterns; clusters (see counterpoint.views.images.RECIPES)."""
    prompt: str = "{}"
    """A class's prompt in zero-shot classification; {} is the class's name."""
    evaluate_every: int = 5
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 0
    """Processes that read items ahead; 0 reads in the main process."""
    constant_lr: bool = False
    """Keep the learning rate as it is from the first step to the last."""
    parts: Annotated[dict[str, Any], Suppress] = field(default_factory=dict)
    """Settings of the parts over the system, by slug."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "embedding", "context", "vocabulary", "evaluate_every"):
            if getattr(self, name) < 1:
                raise CounterpointError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vector_noise < 0:
            raise CounterpointError(f"vector_noise must not be negative, got {self.vector_noise}")
        if "{}" not in self.prompt:
            raise CounterpointError(f"a prompt needs {{}} where the class's name goes, got '{self.prompt}'")

    def check_batch(self) -> None:
        """Raise CounterpointError for a batch in which nothing can be contrasted."""
        if self.batch_size < 2:
            raise CounterpointError("batch_size must be at least 2: items are contrasted within a batch")

    def check(self) -> None:
        """Raise CounterpointError for names of networks and views that do not exist. Called before data are read."""
        check_image_encoder(self.image_encoder)
        check_text_encoder(self.text_encoder)
        check_audio_encoder(self.audio_encoder)
        check_recipe(self.recipe)
        self.check_batch()


# What a small set on a few cores asks for instead of the papers' settings; systems add what is theirs.
LAPTOP: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 256,
    "image_encoder": "resnet-s",
    "text_encoder": "text-s",
    "embedding": 128,
    "context": 16,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
}


# ---------------------------------------------------------------------------------------------------------- the learner


class AlignedLearner(Learner):
    """An encoder and a linear projection for each modality. Subclasses write `loss(batch)`, usually on `embed(batch)`."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        self.kinds: dict[str, str] = {name: spec["kind"] for name, spec in data.modalities.items()}
        torch.manual_seed(seed)
        self.encoders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.views: dict[str, ViewPipeline] = {}
        for name, spec in data.modalities.items():
            encoder: Any = self.build_encoder(spec, data.tokenizers.get(name))
            self.encoders[name] = encoder
            self.heads[name] = self.build_head(encoder.dim)
            if spec["kind"] == "image":
                self.views[name] = ViewPipeline(spec["size"], crops=1, recipe=config.recipe)

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        """The network for one modality, by its kind."""
        if spec["kind"] == "image":
            return build_image_encoder(self.config.image_encoder, spec["size"], pretrained=self.config.pretrained)
        if spec["kind"] == "text":
            assert tokenizer is not None
            vocabulary = Tokenizer.from_json(tokenizer).vocabulary
            return build_text_encoder(self.config.text_encoder, vocabulary=vocabulary, length=self.config.context)
        if spec["kind"] == "vector":
            return build_vector_encoder(self.config.vector_encoder, spec["dim"])
        if spec["kind"] == "audio":
            return build_audio_encoder(self.config.audio_encoder, spec["rate"], spec["samples"])
        raise unknown("kind of modality", spec["kind"], ["image", "text", "audio", "vector"])

    def build_head(self, dim: int) -> nn.Module:
        """What brings an encoder's output, `dim` wide, into the shared space."""
        return nn.Linear(dim, self.config.embedding, bias=False)

    def features(self, name: str, values: Any) -> Float[Tensor, "n dim"]:
        """One modality's encoder on its inputs, which are a tensor or, for text, numbers and mask."""
        return self.encoders[name](*values) if isinstance(values, tuple | list) else self.encoders[name](values)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        inputs = dict(batch["inputs"])
        if self.config.vector_noise:
            for name in (name for name, kind in self.kinds.items() if kind == "vector"):
                total, mine = self.share(len(inputs[name]))
                noise = torch.randn(total, *inputs[name].shape[1:], generator=generator)[mine]
                inputs[name] = inputs[name] + self.config.vector_noise * noise.to(inputs[name].device)
        for name, pipeline in self.views.items():
            images = inputs[name]
            total, mine = self.share(len(images))
            drawn = pipeline.draw((total, *images.shape[1:]), generator)
            inputs[name] = pipeline.apply(images, [view.take(mine) for view in drawn])[0]
        return batch | {"inputs": inputs}

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        """Unit embeddings of every modality; zeros where an item lacks it."""
        present = batch.get("present", {})
        found = {}
        for name, values in batch["inputs"].items():
            rows = there(present.get(name))
            z = F.normalize(self.heads[name](self.features(name, taken(values, rows))), dim=1, eps=EPS)
            found[name] = z if rows is None else z.new_zeros(len(present[name]), z.shape[1]).index_copy(0, rows, z)
        return found

    def paired_rows(
        self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> list[tuple[Float[Tensor, "m dim"], Float[Tensor, "m dim"], Bool[Tensor, " n"]]]:
        """What a method for two modalities contrasts: for every two, the rows of the items that have both, and which items
        those are. Two modalities that no item of the batch has together are left out, in all processes alike."""
        found = []
        for a, b in itertools.combinations(embeddings, 2):
            both = batch["present"][a] & batch["present"][b]
            if place(int(both.sum()), self.device).total > 0:
                found.append((embeddings[a][both], embeddings[b][both], both))
        if not found:
            raise CounterpointError("no item of a batch has two modalities: there is nothing to contrast")
        return found

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = self.embed(batch)
        if len(found) < 3:
            return {"embedding": found}
        return {"embedding": found, "joint": {name: self.joint(rest) for name, rest in each_without(found)}}

    def joint(self, embeddings: Sequence[Float[Tensor, "n dim"]]) -> Float[Tensor, "n dim"]:
        """What an item in several modalities is sought by in one more: the candidate of the largest dot product is it."""
        return torch.stack(list(embeddings)).sum(0)

    def turns(self) -> list[Turn]:
        config = self.config
        constant = self.parameters() if config.constant_lr else ()
        steps = self.steps_per_epoch
        return [optimisers(config, [self], self.epochs, config.batch_size, constant, steps_per_epoch=steps)]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [
            (encoder, method)
            for encoder in self.encoders.values()
            for method in ("forward", "tokens")
            if hasattr(encoder, method)
        ]


def there(present: Tensor | None) -> Int[Tensor, " m"] | None:
    """Positions of the items that have a modality; None when all do, or so few that an encoder had better see all."""
    if present is None or bool(present.all()):
        return None
    rows = present.nonzero().flatten()
    # Batch normalisation needs two; and every process must reach every parameter.
    return rows if len(rows) > 1 else None


def taken(values: Any, rows: Tensor | None) -> Any:
    """These rows of a modality's inputs, which are a tensor or, for text, numbers and mask."""
    if rows is None:
        return values
    return tuple(part[rows] for part in values) if isinstance(values, tuple | list) else values[rows]


def first_two(modalities: Mapping[str, Any]) -> tuple[str, str]:
    """The two modalities of a pairwise method: the only two, or an error that names them all."""
    if len(modalities) != 2:
        raise CounterpointError(f"this method aligns two modalities, the data has {', '.join(modalities)}")
    a, b = modalities
    return a, b


def each_without(values: Mapping[str, Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Each name with the values of all others."""
    return [(name, [value for other, value in values.items() if other != name]) for name in values]


def build_vector_encoder(name: str, inputs: int) -> nn.Module:
    """An encoder, [n, inputs] -> [n, dim], by name (see `AlignedConfig.vector_encoder`). CounterpointError for another."""
    if name == "mlp":
        return VectorEncoder(inputs)
    widths = name.split("-")[1:]
    if name in ("linear", "as-is"):
        return LayeredEncoder(inputs, (), bias=name == "linear")
    if name.startswith("relu-") and all(width.isdecimal() and int(width) for width in widths):
        return LayeredEncoder(inputs, [int(width) for width in widths])
    raise unknown("vector encoder", name, ["mlp", "linear", "as-is", "relu-128-128"])


class LayeredEncoder(nn.Module):
    """Linear layers with ReLU behind each; without any, the vectors as they are, with a 1 at the end if there is a bias.

    The head that follows has no bias, so that 1 makes it an affine map.
    """

    def __init__(self, inputs: int, widths: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        self.bias = bias
        self.dim = sizes[-1] + bias
        self.layers = nn.Sequential()
        for a, b in itertools.pairwise(sizes):
            self.layers.extend([nn.Linear(a, b), nn.ReLU()])

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n dim"]:
        x = self.layers(x)
        return F.pad(x, (0, 1), value=1.0) if self.bias else x


class VectorEncoder(nn.Module):
    """For modalities that are vectors already: two linear layers with GELU and a normalisation before them."""

    def __init__(self, inputs: int, dim: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n dim"]:
        return self.layers(x)


# ------------------------------------------------------------------------------------------------------------- the task


class _Batches(Dataset[dict[str, Any]]):
    """A split, read by lists of positions."""

    def __init__(
        self, data: AlignedData, split: AlignedSplit, tokenizers: Mapping[str, Tokenizer], length: int
    ) -> None:
        self.data, self.split, self.tokenizers, self.length = data, split, tokenizers, length

    def inputs(self, name: str, rows: Any) -> Any:
        column = self.split.column(name, rows)
        kind = self.data.modalities[name].kind
        if kind == "text":
            return self.tokenizers[name].encode([str(text) for text in column], self.length)
        tensor = torch.from_numpy(np.asarray(column))
        return tensor.permute(0, 3, 1, 2).contiguous() if kind == "image" else tensor

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)
        labels = self.split.labels
        return {
            "inputs": {name: self.inputs(name, rows) for name in self.data.modalities},
            "present": {name: torch.from_numpy(self.split.present(name, rows)) for name in self.data.modalities},
            "index": torch.from_numpy(rows),
            "label": None if labels is None else torch.from_numpy(labels[rows]),
        }

    def __len__(self) -> int:
        return len(self.split)


class _AskedBatches(Dataset[dict[str, Any]]):
    """The items of every split that is measured, then what says what a class is: its prompts as a batch of texts alone, and
    training items."""

    def __init__(self, splits: Mapping[str, _Batches], prompts: dict[str, Any] | None, examples: _Batches) -> None:
        self.prompts = prompts
        self.at = [
            (prefix, batches, list(range(start, min(start + BATCH, len(batches)))))
            for prefix, batches in splits.items()
            for start in range(0, len(batches), BATCH)
        ]
        labels = examples.split.labels
        known = np.array([], np.int64) if labels is None else np.flatnonzero(labels >= 0)
        # The first ones would be of one kind where a set is in order.
        chosen = np.random.RandomState(0).permutation(known)[:EXAMPLES].tolist() if len(known) else []
        self.examples = [(examples, chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < len(self.at):
            prefix, batches, rows = self.at[number]
            return _evaluated(batches, rows, "items") | {"split": prefix}
        number -= len(self.at)
        if self.prompts is not None:
            if number == 0:
                return {"inputs": self.prompts, "part": "prompts"}
            number -= 1
        return _evaluated(*self.examples[number], "examples")

    def __len__(self) -> int:
        return len(self.at) + (self.prompts is not None) + len(self.examples)


def _evaluated(batches: _Batches, rows: list[int], part: str) -> dict[str, Any]:
    """Items as `predict` takes them: images normalised, nothing varied."""
    batch = batches[rows]
    kinds = batches.data.modalities
    batch["inputs"] = {k: normalise(v) if kinds[k].kind == "image" else v for k, v in batch["inputs"].items()}
    return batch | {"part": part}


class _Seen:
    """One split that is measured: what counts as the same in it, and what a learner said of its items."""

    def __init__(self, data: AlignedData, split: AlignedSplit, comparable: bool = True) -> None:
        self.data, self.split, self.comparable = data, split, comparable
        rows = np.arange(len(split))
        # What the source knows of items that are one thing in a modality.
        known = getattr(split, "same", None)
        self.known: dict[str, Tensor] = {}
        for name in data.modalities:
            numbers = None if known is None else known(name)
            if numbers is not None:
                self.known[name] = _apart(torch.from_numpy(numbers))
        # Items with the very same text are one: a picture of "arrow" may be found by any of its captions.
        self.worded: Tensor | None = None
        for name, modality in data.modalities.items():
            if modality.kind == "text" and not self.known:
                first: dict[str, int] = {}
                texts = split.column(name, rows)
                self.worded = torch.tensor([first.setdefault(str(t), n) if t else n for n, t in enumerate(texts)])
                break
        # What is the very same thing in a modality cannot be told apart there, whatever else the items are.
        self.same = {name: self.known.get(name, self._same(name, rows)) for name in data.modalities}
        self.groups = None if split.groups is None else torch.from_numpy(split.groups)
        self.reset()

    def _same(self, name: str, rows: Any) -> Tensor:
        if name in self.known or self.data.modalities[name].kind not in ("text", "vector"):
            return torch.from_numpy(rows)
        column = self.split.column(name, rows)
        if isinstance(column, list):  # an array of texts would have the longest one's width in every row
            first: dict[str, int] = {}
            return torch.tensor([first.setdefault(str(text), n) for n, text in enumerate(column)])
        return torch.from_numpy(np.unique(np.asarray(column), axis=0, return_inverse=True)[1].reshape(-1))

    def reset(self) -> None:
        # By embedding, "" for the learner's own, then by modality.
        self.embeddings: dict[str, dict[str, list[Tensor]]] = {}
        self.present: dict[str, list[Tensor]] = {}
        self.queries: dict[str, list[Tensor]] = {}
        self.labels: list[Tensor] = []
        self.logits: list[Tensor] = []

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        for prefix, found in _embeddings(outputs):
            for name, value in found.items():
                self.embeddings.setdefault(prefix, {}).setdefault(name, []).append(value)
        for name, query in outputs.get("joint", {}).items():
            self.queries.setdefault(name, []).append(query.detach().float().cpu())
        for name, mask in batch["present"].items():
            self.present.setdefault(name, []).append(mask.cpu())
        if "logits" in outputs and self.comparable:
            self.logits.append(outputs["logits"].detach().float().cpu())
        if batch["label"] is not None:
            self.labels.append(batch["label"].cpu())

    def whole(self, prefix: str) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.embeddings[prefix].items()}

    @property
    def there(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.present.items()}

    @property
    def label(self) -> Tensor | None:
        return torch.cat(self.labels) if self.labels else None

    def right(self, query: str, key: str) -> Int[Tensor, "items columns"]:
        """Numbers of items: an item is right for another's query where they have one in common, column by column.

        Args:
            query: the modality that is asked with.
            key: the modality that is searched in.
        """
        if self.worded is not None:
            return self.worded[:, None]
        return torch.stack([self.same[query], self.same[key]] if self.known else [self.same[key]], 1)

    def compute(
        self,
        prompts: Mapping[str, Mapping[str, Tensor]],
        examples: Mapping[str, Mapping[str, list[tuple[Tensor, Tensor]]]],
        final: bool,
    ) -> dict[str, float]:
        labels, found = self.label, {}
        if self.logits and labels is not None:
            known = labels >= 0
            found["accuracy"] = float(decided_shares(torch.cat(self.logits)[known], labels[known]).mean())
        for prefix in self.embeddings:
            all_of = self.whole(prefix)
            if not all(bool(torch.isfinite(value).all()) for value in all_of.values()):
                raise CounterpointError("the embeddings hold NaN or infinite values: training diverged; lower --lr")
            measured = self._retrieval(all_of) | self._gap(all_of)
            if labels is not None:
                if prefix in prompts:
                    measured |= self._by_prompts(all_of, labels, prompts[prefix])
                else:
                    measured |= self._by_examples(all_of, labels, examples.get(prefix, {}))
                if final:
                    measured |= self._by_probe(all_of, labels, examples.get(prefix, {}))
            found |= {f"{prefix}{k}": v for k, v in measured.items()}
        return found | self._joint(self.whole(""))

    def _retrieval(self, all_of: dict[str, Tensor]) -> dict[str, float]:
        there, found, more = self.there, dict[str, float](), dict[str, float]()
        for a, b in itertools.permutations(all_of, 2):
            query, key = all_of[a][there[a]], all_of[b][there[b]]
            right = self.right(a, b)
            measured = retrieval(query, key, right[there[a]], right[there[b]])
            found |= {f"{a}_to_{b}_r{k}": measured[f"r{k}"] for k in RECALL}
            more[f"{a}_to_{b}_mrr"] = measured["mrr"]
            if self.groups is not None:
                told = identification(query, key, self.groups[there[a]], self.groups[there[b]])
                more |= {f"{a}_to_{b}_group_{name}": value for name, value in told.items()}
        # Two modalities that no item of the split has together have no figure.
        mean = {"mean_recall": float(np.nanmean(list(found.values())))} if found else {}
        if len(all_of) > 2:
            for b, k in itertools.product(all_of, RECALL):
                more[f"to_{b}_r{k}"] = float(np.mean([found[f"{a}_to_{b}_r{k}"] for a in all_of if a != b]))
        return mean | found | more

    def _gap(self, all_of: dict[str, Tensor]) -> dict[str, float]:
        there, found = self.there, dict[str, float]()
        for a, b in itertools.combinations(all_of, 2):
            both = (there[a] & there[b]).nonzero().flatten()[:GAP_PAIRS]
            if len(both) > 1:
                gap = gap_metrics(all_of[a][both], all_of[b][both])
                found |= {f"{a}_{b}_{short}": gap[name] for short, name in GAP.items()}
        return found

    def _joint(self, keys: dict[str, Tensor]) -> dict[str, float]:
        """Retrieval from all other modalities together, of items that have them all."""
        if not self.queries:
            return {}
        whole = torch.stack(list(self.there.values())).all(0)
        found: dict[str, float] = {}
        for name, parts in self.queries.items():
            others = "_and_".join(other for other in keys if other != name)
            groups = self._joint_groups(name, list(keys), whole)
            measured = retrieval(torch.cat(parts)[whole], keys[name][whole], groups, groups)
            found |= {f"{others}_to_{name}_r{k}": measured[f"r{k}"] for k in RECALL}
        figures = found | {"joint_recall": float(np.mean(list(found.values())))}
        if self.label is not None and bool((known := whole & (self.label >= 0)).any()):
            # Of the class alone: where several items show the same thing.
            for name, parts in self.queries.items():
                others = "_and_".join(other for other in keys if other != name)
                classes = self.label[known]
                told = retrieval(torch.cat(parts)[known], keys[name][known], classes, classes)
                figures[f"{others}_to_{name}_class_r1"] = told["r1"]
        return figures

    def _joint_groups(self, name: str, modalities: Sequence[str], whole: Tensor) -> Int[Tensor, "items columns"]:
        """Numbers of the items that have all modalities: equal in a column where one is right for the other's query."""
        groups = self.same[name][whole, None]
        if self.known:  # the same in all that is asked with, or in what is searched
            asked = torch.stack([self.same[other] for other in modalities if other != name], 1)
            groups = torch.cat([groups, asked.unique(dim=0, return_inverse=True)[1][whole, None]], 1)
        return groups

    def chance(
        self,
        prompts: Mapping[str, Mapping[str, Tensor]],
        examples: Mapping[str, Mapping[str, list[tuple[Tensor, Tensor]]]],
    ) -> dict[str, float]:
        """Return the chance level of recalls and accuracies: that of keys in random order, and 1 / classes."""
        found: dict[str, float] = {}
        if self.logits:
            found["accuracy"] = class_chance(self.logits[0].shape[1])
        for prefix in self.embeddings:
            made = self._retrieval_chance(list(self.embeddings[prefix]))
            for name in self.embeddings[prefix]:
                for of_classes in prompts.get(prefix, {}).values():
                    made[f"{name}_zero_shot"] = class_chance(len(of_classes))
                for other, parts in examples.get(prefix, {}).items():
                    classes = class_chance(len(torch.cat([part for _, part in parts]).unique()))
                    made[f"{name}_from_{other}_zero_shot"] = made[f"{other}_linear_accuracy"] = classes
            found |= {f"{prefix}{name}": value for name, value in made.items()}
        return found | self._joint_chance(list(self.embeddings.get("", {})))

    def _retrieval_chance(self, modalities: Sequence[str]) -> dict[str, float]:
        there, found, more = self.there, dict[str, float](), dict[str, float]()
        for a, b in itertools.permutations(modalities, 2):
            right = self.right(a, b)
            made = retrieval_chance(right[there[a]], right[there[b]])
            found |= {f"{a}_to_{b}_r{k}": made[f"r{k}"] for k in RECALL}
            more[f"{a}_to_{b}_mrr"] = made["mrr"]
            if self.groups is not None:
                more[f"{a}_to_{b}_group_accuracy"] = class_chance(len(self.groups[there[b]].unique()))
        known = [value for value in found.values() if value == value]
        mean = {"mean_recall": float(np.mean(known))} if known else {}
        if len(modalities) > 2:
            for b, k in itertools.product(modalities, RECALL):
                more[f"to_{b}_r{k}"] = float(np.mean([found[f"{a}_to_{b}_r{k}"] for a in modalities if a != b]))
        return mean | found | more

    def _joint_chance(self, modalities: Sequence[str]) -> dict[str, float]:
        if not self.queries:
            return {}
        whole = torch.stack(list(self.there.values())).all(0)
        found, by_class = dict[str, float](), dict[str, float]()
        for name in self.queries:
            others = "_and_".join(other for other in modalities if other != name)
            groups = self._joint_groups(name, modalities, whole)
            made = retrieval_chance(groups, groups)
            found |= {f"{others}_to_{name}_r{k}": made[f"r{k}"] for k in RECALL}
            if self.label is not None and bool((known := whole & (self.label >= 0)).any()):
                made = retrieval_chance(self.label[known], self.label[known])
                by_class[f"{others}_to_{name}_class_r1"] = made["r1"]
        return found | {"joint_recall": float(np.mean(list(found.values())))} | by_class

    def _by_prompts(self, all_of: dict[str, Tensor], labels: Tensor, prompts: Mapping[str, Tensor]) -> dict[str, float]:
        ((text, of_classes),) = prompts.items()
        there = self.there
        return {
            f"{name}_zero_shot": zero_shot_accuracy(value[there[name]], of_classes, labels[there[name]])
            for name, value in all_of.items()
            if name != text
        }

    def _by_examples(
        self, all_of: dict[str, Tensor], labels: Tensor, examples: Mapping[str, list[tuple[Tensor, Tensor]]]
    ) -> dict[str, float]:
        """Classes told by the mean embedding of training items in another modality."""
        there, found = self.there, {}
        for other, parts in examples.items():
            rows, classes = (torch.cat(part) for part in zip(*parts, strict=True))
            if not len(rows):  # no training item of a class has this modality
                continue
            means, numbers = class_means(rows, classes)
            # A class without an example cannot be named: its items are left out.
            at = torch.full((int(max(labels.max(), classes.max())) + 2,), -1)  # the last for label -1
            at[numbers] = torch.arange(len(numbers))
            for name in (name for name in all_of if name != other):
                known = there[name]
                found[f"{name}_from_{other}_zero_shot"] = zero_shot_accuracy(
                    all_of[name][known], means, at[labels[known]]
                )
        return found

    def _by_probe(
        self, all_of: dict[str, Tensor], labels: Tensor, examples: Mapping[str, list[tuple[Tensor, Tensor]]]
    ) -> dict[str, float]:
        """Classes told by logistic regression on training items' embeddings in the same modality."""
        found = {}
        for name, parts in examples.items():
            rows, classes = (torch.cat(part) for part in zip(*parts, strict=True))
            known = self.there[name] & (labels >= 0)
            if len(classes.unique()) > 1 and bool(known.any()):
                found[f"{name}_linear_accuracy"] = linear_probe(rows, classes, all_of[name][known], labels[known])[0]
        return found


def _apart(numbers: Tensor) -> Tensor:
    """Numbers of what is the same, where each item that lacks the modality (-1) is like no other."""
    lone = numbers < 0
    return torch.where(lone, -1 - torch.arange(len(numbers)), numbers)


def _embeddings(outputs: Mapping[str, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """(name, by modality) of the embeddings a learner gives; "" is the name of its own."""
    return [
        (key.removesuffix("embedding"), {name: value.detach().float().cpu() for name, value in outputs[key].items()})
        for key in outputs
        if key.endswith("embedding")
    ]


def measured_splits(data: AlignedData, split: str) -> dict[str, AlignedSplit]:
    """The splits that are measured together, by the prefix of their figures: "" for valid or test, then the shifts of test."""
    shifts = {f"{name}_": part for name, part in data.shifts.items()} if split == "test" else {}
    return {"": named_split(data, split), **shifts}


class AlignedEvaluator:
    """Retrieval between all modalities, the gap between them, classes and wholes told by them, of a split and its shifts.

    Args:
        data: the data.
        learned: the classes that a learner's logits stand for; default: those of the data.
        split: the split that is measured: valid, or test with its `shifts`.
    """

    def __init__(self, data: AlignedData, learned: Sequence[str] | None = None, split: str = "test") -> None:
        self.data = data
        # A classifier of other classes cannot be right or wrong here.
        comparable = learned is None or list(learned) == list(data.classes or ())
        splits = measured_splits(data, split)
        self.split = splits[""]
        self.seen = {name: _Seen(data, part, comparable) for name, part in splits.items()}
        self.reset()

    def reset(self) -> None:
        for seen in self.seen.values():
            seen.reset()
        self.prompts: dict[str, dict[str, Tensor]] = {}
        # By embedding, then by modality: embeddings of training items, and the classes of those that have the modality.
        self.examples: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self.measures: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self.found: tuple[str, ...] = ()  # names of the last figures

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        self.measures |= outputs.get("measures", {})
        if batch["part"] == "items":
            self.seen[batch["split"]].update(batch, outputs)
            return
        for prefix, found in _embeddings(outputs):
            if batch["part"] == "prompts":
                self.prompts[prefix] = found
                continue
            for name, value in found.items():
                known = batch["present"][name].cpu()
                pairs = self.examples.setdefault(prefix, {}).setdefault(name, [])
                pairs.append((value[known], batch["label"].cpu()[known]))

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = dict(self.measures)
        for split, seen in self.seen.items():
            if seen.embeddings:
                measured = seen.compute(self.prompts, self.examples, final)
                # What nothing was asked of has no figure.
                found |= {f"{split}{name}": value for name, value in measured.items() if value == value}
        if final:
            self.figures = self._space() | self._gallery()
        self.found = tuple(found)
        return found

    def chance(self) -> dict[str, float]:
        """Return the chance level of each recall and accuracy that `compute` found last."""
        made = {
            f"{split}{name}": value
            for split, seen in self.seen.items()
            if seen.embeddings
            for name, value in seen.chance(self.prompts, self.examples).items()
        }
        return {name: made[name] for name in self.found if name in made and name not in self.measures}

    def _space(self) -> dict[str, Any]:
        """The first two principal axes of some test items' embeddings, all modalities together: where the gap is to be seen."""
        seen = self.seen[""]
        all_of, there = seen.whole(""), seen.there
        rows = {name: value[there[name]][:DRAWN] for name, value in all_of.items()}
        together = torch.cat(list(rows.values()))
        if min(together.shape) < 2:
            return {}
        flat, axes = principal_axes(together)
        at = dict(zip(rows, flat.split([len(value) for value in rows.values()]), strict=True))
        return {
            "The shared space": {
                "kind": "points",
                "points": {name: np.round(value.numpy(), 4).tolist() for name, value in at.items()},
                "axes": axes,
                "caption": "Test items in every modality. Clouds that do not mix are a gap between modalities.",
            }
        }

    def _gallery(self) -> dict[str, Any]:
        """For each two modalities a few queries and what they find in the test split."""
        seen = self.seen[""]
        all_of, there = seen.whole(""), seen.there
        found: list[dict[str, Any]] = []
        for a, b in itertools.permutations(all_of, 2):
            keys = there[b].nonzero().flatten()
            asked = (there[a] & there[b]).nonzero().flatten()
            asked = asked[:: max(1, len(asked) // SHOWN)][:SHOWN]
            if not len(asked) or not len(keys):
                continue
            rows = gallery_rows(asked, keys, all_of[a][asked] @ all_of[b][keys].T, seen.right(a, b), SHOWN)
            found.append({"query": a, "key": b, "rows": rows})
        wanted = {(part["query"], row["query"]) for part in found for row in part["rows"]}
        wanted |= {(part["key"], cell["item"]) for part in found for row in part["rows"] for cell in row["found"]}
        items = {f"{name}/{row}": shown(self.data, seen.split, name, row) for name, row in sorted(wanted)}
        return {"Retrieval gallery": {"kind": "gallery", "parts": found, "items": items}} if found else {}


def as_trained(data: AlignedData, trained: Mapping[str, Any]) -> tuple[AlignedData, dict[str, Tokenizer]]:
    """Data with its modalities in the order that a run was trained on, and that run's tokenizers.

    CounterpointError when its modalities are others.
    """
    if trained["modalities"] != data.spec["modalities"]:
        raise CounterpointError(
            f"{data.name} gives {data.spec['modalities']}, the run was trained on {trained['modalities']}"
        )
    # Learners put modalities side by side as they come.
    data = replace(data, modalities={name: data.modalities[name] for name in trained["modalities"]})
    return data, {name: Tokenizer.from_json(text) for name, text in trained["tokenizers"].items()}


class Items:
    """Any split's items as the learner of a run takes them, however few there are: for a set that is not trained on."""

    def __init__(self, data: AlignedData, trained: Mapping[str, Any], context: int) -> None:
        self.data, self.tokenizers = as_trained(data, trained)
        self.context = context

    def batch(self, split: AlignedSplit, rows: Sequence[int]) -> dict[str, Any]:
        # Not the part "items": nothing is measured of them.
        return _evaluated(_Batches(self.data, split, self.tokenizers, self.context), list(rows), "embedded")


@runtime_checkable
class ListedSplit(Protocol):
    """A split of the user's own items, which are listed by their rows where there is something to say of them."""

    def row_names(self, positions: Indices) -> list[str]:
        """Where each of these items comes from, such as "items.csv row 3 (a17)"."""
        ...

    def list_items(self, modality: str, positions: Indices, what: str, reason: str) -> Path | None:
        """List these items in the data's report, in place of those of before; returns its file, None if it holds nothing."""
        ...


class AlignedTask:
    """Loaders and evaluator of one source of aligned items."""

    name = "aligned"
    headline = "mean_recall"  # the measure it judges by
    contract = "aligned"  # the form of data it takes (see counterpoint.data.load)
    at_once = BATCH  # rows of an `evaluation_batch` at most

    def __init__(self, data: AlignedData, config: AlignedConfig) -> None:
        if not isinstance(data, AlignedData) or len(data.modalities) < 2:
            raise CounterpointError(f"{data.name} gives no aligned modalities, which the task aligned learns from")
        config.check_batch()
        if len(data.test) < 2:
            raise DataError(f"{data.name}: needs at least 2 test items, has {len(data.test)}")
        self.data = data
        self.config = config
        self.notes: list[str] = []
        everything = np.arange(len(data.train))
        self.tokenizers = {
            name: build_tokenizer(
                config.text_encoder,
                [str(text) for text in data.train.column(name, everything)],
                vocabulary=config.vocabulary,
            )
            for name, modality in data.modalities.items()
            if modality.kind == "text"
        }
        self.notes += [note for name in self.tokenizers for note in self._cut(name)]
        self.facts: dict[str, Any] = data.spec | {
            "examples": len(data.train),
            "class_names": list(data.classes or ()),
            "tokenizers": {name: tokenizer.to_json() for name, tokenizer in self.tokenizers.items()},
        }

        self.learned: list[str] = self.facts["class_names"]  # what the numbers of a learner's logits mean

    def _cut(self, name: str) -> list[str]:
        """A note where texts are longer than what is read of them; data that keeps a report lists them there."""
        count, long, report = 0, list[str](), None
        for called, split in (("training", self.data.train), ("valid", self.data.valid), ("test", self.data.test)):
            texts = [str(text) for text in split.column(name, np.arange(len(split)))]
            at = self.tokenizers[name].too_long(texts, self.config.context)
            count += sum(map(bool, texts))
            long += [f"{called} item {n}" for n in at]
            if isinstance(split, ListedSplit):
                reason = f"longer than the {self.config.context} tokens that are read"
                report = split.list_items(name, np.asarray(at, np.int64), "cut", reason)
        if not long:
            return []
        where = f"the first is {long[0]}" if report is None else f"all in {report}"
        return [
            f"{self.data.name}: {len(long)} of {count} texts of {name} are longer than the {self.config.context} tokens that "
            f"are read (--context) and lose their end; {where}"
        ]

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """CounterpointError when a run trained on other data cannot be measured on this; takes the run's tokenizers, and its
        order of modalities."""
        self.data, self.tokenizers = as_trained(self.data, trained)
        self.learned = list(trained.get("class_names", self.facts["class_names"]))

    def check_training(self) -> None:
        """DataError where an epoch would have no step, or nothing to watch training on."""
        check_watched(self.data.name, len(self.data.valid), "items")
        if len(self.data.train) < self.config.batch_size:
            raise DataError(
                f"{self.data.name} has {len(self.data.train)} training items, fewer than a batch of "
                f"{self.config.batch_size}; use --batch-size {max(2, len(self.data.train))} or less"
            )

    def _batches(self, split: AlignedSplit) -> _Batches:
        return _Batches(self.data, split, self.tokenizers, self.config.context)

    def split(self, name: str) -> AlignedSplit:
        """Return the split of this name: train, valid, test or, where there is one, unpaired. CounterpointError else."""
        found: AlignedSplit = named_split(self.data, name)
        return found

    def evaluation_batch(self, split: str | AlignedSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as a learner's `predict` takes them: images normalised, nothing varied."""
        found = self.split(split) if isinstance(split, str) else split
        return _evaluated(self._batches(found), list(map(int, rows)), "survey")

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend on seed and epoch alone; `batches`: a stage's own."""
        workers = self.config.workers
        own = Batches(len(self.data.train), self.config.batch_size, drop_last=True)
        chosen = own if batches is None else batches
        return DataLoader(
            self._batches(self.data.train),
            batch_size=None,
            sampler=chosen.bind(seed, position, *processes()),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Batches for `evaluator(split)`, in order: items of the split valid or test, prompts of classes, training items."""
        prompts = None
        if self.data.classes and self.tokenizers:
            name, tokenizer = next(iter(self.tokenizers.items()))
            texts = [self.config.prompt.replace("{}", label) for label in self.data.classes]
            prompts = {name: tokenizer.encode(texts, self.config.context)}
        parts = {prefix: self._batches(part) for prefix, part in measured_splits(self.data, split).items()}
        batches = _AskedBatches(parts, prompts, self._batches(self.data.train))
        return DataLoader(batches, batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> AlignedEvaluator:
        return AlignedEvaluator(self.data, self.learned, split)


TASK = AlignedTask
