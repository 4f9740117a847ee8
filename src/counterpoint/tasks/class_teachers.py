"""Teach students of pictures by a network of pictures and texts, whose class texts are the classifier.

Sources of a teacher (`--teacher`):

    run:RUN, fit:SLUG?data=SOURCE    a run of the task `aligned` with one picture and one text modality, such as clip
    hf:NAME                          a model of transformers (CLIP, SigLIP)
    open_clip:MODEL/WEIGHTS          a model of open_clip
    file:PLACE.npz                   embeddings alone, of a teacher that gives nothing else

Arrays of a file:

    train     [pictures, dim] in the order of the training split
    text      [classes, dim] or [classes, templates, dim] in the order of the classes
    scale     factor of cosines in the logits, > 0; default 100
    classes   names, each once, by which the texts are then ordered; may be missing
    names     file names of the training pictures, which are compared; may be missing
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.class_texts import class_prototypes, cosine_text_logits
from counterpoint.data.images import ImageData, Listed
from counterpoint.encoders.dual import DualEncoder, build_dual_encoder, need_short, word_layer
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.text import Tokenizer
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Cached, Frozen, cached, parameters
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.tasks.aligned import AlignedLearner, one_each
from counterpoint.tasks.class_texts import templates_of, texts_of
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.open_classes import OpenConfig
from counterpoint.words import counted

KINDS = ("run", "fit", "hf", "open_clip", "file")


class AlignedDual(DualEncoder):
    """A learner of the task `aligned` as a network of pictures and texts.

    Raises CounterpointError unless it has one picture and one text modality.
    """

    def __init__(self, learner: AlignedLearner, name: str) -> None:
        facts = learner.facts
        image, text = one_each(facts.modalities, f"the teacher {name}", "image", "text")
        log_scale = getattr(learner, "log_scale", None)
        scale = float(log_scale.detach().exp()) if log_scale is not None else 1 / 0.07
        super().__init__(learner.config.embedding, scale, facts.modalities[image]["size"])
        self.learner, self.name, self.image, self.text = learner, name, image, text
        self.tokenizer = Tokenizer.from_json(facts.tokenizers[text])

    def image_rows(self, images: Tensor) -> Tensor:
        return self.learner.projected(self.image, images)

    def token_ids(self, texts: list[str], room: int = 0) -> tuple[Tensor, Tensor]:
        context = self.learner.config.context
        long = set(self.tokenizer.too_long(texts, context - room))
        need_short(self.name, texts, [context - room + (n in long) for n in range(len(texts))], context, room)
        ids, mask = self.tokenizer.encode(texts, context)
        return ids.to(self.factor.device), mask.to(self.factor.device)

    def token_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.learner.projected(self.text, (ids, mask))

    @property
    def words(self) -> nn.Module:
        return word_layer(self.learner.encoders[self.text])

    @property
    def tower(self) -> nn.Module:
        return self.learner.encoders[self.image]

    def own_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.model.encode(text, add_special_tokens=False).ids)


@dataclass
class Table:
    """Embeddings of a teacher from a file."""

    name: str
    rows: NDArray[np.float32]  # [pictures, dim] of the training split
    text: NDArray[np.float32]  # [classes, templates, dim]
    scale: float
    classes: tuple[str, ...]  # of the texts; empty where the file does not say
    names: tuple[str, ...]  # of the pictures; empty where the file does not say

    @classmethod
    def read(cls, name: str) -> Table:
        """Read a file.

        Raises DataError that names the file, for one that is no .npz or lacks an array, and for wrong shapes. It also names rows
        that are zero, NaN or infinite. Other faults are a scale that is not > 0, and a class with two texts.
        """
        place = name.partition(":")[2]
        try:
            with np.load(place, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            missing = [key for key in ("train", "text") if key not in arrays]
            if missing:
                raise DataError(f"{place}: lacks the array {missing[0]}; it has {', '.join(sorted(arrays)) or 'none'}")
            rows, text = (np.asarray(arrays[key], np.float32) for key in ("train", "text"))
            scale = np.asarray(arrays.get("scale", 100.0), np.float32)
        except (OSError, ValueError, TypeError, BadZipFile) as error:  # TypeError: a .npy, which is one array
            raise DataError(f"{place}: cannot be read as .npz with arrays of numbers ({error})") from error
        text = text[:, None] if text.ndim == 2 else text
        if rows.ndim != 2 or text.ndim != 3 or rows.shape[1] != text.shape[2]:
            raise DataError(
                f"{place}: train must be [pictures, dim] and text [classes, dim] or [classes, templates, dim], got "
                f"{list(arrays['train'].shape)} and {list(arrays['text'].shape)}"
            )
        for key, values in (("train", rows), ("text", text)):
            bad = np.unique(np.nonzero(~np.isfinite(values).all(-1) | ~values.any(-1))[0])
            if len(bad):
                raise DataError(
                    f"{place}: {key} has {counted(len(bad), 'row')} of zeros, NaN or infinity, the first is row {bad[0]}"
                )
        if scale.size != 1 or not 0 < scale.item() < np.inf:
            raise DataError(f"{place}: scale must be one number > 0, got {scale.tolist()}")
        classes, names = (tuple(map(str, arrays.get(key, ()))) for key in ("classes", "names"))
        if classes and (len(classes) != len(text) or len(set(classes)) < len(classes)):
            raise DataError(
                f"{place}: classes must name each of the {counted(len(text), 'text')} once, got {len(classes)} names of which "
                f"{len(set(classes))} differ"
            )
        return cls(name, rows, text, scale.item(), classes, names)

    def texts(self, classes: tuple[str, ...]) -> Float[Tensor, "classes templates dim"]:
        """Return the embeddings of the texts in the order of these classes. DataError where they do not fit."""
        text = self.text
        if self.classes:
            missing = [name for name in classes if name not in self.classes]
            if missing:
                raise DataError(f"{self.name}: has no text of {counted(len(missing), 'class')}, such as '{missing[0]}'")
            text = text[[self.classes.index(name) for name in classes]]
        if len(text) != len(classes):
            raise DataError(f"{self.name}: has texts of {counted(len(text), 'class')}, the data has {len(classes)}")
        return torch.from_numpy(text)

    def table(self, survey: Survey) -> Cached:
        """Return the rows by position in the training split. DataError for another number or order of pictures."""
        if len(self.rows) != survey.examples:
            raise DataError(
                f"{self.name}: has {counted(len(self.rows), 'row')} of train, the training split has {survey.examples} pictures; "
                "embed "
                "its pictures in their order"
            )
        split = survey.split()
        if self.names and isinstance(split, Listed):
            own = [Path(name).name for name in split.row_names(np.arange(survey.examples))]
            odd = [n for n, (a, b) in enumerate(zip(own, self.names, strict=True)) if a != Path(b).name]
            if odd:
                raise DataError(
                    f"{self.name}: row {odd[0]} is of {self.names[odd[0]]}, the training split has {own[odd[0]]} there"
                )
        return Cached(self.rows)


def check_class_teacher(name: str, role: str = "teacher") -> None:
    """Raise CounterpointError for a name that is of no kind of teacher. Runs before data are read.

    Args:
        name: the name.
        role: setting that has the name, for the message.
    """
    kind, _, rest = name.partition(":")
    if kind not in KINDS or not rest:
        raise unknown(f"{role} of pictures and texts", name, [f"{known}:NAME" for known in KINDS])


def need_apart(rows: Float[Tensor, "classes dim"], classes: Sequence[str], name: str) -> None:
    """Raise CounterpointError for two classes with the same embedding of their texts, between which nothing can decide.

    Args:
        rows: unit rows.
        classes: names of the classes.
        name: the teacher's name, for the message.
    """
    order = rows.sum(1).argsort()  # equal rows become neighbours
    alike = ((rows[order[1:]] - rows[order[:-1]]).abs().amax(1) < 1e-6).nonzero()
    if len(alike):
        one, other = (classes[int(n)] for n in order[alike[0, 0] :][:2])
        raise CounterpointError(
            f"--teacher {name} gives '{one}' and '{other}' the same embedding of their texts, perhaps because its vocabulary lacks "
            "their words; name the classes otherwise by --class-names FILE"
        )


def _experiment() -> Any:
    return importlib.import_module("counterpoint.experiment")  # above this package


def teacher_width(name: str) -> int:
    """Return the width of a teacher's embeddings, without training it."""
    kind = name.partition(":")[0]
    if kind == "file":
        return Table.read(name).rows.shape[1]
    if kind in ("hf", "open_clip"):
        return build_dual_encoder(name).dim
    return int(teacher_config(name).embedding)


