"""The command line: what may be said, and where each command's work is. Errors become one line and an exit code.

Commands import what they need when they run, so that `perdure --help` and small commands start fast.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from base.errors import PerdureError, one_line

_VERSION = "perdure 0.1.0"
_EPILOG = """\
a point in time is VM@N, VM@latest, VM@-1 (one before the latest) or the beginning of a generation's id

environment:
  PERDURE_REPOSITORY        the repository, if -r is not given
  PERDURE_KEY_FILE          key file that unlocks it, in place of a passphrase, if --key-file is not given
  PERDURE_PASSWORD_FILE     file that holds the passphrase
  PERDURE_PASSWORD_COMMAND  command that prints the passphrase
  PERDURE_PASSWORD          the passphrase itself (discouraged: other processes of yours can read it)
  PERDURE_NEW_PASSWORD_FILE, _COMMAND, PERDURE_NEW_PASSWORD
                            the same for the new passphrase of `perdure key add` and `change-passphrase`
  PERDURE_LOCK_WAIT         seconds to wait for others, if --lock-wait is not given
  PERDURE_FROM_KEY_FILE, PERDURE_FROM_PASSWORD_FILE, _COMMAND, PERDURE_FROM_PASSWORD
                            the same for the other repository of `perdure repair --from`
  PERDURE_STATE_DIR         local state: index, remembered history, sockets

