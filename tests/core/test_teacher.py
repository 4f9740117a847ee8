"""Moving averages of networks and their schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from counterpoint.core.teacher import EMATeacher, blend, cosine_momentum, ramped_momentum, sigmoid_ramp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def changed(net):
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.add_(1)
    return net


def test_schedules_have_their_published_values():
    assert [ramped_momentum(step) for step in (0, 1, 3, 998, 999, 5000)] == [0, 0.5, 0.75, 1 - 1 / 999, 0.999, 0.999]
    assert ramped_momentum(5000, limit=0.9) == 0.9
    for epoch in (0, 1, 2.5, 5, 7):
        expected = 100 * math.exp(-5 * (1 - min(epoch, 5) / 5) ** 2)
        assert sigmoid_ramp(epoch, 5, maximum=100) == pytest.approx(expected, rel=1e-15)
    assert sigmoid_ramp(0, 0) == 1
    assert cosine_momentum(0, 4, 0.996) == pytest.approx(0.996)
    for bad in (lambda: ramped_momentum(-1), lambda: sigmoid_ramp(-1, 5), lambda: sigmoid_ramp(1, -5)):
        with pytest.raises(ValueError, match="negative"):
            bad()


def test_blending_many_tensors_is_blending_each():
    target = {str(n): torch.randn(n + 1) for n in range(4)} | {"half": torch.randn(3).half()}
    source = {name: torch.randn(value.shape) for name, value in target.items()}
    expected = {name: 0.9 * value.float() + 0.1 * source[name] for name, value in target.items()}
    blend(target, source, 0.9)
    for name, value in target.items():
        torch.testing.assert_close(value.float(), expected[name], rtol=2e-3 if name == "half" else 1e-6, atol=1e-3)


def test_teacher_follows_parameters_and_keeps_its_own_buffers():
    student = network()
    teacher = EMATeacher(student)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    teacher.update(changed(student), 0.75)
    parameters = dict(teacher.module.named_parameters())
    for name, value in teacher.module.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25 if name in parameters else before[name])
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher_copies_buffers_when_told_to_whole_numbers_too():
    student = network()
    teacher = EMATeacher(student, buffers="copy")
    teacher.update(changed(student), 1.0)
    for name, buffer in student.named_buffers():
        assert torch.equal(dict(teacher.module.named_buffers())[name], buffer), name
    assert dict(teacher.module.named_buffers())["1.num_batches_tracked"] == 1
    assert not torch.equal(teacher.module[0].weight, student[0].weight)
    teacher.update(student, 0.0)
    assert torch.equal(teacher.module[0].weight, student[0].weight)


def test_teacher_keeps_its_mode_and_gets_no_gradient():
    student = network()
    following, evaluating = EMATeacher(student), EMATeacher(student, mode="eval")
    assert following.module.training
    assert not evaluating.module.training
    whole = nn.ModuleList([following, evaluating])
    whole.eval()
    assert not following.module.training
    whole.train()
    assert following.module[2].training
    assert not evaluating.module[2].training
    out = following(torch.randn(5, 3, requires_grad=True))
    assert not out.requires_grad
    assert following.module[1].num_batches_tracked == 1
    assert student[1].num_batches_tracked == 0


def test_teacher_is_saved_and_resumed():
    student = network()
    first, second = EMATeacher(student), EMATeacher(changed(network()))
    first.update(changed(student), 0.9)
    assert all(name.startswith("module.") for name in first.state_dict())
    second.load_state_dict(first.state_dict())
    changed(student)
    for teacher in (first, second):
        teacher.update(student, 0.5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_tied_parameters_move_once_and_missing_ones_raise_an_error():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[1].weight = student[0].weight
    teacher = EMATeacher(student)
    assert teacher.module[0].weight is teacher.module[1].weight
    before = teacher.module[0].weight.clone()
    teacher.update(changed(student), 0.75)
    torch.testing.assert_close(teacher.module[0].weight, before + 0.25)  # once, not twice
    EMATeacher(nn.ReLU()).update(nn.ReLU(), 0.9)
    with pytest.raises(ValueError, match=r"'1\.bias' is in one"):
        teacher.update(nn.Sequential(nn.Linear(2, 2)), 0.9)
    with pytest.raises(ValueError, match="'weight' is"):
        EMATeacher(nn.Linear(2, 2)).update(nn.Linear(3, 2), 0.9)


def test_wrong_settings_are_named():
    for settings, message in (({"buffers": "ema"}, "buffers"), ({"mode": "both"}, "mode")):
        with pytest.raises(ValueError, match=message):
            EMATeacher(nn.Linear(1, 1), **settings)
    with pytest.raises(ValueError, match="momentum"):
        EMATeacher(nn.Linear(1, 1)).update(nn.Linear(1, 1), 1.1)
