"""Symile: the authors' numbers, the card's identities, the edges, several processes, and training with a part missing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog, cli, training
from counterpoint import functional as fn
from counterpoint.core import multilinear
from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.engine.run import Run
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system
from counterpoint.lab.verify import rehearse
from counterpoint.systems.alignment.symile import SymileConfig, draw_permutations

PARITY = np.load(Path(__file__).parents[1] / "parity" / "symile.npz")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(m: int, n: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(F.normalize(torch.randn(m, n, dim, generator=g, dtype=torch.float64), dim=2))


def numbers(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PARITY[name])).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("case", "m", "negatives"), [("case0", 3, "n_squared"), ("case1", 3, "n"), ("case2", 4, "n_squared")]
)
def test_values_and_gradients_equal_the_authors(case, m, negatives, dtype, rtol):
    reps = [numbers(f"{case}/in/rep{i}", dtype).requires_grad_() for i in range(m)]
    scale = numbers(f"{case}/param/logit_scale", dtype).requires_grad_()
    permutations = torch.from_numpy(PARITY[f"{case}/in/permutations"]) if negatives == "n" else None
    loss = fn.symile(reps, scale, negatives, permutations)
    loss.backward()
    close(loss.detach(), numbers(f"{case}/out/loss"), rtol)
    for i, rep in enumerate(reps):
        close(rep.grad, numbers(f"{case}/grad/rep{i}"), rtol)
    close(scale.grad, numbers(f"{case}/grad/logit_scale"), rtol)
    if negatives == "n_squared":
        close(fn.symile_per_anchor(reps, scale, negatives).detach(), numbers(f"{case}/out/per_anchor_loss"), rtol)


def test_scores_and_the_baseline_equal_the_authors():
    reps, candidates = [numbers(f"case3/in/rep{i}") for i in range(3)], numbers("case3/in/candidates")
    scale = float(PARITY["case3/param/logit_scale"])
    close(fn.clip_pairwise_loss(reps, scale), numbers("case3/out/clip_pairwise_loss"), 1e-9)
    close(fn.mip_similarity(candidates, reps[1:]), numbers("case3/out/mip_similarity"), 1e-9)
    close(fn.zeroshot_symile(candidates, reps[1:], scale), numbers("case3/out/zeroshot_symile"), 1e-9)
    close(fn.zeroshot_clip(candidates, reps[1:], scale), numbers("case3/out/zeroshot_clip"), 1e-6)


def written_out(reps, scale, permutations=None):
    """Compute the card's listing, with the array of all combinations."""
    losses = []
    for a in range(len(reps)):
        others = [rep for i, rep in enumerate(reps) if i != a]
        n = len(reps[0])
        if permutations is None:
            rows = list(itertools.product(range(n), repeat=len(others)))
            target = torch.tensor([rows.index((i,) * len(others)) for i in range(n)])
            keys = torch.stack([torch.stack([o[i] for o, i in zip(others, row, strict=True)]).prod(0) for row in rows])
            logits = scale * reps[a] @ keys.T
        else:
            keys = torch.stack([o[p] for o, p in zip(others, permutations[a], strict=True)]).prod(0)
            logits = scale * reps[a] @ keys.T
            own = scale * (reps[a] * torch.stack(others).prod(0)).sum(1)
            logits = torch.where(torch.eye(n, dtype=torch.bool), own[:, None], logits)
            target = torch.arange(n)
        losses.append(F.cross_entropy(logits, target))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("block", [multilinear.BLOCK, 60, 1])
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_all_combinations_in_blocks_are_all_combinations(m, block, monkeypatch):
    monkeypatch.setattr(multilinear, "BLOCK", block)
    mine, theirs = ([x.clone().requires_grad_() for x in draw(m, 3, 5)] for _ in range(2))
    found, expected = fn.symile(mine, 4.0, "n_squared"), written_out(theirs, 4.0)
    found.backward()
    expected.backward()
    close(found.detach(), expected.detach(), 1e-9)
    for a, b in zip(mine, theirs, strict=True):
        close(a.grad, b.grad, 1e-9)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_shuffled_negatives_are_those_written_out(m):
    reps = draw(m, 6, 5)
    permutations = draw_permutations(m, 6, torch.Generator().manual_seed(3))
    close(fn.symile(reps, 3.0, "n", permutations), written_out(reps, 3.0, permutations), 1e-9)
    again = fn.symile(reps, 3.0, generator=torch.Generator().manual_seed(3))
    close(again, written_out(reps, 3.0, permutations), 1e-9)


