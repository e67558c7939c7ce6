"""Regions as images of other formats: qemu-img makes them, and reads what they hold from here.

It is given one end of a pair of sockets, over which it speaks NBD: nothing stands in a file that is not wanted there.

Source: qemu-img(1); QEMU, qapi/sockets.json (SocketAddress, type fd).
"""

from __future__ import annotations

import os
import socket
import subprocess
from threading import Event, Thread

from base.errors import NotFoundError, PerdureError, StorageError
from base.extents import Extents
from base.progress import Progress
from restore.nbd_server import serve
from store.reader import GenerationReader
from store.records import Region

_NAME = "region"


class _Content:
    """A region, as the server wants it; it tells how far it was read."""

    def __init__(self, reader: GenerationReader, region: Region, progress: Progress) -> None:
        self._reader, self._region, self._progress = reader, region, progress
        self.size = region.root.length

    def data(self, start: int, end: int) -> Extents:
        return self._reader.data(self._region, start, end)

    def read(self, start: int, end: int) -> bytes:
        found = self._reader.read(self._region, start, end)
        self._progress(f"writing {self._region.name}", end, self.size)
        return found


class _Failures:
    """What could not be read: the conversion ends with the first of it, since nobody puts it right meanwhile."""

    def __init__(self) -> None:
        self.first: PerdureError | None = None
        self._over = Event()

    def held(self, _: str, error: PerdureError | None) -> None:
        self.first = self.first or error
        if error is not None:
            self._over.set()

    def leave(self, seconds: float) -> bool:
        return self._over.wait(seconds)


def write_qcow2(reader: GenerationReader, region: Region, descriptor: int, path: str, progress: Progress) -> int:
    """Make an open, empty file a qcow2 image of a region; gives the bytes that it has. `path` is for messages.

    Raises IntegrityError, StorageError, NotFoundError (there is no qemu-img).
    """
    source = f'json:{{"driver":"raw","file":{{"driver":"nbd","export":"{_NAME}","server":{{"type":"fd","str":"%d"}}}}}}'
    ours, theirs = socket.socketpair()
    failures = _Failures()
    content = {_NAME: _Content(reader, region, progress)}
    with theirs:
        target, given = f"/proc/self/fd/{descriptor}", (theirs.fileno(), descriptor)
        command = ["qemu-img", "convert", "-O", "qcow2", source % theirs.fileno(), target]
        try:
            made = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=given
            )
        except FileNotFoundError:
            ours.close()
            raise NotFoundError("there is no program qemu-img: install package qemu-utils") from None
    server = Thread(target=serve, args=(ours, content, failures.held, failures.leave), daemon=True)
    server.start()
    try:
        said = made.communicate()[1]
    except BaseException:
        made.kill()
        made.wait()
        raise
    finally:
        server.join()
    if failures.first is not None:
        raise failures.first
    if made.returncode:
        raise StorageError(path, f"qemu-img could not write it: {' '.join(said.split())}")
    return os.fstat(descriptor).st_size
