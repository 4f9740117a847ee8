"""MEND: the authors' numbers, identities, stages, truncation, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.data import load
from counterpoint.data.demonstrations import DemonstrationSplit, Example
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import mend
from counterpoint.tasks.demonstrations import fitted
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mend.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
GIVEN = (
    "student_logits",
    "teacher_logits",
    "query_ids",
    "query_mask",
    "answer_mask",
    "teacher_mask",
    "teacher_demo_mask",
)


def case(number: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def settings(at: dict[str, Tensor]) -> tuple[int, float, float]:
    return int(at["param/num_vectors"]), float(at["param/temperature"]), float(at["param/kl_weight"])


@TYPES
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("number", [0, 1])
def test_losses_and_gradients_equal_the_authors(number, stage, dtype, rtol):
    at = case(number, dtype)
    given = [at[f"in/{name}"] for name in GIVEN]
    given[0].requires_grad_()
    loss = getattr(fn.context_distillation_losses(*given, *settings(at)), stage)
    torch.testing.assert_close(loss, at[f"out/loss_{stage}"], rtol=rtol, atol=rtol)
    loss.backward()
    torch.testing.assert_close(given[0].grad, at[f"grad/student_logits_{stage}"], rtol=10 * rtol, atol=rtol)


@TYPES
def test_scores_equal_the_authors(dtype, rtol):
    at = case(2, dtype)
    found = fn.candidate_scores(
        at["in/student_logits"],
        at["in/candidate_ids"],
        at["in/answer_mask"],
        at["in/real_class_mask"],
        int(at["param/num_vectors"]),
        int(at["param/num_class"]),
    )
    torch.testing.assert_close(found, at["out/class_scores"], rtol=rtol, atol=rtol)


# ----------------------------------------------------------------------------------------------------------- equations


def given(**changed: Any) -> dict[str, Any]:
    at = case(0)
    found: dict[str, Any] = {name: at[f"in/{name}"] for name in GIVEN}
    return found | {"num_vectors": 4, "temperature": 1.0, "kl_weight": 1.0} | changed


def test_a_student_that_agrees_with_its_teacher_has_no_divergence():
    at = given()
    student, there = at["student_logits"].clone(), at["query_mask"].bool()
    theirs = at["teacher_mask"].bool() & ~at["teacher_demo_mask"].bool()
    student[:, 4:][there] = at["teacher_logits"][theirs]
    assert float(fn.context_distillation_losses(**at | {"student_logits": student}).pretrain) == pytest.approx(
        0, abs=1e-12
    )


def test_without_weight_the_second_loss_is_the_cross_entropy_of_the_answer():
    at = given(kl_weight=0.0, temperature=3.0)
    labels = torch.where(at["answer_mask"].bool() & at["query_mask"].bool(), at["query_ids"], -100)
    wanted = fn.masked_lm_loss(at["student_logits"][:, 4:], labels)
    torch.testing.assert_close(fn.context_distillation_losses(**at).finetune, wanted)


def test_a_constant_added_to_the_logits_of_a_position_changes_nothing():
    one, other = given(), given()
    other["student_logits"] = other["student_logits"] + torch.arange(10.0)[None, :, None]
    other["teacher_logits"] = other["teacher_logits"] - torch.arange(10.0)[None, :, None]
    for mine, theirs in zip(
        fn.context_distillation_losses(**one), fn.context_distillation_losses(**other), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_query_without_an_answer_token_has_the_divergence_alone():
    at = given()
    found = fn.context_distillation_losses(**at | {"answer_mask": torch.zeros_like(at["answer_mask"])})
    torch.testing.assert_close(found.finetune, found.pretrain)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must lie in"),
        ({"num_vectors": 3}, r"student_logits must be \[n, num_vectors \+ query"),
        ({"teacher_mask": torch.ones(3, 9, dtype=torch.int64)}, "teacher_mask and teacher_demo_mask must be"),
        ({"teacher_demo_mask": torch.ones(3, 10, dtype=torch.int64)}, "as many positions in each row"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error_that_names_them(changed, said):
    with pytest.raises(ValueError, match=said):
        fn.context_distillation_losses(**given(**changed))


def test_a_candidate_without_an_answer_token_is_refused():
    ids, answer = torch.tensor([[1, 2], [1, 3]]), torch.tensor([[0, 1], [0, 0]])
    with pytest.raises(ValueError, match="no token for candidate 1 of query 0"):
        fn.candidate_scores(torch.zeros(2, 3, 5), ids, answer, torch.ones(1, 2), 1, 2)
    absent = fn.candidate_scores(torch.zeros(2, 3, 5), ids, answer, torch.tensor([[1, 0]]), 1, 2)
    assert absent.tolist() == [[pytest.approx(-np.log(5)), -10000.0]]


# ------------------------------------------------------------------------------------------------------------- learner

DATA = "symbol-tasks?symbols=6&train=12&valid=3&test=3&queries=2&texts=24"
SMALL: dict[str, Any] = {
    "model": "llama-8-2-2",
    "model_queries": 2,
    "model_epochs": 1,
    "vocabulary": 300,
    "context": 32,
    "distiller_context": 28,
    "vectors": 3,
    "demonstrations": 4,
    "batch_size": 8,
    "pretrain_epochs": 1,
    "epochs": 2,
}


def config(data: str = DATA, **changed: Any) -> Any:
    return Experiment.resolve("mend", data, overrides=SMALL | changed).config


def trained(folder: Path, data: str = DATA, **changed: Any) -> Run:
    return training.train("mend", config(data, **changed), data=data, out=folder, say=lambda _: None)


def built(data: str = DATA, **changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("mend", data, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_the_functions_that_equal_the_authors_are_those_that_train_and_score(monkeypatch):
    called: list[str] = []
    for name in ("context_distillation_losses", "candidate_scores"):
        real = getattr(mend, name)
        monkeypatch.setattr(mend, name, lambda *args, n=name, f=real: called.append(n) or f(*args))
    learner, task = built()
    rows = fit(learner, task, bar=False)
    assert {"context_distillation_losses", "candidate_scores"} <= set(called)
    assert {"train/prediction", "train/divergence", "valid/accuracy", "valid/share_of_full"} <= set(rows[-1])
    assert "valid/accuracy" not in rows[0]  # while the model trains, there is no distiller
    assert "valid/full_accuracy" in rows[0]


def test_the_distiller_starts_from_the_model_and_the_model_stays():
    learner, task = built()
    kept: dict[str, Tensor] = {}

    def note(_: int) -> None:
        if learner.stage_name == "model":
            kept.update({n: v.clone() for n, v in learner.model.named_parameters()})

    learner.end_epoch = note
    starts: list[dict[str, Tensor]] = []
    real = learner.copy

    def copied(survey: Any) -> None:
        real(survey)
        starts.append({n: v.clone() for n, v in learner.distiller.body.state_dict().items()})

    learner.copy = copied
    fit(learner, task, bar=False)
    assert len(starts) == 1
    assert all(torch.equal(starts[0][name], kept[f"model.model.{name}"]) for name in starts[0])
    assert all(torch.equal(value, kept[name]) for name, value in learner.model.named_parameters())
    moved = learner.distiller.body.state_dict()
    assert any(not torch.equal(moved[name], starts[0][name]) for name in moved)


@pytest.mark.parametrize("model", ["gpt2-8-1-2", "llama-8-1-2", "qwen2-8-1-2", "t5-8-1-2"])
def test_padding_moves_no_token(model):
    learner, task = built(model=model)
    learner.eval()
    rows = [0, 1, 2]
    whole = task.evaluation_batch("test", rows)
    whole["ids"], whole["mask"] = (F.pad(whole[name], (5, 0)) for name in ("ids", "mask"))
    with torch.no_grad():
        for method in ("", "full"):
            alone = torch.cat([learner.scores(task.evaluation_batch("test", [n]), method) for n in rows])
            torch.testing.assert_close(learner.scores(whole, method), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{"distiller": "gpt2-12-1-2"}, {"distiller": "t5-8-1-2"}, {"model": "t5-8-1-2"}])
def test_other_distillers_and_encoder_decoders_learn(changed):
    learner, task = built(**changed, epochs=1)
    before = learner.distiller.placeholders.clone()
    fit(learner, task, bar=False)
    assert not torch.equal(before, learner.distiller.placeholders)
    batch = task.evaluation_batch("test", [0, 1])
    found = learner.distiller(batch["ids"], batch["mask"])
    assert found.shape == (2, 3, learner.model.width)
    if learner.distiller.placeholders.shape[1] != learner.model.width:
        assert float(found.detach().abs().max()) < 1  # the tanh of the adapter


def test_random_placeholders_have_the_spread_of_the_model():
    learner, _ = built(placeholders="random", vectors=8, model="gpt2-64-1-2", distiller_context=20)
    assert 0.01 < float(learner.distiller.placeholders.detach().std()) < 0.04


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    need_equal_ends(monkeypatch, mend.MEND, "mend", config(), DATA, (1, 4, 7, 9), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    settings = SMALL | {"batch_size": 23}  # of 24 queries, the last batch of an epoch has one
    words = ["train", "mend", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    one = training.train(
        "mend", config(batch_size=23), data=DATA, out=tmp_path, name="one", say=lambda _: None
    ).metrics()
    two = Run.open(tmp_path / "two").metrics()
    for mine, other in zip(one, two, strict=True):
        for name in ("train/loss", "train/prediction", "train/divergence", "valid/accuracy"):
            if mine.get(name) is not None:
                assert other[name] == pytest.approx(mine[name], rel=2e-4), name


@pytest.mark.usefixtures("drawn")
def test_a_saved_run_scores_as_before_and_shows_its_curves(tmp_path):
    run = trained(tmp_path)
    figure = run.figures()["Accuracy by demonstrations"]
    assert figure["series"]["3 vectors"][0] == [0, 1, 2, 4]
    learner: Any = load_learner(run)
    _, task = built()
    task.check_facts(run.facts())
    batch = task.evaluation_batch("test", [0, 1])
    torch.testing.assert_close(learner.scores(batch), load_learner(run).scores(batch))
    evaluator = task.evaluator("test")
    evaluator.choose("full", [0, 1], learner.scores(batch, "full").detach())
    assert evaluator.chance() == {"full_accuracy": 0.25}


def test_a_finished_model_is_used_again_and_does_not_train(tmp_path):
    first = trained(tmp_path)
    second = trained(tmp_path, model=f"run:{first.path}", vectors=2)
    one, other = load_learner(first), load_learner(second)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name])
    assert other.distiller.placeholders.shape == (2, 8)


def test_a_published_model_of_a_folder_is_used(tmp_path):
    from transformers import PreTrainedTokenizerFast

    learner, task = built(model="t5-8-1-2")
    PreTrainedTokenizerFast(tokenizer_object=task.tokenizer.model, pad_token="[PAD]").save_pretrained(tmp_path / "t5")
    learner.model.model.save_pretrained(tmp_path / "t5")
    run = trained(tmp_path, model=f"hf:{tmp_path / 't5'}", epochs=1)
    assert load_learner(run).model.encoder_decoder
    kept, found = learner.model.state_dict(), load_learner(run).model.state_dict()
    assert all(torch.equal(kept[name], found[name]) for name in kept)


# ------------------------------------------------------------------------------------------------ demonstrations and data


def test_demonstrations_are_of_the_task_and_never_the_query():
    examples = [Example("a", f"a{n}", "x", ("x", "y")) for n in range(3)] + [
        Example("b", f"b{n}", "y", ("x", "y")) for n in range(3)
    ]
    split = DemonstrationSplit(examples)
    rng = np.random.default_rng(0)
    for at in range(6):
        found = split.members.draw(int(split.groups[at]), 16, rng, without=at)
        assert sorted(found.tolist()) == [n for n in range(at // 3 * 3, at // 3 * 3 + 3) if n != at]
        assert split.members.other(int(split.groups[at]), rng) == 1 - at // 3
        assert len(split.members.draw(0, 5, rng, without=0, replace=True)) == 5


def test_demonstrations_change_with_the_epoch_and_not_with_the_batch():
    _, task = built()
    position = Position()
    first = next(iter(task.train_loader(0, position)))
    again = next(iter(task.train_loader(0, position)))
    assert torch.equal(first["ids"], again["ids"])
    episodes = next(iter(task.train_loader(0, Position(epoch=1))))
    assert not torch.equal(first["ids"], episodes["ids"])
    alone, both = task.evaluation_batch("test", [1]), task.evaluation_batch("test", [0, 1])
    assert torch.equal(alone["ids"][0], both["ids"][1])


def test_demonstrations_that_exceed_the_context_are_cut_and_counted_and_the_query_is_not(tmp_path):
    said: list[str] = []
    chosen = config(context=7, vectors=3, distiller_context=4, model_epochs=1)
    run = training.train("mend", chosen, data=DATA, out=tmp_path, say=said.append)
    assert any("exceed the context of 7: 12 demonstrations of 6 of 6 test queries" in line for line in said), said
    assert run.metrics()[-1]["test/cut"] == pytest.approx(2)
    _, task = built(context=7, distiller_context=6)
    batch = task.evaluation_batch("test", [0])
    assert int(batch["mask"].sum()) == 4  # of 8, since the query needs 2 of 7 and a half example has no input
    assert int(batch["candidates"].mask.sum()) == 2 * 4


def test_further_queries_of_a_model_that_is_built_here_stay_within_the_context():
    _, task = built(model_queries=30, model="gpt2-8-1-2")
    texts, many = len(task.data.texts), len(task.data.train)
    episodes = task.train_loader(0, Position()).dataset
    batch = episodes[[many + texts + n for n in range(many)]]
    lengths = batch["mask"].sum(1) + batch["query"].mask.sum(1)
    assert lengths.unique().tolist() == [32]
    assert torch.equal(batch["query"].answer.sum(1) * 2, batch["query"].mask.sum(1))


def test_an_example_that_does_not_fit_loses_the_beginning_of_its_input():
    assert fitted([([1, 2, 3], [4]), ([5, 6, 7], [8])], room=6, most=9) == ([[1, 2, 3, 4], [7, 8]], 1)
    assert fitted([([1, 2, 3], [4]), ([5], [6])], room=9, most=3) == ([[2, 3, 4], [5, 6]], 1)
    assert fitted([([1], [2, 3])], room=2, most=9) == ([], 1)


def test_without_demonstrations_the_vectors_are_a_generic_prompt(tmp_path):
    run = trained(tmp_path, demonstrations=0)
    learner: Any = load_learner(run)
    _, task = built(demonstrations=0)
    batch = task.evaluation_batch("test", [0, 1])
    assert batch["ids"].shape == (2, 0)
    vectors = learner.distiller(batch["ids"], batch["mask"])
    torch.testing.assert_close(vectors[0], vectors[1])
    last = run.metrics()[-1]
    assert last["test/full_accuracy"] == last["test/zero_accuracy"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"demonstrations:{path}"


def own(tasks: int = 8, **changed: Any) -> list[dict[str, Any]]:
    return [
        {"task": f"task {t}", "input": f"thing {n}", "output": ("good", "bad")[(n + t) % 2], "options": ["good", "bad"]}
        | changed
        for t in range(tasks)
        for n in range(4)
    ]


def test_own_tasks_train_from_the_command_line(tmp_path):
    rows = own()
    rows[0]["output"] = "worse"
    rows[5].pop("options")
    data = write(tmp_path / "tasks.jsonl", rows)
    (tmp_path / "plain.txt").write_text("\n".join(f"thing {n} good thing {n} bad" for n in range(20)))
    words = [
        "train",
        "mend",
        "--data",
        f"{data}?texts={tmp_path / 'plain.txt'}&valid=0.3",
        "--out",
        str(tmp_path),
        "--name",
        "run",
    ]
    small = {k: v for k, v in SMALL.items() if k != "epochs"}
    options = [part for key, value in small.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main([*words, *options, "--epochs", "1"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy by demonstrations" in page
    data = load(f"{data}?valid=0.3")
    assert not {*data.train.tasks} & {*data.test.tasks}
    assert any("1 " in note and "worse" in note for note in data.notes), data.notes


def test_roles_and_splits_of_own_tasks_are_used(tmp_path):
    rows = [
        row | {"role": "demonstration" if n % 4 < 2 else "query", "split": ("train", "valid", "test")[n // 4 % 3]}
        for n, row in enumerate(own(6))
    ]
    data = load(write(tmp_path / "tasks.jsonl", rows))
    assert [len(split) for split in (data.train, data.valid, data.test)] == [4, 4, 4]
    assert len(data.train.members.of(0)) == 2
    with pytest.raises(DataError, match="is in two splits"):
        load(write(tmp_path / "more.jsonl", [*rows, rows[0] | {"split": "test"}]))


@pytest.mark.parametrize(
    ("rows", "changed", "said"),
    [
        (own(8, options=["good", "bad", " "]), {}, "has an option without text"),
        (own(8, options=["good", "good", "bad"]), {}, "has equal options"),
        (own(8, options="good bad"), {}, "options that are a text"),
        (own(8, input=" "), {}, "has no input"),
        (own(8, role="teacher"), {}, "the roles are demonstration and query"),
        (
            own(8, role="query"),
            {},
            "tasks without an example besides a query, so without demonstrations.*--demonstrations 0",
        ),
        (own(8, output="good", options=["good"]), {}, "has one candidate answer, and needs two"),
        (own(8), {"context": 4}, "a query is never cut: raise --context"),
        (own(8), {"pretrain_epochs": 1}, r"learns from plain texts.*\(\?texts=FILE\).*--pretrain-epochs 0"),
    ],
)
def test_data_that_cannot_be_used_raise_an_error_that_names_the_mend(tmp_path, rows, changed, said):
    data = write(tmp_path / "tasks.jsonl", rows) + "?valid=0.3"
    usual = {"pretrain_epochs": 0}
    with pytest.raises(CounterpointError, match=said):
        trained(tmp_path, data, **usual | changed)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "llava-8-1-2"}, "unknown model"),
        ({"model": "t5-9-1-2"}, "multiple of its heads"),
        ({"model": "run:nowhere"}, "nowhere"),
        ({"model_epochs": 0}, "has random weights"),
        ({"vectors": 0}, "vectors must be at least 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"compare": ("few",)}, "unknown method"),
        ({"placeholders": "zeros"}, "unknown placeholders"),
        ({"epochs": 0, "pretrain_epochs": 0}, "one of them above 0"),
        ({"beta": 1.0}, "beta must be below 1"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(changed, said):
    with pytest.raises(CounterpointError, match=said):
        config(**changed).check()


@pytest.mark.parametrize(
    ("query", "said"), [("symbols=1", "symbols lies in"), ("train=1", "at least 2"), ("symbols=4", "a sixteenth")]
)
def test_options_of_symbol_tasks_out_of_range_raise_an_error(query, said):
    with pytest.raises(CounterpointError, match=said):
        load(f"symbol-tasks?{query}")


def test_no_map_of_symbol_tasks_is_in_two_splits_and_another_seed_gives_others():
    def maps(split: DemonstrationSplit) -> set[tuple[str, ...]]:
        of: dict[str, list[str]] = {}
        for example in split.examples:
            if example.role == "demonstration":
                of.setdefault(example.task, []).append(example.output)
        return set(map(tuple, of.values()))

    data, other = load(DATA), load(f"{DATA}&seed=1")
    train, valid, test = map(maps, (data.train, data.valid, data.test))
    assert (len(train), len(valid), len(test)) == (12, 3, 3)
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert maps(other.train) != train
    assert all(len(text.split()) == 2 * (6 + 2) for text in data.texts)