exit codes: 0 done; 1 failed; 2 usage; 3 check found damage; 10 no repository; 11 locked; 12 wrong passphrase;
130 interrupted
"""

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""numpy starts threads for linear algebra, 50 ms of them, unless it is told not to; nobody here needs any."""
_UNLOCK_EARLY = frozenset(
    (
        *(f"repository:{name}" for name in ("import_", "log", "show", "diff")),
        *(f"retention:{name}" for name in ("forget", "protect", "unprotect")),
        "export:export",
        "prune:prune_",
    )
)
"""Commands that always unlock, and soon."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    options = parser().parse_args(
        arguments, argparse.Namespace(repository=None, key_file=None, lock_wait=None, json=False, quiet=False)
    )
    if options.lock_wait is not None:
        os.environ["PERDURE_LOCK_WAIT"] = options.lock_wait
    if options.key_file is not None:
        os.environ["PERDURE_KEY_FILE"] = options.key_file  # as a passphrase does, it reaches every command the same way
    try:
        return int(_command(options)(options) or 0)
    except KeyboardInterrupt:
        print("perdure: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PerdureError, ExceptionGroup) as error:
        first = _first(error)
        if first is None:
            raise
        print(f"perdure: {one_line(error)}", file=sys.stderr)
        return first.exit_code


def _command(options: argparse.Namespace) -> Callable[[argparse.Namespace], int | None]:
    """The command's function. Unlocking begins while its modules are imported: both take their time."""
    if options.command in _UNLOCK_EARLY:
        from perdure import unlocking

        unlocking.begin(options.repository)
    module, _, name = options.command.partition(":")
    chosen = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    try:
        command: Callable[[argparse.Namespace], int | None]
        command = getattr(importlib.import_module(f"perdure.commands.{module}"), name)
    finally:
        if chosen is None:  # what the command starts, a hook for one, is to find its own environment
            os.environ.pop(_BLAS_THREADS)
    return command


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    plain = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    plain.add_argument("-r", "--repository", metavar="PATH", help="the repository")
    plain.add_argument("--json", action="store_true", help="one JSON document on standard output")
    plain.add_argument(
        "--lock-wait", metavar="SECONDS", help="wait for others for at most so long; then exit 11, and say for whom"
    )
    plain.add_argument("--quiet", action="store_true", help="no text and no progress")
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=[plain])
    common.add_argument("--key-file", metavar="FILE", help="key file that unlocks it, in place of a passphrase")
    top = argparse.ArgumentParser(
        prog="perdure",
        description="Keeps the memory that matters across a virtual machine's reboot.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    top.add_argument("--version", action="version", version=_VERSION)
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, command: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(command=command)
        return made

    _repository_verbs(verb)
    _repair_verb(verb)
    _retention_verbs(verb)
    _prune_verb(verb)
    _vm_verbs(verb)
    policies = verbs.add_parser("policy", help="rules and quotas that stand in the repository", parents=[common])
    _policy_verbs(policies, common)
    keys = verbs.add_parser("key", help="what opens the repository: slots, rotation, public key", parents=[common])
    _key_verbs(keys, common, plain)
    regions = verbs.add_parser("regions", help="list a VM's regions, or tag memory from the host", parents=[common])
    _regions_verbs(regions)
    return top


def _repository_verbs(verb: _Verb) -> None:
    init = verb("init", "repository:init", "make a repository")
    init.add_argument(
        "--compression-level",
        type=int,
        default=-1,
        metavar="N",
        help="zstd level of frames, -7 to 19: faster or smaller (default -1)",
    )
    init.add_argument(
        "--frame-size", type=int, default=128, metavar="KIB",
        help="KiB that are compressed together: smaller files, or less work for a single page (default 128)",
    )  # fmt: skip

    load = verb("import", "repository:import_", "make a generation from raw image files")
    load.add_argument("vm", metavar="VM")
    load.add_argument("regions", metavar="REGION=FILE", nargs="+")
    load.add_argument("--parent", metavar="VM@N", help="the generation that this one follows")
    load.add_argument(
        "--dirty", metavar="REGION=RANGES.json", action="append", default=[],
        help="[[offset, length], ...]: all that changed since the parent",
    )  # fmt: skip
    load.add_argument("--tag", metavar="T", action="append", default=[])

    export = verb("export", "export:export", "write a region of a generation, or all its memory, to a file")
    export.add_argument("point", metavar="VM@N")
    export.add_argument("region", metavar="REGION", nargs="?", help="not for an ELF core, which has all memory")
    export.add_argument("file", metavar="FILE", help="- for standard output")
    export.add_argument("--sync", action="store_true", help="wait until FILE is on the disk")
    export.add_argument("--force", action="store_true", help="replace FILE if it exists")
    export.add_argument(
        "--format", choices=("raw", "qcow2", "elf"), default="raw",
        help="raw: sparse, the default; qcow2: for QEMU; elf: a core of a full generation for crash, gdb, Volatility",
    )  # fmt: skip
    export.add_argument("--partial", action="store_true", help="of a hurt region what is left; zeros in the holes")

    log = verb("log", "repository:log", "history of a VM, or of all")
    log.add_argument("vm", metavar="VM", nargs="?")
    log.add_argument("--graph", action="store_true", help="newest first, with lines to what each came out of")
    show = verb("show", "repository:show", "one generation in full")
    show.add_argument("point", metavar="VM@N")
    diff = verb("diff", "repository:diff", "changed ranges and bytes by region")
    diff.add_argument("a", metavar="VM@A")
    diff.add_argument("b", metavar="VM@B")
    check = verb("check", "check:check", "verify the repository; changes nothing")
    check.add_argument("--read-data", action="store_true", help="read, open and hash everything that is stored")
    check.add_argument(
        "--read-data-subset", metavar="n/t|P%",
        help="only of some packs: part n of t (all t parts together are everything), or a random share",
    )  # fmt: skip
    check.add_argument(
        "--public-key", metavar="FILE", help="verify keyrings, signatures and history without a passphrase"
    )


def _repair_verb(verb: _Verb) -> None:
    repair = verb("repair", "check:repair_", "make whole what can be, and mark generations that are hurt")
    repair.add_argument("--dry-run", action="store_true", help="only say what would be done")
    repair.add_argument(
        "--from", dest="source", metavar="OTHER",
        help="another repository, a copy of this one or not, that may have what is missing here",
    )  # fmt: skip


def _retention_verbs(verb: _Verb) -> None:
    forget = verb("forget", "retention:forget", "forget generations that no rule keeps")
    forget.add_argument("what", metavar="VM|VM@N", nargs="?", help="a VM to apply rules to, or one generation")
    forget.add_argument("--all", action="store_true", help="apply the repository's policies to all VMs")
    _keep_options(forget)
    forget.add_argument("--dry-run", action="store_true", help="only say what would be forgotten")
    verb("protect", "retention:protect", "keep a generation whatever the rules say").add_argument(
        "point", metavar="VM@N"
    )
    verb("unprotect", "retention:unprotect", "end the protection of a generation").add_argument("point", metavar="VM@N")


def _keep_options(verb: argparse.ArgumentParser) -> None:
    for period in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        verb.add_argument(f"--keep-{period}", type=int, default=0, metavar="N")
    verb.add_argument("--keep-within", metavar="SPAN", help="as in 2y5m7d3h")
    verb.add_argument("--keep-tag", metavar="T", action="append", default=[])


def _policy_verbs(policies: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    verbs = policies.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, command: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(command=f"policy:{command}")
        made.add_argument("vm", metavar="VM", nargs="?", help="else all VMs that have no policy of their own")
        return made

    verb("show", "show", "list policies, or what holds for a VM and what it stores")
    change = verb("set", "set_", "set what `perdure forget` keeps of a VM, and how much it may store")
    _keep_options(change)
    change.add_argument("--quota", metavar="SIZE", help="bytes that a VM may store, as in 20GiB")
    verb("remove", "remove", "remove a policy")


def _prune_verb(verb: _Verb) -> None:
    prune = verb("prune", "prune:prune_", "remove what no generation needs; captures go on meanwhile")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be done")
    prune.add_argument(
        "--max-unused", metavar="PERCENT",
        help="share of the repository that may stay unused in packs that are used in part (default 5)",
    )  # fmt: skip
    prune.add_argument(
        "--max-rewrite", metavar="SIZE", help="most to rewrite of packs that are used (default 16GiB); or unlimited"
    )


def _key_verbs(keys: argparse.ArgumentParser, common: argparse.ArgumentParser, plain: argparse.ArgumentParser) -> None:
    verbs = keys.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, command: str, text: str, parent: argparse.ArgumentParser = common) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[parent])
        made.set_defaults(command=f"keys:{command}")
        return made

    verb("list", "list_", "list key slots; needs no passphrase")
    add = verb("add", "add", "add a key slot that a new passphrase, or a key file, opens", plain)
    add.add_argument("--label", default="", metavar="L", help="what it is for; anybody can read it")
    add.add_argument(
        "--key-file", dest="new_key_file", metavar="FILE",
        help="key file of the new slot, 32 random bytes or more; one that unlocks stands before `key`",
    )  # fmt: skip
    remove = verb("remove", "remove", "remove a key slot; the last usable one stays")
    remove.add_argument("slot", metavar="SLOT", help="the beginning of its id")
    verb("change-passphrase", "change_passphrase", "replace the slot that the passphrase opens by one with a new one")
    rotate = verb("rotate", "rotate", "new data key and signing key for what is written from now on")
    rotate.add_argument("--rewrite", action="store_true", help="then seal anew what was written before")
    rotate.add_argument(
        "--resume", action="store_true", help="no new keys: go on sealing anew what is still of earlier epochs"
    )
    export = verb("export-public", "export_public", "the public key for `perdure check --public-key`")
    export.add_argument("file", metavar="FILE", nargs="?", help="a file that does not exist; else standard output")


