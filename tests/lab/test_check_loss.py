"""`check_loss` names each planted fault, and finds none in a right loss."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from counterpoint import cli
from counterpoint.errors import CounterpointError
from counterpoint.lab.check_loss import Crew, check_loss, names
from counterpoint.lab.loss_checks import processes
from counterpoint.lab.loss_checks.given import Outcome, read_settings
from counterpoint.lab.loss_checks.inputs import draw, joined, parse, share
from counterpoint.lab.loss_checks.processes import gradient_of, value_of
from counterpoint.lab.loss_checks.report import markdown

PLANTED = str(Path(__file__).parent / "planted_losses.py")
ALONE = names(())


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(3) as crew:
        yield crew


def checked(name, only, crew=None, worlds=(), **options):
    """Make some checks of a planted loss."""
    skip = [other for other in names(worlds) if other not in only]
    return check_loss(f"{PLANTED}:{name}", size=8, dim=4, skip=skip, crew=crew, worlds=worlds, **options)


# --- over processes ---------------------------------------------------------------------------------------------------


def test_a_right_loss_holds_over_two_and_three_processes_and_uneven_batches(crew):
    report = checked("right", ["2 processes", "3 processes", "3 processes, uneven"], crew, (2, 3))
    assert report.holds
    assert len(report.checks) == 6
    assert {check.convention for check in report.checks} == {"whole batch", "mean"}
    assert all(check.error < 1e-12 for check in report.checks)


def test_a_gather_without_gradient_is_named(crew):
    report = checked("cut", ["2 processes"], crew, (2,))
    assert report["2 processes: value"].convention == "mean"
    gradient = report["2 processes: gradient"]
    assert (gradient.verdict, gradient.convention) == ("fails", "mixed")
    assert "input 1: the mean is right" in gradient.found  # each query sees all keys
    assert "input 2: the mean is 0." in gradient.found
    assert not report.holds


def test_a_gradient_that_is_w_times_too_small_follows_the_sum(crew):
    report = checked("summed", ["3 processes"], crew, (3,))
    assert report["3 processes: value"].convention == "whole batch"
    gradient = report["3 processes: gradient"]
    assert (gradient.verdict, gradient.convention) == ("fails", "sum")
    assert "3 times too small" in gradient.found
    assert gradient.error == pytest.approx(2 / 3)


def test_a_loss_times_w_has_a_right_gradient_and_a_wrong_value(crew):
    report = checked("summed", ["2 processes"], crew, (2,), settings={"factor": "world"})
    assert (report["2 processes: value"].verdict, report["2 processes: value"].convention) == ("fails", "W times")
    assert (report["2 processes: gradient"].verdict, report["2 processes: gradient"].convention) == ("holds", "mean")


def test_a_loss_of_each_process_s_own_batch_is_named(crew):
    report = checked("own_batch", ["2 processes"], crew, (2,))
    assert [(check.verdict, check.convention) for check in report.checks] == [("fails", "own batch")] * 2


def test_rank_and_world_reach_the_constructor_and_parameters_are_compared(crew):
    settings = {"rank": "{rank}", "world": "{world}", "scale": 2.0}
    report = checked("Placed", ["2 processes", "2 processes, uneven"], crew, (2,), settings=settings)
    assert report["2 processes: value"].convention == "mean"
    assert report["2 processes: gradient"].convention == "mean"
    assert report["2 processes, uneven: value"].convention == "own batch"  # a mean of means weighs items unequally


def test_a_gather_of_unequal_batches_ends_in_an_error_and_the_next_loss_is_checked(crew):
    report = checked("cut", ["2 processes, uneven"], crew, (2,))
    assert {check.verdict for check in report.checks} == {"error"}
    assert "process" in report.checks[0].found
    assert checked("right", ["2 processes"], crew, (2,)).holds


@pytest.mark.slow
def test_processes_that_wait_for_each_other_are_ended(monkeypatch):
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 1.0)
    with Crew(2) as crew:
        report = checked("waits_for_ever", ["2 processes"], crew, (2,))
    assert "the processes wait for each other" in report["2 processes: gradient"].found
    assert report["2 processes: gradient"].verdict == "error"


def outcome(value, rows, **learnt):
    learnt = {name: torch.tensor(number, dtype=torch.float64) for name, number in learnt.items()}
    return Outcome(torch.tensor(value, dtype=torch.float64), [torch.tensor(rows, dtype=torch.float64)], learnt)


WHOLE = outcome(2.0, [[1.0], [2.0], [3.0]], scale=4.0)
ALONE_OF_TWO = [outcome(9.0, [[7.0], [8.0]], scale=1.0), outcome(8.0, [[5.0]], scale=1.0)]


@pytest.mark.parametrize(
    ("values", "convention", "verdict"),
    [
        ((2.0, 2.0), "whole batch", "holds"),
        ((1.0, 3.0), "mean", "holds"),
        ((9.0, 8.0), "own batch", "fails"),
        ((4.0, 4.0), "W times", "fails"),
        ((1.5, 0.5), "sum", "fails"),
        ((2.5, 1.0), "weighted mean", "fails"),
        ((2.5, 1.1), "neither", "fails"),
    ],
)
def test_the_convention_of_values_is_named(values, convention, verdict):
    found = [outcome(value, [[0.0]], scale=0.0) for value in values]
    compared = value_of(found, WHOLE, ALONE_OF_TWO, [2, 1], 1e-6)
    assert (compared.convention, compared.verdict) == (convention, verdict)


@pytest.mark.parametrize(
    ("rows", "scales", "convention", "words"),
    [
        (([[2.0], [4.0]], [[6.0]]), (4.0, 4.0), "mean", "the mean over the processes is"),
        (([[1.0], [2.0]], [[3.0]]), (1.0, 3.0), "sum", "the mean is 2 times too small"),
        (
            ([[1.0], [2.0]], [[3.0]]),
            (4.0, 4.0),
            "mixed",
            "input 1: the mean is 2 times too small; scale: the mean is right",
        ),
        (([[7.0], [8.0]], [[5.0]]), (1.0, 1.0), "own batch", "its own batch"),
        (([[3.0], [6.0]], [[9.0]]), (6.0, 6.0), "scaled", "input 1, scale: the mean is 1.5 times the gradient"),
        (([[1.0], [1.0]], [[1.0]]), (9.0, 9.0), "mixed", "in another direction; scale: the mean is 2.25 times"),
    ],
)
def test_the_convention_of_gradients_is_named(rows, scales, convention, words):
    found = [outcome(2.0, part, scale=scale) for part, scale in zip(rows, scales, strict=True)]
    compared = gradient_of(parse("n d", 1), found, WHOLE, ALONE_OF_TWO, [2, 1], 1e-6)
    assert compared.convention == convention
    assert words in compared.found
    assert compared.verdict == ("holds" if convention == "mean" else "fails")


# --- in one process ---------------------------------------------------------------------------------------------------


def test_a_right_loss_holds_alone():
    report = checked("right", ALONE)
    assert [check.name for check in report.checks if check.verdict != "holds"] == []
    assert report.reference == "float64"
    assert report["float32"].error < 1e-5
    assert 1e-5 < report["float16"].error < 0.02
    assert {"torch", "python"} <= set(report.versions)


@pytest.mark.parametrize(
    ("name", "inputs", "check", "verdict", "words"),
    [
        ("inverse_distance", "n d", "duplicates", "fails", "inf"),
        ("inverse_distance", "n d", "float32", "holds", ""),
        ("overflows_in_half", "n d, n d", "float16", "fails", "the loss is"),
        ("overflows_in_half", "n d, n d", "float32", "holds", ""),
        ("KeepsGraphs", "n d, n d", "memory", "fails", "bytes a step"),
        ("KeepsRows", "n d, n d", "memory", "fails", "grow by 128 bytes a step"),
        ("Queue", "n d, n d", "memory", "holds", ""),
        ("refuses_second_derivatives", "n d", "double backward", "error", "NotImplementedError: the cube has"),
        ("silent_second_derivative", "n d", "double backward", "fails", "without an error"),
        ("refuses_one_item", "n d, n d", "batch of one", "error", "ValueError: two items at least"),
        ("root_of_variance", "n d, n d", "batch of one", "fails", "nan"),
        ("root_of_variance", "n d, n d", "collapsed rows", "fails", "inf"),
        ("overflows_in_half", "n d, n d", "zero row", "fails", "times as large as for ordinary rows"),
        ("whole_numbers", "n d", "double backward", "holds", ""),
        ("whole_numbers", "n d", "equal views", "not applicable", "an item has one row"),
        ("whole_numbers", "n d", "float32", "not applicable", "does not support a wider type"),
    ],
)
def test_a_planted_fault_is_named(name, inputs, check, verdict, words):
    (found,) = checked(name, [check], inputs=inputs).checks
    assert (found.verdict, found.name) == (verdict, check), found
    assert words in found.found
    assert found.meaning.endswith(".")


def test_zero_and_huge_rows_are_not_applicable_to_rows_of_length_one():
    report = checked("right", ["zero row", "zero logits", "huge logits", "duplicates"], normalize=True)
    assert [check.verdict for check in report.checks] == ["holds", *["not applicable"] * 3]
    assert report.holds


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def test_mappings_pairs_and_names_are_handled():
    assert checked("mapping", ["float32"]).holds
    assert checked("pair", ["float32"], output="1").holds
    assert checked("supervised", ["float32"], inputs="2n d, labels=2n:int, scale=2.0").holds


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pair", {}, "choose one with --output: 0, 1"),
        ("mapping", {"output": "los"}, "it returns: logits, loss, other"),
        ("per_row", {}, r"of shape \[8\], not one number"),
        ("right", {"inputs": "n d"}, "describe its inputs with --inputs"),
        ("right", {"settings": {"tau": 1}}, "tau"),
        ("right", {"inputs": "n d, m d"}, "cannot read the input 'm d'"),
        ("right", {"inputs": "n d, n e"}, "cannot read 'e'"),
        ("right", {"inputs": "n:int"}, "no rows with a gradient"),
        ("rihgt", {}, "did you mean right"),
    ],
)
def test_a_loss_that_cannot_be_called_raises_an_error(name, options, words):
    with pytest.raises(CounterpointError, match=words):
        checked(name, ["float32"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "right"}, "module:name or file.py:name"),
        ({"loss": "nowhere_at_all:right"}, "cannot import nowhere_at_all"),
        ({"loss": "nowhere.py:right"}, "no such file"),
        ({"loss": "math:pi"}, "cannot be called"),
        ({"size": 3}, "--size must be at least 4"),
        ({"worlds": (1,)}, "--processes must be 2 or more"),
        ({"skip": ["float23"]}, "unknown check 'float23'; did you mean float32"),
    ],
)
def test_bad_arguments_raise_an_error(options, words):
    with pytest.raises(CounterpointError, match=words):
        check_loss(**{"loss": f"{PLANTED}:right", **options})


def test_settings_are_read_as_values():
    found = read_settings(["a=0.1", "b=true", "c=none", "d=world", "e={rank}", "f=(1, 2)", "g=1e-3"])
    assert found == {"a": 0.1, "b": True, "c": None, "d": "world", "e": "{rank}", "f": (1, 2), "g": 0.001}
    with pytest.raises(CounterpointError, match="NAME=VALUE"):
        read_settings(["temperature"])


def test_shares_of_all_views_make_the_batch_again():
    items = parse("2n d, n 3:fixed, 2n:int, 10.0", 4)
    batch = draw(items, 7, classes=3, normalize=False)
    assert [list(t.shape) for t in batch] == [[14, 4], [7, 3], [14], []]
    counts = [3, 3, 1]
    shares = [share(items, batch, counts, rank) for rank in range(3)]
    assert torch.equal(shares[1][0], batch[0][[3, 4, 5, 10, 11, 12]])
    for number, item in enumerate(items[:3]):
        assert torch.equal(joined(item, [part[number] for part in shares], counts), batch[number])
    assert torch.equal(batch[2][:7], batch[2][7:])


def test_changes_of_rows_are_the_named_ones():
    items = parse("n d, n d", 4)

    def rows(change):
        return draw(items, 5, classes=2, normalize=False, change=change)

    a, b = rows("none")
    assert 0.1 < float(torch.cosine_similarity(a, b).mean()) < 0.9
    assert torch.equal(rows("duplicates")[0][0], rows("duplicates")[0][1])
    assert torch.equal(*rows("equal views"))
    assert len(rows("collapsed")[1].unique(dim=0)) == 1
    assert float(rows("zero row")[0][0].abs().max()) == 0 < float(rows("zero row")[0][1].abs().min())
    assert float(rows("zero rows")[1].abs().max()) == 0
    assert torch.equal(rows("huge")[0], a * 1e4)
    assert float(draw(items, 5, classes=2, normalize=True)[0].norm(dim=1).sub(1).abs().max()) < 1e-12


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_report(tmp_path, capsys):
    file = tmp_path / "report.json"
    skip = [name for name in names(()) if name not in ("float32", "batch of one")]
    words = ["check-loss", f"{PLANTED}:refuses_one_item", "--size", "8", "--json", str(file), "--skip", *skip]
    assert cli.main([*words, "--processes"]) == 1
    out = capsys.readouterr().out
    assert "float32" in out
    assert "ValueError: two items at least" in out
    assert "batch of one: The last batch of an epoch may have one item" in out
    record = json.loads(file.read_text())
    assert [check["verdict"] for check in record["checks"]] == ["holds", "error"]
    assert record["holds"] is False
    skip.append("batch of one")
    assert cli.main([*words[:6], "--skip", *skip, "--set", "--normalise", "--processes"]) == 0


def test_the_command_exits_with_2_for_bad_input(capsys):
    assert cli.main(["check-loss", f"{PLANTED}:right", "--inputs", "n x"]) == 2
    assert "cannot read 'x'" in capsys.readouterr().err


def test_the_recorded_losses_have_a_row_each_and_ours_hold_over_processes():
    losses = json.loads((Path(__file__).parents[2] / "results" / "check-loss.json").read_text())["losses"]
    rows = markdown(losses).splitlines()[2:]
    assert len(rows) == len(losses)
    assert {loss["library"] for loss in losses} >= {"counterpoint", "lightly", "open_clip_torch", "stable-pretraining"}
    ours = [row for row in rows if row.startswith("| counterpoint")]
    assert len(ours) == 7
    assert all("| holds | holds | holds |" in row for row in ours)
    (default,) = [row for row in rows if "local_loss=False, gather_with_grad=False" in row]
    assert "input 1, input 2: the mean is 2 times too small; logit_scale: the mean is right" in default


def test_a_report_with_infinite_errors_is_json():
    report = checked("overflows_in_half", ["float16"])
    assert math.isinf(report["float16"].error)
    assert json.loads(json.dumps(report.record(), allow_nan=False))["checks"][0]["error"] == "inf"
