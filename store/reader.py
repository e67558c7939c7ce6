"""Reading a generation: whole regions into files, ranges into memory, and the proof that a file holds them.

A `GenerationReader` holds a lease, so that prune leaves alone what it may still want. Page maps are walked in
windows of bounded size; inside a window every frame is fetched and opened once, in order of pack and frame, by worker
processes (`store.placing`) where there are such and it is worth it, else by threads. A chunk is only ever placed out of
an authenticated frame in which it stands under the id that the page map has. May be used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from base import extents as ranges
from base.errors import IntegrityError, NotFoundError
from base.extents import Extents
from base.progress import Progress, silent
from base.units import format_size
from base.workers import usable_cores
from store import leases, pagemap
from store.chunker import chunk_ids, read_extents
from store.holes import Holes, surviving
from store.nodes import LOOKS, by_frame
from store.packs import PackEntry
from store.placing import Job, PlacingLanes, Target, write_chunks
from store.records import Generation, Region

if TYPE_CHECKING:
    from store.repository import Repository

_WINDOW = 1 << 18
"""Chunks (1 GiB of pages) planned at once: 52 bytes each."""
_VERIFY_BYTES = 4 << 20
_FRAMES_TOGETHER = 16
"""Frames that one thread reads and opens in a row: with one at a time, handing over took a quarter of the time."""


class _Use(Protocol):
    """Takes chunks (m, chunk size) that stand at `members` (m,) of the ids asked for."""

    def __call__(self, members: NDArray[np.intp], chunks: NDArray[np.uint8], /) -> None: ...


_Lost = Callable[[NDArray[np.intp]], None]
_Job = list[tuple[int, int, NDArray[np.intp]]]
"""Frames of one pack, as of store.nodes.by_frame."""
_Outcome = list[tuple[NDArray[np.intp], IntegrityError | None]]
_PROCESSES_FROM = 16 << 20
"""Bytes from which on a restore is done by worker processes."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`members` (m,) of the `ids` (n, 32) asked for, and where each of them is (m,)."""

    ids: NDArray[np.uint8]
    members: NDArray[np.intp]
    locations: NDArray[np.void]


_Run = Callable[[_Wanted, list[_Job]], Iterable[_Outcome]]
"""Takes what is wanted out of the frames of each job; in any order."""


