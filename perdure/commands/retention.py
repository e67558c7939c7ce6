"""Commands about how long generations are kept."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from base.errors import ConflictError, UsageError
from perdure import documents
from perdure.opening import opened, repository_path, with_room
from perdure.output import Output, moment, table
from perdure.supervision.forgetting import carried_out, planned
from store.records import Generation
from store.repository import Repository
from store.retention.policy import Policy, parse_span
from store.retention.rules import Verdict


def forget(options: Namespace) -> None:
    """`perdure forget`: by the rules given, by the policies that stand in the repository, or one generation by name.

    On a full disk it takes from the room that is set aside for pruning, which comes after it.
    """
    with_room(repository_path(options.repository), lambda: _forget(options))


def _forget(options: Namespace) -> None:
    output = Output(options.json, options.quiet)
    given = rules(options)
    _require_sense(options, given)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        if options.what is not None and "@" in options.what:
            verdicts = [_forget_one(repository.resolve(options.what))]
        else:
            verdicts = [
                each for vm, policy in _chosen(repository, options, given) for each in planned(repository, vm, policy)
            ]
        if not options.dry_run:
            verdicts = carried_out(repository, verdicts)
    document = {
        "dry_run": options.dry_run,
        "kept": [
            {**documents.point(each.generation), "reasons": list(each.reasons)} for each in verdicts if each.reasons
        ],
        "forgotten": [documents.point(each.generation) for each in verdicts if not each.reasons],
    }
    output.result(document, lambda: _forget_text(verdicts, options.dry_run))


def protect(options: Namespace) -> None:
    """`perdure protect`"""
    _set_protected(options, protected=True)


def unprotect(options: Namespace) -> None:
    """`perdure unprotect`"""
    _set_protected(options, protected=False)


def _set_protected(options: Namespace, *, protected: bool) -> None:
    output = Output(options.json, options.quiet)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        generation = repository.resolve(options.point)
        if generation.protected != protected:
            repository.protect(generation, protected=protected)
    what = "is protected" if protected else "is no longer protected"
    output.result({**documents.point(generation), "protected": protected}, lambda: [f"{generation.name} {what}"])


def rules(options: Namespace) -> Policy:
    """The policy that --keep-... and --quota name. Raises UsageError."""
    counts = {
        name: getattr(options, f"keep_{name}") for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    }
    for name, count in counts.items():
        if not 0 <= count < 1 << 31:
            raise UsageError(f"--keep-{name} is a count, and {count} is none")
    try:
        within = parse_span(options.keep_within) if options.keep_within else None
    except ValueError as error:
        raise UsageError(f"--keep-within: {error}") from error
    return Policy(**counts, within=within, tags=tuple(options.keep_tag))


def _require_sense(options: Namespace, given: Policy) -> None:
    if options.all == (options.what is not None):
        raise UsageError("name a VM or one generation to forget, or give --all")
    if options.all and given.has_rules:
        raise UsageError("--all applies the policies of the repository: set rules with `perdure policy set`")
    if options.what is not None and "@" in options.what and given.has_rules:
        raise UsageError("name a VM to apply rules to, or one generation to forget, not both")


def _chosen(repository: Repository, options: Namespace, given: Policy) -> Iterator[tuple[str, Policy]]:
    """VMs and the rules to apply to them; a VM that no rules are set for is left alone by --all."""
    if options.all:
        for vm in repository.vms():
            policy = repository.policy(vm, whole=True)
            if policy is not None and policy.has_rules:
                yield vm, policy
        return
    policy = given if given.has_rules else repository.policy(options.what, whole=True)
    if policy is None or not policy.has_rules:
        raise UsageError(
            f"say what to keep of {options.what} (--keep-last 7, say), set it for good (`perdure policy set`), "
            f"or name one generation to forget"
        )
    yield options.what, policy


def _forget_one(generation: Generation) -> Verdict:
    if generation.protected:
        raise ConflictError(f"{generation.name} is protected: `perdure unprotect {generation.name}` first")
    return Verdict(generation, ())


def _forget_text(verdicts: list[Verdict], dry_run: bool) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        (
            each.generation.name,
            each.generation.id[:12],
            moment(each.generation.time),
            each.generation.cause,
            "keep" if each.reasons else "would forget" if dry_run else "forgotten",
            ", ".join(each.reasons),
        )
        for each in verdicts
    ]
    return table(("GENERATION", "ID", "TIME", "CAUSE", "VERDICT", "REASONS"), rows)
