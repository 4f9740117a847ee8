"""`volumes:DIR`: the user's own scans with a class for each voxel, NIfTI files of images and masks with equal names.

    DIR/images/a.nii.gz      DIR/masks/a.nii.gz        or the folders imagesTr and labelsTr of the Medical Decathlon
    DIR/train/images/...     DIR/test/images/...       splits above the two folders

A volume becomes slices along its axis from feet to head (`?axis=` names another). Their pixels are resampled to be square where the
header's spacing says that they are not: pictures bilinearly, masks by the nearest voxel. The largest centred square is then
scaled to `size`. Greys are those between the 1st and the 99th percentile of the volume. A volume without a mask is for training,
without labels. These are left out and listed: files that cannot be read, volumes with a fourth axis, masks of another shape.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.accounts import Accounts, Line, first_of
from counterpoint.data.dense import IGNORE, MOST, ArrayScenes, DenseData
from counterpoint.data.images import checked_size
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.places import SPLITS, is_folder
from counterpoint.errors import CounterpointError, DataError, needs_extra
from counterpoint.files import walk
from counterpoint.waiting import patient_track
from counterpoint.words import counted

IMAGES = ("images", "image", "imagestr", "volumes")
MASKS = ("masks", "mask", "labels", "labelstr", "segmentations")
ENDINGS = (".nii", ".nii.gz")
UNEVEN = 0.01  # relative difference of spacings below which pixels count as square


def load(
    place: str,
    *,
    task: str = "dense",
    size: int = 96,
    axis: int = 2,
    images: str = "",
    masks: str = "",
    classes: str = "",
    labelled: int = -1,
    test: str = "",
    valid: str = "",
) -> DenseData:
    """Open a folder of volumes and masks (see the module).

    Args:
        place: the folder.
        task: "dense", or "views" to learn from the slices; the result is the same.
        size: height and width of a slice in pixels, 8 to 4096.
        axis: axis of the slices: 0 from left to right, 1 from back to front, 2 (default) from feet to head.
        images, masks: names of the two folders. Default: those with the usual names.
        classes: names of the classes between commas, in the order of their numbers. Default: numbers.
        labelled: number of training volumes whose masks are used, for learning from few labels. -1: all.
        test: fraction of the volumes in the test split, or the name of a split. Default: the split "test", else a fifth.
        valid: fraction of the training volumes in the valid split, or the name of a split. Default: a tenth.

    Raises DataError for missing or damaged files, CounterpointError for an invalid option.
    """
    checked_size(size)
    if axis not in (0, 1, 2) or labelled < -1 or labelled == 0:
        raise CounterpointError(f"axis is 0, 1 or 2, and labelled -1 or at least 1; got {axis=} and {labelled=}")
    if not is_folder(place):
        raise DataError(f"{place}: no such directory; it should hold a folder of images and a folder of masks")
    accounts = Accounts(place, f"volumes:{images},{masks}")
    try:
        found = _read(Path(place), size, axis, images.lower(), masks.lower(), accounts)
        return _data(found, place, size, classes, labelled, test, valid, accounts)
    except CounterpointError:
        accounts.write()
        raise


class _Volumes:
    """Volumes that were read: slices, numbers of pixels (None without a mask), and the split of each."""

    def __init__(self) -> None:
        self.slices: list[NDArray[np.uint8]] = []
        self.numbers: list[NDArray[np.int64] | None] = []
        self.splits: list[str] = []
        self.spacings: list[list[float]] = []  # between slices, and between pixels down and across, in mm
        self.unspaced: list[Path] = []  # images without a spacing in their header
        self.masks: list[Path | None] = []
        self.uneven = 0


def _read(root: Path, size: int, axis: int, images: str, masks: str, accounts: Accounts) -> _Volumes:
    """Find the pairs of files by their names, and read them."""

    files: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    listed = walk(root)
    for path, reason in listed.left_out:
        accounts.find("files")
        accounts.leave(Line(str(path), None, reason, unit="files"))
    image_names, mask_names = ((images,) if images else IMAGES), ((masks,) if masks else MASKS)
    for path in listed.files:
        accounts.find("files")
        parts = path.relative_to(root).parts
        at = next((n for n, part in enumerate(parts[:-1]) if part.lower() in (*image_names, *mask_names)), None)
        ending = next((end for end in ENDINGS[::-1] if path.name.lower().endswith(end)), None)
        if at is None or ending is None:
            reason = "not a NIfTI file by its ending" if ending is None else "not below a folder of images or masks"
            accounts.leave(Line(str(path), None, reason, unit="files"))
            continue
        rest = [*parts[:at], *parts[at + 1 :]]
        split = SPLITS.get(rest[0].lower(), "") if len(rest) > 1 else ""
        key = split, "/".join([*rest[1 if split else 0 : -1], rest[-1][: -len(ending)]])
        kind = "mask" if parts[at].lower() in mask_names else "image"
        if kind in files[key]:
            accounts.leave(Line(str(path), None, "another file of the same name is taken", unit="files"))
        else:
            files[key][kind] = path
    found = _Volumes()
    for (split, _), pair in patient_track(sorted(files.items()), "reading volumes"):
        if "image" not in pair:
            accounts.leave(Line(str(pair["mask"]), None, "a mask without an image", unit="files"))
            continue
        _add(found, split, pair, size, axis, accounts)
    if not found.slices:
        left = f"; {accounts.examples()}" if accounts.found else ""
        raise DataError(f"{root}: no volume can be read{left}")
    return found


def _add(found: _Volumes, split: str, pair: dict[str, Path], size: int, axis: int, accounts: Accounts) -> None:
    """Read a volume and its mask into `found`; where one of them is faulty, list it."""
    try:
        volume, spacing = _opened(pair["image"])
        accounts.read("files")
    except DataError as error:
        accounts.leave(Line(str(pair["image"]), None, str(error), unit="files"))
        if "mask" in pair:
            accounts.leave(Line(str(pair["mask"]), None, "its image cannot be read", unit="files"))
        return
    numbers: NDArray[np.int64] | None = None
    if "mask" in pair:
        try:
            values, _ = _opened(pair["mask"])
            if values.shape != volume.shape:
                raise DataError(
                    f"has {' x '.join(map(str, values.shape))} voxels, its image {' x '.join(map(str, volume.shape))}"
                )
            numbers = np.rint(values).astype(np.int64)
            if np.abs(values - numbers).max(initial=0) > 1e-3:
                raise DataError("holds fractions, not class numbers; resample it by the nearest voxel")
            accounts.read("files")
        except DataError as error:
            accounts.leave(Line(str(pair["mask"]), None, str(error), unit="files"))
    plane = [spacing[n] for n in range(3) if n != axis]
    if min(spacing) <= 0:
        found.unspaced.append(pair["image"])
        accounts.change(pair["image"], "no spacing in its header; 1 mm is taken")
    if min(plane) <= 0:
        plane = [1.0, 1.0]
    found.uneven += abs(plane[0] / plane[1] - 1) > UNEVEN
    low, high = np.percentile(volume, (1, 99))
    greys = np.clip((volume - low) / max(high - low, 1e-12), 0, 1) * 255
    slices = np.moveaxis(np.rint(greys).astype(np.uint8), axis, 0)
    found.slices.append(
        np.stack([_square(part, plane, size, Image.Resampling.BILINEAR) for part in slices]).astype(np.uint8)
    )
    if numbers is not None:
        parts = np.moveaxis(numbers, axis, 0).astype(np.int32)
        numbers = np.stack([_square(part, plane, size, Image.Resampling.NEAREST) for part in parts]).astype(np.int64)
    found.numbers.append(numbers)
    found.masks.append(pair.get("mask"))
    found.splits.append(split)
    side = min(volume.shape[n] * mm for n, mm in zip((n for n in range(3) if n != axis), plane, strict=True)) / size
    found.spacings.append([spacing[axis] if spacing[axis] > 0 else 1.0, side, side])


def _opened(path: Path) -> tuple[NDArray[np.float32], list[float]]:
    """Return a file's voxels and their spacings in mm, 0 where unknown; axes go to the right, the front and the head."""
    try:
        import nibabel
        from nibabel.imageglobals import logger
    except ImportError as error:
        raise needs_extra("volumes:", "dense") from error
    try:
        logger.disabled = True  # of headers without spacing, which the notes name
        given: Any = nibabel.load(path)
        # nibabel replaces a spacing of 0 by 1 mm.
        with nibabel.openers.ImageOpener(str(path)) as file:
            written = type(given.header).from_fileobj(file, check=False)["pixdim"][1:4]
        if not np.isfinite(written).all():
            raise DataError("has a spacing in its header that is not a number (pixdim); repair the header")
        image: Any = nibabel.as_closest_canonical(given)
        values = np.asarray(image.dataobj, np.float32)
        spacing = np.array(image.header.get_zooms()[:3], float)
        if not written.all():
            if given.header["sform_code"] > 0:
                spacing = nibabel.affines.voxel_sizes(image.affine)
            else:
                spacing[nibabel.io_orientation(given.affine)[written == 0, 0].astype(int)] = 0
    except DataError:
        raise
    except Exception as error:  # nibabel and its readers raise many kinds
        raise DataError(f"not a volume that can be read ({type(error).__name__})") from error
    finally:
        logger.disabled = False
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or not values.size:
        raise DataError(f"has {values.ndim} axes ({' x '.join(map(str, values.shape))}); save one volume a file")
    if not np.isfinite(values).all():
        raise DataError("holds values that are not numbers")
    return values, spacing.tolist()


