"""`manifest:PLACE`: the user's own items in any number of modalities, one row each, from a table or from archives.

    manifest:items.csv      .csv, .tsv, .jsonl, .json (a list of records) or .parquet; a column for every modality
    manifest:DIR            all such files of one kind below DIR; splits by folders DIR/train, DIR/test, DIR/validation
    manifest:'d/*.parquet'  a pattern; a name that exists as it is written is no pattern
    manifest:'s-{00..12}.tar::b.tar'    braces count or choose ({a,b}), `::` separates places
    manifest:'s/*.tar'      WebDataset archives: 0001.jpg, 0001.txt, 0001.wav, 0001.npy, 0001.cls, 0001.json are one item

The name of a column gives its kind (own/roles.py: KINDS): `image`, `jpg`, `image_left`, `caption`, `wav`, `video`,
`vector_gyro`. A note lists the kinds that were found. With `?columns=photo:image,title:text,imu:vector` the user gives the
kinds, and only those columns count. Other kinds are `label`, `split` (train, test, validation), `id`, and `domain` (also `phase`),
the origin of an item. In archives, members with one ending are a modality, named after its kind. `0001.left.jpg` is `image_left`.
Fields of the records are `json.FIELD`.

A cell holds one of these:

    - a path, absolute or relative to the file's folder (for a text: the text itself);
    - bytes;
    - a record {"bytes", "path"} or {"array", "sampling_rate"}, as `datasets` writes it;
    - for a vector, a list of numbers (also as text) or a .npy file.

In tables of text every cell is text as written: "NA", "null" and "01" have no other meaning. An empty cell means that the row
lacks this modality. Any row may lack any modality.

    image   the largest centred square, scaled to `size` (data/images.py)
    audio   mono at `rate`, the centre `seconds` of it; zeros follow a shorter sound (data/sounds.py)
    video   its middle frame as an image, and, when no column is audio, its sound as a further modality NAME_sound
    text    as written; the task decides how much of it a model reads
    vector  float32, all of one length: the length that most rows have

A row belongs to the test split where its split column, folder or file is named test. Where there is no such row, the
test split is the validation split (own/places.py has the rule). Otherwise a fifth of the rows is cut, the same every
time, each class in proportion. `?test=0.1` cuts another fraction; `?test=NAME` takes the split of that name. The valid
split is the rows named validation (valid, val, dev) where there are test rows too. Otherwise a tenth of the training rows
is cut. `?valid=0.2` and `?valid=NAME` work as `?test=` does.

Rows with only one modality go to `unpaired`, unless a given split names them valid or test rows. Rows with the same picture,
sound, text or vector count as equal in that modality. A split that is cut here never separates them, and retrieval counts
them as correct for one another. Notes report equal rows that given splits share.

A bad row has a damaged cell, a duplicate id, an unreadable line or no content. The source leaves it out. Ids are compared within
a split. A CSV file in the cache folder, `reports/`, lists all rows and files left out, with the reason. It also lists rows that
are used with a change: an empty caption (missing), a sound of another rate (resampled), a caption whose end a model does not
read (cut). The number found equals the number read plus the number left out (data/accounts.py). More bad rows than `max_bad`
(a count, or a fraction of the rows below 1) are an error.

Every distinct file is read once. A set that fits in memory is decoded at the start. Of a larger set only the headers are read at
the start, and cells are decoded on access. The source never downloads data, and keeps no decoded data between runs.

With a system of the task `regression` it gives a picture or a vector and a number to predict: `?columns=photo:image,age:target`.

Not supported: several frames of a video, groups, and tables whose paths and texts do not fit in memory.
"""

from __future__ import annotations

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import checked_size
from counterpoint.data.own.cells import read_vector
from counterpoint.data.own.contracts import aligned_data, target_data
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.reader import Reader
from counterpoint.data.own.roles import known_by_name, manifest_roles, said_columns, target_roles
from counterpoint.data.own.sources import Wanted
from counterpoint.data.pairs import AlignedData
from counterpoint.data.sounds import checked_rate
from counterpoint.data.targets import TargetData
from counterpoint.errors import CounterpointError

