"""Networks of pictures and texts of transformers and open_clip, on tiny models of the same classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.encoders.dual import MEAN, STD, DualEncoder, build_dual_encoder
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.taps import block_names, recorded, token_rows
from counterpoint.errors import CounterpointError
from counterpoint.experiment import of_spec
from counterpoint.tasks.class_teachers import AlignedDual
from tiny_clips import SMALL, TEXTS, saved_clip


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    build_dual_encoder.cache_clear()


def test_a_clip_of_transformers_gives_its_own_rows_scale_and_statistics(tmp_path: Path) -> None:
    model, tokenizer = saved_clip(tmp_path)
    transformers = pytest.importorskip("transformers")
    transformers.CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1]).save_pretrained(tmp_path)
    found = build_dual_encoder(f"hf:{tmp_path}")
    assert (found.dim, found.size) == (8, 16)
    assert found.scale == pytest.approx(float(model.logit_scale.exp()))
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        torch.testing.assert_close(found.texts(TEXTS), getattr(want, "pooler_output", want))
        pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        own = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
        want = model.get_image_features(pixel_values=own)
        arrived = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(found.images(arrived), getattr(want, "pooler_output", want), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_in_bfloat16_is_widened(tmp_path: Path) -> None:
    saved_clip(tmp_path, torch.bfloat16)
    found = build_dual_encoder(f"hf:{tmp_path}")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found.texts(TEXTS).dtype == torch.float32
    assert not any(p.requires_grad for p in found.parameters())


def test_siglip_pads_its_texts_to_the_context(tmp_path: Path) -> None:
    model, tokenizer = saved_clip(tmp_path, kind="Siglip")
    found = build_dual_encoder(f"hf:{tmp_path}")
    ids = tokenizer(TEXTS, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mask = tokenizer(TEXTS, padding="max_length", max_length=12, return_tensors="pt")["attention_mask"]
        want = model.get_text_features(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found.texts(TEXTS), getattr(want, "pooler_output", want))
    assert found.dim == 16


def test_pictures_of_another_size_are_enlarged() -> None:
    seen: list[Tensor] = []

    class Kept(DualEncoder):
        def image_rows(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3))

    small = torch.rand(1, 3, 8, 8)
    Kept(3, 1.0, 16).images(small)
    torch.testing.assert_close(seen[0], F.interpolate(small, 16, mode="bilinear", antialias=True))


def test_texts_longer_than_the_context_are_refused_by_name(tmp_path: Path) -> None:
    saved_clip(tmp_path, length=4)
    with pytest.raises(CounterpointError, match="reads 4 tokens, and 2 texts are longer, such as 'a photo of a cat'"):
        build_dual_encoder(f"hf:{tmp_path}").texts(TEXTS)


def test_a_model_without_texts_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(CounterpointError, match="does not embed pictures and texts in one space"):
        build_dual_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18", "unknown model of pictures and texts"),
        ("hf:/no/such/folder", "could not be loaded"),
        ("open_clip:ViT-B-32", "name its weights too"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    with pytest.raises(CounterpointError, match=message):
        build_dual_encoder(name)


def test_a_model_of_open_clip_gives_its_own_rows(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-pair.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-pair.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-pair").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    found = build_dual_encoder(f"open_clip:tiny-pair/{tmp_path / 'weights.pt'}")
    assert (found.dim, found.size) == (8, 16)
    with torch.no_grad():
        torch.testing.assert_close(found.texts(TEXTS), model.encode_text(open_clip.get_tokenizer("tiny-pair")(TEXTS)))
    with pytest.raises(CounterpointError, match="reads 12 tokens, and 1 text is longer"):
        found.texts(["a photo of " + "a cat and " * 10])


# --- learned context and layers


def of_library(kind: str, folder: Path) -> DualEncoder:
    """Return a tiny network of each kind, without gradients."""
    if kind == "own":
        experiment, _ = of_spec(
            "clip?data=styled-shapes%3Fsize=16%26train=64%26test=64&image_encoder=conv-s&embedding=8&batch_size=64"
        )
        learner = experiment.learner(experiment.task().facts, 0)
        return AlignedDual(learner, "own").eval().requires_grad_(False)
    if kind == "open_clip":
        open_clip = pytest.importorskip("open_clip")
        config = {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
        (folder / "tiny-two.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / "tiny-two.json")
        torch.save(open_clip.create_model("tiny-two").state_dict(), folder / "weights.pt")
        return build_dual_encoder(f"open_clip:tiny-two/{folder / 'weights.pt'}")
    saved_clip(folder, kind=kind)
    return build_dual_encoder(f"hf:{folder}")


KINDS = ["own", "CLIP", "Siglip", "open_clip"]


@pytest.mark.parametrize("kind", KINDS)
def test_context_of_a_templates_own_words_gives_the_whole_texts(kind: str, tmp_path: Path) -> None:
    network = of_library(kind, tmp_path)
    context = network.word_rows("a photo of a")
    assert context.shape[1] == network.width
    names = ["cat", "dog dog"]
    want = network.texts([f"a photo of a {name}" for name in names])
    torch.testing.assert_close(network.text_rows_with_context(context, names), want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(network.text_rows_with_context(context.flip(1), names), want, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_context_alone_in_chunks_as_in_one_pass(kind: str, tmp_path: Path) -> None:
    network = of_library(kind, tmp_path)
    before = network.texts(["a cat"])
    found = []
    for chunk in (256, 2):
        torch.manual_seed(0)
        context = (network.word_rows("a photo")[None] + 0.1 * torch.randn(3, 1, network.width)).requires_grad_()
        rows = network.text_rows_with_context(context, ["cat", "a dog"], chunk=chunk)
        assert rows.shape == (3, 2, network.dim)
        rows.square().sum().backward()
        assert context.grad is not None
        assert context.grad.abs().sum() > 0
        found.append((rows.detach(), context.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    for n in range(3):  # each context by itself
        alone = network.text_rows_with_context(context[n], ["cat", "a dog"])
        torch.testing.assert_close(alone, rows[n], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(network.texts(["a cat"]), before)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_the_context_beside_the_learned_one_are_refused(kind: str, tmp_path: Path) -> None:
    network = of_library(kind, tmp_path)
    with pytest.raises(CounterpointError, match="tokens beside the 9 of the context, and 1 text is longer"):
        network.text_rows_with_context(
            torch.zeros(9, network.width), ["a cat and a dog " * (6 if kind == "own" else 1)]
        )
    with pytest.raises(ValueError, match="context must be"):
        network.text_rows_with_context(torch.zeros(2, network.width + 1), ["cat"])


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("own", [(64, 32), (16, 64), (4, 128)]), ("CLIP", [(5, 16)]), ("Siglip", [(4, 16)]), ("open_clip", [(5, 16)] * 2)],
)
def test_layers_are_the_tokens_of_every_block_beside_the_rows(kind: str, shapes: list[Any], tmp_path: Path) -> None:
    network = of_library(kind, tmp_path)
    images = torch.rand(3, 3, 16, 16)
    rows, layers = network.layers(images)
    assert torch.equal(rows, network.images(images))
    assert [tuple(layer.shape) for layer in layers] == [(3, *shape) for shape in shapes]


def test_tokens_of_a_tower_of_this_library_lie_behind_the_batch() -> None:
    tower = build_image_encoder("tower-32-2-16", 16).eval()
    names = block_names(tower)
    with recorded(tower, names) as seen, torch.no_grad():
        tower(torch.randn(3, 3, 16, 16))
    tokens = [token_rows(seen[name], tower.get_submodule(name)) for name in names]
    assert [tuple(rows.shape) for rows in tokens] == [(3, 17, 32)] * 2


def test_blocks_are_found_in_every_family() -> None:
    assert block_names(build_image_encoder("vit-s", 16)) == [f"model.blocks.{n}" for n in range(4)]
    assert block_names(build_image_encoder("torchvision:resnet18", 32)) == [f"model.layer{n}" for n in range(1, 5)]
    with pytest.raises(CounterpointError, match="has no blocks"):
        block_names(torch.nn.Linear(2, 2))
