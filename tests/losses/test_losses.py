"""Every module of `counterpoint.losses`: the function's value and gradient, its state, its text, its table."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint import catalog, losses
from counterpoint import functional as fn
from counterpoint.losses.base import Loss, function_of

N, DIM = 6, 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(draw(seed, *shape), dim=-1)


def pair() -> list[Tensor]:
    return [draw(0, N, DIM), draw(1, N, DIM)]


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
INDEX = torch.tensor([7, 2, 5, 0, 9, 3])
PERMUTATION = torch.tensor([3, 0, 1, 5, 2, 4])
NEGATIVES = torch.cat([INDEX[:, None], torch.arange(18).view(6, 3) % 10], 1)


@dataclass(frozen=True)
class Case:
    """A module, arguments, and the same loss by the function: `by(module, *arguments)`, called before the module."""

    make: Callable[[], Loss]
    arguments: Callable[[], list[Any]]
    by: Callable[..., Tensor]


def maps() -> list[Tensor]:
    """Return maps of two crops, keys, and coordinates of crops that overlap."""
    low = draw(9, N, 2).sigmoid() / 4
    coords = [torch.cat([low, low + 0.6], 1), torch.cat([0.3 - low, 0.9 - low], 1)]
    return [*(draw(n, N, 3, 3, 4) for n in range(4)), *(x.detach() for x in coords)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def bags() -> list[Tensor]:
    probability = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3], dtype=torch.float64)
    scores = [draw(2, N, 20).sigmoid(), draw(3, N, 20).sigmoid()]
    return [probability, *scores, torch.full((N,), 20), draw(4, N, 20, DIM), draw(5, N, 20, DIM)]


def mixed_by(m: Any, query: Tensor, key: Tensor, _: Any) -> Tensor:
    """Compute MoCHi's logits, with the rows that the module draws found by hand."""
    random = torch.rand(N, m.mixed + m.mixed_query, 3, generator=generator())
    queue = m.memory.rows
    order = (F.normalize(query, dim=1) @ queue.T).topk(m.hardest, dim=1).indices
    at = order.gather(1, (random[:, :, :2] * m.hardest).long().flatten(1)).view(N, -1, 2)
    share, s = random[:, :, 2].double(), m.mixed
    logits = fn.mochi_logits(
        query, key, queue, at[:, :s, 0], at[:, :s, 1], share[:, :s], at[:, s:, 0], share[:, s:] / 2, m.temperature
    )
    return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))


def crd_by(m: Any, student: Tensor, teacher: Tensor, index: Tensor, contrast: Tensor) -> Tensor:
    bank = m.bank
    embedded = (F.normalize(bank.embed_student(student)), F.normalize(bank.embed_teacher(teacher.detach())))
    memories = bank.memory_student.rows.clone(), bank.memory_teacher.rows.clone()
    return fn.crd(*embedded, *memories, index, contrast, m.temperature, m.momentum).loss


