"""What `import counterpoint` offers: lazy names, training with keywords, runs as objects, comparisons, search."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import counterpoint as cp
from counterpoint import catalog
from counterpoint.engine.services import Callback
from counterpoint.errors import CounterpointError, DataError, Interrupted, RunError
from counterpoint.lab.claims import records

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = {"epochs": 1, "batch_size": 16, "encoder": "conv-s", "quiet": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int = 60, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def items(count: int = 60) -> dict:
    colours = ["red", "green", "blue"]
    rng = np.random.default_rng(1)
    return {
        "image": pictures(count),
        "text": [f"a {colours[n % 3]} thing, number {n}" for n in range(count)],
        "imu": rng.normal(size=(count, 5)).astype(np.float32),
        "label": [colours[n % 3] for n in range(count)],
    }


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    data = (pictures(), np.arange(60) % 3)
    return cp.train("simclr", data=data, out=tmp_path_factory.mktemp("views"), name="one", **SMALL)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    small = {"epochs": 1, "batch_size": 16, "image_encoder": "conv-s", "embedding": 16, "quiet": True}
    return cp.train("symile", data=items(), out=str(tmp_path_factory.mktemp("aligned")), name="one", **small)


# --- names


def test_importing_counterpoint_imports_no_torch_and_takes_less_than_a_tenth_of_a_second():
    code = """
import sys, time
began = time.process_time()
import counterpoint as cp
taken = time.process_time() - began
cp.systems("*clip*")
dir(cp)
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert taken < 0.1, taken
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names_are_listed_and_documented():
    assert set(cp.__all__) <= set(dir(cp))
    for name in cp.__all__:
        assert (getattr(cp, name).__doc__ or "").strip(), name
    shown = cp.__doc__ or ""
    for name in ("train", "load", "encode", "embed", "search", "create", "compare", "systems", "losses", "functional"):
        assert name in shown


def test_an_unknown_name_is_refused_with_near_matches():
    with pytest.raises(AttributeError, match="did you mean train"):
        _ = cp.trian


def test_a_package_of_the_name_of_a_function_stays_a_package():
    from counterpoint.search.stored import Embeddings
    from counterpoint.systems.base import System

    assert callable(cp.systems)
    assert callable(cp.search)
    assert cp.systems.base.System is System
    assert cp.search.Embeddings is Embeddings


def test_systems_are_listed_by_pattern_with_the_verdict_on_the_claim():
    assert cp.systems("*clip*", task="aligned").slugs == ["tinyclip", "clip"]
    assert "clip" in cp.systems("*LANGUAGE supervision*").slugs  # in the title
    assert cp.systems("no-such-*") == []
    assert {row.state for row in cp.systems()} <= {"done", "built"}
    assert len(cp.systems(planned=True)) == len(catalog.entries())
    told = {record["slug"]: record["verdict"] for record in records()}
    assert {row.slug: row.verdict for row in cp.systems() if row.verdict} == told
    assert told["macil-sd"] in repr(cp.systems("macil-sd"))
    assert cp.systems(state="planned") == [row for row in cp.systems(planned=True) if row.state == "planned"]
    with pytest.raises(CounterpointError, match="unknown task 'view'; did you mean views"):
        cp.systems(task="view")


def test_settings_are_shown_with_their_defaults_and_meanings():
    own_source, recipe = cp.settings("simclr"), cp.settings("moco-v2+mochi", "own")
    system = catalog.load_system("simclr")
    assert own_source["temperature"] == system.recipe_for(system.data)["temperature"] != system.config().temperature
    assert recipe["batch_size"] == catalog.load_system("moco-v2").recipe["batch_size"]
    assert "mochi.hardest" in recipe
    for found in (own_source, recipe):
        assert [name for name in found if not found.said.get(name)] == []
    assert "Passes over the training images" in repr(own_source)
    with pytest.raises(CounterpointError, match="did you mean simclr"):
        cp.settings("simclrr")


