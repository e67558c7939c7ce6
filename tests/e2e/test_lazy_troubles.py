"""What goes wrong while a VM is resumed lazily, before its guest goes on, end to end on real QEMU.

Judged by a guest that finds every page of its memory that is not of the instant, and by QEMU's own pmemsave.
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
from supervised import NAME, SECONDS, Image, Supervised
from test_back import described, let_fill, reported, server
from test_full import (
    ON_DISK,
    ORDINARY,
    TWO_DISKS,
    boot_or_resume,
    disk_walked,
    full,
    goes_on,
    image,
    judged,
    walked,
    writes_on,
)
from test_lazy import all_there, kill_server
from test_survival import boot, content, write

from restore import claims as record

pytestmark = pytest.mark.qemu

MOMENTS, DENIED = (Path(__file__).parent / name for name in ("moments", "denied"))

COMMANDS = (
    *("query-memory-devices", "human-monitor-command", "qom-list", "query-named-block-nodes", "query-status"),
    *("query-migrate", "query-block", "migrate-set-capabilities", "getfd", "migrate-incoming", "cont"),
)[: None if os.environ.get("PERDURE_FAULTS") == "all" else 0]
"""Of a launch, at which QEMU hangs; one is always tried, beside these."""


class Momentous(Supervised):
    """A VM to whose supervisors something can be made to happen."""

    def __init__(self, image: Image, settings: str = "") -> None:
        super().__init__(image, settings=settings)
        self.momentous()

    @contextlib.contextmanager
    def asked(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A command that works while the block does."""
        command = [sys.executable, "-m", "perdure", *words]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Momentous]:
    with contextlib.closing(Momentous(guest_image)) as vm, reported(vm):
        boot(vm)
        vm.guest.run(ORDINARY)
        yield vm


def lost(vm: Supervised) -> tuple[str, dict[Path, bytes]]:
    """A shell script that takes away what is in large packs, and what was there."""
    packs = [path for path in (vm.repository / "packs").iterdir() if path.stat().st_size > 1 << 20]
    return "".join(f": > {path}\n" for path in packs), {path: path.read_bytes() for path in packs}


def paced(runtime: Path, pace: int) -> str:
    """A shell script that tells a VM's page server how fast to place what nobody waits for."""
    claims = f"$(echo {runtime}/memory*/lazy.claims)"
    return f"printf '\\{pace}' | dd status=none conv=notrunc of={claims} bs=1 seek={8 * record.PACE}"


def with_copies(vm: Supervised) -> Any:
    """A full generation, and the judge's copies of the disks at that instant; the guest goes on."""
    vm.judge.execute("stop")
    for name, kind in (("one", "raw"), ("two", "qcow2")):
        image("convert", "-U", "-f", kind, "-O", "raw", vm.folder / name, vm.folder / f"{name}.judge")
    return full(vm)


def put_back(packs: dict[Path, bytes]) -> None:
    for path, data in packs.items():
        path.write_bytes(data)


def rolling_back(vm: Momentous, point: str, *words: str) -> Any:
    return vm.asked("rollback", point, "--lazy", "--json", *words)


def test_what_holds_a_launch_up_is_said_at_once_and_nothing_is_half_made(vm: Momentous) -> None:
    """A pack that cannot be read, and a fresh QEMU that does not move, while it loads the state of its devices."""
    area = write(vm, "kept", 1)
    point, booted = f"{NAME}@{full(vm)['generation']}", vm.guest.boot_id
    script, packs = lost(vm)
    vm.at("migrate-incoming", script)
    with rolling_back(vm, point, "--discard") as asked:
        said = vm.run.expect(rf"waits for memory: ({point}: \S+ of region \w+ cannot be read: packs/.*); it goes on")
        assert asked.stderr is not None and said[1] in asked.stderr.readline()
        told = vm.status()
        assert (told["state"], told["lazy"]["problem"]) == ("rolling back", said[1])
        assert "--from VM@N" in vm.run.text
        put_back(packs)
        assert json.loads(asked.communicate(timeout=SECONDS)[0])["resumed"]
    assert vm.guest.wait_ready(SECONDS) == booted
    goes_on(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 1)")

    vm.guest.run(f"memory[:] = content(2, {area.size})")
    then = walked(vm)
    vm.at("migrate-incoming", f"touch {vm.folder}/hung; kill -STOP $QEMU")
    with rolling_back(vm, point) as asked:
        assert "QEMU did not give the answer to `migrate-incoming` within" in asked.communicate(timeout=SECONDS)[1]
    assert vm.run.ended() == 1
    (vm.folder / "hung").unlink()
    assert not list(vm.runtime.glob("memory*/*"))
    captured, head = vm.log()[-2:]
    assert (captured["cause"], captured["full"], head["parent_name"]) == ("before rollback", True, point)
    before = f"{NAME}@{captured['generation']}"
    assert f"{NAME} does not run: it was captured before, as {before}; the next `perdure run` goes on" in vm.run.text

    for command in COMMANDS:
        vm.at(command, f"touch {vm.folder}/hung; kill -STOP $QEMU")
        run = vm.start("--from", before, "--lazy")
        assert run.ended() == 1, command
        assert f"QEMU did not give the answer to `{command}` within" in run.text
        (vm.folder / "hung").unlink()
        assert not list(vm.runtime.glob("memory*/*"))

    script, packs = lost(vm)
    vm.at("migrate-incoming", script)
    run = vm.start("--from", before, "--lazy")
    run.expect("waits for memory")
    run.process.send_signal(signal.SIGINT)  # whoever waits may give it up
    assert run.ended() == 1
    assert f"is waited for: {before}" in run.text
    put_back(packs)
    boot_or_resume(vm)
    assert vm.guest.boot_id == booted
    assert walked(vm) >= then
    assert vm.guest.run(f"holds('kept', {area.size}, 2)")
    judged(vm)


