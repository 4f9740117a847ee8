"""The classics of the task labelled: each trains from the command line; teachers, their stage, and what they teach."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import counterpoint.functional as fn
from counterpoint import catalog, cli, training
from counterpoint.core.teacher import sigmoid_ramp
from counterpoint.encoders.taps import layer, recorded
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, Interrupted, RunError
from counterpoint.experiment import Experiment
from counterpoint.systems.classics.attention_transfer import AttentionTransfer, AttentionTransferConfig
from counterpoint.systems.classics.crd import CRD, CRDConfig
from counterpoint.systems.classics.fitnets import FitNets, FitNetsConfig
from counterpoint.systems.classics.kd import KDConfig
from counterpoint.systems.classics.mean_teacher import MeanTeacher, MeanTeacherConfig
from counterpoint.systems.classics.rkd import RKD, RKDConfig
from counterpoint.systems.classics.supcon import SupCon, SupConConfig, supcon
from counterpoint.systems.classics.triplet import Triplet, TripletConfig, triplet_hard
from counterpoint.tasks.labelled import LabelledTask
from counterpoint.tasks.taught import TaughtLearner, look

DATA = "digits?size=16&train=320&held_out=0.05&valid=0.05"
FACTS = {"size": 16, "channels": 3, "classes": 10, "class_names": list("0123456789"), "examples": 50}
FACTS["teacher_encoder"] = "conv-s"
SMALL = {"epochs": 1, "batch_size": 64, "encoder": "conv-s", "evaluate_every": 1}
TAUGHT = SMALL | {"teacher_encoder": "conv-s", "teacher_epochs": 1}
SETTINGS = {  # what makes a run of each take seconds
    "kd": TAUGHT,
    "rkd": TAUGHT,
    "crd": TAUGHT | {"negatives": 64},
    "fitnets": TAUGHT | {"hint": "layer1"},
    "attention-transfer": TAUGHT | {"teacher_layers": ("stem", "layer1", "layer2")},
    "mean-teacher": SMALL | {"labels_per_class": 10, "labelled_batch": 16},
    "supcon": SMALL | {"bank": 400},
    "triplet": SMALL | {"batch_size": 60, "bank": 400},
}
DISTILLED = [slug for slug, settings in SETTINGS.items() if "teacher_epochs" in settings]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(slug, **overrides):
    return replace(training.default_config(slug, "digits"), **(SETTINGS[slug] | overrides))


def quiet(*arguments, **options):
    return training.train(*arguments, say=lambda _: None, **options)


def words(settings):
    for name, value in settings.items():
        yield f"--{name.replace('_', '-')}"
        yield from map(str, value) if isinstance(value, tuple) else [str(value)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train a run of each system from the command line."""
    out = tmp_path_factory.mktemp("runs")
    for slug, settings in SETTINGS.items():
        said = ["train", slug, "--data", DATA, "--seed", "3", "--out", str(out), "--name", slug, *words(settings)]
        assert cli.main(said) == 0
    return out


# ----------------------------------------------------------------------------------------------- from the command line


@pytest.mark.parametrize("slug", SETTINGS)
def test_it_trains_and_is_measured_again(runs, slug, capsys):
    run = Run.open(runs / slug)
    assert run.complete
    assert (run.path / "report.html").is_file()
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == list(range(2 if slug in DISTILLED else 1))
    last = rows[-1]
    assert last["train/loss"] > 0
    measured = {name.removeprefix("test/") for name in last if name.startswith("test/")}
    expected = {"accuracy", "macro_recall"}
    if slug in DISTILLED:
        expected |= {"teacher_accuracy", "teacher_macro_recall"}
    elif slug == "mean-teacher":
        expected |= {"student_accuracy", "student_macro_recall"}
    else:
        expected = {"accuracy", "knn_accuracy", "recall_at_1", "linear_accuracy"}
    assert measured == expected
    capsys.readouterr()
    again = training.evaluate(run.path, say=lambda _: None)
    assert again == {name: pytest.approx(last[f"test/{name}"], abs=1e-6) for name in measured}


@pytest.mark.parametrize("slug", ["supcon", "triplet"])
def test_embeddings_come_to_know_the_digits(runs, slug):
    assert Run.open(runs / slug).metrics()[-1]["test/accuracy"] > 0.5


