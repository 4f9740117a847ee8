"""Teach pairs of towers by a network of pictures and texts; mask, cut and replace the towers in the stages of a fit.

A student may inherit from a teacher whose networks are towers (`encoders/towers.py`) in two ways:

    manual    every n-th block, leading channels and leading heads (`core/inherited.py`)
    auto      the whole teacher, whose units get masks (`Gates`); later `cut` removes the masked units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.class_texts import class_prototypes
from counterpoint.core.inherited import inherit_weights
from counterpoint.core.operands import unit
from counterpoint.data.pairs import Modality
from counterpoint.encoders.text import Tokenizer
from counterpoint.encoders.towers import NAME, Gates, ImageTower, Shape, TextTower, Tower, parse
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Cached, Frozen, cached, parameters
from counterpoint.errors import CounterpointError
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, one_each
from counterpoint.tasks.aligned.classes import by_prompts, prompts_of
from counterpoint.tasks.aligned.retrieval import Sameness, pairwise_figures
from counterpoint.tasks.class_teachers import AlignedDual, check_class_teacher, open_network, teacher_config


def teacher_towers(name: str) -> AlignedDual:
    """Load a teacher to inherit from. Raises CounterpointError unless both of its networks are whole towers."""
    found: Any = open_network(name)
    if isinstance(found, AlignedDual):
        networks = [found.learner.encoders[part] for part in (found.image, found.text)]
        if all(isinstance(one, Tower) and one.shape.is_whole for one in networks):
            return found
        name = f"{name} with {found.learner.config.image_encoder} and {found.learner.config.text_encoder}"
    raise CounterpointError(
        f"cannot inherit from the teacher {name}: train it with --image-encoder tower-WIDTH-DEPTH-HEAD and --text-encoder "
        "tower-WIDTH-DEPTH-HEAD and without cuts, or choose --inherit none"
    )


@dataclass
class TowerConfig(AlignedConfig):
    """Settings of every student of a network of pictures and texts."""

    teacher: str = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    """The teacher of pictures and texts: run:RUN or fit:SLUG?data=SOURCE of clip or siglip, hf:NAME, open_clip:MODEL/WEIGHTS."""
    inherit: Literal["none", "manual", "auto"] = "none"
    """Begin from random weights, from leading parts of the teacher, or as the teacher, of which learned masks cut units."""
    steps: str = ""
    """With manual: towers of the stages before the last, IMAGE/TEXT with "|" between stages. Default: one stage."""
    teacher_scale: float = 50.0
    """Factor of the teacher's cosines, > 0; 0: the teacher's own."""
    cached: bool = False
    """Compute the teacher's embeddings of pictures without augmentation once, and keep them on disk. Default: of the same view."""

    adapts: ClassVar[bool] = False  # its towers are masked, cut and replaced

    @classmethod
    def of_names(cls, teacher: str, student: str) -> dict[str, Any]:
        """Return the settings of a student by name: "teacher" is cut out of it, a tower inherits, any other begins anew."""
        found = {"teacher": teacher}
        towers = NAME.fullmatch(student)
        if not teacher.startswith(("run:", "fit:")) or not (towers or student == "teacher"):
            return found | {"inherit": "none", "image_encoder": student}
        own = teacher_config(teacher)
        found |= {"embedding": own.embedding, "context": own.context}
        if not towers:
            return found | {"inherit": "auto", "image_encoder": own.image_encoder, "text_encoder": own.text_encoder}
        text = "tower-" + "-".join(towers.groups()[:3])  # without the patch
        return found | {"inherit": "manual", "image_encoder": student, "text_encoder": text}

    def check(self) -> None:
        super().check()
        check_class_teacher(self.teacher)
        if self.teacher.startswith("file:"):
            raise CounterpointError(f"--teacher {self.teacher}: embeddings alone do not suffice; name a network")
        if self.inherit != "none" and not self.teacher.startswith(("run:", "fit:")):
            raise CounterpointError(
                f"--inherit {self.inherit} needs a teacher with towers of this library, run:RUN or fit:SLUG?...; {self.teacher} "
                "can teach with --inherit none"
            )
        if self.inherit == "manual":
            for names in self.path():
                for name in names:
                    parse(name)

    def path(self) -> list[tuple[str, str]]:
        """Return the towers of each stage of manual inheritance: names for pictures and texts."""
        parts = [part.split("/") for part in self.steps.split("|") if part]
        if any(len(part) != 2 for part in parts):
            raise CounterpointError(f"steps must be IMAGE/TEXT with | between stages, got '{self.steps}'")
        return [(part[0], part[1]) for part in parts] + [(self.image_encoder, self.text_encoder)]

    def tokenizer(self, captions: Sequence[str]) -> Tokenizer:
        """Return the teacher's tokenizer, if the student inherits the teacher's embeddings of tokens."""
        if self.inherit == "none":
            return super().tokenizer(captions)
        found: Tokenizer = teacher_towers(self.teacher).tokenizer
        return found


