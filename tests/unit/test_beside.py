"""What a supervisor does without being asked goes on after any error, which is said in one line."""

import asyncio
import errno
import resource
import signal
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from base import private
from base.errors import StorageError, VirtualMachineError
from perdure.supervision import background, leaving
from perdure.supervision.capturing import Capturing
from perdure.supervision.schedule import Due
from perdure.supervision.supervisor import Supervisor
from vm import migration
from vm.content import FileContent
from vm.folder import RuntimeFolder

REFUSED = OSError(errno.EMFILE, "Too many open files")
TOLD = "OSError: [Errno 24] Too many open files"


class Failing:
    """Work that fails, and then again; the third time it is cancelled, if it gets that far."""

    calls = 0

    async def __call__(self, *_: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise asyncio.CancelledError
        raise REFUSED

    def run(self, loop: Any) -> None:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(loop)


def test_captures_by_schedule_go_on():
    work, said = Failing(), []
    table: Any = SimpleNamespace(next=(datetime.now(UTC), None), due=lambda _: Due(False, ()))
    work.run(background.keep_schedule("demo", table, work, said.append))
    assert said == [f"demo NOT CAPTURED on schedule: {TOLD}"] * 2


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(background, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(background, "_KEYS_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_write_back_goes_on_and_says_the_same_once():
    work, said = Failing(), []
    work.run(background.keep_drained("demo", work, said.append))
    assert said == [f"demo: dirty pages are not stored ahead: {TOLD}"]


@pytest.mark.usefixtures("at_once")
def test_new_keys_are_looked_for_again():
    work, said = Failing(), []
    supervisor: Any = SimpleNamespace(
        vm="demo",
        say=said.append,
        in_store=work,
        repository=SimpleNamespace(renew_keys=None),
        launcher=SimpleNamespace(lazy=object()),
        machine=SimpleNamespace(lazy=None),
        filling=None,
    )
    work.run(background.keep_keys(supervisor))
    assert said == [f"demo: what is sealed with new keys cannot be read for it: {TOLD}"]


def test_a_capture_that_fails_keeps_no_guest_down_and_no_supervisor_from_leaving():
    said: list[str] = []

    async def run() -> None:
        supervisor: Any = object.__new__(Supervisor)
        supervisor.vm, supervisor.state, supervisor.say, supervisor.left = "demo", "running", said.append, "runs on"
        supervisor.policy = SimpleNamespace(capture_on_terminate="on")
        supervisor.operation, supervisor._machine = asyncio.Lock(), SimpleNamespace()
        supervisor._ended = asyncio.get_running_loop().create_future()
        supervisor.capturing = SimpleNamespace(as_it_is=lambda *_, **__: Failing()())
        await supervisor._leave(signal.SIGTERM)
        assert supervisor._ended.result().detached
        capturing: Any = object.__new__(Capturing)
        capturing._supervisor, capturing.of = supervisor, Failing()
        assert await capturing.tried(supervisor._machine, "reboot") is None

    asyncio.run(run())
    assert said == [f"demo NOT CAPTURED: {TOLD}", f"demo NOT CAPTURED at reboot: {TOLD}"]


@contextmanager
def without_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_the_host_has_no_room_for_is_named(tmp_path: Path):
    (tmp_path / "memory").touch()
    content = FileContent(tmp_path / "memory")
    monitor: Any = SimpleNamespace(vm="demo", version=(9, 0))
    with without_descriptors():
        with pytest.raises(StorageError, match="memory for region pm0: cannot have it: Too many open files"):
            private.file("region pm0", 1)
        with pytest.raises(VirtualMachineError, match="VM demo: no file for its device state: Too many open files"):
            _sent(migration._given(monitor, 1))
    with pytest.raises(StorageError, match=r"memory for copies, 1048576\.0 TiB: cannot have it: Cannot allocate"):
        private.memory("copies", 1 << 60)
    with pytest.raises(StorageError, match="stopped: cannot write: No such file"):
        leaving.note_stopped(RuntimeFolder("demo", tmp_path / "nowhere"), leaving.CAPTURE)
    content.close()
    with pytest.raises(StorageError, match="memory: cannot look for holes: Bad file descriptor"):
        content.resident(1)


def _sent(work: Any) -> None:
    """A coroutine that waits for nothing, without a loop, which takes descriptors."""
    work.send(None)