def teacher_config(name: str) -> Any:
    """Return the settings of a teacher run:RUN or fit:SLUG?..., without training it.

    Raises CounterpointError for one that does not embed pictures and texts.
    """
    kind, _, rest = name.partition(":")
    room = _experiment()
    config = (room.Experiment.of_run(rest) if kind == "run" else room.of_spec(rest)[0]).config
    if not hasattr(config, "embedding"):
        raise CounterpointError(f"the teacher {name} does not embed pictures and texts; name a run of clip or siglip")
    return config


def open_network(name: str) -> DualEncoder:
    """Load a teacher that is a network. Raises CounterpointError for one that has no pictures or no texts."""
    kind, _, rest = name.partition(":")
    if kind in ("hf", "open_clip"):
        return build_dual_encoder(name)
    room = _experiment()
    learner = room.load_learner(rest) if kind == "run" else room.fitted(rest)
    if not isinstance(learner, AlignedLearner) or not learner.embeds:
        raise CounterpointError(f"the teacher {name} does not embed pictures and texts; name a run of clip or siglip")
    return AlignedDual(learner, name).eval()


# A CLIP of styled shapes, which is trained once in a few minutes and kept.
SHAPES_TEACHER = (
    "fit:clip?data=styled-shapes%3Ftrain=8192%26seed=900&image_encoder=conv-s&embedding=64&recipe=none&epochs=20"
    "&batch_size=128&lr=0.003&evaluate_every=20"
)


