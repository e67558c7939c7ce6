"""A VM with much in its memory that is resumed again and again: Perdure's ways beside QEMU's own, by one heartbeat.

A program in the guest counts in persistent memory, each millisecond or so; the host reads the number out of the backing
file with pread, which allocates nothing there, by its own clock. The first number beyond that of the instant is the
first heartbeat. QEMU's own ways get the same command line, in a folder of their own: `-incoming` from a file with all
of the memory in it, and `-loadvm` from a qcow2 image.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("tests", "tests/e2e", "tests/guest")]

from supervised import MEMORY, NAME, GuestShell, Judge, Supervised  # noqa: E402  the tests' way to have a VM
from supervised import judge as judge_program  # noqa: E402
from test_survival import IN_GUEST  # noqa: E402

from perdure.control import call  # noqa: E402
from restore import claims as record  # noqa: E402
from restore.claims import Claims  # noqa: E402

PAGE = 4096
SECONDS = 300
_LOOK_SECONDS = 0.0002
_PAGES_BETWEEN = 3000
"""That the guest has looked at between two generations."""
WORKLOAD = """
import os, struct, sys, time

beats = area("beats", 4096).cast("Q")

def beat():
    beats[0] += 1
    time.sleep(0.001)

def fill(mib):
    "Memory in use: what files of this system hold, a number in front of each page, so that no two are equal."
    global ballast
    text = b"".join(
        open(os.path.join(folder, name), "rb").read()
        for folder, _, names in os.walk("/usr/lib") for name in sorted(names)
        if not os.path.islink(os.path.join(folder, name))
    )[: 16 << 20]
    text = text[: len(text) >> 20 << 20]
    ballast = mmap.mmap(-1, mib << 20)
    for at in range(0, mib << 20, 1 << 20):
        from_ = at % len(text)
        ballast[at : at + (1 << 20)] = text[from_ : from_ + (1 << 20)]
    words = memoryview(ballast).cast("Q")
    for page in range(mib << 8):
        words[page << 9] = page + 1
    return len(text)

def answer(pages, seed):
    "What a server does for one request: looks at pages here and there, and checks each."
    words, some = memoryview(ballast).cast("Q"), random.Random(seed)
    for _ in range(pages):
        page = some.randrange(len(words) >> 9)
        assert words[page << 9] == page + 1, page
    return pages
"""


class Guest:
    """The test guest's image, which scripts/build-guest has made."""

    kernel = ROOT / ".cache" / "guest" / "vmlinuz"
    initrd = ROOT / ".cache" / "guest" / "initrd.img"


@dataclass(frozen=True, slots=True)
class Resume:
    """One resume. Milliseconds from the request to the first heartbeat, and to an answered request; faults and their
    latencies in microseconds where it was lazy, prefetched bytes."""

    beat_ms: float
    answer_ms: float
    faults: int = 0
    fault_us_p50: float = 0.0
    fault_us_p99: float = 0.0
    prefetched_bytes: int = 0


