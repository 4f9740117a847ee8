"""CoMD: Lion's numbers, identities, pool, rounds, controls, resuming, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint import data as sources
from counterpoint import functional as fn
from counterpoint import training
from counterpoint.core import reviews
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import Answer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import comd
from counterpoint.tasks.pools import Draft, Item, Pool
from counterpoint.tasks.rounds import Agreement, Judge, Likelihood, Relatives, Rewriter, mean_probability
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "comd.npz")
DATA = "digit-questions?train=30&captions=20&test=2&watched=2"
SMALL: dict[str, Any] = {
    "model": "llava-16-1-2",
    "teacher": "llava-16-1-2",
    "teacher_epochs": 12,
    "teacher_lr": 0.1,
    "vocabulary": 300,
    "context": 48,
    "new_tokens": 4,
    "batch_size": 16,
    "epochs": 1,
    "caption_epochs": 1,
    "caption_learns": "all",
    "rounds": 3,
    "new_items": 10,
    "evaluate_every": 20,
}


def config(**changed: Any) -> Any:
    return Experiment.resolve("comd", DATA, overrides=SMALL | changed, recipe=False).config


def trained(folder: Path, *, name: str | None = None, **changed: Any) -> Run:
    return training.train("comd", config(**changed), data=DATA, out=folder, name=name, say=lambda _: None)


def built(**changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("comd", DATA, overrides=SMALL | changed, recipe=False)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def said(text: str, ended: bool = True) -> Answer:
    return Answer(text, (text,), (1.0,), ((),), ended)


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every teacher answer 3, without training it."""
    monkeypatch.setattr(comd.CoMD, "teacher_stages", lambda self: [])
    monkeypatch.setattr(comd.CoMD, "ask", lambda self, prompts, **_: [said("3")] * len(prompts))


# --------------------------------------------------------------------------------------------------------- equations


def test_gaps_and_difficult_items_equal_lions():
    first, second = (torch.from_numpy(PARITY[f"gap/case0/in/{name}_first"]) for name in ("teacher", "student"))
    gaps = fn.score_gap(first, second)
    torch.testing.assert_close(gaps, torch.from_numpy(PARITY["gap/case0/out/gap"]), rtol=0, atol=0)
    hard, easy = fn.split_by_difficulty(gaps, float(PARITY["gap/case0/param/threshold"]))
    assert hard.tolist() == np.flatnonzero(PARITY["gap/case0/out/hard"]).tolist()
    assert sorted([*hard.tolist(), *easy.tolist()]) == list(range(len(gaps)))


def test_reviews_are_read_as_lion_reads_them():
    found = [fn.parse_review(str(text)) for text in PARITY["review/case0/in/text"]]
    assert np.array_equal(np.array(found), PARITY["review/case0/out/scores"])


def test_the_filters_equal_lions():
    new, kept = ([str(x) for x in PARITY[f"filter/case0/in/{name}"]] for name in ("new", "kept"))
    similar = np.array([[fn.rouge_l(a, b) for b in kept] for a in new])
    np.testing.assert_allclose(similar, PARITY["filter/case0/out/rouge_l"], rtol=1e-12)
    assert [[reviews.is_similar(a, b, 0.7) for b in kept] for a in new] == (similar > 0.7).tolist()
    assert [fn.is_well_formed(text) for text in new] == PARITY["filter/case0/out/well_formed"].astype(bool).tolist()
    pool = Pool(float(PARITY["filter/case0/param/max_similarity"]), "all")
    for text in kept:
        pool.add(Draft((Message("user", text),)))
    reasons = [pool.reason(Draft((Message("user", text),), written=True)) for text in new]
    assert [not why for why in reasons] == PARITY["filter/case0/out/kept"].astype(bool).tolist()


SCORES = st.lists(st.tuples(*[st.integers(1, 10)] * 4), min_size=1, max_size=9)


@given(SCORES, st.integers(-5, 5))
def test_the_order_of_two_answers_has_no_part_in_the_gap(rows, bias):
    x = torch.tensor(rows, dtype=torch.float64)
    first, second = x[:, :2], x[:, 2:]
    gaps = fn.score_gap(first, second)
    assert torch.equal(fn.score_gap(second, first), -gaps)
    shift = torch.tensor([float(bias), 0.0], dtype=torch.float64)
    torch.testing.assert_close(fn.score_gap(first + shift, second + shift), gaps)
    assert not len(fn.split_by_difficulty(gaps, 9.5)[0])
    assert len(fn.split_by_difficulty(gaps, -torch.inf)[0]) == len(gaps)
    assert not len(fn.split_by_difficulty(0 * gaps, 0.1)[0])


