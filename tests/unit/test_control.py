"""The control socket: a server in a thread's event loop, commands in the test's own thread."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from base import errors
from base.errors import (
    ConfigurationError,
    ConflictError,
    IntegrityError,
    LockedError,
    NotFoundError,
    PerdureError,
    StorageError,
    UsageError,
    WorkerError,
)
from perdure.control import REQUEST_BYTES_MAX, call, serve
from vm.regions import TagConflictError, TagInvalidError

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 30


class Supervisor:
    """A server of one VM, with handlers that a test adds to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logged: list[str] = []
        self.handlers = {"echo": self.echo}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)  # a failed test ends all the same
        self.thread.start()
        self.server = None

    @staticmethod
    async def echo(arguments, _reporter):
        return arguments

    def inside(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_SECONDS)

    def start(self) -> "Supervisor":
        self.server = self.inside(serve(self.path, self.handlers, self.logged.append))
        return self

    def close(self) -> None:
        if self.loop.is_closed():
            return
        if self.server is not None:
            self.inside(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_SECONDS)
        self.loop.close()

    def raises(self, error: BaseException) -> None:
        async def handler(_arguments, _reporter):
            raise error

        self.handlers["fail"] = handler


@pytest.fixture
def path(tmp_path):
    return tmp_path / "demo" / "control.sock"


@pytest.fixture
def supervisor(path):
    supervisor = Supervisor(path).start()
    yield supervisor
    supervisor.close()


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def raw(path: Path, data: bytes) -> list[dict]:
    """Send bytes as they are; everything that comes back."""
    messages = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(str(path))
        with contextlib.suppress(ConnectionError):  # it need not hear all to refuse
            connection.sendall(data)
        with connection.makefile("rb") as lines, contextlib.suppress(ConnectionResetError):
            for line in lines:
                messages.append(msgspec.json.decode(line))
    return messages


@pytest.mark.usefixtures("supervisor")
def test_a_request_and_its_result(path):
    arguments = {"address": 1 << 60, "name": "ü\n", "deep": [{"x": None}]}
    assert call(path, "echo", arguments) == arguments
    assert call(path, "echo") == {}
    assert raw(path, b'{"do":"echo","arguments":{}}\n') == [{"ok": True, "result": {}}]


def test_only_we_can_reach_it(supervisor):
    assert stat.S_IMODE(supervisor.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(supervisor.path.stat().st_mode) == 0o600


def test_modes_do_not_depend_on_the_umask(tmp_path):
    before = os.umask(0)
    supervisor = Supervisor(tmp_path / "demo" / "control.sock")
    try:
        supervisor.start()
        test_only_we_can_reach_it(supervisor)
    finally:
        os.umask(before)
        supervisor.close()


def test_progress_and_notices_come_in_order_before_the_result(supervisor, path):
    async def work(_arguments, reporter):
        def in_a_thread():
            for done in range(0, 100_001, 1000):
                reporter("capturing", np.int64(done), np.int64(100_000))

        reporter.notice("tracker: scan, since the kernel is old")
        await asyncio.to_thread(in_a_thread)
        reporter("committing", 0, 1)
        return {"generation": 1}

    supervisor.handlers["work"] = work
    heard: list[tuple] = []
    result = call(path, "work", {}, lambda *each: heard.append(each), heard.append)
    assert result == {"generation": 1}
    assert heard[0] == "tracker: scan, since the kernel is old"
    assert heard[1] == ("capturing", 0, 100_000)
    assert heard[-2:] == [("capturing", 100_000, 100_000), ("committing", 0, 1)]
    assert len(heard) < 60  # of 101 steps in a few milliseconds
    assert call(path, "work") == {"generation": 1}  # and nobody has to listen


def test_what_is_said_after_the_answer_is_not_sent(supervisor, path):
    kept = []

    async def work(_arguments, reporter):
        kept.append(reporter)
        return {}

    supervisor.handlers["work"] = work
    assert raw(path, b'{"do":"work"}\n') == [{"ok": True, "result": {}}]
    kept[0].notice("too late")
    wait_for(lambda: not kept[0].connected)
    supervisor.close()
    kept[0].notice("much too late")


EXAMPLES = {
    "ConfigurationError": ConfigurationError("VM.toml", "is no size", line=3, key="memory"),
    "FormatVersionError": errors.FormatVersionError("manifest 3", 9, 1),
    "IntegrityError": IntegrityError("pack ab", "seal is broken", offset=7, chunk="0" * 64),
    "QuotaError": errors.QuotaError("demo", 7 << 20, 4 << 20, 5 << 20),
    "StorageError": StorageError("/x", "cannot write: No space left on device", errno=28),
}
FAMILIES = sorted(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PerdureError)
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_error_of_ours_arrives_as_it_was_raised(supervisor, path, name):
    error = EXAMPLES[name] if name in EXAMPLES else getattr(errors, name)("VM demo: it is\nso")
    supervisor.raises(error)
    with pytest.raises(PerdureError) as caught:
        call(path, "fail")
    assert type(caught.value) is type(error)
    assert str(caught.value) == errors.one_line(error)
    assert caught.value.exit_code == error.exit_code
    assert vars(caught.value) == vars(error)
    assert supervisor.logged == []


@pytest.mark.parametrize(
    ("error", "family", "code", "text"),
    [
        (TagInvalidError("bounds", "VM demo: outside"), UsageError, 2, "VM demo: outside"),
        (TagConflictError("overlap", "VM demo: taken"), ConflictError, 1, "VM demo: taken"),
        (ExceptionGroup("both", [ValueError("b"), ConflictError("a")]), ConflictError, 1, "b; a"),
        (asyncio.CancelledError(), ConflictError, 1, "interrupted"),
    ],
)
def test_errors_of_other_modules_arrive_as_their_family(supervisor, path, error, family, code, text):
    supervisor.raises(error)
    with pytest.raises(family, match=text) as caught:
        call(path, "fail")
    assert type(caught.value) is family
    assert caught.value.exit_code == code
    assert getattr(caught.value, "kind", None) == getattr(error, "kind", None)
    assert supervisor.logged == []


def test_an_exit_code_of_its_own_is_kept(supervisor, path):
    class FoundDamageError(IntegrityError):
        exit_code = 3

    supervisor.raises(FoundDamageError("pack ab", "is damaged"))
    with pytest.raises(IntegrityError) as caught:
        call(path, "fail")
    assert caught.value.exit_code == 3
    assert IntegrityError.exit_code == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), OSError(5, "x"), RecursionError()])
