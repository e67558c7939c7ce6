"""Full generations, end to end, on real QEMU: all memory and the devices at one instant, while the guest goes on.

Judged by QEMU's own pmemsave of a guest that somebody else has stopped, and by a program in the guest that finds every
page of its ordinary memory torn which is not of the instant.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elf import Core
from supervised import CPU, MEMORY, MIB, NAME, PAGE, SECONDS, Image, Supervised
from test_survival import FIRMWARE, TRACKERS, Lender, boot, content, only, reboot, write

pytestmark = pytest.mark.qemu

PAGES = 512
TWO_DISKS = """
[[disk]]
name = "one"
file = "one"
[[disk]]
name = "two"
file = "two"
format = "qcow2"
cache = "none"
"""
ORDINARY = f"""
import time
ordinary = mmap.mmap(-1, {PAGES * PAGE})
numbers, steps, torn = memoryview(ordinary).cast("Q"), [0], []

def walk():
    step = steps[0] + 1
    at = step * 7 % {PAGES} * 512
    if numbers[at] != max(0, step - {PAGES}):
        torn.append([step, numbers[at]])
    numbers[at] = steps[0] = step
    if step % 8 == 0:
        time.sleep(0.0005)

work(walk)
"""
"""A walk over pages that takes all of them in turn: each must hold the step in which it was there last."""


@pytest.fixture(scope="module")
def lender(guest_image: Image) -> Iterator[Lender]:
    made = Lender(guest_image)
    yield made
    made.close()


@pytest.fixture(params=TRACKERS)
def vm(request: pytest.FixtureRequest, lender: Lender) -> Iterator[Supervised]:
    """A running VM whose guest walks, with each tracker that this kernel can have."""
    vm = lender.lend(request.param)
    vm.guest.run(ORDINARY)
    yield vm
    print(vm.report())  # shown for a test that fails


whatever_tracker = pytest.mark.parametrize("vm", ["auto"], indirect=True)


def walked(vm: Supervised) -> int:
    """Steps so far; nothing was torn."""
    steps, torn = vm.guest.run("[steps[0], torn[:3]]")
    assert torn == []
    return int(steps)


def goes_on(vm: Supervised) -> None:
    """The guest takes as many steps as there are pages, so that every one of them is looked at."""
    began = walked(vm)
    vm.until(lambda: walked(vm) > began + PAGES, "the guest goes on")


def export(vm: Supervised, number: int, region: str) -> bytes:
    path = vm.folder / "export-full"
    vm.perdure("export", f"{NAME}@{number}", region, path)
    found = path.read_bytes()
    path.unlink()
    return found


def boot_or_resume(vm: Supervised, *words: str) -> None:
    """`perdure run` until the guest answers; nothing is sent to it."""
    vm.boot(*words)


def different_pages(a: Any, b: Any) -> list[int]:
    """Numbers of the pages in which two regions differ."""
    pages = [np.frombuffer(each[:], np.uint64).reshape(-1, PAGE // 8) for each in (a, b)]
    return np.flatnonzero((pages[0] != pages[1]).any(axis=1)).tolist()


def full(vm: Supervised) -> Any:
    made = vm.perdure("snapshot", NAME, "--full")
    assert made["full"]
    return made


def judged(vm: Supervised) -> Any:
    """A full generation of a guest that the judge has stopped, and dumped: they are equal. The guest goes on."""
    vm.judge.execute("stop")
    with vm.memory() as there:
        made = full(vm)
        for region, memory in there.items():
            assert export(vm, made["generation"], region) == memory[:], region
    goes_on(vm)
    return made


def nothing_is_left(vm: Supervised) -> None:
    """In QEMU, of what a save needs."""
    capabilities = vm.judge.execute("query-migrate-capabilities")
    assert [each["capability"] for each in capabilities if each["state"]] == []
    assert vm.judge.execute("query-migrate-parameters")["max-bandwidth"] == 128 * MIB
    assert vm.judge.execute("query-status")["status"] == "running"


def test_full_generations_are_all_memory_at_one_instant(vm: Supervised) -> None:
    write(vm, "kept", 1)
    vm.guest.run(
        f"_, there = untagged({2 * MIB}); there[:] = content(2, {2 * MIB})"
    )  # not tagged: only full ones have it
    first = judged(vm)
    vm.guest.run("change([3, 5], 700)")
    part = vm.perdure("snapshot", NAME)
    assert not part["full"]
    assert part["dirty_bytes"] == 2 * PAGE
    second = judged(vm)
    assert second["dirty_bytes"] < first["dirty_bytes"] / 2
    nothing_is_left(vm)
    *_, one, two, three = vm.log()
    assert [each["full"] for each in (one, two, three)] == [True, False, True]
    assert [each["name"] for each in two["regions"]] == ["pm0"]
    assert {(each["name"], each["kind"]) for each in three["regions"]} == {
        ("ram", "ram"),
        ("pm0", "pmem"),
        ("device", "device"),
    }
    vm.guest.run("finish()")
    reboot(vm)  # memory is scrubbed, which no tracker sees
    vm.guest.run(ORDINARY)
    judged(vm)


@whatever_tracker
def test_an_elf_core_of_a_full_generation_is_as_the_one_that_qemu_dumps(vm: Supervised) -> None:
    """Registers and memory, of a guest that the judge has stopped."""
    area = write(vm, "kept", 10)
    part = vm.perdure("snapshot", NAME)
    vm.judge.execute("stop")
    theirs, ours = vm.folder / "theirs", vm.folder / "ours"
    vm.judge.execute("dump-guest-memory", paging=False, protocol=f"file:{theirs}")
    made = full(vm)
    goes_on(vm)
    point = f"{NAME}@{made['generation']}"
    said = vm.perdure("export", point, ours, "--format", "elf")
    assert said["written_bytes"] < ours.stat().st_size == said["bytes"]
    dump, core = Core(theirs), Core(ours)
    assert core.notes == dump.notes
    assert {kind for _, kind, _ in core.notes} == {0, 1}
    for load in dump.loads:
        for start in range(load.physical, min(load.physical + load.size, MEMORY), PAGE):
            if start // PAGE not in FIRMWARE:
                assert core.physical(start, PAGE) == dump.physical(start, PAGE), hex(start)
    assert area.of(export(vm, made["generation"], "pm0")) == core.physical(area.address, area.size) == content(10)
    assert "perdure snapshot --full" in vm.refused("export", f"{NAME}@{part['generation']}", ours, "--format", "elf")
    assert "leave out REGION" in vm.refused("export", point, "ram", ours, "--format", "elf", code=2)
    assert "which region" in vm.refused("export", point, ours, code=2)


@contextlib.contextmanager
def without_captures_at_reboots(vm: Supervised) -> Iterator[None]:
    """Under supervisors of its own."""
    described = (vm.folder / "VM.toml").read_text()
    vm.run.kill()
    (vm.folder / "VM.toml").write_text(described.replace("[policy]\n", "[policy]\ncapture_on_reboot = false\n"))
    try:
        boot(vm)
        yield
        vm.run.kill()
    finally:
        (vm.folder / "VM.toml").write_text(described)
    boot(vm)


@whatever_tracker
def test_what_a_reboot_without_a_capture_scrubs_is_not_in_the_next_full_generation(vm: Supervised) -> None:
    """Holes in an untagged part of persistent memory are no writes: no tracker sees them."""
    with without_captures_at_reboots(vm):
        write(vm, "kept", 11)
        gone = write(vm, "given back", 12)
        vm.guest.run(f"perdure_guest.unmark_persistent({gone.address}, {gone.size})")
        made = judged(vm)
        vm.guest.run("finish()")
        reboot(vm)
        assert vm.log()[-1]["id"] == made["id"]
        vm.guest.run(ORDINARY)
        judged(vm)


@whatever_tracker
def test_a_killed_supervisor_costs_no_page_of_a_full_generation_and_leaves_nothing_in_qemu(vm: Supervised) -> None:
    write(vm, "kept", 3)
    made = judged(vm)
    vm.guest.run("change([2, 4], 300)")
    vm.perdure("snapshot", NAME)
    vm.run.kill()
    (vm.runtime / "parent").write_text(made["id"])  # as if it had been killed between this and the journal
    boot(vm)
    if vm.status()["tracker"].startswith("userfaultfd"):
        assert vm.baseline_of("ram") == made["id"]
    judged(vm)
    history = vm.log()
    vm.killed_at("migrate", "snapshot", NAME, "--full")
    assert vm.log() == history
    boot(vm)
    goes_on(vm)
    nothing_is_left(vm)
    judged(vm)


@whatever_tracker
def test_a_guest_that_is_killed_in_a_full_capture_leaves_its_persistent_memory(vm: Supervised) -> None:
    area = write(vm, "kept", 4)
    vm.at("migrate", "kill -KILL $QEMU")
    with vm.beside("snapshot", NAME, "--full"):
        assert vm.run.ended() == 1
    latest = vm.log()[-1]
    assert not latest["full"]
    assert area.of(vm.export()) == content(4)


@whatever_tracker
def test_a_rollback_to_a_full_generation_goes_on_from_its_instant(vm: Supervised) -> None:
    """In a fresh QEMU, with a new generation id and new random numbers, and everything works as before."""
    area = write(vm, "kept", 5)
    vm.guest.run("time.clock_settime(time.CLOCK_REALTIME, 1e9)")
    made = judged(vm)
    then = walked(vm)
    vm.guest.run(f"memory[:] = content(6, {area.size})")
    goes_on(vm)
    before, generation_id, booted = vm.status(), vm.judge.execute("query-vm-generation-id"), vm.guest.boot_id
    vm.judge_boots()
    asked = time.time()
    done = vm.perdure("rollback", f"{NAME}@{made['generation']}")
    assert done["resumed"]
    assert vm.guest.wait_ready(SECONDS) == booted
    assert vm.guest.run("steps[0]") < then + PAGES
    goes_on(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 5)")
    vm.until(lambda: "the kernel's random numbers are new" in vm.console, "the agent has noticed")
    assert vm.guest.run("time.time()") > asked
    assert vm.status()["pid"] != before["pid"]
    assert vm.judge.execute("query-vm-generation-id") != generation_id
    with vm.before_boot() as found:  # as the hook found it, before the guest went on
        assert export(vm, made["generation"], "pm0") == found["pm0"][:]
        assert len(different_pages(export(vm, made["generation"], "ram"), found["ram"])) == 1  # the generation id
    captured, head = vm.log()[-2:]
    assert (captured["cause"], captured["generation"], captured["full"]) == ("before rollback", done["captured"], True)
    assert (head["cause"], head["parent"], head["full"]) == ("rollback", made["id"], True)
    nothing_is_left(vm)
    judged(vm)
    reboot(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 5)")
    vm.perdure("rollback", f"{NAME}@{captured['generation']}", "--discard")
    assert vm.guest.wait_ready(SECONDS) == booted
    assert walked(vm) > then + PAGES
    assert vm.guest.run(f"holds('kept', {area.size}, 6)")


@whatever_tracker
def test_a_resume_that_is_cut_short_before_the_guest_goes_on_is_begun_anew(vm: Supervised) -> None:
    """Also where the state of the devices was loaded already, and only the user's hook was under way."""
    area = write(vm, "kept", 8)
    made = full(vm)
    booted = vm.guest.boot_id
    vm.guest.run(f"memory[:] = content(9, {area.size})")
    vm.tell_hook("fail")
    assert "hook before_boot" in vm.refused("rollback", f"{NAME}@{made['generation']}", "--discard")
    assert vm.run.ended() == 1
    vm.tell_hook("kill-supervisor")
    assert vm.start().ended() == -signal.SIGKILL
    boot_or_resume(vm)
    assert "before the guest began: once more" in vm.run.text
    assert vm.guest.boot_id == booted
    goes_on(vm)
    assert vm.guest.run(f"holds('kept', {area.size}, 8)")
    assert vm.log()[-1]["id"] == made["id"]


