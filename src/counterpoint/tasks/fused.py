"""Define learners of the task `aligned` with a fusion encoder, which reads a text and the tokens of an image.

A fused learner has an image encoder with tokens and the lower layers of a BERT for text. The upper layers of the BERT are
the fusion encoder, with cross-attention to the image (`encoders/fusion.py`). A head on the first token scores a pair. Its
scores re-rank the nearest items by embeddings. The run's page shows where in pictures the learner finds words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.core.rows import token_numbers
from counterpoint.data.images import Indices
from counterpoint.encoders.fusion import Fusion, TextEncoder, TextSize, build_halves
from counterpoint.encoders.text import Tokenizer
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.engine.survey import BATCH, Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, first_two, taken, there
from counterpoint.tasks.grounding import grounding_maps, maps_of_words
from counterpoint.tasks.reranking import reranked_retrieval

RERANKED = 1000  # maximum number of test items to re-rank


@dataclass
class FusedConfig(AlignedConfig):
    """Settings of every fused learner; sizes are those of BERT-base."""

    fusion_layers: int = 6
    """Number of upper layers of the text transformer that read the image."""
    depth: int = 12
    """Number of layers of a text transformer trained from scratch (text-s), fusion included."""
    width: int = 768
    """Width of a text transformer trained from scratch."""
    heads: int = 12
    """Attention heads of a text transformer trained from scratch."""
    dropout: float = 0.1
    """Dropout probability in the text transformer and the fusion encoder."""
    rerank: int = 128
    """Candidates of each query that the evaluation re-ranks by the scores of pairs; 0: none."""

    adapts: ClassVar[bool] = False  # its layers are read by the fusion encoder and copied

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_below_one("dropout")
        if self.rerank < 0:
            raise CounterpointError(f"rerank must not be negative, got {self.rerank}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise CounterpointError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if not self.fusion_layers >= 1:
            raise CounterpointError(f"fusion_layers must be at least 1, got {self.fusion_layers}")

    @property
    def scores_pairs(self) -> bool:
        """Whether there is a head that classifies pairs as matching or not."""
        return True

    @property
    def predicts_words(self) -> bool:
        """Whether there is a head that predicts masked words."""
        return False

    @property
    def fuses(self) -> bool:
        """Whether there is a fusion encoder. Without it, the learner accepts any two modalities, for instance vectors."""
        return self.scores_pairs or self.predicts_words


class Seen(NamedTuple):
    """An encoder's output for a modality: the vector, and the tokens if the fusion encoder needs them."""

    vector: Float[Tensor, "n dim"]
    tokens: Float[Tensor, "n tokens dim"] | None = None


