"""Generate pictures of prompts by a finished run: `counterpoint generate`.

>>> from counterpoint.use.generate import generate
>>> for found in generate("runs/first", ["a small red seven at the top left"], "pictures"):   # doctest: +SKIP
...     print(found.prompt, found.files)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from counterpoint.data.generation import Condition
from counterpoint.data.subject_folders import read_subject
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, RunError, check_seed
from counterpoint.experiment import load_learner
from counterpoint.files import check_empty, check_there
from counterpoint.report.generated import write_generated_report
from counterpoint.tasks.generation import GenerationLearner, enlarged

PAGE = "index.html"


class Generated(NamedTuple):
    """The pictures of a prompt."""

    prompt: str
    files: list[Path]
    unknown: list[str]  # words of the prompt that the run does not know


def generator_of(name: str, device: str = "cpu") -> GenerationLearner:
    """Load the learner of a finished run of the task generation onto a device. RunError for another run."""
    run = Run.open(name)
    if run.config.get("task") != "generation":
        raise RunError(
            f"{run.path} is a run of the task {run.config.get('task')}, which generates no pictures; name one of generation"
        )
    learner = load_learner(run).to(Loop(device=device).on())
    assert isinstance(learner, GenerationLearner)
    return learner


def generate(
    run: str,
    prompts: Sequence[str],
    out: Path | str,
    *,
    number: int = 8,
    seed: int = 0,
    subject: Path | str | None = None,
    device: str = "cpu",
) -> list[Generated]:
    """Generate pictures of each prompt, and write them with a page into a new folder.

    The folder has a PNG for each picture, named after the numbers of prompt and picture, and the page index.html. It is complete
    or not there at all.

    Args:
        run: path of a finished run of the task generation.
        prompts: texts in the style of the training captions.
        out: the folder, which must not exist or must be empty.
        number: pictures of each prompt, at least 1.
        seed: seed of the noise, which is the same on every device.
        subject: folder of pictures of one subject, for a run that takes one.
        device: device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises CounterpointError for a number below 1, no prompt, a prompt that does not fit, and a folder with files. Raises it too for
    a folder of a subject without pictures, and for a picture that cannot be read.
    """
    if number < 1:
        raise CounterpointError(f"number must be at least 1, got {number}")
    check_seed(seed)
    out = check_empty(out)
    check_there([] if subject is None else [subject])
    learner = generator_of(run, device)
    shown_subject = () if subject is None else tuple(read_subject(subject, learner.size))
    conditions = [Condition(prompt, shown_subject) for prompt in prompts for _ in range(number)]
    pictures = learner.generate(conditions, seed).cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        found, shown = [], []
        for n, prompt in enumerate(prompts):
            own = pictures[n * number : (n + 1) * number]
            names = [f"{n + 1:02d}-{k + 1:02d}.png" for k in range(number)]
            for name, picture in zip(names, own, strict=True):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(made / name)
            found.append(Generated(prompt, [out / name for name in names], learner.unknown_words(prompt)))
            shown.append((prompt, found[-1].unknown, [enlarged(picture) for picture in own]))
        write_generated_report(made / PAGE, run, seed, shown)
        made.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(made, out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return found
