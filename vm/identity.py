"""What tells a process from all others, past and present: its pid, its start, and the boot it belongs to."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Identity:
    """A process; a pid alone is used again."""

    pid: int
    start_ticks: int
    """Clock ticks between the boot and the start of the process."""
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Raises OSError if there is no such process. Source: proc_pid_stat(5), random(4)."""
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()  # the name before may hold anything; starttime is field 22
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(pid, int(fields[19]), boot)

    def open(self) -> int | None:
        """A pidfd of this process, the caller's to close; None if it has ended. Source: pidfd_open(2)."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        try:
            same = Identity.of(self.pid) == self
        except OSError:
            same = False
        if same and not ended(pidfd, 0):
            return pidfd
        os.close(pidfd)
        return None


def state_of(pid: int) -> str:
    """The letter of a process's state, as `T` where it stands still until it gets SIGCONT; empty if it has ended.
    Source: proc_pid_stat(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    return chr(stat[stat.rindex(b")") + 2])


def ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for the end of a process; whether that has come."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
