"""Eager restore: regions of a generation into new backing files, before QEMU is started.

Every page placed comes out of an authenticated frame under the id that the signed page map has; afterwards the
files are measured: hashed and compared with the page maps, in both directions. Either all of it holds, or an error
is raised and the caller removes the files: nothing boots on part of a restore.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base import extents as ranges
from base.errors import ConflictError, StorageError
from base.progress import Progress, silent
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from vm.config import DEVICES

NOT_KEPT = ("ram", "device", "disk")
"""Kinds of regions of full generations that a VM which boots does without."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did. Bytes written, bytes hashed again for the measurement, seconds of both."""

    generation: Generation
    written_bytes: int
    verified_bytes: int
    restore_seconds: float
    verify_seconds: float


def read_devices(repository: Repository, generation: Generation) -> bytes:
    """The state of the devices of a full generation. It is as secret as memory: nowhere but in memory.

    Raises NotFoundError, IntegrityError.
    """
    with GenerationReader(repository, generation) as reader:
        return b"".join(reader.stream(reader.region(DEVICES)))


def restore_regions(
    repository: Repository, generation: Generation, files: Mapping[str, Path], progress: Progress = silent
) -> Restored:
    """Fill backing files (region name -> path of an empty sparse file of the region's size).

    Of a full generation it is the caller's choice whether main memory is among them. Raises ConflictError (the VM's
    regions are not those of the generation), IntegrityError, StorageError.
    """
    require_same_regions(generation, files)
    written = verified = 0
    began = time.monotonic()
    with GenerationReader(repository, generation) as reader:
        descriptors = {name: _open(path) for name, path in files.items() if name in generation.regions}
        try:
            for name, descriptor in descriptors.items():
                region = reader.region(name)
                if len(ranges.resident(descriptor, os.fstat(descriptor).st_size)):
                    raise ConflictError(f"{files[name]} is not empty: restored content goes only into new files")
                written += reader.restore(region, descriptor, str(files[name]), progress)
            middle = time.monotonic()
            for name, descriptor in descriptors.items():
                verified += reader.verify(reader.region(name), descriptor, str(files[name]), progress)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
    return Restored(generation, written, verified, middle - began, time.monotonic() - middle)


def require_same_regions(generation: Generation, files: Mapping[str, Path]) -> None:
    """A region that the VM has and the generation lacks is new and starts empty; the other way memory would be lost.

    Raises ConflictError.
    """
    regions = {
        name: region for name, region in generation.regions.items() if name in files or region.kind not in NOT_KEPT
    }
    extra = [name for name in regions if name not in files]
    if extra:
        raise ConflictError(
            f"{generation.name} has region {', '.join(extra)}, which the VM lacks: restore with the VM description "
            "that it was captured with"
        )
    for name, region in regions.items():
        length, size = region.root.length, files[name].stat().st_size
        if length != size:
            raise ConflictError(
                f"region {name} has {length} bytes in {generation.name} and {size} in the VM: set its size to {length}"
            )


def _open(path: Path, access: int = os.O_RDWR) -> int:
    try:
        return os.open(path, access | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "open") from error
