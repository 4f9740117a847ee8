"""`counterpoint distill --teacher NAME --student NAME --data SOURCE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from counterpoint.commands.common import RUNS, Count, console, refuse_torchrun, say, settings_said, table, unset


def main(
    *,
    teacher: Annotated[str, arg(metavar="NAME")],
    student: Annotated[str, arg(metavar="NAME")],
    data: Annotated[str, arg(metavar="SOURCE")],
    method: Annotated[tuple[str, ...], arg(metavar="SLUG [SLUG ...]")] = ("vl2v-adip",),
    seeds: int = 1,
    epochs: Annotated[Count, unset(metavar="INT")] = None,
    batch_size: Annotated[Count, unset(metavar="INT")] = None,
    settings: Annotated[tuple[str, ...], unset(name="set", metavar="NAME=VALUE [NAME=VALUE ...]")] = (),
    name: str = "distill",
    out: Annotated[Path, arg(metavar="DIR")] = RUNS,
) -> int:
    """Distil a teacher into a student, and print what the student kept: accuracy, size, speed, ONNX size.

    Each method and seed has a run directory NAME-SLUG-SEED with the trained student and its encoder as student.onnx. Finished runs
    are kept and interrupted ones resumed, so the same command continues.

    Example: counterpoint distill --teacher run:runs/big --student timm:resnet18 --data imagefolder:photos --method kd crd

    Example: counterpoint distill --teacher hf:openai/clip-vit-base-patch32 --student timm:resnet18 --data imagefolder:photos

    Example: counterpoint distill --teacher run:runs/clip --student tower-128-4-32 --data manifest:pairs.csv --method tinyclip

    Args:
        teacher: The trained network: run:RUN, fit:SLUG?data=SOURCE, hf:NAME, open_clip:MODEL/WEIGHTS, file:X.npz; which of them
            depends on the method (see its --help).
        student: The student's encoder: timm:NAME, torchvision:NAME, hf:NAME, conv-s, resnet-s, vit-s and others. For tinyclip,
            tower-WIDTH-DEPTH-HEAD inherits from a teacher with towers, and "teacher" is cut out of it.
        data: The data source: NAME, NAME:PLACE or NAME?OPTION=VALUE (see `counterpoint data`).
        method: One or several systems with a teacher: kd, rkd, fitnets, crd, attention-transfer, vl2v-adip, vlm-ood-distill, kd3,
            tinyclip and others.
        seeds: Number of seeds, from 0 on; at least 1. With several, the table has a 95 % t interval.
        epochs: Number of epochs of all methods. Default: each method's own number for this data.
        batch_size: Examples a step of all methods. Default: each method's own number for this data.
        settings: Further settings, such as temperature=2 or text_encoder=text-s; a method that lacks one leaves it out.
        name: The beginning of the run directories' names.
        out: The folder of the run directories.
    """
    from counterpoint.distilling import distil

    refuse_torchrun("distill trains its students one after another, each in one process")
    given = settings_said(settings, epochs=epochs, batch_size=batch_size)
    record = distil(method, teacher, student, data, seeds=seeds, given=given, out=out, name=name, say=say)
    columns = (
        "method",
        "metric",
        "student",
        "95 % interval",
        "teacher",
        "kept",
        "parameters",
        "images a second",
        "ONNX",
    )
    shown = table(*columns, right=columns[2:], title=f"{student} from {teacher} on {data}")
    for row in record["rows"]:
        taught = row["teacher"]
        shown.add_row(
            row["method"],
            row["metric"],
            f"{row['mean']:.4f}",
            "-" if row["low"] != row["low"] else f"{row['low']:.4f} .. {row['high']:.4f}",
            "-" if taught is None else f"{taught:.4f}",
            "-" if not taught else f"{100 * row['mean'] / taught:.0f} %",
            of_two(row["parameters"] / 1e6, row["teacher_parameters"], 1e6, " M"),
            of_two(row["images_a_second"], row["teacher_images_a_second"], 1, ""),
            "-" if row["onnx_bytes"] is None else f"{row['onnx_bytes'] / 1e6:.2f} MB",
        )
    console().print(shown)
    say("student of teacher, where two numbers stand. Runs: " + ", ".join(record["runs"]))
    return 0


def of_two(student: float, teacher: float | None, unit: float, said: str) -> str:
    """Format a number of the student, and the teacher's where it is known."""
    digits = 2 if said else 0
    return f"{student:,.{digits}f}{said}" + ("" if teacher is None else f" of {teacher / unit:,.{digits}f}{said}")
