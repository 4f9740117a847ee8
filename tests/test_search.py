"""embed, index and search: on a small run of glyphs, from the command line, and what they refuse."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint import cli, search, training
from counterpoint.data import load
from counterpoint.errors import CounterpointError, DataError

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = "glyphs?train=96&test=40&size=32&styles=codicon"
TRAIN = [
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--image-encoder",
    "conv-s",
    "--embedding",
    "16",
    "--evaluate-every",
    "2",
]

pytest.importorskip("pyarrow")
if importlib.util.find_spec("qtawesome") is None:
    pytest.skip("needs the fonts of qtawesome: pip install --no-deps qtawesome", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("search")
    assert cli.main(["train", "clip", "--data", SMALL, *TRAIN, "--out", str(folder), "--name", "clip"]) == 0
    assert cli.main(["embed", str(folder / "clip"), "-o", str(folder / "emb.parquet")]) == 0
    yield folder
    torch.set_num_threads(before)


def found(capsys, *words):
    assert cli.main(["search", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_item_is_embedded(made):
    rows = search.read_embeddings(made / "emb.parquet")
    assert rows.modalities == {"image": "image", "text": "text"}
    assert [rows.split.count(name) for name in ("train", "valid", "test")] == [96, 42, 40]
    for vectors in rows.vectors.values():
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    data = load(SMALL, task="aligned")
    assert rows.texts["text"][138:] == data.test.column("text", np.arange(40))
    assert cli.main(["embed", str(made / "clip"), "-o", str(made / "test.parquet"), "--split", "test"]) == 0
    assert len(search.read_embeddings(made / "test.parquet").item) == 40


def test_an_item_s_own_picture_and_words_find_it(made, capsys, tmp_path):
    data = load(SMALL, task="aligned")
    file = str(made / "emb.parquet")
    Image.fromarray(data.test.column("image", np.array([7]))[0]).save(tmp_path / "seven.png")
    hit = found(capsys, str(made / "clip"), str(tmp_path / "seven.png"), "--in", file, "--modality", "image", "-k", "3")
    assert hit["modality"] == "image"
    assert len(hit["hits"]) == 3
    assert (hit["hits"][0]["split"], hit["hits"][0]["item"]) == ("test", 7)
    assert hit["hits"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    caption = data.test.column("text", np.array([7]))[0]
    words = found(capsys, str(made / "clip"), caption, "--in", file)
    assert words["modality"] == "image"
    assert len(words["hits"]) == 10
    same = found(capsys, str(made / "clip"), caption, "--in", file, "--modality", "text", "-k", "1")["hits"][0]
    assert same["texts"]["text"] == caption
    assert same["similarity"] == pytest.approx(1, abs=1e-4)
    both = found(
        capsys, str(made / "clip"), caption, str(tmp_path / "seven.png"), "--in", file, "--modality", "image", "-k", "5"
    )
    rows = search.read_embeddings(file)
    joint = rows.vectors["image"] @ (rows.vectors["image"][138 + 7] + rows.vectors["text"][138 + 7])
    best = int(joint.argmax())
    assert (both["hits"][0]["split"], both["hits"][0]["item"]) == (rows.split[best], int(rows.item[best]))
    assert both["hits"][0]["similarity"] == pytest.approx(float(joint[best]), abs=1e-4)


def test_a_page_shows_items_of_built_in_data_from_their_source(made, tmp_path, capsys):
    page = tmp_path / "p.html"
    assert (
        cli.main(["search", str(made / "clip"), "arrow", "--in", str(made / "emb.parquet"), "--html", str(page)]) == 0
    )
    assert page.read_text().count("data:image/png;base64,") == 10
    assert f"Page: {page}" in capsys.readouterr().out


def test_an_index_finds_what_exact_search_finds_and_is_left_when_stale(made, capsys):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    file = made / "indexed.parquet"
    assert cli.main(["embed", str(made / "clip"), "-o", str(file)]) == 0
    exact = search.search(made / "clip", ["arrow"], file)
    assert cli.main(["index", str(file)]) == 0
    graph = search.stored_index(search.read_embeddings(file), "image")
    assert graph.ntotal == 178
    by_graph = search.search(made / "clip", ["arrow"], file)
    assert [hit.item for hit in by_graph[1]] == [hit.item for hit in exact[1]]
    assert cli.main(["embed", str(made / "clip"), "-o", str(file), "--split", "test"]) == 0
    assert search.stored_index(search.read_embeddings(file), "image") is None
    assert all(hit.split == "test" for hit in search.search(made / "clip", ["arrow"], file)[1])
    capsys.readouterr()


def test_runs_and_queries_that_do_not_fit_raise_an_error(made, capsys, tmp_path):
    run, file = made / "clip", made / "emb.parquet"
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        search.search(run, ["gone.png"], file)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"torn\.png: not a picture"):
        search.search(run, [str(tmp_path / "torn.png")], file)
    (tmp_path / "notes.md").write_text("words")
    with pytest.raises(DataError, match="neither an image"):
        search.search(run, [str(tmp_path / "notes.md")], file)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(CounterpointError, match=r"no modality for '.*a\.wav'.*image \(image\), text \(text\)"):
        search.search(run, [str(tmp_path / "a.wav")], file)
    with pytest.raises(CounterpointError, match="has no other modality"):
        search.search(run, ["arrow", "house"], file)
    for slip in ("gone.mp4", "photos/gone.heic", "photos/typo.pngg"):  # not words
        with pytest.raises(DataError, match="neither an image"):
            search.search(run, [slip], file)
    for words in ("a" * 400, "either/or", "an arrow, v1.2 / red"):  # no file names
        assert len(search.search(run, [words], file)[1]) == 10
    with pytest.raises(CounterpointError, match="the query is empty"):
        search.search(run, [" "], file)
    with pytest.raises(CounterpointError, match="unknown modality 'imag'; did you mean image"):
        search.search(run, ["arrow"], file, modality="imag")
    with pytest.raises(DataError, match="no such file; make it: counterpoint embed"):
        search.search(run, ["arrow"], tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="not a file that counterpoint embed wrote"):
        search.read_embeddings(tmp_path / "bad.parquet")
    with pytest.raises(CounterpointError, match=r"ends in \.parquet"):
        search.embed(run, tmp_path / "x.npz")
    with pytest.raises(CounterpointError, match="unknown split 'tset'"):
        search.embed(run, tmp_path / "x.parquet", split="tset")
    # Embeddings of other weights are not comparable.
    assert (
        cli.main(["train", "clip", "--data", SMALL, *TRAIN, "--seed", "1", "--out", str(tmp_path), "--name", "b"]) == 0
    )
    with pytest.raises(CounterpointError, match="holds embeddings of other weights"):
        search.search(tmp_path / "b", ["arrow"], file)
    assert cli.main(["search", str(run), "gone.png", "--in", str(file)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["train", "clip", "--data", SMALL, "--max-bad", "3", "--out", str(tmp_path)]) == 2
    assert "--max-bad needs --data manifest:FILE" in capsys.readouterr().err


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Make a run on a user's manifest of vectors and titles, one column of which has a name of ours."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    rows = [{"id": f"a{n}", "gyro": rng.normal(size=3).tolist(), "label": f"word {n}"} for n in range(40)]
    rows += [{"id": "alone", "gyro": [1.0, 2.0, 3.0]}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"manifest:{folder}/m.jsonl?columns=gyro:vector,label:text,id:id"
    words = ["train", "clip", "--data", spec, "--epochs", "1", "--batch-size", "16", "--embedding", "8"]
    assert cli.main([*words, "--out", str(folder), "--name", "run"]) == 0
    return folder


def test_a_vector_is_a_query_and_items_say_their_rows(vectors, tmp_path):
    file = vectors / "emb.parquet"
    assert search.embed(vectors / "run", file) == 41
    rows = search.read_embeddings(file)
    assert sorted(set(rows.split)) == ["test", "train", "unpaired", "valid"]
    assert rows.source[-1] == "m.jsonl row 41 (alone)"
    assert rows.label == [None] * 41
    assert rows.texts["label"][0] == f"word {rows.source[0].split('(a')[1][:-1]}"
    assert rows.present["label"].tolist() == [True] * 40 + [False]
    np.save(tmp_path / "q.npy", np.array([[1.0, 2.0, 3.0]]))
    modality, hits = search.search(vectors / "run", [str(tmp_path / "q.npy")], file, modality="gyro", k=3)
    assert (modality, hits[0].source, hits[0].similarity) == ("gyro", rows.source[-1], pytest.approx(1, abs=1e-4))
    for values, said in (
        ([1.0], "has 1 numbers, but the run's gyro has 3"),
        ([1.0, np.nan, 0.0], "other than finite numbers"),
    ):
        np.save(tmp_path / "q.npy", np.array(values))
        with pytest.raises(DataError, match=said):
            search.search(vectors / "run", [str(tmp_path / "q.npy")], file)
    with pytest.raises(DataError, match="no such file"):
        search.search(vectors / "run", ["gone.npy"], file)
    (tmp_path / "a.png").touch()
    with pytest.raises(CounterpointError, match=r"no modality for '.*a\.png'"):
        search.search(vectors / "run", [str(tmp_path / "a.png")], file)
    (vectors / "few.jsonl").write_text("".join((vectors / "m.jsonl").read_text().splitlines(True)[:4]))
    few = f"manifest:{vectors}/few.jsonl?columns=gyro:vector,label:text,id:id"
    assert search.embed(vectors / "run", tmp_path / "few.parquet", data=few) == 4  # fewer than a batch
    # Measured too, though nothing could be trained on it.
    (vectors / "few.jsonl").write_text("".join((vectors / "m.jsonl").read_text().splitlines(True)[:10]))
    assert training.evaluate(vectors / "run", data=few, say=lambda note: None)["mean_recall"] >= 0
    with pytest.raises(CounterpointError, match="has no split 'unpaired'"):
        search.embed(vectors / "run", tmp_path / "few.parquet", data=few, split="unpaired")


def test_a_run_that_re_ranks_embeds(tmp_path):
    sizes = {"epochs": 1, "batch-size": 16, "queue": 16, "width": 16, "heads": 2, "depth": 3, "embedding": 8}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    data = "glyphs?train=32&test=8&size=32&styles=codicon"
    assert cli.main(["train", "albef", "--data", data, *words, "--out", str(tmp_path), "--name", "a"]) == 0
    assert search.embed(tmp_path / "a", tmp_path / "e.parquet") == 32 + 45 + 8
