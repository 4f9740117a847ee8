"""Tokens, queries, keys and values inside vision transformers of timm and of transformers."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from counterpoint.core.tokens import token_relations
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.inside import TokenNetwork
from counterpoint.encoders.vision_transformers import VisionTokens, vit_s
from counterpoint.errors import CounterpointError
from counterpoint.tasks.token_teachers import token_teacher
from counterpoint.views.images import denormalise, normalise

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


def saved(kind: str, folder, **more) -> str:
    """Write a tiny model of a class of transformers to a folder; return its name."""
    import transformers

    torch.manual_seed(0)
    if kind == "CLIP":
        config = transformers.CLIPConfig(
            vision_config=TINY | more,
            text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9},
        )
    else:
        config = getattr(transformers, f"{kind}Config")(**TINY, **(DECODER if kind == "ViTMAE" else {}), **more)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return f"hf:{folder}"


def attentions(model, images: Tensor) -> tuple[Tensor, ...]:
    """Return the library's own attention of every layer."""
    model.set_attn_implementation("eager")
    more = {}
    if model.config.model_type == "vit_mae":
        more["noise"] = torch.arange(16.0).expand(len(images), 16)
    return model(pixel_values=images, output_attentions=True, **more).attentions


# A class of each kind: ViT as DINO's first version uses it, MAE, CLIP's image tower, two tokens before the patches, none.
KINDS = [("ViT", 1), ("ViTMAE", 1), ("CLIP", 1), ("Dinov2", 1), ("DeiT", 2), ("SiglipVision", 0)]


@pytest.mark.parametrize(("kind", "prefix"), KINDS)
def test_relations_of_recorded_queries_and_keys_are_the_library_s_attention(kind, prefix, tmp_path):
    teacher = token_teacher("--relation-teacher", saved(kind, tmp_path), (4, 4))
    network = teacher.module
    assert (network.depth, network.heads, network.width, network.dim) == (2, 3, 24, 24)
    assert (network.grid, network.prefix, network.classes) == ((4, 4), prefix, prefix > 0)
    own = IMAGES.clamp(-1.7, 1.7)  # within the range of pictures, so that nothing is cut off
    found = teacher(own, [0, 1])
    assert not any(x.requires_grad for qkv in found.layers.values() for x in qkv)
    seen = own if kind != "CLIP" else normalise(denormalise(own), *CLIP)
    assert found.tokens.shape == (2, prefix + 16, 24)
    for number, wanted in enumerate(attentions(network.encoder.model, seen)):
        qkv = found.layers[number]
        assert qkv.value.shape == (2, 3, prefix + 16, 8)
        torch.testing.assert_close(token_relations(qkv.query, qkv.key), wanted, rtol=1e-4, atol=1e-5)


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_a_published_mae_sees_all_patches_in_order_and_always_alike(tmp_path):
    teacher = token_teacher("--relation-teacher", saved("ViTMAE", tmp_path), (4, 4))
    first, again = (teacher(IMAGES).tokens for _ in range(2))
    assert torch.equal(first, again)
    moved = IMAGES.clone()
    moved[:, :, :4, 8:12] += 1  # the third patch
    change = (teacher(moved).tokens - first).norm(dim=2)[:, 1:]
    assert change.argmax(1).tolist() == [2, 2]
    encoder = build_image_encoder(f"hf:{tmp_path}", 16, pretrained=True).eval()
    torch.testing.assert_close(encoder(IMAGES), encoder(IMAGES))


def test_a_published_teacher_sees_pictures_at_the_size_of_its_patches(tmp_path):
    teacher = token_teacher("--feature-teacher", saved("ViT", tmp_path), (8, 8))
    assert teacher.module.size == 32
    assert teacher(IMAGES).tokens.shape == (2, 65, 24)


