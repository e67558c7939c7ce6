"""The tools that are compared, as their users run them: whole commands, timed from outside.

Each has a folder of its own, made anew in each round, and the same three steps: `full` and `dirty` store an image,
`restore` writes the last one to a file. Every tool encrypts, and all but the pipe unlock with a passphrase.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bench import images

_PASSPHRASE = "a passphrase for measuring"


@dataclass(frozen=True, slots=True)
class Step:
    """One command: seconds from outside, processor seconds of all its processes, and what it says itself of the time
    from unlocked to committed."""

    wall: float
    processor: float
    own: float | None = None


class ToolError(Exception):
    """A command failed; the message has its last lines."""


class Tool(Protocol):
    """What a round asks of each tool."""

    name: str

    def begin(self, folder: Path) -> None:
        """An empty repository in a folder that does not exist."""

    def full(self, image: Path) -> Step:
        """Store an image, the first."""

    def unlock(self) -> Step:
        """The cheapest command that unlocks the repository."""

    def dirty(self, image: Path, ranges: Path) -> Step:
        """Store its successor; `ranges` says what differs, for who can use it."""

    def restore(self, target: Path) -> Step:
        """Write what was stored last into a folder that is empty; checks nothing."""

    def stored(self) -> int:
        """Bytes of the repository, more than it had when it was empty."""


def run(command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> tuple[Step, str]:
    """What it took, and standard output. Raises ToolError."""
    began, before = time.perf_counter(), _processor()
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, cwd=cwd, capture_output=True, text=True, check=False
    )
    step = Step(time.perf_counter() - began, _processor() - before)
    if done.returncode:
        raise ToolError(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-600:]}")
    return step, done.stdout


def _processor() -> float:
    """Processor seconds of all processes that were waited for so far."""
    times = os.times()
    return times.children_user + times.children_system


def content_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Perdure:
    """This checkout, by its installed command."""

    name = "perdure"

    def __init__(self) -> None:
        self.command = [str(Path(sys.executable).with_name("perdure"))]

    def begin(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.perdure("init")
        self.empty = content_bytes(folder / "repository")  # most of it is room that prune needs on a full disk

    def environment(self) -> dict[str, str]:
        """For commands on this tool's repository."""
        return {
            "PERDURE_REPOSITORY": str(self.folder / "repository"),
            "PERDURE_STATE_DIR": str(self.folder / "state"),
            "PERDURE_PASSWORD": _PASSPHRASE,
        }

    def perdure(self, *words: str) -> tuple[Step, str]:
        """Run one command; what it took and standard output."""
        return run([*self.command, *words], self.environment())

    def full(self, image: Path) -> Step:
        return self.load("vm", image)

    def load(self, *words: str | Path, image_name: str = "ram") -> Step:
        """`perdure import VM IMAGE [options]`."""
        vm, image, *options = map(str, words)
        step, out = self.perdure("import", vm, f"{image_name}={image}", "--json", *options)
        made = json.loads(out)
        self.last = f"{made['vm']}@{made['generation']}"
        return replace(step, own=float(made["seconds"]))

    def unlock(self) -> Step:
        return self.perdure("log")[0]

    def dirty(self, image: Path, ranges: Path) -> Step:
        return self.load("vm", image, "--parent", "vm@latest", "--dirty", f"ram={ranges}")

    def scan(self, image: Path) -> Step:
        """Another successor of the first image, without being told what differs."""
        return self.load("vm", image, "--parent", "vm@1")

    def restore(self, target: Path) -> Step:
        return self.perdure("export", self.last, "ram", str(target / "ram"))[0]

    def stored(self) -> int:
        return content_bytes(self.folder / "repository") - self.empty