def test_packages_that_are_functions_show_their_arguments():
    import inspect

    from counterpoint.face import functions, listing

    for package, function in ((cp.systems, listing.systems), (cp.search, functions.search)):
        for name in inspect.signature(function).parameters:
            assert f"    {name} " in package.__doc__, name


# --- training


def test_a_run_has_its_figures_its_page_and_its_settings(views, tmp_path):
    assert views.path.name == "one"
    assert views.slug == "simclr"
    assert 0 <= views.metrics["knn_accuracy"] <= 1
    assert views.metrics.chance["knn_accuracy"] == pytest.approx(1 / 3)
    assert len(views.history) == 1
    assert views.config.encoder == "conv-s"
    assert "simclr" in views.page.read_text(encoding="utf-8")
    assert "knn_accuracy" in repr(views)
    assert isinstance(views.learner, torch.nn.Module)
    assert not views.learner.training


def test_settings_options_of_the_loop_and_callbacks_are_passed_on(tmp_path):
    seen = []

    class Watch(Callback):
        def on_start(self, learner, task):
            seen.append(learner.config)

    run = cp.train(
        "moco-v2+mochi",
        data=pictures(),
        out=tmp_path,
        seed=3,
        temperature=0.3,
        queue=32,
        precision="bf16",
        ema=0.9,
        callbacks=[Watch()],
        **{"mochi.hardest": 16, **SMALL},
    )
    assert seen[0].temperature == 0.3
    assert seen[0].parts["mochi"].hardest == 16
    assert run.run.config["seed"] == 3
    assert (run.run.config["loop"]["precision"], run.run.config["loop"]["ema"]) == ("bf16", 0.9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 0.1}, "moco-v2\\+mochi has no setting temprature; did you mean temperature"),
        ({"hardest": 16}, r"did you mean mochi\.hardest\? Write it as \*\*\{\"mochi\.hardest\": \.\.\.\}"),
        ({"mochi.hardst": 16}, r"did you mean mochi\.hardest"),
        ({"precison": "bf16"}, "did you mean precision"),
        ({"parnet": "runs/x"}, "did you mean parent"),
        ({"precision": "8"}, "unknown precision '8'"),
    ],
)
def test_an_unknown_setting_is_refused_with_near_matches_and_leaves_nothing(settings, said, tmp_path):
    with pytest.raises(CounterpointError, match=said):
        cp.train("moco-v2+mochi", data=pictures(), out=tmp_path / "runs", **settings)
    assert not (tmp_path / "runs").exists()


def test_errors_name_keywords_and_no_options_of_the_command_line(tmp_path):
    with pytest.raises(DataError, match="use batch_size 43 or less") as caught:
        cp.train("simclr", data=pictures(), out=tmp_path, encoder="conv-s", batch_size=512, quiet=True)
    assert "--" not in str(caught.value)


def test_quiet_prints_nothing(tmp_path, capfd):
    cp.train("simclr", data=pictures(), out=tmp_path, **SMALL)
    assert capfd.readouterr() == ("", "")


def test_a_run_is_trained_further(views, tmp_path):
    data = (pictures(), np.arange(60) % 3)
    run = cp.train("simclr", data=data, parent=views, out=tmp_path, **SMALL)
    assert run.run.config["parent"]["run"] == str(views.path)


# --- embeddings


def test_encode_takes_every_form_of_a_picture_and_gives_the_same_rows(views, tmp_path):
    one = pictures()[0]
    file = tmp_path / "one.png"
    Image.fromarray(one).save(file)
    tensor = torch.from_numpy(one).permute(2, 0, 1)
    forms = [one, Image.fromarray(one), tensor, tensor / 255, file, str(file), file.read_bytes()]
    rows = views.encode(images=forms)
    assert rows.shape == (len(forms), 128)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, np.repeat(rows[:1], len(forms), 0), atol=1e-6)