WORDS = st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_symmetric_and_1_for_equal_words(a, b):
    assert fn.rouge_l(a, b) == fn.rouge_l(b, a)
    assert 0 <= fn.rouge_l(a, b) <= 1
    assert all(reviews.is_similar(a, b, most) == (fn.rouge_l(a, b) > most) for most in (0.0, 0.5, 0.7, 1.0))
    assert fn.rouge_l(a, a.upper() + " !") == (1.0 if a else 0.0)


@pytest.mark.parametrize("text", ["", "   ", "é one two three", "(a) what is this"])
def test_a_question_without_a_beginning_is_malformed(text):
    assert not fn.is_well_formed(text)


def test_shapes_and_nan_raise_an_error_that_names_the_argument():
    with pytest.raises(ValueError, match=r"teacher_first and student_first must be \[n, 2\]"):
        fn.score_gap(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"gaps must be \[n\]"):
        fn.split_by_difficulty(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="must not be NaN"):
        fn.split_by_difficulty(torch.tensor([torch.nan]))


# -------------------------------------------------------------------------------------------------------------- pool


def test_a_pool_grows_by_what_passes_and_counts_the_rest():
    pool = Pool(0.7, "all")
    seed = pool.add(Draft((Message("user", "count the red birds"),)))
    texts = [
        ("name all of the boats", True),
        ("count the red birds", True),
        ("why", True),
        ("list every tree here", False),
    ]
    drafts = [Draft((Message("user", text),), written=True, ended=ended) for text, ended in texts]
    added, left = pool.grow(drafts, [seed] * 4, ["difficult"] * 4, 2)
    assert [item.question for item in added] == ["name all of the boats"]
    assert left == {"similar": 1, "malformed": 1, "cut off": 1}
    assert (added[0].number, added[0].origin, added[0].parent, added[0].how) == (1, 2, 0, "difficult")


def test_equal_questions_about_two_pictures_differ_unless_all_are_compared():
    ask = (Message("user", f"{IMAGE} is it even or odd"),)
    for scope, why in (("picture", ""), ("all", "similar")):
        pool = Pool(0.7, scope)
        pool.add(Draft(ask, (0,)))
        assert pool.reason(Draft(ask, (1,))) == why
        assert pool.reason(Draft(ask, (0,))) == "similar"


def test_a_pool_survives_json():
    pool = Pool()
    item = pool.add(Draft((Message("user", f"{IMAGE} is it even"),), (3,), "even"), origin=1, parent=0, how="easy")
    item.answer, item.scores, item.uses = "yes", (10.0, 1.0), 2
    other = Pool()
    other.from_json(pool.to_json())
    assert other.items == pool.items
    assert other[0].gap == 9.0


# ------------------------------------------------------------------------------------------- assessors and augmentors


def prompt(text: str) -> Prompt:
    return Prompt((Message("user", text),))


def test_a_judge_is_read_and_a_review_off_the_format_gets_the_sentinel():
    asked: list[str] = []
    replies = ["fine\nAssistant 1: 9\nAssistant 2: 4", "no idea", "Assistant 1: 11\nAssistant 2: 0"]

    def ask(prompts: Any) -> list[Answer]:
        asked.extend(one.messages[-1].text for one in prompts)
        return [said(text) for text in replies]

    found = Judge(ask)([prompt("q")] * 3, ["a"] * 3, ["b"] * 3, ["a"] * 3)
    assert found.tolist() == [[9, 4], [-1, -1], [-1, -1]]
    assert asked[0].startswith("q\nAssistant 1 replied: a\nAssistant 2 replied: b")


def test_agreement_gives_the_lowest_score_to_another_answer():
    found = Agreement()([prompt("q")] * 2, ["yes", "no"], ["yes ", "yes"], ["yes", "no"])
    assert found.tolist() == [[10, 10], [10, 1]]


def test_likelihood_is_the_mean_probability_of_the_tokens():
    learner, task = built()
    chosen = [
        Prompt(chat.prompt, (task.data.train.images.images(np.array(chat.pictures))[0],))
        for chat in task.data.train.chats[:3]
    ]
    own = mean_probability(learner.model.eval(), chosen, ["3", "yes", "no"])
    found = Likelihood(learner.model)(chosen, ["3", "yes", "no"], ["4", "4", "4"], [])
    torch.testing.assert_close(found[:, 0], 1 + 9 * own)
    assert bool(((found >= 1) & (found <= 10)).all())


def test_relatives_ask_the_same_kind_of_question_about_other_pictures():
    kinds = {"even": [(Message("user", f"{IMAGE} is it even"),), (Message("user", f"{IMAGE} even or odd"),)]}
    seeds = [Item(0, kinds["even"][0], (0,), "even")] * 20
    found = Relatives(kinds, range(5, 9))(seeds, [False] * 20, np.random.default_rng(0))
    assert {draft.messages for draft in found} == set(kinds["even"])
    assert {place for draft in found for place in draft.pictures} == {5, 6, 7, 8}