@whatever_tracker
def test_a_full_generation_can_be_gone_on_from_or_booted_after_power_loss(vm: Supervised) -> None:
    area = write(vm, "kept", 7)
    vm.guest.run(f"_, there = untagged({2 * MIB}); there[:] = content(2, {2 * MIB})")
    full(vm)
    booted = vm.guest.boot_id
    vm.lose_power()
    boot_or_resume(vm)
    assert "resumed" in vm.run.text
    assert vm.guest.boot_id == booted
    goes_on(vm)
    number = full(vm)["generation"]
    vm.lose_power()
    vm.judge_boots()
    boot(vm, "--from", f"{NAME}@{number}", "--boot")
    assert vm.guest.boot_id != booted
    with vm.before_boot() as found:
        assert found["pm0"][:] == only(export(vm, number, "pm0"), area)
    assert vm.guest.run(f"holds('kept', {area.size}, 7)")
    head = vm.log()[-1]
    assert (head["cause"], head["full"], [each["name"] for each in head["regions"]]) == ("boot", False, ["pm0"])
    vm.guest.run(ORDINARY)
    judged(vm)
    vm.lose_power()
    description = (vm.folder / "VM.toml").read_text()
    other = description.replace(f"memory = {MEMORY}", f"memory = {2 * MEMORY}").replace(f'"{CPU}"', '"qemu64"')
    (vm.folder / "VM.toml").write_text(other)
    run = vm.start()
    assert run.ended() == 1
    assert f"main memory was {MEMORY} and is {2 * MEMORY}; CPU model was {CPU} and is qemu64" in run.text
    assert "--boot" in run.text
    (vm.folder / "VM.toml").write_text(description.replace('"pvpanic-pci"', '"virtio-rng-pci"'))
    run = vm.start()
    assert run.ended() == 1
    assert "it lacks -device pvpanic-pci; it has -device virtio-rng-pci" in run.text
    (vm.folder / "VM.toml").write_text(description)
    boot_or_resume(vm)


