"""Where local state lies: index and remembered history (durable), runtime sockets and memory (gone at reboot).

PERDURE_STATE_DIR overrides both; else the user's state and runtime directories.
"""

from __future__ import annotations

import os
from pathlib import Path

from base.errors import StorageError


def state_folder() -> Path:
    """Durable local state, private."""
    override = os.environ.get("PERDURE_STATE_DIR")
    if override:
        return _private(Path(override))
    import platformdirs  # 20 ms that commands with PERDURE_STATE_DIR need not pay

    return _private(Path(platformdirs.user_state_dir("perdure")))


def runtime_folder() -> Path:
    """Sockets and memory of running VMs, private."""
    override = os.environ.get("PERDURE_STATE_DIR")
    if override:
        return _private(Path(override) / "run")
    if os.getuid() == 0 and "XDG_RUNTIME_DIR" not in os.environ:  # root has no session's directory
        return _private(Path("/run/perdure"))
    import platformdirs

    return _private(Path(platformdirs.user_runtime_dir("perdure")))


def repository_state(repository_id: bytes) -> Path:
    """This host's folder for one repository."""
    return state_folder() / "repositories" / repository_id.hex()


def working_sets() -> Path:
    """What resumes of this host's VMs have touched first."""
    return state_folder() / "working-sets"


def vm_state(name: str) -> Path:
    """Durable state of one VM on this host."""
    return _private(state_folder() / "vms" / name)


def vm_runtime(name: str) -> Path:
    """Runtime folder of one VM; it exists while the VM does."""
    return runtime_folder() / name


def _private(path: Path) -> Path:
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "make the folder") from error
    if path.stat().st_uid != os.getuid():
        raise StorageError(str(path), "belongs to another user: set PERDURE_STATE_DIR to a folder of your own")
    return path
