"""The user's own data as an object in memory, under a name that a run can keep: `memory:KIND?rows=N&digest=D`.

A string names a data source everywhere: in config.yaml, in a file of embeddings, between functions. An object's name consists
of its kind, its length, a digest of its contents and its options. Within this process the name gives the object while its `Own`
exists. In another process the name raises an error that tells the user which object to pass.

    own = Own.of(frame, size=32)     # reads the object once
    own.spec                         # "memory:pandas.DataFrame?rows=600&digest=0f3a...&size=32"
    data.load(own.spec)              # the form of a task: ImageData, AlignedData or BagData
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.images import ImageData, Indices, checked_size, split_positions
from counterpoint.data.own.contracts import aligned_data, image_data, target_data
from counterpoint.data.own.objects import GROUP, Digest, kind_of, table_of
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.reader import Column, Reader
from counterpoint.data.own.roles import Role, image_roles, manifest_roles, target_roles
from counterpoint.data.own.sources import Wanted
from counterpoint.data.own.splits import FRACTION
from counterpoint.data.own.table import Table, factorise
from counterpoint.data.pairs import AlignedData
from counterpoint.data.sounds import checked_rate
from counterpoint.data.targets import TargetData
from counterpoint.data.valid import SHARE, by_content, carve, linked
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.words import counted

NAME = "memory"
SIZE = 64  # pixels, where the object has no size of its own
_GIVEN: WeakValueDictionary[str, Own] = WeakValueDictionary()


@dataclass(frozen=True)
class Options:
    """Options for reading an object. The defaults are those of `manifest:`."""

    size: int = 0
    """Height and width of pictures in pixels, 8 to 4096. 0: the pictures' own size where they are one array, else 64."""
    rate: int = 16000
    """Samples per second of sounds, 1000 to 192000."""
    seconds: float = 2.0
    """Length of sounds in seconds, 0.01 to 600."""
    columns: str = ""
    """NAME:KIND separated by commas (kinds: image, text, audio, video, vector, label, target, split, id). Empty:
    names and types decide."""
    groups: str = ""
    """Column of groups: rows of one group stay in one split. Empty: none."""
    test: str = ""
    """Fraction of the rows in the test split, or the name of a split. Empty: the split "test", else "validation", else a
    fifth."""
    valid: str = ""
    """Fraction of the training rows in the valid split, or the name of a split. Empty: the split "validation" where it is not
    the test split, else a tenth."""
    max_bad: float = 0.1
    """Maximum number of rows that cannot be read: below 1 a fraction of all rows, else a count."""


TYPES: dict[str, type] = {name: type(value) for name, value in vars(Options()).items()}


