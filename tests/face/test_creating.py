"""Learners for somebody's own loop: every built system, what is missing, and a loop that learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import counterpoint as cp
from counterpoint import catalog
from counterpoint.errors import CounterpointError

FACTS = {
    "views": {"size": 16, "examples": 64, "encoder": "conv-s", "batch_size": 8},
    "labelled": {"size": 16, "classes": 4, "examples": 64, "encoder": "conv-s", "batch_size": 8},
    "aligned": {
        "modalities": {"image": {"kind": "image", "size": 16}, "text": {"kind": "text"}},
        "texts": ["a red thing", "a blue thing"] * 4,
        "image_encoder": "conv-s",
        "text_encoder": "text-s",
        "embedding": 4,
        "batch_size": 8,
        "pretrained": False,
    },
    "federations": {
        "modalities": {"image": {"kind": "image", "size": 16}, "text": {"kind": "text"}},
        "texts": ["a red thing", "a blue thing"] * 4,
        "image_encoder": "conv-s",
        "text_encoder": "text-s",
        "embedding": 4,
        "batch_size": 8,
    },
    "tokens": {"texts": ["a red fox", "a blue bird"] * 4, "clip_dim": 3, "encoder": "text-8-1-2", "batch_size": 8},
    "interleaved": {"texts": ["a red fox", "a blue bird"] * 4, "size": 16, "batch_size": 8},
    "chats": {"texts": ["a red fox", "a blue bird"] * 4, "size": 16, "model": "llava-8-1-2", "batch_size": 8},
    "dialogs": {"texts": ["a red fox", "a blue bird"] * 4, "encoder": "text-8-1-2", "batch_size": 8},
    "generation": {
        "texts": ["a red fox", "a blue bird"] * 4,
        "size": 16,
        "classes": 2,
        "encoder": "conv-s",
        "pretrained": False,
        "batch_size": 8,
    },
    "demonstrations": {"texts": ["a red fox", "a blue bird"] * 4, "model": "gpt2-8-1-2", "vectors": 2, "batch_size": 8},
    "episodes": {
        "feature_width": 3,
        "class_names": ["cat", "dog"],
        "meta": "gpt2-8-1-2",
        "fuser": 8,
        "fuser_heads": 2,
        "word_width": 4,
        "batch_size": 8,
    },
    "dense": {"size": 16, "regions": ["ground", "road"], "encoder": "conv-s", "batch_size": 8},
    "boxes": {"size": 32, "regions": ["ground", "car"], "encoder": "conv-s", "width": 32, "batch_size": 8},
    "frames": {"size": 16, "encoder": "conv-s", "batch_size": 8},
    "regions": {
        "size": 32,
        "class_names": ["disc", "square"],
        "proposals": 6,
        "encoder": "conv-s",
        "layer": "",
        "crop": 16,
        "batch_size": 8,
    },
    "regression": {"size": 16, "encoder": "conv-s", "batch_size": 8},
    "bags": {"visual_dim": 8, "audio_dim": 4},
    "sequences": {"items": 12, "dim": 8, "length": 5, "batch_size": 8},
    "restored": {"network": "edsr-s", "scale": 2, "patch": 20, "batch_size": 8},
}
MORE = {
    "cosmo": {"model": "llama-8-2-2", "heads": 2, "dim_head": 4, "media_tokens": 2, "depth": 1, "embedding": 4},
    "stic": {"rank": 2},
    "llava-mod": {"teacher": "llava-8-1-2"},
    "comd": {"teacher": "llava-8-1-2"},
    "lol": {"model": "llama-8-2-2", "size": 0},
    "global-local-seg": {"encoder": "unet-s", "blocks": 1},
    "esp-medsam": {"encoder": "prefix-s", "domains": ["xray", "scan"], "prompt": True},
    "m3col": {"classes": 3},
    "mod-x": {"phases": 2},
    "coconut": {"classes": 3, "phases": 3, "examples": 8, "image_encoder": "vit-s", "decoder_depth": 1},
    "mae": {"encoder": "vit-s"},
    "mlcd": {"clusters": 1000, "labels": 4},
    "hybrid-distill": {"encoder": "vit-xs"},
    "obow": {"levels": ["stem", "layer1"], "border": 0, "update": "no_averaging", "words": 20, "patch_size": 8},
    "albef": {"image_encoder": "vit-s"},
    "triplet": {"pretrained": False},
    "dcd": {"heads": 2, "teacher_epochs": 1},
    "vl2v-adip": {"pretrained": False, "teacher_dim": 6},
    "vlm-ood-distill": {"teacher_dim": 6},
    "tinyclip": {"image_encoder": "tower-16-1-8", "text_encoder": "tower-16-1-8"},
    "promptkd": {"teacher_dim": 6, "student": "", "encoder": "vit-s", "prompt_depth": 2},
    "gopro": {"teacher_dim": 6, "words": 4, "text_width": 5, "layer_widths": [3, 8], "endings": ["a.", "b."]},
    "any2seg": {"pretrained": False, "width": 8},
    "mean-teacher": {"labels_per_class": 2, "labelled_batch": 4},
    "attention-transfer": {"encoder": "resnet-s", "teacher_encoder": "resnet-s"},
    "gradient-harmonization": {
        "modalities": {name: {"kind": "vector", "dim": 4} for name in "abc"},
        "texts": [],
    },
    "teminal": {"modalities": {"audio": {"kind": "audio", "rate": 8000, "samples": 1600}, "text": {"kind": "text"}}},
    "audio-sheet-retrieval": {
        "modalities": {
            "sheet": {"kind": "image", "size": 64},
            "audio": {"kind": "audio", "rate": 16000, "samples": 32000},
        },
        "texts": [],
    },
}
REFUSED = {
    "mulki": r"needs the fact network of the data; .* or data=",  # all of it is a network that begins elsewhere
    "adainf": r"needs the fact \w+ of the data; .* or data=",  # it learns from pictures made from the training set
    "cwcl": "the frozen tower would have random weights",  # no published weights here
}


@pytest.mark.parametrize("slug", [row.slug for row in catalog.entries().values() if row.built])
def test_every_built_system_is_created_without_data_or_names_the_missing_fact(slug):
    task = catalog.get(slug).task
    settings = FACTS[task] | MORE.get(slug, {})
    if slug in REFUSED:
        with pytest.raises(CounterpointError, match=REFUSED[slug]):
            cp.create(slug, **settings)
        return
    learner = cp.create(slug, **settings)
    assert learner.training
    assert sum(p.numel() for p in learner.parameters() if p.requires_grad) > 0
    assert learner.loss.__func__ is not cp.systems.base.Learner.loss


@pytest.mark.parametrize("slug", ["simclr", "moco-v2+mochi", "byol", "supcon", "isogclr"])
def test_a_learner_learns_in_a_loop_of_ones_own(slug):
    torch.manual_seed(0)
    task = catalog.get(slug).task
    queue = {"queue": 16} if "moco" in slug else {}
    learner = cp.create(slug, steps=30, **FACTS[task], **queue, projection=16, hidden=32)
    optimiser = torch.optim.Adam(learner.parameters(), 1e-3)
    base = torch.randn(8, 3, 16, 16)
    before = {name: value.clone() for name, value in learner.named_parameters()}
    losses = []
    for step in range(8):
        noise = [base + 0.1 * torch.randn_like(base) for _ in range(2)]
        batch = {"views": noise, "index": torch.arange(8), "label": torch.arange(8) % 4}
        if "+" in slug:  # its part draws numbers for each step
            images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
            batch = learner.prepare({"image": images, **batch}, torch.Generator().manual_seed(step))
        loss = learner.loss(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        learner.end_step()
        learner.position.step = step + 1
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert any(not torch.equal(before[name], value) for name, value in learner.named_parameters())
    if slug == "simclr":
        assert losses[-1] < losses[0]


def test_encoder_and_loss_are_those_that_were_asked_for():
    learner = cp.create("simclr", encoder="timm:resnet18", size=32, temperature=0.2, seed=3)
    assert learner.encoder.dim == 512
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = learner.loss({"views": [x, x.flip(3)], "index": torch.arange(4)})["loss"]
    z1, z2 = learner.project([x, x.flip(3)])
    torch.testing.assert_close(found, cp.functional.of("simclr").nt_xent(z1, z2, 0.2))


def test_the_facts_come_from_data_too():
    data = (np.zeros((40, 12, 12, 3), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None, None], np.arange(40) % 2)
    learner = cp.create("supcon", data=data, encoder="conv-s", batch_size=8)
    assert (learner.size, learner.examples) == (12, 28)
    assert learner.steps_per_epoch == 3


@pytest.mark.parametrize(
    ("slug", "given", "said"),
    [
        ("simclr", {}, r"these are missing: size=224 \(pixels"),
        ("supcon", {}, r"missing: size=224 .*; classes=10"),
        (
            "clip",
            {"modalities": {"a": {"kind": "text"}, "b": {"kind": "vector", "dim": 2}}},
            r"missing: texts=\[\.\.\.\]",
        ),
        ("clip", {}, "missing: modalities="),
        ("macil-sd", {"visual_dim": 4}, r"missing: audio_dim=128"),
        ("isogclr", {"size": 16, "encoder": "conv-s"}, r"needs the fact examples of the data; .*examples=\.\.\."),
        ("simclr", {"sise": 16}, "simclr has no setting sise; did you mean size"),
        ("simclrr", {"size": 16}, "unknown system 'simclrr'; did you mean simclr"),
    ],
)
def test_what_is_missing_or_unknown_is_named(slug, given, said):
    with pytest.raises(CounterpointError, match=said):
        cp.create(slug, **given)
