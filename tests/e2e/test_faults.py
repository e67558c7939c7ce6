"""What goes wrong around a VM: one clear line, nothing half-made left, the guest unharmed, nothing lost.

Processes are caught in the middle of something by stopping one of them there (SIGSTOP), never by a matter of luck.
What a generation holds is judged by QEMU's own pmemsave; see supervised.py. A VM is booted once and lent to one test
after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import MIB, NAME, PAGE, QEMU, SECONDS, GuestGoneError, Image, Supervised

from base.errors import ConflictError
from perdure.control import call

pytestmark = pytest.mark.qemu

LARGE = 20 * MIB
"""Enough to be captured by worker processes."""
PROMPT_SECONDS = 20
"""For an answer of a supervisor that is not held up, by a process that has to start on a busy machine."""
IN_GUEST = [(Path(__file__).parent / name).read_text() for name in ("in_guest.py", "in_guest_faults.py")]


class Lender:
    """Keeps a VM that runs."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._vm: Supervised | None = None

    def lend(self) -> Supervised:
        """A VM whose guest is up and has no tags."""
        if self._vm is not None and not self._vm.healthy():
            self.close()
        if self._vm is None:
            self._vm = Supervised(self._image)
            boot(self._vm)
        self._vm.guest.run("forget_tags()")
        return self._vm

    def close(self) -> None:
        """End it."""
        vm, self._vm = self._vm, None
        if vm is not None:
            vm.close()


@pytest.fixture(scope="module")
def lender(guest_image: Image) -> Iterator[Lender]:
    made = Lender(guest_image)
    yield made
    made.close()


@pytest.fixture
def vm(lender: Lender) -> Supervised:
    """A running VM."""
    return lender.lend()


def boot(vm: Supervised, *words: str) -> None:
    """`perdure run`, and ours in the guest."""
    vm.boot(*words)
    ready(vm)


def ready(vm: Supervised) -> None:
    """Ours in a guest that has booted."""
    for code in IN_GUEST:
        vm.guest.run(code)


def toml(vm: Supervised) -> Path:
    """The VM's description."""
    return vm.folder / "VM.toml"


@contextlib.contextmanager
def described(vm: Supervised, *changes: tuple[str, str]) -> Iterator[None]:
    """With another description, for a while."""
    text = changed = toml(vm).read_text()
    for old, new in changes:
        assert changed.count(old) == 1, old
        changed = changed.replace(old, new)
    toml(vm).write_text(changed)
    try:
        yield
    finally:
        toml(vm).write_text(text)


def history(vm: Supervised) -> list[Any]:
    """All generations, oldest first."""
    return [each for each in vm.perdure("log")["generations"] if each["vm"] == NAME]


def records(vm: Supervised) -> list[str]:
    """Of the repository: what was ever committed."""
    return sorted(os.listdir(vm.repository / "records"))


def ask(vm: Supervised, command: str, **arguments: Any) -> Any:
    """The supervisor, as commands do, without the time that a new process takes."""
    return call(vm.state / "run" / NAME / "control.sock", command, arguments)


def kept(vm: Supervised) -> bytes:
    """Region pm0 as QEMU dumps it now, short of what nobody tagged: what a generation must hold."""
    start, size = vm.judge.spans()["pm0"]
    content = vm.judge.read(start, size)
    left = bytearray(size)
    left[: 2 * MIB] = content[: 2 * MIB]  # the namespace's info block
    for each in ask(vm, "regions")["regions"]:
        if each["class"] == "persistent":
            offset = each["address"] - start
            left[offset : offset + each["size"]] = content[offset : offset + each["size"]]
    return bytes(left)


def assert_next_snapshot_is_right(vm: Supervised) -> dict[str, Any]:
    """Of a guest that writes nothing just now."""
    made: dict[str, Any] = vm.perdure("snapshot", NAME)
    assert vm.export(made["generation"]) == kept(vm)
    return made


def assert_repository_is_whole(vm: Supervised) -> None:
    """Every generation of it, and nothing half-made beside them."""
    assert vm.perdure("check", "--read-data")["clean"]
    assert not list(vm.repository.rglob(".*"))


