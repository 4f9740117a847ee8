"""Read and check a claim's protocol, `counterpoint/claims/<slug>.toml`.

A protocol fixes everything that decides an outcome before its seeds run: the sentence, its conjuncts with tests and margins,
data, settings, arms, tuning, seeds. `read` raises for an invalid protocol; `check_figures` raises for figures that cannot
decide it. Both raise ProtocolError, which names the claim and the fault.

An example of a file:

    sentence = "b beats a and costs no accuracy."
    kind = "outcome"                    # or "mechanism", "identity"
    data = "digits?size=8&train=600"    # drawn anew for each seed: the source takes `seed`
    seeds = 5
    minutes = 10                        # budget of processor time, all runs together

    [setting]                           # of all arms
    [arms.a]                            # what each arm changes
    [arms.b]

    [metrics.knn_accuracy]
    unit = "accuracy"                   # figures of different units never share an axis
    bounds = [0.0, 1.0]

    [[conjuncts]]                       # every part of the sentence, each with its own test
    says = "b beats a"
    arm = "b"
    baseline = "a"                      # or value = 0.0, a number to stand against
    metric = "knn_accuracy"
    direction = "higher"                # or "lower"
    test = "superiority"                # or "non-inferiority", "equivalence"
    margin = 0.0

    [tuning]                            # optional: the same grid for every arm, chosen on `valid`
    metric = "knn_accuracy"
    seeds = [100, 101, 102]
    [tuning.grid]
    lr = [0.001, 0.003]

`[[reported]]` has the form of `[[conjuncts]]`; its entries are shown without a verdict. `[variants.NAME]` replaces keys of
the claim, and the variant is reported beside the claim. `tuning = {}` in a variant omits the tuning.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, cast

from counterpoint import catalog
from counterpoint.errors import CounterpointError, ProtocolError
from counterpoint.lab import statistics

KINDS = ("outcome", "mechanism", "identity")
DIRECTIONS = ("higher", "lower")
LEAST_SEEDS = 5
FIRST_PILOT = 100  # a claim's seeds are 0 to 99, pilots start here
MOST_MINUTES = 60.0  # of processor time: 25 minutes on two cores, and a reserve
NEAR_BOUND = 0.01  # of a metric's range

Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> seed -> metric -> figure


@dataclass(frozen=True)
class Metric:
    """The meaning of a figure.

    Args:
        unit: Unit of the figure: "accuracy", "correlation". Only equal units share an axis.
        bounds: Least and greatest possible value; infinite where there is no bound.
        only_in: Arms in which the figure has this meaning; empty: all arms. In other arms the figure is absent or has
            another meaning.
        constant_in: Arms whose value is constant by construction.
        says: Description of the measured quantity.
    """

    unit: str
    bounds: tuple[float, float] = (-math.inf, math.inf)
    only_in: tuple[str, ...] = ()
    constant_in: tuple[str, ...] = ()
    says: str = ""


@dataclass(frozen=True)
class Conjunct:
    """One part of a claim's sentence: `arm` against another arm, or against a number.

    Args:
        says: This part of the sentence.
        arm: The arm to judge.
        metric: Name of a figure in `metrics`.
        baseline: The arm to compare with, paired by seed.
        value: The number to compare with, instead of a baseline.
        beyond: Two arms whose difference is subtracted: (arm - baseline) - (beyond[0] - beyond[1]), an interaction.
        direction: "higher" or "lower": the better direction.
        test: "superiority", "non-inferiority" or "equivalence"; see `lab.statistics`.
        margin: Margin in the metric's unit, at least 0. The interval's bound is compared with it.
        expected: Difference that the plan expected. It is recorded and not used.
    """

    says: str
    arm: str
    metric: str
    baseline: str | None = None
    value: float | None = None
    beyond: tuple[str, str] | None = None
    direction: str = "higher"
    test: statistics.Test = "superiority"
    margin: float = 0.0
    expected: float | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms whose figures the conjunct uses."""
        return (self.arm, *((self.baseline,) if self.baseline is not None else ()), *(self.beyond or ()))

    @property
    def against(self) -> str:
        """The name of the baseline, the number or the pair of arms that the arm is compared with."""
        if self.baseline is None:
            return f"{self.value:g}"
        return self.baseline if self.beyond is None else " - ".join(self.beyond)

    @property
    def judged(self) -> str:
        """The name of the judged arm, or of the judged difference of arms."""
        return self.arm if self.beyond is None else f"{self.arm} - {self.baseline}"

    def differences(self, results: Results, seeds: Sequence[int]) -> list[float]:
        """Return the gain of each seed; positive is better."""
        sign = 1.0 if self.direction == "higher" else -1.0

        def figure(arm: str, seed: int) -> float:
            return results[arm][str(seed)][self.metric]

        found = []
        for seed in seeds:
            base = figure(self.baseline, seed) if self.baseline is not None else float(self.value or 0.0)
            gain = figure(self.arm, seed) - base
            if self.beyond is not None:
                gain -= figure(self.beyond[0], seed) - figure(self.beyond[1], seed)
            found.append(sign * gain)
        return found


