"""SPACE-2: the authors' numbers, identities of tree and contrast, data, training, resuming, processes, errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import cli, search, training
from counterpoint import functional as fn
from counterpoint.core import set_scores, tree_scores
from counterpoint.data import load
from counterpoint.data.dialogs import DialogData, Tree, Turn, intent_of, user_turns
from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.search import Encoder
from counterpoint.systems.language import space_2
from counterpoint.tasks.dialogs import DialogsTask, MixedBatches
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "space-2.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


DATA = "task-dialogs?train=24&unlabelled=24&test=40&paths=40&seed=1"
SMALL = {"encoder": "text-8-1-2", "vocabulary": 300, "subspace": 4, "batch_size": 16, "epochs": 1}
FRAMES = [{"hotel": {"find": {"day": ["amber"]}}}]


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("space-2", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def built_on(data: DialogData, **settings):
    config = Experiment.resolve("space-2", DATA, overrides=SMALL | settings).config
    task = DialogsTask(data, config)
    return config, task


def prepared(learner, task):
    learner.survey = Survey(task, learner)
    batch = next(iter(task.train_loader(0, Position())))
    return learner.prepare(batch, torch.Generator().manual_seed(0))


def of_case(name: str, dtype: torch.dtype | None = None) -> Tensor:
    found = torch.from_numpy(np.asarray(PARITY[name]))
    return found if dtype is None else found.to(dtype)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_frames(seed: int, n: int, rows: int = 3, names: int = 4) -> Tensor:
    """Draw frames with defaults, absent levels, repeated paths and empty frames."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, names, (n, rows, 4), generator=generator)
    frames[..., 2:] += 1
    depth = torch.randint(0, 5, (n, rows, 1), generator=generator)
    frames = frames.masked_fill(torch.arange(4) >= depth, -1)
    return torch.where(depth == 0, -2, frames)


# ------------------------------------------------------------------------------------------------- the authors' numbers


def test_scores_of_frames_equal_the_authors():
    frames = of_case("case0/in/frames")
    torch.testing.assert_close(fn.tree_scores(frames), of_case("case0/out/scores"), rtol=1e-9, atol=0)
    found = fn.combined_tree_score(frames)
    torch.testing.assert_close(found, of_case("case0/out/combined_score"), rtol=1e-9, atol=0)


