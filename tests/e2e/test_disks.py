"""Disks by what the guest has written since the last generation, end to end on real QEMU.

Judged by qemu-img: each disk of a generation is compared with what qemu-img reads of the image while somebody else has
the VM stopped, and the guest writes at random before and after, also while the capture reads.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from supervised import MIB, NAME, Image, Supervised
from test_survival import boot

pytestmark = pytest.mark.qemu

CHUNK = 64 << 10
WRITERS = """
import glob, random

def writer(path):
    with open(f"/sys/block/{path[5:]}/ro") as file:
        if file.read().strip() == "1":
            return
    disk = os.open(path, os.O_RDWR | os.O_DSYNC)
    size, some = os.lseek(disk, 0, os.SEEK_END), random.Random(path)
    counts[path] = 0

    def write():
        length = some.choice([512, 4096, 8192, 70000])
        os.pwrite(disk, some.choice([bytes, some.randbytes])(length), some.randrange(size // 3 - length))
        counts[path] += 1
        time.sleep(0.001)

    work(write)

import time
if not workers:
    counts = {}
    for path in sorted(glob.glob("/dev/vd?")):
        writer(path)
"""
"""Writes without end into the first third of each disk."""


def image(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


class DiskVM(Supervised):
    """A VM whose disks are described by name: format, and more lines of VM.toml."""

    def __init__(self, guest: Image, disks: Mapping[str, str]) -> None:
        super().__init__(guest)
        self.plain = (self.folder / "VM.toml").read_text()
        self.describe(disks)

    def describe(self, disks: Mapping[str, str]) -> None:
        """Give the VM these disks, at its next launch."""
        self.disks = dict(disks)
        tables = [f'[[disk]]\nname = "{name}"\nfile = "{name}"\n{more}\n' for name, more in disks.items()]
        (self.folder / "VM.toml").write_text(self.plain.replace("[[region]]", "".join(tables) + "[[region]]"))

    def format(self, name: str) -> str:
        return "qcow2" if "qcow2" in self.disks[name] else "raw"

    @property
    def written(self) -> list[str]:
        """Disks that are captured."""
        return [name for name, more in self.disks.items() if "readonly" not in more]

    def begin(self, *words: str) -> None:
        """`perdure run`, until the guest writes."""
        boot(self, *words)
        self.guest.run(WRITERS)
        self.writes_on()

    def writes_on(self) -> None:
        """Every writer comes to write some more."""
        before = self.guest.run("dict(counts)")
        assert len(before) == len(self.written)
        enough = lambda: all(count > before[path] + 20 for path, count in self.guest.run("dict(counts)").items())  # noqa: E731  a condition
        self.until(enough, "the guest writes on")

    def judged(self) -> dict[str, Any]:
        """A full generation, equal to what qemu-img found; how its disks were captured."""
        self.judge.execute("stop")
        for name in self.written:
            image(
                "convert", "-U", "-f", self.format(name), "-O", "raw", self.folder / name, self.folder / "judge-" / name
            )
        return self._compared(self.perdure("snapshot", NAME, "--full"))

    def _compared(self, made: Any) -> dict[str, Any]:
        for name in self.written:
            out = self.folder / "out"
            self.perdure("export", f"{NAME}@{made['generation']}", f"disk:{name}", out, "--force")
            image("compare", "-f", "raw", "-F", "raw", self.folder / "judge-" / name, out)
        self.writes_on()
        assert sorted(self.nodes()) == sorted(f"{kind}-{name}" for name in self.disks for kind in ("disk", "file"))
        assert not list(self.runtime.glob("perdure-*"))
        disks: dict[str, Any] = made["disks"]
        assert sorted(disks) == sorted(self.written)
        return disks

    def nodes(self) -> dict[str, Any]:
        """QEMU's block nodes with a name of somebody's, those of backing files aside."""
        found = self.judge.execute("query-named-block-nodes", flat=True)
        return {each["node-name"]: each for each in found if not each["node-name"].startswith("#")}

    def bitmaps(self) -> dict[str, list[str]]:
        """Names of the bitmaps on each disk, without what tells them apart."""
        return {
            name: [each["name"].rpartition("-")[0] for each in self.nodes()[f"disk-{name}"].get("dirty-bitmaps", ())]
            for name in self.disks
        }


def methods(disks: Mapping[str, Any]) -> dict[str, str]:
    return {name: each["method"] for name, each in disks.items()}


@pytest.fixture
def vm(guest_image: Image) -> Iterator[DiskVM]:
    """Raw and qcow2, with the host's cache and without, on a shared backing file, read-only."""
    disks = {
        "raw": "",
        "direct": 'cache = "none"',
        "qcow": 'format = "qcow2"',
        "over": 'format = "qcow2"\ncache = "none"',
        "also": 'format = "qcow2"',
        "fixed": "readonly = true",
    }
    with contextlib.closing(DiskVM(guest_image, disks)) as vm:
        (vm.folder / "judge-").mkdir()
        (vm.folder / "content").write_bytes(os.urandom(6 * MIB))
        image("convert", "-f", "raw", "-O", "qcow2", vm.folder / "content", vm.folder / "base")
        for name, size in (("raw", 16 * MIB + 512), ("direct", 8 * MIB), ("fixed", 8 * MIB)):
            with (vm.folder / name).open("wb") as file:
                file.write(os.urandom(size // MIB * MIB))
                file.truncate(size)
        image("create", "-f", "qcow2", vm.folder / "qcow", 24 * MIB)
        for name in ("over", "also"):
            image("create", "-f", "qcow2", "-b", vm.folder / "base", "-F", "qcow2", vm.folder / name, 12 * MIB)
        yield vm
        print(vm.report())


def test_only_what_the_guest_has_written_is_read_as_long_as_that_is_known(vm: DiskVM) -> None:
    vm.begin()
    first = vm.judged()
    assert {each["reason"] for each in first.values()} == {"no generation has it yet"}
    assert vm.bitmaps() == {
        **{name: ["perdure-since"] for name in ("raw", "direct")},
        **{name: ["perdure-kept"] for name in ("qcow", "over", "also")},
        "fixed": [],
    }
    for _ in range(2):
        again = vm.judged()
        assert set(methods(again).values()) == {"bitmap"}
        assert all(0 < each["read_bytes"] <= 8 * MIB + CHUNK for each in again.values())
        assert first["raw"]["read_bytes"] == 16 * MIB
    with vm.beside("snapshot", NAME, "--full"):
        vm.until(lambda: "perdure-then-4" in vm.nodes(), "the instant is kept")
        vm.run.kill()
    vm.begin()
    assert set(methods(vm.judged()).values()) == {"bitmap"}
