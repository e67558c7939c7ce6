"""The supervisor's side of a lazy restore: gives page servers their job, and knows how they are.

A `LazyRestore` is one restore under way, from the record that it begins to the moment at which the backing files are
all there is. Plain calls, none of which waits for the guest; one thread at a time, but `status`, which any may call.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from base.errors import ConflictError, PerdureError, VirtualMachineError
from base.units import PAGE
from restore import claims as record
from restore import server
from restore.claims import Claims
from restore.nursery import Nursery, spawned
from restore.pulse import Pulse
from restore.server import Job
from store import leases
from store.leases import Lease
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from vm.identity import Identity, ended

_END_S = 10.0
_ANSWER_S = 60.0
"""For a server to be attached; it may have to open an index that others fill."""


class LazyRestore:
    """One restore under way. `pidfd` is the server's, readable when it has ended; -1 while there is none."""

    def __init__(
        self, repository: Repository, job: Job, claims: Claims, folder: Path, nursery: Nursery | None = None
    ) -> None:
        self._repository, self._job, self.claims, self._folder = repository, job, claims, folder
        self._nursery, self._pulse = nursery, Pulse(claims)
        self._pipe: Connection | None = None
        self._lease: Lease | None = None
        self.pidfd = -1
        self.told = ""
        """What of `held` was said."""

    @classmethod
    def begin(
        cls,
        repository: Repository,
        generation: Generation,
        memory: Path,
        files: Mapping[str, Path],
        folder: Path,
        working_sets: Path,
        nursery: Nursery | None,
    ) -> LazyRestore:
        """Before QEMU is started: the record, and a server that gets ready meanwhile. `files`: backing files by region,
        all holes; `folder` is the VM's runtime folder. Raises NotFoundError, IntegrityError (a region is hurt),
        StorageError, VirtualMachineError."""
        sizes = {name: (path.name, path.stat().st_size) for name, path in files.items()}
        claims = Claims.create(memory, generation.vm, generation, sizes)
        made = cls(repository, _job(repository, memory, folder, working_sets), claims, folder, nursery)
        try:
            made._send()
            made._hold(generation)
            with GenerationReader(repository, generation) as reader:
                for name in files:
                    reader.require_whole(reader.region(name))
        except BaseException:
            made.abandon()
            raise
        return made

    @classmethod
    def find(
        cls, repository: Repository, memory: Path, folder: Path, working_sets: Path, nursery: Nursery | None
    ) -> LazyRestore | None:
        """One that an earlier supervisor began; its server may still be there. Raises StorageError, ConflictError."""
        claims = Claims.find(memory)
        if claims is None:
            return None
        found = cls(repository, _job(repository, memory, folder, working_sets), claims, folder, nursery)
        with contextlib.suppress(PerdureError):  # what is still stored can be served
            found._hold(claims.generation(repository), kept=True)
        if claims.served():
            with contextlib.suppress(OSError):  # it has ended since
                found.pidfd = os.pidfd_open(claims.word(record.SERVER))
        return found

    def serve(self, qemu: Identity) -> None:
        """Govern that QEMU's memory; when this returns, first touches are answered. Starts a server if there is none.

        Raises VirtualMachineError, and what else the server found; it has ended then.
        """
        if self._pipe is None:
            self._send()
        assert self._pipe is not None
        pipe, self._pipe = self._pipe, None
        try:
            with pipe:
                with contextlib.suppress(BrokenPipeError):  # it has said why
                    pipe.send((qemu.pid, qemu.start_ticks, qemu.boot))
                if not pipe.poll(_ANSWER_S):
                    raise VirtualMachineError(f"VM {self.vm}: its page server is not ready after {_ANSWER_S:g} s")
                answer, why = pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise VirtualMachineError(f"VM {self.vm}: its page server ended: see {self._job.log}") from error
        if answer != server.SERVING:
            raise why

    @property
    def vm(self) -> str:
        """Name of the VM."""
        return self.claims.facts.vm

    @property
    def generation(self) -> str:
        """Id of the generation that is restored."""
        return self.claims.facts.generation

    @property
    def regions(self) -> list[str]:
        """Names of the regions that are restored."""
        return [name for name, _, _ in self.claims.facts.regions]

    @property
    def phase(self) -> int:
        """One of the phases of restore.claims; DONE also when it has come to its end."""
        return self.claims.word(record.PHASE) if self.claims.is_open else record.DONE

    @property
    def held(self) -> str:
        """What the store cannot give, in words; empty if all is well."""
        return self.claims.problem

    @property
    def waiting(self) -> bool:
        """Whether QEMU may be waiting, without end, for memory that nobody can give it just now."""
        if not self.claims.is_open or self.phase in (record.DONE, record.BROKEN):
            return False
        return self.pidfd < 0 or self.claims.word(record.HELD) > 0

    @property
    def outdated(self) -> bool:
        """Whether the server that serves has older keys than we have: what others store anew it cannot read."""
        return self.phase == record.SERVING and self.claims.word(record.KEYRING) < self._repository.keys.header.number

    def hung(self, qemu: int) -> str:
        """Why the server that serves the QEMU process `qemu` is believed to hang, in words; empty if it is not. To be
        asked some times a second."""
        return self._pulse.hangs(qemu) if self.claims.is_open else ""

    def hurry(self, *, on: bool = True) -> None:
        """Fill as fast as one processor can, or no more than its share of it."""
        self.claims.set(record.PACE, record.AT_ONCE if on else record.FOR_A_SHARE)

    def kill(self) -> None:
        """End the server, wherever it is; whoever touches what is missing waits for the next one."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.reap()

    def reap(self) -> None:
        """Let go of a server that has ended, or was killed."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            ended(pidfd, _END_S)
            with contextlib.suppress(OSError):  # the nursery's, or an earlier supervisor's: it is reaped there
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            os.close(pidfd)

    def finish(self) -> None:
        """All is placed, and QEMU's memory is governed for writes only: nothing of the restore is left."""
        self.claims.remove()
        self.kill()
        self.close()

    def abandon(self) -> None:
        """The memory is going to be given back."""
        self.kill()
        self.close()

    def close(self) -> None:
        """Leave it to the next supervisor; a server that was not attached to a QEMU ends."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self.claims.close()

    def status(self) -> dict[str, Any]:
        """Facts for `perdure status`. Bytes that the generation has, as far as they are planned, and of these the ones
        that are there; faults and their latencies in microseconds."""
        claims = self.claims
        planned, placed = claims.word(record.PLANNED), claims.word(record.PLACED)
        return {
            "generation": self.generation,
            "percent": round(100 * min(placed, planned) / planned, 1) if planned else 0.0,
            "planned_bytes": planned * PAGE,
            "resident_bytes": min(placed, planned) * PAGE,
            "planned_all": bool(claims.word(record.PLAN_COMPLETE)),
            "faults": claims.word(record.FAULTS),
            "fault_us_p50": round(claims.latency(0.5)),
            "fault_us_p99": round(claims.latency(0.99)),
            "fault_us_max": claims.word(record.SLOWEST_US),
            "prefetched_bytes": claims.word(record.PREFETCHED) * PAGE,
            "servers": claims.word(record.SERVERS),
            "waiting": claims.word(record.HELD),
            "problem": self.held or None,
        }

    def _hold(self, generation: Generation, *, kept: bool = False) -> None:
        """A lease of ours: between two servers nobody else holds one."""
        purpose = f"lazy restore of {generation.name}"
        self._lease = self._repository.lease(leases.READER, purpose, [generation], kept=kept)

    def _send(self) -> None:
        """Give a server its job."""
        if self.pidfd >= 0:
            raise ConflictError(f"VM {self.vm} has a page server already")
        made = (self._nursery and self._nursery.bear()) or spawned(self._folder)
        self._pipe, self.pidfd = made.pipe, made.pidfd
        with contextlib.suppress(OSError):  # it has ended: `serve` says so
            self._pipe.send((self._job, server.material(self._repository.keys)))


def _job(repository: Repository, memory: Path, folder: Path, working_sets: Path) -> Job:
    return Job(
        repository=str(repository.path),
        state=str(repository.state),
        memory=str(memory),
        log=str(folder / server.LOG),
        working_sets=str(working_sets),
    )
