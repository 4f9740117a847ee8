"""Moving averages, and their logarithms where the values overflow."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core.averages import averaged, averaged_log, bounded_exp


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_logarithm_is_that_of_the_average(share: float, fresh: bool) -> None:
    old, new = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    expected = averaged(old, new, share, fresh=fresh)
    torch.testing.assert_close(averaged_log(old, new.log(), share, fresh=fresh).exp(), expected)
    torch.testing.assert_close(expected[1:], (1 - share) * old[1:] + share * new[1:])


def test_an_average_starts_from_its_first_value_or_from_zero() -> None:
    old, new = torch.zeros(1), torch.tensor([4.0])
    assert averaged(old, new, 0.25, fresh=True).item() == 4
    assert averaged(old, new, 0.25, fresh=False).item() == 1


def test_large_values_stay_finite() -> None:
    log = averaged_log(torch.tensor([1.0]), torch.tensor([1000.0]), 0.5, fresh=False)
    assert log.isfinite().all()
    assert bounded_exp(log).item() == torch.finfo(torch.float32).max
    assert bounded_exp(torch.tensor([0.0])).item() == 1
