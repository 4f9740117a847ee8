"""Learn the classes of pictures in phases with a network of pictures and texts that trains as a whole: settings and measures.

The network begins as `--teacher`. A phase is a domain of the data (tasks/phases.py), and its classes C_p are those of its training
pictures. So `stream:SOURCE?by=class` is class-incremental, and domains with the same classes are domain-incremental. After each
phase two matrices A[t, p] are kept, which differ in the candidates of a picture of phase p:

    own     the classes C_p, as when the task is known (task-incremental)
    seen    the classes of the phases 0 to max(t, p), as when it is not (class-incremental)

Measures, for own and, named seen_..., for seen candidates:

    last, average, transfer, forgetting     see phases.task_figures
    seen_average                            mean over t of the mean over p <= t of A[t, p]
    zero_shot                               mean over p of the original network's accuracy

Only `last`, `seen_last` and `zero_shot` exist before the last phase ends. The matrix of the test split is filled as phases end, as
its networks are then gone. Nothing is chosen by it, and its measures appear once, at the end.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.class_texts import class_prototypes, cosine_text_logits
from counterpoint.data.images import ImageData
from counterpoint.encoders.dual import build_dual_encoder
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import snapshot
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.class_teachers import AlignedDual, check_class_teacher, need_apart, open_network
from counterpoint.tasks.class_texts import templates_of, texts_of
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.kept_classes import labelled_rows
from counterpoint.tasks.labelled import LabelledConfig
from counterpoint.tasks.phases import Phased, check_phases, heat_map, lost, task_figures
from counterpoint.words import counted

SPLITS = ("valid", "test")
FIXED = ("log_scale", "logit_scale", "logit_bias")  # parameters of a pair network that do not train


@dataclass
class TaskStreamConfig(LabelledConfig):
    """Settings of learners from a stream of classes."""

    teacher: str = "hf:openai/clip-vit-base-patch16"
    """The network of pictures and texts to begin with: hf:NAME, open_clip:MODEL/WEIGHTS, or run:RUN or fit:SLUG?data=SOURCE of
    clip. It replaces --encoder."""
    templates: str = "a photo of a {}."
    """Texts of a class, with {} for its name: one, several between "|", or a text file with one a line."""
    class_names: str = ""
    """File of names for the classes: JSON {class: name} or a line for each class. Default: the data's."""
    phases: int = 0
    """Number of phases: consecutive groups of domains or, without domains, of training items. 0: one for each domain."""
    first_epochs: int = 0
    """Passes over the items of the first phase; 0: as many as over the others' (`epochs`)."""
    joint: bool = False
    """Train on the items of all phases at once, with `first_epochs` passes: the upper bound."""

    adapts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phases(self.phases, self.first_epochs)

    def check(self) -> None:
        super().check()
        check_class_teacher(self.teacher)
        templates_of(self.templates)
        if self.teacher.startswith("file:"):
            raise CounterpointError(f"--teacher {self.teacher}: embeddings cannot be trained; name a network")

    def facts(self, data: ImageData) -> dict[str, Any]:
        return super().facts(data) | {"domains": list(data.domains), "network": network_facts(self.teacher)}


def network_facts(name: str) -> dict[str, Any]:
    """Return what `PairEncoder` needs to build a network of pictures and texts, fit for JSON.

    Args:
        name: run:RUN, fit:SLUG?data=SOURCE, hf:NAME or open_clip:MODEL/WEIGHTS.

    Raises CounterpointError for a run that does not embed pictures and texts.
    """
    kind, _, rest = name.partition(":")
    if kind in ("hf", "open_clip"):
        return {"name": name}
    room = importlib.import_module("counterpoint.experiment")  # above this package
    experiment, seed = (room.Experiment.of_run(rest), 0) if kind == "run" else room.of_spec(rest)
    network: Any = open_network(name)
    return {"record": experiment.record(seed), "facts": dict(vars(network.learner.facts))}


