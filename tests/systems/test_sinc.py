"""SINC: the authors' numbers, identities, draws, resuming, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.data import load
from counterpoint.data.episodes import EpisodeData, EpisodeSplit
from counterpoint.encoders.in_context import InContextNetwork
from counterpoint.encoders.text import train_bpe
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.language import sinc
from counterpoint.tasks.episodes import EpisodesTask, demonstrations, fewer, name_tokens, neighbours_of
from counterpoint.tasks.measures.episodes import EpisodeEvaluator
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "sinc.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
GIVEN = ("query_features", "demo_features", "demo_labels", "class_tokens", "class_token_mask")


def case(number: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def causal(x: Tensor) -> Tensor:
    """Return the mean of the positions up to each: the meta-model of the authors' numbers."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def arguments(at: dict[str, Tensor], **changed: Any) -> tuple[list[Any], dict[str, Any]]:
    weights = {k.removeprefix("weight/"): v for k, v in at.items() if k.startswith("weight/")}
    more = {
        "num_heads": int(at["param/num_heads"]),
        "layer_norm_eps": float(at["param/layer_norm_eps"]),
        "correlation_token": bool(at["param/correlation_token"]),
    }
    return [*(at[f"in/{name}"] for name in GIVEN), weights, causal], more | changed


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_logits_loss_and_gradients_equal_the_authors(number, dtype, rtol):
    at = case(number, dtype)
    given, more = arguments(at)
    for features in given[:2]:
        features.requires_grad_()
    logits = fn.in_context_classifier(*given, **more)
    torch.testing.assert_close(logits[:, -1], at["out/query_logits"], rtol=rtol, atol=rtol)
    torch.testing.assert_close(logits[:, :-1], at["out/demo_logits"], rtol=rtol, atol=rtol)
    loss = F.cross_entropy(logits[:, -1], at["in/query_labels"])
    torch.testing.assert_close(loss, at["out/loss"], rtol=rtol, atol=rtol)
    loss.backward()
    for features, name in zip(given[:2], GIVEN, strict=False):
        torch.testing.assert_close(features.grad, at[f"grad/{name}"], rtol=100 * rtol, atol=1e-3 * rtol)


# ----------------------------------------------------------------------------------------------------------- equations