@TYPES
def test_the_contrast_of_each_view_and_its_gradient_equal_the_authors(dtype, rtol):
    features = of_case("case1/in/features_raw", dtype).requires_grad_()
    scores = of_case("case1/in/scores", dtype)
    losses = [
        fn.soft_supcon(features[:, :, k], scores[k], float(of_case("case1/param/temperature"))) for k in range(10)
    ]
    loss = torch.stack(losses)
    torch.testing.assert_close(loss.detach(), of_case("case1/out/loss_per_view", dtype), rtol=rtol, atol=0)
    loss.mean().backward()
    torch.testing.assert_close(loss.mean().detach(), of_case("case1/out/loss_tree", dtype), rtol=rtol, atol=0)
    wanted = of_case("case1/grad/features_raw", dtype)
    torch.testing.assert_close(features.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    own = torch.stack([fn.soft_supcon(features[:, :, k].detach()) for k in range(10)]).mean()
    torch.testing.assert_close(own, of_case("case1/out/loss_self", dtype), rtol=1e-6, atol=0)  # theirs is float32


@TYPES
def test_the_contrast_from_frames_equals_the_authors_with_their_scores(dtype, rtol):
    features = of_case("case1/in/features_raw", dtype).requires_grad_()
    loss = fn.tree_contrast(features, of_case("case0/in/frames"))
    loss.backward()
    torch.testing.assert_close(loss.detach(), of_case("case1/out/loss_tree", dtype), rtol=rtol, atol=0)
    wanted = of_case("case1/grad/features_raw", dtype)
    torch.testing.assert_close(features.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@TYPES
def test_r_drop_and_its_gradients_equal_the_authors(dtype, rtol):
    logits = [of_case(f"case2/in/logits_{n}", dtype).requires_grad_() for n in (1, 2)]
    loss = fn.r_drop(*logits)
    loss.backward()
    torch.testing.assert_close(loss.detach(), of_case("case2/out/loss", dtype), rtol=rtol, atol=0)
    for n, ours in enumerate(logits, 1):
        wanted = of_case(f"case2/grad/logits_{n}", dtype)
        torch.testing.assert_close(ours.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------------ tree


def sets_of(frame: list[list[int]], view: str) -> set[tuple[int, ...]]:
    at = ["DISV".index(level) for level in view]
    return {key for row in frame if min(key := tuple(row[n] for n in at)) > 0}


def test_scores_are_the_jaccard_similarities_of_sets():
    frames = drawn_frames(0, 40)
    found = fn.tree_scores(frames)
    for k, view in enumerate(space_2.VIEWS):
        sets = [sets_of(frame, view) for frame in frames.tolist()]
        wanted = [[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets]
        torch.testing.assert_close(found[k], torch.tensor(wanted, dtype=torch.float64).fill_diagonal_(1))


def test_the_combined_score_is_the_mean_over_views_with_elements():
    frames = drawn_frames(1, 40)
    found = fn.combined_tree_score(frames)
    rows = [{tuple(row) for row in frame if row[0] >= 0} for frame in frames.tolist()]
    for a in range(40):
        for b in range(40):
            if a == b:
                continue
            scores = []
            for view in space_2.VIEWS:
                one, other = (sets_of(frames[n].tolist(), view) for n in (a, b))
                scores += [len(one & other) / len(one | other)] if one | other else []
            same = rows[a] == rows[b] and bool(rows[a])
            wanted = 1.0 if same else sum(scores) / max(1, len(scores))
            assert float(found[a, b]) == pytest.approx(wanted), (a, b)


def test_a_frame_with_an_intent_alone_has_positives_in_three_views():
    found = fn.tree_scores(torch.tensor([[[1, 2, -1, -1]], [[1, 2, -1, -1]]]))[:, 0, 1]
    assert dict(zip(space_2.VIEWS, found.tolist(), strict=True)) == {
        view: float(view in ("D", "I", "DI")) for view in space_2.VIEWS
    }


def test_frames_score_zero_with_an_empty_one_and_defaults_leave_their_elements_out():
    frames = torch.tensor([[[1, 1, 1, 1]], [[-2, -2, -2, -2]], [[0, 1, 1, 1]], [[0, 0, -1, -1]], [[0, 0, -1, -1]]])
    found = fn.tree_scores(frames)
    assert float(found[:, 0, 1].max()) == 0
    shared = [view for view, score in zip(space_2.VIEWS, found[:, 0, 2].tolist(), strict=True) if score]
    assert shared == ["I", "S", "V", "IS", "SV", "ISV"]
    combined = fn.combined_tree_score(frames)
    assert combined[0, 1] == 0
    assert combined[3, 4] == 1  # equal frames, though no view has an element


def test_one_name_on_two_levels_and_under_two_intents():
    frames = torch.tensor([[[1, 1, 5, 9]], [[1, 2, 5, 9]]])
    found = dict(zip(space_2.VIEWS, fn.tree_scores(frames)[:, 0, 1].tolist(), strict=True))
    assert {view for view, score in found.items() if score} == {"D", "S", "V", "SV"}


# -------------------------------------------------------------------------------------------------------------- contrast


def plain(features: Tensor, weights: Tensor, temperature: float) -> Tensor:
    e = torch.nn.functional.normalize(features, dim=2)
    e = torch.cat([e[:, 0], e[:, 1]])
    off = ~torch.eye(len(e), dtype=torch.bool)
    logits = (e @ e.T / temperature).masked_fill(~off, -torch.inf)
    logs = logits.log_softmax(1).masked_fill(~off, 0)
    m = weights.repeat(2, 2) * off
    return temperature / 0.07 * -((m * logs).sum(1) / m.sum(1)).mean()


def test_weights_of_any_kind_give_the_plain_formula():
    features, weights = draw(0, 7, 2, 5).requires_grad_(), draw(1, 7, 7).abs()
    found = fn.soft_supcon(features, weights, 0.3)
    wanted = plain(features, weights, 0.3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (found, wanted)))


@pytest.mark.parametrize(
    "made", [tree_scores.combined_scores, tree_scores.equal_scores, lambda f: tree_scores.view_scores(f, "IS")]
)
def test_scores_in_tiles_give_the_same_as_their_matrix(made, monkeypatch):
    features, scores = draw(0, 60, 2, 5).requires_grad_(), made(drawn_frames(2, 60))
    by_matrix = fn.soft_supcon(features, scores.dense())
    (wanted,) = torch.autograd.grad(by_matrix, features)
    monkeypatch.setattr(set_scores, "FEW", 0)
    monkeypatch.setattr(set_scores, "TILE", 7)
    by_tiles = fn.soft_supcon(features, scores)
    torch.testing.assert_close(by_tiles, by_matrix)
    torch.testing.assert_close(torch.autograd.grad(by_tiles, features)[0], wanted)


def test_numbers_of_any_size_name_the_same_sets():
    frames = drawn_frames(3, 30)
    wanted = fn.tree_scores(frames), fn.combined_tree_score(frames)
    large = torch.where(frames > 0, frames * 10**17, frames)
    torch.testing.assert_close((fn.tree_scores(large), fn.combined_tree_score(large)), wanted)


def test_no_weights_give_nt_xent_and_labels_give_supcon():
    features, labels = draw(0, 8, 2, 5), torch.arange(8) % 3
    z = [features[:, n] for n in (0, 1)]
    torch.testing.assert_close(fn.soft_supcon(features, temperature=0.07), fn.of("simclr").nt_xent(*z, 0.07))
    unit = torch.nn.functional.normalize(features, dim=2)
    equal = (labels[:, None] == labels).double()
    torch.testing.assert_close(fn.soft_supcon(features, equal, 0.2), fn.supcon(unit, labels, 0.2, 0.07))
    frames = torch.stack([labels + 1, labels + 1, labels + 1, labels + 1], 1)[:, None]
    torch.testing.assert_close(
        fn.tree_contrast(features[:, :, None].expand(8, 2, 10, 5), frames, 0.2), fn.supcon(unit, labels, 0.2, 0.07)
    )


def test_known_values():
    orthonormal = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, 2)
    wanted = 0.2 / 0.07 * np.log(1 + 2 * np.exp(-1 / 0.2))
    assert float(fn.soft_supcon(orthonormal, torch.eye(2).double(), 0.2)) == pytest.approx(wanted)
    assert float(fn.soft_supcon(draw(0, 1, 2, 4), torch.ones(1, 1).double())) == pytest.approx(0, abs=1e-12)
    same = torch.ones(5, 2, 3).double()
    assert float(fn.soft_supcon(same, draw(0, 5, 5).abs())) == pytest.approx(np.log(9))


def test_a_row_of_weights_times_a_constant_changes_nothing():
    features, weights = draw(0, 6, 2, 4), draw(1, 6, 6).abs()
    scaled = weights * torch.arange(1, 7)[:, None]
    torch.testing.assert_close(fn.soft_supcon(features, scaled), fn.soft_supcon(features, weights))


def test_frames_alone_have_no_positive_but_their_twin():
    features = draw(0, 6, 2, 10, 4)
    empty = torch.full((6, 1, 4), -2)
    each = [fn.soft_supcon(features[:, :, k]) for k in range(10)]
    torch.testing.assert_close(fn.tree_contrast(features, empty), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fn.tree_scores(torch.zeros(2, 3, 4)), "frames must be whole numbers"),
        (lambda: fn.tree_scores(torch.zeros(2, 4, dtype=torch.int64)), "frames must be whole numbers"),
        (lambda: fn.soft_supcon(draw(0, 3, 4)), "features must be"),
        (lambda: fn.soft_supcon(draw(0, 0, 2, 4)), "empty batch"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), draw(1, 3, 2)), "weights must be"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), -torch.eye(3)), "at least 0, and above 0 on the diagonal"),
        (lambda: fn.soft_supcon(draw(0, 3, 2, 4), temperature=0.0), "temperature must be"),
        (
            lambda: fn.soft_supcon(draw(0, 3, 2, 4), tree_scores.equal_scores(drawn_frames(0, 4))),
            "scores of 3 examples",
        ),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 9, 4), drawn_frames(0, 3)), "with 10 views"),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 10, 4), drawn_frames(0, 2)), "a frame for each"),
        (lambda: fn.tree_contrast(draw(0, 3, 2, 1, 4), drawn_frames(0, 3), views=["DV"]), "views must be of D, I"),
        (lambda: fn.r_drop(draw(0, 3, 4), draw(1, 3, 5)), "logits_1 and logits_2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# ------------------------------------------------------------------------------------------------------------------ data


def chats(path: Path, rows: list[object]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return f"dialogs:{path}"


def chat(n: int, annotation: object = None, **more: object) -> dict[str, object]:
    user = {"role": "user", "content": f"book a table for {n} guests in the North"}
    if annotation is not None:
        user["annotation"] = annotation
    return {"messages": [user, {"role": "assistant", "content": f"noted, {n} guests"}]} | more


FRAME = {"restaurant": {"book": {"area": ["north"], "people": "2"}}}


def own_dialogs(path: Path, many: int = 24) -> str:
    rows = [
        chat(n, {"restaurant": {"book" if n % 2 else "find": {"area": ["north"]}}}, corpus="ab"[n % 2])
        for n in range(many)
    ]
    return chats(path, [*rows, *(chat(n) for n in range(100, 100 + many))])


def test_chats_give_annotated_and_unlabelled_turns(tmp_path):
    spec = chats(
        tmp_path / "chats.jsonl",
        [
            chat(1, FRAME, split="train"),
            chat(2, {}, split="train"),
            chat(3, split="train"),
            {"messages": [{"role": "system", "content": "be brief"}, *chat(4, FRAME)["messages"]], "split": "valid"},
            {
                "messages": [
                    {"role": "system", "content": "hello"},
                    {"role": "user", "content": "a room", "frame": FRAME},
                ]
            },
            chat(6, {"DEFAULT_DOMAIN": {"greet": {}}}, split="test"),
        ],
    )
    data = load(spec + "?valid=validation&test=test")
    assert [len(x) for x in (data.train, data.valid, data.test, data.unlabelled)] == [3, 1, 1, 1]
    assert data.train.frame(0) == {"restaurant": {"book": {"area": ["north"], "people": ["2"]}}}
    assert [turn.role for turn in data.train.context(2)] == ["system", "user"]
    assert any("1 messages with the role system are prompts" in note for note in data.notes)
    assert data.spec["class_names"] == ["none", "restaurant book"]


BAD_ROWS = [
    ("no json\n", "is not JSON"),
    ({"messages": "hello"}, "is no list of messages"),
    ({"messages": [{"role": "user"}]}, "message 1 has no text in content"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "message 1 has the role 'judge'"),
    ({"messages": ["hello"]}, "message 1 is a str, not a map"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "has no message with the role user"),
    (chat(9, ["hotel"]), "message 1: its annotation must be a map of domains, is a list"),
    (chat(9, {"hotel": ["find"]}), "its annotation must be a map of intents"),
    (chat(9, {"hotel": {"find": {"area": [{}]}}}), "a value of the slot 'area' that is neither a text nor a number"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_bad_rows_are_named_and_counted(row, said, tmp_path):
    rows = [chat(n, FRAME) for n in range(12)]
    data = load(chats(tmp_path / "chats.jsonl", [*rows, row]))
    notes = " ".join(data.notes)
    assert said in notes
    assert "1 of 13 rows" in notes
    assert len(data.train) + len(data.valid) + len(data.test) == 12
    with pytest.raises(DataError, match=re.escape(said)):
        load(chats(tmp_path / "bad.jsonl", [row, row]))


def test_sources_without_annotations_or_messages_are_refused(tmp_path):
    with pytest.raises(DataError, match="no message of a user has an annotation; add one"):
        load(chats(tmp_path / "plain.jsonl", [chat(n) for n in range(4)]))
    with pytest.raises(DataError, match="has no column of messages; write a dialog a line"):
        load(chats(tmp_path / "other.jsonl", [{"text": "x"}]))
    with pytest.raises(CounterpointError, match=r"paths must lie in 20\.\.2000, got 3"):
        load("task-dialogs?paths=3")
    with pytest.raises(CounterpointError, match=r"schemes must lie in 1\.\.3, got 4"):
        load("task-dialogs?schemes=4")
    with pytest.raises(CounterpointError, match="train and test must be at least 2"):
        load("task-dialogs?test=1")


def test_no_path_of_the_test_split_is_in_training_and_schemes_differ():
    data = load("task-dialogs?train=300&unlabelled=10&test=100&schemes=3&turns=2")
    tree = Tree([])
    paths = [{p for n in range(len(s)) for p in tree.paths(s.frame(n))} for s in (data.train, data.valid, data.test)]
    assert not paths[0] & paths[1]
    assert not paths[0] & paths[2]
    assert not paths[1] & paths[2]
    by_corpus = [next(data.train.frame(n) for n in np.flatnonzero(data.train.corpora == c)) for c in range(3)]
    assert [intent_of(frame) != "none" for frame in by_corpus] == [True, True, False]
    assert "DEFAULT_DOMAIN" in by_corpus[2]
    assert max(len(data.train.context(n)) for n in range(len(data.train))) == 3


def test_a_tree_numbers_names_within_their_level_in_any_case():
    tree = Tree([{"Hotel": {"find": {"area": ["hotel"]}}}, {" hotel ": {"FIND": {}}}])
    assert tree.paths({"hotel": {"find": {"area": ["Hotel"]}}}) == [(1, 1, 1, 1)]
    assert tree.paths({"hotel": {"find": {}}}) == [(1, 1, -1, -1)]
    assert tree.paths({"DEFAULT_DOMAIN": {"default_intent": {"area": ["hotel"]}}}) == [(0, 0, 1, 1)]
    assert tree.paths({"hotel": {}}) == [(1, -1, -1, -1)]
    assert tree.paths({}) == tree.paths(None) == []


# -------------------------------------------------------------------------------------------------------------- training


def test_a_batch_has_places_speakers_turns_and_values():
    turns = [
        Turn("user", "hello there", {}),
        Turn("system", "which day"),
        Turn("user", "a day like Amber please", FRAMES[0]),
    ]
    split = user_turns([turns] * 8, annotated=True)
    data = DialogData("made", split, split, split)
    _, task = built_on(data)
    batch = task.evaluation_batch("valid", [1])
    n = int(batch["mask"].sum())
    words = batch["ids"][0, :n][batch["ids"][0, :n] < task.facts["vocabulary"]]
    spelled = [task.tokenizer.decode([number]).strip() for number in words.tolist()]
    assert "".join(spelled) == "hellotherewhichdayadaylikeamberplease"
    start = [at for at in range(n) if batch["place"][0, at] == 0]
    first = task.facts["vocabulary"]
    assert batch["ids"][0, start].tolist() == [first, first + 2, first]
    assert batch["turn"][0, start].tolist() == [3, 2, 1]
    assert batch["speaker"][0, start].tolist() == [1, 0, 1]
    value = batch["value"][0, :n]
    assert task.tokenizer.decode(batch["ids"][0, :n][value].tolist()).strip() == "amber"
    assert torch.equal(batch["told"][0, :n], batch["turn"][0, :n] == 1)
    assert batch["frames"][0].tolist() == [[1, 1, 1, 1]]
    short = built_on(data, context=4, utterance=3, turns=1)[1].evaluation_batch("valid", [1])
    assert short["mask"].sum() == 4
    assert short["place"][0].tolist() == [1, 2, 3, 4]  # the last tokens, of the first three words


def test_masks_cover_whole_values_and_never_a_marker():
    learner, task = built(mask_probability=1.0)
    batch = prepared(learner, task)
    chosen = batch["labels"] >= 0
    markers = batch["ids"] >= learner.vocabulary
    assert not bool((chosen & markers).any())
    assert bool((batch["masked"][batch["value"]] == learner.mask_number).all())
    assert not bool((chosen & batch["told"] & ~batch["value"]).any())
    free = batch["index"] >= learner.examples
    assert torch.equal(chosen[free], batch["mask"][free] & ~markers[free])
    assert bool(batch["value"][~free].any(1).all())


def test_a_step_calls_the_functions_that_pass_parity(monkeypatch):
    learner, task = built(second_epochs=1, tune_epochs=1)
    seen: dict[str, list] = {name: [] for name in ("tree_contrast", "soft_supcon", "r_drop")}
    for name in seen:
        real = getattr(space_2, name)

        def noted(*a, real=real, name=name, **k):
            seen[name].append((a, k))
            return real(*a, **k)

        monkeypatch.setattr(space_2, name, noted)
    fit(learner, task, bar=False)
    steps = 3  # 24 annotated turns, 8 of them in a step
    assert len(seen["tree_contrast"]) == steps + 2  # in the second stage 16 in a step
    (features, frames, temperature), given = seen["tree_contrast"][0]
    assert (features.shape, len(frames), temperature, given["views"]) == ((8, 2, 10, 4), 8, 0.07, space_2.VIEWS)
    (features, *_), given = seen["tree_contrast"][-1]
    assert (features.shape[1:], given["views"]) == ((2, 1, 4), ("I",))
    assert len(seen["soft_supcon"]) == 10 * 2 * steps + 2
    assert len(seen["r_drop"]) == 2


def test_both_passes_differ_by_dropout_and_batches_have_both_kinds():
    learner, task = built(dropout=0.5)
    learner.train()
    batch = prepared(learner, task)
    assert (batch["index"] < learner.examples).sum() == (batch["index"] >= learner.examples).sum() == 8
    z = torch.stack(learner.model.summary(*(torch.cat([batch[n]] * 2) for n in space_2.READ)).chunk(2), 1)
    assert not torch.allclose(z[:, 0], z[:, 1])


def test_a_batch_is_of_one_corpus_and_the_shorter_stream_begins_again():
    corpora = np.array([0] * 5 + [1] * 3)
    epoch = list(MixedBatches(corpora, 17, 8).bind(0, Position(), 0, 1))
    assert len(epoch) == 5
    labelled = [[n for n in batch if n < 8] for batch in epoch]
    assert all(len(set(corpora[batch])) == 1 for batch in labelled)
    assert [len(batch) for batch in labelled] == [4, 1, 3, 4, 1]
    assert sorted(labelled[0] + labelled[1]) == [0, 1, 2, 3, 4]
    free = [n for batch in epoch for n in batch if n >= 8]
    assert set(free) == set(range(8, 25))
    plain = list(MixedBatches(corpora, 0, 8).bind(0, Position(), 0, 1))
    assert [len(batch) for batch in plain] == [5, 3]
    shares = [list(MixedBatches(corpora, 17, 8).bind(0, Position(), rank, 2)) for rank in (0, 1)]
    for whole, *parts in zip(epoch, *shares, strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1])


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"scores": "combined"}, {"tree", "self", "words"}),
        ({"scores": "equal", "unlabelled": False}, {"tree", "words"}),
        ({"scores": "none", "word_weight": 0.0}, {"tree", "self"}),
        ({"views": "", "second_epochs": 0}, {"tree", "self", "words"}),
        ({"views": "D, I", "second_epochs": 1, "tune_epochs": 1}, {"tree", "self", "words", "intents", "r_drop"}),
    ],
)
def test_options_train(settings, terms):
    learner, task = built(**settings)
    rows = fit(learner, task, bar=False)
    found = {name.removeprefix("train/") for row in rows for name in row if name.startswith("train/")}
    assert found - {"loss"} == terms
    assert np.isfinite(rows[-1]["train/loss"])
    assert ("test/classifier_accuracy" in rows[-1]) == bool(settings.get("tune_epochs"))
    assert -1 <= rows[-1]["test/neighbour_score"] <= 1