def assert_guest_goes_on(vm: Supervised) -> None:
    """Its counter, which `count` started, moves."""
    seen = vm.guest.run("numbers[0]")
    vm.until(lambda: vm.guest.run("numbers[0]") > seen, "the guest goes on")


def assert_answers_promptly(vm: Supervised) -> None:
    """`perdure status`."""
    began = time.monotonic()
    assert vm.status()["state"] == "running"
    assert time.monotonic() - began < PROMPT_SECONDS


def memory_folders(vm: Supervised) -> list[str]:
    """Of the VM's runs, with content or without."""
    return sorted(path.name for path in (vm.state / "run" / NAME).glob("memory*"))


def assert_nothing_left(vm: Supervised) -> None:
    """No QEMU, memory or mount."""
    assert not memory_folders(vm)
    assert f"{vm.state}/run" not in Path("/proc/self/mountinfo").read_text()
    assert not qemus(vm)


def qemus(vm: Supervised) -> list[int]:
    """Processes of QEMU."""
    return _processes(lambda words: "qemu-system" in words and str(vm.state) in words)


def workers(vm: Supervised) -> list[int]:
    """Processes that the supervisor captures with: in its session, other than what makes page servers."""
    pid = vm.run.process.pid
    children = set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for thread in Path(f"/proc/{pid}/task").iterdir():
        children |= set((thread / "children").read_text().split())
    found = _processes(lambda words: "run\0" in words or "spawn_main" in words)
    return [each for each in found if str(each) in children and _session(each) == pid]


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def _processes(wanted: Any) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted((entry / "cmdline").read_bytes().decode(errors="replace")):
                found.append(int(entry.name))
    return sorted(found)


class Background:
    """A command of Perdure that takes its time."""

    def __init__(self, vm: Supervised, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "perdure", *words],
            env=vm.environment,
            cwd=vm.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait(SECONDS)

    def refused(self, code: int = 1) -> str:
        """Wait for the one line that it fails with."""
        said, problem = self._process.communicate(timeout=SECONDS)
        assert (self._process.returncode, said, problem.count("\n")) == (code, "", 1), (said, problem)
        return problem

    def done(self) -> None:
        """Wait for it."""
        _, problem = self._process.communicate(timeout=SECONDS)
        assert self._process.returncode == 0, problem


@contextlib.contextmanager
def worker_stopped(vm: Supervised) -> Iterator[int]:
    """One of the supervisor's workers does not move, so that no large capture comes to its end; its process."""
    vm.until(lambda: workers(vm), "workers of the supervisor")
    worker = workers(vm)[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


@contextlib.contextmanager
def snapshot_held_up(vm: Supervised) -> Iterator[tuple[Background, int]]:
    """In the middle of a large snapshot, one of whose workers does not move: the command, the worker.

    A counter runs in the guest.
    """
    vm.guest.run(f"fill('large', {LARGE}); numbers = count('counter')")
    before = packs(vm)
    with worker_stopped(vm) as worker:
        command = Background(vm, "snapshot", NAME)
        vm.until(lambda: packs(vm) - before, "a pack of another worker")
        assert not command.ended
        yield command, worker


def packs(vm: Supervised) -> set[Path]:
    """Those that are being made included."""
    return set((vm.repository / "packs").iterdir())


@contextlib.contextmanager
def supervisor_stopped(vm: Supervised, when: Any, what: str) -> Iterator[None]:
    """The supervisor, stopped as soon as something can be seen; goes on afterwards if it is still there."""
    process = vm.run.process
    deadline = time.monotonic() + SECONDS
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, f"it never came: {what}"
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


# Several supervisors


def test_a_second_run_is_told_who_supervises(vm: Supervised) -> None:
    vm.guest.run("numbers = count('counter')")
    for words in ((), ("--discard",), ("--without-restore",)):
        said = vm.refused("run", str(toml(vm)), *words, code=11)
        assert f"has a supervisor already, process {vm.run.process.pid}" in said
    assert_answers_promptly(vm)
    assert_guest_goes_on(vm)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)


