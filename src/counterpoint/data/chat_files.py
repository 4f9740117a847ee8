"""`chats:PLACE`: your own chats, with or without pictures, in the formats of the field.

PLACE is a .json or .jsonl file, a folder of them, or a folder in MME's layout. A record is one of:

    messages      {"messages": [{"role": "user", "content": "<image> What is this?"}, ...], "images": ["a.png"]}; the content may
                  be a list of parts {"type": "text", "text": ...} and {"type": "image", "image": PATH}
    LLaVA's       {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "image": "a.png"}
    POPE's        {"image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}
    a choice      {"question": ..., "choices": [...], "answer": "text or number of the choice", "image": "a.png"}
    TruthfulQA's  {"question": ..., "mc1_targets": {answer: 1 or 0, ...}, "mc2_targets": {...}}, as its mc_task.json has them
    preferences   {"prompt": ..., "chosen": ..., "rejected": ..., "images": [...]}; messages may also have a field "rejected"
    a modality    messages whose answer is {"role": "assistant", "modality": "IMAGE", "prompt": "a red fox"}; "objects" of the
                  record are names that the prompt must have

A chat with "objects" (names of what its picture shows) is measured as a caption, by CHAIR. The objects may also come from COCO's
instances (`?instances=FILE.json`), and the words that name them from CHAIR's list (`?synonyms=FILE.txt`). Yes and no as reference
answers make a question of yes or no.

MME's layout is a folder for each task. A picture has a text of the same name, whose lines are QUESTION TAB ANSWER. The texts
may be in a folder questions_answers_YN and the pictures in a folder images.

A mark `<image>` that is missing is added to the first message of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.accounts import CHANGED, Accounts, Line
from counterpoint.data.chats import Chat, ChatData, ChatSplit, Kind
from counterpoint.data.images import KEEP, Indices, Pixels, check_header, checked_size, decode, split_positions
from counterpoint.data.own.places import SPLITS, file_splits, files_of
from counterpoint.data.own.records import parsed
from counterpoint.data.valid import carve, checked_share
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.encoders.meta_responses import FORM, PROMPT, STOP, flags_in, render, well_formed
from counterpoint.errors import DataError
from counterpoint.words import counted

TEST = 0.2  # share of the pictures, or of the chats without pictures, for a test split that no file names
ROLE = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class FilePictures:
    """Pictures of files, decoded on demand and kept where all of them fit (an `ImageSplit`)."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.paths, self.size = list(files), size
        self.labels: Indices | None = None
        self.kept: dict[int, Pixels] | None = {} if len(self.paths) * 3 * size * size <= KEEP else None

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, indices: Indices) -> Pixels:
        """Return RGB pictures [n, size, size, 3] of n positions."""
        found = np.zeros((len(indices), self.size, self.size, 3), np.uint8)
        for n, at in enumerate(map(int, indices)):
            found[n] = self._picture(at)
        return found

    def _picture(self, at: int) -> Pixels:
        if self.kept is not None and at in self.kept:
            return self.kept[at]
        try:
            pixels = decode(self.paths[at], self.size)
        except DataError as error:
            raise DataError(f"{self.paths[at]}: {error}") from error
        if self.kept is not None:
            self.kept[at] = pixels
        return pixels