class Own:
    """An object in memory as data. Make one with `Own.of`.

    Attributes:
        value: The object.
        kind: Its type, such as "pandas.DataFrame".
        rows: Number of its rows, over all splits.
        digest: Digest of its contents, 16 hexadecimal digits.
        options: Options for reading it.
        table: Its rows; None for bags, and for data that are already in the form of a task.
    """

    def __init__(
        self, value: Any, kind: str, rows: int, digest: str, options: Options, table: Table | None = None
    ) -> None:
        self.value, self.kind, self.rows, self.digest, self.options, self.table = (
            value,
            kind,
            rows,
            digest,
            options,
            table,
        )
        self.made: dict[str, Any] = {}  # by form

    @classmethod
    def of(cls, value: Any, *, groups: Any = None, columns: Any = "", **options: Any) -> Own:
        """Read an object once, and register its name in this process.

        Args:
            value: An object of a type that `counterpoint.data.own.objects` lists, or an ImageData, AlignedData or BagData.
            groups: The column of groups, or an array of one value for each row. Default: none.
            columns: As in `Options`, or a dictionary {name: kind}. Default: names and types decide.
            options: Fields of `Options`.

        Raises DataError for an object of another type, CounterpointError for an unknown option.
        """
        if isinstance(value, cls):
            return value
        known = [f.name for f in fields(Options)]
        for name in options:
            if name not in known:
                raise unknown("option of data in memory", name, known)
        if isinstance(columns, Mapping):
            columns = ",".join(f"{name}:{kind}" for name, kind in columns.items())
        given = groups is not None and not isinstance(groups, str)
        named = GROUP if given else (groups or "")
        chosen = Options(**options, columns=columns, groups=named)
        chosen = Options(**{name: kind(getattr(chosen, name)) for name, kind in TYPES.items()})
        if isinstance(value, ImageData | AlignedData | BagData | TargetData):
            rows = len(value.train) + len(value.valid) + len(value.test)
            found = cls(value, type(value).__name__, rows, _contract_digest(value), chosen)
        elif is_bags(value):
            found = cls(value, "bags", len(value["label"]), _bags_digest(value), chosen)
        else:
            kind = kind_of(value)
            table, digest = table_of(value, kind, chosen.rate, groups if given else None)
            found = cls(value, kind, len(table), digest, chosen, table)
        _GIVEN[found.spec] = found
        return found

    @property
    def spec(self) -> str:
        """Return the name that a run stores."""
        changed = {f.name: v for f in fields(Options) if (v := getattr(self.options, f.name)) != f.default}
        query = urlencode({"rows": self.rows, "digest": self.digest} | changed)
        return f"{NAME}:{quote(self.kind)}?{query}"

    def __repr__(self) -> str:
        return f"<own data: {said(self.spec)}>"

    def load(self, form: str) -> Any:
        """Return the data in the form that a task takes.

        Args:
            form: views, aligned, targets or bags.

        Raises DataError where the object does not have that form.
        """
        if form not in self.made:
            with plainly():
                self.made[form] = self._load(form)
        return self.made[form]

    def _load(self, form: str) -> Any:
        forms = {"views": ImageData, "aligned": AlignedData, "bags": BagData, "targets": TargetData}
        if isinstance(self.value, tuple(forms.values())):
            if not isinstance(self.value, forms[form]):
                raise DataError(
                    f"{self.kind} does not fit this system, which learns from {forms[form].__name__}: see counterpoint.data"
                )
            return self.value
        if self.table is None:
            if form != "bags":
                raise DataError(
                    "bags of feature rows are for systems of the task bags: see counterpoint.systems(task='bags')"
                )
            return bag_data(self.value, self.options)
        if form == "bags":
            raise DataError(
                f"{self.kind} does not fit a system of the task bags; pass a dictionary with visual and audio, lists of arrays "
                "[T, dim], and label, [N] of 0 and 1"
            )
        return self._rows(form)

    def _rows(self, form: str) -> ImageData | AlignedData | TargetData:
        table, options = self.table, self.options
        assert table is not None
        size = checked_size(options.size or self._shown_size())
        samples = checked_rate(options.rate, options.seconds)
        if not options.max_bad >= 0:
            raise CounterpointError(
                f"max_bad is a number of rows, or a fraction of them below 1; got {options.max_bad}"
            )
        names = [name for name in table.columns if name not in (GROUP, options.groups)]
        usual = {name: role for name, role in table.usual.items() if name in names}
        if form == "aligned":
            roles = manifest_roles(self.kind, names, usual, options.columns)
        elif form == "targets":
            asked = _named(options.columns)
            given = asked.get("image", ""), asked.get("vector", ""), "", asked.get("target", "")
            roles = target_roles(self.kind, names, usual, *given)
        else:
            asked = _named(options.columns)
            roles = image_roles(
                self.kind, names, usual, asked.get("image", ""), asked.get("label", ""), "", pairs=False
            )
            roles.split, roles.id = asked.get("split", roles.split), asked.get("id", roles.id)
        reader = Reader(table, roles, Wanted(size, options.rate, samples), Accounts(self.kind, self.spec))
        reader.judge(options.max_bad)
        if options.groups:
            if options.groups not in table.columns:
                raise unknown("column of groups", options.groups, names)
            codes = factorise(table.cells(options.groups))[0]
            role = Role("group", [options.groups], "group")
            reader.linked.append(Column(role, "group", "group", codes >= 0, codes))
        makers: dict[str, Any] = {"aligned": aligned_data, "targets": target_data}
        make = makers.get(form, image_data)
        found = make(reader, said(self.spec), options.test, options.valid, [])
        found.notes[:] = [plain(note) for note in found.notes]
        return found

    def _shown_size(self) -> int:
        """Return the smaller side of pictures that are one array, within 8..4096; `SIZE` where there is no such array."""
        from counterpoint.data.own.objects import HeldCells

        assert self.table is not None
        for segment in self.table.segments:
            for cells in segment.columns.values():
                if isinstance(cells, HeldCells):
                    return min(4096, max(8, min(cells.pictures.shape[1:3])))
        return SIZE


def _named(columns: str) -> dict[str, str]:
    """Return the option `columns` as kind -> column."""
    return {kind: name for part in filter(None, columns.split(",")) for name, _, kind in [part.rpartition(":")]}


def is_memory(spec: str | None) -> bool:
    """Return whether a spec names an object in memory."""
    return bool(spec) and str(spec).partition(":")[0] == NAME