def test_a_running_vm_is_taken_over_only_as_it_is_described(vm: Supervised) -> None:
    vm.guest.run("numbers = count('counter')")
    before = records(vm)
    vm.run.kill()
    added = '[[region]]\nname = "pm1"\nsize = "16MiB"\n[policy]'
    for change, code, problem in (
        ((("size = 33554432", 'size = "64MiB"'),), 1, "region pm0 has 32.0 MiB of memory from its launch"),
        ((('[[region]]\nname = "pm0"\nsize = 33554432', ""),), 1, "pm0"),
        ((("[policy]", added),), 1, "no memory for region pm1"),
        ((('name = "pm0"', 'name = "other"'),), 1, "no memory for region other"),
    ):
        with described(vm, *change):
            assert problem in vm.refused("run", str(toml(vm)), code=code)
    for words in (("--from", f"{NAME}@latest"), ("--without-restore",)):
        assert "runs already" in vm.refused("run", str(toml(vm)), *words, code=2)
    assert records(vm) == before
    boot(vm)
    assert_guest_goes_on(vm)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)


# Guests


def test_garbage_of_a_guest_is_answered_and_harms_nobody(vm: Supervised) -> None:
    vm.guest.run("numbers = count('counter'); write('kept', 1 << 20, 1)")
    area = vm.area("kept")
    vm.guest.run("stop_agent(); port = Port()")
    huge = 1 << 62
    for data, number, kind in (
        ("b'\\xff\\x00\\xfe'", 0, "malformed"),
        ("os.urandom(60000).replace(b'\\n', b'')", 0, "malformed"),
        ("b'x' * (4 << 20)", 0, "malformed"),
        ("b'[' * 60000", 0, "malformed"),
        ("b'{\"v\":1,\"id\":' + b'9' * 5000 + b'}'", 0, "malformed"),
        (_request(11, "mark", v=2), 11, "unsupported"),
        (_request(12, "explode"), 12, "unsupported"),
        (_request(13, "mark", address="here", size=PAGE), 13, "malformed"),
        (_request(14, "mark", address=area.address + 1, size=PAGE), 14, "alignment"),
        (_request(15, "mark", address=area.address, size=PAGE - 1), 15, "alignment"),
        (_request(16, "mark", address=area.address, size=0), 16, "bounds"),
        (_request(17, "mark", address=0, size=PAGE), 17, "bounds"),
        (_request(18, "mark", address=-PAGE, size=PAGE), 18, "bounds"),
        (_request(19, "mark", address=huge, size=huge), 19, "bounds"),
        (_request(20, "mark", address=area.address, size=huge), 20, "bounds"),
        (_request(21, "mark", address=area.address - area.offset, size=PAGE), 21, "bounds"),
        (_request(22, "mark", address=area.address, size=PAGE, name="another"), 22, "overlap"),
        (_request(23, "mark", address=area.address, size=PAGE, name="x" * 129), 23, "limit"),
        (_request(24, "mark", address=area.address, size=PAGE, name="a\nb"), 24, "malformed"),
        (_request(25, "query"), 25, None),
    ):
        assert vm.guest.run(f"port.ask({data})") == [number, kind], data
        assert vm.run.alive
    assert_answers_promptly(vm)
    vm.guest.run("port.flood()")
    for _ in range(3):
        assert_answers_promptly(vm)
    vm.perdure("snapshot", NAME)
    vm.guest.run("port.close(); start_agent()")
    assert [vm.guest.run(f"problem({each})") for each in _refusals(area.address)] == ["bounds", "overlap", "alignment"]
    assert_guest_goes_on(vm)
    vm.guest.run("finish()")
    assert [each["name"] for each in ask(vm, "regions")["regions"]] == [None, "counter", "kept"]
    assert_next_snapshot_is_right(vm)


def _request(number: int, do: str, **fields: Any) -> str:
    """Source of an expression that gives the line."""
    return repr(json.dumps({"v": 1, "id": number, "do": do, **fields}).encode())


def _refusals(address: int) -> list[str]:
    """Calls of the library that the host refuses."""
    return [
        f"lambda: perdure_guest.mark_persistent(0, {PAGE})",
        f"lambda: perdure_guest.mark_persistent({address}, {2 * PAGE}, 'another')",
        f"lambda: perdure_guest._request(dict(do='mark', address={address + 1}, size={PAGE}, name=None), 60.0)",
    ]