class Restic:
    """restic with its defaults: repository version 2, zstd, chunks cut by content."""

    name = "restic"

    def begin(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._run("init", "--repository-version", "2")
        self.empty = content_bytes(folder / "repository")

    def full(self, image: Path) -> Step:
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        (source / "ram").unlink(missing_ok=True)
        os.link(image, source / "ram")
        return self._run("backup", str(source / "ram"))

    def unlock(self) -> Step:
        return self._run("cat", "config", "--no-lock")

    def dirty(self, image: Path, ranges: Path) -> Step:  # noqa: ARG002  # it can't use them
        return self.full(image)

    def restore(self, target: Path) -> Step:
        return self._run("restore", "latest", "--target", str(target))

    def stored(self) -> int:
        return content_bytes(self.folder / "repository") - self.empty

    def _run(self, *words: str) -> Step:
        environment = {"RESTIC_PASSWORD": _PASSPHRASE, "RESTIC_CACHE_DIR": str(self.folder / "cache")}
        return run(["restic", "-q", "-r", str(self.folder / "repository"), *words], environment)[0]


class Borg:
    """borg with zstd level 1; `fixed` cuts into 64 KiB, as its manual advises for disk images, else by content."""

    def __init__(self, fixed: bool) -> None:
        self._fixed = fixed
        self.name = "borg fixed 64k" if fixed else "borg"
        self._count = 0

    def begin(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        folder.mkdir()
        self._run("init", "-e", "repokey-blake2", str(folder / "repository"))
        self.empty = content_bytes(folder / "repository")

    def full(self, image: Path) -> Step:
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        (source / "ram").unlink(missing_ok=True)
        os.link(image, source / "ram")
        self._count += 1
        chunker = ["--chunker-params", "fixed,65536"] if self._fixed else []
        archive = f"{self.folder / 'repository'}::{self._count}"
        return self._run("create", "-C", "zstd,1", *chunker, archive, "ram", cwd=source)

    def unlock(self) -> Step:
        return self._run("list", str(self.folder / "repository"))

    def dirty(self, image: Path, ranges: Path) -> Step:  # noqa: ARG002  # it can't use them
        return self.full(image)

    def restore(self, target: Path) -> Step:
        return self._run("extract", f"{self.folder / 'repository'}::{self._count}", cwd=target)

    def stored(self) -> int:
        return content_bytes(self.folder / "repository") - self.empty

    def _run(self, *words: str, cwd: Path | None = None) -> Step:
        base = self.folder / "base"
        environment = {
            "BORG_PASSPHRASE": _PASSPHRASE,
            "BORG_BASE_DIR": str(base),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        return run(["borg", *words], environment, cwd)[0]


class Pipe:
    """`zstd -1 -T2 | openssl aes-256-ctr`: no deduplication, no history, no authentication. The limit to measure at."""

    name = "zstd | aes"
    _CIPHER = f"-aes-256-ctr -K {7:064d} -iv {7:032d}"

    def begin(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def full(self, image: Path) -> Step:
        return self._pipe(f"zstd -1 -T2 -c '{image}' | openssl enc {self._CIPHER} >'{self.folder / 'stored'}'")

    def unlock(self) -> Step:
        return Step(0.0, 0.0)

    def dirty(self, image: Path, ranges: Path) -> Step:  # noqa: ARG002  # it can't use them
        return self.full(image)

    def restore(self, target: Path) -> Step:
        return self._pipe(f"openssl enc -d {self._CIPHER} <'{self.folder / 'stored'}' | zstd -dc >'{target / 'ram'}'")

    def stored(self) -> int:
        return (self.folder / "stored").stat().st_size

    def _pipe(self, line: str) -> Step:
        return run(["bash", "-o", "pipefail", "-c", line])[0]


def restored_file(target: Path) -> Path:
    """The one file that a restore wrote."""
    return next(path for path in target.rglob("ram") if path.is_file())


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; compared by cmp(1)."""
    return subprocess.run(["cmp", "-s", str(one), str(other)], check=False).returncode == 0


__all__ = ["Borg", "Perdure", "Pipe", "Restic", "Step", "Tool", "ToolError", "images"]
