"""`perdure prune`, and what `perdure key rotate --rewrite` has in common with it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from base.errors import UsageError
from base.progress import Progress
from base.units import format_size, parse_size
from perdure.opening import lock_wait_s, opened, repository_path, with_room
from perdure.output import Output
from store.leases import HeldLease
from store.repository import Repository
from store.upkeep.prune import PruneResult, prune
from store.upkeep.prune_plan import EPOCH, PrunePlan, PruneSettings

_LOCKED, _DAMAGED = 11, 3
_REASONS = {
    "unused": "with too much that is not in use",
    "scattered": "that make restores slow",
    "small": "that are small",
    EPOCH: "of earlier epochs",
}


def prune_(options: Namespace) -> int:
    """`perdure prune`"""
    return with_room(repository_path(options.repository), lambda: _prune(options))  # it may be too full to begin


def _prune(options: Namespace) -> int:
    output = Output(options.json, options.quiet)
    settings = _settings(options)
    wait_s = lock_wait_s(0.0)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        planned, result = prune(
            repository,
            settings,
            wait_s=wait_s,
            dry_run=options.dry_run,
            keep_reserve=True,
            progress=output.progress(),
        )
        repository.tidy(_TIDY_SECONDS)
    document = {"dry_run": options.dry_run, **_plan_document(planned), **({} if options.dry_run else _result(result))}
    output.result(document, lambda: _text(planned, None if options.dry_run else result))
    return _LOCKED if result.waiting else _DAMAGED if result.unreadable else 0


_TIDY_SECONDS = 5.0
"""Merging what was dropped out of the index, after a prune."""


def rewrite(repository: Repository, wait_s: float, progress: Progress) -> tuple[dict[str, Any], int]:
    """Seal packs of earlier epochs anew: (what was done, as a document; exit code). May be cut off and called again.

    Writers that were under way may have added some meanwhile, so it is looked again until none are left.
    """
    settings = PruneSettings(epoch=repository.keys.current_epoch, max_rewrite_bytes=None)
    rewritten_packs = rewritten_bytes = 0
    while True:
        _, result = prune(repository, settings, wait_s=wait_s, progress=progress)
        rewritten_packs += result.rewritten_packs
        rewritten_bytes += result.rewritten_bytes
        if result.waiting or result.unreadable or not result.removed_packs:
            break
    left, _ = prune(repository, settings, dry_run=True, wait_s=wait_s)
    document = {
        "rewritten_packs": rewritten_packs,
        "rewritten_bytes": rewritten_bytes,
        "left_packs": len(left.doomed),
        "left_bytes": sum(each.size for each in left.doomed),
        "unreadable": result.unreadable,
        "waiting": [_waiting(each) for each in result.waiting],
    }
    return document, _LOCKED if result.waiting else _DAMAGED if result.unreadable else 0


def rewrite_text(document: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"sealed {document['rewritten_packs']} packs anew, {format_size(document['rewritten_bytes'])} written"
    yield from _unreadable_text(document["unreadable"])
    if document["left_packs"]:
        left = f"{document['left_packs']} packs, {format_size(document['left_bytes'])}, are still of earlier epochs"
        yield f"{left}: `perdure key rotate --resume` goes on with them"
    yield from _waiting_text(document["waiting"])


def _settings(options: Namespace) -> PruneSettings:
    given: dict[str, Any] = {}
    if options.max_unused is not None:
        given["max_unused_percent"] = _percent(options.max_unused)
    if options.max_rewrite == "unlimited":
        given["max_rewrite_bytes"] = None
    elif options.max_rewrite is not None:
        try:
            given["max_rewrite_bytes"] = parse_size(options.max_rewrite)
        except ValueError as error:
            raise UsageError(f"--max-rewrite: {error}, or `unlimited`") from error
    return PruneSettings(**given)


def _percent(text: str) -> float:
    if text == "unlimited":
        return 100.0
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"--max-unused is a share in percent, or `unlimited`, and {text} is none")
    return percent


def _plan_document(planned: PrunePlan) -> dict[str, Any]:
    return {
        "packs": planned.packs,
        "bytes": planned.total_bytes,
        "unused_bytes": planned.unused_bytes,
        "scattered": planned.scattered,
        "remove": [each.id for each in planned.removed],
        "remove_bytes": sum(each.size for each in planned.removed),
        "rewrite": [
            {"pack": each.id, "bytes": each.used_bytes, "reason": reason} for each, reason in planned.rewritten
        ],
        "rewrite_bytes": planned.rewritten_bytes,
    }


def _result(result: PruneResult) -> dict[str, Any]:
    return {
        "removed_packs": result.removed_packs,
        "removed_bytes": result.removed_bytes,
        "rewritten_packs": result.rewritten_packs,
        "rewritten_bytes": result.rewritten_bytes,
        "freed_bytes": result.freed_bytes,
        "orphans": result.orphans,
        "lost_chunks": result.lost_chunks,
        "unreadable": result.unreadable,
        "waiting": [_waiting(each) for each in result.waiting],
        "waiting_packs": result.waiting_packs,
        "waiting_bytes": result.waiting_bytes,
    }


def _waiting(held: HeldLease) -> dict[str, Any]:
    facts = held.facts
    return {"purpose": facts.purpose, "pid": facts.pid, "host": facts.host, "since": facts.since}


def _text(planned: PrunePlan, result: PruneResult | None) -> Iterator[str]:
    yield (
        f"{planned.packs} packs, {format_size(planned.total_bytes)}, "
        f"of which {format_size(planned.unused_bytes)} are not in use"
    )
    for vm, ratio in sorted(planned.scattered.items()):
        if ratio > 1.05:
            yield f"restoring the newest of {vm} opens {ratio:.2f} times what it needs"
    if result is None:
        gone = format_size(sum(each.size for each in planned.removed))
        yield f"would remove {len(planned.removed)} packs without anything in use, {gone}"
        for reason, words in _REASONS.items():
            some = [each for each, why in planned.rewritten if why == reason]
            if some:
                yield f"would rewrite {len(some)} packs {words}, {format_size(sum(each.used_bytes for each in some))}"
        return
    yield (
        f"removed {result.removed_packs} packs, of which {result.rewritten_packs} were rewritten "
        f"({format_size(result.rewritten_bytes)} written): {format_size(result.freed_bytes)} freed"
    )
    if result.orphans:
        yield f"removed {result.orphans} packs that captures left which were cut off"
    if result.lost_chunks:
        yield f"generations need {result.lost_chunks} chunks that are nowhere: `perdure check` says which"
    yield from _unreadable_text(result.unreadable)
    if result.waiting:
        size = format_size(result.waiting_bytes)
        yield f"{result.waiting_packs} packs, {size} to be freed, are left to the next prune, because of older writers:"
        yield from _waiting_text([_waiting(each) for each in result.waiting])


def _waiting_text(waiting: list[dict[str, Any]]) -> Iterator[str]:
    for each in waiting:
        yield f"  {each['purpose']}, process {each['pid']} on {each['host']}, since {each['since']}"


def _unreadable_text(unreadable: dict[str, str]) -> Iterator[str]:
    for problem in unreadable.values():
        yield f"damaged: {problem}: the pack stays; run `perdure check --read-data` and `perdure repair`"
