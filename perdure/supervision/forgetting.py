"""Forgetting by rules: by command, and after a capture. Blocking; the repository's thread."""

from __future__ import annotations

from datetime import UTC, datetime

from base.errors import ConflictError
from store import needs
from store.records import Generation
from store.repository import Repository
from store.retention.policy import Policy
from store.retention.rules import Verdict, plan


def planned(repository: Repository, vm: str, policy: Policy) -> list[Verdict]:
    """What the rules say, and who needs a generation whatever they say."""
    needed = needs.of(repository.leases)
    return [
        Verdict(each.generation, (*each.reasons, "needed") if each.generation.sequence in needed else each.reasons)
        for each in plan(repository.generations(vm), policy, datetime.now(UTC))
    ]


def carried_out(repository: Repository, verdicts: list[Verdict]) -> list[Verdict]:
    """Forget, oldest first; gives what became of each. One that somebody protects meanwhile stays.

    Where there is only one, that raises ConflictError. Raises what appending records raises.
    """
    done = []
    for each in reversed(verdicts):
        if not each.reasons:
            try:
                repository.forget(each.generation)
            except ConflictError:
                if len(verdicts) == 1:
                    raise
                each = Verdict(each.generation, ("protected",))
        done.append(each)
    return done[::-1]


def forget_by_policy(repository: Repository, vm: str) -> list[Generation]:
    """Forget what no rule of the repository keeps of a VM, and give what was forgotten, oldest first: nothing where no
    rules are set.

    Raises ConflictError for a policy that a newer Perdure has made, and what `carried_out` raises.
    """
    policy = repository.policy(vm, whole=True)
    if policy is None or not policy.has_rules:
        return []
    verdicts = carried_out(repository, planned(repository, vm, policy))
    return [each.generation for each in reversed(verdicts) if not each.reasons]
