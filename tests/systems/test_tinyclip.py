"""TinyCLIP: the authors' numbers, both ways to inherit, the cut, stages, resuming, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.core import hard_concrete as hc
from counterpoint.core.distributed import batch_pair_loss
from counterpoint.core.masked_transformer import cut_transformer_block
from counterpoint.encoders.towers import Gates, ImageTower, Shape, TextTower
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.distillation import tinyclip as file
from counterpoint.tasks import tower_figures, tower_pairs
from interrupted import cut_and_resumed

PARITY = np.load(Path(__file__).parents[1] / "parity" / "tinyclip.npz")
ROWS = ("student_image", "student_text", "teacher_image", "teacher_text")


def get(case: int, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(np.asarray(PARITY[f"case{case}/{name}"])).clone()
    return value.to(dtype) if value.is_floating_point() else value


def number(case: int, name: str) -> float:
    return PARITY[f"case{case}/param/{name}"].item()


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}


# --- equations


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affinity_loss_and_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    u, v, taught_u, taught_v = (get(case, f"in/{name}", dtype) for name in ROWS)
    scale = torch.tensor(number(case, "student_scale"), dtype=dtype, requires_grad=True)
    u.requires_grad_()
    v.requires_grad_()
    found = fn.affinity_mimicking_loss(u, v, scale, taught_u, taught_v, number(case, "teacher_scale"))
    for name in ("loss", "loss_i2t", "loss_t2i"):
        torch.testing.assert_close(getattr(found, name), get(case, f"out/{name}", dtype), **close(dtype))
    found.loss.backward()
    for value, name in ((u, "student_image"), (v, "student_text"), (scale, "student_scale")):
        torch.testing.assert_close(
            value.grad,
            get(case, f"grad/{name}", dtype),
            rtol=close(dtype)["rtol"],
            atol=1e-5 if dtype == torch.float32 else 1e-12,
        )
    torch.testing.assert_close(batch_pair_loss(u * scale, v), get(case, "out/clip_loss", dtype), **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_sizes_and_pressure_equal_the_authors(dtype: torch.dtype) -> None:
    kinds = ("hidden", "heads", "intermediate")
    logits = [get(2, f"in/{kind}_loga", dtype).requires_grad_() for kind in kinds]
    for kind, logit in zip(kinds, logits, strict=True):
        z = fn.hard_concrete_sample(logit, get(2, f"in/u_{kind}", dtype))
        torch.testing.assert_close(z, get(2, f"out/z_train_{kind}", dtype), **close(dtype))
        torch.testing.assert_close(
            fn.hard_concrete_eval_mask(logit), get(2, f"out/z_eval_{kind}", dtype), **close(dtype)
        )
    C, I, H, layers = (int(number(2, name)) for name in ("hidden_size", "intermediate_size", "num_heads", "num_layers"))  # noqa: E741
    size = fn.expected_model_size(*logits, C, I, H, layers)
    torch.testing.assert_close(size, get(2, "out/expected_size", dtype), **close(dtype))
    whole = hc.prunable_size(C, I, H, layers)
    assert whole == float(get(2, "out/prunable_size"))
    sparsity = 1 - size / whole
    torch.testing.assert_close(sparsity, get(2, "out/expected_sparsity", dtype), **close(dtype))
    target = hc.scheduled_sparsity(
        number(2, "start_sparsity"), number(2, "target_sparsity"), number(2, "step"), number(2, "warmup")
    )
    assert target == pytest.approx(float(get(2, "out/target_sparsity")))
    multipliers = [torch.tensor(number(2, name), dtype=dtype, requires_grad=True) for name in ("lambda_1", "lambda_2")]
    loss = fn.sparsity_lagrangian(sparsity, target, *multipliers)
    torch.testing.assert_close(loss, get(2, "out/lagrangian", dtype), **close(dtype))
    loss.backward()
    names = [f"grad/{kind}_loga" for kind in kinds] + ["grad/lambda_1", "grad/lambda_2"]
    for value, name in zip([*logits, *multipliers], names, strict=True):
        torch.testing.assert_close(value.grad, get(2, name, dtype), **close(dtype))


def test_the_pressure_pushes_a_network_that_is_too_large() -> None:
    e, one, two = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 10.0, 4.0))
    loss = fn.sparsity_lagrangian(e, 0.5, one, two)
    loss.backward()
    assert loss.item() == pytest.approx(10 * 0.3 + 4 * 0.09)
    assert (e.grad, one.grad, two.grad) == (pytest.approx(-10 - 8 * 0.3), pytest.approx(0.3), pytest.approx(0.09))


def test_the_pressure_of_plain_numbers_is_exact() -> None:
    assert fn.sparsity_lagrangian(0.1, 0.5, 10.0, 4.0).item() == pytest.approx(10 * 0.4 + 4 * 0.16)
    one = torch.tensor(10.0, dtype=torch.float64)
    assert fn.sparsity_lagrangian(0.1, 0.5, one, one).item() == pytest.approx(5.6, rel=1e-14)


def test_manual_inheritance_equals_the_authors_exactly() -> None:
    teacher = {
        name.removeprefix("case3/in/teacher."): torch.from_numpy(PARITY[name])
        for name in PARITY
        if name.startswith("case3/in/teacher.")
    }
    expected = {
        name.removeprefix("case3/out/student."): torch.from_numpy(PARITY[name])
        for name in PARITY
        if name.startswith("case3/out/student.")
    }
    found = fn.inherit_weights(
        {name: torch.zeros_like(value) for name, value in expected.items()}, teacher, int(number(3, "head_dim"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name.removeprefix("case4/weight/"): torch.from_numpy(PARITY[name]).to(dtype)
        for name in PARITY
        if name.startswith("case4/weight/")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_block_equals_the_authors(dtype: torch.dtype) -> None:
    z = [get(4, f"in/{name}", dtype) for name in ("hidden_z", "heads_z", "intermediate_z")]
    found = fn.masked_transformer_block(
        get(4, "in/x", dtype), weights(dtype), *z, int(number(4, "num_heads")), bool(number(4, "causal"))
    )
    torch.testing.assert_close(found, get(4, "out/y", dtype), **close(dtype))


@pytest.mark.parametrize("absent", ["nothing", "heads", "neurons"])
def test_a_cut_block_computes_what_the_masked_block_does(absent: str) -> None:
    hidden, heads, neurons = (get(4, f"in/{name}") for name in ("hidden_z", "heads_z", "intermediate_z"))
    heads, neurons = heads * (absent != "heads"), neurons * (absent != "neurons")
    x, whole = get(4, "in/x"), weights(torch.float64)
    masked = fn.masked_transformer_block(x, whole, hidden, heads, neurons, 2, True)
    at = hidden.nonzero().flatten()
    cut = cut_transformer_block(whole, hidden, heads, neurons)
    smaller = fn.masked_transformer_block(x[..., at], cut, None, None, None, int((heads != 0).sum()), True)
    torch.testing.assert_close(smaller, masked[..., at], rtol=1e-12, atol=1e-12)
    assert torch.equal(masked[..., hidden == 0], x[..., hidden == 0])


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_cut_tower_computes_what_the_masked_tower_does(kind: str) -> None:
    torch.manual_seed(0)
    shape = Shape.whole(16, 3, 8)
    tower = ImageTower(shape, 8) if kind == "image" else TextTower(shape, 20, 6)
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    inputs = (torch.randn(3, 3, 8, 8),) if kind == "image" else (torch.randint(20, (3, 6)), mask)
    tower.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    tower.gates = Gates(shape).double()
    for _ in range(2):  # once more, from the tower that was cut
        assert tower.gates is not None
        for value in (tower.gates.hidden, tower.gates.heads, tower.gates.neurons):
            value.data.uniform_(-5, 4)
        tower.gates.heads.data[1], tower.gates.neurons.data[2] = -9.0, -9.0
        masked, cut = tower.eval()(*inputs), tower.cut().eval()
        at = [tower.shape.kept[0].index(channel) for channel in cut.shape.kept[0]]
        assert 0 < cut.dim < tower.dim
        assert cut.shape.kept[1][1] == cut.shape.kept[2][2] == ()
        torch.testing.assert_close(cut(*inputs), masked[:, at], rtol=1e-12, atol=1e-12)
        tower = cut
        tower.gates = Gates(tower.shape).double()


def test_a_unit_that_was_cut_stays_cut_and_one_channel_always_stays() -> None:
    shape = Shape.whole(16, 1, 8)
    shape = Shape(16, 64, 2, 1, 8, ((1, 2), ((0,),), ((3, 5),)))
    gates = Gates(shape)
    assert [len(z) for z in (gates.masks().hidden, *gates.masks().heads, *gates.masks().neurons)] == [2, 1, 2]
    assert gates.logits()[0].isinf().sum() == 14
    size = gates.expected_size().item()
    assert size == pytest.approx(2 * 1 * (4 * 16 * 16 + 4 * 16) / 2 / 16 + 2 * 2 * 2, rel=1e-3)
    gates.hidden.data.fill_(-9)
    assert (gates.masks().hidden != 0).tolist() == [True, False]


def test_leading_units_replace_as_many_learned_ones() -> None:
    gates = Gates(Shape.whole(16, 1, 8))
    gates.hidden.data[:4] = -9
    gates.heads.data[0, 0] = -9
    gates.lead()
    masks = gates.eval().masks()
    assert masks.hidden.tolist() == [1.0] * 12 + [0.0] * 4
    assert masks.heads[0].tolist() == [1.0, 0.0]


# --- edges


def test_loss_of_one_pair_is_zero_and_equal_rows_give_the_logarithm() -> None:
    one = torch.ones(1, 1, requires_grad=True)
    found = fn.affinity_mimicking_loss(one, one, 50.0, one, one, 50.0).loss
    assert found.item() == 0
    same = F.normalize(torch.ones(5, 3), dim=1)
    assert fn.affinity_mimicking_loss(same, same, 50.0, same, same, 50.0).loss.item() == pytest.approx(np.log(5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_text": torch.ones(2, 4)}, "student_text"),
        ({"teacher_text": torch.ones(3, 2)}, "teacher_text"),
        ({"teacher_image": torch.ones(3, 2), "teacher_text": torch.ones(3, 2)}, "equally many rows"),
        ({"student_scale": 0.0}, "student_scale"),
        ({"teacher_scale": -1.0}, "teacher_scale"),
        ({"student_image": torch.ones(0, 3), "student_text": torch.ones(0, 3)}, "student_image"),
    ],
)
def test_bad_rows_and_scales_are_named(changed: dict[str, Any], message: str) -> None:
    good = {
        "student_image": torch.ones(2, 3), "student_text": torch.ones(2, 3), "student_scale": 1.0,
        "teacher_image": torch.ones(2, 2), "teacher_text": torch.ones(2, 2), "teacher_scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fn.affinity_mimicking_loss(**(good | changed))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"resblocks.0.w": (2,), "resblocks.1.w": (2,), "resblocks.2.w": (2,)}, "more than the teacher's 2"),
        ({"resblocks.0.w": (5,)}, "does not fit"),
        ({"missing": (2,)}, "would stay empty"),
        ({"resblocks.0.w": (2, 2)}, "does not fit"),
        ({"attn.in_proj_bias": (10,)}, "head_dim 4"),
    ],
)
def test_a_student_that_cannot_be_filled_is_refused(student: dict[str, tuple[int, ...]], message: str) -> None:
    teacher = {f"resblocks.{n}.w": torch.ones(4) for n in range(2)} | {"attn.in_proj_bias": torch.ones(24)}
    with pytest.raises(ValueError, match=message):
        fn.inherit_weights({name: torch.zeros(shape) for name, shape in student.items()}, teacher, 4)


def test_a_mask_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one channel"):
        fn.masked_transformer_block(
            get(4, "in/x"), weights(torch.float64), torch.zeros(8).double(), None, None, 2, True
        )


# --- training

DATA = "styled-shapes?train=32&valid=16&test=16&size=8"
TOWERS: dict[str, Any] = {
    "image_encoder": "tower-16-2-8", "text_encoder": "tower-16-2-8", "embedding": 12, "context": 8, "recipe": "none",
    "batch_size": 16, "epochs": 1, "evaluate_every": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    experiment = Experiment.resolve("clip", DATA, overrides=TOWERS)
    run = Run.create(tmp_path_factory.mktemp("teacher"), experiment.record(0), "teacher")
    experiment.run(0, run=run)
    return f"run:{run.path}"


def settings(teacher: str, /, **changed: Any) -> dict[str, Any]:
    small = {"image_encoder": "tower-8-1-8", "text_encoder": "tower-8-1-8", "sparsity_steps": 2, "keep": [0.6, 0.3]}
    return TOWERS | small | {"teacher": teacher, "mask_epochs": 1, "mask_lr": 2.0} | changed


def experiment_of(teacher: str, /, **changed: Any) -> Experiment:
    return Experiment.resolve("tinyclip", DATA, overrides=settings(teacher, **changed))


def trained(teacher: str, /, **changed: Any) -> tuple[Any, list[dict[str, float]]]:
    experiment = experiment_of(teacher, **changed)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    return learner, fit(learner, task, evaluate_every=9)


def test_training_calls_the_functions_that_pass(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterpoint.core import hard_concrete
    from counterpoint.encoders import towers

    calls: list[str] = []

    def note(module: Any, name: str) -> None:
        before = getattr(module, name)

        def noted(*values: Any, **named: Any) -> Any:
            calls.append(name)
            return before(*values, **named)

        monkeypatch.setattr(module, name, noted)

    for name in ("affinity_mimicking_loss", "sparsity_lagrangian"):
        note(file, name)
    note(tower_pairs, "inherit_weights")
    for name in ("hard_concrete_sample", "hard_concrete_eval_mask", "expected_model_size"):
        note(hard_concrete, name)
    for name in ("masked_transformer_block", "cut_transformer_block"):
        note(towers, name)
    trained(teacher, inherit="auto", keep=[0.5])
    assert {"affinity_mimicking_loss", "sparsity_lagrangian", "hard_concrete_sample", "hard_concrete_eval_mask"} <= {
        *calls
    }
    assert {"expected_model_size", "masked_transformer_block", "cut_transformer_block"} <= {*calls}
    trained(teacher, inherit="manual")
    assert "inherit_weights" in calls


def test_masks_move_downhill_and_multipliers_uphill(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    drawn: list[Tensor] = []
    before = file.TinyCLIP.end_step

    def noted(self: Any) -> None:
        before(self)
        seen.extend([one.multipliers.detach().clone() for one in self.gates()])
        assert all(float(one.hidden.detach().max()) <= np.log(100) + 1e-6 for one in self.gates())
        drawn.extend(one.drawn["hidden"] for one in self.gates()[:1])

    monkeypatch.setattr(file.TinyCLIP, "end_step", noted)
    learner, rows = trained(teacher, inherit="auto", keep=[0.5], mask_epochs=3, epochs=1)
    assert bool((seen[-1] > seen[0]).all())
    assert not torch.equal(drawn[0], drawn[1])
    masked = [row["train/sparsity"] for row in rows if "train/sparsity" in row]
    assert masked[-1] > masked[0] + 0.05
    assert not learner.gates()


def test_each_stage_cuts_what_the_stage_before_left(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[Shape, ...]] = []
    before = file.TinyCLIP.cut

    def noted(self: Any, leading: bool, survey: Any) -> None:
        with torch.no_grad():
            batch = self.survey.batch("valid", np.arange(4))
            self.eval()
            masked = self.embed(batch)
            before(self, leading, survey)
            self.eval()
            found = self.embed(batch)
            for name, value in masked.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        shapes.append(tuple(one.shape for one in self.towers()))

    monkeypatch.setattr(file.TinyCLIP, "cut", noted)
    learner, rows = trained(teacher, inherit="auto", mask_epochs=4, keep=[0.8, 0.1])
    assert len(shapes) == 2
    for first, second in zip(*shapes, strict=True):
        assert set(second.kept[0]) <= set(first.kept[0])
        assert sum(map(len, (*second.kept[1], *second.kept[2]))) < sum(map(len, (*first.kept[1], *first.kept[2])))
        assert all(set(b) <= set(a) for n in (1, 2) for a, b in zip(first.kept[n], second.kept[n], strict=True))
    assert rows[-1]["test/image_parameters"] == learner.towers()[0].size
    assert 0 < rows[-1]["test/kept_share"] < 0.5


@pytest.mark.parametrize(("rate", "missed"), [(0.02, True), (2.0, False)])
def test_the_page_tells_whether_the_masks_reached_the_budget(teacher: str, rate: float, missed: bool) -> None:
    learner, _ = trained(teacher, inherit="auto", keep=[0.5], mask_lr=rate, mask_epochs=6)
    (table,) = tower_figures.units_left(dict(zip("ab", learner.towers(), strict=True)), 0.5).values()
    assert "the budget is 50%" in table["caption"]
    assert ("did not reach it: raise --mask-epochs" in table["caption"]) == missed


def test_figures_compare_affinities_of_pairs_that_have_both_modalities(teacher: str) -> None:
    experiment = experiment_of(teacher, inherit="none")
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    found = learner.eval().figures(learner.survey)
    assert found.keys() == {"Affinities of the student", "Affinities of the teacher"}
    assert all(np.allclose(np.sum(one["values"], 1), 1, atol=0.01) for one in found.values())
    assert len(found["Affinities of the teacher"]["names"]) == 12


def test_manual_inheritance_begins_with_the_teachers_leading_weights(teacher: str) -> None:
    learner, _ = trained(teacher, inherit="manual", cut_rate=0.0, steps="tower-16-1-8/tower-16-1-8")
    large = tower_pairs.teacher_towers(teacher).learner
    for name in ("image", "text"):
        state = large.encoders[name].state_dict()
        expected = fn.inherit_weights(learner.encoders[name].state_dict(), state, 8)
        assert all(torch.equal(value, expected[key]) for key, value in learner.encoders[name].state_dict().items())
        assert torch.equal(learner.heads[name].weight, large.heads[name].weight[:12, :8])


def test_with_rates_of_zero_masks_alone_learn(teacher: str) -> None:
    learner, _ = trained(teacher, inherit="auto", keep=[0.5], masked_rate=0.0, cut_rate=0.0, choice="leading")
    large = tower_pairs.teacher_towers(teacher).learner.encoders["text"]
    width = learner.encoders["text"].dim
    assert torch.equal(learner.encoders["text"].token_embedding.weight, large.token_embedding.weight[:, :width])


def test_a_student_without_inheritance_is_of_any_kind(teacher: str) -> None:
    learner, rows = trained(
        teacher,
        inherit="none",
        image_encoder="conv-s",
        text_encoder="text-s",
        alpha=0.5,
        cached=True,
        student_scale=0.0,
    )
    assert rows[-1]["train/affinity"] > 0
    assert learner.log_scale.requires_grad
    assert learner.log_scale.item() != pytest.approx(np.log(1 / 0.07), abs=1e-7)


def test_the_teacher_s_rows_are_empty_for_a_process_without_a_whole_pair(teacher: str) -> None:
    experiment = experiment_of(teacher, inherit="none")
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    batch = next(iter(task.train_loader(0, learner.position)))
    rows = learner.taught(batch, torch.zeros(16, dtype=torch.bool), torch.float64)
    assert [(one.shape, one.dtype) for one in rows] == [((0, 12), torch.float64)] * 2


@pytest.mark.parametrize("inherit", ["none", "manual", "auto"])
def test_a_run_measures_its_teacher_as_the_teacher_s_own_run_did(teacher: str, inherit: str) -> None:
    of_teacher = Run.open(teacher.removeprefix("run:")).metrics()[-1]
    _, rows = trained(teacher, inherit=inherit)
    for name in ("mean_recall", "image_zero_shot"):
        assert rows[-1][f"test/teacher_{name}"] == pytest.approx(of_teacher[f"test/{name}"])


@pytest.fixture(scope="module")
def whole_runs(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Experiment, Run]]:
    found = {}
    for inherit in ("auto", "manual"):
        experiment = experiment_of(teacher, inherit=inherit, steps="tower-8-2-8/tower-16-1-8")
        run = Run.create(tmp_path_factory.mktemp("whole"), experiment.record(0), inherit)
        experiment.run(0, run=run)
        found[inherit] = experiment, run
    return found


@pytest.mark.parametrize(("inherit", "stop"), [("auto", 1), ("auto", 3), ("auto", 5), ("auto", 7), ("manual", 3)])
def test_an_interrupted_run_resumes_bit_for_bit_in_each_stage(
    whole_runs: dict[str, tuple[Experiment, Run]], tmp_path: Path, inherit: str, stop: int
) -> None:
    experiment, whole = whole_runs[inherit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_shown", lambda run, say: run)  # the page takes seconds
        cut = cut_and_resumed(experiment, file.TinyCLIP, stop, tmp_path)
    ours, theirs = cut.load_weights(), whole.load_weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert load_learner(cut).structure() == load_learner(whole).structure() != {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": [0.5, 0.75]}, "falling shares"),
        ({"keep": [1.0]}, "between 0 and 1"),
        ({"alpha": 1.5}, "alpha"),
        ({"mask_lr": 0.0}, "mask_lr"),
        ({"student_scale": -1.0}, "student_scale"),
        ({"inherit": "manual", "steps": "tower-8-1-8"}, "IMAGE/TEXT"),
        ({"inherit": "manual", "image_encoder": "conv-s"}, "is no tower"),
        ({"image_encoder": "tower-9-1-8"}, "multiple of the heads"),
        ({"teacher": "hf:x", "inherit": "auto"}, "needs a teacher with towers"),
        ({"teacher": "file:x.npz"}, "name a network"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        experiment_of("run:x", **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"inherit": "manual", "image_encoder": "tower-8-4-8"},
            "more than the teacher's 2.* choose a smaller --image-encoder",
        ),
        ({"inherit": "manual", "text_encoder": "tower-64-1-8"}, "does not fit.* choose a smaller --text-encoder"),
        ({"inherit": "manual", "image_encoder": "tower-8-1-4"}, "heads of tower-8-1-4 are 4 channels wide"),
        ({"inherit": "manual", "image_encoder": "tower-8-1-8-2"}, "in patches of 2"),
        ({"inherit": "manual", "embedding": 64}, "use --embedding 12 or less, got 64"),
        ({"inherit": "manual", "context": 12}, "use --context 8 or less, got 12"),
        ({"inherit": "auto", "context": 12}, "8 tokens"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_refused(
    teacher: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CounterpointError, match=message):
        trained(teacher, **changed)


def test_a_teacher_without_towers_teaches_but_leaves_nothing(tmp_path: Path) -> None:
    experiment = Experiment.resolve("clip", DATA, overrides=TOWERS | {"image_encoder": "conv-s"})
    run = Run.create(tmp_path, experiment.record(0), "teacher")
    experiment.run(0, run=run)
    with pytest.raises(CounterpointError, match=r"cannot inherit from the teacher .* conv-s"):
        trained(f"run:{run.path}", inherit="auto")
    trained(f"run:{run.path}", inherit="none")


def test_a_masked_step_in_parts_is_the_step_of_the_whole_batch(teacher: str) -> None:
    found = []
    for parts in (1, 3):
        experiment = experiment_of(teacher, inherit="auto", keep=[0.5], optimizer="sgd", cut_rate=0.0)
        task = experiment.task()
        learner = experiment.learner(task.facts, 0)
        fit(learner, task, loop=Loop(accumulate=parts), evaluate_every=9)
        found.append(learner)
    assert found[0].structure() == found[1].structure()
    for name, value in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_user_s_own_pictures_and_captions_train_a_student(teacher: str, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = ["image,text"]
    for n in range(60):
        Image.fromarray(rng.integers(0, 255, (10, 10, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,a photo of thing {n}")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    experiment = Experiment.resolve(
        "tinyclip", f"manifest:{tmp_path}/mine.csv?size=8", overrides=settings(teacher, inherit="auto", keep=[0.5])
    )
    rows = experiment.run(0)
    assert np.isfinite(rows[-1]["test/mean_recall"])


def test_a_tower_of_texts_exports_with_any_number_of_texts() -> None:
    tower = TextTower(Shape.whole(8, 1, 8), 20, 6).eval()
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    inputs = torch.randint(20, (3, 6)), mask
    batch = torch.export.Dim.AUTO
    made = torch.export.export(tower, inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False).module()
    torch.testing.assert_close(made(*(x[:2] for x in inputs)), tower(*inputs)[:2])
    assert not tower(*inputs)[2].any()
