"""AdaInf: add generated images to the real ones, weight the real ones up and weaken the views.

Wang, Zhang, Wang: "Do Generated Data Always Help Contrastive Learning?", ICLR 2024, arXiv 2403.12448.

The inflated set contains N copies of the real images, then the generated ones, and is sampled uniformly. With N = 10, 50,000
real and 1,000,000 generated images, a third of the samples is real. More data need weaker augmentation: the recipes `adainf`
and, for small pictures, `adainf-cifar` have the authors' weaker crops and colours. Nothing else changes. The loss is the
base's, except over SimCLR (see `copies` below): this is an addition over any system that learns from views of images. The number
of steps is that without inflation. Measures use only real images.

Sources of generated images (`generated`, see counterpoint.data.generated):

- "diffusion": a small diffusion model, trained on the real training images at first use and kept in the cache (extra
  [generation]).
- "mixture": a Gaussian mixture of principal components, for a few small pictures.
- a folder of images.

Not built: the authors' generators (STF, EDM, 1,000,000 images), and the asymmetric recipes of BYOL and Barlow Twins with
weaker strengths.

In the authors' code, copies of one real image in a batch are negatives of each other. On small sets that matters. Below
10,000 real images SimCLR therefore treats them as positives (`copies`). It uses the authors' loss, whose positives are inside
the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.compared import Compared, Ways, views
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal, Labels
from counterpoint.core.transforms import need_fixed
from counterpoint.core.world import over_group
from counterpoint.data.generated import InflatedImages, generated_images
from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig
from counterpoint.words import counted

FEW = 9  # maximum number of views of an image for which positives are listed instead of masked in the matrix
SMALL = 10_000  # number of real images below which copies of one are positives


@over_group
@full_precision
def ntxent_by_index(
    z: Float[Tensor, "n dim"], index: Int[Tensor, " n"], temperature: float | Tensor = 0.2
) -> Float[Tensor, ""]:
    """Compute NT-Xent with any number of views: mean over rows of -log( sum_pos exp s / (sum_pos exp s + sum_neg exp s) ).

    Args:
        z: projections of all views, which this function normalises.
        index: number of each row's image. Rows with the same number are each other's positives, summed inside the logarithm.
        temperature: > 0, by default 0.2; s is the cosine divided by it.

    Across processes, rows come from all processes. Raises ValueError for a row without a positive, shapes that do not fit or
    a temperature that is not positive.

    >>> ntxent_by_index(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), 1.0)
    tensor(0.5514)
    """
    if z.ndim != 2 or index.shape != z.shape[:1]:
        raise ValueError(f"z must be [n, dim] and index [n], got {list(z.shape)} and {list(index.shape)}")
    need_positive(temperature=temperature)
    need_fixed("ntxent_by_index", index=index)
    everyone = gather_rows(index)
    _, counts = everyone.unique(return_counts=True)
    if not len(counts) or int(counts.min()) < 2:
        raise ValueError("index: a row is the only view of its image; each needs at least two")
    x = scaled(unit(z), temperature**0.5)
    total = batch_logsumexp(x, exclude=Diagonal()).rows
    if int(counts.max()) > FEW:
        positive = batch_logsumexp(x, exclude=(Diagonal(), Labels(everyone, same=False))).rows
    else:  # each row's few positives one by one
        places, there = _positives(index, everyone, place(len(x), x.device).offset)
        near = torch.linalg.vecdot(x[:, None], gather_rows(x)[places])
        positive = near.masked_fill(~there, -torch.inf).logsumexp(1)
    return global_mean(total - positive)


def _positives(index: Tensor, everyone: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """List for each row the positions of the other rows with its number, padded, and the mask of real entries."""
    order = everyone.argsort(stable=True)
    _, inverse, counts = everyone.unique(return_inverse=True, return_counts=True)
    start = counts.cumsum(0) - counts
    own = inverse[offset : offset + len(index)]
    slot = torch.arange(int(counts.max()), device=index.device)
    at = (start[own][:, None] + slot).clamp(max=len(order) - 1)
    places = order[at]
    itself = offset + torch.arange(len(index), device=index.device)
    return places, (slot < counts[own][:, None]) & (places != itself[:, None])


class Inflated(NamedTuple):
    """The inflated set, and its labels; -1 for generated images."""

    data: UInt8[Tensor, n * image]
    label: Int[Tensor, " n"]


def inflate(real: Any, generated: Any, replication: int, real_label: Any = None) -> Inflated:
    """Concatenate `replication` copies of the real images and the generated ones, whose label is -1.

    Args:
        real, generated: arrays or tensors of any shape [n, ...], alike except for n.
        replication: number of copies, at least 0.
        real_label: labels of the real images; None: all are -1.

    Raises ValueError for shapes, labels or types of pixels that do not fit.
    """
    a, b = torch.as_tensor(real), torch.as_tensor(generated)
    if a.shape[1:] != b.shape[1:] or replication < 0:
        raise ValueError(
            "real and generated must have images of one shape, and replication must not be negative, got "
            f"{list(a.shape)}, {list(b.shape)} and {replication}"
        )
    if a.dtype != b.dtype:  # probably 0..255 and 0..1
        raise ValueError(f"real and generated must be of one type, got {a.dtype} and {b.dtype}")
    label = torch.full((len(a),), -1) if real_label is None else torch.as_tensor(real_label).long()
    if label.shape != (len(a),):
        raise ValueError(
            f"real_label must have one number for each of {counted(len(a), 'real image')}, got {list(label.shape)}"
        )
    label = torch.cat([label.repeat(replication), torch.full((len(b),), -1)])
    return Inflated(torch.cat([*[a] * replication, b]), label)


@dataclass
class AdaInfConfig(PartConfig):
    """Settings of AdaInf."""

    generated: str = "diffusion"
    """Source of generated images: diffusion, mixture, or a folder of images."""
    generated_count: int = 0
    """Number of generated images; 0: 20 per real image (the authors' 1,000,000 for 50,000), or all images of a folder."""
    replication: int = 10
    """Copies of every real image; 1 is plain inflation, 0 trains on generated images alone."""
    inflated: bool = True
    """Use the inflated set; False: train on the real images alone, the control of a claim."""
    copies: Literal["auto", "positives", "negatives"] = "auto"
    """Relation of copies of a real image in one batch, over SimCLR alone. auto: positives below 10,000 images, unless another
    addition below changes the comparison."""
    generator_seed: int = 0
    """Seed of the generator and its samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replication < 0 or self.generated_count < 0:
            raise CounterpointError(
                f"replication and generated_count must not be negative, got {self.replication} and {self.generated_count}"
            )

    def facts(self, data: Any) -> dict[str, Any]:
        train = data.train
        real = len(train.real) if isinstance(train, InflatedImages) else len(train)
        return {"real": real}


class AdaInf(Part):
    """The base on an inflated set."""

    config: AdaInfConfig

    def __init__(self, config: AdaInfConfig, learner: Learner, data: Any, ways: Ways | None) -> None:
        super().__init__(config, learner, data, ways)
        self.real = data.real
        # The loss with copies as positives replaces the base's, so an earlier part would have no effect.
        alone = not learner.parts
        if config.inflated and config.copies == "positives" and not (alone and ways is views):
            raise CounterpointError(
                "copies are positives of each other over SimCLR alone; use --adainf.copies negatives or auto"
            )
        self.positives = alone and (config.copies == "positives" or (config.copies == "auto" and data.real < SMALL))

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        config, index = self.config, compared.index
        if not (config.inflated and self.positives and compared.ways is views and index is not None):
            return below(compared)
        copied = self.real * config.replication
        origin = torch.where(index < copied, index % self.real, index)
        z = torch.cat([compared.query, compared.key])
        return {"loss": ntxent_by_index(z, torch.cat([origin, origin]).to(z.device), compared.temperature)}


def _inflated(data: Any, config: AdaInfConfig) -> Any:
    """Return the image data with the inflated training split. An epoch keeps its number of images."""
    if not config.inflated:
        return data
    count = config.generated_count or (20 * len(data.train) if config.generated in ("diffusion", "mixture") else 0)
    made, notes = generated_images(data, config.generated, count, config.generator_seed)
    real = len(data.train) * config.replication
    share = real / (real + len(made))
    note = f"{counted(len(made), 'generated image')} ({config.generated}); {share:.0%} of the samples are real"
    return replace(
        data,
        train=InflatedImages(data.train, made, config.replication),
        bank=data.bank or data.train,
        epoch=data.epoch or len(data.train),
        notes=[*data.notes, *notes, note],
    )


SYSTEM = Addition(
    slug="adainf",
    over="simclr",
    config=AdaInfConfig,
    part=AdaInf,
    task="views",
    defaults={"recipe": "adainf", "temperature": 0.2},
    recipe={"recipe": "adainf-cifar"},
    source=_inflated,
)
