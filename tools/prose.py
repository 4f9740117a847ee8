"""Check the English of docstrings, comments, messages and pages by the rules of CONTRIBUTING.md.

    python tools/prose.py                  every file of src/, tests/ and docs/, README.md and its neighbours
    python tools/prose.py src/counterpoint/core docs/guides
    python tools/prose.py --count          findings per rule and folder

Rules, by the names that a finding starts with:

    first-word   the docstring of a function starts with a verb in the imperative
    phrase       no idiom of the list PHRASES
    long         no sentence over 20 words; a semicolon or a colon ends one
    link         no `[n][3]` in a docstring outside of code: the pages read it as a link, and their strict build fails

Text between backquotes or in an indented block of two lines and more is code. It counts as one word.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = (
    "src",
    "tests",
    "tools",
    "benchmarks",
    "docs",
    "README.md",
    "RESULTS.md",
    "SYSTEMS.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
)
LONGEST = 20
PHRASES = {
    r"\b(is|are|was|were|be|been|being) (said|told)\b": "say who reports, returns or computes it",
    r"\bput(s|ting)? up with\b": "accept, or tolerate up to a number",
    r"\bnobody's\b": "unowned, padding or masked",
    r"\bhas no say\b": "does not count",
    r"\bgo(es)? by the name\b": "is called",
    r"\bhas its own\b.{0,20}\bsay\b": "name what it computes",
    r"\bin its own right\b": "leave out",
    r"\bsays so\b": "raises, warns or reports",
    r"\bmakes? do with\b": "uses",
    r"\b(takes|comes|goes) after\b": "follows",
    r"\bleft alone\b": "unchanged",
    r"\bof its own accord\b": "by default",
    r"\bcome(s)? to nothing\b": "is zero, or has no effect",
    r"\bthings?\b": "name it",
    r"\bwhat (is|was|it|they|has|a|the)\b[^.]{0,60}\b(is|are)\b (the|a)\b": "use a named subject",
}
# First words of docstrings that are verbs in the imperative.
VERBS = frozenset(
    """
    accept add adjust adopt align allocate answer append apply arrange ask assemble assert assign attach augment average
    balance begin bind blend blur boost bound break bring build cache calculate calibrate call cancel carry cast center
    centre change check choose clamp clean clear clip close cluster collect combine compare compile complete compose
    compress compute concatenate configure confirm connect construct continue contrast convert copy correct count cover
    create crop cut damp decide declare decode decompose decorate deduce define delete deliver derive describe detach
    detect determine differentiate discard display distil distribute divide do download draw drop duplicate embed emit
    enable encode end enforce engrave enlarge enter enumerate escape estimate evaluate examine exchange exclude execute
    exit expand expect explain export extend extract fail feed fetch fill filter find finish fit fix flatten flip fold
    follow forbid force form format forward freeze gather generate get give go grade group grow guard guess halve hand
    handle hash have help hide hold identify ignore import include index infer initialise insert inspect install
    interpolate interpret invert iterate join judge keep label lay learn leave let limit link list listen load locate
    lock log look lower make map mark mask match maximise mean measure merge migrate minimise mirror mix modify move
    multiply name narrow negate normalise note notice number observe obtain offer omit open optimise order pack pad
    paint pair parse partition pass paste perform permute pick place plan play plot point pool post predict prefer
    prepare preserve press prevent print process produce project prove provide pull push put quote raise randomise rank
    rate read rebuild recall receive recognise recommend recompute record reduce refer refine refresh refuse register
    reject relate release remember remind remove rename render repeat replace replay report represent request require
    rerun rescale reset reshape resize resolve respect restore restrict resume retain retrieve return reuse reverse
    rewrite roll rotate round run sample save say scale scan schedule score search seed select send separate serve set
    share shift shorten show shrink shuffle sign simulate skip slice smooth solve sort spawn speak split spread stack
    stamp stand start state stay step stop store stream strip subtract suggest sum summarise supply swap switch
    synthesise take tell terminate test tie time tokenize tokenise track train transfer transform translate transpose
    treat trim try tune turn undo unpack unwrap update upload use validate verify visit wait walk warm warn watch weigh
    weight widen wrap write yield zero
    """.split()  # noqa: SIM905
)
SENTENCE = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z`\[(\"'])|(?<=[;:])\s|\n\s*\n|\n\s*(?:[-*]|\d+\.)\s")


@dataclass(frozen=True)
class Text:
    """A piece of prose: where it starts, what it is, what it says."""

    path: Path
    line: int
    kind: str  # docstring, comment, message or page
    text: str
    name: str = ""  # of the function that a docstring belongs to


def texts(path: Path) -> Iterator[Text]:
    """Yield the prose of a file of Python or Markdown."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield Text(path, 1, "page", _without_code(source))
        return
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=True)
            if found:
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _property(node)
                yield Text(path, node.body[0].lineno, "docstring", found, node.name if function else "")
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for part in node.exc.args[:1]:
                if said := _said(part):
                    yield Text(path, part.lineno, "message", said)
    lines, comment, first = source.splitlines(), [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        alone = token.type == tokenize.COMMENT and not lines[token.start[0] - 1][: token.start[1]].strip()
        if token.type == tokenize.COMMENT and not alone:
            yield Text(path, token.start[0], "comment", token.string.lstrip("# "))
        elif alone:
            first = first or token.start[0]
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.COMMENT) and comment:
            yield Text(path, first, "comment", "\n".join(comment))
            comment, first = [], 0


