"""Sources made from the world of digits (`data/worlds/digits.py`): each chooses digits and renders them in one form.

    digits           pictures with labels, scaled up; splits, cuts and long tails
    digit-patterns   pictures of a digit and a pattern; plain contrast learns the easier pattern: data of MCL's claim
    digit-styles     coloured pictures in several styles; other styles are left for the test: data of BSS's claim
    digit-canvases   pictures of several digits in a grid, with the digits present as labels: data of OBoW's and MLCD's claims
    tile-canvases    pictures of one digit, the key patch, among tiles of texture: data of CMD's claim
    web-digits       labelled digits, and unlabelled pictures of another distribution for a student: data of KD3's claim
    digit-overlays   a turned digit, in half of the pictures with a second digit over it: background and target of SepCLR
    digit-colours    pictures of a digit in each colour, of 100 classes: data of DisWOT's claim

The test split's digits are the same for every seed. Sources of pairs are in `digit_pairs.py`.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Indices, Tags, checked_size, long_tailed
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import DataError
from counterpoint.words import counted

CODE = 32  # numbers of a teacher's code of a digit


def load(
    argument: None = None,
    *,
    size: int = 32,
    held_out: float = 0.2,
    valid: float = SHARE,
    train: int = 0,
    labelled: int = 0,
    imbalance: float = 0.0,
    seed: int = 0,
) -> ImageData:
    """Return `digits` at `size` pixels; the test split holds the same digits at every size.

    Args:
        argument: not used; sources share a signature.
        size: height and width in pixels, 8 to 4096.
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        train: number of training digits, at least 2, drawn with `seed`; 0 for all.
        labelled: number of digits, at least 2, whose labels evaluators may use (neighbours, linear probe). They are drawn
            from the same pool as the training digits, those first. 0 for exactly the training digits.
        imbalance: ratio of zeros to nines of a long-tailed training split (see `images.long_tailed`). 0 keeps all digits.
        seed: seed of the draws.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    if not 0 < held_out < 1:
        raise DataError(f"digits: held_out must be a share between 0 and 1, got {held_out}")
    chosen, watched, test = world.parts("digits", held_out, valid)
    if imbalance:
        chosen = chosen[long_tailed(world.scene(chosen).labels[:, 0], imbalance, seed)]
    for name, number in (("train", train), ("labelled", labelled)):
        if number and not 2 <= number <= len(chosen):
            raise DataError(f"digits: {name} must be 2 to {len(chosen)} digits, got {number}")
    drawn = np.random.default_rng(seed).permutation(chosen)
    known = np.sort(drawn[:labelled])
    if train:
        chosen = np.sort(drawn[:train])

    def images(numbers: Indices) -> ArrayImages:
        truth = world.scene(numbers)
        return ArrayImages(world.enlarged(truth, size), truth.labels[:, 0])

    return ImageData(
        name="digits",
        train=images(chosen),
        valid=images(watched),
        test=images(test),
        bank=images(known) if labelled else None,
        classes=world.NAMES,
        size=size,
    )


def load_patterns(
    argument: None = None, *, patterns: int = 200, held_out: float = 0.4, valid: float = SHARE, seed: int = 0
) -> ImageData:
    """Return `digit-patterns`: pictures with two features, of which plain contrast learns the easier one.

    The first channel is a digit. The second is one of `patterns` random black-and-white patterns, independent of the digit. The
    third is empty. The views recipe `digit-patterns` shifts, cuts and blurs only the first channel. So the pattern is the
    same in both views, and is the easier feature. The label is the digit; the attribute `pattern` is the pattern.

    Args:
        argument: not used; sources share a signature.
        patterns: number of patterns, at least 2. Each digit of each split gets one at random.
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        seed: seed of the patterns and of their assignment to digits.

    Raises DataError for a number or share out of range.
    """
    if patterns < 2 or not 0 < held_out < 1:
        raise DataError(
            "digit-patterns: patterns must be at least 2 and held_out a share between 0 and 1; "
            f"got {patterns=}, {held_out=}"
        )
    parts = world.parts("digit-patterns", held_out, valid)
    rng = np.random.default_rng(seed)
    shapes = (rng.random((patterns, world.SIDE, world.SIDE)) < 0.5).astype(np.uint8) * 255
    which = rng.integers(0, patterns, sum(map(len, parts)))

    def images(numbers: Indices) -> ArrayImages:
        truth = world.scene(numbers)
        return ArrayImages(world.over_patterns(truth, shapes[which[numbers]]), truth.labels[:, 0])

    return ImageData(
        name="digit-patterns",
        train=images(parts.train),
        valid=images(parts.valid),
        test=images(parts.test),
        classes=world.NAMES,
        size=world.SIDE,
        attributes={"pattern": (which[parts.train], which[parts.valid], which[parts.test])},
    )