def test_the_arms_differ_in_their_weights_alone():
    losses = {}
    for scores in ("tree", "combined", "equal", "none"):
        learner, task = built(scores=scores, dropout=0.0)
        batch = prepared(learner, task)
        losses[scores] = {k: float(v.detach()) for k, v in learner.loss(batch).items()}
    assert len({round(x["self"], 5) for x in losses.values()}) == 1
    assert len({round(x["words"], 5) for x in losses.values()}) == 1
    assert len({round(x["tree"], 5) for x in losses.values()}) == 4


def test_cut_utterances_and_dialogs_are_counted():
    _, task = built(utterance=2, context=3)
    task.check_training()
    assert any("have an utterance of more than 2 tokens" in note for note in task.notes)
    assert any("have more than 3 tokens, of which the first are not read" in note for note in task.notes)
    _, task = built(utterance=500, context=5000)
    task.check_training()
    assert task.notes == []


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("space-2", DATA, overrides=SMALL | {"second_epochs": 1, "tune_epochs": 1}).config
    # In each of the three stages.
    need_equal_ends(monkeypatch, space_2.Space2, "space-2", config, DATA, (1, 4, 6), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    settings = SMALL | {"dropout": 0.0, "tune_epochs": 1}
    words = ["train", "space-2", "--data", DATA, "--out", str(tmp_path)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("space-2", DATA, overrides=settings).config
    one = training.train("space-2", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()
    two = Run.open(tmp_path / "two").metrics()
    for mine, other in zip(one, two, strict=True):
        for name in ("train/loss", "train/tree", "train/self", "train/words", "train/intents"):
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=2e-4), name


@pytest.mark.usefixtures("drawn")
@pytest.mark.slow
def test_own_dialogs_train_embed_find_and_export_from_the_command_line(tmp_path):
    pytest.importorskip("pyarrow")
    data = own_dialogs(tmp_path / "chats.jsonl")
    small = ["--encoder", "text-8-1-2", "--vocabulary", "300", "--batch-size", "8", "--epochs", "1", "--subspace", "4"]
    run, rows, program = (str(tmp_path / name) for name in ("run", "rows.parquet", "dialogs.pt2"))
    assert cli.main(["train", "space-2", "--data", data, *small, "--out", str(tmp_path), "--name", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Similarity in each subspace by distance in the tree" in page
    assert "Dialogs by domain" in page
    assert cli.main(["embed", run, "--out", rows]) == 0
    text = "book a table for 3 guests in the North"
    _, hits = search.search(run, [text], rows, k=1)
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    assert cli.main(["export", run, "--out", program]) == 0
    encoder = Encoder.load(run)
    ids, mask = encoder.transform("text", [text, "a room"])
    with torch.no_grad():
        exported = torch.export.load(program).module()(ids, mask).numpy()
    np.testing.assert_allclose(exported, encoder.encode(texts=[text, "a room"]), atol=1e-5)


def test_a_text_is_embedded_as_a_single_turn_of_a_user():
    learner, task = built()
    text = task.data.test.context(0)[-1].text
    learner.eval()
    batch = task.evaluation_batch("test", [0])
    embedded = learner.embed(*task.tokenizer.encode([text], task.config.context))
    torch.testing.assert_close(embedded, learner.predict(batch)["z"])


def test_a_model_of_transformers_reads_dialogs(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    place = tmp_path / "bert"
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]").save_pretrained(place)
    size = BertConfig(
        vocab_size=len(names), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(size).save_pretrained(place)
    learner, task = built(encoder=f"hf:{place}", pretrained=True)
    assert (learner.mask_number, learner.vocabulary) == (4, len(names))
    assert float(learner.model.embedding.turn.weight.detach().abs().max()) == 0
    rows = fit(learner, task, bar=False)
    assert np.isfinite(rows[-1]["train/loss"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scores": "graph"}, "unknown scores 'graph'"),
        ({"views": "D,X"}, "unknown view 'X'"),
        ({"views": "D", "second_epochs": 1}, "second_view is I, which has no subspace"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"word_weight": -1.0}, "must not be negative"),
        ({"utterance": 0}, "utterance must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


def test_other_data_and_missing_turns_are_refused(tmp_path):
    with pytest.raises(CounterpointError, match="dialogs"):
        built(data="digits?size=8")
    annotated = user_turns([[Turn("user", "a room", {})]] * 4, annotated=True)
    empty = user_turns([[Turn("user", "a room")]], annotated=True)
    with pytest.raises(DataError, match="needs annotated turns for training and test, has 4 and 0"):
        built_on(DialogData("made", annotated, annotated, empty))
