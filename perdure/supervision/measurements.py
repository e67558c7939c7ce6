"""Measurements of what a VM boots: hashes that a generation records and a restore compares.

Restoring memory under another kernel or command line than it was captured under can be right (a kernel update) or an
attack; the policy decides: `require` refuses, `warn` says which one differs, `ignore` is silent. QEMU's own version
is recorded by the generation but never held against it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from base.errors import ConflictError, StorageError
from store.records import Generation
from vm.config import Description, FirmwareFiles


def measure(description: Description) -> dict[str, str]:
    """SHA-256 in hex of firmware code, kernel, initrd and command line, as far as the description names them."""
    found: dict[str, str] = {}
    if isinstance(description.firmware, FirmwareFiles):
        found["firmware"] = _file(description.firmware.code)
    else:
        found["firmware"] = hashlib.sha256(description.firmware.encode()).hexdigest()
    for name, path in (("kernel", description.kernel), ("initrd", description.initrd)):
        if path is not None:
            found[name] = _file(path)
    if description.append is not None:
        found["command line"] = hashlib.sha256(description.append.encode()).hexdigest()
    return found


def compare(description: Description, now: dict[str, str], generation: Generation | None) -> tuple[str, ...]:
    """What differs from the generation, as warnings. Raises ConflictError where the policy requires the same."""
    policy = description.policy.measurements
    then = generation.metadata.get("measurements") if generation is not None else None
    if policy == "ignore" or generation is None or then is None:
        return ()
    different = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if not different:
        return ()
    what = f"{', '.join(different)} of VM {description.name} is not what {generation.name} was captured with"
    if policy == "require":
        raise ConflictError(f"{what}, and its policy requires that: nothing is restored (see --without-restore)")
    return (what,)


def _file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError.from_os(error, str(path), "measure") from error
