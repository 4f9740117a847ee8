"""Teach pairs of towers by a network of pictures and texts; mask, cut and replace the towers in the stages of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.encoders.towers import Gates, ImageTower, Shape, TextTower, Tower
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Cached, Frozen, cached, parameters
from counterpoint.errors import CounterpointError
from counterpoint.tasks.aligned import AlignedLearner, one_each
from counterpoint.tasks.class_teachers import AlignedDual, open_network


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


class TowerLearner(AlignedLearner):
    """A student of one picture and one text modality with a teacher of both. Its networks may be towers, which stages replace.

    Its settings have `teacher`, `teacher_scale` (0: the teacher's own) and `cached`.

    Attributes:
        image, text: names of the modalities.
        inherits: whether the teacher must have towers.
        teacher: the teacher, during a fit.
        taught_scale: factor of the teacher's cosines, during a fit.
    """

    taught_scale: float

    def __init__(self, config: Any, data: Any, seed: int = 0, *, slug: str, inherits: bool) -> None:
        self.image, self.text = one_each(data.modalities, slug, "image", "text")
        super().__init__(config, data, seed)
        self.inherits = inherits
        self.teacher: Frozen | None = None
        self.known: dict[str, Cached] = {}
        self.replaced = False

    # --- the teacher

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        network = teacher_towers(config.teacher) if self.inherits else open_network(config.teacher)
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
        assert self.teacher is not None
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
    def taught(self, batch: Mapping[str, Any], both: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's unit rows of the items that have a picture and a text."""
        index = batch["index"].to(both.device)[both]
        if self.known:
            rows = self.known[self.image][index], self.known[self.text][index]
        else:
            if self.teacher is None:
                raise CounterpointError(
                    "tinyclip reads its teacher when a fit begins: train it with `counterpoint train`"
                )
            rows = (
                self.teacher(batch["inputs"][self.image][both].float()),
                self.network.texts(self.captions(index), cut=True),
            )
        return unit(rows[0]), unit(rows[1])

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