def test_permuted_classes_permute_the_logits():
    given, more = arguments(case(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    other = [*given[:2], order.argsort()[given[2]], given[3][order], given[4][order], *given[5:]]
    torch.testing.assert_close(
        fn.in_context_classifier(*other, **more), fn.in_context_classifier(*given, **more)[:, :, order]
    )


def test_scaled_weights_of_the_classifier_scale_the_logits():
    given, more = arguments(case(0))
    scaled = {k: 3 * v if k.startswith("classifier.dense.") else v for k, v in given[5].items()}
    found = fn.in_context_classifier(*given[:5], scaled, causal, **more)
    torch.testing.assert_close(found, 3 * fn.in_context_classifier(*given, **more))


def test_demonstrations_equal_to_the_query_correlate_as_no_demonstrations_do():
    given, more = arguments(case(0))
    seen: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        seen.append(x[:, 0])
        return causal(x)

    same = given[0][:, None].expand(-1, 4, -1, -1)
    fn.in_context_classifier(given[0], same, *given[2:6], first, **more)
    none = fn.in_context_classifier(given[0], same[:, :0], given[2][:, :0], *given[3:6], first, **more)
    torch.testing.assert_close(seen[0], seen[1])
    assert none.shape == (3, 1, 9)


def test_without_demonstrations_and_correlation_the_query_is_alone():
    given, more = arguments(case(1))
    found = fn.in_context_classifier(given[0], given[1][:, :0], given[2][:, :0], *given[3:], **more)
    assert found.shape == (2, 1, 5)
    assert found.isfinite().all()


def test_the_query_alone_has_the_last_logits():
    given, more = arguments(case(0))
    alone = fn.in_context_classifier(*given, **more, query_alone=True)
    torch.testing.assert_close(alone, fn.in_context_classifier(*given, **more)[:, -1:])


def test_a_missing_slot_has_no_influence():
    given, more = arguments(case(0))
    asked, demos = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 4, 5, dtype=torch.bool)
    asked[0, 2], demos[:, 1, 0] = False, False
    one = fn.in_context_classifier(*given, **more, query_slots=asked, demo_slots=demos)
    moved = [given[0].clone(), given[1].clone(), *given[2:]]
    moved[0][0, 2], moved[1][:, 1, 0] = 7.0, -7.0
    torch.testing.assert_close(fn.in_context_classifier(*moved, **more, query_slots=asked, demo_slots=demos), one)
    every = fn.in_context_classifier(*given, **more, query_slots=torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(every, fn.in_context_classifier(*given, **more))


def test_one_class_has_the_loss_0():
    given, more = arguments(case(0))
    logits = fn.in_context_classifier(*given[:2], given[2] * 0, given[3][:1], given[4][:1], *given[5:], **more)
    assert float(F.cross_entropy(logits[:, -1], torch.zeros(3, dtype=torch.int64))) == 0


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (4, torch.tensor([[1, 0, 0]] * 8 + [[0, 0, 0]]), "class_token_mask has no token for class 8"),
        (2, torch.full((3, 4), 9), r"demo_labels must lie in 0\.\.8"),
        (2, torch.zeros(3, 3, dtype=torch.int64), "demo_features"),
        (1, torch.zeros(3, 4, 5, 9, dtype=torch.float64), r"\[n, demos, slots, features\]"),
        (4, torch.ones(9, 2, dtype=torch.int64), "class_tokens and class_token_mask must be"),
        (0, torch.zeros(0, 5, 10, dtype=torch.float64), "query_features"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error_that_names_them(place, value, said):
    given, more = arguments(case(0))
    given[place] = value
    with pytest.raises(ValueError, match=said):
        fn.in_context_classifier(*given, **more)


def test_the_network_has_the_authors_names_and_a_meta_model_that_is_causal():
    network = InContextNetwork(10, torch.randn(14, 8), 8, "gpt2-6-2-2", 10, 5)
    theirs = {k.removeprefix("case0/weight/") for k in PARITY.files if k.startswith("case0/weight/")}
    unused = {f"fuser.attention_layers.0.attention.self.{name}" for name in ("query", "key")}
    assert set(network.weights) == {name for name in theirs if name.rpartition(".")[0] not in unused}
    x = torch.randn(2, 7, 6)
    later = x.clone()
    later[:, 5:] += 1
    torch.testing.assert_close(network.meta(x)[:, :5], network.meta(later)[:, :5])


# ------------------------------------------------------------------------------------------------------------- learner

DATA = "latent-classes?classes=12&unseen=4&each=3&held=3&slots=2&missing=0.2&width=6"
SMALL: dict[str, Any] = {
    "meta": "gpt2-8-1-2",
    "fuser": 8,
    "fuser_heads": 2,
    "word_width": 6,
    "scorer": 8,
    "demonstrations": 4,
    "neighbours": 5,
    "batch_size": 12,
    "bursty_ratio": 0.5,
    "vocabulary": 300,
    "epochs": 2,
    "evaluate_every": 1,
}


def config(data: str = DATA, **changed: Any) -> Any:
    return Experiment.resolve("sinc", data, overrides=SMALL | changed).config


def trained(folder: Path, data: str = DATA, **changed: Any) -> Run:
    return training.train("sinc", config(data, **changed), data=data, out=folder, say=lambda _: None)


def built(data: str = DATA, **changed: Any) -> tuple[Any, EpisodesTask]:
    experiment = Experiment.resolve("sinc", data, overrides=SMALL | changed)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def test_the_function_that_equals_the_authors_is_the_one_that_trains_and_classifies(monkeypatch):
    called: list[str] = []
    real = sinc.in_context_classifier
    monkeypatch.setattr(sinc, "in_context_classifier", lambda *a, **k: called.append("") or real(*a, **k))
    learner, task = built(epochs=1)
    before = {name: value.clone() for name, value in learner.network.named_parameters()}
    rows = fit(learner, task, bar=False)
    assert len(called) > 3  # three steps, and the evaluation
    assert {"valid/accuracy", "valid/shuffled_accuracy", "valid/in_weight_accuracy", "valid/neighbour_accuracy"} <= set(
        rows[-1]
    )
    still = [n for n, value in learner.network.named_parameters() if torch.equal(value, before[n])]
    assert still == []


def test_the_loss_is_that_of_the_query_alone():
    learner, task = built()
    learner.begin(survey(task, learner))
    batch = learner.prepare({"index": torch.arange(12)}, torch.Generator().manual_seed(0))
    logits = learner.logits(batch, learner.class_tokens, learner.class_token_mask)
    torch.testing.assert_close(learner.loss(batch)["loss"], F.cross_entropy(logits, batch["label"]))


def survey(task: EpisodesTask, learner: Any) -> Any:
    from counterpoint.engine.survey import Survey

    return Survey(task, learner)


def test_a_training_that_is_interrupted_ends_as_one_that_is_not(tmp_path, monkeypatch):
    need_equal_ends(monkeypatch, sinc.SINC, "sinc", config(), DATA, (0, 2, 4), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    settings = SMALL | {"batch_size": 7}  # of 36 items, the last batch of an epoch has one
    words = ["train", "sinc", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    one = training.train(
        "sinc", config(batch_size=7), data=DATA, out=tmp_path, name="one", say=lambda _: None
    ).metrics()
    two = Run.open(tmp_path / "two").metrics()
    for mine, other in zip(one, two, strict=True):
        for name in ("train/loss", "train/in_demo_share", "valid/accuracy", "valid/in_weight_accuracy"):
            if mine.get(name) is not None:
                assert other[name] == pytest.approx(mine[name], rel=2e-4), name


@pytest.mark.usefixtures("drawn")
def test_a_saved_run_answers_as_before_and_shows_its_curves(tmp_path):
    run = trained(tmp_path)
    figure = run.figures()["Accuracy by demonstrations"]
    assert figure["series"]["their labels"][0] == [0, 2, 4]
    learner = load_learner(run)
    _, task = built()
    task.check_facts(run.facts())
    batch = task.evaluation_batch("test", range(8))
    for name, value in learner.predict(batch).items():
        torch.testing.assert_close(value, load_learner(run).predict(batch)[name])


@pytest.mark.parametrize("changed", [{"demonstrations": 0}, {"correlation_token": False}, {"ways": 4}])
def test_other_prompts_learn(changed):
    learner, task = built(**changed, epochs=1)
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/loss"])
    if changed.get("ways"):
        assert task.evaluator("valid").ways == 4


def test_a_published_meta_model_and_its_words_are_used(tmp_path):
    import transformers

    tokenizer = train_bpe(["a few words to learn"] * 4, 300)
    place = tmp_path / "gpt2"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.model, pad_token="[PAD]").save_pretrained(place)
    shape = transformers.GPT2Config(
        vocab_size=tokenizer.vocabulary, n_embd=8, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2Model(shape)
    theirs.save_pretrained(place)
    learner, task = built(meta=f"hf:{place}", words=f"hf:{place}", epochs=1)
    assert torch.equal(learner.network.label_token_embeddings, theirs.wte.weight)
    assert torch.equal(learner.network.meta.body.wpe.weight, theirs.wpe.weight)
    fit(learner, task, bar=False)
    assert not torch.equal(learner.network.label_token_embeddings, theirs.wte.weight)
    with pytest.raises(CounterpointError, match="12 positions, and a prompt has 18; lower --demonstrations"):
        built(meta=f"hf:{place}", demonstrations=8)


# --------------------------------------------------------------------------------------------------------------- draws


def test_informative_demonstrations_are_balanced_and_never_the_query():
    _, task = built()
    split, rng = task.data.train, np.random.default_rng(0)
    near = neighbours_of(split, 5)
    for row in range(len(split)):
        found = demonstrations(split, row, config(label_informed=1.0), near, True, rng)
        counts = np.unique(split.labels[found], return_counts=True)[1]
        assert counts.tolist() == [2, 2]
        assert (split.labels[found] == split.labels[row]).sum() == 2
        by_data = demonstrations(split, row, config(label_informed=0.0), near, True, rng)
        assert set(by_data.tolist()) <= set(near[row].tolist())
        drawn = demonstrations(split, row, config(), near, False, rng)
        assert row not in {*found.tolist(), *by_data.tolist(), *drawn.tolist()}
        assert row not in near[row]


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_one_coin_decides_for_the_batch(ratio, share):
    learner, task = built(bursty_ratio=ratio, label_informed=1.0)
    learner.begin(survey(task, learner))
    for seed in range(5):
        batch = learner.prepare({"index": torch.arange(12)}, torch.Generator().manual_seed(seed))
        own = (batch["demo_labels"] == batch["label"][:, None]).float().mean(1)
        assert float(learner.loss(batch)["in_demo_share"]) == share
        assert (own == 0.5).all() if share else (own != 0.5).any()


def test_a_class_with_one_item_is_demonstrated_by_neighbours():
    split = EpisodeSplit(np.eye(4, dtype=np.float32)[:, None], np.array([0, 1, 1, 1]), np.ones((4, 1), bool))
    near = neighbours_of(split, 3)
    found = demonstrations(split, 0, config(label_informed=1.0), near, True, np.random.default_rng(0))
    assert set(found.tolist()) <= {1, 2, 3}


def test_episodes_have_unseen_classes_under_names_of_known_ones():
    _, task = built()
    batch = task.evaluation_batch("test", range(len(task.data.test)))
    one, shuffled = batch["prompts"]["episode"], batch["prompts"]["shuffled"]
    assert len(one["truth"]) == 12  # 4 classes of 3 items
    split = task.data.test
    for n, row in enumerate(np.flatnonzero(~np.isin(split.labels, task.data.known)).tolist()):
        label = one["words"][n, one["truth"][n]]
        for m in range(4):
            at = np.flatnonzero((split.features == one["demos"][n, m].numpy()).all((1, 2)))
            assert (one["demo_labels"][n, m] == label) == (split.labels[at[0]] == split.labels[row])
            assert row not in at
        assert sorted(one["demo_labels"][n].tolist()) == sorted(shuffled["demo_labels"][n].tolist())
    assert not torch.equal(one["demo_labels"], shuffled["demo_labels"])
    alone = task.evaluation_batch("test", [3])["prompts"]["episode"]
    torch.testing.assert_close(alone["demos"][0], one["demos"][3])


def test_prompts_of_known_classes_have_training_items_the_most_similar_ones_first():
    _, task = built()
    rows = range(12, len(task.data.test))
    found = task.evaluation_batch("test", rows)["prompts"]
    assert len(found["episode"]["truth"]) == 0
    names = np.array([task.data.classes[n] for n in task.data.known])
    assert names[found["in_weight"]["truth"][0]] == task.data.classes[task.data.test.labels[12]]
    flat = task.data.train.features.reshape(len(task.data.train), -1)
    cosine = flat @ task.data.test.features[12].reshape(-1) / np.linalg.norm(flat, axis=1)
    np.testing.assert_array_equal(found["neighbour"]["demos"][0].numpy().reshape(4, -1), flat[np.argsort(-cosine)[:4]])


def test_fewer_demonstrations_keep_the_first_of_each_class():
    _, task = built()
    whole = task.evaluation_batch("test", range(12))["prompts"]["episode"]
    some = fewer(whole, 2, 2)
    assert some["demo_labels"].shape == (12, 2)
    assert (some["demo_labels"][:, 0] != some["demo_labels"][:, 1]).all()
    assert fewer(whole, 0, 2)["demos"].shape == (12, 0, 2, 6)
    assert torch.equal(fewer(whole, 4, 2)["demos"], whole["demos"])
    none = task.evaluation_batch("test", range(12, len(task.data.test)))["prompts"][
        "episode"
    ]  # items of known classes alone
    assert len(fewer(none, 2, 2)["demos"]) == 0


def test_a_perfect_answer_counts_and_a_guess_is_named():
    evaluator = EpisodeEvaluator(2, 10)
    truth = torch.tensor([0, 1, 1])
    evaluator.update(
        {"prompts": {"episode": {"truth": truth}, "shuffled": {"truth": truth}}},
        {"episode_logits": F.one_hot(truth, 2).double(), "shuffled_logits": torch.tensor([[1.0, 0.0]] * 3)},
    )
    found = evaluator.compute()
    assert found["accuracy"] == 1
    assert found["gain_over_shuffled"] == pytest.approx(2 / 3)
    assert evaluator.chance() == {"accuracy": 0.5, "shuffled_accuracy": 0.5}
    with pytest.raises(CounterpointError, match="training diverged"):
        evaluator.update(
            {"prompts": {"episode": {"truth": truth}}}, {"episode_logits": torch.full((3, 2), float("nan"))}
        )


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"demonstrations": 3}, r"demonstrations must be 0 or a multiple of ways \(2\), got 3"),
        ({"ways": 1}, "ways must be at least 2"),
        ({"bursty_ratio": 1.5}, "bursty_ratio must lie in"),
        ({"fuser_heads": 3}, r"fuser_heads must divide fuser \(8\)"),
        ({"meta": "gpt3-8-1-2"}, "meta-model"),
        ({"meta": "gpt2-8-1-3"}, "a width that is a multiple of its heads"),
        ({"words": "bert"}, "words must be learnt or hf:NAME"),
        ({"warmup": 1.0}, "warmup must be below 1"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"ways": 16, "demonstrations": 16}, "12 known classes, fewer than the 16 ways"),
        ({"ways": 5, "demonstrations": 5}, "valid split has no episode: it needs 5 unseen classes"),
        ({"meta": "hf:/nowhere"}, "could not be loaded as a GPT-2"),
        ({"words": "hf:/nowhere"}, "hf:/nowhere could not be loaded"),
    ],
)
def test_bad_settings_raise_an_error_that_names_them(changed, said):
    with pytest.raises(CounterpointError, match=said):
        built(**changed)


