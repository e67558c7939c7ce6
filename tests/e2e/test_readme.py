"""What README.md says is so: its walk-through is run word for word with the real guest, and gives the output shown.

Compared are whole lines, after ids, times, sizes, pids and what depends on the host were made the same. Commands that
only look at a file are repeated until they show what they should: that is how a reader waits for the guest, too.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_fixtures import guest as perdure_guest
from supervised import Image

from base import errors
from perdure import cli
from vm import config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PLACE = "/tmp/walk"
"""Where a reader works; the test has a folder of its own instead."""
LOOKS = ("cat ", "grep ", "tail ")
SECONDS = 120
"""For whatever is waited for: far more than anything takes, so that only what hangs fails."""
SAME = (
    (r"\b[0-9a-f]{12,64}\b", "ID"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
    (r'"seconds":[\d.]+', '"seconds":N'),
    (r"\bclock is set back\b", "clock is set on"),  # a guest's own clock may run faster on a busy host
    (r"\b[\d.]+ (m?s|B)\b", r"N \1"),
    (r"\b[\d.]+ [KMGT]iB\b", "N SIZE"),
    (r"\b\d+ (packs|chunks)\b", r"N \1"),
    (r"\bpid \d+", "pid N"),
    (r"\(pid N, (tcg|kvm)\)", "(pid N, ACCELERATOR)"),
    (r"tracker: .*", "tracker: CHOICE"),
    (r"[ ]+", " "),  # columns are as wide as their widest cell
)


def section(title: str) -> str:
    """A chapter of README.md."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Its code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines that it should print) of all console blocks."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(text, "console")).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def normal(line: str) -> str:
    """The line, without what differs from one run to the next."""
    for pattern, replacement in SAME:
        line = re.sub(pattern, replacement, line)
    return line.strip()


class Shell:
    """One bash, as a reader has it, in the clone; what belongs to it is known by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bash = subprocess.Popen(
            ["bash"],
            cwd=ROOT,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, command: str) -> tuple[list[str], int]:
        """A command; the lines that it prints, and its status. The walk-through's place is the test's folder."""
        mark = uuid.uuid4().hex
        assert self._bash.stdin is not None
        command = command.replace(PLACE, str(self.folder))
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null\necho {mark} $?\n".encode())
        self._bash.stdin.flush()
        said, status = self._read_until(mark)
        return said.replace(str(self.folder), PLACE).splitlines(), status

    def expect(self, command: str, output: list[str]) -> None:
        """A command, what it should print, and that it succeeds."""
        deadline = time.monotonic() + SECONDS
        wanted = [normal(line) for line in output], 0
        while True:
            lines, status = self.run(command)
            found = [normal(line) for line in lines], status
            if found == wanted:
                return
            if not command.startswith(LOOKS) or time.monotonic() > deadline:
                break
            time.sleep(0.1)  # between two looks
        assert found == wanted, f"$ {command}"

    def close(self) -> None:
        """End everything and leave nothing."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        deadline = time.monotonic() + SECONDS
        while left := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]:
            assert time.monotonic() < deadline, f"processes do not end: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._bash.kill()
        self._bash.wait()
        self._bash.stdin.close()
        self._bash.stdout.close()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if (path := line.split()[4]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", path], check=True)
        shutil.rmtree(self.folder)

    def _owns(self, pid: int) -> bool:
        """Whether it has our folder in its arguments or its environment, and has not ended."""
        with contextlib.suppress(OSError):
            place = os.fsencode(self.folder)
            return any(place in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        return False

    def _read_until(self, mark: str) -> tuple[str, int]:
        assert self._bash.stdout is not None
        said, deadline = b"", time.monotonic() + SECONDS
        while not (match := re.search(rb"^%s (\d+)\n" % mark.encode(), said, re.MULTILINE)):
            ready = select.select([self._bash.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(self._bash.stdout.fileno(), 1 << 16) if ready else b""
            assert data, f"no end of {said.decode(errors='replace')!r}"
            said += data
        return said[: match.start()].decode(errors="replace"), int(match[1])


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A shell, and nothing of it afterwards."""
    made = Shell(Path(tempfile.mkdtemp(prefix="w-", dir="/dev/shm")))
    yield made
    made.close()


@pytest.mark.qemu
def test_the_walk_through_gives_what_it_shows(guest_image: Image, shell: Shell) -> None:
    assert guest_image.kernel.exists()
    text = section("A first walk-through")
    [description] = blocks(text, "toml")
    steps = commands(text)
    assert len(steps) > 15
    for command, output in steps:
        if command.startswith("source "):
            command = f"export PATH={Path(sys.executable).parent}:$PATH"  # the environment that runs the tests
        if command.startswith("perdure run "):
            (shell.folder / "VM.toml").write_text(description)
        shell.expect(command, output)


def test_the_description_of_another_guest_is_one(tmp_path: Path) -> None:
    [text] = blocks(section("A guest of your own"), "toml")
    (tmp_path / "VM.toml").write_text(text)
    (tmp_path / "debian.qcow2").touch()
    found = config.load(tmp_path / "VM.toml", host_memory=16 << 30)
    assert (found.name, found.regions[0].name, found.disks[0].format) == ("web", "cache", "qcow2")


def test_the_program_of_a_guest_uses_what_there_is() -> None:
    [text] = blocks(section("A guest of your own"), "python")
    used = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    assert used
    for each in used:
        assert callable(getattr(perdure_guest, each.attr))
    for path in re.findall(r"guest/[\w.-]+", section("A guest of your own")):
        assert (ROOT / path).is_file()


def test_exit_codes_and_environment_are_those_of_the_command() -> None:
    text = section("Exit codes and environment")
    help_text = cli.parser().format_help()
    shown = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    listed = " ".join(help_text.partition("exit codes:")[2].split())
    assert "; ".join(f"{code} {meaning}" for code, meaning in shown) == listed
    families = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {int(code) for code, _ in shown} >= {each.exit_code for each in families if hasattr(each, "exit_code")}
    assert set(re.findall(r"PERDURE_\w+", text)) == set(re.findall(r"PERDURE_\w+", help_text))
