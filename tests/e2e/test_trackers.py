"""Trackers on real QEMU, judged by complete copies of guest memory taken at two stops: a changed page that the tracker
does not name is a failure.

The guest does nothing but write random bytes, and read its disk into other pages around its page cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guest_fixtures import load
from supervised import CPU, QEMU

from base import extents
from base.disk import Disk
from base.errors import ConflictError, VirtualMachineError
from base.extents import Extents
from base.units import PAGE
from capture.choice import Facts, Kernel, probe_facts
from capture.journal import Journal
from capture.trackers import WriteProtectTracker
from capture.tracking import Tracking, start_tracking
from vm import injection
from vm.identity import Identity
from vm.mappings import shared_mappings
from vm.pagemap import Pagemap
from vm.userfaultfd import Userfaultfd

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).resolve().parents[2]
client = load(ROOT / "tests/guest/client.py")
MEMORY, DISK = 256 << 20, 96 << 20
PATIENCE_S = 120

CHURN = """
import mmap, os, random, time
freed = mmap.mmap(-1, 48 << 20)
for at in range(0, len(freed), 4096):
    freed[at : at + 8] = b"leftover"
freed.close()  # memory with content for a balloon to take
scratch, landing = mmap.mmap(-1, 32 << 20), mmap.mmap(-1, 16 << 20)
views = [memoryview(landing)[at : at + (1 << 20)] for at in range(0, len(landing), 1 << 20)]
disk = os.open("/dev/vda", os.O_RDONLY | os.O_DIRECT)
size = os.lseek(disk, 0, os.SEEK_END)
steps = 0

def churn():
    global steps
    while True:
        at = random.randrange(len(scratch))
        scratch[at] = (scratch[at] + 1) % 256
        os.preadv(disk, [random.choice(views)], random.randrange(size >> 20) << 20)
        steps += 1

def wait(count):
    wanted = steps + count
    while steps < wanted:
        time.sleep(0.001)
"""


class Guest:
    """A QEMU process with its memory in `memory`, begun stopped, and a shell into the guest."""

    def __init__(self, folder: Path, image: Any, disk: Path, cache: str, *more: str) -> None:
        self.folder, self.memory = folder, folder / "memory"
        with open(folder / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(
                [
                    *(str(QEMU), "-S", "-accel", "tcg", "-m", f"{MEMORY >> 20}M", "-nodefaults"),
                    *("-machine", "q35,memory-backend=ram0", "-cpu", CPU, "-display", "none"),
                    *("-object", f"memory-backend-file,id=ram0,size={MEMORY},mem-path={self.memory},share=on"),
                    *(
                        "-kernel",
                        str(image.kernel),
                        "-initrd",
                        str(image.initrd),
                        "-append",
                        image.append.removeprefix("console=ttyS0 "),
                    ),
                    *("-drive", f"file={disk},format=raw,if=none,id=disk,cache={cache},readonly=on"),
                    *("-device", "virtio-blk-pci,drive=disk", "-device", "virtio-serial-pci"),
                    *("-chardev", f"socket,id=test,path={folder}/test,server=on,wait=off"),
                    *("-device", "virtserialport,chardev=test,name=org.perdure.test.0"),
                    *("-qmp", f"unix:{folder}/qmp,server=on,wait=off", *more),
                ],
                stderr=log,
                start_new_session=True,
            )
        self.pid = self.process.pid
        self.shell = client.GuestShell(folder / "test")
        try:
            self._qmp = self._connect(folder / "qmp").makefile("rw")
        except BaseException:
            self.close()
            raise
        self._qmp.readline()
        self("qmp_capabilities")

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE_S)
            try:
                connection.connect(str(path))
                return connection
            except OSError:  # QEMU does not listen yet, or has ended
                connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
                break
        raise AssertionError("QEMU does not listen: " + (path.parent / "qemu.log").read_text())

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            reply = json.loads(self._qmp.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    def boot(self) -> None:
        """Let it run, and begin to write and read in it."""
        self("cont")
        self.shell.wait_ready(PATIENCE_S)
        self.shell.run(CHURN, PATIENCE_S)
        self.shell.start("churn()", PATIENCE_S)
        self.churn()

    def churn(self, steps: int = 50) -> None:
        """Wait until the guest has gone through some more writes and reads."""
        self.shell.run(f"wait({steps})", PATIENCE_S)

    def image(self) -> np.ndarray:
        """A private copy of all guest memory: uint8, shape (pages, PAGE)."""
        return np.fromfile(self.memory, np.uint8).reshape(-1, PAGE)

    def disk_bytes_read(self) -> int:
        return sum(int(each["stats"]["rd_bytes"]) for each in self("query-blockstats"))

    def close(self) -> None:
        self.shell.close()
        self.process.kill()
        self.process.wait()


class Mirror:
    """A copy of guest memory that is kept up to date by what a tracker says, as a chain of generations would be."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.pages = guest, guest.image()

    def take(self, dirty: Extents | None) -> None:
        assert dirty is not None
        flat = memoryview(self.pages.reshape(-1))
        with open(self.guest.memory, "rb", buffering=0) as memory:
            for start, end in dirty.tolist():
                assert os.preadv(memory.fileno(), [flat[start:end]], start) == end - start

    def wrong_pages(self) -> list[int]:
        return np.flatnonzero((self.pages != self.guest.image()).any(axis=1)).tolist()