DISK_BLOCKS = 64
ON_DISK = f"""
buffer = mmap.mmap(-1, 65536)
block = memoryview(buffer).cast("Q")
disks = [os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) for path in ("/dev/vda", "/dev/vdb")]
disk_steps, disk_torn = [0], []

def write_disks():
    step = disk_steps[0] + 1
    at = step * 5 % {DISK_BLOCKS} * 65536
    for disk in disks:
        os.preadv(disk, [buffer], at)
        if block[0] != max(0, step - {DISK_BLOCKS}) or block[8191] != block[0]:
            disk_torn.append([step, block[0], block[8191]])
        block[0] = block[8191] = step
        os.pwritev(disk, [buffer], at)
    disk_steps[0] = step
    time.sleep(0.001)

work(write_disks)
"""
"""A walk over two disks, past every cache, like the one over memory."""


def disk_walked(vm: Supervised) -> int:
    """Steps so far; on neither disk was there anything that is not of the instant."""
    steps, torn = vm.guest.run("[disk_steps[0], disk_torn[:3]]")
    assert torn == []
    return int(steps)


def writes_on(vm: Supervised) -> None:
    """The guest writes every block of its disks once more, and so has read all of them."""
    began = disk_walked(vm)
    vm.until(lambda: disk_walked(vm) > began + DISK_BLOCKS, "the guest writes on")


