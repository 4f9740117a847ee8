"""The documents: their examples run, their commands parse, their links lead somewhere, their numbers are the records'."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from counterpoint import cli, data
from counterpoint.catalog import Entry, entries, load_system
from counterpoint.commands import COMMANDS
from counterpoint.commands.train import Train
from counterpoint.experiment import Experiment
from counterpoint.lab import claims
from counterpoint.lab.protocol import read
from counterpoint.report.analysis import claims_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name
    for name in ("README.md", "RESULTS.md", "SYSTEMS.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EVERY = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in [*DOCUMENTS, *PAGES]]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# The rooms of the package, as ARCHITECTURE.md draws them.
ROOMS = re.findall(r"^  (\w+)(?:\.py|/) ", blocks(ROOT / "ARCHITECTURE.md", "text")[0], re.MULTILINE)


def prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_readme_s_example_runs(monkeypatch, tmp_path, capsys, one_thread):
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    bars = re.findall(r"^0\.\d\d #* +(violent)?$", out, re.MULTILINE)
    assert len(bars) > 20
    assert "violent" in bars
    assert len(list(tmp_path.glob("runs/macil-sd-*/model.safetensors"))) == 1


def test_the_example_system_of_the_architecture_trains_and_has_a_row(monkeypatch, tmp_path, one_thread):
    from counterpoint.lab.runner import figures

    (code,) = blocks(ROOT / "ARCHITECTURE.md", "python")
    protocol, row = blocks(ROOT / "ARCHITECTURE.md", "toml")
    claim = read(protocol, "linear-mil")
    (row,) = tomllib.loads(row)["system"]
    file = tmp_path / "linear_mil.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("linear_mil", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "linear_mil", module)
    spec.loader.exec_module(module)
    system = module.SYSTEM
    entry = Entry(**row)
    assert (entry.slug, entry.task, entry.claim) == (system.slug, system.task, claim.sentence)
    assert all(callable(getattr(module, place.partition(":")[2])) for place in entry.functions)
    for arm in claim.arms:
        config = system.config(**claim.settings(arm, quick=True))
        experiment = Experiment.resolve(system, claim.data, config=config, options=claim.options(0, quick=True))
        assert 0 < figures(experiment.run(0))[claim.conjuncts[0].metric] < 1


@pytest.mark.parametrize("path", EVERY)
def test_python_shown_compiles_and_imports_what_there_is(path):
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("counterpoint"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """List the words after `counterpoint` of every command line in a document, placeholders filled in."""
    text = path.read_text(encoding="utf-8")
    lines = [line[2:] for block in blocks(path, "console") for line in block.splitlines() if line.startswith("$ ")]
    lines += [
        code for code in re.findall(r"`([^`\n]+)`", prose(path)) if re.match(r"(torchrun .*)?counterpoint\b ", code)
    ]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "counterpoint" not in words:
            continue
        words = words[words.index("counterpoint") + 1 :]
        fill = {"SLUG": "macil-sd", "linear-mil": "macil-sd", "<slug>": "macil-sd", "RUN": "runs/x", "COMMAND": "train"}
        words = [fill.get(word, word) for word in words if word != "..."]
        found.append(words)
    assert found or "$ counterpoint" not in text
    return found


@pytest.fixture
def parse_only(monkeypatch):
    """Return the command line with commands that do nothing."""
    for name in COMMANDS:
        module = importlib.import_module(f"counterpoint.commands.{name.replace('-', '_')}")
        if inspect.isfunction(module.main):
            monkeypatch.setattr(module, "main", functools.wraps(module.main)(lambda *args, **kwargs: 0))
    monkeypatch.setattr(Train, "run", lambda self: 0)


@pytest.mark.parametrize("path", EVERY)
def test_commands_shown_parse(path, parse_only, capsys):
    for words in commands(path):
        if words == ["systems"]:  # the plain name of the command
            continue
        try:
            code = cli.main(words)
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        assert not code, f"counterpoint {' '.join(words)}: {said.err or said.out}"
        spec = dict(itertools.pairwise(words)).get("--data")
        if spec:
            source = data.SOURCES["stream" if spec.startswith("stream:") else data.source_name(spec)]
            loader = getattr(importlib.import_module(source.module), source.function)
            data._options(source.name, spec.partition("?")[2], loader)


@pytest.mark.parametrize("path", EVERY)
def test_no_page_gives_two_runs_one_name(path):
    """A reader who types a page from top to bottom would get an error at the second one."""
    lines = [line for block in blocks(path, "console") for line in block.splitlines()]
    names = [name for line in lines for name in re.findall(r"--name (\S+)", line)]
    assert sorted(names) == sorted(set(names))


def test_the_check_of_commands_can_fail(parse_only, capsys):
    assert cli.main(["detekt", "a.mp4"]) == 2
    with pytest.raises(SystemExit) as left:
        cli.main(["detect", "a.mp4", "--treshold", "0.3"])
    assert left.value.code == 2
    assert cli.main(["detect", "a.mp4", "--threshold", "0.3"]) == 0


@pytest.mark.parametrize("path", EVERY)
def test_make_targets_shown_exist(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = re.findall(r"(?:`|^\$ )make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(shown) <= targets


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-"))
    return found


def generated(path: Path) -> bool:
    """Return whether the build of the site makes this page."""
    page = path.relative_to(ROOT / "docs").as_posix()
    names = {
        "cli.md",
        "architecture.md",
        "contributing.md",
        "changelog.md",
        "results.md",
        "systems-table.md",
        "performance.md",
    }
    names |= {"systems/index.md", "api/index.md"}
    names |= {f"systems/{entry.slug}.md" for entry in entries().values() if entry.state == "done"}
    names |= {f"api/{room}.md" for room in ROOMS}
    names |= {f"notebooks/{source.stem}.md" for source in (ROOT / "docs" / "notebooks").glob("*.py")}
    return page in names


@pytest.mark.parametrize("path", EVERY)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if path in PAGES and place.suffix == ".md" and not place.is_file():
            assert generated(place), f"{path.name} links to {target}"
            continue
        assert place.exists(), f"{path.name} links to {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{path.name} links to {target}"


def test_every_page_is_in_the_site_s_navigation():
    class Loader(yaml.SafeLoader):
        pass

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def leaves(items):
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, dict):
                for value in item.values():
                    yield from leaves(value)
            else:
                yield item

    listed = set(leaves(nav))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} <= listed
    assert all((ROOT / "docs" / page).is_file() or generated(ROOT / "docs" / page) for page in listed)


# --- facts ------------------------------------------------------------------------------------------------------------


def test_the_citation_names_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert f"## {project['version']} - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text(
        encoding="utf-8"
    )


def test_the_flagship_s_claims_are_the_record_s():
    record = json.loads((ROOT / "results" / "claims" / "macil-sd.json").read_text(encoding="utf-8"))
    rows = []
    for part in (record, *record["variants"].values()):
        for row in (*part["conjuncts"], *part["reported"]):
            rows.append(
                f"| `{part['data']}` | {row['says']} | {row['arm']} | {row['baseline']} | {row['mean']:+.3f} "
                f"| {row['low']:+.3f} .. {row['high']:+.3f} | {row.get('verdict', 'reported')} |"
            )
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- claims:begin -->")[2].partition("<!-- claims:end -->")[0].strip().splitlines()
    assert shown[2:] == rows
    assert len(record["seeds"]) == 10  # the text says ten
    assert "ten seeds" in text


def test_the_table_of_speed_is_the_record_s():
    record = json.loads((ROOT / "results" / "bench" / "contrast.json").read_text(encoding="utf-8"))
    found: dict[str, dict[int, dict]] = {}
    for row in record["time"]:
        found.setdefault(row["peer"].partition(",")[0] + (", 100" if "100" in row["peer"] else ""), {})[
            row["pairs"]
        ] = row
    table = (ROOT / "RESULTS.md").read_text(encoding="utf-8").partition("| our function |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        label, peer, *ratios, memory = (cell.strip() for cell in line.strip("| ").split("|"))
        rows = found[peer + (", 100" if "100" in label else "")]
        for shown, size in zip(ratios, (256, 1024, 4096, 8192), strict=True):
            ratio = rows[size]["times_faster"]
            assert shown == (f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x")
        assert memory == f"{rows[8192]['our_extra_mb']:.0f} / {rows[8192]['peer_extra_mb']:,.0f} MB"


def test_the_extras_of_the_guide_are_the_project_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = (
        (ROOT / "docs/guides/installation.md")
        .read_text(encoding="utf-8")
        .partition("| extra | brings |")[2]
        .partition("\n\n")[0]
    )
    assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == list(project["optional-dependencies"])


def test_the_licence_is_the_whole_of_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright [yyyy] [name of copyright owner]" in text


def test_the_table_of_claims_is_made_of_the_records():
    found = claims.records(ROOT / "results" / "claims")
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    shown = text.partition(claims.BEGIN)[2].partition(claims.END)[0].strip()
    assert shown == claims_table(found)
    assert all(len(record["seeds"]) >= 5 for record in found)
    drawn = (ROOT / "results" / "claims" / "claims.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")


@pytest.fixture(scope="module")
def page_makers():
    """Import the modules that make pages of the documentation."""
    pytest.importorskip("mkdocs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("hooks"), importlib.import_module("records")


def test_every_record_of_a_benchmark_has_rows_on_the_page_of_benchmarks(page_makers):
    _, records = page_makers
    page = records.performance()
    for file in (ROOT / "results" / "bench").glob("*.json"):
        found = list(records.speeds(json.loads(file.read_text(encoding="utf-8"))))
        assert not found or f"{file.stem}.py" in page or file.stem in page


def test_settings_of_every_base_have_their_texts_on_a_system_s_page(page_makers):
    hooks, _ = page_makers
    texts = hooks.field_docs(load_system("wscol").config)
    assert {"source_epochs", "crop", "optimizer", "pseudo_threshold"} <= texts.keys()
