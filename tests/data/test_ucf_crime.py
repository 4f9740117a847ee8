"""UCF-Crime's lists over tiny videos in its layout, and lists that are no good."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import ucf_crime
from counterpoint.data.media import write_video
from counterpoint.errors import DataError

FPS = 30
TRAIN = [
    *(f"Abuse/Abuse{n:03d}_x264.mp4" for n in range(4)),
    *(f"Training_Normal_Videos_Anomaly/Normal_Videos{n:03d}_x264.mp4" for n in range(4)),
]
# Two blanks between the columns and at the end, as the authors' file has them.
TEST = """\
Abuse028_x264.mp4  Abuse  20  49  -1  -1  \n\
Burglary033_x264.mp4  Burglary  0  9  60  79  \n\
Normal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1  \n\
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf")
    places = {
        **{name: root / "Anomaly-Videos-Part-1" / name for name in TRAIN[:4]},
        **{name: root / "Training-Normal-Videos-Part-1" / name.rpartition("/")[2] for name in TRAIN[4:]},
        "Abuse028": root / "Anomaly-Videos-Part-1/Abuse/Abuse028_x264.mp4",
        "Burglary033": root / "Anomaly-Videos-Part-2/Burglary/Burglary033_x264.mp4",
        "Normal": root / "Testing_Normal_Videos_Anomaly/Normal_Videos_003_x264.mp4",
    }
    for number, path in enumerate(places.values()):
        shade = [np.full((48, 64, 3), (7 * number + n) % 255, np.uint8) for n in range(90)]
        write_video(path, shade, None, fps=FPS)
    (root / ucf_crime.TRAIN).write_text("\n".join(TRAIN) + "\n")
    (root / "lists").mkdir()
    (root / "lists" / ucf_crime.TEST[0]).write_text(TEST)
    return root


@pytest.fixture
def copied(tree, tmp_path):
    """Make a tree of links to the videos, with lists of its own."""
    for part in tree.iterdir():
        if part.is_dir() and part.name != "lists":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / ucf_crime.TRAIN).write_text((tree / ucf_crime.TRAIN).read_text())
    (tmp_path / ucf_crime.TEST[0]).write_text(TEST)
    return tmp_path


def test_the_lists_and_the_windows_are_read(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    found = data.load(f"ucf-crime:{tree}?snippet_seconds=0.5&valid=0.25", task="bags")
    assert (len(found.train), len(found.valid), len(found.test)) == (6, 2, 3)
    assert sorted([*(bag.name for bag in found.train), *(video.name for video in found.valid)]) == sorted(TRAIN)
    assert {bag.name: bag.label for bag in found.train}.items() <= {n: int("Normal" not in n) for n in TRAIN}.items()
    abuse, burglary, normal = found.test
    assert (abuse.label, burglary.label, normal.label) == (1, 1, 0)
    assert len(abuse.truth) == 16 * 6
    times = (np.arange(96) + 0.5) * 0.5 / 16  # seconds: frames 20..49 of 30 a second
    np.testing.assert_array_equal(abuse.truth, (times >= 20 / FPS) & (times < 50 / FPS))
    np.testing.assert_array_equal(burglary.truth, (times < 10 / FPS) | ((times >= 2.0) & (times < 80 / FPS)))
    assert not normal.truth.any()
    assert found.valid[0].truth.all() == bool(found.valid[0].label)
    assert any("valid split is made here, 2 of 8" in note for note in found.notes)
    assert found.backbones["visual"]["name"] == "light"


def test_a_video_that_cannot_be_read_is_left_out_with_a_note(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    (copied / "Abuse").mkdir()
    (copied / TRAIN[0]).write_text("no video")  # the path of the list comes first
    found = data.load(f"ucf-crime:{copied}?valid=0.3", task="bags")
    assert len(found.train) + len(found.valid) == 7
    assert any(f"1 of 11 videos left out: {TRAIN[0].rpartition('/')[2]}: not a media file" in n for n in found.notes)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (ucf_crime.TRAIN, None, "has no Anomaly_Train.txt"),
        (ucf_crime.TRAIN, "\n", "the list is empty"),
        (ucf_crime.TRAIN, "\n".join(TRAIN[:2]), "holds anomalous videos alone"),
        (ucf_crime.TRAIN, "\n".join([*TRAIN, TRAIN[0]]), "listed twice: Abuse/Abuse000"),
        (ucf_crime.TRAIN, "\n".join([*TRAIN, "Arson/Arson099_x264.mp4"]), "1 of 12 listed videos are not under"),
        (ucf_crime.TEST[0], None, "has no Temporal_Anomaly_Annotation_for_Testing_Videos.txt"),
        (ucf_crime.TEST[0], "", "the list is empty"),
        (ucf_crime.TEST[0], TEST + "Abuse028_x264.mp4  Abuse  1  2\n", "listed twice: Abuse028"),
        (ucf_crime.TEST[0], TEST + "a.mp4  Abuse  9  2  -1  -1\n", "line 4: a.mp4"),
        (ucf_crime.TEST[0], TEST + "a.mp4  Abuse  -1  -1  -1  -1\n", "windows for anomalous videos alone: line 4"),
        (ucf_crime.TEST[0], TEST + "a.mp4  Normal  1  2  -1  -1\n", "windows for anomalous videos alone: line 4"),
        (ucf_crime.TEST[0], TEST + "a.mp4  Abuse  1\n", "line 4: a.mp4"),
        (ucf_crime.TEST[0], TEST + "Abuse 1 2\n", "line 4: Abuse"),
    ],
)
def test_lists_that_are_no_good_are_an_error(copied, file, text, expected):
    (copied / file).unlink()
    if text is not None:
        (copied / file).write_text(text)
    with pytest.raises(DataError, match=expected):
        data.load(f"ucf-crime:{copied}", task="bags")


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        data.load(f"ucf-crime:{tmp_path / 'gone'}", task="bags")
