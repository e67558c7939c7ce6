"""Work that stands back: what the kernel says of threads."""

import os
import subprocess
import sys
from pathlib import Path

from base import priority

THREADS = "import sys, threading; threading.Thread(target=sys.stdin.read).start(); print('up', flush=True)"


def policies(pid):
    return {os.sched_getscheduler(int(each.name)) for each in Path(f"/proc/{pid}/task").iterdir()}


def test_all_threads_of_a_process_stand_back_and_take_their_turns_again():
    with subprocess.Popen(
        [sys.executable, "-c", THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        priority.give_way(process.pid)
        assert policies(process.pid) == {os.SCHED_IDLE if os.geteuid() == 0 else os.SCHED_OTHER}
        priority.take_turns(process.pid)
        assert policies(process.pid) == {os.SCHED_OTHER}
    priority.give_way(process.pid)  # it has ended: no error
