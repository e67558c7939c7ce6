"""The disks of one VM: which files they are now, the images that are made when it goes back, and their servers.

Invariants: the file that a description names is never written by going back; an image is used only with the
generation that it is of; a need (store.needs) keeps that generation until the image is filled or gone; images are
pending, and no disks, until the QEMU before has let go of its own; what goes with a head of history that was not
committed is taken back. Blocking calls, from several threads: a lock is held.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

import msgspec

from base import extents as ranges
from base.disk import Disk
from base.errors import ConflictError, NotFoundError, PerdureError, StorageError
from base.units import format_size
from perdure.disks import server as disk_server
from perdure.disks import state as disk_state
from perdure.disks.server import DiskServer, Export
from perdure.disks.state import TOKEN, Current, DiskState, First, Left, Overlay, Pending, disks_of
from store import needs
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from vm import overlays
from vm.config import DISK_PREFIX, Description
from vm.config import Disk as DescribedDisk
from vm.folder import RuntimeFolder

_FOLDER = "perdure-overlays"


class Disks:
    """Disks of one VM. `state` is its durable folder on this host."""

    def __init__(self, described: Description, folder: RuntimeFolder, state: Path, *, clone: bool = False) -> None:
        """`clone`: the files that the description names are another VM's. Raises StorageError."""
        self._described, self._folder, self._place, self._clone = described, folder, state, clone
        self._disk = Disk()
        self._lock = RLock()
        self._repository: Repository | None = None
        self._servers: dict[str, DiskServer] = {}
        self._state = disk_state.read(state)

    def look_again(self) -> None:
        """Under the VM's lock, whoever had it before may have made other disks than those that were read. Raises
        StorageError."""
        with self._lock:
            self._state = disk_state.read(self._place)

    @property
    def description(self) -> Description:
        """The VM as described, with the files that its disks are now. Raises ConflictError for a clone without."""
        with self._lock:
            return msgspec.structs.replace(
                self._described, disks=tuple(self._as_it_is(each) for each in self._described.disks)
            )

    def unfilled(self) -> dict[str, str]:
        """By disk, the tokens of images that still need their generation."""
        with self._lock:
            return {name: each.overlay.token for name, each in self._used().items() if not each.overlay.filled}

    def fillings(self) -> dict[str, dict[str, Any]]:
        """By disk, the block node behind an image that is not filled."""
        with self._lock:
            return {
                name: overlays.node(name, self._folder.images(token), name) for name, token in self.unfilled().items()
            }

    def remarks(self) -> Iterator[str]:
        """What somebody who reads the description should know, a line each."""
        with self._lock:
            for disk in self._described.disks:
                current = self._state.disks.get(disk.name)
                if current is None:
                    continue
                first, overlay = current.first, current.overlay
                if first.path != str(disk.file):
                    yield f"disk {disk.name}: {disk.file} is used, which is named now; {overlay.path} is left"
                    continue
                filled = "" if overlay.filled else ", which is being filled"
                yield f"disk {disk.name} is {overlay.path} since it went back to {overlay.point}{filled}"
                with suppress(StorageError):
                    if not self._clone and First.of(disk.file) != first:
                        yield (
                            f"warning: {disk.file} was changed since disk {disk.name} left it, and is not used "
                            f"(`perdure disks {self._described.name} --reset {disk.name}` goes back to it)"
                        )

    def settle(self, repository: Repository) -> None:
        """Before anything is launched: decide on what an earlier supervisor left pending.

        Raises ConflictError (images are filled from another repository), StorageError.
        """
        with self._lock:
            self._use(repository)
            if self._state.pending is not None:
                self._settle(repository, self._state.pending)
            self._remove_left()

    def taken_over(self, repository: Repository) -> None:
        """The VM runs, and on the disks that it has: what was pending is not to be. Raises StorageError."""
        with self._lock:
            self._use(repository)
            self.drop_pending()

    def pristine(self, generation: Generation) -> bool:
        """Whether the disks hold what a generation has of them: they were made for it, and no guest has run."""
        with self._lock:
            used = [self._used().get(name) for name in disks_of(generation)]
            token = generation.metadata.get(TOKEN)
            return bool(used) and all(
                each is not None and each.overlay.token == token and not each.overlay.begun for each in used
            )

    def superseded(self, head: Generation) -> bool:
        """Whether a head of history has images that no guest has run on yet, be they pending or not: memory that a
        QEMU left is of before it."""
        with self._lock:
            pending = self._state.pending
            return self.pristine(head) or (pending is not None and pending.token == head.metadata.get(TOKEN))

    def go_back(
        self, repository: Repository, generation: Generation, *, drop: bool, names: Sequence[str] | None = None
    ) -> str:
        """Images of the disks of a generation, or of some of them, and their server; gives the token with which a head
        of history is to be committed then.

        They are pending beside the disks of a QEMU that may go on, until `promote` or `drop_pending`. `drop`: the
        images that are disks until now are not kept. Raises ConflictError, StorageError (no room, say),
        VirtualMachineError, WorkerError: they are taken back then.
        """
        with self._lock:
            self._use(repository)
            self.drop_pending()
            pending = self._plan(generation, drop, disks_of(generation) if names is None else names)
            self._require_room(generation, pending.disks)
            self._write(msgspec.structs.replace(self._state, pending=pending))
            try:
                for name, each in pending.disks.items():
                    self._make(repository, name, each.overlay)
                self.serve(repository)
            except BaseException:
                with suppress(PerdureError):
                    self.drop_pending()
                raise
            return pending.token

    def promote(self) -> None:
        """A QEMU is about to be launched, and the one before has let go: pending images are the disks, and all that
        are being filled have a server. Raises StorageError, WorkerError."""
        with self._lock:
            if self._state.pending is not None:
                self._write(self._state.promoted())
            self.watch()

    def drop_pending(self) -> None:
        """Take back images for a head of history that there will not be. Raises StorageError."""
        with self._lock:
            pending = self._state.pending
            if pending is not None:
                for each in pending.disks.values():
                    self._remove(each.overlay)
                self._write(msgspec.structs.replace(self._state, pending=None))
                socket = self._folder.images(pending.token)
                server = self._servers.pop(pending.token, None) or disk_server.find(socket)
                if server is not None:
                    server.end()

    def begun(self) -> None:
        """The guest is about to write: images are what their generations have no longer. Raises StorageError.

        The QEMU before, which may have had the first files open, has ended.
        """
        with self._lock:
            state = self._state
            for name, each in self._used().items():
                if not each.overlay.begun:
                    with suppress(StorageError):
                        if not self._clone:
                            state = state.left_first(name, First.of(Path(each.first.path)))
                    state = state.changed(name, begun=True)
            if state is not self._state:
                self._write(state)

    def note_filled(self, name: str, token: str) -> None:
        """The image with this token needs nothing else any more; that it is no disk any more is no error. Raises
        StorageError."""
        with self._lock:
            current = self._state.disks.get(name)
            if current is not None and current.overlay.token == token:
                self._write(self._state.changed(name, filled=True))
                self._release(current.overlay)

    def remove_left(self) -> None:
        """Remove images that nobody uses and whose content was captured or discarded. Raises StorageError."""
        with self._lock:
            self._remove_left()

    def serve(self, repository: Repository) -> None:
        """See that a QEMU which is launched next finds the servers that it needs. Raises WorkerError."""
        with self._lock:
            self._repository = repository
            tokens = {each.overlay.token for each in self._next().values()}
            self._see_to({token: exports for token, exports in self._exports().items() if token in tokens})

    def watch(self) -> list[str]:
        """Start servers that have ended, end those that have nothing to do; gives lines to say. Raises WorkerError."""
        with self._lock:
            wanted = self._exports()
            for token in [token for token in self._servers if token not in wanted]:
                self._servers.pop(token).end()
            return self._see_to(wanted)

    def held(self) -> dict[str, str]:
        """By disk, why the guest waits for something of it."""
        with self._lock:
            return {name: why for server in self._servers.values() for name, why in server.held().items()}

    def let_go(self) -> None:
        """Leave servers to the next supervisor."""
        with self._lock:
            while self._servers:
                self._servers.popitem()[1].close()

    def end_servers(self) -> None:
        """The VM has ended."""
        with self._lock:
            while self._servers:
                self._servers.popitem()[1].end()

    def reset(self, name: str) -> Overlay:
        """Of a VM that does not run: the file that the description names is the disk again. Gives the image, which is
        left. Raises NotFoundError, StorageError."""
        with self._lock:
            current = self._state.disks.get(name)
            if current is None:
                raise NotFoundError(f"VM {self._described.name}: disk {name} has not gone back to anything")
            left = Left(disk=name, overlay=current.overlay, drop=False)
            others = {each: kept for each, kept in self._state.disks.items() if each != name}
            self._write(msgspec.structs.replace(self._state, disks=others, left=(*self._state.left, left)))
            return current.overlay

    def clean(self) -> list[Left]:
        """Remove all images that are left. Raises StorageError."""
        with self._lock:
            gone = list(self._state.left)
            for each in gone:
                self._remove(each.overlay)
            self._write(msgspec.structs.replace(self._state, left=()))
            return gone

    def facts(self) -> list[dict[str, Any]]:
        """Each disk of the description as `perdure disks` shows it."""
        with self._lock:
            found = [fact(each, self._used().get(each.name)) for each in self._described.disks]
            return [each | {"first_path": None} if self._clone and not each["readonly"] else each for each in found]

    def _used(self) -> dict[str, Current]:
        """Images that are disks of the VM as it is described now."""
        files = {each.name: str(each.file) for each in self._described.disks}
        return {name: each for name, each in self._state.disks.items() if files.get(name) == each.first.path}

    def _next(self) -> dict[str, Current]:
        """The same for the QEMU that is launched next."""
        pending = self._state.pending
        return self._used() if pending is None else {**self._used(), **pending.disks}

    def _exports(self) -> dict[str, dict[str, Export]]:
        """By token, what a server has to show, to the QEMU of now or to the next."""
        found: dict[str, dict[str, Export]] = {}
        for disks in (self._used(), self._next()):
            for name, each in disks.items():
                if not each.overlay.filled:
                    exports = found.setdefault(each.overlay.token, {})
                    exports[name] = Export(each.overlay.sequence, f"{DISK_PREFIX}{name}")
        return found

    def _see_to(self, wanted: dict[str, dict[str, Export]]) -> list[str]:
        """Start servers that are not there; gives lines to say. Raises WorkerError."""
        said = []
        for token, exports in wanted.items():
            server = self._servers.pop(token, None) or disk_server.find(self._folder.images(token))
            if server is not None and not server.alive:
                server.end()
                said.append(f"the server of disk {', '.join(exports)} had ended, and is started again")
                server = None
            assert self._repository is not None
            if server is not None and server.keyring < self._repository.keys.header.number:
                server.end()
                said.append(f"keys were changed, and the server of disk {', '.join(exports)} is given the new ones")
                server = None
            if server is None:
                path = self._folder.images(token)
                server = disk_server.start(self._described.name, self._repository, path, exports)
            self._servers[token] = server
        return said

    def _as_it_is(self, disk: DescribedDisk) -> DescribedDisk:
        current = self._used().get(disk.name)
        if current is None:
            if self._clone and not disk.readonly:
                vm = self._described.name
                raise ConflictError(f"disk {disk.name} of {vm}, a clone, has no image here: --from a full generation")
            return disk
        return msgspec.structs.replace(disk, file=Path(current.overlay.path), format="qcow2")

    def _use(self, repository: Repository) -> None:
        identity = repository.keys.repository_id.hex()
        if self._state.repository not in ("", identity) and self.unfilled():
            raise ConflictError(
                f"VM {self._described.name}: disk {', '.join(self.unfilled())} is being filled from repository "
                f"{self._state.repository[:16]}, and {repository.path} is another"
            )
        self._repository = repository
        if (self._state.repository, self._state.leases) != (identity, str(repository.leases)):
            self._write(msgspec.structs.replace(self._state, repository=identity, leases=str(repository.leases)))

    def preview(self, repository: Repository, generation: Generation, names: Sequence[str]) -> list[dict[str, Any]]:
        """What `go_back` would make, as documents. Raises StorageError."""
        with self._lock:
            self._repository = repository
            planned = self._plan(generation, True, names)
            content = self._content(generation, planned.disks)
            used = self._used()
            described = {each.name: str(each.file) for each in self._described.disks}
            return [
                {
                    "disk": name,
                    "content_bytes": content[name],
                    "image_folder": str(Path(each.overlay.path).parent),
                    "room_bytes": _room(Path(each.overlay.path).parent),
                    "replaces": used[name].overlay.path if name in used else described[name],
                }
                for name, each in planned.disks.items()
            ]

    def _plan(self, generation: Generation, drop: bool, names: Sequence[str]) -> Pending:
        """Images in folders that have room for them. Raises ConflictError, StorageError."""
        token = secrets.token_hex(4)
        described = {each.name: each for each in self._described.disks}
        disks = {}
        for name in names:
            folder = self._folder_of(described[name])
            disks[name] = Current(
                first=self._state.disks[name].first if name in self._used() else self._first(described[name]),
                overlay=Overlay(
                    path=str(folder / f"{self._described.name}-{name}-{token}.qcow2"),
                    size=generation.regions[f"{DISK_PREFIX}{name}"].root.length,
                    token=token,
                    generation=generation.id,
                    sequence=generation.sequence,
                    point=generation.name,
                    need=needs.new_name(),
                ),
            )
        return Pending(token=token, disks=disks, drop=drop)

    def _first(self, disk: DescribedDisk) -> First:
        if self._clone:
            return First(path=str(disk.file), size=0, modified_ns=0)
        return First.of(disk.file)

    def _folder_of(self, disk: DescribedDisk) -> Path:
        folder = self._described.overlays
        if folder is None:
            folder = self._place / "overlays" if disk.file.is_block_device() else disk.file.parent / _FOLDER
        return folder

    def _require_room(self, generation: Generation, disks: dict[str, Current]) -> None:
        wanted: dict[Path, int] = {}
        for name, count in self._content(generation, disks).items():
            folder = Path(disks[name].overlay.path).parent
            wanted[folder] = wanted.get(folder, 0) + count
        for folder, count in wanted.items():
            if _room(folder) < count:
                raise StorageError(
                    str(folder),
                    f"has room for {format_size(_room(folder))}, and the disks of {generation.name} "
                    f"take {format_size(count)}: name another folder with `overlays` in the description",
                )

    def _content(self, generation: Generation, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each disk that are not zero."""
        assert self._repository is not None
        with GenerationReader(self._repository, generation) as reader:
            return {
                name: sum(ranges.total(part) for part in reader.content(reader.region(f"{DISK_PREFIX}{name}")))
                for name in names
            }

    def _make(self, repository: Repository, name: str, overlay: Overlay) -> None:
        folder = Path(overlay.path).parent
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(folder), "make the folder") from error
        purpose = f"disk {name} of VM {self._described.name} ({overlay.path})"
        needs.record(self._disk, repository.leases, overlay.need, purpose, [overlay.sequence])
        socket = self._folder.images(overlay.token)
        overlays.create(self._disk, Path(overlay.path), overlay.size, socket, name)

    def _settle(self, repository: Repository, pending: Pending) -> None:
        """Whether there is a head of history with the token decides."""
        repository.refresh()
        vm = self._described.name
        made = repository.generations(vm) if vm in repository.vms() else []
        if any(each.metadata.get(TOKEN) == pending.token for each in made):
            self._write(self._state.promoted())
        else:
            self.drop_pending()

    def _remove_left(self) -> None:
        gone = [each for each in self._state.left if each.drop]
        for each in gone:
            self._remove(each.overlay)
        if gone:
            kept = tuple(each for each in self._state.left if not each.drop)
            self._write(msgspec.structs.replace(self._state, left=kept))

    def _remove(self, overlay: Overlay) -> None:
        try:
            Path(overlay.path).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, overlay.path, "remove") from error
        if not overlay.filled:
            self._release(overlay)

    def _release(self, overlay: Overlay) -> None:
        if self._state.leases:
            needs.drop(Path(self._state.leases), overlay.need)

    def _write(self, state: DiskState) -> None:
        disk_state.write(self._disk, self._place, state)
        self._state = state


def _room(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    facts = os.statvfs(there)
    return facts.f_bavail * facts.f_frsize


def fact(disk: DescribedDisk, current: Current | None) -> dict[str, Any]:
    """One disk as a document: where it is, where it began, and what the image there is."""
    document: dict[str, Any] = {
        "disk": disk.name,
        "path": str(disk.file),
        "format": disk.format,
        "first_path": str(disk.file),
        "state": "as described",
        "readonly": disk.readonly,
    }
    if current is not None:
        overlay = current.overlay
        state = "filled" if overlay.filled else "filling"
        document |= {"path": overlay.path, "format": "qcow2", "state": state, "went_back_to": overlay.point}
    return document
