"""For a supervisor that is to be killed at one stage of a capture: Python runs this first where it is on the path.

PERDURE_TEST_STAGES names a folder. While it has a file `armed` with a number, each step of the supervisor towards QEMU
(a command) and towards the disk (of base.disk) is counted and written to its file `trace`; at that number the
supervisor is killed with SIGKILL, before the step is taken.
"""

import os
import signal
import threading
from pathlib import Path

from base.disk import Disk
from vm.monitor import Monitor

_folder = Path(os.environ["PERDURE_TEST_STAGES"])
_lock = threading.Lock()
_supervisor = os.getpid()
_taken, _order = 0, 0
_execute = Monitor.execute


def _step(name):
    global _taken, _order
    if os.getpid() != _supervisor:
        return
    with _lock:
        try:
            armed = int((_folder / "armed").read_text())
            order = (_folder / "armed").stat().st_mtime_ns
        except FileNotFoundError:
            return
        if order != _order:
            _taken, _order = 0, order
        if _taken == armed:
            (_folder / "armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        _taken += 1
        with (_folder / "trace").open("a") as trace:
            trace.write(f"{name}\n")


def _disk_step(_, operation, path):
    _step(f"{operation} {path}")


async def _monitor_execute(monitor, command, /, **arguments):
    _step(command)
    return await _execute(monitor, command, **arguments)


Disk.step = _disk_step
Monitor.execute = _monitor_execute
