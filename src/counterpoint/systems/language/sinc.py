"""SINC: a small model that learns to classify from demonstrations, on features of frozen encoders.

Chen, Song, Yao, Liu, Wang: "SINC: Self-Supervised In-Context Learning for Vision-Language Tasks", ICCV 2023, arXiv 2307.07742.
Authors' code: github YiSyuanChen/SINC (MIT).

    f [S, F]      features of an item: S slots, such as those of a vision, a language and a fused encoder
    r             the fuser's vector of an item; q0 its learned query
    v_c           the vector of a class: a projection of the mean embedding of the tokens of its name
    E             number of demonstrations

    x = fc(q0),  Y = fc(f)                                                    fuser: one block of BERT, post-norm
    h1 = LN(x + Self(x)),  h2 = LN(h1 + Cross(h1; [Y ; x])),  h3 = LN(h2 + FFN(h2))
    x <- x + h3,  x <- x + post(x),  r = out(ReLU(x))
    k = corr(mean_i r_query * r_i)                                            correlation token (r_query * r_query for E = 0)
    H = M(in([k, r_1, v_y1, ..., r_E, v_yE, r_query]))                        M: a causal meta-model
    logit_c = w . (ReLU(W_d H_query + b_d) * ReLU(W_l v_c + b_l)) + b         any classes, by their names
    L = cross-entropy over the training classes at the query alone

- One coin for a batch: with probability `bursty_ratio` the prompts are in-demo, otherwise out-demo (random demonstrations).
- An in-demo prompt is, by another coin, label-informed or data-informed. The first has E / ways demonstrations each of the
  query's class and of ways - 1 others. The second has nearest neighbours of the query.
- The query is never among its demonstrations; the authors' code can draw it.
- A new task needs no training: its demonstrations and the names of its classes are the prompt.
- A slot that an item lacks is masked in the fuser's attention; the authors' code sets it to zero.
- Left out: soft targets (VQA), yes/no variants of items, a bidirectional meta-model, the choice of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.seeds import seed_torch
from counterpoint.core.transforms import holds
from counterpoint.encoders.in_context import EPS, InContextNetwork, check_meta_model, word_embedding
from counterpoint.encoders.no_rows import no_rows
from counterpoint.encoders.text import Tokenizer
from counterpoint.engine.learner import Learner
from counterpoint.engine.optim import on_lines
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.episodes import (
    LEARNT,
    EpisodesConfig,
    by_demonstrations,
    demonstrations,
    name_tokens,
    neighbours_of,
    prompts,
)

# ------------------------------------------------------------------------------------------------------------- equations


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"].to(x.dtype), weights[f"{name}.bias"].to(x.dtype))


def fused(
    features: Float[Tensor, "n slots features"],
    weights: Mapping[str, Tensor],
    num_heads: int,
    layer_norm_eps: float,
    present: Bool[Tensor, "n slots"] | None = None,
) -> Float[Tensor, "n width"]:
    """Compute the vector r of each item: cross-attention of a learned query to its slots."""
    n, slots, _ = features.shape
    block = "fuser.attention_layers.0"

    def normal(x: Tensor, name: str) -> Tensor:
        scale, shift = (weights[f"{block}.{name}.LayerNorm.{part}"].to(x.dtype) for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], scale, shift, layer_norm_eps)

    x = _linear(weights["fuser_query"].to(features.dtype), weights, "fuser.fc")
    y = torch.cat([_linear(features, weights, "fuser.fc"), x.expand(n, 1, -1)], 1)
    # One token that attends to itself has the weight 1, so the attention is its value.
    own = _linear(x, weights, f"{block}.attention.self.value")
    h1 = normal(x + _linear(own, weights, f"{block}.attention.output.dense"), "attention.output")
    query = _linear(h1, weights, f"{block}.crossattention.self.query").view(1, 1, num_heads, -1).transpose(1, 2)
    key, value = (
        _linear(y, weights, f"{block}.crossattention.self.{name}").view(n, slots + 1, num_heads, -1).transpose(1, 2)
        for name in ("key", "value")
    )
    seen = None if present is None else F.pad(present.bool(), (0, 1), value=True)[:, None, None]
    context = F.scaled_dot_product_attention(query.expand(n, -1, -1, -1), key, value, attn_mask=seen)
    context = context.transpose(1, 2).reshape(n, -1)
    h2 = normal(h1 + _linear(context, weights, f"{block}.crossattention.output.dense"), "crossattention.output")
    inner = F.gelu(_linear(h2, weights, f"{block}.intermediate.dense"))
    x = x + normal(h2 + _linear(inner, weights, f"{block}.output.dense"), "output")
    x = x + _linear(x, weights, "fuser.fcs.0")
    return _linear(x.relu(), weights, "fuser.final")


def label_vectors(
    class_tokens: Int[Tensor, "classes tokens"],
    class_token_mask: Bool[Tensor, "classes tokens"] | Int[Tensor, "classes tokens"],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Float[Tensor, "classes width"]:
    """Compute the vector v of each class: the projected mean embedding of the tokens of its name."""
    there = class_token_mask.to(dtype)
    many = there.sum(1, keepdim=True)
    if holds((many == 0).any()):
        raise ValueError(f"class_token_mask has no token for class {int((many == 0).nonzero()[0, 0])}; give it a name")
    embedded = F.embedding(class_tokens, weights["label_token_embeddings"].to(dtype))
    return _linear((embedded * there[..., None]).sum(1) / many, weights, "label_proj")


@full_precision
def in_context_classifier(
    query_features: Float[Tensor, "n slots features"],
    demo_features: Float[Tensor, "n demos slots features"],
    demo_labels: Int[Tensor, "n demos"],
    class_tokens: Int[Tensor, "classes tokens"],
    class_token_mask: Bool[Tensor, "classes tokens"] | Int[Tensor, "classes tokens"],
    weights: Mapping[str, Tensor],
    meta_model: Callable[[Tensor], Tensor],
    *,
    num_heads: int = 12,
    layer_norm_eps: float = 1e-12,
    correlation_token: bool = True,
    query_slots: Bool[Tensor, "n slots"] | None = None,
    demo_slots: Bool[Tensor, "n demos slots"] | None = None,
    query_alone: bool = False,
) -> Float[Tensor, "n positions classes"]:
    """Compute the logits of all classes for the demonstrations and, at the last position, for the query.

    Args:
        query_features: features of the queries.
        demo_features: features of their demonstrations, possibly none.
        demo_labels: class number of each demonstration.
        class_tokens: token numbers of the names of the classes, padded.
        class_token_mask: 1 at the tokens of a name, at least one for each class.
        weights: by the authors' names, such as "fuser.fc.weight" (see `counterpoint.encoders.in_context`).
        meta_model: a causal function from vectors [n, length, width] to states of the same shape.
        num_heads: number of heads of the fuser's attention.
        layer_norm_eps: epsilon of the fuser's layer normalisations.
        correlation_token: put the correlation token before the prompt.
        query_slots, demo_slots: True at the slots that an item has. Default: all.
        query_alone: return the logits of the query alone, [n, 1, classes].

    A demonstration's state precedes its label, so train on the last position alone. Raises ValueError for shapes that do not fit, a
    class without a token and a label out of range.
    """
    need_rows(query_features=query_features)
    need_positive(num_heads=num_heads)
    n, slots, features = query_features.shape
    each = demo_labels.shape[1]
    if demo_features.shape != (n, each, slots, features) or demo_labels.shape[0] != n:
        raise ValueError(
            "query_features must be [n, slots, features], demo_features [n, demos, slots, features], demo_labels [n, demos], got "
            + shapes(query_features=query_features, demo_features=demo_features, demo_labels=demo_labels)
        )
    if class_tokens.shape != class_token_mask.shape or class_tokens.ndim != 2:
        raise ValueError(
            "class_tokens and class_token_mask must be [classes, tokens], got "
            + shapes(class_tokens=class_tokens, class_token_mask=class_token_mask)
        )
    if each and holds(((demo_labels < 0) | (demo_labels >= len(class_tokens))).any()):
        raise ValueError(f"demo_labels must lie in 0..{len(class_tokens) - 1}, the rows of class_tokens")
    labels = label_vectors(class_tokens, class_token_mask, weights, query_features.dtype)
    items = torch.cat([query_features[:, None], demo_features], 1)
    present = None
    if query_slots is not None or demo_slots is not None:
        every = items.new_ones(items.shape[:3], dtype=torch.bool)
        asked = every[:, :1] if query_slots is None else query_slots[:, None].bool()
        present = torch.cat([asked, every[:, 1:] if demo_slots is None else demo_slots.bool()], 1).flatten(0, 1)
    r = fused(items.flatten(0, 1), weights, num_heads, layer_norm_eps, present).view(n, 1 + each, -1)
    query, demos = r[:, :1], r[:, 1:]
    pairs = torch.stack([demos, F.embedding(demo_labels, labels)], 2).flatten(1, 2)
    prompt = [pairs, query]
    if correlation_token:
        other = demos if each else query
        prompt.insert(0, _linear((query * other).mean(1, keepdim=True), weights, "corr_proj"))
    states = meta_model(_linear(torch.cat(prompt, 1), weights, "in_proj"))
    states = states[:, -1:] if query_alone else states[:, int(correlation_token) :: 2]
    a = _linear(states, weights, "classifier.dense_d").relu()
    b = _linear(labels, weights, "classifier.dense_l").relu()
    w = weights["classifier.dense.weight"].to(a.dtype)
    return (a * w[0]) @ b.T + weights["classifier.dense.bias"].to(a.dtype)


# ------------------------------------------------------------------------------------------------------------- learner


@dataclass
class SINCConfig(EpisodesConfig):
    """Settings of SINC. Defaults are the paper's; its rate of 3e-4 is for a batch of 64."""

    optimizer: str = "adamw"
    lr: float = 1.2e-3
    weight_decay: float = 0.01
    beta2: float | None = 0.98
    schedule: Literal["epoch", "step"] = "step"
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises; then it falls to 0 on a line. 0 to 1, 1 not included."""
    fuser: int = 768
    """Width of the fuser, at least 1."""
    fuser_heads: int = 12
    """Number of heads of the fuser's attention, a divisor of `fuser`."""
    meta: str = "hf:openai-community/gpt2"
    """The meta-model: gpt2-W-D-H (width, layers, heads), or a published GPT-2: hf:NAME."""
    scorer: int = 64
    """Hidden width of the classifier of pairs, at least 1."""
    word_width: int = 768
    """Width of the embedding of label tokens, at least 1; only where `words` is learnt."""
    correlation_token: bool = True
    """Begin the prompt with the correlation of query and demonstrations."""

    counts: ClassVar[tuple[str, ...]] = (*EpisodesConfig.counts, "fuser", "fuser_heads", "scorer", "word_width")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("warmup")
        if self.warmup == 1.0:
            raise CounterpointError("warmup must be below 1, got 1.0")
        if self.fuser % self.fuser_heads:
            raise CounterpointError(f"fuser_heads must divide fuser ({self.fuser}), got {self.fuser_heads}")

    def check(self) -> None:
        super().check()
        check_meta_model(self.meta)


