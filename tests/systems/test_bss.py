"""BSS against FDA's numbers, its identities and edges; the grid of views; the hosts it goes over, and those it does not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import over_processes
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from counterpoint import catalog, cli, data, training
from counterpoint import functional as fn
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.images import bss as room
from counterpoint.systems.images.bss import BSSConfig, StyledViews, column_infonce, half_window, transfer_style
from counterpoint.views.images import Recipe, ViewPipeline

NUMBERS = np.load(Path(__file__).parents[1] / "parity" / "bss.npz")
DATA = "digit-styles?size=8&train=60&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {"encoder": "conv-group", "recipe": "digit-styles", "batch_size": 20, "epochs": 1,
                         "evaluate_every": 1, "hidden": 16, "projection": 8}  # fmt: skip
CROPS = SMALL | {"recipe": "dino-cifar", "local_crops": 1, "local_size": 8, "prototypes": 6}


def pictures(n: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the style transfer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-13), (torch.float32, 1e-5, 5e-7)])
def test_transfer_equals_fda_with_one_donor_and_with_one_each(
    case: int, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    at = {k.split("/", 1)[1]: NUMBERS[k] for k in NUMBERS.files if k.startswith(f"case{case}/")}
    images, window = torch.tensor(at["in/images"], dtype=dtype), int(at["param/half_window"])
    for donors, wanted in (
        (int(at["in/donor"]), at["out/standardized"]),
        (torch.from_numpy(at["in/donor"]), at["out/standardized"]),
        (torch.from_numpy(at["in/donors"]), at["out/augmented"]),
    ):
        np.testing.assert_allclose(transfer_style(images, donors, window).numpy(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 11), (7, 6)])
def test_gradient_equals_that_of_the_whole_transform(size: tuple[int, int]) -> None:
    images, weight = pictures(4, *size).requires_grad_(), pictures(4, *size, seed=1)
    spectrum = torch.fft.fft2(images)
    fy, fx = (torch.fft.fftfreq(n, 1 / n).abs().round() for n in size)
    inside = torch.maximum(fy[:, None], fx) <= 2
    amplitude = torch.where(inside, spectrum.abs()[2], spectrum.abs())
    plain = torch.fft.ifft2(torch.polar(amplitude, spectrum.angle()))
    assert float(plain.imag.detach().abs().max()) < 1e-12  # an odd window is symmetric
    ours = transfer_style(images, 2, 2)
    torch.testing.assert_close(ours, plain.real, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), images, retain_graph=True),
        torch.autograd.grad((plain.real * weight).sum(), images),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 11)])
def test_identities_of_the_transfer(size: tuple[int, int]) -> None:
    images = pictures(5, *size)
    for window in (0, 1, 3):
        found = transfer_style(images, 3, window)
        torch.testing.assert_close(found[3], images[3], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.mean((2, 3)), images[3].mean((1, 2)).expand(5, 3), rtol=0, atol=1e-12)
        assert float((found[0] - images[0]).abs().max()) > 1e-3
    assert torch.equal(transfer_style(images, 3, -1), images)
    whole = torch.fft.fft2(transfer_style(images, 3, 100))
    torch.testing.assert_close(whole.abs(), torch.fft.fft2(images).abs()[3].expand_as(whole), rtol=0, atol=1e-10)
    torch.testing.assert_close(transfer_style(images[:1], 0, 2), images[:1], rtol=0, atol=1e-12)


def test_each_image_may_have_its_own_donor_and_window() -> None:
    images, donors, windows = pictures(3, 8, 8), torch.tensor([1, 2, 0]), torch.tensor([2, -1, 0])
    found = transfer_style(images, donors, windows)
    for row in range(3):
        one = transfer_style(images, int(donors[row]), int(windows[row]))[row]
        torch.testing.assert_close(found[row], one, rtol=0, atol=1e-12)


def test_a_black_donor_takes_the_mean_and_a_black_image_gets_it() -> None:
    images = torch.stack([torch.zeros(3, 8, 8, dtype=torch.float64), pictures(1, 8, 8)[0]]).requires_grad_()
    dark = transfer_style(images, 0, 1)
    torch.testing.assert_close(dark.mean((2, 3)), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    light = transfer_style(images, 1, 1)
    light.square().sum().backward()  # PyTorch 2.8 has no FFT of an expanded gradient
    assert bool(light.isfinite().all())
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())


def test_half_window_rounds_the_side_to_an_odd_number() -> None:
    assert [half_window(r, 16, 16) for r in (0.0, 1e-9, 0.0157, 0.03, 0.25, 1.0)] == [-1, 0, 1, 1, 4, 8]
    assert half_window(0.05, 10, 40) == round((math.sqrt(20) - 1) / 2)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: transfer_style(torch.zeros(2, 3, 4, dtype=torch.float64), 0, 1), "images"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0, 1), "images"),
        (lambda: transfer_style(torch.zeros(0, 3, 4, 4), 0, 1), "images"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), 2, 1), "donors"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), -1, 1), "donors"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), torch.zeros(3).long(), 1), "donors"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), torch.zeros(2), 1), "donors"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), 0, -2), "half_window"),
        (lambda: transfer_style(torch.zeros(2, 3, 4, 4), 0, 1, amplitudes=torch.ones(2, 3, 4, 1)), "amplitudes"),
        (lambda: half_window(1.5, 8, 8), "ratio"),
        (lambda: half_window(math.nan, 8, 8), "ratio"),
        (lambda: half_window(0.5, 0, 8), "height"),
        (lambda: column_infonce(torch.ones(3, 1, 2)), "two views"),
        (lambda: column_infonce(torch.ones(0, 2, 2)), "z must"),
        (lambda: column_infonce(torch.ones(3, 2)), "z must"),
        (lambda: column_infonce(torch.ones(3, 2, 2), 0.0), "temperature"),
    ],
)
def test_a_bad_argument_is_named(call: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


# --- the loss by column -----------------------------------------------------------------------------------------------


def plain_loss(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Write out the card's formula, term by term."""
    z = F.normalize(z, dim=2)
    n, views, _ = z.shape
    terms = []
    for i in range(n):
        for v in range(views):
            others = sum((z[i, v] @ z[j, v] / temperature).exp() for j in range(n) if j != i)
            for u in range(views):
                if u != v:
                    own = (z[i, v] @ z[i, u] / temperature).exp()
                    terms.append(-(own / (own + others)).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("views", [2, 3])
def test_loss_and_gradient_equal_the_formula(views: int) -> None:
    z = torch.randn(5, views, 4, generator=torch.Generator().manual_seed(views), dtype=torch.float64).requires_grad_()
    found, wanted = column_infonce(z, 0.3), plain_loss(z, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(loss, z) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_identities_of_the_loss() -> None:
    grid = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 2, 4)
    assert float(column_infonce(grid)) == pytest.approx(0.3407529539, abs=1e-10)
    assert float(column_infonce(torch.ones(7, 2, 3, dtype=torch.float64))) == pytest.approx(math.log(7), abs=1e-12)
    one = torch.randn(1, 2, 3, dtype=torch.float64).requires_grad_()
    loss = column_infonce(one)
    loss.backward()
    assert float(loss.detach()) == 0
    assert one.grad is not None
    assert not one.grad.any()
    z = torch.randn(6, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(column_infonce(z), column_infonce(z.flip(1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(column_infonce(z), column_infonce(z[torch.randperm(6)]), rtol=0, atol=1e-12)


# --- the views --------------------------------------------------------------------------------------------------------


def views(config: BSSConfig, recipe: Recipe | None = None, size: int = 8) -> StyledViews:
    recipe = recipe or Recipe(scale=None, shift=1 / 8, jitter=0.8, grey=0.3, solarise=0.3, gain=0.2)
    return StyledViews(ViewPipeline(size, recipe=recipe), config)


def test_a_view_has_one_donor_and_one_window_and_each_view_its_own() -> None:
    drawn = views(BSSConfig(r_min=0.0, r_max=1.0)).draw((50, 3, 8, 8), torch.Generator().manual_seed(0))
    for one in drawn:
        assert len(one.donors.unique()) == len(one.half_window.unique()) == 1
        for name in ("jitter", "grey", "sigma", "solarise", "gain"):
            assert len(getattr(one.view, name).unique(dim=0)) == 1, name
        assert len(one.view.boxes.unique(dim=0)) > 1
    g = torch.Generator().manual_seed(0)
    several = [views(BSSConfig(r_min=0.0, r_max=1.0), size=32).draw((50, 3, 32, 32), g) for _ in range(20)]
    for name in ("donors", "half_window"):
        assert sum(bool(getattr(a, name)[0] != getattr(b, name)[0]) for a, b in several) > 12


def test_fa_draws_a_donor_a_window_and_colours_for_each_image() -> None:
    config = BSSConfig("image", shared_colours=False, r_min=0.0, r_max=1.0)
    one, _ = views(config).draw((50, 3, 8, 8), torch.Generator().manual_seed(0))
    assert min(len(x.unique(dim=0)) for x in (one.donors, one.half_window, one.view.jitter)) > 3


def test_style_comes_after_the_crop_and_before_the_colours() -> None:
    images = (pictures(6, 8, 8) * 255).byte()
    styled = views(BSSConfig(r_min=0.1, r_max=0.1))
    one, _ = drawn = styled.draw(images.shape, torch.Generator().manual_seed(3))
    moved = styled.pipeline.moved(images.float() / 255, one.view)
    wanted = styled.pipeline.coloured(transfer_style(moved, int(one.donors[0]), 1), one.view)
    torch.testing.assert_close(styled.apply(images, drawn)[0], wanted)
    # Before the colours, all images of a view have the donor's means.
    plain = views(BSSConfig(r_min=0.1, r_max=0.1), Recipe(scale=None, flip=0.0))
    for view in plain.apply(images, plain.draw(images.shape, torch.Generator())):
        torch.testing.assert_close(view.mean((2, 3)), view.mean((2, 3))[:1].expand(6, 3), rtol=1e-4, atol=1e-4)


def test_no_transfer_leaves_the_views_of_the_host() -> None:
    images = (pictures(6, 8, 8) * 255).byte()
    styled = views(BSSConfig("none", shared_colours=False))
    found = styled.apply(images, styled.draw(images.shape, torch.Generator().manual_seed(1)))
    drawn = [one.view for one in styled.draw(images.shape, torch.Generator().manual_seed(1))]
    for ours, theirs in zip(found, styled.pipeline.apply(images, drawn), strict=True):
        torch.testing.assert_close(ours, theirs)


def of_columns() -> dict[str, Any]:
    return {
        "column_infonce": (2, lambda a, b: column_infonce(torch.stack([a, b], 1), 0.3)),
        "msn": (2, of_msn),
        "views": (1, styled_share),
    }


def of_msn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    prototypes = torch.randn(5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return fn.msn(torch.stack([a, a + b]), b, prototypes, iterations=2, by_view=True).loss


def draw(many: int, rows: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 4, generator=g, dtype=torch.float64) for _ in range(many)]


def styled_share(rows: torch.Tensor) -> torch.Tensor:
    """Sum the views of this process's images with weights; items go to the processes in turn."""
    from counterpoint.core.distributed import gather_rows, world

    rank, size = world()
    images = pictures(6, 8, 8)
    styled = views(BSSConfig("image", r_min=0.0, r_max=0.3))
    drawn = [one.take(slice(rank, None, size)) for one in styled.draw(images.shape, torch.Generator().manual_seed(2))]
    found = torch.stack(styled.apply(images[rank::size], drawn), 1)
    weight = torch.arange(1.0, found.numel() // len(found) + 1).double().cos().view(found.shape[1:])
    each = (found * weight).sum((1, 2, 3, 4)) * (torch.arange(6)[rank::size] + 1)
    return gather_rows(each).sum() + 0 * gather_rows(rows).sum()


def test_processes_together_have_the_loss_of_one_and_donors_from_the_whole_batch(tmp_path: Path) -> None:
    over_processes.check(of_columns, draw, [3, 3], tmp_path)


# --- the addition -----------------------------------------------------------------------------------------------------


def test_the_functions_that_pass_are_the_functions_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {"transfer_style": [], "column_infonce": []}
    for name in calls:
        function = getattr(room, name)

        def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            calls[name].append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(room, name, counted)
    rows = Experiment.resolve("bss", DATA, overrides=SMALL).run(0)
    assert len(calls["transfer_style"]) == 2 * len(calls["column_infonce"]) == 6
    (_, donors, windows), (z, temperature) = calls["transfer_style"][0], calls["column_infonce"][0]
    assert len(donors.unique()) == len(windows.unique()) == 1
    assert z.shape == (20, 2, 8)
    assert temperature == 0.5
    assert math.isfinite(rows[-1]["train/loss"])


def test_the_plain_loss_is_the_hosts() -> None:
    grid = torch.randn(4, 2, 3)
    learner = catalog.load_system("bss").learner(catalog.load_system("bss").config(**SMALL), facts(), 0)
    from counterpoint.core.compared import Compared, views
    from counterpoint.systems.parts import Step

    compared = Compared(*grid.unbind(1), views, 0.3)
    part: Any = learner.parts["bss"]
    found = part.loss(compared, Step({}), None)["loss"]
    torch.testing.assert_close(found, column_infonce(grid, 0.3))
    part.config = BSSConfig(by_column=False)
    below = {"loss": torch.tensor(7.0)}
    assert part.loss(compared, Step({}), lambda _: below) is below


def facts() -> SimpleNamespace:
    return SimpleNamespace(size=8, channels=3, classes=10)


def test_msn_takes_its_entropy_by_view_under_bss() -> None:
    system = catalog.load_system("msn+bss")
    for by_column in (True, False):
        learner: Any = system.learner(system.config(**CROPS | {"bss.by_column": by_column}), facts(), 0)
        assert learner.by_view is by_column
    assert catalog.load_system("msn").learner(catalog.load_system("msn").config(**CROPS), facts(), 0).by_view is False


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("slug", "settings"),
    [
        ("swav+bss", CROPS),
        ("msn+bss", CROPS),
        ("msn+bss", CROPS | {"encoder": "vit-s", "local_crops": 0, "iterations": 0}),
        ("simclr+bss+hallucinator", SMALL),
        ("bss", SMALL | {"bss.transfer": "image", "bss.by_column": False, "bss.shared_colours": False}),
    ],
)
def test_every_host_trains(slug: str, settings: dict[str, Any]) -> None:
    rows = Experiment.resolve(slug, DATA, overrides=settings).run(0)
    assert math.isfinite(rows[-1]["train/loss"])
    assert {"test/domain_purity", "test/unseen_linear_accuracy"} <= rows[-1].keys()


@pytest.mark.parametrize(
    "base", ["moco-v2", "dino", "byol", "simsiam", "vicreg", "barlow-twins", "mae", "obow", "clip"]
)
def test_hosts_whose_terms_cross_styles_are_refused(base: str) -> None:
    with pytest.raises(CounterpointError, match=f"bss does not go over {base}"):
        catalog.load_system(f"{base}+bss")


def test_settings_and_recipes_that_do_not_fit_are_refused() -> None:
    system = catalog.load_system("bss")
    for settings, word in (
        ({"bss.r_min": -0.1}, "r_min"),
        ({"bss.r_min": 0.3, "bss.r_max": 0.2}, "r_min"),
        ({"bss.r_max": math.nan}, "r_max"),
        ({"bss.transfer": "all"}, "transfer"),
    ):
        with pytest.raises(CounterpointError, match=word):
            system.config(**settings)
    with pytest.raises(CounterpointError, match="three channels"):
        system.learner(system.config(**SMALL | {"recipe": "digit-patterns"}), facts(), 0)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("slug", ["bss", "msn+bss"])
def test_interrupted_and_resumed_it_ends_the_same(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = catalog.load_system(slug).config(**(SMALL if slug == "bss" else CROPS))
    quiet: dict[str, Any] = {"data": DATA, "out": tmp_path, "say": lambda _: None}
    one = training.train(slug, config, name="whole", **quiet).load_weights()
    steps, ended = 0, catalog.load_system(slug).learner(config, facts(), 0).__class__.end_step

    def stop(self: Learner) -> None:
        nonlocal steps
        steps += 1
        ended(self)
        if steps == 2:
            raise RuntimeError("the lights go out")

    with monkeypatch.context() as m:
        m.setattr(catalog.load_system(slug).learner(config, facts(), 0).__class__, "end_step", stop)
        with pytest.raises(RuntimeError, match="lights"):
            training.train(slug, config, name="stopped", loop=Loop(checkpoint_minutes=0.0), **quiet)
    two = training.resume(tmp_path / "stopped", say=lambda _: None).load_weights()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)


def test_the_users_domains_come_from_folders_and_some_may_be_left_out(tmp_path: Path) -> None:
    for number in range(60):
        split, domain, label = (
            ("train", "train", "test")[number % 3],
            ("photo", "scan")[number // 3 % 2],
            "ab"[number % 2],
        )
        path = tmp_path / split / domain / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    place = f"imagefolder:{tmp_path}?size=8&domain=folder"
    found, less = data.load(place), data.load(f"{place}&unseen=scan")
    assert (found.classes, found.domains, found.shifts) == (("a", "b"), ("photo", "scan"), {})
    assert set(found.train.domains.tolist()) == {0, 1}
    parts = (less.train, less.valid, less.test)
    assert [set(part.domains.tolist()) for part in (*parts, less.shifts["unseen"])] == [{0}, {0}, {0}, {1}]
    assert sum(map(len, parts)) + len(less.shifts["unseen"]) == 60
    assert data.load(f"imagefolder:{tmp_path}?size=8").train.domains is None
    for options, word in (("&unseen=sketch", "no domain 'sketch'"), ("&task=x", "task")):
        with pytest.raises(CounterpointError, match=word):
            data.load(place + options)
    with pytest.raises(CounterpointError, match="unseen: there are no domains"):
        data.load(f"imagefolder:{tmp_path}?size=8&unseen=scan")
    with pytest.raises(CounterpointError, match="no column 'style'"):
        data.load(f"imagefolder:{tmp_path}?size=8&domain=style")


@pytest.mark.usefixtures("drawn")
def test_the_users_own_folder_trains_and_its_page_shows_contents_and_styles(tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "mine" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"batch_size": 8}).items()]
    mine = f"imagefolder:{tmp_path / 'mine'}?size=16"
    assert cli.main(["train", "simclr", "--with", "bss", "--data", mine, *words, "--bss.r-max=0.1",
                     "--out", str(tmp_path), "--name", "one"]) == 0  # fmt: skip
    assert "Contents and styles" in (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