def test_a_half_precision_file_and_its_processor_s_numbers_are_read(tmp_path):
    import transformers

    name = saved("ViT", tmp_path)
    transformers.AutoModel.from_pretrained(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    teacher = token_teacher("--feature-teacher", name, (4, 4))
    own = IMAGES.clamp(-1.7, 1.7)
    wanted = teacher.module(normalise(denormalise(own), (0.5,) * 3, (0.25,) * 3)).tokens
    assert wanted.dtype == torch.float32
    torch.testing.assert_close(teacher(own).tokens, wanted)
    assert not torch.allclose(teacher(own).tokens, teacher.module(own).tokens)


def test_timm_s_queries_and_keys_are_those_of_its_attention():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0, qk_norm=True, reg_tokens=2
    )
    network = TokenNetwork(VisionTokens(model).eval(), "it", 16)
    assert (network.prefix, network.classes, network.width) == (3, True, 24)
    found = network(IMAGES, [1])
    attention, seen = model.blocks[1].attn, {}
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(it=output))
    network(IMAGES)
    handle.remove()
    torch.testing.assert_close(token_relations(found.layers[1].query, found.layers[1].key), seen["it"])
    torch.testing.assert_close(found.tokens, network.encoder.tokens(IMAGES))


def test_timm_by_name_is_built_at_the_size_of_its_patches(monkeypatch):
    import timm

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made(name, **options | {"pretrained": False}))
    teacher = token_teacher("--feature-teacher", "timm:test_vit", (2, 2))
    network = teacher.module
    assert (network.size, network.grid, network.dim) == (32, (2, 2), 64)
    mean, std = network.encoder.model.pretrained_cfg["mean"], network.encoder.model.pretrained_cfg["std"]
    own = IMAGES.clamp(-1.7, 1.7)
    seen = torch.nn.functional.interpolate(
        normalise(denormalise(own), mean, std), (32, 32), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(teacher(own).tokens, network(seen).tokens)


def test_dropped_tokens_reach_no_later_token():
    network = TokenNetwork(vit_s(16, width=24, heads=3, depth=3).eval(), "vit-s", 16)

    def keep(x: Tensor) -> Tensor:
        return torch.tensor([0, 2, 5]).expand(len(x), 3) if x.shape[1] == 17 else torch.tensor([0, 2]).expand(len(x), 2)

    found = network.dropping(IMAGES, {0: keep, 2: keep}, [0, 2])
    assert found.tokens.shape == (2, 2, 24)
    assert found.alive_at[0].tolist() == [[1, 4]] * 2
    assert found.alive.tolist() == [[4]] * 2
    assert found.layers[0].key.shape[2] == 3
    moved = IMAGES.clone()
    moved[:, :, 12:] = 9
    torch.testing.assert_close(network.dropping(moved, {0: keep, 2: keep}).tokens, found.tokens)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18", "--feature-teacher timm:resnet18: it is no vision transformer"),
        ("timm:vit_nonsense", "timm has no model"),
        ("hf:/nowhere/at/all", "--feature-teacher hf:/nowhere/at/all: could not be loaded"),
        ("vit-s", "unknown teacher"),
    ],
)
def test_teachers_that_cannot_teach_are_named(name, message):
    with pytest.raises(CounterpointError, match=message):
        token_teacher("--feature-teacher", name, (4, 4))


def test_a_transformer_of_windows_and_one_with_rotary_positions_are_refused(tmp_path):
    import transformers

    config = transformers.DINOv3ViTConfig(**TINY)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(CounterpointError, match="rotary positions"):
        token_teacher("--feature-teacher", f"hf:{tmp_path}", (4, 4))
    with pytest.raises(CounterpointError, match="no plain vision transformer"):
        TokenNetwork(build_image_encoder("conv-s", 16), "conv-s", 16)


def test_vit_xs_has_small_patches():
    assert build_image_encoder("vit-xs", 8).grid == (4, 4)
    assert build_image_encoder("vit-xs", 32).grid == (8, 8)
