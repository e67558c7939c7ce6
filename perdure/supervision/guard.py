"""The guard of a VM that is not ours: a process that outlives its supervisor for a moment.

It waits for the end of a pipe that only the supervisor has. If that ends without the word that all is well, the
supervisor was killed: the guard leaves QEMU as it was found (perdure.supervision.leaving), so that the guest is not
left stopped, and its next reboot is not held for nobody. Where QEMU hangs, it waits until that answers again, or ends,
or somebody else supervises it. Whoever kills both at once (a container, a control group)
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

from base.errors import PerdureError, VirtualMachineError
from perdure.control import supervisor_of
from perdure.supervision import leaving
from vm.folder import RuntimeFolder
from vm.monitor import Monitor
from vm.qemu import Qemu

_WELL = b"well"
_WAIT_SECONDS = 10
_AGAIN_SECONDS = 1


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

    def dismiss(self, *, well: bool) -> bool:
        """Blocking. `well`: QEMU was left as it was found; else the guard does that now. Whether it has come to an end:
        if not, it goes on without us."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # somebody has killed it
            if well:
                pipe.write(_WELL)
            pipe.close()
        try:
            self._process.wait(_WAIT_SECONDS)
            return True
        except subprocess.TimeoutExpired:
            self._process.returncode = 0  # or its destructor complains
            return False


async def _put_back(folder: RuntimeFolder, former: int) -> None:
    """`former`: the supervisor that ended, or is about to."""
    qemu = Qemu.find(folder)
    if qemu is None:
        return
    with qemu:
        attachment = leaving.attachment_of(qemu.record)
        while attachment is not None and qemu.alive() and supervisor_of(folder.path) in (None, former):
            try:
                async with await Monitor.connect(qemu) as monitor:
                    await leaving.put_back(monitor, folder, attachment)
                return
            except VirtualMachineError:  # it hangs, or serves somebody else
                await asyncio.sleep(_AGAIN_SECONDS)


def main(arguments: list[str]) -> int:
    """The guard: waits, and acts if it has to."""
    former = os.getppid()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _WELL:
        return 0
    try:
        asyncio.run(_put_back(RuntimeFolder(arguments[0], Path(arguments[1])), former))
    except PerdureError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