def test_a_guest_that_tags_without_end_reaches_its_limit(vm: Supervised) -> None:
    """5000 tags of a page each: 4096 are kept, and captured."""
    start, size = vm.guest.run("device = perdure_guest.dax_devices()[0]; [device.start, device.end - device.start]")
    vm.guest.run("stop_agent(); port = Port(); port.mark_pages(device.start, 5000)")
    for count in range(1000, 5001, 1000):
        answered = vm.guest.run(f"port.answered({count})", SECONDS)
        assert_answers_promptly(vm)
    assert answered == {"null": 4096, "limit": 5000 - 4096}
    vm.guest.run("port.close(); start_agent()")
    assert vm.guest.run(f"problem(lambda: perdure_guest.mark_persistent({start + size - PAGE}, {PAGE}))") == "limit"
    vm.guest.run("write_pages(range(0, 5000, 7))")
    assert_next_snapshot_is_right(vm)
    vm.guest.run(f"perdure_guest.unmark_persistent({start}, {size})")
    assert len(vm.perdure("regions", NAME)["regions"]) == 1  # and the long listing before it was no trouble
    vm.run.look()
    assert vm.run.text.count("tagged") < 500, "a guest fills the host's log"


# Processes that are killed


def test_a_worker_that_is_killed_costs_one_snapshot(vm: Supervised) -> None:
    with snapshot_held_up(vm) as (snapshot, worker):
        os.kill(worker, signal.SIGKILL)
        assert f"worker process {worker} was killed by signal 9" in snapshot.refused()
    assert_guest_goes_on(vm)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)
    assert worker not in workers(vm)
    for idle in workers(vm):
        os.kill(idle, signal.SIGKILL)
    vm.guest.run(f"fill('large', {LARGE})")
    assert_next_snapshot_is_right(vm)
    assert workers(vm)
    assert_repository_is_whole(vm)


def test_a_supervisor_that_is_interrupted_finishes_what_is_under_way(vm: Supervised) -> None:
    """A checkpoint, whose reply the guest may have from the next supervisor."""
    vm.guest.run(f"fill('large', {LARGE}); numbers = count('counter')")
    before = packs(vm)
    with worker_stopped(vm) as worker:
        vm.guest.run("answers = in_background(lambda: perdure_guest.checkpoint('last words'))")
        vm.until(lambda: packs(vm) - before, "a pack of another worker")
        vm.run.process.send_signal(signal.SIGINT)
        vm.run.expect("when what is under way is done")
        os.kill(worker, signal.SIGCONT)
        assert vm.run.ended() == 130
    assert_guest_goes_on(vm)
    last = history(vm)[-1]
    assert last["cause"] == "checkpoint"
    vm.boot()
    vm.until(lambda: vm.guest.run("answers") == [[last["generation"], last["id"]]], "the answer to the checkpoint")
    vm.guest.run("finish()")
    assert assert_next_snapshot_is_right(vm)["generation"] == last["generation"] + 1


def test_a_supervisor_that_is_killed_in_a_snapshot_is_followed_by_one_that_knows_it(vm: Supervised) -> None:
    before = records(vm)
    with snapshot_held_up(vm) as (snapshot, worker):
        vm.run.process.kill()
        os.kill(worker, signal.SIGKILL)
        assert "supervisor ended" in snapshot.refused()
    assert_guest_goes_on(vm)
    assert vm.run.ended() == -signal.SIGKILL
    assert records(vm) == before
    boot(vm)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)
    assert_repository_is_whole(vm)


def test_a_qemu_that_dies_in_a_snapshot_ends_both(vm: Supervised) -> None:
    with snapshot_held_up(vm) as (snapshot, worker):
        area = vm.area("large")
        expected = vm.judge.read(area.address, area.size)
        vm.kill_qemu()
        os.kill(worker, signal.SIGCONT)
        said = snapshot.refused()  # the monitor or the tracker may notice first; how it ended is known of children only
        assert f"VM {NAME}: " in said and "QEMU " in said and "ended" in said
    assert vm.run.ended() == 1
    assert history(vm)[-1]["cause"] == "crash", vm.report()
    assert area.of(vm.export()) == expected
    assert_nothing_left(vm)


