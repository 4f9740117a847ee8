"""Valid arguments for every public function: the table that `test_functional.py` goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.core.regions import grid_regions

DIM = 6


@dataclass(frozen=True)
class Case:
    """A call of a public function.

    Args:
        make: maps rows and `draw` to positional arguments; draw(seed, *shape) returns float64 Gaussian numbers.
        through: numbers of the arguments with a gradient.
        batch: the axis of the batch for each argument, None without one; for a list of tensors, that of each.
        most: the largest batch to test, for reasons of time.
        kernel: whether it uses blockwise similarities, and is therefore also tested on 2,100 rows.
        memory: numbers of the arguments that keep their type.
    """

    make: Callable[[int, Callable[..., Tensor]], list[Any]]
    through: tuple[int, ...]
    batch: tuple[int | None, ...]
    most: int = 300
    kernel: bool = False
    memory: tuple[int, ...] = ()
    permutes: bool = True
    kwargs: tuple[tuple[str, Any], ...] = ()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def pair(n: int, draw: Callable[..., Tensor], seed: int = 0) -> list[Tensor]:
    a = draw(seed, n, DIM)
    return [a, a + 0.7 * draw(seed + 1, n, DIM)]


def unit_pair(n: int, draw: Callable[..., Tensor], seed: int = 0) -> list[Tensor]:
    return [unit(x) for x in pair(n, draw, seed)]


def answered(n: int) -> Tensor:
    """Return labels of 4 tokens, of which two or three are an answer."""
    found = torch.arange(4 * n).view(n, 4) % 5
    found[:, 0] = -100
    found[::2, 3] = -100
    return found


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def listed(n: int, keys: int, many: int) -> Tensor:
    index = torch.arange(n) % keys
    others = torch.randint(keys, (n, many), generator=torch.Generator().manual_seed(3))
    return torch.cat([index[:, None], others], 1)


def bags(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    time = 20
    bag = torch.where(torch.arange(n) % 2 == 0, 0.9, 0.1).double()
    return [
        bag,
        draw(0, n, time).sigmoid(),
        draw(1, n, time).sigmoid(),
        torch.full((n,), time),
        draw(2, n, time, DIM),
        draw(3, n, time, DIM),
    ]


def cell_maps(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    """Return maps of two crops, keys, and coordinates of crops that overlap, for PixPro."""
    low = draw(9, n, 2).sigmoid() / 4
    coords = [torch.cat([low, low + 0.6], 1), torch.cat([0.3 - low, 0.9 - low], 1)]
    return [*(draw(k, n, 3, 4, 3) for k in range(4)), *coords]


def word_weights(words: Tensor) -> Tensor:
    """Map words of 4 numbers to unit weights of DIM numbers, for OBoW."""
    return unit(torch.cat([words, words[:, :2] * words[:, 2:]], 1).tanh())


def iso_state(n: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: torch.full((n,), 0.1 if name.startswith("tau") else 0.0) for name in names}


def iso(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    return [iso_state(n, ("s", "u", "tau")), torch.arange(n), unit(draw(0, n, 2, DIM))]


def mochi(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    index = listed(n, 9, 5)
    share = draw(4, n, 3).sigmoid()
    return [*pair(n, draw), unit(draw(2, 9, DIM)), index[:, :3], index[:, 1:4], share, index[:, 3:], share / 2]


def crd(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    index = listed(n, 4 * n, 5)
    return [*unit_pair(n, draw), unit(draw(2, 4 * n, DIM)), unit(draw(3, 4 * n, DIM)), index[:, 0], index]


def m3co(n: int, draw: Callable[..., Tensor]) -> list[Any]:
    return [*pair(n, draw), torch.arange(n).roll(1), draw(3, n).sigmoid()]


def hydra_weights(draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    shapes = {"bn1_weight": (4,), "bn1_bias": (4,), "fc1_weight": (5, 4), "fc1_bias": (5,), "bn2_weight": (5,),
              "bn2_bias": (5,), "fc2_weight": (DIM, 5), "fc2_bias": (DIM,), "label_embedding": (3, 4)}  # fmt: skip
    return {name: draw(number, *shape) for number, (name, shape) in enumerate(shapes.items())}


def views(n: int, draw: Callable[..., Tensor], many: int = 2, seed: int = 0) -> list[Tensor]:
    a = draw(seed, n, DIM)
    return [a + 0.5 * draw(seed + 1 + number, n, DIM) for number in range(many)]


CORE, SYSTEMS = "counterpoint.core.", "counterpoint.systems."
ALIGN, IMAGES, CLASSICS = (SYSTEMS + area + "." for area in ("alignment", "images", "classics"))
DISTILLATION = SYSTEMS + "distillation."
LANGUAGE = "counterpoint.systems.language."
DENSE = "counterpoint.systems.dense."
DISWOT = "counterpoint.systems.distillation.diswot:"
VLP, AUDIO, HARD = ALIGN + "improved_vlp_baselines:", ALIGN + "audio_sheet_retrieval:", IMAGES + "hard_contrastive:"


def cmd_rows(n: int, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Make outputs and features of three crops of n pictures, and of the teacher's two."""
    student = [draw(0, 3 * n, 5), draw(1, 7 * n, 5), draw(2, 7 * n, 4)]
    return [*student, draw(3, 2 * n, 5), draw(4, 6 * n, 5), draw(5, 6 * n, 4)]


CREAM = "counterpoint.systems.federated.creamfl:"

