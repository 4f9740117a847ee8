"""Converters of meta-responses: every file is whole, every failure has a name, and nothing that a model writes is executed."""

from __future__ import annotations

import ast
import builtins
import io
import os
import subprocess
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterpoint.encoders.meta_responses import render
from counterpoint.errors import CounterpointError
from counterpoint.use import converters
from counterpoint.use.ask import produce
from counterpoint.use.converters import Made, Zoo, dispatch, drawn, plotted, spoken, zoo
from pretend_gpu import pretend_gpu


def test_a_picture_is_drawn_in_the_colour_and_shape_of_the_prompt(tmp_path):
    [made] = dispatch(render("[IMAGE]", "a red circle"), zoo(), tmp_path / "out")
    assert made == Made("[IMAGE]", "a red circle", "made", tmp_path / "out" / "1-image.png")
    pixels = np.asarray(Image.open(made.file))
    assert tuple(pixels[64, 64]) == (200, 45, 40)
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert not np.array_equal(drawn("a red circle"), drawn("a red square"))


def test_a_sound_is_spoken(tmp_path):
    [made] = dispatch(render("[AUDIO]", "rain on a roof"), zoo(), tmp_path)
    assert made.file == tmp_path / "1-audio.wav"
    with wave.open(str(made.file)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert len(samples) > 0.3 * 22050
    assert np.abs(samples.astype(int)).max() > 1000
    assert spoken("rain on a roof") != spoken("a barking dog")


def test_a_film_has_frames_and_a_plot_has_the_numbers_of_the_prompt(tmp_path):
    [made] = dispatch(render("[VIDEO]", "a blue square that moves"), zoo(), tmp_path)
    assert Image.open(made.file).n_frames == converters.FRAMES
    [made] = dispatch(render("[PLOT]", "bars 3 5 -2.5 of $x^{"), zoo(), tmp_path)
    assert Image.open(made.file).size[0] > 100
    one, other = plotted("3 5 2"), plotted("3 5 4")
    assert one != other


def test_several_flags_call_every_converter_with_the_same_prompt(tmp_path):
    found = dispatch("Modality: [IMAGE] [VIDEO] Prompt: a green triangle", zoo(), tmp_path)
    assert [(one.modality, one.status) for one in found] == [("[IMAGE]", "made"), ("[VIDEO]", "made")]
    assert {path.name for path in tmp_path.iterdir()} == {"1-image.png", "2-video.gif"}


@pytest.mark.parametrize(
    ("reply", "status", "said"),
    [
        ("Modality: [TEXT] Prompt: hello", "answered", ""),
        ("just words", "answered", ""),
        ("[IMAGE] a cat", "refused", "no meta-response"),
        ("Modality: [IMAGE] Prompt: ", "refused", "with a prompt"),
        ("Modality: [SMELL] Prompt: a rose", "refused", "known flags"),
        (render("[IMAGE]", "a red ruby"), "failed", "lacks shape or colour"),
        (render("[PLOT]", "no number"), "failed", "a plot needs 1 to 64 numbers"),
        (render("[PLOT]", "1e999 2"), "failed", "too large to plot"),
        (render("[PLOT]", "1 " * 65), "failed", "has 65"),
        (render("[AUDIO]", "..."), "failed", "no word"),
    ],
)
def test_calls_that_are_wrong_or_fail_are_named_and_write_nothing(tmp_path, reply, status, said):
    [made] = dispatch(reply, zoo(), tmp_path / "out")
    assert made.status == status
    assert said in made.reason
    assert made.file is None
    assert not (tmp_path / "out").exists()


def test_a_missing_converter_is_named_and_so_is_one_of_a_flag_that_only_the_model_has(tmp_path, monkeypatch):
    [made] = dispatch(render("[SMELL]", "a rose"), zoo(), tmp_path, ["[TEXT]", "[SMELL]"])
    assert (made.status, made.prompt) == ("missing", "a rose")
    assert "has no converter; those known are" in made.reason
    monkeypatch.setattr(converters.importlib.util, "find_spec", lambda name: None)
    [made] = dispatch(render("[AUDIO]", "a rose"), zoo(), tmp_path)
    assert made.status == "missing"
    assert "counterpoint[speech]" in made.reason
    assert not list(tmp_path.iterdir())


def test_a_converter_that_breaks_leaves_the_others_and_no_file(tmp_path):
    def broken(prompt: str) -> bytes:
        raise RuntimeError("out of memory\nmore")

    kept = Zoo({"[IMAGE]": broken, "[AUDIO]": lambda prompt: b"sound"}, {"[AUDIO]": ".wav"})
    found = dispatch("Modality: [IMAGE] [AUDIO] Prompt: x", kept, tmp_path)
    assert [(one.status, one.reason) for one in found] == [("failed", "out of memory"), ("made", "")]
    assert [path.name for path in tmp_path.iterdir()] == ["2-audio.wav"]


HOSTILE = (
    "__import__('os').system('touch BAD')",
    "$(touch BAD) `touch BAD` ; touch BAD 1",
    "../../BAD 1 red circle",
    "red circle <script>alert(1)</script> {{ 7*7 }} 3",
)


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.parametrize("flag", ["[TEXT]", "[IMAGE]", "[AUDIO]", "[VIDEO]", "[PLOT]"])
def test_nothing_that_a_model_writes_is_executed(tmp_path, monkeypatch, flag, prompt):
    monkeypatch.chdir(tmp_path)

    def forbidden(code: object, *_: object, **__: object) -> None:
        assert prompt not in str(code)
        raise AssertionError("a converter executes")

    started: list[object] = []
    real = subprocess.Popen.__init__

    def watched(self: Any, words: Any, *args: Any, **more: Any) -> None:
        started.append(words)
        assert not more.get("shell")
        real(self, words, *args, **more)

    dispatch(render("[PLOT]", "1"), zoo(), "warm")  # libraries are imported before
    monkeypatch.setattr(builtins, "eval", forbidden)
    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", watched)
    made = dispatch(render(flag, prompt), zoo(), "out")
    assert len(made) == 1
    assert not any(prompt in str(words) for words in started)
    assert not [path for path in tmp_path.rglob("*") if "BAD" in path.name]
    names = {"1-image.png", "1-audio.wav", "1-video.gif", "1-plot.png"}
    assert {path.name for path in (tmp_path / "out").glob("*")} <= names


def test_the_modules_of_replies_call_no_interpreter():
    package = Path(converters.__file__).parents[1]
    for name in ("use/converters.py", "use/ask.py", "encoders/meta_responses.py", "encoders/flags.py"):
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), name
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {"os", "subprocess", "pickle", "shutil"} & {alias.name for alias in node.names}, name