def test_memory_that_a_dead_qemu_left_outlives_a_supervisor_that_is_killed_with_it(vm: Supervised) -> None:
    vm.guest.run(f"fill('large', {LARGE})")
    area = vm.area("large")
    expected = vm.judge.read(area.address, area.size)
    vm.run.kill()
    vm.kill_qemu()
    before, packs_before = records(vm), packs(vm)
    run = vm.start()
    with worker_stopped(vm) as worker:
        vm.until(lambda: packs(vm) - packs_before, "a pack of another worker")
        run.kill()
        os.kill(worker, signal.SIGKILL)
    assert records(vm) == before
    vm.judge_boots()
    boot(vm)
    assert (history(vm)[-1]["cause"], len(records(vm))) == ("crash", len(before) + 1)
    assert area.of(vm.export()) == expected
    with vm.before_boot() as found:
        assert area.of(found["pm0"][:]) == expected
    assert_repository_is_whole(vm)


def test_a_supervisor_that_nobody_listens_to_goes_on(vm: Supervised) -> None:
    vm.guest.run("write('kept', 1 << 20, 1)")
    vm.run.kill()
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "perdure", "run", str(toml(vm))]
    process = subprocess.Popen(command, env=vm.environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    heard = b""
    while b"taken over" not in heard:
        heard += (got := os.read(ours, 1 << 16))
        assert got, heard
    os.close(ours)
    vm.guest.reboot(SECONDS)
    ready(vm)
    assert vm.guest.run("holds('kept', 1 << 20, 1)")
    assert history(vm)[-1]["cause"] == "reboot"
    process.kill()
    process.wait()
    boot(vm)


def test_a_hook_that_fails_at_a_reboot_holds_the_guest_for_the_next_supervisor(vm: Supervised) -> None:
    vm.guest.run("write('kept', 1 << 20, 1)")
    booted = vm.guest.boot_id
    vm.tell_hook("fail")
    with contextlib.suppress(GuestGoneError):  # it may be down before its answer is read
        vm.guest.start("reboot()")
    assert vm.run.ended() == 1
    assert "hook before_boot" in vm.run.text
    vm.start()
    vm.guest.wait_ready(SECONDS, after=booted)
    ready(vm)
    assert vm.guest.run("holds('kept', 1 << 20, 1)")


def test_a_supervisor_that_is_killed_in_a_rollback_leaves_the_guest_as_it_was(vm: Supervised) -> None:
    vm.guest.run(f"fill('large', {LARGE})")
    first = vm.perdure("snapshot", NAME)["generation"]
    vm.guest.run("write_pages(range(100)); numbers = count('counter')")
    booted, pids = vm.guest.boot_id, qemus(vm)
    rollback = Background(vm, "rollback", f"{NAME}@{first}")
    with supervisor_stopped(vm, lambda: "memory-2" in memory_folders(vm), "memory for the rollback"):
        assert qemus(vm) == pids
        vm.run.process.kill()
    assert "supervisor ended" in rollback.refused()
    assert vm.run.ended() == -signal.SIGKILL
    assert_guest_goes_on(vm)
    boot(vm)
    assert vm.guest.boot_id == booted
    assert memory_folders(vm) == ["memory"]
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)
    assert_repository_is_whole(vm)


