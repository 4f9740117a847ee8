"""Compare Any2Seg's fusion, its relations and its step with plain formulations, and count the bytes kept for the backward pass.

    python benchmarks/any2seg.py [--rounds 7] [--threads 1]      writes results/bench/any2seg.json

The method is that of benchmarks/alignment.py. The fusion's transcription follows the authors' compiled model file: stacked cosine
similarities, an argmax, a gather. Its four modalities have 25 classes; n is the side of the maps, at a batch of 4. The relations
between classes are not published: the plain way pools class by class in every image, with 64 channels. A step is one of the claim's
network, n its batch, in full: pictures to gradients. Both ways share the network. The bytes are those that autograd keeps.
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
from counterpoint.core.map_sums import class_means
from counterpoint.experiment import Experiment

OUT = Path(__file__).parents[1] / "results" / "bench" / "any2seg.json"
MODALITIES, BATCH, CLASSES = 4, 4, 25
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_fusion(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute fused maps and correlations as the compiled file does."""
    mean = x.mean(0)
    rho = torch.stack([F.cosine_similarity(each.flatten(1), mean.flatten(1), dim=1) for each in x])
    goal = (rho[:, :, None, None, None] * x).sum(0)
    near = torch.stack([F.cosine_similarity(each, goal, dim=1) for each in x])
    index = near.argmax(0)[None, :, None].expand(1, *x.shape[1:])
    return x.gather(0, index)[0] + mean, rho


def fusion(side: int) -> Case:
    x = drawn(MODALITIES, BATCH, CLASSES, side, side).requires_grad_()
    probe, of_rho = drawn(*x.shape[1:], seed=1) / x[0].numel(), drawn(MODALITIES, BATCH, seed=2)

    def total(fused: Tensor, rho: Tensor) -> Tensor:
        return (fused * probe).sum() + (rho * of_rho).sum()

    return [x], lambda: total(*fn.modality_agnostic_fusion(x)[:2]), lambda: total(*plain_fusion(x))


def plain_intra(features: Tensor, masks: Tensor, text: Tensor) -> Tensor:
    """Compute the relations between classes, image by image and class by class."""
    losses = []
    for image, mask in zip(features, masks, strict=True):
        rows, names = [], []
        for number in range(len(text)):
            own = mask == number
            if own.any():
                rows.append((image * own).sum((1, 2)) / own.sum())
                names.append(text[number])
        if not rows:
            losses.append(image.sum() * 0)
            continue
        student, teacher = (F.normalize(torch.stack(part), dim=1) for part in (rows, names))
        p, q = (x @ x.T for x in (teacher, student))
        losses.append(F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1).mean())
    return torch.stack(losses).mean()


def intra(side: int) -> Case:
    features = drawn(BATCH, 64, side, side).requires_grad_()
    masks = (drawn(BATCH, side // 8, side // 8, seed=1) * 1000).long().remainder(CLASSES).to(torch.uint8)
    masks = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    text = drawn(CLASSES, 384, seed=2)

    def ours() -> Tensor:
        means, shown = class_means(features, masks, CLASSES)
        return fn.intra_modal_loss(means, text, shown)

    return [features], ours, lambda: plain_intra(features, masks, text)


def step(n: int) -> Case:
    settings = {"inter_weight": 0.0, "intra_weight": 0.0, "batch_size": n}
    experiment = Experiment.resolve("any2seg", "sensors?train=64&valid=4&test=4", overrides=settings)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    rows, text = drawn(n, MODALITIES, seed=1).tanh(), drawn(6, 384, seed=2)
    (pictures,), (masks,) = batch["views"], batch["masks"]
    small = F.interpolate(masks[:, None].float(), 24, mode="nearest-exact")[:, 0].to(torch.uint8)

    def ours() -> Tensor:
        learner.config.inter_weight = learner.config.intra_weight = 1.0
        learner.class_text = text
        learner.agreement = torch.zeros(64, MODALITIES).index_copy(0, batch["index"], rows)
        return learner.loss(batch)["loss"]

    def plain() -> Tensor:
        features = learner.decoder(_maps(learner, pictures))
        logits = learner.classifier(features).unflatten(0, (MODALITIES, n))
        fused, rho = plain_fusion(logits)
        near = logits.detach()
        goal = (rho.detach()[:, :, None, None, None] * near).sum(0)
        index = torch.stack([F.cosine_similarity(x, goal, dim=1) for x in near]).argmax(0)
        features = features.unflatten(0, (MODALITIES, n))
        mine = features.gather(0, index[None, :, None].expand(1, *features.shape[1:]))[0] + features.mean(0)
        prediction = F.interpolate(fused, 48, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(prediction, masks.long(), ignore_index=255, reduction="none").sum((1, 2))
        loss = (loss / (masks != 255).sum((1, 2))).mean()
        inter = F.kl_div(rho.T.log_softmax(1), rows.softmax(1), reduction="none").sum(1).mean()
        return loss + inter + plain_intra(mine, small, text)

    return list(learner.parameters()), ours, plain


def _maps(learner: Any, pictures: Tensor) -> list[Tensor]:
    x = pictures.transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    found = []
    for layer in (learner.encoder.stem, learner.encoder.layer1, learner.encoder.layer2):
        x = layer(x)
        found.append(x)
    return found


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "fusion": (fusion, (32, 64, 128)),
    "intra": (intra, (32, 64, 128)),
    "step": (step, (8, 32)),
}


def kept(call: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass, besides the arguments."""
    known, seen = {x.data_ptr() for x in given}, dict[int, int]()

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = call()
    del loss
    return sum(seen.values())


if __name__ == "__main__":
    run(CASES, OUT, __doc__, memory=lambda given, call: kept(call, given))