def _square(part: NDArray[Any], plane: list[float], size: int, how: Image.Resampling) -> NDArray[Any]:
    """Cut the largest centred square, in mm, out of a slice [across, down], and scale it; the head or the front is up."""
    picture = Image.fromarray(np.ascontiguousarray(part.T[::-1]))
    wide, high = part.shape[0] * plane[0], part.shape[1] * plane[1]
    side = min(wide, high)
    left, top = (wide - side) / 2 / plane[0], (high - side) / 2 / plane[1]
    box = (left, top, left + side / plane[0], top + side / plane[1])
    return np.asarray(picture.resize((size, size), how, box=box))


def _data(
    found: _Volumes, place: str, size: int, classes: str, labelled: int, test: str, valid: str, accounts: Accounts
) -> DenseData:
    """Make the splits, and number the classes."""
    has = np.array([numbers is not None for numbers in found.numbers], bool)
    if not has.any():
        raise DataError(f"{place}: no volume has a mask; name the folders: ?images=FOLDER&masks=FOLDER")
    seen = sorted({int(n) for numbers in found.numbers if numbers is not None for n in np.unique(numbers)})
    names = [name.strip() for name in classes.split(",") if name.strip()] or [str(n) for n in range(max(seen) + 1)]
    if min(seen) < 0 or len(names) > MOST or len(names) < 2:
        raise DataError(
            f"{place}: masks hold the numbers {seen[:10]}; class numbers are 0 to {MOST - 1}, at least two of them"
        )
    notes = []
    odd = [n for n in seen if n >= len(names)]
    if odd:
        holders = []
        for numbers, file in zip(found.numbers, found.masks, strict=True):
            if numbers is not None and file is not None and np.isin(odd, numbers).any():
                holders.append(file)
                accounts.change(file, "voxels of numbers without a name count as unknown")
        notes.append(
            f"{place}: voxels of the numbers {', '.join(map(str, odd[:10]))} have no name; they count as unknown in "
            f"{first_of(holders, 'mask')} (all listed in {accounts.file})"
        )
    if found.unspaced:
        notes.append(
            f"{place}: no spacing in the header of {first_of(found.unspaced, 'volume')}; 1 mm is taken, and measures in mm rest on "
            f"it. Write the spacing into the header (pixdim); all are listed in {accounts.file}"
        )
    if found.uneven:
        notes.append(
            f"{place}: {counted(found.uneven, 'volume has', 'volumes have')} slices of uneven spacing; they are resampled to "
            "square pixels"
        )
    without = int((~has).sum())
    if without:
        notes.append(
            f"{place}: {counted(without, 'volume has', 'volumes have')} no mask; they are used for training, without labels"
        )
    *parts, more = item_splits(place, found.splits, has, np.arange(len(has)), test, valid)
    splits = []
    for name, rows in zip(("train", "valid", "test"), parts, strict=True):
        ordered = sorted(rows.tolist(), key=lambda row: not has[row]) if name == "train" else rows.tolist()
        masks = []
        for place_in_split, row in enumerate(ordered):
            numbers = found.numbers[row]
            hidden = numbers is None or (name == "train" and 0 <= labelled <= place_in_split)
            mask = np.full(found.slices[row].shape, IGNORE, np.uint8)
            if not hidden and numbers is not None:
                known = numbers < len(names)
                mask[known] = numbers[known]
            masks.append(mask)
        groups = np.repeat(np.arange(len(ordered)), [len(found.slices[row]) for row in ordered])
        pixels = np.concatenate([found.slices[row] for row in ordered])
        spacings = np.array([found.spacings[row] for row in ordered])
        splits.append(ArrayScenes(pixels, np.concatenate(masks), groups=groups, spacings=spacings))
    accounts.check()
    accounts.write()
    notes = [*accounts.notes(), *notes, *more]
    return DenseData(
        f"volumes:{place}", splits[0], splits[1], splits[2], (), size, notes, accounts=accounts, regions=tuple(names)
    )
