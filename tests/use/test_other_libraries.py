"""The rows of docs/guides/migrating.md: losses of other libraries have the values that the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint import functional, losses

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "migrating.md"
Case = Callable[[], tuple[Tensor, Tensor]]  # the value of the other library, and ours
CASES: dict[str, tuple[str, Case]] = {}


def case(library: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[function.__name__] = library, function
        return function

    return add


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, LABELS = draw(16, 8), draw(16, 8, seed=1), torch.arange(16) // 2
UNIT = F.normalize(X, dim=1), F.normalize(Y, dim=1)


@pytest.mark.parametrize("name", [
    "nt_xent", "memory_bank", "dcl", "dclw", "barlow", "vicreg", "negative_cosine", "swav", "dino", "open_clip", "sigmoid",
    "one_way", "symmetric", "supcon", "self_supervised", "batch_hard", "kd", "at", "rkd",
])  # fmt: skip
def test_value_equals_the_other_library_s(name: str) -> None:
    library, function = CASES[name]
    pytest.importorskip(library, reason=f"needs the package {library}")
    theirs, ours = function()
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-9)


def test_every_library_has_its_rows_on_the_page() -> None:
    heads = re.findall(r"^## (\S+)", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {head.replace("-", "_") for head in heads} == {library for library, _ in CASES.values()}


def test_names_on_the_page_exist() -> None:
    cells = [row.split("|")[2] for row in GUIDE.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    found = {name for cell in cells for name in re.findall(r"\b([A-Z]\w+)\(", cell)} - {
        "SentenceLoss",
        "MinedLoss",
        "ViewPipeline",
    }
    assert len(found) > 15
    for name in found:
        assert hasattr(losses, name) or hasattr(functional, name), name


def test_the_loop_of_the_page_runs() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), found)
    assert found["value"].isfinite()


# --- lightly


@case("lightly")
def nt_xent() -> tuple[Tensor, Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss()(X, Y), losses.NTXent()(X, Y)


@case("lightly")
def memory_bank() -> tuple[Tensor, Tensor]:
    from lightly.loss import NTXentLoss

    x, y = X.float(), Y.float()
    theirs, ours = NTXentLoss(0.5, memory_bank_size=(32, 8)), losses.MoCo(8, 32, temperature=0.5)
    theirs(x, y)  # makes its bank
    ours.memory.rows.copy_(theirs.memory_bank.bank)
    return theirs(x, y), ours(x, y)


@case("lightly")
def dcl() -> tuple[Tensor, Tensor]:
    from lightly.loss import DCLLoss

    return DCLLoss()(X, Y), losses.DCL()(X, Y)


@case("lightly")
def dclw() -> tuple[Tensor, Tensor]:
    from lightly.loss import DCLWLoss

    return DCLWLoss(sigma=0.5)(X, Y), losses.DCL(weight_sigma=0.5)(X, Y)


@case("lightly")
def barlow() -> tuple[Tensor, Tensor]:
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()(X, Y), losses.BarlowTwins(redundancy=0.005)(X, Y)


@case("lightly")
def vicreg() -> tuple[Tensor, Tensor]:
    from lightly.loss import VICRegLoss

    theirs = VICRegLoss(lambda_param=10.0, mu_param=20.0, nu_param=2.0)
    return theirs(X, Y), losses.VICReg(invariance=10.0, variance=20.0, covariance=2.0)(X, Y)


@case("lightly")
def negative_cosine() -> tuple[Tensor, Tensor]:
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()(X, Y), losses.NegativeCosine()(X, Y)


@case("lightly")
def swav() -> tuple[Tensor, Tensor]:
    from lightly.loss import SwaVLoss

    ours = losses.SwAV(8, 12)
    (prototypes,) = ours.parameters()
    high, low = draw(2, 6, 8).float(), draw(3, 6, 8, seed=1).float()
    outputs = [[F.normalize(x, dim=1) @ F.normalize(prototypes, dim=1).T for x in crops] for crops in (high, low)]
    return SwaVLoss()(*outputs).squeeze(), ours(high, low)  # theirs has the shape [1]


@case("lightly")
def dino() -> tuple[Tensor, Tensor]:
    from lightly.loss import DINOLoss

    student, teacher = draw(4, 6, 10).float(), draw(2, 6, 10, seed=1).float()
    theirs = DINOLoss(output_dim=10, teacher_temp=0.07, warmup_teacher_temp_epochs=0)
    return theirs(list(teacher), list(student), epoch=0), losses.DINO(10, teacher_temperature=0.07)(student, teacher)


# --- open_clip


@case("open_clip")
def open_clip() -> tuple[Tensor, Tensor]:
    from open_clip.loss import ClipLoss

    return ClipLoss()(*UNIT, torch.tensor(1 / 0.07)), losses.CLIP(temperature=0.07)(X, Y)


@case("open_clip")
def sigmoid() -> tuple[Tensor, Tensor]:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(*UNIT, torch.tensor(10.0), torch.tensor(-10.0)), losses.SigLIP(temperature=0.1, bias=-10)(X, Y)


# --- sentence-transformers


class Given(nn.Module):
    """Stands for a sentence encoder: the features are the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["rows"]}