def missed(before: np.ndarray, after: np.ndarray, dirty: Extents) -> list[int]:
    """Pages that differ between two images of memory and that `dirty` does not name."""
    changed = np.flatnonzero((before != after).any(axis=1)).astype(np.uint64)
    assert len(changed), "nothing changed: this test shows nothing"
    return sorted(set(changed.tolist()) - set(extents.numbers(dirty, PAGE).tolist()))


def content(image: np.ndarray) -> Extents:
    return extents.from_numbers(np.flatnonzero(image.any(axis=1)).astype(np.uint64), PAGE)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bytes, so that every read changes memory, on a file system that can O_DIRECT."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(np.random.default_rng(1).bytes(DISK))
    path.chmod(0o644)
    path.parent.chmod(0o755)
    return path


@pytest.fixture
def launch(short_folder: Path, guest_image: Any, disk: Path) -> Iterator[Callable[..., Guest]]:
    """`launch(cache, *more)` starts QEMU, stopped, with the disk's cache mode and more arguments; once a test."""
    with contextlib.ExitStack() as stack:

        def start(cache: str, *more: str) -> Guest:
            guest = Guest(short_folder, guest_image, disk, cache, *more)
            stack.callback(guest.close)
            return guest

        yield start


def device_types(guest: Guest) -> list[str]:
    places = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
    return [each["type"] for place in places for each in guest("qom-list", path=place)]


def facts_of(guest: Guest, kernel: Kernel | None = None) -> Facts:
    return probe_facts(
        guest.pid,
        devices=device_types(guest),
        block_nodes=guest("query-named-block-nodes"),
        networks=guest("human-monitor-command", **{"command-line": "info network"}),
        kernel=kernel,
    )


@contextlib.contextmanager
def begin(guest: Guest, kernel: Kernel | None = None, **options: Any) -> Iterator[Tracking]:
    """Trackers for the guest's memory as the supervisor begins them."""
    qemu, facts = Identity.of(guest.pid), facts_of(guest, kernel)
    journal = Journal(guest.folder / "tracking.json", qemu, Disk())
    tracking = start_tracking("test", qemu, {"ram": guest.memory}, facts, journal, **options)
    with contextlib.closing(tracking):
        yield tracking


def kernel_is_old(tracking: Tracking) -> bool:
    """On a kernel without PAGEMAP_SCAN all there is to see is that scan was chosen, and why."""
    if Kernel.probe().pagemap_scan:
        assert tracking.choice.kind == "userfaultfd", tracking.choice.reason
        return False
    assert tracking.choice.kind == "scan"
    assert "has no PAGEMAP_SCAN (6.7 does)" in tracking.choice.reason
    return True


