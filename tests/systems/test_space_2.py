"""SPACE-2: the authors' numbers, identities of tree and contrast, data, training, resuming, processes, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core import set_scores
from counterpoint.systems.language import space_2

PARITY = np.load(Path(__file__).parents[1] / "parity" / "space-2.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def of_case(name: str, dtype: torch.dtype | None = None) -> Tensor:
    found = torch.from_numpy(np.asarray(PARITY[name]))
    return found if dtype is None else found.to(dtype)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_frames(seed: int, n: int, rows: int = 3, names: int = 4) -> Tensor:
    """Draw frames with defaults, absent levels, repeated paths and empty frames."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, names, (n, rows, 4), generator=generator)
    frames[..., 2:] += 1
    depth = torch.randint(0, 5, (n, rows, 1), generator=generator)
    frames = frames.masked_fill(torch.arange(4) >= depth, -1)
    return torch.where(depth == 0, -2, frames)


# ------------------------------------------------------------------------------------------------- the authors' numbers


def test_scores_of_frames_equal_the_authors():
    frames = of_case("case0/in/frames")
    torch.testing.assert_close(fn.tree_scores(frames), of_case("case0/out/scores"), rtol=1e-9, atol=0)
    found = fn.combined_tree_score(frames)
    torch.testing.assert_close(found, of_case("case0/out/combined_score"), rtol=1e-9, atol=0)


