"""KD3: the authors' numbers, identities, selection, networks, teachers, training, resuming, errors."""

from __future__ import annotations

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
from counterpoint.encoders.classifiers import published_classifier
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position, RenewedBatches
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import kd3
from counterpoint.tasks import web
from counterpoint.tasks.web_figures import class_counts
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "kd3.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arrays of a case, floating ones in this type."""
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=rtol * float(theirs.abs().max()))


@TYPES
def test_the_selection_equals_the_authors(dtype, rtol):
    at = case(0, dtype)
    mask = fn.dynamic_selection(
        at["in/teacher_logits"], at["in/student_logits"], float(at["param/alpha"]), float(at["param/cutoff"])
    )
    assert mask.tolist() == at["out/selected"].bool().tolist()


@TYPES
def test_both_losses_and_their_gradients_equal_the_authors(dtype, rtol):
    at = case(1, dtype)
    feature = at["in/feat_student"].clone().requires_grad_()
    logits = at["in/logit_student"], at["in/logit_teacher"]
    close(fn.disagreement_weights(*logits), at["out/weights"], rtol)
    loss = fn.weighted_feature_loss(feature, at["in/feat_teacher"], *logits)
    loss.backward()
    close(loss.detach(), at["out/weighted_feature_loss"], rtol)
    close(feature.grad, at["grad/feat_student"], rtol)

    embed = kd3.Embed(8, 7).to(dtype)
    embed.load_state_dict({name: at[f"weight/embed.{name}"] for name in ("weight", "bias")})
    pair = [at[name].clone().requires_grad_() for name in ("in/pooled", "in/pooled_mixed")]
    close(embed(pair[0]).detach(), at["out/embed"], rtol)
    loss = fn.of("kd3").nt_xent(embed(pair[0]), embed(pair[1]), float(at["param/temperature"]))
    loss.backward()
    close(loss.detach(), at["out/contrastive"], rtol)
    close(pair[0].grad, at["grad/pooled"], rtol)
    close(pair[1].grad, at["grad/pooled_mixed"], rtol)


@TYPES
def test_mixed_pictures_equal_the_authors(dtype, rtol):
    at = case(2, dtype)
    mixed = fn.mix_distribution(at["in/x"], at["in/lam"], at["in/perm"], float(at["param/eps"]))
    close(mixed, at["out/mixed"], rtol)


def test_the_teacher_s_share_equals_the_authors():
    at = case(3, torch.float64)
    given = int(at["param/max_epoch"]), int(at["param/horizon"])
    found = [fn.combination_weight(int(epoch), *given) for epoch in at["in/epoch"]]
    close(torch.tensor(found, dtype=torch.float64), at["out/alpha"], 1e-9)


# ------------------------------------------------------------------------------------------------------------- equations


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kept_pictures_are_spread_over_classes_more_evenly_than_predicted_ones():
    # Frequent classes are not more confident than rare ones: only thresholds differ.
    logits = F.one_hot(torch.arange(400).sqrt().long().clamp(max=9), 10).double() * 3 + draw(0, 400, 10)
    mask = fn.dynamic_selection(logits, logits, 0.5)
    before, after = (counts.double() / counts.sum() for counts in class_counts(logits.argmax(1), mask, 10))
    assert 0 < int(mask.sum()) < 400
    assert torch.distributions.Categorical(after).entropy() > torch.distributions.Categorical(before).entropy() + 0.01


def test_one_class_faces_the_cutoff_itself_and_may_leave_nothing():
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    logits = torch.cat([sure, unsure])  # confidences 0.982 and 0.881
    assert fn.dynamic_selection(logits, logits, 1.0).tolist() == [True, False]
    assert not fn.dynamic_selection(unsure, unsure, 1.0).any()
    # Beside a frequent class, a rare one passes with a lower confidence.
    both = torch.cat([sure.repeat(9, 1), unsure, unsure.flip(1)])
    assert fn.dynamic_selection(both, both, 1.0).tolist() == [True] * 9 + [False, True]


