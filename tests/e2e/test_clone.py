"""Copies of a VM, end to end, on real QEMU: two side by side with the one that they are copies of, and a copy of one.

All are resumed lazily. Judged by the guests, which check their memory and disks and look at their network cards, by
QEMU itself, and by its pmemsave of all of their memory before they go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import NAME, SECONDS, GuestShell, Image, Judge, Run, Supervised
from supervised import judge as judge_program
from test_back import reported
from test_full import DISK_BLOCKS, ON_DISK, ORDINARY, TWO_DISKS, different_pages, export, image
from test_lazy_troubles import MOMENTS, paced
from test_survival import boot, content, write

from restore import claims as record

pytestmark = pytest.mark.qemu

SETTINGS = TWO_DISKS.replace('cache = "none"\n', "")
UNIQUE = """
import fcntl, subprocess, time
busybox = "/bin/busybox"
os.makedirs("/files")
subprocess.run([busybox, "mount", "-t", "ext4", "/dev/vdb", "/files"], check=True)
os.makedirs("/etc/perdure", exist_ok=True)
with open("/etc/perdure/resumed", "w") as hook:
    hook.write("#!/bin/busybox sh\\\\nenv >/tmp/hook && mv /tmp/hook /tmp/resumed\\\\n")
os.chmod("/etc/perdure/resumed", 0o755)
files = os.open("/files", os.O_RDONLY)

asked = [0]
def ask():
    perdure_guest.query_persistent_regions()
    asked[0] += 1
    time.sleep(0.01)
work(ask)

def card():
    with open("/sys/class/net/eth0/address") as file:
        return file.read().strip()

def hook_said():
    with open("/tmp/resumed") as file:
        return dict(line.split("=", 1) for line in file.read().splitlines())