CASES: dict[str, Case] = {
    CORE + "alignment:negative_cosine": Case(pair, (0,), (0, 0)),
    CORE + "assignment:sinkhorn": Case(lambda n, d: [d(0, n, 5)], (), (0,)),
    CORE + "assignment:sinkhorn_bias": Case(
        lambda n, d: [unit(x) for x in (d(0, n, DIM), d(1, n, DIM))], (), (0, None)
    ),
    CORE + "cca:canonical_projections": Case(
        lambda n, d: [x[:, :3] for x in pair(n, d)], (0, 1), (0, 0), memory=(0, 1)
    ),
    CORE + "contrast:info_nce": Case(
        lambda n, d: [*pair(n, d), d(2, n, DIM)], (0, 1, 2), (0, 0, None), kernel=True, kwargs=(("temperature", 0.05),)
    ),
    CLASSICS + "attention_transfer:attention_transfer": Case(
        lambda n, d: [d(0, n, 3, 4, 4), d(1, n, 2, 2, 2)], (0,), (0, 0), most=70
    ),
    CORE + "grams:relation_distance": Case(lambda n, d: [d(0, n, 3, 2, 2), d(1, n, DIM)], (1,), (0, 0)),
    DISWOT + "channel_correlation": Case(lambda n, d: [d(0, n, 3, 2, 2), d(1, n, 3, 4, 2)], (0,), (0, 0)),
    # The rows of a gradient are classes.
    DISWOT + "semantic_distance": Case(pair, (1,), (0, 0)),
    DISWOT + "classifier_gradient": Case(
        lambda n, d: [d(0, n, DIM), d(1, n, 3), labels(n)], (0, 1), (0, 0, 0), permutes=False
    ),
    DISWOT + "diswot_score": Case(
        lambda n, d: [d(0, n, 3, 2, 2), d(1, n, DIM), d(2, 5, 4), d(3, 5, 4)], (1, 3), (0, 0, None, None)
    ),
    CLASSICS + "crd:crd": Case(crd, (0, 1), (0, 0, None, None, 0, 0), memory=(2, 3)),
    CLASSICS + "fitnets:feature_mse": Case(pair, (0,), (0, 0)),
    CORE + "distil:kd": Case(pair, (0,), (0, 0)),
    CLASSICS + "mean_teacher:mean_teacher": Case(pair, (0,), (0, 0)),
    CLASSICS + "rkd:rkd": Case(pair, (0,), (0, 0), most=70),
    CLASSICS + "rkd:rkd_angle": Case(pair, (0,), (0, 0), most=70),
    CLASSICS + "rkd:rkd_distance": Case(pair, (0,), (0, 0)),
    CORE + "gap:cross_uniformity": Case(pair, (0, 1), (0, 0), kernel=True),
    CORE + "gap:uniformity": Case(lambda n, d: [d(0, n, DIM)], (0,), (0,), kernel=True),
    CORE + "mil:topk_mil_pool": Case(lambda n, d: [d(0, n, 20), torch.full((n,), 20)], (0,), (0, 0), permutes=False),
    CORE + "mixing:mix": Case(
        lambda n, d: [d(0, n, DIM), torch.arange(n).roll(1), d(1, n).sigmoid()],
        (0,),
        (0, 0, 0),
        permutes=False,
        memory=(2,),
    ),
    CORE + "mixing:mixed_targets": Case(
        lambda n, d: [torch.arange(n).roll(1), d(1, n).sigmoid()], (), (0, 0), permutes=False
    ),
    ALIGN + "albef:hard_negative_weights": Case(
        lambda n, d: [*pair(n, d), *pair(n, d, 2), 0.2], (), (0, 0, 0, 0, None), permutes=False
    ),
    ALIGN + "albef:mlm_distill": Case(
        lambda n, d: [d(0, n, 4, 9), d(1, n, 4, 9), torch.arange(n * 4).view(n, 4) % 9, 0.4], (0,), (0, 0, 0, None)
    ),
    ALIGN + "albef:momentum_contrast_soft": Case(
        lambda n, d: [*pair(n, d), *pair(n, d, 2), unit(d(4, 50, DIM)).T, unit(d(5, 50, DIM)).T, 0.07, 0.4],
        (0, 1),
        (0, 0, 0, 0, None, None, None, None),
        kernel=True,
        memory=(4, 5),
    ),
    AUDIO + "batch_hinge": Case(unit_pair, (0, 1), (0, 0), kernel=True),
    AUDIO + "mixed_nt_xent": Case(
        lambda n, d: [*unit_pair(n, d), *unit_pair(n, d, 2), 0.1], (0, 1, 2, 3), (0, 0, 0, 0, None), kernel=True
    ),
    AUDIO + "nt_xent": Case(lambda n, d: [*unit_pair(n, d), 0.05], (0, 1), (0, 0, None), kernel=True),
    ALIGN + "contrastive_gap:contrastive_gap_loss": Case(
        lambda n, d: [*pair(n, d), 0.05, True, True, True], (0, 1), (0, 0, None, None, None, None), kernel=True
    ),
    ALIGN + "cwcl:cwcl": Case(
        lambda n, d: [*unit_pair(n, d), d(2, n, 4), 2.5], (0, 1), (0, 0, 0, None), kernel=True, memory=(2,)
    ),
    ALIGN + "cwcl:cwcl_terms": Case(
        lambda n, d: [*unit_pair(n, d), d(2, n, 4), 2.5], (0, 1), (0, 0, 0, None), memory=(2,)
    ),
    ALIGN + "cwcl:weighted_mean": Case(
        lambda n, d: [d(0, n, DIM), d(1, n, 4)], (0,), (0, 0), permutes=False, memory=(1,)
    ),
    CORE + "gradients:gradient_cosine": Case(pair, (0, 1), (0, 0), permutes=False),
    CORE + "mil:mil_nce": Case(lambda n, d: [5 * x for x in unit_pair(n, d)], (0, 1), (0, 0), kernel=True),
    CORE + "gradients:realign": Case(
        lambda n, d: [d(0, n, DIM), -d(0, n, DIM) + d(1, n, DIM)], (0, 1), (0, 0), permutes=False
    ),
    CORE + "gradients:realigned": Case(
        lambda n, d: [d(0, n, DIM), -d(0, n, DIM) + d(1, n, DIM)], (0, 1), (0, 0), permutes=False
    ),
    VLP + "barlip_loss": Case(pair, (0, 1), (0, 0)),
    CORE + "alignment:barlow_cross": Case(pair, (0, 1), (0, 0)),
    CORE + "alignment:byol_cross": Case(pair, (0,), (0, 0)),
    VLP + "cl2l_loss": Case(
        lambda n, d: [*pair(n, d), views(n, d, 2, 3), views(n, d, 2, 6), 20.0], (0, 1), (0, 0, 0, 0, None), kernel=True
    ),
    VLP + "cl2l_terms": Case(
        lambda n, d: [*pair(n, d), views(n, d, 2, 3), views(n, d, 2, 6), 20.0], (0, 1), (0, 0, 0, 0, None)
    ),
    VLP + "siamlip_loss": Case(lambda n, d: [*pair(n, d), *pair(n, d, 2)], (0, 1), (0, 0, 0, 0)),
    VLP + "swalip_loss": Case(lambda n, d: [views(n, d), views(n, d, 2, 5), 10.0], (), (0, 0, None)),
    ALIGN + "m3col:m3co_loss": Case(m3co, (0, 1), (0, 0, 0, 0), kernel=True, permutes=False),
    ALIGN + "m3col:multisclip_loss": Case(pair, (0, 1), (0, 0), kernel=True),
    ALIGN + "macil_sd:semi_bag_contrast": Case(bags, (4, 5), (0, 0, 0, 0, 0, 0)),
    ALIGN + "symile:clip_pairwise_loss": Case(lambda n, d: [unit_pair(n, d), 10.0], (), (0, None), kernel=True),
    ALIGN + "symile:mip_similarity": Case(lambda n, d: [d(0, 5, DIM), pair(n, d, 1)], (0,), (None, 0), permutes=False),
    ALIGN + "symile:symile": Case(
        lambda n, d: [[*unit_pair(n, d), unit(d(2, n, DIM))], 10.0, "n_squared"], (), (0, None, None), most=70
    ),
    ALIGN + "symile:symile_per_anchor": Case(
        lambda n, d: [[*unit_pair(n, d), unit(d(2, n, DIM))], 10.0, "n_squared"], (), (0, None, None), most=8
    ),
    ALIGN + "symile:zeroshot_clip": Case(lambda n, d: [d(0, 5, DIM), pair(n, d, 1)], (0,), (None, 0), permutes=False),
    ALIGN + "symile:zeroshot_symile": Case(lambda n, d: [d(0, 5, DIM), pair(n, d, 1)], (0,), (None, 0), permutes=False),
    CLASSICS + "barlow_twins:barlow": Case(pair, (0, 1), (0, 0)),
    CLASSICS + "clip:clip": Case(
        lambda n, d: [*unit_pair(n, d), torch.tensor(4.6).double()], (0, 1, 2), (0, 0, None), kernel=True
    ),
    CLASSICS + "dino:dino": Case(lambda n, d: [d(0, 4, n, 5), d(1, 2, n, 5), d(2, 5)], (0,), (1, 1, None), memory=(2,)),
    CLASSICS + "mae:mae": Case(
        lambda n, d: [d(0, n, 2, 4, 4), d(1, n, 4, DIM), d(2, n, 4), d(3, n, 4, 8), 2],
        (3,),
        (0, 0, 0, 0, None),
        memory=(1, 2),
    ),
    CLASSICS + "mae:reconstruction": Case(
        lambda n, d: [d(0, n, 2, 4, 4), d(1, n, 4, 8), torch.tensor([[1.0, 0, 1, 0]]).double().expand(n, 4), 2],
        (1,),
        (0, 0, 0, None),
    ),
    CLASSICS + "moco:moco": Case(
        lambda n, d: [*pair(n, d), unit(d(3, 50, DIM)), 0.05],
        (0,),
        (0, 0, None, None),
        kernel=True,
        memory=(2,),
        permutes=False,
    ),
    CLASSICS + "siglip:siglip": Case(
        lambda n, d: [*unit_pair(n, d), torch.tensor(2.3).double(), torch.tensor(-10.0).double()],
        (0, 1, 2, 3),
        (0, 0, None, None),
        kernel=True,
    ),
    "counterpoint.core.nt_xent:nt_xent": Case(lambda n, d: [*pair(n, d), 0.05], (0, 1), (0, 0, None), kernel=True),
    CLASSICS + "supcon:supcon": Case(lambda n, d: [unit(d(0, n, 2, DIM)), labels(n)], (0,), (0, 0), kernel=True),
    CLASSICS + "supcon:supcon_single_view": Case(lambda n, d: [d(0, n, DIM), labels(n)], (0,), (0, 0), kernel=True),
    CLASSICS + "swav:swav": Case(lambda n, d: [d(0, 2, n, 5), d(1, 2, n, 5)], (0, 1), (1, 1)),
    CLASSICS + "msn:msn": Case(
        lambda n, d: [d(0, 2, n, DIM), d(1, n, DIM), d(2, 5, DIM)], (0, 2), (1, 0, None), kwargs=(("iterations", 2),)
    ),
    CLASSICS + "triplet:triplet_hard": Case(lambda n, d: [d(0, n, DIM), labels(n)], (0,), (0, 0), permutes=False),
    CLASSICS + "vicreg:vicreg": Case(pair, (0, 1), (0, 0)),
    IMAGES + "adainf:ntxent_by_index": Case(
        lambda n, d: [d(0, n, DIM), torch.arange(n) % max(1, n // 3), 0.05], (0,), (0, 0, None), kernel=True
    ),
    IMAGES + "cacr:cacr": Case(lambda n, d: [[unit(x) for x in views(n, d, 3)]], (), (0,), kernel=True),
    IMAGES + "cacr:cacr_momentum": Case(
        lambda n, d: [d(0, 2, n, DIM), d(1, n, DIM), 0.1], (0,), (1, 0, None), kernel=True
    ),
    CORE + "expected:expected_distance": Case(
        lambda n, d: [d(0, n, DIM), d(1, 2, n, DIM), 0.9], (0, 1), (0, 1, None), kernel=True
    ),
    IMAGES + "cacr:pairwise_nt_xent": Case(lambda n, d: [d(0, 2, n, DIM), 0.05], (0,), (1, None), kernel=True),
    IMAGES + "dcl:dcl": Case(lambda n, d: [*pair(n, d), 0.05, 0.5], (0, 1), (0, 0, None, None), kernel=True),
    IMAGES + "dcl:dclw_weight": Case(lambda n, d: [d(0, n).tanh(), 0.5], (), (0, None), permutes=False),
    IMAGES + "bss:transfer_style": Case(
        lambda n, d: [d(0, n, 3, 6, 6).sigmoid(), torch.arange(n).roll(1), torch.arange(n) % 3 - 1],
        (0,),
        (0, 0, 0),
        permutes=False,
    ),
    IMAGES + "bss:column_infonce": Case(lambda n, d: [torch.stack(pair(n, d), 1), 0.3], (0,), (0,), kernel=True),
    IMAGES + "hallucinator:extrapolate_positive": Case(
        lambda n, d: [*pair(n, d), 0.7], (0, 1), (0, 0, None), permutes=False
    ),
    HARD + "contrastive": Case(
        lambda n, d: [d(0, n).tanh(), d(1, n, 40).tanh(), 0.05, 0.3], (0, 1), (0, 0, None, None)
    ),
    HARD + "penalty_distribution": Case(lambda n, d: [d(1, n, 40).tanh(), 0.05], (0,), (0, None), permutes=False),
    HARD + "simple_contrastive": Case(lambda n, d: [d(0, n).tanh(), d(1, n, 40).tanh()], (0, 1), (0, 0)),
    IMAGES + "isogclr:isogclr_step": Case(iso, (2,), (None, 0, 0), permutes=False),
    IMAGES + "hydra:gated_pair_infonce": Case(
        lambda n, d: [*pair(n, d), labels(n), (labels(n) + 1) % 3, d(3, n, DIM).sigmoid(), 0.2],
        (0, 1, 4),
        (0, 0, 0, 0, 0, None),
    ),
    IMAGES + "hydra:pair_gate": Case(
        lambda n, d: [labels(n), (labels(n) + 1) % 3, hydra_weights(d)], (), (0, 0, None), permutes=False
    ),
    # With one transformation; test_sla.py has more.
    IMAGES + "sla:aggregate": Case(lambda n, d: [d(0, n, 6), 1], (0,), (0, None), permutes=False),
    IMAGES + "sla:identity_logits": Case(lambda n, d: [d(0, n, 6), 1], (0,), (0, None), permutes=False),
    IMAGES + "sla:sla_loss": Case(
        lambda n, d: [d(0, n, 6), labels(n), 1, d(1, n, 6), 2.0], (0, 3), (0, 0, None, 0, None)
    ),
    CORE + "noisy_labels:dynamic_selection": Case(
        lambda n, d: [3 * d(0, n, 5), 3 * d(1, n, 5), 0.4, 0.9], (), (0, 0, None, None), permutes=False
    ),
    DISTILLATION + "kd3:disagreement_weights": Case(lambda n, d: [d(0, n, 5), d(1, n, 5)], (), (0, 0), permutes=False),
    DISTILLATION + "kd3:weighted_feature_loss": Case(
        lambda n, d: [d(0, n, 3, 4, 4), d(1, n, 3, 4, 4), d(2, n, 5), d(3, n, 5)], (0,), (0, 0, 0, 0)
    ),
    CORE + "mixing:mix_distribution": Case(
        lambda n, d: [d(0, n, 3, 4, 4), d(1, n).sigmoid(), torch.arange(n).flip(0)], (0,), (0, 0, 0), permutes=False
    ),
    IMAGES + "mcl:integrated": Case(lambda n, d: [pair(n, d)], (), (0,), permutes=False),
    CORE + "codes:local_words": Case(
        lambda n, d: [d(0, n, 4, 5, 6), torch.arange(n) / max(n, 1)], (), (0, 0), memory=(1,), permutes=False
    ),
    CORE + "codes:perplexity": Case(lambda n, d: [d(0, n, 9).softmax(1)], (), (0,)),
    CORE + "codes:bow_targets": Case(
        lambda n, d: [d(0, n, 4, 5, 6), d(1, 9, 4), 2.0, 3.0, "max", True], (), (0, None, None, None, None, None)
    ),
    # Three crops of every picture, the local one with a single region.
    IMAGES + "cmd:cmd_loss": Case(
        lambda n, d: [*cmd_rows(n, d), [3, 1], 3, d(6, 1, 5), d(7, 1, 5), 0.2, 0.1],
        (0, 1, 2),
        (0, 0, 0, 0, 0, 0),
        memory=(8, 9),
        permutes=False,
        kwargs=(("pooling", "attention"),),
    ),
    IMAGES + "cmd:esvit_loss": Case(
        lambda n, d: [*cmd_rows(n, d), [3, 1], 3, d(6, 1, 5), d(7, 1, 5), 0.2, 0.1],
        (0, 1),
        (0, 0, 0, 0, 0, 0),
        memory=(8, 9),
        permutes=False,
    ),
    IMAGES + "obow:obow_loss": Case(
        lambda n, d: [[d(0, n, DIM), d(1, 2 * n, DIM)], [d(2, 9, 4)], [d(3, n, 9).softmax(1)], [word_weights], 2.0],
        (),
        (0, None, 0, None, None),
        permutes=False,
    ),
    CORE + "memory:nearest_clusters": Case(
        lambda n, d: [d(0, n, DIM), d(1, 9, DIM)], (), (0, None), memory=(1,), permutes=False
    ),
    CORE + "wavelets:haar_high_frequency": Case(lambda n, d: [d(0, n, 2, 4, 6)], (0,), (0,), most=70),
    CORE + "map_similarity:patch_nce": Case(
        lambda n, d: [d(0, n, 4, 3, 2), d(1, 2, n, 4, 3, 2), d(2, 3, n, 4, 3, 2)], (0,), (0, 1, 1), most=70
    ),
    DENSE + "pcl_sr:feature_ratio": Case(
        lambda n, d: [[d(0, n, 4, 3, 2)], [d(1, 2, n, 4, 3, 2)], [d(2, 3, n, 4, 3, 2)]], (), (0, 1, 1), most=70
    ),
    CORE + "adversarial:contrastive_discriminator": Case(lambda n, d: [d(0, n), d(1, n)], (0, 1), (0, 0)),
    IMAGES + "mlcd:mlcd_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, 50, DIM), listed(n, 50, 3), 16.0, 0.3, 1.0],
        (0, 1),
        (0, None, 0),
        kernel=True,
    ),
    IMAGES + "mlcd:margin_cluster_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, 50, DIM), listed(n, 50, 3), 16.0, 0.3, 0.1],
        (0, 1),
        (0, None, 0),
        kernel=True,
    ),
    IMAGES + "mochi:hardest": Case(
        lambda n, d: [d(0, n, DIM), unit(d(1, 20, DIM)), 3], (), (0, None, None), memory=(1,), permutes=False
    ),
    IMAGES + "mochi:mochi_logits": Case(mochi, (0,), (0, 0, None, 0, 0, 0, 0, 0), memory=(2, 5, 7), permutes=False),
}