def test_a_rewriter_asks_about_the_seeds_picture_and_tells_rare_from_difficult():
    shown: list[str] = []

    def ask(prompts: Any) -> list[Answer]:
        shown.extend(one.messages[-1].text for one in prompts)
        return [said(f"{IMAGE} how many corners are there"), said("and then", False)]

    seeds = [Item(0, (Message("user", f"{IMAGE} count the birds"),), (4,), "count")] * 2
    found = Rewriter(ask, lambda draft: Prompt(draft.messages))(seeds, [False, True], np.random.default_rng(0))
    assert found[0].messages[0].text == f"{IMAGE} how many corners are there"
    assert [(draft.pictures, draft.written, draft.ended) for draft in found] == [
        ((4,), True, True),
        ((4,), True, False),
    ]
    assert "difficulty" in shown[0]
    assert "rarer" in shown[1]


# ----------------------------------------------------------------------------------------------------------- learner


def test_the_functions_that_equal_lions_are_those_that_choose(monkeypatch, sure):
    called: list[str] = []
    for name in ("score_gap", "split_by_difficulty"):
        real = getattr(comd, name)
        monkeypatch.setattr(comd, name, lambda *args, real=real, name=name: called.append(name) or real(*args))
    learner, task = built()
    fit(learner, task, bar=False)
    assert called == ["score_gap", "split_by_difficulty"] * 2
    assert [one["round"] for one in learner.records] == [1, 2, 3]
    assert len(learner.pool) == 30 + sum(one["new"] for one in learner.records[1:])


def test_difficult_items_seed_their_share_and_no_item_seeds_too_often(monkeypatch, sure):
    turns = [said("3"), said("4")]
    monkeypatch.setattr(comd.CoMD, "answers", lambda self, prompts, **_: [turns[n % 2] for n in range(len(prompts))])
    learner, task = built(new_items=20, difficult_share=0.75, max_uses=2)
    fit(learner, task, bar=False)
    second = [item for item in learner.pool if item.origin == 2]
    assert sum(item.how == "difficult" for item in second) <= 15
    assert max(item.uses for item in learner.pool) <= 2
    assert all(learner.pool[item.parent].group == item.group for item in second)


def test_a_student_that_never_loses_takes_easy_items_once_and_stops(monkeypatch, sure):
    monkeypatch.setattr(comd.CoMD, "answers", lambda self, prompts, **_: [said("3")] * len(prompts))
    learner, task = built(rounds=4)
    warned: list[str] = []
    fit(learner, task, bar=False, say=warned.append)
    assert any("no item is difficult" in text for text in warned)
    assert [one["round"] for one in learner.records] == [1, 2]
    assert {item.how for item in learner.pool if item.origin} == {"easy"}


def test_a_round_after_the_end_moves_nothing(sure):
    learner, task = built(rounds=3, new_items=3, similar_to="all", weight_decay=0.1)
    kept: list[dict[str, Any]] = []
    learner.end_epoch = lambda epoch: kept.append({n: v.clone() for n, v in learner.named_parameters()})
    warned: list[str] = []
    fit(learner, task, bar=False, say=warned.append)
    assert any("round 2 adds no item (3 similar), so the rounds end" in text for text in warned)
    assert all(torch.equal(kept[1][name], kept[-1][name]) for name in kept[1])


@pytest.mark.parametrize("selection", ["random", "uniform", "easy"])
def test_controls_make_as_many_items(monkeypatch, sure, selection):
    monkeypatch.setattr(comd.CoMD, "answers", lambda self, prompts, **_: [said("3")] * len(prompts))
    learner, task = built(selection=selection, rounds=2, new_items=12)
    fit(learner, task, bar=False)
    hows = {item.how for item in learner.pool if item.origin}
    assert hows == {selection}
    assert learner.records[1]["new"] + sum(learner.records[1]["left_out"].values()) == 12


def test_controls_with_equal_calls_cost_what_the_rounds_cost(sure):
    calls = []
    for more in ({}, {"selection": "random", "equal_calls": True}):
        learner, task = built(rounds=2, new_items=5, probe=7, max_similarity=1.0, **more)
        fit(learner, task, bar=False)
        calls.append(learner.records[1]["calls"])
    assert calls == [12, 12]


