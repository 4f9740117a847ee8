"""Runs in the layout of a hub: saved to a folder, loaded from it, uploaded and downloaded by huggingface_hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import counterpoint as cp
from counterpoint import cli
from counterpoint.data.media import write_video
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, RunError
from counterpoint.use import hub, model_cards

PICTURES = np.random.default_rng(0).integers(0, 256, (48, 12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hub")
    for n, picture in enumerate(PICTURES):
        place = folder / "secret" / "photos" / f"kind{n % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{n}.png")
    data = f"imagefolder:{folder / 'secret' / 'photos'}?size=12"
    small = {"epochs": 1, "batch_size": 16, "encoder": "conv-s", "quiet": True}
    yield cp.train("simclr", data=data, out=folder / "runs", name="one", **small)
    torch.set_num_threads(threads)


def test_a_saved_folder_has_the_hub_s_files_and_no_place_of_this_disk(run, tmp_path):
    run.save_pretrained(tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == sorted(hub.FILES)
    for name in ("config.json", "README.md"):
        text = (tmp_path / "model" / name).read_text(encoding="utf-8")
        assert "secret" not in text
        assert "imagefolder:photos" in text
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["library_name"] == "counterpoint"
    assert content["run"]["slug"] == "simclr"


def test_the_model_card_has_claim_data_and_figures(run):
    card = str(run.generate_model_card())
    assert card.startswith("---\nlibrary_name: counterpoint\n")
    assert f"| knn_accuracy | {run.metrics['knn_accuracy']:.4f} | {run.metrics.chance['knn_accuracy']:.4f} |" in card
    assert "arXiv 2002.05709" in card
    from types import SimpleNamespace

    claimed = SimpleNamespace(
        slug="symile", config={"data": "xor"}, metrics=lambda required: [], chance=dict, environment=dict
    )
    made = model_cards.card(claimed)
    assert "The paper's claim, as Counterpoint tests it: Where a modality" in made
    assert "own record of this claim, on the claim's data: holds." in made
    assert "None are recorded." in made


@pytest.mark.parametrize(
    ("slug", "line"),
    [
        ("simclr", "z = run.encode(images=['picture.png'])"),
        ("vidlankd", "z = run.encode(texts=['...'])"),
        ("mclrec", "z = run.encode(inputs={'item': ['NAME']})"),
        ("ritual", "learner = run.learner"),
    ],
)
def test_the_card_shows_a_use_that_the_run_has(slug, line, tmp_path):
    assert line in model_cards.card(Run(tmp_path, {"slug": slug, "data": "x", "seed": 0}))


def test_the_card_has_licence_settings_versions_and_intervals_over_seeds(run, tmp_path):
    card = str(run.generate_model_card())
    assert "Licence: yours." in card
    assert "| encoder | conv-s |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    assert "One run with one seed: the figures have no interval." in card
    for seed in (0, 1, 2):  # copies of the run, with other seeds and figures
        shutil.copytree(run.path, tmp_path / f"seed{seed}")
        config = (tmp_path / f"seed{seed}" / "config.yaml").read_text(encoding="utf-8")
        assert "\nseed: 0\n" in config
        (tmp_path / f"seed{seed}" / "config.yaml").write_text(config.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
        other = cp.load(tmp_path / f"seed{seed}").run
        other.write_metrics([{**row, "test/knn_accuracy": 0.5 + 0.1 * seed} for row in other.metrics()])
    one = cp.load(tmp_path / "seed0")
    assert "| 0.6000 (0.3516 to 0.8484) |" in str(one.generate_model_card())  # 0.6 +- 4.3027 * 0.1 / sqrt(3)
    one.save_pretrained(tmp_path / "model")
    assert "(0.3516 to 0.8484)" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "over 3 runs" in str(cp.load(tmp_path / "model").generate_model_card())


def test_a_saved_folder_is_loaded_and_encodes_the_same(run, tmp_path):
    run.save_pretrained(tmp_path / "model")
    wanted = run.encode(images=PICTURES[:5])
    for again in (cp.load(tmp_path / "model"), cp.Trained.from_pretrained(tmp_path / "model")):
        np.testing.assert_array_equal(again.encode(images=PICTURES[:5]), wanted)
        assert again.metrics == run.metrics
        assert again.metrics.chance == run.metrics.chance
    again.save_pretrained(tmp_path / "twice")
    for name in hub.FILES:
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_loaded_folder_is_measured_on_the_data_that_is_given(run, tmp_path):
    run.save_pretrained(tmp_path / "model")
    again = cp.load(tmp_path / "model")
    found = again.evaluate(data=(PICTURES, np.arange(48) % 2))
    assert set(found) == set(run.metrics)


def test_push_to_hub_uploads_a_folder_in_the_layout(run, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    sent = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            from types import SimpleNamespace

            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **options):
            sent["repo"] = repo_id
            sent["files"] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            return "address of the commit"

    monkeypatch.setattr(mixin, "HfApi", Api)
    assert run.push_to_hub("user/name") == "address of the commit"
    assert sent["repo"] == "user/name"
    assert set(sent["files"]) == set(hub.FILES)
    assert sent["files"]["model.safetensors"] == (run.path / "model.safetensors").read_bytes()


def test_a_model_of_the_hub_is_downloaded_into_the_cache_and_loaded(run, tmp_path, monkeypatch):
    """The cache of the library holds links to files elsewhere."""
    import huggingface_hub

    run.save_pretrained(tmp_path / "blobs")
    asked = []

    def snapshot_download(model, *, allow_patterns, revision, **options):
        asked.append((model, revision, tuple(allow_patterns)))
        place = tmp_path / "snapshot"
        place.mkdir(exist_ok=True)
        for name in allow_patterns:
            if not (place / name).exists():
                os.symlink(tmp_path / "blobs" / name, place / name)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda **given: str(tmp_path / "blobs" / "config.json")
    )
    again = cp.load("hf:user/name", revision="v1")
    assert asked == [("user/name", "v1", hub.FILES)]
    np.testing.assert_array_equal(again.encode(images=PICTURES[:3]), run.encode(images=PICTURES[:3]))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*words, **options):
        raise LookupError("no connection to the hub")  # not an OSError: the HTTP client has its own kinds

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RunError, match="hf:user/name cannot be downloaded: no connection"):
        hub.downloaded("user/name")


@pytest.mark.parametrize("name", ["", "user", "./gone", "/gone/run", "a/b/c"])
def test_a_name_that_is_no_model_and_no_folder_is_refused_without_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "downloaded", None)
    with pytest.raises(RunError, match=f"hf:{name} is no folder, and no model of a hub; write hf:USER/NAME"):
        cp.load(f"hf:{name}")


def test_a_folder_of_this_machine_is_loaded_by_the_hub_s_prefix(run, tmp_path):
    run.save_pretrained(tmp_path / "model")
    for place in (tmp_path / "model", run.path):
        again = cp.load(f"hf:{place}")
        np.testing.assert_array_equal(again.encode(images=PICTURES[:2]), run.encode(images=PICTURES[:2]))
    with pytest.raises(CounterpointError, match="is in the layout of a hub and is not written to; name a file"):
        cp.load(f"hf:{tmp_path / 'model'}").export(to="torch")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"library_name": "other"}'),
            "the library_name in its config.json is 'other'",
        ),
        (lambda folder: (folder / "config.json").write_text('{"library_name": "counterpoint"}'), "names no system"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "model.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(run, tmp_path, spoil, said):
    run.save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(RunError, match=said):
        _ = cp.load(tmp_path / "model").learner


def test_a_run_without_weights_is_not_published(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="is not finished"):
        hub.write(hub.Run.open(tmp_path / "run"), tmp_path / "model", {})


def test_the_command_line_exports_a_published_folder(run, tmp_path, capsys):
    run.save_pretrained(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "encoder.pt2")]) == 0
    assert "image: " in capsys.readouterr().out
    assert (tmp_path / "encoder.pt2").is_file()


def test_a_calibrated_detector_keeps_its_calibration_and_detects_from_the_command_line(run_of_clips, tmp_path, capsys):
    kept = cp.load(shutil.copytree(run_of_clips, tmp_path / "kept"))
    facts = {
        "data": "videos:/home/me/mine",
        "said": "platt, on 9 videos of videos:/home/me/mine; threshold 0.3 for a recall of 0.9",
    }
    fields = {
        "method": "platt",
        "x": [1.0, 0.0],
        "y": [],
        "threshold": 0.3,
        "weights": kept.run.digest(),
        "facts": facts,
    }
    kept.run.save_calibration(fields)
    folder = tmp_path / "published"
    kept.save_pretrained(folder)
    assert "/home/me" not in (folder / "config.json").read_text()
    video = tmp_path / "a.mp4"
    write_video(video, (np.full((48, 64, 3), 9 * n, np.uint8) for n in range(24)), None)
    assert cli.main(["detect", str(video), "--run", str(folder), "--html", str(tmp_path / "a.html")]) == 0
    assert "Calibrated: platt, on 9 videos of videos:mine; threshold 0.3 for a recall of 0.9" in capsys.readouterr().out
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    for command in (["evaluate", str(folder)], ["predict", str(folder), str(tmp_path / "a.png")]):
        assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "it has a config.json, as save_pretrained writes it" in said
    assert "finds moments in videos and has no embeddings: counterpoint detect" in said
