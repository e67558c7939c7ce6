"""Generations of a VM whose guest, disks, balloon and supervisor do things by chance, judged page by page.

A judged instant is one at which somebody else has stopped the VM: all of its memory is dumped by QEMU's own pmemsave
and its disks are read by qemu-img, and both are compared with the full generation that is made then. Write-back has
worked before it, and captures of the running guest were made: what one of them had lost, a page whose bit was cleared
and that no generation has, shows in all that follow it.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from supervised import KEY, MEMORY, MIB, NAME, PAGE, Image, Supervised
from test_survival import IN_GUEST

from perdure.opening import opened
from store.keyring.slots import KeyFile
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository

BY_CHANCE = (Path(__file__).parent / "in_guest_chance.py").read_text().replace("from in_guest import use, work\n", "")
POLICY = """\
write_back = "on"
background_bandwidth = "1 GiB"
background_cpu_percent = 100
"""
BALLOON = ("-device", "virtio-balloon-pci")
KINDS = {
    "userfaultfd": ("userfaultfd", "writeback"),
    "userfaultfd, cache=none": ("userfaultfd", "none"),
    "scan": ("scan", "writeback"),
}
"""Tracker of memory, and cache mode of both disks, which are followed by bitmaps."""


@dataclass(slots=True)
class Seen:
    """What came out: judged instants, the pages that were compared, and those of them that were wrong, by region;
    captures of the running guest, take-overs, reboots and disks by how they were read."""

    instants: int = 0
    pages: int = 0
    missed: dict[str, int] = field(default_factory=dict)
    live: int = 0
    take_overs: int = 0
    reboots: int = 0
    methods: dict[str, int] = field(default_factory=dict)

    def add(self, other: Seen) -> None:
        """Both together."""
        for name in ("instants", "pages", "live", "take_overs", "reboots"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("missed", "methods"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value


class Chance:
    """One VM, booted; made by `chance`. `seed` decides everything that can be decided."""

    def __init__(self, vm: Supervised, repository: Repository, seed: int) -> None:
        self.vm, self.seen = vm, Seen()
        self._repository, self._some, self._seed = repository, random.Random(seed), seed

    def begin(self, *words: str) -> None:
        """`perdure run`, until the guest does things."""
        self.vm.boot(*words)
        self._do_things()

    def round(self) -> None:
        """Some things happen, and an instant is judged."""
        for happens in self._some.choices(
            (self._capture, self._balloon, self._taken_over, self._reboot), (10, 4, 2, 1), k=self._some.randrange(4)
        ):
            happens()
            self._go_on()
        self._go_on()
        self._judge()

    def _do_things(self) -> None:
        self._seed += 1
        self.vm.guest.run(IN_GUEST)
        self.vm.guest.run(BY_CHANCE)
        self.vm.guest.run(f"chance({self._seed})")

    def _go_on(self) -> None:
        """The guest takes some steps."""
        steps = self.vm.guest.run("steps") + self._some.randrange(1, 60)
        self.vm.until(lambda: self.vm.guest.run("steps") >= steps, "the guest goes on")

    def _capture(self) -> None:
        self.vm.perdure("snapshot", NAME, *(("--full",) if self._some.random() < 0.5 else ()))
        self.seen.live += 1

    def _balloon(self) -> None:
        """Not so much that the guest has none left: it would kill the program that does things."""
        self.vm.judge.execute("balloon", value=MEMORY - self._some.randrange(4) * 8 * MIB)

    def _taken_over(self) -> None:
        """In the middle of what the supervisor does."""
        self.vm.run.kill()
        self._go_on()
        self.vm.boot()
        self.seen.take_overs += 1

    def _reboot(self) -> None:
        self.vm.guest.reboot()
        self._do_things()
        self.seen.reboots += 1

    def _judge(self) -> None:
        vm = self.vm
        vm.judge.execute("stop")
        disks = {}
        for name, kind in (("raw", "raw"), ("qcow", "qcow2")):
            disks[f"disk:{name}"] = vm.folder / f"judge-{name}"
            command = ["qemu-img", "convert", "-U", "-f", kind, "-O", "raw", vm.folder / name, disks[f"disk:{name}"]]
            subprocess.run(command, check=True, capture_output=True)
        with vm.memory() as there:
            made = vm.perdure("snapshot", NAME, "--full")
            self._repository.refresh()
            generation = self._repository.resolve(f"{NAME}@{made['generation']}")
            for name, memory in there.items():
                self._compare(generation, name, memory)
        for name, path in disks.items():
            self._compare(generation, name, path.read_bytes())
        for each in made["disks"].values():
            self.seen.methods[each["method"]] = self.seen.methods.get(each["method"], 0) + 1
        self.seen.instants += 1

    def _compare(self, generation: Generation, name: str, judged: Any) -> None:
        """Count pages, and those that differ."""
        at = wrong = 0
        with GenerationReader(self._repository, generation) as reader:
            for piece in reader.stream(reader.region(name), MIB):
                theirs = judged[at : at + len(piece)]
                if piece != theirs:
                    ours, other = (np.frombuffer(each, np.uint8).reshape(-1, PAGE) for each in (piece, theirs))
                    wrong += int((ours != other).any(axis=1).sum())
                at += len(piece)
        assert at == len(judged), (name, at)
        self.seen.pages += at // PAGE
        self.seen.missed[name] = self.seen.missed.get(name, 0) + wrong


@contextlib.contextmanager
def chance(image: Image, kind: str, seed: int, qemu: str | None = None) -> Iterator[Chance]:
    """A VM that does things by chance."""
    tracker, cache = KINDS[kind]
    disks = "".join(
        f'[[disk]]\nname = "{name}"\nfile = "{name}"\nformat = "{form}"\ncache = "{cache}"\n'
        for name, form in (("raw", "raw"), ("qcow", "qcow2"))
    )
    settings = f'qemu = "{qemu}"\n{disks}' if qemu else disks
    vm = Supervised(image, tracker=tracker, settings=settings, policy=POLICY, extra=BALLOON)
    with contextlib.closing(vm):
        (vm.folder / "raw").write_bytes(random.Random(seed).randbytes(16 * MIB))
        create = ["qemu-img", "create", "-f", "qcow2", vm.folder / "qcow", str(16 * MIB)]
        subprocess.run(create, check=True, capture_output=True)
        with opened(vm.repository, given=KeyFile(KEY), state=vm.folder / "index") as repository:
            made = Chance(vm, repository, seed)
            made.begin()
            try:
                yield made
            except BaseException:
                print(f"{kind}, seed {seed}: {made.seen}", vm.report())
                raise
