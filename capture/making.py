"""A generation in the making: its writer and the regions that were begun, from the first page that is stored ahead to
the commit.

Whoever makes one owns its packs until they are committed: it holds a writer's lease, and closing it drops everything.
Nothing else depends on it, so it may be given up at any time: the trackers know what was collected since the last
generation, and the journal says that bits were cleared. Belongs to the repository's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from capture.sources import CapturedRegion, Source
from store.records import Generation
from store.repository import Repository


class Making:
    """Begins a generation of `vm` that follows `parent`, each region with the content of its base, by name in `bases`.

    `ahead`: it may be open for long, and gives way to whoever prunes. A context manager. Raises what
    `Repository.writer` raises.
    """

    def __init__(
        self,
        repository: Repository,
        vm: str,
        parent: Generation | None,
        bases: Mapping[str, Generation],
        *,
        ahead: bool = False,
    ) -> None:
        repository.refresh()
        # What was forgotten meanwhile is no base: nothing is known of what there is then, so all of it is looked at.
        self.parent = parent if parent is not None and repository.has(parent) else None
        self.bases = {name: base for name, base in bases.items() if repository.has(base)}
        self._repository = repository
        self._stack = ExitStack()
        self.writer = self._stack.enter_context(repository.writer(vm, self.parent, self.bases, ahead=ahead))
        self._sources: dict[str, Source] = {}

    def __enter__(self) -> Making:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is not committed."""
        self._stack.close()

    def begins_from(self, parent: Generation | None, bases: Mapping[str, Generation]) -> bool:
        """Whether a capture that follows `parent` begins from these, too."""
        return _same(self.parent, parent) and all(_same(self.bases.get(name), base) for name, base in bases.items())

    def serves(self, parent: Generation | None, bases: Mapping[str, Generation]) -> bool:
        """Whether a capture that follows `parent` and begins from these can go on from here."""
        return (
            self.begins_from(parent, bases)
            and all(self._repository.has(each) for each in (*bases.values(), *([parent] if parent else ())))
            and not self.writer.stands_on_lost_ground
        )

    def open(self, regions: Sequence[CapturedRegion], *, full: bool) -> list[Source]:
        """These regions, begun or gone on with as they are to be captured now; others that were begun are dropped."""
        wanted = {region.name for region in regions}
        for name in [name for name in self._sources if name not in wanted]:
            self._drop(name)
        found = []
        for region in regions:
            source = self._sources.get(region.name)
            if source is not None and not source.serves(region):
                self._drop(region.name)
                source = None
            if source is None:
                known = region.name in self.bases
                base = self.bases.get(region.name, self.parent)
                source = Source.begin(self.writer, region, base, known=known, full=full)
                self._stack.callback(source.close)
                self._sources[region.name] = source
            else:
                source.go_on(self.writer, region, full=full)
            found.append(source)
        return found

    def _drop(self, name: str) -> None:
        self.writer.drop(name)
        del self._sources[name]


def _same(a: Generation | None, b: Generation | None) -> bool:
    return (a and a.id) == (b and b.id)
