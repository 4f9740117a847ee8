"""CAPro: the authors' numbers, identities, edges, texts of one's own, training, resuming, processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core.prototypes import moved_prototypes
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.supervision import capro as file
from counterpoint.tasks import judged
from counterpoint.tasks.web_texts import embedded_texts, trusted_by_text
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "capro.npz")
NAMES = ("logits", "z", "z_key", "logits_low", "feature", "reconstructed", "labels", "trusted", "queue", "prototypes")
PARAMS = ("alpha", "threshold", "beta", "temperature", "proto_momentum", "clean", "keep_trusted")
DATA = "query-digits?train=60"
CANVASES = "query-canvases?train=66&test=10"
SMALL: dict[str, Any] = {
    "encoder": "mlp-s", "recipe": "digits-plain", "warm_epochs": 1, "epochs": 3, "frozen_epochs": 1, "clean_after": 2,
    "finetune_epochs": 1, "batch_size": 20, "projection": 8, "hidden": 16, "queue": 40, "trusted": 3, "evaluate_every": 9,
}  # fmt: skip


def case(number: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of a case, and the outputs."""
    prefix = f"case{number}/"
    at = {n.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[n])) for n in PARITY if n.startswith(prefix)}
    at = {name: x.to(dtype) if x.is_floating_point() and x.ndim else x for name, x in at.items()}
    given: dict[str, Any] = {name: at[f"in/{name}"] for name in NAMES}
    given |= {name: at[f"param/{name}"].item() for name in PARAMS}
    given["classifier_low"] = at["weight/classifier_low"]
    return given, {name.removeprefix("out/"): x for name, x in at.items() if name.startswith("out/")}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", [0, 1])
def test_a_step_equals_the_authors(number, dtype, rtol):
    given, wanted = case(number, dtype)
    found = fn.capro_step(**given)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=rtol, atol=rtol, check_dtype=False)


def test_the_gradient_equals_finite_differences():
    given, _ = case(0)
    through = ("logits", "z", "logits_low", "reconstructed")

    def loss(*args: Tensor) -> Tensor:
        # Soft labels depend on z without gradient.
        return fn.capro_step(**(given | dict(zip(through, args, strict=True)) | {"beta": 0.0}))["loss"]

    assert torch.autograd.gradcheck(loss, [given[name].clone().requires_grad_() for name in through])


def test_with_alpha_of_one_the_classifier_alone_judges():
    given, _ = case(0)
    found = fn.capro_step(**(given | {"alpha": 1.0}))
    wanted = fn.judged_labels(given["logits"].softmax(1), given["labels"], 0.6, given["trusted"].bool())
    assert torch.equal(found["new_label"], wanted.label)


def test_without_beta_the_low_term_is_the_cross_entropy():
    given, _ = case(1)
    found = fn.capro_step(**(given | {"beta": 0.0}))
    torch.testing.assert_close(found["loss_lowdim"], F.cross_entropy(given["logits_low"], given["labels"]))


def test_warm_up_has_no_prototypes():
    given, _ = case(0)
    found = fn.capro_step(**(given | {"prototypes": None}))
    assert float(found["loss_proto"]) == 0
    assert found["prototypes_after"] is None
    assert found["kept"].all()
    torch.testing.assert_close(found["loss_lowdim"], F.cross_entropy(given["logits_low"], given["labels"]))


def test_a_batch_whose_rows_are_all_removed_has_its_instance_contrast_alone():
    given, _ = case(1)
    flat = torch.zeros_like(given["logits"]).scatter(1, given["labels"][:, None], -50.0)
    near = F.normalize(torch.ones_like(given["prototypes"]), dim=1)
    found = fn.capro_step(**(given | {"logits": flat, "clean": True, "prototypes": near}))
    assert not found["kept"].any()
    torch.testing.assert_close(found["loss"], found["loss_inst"])
    torch.testing.assert_close(found["prototypes_after"], near)


