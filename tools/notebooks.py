"""Execute the notebooks of docs/notebooks, and keep them with their outputs in build/notebooks for the documentation.

    python tools/notebooks.py                   those that changed since they were last executed
    python tools/notebooks.py own_images        one
    python tools/notebooks.py --all             all

A notebook is a Python file in jupytext's percent format. Each runs in an empty folder of its own, in a new kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from os import environ, pathsep, times
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "docs" / "notebooks"
KEPT = ROOT / "build" / "notebooks"
LIMIT = 300  # seconds that one cell may take


def digest(source: Path) -> str:
    """Return what tells a notebook's source from its later versions."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def execute(source: Path, folder: Path) -> Any:
    """Execute a notebook in a folder. Return it with its outputs, and with seconds and digest in its metadata.

    Raises nbclient's CellExecutionError for a cell that fails.
    """
    import jupytext
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from traitlets import Unicode

    notebook = jupytext.read(source)
    paths = pathsep.join(filter(None, (str(ROOT / "src"), environ.get("PYTHONPATH"))))
    start, before = time.monotonic(), times()

    with tempfile.TemporaryDirectory(prefix="nb") as sockets:

        class Local(AsyncKernelManager):
            """A kernel over sockets of the file system: over TCP every user of the machine could connect."""

            transport = Unicode("ipc")
            ip = Unicode(f"{sockets}/kernel")

        where = {"metadata": {"path": str(folder)}}
        client = NotebookClient(
            notebook, kernel_manager_class=Local, kernel_name="python3", timeout=LIMIT, resources=where
        )
        # One thread: the networks are small, and other notebooks or tests may run beside this one.
        own = {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        client.execute(env=environ | own)
    after = times()
    notebook.metadata["counterpoint"] = {
        "source": digest(source),
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1),
    }
    return notebook


def kept(source: Path) -> Any:
    """Return the executed notebook of a source; None where it is missing or older than the source."""
    import nbformat

    file = KEPT / f"{source.stem}.ipynb"
    if not file.is_file():
        return None
    found = nbformat.read(file, as_version=4)
    return found if found.metadata.get("counterpoint", {}).get("source") == digest(source) else None


def main() -> int:
    """Execute what is due; return 1 where a notebook fails."""
    import nbformat
    from nbclient.exceptions import CellExecutionError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of notebooks; default: all that are due")
    parser.add_argument("--all", action="store_true", help="execute notebooks that are up to date, too")
    options = parser.parse_args()
    sources = {source.stem: source for source in sorted(SOURCES.glob("*.py"))}
    if unknown := set(options.names) - sources.keys():
        print(f"error: no notebook {min(unknown)}; there are {', '.join(sources)}", file=sys.stderr)
        return 2
    KEPT.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, source in sources.items():
        if options.names and name not in options.names:
            continue
        if not (options.all or options.names) and kept(source) is not None:
            print(f"{name}: up to date")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                notebook = execute(source, Path(folder))
            except CellExecutionError as error:
                print(f"{name}: failed\n{error}", file=sys.stderr)
                failed = 1
                continue
        nbformat.write(notebook, KEPT / f"{name}.ipynb")
        took = notebook.metadata["counterpoint"]
        print(f"{name}: {took['seconds']} s ({took['processor_seconds']} s of the processor)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
