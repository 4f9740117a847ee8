"""`counterpoint ask`: methods side by side, JSON, the page, a model of transformers, and questions that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterpoint import cli, training
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.use.ask import CONTRASTED, METHODS, Answering, ask
from pretend_gpu import pretend_gpu

DATA = "grid-chats?train=24&valid=6&test=8&grid=2&cell=8&most=2"
SMALL = {"model": "llava-16-2-2", "vocabulary": 300, "context": 256, "epochs": 1, "batch_size": 16, "compare": ()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = Experiment.resolve("ritual", DATA, overrides=SMALL).config
    return training.train("ritual", config, data=DATA, out=tmp_path_factory.mktemp("runs"), say=lambda _: None).path


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_every_method_answers(run, picture):
    chosen = [method for method in METHODS if method not in CONTRASTED]
    found = ask(str(run), "is there a brick ?", [picture], chosen, new_tokens=3)
    assert [one.method for one in found] == chosen
    assert all(1 <= len(one.answer.tokens) <= 3 for one in found)
    assert all(0 < p <= 1 for one in found for p in one.answer.probabilities)


def test_equal_seeds_give_equal_answers_and_greedy_ignores_the_seed(run, picture):
    one, other = (ask(str(run), "what ?", [picture], ["ritual", "greedy"], new_tokens=4, seed=3) for _ in range(2))
    assert one == other
    assert ask(str(run), "what ?", [picture], ["greedy"], new_tokens=4, seed=9)[0] == one[1]


def test_a_gpu_draws_the_processor_s_answers(run, picture, monkeypatch):
    here = ask(str(run), "what ?", [picture], ["plain", "ritual", "vcd"], new_tokens=4, seed=3)
    with pretend_gpu(monkeypatch):
        there = ask(str(run), "what ?", [picture], ["plain", "ritual", "vcd"], new_tokens=4, seed=3, device="cuda")
    assert [one.answer.tokens for one in there] == [one.answer.tokens for one in here]
    with pytest.raises(CounterpointError, match="has 0 CUDA devices; use --device cpu"):
        ask(str(run), "what ?", device="cuda")


def test_an_answer_has_by_default_as_many_tokens_as_the_run_s_own(run, monkeypatch):
    asked = []
    monkeypatch.setattr(Answering, "answers", lambda _, prompts, **given: asked.append(given["new_tokens"]) or [None])
    ask(str(run), "what ?")
    ask(str(run), "what ?", new_tokens=3)
    assert asked == [Experiment.of_run(Run.open(run)).config.new_tokens, 3]


def test_the_command_prints_json_and_writes_a_page(run, picture, tmp_path, capsys):
    words = [
        "ask",
        str(run),
        "is there a brick ?",
        "--image",
        str(picture),
        "--method",
        "plain",
        "ritual",
        "--new-tokens",
        "3",
    ]
    assert cli.main([*words, "--device", "cpu", "--json", "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found] == ["plain", "ritual"]
    page = (tmp_path / "page.html").read_text()
    assert "Tokens of ritual" in page
    assert "data:image/png;base64" in page


@pytest.mark.parametrize(
    ("question", "images", "methods", "said"),
    [
        ("<image> <image> which ?", 1, ["plain"], "2 marks <image>, and 1 picture was"),
        ("what ?", 1, ["opera"], "unknown method"),
        ("what ?", 1, ["icd"], "icd needs an amateur; name a run of lol"),
        ("a brick " * 200, 1, ["plain"], "more than the context"),
    ],
)
def test_a_question_that_does_not_fit_is_an_error_that_names_the_mend(run, picture, question, images, methods, said):
    with pytest.raises(CounterpointError, match=said):
        ask(str(run), question, [picture] * images, methods)


def test_a_run_of_lol_answers_by_its_contrasts(tmp_path):
    data = "misconceptions?entities=8&relations=1&values=5&train=40"
    small = {
        "model": "llama-16-3-2",
        "vocabulary": 300,
        "context": 64,
        "epochs": 1,
        "batch_size": 16,
        "rank": 2,
        "compare": (),
    }
    config = Experiment.resolve("lol", data, overrides=small | {"new_tokens": 4}).config
    path = training.train("lol", config, data=data, out=tmp_path, say=lambda _: None).path
    found = ask(str(path), "capital of e1 ?", (), ["plain", *CONTRASTED], new_tokens=3)
    assert [one.method for one in found] == ["plain", *CONTRASTED]
    (tmp_path / "a.png").touch()
    with pytest.raises(CounterpointError, match="takes no pictures"):
        ask(str(path), "what ?", [tmp_path / "a.png"], ["plain"])
