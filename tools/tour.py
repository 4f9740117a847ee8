"""Train every system of the catalogue for one epoch, and write a page with one picture of each: `make tour`.

    python tools/tour.py                       the 63 papers, on their own data, two at a time, into tour/
    python tools/tour.py simclr clip           these systems alone
    python tools/tour.py --all --jobs 1        the classics, too

Each system runs as `counterpoint train SLUG`, with its recipe for its own data. Each of its stages has one epoch. Finished runs are
kept, so the same command continues. The exit code is 1 where a system failed; the page says why.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from counterpoint import catalog
from counterpoint.engine.run import REPORT, Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.report import page as parts
from counterpoint.report.found import found_sections
from counterpoint.report.page import Page
from counterpoint.systems.settings import flat

LIMIT = 600  # seconds of one system
# Settings of systems that have a long stage before their first epoch: adainf would draw 200,000 images from a diffusion model.
SHORT: dict[str, dict[str, str]] = {"adainf": {"adainf.generated": "mixture"}}


@dataclass(frozen=True)
class Visit:
    """What came of one system."""

    slug: str
    run: Path
    seconds: float
    error: str = ""


def shortened(slug: str) -> dict[str, int | str]:
    """Return the settings of a short run: every number of epochs above 1 as 1, no warm-up, and those of SHORT."""
    config = Experiment.resolve(slug).config
    one = {
        name: 1
        for name, value in flat(config).items()
        if name.endswith("epochs") and isinstance(value, int) and value > 1 and "warmup" not in name
    }
    return (
        one
        | {name: 0 for name, value in flat(config).items() if name == "warmup_epochs" and value}
        | SHORT.get(slug, {})
    )


def visit(slug: str, out: Path, console: Console) -> Visit:
    """Train a system in a process of its own. A finished run is kept."""
    run, log = out / slug, out / f"{slug}.log"
    try:
        if Run.open(run).complete:
            return Visit(slug, run, float(log.with_suffix(".seconds").read_text()))
    except (CounterpointError, OSError, ValueError):
        pass
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shortened(slug).items()]
    words = [sys.executable, "-m", "counterpoint", "train", slug, *options, "--out", str(out), "--name", slug]
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    error = ""
    with log.open("w") as file:
        try:
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT, check=False).returncode
            if code:
                error = (log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        except subprocess.TimeoutExpired:
            error = f"took longer than {LIMIT} seconds"
    seconds = time.monotonic() - started
    if not error:
        log.with_suffix(".seconds").write_text(f"{seconds:.1f}")
    console.print(f"{slug:26s} {seconds:6.1f} s  {error}", markup=False, highlight=False, soft_wrap=True)
    return Visit(slug, run, seconds, error)


def write_page(found: list[Visit], out: Path) -> Path:
    """Write the page: a table of all systems, and a section with a picture of each."""
    failed = sum(bool(one.error) for one in found)
    page = Page("A tour of all systems", f"{len(found)} systems, one epoch of each stage; {failed} failed.")
    rows = []
    for one in found:
        entry = catalog.get(one.slug)
        measured = ""
        if not one.error:
            last = Run.open(one.run).metrics()[-1]
            tests = [(name.removeprefix("test/"), value) for name, value in last.items() if name.startswith("test/")]
            measured = ", ".join(f"{name} {parts.number(value)}" for name, value in tests[:2])
        rows.append([one.slug, entry.area, entry.task, f"{one.seconds:.0f}", one.error or measured])
    page.section(
        "All", parts.table(["system", "area", "task", "seconds", "measured on test, or the error"], rows), anchor="all"
    )
    for one in found:
        if one.error:
            continue
        sections = found_sections(Run.open(one.run).figures())
        link = parts.Markup('<p><a href="{}">The whole report</a></p>').format(f"{one.slug}/{REPORT}")
        heading, drawn = sections[0] if sections else ("", parts.text("This system draws no picture of its own."))
        page.section(
            one.slug, parts.join(parts.text(f"{catalog.get(one.slug).title}. {heading}"), drawn, link), anchor=one.slug
        )
    return page.write(out / "index.html")


def main() -> int:
    """Visit the systems, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", help="systems; default: the papers of the catalogue")
    parser.add_argument("--all", action="store_true", help="the classics, too")
    parser.add_argument("--jobs", type=int, default=2, help="systems that train at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("tour"))
    options = parser.parse_args()
    entries = [entry for entry in catalog.entries().values() if entry.built]
    slugs = options.slugs or [entry.slug for entry in entries if options.all or entry.area != "classics"]
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console()
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda slug: visit(slug, options.out, console), slugs))
    console.print(f"Page: {write_page(found, options.out)}")
    return 1 if any(one.error for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