class GenerationReader:
    """One generation, open for reading; a context manager."""

    def __init__(
        self, repository: Repository, generation: Generation, *, needed: bool = False, kept: bool = False
    ) -> None:
        """`needed`: a record of store.needs keeps what it stands on, also if it is forgotten by now; `kept`: somebody
        else's lease does, until this one is there.

        Raises NotFoundError for one that was forgotten otherwise.
        """
        self._repository, self.generation = repository, generation
        stands_on = [] if needed else [generation]
        self._lease = repository.lease(leases.READER, f"reader of {generation.name}", stands_on, kept=kept)

    def __enter__(self) -> GenerationReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease is not None:
            self._lease.release()
        self._repository.storage.close()  # what is deleted from now on must not be kept on the disk by us

    def region(self, name: str) -> Region:
        """Raises NotFoundError, which lists the regions there are."""
        region = self.generation.regions.get(name)
        if region is None:
            known = ", ".join(self.generation.regions) or "none"
            raise NotFoundError(f"generation {self.generation.name} has no region {name}: it has {known}")
        return region

    def content(self, region: Region) -> Iterator[Extents]:
        """Where the region is not zero, in bytes, window by window."""
        size = region.root.chunk_size
        for numbers, _ in self._leaves(region):
            yield ranges.intersect(ranges.from_numbers(numbers, size), ranges.normalise([(0, region.root.length)]))

    def data(self, region: Region, start: int, end: int) -> Extents:
        """Where bytes [start, end) of a region are not zero, in whole chunks."""
        size = region.root.chunk_size
        numbers, _ = _collect(pagemap.leaves(region.root, self._repository.nodes, start // size, -(-end // size)))
        return ranges.from_numbers(numbers, size)

    def holes(self, region: Region) -> Extents:
        """Ranges of bytes of a region that are lost, as far as that shows without reading data."""
        found = Holes(region.root)
        for numbers, ids in self._leaves(region, found):
            missing = self._repository.nodes.locate(ids)["pack"] == 0
            if missing.any():
                found.chunks(numbers[missing])
        return found.extents

    def require_whole(self, region: Region) -> None:
        """Raises IntegrityError for a region that is marked as hurt, unless what it lost was stored anew since."""
        if region.name in self.generation.hurt:
            lost = ranges.total(self.holes(region))
            if lost:
                name = self.generation.name
                raise IntegrityError(
                    f"generation {name}",
                    f"region {region.name} is hurt: {format_size(lost)} of it are lost "
                    f"(`perdure export --partial {name} {region.name} FILE` writes the rest)",
                )

    def restore(
        self,
        region: Region,
        descriptor: int,
        path: str,
        progress: Progress = silent,
        holes: Holes | None = None,
        *,
        at: int = 0,
    ) -> int:
        """Write every non-zero chunk to its place in a file that is all holes; gives the bytes written.

        `path` is for messages; the region begins `at` this offset of the file. With `holes`, what is lost is left out,
        and told there. Raises IntegrityError (without it), StorageError; the file is then not to be used.
        """
        if holes is None:
            self.require_whole(region)
        size, done = region.root.chunk_size, 0
        with self._placing(Target(descriptor, path, region.root.length, at), region.kept_bytes) as placing:
            for numbers, ids in self._leaves(region, holes):
                for count in self._each_frame(ids, placing(numbers), _lost_of(numbers, holes)):
                    done += count * size
                    progress(f"restoring {region.name}", done, max(done, region.kept_bytes))
        return done

    @contextmanager
    def _placing(self, target: Target, kept_bytes: int) -> Iterator[Callable[[NDArray[np.uint64]], _Run]]:
        """By the numbers of the chunks asked for, what writes them into a file: processes where there are such and it
        is worth it, else threads."""
        pool = self._repository.pool
        if pool is not None and kept_bytes >= _PROCESSES_FROM:
            with PlacingLanes(pool, self._repository.storage, self._repository.keys, target) as lanes:
                yield lambda numbers: partial(self._run_in_processes, lanes, numbers)
        else:
            with ThreadPoolExecutor(usable_cores()) as threads:

                def placed(numbers: NDArray[np.uint64]) -> _Run:
                    return self._run(
                        threads.map, lambda members, chunks: write_chunks(target, numbers[members], chunks)
                    )

                yield placed

    def _run_in_processes(
        self, lanes: PlacingLanes, numbers: NDArray[np.uint64], wanted: _Wanted, jobs: list[_Job]
    ) -> Iterator[_Outcome]:
        """As `_open` with writing, in other processes."""
        packs, there = self._repository.catalog, []
        for job in jobs:
            try:
                entry = packs.pack(job[0][0])
            except IntegrityError as error:  # no pack, or one that is gone
                yield [
                    (at, self._lost(wanted.ids[wanted.members[at[0]]]) if not job[0][0] else error) for *_, at in job
                ]
            else:
                there.append((job, entry))
        sent = [_sent(wanted, numbers, job, entry) for job, entry in there]
        lanes.renew(self._repository.keys)  # by now: packs may have been found again that others have sealed anew
        for position, outcome in lanes.run(sent):
            yield [(at, error) for (*_, at), error in zip(there[position][0], outcome, strict=True)]

    def read(self, region: Region, start: int, end: int, holes: Holes | None = None) -> bytes:
        """Bytes [start, end) of a region, at most up to its length. With `holes`, what is lost is zero, and told there.

        Raises IntegrityError (without `holes`).
        """
        size = region.root.chunk_size
        end = min(end, region.root.length)
        first, last = start // size, -(-end // size)
        out = np.zeros((last - first, size), np.uint8)
        for numbers, ids in self._within(region, first, last, holes):

            def place(members: NDArray[np.intp], chunks: NDArray[np.uint8]) -> None:
                out[(numbers[members] - np.uint64(first)).astype(np.int64)] = chunks  # noqa: B023  # used up in this turn

            for _ in self._each_frame(ids, self._run(map, place), _lost_of(numbers, holes)):
                pass
        return out.reshape(-1)[start - first * size : end - first * size].tobytes()

    def stream(self, region: Region, piece: int = 4 << 20, holes: Holes | None = None) -> Iterator[bytes]:
        """The whole region in order, zeros included, in pieces. With `holes`, what is lost is zero, and told there.

        Raises IntegrityError (without `holes`).
        """
        if holes is None:
            self.require_whole(region)
        for start in range(0, region.root.length, piece):
            yield self.read(region, start, start + piece, holes)

    def verify(self, region: Region, descriptor: int, path: str, progress: Progress = silent) -> int:
        """Measure a file: hash what is in it and compare every chunk with the page map; gives the bytes hashed.

        Raises IntegrityError naming the first place that differs, in either direction.
        """
        root, size = region.root, region.root.chunk_size
        limit = -(-root.length // size) * size
        present = ranges.widen(ranges.resident(descriptor, root.length), size)
        key = self._repository.keys.id_key("chunk")
        hashed = 0
        for start in range(0, limit, _WINDOW * size):
            window = ranges.normalise([(start, min(start + _WINDOW * size, limit))])
            numbers, ids = _collect(
                pagemap.leaves(root, self._repository.nodes, start // size, int(window[0, 1]) // size)
            )
            unseen = np.ones(len(numbers), np.bool_)
            for piece in ranges.pieces(ranges.intersect(present, window), max(size, _VERIFY_BYTES)):
                buffer = np.empty(ranges.total(piece), np.uint8)
                read_extents(descriptor, piece, buffer)
                found = chunk_ids(buffer.reshape(-1, size), key)
                at = ranges.numbers(piece, size)
                place = np.searchsorted(numbers, at)
                known = (place < len(numbers)) & (
                    numbers[np.minimum(place, len(numbers) - 1)] == at if len(numbers) else False
                )
                wanted = np.zeros_like(found)
                wanted[known] = ids[place[known]]
                unseen[place[known]] = False
                self._compare(region, at[(found != wanted).any(axis=1)], path)
                hashed += len(buffer)
                progress(f"verifying {region.name}", hashed, ranges.total(present))
            self._compare(region, numbers[unseen], path)
        return hashed

    def _compare(self, region: Region, different: NDArray[np.uint64], path: str) -> None:
        if len(different):
            offset = int(different[0]) * region.root.chunk_size
            raise IntegrityError(path, f"does not hold region {region.name} of {self.generation.name}", offset=offset)

    def _within(
        self, region: Region, first: int, last: int, holes: Holes | None
    ) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        if holes is None:
            return pagemap.leaves(region.root, self._repository.nodes, first, last)
        return surviving(region.root, self._repository.nodes, first, last, holes)

    def _leaves(
        self, region: Region, holes: Holes | None = None
    ) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """Non-zero leaves in planning windows."""
        limit = -(-region.root.length // region.root.chunk_size)
        for start in range(0, limit, _WINDOW):
            numbers, ids = _collect(self._within(region, start, min(start + _WINDOW, limit), holes))
            if len(numbers):
                yield numbers, ids

    def _each_frame(self, ids: NDArray[np.uint8], run: _Run, lost: _Lost | None = None) -> Iterator[int]:
        """Open every frame that holds some of `ids` (n, 32) once; gives the number of chunks used, frame by frame.

        What was moved by others meanwhile is looked up again. `lost` is told which members cannot be had; without it,
        that raises IntegrityError.
        """
        members, locations = np.arange(len(ids)), self._repository.nodes.locate(ids)
        failure: IntegrityError | None = None
        for _ in range(LOOKS):
            missed, failure = [], None
            for outcome in run(_Wanted(ids, members, locations), _jobs(locations)):
                for at, error in outcome:
                    if error is not None:
                        missed.append(at)
                        failure = failure or error
                yield sum(len(at) for at, error in outcome if error is None)
            if failure is None:
                return
            left = np.concatenate(missed)
            again = self._repository.nodes.located_anew(ids[members[left]], locations[left])
            if again is None:
                break
            members, locations = members[left], again
        assert failure is not None
        if lost is None:
            raise failure
        lost(members[left])

    def _run(self, each: Callable[..., Iterable[_Outcome]], use: _Use) -> _Run:
        """In this process; `each` is `map` or a thread pool's."""
        return lambda wanted, jobs: each(partial(self._open, wanted, use), jobs)

    def _open(self, wanted: _Wanted, use: _Use, job: _Job) -> _Outcome:
        """Use what is wanted of some frames; for each: which members these are, and why they are lost."""
        ids, members, locations = wanted.ids, wanted.members, wanted.locations
        pack, frames = job[0][0], self._repository.frames
        if pack == 0:
            return [(at, self._lost(ids[members[at[0]]])) for _, _, at in job]
        outcome: _Outcome = []
        try:
            for (_, number, at), found in zip(job, frames.several(pack, [each for _, each, _ in job]), strict=True):
                try:
                    if isinstance(found, IntegrityError):
                        raise found
                    chunks = frames.proven(pack, number, found, locations["slot"][at], ids[members[at]])
                except IntegrityError as error:
                    outcome.append((at, error))
                else:
                    use(members[at], chunks)
                    outcome.append((at, None))
        except IntegrityError as error:  # the pack as a whole
            outcome += [(at, error) for _, _, at in job[len(outcome) :]]
        return outcome

    def _lost(self, chunk: NDArray[np.uint8]) -> IntegrityError:
        name = f"generation {self.generation.name}"
        return IntegrityError(name, "needs a chunk that is in no pack", chunk=bytes(chunk).hex())


def _jobs(locations: NDArray[np.void]) -> list[_Job]:
    """Frames in order of pack and number, some of one pack together: what is read in one piece."""
    jobs: list[_Job] = []
    for each in by_frame(locations):
        if jobs and jobs[-1][0][0] == each[0] and len(jobs[-1]) < _FRAMES_TOGETHER:
            jobs[-1].append(each)
        else:
            jobs.append([each])
    return jobs


def _sent(wanted: _Wanted, numbers: NDArray[np.uint64], job: _Job, entry: PackEntry) -> Job:
    """A job for another process."""
    at = np.concatenate([each for _, _, each in job])
    members = wanted.members[at]
    frames, counts = [number for _, number, _ in job], [len(each) for _, _, each in job]
    return Job(job[0][0], entry, frames, counts, wanted.locations["slot"][at], wanted.ids[members], numbers[members])


def _lost_of(numbers: NDArray[np.uint64], holes: Holes | None) -> _Lost | None:
    return None if holes is None else lambda members: holes.chunks(numbers[members])


def _collect(
    parts: Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    both = list(parts)
    if not both:
        return np.empty(0, np.uint64), np.empty((0, 32), np.uint8)
    return np.concatenate([each[0] for each in both]), np.concatenate([each[1] for each in both])