@dataclass(frozen=True)
class Tuning:
    """A search that is the same for every arm: each grid point is trained on pilot seeds and measured on `valid`.

    Args:
        metric: Name of the figure on `valid` that chooses, without a prefix.
        seeds: Pilot seeds, from 100 on, so none is the claim's.
        grid: Maps each setting to its values. Every combination is tried.
        direction: "higher" or "lower": the better direction.
    """

    metric: str
    seeds: tuple[int, ...]
    grid: dict[str, tuple[Any, ...]]
    direction: str = "higher"

    def points(self) -> list[dict[str, Any]]:
        """Return all combinations of the grid's values, in the order of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Protocol:
    """A claim as `counterpoint/claims/<slug>.toml` states it. The module's docstring explains the fields."""

    slug: str
    sentence: str
    kind: str
    data: str
    arms: dict[str, dict[str, Any]]
    metrics: dict[str, Metric]
    conjuncts: tuple[Conjunct, ...]
    seeds: int = LEAST_SEEDS
    minutes: float = MOST_MINUTES
    setting: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    reported: tuple[Conjunct, ...] = ()
    quick: dict[str, Any] = field(default_factory=dict)
    quick_data_options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    variants: dict[str, Protocol] = field(default_factory=dict)
    sha256: str = ""
    path: str = ""  # path of its file, where there is one

    def options(self, seed: int, *, quick: bool = False) -> dict[str, Any]:
        """Return the keyword arguments of the source for one seed. Each seed draws its own data."""
        return self.data_options | (self.quick_data_options if quick else {}) | {"seed": seed}

    def settings(self, arm: str, point: Mapping[str, Any] | None = None, *, quick: bool = False) -> dict[str, Any]:
        """Return the settings of one arm, with a point of the tuning grid where one is given."""
        return self.setting | (self.quick if quick else {}) | dict(point or {}) | self.arms[arm]

    @property
    def compared(self) -> tuple[Conjunct, ...]:
        """All comparisons: the conjuncts, then the ones that are only reported."""
        return (*self.conjuncts, *self.reported)


