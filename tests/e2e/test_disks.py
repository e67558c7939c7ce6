"""Disks by what the guest has written since the last generation, end to end on real QEMU.

Judged by qemu-img: each disk of a generation is compared with what qemu-img reads of the image while somebody else has
the VM stopped, and the guest writes at random before and after, also while the capture reads.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from supervised import KEY, MIB, NAME, Image, Supervised
from test_survival import boot, content, reboot

from perdure.opening import opened
from store.keyring.slots import KeyFile
from store.reader import GenerationReader
from store.repository import Repository

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
        self.repository_here: Repository
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
    def always(self) -> list[str]:
        """Disks that every generation has."""
        return [name for name, more in self.disks.items() if "capture" in more]

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

    def judged(self, *words: str) -> dict[str, Any]:
        """A generation, full if `--full` is among the words, equal to what qemu-img found while somebody else had the
        guest stopped; how its disks were captured. Nothing is left in QEMU."""
        self.judge.execute("stop")
        self.look()
        made = self.perdure("snapshot", NAME, *words)
        self.compare(made["generation"], self.written if words else self.always)
        self.writes_on()
        assert sorted(self.nodes()) == sorted(f"{kind}-{name}" for name in self.disks for kind in ("disk", "file"))
        assert not list(self.runtime.glob("perdure-*"))
        disks: dict[str, Any] = made["disks"]
        return disks

    def look(self) -> None:
        """The judge's copies of all disks, which nobody writes now."""
        for name in self.written:
            copy = self.folder / "judge-" / name
            image("convert", "-U", "-f", self.format(name), "-O", "raw", self.folder / name, copy)

    def compare(self, number: int | None, disks: list[str]) -> None:
        """A generation (None: the latest) has these disks, and they are as the judge has seen them.

        Read in this process, on an index of its own: a command for each disk takes a second.
        """
        self.repository_here.refresh()
        found = self.repository_here.resolve(f"{NAME}@{number or 'latest'}")
        assert [name[5:] for name, each in found.regions.items() if each.kind == "disk"] == disks
        with GenerationReader(self.repository_here, found) as reader:
            for name in disks:
                region = reader.region(f"disk:{name}")
                with (self.folder / "judge-" / name).open("rb") as copy:
                    for piece in reader.stream(region, MIB):
                        assert copy.read(len(piece)) == piece, name
                    assert copy.read() == b"", name

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
        "raw": "capture = true",
        "direct": 'cache = "none"',
        "qcow": 'format = "qcow2"\ncapture = true',
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
        with opened(vm.repository, given=KeyFile(KEY), state=vm.folder / "index") as vm.repository_here:
            yield vm
        print(vm.report())


def test_only_what_the_guest_has_written_is_read_as_long_as_that_is_known(vm: DiskVM) -> None:
    vm.begin()
    first = vm.judged("--full")
    assert {each["reason"] for each in first.values()} == {"no generation has it yet"}
    assert vm.bitmaps() == {
        **{name: ["perdure-since"] for name in ("raw", "direct")},
        **{name: ["perdure-kept"] for name in ("qcow", "over", "also")},
        "fixed": [],
    }
    part = vm.judged()
    assert methods(part) == {"raw": "bitmap", "qcow": "bitmap"}
    status = {each["disk"]: each for each in vm.status()["disks"]}
    assert {name: each["since"] for name, each in status.items()} == {
        **dict.fromkeys(("raw", "qcow"), f"{NAME}@2"),
        **dict.fromkeys(("direct", "over", "also"), f"{NAME}@1"),
        "fixed": None,
    }
    assert all(each["dirty_bytes"] for name, each in status.items() if name != "fixed")
    again = vm.judged("--full")
    assert set(methods(again).values()) == {"bitmap"}
    assert all(0 < each["read_bytes"] <= 8 * MIB + CHUNK for each in again.values())
    assert first["raw"]["read_bytes"] == 16 * MIB
    with vm.beside("snapshot", NAME, "--full"):
        vm.until(lambda: "perdure-then-4" in vm.nodes(), "the instant is kept")
        vm.run.kill()
    vm.begin()
    assert set(methods(vm.judged("--full")).values()) == {"bitmap"}
    reboot(vm)
    vm.look()
    vm.compare(None, vm.always)
    vm.guest.run(WRITERS)
    vm.writes_on()
    vm.perdure("stop", NAME, "--capture")
    assert vm.run.ended() == 0
    vm.look()
    vm.compare(None, vm.always)


