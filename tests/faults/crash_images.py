"""What a disk may hold after a crash: the operations of one run, recorded once, and every state they can leave.

The model is that of ALICE (Pillai and others, "All File Systems Are Not Created Equal", OSDI 2014), with nothing
granted that POSIX does not promise:

- A write is durable after an fsync of its file. Before that it may be missing, torn, or zeros of its length.
- A change of names (create, link, unlink, rename, mkdir) is durable after an fsync of its directory. Before that each
  may have happened or not, whatever happened to the others.
- A commit of LMDB with metasync=False is durable with the next commit, or after a flush. Until then it may be missing.

`Recorder` is a Disk that does its work and writes down what it did. `crash_images` gives the images of every prefix of
such a log. `Image.build` makes one in a folder: contents are hard links into a `Blobs` folder, since nothing that is
visible is ever written again, so that an image costs a few links; only the index, which is, is copied.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from blake3 import blake3

from base.disk import Disk
from store.catalog import INDEX_FOLDER
from store.index import examination

INDEX = PurePosixPath("state") / INDEX_FOLDER / "index.lmdb"
ENUMERATED = 5
"""Up to so many changes of names that are not durable, all subsets of them are tried."""
SAMPLED = 24
"""Beyond that so many at random, besides all, none, each one missing and each one alone."""

Names = dict[PurePosixPath, int | None]
"""Files by path; None for a directory."""


class Blobs:
    """Contents by hash, as files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def add(self, content: bytes) -> str:
        digest = blake3(content).hexdigest()
        path = self._folder / digest
        if not path.exists():
            path.write_bytes(content)
        return digest

    def link(self, digest: str, target: Path) -> None:
        os.link(self._folder / digest, target)

    def read(self, digest: str) -> bytes:
        return (self._folder / digest).read_bytes()


@dataclass(frozen=True)
class Named:
    """One change of names: to a file, to nothing (-1) or to a directory (None); several that happen together."""

    changes: tuple[tuple[PurePosixPath, int | None], ...]


@dataclass(frozen=True)
class Written:
    file: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    """An fsync of a file, or of a directory."""

    what: int | PurePosixPath


@dataclass(frozen=True)
class Indexed:
    """LMDB has committed: the file as it is now."""

    digest: str


@dataclass(frozen=True)
class Flushed:
    """What LMDB has committed is durable."""


@dataclass(frozen=True)
class Acknowledged:
    """The operation has said that it is done."""

    what: object


Entry = Named | Written | Synced | Indexed | Flushed | Acknowledged


class Recorder(Disk):
    """A Disk that writes down what it has done to what lies under `root`."""

    def __init__(self, root: Path, blobs: Blobs) -> None:
        self.root, self.blobs = root, blobs
        self.log: list[Entry] = []
        self.files: dict[int, int] = {}
        self.names: Names = {}
        self.contents: dict[int, bytes] = {}
        for path in sorted(root.rglob("*")):
            place = self._place(path)
            if INDEX.parent.name in place.parts or place.parent.name == "leases":
                continue
            self.names[place] = None if path.is_dir() else self._number(path.stat().st_ino)
            if path.is_file():
                self.contents[self._number(path.stat().st_ino)] = path.read_bytes()
        self.base = dict(self.names)
        self.base_index = self._indexed()
        self._last = self.base_index

    def acknowledge(self, what: object = None) -> None:
        self._note(Acknowledged(what))

    def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # as Disk has it
        if operation == "lmdb sync":
            self._note(Flushed())

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        super().mkdir(path, mode)
        self._named(self._place(path), None)

    def create(self, path: Path, mode: int = 0o600) -> int:
        descriptor = super().create(path, mode)
        self._named(self._place(path), self._number(os.fstat(descriptor).st_ino, new=True))
        return descriptor

    def write(self, descriptor: int, buffers: list[bytes], path: Path) -> int:
        count = super().write(descriptor, buffers, path)
        self._note(Written(self._number(os.fstat(descriptor).st_ino), b"".join(buffers)))
        return count

    def fsync(self, descriptor: int, path: Path) -> None:
        super().fsync(descriptor, path)
        self._note(Synced(self._number(os.fstat(descriptor).st_ino)))

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        self._note(Synced(self._place(path)))

    def link(self, source: Path, target: Path) -> bool:
        done = super().link(source, target)
        if done:
            self._named(self._place(target), self.names[self._place(source)])
        return done

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        old, new = self._place(source), self._place(target)
        file = self.names[old]
        self.names[old], self.names[new] = -1, file
        self._note(Named(((old, -1), (new, file))))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        if self.names.get(self._place(path), -1) != -1:
            self._named(self._place(path), -1)

    def finish(self) -> list[Entry]:
        """The whole log."""
        self._note(None)
        return self.log

    def _named(self, place: PurePosixPath, file: int | None) -> None:
        self.names[place] = file
        self._note(Named(((place, file),)))

    def _note(self, entry: Entry | None) -> None:
        """LMDB is not asked: that it has committed shows in its file when the next operation is done."""
        now = self._indexed()
        if now != self._last:
            self._last = now
            self.log.append(Indexed(now))
        if entry is not None:
            self.log.append(entry)

    def _indexed(self) -> str:
        path = self.root / INDEX
        return self.blobs.add(path.read_bytes()) if path.exists() else ""

    def _place(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.relative_to(self.root))

    def _number(self, inode: int, *, new: bool = False) -> int:
        """Inode numbers are used again; these are not."""
        if new or inode not in self.files:
            self.files[inode] = len(self.contents) + 1
            self.contents[self.files[inode]] = b""
        return self.files[inode]