def test_a_supervisor_that_is_killed_at_the_end_of_a_rollback_is_followed_by_the_rollback(vm: Supervised) -> None:
    """When the old QEMU is gone and the new one has not begun."""
    vm.guest.run(f"fill('large', {LARGE})")
    first = vm.perdure("snapshot", NAME)["generation"]
    expected = vm.export(first)
    vm.guest.run("write_pages(range(100))")
    newest = kept(vm)
    vm.tell_hook("kill-supervisor")
    assert "supervisor ended" in vm.refused("rollback", f"{NAME}@{first}")
    assert vm.run.ended() == -signal.SIGKILL
    vm.judge_boots()
    boot(vm)
    *_, captured, head = history(vm)
    assert (captured["cause"], head["cause"]) == ("before rollback", "rollback")
    assert vm.export(captured["generation"]) == newest
    with vm.before_boot() as found:
        assert found["pm0"][:] == expected
    assert len(memory_folders(vm)) == len(qemus(vm)) == 1
    vm.guest.run("write_pages([5])")
    assert_next_snapshot_is_right(vm)
    assert_repository_is_whole(vm)

    vm.momentous()
    vm.tell_hook("kill-supervisor")
    assert "supervisor ended" in vm.refused("rollback", f"{NAME}@{first}", "--lazy")
    vm.until(lambda: len(qemus(vm)) == 1, "the old QEMU has ended")
    vm.kill_qemu()
    assert memory_folders(vm) == ["memory-2"]  # the other one went with its QEMU, which had no names for it left
    for script in ("kill -KILL $QEMU $PPID", "kill -KILL $PPID"):  # at a stop that is about to be asked for
        vm.start().expect("tracker: ")
        assert [each["cause"] for each in history(vm)[-2:]] == ["before rollback", "rollback"]
        vm.at("quit", script)
        assert "supervisor" in vm.refused("stop", NAME)
        assert vm.run.ended() == -signal.SIGKILL
    vm.start().expect("taken over")
    vm.perdure("snapshot", NAME)  # when that is done
    vm.kill_qemu()
    assert vm.run.ended() == 1
    assert [each["cause"] for each in history(vm)[-2:]] == ["snapshot", "crash"]


def test_what_comes_before_the_first_instruction_can_be_interrupted(guest_image: Image) -> None:
    """By SIGKILL right after QEMU was started, and by SIGTERM in a restore."""
    vm = Supervised(guest_image)
    with contextlib.closing(vm):
        wrapper, once = vm.folder / "qemu", vm.folder / "once"
        wrapper.write_text(
            f"""\
#!/bin/sh
case "$1" in -name) [ -e {once} ] || {{ touch {once}; kill -KILL $PPID; }} ;; esac
exec {QEMU} "$@"
"""
        )
        wrapper.chmod(0o755)
        with described(vm, (f'"{QEMU}"', f'"{wrapper}"')):
            assert vm.start().ended() == -signal.SIGKILL
            boot(vm)
            assert len(qemus(vm)) == 1
        vm.guest.run(f"fill('large', {LARGE})")
        assert_next_snapshot_is_right(vm)
        expected = kept(vm)
        vm.perdure("stop", NAME)
        assert vm.run.ended() == 0
        run = vm.start()
        with supervisor_stopped(vm, lambda: "memory" in memory_folders(vm), "memory for the restore"):
            for words in ((), ("--discard",)):
                assert "has a supervisor already" in vm.refused("run", str(toml(vm)), *words, code=11)
            run.process.send_signal(signal.SIGTERM)
        assert run.ended() == 130
        assert f"{NAME}: not started: interrupted" in run.text
        assert_nothing_left(vm)
        vm.judge_boots()
        boot(vm)
        with vm.before_boot() as found:
            assert found["pm0"][:] == expected


def test_a_supervisor_that_is_told_to_end_captures_only_if_its_policy_says_so(vm: Supervised) -> None:
    vm.guest.run("write('kept', 1 << 20, 1); numbers = count('counter')")
    vm.run.kill()
    with described(vm, ("[policy]", "[policy]\ncapture_on_terminate = false")):
        boot(vm)
    before = records(vm)
    vm.run.process.terminate()
    assert vm.run.ended() == 130
    assert records(vm) == before
    assert_guest_goes_on(vm)
    boot(vm)


def test_a_pause_beyond_its_limit_is_given_up_or_said_as_the_policy_says(vm: Supervised) -> None:
    """The guest counts, so that a page is always dirty, and no pause takes only a millisecond."""
    vm.guest.run("numbers = count('counter', pause=0.0)")
    for over, limit in (("give-up", 1), ("exceed", 1), ("give-up", 60000)):
        vm.run.kill()
        policy = f'[policy]\npause_ms_max = {limit}\nrounds_max = 2\nover_limit = "{over}"'
        with described(vm, ("[policy]", policy)):
            boot(vm)
        for _ in range(10):  # that a page is dirty at the last look of a pause is likely, no more
            before = records(vm)
            done = vm.tried("snapshot", NAME)
            vm.run.look()
            said = done.stderr.decode() + vm.run.text
            if limit != 1 or "pause_ms_max is 1" in said:
                break
        if (over, limit) == ("give-up", 1):
            assert (done.returncode, done.stdout) == (1, b"")
            assert "given up, nothing was captured" in said and "after 2 rounds" in said and "pause_ms_max is 1" in said
            assert records(vm) == before
            assert_guest_goes_on(vm)
        else:
            assert done.returncode == 0, done
            assert len(records(vm)) == len(before) + 1
            assert ("pause_ms_max is 1: after 2 rounds" in said) is (limit == 1)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)
    vm.run.kill()
    boot(vm)


