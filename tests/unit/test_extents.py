"""Extents against plain Python sets of bytes."""

import os
import tempfile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from base import extents

ROWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def as_set(rows) -> set[int]:
    return {each for low, high in rows for each in range(int(low), int(high))}


def is_canonical(array) -> bool:
    flat = array.ravel()
    return array.dtype == np.int64 and bool((np.diff(flat) > 0).all())


@given(ROWS, ROWS)
def test_set_operations_agree_with_python_sets(a, b):
    left, right = extents.normalise(a), extents.normalise(b)
    for ours, wanted in (
        (left, as_set(a)),
        (extents.union(left, right), as_set(a) | as_set(b)),
        (extents.intersect(left, right), as_set(a) & as_set(b)),
        (extents.subtract(left, right), as_set(a) - as_set(b)),
    ):
        assert is_canonical(ours)
        assert as_set(ours) == wanted
        assert extents.total(ours) == len(wanted)


@given(ROWS, st.integers(1, 9))
def test_unit_numbers_round_trip(rows, unit):
    units = extents.numbers(extents.normalise(rows), unit)
    assert set(units.tolist()) == {each // unit for each in as_set(rows)}
    assert as_set(extents.from_numbers(units, unit)) == {n * unit + i for n in units.tolist() for i in range(unit)}


def test_resident_ranges_of_a_sparse_file():
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), 1 << 40)
        for page in (3, 4, 1 << 20):
            os.pwrite(file.fileno(), b"x", page * 4096)
        assert extents.resident(file.fileno(), 1 << 40).tolist() == [[3 * 4096, 5 * 4096], [1 << 32, (1 << 32) + 4096]]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=20), st.integers(1, 12), st.integers(1, 4))
def test_pieces_are_all_of_it_in_order_and_within_their_limits(rows, size, rows_max):
    whole = extents.normalise([(start, start + length) for start, length in rows])
    found = list(extents.pieces(whole, size, rows_max))
    assert all(0 < extents.total(each) <= size and len(each) <= rows_max for each in found)
    assert all(extents.total(each) == size or len(each) == rows_max for each in found[:-1])
    assert np.array_equal(
        extents.numbers(whole, 1),
        np.concatenate([extents.numbers(whole[:0], 1), *(extents.numbers(each, 1) for each in found)]),
    )
