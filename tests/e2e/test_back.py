"""Going back with disks, end to end, on real QEMU: images on an export of the generation, filled beside the guest.

Judged by a guest that checks its own memory and every block of its disks, and by qemu-img against copies that somebody
else made of the disks at the instant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import NAME, SECONDS, Image, Supervised
from test_full import (
    DISK_BLOCKS,
    ON_DISK,
    ORDINARY,
    TWO_DISKS,
    boot_or_resume,
    disk_walked,
    goes_on,
    image,
    judged_with_disks,
    walked,
    writes_on,
)
from test_survival import boot

pytestmark = pytest.mark.qemu


@contextlib.contextmanager
def reported(vm: Supervised) -> Iterator[None]:
    """What the VM said is shown for a test that fails."""
    try:
        yield
    except BaseException:
        print(vm.report())
        raise


def described(vm: Supervised, content_bytes: int = 32 << 20) -> None:
    """Images with content, and so little bandwidth that filling lasts until the judge gives more."""
    (vm.folder / "one").write_bytes(bytes(8 << 20) + os.urandom(content_bytes) + bytes(24 << 20))
    image("create", "-f", "qcow2", vm.folder / "two", "24M")
    path = vm.folder / "VM.toml"
    path.write_text(path.read_text().replace("[policy]\n", "[policy]\nfill_bandwidth = 0x10000\n"))


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disks(vm: Supervised) -> dict[str, Any]:
    return {each["disk"]: each for each in vm.perdure("disks", NAME)["disks"]}


def server(vm: Supervised) -> tuple[int, Path]:
    """The process that serves the disks of now, and its socket."""
    [path] = vm.runtime.glob("then-*.json")
    return int(json.loads(path.read_text())["pid"]), path.with_suffix(".sock")


def needs(vm: Supervised) -> list[Path]:
    return list((vm.repository / "leases").glob("need-*"))


def let_fill(vm: Supervised) -> None:
    """Give the jobs all bandwidth, until there is nothing left to do and nobody behind the disks."""

    def done() -> bool:
        for job in vm.judge.execute("query-block-jobs"):
            with contextlib.suppress(AssertionError):  # it ends as it is asked
                vm.judge.execute("block-job-set-speed", device=job["device"], speed=0)
        return all(each["state"] == "filled" for each in disks(vm).values())

    vm.until(done, "the disks are filled")
    vm.until(lambda: not list(vm.runtime.glob("then-*.sock")), "the server has ended")


LOOK = """
def highest(path):
    buffer, disk = mmap.mmap(-1, 65536), os.open(path, os.O_RDONLY | os.O_DIRECT)
    found = []
    for at in range(64):
        os.preadv(disk, [buffer], at * 65536)
        found.append(memoryview(buffer).cast("Q")[0])
    os.close(disk)
    return max(found)
