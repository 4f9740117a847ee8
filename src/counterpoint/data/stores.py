"""The user's own items in the stores of other libraries, one row each: tables of Lance, optimised folders of litdata.

    lance:items.lance        a table of Lance: the folder that `lance.write_dataset` writes
    lance:DIR                all tables in it; splits by their names: train.lance, test.lance
    litdata:DIR              a folder that `litdata.optimize` writes, or DIR/train and DIR/test with one each

Columns are found by their names, as in Parquet tables. The tasks `views` and `targets` read one picture or its substitute in each
row, with the options of `parquet:` (data/tables.py). The task `aligned` reads all modalities with the options of `manifest:`
(data/manifest.py), such as `?columns=photo:image,title:text,voice:audio`. With `?image=`, `?text=` or `?label=` it reads one
picture and one text in each row, as `parquet:` does.

Splits, bad rows, notes and lists are those of tables. `?max_bad=` is the maximum number of bad rows, or their maximum fraction.

Of a table of Lance the newest version is read, without deleted rows. Blobs are read too. Of a folder of litdata, pickled values are
never opened: such a cell is bad. `manifest:PLACE` reads these folders as well.
"""

from __future__ import annotations

from functools import partial

from counterpoint.data.images import ImageData
from counterpoint.data.manifest import checked_bad, load_items
from counterpoint.data.pairs import AlignedData
from counterpoint.data.tables import Inputs, load_rows
from counterpoint.data.targets import TargetData
from counterpoint.errors import CounterpointError


def load_store(
    kind: str,
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    domain: str = "",
    unseen: str = "",
    target: str = "",
    series: str = "",
    columns: str = "",
    channels: int = 1,
    rate: int = 16000,
    seconds: float = 2.0,
    test: str = "",
    valid: str = "",
    max_bad: float = 0.1,
) -> ImageData | AlignedData | TargetData:
    """Open tables of Lance or folders of litdata (see the module).

    Args:
        kind: lance or litdata.
        place: a table's folder, a folder of tables, or a pattern.
        task: views, for images and classes; aligned, for items in two modalities or more; targets, for a number to predict.
        size: height and width of images in pixels, 8 to 4096.
        image, label, text: columns. Default: columns with the usual names.
        domain: column with the domain of each picture. Default: no domains. For the task views.
        unseen: domains to leave out of all splits and to measure apart, joined by commas. Default: none.
        target: column of numbers to predict, for the task targets. Default: a column with a usual name (target, age, score).
        series: column of lists of numbers to predict from, for the task targets.
        columns: for the task aligned, `NAME:KIND` separated by commas; for the task targets, columns of one number each.
            Default: by their names.
        channels: numbers of each step of a series; all channels of the first step come first. Default: 1.
        rate: samples per second of sounds, 1000 to 192000.
        seconds: length of sounds in seconds, 0.01 to 600.
        test: fraction of the items in the test split, or the name of a split. Default: the split "test", else
            "validation", else a fifth.
        valid: fraction of the training items in the valid split, or the name of a split. Default: the split
            "validation" where it is not the test split, else a tenth.
        max_bad: maximum number of bad rows: below 1 a fraction of all rows, else a count.

    Raises DataError for missing or damaged tables, and for too many bad rows. Raises CounterpointError for an invalid option, and
    without the package pylance or litdata.
    """
    inputs = Inputs(target, series, columns, channels)
    checked_bad(max_bad)
    named = bool(image or label or text)
    if task == "aligned" and (inputs.columns or not named):
        if named or domain or unseen or inputs != Inputs(columns=inputs.columns):
            raise CounterpointError(
                f"{kind}: for the task aligned name columns either by columns=NAME:KIND,... or by image=, text= and label="
            )
        return load_items(kind, place, kind, task, size, rate, seconds, test, valid, max_bad, inputs.columns)
    return load_rows(kind, place, task, size, image, label, text, test, valid, domain, unseen, inputs, max_bad)


load_lance, load_litdata = (partial(load_store, kind) for kind in ("lance", "litdata"))
