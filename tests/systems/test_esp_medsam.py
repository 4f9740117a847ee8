"""ESP-MedSAM: the authors' numbers, identities, decoupling, teachers, stages, resuming, data, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterpoint import cli, data, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core import query_decoder
from counterpoint.core.query_decoder import SelfPrompt
from counterpoint.data.dense import IGNORE
from counterpoint.encoders import modality_masks, prefix_windows
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.prefix_windows import PrefixWindows, tensors_of
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.dense import esp_medsam as module
from counterpoint.tasks.map_teachers import taught_maps
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "esp-medsam.npz")
DATA = "medical-shapes?train=4&test=2&natural=6&size=16"


def of(function: str, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = f"{function}/case0/{kind}/"
    found = {
        name[len(prefix) :]: torch.from_numpy(np.asarray(PARITY[name])) for name in PARITY if name.startswith(prefix)
    }
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_block_and_decoder_equal_the_authors(dtype):
    def weights(function):
        return of(function, "weight", dtype), int(of(function, "param")["heads"])

    name = "prefix_window_attention"
    found = fn.prefix_window_attention(of(name, "in", dtype)["x"], *weights(name))
    torch.testing.assert_close(found, of(name, "out", dtype)["y"], rtol=1e-5, atol=1e-6)
    name = "student_block"
    found = fn.student_block(of(name, "in", dtype)["x"], *weights(name), int(of(name, "param")["window"]))
    torch.testing.assert_close(found, of(name, "out", dtype)["y"], rtol=1e-5, atol=4e-6)
    name = "query_decoupled_decoder"
    given = of(name, "in", dtype)
    found = fn.query_decoupled_decoder(given["src"], given["pos"], given["tokens"], *weights(name))
    torch.testing.assert_close(found, of(name, "out", dtype)["all_masks"], rtol=1e-5, atol=5e-8)
    modality = int(of(name, "param")["modality"])
    torch.testing.assert_close(found[:, modality : modality + 1], of(name, "out", dtype)["mask"], rtol=1e-5, atol=5e-8)


def test_gradients_equal_finite_differences():
    weights = of("prefix_window_attention", "weight")
    names = ("deep_QKV_embeddings_med", "med_attention_biases", "attention_biases", "qkv.weight")

    def attention(x, *values):
        return fn.prefix_window_attention(x, weights | dict(zip(names, values, strict=True)), 2)

    inputs = [of("prefix_window_attention", "in")["x"][:1], *(weights[name] for name in names)]
    assert torch.autograd.gradcheck(attention, [x.clone().requires_grad_() for x in inputs], fast_mode=True)
    block = of("student_block", "weight")
    x = of("student_block", "in")["x"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fn.student_block(x, block, 2, 3), [x], fast_mode=True)
    decoder, given = of("query_decoupled_decoder", "weight"), of("query_decoupled_decoder", "in")
    src, tokens = (given[name].clone().requires_grad_() for name in ("src", "tokens"))
    heads = int(of("query_decoupled_decoder", "param")["heads"])

    def masks(src, tokens):
        return fn.query_decoupled_decoder(src, given["pos"], tokens, decoder, heads)

    assert torch.autograd.gradcheck(masks, [src, tokens], fast_mode=True)


# ------------------------------------------------------------------------------------------------------------- equations


def test_masked_prefix_is_plain_window_attention():
    weights, x = of("prefix_window_attention", "weight"), of("prefix_window_attention", "in")["x"]
    masked = weights | {"med_attention_biases": torch.tensor([-torch.inf], dtype=torch.float64)}
    plain = {name: value for name, value in weights.items() if "med" not in name}
    found = fn.prefix_window_attention(x, masked, 2)
    torch.testing.assert_close(found, fn.prefix_window_attention(x, plain, 2), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(fn.prefix_window_attention(x, weights, 2), fn.prefix_window_attention(x, plain, 2))


def test_values_may_have_their_own_prefix():
    weights, x = of("prefix_window_attention", "weight"), of("prefix_window_attention", "in")["x"]
    same = weights | {"deep_V_embeddings_med": weights["deep_QKV_embeddings_med"]}
    other = weights | {"deep_V_embeddings_med": 2 * weights["deep_QKV_embeddings_med"]}
    base = fn.prefix_window_attention(x, weights, 2)
    assert torch.equal(fn.prefix_window_attention(x, same, 2), base)
    assert not torch.allclose(fn.prefix_window_attention(x, other, 2), base)


def test_adapter_of_zeros_leaves_the_plain_block():
    weights, x = of("student_block", "weight"), of("student_block", "in")["x"]
    zero = weights | {name: torch.zeros_like(weights[name]) for name in ("med_dah.fc2.weight", "med_dah.fc2.bias")}
    plain = {name: value for name, value in weights.items() if not name.startswith("med_dah")}
    torch.testing.assert_close(fn.student_block(x, zero, 2, 3), fn.student_block(x, plain, 2, 3))


def test_mixed_batch_selects_each_picture_s_controller():
    weights = of("student_block", "weight")
    own = {n: v for n, v in weights.items() if "med" in n}
    controllers = [own, {name: 1.5 * value for name, value in own.items()}]
    x = draw(0, 4, 49, 16)
    found = fn.student_block(x, weights, 2, 3, controllers, torch.tensor([1, -1, 0, 1]))
    alone = {n: v for n, v in weights.items() if "med" not in n}
    wanted = [
        fn.student_block(x[n : n + 1], alone | w, 2, 3) for n, w in enumerate([controllers[1], {}, own, controllers[1]])
    ]
    torch.testing.assert_close(found, torch.cat(wanted))


def test_gradients_are_finite_and_reach_only_the_controllers_of_the_batch():
    encoder = PrefixWindows(16, "prefix-s", 16)
    for name in "ab":
        encoder.add(name)
    maps = encoder.features(torch.randn(3, 3, 16, 16), torch.tensor([1, -1, 1]))
    maps.square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.controllers["a"].parameters())
    assert all(p.grad is not None for p in encoder.controllers["b"].parameters())
    assert any(p.grad.any() for p in encoder.controllers["b"].parameters())
    assert all(p.grad.isfinite().all() for p in encoder.blocks.parameters())


def test_maps_of_modalities_are_the_same_after_another_controller_is_added():
    encoder = PrefixWindows(16, "prefix-s", 16).eval()
    images, which = torch.randn(3, 3, 16, 16), torch.tensor([0, -1, 0])
    encoder.add("a")
    before = encoder.features(images, which)
    encoder.add("b")
    assert torch.equal(encoder.features(images, which), before)


def test_prompt_is_added_and_gives_the_patches_no_gradient():
    prompt = SelfPrompt(16)
    maps = torch.randn(2, 16, 4, 4)
    prompted, patches = prompt(maps)
    assert patches.shape == (2, 2, 2)
    prompted.sum().backward()
    assert prompt.patch.weight.grad is None
    assert prompt.embed.weight.grad is not None
    with torch.no_grad():
        prompt.patch.bias.fill_(-1e6)  # no patch is foreground: a constant, not 0
        shift = prompt(maps)[0] - maps
        constant = torch.nn.functional.gelu(prompt.embed_norm(prompt.embed.bias))
        torch.testing.assert_close(shift, constant[None, :, None, None].expand_as(shift), rtol=1e-3, atol=1e-5)


def test_patch_is_foreground_if_any_pixel_is():
    masks = torch.zeros(1, 4, 4).long()
    masks[0, 0, 0], masks[0, 0, 1], masks[0, 3, 0] = 2, IGNORE, IGNORE
    assert fn.patch_labels(masks, 2, 2).tolist() == [[[1, 0], [IGNORE, 0]]]


def test_loss_of_masks_equals_the_formula_and_ignores_unknown_pixels():
    logits, masks = draw(0, 2, 4, 4), (draw(1, 2, 4, 4) > 0).long()
    p, y = logits.sigmoid(), masks.double()
    bce = torch.nn.functional.binary_cross_entropy(p, y)
    dice = 1 - (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    torch.testing.assert_close(fn.binary_mask_loss(logits, masks), 0.8 * bce + 0.2 * dice.mean())
    hidden = masks.clone()
    hidden[:, 0] = IGNORE
    torch.testing.assert_close(fn.binary_mask_loss(logits, hidden), fn.binary_mask_loss(logits[:, 1:], masks[:, 1:]))
    logits.requires_grad_()
    nothing = fn.binary_mask_loss(logits, torch.full_like(masks, IGNORE))
    nothing.backward()
    assert nothing == 0
    assert not logits.grad.any()


def test_empty_mask_has_no_loss_for_an_empty_prediction():
    assert fn.binary_mask_loss(torch.full((1, 3, 3), -60.0), torch.zeros(1, 3, 3).long()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.prefix_window_attention(draw(0, 2, 8, 16), of("prefix_window_attention", "weight"), 2), "side"),
        (
            lambda: fn.prefix_window_attention(draw(0, 2, 4, 16), of("prefix_window_attention", "weight"), 2),
            "attention_b",
        ),
        (lambda: fn.student_block(draw(0, 1, 48, 16), of("student_block", "weight"), 2, 3), "side"),
        (lambda: fn.student_block(draw(0, 1, 49, 16), of("student_block", "weight"), 2, 3, []), "modality"),
        (
            lambda: fn.student_block(draw(0, 1, 49, 16), of("student_block", "weight"), 2, 3, [{}], torch.tensor([1])),
            r"0\.\.0, or be -1",
        ),
        (
            lambda: fn.query_decoupled_decoder(draw(0, 1, 8, 2, 2), draw(0, 1, 8, 2, 2), draw(0, 1, 2, 4), {}, 2),
            "tokens",
        ),
        (
            lambda: fn.query_decoupled_decoder(draw(0, 1, 8, 2, 2), draw(0, 1, 8, 2, 2), draw(0, 1, 1, 8), {}, 2),
            "masks",
        ),
        (lambda: fn.binary_mask_loss(draw(0, 1, 2, 2), torch.zeros(1, 2, 3).long()), "logits and masks"),
        (lambda: fn.binary_mask_loss(draw(0, 1, 2, 2), torch.zeros(1, 2, 2).long(), -1.0), "bce_weight"),
        (lambda: fn.patch_labels(torch.zeros(1, 2, 2).long(), 3, 1), "at least 3 x 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------ the learner


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    """Save a tiny SAM of 16 pixels with maps of 4 x 4 cells and 16 channels."""
    from transformers import SamConfig, SamModel

    path = tmp_path_factory.mktemp("sam")
    vision = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        "output_channels": 16, "mlp_dim": 8, "window_size": 2, "num_pos_feats": 8, "global_attn_indexes": [0],
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "mlp_dim": 8,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(path)
    return path


def small(sam: Path, **overrides) -> dict:
    return {
        "encoder": "prefix-s", "dim": 16, "teacher": f"hf:{sam}", "mlp_width": 8, "epochs": 1, "common_epochs": 1,
        "controller_epochs": 1, "steps": 2, "batch_size": 4, "evaluate_every": 1, "cached": False,
    } | overrides  # fmt: skip


def built(sam: Path, source: str = DATA, seed: int = 0, **overrides):
    experiment = Experiment.resolve("esp-medsam", source, overrides=small(sam, **overrides))
    task = experiment.task()
    return load_system("esp-medsam").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def state(learner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


@pytest.mark.parametrize("settings", [{"queries": "alone", "mask_mlps": "own"}, {}, {"queries": "shared"}])
def test_masks_of_a_mixed_batch_are_those_of_its_pictures_alone(sam, settings):
    learner, _ = built(sam, **settings)
    learner.eval()
    images, which = torch.randn(5, 3, 16, 16), torch.tensor([3, 0, 3, 1, 0])
    with torch.no_grad():
        found = learner.segmented(images, which)[0]
        each = [learner.segmented(images[n : n + 1], which[n : n + 1])[0] for n in range(5)]
        torch.testing.assert_close(found, torch.cat(each), rtol=1e-4, atol=1e-5)
        other = learner.segmented(images, (which + 1) % 4)[0]
    assert not torch.allclose(found, other, atol=1e-3)


def test_sam_is_loaded_by_name_and_its_map_is_the_library_s(sam):
    from transformers import SamModel

    images = torch.randn(2, 3, 16, 16)
    encoder = build_image_encoder(f"hf:{sam}", 16, pretrained=True).eval()
    with torch.no_grad():
        wanted = SamModel.from_pretrained(sam).eval().get_image_embeddings(images)
        assert torch.equal(encoder.features(images), wanted)
    assert encoder(images).shape == (2, encoder.dim)
    with pytest.raises(CounterpointError, match="pictures of 16 pixels, not of 32"):
        build_image_encoder(f"hf:{sam}", 32)


def test_each_stage_trains_its_own_parts_and_calls_the_functions(sam, monkeypatch):
    learner, task = built(sam)
    seen: dict[str, dict[str, Tensor]] = {}
    called: dict[str, set[str]] = {}
    loss = learner.loss

    def noted(batch):
        seen.setdefault(learner.stage_name, state(learner))
        return loss(batch)

    for place, name in (
        (prefix_windows, "prefix_window_attention"),
        (prefix_windows, "student_block"),
        (modality_masks, "query_decoupled_decoder"),
        (module, "binary_mask_loss"),
    ):
        function = getattr(place, name)

        def call(*args, _name=name, _function=function):
            called.setdefault(learner.stage_name, set()).add(_name)
            return _function(*args)

        monkeypatch.setattr(place, name, call)
    monkeypatch.setattr(learner, "loss", noted)
    fit(learner, task, bar=False)
    assert list(seen) == ["common", *(f"controller {name}" for name in learner.names), "segment"]
    encoder = {"prefix_window_attention", "student_block"}
    assert called["common"] == called["controller blobs"] == encoder
    assert called["segment"] == encoder | {"query_decoupled_decoder", "binary_mask_loss"}

    def moved(a, b):
        return {name for name in a if name != "distilled" and not torch.equal(a[name], b[name])}

    states = [*seen.values(), state(learner)]
    first = moved(states[0], states[1])
    assert any("running_mean" in name for name in first)
    assert all(name.startswith("encoder.") and "controllers" not in name for name in first)
    for number, name in enumerate(learner.names, start=1):
        changed = moved(states[number], states[number + 1])
        assert changed
        # Of the shared part nothing changes, its running statistics included.
        assert all(part.startswith(f"encoder.controllers.of_{name}.") for part in changed)
    last = {name.partition(".")[0] for name in moved(states[-2], states[-1])}
    assert {"encoder", "self_prompt", "decoder", "queries", "mask_mlps"} <= last


def test_stage_of_a_modality_sees_its_pictures_and_the_first_one_natural_ones(sam, monkeypatch):
    learner, task = built(sam)
    seen: dict[str, set[int]] = {}
    loss = learner.loss
    monkeypatch.setattr(
        learner, "loss", lambda b: (seen.setdefault(learner.stage_name, set()).update(b["domain"].tolist()), loss(b))[1]
    )
    fit(learner, task, bar=False)
    assert seen["common"] == {-1}
    assert [seen[f"controller {name}"] for name in learner.names] == [{0}, {1}, {2}, {3}]
    assert -1 not in seen["segment"]


def test_distillation_pulls_maps_towards_the_teacher(sam):
    errors = []
    for epochs in (0, 30):
        learner, task = built(sam, common_epochs=epochs, controller_epochs=1, lr=0.3)
        errors.append(fit(learner, task, bar=False)[-1]["test/modality_distil_mse"])
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"joint": True, "separate_prefixes": True, "queries": "alone", "mask_mlps": "own"},
        {"controllers": False, "queries": "shared", "prompt": False, "cached": True},
        {"common_epochs": 0, "controller_epochs": 0, "mask_mlps": "own", "supervision": "sum"},
    ],
)
def test_options_train(sam, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learner, task = built(sam, **settings)
    row = fit(learner, task, bar=False)[-1]
    assert np.isfinite(row["train/loss"])
    assert 0 <= row["test/modality_dice"] <= 1
    assert ("test/modality_distil_mse" in row) == (settings.get("common_epochs") != 0)
    assert ("test/modality_patch_accuracy" in row) == settings.get("prompt", True)


def test_medical_teacher_teaches_pictures_of_a_modality_alone(sam):
    learner, _ = built(sam)
    learner.teachers = {"natural": lambda b: torch.zeros(3, 16, 4, 4), "medical": lambda b: torch.ones(3, 16, 4, 4)}
    found = taught_maps(learner.teachers, {"domain": torch.tensor([-1, 2, 0])})
    assert found.flatten(1).mean(1).tolist() == [0, 1, 1]


def test_natural_teacher_teaches_the_first_stage_where_no_picture_is_natural(sam):
    learner, _ = built(sam)
    assert learner.stage_name == "common"
    learner.teachers = {"natural": lambda b: torch.zeros(3, 16, 4, 4), "medical": lambda b: torch.ones(3, 16, 4, 4)}
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = learner.loss({"views": [images], "domain": torch.tensor([0, 1, 2])})["loss"]
    maps = learner.encoder.features(images, torch.full((3,), -1))
    torch.testing.assert_close(loss, maps.square().mean())


@pytest.mark.parametrize("queries", ["alone", "together"])
def test_modality_added_to_a_run_leaves_the_others_bit_for_bit(sam, tmp_path, queries):
    settings = small(sam, queries=queries, mask_mlps="own")
    before = DATA + "&without=curves"
    config = Experiment.resolve("esp-medsam", before, overrides=settings).config
    first = training.train("esp-medsam", config, data=before, out=tmp_path, name="first", say=lambda _: None)
    config = Experiment.resolve(
        "esp-medsam", DATA, overrides=settings | {"start": str(first.path), "only": "curves"}
    ).config
    then = training.train("esp-medsam", config, data=DATA, out=tmp_path, name="then", say=lambda _: None)
    one, two = first.metrics()[-1], then.metrics()[-1]
    old, new = first.load_weights(), then.load_weights()
    changed = {name for name in old if name in new and not torch.equal(old[name], new[name])}
    assert changed <= {"distilled"}
    assert any("of_curves" in name for name in new)
    if queries == "alone":
        for name in ("bright-discs", "dark-discs", "blobs"):
            assert two[f"test/dice_{name}"] == one[f"test/dice_{name}"]
        from counterpoint.experiment import load_learner

        images = torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            mine = load_learner(first.path).eval().segmented(images, torch.tensor([0, 1, 2]))[0]
            other = load_learner(then.path).eval().segmented(images, torch.tensor([0, 1, 3]))[0]
        names = list(load_learner(then.path).names)
        assert names.index("blobs") == 3
        assert torch.equal(mine, other)


def test_interrupted_in_any_stage_and_resumed_it_ends_the_same(sam, tmp_path, monkeypatch):
    config = Experiment.resolve("esp-medsam", DATA, overrides=small(sam)).config
    run = need_equal_ends(monkeypatch, module.EspMedSam, "esp-medsam", config, DATA, (1, 3, 11), tmp_path)
    assert "self-prompt" in (run.path / "report.html").read_text()


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def own_folder(root: Path) -> Path:
    """Write pictures of two kinds of imaging with masks, and natural pictures without."""
    rng = np.random.default_rng(0)
    for name in ("xray", "scan"):
        for n in range(8):
            write(root / "images" / name / f"{n}.png", rng.integers(0, 255, (16, 16, 3), np.uint8))
            write(root / "masks" / name / f"{n}.png", 255 * (rng.random((16, 16)) > 0.5).astype(np.uint8))
    for n in range(4):
        write(root / "images" / f"{n}.png", rng.integers(0, 255, (16, 16, 3), np.uint8))
    return root


@pytest.mark.usefixtures("drawn")
def test_own_folders_name_the_modalities_and_train_from_the_command_line(sam, tmp_path):
    source = f"masks:{own_folder(tmp_path / 'mine')}?domain=folder&size=16"
    found = data.load(source)
    assert found.domains == ("scan", "xray")
    assert (found.train.domains == -1).sum() == 4
    assert set(found.test.domains) <= {0, 1}
    words = ["train", "esp-medsam", "--data", source, "--out", str(tmp_path), "--name", "run"]
    for name, value in small(sam).items():
        words += ["--no-cached"] if name == "cached" else [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    run = Run.open(tmp_path / "run")
    again = training.evaluate(run.path, say=lambda _: None)
    assert again["modality_dice"] == run.metrics()[-1]["test/modality_dice"]
    assert again["modality_distil_mse"] == run.metrics()[-1]["test/modality_distil_mse"]
    with pytest.raises(CounterpointError, match="trained on scan, xray"):
        training.evaluate(run.path, data=source.replace("domain=folder&", ""), say=lambda _: None)


@pytest.mark.parametrize("domain", ["word", "folder"])
def test_domains_of_own_masks_that_are_not_there_are_refused(tmp_path, domain):
    for n in range(10):
        write(tmp_path / "images" / f"{n}.png", np.full((16, 16, 3), n, np.uint8))
        write(tmp_path / "masks" / f"{n}.png", np.eye(16, dtype=np.uint8))
    with pytest.raises(CounterpointError, match="domain"):
        data.load(f"masks:{tmp_path}?domain={domain}&size=16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "conv-s"}, "unknown encoder of esp-medsam"),
        ({"dim": 24}, "dim must be a multiple"),
        ({"decay": 0.0}, "decay"),
        ({"controller_epochs": -1}, "controller_epochs must be at least 0"),
        ({"only": "blobs"}, "--from RUN"),
        ({"only": "blobs", "start": "x", "joint": True}, "--joint"),
        ({"only": "word", "start": "x"}, "unknown modality"),
        ({"pretrained": True}, "start from a run"),
        ({"teacher": "word"}, "unknown teacher"),
    ],
)
def test_bad_settings_are_named(sam, settings, message):
    def resolve():
        learner, _ = built(sam, **settings)
        learner.config.check()

    with pytest.raises(CounterpointError, match=message):
        resolve()


def test_teacher_of_another_grid_or_width_is_refused_with_both_sizes(sam):
    learner, task = built(sam, encoder="prefix-s", dim=32)
    with pytest.raises(CounterpointError, match="maps of 16 channels, the student of 32"):
        fit(learner, task, bar=False)
    learner, task = built(sam)
    learner.encoder.grid = 2
    with pytest.raises(CounterpointError, match="map of 4 x 4 cells, the student one of 2 x 2"):
        fit(learner, task, bar=False)


def test_unknown_modality_and_missing_modality_are_refused(sam):
    learner, _ = built(sam)
    images = torch.zeros(1, 3, 16, 16)
    for number in (4, -2):
        with pytest.raises(ValueError, match=r"modality must lie in 0\.\.3"):
            learner.segmented(images, torch.tensor([number]))
    with pytest.raises(ValueError, match="has no query"):
        learner.segmented(images, torch.tensor([-1]))
    with pytest.raises(CounterpointError, match="needs the modality"):
        learner.predict({"image": images})


def test_data_without_kinds_of_imaging_or_with_several_classes_are_refused(sam):
    with pytest.raises(CounterpointError, match="named kinds of imaging"):
        built(sam, "shapes?train=16&test=4&size=16")
    learner, _ = built(sam)
    facts = SimpleNamespace(domains=("a",), regions=("ground", "a", "b"))
    with pytest.raises(CounterpointError, match="one class from the background"):
        module.EspMedSam(learner.config, facts)


def test_masks_without_a_kind_of_imaging_are_refused(sam):
    learner, task = built(sam)
    task.data.valid.domains[0] = -1
    with pytest.raises(DataError, match="valid has 1 picture with a mask"):
        fit(learner, task, bar=False)


# ---------------------------------------------------------------------------------------------------------------- source


def test_medical_shapes_have_their_rules_and_do_not_depend_on_a_domain_left_out():
    found = data.load("medical-shapes?train=8&test=4&natural=5&seed=1")
    pixels, masks, domains = found.train.images(np.arange(37)), found.train.masks(np.arange(37)), found.train.domains
    assert np.bincount(domains + 1).tolist() == [5, 8, 8, 8, 8]
    assert (masks[domains < 0] == IGNORE).all()

    def tone(domain, label):
        return pixels[domains == domain][masks[domains == domain] == label].mean()

    assert tone(0, 1) > tone(0, 0) + 40
    assert tone(1, 1) < tone(1, 0) - 40
    less = data.load("medical-shapes?train=8&test=4&natural=5&seed=1&without=curves")
    assert less.domains == ("bright-discs", "dark-discs", "blobs")
    assert np.array_equal(less.train.images(np.flatnonzero(less.train.domains == 2)), pixels[domains == 3])


@pytest.mark.parametrize("options", ["train=1", "test=1", "natural=-1", "seed=-1", "size=4", "without=word"])
def test_options_of_medical_shapes_out_of_range_are_refused(options):
    with pytest.raises(CounterpointError):
        data.load(f"medical-shapes?{options}")


def test_weights_of_modules_have_the_authors_names():
    encoder = PrefixWindows(16, "prefix-s", 16)
    encoder.add("a")
    names = set(tensors_of(encoder.blocks[0])) | set(tensors_of(encoder.controllers["a"][0]))
    assert names == set(of("student_block", "weight"))
    decoder = set(tensors_of(query_decoder.QueryDecoder(16, 2, 24)))
    mlp = {f"output_hypernetworks_mlps.0.{name}" for name in tensors_of(query_decoder.MaskMLP(16))}
    assert decoder | mlp == set(of("query_decoupled_decoder", "weight"))
    assert PrefixWindows(1024, "prefix-tiny", 256).grid == 64