def image(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def no_nodes_are_left(vm: Supervised) -> None:
    nodes = [each["node-name"] for each in vm.judge.execute("query-named-block-nodes", flat=True)]
    assert sorted(nodes) == ["disk-one", "disk-two", "file-one", "file-two"]
    assert not list(vm.runtime.glob("perdure-*"))
    nothing_is_left(vm)


def judged_with_disks(vm: Supervised) -> Any:
    """A full generation with both disks as they were when the judge had stopped the guest, which then writes on."""
    vm.judge.execute("stop")
    for name, kind in (("one", "raw"), ("two", "qcow2")):
        image("convert", "-U", "-f", kind, "-O", "raw", vm.folder / name, vm.folder / f"{name}.judge")
    made = full(vm)
    for name in ("one", "two"):
        vm.perdure("export", f"{NAME}@{made['generation']}", f"disk:{name}", vm.folder / f"{name}.out", "--force")
        image("compare", "-f", "raw", "-F", "raw", vm.folder / f"{name}.judge", vm.folder / f"{name}.out")
    writes_on(vm)
    return made


def test_disks_are_captured_at_the_same_instant_and_gone_back_to(guest_image: Image) -> None:
    """Raw and qcow2, while the guest writes on; the one with the host's cache, the other without."""
    with contextlib.closing(Supervised(guest_image, settings=TWO_DISKS)) as vm:
        vm.momentous()
        image("create", "-f", "raw", vm.folder / "one", "16M")
        image("create", "-f", "qcow2", vm.folder / "two", "24M")
        boot(vm)
        assert vm.status()["full"] == "possible"
        vm.guest.run(ORDINARY + ON_DISK)
        writes_on(vm)
        judged_with_disks(vm)
        no_nodes_are_left(vm)
        vm.killed_at("block-export-add", "snapshot", NAME, "--full")
        boot(vm)
        writes_on(vm)
        no_nodes_are_left(vm)
        made = judged_with_disks(vm)
        point, booted, steps = f"{NAME}@{made['generation']}", vm.guest.boot_id, disk_walked(vm)
        vm.perdure("stop", NAME)
        assert vm.run.ended() == 0
        (vm.folder / "two").write_bytes(b"")  # nobody needs it, nor is it written
        boot_or_resume(vm, "--from", point)
        assert vm.guest.boot_id == booted
        assert disk_walked(vm) < steps
        writes_on(vm)
        goes_on(vm)
        full(vm)
        vm.perdure("stop", NAME)
        assert vm.run.ended() == 0
        boot(vm)  # disks have gone on since
        assert "is full and has disks: the VM boots" in vm.run.text
        assert vm.guest.boot_id != booted
        assert not vm.log()[-1]["full"]


def test_what_cannot_be_captured_in_full_is_named_and_refused(guest_image: Image, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    more = ("-drive", "if=none,id=bare,driver=null-co,read-only=on", "-device", "nvme,serial=1,drive=bare")
    more += ("-drive", f"if=none,id=extra,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=extra,id=more")
    with contextlib.closing(Supervised(guest_image, extra=more)) as vm:
        vm.boot()
        told = vm.status()["full"]
        assert "nvme" in told
        assert "disk more is writable, and only disks under [[disk]] are captured" in told
        assert "cannot be captured in full" in vm.run.text
        assert told.removeprefix("not possible: ") in vm.refused("snapshot", NAME, "--full")
        assert vm.perdure("snapshot", NAME)["generation"] == 1
        nothing_is_left(vm)
        vm.run.process.send_signal(signal.SIGINT)
