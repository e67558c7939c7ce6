"""`perdure check` and `perdure repair`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from base.errors import IntegrityError, PerdureError, UsageError
from base.units import format_size
from perdure import places
from perdure.commands import keys as key_commands
from perdure.credentials import credential, from_credential
from perdure.opening import lock_wait_s, opened, repository_path, with_room
from perdure.output import Output
from store.creation import read_mark
from store.keyring.files import read_key_files
from store.keyring.slots import newest, unlock

if TYPE_CHECKING:
    from store.keyring.keys import Keys
    from store.keyring.slots import Credential
    from store.repository import Repository
    from store.upkeep.donor import Donor
    from store.upkeep.findings import Hurt, Report
    from store.upkeep.mending import Mend
    from store.upkeep.repair import RepairPlan, RepairResult


def check(options: Namespace) -> int:
    """`perdure check`"""
    from store.upkeep.check import Subset, check_repository
    from store.upkeep.findings import Finding, Report

    if options.read_data and options.read_data_subset:
        raise UsageError("--read-data and --read-data-subset exclude each other")
    read_data = Subset.parse(options.read_data_subset) if options.read_data_subset else options.read_data
    if options.public_key:
        if read_data:
            raise UsageError("--read-data needs keys: it and --public-key exclude each other")
        return key_commands.audit(options)
    output = Output(options.json, options.quiet)
    path = repository_path(options.repository)
    try:
        with opened(path, progress=output.progress()) as repository:
            report = check_repository(repository, read_data=read_data, progress=output.progress())
    except IntegrityError as error:  # damage that keeps the repository from being opened at all
        finding = Finding("repository", error.object, error.offset, error.problem, (), ())
        report = Report(findings=[finding], counts={})
    findings = report.findings
    document = {
        "clean": not findings,
        "findings": [msgspec.to_builtins(each) for each in findings],
        "hurt": _hurt_document(report.hurt),
        **report.counts,
    }
    output.result(document, lambda: _check_text(report))
    return 3 if findings else 0


def _check_text(report: Report) -> Iterator[str]:
    findings, counts = report.findings, report.counts
    for each in findings:
        place = each.object if each.offset is None else f"{each.object} at offset {each.offset}"
        yield f"damaged: {place}: {each.problem}"
        if each.generations:
            yield f"  hurts {', '.join(each.generations)} (regions {', '.join(each.regions)})"
    for known in report.hurt:
        lost = ", ".join(f"{name}: {format_size(count)}" for name, count in known.regions.items())
        yield f"known to be hurt: {known.name} ({lost}); `perdure export --partial` writes the rest"
    if counts:
        what = "read, opened and hashed"
        if not counts["read_packs"]:
            what = "structure only; --read-data reads everything"
        elif counts["read_packs"] < counts["packs"]:
            what = f"{counts['read_packs']} of the packs, {format_size(counts['read_bytes'])}, {what}"
        yield (
            f"{counts['generations']} generations, {counts['packs']} packs, {counts['chunks']} chunks, "
            f"{format_size(counts['bytes'])} ({what}): " + (f"{len(findings)} findings" if findings else "clean")
        )


def repair_(options: Namespace) -> int:
    """`perdure repair`"""
    return with_room(repository_path(options.repository), lambda: _repair(options))


def _repair(options: Namespace) -> int:
    from store.upkeep import reserve
    from store.upkeep.repair import Repair, RepairPlan, repair

    output = Output(options.json, options.quiet)
    path, wait_s = repository_path(options.repository), lock_wait_s(0.0)
    source = _source(path, options.source)
    given = credential()
    files, keys = _mended(path, given, source, options.dry_run, output)
    if files and options.dry_run:  # what comes next can only be seen when they are mended
        nothing = RepairPlan((), (), (), marks_change=False, impossible=())
        output.result(
            _repair_document(files, [], [], nothing, None), lambda: _repair_text(files, [], [], nothing, None)
        )
        return 3
    index = _right_index(path, keys, options.dry_run, output)
    restart = _supervised(path) if index else []
    with ExitStack() as stack:
        state = None
        if index and options.dry_run:  # nothing can be said by what is wrong: an index of its own is thrown away after
            state = Path(stack.enter_context(TemporaryDirectory(dir=places.state_folder())))
        repository = stack.enter_context(opened(path, progress=output.progress(), keys=keys, state=state))
        donor = None if source is None else _donor(stack, repository, source, given, output)
        result = None
        if options.dry_run:
            planned = Repair(repository, donor, progress=output.progress()).look()
        else:
            planned, result = repair(repository, donor, wait_s=wait_s, progress=output.progress())
            reserve.make(path, repository.disk)
    output.result(
        _repair_document(files, index, restart, planned, result),
        lambda: _repair_text(files, index, restart, planned, result),
    )
    undone = result is None and bool(index or not planned.empty)
    return 3 if planned.impossible or undone else 0


def _source(path: Path, given: str | None) -> Path | None:
    """The other repository. Raises RepositoryMissingError, UsageError."""
    if given is None:
        return None
    source = Path(given).absolute()
    read_mark(source)
    if path.exists() and source.samefile(path):
        raise UsageError(f"--from {given} is the repository itself")
    return source


def _mended(
    path: Path, given: Credential, source: Path | None, dry_run: bool, output: Output
) -> tuple[list[Mend], Keys]:
    """Damaged mark, keyrings, key slots and records, which would keep the repository from being opened; the keys."""
    from store.history import History
    from store.storage import LocalStorage
    from store.upkeep.mending import Mending

    if not (path / "keyring").is_dir():
        read_mark(path)  # says that there is no repository
    copy = LocalStorage(source) if source is not None and _is_copy(path, source) else None
    mending = Mending(LocalStorage(path), copy, apply=not dry_run, progress=output.progress())
    mends, files = mending.key_files()
    keys = unlock(files, given)
    seen = History(places.repository_state(keys.repository_id) / "history.json").newest
    return [*mends, *mending.records(keys, seen)], keys


def _is_copy(path: Path, source: Path) -> bool:
    """Whether another repository is a copy of this one, as far as keyrings say; a damaged one here says nothing."""
    other = read_mark(source)
    try:
        return newest(read_key_files(path))[0].repository_id == other
    except IntegrityError:
        return True


def _right_index(path: Path, keys: Keys, dry_run: bool, output: Output) -> list[str]:
    """What is wrong with this host's index; it is thrown away for that, unless `dry_run`."""
    from store.upkeep.repair import index_problems

    with opened(path, progress=output.progress(), keys=keys) as repository:
        problems = index_problems(repository, output.progress())
        if problems and not dry_run:
            repository.environment.discard()
    return problems


