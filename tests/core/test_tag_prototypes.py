"""Several labels a picture: the step against the authors' formulas written as loops, its gradient, prototypes, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.noisy_labels import judged_tags
from counterpoint.core.prototypes import moved_tag_prototypes
from counterpoint.core.tag_prototypes import TagHeads

N, CLASSES, LOW, KEYS, DIM = 6, 3, 4, 10, 5


def case(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    torch.manual_seed(seed)
    heads = TagHeads(LOW, CLASSES).double().requires_grad_(False)
    tags = torch.randint(0, 2, (N, CLASSES), generator=g)
    tags[0, 1] = -1
    return {
        "logits": 3 * normal(N, CLASSES), "z": F.normalize(normal(N, LOW)), "z_key": F.normalize(normal(N, LOW)),
        "feature": normal(N, DIM), "reconstructed": normal(N, DIM), "tags": tags,
        "trusted": torch.rand(N, CLASSES, generator=g) > 0.8, "queue": F.normalize(normal(LOW, KEYS), dim=0),
        "prototypes": F.normalize(normal(CLASSES, 2, LOW), dim=2), "heads": heads,
        "present_weight": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), "threshold": 0.8, "temperature": 0.5,
    }  # fmt: skip


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def looped(given: dict[str, Any], alpha: float = 0.5, beta: float = 0.1) -> dict[str, Any]:
    """Compute the losses label by label."""
    heads, t, weight = given["heads"], given["temperature"], given["present_weight"].tolist()
    queue = torch.cat([given["z_key"].T, given["queue"][:, N:]], 1)  # the oldest keys leave

    def mapped(z: Tensor, k: int) -> Tensor:
        return F.normalize(heads.weight[k] @ z + heads.bias[k], dim=0)

    def present(z: Tensor, k: int) -> tuple[float, float]:
        a, b = (float(mapped(z, k) @ given["prototypes"][k, side]) / t for side in (0, 1))
        return math.exp(b) / (math.exp(a) + math.exp(b)), math.exp(a) / (math.exp(a) + math.exp(b))

    labels, sums = given["tags"].clone(), dict.fromkeys(("cls", "low", "proto"), 0.0)
    rows = []
    for i in range(N):
        z, terms = given["z"][i], dict.fromkeys(sums, 0.0)
        similarity = [min(max(float(z @ u), 0), 1) + 1e-7 for u in queue.T]
        for k in range(CLASSES):
            score = alpha * sigmoid(float(given["logits"][i, k])) + (1 - alpha) * present(z, k)[0]
            tag = int(given["tags"][i, k])
            new = tag if (tag == 1 and score >= 1 / CLASSES) or (tag == 0 and 1 - score >= 1 / CLASSES) else -1
            if score >= given["threshold"]:
                new = 1
            if 1 - score >= given["threshold"]:
                new = 0
            labels[i, k] = new = tag if given["trusted"][i, k] else new
            if new < 0:
                continue
            low = float(heads.score[k] @ mapped(z, k))
            soft = [
                alpha * sigmoid(float(heads.score[k] @ mapped(u, k))) + (1 - alpha) * present(u, k)[0] for u in queue.T
            ]
            target = sum(r * s for r, s in zip(similarity, soft, strict=True)) / sum(similarity)

            def binary(x: float, new: int = new, w: float = weight[k]) -> float:
                return -w * math.log(sigmoid(x)) if new else -math.log(1 - sigmoid(x))

            terms["cls"] += binary(float(given["logits"][i, k]))
            terms["low"] += (1 - beta) * binary(low) - beta * target * math.log(sigmoid(low))
            yes, no = present(z, k)
            terms["proto"] -= math.log(yes) * sum(weight) / CLASSES if new else math.log(no)
        if (labels[i] >= 0).any():
            rows.append(i)
            sums = {name: sums[name] + terms[name] for name in sums}
    found: dict[str, Any] = {f"loss_{name}": value / (len(rows) * CLASSES) for name, value in sums.items()}
    found["loss_lowdim"] = found.pop("loss_low")
    found["loss_reconstruct"] = float(((given["reconstructed"] - given["feature"]) ** 2)[rows].mean())
    return found | {"new_label": labels}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_equals_the_formulas_label_by_label(seed):
    given = case(seed)
    found, wanted = fn.capro_tags_step(**given), looped(given)
    assert torch.equal(found["new_label"], wanted.pop("new_label"))
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name
    total = sum(float(found[name]) for name in found if name.startswith("loss_"))
    assert float(found["loss"]) == pytest.approx(total)


def test_the_gradient_equals_finite_differences():
    given = case()
    through = ("logits", "z", "reconstructed")

    def loss(*args: Tensor) -> Tensor:
        # Soft labels depend on z without gradient.
        return fn.capro_tags_step(**(given | dict(zip(through, args, strict=True)) | {"beta": 0.0}))["loss"]

    assert torch.autograd.gradcheck(loss, [given[name].clone().requires_grad_() for name in through])


def test_warm_up_has_no_prototypes():
    found = fn.capro_tags_step(**(case() | {"prototypes": None}))
    assert float(found["loss_proto"]) == 0
    assert found["prototypes_after"] is None
    assert torch.equal(found["new_label"], case()["tags"])


def test_a_batch_without_a_known_label_has_its_instance_contrast_alone():
    given = case() | {
        "tags": torch.full((N, CLASSES), -1),
        "logits": torch.zeros(N, CLASSES).double(),
        "threshold": 1.0,
    }
    found = fn.capro_tags_step(**(given | {"trusted": torch.zeros(N, CLASSES, dtype=torch.bool)}))
    assert not found["kept"].any()
    torch.testing.assert_close(found["loss"], found["loss_inst"])
    torch.testing.assert_close(found["prototypes_after"], given["prototypes"])


def test_both_prototypes_of_a_class_move_by_their_rows_in_order():
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(5, 2, 3, generator=g, dtype=torch.float64), dim=2)
    tags = torch.tensor([[0, 1], [1, -1], [0, 1], [1, 0], [-1, 1]])
    start = F.normalize(torch.randn(2, 2, 3, generator=g, dtype=torch.float64), dim=2)
    wanted = start.clone()
    for row, own in zip(rows, tags.tolist(), strict=True):
        for k, tag in enumerate(own):
            if tag >= 0:
                wanted[k, tag] = 0.7 * wanted[k, tag] + 0.3 * row[k]
    torch.testing.assert_close(moved_tag_prototypes(start, rows, tags, 0.7), F.normalize(wanted, dim=2))


def test_one_trusted_label_is_kept_alone():
    score, tags = torch.tensor([[0.99, 0.99]]), torch.tensor([[0, 0]])
    assert judged_tags(score, tags, 0.9, torch.tensor([[True, False]])).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="trusted must be"):
        judged_tags(score, tags, 0.9, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 2.0}, "beta"),
        ({"z": torch.ones(3, LOW).double()}, "z and z_key"),
        ({"tags": torch.zeros(N, 2, dtype=torch.long)}, "logits and tags"),
        ({"queue": torch.ones(3, KEYS).double()}, "queue is"),
        ({"prototypes": torch.ones(CLASSES, LOW).double()}, "prototypes must be"),
        ({"present_weight": torch.ones(2).double()}, "present_weight"),
    ],
)
def test_bad_arguments_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        fn.capro_tags_step(**(case() | change))
