"""History drawn as a graph."""

from dataclasses import replace

import pytest

from perdure.commands.graph import rows
from store.records import Generation

ONE = Generation(
    vm="vm", vm_id="", number=1, id="1", parent=None, sequence=1, time="", cause="", host="", tags=(), regions={},
    packs=(), dirty_bytes=0, stored_bytes=0, pause_ms=None, metadata={},
)  # fmt: skip


def drawn(*parents: int | None) -> list[str]:
    """The graph of generations 1, 2, ... with these parents."""
    made = [
        replace(ONE, number=at, sequence=at, id=str(at), parent=None if parent is None else str(parent))
        for at, parent in enumerate(parents, 1)
    ]
    return [f"{drawing} {each.number}" if each else drawing for drawing, each in rows(made)]


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ((), []),
        ((None, 1, 2), ["* 3", "* 2", "* 1"]),
        # 4 goes back to 1: what was made of 2 and 3 is a branch.
        ((None, 1, 2, 1, 4), ["* 5", "* 4", "| * 3", "| * 2", "|-'", "* 1"]),
        # Two branches of 1, beside one that crosses their meeting.
        (
            (None, 1, 2, 1, 2, 1),
            ["* 6", "| * 5", "| | * 4", "| | | * 3", "| |-+-'", "| * | 2", "|-' |", "|---'", "* 1"],
        ),
        # 2 was forgotten (9 stands for it): a line ends.
        ((None, 9, 2), ["* 3", "* 2", "* 1"]),
    ],
)
def test_lines_lead_to_parents_and_meet_there(parents, expected):
    assert drawn(*parents) == expected
