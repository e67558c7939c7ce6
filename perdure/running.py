"""`perdure run`: everything before and after the supervisor's event loop.

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

from base.errors import RepositoryMissingError, UsageError
from base.progress import Progress
from perdure import places
from perdure.launcher import Launcher
from perdure.opening import opened
from perdure.output import Output
from perdure.speaker import Speaker
from perdure.supervisor import Ended, Supervisor
from restore.lazy import Standby
from store.records import Generation
from store.repository import Repository
from vm.config import Description, load
from vm.folder import RuntimeFolder


def run_vm(options: Namespace, output: Output) -> int:
    """Launch or take over, supervise to the end; gives the exit code."""
    description = load(Path(options.file))
    if options.point and options.without_restore:
        raise UsageError("--from and --without-restore exclude each other")
    if options.boot and options.without_restore:
        raise UsageError("--boot and --without-restore exclude each other")
    path = _repository(options.repository, description)
    folder = RuntimeFolder(description.name, places.vm_runtime(description.name))
    launcher = Launcher(description, folder, places.vm_state(description.name))
    folder.check()
    ended = _run(options, output, launcher, path)
    output.result(
        {"vm": description.name, "ended": ended.reason, "running": ended.detached, "generation": ended.generation},
        lambda: [f"{description.name}: {ended.reason}"],
    )
    return 130 if ended.interrupted else 1 if ended.failed else 0


def _run(options: Namespace, output: Output, launcher: Launcher, path: Path) -> Ended:
    """Events of the VM, one line each, go to standard output, which with --json belongs to the document.

    All processes are forked before there is a speaker, and its last words wait for a reader when nothing else does.
    """
    stream = sys.stderr if output.json else sys.stdout
    if options.lazy:  # before there are threads, and an open LMDB
        launcher.standby = Standby.fork()
    with ExitStack() as last, opened(path, workers=True, progress=output.progress()) as repository:
        last.callback(launcher.close)
        speaker = last.enter_context(Speaker(stream.fileno(), output.progress()))
        say = _nothing if output.quiet else speaker.say

        def begin(runs: bool, progress: Progress) -> Generation | None:
            damaged = repository.damaged()
            if damaged:
                say(
                    f"packs/{damaged[0].pack_id} {damaged[0].problem}: captures read everything "
                    "until `perdure repair` has run"
                )
            return _to_restore(options, launcher, repository, say, runs, progress)

        boot = True if options.boot else False if options.point else None

        async def supervise() -> Ended:
            supervisor = Supervisor(launcher, repository, say, speaker.progress)
            return await supervisor.run(begin, boot=boot, lazy=options.lazy)

        return asyncio.run(supervise())


def _nothing(_: str) -> None:
    """What --quiet says."""


def _to_restore(
    options: Namespace,
    launcher: Launcher,
    repository: Repository,
    say: Callable[[str], None],
    runs: bool,
    progress: Progress,
) -> Generation | None:
    """What a launch begins with. Memory that a dead QEMU left is captured first, or dropped if the user says so."""
    name = launcher.description.name
    if runs:
        if options.point or options.without_restore or options.boot:
            raise UsageError(
                f"VM {name} runs already: --from, --boot and --without-restore are for a launch "
                f"(to go back in time, use perdure rollback)"
            )
        return None
    if options.discard:
        launcher.drop_left_memory()
    else:
        saved = launcher.salvage(repository, progress)
        if saved is not None:
            say(f"{name} had ended without a capture: its memory is {saved.generation.name} now")
    if options.without_restore:
        return None
    if options.point:
        generation = repository.resolve(options.point)
        if generation.vm != name:
            raise UsageError(
                f"{options.point} is a generation of VM {generation.vm}, and {options.file} describes {name}"
            )
        return generation
    return repository.latest(name)


def _repository(given: str | None, description: Description) -> Path:
    """-r, then the description, then PERDURE_REPOSITORY."""
    path = given or description.repository or os.environ.get("PERDURE_REPOSITORY")
    if not path:
        raise RepositoryMissingError(
            f"no repository was named for VM {description.name}: use -r, `repository` in its description, "
            "or PERDURE_REPOSITORY"
        )
    return Path(path).absolute()
