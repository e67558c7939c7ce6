"""The record of a lazy restore: which pages of a VM's memory have been placed, and what the page server says of itself.

Two files beside the backing files, in the same private tmpfs, so that they share their fate:

    lazy.json    what is restored: generation and regions, written once
    lazy.claims  512 words (uint64), then a byte for each page of each region, from a page boundary on

A page is claimed once it has been placed, never before: a hole that is not claimed still has the generation's content,
one that is was punched since and is zeros. Between two claims there may be one batch that is placed and not yet
claimed: the words of the intent name it, so that a server that takes over can tell it from a page that nobody of us
has placed. Words and bytes are shared memory of the server, which writes all but `PACE`, and of the
supervisor, which writes only that: each is one store, and nothing has to be locked. An exclusive flock on lazy.claims
is held by the server that works.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from base.disk import Disk, replace_file
from base.errors import ConflictError, NotFoundError, StorageError
from base.extents import resident
from base.units import PAGE
from store.records import Generation
from store.repository import Repository

FORMAT = 1
_PREDECESSOR_S = 5.0
_WORDS = 512
FACTS, CLAIMS, PROBLEM_TEXT = "lazy.json", "lazy.claims", "lazy.problem"

SERVER, PHASE, PACE = 1, 2, 3
PLANNED, PLACED, PLAN_COMPLETE, FAULTS, PREFETCHED, HELD, SERVERS, SLOWEST_US = 8, 9, 10, 11, 12, 13, 14, 15
INTENT_REGION, INTENT_FIRST, INTENT_COUNT, FETCHED, BEAT = 16, 17, 18, 19, 20
KEYRING = 40
"""Number of the keyring that the server was given."""
LATENCIES, BUCKETS, PER_OCTAVE = 64, 160, 8
"""Histogram of fault latencies: bucket `i` counts those from 2 ** (i / PER_OCTAVE) microseconds on."""

FOR_A_SHARE, AT_ONCE, FAULTS_ONLY = 0, 1, 2
"""Paces of what nobody waits for: a share of a processor, all that one can do, not at all."""
STARTING, SERVING, DONE, BROKEN = 0, 1, 2, 3
"""Phases. DONE: nothing is left to place; faults on punched pages are still served. BROKEN: wrong bytes were found."""


class Facts(msgspec.Struct, frozen=True):
    """What is restored. Regions in the order of their claims: (name, name of the backing file, bytes)."""

    version: int
    vm: str
    generation: str
    regions: tuple[tuple[str, str, int], ...]
    sequence: int = 0
    """Of the generation's record."""