class FusedLearner(AlignedLearner):
    """An image encoder, a text encoder, a fusion encoder, and a head that scores pairs."""

    slug: ClassVar[str]  # for messages
    size: TextSize
    lower: int  # number of layers of the text transformer that do not read the image
    _upper: Mapping[str, Tensor]  # a BERT's weights for the fusion encoder, kept until it is built

    def __init__(self, config: FusedConfig, data: Any, seed: int = 0) -> None:
        kinds = {name: spec["kind"] for name, spec in data.modalities.items()}
        image, text = sides(config, kinds, self.slug)
        super().__init__(config, data, seed)
        self.image, self.text = image, text
        encoder: Any = self.encoders[self.image]
        if config.fuses:
            if not isinstance(encoder, VisionTokens) or encoder.prefix < 1:
                raise CounterpointError(
                    f"image_encoder {config.image_encoder} has no tokens with a class token, which the fusion encoder "
                    "needs; use vit-s or a vision transformer of timm (timm:deit_tiny_patch16_224), or switch use_itm and "
                    "use_mlm off"
                )
            self.fusion = Fusion(self.size, config.fusion_layers, encoder.dim, config.predicts_words)
            self.fusion.load_state_dict(self._upper, strict=False)
            if config.scores_pairs:
                self.itm_head = nn.Linear(self.size.width, 2)
        self._upper = {}
        self.tokenizer = Tokenizer.from_json(data.tokenizers[self.text]) if kinds[self.text] == "text" else None

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks for embeddings and fused states, by name: encoders, heads and, if it fuses, fusion."""
        found: dict[str, nn.Module] = {"encoders": self.encoders, "heads": self.heads}
        return found | {"fusion": self.fusion} if self.config.fuses else found

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        if spec["kind"] != "text":
            return super().build_encoder(spec, tokenizer)
        assert tokenizer is not None
        config = self.config
        published: Any = None if config.text_encoder == "text-s" else super().build_encoder(spec, tokenizer)
        size = TextSize(0, config.context, config.width, config.depth, config.heads, 4 * config.width, config.dropout)
        upper = config.fusion_layers if config.fuses else 0
        found = build_halves(
            config.text_encoder, Tokenizer.from_json(tokenizer), published, size, context=config.context, upper=upper
        )
        self.mask_token, self.size, self.lower, self._upper = found.mask_token, found.size, found.lower, found.upper
        return found.text

    def see(self, networks: Any, name: str, values: Any, *, fused: bool = False) -> Seen:
        """Encode one modality.

        Args:
            networks: the student's or its momentum copy's networks.
            name: the modality.
            values: its inputs, a tensor or, for text, token numbers and mask.
            fused: return the tokens too, whose first is the vector; by default only the vector.
        """
        encoder = networks["encoders"][name]
        arguments = values if isinstance(values, tuple | list) else (values,)
        if isinstance(encoder, TextEncoder) or (fused and name == self.image):
            tokens = encoder.tokens(*arguments)
            return Seen(tokens[:, 0], tokens if fused else None)
        if isinstance(encoder, VisionTokens) and encoder.prefix:
            return Seen(encoder.tokens(*arguments)[:, 0])  # the vector of `fused=True`, whatever the model's pooling
        return Seen(encoder(*arguments))

    def embedded(self, networks: Any, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        """Compute unit embeddings of every modality by the student's or its copy's networks; zeros where an item lacks it."""
        present, whole, found = batch.get("present", {}), batch.get("whole", ()), {}
        for name, values in batch["inputs"].items():
            rows = None if name in whole else there(present.get(name))
            z = unit(networks["heads"][name](self.see(networks, name, taken(values, rows)).vector))
            found[name] = z if rows is None else z.new_zeros(len(present[name]), z.shape[1]).index_copy(0, rows, z)
        return found

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        return self.embedded(self.networks(), batch)

    # --- evaluation

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure retrieval re-ranked by ITM (see `rerank`), among the first 1,000 items."""
        if not (self.config.scores_pairs and self.config.rerank):
            return {}
        items = survey.split(split)
        rows = np.arange(min(RERANKED, len(items)))
        parts = [
            self._fused_rows(survey.batch(split, rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)
        ]
        pictures = items.same(self.image) if hasattr(items, "same") else None
        return self._reranked(parts, pictures)

    def _fused_rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the inputs of ITM for each item that has both an image and a text."""
        both = batch["present"][self.image] & batch["present"][self.text]
        rows = both.nonzero().flatten()
        networks = self.networks()
        v, w = (
            self.see(networks, name, taken(batch["inputs"][name], rows), fused=True) for name in (self.image, self.text)
        )
        ids, mask = taken(batch["inputs"][self.text], rows)
        assert v.tokens is not None
        assert w.tokens is not None
        f_v, f_t = (unit(self.heads[name](s.vector)) for name, s in ((self.image, v), (self.text, w)))
        found = {"v": v.tokens, "w": w.tokens, "mask": mask, "f_v": f_v, "f_t": f_t, "ids": token_numbers(ids, mask)}
        return found | {"at": batch["index"][rows]}

    def _reranked(self, parts: Sequence[Mapping[str, Tensor]], pictures: Indices | None) -> dict[str, float]:
        """Compute the recalls of both directions.

        Args:
            parts: outputs of `_fused_rows`.
            pictures: numbers of all items, equal for items with the same picture; None: unknown.
        """
        most = max(part["mask"].shape[1] for part in parts)
        v, f_v, f_t, ids = (torch.cat([part[name] for part in parts]) for name in ("v", "f_v", "f_t", "ids"))
        mask = torch.cat([F.pad(part["mask"], (0, most - part["mask"].shape[1])) for part in parts])
        w = torch.cat([F.pad(part["w"], (0, 0, 0, most - part["w"].shape[1])) for part in parts])
        if len(v) < 2:
            return {}

        def score(images: Tensor, texts: Tensor) -> Tensor:
            return self.itm_head(self.fusion(w[texts], mask[texts], v[images])[:, 0])[:, 1]

        groups = ids[:, None].cpu()
        # A picture may occur in several rows with different texts. All of them are right for it.
        if pictures is not None:
            at = torch.cat([part["at"] for part in parts]).cpu()
            groups = torch.cat([groups, torch.from_numpy(pictures)[at][:, None]], 1)
        return reranked_retrieval((self.image, f_v), (self.text, f_t), score, self.config.rerank, groups)

    def figures(self, survey: Survey) -> dict[str, Any]:
        if not self.config.scores_pairs or self.config.fusion_layers < 2:
            return {}

        def ground(images: Tensor, text: str) -> tuple[list[str], Tensor]:
            maps, words = grounding_maps(self, images, [text])
            return words[0], maps[0]

        rows = maps_of_words(survey, self.image, self.text, ground)
        return {"Where words are found": {"kind": "maps", "rows": rows}} if rows else {}


def sides(config: FusedConfig, kinds: Mapping[str, str], slug: str) -> tuple[str, str]:
    """Return the names of the image and the text modality; without fusion, of the first and the second modality.

    Raises CounterpointError for another number of modalities, and for other kinds if the learner fuses.
    """
    first, second = first_two(kinds)
    if set(kinds.values()) == {"image", "text"}:
        return (first, second) if kinds[first] == "image" else (second, first)
    if config.fuses:
        raise CounterpointError(
            f"{slug} fuses images and texts, the data has "
            + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            + "; switch use_itm and use_mlm off to align other modalities"
        )
    return first, second
