"""A VM as a user has it: a VM.toml, a repository, a real `perdure run` beside which the other commands are used.

Everything lies in one folder in tmpfs with a name of its own; `close` ends whatever has that folder among its
arguments, unmounts and removes it, also after a test that failed half-way. What the guest holds is asked of programs
in the guest (`guest`) and of `judge`, never of Perdure.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import judge
from guest_fixtures import load
from judge import Judge

ROOT = Path(__file__).resolve().parents[2]
client = load(ROOT / "tests" / "guest" / "client.py")
GuestShell, GuestGoneError = client.GuestShell, client.GuestGoneError

MIB = 1 << 20
PAGE = 4096
NAME = "demo"
MEMORY = 256 * MIB
REGION = 32 * MIB
"""Size of the only persistent region, pm0."""
APPEND = "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests no5lvl"
"""Kernel command line. The last two spare an emulated guest half a second of each boot."""
QUICK_APPEND = f"{APPEND} mitigations=off lsm="
"""That of tests, which is not that of benchmarks."""
CPU = "max,-erms"
"""Emulated, the kernel's copies are byte by byte where the processor says that these are fast."""
QEMU = Path(__file__).parent / "qemu"
"""The QEMU of the path, emulating in a way that makes later boots cost what the first does."""
KEY = bytes(range(64))
"""Content of the key file that unlocks; the same for all, since VMs of a test may share a repository."""
SECONDS = 120
"""For whatever is waited for: far more than anything takes, so that only what hangs fails."""


QUICK = f'cpu = "{CPU}"\nqemu = "{QEMU}"\n'
"""Both, as lines of VM.toml."""


class Image(Protocol):
    """The built test guest. It may have `append` too, the kernel's command line, and `settings`, lines of VM.toml."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Area:
    """A tagged range: guest-physical address, size, and offset in the region."""

    address: int
    size: int
    offset: int

    def of(self, content: bytes) -> bytes:
        """Its part of a region's content."""
        return content[self.offset : self.offset + self.size]


class Run:
    """One `perdure run`: its process and what it says, standard error included."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path) -> None:
        self.process = subprocess.Popen(
            words,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._pipe = self.process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self._read = 0
        self._open = True
        self.text = ""

    @property
    def alive(self) -> bool:
        """Whether the supervisor has not ended."""
        return self.process.poll() is None

    def expect(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Wait for it in what has been said since the last match."""
        deadline = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.text, self._read)) is None:
            assert self._open and time.monotonic() < deadline, f"no {pattern!r} in {self.text[self._read :]!r}"
            self._receive(deadline)
        self._read = found.end()
        return found

    def ended(self, seconds: float = SECONDS) -> int:
        """Wait until it, and every process that it made but QEMU, is gone; gives the exit status."""
        deadline = time.monotonic() + seconds
        status = self.process.wait(seconds)
        while self._open:
            assert time.monotonic() < deadline, f"a process of the supervisor is left over; it said {self.text!r}"
            self._receive(deadline)
        return status

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.alive:
            self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let go; the process has ended."""
        self._pipe.close()

    def look(self) -> None:
        """Take what has been said by now into `text`."""
        self._receive(0.0)

    def _receive(self, deadline: float) -> None:
        select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._pipe.fileno(), 1 << 16)
            self._open = bool(data)
            self.text += data.decode(errors="replace")


class Supervised:
    """A VM, its repository, and the commands that are used on it. `settings` are more lines of VM.toml, `policy` more
    of its policy, `extra` more arguments of QEMU; `repository` is elsewhere than beside it, if given; `memory` is
    in bytes. What unlocks is a key file, which costs nothing: a passphrase's second of Argon2id for every command is
    only for the test that is about one (`passphrase`)."""

    def __init__(
        self,
        image: Image,
        *,
        tracker: str = "auto",
        settings: str = "",
        policy: str = "",
        extra: tuple[str, ...] = (),
        repository: Path | None = None,
        memory: int = MEMORY,
        passphrase: str | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="p-", dir="/dev/shm"))
        self.state = self.folder / "state"
        self.kernel = image.kernel
        self.repository = repository or self.folder / "repository"
        self.judge = Judge(self.folder)
        self.guest = GuestShell(self.folder / "test.sock")
        self.runs: list[Run] = []
        unlocks = self.folder / ("key" if passphrase is None else "passphrase")
        unlocks.write_bytes(KEY if passphrase is None else f"{passphrase}\n".encode())
        (self.folder / "VM.toml").write_text(
            f"""\