def isogclr_by(m: Any, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
    state = {name: kept.values.clone() for name, kept in m.states.items()}
    sides = F.normalize(z1), F.normalize(z2)
    features = sides if m.pairs else torch.stack(sides, 1)
    bounds = (0.005, 1.0, 5.0) if m.pairs else (0.05, 1.0, 3.0)
    return fn.isogclr_step(state, index, features, 6.0 if m.pairs else 0.4, 0.8, 0.03, 0.9, *bounds, fresh=True)[0]


def swav_by(m: Any, high: Tensor, low: Tensor) -> Tensor:
    scores = [m.prototypes(F.normalize(z, dim=2)) for z in (high, low)]
    return fn.swav(*scores, m.temperature, m.epsilon, m.iterations).loss


def started(m: Any) -> Any:
    m.start(unit(7, N, DIM).float(), LABELS)
    return m


def capro_by(m: Any, logits: Tensor, z: Tensor, key: Tensor, *more: Tensor) -> Tensor:
    feature, rebuilt, labels, trusted = more
    z, key, weight = F.normalize(z), F.normalize(key), m.classifier_low.weight
    queue, low = m.memory.rows.clone().T, m.prototypes.clone()
    rows = logits, z, key, z @ weight.T, feature, rebuilt, labels, trusted, queue, low, weight
    loss: Tensor = fn.capro_step(*rows, 0.5, 0.5, 0.1, 0.5, 0.9)["loss"]
    return loss


CASES: dict[str, Case] = {
    "NTXent": Case(lambda: losses.NTXent(0.2), pair, lambda m, a, b: fn.of("simclr").nt_xent(a, b, 0.2)),
    "InfoNCE": Case(
        lambda: losses.InfoNCE(0.2), lambda: [*pair(), draw(2, 9, DIM)], lambda m, q, p, b: fn.info_nce(q, p, b, 0.2)
    ),
    "MoCo": Case(
        lambda: losses.MoCo(DIM, 9, 0.2), pair, lambda m, q, k: fn.moco(q, k, m.memory.rows.clone(), 0.2).loss
    ),
    "MoCHi": Case(lambda: losses.MoCHi(DIM, 9, 4, 3, 2), lambda: [*pair(), generator()], mixed_by),
    "DCL": Case(lambda: losses.DCL(0.2, 0.5), pair, lambda m, a, b: fn.dcl(a, b, 0.2, 0.5)),
    "ColumnInfoNCE": Case(
        lambda: losses.ColumnInfoNCE(0.2), lambda: [draw(0, N, 3, DIM)], lambda m, z: fn.column_infonce(z, 0.2)
    ),
    "NTXentByIndex": Case(
        lambda: losses.NTXentByIndex(0.3),
        lambda: [draw(0, N, DIM), LABELS],
        lambda m, z, i: fn.ntxent_by_index(z, i, 0.3),
    ),
    "PairwiseNTXent": Case(
        lambda: losses.PairwiseNTXent(0.3), lambda: [draw(0, 3, N, DIM)], lambda m, z: fn.pairwise_nt_xent(z, 0.3)
    ),
    "SnippetNTXent": Case(
        lambda: losses.SnippetNTXent(0.3, normalize=False),
        lambda: [unit(0, N, DIM), unit(1, N, DIM)],
        lambda m, a, b: fn.of("audio-sheet-retrieval").nt_xent(a, b, 0.3),
    ),
    "MixedNTXent": Case(
        lambda: losses.MixedNTXent(0.3, normalize=False),
        lambda: [unit(0, N, DIM), unit(1, N, DIM), unit(2, 4, DIM), unit(3, 4, DIM)],
        lambda m, *x: fn.mixed_nt_xent(*x, 0.3),
    ),
    "HardContrastive": Case(
        lambda: losses.HardContrastive(0.3, 0.5),
        lambda: [draw(0, N).tanh(), draw(1, N, 8).tanh()],
        lambda m, p, n: fn.contrastive(p, n, 0.3, 0.5),
    ),
    "SimpleContrastive": Case(
        lambda: losses.SimpleContrastive(0.3, 0.5),
        lambda: [draw(0, N).tanh(), draw(1, N, 8).tanh()],
        lambda m, p, n: fn.simple_contrastive(p, n, 0.3, 0.5),
    ),
    "CACR": Case(
        lambda: losses.CACR(1.5, 0.7, 0.8, 1.3, positive_prior=0.1, normalize=False),
        lambda: [unit(0, 3, N, DIM)],
        lambda m, z: sum(fn.cacr(z, 1.5, 0.7, 0.8, 1.3, True, True, 0.1)),
    ),
    "CACRMomentum": Case(
        lambda: losses.CACRMomentum(0.4, "euclidean", "mean"),
        lambda: [draw(0, 2, N, DIM), draw(1, N, DIM)],
        lambda m, q, k: fn.cacr_momentum(q, k, 0.4, "euclidean", "mean"),
    ),
    "IsoGCLR": Case(lambda: losses.IsoGCLR(10), lambda: [*pair(), INDEX], isogclr_by),
    "IsoGCLR of pairs": Case(lambda: losses.IsoGCLR(10, pairs=True), lambda: [*pair(), INDEX], isogclr_by),
    "NegativeCosine": Case(losses.NegativeCosine, pair, lambda m, p, z: fn.negative_cosine(p, z)),
    "SimSiam": Case(
        losses.SimSiam,
        lambda: [draw(n, N, DIM) for n in range(4)],
        lambda m, a, b, c, d: (fn.negative_cosine(a, d) + fn.negative_cosine(b, c)) / 2,
    ),
    "BYOL": Case(
        losses.BYOL,
        lambda: [draw(n, N, DIM) for n in range(4)],
        lambda m, a, b, c, d: 4 + 2 * (fn.negative_cosine(a, d) + fn.negative_cosine(b, c)),
    ),
    "BarlowTwins": Case(lambda: losses.BarlowTwins(0.01), pair, lambda m, a, b: fn.barlow(a, b, 0.01)),
    "VICReg": Case(lambda: losses.VICReg(2.0, 3.0, 4.0), pair, lambda m, a, b: fn.vicreg(a, b, 2.0, 3.0, 4.0)),
    "SwAV": Case(lambda: losses.SwAV(DIM, 7, 0.2, queue=9), lambda: [draw(0, 2, N, DIM), draw(1, 3, N, DIM)], swav_by),
    "MSN": Case(
        lambda: losses.MSN(DIM, 7, 0.2, 0.5, 0.7, iterations=2),
        lambda: [draw(0, 2, N, DIM), draw(1, N, DIM)],
        lambda m, a, t: fn.msn(a, t, m.prototypes, 0.2, 0.5, 0.7, 2).loss,
    ),
    "DINO": Case(
        lambda: losses.DINO(DIM, 0.2, 0.05, 0.8),
        lambda: [draw(0, 4, N, DIM), draw(1, 2, N, DIM)],
        lambda m, s, t: fn.dino(s, t, m.center.clone(), 0.2, 0.05, 0.8).loss,
    ),
    "CMD": Case(
        lambda: losses.CMD(DIM, 0.2, 0.05, 0.8, pooling="attention", inter_weight=0.7),
        lambda: [
            draw(0, 3, N, DIM),
            [draw(1, 2, N, 4, DIM), draw(2, 1, N, 2, DIM)],
            [draw(3, 2, N, 4, DIM), draw(4, 1, N, 2, DIM)],
            *(draw(5, 2, N, DIM), draw(6, 2, N, 4, DIM), draw(7, 2, N, 4, DIM)),
        ],
        lambda m, s, r, f, t, tr, tf: (
            fn.cmd_loss(
                *(s.flatten(0, 1), torch.cat([x.flatten(0, 2) for x in r]), torch.cat([x.flatten(0, 2) for x in f])),
                *(t.flatten(0, 1), tr.flatten(0, 2), tf.flatten(0, 2)),
                *([4, 2], 3, m.center.clone(), m.center_grid.clone(), 0.2, 0.05),
                pooling="attention",
                inter_weight=0.7,
            ).loss
        ),
    ),
    "MAE": Case(
        lambda: losses.MAE(2),
        lambda: [draw(0, N, 3, 4, 4), draw(1, N, 4, 12), torch.tensor([[1.0, 0, 1, 0]]).expand(N, 4).double()],
        lambda m, i, p, k: fn.reconstruction(i, p, k, 2),
    ),
    "SupCon": Case(
        lambda: losses.SupCon(0.2, 0.1, False, normalize=False),
        lambda: [unit(0, N, 2, DIM), LABELS],
        lambda m, x, y: fn.supcon(x, y, 0.2, 0.1, False),
    ),
    "NextItem": Case(
        losses.NextItem,
        lambda: [draw(0, N, DIM), draw(1, 9, DIM), INDEX.clamp(max=8)],
        lambda m, *a: fn.next_item_loss(*a),
    ),
    "ScoreSpread": Case(lambda: losses.ScoreSpread(0.5), pair, lambda m, a, b: fn.score_spread_regulariser(a, b, 0.5)),
    "LearnedViews": Case(
        lambda: losses.LearnedViews(DIM, 0.5),
        pair,
        lambda m, a, b: fn.mclrec_contrast(a, b, *m.augmenters, 0.5),
    ),
    "SupReMix": Case(
        lambda: losses.SupReMix(0.2, 2.5),
        lambda: [draw(0, N, 2, DIM), LABELS * 1.5, draw(1, 2 * N, 2 * N).sigmoid().detach()],
        lambda m, x, y, a: fn.supremix_loss(F.normalize(x, dim=2), y, 0.2, 2.5, a, separate_max=False),
    ),
    "SupConSingleView": Case(
        lambda: losses.SupConSingleView(0.2),
        lambda: [draw(0, N, DIM), LABELS],
        lambda m, x, y: fn.supcon_single_view(x, y, 0.2),
    ),
    "SLA": Case(
        lambda: losses.SLA(2, 2.0, True),
        lambda: [draw(0, 2 * N, 6), LABELS % 3, draw(1, 2 * N, 3)],
        lambda m, j, y, s: fn.sla_loss(j, y, 2, s, 2.0, True),
    ),
    "Hydra": Case(
        lambda: losses.Hydra(0.2, False, True),
        lambda: [*pair(), LABELS, LABELS.roll(1), draw(3, N, DIM).sigmoid()],
        lambda m, a, b, y, p, g: fn.gated_pair_infonce(a, b, y, p, g, 0.2, False, True),
    ),
    "Triplet": Case(
        lambda: losses.Triplet(0.4), lambda: [draw(0, N, DIM), LABELS], lambda m, x, y: fn.triplet_hard(x, y, 0.4).loss
    ),
    "CLIP": Case(lambda: losses.CLIP(0.2, normalize=False), pair, lambda m, a, b: fn.clip(a, b, m.log_scale)),
    "SigLIP": Case(
        lambda: losses.SigLIP(0.2, -3.0, normalize=False), pair, lambda m, a, b: fn.siglip(a, b, m.log_scale, m.bias)
    ),
    "CWCL": Case(
        lambda: losses.CWCL(0.2, 2.0, normalize=False),
        lambda: [*pair(), draw(2, N, 4)],
        lambda m, a, b, f: fn.cwcl(a, b, f, m.log_scale, sharpness=2.0),
    ),
    "Symile": Case(
        lambda: losses.Symile(0.2, normalize=False),
        lambda: [[*pair(), draw(2, N, DIM)], generator()],
        lambda m, x, _: fn.symile(x, m.log_scale.exp(), "n", generator=generator()),
    ),
    "PairwiseCLIP": Case(
        lambda: losses.PairwiseCLIP(0.2, normalize=False),
        lambda: [[*pair(), draw(2, N, DIM)]],
        lambda m, x: fn.clip_pairwise_loss(x, m.log_scale.exp()),
    ),
    "M3Co": Case(
        lambda: losses.M3Co(0.2, accumulate_targets=True),
        lambda: [*pair(), PERMUTATION, draw(2, N).sigmoid()],
        lambda m, a, b, p, s: fn.m3co_loss(a, b, p, s, 0.2, accumulate_targets=True),
    ),
    "MultiSClip": Case(lambda: losses.MultiSClip(0.2), pair, lambda m, a, b: fn.multisclip_loss(a, b, 0.2)),
    "Uniformity": Case(lambda: losses.Uniformity(3.0), lambda: [draw(0, N, DIM)], lambda m, x: fn.uniformity(x, 3.0)),
    "CAPro": Case(
        lambda: started(losses.CAPro(3, DIM, 9, threshold=0.5, temperature=0.5, momentum=0.9)),
        lambda: [draw(2, N, 3), *pair(), draw(3, N, 4), draw(4, N, 4), LABELS, torch.arange(N) < 1],
        capro_by,
    ),
    "SepCLR": Case(
        lambda: losses.SepCLR(2.0, 3.0, 4.0, 0.7, 1.5),
        lambda: [*pair(), draw(2, N, 3), draw(3, N, 3), torch.arange(N) % 2],
        lambda m, a, b, c, d, t: fn.sepclr_loss(a, b, c, d, t, 2.0, 3.0, 4.0, 0.7, uniform_weight=1.5)["loss"],
    ),
    "CrossUniformity": Case(lambda: losses.CrossUniformity(3.0), pair, lambda m, a, b: fn.cross_uniformity(a, b, 3.0)),
    "ContrastiveGap": Case(
        lambda: losses.ContrastiveGap(0.2, cross_uniformity=0.5),
        pair,
        lambda m, a, b: fn.contrastive_gap_loss(a, b, 0.2, True, True, 0.5).loss,
    ),
    "MILNCE": Case(
        lambda: losses.MILNCE(1.0, normalize=False),
        lambda: [draw(0, N, DIM), draw(1, 2 * N, DIM), LABELS > 0],
        lambda m, v, t, k: fn.mil_nce(v, t, k),
    ),
    "CLIPRocket": Case(
        lambda: losses.CLIPRocket(0.2, 0.3, 0.2, "sum"),
        lambda: [*pair(), [draw(2, N, DIM)], [draw(3, N, DIM)]],
        lambda m, a, b, c, d: fn.cl2l_loss(a, b, c, d, m.log_scale.exp(), m.local_log_scale.exp(), 0.2, "sum"),
    ),
    "BarLIP": Case(
        losses.BarLIP,
        lambda: [*pair(), [draw(2, N, DIM)], [draw(3, N, DIM)]],
        lambda m, *x: fn.barlip_loss(*x),
    ),
    "SiamLIP": Case(losses.SiamLIP, lambda: [draw(n, N, DIM) for n in range(4)], lambda m, *x: fn.siamlip_loss(*x)),
    "SwALIP": Case(
        lambda: losses.SwALIP(0.2),
        lambda: [[draw(0, N, DIM), draw(1, N, DIM)], [draw(2, N, DIM), draw(3, N, DIM)]],
        lambda m, a, b: fn.swalip_loss(a, b, m.log_scale.exp()),
    ),
    "BatchHinge": Case(
        lambda: losses.BatchHinge(0.4, normalize=False), pair, lambda m, a, b: fn.batch_hinge(a, b, 0.4)
    ),
    "ALBEF": Case(
        lambda: losses.ALBEF(DIM, 9, 0.2, 0.3),
        lambda: [draw(n, N, DIM) for n in range(4)],
        lambda m, *x: fn.momentum_contrast_soft(
            *x, m.image_queue.rows.T.clone(), m.text_queue.rows.T.clone(), m.temperature, 0.3
        ),
    ),
    "TokenMimic": Case(
        lambda: losses.TokenMimic(),
        lambda: [draw(0, N, 4, 5), draw(1, N, 4, 5), torch.arange(4 * N).view(N, 4) % 5],
        lambda m, *x: fn.mimic_loss(*x),
    ),
    "MLMDistill": Case(
        lambda: losses.MLMDistill(0.3),
        lambda: [draw(0, N, 2, 4), draw(1, N, 2, 4), torch.arange(2 * N).view(N, 2) % 4],
        lambda m, *x: fn.mlm_distill(*x, 0.3),
    ),
    "MIL": Case(
        lambda: losses.MIL(8),
        lambda: [draw(0, N, 20), torch.full((N,), 20), (LABELS > 0).double()],
        lambda m, x, n, y: F.binary_cross_entropy(fn.topk_mil_pool(x, n, divisor=8), y),
    ),
    "MACILSD": Case(lambda: losses.MACILSD(0.2), bags, lambda m, *x: sum(fn.semi_bag_contrast(*x, 0.2))),
    "MLCD": Case(
        lambda: losses.MLCD(9, DIM, 0.2, 0.1, 0.5),
        lambda: [draw(0, N, DIM), torch.arange(2 * N).view(N, 2) % 9, generator()],
        lambda m, e, y, g: fn.mlcd_loss(e, m.weight, y, 5.0, 0.1, 0.5, generator()),
    ),
    "ClusterMargin": Case(
        lambda: losses.ClusterMargin(9, DIM, 0.2, 0.1, 0.2),
        lambda: [draw(0, N, DIM), LABELS],
        lambda m, e, y: fn.margin_cluster_loss(e, m.weight, y, 5.0, 0.1, 0.2),
    ),
    "TokenKL": Case(
        lambda: losses.TokenKL(2.0),
        lambda: [draw(0, N, 3, DIM), draw(1, N, 3, DIM), draw(2, N, 3) > 0],
        lambda m, *x: fn.masked_token_kl(*x, 2.0),
    ),
    "KD": Case(lambda: losses.KD(3.0), pair, lambda m, s, t: fn.kd(s, t, 3.0)),
    "FitNets": Case(
        lambda: losses.FitNets((DIM,), (4,)),
        lambda: [draw(0, N, DIM), draw(1, N, 4)],
        lambda m, s, t: fn.feature_mse(m.regressor(s), t),
    ),
    "RKD": Case(lambda: losses.RKD(2.0, 3.0), pair, lambda m, s, t: fn.rkd(s, t, 2.0, 3.0).loss),
    "CRD": Case(
        lambda: losses.CRD(DIM, DIM, 10, 4, 3),
        lambda: [*pair(), INDEX, NEGATIVES],
        crd_by,
    ),
    "AttentionTransfer": Case(
        lambda: losses.AttentionTransfer(2.0),
        lambda: [draw(0, N, 3, 4, 4), draw(1, N, 2, 2, 2)],
        lambda m, s, t: fn.attention_transfer(s, t, 2.0),
    ),
    "PatchNCE": Case(
        lambda: losses.PatchNCE(False),
        lambda: [draw(0, N, 4, 3, 2), draw(1, 2, N, 4, 3, 2), draw(2, 3, N, 4, 3, 2)],
        lambda m, *x: fn.patch_nce(*x, False),
    ),
    "FeatureRatio": Case(
        lambda: losses.FeatureRatio("l1", True),
        lambda: [[draw(0, N, 4, 3, 2)], [draw(1, 2, N, 4, 3, 2)], [draw(2, 3, N, 4, 3, 2)]],
        lambda m, *x: fn.feature_ratio(*x, "l1", True).loss,
    ),
    "DualContrast": Case(
        losses.DualContrast, lambda: [draw(0, N, 2), draw(1, N, 2)], lambda m, *x: fn.contrastive_discriminator(*x)
    ),
    "MeanTeacher": Case(lambda: losses.MeanTeacher("kl"), pair, lambda m, s, t: fn.mean_teacher(s, t).kl),
}

CASES |= {
    "AffinityMimicking": Case(
        lambda: losses.AffinityMimicking(0.2, 0.1),
        lambda: [draw(n, N, DIM) for n in range(4)],
        lambda m, u, v, a, b: fn.affinity_mimicking_loss(u, v, 5.0, a, b, 10.0).loss,
    ),
    "VL2V": Case(
        lambda: losses.VL2V(DIM, 4, 0.3),
        lambda: [draw(0, N, DIM), torch.arange(N) % 3, draw(1, N, 4), draw(2, 3, 4)],
        lambda m, f, y, t, c: fn.vl2v_loss(f, y, t, c, m.projector.weight, m.projector.bias, 0.3),
    ),
    "PromptKD": Case(
        lambda: losses.PromptKD(2.0, 10.0),
        lambda: [draw(0, N, 4), draw(1, N, 4)],
        lambda m, s, t: fn.prompt_distillation_loss(s, t, 2.0, 10.0),
    ),
    "PromptTuning": Case(
        lambda: losses.PromptTuning(10.0, 2.0, 3.0),
        lambda: [draw(0, N, DIM), draw(1, 3, DIM), draw(2, N, DIM), draw(3, 3, DIM), torch.arange(N) % 3],
        lambda m, *x: fn.prompt_tuning_loss(*x, 10.0, 2.0, 3.0),
    ),
    "GOPro": Case(
        lambda: losses.GOPro(0.2, 0.3, 2.0),
        lambda: [
            draw(0, N, 3),
            torch.arange(N) % 3,
            *(draw(n, N, 3, 4) for n in (1, 2, 3)),
            draw(4, N, DIM),
            draw(5, N, DIM),
        ],
        lambda m, *x: fn.gopro_loss(*x, 0.2, 0.3, consistency_weight=2.0)[0],
    ),
    "VLMOOD": Case(
        lambda: losses.VLMOOD(0.2, 2, False),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), draw(2, 3, DIM), torch.arange(N) % 3],
        lambda m, s, t, w, y: fn.vlm_ood_distillation_loss(
            s, t, w.detach(), y, temperature=0.2, topk=2, filter_misaligned=False
        )[0],
    ),
    "DynamicScores": Case(
        lambda: losses.DynamicScores(0.3, centre=True),
        lambda: [draw(0, N, 4), draw(1, N, 4)],
        lambda m, s, t: fn.dynamic_distillation_loss(s, t, 1.0, 0.3, centre=True)[0],
    ),
    "PixPro": Case(
        lambda: losses.PixPro(3),
        maps,
        lambda m, *x: fn.pixpro_loss(*x, m.value),
    ),
    "PixelRegression": Case(lambda: losses.PixelRegression(1.0), maps, lambda m, *x: fn.pixel_regression(*x, 1.0)),
    "SoftDice": Case(
        lambda: losses.SoftDice(True),
        lambda: [draw(0, N, 3, 4, 4), (draw(1, N, 4, 4) * 10).long().remainder(3)],
        lambda m, *x: fn.soft_dice_loss(*x, True),
    ),
    "BinaryMask": Case(
        lambda: losses.BinaryMask(0.5, 0.3),
        lambda: [draw(0, N, 4, 4), (draw(1, N, 4, 4) > 0).long()],
        lambda m, *x: fn.binary_mask_loss(*x, 0.5, 0.3),
    ),
    "ReID": Case(
        lambda: losses.ReID(0.7, 0.4),
        lambda: [draw(0, N, 7), draw(1, N, 7).tanh(), torch.arange(7).expand(N, 7) % 3 - 1],
        lambda m, *x: 0.7 * fn.item_losses(*x).contrastive + 0.4 * fn.item_losses(*x).aux,
    ),
    "WeakGuidedContrast": Case(
        lambda: losses.WeakGuidedContrast(0.2),
        lambda: [draw(0, N, 7), torch.arange(N) % 3],
        lambda m, *x: fn.weak_guided_contrast(*x, m.temperature),
    ),
    "WeightedFeature": Case(
        losses.WeightedFeature,
        lambda: [draw(0, N, 3, 4, 4), draw(1, N, 3, 4, 4), draw(2, N, 5), draw(3, N, 5)],
        lambda m, *x: fn.weighted_feature_loss(*x),
    ),
    "PixContrast": Case(lambda: losses.PixContrast(0.5), maps, lambda m, *x: fn.pix_contrast(*x, 0.5)),
    "RelationDistance": Case(
        losses.RelationDistance, lambda: [draw(0, N, 4, 3, 2), draw(1, N, DIM)], lambda m, *x: fn.relation_distance(*x)
    ),
    "ChannelCorrelation": Case(
        losses.ChannelCorrelation,
        lambda: [draw(0, N, 4, 3, 2), draw(1, N, 4, 2, 2)],
        lambda m, *x: fn.channel_correlation(*x),
    ),
    "SemanticDistance": Case(
        lambda: losses.SemanticDistance("classes"),
        lambda: [draw(0, N, DIM), draw(1, N, 3), draw(2, N, 4), draw(3, N, 3), LABELS],
        lambda m, a, b, c, d, y: fn.semantic_distance(
            fn.classifier_gradient(a, b, y), fn.classifier_gradient(c, d, y), "classes"
        ),
    ),
    "InterModal": Case(lambda: losses.InterModal(0.3), pair, lambda m, s, t: fn.inter_modal_loss(s, t, 0.3)),
    "IntraModal": Case(
        lambda: losses.IntraModal(0.3, "mse"),
        lambda: [draw(0, N, 4, DIM), draw(1, 4, 3), draw(2, N, 4) > -0.5],
        lambda m, p, t, y: fn.intra_modal_loss(p, t, y, 0.3, "mse"),
    ),
    "KernelRidge": Case(
        lambda: losses.KernelRidge(1e-3),
        lambda: [draw(0, 4, DIM), draw(1, 4, 3), draw(2, N, DIM), draw(3, N, 3)],
        lambda m, *four: fn.krr_outer_loss(*four, 1e-3),
    ),
}