def test_a_class_name_without_a_token_is_refused():
    with pytest.raises(DataError, match="the class name '' has no token"):
        name_tokens(train_bpe(["a few words"] * 4, 300), ["few", ""])


def split_of(features: Any, labels: Any) -> EpisodeSplit:
    rows = np.asarray(features, np.float32)
    return EpisodeSplit(rows, np.asarray(labels), np.ones(rows.shape[:2], bool))


@pytest.mark.parametrize(
    ("train", "classes", "said"),
    [
        (split_of(np.full((2, 1, 3), np.nan), [0, 1]), ("a", "b"), "item 0 of train hold NaN"),
        (split_of(np.ones((2, 3)), [0, 1]), ("a", "b"), r"must be \[items, slots, width\]"),
        (split_of(np.ones((2, 1, 3)), [0, 2]), ("a", "b"), r"class numbers of train must lie in 0\.\.1"),
        (split_of(np.ones((2, 1, 3)), [0, 1]), ("a", " "), "class 1 has no name"),
        (split_of(np.ones((2, 1, 3)), [0]), ("a", "b"), "a class and the presence of slots for each item"),
    ],
)
def test_data_that_do_not_fit_are_refused(train, classes, said):
    with pytest.raises(DataError, match=said):
        EpisodeData("mine", classes, train, train, train)