@pytest.mark.parametrize("slug", SETTINGS)
def test_it_is_in_the_catalogue(slug):
    entry = catalog.get(slug)
    assert entry.task == "labelled"
    for place in entry.functions:
        assert callable(getattr(fn, place.partition(":")[2]))
    system = catalog.load_system(slug)
    system.config()  # the paper's
    assert system.config(**system.recipe).epochs < system.config().epochs


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    for said, message in (
        (["fitnets", "--hint", "layer9"], "unknown layer 'layer9'"),
        (["kd", "--ce-weight", "0", "--kd-weight", "0"], "weights must not be negative and not all be 0"),
        (["kd", "--teacher", str(tmp_path / "none")], "no such run directory"),
        (["triplet", "--images-per-class", "7"], "images_per_class must be 0 or divide"),
    ):
        assert cli.main(["train", *said, "--data", DATA, "--out", str(tmp_path)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------ the teacher's stage


def fitted(slug, learner_class, **overrides):
    config = config_of(slug, **overrides)
    system = catalog.load_system(slug)
    task = LabelledTask(Experiment.resolve(system, DATA).source(), config)
    learner = learner_class(config, SimpleNamespace(**task.facts), 0)
    return learner, fit(learner, task, evaluate_every=1, bar=False)


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_teacher_learns_first_and_then_stands_still():
    seen = []

    class Watched(CRD):
        def end_epoch(self, epoch):
            super().end_epoch(epoch)
            seen.append({name: copied(module) for name, module in self.named_children()})

    begun = Watched(config_of("crd"), SimpleNamespace(**FACTS | {"examples": 320}), 0)
    start = {name: copied(module) for name, module in begun.named_children()}
    learner, rows = fitted("crd", Watched, epochs=2, teacher_epochs=2)
    assert len(seen) == len(rows) == 4
    assert not same(start["teacher"], seen[0]["teacher"])
    assert not same(seen[0]["teacher"], seen[1]["teacher"])
    for epoch in (2, 3):
        assert same(seen[1]["teacher"], seen[epoch]["teacher"])  # parameters and running statistics
    for name in ("encoder", "classifier", "contrast"):
        assert same(start[name], seen[1][name])
        assert not same(seen[1][name], seen[2][name])
        assert not same(seen[2][name], seen[3][name])
    assert not any(p.requires_grad for p in learner.teacher.parameters())
    assert all("valid/accuracy" not in row for row in rows[:2])
    assert all("valid/accuracy" in row for row in rows[2:])
    assert rows[1]["valid/teacher_accuracy"] == rows[2]["valid/teacher_accuracy"] == rows[3]["valid/teacher_accuracy"]
    # Each network's learning rate falls to 0 over its own epochs.
    assert rows[0]["lr"] == rows[2]["lr"] > 0
    assert rows[1]["lr"] == rows[3]["lr"] == 0


def batch_of(n=24, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(n, 3, 16, 16, generator=generator) for _ in range(views)],
        "label": torch.arange(n) % 10,
        "index": torch.arange(n) + 7,
        "contrast": torch.cat([torch.arange(n)[:, None] + 7, torch.randint(50, (n, 64), generator=generator)], dim=1),
    }


def test_gradients_reach_the_student_only():
    classes = {"kd": TaughtLearner, "rkd": RKD, "crd": CRD, "fitnets": FitNets, "attention-transfer": AttentionTransfer}
    assert set(classes) == set(DISTILLED)
    for slug, learner_class in classes.items():
        learner = learner_class(config_of(slug), SimpleNamespace(**FACTS), 0)
        of_teacher = {f"teacher.{name}" for name, _ in learner.teacher.named_parameters()}

        def reached(learner=learner):
            learner.zero_grad()
            learner.loss(batch_of())["loss"].backward()
            return {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

        learner.survey = Survey(None, learner)  # as in a fit, which begins with the teacher's stage
        assert reached() == of_teacher, slug
        learner.position.next_stage()
        # A bias before a batch normalisation changes nothing; its gradient is 0 or rounding.
        expected = {name for name, _ in learner.named_parameters()} - of_teacher
        assert expected - reached() <= {"regressor.0.bias"}, slug
        assert not reached() & of_teacher, slug


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_a_labelled_system_teaches(runs, tmp_path):
    taught: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_step(self, learner, batch, losses):
            taught.append(copied(learner.instructor.module))

    config = config_of("kd", teacher=str(runs / "rkd"), epochs=1)
    run = quiet("kd", config, data=DATA, out=tmp_path, name="run", seed=1, callbacks=[Watch()])
    assert run.facts()["teacher_encoder"] == "conv-s"
    (row,) = run.metrics()
    assert row["test/teacher_accuracy"] == pytest.approx(Run.open(runs / "rkd").metrics()[-1]["test/accuracy"])
    mine, theirs = run.load_weights(), Run.open(runs / "rkd").load_weights()
    for part in ("encoder.", "classifier."):
        names = [name for name in theirs if name.startswith(part)]
        assert names
        assert len(taught) == 5
        for step in taught:
            assert all(torch.equal(step[name], theirs[name]) for name in names)
    # The run keeps what it trained, and names the teacher.
    assert not [name for name in mine if "teacher" in name or "instructor" in name]
    assert run.config["config"]["teacher"] == str(runs / "rkd")


def test_runs_that_cannot_teach_raise_an_error(runs, tmp_path):
    def refused(match, teacher, data=DATA):
        with pytest.raises(RunError, match=match):
            quiet("kd", config_of("kd", teacher=str(teacher)), data=data, out=tmp_path)

    refused("supcon cannot teach: it has no classifier", runs / "supcon")
    refused("it was trained with size 16, not 32", runs / "rkd", "digits")
    other = tmp_path / "other"
    shutil.copytree(runs / "rkd", other)
    (other / "model.safetensors").unlink()
    refused("has no model.safetensors; train it first", other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("task: labelled", "task: views"))
    refused("does not classify pictures", other)


# ---------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.usefixtures("undrawn")
def test_stopped_in_either_stage_it_ends_the_same(tmp_path, monkeypatch):
    config = config_of("crd", epochs=2, teacher_epochs=2)
    options = {"data": DATA, "out": tmp_path, "seed": 5}
    whole = quiet("crd", config, name="whole", **options)
    count, loss, stops = (
        0,
        CRD.loss,
        {3, 9, 12},
    )  # in the teacher's first epoch, at its last step, in the student's first

    def interrupted(self, batch):
        nonlocal count
        if count in stops:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(CRD, "loss", interrupted)
    with pytest.raises(Interrupted):
        quiet("crd", config, name="run", **options)
    for _ in range(2):
        with pytest.raises(Interrupted):
            training.resume(tmp_path / "run", say=lambda _: None)
    training.resume(tmp_path / "run", say=lambda _: None)
    assert count == 4 * 5  # no step was done twice
    run = Run.open(tmp_path / "run")
    assert run.metrics() == whole.metrics()
    mine, theirs = run.load_weights(), whole.load_weights()
    assert mine.keys() == theirs.keys()
    assert same(mine, theirs)


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_needs_its_teacher_and_a_finished_one_does_not(runs, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(runs / "rkd", teacher)
    config = config_of("kd", teacher=str(teacher))
    whole = quiet("kd", config, data=DATA, out=tmp_path, name="whole")
    loss = TaughtLearner.loss

    def interrupted(self, batch):
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(TaughtLearner, "loss", interrupted)
    with pytest.raises(Interrupted):
        quiet("kd", config, data=DATA, out=tmp_path, name="run")
    monkeypatch.undo()
    shutil.move(teacher, tmp_path / "elsewhere")
    with pytest.raises(RunError, match=f"{teacher}: no such run directory"):
        training.resume(tmp_path / "run", say=lambda _: None)
    shutil.copytree(runs / "crd", teacher)  # another network under the name
    with pytest.raises(RunError, match=f"teacher run:{teacher} has other weights than when this run began"):
        training.resume(tmp_path / "run", say=lambda _: None)
    shutil.rmtree(teacher)
    shutil.move(tmp_path / "elsewhere", teacher)
    run = training.resume(tmp_path / "run", say=lambda _: None)
    assert run.metrics() == whole.metrics()
    assert same(run.load_weights(), whole.load_weights())
    shutil.rmtree(teacher)
    assert training.evaluate(run.path, say=lambda _: None)["accuracy"] == whole.metrics()[-1]["test/accuracy"]


# ------------------------------------------------------------------------------------------------------ what is taught


def test_the_terms_are_the_functions_of_the_two_networks():
    facts, batch = SimpleNamespace(**FACTS), batch_of()
    (view,), label = batch["views"], batch["label"]
    common = TAUGHT | {"kd_weight": 0.5, "kd_temperature": 2.0}
    for learner in (
        TaughtLearner(KDConfig(**common), facts),
        RKD(RKDConfig(**common), facts),
        FitNets(FitNetsConfig(**common, guided="stem", hint="layer1"), facts),
        AttentionTransfer(
            AttentionTransferConfig(**common, student_layers=("stem", "layer2"), teacher_layers=("layer1", "layer2")),
            facts,
        ),
        CRD(CRDConfig(**common, negatives=64, dim=16), facts),
    ):
        contrast = (
            [bank.rows.clone() for bank in (learner.contrast.memory_student, learner.contrast.memory_teacher)]
            if (isinstance(learner, CRD))
            else []
        )
        found = {name: value.detach() for name, value in learner.loss(batch).items()}
        with torch.no_grad():
            student = look(learner, view, learner.layers()[0])
            teacher = look(learner.teacher.eval(), view, learner.layers()[1])
            config = learner.config
            expected = {
                "ce": config.ce_weight * F.cross_entropy(student.logits, label),
                "kd": 0.5 * fn.kd(student.logits, teacher.logits, 2.0),
            }
            if isinstance(learner, RKD):
                relations = fn.rkd(student.feature, teacher.feature)
                expected |= {"distance": 25 * relations.distance, "angle": 50 * relations.angle}
            elif isinstance(learner, FitNets):
                assert student.maps[0].shape[1:] == (32, 8, 8)
                assert teacher.maps[0].shape[1:] == (64, 4, 4)
                expected["hint"] = 100 * (learner.regressor(student.maps[0]) - teacher.maps[0]).square().mean()
            elif isinstance(learner, AttentionTransfer):
                pairs = zip(student.maps, teacher.maps, strict=True)
                expected["attention"] = 1000 * sum(fn.attention_transfer(s, t) for s, t in pairs)
            elif isinstance(learner, CRD):
                v = F.normalize(learner.contrast.embed_student(student.feature), dim=1)
                w = F.normalize(learner.contrast.embed_teacher(teacher.feature), dim=1)
                out = fn.crd(v, w, *contrast, batch["index"], batch["contrast"])
                expected["contrast"] = 0.8 * out.loss
                torch.testing.assert_close(learner.contrast.memory_student.rows, out.memory_student)
        assert found.pop("loss").item() == pytest.approx(sum(found.values()).item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_layers_are_found_by_name_and_let_go():
    learner = TaughtLearner(KDConfig(**TAUGHT), SimpleNamespace(**FACTS))
    with recorded(learner.encoder, ["stem", "layer2"]) as seen:
        feature = learner.encoder(torch.zeros(2, 3, 16, 16))
    torch.testing.assert_close(seen["layer2"].mean((2, 3)), feature)
    assert not any(module._forward_hooks for module in learner.modules())
    with pytest.raises(CounterpointError, match=r"unknown layer 'layr1'; did you mean layer1"):
        layer(learner.encoder, "layr1")
    wrapped = TaughtLearner(KDConfig(**TAUGHT | {"encoder": "timm:resnet10t"}), SimpleNamespace(**FACTS)).encoder
    assert layer(wrapped, "layer1") is wrapped.model.layer1


def test_layers_that_do_not_fit_raise_an_error():
    facts = SimpleNamespace(**FACTS)
    with pytest.raises(CounterpointError, match=r"student's layer2 cannot be guided by the teacher's stem"):
        FitNets(FitNetsConfig(**TAUGHT, guided="layer2", hint="stem"), facts)
    with pytest.raises(CounterpointError, match="must form pairs, got 3 and 2"):
        AttentionTransferConfig(teacher_layers=("layer1", "layer2"))
    with pytest.raises(CounterpointError, match=r"layer norm must return maps .* got \[16, 192\]|must return maps"):
        AttentionTransfer(
            AttentionTransferConfig(
                **TAUGHT | {"encoder": "vit-s"}, student_layers=("norm",), teacher_layers=("layer1",)
            ),
            facts,
        )


def test_negatives_are_those_of_other_classes_and_the_same_for_every_process(monkeypatch):
    labels = np.arange(50) % 10
    learner = CRD(config_of("crd"), SimpleNamespace(**FACTS), 0)
    learner.begin(SimpleNamespace(labels=torch.from_numpy(labels), examples=50))
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:11]
    image = torch.zeros(11, 3, 16, 16, dtype=torch.uint8)

    def drawn(rows):
        batch = {"image": image[rows], "index": index[rows], "label": None}
        return learner.prepare(batch, torch.Generator().manual_seed(4))["contrast"]

    whole = drawn(slice(None))
    assert whole[:, 0].tolist() == index.tolist()
    assert (labels[whole[:, 1:]] != labels[whole[:, :1]]).all()
    for rank in range(2):
        module = "counterpoint.engine.learner"
        monkeypatch.setattr(f"{module}.world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(f"{module}.place", lambda rows, device: SimpleNamespace(total=11))
        monkeypatch.setattr(f"{module}.row_counts", lambda rows, device: [6, 5])
        monkeypatch.setattr(f"{module}.gather_rows", lambda rows: torch.cat([index[0::2], index[1::2]]))
        assert torch.equal(drawn(slice(rank, None, 2)), whole[rank::2])
        monkeypatch.undo()


# --------------------------------------------------------------------------------------------------------- the others


def test_a_mean_teacher_follows_and_unknown_classes_do_not_count():
    config = MeanTeacherConfig(**SETTINGS["mean-teacher"])
    learner = MeanTeacher(config, SimpleNamespace(**FACTS), 0)
    batch = batch_of(views=2)
    batch["label"][10:] = -1
    losses = learner.loss(batch)
    logits = learner.classifier(learner.encoder(batch["views"][0]))
    expected = F.cross_entropy(logits[:10], batch["label"][:10], reduction="sum") / 24
    torch.testing.assert_close(losses["ce"], expected)
    apart = fn.mean_teacher(logits, learner.teacher(batch["views"][1]))
    torch.testing.assert_close(losses["consistency"], apart.mse)
    torch.testing.assert_close(losses["loss"], expected + 100 * sigmoid_ramp(0, 5) * apart.mse)
    losses["loss"].backward()
    assert all(p.grad is None for p in learner.teacher.parameters())
    before = learner.teacher.module[0].stem[0].weight.clone()
    with torch.no_grad():
        learner.encoder.stem[0].weight += 1
    for step, momentum in ((0, 0.5), (5000, 0.999)):
        learner.position.step = step
        learner.end_step()
        before = momentum * before + (1 - momentum) * learner.encoder.stem[0].weight
        torch.testing.assert_close(learner.teacher.module[0].stem[0].weight, before.detach())
    kl = MeanTeacher(replace(config, consistency_type="kl"), SimpleNamespace(**FACTS), 0)
    torch.testing.assert_close(kl.loss(batch)["consistency"], fn.mean_teacher(logits, kl.teacher(batch["views"][1])).kl)
    found = learner.eval().predict({"image": batch["views"][0]})
    torch.testing.assert_close(found["logits"], learner.teacher(batch["views"][0]))
    assert found.keys() == {"feature", "logits", "student_logits"}


def test_supcon_and_triplet_lose_what_their_functions_say():
    facts = SimpleNamespace(**FACTS)
    batch = batch_of(views=2)
    learner = SupCon(SupConConfig(**SMALL, hidden=32, projection=8), facts)
    x = F.normalize(learner.projector(learner.encoder(torch.cat(batch["views"]))), dim=1)
    features = torch.stack([x[:24], x[24:]], dim=1)
    torch.testing.assert_close(learner.loss(batch)["loss"], supcon(features, batch["label"], 0.1, 0.07))
    assert learner.predict({"image": batch["views"][0]})["feature"].shape == (24, learner.encoder.dim)
    one = batch_of()
    settings = SMALL | {"batch_size": 24, "pretrained": False}
    metric = Triplet(TripletConfig(**settings, hidden=32, projection=8), facts)
    torch.testing.assert_close(
        metric.loss(one)["loss"], triplet_hard(metric.embed(one["views"][0]), one["label"], 0.2).loss
    )
    assert metric.predict({"image": one["views"][0]})["feature"].shape == (24, 8)


@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        (CRDConfig, {"negatives": 0}, "negatives must be at least 1"),
        (KDConfig, {"kd_temperature": 0.0}, "kd_temperature must be > 0"),
        (KDConfig, {"teacher_epochs": -1}, "teacher_epochs must not be negative"),
        (RKDConfig, {"angle_weight": -1.0}, "angle_weight -1.0"),
        (MeanTeacherConfig, {"ema_momentum": 2.0}, "ema_momentum must lie in 0..1"),
        (SupConConfig, {"temperature": 0.0}, "temperature and base_temperature must be > 0"),
        (TripletConfig, {"margin": 0.0}, "margin must be > 0"),
    ],
)
def test_settings_that_make_no_sense_raise_an_error(config, settings, match):
    with pytest.raises(CounterpointError, match=match):
        config(**settings)
