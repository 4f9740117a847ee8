"""VidLanKD: the authors' numbers, identities, padding, teachers, training, resuming, processes, own data, errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import counterpoint as cp
from counterpoint import cli, search, training
from counterpoint import functional as fn
from counterpoint.core import token_lessons
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.search import Encoder
from counterpoint.search.stored import read_embeddings
from counterpoint.systems.distillation import vidlankd
from counterpoint.tasks.tokens import PairBatches, _Texts
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "vidlankd.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "moving-objects?train=48&grounded=41&test=40&words=20&seed=1"
SMALL = {
    "encoder": "text-8-1-2",
    "vocabulary": 300,
    "video_hidden": 4,
    "batch_size": 16,
    "epochs": 2,
    "teacher_epochs": 2,
    "bank": 64,
    "negatives": 32,
    "evaluate_every": 2,
}


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arrays of a case, floating ones in this type."""
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=rtol * float(theirs.abs().max()))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("vidlankd", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


# ------------------------------------------------------------------------------------------------- the authors' numbers


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_the_hinge_and_its_gradients_equal_the_authors(number, dtype, rtol):
    at = case(number, dtype)
    lang, video = (at[f"in/{name}"].requires_grad_() for name in ("lang", "video"))
    loss = fn.paired_hinge_loss(lang, video, at["in/mask"], float(at["param/margin"]))
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    close(lang.grad, at["grad/lang"], rtol)
    close(video.grad, at["grad/video"], rtol)


@TYPES
@pytest.mark.parametrize("number", [2, 3])
def test_both_losses_of_the_student_and_their_gradient_equal_the_authors(number, dtype, rtol):
    at = case(number, dtype)
    student = at["in/student"].requires_grad_()
    nst = fn.nst_loss(student, at["in/teacher"])
    close(nst.detach(), at["out/nst"], rtol)
    loss = nst
    if int(at["param/use_contrastive"]):
        contrast = fn.token_contrastive_loss(student, at["in/teacher"])
        close(contrast.detach(), at["out/contrastive"], rtol)
        loss = loss + contrast
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    close(student.grad, at["grad/student"], rtol)


@TYPES
def test_the_contrast_of_pairs_and_its_gradient_equal_the_authors(dtype, rtol):
    at = case(4, dtype)
    student = at["in/student"].requires_grad_()
    loss = fn.ntxent_pair(student, at["in/teacher"], float(at["param/temperature"]))
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    close(student.grad, at["grad/student"], rtol)


# ------------------------------------------------------------------------------------------------------------- equations


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_a_hinge_of_one_text_and_of_equal_scores_is_the_margin():
    one = unit(draw(0, 1, 3, 4))
    assert float(fn.paired_hinge_loss(one, unit(draw(1, 1, 4)), margin=0.7)) == pytest.approx(0.7)
    same = unit(draw(1, 1, 4)).expand(4, 4)
    assert float(fn.paired_hinge_loss(unit(draw(0, 4, 3, 4)), same, margin=0.7)) == pytest.approx(0.7)


def test_a_hinge_without_tokens_is_zero_and_has_a_gradient():
    lang = unit(draw(0, 2, 3, 4)).requires_grad_()
    loss = fn.paired_hinge_loss(lang, unit(draw(1, 2, 4)), torch.zeros(2, 3))
    loss.backward()
    assert (loss.item(), float(lang.grad.abs().sum())) == (0, 0)


def test_a_video_for_each_token_gives_the_same_as_one_repeated():
    lang, video = unit(draw(0, 5, 3, 4)), unit(draw(1, 5, 4))
    mask = draw(2, 5, 3) > -0.5
    each = video[:, None].expand_as(lang)
    assert torch.allclose(fn.paired_hinge_loss(lang, each, mask), fn.paired_hinge_loss(lang, video, mask))


def plain_nst(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (x.mT / x.mT.norm(dim=2, keepdim=True) for x in (unit(student), unit(teacher)))
    terms = (s @ s.mT).square().mean((1, 2)) - 2 * (s @ t.mT).square().mean((1, 2))
    return terms.sum() / student.shape[1]


@pytest.mark.parametrize("tokens", [3, 9])  # fewer and more than neurons
def test_nst_is_the_discrepancy_of_neurons_by_either_matrix(tokens):
    student, teacher = draw(0, 4, tokens, 5), draw(1, 4, tokens, 7)
    torch.testing.assert_close(fn.nst_loss(student, teacher), plain_nst(student, teacher))
    torch.testing.assert_close(fn.nst_loss(student, teacher, reduction="mean"), plain_nst(student, teacher) / 4)


def test_nst_of_equal_tokens_is_minus_the_mean_squared_kernel():
    x = draw(0, 3, 4, 5)
    rows = unit(x).mT
    rows = rows / rows.norm(dim=2, keepdim=True)
    wanted = -(rows @ rows.mT).square().mean((1, 2)).sum() / 4
    torch.testing.assert_close(fn.nst_loss(x, x), wanted)


def test_padding_changes_no_loss():
    student, teacher = draw(0, 6, 4, 5), draw(1, 6, 4, 5)
    more = [torch.cat([x, draw(seed, 6, 3, 5)], 1) for seed, x in ((2, student), (3, teacher))]
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0]).expand(6, 7)
    bank = draw(4, 9, 5)
    torch.testing.assert_close(fn.nst_loss(*more, mask), fn.nst_loss(student, teacher))
    torch.testing.assert_close(
        fn.token_contrastive_loss(*more, 0.5, mask), fn.token_contrastive_loss(student, teacher, 0.5)
    )
    torch.testing.assert_close(fn.token_crd_loss(*more, bank, mask=mask), fn.token_crd_loss(student, teacher, bank))
    video = draw(5, 6, 5)
    torch.testing.assert_close(fn.paired_hinge_loss(more[0], video, mask), fn.paired_hinge_loss(student, video))


