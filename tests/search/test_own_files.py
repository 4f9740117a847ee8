"""embed, encode and search over a user's own pictures: which file was found, its page, and what is refused early."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint import cli, search
from counterpoint.errors import CounterpointError, DataError
from counterpoint.report.search import write_search_report
from counterpoint.search import Encoder, shown, table
from counterpoint.search.stored import read_embeddings

pytestmark = pytest.mark.usefixtures("undrawn")

pytest.importorskip("pyarrow")

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200)}
VIEWS = ["--epochs", "1", "--batch-size", "8", "--encoder", "conv-s", "--evaluate-every", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make pictures of three colours, a table in which each stands in four rows with two captions, and two runs."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    lines = ["image,caption,split"]
    for colour, value in COLOURS.items():
        (folder / "pictures" / colour).mkdir(parents=True)
        for n in range(8):
            pixels = np.clip(np.array(value) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / colour / f"{n}.png")
            for words in (f"a {colour} picture", f"a {colour} picture", f"{colour} number {n}"):
                lines.append(f'pictures/{colour}/{n}.png,"{words}",{"test" if n < 2 else "train"}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    spec = f"manifest:{folder}/table.csv?size=16"
    words = [
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--image-encoder",
        "conv-s",
        "--embedding",
        "8",
        "--evaluate-every",
        "2",
    ]
    assert cli.main(["train", "clip", "--data", spec, *words, "--out", str(folder), "--name", "clip"]) == 0
    spec = f"imagefolder:{folder}/pictures?size=16"
    assert cli.main(["train", "simclr", "--data", spec, *VIEWS, "--out", str(folder), "--name", "simclr"]) == 0
    search.embed(folder / "clip", folder / "clip.parquet")
    search.embed(folder / "simclr", folder / "simclr.parquet")
    return folder


def test_queries_and_items_go_through_the_same_code(folder):
    encoder, found = Encoder.load(folder / "clip"), read_embeddings(folder / "clip.parquet")
    picture = folder / "pictures" / "red" / "1.png"
    row = found.files["image"].index(str(picture))
    assert found.source[row] == "table.csv row 4 (pictures/red/1.png)"
    assert found.texts["caption"][row] == "a red picture"
    np.testing.assert_allclose(encoder.encode(images=[picture])[0], found.vectors["image"][row], atol=1e-6)
    pixels = np.array(Image.open(picture))
    np.testing.assert_array_equal(encoder.encode(images=[pixels]), encoder.encode(images=[str(picture)]))
    words = encoder.encode(texts=["a red picture"])
    np.testing.assert_allclose(words[0], found.vectors["caption"][row], atol=1e-6)
    both = encoder.encode(images=[picture], texts=["a red picture"])
    np.testing.assert_allclose(both, encoder.encode(images=[picture]) + words, atol=1e-6)
    np.testing.assert_array_equal(search.encode(folder / "clip", inputs={"caption": ["a red picture"]}), words)


def test_encode_refuses_what_it_cannot_encode(folder):
    encoder = Encoder.load(folder / "clip")
    with pytest.raises(CounterpointError, match="nothing to encode"):
        encoder.encode()
    with pytest.raises(CounterpointError, match=r"no modality for sounds; it has image \(image\), caption \(text\)"):
        encoder.encode(sounds=["a.wav"])
    with pytest.raises(CounterpointError, match="the same number of items, got image 1, caption 2"):
        encoder.encode(images=[np.zeros((16, 16, 3), np.uint8)], texts=["a", "b"])
    with pytest.raises(DataError, match="image, item 0: an image is uint8"):
        encoder.encode(images=[np.zeros((16, 16, 3))])
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        encoder.encode(images=[folder / "gone.png"])
    with pytest.raises(CounterpointError, match="unknown modality 'imag'"):
        encoder.encode(inputs={"imag": ["a"]})
    assert encoder.encode(texts=[]).shape[0] == 0


def test_equal_texts_have_equal_embeddings_to_the_last_bit(folder, monkeypatch):
    monkeypatch.setattr(table, "BATCH", 5)  # texts of other batches, padded to other lengths
    search.embed(folder / "clip", folder / "small.parquet")
    found = read_embeddings(folder / "small.parquet")
    for text in {"a red picture", "a blue picture"}:
        rows = found.vectors["caption"][[n for n, own in enumerate(found.texts["caption"]) if own == text]]
        assert len(rows) == 16
        assert (rows == rows[0]).all()


def test_repeated_captions_are_one_hit_with_a_count(folder, capsys):
    run, file = str(folder / "clip"), str(folder / "clip.parquet")
    for k in (1, 3, 27, 100):
        _, hits = search.search(run, ["a red picture"], file, modality="caption", k=k)
        captions = [hit.texts["caption"] for hit in hits]
        assert len(captions) == len(set(captions)) == min(k, 27)
        assert hits[0].texts["caption"] == "a red picture"
        assert hits[0].count == 16
        assert len(hits[0].others) == 15
    assert sum(hit.count for hit in hits) == 72
    capsys.readouterr()
    assert cli.main(["search", run, "a red picture", "--in", file, "--modality", "caption", "-k", "2"]) == 0
    printed = capsys.readouterr().out
    assert "16" in printed
    assert "table.csv row" in printed


@pytest.mark.parametrize("name", ["clip", "simclr"])
def test_a_picture_finds_itself_and_the_page_shows_it(folder, tmp_path, capsys, name):
    picture = folder / "pictures" / "blue" / "3.png"
    words = [
        str(folder / name),
        str(picture),
        "--in",
        str(folder / f"{name}.parquet"),
        "--modality",
        "image",
        "-k",
        "4",
    ]
    assert cli.main(["search", *words, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 4
    assert hits[0]["similarity"] == pytest.approx(1, abs=1e-4)
    page = tmp_path / "pages" / "found.html"
    assert cli.main(["search", *words, "--html", str(page)]) == 0
    html = page.read_text()
    assert html.count("data:image/png;base64,") >= 5  # the query and four hits
    assert hits[0]["source"].replace("'", "&#39;") in html
    assert 'src="http' not in html


def test_a_page_plays_small_files_links_large_ones_and_names_those_that_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "EMBEDDED", 100)
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a #1.wav").write_bytes(b"x" * 101)
    (tmp_path / "small.mp3").write_bytes(b"abc")
    (tmp_path / "film.mp4").write_bytes(b"x" * 500)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    show = shown._Files(tmp_path / "pages" / "p.html")
    assert show(tmp_path / "sounds" / "a #1.wav") == {"audio": "../sounds/a%20%231.wav"}
    assert show(tmp_path / "small.mp3") == {"audio": "data:audio/mpeg;base64,YWJj"}
    assert show(tmp_path / "film.mp4") == {"video": "../film.mp4"}
    assert "torn.png: not a picture" in show(tmp_path / "torn.png")["gone"]
    assert show(tmp_path / "none.wav") == {"gone": f"{tmp_path / 'none.wav'}: no such file"}
    monkeypatch.setattr(shown, "EMBEDDED", 1000)
    show.room = 10
    assert show(tmp_path / "film.mp4") == {"video": "../film.mp4"}  # the page holds enough already
    hit = {
        "rank": 1,
        "similarity": 0.5,
        "item": 3,
        "split": "test",
        "label": "<b>",
        "source": None,
        "count": 2,
        "others": ["x"],
    }
    things = [[("sound", show(tmp_path / "small.mp3")), ("film", show(tmp_path / "film.mp4"))]]
    page = write_search_report(
        tmp_path / "p.html", [("text", {"text": "a & b"})], "sound", [hit], things, tmp_path / "e"
    )
    html = page.read_text()
    assert '<video controls preload="metadata" src="../film.mp4">' in html
    assert "&lt;b&gt;" in html
    assert "a &amp; b" in html
    assert "test 3" in html
    assert "1 more with the same" in html


def test_features_of_views_are_those_that_neighbours_are_judged_by(folder):
    found = read_embeddings(folder / "simclr.parquet")
    assert found.modalities == {"image": "image"}
    assert len(found.item) == 24
    assert sorted(set(found.label)) == sorted(COLOURS)
    np.testing.assert_allclose(np.linalg.norm(found.vectors["image"], axis=1), 1, atol=1e-5)
    encoder = Encoder.load(folder / "simclr")
    with torch.no_grad():
        inputs = encoder.transform("image", [folder / "pictures" / "red" / "0.png"])
        feature = encoder.learner.predict({"image": inputs, "part": "bank"})["feature"][0].numpy()
    expected = feature / np.linalg.norm(feature)
    np.testing.assert_allclose(encoder.encode(images=[folder / "pictures/red/0.png"])[0], expected, atol=1e-6)
    with pytest.raises(CounterpointError, match=r"no modality for 'words'.*it has image \(image\)"):
        search.search(folder / "simclr", ["words"], folder / "simclr.parquet")


def test_runs_of_labelled_embed_and_find(folder, tmp_path):
    spec = f"imagefolder:{folder}/pictures?size=16"
    assert cli.main(["train", "supcon", "--data", spec, *VIEWS, "--out", str(tmp_path), "--name", "run"]) == 0
    assert search.embed(tmp_path / "run", tmp_path / "e.parquet") == 24
    _, hits = search.search(tmp_path / "run", [str(folder / "pictures/green/5.png")], tmp_path / "e.parquet", k=24)
    assert len(hits) == 24
    assert hits[0].label == "green"


def test_outputs_and_inputs_are_tried_before_the_work(folder, tmp_path, monkeypatch):
    def load(*arguments):
        raise AssertionError("the run was loaded first")

    monkeypatch.setattr(Encoder, "load", load)
    run, file = str(folder / "clip"), str(folder / "clip.parquet")
    (tmp_path / "a file").write_text("x")
    with pytest.raises(CounterpointError, match="cannot be written"):
        search.embed(run, tmp_path / "a file" / "e.parquet")
    with pytest.raises(CounterpointError, match="cannot be written"):
        search.search(run, ["red"], file, html=tmp_path / "a file" / "p.html")
    with pytest.raises(CounterpointError, match="is a folder; name a file to write"):
        search.search(run, ["red"], file, html=tmp_path)
    with pytest.raises(DataError, match=r"gone\.parquet: no such file; make it: counterpoint embed"):
        search.search(run, ["red"], tmp_path / "gone.parquet")
    with pytest.raises(
        DataError, match="is a folder without shards; name the file or folder that counterpoint embed wrote"
    ):
        search.search(run, ["red"], tmp_path)


@pytest.mark.parametrize(
    "words", [["RUN", "https://a.example/x.png"], ["https://a.example/run", "red"], ["RUN", "http://b.example/y"]]
)
def test_a_url_is_reported_whole(folder, words, capsys):
    words = [str(folder / "clip") if word == "RUN" else word for word in words]
    assert cli.main(["search", *words, "--in", str(folder / "clip.parquet")]) == 2
    said = capsys.readouterr().err
    assert "is a URL; " in said
    assert next(word for word in words if "://" in word) in said
    assert cli.main(["search", str(folder / "clip"), "red", "--in", "https://a.example/e.parquet"]) == 2
    assert "https://a.example/e.parquet is a URL; embeddings are a file" in capsys.readouterr().err


def test_a_run_of_symile_is_asked_with_all_other_modalities(tmp_path, capsys):
    sizes = ["--epochs", "1", "--batch-size", "32", "--embedding", "4"]
    data = "xor?train=48&valid=16&test=16"
    assert cli.main(["train", "symile", "--data", data, *sizes, "--out", str(tmp_path), "--name", "s"]) == 0
    file = tmp_path / "e.parquet"
    search.embed(tmp_path / "s", file)
    found = read_embeddings(file)
    dims = {name: spec["dim"] for name, spec in Encoder.load(tmp_path / "s").transform.modalities.items()}
    assert list(dims) == ["a", "b", "c"]
    for name, bits in (("a", [1, 0, 1]), ("c", [0, 0, 1])):
        np.save(tmp_path / f"{name}.npy", np.array(bits, np.float32))
    a, c = str(tmp_path / "a.npy"), str(tmp_path / "c.npy")
    for modality in (None, "a", "b"):
        with pytest.raises(
            CounterpointError,
            match=r"was trained to score whole items: to search in ., give queries of . and . together",
        ):
            search.search(tmp_path / "s", [a], file, modality=modality)
    with pytest.raises(CounterpointError, match="two queries are of the modality c"):
        search.search(tmp_path / "s", [f"c={c}", f"c={c}"], file)
    with pytest.raises(CounterpointError, match="unknown modality 'd'"):  # a file, so these are not words
        search.search(tmp_path / "s", [f"a={a}", f"d={c}"], file)
    target, hits = search.search(tmp_path / "s", [f"a={a}", f"c={c}"], file, k=80)
    assert target == "b"
    assert len(hits) == 80
    encoder = Encoder.load(tmp_path / "s")
    query = encoder.encode(inputs={"a": [a]}) * encoder.encode(inputs={"c": [c]})
    scores = found.vectors["b"].astype(np.float64) @ query[0]
    assert [hit.similarity for hit in hits] == pytest.approx(np.sort(scores)[::-1].tolist(), abs=1e-6)
    capsys.readouterr()
