"""SupCon-T2I: the numbers of AttnGAN's code, identities, both phases and backbones, resuming, processes, data, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import data as sources
from counterpoint import functional as fn
from counterpoint import training
from counterpoint.cli import main
from counterpoint.core.adversarial import conditional_discriminator, gradient_penalty, hinge_discriminator
from counterpoint.core.damsm import word_scores
from counterpoint.data.generation import Condition
from counterpoint.encoders.generators import build_generator
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.generation import supcon_t2i as room
from counterpoint.tasks import adversarial
from counterpoint.tasks.generation import signed
from counterpoint.tasks.measures import generation as measures
from counterpoint.use.generate import generate
from interrupted import need_equal_ends
from launch import command_over_processes
from pretend_gpu import pretend_gpu

PARITY = np.load(Path(__file__).parents[1] / "parity" / "supcon-t2i.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
BACKBONES = pytest.mark.parametrize("backbone", ["galip-s", "attngan-s"])
DATA = "digit-scenes?train=32&test=24&names=1"
SMALL = {
    "embedding": 8,
    "width": 8,
    "noise": 4,
    "batch_size": 8,
    "pretrain_batch_size": 8,
    "pretrain_epochs": 1,
    "epochs": 1,
    "evaluate_every": 5,
    "encoder": "conv-group",
}


@pytest.fixture(autouse=True)
def quick_judges(monkeypatch):
    """Train judges for one pass."""
    monkeypatch.setattr(measures, "PASSES", 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(case: str, name: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(PARITY[f"{case}/{name}"]).to(dtype)


def close(found: Tensor, wanted: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_the_sentence_loss_and_its_gradients_equal_those_of_attngan(number, dtype, rtol):
    case = f"damsm_sentence/case{number}"
    leaves = [stored(case, f"in/{name}", dtype).requires_grad_() for name in ("image", "sentence")]
    masked = int(PARITY[f"{case}/param/mask_same_class"])
    known = torch.from_numpy(PARITY[f"{case}/in/class_ids"]) if masked else None
    found = fn.damsm_sentence(*leaves, float(PARITY[f"{case}/param/gamma3"]), known)
    sum(found).backward()
    for name in ("image_to_text", "text_to_image"):
        close(getattr(found, name).detach(), stored(case, f"out/{name}", dtype), rtol)
    for name, leaf in zip(("image", "sentence"), leaves, strict=True):
        close(leaf.grad, stored(case, f"grad/{name}", dtype), rtol)


@TYPES
def test_the_word_loss_its_attention_and_gradient_equal_those_of_attngan(dtype, rtol):
    case = "damsm_words/case0"
    regions = stored(case, "in/regions", dtype).requires_grad_()
    words = stored(case, "in/words", dtype)
    lengths, known = (torch.from_numpy(PARITY[f"{case}/in/{name}"]) for name in ("lengths", "class_ids"))
    gammas = tuple(float(PARITY[f"{case}/param/gamma{n}"]) for n in (1, 2, 3))
    found = fn.damsm_words(regions, words, lengths, gammas, known)
    sum(found).backward()
    for name in ("image_to_text", "text_to_image"):
        close(getattr(found, name).detach(), stored(case, f"out/{name}", dtype), rtol)
    close(regions.grad, stored(case, "grad/regions", dtype), rtol)
    attention = word_scores(regions.flatten(2), words, lengths, *gammas[:2]).attention[0, 0, : lengths[0]]
    close(attention.detach().view(-1, *regions.shape[2:]), stored(case, "out/attention0", dtype), rtol)


def test_words_beyond_the_length_change_nothing():
    regions, words, lengths = draw(0, 3, 4, 5), draw(1, 3, 4, 6), torch.tensor([2, 6, 1])
    other = words.clone()
    other[0, :, 2:], other[2, :, 1:] = 7.0, -3.0
    for one, same in zip(fn.damsm_words(regions, words, lengths), fn.damsm_words(regions, other, lengths), strict=True):
        torch.testing.assert_close(one, same)


def test_a_batch_of_one_class_has_no_negatives_and_pairs_without_a_class_have_all():
    image, sentence = draw(0, 4, 5).requires_grad_(), draw(1, 4, 5)
    found = fn.damsm_sentence(image, sentence, 10.0, torch.zeros(4, dtype=torch.int64))
    sum(found).backward()
    assert [float(x.detach()) for x in found] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert float(image.grad.abs().max()) == pytest.approx(0.0, abs=1e-12)
    unknown = fn.damsm_sentence(image, sentence, 10.0, torch.full((4,), -1))
    for one, wanted in zip(unknown, fn.damsm_sentence(image, sentence, 10.0), strict=True):
        torch.testing.assert_close(one, wanted)


def by_definition(anchors, candidates, labels_a, labels_c, tau, exclude_self):
    s = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / tau
    seen = torch.ones_like(s, dtype=torch.bool).triu(1) | torch.ones_like(s, dtype=torch.bool).tril(-1)
    seen = seen if exclude_self else torch.ones_like(seen)
    positives = seen & (labels_a[:, None] == labels_c)
    log_p = s - s.masked_fill(~seen, -math.inf).logsumexp(1, keepdim=True)
    many = positives.sum(1)
    losses = -(log_p * positives).sum(1) / many.clamp(min=1)
    return losses[many > 0].mean()


@pytest.mark.parametrize(
    ("n", "m", "same"), [(7, 7, False), (7, 7, True), (5, 9, False), (700, 700, False), (700, 700, True)]
)
@pytest.mark.parametrize("few", [0, 256**2])  # by the kernel, and by the whole matrix
def test_the_label_guided_contrast_follows_its_definition(n, m, same, few, monkeypatch):
    monkeypatch.setattr(room, "FEW", few)
    anchors, candidates = draw(0, n, 4).requires_grad_(), draw(1, m, 4).requires_grad_()
    labels_a, labels_c = torch.arange(n) % 4, torch.arange(m) * 2 % 6
    both = (anchors, anchors, labels_a, labels_a) if same else (anchors, candidates, labels_a, labels_c)
    found, wanted = fn.label_guided_contrast(*both, 0.3, same), by_definition(*both, 0.3, same)
    torch.testing.assert_close(found, wanted)
    leaves = [anchors] if same else [anchors, candidates]
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_distinct_labels_give_the_cross_entropy_of_the_sentence_matrix():
    x, z, labels = draw(0, 6, 5), draw(1, 6, 5), torch.arange(6)
    found = fn.label_guided_contrast(x, z, labels, labels, 0.1)
    torch.testing.assert_close(found, fn.damsm_sentence(x, z, 10.0).image_to_text)


def test_one_class_of_equal_rows_gives_the_logarithm_of_the_number_of_candidates():
    x, labels = torch.ones(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    assert fn.label_guided_contrast(x, x.clone(), labels, labels).item() == pytest.approx(math.log(6))
    assert fn.label_guided_contrast(x, x, labels, labels, 0.1, True).item() == pytest.approx(math.log(5))


def test_three_orthonormal_classes_of_two_have_the_floor_of_the_card():
    x, labels = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0), torch.arange(3).repeat_interleave(2)
    found = fn.label_guided_contrast(x, x, labels, labels, 0.5, True)
    assert found.item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))


def test_without_any_positive_the_loss_is_zero():
    x = draw(0, 3, 4).requires_grad_()
    found = fn.label_guided_contrast(x, x, torch.arange(3), torch.arange(3), 0.1, True)
    assert found.item() == 0.0
    assert torch.autograd.grad(found, x)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, y: fn.label_guided_contrast(x, x[:, :2], y, y), "anchors and candidates must be"),
        (lambda x, y: fn.label_guided_contrast(x, x, y[:2], y), r"labels_a must be \[4\]"),
        (
            lambda x, y: fn.label_guided_contrast(x, x[:3], y, y[:3], 0.1, True),
            "exclude_self needs candidates like anchors",
        ),
        (lambda x, y: fn.label_guided_contrast(x, x, y, y, 0.0), "temperature must be positive"),
        (lambda x, y: fn.label_guided_contrast(x[:0], x, y[:0], y), "empty batch"),
        (lambda x, y: fn.damsm_sentence(x, x[:3], 1.0), "image and sentence must be"),
        (lambda x, y: fn.damsm_sentence(x, x, -1.0), "gamma3 must be at least 0"),
        (lambda x, y: fn.damsm_sentence(x, x, 1.0, y[:2]), r"class_ids must be \[4\]"),
        (lambda x, y: fn.damsm_words(x, x[..., None], y + 1), "regions must be"),
        (lambda x, y: fn.damsm_words(x[..., None], x[..., None], y), "lengths must be 1 to 1"),
        (lambda x, y: fn.damsm_words(x[..., None], x[..., None], y * 0 + 1, (1.0, 2.0)), "gammas must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3), torch.arange(4))


def test_the_terms_of_the_critics_follow_their_formulas():
    real, fake, wrong = draw(0, 5), draw(1, 5), draw(2, 4)
    found = hinge_discriminator(real, fake, wrong)
    others = F.relu(1 + fake).mean() + F.relu(1 + wrong).mean()
    torch.testing.assert_close(found, F.relu(1 - real).mean() + others / 2)
    parts = [draw(n, 5) for n in range(4)] + [wrong]
    signs = (1.0, 1.0, 0.0, 0.0, 0.0)
    bce = [F.binary_cross_entropy_with_logits(x, torch.full_like(x, y)) for x, y in zip(parts, signs, strict=True)]
    torch.testing.assert_close(conditional_discriminator(*parts), (bce[0] + bce[1]) / 2 + sum(bce[2:]) / 3)
    x, t = draw(3, 4, 3, 2, 2).requires_grad_(), draw(4, 4, 5).requires_grad_()
    weights = draw(5, 17).requires_grad_()
    logits = torch.tanh(torch.cat([x.flatten(1), t], 1) @ weights)
    slopes = (1 - logits.detach() ** 2) * weights.detach().norm()
    penalty = gradient_penalty(logits, [x, t])
    torch.testing.assert_close(penalty.double(), 2 * (slopes**6).mean(), rtol=1e-5, atol=0)
    assert torch.autograd.grad(penalty, weights)[0].abs().min() > 0


# ------------------------------------------------------------------------------------------------------------- the learner


def built(spec: str = DATA, seed: int = 0, **settings):
    experiment = Experiment.resolve("supcon-t2i", spec, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, seed), task


def begun(stage: int = 0, spec: str = DATA, **settings):
    """Return a learner that stands in a stage, and a prepared batch."""
    learner, task = built(spec, **settings)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.position.stage = stage
    first = learner.stages()[stage].batches(learner.survey)
    batch = learner.survey.batch("train", next(iter(first)))
    learner.train()
    return learner, learner.prepare(batch, torch.Generator().manual_seed(0))


@BACKBONES
def test_each_phase_trains_by_the_functions_that_equal_the_authors(backbone, monkeypatch):
    seen = []

    def spied(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (seen.append((learner.pretraining, name)), real(*given))[1])

    learner, task = built(backbone=backbone)
    spied(room, "label_guided_contrast")
    spied(adversarial, "damsm_sentence")
    spied(adversarial, "damsm_words")
    row = fit(learner, task, bar=False)[-1]
    first = [(True, name) for name in ("damsm_sentence", "damsm_words") * 2] + [(True, "label_guided_contrast")] * 4
    assert seen[:8] == first
    later = {name for pretraining, name in seen if not pretraining}
    assert later == {"label_guided_contrast"} | (
        {"damsm_sentence", "damsm_words"} if backbone == "attngan-s" else set()
    )
    for name in (
        "frechet_distance",
        "class_accuracy",
        "r_precision",
        "image_purity",
        "text_purity",
        "code_r_precision",
    ):
        assert math.isfinite(row[f"test/{name}"])
    assert learner.steps == 4
    assert any(
        not torch.equal(a, b) for a, b in zip(learner.average.parameters(), learner.generator.parameters(), strict=True)
    )


@pytest.mark.parametrize(("labels", "branches"), [("both", (2, 2)), ("pretraining", (2, 1)), ("none", (1, 1))])
def test_arms_see_equally_many_pictures_and_partners_share_the_class(labels, branches):
    for stage, wanted in enumerate(branches):
        learner, batch = begun(stage, labels=labels)
        assert learner.branches == wanted
        assert len(batch["image"]) == len(batch["noise"]) == 8
        assert len(learner.stages()[stage].batches(learner.survey)) == 4
        if wanted == 2:
            assert torch.equal(batch["label"][:4], batch["label"][4:])
            assert not set(batch["index"][:4].tolist()) & {
                b for a, b in zip(*batch["index"].view(2, 4).tolist(), strict=True) if a == b
            }


@BACKBONES
def test_the_losses_of_both_phases_are_the_weighted_sums_of_their_terms(backbone):
    weights = {"inter_weight": 2.0, "inner_weight": 3.0, "sup_weight": 0.5, "match_weight": 4.0}
    learner, batch = begun(0, backbone=backbone, **weights)
    label, first = batch["label"], learner.loss(batch)
    torch.testing.assert_close(first["loss"], first["damsm"] + 2 * first["inter"] + 3 * first["inner"])
    x = learner.pictures(signed(batch["image"]))[0]
    z = learner.texts(batch["ids"], batch["mask"])[0]
    crossed = by_definition(x, z, label, label, 0.1, False) + by_definition(z, x, label, label, 0.1, False)
    inner = by_definition(x, x, label, label, 0.1, True) + by_definition(z, z, label, label, 0.1, True)
    torch.testing.assert_close(first["inter"], crossed / 2)
    torch.testing.assert_close(first["inner"], inner / 2)
    learner, batch = begun(1, backbone=backbone, **weights)
    learner.critic_loss(batch)
    found = learner.loss(batch)
    torch.testing.assert_close(found["loss"], 2 * found["adversarial"] + 4 * found["match"] + 0.5 * found["sup"])


def test_shuffled_labels_are_those_of_other_pairs_in_equal_numbers():
    learner, _ = begun()
    shuffled, _ = begun(shuffle_labels=True)
    assert sorted(learner.partners.kinds) == sorted(shuffled.partners.kinds)
    assert (learner.partners.kinds != shuffled.partners.kinds).any()


def test_pairs_without_a_class_are_their_own_partners_and_a_class_of_their_own():
    learner, batch = begun(spec=f"{DATA}&unknown=1")
    assert torch.equal(batch["index"][:4], batch["index"][4:])
    assert batch["label"].tolist() == (-1 - batch["index"]).tolist()
    assert len(set(batch["label"][:4].tolist())) == 4
    assert learner.loss(batch)["loss"].isfinite()


def test_unknown_classes_are_counted_in_a_note():
    data = sources.load(f"{DATA}&unknown=0.5", task="generation")
    missing = int((data.train.labels < 0).sum())
    assert 0 < missing < 32
    at = int((data.train.labels < 0).argmax())
    assert data.notes == [
        f"digit-scenes: {missing} of 32 train captions have no known class, the first is number {at}, "
        f"'{data.train.captions[at][:40]}'; each counts as a class of its own"
    ]


@BACKBONES
def test_the_turn_of_the_generator_changes_neither_critics_nor_encoders_and_reaches_all_of_it(backbone):
    learner, batch = begun(1, backbone=backbone)
    learner.pictures.requires_grad_(False)
    learner.texts.requires_grad_(False)
    learner.critic_loss(batch)
    found = learner.generator_loss(batch)
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.generator.parameters())
    for module in (learner.critics, learner.pictures, learner.texts):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.requires_grad for p in learner.critics.parameters())
    assert found["sup"] > 0


@BACKBONES
def test_the_turn_of_the_critics_does_not_reach_the_generator(backbone):
    learner, batch = begun(1, backbone=backbone)
    learner.pictures.requires_grad_(False)
    learner.texts.requires_grad_(False)
    learner.critic_loss(batch)["critic_loss"].backward()
    assert all(p.grad is None for p in learner.generator.parameters())
    assert all(p.grad is not None for p in learner.critics.parameters())


def test_each_turn_has_its_rate_and_beta():
    learner, _ = begun(1, critic_rate=4.0, beta1=0.5, lr=0.32)
    learner.epochs = learner.steps_per_epoch = 1
    critics, generator = learner.turns()
    assert [turn.optimizers[0].param_groups[0]["lr"] for turn in (critics, generator)] == pytest.approx([0.04, 0.01])
    assert all(turn.optimizers[0].param_groups[0]["betas"] == (0.5, 0.999) for turn in (critics, generator))


def test_the_gradient_of_the_texts_is_bounded():
    learner, batch = begun(text_clip=1e-3)
    learner.epochs = learner.steps_per_epoch = 1
    (turn,) = learner.pretraining_turns()
    learner.loss(batch)["loss"].backward()
    turn.optimizers[0].step()
    norm = torch.stack([p.grad.norm() for p in learner.texts.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_batch_statistics_of_fixed_encoders_stay():
    learner, batch = begun(1, encoder="conv-cells")
    before = {name: value.clone() for name, value in learner.pictures.state_dict().items()}
    learner.critic_loss(batch)
    learner.generator_loss(batch)
    assert all(torch.equal(value, before[name]) for name, value in learner.pictures.state_dict().items())


def test_generation_depends_on_the_seed_alone_and_needs_training():
    learner, _ = built()
    with pytest.raises(CounterpointError, match="no trained generator"):
        learner.generate([Condition("a small red seven")])
    learner.steps += 1
    asked = [Condition("a small red seven"), Condition("a small red seven")]
    one, same, other = learner.generate(asked, 3), learner.generate(asked, 3), learner.generate(asked, 4)
    assert one.shape == (2, 3, 16, 16)
    assert one.dtype == torch.uint8
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    with pytest.raises(CounterpointError, match="at least one prompt"):
        learner.generate([])
    with pytest.raises(CounterpointError, match=r"'\.' has 0 words, and this learner reads 1 to 18"):
        learner.generate([Condition(".")])
    with pytest.raises(CounterpointError, match="has 19 words"):
        learner.generate([Condition("red " * 19)])
    with pytest.raises(CounterpointError, match="takes no subject; leave out --subject"):
        learner.generate([Condition("a small red seven", [np.zeros((16, 16, 3), np.uint8)])])


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("supcon-t2i", DATA, overrides=SMALL).config
    # In each stage.
    need_equal_ends(monkeypatch, room.SupConT2I, "supcon-t2i", config, DATA, (2, 6), tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    words = ["train", "supcon-t2i", "--data", DATA, "--out", str(tmp_path)]
    plain = SMALL | {"optimizer": "sgd", "lr": 0.01, "pretrain_lr": 0.1}  # Adam enlarges rounding of gradients near 0
    words += [f"--{name.replace('_', '-')}={value}" for name, value in plain.items()]
    assert main([*words, "--name", "one"]) == 0
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = (Run.open(tmp_path / name).load_weights() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------- a run, and its pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = Experiment.resolve("supcon-t2i", DATA, overrides=SMALL).config
    out = tmp_path_factory.mktemp("runs")
    return training.train("supcon-t2i", config, data=DATA, out=out, say=lambda _: None).path


@pytest.mark.usefixtures("drawn")
def test_the_page_of_a_run_shows_generated_pictures_by_caption_and_by_class(run):
    figures = json.loads((run / "figures.json").read_text())
    assert len(figures["Generated pictures"]["rows"]) == 4
    by_class = figures["Generated pictures by class"]
    assert by_class["columns"][0] == "real"
    assert 6 <= len(by_class["rows"]) <= 10
    assert len(by_class["rows"][0]) == len(by_class["columns"])


def test_the_command_writes_pictures_and_a_page_and_names_unknown_words(run, tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    words = [
        "generate",
        str(run),
        "--prompt",
        "a small red seven",
        "a huge blue one",
        "--number",
        "2",
        "--out",
        str(out),
    ]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [one["unknown"] for one in found] == [[], ["huge"]]
    assert "the run does not know huge" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "01-01.png", "01-02.png", "02-01.png", "02-02.png", "index.html",
    ]  # fmt: skip
    assert Image.open(found[0]["files"][0]).size == (16, 16)
    assert "Words that the run does not know: huge." in (out / "index.html").read_text()
    again = generate(str(run), ["a small red seven"], tmp_path / "again", number=1)
    assert np.array_equal(np.asarray(Image.open(again[0].files[0])), np.asarray(Image.open(found[0]["files"][0])))


def test_a_gpu_makes_the_processor_s_pictures(run, tmp_path, monkeypatch):
    made = {"cpu": generate(str(run), ["a small red seven"], tmp_path / "here", number=2, seed=3)}
    with pretend_gpu(monkeypatch):
        made["cuda"] = generate(str(run), ["a small red seven"], tmp_path / "there", number=2, seed=3, device="cuda")
    for here, there in zip(*(found[0].files for found in made.values()), strict=True):
        assert np.abs(np.asarray(Image.open(here), int) - np.asarray(Image.open(there), int)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"number": 0}, "number must be at least 1"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["red " * 30]}, "has 30 words"),
    ],
)
def test_prompts_that_do_not_fit_leave_nothing_behind(run, tmp_path, changes, said):
    with pytest.raises(CounterpointError, match=said):
        generate(str(run), **({"prompts": ["red"], "out": tmp_path / "x"} | changes))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_overwritten(run, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CounterpointError, match="is not an empty folder"):
        generate(str(run), ["red"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_of_another_task_generates_nothing(tmp_path, undrawn):
    config = Experiment.resolve(
        "simclr", "digits?size=8&train=24", overrides={"encoder": "mlp-s", "epochs": 1, "batch_size": 8}
    )
    run = training.train("simclr", config.config, data="digits?size=8&train=24", out=tmp_path, say=lambda _: None)
    with pytest.raises(RunError, match="generates no pictures"):
        generate(str(run.path), ["red"], tmp_path / "x")


def test_a_finished_run_is_loaded_with_its_words(run):
    learner = load_learner(Run.open(run))
    assert learner.steps == 4
    assert learner.generate([Condition("a large pink nine")]).shape == (1, 3, 16, 16)


# ----------------------------------------------------------------------------------------------------------- data, errors


def manifest(folder: Path, rows: list[tuple[str, str]], size: int = 16) -> str:
    """Write pictures and a table; return the name of the source."""
    rng = np.random.default_rng(0)
    lines = ["image,caption,label"]
    for n, (caption, label) in enumerate(rows):
        Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8)).save(folder / f"{n}.png")
        lines.append(f"{n}.png,{caption},{label}")
    (folder / "items.csv").write_text("\n".join(lines) + "\n")
    return f"manifest:{folder / 'items.csv'}?size={size}"


def test_the_users_own_pictures_are_learned_from_and_gaps_are_counted(tmp_path, undrawn):
    rows = [(f"a {('red', 'blue')[n % 2]} bird number {n}", ("robin", "jay")[n % 2]) for n in range(40)]
    rows[3], rows[7] = ("a bird without a name", ""), ("", "jay")
    spec = manifest(tmp_path, rows)
    data = sources.load(spec, task="generation")
    assert data.classes == ("jay", "robin")
    assert len(data.train) + len(data.valid) + len(data.test) == 39
    assert any("1 of" in note and "have no known class" in note for note in data.notes)
    assert main(["train", "supcon-t2i", "--data", spec, "--out", str(tmp_path / "runs"), *(
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()
    )]) == 0  # fmt: skip


def test_data_without_classes_need_labels_none(tmp_path):
    spec = manifest(tmp_path, [(f"bird {n}", "") for n in range(24)])
    with pytest.raises(CounterpointError, match=r"the label-guided contrast needs classes.*--labels none"):
        built(spec)
    learner, _ = built(spec, labels="none")
    assert learner.branches == 1


@pytest.mark.parametrize(
    ("spec", "settings", "said"),
    [
        (DATA, {"labels": "all"}, "unknown labels 'all'"),
        (DATA, {"backbone": "dcgan"}, "unknown backbone 'dcgan'"),
        (DATA, {"encoder": "conv-x"}, "unknown image encoder 'conv-x'"),
        (DATA, {"encoder": "mlp-s"}, "has no feature map"),
        (DATA, {"temperature": 0.0}, "temperature must be > 0"),
        (DATA, {"decay": 1.0}, r"decay must lie in 0\.\.1, 1 not included"),
        (DATA, {"batch_size": 5}, "batch_size must be even and at least 4"),
        (DATA, {"embedding": 7}, "embedding must be even"),
        (DATA, {"gammas": (1.0, -1.0, 2.0)}, "gammas must be three numbers"),
        (DATA, {"sup_weight": -1.0}, "sup_weight must be at least 0"),
        ("shapes?train=8&test=4&size=24", {"labels": "none"}, "makes pictures of 8, 16, 32"),
        ("digit-halves", {}, "has no pictures, which generation needs|has no captions, which generation needs"),
        ("digit-scenes?names=9", {}, "It has 1 to 5 names"),
    ],
)
def test_settings_and_data_that_do_not_fit_are_named(spec, settings, said):
    with pytest.raises((CounterpointError, DataError), match=said):
        built(spec, **settings)


def test_a_batch_larger_than_the_set_and_cut_captions_are_reported():
    _, task = built(context=4)
    assert "of 32 training captions have more than 4 words" in task.notes[0]
    with pytest.raises(DataError, match="has 32 training pictures, fewer than a batch of 64"):
        built(batch_size=64)
    learner, task = built(pretrain_batch_size=64)
    with pytest.raises(CounterpointError, match="a batch of 64 pictures exceeds the 32 of training"):
        fit(learner, task, bar=False)


@BACKBONES
@pytest.mark.parametrize("size", [8, 32])
def test_generators_make_pictures_of_their_size(backbone, size):
    generator = build_generator(backbone, size, 4, 8, 8).eval()
    made = generator(torch.randn(3, 4), torch.randn(3, 8), torch.randn(3, 8, 5), torch.ones(3, 5, dtype=torch.bool))
    assert made.pictures[-1].shape == (3, 3, size, size)
    assert made.pictures[-1].abs().max() <= 1
    assert made.divergence >= 0
