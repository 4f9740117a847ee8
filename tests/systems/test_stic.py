"""STIC: the authors' numbers, identities, pairs, stages, resuming, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import Answer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import stic
from counterpoint.views.transformed import damaged
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "stic.npz")
DATA = "grid-chats?train=16&valid=4&test=4&grid=2&cell=8&most=2&styles=1&unlabelled=12"
SMALL: dict[str, Any] = {
    "model": "llava-16-2-2",
    "vocabulary": 300,
    "context": 96,
    "epochs": 1,
    "batch_size": 16,
    "new_tokens": 5,
    "rank": 2,
    "preference_epochs": 2,
    "description_epochs": 1,
    "pictures": 12,
    "described_chats": 10,
    "pair_sampling": 1.0,
}
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
NAMES = ("policy_chosen_logits", "policy_rejected_logits", "reference_chosen_logits", "reference_rejected_logits")


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


@TYPES
@pytest.mark.parametrize("scoring", ["label", "runner_up"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_losses_and_gradients_equal_the_authors(number, scoring, dtype, rtol):
    at = case(number, dtype)
    given = [at[f"in/{name}"].clone().requires_grad_(name.startswith("policy")) for name in NAMES]
    losses = fn.regularized_dpo(
        *given,
        at["in/chosen_labels"],
        at["in/rejected_labels"],
        float(at["param/beta"]),
        float(at["param/alpha"]),
        scoring,
        bool(at["param/loss_is_hinge"]),
    )
    torch.testing.assert_close(losses, at[f"out/losses_{scoring}"], rtol=rtol, atol=rtol)
    losses.mean().backward()
    for name, logits in zip(NAMES[:2], given, strict=False):
        wanted = at.get(f"grad/{name}_{scoring}")
        if wanted is not None:
            torch.testing.assert_close(logits.grad, wanted, rtol=10 * rtol, atol=rtol)


def logits(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(3, tokens, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([[-100, -100, 1, 2, 3], [-100, 4, 5, 6, -100], [-100, -100, -100, 0, 1]])


def test_a_policy_equal_to_its_reference_has_the_loss_of_a_coin():
    x, y = logits(0), logits(1)
    found = fn.regularized_dpo(x, y, x, y, LABELS, LABELS, alpha=0.0)
    torch.testing.assert_close(found, torch.full_like(found, np.log(2)))


def test_the_likelihood_term_is_the_summed_log_probability():
    x, y = logits(0), logits(1)
    plain, more = (fn.regularized_dpo(x, y, x, y, LABELS, LABELS, alpha=alpha) for alpha in (0.0, 0.5))
    torch.testing.assert_close(plain - more, 0.5 * fn.answer_log_probability(x, LABELS))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"beta": 0.0}, "beta"), ({"alpha": -1.0}, "alpha"), ({"rejected_scoring": "best"}, "label or runner_up")],
)
def test_values_out_of_range_raise_an_error_that_names_the_argument(changed, said):
    with pytest.raises(ValueError, match=said):
        fn.regularized_dpo(*(logits(n) for n in range(4)), LABELS, LABELS, **changed)


# ------------------------------------------------------------------------------------------------------------- learner


def config(**changed: Any) -> Any:
    return Experiment.resolve("stic", DATA, overrides=SMALL | changed).config


def trained(folder: Path, *, name: str | None = None, **changed: Any) -> Run:
    return training.train("stic", config(**changed), data=DATA, out=folder, name=name, say=lambda _: None)


def built(**changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("stic", DATA, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_the_function_that_equals_the_authors_is_the_one_that_trains(monkeypatch):
    called = []
    real = stic.regularized_dpo
    monkeypatch.setattr(stic, "regularized_dpo", lambda *args: called.append(args[6:]) or real(*args))
    learner, task = built()
    rows = fit(learner, task, bar=False)
    assert set(called) == {(0.1, 1 / 1024, "label")}
    assert len(called) >= 2
    assert {"train/chosen_reward", "train/rejected_reward", "train/reward_accuracy"} <= set(rows[1])


def test_preferences_train_the_adapter_alone_and_the_reference_stays():
    learner, task = built(description_epochs=0)
    kept: dict[str, Tensor] = {}

    def note(epoch: int) -> None:
        if not kept:
            kept.update({n: v.clone() for n, v in learner.named_parameters()})

    learner.end_epoch = note
    fit(learner, task, bar=False)
    after = dict(learner.named_parameters())
    assert all(torch.equal(after[name], kept[name]) for name in after if "lora_" not in name)
    assert any(not torch.equal(after[name], kept[name]) for name in after if "lora_" in name)


def test_pairs_name_their_pictures_and_differ():
    learner, task = built()
    fit(learner, task, bar=False)
    assert len(learner.pairs) + learner.left_out == 12
    assert all(good != bad and good and bad for _, _, good, bad, _ in learner.pairs)
    assert {how for *_, how in learner.pairs} <= {"inventive question", "damaged picture"}
    assert learner.descriptions


@pytest.mark.parametrize("at", [2, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch, at):
    need_equal_ends(monkeypatch, stic.STIC, "stic", config(), DATA, at, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "stic", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = trained(tmp_path, name="one").metrics(), Run.open(tmp_path / "two").metrics()
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        for name in {"train/loss", "train/chosen_reward", "train/rejected_reward"} & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


@pytest.mark.usefixtures("drawn")
def test_a_saved_run_keeps_its_pairs_and_shows_them(tmp_path):
    run = trained(tmp_path)
    learner: Any = load_learner(run)
    assert learner.pairs
    assert "Preferences of its own" in run.figures()


def test_a_finished_model_learns_preferences_without_chats(tmp_path):
    first = trained(tmp_path, preference_epochs=0, description_epochs=0)
    second = trained(tmp_path, model=f"run:{first.path}", epochs=0, description_epochs=0)
    one, other = load_learner(first).state_dict(), load_learner(second).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_" not in name)


def test_questions_longer_than_the_context_are_refused_before_training(tmp_path):
    with pytest.raises(CounterpointError, match=r"'<image> long .* need \d+ tokens, .* set --context \d+ or more"):
        trained(tmp_path, guided="long " * 200)
    assert not list(tmp_path.glob("*/metrics.csv"))


def test_chats_that_exceed_the_context_with_their_description_are_counted(monkeypatch):
    real, said = stic.STIC.answers, []

    def long(self: Any, prompts: Any, **more: Any) -> Any:
        found = real(self, prompts, **more)
        return [found[0]._replace(text="brick " * 200), *found[1:]] if more.get("draw") == 2_000_000 else found

    monkeypatch.setattr(stic.STIC, "answers", long)
    learner, task = built()
    fit(learner, task, bar=False, say=said.append)
    assert len(learner.descriptions) == 9
    assert any("1 of 10 chats and their descriptions exceed --context" in line for line in said)


def test_a_description_goes_before_the_question_and_the_marks_stay_in_front():
    prompt = Prompt((Message("user", f"{IMAGE} is there a brick ?"),), (np.zeros((8, 8, 3), np.uint8),))
    found = stic.described(prompt, "brick , pond .")
    assert found.messages[0].text == f"{IMAGE} Image description: brick , pond . is there a brick ?"
    assert len(found.pictures) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_picture_keeps_its_shape_and_changes(seed):
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    found = damaged(picture, torch.Generator().manual_seed(seed))
    assert found.shape == picture.shape
    assert not np.array_equal(found, picture)


def test_equal_answers_leave_no_pair_and_the_error_names_the_mend(monkeypatch):
    learner, task = built()
    same = [Answer("same", ("same",), (1.0,), ((),), True)]
    monkeypatch.setattr(type(learner), "answers", lambda self, prompts, **_: same * len(prompts))
    with pytest.raises(CounterpointError, match=r"all 12 pairs have equal or empty answers.*raise --pair-sampling"):
        fit(learner, task, bar=False)


def test_data_without_pictures_are_refused(tmp_path):
    data = "misconceptions?entities=8&relations=1&values=5&train=40"
    chosen = Experiment.resolve("stic", data, overrides=SMALL | {"model": "llama-16-2-2"}).config
    with pytest.raises(DataError, match="these data have none"):
        training.train("stic", chosen, data=data, out=tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"objective": "ppo"}, "unknown objective"),
        ({"ordinary": ()}, "at least one question"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(changed, said):
    with pytest.raises(CounterpointError, match=said):
        config(**changed)
