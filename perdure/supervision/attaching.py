"""How a QEMU that somebody else launched comes under supervision: found by its QMP socket, compared with the VM.toml,
its reboots held, its memory followed. Nothing is launched, and what fails leaves QEMU as it was.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from base.disk import replace_file
from base.errors import ConflictError, PerdureError, StorageError, VirtualMachineError
from capture.choice import access_problem
from capture.tracking import start_tracking
from perdure import places
from perdure.supervision import leaving
from perdure.supervision.borrowed import BorrowedMachine
from perdure.supervision.following import facts_of
from perdure.supervision.launcher import Elsewhere
from perdure.supervision.leaving import Attachment, Reboots
from perdure.supervision.local import Local
from perdure.supervision.machine import Machine
from store.records import Generation
from store.repository import Repository
from vm import actions, disks, foreign, hold, migration, plugged
from vm.command_line import Platform
from vm.config import RAM
from vm.content import Place, ProcessRange
from vm.firmware import Firmware
from vm.foreign import Found
from vm.identity import Identity
from vm.memory import Memory
from vm.monitor import Monitor
from vm.qemu import Qemu, Record
from vm.regions import RegionTable

if TYPE_CHECKING:
    from vm.addresses import AddressMap

_TABLE = "regions.json"
_OURS = "process=perdure-"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user named: QEMU's sockets, what is to become of reboots (None: as it suits), and whether a held one
    scrubs."""

    socket: Path
    agent: Path | None = None
    reboots: Reboots | None = None
    scrubs: bool = False


