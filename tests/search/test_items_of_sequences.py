"""Runs of histories and sets: embedded, searched by names of items, exported; the scores are those of the evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import counterpoint as cp
from counterpoint import cli, search
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.search.encoder import Encoder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("undrawn")

FILMS = ["Alien", "Blade Runner", "Casablanca", "Dune", "Élan", "Fargo", "Gilda", "Heat", "Ikiru", "Jaws"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(kind: str) -> str:
    lines = [f"{who},{FILMS[(who + 3 * n) % 10]},{n}" for who in range(24) for n in range(4 + who % 3)]
    return "\n".join([f"{'user' if kind == 'history' else 'playlist'},item,time", *lines]) + "\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a run of histories and one of sets, made from the command line, and their embeddings."""
    folder = tmp_path_factory.mktemp("items")
    for kind, system, reader in (("history", "mclrec", "interactions"), ("set", "clhe", "bundles")):
        (folder / f"{kind}.csv").write_text(rows(kind))
        words = ["train", system, "--data", f"{reader}:{folder / kind}.csv", "--epochs", "2", "--batch-size", "16"]
        words += ["--evaluate-every", "2", "--dim", "8", "--length", "5", "--out", str(folder), "--name", kind]
        assert cli.main(words) == 0
        assert cli.main(["embed", str(folder / kind), "-o", str(folder / f"{kind}.parquet")]) == 0
    return folder


def found(capsys, *words):
    assert cli.main(["search", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["history", "set"])
def test_histories_sets_and_items_are_embedded_as_they_are_ranked(made, kind):
    file = search.read_embeddings(made / f"{kind}.parquet")
    assert file.modalities == {kind: kind, "item": "item"}
    run = cp.load(made / kind)
    data = Experiment.of_run(run.run).source()
    assert [file.split.count(name) for name in ("train", "valid", "test", "items")] == [
        *map(len, (data.train, data.valid, data.test)),
        10,
    ]
    last = np.flatnonzero([split == "test" for split in file.split])
    task = Experiment.of_run(run.run).measured(data)
    with torch.no_grad():
        wanted = run.learner.predict(task.evaluation_batch("test", list(range(len(data.test)))))
    np.testing.assert_allclose(file.vectors[kind][last], wanted["query"].numpy(), rtol=1e-4, atol=1e-6)
    items = np.flatnonzero([split == "items" for split in file.split])
    np.testing.assert_allclose(file.vectors["item"][items], wanted["items"].detach().numpy(), rtol=1e-5, atol=1e-7)
    assert [file.texts["item"][n] for n in items] == list(data.items)
    assert file.present["item"].nonzero()[0].tolist() == items.tolist()
    assert [file.source[n] for n in last] == list(data.test.names)


@pytest.mark.parametrize("kind", ["history", "set"])
def test_columns_of_embeddings_can_be_read_by_every_pyarrow(made, kind):
    table = pq.read_table(made / f"{kind}.parquet")
    for name in (kind, "item"):  # each lacks where the other one is
        field = table.field(f"{name}_embedding")
        rows = table[field.name].combine_chunks()
        assert pa.types.is_list(field.type)  # not one of a fixed size
        assert rows.null_count
        assert int(field.metadata[b"width"]) * (len(rows) - rows.null_count) == len(rows.values)


@pytest.mark.parametrize("kind", ["history", "set"])
def test_names_of_items_find_the_items_to_recommend_best_first(made, capsys, kind, tmp_path):
    place = made / f"{kind}.parquet"
    page = tmp_path / "found.html"
    hits = found(capsys, made / kind, "Alien", "Élan", "--in", place, "-k", "10", "--html", page)
    assert hits["modality"] == "item"
    names = [hit["texts"]["item"] for hit in hits["hits"]]
    assert sorted(names) == sorted(set(FILMS) - {"Alien", "Élan"})
    encoder = Encoder.load(made / kind)
    query = encoder.rows(kind, [["Alien", "Élan"]])
    assert (encoder.rows(kind, [[encoder.transform.items[name] for name in ("Alien", "Élan")]]) == query).all()
    scores = dict(zip(names, (encoder.rows("item", names) @ query[0]).tolist(), strict=True))
    assert names == sorted(names, key=lambda name: -scores[name])
    assert [hit["similarity"] for hit in hits["hits"]] == pytest.approx(list(scores.values()), rel=1e-4)
    assert "Alien · Élan" in page.read_text()
    users = found(capsys, made / kind, "item=Dune", "--in", place, "-k", "3")
    assert users["modality"] == kind
    assert all(hit["texts"][kind] for hit in users["hits"])
    assert cp.search(made / kind, ["Alien", "Élan"], place, k=1)[0].texts["item"] == names[0]


def test_known_items_are_hits_where_the_run_does_not_mask_them(made, capsys, tmp_path):
    data = f"interactions:{made / 'history.csv'}"
    options = ["--no-mask-seen", "--view-weight", "0", "--learned-weight", "0", "--epochs", "1", "--dim", "8"]
    assert cli.main(["train", "mclrec", "--data", data, *options, "--out", str(tmp_path), "--name", "r"]) == 0
    assert cli.main(["embed", str(tmp_path / "r"), "-o", str(tmp_path / "r.parquet"), "--split", "items"]) == 0
    capsys.readouterr()
    hits = found(capsys, tmp_path / "r", "Alien", "--in", tmp_path / "r.parquet", "-k", "10")["hits"]
    assert sorted(hit["texts"]["item"] for hit in hits) == sorted(FILMS)


def test_an_index_of_items_is_searched(made, capsys):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    place = made / "indexed.parquet"
    assert cli.main(["embed", str(made / "history"), "-o", str(place)]) == 0
    exact = search.search(made / "history", ["Alien"], place, k=3)[1]
    assert cli.main(["index", str(place)]) == 0
    assert search.stored_index(search.read_embeddings(place), "item").ntotal == 10
    assert [hit.item for hit in search.search(made / "history", ["Alien"], place, k=3)[1]] == [
        hit.item for hit in exact
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Alein"], r"unknown item 'Alein'; did you mean Alien\?"),
        (["item=Alien", "Heat"], "item=NAME is the only query of a search"),
        (["item=Hete"], "unknown item 'Hete'"),
    ],
)
def test_queries_that_do_not_fit_are_named(made, words, said):
    with pytest.raises(CounterpointError, match=said):
        search.search(made / "history", words, made / "history.parquet")


