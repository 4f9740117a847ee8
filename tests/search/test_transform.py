"""The inputs of a run's encoders, by the facts of its data."""

import numpy as np

from counterpoint.search.transform import Transform


def test_run_on_pictures_with_masks_takes_pictures():
    facts = {"size": 8, "modalities": ["image", "depth"], "regions": ["background", "road"]}  # as dense data give them
    transform = Transform.of_facts(facts, None)
    assert transform.of_kind("image") == ["image"]
    assert transform("image", [np.zeros((8, 12, 3), np.uint8)]).shape == (1, 3, 8, 8)