def test_a_handler_with_a_bug_costs_one_answer_and_one_log_line(supervisor, path, error):
    supervisor.raises(error)
    with pytest.raises(PerdureError, match=type(error).__name__) as caught:
        call(path, "fail")
    assert type(caught.value) is PerdureError
    [line] = supervisor.logged
    assert type(error).__name__ in line
    assert call(path, "echo", {"still": "there"}) == {"still": "there"}


def test_a_result_that_is_no_json(supervisor, path):
    async def wrong(_arguments, _reporter):
        return {"x": object()}

    supervisor.handlers["wrong"] = wrong
    with pytest.raises(PerdureError, match="TypeError"):
        call(path, "wrong")
    assert len(supervisor.logged) == 1


@pytest.mark.usefixtures("supervisor")
@pytest.mark.parametrize(
    "line",
    [b"x\n", b"\xff\n", b"{}\n", b'{"do":3}\n', b'{"do":"echo","arguments":[]}\n', b'{"do":' + b"[" * 90000 + b"\n"],
)
def test_what_is_no_request(path, line):
    [answer] = raw(path, line)
    assert answer["ok"] is False
    assert answer["family"] == "UsageError"
    assert call(path, "echo", {"still": "there"}) == {"still": "there"}


@pytest.mark.usefixtures("supervisor")
def test_a_request_that_is_too_long(path):
    with pytest.raises(UsageError, match=r"VM demo: echo: .* bytes"):
        call(path, "echo", {"x": "y" * REQUEST_BYTES_MAX})
    [answer] = raw(path, b"x" * (3 * REQUEST_BYTES_MAX // 2) + b"\n")
    assert answer["family"] == "UsageError"


def test_a_long_result(supervisor, path, caplog):
    arguments = {"x": "y" * (REQUEST_BYTES_MAX - 1000)}
    for _ in range(3):
        assert call(path, "echo", arguments) == arguments
    supervisor.inside(supervisor.server.close())
    assert caplog.records == []  # of asyncio


@pytest.mark.usefixtures("supervisor")
def test_a_command_of_another_version(path):
    with pytest.raises(UsageError, match="VM demo does not know 'levitate'"):
        call(path, "levitate")


def test_nobody_listens(tmp_path, path):
    for name in ("demo", "gone"):
        with pytest.raises(NotFoundError, match=f"VM {name} is not running: start it with perdure run"):
            call(tmp_path / name / "control.sock", "status")
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotFoundError, match="VM demo is not running"):
        call(path, "status")


def test_a_socket_that_a_dead_supervisor_left_is_taken_over(path):
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    supervisor = Supervisor(path).start()
    try:
        assert call(path, "echo", {"x": 1}) == {"x": 1}
    finally:
        supervisor.close()
    assert list(path.parent.iterdir()) == []


@pytest.mark.usefixtures("supervisor")
def test_a_second_supervisor_is_refused_and_the_first_unharmed(path):
    second = Supervisor(path)
    try:
        with pytest.raises(LockedError, match=f"VM demo has a supervisor already, process {os.getpid()}: "):
            second.start()
    finally:
        second.close()
    assert call(path, "echo", {"x": 1}) == {"x": 1}


def test_a_folder_that_is_open_to_others_is_refused(path):
    path.parent.mkdir()
    path.parent.chmod(0o750)
    supervisor = Supervisor(path)
    try:
        with pytest.raises(StorageError, match=r"demo: is open to other users .*mode 750"):
            supervisor.start()
        assert list(path.parent.iterdir()) == []
        path.parent.chmod(0o700)
        supervisor.start()
    finally:
        supervisor.close()


def test_a_path_longer_than_unix_allows(tmp_path):
    path = tmp_path / ("x" * 120) / ("y" * 120) / "demo" / "control.sock"
    path.parent.parent.mkdir(parents=True)
    supervisor = Supervisor(path).start()
    try:
        assert call(path, "echo", {"x": 1}) == {"x": 1}
    finally:
        supervisor.close()


def test_a_name_that_is_too_long_is_an_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "demo" / ("s" * 108)
    supervisor = Supervisor(path)
    try:
        for _ in range(2):  # the folder's lock is not kept either
            with pytest.raises(StorageError, match="cannot listen"):
                supervisor.start()
    finally:
        supervisor.close()
    with pytest.raises(StorageError, match="cannot connect"):
        call(path, "echo")


def test_a_client_that_leaves_does_not_stop_what_it_began(supervisor, path):
    began, noticed, ended = threading.Event(), [], threading.Event()

    async def work(_arguments, reporter):
        began.set()
        while reporter.connected:
            reporter("capturing", 1, 2)
            reporter.notice("x" * 1000)
            await asyncio.sleep(0)
        noticed.append("gone")
        reporter("capturing", 2, 2)
        await asyncio.sleep(0)
        ended.set()
        return {}

    supervisor.handlers["work"] = work
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b'{"do":"work"}\n')
        assert began.wait(DEADLINE_SECONDS)
    assert ended.wait(DEADLINE_SECONDS)
    assert noticed == ["gone"]
    assert call(path, "echo", {"x": 1}) == {"x": 1}
    with socket.socket(socket.AF_UNIX) as connection:  # leaves without a word, or in the middle of one
        connection.connect(str(path))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b'{"do":"ec')
    assert call(path, "echo", {"x": 1}) == {"x": 1}  # so both of them have been met
    wait_for(lambda: not supervisor.server._conversations)
    assert supervisor.logged == []


