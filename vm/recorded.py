"""A VM's description as a full generation keeps it, for copies of the VM that have no VM.toml. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from base.errors import ConflictError
from vm.config import Description, Size

_OF_THE_HOST = re.compile(
    r"\bpath=|\bunix:|hostfwd=|guestfwd=|\btcp:|ifname=|\bfile[.:=]|\bfd=|\bport=|\bvnc\b|\bpty\b"
)
"""What in arguments for QEMU names something that two VMs cannot both have."""


def encode(description: Description) -> dict[str, Any]:
    """As JSON has it; where the repository is stays out of it."""
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(description, repository=None), enc_hook=str)
    return found


def decode(document: Any, generation: str, name: str) -> Description:
    """The description that a generation has kept (`document`, None if it has none), for a VM with another name.

    Raises ConflictError that says why it cannot be used: a VM.toml can be named instead.
    """
    hint = "name a VM.toml before --from"
    if not isinstance(document, Mapping):
        raise ConflictError(f"{generation} does not say how its VM is described: {hint}")
    try:
        found = msgspec.convert(document, Description, dec_hook=_decode)
    except (msgspec.ValidationError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConflictError(f"{generation}: its description is of another version ({problem}): {hint}") from error
    for argument in found.extra:
        named = _OF_THE_HOST.search(argument)
        if named is not None:
            raise ConflictError(
                f"{generation} was made with {argument!r} in extra, which two VMs cannot both have: {hint}, with other "
                f"sockets, ports and files and the same devices"
            )
    return msgspec.structs.replace(found, name=name)


def _decode(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else Size(value)
