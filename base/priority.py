"""Work that only uses processor time that nobody else wants, for as long as that is bearable.

What runs so may wait without end on a busy host, so each use says how it gets its turn again. For other processes
only: a thread of ours that stood back would hold up all others where it has the interpreter's lock. Does nothing where
we may not take it back: whoever is not root could not (sched(7), RLIMIT_NICE).

Source: sched(7), proc_pid_task(5).
"""

from __future__ import annotations

import contextlib
import os


def give_way(pid: int) -> None:
    """All threads of a process stand back, until `take_turns`."""
    if os.geteuid() == 0:
        _schedule(pid, os.SCHED_IDLE)


def take_turns(pid: int) -> None:
    """All threads of a process run as others do."""
    if os.geteuid() == 0:
        _schedule(pid, os.SCHED_OTHER)


def _schedule(pid: int, policy: int) -> None:
    with contextlib.suppress(OSError):  # the process has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))
