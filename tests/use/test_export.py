"""Encoders as files for other programs: the same embeddings, any number of items, nothing left of a refusal."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import counterpoint as cp
from counterpoint import cli
from counterpoint.errors import CounterpointError, DataError
from counterpoint.search.encoder import Encoder
from counterpoint.use import export as room
from counterpoint.use import export_inputs as inputs

pytestmark = pytest.mark.usefixtures("undrawn")

PICTURES = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
ONNX = all(importlib.util.find_spec(name) for name in room.NEEDS)
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the extra export: pip install 'counterpoint[export]'")
FORMATS = ["torch", pytest.param("onnx", marks=needs_onnx)]
ENDING = {"torch": "pt2", "onnx": "onnx"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, undrawn):
    rng = np.random.default_rng(1)
    data = {
        "image": PICTURES,
        "text": [f"a thing, number {n}" for n in range(48)],
        "audio": rng.uniform(-1, 1, (48, 2000)).astype(np.float32),
        "imu": rng.normal(size=(48, 5)).astype(np.float32),
    }
    own = cp.own(data, rate=2000, seconds=1.0)
    small = {"epochs": 1, "batch_size": 16, "image_encoder": "conv-s", "embedding": 8, "context": 12, "quiet": True}
    return cp.train("clip", data=own, out=tmp_path_factory.mktemp("aligned"), name="one", **small)


def program(path):
    """Return the function of a file, from tensors to an array. It is read without this package's own way."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def computed(*inputs):
            with torch.no_grad():
                return module(*inputs).numpy()

        return computed
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[
        0
    ]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_each_modality_gives_the_embeddings_of_the_run_for_any_number_of_items(aligned, format, tmp_path):
    made = aligned.export(tmp_path / f"clip.{ENDING[format]}", format=format)
    assert [one.modality for one in made] == ["image", "text", "audio", "imu"]
    assert [one.path.name for one in made] == [f"clip.{m}.{ENDING[format]}" for m in ("image", "text", "audio", "imu")]
    facts = json.loads((tmp_path / "clip.json").read_text(encoding="utf-8"))
    assert facts["modalities"]["audio"] == {"kind": "audio", "rate": 2000, "samples": 2000, "inputs": ["wave"]}
    computed = {one.modality: program(one.path) for one in made}
    for count in (1, 2, 7):
        pixels = torch.from_numpy(PICTURES[:count]).permute(0, 3, 1, 2)
        found = computed["image"](pixels)
        np.testing.assert_allclose(found, aligned.encode(images=PICTURES[:count]), atol=1e-5)
        vectors = np.random.default_rng(count).normal(size=(count, 5)).astype(np.float32)
        found = computed["imu"](torch.from_numpy(vectors))
        np.testing.assert_allclose(found, aligned.encode(vectors=vectors), atol=1e-5)
        waves = np.random.default_rng(count).uniform(-1, 1, (count, 2000)).astype(np.float32)
        found = computed["audio"](torch.from_numpy(waves))
        np.testing.assert_allclose(found, aligned.encode(sounds=list(waves)), atol=1e-5)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(facts["modalities"]["text"]["tokenizer"]))
    texts = ["a thing", "a thing, number 12 and more"]
    tokenizer.enable_truncation(facts["context"])
    tokenizer.enable_padding()
    coded = tokenizer.encode_batch(texts)
    inputs = torch.tensor([c.ids for c in coded]), torch.tensor([c.attention_mask for c in coded], dtype=torch.bool)
    np.testing.assert_allclose(computed["text"](*inputs), aligned.encode(texts=texts), atol=1e-5)
    assert all(0 <= one.difference < 1e-4 for one in made)