class Claims:
    """An open record; a context manager."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        """Raises StorageError."""
        self.folder, self.facts = folder, facts
        path = folder / CLAIMS
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "open") from error
        size = os.fstat(self._descriptor).st_size
        if size != 8 * _WORDS + sum(_claim_bytes(each) for _, _, each in facts.regions):
            os.close(self._descriptor)
            raise StorageError(str(path), "is damaged: what of the VM's memory was restored is not known")
        self._map = mmap.mmap(self._descriptor, size)
        content = np.frombuffer(self._map, np.uint8)
        self.words: NDArray[np.uint64] = content[: 8 * _WORDS].view(np.uint64)
        self.pages: dict[str, NDArray[np.uint8]] = {}
        at = 8 * _WORDS
        for name, _, size in facts.regions:
            self.pages[name] = content[at : at + size // PAGE]
            at += _claim_bytes(size)

    @classmethod
    def create(cls, folder: Path, vm: str, generation: Generation, files: Mapping[str, tuple[str, int]]) -> Claims:
        """Begin: nothing is claimed. `files`: by region, name of the backing file and bytes. Raises StorageError."""
        regions = tuple((name, *each) for name, each in files.items())
        facts = Facts(FORMAT, vm, generation.id, regions, generation.sequence)
        path = folder / CLAIMS
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, 8 * _WORDS + sum(_claim_bytes(size) for _, _, size in facts.regions))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "make") from error
        replace_file(Disk(), folder / FACTS, msgspec.json.encode(facts), lasting=False)
        return cls(folder, facts)

    @classmethod
    def find(cls, folder: Path) -> Claims | None:
        """The record of a lazy restore that has not come to its end; None if there is none. Raises StorageError."""
        path = folder / FACTS
        try:
            facts = msgspec.json.decode(path.read_bytes(), type=Facts)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise StorageError(str(path), "is damaged: what of the VM's memory was restored is not known") from error
        except OSError as error:
            raise StorageError.from_os(error, str(path), "read") from error
        if any(size < 0 or size % PAGE for _, _, size in facts.regions):
            raise StorageError(str(path), "is damaged: regions are of whole pages")
        if facts.version != FORMAT:
            raise ConflictError(f"{path} is of another version of Perdure: go on with that one, or stop the VM")
        return cls(folder, facts)

    def generation(self, repository: Repository) -> Generation:
        """What is restored, also if it was forgotten meanwhile. Raises NotFoundError, IntegrityError, StorageError."""
        try:
            return repository.resolve(self.facts.generation)
        except NotFoundError:
            if not self.facts.sequence:
                raise
            return repository.generation_at(self.facts.sequence)

    def lock(self, patience_s: float = _PREDECESSOR_S) -> None:
        """Be the server, when the one before has ended for good: one that was killed takes a moment.

        Raises ConflictError if it does not end.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConflictError(f"VM {self.facts.vm} has a page server already") from None
                time.sleep(0.01)

    def served(self) -> bool:
        """Whether a server holds the record; for others than it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    def word(self, which: int) -> int:
        """One of the words."""
        return int(self.words[which])

    def set(self, which: int, value: int) -> None:
        """Change one of the words."""
        self.words[which] = value

    def intend(self, region: int, first: int, count: int) -> None:
        """Pages [first, first + count) of a region, by its place in the facts, are going to be placed."""
        self.words[INTENT_FIRST], self.words[INTENT_COUNT] = first, count
        self.words[INTENT_REGION] = region + 1

    def claim(self, region: str, first: int, count: int) -> None:
        """They have been placed."""
        self.pages[region][first : first + count] = 1
        self.words[INTENT_REGION] = 0

    def take_over(self, backing: Mapping[str, int]) -> None:
        """Claim what a server had placed and not claimed when it was killed; `backing` are descriptors by region.

        Raises ConflictError for a page that is there and that no server has placed, and StorageError.
        """
        intended = self.word(INTENT_REGION)
        for at, (name, file, size) in enumerate(self.facts.regions):
            claims = self.pages[name]
            try:
                there = resident(backing[name], size) // PAGE
            except OSError as error:
                raise StorageError.from_os(error, file, "look for holes") from error
            for first, last in there.tolist():
                if not claims[first:last].all():
                    for page in (np.flatnonzero(claims[first:last] == 0) + first).tolist():
                        offset = page - self.word(INTENT_FIRST)
                        if intended != at + 1 or not 0 <= offset < self.word(INTENT_COUNT):
                            raise wrong_page(self.facts.vm, name, page)
                        claims[page] = 1
        self.words[INTENT_REGION] = 0

    def count_latency(self, microseconds: float) -> None:
        """One fault was answered after so long."""
        bucket = LATENCIES + min(int(math.log2(max(microseconds, 1.0)) * PER_OCTAVE), BUCKETS - 1)
        self.words[bucket] = int(self.words[bucket]) + 1  # plain numbers: numpy's own take four times as long
        self.words[FAULTS] = int(self.words[FAULTS]) + 1
        if microseconds > int(self.words[SLOWEST_US]):
            self.words[SLOWEST_US] = int(microseconds)

    def latency(self, share: float) -> float:
        """The time within which that share of the faults was answered, in microseconds; exact to a twelfth."""
        counts = np.cumsum(self.words[LATENCIES : LATENCIES + BUCKETS].astype(np.int64))
        if not counts[-1]:
            return 0.0
        bucket = int(np.searchsorted(counts, share * counts[-1]))
        return float(2 ** ((bucket + 1) / PER_OCTAVE))

    @property
    def problem(self) -> str:
        """Why the guest is held, in words; empty if it is not."""
        with suppress(OSError):
            return (self.folder / PROBLEM_TEXT).read_text(errors="replace")
        return ""

    def tell_problem(self, text: str) -> None:
        """Say why the guest is held; nothing takes it back. Raises StorageError."""
        if text:
            replace_file(Disk(), self.folder / PROBLEM_TEXT, text.encode(), lasting=False)
        else:
            (self.folder / PROBLEM_TEXT).unlink(missing_ok=True)

    def remove(self) -> None:
        """The restore has come to its end: from now on the backing files are all there is. Raises StorageError."""
        try:
            for name in (FACTS, CLAIMS, PROBLEM_TEXT):  # the facts first: they say that there is a restore
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(self.folder), "remove the record of a restore") from error

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Let go of the files; a lock ends with that. The arrays must not be used any more."""
        self.words = np.zeros(0, np.uint64)
        self.pages = {}
        with suppress(BufferError):  # somebody still holds an array: it goes with that
            self._map.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wrong_page(vm: str, region: str, page: int) -> ConflictError:
    """The error for a page that is there though nobody of us has placed it: it may hold wrong bytes."""
    return ConflictError(
        f"VM {vm}: page {page} of region {region} was there before its content was restored: something else has "
        f"written or mapped the backing file, and the guest is held; stop it, or roll back with --discard"
    )


def _claim_bytes(size: int) -> int:
    return -(-(size // PAGE) // PAGE) * PAGE
