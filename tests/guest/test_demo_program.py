"""The demo's data: any damage is found, and no state in between is taken for damage."""

from pathlib import Path

import pytest
from guest_fixtures import load
from hypothesis import given
from hypothesis import strategies as st

demo = load(Path(__file__).parent / "demo_program.py")
PAGES = 300
SEED = bytes(range(32))


@pytest.fixture(scope="module")
def filled():
    memory = bytearray(PAGES * demo.PAGE)
    demo.fill(memoryview(memory), SEED)
    return bytes(memory)


@given(st.integers(1, 400), st.integers(0, 500))
def test_the_version_is_that_of_the_last_change(page, counter):
    changes = [each for each in range(1, counter + 1) if page in demo.changed_pages(each, 500)]
    assert demo.version_of(page, counter) == (changes[-1] if changes else 0)


def test_each_counter_changes_about_a_hundredth(filled):
    memory = bytearray(filled)
    for counter in range(1, 4):
        before = bytes(memory)
        assert demo.advance(memoryview(memory)) == 3
        changed = [
            at for at in range(PAGES) if memory[at * 4096 : at * 4096 + 4096] != before[at * 4096 : at * 4096 + 4096]
        ]
        assert changed == [0, *demo.changed_pages(counter, PAGES)]
        assert demo.decode_header(memoryview(memory)) == (SEED, counter, 0)
        assert demo.damaged_page(memoryview(memory)) is None


@given(st.integers(0, PAGES * 4096 - 1), st.integers(1, 255))
def test_any_flipped_byte_is_found(filled, offset, flip):
    memory = bytearray(filled)
    memory[offset] ^= flip
    page, within = divmod(offset, 4096)
    found = demo.damaged_page(memoryview(memory))
    assert found == (page if page or within < demo._HEADER.size else None)


def test_memory_without_data_has_no_header():
    assert demo.decode_header(memoryview(bytes(4096))) is None
    assert demo.damaged_page(memoryview(bytes(8192))) == 0


@pytest.mark.parametrize("done", range(5))
def test_a_change_that_was_cut_short_is_valid_and_goes_on(filled, done):
    """As many pages written as `done` says, the header as it is meanwhile."""
    after = bytearray(filled)
    demo.advance(memoryview(after))
    memory = bytearray(filled)
    memory[: demo._HEADER.size] = demo.encode_header(SEED, 0, 1)
    for page in list(demo.changed_pages(1, PAGES))[:done]:
        memory[page * 4096 : page * 4096 + 4096] = after[page * 4096 : page * 4096 + 4096]
    assert demo.damaged_page(memoryview(memory)) is None
    memory[50 * 4096 + 100] ^= 1
    assert demo.damaged_page(memoryview(memory)) == 50
    memory[50 * 4096 + 100] ^= 1
    demo.advance(memoryview(memory))
    assert memory == after


def test_pages_do_not_repeat(filled):
    assert len({filled[at * 4096 + 16 : at * 4096 + 4096] for at in range(1, PAGES)}) == PAGES - 1


def test_the_secret_follows_from_the_seed_and_is_not_it():
    secret = demo.secret_text("00ff1234")
    assert len(secret) == 128
    assert secret == demo.secret_text("00FF1234") != demo.secret_text("00ff1235")
    assert b"00ff1234" not in secret
