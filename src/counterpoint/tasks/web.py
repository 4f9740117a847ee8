"""Define students of the task `labelled` that learn from pictures without labels, of another distribution ("web" pictures).

A frozen teacher classifies pictures like those of the valid and test splits. The student sees the web pictures alone, and is
measured on these splits. Sources of the web pictures: `--web SOURCE`, such as imagefolder:DIR; else those that come with the
data (`ImageData.web`). Sources of the teacher:

    --teacher run:RUN                       the network of a finished run with a classifier, such as kd
    --teacher fit:SLUG?data=SOURCE          the same, trained once and kept in the cache
    --teacher timm:NAME, torchvision:NAME, hf:NAME   a published network with its own classifier
    default                                 train it first, in the same run, on the labelled pictures: a stage before the student's

The training split has the labelled pictures, which only that stage sees. The web pictures follow; their label is -1.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from counterpoint import data as sources
from counterpoint.data.generated import InflatedImages
from counterpoint.data.images import ImageData, ImageSplit, Indices
from counterpoint.encoders.classifiers import published_classifier
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.maps import has_map, map_networks, vector_and_map
from counterpoint.engine.loading import Batches, ChosenBatches, RenewedBatches
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, frozen, parameters
from counterpoint.errors import CounterpointError, DataError, RunError, unknown
from counterpoint.tasks import labelled
from counterpoint.tasks.image_teachers import KINDS
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.labelled import LabelledConfig, cross_entropy
from counterpoint.views.images import MEAN, STD
from counterpoint.words import counted

# ----------------------------------------------------------------------------------------------------------- web pictures


def with_web(data: ImageData, config: Any) -> ImageData:
    """Return the data with its web pictures after the labelled ones in the training split. A source's `System.source`.

    Raises DataError for data without web pictures, and for web pictures of another size.
    """
    splits = [data.web] if not config.web and data.web is not None else _web_of(config.web, data)
    train: ImageSplit = data.train
    for split in splits:
        train = InflatedImages(train, split, 1)
    count = len(train) - len(data.train)
    if not count:
        raise DataError(f"--web {config.web} has no pictures")
    note = f"{counted(count, 'web picture')} without labels; the student sees no other picture"
    return replace(data, train=train, bank=data.bank or data.train, notes=[*data.notes, note])


def _web_of(spec: str, data: ImageData) -> list[ImageSplit]:
    if not spec:
        raise DataError(
            f"{data.name} brings no web pictures: name a source of them, such as --web imagefolder:DIR, or use --data web-digits"
        )
    return pictures_of(spec, data, "--web")


def pictures_of(spec: str, data: ImageData, option: str) -> list[ImageSplit]:
    """Read the pictures of a source in the size of the data: all of the user's files, or a built-in source's training split.

    Args:
        spec: the source.
        data: gives the size.
        option: name of the option, for messages.

    Raises DataError for a source without single pictures, and for pictures of another size.
    """
    options: dict[str, Any] = {}
    source = sources.SOURCES.get(sources.source_name(spec))
    if source is not None and "size=" not in spec.partition("?")[2]:
        loader = getattr(import_module(source.module), source.function)
        options = {"size": data.size} if "size" in inspect.signature(loader).parameters else {}
    found = sources.load(spec, task="views", **options)
    if not isinstance(found, ImageData):
        raise DataError(f"{option} {spec} has no single pictures")
    if found.size != data.size:
        raise DataError(
            f"{option} {spec} has pictures of {found.size} pixels, and {data.name} of {data.size}; give both one size (?size=N)"
        )
    # The user's own files are all web pictures. A built-in source's valid and test pictures may be those of the data.
    own = source is not None and source.argument is not None
    return [found.train, found.valid, found.test] if own else [found.train]


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class WebConfig(LabelledConfig):
    """Settings of every student of web pictures."""

    web: str = ""
    """Source of pictures without labels: imagefolder:DIR or another source of images. Default: those that come with the data."""
    teacher: str = ""
    """Network that teaches: run:RUN, fit:SLUG?data=SOURCE, or timm:NAME, torchvision:NAME, hf:NAME with the published classifier.
    Default: first train a teacher in this run, on the labelled pictures."""
    teacher_size: int = 0
    """Pixels to which pictures are scaled for a published teacher; 0: the size that it was trained with."""
    teacher_encoder: str = "torchvision:resnet34"
    """Encoder of a teacher that this run trains."""
    teacher_epochs: int = 240
    """Passes over the labelled pictures by the teacher, before the student's; with --teacher, none."""
    teacher_lr: float = 0.1
    """The teacher's learning rate at a batch of 256; it falls to 0 on half a cosine."""
    epoch_of: Literal["selected", "all"] = "selected"
    """Length of an epoch: one pass over the selected pictures, or as many steps as all web pictures have."""
    decay: Literal["steps", "cosine"] = "steps"
    """Learning rate of the student: a tenth after 5/8, 6/8 and 7/8 of the epochs, or half a cosine."""

    uses_unlabelled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("teacher_lr")
        for name in ("teacher_epochs", "teacher_size"):
            if getattr(self, name) < 0:
                raise CounterpointError(f"{name} must not be negative, got {getattr(self, name)}")

    def check(self) -> None:
        super().check()
        kind, _, rest = self.teacher.partition(":")
        if self.teacher and not os.path.isdir(self.teacher) and (kind not in KINDS or not rest):
            raise unknown("teacher", self.teacher, [f"{known}:NAME" for known in KINDS])
        if not self.teacher:
            check_image_encoder(self.teacher_encoder)

    def facts(self, data: ImageData) -> dict[str, Any]:
        found = super().facts(data)
        first = len(data.bank) if data.bank is not None else len(data.train)
        found |= {"first": first, "web": len(data.train) - first}
        if self.teacher:
            network = load_teacher(self, found["size"], found["channels"], found["class_names"])
            found["teacher_map"] = list(network.shape(data.size))
        return found


