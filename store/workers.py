"""The loop of a worker process: packs out of memory (`store.lanes`), and memory out of packs (`store.placing`)."""

from __future__ import annotations

from multiprocessing.connection import Connection

from base.allocation import keep_freed_memory
from base.errors import PerdureError
from store.lanes import ChunkerService
from store.placing import Placer


def serve(pipe: Connection) -> None:
    """For base.workers.WorkerPool. An error is answered, and the worker is ready for the next work."""
    keep_freed_memory()
    chunking, placing = ChunkerService(pipe), Placer(pipe)
    while True:
        what, *arguments = pipe.recv()
        try:
            if what == "placing":
                placing.handle(*arguments)
            else:
                chunking.handle(what, tuple(arguments))
        except PerdureError as error:
            chunking.drop()
            placing.drop()
            pipe.send(error)