CASES |= {
    DENSE + "global_local_seg:partition_contrastive_loss": Case(
        lambda n, d: [d(0, -(-n // 8) * 8, DIM), 2, 2], (0,), (0, None, None), permutes=False
    ),
    CORE + "regions:local_region_contrastive_loss": Case(
        lambda n, d: [d(0, -(-n // 2) * 2, 9, 9, 2), *grid_regions(9, 9)],
        (0,),
        (0, None, None),
        most=40,
        permutes=False,
    ),
    CORE + "mask_losses:soft_dice_loss": Case(
        lambda n, d: [d(0, n, 3, 4, 4), (d(1, n, 4, 4) * 100).long().remainder(3)], (0,), (0, 0)
    ),
    CORE + "mask_losses:binary_mask_loss": Case(
        lambda n, d: [d(0, n, 4, 4), (d(1, n, 4, 4) * 100).long().remainder(2)], (0,), (0, 0)
    ),
    DENSE + "ctvis:item_losses": Case(
        lambda n, d: [d(0, n, 7), d(1, n, 7).tanh(), torch.arange(7).expand(n, 7) % 3 - 1], (0, 1), (0, 0, 0)
    ),
    CORE + "tracks:similarity_guided_memory": Case(
        lambda n, d: [d(0, n, 5, DIM), (torch.arange(5 * n).view(n, 5) % 3 > 0).long()], (0,), (0, 0)
    ),
    CORE + "tracks:memory_positives": Case(
        lambda n, d: [
            d(0, n, 5, DIM),
            (torch.arange(5 * n).view(n, 5) % 3 > 0).long(),
            d(1, n, 5, DIM),
            d(2, n, 5) > 0,
        ],
        (),
        (0, 0, 0, 0),
    ),
    CORE + "proposals:weak_guided_contrast": Case(
        lambda n, d: [d(0, n, DIM), torch.arange(n) % 5, 0.1], (0,), (0, 0, None), kernel=True
    ),
    CORE + "proposals:proposal_distillation": Case(lambda n, d: [d(0, n, 7), d(1, n, 7)], (0,), (0, 0)),
    DENSE + "pixpro:pixel_propagation": Case(lambda n, d: [d(0, n, 3, 4, 3), None, 2.0], (0,), (0, None, None)),
    DENSE + "pixpro:pixpro_loss": Case(cell_maps, (0, 1), (0,) * 6),
    DENSE + "pixpro:pixel_regression": Case(cell_maps, (0, 1), (0,) * 6),
    DENSE + "pixpro:pix_contrast": Case(cell_maps, (0, 1), (0,) * 6),
    CORE + "map_fusion:modality_agnostic_fusion": Case(
        lambda n, d: [d(0, 3, n, 4, 2, 3), d(1, n, 4, 2, 3), 2], (0,), (1, 0, None), permutes=False
    ),
    DENSE + "any2seg:inter_modal_loss": Case(lambda n, d: [d(0, n, 4), d(1, n, 4), 0.3], (0,), (0, 0, None)),
    DENSE + "any2seg:intra_modal_loss": Case(
        lambda n, d: [d(0, n, 4, DIM), d(1, 4, 3), d(2, n, 4) > -0.5, 0.3], (0,), (0, None, 0, None), memory=(1,)
    ),
    "counterpoint.systems.distillation.krr_st:krr_outer_loss": Case(
        lambda n, d: [d(8, 4, DIM), d(9, 4, 3), d(0, n, DIM), d(1, n, 3), 1e-2], (0, 1), (None, None, 0, 0, None)
    ),
    CORE + "tokens:token_relations": Case(lambda n, d: [d(0, n, 2, 3, 4), d(1, n, 2, 3, 4)], (0, 1), (0, 0)),
    CORE + "tokens:drop_redundant_tokens": Case(lambda n, d: [d(0, n, 6, 4), 0.5], (), (0, None)),
    CORE + "tokens:attention_distance": Case(lambda n, d: [d(0, n, 4, 4).softmax(2), 2], (0,), (0, None)),
    CORE + "tokens:attention_nmi": Case(lambda n, d: [d(0, n, 4, 4).softmax(2)], (0,), (0,)),
    CORE + "tokens:relation_distillation_loss": Case(
        lambda n, d: [[d(s, n, 2, 3, 4) for s in range(3)], [d(s + 3, n, 2, 3, 5) for s in range(3)]], (), (0, 0)
    ),
    DISTILLATION + "hybrid_distill:feature_distillation_loss": Case(
        lambda n, d: [d(0, n, 3, DIM), d(1, n, 3, 4), d(2, 4, DIM)], (0, 2), (0, 0, None)
    ),
    CORE + "matches:soft_contrastive": Case(lambda n, d: [*pair(n, d), 3.0, 2.0], (0, 1), (0, 0, None, None)),
    CREAM + "cream_uni": Case(
        lambda n, d: [*pair(n, d), d(2, 9, DIM), d(3, 9, DIM), torch.arange(n) % 9],
        (0,),
        (0, 0, None, None, 0),
        memory=(1, 2, 3),
    ),
    CREAM + "cream_multi": Case(
        lambda n, d: [*pair(n, d), *pair(n, d, 2), d(4, 9, DIM), d(5, 9, DIM), torch.arange(n) % 9],
        (0, 1),
        (0, 0, 0, 0, None, None, 0),
        memory=(2, 3, 4, 5),
    ),
    CORE + "class_logits:class_margin_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, 3, DIM), labels(n)], (0, 1), (0, None, 0)
    ),
    CREAM + "contrastive_ensemble": Case(
        lambda n, d: [unit(d(0, 3, n, DIM)), unit(d(1, n, DIM))], (), (1, 0), permutes=False
    ),
    CREAM + "ensemble_weights": Case(
        lambda n, d: [unit(d(0, 3, n, DIM)), unit(d(1, n, DIM))], (), (1, 0), permutes=False
    ),
    "counterpoint.systems.continual.mod_x:mod_x": Case(
        lambda n, d: [*pair(n, d), d(4, n, 3), d(5, n, 3), 0.7, 2.0], (0, 1), (0, 0, 0, 0, None, None)
    ),
    "counterpoint.systems.continual.mod_x:trusted_rows": Case(lambda n, d: pair(n, d), (), (0, 0), permutes=False),
    "counterpoint.systems.continual.coconut:coconut_nspt": Case(
        lambda n, d: [*pair(n, d), labels(n), torch.arange(n) % 4 < 3, 0.5],
        (0,),
        (0, 0, 0, 0, None),
        kernel=True,
        memory=(1,),
    ),
    "counterpoint.systems.continual.coconut:coconut_mm": Case(
        lambda n, d: [*pair(n, d), labels(n), 0.5], (0, 1), (0, 0, 0, None), kernel=True
    ),
    "counterpoint.systems.continual.mulki:mulki_loss": Case(
        lambda n, d: [
            *(d(0, n, DIM), d(8, 3, DIM), labels(n), torch.stack([d(1, n, DIM), d(2, n, DIM)])),
            *(d(9, 2, 3, DIM), d(10, 3, DIM), 5.0),
        ],
        (0, 1, 5),
        (0, None, 0, 1, None, None, None),
    ),
    CORE + "distil:relational_distillation": Case(
        lambda n, d: [d(0, n, DIM), d(1, n, DIM), d(8, 4, DIM), 3.0, 2.0], (0,), (0, 0, None, None, None)
    ),
    "counterpoint.systems.continual.mulki:teacher_weights": Case(lambda n, d: [d(0, n, 2)], (), (0,)),
    CORE + "prototypes:prototype_alignment": Case(lambda n, d: [*unit_pair(n, d), 5.0], (0, 1), (0, 0, None)),
    DISTILLATION + "vidlankd:paired_hinge_loss": Case(
        lambda n, d: [d(0, n, 3, DIM), d(1, n, DIM), None, 0.5], (0, 1), (0, 0, None, None), permutes=False
    ),
    CORE + "token_lessons:nst_loss": Case(lambda n, d: [d(0, n, 3, DIM), d(1, n, 3, 4)], (0,), (0, 0)),
    CORE + "token_lessons:ntxent_pair": Case(lambda n, d: [*pair(n, d), 0.5], (0, 1), (0, 0, None)),
    CORE + "token_lessons:token_contrastive_loss": Case(
        lambda n, d: [d(0, n, 3, DIM), d(1, n, 3, DIM), 0.5], (0,), (0, 0, None)
    ),
    CORE + "token_lessons:token_crd_loss": Case(
        lambda n, d: [d(0, n, 3, DIM), d(1, n, 3, DIM), d(8, 9, DIM), 0.5], (0,), (0, 0, None, None), memory=(2,)
    ),
    "counterpoint.tasks.labelled:cross_entropy": Case(
        lambda n, d: [d(0, n, 4), torch.arange(n) % 4], (0,), (0, 0), kwargs=(("label_smoothing", 0.1),)
    ),
    "counterpoint.tasks.dense:pixel_cross_entropy": Case(
        lambda n, d: [d(0, n, 4, 3, 3), (d(1, n, 3, 3) * 100).long().remainder(4)], (0,), (0, 0)
    ),
}

# Public functions that no rule of types, derivatives or transforms concerns, and why.
OTHERS = {
    "regions:grid_regions": "whole numbers",
    "tree_scores:tree_scores": "whole numbers",
    "tree_scores:combined_tree_score": "whole numbers",
    "mask_losses:patch_labels": "whole numbers",
    "prefix:prefix_window_attention": "a layer, whose weights are a mapping",
    "prefix_windows:student_block": "a block of layers, whose weights are a mapping",
    "query_decoder:query_decoupled_decoder": "a network, whose weights are a mapping",
    "ctvis:reid_loss": "lists of rows for item_losses",
    "tracks:select_positive": "memory_positives of one instance",
    "tracks:online_tracker": "whole numbers",
    "tracks:Tracker": "whole numbers",
    "cells:near_cells": "whole numbers",
    "proposals:hard_positive_mask": "zeros and ones",
    "centroids:prototype_clustering": "classes by nearest centroids",
    "centroids:plain_clustering": "classes by nearest centroids",
    "proposals:proposal_variance": "counts",
    "gradients:gradient_discrepancy": "takes losses, differentiates them",
    "cca:CCALayer": "a layer over canonical_projections",
    "fitnets:hint_regressor": "makes a layer",
    "gap:explained_variance_ratios": "a figure, in float64",
    "gap:gap_metrics": "figures, in float64",
    "gap:linear_separability": "a figure, in float64",
    "mixing:draw_mix": "draws",
    "teacher:EMATeacher": "a module",
    "teacher:cosine_momentum": "numbers only",
    "grounding:grounding_maps": "explains a learner",
    "albef_weights:load_albef_checkpoint": "reads a file",
    "masking:mask_tokens": "draws",
    "reranking:rerank": "sorts scores",
    "snippets:SnippetEncoder": "a network",
    "pieces:identify_pieces": "a measure",
    "pieces:retrieval_metrics": "a measure",
    "gradient_harmonization:curriculum_threshold": "numbers only",
    "text:augment_text": "texts",
    "bags:MacilSDNet": "a network",
    "bags:VisualNet": "a network",
    "macil_sd:distillation_momentum": "numbers only",
    "macil_sd:parameter_distillation": "moves weights",
    "mae:patchify": "moves values, whatever their type",
    "mae:unpatchify": "moves values, whatever their type",
    "mae:random_masking": "moves values, whatever their type",
    "adainf:inflate": "moves images",
    "bss:half_window": "numbers only",
    "bss:low_amplitudes": "amplitudes, which transfer_style computes in the same way",
    "hydra:draw_partners": "draws",
    "noisy_labels:combination_weight": "numbers only",
    "sla:expand": "moves images",
    "sla:joint_label": "whole numbers",
    "hallucinator:Hallucinator": "a network",
    "mcl:compose": "whole numbers",
    "obow:WordGenerator": "a network",
    "prototypes:DINOHead": "a network",
    "prototypes:moved_center": "moves a memory",
    "class_logits:sampled_classes": "whole numbers",
    "grouped:grouped_batches": "whole numbers",
    "bags:fit_length": "moves values",
    "bags:frame_ap": "a measure",
    "bags:frame_ap_step": "a measure",
    "geometry:tolerance": "a measure",
}


CASES |= {
    CORE + "class_texts:class_prototypes": Case(lambda n, d: [d(0, n, 2, DIM)], (0,), (0,)),
    CORE + "class_texts:cosine_text_logits": Case(
        lambda n, d: [d(0, n, DIM), unit(d(1, 5, DIM)), 10.0], (0,), (0, None, None)
    ),
    DISTILLATION + "vl2v_adip:vl2v_loss": Case(
        lambda n, d: [d(0, n, DIM), torch.arange(n) % 5, d(1, n, 4), d(2, 5, 4), d(3, 4, DIM), d(4, 4), 0.3],
        (0, 4, 5),
        (0, 0, 0, None, None, None),
    ),
    DISTILLATION + "vl2v_adip:vl2v_rows": Case(
        lambda n, d: [d(0, n, DIM), torch.arange(n) % 5, d(1, n, 4), d(2, 5, 4), d(3, 4, DIM), d(4, 4), 0.3],
        (0, 4, 5),
        (0, 0, 0, None, None, None),
    ),
    DISTILLATION + "vlm_ood_distill:feature_contrast": Case(
        lambda n, d: [unit(d(0, n, DIM)), unit(d(1, n, DIM)), 0.1], (0,), (0, 0), kernel=True
    ),
    DISTILLATION + "gopro:simclr_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, n, DIM), 0.5], (0, 1), (0, 0), kernel=True
    ),
    "counterpoint.encoders.prompts:shifted_context": Case(lambda n, d: [d(0, n, 4), d(1, 3, 4)], (0, 1), (0, None)),
    "counterpoint.encoders.prompts:build_prompts": Case(
        lambda n, d: [d(0, n, 4), d(1, 3, 4), d(2, 2, 1, 4), d(3, 2, 5, 4)], (0, 1, 2, 3), (0, None, None, None)
    ),
    DISTILLATION + "vlm_ood_distill:caption_contrast": Case(
        lambda n, d: [unit(d(0, n, DIM)), unit(d(1, n, DIM)), torch.arange(n) % 5], (0,), (0, 0, 0), kernel=True
    ),
    DISTILLATION + "vlm_ood_distill:vision_language_alignment": Case(
        lambda n, d: [d(0, n, 5), d(1, n, 5), torch.arange(n) % 5, 3], (0,), (0, 0, 0)
    ),
}
OTHERS |= {
    "gopro:gopro_loss": "a sum of other public functions, with a mapping of parts",
    "prompts:style_content_token": "takes a mapping of weights",
    "vlm_ood_distill:vlm_ood_distillation_loss": "a sum of other public functions, with a mapping of parts",
    "loss_valley:swad_loss_valley": "averages weights",
}

CASES |= {
    DISTILLATION + "dcd:dynamic_distillation_loss": Case(lambda n, d: [d(0, n, 5), d(1, n, 5), 2.0, 0.3], (0,), (0, 0)),
    DISTILLATION + "dcd:mined_distillation_loss": Case(lambda n, d: [d(0, n, 5), d(1, n, 5), 2, 0.3], (0,), (0, 0)),
    DISTILLATION + "dcd:uncertainty_weights": Case(lambda n, d: [d(0, n, 5)], (), (0,)),
}
OTHERS |= {
    "dcd:select_hard_negatives": "whole numbers",
    "dcd:matched_scores": "moves values",
    "dcd:weighted_soft_label_loss": "its weight depends on the student without gradient: second differences disagree",
}
CASES |= {
    DISTILLATION + "tinyclip:affinity_mimicking_loss": Case(
        lambda n, d: [*unit_pair(n, d), 10.0, *unit_pair(n, d, 2), 5.0],
        (0, 1),
        (0, 0, None, 0, 0, None),
        kernel=True,
    ),
}
OTHERS |= {
    "inherited:inherit_weights": "takes dictionaries of weights",
    "hard_concrete:hard_concrete_sample": "masks of units, without a batch",
    "hard_concrete:hard_concrete_eval_mask": "a mask of a whole row of units",
    "hard_concrete:expected_model_size": "of units, without a batch",
    "hard_concrete:sparsity_lagrangian": "of numbers, without a batch",
    "masked_transformer:masked_transformer_block": "takes a dictionary of weights",
}

CASES |= {
    DISTILLATION + "promptkd:prompt_distillation_loss": Case(
        lambda n, d: [d(0, n, 5), d(1, n, 5), 2.0, 10.0], (0,), (0, 0)
    ),
    CORE + "prompt_tuning:prompt_tuning_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, 5, DIM), d(2, n, DIM), d(3, 5, DIM), torch.arange(n) % 5, 10.0],
        (0, 1),
        (0, None, 0, None, 0),
    ),
}
OTHERS |= {
    "prompts:prompted_vit": "a network with named weights",
    "prompts:prompt_projector": "a network with named weights",
    "prompt_tuning:gaussian_epoch_weights": "weights of epochs",
}

SPACE_2 = SYSTEMS + "language.space_2:"
CASES |= {
    CORE + "set_scores:soft_supcon": Case(
        lambda n, d: [d(0, n, 2, DIM), None, 0.5], (0,), (0, None, None), kernel=True
    ),
    SPACE_2 + "tree_contrast": Case(
        lambda n, d: [d(0, n, 2, 10, DIM), torch.arange(8 * n).view(n, 2, 4) % 5, 0.5], (0,), (0, 0, None), kernel=True
    ),
    CORE + "distil:r_drop": Case(lambda n, d: pair(n, d), (0, 1), (0, 0)),
}

SEPCLR = SYSTEMS + "supervision.sepclr:"
CASES |= {
    SEPCLR + "sepclr_loss": Case(
        lambda n, d: [*pair(n, d), *pair(n, d, 2), torch.arange(n) % 2],
        (0, 1, 2, 3),
        (0, 0, 0, 0, 0),
        kernel=True,
    ),
    CORE + "gaussian:align": Case(lambda n, d: pair(n, d), (0, 1), (0, 0)),
    CORE + "gaussian:uniform": Case(lambda n, d: [d(0, n, DIM)], (0,), (0,), kernel=True),
    CORE + "gaussian:joint_entropy": Case(lambda n, d: [d(0, n, DIM), d(1, n, 3)], (0, 1), (0, 0), kernel=True),
    CORE + "gaussian:sup_align": Case(lambda n, d: [d(0, n), d(1, n).sigmoid()], (0,), (0, 0)),
    CORE + "gaussian:discrete_sup_align": Case(lambda n, d: [d(0, n), (torch.arange(n) % 3).double()], (0,), (0, 0)),
}


def augmenter(d: Callable[..., Tensor], seed: int) -> dict[str, Tensor]:
    """Return weights of three layers, DIM -> DIM / 2 -> DIM / 4 -> DIM."""
    widths = (DIM, DIM // 2, DIM // 4, DIM)
    return {
        f"dense_{n + 1}.{what}": d(seed + 3 * n + at, *shape) / 2
        for n in range(3)
        for at, (what, shape) in enumerate([("weight", (widths[n + 1], widths[n])), ("bias", (widths[n + 1],))])
    }


CASES |= {
    SYSTEMS + "supervision.supremix:supremix_loss": Case(
        lambda n, d: [unit(d(0, n, 2, DIM)), torch.arange(n) % 5 * 1.5, 0.3, 4.0, d(1, 2 * n, 2 * n).sigmoid()],
        (0,),
        (0, 0),
        most=70,
        memory=(1, 4),
        permutes=False,
    ),
}
OTHERS |= {"label_mixtures:mixture_counts": "whole numbers"}

CASES |= {
    SYSTEMS + "recommendation.mclrec:mclrec_contrast": Case(
        lambda n, d: [*pair(n, d), augmenter(d, 5), augmenter(d, 20), 0.5], (0, 1), (0, 0), kernel=True
    ),
    SYSTEMS + "recommendation.mclrec:score_spread_regulariser": Case(lambda n, d: [*pair(n, d), 0.5], (0, 1), (0, 0)),
    CORE + "class_logits:next_item_loss": Case(
        lambda n, d: [d(0, n, DIM), d(1, 9, DIM), torch.arange(n) % 9], (0,), (0, None, 0)
    ),
}
CASES |= {
    CORE + "noisy_labels:bootstrap_target": Case(
        lambda n, d: [unit(d(0, n, DIM)), unit(d(1, 9, DIM)), d(2, 9, 4).softmax(1)], (), (0, None, None)
    ),
}
OTHERS |= {
    "capro:capro_step": "a step: moves queue and prototypes, and returns a mapping",
    "tag_prototypes:capro_tags_step": "a step: moves queue and prototypes, and returns a mapping",
    "approximate_neighbours:approximate_rows": "whole numbers",
    "noisy_labels:judged_labels": "whole numbers",
    "noisy_labels:judged_tags": "whole numbers",
    "neighbours:k_reciprocal_rerank": "ranks of distances",
    "neighbours:graph_smooth": "a graph over the whole batch",
}

CLHE = SYSTEMS + "recommendation.clhe:"
CASES |= {
    CORE + "attention:modality_fusion": Case(
        lambda n, d: [d(0, n, 3, DIM), d(1, DIM, DIM), d(2, DIM, DIM)], (0,), (0, None, None)
    ),
    CORE + "attention:set_attention_pool": Case(
        lambda n, d: [d(0, n, 4, DIM), torch.arange(4) > torch.arange(n)[:, None] % 4, d(1, DIM, DIM), d(2, DIM, DIM)],
        (0,),
        (0, 0, None, None),
    ),
    CLHE + "one_way_infonce": Case(lambda n, d: [*pair(n, d), 0.5], (0, 1), (0, 0), kernel=True),
    CLHE + "multinomial_nll": Case(lambda n, d: [d(0, n, 6), (d(1, n, 6) > -1).double()], (0,), (0, 0)),
}
OTHERS |= {"clhe:clhe_forward": "the whole model, a mapping; its parts have cases"}

CASES |= {
    LANGUAGE + "ritual:combine_logits": Case(lambda n, d: [d(0, n, 5), d(1, n, 5), "ritual", 3.0, 0.0], (0, 1), (0, 0)),
    LANGUAGE + "ritual:diffusion_noise": Case(lambda n, d: [d(0, n, 3, 4, 4), d(1, n, 3, 4, 4), 500], (0, 1), (0, 0)),
    LANGUAGE + "lol:fused_scores": Case(
        lambda n, d: [*(d(k, n, 5) for k in range(6)), 0.3, 0.5, 0.0], tuple(range(6)), (0,) * 6
    ),
    CORE + "decoding:contrastive_answer_score": Case(
        lambda n, d: [d(0, n, 5), d(1, n, 5), torch.arange(n) % 5], (0, 1), (0, 0, 0)
    ),
    CORE + "answers:masked_lm_loss": Case(lambda n, d: [d(0, n, 4, 5), answered(n)], (0,), (0, 0)),
    CORE + "answers:flag_weighted_lm_loss": Case(
        lambda n, d: [d(0, n, 4, 5), answered(n), [1, 3], 2.0], (0,), (0, 0, None, None)
    ),
    CORE + "answers:answer_log_probability": Case(lambda n, d: [d(0, n, 4, 5), answered(n)], (0,), (0, 0)),
}
OTHERS |= {"decoding:select_premature_layer": "whole numbers", "meta_responses:parse_meta_response": "texts"}
OTHERS |= {"sinc:in_context_classifier": "a network, whose weights are a mapping"}


def asked(n: int) -> list[Tensor]:
    """Return query ids of 4 tokens, of which three or four are there, and the masks of query and answer."""
    ids = torch.arange(4 * n).view(n, 4) % 5
    there = torch.ones(n, 4, dtype=torch.bool)
    there[::2, 3] = False
    answer = there.clone()
    answer[:, :2] = False
    return [ids, there, answer]


def taught(n: int) -> list[Tensor]:
    """Return the masks of a teacher's 6 tokens, of which two are demonstrations, and of these."""
    there = torch.ones(n, 6, dtype=torch.bool)
    there[::2, 5] = False
    demos = torch.zeros_like(there)
    demos[:, :2] = True
    return [there, demos]


CASES |= {
    LANGUAGE + "mend:context_distillation_losses": Case(
        lambda n, d: [d(0, n, 7, 5), d(1, n, 6, 5), *asked(n), *taught(n), 3, 2.0, 0.5], (0,), (0,) * 7
    ),
    LANGUAGE + "mend:candidate_scores": Case(
        lambda n, d: [d(0, n, 6, 5), *asked(n)[::2], torch.ones(n, 1, dtype=torch.bool), 2, 1], (0,), (0, 0, 0, 0)
    ),
    CORE + "answers:masked_token_kl": Case(
        lambda n, d: [d(0, n, 4, 5), d(1, n, 4, 5), asked(n)[1], 2.0], (0,), (0, 0, 0)
    ),
}
TEMINAL = SYSTEMS + "alignment.teminal:"
CASES |= {
    TEMINAL + "temporal_nce": Case(
        lambda n, d: [*unit_pair(n, d), *unit_pair(n, d, 2), 0.5, 2.0, 5.0, *unit_pair(n, d, 4), 0.7, 0.4],
        (0, 1, 2, 3, 7, 8),
        (0, 0, 0, 0, None, None, None, 0, 0),
        kernel=True,
    ),
    TEMINAL + "single_dual_nce": Case(
        lambda n, d: [*unit_pair(n, d), 5.0, torch.arange(n) % 7], (0, 1), (0, 0, None, 0), kernel=True
    ),
}

CASES |= {
    SYSTEMS + "generation.supcon_t2i:label_guided_contrast": Case(
        lambda n, d: [*pair(n, d), labels(n), labels(n), 0.5], (0, 1), (0, 0, 0, 0), kernel=True
    ),
    CORE + "damsm:damsm_sentence": Case(
        lambda n, d: [*pair(n, d), 5.0, labels(n)], (0, 1), (0, 0, None, 0), kernel=True
    ),
    CORE + "damsm:damsm_words": Case(
        lambda n, d: [d(0, n, DIM, 2, 2), d(1, n, DIM, 3), labels(n) + 1, (4.0, 5.0, 10.0), labels(n)],
        (0, 1),
        (0, 0, 0, None, 0),
        most=70,
    ),
}

CUSTOM = SYSTEMS + "generation.customcontrast:"
CASES |= {
    CUSTOM + "cscl": Case(lambda n, d: [*pair(n, d), 0.5], (0, 1), (0, 0, None), kernel=True),
    CUSTOM + "macl": Case(
        lambda n, d: [d(0, 2, n, DIM), d(1, 2, n, DIM), d(2, n, n).sigmoid(), 0.5, torch.arange(n) % 3 > 0],
        (0, 1),
        (1, 1, 0, None, 0),
        kernel=True,
        permutes=False,
    ),
}
OTHERS |= {"customcontrast:subject_similarity": "a function of tiles, which macl takes; its own tests compare it"}

PREFERENCES = CORE + "preferences:"
CASES |= {
    PREFERENCES + "regularized_dpo": Case(
        lambda n, d: [*(d(k, n, 4, 5) for k in range(4)), answered(n), answered(n), 0.5, 0.3], (0, 1), (0,) * 6
    ),
    PREFERENCES + "runner_up_log_probability": Case(lambda n, d: [d(0, n, 4, 5), answered(n)], (0,), (0, 0)),
    PREFERENCES + "preference_margin": Case(lambda n, d: [d(k, n) for k in range(4)], (0, 1, 2, 3), (0,) * 4),
    PREFERENCES + "dpo_loss": Case(lambda n, d: [d(0, n), 0.5], (0,), (0,)),
}

CASES |= {
    LANGUAGE + "llava_mod:mimic_loss": Case(lambda n, d: [d(0, n, 4, 5), d(1, n, 4, 5), answered(n)], (0,), (0, 0, 0)),
    PREFERENCES + "preference_loss": Case(
        lambda n, d: [*(d(k, n) for k in range(4)), 0.5, "kto_pair"], (0, 1), (0,) * 4, permutes=False
    ),
    CORE + "routing:top2_routes": Case(lambda n, d: [2 * d(0, n, 4), d(1, n, 4)], (0,), (0, 0)),
}
OTHERS |= {"routing:top2_gate": "buffers of the experts, of which the tokens' order decides; top2_routes has a case"}
CASES |= {CORE + "reviews:score_gap": Case(lambda n, d: [d(0, n, 2), d(1, n, 2)], (0, 1), (0, 0))}
OTHERS |= {
    "reviews:split_by_difficulty": "positions",
    "reviews:parse_review": "texts",
    "reviews:rouge_l": "texts",
    "reviews:is_well_formed": "texts",
}
COSMO = SYSTEMS + "alignment.cosmo:"
CASES |= {
    COSMO + "interleaved_contrast": Case(
        lambda n, d: [*pair(n, d), 5.0, torch.arange(n) % 7], (0, 1), (0, 0, None, 0), kernel=True
    ),
}
OTHERS |= {
    "matching:matching_accuracy": "shares, without a gradient",
    "media_attention:gated_cross_attention": "takes a dictionary of weights",
    "media_attention:learned_query_pool": "takes a dictionary of weights",
}
