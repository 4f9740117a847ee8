"""TeminAL: the ancestor's numbers, identities of the loss, stages, ladder, composed sounds, resuming, processes, errors."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.cli import main
from counterpoint.core import block_contrast
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, fitted, load_learner
from counterpoint.systems.alignment import teminal
from counterpoint.tasks.ladder import RUNGS, Space, ladder
from counterpoint.views.sounds import sounding
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "teminal.npz")
NAMES = ("audio_fwd", "audio_rev", "text_fwd", "text_rev")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(draw(seed, *shape), dim=1)


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_both_directions_and_gradients_equal_those_of_tact(number, dtype, rtol):
    leaves = [torch.from_numpy(PARITY[f"case{number}/in/{name}"]).to(dtype).requires_grad_() for name in NAMES]
    alphas = [float(PARITY[f"case{number}/param/{name}"]) for name in ("alpha_same", "alpha_cross")]
    found = fn.temporal_nce(*leaves, *alphas)
    found.loss.backward()
    for name, value in (
        ("loss", found.loss),
        ("loss_text_anchor", found.text_anchor),
        ("loss_audio_anchor", found.audio_anchor),
    ):
        assert value.item() == pytest.approx(float(PARITY[f"case{number}/out/{name}"]), rel=rtol)
    for name, leaf in zip(NAMES, leaves, strict=True):
        wanted = torch.from_numpy(PARITY[f"case{number}/grad/{name}"]).to(dtype)
        torch.testing.assert_close(leaf.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def plain(audios, texts, same, cross, scale, factors, meaning=None):
    """Compute the loss by its definition, one anchor after another."""
    n, total = len(audios[0]), torch.zeros((), dtype=torch.float64)
    a, t = torch.cat(audios), torch.cat(texts)
    for query, key in ((t, a), (a, t)):
        for i in range(len(query)):
            found = []
            for j in range(len(key)):
                weight = 1.0 if i // n == j // n else (same if i % n == j % n else cross) + 1e-8
                if meaning is None or i == j or meaning[i // n][i % n] != meaning[j // n][j % n]:
                    found.append(scale * query[i] @ key[j] + math.log(weight))
            log_z = torch.stack(found).logsumexp(0)
            total = total + factors[i // n] * (log_z - scale * query[i] @ key[i]) / (n * sum(factors))
    return total


@pytest.mark.parametrize(("n", "few"), [(1, 512), (5, 512), (5, 0), (22, 0)])  # by whole matrices, and by the kernel
@pytest.mark.parametrize("masked", [False, True])
def test_three_blocks_with_weights_and_meanings_follow_the_definition(n, few, masked, monkeypatch):
    monkeypatch.setattr(block_contrast, "FEW", few)
    audios, texts = [[unit(seed + k, n, 4).requires_grad_() for k in range(3)] for seed in (0, 10)]
    meaning = torch.stack([torch.arange(n) % 3 + 9 * k for k in range(3)]) if masked else None
    found = fn.temporal_nce(
        *(audios[0], audios[1], texts[0], texts[1], 0.5, 2.0, 6.0, audios[2], texts[2]), 0.7, 0.3, meaning
    ).loss
    wanted = plain(audios, texts, 0.5, 2.0, 6.0, (1.0, 0.7, 0.3), meaning)
    torch.testing.assert_close(found, wanted)
    leaves = audios + texts
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_weights_are_twice_clip_of_both_blocks_in_one_batch():
    a, b, x, y = (unit(seed, 6, 5) for seed in range(4))
    torch.testing.assert_close(
        fn.temporal_nce(a, b, x, y, logit_scale=5.0).loss,
        2 * fn.clip(torch.cat([a, b]), torch.cat([x, y]), math.log(5.0)),
        rtol=1e-8,
        atol=0,
    )


def test_without_weights_the_blocks_do_not_meet():
    a, b, x, y = (unit(seed, 6, 5) for seed in range(4))
    found = fn.temporal_nce(a, b, x, y, 0.0, 0.0, 2.0)
    apart = [fn.single_dual_nce(a, x, 2.0), fn.single_dual_nce(b, y, 2.0)]
    for name in ("loss", "text_anchor", "audio_anchor"):
        wanted = sum(getattr(one, name) for one in apart) / 2
        torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        fn.temporal_nce(a, b, x, y, 0.0, 0.0, 2.0, beta=0.0).loss, apart[0].loss, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(apart[0].loss, 2 * fn.clip(a, x, math.log(2.0)))


def test_embeddings_of_zeros_give_the_logarithm_of_the_weighted_number_of_candidates():
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    found = fn.temporal_nce(zeros, zeros, zeros, zeros, 0.5, 2.0)
    assert found.loss.item() == pytest.approx(2 * math.log(5 + 0.5 + 4 * 2), rel=1e-8)
    three = fn.temporal_nce(zeros, zeros, zeros, zeros, 0.5, 2.0, 1.0, zeros, zeros)
    assert three.loss.item() == pytest.approx(2 * math.log(5 + 2 * (0.5 + 4 * 2)), rel=1e-8)


def test_one_pair_is_contrasted_with_its_own_inverted_version():
    a, b, x, y = (unit(seed, 1, 4) for seed in range(4))
    assert fn.temporal_nce(a, b, x, y, 1.0, 0.0).loss.item() > 0
    torch.testing.assert_close(fn.temporal_nce(a, b, x, y, 1.0, 7.0).loss, fn.temporal_nce(a, b, x, y, 1.0, 0.0).loss)
    assert fn.single_dual_nce(a, x, 3.0).loss.item() == pytest.approx(0, abs=1e-12)


def test_a_row_of_the_same_meaning_is_no_negative():
    a, x = unit(0, 4, 3), unit(1, 4, 3)
    a[2], x[2] = a[0], x[0]
    alone = fn.single_dual_nce(a[[0, 1, 3]], x[[0, 1, 3]], 4.0)
    found = fn.single_dual_nce(a, x, 4.0, torch.tensor([5, 6, 5, 7]))
    by_hand = plain([a], [x], 1.0, 1.0, 4.0, (1.0,), torch.tensor([[5, 6, 5, 7]]))
    torch.testing.assert_close(found.loss, by_hand)
    assert found.loss < fn.single_dual_nce(a, x, 4.0).loss
    assert alone.loss > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.temporal_nce(x, x[:3], x, x), "audio_fwd and audio_rev and text_fwd and text_rev must be"),
        (lambda x: fn.temporal_nce(x, x, x, x, audio_over=x), "audio_over and text_over belong together"),
        (lambda x: fn.temporal_nce(x, x, x, x, -1.0), "alpha_same must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, 1.0, math.nan), "alpha_cross must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, beta=-1.0), "beta must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, logit_scale=-1.0), "logit_scale must be at least 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, meaning=torch.arange(4)), r"meaning must be \[2, 4\]"),
        (lambda x: fn.single_dual_nce(x, x, 1.0, torch.arange(3)), r"meaning must be \[4\]"),
        (lambda x: fn.single_dual_nce(x[:0], x[:0]), "empty batch"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3))


# --------------------------------------------------------------------------------------------------------------- stages


DATA = "events?kinds=6&train=4&test=3&seconds=0.2"
SMALL = {
    "text_encoder": "text-8-1-2",
    "embedding": 8,
    "batch_size": 8,
    "base_epochs": 1,
    "epochs": 1,
    "base_duals": 0.5,
    "evaluate_every": 5,
}
CLIP = f"clip?data={DATA.replace('?', '%3F').replace('&', '%26')}&audio_encoder=frames-s&text_encoder=text-8-1-2&embedding=4"
CLIP += "&context=16&batch_size=8&epochs=1"


def built(data: str = DATA, seed: int = 0, **settings):
    experiment = Experiment.resolve("teminal", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, seed), task


def begun(data: str = DATA, **settings):
    """Return a learner that stands at its first stage, and its survey."""
    learner, task = built(data, **settings)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner, learner.survey


def prepared(learner, survey, stage: int, rows=range(8)):
    learner.position.stage = stage
    rows = np.asarray(rows)
    return learner.prepare(survey.batch("train", rows), torch.Generator().manual_seed(0)), rows


def described(learner, batch) -> list[str]:
    return [learner.tokenizer.decode(row[mask].tolist()).strip() for row, mask in zip(*batch["texts"], strict=True)]


def test_stage_b_composes_forward_inverted_and_overlapped_clips_with_their_texts():
    learner, survey = begun()
    batch, rows = prepared(learner, survey, 2)
    n, texts = len(rows), described(learner, batch)
    assert batch["sounds"].shape[0] == len(texts) == 3 * n
    own = sounding(survey.batch("train", rows)["inputs"]["audio"])
    words = set()
    for k in range(n):
        first, word, second = texts[k].split()
        words.add(word)
        assert texts[n + k] == f"{second} {word} {first}"
        assert texts[2 * n + k] == f"{first} while {second}"
        assert first == learner.captions(torch.tensor([rows[k]]))[0] != second
        # With "before" the own sound leads the forward clip, with "after" it leads the inverted one.
        leading = batch["sounds"][k if word == "before" else n + k]
        length = int(own.length[k])
        start = int(own.start[k])
        torch.testing.assert_close(leading[:length], own.waves[k, start : start + length])
    assert words == {"before", "after"}
    meaning = batch["meaning"]
    assert meaning.shape == (3, n)
    assert not set(meaning[0].tolist()) & set(meaning[2].tolist())
    assert (meaning[0] != meaning[1]).all()


def test_before_and_after_of_the_same_sounds_have_one_meaning():
    learner, survey = begun()
    found = {}
    for seed in range(12):
        learner.position.stage = 2
        batch = learner.prepare(survey.batch("train", np.arange(8)), torch.Generator().manual_seed(seed))
        for text, number in zip(described(learner, batch), batch["meaning"].flatten().tolist(), strict=True):
            a, word, b = text.split()
            said = {"before": (a, b), "after": (b, a), "while": frozenset((a, b))}[word]
            assert found.setdefault(number, said) == said
    assert len(set(found.values())) == len(found)


def test_half_of_stage_a_are_single_sounds_and_half_have_two_events():
    learner, survey = begun()
    batch, rows = prepared(learner, survey, 1)
    texts = described(learner, batch)
    assert sum(" and " in text for text in texts) == 4
    waves = survey.batch("train", rows)["inputs"]["audio"]
    for text, clip, own in zip(texts, batch["sounds"], waves, strict=True):
        assert torch.equal(clip, own) == (" and " not in text)


def test_a_base_without_duals_learns_the_items_as_they_are():
    learner, survey = begun(base_duals=0.0)
    batch, rows = prepared(learner, survey, 0)
    assert torch.equal(batch["sounds"], survey.batch("train", rows)["inputs"]["audio"])
    assert described(learner, batch) == learner.captions(torch.from_numpy(rows))


def test_each_stage_trains_by_the_function_that_equals_the_authors(monkeypatch):
    learner, task = built()
    seen = []

    def spied(real):
        def call(*arguments):
            seen.append((learner.stage_name, real.__name__, len(arguments[0]), len(arguments)))
            return real(*arguments)

        return call

    for real in (teminal.temporal_nce, teminal.single_dual_nce):
        monkeypatch.setattr(teminal, real.__name__, spied(real))
    row = fit(learner, task, bar=False)[-1]
    wanted = [("base", "single_dual_nce", 8, 4), ("A", "single_dual_nce", 8, 4), ("B", "temporal_nce", 8, 12)]
    assert seen == [one for one in wanted for _ in range(3)]
    assert (learner.history >= 0).all()
    for name in RUNGS:
        assert 0 <= row[f"test/ladder_{name}"] <= 1
    figures = learner.figures(Survey(task, learner))
    assert list(figures["The ladder of zero-shot tests"]["series"]) == ["before", "after A", "after B", "chance"]
    assert len(figures["The ladder in numbers"]["rows"]) == len(RUNGS)


@pytest.mark.parametrize(
    ("settings", "names", "rows"),
    [
        ({"post": "b", "negatives": "inverted"}, ["base", "B"], 16),
        ({"post": "b", "negatives": "none"}, ["base", "B"], 8),
        ({"post": "a"}, ["base", "A"], 8),
        ({"post": "none"}, ["base"], 8),
    ],
)
def test_arms_have_their_stages_and_blocks(settings, names, rows):
    learner, survey = begun(**settings)
    assert [stage.name for stage in learner.stages()] == names
    batch, _ = prepared(learner, survey, len(names) - 1)
    assert len(batch["sounds"]) == rows
    assert learner.loss(batch)["loss"].isfinite()


def test_order_is_learned_and_lost_by_an_encoder_that_averages_over_time():
    torch.manual_seed(0)
    names, kinds = ["a", "b", "c", "d"], torch.arange(24) % 4
    waves = torch.zeros(24, 40)
    waves[:, :10] = (kinds[:, None] + 1) / 8

    def perfect(clips):
        """Mark the first and the second level of a clip, and their sum where both sound at once."""
        rows = torch.zeros(len(clips), 3, 5)
        for row, clip in enumerate(clips):
            levels = [round(float(value) * 8) for value in clip.unique_consecutive() if value > 0]
            if len(levels) == 2:
                rows[row, 0, levels[0]] = rows[row, 1, levels[1]] = 1
            elif len(levels) == 1:
                rows[row, 2, 0] = 1
        return torch.nn.functional.normalize(rows.flatten(1), dim=1, eps=1e-12)

    def read(texts):
        rows = torch.zeros(len(texts), 3, 5)
        for row, words in enumerate(text.replace(",", "").split() for text in texts):
            if "before" in words or "then" in words or "followed" in words:
                first, second = words[0], words[-1]
            elif "after" in words:
                first, second = words[-1], words[0]
            elif "while" in words:
                rows[row, 2, 0] = 1
                continue
            else:
                continue
            rows[row, 0, names.index(first) + 1] = rows[row, 1, names.index(second) + 1] = 1
        return torch.nn.functional.normalize(rows.flatten(1), dim=1, eps=1e-12)

    found, chance = ladder(Space(perfect, read), waves, kinds, names)
    assert [found[name] for name in ("order", "relation", "free_order", "retrieval")] == [1, 1, 1, 1]
    assert found["summary"] == pytest.approx(0.5**0.5)
    mean, _ = ladder(
        Space(lambda clips: clips.sort(1).values[:, -8:], lambda texts: draw(3, len(texts), 8).float()),
        waves,
        kinds,
        names,
    )
    assert mean["retrieval"] < 0.5
    assert set(chance) == set(RUNGS)


# ------------------------------------------------------------------------------------------------------ runs and a start


@pytest.mark.usefixtures("drawn")
def test_it_trains_from_the_command_line_with_its_page(tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["train", "teminal", "--data", DATA, "--out", str(tmp_path), "--name", "a", *options]) == 0
    assert "The ladder of zero-shot tests" in (tmp_path / "a" / "report.html").read_text()
    again = Run.open(tmp_path / "a")
    assert load_learner(again).base == {}


@pytest.mark.parametrize("kind", ["run", "fit"])
def test_post_training_starts_from_a_run_and_is_usable_without_it(kind, tmp_path, undrawn):
    start = f"fit:{CLIP}"
    clip = fitted(CLIP)
    if kind == "run":
        words, seed = dict(pair.split("=") for pair in CLIP.partition("&")[2].split("&")), 0
        config = Experiment.resolve("clip", DATA, overrides={k: _number(v) for k, v in words.items()}).config
        training.train("clip", config, data=DATA, seed=seed, out=tmp_path, name="clip", say=lambda _: None)
        start, clip = f"run:{tmp_path / 'clip'}", load_learner(tmp_path / "clip")
    learner, task = built(start=start, base_epochs=3, embedding=16, head="batchnorm")
    assert [stage.name for stage in learner.stages()] == ["A", "B"]
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.stages()[0].enter(learner.survey)
    for name in ("audio", "text"):
        assert torch.equal(learner.heads[name].weight, clip.heads[name].weight)
    assert learner.log_scale.item() == clip.log_scale.item()
    assert (learner.history[0] >= 0).all()
    config = Experiment.resolve("teminal", DATA, overrides=SMALL | {"start": start}).config
    run = training.train("teminal", config, data=DATA, seed=0, out=tmp_path, name="post", say=lambda _: None)
    loaded = load_learner(run)
    assert loaded.base["embedding"] == 4
    assert loaded.embed(learner.survey.batch("test", np.arange(2)))["audio"].shape == (2, 4)


def _number(text: str):
    return int(text) if text.isdigit() else text


def test_interrupted_and_resumed_in_any_stage_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("teminal", DATA, overrides=SMALL).config
    # In the base, in A, in B.
    need_equal_ends(monkeypatch, teminal.TeminAL, "teminal", config, DATA, (1, 4, 7), tmp_path)


def test_a_run_that_started_from_another_resumes_with_its_networks(tmp_path, monkeypatch, undrawn):
    fitted(CLIP)
    config = Experiment.resolve("teminal", DATA, overrides=SMALL | {"start": f"fit:{CLIP}"}).config
    need_equal_ends(monkeypatch, teminal.TeminAL, "teminal", config, DATA, 4, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    words = ["train", "teminal", "--data", DATA, "--out", str(tmp_path), "--head", "linear"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command_over_processes([*words, "--name", "two"], tmp_path)
    config = Experiment.resolve("teminal", DATA, overrides=SMALL | {"head": "linear"}).config
    one = training.train("teminal", config, data=DATA, out=tmp_path, name="one", say=lambda _: None).metrics()
    two = Run.open(tmp_path / "two").metrics()
    for ours, theirs in zip(two, one, strict=True):
        for name in ("train/loss", "train/text_anchor"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


# ------------------------------------------------------------------------------------------------------------- bad input


def manifest(folder: Path, rows: int = 36, label: bool = True, classless: int = 0) -> str:
    """Write sounds of unequal length with captions, and classes for all but the first ones."""
    rng, lines = np.random.default_rng(0), ["audio,text,split" + ",label" * label]
    for n in range(rows):
        name = ("dog", "bell", "rain")[n % 3]
        length = 1600 + 200 * (n % 5)
        tone = np.sin(np.arange(length) * (0.1 + 0.15 * (n % 3)) + rng.uniform())
        with wave.open(str(folder / f"{n}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.rint(12000 * tone).astype("<i2").tobytes())
        part = ("train", "train", "validation", "test")[n // 3 % 4]
        lines.append(f"{n}.wav,{name},{part}" + ("" if not label else f",{'' if n < classless else name}"))
    (folder / "sounds.csv").write_text("\n".join(lines))
    return f"manifest:{folder / 'sounds.csv'}?rate=8000&seconds=0.6"


def test_a_manifest_of_sounds_trains_and_names_captions_without_a_known_class(tmp_path, undrawn):
    said = []
    config = Experiment.resolve(
        "teminal", data := manifest(tmp_path, classless=3), overrides=SMALL | {"batch_size": 4}
    ).config
    row = training.train("teminal", config, data=data, out=tmp_path, name="a", say=said.append).metrics()[-1]
    found = [line for line in said if "no sound, no caption or no known class" in line]
    assert len(found) == 1
    assert "the first is item" in found[0]
    assert not any("last longer than half" in line for line in said)
    assert 0 <= row["test/ladder_order"] <= 1


def test_without_classes_each_caption_is_an_event(tmp_path):
    learner, _ = begun(manifest(tmp_path, label=False), batch_size=4)
    assert learner.names == ["bell", "dog", "rain"]
    assert any("each of the 3 different captions is an event of its own" in line for line in learner.warnings)


def test_sounds_longer_than_half_a_clip_and_long_captions_are_counted(tmp_path, undrawn):
    said = []
    data = manifest(tmp_path).replace("seconds=0.6", "seconds=0.3")
    config = Experiment.resolve("teminal", data, overrides=SMALL | {"batch_size": 4, "context": 4}).config
    training.train("teminal", config, data=data, out=tmp_path, name="a", say=said.append)
    assert sum("sounds last longer than half of a clip, 0.15 s" in line for line in said) == 1
    assert any(
        "3 of 3 captions are so long that a text of two such events exceeds the context of 4" in line for line in said
    )


def test_a_batch_of_one_event_is_named():
    learner, survey = begun()
    rows = np.flatnonzero(survey.split("train").labels == 0)
    with pytest.raises(CounterpointError, match=f"all {len(rows)} items of a batch are of one event"):
        prepared(learner, survey, 2, rows)


def test_data_with_fewer_than_two_events_are_named(tmp_path):
    place = manifest(tmp_path)
    text = (tmp_path / "sounds.csv").read_text().replace("bell", "dog").replace("rain", "dog")
    (tmp_path / "sounds.csv").write_text(text)
    with pytest.raises(DataError, match="composes clips of two different events, and the training items have 1"):
        begun(place, batch_size=4)


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        ("digit-halves", {}, "teminal aligns one audio and one text modality"),
        (DATA, {"base_epochs": 0}, "base_epochs must be > 0"),
        (DATA, {"base_duals": 1.5}, r"base_duals must lie in 0\.\.1"),
        (DATA, {"post_rate": 0.0}, "post_rate must be > 0"),
        (DATA, {"alpha_same": -1.0}, "alpha_same must be at least 0"),
        (DATA, {"gamma": math.inf}, "gamma must be finite"),
        (DATA, {"post": "c"}, "unknown post 'c'"),
        (DATA, {"negatives": "all"}, "unknown negatives 'all'"),
        (DATA, {"head": "mlp"}, "unknown head 'mlp'"),
        (DATA, {"start": "runs/x"}, "--start runs/x: name a run of sounds and texts"),
        (DATA, {"start": "run:runs/x", "post": "none"}, "leaves nothing to train"),
        (
            DATA,
            {"start": "fit:simclr?data=digits%3Fsize=8%26train=40&encoder=mlp-s&epochs=1&batch_size=16"},
            "does not embed",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(data, settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(data, **settings)


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (DATA.replace("0.2", "0.3"), {}, "its sounds have 1600 samples at 8000 Hz, those of the data 2400 at 8000 Hz"),
        (DATA, {"context": 20}, "its texts have at most 16 tokens; use --context 16 or less, got 20"),
    ],
)
def test_a_start_that_does_not_fit_is_named(data, settings, said):
    learner, survey = begun(data, start=f"fit:{CLIP}", **settings)
    with pytest.raises(CounterpointError, match=said):
        learner.stages()[0].enter(survey)
