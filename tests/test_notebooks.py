"""The notebooks of the documentation: executed from beginning to end, and their pages."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), str(ROOT / "docs"), *sys.path])
    import notebooks

    return notebooks


def test_each_notebook_begins_with_what_one_has_and_ends_with_what_is_next(notebooks: Any) -> None:
    import jupytext

    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("  - Notebooks:")[2].partition("  - Systems:")[0]
    assert sorted(Path(page).stem for group in yaml.safe_load(nav) for page in group.values()) == [
        s.stem for s in SOURCES
    ]
    for source in SOURCES:
        cells = jupytext.read(source).cells
        assert re.match(r"# .+\n\nYou have ", cells[0].source), source.name
        assert cells[-1].source.startswith("## Next\n"), source.name
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert "plt.show()" in code
        assert "DataFrame" in code
        # A text before each cell of code says what the cell is for.
        assert "cc" not in "".join(cell.cell_type[0] for cell in cells), source.name


@pytest.mark.slow
@pytest.mark.parametrize("source", [pytest.param(source, id=source.stem) for source in SOURCES])
def test_each_notebook_runs(notebooks: Any, source: Path, tmp_path: Path) -> None:
    if source.stem == "violence" and not (find_spec("av") and find_spec("arcade")):
        pytest.skip("needs the extra video and the package arcade")
    done = notebooks.execute(source, tmp_path)
    outputs = [out for cell in done.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", ()) for out in outputs)
    assert any("<table" in out.get("data", {}).get("text/html", "") for out in outputs)
    assert not [out for out in outputs if out.output_type == "error"]
    # A minute on two idle cores; other tests run beside this one.
    assert done.metadata["counterpoint"]["processor_seconds"] < 120


def test_a_page_shows_outputs_and_escapes_what_was_printed(notebooks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import nbformat
    import notebook_pages
    from nbformat import v4

    source = tmp_path / "small.py"
    source.write_text("# %% [markdown]\n# # Small\n#\n# You have a number.\n\n# %%\nprint('<b>')\n", encoding="utf-8")
    monkeypatch.setattr(notebook_pages, "SOURCES", tmp_path)
    monkeypatch.setattr(notebooks, "KEPT", tmp_path / "kept")
    plain = notebook_pages.pages()["notebooks/small.md"]
    assert "was built without outputs" in plain
    table = {"text/html": "<style>x</style><table><tr><td>1</td></tr></table>", "text/plain": "1"}
    outputs = [
        v4.new_output("stream", name="stdout", text="\x1b[31m<b>\x1b[0m\n"),
        v4.new_output("display_data", data={"image/png": "aGVsbG8="}),
        v4.new_output("execute_result", data=table),
    ]
    made = v4.new_notebook(cells=[v4.new_markdown_cell("# Small"), v4.new_code_cell("print('<b>')", outputs=outputs)])
    made.metadata["counterpoint"] = {"source": notebooks.digest(source), "seconds": 12.3}
    (tmp_path / "kept").mkdir()
    nbformat.write(made, tmp_path / "kept" / "small.ipynb")
    files = notebook_pages.pages()
    page = files["notebooks/small.md"]
    assert "Executed in 12 seconds" in page
    assert '<pre class="output"><code>&lt;b&gt;</code></pre>' in page
    assert "(small-1-1.png)" in page
    assert files["notebooks/small-1-1.png"] == b"hello"
    assert "<table><tr><td>1</td></tr></table>" in page
    assert "style" not in page.partition("<table>")[0].rpartition("</code>")[2]
    source.write_text(source.read_text() + "\n# %%\n1\n", encoding="utf-8")  # an older execution does not count
    assert "was built without outputs" in notebook_pages.pages()["notebooks/small.md"]