CASES |= {
    "TokenRelation": Case(
        lambda: losses.TokenRelation(),
        lambda: [[draw(n, N, 2, 4, 3) for n in range(3)], [draw(n + 3, N, 2, 4, 5) for n in range(3)]],
        lambda m, s, t: fn.relation_distillation_loss(s, t),
    ),
    "TokenFeature": Case(
        lambda: losses.TokenFeature(DIM, 4),
        lambda: [draw(0, N, 3, DIM), draw(1, N, 3, 4)],
        lambda m, s, t: fn.feature_distillation_loss(s, t, m.projector),
    ),
}

CASES |= {
    "PairedHinge": Case(
        lambda: losses.PairedHinge(0.7),
        lambda: [draw(0, N, 3, DIM), draw(1, N, DIM)],
        lambda m, *x: fn.paired_hinge_loss(*x, margin=0.7),
    ),
    "SoftSupCon": Case(
        lambda: losses.SoftSupCon(0.3, 0.2),
        lambda: [draw(0, N, 2, DIM), draw(1, N, N).detach().abs()],
        lambda m, *x: fn.soft_supcon(*x, 0.3, 0.2),
    ),
    "TreeContrast": Case(
        lambda: losses.TreeContrast(0.3, 0.2, ("D", "IS")),
        lambda: [draw(0, N, 2, 2, DIM), torch.arange(8 * N).view(N, 2, 4) % 3],
        lambda m, *x: fn.tree_contrast(*x, 0.3, 0.2, ("D", "IS")),
    ),
    "RDrop": Case(losses.RDrop, pair, lambda m, *x: fn.r_drop(*x)),
    "NST": Case(
        lambda: losses.NST("mean"),
        lambda: [draw(0, N, 3, DIM), draw(1, N, 3, 4)],
        lambda m, *x: fn.nst_loss(*x, reduction="mean"),
    ),
    "ModX": Case(
        lambda: losses.ModX(0.5, 2.0),
        lambda: [draw(s, N, DIM) for s in range(4)],
        lambda m, *x: fn.mod_x(*x, m.log_scale, 2.0).loss,
    ),
    "CaptionContrast": Case(
        lambda: losses.CaptionContrast(0.3),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), torch.arange(N) % 3],
        lambda m, *x: fn.interleaved_contrast(*x[:2], m.log_scale.exp(), x[2]),
    ),
    "TemporalNCE": Case(
        lambda: losses.TemporalNCE(0.3, 0.5, 2.0, 0.7, 0.4),
        lambda: [*(draw(s, N, DIM) for s in range(6)), torch.arange(3)[:, None] * 9 + torch.arange(N) % 5],
        lambda m, *x: (
            fn.temporal_nce(
                *(F.normalize(row, dim=1) for row in x[:4]),
                *(0.5, 2.0, m.log_scale.exp()),
                *(F.normalize(row, dim=1) for row in x[4:6]),
                *(0.7, 0.4, x[6]),
            ).loss
        ),
    ),
    "LabelGuided": Case(
        lambda: losses.LabelGuided(0.3),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), LABELS, torch.arange(N) % 4],
        lambda m, *x: fn.label_guided_contrast(*x, 0.3),
    ),
    "SentenceMatch": Case(
        lambda: losses.SentenceMatch(4.0),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), LABELS],
        lambda m, *x: sum(fn.damsm_sentence(*x[:2], 4.0, x[2])),
    ),
    "WordMatch": Case(
        lambda: losses.WordMatch(2.0, 3.0, 4.0),
        lambda: [draw(0, N, DIM, 2, 2), draw(1, N, DIM, 3), torch.arange(N) % 3 + 1, LABELS],
        lambda m, *x: sum(fn.damsm_words(*x[:3], (2.0, 3.0, 4.0), x[3])),
    ),
    "MACL": Case(
        lambda: losses.MACL(0.4),
        lambda: [draw(0, 2, N, DIM), draw(1, 2, N, DIM), draw(2, N, 3), LABELS],
        lambda m, *x: fn.macl(*x[:2], fn.subject_similarity(*x[2:]), 0.4),
    ),
    "CoconutNSPT": Case(
        lambda: losses.CoconutNSPT(0.3, "ntpt", own_positive=False),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), torch.arange(N) % 3, torch.arange(N) % 5 < 3],
        lambda m, *x: fn.coconut_nspt(*x, 0.3, "ntpt", False),
    ),
    "CoconutMM": Case(
        lambda: losses.CoconutMM(0.3),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), torch.arange(N) % 3],
        lambda m, *x: fn.coconut_mm(*x, 0.3),
    ),
    "MulKI": Case(
        lambda: losses.MulKI(5.0, 0.2, 0.7, feature_weight=0.5, label_smoothing=0.1),
        lambda: [draw(0, N, DIM), draw(1, 3, DIM), LABELS, draw(2, 2, N, DIM), draw(3, 2, 3, DIM), draw(4, 3, DIM)],
        lambda m, *x: fn.mulki_loss(*x, 5.0, 0.2, 0.7, 0.5, label_smoothing=0.1).loss,
    ),
    "SoftContrastive": Case(
        lambda: losses.SoftContrastive(3.0, 2.0),
        lambda: [draw(0, N, DIM), draw(1, N, DIM)],
        lambda m, *x: fn.soft_contrastive(*x, m.a, m.b),
    ),
    "PublicContrast": Case(
        lambda: losses.PublicContrast(0.7, 0.4),
        lambda: [draw(0, N, DIM), draw(1, N, DIM), draw(2, 2 * N, DIM), draw(3, 2 * N, DIM), torch.arange(N)],
        lambda m, *x: fn.cream_uni(*x, 0.7, 0.4).loss,
    ),
    "TokenContrast": Case(
        lambda: losses.TokenContrast(0.5),
        lambda: [draw(0, N, 3, DIM), draw(1, N, 3, DIM)],
        lambda m, *x: fn.token_contrastive_loss(*x, 0.5),
    ),
    "TokenCRD": Case(
        lambda: losses.TokenCRD(DIM, 16, 0.3),
        lambda: [draw(0, N, 3, DIM), draw(1, N, 3, DIM)],
        lambda m, *x: fn.token_crd_loss(*x, m.bank.rows, 0.3),
    ),
}

