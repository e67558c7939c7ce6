"""Every decoder, fed what is damaged: never anything but its typed errors. bench/fuzz.py does the same for longer."""

import random
import resource
from pathlib import Path

import pytest
from decoders_of_vms import DECODERS, world
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.fuzz import damaged

MEMORY_MOST = 2 << 30
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"v":1,"id":1,"do":' + b"[" * 50_000]


@pytest.mark.parametrize("name", DECODERS)
def test_whole_examples_are_accepted(name):
    decoder = DECODERS[name]
    accepted = [decoder.feed(each) for each in decoder.seeds()]
    assert any(accepted) if name in ("record", "record under seal", "pack") else all(accepted)


@pytest.fixture(autouse=True)
def bounded_memory():
    """An input that makes a decoder ask for more than this gets a MemoryError, which no decoder may raise."""
    world()
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_MOST, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", DECODERS)
def test_damaged_examples(name):
    decoder = DECODERS[name]
    seeds = decoder.seeds()

    @settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(seeds) - 1), st.integers(0, 1 << 32))
    def feed(seed, choices):
        decoder.feed(damaged(seeds[seed], seeds, random.Random(choices)))

    feed()


@pytest.mark.parametrize("name", DECODERS)
def test_anything_at_all(name):
    @settings(max_examples=60, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=400))
    @example(b"")
    @example(DEEP[0])
    @example(DEEP[1])
    @example(DEEP[2])
    @example(b"\xff\xfe\xed\xa0\x80")
    @example(b"9" * 5000)
    def feed(data):
        DECODERS[name].feed(data)

    feed()
