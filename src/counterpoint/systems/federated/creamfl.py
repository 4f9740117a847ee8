"""CreamFL: a server of two modalities and private parties exchange representations of a public set, never weights.

Yu, Liu, Wang, Xu, Liu: "Multimodal Federated Learning via Contrastive Representation Ensemble", ICLR 2023, arXiv 2302.08888;
code FLAIR-THU/CreamFL.

    P            N public items in two modalities, image and text; item k has row k everywhere
    G            [N, d] unit representations of P by the server, for each modality
    R_c          [N, d] those by party c, for each modality that it has
    z, o         [b, d] unit embeddings of a batch by a party, now and at the beginning of its round
    S, X         G of the party's own modality, and of the other one
    a, b         learned negative scale and shift of the soft contrastive loss

A round (tasks/public_sets.py):

    A   the server learns P with the soft contrastive loss (core/matches.py), and broadcasts G
    B   each chosen party repeats: one pass over its own items, and one over P with `cream_uni` or `cream_multi`. A party of both
        modalities learns its own items by the server's loss, one of one modality by a classifier with a margin
        (core/class_logits.py)
    C   the party returns R_c; the server fuses them by `contrastive_ensemble`
    D   the server learns P once more, towards the fused representations

- As in the code: two passes, each with its own steps. The paper writes one sum, which `--together` computes. The temperature of
  the weights is 1. Fused rows are not normalised. The weight of the distillation is 0.3 for each modality.
- Different from the code: G is computed in evaluation mode. A round without a party of one modality has no distillation of it.
- Chosen: optimisers of the parties persist between rounds. The last, smaller batch of a pass is dropped.

Not built: the pooling of words by PIE attention, and fine-tuning for visual questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_numbers, need_positive, need_rows, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import global_mean
from counterpoint.core.matches import soft_contrastive
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.seeds import seeded
from counterpoint.core.world import over_group
from counterpoint.data.federations import Party
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import AlignedLearner, first_two
from counterpoint.tasks.federations import FederationConfig, FederationTask
from counterpoint.tasks.public_sets import ClassLearner, PublicParty, PublicServer, facts_of, federate_here, number_of


class Cream(NamedTuple):
    loss: Float[Tensor, ""]
    intra: Float[Tensor, ""]
    inter: Float[Tensor, ""]


# ------------------------------------------------------------------------------------------------------------ the equations


@over_group
@full_precision
def cream_uni(
    emb: Float[Tensor, "n dim"],
    emb_old: Float[Tensor, "n dim"],
    global_same: Float[Tensor, "public dim"],
    global_cross: Float[Tensor, "public dim"],
    public_index: Int[Tensor, " n"],
    weight: float = 0.5,
    temperature: float = 0.5,
    loss_scale: bool = False,
) -> Cream:
    """Compute the contrast of a party of one modality with the server's representations, and w (intra + inter).

    The inter term is the cross-entropy of z_i against all rows of X. Its target is the row of the same item. The intra term prefers
    that item's row of S to the party's own old embedding.

    Args:
        emb: embeddings of a batch of public items, of any norm; normalised here.
        emb_old: unit embeddings of the same items at the beginning of the round; no gradient.
        global_same, global_cross: unit representations of all public items, S and X; no gradient.
        public_index: rows of the batch's items in S and X.
        weight: w, by default 0.5.
        temperature: of both terms, > 0, by default 0.5.
        loss_scale: divide inter by its ratio to intra, without gradient; default: no.

    Raises ValueError for shapes that do not fit, an empty batch, and a row outside S.

    >>> z = torch.tensor([[0.0, 0.0, 1.0]])
    >>> cream_uni(z, torch.eye(3)[:1], torch.eye(3)[:2], torch.eye(3)[:2], torch.tensor([0])).inter
    tensor(0.6931)
    """
    terms = _terms(emb, emb_old, global_same, global_cross, public_index, temperature)
    return _together(*terms, weight, loss_scale)


@over_group
@full_precision
def cream_multi(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    image_emb_old: Float[Tensor, "n dim"],
    text_emb_old: Float[Tensor, "n dim"],
    global_image: Float[Tensor, "public dim"],
    global_text: Float[Tensor, "public dim"],
    public_index: Int[Tensor, " n"],
    weight: float = 0.5,
    temperature: float = 0.5,
    loss_scale: bool = False,
) -> Cream:
    """Compute the contrast of a party of both modalities: the sum of both inter terms, the mean of both intra terms.

    Args: as of `cream_uni`, for each modality.

    Raises ValueError as `cream_uni` does.

    >>> x = torch.eye(2)
    >>> cream_multi(x, x, x, x, x, x, torch.arange(2)).intra
    tensor(0.6931)
    """
    image = _terms(image_emb, image_emb_old, global_image, global_text, public_index, temperature)
    text = _terms(text_emb, text_emb_old, global_text, global_image, public_index, temperature)
    return _together((image[0] + text[0]) / 2, image[1] + text[1], weight, loss_scale)


def _terms(
    emb: Tensor, old: Tensor, same: Tensor, cross: Tensor, index: Tensor, temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute intra and inter of one modality.

    An item's intra is -log of the share of the server's row against the party's own old row. Its inter is the cross-entropy
    against all public rows of the other modality, without the matrix.
    """
    need_alike("n dim", emb=emb, emb_old=old)
    need_alike("public dim", global_same=same, global_cross=cross)
    need_positive(temperature=temperature)
    if emb.shape[1] != same.shape[1] or index.shape != (len(emb),):
        raise ValueError(
            "emb must be [n, dim], global_same [public, dim] and public_index [n], got "
            + shapes(emb=emb, global_same=same, public_index=index)
        )
    need_numbers(len(same), public_index=index)
    z = unit(wide(emb))
    gap = (z * (wide(old) - wide(same)[index]).detach()).sum(1)
    query, key = scaled(z, temperature), wide(cross.detach())
    inter = pair_logsumexp(query, key).rows - positive_similarity(query, key[index])
    return global_mean(F.softplus(gap / temperature)), global_mean(inter)