def test_a_client_that_does_not_read_costs_bounded_memory(supervisor, path):
    done = threading.Event()
    unread = []

    async def work(_arguments, reporter):
        for _ in range(5000):
            reporter.notice("x" * 1000)
            await asyncio.sleep(0)
        unread.append(reporter._writer.transport.get_write_buffer_size())
        done.set()
        return {}

    supervisor.handlers["work"] = work
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b'{"do":"work"}\n')
        assert done.wait(DEADLINE_SECONDS)
        assert unread[0] < 1 << 21
        assert call(path, "echo", {"x": 1}) == {"x": 1}
        with connection.makefile("rb") as lines:
            assert msgspec.json.decode(list(lines)[-1]) == {"ok": True, "result": {}}


def test_several_commands_at_a_time(supervisor, path):
    both = []
    met = asyncio.Event()

    async def work(_arguments, _reporter):
        both.append(1)
        if len(both) == 2:
            met.set()
        await met.wait()
        return {}

    supervisor.handlers["work"] = work
    first = threading.Thread(daemon=True, target=call, args=(path, "work"))
    first.start()
    assert call(path, "work") == {}
    first.join(DEADLINE_SECONDS)


def test_closing_answers_what_is_under_way_and_drops_who_is_idle(supervisor, path, caplog):
    began, answers = threading.Event(), []

    async def work(_arguments, _reporter):
        began.set()
        while supervisor.server._server is not None:  # until it closes
            await asyncio.sleep(0)
        return {"done": True}

    supervisor.handlers["work"] = work
    client = threading.Thread(daemon=True, target=lambda: answers.append(call(path, "work")))
    client.start()
    assert began.wait(DEADLINE_SECONDS)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.settimeout(DEADLINE_SECONDS)
        idle.connect(str(path))
        wait_for(lambda: len(supervisor.server._conversations) == 2)
        supervisor.inside(supervisor.server.close())
        assert idle.recv(1) == b""
    client.join(DEADLINE_SECONDS)
    assert answers == [{"done": True}]
    assert caplog.records == []  # of asyncio
    assert list(path.parent.iterdir()) == []
    with pytest.raises(NotFoundError):
        call(path, "echo")


