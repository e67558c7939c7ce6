"""`perdure attach`, end to end: a QEMU that the test has launched as anybody would, not Perdure.

Judged by QEMU's own pmemsave while the judge has the guest stopped, by qemu-img, and by what QEMU does by itself once
Perdure is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import judge
import pytest
from supervised import CPU, MEMORY, NAME, PAGE, QEMU, REGION, SECONDS, Image, Run, Supervised
from test_disks import WRITERS, image, methods
from test_drained_guest import POLICY
from test_full import ORDINARY, different_pages, export, goes_on
from test_survival import FIRMWARE, IN_GUEST, await_boot, content, go_down, write

from vm.protocol import PORT_NAME

pytestmark = pytest.mark.qemu

QMP, AGENT = "theirs.sock", "agent.sock"


class Theirs(Supervised):
    """A VM that a script launches. `shared`: its memory lies in files that others can map, too; `disks`: arguments."""

    def __init__(
        self,
        image: Image,
        *,
        shared: bool = True,
        disks: tuple[str, ...] = (),
        settings: str = "",
        policy: str = "",
    ) -> None:
        super().__init__(image, settings=settings, policy=policy)
        self.image, self.shared, self.disks = image, shared, disks
        self.qemu: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        """As somebody writes them down."""
        memory = [
            *("-object", self._memory("ram", MEMORY), "-object", self._memory("pm0", REGION)),
            *(
                "-machine",
                "q35,memory-backend=ram,nvdimm=on",
                "-m",
                f"{MEMORY >> 20}M,slots=1,maxmem={(MEMORY + REGION) >> 20}M",
            ),
            *("-device", "nvdimm,memdev=pm0,id=nvdimm-pm0"),
        ]
        channel = [
            *("-chardev", f"socket,id=agent,path={self.folder}/{AGENT},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=channels", "-device", f"virtserialport,chardev=agent,name={PORT_NAME}"),
        ]
        tested = [
            *("-qmp", f"unix:{self.folder}/{judge.SOCKET},server=on,wait=off"),
            *("-chardev", f"socket,id=test,path={self.folder}/test.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=test,name=org.perdure.test.0"),
        ]
        boots = ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)]
        boots += ["-append", self.image.append]
        return [
            *(str(QEMU), "-name", "theirs", "-nodefaults", "-display", "none"),
            *("-accel", "tcg", "-cpu", CPU),
            *("-qmp", f"unix:{self.folder}/{QMP},server=on,wait=off", "-serial", f"file:{self.folder}/console"),
            *("-device", "pvpanic-pci"),
            *memory,
            *channel,
            *boots,
            *("-device", "vmgenid,guid=auto"),
            *self.disks,
            *tested,
        ]  # fmt: skip

    def _memory(self, name: str, size: int) -> str:
        if not self.shared:
            return f"memory-backend-ram,id={name},size={size}"
        return f"memory-backend-file,id={name},size={size},mem-path={self.folder}/{name}.theirs,share=on"

    def launch(self) -> None:
        """Their script, until the guest is up."""
        self.qemu = subprocess.Popen(
            self.arguments(), stdin=subprocess.DEVNULL, cwd=self.folder, start_new_session=True
        )
        self.guest.wait_ready(SECONDS)
        self.guest.run(IN_GUEST)

    def attach(self, *words: str) -> Run:
        """`perdure attach`, until the VM is followed."""
        run = self.attaching(*words)
        run.expect(r"tracker:? ")
        return run

    def attaching(self, *words: str) -> Run:
        """The same, begun."""
        sockets = ["--qmp", str(self.folder / QMP), "--agent", str(self.folder / AGENT)]
        command = [sys.executable, "-m", "perdure", "attach", *sockets, str(self.folder / "VM.toml"), *words]
        self.runs.append(Run(command, self.environment | self.run_environment, self.folder))
        return self.runs[-1]

    def judged(self) -> Any:
        """A generation of a guest that the judge has stopped: it has what pmemsave has, and the guest stays stopped."""
        self.judge.execute("stop")
        with self.memory() as there:
            made = self.perdure("snapshot", NAME)
            assert different_pages(export(self, made["generation"], "pm0"), there["pm0"]) == []
        assert self.judge.execute("query-status")["status"] == "paused"
        self.judge.execute("cont")
        return made

    def left_alone(self) -> None:
        """Nothing of ours is in QEMU but what follows writes; the guest runs."""
        assert self.judge.execute("query-status")["status"] == "running"
        named = [each["node-name"] for each in self.judge.execute("query-named-block-nodes", flat=True)]
        assert not any(name.startswith("perdure-") for name in named)
        assert self.judge.execute("query-block-exports") == []
        assert self.judge.execute("query-jobs") == []
        capabilities = self.judge.execute("query-migrate-capabilities")
        assert [each["capability"] for each in capabilities if each["state"]] == []
        assert self.guest.run("6 * 7") == 42

    def reboots_by_itself(self) -> None:
        """The guest's reboot is nobody's business but QEMU's."""
        history = len(self.log())
        before = self.guest.boot_id
        assert before is not None
        go_down(self, "reboot")
        await_boot(self, before)
        assert len(self.log()) == history

    @property
    def userfaultfds(self) -> int:
        """Those that QEMU has."""
        assert self.qemu is not None
        held = Path(f"/proc/{self.qemu.pid}/fd")
        return sum(os.readlink(each) == "anon_inode:[userfaultfd]" for each in held.iterdir())