def test_gradients_are_right():
    reps, scale = (
        [x.requires_grad_() for x in draw(3, 4, 3)],
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
    )
    permutations = draw_permutations(3, 4)
    for kind, rows in (("n", permutations), ("n_squared", None)):
        assert torch.autograd.gradcheck(lambda s, *r, k=kind, p=rows: fn.symile(r, s, k, p), (scale, *reps))


# ---------------------------------------------------------------------------------------------------------- the identities


def test_loss_satisfies_its_identities():
    reps = draw(3, 6, 8)
    assert fn.symile(reps, 0.0).item() == pytest.approx(math.log(6))
    assert fn.symile(reps, 0.0, "n_squared").item() == pytest.approx(2 * math.log(6))
    rows, coordinates = torch.randperm(6), torch.randperm(8)
    whole = fn.symile(reps, 5.0, "n_squared")
    close(fn.symile([x[rows] for x in reps], 5.0, "n_squared"), whole, 1e-9)
    close(fn.symile([x[:, coordinates] for x in reps], 5.0, "n_squared"), whole, 1e-9)
    close(fn.symile([-reps[0], reps[1], -reps[2]], 5.0, "n_squared"), whole, 1e-9)
    close(
        fn.symile([torch.zeros_like(reps[0]), *reps[1:]], 5.0, "n_squared"),
        torch.tensor(2 * math.log(6)).double(),
        1e-6,
    )


def test_two_modalities_are_clip():
    a, b = draw(2, 5, 4)
    s = torch.tensor(2.0, dtype=torch.float64)
    close(fn.symile([a, b], s.exp(), "n_squared"), fn.clip(a, b, s), 1e-9)
    close(fn.clip_pairwise_loss([a, b], s.exp()), fn.clip(a, b, s), 1e-9)
    straight = torch.arange(5).expand(2, 1, 5)
    close(fn.symile([a, b], s.exp(), "n", straight), fn.clip(a, b, s), 1e-9)


