"""GOPro: the authors' numbers, identities of its parts, prompts inside the frozen text encoder, views, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.search.encoder import Encoder
from counterpoint.systems.distillation import gopro as file
from counterpoint.tasks.kept_classes import foreign_classes, kept_shares
from counterpoint.use.export import export
from interrupted import cut_and_resumed
from tiny_clips import saved_clip

PARITY = np.load(Path(__file__).parents[1] / "parity" / "gopro.npz")
CLIP = (
    "fit:clip?data=styled-shapes%3Ftrain=16%26valid=8%26test=8&image_encoder=conv-s&embedding=8&recipe=none&epochs=1"
    "&batch_size=8"
)
DATA = "styled-shapes?train=64&valid=16&test=16&size=16&label=shape"
SMALL: dict[str, Any] = {
    "teacher": CLIP, "recipe": "weak", "batch_size": 8, "epochs": 2, "evaluate_every": 9, "base": 0.5, "shots": 4, "lr": 1.0,
}  # fmt: skip
TEXTS = ("text_original", "text_view1", "text_view2")
ROWS = ("logits", *TEXTS, "proj_original", "proj_view1")


def rows(name: str) -> Tensor:
    return torch.from_numpy(PARITY[name]).clone()


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def resolved(**changed: Any) -> Experiment:
    return Experiment.resolve("gopro", DATA, overrides=SMALL | changed)


def prepared(**changed: Any) -> tuple[file.GOPro, Any, dict[str, Any]]:
    """Return a learner after `begin`, its task, and a prepared batch."""
    experiment = resolved(**changed)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    batch = learner.survey.batch("train", task.rows[:8])
    batch["image"] = torch.from_numpy(task.data.train.images(task.rows[:8])).permute(0, 3, 1, 2)
    return learner, task, learner.prepare(batch, torch.Generator().manual_seed(0))


# --- equations


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    given = [rows(f"case{case}/in/{name}").to(dtype).requires_grad_() for name in ROWS]
    numbers = [PARITY[f"case{case}/param/{name}"].item() for name in ("temperature", "contrastive_weight")]
    loss, parts = fn.gopro_loss(given[0], rows(f"case{case}/in/labels"), *given[1:], *numbers)
    loss.backward()
    torch.testing.assert_close(loss, rows(f"case{case}/out/loss").to(dtype), **close)
    for name, value in parts.items():
        torch.testing.assert_close(value, rows(f"case{case}/out/{name}").to(dtype), **close)
    for name, value in zip(ROWS, given, strict=True):
        torch.testing.assert_close(value.grad, rows(f"case{case}/grad/{name}").to(dtype), **close)


def test_prompts_and_their_gradients_equal_the_authors() -> None:
    weights = {k.rpartition("/")[2]: rows(k).requires_grad_() for k in PARITY.files if k.startswith("case2/weight/")}
    token = fn.style_content_token(rows("case2/in/layer_features"), weights)
    prompts = fn.build_prompts(token, weights["ctx"], rows("case2/in/token_prefix"), rows("case2/in/token_suffix"))
    torch.testing.assert_close(prompts, rows("case2/out/prompts"), rtol=1e-5, atol=1e-6)
    prompts.square().sum().backward()
    grads = {"ctx": weights["ctx"].grad, "rho_weight": weights["rho_weight"].grad}
    assert weights["style_weight"].grad is not None
    grads["style_weight0"] = weights["style_weight"].grad[0]
    for name, value in grads.items():
        torch.testing.assert_close(value, rows(f"case2/grad/{name}"), rtol=1e-5, atol=1e-5)


def test_blocks_of_other_widths_and_numbers_of_tokens_give_the_sum_of_their_own_tokens() -> None:
    small, large, style0, style1, content0, content1 = draw((2, 3, 4), (2, 5, 6), (7, 4), (7, 6), (7, 4), (7, 6))
    zero, rho = torch.zeros(7, dtype=torch.float64), torch.tensor([[2.0, -1.0]], dtype=torch.float64)

    def token(blocks: list[int]) -> Tensor:
        weights = {
            "style_weight": [[style0, style1][n] for n in blocks], "content_weight": [[content0, content1][n] for n in blocks],
            "style_bias": [zero for _ in blocks], "content_bias": [zero for _ in blocks],
            "rho_weight": rho[:, blocks], "rho_bias": zero[:1],
        }  # fmt: skip
        return fn.style_content_token([[small, large][n] for n in blocks], weights)

    torch.testing.assert_close(token([0, 1]), token([0]) + token([1]))
    mean, spread = small.mean(1), (small.var(1, correction=0) + 2.3e-8 / 3).sqrt()
    torch.testing.assert_close(token([0]), ((mean + spread) / 2 @ style0.T + mean @ content0.T) / 2 * 2)
    one = {name: [zero] for name in ("style_weight", "style_bias", "content_weight", "content_bias")}
    with pytest.raises(ValueError, match="weights must be of 2 blocks"):
        fn.style_content_token([small, large], one | {"rho_weight": rho, "rho_bias": zero[:1]})


def test_contrast_of_one_picture_is_zero_and_of_equal_rows_ln_of_the_others() -> None:
    a, b = draw((1, 4), (1, 4))
    assert fn.simclr_loss(a, b, 0.1).item() == pytest.approx(0, abs=1e-9)
    same = torch.ones(5, 4, dtype=torch.float64)
    assert fn.simclr_loss(same, same, 0.1).item() == pytest.approx(math.log(9))


def test_contrast_leaves_out_the_row_itself_and_counts_the_other_rows_of_its_view() -> None:
    a, b = (F.normalize(x, dim=1) for x in draw((3, 4), (3, 4)))
    eye = torch.eye(3, dtype=torch.bool)
    first = torch.cat([a @ b.T, (a @ a.T).masked_fill(eye, -1e9)], 1) / 0.2
    second = torch.cat([b @ a.T, (b @ b.T).masked_fill(eye, -1e9)], 1) / 0.2
    want = sum(F.cross_entropy(x, torch.arange(3)) for x in (first, second)) / 2
    torch.testing.assert_close(fn.simclr_loss(2 * a, b, 0.2), want)


def test_equal_texts_agree_and_a_view_that_is_left_out_has_no_term() -> None:
    logits, text, other = draw((2, 3), (2, 3, 4), (2, 3, 4))
    labels = torch.tensor([0, 2])
    assert fn.gopro_loss(logits, labels, text, text, text)[1]["consistency"].item() == 0
    half = (text - other).square().mean()
    torch.testing.assert_close(fn.gopro_loss(logits, labels, text, other)[1]["consistency"], half)
    torch.testing.assert_close(fn.gopro_loss(logits, labels, text, other, other)[1]["consistency"], 2 * half)
    loss, parts = fn.gopro_loss(logits, labels, text, other, consistency_weight=3.0)
    torch.testing.assert_close(loss, parts["ce"] + 3 * half)


def test_one_class_has_no_cross_entropy() -> None:
    text = torch.ones(2, 1, 3)
    assert fn.gopro_loss(torch.randn(2, 1), torch.zeros(2, dtype=torch.long), text)[0].item() == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0\.\.2"),
        ({"labels": torch.tensor([0])}, "labels"),
        ({"text0": torch.ones(2, 2, 4)}, "text0"),
        ({"text1": torch.ones(2, 3, 5)}, "text1"),
        ({"proj1": None}, "proj0 and proj1 belong together"),
        ({"proj1": torch.ones(3, 5)}, "must|b"),
        ({"temperature": 0.0}, "temperature"),
        ({"contrastive_weight": -1.0}, "contrastive_weight"),
        ({"contrastive_weight": math.nan}, "contrastive_weight"),
        ({"proj0": torch.ones(3, 5), "proj1": torch.ones(3, 5)}, "a row for each picture"),
        ({"logits": torch.ones(0, 3), "labels": torch.zeros(0, dtype=torch.long)}, "logits"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    text = torch.ones(2, 3, 4)
    good = {"logits": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "text0": text, "text1": text, "text2": text} | {
        "proj0": torch.ones(2, 5), "proj1": torch.ones(2, 5), "temperature": 0.1, "contrastive_weight": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fn.gopro_loss(**(good | changed))


def test_prompts_of_other_widths_or_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="token must be"):
        fn.shifted_context(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="the same classes"):
        fn.build_prompts(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 1, 3), torch.ones(3, 5, 3))
    with pytest.raises(ValueError, match="as wide as ctx"):
        fn.build_prompts(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 1, 3), torch.ones(2, 5, 4))


# --- training


def test_the_text_encoder_reads_the_prompts_that_build_prompts_builds() -> None:
    learner, _, batch = prepared(ending=".")
    _, layers = learner.layers(batch["views"][0])
    seen: list[Tensor] = []
    network = learner.dual
    original = network.token_embeddings

    def noted(ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(network.words(ids))
        return original(ids, mask)

    network.token_embeddings = noted
    try:
        learner.texts(layers, learner.base)
    finally:
        del network.token_embeddings
    names = [f"{name}." for name in learner.class_names[: learner.base]]
    ids, _ = network.token_ids(names)
    plain = network.words(ids)
    token = fn.style_content_token(layers, learner.generator.weights())
    want = fn.build_prompts(token, learner.generator.context, plain[:, :1], plain[:, 1:])
    torch.testing.assert_close(torch.cat(seen).view_as(want), want)


def test_a_step_calls_the_loss_and_trains_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    before = file.gopro_loss

    def noted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return before(*given, **named)

    monkeypatch.setattr(file, "gopro_loss", noted)
    experiment = resolved(epochs=1)
    task = experiment.task()
    assert np.bincount(task.data.train.labels[task.rows], minlength=8).tolist() == [4] * 4 + [0] * 4
    found = experiment.run(0)
    assert len(calls) == 2
    assert calls[0][0].shape == (8, 4)
    assert [x.shape for x in calls[0][2:5]] == [(8, 4, 8)] * 3
    torch.testing.assert_close(calls[0][2].norm(dim=2), torch.ones(8, 4))
    assert not torch.allclose(calls[0][2], calls[0][3])
    names = (
        "base_accuracy",
        "novel_accuracy",
        "harmonic_mean",
        "view_stability",
        "augmix_stability",
        "teacher_accuracy",
    )
    assert {f"test/{name}" for name in names} <= found[-1].keys()


def test_contrast_has_no_gradient_to_the_prompts_and_the_projected_classifier_trains_the_projector() -> None:
    learner, _, batch = prepared(consistency=0.0)
    rows, _ = zip(*(learner.layers(view) for view in batch["views"]), strict=True)
    fn.simclr_loss(learner.projector(rows[0]), learner.projector(rows[1])).backward()
    assert all(p.grad is None for p in learner.generator.parameters())
    assert learner.projector[0].weight.grad is not None
    assert all(p.grad is None for p in learner.dual.parameters())
    learner, _, batch = prepared(contrastive=0.0, classifier_features="projected")
    learner.loss(batch)["loss"].backward()
    assert learner.projector[0].weight.grad is not None
    assert learner.generator.context.grad is not None
    learner, _, _ = prepared(contrastive=0.0)
    assert not any(p.requires_grad for p in learner.projector.parameters())


def test_the_three_views_differ_per_picture_and_the_generator_decides_them() -> None:
    learner, _, batch = prepared(recipe="none", view_recipe="byol")
    again = learner.prepare({"image": batch["image"]}, torch.Generator().manual_seed(0))["views"]
    assert all(torch.equal(a, b) for a, b in zip(batch["views"], again, strict=True))
    same = batch["image"][:1].expand(8, -1, -1, -1).contiguous()
    for view in learner.prepare({"image": same}, torch.Generator().manual_seed(0))["views"][1:]:
        assert all(not torch.allclose(view[0], other, atol=0.02) for other in view[1:3])  # each has its own view
    _, view, mixture = batch["views"]
    assert not torch.allclose(view, mixture, atol=0.1)


def test_the_context_begins_as_the_words_and_zero_layers_give_the_plain_texts() -> None:
    learner, _, batch = prepared(ending="")
    for part in (*learner.generator.style, *learner.generator.content, learner.generator.rho):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    learner.eval()
    rows, logits = learner.classified(batch["views"][0])
    torch.testing.assert_close(logits, learner.classify(rows), rtol=1e-4, atol=1e-4)


def test_few_shots_are_chosen_by_their_seed() -> None:
    one, same, other = (resolved(shots_seed=seed).task().rows for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len(resolved(shots=0).task().rows) == 32


def test_the_rate_warms_up_at_a_constant_and_then_falls_on_a_cosine() -> None:
    learner, _, _ = prepared(epochs=5, warmup_epochs=2, warmup_lr=0.01, lr=0.4)
    learner.epochs, learner.steps_per_epoch = 5, 1
    (turn,) = learner.turns()
    rates = []
    for _ in range(5):
        rates.append(turn.optimizers[0].param_groups[0]["lr"] * 256 / 8)
        turn.optimizers[0].step()
        turn.schedules[0].step()
    assert rates == pytest.approx([0.01, 0.01, 0.4, 0.3, 0.1])


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit_and_loads_and_exports(tmp_path: Path) -> None:
    experiment = resolved()
    whole = Run.create(tmp_path, experiment.record(0), "whole")
    experiment.run(0, run=whole)
    cut = cut_and_resumed(experiment, file.GOPro, 3, tmp_path)
    ours = cut.load_weights()
    assert all(torch.equal(ours[name], value) for name, value in whole.load_weights().items())
    assert not any(name.startswith(("network", "encoder")) for name in ours)
    learner: Any = load_learner(whole.path)
    found = learner.predict({"image": torch.randn(2, 3, 16, 16)})
    assert found["logits"].shape == (2, 8)
    (written,) = export(Encoder.load(whole.path), tmp_path / "encoder.pt2")
    assert written.difference <= 1e-4


def test_the_page_shows_pictures_with_their_two_views() -> None:
    experiment = resolved(epochs=1)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    fit(learner, task, evaluate_every=9)
    found = learner.figures(Survey(task, learner))["Views of a picture"]
    assert [len(row["cells"]) for row in found["rows"]] == [3] * 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ending": " and more words" * 9}, "beside the 4 of the context, and 8 texts are longer"),
        ({"context": "a " * 40}, "a learned context of [0-9]+ leaves none for a text"),
        ({"class_names": ["a", "b"]}, "has 2 lines for 8 classes"),
        ({"class_names": [*"abcdefg", "g"]}, "two classes have the same name 'g'"),
        ({"class_names": [*"abcdefg", "G"]}, "gives '.*' and '.*' the same embedding of their texts"),
        ({"teacher": "fit:simclr?data=digits&epochs=1"}, "does not embed pictures and texts"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused_and_leaves_nothing(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    if "class_names" in changed:
        (tmp_path / "names.txt").write_text("\n".join(changed["class_names"]))
        changed = changed | {"class_names": str(tmp_path / "names.txt")}
    experiment = resolved(**changed)
    with pytest.raises(CounterpointError, match=message):
        training.train("gopro", experiment.config, data=DATA, out=tmp_path / "runs", say=lambda _: None)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_goes_on_keeps_the_learned_context(tmp_path: Path) -> None:
    runs, said = [], {"data": DATA, "out": tmp_path, "say": lambda _: None}
    for name, lr in (("one", 10.0), ("two", 1e-12)):
        config = resolved(lr=lr, epochs=1).config
        runs.append(training.train("gopro", config, name=name, parent=runs[0].path if runs else None, **said))
    one, two = (run.load_weights()["generator.context"] for run in runs)
    torch.testing.assert_close(one, two)
    learner, _, _ = prepared()
    assert not torch.allclose(one, learner.generator.context.detach(), atol=1e-4)


def test_a_file_of_names_is_read_once_and_a_loaded_run_needs_it_no_more(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"thing {n}" for n in range(8)))
    experiment = resolved(class_names=str(tmp_path / "names.txt"), ending="!", epochs=1)
    run = Run.create(tmp_path, experiment.record(0), "run")
    experiment.run(0, run=run)
    (tmp_path / "names.txt").unlink()
    learner: Any = load_learner(run.path)
    assert learner.endings[:2] == ["thing 0!", "thing 1!"]
    assert learner.predict({"image": torch.randn(2, 3, 16, 16)})["logits"].isfinite().all()


def test_a_network_of_transformers_of_another_size_and_other_statistics_is_tuned(tmp_path: Path) -> None:
    saved_clip(tmp_path, size=24, dim=12, blocks=2, length=40, mean=[0.5] * 3, std=[0.5] * 3)
    rows = resolved(teacher=f"hf:{tmp_path}", epochs=1).run(0)
    assert np.isfinite(rows[-1]["train/loss"])
    assert {"test/harmonic_mean", "test/augmix_stability"} <= rows[-1].keys()


def test_half_precision_is_widened() -> None:
    z, a, c = (x.bfloat16() for x in draw((2, 3, 5, 4), (2, 6, 4), (2, 6, 4)))
    zero, rho = torch.zeros(2, 6, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    weights = {"style_weight": a, "content_weight": c, "style_bias": zero, "content_bias": zero, "rho_weight": rho}
    found = fn.style_content_token(z, weights | {"rho_bias": zero[0, :1]})
    want = fn.style_content_token(
        z.float(), {name: w.float() for name, w in (weights | {"rho_bias": zero[0, :1]}).items()}
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"shots": -1}, "shots must be at least 0"),
        ({"context": " "}, "context must have at least one word"),
        ({"severity": 0.0}, "severity above"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"cached": True}, "nothing can be kept"),
        ({"view_recipe": "odd"}, "recipe of views"),
        ({"teacher": "file:x.npz"}, "embeddings alone do not suffice"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        resolved(**changed)


def test_kept_shares_count_pictures_whose_best_class_stays() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 3.0]]])
    assert kept_shares(logits).tolist() == [0.5, 1.0]
    foreign = torch.tensor([[True, False], [False, False]])
    assert kept_shares(logits, foreign).tolist() == [1.0, 1.0]
    assert foreign_classes(torch.tensor([1, 0]), 1, 2).tolist() == [[True, False], [False, True]]
