"""COSMO: the authors' numbers, identities, pictures between words, alternating batches, few-shot captions, resuming, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import cli, training
from counterpoint import data as sources
from counterpoint import functional as fn
from counterpoint.core.masking import IGNORED
from counterpoint.data.chats import Chat
from counterpoint.encoders import interleaved as networks
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.interleaved import InterleavedModel, Interleaving, interleaved_tokenizer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.alignment import cosmo
from counterpoint.tasks import interleaved
from counterpoint.words import counted
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "cosmo.npz")
DATA = "digit-documents?train=24&documents=8&each=1&test_documents=3"
SMALL: dict[str, Any] = {
    "model": "llama-16-4-2",
    "vocabulary": 300,
    "context": 48,
    "epochs": 1,
    "batch_size": 12,
    "new_tokens": 4,
    "vision": "patches-8",
    "heads": 2,
    "dim_head": 8,
    "media_tokens": 2,
    "depth": 1,
    "embedding": 8,
    "shots": (),
}
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def case(number: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a case, and its weights."""
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    found = {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
    return found, {k.removeprefix("weight/"): v for k, v in found.items() if k.startswith("weight/")}


def close(found: Tensor, wanted: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
def test_the_contrast_equals_the_authors(dtype, rtol):
    at, weights = case(0, dtype)
    vision, text = (at[f"in/{name}_emb"].requires_grad_() for name in ("vision", "text"))
    theta = at["param/log_scale"].requires_grad_()
    rows = F.linear(vision, weights["vision_proj"]), F.linear(text, weights["text_proj"])
    loss = fn.interleaved_contrast(*rows, theta.exp())
    loss.backward()
    close(loss.detach(), at["out/loss"], 1e-6)  # the authors' is rounded to float32
    rtol = max(rtol, 1e-6)
    for name, leaf in (("vision_emb", vision), ("text_emb", text), ("log_scale", theta)):
        assert leaf.grad is not None
        close(leaf.grad, at[f"grad/{name}"], rtol)
    found = fn.matching_accuracy(*rows, k=5)
    close(100 * found.top1, at["out/top1_percent"], 1e-5)
    close(100 * found.topk, at["out/topk_percent"], 1e-5)


@TYPES
@pytest.mark.parametrize("number", [1, 2])
def test_the_gated_block_equals_the_authors_in_both_modes(number, dtype, rtol):
    at, weights = case(number, dtype)
    hidden, media = at["in/text_hidden"].requires_grad_(), at["in/media_tokens"].requires_grad_()
    given = at["in/media_locations"], weights, int(at["param/heads"]), bool(at["param/only_immediate_media"])
    found = fn.gated_cross_attention(hidden, media, *given, int(at["param/dim_head"]))
    (found * at["in/probe"]).sum().backward()
    assert hidden.grad is not None
    assert media.grad is not None
    close(found.detach(), at["out/hidden"], rtol)
    close(hidden.grad, at["grad/text_hidden"], rtol)
    close(media.grad, at["grad/media_tokens"], rtol)


@TYPES
def test_the_summary_of_a_text_equals_the_authors(dtype, rtol):
    at, weights = case(3, dtype)
    hidden = at["in/text_hidden"].requires_grad_()
    found = fn.learned_query_pool(hidden, at["in/latent"], weights, int(at["param/heads"]), int(at["param/dim_head"]))
    (found * at["in/probe"]).sum().backward()
    assert hidden.grad is not None
    close(found.detach(), at["out/text_emb"], rtol)
    close(hidden.grad, at["grad/text_hidden"], rtol)


@pytest.mark.parametrize("few", [0, 512])
def test_equal_captions_are_positives_of_each_other(monkeypatch, few):
    monkeypatch.setattr(cosmo, "FEW", few)
    torch.manual_seed(0)
    vision, text = torch.randn(2, 7, 5, dtype=torch.float64)
    captions = torch.tensor([3, 1, 3, 0, 1, 3, 2])
    s = 4.0 * F.normalize(text, dim=1) @ F.normalize(vision, dim=1).T
    target = (captions[:, None] == captions).double()
    target = target / target.sum(1, keepdim=True)
    wanted = (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2
    torch.testing.assert_close(fn.interleaved_contrast(vision, text, 4.0, captions), wanted)
    alone = fn.interleaved_contrast(vision, text, 4.0)
    torch.testing.assert_close(fn.interleaved_contrast(vision, text, 4.0, torch.arange(7)), alone)
    torch.testing.assert_close(fn.clip(*(F.normalize(x, dim=1) for x in (vision, text)), math.log(4.0)), alone)


def test_one_pair_has_no_loss_and_no_gradient_and_equal_embeddings_log_n():
    x, y = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    loss = fn.interleaved_contrast(x, y, 3.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6
    same = torch.ones(6, 4)
    assert float(fn.interleaved_contrast(same, same, 3.0)) == pytest.approx(math.log(6), rel=1e-6)


@pytest.mark.parametrize("immediate", [True, False])
def test_tokens_before_the_first_medium_get_nothing_from_attention(immediate):
    at, weights = case(1, torch.float64)
    locations = torch.tensor([[False, False, True, False, True, False, False]]).expand(2, -1)
    given = at["in/text_hidden"], at["in/media_tokens"], locations, weights, int(at["param/heads"]), immediate, 4
    changed = (given[0], given[1] + 1.0, *given[2:])
    found, other = fn.gated_cross_attention(*given), fn.gated_cross_attention(*changed)
    assert torch.equal(found[:, :2], other[:, :2])
    assert not torch.isclose(found[:, 2:], other[:, 2:]).all(2).any()
    blind = fn.gated_cross_attention(given[0], given[1][:, :0], torch.zeros_like(locations), *given[3:])
    torch.testing.assert_close(found[:, :2], blind[:, :2])


@pytest.mark.parametrize("immediate", [True, False])
def test_a_token_sees_the_latest_medium_or_all_before_and_never_a_later_one(immediate):
    at, weights = case(1, torch.float64)
    locations = torch.tensor([[True, False, True, False, False, False, False]]).expand(2, -1)
    given = at["in/text_hidden"], locations, weights, int(at["param/heads"]), immediate, 4
    media = at["in/media_tokens"]
    found = fn.gated_cross_attention(given[0], media, *given[1:])

    def changes(item: int) -> list[bool]:
        moved = media.clone()
        moved[:, item] += 1.0
        apart = fn.gated_cross_attention(given[0], moved, *given[1:]) - found
        return (apart.abs().amax((0, 2)) > 1e-9).tolist()

    assert changes(1) == [False, False, *[True] * 5]
    assert changes(0) == [True, True, *[not immediate] * 5]


def test_more_places_than_media_raise_an_error_that_names_the_argument():
    at, weights = case(1, torch.float64)
    given = at["in/text_hidden"], at["in/media_tokens"], torch.ones(2, 7, dtype=torch.bool), weights, 2
    with pytest.raises(ValueError, match=r"media_locations: a text has 7 places of media, and media holds 2"):
        fn.gated_cross_attention(*given)
    with pytest.raises(ValueError, match=r"captions must be \[2\]"):
        fn.interleaved_contrast(torch.eye(2), torch.eye(2), captions=torch.arange(3))
    with pytest.raises(ValueError, match=r"k must be at least 1"):
        fn.matching_accuracy(torch.eye(2), torch.eye(2), k=0)


def test_masked_padding_does_not_change_the_summary_and_read_padding_does():
    at, weights = case(3, torch.float64)
    hidden, rest = at["in/text_hidden"], (at["in/latent"], weights, int(at["param/heads"]), int(at["param/dim_head"]))
    longer = torch.cat([hidden, torch.randn(3, 4, hidden.shape[2], dtype=hidden.dtype)], 1)
    mask = torch.arange(longer.shape[1])[None].expand(3, -1) < hidden.shape[1]
    alone = fn.learned_query_pool(hidden, *rest)
    torch.testing.assert_close(fn.learned_query_pool(longer, *rest, mask), alone)
    assert not torch.allclose(fn.learned_query_pool(longer, *rest), alone)


# -------------------------------------------------------------------------------------------------------------- networks

TEXTS = ["three seven", "what is it ?", "nine one"] * 3
TALK = (
    Message("user", IMAGE),
    Message("assistant", "three seven"),
    Message("user", f"{IMAGE} what is it ?"),
    Message("assistant", "nine one"),
)


def built(name: str = "llama-16-4-2", **changed: Any) -> InterleavedModel:
    torch.manual_seed(0)
    given = {"heads": 2, "dim_head": 8, "media_tokens": 2, "depth": 1, "embedding": 8, "vision": "patches-8"}
    tokenizer = interleaved_tokenizer(name, TEXTS, 300)
    model = InterleavedModel(name, tokenizer, Interleaving(**given | changed), size=16, context=48).eval()
    for parameter in model.blocks.parameters():
        if parameter.shape == (1,):
            parameter.data.fill_(0.8)  # the gates, so that pictures matter
    return model


def pictures(many: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (many, 16, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", ["llama-16-4-2", "gpt2-16-4-2", "qwen2-16-4-2"])
@pytest.mark.parametrize("immediate", [True, False])
def test_generating_with_a_cache_equals_full_passes(name, immediate):
    model = built(name, immediate=immediate)
    shown = pictures(2)
    prompts = [
        Prompt(TALK[:3], tuple(shown)),
        Prompt(TALK[:1], (shown[1],)),
        Prompt((Message("user", "what is it ?"),)),
    ]
    for prompt, found in zip(prompts, model.generate(prompts, 4), strict=True):
        ids, told = model.tokenizer.prompt(prompt.messages), []
        for _ in range(4):
            rows = torch.tensor([[*ids, *told]])
            given = (torch.from_numpy(np.stack(prompt.pictures))[None],) if prompt.pictures else (None,)
            logits = model(rows, torch.ones_like(rows, dtype=torch.bool), *given, torch.tensor([len(prompt.pictures)]))
            told.append(int(logits[0, -1].argmax()))
            if told[-1] == model.tokenizer.fast.eos_token_id:
                break
        assert found == told


def test_the_lower_half_never_sees_a_picture_and_the_upper_half_does():
    model = built()
    rows = interleaved.turn_rows(model.tokenizer, [TALK])
    shown = torch.from_numpy(pictures(2))[None]
    counts = torch.tensor([2])
    given = rows["ids"], rows["mask"]
    logits, vision, text = model(*given, shown, counts, embed=True)
    other, other_vision, other_text = model(*given, shown.flip(1) // 2, counts, embed=True)
    assert torch.equal(text, other_text)
    assert not torch.allclose(logits, other)
    assert not torch.allclose(vision, other_vision)
    torch.testing.assert_close(model.embed_texts(*given), text)
    torch.testing.assert_close(model.embed_pictures(shown, counts), vision)
    fused = built(summary="fused")
    assert not torch.allclose(fused(*given, shown, counts, embed=True)[2], fused.embed_texts(*given))


def test_new_blocks_are_the_identity():
    model = built()
    rows = interleaved.turn_rows(model.tokenizer, [TALK])
    for parameter in model.blocks.parameters():
        if parameter.shape == (1,):
            parameter.data.zero_()
    plain = model.model(input_ids=rows["ids"], attention_mask=rows["mask"].long()).logits
    found = model(rows["ids"], rows["mask"], torch.from_numpy(pictures(2))[None], torch.tensor([2]))
    torch.testing.assert_close(found, plain)


def test_blocks_stand_in_front_of_every_second_upper_layer_and_are_thinner():
    thin, thick = built("llama-16-6-2", interval=2, compress=2), built("llama-16-6-2")
    assert sorted(thin.blocks) == ["3", "5"]
    assert sorted(thick.blocks) == ["3", "4", "5"]
    assert 2 * thin.blocks["3"].attn.to_q.weight.shape[0] == thick.blocks["3"].attn.to_q.weight.shape[0]


@pytest.mark.parametrize("many", [0, 1, 3])
def test_a_mark_without_a_picture_and_the_reverse_raise_an_error(many):
    model = built()
    rows = interleaved.turn_rows(model.tokenizer, [TALK])
    shown = torch.from_numpy(pictures(3))[None]
    with pytest.raises(
        CounterpointError, match=f"text 0 has 2 marks <image> and {counted(many, 'picture')}; give one picture"
    ):
        model(rows["ids"], rows["mask"], shown, torch.tensor([many]))
    with pytest.raises(CounterpointError, match="marks <image>"):
        model.generate([Prompt(TALK[:3], tuple(pictures(1)))], 2)


def test_texts_without_pictures_skip_the_picture_encoder(monkeypatch):
    model = built()
    monkeypatch.setattr(InterleavedModel, "read_pictures", lambda *_: pytest.fail("the picture encoder ran"))
    rows = interleaved.turn_rows(model.tokenizer, [(Message("user", "what ?"), Message("assistant", "nine one"))])
    assert (
        model(rows["ids"], rows["mask"], torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), torch.zeros(1).long())
        is not None
    )
    with pytest.raises(CounterpointError, match="leave out embed"):
        model(rows["ids"], rows["mask"], embed=True)


def test_an_adapter_or_nothing_of_the_language_model_trains():
    for language in ("lora", "frozen"):
        model = built(language=language)
        names = [name for name, p in model.model.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in names)
        assert bool(names) == (language == "lora")
        assert all(p.requires_grad for p in model.blocks.parameters())


def test_an_image_encoder_of_the_library_gives_the_tokens():
    model = built(vision="vit-xs", frozen_vision=True)
    assert model.vision.width == 48
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert model.embed_pictures(torch.from_numpy(pictures(2))[:, None], torch.ones(2).long()).shape == (2, 8)


def test_a_model_of_transformers_from_a_folder_gets_the_tokens(tmp_path):
    model = built()
    model.model.save_pretrained(tmp_path / "lm")
    plain = interleaved_tokenizer("llama-16-4-2", TEXTS, 300).fast
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "lm")
    name = f"hf:{tmp_path / 'lm'}"
    run = trained(tmp_path, model=name, language="frozen")
    assert np.isfinite(run.metrics()[-1]["test/answer_loss"])
    learner = load_learner(run)
    assert learner.model.tokenizer.words([learner.model.tokenizer.image_id]) == [IMAGE]


# ------------------------------------------------------------------------------------------------------------------ data


def test_answers_are_learned_except_before_the_first_picture():
    tokenizer = interleaved_tokenizer("llama-s", TEXTS, 300)
    early = (Message("user", "what ?"), Message("assistant", "nine one"), *TALK[:2])
    rows = interleaved.turn_rows(tokenizer, [TALK, early, early[:2]])

    def learned(n: int) -> list[str]:
        return tokenizer.words(rows["labels"][n][rows["labels"][n] != IGNORED].tolist())

    assert learned(0) == [" three", " seven", "<|endofchunk|>", " nine", " one", "<|endofchunk|>"]
    assert learned(1) == [" three", " seven", "<|endofchunk|>"]
    assert learned(2) == [" nine", " one", "<|endofchunk|>"]  # a text without pictures
    assert tokenizer.words(rows["ids"][0].tolist())[:2] == ["<s>", IMAGE]


def test_kinds_alternate_and_an_epoch_ends_with_the_shortest():
    batches = interleaved.KindBatches([np.arange(20), np.arange(20, 29)], [6, 4])
    found = [batch.tolist() for batch in batches.epoch(np.random.default_rng(0))]
    assert [len(batch) for batch in found] == [6, 4, 6, 4]
    assert len(batches) == 4
    assert all((row < 20) == (n % 2 == 0) for n, batch in enumerate(found) for row in batch)
    assert len({row for batch in found for row in batch}) == 20


def test_a_long_document_is_cut_between_its_answers():
    tokenizer = interleaved_tokenizer("llama-s", TEXTS, 300)
    chat = Chat(TALK + TALK, (4, 5, 6, 7))
    parts = interleaved.windows(chat, tokenizer, 100, 3)
    assert [part.pictures for part in parts] == [(4, 5, 6), (7,)]
    assert sum((part.messages for part in parts), ()) == chat.messages
    assert [part.pictures for part in interleaved.windows(chat, tokenizer, 9, 3)] == [(4,), (5,), (6,), (7,)]


def test_the_world_has_pairs_and_documents_and_new_digits_for_the_test():
    data = sources.load(DATA, task="chats")
    kinds = [interleaved.kind_of(chat) for chat in data.train.chats]
    assert (kinds.count("pair"), kinds.count("document")) == (24, 8)
    assert sorted({chat.answer for chat in data.test.chats[:100]}) == sorted(
        {chat.answer for chat in data.valid.chats[:100]}
    )
    assert data.train.images is not None
    assert data.train.images.images(np.arange(2)).shape == (2, 16, 16, 3)
    with pytest.raises(CounterpointError, match="digit-documents: train must be at least 2"):
        sources.load("digit-documents?train=1", task="chats")


def own_chats(folder: Path) -> str:
    """Write chats with one and with several pictures, as a user has them."""
    rng = np.random.default_rng(0)
    lines = []
    for n in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder / f"{n}.png")
        turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": f"number {n % 7}"}]
        lines.append({"messages": turns, "images": [f"{n}.png"]})
        if n > 1:
            names = [f"{n - k}.png" for k in range(3)]
            lines.append({"messages": [turn for _ in names for turn in turns], "images": names})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines[:60])))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines[60:])))
    return f"chats:{folder}?size=16&valid=0.2"