def load_styles(
    argument: None = None,
    *,
    size: int = 16,
    styles: int = 8,
    sources: int = 3,
    unseen: str = "",
    noise: float = 0.03,
    held_out: float = 0.332,
    valid: float = SHARE,
    train: int = 0,
    seed: int = 0,
) -> ImageData:
    """Return `digit-styles`: digits in drawing styles (domains), of which training sees some.

    A style has two colours, ink and paper, and a smooth field of light. Each digit has one style at random. The splits have
    the source styles. `shifts["unseen"]` is the test digits again, in the other styles. The label is the digit.

    Args:
        argument: not used; sources share a signature.
        size: height and width in pixels, 8 to 4096.
        styles: number of styles, at least 2.
        sources: number of styles in training, the first ones, at least 1 and fewer than `styles`.
        unseen: numbers of the styles to leave out instead, from 0, such as "0-3-7"; training has all others. Default: by
            `sources`.
        noise: standard deviation of the noise, in intensities of 0..1.
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        train: number of training digits, at least 2, drawn with `seed`; 0 for all.
        seed: seed of the styles, of their assignment to digits and of the noise.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    words = [word for word in unseen.split("-") if word]
    if any(not word.isdecimal() for word in words):
        raise DataError(f'digit-styles: unseen must be numbers of styles, such as "0-3-7"; got "{unseen}"')
    other = sorted({*map(int, words)}) if words else list(range(sources, styles))
    if styles < 2 or not 1 <= sources < styles or not 0 < len(other) < styles or other[-1] >= styles:
        raise DataError(
            "digit-styles: it needs at least 2 styles, and 1 <= sources < styles. Unseen styles lie in 0 to styles - 1 and "
            f"leave one for training; got {styles=}, {sources=}, {unseen=}"
        )
    if noise < 0 or not 0 < held_out < 1:
        raise DataError(
            f"digit-styles: noise must not be negative and held_out lies between 0 and 1; got {noise=}, {held_out=}"
        )
    parts = world.parts("digit-styles", held_out, valid)
    if train and not 2 <= train <= len(parts.train):
        raise DataError(f"digit-styles: train must be 2 to {len(parts.train)} digits, got {train}")
    rng = np.random.default_rng([2303_06088, seed])
    drawn = [world.style(size, rng) for _ in range(styles)]
    seen = [number for number in range(styles) if number not in other]

    def images(numbers: Indices, chosen: list[int]) -> ArrayImages:
        truth, which = world.scene(numbers), rng.choice(chosen, len(numbers))
        return ArrayImages(world.styled(truth, drawn, which, noise, rng), truth.labels[:, 0], domains=which)

    trained = np.sort(rng.permutation(parts.train)[: train or None])
    return ImageData(
        name="digit-styles",
        train=images(trained, seen),
        valid=images(parts.valid, seen),
        test=images(parts.test, seen),
        classes=world.NAMES,
        size=size,
        shifts={"unseen": images(parts.test, other)},
        domains=tuple(f"style {number}" for number in range(styles)),
    )


def load_canvases(
    argument: None = None,
    *,
    train: int = 2000,
    test: int = 500,
    grid: int = 3,
    least: int = 3,
    most: int = 3,
    noise: float = 0.1,
    teacher_noise: float = 0.1,
    held_out: float = 0.2,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Return `digit-canvases`: pictures of several digits in cells of a grid, on noise. Tags name the digits in a picture.

    A picture has 8 x 8 pixels for each cell. No digit of a split is in another split. There are as many valid as test pictures.
    Every picture has features of a stand-in for a pre-trained teacher, 32 numbers. They are the sum of a fixed random unit
    code for each digit, divided by its length, plus Gaussian noise.

    Args:
        argument: not used; sources share a signature.
        train: number of training pictures, at least 2.
        test: number of test pictures, at least 2.
        grid: cells in a row and in a column, 1 to 8.
        least, most: range of the number of digits in a picture, 1 to the number of cells. Each number is as frequent.
        noise: standard deviation of the noise, in intensities of 0..1.
        teacher_noise: standard deviation of the noise on each of the teacher's numbers, at least 0.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of digits, cells and noise of all splits; the codes are the same for every seed.

    Raises DataError for a number or share out of range.
    """
    if (
        min(train, test) < 2
        or not 1 <= grid <= 8
        or not 1 <= least <= most <= grid**2
        or min(noise, teacher_noise) < 0
        or not 0 < held_out < 1
    ):
        raise DataError(
            "digit-canvases: train and test must be at least 2, and grid 1 to 8. It needs 1 <= least <= most <= cells. noise "
            f"and teacher_noise must not be negative, and held_out lies between 0 and 1; got {train=}, {test=}, {grid=}, "
            f"{least=}, {most=}, {noise=}, {teacher_noise=}, {held_out=}"
        )
    parts = world.parts("digit-canvases", held_out, valid)
    labels = world.inventory()[1]
    rng, of_teacher = (np.random.default_rng([number, seed]) for number in (2012_11552, 2407_17331))
    codes = np.random.default_rng(2407_17331).standard_normal((len(world.NAMES), CODE))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)

    def canvases(pool: Indices, count: int) -> tuple[ArrayImages, Indices]:
        truth = world.scene(rng.choice(pool, (count, most)))
        cells = rng.random((count, grid**2)).argsort(1)[:, :most]
        # A digit beyond a picture's number is the first one again, in the same cell.
        shown = np.arange(most) < rng.integers(least, most, count, endpoint=True)[:, None]
        numbers = np.where(shown, truth.numbers, truth.numbers[:, :1])
        cells = np.where(shown, cells, cells[:, :1])
        present = np.zeros((count, len(world.NAMES)), np.int64)
        present[np.arange(count)[:, None], labels[numbers]] = 1
        seen = np.where(shown[..., None], codes[labels[numbers]], 0).sum(1)
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
        seen += teacher_noise * of_teacher.standard_normal(seen.shape)
        pixels = world.canvases(world.scene(numbers), cells, grid, noise, rng)
        return ArrayImages(pixels, features=seen.astype(np.float32)), present

    (trained, first), (watched, second), (tested, third) = (
        canvases(pool, count) for pool, count in zip(parts, (train, test, test), strict=True)
    )
    return ImageData(
        name="digit-canvases",
        train=trained,
        valid=watched,
        test=tested,
        classes=(),
        size=world.SIDE * grid,
        tags=Tags(world.NAMES, first, second, third),
    )


