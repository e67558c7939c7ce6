"""Prune: what it gives back, what it leaves alone, and for whom it waits."""

import itertools
import random
from contextlib import nullcontext

import pytest
from minimal_reader import Reader
from store_fixtures import PASSPHRASE, add, content, image, memory_file, place

from base import locks
from base.errors import IntegrityError, LockedError
from store import format as layout
from store import leases
from store.chunker import PackingSettings
from store.reader import GenerationReader
from store.upkeep.check import check_repository
from store.upkeep.prune import LOCK, Prune, prune
from store.upkeep.prune_plan import PackUse, PruneSettings, Scatter, plan
from store.upkeep.repair import repair

SMALL = PackingSettings(pack_bytes=200_000)
EVERYTHING = PruneSettings(max_unused_percent=0, scattered_least=1)
NOTHING = PruneSettings(max_unused_percent=100, scattered_least=1 << 40)


def stored(where) -> int:
    return sum(each.stat().st_size for each in (where.path / "packs").iterdir())


def mixed(a: bytes, b: bytes, step: int = 3) -> bytes:
    """Pages of `a`, every so many of them from `b`."""
    pages = [a[at : at + 4096] for at in range(0, len(a), 4096)]
    for at in range(0, min(len(pages), len(b) // 4096), step):
        pages[at] = b[at * 4096 : at * 4096 + 4096]
    return b"".join(pages)


def check_all(where, expected: dict[str, bytes], here=None) -> None:
    """Every generation, here, on a host that has seen nothing, and by a reader that shares no code."""
    for opened in (where.open if here is None else lambda: nullcontext(here), where.elsewhere):
        with opened() as repository:
            names = [each.name for vm in repository.vms() for each in repository.generations(vm)]
            assert sorted(names) == sorted(expected)
            for name in names:
                assert content(repository, repository.resolve(name), "ram") == expected[name], name
            assert check_repository(repository, read_data=True).findings == []
    assert len(Reader(where.path, PASSPHRASE).generations) == len(expected)


def test_what_only_forgotten_generations_need_goes():
    with place(SMALL) as where:
        with where.open() as repository:
            one, two = image(1, 300), image(2, 300)
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            size = stored(where)
            repository.forget(first)
            planned, result = prune(repository, NOTHING, dry_run=True)
            assert result.removed_packs == 0 and stored(where) == size and repository.sequence == 4
            planned, result = prune(repository, NOTHING)
            assert planned.removed and not planned.rewritten
            assert result.removed_packs == len(planned.removed) and result.rewritten_bytes == 0
            assert size - stored(where) == result.freed_bytes == planned.freed_bytes > 0
            assert prune(repository, NOTHING)[1].removed_packs == 0
        check_all(where, {"vm@2": two})


def test_half_used_packs_are_rewritten_down_to_what_may_be_unused():
    with place(SMALL) as where:
        with where.open() as repository:
            one = image(3, 600)
            two = mixed(one, image(4, 600))
            first = add(repository, "vm", {"ram": one})
            second = add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            before, _ = prune(repository, EVERYTHING, dry_run=True)
            assert before.unused_bytes > before.total_bytes // 20
            tolerant = PruneSettings(max_unused_percent=before.unused_bytes * 100 / before.total_bytes + 1)
            assert not plan_of(repository, tolerant).rewritten
            half = PruneSettings(max_unused_percent=5)
            chosen, result = prune(repository, half)
            assert chosen.rewritten and result.rewritten_bytes
            after = plan_of(repository, half)
            assert after.unused_bytes * 100 <= 5 * after.total_bytes
            prune(repository, EVERYTHING)
            assert plan_of(repository, EVERYTHING).unused_bytes == 0
            assert content(repository, second, "ram") == two
        check_all(where, {"vm@2": two})


def plan_of(repository, settings):
    return prune(repository, settings, dry_run=True)[0]


def test_rewriting_is_capped_and_goes_on_next_time():
    with place(SMALL) as where:
        with where.open() as repository:
            one = image(5, 900)
            two = mixed(one, image(6, 900))
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            capped = PruneSettings(max_unused_percent=0, max_rewrite_bytes=250_000)
            rounds = 0
            while plan_of(repository, EVERYTHING).unused_bytes:
                chosen, result = prune(repository, capped)
                assert 0 < result.rewritten_bytes <= chosen.rewritten_bytes * 1.3
                assert chosen.rewritten_bytes <= 250_000
                rounds += 1
            assert rounds > 1
        check_all(where, {"vm@2": two})


def test_an_older_writer_is_waited_for_and_a_reader_is_not():
    with place(SMALL) as where:
        with where.open() as repository, where.elsewhere() as other:
            one, two = image(7, 200), image(8, 200)
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            other.refresh()
            with GenerationReader(other, other.resolve("vm@1")) as reader, other.writer("late") as writer:
                repository.forget(first)
                draft = writer.region("ram", "image", len(one))
                with memory_file(one) as descriptor:
                    writer.replace(draft, descriptor)  # all of it is there already
                assert writer.dirty_bytes and plan_of(repository, NOTHING).removed == ()
                assert reader.read(reader.region("ram"), 0, 4096) == one[:4096]
                _, result = prune(repository, NOTHING)
                assert result.removed_packs == 0
                late = writer.commit("import")
                assert late.stored_bytes == 0
            _, result = prune(repository, NOTHING)
            assert result.removed_packs == 0 and not result.waiting
            prune(repository, EVERYTHING)
        check_all(where, {"late@1": one, "vm@2": two})


def test_what_is_waited_for_is_said_and_the_next_prune_goes_on():
    with place(SMALL) as where:
        with where.open() as repository, where.elsewhere() as other:
            one, two = image(9, 200), image(10, 200)
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            with other.writer("slow"):
                planned, result = prune(repository, NOTHING)
                assert planned.removed and result.removed_packs == 0
                (waiting,) = result.waiting
                assert waiting.facts.purpose == "writer of VM slow"
                assert result.waiting_packs == len(planned.removed)
                with other.writer("young"):  # which has seen what is doomed, and is no reason to wait
                    sequence = repository.sequence
                    _, again = prune(repository, NOTHING)
                    assert [each.facts.purpose for each in again.waiting] == ["writer of VM slow"]
                    assert repository.sequence == sequence  # nothing more to say
            with other.writer("young"):
                _, result = prune(repository, NOTHING)
                assert result.removed_packs == len(planned.removed) and not result.waiting
        check_all(where, {"vm@2": two})


def test_a_forgotten_generation_that_is_read_stays_until_its_reader_ends():
    with place(SMALL) as where, where.open() as repository:
        one, two = image(11, 300), image(12, 300)
        first = add(repository, "vm", {"ram": one})
        add(repository, "vm", {"ram": two}, first)
        with GenerationReader(repository, first) as reader:
            repository.forget(first)
            assert prune(repository, NOTHING)[1].removed_packs == 0
            prune(repository, EVERYTHING)
            assert b"".join(reader.stream(reader.region("ram"), 1 << 18)) == one
        assert prune(repository, NOTHING)[1].removed_packs
        check_all(where, {"vm@2": two}, repository)


def test_packs_that_no_record_names_go_when_their_writers_have_ended():
    with place(SMALL) as where, where.open() as repository:
        one = image(13, 100)
        add(repository, "vm", {"ram": one})
        with where.elsewhere() as other, other.writer("late") as writer:
            two = image(14, 300)
            draft = writer.region("ram", "image", len(two))
            with memory_file(two) as descriptor:
                writer.replace(draft, descriptor)
            lane = writer._local
            lane._chunker._close_pack()  # visible, and named by nothing yet
            published = set(repository.storage.list("packs"))
            assert prune(repository, NOTHING)[1].orphans == 0
            assert set(repository.storage.list("packs")) == published
            writer.commit("import")
        for each in range(3):
            repository.storage.put(layout.pack_name(bytes([each]) * 16), b"left by a crash")
        (where.path / "packs" / "notes.txt").write_bytes(b"not ours")
        assert prune(repository, NOTHING)[1].orphans == 3
        (where.path / "packs" / "notes.txt").unlink()
        check_all(where, {"vm@1": one, "late@1": two}, repository)


def test_files_that_were_swapped_out_and_not_removed_go_with_the_next_prune():
    with place(SMALL) as where, where.open() as repository:
        first = add(repository, "vm", {"ram": image(15, 200)})
        second = add(repository, "vm", {"ram": image(16, 200)}, first)
        repository.forget(first)
        work = Prune(repository, NOTHING)
        for step in work.steps():
            if step == "swapped":
                break
        size = stored(where)
        prune(repository, NOTHING)
        assert stored(where) < size
        assert content(repository, second, "ram") == image(16, 200)


def test_one_prune_at_a_time():
    with place(SMALL) as where, where.open() as repository:
        with locks.held(repository.leases / LOCK, "a test", 0), pytest.raises(LockedError, match="a test since"):
            prune(repository, NOTHING)
        assert prune(repository, NOTHING)[1].removed_packs == 0
        assert leases.held(repository.leases) == []


def test_a_pack_that_cannot_be_read_stays():
    with place(SMALL) as where, where.open() as repository:
        one = image(17, 900)
        two = mixed(one, image(18, 900))
        first = add(repository, "vm", {"ram": one})
        second = add(repository, "vm", {"ram": two}, first)
        repository.forget(first)
        chosen = plan_of(repository, EVERYTHING)
        assert len(chosen.rewritten) > 2
        hurt = next(use for use, _ in chosen.rewritten if repository.catalog.pack(use.number).header.kind == 1)
        path = where.path / layout.pack_name(bytes.fromhex(hurt.id))
        data = bytearray(path.read_bytes())
        for offset in repository.catalog.pack(hurt.number).offsets[:-1].tolist():
            data[offset + 40] ^= 1
        path.write_bytes(data)
        _, result = prune(repository, EVERYTHING)
        assert list(result.unreadable) == [hurt.id]
        assert path.exists() and result.rewritten_packs == len(chosen.rewritten) - 1
        assert [each.pack_id for each in repository.damaged()] == [hurt.id]
        for offset in repository.catalog.pack(hurt.number).offsets[:-1].tolist():
            data[offset + 40] ^= 1
        path.write_bytes(data)
        assert content(repository, second, "ram") == two


@pytest.mark.parametrize("next_host", ["same", "another"])
def test_nothing_comes_to_rely_on_a_pack_that_prune_could_not_read(next_host):
    with place(SMALL) as where:
        one = image(17, 900)
        two = mixed(one, image(18, 900))
        with where.open() as repository:
            first = add(repository, "vm", {"ram": one})
            add(repository, "vm", {"ram": two}, first)
            repository.forget(first)
            chosen = plan_of(repository, EVERYTHING).rewritten
            hurt = next(use for use, _ in chosen if repository.catalog.pack(use.number).header.kind == layout.PACK_DATA)
            frame = int(repository.catalog.pack(hurt.number).offsets[1])
        flip(where, hurt.id, frame + 40)
        with where.open() as repository:
            _, result = prune(repository, EVERYTHING)
            assert list(result.unreadable) == [hurt.id]
        with where.open() if next_host == "same" else where.elsewhere() as repository:
            with pytest.raises(IntegrityError):
                content(repository, repository.resolve("vm@2"), "ram")
            third = add(repository, "other", {"ram": two})
            assert content(repository, third, "ram") == two
            assert content(repository, repository.resolve("vm@2"), "ram") == two
        flip(where, hurt.id, frame + 40)
        with where.open() as repository:
            assert repository.damaged() == [], "it was put back"
            assert not prune(repository, EVERYTHING)[1].unreadable
        check_all(where, {"vm@2": two, "other@1": two})


def test_a_doom_for_damage_that_this_host_does_not_know_of_stays():
    """A repair that another host began and could not end has only doomed the pack: nothing new relies on it, and a
    prune that would have it otherwise finds out why."""
    with place(SMALL) as where:
        data = image(17, 200)
        with where.open() as repository:
            made = add(repository, "vm", {"ram": data})
            entries = [repository.catalog.pack(number) for number in (1, 2)]
            entry = next(each for each in entries if each.header.kind == layout.PACK_DATA)
        flip(where, entry.header.pack_id.hex(), int(entry.offsets[1]) + 40)
        with where.elsewhere() as other, where.open() as repository:
            with repository.writer("vm", made), pytest.raises(LockedError):
                repair(other)
            for _ in range(2):
                with pytest.raises(IntegrityError, match="nothing is pruned"):
                    prune(repository, NOTHING)
                with repository.environment.read() as txn:
                    assert len(repository.catalog.doomed(txn)) == 1
        with where.open() as repository:
            assert repository.unfit(repository.resolve("vm@1")) == {"ram"}
            add(repository, "vm", {"ram": data}, repository.resolve("vm@1"))
            repair(repository)
            prune(repository, NOTHING)
        check_all(where, {"vm@1": data, "vm@2": data})


def flip(where, pack: str, at: int) -> None:
    path = where.path / "packs" / pack
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_nothing_is_pruned_while_damage_is_known():
    with place(SMALL) as where:
        with where.open() as repository:
            first = add(repository, "vm", {"ram": image(19, 200)})
            add(repository, "vm", {"ram": image(20, 200)}, first)
            repository.forget(first)
            name = sorted(repository.storage.list("packs"))[0]
        (where.path / name).rename(where.root / "aside")
        with where.elsewhere() as other, pytest.raises(IntegrityError, match="nothing is pruned"):
            prune(other, EVERYTHING)
        (where.root / "aside").rename(where.path / name)
        with where.open() as repository:
            prune(repository, EVERYTHING)
        check_all(where, {"vm@2": image(20, 200)})


def test_restores_of_the_newest_open_few_frames_after_a_prune():
    with place(SMALL) as where, where.open() as repository:
        data, previous, expected = image(21, 800), None, {}
        for seed in range(8):
            data = mixed(data, image(30 + seed, 800), 7 + seed)
            previous = add(repository, "vm", {"ram": data}, previous)
            expected[previous.name] = data
        before = plan_of(repository, EVERYTHING)
        assert before.scattered["vm"] > 1.2
        _, result = prune(repository, EVERYTHING)
        assert result.rewritten_packs
        assert plan_of(repository, EVERYTHING).scattered["vm"] <= 1.3
        check_all(where, expected, repository)


def test_gathering_is_done_once_also_where_machines_share_what_they_hold():
    eager = PruneSettings(max_unused_percent=100, scattered_least=300)
    with place() as where, where.open() as repository:
        data, previous, expected = image(50, 2000), None, {}
        for seed in range(6):
            data = mixed(data, image(60 + seed, 2000), 7 + seed)
            previous = add(repository, "vm", {"ram": data}, previous)
            expected[previous.name] = data
        pages = [data[at : at + 4096] for at in range(0, len(data) - 4096, 4096)]
        shuffled = b"".join(pages[::3] + pages[1::3])
        expected[add(repository, "other", {"ram": shuffled}).name] = shuffled
        assert {reason for _, reason in plan_of(repository, eager).rewritten} == {"scattered"}
        prune(repository, eager)
        assert plan_of(repository, eager).doomed == ()
        check_all(where, expected, repository)


def test_packs_of_older_epochs_are_sealed_anew():
    with place(SMALL) as where, where.open() as repository:
        one = image(22, 300)
        add(repository, "vm", {"ram": one})
        asked = PruneSettings(epoch=repository.keys.current_epoch + 1, max_rewrite_bytes=None)
        names = set(repository.storage.list("packs"))
        _, result = prune(repository, asked)
        assert result.rewritten_packs == len(names) and not names & set(repository.storage.list("packs"))
        check_all(where, {"vm@1": one}, repository)


def use(number, size=100, live=10, chunks=10, **more):
    facts = {"used_bytes": size * live // chunks, "epoch": 1} | more
    return PackUse(number=number, id=f"{number:032x}", size=size, chunks=chunks, live=live, **facts)


def chosen(made) -> list[int]:
    return [each.number for each, _ in made.rewritten]


def test_the_plan_takes_the_most_unused_first_and_stops_where_it_may():
    uses = [use(1, live=9), use(2, live=2), use(3, live=5), use(4), use(5, live=0)]
    assert [each.number for each in plan(uses, [], PruneSettings(), 1 << 20).removed] == [5]
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=0), 1 << 20)) == [2, 3, 1]
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=5), 1 << 20)) == [2, 3]
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=30), 1 << 20)) == [2]
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=40), 1 << 20)) == []
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=0, max_rewrite_bytes=60), 1 << 20)) == [2]
    assert chosen(plan(uses, [], PruneSettings(max_unused_percent=0, max_rewrite_bytes=0), 1 << 20)) == []
    first = [use(1, live=9, doomed=True), *uses[1:]]
    assert chosen(plan(first, [], PruneSettings(max_unused_percent=0), 1 << 20)) == [1, 2, 3]


