"""A flipped bit in every structure, files that are gone, cut, exchanged or of others: what repair makes of it.

Afterwards a check finds nothing but what repair said that it cannot do, here and on a new host; what can be read is
right, and what cannot is marked.
"""

import random
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from store_fixtures import PASSPHRASE, Place, add, content, image, place

from base.errors import ConflictError, IntegrityError
from store.chunker import PackingSettings
from store.history import History
from store.keyring.slots import unlock
from store.repository import Repository
from store.storage import LocalStorage
from store.upkeep.check import check_repository
from store.upkeep.mending import Mending
from store.upkeep.repair import repair

SMALL_PACKS = PackingSettings(pack_bytes=200_000, frame_bytes=64 << 10)
PAGE = 4096
DATA = {1: random.Random(1).randbytes(100 * PAGE)}
DATA[2] = random.Random(2).randbytes(40 * PAGE) + DATA[1][40 * PAGE :]


def filled(where) -> None:
    with where.open() as repository:
        first = add(repository, "vm", {"ram": DATA[1], "disk": image(1, 30)})
        add(repository, "vm", {"ram": DATA[2], "disk": image(1, 30)}, first)


def small_files(where) -> list[Path]:
    folders = [where.path / "keys", where.path / "keyring", where.path / "records"]
    return [where.path / "config", *(path for folder in folders for path in sorted(folder.iterdir()))]


def packs(where) -> list[Path]:
    return sorted((where.path / "packs").iterdir())


def flip(path: Path, at: int, bit: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)


def mended(where, state: Path, copy: Path | None = None) -> int:
    """Small files, as the command does it; gives how many."""
    mending = Mending(LocalStorage(where.path), None if copy is None else LocalStorage(copy), apply=True)
    mends, files = mending.key_files()
    keys = unlock(files, PASSPHRASE)
    mends += mending.records(keys, History(state / "history.json").newest)
    with Repository(where.path, keys, state) as repository:
        repair(repository)
    return len(mends)


def judged(where) -> int:
    """Clean everywhere, right or marked; gives the number of generations that can be read."""
    for open_repository in (where.open, where.elsewhere):
        with open_repository() as repository:
            assert check_repository(repository, read_data=True).findings == []
            good = 0
            for generation in repository.generations("vm"):
                with suppress(IntegrityError):
                    assert content(repository, generation, "ram") == DATA[generation.number]
                    assert content(repository, generation, "disk") == image(1, 30)
                    good += 1
                    assert not generation.hurt
                    continue
                assert generation.hurt
    return good


@pytest.mark.parametrize("host", ["known", "new"])
def test_any_flipped_bit_of_a_small_file_is_set_right(host):
    rng = random.Random(host)
    with place(SMALL_PACKS) as where:
        filled(where)
        for path in small_files(where):
            original = path.read_bytes()
            for at in {0, 9, len(original) - 1, rng.randrange(len(original)), rng.randrange(len(original))}:
                flip(path, at, rng.randrange(8))
                state = where.state if host == "known" else where.root / "never"
                assert mended(where, state) == 1, f"{path} at {at}"
                assert path.read_bytes() == original
                shutil.rmtree(where.root / "never", ignore_errors=True)
        assert judged(where) == 2


def test_any_flipped_bit_of_a_pack_costs_a_frame_at_most():
    rng = random.Random(5)
    with place(SMALL_PACKS) as where:
        filled(where)
        for path in packs(where):
            original = path.read_bytes()
            footer = len(original) - 16 - int.from_bytes(original[-16:-12], "little")
            places = {
                "header": rng.randrange(64),
                "length": 64 + rng.randrange(4),
                "frame": rng.randrange(68, footer),
                "footer": rng.randrange(footer, len(original) - 16),
                "trailer": len(original) - 16 + rng.choice([0, 1, 2, 3, 8, 15]),
            }
            for structure, at in places.items():
                with place_like(where) as again:
                    flip(again.path / "packs" / path.name, at, rng.randrange(8))
                    mended(again, again.root / "new")
                    good = judged(again)
                    assert good == 2 or structure == "frame", (structure, at)
                    assert not (again.path / "packs" / path.name).exists()


