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
    assert journal.baseline("pm0") is None
    journal.begin_collect(["pm0"])
    assert journal.baseline("pm0") is None
    journal.committed("aa01", ["pm0"])
    assert journal.baseline("pm0") == Journal(path, QEMU, Disk()).baseline("pm0") == "aa01"
    journal.begin_collect(["pm0"])
    assert journal.baseline("pm0") is Journal(path, QEMU, Disk()).baseline("pm0") is None
    journal.committed("aa02", ["pm0"])
    assert Journal(path, QEMU, Disk()).baseline("pm0") == "aa02"


def test_each_region_has_a_baseline_of_its_own(path):
    """Main memory is only in full generations; a capture of the others says nothing about it."""
    journal = Journal(path, QEMU, Disk())
    journal.committed("aa01", ["pm0", "ram"])
    journal.begin_collect(["pm0"])
    assert (journal.baseline("pm0"), journal.baseline("ram")) == (None, "aa01")
    journal.committed("aa02", ["pm0"])
    journal.begin_collect(["ram"])  # scrubbed, say
    journal = Journal(path, QEMU, Disk())
    assert (journal.baseline("pm0"), journal.baseline("ram")) == ("aa02", None)
    journal.committed("aa03", ["pm0"])
    assert (journal.baseline("pm0"), journal.baseline("ram")) == ("aa03", None)
    assert Journal(path, QEMU, Disk()).baseline("ram") is None


@pytest.mark.parametrize(
    "other",
    [replace(QEMU, pid=4712), replace(QEMU, start_ticks=123457), replace(QEMU, boot="another boot")],
)
def test_another_process_has_no_baseline(path, other):
    Journal(path, QEMU, Disk()).committed("aa01", ["pm0"])
    assert Journal(path, other, Disk()).baseline("pm0") is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_no_baseline_and_no_error(path, damage):
    Journal(path, QEMU, Disk()).committed("aa01", ["pm0"])
    path.write_bytes(damage)
    journal = Journal(path, QEMU, Disk())
    assert journal.baseline("pm0") is None
    journal.committed("aa02", ["pm0"])
    assert Journal(path, QEMU, Disk()).baseline("pm0") == "aa02"


def test_another_version_is_no_baseline(path):
    Journal(path, QEMU, Disk()).committed("aa01", ["pm0"])
    path.write_text(path.read_text().replace('"version":2', '"version":3'))
    assert Journal(path, QEMU, Disk()).baseline("pm0") is None


def steps_of_one_round() -> int:
    return 5  # create, write, fsync, rename, fsync directory


@pytest.mark.parametrize("fail_at", range(steps_of_one_round()))
def test_bits_are_not_cleared_before_that_is_durable(path, fail_at):
    Journal(path, QEMU, Disk()).committed("aa01", ["pm0"])
    disk = FailingDisk(fail_at)
    journal = Journal(path, QEMU, disk)
    with pytest.raises(StorageError):
        journal.begin_collect(["pm0"])
    journal.begin_collect(["pm0"])  # the caller tries again: this one must write, whatever the failed one left
    assert disk.steps == fail_at + 1 + steps_of_one_round()
    assert Journal(path, QEMU, Disk()).baseline("pm0") is None


@pytest.mark.parametrize("fail_at", range(steps_of_one_round()))
def test_a_commit_that_cannot_be_written_down_costs_a_scan_at_most(path, fail_at):
    before = Journal(path, QEMU, Disk())
    before.begin_collect(["pm0"])
    journal = Journal(path, QEMU, FailingDisk(fail_at))
    with pytest.raises(StorageError):
        journal.committed("aa02", ["pm0"])
    assert journal.baseline("pm0") == "aa02"
    assert Journal(path, QEMU, Disk()).baseline("pm0") in (None, "aa02")


def test_the_identity_of_a_process_survives_a_look_from_elsewhere_and_differs_between_processes():
    assert Identity.of(os.getpid()) == Identity.of(os.getpid())
    assert Identity.of(os.getpid()) != Identity.of(os.getppid())