@pytest.mark.parametrize(
    ("cache", "more"),
    [("none", ()), ("writeback", ()), ("none", ("-runas", "nobody")), ("none", ("-sandbox", "on"))],
    ids=["none", "writeback", "none-unprivileged", "none-sandbox"],
)
def test_no_page_is_missed_with_disk_reads_in_flight(launch, short_folder, cache, more):
    short_folder.chmod(0o755)  # for a QEMU that drops its privileges
    guest = launch(cache, *more)
    with begin(guest, running=False) as tracking:
        if kernel_is_old(tracking):
            return
        tracker = tracking.trackers["ram"]
        assert tracker.direct_io == (cache == "none")
        tracker.committed()
        mirror, read_before, dirty_bytes = Mirror(guest), guest.disk_bytes_read(), []
        guest.boot()
        for _ in range(12):
            for _ in range(3):  # close together: a read in flight at the last one is still so when that has been taken
                if cache == "none":
                    with pytest.raises(ConflictError, match=r"test: region ram: .*cache\.direct=on.*stop the VM"):
                        tracker.collect(running=True)
                else:
                    mirror.take(tracker.collect(running=True).fresh)
            guest("stop")
            dirty = tracker.collect(running=False)
            mirror.take(dirty.fresh)
            assert mirror.wrong_pages() == []
            assert dirty.extents is not None
            dirty_bytes.append(extents.total(dirty.extents))
            tracker.committed()
            guest("cont")
            guest.churn(8)
        assert 0 < min(dirty_bytes) < MEMORY // 4  # it says more than "everything"
        assert guest.disk_bytes_read() - read_before > 64 << 20


def test_under_a_running_guest_with_direct_reads_tracking_begins_at_the_first_stop(launch):
    guest = launch("none")
    guest.boot()
    with begin(guest, running=True) as tracking:
        if kernel_is_old(tracking):
            return
        tracker = tracking.trackers["ram"]
        guest("stop")
        assert tracker.collect(running=False).extents is None
        before = guest.image()
        tracker.committed()
        guest("cont")
        guest.churn(20)
        guest("stop")
        dirty, after = tracker.collect(running=False).extents, guest.image()
        assert dirty is not None
        assert missed(before, after, dirty) == []
        assert extents.total(dirty) < MEMORY // 4


def test_what_is_plugged_in_later_is_gone_by_and_nothing_is_known_of_what_was_before(launch):
    """Without a guest that runs: see test_capture_events.py for one."""
    guest = launch(
        "writeback", "-device", "pcie-root-port,id=one,chassis=1", "-device", "pcie-root-port,id=two,chassis=2"
    )
    with begin(guest, running=False) as tracking:
        journal = Journal(guest.folder / "tracking.json", Identity.of(guest.pid), Disk())
        assert tracking.go_by(facts_of(guest), journal) is None
        if kernel_is_old(tracking):
            return
        tracker = tracking.trackers["ram"]

        def changes(*said: str) -> None:
            tracking.trackers["ram"].committed()
            journal.committed("aa01", ["ram"])
            changed = tracking.go_by(facts_of(guest), journal)
            assert changed is not None and all(each in changed for each in said)
            assert changed in tracking.choice.reason
            assert journal.baseline("ram") is None
            assert tracking.trackers["ram"].collect(running=False).extents is None
            assert tracking.go_by(facts_of(guest), journal) is None

        guest("blockdev-add", **{"driver": "null-co", "node-name": "later", "cache": {"direct": True}})
        guest("device_add", driver="virtio-blk-pci", bus="one", drive="later", id="disk-later")
        changes("a disk has cache.direct=on by now")
        with pytest.raises(ConflictError, match=r"cache\.direct=on"):
            tracker.collect(running=True)
        guest("device_add", driver="virtio-balloon-pci", bus="two", id="balloon-later")
        changes("a device takes memory from the guest by now")
        assert isinstance(tracker, WriteProtectTracker) and tracker.direct_io and tracker.discards
        foreign = replace(facts_of(guest), devices=("vfio-pci",))
        changed = tracking.go_by(foreign, journal)
        assert changed is not None and "scan now: device vfio-pci writes to guest memory by itself" in changed
        assert tracking.choice.kind == tracking.trackers["ram"].kind == "scan"
        assert tracking.follow("more", guest.memory).kind == "scan"
        with guest.memory.open("rb") as file, Pagemap(guest.pid) as tables, pytest.raises(PermissionError):
            tables.written(shared_mappings(guest.pid, file.fileno()), rearm=False)  # nothing is armed any more
        assert tracking.go_by(facts_of(guest), journal) is None