def test_data_of_another_form_and_features_of_another_width_are_refused(tmp_path):
    with pytest.raises(CounterpointError, match="name a source of them"):
        EpisodesTask(load("symbol-tasks?train=4&valid=2&test=2&texts=0"), config())
    run = trained(tmp_path)
    _, task = built("latent-classes?classes=12&unseen=4&each=3&held=3&width=5")
    with pytest.raises(CounterpointError, match="1 slots of 5 features, and the run was trained on 2 of 6"):
        task.check_facts(run.facts())


def test_a_new_task_needs_no_training_and_takes_the_tokens_of_the_run(tmp_path):
    run = trained(tmp_path)
    found = training.evaluate(run.path, data=DATA + "&seed=7", say=lambda _: None)
    assert {"accuracy", "neighbour_accuracy"} <= {name.removeprefix("test/") for name in found}


@pytest.mark.parametrize("query", ["classes=1", "each=1", "missing=1", "noise=-1", "classes=400000"])
def test_options_of_latent_classes_out_of_range_raise_an_error(query):
    with pytest.raises(CounterpointError, match="latent-classes: "):
        load(f"latent-classes?{query}")


def test_latent_classes_are_drawn_by_seed_and_unseen_ones_are_apart():
    one, same, other = (load(f"latent-classes?classes=30&unseen=4&seed={seed}") for seed in (0, 0, 1))
    assert np.array_equal(one.train.features, same.train.features)
    assert not np.array_equal(one.train.features, other.train.features)
    assert len(set(one.classes)) == 38
    unseen = [set(split.labels.tolist()) - set(one.known.tolist()) for split in (one.valid, one.test)]
    assert [len(of) for of in unseen] == [4, 4]
    assert not unseen[0] & unseen[1]