class SINC(Learner):
    """The fuser, label vectors, meta-model and classifier. Features come from frozen encoders."""

    config: SINCConfig
    class_tokens: Tensor
    class_token_mask: Tensor

    def __init__(self, config: SINCConfig, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        seed_torch(seed)
        self.config = config
        tokenizer = Tokenizer.from_json(data.tokenizer)
        if config.words == LEARNT:
            table = torch.randn(tokenizer.vocabulary, config.word_width)
        else:
            table = word_embedding(config.words)
        positions = 2 * config.demonstrations + 2
        self.network = InContextNetwork(data.feature_width, table, config.fuser, config.meta, positions, config.scorer)
        tokens, mask = name_tokens(tokenizer, data.class_names)
        self.register_buffer("class_tokens", tokens, persistent=False)
        self.register_buffer("class_token_mask", mask, persistent=False)

    def begin(self, survey: Survey) -> None:
        """Take the training items, and find the neighbours of each."""
        self.items = survey.split("train")
        self.numbers = np.searchsorted(self.items.members.numbers, self.items.labels)
        self.nearest = neighbours_of(self.items, self.config.neighbours)

    def turns(self) -> list[Turn]:
        return [on_lines(self.config, [self.network], self.epochs, self.steps_per_epoch)]

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the coin of the batch, and the demonstrations of its queries."""
        rows = batch["index"].cpu().numpy()
        seed = int(torch.randint(2**62, (), generator=generator))
        in_demo = bool(np.random.default_rng(seed).random() < self.config.bursty_ratio)
        total, mine = self.share(len(rows))
        demos = [
            demonstrations(self.items, row, self.config, self.nearest, in_demo, np.random.default_rng([seed, place]))
            for row, place in zip(rows.tolist(), range(total)[mine], strict=True)
        ]
        chosen = np.stack(demos) if demos else np.empty((0, 0), np.int64)
        found = prompts(self.items, rows, self.items, demos, self.numbers[chosen])
        found["label"] = torch.from_numpy(self.numbers[rows])
        return batch | {name: value.to(self.device) for name, value in found.items()} | {"in_demo": in_demo}

    def logits(
        self, prompt: Mapping[str, Tensor], class_tokens: Tensor, class_token_mask: Tensor
    ) -> Float[Tensor, "n classes"]:
        """Compute the logits of all classes for the queries of prompts."""
        if not len(prompt["query"]):
            return no_rows(self.network, len(class_tokens))
        found: Tensor = in_context_classifier(
            prompt["query"], prompt["demos"], prompt["demo_labels"], class_tokens, class_token_mask,
            self.network.weights, self.network.meta, num_heads=self.config.fuser_heads, layer_norm_eps=EPS,
            correlation_token=self.config.correlation_token, query_slots=prompt["query_slots"],
            demo_slots=prompt["demo_slots"], query_alone=True,
        )  # fmt: skip
        return found[:, 0]

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = self.logits(batch, self.class_tokens, self.class_token_mask)
        loss = global_mean(F.cross_entropy(logits, batch["label"], reduction="none"))
        return {"loss": loss, "in_demo_share": loss.new_tensor(float(batch["in_demo"]))}

    # --- answers

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, prompt in batch["prompts"].items():
            if not len(prompt["query"]):
                found[f"{name}_logits"] = prompt["query"].new_zeros(0, 1)
                continue
            logits = self.logits(prompt, batch["class_tokens"], batch["class_token_mask"])
            found[f"{name}_logits"] = logits.gather(1, prompt["words"]) if "words" in prompt else logits
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        return super().figures(survey) | {"Accuracy by demonstrations": by_demonstrations(self, survey)}


RECIPE = {
    "fuser": 64,
    "fuser_heads": 2,
    "word_width": 32,
    "meta": "gpt2-32-2-2",
    "batch_size": 96,
    "lr": 0.016,
    "warmup": 0.05,
    "epochs": 12,
    "bursty_ratio": 0.9,
    "label_informed": 1.0,
    "vocabulary": 4000,
    "evaluate_every": 4,
}
SYSTEM = System(
    slug="sinc",
    task="episodes",
    config=SINCConfig,
    learner=SINC,
    data="latent-classes",
    recipes={"latent-classes": RECIPE},
)
