"""Embed pictures of several modalities and sentences about them in one space, by a frozen network that a setting names.

    run:RUN     a finished run of a system of the task `aligned`, with the modalities and a text: `clip` on the same data
    fit:SLUG?data=SOURCE&OPTION=VALUE     a small one that is trained once and kept in the cache
    hf:NAME     a model of transformers with an image and a text side (CLIP, SigLIP), which sees every modality as a picture

A run without an encoder of a modality's name uses its only encoder of pictures. Text alone can also come from an encoder of
`encoders/text.py`: minilm, or hf:NAME.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.data.dense import sentences
from counterpoint.encoders.text import Tokenizer, build_text_encoder, build_tokenizer, check_text_encoder
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, cached, frozen
from counterpoint.errors import CounterpointError, needs_extra, unknown
from counterpoint.tasks.aligned.learner import AlignedLearner
from counterpoint.views.images import denormalise, normalise

TEXTS = 64  # texts in a batch


class SceneTeacher(nn.Module):
    """A frozen network with `image(modality, pictures)` and `text(sentences)`, which return [n, dim]."""

    def image(self, modality: str, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        raise NotImplementedError

    def text(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        raise NotImplementedError


class _OfRun(SceneTeacher):
    """A learner of aligned modalities."""

    def __init__(self, name: str, learner: Any) -> None:
        super().__init__()
        if not isinstance(learner, AlignedLearner) or "text" not in learner.kinds.values():
            raise CounterpointError(
                f"--teacher {name} does not embed pictures and sentences; name a run of clip or another system of aligned data"
            )
        self.name, self.learner = name, learner
        self.of_text = next(modality for modality, kind in learner.kinds.items() if kind == "text")
        self.of_images = [modality for modality, kind in learner.kinds.items() if kind == "image"]
        self.tokenizer = Tokenizer.from_json(learner.facts.tokenizers[self.of_text])

    def image(self, modality: str, pictures: Tensor) -> Tensor:
        if modality not in self.of_images and len(self.of_images) != 1:
            raise CounterpointError(
                f"--teacher {self.name} has no encoder of {modality}; it has {', '.join(self.of_images)}. Train one on the same "
                "modalities"
            )
        own = modality if modality in self.of_images else self.of_images[0]
        return self.learner.projected(own, resized(pictures, self.learner.facts.modalities[own]["size"]))

    def text(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self.tokenizer.encode(texts, self.learner.config.context)
        return self.learner.projected(self.of_text, (ids.to(self.learner.device), mask.to(self.learner.device)))


class _OfTransformers(SceneTeacher):
    """A model of transformers with `get_image_features` and `get_text_features`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        place = name.partition(":")[2]
        try:
            import transformers
        except ImportError as error:
            raise needs_extra(name, "language") from error
        try:
            self.model: Any = transformers.AutoModel.from_pretrained(place).float()
            self.tokens: Any = transformers.AutoTokenizer.from_pretrained(place)
        except Exception as error:  # transformers' and its HTTP client's own kinds
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CounterpointError(
                f"--teacher {name} could not be loaded: {said[:300].rstrip('.')}. A model that is not on this machine is "
                "downloaded. Without a network, name a run: train clip on the same data, then --teacher run:RUN"
            ) from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise CounterpointError(
                f"--teacher {name} is a {type(self.model).__name__}, which does not embed pictures and sentences in one space; "
                "name a model like CLIP"
            )
        try:
            processor: Any = transformers.AutoImageProcessor.from_pretrained(place)
            self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        except Exception:  # without a processor's file: CLIP's numbers
            self.mean, self.std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.size = int(self.model.config.vision_config.image_size)
        self.length = int(getattr(self.model.config.text_config, "max_position_embeddings", 77))

    def image(self, modality: str, pictures: Tensor) -> Tensor:
        again = normalise(denormalise(resized(pictures, self.size)), self.mean, self.std)
        return _rows(self.model.get_image_features(pixel_values=again))

    def text(self, texts: Sequence[str]) -> Tensor:
        found = self.tokens(list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        device = next(self.model.parameters()).device
        return _rows(self.model.get_text_features(**{name: value.to(device) for name, value in found.items()}))


class TextTeacher(SceneTeacher):
    """A text encoder alone, by its name in `encoders/text.py`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder, self.tokenizer = build_text_encoder(name), build_tokenizer(name)

    def text(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self.tokenizer.encode(texts, min(self.encoder.length, 77))
        device = next(self.encoder.parameters()).device
        return self.encoder(ids.to(device), mask.to(device))


def _rows(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output  # transformers 4; transformers 5


def resized(pictures: Tensor, size: int) -> Tensor:
    """Scale pictures to `size` pixels, bilinearly."""
    if pictures.shape[2] == size:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False)


def check_scene_teacher(name: str) -> None:
    """Raise CounterpointError for a name that is of no kind of teacher. Runs before data are read."""
    kind, _, rest = name.partition(":")
    if kind not in ("run", "fit", "hf") or not rest:
        raise unknown("teacher", name, ["run:RUN", "fit:SLUG?data=SOURCE", "hf:NAME"])


def check_class_text(name: str) -> None:
    """Raise CounterpointError for a name of no text encoder that has weights."""
    if name == "text-s":
        raise CounterpointError("--class-text text-s has no weights to learn from; name minilm or hf:NAME")
    if name:
        check_text_encoder(name)


def scene_teacher(name: str) -> Frozen:
    """Load the teacher of this name; `call` it with a function of the `SceneTeacher` module."""
    check_scene_teacher(name)
    if name.startswith("hf:"):
        module: SceneTeacher = _OfTransformers(name)
    else:
        module = _OfRun(name, frozen(name).module)
    return Frozen(module, name)


def agreement(
    teacher: Frozen, survey: Survey, modalities: Sequence[str], regions: Sequence[str]
) -> Float[Tensor, "n m"]:
    """Compute, for each training scene, the cosine of every modality's embedding with that of the scene's sentence.

    Args:
        teacher: see `scene_teacher`.
        survey: access to the scenes. The embeddings of their pictures are kept in the cache.
        modalities: their names.
        regions: names of the pixels' classes, for scenes without a caption (see `data.dense.sentences`).

    Raises CounterpointError for embeddings that are not finite.
    """
    module: Any = teacher.module

    def images(batch: dict[str, Any]) -> Tensor:
        each = batch["modalities"].unbind(1) if "modalities" in batch else [batch["image"]]
        rows = [unit(module.image(name, x).float()) for name, x in zip(modalities, each, strict=True)]
        return torch.stack(rows, 1).flatten(1)

    pictures = cached(Frozen(module, teacher.source, images), survey, "train")[torch.arange(survey.examples)]
    said = sentences(survey.split("train"), regions)
    texts = text_rows(partial(module.text), said)
    found = (pictures.unflatten(1, (len(modalities), -1)) * texts[:, None]).sum(2)
    if not bool(found.isfinite().all()):
        raise CounterpointError(f"--teacher {teacher.source} gives embeddings that are NaN or infinite")
    return found


def text_rows(embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Float[Tensor, "n dim"]:
    """Embed texts as unit rows on the CPU, equal ones once."""
    different = sorted(set(texts))
    with torch.no_grad():
        parts = [embed(different[at : at + TEXTS]).float().cpu() for at in range(0, len(different), TEXTS)]
    place = {text: n for n, text in enumerate(different)}
    return unit(torch.cat(parts))[torch.from_numpy(np.array([place[text] for text in texts]))]
