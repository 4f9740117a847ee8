"""M3CoL: classify from several modalities, with a contrast of mixtures in one modality with both originals in another.

Kumar, Singhal, Ranjan, Jain: "Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal
Classification", TMLR 2025, arXiv 2409.17777.

Two samples of one modality are mixed. In another modality the two originals are the mixture's targets, weighted by their shares
(M3Co). After a third of training, unmixed contrast with soft targets replaces M3Co (MultiSClip). One classifier takes
all embeddings together; only training uses the further classifiers, one for each modality. Symbols: lam is a mixture's
own share, perm the partner, t the temperature, gamma the weight of the contrast.

This file has the whole method: both contrasts without a matrix of similarities, the mixing, the classifiers, the switch.
Differences between paper, released code and this file:
  - The released code mixes the plain side of a pair too, because it mixes in place. `mix_keys=False` (default) is the paper's
    form, True the code's. Both mix embeddings. The paper says inputs of all modalities but text: that is `mix_inputs`.
  - Where perm(i) = i, the released code overwrites the target lam_i by 1 - lam_i. `m3co_loss` does the same by default;
    `accumulate_targets` adds both.
  - Encoders of other widths than `embedding` get a linear map to it; the paper's encoders have one width.
  - Not supported: a plateau schedule of the learning rate, and separate learning rates for parts of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.checks import need_alike, need_numbers, need_positive, shapes
from counterpoint.core.distributed import batch_logsumexp_towards, batch_order, gather_rows, global_mean, place
from counterpoint.core.mixing import Mix, draw_mix
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Targets
from counterpoint.core.world import over_group
from counterpoint.encoders.simple import Stack
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.systems.settings import claim_settings
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner

# ----------------------------------------------------------------------------------------------------------- the contrasts


@over_group
@full_precision(keep=("lam",))
def m3co_loss(
    mixed: Float[Tensor, "n dim"],
    fixed: Float[Tensor, "n dim"],
    perm: Int[Tensor, " n"],
    lam: Float[Tensor, " n"],
    temperature: float = 0.1,
    bidirectional: bool = True,
    *,
    accumulate_targets: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute M3Co: cross-entropy of S = u v^T / t with targets P_ii = lam_i and P_i,pi(i) = 1 - lam_i, over rows and columns.

        L = -1/2 mean_i sum_j P_ij log softmax_j(S_ij) - 1/2 mean_j sum_i P_ij log softmax_i(S_ij)

    Args:
        mixed: row i is a mixture of samples i and pi(i) of one modality, with shares lam_i and 1 - lam_i.
        fixed: the samples in another modality, unmixed. Both are normalised here.
        perm: pi, the partner of each sample; across processes it counts over the whole batch in rank order.
        lam: own shares, 0..1, without a gradient.
        temperature: > 0.
        bidirectional: False keeps only the first term, without the factor 1/2.
        accumulate_targets: where pi(i) = i, both shares add up to 1. By default the second replaces the first, as in the
            released code; then a sample that is not mixed (lam_i = 1) drops out.

    P has two entries per row and is computed tile by tile, with the similarities. For a batch of one the loss is 0. Raises
    ValueError for shapes that do not fit and indices out of range.

    >>> m3co_loss(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), torch.ones(2), temperature=1.0)
    tensor(0.3133)
    """
    need_alike("n dim", mixed=mixed, fixed=fixed)
    need_positive(temperature=temperature)
    if perm.is_floating_point() or perm.shape != mixed.shape[:1] or lam.shape != mixed.shape[:1]:
        raise ValueError(
            "perm and lam must have an entry for each row, perm a whole number, got "
            f"{shapes(perm=perm, lam=lam, mixed=mixed)}, perm of {perm.dtype}"
        )
    u = unit(mixed, 1 / temperature)
    v = unit(fixed)
    here = place(len(u), u.device)
    need_numbers(here.total, perm=perm)
    lam = lam.detach().to(u.dtype)
    itself = torch.arange(here.offset, here.offset + here.rows, device=perm.device)
    own = lam if accumulate_targets else lam.masked_fill(perm == itself, 0.0)
    other = 1 - lam
    target = Targets(torch.stack([itself, perm], 1), torch.stack([own, other], 1), here.offset, here.total)
    log_z = batch_logsumexp_towards(u, v, target, columns=bidirectional)
    row = (own + other) * log_z.rows - log_z.towards
    if log_z.columns is None:
        return global_mean(row)
    # The sum of a column's targets: its own share, and the shares that other samples took from it.
    mass = gather_rows(own).index_add(0, gather_rows(perm), gather_rows(other))
    column = mass[here.offset : here.offset + here.rows] * log_z.columns - log_z.towards
    return (global_mean(row) + global_mean(column)) / 2


