"""RITUAL: the authors' numbers, identities, transformations, decoding by branches, training, resuming, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.data import grid_chats
from counterpoint.data.chats import Chat
from counterpoint.encoders import decoding
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.decoding import Plain, answers
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import ritual
from counterpoint.use.ask import ask
from counterpoint.views.transformed import TRANSFORMS, transformed
from interrupted import need_equal_ends
from pretend_gpu import pretend_gpu

PARITY = np.load(Path(__file__).parents[1] / "parity" / "ritual.npz")
DATA = "grid-chats?train=24&valid=6&test=8&grid=2&cell=8&most=2"
SMALL = {"model": "llava-16-2-2", "vocabulary": 300, "context": 64, "epochs": 1, "batch_size": 16, "new_tokens": 6}


def case(number: int) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    return {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("rule", ["ritual", "vcd", "m3id"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_combined_scores_equal_the_authors(number, rule, dtype, rtol):
    at = case(number)
    other = at["in/logits_pos" if rule == "ritual" else "in/logits_neg"].to(dtype)
    alpha = float(at["param/alpha_pos" if rule == "ritual" else "param/alpha_neg"])
    for step, logits in enumerate(at["in/logits"].to(dtype)):
        found = fn.combine_logits(logits, other[step], rule, alpha, float(at["param/beta"]), step)
        torch.testing.assert_close(found, at[f"out/scores_{rule}"][step].to(dtype), rtol=rtol, atol=rtol)


def test_noise_equals_the_authors():
    at = case(2)
    found = fn.diffusion_noise(at["in/image"], at["in/noise"], int(at["param/noise_step"]))
    torch.testing.assert_close(found, at["out/noisy_image"], rtol=1e-5, atol=1e-6)


def test_an_identical_second_branch_divides_the_temperature():
    logits = torch.randn(3, 7, dtype=torch.float64)
    found = fn.combine_logits(logits, logits, alpha=3.0, beta=0.0).softmax(1)
    torch.testing.assert_close(found, (logits / 0.25).softmax(1))


def test_weight_zero_leaves_the_plausible_logits():
    logits, other = torch.randn(3, 7), torch.randn(3, 7)
    for rule in ("ritual", "vcd"):
        found = fn.combine_logits(logits, other, rule, alpha=0.0, beta=0.1)
        kept = found.isfinite()
        assert torch.equal(found[kept], logits[kept])
        assert kept.any(1).all()
        assert (logits[~kept] < (logits.amax(1, keepdim=True) + np.log(0.1)).expand_as(logits)[~kept]).all()


def test_m3id_begins_with_the_model_s_own_logits():
    logits, other = torch.randn(3, 7), torch.randn(3, 7)
    assert torch.equal(fn.combine_logits(logits, other, "m3id", beta=0.0, step=0), logits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"beta": 1.5}, "beta"), ({"rule": "vdc"}, "rule must be"), ({"alpha": -1.0}, "alpha"), ({"step": -1}, "step")],
)
def test_values_out_of_range_raise_an_error_that_names_the_argument(changed, said):
    with pytest.raises(ValueError, match=said):
        fn.combine_logits(torch.zeros(1, 3), torch.zeros(1, 3), **changed)


# ------------------------------------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("name", [*TRANSFORMS, "none"])
def test_a_transformation_keeps_shape_and_type_and_depends_on_the_generator_alone(name):
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    one, same = (transformed(picture, name, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == picture.shape
    assert one.dtype == np.uint8
    assert np.array_equal(one, same)
    assert np.array_equal(one, picture) == (name == "none")


def test_ritual_plus_reads_numbers_and_names_and_nothing_else():
    names = TRANSFORMS
    assert ritual.parse_choice("6", names) == "crop"
    assert ritual.parse_choice("I would take the Gaussian blur, then a crop", names) == "blur"
    assert ritual.parse_choice("7) none of these", names) == ""
    assert ritual.parse_choice("", names) == ""


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def answering() -> tuple[ChatModel, list[Prompt]]:
    data = grid_chats.load(train=20, valid=2, test=8, grid=2, most=2)
    texts = [message.text for chat in data.train.chats for message in chat.messages]
    tokenizer = chat_tokenizer("llava-16-2-2", texts, vocabulary=300, size=data.size)
    torch.manual_seed(0)
    model = ChatModel("llava-16-2-2", tokenizer, size=data.size, context=80).eval()
    assert data.test.images is not None
    prompts = [
        Prompt(chat.prompt, tuple(data.test.images.images(np.array(chat.pictures)))) for chat in data.test.chats[:6]
    ]
    return model, prompts


def by_separate_passes(model: ChatModel, prompt: Prompt, rule: str, steps: int) -> list[int]:
    """Answer greedily as the authors do: one full pass of each branch at each token, without a cache."""
    import torch.nn.functional as F

    other = ritual.without_pictures(prompt) if rule == "m3id" else prompt
    branches = [(model.tokenizer.prompt(p.messages), p.pictures) for p in (prompt, other)]
    found: list[int] = []
    for step in range(steps):
        logits = []
        for n, (ids, pictures) in enumerate(branches):
            media = model.pixels(pictures)
            if n and rule == "vcd":
                media = {"pixel_values": F.relu(media["pixel_values"])}
            rows = torch.tensor([[*ids, *found]])
            logits.append(model.model(input_ids=rows, **media).logits[:, -1].float())
        found.append(int(fn.combine_logits(*logits, rule, 1.0, 0.1, step).argmax()))
        if found[-1] == model.tokenizer.fast.eos_token_id:
            break
    return found


@pytest.mark.parametrize("rule", ["vcd", "m3id"])
def test_branches_in_one_batch_give_the_answers_of_separate_passes(answering, rule, monkeypatch):
    model, prompts = answering
    monkeypatch.setattr(ritual, "diffusion_noise", lambda image, noise, step: torch.relu(image))
    decoder = ritual.TwoBranches(rule, 1.0, 0.1)
    found = answers(model, prompts, decoder, new_tokens=5)
    for prompt, answer in zip(prompts, found, strict=True):
        wanted = by_separate_passes(model, prompt, rule, 5)
        assert answer.tokens == tuple(model.tokenizer.words(wanted))


def test_probabilities_do_not_depend_on_how_many_steps_are_computed_at_once(answering, monkeypatch):
    model, prompts = answering
    together = answers(model, prompts, Plain(), new_tokens=4)
    monkeypatch.setattr(decoding, "MOST_HELD", 0)
    assert answers(model, prompts, Plain(), new_tokens=4) == together


def test_a_prompt_without_a_picture_is_decoded_plainly(answering):
    model, prompts = answering
    blind = [Prompt((Message("user", "is there a brick ?"),)), *prompts[:2]]
    found = answers(model, blind, ritual.TwoBranches(), new_tokens=4)
    plain = answers(model, blind, Plain(), new_tokens=4)
    assert found[0].tokens == plain[0].tokens
    assert found[0].probabilities == pytest.approx(plain[0].probabilities, rel=1e-4)


def test_the_same_picture_twice_is_the_model_at_a_quarter_of_the_temperature(answering):
    model, prompts = answering
    rule = ritual.TwoBranches(transforms=("none",), beta=0.0)
    sharper = answers(
        model, prompts, Plain(), new_tokens=4, temperature=0.25, generator=torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(1)
    # The rule draws a transformation of each prompt first; skip these draws.
    drawn = torch.Generator().manual_seed(1)
    rule.branches(prompts, drawn)
    plain = answers(model, prompts, Plain(), new_tokens=4, temperature=0.25, generator=drawn)
    found = answers(model, prompts, rule, new_tokens=4, temperature=1.0, generator=generator)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in plain]
    assert len(sharper) == len(found)


def test_an_answer_is_cut_at_the_limit_and_says_so(answering):
    model, prompts = answering
    found = answers(model, prompts[:1], new_tokens=2)[0]
    assert len(found.tokens) <= 2
    assert found.ended == (found.tokens[-1] == "[STOP]")


def test_a_prompt_that_leaves_no_room_for_an_answer_raises_an_error(answering):
    model, prompts = answering
    with pytest.raises(CounterpointError, match=r"more than the context of 80.*shorten it"):
        answers(model, prompts, new_tokens=79)


def test_marks_and_pictures_must_be_as_many():
    user, answer = Message("user", f"{IMAGE} what ?"), Message("assistant", "yes")
    with pytest.raises(DataError, match=r"1 marks <image> and 0 pictures"):
        Chat((user, answer))
    with pytest.raises(DataError, match=r"0 marks <image> and 1 picture"):
        Chat((Message("user", "what ?"), answer), (0,))
    with pytest.raises(DataError, match="no answer"):
        Chat((user,), (0,))


# ------------------------------------------------------------------------------------------------------------- learner


def trained(folder: Path, data: str = DATA, **changed: Any) -> Run:
    config = Experiment.resolve("ritual", data, overrides=SMALL | {"compare": ()} | changed).config
    return training.train("ritual", config, data=data, out=folder, say=lambda _: None)


def test_the_function_that_equals_the_authors_is_the_one_that_decodes(tmp_path, monkeypatch):
    called = []
    real = ritual.combine_logits
    monkeypatch.setattr(ritual, "combine_logits", lambda *args: called.append(args[2]) or real(*args))
    last = trained(tmp_path, context=256, compare=("vcd", "m3id", "plain", "same", "greedy", "ritual+")).metrics()[-1]
    assert set(called) == {"ritual", "vcd", "m3id"}
    assert last["test/gain_over_plain"] == pytest.approx(last["test/accuracy"] - last["test/plain_accuracy"])


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    config = Experiment.resolve("ritual", DATA, overrides=SMALL | {"compare": (), "epochs": 2}).config
    need_equal_ends(monkeypatch, ritual.Ritual, "ritual", config, DATA, 6, tmp_path)


def test_a_finished_run_is_measured_without_training(tmp_path):
    first = trained(tmp_path)
    second = trained(tmp_path, model=f"run:{first.path}", epochs=0, method="vcd")
    one, other = load_learner(first).state_dict(), load_learner(second).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert second.metrics()[-1]["test/answer_loss"] == first.metrics()[-1]["test/answer_loss"]


def test_a_model_of_transformers_from_a_folder_answers(tmp_path, monkeypatch):
    from transformers import AutoImageProcessor, CLIPImageProcessor, LlavaProcessor

    data = grid_chats.load(train=20, valid=4, test=4, grid=2, most=2)
    tokenizer = chat_tokenizer("llava-16-2-2", ["a brick"], vocabulary=300, size=data.size)
    model = ChatModel("llava-16-2-2", tokenizer, size=data.size, context=96)
    model.model.save_pretrained(tmp_path / "tiny")
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    fast = tokenizer.fast
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role | upper }}]{% for part in m.content %}{% if part.type == 'image' %}<image>"
        "{% else %} {{ part.text }}{% endif %}{% endfor %}{% if m.role == 'assistant' %}[STOP]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
    )
    patch = 16 // 4
    processor = LlavaProcessor(
        pictures,
        fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=fast.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(tmp_path / "tiny")
    assert AutoImageProcessor.from_pretrained(tmp_path / "tiny") is not None
    name = f"hf:{tmp_path / 'tiny'}"
    run = trained(tmp_path, model=name, epochs=0)
    assert np.isfinite(run.metrics()[-1]["test/answer_loss"])
    picture = tmp_path / "a.png"
    Image.fromarray(data.test.images.images(np.array([0]))[0]).save(picture)
    [here] = ask(name, "a brick", [picture], ["vcd"], new_tokens=4)
    with pretend_gpu(monkeypatch):
        [there] = ask(name, "a brick", [picture], ["vcd"], new_tokens=4, device="cuda")
    assert there.answer.tokens == here.answer.tokens


def test_a_run_of_another_task_is_refused_as_a_model(tmp_path):
    data = "digits?size=8&train=40"
    config = Experiment.resolve("simclr", data, overrides={"encoder": "conv-s", "epochs": 1, "batch_size": 20}).config
    other = training.train("simclr", config, data=data, out=tmp_path, say=lambda _: None)
    with pytest.raises(RunError, match="is a run of the task views, whose model does not answer"):
        trained(tmp_path, model=f"run:{other.path}")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 0}, "has random weights; name run:RUN or hf:NAME"),
        ({"model": "llama-16-2-2"}, "takes no pictures"),
        ({"model": "llava-15-2-2"}, "even multiple"),
        ({"model": "gpt5-s"}, "unknown model"),
        ({"method": "opera"}, "unknown method"),
        ({"transforms": ("flip",)}, "unknown transforms"),
        ({"new_tokens": 64}, "must be fewer than context"),
        (
            {"context": 10},
            r"has more than 10 tokens; set --context \d+ or more \(the shortest chat has \d+\)|must be fewer",
        ),
    ],
)
def test_settings_that_do_not_fit_raise_an_error_that_names_the_mend(tmp_path, changed, said):
    with pytest.raises((CounterpointError, DataError), match=said):
        trained(tmp_path, **changed)


@pytest.mark.usefixtures("drawn")
def test_the_page_shows_the_branches(tmp_path):
    run = trained(tmp_path)
    figures = run.figures()
    assert "Branches" in figures
    assert figures["Branches"]["rows"][0]["cells"]
    assert (run.path / "report.html").is_file()


def test_the_command_line_trains_and_measures(tmp_path, capsys):
    settings = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["train", "ritual", "--data", DATA, *settings, "--out", str(tmp_path), "--name", "r"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "r")]) == 0
