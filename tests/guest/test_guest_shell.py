"""The two ends of the test runner against each other, with a Unix socket in QEMU's place."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from guest_fixtures import load

HERE = Path(__file__).parent
runner = load(HERE / "runner.py")
client = load(HERE / "client.py")


class Guest:
    """Boots when told to, and serves one connection after the other. As with QEMU, the socket outlives a boot."""

    def __init__(self, path, monkeypatch):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.boot = "first"
        self.connection = None
        self._threads = []
        monkeypatch.setattr(runner, "boot_id", lambda: self.boot)

    def boots(self):
        """Take the next connection, or go on with the one there is, in a thread."""
        thread = threading.Thread(target=self._serve)
        thread.start()
        self._threads.append(thread)

    def _serve(self):
        if self.connection is None:
            self.connection, _ = self.listener.accept()
        with contextlib.suppress(OSError):
            runner.serve(self.connection.fileno(), runner.Runner(self.connection.fileno()))

    def hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self.connection.close()
        self.connection = None


@pytest.fixture
def guest(tmp_path, monkeypatch):
    made = Guest(tmp_path / "test.sock", monkeypatch)
    yield made
    if made.connection is not None:
        made.hang_up()
    made.listener.close()


@pytest.fixture
def shell(guest, tmp_path):
    with client.GuestShell(tmp_path / "test.sock") as made:
        guest.boots()
        assert made.wait_ready(20) == "first"
        yield made


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 1", 2),
        ("x = 5\nx * 2", 10),
        ("x = 5", None),
        ("", None),
        ("(1, 'two', None)", [1, "two", None]),
        ("b'raw'", "b'raw'"),
        ("perdure_guest.PAGE", 4096),
        ("'x' * 200_000", "x" * 200_000),
    ],
)
def test_the_value_is_that_of_the_last_expression(shell, code, value):
    assert shell.run(code, 20) == value


def test_names_stay(shell):
    shell.run("def double(n):\n    return 2 * n", 20)
    assert shell.run("double(4)", 20) == 8


@pytest.mark.parametrize("code", ["1 / 0", "import nothing_of_the_kind", "syntax error", "raise SystemExit(3)"])
def test_what_is_raised_comes_back(shell, code):
    with pytest.raises(client.GuestCodeError, match=r"ZeroDivision|ModuleNotFound|SyntaxError|SystemExit"):
        shell.run(code, 20)
    assert shell.run("'still there'", 20) == "still there"


def test_a_thread_runs_on_and_ends(shell):
    shell.run("import threading; go = threading.Event()", 20)
    number = shell.start("go.wait()", 20)
    failing = shell.start("1 / 0", 20)
    with pytest.raises(client.GuestCodeError, match="ZeroDivision"):
        shell.finished(failing, 20)
    with pytest.raises(client.GuestGoneError, match="in time"):
        shell.finished(number, 0.05)
    shell.run("go.set()", 20)
    assert shell.finished(number, 20) is True


def test_a_reboot_ends_what_waits_and_is_waited_for(guest, shell):
    guest.boot = "second"
    with pytest.raises(client.GuestGoneError, match="rebooted"):  # it says ready again instead of an answer
        shell.run(f"__import__('runner').write_ready({guest.connection.fileno()})", 20)
    assert shell.wait_ready(20, after="first") == "second"
    assert shell.run("1", 20) == 1
    with pytest.raises(client.GuestGoneError, match="no guest is ready after"):
        shell.wait_ready(0.2, after="second")


def test_a_new_process_is_connected_to(guest, shell):
    guest.hang_up()
    with pytest.raises(client.GuestGoneError):
        shell.run("1", 20)
    guest.boots()
    assert shell.wait_ready(20) == "first"
    assert shell.run("2", 20) == 2


def test_a_socket_that_never_comes(tmp_path):
    with client.GuestShell(tmp_path / "none") as shell, pytest.raises(client.GuestGoneError, match="No such file"):
        shell.wait_ready(0.1)