def parsed(spec: str) -> tuple[str, dict[str, str]]:
    """Return the kind of object in a spec, and a dictionary of its rows, digest and options."""
    place, _, query = spec.partition("?")
    return unquote(place.partition(":")[2]), dict(parse_qsl(query, keep_blank_values=True))


def said(spec: str) -> str:
    """Return a spec in words: "pandas.DataFrame of 600 rows (digest 0f3a...)"."""
    kind, given = parsed(spec)
    return f"{kind} of {given.get('rows', '?')} rows (digest {given.get('digest', '?')})"


def load_memory(spec: str, task: str | None) -> Any:
    """Return the data that a spec names, in the form of `task`. CounterpointError where this process lacks the object."""
    found = _GIVEN.get(spec)
    if found is None:
        raise CounterpointError(
            f"the data was an object in memory: {said(spec)}. Pass the same object again, in Python: "
            "counterpoint.resume(RUN, data=OBJECT), or counterpoint.load(RUN).evaluate(data=OBJECT)"
        )
    return found.load(task or "views")


def same_again(spec: str, value: Any) -> Own:
    """Return an object that the user passes again, under the name that a run stores.

    Args:
        spec: The name that the run stores.
        value: The object, which is read with the run's options, or its `Own`.

    Raises DataError where the contents differ, CounterpointError where the run's groups are missing.
    """
    _, given = parsed(spec)
    options = {name: kind(given[name]) for name, kind in TYPES.items() if name in given and name != "groups"}
    groups = given.get("groups", "")
    if groups == GROUP and not isinstance(value, Own):
        raise CounterpointError(
            f"the run's data, {said(spec)}, has groups; pass it as counterpoint.own(OBJECT, groups=...)"
        )
    found = Own.of(value) if isinstance(value, Own) else Own.of(value, groups=groups or None, **options)
    if found.spec != spec:
        raise DataError(
            f"this is other data than the run's: {said(found.spec)}, but the run was trained on {said(spec)}. Random transforms of "
            "a dataset also change the digest: remove them"
        )
    return found


def plain(text: str) -> str:
    """Rewrite a message for a reader who passes keyword arguments: remove the command line's question marks and dashes.

    >>> plain("use --batch-size 64 or less, or ?valid=0.2; go on: counterpoint train --resume runs/x")
    'use batch_size 64 or less, or valid=0.2; go on: counterpoint train --resume runs/x'
    """
    words = r"(counterpoint [a-z]+ [^;,()]*)|(?<![\w-])--([a-z][a-z0-9.-]*)"
    found = re.sub(words, lambda m: m[1] or m[2].replace("-", "_"), text)
    return re.sub(r"\?(?=\w+=)", "", found)


@contextmanager
def plainly() -> Any:
    """Rewrite the messages of a block's errors for Python (see `plain`), and raise them again."""
    try:
        yield
    except CounterpointError as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (plain(error.args[0]), *error.args[1:])
        raise


# ---------------------------------------------------------------------------------------------------------------- bags


def is_bags(value: Any) -> bool:
    """Return whether an object is bags of feature rows: a dictionary with visual, audio (lists of arrays [T, dim]) and label."""
    if not isinstance(value, Mapping) or not {"visual", "audio", "label"} <= set(value):
        return False
    first = value["visual"][0] if len(value["visual"]) else None
    return isinstance(first, np.ndarray) and first.ndim == 2 and first.dtype.kind == "f"