@contextmanager
def place_like(where):
    """A copy of a place, to be changed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        shutil.copytree(where.root, root, dirs_exist_ok=True)
        yield Place.at(Path(root))


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "exchanged", "of another"])
@pytest.mark.parametrize("host", ["known", "new"])
def test_packs_that_are_gone_cut_or_others(how, host):
    with place(SMALL_PACKS) as where:
        filled(where)
        one, two = packs(where)[:2]
        match how:
            case "missing":
                one.unlink()
            case "empty":
                one.write_bytes(b"")
            case "cut":
                one.write_bytes(one.read_bytes()[: one.stat().st_size // 2])
            case "exchanged":
                first = one.read_bytes()
                one.write_bytes(two.read_bytes())
                two.write_bytes(first)
            case "of another":
                with place(SMALL_PACKS) as other:  # of another repository, under this name
                    filled(other)
                    one.write_bytes(packs(other)[0].read_bytes())
        mended(where, where.state if host == "known" else where.root / "new")
        judged(where)


def test_records_and_keys_that_are_gone_or_cut_come_from_a_copy():
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = Path(shutil.copytree(where.path, where.root / "copy"))
        before = {path: path.read_bytes() for path in small_files(where)}
        for path in before:
            for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:20])):
                if path.parent.name == "keyring" and damage is Path.unlink:
                    continue  # without any keyring it is no repository
                damage(path)
                assert mended(where, where.state, copy) == 1, path
                assert path.read_bytes() == before[path]
        assert judged(where) == 2
        records = sorted((copy / "records").iterdir())
        shutil.copy(records[1], records[2])  # a copy that is damaged itself gives nothing wrong
        (where.path / "records" / records[2].name).write_bytes(b"")
        with pytest.raises(IntegrityError):
            mended(where, where.state, copy)


def records(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted((path / "records").iterdir())}


def gone_on(where, generations: int) -> Place:
    """A copy, in which somebody has made so many generations since."""
    copy = Place.at(where.root / "elsewhere")
    shutil.copytree(where.path, copy.path)
    with copy.open() as repository:
        for number in range(generations):
            add(repository, "vm", {"ram": image(number, 20)}, repository.latest("vm"))
    return copy


@pytest.mark.parametrize(
    ("host", "damage"),  # a new host cannot know that a damaged newest record was another than the copy's
    [("known", "none"), ("new", "none"), ("known", "newest is cut"), ("known", "newest is gone")],
)
@pytest.mark.parametrize("further", [1, 2])
def test_a_copy_that_has_gone_another_way_replaces_nothing(host, damage, further):
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = gone_on(where, further)
        with where.open() as repository:
            add(repository, "vm", {"ram": image(9, 20)}, repository.latest("vm"))
        newest = where.path / "records" / max(records(where.path))
        state = where.state if host == "known" else where.root / "never"
        if damage == "newest is cut":
            newest.write_bytes(newest.read_bytes()[:-1])
        elif damage == "newest is gone":
            newest.unlink()
        before = records(where.path)
        if damage == "none" and further == 1:  # it has nothing beyond ours
            assert mended(where, state, copy.path) == 0
        else:
            with pytest.raises(ConflictError, match=r"gone another way: .* (is another|does not go on)"):
                mended(where, state, copy.path)
        assert records(where.path) == before


def test_what_a_copy_has_beyond_ours_is_taken_where_it_goes_on_from_it():
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = gone_on(where, 3)
        wanted = records(copy.path)
        ours = sorted((where.path / "records").iterdir())
        flip(ours[-2], 100, 1)
        flip(ours[-1], 100, 1)
        shutil.copytree(copy.path / "packs", where.path / "packs", dirs_exist_ok=True)
        assert mended(where, where.state, copy.path) == 5
        assert records(where.path) == wanted


def test_what_this_host_has_seen_is_not_replaced_by_what_is_behind_it():
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = gone_on(where, 2)
        with where.open() as repository:
            add(repository, "vm", {"ram": image(9, 20)}, repository.latest("vm"))
        newest = max(records(copy.path))
        shutil.copy(copy.path / "records" / newest, where.path / "records" / newest)  # somebody has mixed them
        before = records(where.path)
        with pytest.raises(IntegrityError, match="does not go on from the record that this host has seen"):
            mended(where, where.state, copy.path)
        assert records(where.path) == before
