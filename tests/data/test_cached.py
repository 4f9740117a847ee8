"""Whatever the cache keeps is found by its whole key, built by one process, and built again when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from counterpoint.data import cached
from counterpoint.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builder:
    """Counts how often it was asked to build."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> cached.Arrays:
        self.calls += 1
        return {"squares": np.arange(4) ** 2, "names": np.array(["a", "étoile"])}


def read(arrays):
    return arrays["squares"].tolist(), [str(name) for name in arrays["names"]]


EXPECTED = ([0, 1, 4, 9], ["a", "étoile"])


@pytest.mark.parametrize("compress", [False, True])
def test_an_entry_is_built_once_and_then_read(cache, compress):
    build = Builder()
    for _ in range(3):
        assert cached.build_once("room", (1, "x"), build, read, name="set", compress=compress) == EXPECTED
    assert build.calls == 1
    (file,) = (cache / "room").glob("*.npz")
    assert file == cached.place("room", 1, "x", name="set")
    assert file.name.startswith("set-")


KEYS = [
    (1, "a"),
    ("1", "a"),
    (1, "b"),
    (1,),
    (1, "a", None),
    ([1, "a"],),
    ("1a",),
    ({"a": 1, "b": 2},),
    ({"a": 1, "b": 3},),
    (b"1a",),
    (b"1", b"a"),
    (np.arange(4),),
    (np.arange(4).astype(np.int32),),
    (np.arange(4).reshape(2, 2),),
    (np.arange(1, 5),),
    (np.arange(2), np.arange(2, 4)),
    (np.zeros(0),),
    (np.zeros((0, 3)),),
]


def test_keys_that_differ_in_value_type_shape_or_cut_have_different_digests():
    digests = [cached.digest(*key) for key in KEYS]
    assert len(set(digests)) == len(KEYS)
    assert all(len(found) == 24 for found in digests)


def test_a_digest_is_the_same_in_every_process_whatever_the_order_of_a_dict_or_the_layout_of_an_array():
    assert cached.digest({"a": 1, "b": [2, None]}) == cached.digest({"b": [2, None], "a": 1})
    rows = np.arange(12.0).reshape(3, 4)
    assert cached.digest(rows.T) == cached.digest(np.ascontiguousarray(rows.T)) != cached.digest(rows)
    code = "import numpy as np; from counterpoint.data import cached; print(cached.digest({'b': 1, 'a': 'é'}, np.arange(3)))"
    # Python's own hashes of strings differ between processes.
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0].split() == said[1].split() == [cached.digest({"b": 1, "a": "é"}, np.arange(3)).encode()]


def test_a_value_that_prints_differently_in_each_run_is_no_part_of_a_key():
    with pytest.raises(TypeError):
        cached.digest(object())
    with pytest.raises((TypeError, ValueError)):
        cached.digest(np.array([object()]))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", ["empty", "nonsense", "cut", "flipped", "other arrays", "zeros"])
def test_a_damaged_file_is_built_again_and_noted(cache, damage, compress):
    build, notes = Builder(), list[str]()
    cached.build_once("room", (1,), build, read, compress=compress)
    (file,) = (cache / "room").glob("*.npz")
    whole = file.read_bytes()
    middle = whole.index(b"squares") + len(b"squares") + 40
    broken = {
        "empty": b"",
        "nonsense": b"nonsense",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 20]) + whole[middle + 20 :],
        "zeros": bytes(5000),
    }
    if damage == "other arrays":
        cached.save(file, {"other": np.zeros(3)})
    else:
        file.write_bytes(broken[damage])
    assert cached.build_once("room", (1,), build, read, compress=compress, notes=notes) == EXPECTED
    assert build.calls == 2
    assert len(notes) == 1
    assert f"{file} was damaged" in notes[0]
    assert notes[0].endswith("and has been built again")
    assert file.read_bytes() == whole
    assert cached.build_once("room", (1,), build, read, notes=notes) == EXPECTED
    assert (build.calls, len(notes)) == (2, 1)


def test_a_build_that_fails_leaves_no_file_and_its_error_is_raised(cache):
    def fails() -> cached.Arrays:
        raise DataError("no ink")

    with pytest.raises(DataError, match="no ink"):
        cached.build_once("room", (1,), fails, read)
    assert not list(cache.rglob("*.npz"))
    build = Builder()
    assert cached.build_once("room", (1,), build, read) == EXPECTED


def test_content_that_its_reader_refuses_is_an_error_and_no_endless_loop():
    with pytest.raises(KeyError):
        cached.build_once("room", (1,), lambda: {"other": np.zeros(3)}, read)


def test_no_more_is_read_than_is_asked_for_and_a_pickle_is_refused(cache):
    file = cached.place("room", 1)
    cached.save(file, {"a": np.arange(3), "b": np.arange(5)})
    assert list(cached.load(file, "b")) == ["b"]
    assert list(cached.load(file)) == ["a", "b"]
    with pytest.raises(DataError, match="was damaged"):
        cached.load(file, "c")
    with pytest.raises(FileNotFoundError):
        cached.load(cached.place("room", 2))
    np.savez(file, a=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="was damaged"):
        cached.load(file)


SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from counterpoint.data import cached

def build():
    Path(sys.argv[1]).open("a").write("built\\n")
    time.sleep(0.5)
    return {"squares": np.arange(4) ** 2}

print(cached.build_once("room", (1,), build, lambda arrays: arrays["squares"].tolist()))
"""


def test_of_several_processes_one_builds_and_the_others_read(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "log")], stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0].split() for process in processes] == [[b"[0,", b"1,", b"4,", b"9]"]] * 3
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_process_that_waits_for_long_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cached, "PATIENCE", 0.05)
    path, held = cached.place("room", 1), threading.Event()

    def hold() -> None:
        with cached.locked(path):
            held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    with cached.locked(path):
        assert capsys.readouterr().err == f"waiting for another process, which is making {path}\n"
    other.join()


def test_entries_have_locks_of_their_own():
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with cached.locked(cached.place("room", 1)):
            held.set()
            done.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    before = time.monotonic()
    assert cached.build_once("room", (2,), Builder(), read) == EXPECTED
    assert time.monotonic() - before < 5
    done.set()
    other.join()
