"""CreamFL: the authors' numbers, identities, rounds, messages, failing parties, resuming, errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import counterpoint
from counterpoint import cli, search, training
from counterpoint.core.class_logits import class_margin_loss
from counterpoint.data import federations as federation_data
from counterpoint.data.pairs import AlignedColumns
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, Interrupted, RunError
from counterpoint.experiment import Experiment
from counterpoint.systems.federated import creamfl
from counterpoint.tasks import federations, public_sets
from counterpoint.tasks.public_sets import federate
from launch import exit_code

PARITY = np.load(Path(__file__).parents[1] / "parity" / "creamfl.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def read(case: int, dtype: torch.dtype, *names: str) -> list[Tensor]:
    found = [torch.from_numpy(PARITY[f"case{case}/in/{name}"]) for name in names]
    return [x.to(dtype) if x.is_floating_point() else x for x in found]


def need_equal(case: int, found: dict[str, Tensor], gradients: dict[str, Tensor], rtol: float) -> None:
    for name, value in found.items():
        assert float(value) == pytest.approx(float(PARITY[f"case{case}/out/{name}"]), rel=rtol), name
    for name, value in gradients.items():
        wanted = torch.from_numpy(np.asarray(PARITY[f"case{case}/grad/{name}"])).to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_the_fused_representations_equal_the_authors():
    image, text, of_image, of_text = read(
        0, torch.float32, "global_image", "global_text", "client_image", "client_text"
    )
    for name, client, other in (("image", of_image, text), ("text", of_text, image)):
        wanted = torch.from_numpy(PARITY[f"case0/out/{name}_aggregated"])
        torch.testing.assert_close(creamfl.contrastive_ensemble(client, other), wanted, rtol=1e-5, atol=1e-7)


@TYPES
def test_the_contrast_of_one_modality_equals_the_authors(dtype, rtol):
    emb, *rest = read(1, dtype, "emb_raw", "emb_old", "global_same", "global_cross", "public_index")
    found = creamfl.cream_uni(emb.requires_grad_(), *rest, weight=float(PARITY["case1/param/weight"]))
    found.loss.backward()
    outs = {"loss": found.loss, "loss_intra": found.intra, "loss_inter": found.inter}
    need_equal(1, outs, {"emb_raw": emb.grad}, rtol)


@TYPES
def test_the_contrast_of_two_modalities_equals_the_authors(dtype, rtol):
    names = ("image_emb_raw", "text_emb_raw", "image_emb_old", "text_emb_old", "global_image", "global_text")
    at = read(2, dtype, *names, "public_index")
    leaves = [x.requires_grad_() for x in at[:2]]
    found = creamfl.cream_multi(*at, weight=float(PARITY["case2/param/weight"]))
    found.loss.backward()
    outs = {"loss": found.loss, "loss_intra": found.intra, "loss_inter": found.inter}
    need_equal(2, outs, dict(zip(names, [x.grad for x in leaves], strict=False)), rtol)


@TYPES
def test_the_soft_contrast_equals_the_authors(dtype, rtol):
    names = ("image_emb_raw", "text_emb_raw", "negative_scale", "shift")
    at = read(3, dtype, *names[:2])
    at += [torch.tensor(float(PARITY[f"case3/param/{name}"]), dtype=dtype) for name in names[2:]]
    loss = creamfl.soft_contrastive(*(x.requires_grad_() for x in at))
    loss.backward()
    need_equal(3, {"loss": loss, "i2t_loss": loss / 2}, dict(zip(names, [x.grad for x in at], strict=True)), rtol)


def test_equal_parties_are_fused_to_their_vector_and_shares_sum_to_one():
    rows, other = unit(draw(0, 9, 4)), unit(draw(1, 9, 4))
    torch.testing.assert_close(creamfl.contrastive_ensemble(rows.expand(3, 9, 4), other), rows)
    shares = creamfl.ensemble_weights(unit(draw(2, 5, 9, 4)), other)
    torch.testing.assert_close(shares.sum(0), torch.ones(9, dtype=torch.float64))
    alone = unit(draw(3, 1, 9, 4))
    torch.testing.assert_close(creamfl.contrastive_ensemble(alone, other), alone[0])


def test_an_orthogonal_embedding_has_the_losses_of_chance():
    z, rows = torch.eye(6, dtype=torch.float64)[5:], torch.eye(6, dtype=torch.float64)[:4]
    found = creamfl.cream_uni(z, rows[:1], rows, rows, torch.tensor([2]))
    assert found.inter.item() == pytest.approx(np.log(4))
    assert found.intra.item() == pytest.approx(np.log(2))
    same = unit(draw(0, 4, 6))
    found = creamfl.cream_uni(draw(1, 4, 6), same, same, unit(draw(2, 4, 6)), torch.arange(4))
    assert found.intra.item() == pytest.approx(np.log(2))  # the old model is where the server is


def test_the_scaled_loss_counts_both_terms_alike():
    rows = [unit(draw(seed, 5, 3)) for seed in range(4)]
    found = creamfl.cream_uni(*rows, torch.arange(5), loss_scale=True)
    assert found.loss.item() == pytest.approx(found.intra.item())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: creamfl.cream_uni(x, x[:3], x, x, torch.arange(4)), "emb and emb_old must be"),
        (lambda x: creamfl.cream_uni(x, x, x[:, :2], x[:, :2], torch.arange(4)), "emb must be .n, dim"),
        (lambda x: creamfl.cream_uni(x, x, x, x, torch.arange(1, 5)), "public_index must lie in 0..3"),
        (lambda x: creamfl.cream_uni(x, x, x, x, torch.arange(4), temperature=0.0), "temperature must be positive"),
        (lambda x: creamfl.contrastive_ensemble(x, x), "client must be"),
        (lambda x: creamfl.contrastive_ensemble(x[None][:0], x), "empty batch"),
        (lambda x: creamfl.soft_contrastive(x, x[:2]), "image_emb and text_emb must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(unit(draw(0, 4, 3)))


def test_the_class_loss_lowers_the_true_logit_and_spreads_the_weights():
    z, weights = unit(draw(0, 3, 4)), draw(1, 5, 4)
    labels = torch.tensor([0, 4, 2])
    held = weights.clamp(min=0)
    scores = 2 * z @ held.T
    scores[torch.arange(3), labels] -= 4
    wanted = torch.nn.functional.cross_entropy(scores, labels) + 0.5 * torch.nn.functional.cross_entropy(
        held @ held.T, torch.arange(5)
    )
    torch.testing.assert_close(class_margin_loss(z, weights, labels, 2.0), wanted)


def test_weighted_fusion_beats_the_mean_where_parties_know_different_items():
    cosines, found = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)

        def near(truth, noise, rng=rng):
            rows = truth + noise * rng.standard_normal(truth.shape) / 4
            return torch.from_numpy(rows / np.linalg.norm(rows, axis=-1, keepdims=True))

        truth = near(np.zeros((400, 16)), 1.0).numpy()
        sure = rng.random((6, 400, 1)) < 0.34
        parties = near(np.broadcast_to(truth, (6, 400, 16)), np.where(sure, 0.5, 4.0))
        server = near(truth, 0.6)
        both = [creamfl.contrastive_ensemble(parties, server), parties.mean(0)]
        truths = torch.from_numpy(truth)
        cosines.append([float(torch.cosine_similarity(x, truths).mean()) for x in both])
        found.append([float(((unit(x) @ truths.T).argmax(1) == torch.arange(400)).double().mean()) for x in both])
    assert min(a - b for a, b in cosines) > 0.05
    assert min(a - b for a, b in found) > 0.08


# ---------------------------------------------------------------------------------------------------------------- rounds

DATA = "digit-parties?vectors=1&train=40&test=30&items=40&pairs=1&images=1&texts=1"
SMALL = {
    "rounds": 3,
    "party_epochs": 1,
    "vector_encoder": "relu-8",
    "party_vector_encoder": "relu-6,relu-8-4",
    "embedding": 4,
    "batch_size": 16,
    "party_batch_size": 16,
}


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("creamfl", data, overrides=SMALL | settings)
    return experiment, experiment.task()


def members(task, seed: int = 0):
    return {party.name: creamfl.CreamFLParty(task, party.name, seed) for party in task.parties}


def spied(exchange, seen):
    """Keep every message that passes."""

    class Spied:
        state, restore = exchange.state, exchange.restore

        def __call__(self, round, asked, message):
            answers = exchange(round, asked, message)
            seen.append((round, message, answers))
            return answers

    return Spied()


def federated(experiment, task, exchange, **more):
    more = {"run": None, "say": lambda _: None} | more
    return federate(experiment, task, creamfl.CreamFLServer, exchange, 0, **more)


def test_only_representations_of_the_public_items_travel():
    experiment, task = built()
    seen: list = []
    federated(experiment, task, spied(federations.InProcess(members(task)), seen))
    assert [round for round, *_ in seen] == [0, 1, 2]
    for _, message, answers in seen:
        for sender, told, kinds in (
            ("server", message, {"image", "text"}),
            ("pairs-1", answers["pairs-1"], {"image", "text"}),
            ("images-1", answers["images-1"], {"image"}),
            ("texts-1", answers["texts-1"], {"text"}),
        ):
            header = int.from_bytes(told[:8], "little")
            # Every byte is of the header or of a row: 40 public items, 4 numbers of 4 bytes.
            assert len(told) == 8 + header + len(kinds) * 40 * 4 * 4
            assert header < 400
            facts, rows = federations.unpack(told)
            assert (set(facts), set(rows)) == (set(federations.FACTS), kinds)
            assert facts["sender"] == sender
            for value in rows.values():
                length = value.norm(dim=1)  # a row may be 0 where ReLUs are
                torch.testing.assert_close(length[length > 0], torch.ones(int((length > 0).sum())))


def test_parties_have_networks_of_their_own():
    _, task = built()
    sizes = {name: sum(p.numel() for p in m.learner.parameters()) for name, m in members(task).items()}
    assert len(set(sizes.values())) == 3
    made = members(task)
    assert [layer.out_features for layer in made["images-1"].learner.encoders["image"].layers[::2]] == [8, 4]
    assert [layer.out_features for layer in made["texts-1"].learner.encoders["text"].layers[::2]] == [6]


def counted(called, name, module=creamfl):
    real = getattr(module, name)

    def spy(*arguments, **more):
        called.append(name)
        return real(*arguments, **more)

    return spy


def test_a_round_calls_the_functions_that_equal_the_authors(monkeypatch):
    called: list[str] = []
    for name in ("soft_contrastive", "cream_uni", "cream_multi", "contrastive_ensemble"):
        monkeypatch.setattr(creamfl, name, counted(called, name))
    monkeypatch.setattr(public_sets, "class_margin_loss", counted(called, "class_margin_loss", public_sets))
    built(rounds=1)[0].run(0)
    assert set(called) == {"soft_contrastive", "cream_uni", "cream_multi", "contrastive_ensemble", "class_margin_loss"}


def test_the_server_moves_towards_the_fused_representations():
    experiment, task = built(distil_weight=1.0, optimizer="sgd", lr=1.0, momentum=0.0)
    learner = experiment.learner(task.facts, 0)
    server = creamfl.CreamFLServer(learner, task, experiment.config, 0)
    before = server.represent()
    wanted = {name: unit(draw(n, 40, 4)).float() for n, name in enumerate(before)}
    found = server.merge(0, {"pairs-1": wanted})
    assert found["distillation"] > 0
    after = server.represent()
    assert list(server.shares) == ["image", "text"]
    for name, target in wanted.items():
        assert (after[name] - target).square().mean() < (before[name] - target).square().mean()


@pytest.mark.parametrize("settings", [{"together": True}, {"inter": False}, {"intra": False}, {"fusion": "mean"}])
def test_the_options_change_what_is_learned(settings):
    plain, other = (built(rounds=2, **more)[0].run(0)[-1] for more in ({}, settings))
    assert plain["train/loss"] != other["train/loss"]
    assert np.isfinite(other["test/image_to_text_r1"])


def test_without_distillation_the_server_learns_alone_and_sends_nothing(tmp_path):
    experiment, _ = built(distil_weight=0.0)
    run = Run.create(tmp_path, experiment.record(0), "alone")
    rows = experiment.run(0, run=run)
    assert "train/parties" not in rows[0]
    logs = [json.loads(line) for line in (run.path / federations.LOG).read_text().splitlines()]
    assert [log["sent_bytes"] for log in logs] == [0, 0, 0]


class Clock:
    """A clock that the test moves, so that a busy machine is never late."""

    now = 0.0

    @classmethod
    def monotonic(cls):
        return cls.now


class Failing:
    """A party that answers wrongly in the second round."""

    def __init__(self, member, way):
        self.member, self.way = member, way
        self.state, self.restore = member.state, member.restore

    def answer(self, message):
        facts, _ = federations.unpack(message)
        answer = self.member.answer(message)
        if facts["round"] != "1":
            return answer
        _, rows = federations.unpack(answer)
        name = self.member.party.name
        if self.way == "drops":
            raise ConnectionError("the line is dead")
        if self.way == "nan":
            rows = {kind: value.index_fill(0, torch.tensor([3]), float("nan")) for kind, value in rows.items()}
            return federations.pack(rows, round=1, sender=name)
        if self.way == "shape":
            return federations.pack({kind: value[:-1] for kind, value in rows.items()}, round=1, sender=name)
        if self.way == "old":
            return federations.pack(rows, round=0, sender=name)
        if self.way == "garbage":
            return b"\x00" * 20
        if self.way == "late":
            Clock.now += 60.0
        if self.way == "version":
            return answer.replace(b'"version":"' + counterpoint.__version__.encode(), b'"version":"9.9.9', 1)
        return answer


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("drops", "dropped out: ConnectionError('the line is dead')"),
        ("nan", "its rows of image hold NaN"),
        ("shape", "its rows are {'image': [39, 4]}, not {'image': [40, 4]}"),
        ("old", "it is images-1's answer of round 0"),
        ("garbage", "a message cannot be read"),
        ("late", "late: its answer took"),
        ("version", "images-1 has counterpoint 9.9.9 (messages 1), this side"),
    ],
)
def test_a_party_that_fails_is_named_and_the_round_goes_on(way, said, tmp_path, monkeypatch):
    monkeypatch.setattr(federations, "time", Clock)
    experiment, task = built(answer_seconds=50.0 if way == "late" else 0.0)
    parties: dict = members(task)
    parties["images-1"] = Failing(parties["images-1"], way)
    notes: list[str] = []
    run = Run.create(tmp_path, experiment.record(0), "r")
    exchange = federations.InProcess(parties, experiment.config.answer_seconds)
    rows = federated(experiment, task, exchange, run=run, say=notes.append)
    assert [row["train/parties"] for row in rows] == [3, 2, 3]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    (note,) = notes
    assert note.startswith(f"note: round 2 goes on without images-1: {said}")
    log = json.loads((run.path / federations.LOG).read_text().splitlines()[1])
    assert list(log["left_out"]) == ["images-1"]
    assert said in log["left_out"]["images-1"]


def test_a_round_without_any_answer_goes_on():
    experiment, task = built()

    class Gone:
        def __call__(self, round, asked, message):
            return {name: ConnectionError("gone") for name in asked}

        def state(self):
            return {}

        restore = None

    rows = federated(experiment, task, Gone())
    assert [row["train/parties"] for row in rows] == [0, 0, 0]
    assert "train/distillation" not in rows[0]


def test_a_party_with_another_public_set_or_version_names_the_difference():
    _, task = built()
    party = creamfl.CreamFLParty(task, "images-1", 0)
    rows = {name: unit(draw(0, 39, 4)) for name in ("image", "text")}
    with pytest.raises(CounterpointError, match=r"images-1: the server's public set .* is not this party's"):
        party.answer(federations.pack(rows, round=0, sender="server"))
    told = federations.pack({name: unit(draw(0, 40, 4)) for name in ("image", "text")}, round=0, sender="server")
    other = told.replace(b'"protocol":"1"', b'"protocol":"0"')
    with pytest.raises(CounterpointError, match=r"server has counterpoint .*install the same version"):
        party.answer(other)
    with pytest.raises(CounterpointError, match="unknown party 'images-9'"):
        creamfl.CreamFLParty(task, "images-9", 0)


def test_a_round_asks_some_parties_and_the_choice_is_of_seed_and_round():
    experiment, task = built("digit-parties?vectors=1&train=20&test=20&items=20", chosen=3)
    made = [federations.Federation(None, None, task.parties, experiment.config, seed, 20) for seed in (0, 0, 1)]
    asked = [[one.ask(round) for round in range(6)] for one in made]
    assert asked[0] == asked[1] != asked[2]
    assert {len(names) for names in asked[0]} == {3}
    assert len({tuple(names) for names in asked[0]}) > 1


# -------------------------------------------------------------------------------------------------------- command and disk


@pytest.mark.usefixtures("drawn")
def test_from_the_command_line_to_a_page_and_back(tmp_path, capsys):
    words = ["train", "creamfl", "--data", "digit-parties?train=40&test=20&items=40&pairs=1&images=1&texts=1"]
    words += [
        "--rounds",
        "2",
        "--party-epochs",
        "1",
        "--embedding",
        "8",
        "--batch-size",
        "16",
        "--out",
        str(tmp_path),
        "--name",
        "r",
    ]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "r")
    assert run.complete
    assert "Who has a say in image" in (run.path / "report.html").read_text()
    shown = {name: part for name, part in run.figures().items() if name.startswith("Who")}
    for part in shown.values():
        values = np.array([[float(cell) for cell in row[1:]] for row in part["rows"]])
        np.testing.assert_allclose(values.mean(0), 1, atol=0.01)
    found = training.evaluate(run, say=lambda _: None)
    assert found["image_to_text_r1"] == pytest.approx(run.metrics()[-1]["test/image_to_text_r1"])
    pytest.importorskip("pyarrow")
    assert cli.main(["embed", str(run.path), "-o", str(tmp_path / "r.parquet"), "--split", "test"]) == 0
    rows = search.read_embeddings(tmp_path / "r.parquet")
    assert (rows.modalities, len(rows.item)) == ({"image": "image", "text": "text"}, 20)
    assert len(search.search(run, ["three four"], tmp_path / "r.parquet", k=2)[1]) == 2
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "r.pt2")]) == 0
    assert (tmp_path / "r.image.pt2").is_file()


def test_a_folder_of_the_user_s_own_parties(tmp_path):
    rng = np.random.default_rng(0)

    def write(path, columns, label, count=30):
        path.parent.mkdir(exist_ok=True)
        lines = [",".join([*columns, *(["label"] if label else [])])]
        for n in range(count):
            cells = ['"' + " ".join(f"{x:.2f}" for x in rng.standard_normal(3)) + '"' for _ in columns]
            lines.append(",".join([*cells, *([f"{label}{n % 2}"] if label else [])]))
        path.write_text("\n".join(lines))

    write(tmp_path / "public.csv", ["vector_a", "vector_b"], "")
    write(tmp_path / "parties" / "north.csv", ["vector_a"], "x")
    write(tmp_path / "parties" / "south.csv", ["vector_a"], "y")
    write(tmp_path / "parties" / "west.csv", ["vector_a", "vector_b"], "")
    experiment, task = built(f"parties:{tmp_path}", rounds=1, batch_size=8)
    assert [party.name for party in task.parties] == ["north", "south", "west"]
    assert any("south and north have different classes (x0, x1, y0)" in note for note in experiment.source().notes)
    (row,) = experiment.run(0)
    assert row["train/parties"] == 3
    write(tmp_path / "parties" / "north.csv", ["vector_a"], "")
    with pytest.raises(DataError, match="north has vector_a alone and learns by its classes"):
        experiment.source()
    write(tmp_path / "parties" / "north.csv", ["vector_c"], "x")
    with pytest.raises(DataError, match="north has the modality vector_c, the public set vector_a and vector_b"):
        experiment.source()
    write(tmp_path / "parties" / "north.csv", ["vector_a"], "x", 0)
    with pytest.raises(DataError, match="north"):
        experiment.source()


@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_and_resumed_it_ends_the_same(after, tmp_path, monkeypatch, undrawn):
    config = built(chosen=2)[0].config
    whole = training.train("creamfl", config, data=DATA, out=tmp_path, name="whole", say=lambda _: None)
    learn = creamfl.CreamFLServer.learn

    def stopped(self, round):
        if round == after:
            raise KeyboardInterrupt
        return learn(self, round)

    with monkeypatch.context() as patch:
        patch.setattr(creamfl.CreamFLServer, "learn", stopped)
        with pytest.raises(Interrupted, match=f"stopped in round {after + 1}; resume it: counterpoint train --resume"):
            training.train("creamfl", config, data=DATA, out=tmp_path, name="cut", say=lambda _: None)
    cut = Run.open(tmp_path / "cut")
    assert not cut.complete
    with (cut.path / federations.LOG).open("a") as file:
        file.write("{}\n")  # a round that was logged but not kept
    training.resume(cut.path, say=lambda _: None)
    assert cut.metrics() == whole.metrics()
    assert (cut.path / federations.LOG).read_text() == (whole.path / federations.LOG).read_text()
    for name, value in whole.load_weights().items():
        assert torch.equal(cut.load_weights()[name], value), name


def child(folder: Path, place: str, number: int) -> None:
    """Train or resume, and kill the process from within a round, as hard as `kill -9` does."""
    owner, name = {"learns": (creamfl.CreamFLServer, "learn"), "keeps": (federations.Federation, "_keep")}[place]
    real, calls = getattr(owner, name), 0

    def killed(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)

    setattr(owner, name, killed)
    if folder.exists():
        training.resume(folder, say=lambda _: None)
    else:
        given = {"data": DATA, "out": folder.parent, "name": folder.name, "say": lambda _: None}
        training.train("creamfl", built(chosen=2)[0].config, **given)


@pytest.mark.slow
def test_killed_between_rounds_and_in_one_and_resumed_it_ends_the_same(tmp_path):
    assert exit_code(child, tmp_path / "whole", "learns", -1) == 0
    # Before the second round; in the second round, after its line of the log and before its state.
    for place, number in (("learns", 2), ("keeps", 1)):
        assert exit_code(child, tmp_path / "cut", place, number) == -signal.SIGKILL
        assert not Run.open(tmp_path / "cut").complete
    assert exit_code(child, tmp_path / "cut", "learns", -1) == 0
    whole, cut = Run.open(tmp_path / "whole"), Run.open(tmp_path / "cut")
    assert cut.complete
    assert cut.metrics() == whole.metrics()
    assert (cut.path / federations.LOG).read_text() == (whole.path / federations.LOG).read_text()
    for name, value in whole.load_weights().items():
        assert torch.equal(cut.load_weights()[name], value), name


def test_an_interrupted_federation_has_its_last_round_on_disk_and_a_damaged_checkpoint_is_named(tmp_path, undrawn):
    experiment, _ = built()
    run = Run.create(tmp_path, experiment.record(0), "r")
    run.checkpoint.write_bytes(b"half")
    with pytest.raises(RunError, match=r"last.ckpt cannot be resumed from"):
        experiment.run(0, run=run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"chosen": -1}, "chosen must not be negative"),
        ({"message_megabytes": 0.0}, "message_megabytes must be > 0"),
        (
            {"message_megabytes": 1e-3},
            "a message of 40 public items with 4 numbers in 2 modalities has 0.0 MB, more than",
        ),
        ({"contrast_weight": -1.0}, "contrast_weight must be at least 0"),
        ({"contrast_temperature": 0.0}, "contrast_temperature must be > 0"),
        ({"fusion": "median"}, "unknown fusion 'median'"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


def test_a_party_without_items_and_two_of_one_name_are_named():
    _, task = built()
    public, (pairs, *_) = task.data, task.parties
    empty = federation_data.Party("empty", pairs.modalities, AlignedColumns({"image": np.zeros((0, 128), np.float32)}))
    with pytest.raises(DataError, match="the party empty has 0 items"):
        federation_data.FederatedData(public, (empty,))
    with pytest.raises(DataError, match="two parties have the name pairs-1"):
        federation_data.FederatedData(public, (pairs, pairs))
    with pytest.raises(DataError, match="needs at least one party"):
        federation_data.FederatedData(public, ())
    with pytest.raises(CounterpointError, match="train, test and items must be at least 20"):
        built("digit-parties?items=3")
    with pytest.raises(CounterpointError, match="not for federations"):
        Experiment.resolve("creamfl", "digit-halves").task()