# Functions of the catalogue that give a scalar with a gradient and have no module of their own, and why.
WITHOUT = {
    "customcontrast:cscl": "CLIP of normalised rows",
    "llava-mod:preference_loss": "losses of each pair, of four log-probabilities",
    "llava-mod:top2_routes": "routes of tokens; only its balance is a loss, for the layer that routes",
    "switchgpt:flag_weighted_lm_loss": "torch's cross-entropy of shifted logits, with weights of tokens",
    "comd:score_gap": "a difference of scores, no loss",
    "stic:regularized_dpo": "a loss of each pair, of four logits and labels",
    "stic:runner_up_log_probability": "log-probabilities of rows, no loss",
    "stic:preference_margin": "a difference of each pair, no loss",
    "stic:dpo_loss": "softplus of a margin",
    "lol:fused_scores": "scores of tokens, no loss",
    "lol:contrastive_answer_score": "a score of an answer, no loss",
    "mend:context_distillation_losses": "two losses, of two sets of logits and five masks",
    "mend:candidate_scores": "scores of answers, no loss",
    "ritual:combine_logits": "scores of tokens, no loss",
    "ritual:diffusion_noise": "pixels, no loss",
    "ritual:masked_lm_loss": "torch's cross-entropy of shifted logits",
    "ritual:answer_log_probability": "log-probabilities of rows, no loss",
    "teminal:single_dual_nce": "twice CLIP; only masks rows of the same meaning",
    "clhe:modality_fusion": "vectors of items, no loss",
    "clhe:set_attention_pool": "vectors of sets, no loss",
    "clhe:one_way_infonce": "InfoNCE without a bank",
    "clhe:multinomial_nll": "cross-entropy of weighted classes; torch has it with soft targets",
    "mulki:relational_distillation": "one divergence for each row, a term of MulKI",
    "mulki:prototype_alignment": "a term of MulKI",
    "creamfl:cream_multi": "PublicContrast of both modalities: the mean of both intra terms, the sum of both inter terms",
    "creamfl:class_margin_loss": "a party's own loss, with its classifier",
    "sepclr:align": "alignment, a term of SepCLR",
    "sepclr:uniform": "uniformity of rows of any length, a term of SepCLR",
    "sepclr:joint_entropy": "a term of SepCLR",
    "sepclr:sup_align": "of one dimension of a space, for a loss of one's own",
    "sepclr:discrete_sup_align": "of one dimension of a space, for a loss of one's own",
    "vidlankd:ntxent_pair": "NTXent divided by the number of rows; TokenContrast takes it at each position",
    "diswot:classifier_gradient": "a gradient, no loss",
    "diswot:diswot_score": "a score, no loss; RelationDistance and SemanticDistance are its parts",
    "kd3:mix_distribution": "makes pictures, of which another loss is taken",
    "dcd:mined_distillation_loss": "selects, then DynamicScores",
    "vl2v-adip:vl2v_rows": "rows of VL2V",
    "vl2v-adip:class_prototypes": "rows, no loss",
    "vl2v-adip:cosine_text_logits": "logits, no loss",
    "gopro:simclr_loss": "a term of GOPro; NTXent with another temperature",
    "gopro:shifted_context": "vectors, no loss",
    "gopro:build_prompts": "vectors, no loss",
    "vlm-ood-distill:vision_language_alignment": "a term of VLMOOD",
    "vlm-ood-distill:feature_contrast": "a term of VLMOOD; CLIP of unit rows, or one way",
    "vlm-ood-distill:caption_contrast": "an optional term of vlm_ood_distillation_loss",
    "hybrid-distill:token_relations": "relations, no loss",
    "hybrid-distill:attention_distance": "figures, no loss",
    "hybrid-distill:attention_nmi": "figures, no loss",
    "any2seg:modality_agnostic_fusion": "maps, no loss",
    "global-local-seg:partition_contrastive_loss": "its rows are runs of a whole batch, which the learner gathers",
    "global-local-seg:local_region_contrastive_loss": "its maps are pairs of a whole batch, which the learner gathers",
    "pcl-sr:haar_high_frequency": "bands, no loss",
    "ctvis:similarity_guided_memory": "memories, no loss",
    "wscol:proposal_distillation": "KD with temperature=1, of one process",
    "bss:transfer_style": "makes images",
    "pixpro:pixel_propagation": "maps, no loss",
    "finetune:cross_entropy": "torch.nn.CrossEntropyLoss with ignore_index=-1, divided by the number of all items",
    "finetune-seg:pixel_cross_entropy": "torch.nn.CrossEntropyLoss with ignore_index=255, averaged per picture",
    "sla:aggregate": "logits of a vote, no loss",
    "sla:identity_logits": "logits, no loss",
    "cacr:expected_distance": "CACR's repulsion; CACR has it",
    "cwcl:cwcl_terms": "the two terms of CWCL",
    "improved-vlp-baselines:barlow_cross": "the term of one pair of BarLIP, which is BarLIP without strong views",
    "improved-vlp-baselines:byol_cross": "the term of one pair of SiamLIP",
    "improved-vlp-baselines:cl2l_terms": "the four terms of CLIPRocket",
    "symile:symile_per_anchor": "the terms of Symile",
    "rkd:rkd_distance": "RKD with angle_weight=0",
    "rkd:rkd_angle": "RKD with distance_weight=0",
    "crd:crd": "CRD keeps banks and writes in place, as the system: CRDLoss",
    "mae:mae": "masking and MAE's loss in one call; the system calls reconstruction, as MAE does",
    "cmd:esvit_loss": 'CMD with inter="none" or "literal"',
    "obow:obow_loss": "its head is a network, generated from a vocabulary that the teacher writes between steps: the learner",
    "mochi:mochi_logits": "logits; MoCHi's loss of them is made block by block, as the system does",
    "hallucinator:extrapolate_positive": "makes rows, of which another loss is taken",
    "audio-sheet-retrieval:canonical_projections": "a layer, CCALayer",
    "hard-contrastive:penalty_distribution": "shares of the negatives, no loss",
    "gradient-harmonization:gradient_cosine": "of gradients, no loss",
    "gradient-harmonization:realign": "of gradients, no loss",
    "gradient-harmonization:realigned": "of gradients, no loss",
    "cwcl:weighted_mean": "rows, no loss",
    "symile:mip_similarity": "scores",
    "symile:zeroshot_symile": "scores",
    "symile:zeroshot_clip": "scores",
    "mcl:integrated": "embeddings of several stages side by side",
    "m3col:mix": "mixes rows, no loss",
}


