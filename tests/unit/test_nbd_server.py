"""The NBD server against Perdure's client and QEMU's tools, and its patience with a repository that cannot be read."""

from __future__ import annotations

import random
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from base import extents as ranges
from base.errors import IntegrityError, PerdureError, VirtualMachineError
from base.extents import Extents
from restore.nbd_server import serve
from vm.nbd import Export

CHUNK = 64 << 10
SIZE = 3 * CHUNK + 512
DATA = random.Random(1).randbytes(CHUNK)
CONTENT = bytes(CHUNK) + DATA + bytes(CHUNK) + b"\1" * 512


class Memory:
    """A disk in memory, which may be hurt for some time."""

    def __init__(self) -> None:
        self.size = SIZE
        self.hurt = 0

    def data(self, start: int, end: int) -> Extents:
        there = ranges.normalise([(CHUNK, 2 * CHUNK), (3 * CHUNK, SIZE)])
        return ranges.intersect(there, ranges.normalise([(start, end)]))

    def read(self, start: int, end: int) -> bytes:
        if self.hurt:
            self.hurt -= 1
            raise IntegrityError("packs/00", "is missing")
        return CONTENT[start:end]


class Server:
    """Serves one disk, named `one`, on a socket."""

    def __init__(self, folder: Path) -> None:
        self.path, self.disk, self.told, self.waits = folder / "sock", Memory(), [], 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def held(self, name: str, error: PerdureError | None) -> None:
        self.told.append((name, None if error is None else str(error)))

    def leave(self, seconds: float) -> bool:
        self.waits += 1
        return seconds > 60

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            disks = {"one": self.disk}
            threading.Thread(target=serve, args=(connection, disks, self.held, self.leave), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        made = Server(Path(folder))
        yield made
        made.close()


def test_a_client_reads_size_holes_and_content(server: Server, tmp_path: Path) -> None:
    with Export("demo", server.path, "one") as export, (tmp_path / "copy").open("w+b") as copy:
        assert export.size == SIZE
        assert export.data(0, SIZE).tolist() == [[CHUNK, 2 * CHUNK], [3 * CHUNK, SIZE]]
        assert export.data(CHUNK + 512, CHUNK + 1024).tolist() == [[CHUNK + 512, CHUNK + 1024]]
        copy.truncate(SIZE)
        export.read_into(copy.fileno(), ranges.normalise([(0, SIZE)]))
        assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(VirtualMachineError, match="there is no disk two here"):
        Export("demo", server.path, "two")


def test_qemus_tools_read_it(server: Server, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(CONTENT)
    uri = f"nbd+unix:///one?socket={server.path}"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, tmp_path / "raw"], check=True)
    found = subprocess.check_output(["qemu-img", "map", "-f", "raw", "--output=json", uri], text=True)
    assert found.count('"zero": true') == 2


def test_what_cannot_be_read_holds_its_reader_and_never_becomes_zeros(server: Server, tmp_path: Path) -> None:
    server.disk.hurt = 3
    with Export("demo", server.path, "one") as export, (tmp_path / "copy").open("w+b") as copy:
        copy.truncate(SIZE)
        export.read_into(copy.fileno(), ranges.normalise([(CHUNK, 2 * CHUNK)]))
        assert (tmp_path / "copy").read_bytes()[CHUNK : 2 * CHUNK] == DATA
    assert server.waits == 3
    assert server.told == 3 * [("one", "packs/00: is missing")] + [("one", None)]


@pytest.mark.parametrize(
    "said",
    [
        b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\7" + b"\xff\xff\xff\xff",  # an option longer than any is
        b"\0\0\0\3"
        + b"IHAVEOPT"
        + b"\0\0\0\7"
        + b"\0\0\0\6"
        + b"\0\0\0\x20"
        + b"\0\0",  # a name longer than the option
        b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\x0a" + b"\0\0\0\x09" + b"\0\0\0\3one" + b"\0\0",  # less than a count
        b"\0\0\0\3" + b"IHAVENOT" + bytes(8),
    ],
)
def test_a_client_that_breaks_the_protocol_loses_its_connection(server: Server, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(60)
        client.connect(str(server.path))
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    with Export("demo", server.path, "one") as export:
        assert export.size == SIZE