def load(
    place: str,
    *,
    images: str = "",
    size: int = 224,
    valid: float = 0.1,
    instances: str = "",
    synonyms: str = "",
) -> ChatData:
    """Read chats.

    Args:
        place: a .json or .jsonl file, a folder of them, or a folder in MME's layout. Files named train, valid and test are these
            splits. Otherwise a fifth of the pictures is the test split.
        images: folder of the pictures. Default: the folder of each file.
        size: height and width of the pictures in pixels; they are cut to squares.
        valid: share of the training chats for a valid split that no file names.
        instances: COCO's instances, whose categories are the objects of the pictures.
        synonyms: a text with a line for each object: its name and other words for it, separated by commas.

    Chats that cannot be read are left out and counted. Raises DataError where none can be read.
    """
    checked_size(size)
    checked_share("chats", valid)
    accounts = Accounts(place, f"{images}{size}")
    objects = _synonyms(synonyms) if synonyms else {}
    shown = _instances(instances) if instances else {}
    records = _mme(Path(place), accounts) if _is_mme(Path(place)) else _records(place, accounts)
    files: dict[Path, int] = {}
    fine: dict[Path, str] = {}  # the fault of each picture, "" for none
    equal: list[str] = []  # places of preference pairs of equal answers
    chats: list[tuple[Chat, str, str]] = []  # with the split and the first picture's path
    for file, number, split, record in records:
        try:
            chat, paths = _chat(record, Path(images) if images else file.parent, shown)
            for path in paths:
                if path not in fine:
                    fine[path] = _fault(path)
                if fine[path]:
                    raise DataError(f"has the picture {path}: {fine[path]}")
            at = tuple(files.setdefault(path, len(files)) for path in paths)
            made = Chat(pictures=at, **chat)
            chats.append((made, split, str(paths[0]) if paths else ""))
            if made.rejected and made.rejected.strip() == made.answer.strip():
                equal.append(f"{file} row {number}")
                accounts.leave(Line(str(file), number, "its two answers are equal", what=CHANGED))
        except DataError as error:
            accounts.leave(Line(str(file), number, str(error)))
    accounts.read("rows", len(chats))
    accounts.check()
    accounts.write()
    if not chats:
        raise DataError(
            f"{place}: none of {counted(accounts.found['rows'], 'chat')} can be read: {accounts.examples()}"
        )
    every = {name for chat, _, _ in chats for name in chat.objects}
    named = {name: objects.get(name, (name,)) for name in sorted(every | set(objects))}
    pictures = FilePictures(list(files), size) if files else None
    train, held, test = _split(chats, valid)
    one, two, three = (ChatSplit([chats[n][0] for n in part], pictures) for part in (train, held, test))
    notes = accounts.notes()
    if equal:
        notes.append(
            f"{place}: {counted(len(equal), 'preference pair has', 'preference pairs have')} two equal answers, the first is "
            f"{equal[0]} (all listed in {accounts.file})"
        )
    return ChatData(f"chats:{place}", one, two, three, size if files else 0, named, notes=notes)


# ------------------------------------------------------------------------------------------------------------- records

Record = tuple[Path, int, str, Mapping[str, Any]]  # file, row, split, content


def _records(place: str, accounts: Accounts) -> list[Record]:
    """Read the records of all files of a place."""
    found = [(path, kind) for path, kind in files_of(place, "", accounts) if kind in ("json", "jsonl")]
    if not found:
        raise DataError(f"{place}: holds no .json or .jsonl file, and is no folder in MME's layout")
    splits, _ = file_splits(place, [path for path, _ in found])
    records: list[Record] = []
    for (path, kind), split in zip(found, splits, strict=True):
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        # POPE's files are JSON lines that are named .json.
        lines = kind == "jsonl" or content.lstrip()[:1] == b"{"
        rows: list[Any] = [line for line in content.splitlines() if line.strip()] if lines else []
        if not lines:
            rows = parsed(content)
            if not isinstance(rows, list):
                raise DataError(f"{path}: should be a list of chats; name a file with one chat a line .jsonl")
        accounts.find("rows", len(rows))
        for number, row in enumerate(rows, 1):
            try:
                record = parsed(row) if lines else row
                if not isinstance(record, dict):
                    raise DataError(f"is a {type(record).__name__}, not a record")
            except DataError as error:
                accounts.leave(Line(str(path), number, str(error)))
                continue
            records.append((path, number, SPLITS.get(str(record.get("split", split)).lower(), ""), record))
    accounts.read("files", len(found))
    return records


def _is_mme(root: Path) -> bool:
    """Return whether a folder has MME's layout."""
    return root.is_dir() and any(_partner(text) for text in sorted(root.glob("**/*.txt"))[:50])


def _partner(text: Path) -> Path | None:
    """Return the picture that a text of MME asks about."""
    folders = [text.parent, text.parent.parent / "images"]
    files = (folder / f"{text.stem}{ending}" for folder in folders for ending in PICTURES)
    return next((file for file in files if file.is_file()), None)


