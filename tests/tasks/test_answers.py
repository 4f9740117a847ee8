"""Measures of answers: POPE's, CHAIR's and MME's, choices, free answers, cut answers, chance."""

from __future__ import annotations

import math

import pytest
import torch

from counterpoint.data.chats import Chat, ChatSplit
from counterpoint.encoders.decoding import Answer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.errors import CounterpointError
from counterpoint.tasks.measures.answers import ChatEvaluator, caption_measures, yes_no_measures
from counterpoint.tasks.measures.captions import cider

OBJECTS = {"dog": ("dog", "puppy"), "cat": ("cat",), "hot dog": ("hot dog",)}


def chat(answer: str, picture: int | None = 0, **more) -> Chat:
    mark = "" if picture is None else f"{IMAGE} "
    turns = (Message("user", f"{mark}what ?"), Message("assistant", answer))
    return Chat(turns, () if picture is None else (picture,), **more)


def said(text: str, ended: bool = True) -> Answer:
    return Answer(text, (text,), (1.0,), ((),), ended)


def measured(chats: list[Chat], answers: list[str]) -> dict[str, float]:
    evaluator = ChatEvaluator(ChatSplit(chats), OBJECTS)
    evaluator.take(range(len(chats)), [said(text) for text in answers])
    return evaluator.compute()