def _supervised(path: Path) -> list[str]:
    """VMs whose supervisors work with a repository, and so with this host's index of it."""
    from perdure.commands.vm import CONTROL
    from perdure.control import call

    found: list[str] = []
    for socket in sorted(places.runtime_folder().glob(f"*/{CONTROL}")):
        with suppress(PerdureError):  # one that does not answer keeps nothing from being repaired
            each = call(socket, "status", {})
            if Path(each["repository"]).resolve() == path.resolve():
                found.append(each["vm"])
    return found


def _donor(stack: ExitStack, repository: Repository, path: Path, given: Credential, output: Output) -> Donor:
    """The other repository, opened; the index of a copy, which has the same name here, is made for this once."""
    from store import leases
    from store.upkeep.donor import Donor

    state = None
    if read_mark(path) == repository.keys.repository_id:
        state = Path(stack.enter_context(TemporaryDirectory(dir=places.state_folder())))
    other = stack.enter_context(opened(path, progress=output.progress(), given=from_credential() or given, state=state))
    lease = other.lease(leases.READER, "repair of another repository")
    if lease is not None:
        stack.callback(lease.release)
    return Donor(repository, other, output.progress())


def _repair_document(
    files: list[Mend], index: list[str], restart: list[str], planned: RepairPlan, result: RepairResult | None
) -> dict[str, Any]:
    from store.upkeep.repair import advice

    document: dict[str, Any] = {
        "dry_run": result is None,
        "files": [msgspec.to_builtins(each) for each in files],
        "index": index,
        "restart": restart,
        "packs": [msgspec.to_builtins(each) for each in planned.packs],
        "hurt": _hurt_document(planned.hurt if result is None else result.hurt),
        "healed": list(planned.healed if result is None else result.healed),
        "impossible": [
            {"object": each.object, "problem": each.problem, "advice": advice(each)} for each in planned.impossible
        ],
    }
    if result is not None:
        document |= {
            "put_back_packs": result.put_back,
            "taken_chunks": result.taken_chunks,
            "replaced_packs": result.replaced_packs,
            "copied_bytes": result.copied_bytes,
        }
    return document


def _hurt_document(hurt: Iterable[Hurt]) -> list[dict[str, Any]]:
    return [{"generation": each.name, "regions": each.regions} for each in hurt]


def _repair_text(
    files: list[Mend], index: list[str], restart: list[str], planned: RepairPlan, result: RepairResult | None
) -> Iterator[str]:
    from perdure.commands.vm import takes_over
    from store.upkeep.repair import advice

    would = "would be" if result is None else "was"
    for file in files:
        yield f"{file.object} {file.problem}: {would} made again what it was ({file.how})"
    if index:
        yield f"the index of this host is wrong and {would} made anew: {index[0]}"
    for vm in restart:
        yield f"  start the supervisor of VM {vm} again, which has the old one: interrupt it, then {takes_over(vm)}"
        yield "  (the guest runs on; until then nothing of it is captured)"
    for pack in planned.packs:
        yield f"packs/{pack.pack}: {'; '.join(pack.problems)}"
        yield f"  {would} {_ACTIONS[pack.action]}" + (f" ({pack.chunks} chunks)" if pack.action == "replace" else "")
    if result is not None and result.taken_chunks:
        yield f"{result.taken_chunks} chunks were taken from the other repository"
    for name in planned.healed if result is None else result.healed:
        yield f"{name} is whole again"
    for each in planned.hurt if result is None else result.hurt:
        lost = ", ".join(f"{name}: {format_size(count)}" for name, count in each.regions.items())
        yield f"{each.name} is hurt ({lost} lost); `perdure export --partial` writes the rest"
    for finding in planned.impossible:
        yield f"cannot be repaired: {finding.object}: {finding.problem}"
        yield f"  {advice(finding)}"
    if planned.empty and not (files or index or planned.impossible):
        yield "nothing more can be repaired" if planned.hurt else "nothing is damaged"


_ACTIONS = {
    "put back": "put back from the copy",
    "replace": "replaced by what can be read of it",
    "drop": "dropped: nothing of it can be read",
}
