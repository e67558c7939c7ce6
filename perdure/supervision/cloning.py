"""Copies of a VM: `perdure run --from VM@N --as NEWVM`. What they are called and how they are described.

A copy shares what is stored and nothing else: it has a VM's name and history of its own in the repository, whose first
generation follows the one that it is a copy of, images of its own for its disks, other network addresses, another UUID
and a new vmgenid. Blocking calls of the repository's thread.
"""

from __future__ import annotations

from argparse import Namespace

import msgspec

from base.errors import ConflictError, UsageError
from store.records import Generation
from store.repository import Repository
from vm import recorded
from vm.config import Description, is_vm_name


def described_copy(options: Namespace, repository: Repository, given: Description | None) -> Description:
    """The description of the copy: as `given` in a VM.toml, else as the generation has it, with its own name.

    Raises UsageError, ConflictError, NotFoundError.
    """
    name = str(options.clone)
    if not is_vm_name(name):
        raise UsageError(f"--as {name!r}: not a VM's name: up to 64 letters, digits, . _ or -, a letter or digit first")
    if given is not None:
        return msgspec.structs.replace(given, name=name)
    generation = repository.resolve(options.point) if options.point else repository.latest(name)
    if generation is None:
        raise UsageError(f"there is no VM {name} yet: say of what it is a copy, with --from VM@N")
    while "description" not in generation.metadata and generation.parent is not None:
        generation = repository.resolve(generation.parent)  # only full ones say it
    return recorded.decode(generation.metadata.get("description"), generation.name, name)


def require_free(repository: Repository, generation: Generation, name: str) -> None:
    """Raises ConflictError if a copy of another VM's generation would go into the history of a VM that is there."""
    latest = repository.latest(name)
    if latest is not None and generation.vm != name:
        raise ConflictError(
            f"there is a VM {name} already ({latest.name}): go on with it --from {name}@N, or choose another name"
        )