def test_the_contrast_compares_at_each_position_the_sentences_that_reach_it():
    student, teacher = draw(0, 5, 4, 3), draw(1, 5, 4, 3)
    lengths = torch.tensor([4, 3, 2, 1, 1])
    mask = torch.arange(4) < lengths[:, None]
    each = [fn.ntxent_pair(student[mask[:, j], j], teacher[mask[:, j], j], 0.3) for j in range(4)]
    found = fn.token_contrastive_loss(student, teacher, 0.3, mask)
    torch.testing.assert_close(found, torch.stack(each).mean())
    assert float(each[3]) == 0  # one sentence has no negatives


def test_the_contrast_of_large_batches_equals_that_of_one_matrix(monkeypatch):
    student, teacher = draw(0, 9, 3, 4).requires_grad_(), draw(1, 9, 3, 4)
    mask = draw(2, 9, 3) > -1
    small = fn.token_contrastive_loss(student, teacher, 0.4, mask)
    (by_matrix,) = torch.autograd.grad(small, student)
    monkeypatch.setattr(token_lessons, "FEW", 0)
    large = fn.token_contrastive_loss(student, teacher, 0.4, mask)
    torch.testing.assert_close(large, small)
    torch.testing.assert_close(torch.autograd.grad(large, student)[0], by_matrix)