def test_own_pairs_and_documents_train(tmp_path):
    (tmp_path / "own").mkdir()
    run = trained(tmp_path, own_chats(tmp_path / "own"))
    last = run.metrics()[-1]
    assert {"test/caption_exact", "test/cider", "test/document_exact", "test/image_to_text_r1"} <= set(last)


# --------------------------------------------------------------------------------------------------------------- learner


def trained(folder: Path, data: str = DATA, **changed: Any) -> Run:
    config = Experiment.resolve("cosmo", data, overrides=SMALL | changed).config
    return training.train("cosmo", config, data=data, out=folder, say=lambda _: None)


def step(**changed: Any) -> tuple[cosmo.Cosmo, dict[str, Any], dict[str, Any]]:
    """Return an untrained learner, a batch of pairs and one of documents."""
    experiment = Experiment.resolve("cosmo", DATA, overrides=SMALL | changed)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    assert isinstance(learner, cosmo.Cosmo)
    loader = iter(task.train_loader(0, learner.position))
    return learner, next(loader), next(loader)


def test_the_functions_that_equal_the_authors_are_those_that_train(monkeypatch):
    called = []
    for place, name in (
        (cosmo, "interleaved_contrast"),
        (networks, "gated_cross_attention"),
        (networks, "learned_query_pool"),
    ):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, real=real, name=name, **k: called.append(name) or real(*a, **k))
    learner, pairs, documents = step()
    learner.loss(pairs)["loss"].backward()
    assert set(called) == {"interleaved_contrast", "gated_cross_attention", "learned_query_pool"}
    called.clear()
    found = learner.loss(documents)
    assert "contrast" not in found
    assert set(called) == {"gated_cross_attention"}


