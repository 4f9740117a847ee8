"""Score the snippets of a bag with one layer of attention, over two streams or one (MACIL-SD, arXiv 2207.05500).

`MacilSDNet.load` reads the published checkpoint, so modules keep the checkpoint's names. Do not rename them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.attention import MultiHeadAttention
from counterpoint.core.dropout import Dropout
from counterpoint.core.mil import topk_mil_pool
from counterpoint.core.weights import read_weights
from counterpoint.errors import RunError


class _FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, inner)
        self.w_2 = nn.Linear(inner, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


class _Sublayer(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)


class _AttentionLayer(nn.Module):
    """LAYER(q; kv): pre-norm on the query only; keys and values enter as they are (Sec. 3.1)."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(dim, heads, dropout)
        self.feed_forward = _FeedForward(dim, inner, dropout)
        self.sublayer = nn.ModuleList(_Sublayer(dim, dropout) for _ in range(2))

    def forward(self, query: Tensor, memory: Tensor, key_mask: Tensor | None) -> Tensor:
        first, second = cast("list[_Sublayer]", list(self.sublayer))
        query = query + first.dropout(self.self_attn(first.norm(query), memory, memory, key_mask))
        return query + second.dropout(self.feed_forward(second.norm(query)))


class _Layered(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.layer = _AttentionLayer(dim, heads, inner, dropout)


class _Scorer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 1)


class AVOutput(NamedTuple):
    """Scores of B bags of T snippets by the audio-visual network."""

    mmil_prob: Float[Tensor, " bags"]
    audio_prob: Float[Tensor, "bags time"]
    visual_prob: Float[Tensor, "bags time"]
    av_logit: Float[Tensor, "bags time"]
    visual_out: Float[Tensor, "bags time hidden"]
    audio_out: Float[Tensor, "bags time hidden"]


class VisualOutput(NamedTuple):
    """Scores of B bags of T snippets by the visual network."""

    mil_prob: Float[Tensor, " bags"]
    logit: Float[Tensor, "bags time"]


def _key_mask(features: Tensor, seq_len: Tensor | None, mask_padding: bool) -> Tensor | None:
    if not mask_padding or seq_len is None:
        return None
    return torch.arange(features.shape[1], device=features.device) < seq_len[:, None]


def _bag_prob(logits: Tensor, seq_len: Tensor | None) -> Tensor:
    # Without lengths (test time) the published network takes the plain mean, which nothing uses.
    return torch.sigmoid(logits.mean(1)) if seq_len is None else topk_mil_pool(logits, seq_len)


