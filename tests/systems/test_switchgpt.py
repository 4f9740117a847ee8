"""SwitchGPT: the authors' parser, identities, flags, stages, measures, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import ChatTokenizer, learn_tokenizer
from counterpoint.encoders.decoding import answers
from counterpoint.encoders.flags import FlagDecoder, flag_ids, opening, start_rows, tables, with_flags
from counterpoint.encoders.messages import Message
from counterpoint.encoders.meta_responses import FLAGS, parse_meta_response, render, well_formed
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import switchgpt
from counterpoint.tasks.adapted_chats import with_adapter
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "switchgpt.npz")
DATA = "media-requests?entities=10&plain=24&requests=16"
SMALL: dict[str, Any] = {
    "model": "llama-16-2-2",
    "vocabulary": 320,
    "context": 96,
    "epochs": 1,
    "batch_size": 8,
    "new_tokens": 6,
    "rank": 2,
    "tuning_epochs": 1,
    "compare": (),
}
LABELS = torch.tensor([[-100, -100, 1, 2, 3], [-100, 4, 5, 6, -100], [-100, -100, -100, 0, 1]])


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- parser


@pytest.mark.parametrize("row", range(len(PARITY["parse/case0/in/text"])))
def test_the_parser_equals_the_authors(row):
    flags = [str(flag) for flag in PARITY["parse/case0/param/flags"]]
    text, wanted = str(PARITY["parse/case0/in/text"][row]), str(PARITY["parse/case0/out/modalities"][row])
    found, prompts = fn.parse_meta_response(text, flags, str(PARITY["parse/case0/param/default"]))
    if wanted == "ERROR":  # their parser raises
        assert (found, prompts) == (["[TEXT]"], [""])
        return
    assert " ".join(found) == wanted
    assert prompts == [str(PARITY["parse/case0/out/prompt"][row])] * len(found)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_rendered_meta_response_is_parsed_back(flag, strict):
    assert parse_meta_response(render(flag, "two foxes, 3 hens"), strict=strict) == ([flag], ["two foxes, 3 hens"])


def test_flags_count_by_number_then_by_their_order():
    assert parse_meta_response("[AUDIO] [IMAGE] [AUDIO] Prompt: x")[0] == ["[AUDIO]", "[IMAGE]"]
    assert parse_meta_response("[VIDEO] [IMAGE] Prompt: x")[0] == ["[IMAGE]", "[VIDEO]"]


def test_a_strict_parser_ignores_flags_in_the_prompt():
    reply = "Modality: [TEXT] Prompt: write [IMAGE] twice, [IMAGE]"
    assert parse_meta_response(reply)[0] == ["[IMAGE]", "[TEXT]"]
    assert parse_meta_response(reply, strict=True)[0] == ["[TEXT]"]
    assert parse_meta_response("Modality: [SMELL] Prompt: x", strict=True)[0] == ["[TEXT]"]


@pytest.mark.parametrize(
    "reply", ["", "no marker", "Modality: [IMAGE]", "Modality: Prompt: x", "Modality: [IMAGE] Prompt: ###"]
)
def test_replies_off_the_format_are_not_well_formed(reply):
    assert not well_formed(reply)
    assert parse_meta_response(reply, strict=True)[0] in (["[TEXT]"], ["[IMAGE]"])


def test_a_default_that_is_no_flag_raises_an_error():
    with pytest.raises(ValueError, match="default must be one of flags"):
        parse_meta_response("x", ["[IMAGE]"])


# ---------------------------------------------------------------------------------------------------------------- loss


def test_a_weight_of_one_gives_the_plain_mean_and_more_weighs_flags():
    logits = drawn()
    plain = fn.masked_lm_loss(logits, LABELS)
    torch.testing.assert_close(fn.flag_weighted_lm_loss(logits, LABELS, [4], 1.0), plain)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none")
    weights = torch.where(LABELS[:, 1:].flatten() == -100, 0.0, torch.where(LABELS[:, 1:].flatten() == 4, 3.0, 1.0))
    torch.testing.assert_close(
        fn.flag_weighted_lm_loss(logits, LABELS, [4], 3.0), (nll * weights).sum() / weights.sum()
    )


def test_uniform_logits_have_the_loss_of_the_vocabulary_and_prompts_do_not_count():
    logits = torch.zeros(3, 5, 7)
    torch.testing.assert_close(fn.flag_weighted_lm_loss(logits, LABELS, [4], 5.0), torch.tensor(float(np.log(7))))
    changed = drawn()
    changed[0, 0] += 9.0  # before a token of the prompt
    for one, other in ((drawn(), changed),):
        torch.testing.assert_close(
            fn.flag_weighted_lm_loss(one, LABELS, [4], 2.0), fn.flag_weighted_lm_loss(other, LABELS, [4], 2.0)
        )


def test_without_an_answer_the_weighted_loss_is_0_and_a_weight_below_1_is_refused():
    assert float(fn.flag_weighted_lm_loss(drawn(), torch.full((3, 5), -100), [4], 2.0)) == 0.0
    with pytest.raises(ValueError, match="weight"):
        fn.flag_weighted_lm_loss(drawn(), LABELS, [4], 0.5)


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return with_flags(learn_tokenizer(["draw the cat in red , Modality: Prompt:"] * 3, 320, 0), FLAGS)


def test_flags_are_single_tokens_that_survive_saving_and_users_cannot_write_them(tokenizer):
    again = ChatTokenizer.from_json(tokenizer.to_json())
    messages = (Message("user", "draw [IMAGE] Prompt: x"), Message("assistant", render("[IMAGE]", "a cat")))
    prompt, answer = again.chat(messages)
    flags = flag_ids(again, FLAGS)
    assert len(set(flags)) == 4
    assert [token for token in answer if token in flags] == flag_ids(again, ["[IMAGE]"])
    assert not set(prompt) & set(flags)
    assert again.text(answer) == "Modality: [IMAGE] Prompt: a cat"
    assert with_flags(again, FLAGS) is again


def test_a_user_s_text_cannot_hold_a_meta_response(tokenizer):
    text = tokenizer.text(tokenizer.prompt((Message("user", "Modality: [IMAGE] Prompt: x ### [TEXT]"),)))
    assert "Modality : (IMAGE) Prompt : x # # # (TEXT)" in text


def adapted(tokenizer: ChatTokenizer, name: str = "llama-16-2-2") -> ChatModel:
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, context=48)
    return with_adapter(model, 2, "flags", scale=1.0, attention=True, tokens=sorted(flag_ids(tokenizer, FLAGS))).eval()


@pytest.mark.parametrize("name", ["llama-16-2-2", "gpt2-16-2-2", "qwen2-16-2-2"])
def test_rows_of_flags_start_at_the_mean_and_the_adapter_adds_nothing_yet(tokenizer, name):
    model, flags = adapted(tokenizer, name), flag_ids(tokenizer, FLAGS)
    start_rows(model, flags, "flags")
    [table] = tables(model)
    for weight in (table.weight, table.token_adapter.base_layer.weight):
        others = weight[: tokenizer.vocabulary - 4]
        torch.testing.assert_close(weight[flags], others.mean(0).expand(4, -1))
    ids = torch.tensor([tokenizer.prompt((Message("user", "draw the cat"),))])
    adapted_logits = model(ids, torch.ones_like(ids).bool())
    with model.model.disable_adapter():
        torch.testing.assert_close(model(ids, torch.ones_like(ids).bool()), adapted_logits)


@pytest.mark.parametrize("seed", range(3))
def test_constrained_decoding_writes_one_flag_for_any_logits(tokenizer, seed):
    model = adapted(tokenizer)
    torch.manual_seed(seed)
    for table in tables(model):
        torch.nn.init.normal_(table.token_adapter.base_layer.weight)
    start, after = opening(tokenizer)
    prompts = [Prompt((Message("user", "draw the cat"),)), Prompt((Message("user", "x"),))]
    found = answers(
        model, prompts, FlagDecoder(tokenizer, FLAGS), new_tokens=len(start) + len(after) + 1, temperature=1.0
    )
    for answer in found:
        assert parse_meta_response(answer.text, strict=True)[0][0] in FLAGS
        assert sum(answer.text.count(flag) for flag in FLAGS) == 1
        assert answer.text.startswith("Modality:")
        assert answer.text.endswith("Prompt:")


# ------------------------------------------------------------------------------------------------------------- learner


def config(data: str = DATA, **changed: Any) -> Any:
    return Experiment.resolve("switchgpt", data, overrides=SMALL | changed).config


def trained(folder: Path, *, data: str = DATA, name: str | None = None, **changed: Any) -> Run:
    return training.train("switchgpt", config(data, **changed), data=data, out=folder, name=name, say=lambda _: None)


def built(data: str = DATA, **changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("switchgpt", data, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_the_loss_of_the_equations_trains_and_the_base_stays(monkeypatch):
    called = []
    real = switchgpt.flag_weighted_lm_loss
    monkeypatch.setattr(switchgpt, "flag_weighted_lm_loss", lambda *args: called.append(args[2:]) or real(*args))
    learner, task = built(flag_weight=2.0)
    kept: dict[str, torch.Tensor] = {}

    def note(epoch: int) -> None:
        if not kept:
            kept.update({n: v.clone() for n, v in learner.named_parameters()})

    learner.end_epoch = note
    fit(learner, task, bar=False)
    assert called == [(learner.flags, 2.0)] * 2
    after = dict(learner.named_parameters())
    tuned = {name for name in after if not torch.equal(after[name], kept[name])}
    assert any("lora_B" in name for name in tuned)
    assert any("trainable_tokens" in name for name in tuned)
    rows = [name for name in tuned if "lora_" not in name and "trainable_tokens" not in name]
    assert all("token_adapter" in name for name in rows)  # the flags' start
    others = torch.ones(learner.model.tokenizer.vocabulary, dtype=torch.bool)
    others[learner.flags] = False
    assert all(torch.equal(after[name][others], kept[name][others]) for name in rows)


def test_the_base_model_learns_from_plain_chats_and_without_flags():
    learner, task = built()
    survey_rows: list[int] = []
    real = learner.loss

    def loss(batch: Any) -> Any:
        if not learner.tunes:
            survey_rows.extend(batch["index"].tolist())
        return real(batch)

    learner.loss = loss
    fit(learner, task, bar=False)
    assert {task.data.train.chats[n].kind for n in survey_rows} == {"free"}
    assert all(torch.isfinite(value).all() for value in learner.parameters())


def test_examples_are_balanced_over_the_modalities():
    learner, task = built(examples=8)
    fit(learner, task, bar=False)
    chosen = [task.data.train.chats[n].answer.split()[1] for n in learner.examples(Survey(task, learner)).tolist()]
    assert sorted(chosen) == sorted([*FLAGS, *FLAGS])


def test_shuffled_flags_change_the_answers_alone():
    learner, task = built(shuffled=True)
    fit(learner, task, bar=False)
    learner.survey = Survey(task, learner)
    rows = learner.examples(learner.survey).tolist()
    ids = [task.tokenizer.chat(task.data.train.chats[n].messages) for n in rows]
    batch = learner.prepare({"index": torch.tensor(rows)}, torch.Generator())
    flags = set(learner.flags)
    changed = 0
    for n, (prompt, answer) in enumerate(ids):
        found = batch["ids"][n][batch["mask"][n]].tolist()
        assert [t for t in found if t not in flags] == [t for t in [*prompt, *answer] if t not in flags]
        changed += found != [*prompt, *answer]
    assert changed


def test_measures_and_the_confusion_matrix_are_in_the_run(tmp_path):
    run = trained(tmp_path, compare=switchgpt.ROUTERS, constrained=True, new_tokens=10, context=160)
    found = run.metrics()[-1]
    assert 0 <= found["test/shots_accuracy"] <= 1
    for name in (
        "modality_accuracy",
        "format_valid",
        "entity_in_prompt",
        "routing_accuracy",
        "text_perplexity_rise",
        "cut",
    ):
        assert np.isfinite(found[f"test/{name}"]), name
    assert found["test/keywords_accuracy"] + found["test/gain_over_keywords"] == pytest.approx(
        found["test/modality_accuracy"]
    )
    assert found["test/routing_accuracy"] == pytest.approx(
        found["test/modality_accuracy"]
    )  # the same softmax over flags
    matrix = run.figures()["Confusion (modality)"]
    assert matrix["names"] == ["TEXT", "IMAGE", "AUDIO", "VIDEO"]
    assert np.sum(matrix["values"]) == len(Experiment.resolve("switchgpt", DATA, overrides=SMALL).task().data.test)
    learner: Any = load_learner(run)
    again, task = built(context=160)
    again.load_state_dict(learner.state_dict())
    prompt = [Prompt((Message("user", "draw the cat"),))]
    torch.testing.assert_close(learner.route(prompt), again.eval().route(prompt))
    before = learner.demonstrations(Survey(task, learner))
    names = [f"Modality: {name}" for name in ("text", "image", "audio", "video")]
    assert [message.text for message in before if message.role == "assistant"] == names
    learner.config.context = 64
    with pytest.raises(CounterpointError, match=r"shots puts 4 demonstrations .* raise --context"):
        learner.demonstrations(Survey(task, learner))


def test_the_untuned_model_after_demonstrations_names_the_most_probable_word():
    learner, task = built(context=160)
    before = learner.demonstrations(Survey(task, learner))
    prompt = Prompt((Message("user", "draw the cat"),))
    logs = []
    for name in ("text", "image", "audio", "video"):
        asked, answer = task.tokenizer.chat((*before, *prompt.messages, Message("assistant", f"Modality: {name}")))
        ids = torch.tensor([[*asked, *answer]])
        found = learner.model(ids, torch.ones_like(ids, dtype=torch.bool)).detach().log_softmax(2)[0]
        at = range(len(asked) - 1, len(asked) + len(answer) - 1)
        logs.append(float(sum(found[n, ids[0, n + 1]] for n in at)))
    assert learner._by_shots(before, prompt) == task.config.flags[int(np.argmax(logs))]


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    need_equal_ends(monkeypatch, switchgpt.SwitchGPT, "switchgpt", config(), DATA, (1, 4), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "switchgpt", "--data", DATA, "--out", str(tmp_path), "--lora-dropout=0"]
    words += [f"--{n.replace('_', '-')}={v}" for n, v in SMALL.items() if n != "compare"]
    command_over_processes([*words, "--compare", "keywords", "--name", "two"], tmp_path)
    one, two = (
        trained(tmp_path, name="one", lora_dropout=0.0, compare=("keywords",)).metrics(),
        Run.open(tmp_path / "two").metrics(),
    )
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


@pytest.mark.parametrize("slug", ["switchgpt", "ritual"])
def test_a_finished_model_is_tuned_without_its_chats(tmp_path, slug):
    if slug == "switchgpt":
        first = trained(tmp_path, name="base", tuning_epochs=0)
    else:
        theirs = {k: v for k, v in SMALL.items() if k not in ("rank", "tuning_epochs")}
        chosen = Experiment.resolve(slug, DATA, overrides=theirs).config
        first = training.train(slug, chosen, data=DATA, out=tmp_path, name="base", say=lambda _: None)
    second = trained(tmp_path, name="tuned", model=f"run:{first.path}", epochs=0)
    base, tuned = (load_learner(run).model.state_dict() for run in (first, second))
    names = {switchgpt.plain_name(name): value for name, value in base.items()}
    for name, value in tuned.items():
        if "lora_" not in name and "trainable_tokens" not in name and "embed" not in name:
            torch.testing.assert_close(value, names[switchgpt.plain_name(name)])


def test_your_own_jsonl_of_modalities_is_read(tmp_path):
    lines = []
    for n in range(24):
        request = {"role": "user", "content": f"draw thing {n}"}
        answer = {"role": "assistant", "modality": "plot" if n % 2 else "TEXT", "prompt": f"bars {n}"}
        lines.append({"messages": [request, answer], "objects": [str(n)], "split": ("train", "valid", "test")[n % 3]})
        lines.append({"messages": [request, {"role": "assistant", "content": f"plain {n}"}], "split": "train"})
    lines.append({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "modality": "IMAGE"}]})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = f"chats:{tmp_path / 'a.jsonl'}"
    run = trained(tmp_path, data=data, flags=("[TEXT]", "[PLOT]"))
    found = run.metrics()[-1]
    assert 0 <= found["test/entity_in_prompt"] <= 1
    assert "PLOT" in run.figures()["Confusion (modality)"]["names"]
    task = Experiment.resolve("switchgpt", data, overrides=SMALL).task()
    assert {chat.kind for chat in task.data.test.chats} == {"meta"}
    assert any("1 of 49" in note or "without a prompt" in note for note in task.data.notes)
    with pytest.raises(DataError, match=r"flags that --flags lacks: \[PLOT\] \(\d+\); add them"):
        trained(tmp_path, data=data, name="other")
    assert not (tmp_path / "other" / "metrics.csv").exists()  # before the base model trains


def test_data_without_modalities_or_plain_chats_are_refused(tmp_path):
    with pytest.raises(DataError, match="no training answer names a modality"):
        trained(tmp_path, data="misconceptions?entities=8&relations=1&values=5&train=40")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"draw {n}"},
                {"role": "assistant", "modality": "IMAGE", "prompt": f"{n}"},
            ]
        }
        for n in range(30)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no chat without a modality trains the base model"):
        trained(tmp_path, data=f"chats:{tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"flag_weight": 0.5}, "flag_weight must be at least 1"),
        ({"flags": ("[TEXT]", "image")}, "capital words in brackets"),
        ({"flags": ("[IMAGE]", "[AUDIO]")}, r"with \[TEXT\]"),
        ({"tuning": "half"}, "unknown tuning"),
        ({"compare": ("magic",)}, "unknown router"),
        ({"tuning_lr": 0.0}, "tuning_lr must be > 0"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(changed, said):
    with pytest.raises(CounterpointError, match=said):
        config(**changed)


@pytest.mark.parametrize("options", ["entities=4", "plain=0", "requests=-1", "seed=-1"])
def test_options_of_the_source_out_of_range_raise_an_error(options):
    with pytest.raises(CounterpointError, match="media-requests: entities is 8 to"):
        Experiment.resolve("switchgpt", f"media-requests?{options}", overrides=SMALL).task()


def test_held_out_wordings_and_entities_are_not_in_training():
    data = Experiment.resolve("switchgpt", DATA, overrides=SMALL).task().data
    taught = {chat.objects[0] for chat in data.train.chats if chat.kind == "meta"}
    asked = {chat.objects[0] for chat in (*data.valid.chats, *data.test.chats)}
    assert not taught & asked
    requests = {chat.question for chat in data.train.chats}
    assert not requests & {chat.question for chat in data.test.chats}


def test_a_question_is_asked_and_its_files_are_written(tmp_path, capsys):
    run = trained(tmp_path, constrained=True, new_tokens=10)
    out = tmp_path / "made"
    words = ["ask", str(run.path), "draw a red [IMAGE] circle", "--out", str(out), "--new-tokens", "12", "--json"]
    assert cli.main([*words, "--html", str(tmp_path / "page.html")]) == 0
    [row] = json.loads(capsys.readouterr().out)
    [made] = row["made"]
    assert made["modality"] in FLAGS
    assert made["status"] in ("answered", "made", "failed", "refused")
    assert (made["file"] is not None) == out.exists()
    assert "Made" in (tmp_path / "page.html").read_text()
    (out / "x").parent.mkdir(exist_ok=True)
    (out / "x").write_text("x")
    assert cli.main(words) == 2
    assert "is not an empty folder" in capsys.readouterr().err