class Attacher:
    """Of one VM."""

    def __init__(self, local: Local, wanted: Wanted) -> None:
        self.local, self.wanted, self.folder = local, wanted, local.folder
        self.description = local.description

    async def attach(self, repository: Repository, elsewhere: Elsewhere) -> BorrowedMachine:
        """Raises ConflictError, NotFoundError, VirtualMachineError, StorageError: QEMU is as it was."""
        found = await elsewhere(lambda: foreign.find(self.local.name, self.wanted.socket))
        qemu, again = await elsewhere(lambda: self._known(found))
        monitor: Monitor | None = None
        attachment: Attachment | None = None
        try:
            monitor = await Monitor.connect(qemu)
            old = leaving.attachment_of(qemu.record)
            if old is not None:  # of a supervisor that ended, and be it by SIGKILL
                await leaving.clean(monitor, self.folder, old)
            attachment = await self._attachment(monitor, found, old)
            monitor.names, monitor.migration_bandwidth = attachment.names, attachment.bandwidth
            qemu.record = self._record(qemu.record, attachment)
            await elsewhere(
                lambda: replace_file(self.local.disk, self.folder.process, msgspec.json.encode(qemu.record))
            )
            machine = await self._machine(qemu, monitor, attachment, found, repository, elsewhere, again=again)
            if attachment.holds:
                await hold.hold_on_reset(monitor)
            return machine
        except BaseException:
            if monitor is not None:
                with suppress(PerdureError):
                    if attachment is not None:
                        await leaving.put_back(monitor, self.folder, attachment)
                await monitor.disconnect()
            qemu.close()
            if not again:
                leaving.forget(self.folder)
            raise

    def _known(self, found: Found) -> tuple[Qemu, bool]:
        """The process, and whether it was attached before; the runtime folder is made for it."""
        vm = self.local.name
        if any(_OURS in word for word in found.arguments):
            raise ConflictError(
                f"VM {vm}: QEMU (process {found.pid}) was launched by perdure run: use that to take it over"
            )
        identity = Identity.of(found.pid)
        self.folder.create()
        for path in sorted(places.runtime_folder().glob("*/qemu.json")):
            name = path.parent.name
            other = None if name == vm else Qemu.find(replace(self.folder, vm=name, path=path.parent))
            if other is not None:
                with other:
                    if other.record.identity == identity:
                        raise ConflictError(
                            f"VM {vm}: QEMU (process {found.pid}) is attached as VM {name}: perdure detach {name} first"
                        )
        earlier = Qemu.find(self.folder)
        if earlier is not None and earlier.record.identity != identity:
            with earlier:
                raise ConflictError(
                    f"VM {vm} runs in another QEMU than that (process {earlier.pid}), and is not stopped"
                )
        if any(self.local.memory_folders()):
            raise ConflictError(
                f"VM {vm}: a QEMU that perdure run had launched has left memory in {self.folder.path}: perdure run "
                "captures it, or drops it with --discard"
            )
        self._link(self.folder.monitor, self.wanted.socket)
        self._link(self.folder.agent, self.wanted.agent)
        if earlier is not None:
            return earlier, True
        leaving.note_going_on(self.folder)
        pidfd = identity.open()
        if pidfd is None:
            raise VirtualMachineError(f"VM {vm}: QEMU (process {found.pid}) has ended")
        record = Record(identity.pid, identity.start_ticks, identity.boot, found.arguments)
        return Qemu(self.folder, record, pidfd), False

    def _link(self, link: Path, target: Path | None) -> None:
        try:
            link.unlink(missing_ok=True)
            if target is not None:
                link.symlink_to(target.absolute())
        except OSError as error:
            raise StorageError.from_os(error, str(link), "make") from error

    async def _attachment(self, monitor: Monitor, found: Found, old: Attachment | None) -> Attachment:
        names = await foreign.names_of(monitor, self.description, found.pid)
        parameters = await monitor.execute("query-migrate-parameters")
        heard = actions.listeners(found.arguments, await monitor.execute("query-chardev"))
        reboots: Reboots = self.wanted.reboots or ("hold" if heard <= 1 else "pass")
        return Attachment(
            socket=str(self.wanted.socket.absolute()),
            agent=None if self.wanted.agent is None else str(self.wanted.agent.absolute()),
            actions=actions.of(found.arguments),
            names=names,
            bandwidth=old.bandwidth if old is not None else int(parameters["max-bandwidth"]),
            reboots=reboots,
            scrubs=self.wanted.scrubs and reboots == "hold",
        )

    def _record(self, record: Record, attachment: Attachment) -> Record:
        facts = {leaving.FACT: msgspec.json.encode(attachment).decode()}
        return msgspec.structs.replace(record, facts=facts)

    async def _machine(
        self,
        qemu: Qemu,
        monitor: Monitor,
        attachment: Attachment,
        found: Found,
        repository: Repository,
        elsewhere: Elsewhere,
        *,
        again: bool,
    ) -> BorrowedMachine:
        addresses = await monitor.address_map(int(self.description.memory))
        memory, private, problems = await self._memory(monitor, addresses, found)
        table, parent = await elsewhere(lambda: self._table(repository, memory, addresses, again=again))
        journal = self.local.journal(qemu.record.identity)
        bases = await elsewhere(lambda: self.local.bases(repository, journal))
        facts = await facts_of(qemu, monitor)
        places: dict[str, Place] = {name: file.path for name, file in memory.files.items()}
        followed = {name: each for name, each in (places | private).items() if name != RAM or name in bases}
        running = await monitor.query_status() == "running"
        tracking = await elsewhere(
            lambda: start_tracking(
                self.local.name,
                qemu.record.identity,
                followed,
                facts,
                journal,
                wanted=self.description.policy.tracker,
                running=running,
                known=bases,
            )
        )
        platform = await _platform(monitor, found, facts.devices)
        names = [monitor.names.node(name) for name in disks.captured(self.description)]
        machine = Machine(
            description=self.description,
            described=self.description,
            platform=platform,
            qemu=qemu,
            monitor=monitor,
            memory=memory,
            table=table,
            addresses=addresses,
            holds=monitor.events(*(hold.HOLD_EVENTS if attachment.holds else ("RESET",))).__enter__(),
            journal=journal,
            tracking=tracking,
            parent=parent,
            bases=bases,
            restored=None,
            resumed=False,
            full_problems=(
                *await migration.obstacles(monitor, names),
                *await plugged.changes(monitor, qemu.record.argv),
            ),
            warnings=self._warnings(attachment, found),
            accelerator_reason="as QEMU was launched",
            measurements=self.local.measurements,
            note_parent=self.local.note_parent,
        )
        return BorrowedMachine(machine, attachment, private, problems)

    async def _memory(
        self, monitor: Monitor, addresses: AddressMap, found: Found
    ) -> tuple[Memory, dict[str, ProcessRange], tuple[str, ...]]:
        """What of its memory lies in files, what in QEMU's process alone, and why there can be no full generation."""
        lying = await foreign.memory_places(monitor, self.description, addresses, found.pid)
        folder = leaving.memory_folder(self.folder)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(folder), "make the folder") from error
        files = {each.region: each.file for each in lying if each.file is not None}
        private = {each.region: ProcessRange(found.pid, each.start, each.size) for each in lying if each.anonymous}
        for each in lying:
            if each.region not in (*files, *private) and each.region != RAM:
                raise ConflictError(
                    f"VM {self.local.name}: region {each.region} is a file that QEMU maps for itself: give its memory "
                    "back end share=on"
                )
        denied = access_problem(found.pid) if private else None
        if denied is not None and private.keys() - {RAM}:
            raise ConflictError(f"VM {self.local.name}: {', '.join(private)} is memory of QEMU alone, and {denied}")
        if self.wanted.scrubs and private:
            raise ConflictError(f"VM {self.local.name}: {', '.join(private)} is QEMU's alone: no --scrub")
        alone = [each.region for each in lying if each.region not in files]
        problem = f"{', '.join(alone)} is memory of QEMU alone (it needs a memory-backend-file with share=on)"
        return Memory(self.local.name, folder, files), private, (problem,) if alone else ()

    def _table(
        self, repository: Repository, memory: Memory, addresses: AddressMap, *, again: bool
    ) -> tuple[RegionTable, Generation | None]:
        """Blocking: tags as an earlier supervisor of this process knew them, else those of the latest generation."""
        file, vm, devices = memory.folder / _TABLE, self.local.name, self.local.devices(addresses)
        latest = repository.latest(vm)
        if again and file.exists():
            return RegionTable.load(file, vm, devices), self.local.parent(repository) or latest
        tags: list[dict[str, Any]] = [] if latest is None else latest.metadata.get("tags", [])
        try:
            return RegionTable.from_tags(file, vm, devices, tags), latest
        except PerdureError:  # of a VM that was described otherwise
            return RegionTable.from_tags(file, vm, devices, []), latest

    def _warnings(self, attachment: Attachment, found: Found) -> tuple[str, ...]:
        said = []
        if not attachment.holds:
            said.append(
                f"VM {self.local.name}: reboots are not held, and what the guest does at one is not captured: another "
                "program hears QEMU's events and may take a held reboot for a shutdown (--reboots hold does it anyway)"
                if self.wanted.reboots is None
                else f"VM {self.local.name}: reboots are not held (--reboots pass)"
            )
        if found.user != os.geteuid() and self.description.disks:
            said.append(
                f"VM {self.local.name}: QEMU runs as another user (number {found.user}) and may not be able to open "
                f"files in {self.folder.path}: without that its disks are not captured"
            )
        return tuple(said)


async def _platform(monitor: Monitor, found: Found, devices: tuple[str, ...]) -> Platform:
    """What QEMU was launched with."""
    said = await monitor.execute("query-version")
    version, package = said["qemu"], str(said["package"])
    machine = str(await monitor.execute("qom-get", path="/machine", property="type")).removesuffix("-machine")
    kvm = bool((await monitor.execute("query-kvm"))["enabled"])
    words = found.arguments
    cpu = next((value for option, value in pairwise(words) if option == "-cpu"), "qemu64")
    number = f"{version['major']}.{version['minor']}.{version['micro']}"
    flash = any("pflash" in word for word in words)
    return Platform(
        binary=Path(f"/proc/{found.pid}/exe"),
        version=f"{number} ({package})" if package else number,
        machine=machine,
        accelerator="kvm" if kvm else "tcg",
        cpu=cpu,
        firmware=Firmware("ovmf" if flash else "seabios"),
        variables=None,
        uuid=str((await monitor.execute("query-uuid"))["UUID"]),
        generation_id="vmgenid" in devices,
    )
