"""PromptKD: the authors' numbers, prompts in frozen networks, distillation without labels, the teacher's prompts, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.data.worlds.styles import SHAPES
from counterpoint.encoders.prompts import appended_prompts, replaced_prompts
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import promptkd as file
from counterpoint.tasks import class_teachers, image_towers, tuned_teachers
from counterpoint.tasks.class_teachers import AlignedDual
from embedded import embeddings
from interrupted import cut_and_resumed
from tiny_clips import saved_clip

PARITY = np.load(Path(__file__).parents[1] / "parity" / "promptkd.npz")
CONV = "run:conv"
DATA = "styled-shapes?train=64&valid=32&test=32&size=8&label=shape"
SMALL: dict[str, Any] = {
    "student": "run:student", "teacher": "run:teacher", "recipe": "none", "batch_size": 16, "epochs": 2, "evaluate_every": 9,
    "base": 0.5, "prompts": 2, "prompt_depth": 2, "tune_depth": 2, "shots": 4,
}  # fmt: skip


def values(case: int, dtype: torch.dtype, group: str) -> dict[str, Tensor]:
    prefix = f"case{case}/{group}/"
    found = {name.removeprefix(prefix): PARITY[name] for name in PARITY.files if name.startswith(prefix)}
    return {name: torch.from_numpy(value).clone().to(dtype) for name, value in found.items()}


def network(seed: int, embedding: int, encoder: str = "vit-conv") -> AlignedDual:
    """Return a CLIP with random weights."""
    given = {"image_encoder": encoder, "embedding": embedding, "recipe": "none", "batch_size": 32, "context": 16}
    room = Experiment.resolve("clip", "styled-shapes?train=64&valid=32&test=32&size=8&seed=1", overrides=given)
    learner: Any = room.learner(room.task().facts, seed)
    return AlignedDual(learner, "a CLIP").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def networks() -> dict[str, AlignedDual]:
    return {"run:student": network(1, 6), "run:teacher": network(2, 8)}


@pytest.fixture
def rooms(networks: dict[str, AlignedDual], monkeypatch: pytest.MonkeyPatch) -> dict[str, AlignedDual]:
    for module in (file, class_teachers, image_towers, tuned_teachers):
        monkeypatch.setattr(module, "open_network", networks.__getitem__)
    before = class_teachers.teacher_width
    monkeypatch.setattr(
        class_teachers, "teacher_width", lambda name: networks[name].dim if name in networks else before(name)
    )
    return networks


def resolved(**changed: Any) -> Experiment:
    return Experiment.resolve("promptkd", DATA, overrides=SMALL | changed)


def trained(experiment: Experiment) -> Any:
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    fit(learner, task, evaluate_every=9)
    return learner


# --- equations


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projector_and_loss_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    # The vectors are float64. A gradient of float32 keeps fewer digits, for a scale of 100 multiplies its rounding.
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    given, out, weights = (values(case, dtype, group) for group in ("in", "out", "weight"))
    param = {name: value.item() for name, value in values(case, torch.float64, "param").items()}
    h = given["student_features"].requires_grad_()
    leaves = {"student_features": h} | {n: w.requires_grad_() for n, w in weights.items() if "running" not in n}
    u = fn.prompt_projector(h, weights, bool(param["train"]))
    torch.testing.assert_close(u, out["projected"], **close)
    logits = param["student_scale"] * u @ given["class_vectors"].T
    taught = param["teacher_scale"] * given["teacher_image"] @ given["class_vectors"].T
    loss = fn.prompt_distillation_loss(logits, taught, param["temperature"], param["kd_weight"])
    torch.testing.assert_close(loss, out["loss"], **close)
    loss.backward()
    for name, want in values(case, dtype, "grad").items():
        size = float(want.abs().max())
        bound = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, size)}
        if dtype == torch.float32:
            bound = {"rtol": 1e-3, "atol": 1e-4 * size + 1e-3}
        torch.testing.assert_close(leaves[name].grad, want, **bound)


def test_prompted_transformer_equals_the_authors() -> None:
    weights, param = values(2, torch.float32, "weight"), values(2, torch.float64, "param")
    prompts = {name: weights[name].requires_grad_() for name in file.prompt_names(int(param["prompt_depth"]))}
    numbers = [int(param[name]) for name in ("patch", "num_heads", "prompt_depth", "n_ctx")]
    found = fn.prompted_vit(values(2, torch.float32, "in")["image"], weights, *numbers)
    torch.testing.assert_close(found, values(2, torch.float32, "out")["features"], rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for name, want in values(2, torch.float32, "grad").items():
        # The authors' gradients passed through half precision.
        torch.testing.assert_close(prompts[name].grad, want, rtol=5e-4, atol=2e-4 * float(want.abs().max()))


def test_the_divergence_is_divided_by_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    whole = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(fn.prompt_distillation_loss(student, teacher, 2.0, 10.0), 40 * whole / 7)


def test_equal_logits_and_a_single_class_give_zero() -> None:
    logits = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    assert fn.prompt_distillation_loss(logits, logits, 1.0, 1000.0).item() == pytest.approx(0, abs=1e-10)
    assert fn.prompt_distillation_loss(logits[:, :1], logits[:, 1:], 1.0, 1000.0).item() == 0


def test_a_class_of_probability_zero_adds_nothing() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    loss = fn.prompt_distillation_loss(student, torch.tensor([[0.0, 0.0, -1e9]]), 1.0, 3.0)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3 / 2))
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_single_row_takes_the_running_statistics_and_the_weights_stay() -> None:
    given, weights = values(0, torch.float64, "in"), values(0, torch.float64, "weight")
    kept = {name: value.clone() for name, value in weights.items()}
    whole = fn.prompt_projector(given["student_features"], weights, False)
    torch.testing.assert_close(fn.prompt_projector(given["student_features"][:1], weights, True), whole[:1])
    assert not torch.allclose(fn.prompt_projector(given["student_features"], weights, True), whole)
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


@pytest.mark.parametrize("flag", [1, np.int64(1), np.array(1), torch.tensor(1)])
def test_the_flag_of_training_may_be_any_number(flag: Any) -> None:
    given, weights = values(0, torch.float64, "in")["student_features"], values(0, torch.float64, "weight")
    for wanted, number in ((True, flag), (False, 0 * flag)):
        found = fn.prompt_projector(given, weights, number)
        assert torch.equal(found, fn.prompt_projector(given, weights, wanted))


def test_numbers_of_half_the_width_do_not_round_the_loss() -> None:
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fn.prompt_distillation_loss(student, teacher, torch.tensor(2.0), torch.tensor(3.0))
    torch.testing.assert_close(found, fn.prompt_distillation_loss(student, teacher, 2.0, 3.0), rtol=1e-12, atol=0)


def test_prompt_tuning_adds_four_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    image, before = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    text, texts = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    u, v, w, t = (F.normalize(x, dim=1) for x in (image, before, text, texts))
    target, own = (10 * v @ t.T).log_softmax(1), (10 * u @ w.T).log_softmax(1)
    want = F.nll_loss(own, labels) + 25 * F.l1_loss(w, t) + 10 * F.l1_loss(u, v)
    want = want + F.kl_div(own, target, reduction="sum", log_target=True) / own.numel()
    torch.testing.assert_close(fn.prompt_tuning_loss(image, text, before, texts, labels, 10.0), want)


def test_epoch_weights_are_a_gaussian() -> None:
    found = fn.gaussian_epoch_weights(20)
    assert found.sum().item() == pytest.approx(1)
    assert found.argmax().item() == 14
    assert (found[14] / found[15]).item() == pytest.approx(np.exp(0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.prompt_distillation_loss(torch.ones(1, 2), torch.ones(1, 2), 0.0), "temperature"),
        (lambda: fn.prompt_distillation_loss(torch.ones(1, 2), torch.ones(1, 2), 1.0, -1.0), "kd_weight"),
        (lambda: fn.prompt_distillation_loss(torch.ones(1, 2), torch.ones(1, 3)), "teacher"),
        (lambda: fn.prompt_distillation_loss(torch.ones(0, 2), torch.ones(0, 2)), "student"),
        (lambda: fn.prompt_projector(torch.ones(0, 8), {}, True), "h"),
        (lambda: fn.prompt_projector(torch.ones(2, 9), values(0, torch.float32, "weight"), True), "width 9"),
        (lambda: fn.prompt_projector(torch.ones(2, 3), {"conv1.0.weight": torch.ones(2, 3)}, True), r"lack conv1\.0\.bias"),
        (lambda: fn.prompted_vit(torch.ones(1, 3, 8, 8), {}, 4, 2, 1, 2), "lack VPT"),
        (lambda: fn.prompted_vit(torch.ones(1, 3, 8, 8), values(2, torch.float32, "weight"), 4, 2, 2, 3), "n_ctx is 3"),
        (lambda: fn.prompted_vit(torch.ones(1, 3, 8, 8), values(2, torch.float32, "weight"), 4, 2, -1, 2), "depth"),
        (lambda: fn.prompted_vit(torch.ones(1, 3, 8, 8), values(2, torch.float32, "weight"), 4, 3, 2, 2), "num_heads"),
        (lambda: fn.prompted_vit(torch.ones(1, 3, 8, 8), values(2, torch.float32, "weight"), 2, 2, 2, 2), "10 tokens"),
        (lambda: fn.gaussian_epoch_weights(0), "epochs"),
        (lambda: fn.prompt_tuning_loss(*[torch.eye(2)] * 4, torch.tensor([0, 1]), 10.0, -1.0), "text_weight"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- prompts in networks of the libraries


def test_a_tower_of_open_clip_gives_what_its_weights_give() -> None:
    open_clip = pytest.importorskip("open_clip")
    weights = values(2, torch.float32, "weight")
    tower = open_clip.transformer.VisionTransformer(
        8, 4, 16, 3, 2, 4.0, output_dim=8, act_layer=open_clip.transformer.QuickGELU
    )
    tower.load_state_dict({name: value for name, value in weights.items() if "VPT" not in name})
    image = values(2, torch.float32, "in")["image"]
    for depth in (0, 1, 2):
        found = fn.prompted_vit(image, weights, 4, 2, depth, 2, tower=tower.eval())
        torch.testing.assert_close(found, fn.prompted_vit(image, weights, 4, 2, depth, 2), rtol=1e-4, atol=1e-5)


def test_a_tower_of_transformers_takes_prompts_and_gives_them_back() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=8, patch_size=4, **small)).eval()
    image, prompts = torch.randn(2, 3, 8, 8), [torch.randn(2, 16) for _ in range(3)]
    before = tower(pixel_values=image).pooler_output
    rows = []
    for depth in (1, 2, 3):
        with appended_prompts(tower, prompts[:depth]):
            rows.append(tower(pixel_values=image))
    assert all(found.last_hidden_state.shape[1] == 5 for found in rows)
    assert all(not torch.allclose(found.pooler_output, before) for found in rows)
    assert not torch.allclose(rows[0].pooler_output, rows[1].pooler_output)
    assert torch.equal(tower(pixel_values=image).pooler_output, before)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=9, max_position_embeddings=6, **small)
    ).eval()
    ids = torch.tensor([[1, 4, 5, 3, 8]])
    with replaced_prompts(text, prompts[:2], 1):
        changed = text(input_ids=ids, output_hidden_states=True).hidden_states
    plain = text(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(changed[1], plain[1])  # block 0 sees its own tokens
    assert not torch.allclose(changed[2][:, 3:], plain[2][:, 3:])


def test_texts_of_unequal_length_get_the_prompts_at_their_place(networks: dict[str, AlignedDual]) -> None:
    encoder: Any = networks["run:teacher"].learner.encoders["text"]
    ids, mask = torch.tensor([[1, 5, 6, 7, 2], [1, 5, 6, 2, 0]]), torch.tensor([[True] * 5, [True] * 4 + [False]])
    prompts = [torch.randn(2, 128, generator=torch.Generator().manual_seed(0))]
    seen: list[Tensor] = []
    handle = encoder.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad(), replaced_prompts(encoder, prompts, 1):
        encoder(ids, mask)
    handle.remove()
    # The hook of this test ran before the prompts' one; a second pass reads what block 1 saw.
    with torch.no_grad(), replaced_prompts(encoder, prompts, 1):
        handle = encoder.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        encoder(ids, mask)
        handle.remove()
    plain, given = seen
    assert len(plain) == 9
    for start in (0, 5):
        torch.testing.assert_close(given[start + 1 : start + 3], prompts[0])
    kept = [0, 3, 4, 5, 8]
    torch.testing.assert_close(given[kept], plain[kept])


def test_a_network_without_attention_and_too_many_prompts_are_refused(networks: dict[str, AlignedDual]) -> None:
    with pytest.raises(CounterpointError, match="no blocks with attention"), appended_prompts(conv(), []):
        pass
    tower = networks["run:student"].tower
    with pytest.raises(ValueError, match="3 sets for 2 blocks"), appended_prompts(tower, [torch.ones(1, 64)] * 3):
        pass
    with pytest.raises(ValueError, match=r"\[n, 64\]"), appended_prompts(tower, [torch.ones(1, 63)]):
        pass


def conv() -> nn.Module:
    from counterpoint.encoders.images import build_image_encoder

    return build_image_encoder("conv-s", 8)


# --- training


def test_a_step_calls_the_equations_and_leaves_both_networks_as_they_were(
    rooms: dict[str, AlignedDual], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> None:
        before = getattr(file, name)

        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return before(*given, **named)

        monkeypatch.setattr(file, name, call)

    for name in ("prompted_vit", "prompt_projector", "prompt_distillation_loss"):
        noted(name)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = {name: room.images(images) for name, room in rooms.items()}
    learner = trained(resolved(epochs=1))
    assert calls.count("prompt_distillation_loss") == 4
    assert calls[:3] == ["prompted_vit", "prompt_projector", "prompt_distillation_loss"]
    learner.train()
    with torch.no_grad():
        assert torch.equal(learner.encoder(images), before["run:student"])  # without its prompts
        assert torch.equal(rooms["run:teacher"].images(images), before["run:teacher"])
        assert not torch.allclose(learner.features(images), before["run:student"])


def test_prompts_and_projector_alone_train(rooms: dict[str, AlignedDual]) -> None:
    experiment = resolved()
    learner: Any = experiment.learner(experiment.task().facts, 0)
    count = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    prompts, width, own, taught = 2, 64, 6, 8
    assert count == 2 * prompts * width + own * taught + taught * taught + 4 * taught


def test_labels_do_not_matter_and_pictures_without_a_class_train(rooms: dict[str, AlignedDual]) -> None:
    def weights(change: Any) -> tuple[dict[str, Tensor], int]:
        experiment = resolved(epochs=1)
        task = experiment.task()
        labels = task.data.train.labels
        labels[:] = change(labels.copy())
        task = type(task)(task.data, task.config)
        learner = experiment.learner(task.facts, 0)
        fit(learner, task, evaluate_every=9)
        return learner.state_dict(), len(task.rows)

    (plain, _), (mixed, rows) = weights(lambda y: y), weights(lambda y: np.where(np.arange(64) < 60, -1, 7 - y))
    assert rows == 64
    assert all(torch.equal(plain[name], value) for name, value in mixed.items())


@pytest.mark.parametrize("more", [{"tune_epochs": 1}, {"objective": "ce"}])
def test_no_label_is_needed_but_where_labels_teach(rooms: dict[str, AlignedDual], more: dict[str, Any]) -> None:
    def run(**given: Any) -> Any:
        experiment = resolved(epochs=1, **given)
        data = experiment.source()
        data.train.labels = None
        return experiment.run(0, source=data)

    assert np.isfinite(run()[-1]["train/loss"])
    with pytest.raises(CounterpointError, match="no training picture has a label of a base class"):
        run(**more)


def test_the_running_statistics_of_the_projector_follow(rooms: dict[str, AlignedDual]) -> None:
    learner = trained(resolved(epochs=1))
    assert learner.projector.conv1[1].num_batches_tracked == 4
    assert not torch.equal(learner.projector.conv1[1].running_mean, torch.zeros(8))


def test_networks_of_transformers_of_other_sizes_widths_and_statistics(tmp_path: Path) -> None:
    for name, more in (
        ("teacher", {"size": 24, "dim": 12, "blocks": 2, "mean": [0.5] * 3, "std": [0.5] * 3}),
        ("student", {"blocks": 3}),
    ):
        saved_clip(tmp_path / name, length=40, **more)
    teacher, student = (f"hf:{tmp_path / name}" for name in ("teacher", "student"))
    rows = resolved(teacher=teacher, student=student, prompt_depth=3, tune_epochs=1, epochs=1).run(0)
    assert {"test/harmonic_mean", "test/teacher_harmonic_mean"} <= rows[-1].keys()
    with pytest.raises(CounterpointError, match="the student's is 8, that of the class texts 12"):
        resolved(teacher=teacher, student=student, projector_layers=0).run(0)


def test_the_student_classifies_by_the_stored_texts_with_its_own_scale(rooms: dict[str, AlignedDual]) -> None:
    learner = trained(resolved(epochs=1))
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        found = learner.predict({"image": images})
        texts = rooms["run:teacher"].texts([f"a photo of a {name}" for name in SHAPES])
    torch.testing.assert_close(learner.prototypes, F.normalize(texts, dim=1))
    want = rooms["run:student"].scale * found["feature"] @ learner.prototypes.T
    torch.testing.assert_close(found["logits"], want)


def test_objectives_take_their_texts(rooms: dict[str, AlignedDual]) -> None:
    none = trained(resolved(objective="none", epochs=1))
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        rows = F.normalize(rooms["run:student"].images(images), dim=1)
        texts = rooms["run:student"].texts([f"a photo of a {name}" for name in SHAPES])
    want = rooms["run:student"].scale * rows @ F.normalize(texts, dim=1).T
    torch.testing.assert_close(none.predict({"image": images})["logits"], want)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        before = file.cross_entropy
        patch.setattr(file, "cross_entropy", lambda logits, y: seen.append(y) or before(logits, y))
        trained(resolved(objective="ce", texts="own", projector_layers=0, epochs=1))
    assert [len(y) for y in seen] == [16]  # four shots of four base classes
    assert torch.cat(seen).bincount().tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("changed", [{"objective": "l1"}, {"objective": "mse"}, {"texts": "own"}, {"projector_layers": 3},
                                     {"prompt_depth": 0}, {"shuffled": True}])  # fmt: skip
def test_variants_train(rooms: dict[str, AlignedDual], changed: dict[str, Any]) -> None:
    rows = resolved(**{"epochs": 1} | changed).run(0)
    assert np.isfinite(rows[-1]["train/loss"])
    assert {"test/base_accuracy", "test/novel_accuracy", "test/harmonic_mean"} <= rows[-1].keys()


def test_full_training_moves_the_student(rooms: dict[str, AlignedDual]) -> None:
    images = torch.randn(4, 3, 8, 8)
    learner = trained(resolved(epochs=1, trains="all"))
    with torch.no_grad():
        assert not torch.allclose(learner.encoder(images), rooms["run:student"].images(images))


def test_a_teacher_of_embeddings_alone_teaches(rooms: dict[str, AlignedDual]) -> None:
    rows = resolved(teacher=embeddings(64, 8), epochs=1).run(0)
    assert "test/harmonic_mean" in rows[-1]
    assert "test/teacher_accuracy" not in rows[-1]


def test_a_named_encoder_without_texts_is_a_student(rooms: dict[str, AlignedDual]) -> None:
    rows = resolved(student="", encoder="vit-conv", epochs=1).run(0)
    assert "test/harmonic_mean" in rows[-1]


# --- the teacher's prompts


def test_tuning_sees_few_labels_of_base_classes_and_stores_the_weighted_prompts(
    rooms: dict[str, AlignedDual], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    kept: list[dict[str, Tensor]] = []
    before, ended = tuned_teachers.prompt_tuning_loss, file.PromptKD.end_epoch

    def noted(image: Tensor, text: Tensor, *rest: Any) -> Tensor:
        seen.append((len(text), rest[2].tolist()))
        return before(image, text, *rest)

    def after(self: Any, epoch: int) -> None:
        if self.tuning:
            kept.append({name: value.detach().clone() for name, value in self.tuned.current.named_parameters()})
        ended(self, epoch)

    monkeypatch.setattr(tuned_teachers, "prompt_tuning_loss", noted)
    monkeypatch.setattr(file.PromptKD, "end_epoch", after)
    learner = trained(resolved(tune_epochs=2, epochs=1, epoch_mean=1.0))
    assert [count for count, _ in seen] == [4, 4]
    assert sorted(seen[0][1]) == sorted([0, 1, 2, 3] * 4)
    weights = fn.gaussian_epoch_weights(2, 1.0)
    for name, value in learner.tuned.current.named_parameters():
        torch.testing.assert_close(value.detach(), weights[0] * kept[0][name] + weights[1] * kept[1][name])
        assert not torch.equal(kept[0][name], kept[1][name])
    with torch.no_grad():
        torch.testing.assert_close(learner.prototypes, F.normalize(learner.tuned.texts(8), dim=1))


def test_a_run_that_goes_on_keeps_the_learned_prompts_and_weights(
    rooms: dict[str, AlignedDual], tmp_path: Path
) -> None:
    runs: list[Run] = []
    for name, lr in (("one", 0.01), ("two", 1e-12)):
        given = {"lr": lr, "tune_lr": lr, "epochs": 1, "tune_epochs": 2, "epoch_mean": 1.0, "trains": "all"}
        more = {"data": DATA, "out": tmp_path, "name": name, "say": lambda _: None}
        parent = runs[0].path if runs else None
        runs.append(training.train("promptkd", resolved(**given).config, parent=parent, **more))
    one, two = (run.load_weights() for run in runs)
    for name in one:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(one[name], two[name], msg=lambda m, name=name: f"{name}: {m}")
    before = network(1, 6).learner.heads["image"].weight
    assert not torch.equal(one["encoder.network.head.weight"], before)


def test_the_template_begins_the_teacher_prompts(rooms: dict[str, AlignedDual]) -> None:
    experiment = resolved(tune_epochs=1, prompts=4, tune_depth=1, tune_images=False)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.begin(Survey(task, learner))
    own = learner.tuned.current.text[0]
    assert torch.equal(own.detach(), rooms["run:teacher"].word_rows("a photo of a")[:4])
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(learner.tuned.texts(8), dim=1), learner.tuned.frozen_text)


@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_resumes_bit_for_bit_in_both_stages(
    rooms: dict[str, AlignedDual], tmp_path: Path, stop: int
) -> None:
    experiment = resolved(tune_epochs=3, epochs=1)
    whole = Run.create(tmp_path, experiment.record(0), "whole")
    experiment.run(0, run=whole)
    cut = cut_and_resumed(experiment, file.PromptKD, stop, tmp_path)
    ours = cut.load_weights()
    assert all(torch.equal(ours[name], value) for name, value in whole.load_weights().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"kd_weight": -1.0}, "kd_weight must be at least 0"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"projector_layers": 4}, "projector_layers must lie in 0 to 3"),
        ({"texts": "own", "objective": "mse"}, "texts own needs"),
        ({"texts": "own", "student": ""}, "texts own needs"),
        ({"prompt_depth": 0, "projector_layers": 0}, "neither prompts nor a projector"),
        ({"tune_epochs": 1, "cached": True}, "tune_epochs needs a teacher that is a network"),
        ({"student": "file:x.npz"}, "embeddings alone do not learn"),
        ({"student": "odd"}, "student of pictures and texts 'odd'"),
        ({"student": "", "objective": "none"}, "objective none measures a --student"),
        ({"frozen_templates": "a photo"}, "templates must hold"),
    ],
)
def test_bad_settings_are_refused(rooms: dict[str, AlignedDual], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        resolved(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_depth": 3}, "prompt_depth 3 is more than the 2 blocks"),
        ({"projector_layers": 0}, "projector_layers 0 needs equal widths"),
        ({"tune_epochs": 1, "tune_depth": 4}, "tune_depth 4 is more than the 3 blocks"),
        ({"student": "", "encoder": "conv-s"}, "no blocks with attention"),
        ({"teacher": CONV, "tune_epochs": 1}, "no blocks with attention.* or set --no-tune-images"),
        ({"tune_epochs": 1, "prompts": 16}, "a learned context of 16 leaves none for a text"),
        ({"tune_epochs": 1, "prompts": 14}, "reads 2 tokens beside the 14 of the context, and 8 texts are longer"),
        ({"class_names": "long.txt"}, "reads 16 tokens, and 1 text is longer, such as 'a photo of a disc disc"),
        ({"class_names": "alike.txt"}, "the same embedding of their texts"),
        ({"class_names": "doubled.txt"}, "two classes have the same name 'disc'"),
        ({"class_names": "few.txt"}, "has 2 lines for 8 classes"),
        ({"teacher": "nan.npz"}, "train has 1 row of zeros, NaN or infinity, the first is row 3"),
        ({"teacher": "width.npz"}, "train must be"),
    ],
)
def test_settings_that_do_not_fit_the_networks_are_refused_and_leave_nothing(
    rooms: dict[str, AlignedDual], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    rooms[CONV] = network(3, 8, "conv-s")
    train = np.random.default_rng(0).standard_normal((64, 8))
    files = {
        "long.txt": [*SHAPES[:7], "disc " * 20],
        "alike.txt": [*SHAPES[:6], "Disc!", "disc!"],
        "doubled.txt": [*SHAPES[:6], "disc", "disc"],
        "few.txt": ["a", "b"],
        "nan.npz": {"train": np.where(np.arange(64)[:, None] == 3, np.nan, train)},
        "width.npz": {"text": np.ones((8, 7))},
    }
    for name, given in changed.items():
        if isinstance(given, str) and given.endswith(".txt"):
            (tmp_path / given).write_text("\n".join(files[given]))
            changed = changed | {name: str(tmp_path / given)}
        elif isinstance(given, str) and given.endswith(".npz"):
            changed = changed | {name: embeddings(64, 8, folder=tmp_path, dim=8, **files[given])}
    experiment = resolved(**changed)
    with pytest.raises(CounterpointError, match=message):
        training.train("promptkd", experiment.config, data=DATA, out=tmp_path / "runs", say=lambda _: None)
    assert not (tmp_path / "runs").exists()


def test_the_page_draws_each_class(rooms: dict[str, AlignedDual], monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = resolved(epochs=1)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    fit(learner, task, evaluate_every=9)
    found = learner.figures(Survey(task, learner))["Classes"]
    assert list(found["series"]) == ["student before", "student", "teacher"]
    assert found["xlabel"] == "class; novel ones from 4 on"
    assert not found["caption"].endswith("larger than its teacher.")
    monkeypatch.setattr(AlignedDual, "tower", nn.Linear(1, 1))
    assert learner.figures(Survey(task, learner))["Classes"]["caption"].endswith("larger than its teacher.")


def test_an_exported_student_takes_any_number_of_pictures(rooms: dict[str, AlignedDual]) -> None:
    experiment = resolved()
    learner: Any = experiment.learner(experiment.task().facts, 0).eval()

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = learner

        def forward(self, images: Tensor) -> Tensor:
            return self.learner.predict({"image": images})["feature"]

    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(
            Student(), (images[:3],), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
        )
        torch.testing.assert_close(program.module()(images), learner.embed(images))