def test_encode_gives_numpy_or_torch_in_batches_of_any_size(views):
    x = pictures()[:7]
    whole = views.encode(images=x)
    parts = views.encode(images=list(x), output="torch", batch_size=3, device="cpu")
    assert isinstance(parts, torch.Tensor)
    np.testing.assert_allclose(parts.numpy(), whole, atol=1e-6)
    with pytest.raises(CounterpointError, match="unknown output 'jax'"):
        views.encode(images=x, output="jax")
    with pytest.raises(CounterpointError, match="batch_size must be at least 1"):
        views.encode(images=x, batch_size=0)
    with pytest.raises(CounterpointError, match="unknown device 'gpu'"):
        views.encode(images=x, device="gpu")


def test_encode_gives_each_modality_by_name_or_joins_them(aligned):
    data = items()
    found = aligned.encode(images=data["image"][:4], texts=data["text"][:2], vectors=data["imu"][:3])
    assert {name: rows.shape for name, rows in found.items()} == {"image": (4, 16), "text": (2, 16), "imu": (3, 16)}
    assert aligned.modalities == {"image": "image", "text": "text", "imu": "vector"}
    joined = aligned.encode(images=data["image"][:2], texts=data["text"][:2], joined=True)
    np.testing.assert_allclose(joined, found["image"][:2] * found["text"], atol=1e-6)  # as Symile joins
    one = aligned.encode(inputs={"imu": data["imu"][:3]})
    np.testing.assert_array_equal(one, found["imu"])


def test_encode_takes_the_items_alone_where_a_run_has_one_modality(views, aligned):
    np.testing.assert_array_equal(views.encode(pictures()[:2]), views.encode(images=pictures()[:2]))
    with pytest.raises(CounterpointError, match=r"takes several modalities, image \(image\), .*encode\(images="):
        aligned.encode(pictures()[:2])


def test_a_place_without_the_name_of_a_source_is_refused_with_the_ways_to_read_it(tmp_path):
    for place in (tmp_path, str(tmp_path)):
        with pytest.raises(
            CounterpointError, match=f"is a path, not a data source; say how to read it: imagefolder:{tmp_path}"
        ):
            cp.train("simclr", data=place, out=tmp_path / "runs", quiet=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to encode"),
        ({"texts": ["a"]}, "has no modality for texts"),
        ({"images": "a.png"}, "give a list of items, even for one item; got a str"),
        ({"images": ["gone.png"]}, "gone.png: no such file"),
        ({"images": [torch.full((3, 12, 12), -1.0)]}, "remove Normalize"),
        ({"images": [np.zeros((12, 12, 7), np.uint8)]}, "an image is uint8"),
    ],
)
def test_encode_refuses_what_is_no_item(views, given, said):
    with pytest.raises(CounterpointError, match=said):
        views.encode(**given)


def test_a_bar_is_shown_only_after_two_seconds(views, monkeypatch, capfd):
    from counterpoint import waiting

    views.encode(images=pictures()[:4], batch_size=1)
    assert capfd.readouterr().err == ""
    times = iter(range(0, 1000, 3))
    monkeypatch.setattr(waiting.time, "monotonic", lambda: float(next(times)))
    monkeypatch.setenv("FORCE_COLOR", "1")
    views.encode(images=pictures()[:4], batch_size=1)
    assert "encoding image" in capfd.readouterr().err
    views.encode(images=pictures()[:4], batch_size=1, progress=False)
    assert capfd.readouterr().err == ""


