"""Ctrl-C or SIGTERM at any step of whatever appends a record that names packs: what is listed afterwards can be read,
also once the next prune has run, and nothing else stands in the way of doing it again.

The signal comes before an operation of the disk, or after a name was given and before anybody has heard of it. It is
the main thread's, as Python has it.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from operations import OPERATIONS, Run, key_rotate_rewrite, prepared
from store_fixtures import content, image, memory_file, place
from test_crash_states import history, listed, opened, whole
from test_refusals import Refusing, valid

import store.ledger
from base.disk import Disk
from store.chunker import PackingSettings
from store.repository import Repository
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings


class Interrupting(Refusing):
    """Refuses nothing: there somebody presses Ctrl-C."""

    def __init__(self, at: int = 0, how: str = "before") -> None:
        super().__init__(at, how)
        self.seen: list[str] = []

    def step(self, operation: str, path: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self.seen.append(operation)
            super().step(operation, path)

    def _refuse(self, path: str) -> None:  # noqa: ARG002  # as Refusing has it
        raise KeyboardInterrupt

    def _after(self, path: Path) -> None:
        if threading.current_thread() is threading.main_thread():
            super()._after(path)


WORK = {
    "capture": OPERATIONS["capture"],
    "import": OPERATIONS["import-of-a-new-vm"],
    "prune": OPERATIONS["prune"],
    "key rotate --rewrite": key_rotate_rewrite,
    "repair": OPERATIONS["repair"],
}


@pytest.mark.parametrize(("name", "at_once"), [*((each, 1 << 18) for each in WORK), ("capture", 8)])
def test_interrupted_at_every_step(name, at_once, monkeypatch):
    """With 8 as with what is large: a commit goes on with indexing when its record is there."""
    monkeypatch.setattr(store.ledger, "_REPLAY_AT_ONCE", at_once)
    watch = Interrupting()
    with prepared() as where:
        WORK[name](Run(where, watch))
    cases = [(at, "before") for at in range(1, len(watch.seen) + 1)]
    cases += [(at, "after") for at, operation in enumerate(watch.seen, 1) if operation == "link"]
    for at, how in cases:
        with prepared() as where:
            disk = Interrupting(at, how)
            run = Run(where, disk)
            with pytest.raises(KeyboardInterrupt):
                WORK[name](run)
            survived(where, run, name)


def survived(where, run: Run, name: str) -> None:
    keys = opened(where)
    records = sorted(each.name for each in (where.path / "records").iterdir() if each.name.isdigit())
    expected = history(where, keys, records)
    with Repository(where.path, keys, where.state) as repository:
        assert listed(repository) == expected
        whole(repository)
        if name != "repair":
            assert check_repository(repository, read_data=True).findings == []
    run.credential, run.disk = valid(where), Disk()
    if name == "repair":
        WORK[name](run)
    with Repository(where.path, opened(where), where.state) as repository:
        prune(repository, PruneSettings(max_unused_percent=0, scattered_least=1))
    with Repository(where.path, opened(where), where.root / "elsewhere") as repository:
        assert listed(repository) == expected
        whole(repository)
        assert check_repository(repository, read_data=True).findings == []


def test_an_index_that_is_thrown_away_beside_a_large_commit_does_not_undo_it(monkeypatch):
    """As `perdure repair` of another process does: the record stands, whatever becomes of what this host knows."""

    class Discarding(Disk):
        index: Path | None = None

        def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # as Disk has it
            if operation == "lmdb commit" and self.index is not None:
                self.index.unlink()
                self.index = None

    monkeypatch.setattr(store.ledger, "_REPLAY_AT_ONCE", 8)
    data = image(1, 60)
    with place(PackingSettings(pack_bytes=30_000)) as where:
        disk = Discarding()
        with where.open(disk=disk) as repository, repository.writer("vm") as writer:
            draft = writer.region("ram", "image", len(data))
            with memory_file(data) as descriptor:
                writer.replace(draft, descriptor)
            disk.index = repository.environment.path
            writer.commit("import")
        with where.open() as repository:
            assert content(repository, repository.resolve("vm@1"), "ram") == data
            assert check_repository(repository, read_data=True).findings == []
