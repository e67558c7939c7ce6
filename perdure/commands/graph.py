"""History as a graph, for `perdure log --graph`: which generation came out of which. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from store.records import Generation


def rows(generations: Sequence[Generation]) -> Iterator[tuple[str, Generation | None]]:
    """Lines, newest generation first: the drawing, and the generation that stands beside it, if one does.

    A lane leads from each generation down to its parent; where several have one parent their lanes meet above it. The
    lane of one whose parent is not listed (it was forgotten) ends.
    """
    listed = {each.id for each in generations}
    lanes: list[str | None] = []
    for each in sorted(generations, key=lambda one: one.sequence, reverse=True):
        meeting = [at for at, wanted in enumerate(lanes) if wanted == each.id]
        if not meeting:
            free = next((at for at, wanted in enumerate(lanes) if wanted is None), len(lanes))
            lanes[free : free + 1] = [each.id]
            meeting = [free]
        first = meeting[0]
        for other in meeting[1:]:
            yield _joined(lanes, first, other), None
            lanes[other] = None
        while lanes and lanes[-1] is None:
            lanes.pop()
        yield " ".join("*" if at == first else " " if wanted is None else "|" for at, wanted in enumerate(lanes)), each
        lanes[first] = each.parent if each.parent in listed else None


def _joined(lanes: Sequence[str | None], first: int, other: int) -> str:
    """The lane `other` turns left and ends in `first`."""
    drawn = ""
    for at, wanted in enumerate(lanes):
        crossed = first < at < other
        drawn += "'" if at == other else " -|+"[2 * (wanted is not None) + crossed]
        drawn += "-" if first <= at < other else " "
    return drawn.rstrip()
