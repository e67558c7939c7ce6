"""Commands about how long generations are kept."""

from __future__ import annotations

from argparse import Namespace
from datetime import datetime
from typing import Any

from base.errors import ConflictError, UsageError
from perdure import documents
from perdure.opening import opened, repository_path
from perdure.output import Output, moment, table
from store.records import Generation
from store.retention import Policy, Verdict, parse_span, plan


def forget(options: Namespace) -> None:
    """`perdure forget`: by a policy, or one generation by its name."""
    output = Output(options.json, options.quiet)
    policy = _policy(options)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        if "@" in options.what:
            if not policy.empty:
                raise UsageError("name a VM to apply rules to, or one generation to forget, not both")
            verdicts = [_forget_one(repository.resolve(options.what))]
        elif policy.empty:
            raise UsageError(
                f"say what to keep of {options.what} (--keep-last 7, say), or name one generation to forget"
            )
        else:
            verdicts = plan(repository.generations(options.what), policy, datetime.now().astimezone())
        gone = [each.generation for each in verdicts if not each.reasons]
        if not options.dry_run:
            for generation in reversed(gone):
                repository.forget(generation)
    document = {
        "dry_run": options.dry_run,
        "kept": [
            {**documents.point(each.generation), "reasons": list(each.reasons)} for each in verdicts if each.reasons
        ],
        "forgotten": [documents.point(each) for each in gone],
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


def _forget_one(generation: Generation) -> Verdict:
    if generation.protected:
        raise ConflictError(f"{generation.name} is protected: `perdure unprotect {generation.name}` first")
    return Verdict(generation, ())


def _policy(options: Namespace) -> Policy:
    counts = {
        name: getattr(options, f"keep_{name}") for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    }
    for name, count in counts.items():
        if count < 0:
            raise UsageError(f"--keep-{name} is a count, and {count} is none")
    try:
        within = parse_span(options.keep_within) if options.keep_within else None
    except ValueError as error:
        raise UsageError(f"--keep-within: {error}") from error
    return Policy(**counts, within=within, tags=tuple(options.keep_tag))


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
