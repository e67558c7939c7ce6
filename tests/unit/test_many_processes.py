"""One repository, many processes at once: they import, one VM and several, on this host and as another; read, list,
export, check, forget and prune; and are killed. Afterwards every generation is there, once, and holds what it must."""

import itertools
import os
import random
import signal
import traceback
from collections import defaultdict

from store_fixtures import content, image, memory_file, place

from base.disk import Disk
from base.errors import ConflictError, NotFoundError
from store import format as layout
from store.chunker import PackingSettings
from store.records import decode_record
from store.repository import Repository
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings

SMALL_PACKS = PackingSettings(pack_bytes=100_000)
PAGES = 60


def data_of(seed: int) -> bytes:
    """Content of the generation that is tagged with `seed`: part of it is shared with all others."""
    return image(seed, PAGES // 2) + image(seed % 3, PAGES // 2)


def make(repository: Repository, vm: str, seed: int) -> None:
    """The next generation of a VM; what another process changed in between is tried again, as a user would."""
    while True:
        try:
            with repository.writer(vm, repository.latest(vm)) as writer, memory_file(data_of(seed)) as descriptor:
                writer.replace(writer.region("ram", "image", len(data_of(seed))), descriptor)
                writer.commit("import", tags=(str(seed),))
            return
        except (ConflictError, NotFoundError):  # its parent, or packs that it shares, went
            repository.refresh()


def holds_what_it_must(repository: Repository, generation) -> bool:
    return content(repository, generation, "ram") == data_of(int(generation.tags[0]))


def write(where, vm: str, seeds: range, *, elsewhere: bool = False) -> None:
    with where.elsewhere() if elsewhere else where.open() as repository:
        for seed in seeds:
            make(repository, vm, seed)


def read(where, stop: tuple[int, int], seed: int) -> None:
    """List, and export something, until told to stop; once at least."""
    rng = random.Random(seed)
    for _ in rounds(stop):
        with where.open(lock_wait_s=60) as repository:
            listed = [each for vm in repository.vms() for each in repository.generations(vm)]
            for generation in rng.sample(listed, min(2, len(listed))):
                try:
                    assert holds_what_it_must(repository, generation), generation.name
                except NotFoundError:
                    assert not repository.has(generation)


def check(where, stop: tuple[int, int]) -> None:
    for _ in rounds(stop):
        with where.open() as repository:
            report = check_repository(repository)
            assert report.findings == []


def forget_and_prune(where, stop: tuple[int, int]) -> None:
    for turn in rounds(stop):
        with where.open() as repository:
            for generation in (repository.generations("a") if "a" in repository.vms() else [])[:-2]:
                repository.forget(generation)
            if turn % 2:
                prune(repository, PruneSettings(), wait_s=0)


def rounds(pipe: tuple[int, int]):
    """0, 1, ... until the other end of the pipe is closed."""
    stop, running = pipe
    os.close(running)
    os.set_blocking(stop, False)
    for turn in itertools.count():
        yield turn
        try:
            os.read(stop, 1)
        except BlockingIOError:
            continue
        return


class Dying(Disk):
    """Kills its process before step `at`."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # a Disk's
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def be_killed(where, at: int) -> None:
    disk = Dying(-1)
    with where.open(disk=disk) as repository:
        disk.left = at
        for seed in itertools.count(1000 * at):
            make(repository, "victim", seed)


def start(work, *arguments, **more) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*arguments, **more)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def numbers_by_vm(where) -> dict[str, list[int]]:
    """Generation numbers in the order of records, forgotten ones included."""
    found = defaultdict(list)
    with where.open() as repository:
        previous = layout.ZERO_ID
        names = (where.path / "records").iterdir()  # a killed process may have left what it was writing
        for sequence, path in enumerate(sorted(each for each in names if each.name.isdigit()), 1):
            record = decode_record(repository.keys, path.read_bytes(), sequence, previous)
            previous = record.id
            if record.header.kind == layout.RECORD_GENERATION:
                found[record.body.vm].append(record.header.number)
    return found


def test_many_processes_at_once():
    with place(SMALL_PACKS) as where:
        stop = os.pipe()
        writers = [
            start(write, where, "a", range(100, 108)),
            start(write, where, "b", range(200, 206)),
            start(write, where, "both", range(300, 305)),
            start(write, where, "both", range(400, 405)),
            start(write, where, "both", range(500, 504), elsewhere=True),
        ]
        others = [
            start(read, where, stop, 1),
            start(read, where, stop, 2),
            start(check, where, stop),
            start(forget_and_prune, where, stop),
        ]
        for at in (3, 11, 17, 24, 31):
            assert os.WTERMSIG(ended(start(be_killed, where, at))) == signal.SIGKILL
        assert [ended(each) for each in writers] == [0] * 5
        os.close(stop[1])
        assert [ended(each) for each in others] == [0] * 4
        os.close(stop[0])

        numbers = numbers_by_vm(where)
        assert {vm: len(each) for vm, each in numbers.items() if vm != "victim"} == {"a": 8, "b": 6, "both": 14}
        for vm, each in numbers.items():
            assert each == list(range(1, len(each) + 1)), vm
        for opened in (where.open, where.elsewhere):
            with opened() as repository:
                for vm in repository.vms():
                    for generation in repository.generations(vm):
                        assert holds_what_it_must(repository, generation), generation.name
                seeds = sorted(int(each.tags[0]) for each in repository.generations("both"))
                assert seeds == [*range(300, 305), *range(400, 405), *range(500, 504)]
                report = check_repository(repository, read_data=True)
                assert report.findings == []


def test_the_same_vm_and_nothing_else():
    """Five processes that begin at the same moment and wait for each other's commits."""
    with place() as where:
        where.open().close()
        ready, go = os.pipe(), os.pipe()

        def work(first: int) -> None:
            with where.open() as repository:
                os.write(ready[1], b".")
                os.read(go[0], 1)
                for seed in range(first, first + 6):
                    make(repository, "vm", seed)

        pids = [start(work, 10 * n) for n in range(5)]
        for _ in pids:
            os.read(ready[0], 1)
        os.write(go[1], b"." * len(pids))
        assert [ended(each) for each in pids] == [0] * 5
        assert numbers_by_vm(where) == {"vm": list(range(1, 31))}
        with where.elsewhere() as repository:
            generations = repository.generations("vm")
            assert sorted(int(each.tags[0]) for each in generations) == [
                10 * n + at for n in range(5) for at in range(6)
            ]
            assert all(holds_what_it_must(repository, each) for each in generations)
        for each in (*ready, *go):
            os.close(each)