def test_a_pipeline_of_diffusers_built_here_paints(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = Tokenizer(models.WordLevel(unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.train_from_iterator(
        ["a red blue circle square"], trainers.WordLevelTrainer(special_tokens=["?", "<s>", "</s>"])
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="?", bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=8
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 8),
            layers_per_block=1,
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    name = f"hf:{tmp_path / 'pipeline'}"
    one, again = (dispatch(render("[IMAGE]", "a red circle"), zoo(name, steps=2, seed=3), tmp_path / n) for n in "ab")
    assert one[0].status == "made", one[0].reason
    assert one[0].file.read_bytes() == again[0].file.read_bytes()
    other = dispatch(render("[IMAGE]", "a blue square"), zoo(name, steps=2, seed=3), tmp_path / "c")
    assert other[0].file.read_bytes() != one[0].file.read_bytes()
    assert np.asarray(Image.open(io.BytesIO(one[0].file.read_bytes()))).shape == (16, 16, 3)
    [made] = dispatch(render("[IMAGE]", "x"), zoo(f"hf:{tmp_path / 'nowhere'}"), tmp_path / "d")
    assert made.status == "failed"
    assert made.reason
    with pretend_gpu(monkeypatch):
        found = zoo(name, steps=2, seed=3, device="cuda")
        [made] = dispatch(render("[IMAGE]", "a red circle"), found, tmp_path / "e")
    assert made.status == "made", made.reason
    here, there = (np.asarray(Image.open(file), int) for file in (one[0].file, made.file))
    assert np.abs(here - there).max() <= 1


def test_a_finished_run_of_generation_paints(tmp_path):
    from counterpoint import training
    from counterpoint.experiment import Experiment

    data = "digit-scenes?train=24&test=8"
    small = {"embedding": 8, "width": 8, "noise": 4, "batch_size": 12, "pretrain_batch_size": 12, "epochs": 1}
    config = Experiment.resolve("supcon-t2i", data, overrides=small).config
    run = training.train("supcon-t2i", config, data=data, out=tmp_path, say=lambda _: None)
    [made] = dispatch(render("[IMAGE]", "a small red seven"), zoo(f"run:{run.path}"), tmp_path / "out")
    assert made.status == "made", made.reason
    assert Image.open(made.file).size[0] >= 16
    [made] = dispatch(render("[IMAGE]", "x"), zoo(f"run:{tmp_path / 'nowhere'}"), tmp_path / "other")
    assert made.status == "failed"
    assert "no such run" in made.reason
    with pytest.raises(CounterpointError, match="names no modalities, which --out needs"):
        produce(str(run.path), "x", tmp_path / "third")


def test_unknown_converters_and_other_models_are_refused(tmp_path):
    with pytest.raises(CounterpointError, match="unknown converter of pictures"):
        zoo("painted")
    with pytest.raises(CounterpointError, match="has 0 CUDA devices; use --device cpu"):
        zoo(device="cuda")
    with pytest.raises(CounterpointError, match="names no modalities"):
        produce("hf:somewhere", "x", tmp_path)
