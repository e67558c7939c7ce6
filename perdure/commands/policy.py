"""Commands about policies: rules and quotas that stand in the repository, so that every client applies the same."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

import msgspec

from base.errors import NotFoundError, UsageError
from base.units import format_size, parse_size
from perdure.commands.retention import rules
from perdure.opening import opened, repository_path
from perdure.output import Output, table
from store.retention.policy import Policy, format_span
from store.retention.quotas import used_bytes

_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_EVERY = "every other VM"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def show(options: Namespace) -> None:
    """`perdure policy show`: all policies, or what holds for one VM and what it stores."""
    output = Output(options.json, options.quiet)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        everything = repository.policies()
        known = repository.vms()
        if options.vm is None:
            entries = [_entry(vm, policy) for vm, policy in everything.items()]
        else:
            if options.vm not in known and options.vm not in everything:
                raise NotFoundError(f"no VM {options.vm} in this repository, and no policy of that name")
            policy = everything.get(options.vm, everything.get(None))
            entry = _entry(options.vm, policy)
            entry["own"] = options.vm in everything
            entry["used_bytes"] = used_bytes(repository, options.vm)
            entries = [entry]
    output.result({"policies": entries}, lambda: _text(entries))


def set_(options: Namespace) -> None:
    """`perdure policy set`: in place of what was set for that VM, or for all that have none of their own."""
    output = Output(options.json, options.quiet)
    if options.vm is not None and not _NAME.fullmatch(options.vm):
        raise UsageError(f"{options.vm!r} is no VM name: letters, digits, . _ - and at most 64 of them")
    policy = msgspec.structs.replace(rules(options), quota=_quota(options.quota))
    if policy == Policy():
        raise UsageError("say what to keep (--keep-last 7, say) or how much may be stored (--quota 20GiB)")
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        repository.set_policy(options.vm, policy)
    entry = _entry(options.vm, policy)
    output.result({"policies": [entry]}, lambda: _text([entry]))


def remove(options: Namespace) -> None:
    """`perdure policy remove`"""
    output = Output(options.json, options.quiet)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        everything = repository.policies()
        if options.vm not in everything:
            raise NotFoundError(f"there is no policy for {options.vm or _EVERY}")
        repository.set_policy(options.vm, None)
    after = everything.get(None) if options.vm is not None else None
    what = (
        "that for every other VM holds for it now" if after is not None else "nothing is forgotten by policy there now"
    )
    output.result({"removed": options.vm}, lambda: [f"policy for {options.vm or _EVERY} removed: {what}"])


def _quota(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--quota: {error}") from error


def _entry(vm: str | None, policy: Policy | None) -> dict[str, Any]:
    """One policy as a document; `vm` null for that of every VM that has none of its own."""
    entry: dict[str, Any] = {"vm": vm}
    if policy is not None:
        entry |= {f"keep_{name}": getattr(policy, name) for name in _COUNTS}
        entry["keep_within"] = None if policy.within is None else format_span(policy.within)
        entry["keep_tags"] = list(policy.tags)
        entry["quota_bytes"] = policy.quota
    return entry


def _text(entries: list[dict[str, Any]]) -> list[str]:
    rows = []
    for each in entries:
        kept = [f"{name} {each[f'keep_{name}']}" for name in _COUNTS if each.get(f"keep_{name}")]
        if each.get("keep_within"):
            kept.append(f"within {each['keep_within']}")
        kept += [f"tag {tag}" for tag in each.get("keep_tags", ())]
        quota = each.get("quota_bytes")
        used = f"{format_size(each['used_bytes'])} of " if "used_bytes" in each else ""
        rows.append(
            (
                each["vm"] or _EVERY,
                ", ".join(kept) or "everything",
                "-" if quota is None and not used else used + ("no limit" if quota is None else format_size(quota)),
            )
        )
    return table(("VM", "KEEP", "QUOTA"), rows)