def test_prototypes_move_by_their_rows_one_after_another():
    rows, labels = F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1), torch.tensor([0, 1, 0, -1, 0, 1])
    start = F.normalize(torch.randn(3, 3, dtype=torch.float64), dim=1)
    wanted = start.clone()
    for row, label in zip(rows, labels.tolist(), strict=True):
        if label >= 0:
            wanted[label] = 0.7 * wanted[label] + 0.3 * row
    torch.testing.assert_close(moved_prototypes(start, rows, labels, 0.7), F.normalize(wanted, dim=1))
    dealt = torch.tensor([0, 2, 4, 1, 3, 5])  # as two processes hold them
    found = moved_prototypes(start, rows[dealt], labels[dealt], 0.7, dealt.argsort())
    torch.testing.assert_close(found, F.normalize(wanted, dim=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"z": torch.ones(3, 6).double()}, "z and z_key"),
        ({"labels": torch.tensor([0, 1])}, "every row needs"),
        ({"labels": torch.full((8,), 9)}, "label must lie in 0..3"),
        ({"queue": torch.ones(5, 9).double()}, r"queue must be \[6, keys\]"),
        ({"prototypes": torch.ones(3, 6).double()}, "prototypes and classifier_low"),
    ],
)
def test_bad_arguments_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        fn.capro_step(**(case(0)[0] | change))


# ------------------------------------------------------------------------------------------------------------------ texts


def test_words_relate_texts_and_a_missing_one_is_zero():
    found = embedded_texts("words", ["a red cat", "A RED dog", "", "one dog"])
    assert float(found[0] @ found[1]) > 0.5
    assert float(found[0] @ found[3]) == 0
    assert not found[2].any()


def test_smoothed_texts_choose_the_pictures_of_the_right_sense():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 2
    features = 4 * torch.eye(8)[truth] + torch.randn(60, 8, generator=generator)
    texts = torch.eye(4)[truth]
    texts[::3] = 0  # missing
    labels = torch.zeros(60, dtype=torch.long)  # all pictures have one label
    found = trusted_by_text(features, texts, torch.eye(4)[:2], labels, top=10, neighbours=10)[0]
    assert int(found.sum()) == 10
    assert not truth[found].any()


def test_rounding_of_features_does_not_change_the_choice():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 8, generator=generator)
    texts = torch.cat([torch.rand(60, 20, generator=generator), torch.zeros(60, 4)], 1)
    texts = F.normalize(texts, dim=1)  # all are at the same distance from the definitions
    labels, definitions = torch.arange(60) % 4, torch.eye(24)[-4:]
    chosen = trusted_by_text(features, texts, definitions, labels, top=5, neighbours=8)[0]
    for _ in range(5):
        near = features * (1 + 1e-7 * torch.randn(features.shape, generator=generator))
        assert torch.equal(trusted_by_text(near, texts, definitions, labels, top=5, neighbours=8)[0], chosen)


def folder(place: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        (place / "cat").mkdir(exist_ok=True)
        (place / "dog").mkdir(exist_ok=True)
        for name in ("cat", "dog"):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                place / name / f"{name}{number}.png"
            )