def load_tiles(
    argument: None = None,
    *,
    train: int = 2000,
    test: int = 500,
    grid: int = 4,
    kinds: int = 8,
    textures: int = 64,
    noise: float = 0.05,
    held_out: float = 0.2,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Return `tile-canvases`: pictures whose class is decided by one tile among many.

    A picture is a grid of tiles of 8 x 8 pixels. One tile at a random place is a digit, the picture's class. All others are
    textures: smooth patterns with the shades of a digit. Every tile has its own colour. So shades and colours tell nothing of
    the class. No digit of a split is in another split. There are as many valid as test pictures.

    Args:
        argument: not used; sources share a signature.
        train: number of training pictures, at least 2.
        test: number of test pictures, at least 2.
        grid: tiles in a row and in a column, 1 to 8.
        kinds: number of classes, 2 to 10: the digits from zero on.
        textures: number of textures, at least 1, shared by all splits.
        noise: standard deviation of the noise, in intensities of 0..1.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of digits, textures, places, colours and noise of all splits.

    Raises DataError for a number or share out of range.
    """
    if (
        min(train, test) < 2
        or not 1 <= grid <= 8
        or not 2 <= kinds <= len(world.NAMES)
        or textures < 1
        or noise < 0
        or not 0 < held_out < 1
    ):
        raise DataError(
            "tile-canvases: train and test must be at least 2, grid 1 to 8, kinds 2 to 10. It needs at least 1 texture. noise "
            f"must not be negative, and held_out lies between 0 and 1; got {train=}, {test=}, {grid=}, {kinds=}, {textures=}, "
            f"{noise=}, {held_out=}"
        )
    parts = world.parts("tile-canvases", held_out, valid)
    labels = world.inventory()[1]
    rng = np.random.default_rng([2401_08860, seed])
    pool = world.textures(textures, rng)

    def canvases(numbers: Indices, count: int) -> ArrayImages:
        truth = world.scene(rng.choice(numbers[labels[numbers] < kinds], count))
        pixels = world.tiles(truth, pool, rng.integers(grid * grid, size=count), grid, noise, rng)
        return ArrayImages(pixels, truth.labels[:, 0])

    trained, watched, tested = (
        canvases(numbers, count) for numbers, count in zip(parts, (train, test, test), strict=True)
    )
    return ImageData(
        name="tile-canvases",
        train=trained,
        valid=watched,
        test=tested,
        classes=world.NAMES[:kinds],
        size=world.SIDE * grid,
    )


def load_web(
    argument: None = None,
    *,
    train: int = 600,
    web: int = 500,
    others: int = 1500,
    shift: float = 0.5,
    size: int = 8,
    held_out: float = 0.3,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Return `web-digits`: labelled digits for a teacher, and pictures of another distribution for its student.

    Some web pictures are digits that the teacher has not seen, with less contrast, more light and noise. The others show no
    digit: they are digits with permuted pixels, changed likewise. Valid and test pictures are unchanged digits. The training
    split has the labelled digits. `ImageData.web` has the web pictures, whose label is -1 where they show no digit.

    Args:
        argument: not used; sources share a signature.
        train: number of labelled digits, at least 2.
        web: number of web pictures that show a digit, at least 1.
        others: number of web pictures that show none, at least 0.
        shift: strength of the changes of web pictures, 0 to 1.
        size: height and width in pixels, 8 to 4096.
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        seed: seed of the choice of digits and of all changes.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    if not 0 < held_out < 1 or not 0 <= shift <= 1:
        raise DataError(f"web-digits: held_out lies between 0 and 1 and shift in 0..1, got {held_out=}, {shift=}")
    parts = world.parts("web-digits", held_out, valid)
    if train < 2 or web < 1 or others < 0 or train + web > len(parts.train):
        raise DataError(
            f"web-digits has {counted(len(parts.train), 'digit')} for training. train must be at least 2 and web at least 1; "
            "their sum "
            f"is limited to that number. others must not be negative; got {train=}, {web=}, {others=}"
        )
    rng = np.random.default_rng([2307_11469, seed])
    drawn = rng.permutation(parts.train)
    known, unseen = np.sort(drawn[:train]), drawn[train : train + web]
    shades, labels = world.inventory()
    pictures = np.concatenate([shades[unseen], world.shuffled(shades[rng.choice(unseen, others)], rng)])
    shown = np.concatenate([labels[unseen], np.full(others, -1)])
    order = rng.permutation(len(pictures))
    changed = world.shifted(pictures, shift, rng)[order]

    def images(numbers: Indices) -> ArrayImages:
        truth = world.scene(numbers)
        return ArrayImages(world.enlarged(truth, size), truth.labels[:, 0])

    return ImageData(
        name="web-digits",
        train=images(known),
        valid=images(parts.valid),
        test=images(parts.test),
        classes=world.NAMES,
        size=size,
        web=ArrayImages(world.resized(changed, size), shown[order]),
    )


def load_overlays(
    argument: None = None,
    *,
    size: int = 16,
    train: int = 2000,
    test: int = 500,
    held_out: float = 0.332,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Return `digit-overlays`: backgrounds with one digit, and targets with a second digit over it.

    Every picture has a digit, turned by a quarter and at half intensity: its class. In a target an upright digit at half
    intensity is added: the attribute `overlay`. The domains are `background` and `target`, half of each split. No digit of a
    split is in another split. There are as many valid as test pictures.

    Args:
        argument: not used; sources share a signature.
        size: height and width in pixels, 8 to 4096.
        train: number of training pictures, at least 4.
        test: number of test pictures, at least 4.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of the digits of all splits.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    if min(train, test) < 4 or not 0 < held_out < 1:
        raise DataError(
            "digit-overlays: train and test must be at least 4, and held_out a share between 0 and 1; "
            f"got {train=}, {test=}, {held_out=}"
        )
    parts = world.parts("digit-overlays", held_out, valid)
    rng = np.random.default_rng([2402_11928, seed])

    def pictures(pool: Indices, count: int) -> tuple[ArrayImages, Indices]:
        common, salient = (world.scene(rng.choice(pool, count)) for _ in range(2))
        target = np.arange(count) % 2
        turned = np.rot90(world.enlarged(common, size), axes=(1, 2)) // 2
        pixels = turned + world.enlarged(salient, size) // 2 * target[:, None, None].astype(np.uint8)
        overlay = np.where(target == 1, salient.labels[:, 0], -1)
        return ArrayImages(pixels, common.labels[:, 0], domains=target), overlay

    three = [pictures(pool, count) for pool, count in zip(parts, (train, test, test), strict=True)]
    (trained, a), (watched, b), (tested, c) = three
    return ImageData(
        name="digit-overlays",
        train=trained,
        valid=watched,
        test=tested,
        classes=world.NAMES,
        size=size,
        domains=("background", "target"),
        attributes={"overlay": (a, b, c)},
    )


def load_colours(
    argument: None = None,
    *,
    size: int = 16,
    train: int = 2000,
    test: int = 500,
    held_out: float = 0.2,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Return `digit-colours`: pictures with a digit in each colour channel, of 100 classes.

    The class is 10 times the red digit plus the green one; the blue digit tells nothing of it. No digit of a split is in
    another split. There are as many valid as test pictures.

    Args:
        argument: not used; sources share a signature.
        size: height and width in pixels, 8 to 4096.
        train: number of training pictures, at least 2.
        test: number of test pictures, at least 2.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of the digits of all splits.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    if min(train, test) < 2 or not 0 < held_out < 1:
        raise DataError(
            "digit-colours: train and test must be at least 2, and held_out a share between 0 and 1; "
            f"got {train=}, {test=}, {held_out=}"
        )
    parts = world.parts("digit-colours", held_out, valid)
    rng = np.random.default_rng([2303_15678, seed])

    def pictures(pool: Indices, count: int) -> ArrayImages:
        truth = [world.scene(rng.choice(pool, count)) for _ in range(3)]
        pixels = np.stack([world.enlarged(one, size) for one in truth], -1)
        return ArrayImages(pixels, 10 * truth[0].labels[:, 0] + truth[1].labels[:, 0])

    trained, watched, tested = (pictures(pool, count) for pool, count in zip(parts, (train, test, test), strict=True))
    names = tuple(f"{red} {green}" for red in world.NAMES for green in world.NAMES)
    return ImageData(name="digit-colours", train=trained, valid=watched, test=tested, classes=names, size=size)
