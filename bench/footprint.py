"""How much memory a command takes in all its processes together, at its peak.

Counted are anonymous and shared memory, each shared page once (Pss_Anon and Pss_Shmem of /proc/PID/smaps_rollup, added
up over the process and its descendants); pages of mapped files are not, since the kernel can drop them. Sampled, so a
peak that lasts less than some 20 ms may be missed; and sampling slows the command down, so these runs are not timed.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path


def peak_mib(command: list[str], environment: dict[str, str]) -> float:
    """Run a command to its end; MiB at its peak. Raises RuntimeError if it fails."""
    peak = 0
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_own_kib, _family(process.pid))))
            time.sleep(0.005)
        if process.returncode:
            errors = process.stderr.read().decode() if process.stderr else ""
            raise RuntimeError(f"{' '.join(command[:3])} failed: {errors[-300:]}")
    return peak / 1024


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        for task in _read(Path(f"/proc/{each}/task")):
            try:
                found += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())
            except OSError:
                continue
    return found


def _read(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _own_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
