"""Networks that enlarge pictures: shapes, published names of weights, models of transformers, files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from counterpoint.encoders.restoration import EDSR, build_restoration, check_restoration, layout, load_restoration
from counterpoint.errors import CounterpointError, RunError


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_of_any_size_are_enlarged_by_the_scale(scale: int) -> None:
    assert build_restoration("edsr-s", scale)(torch.rand(2, 3, 5, 8)).shape == (2, 3, 5 * scale, 8 * scale)


def test_edsr_has_the_published_size_and_names() -> None:
    network = build_restoration("edsr", 2)
    assert sum(p.numel() for p in network.parameters()) == 1_369_859  # 1.37 M, as the authors report
    names = {
        "head.0.weight",
        "body.0.body.0.weight",
        "body.15.body.2.bias",
        "body.16.weight",
        "tail.0.0.weight",
        "tail.1.bias",
    }
    assert names <= set(network.state_dict())


def test_weights_of_the_authors_layout_are_loaded_from_either_kind_of_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, x = EDSR(2, 4, 24, over_bicubic=True), torch.rand(1, 3, 6, 6)
    weights = source.state_dict()
    torch.save(
        {"params": weights | {"sub_mean.weight": torch.eye(3), "add_mean.bias": torch.zeros(3)}}, tmp_path / "a.pt"
    )
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        network = build_restoration("edsr-s", 2)
        load_restoration(network, tmp_path / name)
        assert torch.equal(network(x), source(x))


def test_an_architecture_of_spandrel_is_built_by_its_name() -> None:
    network = build_restoration("spandrel:SPAN", 2).eval()
    x = torch.rand(2, 3, 9, 7)
    with torch.no_grad():
        assert network(x).shape == (2, 3, 18, 14)
    network(x).sum().backward()
    assert all(p.requires_grad for p in network.parameters())


def test_a_file_of_spandrel_s_brings_its_architecture_and_weights(tmp_path: Path) -> None:
    from spandrel.architectures.RCAN import RCAN
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    rcan = RCAN(scale=2, n_resgroups=1, n_resblocks=2, n_feats=8, reduction=4).eval()
    torch.save(rcan.state_dict(), tmp_path / "rcan.pth")
    x = torch.rand(2, 3, 7, 10)
    network = build_restoration(f"spandrel:{tmp_path / 'rcan.pth'}", 2).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x), rcan(x))
    with pytest.raises(CounterpointError, match="enlarges 2 times; set --scale 2"):
        build_restoration(f"spandrel:{tmp_path / 'rcan.pth'}", 4)
    # A run has the layout of its network, by which it is opened when the file is gone.
    shapes = json.loads(json.dumps(layout(network)))
    again = build_restoration(f"spandrel:{tmp_path / 'gone.pth'}", 2, shapes=shapes).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
    # A network of windows takes pictures of any size, as the library's own call.
    window = SwinIR(
        img_size=16, depths=(2,), embed_dim=12, num_heads=(2,), window_size=8, upscale=2, upsampler="pixelshuffledirect"
    ).eval()
    torch.save(window.state_dict(), tmp_path / "window.pth")
    network = build_restoration(f"spandrel:{tmp_path / 'window.pth'}", 2).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 18, 21)).shape == (1, 3, 36, 42)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [("ESRGAN", 2), ("MMRealSR", 4)])
def test_other_upsamplers_and_outputs_of_spandrel_are_taken(name: str, scale: int) -> None:
    network = build_restoration(f"spandrel:{name}", scale).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 9, 14)).shape == (1, 3, 9 * scale, 14 * scale)


def test_names_and_files_that_spandrel_does_not_know_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name, words in (
        ("RCAM", "did you mean.*RCAN"),
        ("", "spandrel: names no network; write spandrel:NAME"),
        ("picture.png", "a file of weights ends in .pth"),
        ("none.pth", "no such file"),
        (tmp_path / "text.pth", "cannot be read"),
        (tmp_path / "other.pth", "cannot be read"),
        ("DnCNN", "no setting for how much it enlarges"),
        ("MMRealSR", "cannot be built for scale 2"),  # it can, and cannot run
    ):
        with pytest.raises(CounterpointError, match=words):
            build_restoration(f"spandrel:{name}", 2)
    with pytest.raises(CounterpointError, match="no pretrained weights"):
        build_restoration("spandrel:SPAN", 2, pretrained=True)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save(EDSR(2, 4, 16).state_dict(), tmp_path / "narrow.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, words in (("none.pt", "no such file"), ("text.pt", "cannot be read"), ("narrow.pt", "do not fit")):
        with pytest.raises(RunError, match=f"{name}.*{words}"):
            load_restoration(build_restoration("edsr-s", 2), tmp_path / name)


def test_a_model_of_transformers_is_built_loaded_and_checked_for_its_scale(tmp_path: Path) -> None:
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    config = Swin2SRConfig(
        image_size=8, embed_dim=8, depths=[1], num_heads=[2], window_size=4, upscale=2, upsampler="pixelshuffledirect"
    )
    torch.manual_seed(0)
    model = Swin2SRForImageSuperResolution(config).eval()
    model.save_pretrained(tmp_path / "swin")
    network = build_restoration(f"hf:{tmp_path / 'swin'}", 2, pretrained=True).eval()
    x = torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        found = network(x)
        assert torch.equal(found, model(pixel_values=x).reconstruction)
        cut = network(x[..., :7, :10])  # no whole windows
        whole = F.pad(x[..., :7, :10], (0, 2, 0, 1), mode="reflect")
        assert torch.equal(cut, model(pixel_values=whole).reconstruction[..., :14, :20])
        assert network(x[..., :1, :1]).shape == (2, 3, 2, 2)
        other = build_restoration(f"hf:{tmp_path / 'swin'}", 2).eval()
        assert not torch.equal(found, other(x))
        torch.save(model.state_dict(), tmp_path / "swin.pt")
        load_restoration(other, tmp_path / "swin.pt")
        assert torch.equal(found, other(x))
    with pytest.raises(CounterpointError, match="enlarges 2 times; set --scale 2"):
        build_restoration(f"hf:{tmp_path / 'swin'}", 4)
    with pytest.raises(CounterpointError, match="could not be built"):
        build_restoration(f"hf:{tmp_path / 'missing'}", 2)


def test_unknown_names_and_scales_are_refused() -> None:
    for name, words in (
        ("edsrs", "did you mean edsr"),
        ("timm:resnet18", "library of restoration"),
        ("hf:", "names no network; write hf:NAME"),
    ):
        with pytest.raises(CounterpointError, match=words):
            check_restoration(name)
    with pytest.raises(CounterpointError, match="scale must be 2, 3 or 4"):
        build_restoration("edsr-s", 8)
    with pytest.raises(CounterpointError, match="no pretrained weights of edsr"):
        build_restoration("edsr", 2, pretrained=True)