@dataclass(frozen=True)
class Image:
    """One state that a crash may leave: content hashes by path, None for a directory; `acknowledged` are those whose
    operation had said that it is done, `at` the length of the log's prefix."""

    at: int
    tree: tuple[tuple[PurePosixPath, str | None], ...]
    index: str
    acknowledged: tuple[object, ...]

    def build(self, root: Path, blobs: Blobs) -> None:
        """Make it. The index is marked as one that was closed in order: then it is believed as it is."""
        for place, digest in self.tree:
            if digest is None:
                (root / place).mkdir(mode=0o700)
            else:
                blobs.link(digest, root / place)
        if self.index and (root / INDEX.parent.parent).is_dir():
            path = root / INDEX
            path.parent.mkdir(mode=0o700)
            path.write_bytes(blobs.read(self.index))
            descriptor = os.open(path.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            examination.write_marker(descriptor, "closed", path)
            os.close(descriptor)

    def names(self, folder: str) -> list[str]:
        """Visible names in a folder of the repository."""
        parent = PurePosixPath("repository") / folder
        return sorted(each.name for each, _ in self.tree if each.parent == parent and not each.name.startswith("."))


@dataclass
class _File:
    durable: bytes
    pending: list[bytes] = field(default_factory=list)

    def versions(self) -> list[bytes]:
        """What may be there: all, nothing, a part, its length in zeros, and the last write without the ones before."""
        if not self.pending:
            return [self.durable]
        whole = b"".join(self.pending)
        last = bytes(len(whole) - len(self.pending[-1])) + self.pending[-1]
        return [self.durable + each for each in (whole, b"", whole[: len(whole) // 2], bytes(len(whole)), last)]


class _Model:
    """The disk after a prefix of the log: what is durable, and what may be."""

    def __init__(self, recorder: Recorder) -> None:
        self.blobs = recorder.blobs
        self.names: Names = dict(recorder.base)
        self.pending: list[Named] = []
        self.files = {file: _File(content) for file, content in recorder.contents.items()}
        self.index, self.before = recorder.base_index, recorder.base_index
        self.acknowledged: tuple[object, ...] = ()

    def apply(self, entry: Entry) -> None:
        match entry:
            case Named():
                self.pending.append(entry)
            case Written(file, content):
                self.files[file].pending.append(content)
            case Synced(int() as file):
                known = self.files[file]
                self.files[file] = _File(known.durable + b"".join(known.pending))
            case Synced(directory):
                for each in self.pending:
                    if each.changes[0][0].parent == directory:
                        _change(self.names, each)
                self.pending = [each for each in self.pending if each.changes[0][0].parent != directory]
            case Indexed(digest):
                self.index, self.before = digest, self.index
            case Flushed():
                self.before = self.index
            case Acknowledged(what):
                self.acknowledged = (*self.acknowledged, what)

    def images(self, at: int, rng: random.Random) -> Iterator[Image]:
        count = len(self.pending)
        for chosen in _subsets(count, rng):
            names = dict(self.names)
            for number in chosen:
                _change(names, self.pending[number])
            names = _reachable(names)
            torn = [file for file in names.values() if file is not None and self.files[file].pending]
            for version in range(5 if torn else 1):
                tree = tuple(
                    (place, None if file is None else self.blobs.add(self._content(file, version)))
                    for place, file in sorted(names.items())
                )
                for index in dict.fromkeys((self.index, self.before)):
                    yield Image(at, tree, index, self.acknowledged)

    def _content(self, file: int, version: int) -> bytes:
        versions = self.files[file].versions()
        return versions[min(version, len(versions) - 1)]


def crash_images(recorder: Recorder, seed: int = 0) -> Iterator[Image]:
    """The images of every prefix of what was recorded; many of them are equal but for `at`."""
    log = recorder.finish()
    model, rng = _Model(recorder), random.Random(seed)
    for file in {entry.file for entry in log if isinstance(entry, Written)}:
        assert model.files[file].durable == b""
    yield from model.images(0, rng)
    for at, entry in enumerate(log, 1):
        model.apply(entry)
        yield from model.images(at, rng)


def some_image(recorder: Recorder, rng: random.Random) -> Image:
    """One of them, at random."""
    log, model = recorder.finish(), _Model(recorder)
    at = rng.randrange(len(log) + 1)
    for entry in log[:at]:
        model.apply(entry)
    return rng.choice(list(model.images(at, rng)))


def distinct(images: Iterator[Image]) -> tuple[int, list[Image]]:
    """(how many there are, one of each kind: with most of what must be there, where they differ in that).

    What is in files with temporary names, which nobody reads, makes no kind of its own.
    """
    total, found = 0, dict[object, Image]()
    for image in images:
        total += 1
        tree = tuple((place, "" if digest and place.name.startswith(".") else digest) for place, digest in image.tree)
        found[tree, image.index] = image
    return total, list(found.values())


def _change(names: Names, change: Named) -> None:
    for place, file in change.changes:
        if file == -1:
            names.pop(place, None)
        else:
            names[place] = file


def _reachable(names: Names) -> Names:
    """Without what lies in directories that are not there."""
    found: Names = {}
    for place in sorted(names):
        if place.parent == PurePosixPath() or place.parent in found:
            found[place] = names[place]
    return found


def _subsets(count: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Which of so many changes have happened: all subsets where they are few, else a sample."""
    numbers = range(count)
    if count <= ENUMERATED:
        yield from itertools.chain.from_iterable(itertools.combinations(numbers, size) for size in range(count + 1))
        return
    yield from ((), tuple(numbers))
    for one in numbers:
        yield (one,)
        yield tuple(each for each in numbers if each != one)
        yield tuple(range(one))
    for _ in range(SAMPLED):
        yield tuple(each for each in numbers if rng.random() < 0.5)