"""


def highest(vm: Supervised, path: str) -> int:
    """The last step of the walk over disks that is on one, as the guest reads it past its cache."""
    return int(vm.guest.run(f"highest({path!r})"))


def stored(vm: Supervised, number: int, disk: str) -> str:
    """What a generation has of a disk, by the root of its page map."""
    regions = vm.perdure("show", f"{NAME}@{number}")["regions"]
    return str(next(each["root"] for each in regions if each["name"] == f"disk:{disk}"))


def test_a_vm_goes_back_with_its_disks(guest_image: Image) -> None:
    policy = "pause_ms_max = 1\nrounds_max = 2"  # which no capture fits: each stops the guest three times
    with contextlib.closing(Supervised(guest_image, settings=TWO_DISKS, policy=policy)) as vm, reported(vm):
        described(vm)
        vm.momentous()
        boot(vm)
        vm.guest.run(ORDINARY + ON_DISK)
        writes_on(vm)
        point = f"{NAME}@{judged_with_disks(vm)['generation']}"
        booted, then = vm.guest.boot_id, disk_walked(vm)
        writes_on(vm)
        history = vm.log()
        planned = vm.perdure("rollback", point, "--dry-run")
        assert (planned["resumes"], planned["captured_first"], planned["compared_with"]) == (True, "full", point)
        assert [each["disk"] for each in planned["disks"]] == ["one", "two"]
        assert all(0 < each["content_bytes"] < each["room_bytes"] for each in planned["disks"])
        assert {each["name"]: each["changed_bytes"] for each in planned["regions"]} == {"ram": 0, "pm0": 0, "device": 0}
        assert "what it writes next may destroy them" in vm.refused("rollback", point, "--memory-only")
        assert "unless they are not mounted" in vm.refused("rollback", point, "--disk", "one")
        assert "demo@1 has no disk three" in vm.refused("rollback", point, "--disk", "three", "--force")
        assert vm.log() == history and not (vm.folder / "perdure-overlays").exists()
        writes_on(vm)
        steps = disk_walked(vm)
        vm.killed_at("quit", "rollback", point)  # when there is a head already, and the old QEMU
        boot(vm)
        assert "does not go on from demo@3 after all" in vm.run.text
        assert disk_walked(vm) >= steps
        assert [each["cause"] for each in vm.log()[1:]] == ["before rollback"]
        assert {each["state"] for each in disks(vm).values()} == {"as described"}
        assert not needs(vm) and not list((vm.folder / "perdure-overlays").iterdir())
        assert not list(vm.runtime.glob("then-*.sock"))
        writes_on(vm)
        vm.at("quit", "kill -KILL $QEMU $PPID")  # the same without the old QEMU
        assert "supervisor" in vm.refused("rollback", point)
        assert vm.run.ended() == -signal.SIGKILL
        boot_or_resume(vm)
        assert vm.guest.boot_id == booted
        assert disk_walked(vm) < steps
        assert [each["cause"] for each in vm.log()[2:]] == ["before rollback", "rollback"]
        writes_on(vm)
        done = vm.perdure("rollback", point)
        before = {name: hashed(vm.folder / name) for name in ("one", "two")}
        assert done["resumed"] and done["captured"]
        assert vm.guest.wait_ready(SECONDS) == booted
        assert disk_walked(vm) < then
        for name in ("one", "two"):  # the judge's copies of that instant
            socket = server(vm)[1]
            image("compare", "-f", "raw", f"nbd+unix:///{name}?socket={socket}", vm.folder / f"{name}.judge")
        now = disks(vm)
        assert {each["state"] for each in now.values()} == {"filling"}
        assert {Path(each["first_path"]).name for each in now.values()} == {"one", "two"}
        assert all(Path(each["path"]).stat().st_mode & 0o777 == 0o600 for each in now.values())
        os.kill(server(vm)[0], signal.SIGKILL)
        writes_on(vm)  # which reads every block
        goes_on(vm)
        assert f"{point} is needed by disk " in vm.refused("forget", point)
        vm.run.expect("the server of disk one, two had ended, and is started again")
        vm.run.kill()
        os.kill(server(vm)[0], signal.SIGKILL)
        boot(vm)
        writes_on(vm)
        let_fill(vm)
        assert not needs(vm)
        for name, each in disks(vm).items():
            assert "backing-filename" not in json.loads(
                subprocess.check_output(["qemu-img", "info", "-U", "--output=json", each["path"]])
            ), name
        writes_on(vm)
        made = len(vm.log())
        vm.tell_hook("fail")
        assert "hook before_boot" in vm.refused("rollback", point)  # when there is a head already, and no guest
        assert vm.run.ended() == 1
        boot_or_resume(vm)
        assert vm.guest.boot_id == booted
        assert disk_walked(vm) < then + DISK_BLOCKS
        writes_on(vm)
        assert len(list((vm.folder / "perdure-overlays").iterdir())) == 2  # those before were captured, and are gone
        assert [each["cause"] for each in vm.log()[made:]] == ["before rollback", "rollback"]
        vm.guest.run("finish()")  # in the middle of a step the disks differ
        vm.lose_power()
        boot(vm)  # disks are still being filled, and as the guest has left them
        assert (
            f"disk one is {disks(vm)['one']['path']} since it went back to {point}, which is being filled"
            in vm.run.text
        )
        assert vm.guest.boot_id != booted
        vm.guest.run(LOOK)
        vm.guest.run(ORDINARY + ON_DISK.replace("[0], []", f"[{highest(vm, '/dev/vda')}], []"))
        writes_on(vm)
        let_fill(vm)
        vm.until(lambda: disk_walked(vm) > then + 2 * DISK_BLOCKS, "the guest is further than it was in the generation")
        vm.guest.run("finish()")
        steps, booted = disk_walked(vm), vm.guest.boot_id
        vm.guest.run(ORDINARY)
        goes_on(vm)
        memory_then = walked(vm)
        mixed = vm.perdure("rollback", point, "--disk", "two", "--force", "--lazy")
        assert mixed["lazy"]
        vm.run.expect(r"pause_ms_max is 1: after 2 rounds")
        assert vm.guest.wait_ready(SECONDS) == booted
        assert walked(vm) >= memory_then and disk_walked(vm) == steps  # memory goes on
        goes_on(vm)
        assert highest(vm, "/dev/vda") == steps
        assert 0 < highest(vm, "/dev/vdb") < then + DISK_BLOCKS < steps
        assert {name: each["state"] for name, each in disks(vm).items()} == {"one": "filled", "two": "filling"}
        for name, number in (("one", mixed["captured"]), ("two", 1)):
            assert stored(vm, mixed["goes_on_as"], name) == stored(vm, number, name)
        let_fill(vm)
        back = vm.perdure("rollback", f"{NAME}@{mixed['captured']}", "--memory-only", "--force")
        assert vm.guest.wait_ready(SECONDS) == booted
        assert highest(vm, "/dev/vdb") < then + DISK_BLOCKS  # as it was
        assert stored(vm, back["goes_on_as"], "two") == stored(vm, 1, "two")
        graph = vm.lines("log", NAME, "--graph")
        assert any(line.startswith("|-'") for line in graph) and graph[-1].split()[:2] == ["*", f"{NAME}@1"]
        parents = {each["generation"]: each["parent_name"] for each in vm.log()}
        assert [parents.get(number) for number in range(1, 6)] == [None, point, None, f"{NAME}@2", point]
        vm.perdure("stop", NAME)
        assert vm.run.ended() == 0
        vm.perdure("forget", point)
        assert [each["state"] for each in disks(vm).values()] == ["filled", "filled"]
        vm.perdure("disks", NAME, "--reset", "one")
        assert [each["disk"] for each in vm.perdure("disks", NAME)["left"]] == ["one"]
        vm.perdure("disks", NAME, "--clean")
        assert [path.name.split("-")[1] for path in (vm.folder / "perdure-overlays").iterdir()] == ["two"]
        assert before == {name: hashed(vm.folder / name) for name in ("one", "two")}