def write_file():
    descriptor = os.open("/files/new", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"x")
    os.fsync(descriptor)
    os.close(descriptor)

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
""".replace("\\\\n", "\\n")


class Copy:
    """A copy of the VM that runs, with a description of its own; `judged`: whether the judge saves its memory before it
    goes on."""

    def __init__(self, vm: Supervised, name: str, *, judged: bool = False) -> None:
        self.vm, self.name = vm, name
        self.folder = folder = vm.folder / name
        folder.mkdir()
        text = (vm.folder / "VM.toml").read_text()
        for socket in (judge_program.SOCKET, "test.sock"):
            text = text.replace(f"{vm.folder}/{socket}", f"{folder}/{socket}")
        self.description = vm.folder / f"{name}.toml"
        hook = [sys.executable, "-IS", judge_program.__file__, str(folder)]
        if judged:
            (folder / judge_program.BOOTS).mkdir()
        hooks = f"[hooks]\nbefore_boot = {json.dumps(hook)}\n" if judged else ""
        self.description.write_text(text[: text.index("[hooks]")] + hooks)
        self.guest, self.judge = GuestShell(folder / "test.sock"), Judge(folder)

    @property
    def runtime(self) -> Path:
        """Its runtime folder."""
        return self.vm.runtime.parent / self.name

    def start(self, *words: str, slowly: bool = False) -> Run:
        """`perdure run`, begun; `slowly`: of its memory only what is touched comes."""
        command = [sys.executable, "-m", "perdure", "run", str(self.description), "--as", self.name, *words]
        environment = self.vm.environment
        if slowly:
            (self.folder / "armed").write_text(f"migrate-incoming\n{paced(self.runtime, record.FAULTS_ONLY)}")
            path = f"{MOMENTS}:{environment['PYTHONPATH']}"
            environment = environment | {"PYTHONPATH": path, "PERDURE_TEST_MOMENTS": str(self.folder)}
        self.vm.runs.append(Run(command, environment, self.vm.folder))
        return self.vm.runs[-1]

    def differs_from(self, ram: bytes) -> int:
        """Pages of main memory that were different before it went on."""
        with (self.folder / judge_program.BOOTS / "1" / "ram").open("rb") as file:
            return len(different_pages(ram, file.read()))


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    """A VM with two disks and a network card."""
    card = ("-nic", "user,model=virtio-net-pci")
    with contextlib.closing(Supervised(guest_image, settings=SETTINGS, extra=card)) as vm:
        (vm.folder / "one").write_bytes(bytes(8 << 20) + os.urandom(4 << 20))
        subprocess.run(["mkfs.ext4", "-q", vm.folder / "files", "16M"], check=True)
        image("convert", "-f", "raw", "-O", "qcow2", vm.folder / "files", vm.folder / "two")
        image("resize", "-f", "raw", vm.folder / "one", "16M")
        with reported(vm):
            yield vm


def facts(guest: GuestShell, judge: Judge) -> dict[str, Any]:
    """What is to be its own of each."""
    [card] = judge.execute("query-rx-filter")
    assert card["main-mac"] == guest.run("card()")  # device and driver agree
    return {
        "address": card["main-mac"],
        "uuid": judge.execute("query-uuid")["UUID"],
        "generation id": judge.execute("query-vm-generation-id")["guid"],
        "random": guest.run("os.urandom(16).hex()"),
    }


def is_well(vm: Supervised, guest: GuestShell) -> None:
    """Its programs go on, and no page and no block is wrong."""
    began = guest.run("[steps[0], disk_steps[0], asked[0]]")

    def gone_on() -> bool:
        now = guest.run("[steps[0], disk_steps[0], asked[0]]")
        return bool(now[0] > began[0] + 512 and now[1] > began[1] + DISK_BLOCKS and now[2] > began[2])

    vm.until(gone_on, "the guest goes on")
    assert guest.run("[torn[:3], disk_torn[:3]]") == [[], []]


def test_copies_run_side_by_side(vm: Supervised) -> None:
    boot(vm)
    vm.guest.run(UNIQUE + ORDINARY + ON_DISK.replace(', "/dev/vdb"', ","))
    area = write(vm, "kept", 6)
    is_well(vm, vm.guest)
    vm.guest.run("fcntl.ioctl(files, FIFREEZE, 0)")
    point = f"{NAME}@{vm.perdure('snapshot', NAME, '--full')['generation']}"
    vm.guest.run("fcntl.ioctl(files, FITHAW, 0)")
    ram = export(vm, 1, "ram")
    copies = [Copy(vm, "first", judged=True), Copy(vm, "second", judged=True)]
    with contextlib.ExitStack() as stack:
        for run in [each.start("--from", point, "--lazy") for each in copies]:
            assert "its memory comes as it is touched" in run.expect("started .*")[0]
            run.expect("tracker:? ")
        for each in copies:
            stack.callback(each.guest.close)
            assert each.differs_from(ram) == 1  # the generation id
        found = [facts(vm.guest, vm.judge)]
        for each in copies:
            assert each.guest.wait_ready(SECONDS) == vm.guest.boot_id
            vm.until(lambda: each.guest.run("os.path.exists('/tmp/resumed')"), "the hook has run")  # noqa: B023
            said = each.guest.run("hook_said()")
            assert (said["PERDURE_VM"], said["PERDURE_GENERATION"]) == (each.name, "1")
            each.guest.run("write_file()")  # its file system was frozen
            found.append(facts(each.guest, each.judge))
            assert said["PERDURE_ADDRESSES"] == f"{found[0]['address']}={found[-1]['address']}"
        for what in found[0]:
            assert len({each[what] for each in found}) == 3, what
        [first] = vm.perdure("log", "first")["generations"]
        assert (first["cause"], first["parent_name"], first["stored_bytes"], first["full"]) == ("clone", point, 0, True)
        made = vm.perdure("snapshot", "first", "--full")
        assert (made["vm"], made["generation"]) == ("first", 2)
        grandchild = Copy(vm, "grandchild")
        stack.callback(grandchild.guest.close)
        run = grandchild.start("--from", "first@2", slowly=True)
        run.expect("tracker:? ")
        assert grandchild.guest.wait_ready(SECONDS) == vm.guest.boot_id
        is_well(vm, grandchild.guest)
        assert grandchild.judge.read(area.address, area.size) == content(6)
        told = vm.perdure("status", "grandchild")
        assert told["lazy"]["percent"] < 100
        assert vm.perdure("log", "grandchild")["generations"][0]["parent_name"] == "first@2"
        os.kill(told["pid"], signal.SIGKILL)
        assert run.ended() == 1
        vm.perdure("export", "grandchild@latest", "pm0", vm.folder / "left")  # its memory is completed, and captured
        assert area.of((vm.folder / "left").read_bytes()) == content(6)
        for guest in (vm.guest, *(each.guest for each in copies)):
            is_well(vm, guest)
        assert [each["first_path"] for each in vm.perdure("disks", "second")["disks"]] == [None, None]
        assert f"{point} was made with " in vm.refused("run", "--as", "third", "--from", point)
        vm.perdure("stop", "first")
        words = ("run", copies[0].description, "--as", "first", "--from", point)
        assert "there is a VM first already (first@2)" in vm.refused(*words)
        again = copies[0].start()
        again.expect("the VM boots")
        again.expect("tracker:? ")
        copies[0].guest.wait_ready(SECONDS)
