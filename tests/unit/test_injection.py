"""Injection into a process that is not QEMU: nothing of it may be lost or left behind."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.errors import VirtualMachineError
from vm import injection

# Counts real-time signals, which queue: each one sent is one received. The interpreter's handler in C writes a byte for
# each. SIGUSR1 asks for the count.
TARGET = """
import os, signal
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
for each in (signal.SIGRTMIN, signal.SIGUSR1):
    signal.signal(each, lambda *_: None)
print("ready", flush=True)
count = 0
while True:
    for number in os.read(reader, 1 << 16):
        if number == signal.SIGUSR1:
            print(count, flush=True)
        else:
            count += 1
"""


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 30)[0], "the target does not answer"
    return process.stdout.readline().strip()


def ask(target: subprocess.Popen[str]) -> int:
    os.kill(target.pid, signal.SIGUSR1)
    return int(line(target))


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def target() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", TARGET], stdout=subprocess.PIPE, text=True)
    try:
        assert line(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


# The helper, slowed down so that signals stop the target before we do, and are pending when it executes our call.
SLOW_HELPER = """
import sys, time
from vm import injection
real = injection._ptrace
def slow(request, *arguments):
    if request in (injection._PTRACE_INTERRUPT, injection._PTRACE_SINGLESTEP):
        time.sleep(0.002)
    real(request, *arguments)
injection._ptrace = slow
sys.exit(injection.main(sys.argv[1:]))
"""


def inject_slowly(pid: int) -> int:
    return int(subprocess.run([sys.executable, "-c", SLOW_HELPER, str(pid)], check=True, capture_output=True).stdout)


@pytest.mark.parametrize("inject", [injection.inject, inject_slowly])
def test_no_signal_is_lost_under_injections(target, inject):
    done = threading.Event()
    sent = 0

    def bombard() -> None:
        nonlocal sent
        while not done.is_set():
            os.kill(target.pid, signal.SIGRTMIN)
            sent += 1
            done.wait(0.004)  # about as often as the slow helper looks: it meets signals, and their absence

    sender = threading.Thread(target=bombard)
    sender.start()
    try:
        numbers = [inject(target.pid) for _ in range(10)]
    finally:
        done.set()
        sender.join()
    counted = -1
    while counted < sent:  # some may still be queued
        before, counted = counted, ask(target)
        assert counted > before
    assert counted == sent
    assert numbers == injection.held_descriptors(target.pid, "anon_inode:[userfaultfd]")


def test_a_process_that_is_stopped_stays_stopped(target):
    os.kill(target.pid, signal.SIGSTOP)
    os.waitpid(target.pid, os.WUNTRACED)
    injection.inject(target.pid)
    assert state(target.pid) == "T"
    os.kill(target.pid, signal.SIGCONT)
    assert ask(target) == 0


def test_a_process_that_is_gone_is_named_in_the_error():
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(VirtualMachineError, match=rf"pid {process.pid}\): cannot make a userfaultfd in it: No such"):
        injection.inject(process.pid)


def test_another_architecture_is_refused(monkeypatch):
    monkeypatch.setattr(injection.platform, "machine", lambda: "aarch64")
    with pytest.raises(VirtualMachineError, match="x86-64 only, this is aarch64"):
        injection.inject(os.getpid())