def test_items_and_data_that_the_run_does_not_know_are_named(made, tmp_path):
    run = cp.load(made / "history")
    with pytest.raises(DataError, match="at least one item"):
        run.encode(inputs={"history": [[]]})
    with pytest.raises(DataError, match=r"must lie in 0..9, got 10"):
        run.encode(inputs={"item": [10]})
    (tmp_path / "other.csv").write_text(rows("history").replace("Gilda", "Gremlins"))
    with pytest.raises(DataError, match=r"item . is 'Gremlins', and 'Gilda' in the data that the run was trained on"):
        search.embed(made / "history", tmp_path / "x.parquet", data=f"interactions:{tmp_path / 'other.csv'}")
    with pytest.raises(CounterpointError, match="for the task views, not for sequences"):
        search.embed(made / "history", tmp_path / "x.parquet", data="digits")


@pytest.mark.parametrize("kind", ["history", "set"])
@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exported_networks_give_the_embeddings_of_any_number_of_histories(made, kind, ending, tmp_path):
    if ending == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra [export]")
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    assert cli.main(["export", str(made / kind), "--out", str(tmp_path / f"r.{ending}")]) == 0
    facts = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert facts["modalities"][kind]["inputs"] == ["ids"]
    run = cp.load(made / kind)

    def computed(name, values):
        path = tmp_path / f"r.{name}.{ending}"
        if ending == "pt2":
            with torch.no_grad():
                return torch.export.load(path).module()(values).numpy()
        session = onnxruntime.InferenceSession(str(path))
        return session.run(None, {session.get_inputs()[0].name: values.numpy()})[0]

    number = {name: n for n, name in enumerate(facts["items"])}
    for lists in ([["Dune"]], [["Heat", "Alien", "Jaws", "Dune"], ["Fargo"], ["Ikiru", "Gilda"], ["Alien"]]):
        ids = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int64)
        for row, items in enumerate(lists):
            ids[row, : len(items)] = torch.tensor([number[name] + 1 for name in items])
        np.testing.assert_allclose(computed(kind, ids), run.encode(inputs={kind: lists}), atol=1e-5)
    rows = computed("item", torch.tensor([number[name] for name in FILMS]))
    np.testing.assert_allclose(rows, run.encode(inputs={"item": FILMS}), atol=1e-6)