def test_what_came_since_the_previous_collection_is_told_apart(launch):
    guest = launch("writeback")
    with begin(guest, running=False) as tracking:
        if kernel_is_old(tracking):
            return
        tracker = tracking.trackers["ram"]
        guest.boot()
        assert tracker.collect(running=True).extents is None  # there is no baseline yet
        guest("stop")
        tracker.collect(running=False)
        before = guest.image()
        tracker.committed()
        guest("cont")
        guest.churn()
        guest("stop")
        one, middle = tracker.collect(running=False), guest.image()
        guest("cont")
        guest.churn()
        guest("stop")
        two, after = tracker.collect(running=False), guest.image()
        assert one.extents is not None and two.extents is not None and two.fresh is not None
        assert missed(before, middle, one.extents) == []
        assert missed(middle, after, two.fresh) == []
        assert missed(before, after, two.extents) == []
        assert len(extents.subtract(one.extents, two.extents)) == 0


def test_discarded_pages_are_dirty_though_nobody_wrote_them(launch):
    guest = launch("writeback", "-device", "virtio-balloon-pci")
    with begin(guest, running=False) as tracking:
        if kernel_is_old(tracking):
            return
        tracker = tracking.trackers["ram"]
        assert isinstance(tracker, WriteProtectTracker) and tracker.discards
        guest.boot()
        guest("stop")
        tracker.collect(running=False)
        tracker.committed()
        before = guest.image()
        guest("cont")
        guest("balloon", value=MEMORY - (100 << 20))
        while guest("query-balloon")["actual"] > MEMORY - (90 << 20):
            guest.churn(1)
        guest("stop")
        dirty = tracker.collect(running=False, known=content(before)).extents
        after = guest.image()
        assert dirty is not None
        assert missed(before, after, dirty) == []
        tracker.committed()

        # QEMU 7.2 also drops its page table entries of a balloon's page, which shows as a write; a hole alone does not.
        start, end = content(after)[-1].tolist()
        subprocess.run(["fallocate", "-p", "-o", str(start), "-l", str(end - start), guest.memory], check=True)
        punched = guest.image()
        tracker.discards = False
        dirty = tracker.collect(running=False).extents
        assert dirty is not None
        assert missed(after, punched, dirty) == list(range(start // PAGE, end // PAGE))
        tracker.discards = True
        dirty = tracker.collect(running=False, known=content(after)).extents
        assert dirty is not None
        assert missed(after, punched, dirty) == []
        assert tracker.collect(running=False).extents is None  # nobody can tell without the baseline's content


def test_a_mapping_that_comes_or_goes_is_dirty_as_a_whole(launch, short_folder):
    extra = short_folder / "extra"
    guest = launch("writeback", "-object", f"memory-backend-file,id=extra,size=1M,mem-path={extra},share=on")
    if not Kernel.probe().pagemap_scan:
        return
    with contextlib.ExitStack() as stack:
        tracker = WriteProtectTracker("test", extra, stack.enter_context(Userfaultfd.of(guest.pid)))
        stack.callback(tracker.close)
        file = stack.enter_context(open(extra, "rb"))

        def collected() -> list[list[int]]:
            dirty = tracker.collect(running=True).extents
            assert dirty is not None
            tracker.committed()
            return dirty.tolist()

        tracker.arm(running=True)
        tracker.committed()
        assert collected() == []
        for _ in range(2):
            plugged = {"qom-type": "memory-backend-file", "id": "again", "size": 1 << 20, "share": True}
            guest("object-add", **plugged, **{"mem-path": str(extra)})
            assert collected() == [[0, 1 << 20]]
            assert collected() == []
            guest("object-del", id="again")
            while len(shared_mappings(guest.pid, file.fileno())) > 1:  # QEMU unmaps a moment later
                guest("query-status")
            assert collected() == [[0, 1 << 20]]
            assert collected() == []
        tracker.detach()
        again = tracker.collect(running=True)  # registers and arms anew
        assert again.extents is None and again.fresh is not None
        assert again.fresh.tolist() == [[0, 1 << 20]]


# A supervisor that begins to track, says so, and waits to be killed; with an argument it dies after a collection.
SUPERVISOR = """
import sys
from pathlib import Path
from base.disk import Disk
from capture.choice import Facts, Kernel
from capture.journal import Journal
from capture.tracking import start_tracking
from vm.identity import Identity
pid, memory, folder, collects = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "collects"
qemu = Identity.of(pid)
journal = Journal(folder / "tracking.json", qemu, Disk())
tracking = start_tracking("test", qemu, {"ram": memory}, Facts(Kernel.probe()), journal, running=True, restored="aa01")
if collects:
    journal.begin_collect(["ram"])
    tracking.trackers["ram"].collect(running=True)
print("armed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("dies", ["idle", "collects"])
def test_a_new_supervisor_goes_on_where_a_killed_one_was(launch, dies):
    guest = launch("writeback")
    guest.boot()
    guest("stop")
    before = guest.image()
    command = [sys.executable, "-c", SUPERVISOR, str(guest.pid), str(guest.memory), str(guest.folder), dies]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == b"armed\n"
        guest("cont")
        guest.churn()
        old.kill()
    guest.churn()  # nobody is there, and the kernel keeps on noting
    with begin(guest, running=True) as tracking:
        if kernel_is_old(tracking):
            return
        assert len(injection.held_descriptors(guest.pid, "anon_inode:[userfaultfd]")) == 1
        guest("stop")
        after = guest.image()
        dirty = tracking.trackers["ram"].collect(running=False).extents
        if dies == "collects":
            assert dirty is None
            return
        assert dirty is not None
        assert missed(before, after, dirty) == []
        assert extents.total(dirty) < MEMORY // 4


def test_200_injections_do_not_disturb_a_busy_guest(launch):
    guest = launch("none")
    guest.boot()
    numbers = [injection.inject(guest.pid) for _ in range(200)]
    assert len(set(numbers)) == 200
    guest.churn()
    assert guest("query-status")["running"]
    assert guest.process.poll() is None
    assert (guest.folder / "qemu.log").read_text() == ""


def test_qemu_that_is_gone_is_an_error_that_names_the_region(launch):
    guest = launch("none")
    with begin(guest, running=False) as tracking:
        if kernel_is_old(tracking):
            return
        guest.close()
        with pytest.raises(VirtualMachineError, match=r"test: region ram: .*QEMU"):
            tracking.trackers["ram"].collect(running=False)


def test_an_override_decides(launch):
    guest = launch("none")
    with begin(guest, running=False, wanted="scan") as tracking:
        assert (tracking.choice.kind, tracking.choice.reason) == ("scan", "the configuration asks for it")
        assert tracking.trackers["ram"].collect(running=True).extents is None
    with begin(guest, running=False, kernel=Kernel("6.1.0-56-amd64", "x86_64", False)) as tracking:
        assert (tracking.choice.kind, tracking.choice.reason) == (
            "scan",
            "Linux 6.1 has no PAGEMAP_SCAN (6.7 does)",
        )
