"""A loss inside somebody's own job: of this process's batch, unless `group` says whose batches together are the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from counterpoint.core.world import leave

COUNTS = [3, 1, 2]
# Arguments whose batch is not the first axis, or that have none (None). Lists hold tensors whose first axis is it.
AXES = {
    "PairwiseNTXent": (1,),
    "CACR": (1,),
    "MACL": (1, 1, 0, 0),
    "CACRMomentum": (1, 0),
    "MSN": (1, 0),
    "SwAV": (1, 1),
    "DINO": (1, 1),
    "CMD": (1,) * 6,
    "VL2V": (0, 0, 0, None),
    "VLMOOD": (0, 0, None, 0),
    "PromptTuning": (0, None, 0, None, 0),
    "IntraModal": (0, None, 0),
    "MulKI": (0, None, 0, 1, None, None),
    "PublicContrast": (0, 0, None, None, 0),
    "TemporalNCE": (0, 0, 0, 0, 0, 0, 1),
    "SupReMix": (0, 0, None),
    "KernelRidge": (None, None, 0, 0),
    "NextItem": (0, None, 0),
    "PatchNCE": (0, 1, 1),
    "FeatureRatio": (0, 1, 1),
}
# Numbers of the tensors with a gradient that every process holds whole, such as texts of classes.
COMMON = {"KernelRidge": (0, 1), "PromptTuning": (1,), "NextItem": (1,), "MulKI": (1, 4)}
# MoCHi draws its mixtures for each process by itself.
NAMES = [
    "NTXent", "InfoNCE", "MoCo", "DCL", "NTXentByIndex", "PairwiseNTXent", "SnippetNTXent", "MixedNTXent",
    "HardContrastive", "SimpleContrastive", "CACR", "CACRMomentum", "IsoGCLR", "IsoGCLR of pairs", "NegativeCosine",
    "SimSiam", "BYOL", "BarlowTwins", "VICReg", "SwAV", "DINO", "MAE", "SupCon", "SupConSingleView", "SupReMix",
    "Triplet", "CLIP",
    "SigLIP", "CWCL", "Symile", "PairwiseCLIP", "M3Co", "MultiSClip", "Uniformity", "CrossUniformity", "ContrastiveGap",
    "MILNCE", "CLIPRocket", "BarLIP", "SiamLIP", "SwALIP", "BatchHinge", "ALBEF", "MLMDistill", "MIL", "MACILSD", "KD", "TokenKL",
    "FitNets", "RKD", "CRD", "DynamicScores", "AttentionTransfer", "MeanTeacher", "MLCD", "ClusterMargin", "SLA", "Hydra",
    "SepCLR", "CAPro",
    "CMD",
    "PatchNCE", "FeatureRatio", "DualContrast",
    "VL2V", "VLMOOD", "GOPro", "PromptKD", "PromptTuning", "AffinityMimicking",
    "PixPro", "PixelRegression", "PixContrast", "ReID", "SoftDice", "BinaryMask", "ColumnInfoNCE", "MSN", "InterModal",
    "IntraModal", "WeakGuidedContrast", "RelationDistance", "ChannelCorrelation", "SemanticDistance",
    "WeightedFeature", "KernelRidge",
    "TokenRelation", "TokenFeature", "PairedHinge", "NST", "TokenContrast", "TokenCRD", "ModX", "CoconutNSPT",
    "CoconutMM", "MulKI", "NextItem", "ScoreSpread", "LearnedViews", "SoftContrastive",
    "PublicContrast", "TemporalNCE", "LabelGuided", "SentenceMatch", "WordMatch", "MACL", "SoftSupCon", "TreeContrast", "RDrop",
    "TokenMimic",
    "CaptionContrast",
]  # fmt: skip


def shared(x: Any, rank: int, axis: int | None = 0) -> Any:
    """Return this process's share of an argument."""
    if isinstance(x, list):
        return [shared(part, rank, axis) for part in x]
    if not isinstance(x, Tensor) or axis is None:
        return x
    many = x.shape[axis] // sum(COUNTS) if x.shape[axis] % sum(COUNTS) == 0 else 0
    sizes = [many * count for count in COUNTS] if many else [x.shape[axis] - 2, 1, 1]
    return x.split(sizes, axis)[rank]


def take(name: str, group: Any, rank: int | None = None) -> tuple[Tensor | str, list[Tensor], dict[str, Tensor]]:
    """Return loss or error, gradients of arguments and parameters, and the state afterwards."""
    from test_losses import CASES, prepared

    module, arguments, _ = prepared(CASES[name])
    module.group = group
    if rank is not None:
        axes = AXES.get(name, (0,) * len(arguments))
        arguments = [shared(x, rank, axis) for x, axis in zip(arguments, axes, strict=False)] + arguments[len(axes) :]
    through: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, list):
            return [leaf(part) for part in x]
        if isinstance(x, Tensor) and x.requires_grad:
            through.append(x := x.detach().requires_grad_())
        return x

    arguments = [leaf(x) for x in arguments]
    through += list(module.parameters())
    try:
        loss = module(*arguments)
    except ValueError as error:
        return str(error), [], {}
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in through]
    return loss.detach(), gradients, {key: value.clone() for key, value in module.state_dict().items()}