def test_texts_of_ones_own_are_matched_by_file(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    folder(pictures)
    lines = ["file,text", *(f"{name}{n}.png,a furry {name} number {n}" for name in ("cat", "dog") for n in range(30))]
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    (tmp_path / "classes.json").write_text(json.dumps({"cat": "a furry pet that purrs", "dog": "a pet that barks"}))
    own = {"texts": str(tmp_path / "texts.csv"), "definitions": str(tmp_path / "classes.json")}
    data = f"imagefolder:{pictures}?size=16"
    learner, task = built(data, **own, encoder="conv-s", recipe="weak")
    assert task.data.texts.definitions == ("cat . a furry pet that purrs", "dog . a pet that barks")
    assert "have a text" in task.data.notes[-1]
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert int(learner.trusted.sum()) == 6
    with pytest.raises(DataError, match="has no texts; give --texts FILE"):
        built(data, encoder="conv-s")
    (tmp_path / "texts.csv").write_text("file,caption\nx,y\n")
    with pytest.raises(DataError, match="needs the columns file and text, has file, caption"):
        built(data, **own)
    (tmp_path / "texts.csv").write_text("file,text\nx,y\n")
    with pytest.raises(DataError, match="names no training picture"):
        built(data, **own)
    with pytest.raises(DataError, match="cannot be read"):
        built(data, texts=str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="definitions need the texts"):
        built(data, definitions=own["definitions"])


# --------------------------------------------------------------------------------------------------------------- training


def built(data: str = DATA, **settings: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("capro", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_training_goes_through_the_function_and_its_stages(monkeypatch):
    learner, task = built()
    calls, function = [], file.capro_step

    def noted(**given: Any) -> dict[str, Any]:
        calls.append((learner.stage_name, given["prototypes"] is not None, given["clean"], function(**given)))
        return calls[-1][-1]

    monkeypatch.setattr(file, "capro_step", noted)
    rows = fit(learner, task, bar=False)
    stages = [(stage, prototypes, clean) for stage, prototypes, clean, _ in calls[::3]]
    assert stages == [
        ("warm-up", False, False),
        ("frozen encoder", False, False),
        ("main", True, False),
        ("main", True, True),
    ]
    # The queue that the function returns is the one of the next step.
    torch.testing.assert_close(
        calls[-1][-1]["queue_after"].T, learner.queue.rows.roll(-int(learner.queue.pointer), 0).roll(20, 0)
    )
    assert len(rows) == 5
    assert (learner.judged > -2).all()
    assert {"test/label_precision", "test/start_precision", "test/kept_share"} <= set(rows[-1])
    assert int(learner.trusted.sum()) == 30


def test_heads_start_with_the_authors_weights():
    learner, _ = built(projection=32, hidden=128)
    for layer in (learner.projector[0], learner.projector[2], learner.reconstructor[2], learner.classifier_low):
        bound = (6 / layer.in_features) ** 0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert layer.bias is None or torch.equal(layer.bias, torch.full_like(layer.bias, 0.01))


def test_a_frozen_encoder_does_not_change():
    learner, task = built(warm_epochs=0, epochs=2, frozen_epochs=1)
    before = learner.encoder.state_dict()["layer1.0.weight"].clone()
    monitored = []
    learner.end_epoch = lambda epoch: monitored.append(learner.encoder.state_dict()["layer1.0.weight"].clone())
    fit(learner, task, bar=False)
    assert torch.equal(monitored[0], before)
    assert not torch.equal(monitored[1], before)


@pytest.mark.parametrize("settings", [{"prototypes": "labels"}, {"objective": "cross-entropy", "mixup": 0.0}])
def test_baselines_train(settings):
    learner, task = built(**settings)
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert row["test/start_precision"] < 1


@pytest.mark.parametrize(
    ("data", "interrupt_at"),
    [(DATA, (1, 5, 8, 13)), (CANVASES, (8, 13))],  # in each stage
)
def test_interrupted_and_resumed_it_ends_the_same(data, interrupt_at, tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("capro", data, overrides=SMALL).config
    need_equal_ends(monkeypatch, file.CAPro, "capro", config, data, interrupt_at, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("data", [DATA, CANVASES])
def test_two_processes_learn_the_same_as_one(data, tmp_path):
    small = SMALL | {"encoder": "vit-xs", "recipe": "none", "finetune_epochs": 0, "lr": 0.01, "proto_momentum": 0.9}
    words = ["train", "capro", "--data", data, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("capro", data, overrides=small).config
    one = training.train("capro", config, data=data, out=tmp_path, name="one", say=lambda _: None).metrics()
    for mine, other in zip(one, Run.open(tmp_path / "two").metrics(), strict=True):
        for name in ("train/loss", "train/loss_proto", "train/kept"):
            assert other[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert torch.equal(*(end["trusted"] for end in ends))
    torch.testing.assert_close(*(end["prototype_rows"] for end in ends), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- several labels


def test_pictures_with_several_labels_train_through_their_function(monkeypatch):
    learner, task = built(CANVASES)
    calls, function = [], file.capro_tags_step

    def noted(**given: Any) -> dict[str, Any]:
        calls.append((learner.stage_name, given["prototypes"] is not None, given["clean"], function(**given)))
        return calls[-1][-1]

    monkeypatch.setattr(file, "capro_tags_step", noted)
    row = fit(learner, task, bar=False)[-1]
    assert [call[:3] for call in calls[::3]] == [
        ("warm-up", False, False), ("frozen encoder", False, False), ("main", True, False), ("main", True, True)
    ]  # fmt: skip
    assert learner.trusted.shape == (66, 10)
    assert (learner.trusted.sum(0) <= 3).all()
    assert (learner.judged > -2).all()
    torch.testing.assert_close(learner.prototype_rows.norm(dim=2), torch.ones(10, 2))
    wanted = {"accuracy", "mean_ap", "overall_ap", "class_f1", "overall_f1", "label_precision", "start_precision"}
    assert wanted <= {name.removeprefix("test/") for name in row}
    assert np.isfinite(row["train/loss"])
    present = learner.present_weight
    counts = 1 + task.data.tags.train.sum(0)
    torch.testing.assert_close(present, torch.from_numpy(((66 - counts) / counts) ** 0.5).float())


def test_texts_start_the_prototypes_of_several_labels():
    learner, task = built("query-canvases?train=400&test=10", trusted=10, warm_epochs=1, epochs=1, frozen_epochs=0)
    row = fit(learner, task, bar=False)[-1]
    assert row["test/start_precision"] > 0.9  # of all labels, 0.6 are true


@pytest.mark.parametrize("settings", [{"prototypes": "labels"}, {"objective": "cross-entropy", "mixup": 0.0}])
def test_baselines_of_several_labels_train(settings):
    learner, task = built(CANVASES, **settings)
    assert np.isfinite(fit(learner, task, bar=False)[-1]["train/loss"])


def test_pictures_are_named_by_the_end_of_their_path_and_never_two_by_one(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(30):
            pixels = np.random.default_rng([len(name), ord(name[0]), number]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    data, texts = f"imagefolder:{tmp_path / 'pictures'}?size=16", tmp_path / "texts.csv"
    texts.write_text(
        "\n".join(["file,text", *(f"{name}/{n}.png,a {name}" for name in ("cat", "dog") for n in range(30))])
    )
    _, task = built(data, texts=str(texts), encoder="conv-s", recipe="weak")
    found = [task.data.classes[label] for label in task.data.train.labels]
    assert list(task.data.texts.train) == [f"a {name}" for name in found]
    texts.write_text("\n".join(["file,text", *(f"{n}.png,an animal" for n in range(30))]))
    with pytest.raises(DataError, match=r"'\d+\.png' names .*cat/\d+\.png and .*dog/\d+\.png; write the folder, too"):
        built(data, texts=str(texts), encoder="conv-s")


def test_labels_of_ones_own_are_matched_by_file(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    folder(pictures)
    names = [f"{name}{n}.png" for name in ("cat", "dog") for n in range(40)]
    tags = ["cat; grass" if n % 3 else "cat;sky ;cat" for n in range(40)] + ["dog", ""] * 20
    (tmp_path / "tags.csv").write_text("\n".join(["file,tags", *map(",".join, zip(names, tags, strict=True))]))
    (tmp_path / "texts.csv").write_text("\n".join(["file,text", *(f"{name},a {name[:3]} outside" for name in names)]))
    own = {"texts": str(tmp_path / "texts.csv"), "tags": str(tmp_path / "tags.csv"), "encoder": "conv-s"}
    data = f"imagefolder:{pictures}?size=16"
    learner, task = built(data, **own, recipe="weak")
    assert task.data.classes == ("cat", "dog", "grass", "sky")
    assert "4 labels" in " ".join(task.data.notes)
    assert (task.data.tags.train.sum(1) == 0).any()
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert 0 <= row["test/mean_ap"] <= 1
    for text, said in (
        ("file,labels\nx,y", "needs the columns file and tags"),
        ("file,tags\nx,y", "names no training picture"),
        ("file,tags\n" + "\n".join(f"{name},cat" for name in names), "one label cat"),
        ("file,tags\n" + "\n".join(f"{name},{name}" for name in names), "no training picture has the label"),
    ):
        (tmp_path / "tags.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            built(data, **own)


# -------------------------------------------------------------------------------------------------------------- open sets


def test_pictures_of_no_known_class_are_discarded_and_reported():
    learner, task = built("query-digits?train=100&others=0.2&unknown=0.3")
    assert (task.data.test.labels == -1).sum() == round(0.3 * (task.data.test.labels >= 0).sum())
    row = fit(learner, task, bar=False)[-1]
    for name in ("open_f1", "unknown_auroc", "unknown_removed"):
        assert 0 <= row[f"test/{name}"] <= 1
    assert {"valid/open_f1", "valid/unknown_auroc"} <= set(row)


def test_pictures_of_no_known_class_of_ones_own_join_valid_and_test(tmp_path):
    pictures, others = tmp_path / "pictures", tmp_path / "others"
    pictures.mkdir()
    folder(pictures)
    others.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 90)).save(others / f"{number}.png")
    data, own = f"imagefolder:{pictures}?size=16", {"prototypes": "labels", "encoder": "conv-s", "recipe": "weak"}
    learner, task = built(data, unknown=f"imagefolder:{others}", **own)
    assert "6 valid and 6 test pictures are of no known class" in task.data.notes[-1]
    row = fit(learner, task, bar=False)[-1]
    assert 0 <= row["test/unknown_auroc"] <= 1
    with pytest.raises(DataError, match=r"--unknown .* has pictures of 32 pixels"):
        built(data, unknown=f"imagefolder:{others}?size=32", **own)


# --------------------------------------------------------------------------------------------------------------- large sets


def test_approximate_neighbours_choose_and_their_recall_is_reported():
    learner, task = built(graph_search="approximate")
    row = fit(learner, task, bar=False)[-1]
    assert row["test/graph_recall"] >= 0.95
    exact, _ = built()
    fit(exact, task, bar=False)
    assert float((learner.trusted == exact.trusted).float().mean()) > 0.9


def test_approximate_neighbours_need_faiss(monkeypatch):
    monkeypatch.setattr(judged, "find_spec", lambda name: None)
    with pytest.raises(CounterpointError, match=r"counterpoint\[search\]"):
        built(graph_search="approximate")


@pytest.mark.parametrize("data", [DATA, CANVASES])
@pytest.mark.usefixtures("drawn")
def test_the_page_shows_what_became_of_the_labels(data, tmp_path):
    words = ["train", "capro", "--data", data, "--out", str(tmp_path), "--name", "x"]
    assert cli.main([*words, *(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items())]) == 0
    found = json.loads((tmp_path / "x" / "figures.json").read_text())
    series = found["Labels over the epochs"]["series"]
    assert set(series) == {"kept", "corrected", "removed", "kept or corrected, and right"}
    assert sum(series[name][1][-1] for name in ("kept", "corrected", "removed")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queue": 4}, "queue"),
        ({"frozen_epochs": 3}, "frozen_epochs"),
        ({"warm_epochs": -1}, "warm_epochs"),
        ({"threshold": 1.5}, "threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"prototypes": "none"}, "prototypes"),
        ({"objective": "none"}, "objective"),
        ({"trusted": 0}, "trusted"),
        ({"graph_search": "fast"}, "graph_search"),
        ({"text_encoder": "minilmm"}, "minilmm"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


@pytest.mark.parametrize("option", ["flipped=2", "missing=-1", "train=3", "test=1", "noise=-1", "held_out=1"])
def test_bad_options_of_canvases_are_named(option):
    with pytest.raises(DataError, match=option.partition("=")[0]):
        built(f"query-canvases?{option}")


@pytest.mark.parametrize("option", ["flipped=2", "missing=-1", "train=3", "held_out=1", "unknown=2"])
def test_bad_options_of_the_source_are_named(option):
    with pytest.raises(DataError, match=option.partition("=")[0]):
        built(f"query-digits?{option}")


def test_defaults_are_the_paper_s():
    config = load_system("capro").config()
    assert (config.warm_epochs, config.epochs, config.frozen_epochs, config.clean_after) == (120, 60, 5, 10)
    assert (config.alpha, config.beta, config.threshold, config.temperature, config.queue) == (0.5, 0.1, 0.6, 0.1, 8192)
    assert (config.proto_momentum, config.momentum_teacher, config.projection, config.hidden) == (
        0.999,
        0.999,
        128,
        2048,
    )
    assert (config.trusted, config.graph_neighbours, config.graph_kept, config.self_weight) == (50, 20, 5, 0.0)
    assert (config.finetune_epochs, config.finetune_lr, config.mixup, config.lr) == (15, 1e-4, 0.8, 0.1)
