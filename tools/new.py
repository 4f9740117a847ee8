"""Start a system: write its file, test and claim from templates, and fill in its row of the catalogue.

    make new SLUG=bss                      a planned system of the catalogue
    make new SLUG=my-method TITLE="My method" AREA=images FORM=views

The new system can be trained at once, with InfoNCE instead of the paper's loss. Its test fails until the equations and the
authors' numbers are there and every TODO is done. Forms: views (pictures without labels), aligned (several modalities).
Existing files are never overwritten.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
FORMS = {
    "views": {
        "DATA": "digits",
        "METRIC": "knn_accuracy",
        "UNIT": "accuracy",
        "SMALL": '{"encoder": "conv-s", "batch_size": 64, "epochs": 1}',
    },
    "aligned": {
        "DATA": "digit-captions",
        "METRIC": "image_to_text_r1",
        "UNIT": "recall",
        "SMALL": '{"image_encoder": "conv-s", "batch_size": 64, "epochs": 1}',
    },
}


def row_of(catalogue: str, slug: str) -> tuple[int, int] | None:
    """Return where the row of a slug begins and ends in the text of the catalogue."""
    at = catalogue.find(f'slug = "{slug}"\n')
    if at < 0:
        return None
    start = catalogue.rfind("[[system]]", 0, at)
    end = catalogue.find("[[system]]", at)
    return start, len(catalogue) if end < 0 else end


def main() -> int:
    """Write the files; return 2 with one message where a name does not fit or something exists already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slug")
    parser.add_argument("--title", default="", help="the paper's title; known for planned systems")
    parser.add_argument("--arxiv", default="", help="number of the preprint, such as 2010.01028")
    parser.add_argument("--area", default="", help="folder of systems/: images, alignment or classics")
    parser.add_argument("--form", default="", help="form of the data: " + " or ".join(FORMS))
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the project")
    options = parser.parse_args()
    slug, package = options.slug, options.root / "src" / "counterpoint"
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        return refused(f"'{slug}' is no slug: use lower-case words joined by hyphens, such as pcl-sr")
    path = package / "catalog.toml"
    catalogue = path.read_text(encoding="utf-8")
    place = row_of(catalogue, slug)
    known = tomllib.loads(catalogue[place[0] : place[1]])["system"][0] if place else {}
    if known and known["state"] != "planned":
        return refused(f"{slug} is {known['state']} already: see {known['module']}")
    title, arxiv = options.title or known.get("title", ""), options.arxiv or known.get("arxiv", "")
    area, form = options.area or known.get("area", ""), options.form or known.get("task", "")
    for name, value in (("TITLE", title), ("AREA", area), ("FORM", form)):
        if not value:
            return refused(f"{slug} is not in the catalogue: give {name}= as well")
    if form not in FORMS:
        form_named = ", ".join(FORMS)
        return refused(f"there is no template of the form '{form}': give FORM= one of {form_named}, then adapt it")
    module = slug.replace("-", "_")
    words = FORMS[form] | {
        "SLUG": slug,
        "TITLE": title,
        "ARXIV": arxiv or "TODO",
        "AREA": area,
        "MODULE": module,
        "FUNCTION": f"{module}_loss",
        "CLASS": "".join(word.capitalize() for word in slug.split("-")),
    }
    targets = {
        f"{form}.py.txt": package / "systems" / area / f"{module}.py",
        "test.py.txt": options.root / "tests" / "systems" / f"test_{module}.py",
        "claim.toml.txt": package / "claims" / f"{slug}.toml",
    }
    for target in targets.values():
        if target.exists():
            return refused(f"{target} exists already; remove it, or go on with it")
        if not target.parent.is_dir():
            return refused(f"there is no folder {target.parent}; AREA= is one of systems/'s folders")
    for template, target in targets.items():
        text = (HERE / "templates" / template).read_text(encoding="utf-8")
        target.write_text(re.sub(r"@([A-Z]+)@", lambda match: words[match.group(1)], text), encoding="utf-8")
        print(f"written  {target.relative_to(options.root)}")
    claim = "TODO what the paper claims, in one sentence."
    row = "\n".join(
        [
            "[[system]]",
            f'slug = "{slug}"',
            f'title = "{title}"',
            *([f'arxiv = "{arxiv}"'] if arxiv else []),
            f'area = "{area}"',
            f'task = "{form}"',
            'state = "built"',
            f'module = "counterpoint.systems.{area}.{module}"',
            f'claim = "{claim}"',
            f'functions = ["counterpoint.systems.{area}.{module}:{module}_loss"]',
            "",
            "",
        ]
    )
    start, end = place or (len(catalogue), len(catalogue))
    path.write_text(catalogue[:start].rstrip("\n") + "\n\n" + row + catalogue[end:], encoding="utf-8")
    print(f"changed  {path.relative_to(options.root)}")
    print(f"Next: the card, then `make try SLUG={slug}`, and the list 'When a system is done' in CONTRIBUTING.md.")
    return 0


def refused(why: str) -> int:
    """Print why nothing was written; return 2."""
    print(f"new: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