@pytest.mark.parametrize(
    ("slug", "settings", "format"),
    [
        ("simclr", {}, "torch"),
        pytest.param(
            "dino", {"encoder": "vit-s", "projection": 32, "epochs": 1}, "onnx", marks=[needs_onnx, pytest.mark.slow]
        ),
        pytest.param("supcon", {"encoder": "resnet-s"}, "onnx", marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_runs_of_pictures_are_exported_whatever_their_network(slug, settings, format, tmp_path):
    data = (PICTURES, np.arange(48) % 3)
    settings = {"epochs": 1, "batch_size": 16, "encoder": "conv-s", "quiet": True} | settings
    run = cp.train(slug, data=data, out=tmp_path, name=slug, **settings)
    (made,) = run.export(tmp_path / f"encoder.{ENDING[format]}")
    assert made.path == tmp_path / f"encoder.{ENDING[format]}"
    found = program(made.path)(torch.from_numpy(PICTURES[:4]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, run.encode(images=PICTURES[:4]), atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_computes_something_else_is_refused_and_nothing_is_left(aligned, format, tmp_path, monkeypatch):
    honest = room.opened
    monkeypatch.setattr(room, "opened", lambda path, format: lambda *inputs: honest(path, format)(*inputs) * 1.001)
    with pytest.raises(CounterpointError, match=r"differ by 1\.0e-03 of the largest value, more than 0\.0001"):
        aligned.export(tmp_path / f"clip.{ENDING[format]}", modality="imu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_network_that_cannot_be_traced_is_refused_by_name_and_nothing_is_left(aligned, tmp_path):
    class Wilful(torch.nn.Module):
        def forward(self, ids, mask):
            return kept(ids, mask) * (2 if int(ids.sum()) % 2 else 1)

    encoders = aligned.learner.encoders
    kept = encoders["text"]
    encoders["text"] = Wilful()
    try:
        with pytest.raises(
            CounterpointError, match=r"the encoder of text cannot be exported .* counterpoint\.load\(RUN\)\.learner"
        ):
            aligned.export(tmp_path / "clip.pt2")
    finally:
        encoders["text"] = kept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("encoder.bin", {}, r"has no known ending; name a file that ends in \.onnx or \.pt2"),
        ("encoder.pt2", {"format": "tflite"}, "unknown format 'tflite'"),
        ("encoder.pt2", {"modality": "imaeg"}, "unknown modality 'imaeg'; did you mean image"),
        ("", {"format": "torch"}, "is a folder; name a file to write"),
    ],
)
def test_what_makes_no_sense_is_refused(aligned, tmp_path, out, options, said):
    with pytest.raises(CounterpointError, match=said):
        aligned.export(tmp_path / out, **options)


def test_a_missing_package_is_named_with_its_extra(aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None if name == "onnxscript" else SimpleNamespace())
    with pytest.raises(CounterpointError, match=r"needs the package onnxscript: pip install 'counterpoint\[export\]'"):
        aligned.export(tmp_path / "clip.onnx")


def test_real_items_are_compared_with_the_run_and_missing_data_are_a_note(aligned, tmp_path, monkeypatch):
    found, note = inputs.real_items(aligned.encoder, ["text", "imu"], 3)
    assert note == ""
    (tokens, mask), rows = found["text"]
    assert tokens.shape == mask.shape
    assert len(rows) == len(tokens) == 3

    def gone(self, data=None):
        raise DataError("photos: no such folder")

    monkeypatch.setattr(inputs.Experiment, "source", gone)
    found, note = inputs.real_items(aligned.encoder, ["imu"], 3)
    assert found == {}
    assert note == "checked on random inputs only, as the run's data cannot be read: photos: no such folder"
    monkeypatch.undo()
    honest = Encoder.rows
    monkeypatch.setattr(Encoder, "rows", lambda *given: honest(*given) + 0.5)
    with pytest.raises(CounterpointError, match="differs from the run"):
        aligned.export(tmp_path / "b.pt2", modality="imu")


def test_the_learner_stays_as_it_was(aligned, tmp_path):
    aligned.export(tmp_path / "clip.pt2", modality="imu")
    assert not aligned.learner.training
    before = aligned.encode(images=PICTURES[:2])
    aligned.export(tmp_path / "clip.pt2", modality="image")
    np.testing.assert_array_equal(aligned.encode(images=PICTURES[:2]), before)


def test_the_command_writes_the_files(aligned, tmp_path, capsys):
    words = ["export", str(aligned.path), "--format", "torch", "-o", str(tmp_path / "a.pt2"), "--modality", "imu"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "inputs vector; largest difference" in said
    assert "on random inputs and 8 items of the data" in said
    assert (tmp_path / "a.imu.pt2").is_file()
    assert cli.main(["export", str(aligned.path), "-o", str(tmp_path / "a.bin")]) == 2
    assert "has no known ending" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_lines_of_the_card_give_the_embeddings_of_the_run(aligned, format, tmp_path, monkeypatch):
    """They are executed as they stand, in a folder with the files and a picture."""
    made = aligned.export(tmp_path / f"clip.{ENDING[format]}")
    card = (tmp_path / "clip.MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"library_name: {'onnx' if format == 'onnx' else 'pytorch'}" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "counterpoint" not in code
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 41, 3), np.uint8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    given = {"image": {"images": ["picture.png"]}, "text": {"texts": ["a red house", "a boat"]}}
    given |= {"audio": {"sounds": [np.zeros(2000, np.float32)]}, "imu": {"vectors": [np.zeros(5, np.float32)]}}
    blocks = code.split("\n\n")
    head = next(n for n, block in enumerate(blocks) if "import numpy" in block) + 1
    parts = blocks[head:]
    assert len(parts) == len(made)
    for one, part in zip(made, parts, strict=True):
        found: dict = {}
        exec("\n".join([*blocks[:head], part]), found)
        wanted = aligned.encode(**given[one.modality])
        np.testing.assert_allclose(np.asarray(found["embeddings"]), wanted, atol=2e-5, err_msg=one.modality)
