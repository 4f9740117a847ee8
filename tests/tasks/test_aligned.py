"""The task `aligned`: its measures against brute force, its batches, and training from the command line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint import cli, training
from counterpoint.data.images import ArrayImages
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.encoders.vectors import build_vector_encoder
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned import (
    TASK,
    AlignedConfig,
    AlignedEvaluator,
    first_two,
)
from counterpoint.tasks.measures import (
    alignment,
    class_means,
    identification,
    knn_accuracy,
    linear_probe,
    retrieval,
    retrieval_recall,
    zero_shot_accuracy,
)

SMALL = "glyphs?train=96&test=40&size=32&styles=codicon"
OPTIONS = [
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--image-encoder",
    "conv-s",
    "--embedding",
    "16",
    "--evaluate-every",
    "1",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_recall_is_that_of_sorting_everything():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(50, 6, generator=g), torch.randn(70, 6, generator=g)
    groups, keys = torch.randint(0, 30, (50,), generator=g), torch.randint(0, 30, (70,), generator=g)
    found = retrieval_recall(query, key, groups, keys, at=(1, 3, 10))
    order = (query @ key.T).argsort(1, descending=True)
    asked = [i for i in range(50) if (keys == groups[i]).any()]
    assert len(asked) < 50
    for k, value in found.items():
        hits = [any(keys[j] == groups[i] for j in order[i, :k]) for i in asked]
        assert value == pytest.approx(sum(hits) / len(asked))


def test_items_that_belong_together_are_found_first():
    x = torch.eye(20)
    assert retrieval_recall(x, x) == {1: 1.0, 5: 1.0, 10: 1.0}
    assert retrieval_recall(x, x.roll(1, 0))[1] == 0.0


def test_zero_shot_leaves_out_what_has_no_class():
    items, prompts = torch.eye(4), torch.eye(4)[:3]
    assert zero_shot_accuracy(items, prompts, torch.tensor([0, 1, 0, -1])) == pytest.approx(2 / 3)
    assert math.isnan(zero_shot_accuracy(items, prompts, torch.full((4,), -1)))
    with pytest.raises(ValueError, match="one for each class, got 3 and the label 3"):
        zero_shot_accuracy(items, prompts, torch.arange(4))
    with pytest.raises(ValueError, match="items holds NaN"):  # which argmax would take for the first class
        zero_shot_accuracy(items * math.nan, prompts, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="items and prompts must be of one width, got 4 and 2"):
        zero_shot_accuracy(items, prompts[:, :2], torch.zeros(4, dtype=torch.int64))


def test_neighbours_and_probes_leave_out_what_has_no_class():
    g = torch.Generator().manual_seed(0)
    rows, labels = torch.eye(3).repeat(5, 1) + 0.01 * torch.randn(15, 3, generator=g), torch.arange(15) % 3
    some, asked = labels.clone(), torch.tensor([0, 1, -1])
    some[::4] = -1
    keep = some >= 0
    assert knn_accuracy(rows, some, torch.eye(3), asked, k=3) == 1.0
    accuracy, told = linear_probe(rows, some, torch.eye(3), asked)
    whole, same = linear_probe(rows[keep], some[keep], torch.eye(3)[:2], asked[:2])
    assert (accuracy, told.tolist()) == (1.0, [0, 1, 2])
    assert (whole, same.tolist()) == (1.0, [0, 1])
    assert math.isnan(knn_accuracy(rows, labels, rows[:0], labels[:0]))
    assert math.isnan(knn_accuracy(rows, labels * 0 - 1, rows, labels))
    assert linear_probe(rows[:1], labels[:1], rows[:2], labels[:2])[0] == 0.5  # one example has no spread
    with pytest.raises(ValueError, match="no example has a class"):
        linear_probe(rows, labels * 0 - 1, rows, labels)


def test_rows_that_do_not_fit_raise_an_error():
    x, y = np.eye(3), torch.eye(3)  # float64 and float32
    assert retrieval(x, y)["r1"] == 1.0
    assert alignment(x, y) == 0.0
    with pytest.raises(ValueError, match="x and y must be"):  # one row would be compared with all
        alignment(x, x[:1])


def test_a_group_that_nobody_votes_for_is_not_told():
    # All of group 0's snippets find group 1's: the only group with a vote is the wrong one.
    found = identification(torch.eye(2)[[1, 1]], torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]), neighbours=1)
    assert found == {"accuracy": 0.0, "mrr": 0.5}
    with pytest.raises(ValueError, match="key holds NaN"):
        identification(torch.eye(2), torch.eye(2) * math.nan, torch.arange(2), torch.arange(2))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("aligned")
    assert cli.main(["train", "clip", "--data", SMALL, *OPTIONS, "--out", str(folder), "--name", "clip"]) == 0
    return Run.open(folder / "clip")


def test_a_run_holds_what_is_needed_to_use_it_again(run, capsys):
    last = run.metrics()[-1]
    assert last["test/mean_recall"] == pytest.approx(
        np.mean([last[f"test/{a}_to_{b}_r{k}"] for a, b in (("image", "text"), ("text", "image")) for k in (1, 5, 10)])
    )
    assert cli.main(["evaluate", str(run.path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    chance = again.pop("chance")
    assert set(chance) < set(again)
    assert 0 < chance["mean_recall"] < 1
    for name, value in again.items():
        assert value == pytest.approx(last[f"test/{name}"], abs=1e-6), name
    learner = training.load_learner(run)
    assert learner.log_scale.item() <= math.log(100)


def test_siglip_trains(tmp_path):
    words = ["train", "siglip", "--data", SMALL, *OPTIONS, "--epochs", "4", "--out", str(tmp_path), "--name", "run"]
    assert cli.main(words) == 0
    rows = Run.open(tmp_path / "run").metrics()
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_own_captioned_images_train(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
    lines = ["file_name,text"]
    rng = np.random.default_rng(0)
    for number in range(80):
        name, colour = list(colours.items())[number % 4]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (24, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,a {name} picture")
    (folder / "metadata.csv").write_text("\n".join(lines))
    words = f"train clip --data imagefolder:{folder}?size=16 --epochs 12 --batch-size 16 --image-encoder conv-s".split()
    words += f"--embedding 16 --evaluate-every 12 --out {tmp_path} --name run".split()
    assert cli.main(words) == 0
    last = Run.open(tmp_path / "run").metrics()[-1]
    # Sixteen test pictures in four colours: any caption of the right colour counts.
    assert last["test/image_to_text_r1"] > 0.5


def columns(n: int, **presence):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (n, 8, 8, 3)).astype(np.uint8)
    return AlignedColumns(
        {"image": ArrayImages(pixels), "vector": rng.random((n, 5), np.float32)}, presence=presence or None
    )


def test_a_missing_modality_is_marked_and_left_out_of_retrieval():
    there = np.arange(12) % 3 > 0
    data = AlignedData(
        "own",
        columns(20),
        columns(6),
        columns(12, vector=there),
        {"image": Modality("image", size=8), "vector": Modality("vector", dim=5)},
    )
    task = TASK(data, AlignedConfig(batch_size=4, image_encoder="conv-s"))
    (batch,) = list(task.evaluation_loader("test"))
    assert batch["present"]["vector"].tolist() == there.tolist()
    evaluator = task.evaluator("test")
    # Embeddings that find their own partner, and nothing at all where there is no vector.
    x = torch.eye(12)
    evaluator.update(batch, {"embedding": {"image": x, "vector": x * torch.from_numpy(there)[:, None]}})
    assert evaluator.compute()["image_to_vector_r1"] == 1.0


def test_settings_and_data_that_do_not_fit_raise_an_error(tmp_path, capsys):
    data = AlignedData(
        "own",
        columns(20),
        columns(6),
        columns(12),
        {"image": Modality("image", size=8), "vector": Modality("vector", dim=5)},
    )
    with pytest.raises(DataError, match="20 training items, fewer than a batch of 64"):
        TASK(data, AlignedConfig(batch_size=64, image_encoder="conv-s")).check_training()
    with pytest.raises(CounterpointError, match="prompt must contain"):
        AlignedConfig(prompt="a picture")
    with pytest.raises(CounterpointError, match="aligns two modalities, the data has a, b, c"):
        first_two({"a": 0, "b": 0, "c": 0})
    assert cli.main(["train", "clip", "--data", "digits", "--out", str(tmp_path)]) == 2
    assert "not for aligned" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def three_vectors(n: int, labels=None, **presence):
    """Make three modalities of one-hot vectors, of which some items share theirs."""
    rows = np.eye(4, dtype=np.float32)[np.arange(n) % 4]
    labels = None if labels is None else np.asarray(labels)
    return AlignedColumns(dict.fromkeys("abc", rows), labels, presence=presence or None)


def test_several_modalities_together_look_for_one():
    kinds = {name: Modality("vector", dim=4) for name in "abc"}
    there = np.arange(12) != 0
    data = AlignedData("own", three_vectors(20), three_vectors(6), three_vectors(12, c=there), kinds)
    task = TASK(data, AlignedConfig(batch_size=4))
    (batch,) = list(task.evaluation_loader("test"))
    x = batch["inputs"]["a"]
    evaluator = task.evaluator("test")
    wrong = x.roll(1, 1)
    embedding = {"a": x, "b": x, "c": x}
    evaluator.update(batch, {"embedding": embedding, "joint": {"a": x, "b": x, "c": wrong}})
    found = evaluator.compute()
    # Equal vectors are indistinguishable, so any item with the vector is right.
    assert found["a_to_b_r1"] == found["b_and_c_to_a_r1"] == found["a_and_c_to_b_r1"] == 1.0
    assert found["a_and_b_to_c_r1"] == 0.0
    assert found["to_c_r1"] == 1.0
    assert found["joint_recall"] < 1.0
    assert found["a_b_separability"] <= 0.5  # one and the same
    assert found["a_b_centroid_distance"] == 0.0
    assert "b_and_c_to_a_class_r1" not in found  # nothing is labelled


def test_two_modalities_look_for_a_class_of_the_third():
    kinds = {name: Modality("vector", dim=4) for name in "abc"}
    labels = np.arange(12) // 6
    data = AlignedData(
        "own", three_vectors(20), three_vectors(6), three_vectors(12, labels), kinds, classes=("one", "two")
    )
    task = TASK(data, AlignedConfig(batch_size=4))
    (batch,) = [b for b in task.evaluation_loader("test") if "example" not in b and "prompt" not in b][-1:]
    evaluator = task.evaluator("test")
    where = torch.eye(2)[torch.from_numpy(labels)]  # the class and nothing else
    same, other = where + 0.0, where.flip(1)
    evaluator.update(
        batch | {"label": torch.from_numpy(labels)},
        {"embedding": {"a": same, "b": same, "c": same}, "joint": {"a": same, "b": other, "c": same}},
    )
    found = evaluator.compute()
    assert found["a_and_b_to_c_class_r1"] == 1.0
    assert found["a_and_c_to_b_class_r1"] == 0.0


def test_what_a_learner_classifies_embeds_twice_or_measures_itself():
    kinds = {name: Modality("vector", dim=4) for name in "abc"}
    data = AlignedData("own", three_vectors(20), three_vectors(6), three_vectors(8, [0, 1, 2, 3, -1, 1, 2, 0]), kinds)
    (batch,) = list(TASK(data, AlignedConfig(batch_size=4)).evaluation_loader("test"))
    evaluator = TASK(data, AlignedConfig(batch_size=4)).evaluator("test")
    x = batch["inputs"]
    evaluator.update(
        batch,
        {
            "embedding": x,
            "other_embedding": x | {"a": x["a"].roll(1, 1)},
            "logits": x["a"],  # says 0, 1, 2, 3 and again
            "measures": {"own": 0.25},
        },
    )
    found = evaluator.compute()
    assert found["accuracy"] == pytest.approx(6 / 7)  # the item of no class does not count, the last is wrong
    assert found["own"] == 0.25
    assert (found["a_to_b_r1"], found["other_a_to_b_r1"], found["other_b_to_c_r1"]) == (1.0, 0.0, 1.0)
    assert found["other_to_b_r1"] == 0.5


def test_a_run_is_measured_on_data_whose_modalities_stand_in_another_order():
    kinds = {name: Modality("vector", dim=4) for name in "abc"}
    data = AlignedData("own", three_vectors(20), three_vectors(6), three_vectors(8), kinds, ("p", "q", "r", "s"))
    trained = TASK(data, AlignedConfig(batch_size=4)).facts
    turned = AlignedData(
        "own", data.train, data.valid, data.test, {name: kinds[name] for name in "cab"}, ("q", "p", "r", "s")
    )
    task = TASK(turned, AlignedConfig(batch_size=4))
    task.check_facts(trained)
    (batch,) = (b for b in task.evaluation_loader("test") if b["part"] == "items")
    assert list(batch["inputs"]) == ["a", "b", "c"]  # as a classifier of all side by side learned them
    evaluator = task.evaluator("test")
    assert batch["label"] is None
    evaluator.update(
        batch | {"label": torch.arange(8) % 4}, {"embedding": batch["inputs"], "logits": batch["inputs"]["a"]}
    )
    assert "accuracy" not in evaluator.compute()  # it learned other classes by these numbers


def test_texts_of_any_length_cost_no_more_than_their_own():
    import tracemalloc

    texts = [f"caption {n}" for n in range(2000)] + ["long " * 20_000]
    columns = {"t": texts, "v": np.eye(2001, 4, dtype=np.float32)}
    split = AlignedColumns(columns)
    data = AlignedData("own", split, split, split, {"t": Modality("text"), "v": Modality("vector", dim=4)})
    tracemalloc.start()
    evaluator = AlignedEvaluator(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20  # as an array of texts: 800 MB
    assert len(evaluator.seen[""].same.same["t"].unique()) == 2001


def test_classes_are_told_by_training_items_where_there_are_no_words():
    kinds = {name: Modality("vector", dim=4) for name in "abc"}
    train = three_vectors(20, np.arange(20) % 4, c=np.zeros(20, bool))
    data = AlignedData("own", train, train, three_vectors(8, [0, 1, 2, 3, -1, 1, 3, 2]), kinds)
    task = TASK(data, AlignedConfig(batch_size=4))
    evaluator = task.evaluator("test")
    items, examples = list(task.evaluation_loader("test"))
    assert (items["part"], examples["part"]) == ("items", "examples")
    for batch in (items, examples):
        evaluator.update(batch, {"embedding": batch["inputs"]})
    found = evaluator.compute()
    assert found["a_from_b_zero_shot"] == pytest.approx(5 / 7)
    assert not any("from_c" in name for name in found)  # no training item has it
    means, classes = class_means(torch.tensor([[3.0, 0], [1, 0], [0, 2], [9, 9]]), torch.tensor([5, 5, 2, -1]))
    assert classes.tolist() == [2, 5]
    assert means.tolist() == [[0, 1], [1, 0]]


def test_encoders_of_vectors_are_built_by_name():
    x = torch.rand(3, 4)
    for name, dim in (("mlp", 256), ("linear", 5), ("as-is", 4), ("relu-7-6", 6)):
        encoder = build_vector_encoder(name, 4)
        assert encoder(x).shape == (3, dim)
        assert encoder.dim == dim
    assert torch.equal(build_vector_encoder("as-is", 4)(x), x)
    assert torch.equal(build_vector_encoder("linear", 4)(x)[:, -1], torch.ones(3))
    for name in ("rleu-3", "relu-", "relu-3-x", "relu-0"):
        with pytest.raises(CounterpointError, match="unknown vector encoder"):
            build_vector_encoder(name, 4)
    with pytest.raises(CounterpointError, match="vector_noise must be at least 0 and finite"):
        AlignedConfig(vector_noise=-0.1)


@pytest.mark.slow
def test_a_manifest_of_three_kinds_trains_with_parts_missing(tmp_path, capsys):
    pytest.importorskip("av", reason="needs the extra [video]")
    import wave

    rng = np.random.default_rng(0)
    lines = []
    for n in range(48):
        hue = 40 + 60 * (n % 4)
        pixels = np.clip(hue + rng.normal(0, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        with wave.open(str(tmp_path / f"{n}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            tone = np.sin(2 * np.pi * (300 + 400 * (n % 4)) * np.arange(2400) / 8000)
            file.writeframes((tone * 20000).astype("<i2").tobytes())
        row = {"image": f"{n}.png", "caption": f"shade number {n % 4}", "sound": f"{n}.wav"}
        if n % 5 == 0:
            del row["sound"]
        if n % 7 == 3:
            del row["image"]
        lines.append(json.dumps(row))
    lines.append(json.dumps({"image": "gone.png", "caption": "nothing"}))
    lines.append(json.dumps({"id": "wordy", "caption": "word " * 100, "image": "1.png"}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    spec = f"manifest:{tmp_path}/m.jsonl?size=16&rate=8000&seconds=0.3"
    for slug in ("clip", "symile"):
        words = [
            "train",
            slug,
            "--data",
            spec,
            "--max-bad",
            "2",
            *OPTIONS,
            "--batch-size",
            "16",
            "--out",
            str(tmp_path),
        ]
        assert cli.main([*words, "--name", slug]) == 0
        said = capsys.readouterr().out
        assert "gone.png" in said
        said = " ".join(said.split())
        assert "1 of 47 texts of caption are longer than the context of 16 tokens" in said
        last = Run.open(tmp_path / slug).metrics()[-1]
        assert {"test/image_to_sound_r1", "test/sound_to_caption_r1", "test/caption_to_image_mrr"} <= set(last)
        assert math.isfinite(last["train/loss"])
    assert cli.main(["train", "clip", "--data", spec, "--max-bad", "0", *OPTIONS, "--out", str(tmp_path)]) == 2
    assert "row 49 image (gone.png): no such file" in capsys.readouterr().err