name = "{NAME}"
memory = {memory}
accelerator = "tcg"
kernel = "{image.kernel}"
initrd = "{image.initrd}"
append = "{getattr(image, "append", APPEND)}"
extra = [
    "-qmp", "unix:{self.folder}/{judge.SOCKET},server=on,wait=off",
    "-chardev", "socket,id=test,path={self.folder}/test.sock,server=on,wait=off",
    "-device", '{{"driver":"virtserialport","chardev":"test","name":"org.perdure.test.0"}}',
    "-device", "pvpanic-pci",
    {"".join(f"{json.dumps(word)}, " for word in extra)}
]
{getattr(image, "settings", "")}{settings}
[[region]]
name = "pm0"
size = {REGION}
[policy]
tracker = "{tracker}"
{policy}
[hooks]
before_boot = ["{sys.executable}", "-IS", "{judge.__file__}", "{self.folder}"]
"""
        )
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),  # the code beside these tests, whatever is installed
            "PERDURE_STATE_DIR": str(self.state),
            "PERDURE_REPOSITORY": str(self.repository),
            "PERDURE_KEY_FILE" if passphrase is None else "PERDURE_PASSWORD_FILE": str(unlocks),
        }
        self.run_environment: dict[str, str] = {}
        """What only supervisors have of it."""
        self.perdure("init")

    # The commands

    def start(self, *words: str) -> Run:
        """`perdure run`, begun; nothing is waited for."""
        command = [sys.executable, "-m", "perdure", "run", str(self.folder / "VM.toml"), *words]
        self.runs.append(Run(command, self.environment | self.run_environment, self.folder))
        return self.runs[-1]

    def boot(self, *words: str) -> Run:
        """`perdure run` until the guest is up, whether that is launched or taken over."""
        run = self.start(*words)
        run.expect(r"tracker:? ")
        self.guest.wait_ready(SECONDS)
        return run

    def perdure(self, *words: object, code: int = 0) -> Any:
        """Any other command; its JSON document."""
        done = self.tried(*words, "--json")
        assert done.returncode == code, (words, done.returncode, done.stderr)
        return json.loads(done.stdout) if done.stdout else None

    def lines(self, *words: object) -> list[str]:
        """Any other command; what it prints for people."""
        done = self.tried(*words)
        assert done.returncode == 0, (words, done.returncode, done.stderr)
        return done.stdout.decode().splitlines()

    def refused(self, *words: object, code: int = 1) -> str:
        """A command that does not do what it is told; the one line that says why."""
        done = self.tried(*words)
        lines = done.stderr.decode().splitlines()
        assert (done.returncode, done.stdout, len(lines)) == (code, b"", 1), (words, done)
        return lines[0]

    def tried(self, *words: object) -> subprocess.CompletedProcess[bytes]:
        """A command as it ended, however that was."""
        return subprocess.run(
            [sys.executable, "-m", "perdure", *map(str, words)],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )

    @contextlib.contextmanager
    def beside(self, *words: object) -> Iterator[None]:
        """A command that works while the block does, and whose end is waited for; what it says is not of interest."""
        command = [sys.executable, "-m", "perdure", *map(str, words)]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                yield
                process.wait(SECONDS)
            finally:
                process.kill()

    @property
    def run(self) -> Run:
        """The supervisor that was started last."""
        return self.runs[-1]

    def status(self) -> Any:
        """`perdure status demo`."""
        return self.perdure("status", NAME)

    def log(self) -> list[Any]:
        """All generations, oldest first."""
        found: list[Any] = self.perdure("log", NAME)["generations"]
        return found

    def export(self, number: int | str = "latest") -> bytes:
        """Region pm0 of a generation."""
        path = self.folder / "export"
        self.perdure("export", f"{NAME}@{number}", "pm0", path)
        content = path.read_bytes()
        path.unlink()
        return content

    def area(self, name: str) -> Area:
        """A tagged range by its name, from what the host lists."""
        listed = self.perdure("regions", NAME)["regions"]
        start = next(each["address"] for each in listed if each["class"] == "reserved")
        [found] = [each for each in listed if each["name"] == name]
        return Area(found["address"], found["size"], found["address"] - start)

    # The judge

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[str, mmap.mmap]]:
        """All of the guest's memory as it is now, by region."""
        target = self.folder / "dump"
        self.judge.save(target)
        try:
            with _mapped(target) as content:
                yield content
        finally:
            shutil.rmtree(target)

    @contextlib.contextmanager
    def before_boot(self) -> Iterator[dict[str, mmap.mmap]]:
        """All of the guest's memory as the hook found it before the last boot's first instruction (`judge_boots`)."""
        [target] = (self.folder / judge.BOOTS).iterdir()
        with _mapped(target) as content:
            yield content

    @property
    def boots(self) -> int:
        """How many times the hook has saved memory."""
        return max((int(each.name) for each in (self.folder / judge.BOOTS).glob("*")), default=0)

    def tell_hook(self, what: str) -> None:
        """What the hook does at the next boot, once; see judge.py."""
        (self.folder / judge.HOOK).write_text(what)

    def momentous(self) -> None:
        """To supervisors that are started from now on something can be made to happen (moments/sitecustomize.py)."""
        moments = Path(__file__).parent / "moments"
        self.run_environment = {
            "PYTHONPATH": f"{moments}:{self.environment['PYTHONPATH']}",
            "PERDURE_TEST_MOMENTS": str(self.folder),
        }

    def at(self, command: str, script: str) -> None:
        """Have a shell script run, once, before the supervisor gives QEMU that command."""
        (self.folder / "armed").write_text(f"{command}\n{script}")

    def killed_at(self, command: str, *words: object) -> None:
        """`perdure WORDS`, whose supervisor is killed before it gives QEMU a command."""
        self.at(command, "kill -KILL $PPID")
        assert "supervisor" in self.refused(*words)
        assert self.run.ended() == -signal.SIGKILL
        assert not (self.folder / "armed").exists()

    def judge_boots(self) -> None:
        """From now on, the hook saves memory for `before_boot`."""
        (self.folder / judge.BOOTS).mkdir(exist_ok=True)

    # What happens to VMs

    @property
    def runtime(self) -> Path:
        """The VM's runtime folder."""
        return self.state / "run" / NAME

    @property
    def baseline(self) -> str | None:
        """Generation since which tracking of pm0 has found every write, by its journal; None if that is not known."""
        return self.baseline_of("pm0")

    def baseline_of(self, region: str) -> str | None:
        """The same for any region."""
        noted = json.loads((self.runtime / "journal.json").read_text())
        return None if region in noted["collecting"] else noted["baselines"].get(region)

    def kill_qemu(self) -> None:
        """SIGKILL."""
        pids = [pid for pid, words in self._processes() if "qemu" in words[0]]
        assert len(pids) == 1, pids
        pidfd = os.pidfd_open(pids[0])
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], SECONDS)[0]
        os.close(pidfd)

    def lose_power(self) -> None:
        """What the host loses with it: all processes, everything in memory. Durable state and the repository stay."""
        self.run.kill()
        self.kill_qemu()
        self._unmount()
        shutil.rmtree(self.runtime.parent)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that nobody reports."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"it never came: {what}"
            time.sleep(0.02)  # between two looks

    def report(self) -> str:
        """What the supervisors said and the end of what the guest wrote, for whoever reads of a failure."""
        self.run.look()
        return "\n".join([*(run.text for run in self.runs), "console:", self.console[-4000:]])

    @property
    def console(self) -> str:
        """What the guest has written."""
        path = self.runtime / "console.log"
        return path.read_text(errors="replace") if path.exists() else "(gone)"

    def healthy(self) -> bool:
        """Whether there is a supervisor, and a guest that answers."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if self.runs and self.run.alive and self.status()["state"] == "running":
                self.guest.wait_ready(20)
                return bool(self.guest.run("6 * 7", 20) == 42)
        return False

    def close(self) -> None:
        """End everything and leave nothing. Raises AssertionError if a supervisor had shown a traceback."""
        self.guest.close()
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.until(lambda: not self._processes(), "the end of all processes")
        for run in self.runs:
            with contextlib.suppress(AssertionError):
                run.ended()
            run.close()
        self._unmount()
        shutil.rmtree(self.folder)
        said = "\n".join(run.text for run in self.runs)
        assert "Traceback" not in said, said

    def _processes(self) -> list[tuple[int, list[str]]]:
        """Those with our folder among their arguments, this test and what has ended excluded."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(str(self.folder) in word for word in words) and int(entry.name) != os.getpid():
                    found.append((int(entry.name), words))
        return found

    def _unmount(self) -> None:
        """All of ours. The kernel's list of mounts may lack one while others are mounted and unmounted beside us."""
        listed = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        found = [path for path in listed if path.startswith(f"{self.folder}/")]
        for each in self.state.glob("run/*/memory"):
            if each.is_mount() and str(each) not in found:
                found.append(str(each))
        for path in found:
            subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def _mapped(folder: Path) -> Iterator[dict[str, mmap.mmap]]:
    with contextlib.ExitStack() as stack:
        content = {}
        for path in folder.iterdir():
            with path.open("rb") as file:
                content[path.name] = stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        yield content