def test_reviews_off_the_format_are_counted_and_left_out(sure):
    learner, task = built(rounds=2)

    class Half(Agreement):
        def __call__(self, *given: Any) -> torch.Tensor:
            found = super().__call__(*given)
            found[::2] = -1
            return found

    learner.assessor = Half()
    warned: list[str] = []
    fit(learner, task, bar=False, say=warned.append)
    record = learner.records[1]
    assert (record["off_format"], record["difficult"] + record["easy"]) == (15, 15)
    assert any("15 of 30 reviews are off the format and are left out" in text for text in warned)


def test_a_judge_that_never_keeps_the_format_raises_an_error_that_names_the_mend(sure):
    learner, task = built(assessor="judge")
    with pytest.raises(CounterpointError, match=r"a review needs up to \d+ tokens, .* context has 48; raise"):
        fit(learner, task, bar=False)
    learner, task = built(assessor="judge", context=384)
    with pytest.raises(CounterpointError, match=r"30 of 30 reviews are off the format; name another --judge"):
        fit(learner, task, bar=False)


def test_a_teacher_that_never_ends_raises_an_error_that_names_the_mend(monkeypatch, sure):
    monkeypatch.setattr(comd.CoMD, "ask", lambda self, prompts, **_: [said("3 3", False)] * len(prompts))
    learner, task = built()
    with pytest.raises(CounterpointError, match=r"30 of 30 questions no answer.*raise --new-tokens"):
        fit(learner, task, bar=False)


@pytest.mark.parametrize(
    "more", [{"assessor": "likelihood"}, {"augmentor": "rewrite", "context": 256, "written_tokens": 8}]
)
def test_each_assessor_and_augmentor_runs(more):
    learner, task = built(rounds=2, **more)
    fit(learner, task, bar=False)
    assert learner.records[1]["assessed"]
    assert learner.records[1]["calls"] >= 10


@pytest.mark.parametrize("at", [25, pytest.param(50, marks=pytest.mark.slow), pytest.param(54, marks=pytest.mark.slow)])
def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch, at):
    run = need_equal_ends(monkeypatch, comd.CoMD, "comd", config(), DATA, at, tmp_path)
    assert len(run.structure()["records"]) >= 2


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    teacher = trained(tmp_path, name="teacher", rounds=1, epochs=20, lr=0.1)
    settings = SMALL | {"teacher": f"run:{teacher.path}", "lr": 1e-3, "caption_lr": 1e-3}
    words = ["train", "comd", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = trained(tmp_path, name="one", **settings).metrics(), Run.open(tmp_path / "two").metrics()
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("drawn")
def test_a_saved_run_keeps_its_pool_and_shows_its_rounds(tmp_path):
    run = trained(tmp_path)
    learner: Any = load_learner(run)
    assert len(learner.pool) == run.metrics()[-1]["test/pool"]
    assert {"Accuracy by round", "Gap by round", "Rounds", "Difficult items"} <= set(run.figures())


@pytest.mark.slow
def test_the_student_of_a_finished_run_goes_on(tmp_path):
    first = trained(tmp_path, rounds=1, epochs=20, lr=0.1)
    second = trained(tmp_path, rounds=1, model=f"run:{first.path}", teacher=f"run:{first.path}", caption_epochs=0)
    assert second.metrics()[-1]["test/pool"] == 30


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"selection": "best"}, "unknown selection"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"replay": 1.5}, "replay"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"probe": -1}, "probe must be at least 0"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(changed, wrong):
    with pytest.raises(CounterpointError, match=wrong):
        config(**changed)


def test_captions_without_a_caption_raise_an_error_that_names_the_mend(sure):
    experiment = Experiment.resolve("comd", "digit-questions?train=30&test=2&watched=2", overrides=SMALL, recipe=False)
    task = experiment.task()
    with pytest.raises(DataError, match="set --caption-epochs 0"):
        fit(experiment.learner(task.facts, 0), task, bar=False)


# -------------------------------------------------------------------------------------------------------------- data


def test_kinds_of_questions_follow_zipfs_law_and_answers_are_true():
    found = sources.load("digit-questions?train=4000&captions=5")
    groups = [chat.group for chat in found.train.chats]
    share = [groups.count(kind) / 4000 for kind in ("digit", "even", "square")]
    whole = sum(k**-1.5 for k in range(1, 11))
    assert share == pytest.approx([1 / whole, 2**-1.5 / whole, 10**-1.5 / whole], abs=0.03)
    assert groups.count("") == 5
    by = {chat.group: chat.answer for chat in found.test.chats[:10]}
    digit = int(by["digit"])
    assert (by["even"], by["square"]) == ("yes" if digit % 2 == 0 else "no", str(digit**2 % 10))


def test_options_out_of_range_raise_an_error():
    with pytest.raises(CounterpointError, match="train is at least 10"):
        sources.load("digit-questions?train=3")