class Bench:
    """One VM of some size with half of its memory in use, and a full generation of it; `folder` is on a disk."""

    def __init__(self, folder: Path, memory_mib: int, used_mib: int, pages: int) -> None:
        self.folder, self.memory_mib, self.pages = folder, memory_mib, pages
        folder.mkdir()
        self.vm = Supervised(Guest(), repository=folder / "repository")
        described = self.vm.folder / "VM.toml"
        text = described.read_text().replace(f"memory = {MEMORY}", f"memory = {memory_mib << 20}")
        described.write_text(re.sub(r"\[hooks\].*", "", text, flags=re.DOTALL))
        self.vm.boot()
        self.vm.guest.run(IN_GUEST + WORKLOAD, SECONDS)
        self.vm.guest.run(f"fill({used_mib})", SECONDS)
        self.vm.guest.run("work(beat)")
        self.area = self.vm.area("beats")
        self._capture()

    def close(self) -> None:
        """End the VM and leave nothing."""
        self.vm.close()
        shutil.rmtree(self.folder)

    def go_further(self, seed: int) -> None:
        """From now on a newer generation is resumed, of the guest after it has answered some other requests."""
        self._settle()
        self.vm.guest.run(f"answer({_PAGES_BETWEEN}, {seed})", SECONDS)
        self._capture()

    def roll_back(self, *, lazy: bool, fresh: bool = False) -> Resume:
        """A request to the supervisor, which has its repository unlocked. `fresh`: of a content that this host has
        never resumed, so that nothing is known of what it touches first."""
        self._settle()
        for found in self.vm.state.rglob("working-sets") if fresh else ():
            shutil.rmtree(found)
        [old] = [each.name for each in self.vm.runtime.glob("memory*")]
        backing = self.vm.runtime / ("memory-2" if old == "memory" else "memory") / "pm0.memory"
        wanted = {"point": self.point, "discard": True, "lazy": lazy, "eager": not lazy}
        with _ended_thread(lambda: call(self.vm.runtime / "control.sock", "rollback", wanted)) as began:
            return self._watched(began, backing, self.vm.runtime / "test.none", lazy=lazy)

    def cold(self, *, lazy: bool) -> Resume:
        """A whole `perdure run`, its start and the unlocking included; milliseconds from its start."""
        self.vm.perdure("stop", NAME)
        self.vm.run.ended()
        drop_caches()
        backing = self.vm.runtime / "memory" / "pm0.memory"
        began = time.perf_counter()
        self.vm.start("--from", self.point, "--lazy" if lazy else "--eager")
        return self._watched(began, backing, self.vm.runtime, lazy=lazy)

    def whole(self) -> None:
        """Wait until all memory is there."""
        self.vm.until(lambda: self.vm.status().get("lazy") is None, "all of its memory is there")

    def _capture(self) -> None:
        made = self.vm.perdure("snapshot", NAME, "--full")
        self.point = f"{NAME}@{made['generation']}"
        self.snapshot_seconds, self.pause_ms = made["seconds"], made["pause_ms"]
        self.count = self._count_of(self.vm.export(made["generation"]))

    def _settle(self) -> None:
        self.vm.until(lambda: self.vm.status()["state"] == "running", "the VM runs")
        self.whole()
        drop_caches()

    def _watched(self, began: float, backing: Path, _: Path, *, lazy: bool) -> Resume:
        beat = first_beat(backing, self.area.offset, self.count)
        self.vm.guest.close()
        self.vm.guest.wait_ready(SECONDS)
        self.vm.guest.run(f"answer({self.pages}, 1)", SECONDS)
        answered = time.perf_counter()
        facts = {}
        if lazy and (claims := Claims.find(backing.parent)) is not None:
            with claims:
                facts = {
                    "faults": claims.word(record.FAULTS),
                    "fault_us_p50": claims.latency(0.5),
                    "fault_us_p99": claims.latency(0.99),
                    "prefetched_bytes": claims.word(record.PREFETCHED) * PAGE,
                }
        return Resume((beat - began) * 1e3, (answered - began) * 1e3, **facts)

    def _count_of(self, content: bytes) -> int:
        return int(struct.unpack_from("<Q", content, self.area.offset)[0])