class TowerLearner(AlignedLearner):
    """A student of one picture and one text modality with a teacher of both. Its networks may be towers, which stages replace.

    Attributes:
        image, text: names of the modalities.
        teacher: the teacher, during a fit.
        taught_scale: factor of the teacher's cosines, during a fit.
    """

    taught_scale: float

    def __init__(self, config: Any, data: Any, seed: int = 0, *, slug: str) -> None:
        self.image, self.text = one_each(data.modalities, slug, "image", "text")
        super().__init__(config, data, seed)
        self.teacher: Frozen | None = None
        self.known: dict[str, Cached] = {}
        self.replaced = False

    # --- the teacher

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        network = teacher_towers(config.teacher) if config.inherit != "none" else open_network(config.teacher)
        self.teacher = Frozen(network.to(self.device), config.teacher, network.images)
        self.taught_scale = config.teacher_scale or network.scale
        if config.cached:
            of_pictures = Frozen(network, config.teacher, lambda batch: network.images(batch["inputs"][self.image]))
            of_texts = Frozen(
                network, config.teacher, lambda batch: network.texts(self.captions(batch["index"]), cut=True)
            )
            self.known = {
                self.image: cached(of_pictures, survey, "train", "image"),
                self.text: cached(of_texts, survey, "train", "text"),
            }

    @property
    def network(self) -> Any:
        """The teacher, during a fit."""
        if self.teacher is None:
            raise CounterpointError("the teacher is read when a fit begins: train with `counterpoint train`")
        return self.teacher.module

    def sizes(self) -> tuple[int, int] | None:
        if self.teacher is None:
            return None
        masks = sum(parameters(one) for one in self.gates())
        return parameters(self.encoders, self.heads) - masks, parameters(self.network)

    def captions(self, index: Tensor) -> list[str]:
        """Return the words of training items."""
        assert self.survey is not None
        return [str(text) for text in self.survey.split().column(self.text, index.cpu().numpy())]

    @torch.no_grad()
    def taught(self, batch: Mapping[str, Any], both: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the teacher's unit rows, of this type, of the items that have a picture and a text."""
        index = batch["index"].to(both.device)[both]
        if not len(index):  # of this process; others have some
            rows = (torch.zeros(0, self.network.dim, device=index.device),) * 2
        elif self.known:
            rows = self.known[self.image][index], self.known[self.text][index]
        else:
            texts = self.network.texts(self.captions(index), cut=True)
            assert self.teacher is not None
            rows = self.teacher(batch["inputs"][self.image][both].float()), texts
        return unit(rows[0]).to(dtype), unit(rows[1]).to(dtype)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the teacher on `test`, where a fit has one: retrieval, and classification by the prompts."""
        if split != "test" or self.teacher is None:
            return {}
        items, teacher = survey.split(split), self.teacher
        at = np.arange(len(items))

        def rows(texts: Sequence[str]) -> Tensor:
            return unit(self.network.texts(list(map(str, texts)), cut=True)).cpu()

        pictures = unit(survey.over(split, lambda batch: teacher(batch["inputs"][self.image])))
        both = {self.image: pictures, self.text: rows(items.column(self.text, at))}
        there = {name: torch.from_numpy(items.present(name, at)) for name in both}
        data: Any = SimpleNamespace(modalities={k: Modality(**spec) for k, spec in self.facts.modalities.items()})
        found = {"mean_recall": pairwise_figures(both, there, Sameness(data, items), None)["mean_recall"]}
        if survey.classes and items.labels is not None:
            prompts = rows(prompts_of(survey.classes, self.config)).unflatten(0, (len(survey.classes), -1))
            found |= by_prompts(both, there, torch.from_numpy(items.labels), {self.text: class_prototypes(prompts)})
        return {f"teacher_{name}": value for name, value in found.items()}

    # --- towers

    def towers(self) -> list[Tower]:
        """Return both networks, if they are towers."""
        both: list[Any] = [self.encoders[self.image], self.encoders[self.text]]
        return both

    def gates(self) -> list[Gates]:
        """Return the masks of both towers; none while no masks are learned."""
        return [one.gates for one in self.towers() if isinstance(one, Tower) and one.gates is not None]

    def projection(self, name: str) -> Float[Tensor, "embedding channels"]:
        """Return the weight of a modality's projection."""
        head: Any = self.heads[name]
        weight: Tensor = head.weight
        return weight.detach()

    def place(self, towers: list[Tower], heads: Mapping[str, Tensor]) -> None:
        """Replace both networks and their projections."""
        for name, tower in zip((self.image, self.text), towers, strict=True):
            self.encoders[name] = tower
            weight = heads[name]
            self.heads[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            self.projection(name).copy_(weight)
        self.to(weight.device)
        self.replaced = True

    def structure(self) -> dict[str, Any]:
        if not self.replaced:
            return {}
        image, text = self.towers()
        return {
            "image": vars(image.shape) | {"made": list(image.made)},
            "text": vars(text.shape) | {"made": list(text.made)},
            "embedding": len(self.projection(self.image)),
            "masks": bool(self.gates()),
        }

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if not structure:
            return
        image, text = dict(structure["image"]), dict(structure["text"])
        made = tuple(image.pop("made")), tuple(text.pop("made"))
        towers: list[Tower] = [ImageTower(Shape.of(image), *made[0]), TextTower(Shape.of(text), *made[1])]
        width = structure["embedding"]
        heads = {name: torch.empty(width, one.dim) for name, one in zip((self.image, self.text), towers, strict=True)}
        self.place(towers, heads)
        if structure["masks"]:
            for tower in towers:
                tower.gates = Gates(tower.shape)

    # --- inheritance

    def inherit(self, names: tuple[str, str], first: bool, survey: Survey) -> None:
        """Begin a stage of manual inheritance: take parts of the teacher's weights or, after the first stage, of its own.

        Args:
            names: towers of this stage, for pictures and texts.
            first: inherit from the teacher.
            survey: access to the data.

        Raises CounterpointError for towers that are no part of those to inherit from.
        """
        teacher = self.network
        of: Any = teacher.learner if first else self
        places = (teacher.image, teacher.text) if first else (self.image, self.text)
        towers, heads = list[Tower](), dict[str, Tensor]()
        for own, place, name in zip((self.image, self.text), places, names, strict=True):
            source, weight = of.encoders[place], of.heads[place].weight.detach()
            tower = self._new_tower(own, name, source)
            try:
                tower.load_state_dict(inherit_weights(tower.state_dict(), source.state_dict(), source.shape.head_dim))
            except ValueError as error:
                asked = "--image-encoder" if own == self.image else "--text-encoder"
                raise CounterpointError(
                    f"--inherit manual: {name} of {own}: {error}; choose a smaller {asked}"
                ) from error
            if self.config.embedding > len(weight):
                raise CounterpointError(
                    f"--inherit manual: the teacher's embedding is {len(weight)} wide; use --embedding {len(weight)} or less, got "
                    f"{self.config.embedding}"
                )
            towers.append(tower)
            heads[own] = weight[: self.config.embedding, : tower.dim]
        self.place(towers, heads)

    def _new_tower(self, own: str, name: str, source: Any) -> Tower:
        """Return a tower by name that may inherit from `source`: alike but for depth and width."""
        shape, patch = parse(name)
        if shape.head_dim != source.shape.head_dim:
            raise CounterpointError(
                f"--inherit manual: heads of {name} are {shape.head_dim} channels wide, the teacher's {source.shape.head_dim}"
            )
        if own == self.text:
            if self.config.context > source.length:
                raise CounterpointError(
                    f"--inherit manual: the teacher reads {source.length} tokens; use --context {source.length} or less, got "
                    f"{self.config.context}"
                )
            return TextTower(shape, source.vocabulary, self.config.context)
        tower = ImageTower(shape, self.facts.modalities[own]["size"], 3, patch)
        if tower.made != source.made:
            raise CounterpointError(
                f"--inherit manual: {name} sees pictures of {tower.made[0]} pixels in patches of {tower.made[2]}, the "
                f"teacher of {source.made[0]} in patches of {source.made[2]}; use the teacher's size (?size=) and patch"
            )
        return tower

    def mask(self, first: bool, survey: Survey) -> None:
        """Begin to learn masks: of a copy of the teacher or, after the first stage, of the network that was cut before.

        Raises CounterpointError for pictures and texts of other sizes than the teacher reads.
        """
        if first:
            found = self.network
            places = {self.image: found.image, self.text: found.text}
            image, text = (found.learner.encoders[name] for name in places.values())
            size = self.facts.modalities[self.image]["size"]
            if image.made[0] != size or text.length < self.config.context:
                raise CounterpointError(
                    f"--inherit auto: the teacher reads pictures of {image.made[0]} pixels and {text.length} tokens, this run has "
                    f"{size} and {self.config.context}; use ?size= and --context"
                )
            towers: list[Tower] = [image.again(image.shape), text.again(text.shape)]
            for new, old in zip(towers, (image, text), strict=True):
                new.load_state_dict(old.state_dict())
            self.place(towers, {own: found.learner.heads[name].weight.detach() for own, name in places.items()})
        for tower in self.towers():
            tower.gates = Gates(tower.shape)

    def cut(self, leading: bool, survey: Survey) -> None:
        """Remove what the masks remove, or as many last units, and end the masks' training."""
        towers = self.towers()
        if leading:
            for tower in towers:
                assert tower.gates is not None
                tower.gates.lead()
        smaller = [tower.cut() for tower in towers]
        heads = {}
        for name, before, after in zip((self.image, self.text), towers, smaller, strict=True):
            at = [before.shape.kept[0].index(channel) for channel in after.shape.kept[0]]
            heads[name] = self.projection(name)[:, at]
        self.place(smaller, heads)
