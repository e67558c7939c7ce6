"""Pruning a full disk: only what is set aside for it makes room for the records that it takes."""

import errno

import pytest
from store_fixtures import add, content, image, place

from base.disk import Disk
from base.errors import StorageError
from perdure.opening import with_room
from store.upkeep import reserve
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings


class FullDisk(Disk):
    """Has no room left for anything while the emergency file is there."""

    def __init__(self) -> None:
        self.reserve, self.full = None, False

    def step(self, operation: str, path: str) -> None:
        if self.full and operation in ("create", "write", "allocate", "lmdb commit") and self.reserve.exists():
            raise StorageError(path, f"cannot {operation}: no space left on device", errno=errno.ENOSPC)


@pytest.mark.parametrize("percent", [0, 100])
def test_a_full_disk_is_pruned_with_what_was_set_aside(percent):
    with place() as where:
        disk = FullDisk()
        disk.reserve = where.path / reserve.NAME
        one, two = image(1, 200), image(2, 200)
        asked = PruneSettings(max_unused_percent=percent)
        with where.open(disk=disk) as repository:
            first = add(repository, "vm", {"ram": one})
            second = add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            assert reserve.make(where.path, disk)
            disk.full = True
            with pytest.raises(StorageError, match="no space"):
                add(repository, "vm", {"ram": one}, second)
            assert disk.reserve.exists()
            _, result = prune(repository, asked, keep_reserve=True)
            assert result.removed_packs and disk.reserve.stat().st_size == reserve.BYTES
            assert content(repository, second, "ram") == two
        with where.elsewhere() as other:
            assert content(other, other.resolve("vm@2"), "ram") == two


def test_without_it_the_error_is_told_and_nothing_is_lost():
    with place() as where:
        disk = FullDisk()
        disk.reserve = where.path  # which is always there
        with where.open(disk=disk) as repository:
            first = add(repository, "vm", {"ram": image(3, 50)})
            second = add(repository, "vm", {"ram": image(4, 50)}, first)
            repository.forget(first)
            disk.full = True
            with pytest.raises(StorageError, match="no space"):
                prune(repository, PruneSettings())
            disk.full = False
            assert content(repository, second, "ram") == image(4, 50)
            assert prune(repository, PruneSettings())[1].removed_packs
            assert content(repository, second, "ram") == image(4, 50)


def test_there_is_no_half_of_an_emergency_file(tmp_path):
    disk = FullDisk()
    disk.reserve, disk.full = tmp_path, True
    assert not reserve.make(tmp_path, disk)
    assert list(tmp_path.iterdir()) == []
    disk.full = False
    assert reserve.make(tmp_path, disk) and reserve.make(tmp_path, disk)
    assert [each.name for each in tmp_path.iterdir()] == [reserve.NAME]
    assert reserve.give_up(tmp_path, disk) and not reserve.give_up(tmp_path, disk)


def test_a_command_that_gives_room_back_is_done_once_more(tmp_path):
    disk = FullDisk()
    disk.reserve, disk.full = tmp_path / reserve.NAME, True
    reserve.make(tmp_path, Disk())
    done = []

    def forget() -> int:
        disk.step("create", "a record")
        done.append(1)
        return 7

    assert with_room(tmp_path, forget) == 7
    assert done == [1] and not disk.reserve.exists()
    disk.reserve = tmp_path
    with pytest.raises(StorageError, match="no space"):
        with_room(tmp_path, forget)