@pytest.fixture
def theirs(guest_image: Image) -> Iterator[Theirs]:
    with contextlib.closing(Theirs(guest_image)) as made:
        made.launch()
        yield made
        print(made.report())


def test_a_vm_of_somebody_else_is_captured_followed_and_left(theirs: Theirs) -> None:
    run = theirs.attach()
    area = write(theirs, "kept", 1)
    first = theirs.judged()
    theirs.guest.run("change([3, 5], 700)")
    second = theirs.judged()
    assert second["dirty_bytes"] == 2 * PAGE < first["dirty_bytes"]
    status = theirs.status()
    assert status["attached"]["reboots"] == "hold"
    assert status["full"] == "possible"

    run.kill()  # its guard leaves QEMU as it was
    theirs.guest.run("change([7], 800)")
    theirs.reboots_by_itself()
    run = theirs.attach()
    theirs.guest.run(f"use('kept', {area.size}); change([9], 900)")
    assert theirs.judged()["dirty_bytes"] == 2 * PAGE  # the one before the reboot, and the one after it
    assert "perdure detach" in theirs.refused("stop", NAME)
    assert "perdure run" in theirs.refused("rollback", f"{NAME}@1")

    before = theirs.guest.boot_id
    assert before is not None
    theirs.guest.run("change([1], 100)")
    theirs.left_alone()
    go_down(theirs, "reboot")
    run.expect("rebooted: nothing scrubbed")
    await_boot(theirs, before)
    assert theirs.log()[-1]["cause"] == "reboot"
    theirs.left_alone()

    run.process.send_signal(signal.SIGTERM)
    assert run.ended() == 130
    theirs.left_alone()
    assert "perdure attach" in theirs.refused("run", theirs.folder / "VM.toml")
    assert "perdure attach" in theirs.refused("snapshot", NAME)
    run = theirs.attach()
    assert theirs.userfaultfds == 1
    assert theirs.perdure("detach", NAME)["detached"]
    assert run.ended() == 0
    assert theirs.userfaultfds == 0
    assert not theirs.runtime.exists()
    theirs.left_alone()
    theirs.reboots_by_itself()

    found = export(theirs, theirs.log()[-1]["generation"], "pm0")
    assert area.of(found)[PAGE : 2 * PAGE] == content(101, PAGE)


DISKS = """
[[disk]]
name = "one"
file = "one"
capture = true
[[disk]]
name = "two"
file = "two"
format = "qcow2"
cache = "none"
"""
WITH_DISKS = (
    *(
        "-drive",
        "file=one,format=raw,if=none,id=first",
        "-device",
        "virtio-blk-pci,drive=first,id=drive-one,serial=one",
    ),
    *("-drive", "file=two,format=qcow2,if=none,id=second,cache=none"),
    *("-device", "virtio-blk-pci,drive=second,id=drive-two,serial=two"),
)


def saves(vm: Theirs) -> bool:
    """Whether QEMU is set up to save the state of its devices."""
    return any(each["state"] for each in vm.judge.execute("query-migrate-capabilities"))


