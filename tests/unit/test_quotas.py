"""Quotas and policies in the repository: what counts, what is refused, and what is forgotten to make room."""

import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import add, content, image, place

from base import extents as ranges
from base.errors import ConflictError, IntegrityError, QuotaError
from store.retention import quotas
from store.retention.policy import Policy
from store.retention.quotas import used_bytes

PAGE = 4096


def noise(seed: int, pages: int) -> bytes:
    """Pages that neither compress nor repeat."""
    import random

    return random.Random(seed).randbytes(pages * PAGE)


def numbers(repository, vm="vm") -> list[int]:
    return [each.number for each in repository.generations(vm)]


def test_policies_stand_in_the_repository_for_every_host():
    mine = Policy(last=3, tags=("release",), quota=1 << 30)
    with place() as where:
        with where.open() as repository:
            assert repository.policies() == {}
            repository.set_policy(None, Policy(daily=7))
            repository.set_policy("vm", mine)  # which has no generation yet
            repository.set_policy("gone", mine)
            repository.set_policy("gone", None)
        for opened in (where.open, where.elsewhere):
            with opened() as repository:
                assert repository.policies() == {None: Policy(daily=7), "vm": mine}
                assert repository.policy("vm") == mine
                assert repository.policy("gone") == repository.policy("other") == Policy(daily=7)


def test_a_policy_of_a_newer_perdure_is_not_carried_out_in_part(monkeypatch):
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": noise(1, 5)})
        newer = msgspec.Raw(b'{"last":1,"fortnightly":2,"quota":1000000}')
        monkeypatch.setattr("store.ledger.encode_policy", lambda _: newer)
        repository.set_policy("vm", None)
        assert repository.policy("vm") == Policy(last=1, quota=1_000_000)
        assert add(repository, "vm", {"ram": noise(2, 5)}).number == 2  # captures go on
        with pytest.raises(ConflictError, match=r"upgrade Perdure .*fortnightly"):
            repository.policy("vm", whole=True)
        monkeypatch.setattr("store.ledger.encode_policy", lambda _: msgspec.Raw(b'{"last":-1}'))
        repository.set_policy("vm", None)
        with pytest.raises(IntegrityError, match="policy for VM vm: makes no sense"):
            repository.policy("vm")


def test_a_commit_beyond_the_quota_is_refused_and_leaves_nothing():
    with place() as where, where.open() as repository:
        repository.set_policy("vm", Policy(quota=60 * PAGE))
        first = add(repository, "vm", {"ram": noise(1, 50)})
        assert used_bytes(repository, "vm") == first.stored_bytes
        packs = set((where.path / "packs").iterdir())
        with pytest.raises(QuotaError) as caught:
            add(repository, "vm", {"ram": noise(2, 50)})
        assert (caught.value.vm, caught.value.quota, caught.value.used) == ("vm", 60 * PAGE, first.stored_bytes)
        assert caught.value.wanted > 10 * PAGE
        assert "perdure forget" in str(caught.value)
        assert numbers(repository) == [1]
        assert set((where.path / "packs").iterdir()) == packs
        add(repository, "vm", {"ram": noise(1, 50)})  # adds nothing
        add(repository, "other", {"ram": noise(2, 50)})  # another VM
        repository.set_policy("vm", Policy(quota=200 * PAGE))
        assert add(repository, "vm", {"ram": noise(2, 50)}).number == 3


def test_what_the_guest_caused_makes_room_and_what_the_operator_made_does_not():
    with place() as where, where.open() as repository:
        repository.set_policy(None, Policy(last=1, quota=240 * PAGE))
        add(repository, "vm", {"ram": noise(0, 50)})
        repository.protect(add(repository, "vm", {"ram": noise(1, 50)}, cause="reboot"), protected=True)
        for seed in range(2, 12):
            add(repository, "vm", {"ram": noise(seed, 50)}, repository.latest("vm"), cause="reboot")
            assert used_bytes(repository, "vm") <= 240 * PAGE
            assert numbers(repository)[:2] == [1, 2]
        assert numbers(repository) == [1, 2, 11, 12]
        assert content(repository, repository.resolve("vm@12"), "ram") == noise(11, 50)
        with pytest.raises(QuotaError):  # vm@1 is kept by last=1, and would be the operator's without it
            add(repository, "vm", {"ram": noise(20, 150)}, cause="snapshot")
        assert numbers(repository) == [1, 2, 11, 12]


def test_the_writer_says_what_was_forgotten_for_it():
    with place() as where, where.open() as repository:
        repository.set_policy("vm", Policy(quota=130 * PAGE))
        for seed in (1, 2):
            add(repository, "vm", {"ram": noise(seed, 50)}, cause="checkpoint")
        with repository.writer("vm") as writer:
            from store_fixtures import memory_file

            draft = writer.region("ram", "image", 50 * PAGE)
            with memory_file(noise(3, 50)) as descriptor:
                writer.replace(draft, descriptor)
            writer.commit("checkpoint")
        assert [each.name for each in writer.forgotten] == ["vm@1"]
        assert numbers(repository) == [2, 3]


def test_forgetting_makes_room_at_once_but_not_more_than_it_frees():
    """What a forgotten generation stored may still be needed by the next: at most all in which they differ."""
    with place() as where, where.open() as repository:
        data = bytearray(noise(1, 50))
        add(repository, "vm", {"ram": bytes(data)})
        for seed in range(2, 6):  # the same ten pages, over and over
            data[: 10 * PAGE] = noise(seed, 10)
            add(repository, "vm", {"ram": bytes(data)}, repository.latest("vm"))
        full = used_bytes(repository, "vm")
        assert full > 90 * PAGE
        for number in (2, 3, 4):
            repository.forget(repository.resolve(f"vm@{number}"))
        assert 60 * PAGE <= used_bytes(repository, "vm") <= 64 * PAGE
        repository.forget(repository.resolve("vm@1"))
        assert used_bytes(repository, "vm") == 50 * PAGE