def bag_data(value: Mapping[str, Any], options: Options, frames: int = 16) -> BagData:
    """Return bags in the form of the task; cut splits where none are given.

    Args:
        value: visual: N arrays [T, visual_dim]. audio: N arrays [T, audio_dim]. label: [N] of 0 and 1. Optional: truth, N arrays
            [T] of 0 and 1 for each snippet; split, [N] names; group, [N] values; name, [N] names.
        options: `test` and `valid` count, as in `Options`.
        frames: number of frames of the truth for each snippet.

    Raises DataError for columns of different length, rows of different width, and labels other than 0 and 1.
    """
    count = len(value["label"])
    for key in value:
        if key not in ("visual", "audio", "label", "truth", "split", "group", "name"):
            raise unknown("column of bags", key, ["visual", "audio", "label", "truth", "split", "group", "name"])
        if len(value[key]) != count:
            raise DataError(f"bags: {counted(count, 'label')} and {len(value[key])} of {key}; pass one for each bag")
    labels = np.asarray(value["label"], np.int64)
    if not np.isin(labels, (0, 1)).all():
        raise DataError("bags: labels must be 0 (no event in the bag) or 1 (an event in the bag)")
    rows = {key: [np.asarray(part, np.float32) for part in value[key]] for key in ("visual", "audio")}
    for key, parts in rows.items():
        for number, part in enumerate(parts):
            if part.ndim != 2 or not len(part) or part.shape[1] != parts[0].shape[1] or not np.isfinite(part).all():
                raise DataError(
                    f"bags: {key} of bag {number} must be finite numbers [T, {parts[0].shape[1]}], T at least 1, got "
                    f"{list(part.shape)}"
                )
    for number, (visual, audio) in enumerate(zip(rows["visual"], rows["audio"], strict=True)):
        if len(visual) != len(audio):
            raise DataError(
                f"bags: bag {number} has {len(visual)} visual and {counted(len(audio), 'audio snippet')}; pass equal numbers"
            )
    names = [str(name) for name in value.get("name", range(count))]
    train, valid, test, notes = _bag_splits(value, rows, labels, options)

    def truth(n: int) -> NDArray[np.int8]:
        length = len(rows["visual"][n])
        known = np.asarray(value["truth"][n]) if "truth" in value else np.full(length, labels[n])
        if known.shape != (length,) or not np.isin(known, (0, 1)).all():
            raise DataError(f"bags: the truth of bag {n} must be {length} values of 0 and 1")
        return np.repeat(known.astype(np.int8), frames)

    def video(n: int) -> TestVideo:
        return TestVideo(names[n], rows["visual"][n][None], rows["audio"][n], int(labels[n]), truth(n))

    if "truth" not in value:
        notes.append("bags: the snippets have no truth, so every snippet of a bag with the event counts as the event")
    return BagData(
        "bags",
        [Bag(names[n], rows["visual"][n], rows["audio"][n], int(labels[n])) for n in train.tolist()],
        [video(n) for n in valid.tolist()],
        [video(n) for n in test.tolist()],
        rows["visual"][0].shape[1],
        rows["audio"][0].shape[1],
        frames_per_snippet=frames,
        notes=notes,
    )


def _bag_splits(
    value: Mapping[str, Any], rows: Mapping[str, Sequence[Any]], labels: Indices, options: Options
) -> tuple[Indices, Indices, Indices, list[str]]:
    """Return positions of training, valid and test bags, and notes. Equal bags and bags of a group stay together."""
    every = np.arange(len(labels))
    flat = np.empty(len(labels), object)
    flat[:] = [np.concatenate([a.ravel(), b.ravel()]) for a, b in zip(rows["visual"], rows["audio"], strict=True)]
    together = by_content(flat)
    if "group" in value:
        numbers = np.unique([str(group) for group in value["group"]], return_inverse=True)[1]
        together = linked([together, numbers], len(every))
    named = np.array([SPLITS.get(str(s).lower(), str(s)) for s in value.get("split", [""] * len(labels))], object)
    notes: list[str] = []
    test = every[named == "test"]
    left = every[named != "test"]
    if not len(test):
        share = float(options.test or FRACTION)
        kept, cut = split_positions(len(left), share, labels[left], together[left])
        test, left = left[cut], left[kept]
        notes.append(f"bags: the test split is made here, {len(test)} of {counted(len(every), 'bag')}")
    valid = left[named[left] == "validation"]
    train = left[named[left] != "validation"]
    if not len(valid):
        train, valid = carve("bags", train, float(options.valid or SHARE), labels[train], together[train])
        notes.append(
            f"bags: the valid split is made here, {len(valid)} of {counted(len(train) + len(valid), 'training bag')}"
        )
    return train, valid, test, notes


def _bags_digest(value: Mapping[str, Any]) -> str:
    digest = Digest("bags")
    for key in sorted(value):
        digest.name(key)
        for cell in value[key]:
            digest.cell(cell)
    return digest.text()


def _contract_digest(value: ImageData | AlignedData | BagData | TargetData) -> str:
    """Return a digest of everything that a task reads from data in the task's form."""
    digest = Digest(type(value).__name__)
    for name in ("train", "valid", "test"):
        part: Any = getattr(value, name)
        digest.name(name)
        if isinstance(value, BagData):
            for bag in part:
                for cell in (bag.visual, bag.audio, np.asarray(bag.label), getattr(bag, "truth", np.zeros(0))):
                    digest.array(cell)
            continue
        if isinstance(value, TargetData):
            digest.array(part.targets)
        for start in range(0, len(part), 256):
            at = np.arange(start, min(start + 256, len(part)))
            columns = (
                [part.images(at)]
                if isinstance(value, ImageData | TargetData)
                else [part.column(m, at) for m in value.modalities]
            )
            for column in columns:
                digest.cell(column)
        digest.cell(part.labels)
    return digest.text()
