"""Make a page of each notebook: its texts, its code and, where `make notebooks` has executed it, its outputs."""

from __future__ import annotations

import base64
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from notebooks import SOURCES, kept  # noqa: E402

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
Files = dict[str, str | bytes]


def pages() -> Files:
    """Return the files of all notebooks by place in the site: pages, pictures and the notebooks themselves."""
    import jupytext

    files: Files = {}
    for source in sorted(SOURCES.glob("*.py")):
        executed = kept(source)
        notebook = jupytext.read(source) if executed is None else executed
        name = source.stem
        parts = list(_parts(notebook, name, files))
        note = (
            f"Executed in {executed.metadata['counterpoint']['seconds']:.0f} seconds on this machine. "
            if executed is not None
            else "This page was built without outputs; `make notebooks` adds them. "
        )
        # The first heading is the page's title; the note follows it.
        title, _, rest = parts[0].partition("\n")
        parts[0] = f"{title}\n\n*{note}[Download the notebook]({name}.ipynb).*\n{rest}"
        files[f"notebooks/{name}.md"] = "\n\n".join(parts) + "\n"
        files[f"notebooks/{name}.ipynb"] = jupytext.writes(notebook, fmt="ipynb")
    return files


def _parts(notebook: Any, name: str, files: Files) -> Iterator[str]:
    """Yield the Markdown of each cell. Add pictures to `files`."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield str(cell.source)
        elif cell.cell_type == "code":
            yield f"```python\n{cell.source}\n```"
            outputs = [out for out in cell.get("outputs", ()) if out.get("name") != "stderr"]
            printed = "".join(str(out.text) for out in outputs if out.output_type == "stream")
            if printed.strip():
                yield _block(printed)
            for at, out in enumerate(outputs):
                if out.output_type in ("display_data", "execute_result"):
                    yield _shown(out.data, f"{name}-{number}-{at}.png", files)


def _shown(data: Any, picture: str, files: Files) -> str:
    """Return the Markdown of one output: a picture, a table, or text."""
    if "image/png" in data:
        files[f"notebooks/{picture}"] = base64.b64decode(data["image/png"])
        return f"![The figure that the cell above draws]({picture})"
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>", "", str(data["text/html"]), flags=re.DOTALL)
        if not re.sub(r"<[^>]*>", "", table).strip():
            return ""  # a bar that has disappeared
        return "\n".join(line.strip() for line in table.splitlines() if line.strip())
    return _block(str(data.get("text/plain", "")))


def _block(text: str) -> str:
    """Return text as a block, without colours. HTML, because a fence could occur in it."""
    return f'<pre class="output"><code>{html.escape(ANSI.sub("", text).strip(), quote=False)}</code></pre>'
