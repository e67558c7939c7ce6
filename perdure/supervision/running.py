"""`perdure run` and `perdure attach`: everything before and after the supervisor's event loop.

Worker processes are forked first, before LMDB is opened and before there are threads.
"""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from base.errors import LockedError, RepositoryMissingError, UsageError
from base.progress import Progress
from perdure import places
from perdure.opening import opened
from perdure.output import Output
from perdure.supervision import leaving, leftovers
from perdure.supervision.attached import AttachedSupervisor
from perdure.supervision.attaching import Wanted
from perdure.supervision.cloning import described_copy, require_free
from perdure.supervision.local import Local
from perdure.supervision.preparing import Preparation
from perdure.supervision.speaker import Speaker
from perdure.supervision.supervisor import Ended, Supervisor
from restore.nursery import Nursery
from store.records import Generation
from store.repository import Repository
from vm.config import Description, load
from vm.folder import RuntimeFolder
from vm.qemu import Qemu


def run_vm(options: Namespace, output: Output) -> int:
    """Launch or take over, supervise to the end; gives the exit code."""
    if options.point and options.without_restore:
        raise UsageError("--from and --without-restore exclude each other")
    if options.boot and options.without_restore:
        raise UsageError("--boot and --without-restore exclude each other")
    if options.clone and options.without_restore:
        raise UsageError("--as and --without-restore exclude each other")
    if options.file is None and not options.clone:
        raise UsageError("name a VM.toml; only a copy of a VM (--from VM@N --as NEWVM) can do without")
    description = None if options.file is None else load(Path(options.file))
    path = _repository(options.repository, description)
    ended, vm = _run(options, output, description, path)
    output.result(
        {"vm": vm, "ended": ended.reason, "running": ended.detached, "generation": ended.generation},
        lambda: [f"{vm}: {ended.reason}"],
    )
    return 130 if ended.interrupted else 1 if ended.failed else 0


def attach_vm(options: Namespace, output: Output) -> int:
    """Supervise what something else launched, until it is left or ends; gives the exit code."""
    if options.scrub and options.reboots == "pass":
        raise UsageError("--scrub is done at a held reboot: not with --reboots pass")
    description = load(Path(options.file))
    path = _repository(options.repository, description)
    local = _local_files(description)
    agent = None if options.agent is None else Path(options.agent)
    wanted = Wanted(Path(options.qmp), agent, options.reboots, options.scrub)
    with ExitStack() as last:
        repository = last.enter_context(opened(path, workers=True, progress=output.progress()))
        stream = sys.stderr if output.json else sys.stdout
        speaker = last.enter_context(Speaker(stream.fileno(), output.progress()))
        say = _nothing if output.quiet else speaker.say

        def begin(runs: bool, progress: Progress) -> None:
            del runs, progress
            _say_damage(repository, say)

        async def supervise() -> Ended:
            supervisor = AttachedSupervisor(Preparation(local), repository, say, speaker.progress, wanted)
            return await supervisor.run(begin)

        try:
            ended = asyncio.run(supervise())
        except LockedError:  # another supervisor has it
            raise
        except BaseException:
            _forget_ended(local)
            raise
    if ended.forgotten:
        leaving.forget(local.folder)
    else:
        _forget_ended(local)
    output.result(
        {"vm": local.name, "ended": ended.reason, "running": ended.detached, "generation": ended.generation},
        lambda: [f"{local.name}: {ended.reason}"],
    )
    return 130 if ended.interrupted else 1 if ended.failed else 0


def _forget_ended(local: Local) -> None:
    """Remove the runtime folder of a VM that does not run, or was not attached after all."""
    found = Qemu.find(local.folder)
    if found is None:
        leaving.forget(local.folder)
    else:
        found.close()


def _say_damage(repository: Repository, say: Callable[[str], None]) -> None:
    damaged = repository.damaged()
    if damaged:
        say(f"packs/{damaged[0].pack_id} {damaged[0].problem}: captures read everything until `perdure repair` has run")


def _run(options: Namespace, output: Output, description: Description | None, path: Path) -> tuple[Ended, str]:
    """Events of the VM, one line each, go to standard output, which with --json belongs to the document.

    All processes are forked before there is a speaker, and its last words wait for a reader when nothing else does.
    """
    stream = sys.stderr if output.json else sys.stdout
    local = None if options.clone or description is None else _local_files(description)
    with ExitStack() as last:
        nursery = last.enter_context(Nursery.fork())  # before there are threads, and an open LMDB
        repository = last.enter_context(opened(path, workers=True, progress=output.progress()))
        if local is None:
            local = _local_files(described_copy(options, repository, description), clone=True)
        found = local
        found.nursery = nursery
        speaker = last.enter_context(Speaker(stream.fileno(), output.progress()))
        say = _nothing if output.quiet else speaker.say

        def begin(runs: bool, progress: Progress) -> Generation | None:
            _say_damage(repository, say)
            return _to_restore(options, found, repository, say, runs, progress)

        boot = True if options.boot else False if options.point else None

        async def supervise() -> Ended:
            supervisor = Supervisor(Preparation(found), repository, say, speaker.progress)
            return await supervisor.run(begin, boot=boot, lazy=options.lazy)

        return asyncio.run(supervise()), found.name


def _local_files(description: Description, *, clone: bool = False) -> Local:
    folder = RuntimeFolder(description.name, places.vm_runtime(description.name))
    local = Local(description, folder, places.vm_state(description.name), clone=clone)
    folder.check()
    return local


def _nothing(_: str) -> None:
    """What --quiet says."""


def _to_restore(
    options: Namespace,
    local: Local,
    repository: Repository,
    say: Callable[[str], None],
    runs: bool,
    progress: Progress,
) -> Generation | None:
    """What a launch begins with. Memory that a dead QEMU left is captured first, or dropped if the user says so."""
    name = local.name
    if runs:
        if options.point or options.without_restore or options.boot:
            raise UsageError(
                f"VM {name} runs already: --from, --boot and --without-restore are for a launch "
                f"(to go back in time, use perdure rollback)"
            )
        return None
    latest = repository.latest(name)
    if options.discard or (latest is not None and local.disks.superseded(latest)):
        leftovers.drop(local)
    else:
        saved = leftovers.salvage(local, repository, progress)
        if saved is not None:
            say(f"{name} had ended without a capture: its memory is {saved.generation.name} now")
    if options.without_restore:
        return None
    if options.point:
        generation = repository.resolve(options.point)
        if options.clone:
            require_free(repository, generation, name)
        elif generation.vm != name:
            raise UsageError(
                f"{options.point} is a generation of VM {generation.vm}, and {options.file} describes {name}"
            )
        return generation
    return repository.latest(name)


def _repository(given: str | None, description: Description | None) -> Path:
    """-r, then the description, then PERDURE_REPOSITORY."""
    named = None if description is None else description.repository
    path = given or named or os.environ.get("PERDURE_REPOSITORY")
    if not path:
        vm = "the copy" if description is None else f"VM {description.name}"
        raise RepositoryMissingError(
            f"no repository was named for {vm}: use -r, `repository` in its description, or PERDURE_REPOSITORY"
        )
    return Path(path).absolute()
