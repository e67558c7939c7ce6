"""The demo's stage: a repository, a VM.toml, the command `perdure`, and what the guest says on its console.

Everything lies in two folders with names of their own, one on a disk and one on a tmpfs. `set_up` ends, by pid, every
process that has one of them among its arguments, unmounts, and removes both, however it is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demo_judge
from demo_judge import REGION, ROOT, SOCKET, Seen

NAME = "demo"
SECONDS = 600
"""For whatever is waited for: far more than anything takes, so that only what hangs fails."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CAP_SYS_ADMIN = 21
_DESCRIPTION = """\
name = "{name}"
memory = "512MiB"
kernel = "{root}/.cache/guest/vmlinuz"
initrd = "{root}/.cache/guest/initrd.img"
append = "console=ttyS0 quiet panic=-1 no_timer_check perdure.exec=demo-program perdure.reboots=1 perdure.secret={seed}"
extra = ["-qmp", "unix:{dumps}/{socket},server=on,wait=off"]

[[region]]
name = "{region}"
size = "64MiB"

[hooks]
before_boot = ["{python}", "-IS", "{judge}", "{dumps}"]
"""


class NotHeldError(Exception):
    """Something that the demo shows is not so."""


class Stage:
    """Made by `set_up`. `run` is the `perdure run` that was started last."""

    def __init__(self, folder: Path, dumps: Path) -> None:
        self.folder, self.dumps = folder, dumps
        self.repository = folder / "repository"
        self.runtime = folder / "state" / "run" / NAME
        self.run: subprocess.Popen[bytes] | None = None
        self._heard = 0  # bytes of the console that were looked at
        seed = secrets.token_hex(16)
        demo_judge.tell_seed(dumps, seed)
        (folder / "passphrase").write_text("correct horse battery staple\n")
        (folder / "VM.toml").write_text(
            _DESCRIPTION.format(
                name=NAME,
                root=ROOT,
                seed=seed,
                dumps=dumps,
                socket=SOCKET,
                region=REGION,
                python=sys.executable,
                judge=demo_judge.__file__,
            )
        )

    # The command

    def perdure(self, *words: str, code: int = 0, repository: Path | None = None) -> Any:
        """A command; its JSON document. Raises NotHeldError if it ends with another code."""
        done = self.command(*words, "--json", repository=repository)
        if done.returncode != code:
            says = done.stderr.decode(errors="replace").strip()
            raise NotHeldError(f"perdure {' '.join(words)} ended with {done.returncode}, not {code}: {says}")
        return json.loads(done.stdout) if done.stdout else None

    def command(self, *words: str, repository: Path | None = None) -> subprocess.CompletedProcess[bytes]:
        """A command as it is. On another repository than ours it has a local state of its own, as on another host."""
        return subprocess.run(
            ["perdure", *words],
            env=self._environment(repository),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )

    def start(self) -> None:
        """`perdure run`, begun."""
        with (self.folder / "run.log").open("ab") as log:
            self.run = subprocess.Popen(
                ["perdure", "run", str(self.folder / "VM.toml")],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> int:
        """Wait for the end of `perdure run`; its exit code."""
        assert self.run is not None
        return self.run.wait(SECONDS)

    def run_said(self, pattern: str) -> list[Any]:
        """All matches in what every `perdure run` said."""
        return re.findall(pattern, (self.folder / "run.log").read_text(), re.MULTILINE)

    def _environment(self, repository: Path | None = None) -> dict[str, str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("PERDURE_")}
        return others | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PERDURE_REPOSITORY": str(repository or self.repository),
            "PERDURE_PASSWORD_FILE": str(self.folder / "passphrase"),
            "PERDURE_STATE_DIR": f"{repository}-state" if repository else str(self.folder / "state"),
        }

    # The guest

    def guest(self) -> dict[str, dict[str, Any]]:
        """Wait until its program idles; what it has said since it last did, by event, `at` being when it was heard.

        Raises NotHeldError if the guest found damage, or `perdure run` ended, or it takes too long.
        """
        said: dict[str, dict[str, Any]] = {}

        def idle() -> bool:
            for event in self._events():
                if event["event"] == "damaged":
                    raise NotHeldError(f"the guest found page {event['page']} damaged at counter {event['counter']}")
                said[event["event"]] = event
            return "idle" in said

        self._until(idle, "the guest's program")
        return said

    def seen_before_boot(self) -> Seen:
        """By the judge, before the last boot's first instruction."""
        return demo_judge.last_seen(self.dumps)

    def seen_now(self) -> Seen:
        """By the judge, while the guest runs."""
        [backing] = self.runtime.glob("memory*")
        return demo_judge.look(self.dumps, backing)

    def _events(self) -> Iterator[dict[str, Any]]:
        """What the guest's program has said, in whole lines that were not looked at."""
        with contextlib.suppress(FileNotFoundError):
            new = (self.runtime / "console.log").read_bytes()[self._heard :]
            whole = new[: new.rfind(b"\n") + 1]
            self._heard += len(whole)
            for line in re.findall(rb"PERDURE-DEMO (\{.*\})", whole):
                yield {**json.loads(line), "at": time.monotonic()}

    def _until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.run is None or self.run.poll() is not None:
                raise NotHeldError(f"waited for {what}, but perdure run has ended")
            if time.monotonic() > deadline:
                raise NotHeldError(f"waited {SECONDS} s for {what}")
            time.sleep(0.02)  # between two looks

    # What happens to hosts

    def lose_power(self) -> int:
        """What a host loses: every process, and all memory; what is on disks stays. Gives how many backing files."""
        lost = len(list(self.runtime.glob("memory*/*.memory")))
        self.clear()
        shutil.rmtree(self.runtime.parent)
        self.run, self._heard = None, 0
        return lost

    def clear(self) -> None:
        """SIGKILL to every process of ours, all at once, and unmount what they had mounted."""
        while processes := list(self._processes()):
            for each in processes:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(each, signal.SIGKILL)
            for each in processes:
                select.select([each], [], [], SECONDS)
                os.close(each)
        if self.run is not None:
            self.run.wait()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if (path := line.split()[4]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", path], check=True)

    def last_words(self) -> str:
        """For whoever looks for the reason of a failure."""
        found = []
        for path in (self.folder / "run.log", self.runtime / "qemu.log", self.runtime / "console.log"):
            if path.exists():
                found += [f"--- the end of {path.name}", *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(found)

    def _processes(self) -> Iterator[int]:
        """A pidfd of each; what has ended has no arguments any more."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                process = os.pidfd_open(int(entry.name))
                arguments = (entry / "cmdline").read_bytes()  # of that process: its pid is taken as long as it is there
                if any(os.fsencode(each) in arguments for each in (self.folder, self.dumps)):
                    yield process
                else:
                    os.close(process)


@contextlib.contextmanager
def set_up() -> Iterator[Stage]:
    """A stage, and nothing of it afterwards."""
    # Whoever may not mount a tmpfs for a VM's memory needs a runtime folder that is on one.
    disk = "/tmp" if _may_mount() else "/dev/shm"
    with (
        tempfile.TemporaryDirectory(prefix="pd-", dir=disk) as folder,
        tempfile.TemporaryDirectory(prefix="pd-", dir="/dev/shm") as dumps,
    ):
        stage = Stage(Path(folder), Path(dumps))
        try:
            yield stage
        finally:
            for number in SIGNALS:  # a second Ctrl-C would leave half of it
                signal.signal(number, signal.SIG_IGN)
            stage.clear()


def _may_mount() -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(match and int(match[1], 16) >> _CAP_SYS_ADMIN & 1)
