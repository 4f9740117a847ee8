"""Walking folders and checking outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import check_writable, walk


def test_walk_follows_links_and_accounts_for_every_entry(tmp_path: Path) -> None:
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "b.txt").write_text("b")
    root = tmp_path / "root"
    (root / "x").mkdir(parents=True)
    (root / "x" / "a.txt").write_text("a")
    (root / ".hidden").write_text("h")
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "file").symlink_to(root / "x" / "a.txt")
    os.mkfifo(root / "pipe")
    found = walk(root)
    assert [str(p.relative_to(root)) for p in found.files] == ["file", "linked/deep/b.txt", "x/a.txt"]
    assert {str(p.relative_to(root)): reason for p, reason in found.left_out} == {
        ".hidden": "hidden",
        "gone": "a broken link",
        "loop": "a link to a folder that holds it",
        "pipe": "no regular file",
    }


def test_walk_of_a_missing_folder_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere cannot be read"):
        walk(tmp_path / "nowhere")


def test_check_writable_leaves_an_existing_file_alone_and_makes_folders(tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    assert check_writable(file) == file
    assert list(file.parent.iterdir()) == []
    file.write_text("kept")
    check_writable(str(file))
    assert file.read_text() == "kept"


def test_check_writable_names_the_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CounterpointError, match=r"page\.html cannot be written"):
        check_writable(tmp_path / "file" / "page.html")
    with pytest.raises(CounterpointError, match="is a folder"):
        check_writable(tmp_path)