# A full disk


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """No room on a file system, for a while."""
    ballast = disk / "ballast"
    try:
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(PAGE))
        yield
    finally:
        ballast.unlink()


def test_a_full_disk_costs_generations_and_nothing_else(guest_image: Image) -> None:
    vm = Supervised(guest_image)
    with contextlib.closing(vm):
        disk = vm.folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", disk], check=True)
        vm.repository = disk / "repository"
        vm.environment["PERDURE_REPOSITORY"] = str(vm.repository)
        vm.perdure("init")
        boot(vm)
        vm.guest.run("numbers = count('counter')")
        vm.perdure("snapshot", NAME)
        before = records(vm)
        with full(disk):
            for size in (MIB, LARGE):  # stored by the supervisor itself, and by its workers
                vm.guest.run(f"fill('area {size}', {size})")
                assert "No space left on device" in vm.refused("snapshot", NAME)
            assert "No space left on device" in vm.refused("snapshot", NAME, "--full")
            assert "No space left on device" in vm.refused("stop", NAME, "--capture")
            assert "No space left on device" in vm.refused("rollback", f"{NAME}@1")
            assert records(vm) == before
            assert memory_folders(vm) == ["memory"]
            assert_guest_goes_on(vm)
            assert_answers_promptly(vm)
        vm.guest.run("finish()")
        assert_next_snapshot_is_right(vm)
        vm.guest.run("write_pages(range(1, 4000, 3))")
        expected = kept(vm)
        vm.judge_boots()
        with full(disk):
            vm.guest.reboot(SECONDS)
            vm.run.expect(f"{NAME} NOT CAPTURED at reboot: .*No space left on device")
            vm.run.expect("rebooted: .* scrubbed, verified")
        ready(vm)
        with vm.before_boot() as found:
            assert found["pm0"][:] == expected
        assert assert_next_snapshot_is_right(vm)["dirty_bytes"] >= 1000 * PAGE
        vm.guest.run("write_pages(range(2, 4000, 3))")
        expected = kept(vm)
        with full(disk):
            vm.kill_qemu()
            assert vm.run.ended() == 1
            assert "No space left on device" in vm.run.text
            assert "No space left on device" in vm.refused("run", str(toml(vm)))
        boot(vm)
        assert history(vm)[-1]["cause"] == "crash", vm.report()
        with vm.before_boot() as found:
            assert found["pm0"][:] == expected
        assert_repository_is_whole(vm)


# Launches that cannot be


@pytest.fixture(scope="module")
def made(guest_image: Image) -> Iterator[Supervised]:
    """A VM that does not run, with two generations that differ in the area `kept`."""
    vm = Supervised(guest_image)
    with contextlib.closing(vm):
        boot(vm)
        vm.guest.run("write('kept', 4 << 20, 1)")
        vm.perdure("snapshot", NAME)
        vm.guest.run("write('kept', 4 << 20, 2)")
        stop(vm, "--capture")
        yield vm


@pytest.fixture
def stopped(made: Supervised) -> Iterator[Supervised]:
    """A test leaves it stopped, and may add generations."""
    if made.run.alive:
        stop(made)
    yield made
    assert_nothing_left(made)


def stop(vm: Supervised, *words: str) -> None:
    """`perdure stop`."""
    vm.perdure("stop", NAME, *words)
    assert vm.run.ended() == 0