def test_thresholds_follow_the_convex_mapping():
    # Class 1 is half as frequent as class 0: its threshold is 0.95 / 3 = 0.317, not 0.475.
    def confident(label: int, share: float) -> Tensor:
        return torch.full((1, 5), (1 - share) / 4).index_fill(1, torch.tensor([label]), share).log()

    logits = torch.cat([*[confident(0, 0.96)] * 4, confident(1, 0.32), confident(1, 0.31)])
    assert fn.dynamic_selection(logits, logits, 0.3).tolist() == [True] * 5 + [False]


def test_logits_are_combined_not_probabilities():
    teacher, student = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.0, 1.0]])
    assert fn.dynamic_selection(teacher, student, 0.5, cutoff=0.6).tolist() == [False, True]
    assert fn.dynamic_selection(teacher, student, 1.0, cutoff=0.9).tolist() == [True, False]


def test_equal_logits_give_weights_of_a_half_and_distant_ones_of_one():
    x = draw(0, 4, 6)
    torch.testing.assert_close(fn.disagreement_weights(x, x), torch.full((4,), 0.5).double(), rtol=0, atol=1e-5)
    assert fn.disagreement_weights(x, x + 100).min() == 1


def test_the_loss_is_the_weighted_mean_of_squares_and_spares_the_teacher():
    s, t, a, b = (
        draw(0, 3, 2, 4, 4).requires_grad_(),
        draw(1, 3, 2, 4, 4).requires_grad_(),
        draw(2, 3, 5),
        draw(3, 3, 5),
    )
    loss = fn.weighted_feature_loss(s, t, a.requires_grad_(), b)
    wanted = (fn.disagreement_weights(a, b)[:, None, None, None] * (s - t) ** 2).mean()
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert t.grad is None
    assert a.grad is None


def test_the_own_share_one_gives_the_picture_back_and_zero_the_partner_s_statistics():
    x, perm = draw(0, 4, 3, 5, 5), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(fn.mix_distribution(x, torch.ones(4).double(), perm), x)
    mixed = fn.mix_distribution(x, torch.zeros(4).double(), perm)
    torch.testing.assert_close(mixed.mean((2, 3)), x[perm].mean((2, 3)))
    torch.testing.assert_close(mixed.std((2, 3)), x[perm].std((2, 3)), rtol=1e-5, atol=1e-6)
    # A process mixes its share with partners of the whole batch.
    part = fn.mix_distribution(x[:2], torch.zeros(2).double(), perm[:2], statistics=kd3.picture_statistics(x))
    torch.testing.assert_close(part, mixed[:2])


def test_a_constant_channel_takes_the_partner_s_mean():
    x = torch.stack([torch.full((1, 4, 4), 3.0), torch.arange(16.0).view(1, 4, 4)])
    mixed = fn.mix_distribution(x, torch.tensor([0.0, 1.0]), torch.tensor([1, 0]))
    torch.testing.assert_close(mixed[0], torch.full((1, 4, 4), 7.5))