def test_a_guest_that_rewrites_the_same_pages_never_needs_more_room():
    """What is forgotten and what is new overlap: the new one counts what it changed once, not twice."""
    with place() as where, where.open() as repository:
        repository.set_policy("vm", Policy(quota=75 * PAGE))
        data = bytearray(noise(1, 50))
        add(repository, "vm", {"ram": bytes(data)})
        for seed in range(2, 8):
            data[: 10 * PAGE] = noise(seed, 10)
            dirty = {"ram": ranges.normalise([(0, 10 * PAGE)])}
            add(repository, "vm", {"ram": bytes(data)}, repository.latest("vm"), dirty, cause="checkpoint")
            assert numbers(repository)[-1] == seed
            assert used_bytes(repository, "vm") <= 75 * PAGE
        assert numbers(repository) == [1, 6, 7]


def test_generations_are_compared_once(monkeypatch):
    """A supervisor whose VM has long stored more than its quota does not pay for all of its history each time."""
    with place() as where, where.open() as repository:
        repository.set_policy("vm", Policy(last=3, quota=140 * PAGE))
        data = bytearray(noise(1, 50))
        compared = []
        compare = quotas._compared
        monkeypatch.setattr(quotas, "_compared", lambda *each: compared.append(1) or compare(*each))
        for seed in range(2, 22):
            data[: 10 * PAGE] = noise(seed, 10)
            add(repository, "vm", {"ram": bytes(data)}, repository.latest("vm"), cause="checkpoint")
            for each in repository.generations("vm")[1:-1:2]:
                repository.forget(each)
        assert 0 < len(compared) < 60
        compared.clear()
        for _ in range(5):
            used_bytes(repository, "vm")
        assert len(compared) <= 1


def test_a_sparse_region_counts_what_is_in_it():
    with place() as where, where.open() as repository:
        repository.set_policy("vm", Policy(quota=80 * PAGE))
        for seed in range(1, 9):
            data = bytearray(1 << 20)
            data[: 30 * PAGE] = noise(seed, 30)
            add(repository, "vm", {"ram": bytes(data)}, repository.latest("vm"))
            for generation in repository.generations("vm")[:-1]:
                repository.forget(generation)
        assert numbers(repository) == [8]
        assert used_bytes(repository, "vm") == 30 * PAGE


def test_writers_of_one_vm_at_once_do_not_get_past_the_quota_together():
    """Both are admitted before either commits: the second must be admitted again."""
    with place() as where, where.open() as one, where.elsewhere() as two:
        one.set_policy("vm", Policy(quota=80 * PAGE))
        two.refresh()
        outcomes = []

        def work(repository, seed):
            try:
                outcomes.append(add(repository, "vm", {"ram": noise(seed, 50)}).number)
            except QuotaError:
                outcomes.append(0)

        threads = [threading.Thread(target=work, args=each) for each in ((one, 1), (two, 2))]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sorted(outcomes) == [0, 1]


def test_a_policy_set_meanwhile_counts_for_the_next_commit():
    with place() as where, where.open() as one, where.elsewhere() as two:
        add(one, "vm", {"ram": noise(1, 50)})
        two.refresh()
        one.set_policy("vm", Policy(quota=60 * PAGE))
        with pytest.raises(QuotaError):
            add(two, "vm", {"ram": noise(2, 50)})


def test_what_is_protected_meanwhile_is_not_forgotten():
    with place() as where, where.open() as one, where.elsewhere() as two:
        generation = add(one, "vm", {"ram": image(1, 5)})
        two.refresh()
        two.protect(two.resolve("vm@1"), protected=True)
        with pytest.raises(ConflictError, match="unprotect"):
            one.forget(generation)
        assert numbers(one) == [1]


STEP = st.tuples(st.sampled_from(["reboot", "checkpoint", "snapshot"]), st.integers(0, 45), st.integers(1, 20))


@given(steps=st.lists(STEP, min_size=3, max_size=10), quota=st.integers(55, 120), last=st.integers(0, 2))
@settings(max_examples=20)
def test_what_holds_for_any_history(steps, quota, last):
    """Within the quota after every commit; nothing of the operator's goes; every host counts the same."""
    with place() as where, where.open() as repository:
        repository.set_policy(None, Policy(last=last, quota=quota * PAGE))
        data = bytearray(noise(0, 50))
        contents = {1: bytes(data)}
        kept = [add(repository, "vm", {"ram": bytes(data)}).number]
        for seed, (cause, start, count) in enumerate(steps, 1):
            before = bytes(data)
            end = min(start + count, 50)
            data[start * PAGE : end * PAGE] = noise(seed, end - start)
            dirty = {"ram": ranges.normalise([(start * PAGE, end * PAGE)])}
            try:
                made = add(repository, "vm", {"ram": bytes(data)}, repository.latest("vm"), dirty, cause=cause)
            except QuotaError:
                data = bytearray(before)
                continue
            contents[made.number] = bytes(data)
            kept += [made.number] if cause == "snapshot" else []
            listed = numbers(repository)
            assert set(kept) <= set(listed)
            assert listed[-1] == made.number
            assert used_bytes(repository, "vm") <= quota * PAGE
        with where.elsewhere() as elsewhere:
            assert used_bytes(elsewhere, "vm") == used_bytes(repository, "vm")
            for each in elsewhere.generations("vm"):
                assert content(elsewhere, each, "ram") == contents[each.number]