def test_the_plan_gathers_what_is_scattered_and_merges_what_is_small():
    uses = [use(number) for number in range(1, 5)]
    scatter = Scatter("vm", {1: (100, 100), 2: (100, 10), 3: (100, 60), 4: (10, 10)})
    eager = PruneSettings(scattered_least=1, scattered_ratio=1.25, scattered_aim=1.25)
    made = plan(uses, [scatter], eager, 100)
    assert made.scattered == {"vm": round(310 / 180, 3)} and chosen(made) == [2]
    assert chosen(plan(uses, [scatter], PruneSettings(scattered_least=1, scattered_aim=1.0), 100)) == [2, 3]
    assert chosen(plan(uses, [scatter], PruneSettings(scattered_least=131), 100)) == []
    assert chosen(plan(uses, [], PruneSettings(many_small=3), 800)) == [1, 2, 3, 4]
    assert chosen(plan(uses, [], PruneSettings(many_small=4), 800)) == []
    old = [use(1, epoch=1), use(2, epoch=2, live=1), use(3, epoch=1, live=0)]
    made = plan(old, [], PruneSettings(epoch=2), 100)
    assert chosen(made) == [1] and [each.number for each in made.removed] == [3]


def test_every_prefix_of_a_prune_leaves_the_repository_whole():
    """Given up after each step in turn, as if killed, and then gone on with by another."""
    one = image(40, 500)
    two = mixed(one, image(41, 500))
    for count in itertools.count(1):
        with place(SMALL) as where:
            with where.open() as repository:
                first = add(repository, "vm", {"ram": one})
                add(repository, "vm", {"ram": two}, first)
                repository.forget(first)
                steps = list(itertools.islice(Prune(repository, EVERYTHING).steps(), count))
            if len(steps) < count:
                break
            check_all(where, {"vm@2": two})
            with where.open() as repository:
                prune(repository, EVERYTHING)
                assert plan_of(repository, EVERYTHING).unused_bytes == 0
                names = {each.partition("/")[2] for each in repository.storage.list("packs")}
                with repository.environment.read() as txn:
                    known = [repository.catalog.entry(txn, each) for each in repository.catalog.pack_numbers(txn)]
                assert names == {each.header.pack_id.hex() for each in known}
            check_all(where, {"vm@2": two})
    assert count > 8


@pytest.mark.parametrize("kind", [layout.PACK_DATA, layout.PACK_NODES])
def test_after_a_repair_there_is_pruning_again_and_what_was_lost_can_still_be_healed(kind):
    with place(SMALL) as where:
        one, two = image(70, 300), random.Random(71).randbytes(200 * 4096)  # which share nothing
        with where.open() as repository:
            first = add(repository, "vm", {"ram": one})
            add(repository, "other", {"ram": two})
            lost = next(each for each in first.packs if kind_of(repository, each) == kind)
            repository.storage.delete(layout.pack_name(bytes.fromhex(lost)))
        with where.open() as repository:
            repair(repository)
            _, result = prune(repository, EVERYTHING)
            assert result.lost_chunks and not result.unreadable
            assert content(repository, repository.resolve("other@1"), "ram") == two
            again = add(repository, "again", {"ram": one})
            prune(repository, EVERYTHING)
            assert content(repository, again, "ram") == one
            assert content(repository, repository.resolve("vm@1"), "ram") == one


def kind_of(repository, pack_id: str) -> int:
    with repository.environment.read() as txn:
        number = repository.catalog.pack_number(txn, bytes.fromhex(pack_id))
    return repository.catalog.pack(number).header.kind
