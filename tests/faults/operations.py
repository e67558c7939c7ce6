"""What is done to a repository while its disk is watched, refused, or cut off. To cover another operation, add one.

Each runs on the same small repository, which `prepare` makes: two VMs that share pages, three generations of one of
them, one forgotten and one protected, packs of some 30 KB, a second key slot. It works through the open repository or
keychain that it is given, and says with `expect` what a generation that it makes will hold.
"""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from crash_images import Blobs, Image, Recorder, crash_images
from store_fixtures import CHEAP, PASSPHRASE, Place, add, image

from base.disk import Disk
from store import format as layout
from store.chunker import PackingSettings
from store.creation import create, read_mark
from store.keyring.files import read_key_files
from store.keyring.keychain import Keychain
from store.keyring.slots import NewSlot, new_keyring, unlock
from store.repository import Repository
from store.retention.policy import Policy
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.upkeep.repair import repair

OTHER, NEW = b"another slot", b"the new one"
SMALL = PackingSettings(pack_bytes=30_000)


@functools.cache
def contents() -> dict[str, bytes]:
    """What generations hold, before and after the operations."""
    one, two = image(1, 60), image(2, 24)
    second = image(3, 20) + one[20 * 4096 :]
    third = second[: 30 * 4096] + image(4, 12) + second[42 * 4096 :]
    return {
        "vm@1": one,
        "vm@2": second,
        "vm@3": third,
        "vm@4": image(5, 25) + third[25 * 4096 :],
        "vm@5": image(6, 9),
        "other@1": two + one[: 10 * 4096],
        "other@2": two,
        "third@1": image(7, 40),
        "third@2": image(8, 12),
    }


class Run:
    """One place, and one disk through which everything is done."""

    def __init__(self, where: Place, disk: Disk | None = None) -> None:
        self.where, self.disk = where, disk or Disk()
        self.credential = PASSPHRASE

    def keys(self):
        return unlock(read_key_files(self.where.path), self.credential)

    def repository(self) -> Repository:
        return Repository(self.where.path, self.keys(), self.where.state, disk=self.disk, unlock=self.keys)

    def keychain(self) -> Keychain:
        where = self.where
        return Keychain(where.path, read_mark(where.path), self.credential, where.state, disk=self.disk)

    def add(self, repository: Repository, vm: str, parent=None):
        """The next generation of a VM, with the content that `contents` has for it."""
        highest = self.highest(repository, vm)
        return add(repository, vm, {"ram": contents()[f"{vm}@{highest + 1}"]}, parent)

    @staticmethod
    def highest(repository: Repository, vm: str) -> int:
        with repository.environment.read() as txn:
            known = repository.catalog.vm(txn, vm)
        return 0 if known is None else known[1]


def prepare(run: Run) -> None:
    """The repository on which everything is tried."""
    with run.keychain() as chain:
        chain.change(add=slot(OTHER))
    with run.repository() as repository:
        run.add(repository, "other")
        first = run.add(repository, "vm")
        second = run.add(repository, "vm", first)
        run.add(repository, "vm", second)
        repository.protect(repository.resolve("vm@2"), protected=True)
        repository.forget(repository.resolve("vm@1"))


def slot(credential: bytes) -> NewSlot:
    return NewSlot(credential, "", CHEAP)


Operation = Callable[[Run], None]
OPERATIONS: dict[str, Operation] = {}


def operation(work: Operation) -> Operation:
    OPERATIONS[work.__name__.strip("_").replace("_", "-")] = work
    return work


@operation
def init(run: Run) -> None:
    made = new_keyring(PASSPHRASE, CHEAP)
    create(run.where.root / "deeper" / "repository", made.files, made.keys, SMALL, run.disk)


@operation
def capture(run: Run) -> None:
    with run.repository() as repository:
        run.add(repository, "vm", repository.resolve("vm@latest"))


@operation
def import_of_a_new_vm(run: Run) -> None:
    with run.repository() as repository:
        run.add(repository, "third")


@operation
def forget(run: Run) -> None:
    with run.repository() as repository:
        repository.forget(repository.resolve("vm@3"))


@operation
def protect(run: Run) -> None:
    with run.repository() as repository:
        repository.protect(repository.resolve("vm@3"), protected=True)


@operation
def unprotect_and_forget(run: Run) -> None:
    with run.repository() as repository:
        generation = repository.resolve("vm@2")
        repository.protect(generation, protected=False)
        repository.forget(generation)


@operation
def set_policy(run: Run) -> None:
    with run.repository() as repository:
        repository.set_policy("vm", Policy(last=3, quota=1 << 30))
        repository.set_policy(None, Policy(daily=7))
        repository.set_policy("vm", None)


@operation
def key_add(run: Run) -> None:
    with run.keychain() as chain:
        chain.change(add=slot(NEW))


@operation
def key_remove(run: Run) -> None:
    with run.keychain() as chain:
        chain.change(remove=[chain.keys.slot_id])


@operation
def key_change_passphrase(run: Run) -> None:
    with run.keychain() as chain:
        chain.change(add=slot(NEW), remove=[chain.keys.slot_id])


@operation
def key_rotate(run: Run) -> None:
    with run.keychain() as chain:
        chain.change(add=slot(PASSPHRASE), remove=[chain.keys.slot_id], rotate=True)
    with run.repository() as repository:  # and the first record of the new epoch
        repository.protect(repository.resolve("vm@3"), protected=True)


@operation
def prune_(run: Run) -> None:
    with run.repository() as repository:
        _, done = prune(repository, PruneSettings(max_unused_percent=0, scattered_least=1))
        assert not done.waiting and not done.unreadable


@operation
def repair_(run: Run) -> None:
    """Of a pack whose footer is damaged first, through the same disk: nothing is lost, so all must be readable."""
    with run.repository() as repository:
        name = layout.pack_name(bytes.fromhex(repository.resolve("vm@2").packs[0]))
        if repository.storage.exists(name):  # else it was repaired before
            data = bytearray(repository.storage.get(name))
            data[-20] ^= 1
            repository.storage.put_back(name, [bytes(data)])
        repair(repository)


def key_rotate_rewrite(run: Run) -> None:
    """The same machine as `prune`, with twice as many states: only where PERDURE_FAULTS asks for it."""
    with run.keychain() as chain:
        chain.change(add=slot(PASSPHRASE), remove=[chain.keys.slot_id], rotate=True)
    with run.repository() as repository:
        prune(repository, PruneSettings(epoch=repository.keys.current_epoch, max_rewrite_bytes=None))


if os.environ.get("PERDURE_FAULTS") == "all":
    operation(key_rotate_rewrite)


@contextmanager
def prepared():
    """A place with the repository on which everything is tried: a copy, to be changed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        where = Place.at(Path(root) / "disk")
        where.root.mkdir()
        at_rest, blobs = _prepared()
        at_rest.build(where.root, blobs)
        yield where


@functools.cache
def _prepared() -> tuple[Image, Blobs]:
    root = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="perdure-prepared-")
    atexit.register(root.cleanup)
    where = Place(Path(root.name) / "disk", SMALL)
    prepare(Run(where))
    recorder = Recorder(where.root, Blobs(where.root.parent / "blobs"))
    return next(crash_images(recorder)), recorder.blobs