def test_all_of_a_vm_of_somebody_else_can_be_captured_and_goes_on_here(guest_image: Image) -> None:
    """Disks under names that QEMU has made up, a supervisor that is killed while QEMU saves, a resume by Perdure."""
    with contextlib.closing(Theirs(guest_image, disks=WITH_DISKS, settings=DISKS)) as vm:
        for name, kind in (("one", "raw"), ("two", "qcow2")):
            image("create", "-f", kind, vm.folder / name, "64M")
        vm.momentous()
        vm.launch()
        limit = vm.judge.execute("query-migrate-parameters")["max-bandwidth"] // 2
        vm.judge.execute("migrate-set-parameters", **{"max-bandwidth": limit})
        run = vm.attach()
        area = write(vm, "kept", 1)
        vm.guest.run("change([1], 100)")
        vm.guest.run(ORDINARY + WRITERS)

        vm.judge.execute("stop")
        image("convert", "-U", "-f", "raw", "-O", "raw", vm.folder / "one", vm.folder / "copy")
        part = vm.perdure("snapshot", NAME)
        assert "is stopped" in vm.refused("snapshot", NAME, "--full")
        vm.judge.execute("cont")
        assert methods(part["disks"]) == {"one": "rescan"}
        vm.perdure("export", f"{NAME}@{part['generation']}", "disk:one", vm.folder / "exported")
        assert compared(vm, "copy", "exported")

        vm.perdure("snapshot", NAME, "--full")
        vm.killed_at("migrate", "snapshot", NAME, "--full")
        vm.until(lambda: not saves(vm) and vm.judge.execute("query-status")["running"], "what the guard does")
        vm.left_alone()
        run = vm.attach()
        made = vm.perdure("snapshot", NAME, "--full")
        assert methods(made["disks"]) == {"one": "bitmap", "two": "bitmap"}
        assert vm.judge.execute("query-migrate-parameters")["max-bandwidth"] == limit
        vm.left_alone()
        goes_on(vm)

        vm.kill_qemu()
        run.expect("QEMU ended")
        assert run.ended() == 0
        vm.boot("--from", f"{NAME}@{made['generation']}")
        goes_on(vm)  # every page of its ordinary memory is of that instant
        assert vm.guest.run(f"bytes(area('kept', {area.size})[{PAGE}:{2 * PAGE}]).hex()") == content(101, PAGE).hex()
        vm.guest.run("finish()")


def compared(vm: Theirs, *names: str) -> bool:
    """Whether qemu-img finds two raw images equal."""
    words = ["qemu-img", "compare", "-f", "raw", "-F", "raw", *(str(vm.folder / name) for name in names)]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def test_memory_that_is_qemus_alone_is_captured_too(guest_image: Image) -> None:
    """No file has it: it is followed where it lies in QEMU, and read out of there, also by write-back."""
    with contextlib.closing(Theirs(guest_image, shared=False, policy=POLICY)) as vm:
        vm.launch()
        run = vm.attach()
        run.look()
        assert "memory-backend-file with share=on" in run.text
        assert "share=on" in vm.refused("snapshot", NAME, "--full")
        area = write(vm, "kept", 1)
        vm.guest.run(ORDINARY)
        first = judged_memory(vm)
        vm.guest.run("change(range(300), 600)")
        vm.until(lambda: vm.status()["write_back"]["stored_ahead_bytes"], "dirty pages stored ahead")
        vm.judged()
        vm.guest.run("change([3, 5], 700)")
        assert vm.judged()["dirty_bytes"] == 2 * PAGE
        vm.guest.run("change([7], 800)")
        second = judged_memory(vm)
        assert 2 * PAGE <= second["dirty_bytes"] < first["dirty_bytes"] / 2
        status = vm.status()
        assert status["tracker"].startswith("userfaultfd")
        assert vm.userfaultfds == 1
        assert status["attached"]["memory"] == {"ram": "private", "pm0": "private"}

        run.kill()
        vm.guest.run("change([9], 900)")
        run = vm.attach()
        assert vm.baseline_of("ram") == second["id"]  # it is known what was written since
        vm.judged()
        vm.perdure("detach", NAME)
        assert run.ended() == 0
        assert vm.userfaultfds == 0
        vm.left_alone()
        assert area.of(export(vm, vm.log()[-1]["generation"], "pm0"))[9 * PAGE : 10 * PAGE] == content(909, PAGE)

        run = vm.attach()
        vm.guest.run("change([11], 110)")
        go_down(vm, "poweroff")
        run.expect("the guest shut down")
        assert run.ended() == 0
        assert vm.qemu is not None and vm.qemu.wait(SECONDS) == 0  # as it does without us
        latest = vm.log()[-1]
        assert latest["cause"] == "shutdown"
        assert area.of(export(vm, latest["generation"], "pm0"))[11 * PAGE : 12 * PAGE] == content(121, PAGE)
        assert not vm.runtime.exists()