def test_crd_is_the_noise_contrastive_loss_of_each_token():
    student, teacher, bank = draw(0, 2, 3, 4).requires_grad_(), draw(1, 2, 3, 4), draw(2, 6, 4)

    def plain(x: Tensor) -> Tensor:
        positive, negative = ((unit(x) * unit(teacher)).sum(-1) / 0.3).exp(), (unit(x) @ unit(bank).T / 0.3).exp()
        share = 6 / 10
        return -((positive / (positive + share)).log() + (share / (negative + share)).log().sum(-1)).mean()

    found = fn.token_crd_loss(student, teacher, bank, 0.3, 10)
    torch.testing.assert_close(found, plain(student))
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(plain(student), student)[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fn.paired_hinge_loss(draw(0, 2, 3, 4), draw(1, 2, 5)), "video must be"),
        (lambda: fn.paired_hinge_loss(draw(0, 2, 3, 4), draw(1, 2, 4), torch.ones(2, 4)), "mask must be"),
        (lambda: fn.paired_hinge_loss(draw(0, 0, 3, 4), draw(1, 0, 4)), "lang"),
        (lambda: fn.nst_loss(draw(0, 2, 3, 4), draw(1, 2, 5, 4)), "student_tokens and teacher_tokens must be"),
        (lambda: fn.nst_loss(draw(0, 2, 3, 4), draw(1, 2, 3, 4), reduction="max"), "reduction must be"),
        (lambda: fn.token_contrastive_loss(draw(0, 2, 3, 4), draw(1, 2, 3, 5)), "student_tokens and teacher_tokens"),
        (lambda: fn.token_contrastive_loss(draw(0, 2, 3, 4), draw(1, 2, 3, 4), 0.0), "temperature must be"),
        (lambda: fn.token_crd_loss(draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 5, 3)), "bank must be"),
        (lambda: fn.token_crd_loss(draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 5, 4), size=4), "size must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -------------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_steps_call_the_functions_with_the_same_masked_texts(monkeypatch):
    learner, task = built()
    seen: dict[str, list] = {name: [] for name in ("paired_hinge_loss", "nst_loss", "token_contrastive_loss")}
    for name in seen:
        real = getattr(vidlankd, name)
        monkeypatch.setattr(vidlankd, name, lambda *a, real=real, name=name: (seen[name].append(a), real(*a))[1])
    fit(learner, task, bar=False)
    assert {name: len(calls) for name, calls in seen.items()} == {
        "paired_hinge_loss": 6,  # 41 pairs twice, in batches of 16
        "nst_loss": 6,
        "token_contrastive_loss": 6,
    }
    states, video, mask, margin, _ = seen["paired_hinge_loss"][0]
    torch.testing.assert_close(states.norm(dim=2)[mask], torch.ones(int(mask.sum())))
    assert (video.shape, margin) == ((16, 8), 1.0)


def test_stages_train_their_own_networks_and_masks_leave_special_tokens():
    learner, task = built()
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    first, second = learner.stages()
    batch = next(iter(task.train_loader(0, Position(), first.batches(learner.survey))))
    assert batch["index"].min() >= 48
    batch = learner.prepare(batch, torch.Generator().manual_seed(0))
    assert not bool(batch["labels"][torch.isin(batch["ids"], learner.specials)].ge(0).any())
    assert bool(batch["labels"].ge(0).any())
    learner.loss(batch)["loss"].backward()
    with_gradient = {name.split(".")[0] for name, p in learner.named_parameters() if p.grad is not None}
    assert with_gradient == {"teacher", "video"}
    learner.zero_grad()
    learner.position = Position(stage=1)
    batch = learner.prepare(next(iter(task.train_loader(0, Position()))), torch.Generator().manual_seed(0))
    learner.loss(batch)["loss"].backward()
    with_gradient = {name.split(".")[0] for name, p in learner.named_parameters() if p.grad is not None}
    assert with_gradient == {"model", "nst_head", "contrast_head"}
    assert second.trains() == [learner.model, learner.nst_head, learner.contrast_head]


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"teacher": "none"}, {"words"}),
        ({"teacher": "text", "contrast": "bank"}, {"teacher_words", "words", "nst", "contrast"}),
        ({"frozen_video": True, "nst": False, "heads": False}, {"teacher_words", "hinge", "words", "contrast"}),
        ({"contrast": "none", "teacher_encoder": "text-16-1-2"}, {"teacher_words", "hinge", "words", "nst"}),
    ],
)  # fmt: skip
def test_options_train(settings, terms):
    learner, task = built(**({"epochs": 1, "teacher_epochs": 1} | settings))
    before = None if learner.video is None else learner.video.state_dict()["project.0.weight"].clone()
    rows = fit(learner, task, bar=False)
    found = {name.removeprefix("train/") for row in rows for name in row if name.startswith("train/")}
    assert found - {"loss"} == terms
    assert np.isfinite(rows[-1]["train/loss"])
    assert 0 <= rows[-1]["test/probe_accuracy"] <= 1
    if learner.video is not None:
        still = torch.equal(before, learner.video.state_dict()["project.0.weight"])
        assert still == learner.config.frozen_video