@over_group
@full_precision
def multisclip_loss(
    preds: Float[Tensor, "n dim"], targs: Float[Tensor, "n dim"], temperature: float = 0.125
) -> Float[Tensor, ""]:
    r"""Compute MultiSClip: cross-entropy of S = p g^T / t and of S^T with the soft targets Q = softmax_row(g g^T / t).

        L = -1/2 mean_i sum_j Q_ij log softmax_j(S_ij) - 1/2 mean_i sum_j Q_ij log softmax_j(S_ji)

    Args:
        preds, targs: p and g, embeddings of one item in a row of each; normalised here. Q has a gradient too.
        temperature: > 0.

    g g^T is symmetric. So the second term is the first one over columns, and one pass gives both without either matrix.
    Raises ValueError for shapes that differ.

    >>> multisclip_loss(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.5822)
    """
    need_alike("n dim", preds=preds, targs=targs)
    need_positive(temperature=temperature)
    p, g = gather_rows(wide(preds)), unit(gather_rows(wide(targs)))
    out = pair_cross_entropy(
        unit(p, 1 / temperature), g, scaled(g, temperature**0.5), columns=True, teacher_gradient=True
    )
    assert out.columns is not None
    return (out.rows + out.columns).mean() / 2


def _contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Contrast each item with the others in both directions: M3Co without mixing, where partners have no effect."""
    nobody = torch.zeros(len(a), dtype=torch.long, device=a.device)
    return m3co_loss(a, b, nobody, a.new_ones(len(a)), temperature, accumulate_targets=True)


def _cycle(names: list[str]) -> list[tuple[str, str]]:
    """Return the ordered pairs to contrast: each modality with the next, and the last with the first."""
    return list(zip(names, names[1:] + names[:1], strict=True))


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class M3CoLConfig(AlignedConfig):
    """Settings of M3CoL. Defaults are the paper's for Food-101, where these settings can express them."""

    epochs: int = 50
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 5e-5 * 256 / 32
    weight_decay: float = 1e-4
    constant_lr: bool = True
    image_encoder: str = "timm:vit_base_patch16_224"
    text_encoder: str = "hf:bert-base-uncased"
    vector_encoder: str = "paper"
    """Network for vectors: paper (two linear layers of width `embedding` with ReLU between), or another by name."""
    pretrained: bool = True
    context: int = 512
    embedding: int = 768
    hidden: int = 256
    """Width of the classifiers' hidden layers."""
    hidden_layers: int = 2
    """Number of the classifiers' hidden layers; the paper has 2 for images and text and 1 for features."""
    unimodal: bool = True
    """Train a classifier of each modality in addition to that of all."""
    contrast: Literal["m3col", "m3co", "multisclip", "plain", "none"] = "m3col"
    """Mixtures, then soft targets (m3col); only mixtures (m3co); only soft targets (multisclip); no mixing (plain); none."""
    contrast_weight: float = 0.1
    """gamma: weight of the contrast, at least 0."""
    mixed_share: float = 0.33
    """Share of the epochs, from the first, in which m3col contrasts mixtures."""
    temperature: float = 0.1
    """Temperature of M3Co."""
    soft_temperature: float = 0.125
    """Temperature of MultiSClip."""
    beta: float = 0.15
    """Both parameters of the Beta distribution of the shares, at least 0."""
    mixed_probability: float = 0.5
    """Probability that a sample is mixed."""
    mix_inputs: bool = False
    """Mix images, sounds and vectors before they are encoded, as the paper says, instead of embeddings (the released code)."""
    mix_keys: bool = False
    """Mix the other side of a pair too, by a separate draw, as the released code does and the paper does not."""
    accumulate_targets: bool = False
    """Where a sample is drawn as its own partner, add both shares. Default: keep the second one, as the released code does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "soft_temperature", "hidden", "hidden_layers")
        self.need_weight("beta", "contrast_weight")
        self.need_share("mixed_share", "mixed_probability")


class M3CoL(AlignedLearner):
    """A classifier of all modalities together, one of each modality, and a contrast between modalities."""

    config: M3CoLConfig

    def __init__(self, config: M3CoLConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if not data.classes:
            raise CounterpointError("m3col learns to classify, but this data has no classes; use data with labels")
        inner = [config.hidden] * config.hidden_layers
        self.fused = Stack(config.embedding * len(self.kinds), *inner, data.classes)
        self.single = nn.ModuleDict(
            {name: Stack(config.embedding, *inner, data.classes) for name in self.kinds if config.unimodal}
        )

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        if spec["kind"] == "vector" and self.config.vector_encoder == "paper":
            return Stack(spec["dim"], self.config.embedding, self.config.embedding)
        return super().build_encoder(spec, tokenizer)

    def build_head(self, dim: int) -> nn.Module:
        return nn.Identity() if dim == self.config.embedding else super().build_head(dim)

    def represent(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        """Return the embeddings to classify, not normalised."""
        return {name: self.heads[name](self.features(name, values)) for name, values in batch["inputs"].items()}

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        # Partners are drawn for the whole batch.
        total, mine = self.share(len(batch["index"]))
        position = batch_order(total).argsort()
        draws = {
            name: draw_mix(
                total, self.config.beta, generator, per_sample=True, probability=self.config.mixed_probability
            )
            for name in self.kinds
        }
        mixes = {
            name: Mix(position[drawn.permutation[mine]].to(self.device), drawn.lam[mine].to(self.device))
            for name, drawn in draws.items()
        }
        return batch | {"mixes": mixes}

    def phase(self) -> str:
        """Return the contrast of this epoch."""
        config = self.config
        if config.contrast != "m3col":
            return config.contrast
        return "m3co" if self.position.epoch < int(config.mixed_share * config.epochs) else "multisclip"

    def mixture(self, name: str, z: Tensor, inputs: Any, drawn: Mix) -> Float[Tensor, "n embedding"]:
        """Return a modality's mixtures: mixed embeddings z, or the embeddings of mixed inputs."""
        if not self.config.mix_inputs or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return _mixed(z, drawn)
        return self.heads[name](self.features(name, _mixed(inputs, drawn)))

    def contrast(self, z: Mapping[str, Tensor], inputs: Mapping[str, Any], mixes: Mapping[str, Mix]) -> Tensor:
        """Sum the contrast over the pairs of modalities."""
        config, phase = self.config, self.phase()
        mixed = {}
        if phase == "m3co":
            mixed = {name: self.mixture(name, z[name], inputs[name], mixes[name]) for name in z}
        total = []
        for a, b in _cycle(list(z)):
            if phase == "multisclip":
                total.append(multisclip_loss(z[a], z[b], config.soft_temperature))
            elif phase == "plain":
                total.append(_contrast(z[a], z[b], config.temperature))
            else:
                drawn = mixes[a]
                other = mixed[b] if config.mix_keys else z[b]
                total.append(
                    m3co_loss(
                        mixed[a],
                        other,
                        drawn.permutation,
                        drawn.lam,
                        config.temperature,
                        accumulate_targets=config.accumulate_targets,
                    )
                )
        return torch.stack(total).sum()

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, labels = self.config, batch["label"]
        for name, there in batch["present"].items():
            if not bool(there.all()):
                raise CounterpointError(
                    f"m3col fuses all modalities, but item {int(batch['index'][~there][0])} has no {name}; remove "
                    "incomplete items"
                )
        z = self.represent(batch)
        fused = _cross_entropy(self.fused(torch.cat(list(z.values()), 1)), labels)
        losses = {"loss": fused, "fused": fused}
        for name, classifier in self.single.items():
            losses[name] = _cross_entropy(classifier(z[name]), labels)
            losses["loss"] = losses["loss"] + losses[name]
        if config.contrast != "none":
            losses["contrast"] = self.contrast(z, batch["inputs"], batch["mixes"])
            losses["loss"] = losses["loss"] + config.contrast_weight * losses["contrast"]
        return losses

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        z = self.represent(batch)
        found: dict[str, Any] = {"embedding": {name: unit(x) for name, x in z.items()}}
        if len(z) == len(self.kinds):
            found["logits"] = self.fused(torch.cat(list(z.values()), 1))
        return found


def _mixed(z: Tensor, drawn: Mix) -> Tensor:
    """Mix rows of this process with their partners, which may be in any process."""
    partners = gather_rows(z)[drawn.permutation]
    return torch.lerp(partners, z, drawn.lam.to(z.dtype).view(-1, *[1] * (z.ndim - 1)))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the batch of all processes; items without a class (-1) count as zero."""
    return global_mean(F.cross_entropy(logits, labels, ignore_index=-1, reduction="none"))


# -------------------------------------------------------------------------------------------------------------- settings

SYSTEM = System(
    slug="m3col",
    task="aligned",
    config=M3CoLConfig,
    learner=M3CoL,
    data="latent-views",
    # Full batch, Adam 2e-3, encoders 120-64-64.
    recipes={"latent-views": claim_settings("m3col")},
    recipe=LAPTOP | {"batch_size": 128, "pretrained": False, "constant_lr": False},
)
