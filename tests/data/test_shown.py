"""Pictures for a page: small ones are enlarged by whole pixels, large ones are scaled down, and rows have a width."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from counterpoint.data.shown import captioned, png


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize(
    ("shape", "least", "wanted"), [((3, 5), 1, (3, 5)), ((3, 5), 6, (6, 10)), ((3, 5), 7, (9, 15))]
)
def test_a_small_picture_is_enlarged_by_whole_pixels(shape, least, wanted):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = decoded(png(pixels, least=least))
    assert found.shape == (*wanted, 3)
    factor = wanted[0] // shape[0]
    np.testing.assert_array_equal(found[::factor, ::factor], pixels)


def test_a_large_picture_is_scaled_down():
    assert decoded(png(np.zeros((200, 100), np.uint8), largest=50)).shape == (50, 25)


def test_cells_fill_rows_in_order():
    cells = [{"png": "", "text": str(n)} for n in range(5)]
    rows = captioned(cells, 2, "all")["rows"]
    assert [[cell["text"] for cell in row["cells"]] for row in rows] == [["0", "1"], ["2", "3"], ["4"]]
