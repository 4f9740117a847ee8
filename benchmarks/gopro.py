"""Compare GOPro's loss, prompt generator and text pass with the authors' way.

    python benchmarks/gopro.py [--rounds 7] [--threads 1]      writes results/bench/gopro.json

The method is that of benchmarks/alignment.py. `loss` has n pictures, 10 classes, rows of 512 numbers: cross-entropy, agreement of
three sets of texts, contrast. The transcription stores four matrices of similarities, masked by a large number. `generator` has the
tokens of 12 blocks of ViT-B/16, 197 of width 768; n pictures. Both compute the same operations. `texts` encodes the prompts of n
pictures and 10 classes with text-s, gradient to the context: ours in chunks of 256 texts, the transcription at once. Ours keeps one
chunk's activations, and computes the others once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.dual import DualEncoder
from counterpoint.encoders.text import TextTransformer

OUT = Path(__file__).parents[1] / "results" / "bench" / "gopro.json"
CLASSES, DIM, BLOCKS, TOKENS, WIDTH = 10, 512, 12, 197, 768


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def authors_loss(logits: Tensor, labels: Tensor, *rows: Tensor) -> Tensor:
    """Compute the loss by whole matrices of similarities."""
    text, first, second, a, b = rows
    loss = F.cross_entropy(logits, labels) + F.mse_loss(first, text) + F.mse_loss(second, text)
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    mask, own = 1e9 * torch.eye(len(a)), torch.arange(len(a))
    one = torch.cat([a @ b.T / 0.1, a @ a.T / 0.1 - mask], 1)
    other = torch.cat([b @ a.T / 0.1, b @ b.T / 0.1 - mask], 1)
    return loss + 0.1 * (F.cross_entropy(one, own) + F.cross_entropy(other, own)) / 2


def of_loss(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    labels = torch.arange(n) % CLASSES
    texts = [F.normalize(drawn(n, CLASSES, DIM, seed=k), dim=2) for k in range(3)]
    inputs = [x.requires_grad_() for x in (drawn(n, CLASSES), *texts, drawn(n, DIM, seed=4), drawn(n, DIM, seed=5))]
    first, *rest = inputs
    return (
        inputs,
        lambda: fn.gopro_loss(first, labels, *rest)[0],
        lambda: authors_loss(first, labels, *rest),
    )


def of_generator(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    z = drawn(BLOCKS, n, TOKENS, WIDTH)
    named = {
        "style_weight": drawn(BLOCKS, DIM, WIDTH, seed=1) / WIDTH**0.5,
        "style_bias": drawn(BLOCKS, DIM, seed=2),
        "content_weight": drawn(BLOCKS, DIM, WIDTH, seed=3) / WIDTH**0.5,
        "content_bias": drawn(BLOCKS, DIM, seed=4),
        "rho_weight": drawn(1, BLOCKS, seed=5),
        "rho_bias": drawn(1, seed=6),
    }
    inputs = [x.requires_grad_() for x in named.values()]

    def authors() -> Tensor:
        fused = []
        for block in range(BLOCKS):
            mean = z[block].mean(1)
            spread = (((z[block] - mean[:, None]) ** 2).sum(1) + 2.3e-8) / TOKENS
            style = F.linear((mean + spread.sqrt()) / 2, named["style_weight"][block], named["style_bias"][block])
            fused.append((style + F.linear(mean, named["content_weight"][block], named["content_bias"][block])) / 2)
        return F.linear(torch.stack(fused).permute(1, 2, 0), named["rho_weight"], named["rho_bias"]).square().sum()

    return inputs, lambda: fn.style_content_token(z, named).square().sum(), authors


class Texts(DualEncoder):
    """A text encoder alone; its texts are numbers of tokens."""

    def __init__(self) -> None:
        super().__init__(128, 1.0, 16)
        torch.manual_seed(0)
        self.encoder = TextTransformer(512).requires_grad_(False).eval()

    def token_ids(self, texts: list[str], room: int = 0) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[1, *self.own_ids(text), 2] for text in texts])
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def own_ids(self, text: str) -> list[int]:
        return [10 + ord(text[0])] * 3

    def token_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(ids, mask)

    @property
    def words(self) -> Any:
        return self.encoder.embed


def of_texts(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    network, names = Texts(), [chr(97 + k) for k in range(CLASSES)]
    context = drawn(n, 4, 128).requires_grad_()

    def loss(chunk: int) -> Tensor:
        return network.text_rows_with_context(context, names, chunk).square().sum()

    return [context], lambda: loss(256), lambda: loss(10**9)


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "loss": (of_loss, (4, 256, 2048)),
    "generator": (of_generator, (4, 64)),
    "texts": (of_texts, (4, 128)),
}


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM)
