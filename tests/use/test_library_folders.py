"""Encoders as folders of transformers, timm and sentence-transformers: loaded by these libraries, with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import counterpoint as cp
from counterpoint import cli
from counterpoint.errors import CounterpointError
from counterpoint.use import library_folders, library_parts

pytestmark = pytest.mark.usefixtures("undrawn")

PICTURES = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
WORDS = ["red", "blue", "cat", "dog", "the", "is", "small"]
TEXTS = [f"the {a} {b} is small" for a in WORDS[:2] for b in WORDS[2:4]] * 6
SMALL = {"epochs": 1, "batch_size": 8, "quiet": True}


@pytest.fixture(scope="module")
def places(tmp_path_factory: Any) -> Path:
    """Write a tiny BERT with its tokenizer, and a tiny vision transformer, as folders of transformers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra language")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder / "bert")
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=32, initializer_range=0.3, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    config = transformers.ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, **sizes)
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def pairs(places: Path, tmp_path_factory: Any, undrawn: Any) -> cp.Trained:
    """Train CLIP on pictures and texts for one epoch, with both of these encoders."""
    data = cp.own({"image": PICTURES, "text": TEXTS})
    named = {"image_encoder": f"hf:{places / 'vit'}", "text_encoder": f"hf:{places / 'bert'}"}
    out = tmp_path_factory.mktemp("pairs")
    return cp.train("clip", data=data, out=out, name="one", embedding=8, context=12, **named, **SMALL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any, undrawn: Any) -> cp.Trained:
    data = (PICTURES, np.arange(24) % 2)
    return cp.train("simclr", data=data, out=tmp_path_factory.mktemp("plain"), name="one", encoder="vit-s", **SMALL)


def test_transformers_loads_both_encoders_with_processor_and_tokenizer(pairs: cp.Trained, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    made = pairs.export(tmp_path / "hf", to="hf")
    assert [(one.modality, one.path.name) for one in made] == [("image", "image"), ("text", "text")]
    assert all(one.real > 0 and one.note == "" for one in made)
    folder = tmp_path / "hf" / "image"
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        features = model(**processor(images=list(PICTURES[:4]), return_tensors="pt")).pooler_output
    rows = F.normalize(features @ load_file(folder / "projection.safetensors")["weight"].T, dim=1)
    np.testing.assert_allclose(rows, pairs.encode(images=PICTURES[:4]), atol=1e-4)
    folder = tmp_path / "hf" / "text"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the red cat")["input_ids"] == [2, 9, 5, 7, 3]
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**tokenizer(["the red cat"], return_tensors="pt")).last_hidden_state
    rows = F.normalize(states.mean(1) @ load_file(folder / "projection.safetensors")["weight"].T, dim=1)
    np.testing.assert_allclose(rows, pairs.encode(texts=["the red cat"]), atol=1e-4)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "AutoTokenizer.from_pretrained" in card
    assert "| text_encoder | hf:bert |" in card
    assert "/tmp" not in card + "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.json"))


def test_sentence_transformers_gives_the_run_s_own_embeddings(pairs: cp.Trained, tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")
    with pytest.raises(
        CounterpointError, match=r"image: its encoder is no text model of transformers .* the format onnx"
    ):
        pairs.export(tmp_path / "st", to="sentence-transformers", modality="image")
    assert list(tmp_path.iterdir()) == []
    (made,) = pairs.export(tmp_path / "st", to="sentence-transformers")
    assert made.path == tmp_path / "st" / "text"
    assert "image is left out" in made.note
    model = sentences.SentenceTransformer(str(made.path), device="cpu")
    texts = ["the blue dog", "red", "a word that it never saw " * 9]
    np.testing.assert_allclose(model.encode(texts), pairs.encode(texts=texts), atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "mean"])
def test_a_folder_of_sentence_transformers_keeps_its_pooling(places: Path, tmp_path: Path, pooling: str) -> None:
    sentences = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")
    from counterpoint.encoders.text import build_text_encoder, build_tokenizer

    modules = library_parts._modules()
    chain = [modules.Transformer(str(places / "bert"), max_seq_length=12), modules.Pooling(16, pooling_mode=pooling)]
    sentences.SentenceTransformer(modules=chain, device="cpu").save(str(tmp_path), create_model_card=False)
    name, texts = f"hf:{tmp_path}", ["the blue dog", "red"]
    with torch.no_grad():
        rows = build_text_encoder(name).eval()(*build_tokenizer(name).encode(texts, 12))
    np.testing.assert_allclose(
        rows, sentences.SentenceTransformer(str(tmp_path), device="cpu").encode(texts), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["spectrogram", "waveform"])
