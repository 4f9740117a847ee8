"""Define the base of every learner of the task `aligned`: an encoder and a head per modality, views, an optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.distributed import place
from counterpoint.core.operands import EPS
from counterpoint.core.seeds import seed_torch
from counterpoint.encoders.audio import build_audio_encoder
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.text import Tokenizer, build_text_encoder
from counterpoint.encoders.vectors import build_vector_encoder
from counterpoint.engine.learner import Learner
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, diverged, unknown
from counterpoint.tasks.adapted import adapt_modality, adapted_names, keep_adapted, published
from counterpoint.views.images import ViewPipeline


class AlignedLearner(Learner):
    """An encoder and a linear projection for each modality. Subclasses write `loss(batch)`, usually on `embed(batch)`."""

    embeds: ClassVar[bool] = True  # whether its embeddings are trained, so that it can teach or be searched

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        self.kinds: dict[str, str] = {name: spec["kind"] for name, spec in data.modalities.items()}
        self.facts = data  # from which the learner was built
        seed_torch(seed)
        self.encoders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.views: dict[str, ViewPipeline] = {}
        self.adapted = adapted_names(config, self.kinds, self.frozen_modality())
        for name, spec in data.modalities.items():
            encoder: Any = self.build_encoder(spec, data.tokenizers.get(name))
            if name in self.adapted:
                adapt_modality(encoder, config, spec)
            self.encoders[name] = encoder
            self.heads[name] = self.build_head(encoder.dim)
            if spec["kind"] == "image":
                self.views[name] = ViewPipeline(spec["size"], crops=1, recipe=config.recipe)

    def frozen_modality(self) -> str:
        """Return the modality whose encoder never trains; "": none."""
        return ""

    def begin(self, survey: Survey) -> None:
        """Raise CounterpointError for adapters of an encoder with random weights."""
        super().begin(survey)
        random = [name for name in self.adapted if not published(self.config, self.kinds[name])]
        if random and not self.loaded:
            raise CounterpointError(
                f"lora_modalities: adapters need trained weights, and the encoder of {random[0]} has random ones; start from a run "
                "with --continue RUN, or leave it out"
            )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        keep_adapted(self.encoders, self.config, self.adapted)
        return self

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        """Build the network for one modality, by its kind."""
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
        """Build the layer that maps an encoder's output, `dim` wide, into the shared space."""
        return nn.Linear(dim, self.config.embedding, bias=False)

    def features(self, name: str, values: Any) -> Float[Tensor, "n dim"]:
        """Apply one modality's encoder to its inputs: a tensor or, for text, token numbers and mask."""
        return self.encoders[name](*values) if isinstance(values, tuple | list) else self.encoders[name](values)

    def projected(self, name: str, values: Any) -> Float[Tensor, "n embedding"]:
        """Apply one modality's encoder and head to its inputs; `embed` normalises the result."""
        return self.heads[name](self.features(name, values))

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
        """Compute unit embeddings of every modality; zeros where an item lacks it."""
        present, whole = batch.get("present", {}), batch.get("whole", ())
        found = {}
        for name, values in batch["inputs"].items():
            rows = None if name in whole else there(present.get(name))
            z = F.normalize(self.projected(name, taken(values, rows)), dim=1, eps=EPS)
            found[name] = z if rows is None else z.new_zeros(len(present[name]), z.shape[1]).index_copy(0, rows, z)
        return found

    def paired_rows(
        self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> list[tuple[Float[Tensor, "m dim"], Float[Tensor, "m dim"], Bool[Tensor, " n"]]]:
        """Select, for every two modalities, the embeddings of the items that have both, and the mask of these items.

        All processes leave out two modalities that no item of the batch has together. Raises CounterpointError if no item
        has two modalities.
        """
        found = []
        for a, b in itertools.combinations(embeddings, 2):
            both = batch["present"][a] & batch["present"][b]
            if {a, b} <= set(batch.get("whole", ())):
                found.append((embeddings[a], embeddings[b], both))
            elif place(int(both.sum()), self.device).total > 0:
                found.append((embeddings[a][both], embeddings[b][both], both))
        if not found:
            raise CounterpointError(
                "no item of a batch has two modalities to contrast; use a larger batch or data with more complete items"
            )
        return found

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = self.embed(batch)
        if len(found) < 3:
            return {"embedding": found}
        return {"embedding": found, "joint": {name: self.joint(rest) for name, rest in each_without(found)}}

    def joint(self, embeddings: Sequence[Float[Tensor, "n dim"]]) -> Float[Tensor, "n dim"]:
        """Combine an item's embeddings in several modalities to one query for another modality.

        The retrieved candidate is the one with the largest dot product.
        """
        return torch.stack(list(embeddings)).sum(0)

    def turns(self) -> list[Turn]:
        return [self.turn_of([self], constant=self.parameters() if self.config.constant_lr else ())]

    def encoder_paths(self) -> list[str]:
        """Name the encoders as paths of submodules, for `shardable`; none where there are additions or adapters."""
        return [] if self.parts or self.adapted else [f"encoders.{name}" for name in self.encoders]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [
            (encoder, method)
            for encoder in self.encoders.values()
            for method in ("forward", "tokens")
            if hasattr(encoder, method)
        ]


def there(present: Tensor | None) -> Int[Tensor, " m"] | None:
    """Return the positions of the items that have a modality.

    Return None, which means to encode all items, if all have it or fewer than two do.
    """
    if present is None or bool(present.all()):
        return None
    rows = present.nonzero().flatten()
    # Batch normalisation needs two rows, and every process must use every parameter.
    return rows if len(rows) > 1 else None


def chosen(values: Tensor, mask: Bool[Tensor, " n"], count: int) -> Tensor:
    """Select the rows of a mask with `count` True entries. Where these are all, read nothing: a GPU need not be waited for."""
    return values.to(mask.device) if count == len(mask) else values.to(mask.device)[mask]


def taken(values: Any, rows: Tensor | None) -> Any:
    """Take these rows of a modality's inputs: a tensor or, for text, token numbers and mask. None: all rows."""
    if rows is None:
        return values
    return tuple(part[rows] for part in values) if isinstance(values, tuple | list) else values[rows]


def whole_items(batch: Mapping[str, Any], modalities: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Return how many items of a batch have all of these modalities, and their inputs."""
    both = torch.stack([batch["present"][name] for name in modalities]).all(0)
    rows = None if bool(both.all()) else both.nonzero().flatten()
    return int(both.sum()), {name: taken(batch["inputs"][name], rows) for name in modalities}


def first_two(modalities: Mapping[str, Any]) -> tuple[str, str]:
    """Return the two modalities of a pairwise method. Raises CounterpointError, which names all, for another number."""
    if len(modalities) != 2:
        raise CounterpointError(f"this method aligns two modalities, the data has {', '.join(modalities)}")
    a, b = modalities
    return a, b


def one_each(modalities: Mapping[str, Mapping[str, Any]], slug: str, *kinds: str) -> list[str]:
    """Return the modalities of a method that aligns one of each of these kinds, in their order.

    Args:
        modalities: facts of each modality, with its `kind`.
        slug: name of the method, for the message.
        kinds: kinds of modalities, all different.

    Raises CounterpointError, which names all modalities, for others.
    """
    names = {spec["kind"]: name for name, spec in modalities.items()}
    if len(modalities) != len(kinds) or set(names) != set(kinds):
        raise CounterpointError(
            f"{slug} aligns {' and '.join(f'one {kind}' for kind in kinds)} modality, the data has "
            + ", ".join(f"{name} ({spec['kind']})" for name, spec in modalities.items())
        )
    return [names[kind] for kind in kinds]


def need_finite(embeddings: Tensor, name: str) -> None:
    """Raise CounterpointError for embeddings of a modality that are not finite, as when training diverges."""
    if not bool(embeddings.detach().isfinite().all()):
        raise diverged(f"the embeddings of {name} hold NaN or infinite values")


def each_without(values: Mapping[str, Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Pair each name with the values of all others."""
    return [(name, [value for other, value in values.items() if other != name]) for name in values]
