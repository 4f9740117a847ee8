"""`dialogs:PLACE`: the user's own dialogs in the chat format, some of them annotated.

    dialogs:chats.jsonl    a .jsonl or .json file, or a folder of them: a row for each dialog, with a column `messages`

    {"messages": [
        {"role": "user", "content": "a cheap room in the north",
         "annotation": {"hotel": {"find": {"price": ["cheap"], "area": ["north"]}}}},
        {"role": "assistant", "content": "for how many nights?"}
    ], "corpus": "multiwoz", "split": "train"}

`annotation` (or `frame`) is a map domain -> intent -> slot -> values. A level may be absent: {"hotel": {"find": {}}}. Write
DEFAULT_DOMAIN or DEFAULT_INTENT for a name that the corpus lacks. {} is an annotation without nodes. A message without an
annotation is unlabelled. Roles are user and assistant. A message with the role system opens the dialog as a prompt, and is left
out. Where a dialog has no assistant, system is the other speaker.

`?unlabelled=more.jsonl` adds dialogs whose annotations are not read. Columns `corpus` and `split` may be absent.

Splits follow the rule of all own data: given names, else a fifth and a tenth. Equal dialogs stay in one split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.dialogs import SYSTEM, USER, Dialog, DialogData, Frame, Turn, user_turns
from counterpoint.data.own.cells import text_of
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.places import SPLITS
from counterpoint.errors import DataError

MESSAGES = ("messages", "dialog", "dialogue", "conversation", "conversations")
ANNOTATION = ("annotation", "frame", "frames")
OTHER = "assistant"  # the name of the other speaker in the chat format
LEVELS = ("domains", "intents", "slots", "values")


class Row(NamedTuple):
    dialog: Dialog
    corpus: str
    split: str


def load(place: str, *, unlabelled: str = "", test: str = "", valid: str = "") -> DialogData:
    """Read the dialogs (see the module).

    Args:
        place: a file or folder.
        unlabelled: a further file or folder, whose annotations are not read. Default: none.
        test: fraction of the dialogs in the test split, or the name of a split. Default: as for all own data.
        valid: fraction of the training dialogs in the valid split, or the name of a split. Default: as for all own data.

    Raises DataError for unreadable files, a missing column, no usable dialog and no annotation.
    """
    notes: list[str] = []
    rows = _rows(place, notes)
    labelled = np.array([any(turn.role == USER and turn.frame is not None for turn in row.dialog) for row in rows])
    if not labelled.any():
        raise DataError(
            f"{place}: no message of a user has an annotation; add one to each that you know: "
            '"annotation": {"domain": {"intent": {"slot": ["value"]}}}'
        )
    number: dict[tuple[tuple[str, str], ...], int] = {}
    keys = [tuple((turn.role, turn.text) for turn in row.dialog) for row in rows]
    together = np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
    train, watched, held, said = item_splits(place, [row.split for row in rows], labelled, together, test, valid)
    notes += [note.replace("items", "dialogs").replace("labels", "annotations") for note in said]
    corpora = {name: n for n, name in enumerate(dict.fromkeys(row.corpus for row in rows))}

    def chosen(at: Any) -> tuple[list[Dialog], list[int]]:
        return [rows[n].dialog for n in at.tolist()], [corpora[rows[n].corpus] for n in at.tolist()]

    plain, of = chosen(train)
    if unlabelled:
        more = [[replace(turn, frame=None) for turn in row.dialog] for row in _rows(unlabelled, notes)]
        plain, of = [*plain, *more], [*of, *[0] * len(more)]
    free = user_turns(plain, of, annotated=False)
    return DialogData(
        f"dialogs:{place}",
        train=user_turns(*chosen(train), annotated=True),
        valid=user_turns(*chosen(watched), annotated=True),
        test=user_turns(*chosen(held), annotated=True),
        unlabelled=free if len(free) else None,
        corpora=tuple(corpora),
        notes=notes,
    )


def _rows(place: str, notes: list[str]) -> list[Row]:
    """Read all dialogs of a place. DataError where none can be used."""
    accounts = Accounts(place)
    names = (*MESSAGES, "corpus", "split")
    table, said = open_table(place, "", lambda name: name.lower() in names, accounts)
    notes += said
    by_name = {column.lower(): column for column in reversed(table.columns)}
    column = next((by_name[name] for name in MESSAGES if name in by_name), "")
    if not column:
        raise DataError(
            f'{place}: has no column of messages; write a dialog a line: {{"messages": [{{"role": "user", "content": "..."}}]}}'
        )
    broken = [(segment.path, row) for segment in table.segments for row in segment.broken]
    accounts.find("rows", len(table) + len(broken))
    for file, row in broken:
        accounts.leave(Line(str(file), row.number, row.reason))
    found: list[Row] = []
    prompts = 0
    for n in range(len(table)):
        segment, line = table.where(n)
        try:
            dialog, left = dialog_of(table.cells(column)[n])
            corpus, split = (text_of(table.cells(by_name[c])[n]) if c in by_name else None for c in ("corpus", "split"))
        except DataError as error:
            accounts.leave(Line(str(table.segments[segment].path), line, str(error), column=column))
            continue
        prompts += left
        split = split or table.segments[segment].split
        found.append(Row(dialog, (corpus or "").strip(), SPLITS.get(str(split).lower(), "")))
    accounts.read("rows", len(found))
    accounts.check()
    accounts.write()
    notes += accounts.notes()
    if prompts:
        notes.append(f"{place}: {prompts} messages with the role system are prompts and are left out")
    if not found:
        raise DataError(f"{place}: has no dialog that can be used: {accounts.examples()}")
    return found


def dialog_of(messages: Any) -> tuple[Dialog, int]:
    """Return the turns of a list of messages, and the number of prompts that are left out.

    Raises DataError for a message that cannot be read, and for a dialog without a message of a user.
    """
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("is no list of messages")
    turns: list[Turn] = []
    roles = Counter(message.get("role") for message in messages if isinstance(message, Mapping))
    left = 0
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} is a {type(message).__name__}, not a map with role and content")
        role, content = message.get("role"), message.get("content")
        if role == SYSTEM and roles[OTHER]:
            left += 1
            continue
        if role not in (USER, OTHER, SYSTEM):
            raise DataError(f"message {number} has the role {role!r}; roles are user and assistant")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"message {number} has no text in content")
        named = next((message[name] for name in ANNOTATION if message.get(name) is not None), None)
        try:
            frame = None if named is None else frame_of(named)
        except DataError as error:
            raise DataError(f"message {number}: its annotation {error}") from error
        turns.append(Turn(USER if role == USER else SYSTEM, content.strip(), frame))
    if not any(turn.role == USER for turn in turns):
        raise DataError("has no message with the role user")
    return turns, left


def frame_of(value: Any, level: int = 0) -> Frame:
    """Return an annotation as a frame: every level a map of texts, values a list of texts. DataError for another form."""
    if not isinstance(value, Mapping):
        raise DataError(f"must be a map of {LEVELS[level]}, is a {type(value).__name__}")
    found: dict[str, Any] = {}
    for name, below in value.items():
        if not isinstance(name, str):
            raise DataError(f"has a name that is a {type(name).__name__}, not a text")
        if level < 2:
            found[name] = frame_of(below or {}, level + 1)
            continue
        below = [] if below is None else below
        values = list(below) if isinstance(below, list | tuple | np.ndarray) else [below]
        if not all(isinstance(one, str | int | float) for one in values):
            raise DataError(f"has a value of the slot {name!r} that is neither a text nor a number")
        found[name] = [str(one) for one in values]
    return found
