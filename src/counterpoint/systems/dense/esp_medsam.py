"""ESP-MedSAM: distil SAM into a small segmenter of many kinds of imaging, which shares an encoder and decouples the rest.

Xu, Li, He and others: "ESP-MedSAM: Efficient Self-Prompting SAM for Universal Image Segmentation" (later De-LightSAM), arXiv
2407.14153.

    symbol    here                   meaning
    k         domain, modality       kind of imaging of a picture; -1: a natural picture
    MA        encoder.shared         modality aggregator, the shared part of the student's encoder
    MC_k      encoder.controllers    modality controller: a prefix, its bias and an adapter for each block
    F_SAM     teacher                teacher of natural pictures
    F_Med     medical_teacher        teacher of the modalities
    g, m      SelfPrompt             logits of coarse patches; binary prompt without gradient
    q_k       queries                query of a modality's mask

Stages: MA learns F_SAM's maps of natural pictures, without controllers; of all pictures, where none is natural. Then each MC_k
alone learns F_Med's maps of its modality. Then everything learns to segment. `--from RUN --only NAME` adds a modality to a
finished run. The encoder is in encoders/prefix_windows.py, self-prompt and decoder are in core/query_decoder.py.

    counterpoint train esp-medsam
    counterpoint train esp-medsam --data 'masks:mine?domain=folder&size=1024' --teacher hf:facebook/sam-vit-base --dim 256

Choices where paper and code are silent or differ: the distance of the first stage is that of the second; controllers are
selected per picture (the code has one checkpoint per modality); pictures are normalised by (x - mean) / std; the loss of masks
is 0.8 BCE + 0.2 Dice. Not built: keeping the epoch of the best validation loss; MobileSAM's weights as a start; fine-tuning of
F_Med, which is any finished run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tyro.conf import arg

from counterpoint.core.distributed import global_mean
from counterpoint.core.mask_losses import binary_mask_loss, patch_labels
from counterpoint.core.query_decoder import MaskMLP, QueryDecoder, SelfPrompt, fourier_positions
from counterpoint.encoders.modality_masks import masks_of_modalities
from counterpoint.encoders.prefix_windows import SHAPES, PrefixWindows, check_modality
from counterpoint.engine.loading import Batches, ChosenBatches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Cached, Frozen, cached
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.adapted import check_adapters
from counterpoint.tasks.dense import DenseConfig
from counterpoint.tasks.image_teachers import check_teacher
from counterpoint.tasks.map_teachers import taught_maps, teachers_by_kind
from counterpoint.tasks.modalities import ModalityLearner, by_modality, chosen_modalities, masked_rows, start_modalities
from counterpoint.views.images import check_recipe, normalise

# Names of stages; that of a modality's controller follows "controller ".
COMMON, SHARED, JOINT, SEGMENT, CONTROLLER = "common", "modalities", "joint", "segment", "controller "


# -------------------------------------------------------------------------------------------------------------- settings


@dataclass
class EspMedSamConfig(DenseConfig):
    """Settings of ESP-MedSAM. Defaults are the authors': pictures of 1024 pixels, Adam at 5e-4 for a batch of 4."""

    epochs: int = 200
    """Epochs of segmentation; an epoch has `steps` steps in every stage."""
    batch_size: int = 4
    """Pictures in a batch of every stage."""
    encoder: str = "prefix-tiny"
    """The student's encoder: prefix-tiny (TinyViT-5M, cells of 16 pixels) or prefix-s (three blocks, cells of 4 pixels)."""
    recipe: str = "none"
    optimizer: str = "adam"
    lr: float = 0.032  # 5e-4 for a batch of 4
    weight_decay: float = 0.0
    decay: float = 0.98
    """Factor by which each epoch of a stage multiplies the learning rate, > 0."""
    steps: int = 100
    """Number of steps of an epoch, at least 1."""
    dim: int = 256
    """Channels of the map, those of the teachers' maps; a multiple of 16."""
    teacher: str = "hf:facebook/sam-vit-base"
    """Teacher of natural pictures: hf:NAME (SAM, or another vision model), timm:NAME, torchvision:NAME, run:RUN or
    fit:SLUG?data=SOURCE; its map has `dim` channels on the student's grid."""
    medical_teacher: str = ""
    """Teacher of the modalities, such as run:RUN of finetune-seg on them. Default: `teacher`."""
    cached: bool = False
    """Compute the teachers' maps once and keep them on disk, not at each step."""
    common_epochs: int = 200
    """Epochs of the shared part's distillation, at least 0; 0: without it."""
    controller_epochs: int = 200
    """Epochs of each controller's distillation, at least 0; 0: without it."""
    joint: bool = False
    """Distil the shared part and all controllers in one stage, of as many epochs as the stages it replaces."""
    controllers: bool = True
    """Give each modality a controller. Without: the shared part learns the modalities' pictures, in as many epochs."""
    adapter_ratio: float = 4.0
    """Width of the adapters' hidden layers, in widths of the block, > 0."""
    separate_prefixes: bool = False
    """Give keys and values a prefix each, as in the paper. Default: they share one, as in the code."""
    queries: Literal["together", "alone", "shared"] = "together"
    """together: a query for each modality, which attend to each other (the code). alone: without attending. shared: one query for
    all."""
    mask_mlps: Literal["shared", "own"] = "shared"
    """shared: one MLP for all queries (the code). own: one for each modality (the paper)."""
    prompt: bool = True
    """Prompt the decoder with the predicted patches."""
    mlp_width: int = 2048
    """Width of the hidden layers of the decoder's blocks, at least 1."""
    supervision: Literal["weighted", "sum"] = "weighted"
    """Loss of masks: weighted, 0.8 BCE + 0.2 Dice; or sum, BCE + Dice."""
    start: Annotated[str, arg(name="from", metavar="RUN")] = ""
    """A finished run of esp-medsam, whose weights to start from. Default: random weights."""
    only: str = ""
    """Modalities to train, between commas; needs --from. All that others use stays as it is: controllers train, and of the
    decoder what is theirs alone (their query with --queries alone, their MLP with --mask-mlps own). Default: all."""

    labels_only = False
    adapts, own_start = False, True
    by_domain = True
    counts = (*DenseConfig.counts, "steps", "dim", "mlp_width")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("decay", "adapter_ratio")
        self.need_weight("common_epochs", "controller_epochs")
        if self.dim % 16:
            raise CounterpointError(f"dim must be a multiple of 16, got {self.dim}")
        if self.only and (not self.start or not self.controllers):
            raise CounterpointError("only names modalities to add to a run with controllers; it needs --from RUN")
        if self.only and self.joint:
            raise CounterpointError(
                "--joint trains what all modalities share, and --only leaves that as it is; give one of them"
            )
        if self.pretrained:
            raise CounterpointError(f"there are no pretrained weights of {self.encoder}; start from a run: --from RUN")

    def check(self) -> None:
        if self.encoder not in SHAPES:
            raise unknown("encoder of esp-medsam", self.encoder, list(SHAPES))
        check_recipe(self.recipe)
        check_adapters(self)
        for name in filter(None, (self.teacher, self.medical_teacher)):
            check_teacher(name)