def sentences(name: str, *columns: Tensor) -> Tensor:
    from sentence_transformers import losses as others

    model: Any = Given()
    loss = getattr(others, name)(model)
    value: Tensor = loss([{"rows": rows} for rows in columns], None)
    return value


@case("sentence_transformers")
def one_way() -> tuple[Tensor, Tensor]:
    return sentences("MultipleNegativesRankingLoss", X, Y), functional.one_way_infonce(X, Y, 0.05)


@case("sentence_transformers")
def symmetric() -> tuple[Tensor, Tensor]:
    return sentences("MultipleNegativesSymmetricRankingLoss", X, Y), losses.CLIP(temperature=0.05, learnable=False)(
        X, Y
    )


# --- pytorch-metric-learning


@case("pytorch_metric_learning")
def supcon() -> tuple[Tensor, Tensor]:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=0.1)(X, LABELS), losses.SupConSingleView()(X, LABELS)


@case("pytorch_metric_learning")
def self_supervised() -> tuple[Tensor, Tensor]:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=0.5))(X, Y), losses.NTXent(temperature=0.5)(X, Y)


@case("pytorch_metric_learning")
def batch_hard() -> tuple[Tensor, Tensor]:
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner

    theirs = TripletMarginLoss(margin=0.2)(X, LABELS, BatchHardMiner()(X, LABELS))
    return theirs, losses.Triplet(margin=0.2)(X, LABELS)


# --- torchdistill


def hooked(*tensors: Tensor) -> dict[str, dict[str, Tensor]]:
    return {str(number): {"output": tensor} for number, tensor in enumerate(tensors)}


@case("torchdistill")
def kd() -> tuple[Tensor, Tensor]:
    from torchdistill.losses.mid_level import KDLoss

    theirs = KDLoss("0", "output", "0", "output", temperature=4.0, alpha=0.1)(hooked(X), hooked(Y), LABELS)
    return theirs, 0.1 * F.cross_entropy(X, LABELS) + 0.9 * losses.KD(temperature=4.0)(X, Y)


@case("torchdistill")
def at() -> tuple[Tensor, Tensor]:
    from torchdistill.losses.mid_level import ATLoss

    student, teacher = (draw(4, 6, 8, 8), draw(4, 8, 4, 4)), (draw(4, 3, 8, 8, seed=1), draw(4, 9, 4, 4, seed=1))
    sides = {side: {"io": "output"} for side in ("student", "teacher")}
    pairs = {n: {k: v | {"path": n} for k, v in sides.items()} | {"factor": 1.0} for n in "01"}
    ours = sum(losses.AttentionTransfer()(s, t) for s, t in zip(student, teacher, strict=True))
    assert isinstance(ours, Tensor)
    return ATLoss(pairs, mode="code")(hooked(*student), hooked(*teacher)), ours


@case("torchdistill")
def rkd() -> tuple[Tensor, Tensor]:
    from torchdistill.losses.mid_level import RKDLoss

    theirs = RKDLoss("0", "0", 25.0, 50.0, "mean")(hooked(X), hooked(Y))
    return theirs, losses.RKD(distance_weight=25.0, angle_weight=50.0)(X, Y)
