"""Trackers: what says which bytes of a region's backing file may have changed since the last generation.

`WriteProtectTracker` asks the kernel: asynchronous write protection of QEMU's mappings through userfaultfd, read and
armed again in one step by PAGEMAP_SCAN. `ScanTracker` knows nothing, so that everything resident is looked at. Both are
always right; they differ in the work that they leave to others.

What the kernel does not see, and what is done about it:
- DMA into pages that were pinned before their bits were cleared: O_DIRECT disk reads (cache=none) of QEMU lost a third
  of the written pages when bits were cleared under a running guest. With `direct_io`, bits are only cleared while the
  VM is stopped by QMP `stop`, which drains such reads; otherwise the call is refused.
- A punched hole is not a write. With `discards` (balloon, free page reporting, virtio-mem) every part of the
  baseline's non-zero content that is a hole by now counts as dirty.
- A mapping that appeared, vanished or lost its registration since the last look: all of it counts as dirty.
- Writes that do not go through QEMU's mappings: by other processes (vhost-user) or by devices (VFIO). capture/choice.py
  sees to it that the tracker is not chosen then. Nobody, we included, may write to a backing file while QEMU runs.

A tracker belongs to one region of one QEMU process and to one thread at a time. Whoever calls `arm` or `collect` has
called `Journal.begin_collect` before: no bit is cleared before that is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from base.errors import ConflictError, VirtualMachineError
from base.extents import EMPTY, Extents, normalise, subtract, union
from vm.content import Place, open_content
from vm.mappings import Mapping
from vm.pagemap import Pagemap
from vm.userfaultfd import Userfaultfd

Kind = Literal["userfaultfd", "scan"]


@dataclass(frozen=True, slots=True, eq=False)
class Dirty:
    """What may have changed in a backing file: file offsets, whole pages; never too few, possibly too many.

    None means unknown: everything resident must be looked at, and all that was not zero before.
    """

    extents: Extents | None
    """Since the baseline, the last committed generation: also what was collected before and not committed."""
    fresh: Extents | None
    """Since the previous `collect` or `arm`: what a capture that has stored the rest has still to look at."""


class Tracker(Protocol):
    """Follows the changes of one region. Errors are PerdureErrors and leave the guest unharmed."""

    @property
    def kind(self) -> Kind:
        """What is shown to the user."""

    @property
    def direct_io(self) -> bool:
        """Whether `arm` and `collect` are refused while the guest runs."""

    def arm(self, *, running: bool) -> None:
        """Follow changes from now on; there is no baseline until `committed`."""

    def take_over(self) -> None:
        """Go on from an earlier supervisor whose journal names a baseline: nothing is cleared, nothing forgotten."""

    def collect(self, *, running: bool, known: Extents | None = None) -> Dirty:
        """Ask what changed, and go on following. `running`: the VM's processors or devices may be at work.

        `known`: all that is not zero in the baseline or in what a capture has stored since, file offsets, more does
        no harm; used where memory can be discarded, where everything is unknown without it.
        """

    def peek(self) -> Dirty:
        """What `collect` would give, as far as that is seen without clearing a bit: for counts, at any time.

        Nothing is lost where it fails, as it may with a QEMU that has ended.
        """

    def committed(self) -> None:
        """All that was collected is in a durable generation, the baseline from now on.

        Right after `arm` it says that memory is, as it is, a generation's: restored, and the guest has not run.
        """

    def forget(self) -> None:
        """Memory changes in a way that is not seen, as by holes that we punch: there is no baseline any more."""

    def follow_writes_only(self) -> None:
        """Missing pages are governed no more, writes still are; nothing that was written so far is forgotten. The VM is
        stopped."""

    def detach(self) -> None:
        """Stop following, and leave nothing armed in QEMU."""

    def close(self) -> None:
        """Let go of all descriptors; what is armed stays so, for a next supervisor."""


class ScanTracker:
    """Follows nothing; for where nothing else is possible."""

    kind: Kind = "scan"
    direct_io = False

    def arm(self, *, running: bool) -> None:
        """Nothing to do."""

    def take_over(self) -> None:
        """Nothing to do."""

    def collect(self, *, running: bool, known: Extents | None = None) -> Dirty:  # noqa: ARG002  the protocol's
        """Always unknown."""
        return Dirty(None, None)

    def peek(self) -> Dirty:
        """Always unknown."""
        return Dirty(None, None)

    def committed(self) -> None:
        """Nothing to do."""

    def forget(self) -> None:
        """Nothing to do."""

    def follow_writes_only(self) -> None:
        """Nothing to do."""

    def detach(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class WriteProtectTracker:
    """Follows writes to QEMU's shared mappings of one backing file, or to a part of its own memory."""

    kind: Kind = "userfaultfd"

    def __init__(
        self, name: str, place: Place, descriptor: Userfaultfd, *, direct_io: bool = False, discards: bool = False
    ) -> None:
        """`name` says in errors which VM and region it is; `descriptor` is shared by a VM's trackers and not closed.

        `direct_io` and `discards` change as disks and devices come and go (Tracking.go_by). Raises StorageError,
        VirtualMachineError.
        """
        self.name, self.direct_io, self.discards = name, direct_io, discards
        self._descriptor = descriptor
        self._covered: list[Mapping] = []
        self._since: Extents | None = None  # collected since the baseline; None: there is no baseline
        self._content = open_content(place)
        try:
            self._pagemap = Pagemap(descriptor.pid)
        except OSError as error:
            self._content.close()
            raise VirtualMachineError(
                f"{name}: cannot read the page tables of QEMU (pid {descriptor.pid}): {error.strerror}"
            ) from error

    def arm(self, *, running: bool) -> None:
        """Register and write-protect every mapping of the file. Raises ConflictError, VirtualMachineError."""
        self._require_drained(running)
        self._since = None
        mappings = self._mappings()
        for mapping in mappings:
            self._protect(mapping)
        self._covered = mappings

    def take_over(self) -> None:
        """Raises VirtualMachineError. A mapping that turns out not to be armed is all dirty at the next collection."""
        self._covered = self._mappings()
        self._since = EMPTY

    def collect(self, *, running: bool, known: Extents | None = None) -> Dirty:
        """Reads and re-arms in one atomic step a page. Raises ConflictError, VirtualMachineError."""
        self._require_drained(running)
        before, self._since = self._since, None  # an error below has cleared bits: nothing is known then
        mappings = self._mappings()
        gone = [_extents(each) for each in self._covered if each not in mappings]
        fresh = union(*gone, *(self._read_and_rearm(each) for each in mappings))
        self._covered = mappings
        self._since = _either(before, fresh)
        if not self.discards:
            return Dirty(self._since, fresh)
        discarded = None if known is None else self._discarded(known)
        return Dirty(_either(self._since, discarded), _either(fresh, discarded))

    def peek(self) -> Dirty:
        """Raises VirtualMachineError."""
        mappings = self._mappings()
        try:
            fresh = self._pagemap.written(mappings, rearm=False)
            return Dirty(_either(self._since, fresh), fresh)
        except PermissionError:  # a mapping that is not registered
            return Dirty(None, None)
        except OSError as error:
            raise self._failed("PAGEMAP_SCAN", error) from error

    def committed(self) -> None:
        """Clears what has been collected."""
        self._since = EMPTY

    def forget(self) -> None:
        """The next collection gives everything as unknown."""
        self._since = None

    def follow_writes_only(self) -> None:
        """Registering again cannot drop a mode, and a mapping that is registered anew looks written all over, once.

        Raises VirtualMachineError.
        """
        self.collect(running=False)
        before, self._since = self._since, None
        for mapping in self._covered:
            self._descriptor.unregister(mapping.start, mapping.size)
            self._protect(mapping)
            self._read_and_rearm(mapping)
        self._since = before

    def detach(self) -> None:
        """Unregister every mapping. Raises VirtualMachineError."""
        self._since = None
        for mapping in self._mappings():
            self._descriptor.unregister(mapping.start, mapping.size)
        self._covered = []

    def close(self) -> None:
        """Closes the file and the page tables; not the userfaultfd."""
        self._pagemap.close()
        self._content.close()

    def _require_drained(self, running: bool) -> None:
        if running and self.direct_io:
            raise ConflictError(
                f"{self.name}: a disk has cache.direct=on, and its reads in flight escape the tracker: "
                f"stop the VM before dirty pages are collected"
            )

    def _mappings(self) -> list[Mapping]:
        try:
            found = self._content.mappings(self._descriptor.pid)
        except OSError as error:
            raise self._failed("cannot read its memory map", error) from error
        if not found:
            raise VirtualMachineError(
                f"{self.name}: QEMU (pid {self._descriptor.pid}) has ended, or does not map the backing file shared"
            )
        return found

    def _protect(self, mapping: Mapping) -> None:
        self._descriptor.register(mapping.start, mapping.size)
        self._descriptor.write_protect(mapping.start, mapping.size)

    def _read_and_rearm(self, mapping: Mapping) -> Extents:
        try:
            return self._pagemap.written([mapping], rearm=True)
        except PermissionError:  # not registered: plugged since, or mapped anew in place of what we had armed
            self._protect(mapping)
            return _extents(mapping)
        except OSError as error:
            raise self._failed("PAGEMAP_SCAN", error) from error

    def _failed(self, what: str, error: OSError) -> VirtualMachineError:
        """In words; a process that is gone has no page tables and no entry in /proc."""
        gone = isinstance(error, (FileNotFoundError, ProcessLookupError))
        how = "has ended" if gone else f"{what}: {error.strerror}"
        return VirtualMachineError(f"{self.name}: QEMU (pid {self._descriptor.pid}) {how}")

    def _discarded(self, known: Extents) -> Extents:
        if not len(known):
            return EMPTY
        return subtract(known, self._content.resident(int(known[-1, 1]), int(known[0, 0])))


def _extents(mapping: Mapping) -> Extents:
    return normalise([(mapping.offset, mapping.offset + mapping.size)])


def _either(a: Extents | None, b: Extents | None) -> Extents | None:
    return None if a is None or b is None else union(a, b)
