"""What tells a process from all others, past and present: its pid, its start, and the boot it belongs to."""

from __future__ import annotations

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
