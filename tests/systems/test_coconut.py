"""COCONUT: identities of both contrasts, roles, phases, memory, decoder, resuming, processes, errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.core.world import leave
from counterpoint.engine.fit import fit
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.continual import coconut
from counterpoint.tasks.phases import Phased
from counterpoint.tasks.sequential import over_stream
from interrupted import need_equal_ends

DATA = "digit-words?train=12&test=6"
SMALL = {
    "head": "classifier",
    "vector_encoder": "relu-8",
    "embedding": 4,
    "text_width": 6,
    "batch_size": 12,
    "epochs": 2,
    "phases": 3,
    "memory": 2,
    "vocabulary": 270,
}
DECODER = {"head": "decoder", "decoder_width": 8, "decoder_heads": 2, "decoder_depth": 1}
WAYS = pytest.mark.parametrize(("fewer", "few"), [(128, 2048), (0, 2048), (0, 0)])  # two matrices, and the kernel


@pytest.fixture
def way(fewer, few, monkeypatch):
    monkeypatch.setattr(coconut, "FEWER", fewer)
    monkeypatch.setattr(coconut, "FEW", few)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def built(data: str = DATA, seed: int = 0, **settings):
    experiment = Experiment.resolve("coconut", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, seed), task


def plain(a: Tensor, b: Tensor, labels: Tensor, rehearsal: Tensor, tau: float, roles: str, own: bool) -> Tensor:
    """Write the contrast out, anchor by anchor and pair by pair."""
    a, b = unit(a), unit(b).detach()
    positive, negative = {"nspt": (b, a), "ntpt": (b, b), "scl": (a, a)}[roles]
    anchors = [k for k in range(len(a)) if roles == "scl" or rehearsal[k]]
    losses = []
    for k in anchors:
        log_sum = torch.stack([a[k] @ negative[i] / tau for i in range(len(a)) if i != k]).logsumexp(0)
        with_k = own and roles != "scl"
        chosen = [p for p in anchors if labels[p] == labels[k] and (with_k or p != k)]
        terms = [a[k] @ positive[p] / tau - log_sum for p in chosen]
        losses.append(-torch.stack(terms).mean() if terms else a.new_zeros(()))
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------------------- equations


@WAYS
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("roles", ["nspt", "ntpt", "scl"])
def test_value_and_gradient_equal_the_sum_over_pairs(roles, own, way):
    a, b = draw(0, 9, 4).requires_grad_(), draw(1, 9, 4).requires_grad_()
    labels, rehearsal = torch.tensor([0, 1, 1, 2, 0, 3, 1, 2, 4]), torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0]).bool()
    found = fn.coconut_nspt(a, b, labels, rehearsal, 0.3, roles, own)
    wanted = plain(a, b, labels, rehearsal, 0.3, roles, own)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, a)[0], torch.autograd.grad(wanted, a)[0], rtol=1e-9, atol=1e-12
    )
    assert (
        torch.autograd.grad(fn.coconut_nspt(a, b, labels, rehearsal, 0.3, roles, own), b, allow_unused=True)[0] is None
    )


@WAYS
def test_two_orthonormal_items_of_two_classes_have_minus_one_over_tau(way):
    x = torch.eye(2, 3, dtype=torch.float64)
    both = torch.tensor([True, True])
    assert fn.coconut_nspt(x, x, torch.tensor([0, 1]), both, 0.25).item() == pytest.approx(-4)


@WAYS
def test_all_rehearsed_with_equal_networks_it_is_supcon_without_itself_and_the_mixture_with_itself(way):
    x, labels = unit(draw(3, 8, 4)), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    everything, tau = torch.ones(8, dtype=torch.bool), 0.4
    supcon = fn.supcon_single_view(x, labels, tau)
    without = fn.coconut_nspt(x, x, labels, everything, tau, own_positive=False)
    torch.testing.assert_close(without, supcon)
    torch.testing.assert_close(fn.coconut_nspt(x, x, labels, everything, tau, "scl"), supcon)
    # Per anchor with m other positives: (m SupCon_k + LSE_k - 1 / tau) / (m + 1).
    s = (x @ x.T / tau).fill_diagonal_(-math.inf)
    log_sum = s.logsumexp(1)
    same = (labels[:, None] == labels).double().fill_diagonal_(0)
    m = same.sum(1)
    each = log_sum - (s.nan_to_num(neginf=0.0) * same).sum(1) / m
    wanted = ((m * each + log_sum - 1 / tau) / (m + 1)).mean()
    torch.testing.assert_close(fn.coconut_nspt(x, x, labels, everything, tau), wanted)


@WAYS
def test_ntpt_differs_from_nspt_by_the_denominators_alone(way):
    a, b, tau = unit(draw(0, 7, 3)), unit(draw(1, 7, 3)), 0.5
    labels, rehearsal = torch.tensor([0, 0, 1, 1, 2, 3, 3]), torch.tensor([1, 1, 1, 1, 0, 0, 0]).bool()
    found = [fn.coconut_nspt(a, b, labels, rehearsal, tau, roles) for roles in ("ntpt", "nspt")]
    of_teacher, of_student = ((a @ z.T / tau).fill_diagonal_(-math.inf).logsumexp(1) for z in (b, a))
    torch.testing.assert_close(found[0] - found[1], (of_teacher - of_student)[rehearsal].mean())


@WAYS
def test_no_rehearsed_item_a_single_row_and_equal_rows_have_their_limits(way):
    x, labels = draw(0, 5, 3).requires_grad_(), torch.arange(5)
    none = fn.coconut_nspt(x, draw(1, 5, 3), labels, torch.zeros(5, dtype=torch.bool))
    assert none.item() == 0
    assert torch.autograd.grad(none, x)[0].abs().max() == 0
    one = fn.coconut_nspt(x[:1], x[:1].detach(), labels[:1], torch.ones(1, dtype=torch.bool))
    assert one.item() == 0
    assert torch.autograd.grad(one, x)[0].isfinite().all()
    same = torch.ones(5, 3, dtype=torch.float64)
    equal = fn.coconut_nspt(same, same, labels, torch.ones(5, dtype=torch.bool))
    assert equal.item() == pytest.approx(math.log(4))


@WAYS
def test_the_order_of_the_batch_and_the_length_of_rows_change_nothing(way):
    a, b, order = draw(0, 7, 3), draw(1, 7, 3), torch.tensor([3, 1, 6, 0, 5, 2, 4])
    labels, rehearsal = torch.tensor([0, 0, 1, 1, 2, 3, 3]), torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
    torch.testing.assert_close(
        fn.coconut_nspt(2 * a[order], b[order], labels[order], rehearsal[order]),
        fn.coconut_nspt(a, 3 * b, labels, rehearsal),
    )
    torch.testing.assert_close(fn.coconut_mm(2 * a[order], b[order], labels[order]), fn.coconut_mm(a, 3 * b, labels))


@WAYS
def test_mm_is_clip_for_distinct_classes_and_the_mean_over_positives_else(way):
    a, t, tau = draw(0, 6, 4).requires_grad_(), draw(1, 6, 4).requires_grad_(), 0.2
    clip = fn.clip(unit(a), unit(t), math.log(1 / tau))
    for labels in (None, torch.arange(6)):
        found = fn.coconut_mm(a, t, labels, tau)
        torch.testing.assert_close(found, clip)
    labels = torch.tensor([0, 0, 1, 2, 1, 0])
    s = unit(a) @ unit(t).T / tau
    same = (labels[:, None] == labels).double()
    wanted = sum(-((x.log_softmax(1) * same).sum(1) / same.sum(1)).mean() for x in (s, s.T)) / 2
    found = fn.coconut_mm(a, t, labels, tau)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(torch.autograd.grad(found, [a, t]), torch.autograd.grad(wanted, [a, t]), strict=True):
        torch.testing.assert_close(ours, theirs)


@WAYS
def test_mm_of_two_orthonormal_pairs_has_the_known_values(way):
    x, tau = torch.eye(2, dtype=torch.float64), 0.5
    apart = math.log(1 + math.exp(-1 / tau))
    assert fn.coconut_mm(x, x, torch.tensor([0, 1]), tau).item() == pytest.approx(apart)
    assert fn.coconut_mm(x, x, torch.tensor([4, 4]), tau).item() == pytest.approx(apart + 1 / (2 * tau))
    assert fn.coconut_mm(x[:1], x[:1], None, tau).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, r: fn.coconut_nspt(x, x[:3], r.long(), r), "student and teacher must be"),
        (lambda x, r: fn.coconut_nspt(x, x, r.long()[:3], r), "labels must be"),
        (lambda x, r: fn.coconut_nspt(x, x, r.long(), r[:3]), "rehearsal must be"),
        (lambda x, r: fn.coconut_nspt(x, x, r.long(), r, 0.0), "temperature must be positive"),
        (lambda x, r: fn.coconut_nspt(x, x, r.long(), r, 0.1, "sntp"), "roles must be one of nspt"),
        (lambda x, r: fn.coconut_nspt(x[:0], x[:0], r.long()[:0], r[:0]), "empty batch"),
        (lambda x, r: fn.coconut_mm(x, x[:3]), "audio and text must be"),
        (lambda x, r: fn.coconut_mm(x, x, r.long()[:3]), "labels must be"),
        (lambda x, r: fn.coconut_mm(x, x, None, -1.0), "temperature must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3), torch.tensor([True, False, True, True]))


# ------------------------------------------------------------------------------------------------------------ the learner


def test_each_step_trains_by_both_functions_with_the_right_roles(monkeypatch):
    learner, task = built(roles="nspt")
    seen, real, mm = [], coconut.coconut_nspt, []
    real_mm = coconut.coconut_mm

    def spied(*arguments):
        seen.append((learner.phase, *arguments))
        return real(*arguments)

    def spied_mm(*arguments):
        mm.append((learner.phase, *arguments))
        return real_mm(*arguments)

    monkeypatch.setattr(coconut, "coconut_nspt", spied)
    monkeypatch.setattr(coconut, "coconut_mm", spied_mm)
    row = fit(learner, task, bar=False)[-1]
    assert {phase for phase, *_ in seen} == {1, 2}  # no teacher in the first phase
    assert {phase for phase, *_ in mm} == {0, 1, 2}
    for phase, student, teacher, labels, rehearsal, tau, roles in seen:
        assert (tau, roles) == (0.1, "nspt")
        groups = learner.phase_of_class[labels]
        assert torch.equal(rehearsal, groups < phase)
        assert (groups <= phase).all()
        assert student.requires_grad
        assert not teacher.requires_grad
    for phase, _, _, labels, _ in mm:
        assert (learner.phase_of_class[labels] == phase).all()  # new items alone
    # In the first step of a phase the network equals its copy; later it does not.
    first = next(found for found in seen if found[0] == 2)
    torch.testing.assert_close(first[1], first[2])
    assert not torch.allclose(seen[-1][1], seen[-1][2])
    old, new = (int((learner.phase_of_class < 2).sum()), 10)
    assert learner.nspt_share() == pytest.approx(old / new)
    expected = row["train/task"] + 0.1 * row["train/mm"] + old / new * row["train/nspt"]
    assert row["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_has_no_item_twice_and_the_memory_takes_turns():
    learner, task = built(memory=2, batch_size=10)
    fit(learner, task, bar=False)
    batches = learner._batches(learner.phase, Survey(task, learner))
    kept = set(np.flatnonzero(learner.kept.numpy()))
    drawn = list(batches.bind(0, learner.position, 0, 1))
    assert drawn
    for batch in drawn:
        assert len(set(batch)) == len(batch) == 10
        assert len(kept & set(batch)) == 2
    counts = [sum(item in batch for batch in drawn) for item in kept]
    assert max(counts) - min(counts) <= 1


def test_the_memory_has_two_items_of_each_old_class_and_the_run_records_it():
    learner, task = built()
    fit(learner, task, bar=False)
    labels = np.asarray(task.split("train").labels)
    groups = learner.phase_of_class.numpy()
    counts = np.bincount(labels[learner.kept.numpy()], minlength=10)
    assert counts.tolist() == [2 if group < 2 else 0 for group in groups]
    figures = learner.figures(Survey(task, learner))
    table = figures["Order of classes and memory"]["rows"]
    assert [row[0] for row in table] == sorted(groups + 1)
    assert sorted(int(n) for row in table for n in row[3].split()) == np.flatnonzero(learner.kept.numpy()).tolist()
    assert np.shape(figures["Accuracy after each phase"]["values"]) == (3, 3)


def test_herded_items_are_those_near_the_mean_of_the_current_features():
    learner, task = built(phases=2, epochs=1)
    fit(learner, task, bar=False)
    kept = learner.kept.clone()
    # After the fit the network has changed; with its copy of the phase before, the choice is the same again.
    learner.encoders["digit"].load_state_dict(learner.previous.module.encoders["digit"].state_dict())
    learner.kept.zero_()
    learner._keep(0, Survey(task, learner))
    assert torch.equal(kept, learner.kept)
    random, other = built(phases=2, epochs=1, selection="random")
    fit(random, other, bar=False)
    assert random.kept.sum() == kept.sum()
    assert not torch.equal(random.kept, kept)


def test_accuracies_count_seen_classes_and_the_history_gives_the_measures():
    learner, task = built(epochs=6)
    row = fit(learner, task, bar=False)[-1]
    survey = Survey(task, learner)
    found = survey.over("test", learner.classified).numpy()
    labels = np.asarray(task.split("test").labels)
    assert row["test/seen_accuracy"] == pytest.approx((found == labels).mean())
    last = learner.phase_of_class.numpy()[labels] == 2
    assert row["test/new_accuracy"] == pytest.approx((found == labels)[last].mean())
    history = learner.history.numpy()
    assert (np.triu(history, 1) == 0).all()  # classes not seen yet are never chosen
    wanted = np.mean([history[t, : t + 1].mean() for t in range(3)])
    assert row["valid/average"] == pytest.approx(wanted, abs=1e-6)
    assert "test/average" not in row
    learner.reached.fill_(0)
    early = survey.over("test", learner.classified).numpy()
    assert set(early) <= set(np.flatnonzero(learner.phase_of_class.numpy() == 0))


def test_classes_are_dealt_to_phases_by_seed_or_in_the_order_of_the_data():
    learner, _ = built(class_order="data", phases=5)
    assert learner.phase_of_class.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    first, second = (built(seed=seed, phases=4)[0].phase_of_class for seed in (0, 1))
    assert sorted(np.bincount(first)) == [2, 2, 3, 3]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("settings", [{"roles": "scl"}, {"roles": "ntpt"}, {"roles": "none"}, {"memory": 0.0}])
def test_other_roles_and_no_memory_train(settings):
    learner, task = built(**settings)
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert ("train/nspt" in row) == (settings.get("roles") != "none")
    if "memory" in settings:
        assert row["train/nspt"] == 0
        assert not learner.kept.any()


def test_all_classes_at_once_are_one_stage_without_a_memory():
    learner, task = built(joint=True, epochs=1)
    assert [stage.name for stage in learner.stages()] == ["all phases"]
    row = fit(learner, task, bar=False)[-1]
    assert "train/nspt" not in row
    assert learner.seen.all()
    assert not learner.kept.any()


def test_phases_are_those_of_other_streams_and_the_first_may_be_longer():
    learner, task = built(first_epochs=3, epochs=1)
    assert isinstance(learner, Phased)
    assert [(stage.name, stage.epochs) for stage in learner.stages()[:2]] == [("phase 1", 3), ("phase 2", 1)]
    assert over_stream(learner, task, []) is learner
    with pytest.raises(CounterpointError, match="first_epochs must not be negative"):
        built(first_epochs=-1)


def test_the_decoder_learns_intents_and_transcripts():
    settings = DECODER | {"decoder_width": 32, "vector_encoder": "relu-64", "lr": 0.3, "phases": 1, "epochs": 25}
    learner, task = built("digit-words?train=20&test=6", **settings, mm_weight=0.0)
    row = fit(learner, task, evaluate_every=25, bar=False)[-1]
    assert row["test/seen_accuracy"] > 0.7
    assert row["test/word_error"] < 0.3  # the transcript is the word of the digit
    assert row["test/exact_match"] == pytest.approx(1 - row["test/word_error"], abs=0.1)


def test_targets_are_intent_separator_transcript_and_miss_what_is_missing():
    learner, task = built(**DECODER)
    batch = task.evaluation_batch("train", [0, 30, 60])
    batch["present"] = {**batch["present"], "text": torch.tensor([True, False, True])}
    writer = learner.task_head
    tokens, wanted, counted = writer.targets(*batch["inputs"]["text"], batch["label"], batch["present"]["text"])
    assert torch.equal(wanted[:, 0], writer.tokenizer.vocabulary + batch["label"])
    assert (wanted[:, 1] == writer.tokenizer.vocabulary + 10).all()
    assert torch.equal(tokens[:, 1:], wanted[:, :-1])
    assert counted[1].tolist() == [True, True] + [False] * (counted.shape[1] - 2)
    texts = task.split("train").column("text", np.array([0, 60]))
    assert writer.texts(row[at] for row, at in zip(wanted, counted, strict=True)) == [texts[0], "", texts[1]]
    assert wanted[0][counted[0]][-1] == writer.end
    assert writer.intents(wanted).tolist() == batch["label"].tolist()
    assert writer.intents(tokens).tolist() == [-2, -2, -2]  # the first token is no intent
    assert writer.as_written(["ZERO", "two "]) == ["zero", "two"]


def test_an_item_without_a_transcript_is_left_out_of_mm_alone(monkeypatch):
    learner, task = built()
    learner.begin(Survey(task, learner))
    batch = task.evaluation_batch("train", list(range(12)))
    batch["present"] = {**batch["present"], "text": torch.arange(12) > 4}
    seen = []
    monkeypatch.setattr(coconut, "coconut_mm", lambda *x: seen.append(len(x[0])) or x[0].sum() * 0)
    learner.reached.fill_(int(learner.phase_of_class[batch["label"]].max()))
    new = ~learner.is_rehearsal(batch["label"])
    assert np.isfinite(float(learner.loss(batch)["task"].detach()))
    assert seen == [int((new & batch["present"]["text"]).sum())]


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("coconut", DATA, overrides=SMALL).config
    # In each phase.
    need_equal_ends(monkeypatch, coconut.CoconutLearner, "coconut", config, DATA, (1, 7, 14), tmp_path)


def _fitted(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    learner, task = built(phases=2)
    row = fit(learner, task, bar=False)[-1]
    torch.save((row, learner.kept), f"{folder}/{size}-{rank}.pt")
    if size > 1:
        leave()


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    mp.start_processes(_fitted, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    _fitted(0, 1, str(tmp_path))
    (two, kept), (one, wanted) = (torch.load(tmp_path / f"{name}.pt") for name in ("2-1", "1-0"))
    for name in ("train/loss", "train/mm", "train/nspt", "test/seen_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert kept.sum() == 10
    assert torch.equal(kept, wanted)


@pytest.mark.usefixtures("drawn")
def test_the_command_line_trains_and_the_page_shows_accuracies_order_and_memory(tmp_path):
    config = Experiment.resolve("coconut", DATA, overrides=SMALL | {"epochs": 1}).config
    run = training.train("coconut", config, data=DATA, out=tmp_path, name="one", say=lambda _: None)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Accuracy after each phase" in page
    assert "Order of classes and memory" in page
    again = training.evaluate(run, say=lambda _: None)
    assert again["seen_accuracy"] == run.metrics()[-1]["test/seen_accuracy"]


@pytest.mark.parametrize(
    ("data", "settings", "error", "said"),
    [
        (
            "digit-halves",
            {"head": "decoder"} | DECODER,
            CounterpointError,
            "the decoder writes texts, and .* use --head",
        ),
        (DATA, {"phases": 11}, DataError, "--phases 11 exceeds the 10 classes"),
        (DATA, {"phases": 0}, CounterpointError, "phases must be at least 1"),
        (DATA, {"class_order": "best"}, CounterpointError, "unknown class_order 'best'"),
        (DATA, {"memory": 2.5}, CounterpointError, "memory must be a share below 1 or a whole number"),
        (DATA, {"memory": -1}, CounterpointError, "memory must be"),
        (DATA, {"rehearsal_share": 1.0}, CounterpointError, "rehearsal_share must lie between 0 and 1"),
        (DATA, {"selection": "best"}, CounterpointError, "unknown selection 'best'; known: herding, random"),
        (DATA, {"head": "tree"}, CounterpointError, "unknown head 'tree'"),
        (DATA, {"roles": "sp"}, CounterpointError, "unknown roles 'sp'"),
        (DATA, {"positives": "all"}, CounterpointError, "unknown positives 'all'"),
        (DATA, {"temperature": 0.0}, CounterpointError, "temperature must be > 0"),
        (DATA, {"mm_weight": -0.1}, CounterpointError, "mm_weight must be at least 0"),
        (DATA, {"decoder_depth": 0}, CounterpointError, "must be at least 1"),
        (DATA, {"decoder_width": 9}, CounterpointError, "a multiple of decoder_heads"),
        ("digit-streams?vectors=1&train=40&test=20", {}, DataError, "have no classes"),
    ],
)
def test_settings_that_do_not_fit_are_named(data, settings, error, said):
    with pytest.raises(error, match=said):
        built(data, **settings)


def test_items_without_a_class_and_classes_without_an_item_are_named():
    learner, task = built()
    labels = task.split("train").labels
    for value, said in (
        (-1, "training items have no class; give each a class"),
        (3, r"class '\w+' has no training item"),
    ):
        task.split("train").labels = np.where(labels == 0, value, labels)
        with pytest.raises(DataError, match=said):
            learner.begin(Survey(task, learner))
    task.split("train").labels = labels
    task.split("train").presence["digit"] = np.arange(len(labels)) > 2
    with pytest.raises(DataError, match="3 of 120 training items lack digit"):
        learner.begin(Survey(task, learner))


def test_the_user_s_own_classes_and_vectors_make_a_stream(tmp_path):
    lines = ["vector_a,text,label"]
    for n, name in itertools.product(range(12), ("stop", "go", "left")):
        numbers = " ".join(f"{float(v):.2f}" for v in draw(n, 3))
        lines.append(f'"{numbers}",please {name} {n % 2},{name}')
    (tmp_path / "items.csv").write_text("\n".join(lines))
    learner, task = built(f"manifest:{tmp_path / 'items.csv'}", phases=3, batch_size=6)
    assert learner.words == "text"
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["test/seen_accuracy"])


def test_one_class_in_a_phase_and_one_item_of_a_class_train():
    learner, task = built("digit-words?train=1&test=3", phases=10, batch_size=4, epochs=1, memory=1)
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert learner.kept.sum() == 9