def test_one_picture_has_no_contrast_and_itself_as_partner():
    nt_xent = fn.of("kd3").nt_xent
    assert float(nt_xent(draw(0, 1, 4), draw(1, 1, 4), 0.3)) == pytest.approx(0, abs=1e-12)
    x = draw(0, 1, 3, 4, 4)
    torch.testing.assert_close(fn.mix_distribution(x, torch.tensor([0.3]).double(), torch.tensor([0])), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.dynamic_selection(draw(0, 3, 2), draw(0, 3, 3), 0.5), "teacher_logits and student_logits"),
        (lambda: fn.dynamic_selection(draw(0, 0, 2), draw(0, 0, 2), 0.5), "empty batch"),
        (lambda: fn.dynamic_selection(draw(0, 3, 2), draw(0, 3, 2), 1.5), "alpha"),
        (lambda: fn.dynamic_selection(draw(0, 3, 2), draw(0, 3, 2), 0.5, 1.1), "cutoff"),
        (lambda: fn.dynamic_selection(draw(0, 3, 2) * torch.nan, draw(0, 3, 2), 0.5), "finite"),
        (lambda: fn.combination_weight(-1), "epoch"),
        (lambda: fn.combination_weight(1, 2, 0), "horizon"),
        (lambda: maps_of((2, 3, 4, 4), (2, 3, 4, 5)), "feat_student and feat_teacher"),
        (lambda: maps_of((2, 3, 4, 4), (2, 3, 4, 4), 3), "logits and maps"),
        (lambda: fn.mix_distribution(draw(0, 2, 3, 4, 4), torch.ones(3).double(), torch.arange(2)), "lam and perm"),
        (lambda: fn.mix_distribution(draw(0, 2, 3, 1, 1), torch.ones(2).double(), torch.arange(2)), "two pixels"),
        (lambda: fn.mix_distribution(draw(0, 2, 3, 4, 4), torch.ones(2).double(), torch.tensor([0, 2])), "perm"),
        (lambda: fn.mix_distribution(draw(0, 0, 3, 4, 4), torch.ones(0).double(), torch.arange(0)), "empty batch"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def maps_of(student: tuple[int, ...], teacher: tuple[int, ...], rows: int = 2) -> Tensor:
    return fn.weighted_feature_loss(draw(0, *student), draw(1, *teacher), draw(2, rows, 5), draw(3, rows, 5))


# ---------------------------------------------------------------------------------------------------------------- batches


def test_a_selection_is_renewed_at_an_epoch_s_beginning_and_kept_within_it():
    calls, position = [], Position()

    def renew():
        calls.append(position.epoch)
        return np.array([1, 4, 6])

    def current():
        return np.array([2, 5])

    for fill, sizes in ((False, [2]), (True, [2, 2, 2, 2])):
        batches = RenewedBatches(9, 2, renew, current, fill=fill).bind(0, position, 0, 1)
        found = list(batches)
        assert [len(batch) for batch in found] == sizes
        assert {row for batch in found for row in batch} <= {1, 4, 6}
    assert calls == [0, 0]
    position.batch = 1
    assert {row for batch in batches for row in batch} == {2, 5}
    assert calls == [0, 0]
    few = RenewedBatches(9, 4, lambda: np.array([3]), current, fill=False).bind(0, Position(), 0, 1)
    assert list(few) == [[3]]


# ---------------------------------------------------------------------------------------------------------------- learner

DATA = "web-digits?train=40&web=20&others=28"
SMALL = {
    "encoder": "conv-fine", "teacher_encoder": "conv-fine", "teacher_epochs": 2, "batch_size": 16, "epochs": 2,
    "evaluate_every": 2, "recipe": "digits-moved", "cutoff": 0.5, "contrast_weight": 0.1,
}  # fmt: skip


def built(data: str = DATA, seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("kd3", data, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("kd3").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def begun(**overrides):
    """Build a learner that is at its only stage, the student's, with access to its data."""
    learner, task = built(teacher_epochs=0, **overrides)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner, task


def test_a_step_trains_with_the_public_functions_and_never_sees_a_label(monkeypatch):
    learner, task = built(epochs=1)
    calls: dict[str, list] = {}

    def watch(name):
        function = getattr(kd3, name)

        def call(*args, **kwargs):
            calls.setdefault(name, []).append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(kd3, name, call)

    for name in ("dynamic_selection", "weighted_feature_loss", "mix_distribution", "nt_xent"):
        watch(name)
    labels = []
    loss = learner.loss
    learner.loss = lambda batch: labels.append((learner.at_teacher, batch["label"].unique().tolist())) or loss(batch)
    before = {name: value.clone() for name, value in learner.named_parameters()}
    rows = fit(learner, task, bar=False)
    steps = len(calls["weighted_feature_loss"])
    assert steps == 48 // 16
    assert len(calls["dynamic_selection"]) == 1
    assert calls["dynamic_selection"][0][2] == fn.combination_weight(1)
    assert len(calls["mix_distribution"]) == steps
    assert len(calls["nt_xent"]) == 2 * steps
    assert all(seen == [-1] for teacher, seen in labels if not teacher)
    assert all(-1 not in seen for teacher, seen in labels if teacher)
    moved = {
        name.partition(".")[0] for name, value in learner.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {"encoder", "projector", "embed_student", "embed_teacher", "teacher", "classifier"}
    torch.testing.assert_close(learner.classifier.weight, learner.teacher.classifier.weight)
    assert rows[-1]["train/loss"] == pytest.approx(rows[-1]["train/feature"] + rows[-1]["train/contrast"], rel=1e-5)


def test_the_student_s_stage_leaves_the_teacher_as_it_is():
    learner, task = built(teacher_epochs=0, epochs=1)
    before = {name: value.clone() for name, value in learner.teacher.state_dict().items()}
    fit(learner, task, bar=False)
    assert all(torch.equal(value, before[name]) for name, value in learner.teacher.state_dict().items())


def test_the_student_answers_by_the_teacher_s_classifier_on_the_mean_of_its_projected_map():
    learner, _task = begun()
    learner.enter_student(learner.survey)
    x = torch.randn(4, 3, 8, 8)
    learner.eval()
    wanted = learner.teacher.classifier(learner.projector(learner.encoder.features(x)).mean((2, 3)))
    torch.testing.assert_close(learner.predict({"image": x})["logits"], wanted)
    # A student that equals the teacher's map has no loss.
    learner.projector, learner.encoder = nn.Identity(), learner.teacher.encoder
    learner.config.contrast_weight = 0.0
    found = learner.loss({"views": [x], "label": torch.full((4,), -1)})
    assert float(found["loss"].detach()) == pytest.approx(0, abs=1e-9)


def test_the_larger_map_is_pooled_to_the_other_s_size():
    student, teacher = web.at_one_size(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2))
    assert (student.shape, teacher.shape) == ((1, 2, 2, 2), (1, 3, 2, 2))
    student, teacher = web.at_one_size(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 8, 8))
    assert (student.shape, teacher.shape) == ((1, 2, 4, 4), (1, 3, 4, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"select": False, "weighted": False, "contrast_weight": 0.0},
        {"classifier": "own", "select_views": False, "epoch_of": "selected", "decay": "steps"},
        {"classifier": "own", "feature_weight": 0.0, "encoder": "mlp-s", "mix_probability": 0.5},
        {"encoder": "mlp-s", "teacher_encoder": "mlp-s"},
    ],
)
def test_options_train(settings):
    learner, task = built(**({"epochs": 1, "teacher_epochs": 1} | settings))
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert 0 <= row["test/accuracy"] <= 1
    assert ("train/selected" in row) == learner.config.select
    assert ("train/kd" in row) == (learner.config.classifier == "own")


def unsure(learner) -> None:
    """Let both networks predict one class for all pictures, with a confidence of 0.23."""
    with torch.no_grad():
        learner.teacher.classifier.weight.zero_()
        learner.teacher.classifier.bias.copy_(F.one_hot(torch.tensor(3), 10))
    learner.enter_student(learner.survey)


def test_an_empty_selection_keeps_the_last_one_or_the_most_confident_tenth_or_raises():
    learner, task = begun(cutoff=1.0, select_views=False)
    unsure(learner)
    mask = learner.select(learner.survey)
    assert int(mask.sum()) == 4
    assert learner.confidence[mask].min() >= learner.confidence[~mask].max()
    assert float(learner.passed) == 0
    learner.selected[:3] = True
    assert learner.select(learner.survey).nonzero()[:, 0].tolist() == [0, 1, 2]
    learner, task = begun(cutoff=1.0, when_empty="error")
    unsure(learner)
    with pytest.raises(CounterpointError, match=r"no web picture passes the selection of epoch 1: .* --cutoff is 1\.0"):
        fit(learner, task, bar=False)


def test_a_teacher_whose_logits_are_nan_is_named():
    learner, _ = begun()
    learner.teacher.classifier.bias.data[0] = torch.nan
    with pytest.raises(CounterpointError, match="the teacher's logits of web pictures are NaN"):
        learner.select(learner.survey)


def test_a_batch_of_one_picture_trains_on_maps_and_is_named_on_single_positions():
    learner, _ = begun(cutoff=0.0)
    view = torch.randn(1, 3, 8, 8)
    found = learner.loss({"views": [view], "mixed": view, "label": torch.tensor([-1])})
    assert float(found["contrast"].detach()) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(float(found["loss"].detach()))
    learner, _task = begun(encoder="mlp-s", teacher_encoder="mlp-s")
    with pytest.raises(CounterpointError, match="one picture was selected"):
        learner.project(torch.randn(1, 64, 1, 1))


def test_views_of_the_selection_depend_on_the_epoch_alone():
    learner, _ = begun(recipe="digits-hard", vote_until=0)  # so that the networks alone decide
    learner.select(learner.survey)
    first = learner.confidence.clone()
    learner.select(learner.survey)
    assert torch.equal(first, learner.confidence)
    learner.position.epoch = 1
    learner.select(learner.survey)
    assert not torch.equal(first, learner.confidence)


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("kd3", DATA, overrides=SMALL).config
    # In the second epoch of the teacher, and of the student.
    run = need_equal_ends(monkeypatch, kd3.KD3, "kd3", config, DATA, (3, 8), tmp_path)
    assert not {"selected", "confidence", "predicted"} & set(run.load_weights())


def folder(path: Path, names: tuple[str, ...], count: int) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path / name / f"{number}.png")
    return path


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line_on_own_folders_with_a_run_as_teacher(tmp_path):
    mine, found = folder(tmp_path / "mine", ("one", "two"), 20), folder(tmp_path / "web", (".",), 24)
    data = f"imagefolder:{mine}?size=8"
    small = ["--batch-size", "8", "--epochs", "1", "--out", str(tmp_path), "--data", data]
    teach = ["train", "kd", *small, "--name", "teacher", "--teacher-epochs", "0", "--encoder", "conv-fine",
             "--teacher-encoder", "conv-fine"]  # fmt: skip
    assert cli.main(teach) == 0
    words = ["train", "kd3", *small, "--name", "run", "--web", f"imagefolder:{found}", "--encoder", "conv-fine", "--cutoff", "0.5",
             "--teacher", f"run:{tmp_path / 'teacher'}"]  # fmt: skip
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    row = run.metrics()[-1]
    assert {"train/selected", "test/teacher_accuracy", "test/accuracy"} <= set(row)
    (tmp_path / "teacher").rename(tmp_path / "gone")  # a student works without its teacher
    learner = training.load_learner(run)
    assert learner.predict({"image": torch.randn(2, 3, 8, 8)})["logits"].shape == (2, 2)
    assert training.evaluate(run.path, say=lambda _: None)["accuracy"] == row["test/accuracy"]
    page = (run.path / "report.html").read_text()
    assert "Web pictures of the last epoch" in page
    assert "Predicted classes of web pictures" in page