# ---------------------------------------------------------------------------------------------------------- the learner


def _key(name: str) -> str:
    """Return a modality's name as a module's name."""
    return "of_" + name.replace("%", "%25").replace(".", "%2E")


class EspMedSam(ModalityLearner):
    """An encoder with controllers, a self-prompt, and a decoder with a query for each modality."""

    encoder: PrefixWindows
    distilled: Tensor

    def __init__(self, config: EspMedSamConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.chosen = chosen_modalities("--only", config.only, self.names)
        dim = config.dim
        if self.encoder.grid % 2 and config.prompt:
            raise CounterpointError(
                f"the prompt's patches have 2 x 2 cells; pictures of {self.size} pixels have {self.encoder.grid} cells a side. "
                "Use another ?size=, or --no-prompt"
            )
        self.self_prompt = SelfPrompt(dim) if config.prompt else None
        self.decoder = QueryDecoder(dim, hidden=config.mlp_width)
        self.keys = ["all"] if config.queries == "shared" else [_key(name) for name in self.names]  # of the queries
        self.queries = nn.ParameterDict({key: torch.randn(1, dim) for key in [*self.keys, "spare"]})
        own = self.keys if config.mask_mlps == "own" else ["all"]
        self.mask_mlps = nn.ModuleDict({key: MaskMLP(dim) for key in own})
        self.register_buffer("gaussian", torch.randn(2, dim // 2))
        # Squared errors to the teacher's maps of valid and test pictures when segmentation began; nan without teachers.
        self.register_buffer("distilled", torch.full((2,), torch.nan))
        self.teachers: dict[str, Frozen] = {}
        self.known: dict[str, Cached] = {}

    def build_encoder(self, data: Any) -> PrefixWindows:
        config = self.config
        found = PrefixWindows(
            data.size, config.encoder, config.dim, data.channels, config.adapter_ratio, config.separate_prefixes
        )
        for name in self.names if config.controllers else ():
            found.add(_key(name))
        return found

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        found: list[Stage] = []

        def stage(name: str, epochs: int, modules: list[nn.Module], evaluated: bool = False) -> None:
            if epochs:
                batches = partial(self._batches, name)
                found.append(Stage(name, epochs, lambda: modules, batches=batches, evaluated=evaluated))

        shared = self.encoder.shared
        later = config.controller_epochs * len(self.chosen)
        if config.joint:
            stage(JOINT, config.common_epochs + later, [self.encoder])
        else:
            if not config.only:
                stage(COMMON, config.common_epochs, shared)
            if not config.controllers:
                stage(SHARED, later, shared)
            for name in self.chosen if config.controllers else ():
                stage(CONTROLLER + name, config.controller_epochs, [self.encoder.controllers[_key(name)]])
        stage(SEGMENT, config.epochs, self._segmenting(), evaluated=True)
        found[-1].enter = self._measure_distillation
        return found

    def _segmenting(self) -> list[nn.Module]:
        if not self.config.only:
            return [self]
        found: list[nn.Module] = []
        for key in map(_key, self.chosen):
            found.append(self.encoder.controllers[key])
            found += [self.mask_mlps[key]] if self.config.mask_mlps == "own" else []
        return found + ([self.queries] if self.config.queries == "alone" else [])

    def _batches(self, stage: str, survey: Survey) -> Batches:
        domains = survey.split().domains
        if stage == COMMON:  # natural pictures; all, where there are none
            rows = np.flatnonzero(domains < 0) if (domains < 0).any() else np.arange(len(domains))
        elif stage in (JOINT, SHARED):
            rows = np.arange(len(domains))
        elif stage == SEGMENT:
            rows = masked_rows(survey.split(), [self.names.index(name) for name in self.chosen])
        else:
            rows = np.flatnonzero(domains == self.names.index(stage.removeprefix(CONTROLLER)))
        if not len(rows):
            raise DataError(f"stage {stage} of esp-medsam has no training picture; add pictures of this kind")
        return ChosenBatches(rows, min(self.config.batch_size, len(rows)), self.config.steps)

    def turns(self) -> list[Turn]:
        return [self.turn_of([self], curve=lambda epoch: self.config.decay**epoch)]

    # --- the beginning

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        if config.start:
            start_modalities(self, config.start, _key)
        if config.common_epochs or config.controller_epochs:
            names = config.teacher, config.medical_teacher
            self.teachers = teachers_by_kind(*names, survey, config.dim, self.encoder.grid)
            if config.cached:
                self.known = {name: cached(teacher, survey, "train") for name, teacher in self.teachers.items()}

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.stage_name == SEGMENT:
            return super().prepare(batch, generator)
        return batch | {"views": [normalise(batch["image"])]}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        stage = self.stage_name
        moving = stage in (COMMON, JOINT, SHARED, SEGMENT) and not self.config.only
        self.encoder.move(moving)
        if stage == SEGMENT:
            return self.of_masks(batch)
        images = batch["views"][0]
        none = stage == COMMON or not self.config.controllers
        modality = torch.full_like(batch["domain"], -1) if none else batch["domain"]
        teachers = {"natural": self.teachers["natural"]} if stage == COMMON else self.teachers
        target = taught_maps(teachers, batch | {"image": images}, self.known, self.encoder.grid)
        each = (self.encoder.features(images, modality).float() - target.float()).square().flatten(1).mean(1)
        loss = global_mean(each)
        return {"loss": loss, "distil": loss.detach()}

    def _measure_distillation(self, survey: Survey) -> None:
        """Measure the squared error of maps, a mean over modalities of means over pictures."""

        def row(batch: dict[str, Any]) -> Tensor:
            maps = self.encoder.features(batch["image"], batch["domain"] if self.config.controllers else None)
            return (maps - taught_maps(self.teachers, batch)).square().flatten(1).mean(1)

        for number, split in enumerate(("valid", "test") if self.teachers else ()):
            self.distilled[number] = torch.stack(list(by_modality(survey, split, row).values())).mean()

    def of_masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of masks and of patches."""
        (images,), (masks,) = batch["views"], batch["masks"]
        logits, patches = self.segmented(images, batch["domain"])
        weights = (0.8, 0.2) if self.config.supervision == "weighted" else (1.0, 1.0)
        found = {"mask": binary_mask_loss(logits, masks, *weights)}
        if patches is not None:
            found["patch"] = binary_mask_loss(patches, patch_labels(masks, *patches.shape[1:]), 1.0, 0.0)
        return {"loss": torch.stack(list(found.values())).sum()} | {key: value.detach() for key, value in found.items()}

    def segmented(
        self, images: Tensor, modality: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n size size"], Float[Tensor, "n coarse wide"] | None]:
        """Compute the logits of the pixels, and of the patches, of pictures of known modalities.

        Raises ValueError for a number that is no modality.
        """
        check_modality(modality, len(self.names))
        if bool((modality < 0).any()):
            raise ValueError("modality must not be -1 here: a picture of no modality has no query")
        maps = self.encoder.features(images, modality if self.config.controllers else None)
        patches = None
        if self.self_prompt is not None:
            maps, patches = self.self_prompt(maps)
        position = fourier_positions(cast(Tensor, self.gaussian), maps.shape[2], maps.shape[3])
        alone = self.config.queries == "alone"
        fine = masks_of_modalities(
            maps, position, modality, self.keys, self.queries, self.mask_mlps, self.decoder, alone=alone
        )
        found = F.interpolate(fine[:, None], images.shape[2:], mode="bilinear", align_corners=False)
        return found[:, 0], patches

    # --- what it learned

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Add the squared error of maps, when segmentation began, to the measures of each modality."""
        error = float(self.distilled[("valid", "test").index(split)])
        return super().measures(survey, split) | ({} if np.isnan(error) else {"modality_distil_mse": error})


TEACHER = "fit:finetune-seg?data=medical-shapes%3Fseed=900&encoder=vit-s&epochs=30&recipe=none&optimizer=adamw&lr=0.016"
SYSTEM = System(
    slug="esp-medsam",
    task="dense",
    config=EspMedSamConfig,
    learner=EspMedSam,
    data="medical-shapes",
    recipe={
        "encoder": "prefix-s",
        "dim": 128,  # of vit-s, the teacher
        "teacher": TEACHER,
        "cached": True,
        "mlp_width": 256,
        "adapter_ratio": 1.0,
        "batch_size": 16,
        "lr": 0.016,  # 1e-3 for a batch of 16
        "steps": 25,
        "common_epochs": 12,
        "controller_epochs": 3,
        "epochs": 16,
        "evaluate_every": 4,
    },
)