def test_closing_cancels_what_takes_too_long(supervisor, path, caplog):
    began, cancelled = threading.Event(), threading.Event()

    async def work(_arguments, _reporter):
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    supervisor.handlers["work"] = work

    def end():
        began.wait(DEADLINE_SECONDS)
        supervisor.inside(supervisor.server.close(patience_seconds=0))

    closer = threading.Thread(daemon=True, target=end)
    closer.start()
    with pytest.raises(WorkerError, match="VM demo: its supervisor ended before it had answered work"):
        call(path, "work")
    closer.join(DEADLINE_SECONDS)
    assert cancelled.is_set()
    assert caplog.records == []


def test_silence_is_bounded_where_the_caller_says_so(supervisor, path):
    async def work(_arguments, _reporter):
        await asyncio.Event().wait()

    supervisor.handlers["work"] = work
    with pytest.raises(WorkerError, match=r"VM demo: its supervisor said nothing for 0\.05 s"):
        call(path, "work", timeout_seconds=0.05)
    supervisor.inside(supervisor.server.close(patience_seconds=0))


@pytest.mark.parametrize("answer", [b"garbage\n", b'{"ok":true,"result":{"x"', b'{"ok":"maybe"}\n'])
def test_a_server_that_is_none_of_ours(path, answer):
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def impostor():
            connection = listener.accept()[0]
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(daemon=True, target=impostor)
        thread.start()
        with pytest.raises(WorkerError, match="cannot be understood"):
            call(path, "status")
        thread.join(DEADLINE_SECONDS)


def test_a_refusal_is_heard_even_by_one_who_is_still_speaking(path):
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def deaf():
            connection = listener.accept()[0]
            connection.sendall(b'{"ok":false,"error":"VM demo belongs to another user","family":"PerdureError"}\n')
            connection.close()

        thread = threading.Thread(daemon=True, target=deaf)
        thread.start()
        with pytest.raises(PerdureError, match="another user"):
            call(path, "echo", {"x": "y" * (REQUEST_BYTES_MAX - 1000)})  # more than a socket holds
        thread.join(DEADLINE_SECONDS)


def test_errors_of_the_one_who_shows_progress_are_its_own(supervisor, path):
    async def work(_arguments, reporter):
        reporter("capturing", 0, 1)
        return {}

    def broken(*_progress):
        raise BrokenPipeError(32, "Broken pipe")

    supervisor.handlers["work"] = work
    with pytest.raises(BrokenPipeError):
        call(path, "work", {}, broken)


def test_a_forked_child_does_not_keep_the_socket_alive(supervisor, path):
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.send(b"x")
        theirs.recv(1)  # until the test ends
        os._exit(0)
    try:
        assert ours.recv(1) == b"x"  # what the child does first, it has done
        supervisor.close()
        with pytest.raises(NotFoundError):
            call(path, "echo")
        second = Supervisor(path)
        try:
            second.start()  # the child does not hold the lock
            assert call(path, "echo", {"x": 1}) == {"x": 1}
        finally:
            second.close()
    finally:
        ours.close()
        theirs.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; the modes are tested above")
def test_another_user_is_refused_even_if_modes_let_it_through():
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    supervisor = Supervisor(folder / "demo" / "control.sock").start()
    try:
        for each in (folder, supervisor.path.parent, supervisor.path):
            each.chmod(0o777)
        program = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "sys.stdout.write(s.makefile().read())"
        )
        base_python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
        done = subprocess.run(
            [base_python, "-c", program, str(supervisor.path)], user=65534, group=65534, capture_output=True, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        answer = msgspec.json.decode(done.stdout)
        assert (answer["ok"], answer["error"]) == (False, "VM demo belongs to another user")
        assert call(supervisor.path, "echo") == {}
    finally:
        supervisor.close()
        shutil.rmtree(folder)


def test_commands_that_only_call_do_not_pay_for_asyncio():
    check = "import sys, perdure.control; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
