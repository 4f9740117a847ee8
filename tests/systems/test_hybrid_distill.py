"""Hybrid Distill: the source losses' numbers, the card's identities, dropping, two teachers, resuming, errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core import tokens as core
from counterpoint.encoders.vision_transformers import vit_s
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import hybrid_distill
from counterpoint.systems.distillation.hybrid_distill import HybridDistill
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "hybrid-distill.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
PARTS = ("q", "k", "v")


def arrays(prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    names = (name for name in PARITY.files if name.startswith(prefix))
    return {name.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[name])).to(dtype) for name in names}


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * max(1e-3, float(theirs.abs().max())))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@TYPES
@pytest.mark.parametrize("number", range(2))
def test_relations_loss_and_gradients_equal_tinymim(number, dtype, rtol):
    at = arrays(f"relation/case{number}/", dtype)
    student = [at[f"in/student_{part}"].clone().requires_grad_() for part in PARTS]
    teacher = [at[f"in/teacher_{part}"].clone().requires_grad_() for part in PARTS]
    for net, (q, k, v) in (("student", student), ("teacher", teacher)):
        close(fn.token_relations(q, k).detach(), at[f"out/{net}_qk"], rtol)
        close(fn.token_relations(v, v).detach(), at[f"out/{net}_vv"], rtol)
    loss = fn.relation_distillation_loss(student, teacher)
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    close(at["out/loss_qk"] + at["out/loss_vv"], at["out/loss"], rtol)
    for part, x in zip(PARTS, student, strict=True):
        close(x.grad, at[f"grad/student_{part}"], rtol)
    assert all(x.grad is None for x in teacher)


@TYPES
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("form", ["module", "tensors", "names"])
def test_feature_loss_and_gradients_equal_fd(number, form, dtype, rtol):
    at = arrays(f"feature/case{number}/", dtype)
    tokens = at["in/student_tokens"].clone().requires_grad_()
    weight, bias = (at[f"param/{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    projection: object = [weight, bias]
    if form == "names":
        projection = {"bias": bias, "weight": weight}
    if form == "module":
        module = nn.Linear(weight.shape[1], weight.shape[0]).to(dtype)
        module.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        projection, weight, bias = module, module.weight, module.bias
    loss = fn.feature_distillation_loss(tokens, at["in/teacher_tokens"], projection, float(at["param/beta"]))
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    for name, x in (("student_tokens", tokens), ("weight", weight), ("bias", bias)):
        close(x.grad, at[f"grad/{name}"], rtol)


# ------------------------------------------------------------------------------------------------------------ identities


def relation(student, teacher) -> float:
    return float(fn.relation_distillation_loss(student, teacher))


def test_relations_do_not_change_under_a_rotation_of_queries_and_keys_or_of_values():
    qkv, turn = [draw(n, 2, 3, 5, 4) for n in range(3)], torch.linalg.qr(draw(9, 4, 4)).Q
    assert relation(qkv, qkv) == 0
    assert abs(relation([qkv[0] @ turn, qkv[1] @ turn, qkv[2]], qkv)) < 1e-14
    assert abs(relation([qkv[0], qkv[1], qkv[2] @ turn], qkv)) < 1e-14
    assert relation([qkv[0] @ turn, qkv[1], qkv[2]], qkv) > 0.01


def test_a_uniform_student_loses_what_the_teachers_rows_lack_in_entropy():
    teacher = [draw(n, 2, 3, 5, 4) for n in range(3)]
    zeros = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    r = fn.token_relations(teacher[0], teacher[1])
    assert torch.allclose(fn.token_relations(zeros, zeros), torch.full_like(r, 0.2))
    wanted = math.log(5) + float(torch.xlogy(r, r).sum(-1).mean())
    assert relation([zeros, zeros, teacher[2]], teacher) == pytest.approx(wanted, rel=1e-12)


def test_a_permutation_of_all_tokens_leaves_the_relation_loss():
    student, teacher = ([draw(n + s, 2, 3, 5, 4) for n in range(3)] for s in (0, 5))
    order = [3, 1, 4, 0, 2]
    moved = [[x[:, :, order] for x in net] for net in (student, teacher)]
    assert relation(*moved) == pytest.approx(relation(student, teacher), rel=1e-12)


def test_a_relation_over_one_token_has_no_loss():
    assert relation([draw(n, 2, 3, 1, 4) for n in range(3)], [draw(n + 5, 2, 3, 1, 8) for n in range(3)]) == 0


def test_far_relations_stay_finite_in_value_and_gradient():
    student = [(100 * draw(n, 1, 1, 3, 4)).float().requires_grad_() for n in range(3)]
    loss = fn.relation_distillation_loss(student, [(100 * draw(n + 5, 1, 1, 3, 4)).float() for n in range(3)])
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(x.grad.isfinite().all()) for x in student)


def test_the_feature_target_does_not_change_with_scale_and_shift():
    tokens, weight, teacher = draw(0, 2, 4, 3), draw(1, 64, 3), draw(2, 2, 4, 64)
    plain = fn.feature_distillation_loss(tokens, teacher, weight)
    moved = fn.feature_distillation_loss(tokens, 7 * teacher - 3, weight)
    assert float(moved) == pytest.approx(float(plain), rel=1e-4)
    target = F.layer_norm(teacher, (64,))
    assert float(fn.feature_distillation_loss(target, teacher, torch.eye(64, dtype=torch.float64))) < 1e-20


@pytest.mark.parametrize(
    ("beta", "error", "wanted"),
    [(1.0, 1e-3, 5e-7), (1.0, 10.0, 9.5), (2.0, 1.0, 0.25), (2.0, 10.0, 9.0), (0.0, 3.0, 3.0)],
)
def test_a_constant_error_costs_its_square_and_then_its_size(beta, error, wanted):
    teacher = draw(0, 2, 3, 8)
    student = F.layer_norm(teacher, (8,)) + error
    loss = fn.feature_distillation_loss(student, teacher, torch.eye(8, dtype=torch.float64), beta)
    assert float(loss) == pytest.approx(wanted, rel=1e-9)


def test_distance_and_nmi_of_uniform_and_identical_attention():
    uniform, same = torch.full((2, 4, 9, 9), 1 / 9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    assert torch.allclose(fn.attention_distance(uniform, (3, 3)), torch.full((2, 4), 1.4533112733).double())
    assert fn.attention_distance(same, 3) == 0
    flat = sum(math.dist((i // 3, i % 3), (j // 3, j % 3)) for i in range(6) for j in range(6)) / 36
    assert float(fn.attention_distance(torch.full((6, 6), 1 / 6), (2, 3))) == pytest.approx(flat)
    assert torch.allclose(fn.attention_nmi(uniform), torch.zeros(2, 4).double())
    assert float(fn.attention_nmi(same)) == pytest.approx(1)
    assert float(fn.attention_nmi(same[torch.randperm(9)])) == pytest.approx(1)


def test_nmi_is_zero_where_all_attend_to_one_key_and_for_one_token():
    one = torch.zeros(4, 4).index_fill_(1, torch.tensor([2]), 1.0)
    assert fn.attention_nmi(one) == 0
    assert fn.attention_nmi(torch.ones(1, 1)) == 0


def test_half_certain_attention_has_the_nmi_of_its_table():
    attn = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    p = attn / 2
    key = p.sum(0)
    wanted = sum(float(p[i, j] * (p[i, j] / (0.5 * key[j])).log()) for i in range(2) for j in range(2))
    wanted /= math.sqrt(math.log(2) * -float((key * key.log()).sum()))
    assert float(fn.attention_nmi(attn)) == pytest.approx(wanted)


# --------------------------------------------------------------------------------------------------------------- dropping


@pytest.mark.parametrize("redundancy", ["mean", "max"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_least_redundant_patches_and_all_prefix_tokens_survive_in_order(redundancy, prefix):
    tokens = draw(0, 3, prefix + 7, 4)
    found = fn.drop_redundant_tokens(tokens, 0.5, prefix, redundancy)
    assert found.shape == (3, prefix + 4)
    for row, kept in zip(tokens[:, prefix:], found, strict=True):
        cosine = F.normalize(row, dim=1) @ F.normalize(row, dim=1).T
        others = cosine[~torch.eye(7, dtype=torch.bool)].view(7, 6)
        rho = others.mean(1) if redundancy == "mean" else others.amax(1)
        wanted = [
            *range(prefix),
            *(prefix + n for n in sorted(rho.round(decimals=12).argsort(stable=True)[:4].tolist())),
        ]
        assert kept.tolist() == wanted


def test_keeping_all_tokens_is_the_identity():
    assert fn.drop_redundant_tokens(draw(0, 2, 6, 4), 1.0, 1).tolist() == [list(range(6))] * 2


def test_two_equal_tokens_are_the_most_redundant_by_the_largest_cosine():
    tokens = torch.eye(5)[None].clone()
    tokens[0, 3] = tokens[0, 1]
    assert fn.drop_redundant_tokens(tokens, 0.6, 0, "max").tolist() == [[0, 2, 4]]


def test_a_blank_picture_keeps_the_first_patches_and_zero_tokens_have_no_cosine():
    blank = torch.full((2, 9, 48), 0.1)
    assert fn.drop_redundant_tokens(blank, 0.5, 1).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert fn.drop_redundant_tokens(0 * blank, 0.5, 1).tolist() == [[0, 1, 2, 3, 4]] * 2
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert fn.drop_redundant_tokens(tokens, 0.3, 0).tolist() == [[2]]


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"), [(16, 0.7, 12), (10, 0.7, 7), (100, 0.55, 55), (5, 1e-6, 1), (1, 0.3, 1)]
)
def test_the_number_kept_is_the_ceiling_of_the_share_and_at_least_one(tokens, ratio, kept):
    assert fn.drop_redundant_tokens(draw(0, 1, tokens, 4), ratio, 0).shape == (1, kept)
    assert core.kept_count(tokens, ratio) == kept


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.token_relations(draw(0, 1, 2, 3, 4), draw(0, 1, 2, 3, 5)), "q and k"),
        (lambda: fn.token_relations(draw(0, 2, 3, 4), draw(0, 2, 3, 4)), "q and k"),
        (lambda: relation([draw(0, 1, 2, 3, 4)] * 2, [draw(0, 1, 2, 3, 4)] * 3), "student_qkv must be three"),
        (lambda: relation([draw(0, 1, 2, 3, 4)] * 3, [draw(0, 1, 2, 4, 4)] * 3), "student_qkv and teacher_qkv"),
        (lambda: relation([draw(0, 1, 2, 3, 4)] * 3, [draw(0, 1, 3, 3, 4)] * 3), "heads"),
        (lambda: relation([draw(0, 0, 2, 3, 4)] * 3, [draw(0, 0, 2, 3, 4)] * 3), "student_qkv is an empty batch"),
        (lambda: fn.feature_distillation_loss(draw(0, 1, 2, 3), draw(0, 1, 3, 3), draw(0, 3, 3)), "student_tokens"),
        (lambda: fn.feature_distillation_loss(draw(0, 1, 2, 3), draw(0, 1, 2, 4), draw(0, 3, 3)), "projection"),
        (lambda: fn.feature_distillation_loss(draw(0, 1, 2, 3), draw(0, 1, 2, 4), lambda x: x), "projection must give"),
        (lambda: fn.feature_distillation_loss(draw(0, 1, 2, 3), draw(0, 1, 2, 3), draw(0, 3, 3), -1.0), "beta"),
        (lambda: fn.feature_distillation_loss(draw(0, 0, 2, 3), draw(0, 0, 2, 3), draw(0, 3, 3)), "empty batch"),
        (lambda: fn.drop_redundant_tokens(draw(0, 1, 2, 3), 0.0), "keep_ratio"),
        (lambda: fn.drop_redundant_tokens(draw(0, 1, 2, 3), 1.1), "keep_ratio"),
        (lambda: fn.drop_redundant_tokens(draw(0, 1, 2, 3), 0.5, 2), "tokens must be"),
        (lambda: fn.drop_redundant_tokens(draw(0, 1, 2, 3) * math.nan), "tokens holds NaN"),
        (lambda: fn.drop_redundant_tokens(draw(0, 1, 2, 3), 0.5, 0, "least"), "redundancy"),
        (lambda: fn.attention_distance(torch.eye(6), (2, 2)), "grid 2 x 2"),
        (lambda: fn.attention_nmi(draw(0, 2, 3)), "attn must be"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
KD = (
    "fit:kd?data=digits%3Fsize=8%26train=60%26held_out=0.05%26valid=0.05"
    "&encoder=vit-xs&kd_weight=0.0&teacher_epochs=0&epochs=1&batch_size=20&recipe=none"
)
MAE = (
    "fit:mae?data=digits%3Fsize=8%26train=60%26held_out=0.05%26valid=0.05"
    "&encoder=vit-xs&epochs=1&batch_size=20&decoder_width=12&decoder_heads=3&recipe=none"
)
SMALL = {
    "encoder": "vit-xs", "recipe": "digits-easy", "feature_teacher": KD, "relation_teacher": MAE, "batch_size": 16,
    "epochs": 2, "evaluate_every": 2, "warmup_epochs": 0, "bank": 60,
}  # fmt: skip


def built(data: str = DATA, seed: int = 0, begin: bool = True, **overrides):
    """Build a learner with its task and teachers."""
    experiment = Experiment.resolve("hybrid-distill", data, overrides=SMALL | overrides)
    task = experiment.task()
    learner = load_system("hybrid-distill").learner(experiment.config, SimpleNamespace(**task.facts), seed)
    if begin:
        learner.survey = Survey(task, learner)
        learner.begin(learner.survey)
    return learner, task


def prepared(learner, task):
    batch = next(iter(task.train_loader(0, learner.position)))
    return learner.prepare(batch, torch.Generator().manual_seed(0))


def watched(monkeypatch, name):
    calls, function = [], getattr(hybrid_distill, name)

    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(hybrid_distill, name, call)
    return calls


def test_a_step_trains_with_the_public_functions_on_the_surviving_tokens(monkeypatch):
    learner, task = built(epochs=1)
    relations, features, drops = (
        watched(monkeypatch, name)
        for name in ("relation_distillation_loss", "feature_distillation_loss", "drop_redundant_tokens")
    )
    fit(learner, task, bar=False)
    steps = 60 // 16
    assert (len(relations), len(features)) == (steps, steps)
    student, teacher = relations[0]
    # 16 patches: 12 before layer 0, 9 before layer 1, 7 before layer 2, the layer of the relations; and the class token.
    assert [x.shape for x in (*student, *teacher)] == [(16, 4, 1 + 7, 12)] * 6
    assert features[0][0].shape == features[0][1].shape == (16, 1 + 7, 48)
    assert [x[0].shape[1] for x in drops[:3]] == [17, 13, 10]


def test_student_and_teacher_are_compared_at_the_same_patches(monkeypatch):
    learner, task = built(keep_ratio=0.5)
    batch = prepared(learner, task)
    (features,) = [watched(monkeypatch, "feature_distillation_loss")]
    relations = watched(monkeypatch, "relation_distillation_loss")
    learner.loss(batch)
    inside = learner.look(batch["views"][0], [2])
    whole = learner.teachers["feature"](batch["views"][0]).tokens
    for n in range(16):
        places = [0, *(1 + inside.alive[n]).tolist()]
        assert torch.equal(features[0][1][n], whole[n, places])
        of_mae = learner.teachers["relation"](batch["views"][0], [2]).layers[2]
        assert torch.equal(relations[0][1][0][n], of_mae.query[n][:, [0, *(1 + inside.alive_at[2][n]).tolist()]])
    # The survivors' tokens are in the order of their numbers: without positions they would differ.
    assert bool((inside.alive.diff(dim=1) > 0).all())


def test_survivors_of_each_layer_are_among_those_before():
    learner, task = built(drop_layers=(0, 1, 3), keep_ratio=0.6)
    inside = learner.look(prepared(learner, task)["views"][0], [0, 1, 2, 3])
    sizes = [x.shape[1] for x in inside.alive_at.values()]
    assert sizes == [10, 6, 6, 4]
    for n in range(3):
        for small, large in zip(inside.alive_at[n + 1].tolist(), inside.alive_at[n].tolist(), strict=True):
            assert set(small) <= set(large)
    assert torch.equal(inside.alive, inside.alive_at[3])


def test_without_dropping_the_student_computes_what_its_encoder_does():
    learner, task = built(keep_ratio=1.0)
    (view,) = prepared(learner, task)["views"]
    learner.eval()
    inside = learner.look(view, [2])
    torch.testing.assert_close(inside.tokens, learner.encoder.tokens(view))
    assert inside.alive is None
    torch.testing.assert_close(learner.embed(view), learner.encoder.tokens(view)[:, 1:].mean(1))


def test_a_student_that_equals_its_teacher_has_no_relation_loss():
    learner, task = built(feature_weight=0.0, keep_ratio=0.6)
    learner.encoder.load_state_dict(learner.network_of("relation").encoder.state_dict())
    # Dropped tokens change later layers: only the relations before the first block are the teacher's.
    learner.relation_layers = [0]
    learner.drop_layers = [0]
    batch = prepared(learner, task)
    assert float(learner.loss(batch)["loss"].detach()) < 1e-6


@pytest.mark.parametrize("used", ["feature", "relation"])
def test_a_weight_of_zero_loads_and_calls_no_teacher(used):
    other = {"feature": "relation", "relation": "feature"}[used]
    learner, task = built(**{f"{other}_weight": 0.0, f"{other}_teacher": "run:nowhere"})
    assert list(learner.teachers) == [used]
    found = learner.loss(prepared(learner, task))
    assert set(found) == {"loss", used}
    assert set(learner.measures(learner.survey, "valid")) == {
        f"{prefix}{name}" for prefix in ("", f"{used}_teacher_") for name in ("nmi", "distance", "distance_spread")
    }


def test_a_learner_without_its_teachers_says_how_to_load_them():
    learner, task = built(begin=False)
    with pytest.raises(CounterpointError, match="feature teacher is not loaded"):
        learner.loss(prepared(learner, task))


def test_the_projector_starts_alike_whatever_was_drawn_before():
    weights = []
    for number in range(2):
        learner, task = built(begin=False)
        torch.manual_seed(number)  # a teacher that is fitted now draws, a kept one does not
        learner.begin(Survey(task, learner))
        weights.append(learner.projector.weight)
    assert torch.equal(*weights)


def test_drop_path_skips_layers_in_training_alone():
    learner, task = built(drop_path=0.9, keep_ratio=1.0)
    (view,) = prepared(learner, task)["views"]
    passes = [learner.train(mode).look(view).tokens for mode in (True, True, False, False)]
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(passes[2], passes[3])
    assert [block.drop_path1.drop_prob for block in learner.encoder.model.blocks] == pytest.approx([0, 0.3, 0.6, 0.9])


def test_weights_scale_the_terms():
    learner, task = built(feature_weight=0.5, relation_weight=3.0)
    found = learner.loss(prepared(learner, task))
    assert float(found["loss"].detach()) == pytest.approx(float(0.5 * found["feature"] + 3 * found["relation"]))
    assert float(found["relation"]) > 0


def test_a_deeper_teacher_of_another_width_and_other_heads_teaches(monkeypatch):
    learner, task = built(begin=False, relation_layers=(-2, 1))
    teachers = iter([vit_s(8, patch=2, width=30, depth=2, heads=3), vit_s(8, patch=2, width=40, depth=6, heads=5)])

    def made(setting, name, grid):
        network = hybrid_distill.TokenNetwork(next(teachers), name, 8)
        assert network.grid == grid
        return hybrid_distill.Frozen(network, name)

    monkeypatch.setattr(hybrid_distill, "token_teacher", made)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    relations = watched(monkeypatch, "relation_distillation_loss")
    found = learner.loss(prepared(learner, task))
    assert bool(found["loss"].isfinite())
    assert learner.projector.weight.shape == (30, 48)
    assert [learner.layer_of_teacher(n) for n in range(4)] == [0, 2, 3, 5]
    assert [x[0].shape[1:] for pair in relations for x in pair] == [(4, 10, 12), (4, 10, 10), (4, 8, 12), (4, 8, 10)]
    learner.config.relation_heads = 6
    with pytest.raises(CounterpointError, match=r"relation_heads: 6 heads do not divide.*choose one of 1, 2, 4, 8"):
        learner.heads()


@pytest.mark.parametrize(("kind", "classes"), [("CLIPVision", 1), ("SiglipVision", 0)])
def test_published_transformers_teach_with_a_class_token_where_both_have_one(kind, classes, tmp_path, monkeypatch):
    import transformers

    tiny = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    for name in (kind, "ViTMAE"):
        config = getattr(transformers, f"{name}Config")(**tiny)
        getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / name)
    teachers = {"feature_teacher": f"hf:{tmp_path / kind}", "relation_teacher": f"hf:{tmp_path / 'ViTMAE'}"}
    learner, task = built(**teachers, relation_heads=3)
    calls = {name: watched(monkeypatch, f"{name}_distillation_loss") for name in ("feature", "relation")}
    found = learner.loss(prepared(learner, task))
    assert bool(found["loss"].isfinite())
    assert calls["feature"][0][1].shape == (16, classes + 7, 24)
    assert [x.shape for net in calls["relation"][0] for x in net] == [(16, 3, 8, 16)] * 3 + [(16, 3, 8, 8)] * 3
    with pytest.raises(CounterpointError, match="relation_heads: 5 heads"):
        built(**teachers, relation_heads=5)


def test_one_picture_is_a_batch():
    learner, task = built(batch_size=1)
    assert float(learner.loss(prepared(learner, task))["loss"].detach()) > 0


def test_teachers_have_no_gradient_and_are_no_part_of_the_weights():
    learner, task = built()
    learner.loss(prepared(learner, task))["loss"].backward()
    for teacher in learner.teachers.values():
        assert all(p.grad is None and not p.requires_grad for p in teacher.module.parameters())
    assert {name.partition(".")[0] for name in learner.exported()} == {"encoder", "projector"}
    assert all(
        p.grad is not None for name, p in learner.named_parameters() if not name.startswith("encoder.model.blocks.3")
    )


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("hybrid-distill", DATA, overrides=SMALL).config
    run = need_equal_ends(
        monkeypatch, HybridDistill, "hybrid-distill", config, DATA, 4, tmp_path
    )  # in the second epoch
    assert "projector.weight" in run.load_weights()


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line_on_a_folder_with_runs_as_teachers_and_exports(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    data = ["--data", f"imagefolder:{tmp_path / 'pictures'}?size=16", "--out", str(tmp_path)]
    common = ["--encoder", "vit-s", "--batch-size", "12", "--epochs", "1", "--warmup-epochs", "0"]
    teacher = ["--decoder-width", "12", "--decoder-heads", "3", "--decoder-depth", "1", "--recipe", "mae"]
    assert cli.main(["train", "mae", *data, *common, *teacher, "--name", "mae"]) == 0
    runs = ["--feature-teacher", f"run:{tmp_path / 'mae'}", "--relation-teacher", f"run:{tmp_path / 'mae'}"]
    assert cli.main(["train", "hybrid-distill", *data, *common, *runs, "--name", "run"]) == 0
    run = Run.open(tmp_path / "run")
    row = run.metrics()[-1]
    assert {"train/feature", "train/relation", "test/nmi", "test/relation_teacher_nmi", "test/distance_spread"} <= set(
        row
    )
    assert row["test/feature_teacher_nmi"] == row["test/relation_teacher_nmi"]
    assert training.evaluate(run.path, say=lambda _: None)["nmi"] == row["test/nmi"]
    page = (run.path / "report.html").read_text()
    assert all(heading in page for heading in ("Distance of attention", "NMI of attention", "Surviving tokens"))
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "encoder.pt2")]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio must be > 0"),
        ({"feature_weight": 0.0, "relation_weight": 0.0}, "no teacher"),
        ({"relation_weight": -1.0}, "relation_weight must be at least 0"),
        ({"transition": math.nan}, "transition"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
        ({"relation_layers": ()}, "relation_layers must name"),
        ({"relation_layers": (4,)}, "relation_layers must name layers 0 to 3 of --encoder vit-xs"),
        ({"relation_layers": (2, -2)}, "relation_layers must name .* each once"),
        ({"drop_layers": (-5,)}, "drop_layers must name layers 0 to 3"),
        ({"relation_heads": 5}, "relation_heads: 5 heads do not divide"),
        ({"encoder": "conv-s"}, "--encoder conv-s is no plain vision transformer"),
        ({"feature_teacher": "dino"}, "--feature-teacher: unknown teacher 'dino'"),
        ({"relation_teacher": "torchvision:vit_b_16"}, "--relation-teacher: unknown teacher"),
        ({"relation_teacher": MAE.replace("vit-xs", "vit-s")}, "--relation-teacher fit:mae.* 2 x 2 patches, the student into 4"),
        ({"feature_teacher": KD.replace("vit-xs", "conv-s")}, "--feature-teacher fit:kd.*its encoder is no plain vision"),
        ({"feature_teacher": "run:nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_defaults_are_the_paper_s():
    config = load_system("hybrid-distill").config()
    assert (config.feature_weight, config.relation_weight, config.epochs) == (1, 1, 300)
    learner = load_system("hybrid-distill").learner
    assert learner is HybridDistill
