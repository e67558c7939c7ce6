"""For a supervisor to which something is to happen at one moment: Python runs this first where it is on the path.

PERDURE_TEST_MOMENTS names a folder. While it has a file `armed`, whose first line is a QMP command and whose rest a
shell script, that script is run before the command is given to QEMU, once; $QEMU is QEMU's process. Where a folder has
a file `hung`, QEMU is not waited for as long as that takes otherwise: it does not move, be the time short or long.

Programs that a supervisor starts have it on their path as well, and are spared what importing it costs.
"""

import os
import subprocess
import sys
from pathlib import Path

_HUNG_SECONDS = 0.05


def _begin():
    from vm.monitor import COMMAND_SECONDS, Monitor

    folder, execute = Path(os.environ["PERDURE_TEST_MOMENTS"]), Monitor.execute

    async def monitor_execute(monitor, command, /, *, timeout_s=COMMAND_SECONDS, **arguments):
        try:
            wanted, script = (folder / "armed").read_text().split("\n", 1)
        except FileNotFoundError:
            wanted = script = ""
        if command == wanted:
            (folder / "armed").unlink()
            subprocess.run(script, shell=True, check=True, env={**os.environ, "QEMU": str(monitor._qemu.pid)})
        if (folder / "hung").exists():
            timeout_s = _HUNG_SECONDS
        return await execute(monitor, command, timeout_s=timeout_s, **arguments)

    Monitor.execute = monitor_execute


if "perdure" in sys.orig_argv:
    _begin()