def test_a_generation_that_does_not_fit_the_description_is_not_booted(stopped: Supervised) -> None:
    vm = stopped
    region = '[[region]]\nname = "pm0"\nsize = 33554432'
    for change, problem in (
        ((region, region.replace("33554432", '"64MiB"')), "set its size to 33554432"),
        ((region, region.replace("33554432", '"16MiB"')), "set its size to 33554432"),
        ((region, ""), "has region pm0, which the VM lacks"),
        ((region, region.replace("pm0", "other")), "has region pm0, which the VM lacks"),
    ):
        with described(vm, change):
            assert problem in vm.refused("run", str(toml(vm)))
            assert_nothing_left(vm)
    with described(vm, (region, f'{region}\n[[region]]\nname = "pm1"\nsize = "16MiB"')):
        vm.start().expect("tracker: ")  # a new one is empty
        assert vm.status()["regions"]["pm1"]["tags"] == 0
        stop(vm)


def test_a_hook_that_fails_keeps_a_vm_from_being_launched(stopped: Supervised) -> None:
    stopped.tell_hook("fail")
    assert "hook before_boot" in stopped.refused("run", str(toml(stopped)))
    assert_nothing_left(stopped)


def test_a_damaged_generation_is_not_booted(stopped: Supervised) -> None:
    vm = stopped
    packs = [vm.repository / "packs" / name for name in vm.perdure("show", f"{NAME}@2")["packs"]]
    pack = max(packs, key=lambda path: path.stat().st_size)
    with damaged(pack):
        said = vm.refused("run", str(toml(vm)), "--from", f"{NAME}@2")
        assert f"packs/{pack.name} at offset " in said
        assert "--from" in said and "--without-restore" in said
        assert_nothing_left(vm)
        with described(vm, (f'"{QEMU}"', '"nothing"')):  # nothing is restored for it
            assert "no program nothing" in vm.refused("run", str(toml(vm)), "--from", f"{NAME}@2")
        boot(vm, "--from", f"{NAME}@1")
        assert vm.guest.run("holds('kept', 4 << 20, 1)")
        assert vm.export(vm.perdure("snapshot", NAME)["generation"]) == kept(vm)
        stop(vm)
        vm.start("--without-restore").expect("persistent memory is empty")
        assert len(vm.perdure("regions", NAME)["regions"]) == 1
        stop(vm)
    assert vm.perdure("check", "--read-data")["clean"]


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """With one bit flipped in the middle, for a while."""

    def flip() -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    flip()
    try:
        yield
    finally:
        flip()


def test_another_command_line_is_held_against_a_restore_as_the_policy_says(stopped: Supervised) -> None:
    vm = stopped
    problem = f"command line of VM {NAME} is not what {NAME}@2 was captured with"
    for policy, heard in (("require", True), ("warn", True), ("ignore", False)):
        with described(vm, ("quiet panic", "panic"), ("[policy]", f'[policy]\nmeasurements = "{policy}"')):
            if policy == "require":
                said = vm.refused("run", str(toml(vm)), "--from", f"{NAME}@2")
                assert problem in said and "--without-restore" in said
                assert_nothing_left(vm)
                continue
            vm.start("--from", f"{NAME}@2").expect("tracker: ")
            assert (problem in vm.run.text) is heard
            assert any(problem in each for each in vm.status()["warnings"]) is heard
            stop(vm)
    with described(vm, ("[policy]", '[policy]\nmeasurements = "require"')):
        vm.start("--from", f"{NAME}@2").expect("tracker: ")
        stop(vm)


def test_points_in_time_that_are_not_of_this_vm(vm: Supervised) -> None:
    image = vm.folder / "image"
    image.write_bytes(bytes(16 * MIB))
    vm.perdure("import", "other", f"pm0={image}")
    vm.guest.run("write('kept', 1 << 20, 1); numbers = count('counter')")
    imported = vm.perdure("import", NAME, f"pm0={image}")["generation"]
    before = vm.status()
    for point, code, problem in (
        (f"{NAME}@999", 1, f"{NAME}@999"),
        (f"{NAME}@latest-1", 2, "VM@7"),
        (f"{NAME}@{imported}", 1, "does not say what of it is to be kept"),
    ):
        assert problem in vm.refused("rollback", point, code=code)
    identity = vm.perdure("show", "other@1")["id"]
    with pytest.raises(ConflictError, match="another VM"):
        ask(vm, "rollback", point=identity)
    assert vm.status() == before
    assert memory_folders(vm) == ["memory"]
    assert_guest_goes_on(vm)
    vm.guest.run("finish()")
    assert_next_snapshot_is_right(vm)