class PairEncoder(ImageEncoder):
    """A network of pictures and texts in one space, whose weights train; the scale of its logits does not.

    Args:
        facts: what `network_facts` returned.
        name: what messages call it.
    """

    def __init__(self, facts: Mapping[str, Any], name: str) -> None:
        super().__init__()
        if "name" in facts:
            self.network = copy.deepcopy(build_dual_encoder(str(facts["name"])))
        else:
            room = importlib.import_module("counterpoint.experiment")
            self.network = AlignedDual(room.untrained(facts["record"], facts["facts"]), name)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] not in FIXED)
        self.dim = self.network.dim
        self.still = True  # running statistics stay: a phase begins exactly as its teachers

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of normalised pictures of any size. They are not normalised."""
        return self.network.images(images)

    def class_rows(self, texts: Sequence[Sequence[str]]) -> Float[Tensor, "classes dim"]:
        """Compute a unit row for each class, the mean over its texts; with gradient."""
        flat = [text for of_class in texts for text in of_class]
        rows = self.network.token_embeddings(*self.network.token_ids(flat))
        return class_prototypes(rows.unflatten(0, (len(texts), -1)))


class TaskStreamLearner(Phased, ImageLearner):
    """A network of pictures and texts in phases. `origin` and `previous` are frozen copies of its beginning and last phase."""

    encoder: PairEncoder
    prototypes: Tensor  # [classes, dim] unit rows of all classes' texts, for evaluation
    scale: Tensor  # factor of cosines in the logits, as the network begins
    members: Tensor  # [phases, classes] whether a class is one of the phase
    history: Tensor  # [valid and test, after, on, own and seen] accuracies, -1 where unknown

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.set_phases(config, list(data.domains))
        self.class_names = list(data.class_names)
        self.texts = texts_of(self.class_names, config.templates, config.class_names)
        self.origin, self.previous = snapshot(self.encoder), snapshot(self.encoder)
        self.register_buffer("prototypes", torch.zeros(data.classes, self.encoder.dim))
        self.register_buffer("scale", torch.tensor(100.0))
        self.register_buffer("members", torch.zeros(self.phases, data.classes, dtype=torch.bool))
        self.register_buffer("history", torch.full((2, self.phases, self.phases, 2), -1.0))

    def build_encoder(self, data: Any) -> ImageEncoder:
        return PairEncoder(data.network, self.config.teacher)

    def take_start(self) -> None:
        network = open_network(self.config.teacher)
        self.encoder.network.load_state_dict(network.state_dict())
        self.scale.fill_(network.scale)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        for teacher in (self.origin, self.previous):
            teacher.module.load_state_dict(self.encoder.state_dict())
        self.refresh()
        need_apart(self.prototypes, self.class_names, self.config.teacher)
        labels, phase = np.asarray(survey.split().labels)[survey.rows], self.phase_of(survey, "train")[survey.rows]
        self.members.zero_()
        self.members[torch.from_numpy(phase), torch.from_numpy(labels)] = True
        few = (self.members.sum(1) < 2).nonzero().flatten().tolist()
        if few and not self.config.joint:
            raise DataError(
                f"{self.names[few[0]]} has training pictures of {counted(int(self.members[few[0]].sum()), 'class')}, and nothing "
                "to tell it from; use fewer phases"
            )

    @property
    def classes(self) -> NDArray[np.int64]:
        """Numbers of the current phase's classes."""
        own = self.members.any(0) if self.config.joint else self.members[self.phase]
        return own.nonzero().flatten().cpu().numpy()

    def texts_of_phase(self) -> list[list[str]]:
        """Return the texts of the current phase's classes."""
        return [self.texts[c] for c in self.classes]

    def enter_phase(self, phase: int, survey: Survey) -> None:
        if phase:
            self.previous = snapshot(self.encoder)

    # --- measures

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the classes' texts again, which evaluation uses."""
        training = self.encoder.training
        self.encoder.eval()
        self.prototypes.copy_(self.encoder.class_rows(self.texts))
        self.encoder.train(training)

    def begin_evaluation(self, survey: Survey) -> None:
        super().begin_evaluation(survey)
        self.refresh()

    def classify(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n classes"]:
        """Compute logits of embedded pictures by the classes' texts."""
        return cosine_text_logits(rows.float(), self.prototypes, self.scale)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = self.embed(batch["image"])
        return {"feature": rows, "logits": self.classify(rows)}

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if self.survey is None or not self.last_epoch:
            return
        self.refresh()
        row = self.phase if not self.config.joint else self.phases - 1
        for at, split in enumerate(SPLITS):
            found = self.accuracies(self.survey, split)
            self.history[at, row] = torch.from_numpy(found).nan_to_num(-1.0).to(self.history)

    def accuracies(self, survey: Survey, split: str, *, original: bool = False) -> NDArray[np.float64]:
        """Return accuracies [phases, 2] on the pictures of each phase, among own and seen candidates; NaN without pictures.

        Args:
            survey: access to the data.
            split: valid or test.
            original: measure the original network instead of the learner.
        """
        rows, labels = labelled_rows(survey, split)
        if original:
            teacher: Any = self.origin.module
            with torch.no_grad():
                texts = teacher.class_rows(self.texts)
            logits = survey.over(
                split, lambda b: cosine_text_logits(self.origin(b["image"]).float(), texts, self.scale), rows
            )
        else:
            logits = survey.over(split, lambda b: self.classify(self.embed(b["image"])), rows)
        phase, whole = self.phase_of(survey, split)[rows], not self.domains
        now, members = (0 if original else self.phase), self.members.cpu()
        now = self.phases - 1 if self.config.joint else now
        found = np.full((self.phases, 2), np.nan)
        for p in range(self.phases):
            at = torch.from_numpy((phase == p) | whole)
            for way, candidates in enumerate((members[p], members[: max(now, p) + 1].any(0))):
                if bool(at.any()):
                    best = logits[at].masked_fill(~candidates, -torch.inf).argmax(1)
                    found[p, way] = float((best == labels[at]).double().mean())
        return found

    def matrix(self, split: str, way: int) -> Float[np.ndarray, "after on"]:
        """Return the matrix of a split among own (0) or seen (1) candidates; NaN where unknown."""
        found = self.history[SPLITS.index(split), :, :, way].cpu().double().numpy()
        return np.where(found < 0, np.nan, found)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        if list(survey.domain_names) != self.domains:  # a run on data of other phases
            return {}
        now = self.accuracies(survey, split)
        found = {"last": float(np.nanmean(now[:, 0])), "seen_last": float(np.nanmean(now[:, 1]))}
        if self.survey is None:
            return found
        found["zero_shot"] = float(np.nanmean(self.accuracies(survey, split, original=True)[:, 0]))
        own, seen = self.matrix(split, 0), self.matrix(split, 1)
        if self.phases > 1 and not np.isnan(own).all(1).any():
            found |= task_figures(own)
            parts = [np.nanmean(row[: t + 1]) for t, row in enumerate(seen)]
            found |= {"seen_average": float(np.mean(parts)), "seen_forgetting": lost(seen)}
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the accuracy after each phase on each phase."""
        shown = super().figures(survey)
        if self.config.joint or self.phases < 2:
            return shown
        before = np.nanmean(self.accuracies(survey, "test", original=True)[:, 0])
        said = f"Accuracy on test pictures among the phase's own classes; before the first phase {before:.2f}."
        shown["Accuracy after each phase"] = heat_map(self.matrix("test", 0), self.names, said)
        if not bool((self.members == self.members[:1]).all()):
            said = "Accuracy on test pictures among the classes of all phases so far."
            shown["Accuracy among all classes so far"] = heat_map(self.matrix("test", 1), self.names, said)
        return shown

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.encoder, "forward")]
