"""The trackers of one VM, begun: chosen, armed, and joined to what an earlier supervisor knew.

One userfaultfd does for all regions of a VM, so they are all followed or none is. Belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from base.errors import VirtualMachineError
from capture.choice import Choice, Facts, Wanted, choose
from capture.journal import Journal
from capture.trackers import ScanTracker, Tracker, WriteProtectTracker
from vm.identity import Identity
from vm.userfaultfd import Userfaultfd


@dataclass(frozen=True, slots=True)
class Tracking:
    """What follows a VM's regions. Close it with the supervisor; what is armed stays armed in QEMU."""

    choice: Choice
    trackers: dict[str, Tracker]
    resources: ExitStack

    def close(self) -> None:
        """Let go of all descriptors of ours."""
        self.resources.close()


def start_tracking(
    vm: str,
    qemu: Identity,
    files: Mapping[str, Path],
    facts: Facts,
    journal: Journal,
    *,
    wanted: Wanted = "auto",
    running: bool,
    restored: str | None = None,
) -> Tracking:
    """Choose trackers for the regions in `files` (name to backing file) and begin.

    Where the journal names a baseline, an earlier supervisor's tracking goes on. Else everything is armed anew: at
    once, or, where disks read with O_DIRECT and the guest may be `running`, by the first collection inside a stop,
    which finds nothing armed. `restored`: the generation that memory holds, exactly, in a QEMU whose guest has not
    run: the baseline. With `auto`, a userfaultfd that cannot be had leads to scan, with that as the reason. Raises
    ConflictError (`wanted` cannot be had), StorageError, VirtualMachineError.
    """
    choice = choose(facts, wanted)
    if choice.kind == "userfaultfd":
        try:
            return _follow(vm, qemu, files, choice, journal, running, restored)
        except VirtualMachineError as error:
            if wanted == "userfaultfd":
                raise
            choice = replace(choice, kind="scan", reason=str(error))
    scanners: dict[str, Tracker] = {name: ScanTracker() for name in files}
    return Tracking(choice, scanners, ExitStack())


def _follow(
    vm: str,
    qemu: Identity,
    files: Mapping[str, Path],
    choice: Choice,
    journal: Journal,
    running: bool,
    restored: str | None,
) -> Tracking:
    with ExitStack() as resources:
        descriptor = resources.enter_context(Userfaultfd.of(qemu.pid))
        trackers: dict[str, Tracker] = {}
        for name, file in files.items():
            tracker = WriteProtectTracker(
                f"{vm}: region {name}", file, descriptor, direct_io=choice.direct_io, discards=choice.discards
            )
            resources.callback(tracker.close)
            trackers[name] = tracker
        if journal.baseline is not None and restored is None:
            for each in trackers.values():
                each.take_over()
        elif not (running and choice.direct_io):
            journal.begin_collect()
            for each in trackers.values():
                each.arm(running=running)
            if restored is not None:
                for each in trackers.values():
                    each.committed()
                journal.committed(restored)
        return Tracking(choice, trackers, resources.pop_all())
