"""Pictures of grids with chats: options out of range."""

from __future__ import annotations

import pytest

from counterpoint.data import load
from counterpoint.errors import CounterpointError


@pytest.mark.parametrize("options", ["grid=4&most=8", "grid=2&most=5", "most=0", "cell=2", "seed=-1"])
def test_options_out_of_range_name_the_range(options):
    with pytest.raises(CounterpointError, match="most is 1 to 7"):
        load(
            f"grid-chats?train=4&valid=2&test=2&{options}".replace(
                "train=4&valid=2&test=2&train", "valid=2&test=2&train"
            )
        )


def test_a_picture_with_the_most_objects_leaves_one_to_invent():
    data = load("grid-chats?train=40&valid=2&test=2&grid=3&cell=4&most=7&invented=1.0")
    assert all(len(chat.objects) <= 7 for chat in data.train.chats)
