"""The source `chats:`: the forms of records, MME's layout, objects of COCO, splits, and rows that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterpoint import data as sources
from counterpoint.data.chats import mentioned, says_yes
from counterpoint.errors import DataError


def picture(path: Path, shade: int = 90) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(path)
    return path.name


def written(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def loaded(place: Path, **options: Any) -> Any:
    return sources.load(f"chats:{place}", task="chats", size=16, **options)


def every(data: Any) -> list[Any]:
    return [chat for split in (data.train, data.valid, data.test) for chat in split.chats]


FORMS = {
    "messages": {
        "messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "yes"}],
        "image": "a.png",
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what ?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ]
    },
    "llava": {
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "yes"}],
        "image": "a.png",
    },
    "pope": {"question_id": 1, "image": "a.png", "text": "what ?", "label": "yes"},
    "preference": {"prompt": "what ?", "chosen": "yes", "rejected": "no", "images": ["a.png"]},
    "rejected": {
        "messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "yes"}],
        "rejected": {"role": "assistant", "content": "no"},
        "image": "a.png",
    },
    "truthfulqa": {
        "question": "what ?",
        "mc1_targets": {"yes": 1, "no": 0},
        "mc2_targets": {"yes": 1, "no": 0},
        "image": "a.png",
    },
    "choice": {"question": "what ?", "choices": ["yes", "no"], "answer": 0, "image": "a.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_becomes_the_same_chat(tmp_path, form):
    others = []
    for n in range(12):
        picture(tmp_path / f"{n}.png", n)
        text = json.dumps(FORMS[form]).replace("a.png", f"{n}.png")
        others.append(json.loads(text))
    data = loaded(written(tmp_path, others))
    chats = every(data)
    assert len(chats) == 12
    assert {chat.question for chat in chats} == {"what ?"}
    assert {chat.answer for chat in chats} == {"yes"}
    assert all(len(chat.pictures) == 1 for chat in chats)
    assert chats[0].rejected == ("no" if form in ("preference", "rejected") else "")
    assert chats[0].kind == ("choice" if form in ("choice", "truthfulqa") else "yes-no")
    assert data.train.images.images(np.array([3])).shape == (1, 16, 16, 3)


def test_a_question_of_truthfulqa_keeps_its_best_its_true_and_its_false_answers(tmp_path):
    record = {"question": "q ?", "mc1_targets": {"b": 1, "x": 0}, "mc2_targets": {"a": 1, "b": 1, "x": 0, "y": 0}}
    chats = every(loaded(written(tmp_path, [record | {"question": f"q {n} ?"} for n in range(12)])))
    assert (chats[0].answer, set(chats[0].choices), chats[0].truths) == ("b", {"a", "b", "x", "y"}, ("a",))
    with pytest.raises(DataError, match="needs a true and a false answer"):
        loaded(written(tmp_path, [{"question": "q ?", "mc1_targets": {"b": 1}}]))


def test_rows_that_cannot_be_read_are_counted_with_their_reasons(tmp_path):
    good = [{"messages": FORMS["messages"]["messages"]} for _ in range(10)]
    bad = [
        "{broken",
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"messages": [{"role": "user", "content": "a question alone"}]},
        {"messages": [{"role": "user", "content": "<image> one"}, {"role": "assistant", "content": "no picture"}]},
        FORMS["pope"],
        {"unknown": 1},
    ]
    data = loaded(written(tmp_path, [*good, *bad]))
    assert len(every(data)) == 10
    [note] = [note for note in data.notes if "6" in note]
    assert "no such file" in " ".join(data.notes) or "left out" in note


def test_no_readable_chat_is_an_error_that_shows_reasons(tmp_path):
    with pytest.raises(DataError, match=r"none of 1 chat can be read.*known forms"):
        loaded(written(tmp_path, [{"unknown": 1}]))


def test_chats_of_one_picture_stay_in_one_split(tmp_path):
    rows = []
    for n in range(10):
        picture(tmp_path / f"{n}.png", n)
        rows += [FORMS["pope"] | {"image": f"{n}.png", "text": f"question {k}"} for k in range(3)]
    data = loaded(written(tmp_path, rows))
    shown = [{chat.pictures for chat in split.chats} for split in (data.train, data.valid, data.test)]
    assert not shown[0] & shown[1]
    assert not shown[0] & shown[2]
    assert not shown[1] & shown[2]


def test_files_named_for_splits_are_the_splits(tmp_path):
    for name, many in (("train", 5), ("valid", 3), ("test", 2)):
        written(tmp_path / "c", [{"messages": FORMS["messages"]["messages"]}] * many, f"{name}.jsonl")
    data = loaded(tmp_path / "c")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [5, 3, 2]


def test_mme_s_layout_is_read_with_tasks_as_groups(tmp_path):
    for task in ("existence", "count"):
        for n in range(6):
            picture(tmp_path / "mme" / task / "images" / f"{n}.jpg", 20 * n)
            text = tmp_path / "mme" / task / "questions_answers_YN" / f"{n}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text("Is there a dog? Please answer yes or no.\tYes\nIs there a cat?\tNo\nbroken line\n")
    data = loaded(tmp_path / "mme")
    chats = every(data)
    assert len(chats) == 24
    assert {chat.group for chat in chats} == {"existence", "count"}
    assert {chat.answer for chat in chats} == {"Yes", "No"}
    assert any("12" in note for note in data.notes)


def test_objects_come_from_coco_s_instances_and_their_words_from_synonyms(tmp_path):
    instances = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(6)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": n, "category_id": 1 + n % 2} for n in range(6)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "words.txt").write_text("dog, puppy, hound\ncat, kitten\n")
    rows = []
    for n in range(6):
        picture(tmp_path / f"{n}.png", n)
        rows.append(
            {
                "conversations": [*FORMS["llava"]["conversations"][:1], {"from": "gpt", "value": "A puppy."}],
                "image": f"{n}.png",
            }
        )
    place = written(tmp_path, rows)
    data = loaded(place, instances=str(tmp_path / "instances.json"), synonyms=str(tmp_path / "words.txt"))
    assert {chat.kind for chat in every(data)} == {"caption"}
    assert {chat.objects for chat in every(data)} == {("dog",), ("cat",)}
    assert mentioned("a hound and a Kitten", data.objects) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes.", True), ("No, there is not", False), ("It isn't. Yes", False), ("yes, no doubt", False), ("", True)],
)
def test_an_answer_means_no_where_pope_s_rule_finds_a_negation(answer, yes):
    assert says_yes(answer) == yes
