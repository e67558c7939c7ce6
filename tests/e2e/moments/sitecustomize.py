"""For a supervisor to which something is to happen at one moment: Python runs this first where it is on the path.

PERDURE_TEST_MOMENTS names a folder. While it has a file `armed`, whose first line is a QMP command and whose rest a
shell script, that script is run before the command is given to QEMU, once; $QEMU is QEMU's process. Where a folder has
a file `hung`, QEMU is not waited for as long as that takes otherwise: it does not move, be the time short or long.
"""

import os
import subprocess
from pathlib import Path

from vm.monitor import COMMAND_SECONDS, Monitor

_HUNG_SECONDS = 0.05
_folder = Path(os.environ["PERDURE_TEST_MOMENTS"])
_execute = Monitor.execute


async def _monitor_execute(monitor, command, /, *, timeout_s=COMMAND_SECONDS, **arguments):
    try:
        wanted, script = (_folder / "armed").read_text().split("\n", 1)
    except FileNotFoundError:
        wanted = script = ""
    if command == wanted:
        (_folder / "armed").unlink()
        subprocess.run(script, shell=True, check=True, env={**os.environ, "QEMU": str(monitor._qemu.pid)})
    if (_folder / "hung").exists():
        timeout_s = _HUNG_SECONDS
    return await _execute(monitor, command, timeout_s=timeout_s, **arguments)


Monitor.execute = _monitor_execute