class MacilSDNet(nn.Module):
    """The audio-visual network: one cross-attention layer and one scorer, shared by both modalities.

    `net(audio, visual, seq_len=None) -> AVOutput`. With `seq_len`, bag probabilities are top-k MIL; without it, the sigmoid
    of the mean logit.

    Args:
        visual_dim, audio_dim: widths of the features.
        hidden: width of the shared layer.
        heads: number of attention heads, a divisor of `hidden`.
        ffn: width of the feed-forward layer.
        dropout: probability, 0 to 1.
        mask_padding: exclude snippets beyond `seq_len` from the keys; False, as published: attend to them too.
    """

    def __init__(
        self,
        visual_dim: int = 1024,
        audio_dim: int = 128,
        *,
        hidden: int = 128,
        heads: int = 4,
        ffn: int = 128,
        dropout: float = 0.1,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_dim, hidden)
        self.fc_a = nn.Linear(audio_dim, hidden)
        self.cma = _Layered(hidden, heads, ffn, dropout)
        self.att_mmil = _Scorer(hidden)
        self.mask_padding = mask_padding

    def forward(
        self,
        audio: Float[Tensor, "bags time audio_dim"],
        visual: Float[Tensor, "bags time visual_dim"],
        seq_len: Int[Tensor, " bags"] | None = None,
    ) -> AVOutput:
        if audio.shape[:2] != visual.shape[:2]:
            raise ValueError(
                f"audio {tuple(audio.shape)} and visual {tuple(visual.shape)} must agree in bags and time; "
                "cut both to the same length first"
            )
        x_v, x_a = self.fc_v(visual), self.fc_a(audio)
        mask = _key_mask(visual, seq_len, self.mask_padding)
        # Both directions share weights and inputs, so one pass over twice the bags computes both.
        both = self.cma.layer(
            torch.cat([x_v, x_a]), torch.cat([x_a, x_v]), None if mask is None else torch.cat([mask, mask])
        )
        visual_logit, audio_logit = self.att_mmil.fc(both).squeeze(-1).chunk(2)
        visual_out, audio_out = both.chunk(2)
        av_logit = audio_logit + visual_logit
        return AVOutput(
            _bag_prob(av_logit, seq_len),
            torch.sigmoid(audio_logit),
            torch.sigmoid(visual_logit),
            av_logit,
            visual_out,
            audio_out,
        )

    @classmethod
    def load(cls, checkpoint: str | Path | Mapping[str, Any], *, heads: int = 4) -> MacilSDNet:
        """Build the network from a checkpoint: ours (.safetensors), the authors' (.pkl, .pt) or a state dict.

        Ignore modules of the authors' checkpoints that are never called (`multiheadattn`, `feedforward`, a LayerNorm inside
        the attention). Return the network in eval mode, in the checkpoint's precision (at least float32).

        Args:
            checkpoint: a file, or a state dict.
            heads: number of attention heads, which the weights do not determine; 4 is the published number.

        Raises RunError for a file that is damaged, would run code, or does not contain this network.
        """
        if isinstance(checkpoint, str | Path):
            name, state = str(checkpoint), read_weights(Path(checkpoint))
        else:
            name, state = "the state dict", {key: torch.as_tensor(value) for key, value in checkpoint.items()}
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if any(key.startswith("av.") for key in state):  # a run's own weights: this network and the visual one
            state = {key.removeprefix("av."): value for key, value in state.items() if key.startswith("av.")}
        state = {key: value for key, value in state.items() if not _dead(key)}
        if "fc_v.weight" not in state or "fc_a.weight" not in state or "cma.layer.feed_forward.w_1.weight" not in state:
            raise RunError(f"{name} is not a MACIL-SD audio-visual network: it has no fc_v, fc_a or cma.layer")
        hidden, visual_dim = state["fc_v.weight"].shape
        net = cls(
            visual_dim,
            state["fc_a.weight"].shape[1],
            hidden=hidden,
            heads=heads,
            ffn=state["cma.layer.feed_forward.w_1.weight"].shape[0],
        )
        dtype = torch.promote_types(state["fc_v.weight"].dtype, torch.float32)
        try:
            net.to(dtype).load_state_dict(state)
        except RuntimeError as error:
            raise RunError(f"{name} does not fit the MACIL-SD network: {' '.join(str(error).split())[:400]}") from error
        return net.eval()


def _dead(name: str) -> bool:
    """Return whether a parameter of the authors' checkpoint belongs to a module that is never called."""
    return "multiheadattn." in name or "feedforward." in name or "self_attn.layer_norm." in name


class VisualNet(nn.Module):
    """The visual-only network of the self-distillation: the same layer as self-attention, with separate weights.

    `net(visual, seq_len=None) -> VisualOutput`. `MacilSDNet` describes the arguments.
    """

    def __init__(
        self,
        visual_dim: int = 1024,
        *,
        hidden: int = 128,
        heads: int = 4,
        ffn: int = 128,
        dropout: float = 0.1,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_dim, hidden)
        self.cma = _Layered(hidden, heads, ffn, dropout)
        self.fc = nn.Linear(hidden, 1)
        self.mask_padding = mask_padding

    def forward(
        self, visual: Float[Tensor, "bags time visual_dim"], seq_len: Int[Tensor, " bags"] | None = None
    ) -> VisualOutput:
        x = self.fc_v(visual)
        logit = self.fc(self.cma.layer(x, x, _key_mask(visual, seq_len, self.mask_padding))).squeeze(-1)
        return VisualOutput(_bag_prob(logit, seq_len), logit)