def test_transformers_loads_the_encoder_of_sounds(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra language")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "spectrogram":
        config = transformers.ASTConfig(num_mel_bins=32, max_length=64, patch_size=16, initializer_range=0.3, **sizes)
        model, extractor = (
            transformers.ASTModel(config),
            transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
        )
    else:
        layers: Any = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1}
        layers |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.3}
        model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**layers, **sizes))
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    model.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    waves = np.random.default_rng(0).uniform(-1, 1, (24, 3200)).astype(np.float32)
    data = cp.own({"text": TEXTS, "audio": waves}, rate=16000, seconds=0.2)
    named = {"audio_encoder": f"hf:{tmp_path / 'model'}", "text_encoder": "text-16-1-2"}
    run = cp.train("clip", data=data, out=tmp_path, name="run", embedding=8, context=12, **named, **SMALL)
    (made,) = run.export(tmp_path / "hf", to="hf")
    assert (made.modality, made.path.name) == ("audio", "audio")
    assert made.real > 0
    assert "text is left out" in made.note
    names: dict[str, Any] = {"wave": waves[0]}
    card = (made.path / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(made.path))
    exec(compile(code, "card", "exec"), names)  # the card's own lines
    from safetensors.torch import load_file

    features = names["features"].detach()
    rows = F.normalize(features @ load_file(made.path / "projection.safetensors")["weight"].T, dim=1)
    np.testing.assert_allclose(rows, run.encode(sounds=waves[:1]), atol=1e-3)
    assert not np.allclose(rows, run.encode(sounds=waves[1:2]), atol=1e-2)


def test_timm_loads_our_small_vision_transformer(plain: cp.Trained, tmp_path: Path) -> None:
    import timm

    (made,) = plain.export(tmp_path / "timm", to="timm")
    assert made.difference <= 1e-4
    assert made.real > 0
    model = timm.create_model(f"local-dir:{made.path}", pretrained=True, num_classes=0).eval()
    pixels = torch.from_numpy(PICTURES[:4]).permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features = model((pixels - mean) / deviation)
    np.testing.assert_allclose(F.normalize(features, dim=1), plain.encode(images=PICTURES[:4]), atol=1e-5)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_tiny_patch16_224", "vit-xs"])
def test_timm_folders_hold_any_architecture_of_timm(name: str, tmp_path: Path) -> None:
    from counterpoint.encoders.images import build_image_encoder

    network = build_image_encoder(name, 32).eval()
    library_parts.write_timm(network, tmp_path, 32, pretrained=False)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    from counterpoint.views.images import normalise

    with torch.no_grad():
        found = library_parts.load_timm(tmp_path)(pictures)
        wanted = network(normalise(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert "license" not in (tmp_path / "config.json").read_text()


def test_other_architectures_and_outputs_are_refused_and_nothing_is_left(
    plain: cp.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(plain.path), "--to", "hf", "-o", str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert "its encoder is no architecture of transformers" in said
    assert "Write the format onnx or torch instead" in said
    honest = library_parts.load_timm
    monkeypatch.setattr(
        library_parts, "load_timm", lambda folder: lambda values: honest(folder)(values[..., ::-1].copy())
    )
    with pytest.raises(CounterpointError, match=r"gives other outputs in timm: .* nothing was written"):
        plain.export(tmp_path / "timm", to="timm")
    assert list(tmp_path.iterdir()) == []


def test_the_command_has_a_default_place_and_writes_a_card(
    plain: cp.Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(plain.path), "--to", "timm"]) == 0
    assert f"image: {plain.path / 'exported' / 'timm'}" in capsys.readouterr().out
    assert cli.main(["export", str(plain.path), "--to", "torch", "--items", "2"]) == 0
    assert "on random inputs and 2 items of the data" in capsys.readouterr().out
    card = (plain.path / "exported" / "encoder.MODEL_CARD.md").read_text(encoding="utf-8")
    assert "## Settings" in card
    assert cli.main(["export", str(plain.path)]) == 2
    assert "name a format (--to) or a file such as encoder.onnx (--out)" in capsys.readouterr().err


def test_the_encoder_of_a_larger_model_is_refused_by_the_model_s_name() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra language")
    from counterpoint.encoders.text import PretrainedText

    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    network = PretrainedText(transformers.T5Model(transformers.T5Config(**sizes)).get_encoder())
    for to in ("hf", "sentence-transformers"):
        assert (
            library_parts.refusal(network, to)
            == "its encoder is a part of T5Model, which transformers loads only whole"
        )


def test_names_of_formats(plain: cp.Trained, tmp_path: Path) -> None:
    with pytest.raises(CounterpointError, match="name two formats"):
        plain.export(tmp_path / "a.onnx", to="onnx", format="torch")
    with pytest.raises(CounterpointError, match="unknown format 'tim'; did you mean timm"):
        plain.export(to="tim")
    (tmp_path / "file").write_text("")
    with pytest.raises(CounterpointError, match="is a file; name a folder"):
        plain.export(tmp_path / "file", to="timm")
    assert library_folders.TO == ("hf", "timm", "sentence-transformers")