def slugs() -> list[str]:
    """Return the names of the systems with a protocol, in the catalogue's order."""
    folder = resources.files("counterpoint").joinpath("claims")
    there = {entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return [slug for slug in catalog.entries() if slug in there]


@cache
def of_system(slug: str) -> Protocol:
    """Read the protocol of a system.

    Raises ProtocolError for an invalid protocol, CounterpointError for a system that is unknown or has no protocol.
    """
    entry = catalog.get(slug)
    file = resources.files("counterpoint").joinpath("claims", f"{slug}.toml")
    if not file.is_file():
        why = "is a baseline" if entry.built else "is planned"
        raise CounterpointError(f"{slug} {why} without its own claim; compare it: counterpoint compare {slug} ...")
    content = file.read_bytes()
    return replace(read(content.decode(), slug), sha256=hashlib.sha256(content).hexdigest(), path=str(file))


def of_file(path: Path | str) -> Protocol:
    """Read a protocol from any file. The file's name without ending is the claim's name."""
    path = Path(path)
    content = path.read_bytes()
    return replace(read(content.decode(), path.stem), sha256=hashlib.sha256(content).hexdigest(), path=str(path))


def read(text: str, slug: str) -> Protocol:
    """Read a protocol from TOML. ProtocolError names the first fault."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProtocolError(f"claim of {slug}: not valid TOML: {error}") from error
    variants = raw.pop("variants", {})
    main = _protocol(raw, slug, "the claim")
    found = {}
    for name, changes in variants.items():
        merged = dict(raw)
        for key, value in changes.items():
            merged[key] = raw.get(key, {}) | value if key in ("setting", "data_options", "metrics") else value
        if merged.get("tuning") == {}:
            del merged["tuning"]
        found[name] = _protocol(merged, slug, f"variant '{name}'")
    return replace(main, variants=found)


class _Reader:
    """A reader of one protocol's tables. Every error names the protocol."""

    def __init__(self, slug: str, part: str) -> None:
        self.slug, self.part = slug, part

    def refuse(self, fault: str) -> ProtocolError:
        return ProtocolError(f"claim of {self.slug}, {self.part}: {fault}")

    def known(self, table: Mapping[str, Any], of: type, where: str, hidden: Sequence[str] = ()) -> None:
        names = {f.name for f in fields(of)} - set(hidden)
        for name in table:
            if name not in names:
                raise self.refuse(f"unknown field '{name}' in {where}; known: {', '.join(sorted(names))}")

    def taken(self, table: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
        if name not in table:
            raise self.refuse(f"{where} lacks '{name}'")
        value = table[name]
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise self.refuse(f"'{name}' in {where} has the wrong type ({type(value).__name__})")
        return value

    def one_of(self, value: str, choices: Sequence[str], name: str, where: str) -> str:
        if value not in choices:
            raise self.refuse(f"{name} in {where} is {' or '.join(choices)}, not '{value}'")
        return value

    def number(self, value: Any, name: str, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise self.refuse(f"'{name}' in {where} should be a number")
        return float(value)


def _protocol(raw: Mapping[str, Any], slug: str, part: str) -> Protocol:
    reader = _Reader(slug, part)
    if "data_seeded" in raw and raw["data_seeded"] is not True:
        raise reader.refuse("data_seeded = false: data must be drawn again for each seed; leave data_seeded out")
    raw = {name: value for name, value in raw.items() if name != "data_seeded"}
    reader.known(raw, Protocol, "the file", hidden=("slug", "variants", "sha256", "path"))
    arms = reader.taken(raw, "arms", dict, "the file")
    if len(arms) < 1 or not all(isinstance(changes, dict) for changes in arms.values()):
        raise reader.refuse("'arms' needs a table for each arm")
    metrics = {name: _metric(reader, name, table, arms) for name, table in raw.get("metrics", {}).items()}
    conjuncts = tuple(_conjunct(reader, row, arms, metrics) for row in raw.get("conjuncts", ()))
    if not conjuncts:
        raise reader.refuse("no conjunct: name every comparison of the sentence under [[conjuncts]]")
    seeds = raw.get("seeds", LEAST_SEEDS)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not LEAST_SEEDS <= seeds <= FIRST_PILOT:
        raise reader.refuse(f"seeds = {seeds}: a claim needs {LEAST_SEEDS} to {FIRST_PILOT} seeds")
    minutes = reader.number(raw.get("minutes", MOST_MINUTES), "minutes", "the file")
    if not 0 < minutes <= MOST_MINUTES:
        raise reader.refuse(
            f"minutes = {minutes:g}: the budget must be above 0 and at most {MOST_MINUTES:g} processor minutes"
        )
    return Protocol(
        slug=slug,
        sentence=reader.taken(raw, "sentence", str, "the file"),
        kind=reader.one_of(reader.taken(raw, "kind", str, "the file"), KINDS, "kind", "the file"),
        data=reader.taken(raw, "data", str, "the file"),
        arms={name: dict(changes) for name, changes in arms.items()},
        metrics=metrics,
        conjuncts=conjuncts,
        seeds=seeds,
        minutes=minutes,
        setting=dict(raw.get("setting", {})),
        data_options=dict(raw.get("data_options", {})),
        tuning=_tuning(reader, raw["tuning"], arms, seeds) if "tuning" in raw else None,
        reported=tuple(_conjunct(reader, row, arms, metrics) for row in raw.get("reported", ())),
        quick=dict(raw.get("quick", {})),
        quick_data_options=dict(raw.get("quick_data_options", {})),
        notes=tuple(raw.get("notes", ())),
    )


def _metric(reader: _Reader, name: str, table: Mapping[str, Any], arms: Mapping[str, Any]) -> Metric:
    where = f"[metrics.{name}]"
    reader.known(table, Metric, where)
    if name.endswith("_best"):
        raise reader.refuse(f"metric '{name}' is chosen on the test split; use the figure after the last epoch")
    if name.startswith("valid_"):
        raise reader.refuse(
            f"metric '{name}' is of the valid split, on which settings are chosen; judge by test figures"
        )
    bounds = table.get("bounds", [-math.inf, math.inf])
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise reader.refuse(f"'bounds' in {where} must be two numbers")
    low, high = (reader.number(bound, "bounds", where) for bound in bounds)
    if not low < high:
        raise reader.refuse(f"'bounds' in {where} must be the lower, then the upper bound")
    for key in ("only_in", "constant_in"):
        for arm in table.get(key, ()):
            if arm not in arms:
                raise reader.refuse(f"'{key}' in {where} names an arm that is not there: '{arm}'")
    return Metric(
        unit=reader.taken(table, "unit", str, where),
        bounds=(low, high),
        only_in=tuple(table.get("only_in", ())),
        constant_in=tuple(table.get("constant_in", ())),
        says=str(table.get("says", "")),
    )


def _conjunct(
    reader: _Reader, row: Mapping[str, Any], arms: Mapping[str, Any], metrics: Mapping[str, Metric]
) -> Conjunct:
    where = f"conjunct '{row.get('says', '?')}'"
    reader.known(row, Conjunct, where)
    metric = reader.taken(row, "metric", str, where)
    if metric.endswith("_best"):
        raise reader.refuse(
            f"{where}: metric '{metric}' is chosen on the test split; use the figure after the last epoch"
        )
    if metric not in metrics:
        raise reader.refuse(f"{where}: metric '{metric}' lacks its table [metrics.{metric}] with unit and bounds")
    baseline, value = row.get("baseline"), row.get("value")
    if (baseline is None) == (value is None):
        raise reader.refuse(f"{where} needs either a baseline or a value to compare with")
    beyond = row.get("beyond")
    if beyond is not None and (not isinstance(beyond, list) or len(beyond) != 2 or baseline is None):
        raise reader.refuse(f"{where}: 'beyond' must be a list of two arms, and needs a baseline")
    test = reader.one_of(row.get("test", "superiority"), statistics.TESTS, "test", where)
    margin = reader.number(row.get("margin", 0.0), "margin", where)
    if margin < 0 or not math.isfinite(margin):
        raise reader.refuse(
            f"{where}: margin must be at least 0; for 'not worse by more than m' use test = \"non-inferiority\""
        )
    if test != "superiority" and margin == 0:
        raise reader.refuse(f'{where}: test = "{test}" needs a margin above 0')
    expected = row.get("expected")
    found = Conjunct(
        says=reader.taken(row, "says", str, where),
        arm=reader.taken(row, "arm", str, where),
        metric=metric,
        baseline=baseline,
        value=None if value is None else reader.number(value, "value", where),
        beyond=None if beyond is None else (beyond[0], beyond[1]),
        direction=reader.one_of(row.get("direction", "higher"), DIRECTIONS, "direction", where),
        test=cast("statistics.Test", test),
        margin=margin,
        expected=None if expected is None else reader.number(expected, "expected", where),
    )
    for arm in found.arms:
        if arm not in arms:
            raise reader.refuse(f"{where} names an arm that is not there: '{arm}'")
    if found.baseline == found.arm:
        raise reader.refuse(f"{where} compares an arm with itself")
    meaning = metrics[metric]
    for arm in found.arms:
        if meaning.only_in and arm not in meaning.only_in:
            raise reader.refuse(
                f"{where}: metric '{metric}' has another meaning in arm '{arm}' (only_in: {', '.join(meaning.only_in)})"
            )
        if arm != found.arm and arm in meaning.constant_in:
            raise reader.refuse(
                f"{where}: '{metric}' of baseline '{arm}' is constant by construction; compare with a value instead"
            )
    return found


def _tuning(reader: _Reader, table: Mapping[str, Any], arms: Mapping[str, Any], seeds: int) -> Tuning:
    where = "[tuning]"
    if "arms" in table:
        raise reader.refuse("the tuning grid differs between arms ([tuning.arms]); one grid serves all")
    reader.known(table, Tuning, where)
    pilots = reader.taken(table, "seeds", list, where)
    for seed in pilots:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise reader.refuse(f"'seeds' in {where} must be whole numbers")
        if seed < FIRST_PILOT:
            what = "is a seed of the claim" if 0 <= seed < seeds else "may become a seed of the claim"
            raise reader.refuse(f"pilot seed {seed} {what}; pilots are {FIRST_PILOT} and up")
    if not pilots or len(set(pilots)) < len(pilots):
        raise reader.refuse(f"'seeds' in {where} must be one or more different pilot seeds")
    grid = reader.taken(table, "grid", dict, where)
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise reader.refuse(f"'grid' in {where} needs a list of values for each setting")
    for arm, changes in arms.items():
        if fixed := sorted(set(changes) & set(grid)):
            raise reader.refuse(
                f"the tuning grid differs between arms: arm '{arm}' fixes {', '.join(fixed)}, which the grid searches"
            )
    metric = reader.taken(table, "metric", str, where)
    if metric.startswith(("test_", "test/")):
        raise reader.refuse(f"tuning by '{metric}' would choose on the test split; name a figure of valid")
    return Tuning(
        metric=metric.removeprefix("valid/").removeprefix("valid_"),
        seeds=tuple(pilots),
        grid={name: tuple(values) for name, values in grid.items()},
        direction=reader.one_of(table.get("direction", "higher"), DIRECTIONS, "direction", where),
    )


def fault(protocol: Protocol, conjunct: Conjunct, results: Results, seeds: Sequence[int]) -> str | None:
    """Return the reason why figures cannot decide a conjunct, or None where they can.

    There are three reasons: a figure is missing or not finite in an arm; a baseline's values are all equal (to the rounding
    of float32); all arms lie within 1 % of a bound of the metric.
    """
    meaning = protocol.metrics[conjunct.metric]
    values: dict[str, list[float]] = {}
    for arm in conjunct.arms:
        found = [results.get(arm, {}).get(str(seed), {}).get(conjunct.metric) for seed in seeds]
        if any(value is None for value in found):
            return f"metric '{conjunct.metric}' is missing in arm '{arm}'"
        values[arm] = [float(value) for value in found if value is not None]
        if not all(math.isfinite(value) for value in values[arm]):
            return f"metric '{conjunct.metric}' is not a finite number in arm '{arm}'"
    low, high = meaning.bounds
    if len(values) > 1 and math.isfinite(low) and math.isfinite(high):
        near = NEAR_BOUND * (high - low)
        means = [sum(v) / len(v) for v in values.values()]
        for bound, name in ((high, "ceiling"), (low, "floor")):
            if all(abs(mean - bound) <= near for mean in means):
                return f"{name}: all arms lie within 1 % of {bound:g}, the bound of '{conjunct.metric}'"
    if len(seeds) > 1:
        for arm in conjunct.arms[1:]:
            if statistics.constant(values[arm]):
                return (
                    f"'{conjunct.metric}' of baseline '{arm}' is constant: {values[arm][0]:g} on every seed; "
                    "stand against a value or choose another baseline"
                )
    return None


def check_figures(protocol: Protocol, results: Results, seeds: Sequence[int]) -> None:
    """Raise ProtocolError for the first conjunct that the figures cannot decide; see `fault`."""
    for conjunct in protocol.conjuncts:
        if found := fault(protocol, conjunct, results, seeds):
            raise ProtocolError(f"claim of {protocol.slug}, conjunct '{conjunct.says}': {found}")