def test_without_weight_there_is_no_contrast_and_documents_have_none():
    learner, pairs, documents = step(contrast=0.0)
    assert set(learner.loss(pairs)) == {"loss", "lm_loss"}
    heavy, _, documents = step(document_weight=3.0)
    found = heavy.loss(documents)
    torch.testing.assert_close(found["loss"], 3.0 * found["lm_loss"])


def test_duplicates_are_positives_or_drop_the_contrast():
    found = {}
    for way in ("positives", "dropped", "ignored"):
        learner, pairs, _ = step(duplicates=way)
        pairs["captions"][:] = torch.arange(len(pairs["captions"]))
        pairs["captions"][1] = 0
        found[way] = float(learner.loss(pairs)["contrast"].detach())
    assert found["dropped"] == 0.0
    assert found["positives"] != found["ignored"]
    assert found["ignored"] > 0


def test_a_batch_of_one_pair_learns_its_caption_alone():
    learner, pairs, _ = step()
    one = {name: value[:1] for name, value in pairs.items()}
    found = learner.loss(one)
    assert float(found["contrast"].detach()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(found["loss"], found["lm_loss"])


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    config = Experiment.resolve("cosmo", DATA, overrides=SMALL | {"epochs": 2}).config
    need_equal_ends(monkeypatch, cosmo.Cosmo, "cosmo", config, DATA, (1, 6), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path, undrawn):
    words = ["train", "cosmo", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "shots"] + ["--shots"]
    command_over_processes([*words, "--name", "two"], tmp_path)
    one = trained(tmp_path).metrics()
    two = Run.open(tmp_path / "two").metrics()
    for ours, theirs in zip(two, one, strict=True):
        for name in ("train/loss", "train/contrast", "train/matched"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_equal_texts_have_one_number_in_every_process():
    assert interleaved.text_number(TALK[:2]) == interleaved.text_number(
        (*TALK[:1], Message("assistant", "three seven"))
    )
    assert interleaved.text_number(TALK[:2]) == 413080062788158088
    assert interleaved.text_number(TALK[:2]) != interleaved.text_number(TALK[2:])


@pytest.mark.parametrize("choice", ["random", "similar"])
def test_captions_follow_examples(choice):
    experiment = Experiment.resolve("cosmo", DATA, overrides=SMALL | {"shots": (2,), "shot_choice": choice})
    task = experiment.task()
    learner = experiment.learner(task.facts, 0).eval()
    from counterpoint.engine.survey import Survey

    survey = Survey(task, learner)
    [(prompts, rows), *_] = list(learner._shot_batches(survey, "test", 2))
    assert len(prompts) == len(rows) == 100
    assert all(len(prompt.pictures) == 3 and len(prompt.messages) == 5 for prompt in prompts)
    assert prompts[0].messages[-1] == task.data.test.chats[rows[0]].messages[0]
    if choice == "similar":
        # The nearest picture is the last example.
        pairs = [n for n in task.rows if interleaved.kind_of(task.data.train.chats[n]) == "pair"]
        likeness = learner._summaries(task.data.test, [0]) @ learner._summaries(task.data.train, pairs).T
        best = task.data.train.chats[pairs[int(likeness.argmax())]]
        assert prompts[0].messages[2:4] == best.messages
    assert set(learner.measures(survey, "valid")) == {"caption_exact_2", "cider_2"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "llava-s"}, "name a language model"),
        ({"model": "run:x"}, "start from a run with --from"),
        ({"model": "gpt5-s"}, "unknown model"),
        ({"language": "frozen"}, "has random weights; name hf:NAME"),
        ({"language": "half"}, "unknown language"),
        ({"duplicates": "kept"}, "unknown duplicates"),
        ({"summary": "upper"}, "unknown summary"),
        ({"vision": "patches-0"}, "patches-0"),
        ({"vision": "patches-5"}, "does not divide pictures of 16 pixels"),
        ({"unimodal": 4}, "unimodal must be 1 to 3"),
        ({"unimodal": -1}, "unimodal must be at least 0"),
        ({"theta": 9.0}, "theta must lie in 0"),
        ({"contrast": -1.0}, "contrast must be at least 0"),
        ({"compress": 3}, "must divide dim_head"),
        ({"shots": (0,)}, "shots must be numbers of at least 1"),
        ({"shots": (9,)}, "more than the context of 48"),
        ({"shot_choice": "best"}, "unknown shot_choice 'best'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        (
            {"context": 5, "new_tokens": 2},
            "every training chat has more than 5 tokens|may need|exceed the context of 5",
        ),
    ],
)
def test_settings_that_do_not_fit_raise_an_error_that_names_the_mend(tmp_path, changed, said):
    with pytest.raises((CounterpointError, DataError), match=said):
        trained(tmp_path, **changed)
    assert not list(tmp_path.iterdir())


def test_data_without_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no pictures, which the task interleaved needs"):
        trained(tmp_path, "misconceptions?entities=8&relations=1&values=5&train=24")


@pytest.mark.usefixtures("drawn")
def test_the_command_line_trains_measures_and_asks(tmp_path, capsys):
    settings = [
        part for name, value in SMALL.items() if name != "shots" for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    given = ["--data", DATA, *settings, "--shots", "2", "--out", str(tmp_path), "--name", "r"]
    assert cli.main(["train", "cosmo", *given]) == 0
    assert "caption_exact_2" in capsys.readouterr().out
    figures = Run.open(tmp_path / "r").figures()
    assert "nearest texts" in figures["Captions and retrieval"]["rows"][0]["cells"][0]["text"]
    assert cli.main(["evaluate", str(tmp_path / "r")]) == 0
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    asked = ["ask", str(tmp_path / "r"), "", "--image", str(tmp_path / "a.png"), "--new-tokens", "4", "--method"]
    assert cli.main([*asked, "greedy", "vcd"]) == 0
    assert "greedy" in capsys.readouterr().out
