"""The trackers of one VM, begun: chosen, armed, and joined to what an earlier supervisor knew.

One userfaultfd does for all regions of a VM, so they are all followed or none is. Belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from base.errors import VirtualMachineError
from capture.choice import Choice, Facts, Wanted, choose, difference
from capture.journal import Journal
from capture.trackers import ScanTracker, Tracker, WriteProtectTracker
from vm.content import Place
from vm.identity import Identity
from vm.userfaultfd import Userfaultfd


@dataclass(slots=True)
class Tracking:
    """What follows a VM's regions. Close it with the supervisor; what is armed stays armed in QEMU.

    `descriptor`: what is armed in QEMU is; None if nothing ever was.
    """

    vm: str
    choice: Choice
    trackers: dict[str, Tracker]
    resources: ExitStack
    descriptor: Userfaultfd | None = None

    def follow(self, name: str, place: Place) -> Tracker:
        """The tracker of a region, made if there is none yet: main memory's is made when somebody wants it captured.

        A new one is armed by its first collection, which finds everything unknown. Raises StorageError,
        VirtualMachineError.
        """
        if name not in self.trackers:
            self.trackers[name] = self._tracker(name, place)
        return self.trackers[name]

    def _tracker(self, name: str, place: Place) -> Tracker:
        if self.descriptor is None or self.choice.kind == "scan":
            return ScanTracker()
        choice, label = self.choice, f"VM {self.vm}: region {name}"
        made = WriteProtectTracker(label, place, self.descriptor, direct_io=choice.direct_io, discards=choice.discards)
        self.resources.callback(made.close)
        return made

    def go_by(self, facts: Facts, journal: Journal) -> str | None:
        """Follow the regions as these facts ask for, which may be others than those of the choice in force; what is
        other then, None if nothing is. Nothing is known of what was written before: bits may have been cleared while
        that lost writes. By scanning it goes on so: what is unplugged again is noticed by a next supervisor.

        Raises StorageError: all is as it was; VirtualMachineError: QEMU has ended.
        """
        if self.choice.kind == "scan":
            return None
        kernel = replace(facts.kernel, pagemap_scan=True)  # it is in use: that trying it failed just now says nothing
        now = choose(replace(facts, kernel=kernel))
        changed = difference(self.choice, now)
        if changed is None:
            return None
        journal.begin_collect(self.trackers)
        self.choice = replace(now, reason=f"{now.reason}; {changed}" if now.kind == self.choice.kind else now.reason)
        for name, tracker in self.trackers.items():
            tracker.forget()
            if now.kind == "scan":
                tracker.detach()  # or a next supervisor that finds it armed would go by it
                self.trackers[name] = ScanTracker()
            elif isinstance(tracker, WriteProtectTracker):
                tracker.direct_io, tracker.discards = now.direct_io, now.discards
        return changed

    def close(self) -> None:
        """Let go of all descriptors of ours."""
        self.resources.close()


def start_tracking(
    vm: str,
    qemu: Identity,
    places: Mapping[str, Place],
    facts: Facts,
    journal: Journal,
    *,
    wanted: Wanted = "auto",
    running: bool,
    known: Collection[str] | None = None,
    restored: str | None = None,
) -> Tracking:
    """Choose trackers for the regions in `places` and begin.

    Where the journal names a baseline that is `known` to exist still (None: all of them), an earlier supervisor's
    tracking goes on. Others are armed anew: at once, or, where disks read with O_DIRECT and the guest may
    be `running`, by the first collection inside a stop, which finds nothing armed. `restored`: the generation that
    memory holds, exactly, in a QEMU whose guest has not run: the baseline. With `auto`, a userfaultfd that cannot be
    had leads to scan, with that as the reason. Raises ConflictError (`wanted` cannot be had), StorageError,
    VirtualMachineError.
    """
    choice = choose(facts, wanted)
    if choice.kind == "userfaultfd":
        try:
            return _follow(vm, qemu, places, choice, journal, running, known, restored)
        except VirtualMachineError as error:
            if wanted == "userfaultfd":
                raise
            choice = replace(choice, kind="scan", reason=str(error))
    scanners: dict[str, Tracker] = {name: ScanTracker() for name in places}
    return Tracking(vm, choice, scanners, ExitStack())


def _follow(
    vm: str,
    qemu: Identity,
    places: Mapping[str, Place],
    choice: Choice,
    journal: Journal,
    running: bool,
    known: Collection[str] | None,
    restored: str | None,
) -> Tracking:
    with ExitStack() as resources:
        descriptor = resources.enter_context(Userfaultfd.of(qemu.pid))
        tracking = Tracking(vm, choice, {}, resources, descriptor)
        kept_up = [name for name in places if journal.baseline(name) and (known is None or name in known)]
        anew = [name for name in places if restored is not None or name not in kept_up]
        for name, place in places.items():
            tracker = tracking.follow(name, place)
            if name not in anew:
                tracker.take_over()
        if anew and not (running and choice.direct_io):
            journal.begin_collect(anew)
            for name in anew:
                tracking.trackers[name].arm(running=running)
            if restored is not None:
                for name in anew:
                    tracking.trackers[name].committed()
                journal.committed(restored, anew)
        return replace(tracking, resources=resources.pop_all())
