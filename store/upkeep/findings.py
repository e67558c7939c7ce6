"""What looking at a repository finds: plain facts, for check, repair and audit, which need neither index nor keys."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `kind`: repository, keyring, slot, record, pack, frame, node, chunk or index; `offset`
    in bytes of `object`, None if it is about all of it; `generations` (vm@n) and `regions` that cannot be restored
    because of it."""

    kind: str
    object: str
    offset: int | None
    problem: str
    generations: tuple[str, ...]
    regions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hurt:
    """A generation that has lost something: bytes by region, at most: below a lost node nobody knows what there was."""

    name: str
    vm_id: str
    number: int
    regions: dict[str, int]


@dataclass(slots=True)
class Report:
    """Result of a check; clean if there are no findings. `hurt`: what generations have lost that are marked as hurt
    already, and that nobody has offered again; a repair has told of it once, so it is no finding."""

    hurt: list[Hurt] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("generations", "packs", "chunks", "bytes", "read_packs", "read_bytes"), 0
        )
    )
