"""Two real services in the guest, and a client that knows what it wrote: Debian's redis-server and SQLite.

Redis runs twice: `files` appends every write to a file on the DAX file
system, `heap` keeps nothing but its memory. SQLite lies on the DAX file system. The client writes records 1, 2, 3 ...
to all of them, each of which says who wrote it (an epoch) and carries a checksum.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import socket
import sqlite3
import subprocess
import threading
import time
from typing import Any

FOLDER = "/files"


def run(*words: str) -> None:
    """A program, to its good end."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, (words, done.stdout)


def device() -> str:
    """The DAX block device, once the agent has made it of one without."""
    deadline = time.monotonic() + 60
    while True:
        for path in glob.glob("/sys/block/pmem*/queue/dax"):
            with contextlib.suppress(OSError), open(path) as dax:
                if dax.read().strip() == "1":
                    return f"/dev/{path.split('/')[3]}"
        assert time.monotonic() < deadline, "the agent made no DAX device"
        time.sleep(0.01)


def mount() -> str:
    """The file system, as the kernel lists it."""
    os.makedirs(FOLDER, exist_ok=True)
    run("/bin/busybox", "mount", "-t", "ext4", "-o", "dax=always", device(), FOLDER)
    with open("/proc/mounts") as mounts:
        return next(line for line in mounts if f" {FOLDER} " in line)


class Redis:
    """A server with its socket and our connection to it. Source: redis.io, RESP protocol specification."""

    def __init__(self, name: str, *settings: str) -> None:
        path = f"/run/{name}.sock"
        words = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--enable-debug-command", "local"]
        self.process = subprocess.Popen([*words, *settings], stdout=subprocess.DEVNULL)
        connection, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + 60
        while connection.connect_ex(path):
            assert self.process.poll() is None and time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.01)
        self._stream = connection.makefile("rwb")
        while True:
            with contextlib.suppress(RuntimeError):  # it is loading what it has
                self.ask("DBSIZE")
                break

    def ask(self, *words: object) -> Any:
        """One command's answer. Raises RuntimeError with what the server says of an error."""
        self.send(*words)
        return self.answer()

    def send(self, *words: object) -> None:
        encoded = [str(word).encode() for word in words]
        self._stream.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in encoded))
        self._stream.flush()

    def answer(self) -> Any:
        kind, value = (line := self._stream.readline())[:1], line[1:-2].decode()
        if kind == b"-":
            raise RuntimeError(value)
        if kind in b"+":
            return value
        if kind == b":":
            return int(value)
        if kind == b"$":
            return None if value == "-1" else self._stream.read(int(value) + 2)[:-2].decode()
        return [self.answer() for _ in range(int(value))]

    def write(self, number: int, text: str) -> None:
        """One record, in one transaction."""
        for words in (("MULTI",), ("SET", f"record:{number}", text), ("RPUSH", "log", number)):
            self.ask(*words)
        assert self.ask("EXEC") == ["OK", number]

    def read(self) -> list[str]:
        """All records."""
        numbers = self.ask("LRANGE", "log", 0, -1)
        assert self.ask("DBSIZE") == len(numbers) + bool(numbers)
        return self.ask("MGET", *(f"record:{number}" for number in numbers)) if numbers else []


class Sqlite:
    """A database with its journal, in maps of which it writes and reads."""

    def __init__(self, name: str) -> None:
        self.connection = sqlite3.connect(f"{FOLDER}/{name}", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"mmap_size={64 << 20}"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute("CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, text TEXT NOT NULL)")

    def write(self, number: int, text: str) -> None:
        self.connection.execute("INSERT INTO records VALUES (?, ?)", (number, text))

    def read(self) -> list[str]:
        assert self.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [text for (text,) in self.connection.execute("SELECT text FROM records ORDER BY number")]


def verified(texts: list[str]) -> dict[str, int]:
    """How many records there are of each epoch; each is what the client wrote, and none is missing between two."""
    found: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        content, _, checksum = text.rpartition(" ")
        assert hashlib.sha256(f"{content} ".encode()).hexdigest() == checksum, (number, text)
        written_in, its_number, _ = content.split(" ", 2)
        assert int(its_number) == number, (number, text)
        found[written_in] = found.get(written_in, 0) + 1
    return found


def start_services() -> str:
    """After a boot; how the file system is mounted."""
    mounted = mount()
    kept = ("--dir", FOLDER, "--appendonly", "yes", "--appendfsync", "always")
    services.update(files=Redis("files", *kept), heap=Redis("heap"), sqlite=Sqlite("records"))
    return mounted


class Client(threading.Thread):
    """Writes without end, on from what is there; `epoch` may be changed meanwhile."""

    def __init__(self, epoch: str) -> None:
        super().__init__(daemon=True)
        self.epoch, self.written = epoch, 0
        self._counts = {name: len(each.read()) for name, each in services.items()}
        self._ending = False
        self.start()

    def run(self) -> None:
        while not self._ending:
            for name, each in services.items():
                number = self._counts[name] = self._counts[name] + 1
                text = f"{self.epoch} {number} " + "and so on " * 20
                each.write(number, text + hashlib.sha256(text.encode()).hexdigest())
            self.written = self._counts["sqlite"]
            time.sleep(0.005)  # for the host

    def end(self) -> None:
        """After a whole turn."""
        self._ending = True
        self.join()


def checked() -> dict[str, dict[str, int]]:
    """What each service has, verified."""
    return {name: verified(each.read()) for name, each in services.items()}


if "services" not in globals():
    services: dict[str, Any] = {}
