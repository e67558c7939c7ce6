"""The independent judge of guest memory: QEMU's own pmemsave, over a monitor that the supervisor does not use.

As a program it is the `before_boot` hook of a VM under test: where there is a folder FOLDER/boots, `judge.py FOLDER`
saves all of the guest's memory to FOLDER/boots/N, where N counts the boots, and removes what it saved before. That is
a second's work, and makes every hole of that memory a page of zeros: only tests that look have it. A file FOLDER/hook
says what else it does: `fail` ends it with an error, `kill-supervisor` ends the supervisor as a power cut would,
`nothing` lets the guest begin at once, all before it saves anything and only once.

Standard library only, and quick to start. One monitor connection at a time; each call makes and ends its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

SOCKET = "judge.sock"
BOOTS = "boots"
HOOK = "hook"
_SECONDS = 120


class Judge:
    """Asks the QEMU of the VM under test in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def execute(self, command: str, **arguments: Any) -> Any:
        """One QMP command in a session of its own. Raises RuntimeError with QEMU's words if it is refused."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(str(self.folder / SOCKET))
            with connection.makefile("rwb") as stream:
                stream.readline()  # the greeting
                for name, values in (("qmp_capabilities", {}), (command, arguments)):
                    stream.write(json.dumps({"execute": name, "arguments": values}).encode() + b"\n")
                    stream.flush()
                    answer = self._answer(stream)
        return answer

    def _answer(self, stream: Any) -> Any:
        for line in stream:
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(message["error"]["desc"])
            if "return" in message:
                return message["return"]
        raise RuntimeError("QEMU closed the monitor")

    def spans(self) -> dict[str, tuple[int, int]]:
        """Guest-physical address and size of main memory (in one piece below 2 GiB) and of each NVDIMM."""
        found = {"ram": (0, self.execute("query-memory-size-summary")["base-memory"])}
        for device in self.execute("query-memory-devices"):
            data = device["data"]
            found[data["memdev"].rpartition("/")[2]] = data["addr"], data["size"]
        return found

    def save(self, target: Path) -> None:
        """All of the guest's memory, one file for each region in the new folder `target`."""
        target.mkdir()
        for name, (address, size) in self.spans().items():
            self.execute("pmemsave", val=address, size=size, filename=str(target / name))

    def read(self, address: int, size: int) -> bytes:
        """A range of guest-physical memory."""
        path = self.folder / "piece"
        self.execute("pmemsave", val=address, size=size, filename=str(path))
        content = path.read_bytes()
        path.unlink()
        return content


def before_boot(folder: Path) -> int:
    """What the hook does."""
    order = folder / HOOK
    if order.exists():
        what = order.read_text()
        order.unlink()
        if what == "fail":
            return 1
        if what == "nothing":
            return 0
        if what == "kill-supervisor":
            os.kill(os.getppid(), signal.SIGKILL)
            return 0
    boots = folder / BOOTS
    if not boots.is_dir():
        return 0
    earlier = sorted(int(each.name) for each in boots.iterdir())
    number = earlier[-1] + 1 if earlier else 1
    Judge(folder).save(boots / str(number))
    for each in earlier:
        shutil.rmtree(boots / str(each))
    return 0


if __name__ == "__main__":
    sys.exit(before_boot(Path(sys.argv[1])))
