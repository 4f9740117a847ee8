"""LOL: the numbers of DoLa and ICD, special cases, branches through one adapter, training, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import data, training
from counterpoint import functional as fn
from counterpoint.core.decoding import FLOOR
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import instructed
from counterpoint.encoders.messages import Message
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import lol
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "lol.npz")
DATA = "misconceptions?entities=8&relations=1&values=5&train=40"
SMALL = {
    "model": "llama-16-3-2",
    "vocabulary": 300,
    "context": 40,
    "epochs": 1,
    "batch_size": 16,
    "new_tokens": 4,
    "rank": 2,
    "compare": (),
}
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    first, last = int(found["param/prompt_len"]) - 1, found["in/input_ids"].shape[1] - 1
    cut = {k: v[:, first:last][0].to(dtype) for k, v in found.items() if k.endswith("final_logits")}
    early = found["in/expert_early_logits"][:, 0, first:last].to(dtype)
    return found | cut | {"in/expert_early_logits": early, "answer": found["in/input_ids"][0, first + 1 :]}


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_scores_of_answers_equal_the_authors(number, dtype, rtol):
    at = case(number, dtype)
    given = at["answer"], float(at["param/relative_top"]), bool(at["param/post_softmax"])
    expert, early = at["in/expert_final_logits"], at["in/expert_early_logits"]
    chosen = fn.select_premature_layer(expert, early)
    assert torch.bincount(chosen, minlength=len(early)).tolist() == at["out/dola_layer_counts"].tolist()
    others = {
        "icd": at["in/amateur_final_logits"],
        "dola_static": early[0],
        "dola_dynamic": early[chosen, torch.arange(len(chosen))],
    }
    for name, other in others.items():
        found = fn.contrastive_answer_score(expert, other, *given)
        torch.testing.assert_close(found, at[f"out/{name}_score"].to(dtype), rtol=rtol, atol=0)


def logits(seed: int) -> Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_lower_layer_and_instruction_it_is_icd():
    x, amateur = logits(0), logits(1)
    found = fn.fused_scores(x, x, amateur, omega=0.0, beta=0.0)
    torch.testing.assert_close(found, x.log_softmax(1) - amateur.log_softmax(1))


def test_gamma_minus_one_makes_the_instruction_irrelevant():
    x, amateur = logits(0), logits(1)
    given = {"omega": 0.4, "gamma": -1.0, "beta": 0.1}
    one, other = (
        fn.fused_scores(x, logits(n), amateur, logits(3), logits(n + 1), logits(4), **given) for n in (10, 20)
    )
    torch.testing.assert_close(one, other)


def test_an_amateur_equal_to_the_model_scores_all_plausible_tokens_zero():
    x, early = logits(0), logits(1)
    found = fn.fused_scores(x, x, x, early, early, early, gamma=0.0, beta=0.1)
    assert found[found.isfinite()].abs().max() < 1e-12


def test_constants_of_rows_change_nothing():
    given = [logits(n) for n in range(6)]
    moved = [x + 5 * torch.arange(3)[:, None] for x in given]
    torch.testing.assert_close(fn.fused_scores(*moved), fn.fused_scores(*given))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"gamma": -2.0}, "gamma"), ({"omega": 0.3}, "logits of the lower layer"), ({"beta": 2.0}, "beta")],
)
def test_values_out_of_range_raise_an_error_that_names_the_argument(changed, said):
    with pytest.raises(ValueError, match=said):
        fn.fused_scores(logits(0), logits(1), logits(2), **{"omega": 0.0} | changed)


# ------------------------------------------------------------------------------------------------------------- learner


def trained(folder: Path, data: str = DATA, **changed: Any) -> Run:
    config = Experiment.resolve("lol", data, overrides=SMALL | changed).config
    return training.train("lol", config, data=data, out=folder, say=lambda _: None)


def built(**changed: Any) -> tuple[Any, Any]:
    experiment = Experiment.resolve("lol", DATA, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_each_stage_trains_its_own_weights():
    learner, task = built()
    before = {name: value.clone() for name, value in learner.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    learner.end_epoch = lambda epoch: seen.append({n: v.clone() for n, v in learner.named_parameters()})
    fit(learner, task, bar=False)
    after_model, after_amateur = seen
    adapted = [name for name in before if "lora_" in name]
    assert all(torch.equal(after_model[name], before[name]) for name in adapted)
    assert any(not torch.equal(after_model[name], before[name]) for name in before if "lora_" not in name)
    assert all(torch.equal(after_amateur[name], after_model[name]) for name in before if "lora_" not in name)
    assert any(not torch.equal(after_amateur[name], after_model[name]) for name in adapted)


def test_branches_of_one_batch_equal_passes_of_their_own():
    learner, task = built()
    fit(learner, task, bar=False)
    learner.eval()
    prompts = [Prompt((Message("user", text),)) for text in ("capital of e1 ?", "capital of e3 ?")]
    found = learner.answers(prompts, decoder=learner.rule("lol"), temperature=0.0)
    model, config = learner.model, learner.config
    for prompt, answer in zip(prompts, found, strict=True):
        given: list[int] = []
        for _ in answer.tokens:
            parts = []
            for kind in ("plain", "guided", "amateur"):
                one = instructed(prompt, config.instruction) if kind == "guided" else prompt
                ids = torch.tensor([[*model.tokenizer.prompt(one.messages), *given]])
                with torch.no_grad():
                    if kind == "amateur":
                        out = model.model(input_ids=ids, output_hidden_states=True)
                    else:
                        with model.model.disable_adapter():
                            out = model.model(input_ids=ids, output_hidden_states=True)
                    network = model.network
                    lower = network.lm_head(network.model.norm(out.hidden_states[1]))
                parts.append((out.logits[:, -1], lower[:, -1]))
            last, early = zip(*parts, strict=True)
            given.append(int(fn.fused_scores(*last, *early, config.omega, config.gamma, config.beta).argmax()))
        assert answer.tokens == tuple(model.tokenizer.words(given))


def test_the_function_of_the_equations_is_the_one_that_decodes_and_scores(tmp_path, monkeypatch):
    called = []
    real = lol.fused_scores
    monkeypatch.setattr(lol, "fused_scores", lambda *args: called.append(args[6:]) or real(*args))
    last = trained(tmp_path, compare=("icd", "dola", "fusion", "refocus", "instructed", "plain")).metrics()[-1]
    assert (0.3, 0.5, 0.1, -np.inf) in called
    assert (0.3, 0.5, 0.0, FLOOR) in called
    assert {"test/choice_accuracy", "test/icd_choice_accuracy", "test/dola_choice_accuracy"} <= set(last)


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    config = Experiment.resolve("lol", DATA, overrides=SMALL).config
    need_equal_ends(monkeypatch, lol.LOL, "lol", config, DATA, (1, 4), tmp_path)


def test_a_saved_run_scores_as_the_learner_did(tmp_path):
    run = trained(tmp_path)
    learner: Any = load_learner(run)
    task = Experiment.of_run(run).task()
    options = Survey(task, learner).batch("test", [0, 1])["options"]
    with torch.no_grad():
        one, other = learner.option_scores(options, "lol"), learner.option_scores(options, "icd")
    assert one.shape == other.shape == (4,)
    assert not torch.equal(one, other)


def test_preferences_of_your_own_are_shown_by_method_and_equal_ones_are_named(tmp_path):
    colours = ("red", "blue", "green")
    lines = [
        {"prompt": f"what is {n} ?", "chosen": colours[n % 3], "rejected": colours[(n + (n > 0)) % 3]}
        for n in range(24)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "what ?", "chosen": "red", "rejected": " "}])))
    run = trained(tmp_path, f"chats:{file}", instruction="")
    table = run.figures()["Truth by method"]
    assert table["columns"][2:] == ["plain", "instructed", "icd", "lol"]
    assert 0 < len(table["rows"]) <= 6
    notes = data.load(f"chats:{file}").notes
    assert any("1 preference pair has two equal answers" in note and "own.jsonl row 1 " in note for note in notes)
    assert any("has an empty rejected answer" in note for note in notes)


def test_pairs_that_are_all_equal_are_refused(tmp_path):
    lines = [{"prompt": f"what is {n} ?", "chosen": "red", "rejected": "red"} for n in range(12)]
    file = tmp_path / "equal.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(DataError, match="no training chat has one"):
        trained(tmp_path, f"chats:{file}", context=64)


def test_data_without_rejected_answers_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no training chat has one; add a field rejected"):
        trained(tmp_path, "misconceptions?entities=8&relations=1&values=5&train=40&guided=1.0")


def test_questions_that_fit_only_without_the_instruction_are_refused_before_training(tmp_path):
    longer = {"instruction": "be truthful " * 15}
    with pytest.raises(
        DataError, match=r"valid chats under the instruction with 4 new tokens exceed the context of 40"
    ):
        trained(tmp_path, DATA, **longer, method="lol")
    trained(tmp_path, DATA, **longer, method="icd")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "cad"}, "unknown method"),
        ({"layer": 3}, "takes a layer from 1 to 2"),
        ({"gamma": -1.5}, "gamma must be at least -1"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(tmp_path, changed, said):
    with pytest.raises(CounterpointError, match=said):
        trained(tmp_path, **changed)