def _vm_verbs(verb: _Verb) -> None:
    run = verb("run", "vm:run", "launch a VM, or take over a running one, and supervise it")
    run.add_argument("file", metavar="VM.toml", nargs="?", help="a copy (--as) can do without")
    run.add_argument("--from", dest="point", metavar="VM@N", help="go on from this generation, not the latest")
    run.add_argument("--as", dest="clone", metavar="NEWVM", help="as another VM: a copy, with an identity of its own")
    run.add_argument("--boot", action="store_true", help="boot with a full generation's persistent memory: no resume")
    _lazy_or_eager(run)
    run.add_argument("--discard", action="store_true", help="drop memory that an ended QEMU left, uncaptured")
    run.add_argument("--without-restore", action="store_true", help="start with empty persistent memory")
    attach = verb("attach", "attach:attach", "supervise a VM that something else launched")
    attach.add_argument("file", metavar="VM.toml")
    attach.add_argument("--qmp", metavar="SOCKET", required=True, help="QEMU's QMP socket, for Perdure alone")
    attach.add_argument("--agent", metavar="SOCKET", help="socket of the guest channel, a virtserialport of QEMU's")
    attach.add_argument(
        "--reboots", choices=("hold", "pass"),
        help="hold the guest's reboots for a capture, or let them pass; else held unless another program hears events",
    )  # fmt: skip
    attach.add_argument("--scrub", action="store_true", help="make zero what is not tagged, at held reboots")
    verb("detach", "attach:detach", "leave an attached VM, with nothing of Perdure in it").add_argument(
        "vm", metavar="VM"
    )
    status = verb("status", "vm:status", "running VMs, or one in full")
    status.add_argument("vm", metavar="VM", nargs="?")
    disks = verb("disks", "disks:disks", "where the disks of a VM are")
    disks.add_argument("vm", metavar="VM")
    disks.add_argument("--reset", metavar="DISK", help="of a stopped VM: back to the file that VM.toml names")
    disks.add_argument("--clean", action="store_true", help="of a stopped VM: remove images that are left over")
    stop = verb("stop", "vm:stop", "end a VM")
    stop.add_argument("vm", metavar="VM")
    stop.add_argument("--capture", action="store_true", help="make a generation first")
    verb("reboot", "vm:reboot", "reboot a VM, keeping its persistent memory").add_argument("vm", metavar="VM")
    snapshot = verb("snapshot", "vm:snapshot", "make a generation of a running VM")
    snapshot.add_argument("vm", metavar="VM")
    snapshot.add_argument("--tag", metavar="T", action="append", default=[])
    which = snapshot.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="all memory and the state of the devices, at one instant")
    which.add_argument(
        "--memory", action="store_true", help="main memory, too, without the devices: to look at, not to go on from"
    )
    snapshot.add_argument(
        "--quiesce", action="store_true", help="with the guest's file systems frozen for the instant, or not at all"
    )
    rollback = verb("rollback", "vm:rollback", "resume a full generation, or boot with the persistent memory of one")
    rollback.add_argument("point", metavar="VM@N")
    rollback.add_argument("--boot", action="store_true", help="boot with a full generation's persistent memory")
    _lazy_or_eager(rollback)
    rollback.add_argument("--discard", action="store_true", help="do not capture first what the VM has now")
    rollback.add_argument("--dry-run", action="store_true", help="only say what would change")
    rollback.add_argument("--memory-only", action="store_true", help="disks stay as they are: needs --force")
    rollback.add_argument(
        "--disk", metavar="DISK", action="append", default=[], help="only this disk goes back: needs --force"
    )
    rollback.add_argument("--force", action="store_true", help="mix instants, although that may break file systems")


