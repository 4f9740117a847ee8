"""Real-valued targets: built-in sources, the user's tables, series, pictures and objects, and rows that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import counterpoint as cp
from counterpoint import data
from counterpoint.data.targets import TargetData, Targets
from counterpoint.errors import CounterpointError, DataError


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def load(spec: str) -> TargetData:
    return data.load(spec, task="targets")


def every(found: TargetData) -> np.ndarray:
    return np.sort(np.concatenate([part.targets for part in (found.train, found.valid, found.test)]))


# --------------------------------------------------------------------------------------------------------- built-in sources


def test_digit_numbers_show_the_number_that_is_their_target():
    from counterpoint.data.worlds import digits

    found = load("digit-numbers?train=40&test=30&watched=20")
    shades, labels = digits.inventory()
    known = {
        np.rint(one * 255 / 16).astype(np.uint8).tobytes(): int(label)
        for one, label in zip(shades, labels, strict=True)
    }
    pictures = found.test.inputs(np.arange(30))
    assert pictures.shape == (30, 16, 16, 3)
    for picture, target in zip(pictures[:, 4:12, :, 0], found.test.targets, strict=True):
        left, right = (np.ascontiguousarray(part) for part in (picture[:, :8], picture[:, 8:]))
        assert 10 * known[left.tobytes()] + known[right.tobytes()] == target


def test_splits_of_digit_numbers_share_no_digit_and_seeds_no_picture():
    one, two = load("digit-numbers"), load("digit-numbers?seed=1")
    parts = []
    for split in (one.train, one.valid, one.test):
        pictures = split.inputs(np.arange(len(split)))[:, 4:12, :, 0]
        parts.append({np.ascontiguousarray(half).tobytes() for p in pictures for half in (p[:, :8], p[:, 8:])})
    assert not (parts[0] & parts[2]) and not (parts[0] & parts[1]) and not (parts[1] & parts[2])  # noqa: PT018
    assert (len(one.train), len(one.valid), len(one.test)) == (600, 300, 1500)
    assert not np.array_equal(one.train.targets, two.train.targets)


def test_imbalance_makes_large_numbers_rare_in_training_alone():
    found = load("digit-numbers?train=2000&imbalance=100")
    low, high = (found.train.targets < 20).sum(), (found.train.targets >= 80).sum()
    assert low > 10 * high > 0
    assert (found.test.targets >= 80).mean() == pytest.approx(0.2, abs=0.05)


def test_pulses_beat_at_their_target():
    found = load("pulses?train=20&test=20&noise=0")
    assert (len(found.valid), found.spec["length"], found.spec["channels"]) == (20, 64, 1)
    series = found.train.inputs(np.arange(20))[..., 0]
    spectrum = np.abs(np.fft.rfft(series - series.mean(1, keepdims=True), 1024))
    beats = np.fft.rfftfreq(1024, 1 / 16) * 60
    fast = beats > 45  # the drift is slower
    found_rates = beats[fast][spectrum[:, fast].argmax(1)]
    assert np.median(np.abs(found_rates - found.train.targets)) < 4


def test_diabetes_is_the_set_of_scikit_learn():
    found = load("diabetes")
    assert (len(found.train), len(found.valid), len(found.test)) == (266, 66, 110)
    assert every(found)[[0, -1]].tolist() == [25, 346]
    assert found.columns[:3] == ("age", "sex", "bmi")
    facts = found.spec
    rows = found.train.inputs(np.arange(266))
    np.testing.assert_allclose(facts["mean"], rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(facts["deviation"], rows.std(0), rtol=1e-3)
    assert facts["modalities"] == {"table": {"kind": "vector", "dim": 10}}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digit-numbers?train=1", "train, test and watched must be at least 2"),
        ("digit-numbers?imbalance=0.5", "imbalance at least 1"),
        ("digit-numbers?held_out=1.5", "held_out"),
        ("diabetes?train=400", "train must be 2 to 266"),
        ("pulses?noise=-1", "noise"),
        ("pulses?test=1", "at least 2"),
    ],
)
def test_options_out_of_range_are_named(spec, said):
    with pytest.raises(DataError, match=said):
        load(spec)


# ------------------------------------------------------------------------------------------------------------ the user's own


def table(rows: int = 40) -> str:
    return "chord,angle,noise\n" + "".join(f"{n / 10},{n % 7},{n * 2.5}\n" for n in range(rows))


def test_a_table_predicts_the_target_from_all_other_columns_or_from_those_named(tmp_path):
    place = written(tmp_path / "foil.csv", table())
    found = load(f"csv:{place}?target=noise")
    assert (found.kind, found.columns, found.target) == ("table", ("chord", "angle"), "noise")
    assert every(found).tolist() == [n * 2.5 for n in range(40)]
    rows = found.train.inputs(np.arange(len(found.train)))
    np.testing.assert_allclose(rows[:, 0] * 25, found.train.targets, rtol=1e-5)
    assert load(f"csv:{place}?target=noise&columns=angle").columns == ("angle",)
    assert found.train.row_names(np.arange(1))[0].startswith("foil.csv row ")


def test_rows_with_an_empty_a_nan_or_a_word_are_left_out_and_counted(tmp_path):
    text = table() + "1,2,\n1,2,nan\n1,2,inf\n1,2,old\nx,2,3\n,2,3\n"
    found = load(f"csv:{written(tmp_path / 'foil.csv', text)}?target=noise")
    assert len(every(found)) == 40
    (note,) = [note for note in found.notes if "left out" in note]
    assert "6 of 46 rows left out" in note
    assert "'noise' is no finite number" in note
    listed = found.accounts.file.read_text()
    for reason in ("the target 'noise' is empty", "'chord' is no finite number", "'chord' is empty"):
        assert reason in listed


def test_splits_of_a_column_are_kept(tmp_path):
    text = "a,y,split\n" + "".join(f"{n},{n},{'test' if n % 4 == 0 else 'train'}\n" for n in range(40))
    found = load(f"csv:{written(tmp_path / 'x.csv', text)}")
    assert sorted(found.test.targets.tolist()) == list(range(0, 40, 4))
    assert found.columns == ("a",)


def test_series_have_steps_and_channels(tmp_path):
    text = "wave,rate\n" + "".join(f"{' '.join(str(n + t) for t in range(6))},{n}\n" for n in range(30))
    place = written(tmp_path / "waves.csv", text)
    found = load(f"csv:{place}?series=wave&target=rate&channels=2")
    assert (found.kind, found.spec["length"], found.spec["channels"]) == ("series", 3, 2)
    first = int(found.train.targets[0])
    assert found.train.inputs(np.arange(1))[0].tolist() == [[first + 2 * t, first + 2 * t + 1] for t in range(3)]
    with pytest.raises(DataError, match="6 numbers cannot have channels=4"):
        load(f"csv:{place}?series=wave&target=rate&channels=4")
    assert load(f"manifest:{place}?columns=wave:vector,rate:target").spec["length"] == 6


def pictures(folder: Path, count: int = 20) -> list[str]:
    names = [f"{n}.png" for n in range(count)]
    for n, name in enumerate(names):
        Image.fromarray(np.full((10, 10, 3), n * 10, np.uint8)).save(folder / name)
    return names


@pytest.mark.parametrize("kind", ["csv", "manifest", "imagefolder"])
def test_pictures_have_a_number_from_a_column(kind, tmp_path):
    names = pictures(tmp_path)
    file = "metadata.csv" if kind == "imagefolder" else "faces.csv"
    column = "file_name" if kind == "imagefolder" else "photo"
    place = written(tmp_path / file, f"{column},age\n" + "".join(f"{name},{n * 10}\n" for n, name in enumerate(names)))
    spec = {
        "csv": f"csv:{place}?image=photo&target=age&size=8",
        "manifest": f"manifest:{place}?columns=photo:image,age:target&size=8",
        "imagefolder": f"imagefolder:{tmp_path}?target=age&size=8",
    }[kind]
    found = load(spec)
    assert (found.kind, found.size, len(every(found))) == ("image", 8, 20)
    shown = found.train.inputs(np.arange(len(found.train)))
    assert shown.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(shown[:, 4, 4, 0], found.train.targets)
    assert found.train.files(np.arange(1), "image")[0].endswith(".png")


def test_tables_in_memory_are_named_by_their_columns():
    own = cp.own({"a": np.arange(30.0), "age": np.arange(30.0) * 3}, columns="age:target")
    found = own.load("targets")
    assert found.columns == ("a",)
    rows = found.train.inputs(np.arange(len(found.train)))[:, 0]
    np.testing.assert_allclose(rows * 3, found.train.targets)
    parts = [Targets(np.arange(8, dtype=np.float32).reshape(4, 2) + n, np.arange(4) + n) for n in range(3)]
    made = TargetData("mine", *parts, kind="table", columns=("a", "b"))
    assert cp.own(made).load("targets") is made
    assert cp.own(made).spec == cp.own(made).spec


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ("target=nose", DataError, "no column 'nose'"),
        ("", DataError, "no target column among"),
        ("target=noise&columns=angle,wing", DataError, "no column of inputs 'wing'"),
        ("target=noise&columns=angle&series=chord", CounterpointError, "not by several"),
        ("target=noise&image=photo", DataError, "no column 'photo'"),
        ("target=noise&domain=angle", CounterpointError, "domain and unseen are options of the task views"),
    ],
)
def test_columns_that_are_not_there_are_named(options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        load(f"csv:{written(tmp_path / 'foil.csv', table())}?{options}")


def test_a_target_of_words_alone_and_a_target_alone_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none of its 2 rows can be used: .* the target 'y' is no finite number"):
        load(f"csv:{written(tmp_path / 'a.csv', chr(10).join(['a,y', '1,old', '2,young']))}")
    with pytest.raises(DataError, match="no column beside the target 'y'"):
        load(f"csv:{written(tmp_path / 'b.csv', chr(10).join(['y', '1', '2']))}")


def test_other_tasks_refuse_the_options(tmp_path):
    with pytest.raises(CounterpointError, match="target, series, columns and channels are options of the task targets"):
        data.load(f"csv:{written(tmp_path / 'foil.csv', table())}?target=noise", task="views")


@pytest.mark.parametrize(
    ("items", "targets", "said"),
    [
        (np.zeros((3, 2), np.float32), [1, 2], r"expected \[3\]"),
        (np.zeros((2, 2), np.float32), [1, np.nan], "1 of 2 targets are NaN"),
        (np.array([[np.inf], [0]], np.float32), [1, 2], "columns hold NaN"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(items, targets, said):
    with pytest.raises(DataError, match=said):
        Targets(items, np.array(targets))


def test_a_column_of_words_is_named_with_the_option_that_leaves_it_out(tmp_path):
    (tmp_path / "a.csv").write_text("age,kind,y\n" + "".join(f"{n},w{n},{n}\n" for n in range(30)))
    said = r"the column 'kind' holds no number; name the columns of numbers alone: \?columns=age$"
    with pytest.raises(DataError, match=said):
        load(f"csv:{tmp_path / 'a.csv'}?target=y")