def test_memory_of_all_combinations_stays_below_their_number(monkeypatch):
    monkeypatch.setattr(multilinear, "BLOCK", 2**12)
    largest = 0
    reps = [x.requires_grad_() for x in draw(3, 40, 4)]

    def keep(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fn.symile(reps, 3.0, "n_squared").backward()
    assert largest < 40**3 / 4


# --------------------------------------------------------------------------------------------------------------- the edges


def test_edge_cases_have_their_values_or_raise_an_error():
    for negatives in ("n", "n_squared"):
        alone = [x.requires_grad_() for x in draw(3, 1, 4)]
        loss = fn.symile(alone, 3.0, negatives)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert all(x.grad.abs().max() < 1e-12 for x in alone)
        broken = draw(3, 4, 4)
        broken[1][2, 0] = math.nan
        assert fn.symile(broken, 3.0, negatives).isnan()
        half = [x.to(torch.bfloat16) for x in draw(3, 4, 4)]
        assert fn.symile(half, 3.0, negatives).dtype == torch.float32
    a, b, c = draw(3, 4, 5)
    with pytest.raises(ValueError, match=r"reps\[0\] and reps\[1\] .* alike"):
        fn.symile([a, b[:3], c], 1.0)
    with pytest.raises(ValueError, match="alike"):
        fn.symile([a, b[:, :2], c], 1.0)
    with pytest.raises(ValueError, match="at least two modalities, got 1"):
        fn.symile([a], 1.0)
    with pytest.raises(ValueError, match="empty batch"):
        fn.symile([a[:0], b[:0]], 1.0)
    with pytest.raises(ValueError, match="negatives must be"):
        fn.symile([a, b], 1.0, "n2")
    with pytest.raises(ValueError, match=r"\[anchors, others, n\] = \[3, 2, 4\], got \[3, 2, 3\]"):
        fn.symile([a, b, c], 1.0, "n", draw_permutations(3, 3))
    for wrong in (torch.zeros(3, 2, 4, dtype=torch.int64), draw_permutations(3, 4) - 1, draw_permutations(3, 4) > 1):
        with pytest.raises(ValueError, match=r"a permutation has every number of 0\.\.3 once"):
            fn.symile([a, b, c], 1.0, "n", wrong)
    drawn = draw_permutations(3, 4)
    assert fn.symile([a, b, c], 1.0, "n", drawn.int()) == fn.symile([a, b, c], 1.0, "n", drawn)
    for negatives in ("n", "n_squared"):
        with pytest.raises(ValueError, match=r"one floating type, got torch\.float32, torch\.float64"):
            fn.symile([a, b.float(), c], 1.0, negatives)
    with pytest.raises(ValueError, match="candidates and others must be of one floating type"):
        fn.mip_similarity(a.float(), [b, c])
    with pytest.raises(ValueError, match="shuffles nothing"):
        fn.symile([a, b, c], 1.0, "n_squared", draw_permutations(3, 4))
    with pytest.raises(ValueError, match=r"1000 in 8 modalities has 1000\^8 = 1.0e\+24 similarities"):
        fn.symile([torch.zeros(1000, 2)] * 8, 1.0, "n_squared")
    with pytest.raises(ValueError, match=r"candidates must be \[c, 5\]"):
        fn.mip_similarity(torch.zeros(3, 4).to(a), [a, b])
    with pytest.raises(ValueError, match="at least one modality"):
        fn.zeroshot_clip(a, [])


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_scale_of_logits_that_is_none_is_refused(scale, tensor):
    x = torch.eye(3)
    given = torch.tensor(scale) if tensor else scale
    calls = (
        lambda: fn.symile([x, x, x], given),
        lambda: fn.clip_pairwise_loss([x, x], given),
        lambda: fn.zeroshot_symile(x, [x, x], given),
        lambda: fn.zeroshot_clip(x, [x, x], given),
    )
    for call in calls:
        with pytest.raises(ValueError, match="logit_scale must be at least 0 and finite"):
            call()


# ---------------------------------------------------------------------------------------------------------------- training


def test_the_third_is_found_from_the_other_two(tmp_path):
    words = ["train", "symile", "--data", "xor?train=1024&test=200", "--epochs", "14", "--evaluate-every", "14"]
    words += ["--name", "run", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 0
    run = Run.open(tmp_path / "run")
    last = run.metrics()[-1]
    assert last["test/a_and_c_to_b_r1"] > 0.9
    assert last["test/c_to_b_r1"] < 0.3
    assert last["test/joint_recall"] > 0.9
    assert training.load_learner(run).log_scale.item() > -0.3


def test_the_claim_s_arms_differ_where_it_says():
    claim = of_system("symile")
    metrics = {arm: rehearse("symile", claim, arm) for arm in claim.arms}
    assert set(metrics) == {"clip", "symile"}
    assert all(0 <= found[claim.conjuncts[0].metric] <= 1 for found in metrics.values())


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"negatives": "n_squared"}, {"objective": "clip"}])
def test_pictures_words_and_numbers_with_some_missing_train(options):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8)
    words = [f"word{i % 5} and word{i % 3}" for i in range(40)]
    there = np.arange(40) % 4 > 0

    def split(part):
        columns = {"image": ArrayImages(pixels[part]), "text": words[part], "vector": rng.random((20, 5), np.float32)}
        return AlignedColumns(columns, presence={"vector": there[part]})

    kinds = {"image": Modality("image", size=8), "text": Modality("text"), "vector": Modality("vector", dim=5)}
    data = AlignedData("own", split(slice(20)), *[split(slice(20, 40))] * 2, kinds)
    config = SymileConfig(
        epochs=2,
        batch_size=5,
        image_encoder="conv-s",
        text_encoder="text-s",
        context=8,
        vocabulary=300,
        lr=1e-3,
        **options,
    )
    last = Experiment.resolve("symile", config=config).run(0, source=data)[-1]
    assert math.isfinite(last["train/loss"])
    assert 0 <= last["test/image_and_text_to_vector_r1"] <= 1
    assert 0 <= last["test/joint_recall"] <= 1


def test_what_is_missing_says_one_and_the_same():
    from types import SimpleNamespace

    facts = SimpleNamespace(modalities={name: {"kind": "vector", "dim": 3} for name in "abc"}, tokenizers={})
    learner = catalog.load_system("symile").learner(SymileConfig(), facts, 0)
    inputs = {name: torch.rand(4, 3) for name in "abc"}
    present = {name: torch.tensor([True, True, True, True]) for name in "abc"} | {
        "b": torch.tensor([1, 0, 0, 1]).bool()
    }
    found = learner.embed({"inputs": inputs, "present": present})
    torch.testing.assert_close(found["b"][1], found["b"][2])
    assert not torch.allclose(found["b"][0], found["b"][3])