def with_foreign_statistics(network: Any) -> Any:
    """Return a copy of a teacher's network that takes pictures as the student's are normalised, by ImageNet's statistics."""
    found = copy.deepcopy(network)  # the library's module may be in use elsewhere
    found.factor.fill_(1.0)
    found.shift.zero_()
    return found


# ---------------------------------------------------------------------------------------------------------- the students


@dataclass
class ClassTextConfig(OpenConfig):
    """Settings of students that classify by a teacher's texts."""

    teacher: str = "hf:openai/clip-vit-base-patch16"
    """The teacher of pictures and texts: hf:NAME, open_clip:MODEL/WEIGHTS, run:RUN or fit:SLUG?data=SOURCE of clip, or file:X.npz
    with embeddings alone (see counterpoint.tasks.class_teachers)."""
    templates: str = "a photo of a {}"
    """Texts of a class, with {} for its name: one, several between "|", or a text file with one a line."""
    class_names: str = ""
    """File of names for the classes: JSON {class: name} or a line for each class. Default: the data's."""
    descriptions: str = ""
    """File of descriptions of the classes in the same form, which follow the name. Default: none."""
    cached: bool = False
    """Give the student the teacher's embeddings of pictures without augmentation, computed once and kept on disk. Default: of the
    same augmented view. A file has only the first."""

    from_file: ClassVar[bool] = True  # whether embeddings alone suffice

    def check(self) -> None:
        super().check()
        check_class_teacher(self.teacher)
        templates_of(self.templates)
        if self.teacher.startswith("file:") and not self.from_file:
            raise CounterpointError(f"--teacher {self.teacher}: embeddings alone do not suffice; name a network")

    def facts(self, data: ImageData) -> dict[str, Any]:
        return super().facts(data) | {"teacher_dim": teacher_width(self.teacher)}


