"""WSCoL: the authors' numbers, clustering, memory, gate, training, resuming, errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import cli, data, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core.centroids import Clustering
from counterpoint.core.proposals import pseudo_boxes
from counterpoint.data.regions import SOURCE, TARGET, RegionSplit, iou
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.dense import wscol
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "wscol.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
NONE = torch.empty(0, dtype=torch.long)


def of(case: str, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.from_numpy(np.asarray(PARITY[f"{case}/{name}"]))
    return found.to(dtype) if found.is_floating_point() else found


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the authors' numbers


@TYPES
@pytest.mark.parametrize("number", range(3))
def test_contrast_and_mask_equal_the_authors(number, dtype, rtol):
    case = f"weak_guided_contrast/case{number}"
    strong, labels = of(case, "in/strong", dtype).requires_grad_(), of(case, "in/labels")
    mask = fn.hard_positive_mask(of(case, "in/weak", dtype), labels, int(of(case, "param/num_class")))
    assert torch.equal(mask, of(case, "out/hard_positive_mask", dtype))
    given = mask if int(of(case, "param/use_hard_positive_mask")) else None
    settings = (float(of(case, f"param/{name}")) for name in ("temperature", "alpha"))
    temperature, alpha = settings
    loss = fn.weak_guided_contrast(strong, labels, temperature, given, alpha)
    loss.backward()
    torch.testing.assert_close(loss.detach(), of(case, "out/loss", dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(strong.grad, of(case, "grad/strong", dtype), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("kind", ["prototype", "plain"])
def test_clusterings_equal_the_authors(kind):
    case = f"{kind}_clustering/case0"
    given = [of(case, f"in/{name}", torch.float32) for name in ("fg_index", "fg_labels")]
    rows, logits, steps = (
        of(case, "in/features", torch.float32),
        of(case, "in/logits", torch.float32),
        int(of(case, "param/steps")),
    )
    if kind == "plain":
        found = fn.plain_clustering(rows, logits, *given, steps)
    else:
        prototypes = of(case, "in/prototypes", torch.float32)
        found = fn.prototype_clustering(rows, logits, prototypes, *given, steps)
    torch.testing.assert_close(found.distance, of(case, "out/distance", torch.float32), rtol=1e-5, atol=1e-6)
    assert found.label_set.tolist() == of(case, "out/label_set").tolist()
    assert found.labels.tolist() == of(case, "out/labels").tolist()


@TYPES
def test_variance_discrepancy_and_distillation_equal_the_authors(dtype, rtol):
    case = "proposal_variance/case0"
    found = fn.proposal_variance(of(case, "in/boxes", dtype), of(case, "in/scores", dtype))
    torch.testing.assert_close(found, of(case, "out/variance", dtype), rtol=rtol, atol=0)

    case = "gradient_discrepancy/case0"
    weak, strong, w1, b1, w2 = (of(case, f"in/{name}", dtype) for name in ("weak", "strong", "w1", "b1", "w2"))
    for parameter in (w1, b1):
        parameter.requires_grad_()
    losses = [F.cross_entropy(torch.tanh(F.linear(x, w1, b1)) @ w2.T, of(case, "in/labels")) for x in (weak, strong)]
    found = fn.gradient_discrepancy(*losses, [w1, b1])
    found.backward()
    torch.testing.assert_close(found.detach(), of(case, "out/loss", dtype), rtol=rtol, atol=0)
    for name, parameter in (("w1", w1), ("b1", b1)):
        torch.testing.assert_close(parameter.grad, of(case, f"grad/{name}", dtype), rtol=rtol, atol=rtol / 10)

    case = "proposal_distillation/case0"
    student = of(case, "in/student", dtype).requires_grad_()
    loss = fn.proposal_distillation(student, of(case, "in/teacher", dtype))
    loss.backward()
    torch.testing.assert_close(loss.detach(), of(case, "out/loss", dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(student.grad, of(case, "grad/student", dtype), rtol=rtol, atol=rtol / 10)


# ------------------------------------------------------------------------------------------------------------- equations


def plain_contrast(z: Tensor, labels: Tensor, mask: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    """Compute the contrast from the whole matrix."""
    log_p = (F.normalize(z) @ F.normalize(z).T / temperature).log_softmax(1)
    positive = (labels[:, None] == labels).to(z.dtype) * (1 if mask is None else 1 - mask)
    rows = -(positive * log_p).sum(1) / positive.sum(1) / 2
    return rows[rows != 0].mean()


def test_contrast_without_far_positives_equals_the_matrix_of_many_rows():
    z, labels = draw(0, 600, 5).requires_grad_(), torch.arange(600) % 7
    found, wanted = fn.weak_guided_contrast(z, labels), plain_contrast(z, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, wanted)))


def test_row_alone_counts_little_and_one_that_underflows_not_at_all():
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    # The third row's own term is log(1 + 2 e^-28.6), which float32 rounds to 0: two rows remain.
    torch.testing.assert_close(fn.weak_guided_contrast(pair, labels), torch.tensor(math.log(2) / 2))
    lone = torch.ones(1, 2, requires_grad=True)
    loss = fn.weak_guided_contrast(lone, labels[:1])
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(lone.grad).all()


def test_mask_of_zeros_is_no_mask_and_far_positives_are_not_pulled():
    z, labels = draw(1, 12, 4), torch.arange(12) % 3
    mask = torch.zeros(12, 12, dtype=torch.float64)
    without = fn.weak_guided_contrast(z, labels)
    assert torch.equal(fn.weak_guided_contrast(z, labels, hard_positive=mask), without)
    mask[0, 3] = 1
    torch.testing.assert_close(
        fn.weak_guided_contrast(z, labels, hard_positive=mask), plain_contrast(z, labels, mask), rtol=1e-4, atol=0
    )


def test_far_positives_are_those_beyond_the_nearest_of_each_row():
    weak, labels = draw(2, 20, 3), torch.arange(20) % 4
    mask = fn.hard_positive_mask(weak, labels, 3)
    cosine = F.normalize(weak) @ F.normalize(weak).T
    for i in range(20):
        others = [j for j in range(20) if j != i]
        nearest = sorted(others, key=lambda j: -cosine[i, j].item())[:4]
        wanted = [float(labels[i] != 3 and j != i and labels[j] == labels[i] and j not in nearest) for j in range(20)]
        assert mask[i].tolist() == wanted
    assert not torch.equal(mask, mask.T)


def test_prototypes_lead_the_first_round():
    rows = torch.tensor([[4.0, 0.0], [3.9, 0.1], [0.0, 4.0], [0.1, 3.9], [-4.0, -4.0]])
    logits = torch.eye(3)[[0, 0, 1, 1, 2]] * 4
    swapped = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    assert fn.prototype_clustering(rows, logits, swapped, NONE, NONE).labels.tolist() == [1, 1, 0, 0, 2]
    for prototypes, use in ((None, True), (swapped, False)):
        found = fn.prototype_clustering(rows, logits, prototypes, NONE, NONE, 4, use)
        assert found.labels.tolist() == [0, 0, 1, 1, 2]


def test_given_labels_move_the_centroids_and_one_class_ends_the_rounds():
    rows, logits = draw(3, 8, 3), torch.zeros(8, 4, dtype=torch.float64)
    logits[:, 2] = 5
    found = fn.prototype_clustering(rows, logits, None, NONE, NONE)
    assert found.label_set.tolist() == [2]
    assert found.labels.tolist() == [2] * 8
    given = fn.prototype_clustering(rows, logits, None, torch.tensor([1]), torch.tensor([0]))
    assert given.label_set.tolist() == [0, 2]
    assert given.labels[1] == 0


def test_variance_counts_confident_boxes_alone():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 4.0, 10.0, 14.0], [20.0, 20.0, 30.0, 30.0]])  # IoU 0.43
    assert fn.proposal_variance(boxes, torch.ones(3)) == np.var([2, 2, 2, 2, 2, 3])
    assert fn.proposal_variance(boxes, torch.tensor([1.0, -1.0, 1.0])) == 0
    assert fn.proposal_variance(boxes, -torch.ones(3)) == 0
    assert fn.proposal_variance(boxes[:0], torch.ones(0)) == 0


def test_equal_losses_agree_in_their_gradients():
    w = draw(4, 3, 2).requires_grad_()
    found = fn.gradient_discrepancy((w**2).sum(), (w**2).sum(), [w])
    torch.testing.assert_close(found, torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.weak_guided_contrast(torch.ones(2, 3), torch.zeros(3).long()), "labels"),
        (lambda: fn.weak_guided_contrast(torch.ones(0, 3), NONE), "strong is an empty batch"),
        (lambda: fn.weak_guided_contrast(torch.ones(2, 3), torch.zeros(2).long(), 0.0), "temperature"),
        (lambda: fn.weak_guided_contrast(torch.ones(2, 3), torch.zeros(2).long(), 0.1, None, 2.0), "alpha"),
        (lambda: fn.weak_guided_contrast(torch.ones(2, 3), torch.zeros(2).long(), 0.1, torch.ones(3, 3)), "hard_pos"),
        (lambda: fn.hard_positive_mask(torch.ones(2, 3), NONE, 1), "labels"),
        (lambda: fn.prototype_clustering(torch.ones(2, 3), torch.ones(3, 2), None, NONE, NONE), "features"),
        (
            lambda: fn.prototype_clustering(torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 3), NONE, NONE),
            "prototypes",
        ),
        (lambda: fn.plain_clustering(torch.ones(2, 3), torch.ones(2, 2), NONE, NONE, 0), "steps"),
        (lambda: fn.proposal_variance(torch.ones(2, 3), torch.ones(2)), "boxes"),
        (lambda: fn.gradient_discrepancy(torch.ones(()), torch.ones(()), []), "params is empty"),
        (lambda: fn.proposal_distillation(torch.ones(2, 3), torch.ones(2, 4)), "student and teacher"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------- data

DATA = "shifted-shapes?train=4&target=4&test=2&size=32&proposals=10"


def test_domains_differ_in_style_and_proposals_match_their_objects():
    found, same = data.load(DATA), data.load(DATA)
    assert isinstance(found.train, RegionSplit)
    assert found.train.domains.tolist() == [SOURCE] * 4 + [TARGET] * 4
    assert (found.train.images(np.arange(8)) == same.train.images(np.arange(8))).all()
    grey = [np.median(found.train.images(np.array([n]))[0], (0, 1)) for n in range(4)]
    assert np.abs(np.array(grey) - 128).max() <= 6
    for n in range(8):
        one = found.train.proposals(n)
        assert one.corners.shape == (10, 4)
        assert (one.corners[:, 2:] - one.corners[:, :2] >= 1 - 1e-4).all()
        assert one.corners.min() >= 0
        assert one.corners.max() <= 32
    labels = np.concatenate([found.train.proposals(n).labels for n in range(8)])
    assert set(labels) - {6}
    assert (labels == 6).sum() > 20
    other = data.load(DATA + "&seed=1")
    assert (other.train.images(np.arange(8)) != found.train.images(np.arange(8))).any()


def test_iou_of_boxes_apart_is_zero():
    assert iou(np.array([[0, 0, 1, 1]], np.float32), np.array([[1, 0, 2, 1]], np.float32)).tolist() == [[0.0]]


@pytest.mark.parametrize("options", ["train=1", "size=12", "proposals=3", "shift=2", "seed=-1"])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(CounterpointError):
        data.load(f"shifted-shapes?{options}")


# --------------------------------------------------------------------------------------------------------------- learner

SMALL = {
    "encoder": "conv-s", "layer": "", "crop": 16, "source_epochs": 1, "source_batch": 4, "epochs": 1, "batch_size": 2,
    "hidden": 8, "projection": 4, "pseudo_threshold": 0.15, "evaluate_every": 2, "source_lr": 0.3, "lr": 0.01,
    "uncertainty": 0.0,
}  # fmt: skip


def built(seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("wscol", DATA, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("wscol").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def test_a_step_trains_with_the_public_functions(monkeypatch):
    names = [
        "weak_guided_contrast", "hard_positive_mask", "prototype_clustering", "plain_clustering", "proposal_variance",
        "gradient_discrepancy", "proposal_distillation",
    ]  # fmt: skip
    calls = {name: [] for name in names}
    for name in names:
        function = getattr(wscol, name)
        monkeypatch.setattr(wscol, name, lambda *a, _f=function, _n=name, **k: (calls[_n].append(a), _f(*a, **k))[1])
    learner, task = built(uncertainty=1e9)
    (_, row) = fit(learner, task, bar=False)
    assert all(calls.values())
    assert calls["weak_guided_contrast"][0][0].requires_grad
    assert row["train/contrast"] > 0
    assert row["train/gradient"] > 0
    assert row["train/instance"] > 0
    assert 0 <= row["test/accuracy"] <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"contrast": "none", "instance_weight": 0.0, "gradient_weight": 0.0},
        {"contrast": "teacher", "hard_positives": False},
        {"contrast": "truth", "alpha": 0.5, "teacher_every": 1},
        {"plain_rounds": 0, "distil_weight": 0.0, "encoder": "resnet-s", "layer": "layer2"},
    ],
)
def test_options_train(settings):
    learner, task = built(**settings)
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/loss"])
    assert rows[-1]["train/pseudo_boxes"] > 0


def adapting(**overrides):
    """Return a learner at the beginning of its adaptation, and a batch of the target with views."""
    learner, task = built(**overrides)
    learner.adapted.fill_(True)
    learner.steps_per_epoch = 10
    batch = task.evaluation_batch("train", [4, 5])
    return learner, learner.prepare(batch, torch.Generator().manual_seed(0))


def test_pictures_without_a_pseudo_box_are_skipped():
    learner, batch = adapting(pseudo_threshold=1.0)
    found = learner.loss(batch)
    found["loss"].backward()
    assert found["loss"].item() == 0
    assert found["pseudo_boxes"].item() == 0
    assert not learner.seen.any()


def test_target_labels_change_nothing_but_the_upper_bound():
    for contrast, same in (("clusters", True), ("truth", False)):
        losses = []
        for changed in (False, True):
            learner, batch = adapting(contrast=contrast, uncertainty=1e9)
            if changed:
                batch["label"] = torch.where(batch["label"] < 6, 0, 1)
            losses.append(learner.loss(batch)["loss"].item())
        assert (losses[0] == losses[1]) == same


def test_uncertain_proposals_leave_the_background_out(monkeypatch):
    rows = {}
    for uncertainty in (0.0, 1e9):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(wscol, "weak_guided_contrast", lambda z, labels, *a, _s=seen: (_s.append(labels), z.sum())[1])
            learner, batch = adapting(contrast="truth", uncertainty=uncertainty, instance_weight=0.0)
            batch["score"] = torch.ones_like(batch["score"])
            learner.loss(batch)
        rows[uncertainty] = torch.cat(seen)
    assert (rows[0.0] != 6).all()
    assert (rows[1e9] == 6).any()


def test_memory_keeps_the_last_and_prototypes_move_by_eta():
    learner, _ = built(memory=2, eta=0.4)
    weak = torch.randn(1, 3, 128, 2, 2, generator=torch.Generator().manual_seed(1))
    first = wscol.Pseudo(torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4]), NONE, NONE, NONE)
    learner.remember(weak, [first])
    assert learner.filled.tolist() == [0, 0, 0, 0, 2, 0]
    assert torch.equal(learner.bank[4], weak[0, 1:])
    before = learner.prototypes[4].clone()
    torch.testing.assert_close(before, learner.student.mapper(weak[0, 1:]).mean(0).detach())
    learner.remember(weak, [wscol.Pseudo(torch.tensor([0]), torch.tensor([4]), NONE, NONE, NONE)])
    assert torch.equal(learner.bank[4], weak[0, [2, 0]])
    mean = learner.student.mapper(weak[0, [2, 0]]).mean(0).detach()
    torch.testing.assert_close(learner.prototypes[4], 0.6 * before + 0.4 * mean)
    assert learner.seen.tolist() == [False] * 4 + [True, False]


def test_labels_slide_from_plain_clusters_to_prototypes(monkeypatch):
    learner, _ = built()
    label_set, rows = torch.tensor([0, 6]), torch.zeros(1, 128, 2, 2)
    guided = Clustering(torch.tensor([[0.6, 0.4]]), label_set, torch.tensor([6]))
    plain = guided._replace(distance=torch.tensor([[0.0, 0.4]]), labels=torch.tensor([0]))
    monkeypatch.setattr(wscol, "prototype_clustering", lambda *a: guided)
    monkeypatch.setattr(wscol, "plain_clustering", lambda *a: plain)
    none = wscol.Pseudo(NONE, NONE, NONE, NONE, NONE)
    learner.steps_per_epoch = 10
    found = []
    for epoch, step in ((0, 0), (0, 6), (0, 7), (1, 10)):
        learner.position.epoch, learner.position.step = epoch, step
        found += learner.clusters(rows, torch.zeros(1, 7), none).tolist()
    assert found == [0, 0, 6, 6]  # 0.6 rho < 0.4 up to step 6


def test_teacher_moves_when_it_should_and_all_its_state_does():
    learner, _ = built(teacher_every=2)
    learner.adapted.fill_(True)
    with torch.no_grad():
        learner.student.classifier.bias.add_(1.0)
    before = learner.teacher.module.classifier.bias.clone()
    learner.position.step = 0
    learner.end_step()
    assert torch.equal(learner.teacher.module.classifier.bias, before)
    learner.position.step = 1
    learner.end_step()
    torch.testing.assert_close(learner.teacher.module.classifier.bias, before + 0.1)


def test_pseudo_boxes_are_confident_and_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    logits = torch.tensor([[5.0, 0, 0], [6, 0, 0], [0, 5, 0], [0, 0, 5]])
    found = pseudo_boxes(logits, boxes, 0.9)
    assert sorted(zip(found.boxes.tolist(), found.classes.tolist(), strict=True)) == [(1, 0), (2, 1)]
    assert found.fg_index.tolist() == [0, 1, 2]
    assert found.fg_labels.tolist() == [0, 0, 1]
    assert found.owner[3] == 2


def test_interrupted_in_each_stage_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve(
        "wscol", DATA, overrides=SMALL | {"source_epochs": 2, "epochs": 2, "batch_size": 1}
    ).config
    for at in (1, 7):  # the second step of the source, the sixth of the adaptation
        (tmp_path / str(at)).mkdir()
        need_equal_ends(monkeypatch, wscol.WSCoL, "wscol", config, DATA, at, tmp_path / str(at))


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line(tmp_path):
    words = ["train", "wscol", "--data", DATA, "--out", str(tmp_path), "--name", "run"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    page = (run.path / "report.html").read_text()
    assert "Regions of the target" in page
    assert "Clusters of the teacher" in page
    assert training.evaluate(run.path, say=lambda _: None)["accuracy"] == run.metrics()[-1]["test/accuracy"]


def test_a_run_on_pictures_starts_the_detector_which_may_stay_frozen(tmp_path, undrawn):
    views = {
        "encoder": "conv-s",
        "epochs": 1,
        "batch_size": 32,
        "recipe": "none",
        "hidden": 8,
        "projection": 4,
        "bank": 32,
    }
    pictures = "digits?size=16&train=64"
    config = Experiment.resolve("simclr", pictures, overrides=views).config
    parent = training.train("simclr", config, data=pictures, out=tmp_path, name="views", say=lambda _: None)
    first = load_learner(parent).encoder.state_dict()
    settings = {name: value for name, value in SMALL.items() if name != "encoder"} | {"epochs": 0}

    def encoder(name, **more):
        config = Experiment.resolve("wscol", DATA, overrides=settings | {"start": f"run:{parent.path}"} | more).config
        run = training.train("wscol", config, data=DATA, out=tmp_path, name=name, say=lambda _: None)
        assert run.facts()["encoder"] == "conv-s"
        return load_learner(run).student.encoder.encoder.state_dict()

    frozen, whole = encoder("frozen", frozen=True), encoder("whole")
    assert all(torch.equal(value, first[name]) for name, value in frozen.items())
    assert not all(torch.equal(value, first[name]) for name, value in whole.items())


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path, undrawn):
    settings = SMALL | {"epochs": 2, "batch_size": 4}
    words = ["train", "wscol", "--data", DATA, "--out", str(tmp_path), "--name", "two"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes(words, tmp_path)
    config = Experiment.resolve("wscol", DATA, overrides=settings).config
    run = training.train("wscol", config, data=DATA, out=tmp_path, name="one", say=lambda _: None)
    one, two = run.metrics()[-1], Run.open(tmp_path / "two").metrics()[-1]
    assert one["train/pseudo_boxes"] > 0
    for name in one:
        if not name.startswith("train/seconds"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    mine, other = run.load_weights(), Run.open(tmp_path / "two").load_weights()
    for name in ("filled", "bank", "prototypes", "student.classifier.weight"):
        torch.testing.assert_close(other[name], mine[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"eta": 1.5}, "eta"),
        ({"erase_low": 0.9}, "erase_low"),
        ({"uncertainty": -1.0}, "uncertainty"),
        ({"crop": 4}, "crop must be"),
        ({"source_epochs": 0}, "source_epochs"),
        ({"encoder": "vit-s"}, "name a layer"),
        ({"encoder": "torchvision:resnet18", "layer": "layer9", "crop": 32}, "layer9"),
        ({"encoder": "torchvision:resnet18", "layer": "avgpool.x", "crop": 32}, "avgpool"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_source_without_proposals_is_refused():
    with pytest.raises(CounterpointError, match="not for regions"):
        Experiment.resolve("wscol", "digits", overrides=SMALL).task()
