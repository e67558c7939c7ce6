"""The guard of a VM that is not ours: a process that outlives its supervisor for a moment.

It waits for the end of a pipe that only the supervisor has. If that ends without the word that all is well, the
supervisor was killed: the guard leaves QEMU as it was found (perdure.supervision.leaving), so that the guest is not
left stopped, and its next reboot is not held for nobody. Whoever kills both at once (a container, a control group)
leaves that to the next `perdure attach`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from base.errors import PerdureError
from perdure.supervision import leaving
from vm.folder import RuntimeFolder
from vm.monitor import Monitor
from vm.qemu import Qemu

_WELL = b"well"
_WAIT_SECONDS = 10


class Guard:
    """The supervisor's side; `dismiss` it in the end."""

    def __init__(self, folder: RuntimeFolder) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "perdure.supervision.guard", folder.vm, str(folder.path)],
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def dismiss(self, *, well: bool) -> None:
        """Blocking. `well`: QEMU was left as it was found; else the guard does that now."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # somebody has killed it
            if well:
                pipe.write(_WELL)
            pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_WAIT_SECONDS)


async def _put_back(folder: RuntimeFolder) -> None:
    qemu = Qemu.find(folder)
    if qemu is None:
        return
    with qemu:
        attachment = leaving.attachment_of(qemu.record)
        if attachment is not None:
            async with await Monitor.connect(qemu) as monitor:
                await leaving.put_back(monitor, folder, attachment)


def main(arguments: list[str]) -> int:
    """The guard: waits, and acts if it has to."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _WELL:
        return 0
    try:
        asyncio.run(_put_back(RuntimeFolder(arguments[0], Path(arguments[1]))))
    except PerdureError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