def own(classes: int = 20, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    return rng.normal(size=(len(labels), 2, 4)).astype(np.float32), np.array([f"kind {n}" for n in labels])


def test_own_features_train_from_the_command_line(tmp_path):
    features, labels = own()
    features[3, 1] = np.nan
    labels[5] = ""
    np.savez(tmp_path / "items.npz", features=features, label=labels)
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    words = ["train", "sinc", "--data", f"features:{tmp_path / 'items.npz'}", "--out", str(tmp_path), "--name", "run"]
    assert cli.main([*words, *options]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy by demonstrations" in page
    notes = load(f"features:{tmp_path / 'items.npz'}").notes
    assert any("1 of 80 items have no label or no slot and are left out (item 5: no label)" in note for note in notes)


def test_columns_of_tables_are_slots(tmp_path):
    import pandas as pd

    features, labels = own()
    columns = {"image_embedding": list(features[:, 0]), "text_embedding": list(features[:, 1]), "label": labels}
    pd.DataFrame(columns).to_parquet(tmp_path / "emb.parquet")
    data = load(f"features:{tmp_path / 'emb.parquet'}")
    assert data.train.features.shape[1:] == (2, 4)
    one = load(f"features:{tmp_path / 'emb.parquet'}?slots=text_embedding")
    np.testing.assert_array_equal(one.train.features[:, 0], data.train.features[:, 1])
    assert not set(data.train.labels) & (set(data.test.labels) - set(data.known))


def test_the_frequent_words_of_captions_are_classes(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{'abcdefghijklmnopqrst'[n]}x" for n in range(20)]
    captions = np.array([f"the {words[n % 20]} of rare{n}" for n in range(80)])
    np.savez(tmp_path / "items.npz", features=rng.normal(size=(80, 4)).astype(np.float32), caption=captions)
    data = load(f"features:{tmp_path / 'items.npz'}?least=4")
    assert set(data.classes) == {"the", *words, "rare"}
    assert any("80 captions give 240 items of 22 words" in note for note in data.notes)
    assert not any("left out" in note for note in data.notes)
    captions[[3, 7]] = "zz", ""
    np.savez(tmp_path / "some.npz", features=rng.normal(size=(80, 4)).astype(np.float32), caption=captions)
    data = load(f"features:{tmp_path / 'some.npz'}?least=4")
    said = r"2 of 80 captions have no word that occurs in 4 captions and are left out (item 3: 'zz', item 7: '')"
    assert any(said in note for note in data.notes)
    with pytest.raises(DataError, match=r"no word occurs in 90 captions; lower \?least="):
        load(f"features:{tmp_path / 'items.npz'}?least=90")


@pytest.mark.parametrize(
    ("changed", "query", "said"),
    [
        ({"features": None}, "", r"has no 'features', but label; name the slots: \?slots=A,B"),
        ({"label": None}, "", "has neither labels nor captions"),
        ({"label": np.array(["a"] * 3)}, "", "80 items with features and 3 labels"),
        ({"features": np.ones(80)}, "", r"must be \[items, width\]"),
        ({"features": np.full((80, 2, 4), np.inf)}, "", "item 0 has infinite features"),
        ({"features": np.array([["a"]] * 80)}, "", "no list of numbers"),
        ({"more": np.ones((80, 3))}, "?slots=features,more", "slots must have as many items and the same width"),
        ({"label": np.array(["a", "b"] * 40)}, "", "has 2 classes, 2 of them with at least 2 items"),
        ({}, "?label=name", "there is no column 'name'"),
        ({}, "?valid=0", "valid and test must be shares above 0"),
        ({}, "?least=1", "least must be at least 2"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, changed, query, said):
    features, labels = own()
    arrays = {"features": features, "label": labels} | changed
    np.savez(tmp_path / "items.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises((DataError, CounterpointError), match=said):
        load(f"features:{tmp_path / 'items.npz'}{query}")


def test_a_file_that_is_no_npz_and_lists_of_other_lengths_are_refused(tmp_path):
    (tmp_path / "items.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"is no readable \.npz file"):
        load(f"features:{tmp_path / 'items.npz'}")
    (tmp_path / "items.jsonl").write_text('{"features": [1, 2], "label": "a"}\n{"features": [1], "label": "b"}\n')
    with pytest.raises(DataError, match="item 1 has 1 numbers in 'features', others 2"):
        load(f"features:{tmp_path / 'items.jsonl'}")


def rows_at(value: Any, at: int) -> Any:
    return {k: rows_at(v, at) for k, v in value.items()} if isinstance(value, dict) else np.asarray(value)[at].tolist()


def test_an_item_of_the_evaluation_has_the_same_prompt_in_any_batch():
    _, task = built()
    whole = task.episodes(task.split("valid"), np.arange(4))
    alone = task.episodes(task.split("valid"), np.array([2]))
    assert rows_at(alone, 0) == rows_at(whole, 2)