def prepared(case: Case) -> tuple[Loss, list[Any], list[Tensor]]:
    """Return the module in float64, its arguments, and those with a gradient."""
    torch.manual_seed(0)
    module = case.make().double()
    for key, value in module.state_dict().items():
        if key.endswith(".rows") or key == "prototypes.weight":  # unit rows in float64 too
            value.copy_(F.normalize(value, dim=1))
    through: list[Tensor] = []

    def wanted(x: Any) -> Any:
        if isinstance(x, list):
            return [wanted(part) for part in x]
        if isinstance(x, Tensor) and x.is_floating_point():
            through.append(x := x.clone().requires_grad_())
        return x

    return module, [wanted(x) for x in case.arguments()], through


def slopes(loss: Tensor, through: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(through, torch.autograd.grad(loss, through, allow_unused=True), strict=True)
    ]


def test_every_loss_has_a_case():
    assert {name.partition(" ")[0] for name in CASES} == set(dir(losses))


def test_every_function_of_the_catalogue_that_is_a_loss_has_a_module_or_a_reason():
    from function_cases import CASES as FUNCTIONS

    called = {function_of(getattr(losses, name).calls) for name in dir(losses)}
    missing = set()
    for slug, entry in catalog.entries().items():
        for place in entry.functions:
            name = place.partition(":")[2]
            case = FUNCTIONS.get(place)
            # A list of tensors counts as an argument with a gradient.
            lists = case is not None and any(isinstance(x, list) for x in case.make(8, draw))
            differentiable = case is not None and (case.through or lists)
            if differentiable and function_of(f"{slug}:{name}") not in called:
                missing.add(f"{slug}:{name}")
    assert missing == set(WITHOUT)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_those_of_the_function(name):
    case = CASES[name]
    module, arguments, through = prepared(case)
    through += list(module.parameters())
    wanted = case.by(module, *arguments)
    expected = slopes(wanted, through)
    found = module(*arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert found.ndim == 0
    for ours, theirs in zip(slopes(found, through), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_state_moves_in_training_mode_alone_and_is_restored(name):
    case = CASES[name]
    module, arguments, _ = prepared(case)
    with torch.no_grad():
        module.eval()
        before = copy.deepcopy(module.state_dict())
        module(*arguments)
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key
        module.train()
        module(*arguments)
        after = copy.deepcopy(module.state_dict())
    memory = ("queue", "queues", "memory", "bank", "center", "states", "written")
    stateful = any(key.partition(".")[0].endswith(memory) for key in before)
    assert stateful == any(not torch.equal(value, before[key]) for key, value in after.items())
    again = prepared(case)[0]
    again.load_state_dict(after)
    arguments = prepared(case)[1]  # a fresh generator
    torch.testing.assert_close(again(*arguments), module(*prepared(case)[1]), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_two_forward_passes_before_one_backward_pass(name):
    module, arguments, through = prepared(CASES[name])
    total = module(*arguments) + module(*prepared(CASES[name])[1])
    assert all(bool(g.isfinite().all()) for g in slopes(total, [*through, *module.parameters()]))


@pytest.mark.parametrize("name", sorted(dir(losses)))
def test_docstring_has_inputs_relations_source_and_example(name):
    doc = getattr(losses, name).__doc__
    for part in ("Inputs:", "| argument | shape | holds |", "Relations:", "Source:", ">>>", "group: Processes"):
        assert part in doc, part
    arguments = {
        word.strip()
        for line in doc.splitlines()
        if line.strip().startswith("| ") and "---" not in line and "argument" not in line
        for word in line.split("|")[1].split(",")
    }
    assert arguments == set(list(inspect.signature(getattr(losses, name).forward).parameters)[1:])


@pytest.mark.parametrize("name", sorted(dir(losses)))
def test_constructor_arguments_are_documented(name):
    kind = getattr(losses, name)
    listed = kind.__doc__.partition("Args:")[2].partition("Inputs:")[0]
    for parameter in list(inspect.signature(kind.__init__).parameters)[1:]:
        assert parameter in listed.replace(",", " ").replace(":", " ").split(), parameter


@pytest.mark.parametrize("name", [name for name in CASES if " " not in name])
def test_repr_names_the_settings(name):
    module = CASES[name].make()
    text = repr(module)
    assert text.startswith(f"{name}(")
    for parameter in list(inspect.signature(type(module).__init__).parameters)[1:]:
        if parameter not in ("group", "seed", "labels", "prototypes", "bias"):
            assert f"{parameter}=" in text, parameter


def test_repr_shows_a_learnt_temperature_as_it_stands():
    loss = losses.CLIP(temperature=0.5)
    assert "temperature=0.5" in repr(loss)
    loss.log_scale.data.fill_(-torch.tensor(0.25).log().item())
    assert "temperature=0.25" in repr(loss)
    assert "bias=-10" in repr(losses.SigLIP())
    assert "group" not in repr(loss)
    assert "group='world'" in repr(losses.CLIP(group="world"))


def test_a_learnt_temperature_stays_within_its_bounds():
    loss = losses.CLIP(temperature=0.02)
    loss.log_scale.data.fill_(10.0)
    loss.eval()(*pair())
    assert loss.log_scale.item() == 10
    loss.train()(*pair())
    assert loss.temperature == pytest.approx(0.01)
    with pytest.raises(ValueError, match="temperature must lie in"):
        losses.CLIP(temperature=2.0)
    with pytest.raises(ValueError, match="temperature"):
        losses.Symile(temperature=0.0)
    albef = losses.ALBEF(DIM, 9)
    albef.temperature.data.fill_(2.0)
    albef(*[draw(n, N, DIM).float() for n in range(4)])
    assert albef.temperature.item() == 0.5


def test_what_is_not_learnt_is_a_buffer():
    for loss in (losses.CLIP(learnable=False), losses.SigLIP(learnable=False), losses.ALBEF(4, 8, learnable=False)):
        assert not list(loss.parameters())
    assert set(losses.SigLIP(learnable=False).state_dict()) == set(losses.SigLIP().state_dict())


def test_rows_are_normalised_unless_told_otherwise():
    a, b = pair()
    unit_rows = F.normalize(a), F.normalize(b)
    for make in (losses.CLIP, losses.SigLIP, losses.BatchHinge, losses.SnippetNTXent, losses.MILNCE):
        torch.testing.assert_close(make()(a, b), make(normalize=False)(*unit_rows), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(make()(a, b), make(normalize=False)(a, b))


def test_swav_uses_its_queue_once_it_is_full():
    torch.manual_seed(0)
    loss = losses.SwAV(DIM, 7, queue=2 * N).double()
    crops = [draw(n, 2, N, DIM) for n in range(3)]
    for step, high in enumerate(crops):
        scores = loss.prototypes(F.normalize(high, dim=2))
        stored = torch.stack([loss.prototypes(queue.rows) for queue in loss.queues]) if step == 2 else None
        torch.testing.assert_close(loss(high), fn.swav(scores, queue=stored).loss)
    assert int(loss.written) == 2 * N


def test_prototypes_are_unit_before_every_step():
    loss = losses.SwAV(DIM, 7)
    with torch.no_grad():
        loss.prototypes.weight.mul_(3)
    loss(draw(0, 2, N, DIM).float())
    torch.testing.assert_close(loss.prototypes.weight.norm(dim=1), torch.ones(7))


def test_modules_move_with_to():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = losses.DINO(outcomes=4)

    net = Net().to(torch.float64)
    assert net.loss.center.dtype == torch.float64
    assert net.to("meta").loss.center.is_meta


def test_unknown_losses_are_named_with_near_matches():
    with pytest.raises(AttributeError, match=r"unknown loss 'NTXnt'; did you mean NTXent"):
        losses.NTXnt  # noqa: B018
    with pytest.raises(AttributeError, match=r"unknown loss 'ClipLoss'; did you mean CLIP"):
        losses.ClipLoss  # noqa: B018
    assert "CLIP" in dir(losses)


@pytest.mark.parametrize(
    ("margin", "said"), [(-1.0, "must be positive, got -1.0"), ("soft", "must be a number, got 'soft'")]
)
def test_a_margin_of_triplets_that_makes_no_sense_is_refused(margin, said):
    with pytest.raises(ValueError, match=f"margin {said}"):
        losses.Triplet(margin=margin)


def test_a_system_is_imported_when_its_loss_is_first_made():
    code = (
        "import sys; from counterpoint import losses; made = lambda: [m for m in sys.modules if '.systems.' in m]; "
        "dir(losses); losses.CLIP; losses.MoCo; assert not made(), made(); losses.KD(); "
        "assert not any('classics' in m for m in made()), made(); losses.RKD(); "
        "assert 'counterpoint.systems.classics.rkd' in made(); assert 'counterpoint.systems.classics.moco' not in made()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bags_shorter_than_another_process_s_are_padded(monkeypatch):
    loss, inputs = losses.MACILSD(0.2), bags()
    found = loss(*inputs)
    monkeypatch.setattr("counterpoint.losses.bags.global_max", lambda length, device: length + 7)
    torch.testing.assert_close(loss(*inputs), found)