# Settings for a small set of small pictures on a few cores, which replace the paper's.
LAPTOP: dict[str, Any] = labelled.LAPTOP | {
    "encoder": "conv-fine",
    "teacher_encoder": "resnet-s",
    "teacher_epochs": 20,
    "teacher_lr": 0.4,
    "epochs": 40,
    "lr": 0.1,
    "warmup_epochs": 0,
    "epoch_of": "all",
    "evaluate_every": 10,
}

# ------------------------------------------------------------------------------------------------------------ the teacher


class Looked(NamedTuple):
    """What a teacher sees in a batch."""

    map: Tensor  # [n, channels, height, width], the last map
    pooled: Tensor  # [n, channels], its mean over positions, the classifier's input
    logits: Tensor  # [n, classes]


class TeacherNetwork(nn.Module):
    """An encoder and a linear classifier, with access to the map that the classifier's input is the mean of.

    A vector that is not the mean of the encoder's last map is itself the map, of one position.

    Args:
        encoder, classifier: the two parts.
        pictures: pictures for which `look` is called, to examine the encoder with.
        size: height and width to which pictures are scaled; 0: none.
        mean, std: of the normalisation that the encoder expects; pictures come with the package's own.
    """

    def __init__(
        self,
        encoder: Any,
        classifier: nn.Linear,
        pictures: Tensor,
        size: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.encoder, self.classifier, self.size, self.channels = encoder, classifier, size, pictures.shape[1]
        self.change: tuple[list[float], list[float]] | None = None
        if tuple(mean) != tuple(MEAN) or tuple(std) != tuple(STD):
            pairs = list(zip(MEAN, STD, mean, std, strict=True))
            self.change = [b / d for _, b, _, d in pairs], [(a - c) / d for a, _, c, d in pairs]
        self.spatial = self._mean_of_map(pictures)

    @torch.no_grad()
    def _mean_of_map(self, pictures: Tensor) -> bool:
        if not has_map(self.encoder):
            return False
        training = self.encoder.training
        self.encoder.eval()
        try:
            x = self._taken(pictures)
            vector, found = vector_and_map(self.encoder, x)
            return vector.shape == found.shape[:2] and torch.allclose(vector, found.mean((2, 3)), rtol=1e-3, atol=1e-5)
        except CounterpointError:
            return False
        finally:
            self.encoder.train(training)

    def _taken(self, images: Tensor) -> Tensor:
        """Convert pictures to the size and normalisation of the encoder."""
        if self.change is not None:
            scale, shift = (images.new_tensor(values)[:, None, None] for values in self.change)
            images = images * scale + shift
        if self.size and images.shape[2] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return images

    def look(self, images: Tensor) -> Looked:
        """Compute the last map, its mean and the logits of normalised pictures."""
        x = self._taken(images)
        if self.spatial:
            pooled, found = vector_and_map(self.encoder, x)
        else:
            pooled = self.encoder(x)
            found = pooled[:, :, None, None]
        return Looked(found, pooled, self.classifier(pooled))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(self._taken(images)))

    @torch.no_grad()
    def shape(self, size: int) -> tuple[int, int, int]:
        """Return channels, height and width of the map of pictures of `size` pixels."""
        training = self.training
        device = self.classifier.weight.device
        found = self.eval().look(torch.zeros(1, self.channels, size, size, device=device)).map.shape
        self.train(training)
        return found[1], found[2], found[3]