__all__ = ["load_manifest", "read_vector"]


def load_manifest(
    place: str,
    *,
    task: str = "aligned",
    size: int = 64,
    rate: int = 16000,
    seconds: float = 2.0,
    test: str = "",
    valid: str = "",
    max_bad: float = 0.1,
    columns: str = "",
) -> AlignedData | TargetData:
    """Open the set (see the module): on the command line `manifest:items.csv?size=32`.

    Args:
        place: a file, folder or pattern.
        task: aligned; or targets, for a number to predict from one modality of pictures or vectors; or federations, for items
            that may have one modality alone.
        size: height and width of images and frames in pixels, 8 to 4096.
        rate: samples per second of sounds, 1000 to 192000.
        seconds: length of sounds in seconds, 0.01 to 600.
        test: fraction of the items in the test split, or the name of a split. Default: the split "test", else
            "validation", else a fifth.
        valid: fraction of the training items in the valid split, or the name of a split. Default: the split
            "validation" where it is not the test split, else a tenth.
        max_bad: maximum number of bad rows: below 1 a fraction of all rows, else a count.
        columns: `NAME:KIND` separated by commas. Default: the names give the kinds.

    Raises DataError for unreadable files, missing columns, too many bad rows, no usable row, and a modality without an item.
    Raises CounterpointError for an invalid option.
    """
    return load_items("manifest", place, "", task, size, rate, seconds, test, valid, max_bad, columns)


def checked_bad(max_bad: float) -> float:
    """Return `max_bad`. Raises CounterpointError for a number that is negative or NaN."""
    if not max_bad >= 0:
        raise CounterpointError(f"max_bad is a number of rows, or a fraction of them below 1; got {max_bad}")
    return max_bad


def load_items(
    name: str,
    place: str,
    kind: str,
    task: str,
    size: int,
    rate: int,
    seconds: float,
    test: str,
    valid: str,
    max_bad: float,
    columns: str,
) -> AlignedData | TargetData:
    """Open items in any number of modalities; arguments as of `load_manifest`.

    Args:
        name: the source's name.
        kind: the kind of its files, as `open_table` takes it.
    """
    checked_size(size)
    samples = checked_rate(rate, seconds)
    checked_bad(max_bad)
    if not place:
        raise CounterpointError(f"{name} needs a path: {name}:{'FILE' if name == 'manifest' else 'DIR'}")
    named = {part.rpartition(":")[0] for part in filter(None, columns.split(","))}
    named |= {name.partition(".")[0] for name in named}
    accounts = Accounts(place, columns)
    least = 1 if task == "federations" else 2
    table, notes = open_table(
        place,
        kind,
        lambda name: name in named if named else bool(known_by_name(name, {})) or task == "targets",
        accounts,
    )
    if task == "targets":
        said = {kind: name for name, kind in said_columns(place, table.columns, columns).items()}
        if odd := set(said) - {"image", "vector", "target", "split", "id"}:
            raise CounterpointError(f"{name}: a target is predicted from an image or a vector, not from {min(odd)}")
        given = said.get("image", ""), said.get("vector", ""), "", said.get("target", "")
        roles = target_roles(place, table.columns, table.usual, *given)
        roles.split, roles.id = said.get("split", roles.split), said.get("id", roles.id)
    else:
        roles = manifest_roles(place, table.columns, table.usual, columns, least)
    reader = Reader(table, roles, Wanted(size, rate, samples), accounts)
    reader.judge(max_bad)
    if task == "targets":
        return target_data(reader, f"{name}:{place}", test, valid, notes)
    return aligned_data(reader, f"{name}:{place}", test, valid, notes, least)
