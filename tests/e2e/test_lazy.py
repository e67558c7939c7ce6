"""Lazy restore, end to end, on real QEMU: the VM is there at once, and its memory is what it was, whatever happens.

Judged by a program in the guest that finds every page of its memory that is not of the instant, by what it verifies of
its persistent memory, and by QEMU's own pmemsave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from supervised import NAME, SECONDS, Image, Supervised
from test_full import ORDINARY, full, goes_on, judged, nothing_is_left, walked
from test_survival import Lender, await_boot, boot, content, only, reboot, snapshot, write

from restore import claims as record

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def lender(guest_image: Image) -> Iterator[Lender]:
    made = Lender(guest_image)
    yield made
    made.close()


@pytest.fixture
def vm(lender: Lender) -> Iterator[Supervised]:
    """A running VM whose guest walks over its memory."""
    vm = lender.lend("auto")
    vm.guest.run(ORDINARY)
    yield vm
    print(vm.report())  # shown for a test that fails
    for log in vm.runtime.glob("pages.log"):
        print(log.read_text())


def words(vm: Supervised, which: int) -> int:
    """A word of the record of the restore that is under way; 0 if there is none."""
    with contextlib.suppress(OSError, struct.error):
        for path in vm.runtime.glob(f"memory*/{record.CLAIMS}"):
            with path.open("rb") as file:
                return int(struct.unpack("<Q", os.pread(file.fileno(), 8, 8 * which))[0])
    return 0


def resume(vm: Supervised, point: str, *more: str) -> Any:
    """Go back to a point, lazily; nothing looks at memory before the guest does."""
    vm.tell_hook("nothing")  # else it looks, where an earlier test has wanted that
    done = vm.perdure("rollback", point, "--lazy", "--discard", *more)
    assert done["resumed"]
    return done


def pace(vm: Supervised, how: int) -> None:
    """How fast its page server places what nobody waits for, from now on."""
    [path] = vm.runtime.glob(f"memory*/{record.CLAIMS}")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<Q", how), 8 * record.PACE)


def kill_server(vm: Supervised) -> bool:
    """SIGKILL; whether there was one."""
    server = words(vm, record.SERVER)
    if server:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
            return True
    return False


def all_there(vm: Supervised) -> None:
    vm.until(lambda: vm.status()["lazy"] is None, "all of its memory is there")
    assert not list(vm.runtime.glob("memory*/lazy.*"))


@contextlib.contextmanager
def slow_to_let_go(vm: Supervised) -> Iterator[None]:
    """Its QEMU takes a second for each file that it removes, and so for each socket that it listened on."""
    delay = ("--trace=unlink", "--inject=unlink:delay_enter=1s")
    words = ["strace", "-f", "-p", str(vm.status()["pid"]), *delay]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        yield
        strace.stderr.read()  # until that QEMU has ended
    assert strace.returncode == 0


def test_a_vm_goes_on_at_once_and_its_page_server_may_be_killed_at_any_time(vm: Supervised) -> None:
    area = write(vm, "kept", 5)
    made = judged(vm)
    point, then, booted = f"{NAME}@{made['generation']}", walked(vm), vm.guest.boot_id
    vm.guest.run(f"memory[:] = content(6, {area.size})")
    goes_on(vm)
    with slow_to_let_go(vm):
        resume(vm, point)
    assert (vm.runtime / "qmp.sock").exists()  # and not removed by the one before
    assert (vm.runtime / "agent.sock").exists()
    pace(vm, record.FAULTS_ONLY)  # else all may be there before a busy machine has started a command
    told = vm.status()["lazy"]
    assert told["faults"] > 0
    assert told["percent"] < 100
    assert kill_server(vm)
    assert vm.guest.wait_ready(SECONDS) == booted
    assert vm.guest.run("steps[0]") < then + 10000
    pace(vm, record.FOR_A_SHARE)
    for _ in range(3):
        servers = words(vm, record.SERVERS)
        kill_server(vm)
        vm.until(lambda: words(vm, record.SERVERS) != servers, "another one, or all is there")  # noqa: B023  used up in this turn
        walked(vm)
    all_there(vm)
    goes_on(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 5)")
    vm.run.look()
    assert "another one goes on" in vm.run.text
    second = judged(vm)
    assert second["dirty_bytes"] < made["region_bytes"] / 4  # pages that were placed do not count as changed
    assert "qemu-system" in (vm.state / "vms" / NAME / "qemu.loaded").read_text()  # for the next launch
    nothing_is_left(vm)


def test_its_supervisor_may_be_killed_and_memory_is_whole_before_it_is_captured(vm: Supervised) -> None:
    area = write(vm, "kept", 7)
    point = f"{NAME}@{full(vm)['generation']}"
    resume(vm, point)
    vm.run.kill()
    kill_server(vm)
    boot(vm)
    goes_on(vm)
    made = full(vm)  # which needs all of it
    assert vm.status()["lazy"] is None
    judged(vm)
    vm.tell_hook("nothing")
    with vm.beside("rollback", f"{NAME}@{made['generation']}", "--lazy", "--discard"):
        # It was never resumed: that is from the other one.
        vm.until(lambda: words(vm, record.PREFETCHED), "what the last resume touched is fetched ahead")
    vm.run.kill()  # its page server goes on
    boot(vm)
    goes_on(vm)
    all_there(vm)
    judged(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 7)")


def test_a_reboot_or_the_end_of_qemu_meanwhile_costs_nothing_of_what_is_kept(vm: Supervised) -> None:
    area = write(vm, "kept", 8)
    point = f"{NAME}@{full(vm)['generation']}"
    resume(vm, point)
    vm.guest.wait_ready(SECONDS)
    vm.guest.run("finish()")
    reboot(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 8)")
    all_there(vm)
    resume(vm, point)
    vm.kill_qemu()
    assert vm.run.ended() == 1
    latest = vm.log()[-1]
    assert (latest["cause"], latest["full"]) == ("crash", False)
    assert area.of(vm.export()) == content(8)
    boot(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 8)")


def test_a_guest_waits_for_what_cannot_be_read_and_goes_on_when_it_can(vm: Supervised) -> None:
    area = write(vm, "kept", 9)
    part = f"{NAME}@{snapshot(vm)['generation']}"
    before = set((vm.repository / "packs").iterdir())
    made = full(vm)
    packs = [path for path in set((vm.repository / "packs").iterdir()) - before if path.stat().st_size > 1 << 20]
    whole = {path: path.read_bytes() for path in packs}

    def spoil() -> None:
        resume(vm, f"{NAME}@{made['generation']}")
        server = words(vm, record.SERVER)
        assert server
        os.kill(server, signal.SIGSTOP)
        assert words(vm, record.PHASE) == record.SERVING
        for path, data in whole.items():
            spoilt = bytearray(data)
            spoilt[200:-300:50] = bytes(each ^ 1 for each in spoilt[200:-300:50])
            path.chmod(0o600)
            path.write_bytes(spoilt)
        os.kill(server, signal.SIGCONT)

    spoil()
    vm.run.expect(rf"waits for memory: {NAME}@{made['generation']}: .* of region .* cannot be read: packs/")
    assert "cannot be read: packs/" in vm.status()["lazy"]["problem"]
    assert "is not all there" in vm.refused("snapshot", NAME)
    vm.run.kill()
    vm.start().expect("waits for memory")  # be QEMU silent for it, or not
    for path, data in whole.items():
        path.write_bytes(data)
    vm.run.expect("all of its memory is there")
    vm.guest.wait_ready(SECONDS)
    goes_on(vm)
    judged(vm)
    booted = vm.guest.boot_id
    spoil()
    vm.run.expect("or go back elsewhere with `perdure rollback VM@N --discard`")
    vm.until(lambda: words(vm, record.HELD), "the guest waits")
    vm.perdure("rollback", part, "--discard")
    await_boot(vm, booted)
    assert vm.guest.run(f"holds('kept', {area.size}, 9)")
    for path, data in whole.items():
        path.write_bytes(data)


def test_run_resumes_lazily_after_power_loss(vm: Supervised) -> None:
    area = write(vm, "kept", 10)
    full(vm)
    booted = vm.guest.boot_id
    vm.lose_power()
    vm.tell_hook("nothing")
    vm.boot("--lazy")
    assert "its memory comes as it is touched" in vm.run.text
    assert vm.guest.boot_id == booted
    goes_on(vm)
    all_there(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 10)")
    judged(vm)


def test_a_guest_boots_at_once_and_finds_what_is_tagged_and_nothing_else(vm: Supervised) -> None:
    """From a full generation, which has what is not tagged as well, and from what history goes on from after that."""
    area = write(vm, "kept", 11)
    vm.guest.run("_, loose = untagged(2 << 20); loose[:] = b'secret01' * (len(loose) // 8)")
    point, expected = f"{NAME}@{full(vm)['generation']}", b""
    vm.judge_boots()
    for words in (("--boot",), ()):
        before, boots = vm.guest.boot_id, vm.boots
        done = vm.perdure("rollback", point, "--lazy", "--discard", *words)
        assert (done["resumed"], done["lazy"]) == (False, True)
        assert vm.boots == boots + 1
        with vm.before_boot() as found:  # which the judge has touched first of all
            expected = expected or only(found["pm0"], area)
            assert found["pm0"][:] == expected
            assert area.of(expected) == content(11)
            assert found["ram"].find(b"secret01") < 0
        await_boot(vm, before)
        assert vm.guest.run(f"holds('kept', {area.size}, 11)")
        all_there(vm)
        point = f"{NAME}@{done['goes_on_as']}"
    assert not vm.perdure("rollback", point, "--eager", "--discard")["lazy"]