def _mme(root: Path, accounts: Accounts) -> list[Record]:
    """Read the questions of a folder in MME's layout; its tasks are the groups."""
    records: list[Record] = []
    for text in sorted(root.glob("**/*.txt")):
        picture = _partner(text)
        if picture is None:
            continue
        folder = text.parent.parent if text.parent.name == "questions_answers_YN" else text.parent
        for number, line in enumerate(text.read_text("utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            accounts.find("rows")
            question, tab, answer = line.rpartition("\t")
            if not tab or not question.strip():
                accounts.leave(Line(str(text), number, "is no QUESTION TAB ANSWER"))
                continue
            row = {"image": str(picture.resolve()), "text": question, "label": answer.strip(), "group": folder.name}
            records.append((text, number, "", row))
    return records


def _chat(
    record: Mapping[str, Any], folder: Path, shown: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Any], list[Path]]:
    """Return the arguments of a `Chat` and the paths of its pictures. DataError for a record of no known form."""
    paths = [str(path) for name in ("images", "image") for path in _listed(record.get(name))]
    found: dict[str, Any] = {"group": str(record.get("group", record.get("category", "")) or "")}
    if "messages" in record or "conversations" in record:
        messages = [_message(turn, paths) for turn in _listed(record.get("messages", record.get("conversations")))]
        if record.get("rejected"):
            found["rejected"] = _turns(record["rejected"], "assistant", [])[-1].text
    elif "chosen" in record:
        messages = [*_turns(record.get("prompt"), "user", paths), *_turns(record["chosen"], "assistant", paths)[-1:]]
        found["rejected"] = _turns(record.get("rejected"), "assistant", [])[-1].text
        if not found["rejected"].strip():
            raise DataError("has an empty rejected answer")
    elif "choices" in record and "question" in record:
        choices = tuple(str(choice) for choice in _listed(record["choices"]))
        answer = record.get("answer")
        right = choices[answer] if isinstance(answer, int) and 0 <= answer < len(choices) else str(answer)
        if right not in choices or len(choices) < 2:
            raise DataError(f"has the answer '{answer}', which is none of its {counted(len(choices), 'choice')}")
        messages = [Message("user", str(record["question"])), Message("assistant", right)]
        found |= {"choices": choices, "kind": "choice"}
    elif "mc1_targets" in record or "mc2_targets" in record:
        found |= {"kind": "choice", **_targets(record)}
        messages = [Message("user", str(record.get("question"))), Message("assistant", found.pop("answer"))]
    elif "text" in record and "label" in record:
        messages = [Message("user", str(record["text"])), Message("assistant", str(record["label"]))]
    else:
        known = "messages, conversations, text and label, question and choices, mc1_targets, or prompt and chosen"
        raise DataError(f"has none of the known forms ({known}); its names are {', '.join(map(str, record))[:80]}")
    files = [path if path.is_absolute() else folder / path for path in map(Path, paths)]
    messages = _marked(messages, len(files))
    named = tuple(str(name) for name in _listed(record.get("objects")))
    named = named or tuple(dict.fromkeys(name for path in files for name in shown.get(path.name, ())))
    found["messages"] = tuple(messages)
    if "kind" not in found:
        found |= {"kind": _kind(messages[-1].text if messages else "", named), "objects": named}
    return found, files


def _targets(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of a question of TruthfulQA: the best answer, the other true ones, and the false ones."""
    single, several = (record.get(name) or {} for name in ("mc1_targets", "mc2_targets"))
    if not isinstance(single, dict) or not isinstance(several, dict):
        raise DataError("has mc1_targets or mc2_targets that are no record of answers with 1 or 0")
    marks = {str(answer): bool(mark) for answer, mark in (single | several).items()}
    true = [answer for answer, mark in marks.items() if mark]
    best = next((str(answer) for answer, mark in single.items() if mark), true[0] if true else "")
    if not best or all(marks.values()):
        raise DataError("needs a true and a false answer among its targets")
    return {"answer": best, "choices": tuple(marks), "truths": tuple(answer for answer in true if answer != best)}


def _kind(answer: str, objects: Sequence[str]) -> Kind:
    if answer.strip().lower().rstrip(".") in ("yes", "no"):
        return "yes-no"
    if well_formed(answer, flags_in(answer.partition(PROMPT)[0])):
        return "meta"
    return "caption" if objects else "free"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _message(turn: Any, paths: list[str]) -> Message:
    """Return a message; pictures among its parts are added to `paths`."""
    if not isinstance(turn, dict):
        raise DataError(f"has a message that is a {type(turn).__name__}, not a record")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLE:
        raise DataError(f"has the role '{role}'; the roles are {', '.join(ROLE)}")
    if "modality" in turn:
        content = _meta_response(turn)
    if isinstance(content, list):
        text = ""
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                text += f" {part.get('text', '')}"
            elif kind == "image":
                text += f" {IMAGE}"
                path = part.get("image", part.get("path", part.get("url")))
                paths += [str(path)] if path else []
            else:
                raise DataError(f"has a part of the type '{kind}'; types are text and image")
        content = text
    if not isinstance(content, str):
        raise DataError(f"has a message whose content is a {type(content).__name__}, not a text")
    return Message(ROLE[role], content.strip())


def _meta_response(turn: Mapping[str, Any]) -> str:
    """Return the text of an answer that names a modality and a prompt."""
    flag, prompt = f"[{str(turn['modality']).strip('[] ').upper()}]", turn.get("prompt")
    if not FORM.fullmatch(flag):
        raise DataError(f"has the modality '{turn['modality']}'; a modality is a word, such as IMAGE")
    if not isinstance(prompt, str) or not prompt.strip() or STOP in prompt:
        raise DataError(f"has the modality {flag} without a prompt, which is a text without {STOP}")
    return render(flag, prompt.strip())


def _turns(value: Any, role: str, paths: list[str]) -> list[Message]:
    """Return the messages of a part of a preference: a text or messages."""
    if isinstance(value, str):
        return [Message(role, value.strip())]
    found = [_message(turn, paths) for turn in _listed(value)]
    if not found:
        raise DataError(f"has no text of the {role}")
    return found


def _marked(messages: list[Message], pictures: int) -> list[Message]:
    """Add the marks of pictures before the first message of the user, where no message has one."""
    if not pictures or any(IMAGE in message.text for message in messages):
        return messages
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        return messages
    marked = Message("user", f"{' '.join([IMAGE] * pictures)} {messages[first].text}")
    return [*messages[:first], marked, *messages[first + 1 :]]


def _fault(path: Path) -> str:
    try:
        check_header(path)
    except DataError as error:
        return str(error)
    return ""


# --------------------------------------------------------------------------------------------------- objects and splits


def _synonyms(place: str) -> dict[str, tuple[str, ...]]:
    """Read CHAIR's list of synonyms."""
    try:
        lines = Path(place).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: cannot be read ({error})") from error
    rows = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in lines]
    return {row[0]: tuple(dict.fromkeys(row)) for row in rows if row}


def _instances(place: str) -> dict[str, tuple[str, ...]]:
    """Read the objects of each picture from COCO's instances, by file name."""
    try:
        content = json.loads(Path(place).read_bytes())
        names = {row["id"]: str(row["name"]) for row in content["categories"]}
        files = {row["id"]: str(row["file_name"]) for row in content["images"]}
        found: dict[str, dict[str, None]] = {Path(file).name: {} for file in files.values()}
        for row in content["annotations"]:
            found[Path(files[row["image_id"]]).name][names[row["category_id"]]] = None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: is not in COCO's layout of instances ({type(error).__name__}: {error})") from error
    return {file: tuple(objects) for file, objects in found.items()}


def _split(chats: Sequence[tuple[Chat, str, str]], valid: float) -> tuple[Indices, Indices, Indices]:
    """Return the positions of the training, valid and test chats. Chats of one picture stay in one split."""
    of = np.array([split for _, split, _ in chats])
    numbers: dict[str, int] = {}
    together = np.array(
        [numbers.setdefault(path, len(numbers)) if path else -1 - n for n, (_, _, path) in enumerate(chats)], np.int64
    )
    test, watched = np.flatnonzero(of == "test"), np.flatnonzero(of == "validation")
    train = np.flatnonzero((of != "test") & (of != "validation"))
    if not len(test) and len(watched):
        test, watched = watched, test
    if not len(test):
        kept, cut = split_positions(len(train), TEST, together=together[train])
        train, test = train[kept], train[cut]
    if not len(watched):
        train, watched = carve("chats", train, valid, together=together[train])
    return train, watched, test