def _property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _said(node: ast.expr) -> str:
    """Return the text of a message, with every value in it as one word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _said(node.left) + _said(node.right)
    return ""


def _without_code(text: str) -> str:
    text = re.sub(r"^(```|~~~).*?^\1", "\n", text, flags=re.S | re.M)
    text = re.sub(r"^\s*(\||<|!\[|\$ |#).*$", "\n", text, flags=re.M)  # tables, headings, pictures
    return re.sub(r"\]\([^)]*\)", "]", text)


def _plain(text: str) -> str:
    """Return the text with code, formulas and tables as single words or paragraphs."""
    text = re.sub(r"`[^`]*`", "`x`", text)
    text = re.sub(r"^( {4,}|\t).*$", "\n", text, flags=re.M)  # indented: code, or a formula
    text = re.sub(r"^\s*>>>.*$|^\s*\.\.\. .*$|^\s*\|.*$", "\n", text, flags=re.M)
    return re.sub(r"^ *([\w.*]+(?:, [\w.*]+)*): +", "\n\n", text, flags=re.M)  # arguments: each begins a sentence


def findings(text: Text) -> Iterator[tuple[str, int, str]]:
    """Yield (rule, line, what) of a text."""
    if text.kind == "docstring" and text.name and not text.name.startswith("test_"):
        word = re.match(r"[`\"'(]*([A-Za-z]+)", text.text)
        if not word or word.group(1).lower() not in VERBS:
            yield "first-word", text.line, f"'{text.text.split(chr(10))[0][:70]}': start with a verb in the imperative"
    if text.kind == "docstring":
        for match in re.finditer(
            r"\[[^]\n]*\]\[\w+\]", re.sub(r"`[^`]*`|^\s*(>>>|\.\.\. ).*$", "", text.text, flags=re.M)
        ):
            yield "link", text.line, f"'{match.group(0)}': write a shape as [n, 3], or code between backquotes"
    plain = _plain(text.text)
    for pattern, mend in PHRASES.items():
        for match in re.finditer(pattern, plain, flags=re.I):
            yield "phrase", text.line, f"'{match.group(0)}': {mend}"
    for sentence in SENTENCE.split(plain):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > LONGEST:
            yield "long", text.line, f"{len(words)} words: {' '.join(words[:9])} ..."


def files(places: list[str]) -> Iterator[Path]:
    """Yield the files to check, in order."""
    for place in places:
        path = ROOT / place
        found = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.md")])
        yield from found


def main() -> int:
    """Print what breaks a rule; return 1 where anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", default=list(PLACES), help="files and folders, from the project's root")
    parser.add_argument("--count", action="store_true", help="only count, by rule and folder")
    options = parser.parse_args()
    count: Counter[tuple[str, str]] = Counter()
    for path in files(options.places):
        where = path.relative_to(ROOT)
        for text in texts(path):
            for rule, line, what in findings(text):
                count[rule, str(where.parent)] += 1
                if not options.count:
                    print(f"{where}:{line}: {rule}: {what}")
    if options.count:
        for (rule, folder), number in sorted(count.items()):
            print(f"{number:5} {rule:10} {folder}")
    print(f"{sum(count.values())} findings", file=sys.stderr)
    return int(bool(count))


if __name__ == "__main__":
    sys.exit(main())