def test_keys_are_rotated_and_servers_killed_while_memory_and_disks_come(guest_image: Image) -> None:
    """What is still missing is sealed anew with keys that neither server was given, and its packs are deleted."""
    with contextlib.closing(Momentous(guest_image, TWO_DISKS)) as vm, reported(vm):
        described(vm, content_bytes=2 << 20)
        boot(vm)
        vm.guest.run(ORDINARY + ON_DISK)
        area = write(vm, "kept", 3)
        writes_on(vm)
        point, booted = f"{NAME}@{with_copies(vm)['generation']}", vm.guest.boot_id
        vm.guest.run(f"memory[:] = content(4, {area.size})")
        writes_on(vm)
        packs = sorted(path.name for path in (vm.repository / "packs").iterdir())
        vm.at("migrate-incoming", paced(vm.runtime, record.FAULTS_ONLY))
        done = vm.perdure("rollback", point, "--lazy")
        assert done["resumed"] and done["lazy"] and done["captured"]
        assert vm.status()["lazy"]["percent"] < 100
        vm.perdure("forget", f"{NAME}@{done['captured']}")
        rewritten = vm.perdure("key", "rotate", "--rewrite")
        vm.perdure("prune")
        assert rewritten["epoch"] == 2
        assert not {path.name for path in (vm.repository / "packs").iterdir()} & set(packs)
        vm.run.expect("keys were changed, and its page server is given the new ones")
        vm.run.expect("keys were changed, and the server of disk one, two is given the new ones")
        assert vm.guest.wait_ready(SECONDS) == booted
        disk_walked(vm)
        for name in ("one", "two"):  # the judge's copies of that instant
            image("compare", "-f", "raw", f"nbd+unix:///{name}?socket={server(vm)[1]}", vm.folder / f"{name}.judge")
        kill_server(vm)
        os.kill(server(vm)[0], signal.SIGKILL)
        writes_on(vm)  # which reads every block
        goes_on(vm)
        subprocess.run(paced(vm.runtime, record.FOR_A_SHARE), shell=True, check=True)
        let_fill(vm)
        all_there(vm)
        assert vm.judge.read(area.address, area.size) == content(3)


def test_where_memory_cannot_be_served_it_is_restored_before_and_that_is_said(guest_image: Image) -> None:
    """Real obstacles, by filters of system calls: no userfaultfd for QEMU; no PAGEMAP_SCAN, as in an older kernel."""

    def forbid(vm: Supervised, what: str) -> None:
        path = f"{DENIED}:{vm.environment['PYTHONPATH']}"
        vm.run_environment = {"PYTHONPATH": path, "PERDURE_TEST_DENIED": what}

    def restored_before(vm: Supervised, why: str) -> None:
        text = f"memory is restored before the guest begins: {why}"
        vm.run.look()
        assert text in vm.run.text
        told = vm.status()
        assert told["lazy"] is None
        assert any(each.startswith(text) for each in told["warnings"])
        assert any(line.startswith(f"warning      {text}") for line in vm.lines("status", NAME))
        assert vm.guest.wait_ready(SECONDS) == booted
        goes_on(vm)
        assert vm.judge.read(area.address, area.size) == content(5)

    with contextlib.closing(Supervised(guest_image)) as vm, reported(vm):
        forbid(vm, "userfaultfd")
        boot(vm)
        vm.guest.run(ORDINARY)
        area, booted = write(vm, "kept", 5), vm.guest.boot_id
        point = f"{NAME}@{full(vm)['generation']}"
        vm.guest.run(f"memory[:] = content(6, {area.size})")
        assert not vm.perdure("rollback", point, "--lazy", "--discard")["lazy"]
        restored_before(vm, "QEMU (pid")
        vm.perdure("stop", NAME)
        assert vm.run.ended() == 0
        forbid(vm, "pagemap_scan")
        vm.boot("--from", point, "--lazy")
        restored_before(vm, "PAGEMAP_SCAN does not work here")
