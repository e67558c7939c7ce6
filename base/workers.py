"""A pool of worker processes that each run one loop over a pipe.

The pool is forked before its owner opens LMDB or starts threads: neither survives a fork. Workers ignore Ctrl-C
(their owner decides) and end when their pipe closes, so that they never outlive the process that made them. A
worker that dies or raises is reported as WorkerError, and what it worked on is lost; `ready` then starts all of them
anew for the next work, by spawning: that takes a second of imports, but a fork would by now carry an open LMDB and
other threads' locks, and an owner that runs for months must not lose its workers for good. Belongs to one thread at a
time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from base.errors import PerdureError, WorkerError, one_line

Serve = Callable[[Connection], None]
"""A worker's loop: receives messages and answers until EOFError."""


def usable_cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """`count` processes that run `serve`, a function of a module."""

    def __init__(self, count: int, serve: Serve) -> None:
        self.pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._count, self._serve = count, serve
        self._start(multiprocessing.get_context("fork"))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.pipes)

    def ready(self) -> None:
        """Start all workers anew if one of them is gone. Raises WorkerError."""
        if all(process.is_alive() for process in self._processes):
            return
        self.kill()  # the others may be in the middle of what was lost
        self.close()
        try:
            self._start(multiprocessing.get_context("spawn"))
        except OSError as error:
            raise WorkerError(f"cannot start worker processes: {error.strerror or error}") from error

    def send(self, worker: int, message: tuple[Any, ...]) -> None:
        """Give a message to one worker. Raises WorkerError if it is dead."""
        try:
            self.pipes[worker].send(message)
        except OSError:
            raise self._death(worker) from None

    def send_descriptor(self, worker: int, descriptor: int) -> None:
        """Give an open file to one worker, which takes it with `receive_descriptor`."""
        try:
            send_handle(self.pipes[worker], descriptor, self._processes[worker].pid or 0)
        except OSError:
            raise self._death(worker) from None

    def receive(self) -> list[tuple[int, Any]]:
        """Wait until some workers have answered: [(worker, answer)].

        Raises WorkerError, or the PerdureError that a worker answered with.
        """
        answers: list[tuple[int, Any]] = []
        for pipe in connection.wait(self.pipes):
            worker = self.pipes.index(pipe)  # type: ignore[arg-type]  # wait gives back what it was given
            answers.append((worker, self.receive_from(worker)))
        return answers

    def receive_from(self, worker: int) -> Any:
        """Wait for one worker's answer."""
        try:
            answer = self.pipes[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        """End the workers at once, wherever they are; the pool then only reports them dead."""
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        """End the workers when they have done what they were told."""
        for pipe in self.pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self.pipes, self._processes = [], []

    def _start(self, context: ForkContext | SpawnContext) -> None:
        try:
            for number in range(self._count):
                ours, theirs = context.Pipe()
                inherited = [*self.pipes, ours] if isinstance(context, ForkContext) else []
                process = context.Process(
                    target=_work,
                    args=(self._serve, theirs, inherited),
                    name=f"perdure-worker-{number}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def _death(self, worker: int) -> WorkerError:
        process = self._processes[worker]
        process.join(timeout=1)
        code = process.exitcode
        how = (
            "closed its pipe"
            if code is None
            else f"was killed by signal {-code}"
            if code < 0
            else f"exited with {code}"
        )
        return WorkerError(f"worker process {process.pid} {how}: what it worked on is abandoned")


def receive_descriptor(pipe: Connection) -> int:
    """In a worker: the descriptor that the owner sends next; the worker closes it."""
    return recv_handle(pipe)


def _work(serve: Serve, pipe: Connection, others: list[Connection]) -> None:
    """Body of a worker process. An error is an answer; then the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for each in others:
        each.close()  # else a worker would keep its siblings' pipes open after the owner's death
    with contextlib.suppress(EOFError, ConnectionError):  # the owner closed its end, or died, whatever we were doing
        try:
            serve(pipe)
        except (EOFError, ConnectionError):
            raise
        except PerdureError as error:
            pipe.send(error)
        except BaseException as error:
            pipe.send(WorkerError(f"worker process {os.getpid()} failed: {type(error).__name__}: {one_line(error)}"))