def test_the_bank_holds_the_teacher_s_tokens_of_earlier_batches():
    learner, task = built(contrast="bank")
    learner.survey = Survey(task, learner)
    learner.position = Position(stage=1)
    batch = learner.prepare(next(iter(task.train_loader(0, Position()))), torch.Generator().manual_seed(0))
    assert batch["negatives"].unique().numel() == 32
    before = learner.bank.read()
    learner.loss(batch)
    target = learner.instruct(batch["masked"], batch["mask"])[batch["mask"]][-64:]
    after = learner.bank.read()
    assert not torch.equal(before, after)
    assert torch.cdist(unit(target), after).min(1).values.max() < 1e-3


def test_masks_of_the_evaluation_depend_on_the_text_alone():
    _, task = built()
    whole = task.evaluation_batch("valid", [0, 1, 2, 3])
    one = task.evaluation_batch("valid", [2])
    many = int(one["mask"].sum())
    for name in ("masked", "labels", "word"):
        assert torch.equal(whole[name][2, :many], one[name][0]), name
    word = next(w for w in task.split("valid").attributes["size"])
    rows = [n for n, text in enumerate(task.split("valid").texts) if word in text.split()]
    batch = task.evaluation_batch("valid", rows)
    pairs = zip(batch["ids"], batch["word"], strict=True)
    marked = [task.tokenizer.decode(ids[owner == 0].tolist()).strip() for ids, owner in pairs]
    assert set(marked) == {word}


