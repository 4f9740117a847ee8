"""Write constraints.txt: the version of every package in this environment that Counterpoint and its extras lead to.

    make lock                  after `make .venv/.installed`, when versions are to move
    python tools/lock.py --check    say what differs, write nothing

NVIDIA's packages are left out: torch names their versions itself, and only Linux has them. Packages that nothing leads to are
left out too, and named.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HEAD = (
    "# The versions the tests and the recorded numbers were made with (make lock). The package itself accepts ranges.\n"
)
ALONE = (
    "arcade",
    "qtawesome",
    "tinysoundfont",
    "pretty_midi",
    "recbole",
    "nilearn",
)  # installed by the Makefile without what they depend on
LEFT_OUT = re.compile(r"nvidia-.*|cuda-.*|triton|counterpoint|pip|setuptools")


def normal(name: str) -> str:
    """Return a package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def reached() -> dict[str, str]:
    """Return name -> version of the packages that the project and its extras lead to, as installed here."""
    found: dict[str, str] = {}
    extras = metadata.metadata("counterpoint").get_all("Provides-Extra") or []
    todo = [("counterpoint", frozenset(extras)), *((name, frozenset()) for name in ALONE)]
    seen = set()
    while todo:
        name, wanted = todo.pop()
        if (normal(name), wanted) in seen:
            continue
        seen.add((normal(name), wanted))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[normal(name)] = package.version.partition("+")[0]
        if name in ALONE:
            continue
        for line in package.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((need.name, frozenset(need.extras)))
    return {name: version for name, version in sorted(found.items()) if not LEFT_OUT.fullmatch(name)}


def main() -> int:
    """Write or compare the file; return 1 where `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say what differs, write nothing")
    options = parser.parse_args()
    path, versions = ROOT / "constraints.txt", reached()
    others = {normal(d.name) for d in metadata.distributions()} - set(versions)
    if named := sorted(name for name in others if not LEFT_OUT.fullmatch(name)):
        print(f"nothing leads to {', '.join(named)}: left out")
    text = HEAD + "".join(f"{name}=={version}\n" for name, version in versions.items())
    if options.check:
        old, new = set(path.read_text().splitlines()), set(text.splitlines())
        for line in sorted(old ^ new):
            print(f"{'constraints.txt' if line in old else 'installed      '}  {line}")
        return int(old != new)
    path.write_text(text, encoding="utf-8")
    print(f"{len(versions)} versions written to constraints.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