def test_a_set_is_embedded_and_searched(aligned, tmp_path):
    data = items()
    found = cp.embed(aligned, tmp_path / "e.parquet")
    assert {name: rows.shape for name, rows in found.vectors.items()} == dict.fromkeys(
        data.keys() - {"label"}, (60, 16)
    )
    assert found.source[0].startswith("arrays row ")
    assert repr(found).startswith(f"<embeddings of 60 items in {found.path}: ")
    assert len(repr(found)) < 400
    hits = cp.search(aligned, ["a red thing, number 0", f"imu={_saved(data['imu'][0], tmp_path)}"], found.path, k=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert "similarity" in repr(hits)
    same = aligned.search(["a red thing, number 0", str(tmp_path / "q.npy")], found.path, k=3)
    assert same == hits
    other = aligned.embed(
        tmp_path / "o.parquet", data={**data, "text": [t.upper() for t in data["text"]]}, split="test"
    )
    assert set(other.split) == {"test"}
    assert other.texts["text"][0].isupper()


def _saved(values, folder):
    np.save(folder / "q.npy", values)
    return folder / "q.npy"


# --- loading


def test_a_run_is_loaded_and_measured_again(views):
    data = (pictures(), np.arange(60) % 3)
    again = cp.load(views.path, data=data)
    assert cp.load(again) is again
    np.testing.assert_array_equal(again.encode(images=pictures()[:3]), views.encode(images=pictures()[:3]))
    assert again.evaluate() == views.metrics
    assert again.evaluate(data=(pictures(90, 12), np.arange(90) % 3)) != views.metrics


def test_loading_refuses_what_is_no_finished_run(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        cp.load(tmp_path / "gone")
    with pytest.raises(RunError, match="is not a run directory"):
        cp.load(tmp_path)


def test_a_run_of_bags_has_no_encoder(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        n: [rng.normal(size=(6, w)).astype(np.float32) for _ in range(24)] for n, w in (("visual", 4), ("audio", 3))
    }
    run = cp.train(
        "macil-sd", data={**rows, "label": [0, 1] * 12}, epochs=1, batch_size=8, max_length=6, out=tmp_path, quiet=True
    )
    assert "av_ap" in run.metrics
    with pytest.raises(CounterpointError, match="finds moments in videos and has no embeddings"):
        run.encode(images=pictures()[:1])


class Stop(Callback):
    """Ends a fit as Ctrl-C does, after one epoch."""

    def on_epoch(self, row):
        raise Interrupted("stopped by the test")


def test_a_run_on_an_object_is_resumed_only_with_the_same_object(tmp_path):
    data = (pictures(), np.arange(60) % 3)
    twice = {**SMALL, "epochs": 2}
    whole = cp.train("simclr", data=data, out=tmp_path, name="whole", **twice)
    with pytest.raises(Interrupted):
        cp.train("simclr", data=data, out=tmp_path, name="cut", callbacks=[Stop()], **twice)
    cut = tmp_path / "cut"
    with pytest.raises(RunError, match="is not finished"):
        cp.load(cut)
    with pytest.raises(CounterpointError, match=r"was trained on an object in memory: arrays of 60 rows .*data=OBJECT"):
        cp.resume(cut)
    with pytest.raises(DataError, match="this is other data than the run's: arrays of 60 rows"):
        cp.resume(cut, data=(pictures()[::-1].copy(), data[1]))
    done = cp.resume(cut, data=data, quiet=True)
    assert done.metrics == whole.metrics


def test_data_is_not_given_to_a_run_that_names_its_own(tmp_path):
    with pytest.raises(Interrupted):
        cp.train(
            "simclr",
            data="digits",
            out=tmp_path,
            name="cut",
            callbacks=[Stop()],
            **{**SMALL, "epochs": 2, "batch_size": 512},
        )
    with pytest.raises(CounterpointError, match=r"reads its data by name \(digits\); leave data out"):
        cp.resume(tmp_path / "cut", data=pictures())


# --- comparing


def test_systems_are_compared_on_an_object(tmp_path):
    data = cp.own((pictures(), np.arange(60) % 3))
    found = cp.compare("simclr", "dcl", data=data, seeds=2, out=tmp_path, epochs=1, batch_size=16, encoder="conv-s")
    assert set(found.means) == {"simclr", "dcl"}
    assert found.page.is_file()
    assert found.record["seeds"] == [0, 1]
    assert "knn_accuracy on memory:arrays" in repr(found)
    with pytest.raises(CounterpointError, match="at least two different systems"):
        cp.compare("simclr", data=data, out=tmp_path)
