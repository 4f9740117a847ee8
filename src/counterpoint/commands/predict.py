"""`counterpoint predict RUN`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Optional

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, Place, Text, complain, console, say, table, unset
from counterpoint.errors import CounterpointError
from counterpoint.files import check_there, check_writable
from counterpoint.words import counted

TEMPLATE, TOP, NEIGHBOURS, LEAST = "a photo of a {}", 3, 20, 0.5  # the defaults of options
SHOWN = 3  # objects of a picture that the terminal shows
Method = Optional[Literal["classifier", "prompts", "neighbours"]]  # noqa: UP045
LISTED = 20  # predictions that the terminal shows


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    pictures: Annotated[Positional[tuple[str, ...]], unset(metavar="PICTURE [PICTURE ...]")] = (),
    *,
    data: Annotated[Text, unset(metavar="SOURCE")] = None,
    split: Annotated[str, arg(metavar="all|train|valid|test")] = "test",
    method: Annotated[Method, unset()] = None,
    classes: Annotated[Place, unset(metavar="FILE")] = None,
    templates: Annotated[str, arg(metavar="TEXT|FILE")] = TEMPLATE,
    bank: Annotated[Text, unset(metavar="SOURCE")] = None,
    top: int = TOP,
    k: Annotated[int, arg(aliases=["-k"])] = NEIGHBOURS,
    least: float = LEAST,
    out: Annotated[Place, unset(aliases=["-o"], metavar="FILE")] = None,
    html: Annotated[Place, unset(metavar="FILE")] = None,
    device: Device = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Predict the classes of pictures, by a classifier, by prompts or by neighbours; with a detector, the objects in them.

    Give picture files and folders, or a data source. A file that cannot be read is reported, the others are classified, and the
    exit code is 2. A run of finetune-det detects objects in files and folders.

    Example: counterpoint predict runs/classifier photos/ -o found.csv --html found.html

    Example: counterpoint predict runs/clip photos/ --classes classes.txt --templates "a photo of a {}|a drawing of a {}"

    Example: counterpoint predict runs/simclr --data imagefolder:photos --method neighbours -k 10

    Example: counterpoint predict runs/boxes photos/ -o found.json --html found.html

    Args:
        run: A finished run. With a classifier: a labelled system, such as finetune. With prompts: a run that aligns pictures with
            texts. With neighbours: any run that embeds pictures.
        pictures: Picture files, and folders that are searched for them. Links are followed, hidden files are left out.
        data: A data source whose pictures to classify, instead of files.
        split: The split of the data source.
        method: Default: prompts with --classes, neighbours with --bank; otherwise the first that the run can do.
        classes: A text file with a class name on each line, for prompts. Default: the classes of the run's data.
        templates: Prompts with {} for the class: one, several between "|", or a text file with one on each line.
        bank: A data source whose labelled training pictures vote as neighbours. Default: the run's own data.
        top: Number of classes to give for each picture, at least 1.
        k: Number of neighbours that vote, at least 1.
        least: Least score of an object, 0 to 1, of a run that detects objects.
        out: The file to write: .csv, .json, .jsonl or .parquet. Objects as .json are in COCO's layout. Default: none.
        html: A page to write, with the least sure pictures and, where classes are known, the confusion. With a detector: the
            pictures with their objects. Default: none.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        json_: Print JSON.
    """
    if bool(pictures) == (data is not None):
        raise CounterpointError(
            "counterpoint predict needs picture files or folders, or --data SOURCE; give one of the two"
        )
    for file in (out, html):
        if file is not None:
            check_writable(file)
    if out is not None and html is not None and Path(out).resolve() == Path(html).resolve():
        raise CounterpointError(f"--out and --html both name {out}; name two files")
    from counterpoint.report.predicted import write_predicted_report
    from counterpoint.use import predict as room
    from counterpoint.use.hub import opened

    if out is not None and Path(out).suffix not in room.ENDINGS:
        raise CounterpointError(f"{out} has no known ending; name a file that ends in {', '.join(room.ENDINGS)}")
    files, others = ([], []) if data is not None else room.find_pictures(pictures)
    check_there([] if classes is None else [classes])

    if opened(run).config.get("task") == "boxes":
        given = {
            "--data": data is not None,
            "--split": split != "test",
            "--method": method is not None,
            "--classes": classes is not None,
            "--templates": templates != TEMPLATE,
            "--bank": bank is not None,
            "--top": top != TOP,
            "-k": k != NEIGHBOURS,
        }
        if wrong := [name for name, set_ in given.items() if set_]:
            raise CounterpointError(
                f"{run} detects objects in files and folders, without {wrong[0]}; `counterpoint evaluate` measures it on a "
                "data source"
            )
        _complain_of_others(others)
        return detect_objects(run, files, least, out, html, device, json_=json_)
    if least != LEAST:
        raise CounterpointError(f"--least is for a run that detects objects, such as of finetune-det; {run} is none")
    predictor = room.Predictor.load(
        opened(run), classes=classes, templates=templates, bank=bank, method=method, top=top, k=k, device=device
    )
    faults: list[tuple[str, str]] = []
    if data is not None:
        asked = predictor.asked(data, split)
    else:
        asked, faults = room.read_pictures(files, predictor.size)
        _complain_of_others(others)
    for name, fault in faults:
        complain(fault if name in fault else f"{name}: {fault}", "red")
    if not asked.names:
        raise CounterpointError("no picture could be read")
    found = predictor.predict(asked, progress=not json_)
    if out is not None:
        room.write_predictions(found, out)
    if html is not None:
        score = room.SCORES[predictor.method]
        write_predicted_report(
            html, str(predictor.encoder.run.path), score, predictor.classes, found, asked.read, faults
        )
    if json_:
        print(
            json.dumps(
                {"method": predictor.method, "failed": faults, "predictions": [asdict(one) for one in found]}, indent=2
            )
        )
        return 2 if faults else 0
    score = room.SCORES[predictor.method]
    known = any(one.true is not None for one in found)
    shown = table("picture", "class", score, "then", *(["in the data"] if known else []), right=(score,))
    for one in found[:LISTED]:
        then = ", ".join(f"{name} {value:.2f}" for name, value in one.others.items())
        shown.add_row(one.item, one.label, f"{one.score:.3f}", then, *([one.true or ""] if known else []))
    console().print(shown)
    if len(found) > LISTED:
        say(f"... and {len(found) - LISTED} more" + ("" if out else "; write all of them with -o FILE"))
    counts = Counter(one.label for one in found).most_common(5)
    say(f"{counted(len(found), 'picture')}: " + ", ".join(f"{name} {count}" for name, count in counts))
    if known:
        right = [one.true == one.label for one in found if one.true is not None]
        say(f"right: {sum(right)} of {len(right)} ({100 * sum(right) / len(right):.1f} %)")
    for what, file in (("File", out), ("Page", html)):
        if file is not None:
            say(f"{what}: {file}")
    return 2 if faults else 0


