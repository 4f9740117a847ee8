r"""CLHE: complete a bundle of items, such as a playlist, from features of all items and contrast of items and bundles.

Ma, Liu, Wei, Tao, Wang, Chua: "Leveraging Multimodal Features and Item-level User Feedback for Bundle Construction", WSDM 2024,
arXiv 2310.18770; code Xiaohao-Liu/CLHE (no licence).

    m      unit(MLP_c(content)) + unit(MLP_t(text)), features of an item from frozen networks
    e      free embedding of the item
    u      W cf + b, from the item's vector of user feedback; m where there is no feedback (cold)
    F      unit rows of m, e, u; item = mean over the rows of softmax(W_q F (W_k F)^T / sqrt(dim)) F
    z      bundle: one such attention over layer-normalised items, and the mean over the items
    D      items by a second encoder with weights of its own; logits = z D^T

    L_rec    = mean over bundles of -sum_i x_i log softmax(logits)_i / sum_i x_i, x marks the bundle's items, input and target
    L_item   = alpha_i cl(v, v', T_i), two views of the batch's distinct items by the first encoder
    L_bundle = alpha_b cl(z, z', T_b), z' of the bundle with some items left out or replaced
    cl(a, b, T): cross-entropy of unit(a) unit(b)^T / T with the own row as target, rows of a alone

Views of items: `--item-views tokens` leaves out tokens before the attention. With dropout or noise the changed item is projected.
With `same` both views are the item. The projection has no part in predictions.

Four points differ from the code. For the first and the third, an option follows the code:

1. The code reads dropped items as item 0 under the mask of the full bundle. Here the smaller bundle has its own mask
   (`partial_uses_full_mask` of `clhe_forward` follows the code).
2. The code draws replacements from the first item numbers alone. Here they come from all items.
3. The code has the bundle's attention in no optimiser. Here it trains, unless `--no-train-bundle-attention`.
4. In the code a bundle with one item loses it. Here it keeps one item. A bundle without items does not count.

Not built, because it is off by default in the code: more layers of the bundle's attention, layer normalisation, and a value
matrix for items.
The model hardly ever finds items that occur in no training bundle. The full softmax pushes them down, whatever their features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.attention import modality_fusion, set_attention_pool
from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.distributed import gather_rows, mean_where, place
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.seeds import seed_torch
from counterpoint.core.total import mean_cross_entropy
from counterpoint.core.world import over_group, world
from counterpoint.encoders.items import ItemEncoder, item_vectors
from counterpoint.engine.optim import constant_rate
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.sequences import SequencesConfig, SequencesLearner
from counterpoint.views.histories import Histories, changed_sets

SOURCES = ("content", "text", "cf")
# --------------------------------------------------------------------------------------------------------------- equations


@over_group
@full_precision
def one_way_infonce(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], temperature: float = 0.2
) -> Float[Tensor, ""]:
    """Compute cl of the module: the cross-entropy of each row of a with its own row of b among all rows of b.

    Args:
        a, b: n pairs of any norm; normalised here.
        temperature: divisor of the cosines, > 0, by default 0.2.

    One pair alone has loss 0. Across processes, each row meets the rows of all processes. Raises ValueError for different shapes,
    an empty batch and a temperature that is not positive and finite.

    >>> one_way_infonce(torch.eye(2), torch.eye(2), 1.0)
    tensor(0.3133)
    """
    need_alike("n dim", a=a, b=b)
    need_positive(temperature=temperature)
    query, key = scaled(unit(a), temperature), gather_rows(unit(b))
    own = place(len(query), query.device).offset + torch.arange(len(query), device=query.device)
    return mean_cross_entropy(query, key, own)


@over_group
@full_precision
def multinomial_nll(logits: Float[Tensor, "n items"], targets: Float[Tensor, "n items"]) -> Float[Tensor, ""]:
    """Compute L_rec: the mean over sets of the cross-entropy of their items, equally weighted, with the softmax of logits.

    Args:
        logits: a number for each set and item.
        targets: 1 for the items of a set, else 0; other weights count by their share. A set of zeros does not count.

    Raises ValueError for different shapes and an empty batch.

    >>> multinomial_nll(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    tensor(1.3863)
    """
    need_alike("n items", logits=logits, targets=targets)
    weight = targets.to(logits.dtype)
    total = weight.sum(1)
    filled = total > 0
    share = weight / total.clamp(min=torch.finfo(weight.dtype).tiny)[:, None]
    each = logits.logsumexp(1) - (share * logits).sum(1)
    return mean_where(each, filled)


def clhe_forward(
    content: Float[Tensor, "items dc"],
    text: Float[Tensor, "items dt"],
    cf: Float[Tensor, "items dim"],
    cold_cf: Int[Tensor, " items"],
    membership: Float[Tensor, "n items"],
    seq_full: Int[Tensor, "n t"],
    seq_partial: Int[Tensor, "n t"],
    weights: Mapping[str, Tensor],
    cl_temp: float = 0.5,
    cl_alpha: float = 0.1,
    bundle_cl_temp: float = 0.05,
    bundle_cl_alpha: float = 2.0,
    partial_uses_full_mask: bool = False,
) -> dict[str, Tensor]:
    """Compute all of CLHE for a batch of bundles, with projected items as both views and no dropout.

    Args:
        content, text: features of all items, of any norm; normalised here.
        cf: vectors of user feedback; cold_cf is 1 for items without any.
        membership: 1 for the items of each bundle.
        seq_full, seq_partial: item numbers of each bundle and of its smaller copy, padded with the number of items.
        weights: "enc....", "dec....", "bundle.w_q", "bundle.w_k", "cl_projector.weight" and bias (see `item_vectors`).
        cl_temp, cl_alpha: temperature and weight of the items' contrast.
        bundle_cl_temp, bundle_cl_alpha: those of the bundles' contrast.
        partial_uses_full_mask: encode the smaller copy under the full bundle's mask, as the authors' code does; by default no.

    Returns loss, recon, item_loss and bundle_loss (weighted), bundle, bundle_partial, item_encoder, item_decoder.
    """
    many, found = len(content), {}
    features = {"content": unit(content), "text": unit(text), "cf": cf}
    for side, name in (("enc", "item_encoder"), ("dec", "item_decoder")):
        own = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(side + ".")}
        found[name] = modality_fusion(item_vectors(features, own, cold_cf), own["w_q.weight"], own["w_k.weight"])
    pads = {"bundle": seq_full == many}
    pads["bundle_partial"] = pads["bundle"] if partial_uses_full_mask else seq_partial == many
    for name, ids in (("bundle", seq_full), ("bundle_partial", seq_partial)):
        rows = found["item_encoder"][ids.masked_fill(ids == many, 0)]
        found[name] = set_attention_pool(rows, pads[name], weights["bundle.w_q"], weights["bundle.w_k"])
    found["recon"] = multinomial_nll(found["bundle"] @ found["item_decoder"].T, membership)
    items = found["item_encoder"][seq_full[~pads["bundle"]].unique()]
    view = F.linear(items, weights["cl_projector.weight"], weights["cl_projector.bias"])
    found["item_loss"] = cl_alpha * one_way_infonce(view, view, cl_temp)
    found["bundle_loss"] = bundle_cl_alpha * one_way_infonce(found["bundle"], found["bundle_partial"], bundle_cl_temp)
    found["loss"] = found["recon"] + found["item_loss"] + found["bundle_loss"]
    return found


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class CLHEConfig(SequencesConfig):
    """Settings of CLHE. Defaults are those of the authors' code for the dense fashion outfits (POG_dense)."""

    epochs: int = 50
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    length: int = 200
    """Maximum number of items of a bundle that the network reads."""
    sources: str = "content,text,cf"
    """Features of items to use, with commas between: content, text, cf, of those that the data have; none: embeddings alone."""
    item_views: Literal["tokens", "dropout", "noise", "same"] = "tokens"
    """Views of items: tokens left out, dropout or noise with a projection, or the same twice."""
    drop: float = 0.2
    """Probability with which a token or a number is left out, 0 to 1 (not included)."""
    noise: float = 0.02
    """Deviation of the noise on items, at least 0."""
    item_weight: float = 0.1
    """alpha_i: weight of the contrast of items, at least 0."""
    item_temperature: float = 0.5
    """T_i: temperature of the contrast of items, > 0."""
    bundle_views: Literal["drop", "replace"] = "drop"
    """Leave items of a bundle out, or replace them by random items."""
    kept: float = 0.5
    """Share of a bundle's items that its view keeps, above 0; above 1 random items are added."""
    bundle_weight: float = 2.0
    """alpha_b: weight of the contrast of bundles, at least 0."""
    bundle_temperature: float = 0.05
    """T_b: temperature of the contrast of bundles, > 0."""
    train_bundle_attention: bool = True
    """Train the attention over a bundle's items. False: random weights, as in the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("item_temperature", "bundle_temperature", "kept")
        self.need_weight("item_weight", "bundle_weight", "noise")
        self.need_below_one("drop")
        for name in self.chosen:
            if name not in SOURCES:
                raise unknown("source of features", name, (*SOURCES, "none"))

    @property
    def chosen(self) -> list[str]:
        """Names of the features to use."""
        return [] if self.sources == "none" else [name.strip() for name in self.sources.split(",")]


# ------------------------------------------------------------------------------------------------------------- the learner


class CLHE(SequencesLearner):
    """Two item encoders, the attention over a bundle, and a projection for the contrast of items."""

    config: CLHEConfig
    cold: Tensor

    def __init__(self, config: CLHEConfig, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        seed_torch(seed)
        self.config = config
        if getattr(data, "ordered", False):
            raise CounterpointError(
                "clhe completes sets, and these data are histories; name a source of sets, such as bundles:FILE"
            )
        given: Mapping[str, int] = getattr(data, "features", {})
        widths = {name: given[name] for name in config.chosen if name in given}
        for name, width in widths.items():
            self.register_buffer(f"feature_{name}", torch.zeros(data.items, width))
        self.register_buffer("cold", torch.zeros(data.items, dtype=torch.bool))
        self.widths = widths
        self.encoder, self.decoder = (ItemEncoder(data.items, widths, config.dim) for _ in range(2))
        self.bundle_q, self.bundle_k = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(2))
        for layer in (self.bundle_q, self.bundle_k):
            layer.weight.requires_grad_(config.train_bundle_attention)
        self.projector = nn.Linear(config.dim, config.dim)

    @property
    def features(self) -> dict[str, Tensor]:
        """Features of all items, by name."""
        return {name: getattr(self, f"feature_{name}") for name in self.widths}

    def begin(self, survey: Survey) -> None:
        """Take the features of all items; content and text get unit rows."""
        found = survey.item_features
        for name in self.widths:
            rows = found[name].to(self.device)
            self.features[name].copy_(rows if name == "cf" else unit(rows))
            if name == "cf":
                self.cold.copy_(~rows.bool().any(1))

    def turns(self) -> list[Turn]:
        return [self.turn_of([self], curve=constant_rate)]

    # --- losses

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the views of bundles: ids with 0 for padding."""
        config, given = self.config, Histories(batch["ids"], batch["lengths"])
        total, mine = self.share(len(given.ids))
        width = given.ids.shape[1]
        extra = round(width * (config.kept - 1)) if config.kept > 1 else 0
        keys = torch.rand(total, config.length, generator=generator)[mine, :width].to(self.device)
        numbers = torch.rand(total, config.length + extra, generator=generator)[mine, : width + extra].to(self.device)
        replace = config.bundle_views == "replace"
        return batch | {"view": changed_sets(given, config.kept, len(self.cold), keys, numbers, replace=replace)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, ids = self.config, batch["ids"]
        sets = [ids, batch["view"]] if config.bundle_weight else [ids]
        used = torch.cat([part.flatten() for part in sets]).unique()
        used = used[used > 0] - 1
        items = self.encoder.fused(self.encoder.tokens(self.features, self.cold, used))
        states = [self.pooled(part, items[torch.searchsorted(used, (part - 1).clamp(min=0))]) for part in sets]
        targets = torch.zeros(len(ids), len(self.cold) + 1, device=items.device).scatter_(1, ids, 1.0)[:, 1:]
        recon = multinomial_nll(states[0] @ self.item_table().T, targets)
        found = {"loss": recon, "recon": recon.detach()}
        if config.item_weight:
            contrast = one_way_infonce(*self.item_pair(ids), config.item_temperature)
            found["loss"] = found["loss"] + config.item_weight * contrast
            found["items"] = contrast.detach()
        if config.bundle_weight:
            contrast = one_way_infonce(states[0], states[1], config.bundle_temperature)
            found["loss"] = found["loss"] + config.bundle_weight * contrast
            found["bundles"] = contrast.detach()
        return found

    def item_pair(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return two views of the distinct items of the whole batch, of which each process takes a share."""
        config, (rank, size) = self.config, world()
        every = self.whole(F.pad(ids, (0, config.length - ids.shape[1])))
        tokens = self.encoder.tokens(self.features, self.cold, (every[every > 0].unique() - 1)[rank::size])
        if config.item_views == "tokens":
            pair = [tokens * (torch.rand_like(tokens[..., :1]) >= config.drop) for _ in range(2)]
            return self.encoder.fused(pair[0]), self.encoder.fused(pair[1])
        items = self.encoder.fused(tokens)
        if config.item_views == "same":
            return items, items
        if config.item_views == "noise":
            views = [items + config.noise * torch.randn_like(items) for _ in range(2)]
        else:
            views = [F.dropout(items, config.drop, self.training) for _ in range(2)]
        return self.projector(views[0]), self.projector(views[1])

    def pooled(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return the vectors of sets of ids [n, T], 0 for padding, from their items' vectors [n, T, dim]."""
        return set_attention_pool(rows, ids == 0, self.bundle_q.weight, self.bundle_k.weight)

    # --- predictions

    def represent(self, ids: Tensor, lengths: Tensor) -> Tensor:
        items = self.encoder.fused(self.encoder.tokens(self.features, self.cold))
        return self.pooled(ids, items[(ids - 1).clamp(min=0)])

    def item_table(self) -> Tensor:
        return self.decoder.fused(self.decoder.tokens(self.features, self.cold))


# Settings for a few hundred bundles, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "epochs": 80, "batch_size": 125, "lr": 2e-3, "length": 50, "bundle_temperature": 0.2, "item_temperature": 0.2,
    "bundle_weight": 0.5, "evaluate_every": 10,
}  # fmt: skip

SYSTEM = System(slug="clhe", task="sequences", config=CLHEConfig, learner=CLHE, data="themed-bundles", recipe=LAPTOP)
