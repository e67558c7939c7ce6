"""Rounds and limits of the pause, with a guest that writes on while it runs: whenever it runs, it writes some pages."""

from collections.abc import Iterator

import pytest
from capture_fixtures import PAGES, WritingGuest
from store_fixtures import Place, place

from base import extents as ranges
from base.errors import ConflictError
from base.units import PAGE
from capture.pause import Limits, PauseModel


@pytest.fixture
def where() -> Iterator[Place]:
    with place() as made:
        yield made


def test_rounds_go_on_until_the_rest_fits(where, tmp_path):
    guest = WritingGuest(tmp_path, [3000, 800, 200, 50, 10])
    guest.write()
    with where.open() as repository:
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=20, exceed=False))
        assert done.stopped is not None and done.stopped.rounds in (3, 4) and guest.stops == 1
        guest.plan = [500, 500, 500, 500, 10]
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=20, exceed=False))
        assert done.stopped.rounds > 3


def test_a_capture_that_cannot_keep_its_limit_is_given_up_and_the_next_one_has_everything(where, tmp_path):
    guest = WritingGuest(tmp_path, [1000])
    guest.write()
    with where.open() as repository:
        guest.capture(repository, Limits())
        with pytest.raises(
            ConflictError, match=r"VM vm: given up, .* after 3 rounds, .* pause_ms_max is 100"
        ) as caught:
            guest.capture(repository, Limits(pause_ms_max=100, rounds_max=3, exceed=False))
        assert "\n" not in str(caught.value) and guest.running
        assert [each.number for each in repository.generations("vm")] == [1]
        assert guest.journal.baseline("pm0") is None  # bits were cleared: a next supervisor looks at everything
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=3))
        assert done.stopped is not None and done.stopped.rounds == 3


def test_under_direct_io_a_round_begins_with_a_stop(where, tmp_path):
    guest = WritingGuest(tmp_path, [3000, 400, 20], direct_io=True)
    guest.write()
    with where.open() as repository:
        done = guest.capture(repository, Limits())
        assert done.stopped is not None and done.stopped.rounds == 1 and guest.stops == 2
        guest.plan = [10]
        guest.capture(repository, Limits())
        guest.capture(repository, Limits())
        assert guest.stops == 4  # little is dirty: one is enough


class Tagging(WritingGuest):
    """Has other memory tagged at each stop than when the capture was planned."""

    def stop(self) -> None:
        start = self.random.randrange(PAGES // 2)
        self.kept = ranges.normalise([(0, 8 * PAGE), (start * PAGE, (start + PAGES // 3) * PAGE)])
        super().stop()


@pytest.mark.parametrize("kind", ["userfaultfd", "scan"])
def test_what_is_tagged_while_a_capture_runs_is_in_it_and_what_is_untagged_is_not(where, tmp_path, kind):
    """The guest knows at the instant, and what it writes elsewhere may stand on it."""
    guest = Tagging(tmp_path, [200], kind)
    guest.write()
    with where.open() as repository:
        for _ in range(4):
            done = guest.capture(repository)
            assert done.generation.metadata["kept"] == {"pm0": guest.kept.tolist()}


def test_a_scan_hashes_nothing_while_the_guest_stands_still(where, tmp_path, monkeypatch):
    guest = WritingGuest(tmp_path, [100], "scan")
    guest.write()
    with where.open() as repository:
        replace = type(repository.writer("other")).replace

        def replaced(*arguments, **more):
            assert guest.running
            return replace(*arguments, **more)

        monkeypatch.setattr("store.writer.GenerationWriter.replace", replaced)
        for _ in range(3):
            done = guest.capture(repository, Limits(pause_ms_max=1))
            assert done.stopped is not None and guest.stops == 1
            guest.stops = 0
            guest.write()


@pytest.fixture
def clock(monkeypatch) -> Iterator[list[float]]:
    """What time it is for pauses, in seconds: it stands still."""
    now = [1000.0]
    monkeypatch.setattr("capture.pause.time.monotonic", lambda: now[0])
    return now


def test_pauses_are_the_sum_of_all_stops_and_the_longest_is_told_apart(where, tmp_path, clock):
    guest = WritingGuest(tmp_path, [3000, 400, 20], direct_io=True)
    guest.write()
    goes_on, lasting = guest.cont, [0.05, 0.01]

    def cont() -> None:
        clock[0] += lasting.pop(0)
        goes_on()

    guest.cont = cont
    with where.open() as repository:
        done = guest.capture(repository, Limits())
    assert guest.stops == 2 and done.stopped is not None
    assert done.stopped.pause_ms == pytest.approx(60) == done.generation.pause_ms
    assert done.stopped.longest_ms == pytest.approx(50)
    assert guest.model is not None and guest.model.fixed_ms == pytest.approx(5)  # half of 10, the last one's


def test_what_is_given_up_copies_nothing_while_the_guest_stands_still(where, tmp_path, monkeypatch):
    guest = WritingGuest(tmp_path, [1000])
    guest.write()
    monkeypatch.setattr("capture.pause._take_copies", lambda *_: pytest.fail("it copies"))
    with where.open() as repository, pytest.raises(ConflictError):
        guest.capture(repository, Limits(pause_ms_max=100, rounds_max=3, exceed=False))


def test_a_guest_that_somebody_else_has_stopped_does_not_run_for_a_round(where, tmp_path):
    guest = WritingGuest(tmp_path, [3000, 400, 20], direct_io=True)
    guest.write()
    guest.running = False
    with where.open() as repository:
        done = guest.capture(repository, Limits())
    assert done.stopped is not None and done.stopped.rounds == 0 and guest.stops == 1


def test_what_pauses_are_made_of_is_learnt():
    model = PauseModel(5, 30, PAGE)
    model.learn(9.0, 4.0, 4 << 20, full=True)
    assert (model.fixed_ms, model.fixed_full_ms) == (5, 17.5)
    speed = model.bytes_per_ms
    model.learn(9.0, 4.0, 1000, full=True)
    assert model.bytes_per_ms == speed > PAGE  # so few bytes say nothing
    model = PauseModel(5, 30, PAGE)
    for _ in range(20):
        model.learn(22.0, 20.0, 20 << 20, full=False)
    assert model.expected_ms(10 << 20, full=False) == pytest.approx(12, rel=0.01)
    assert model.allowed_bytes(12, full=False) == pytest.approx(10 << 20, rel=0.01)
    assert model.allowed_bytes(20, full=True) == 0
    assert model.allowed_bytes(None, full=True) == float("inf")
