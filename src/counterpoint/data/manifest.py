"""`manifest:PLACE`: the user's own items in any number of modalities, one row each, from a table or from archives.

    manifest:items.csv      .csv, .tsv, .jsonl, .json (a list of records) or .parquet; a column for every modality
    manifest:DIR            all such files of one kind below DIR; splits by folders DIR/train, DIR/test, DIR/validation
    manifest:'d/*.parquet'  a pattern; what exists by that very name is no pattern
    manifest:'s/*.tar'      WebDataset archives: 0001.jpg, 0001.txt, 0001.wav, 0001.npy, 0001.cls, 0001.json are one item

A column's kind is known by its name (own/roles.py: KINDS): `image`, `jpg`, `image_left`, `caption`, `wav`, `video`,
`vector_gyro`; a note names what was taken for what. Or the user says it: `?columns=photo:image,title:text,imu:vector`, and
then only those columns count. Kinds beside the modalities are `label`, `split` (train, test, validation) and `id`. In
archives, members with one ending are a modality named by its kind, `0001.left.jpg` is `image_left`, and fields of the
records are `json.FIELD`.

A cell is a path, absolute or from the file's folder (for a text: the text itself); bytes; a record {"bytes", "path"} or
{"array", "sampling_rate"} as `datasets` writes it; for a vector a list of numbers, also written out, or a .npy file. In
tables of text every cell is text as it stands: "NA", "null" and "01" are what they are. An empty cell means that the row
lacks this modality, which any row may.

    image   the largest centred square, scaled to `size` (data/images.py)
    audio   mono at `rate`, the centre `seconds` of it, or zeros after a shorter one (data/sounds.py)
    video   its middle frame as an image, and, when no column is audio, its sound as a further modality NAME_sound
    text    as it stands; how much of it a model reads is the task's affair
    vector  float32, all of one length: that which most rows have

The test split is the rows that say so in a split column, or that come from folders or files named test (validation where
there is no test; own/places.py has the rule); else a fifth made here, the same every time, each class in proportion.
`?test=0.1` makes another, `?test=NAME` takes another split. The valid split is the rows named validation (valid, val, dev)
where there are test rows too; else a tenth of the training rows made here. `?valid=0.2` and `?valid=NAME` are as `?test=`.
Rows with one modality only go to `unpaired`, unless a given split names them valid or test rows. Rows with the same picture,
sound, text or vector are one thing in that modality: a split made here never separates them, retrieval counts them right for
one another, and notes report what given splits share.

A damaged cell, a duplicate id, a line that cannot be read or a row without anything makes a bad row: it is left out. Ids are
compared within a split. All rows and files that are left out are listed with their reason in a CSV file in the cache folder,
`reports/`, and with them rows that are used all the same: with an empty caption (missing), sounds of another rate
(resampled), captions of which a model does not read the end (cut). What was found equals what was read and what was left out
(data/accounts.py). More bad rows than `max_bad` (a count, or a fraction of the rows below 1) are an error. Every distinct
file is looked at once. What fits in memory is decoded whole at the start; of larger sets only headers are read then, and
cells are decoded when asked for. Nothing is ever fetched from the net, and nothing is kept from one time to the next.

Not here: more than one frame of a video, groups, domains, and tables of more rows than fit in memory as paths and texts.
"""

from __future__ import annotations

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import checked_size
from counterpoint.data.own.cells import read_vector
from counterpoint.data.own.contracts import aligned_data
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.reader import Reader
from counterpoint.data.own.roles import known_by_name, manifest_roles
from counterpoint.data.own.sources import Wanted
from counterpoint.data.pairs import AlignedData
from counterpoint.data.sounds import checked_rate
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
) -> AlignedData:
    """Open the set (see the module): on the command line `manifest:items.csv?size=32`.

    Args:
        place: a file, folder or pattern.
        task: always aligned.
        size: pixels of images and frames, height and width, 8 to 4096.
        rate: samples per second of sounds, 1000 to 192000.
        seconds: length of sounds, 0.01 to 600.
        test: the fraction to test on, or the name of the split; default: the split "test", else "validation", else a fifth.
        valid: the fraction of the training items to watch training on, or the name of the split; default: the split
            "validation" where it is not tested on, else a tenth.
        max_bad: maximum number of bad rows, as a fraction of all below 1 or as a count.
        columns: `NAME:KIND` separated by commas; default: by their names.

    Raises DataError when files cannot be read, columns are missing, too many rows are bad, nothing usable is left, or a
    modality is nowhere; CounterpointError when an option makes no sense.
    """
    checked_size(size)
    samples = checked_rate(rate, seconds)
    if not max_bad >= 0:
        raise CounterpointError(f"max_bad is a number of rows, or a fraction of them below 1; got {max_bad}")
    if not place:
        raise CounterpointError("manifest needs a place: manifest:FILE")
    named = {part.rpartition(":")[0] for part in filter(None, columns.split(","))}
    named |= {name.partition(".")[0] for name in named}
    accounts = Accounts(place, columns)
    table, notes = open_table(
        place, "", lambda name: name in named if named else bool(known_by_name(name, {})), accounts
    )
    roles = manifest_roles(place, table.columns, table.usual, columns)
    reader = Reader(table, roles, Wanted(size, rate, samples), accounts)
    reader.judge(max_bad)
    return aligned_data(reader, f"manifest:{place}", test, valid, notes)