# ---------------------------------------------------------------------------------------------------------------- teachers


def test_a_published_classifier_of_transformers_teaches_with_its_own_head_and_statistics(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = ["one", "two"]
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=2,
        id2label={0: "two", 1: "one"}, label2id={"two": 0, "one": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.ResNetForImageClassification(config).eval()
    network.half().save_pretrained(tmp_path / "net")
    seen = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    seen.save_pretrained(tmp_path / "net")
    config = SimpleNamespace(teacher=f"hf:{tmp_path / 'net'}", teacher_size=0)
    teacher = web.load_teacher(config, 16, 3, names)
    assert teacher.spatial
    assert teacher.shape(16)[0] == 12
    pixels = torch.rand(2, 3, 16, 16)
    found = teacher.look((pixels - torch.tensor(web.MEAN)[:, None, None]) / torch.tensor(web.STD)[:, None, None])
    network = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "net", dtype=torch.float32)
    large = F.interpolate((pixels - 0.5) / 0.25, 32, mode="bilinear", antialias=True)
    wanted = network.eval()(large).logits
    torch.testing.assert_close(found.logits, wanted.flip(1), rtol=1e-4, atol=1e-5)  # in the order of the data's classes
    torch.testing.assert_close(found.map.mean((2, 3)), found.pooled)
    with pytest.raises(CounterpointError, match="has 2 classes, and the data has 3"):
        web.load_teacher(config, 16, 3, ["one", "two", "three"])


def test_published_classifiers_of_timm_and_torchvision_come_in_two_parts(monkeypatch):
    import timm
    import torchvision.models as tv

    make, get = timm.create_model, tv.get_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make(name, pretrained=False))
    monkeypatch.setattr(tv, "get_model", lambda name, weights: get(name, weights=None))
    found = published_classifier("timm:test_vit")
    assert found.encoder.dim == found.classifier.in_features
    assert not web.TeacherNetwork(found.encoder, found.classifier, torch.randn(2, 3, found.size, found.size)).spatial
    found = published_classifier("torchvision:mobilenet_v3_small")
    assert (found.size, found.classifier.out_features, len(found.classes)) == (224, 1000, 1000)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cutoff": 1.5}, CounterpointError, "cutoff"),
        ({"vote_horizon": 0.0}, CounterpointError, "vote_horizon"),
        ({"temperature": 0.0}, CounterpointError, "temperature"),
        ({"contrast_weight": -1.0}, CounterpointError, "contrast_weight"),
        ({"feature_weight": 0.0}, CounterpointError, "feature_weight 0"),
        ({"when_empty": "stop"}, CounterpointError, "when empty|when_empty"),
        ({"classifier": "both"}, CounterpointError, "classifier"),
        ({"epoch_of": "half"}, CounterpointError, "epoch_of"),
        ({"teacher_epochs": -1}, CounterpointError, "teacher_epochs"),
        ({"teacher": "clip:x"}, CounterpointError, "teacher 'clip:x'"),
        ({"teacher": "run:runs/none"}, RunError, "runs/none"),
        ({"teacher_encoder": "resnet-x"}, CounterpointError, "resnet-x"),
        ({"web": "digits?size=16"}, DataError, "16 pixels"),
        ({"web": "xor"}, CounterpointError, "xor"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        built(**settings)


def test_data_without_web_pictures_say_how_to_name_some():
    with pytest.raises(DataError, match=r"digits brings no web pictures: .* --web imagefolder:DIR"):
        built("digits?size=8&train=40&held_out=0.05&valid=0.05")
    learner, _task = built("digits?size=8&train=40&held_out=0.05&valid=0.05", web="web-digits?train=30")
    assert (learner.first, learner.web) == (40, 30)
    with pytest.raises(DataError, match="train must be at least 2 and web at least 1"):
        built("web-digits?train=5000")


def test_a_teacher_without_a_classifier_on_its_encoder_is_named(tmp_path):
    config = Experiment.resolve(
        "supcon",
        "digits?size=8&train=40&held_out=0.05&valid=0.05",
        overrides={"encoder": "mlp-s", "epochs": 1, "batch_size": 8},
    )
    run = training.train("supcon", config.config, data=config.data, out=tmp_path, name="x", say=lambda _: None)
    with pytest.raises(RunError, match="it has no linear classifier"):
        built(teacher=f"run:{run.path}")


def test_web_digits_show_digits_that_no_other_split_has():
    from counterpoint.data import load

    one, two = (load("web-digits", seed=seed) for seed in (0, 1))
    assert (len(one.train), len(one.web)) == (600, 2000)
    assert int((one.web.labels < 0).sum()) == 1500
    assert not np.array_equal(one.web.pixels, two.web.pixels)
    plain = load("web-digits", shift=0.0)
    digits = plain.web.pixels[plain.web.labels >= 0].reshape(500, -1)
    seen = {p.tobytes() for split in (plain.train, plain.valid, plain.test) for p in split.pixels.reshape(-1, 64)}
    assert sum(p.tobytes() in seen for p in digits) < 5  # two people may write the same picture


def test_the_page_counts_the_selected_pictures_of_each_class_and_of_none():
    learner, _ = begun()
    learner.selected.copy_(learner.select(learner.survey))
    found = learner.figures(learner.survey)
    table = found["Predicted classes of web pictures"]["rows"]
    assert sum(row[1] for row in table) == 48
    assert sum(row[3] for row in table) == int(learner.selected.sum())
    assert max(row[2] for row in table) == learner.config.cutoff
    caption = found["Web pictures of the last epoch"]["caption"]
    assert " of 20, of the others " in caption
    assert caption.endswith(" of 28.")
    assert "The student is larger" in found["Sizes of both networks"]["caption"]  # conv-fine and a projector


def test_defaults_are_the_paper_s():
    config = load_system("kd3").config()
    assert (config.epochs, config.batch_size, config.lr * config.batch_size / 256) == (240, 1024, 0.05)
    assert (config.cutoff, config.contrast_weight, config.temperature, config.mix_alpha) == (0.95, 0.001, 0.3, 0.1)
    assert (config.vote_until, config.vote_horizon, config.decay, config.epoch_of) == (120, 160, "steps", "selected")