def _together(intra: Tensor, inter: Tensor, weight: float, loss_scale: bool) -> Cream:
    scale = (inter / intra).detach() if loss_scale else 1.0
    return Cream(weight * (intra + inter / scale), intra, inter)


@full_precision
@torch.no_grad()
def contrastive_ensemble(
    client: Float[Tensor, "clients public dim"], global_other: Float[Tensor, "public dim"]
) -> Float[Tensor, "public dim"]:
    """Compute one representation of each item: the parties' rows, weighted as `ensemble_weights` does.

    Args:
        client: unit representations of one modality by each party, for all public items.
        global_other: the server's unit representations of the other modality.

    The rows are not normalised. No gradient. Raises ValueError for shapes that do not fit, and without a party or an item.

    >>> contrastive_ensemble(torch.eye(2).expand(3, 2, 2), torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    return (ensemble_weights(client, global_other)[:, :, None] * wide(client)).sum(0)


@full_precision
@torch.no_grad()
def ensemble_weights(
    client: Float[Tensor, "clients public dim"], global_other: Float[Tensor, "public dim"]
) -> Float[Tensor, "clients public"]:
    """Return the share of each party in each item of `contrastive_ensemble`; the shares of an item sum to 1.

    Args: as of `contrastive_ensemble`. Memory is a few blocks, never [public, public].

    >>> ensemble_weights(torch.eye(2).expand(2, 2, 2), torch.eye(2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if client.ndim != 3 or client.shape[1:] != global_other.shape:
        raise ValueError(
            "client must be [clients, public, dim] and global_other [public, dim], got "
            + shapes(client=client, global_other=global_other)
        )
    need_rows(client=client, global_other=global_other)
    key = wide(global_other)
    scores = [positive_similarity(rows, key) - pair_logsumexp(rows, key).rows for rows in wide(client)]
    return torch.stack(scores).softmax(0)


# ------------------------------------------------------------------------------------------------------------ the settings


@dataclass
class CreamFLConfig(FederationConfig):
    """Settings of CreamFL. Defaults are the paper's."""

    batch_size: int = 128
    optimizer: str = "adamp"
    lr: float = 2e-4 * 256 / 128
    weight_decay: float = 0.0
    clip_norm: float | None = 2.0
    image_encoder: str = "torchvision:resnet101"
    text_encoder: str = "hf:bert-base-uncased"
    embedding: int = 256
    recipe: str = "simclr"
    contrast_weight: float = 0.5
    """w: weight of the parties' contrast with the server's representations, at least 0; 0: none."""
    contrast_temperature: float = 0.5
    """Temperature of the parties' contrast, > 0."""
    inter: bool = True
    """In the parties' contrast: compare with all public items in the other modality (the inter term)."""
    intra: bool = True
    """In the parties' contrast: compare with the same public item, against the party's own old embedding (the intra term)."""
    loss_scale: bool = False
    """Divide the inter term by its ratio to the intra term, without gradient, where both are on."""
    fusion: Literal["contrast", "mean"] = "contrast"
    """Weight the parties of an item by their contrast with the server's other modality, or all alike (mean)."""
    class_optimizer: str = "sgd"
    """Optimiser of parties of one modality."""
    class_lr: float = 1e-4 * 256 / 512
    """Learning rate of parties of one modality at a batch of 256. It falls to a tenth after half of the rounds, and again after
    80 %."""
    class_decay: float = 5e-5
    """Weight decay of parties of one modality, at least 0."""
    class_scale: float = 128.0
    """Factor of images' embeddings before the classifier of parties of one modality, > 0."""
    class_margin: float = 4.0
    """Margin of these classifiers, at least 0, subtracted from the true class's logit."""
    pair_optimizer: str = "adamp"
    """Optimiser of parties of both modalities."""
    pair_lr: float = 2e-4 * 256 / 512
    """Learning rate of parties of both modalities at a batch of 256. It falls on half a cosine over the rounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("contrast_temperature", "class_lr", "pair_lr", "class_scale")
        self.need_weight("contrast_weight", "class_margin", "class_decay")

    def of_party(self, party: Party, number: int) -> CreamFLConfig:
        """Return the settings of a party: its networks, by its number, and its optimiser."""
        pairs = len(party.modalities) > 1
        return replace(
            self,
            **self.party_encoders(number),
            batch_size=self.party_batch_size,
            optimizer=self.pair_optimizer if pairs else self.class_optimizer,
            lr=self.pair_lr if pairs else self.class_lr,
            weight_decay=0.0 if pairs else self.class_decay,
            clip_norm=self.clip_norm if pairs else None,
        )


# ------------------------------------------------------------------------------------------------------------ the networks


class CreamFLLearner(AlignedLearner):
    """Two encoders in one space, with the soft contrastive loss: the server, and a party of both modalities."""

    def __init__(self, config: CreamFLConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.first, self.second = first_two(data.modalities)
        self.negative_scale = nn.Parameter(torch.tensor(15.0))
        self.shift = nn.Parameter(torch.tensor(15.0))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        ((image, text, _),) = self.paired_rows(self.embed(batch), batch)
        return {"loss": soft_contrastive(image, text, self.negative_scale, self.shift)}


# ------------------------------------------------------------------------------------------------------- server and parties


class CreamFLServer(PublicServer):
    """Steps A and D."""

    config: CreamFLConfig

    def fused(self, rows: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.fusion == "mean":
            return rows.mean(0), None
        return contrastive_ensemble(rows, other), ensemble_weights(rows, other)


class CreamFLParty(PublicParty):
    """Steps B and C of one party."""

    config: CreamFLConfig

    def __init__(self, task: FederationTask, name: str, seed: int) -> None:
        number = number_of(task, name)
        party = task.parties[number]
        assert isinstance(task.config, CreamFLConfig)
        config = task.config.of_party(party, number)
        self.pairs = len(party.modalities) > 1
        made = CreamFLLearner if self.pairs else ClassLearner
        learner = made(config, facts_of(task, party), seeded(seed, number, 3))

        def falling(round: float) -> float:
            return 0.1 ** ((round >= config.rounds / 2) + (round >= 0.8 * config.rounds))

        super().__init__(task, number, learner, config, seed, None if self.pairs else falling)

    @property
    def contrasts(self) -> bool:
        return self.config.contrast_weight > 0 and (self.config.inter or self.config.intra)

    def contrast(
        self, z: Mapping[str, Tensor], old: Mapping[str, Tensor], rows: Mapping[str, Tensor], index: Tensor
    ) -> Tensor:
        config = self.config
        more = (config.contrast_weight, config.contrast_temperature, config.loss_scale)
        if self.pairs:
            a, b = self.modalities
            found = cream_multi(z[a], z[b], old[a], old[b], rows[a], rows[b], index, *more)
        else:
            ((own, emb),) = z.items()
            (other,) = (name for name in self.modalities if name != own)
            found = cream_uni(emb, old[own], rows[own], rows[other], index, *more)
        if config.inter and config.intra:
            return found.loss
        return config.contrast_weight * (found.inter if config.inter else found.intra)


run = partial(federate_here, server=CreamFLServer, party=CreamFLParty)  # all parties in this process

# Settings for small pictures and few items, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "rounds": 10, "party_epochs": 2, "embedding": 32, "context": 16, "recipe": "none",
    "image_encoder": "mlp-s", "text_encoder": "text-s", "vector_encoder": "relu-256-256",
    "party_image_encoder": "mlp-s,conv-s", "party_vector_encoder": "relu-128,relu-64-64",
    "batch_size": 64, "party_batch_size": 64, "optimizer": "adamw", "class_optimizer": "adamw", "pair_optimizer": "adamw",
    "lr": 1e-3, "class_lr": 4e-3, "pair_lr": 4e-3,
}  # fmt: skip

SYSTEM = System(
    slug="creamfl", task="federations", config=CreamFLConfig, learner=CreamFLLearner, data="digit-parties", recipe=LAPTOP, run=run
)  # fmt: skip