class ClassTextLearner(ImageLearner):
    """A student that classifies by the teacher's embeddings of the classes' texts. Subclasses write `projected` and `loss`.

    Attributes:
        prototypes: [classes, dim] unit embeddings of the classes' texts, means over templates.
        scale: factor of cosines in the logits, the teacher's.
        taught: width of the teacher's embeddings.
    """

    prototypes: Tensor
    scale: Tensor

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.taught, self.base = int(data.teacher_dim), config.base_classes(data.classes)
        self.register_buffer("prototypes", torch.zeros(data.classes, self.taught))
        self.register_buffer("scale", torch.tensor(100.0))
        self.network: Frozen | None = None
        self.known: Cached | None = None

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        if config.teacher.startswith("file:"):
            table = Table.read(config.teacher)
            self.known, scale = table.table(survey), table.scale
            texts = table.texts(survey.classes)
        else:
            network = open_network(config.teacher).to(self.device)
            self.network, scale = Frozen(network, config.teacher, network.images), network.scale
            words = texts_of(survey.classes, config.templates, config.class_names, config.descriptions)
            with torch.no_grad():
                texts = network.texts([text for of in words for text in of]).unflatten(0, (len(words), -1))
            if config.cached:
                of_batch = Frozen(network, config.teacher, lambda batch: network.images(batch["image"]))
                self.known = cached(of_batch, survey, "train")
        if not bool(texts.isfinite().all()):
            raise CounterpointError(f"--teacher {config.teacher} gives texts that are NaN or infinite")
        self.prototypes.copy_(class_prototypes(texts))
        need_apart(self.prototypes, survey.classes, config.teacher)
        self.scale.fill_(scale)

    def sizes(self) -> tuple[int, int] | None:
        network: Any = None if self.network is None else self.network.module
        return None if network is None else (parameters(self.encoder), parameters(network.tower))

    def teacher_rows(self, batch: dict[str, Any]) -> Float[Tensor, "n dim"]:
        """Return the teacher's embeddings of a batch's pictures: kept ones, or those of the first view."""
        if self.known is not None:
            return self.known[batch["index"]].to(self.prototypes.dtype)
        assert self.network is not None
        found: Tensor = self.network(batch["views"][0])
        return found.to(self.prototypes.dtype)

    def projected(self, images: Tensor) -> Float[Tensor, "n dim"]:
        """Compute the student's rows in the teacher's space, not normalised."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return self.projected(images)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = self.embed(batch["image"])
        return {"feature": rows, "logits": self.classify(rows), **self.of_teacher(batch)}

    def classify(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n classes"]:
        """Compute logits of rows in the teacher's space by its texts."""
        return cosine_text_logits(rows, self.prototypes, self.scale)

    def of_teacher(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the teacher's logits for evaluation pictures; nothing outside a fit or where it is a file."""
        if self.network is None or self.survey is None:
            return {}
        return {"teacher_logits": self.classify(self.network(batch["image"]))}


class _NoEncoder(ImageEncoder):
    """The place of an encoder in a learner that trains none."""

    dim = 0


def _opened(learner: Any, keys: Any) -> None:
    learner.open()


class NetworkLearner(ClassTextLearner):
    """A learner that trains small parts beside its teacher's network (`dual`), and needs the network after the fit, too.

    During a fit the network is no part of the learner. A loaded run opens it again, by its name.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.opened: DualEncoder | None = None
        self.register_load_state_dict_post_hook(_opened)

    def build_encoder(self, data: Any) -> ImageEncoder:
        return _NoEncoder()

    def begin(self, survey: Survey) -> None:
        self.opened = None
        super().begin(survey)

    def open(self) -> None:
        """Open the network of a loaded run."""
        if self.network is None and self.opened is None:
            self.opened = open_network(self.config.teacher).requires_grad_(False)
            assert self.opened.start >= 0  # kept before torch.export traces the network

    @property
    def dual(self) -> DualEncoder:
        """The frozen network."""
        self.open()
        found: Any = self.opened if self.network is None else self.network.module
        return found

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return ()