@TYPES
def test_the_contrast_of_each_view_and_its_gradient_equal_the_authors(dtype, rtol):
    features = of_case("case1/in/features_raw", dtype).requires_grad_()
    scores = of_case("case1/in/scores", dtype)
    losses = [
        fn.soft_supcon(features[:, :, k], scores[k], float(of_case("case1/param/temperature"))) for k in range(10)
    ]
    loss = torch.stack(losses)
    torch.testing.assert_close(loss.detach(), of_case("case1/out/loss_per_view", dtype), rtol=rtol, atol=0)
    loss.mean().backward()
    torch.testing.assert_close(loss.mean().detach(), of_case("case1/out/loss_tree", dtype), rtol=rtol, atol=0)
    wanted = of_case("case1/grad/features_raw", dtype)
    torch.testing.assert_close(features.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    own = torch.stack([fn.soft_supcon(features[:, :, k].detach()) for k in range(10)]).mean()
    torch.testing.assert_close(own, of_case("case1/out/loss_self", dtype), rtol=1e-6, atol=0)  # theirs is float32


@TYPES
def test_the_contrast_from_frames_equals_the_authors_with_their_scores(dtype, rtol):
    features = of_case("case1/in/features_raw", dtype).requires_grad_()
    loss = fn.tree_contrast(features, of_case("case0/in/frames"))
    loss.backward()
    torch.testing.assert_close(loss.detach(), of_case("case1/out/loss_tree", dtype), rtol=rtol, atol=0)
    wanted = of_case("case1/grad/features_raw", dtype)
    torch.testing.assert_close(features.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@TYPES
def test_r_drop_and_its_gradients_equal_the_authors(dtype, rtol):
    logits = [of_case(f"case2/in/logits_{n}", dtype).requires_grad_() for n in (1, 2)]
    loss = fn.r_drop(*logits)
    loss.backward()
    torch.testing.assert_close(loss.detach(), of_case("case2/out/loss", dtype), rtol=rtol, atol=0)
    for n, ours in enumerate(logits, 1):
        wanted = of_case(f"case2/grad/logits_{n}", dtype)
        torch.testing.assert_close(ours.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------------ tree


def sets_of(frame: list[list[int]], view: str) -> set[tuple[int, ...]]:
    at = ["DISV".index(level) for level in view]
    return {key for row in frame if min(key := tuple(row[n] for n in at)) > 0}


def test_scores_are_the_jaccard_similarities_of_sets():
    frames = drawn_frames(0, 40)
    found = fn.tree_scores(frames)
    for k, view in enumerate(space_2.VIEWS):
        sets = [sets_of(frame, view) for frame in frames.tolist()]
        wanted = [[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets]
        torch.testing.assert_close(found[k], torch.tensor(wanted, dtype=torch.float64).fill_diagonal_(1))


def test_the_combined_score_is_the_mean_over_views_with_elements():
    frames = drawn_frames(1, 40)
    found = fn.combined_tree_score(frames)
    rows = [{tuple(row) for row in frame if row[0] >= 0} for frame in frames.tolist()]
    for a in range(40):
        for b in range(40):
            if a == b:
                continue
            scores = []
            for view in space_2.VIEWS:
                one, other = (sets_of(frames[n].tolist(), view) for n in (a, b))
                scores += [len(one & other) / len(one | other)] if one | other else []
            same = rows[a] == rows[b] and bool(rows[a])
            wanted = 1.0 if same else sum(scores) / max(1, len(scores))
            assert float(found[a, b]) == pytest.approx(wanted), (a, b)


def test_a_frame_with_an_intent_alone_has_positives_in_three_views():
    found = fn.tree_scores(torch.tensor([[[1, 2, -1, -1]], [[1, 2, -1, -1]]]))[:, 0, 1]
    assert dict(zip(space_2.VIEWS, found.tolist(), strict=True)) == {
        view: float(view in ("D", "I", "DI")) for view in space_2.VIEWS
    }


def test_frames_score_zero_with_an_empty_one_and_defaults_leave_their_elements_out():
    frames = torch.tensor([[[1, 1, 1, 1]], [[-2, -2, -2, -2]], [[0, 1, 1, 1]], [[0, 0, -1, -1]], [[0, 0, -1, -1]]])
    found = fn.tree_scores(frames)
    assert float(found[:, 0, 1].max()) == 0
    shared = [view for view, score in zip(space_2.VIEWS, found[:, 0, 2].tolist(), strict=True) if score]
    assert shared == ["I", "S", "V", "IS", "SV", "ISV"]
    combined = fn.combined_tree_score(frames)
    assert combined[0, 1] == 0
    assert combined[3, 4] == 1  # equal frames, though no view has an element


def test_one_name_on_two_levels_and_under_two_intents():
    frames = torch.tensor([[[1, 1, 5, 9]], [[1, 2, 5, 9]]])
    found = dict(zip(space_2.VIEWS, fn.tree_scores(frames)[:, 0, 1].tolist(), strict=True))
    assert {view for view, score in found.items() if score} == {"D", "S", "V", "SV"}


# -------------------------------------------------------------------------------------------------------------- contrast


def plain(features: Tensor, weights: Tensor, temperature: float) -> Tensor:
    e = torch.nn.functional.normalize(features, dim=2)
    e = torch.cat([e[:, 0], e[:, 1]])
    off = ~torch.eye(len(e), dtype=torch.bool)
    logits = (e @ e.T / temperature).masked_fill(~off, -torch.inf)
    logs = logits.log_softmax(1).masked_fill(~off, 0)
    m = weights.repeat(2, 2) * off
    return temperature / 0.07 * -((m * logs).sum(1) / m.sum(1)).mean()


def test_weights_of_any_kind_give_the_plain_formula():
    features, weights = draw(0, 7, 2, 5).requires_grad_(), draw(1, 7, 7).abs()
    found = fn.soft_supcon(features, weights, 0.3)
    wanted = plain(features, weights, 0.3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (found, wanted)))


@pytest.mark.parametrize(
    "made", [space_2.combined_scores, space_2.equal_scores, lambda f: space_2.view_scores(f, "IS")]
)
def test_scores_in_tiles_give_the_same_as_their_matrix(made, monkeypatch):
    features, scores = draw(0, 60, 2, 5).requires_grad_(), made(drawn_frames(2, 60))
    by_matrix = fn.soft_supcon(features, scores.dense())
    (wanted,) = torch.autograd.grad(by_matrix, features)
    monkeypatch.setattr(space_2, "FEW", 0)
    monkeypatch.setattr(set_scores, "TILE", 7)
    by_tiles = fn.soft_supcon(features, scores)
    torch.testing.assert_close(by_tiles, by_matrix)
    torch.testing.assert_close(torch.autograd.grad(by_tiles, features)[0], wanted)


def test_no_weights_give_nt_xent_and_labels_give_supcon():
    features, labels = draw(0, 8, 2, 5), torch.arange(8) % 3
    z = [features[:, n] for n in (0, 1)]
    torch.testing.assert_close(fn.soft_supcon(features, temperature=0.07), fn.of("simclr").nt_xent(*z, 0.07))
    unit = torch.nn.functional.normalize(features, dim=2)
    equal = (labels[:, None] == labels).double()
    torch.testing.assert_close(fn.soft_supcon(features, equal, 0.2), fn.supcon(unit, labels, 0.2, 0.07))
    frames = torch.stack([labels + 1, labels + 1, labels + 1, labels + 1], 1)[:, None]
    torch.testing.assert_close(
        fn.tree_contrast(features[:, :, None].expand(8, 2, 10, 5), frames, 0.2), fn.supcon(unit, labels, 0.2, 0.07)
    )


def test_known_values():
    orthonormal = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, 2)
    wanted = 0.2 / 0.07 * np.log(1 + 2 * np.exp(-1 / 0.2))
    assert float(fn.soft_supcon(orthonormal, torch.eye(2).double(), 0.2)) == pytest.approx(wanted)
    assert float(fn.soft_supcon(draw(0, 1, 2, 4), torch.ones(1, 1).double())) == pytest.approx(0, abs=1e-12)
    same = torch.ones(5, 2, 3).double()
    assert float(fn.soft_supcon(same, draw(0, 5, 5).abs())) == pytest.approx(np.log(9))


def test_a_row_of_weights_times_a_constant_changes_nothing():
    features, weights = draw(0, 6, 2, 4), draw(1, 6, 6).abs()
    scaled = weights * torch.arange(1, 7)[:, None]
    torch.testing.assert_close(fn.soft_supcon(features, scaled), fn.soft_supcon(features, weights))


def test_frames_alone_have_no_positive_but_their_twin():
    features = draw(0, 6, 2, 10, 4)
    empty = torch.full((6, 1, 4), -2)
    each = [fn.soft_supcon(features[:, :, k]) for k in range(10)]
    torch.testing.assert_close(fn.tree_contrast(features, empty), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fn.tree_scores(torch.zeros(2, 3, 4)), "frames must be whole numbers"),
        (lambda: fn.tree_scores(torch.zeros(2, 4, dtype=torch.int64)), "frames must be whole numbers"),
        (lambda: fn.soft_supcon(draw(0, 3, 4)), "features must be"),
        (lambda: fn.soft_supcon(draw(0, 0, 2, 4)), "empty batch"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), draw(1, 3, 2)), "weights must be"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), -torch.eye(3)), "at least 0, and above 0 on the diagonal"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), temperature=0.0), "temperature must be"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), space_2.equal_scores(drawn_frames(0, 4))), "scores of 3 examples"),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 9, 4), drawn_frames(0, 3)), "with 10 views"),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 10, 4), drawn_frames(0, 2)), "a frame for each"),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 1, 4), drawn_frames(0, 3), views=["DV"]), "views must be of D, I"),
        (lambda: fn.r_drop(draw(0, 3, 4), draw(1, 3, 5)), "logits_1 and logits_2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
