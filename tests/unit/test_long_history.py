"""Ten thousand generations: listed at once, and one VM among them without reading those of others."""

import os
import resource

import pytest
from store_fixtures import add, content, image, place

from store import format as layout
from store.catalog import Catalog
from store.records import GenerationBody, RegionBody, encode_record
from store.repository import Repository
from store.retention.policy import Policy

COUNT, VMS = 10_000, 50
NOTHING = RegionBody(
    name="ram", kind="image", length=1 << 40, chunk_size=4096, height=0, root="00" * 32, kept_bytes=4096
)


def lengthen(repository: Repository, count: int) -> None:
    """Append generations of empty regions, as another host would that has nothing to store."""
    with repository.environment.read() as txn:
        sequence, previous = repository.catalog.last(txn)
    for each in range(count):
        vm, number = each % VMS, each // VMS + 1
        body = GenerationBody(
            vm=f"vm{vm}", time="2026-11-25T09:00:00.000Z", cause="snapshot", host="h", tags=(str(each),),
            regions=(NOTHING,), packs=(), dirty_bytes=0, stored_bytes=0, pause_ms=1.5, metadata={"kept": {"ram": []}},
        )  # fmt: skip
        sequence += 1
        data = encode_record(
            repository.keys, layout.RECORD_GENERATION, sequence, previous, body,
            vm_id=vm.to_bytes(16, "big"), number=number,
        )  # fmt: skip
        (repository.path / layout.record_name(sequence)).write_bytes(data)
        previous = layout.record_id(data)


@pytest.fixture(scope="module")
def long_history():
    with place() as where:
        with where.open() as repository:
            data = image(1, 50)
            add(repository, "one", {"ram": data})
            lengthen(repository, COUNT)
            add(repository, "one", {"ram": data[:4096] + data})  # replays all of that in its transaction
        yield where


def test_all_are_listed_here_and_on_a_host_that_sees_them_for_the_first_time(long_history):
    for opened in (long_history.open, long_history.elsewhere):
        with opened() as repository:
            listed = {vm: [each.number for each in repository.generations(vm)] for vm in repository.vms()}
            assert listed.pop("one") == [1, 2]
            assert listed == {f"vm{vm}": list(range(1, COUNT // VMS + 1)) for vm in range(VMS)}
            assert content(repository, repository.resolve("one@1"), "ram") == image(1, 50)


def test_the_generations_of_one_vm_cost_what_that_vm_has(long_history, monkeypatch):
    decoded = []
    decode = Catalog._generation
    monkeypatch.setattr(Catalog, "_generation", lambda *each: decoded.append(1) or decode(*each))
    with long_history.open() as repository:
        assert len(repository.generations("vm7")) == len(decoded) == COUNT // VMS
        decoded.clear()
        assert repository.resolve("vm7@latest").number == COUNT // VMS
        assert repository.resolve("vm7@3").number == 3
        assert repository.latest("one").number == 2
        assert len(repository.vms()) == VMS + 1
        assert len(decoded) == 3


def test_memory_is_bounded(long_history):
    """Of a process that replays all, and then lists one VM."""
    pid = os.fork()
    if pid == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = 1
        try:
            with long_history.elsewhere() as repository:
                assert len(repository.generations("vm7")) == COUNT // VMS
            status = 0 if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10 else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_quota_is_admitted_without_a_look_at_the_history(long_history, monkeypatch):
    decode = Catalog._generation
    decoded = []
    with long_history.open() as repository:
        repository.set_policy(None, Policy(quota=1 << 30))
        parent = repository.latest("vm7")
        monkeypatch.setattr(Catalog, "_generation", lambda *each: decoded.append(1) or decode(*each))
        add(repository, "vm7", {"ram": image(2, 5)}, parent)
        assert len(decoded) <= 1
