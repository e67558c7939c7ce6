"""Forgetting by the policy that stands in the repository, after a capture. Blocking; the repository's thread."""

from __future__ import annotations

from datetime import UTC, datetime

from base.errors import ConflictError
from store.records import Generation
from store.repository import Repository
from store.retention.rules import plan


def forget_by_policy(repository: Repository, vm: str) -> list[Generation]:
    """Forget what no rule keeps of a VM, oldest first, and give what was forgotten: nothing where no rules are set.

    One that somebody protects meanwhile stays. Raises ConflictError for a policy that a newer Perdure has made, and
    what appending records raises.
    """
    policy = repository.policy(vm, whole=True)
    if policy is None or not policy.has_rules:
        return []
    forgotten = []
    for each in reversed(plan(repository.generations(vm), policy, datetime.now(UTC))):
        if not each.reasons:
            try:
                repository.forget(each.generation)
            except ConflictError:
                continue
            forgotten.append(each.generation)
    return forgotten
