"""Run the command line. Each command is one file of this package; `check-loss` is `check_loss.py`.

A command's file has a function `main`, which returns the exit code. Its signature and docstring give the command's options
and help. `train` also has `prepare`, because its options depend on the system. Each function imports the heavy packages
that it needs: help, `systems` and a misspelt name need no torch.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from counterpoint import __version__
from counterpoint.errors import CounterpointError, Interrupted, absent, unknown
from counterpoint.files import patient_threads

COMMANDS = (
    *(
        "systems",
        "show",
        "data",
        "train",
        "finetune",
        "replay",
        "evaluate",
        "verify",
        "claims",
        "analyse",
        "compare",
        "sweep",
        "distill",
        "calibrate",
        "detect",
    ),
    *("predict", "ask", "generate", "embed", "index", "search", "serve", "export", "report", "check-loss", "doctor"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0; 2 for an error the user can correct; 130 when interrupted."""
    patient_threads()
    gc.set_threshold(10_000)  # with Python's 700, collecting is a fifth of the time of all imports
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except (Interrupted, KeyboardInterrupt) as error:
        if debug and isinstance(error, Interrupted):
            raise
        if isinstance(error, Interrupted):
            _say(error)
        return 130
    except CounterpointError as error:
        if debug:
            raise
        _say(error)
        return 2
    except ModuleNotFoundError as error:
        named = absent(error)
        if debug or named is None:
            raise
        _say(named)
        return 2
    except BrokenPipeError:
        # The reader of the output (head, less) left early. Keep Python from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(error: CounterpointError) -> None:
    """Print an error as a line on standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def _run(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"counterpoint {__version__}")
        return 0
    if not words or words[0] in ("--help", "-h"):
        print(overview())
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise unknown("option" if name.startswith("-") else "command", name, COMMANDS)
    module = import_module(f"counterpoint.commands.{name.replace('-', '_')}")
    command, rest, prog = module.main, words[1:], f"counterpoint {name}"
    if hasattr(module, "prepare"):
        command, rest, prog = module.prepare(rest)
    return parsed(command, rest, prog)


def parsed(command: Any, words: Sequence[str], prog: str) -> int:
    """Parse the words that follow a command's name, call the command and return its exit code."""
    import tyro

    from counterpoint.commands.help_lines import tidy_help, whole_paragraphs
    from counterpoint.commands.repeats import joined

    helps = any(word in ("--help", "-h") for word in words)
    with whole_paragraphs(), tidy_help() if helps else contextlib.nullcontext():
        result: Any = tyro.cli(command, args=joined(command, words), prog=prog)
    return int(result.run() if hasattr(result, "run") else result)


def overview() -> str:
    """Return the text of `counterpoint --help`: every command with the first sentence of its docstring."""
    width = shutil.get_terminal_size().columns
    lines = [
        "usage: counterpoint COMMAND [OPTION ...]",
        "",
        "Align, contrast and distil representations of any modality.",
        "",
        "commands:",
        *(textwrap.fill(f"  {name:10s} {summary(name)}", width, subsequent_indent=" " * 13) for name in COMMANDS),
        "",
        "examples:",
        "  counterpoint systems --state done         list what can be trained",
        "  counterpoint train simclr --data digits   train; about a minute on 2 cores",
        "  counterpoint evaluate runs/RUN            measure a run on its test data",
        "",
        "options:",
        "  COMMAND --help   show the arguments of a command, with units and defaults",
        "  --option A B     several values; --option A --option B means the same",
        "  --debug          after any command: show the traceback of an error",
        "  --version        show the version",
    ]
    return "\n".join(lines)


def summary(name: str) -> str:
    """Return the first paragraph of a command's docstring, read from its file without importing it."""
    file = Path(__file__).parent / f"{name.replace('-', '_')}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in ("main", "Train"):
            return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return ""
