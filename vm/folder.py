"""The runtime folder of one VM: what lies where in it. Private (0700), gone at the host's reboot.

Only paths and their checks; the sockets are QEMU's or the supervisor's, the backing files are vm.memory's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from base.errors import StorageError, UsageError

SOCKET_PATH_BYTES_MAX = 107
"""sun_path has 108 bytes, one of them for the NUL. Source: unix(7)."""


@dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """Paths of one VM's runtime files; `path` is absolute."""

    vm: str
    path: Path

    def check(self) -> None:
        """Raises UsageError if sockets in the folder would have too long names."""
        longest = max(len(str(socket).encode()) for socket in (self.monitor, self.images(8 * "x")))
        if longest > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f"VM {self.vm}: a socket in {self.path} would have a path of {longest} bytes, and no more than "
                f"{SOCKET_PATH_BYTES_MAX} are possible: set PERDURE_STATE_DIR to a shorter path, or shorten the name"
            )

    def create(self) -> None:
        """Make the folder, private. Raises StorageError, and UsageError as `check`."""
        self.check()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)  # it may be from a time with another umask
        except OSError as error:
            raise StorageError.from_os(error, str(self.path), "make the folder") from error

    @property
    def monitor(self) -> Path:
        """QEMU listens here for the supervisor's QMP session."""
        return self.path / "qmp.sock"

    @property
    def agent(self) -> Path:
        """QEMU listens here; what connects is the host's end of the guest channel."""
        return self.path / "agent.sock"

    @property
    def control(self) -> Path:
        """The supervisor listens here for the other commands."""
        return self.path / "control.sock"

    @property
    def disks(self) -> Path:
        """QEMU listens here while disks are captured."""
        return self.path / "disks.sock"

    def images(self, token: str) -> Path:
        """A server of ours listens here, from which disks are filled that went back; `token` is 8 characters."""
        return self.path / f"then-{token}.sock"

    @property
    def process(self) -> Path:
        """The identity of the QEMU process and what it was started with."""
        return self.path / "qemu.json"

    @property
    def log(self) -> Path:
        """What QEMU printed since its start."""
        return self.path / "qemu.log"

    @property
    def console(self) -> Path:
        """What the guest wrote to its first serial port, over all its boots."""
        return self.path / "console.log"

    @property
    def journal(self) -> Path:
        """Base name of the event journal: QEMU opens it with `.in` (a FIFO) and `.out` (a file) added."""
        return self.path / "events"

    @property
    def journal_input(self) -> Path:
        """FIFO from which the journal's monitor reads commands."""
        return self.path / "events.in"

    @property
    def journal_output(self) -> Path:
        """Every QMP event of this QEMU process, also those that no supervisor was there to hear."""
        return self.path / "events.out"

    @property
    def memory(self) -> Path:
        """Where the tmpfs with the backing files is mounted."""
        return self.path / "memory"