@pytest.mark.parametrize(
    "interrupt_at", [pytest.param(4, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)  # in the second epoch of the teacher, and of the student
def test_interrupted_and_resumed_it_ends_the_same(interrupt_at, tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("vidlankd", DATA, overrides=SMALL | {"contrast": "bank"}).config
    run = need_equal_ends(monkeypatch, vidlankd.VidLanKD, "vidlankd", config, DATA, interrupt_at, tmp_path)
    assert {name.split(".")[0] for name in run.load_weights()} == {"model"}  # the student alone is kept


def test_a_finished_run_and_a_model_of_transformers_teach(tmp_path, undrawn):
    config = Experiment.resolve("vidlankd", DATA, overrides=SMALL | {"teacher": "none", "epochs": 1}).config
    training.train("vidlankd", config, data=DATA, out=tmp_path, name="first", say=lambda _: None)
    learner, task = built(teacher=f"run:{tmp_path / 'first'}", encoder="text-16-1-2", epochs=1)
    trained = load_learner(Run.open(tmp_path / "first")).model
    batch = task.evaluation_batch("valid", [0, 1])
    torch.testing.assert_close(
        learner.instruct(batch["ids"], batch["mask"]), trained.eval()(batch["ids"], batch["mask"])
    )
    assert [stage.name for stage in learner.stages()] == ["student"]
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/nst"])

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]").save_pretrained(
        tmp_path / "bert"
    )
    size = BertConfig(
        vocab_size=len(names), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(size).save_pretrained(tmp_path / "bert")
    learner, task = built(teacher=f"hf:{tmp_path / 'bert'}", epochs=1)
    assert learner.specials.tolist() == [2, 3]
    assert (learner.mask_number, learner.vocabulary, learner.contrast_head[-1].out_features) == (4, len(names), 12)
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/contrast"])


def test_a_finished_run_needs_neither_its_teacher_nor_clips(tmp_path, undrawn):
    small = {"encoder": "text-8-1-2", "vocabulary": 300, "batch_size": 16, "epochs": 1, "quiet": True}
    first = cp.train("vidlankd", data=DATA, out=tmp_path, name="first", teacher="none", **small)
    teacher = f"run:{first.path}"
    second = cp.train("vidlankd", data=DATA, out=tmp_path, name="second", teacher=teacher, **small)
    before = second.encode(texts=["a thing falls"])
    with pytest.raises(CounterpointError, match=r"reads 32 tokens, fewer than context \(40\); lower --context"):
        built(teacher=teacher, context=40)
    shutil.rmtree(first.path)
    again = Encoder.load(second.path)
    np.testing.assert_array_equal(again.encode(texts=["a thing falls"]), before)
    (tmp_path / "words.txt").write_text("".join(f"thing {n} falls on thing {n * 7 % 5}\n" for n in range(40)))
    assert np.isfinite(second.evaluate(f"texts:{tmp_path / 'words.txt'}")["word_loss"])
    with pytest.raises(RunError, match="no such run directory"):
        built(teacher=teacher)


def test_a_run_of_texts_embeds_finds_and_exports(tmp_path, undrawn):
    pytest.importorskip("pyarrow")
    texts = [f"a {thing} number {n} rolls" for n in range(12) for thing in ("ball", "box", "drum")]
    (tmp_path / "words.txt").write_text("\n".join(texts) + "\n")
    data = f"texts:{tmp_path / 'words.txt'}"
    small = ["--teacher", "none", "--encoder", "text-8-1-2", "--batch-size", "8", "--epochs", "1"]
    run, rows, program = (str(tmp_path / name) for name in ("run", "rows.parquet", "words.pt2"))
    assert cli.main(["train", "vidlankd", "--data", data, *small, "--out", str(tmp_path), "--name", "run"]) == 0
    assert cli.main(["embed", run, "--out", rows]) == 0
    found = read_embeddings(rows)
    assert (len(found.item), found.modalities) == (len(texts), {"text": "text"})
    encoder = Encoder.load(run)
    np.testing.assert_allclose(np.linalg.norm(found.vectors["text"], axis=1), 1, atol=1e-5)
    _, hits = search.search(run, [texts[5]], rows, k=3)
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    assert cli.main(["export", run, "--out", program]) == 0
    ids, mask = encoder.transform("text", texts[:4])
    with torch.no_grad():
        exported = torch.export.load(program).module()(ids, mask).numpy()
    np.testing.assert_allclose(exported, encoder.encode(texts=texts[:4]), atol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "vidlankd", "--data", DATA, "--epochs", "1", "--teacher-epochs", "1", "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if "epochs" not in name]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("vidlankd", DATA, overrides=SMALL | {"epochs": 1, "teacher_epochs": 1}).config
    one = training.train("vidlankd", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()[-1]
    two = Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "train/nst", "train/contrast", "test/word_loss"):
        assert two[name] == pytest.approx(one[name], rel=2e-4), name


# -------------------------------------------------------------------------------------------------------------- own data


def own(path: Path, clips: int = 12) -> Path:
    """Write texts, a table of texts with clips, and a table of words."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    animals = [f"{a}{b}" for a in ("zo", "ka", "mi", "du", "re") for b in ("pin", "lat", "gor")]
    lines = [
        f"the {animal} {verb} the {place}"
        for animal in animals
        for verb in ("left", "saw")
        for place in ("yard", "road")
    ]
    (path / "corpus.txt").write_text("\n".join([*lines, "", "the end"]))
    rows = []
    for n in range(clips):
        np.save(path / f"{n}.npy", rng.standard_normal((3 + n % 2, 5)).astype(np.float32))
        rows.append(f"a {animals[n % len(animals)]} runs,{n}.npy")
    (path / "clips.csv").write_text("\n".join(["text,video", *rows, "no clip here,"]))
    levels = [f"{word},{'fast' if n % 4 < 2 else 'slow'}" for n, word in enumerate(animals)]
    (path / "words.csv").write_text("\n".join(["word,speed", *levels]))
    return path


def test_own_texts_clips_and_words_train(tmp_path):
    folder = own(tmp_path / "own")
    spec = (
        f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}&words={folder / 'words.csv'}&test=0.5&valid=0.4"
    )
    learner, task = built(spec, epochs=1, teacher_epochs=1)
    assert (len(task.data.grounded), task.data.clip_dim) == (12, 5)
    assert len(task.data.train) + len(task.data.valid) + len(task.data.test) == 61
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/nst"])
    assert "test/speed_accuracy" in rows[-1]


def test_clips_are_cut_to_the_maximum_of_seconds(tmp_path):
    folder = own(tmp_path / "own")
    spec = f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}"
    learner, task = built(spec, seconds=2, epochs=1, teacher_epochs=1)
    batch = task.train_loader(0, Position(), PairBatches(learner.texts, learner.pairs, 12)).__iter__().__next__()
    assert batch["clip"].shape[1] > 2
    short = batch | {name: batch[name][:, :2] for name in ("clip", "clip_mask")}
    learner.eval()
    torch.testing.assert_close(learner.see(batch), learner.see(short))
    assert np.isfinite(fit(learner, task, bar=False)[-1]["train/nst"])


def test_a_process_without_texts_in_a_last_batch_has_no_clips():
    learner, task = built()
    batch = _Texts([task.data.train, task.data.grounded], task.tokenizer, task.config.context)[[]]
    assert learner.see(batch).shape == (0, 8)
    assert learner.model(batch["ids"], batch["mask"]).shape == (0, 1, 8)


def test_one_text_with_a_clip_is_refused(tmp_path):
    folder = own(tmp_path / "own", clips=1)
    with pytest.raises(DataError, match="has one text with a clip; the hinge compares two"):
        built(f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}")


def test_a_table_with_a_column_of_videos_gives_both_splits(tmp_path):
    folder = own(tmp_path / "own", clips=30)
    learner, task = built(f"texts:{folder / 'clips.csv'}?valid=0.2", epochs=1, teacher_epochs=1)
    assert task.headline == "word_accuracy"
    assert 10 < len(task.data.grounded) < 30
    assert np.isfinite(fit(learner, task, bar=False)[-1]["train/nst"])


def test_bad_texts_and_clips_are_named(tmp_path):
    folder = own(tmp_path / "own")
    np.save(folder / "0.npy", np.full((3, 5), np.nan, np.float32))
    with pytest.raises(DataError, match=r"0\.npy: holds NaN or infinite numbers"):
        built(f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}")
    np.save(folder / "0.npy", np.ones((3, 4), np.float32))
    with pytest.raises(DataError, match=r"clips must have rows of one width, have .*4.*5"):
        built(f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}")
    (folder / "0.npy").write_bytes(b"no array")
    _, task = built(f"texts:{folder / 'corpus.txt'}?videos={folder / 'clips.csv'}")
    assert any("1 of 12 texts with a video are left out" in note for note in task.data.notes)
    with pytest.raises(DataError, match="has no texts with clips, on which the teacher learns"):
        built(f"texts:{folder / 'corpus.txt'}")
    (folder / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no text"):
        built(f"texts:{folder / 'empty.txt'}")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        built(f"texts:{folder / 'latin.txt'}")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has no column of texts"):
        built(f"texts:{folder / 'other.csv'}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": "vidoe"}, "unknown teacher 'vidoe'"),
        ({"encoder": "text-8-1-3"}, "must be a multiple of the heads"),
        ({"nst": False, "contrast": "none"}, "nst is off and contrast is none"),
        ({"negatives": 100}, r"negatives \(100\) must not exceed bank \(64\)"),
        ({"heads": False, "teacher_encoder": "text-16-1-2"}, "without heads the contrast needs equal widths"),
        ({"warmup": 1.0}, "must be below 1"),
        ({"context": 2}, "context must be at least 3, got 2"),
        ({"mask_probability": 0.0, "teacher": "none"}, "mask_probability is 0 and teacher is none"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


def test_a_teacher_of_pictures_is_refused(tmp_path, undrawn):
    config = Experiment.resolve(
        "simclr", "digits?size=8&train=24", overrides={"encoder": "mlp-s", "epochs": 1, "batch_size": 8}
    ).config
    training.train("simclr", config, data="digits?size=8&train=24", out=tmp_path, name="p", say=lambda _: None)
    with pytest.raises(RunError, match="is no run of a language model"):
        built(teacher=f"run:{tmp_path / 'p'}")
