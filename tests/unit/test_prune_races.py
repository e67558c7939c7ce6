"""Prune's second marking, with others at work in the middle of it.

What is forgotten at the first marking comes back into use before it is doomed, is forgotten again, and is inherited by
a writer who has seen the doom: nothing but the order in which prune looks at leases and at the history keeps it.
"""

from collections.abc import Callable, Iterator

import pytest
from store_fixtures import add, image, memory_file, place
from test_prune import NOTHING, SMALL, check_all

from store import leases
from store.upkeep.prune import Prune


def after(steps: Iterator[str], name: str) -> None:
    """Let prune go on until a step is done."""
    for step in steps:
        if step == name:
            return
    raise AssertionError(f"prune never came to {name}")


class Late:
    """Who builds on a generation that is forgotten at once."""

    def __init__(self, repository, parent) -> None:
        self._repository, self._parent = repository, parent

    def begin(self) -> None:
        self._writer = self._repository.writer("late", self._parent)
        self._writer.region("ram", "image", self._parent.regions["ram"].root.length)
        self._repository.forget(self._parent)

    def commit(self) -> None:
        with self._writer:
            assert self._writer.commit("import").stored_bytes == 0


def meanwhile(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] | None, then: Callable[[], None] | None):
    """Do something right before, or right after, leases are listed the next time."""
    held = leases.held

    def listed(folder):
        monkeypatch.setattr(leases, "held", held)
        if before is not None:
            before()
        found = held(folder)
        if then is not None:
            then()
        return found

    monkeypatch.setattr(leases, "held", listed)


@pytest.mark.parametrize("moment", ["ends before leases are listed", "begins after leases are listed"])
def test_who_stands_on_what_is_forgotten_during_the_second_marking_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with place(SMALL) as where:
        one, two = image(61, 200), image(62, 200)
        with where.open() as repository, where.elsewhere() as other:
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            steps = Prune(repository, NOTHING).steps()
            after(steps, "marked")
            with other.writer("back") as writer, memory_file(one) as descriptor:
                writer.replace(writer.region("ram", "image", len(one)), descriptor)
                back = writer.commit("import")
            assert back.stored_bytes == 0
            after(steps, "doomed")
            other.refresh()
            late = Late(other, back)
            if moment == "ends before leases are listed":
                late.begin()
            after(steps, "waited")
            if moment == "ends before leases are listed":
                meanwhile(monkeypatch, late.commit, None)
                after(steps, "marked again")
            else:
                meanwhile(monkeypatch, None, late.begin)
                after(steps, "marked again")
                late.commit()
            assert list(steps)[-1] == "rewritten"
        check_all(where, {"late@1": one, "vm@2": two})
