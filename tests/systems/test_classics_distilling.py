"""The losses of taught classics against their direct forms; their parity is in test_classics_functions.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core import listed
from counterpoint.core.distil import kd
from counterpoint.core.world import leave, over
from counterpoint.systems.classics import rkd as rkd_room
from counterpoint.systems.classics.attention_transfer import attention_transfer
from counterpoint.systems.classics.crd import CRDLoss, crd
from counterpoint.systems.classics.fitnets import feature_mse, hint_regressor
from counterpoint.systems.classics.mean_teacher import mean_teacher
from counterpoint.systems.classics.rkd import rkd, rkd_angle, rkd_distance


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES = {
    "kd": (kd, (4, 3), (4, 3)),
    "feature_mse": (feature_mse, (4, 3, 2), (4, 3, 2)),
    "attention_transfer": (attention_transfer, (2, 3, 4, 4), (2, 5, 2, 2)),
    "attention_transfer_odd": (lambda s, t: attention_transfer(s, t, power=3), (2, 3, 2, 4), (2, 5, 4, 3)),
    "rkd_distance": (rkd_distance, (5, 3), (5, 2)),
    "rkd_angle": (rkd_angle, (5, 3), (5, 2)),
    "mse": (lambda s, t: mean_teacher(s, t).mse, (4, 3), (4, 3)),
    "kl": (lambda s, t: mean_teacher(s, t).kl, (4, 3), (4, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_and_the_teacher_has_none(name):
    loss, *shapes = LOSSES[name]
    student, teacher = (draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    loss, *shapes = LOSSES[name]
    student, teacher = (draw(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes))
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), loss(student.double(), teacher.double()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_never_a_number_again(name, side):
    loss, *shapes = LOSSES[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs[side].view(-1)[0] = math.nan
    assert loss(*inputs).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kd(draw(2, 3), draw(2, 4)), "student and teacher"),
        (lambda: kd(draw(0, 3), draw(0, 3)), "student is an empty batch"),
        (lambda: kd(draw(2, 3), draw(2, 3), 0.0), "temperature"),
        (lambda: feature_mse(draw(2, 3), draw(2, 3, 1)), "student and teacher"),
        (lambda: attention_transfer(draw(2, 3, 4), draw(2, 3, 4)), "student and teacher"),
        (lambda: attention_transfer(draw(2, 3, 4, 4), draw(2, 3, 4, 4), 0), "power"),
        (lambda: rkd(draw(2, 3), draw(3, 3)), "student and teacher"),
        (lambda: mean_teacher(draw(2, 3), draw(2, 4)), "student and teacher"),
        (lambda: hint_regressor((3, 4, 4), (3, 5, 4)), "no regressor"),
        (lambda: hint_regressor((3, 4, 4), (3,)), "student"),
        (lambda: CRDLoss(2, 2, 4, K=0), "K"),
        (lambda: CRDLoss(2, 2, 4, labels=torch.zeros(3)), "labels"),
        (lambda: CRDLoss(2, 2, 4, labels=torch.zeros(4)), "one class"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_losses_satisfy_their_identities():
    x = draw(5, 3)
    assert kd(x, x + 2).item() == pytest.approx(0, abs=1e-12)
    assert mean_teacher(x, x + 1).mse.item() == pytest.approx(0, abs=1e-12)
    assert feature_mse(x, x + 1).item() == pytest.approx(1)
    rotation = torch.linalg.qr(draw(3, 3, seed=1)).Q
    for offset in (0, 1e3):
        out = rkd(x, 3 * x @ rotation + offset)
        assert out.loss.item() == pytest.approx(0, abs=1e-9)
    maps = draw(2, 3, 4, 4)
    torch.testing.assert_close(attention_transfer(2 * maps, maps), torch.tensor(0.0).double())
    assert kd(1e4 * x, -1e4 * x).isfinite()
    assert mean_teacher(x, x, rampup_length=0, epochs=3).ramp.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relations_of_coinciding_points_have_finite_gradients(dtype):
    equal = torch.full((4, 3), 0.3, dtype=dtype, requires_grad=True)
    spread = draw(4, 2).to(dtype)
    for student, teacher in ((equal, equal), (equal[:1], spread[:1]), (equal[:1], equal[:1])):
        out = rkd(student, teacher)
        (gradient,) = torch.autograd.grad(out.loss, equal)
        assert out.loss == 0
        assert (gradient == 0).all()
    out = rkd(equal, spread)  # all pairs equally far apart, no angle anywhere
    (gradient,) = torch.autograd.grad(out.loss, equal)
    assert (gradient == 0).all()
    torch.testing.assert_close(out.distance, direct_distance(equal, spread), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.angle, direct_angle(equal, spread), rtol=1e-5, atol=1e-7)
    twins = torch.cat([draw(2, 3), draw(2, 3)]).to(dtype).requires_grad_()
    rkd(twins, spread).loss.backward()
    assert twins.grad.isfinite().all()


def direct_distance(student, teacher):
    def relative(x):
        square = (x[:, None] - x).square().sum(2).clamp(min=1e-12)
        distance = square.sqrt().masked_fill(torch.eye(len(x)).bool(), 0.0)
        return distance / distance[distance > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


def direct_angle(student, teacher):
    def angles(x):
        directions = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(directions, directions.mT)

    return F.smooth_l1_loss(angles(student), angles(teacher))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 400))
def test_relations_in_blocks_are_the_direct_form(n, dim, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rkd_room, "BLOCK", block)
        student, teacher = draw(n, dim, seed=n).requires_grad_(), draw(n, 3, seed=block)
        for function, direct in ((rkd_angle, direct_angle), (rkd_distance, direct_distance)):
            found, expected = function(student, teacher), direct(student, teacher)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


def test_a_common_offset_costs_the_distances_no_precision():
    student, teacher = draw(6, 4).float(), draw(6, 4, seed=1).float()
    expected = rkd_distance(student, teacher)
    torch.testing.assert_close(rkd_distance(student + 100, teacher - 50), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 8, 8), (5, 8, 8)), ((3, 8, 8), (5, 4, 4)), ((3, 4, 6), (5, 8, 12)), ((3, 9, 7), (5, 5, 7)), ((3,), (5,))],
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_regressors_reach_the_teachers_shape(student, teacher, kernel):
    assert hint_regressor(student, teacher, kernel=kernel)(torch.randn(2, *student)).shape == (2, *teacher)


# ---------------------------------------------------------------------------------------------------------------------- CRD


def unit(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=1)


def direct_crd(student, teacher, memory_student, memory_teacher, contrast, temperature, z):
    total, negatives = 0, contrast.shape[1] - 1
    noise = negatives / len(memory_student)
    for v, memory, constant in ((student, memory_teacher, z[0]), (teacher, memory_student, z[1])):
        h = torch.exp((memory[contrast] * v[:, None]).sum(2) / temperature) / constant
        terms = (h[:, :1] / (h[:, :1] + noise + 1e-7)).log().sum() + (noise / (h[:, 1:] + noise + 1e-7)).log().sum()
        total = total - terms / len(v)
    return total


def crd_inputs(n=3, samples=11, dim=4, k=5):
    g = torch.Generator().manual_seed(0)
    index = torch.randperm(samples, generator=g)[:n]
    contrast = torch.cat([index[:, None], torch.randint(samples, (n, k), generator=g)], 1)
    student, teacher = unit(n, dim).requires_grad_(), unit(n, dim, seed=1).requires_grad_()
    return student, teacher, unit(samples, dim, seed=2), unit(samples, dim, seed=3), index, contrast


@pytest.mark.parametrize("samples", [11, 400])  # with the whole memory at once, or with the rows that are listed
@pytest.mark.parametrize("block", [1, 2**20])
def test_crd_is_its_formula(samples, block, monkeypatch):
    monkeypatch.setattr(listed, "BLOCK", block)
    student, teacher, memory_student, memory_teacher, index, contrast = inputs = crd_inputs(samples=samples)
    assert listed._fetched(memory_student, contrast) == (samples == 400)
    z = (torch.tensor(50.0).double(), torch.tensor(80.0).double())
    out = crd(*inputs, Z_student=z[0], Z_teacher=z[1])
    expected = direct_crd(student, teacher, memory_student, memory_teacher, contrast, 0.07, z)
    torch.testing.assert_close(out.loss, expected)
    found, right = (torch.autograd.grad(value, (student, teacher)) for value in (out.loss, expected))
    torch.testing.assert_close(found, right)
    torch.testing.assert_close((out.Z_student, out.Z_teacher), z)
    first = crd(*inputs, temperature=0.5)
    products = torch.exp((memory_teacher[contrast] * student[:, None]).sum(2) / 0.5)
    torch.testing.assert_close(first.Z_student, products.mean().detach() * samples)
    assert torch.equal(first.memory_student[index], out.memory_student[index])
    untouched = [i for i in range(samples) if i not in index]
    assert torch.equal(out.memory_student[untouched], memory_student[untouched])


def test_crd_stays_finite_where_the_exponential_would_not():
    student, teacher, *rest = crd_inputs()
    out = crd(student.float(), teacher.float(), *(x.float() for x in rest[:2]), *rest[2:], temperature=1e-3)
    out.loss.backward()
    assert out.loss.isfinite()
    assert student.grad.isfinite().all()
    student, teacher, *rest = crd_inputs()
    assert crd(student * math.nan, teacher, *rest).loss.isnan()


def test_crd_names_what_does_not_fit():
    student, teacher, memory_student, memory_teacher, index, contrast = crd_inputs()
    memories = (memory_student, memory_teacher)
    for arguments, options, message in (
        ((student, teacher[:2], *memories, index, contrast), {}, "student and teacher"),
        (
            (student, teacher, memory_student, memory_teacher[:5], index, contrast),
            {},
            "memory_student and memory_teacher",
        ),
        ((student, teacher, memory_student[:, :2], memory_teacher[:, :2], index, contrast), {}, "dim differs"),
        ((student, teacher, *memories, index[:2], contrast), {}, "index"),
        ((student, teacher, *memories, index, contrast[:, :1]), {}, "contrast_index"),
        ((student, teacher, *memories, index, contrast.roll(1, 0)), {}, "first column"),
        ((student, teacher, *memories, index + 11, contrast + 11), {}, "must lie in 0..10"),
        ((student, teacher, *memories, index, contrast), {"temperature": 0}, "temperature"),
        ((student, teacher, *memories, index, contrast), {"momentum": 2}, "momentum"),
        ((student, teacher, *memories, index, contrast), {"n_data": 12}, "n_data"),
        ((student, teacher, *memories, index, contrast), {"K": 4}, "K 4"),
    ):
        with pytest.raises(ValueError, match=message):
            crd(*arguments, **options)


def test_the_module_does_what_the_function_does_and_remembers():
    module = CRDLoss(6, 7, n_data=9, dim=4, K=5, seed=3).double()
    features = draw(3, 6), draw(3, 7, seed=1).requires_grad_()
    index = torch.tensor([4, 0, 8])
    constants = {}
    for step in range(2):
        others = module.draw(index, torch.Generator().manual_seed(step))
        embedded = [
            F.normalize(embed(x), dim=1)
            for embed, x in zip((module.embed_student, module.embed_teacher), features, strict=True)
        ]
        memories = module.memory_student.rows.clone(), module.memory_teacher.rows.clone()
        expected = crd(*embedded, *memories, index, others, 0.07, 0.5, **constants)
        constants = {"Z_student": expected.Z_student, "Z_teacher": expected.Z_teacher}
        loss = module(*features, index, others)
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(module.memory_student.rows, expected.memory_student)
        torch.testing.assert_close(module.memory_teacher.rows, expected.memory_teacher)
        torch.testing.assert_close(module.z, torch.stack([expected.Z_student, expected.Z_teacher]))
        found, right = (torch.autograd.grad(x, list(module.parameters())) for x in (loss, expected.loss))
        torch.testing.assert_close(found, right)
    assert features[1].grad is None
    resumed = CRDLoss(6, 7, n_data=9, dim=4, K=5).double()
    resumed.load_state_dict(module.state_dict())
    others = module.draw(index, torch.Generator().manual_seed(9))
    assert torch.equal(module.eval()(*features, index, others), resumed(*features, index, others))
    assert not torch.equal(module.memory_student.rows, resumed.memory_student.rows)  # only training writes


def test_draws_are_uniform_over_all_or_over_other_classes():
    generator = torch.Generator().manual_seed(0)
    anywhere = CRDLoss(2, 2, n_data=10, dim=2, K=5000).draw(torch.tensor([3, 3]), generator)
    assert anywhere[:, 0].tolist() == [3, 3]
    assert (anywhere[:, 1:].flatten().bincount(minlength=10) / 10_000 - 0.1).abs().max() < 0.02
    labels = torch.tensor([7, 2, 7, 2, 5, 7, 2, 7, 5, 5])
    module = CRDLoss(2, 2, n_data=10, dim=2, K=5000, labels=labels)
    index = torch.arange(10)
    drawn = module.draw(index, generator)
    for i in range(10):
        share = drawn[i, 1:].bincount(minlength=10) / 5000
        other = labels != labels[i]
        assert (share[~other] == 0).all()
        assert (share[other] - 1 / other.sum()).abs().max() < 0.03
    with pytest.raises(ValueError, match="must lie"):
        module.draw(torch.tensor([10]), generator)


def _crd_step(share):
    student, teacher, memory_student, memory_teacher, index, contrast = crd_inputs(n=7)
    own = [x.detach()[share].requires_grad_() for x in (student, teacher)]
    out = crd(*own, memory_student, memory_teacher, index[share], contrast[share])
    out.loss.backward()
    return [x.detach() for x in out], [x.grad for x in own]


def _process(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with over("world"):
        torch.save(_crd_step(slice(rank, None, size)), f"{folder}/{rank}.pt")
    leave()


def test_crd_over_processes_is_that_of_one(tmp_path):
    mp.start_processes(_process, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    out, gradients = _crd_step(slice(None))
    for rank in range(2):
        found, own = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, out)
        torch.testing.assert_close([x / 2 for x in own], [x[rank::2] for x in gradients])


def test_kd_takes_a_class_that_the_teacher_rules_out_and_has_second_derivatives():
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4)
    teacher[:, 1] = -torch.inf
    loss = kd(student, teacher, 2.0)
    other = student.detach().clone().requires_grad_()
    plain = 4 * torch.nn.functional.kl_div((other / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, plain)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    (wanted,) = torch.autograd.grad(plain, other, create_graph=True)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(g.square().sum(), x)[0] for g, x in ((first, student), (wanted, other)))
    )


def test_attention_of_maps_in_blocks_is_that_of_all(monkeypatch):
    from counterpoint.systems.classics import attention_transfer as module

    maps = [draw(7, 3, 4, 4).requires_grad_() for _ in range(2)]
    whole = attention_transfer(*maps)
    gradient = torch.autograd.grad(whole, maps[0])
    monkeypatch.setattr(module, "BLOCK", 100)
    blocks = attention_transfer(*maps)
    torch.testing.assert_close((blocks, torch.autograd.grad(blocks, maps[0])), (whole, gradient))
