"""The journal of dirty tracking: whatever interrupts it, it never names a baseline that is not true."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from base.disk import Disk
from base.errors import StorageError
from capture.journal import Journal
from vm.identity import Identity

QEMU = Identity(4711, 123456, "7c5b3d3e-boot")


class FailingDisk(Disk):
    """Fails at the step of a given number, counted from 0."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps, self.fail_at = 0, fail_at

    def step(self, operation: str, path: str) -> None:
        number, self.steps = self.steps, self.steps + 1
        if number == self.fail_at:
            raise StorageError(path, f"cannot {operation}: no space")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tracking.json"


def test_a_baseline_holds_from_commit_to_the_next_collection(path):
    journal = Journal(path, QEMU, Disk())
    assert journal.baseline is None
    journal.begin_collect()
    assert journal.baseline is None
    journal.committed("aa01")
    assert journal.baseline == Journal(path, QEMU, Disk()).baseline == "aa01"
    journal.begin_collect()
    assert journal.baseline is Journal(path, QEMU, Disk()).baseline is None
    journal.committed("aa02")
    assert Journal(path, QEMU, Disk()).baseline == "aa02"


@pytest.mark.parametrize(
    "other",
    [replace(QEMU, pid=4712), replace(QEMU, start_ticks=123457), replace(QEMU, boot="another boot")],
)
def test_another_process_has_no_baseline(path, other):
    Journal(path, QEMU, Disk()).committed("aa01")
    assert Journal(path, other, Disk()).baseline is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 2}', b"\xff\xfe"])
def test_a_damaged_file_is_no_baseline_and_no_error(path, damage):
    Journal(path, QEMU, Disk()).committed("aa01")
    path.write_bytes(damage)
    journal = Journal(path, QEMU, Disk())
    assert journal.baseline is None
    journal.committed("aa02")
    assert Journal(path, QEMU, Disk()).baseline == "aa02"


def test_another_version_is_no_baseline(path):
    Journal(path, QEMU, Disk()).committed("aa01")
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    assert Journal(path, QEMU, Disk()).baseline is None


def steps_of_one_round() -> int:
    return 5  # create, write, fsync, rename, fsync directory


@pytest.mark.parametrize("fail_at", range(steps_of_one_round()))
def test_bits_are_not_cleared_before_that_is_durable(path, fail_at):
    Journal(path, QEMU, Disk()).committed("aa01")
    disk = FailingDisk(fail_at)
    journal = Journal(path, QEMU, disk)
    with pytest.raises(StorageError):
        journal.begin_collect()
    journal.begin_collect()  # the caller tries again: this one must write, whatever the failed one left
    assert disk.steps == fail_at + 1 + steps_of_one_round()
    assert Journal(path, QEMU, Disk()).baseline is None


@pytest.mark.parametrize("fail_at", range(steps_of_one_round()))
def test_a_commit_that_cannot_be_written_down_costs_a_scan_at_most(path, fail_at):
    before = Journal(path, QEMU, Disk())
    before.begin_collect()
    journal = Journal(path, QEMU, FailingDisk(fail_at))
    with pytest.raises(StorageError):
        journal.committed("aa02")
    assert journal.baseline == "aa02"
    assert Journal(path, QEMU, Disk()).baseline in (None, "aa02")


def test_the_identity_of_a_process_survives_a_look_from_elsewhere_and_differs_between_processes():
    assert Identity.of(os.getpid()) == Identity.of(os.getpid())
    assert Identity.of(os.getpid()) != Identity.of(os.getppid())
