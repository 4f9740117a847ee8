"""The catalogue: complete, consistent with what is built, and the table of systems made from it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from counterpoint import catalog
from counterpoint.errors import CounterpointError
from counterpoint.lab import protocol

SYSTEMS = Path(__file__).parents[1] / "SYSTEMS.md"


def test_catalogue_has_sixty_three_papers_and_the_classics():
    rows = list(catalog.entries().values())
    papers = [row for row in rows if row.area != "classics"]
    assert len(papers) == 63
    assert len({row.slug for row in rows}) == len(rows)
    assert len({row.arxiv for row in papers if row.arxiv}) == len([row for row in papers if row.arxiv])
    assert all(row.title and row.area and row.task and row.state in ("done", "built", "planned") for row in rows)
    classics = {row.slug for row in rows if row.area == "classics"}
    assert {"simclr", "moco-v1", "moco-v2", "byol", "simsiam", "supcon", "barlow-twins", "vicreg", "swav"} <= classics
    assert {"dino", "mae", "clip", "siglip", "kd", "fitnets", "rkd", "crd", "mean-teacher", "triplet"} <= classics


@pytest.mark.parametrize("slug", [row.slug for row in catalog.entries().values() if row.built])
def test_every_built_system_can_be_loaded(slug):
    entry = catalog.get(slug)
    system = catalog.load_system(slug)
    assert system.slug == slug
    assert system.task == entry.task
    assert importlib.import_module(f"counterpoint.tasks.{system.task}").TASK.name == entry.task
    # The second system of a file has the first one's functions; the losses of finetune-det are torchvision's.
    assert entry.functions or ":" in entry.module or slug == "finetune-det"
    for recipe in (system.recipe, *system.recipes.values()):
        system.config(**recipe)
    # The classic baselines have no claim: others' claims are tried against them.
    assert (entry.area == "classics") == (not entry.claim) == (entry.slug not in protocol.slugs())


def test_planned_and_unknown_systems_raise_an_error(monkeypatch):
    monkeypatch.setitem(catalog.entries(), "symile", replace(catalog.get("symile"), state="planned"))
    with pytest.raises(CounterpointError, match="in the catalogue but not built yet"):
        catalog.load_system("symile")
    with pytest.raises(CounterpointError, match="did you mean macil-sd"):
        catalog.get("macilsd")


def test_the_table_of_systems_is_the_catalogue_s():
    text = SYSTEMS.read_text(encoding="utf-8")
    assert catalog.with_table(text) == text, "stale: run `make catalogue`"
    with pytest.raises(ValueError, match="no block <!-- systems:begin"):
        catalog.with_table("no markers")


def test_the_command_checks_and_rewrites(tmp_path, capsys):
    file = tmp_path / "page.md"
    file.write_text(f"above\n{catalog.BEGIN}\nold\n{catalog.END}\nbelow\n")
    assert catalog._main([str(file), "--check"]) == 1
    assert "old" in file.read_text()
    assert catalog._main([str(file)]) == 0
    assert catalog._main([str(file), "--check"]) == 0
    text = file.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert text.count("\n| `") == len(catalog.entries())


def test_functions_resolve_lazily():
    code = """
import sys
import counterpoint.functional as fn
assert "torch" not in sys.modules
assert "info_nce" in dir(fn)
assert "of" in dir(fn)
try:
    fn.info_nec
except AttributeError as error:
    assert "did you mean info_nce" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    import counterpoint.functional as fn

    for name in dir(fn):
        assert callable(getattr(fn, name)), name
    assert fn.of("simclr").nt_xent.__module__.endswith("core.nt_xent")
    assert fn.of("audio-sheet-retrieval").nt_xent.__module__.endswith("audio_sheet_retrieval")


def test_a_name_that_two_systems_give_to_different_functions_is_refused():
    import counterpoint.functional as fn

    said = r'two systems give the name nt_xent .* functional\.of\("audio-sheet-retrieval"\)\.nt_xent or functional\.of\("kd3"\)'
    with pytest.raises(CounterpointError, match=said):
        _ = fn.nt_xent
    with pytest.raises(CounterpointError, match=said):
        from counterpoint.functional import nt_xent  # noqa: F401
    assert "nt_xent" not in dir(fn)


def test_a_name_that_several_systems_give_to_one_function_is_no_clash(monkeypatch):
    import counterpoint.functional as fn

    first = catalog.get("clip")
    both = {"clip": first, "other": replace(first, slug="other")}
    monkeypatch.setattr(catalog, "entries", lambda: both)
    monkeypatch.delitem(vars(fn), "clip", raising=False)
    assert fn.clip is fn.of("other").clip
    assert "clip" in dir(fn)


def test_a_system_of_one_s_own_is_known_by_its_name(tmp_path, monkeypatch, undrawn):
    import numpy as np

    import counterpoint as cp

    simclr = catalog.load_system("simclr")
    monkeypatch.setattr(catalog, "_REGISTERED", {})
    for name, said in (("simclr", "is a system of the catalogue"), ("My Method", "is no name of a system")):
        with pytest.raises(CounterpointError, match=said):
            cp.register(replace(simclr, slug=name))
    try:
        cp.register(replace(simclr, slug="my-method"), title="A method of mine")
        cp.register(replace(simclr, slug="my-method"), title="The same, improved")
        assert [row.title for row in cp.systems("my-*")] == ["The same, improved"]
        data = (np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), [0, 1] * 20)
        run = cp.train(
            "my-method", data=data, out=tmp_path, name="r", epochs=1, batch_size=16, encoder="conv-s", quiet=True
        )
        np.testing.assert_array_equal(cp.load(run.path).encode(images=data[0]), run.encode(images=data[0]))
    finally:
        catalog.entries().pop("my-method", None)
    with pytest.raises(CounterpointError, match="unknown system 'my-method'"):
        cp.train("my-method", data="digits", out=tmp_path)
