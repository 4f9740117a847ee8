"""`counterpoint train SLUG`. The system's settings become options, so this command prepares its own parser."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from counterpoint import catalog
from counterpoint.commands.common import RUNS, Place, Text, say, unset
from counterpoint.engine.options import Loop
from counterpoint.errors import CounterpointError


@dataclass
class Train:
    """Train a system, and write a run directory with weights, metrics and a report.

    `counterpoint train SLUG --help` lists the system's own settings with their defaults. An interrupted run continues with
    `--resume RUN`; its final metrics are those of an uninterrupted run.

    Example: counterpoint train simclr --data digits --epochs 20 --name first

    On several processes: `torchrun --nproc_per_node N -m counterpoint train SLUG ...` shares every batch among them.
    """

    slug: Annotated[Positional[Text], unset(metavar="SLUG")] = None
    """The system to train, as `counterpoint systems` lists it. Its own options follow it."""
    data: Annotated[Text, unset(metavar="SOURCE")] = None
    """The data source: NAME, NAME:PLACE or NAME?OPTION=VALUE (see `counterpoint data`). Default: the system's own."""
    seed: int = 0
    """Seed of initialisation, order of the data and dropout."""
    out: Annotated[Path, arg(metavar="DIR")] = RUNS
    """The folder in which run directories are made."""
    name: Annotated[Text, unset(metavar="NAME")] = None
    """Name of the run directory. Default: the system and the time."""
    resume: Annotated[Place, unset(metavar="RUN")] = None
    """Continue this interrupted run. The run gives all options except --device and --checkpoint-minutes."""
    continue_: Annotated[Place, unset(name="continue", metavar="RUN")] = None
    """Train this finished run further, as a new run that starts from its weights and names it as its parent. Data and
    settings default to the parent's. The new run has its own schedule and optimiser."""
    loop: OmitArgPrefixes[Loop] = field(default_factory=Loop)
    """Options of the training loop, the same for every system."""
    with_: Annotated[tuple[str, ...], unset(name="with", metavar="SLUG [SLUG ...]")] = ()
    """Additions to the system, such as mochi to moco-v2; the same as the name moco-v2+mochi. Their settings become options
    too. `counterpoint systems --additions` lists them."""
    max_bad: Annotated[Text, unset(metavar="N")] = None
    """Maximum number of bad rows in a `manifest:`, `lance:` or `litdata:` source, or their maximum fraction if below 1. The same
    as the source's option max_bad."""

    def run(self) -> int:
        """Train, resume or continue a run, depending on the options. Return the exit code."""
        if self.resume is not None and self.continue_ is not None:
            raise CounterpointError(
                "--resume finishes an interrupted run, --continue makes a new run of a finished one; give one of them"
            )
        if self.resume is None and self.slug is None:
            raise CounterpointError("which system? counterpoint train SLUG (see: counterpoint systems)")
        data = self.data
        if self.max_bad is not None:
            if (data or "").partition(":")[0] not in ("manifest", "lance", "litdata"):
                raise CounterpointError(
                    "--max-bad needs --data manifest:FILE, lance:DIR or litdata:DIR; leave it out for other data"
                )
            data = f"{data}{'&' if '?' in str(data) else '?'}max_bad={self.max_bad}"
        from counterpoint import training

        if self.resume is not None:
            training.resume(self.resume, loop=self.loop, say=say)
            return 0
        training.train(
            str(self.slug),
            self.settings(),
            data=data,
            seed=self.seed,
            out=self.out,
            name=self.name,
            parent=self.continue_,
            loop=self.loop,
            say=say,
        )
        return 0

    def settings(self) -> Any:
        """Return the system's settings from the options; None when no system was named."""
        config = getattr(self, "config", None)
        parts = dict(getattr(config, "parts", {}))
        chosen = {name: getattr(self, f"part{number}") for number, name in enumerate(parts)}
        return replace(config, parts=chosen) if config is not None and parts else config


main = Train


def prepare(argv: Sequence[str]) -> tuple[type[Train], list[str], str]:
    """Return the command with the named system's settings as options, the words left to parse, and the program's name."""
    if "--set" in argv:
        raise CounterpointError("train has no --set: each setting is an option of its own, such as --batch-size 64")
    argv, additions = without_additions(argv)
    parent = option_value(argv, "--continue")
    at = system_index(argv)
    if at is None and parent:
        from counterpoint.experiment import finished

        argv, at = [finished(parent).slug, *argv], 0
    if at is None:
        if additions:
            raise CounterpointError("--with needs a system: counterpoint train SLUG --with ADDITION")
        return Train, argv, "counterpoint train"
    slug = "+".join([argv[at], *additions])
    entry = catalog.get(slug)  # a misspelt name is found without torch
    from counterpoint.experiment import Experiment, finished

    source = option_value(argv, "--data")
    if parent:
        before = Experiment.of_run(finished(parent, slug))
        source, config = source or before.data, before.config
    else:
        experiment = Experiment.resolve(slug, source, check=False)  # the options are checked
        source, config = experiment.data, experiment.config
    hidden, without_prefix = cast(Any, (Suppress, OmitArgPrefixes))
    fields: list[Any] = [
        ("slug", hidden[str | None], field(default=slug)),
        ("config", without_prefix[type(config)], field(default_factory=lambda: config)),
    ]
    for number, (name, settings) in enumerate(getattr(config, "parts", {}).items()):
        kind: Any = Annotated[type(settings), arg(name=name)]
        fields.append((f"part{number}", kind, field(default_factory=partial(replace, settings))))
    command: type[Train] = make_dataclass("Train", fields, bases=(Train,))
    command.__doc__ = (
        f"Train {slug} ({entry.title}).\n\nDefaults are those for the data source {source}; another --data may have others. "
        "Writes a run directory with weights, metrics and a report. After an interruption it continues with --resume RUN."
    )
    return command, [*argv[:at], *argv[at + 1 :]], f"counterpoint train {slug}"


def system_index(argv: Sequence[str]) -> int | None:
    """Return the index of the word that names the system; None where all words belong to options.

    A word after an option counts as the option's value. Raises CounterpointError where a word is left that names no built system.
    """
    built = {row.slug for row in catalog.entries().values() if row.built}
    plain = [i for i, word in enumerate(argv) if not word.startswith("-") and not (i and argv[i - 1].startswith("-"))]
    for at in plain:
        if argv[at].split("+")[0] in built:
            return at
    if plain:
        catalog.load_system(argv[plain[0]])
    return None


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Return the last value of an option, `--option VALUE` or `--option=VALUE`; None when it is not given."""
    found = None
    for word, after in itertools.pairwise([*argv, ""]):
        if word == option or word.startswith(f"{option}="):
            found = after if word == option else word.partition("=")[2]
    return found or None


def without_additions(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the words of `--with ADDITION ...` from the others. Return the other words and the additions.

    The word after --with always counts as an addition. The words after it count as long as they name additions.
    """
    rest, additions, first, more = list[str](), list[str](), False, False
    for word, after in itertools.pairwise([*argv, "-"]):
        if word in ("--with", "--with=") and (word == "--with=" or after.startswith("-")):
            raise CounterpointError("--with needs the name of an addition; list them: counterpoint systems --additions")
        if word == "--with":
            first = True
        elif word.startswith("--with="):
            additions.append(word.removeprefix("--with="))
        elif not word.startswith("-") and (
            first or (more and word in catalog.entries() and catalog.get(word).addition)
        ):
            additions.append(word)
            first, more = False, True
        else:
            first = more = False
            rest.append(word)
    return rest, additions