def judged_memory(vm: Theirs) -> Any:
    """A generation with all memory of a guest that the judge has stopped; it is what pmemsave has."""
    vm.judge.execute("stop")
    with vm.memory() as there:
        made = vm.perdure("snapshot", NAME, "--memory")
        assert not made["full"]
        for region, memory in there.items():
            assert [
                page
                for page in different_pages(export(vm, made["generation"], region), memory)
                if region != "ram" or page not in FIRMWARE
            ] == [], region
    vm.judge.execute("cont")
    return made


def test_what_is_not_as_described_or_not_free_is_refused_and_left_alone(guest_image: Image) -> None:
    """Of a QEMU whose guest has not begun."""
    with contextlib.closing(Theirs(guest_image)) as vm:
        vm.qemu = subprocess.Popen([*vm.arguments(), "-S", "-no-shutdown"], stdin=subprocess.DEVNULL, cwd=vm.folder)
        vm.until(lambda: all((vm.folder / name).exists() for name in (QMP, judge.SOCKET)), "its sockets")
        described = (vm.folder / "VM.toml").read_text()

        def refused(change: tuple[str, str], why: str, *words: str) -> None:
            (vm.folder / "VM.toml").write_text(described.replace(*change))
            run = vm.attaching(*words)
            assert run.ended() == 1
            assert why in run.text and run.text.count("\n") == 1, run.text
            assert not vm.runtime.exists()
            assert vm.judge.execute("query-status")["status"] == "prelaunch"

        refused((f"memory = {MEMORY}", f"memory = {MEMORY // 2}"), "256.0 MiB of main memory")
        refused(('name = "pm0"\nsize = ' + str(REGION), f'name = "other"\nsize = {REGION * 2}'), "pm0 (32.0 MiB)")
        (vm.folder / "nowhere").touch()
        refused(("[[region]]", '[[disk]]\nname = "d"\nfile = "nowhere"\n[[region]]'), "QEMU has no disk of the file")
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(vm.folder / QMP))
            assert other.recv(9) == b'{"QMP": {'  # it serves this one
            refused(("", ""), "one client at a time")
        os.kill(vm.qemu.pid, signal.SIGSTOP)
        run = vm.attaching()
        assert run.ended() == 1
        assert "kill -CONT" in run.text and run.text.count("\n") == 1
        os.kill(vm.qemu.pid, signal.SIGCONT)

        (vm.folder / "VM.toml").write_text(described)
        with socket.socket(socket.AF_UNIX) as other:  # somebody who would take a held reboot for a shutdown
            other.connect(str(vm.folder / judge.SOCKET))
            assert other.recv(9) == b'{"QMP": {'
            run = vm.attach()
            assert "reboots are not held" in run.text
            assert vm.status()["attached"]["reboots"] == "pass"
            assert "not held" in vm.refused("reboot", NAME)
            (vm.folder / "VM.toml").write_text(described.replace(f'name = "{NAME}"', 'name = "second"'))
            second = vm.attaching()
            assert second.ended() == 1
            assert "one client at a time" in second.text
            run.process.send_signal(signal.SIGINT)
            assert run.ended() == 130
        second = vm.attaching()
        assert second.ended() == 1
        assert f"is attached as VM {NAME}" in second.text
        (vm.folder / "VM.toml").write_text(described)
        run = vm.attach("--reboots", "hold", "--scrub")
        vm.perdure("detach", NAME)
        assert run.ended() == 0
        assert vm.judge.execute("query-status")["status"] == "prelaunch"
