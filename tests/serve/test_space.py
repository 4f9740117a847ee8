"""Search by words, picture and sound, the map, and labels given on it."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest

from counterpoint.errors import CounterpointError
from counterpoint.search import embed
from counterpoint.search.stored import read_embeddings
from counterpoint.serve.labels import LONGEST, add_labels, as_csv, read_labels
from counterpoint.serve.space import Map, grouped, mapped

from .conftest import served


def hits(html: str) -> list[str]:
    return re.findall(r'<p class="source">([^<]+)</p>', html)


def test_words_a_picture_and_a_sound_find_items(page, project):
    form = {"form_token": page.form, "in": "0/items.parquet"}
    found = read_embeddings(project / "items.parquet")
    row = found.texts["caption"].index("a blue picture 3")
    by_words = page.post("/search", data=form | {"words": "a blue picture 3", "modality": "caption"}).text
    assert hits(by_words)[0] == found.source[row]
    for name in ("image", "sound"):
        file = project / "items" / f"blue3.{'png' if name == 'image' else 'wav'}"
        upload = {"file": (file.name, file.read_bytes())}
        html = page.post("/search", data=form | {"modality": name}, files=upload).text
        assert hits(html)[0] == found.source[row]
        assert f"for {file.name}" in html
    both = page.post(
        "/search",
        data=form | {"words": "a red picture 1"},
        files={"file": ("p", (project / "items/red1.png").read_bytes())},
    )
    assert "by their sound" in both.text  # what was not asked
    thumbnails = re.findall(r'<img loading="lazy" src="([^"]+)"', by_words)
    answer = page.get(thumbnails[0].replace("&amp;", "&"))
    assert (answer.headers["content-type"], answer.content[:4]) == ("image/png", b"\x89PNG")
    sounds = re.findall(r'<audio controls preload="none" src="([^"]+)"', by_words)
    part = page.get(sounds[0], headers={"range": "bytes=0-3"})
    assert (part.status_code, part.headers["content-type"], part.content) == (206, "audio/wav", b"RIFF")


def test_a_folder_of_shards_is_one_table_and_one_that_lacks_shards_is_none(copied):
    (copied / "items.parquet").unlink()
    embed(copied / "runs/first", copied / "many", shard_rows=1)
    assert len(list((copied / "many").glob("part-*"))) == 3
    other = served(copied)
    form = {"form_token": other.form, "in": "0/many", "words": "a blue picture 3", "modality": "caption"}
    assert "blue3.png" in hits(other.post("/search", data=form).text)[0]
    assert len(other.get("/map/points?in=0/many&modality=image").json()["rows"]) == 24
    (copied / "many" / "part-00001.parquet").unlink()
    other = served(copied)
    assert "is no file of embeddings" in other.post("/search", data=form | {"form_token": other.form}).text


def test_a_search_without_a_query_or_a_run_names_the_mend(page, copied):
    assert "give words, a picture or a sound" in page.post("/search", data={"form_token": page.form}).text
    # Of weights that are not the file's, and without the run.
    other = served(copied)
    (copied / "runs/first/model.safetensors").unlink()
    answer = other.post("/search", data={"form_token": other.form, "words": "red"})
    assert (answer.status_code, "start the server with its folder" in answer.text) == (400, True)


def test_the_map_shows_the_two_main_axes(page, project):
    made = page.get("/map/points?in=0/items.parquet&modality=image").json()
    found = read_embeddings(project / "items.parquet")
    assert made["rows"] == list(range(len(found.split)))
    assert made["total"] == len(made["x"]) == len(made["groups"]) == 24
    points = np.stack([made["x"], made["y"]], 1).astype(float)
    centred = found.vectors["image"] - found.vectors["image"].mean(0)
    _, values, axes = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    for n in range(2):  # equal but for sign and scale
        assert abs(np.corrcoef(points[:, n], centred @ axes[n])[0, 1]) > 0.9999
    assert made["share"] == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist(), rel=1e-3)
    about = page.get("/map/item?in=0/items.parquet&row=3").json()
    assert about["texts"]["caption"] == found.texts["caption"][3]
    assert about["shown"] == {"image": "image", "sound": "audio"}
    assert page.get("/map/points?in=0/items.parquet&modality=nothing").status_code == 404


def test_a_large_map_is_a_sample_of_the_items_that_have_the_modality(monkeypatch):
    from counterpoint.serve import space

    monkeypatch.setattr(space, "SAMPLE", 50)
    rng = np.random.default_rng(1)
    there = np.arange(300) % 3 > 0
    vectors = rng.standard_normal((300, 6)).astype(np.float32)
    found = type("Found", (), {"present": {"image": there}, "vectors": {"image": vectors}})
    made = mapped(found, "image")
    assert isinstance(made, Map)
    assert (len(made.rows), made.total) == (50, 200)
    assert there[made.rows].all()
    assert (np.diff(made.rows) > 0).all()
    assert (made.points.min(), made.points.max()) == (0, space.SCALE)
    found.present = {"image": np.arange(300) < 2}
    with pytest.raises(CounterpointError, match="at least 3 items"):
        mapped(found, "image")


def test_groups_are_ordered_and_rare_ones_share_one():
    titles, numbers = grouped(["b", "a", "b", None])
    assert (titles, numbers) == (["b", "a", "without a label"], [0, 1, 0, 2])
    titles, numbers = grouped([f"g{n}" for n in range(40)] + ["g39"])
    assert titles[0] == "g39"
    assert titles[-1] == "29 others"
    assert numbers.count(11) == 29


def test_labels_are_kept_in_the_run_s_folder_and_downloaded(copied):
    page = served(copied)
    send = {"headers": {"x-form-token": page.form}}
    where = "/map/labels?in=0/items.parquet"
    answer = page.post(where, json={"rows": [1, 2, 2, 5], "label": " =odd "}, **send)
    assert answer.json()["labelled"] == 3
    page.post(where, json={"rows": [2], "label": "even"}, **send)
    page.post(where, json={"rows": [5], "label": ""}, **send)
    file = copied / "runs" / "first" / "labels-items.jsonl"
    assert len(file.read_text().splitlines()) == 5
    with file.open("a") as out:
        out.write("{damaged\n")
    rows = list(csv.DictReader(io.StringIO(page.get(where + "&form=csv").text)))
    found = read_embeddings(copied / "items.parquet")
    assert [(r["split"], int(r["item"]), r["label"]) for r in rows] == [
        (found.split[1], found.item[1], "'=odd"),  # no formula of a spreadsheet
        (found.split[2], found.item[2], "even"),
    ]
    lines = page.get(where + "&form=jsonl")
    assert "attachment" in lines.headers["content-disposition"]
    assert [json.loads(line)["label"] for line in lines.text.splitlines()] == ["=odd", "even"]
    assert page.get("/map/points?in=0/items.parquet&modality=image").json()["given"] == {"1": "=odd", "2": "even"}
    wrong = [{"rows": rows, "label": "x"} for rows in ([99], ["1"], [True], 1)]
    wrong += [{"rows": [1], "label": label} for label in ("x" * (LONGEST + 1), "a\nb", None)]
    for bad in (*wrong, [1]):
        assert page.post(where, json=bad, **send).status_code in (400, 404)


def test_the_last_label_of_an_item_counts(tmp_path):
    file = tmp_path / "labels.jsonl"
    item = {"split": "test", "item": 1, "source": None}
    assert read_labels(file) == {}
    add_labels(file, [item], "a")
    add_labels(file, [item], "b")
    assert read_labels(file)["test", 1]["label"] == "b"
    add_labels(file, [item], "")
    assert read_labels(file) == {}
    assert as_csv([{"label": "@x", "item": -1}], ["label", "item"]) == "label,item\n'@x,-1\n"


def test_embeddings_of_another_width_are_damaged(copied):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(copied / "items.parquet")
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(24 * 5, np.float32)), 5)
    number = table.column_names.index("image_embedding")
    changed = table.set_column(number, "image_embedding", wide).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, copied / "items.parquet")
    page = served(copied)
    answer = page.post("/search", data={"form_token": page.form, "words": "red", "modality": "image"})
    assert (answer.status_code, "is damaged: its image has 5 numbers" in answer.text) == (400, True)