def _lazy_or_eager(verb: argparse.ArgumentParser) -> None:
    """`lazy`: True, False, or None for what suits."""
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--lazy",
        action="store_const",
        const=True,
        help="at once: memory is restored when it is touched, also for a boot",
    )
    which.add_argument(
        "--eager",
        action="store_const",
        const=False,
        dest="lazy",
        help="all of its memory is restored before it goes on",
    )


def _regions_verbs(regions: argparse.ArgumentParser) -> None:
    """`regions VM`, `regions mark VM ADDRESS SIZE`, `regions unmark VM ADDRESS SIZE`: told apart by count."""
    regions.set_defaults(command="vm:regions")
    regions.usage = (
        "perdure regions [options] VM\n"
        "       perdure regions [options] mark VM ADDRESS SIZE [--name NAME]\n"
        "       perdure regions [options] unmark VM ADDRESS SIZE"
    )
    regions.add_argument("words", metavar="VM | mark VM ADDRESS SIZE | unmark VM ADDRESS SIZE", nargs="+")
    regions.add_argument("--name", metavar="NAME", help="name of the range to mark")


def _first(error: BaseException) -> PerdureError | None:
    """The first of our errors in an error or a group; None if there is a foreign one (a defect: let it be seen)."""
    if isinstance(error, PerdureError):
        return error
    if isinstance(error, ExceptionGroup):
        found = [_first(each) for each in error.exceptions]
        return found[0] if all(found) else None
    return None


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


_Verb = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: its name, `module:function`, and what it does."""