def test_disks_come_and_go_and_change_their_size(vm: DiskVM) -> None:
    """And QEMU is killed: an image keeps what was written if the QEMU that had it open ended as it should."""
    vm.begin()
    vm.judged("--full")
    vm.perdure("stop", NAME)
    assert vm.run.ended() == 0
    every = vm.disks
    vm.describe({name: every[name] for name in ("raw", "qcow")})
    vm.begin()
    vm.kill_qemu()
    assert vm.run.ended() == 1
    (vm.folder / "new").write_bytes(os.urandom(2 * MIB))
    image("resize", "-f", "qcow2", vm.folder / "over", "14M")
    image("create", "-f", "qcow2", vm.folder / "other", 12 * MIB)
    image("rebase", "-u", "-f", "qcow2", "-b", vm.folder / "other", "-F", "qcow2", vm.folder / "also")
    image("resize", "-f", "raw", "--shrink", vm.folder / "direct", "4M")
    vm.describe({"new": "", **{name: every[name] for name in ("raw", "qcow", "direct", "over", "also")}})
    vm.begin()
    made = vm.judged("--full")
    assert methods(made) == {**dict.fromkeys(("new", "raw", "qcow", "direct", "also"), "rescan"), "over": "bitmap"}
    assert "a raw image keeps none" in made["raw"]["reason"]
    assert "is inconsistent: QEMU had not ended as it should" in made["qcow"]["reason"]
    assert "a backing file of its image was changed" in made["also"]["reason"]
    for name, size in (("raw", 8 * MIB), ("qcow", 30 * MIB), ("raw", 6 * MIB + 512)):
        vm.judge.execute("block_resize", **{"node-name": f"disk-{name}", "size": size})
        assert set(methods(vm.judged("--full")).values()) == {"bitmap"}
    vm.judge.execute("stop")  # what the guest writes past the end of a smaller disk would fail
    vm.judge.execute("block_resize", **{"node-name": "disk-raw", "size": 4 * MIB})
    vm.judge.execute("block_resize", **{"node-name": "disk-raw", "size": 8 * MIB})
    assert "was it made smaller?" in vm.judged()["raw"]["reason"]


def test_a_guest_whose_image_has_no_room_waits_until_it_has(guest_image: Image, short_folder: Path) -> None:
    small = short_folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=True)
    try:
        with (small / "disk").open("wb") as file:
            file.truncate(16 * MIB)
        settings = f'[[disk]]\nname = "one"\nfile = "{small}/disk"\n'
        with contextlib.closing(Supervised(guest_image, settings=settings)) as vm:
            boot(vm)
            vm.guest.start(
                f"with open('/dev/vda', 'r+b', 0) as disk: disk.write(content(1, {10 * MIB})); os.fsync(disk)"
            )
            vm.until(lambda: vm.judge.execute("query-status")["status"] == "io-error", "no room")
            assert vm.status()["disks"][0]["stuck"] == "there is no room for what it writes"
            for _ in range(2):  # captured as it is, and let go on, for the same again
                vm.perdure("snapshot", NAME, "--full")
                vm.until(lambda: vm.judge.execute("query-status")["status"] == "io-error", "no room again")
            subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
            vm.perdure("snapshot", NAME, "--full")
            vm.until(lambda: (small / "disk").read_bytes()[: 10 * MIB] == content(1, 10 * MIB), "all is written")
            assert vm.status()["disks"][0]["stuck"] is None
            made = vm.perdure("snapshot", NAME, "--full")
            assert made["disks"]["one"]["method"] == "bitmap"
            vm.perdure("export", f"{NAME}@{made['generation']}", "disk:one", vm.folder / "out")
            image("compare", "-U", "-f", "raw", "-F", "raw", small / "disk", vm.folder / "out")
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
