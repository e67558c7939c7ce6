"""A session with QEMU's monitor that is lost while QEMU lives on: the supervisor makes another one, and goes on.

One VM meets several losses. Sessions are cut before a command that they would carry (stages/sitecustomize.py), and from
outside, while nothing is said: a copy of the supervisor's end of the connection is shut down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import MIB, NAME, Image, Supervised
from test_capture_events import go_down
from test_faults import ready
from test_full import ORDINARY, goes_on, judged, nothing_is_left

pytestmark = pytest.mark.qemu

PIDFD_GETFD = 438
"""Number of the system call, with any processor."""


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    with contextlib.closing(Supervised(guest_image)) as made:
        paths = (str(Path(__file__).parent / "stages"), made.environment["PYTHONPATH"])
        made.run_environment = {"PYTHONPATH": os.pathsep.join(paths), "PERDURE_TEST_STAGES": str(made.folder)}
        yield made
        print(made.report())


def cut_before(vm: Supervised, command: str) -> None:
    """The session ends when QEMU is to be given this command."""
    (vm.folder / "armed").write_text(command)


def cut(vm: Supervised) -> None:
    """The session ends now, for both sides."""
    pid = vm.run.process.pid
    pidfd = os.pidfd_open(pid)
    try:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(each).startswith("socket:"):
                continue
            copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, int(each.name), 0)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=copy) as found, contextlib.suppress(OSError):
                if found.getpeername() == str(vm.runtime / "qmp.sock"):
                    found.shutdown(socket.SHUT_RDWR)
                    return
    finally:
        os.close(pidfd)
    raise AssertionError("there is no session")


def connected_again(vm: Supervised) -> None:
    vm.run.expect("the connection to QEMU's monitor was lost, and was made again")


def test_another_session_takes_the_place_of_one_that_was_lost(vm: Supervised) -> None:
    vm.boot()
    ready(vm)
    vm.guest.run(ORDINARY + f"write('kept', {MIB}, 1)")
    cut_before(vm, "migrate")  # in the pause
    assert "the connection to QEMU's monitor ended" in vm.refused("snapshot", NAME, "--full")
    connected_again(vm)
    goes_on(vm)
    nothing_is_left(vm)
    judged(vm)

    # The guest reboots while there is no session, and the next one is lost when it is about to go on.
    vm.guest.run("finish()")
    booted = vm.guest.boot_id
    vm.run.process.send_signal(signal.SIGSTOP)
    cut(vm)
    go_down(vm, "reboot()")
    cut_before(vm, "system_reset")
    vm.run.process.send_signal(signal.SIGCONT)
    connected_again(vm)
    connected_again(vm)
    vm.run.expect("rebooted")
    vm.guest.wait_ready(after=booted)
    ready(vm)
    assert vm.guest.run(f"holds('kept', {MIB}, 1)")
    assert vm.status()["state"] == "running"
    assert [each["cause"] for each in vm.log()[-2:]] == ["reboot", "reboot"]