def test_questions_are_judged_by_pope_s_measures_and_by_group():
    chats = [chat(a, n, kind="yes-no", group=g) for n, (a, g) in enumerate([("yes", "a"), ("no", "a"), ("no", "b")])]
    found = measured(chats, ["Yes.", "Yes, there is", "No, not here"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["precision"], found["recall"]) == (0.5, 1.0)
    assert (found["a_accuracy"], found["b_accuracy"]) == (0.5, 1.0)
    assert "pair_accuracy" not in found


def test_two_questions_of_each_picture_give_mme_s_measure():
    chats = [chat(a, n // 2, kind="yes-no") for n, a in enumerate(["yes", "no", "yes", "no"])]
    assert measured(chats, ["yes", "no", "yes", "yes"])["pair_accuracy"] == 0.5


def test_captions_are_judged_by_the_objects_that_they_name():
    chats = [chat("a dog", kind="caption", objects=("dog",)), chat("a cat", kind="caption", objects=("cat",))]
    found = measured(chats, ["A puppy and a hot dog", "nothing"])
    assert found["chair_s"] == 0.5
    assert found["chair_i"] == 0.5
    assert found["object_recall"] == 0.5


def test_cider_equals_the_value_computed_by_hand():
    # "a" is in both pictures, so it weighs log(2/2) = 0; every other n-gram weighs log 2, which cosines do not see.
    # "a red fox" and its equal: 1 for n = 1, 2, 3. With "a fox den": "fox" of {red, fox} and {fox, den} gives 1/2.
    found = cider(["a red fox", "a"], [["a red fox", "a fox den"], ["a"]], variant="cider")
    assert found == pytest.approx(((1 + 1 + 1) / 4 + (1 / 2) / 4) / 2 / 2)
    # {red: 2, x, y, fox, den} and {red, fox}: one "red" counts in the product, both in the norm. Three words more.
    # Then "b" and "a b": equal but for a word more.
    first = 10 * math.exp(-9 / 72) * 2 / (math.sqrt(8) * math.sqrt(2)) / 4
    second = 10 * math.exp(-1 / 72) * 1 / 4
    assert cider(["red red x y fox den", "b"], [["a red fox"], ["a b"]]) == pytest.approx((first + second) / 2)


def test_cider_equals_coco_s_evaluation_code():
    """The value is that of pycocoevalcap 1.2 on the same captions, without its tokenizer."""
    references = [
        ["a red fox runs", "the fox at the den"],
        ["a small dog at the top left of it"],
        ["it runs", "big dog"],
    ]
    captions = ["a red fox runs at it", "A dog, at the left.", "a blue den"]
    assert cider(captions, references) == pytest.approx(2.051987103861758, rel=1e-12)


def test_cider_groups_the_references_of_a_picture():
    chats = [chat(text, n, kind="caption") for text, n in [("a red fox", 0), ("a fox den", 0), ("a", 1)]]
    found = measured(chats, ["a red fox", "not counted", "a"])["cider"]
    assert found == pytest.approx(cider(["a red fox", "a"], [["a red fox", "a fox den"], ["a"]]))


@pytest.mark.parametrize(
    ("captions", "references", "more", "said"),
    [
        ([], [], {}, "captions must be one or more"),
        (["a"], [[]], {}, "of 0 references"),
        (["a"], [["a"], ["b"]], {}, "got 1 caption, 2 lists"),
        (["a"], [["a"]], {"variant": "spice"}, "variant must be"),
        (["a"], [["a"]], {"sigma": 0.0}, "sigma must be"),
    ],
)
def test_wrong_arguments_of_cider_are_named(captions, references, more, said):
    with pytest.raises(ValueError, match=said):
        cider(captions, references, **more)


def test_captions_without_any_object_have_no_absent_ones():
    assert caption_measures([["dog"]], [[]]) == {"chair_s": 0.0, "chair_i": 0.0, "object_recall": 0.0}


def test_answers_that_never_say_yes_have_f1_zero():
    assert yes_no_measures([True, False], [False, False])["f1"] == 0.0


def test_a_choice_is_the_option_of_the_best_score():
    chats = [chat("b", None, kind="choice", choices=("a", "b")), chat("a", None, kind="choice", choices=("a", "b"))]
    evaluator = ChatEvaluator(ChatSplit(chats), {})
    batch = {"index": torch.tensor([0, 1]), "options": {"owner": torch.tensor([0, 0, 1, 1])}}
    evaluator.choose(batch, torch.tensor([-3.0, -1.0, -2.0, -1.5]))
    assert evaluator.compute() == {"choice_accuracy": 0.5}
    assert evaluator.chance() == {"choice_accuracy": 0.5}


def test_questions_with_several_true_answers_have_the_measures_of_truthfulqa():
    chats = [
        chat("a", None, kind="choice", choices=("a", "b", "x"), truths=("b",)),
        chat("c", None, kind="choice", choices=("c", "y")),
    ]
    evaluator = ChatEvaluator(ChatSplit(chats), OBJECTS)
    batch = {"index": torch.tensor([0, 1]), "options": {"owner": torch.tensor([0, 0, 0, 1, 1])}}
    sums = torch.tensor([0.5, 0.2, 0.3, 0.1, 0.9]).log()
    evaluator.choose(batch, torch.zeros(5), sums)
    found = evaluator.compute()
    assert (found["mc1"], found["mc3"]) == (0.5, 0.25)
    assert found["mc2"] == pytest.approx((0.7 + 0.1) / 2)
    assert evaluator.chance()["choice_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_choices_with_one_true_answer_have_no_measures_of_truthfulqa():
    chats = [chat("a", None, kind="choice", choices=("a", "x"))]
    evaluator = ChatEvaluator(ChatSplit(chats), OBJECTS)
    batch = {"index": torch.tensor([0]), "options": {"owner": torch.tensor([0, 0])}}
    evaluator.choose(batch, torch.tensor([0.0, 1.0]))
    assert evaluator.compute() == {"choice_accuracy": 0.0}


def test_free_answers_are_right_where_their_words_are_equal_and_cut_ones_are_counted():
    chats = [chat("red and blue", None), chat("no", None)]
    evaluator = ChatEvaluator(ChatSplit(chats), {})
    evaluator.take([0, 1], [said("red  and blue"), said("no one", ended=False)])
    found = evaluator.compute()
    assert (found["exact"], found["cut"]) == (0.5, 0.5)


def test_losses_that_are_not_finite_name_the_mend():
    evaluator = ChatEvaluator(ChatSplit([chat("no", None)]), {})
    outputs = {"losses": torch.tensor([float("nan")]), "answers": [said("no")]}
    with pytest.raises(CounterpointError, match="training diverged; lower --lr"):
        evaluator.update({"index": torch.tensor([0])}, outputs)
