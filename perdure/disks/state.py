"""Where the disks of a VM are: durable on this host, since a description names only the first file of each.

A disk that went back to a generation is an image of ours (an overlay) from then on. Going back is one step although a
head of history and several images belong to it: the images are `pending` under a token, the head is committed with
that token, and whoever finds pending images later asks history whether it has the token. Pure data and its file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from base.disk import Disk, replace_file
from base.errors import StorageError
from store.records import Generation
from vm.config import DISK_PREFIX

TOKEN = "disks_token"
"""In a generation's metadata: the images that were made for it."""
_NAME = "disks.json"


class First(msgspec.Struct, frozen=True, kw_only=True):
    """The file that a description names, as it was when the disk left it."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> First:
        """Raises StorageError."""
        try:
            facts = path.stat()
        except OSError as error:
            raise StorageError.from_os(error, str(path), "look at") from error
        return cls(path=str(path), size=facts.st_size, modified_ns=facts.st_mtime_ns)


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """An image of ours. `sequence`, `generation` (id) and `point` say which generation it began as; `need` is the name
    of the record that keeps that one; `filled`: it does without; `begun`: a guest has run on it."""

    path: str
    size: int
    token: str
    generation: str
    sequence: int
    point: str
    need: str
    filled: bool = False
    begun: bool = False


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that is an image of ours now."""

    first: First
    overlay: Overlay


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is not used any more. `drop`: what it held is in a generation, or was to be discarded."""

    disk: str
    overlay: Overlay
    drop: bool


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """Images for a head of history that may have been committed. `drop`: as `Left`, of what they take the place of."""

    token: str
    disks: dict[str, Current]
    drop: bool


class DiskState(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `repository` is the id, in hex, of the one that images are filled from, and `leases` its folder."""

    repository: str = ""
    leases: str = ""
    disks: dict[str, Current] = {}
    left: tuple[Left, ...] = ()
    pending: Pending | None = None

    def promoted(self) -> DiskState:
        """Pending images have become the disks."""
        assert self.pending is not None
        gone = [
            Left(disk=name, overlay=self.disks[name].overlay, drop=self.pending.drop)
            for name in self.pending.disks
            if name in self.disks
        ]
        return msgspec.structs.replace(
            self, disks={**self.disks, **self.pending.disks}, left=(*self.left, *gone), pending=None
        )

    def changed(self, name: str, **facts: bool) -> DiskState:
        """With other facts about the image of a disk."""
        current = self.disks[name]
        overlay = msgspec.structs.replace(current.overlay, **facts)
        return msgspec.structs.replace(
            self, disks={**self.disks, name: msgspec.structs.replace(current, overlay=overlay)}
        )

    def left_first(self, name: str, first: First) -> DiskState:
        """The first file of a disk is, from now on, to be as it is."""
        return msgspec.structs.replace(
            self, disks={**self.disks, name: msgspec.structs.replace(self.disks[name], first=first)}
        )


def read(folder: Path) -> DiskState:
    """The state in a VM's durable folder; an empty one if nothing was written. Raises StorageError."""
    path = folder / _NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=DiskState)
    except FileNotFoundError:
        return DiskState()
    except OSError as error:
        raise StorageError.from_os(error, str(path), "read") from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise StorageError(str(path), f"does not say where the disks are: {error}") from error


def write(disk: Disk, folder: Path, state: DiskState) -> None:
    """Raises StorageError."""
    replace_file(disk, folder / _NAME, msgspec.json.encode(state))


def disks_of(generation: Generation) -> list[str]:
    """Names of the disks that a generation has."""
    return [name.removeprefix(DISK_PREFIX) for name in generation.regions if name.startswith(DISK_PREFIX)]