def _complain_of_others(files: list[str]) -> None:
    """Tell how many files of the folders are no pictures."""
    if files:
        what = "file that is no picture" if len(files) == 1 else "files that are no pictures"
        complain(f"left out {len(files)} {what}, such as {files[0]}")


def detect_objects(
    run: str, files: list[Path], least: float, out: Path | None, html: Path | None, device: str, *, json_: bool
) -> int:
    """Detect the objects of pictures, show and write them. Return the exit code."""
    from counterpoint.report.objects import write_objects_report
    from counterpoint.use.objects import ObjectDetector, write_objects

    detector = ObjectDetector.load(run, device=device)
    classes = detector.learner.regions[1:]
    found, faults = detector.detect(files, least=least, progress=not json_)
    for name, fault in faults:
        complain(f"{name}: {fault}", "red")
    if not found:
        raise CounterpointError("no picture could be read")
    if out is not None:
        write_objects(found, out, classes)
    if html is not None:
        write_objects_report(html, str(detector.run.path), classes, found, faults)
    if json_:
        print(json.dumps({"failed": faults, "pictures": [asdict(one) for one in found]}, indent=2))
        return 2 if faults else 0
    shown = table("picture", "objects", "surest", right=("objects",))
    for one in found[:LISTED]:
        surest = ", ".join(f"{of.label} {of.score:.2f}" for of in one.objects[:SHOWN])
        shown.add_row(one.picture, str(len(one.objects)), surest)
    console().print(shown)
    if len(found) > LISTED:
        say(f"... and {len(found) - LISTED} more" + ("" if out else "; write all of them with -o FILE"))
    counts = Counter(of.label for one in found for of in one.objects)
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common(5))
    say(f"{counted(counts.total(), 'object')} in {counted(len(found), 'picture')}" + (f": {listed}" if listed else ""))
    for what, file in (("File", out), ("Page", html)):
        if file is not None:
            say(f"{what}: {file}")
    return 2 if faults else 0
