"""base.arrays against numpy's own, which is slower to begin."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from base.arrays import distinct


@given(st.lists(st.integers(0, 9) | st.integers(0, 2**64 - 1)))
def test_distinct_values_are_those_of_numpy(values: list[int]) -> None:
    given_ = np.array(values, np.uint64)
    before = given_.copy()
    found = distinct(given_)
    assert found.dtype == np.uint64
    assert np.array_equal(found, np.unique(given_))
    assert np.array_equal(given_, before)