def at_one_size(student: Tensor, teacher: Tensor | Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Pool the larger of two maps to the other's height and width; `teacher` may be a shape alone."""
    shape = teacher.shape if isinstance(teacher, Tensor) else teacher
    size = min(student.shape[-2], shape[-2]), min(student.shape[-1], shape[-1])

    def pooled(x: Tensor) -> Tensor:
        return x if tuple(x.shape[-2:]) == size else F.adaptive_avg_pool2d(x, size)

    return pooled(student), pooled(teacher) if isinstance(teacher, Tensor) else None


def _some(size: int, channels: int) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def load_teacher(config: WebConfig, size: int, channels: int, names: Sequence[str]) -> TeacherNetwork:
    """Load the network that `--teacher` names.

    Args:
        config: the settings.
        size, channels: of the pictures.
        names: classes of the data; the teacher must have as many. If a teacher names the same classes in another order, its
            classifier is reordered.

    Raises CounterpointError or RunError, which name the teacher, where it cannot teach on these data.
    """
    name = config.teacher
    kind = name.partition(":")[0]
    pictures = _some(size, channels)
    if kind in ("timm", "torchvision", "hf"):
        found = published_classifier(name)
        head = _reordered(found.classifier, found.classes, names)
        network = TeacherNetwork(
            found.encoder, head, pictures, config.teacher_size or found.size, found.mean, found.std
        )
    else:
        source = name if kind in ("run", "fit") else f"run:{name}"
        learner: Any = frozen(source).module
        parts = getattr(learner, "encoder", None), getattr(learner, "classifier", None)
        if parts[0] is None or not isinstance(parts[1], nn.Linear) or parts[1].in_features != parts[0].dim:
            raise RunError(
                f"--teacher {name} cannot teach: it has no linear classifier on its encoder; name a run of kd or of sla with "
                "method plain"
            )
        network = TeacherNetwork(parts[0], parts[1], pictures)
        if source.startswith("run:"):
            own = Run.open(source.removeprefix("run:")).facts()
            for fact, wanted in (("size", size), ("channels", channels), ("class_names", list(names))):
                if own.get(fact) != wanted:
                    raise RunError(
                        f"--teacher {name} cannot teach here: it was trained with {fact.replace('_', ' ')} {own.get(fact)}, "
                        f"not {wanted}"
                    )
    if network.classifier.out_features != len(names):
        raise CounterpointError(
            f"--teacher {name} has {network.classifier.out_features} classes, and the data has {len(names)}; name a teacher "
            "of the data's classes"
        )
    return network.eval()


def _reordered(head: nn.Linear, classes: Sequence[str], names: Sequence[str]) -> nn.Linear:
    if sorted(classes) == sorted(names) and list(classes) != list(names):
        order = [list(classes).index(name) for name in names]
        head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    return head


# ---------------------------------------------------------------------------------------------------------- the learner


class WebLearner(ImageLearner):
    """A student of selected web pictures, and a teacher that is trained first or is given. Subclasses write `select`.

    Attributes:
        selected: [web] the web pictures of the current epoch.
        first: position of the first web picture in the training split.
    """

    selected: Bool[Tensor, " web"]
    unkept: ClassVar[tuple[str, ...]] = ("selected",)  # buffers by position that a finished run does not keep

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        # Facts that `counterpoint.create` need not have: then all pictures are web pictures.
        self.first, self.web = getattr(data, "first", 0), getattr(data, "web", self.examples or 0)
        self.class_names = list(getattr(data, "class_names", ()))
        self.channels = data.channels
        self.teacher: TeacherNetwork | None = None
        self.instructor: Frozen | None = None  # set when a fit begins
        if not config.teacher:
            encoder = build_image_encoder(config.teacher_encoder, data.size, channels=data.channels)
            classifier = nn.Linear(encoder.dim, data.classes)
            self.teacher = TeacherNetwork(encoder, classifier, _some(data.size, data.channels))
        self.teacher_map: tuple[int, int, int] = (
            self.teacher.shape(data.size) if self.teacher is not None else tuple(data.teacher_map)
        )
        self.register_buffer("selected", torch.zeros(self.web, dtype=torch.bool))

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.teacher:
            network = load_teacher(self.config, self.size, self.channels, self.class_names)
            self.instructor = Frozen(network, self.config.teacher, network.look)

    @property
    def instructing(self) -> TeacherNetwork:
        """The teacher's network."""
        network: Any = self.teacher if self.instructor is None else self.instructor.module
        if network is None:
            raise CounterpointError("the teacher is loaded only in a fit")
        return network

    def sizes(self) -> tuple[int, int] | None:
        return parameters(self.encoder), parameters(self.instructing.encoder)

    def instruct(self, images: Tensor) -> Looked:
        """Compute the teacher's outputs, in evaluation mode and without gradient."""
        with torch.no_grad():
            return self.instructing.eval().look(images)

    # --- stages

    def stages(self) -> list[Stage]:
        student = Stage(
            "student", self.config.epochs, trains=self.student_parts, batches=self.web_batches, enter=self.enter_student
        )
        if self.teacher is None or not self.config.teacher_epochs:
            return [student]
        teacher = self.teacher
        first = Stage(
            "teacher",
            self.config.teacher_epochs,
            trains=lambda: [teacher],
            turns=self.teacher_turns,
            batches=self.labelled_batches,
        )
        return [first, student]

    @property
    def at_teacher(self) -> bool:
        """Whether the current stage trains the teacher."""
        return self.survey is not None and self.position.stage + 1 < len(self.stages())

    def student_parts(self) -> list[nn.Module]:
        """Return the modules that the student's stage trains."""
        return [module for name, module in self.named_children() if name != "teacher"]

    def enter_student(self, survey: Survey) -> None:
        """Prepare the student's stage."""

    def turns(self) -> list[Turn]:
        config, epochs = self.config, self.epochs
        steps = (
            None if config.decay == "cosine" else lambda epoch: 0.1 ** sum(epoch >= n * epochs / 8 for n in (5, 6, 7))
        )
        return [self.turn_of(self.student_parts(), curve=steps)]

    def teacher_turns(self) -> list[Turn]:
        """Return the turns of the teacher's stage."""
        return [self.turn_of([self.instructing], rate=self.config.teacher_lr / self.config.lr)]

    def teacher_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of the teacher's stage, cross-entropy."""
        (view,) = batch["views"]
        return {"loss": cross_entropy(self.instructing(view), batch["label"])}

    # --- batches

    def labelled_batches(self, survey: Survey) -> Batches:
        """Return the batches of the teacher's stage."""
        size = min(survey.batch_size, self.first)
        return ChosenBatches(np.arange(self.first), size, self.first // size)

    def web_batches(self, survey: Survey) -> Batches:
        """Return the batches of the selected web pictures."""
        fill = self.config.epoch_of == "all"
        return RenewedBatches(self.web, min(survey.batch_size, self.web), self._renewed, self._current, fill=fill)

    def _current(self) -> Indices:
        return self.first + self.selected.nonzero()[:, 0].cpu().numpy()

    def _renewed(self) -> Indices:
        assert self.survey is not None
        self.selected.copy_(self.select(self.survey))
        return self._current()

    @cached_property
    def positions(self) -> Indices:
        """Positions of the web pictures in the training split."""
        return np.arange(self.first, self.first + self.web)

    def select(self, survey: Survey) -> Bool[Tensor, " web"]:
        """Return the web pictures of the epoch that begins, at least one. Default: all."""
        return torch.ones(self.web, dtype=torch.bool)

    # --- what remains

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = {} if self.at_teacher else super().predict(batch)
        if self.teacher is not None or self.instructor is not None:
            found["teacher_logits"] = self.instruct(batch["image"]).logits
        return found

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.instructing.encoder, "forward")] if self.at_teacher else map_networks(self.encoder)

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name not in self.unkept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. A finished run's state lacks what is kept by position: that stays unchanged."""
        own = {name: value for name, value in self.state_dict().items() if name in self.unkept}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)
