"""The main job, end to end, on real QEMU: tagged memory survives reboots, power loss and rollback, nothing else does.

What a guest has is judged by QEMU's own pmemsave and by programs in the guest: see supervised.py. A VM is booted
once and lent to one test after the other, without tags; a test that leaves it unhealthy costs the next one a boot.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import elf
import numpy as np
import pytest
from supervised import KEY, MIB, NAME, PAGE, SECONDS, Area, GuestGoneError, Image, Supervised

from store.index.chunks import LOCATION
from store.keyring.files import read_key_files
from store.keyring.slots import KeyFile, unlock
from store.repository import Repository
from vm.pagemap import has_pagemap_scan

pytestmark = pytest.mark.qemu

TRACKERS = ["auto", "scan"] if has_pagemap_scan() else ["scan"]
"""`auto` is userfaultfd where that works, as a test sees to, and its VM is lent to tests of any tracker as well."""
SIZE = 4 * MIB
INFO_BLOCK = Area(0, 2 * MIB, 0)
"""What the guest's kernel keeps at the start of the device: kept, as if it were tagged."""
FIRMWARE = set(range(0xA0000 // PAGE, 0x100000 // PAGE))
"""Pages of main memory in whose place the firmware may be seen."""
IN_GUEST = (Path(__file__).parent / "in_guest.py").read_text()


def content(seed: int, size: int = SIZE) -> bytes:
    """What the guest's function of that name gives."""
    return random.Random(seed).randbytes(size)


class Lender:
    """Keeps VMs that run, by tracker; `judged`: every boot of them."""

    def __init__(self, image: Image, *, judged: bool = False) -> None:
        self._image, self._judged = image, judged
        self._vms: dict[str, Supervised] = {}

    def lend(self, tracker: str) -> Supervised:
        """A VM whose guest is up and has no tags."""
        vm = self._vms.get(tracker)
        if vm is not None and not vm.healthy():
            self._vms.pop(tracker).close()
            vm = None
        if vm is None:
            vm = self._vms[tracker] = Supervised(self._image, tracker=tracker)
            vm.momentous()
            if self._judged:
                vm.judge_boots()
            boot(vm)
        vm.guest.run("forget_tags()")
        return vm

    def close(self) -> None:
        """End all of them."""
        with contextlib.ExitStack() as stack:
            for vm in self._vms.values():
                stack.callback(vm.close)


@pytest.fixture(scope="module")
def lender(guest_image: Image) -> Iterator[Lender]:
    made = Lender(guest_image, judged=True)
    yield made
    made.close()


@pytest.fixture(params=TRACKERS)
def vm(request: pytest.FixtureRequest, lender: Lender) -> Iterator[Supervised]:
    """A running VM, with each tracker that this kernel can have."""
    vm = lender.lend(request.param)
    yield vm
    print(vm.report())  # shown for a test that fails


whatever_tracker = pytest.mark.parametrize("vm", ["auto"], indirect=True)
"""For a test that does not depend on it: once is enough."""


def boot(vm: Supervised, *words: str) -> None:
    """`perdure run`, and ours in the guest."""
    vm.boot(*words)
    vm.guest.run(IN_GUEST)


def await_boot(vm: Supervised, before: str) -> None:
    """The guest is up again after the boot with the id `before`."""
    vm.guest.wait_ready(SECONDS, after=before)
    vm.guest.run(IN_GUEST)


def reboot(vm: Supervised) -> None:
    """From inside the guest."""
    vm.guest.reboot(SECONDS)
    vm.guest.run(IN_GUEST)


def go_down(vm: Supervised, how: str) -> None:
    """The guest reboots or powers off, and nobody waits for it."""
    with contextlib.suppress(GuestGoneError):  # it may be down before its answer is read
        vm.guest.start(f"{how}()")


def write(vm: Supervised, name: str, seed: int, size: int = SIZE) -> Area:
    """A program of the guest tags an area and fills it; the judge sees what it wrote."""
    vm.guest.run(f"write({name!r}, {size}, {seed})")
    area = vm.area(name)
    assert vm.judge.read(area.address, area.size) == content(seed, size)
    return area


def snapshot(vm: Supervised) -> Any:
    """`perdure snapshot demo`."""
    return vm.perdure("snapshot", NAME)


def only(region: Any, *kept: Area) -> bytes:
    """What should be left of a region: the areas, and zero elsewhere."""
    left = bytearray(len(region))
    for each in (INFO_BLOCK, *kept):
        left[each.offset : each.offset + each.size] = each.of(region)
    return bytes(left)


def pages_with_content(memory: Any, kernel: Path) -> set[int]:
    """Numbers of the pages that are neither zero nor what QEMU puts there of the kernel."""
    pages = np.frombuffer(memory, np.uint64).reshape(-1, PAGE // 8)
    other = (pages != kernel_in_memory(kernel, len(memory))).any(axis=1)
    return set(np.flatnonzero(other & pages.any(axis=1)).tolist())


@functools.cache
def kernel_in_memory(path: Path, size: int) -> Any:
    """Main memory into which QEMU has put a kernel, as it does before the first boot and with each reset."""
    memory = np.zeros(size, np.uint8)
    for address, content in elf.loaded(path).items():
        memory[address : address + len(content)] = np.frombuffer(content, np.uint8)
    return memory.view(np.uint64).reshape(-1, PAGE // 8)


def write_past_the_last_generation(vm: Supervised, seed: int) -> bytes:
    """Memory with a generation, and three pages that changed since; what is to be kept of the region."""
    area = write(vm, "kept", seed)
    snapshot(vm)
    vm.guest.run(f"change([0, 500, 1023], {seed * 100})")
    with vm.memory() as running:
        return only(running["pm0"], area)


def assert_captured(vm: Supervised, cause: str, expected: bytes) -> None:
    """The latest generation is that of `write_past_the_last_generation`."""
    made = vm.log()[-1]
    assert (made["cause"], made["dirty_bytes"]) == (cause, 3 * PAGE)
    assert vm.export() == expected


def assert_as_expected_before_boot(vm: Supervised, expected: bytes) -> None:
    """Before the guest's first instruction, memory held what was kept and nothing else."""
    with vm.before_boot() as found:
        assert found["pm0"][:] == expected
        assert pages_with_content(found["ram"], vm.kernel) <= FIRMWARE


def largest_pack(vm: Supervised, shown: Any) -> Path:
    """The pack with most of what a generation added, from its `perdure show`."""
    return max((vm.repository / "packs" / name for name in shown["packs"]), key=lambda path: path.stat().st_size)


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[str]:
    """One flipped bit in the middle of a file, for a while; gives its name."""
    good = path.read_bytes()
    at = len(good) // 2
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    yield path.name
    path.write_bytes(good)


def assert_stored(vm: Supervised, pages: int) -> None:
    """At the reboot that has just been: so many pages, and the nodes of the page map above them."""
    made = vm.log()[-1]
    assert (made["cause"], made["dirty_bytes"]) == ("reboot", pages * PAGE)
    assert made["stored_bytes"] <= 4 * pages * PAGE
    with vm.before_boot() as found:
        assert vm.export(made["generation"]) == found["pm0"][:]


def assert_reboot_keeps_only_what_is_tagged(vm: Supervised) -> None:
    """And stores only what has changed since the generation before it."""
    area = write(vm, "kept", 1)
    secret = b"".join(uuid.uuid4().hex.encode() for _ in range(2))
    vm.guest.run(f"hidden = mmap.mmap(-1, 8 << 20); hidden[:] = {secret!r} * (len(hidden) // {len(secret)})")
    vm.guest.run(f"_, there = untagged(2 << 20); there[:] = {secret!r} * (len(there) // {len(secret)})")
    snapshot(vm)
    changed = [0, 7, 511, 1023]
    vm.guest.run(f"change({changed}, 200)")
    with vm.memory() as running:
        assert all(running[region].find(secret) >= 0 for region in ("ram", "pm0"))
        expected = only(running["pm0"], area)
    boots = vm.boots
    reboot(vm)
    assert vm.boots == boots + 1
    with vm.before_boot() as found:
        assert all(each.find(secret) < 0 for each in found.values())
    assert_as_expected_before_boot(vm, expected)
    vm.guest.run(f"use('kept', {SIZE}); was = bytearray(content(1, {SIZE}))")
    vm.guest.run(f"for page in {changed}: was[page * PAGE : (page + 1) * PAGE] = content(200 + page, PAGE)")
    assert vm.guest.run("bytes(memory) == was")
    assert vm.export() == expected
    assert_stored(vm, len(changed))


def test_a_reboot_keeps_what_is_tagged_and_nothing_else_and_stores_only_what_changed(vm: Supervised) -> None:
    assert_reboot_keeps_only_what_is_tagged(vm)
    reboot(vm)
    assert_stored(vm, 0)


def test_a_reboot_under_uefi_keeps_what_is_tagged_and_nothing_else(guest_image: Image) -> None:
    vm = Supervised(replace(guest_image, kernel=guest_image.packed), settings='firmware = "ovmf"')
    with contextlib.closing(vm):
        boot(vm)
        vm.judge_boots()
        try:
            assert_reboot_keeps_only_what_is_tagged(vm)
        finally:
            print(vm.report())


def test_a_generation_is_one_instant_of_a_guest_that_writes_without_pause(vm: Supervised) -> None:
    """At any instant, the pages that `stamp` writes hold the last so many numbers, each in its place."""
    pages, stride = 4096, 1021
    vm.guest.run(f"stamp('stamps', {pages}, {stride})")
    area = vm.area("stamps")
    newest = 0
    for _ in range(2):
        made = snapshot(vm)
        assert 0 < made["pause_ms"] < 1000 * made["seconds"]
        stamps = np.frombuffer(area.of(vm.export(made["generation"])), np.uint64)[:: PAGE // 8].astype(np.int64)
        assert stamps.max() > newest + pages, "the program does not run"
        newest = int(stamps.max())
        expected = np.arange(newest - pages + 1, newest + 1)
        assert np.array_equal(stamps[expected * stride % pages], expected)
    vm.guest.run("finish()")
    snapshot(vm)
    with vm.memory() as finished:
        assert vm.export() == only(finished["pm0"], area)


def test_what_is_unmarked_is_dropped_and_what_is_marked_is_captured_in_full(vm: Supervised) -> None:
    gone = write(vm, "gone", 3)
    late_address = vm.guest.run(f"address, late = untagged({2 * MIB}); late[:] = content(4, {2 * MIB}); address")
    before = vm.export(snapshot(vm)["generation"])
    assert before == only(before, gone)
    assert gone.of(before) == content(3)
    vm.guest.run(f"perdure_guest.unmark_persistent({gone.address}, {gone.size})")
    vm.guest.run(f"perdure_guest.mark_persistent({late_address}, {2 * MIB}, 'late')")
    late = vm.area("late")
    after = vm.export(snapshot(vm)["generation"])
    assert after == only(after, late)
    assert late.of(after) == content(4, 2 * MIB)
    assert vm.judge.read(gone.address, gone.size) == content(3)  # until the reboot
    reboot(vm)
    assert_as_expected_before_boot(vm, after)
    assert vm.guest.run(f"holds('late', {2 * MIB}, 4)")


def test_a_checkpoint_is_a_generation_when_the_call_returns(vm: Supervised) -> None:
    area = write(vm, "kept", 5)
    number, identity = vm.guest.run("tuple(perdure_guest.checkpoint('first'))")
    made = vm.log()[-1]
    assert (made["generation"], made["id"], made["cause"]) == (number, identity, "checkpoint")
    with vm.memory() as running:
        assert vm.export(number) == only(running["pm0"], area)


def test_a_supervisor_that_was_killed_is_followed_by_one_that_knows_as_much(vm: Supervised) -> None:
    still, area = write(vm, "still", 6, MIB), write(vm, "kept", 7)
    vm.guest.run("numbers = count('counter')")
    made = snapshot(vm)
    last, before = made["generation"], vm.status()
    vm.run.kill()
    assert vm.run.ended() == -signal.SIGKILL
    seen = vm.guest.run("change([3, 5], 700); numbers[0]")
    vm.until(lambda: vm.guest.run("numbers[0]") > seen, "the guest goes on")
    assert [each["state"] for each in vm.perdure("status")["vms"]] == ["unsupervised"]
    boot(vm)
    vm.guest.run("finish()")
    after = vm.status()
    assert [after[key] for key in ("pid", "tracker", "generation")] == [
        before[key] for key in ("pid", "tracker", "generation")
    ]
    if after["tracker"].startswith("userfaultfd"):
        assert vm.baseline == made["id"]
    made = snapshot(vm)
    assert (made["generation"], made["dirty_bytes"]) == (last + 1, 3 * PAGE)
    changed_in = {each["name"]: each["generation"] for each in vm.perdure("regions", NAME)["regions"]}
    assert changed_in == {None: None, "still": last, "kept": last + 1, "counter": last + 1}
    with vm.memory() as running:
        assert vm.export() == only(running["pm0"], still, area, vm.area("counter"))


def test_a_capture_that_is_killed_costs_no_page_of_the_next_one(vm: Supervised) -> None:
    """Bits that say what was written are gone by then."""
    size = 16 * MIB
    area = write(vm, "kept", 23, size)
    snapshot(vm)
    vm.guest.run(f"memory[:] = content(24, {size})")
    vm.killed_at("cont", "snapshot", NAME)
    assert vm.baseline is None
    history = vm.log()
    boot(vm)
    vm.guest.run("change([9], 2300)")
    made = snapshot(vm)
    assert made["generation"] == history[-1]["generation"] + 1
    with vm.memory() as running:
        assert vm.export() == only(running["pm0"], area)


@whatever_tracker
def test_the_tracker_is_chosen_and_the_reason_shown(vm: Supervised) -> None:
    chosen = vm.status()["tracker"]
    if has_pagemap_scan():
        assert chosen.startswith("userfaultfd (Linux ")
    else:
        assert chosen.startswith("scan (")
        assert "PAGEMAP_SCAN" in chosen


@whatever_tracker
def test_power_loss_of_the_host_costs_what_came_after_the_last_generation(vm: Supervised) -> None:
    area = write(vm, "kept", 8)
    number = vm.guest.run("perdure_guest.checkpoint().generation")
    expected = vm.export(number)
    assert area.of(expected) == content(8)
    vm.guest.run("change(range(100), 800)")
    vm.lose_power()
    boot(vm)
    assert f"{NAME}@{number} restored" in vm.run.text
    assert_as_expected_before_boot(vm, expected)
    assert vm.area("kept") == area
    assert vm.guest.run(f"holds('kept', {SIZE}, 8)")


@whatever_tracker
def test_a_guest_does_not_boot_on_memory_that_cannot_be_restored(vm: Supervised) -> None:
    write(vm, "kept", 25)
    made = vm.perdure("show", f"{NAME}@{snapshot(vm)['generation']}")
    vm.lose_power()
    with damaged(largest_pack(vm, made)) as pack:
        assert vm.start().ended() == 1
        assert pack in vm.run.text
        assert not list(vm.runtime.glob("memory*"))
        boot(vm, "--without-restore")
    with vm.before_boot() as found:
        assert not any(found["pm0"][:])
    vm.lose_power()
    boot(vm)
    assert_as_expected_before_boot(vm, vm.export(made["generation"]))


@whatever_tracker
def test_a_launch_can_begin_with_an_older_generation(vm: Supervised) -> None:
    write(vm, "kept", 26)
    first = snapshot(vm)
    vm.guest.run(f"memory[:] = content(27, {SIZE})")
    snapshot(vm)
    vm.lose_power()
    boot(vm, "--from", f"{NAME}@{first['generation']}")
    assert_as_expected_before_boot(vm, vm.export(first["generation"]))
    head = vm.log()[-1]
    assert (head["cause"], head["parent"]) == ("rollback", first["id"])


@whatever_tracker
def test_what_a_killed_qemu_left_is_captured_and_restored(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 9)
    vm.kill_qemu()
    assert vm.run.ended() == 1
    assert_captured(vm, "crash", expected)
    boot(vm)
    assert_as_expected_before_boot(vm, expected)


@whatever_tracker
def test_what_was_left_while_nobody_supervised_is_captured_and_restored(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 10)
    vm.run.kill()
    vm.kill_qemu()
    boot(vm)
    assert "had ended without a capture" in vm.run.text
    assert_captured(vm, "crash", expected)
    assert_as_expected_before_boot(vm, expected)


@whatever_tracker
def test_a_guest_that_powers_off_is_captured_and_restored(vm: Supervised) -> None:
    """And a supervisor that dies before that boot's first instruction costs nothing."""
    expected = write_past_the_last_generation(vm, 11)
    go_down(vm, "poweroff")
    assert vm.run.ended() == 0
    assert_captured(vm, "shutdown", expected)
    vm.tell_hook("kill-supervisor")
    assert vm.start().ended() == -signal.SIGKILL
    boot(vm)
    assert_as_expected_before_boot(vm, expected)
    assert vm.log()[-1]["cause"] == "shutdown"


@whatever_tracker
def test_a_guest_that_panics_is_captured_and_ended(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 22)
    go_down(vm, "panic")
    assert vm.run.ended() == 0
    assert "panicked" in vm.run.text
    assert_captured(vm, "panic", expected)


@whatever_tracker
def test_a_reboot_while_nobody_supervises_is_held_for_the_next_supervisor(vm: Supervised) -> None:
    """Also where that one dies before the guest has gone on."""
    expected = write_past_the_last_generation(vm, 12)
    vm.run.kill()
    boots, booted = vm.boots, vm.guest.boot_id
    go_down(vm, "reboot")
    vm.until(lambda: vm.judge.execute("query-status")["status"] == "shutdown", "the guest is held")
    vm.tell_hook("kill-supervisor")
    assert vm.start().ended() == -signal.SIGKILL
    assert_captured(vm, "reboot", expected)
    assert vm.boots == boots
    vm.start()
    await_boot(vm, booted)
    assert_as_expected_before_boot(vm, expected)


@whatever_tracker
def test_a_guest_that_powers_off_while_nobody_supervises_is_captured(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 28)
    vm.run.kill()
    go_down(vm, "poweroff")
    vm.until(lambda: vm.judge.execute("query-status")["status"] == "shutdown", "the guest is held")
    assert vm.start().ended() == 0
    assert_captured(vm, "shutdown", expected)


@whatever_tracker
def test_a_reboot_by_the_host_that_is_cut_short_is_finished_by_the_next_supervisor(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 21)
    booted = vm.guest.boot_id
    vm.tell_hook("kill-supervisor")
    assert "ended before it had answered" in vm.refused("reboot", NAME)
    assert vm.run.ended() == -signal.SIGKILL
    assert_captured(vm, "host reboot", expected)
    vm.start()
    await_boot(vm, booted)
    assert_as_expected_before_boot(vm, expected)


@whatever_tracker
def test_a_guest_that_was_paused_when_its_supervisor_died_goes_on(vm: Supervised) -> None:
    """As it is in the pause of a capture."""
    vm.guest.run("numbers = count('counter')")
    vm.judge.execute("stop")
    vm.run.kill()
    vm.start()
    vm.run.expect("taken over")
    seen = vm.guest.run("numbers[0]")
    vm.until(lambda: vm.guest.run("numbers[0]") > seen, "the guest goes on")


@whatever_tracker
def test_a_reader_of_the_supervisors_words_that_does_not_read_holds_up_nothing(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 29)
    pipe = os.open(f"/proc/{vm.run.process.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe, b"\n"):
            pass
    os.close(pipe)
    reboot(vm)
    assert_captured(vm, "reboot", expected)
    vm.run.expect("rebooted: ")


@whatever_tracker
def test_a_supervisor_that_is_told_to_end_leaves_its_guest_running(vm: Supervised) -> None:
    vm.guest.run("numbers = count('counter')")
    snapshot(vm)
    for number, causes in ((signal.SIGINT, []), (signal.SIGTERM, ["terminate"])):
        history, booted = len(vm.log()), vm.guest.boot_id
        vm.run.process.send_signal(number)
        assert vm.run.ended() == 130
        assert vm.run.text.endswith(f"\n{NAME}: runs on unsupervised: take it over with perdure run\n")
        assert [each["cause"] for each in vm.log()[history:]] == causes
        seen = vm.guest.run("numbers[0]")
        vm.until(lambda seen=seen: vm.guest.run("numbers[0]") > seen, "the guest goes on")
        boot(vm)
        assert vm.guest.boot_id == booted
    damage_index(vm)  # what a supervisor had of an index that was thrown away is of no use: only another one can go on
    assert vm.perdure("repair")["restart"] == [NAME]
    assert "start this one again (perdure run" in vm.refused("snapshot", NAME)
    assert vm.status()["state"] == "running"
    vm.run.process.send_signal(signal.SIGINT)
    assert vm.run.ended() == 130
    boot(vm)
    assert vm.guest.boot_id == booted
    snapshot(vm)


def damage_index(vm: Supervised) -> None:
    """The index of this host says of a chunk that nobody has where it is."""
    keys = unlock(read_key_files(vm.repository), KeyFile(KEY))
    state = vm.state / "repositories" / keys.repository_id.hex()
    with Repository(vm.repository, keys, state) as repository, repository.environment.write() as txn:
        wrong = np.zeros(1, LOCATION)
        wrong["pack"] = 1
        repository.index.add(txn, np.ones((1, 32), np.uint8), wrong)


@whatever_tracker
def test_a_rollback_captures_what_was_there_and_adds_to_history(vm: Supervised) -> None:
    area = write(vm, "kept", 13)
    first = snapshot(vm)
    vm.guest.run(f"memory[:] = content(14, {SIZE})")
    second = snapshot(vm)
    vm.guest.run("change(range(9), 1400)")
    with vm.memory() as running:
        expected = only(running["pm0"], area)
    qemu, booted = vm.status()["pid"], vm.guest.boot_id
    done = vm.perdure("rollback", f"{NAME}@{first['generation']}")
    await_boot(vm, booted)
    older = vm.export(first["generation"])
    assert older == only(older, area)
    assert_as_expected_before_boot(vm, older)
    assert vm.guest.run(f"holds('kept', {SIZE}, 13)")
    assert vm.status()["pid"] != qemu
    *_, latest, captured, head = vm.log()
    assert latest["generation"] == second["generation"]
    assert (captured["cause"], captured["generation"]) == ("before rollback", done["captured"])
    assert (head["cause"], head["generation"], head["parent"]) == ("rollback", done["goes_on_as"], first["id"])
    assert vm.export(captured["generation"]) == expected
    assert vm.export(head["generation"]) == older
    vm.guest.run(f"use('kept', {SIZE}); change([2], 1500)")
    assert snapshot(vm)["dirty_bytes"] == PAGE
    with vm.memory() as running:
        assert vm.export() == only(running["pm0"], area)


@whatever_tracker
def test_a_rollback_can_discard_what_is_there(vm: Supervised) -> None:
    """And where it fails after the old memory is gone, the next run goes on from the generation that was asked for."""
    write(vm, "kept", 15)
    first = snapshot(vm)
    vm.guest.run(f"memory[:] = content(16, {SIZE})")
    snapshot(vm)
    vm.guest.run("change(range(9), 1600)")
    history = vm.log()
    vm.tell_hook("fail")
    assert "hook before_boot" in vm.refused("rollback", f"{NAME}@{first['generation']}", "--discard")
    assert vm.run.ended() == 1
    [head] = vm.log()[len(history) :]
    assert (head["cause"], head["parent"]) == ("rollback", first["id"])
    boot(vm)
    assert_as_expected_before_boot(vm, vm.export(first["generation"]))
    assert vm.guest.run(f"holds('kept', {SIZE}, 15)")


@whatever_tracker
def test_a_rollback_that_cannot_be_restored_leaves_the_guest_as_it_was(vm: Supervised) -> None:
    write(vm, "kept", 17)
    first = vm.perdure("show", f"{NAME}@{snapshot(vm)['generation']}")
    vm.guest.run(f"memory[:] = content(18, {SIZE})")
    snapshot(vm)
    vm.guest.run("numbers = count('counter')")
    history, before, memory = vm.log(), vm.status(), list(vm.runtime.glob("memory*"))
    with damaged(largest_pack(vm, first)) as pack:
        assert pack in vm.refused("rollback", f"{NAME}@{first['generation']}")
    assert "does not exist" in vm.refused("rollback", f"{NAME}@{history[-1]['generation'] + 1}")
    seen = vm.guest.run("numbers[0]")
    vm.until(lambda: vm.guest.run("numbers[0]") > seen, "the guest goes on")
    assert vm.log() == history
    assert vm.status() == before
    assert list(vm.runtime.glob("memory*")) == memory
    assert vm.guest.run(f"holds('kept', {SIZE}, 18)")


@whatever_tracker
def test_the_host_lists_tags_and_untags(vm: Supervised) -> None:
    area = write(vm, "kept", 19)
    start, other = area.address - area.offset, area.address + 2 * area.size
    owner = vm.guest.run("f'pid {os.getpid()} python3'")
    first = snapshot(vm)["generation"]
    vm.perdure("regions", "mark", NAME, hex(other), "64KiB", "--name", "of the host")
    vm.perdure("regions", "unmark", NAME, area.address + MIB, MIB)
    listed = vm.perdure("regions", NAME)["regions"]
    assert [(each["class"], each["address"], each["size"], each["name"], each["owner"]) for each in listed] == [
        ("reserved", start, 32 * MIB, None, None),
        ("persistent", area.address, MIB, "kept", owner),
        ("persistent", area.address + 2 * MIB, 2 * MIB, "kept", owner),
        ("persistent", other, 64 << 10, "of the host", "host"),
    ]
    assert {each["permissions"] for each in listed} == {"rw"}
    assert [each["generation"] for each in listed] == [None, first, first, None]
    told = vm.guest.run("perdure_guest.query_persistent_regions()")
    assert [each[:2] for each in told] == [[each["address"], each["size"]] for each in listed]
    assert "overlaps" in vm.refused("regions", "mark", NAME, area.address, "2MiB")
    vm.guest.run("change([0], 1900)")
    second = snapshot(vm)["generation"]
    touched, untouched = vm.perdure("regions", NAME)["regions"][1:3]
    assert (touched["generation"], untouched["generation"]) == (second, first)
    assert touched["modified"] > untouched["modified"] > touched["created"]
    kept = [Area(each["address"], each["size"], each["address"] - start) for each in listed[1:]]
    with vm.memory() as running:
        assert vm.export() == only(running["pm0"], *kept)


@whatever_tracker
def test_the_host_reboots_and_stops_a_guest(vm: Supervised) -> None:
    expected = write_past_the_last_generation(vm, 20)
    status, booted = vm.status(), vm.guest.boot_id
    assert status["agent"] == booted
    assert (status["vm"], status["state"], status["regions"]["pm0"]["tags"]) == (NAME, "running", 1)
    assert vm.perdure("status")["vms"] == [status]
    captured = vm.perdure("reboot", NAME)["captured"]
    await_boot(vm, booted)
    assert_captured(vm, "host reboot", expected)
    assert vm.log()[-1]["generation"] == captured
    assert_as_expected_before_boot(vm, expected)
    vm.guest.run(f"use('kept', {SIZE}); change([0, 500, 1023], 2100)")
    with vm.memory() as running:
        expected = only(running["pm0"], vm.area("kept"))
    stopped = vm.perdure("stop", NAME, "--capture")
    assert vm.run.ended() == 0
    assert_captured(vm, "stop", expected)
    assert vm.log()[-1]["generation"] == stopped["generation"]
    assert "is not running" in vm.refused("status", NAME)
    assert vm.perdure("status") == {"vms": []}
    assert not list(vm.runtime.glob("memory*"))