def stepped(rows: slice, group: Any, *, ddp: bool) -> list[Tensor]:
    """Compute gradients of a linear layer under NT-Xent."""
    from counterpoint import losses

    torch.manual_seed(0)
    net: nn.Module = nn.Linear(5, 4).double()
    layer = net
    views = [torch.randn(6, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)[rows] for n in (0, 1)]
    if ddp:
        net = DistributedDataParallel(net)
    z = net(torch.cat(views)).chunk(2)
    losses.NTXent(group=group)(*z).backward()
    return [p.grad for p in layer.parameters()]


def work(rank: int, folder: str) -> None:
    from counterpoint import functional as fn
    from counterpoint.core.world import over, processes, world

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    found: dict[str, Any] = {
        "local": {name: take(name, None, rank) for name in NAMES},
        "world": {name: take(name, "world", rank) for name in NAMES},
    }
    with over("world"):  # as the engine has it: modules and functions without a group follow
        found["engine"] = {name: take(name, None, rank) for name in ("MoCo", "SupCon", "CRD")}
        assert world() == processes() == (rank, len(COUNTS))
    assert world() == (0, 1)
    start = sum(COUNTS[:rank])
    found["ddp"] = stepped(slice(start, start + COUNTS[rank]), "world", ddp=True)
    some = dist.new_group([1, 2])
    x, y = (torch.randn(4, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (2, 3))
    if rank == 0:
        with pytest.raises(ValueError, match="group does not hold this process"):
            fn.of("simclr").nt_xent(x, y, group=some)
    else:
        mine = [z[2 * rank - 2 : 2 * rank].clone().requires_grad_() for z in (x, y)]
        for ring in (False, True):
            fn.of("simclr").nt_xent(*mine, 0.3, ring=ring, group=some).backward()
        found["some"] = [z.grad for z in mine]
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("groups")
    mp.start_processes(work, (str(folder),), nprocs=len(COUNTS), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(COUNTS))]


def test_every_module_but_mochi_is_here():
    from test_losses import CASES

    assert set(CASES) - set(NAMES) == {"MoCHi"}


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_the_loss_of_the_process_alone(parts, name):
    for rank, part in enumerate(parts):
        (found, *rest), (wanted, *others) = part["local"][name], take(name, None, rank)
        if isinstance(wanted, str):
            assert found == wanted
            continue
        torch.testing.assert_close((found, *rest), (wanted, *others), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_world_is_the_loss_and_the_mean_gradient_of_the_whole_batch(parts, name):
    from test_losses import CASES, prepared

    loss, gradients, state = take(name, None)
    assert isinstance(loss, Tensor)
    arguments = prepared(CASES[name])[1]
    axes = AXES.get(name, (0,) * len(arguments))

    def of(rank: int) -> list[Tensor]:
        """Compute gradients of the arguments in this process's share."""
        at = iter(gradients)

        def next_share(x: Any, axis: int) -> None:
            if isinstance(x, list):
                for one in x:
                    next_share(one, axis)
            elif isinstance(x, Tensor) and x.requires_grad:
                cut.append(shared(next(at), rank, axis))

        cut: list[Tensor] = []
        for x, axis in zip(arguments, [*axes, *[0] * len(arguments)], strict=False):
            next_share(x, axis)
        return cut

    size = len(COUNTS)
    for rank, part in enumerate(parts):
        found, own, after = part["world"][name]
        torch.testing.assert_close(found, loss, rtol=1e-8, atol=1e-10)
        wanted = of(rank)
        # Rows that every process holds, like parameters, have their mean gradient; others have that of their share.
        given = own[: len(wanted)]
        for at in COMMON.get(name, ()):
            given[at] = sum(other["world"][name][1][at] for other in parts)
        torch.testing.assert_close([g / size for g in given], wanted, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(after, state, rtol=1e-8, atol=1e-10)
    # Of parameters the mean over the processes, which DistributedDataParallel takes, is the whole batch's.
    many = len(of(0))
    for at, wanted_one in enumerate(gradients[many:], many):
        mean = sum(part["world"][name][1][at] for part in parts) / size
        torch.testing.assert_close(mean, wanted_one, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["MoCo", "SupCon", "CRD"])
def test_inside_the_engine_the_batch_is_everybodys(parts, name):
    for part in parts:
        torch.testing.assert_close(part["engine"][name], part["world"][name], rtol=0, atol=0)


def test_distributed_data_parallel_has_the_gradient_of_one_process(parts):
    wanted = stepped(slice(None), None, ddp=False)
    for part in parts:
        torch.testing.assert_close(part["ddp"], wanted, rtol=1e-9, atol=1e-12)


def test_a_group_of_some_processes_is_their_batch(parts):
    from counterpoint import functional as fn

    x, y = (
        torch.randn(4, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64).requires_grad_()
        for n in (2, 3)
    )
    (2 * fn.of("simclr").nt_xent(x, y, 0.3)).backward()
    for rank in (1, 2):
        for found, whole in zip(parts[rank]["some"], (x.grad, y.grad), strict=True):
            torch.testing.assert_close(found / 2, whole[2 * rank - 2 : 2 * rank], rtol=1e-8, atol=1e-10)


def test_world_without_a_process_group_is_the_process_itself():
    for name in ("NTXent", "MoCo", "CRD"):
        torch.testing.assert_close(take(name, "world"), take(name, None), rtol=0, atol=0)


def test_another_word_is_refused():
    from counterpoint import losses

    with pytest.raises(ValueError, match="group must be a ProcessGroup or 'world', got 'all'"):
        losses.KD(group="all")(torch.zeros(1, 2), torch.zeros(1, 2))