class Peer:
    """QEMU's own ways for the same VM at an instant of now. Its files are in `folder`, its memory in tmpfs."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.state = bench, bench.folder / "qemu.state"
        self.image = bench.folder / "qemu.qcow2"
        self.place = bench.vm.folder / "peer"
        self.place.mkdir()
        bench.vm.guest.close()
        record_ = json.loads((bench.vm.runtime / "qemu.json").read_bytes())
        self.argv = self._argv(list(record_["argv"]))
        self._save()
        self._make_image()

    def incoming(self) -> Resume:
        """`-incoming` from a file."""
        return self._resume("-incoming", f"exec:cat {self.state}")

    def loadvm(self) -> Resume:
        """`-loadvm` from an image."""
        return self._resume("-loadvm", "point")

    def _argv(self, argv: list[str]) -> list[str]:
        """The VM's own, every path in a folder of this peer, without Perdure's own monitors."""
        runtime, folder = str(self.bench.vm.runtime), str(self.bench.vm.folder)
        words = [re.sub(rf"{re.escape(runtime)}/memory(-2)?/", f"{self.place}/", word) for word in argv]
        words = [word.replace(runtime, str(self.place)) for word in words]
        for socket_ in ("test.sock", judge_program.SOCKET):
            words = [word.replace(f"{folder}/{socket_}", f"{self.place}/{socket_}") for word in words]
        if "-incoming" in words:
            at = words.index("-incoming")
            del words[at : at + 2]
        words.remove("-S")
        return [*words, "-drive", f"if=none,id=points,format=qcow2,file={self.image}"]

    def _save(self) -> None:
        """All of the VM's memory and devices into a file, by a migration to a socket; the VM goes on."""
        judge, path = self.bench.vm.judge, str(self.bench.vm.folder / "migrate.sock")
        with socket.socket(socket.AF_UNIX) as listener, self.state.open("wb") as file:
            listener.bind(path)
            listener.listen(1)
            judge.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            judge.execute("migrate", uri=f"unix:{path}")
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 20):
                    file.write(data)
            while judge.execute("query-migrate")["status"] == "active":
                time.sleep(0.01)
            assert judge.execute("query-migrate")["status"] == "completed"
            name = next(self.bench.vm.runtime.glob("memory*/pm0.memory"))
            self.count = beat_of(name, self.bench.area.offset)
            judge.execute("cont")  # it is in postmigrate
        os.sync()

    def _make_image(self) -> None:
        size = self.bench.memory_mib + 64
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(self.image), f"{size}M"], check=True)
        process = self._start("-incoming", f"exec:cat {self.state}", "-S")
        judge = Judge(self.place)
        self._paused(judge)
        said = judge.execute("human-monitor-command", **{"command-line": "savevm point"})
        assert not said, said
        self._end(process)
        os.sync()

    def _paused(self, judge: Judge) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                if judge.execute("query-status")["status"] == "paused":
                    return
            assert time.monotonic() < deadline, "QEMU does not load its state"
            time.sleep(0.001)

    def _resume(self, *words: str) -> Resume:
        drop_caches()
        began = time.perf_counter()
        process = self._start(*words)
        try:
            beat = first_beat(self.place / "pm0.memory", self.bench.area.offset, self.count)
            with GuestShell(self.place / "test.sock") as guest:
                guest.wait_ready(SECONDS)
                guest.run(f"answer({self.bench.pages}, 1)", SECONDS)
                answered = time.perf_counter()
        finally:
            self._end(process)
        return Resume((beat - began) * 1e3, (answered - began) * 1e3)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        for name in ("events.in", "events.out"):
            (self.place / name).unlink(missing_ok=True)
        for word in self.argv:
            found = re.match(r"pipe,id=journal,path=(.*)$", word)
            if found:
                Path(found[1] + ".in").unlink(missing_ok=True)
                os.mkfifo(found[1] + ".in")
                Path(found[1] + ".out").touch()
        return subprocess.Popen([*self.argv, *words], stdin=subprocess.DEVNULL, cwd="/")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for path in self.place.glob("*.memory"):
            path.unlink()


def beat_of(path: Path, offset: int) -> int:
    """The number in a backing file now; 0 where there is no page or no file. Source: tmpfs allocates nothing for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        return int(struct.unpack("<Q", os.pread(descriptor, 8, offset).ljust(8, b"\0"))[0])
    finally:
        os.close(descriptor)


def first_beat(path: Path, offset: int, count: int) -> float:
    """When the number is beyond `count`, by this process's performance counter."""
    deadline = time.perf_counter() + SECONDS
    while beat_of(path, offset) <= count:
        assert time.perf_counter() < deadline, f"no heartbeat in {path}"
        time.sleep(_LOOK_SECONDS)
    return time.perf_counter()


def drop_caches() -> bool:
    """Let the kernel forget what files hold, where that is allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _ended_thread(work: Any) -> Iterator[float]:
    """Blocking work in a thread that has ended when the block has; gives when it began. Its error is raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised by who waits
            failed.append(error)

    thread = threading.Thread(target=run)
    began = time.perf_counter()
    thread.start()
    try:
        yield began
    finally:
        thread.join()
        if failed:
            raise failed[0]


def kill(pid: int) -> None:
    """SIGKILL, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
