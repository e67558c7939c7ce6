"""Prune among others: writers, readers and forgetting on two hosts, between any two of its steps.

Content is made of few pages, so that whatever is forgotten is soon wanted again: that is where a prune can go wrong.
PERDURE_MODEL_EXAMPLES makes it look for longer.
"""

import itertools
import os
import random
from contextlib import ExitStack, suppress

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import add, memory_file, place

from base.errors import NotFoundError
from store.chunker import PackingSettings
from store.reader import GenerationReader
from store.upkeep.prune import Prune, prune
from store.upkeep.prune_plan import PruneSettings

TINY = PackingSettings(frame_bytes=8192, pack_bytes=20_000)
EVERYTHING = PruneSettings(max_unused_percent=0, scattered_least=1)
PAGES = 40
POOL = [random.Random(each).randbytes(4096) for each in range(24)] + [bytes(4096)]


def memory(seed: int) -> bytes:
    """Pages of a pool, an eighth of it at a time, so that much is shared by some and needed by none after a while."""
    rng = random.Random(seed)
    some = rng.sample(POOL, 4)
    return b"".join(rng.choice(some) for _ in range(PAGES))


class Writer:
    """A generation in the making: half of its pages, the other half, the commit."""

    def __init__(self, world, repository, vm: str, parent, seed: int) -> None:
        self.world, self.data, self.vm = world, memory(seed), vm
        before = memory_of(world, parent)
        self.writer = world.stack.enter_context(repository.writer(vm, parent))
        self.draft = self.writer.region("ram", "image", len(self.data))
        self.keep = seed % 5 == 0
        if self.keep and before:  # a generation that is its parent but for a few pages
            self.data = before[: len(before) // 2] + self.data[len(before) // 2 :]
        self.todo = [self.first, self.second, self.commit]

    def step(self) -> bool:
        self.todo.pop(0)()
        return bool(self.todo)

    def first(self) -> None:
        self.replace(0, PAGES // 2)

    def second(self) -> None:
        self.replace(PAGES // 2, PAGES)

    def replace(self, start: int, end: int) -> None:
        with memory_file(self.data) as descriptor:
            self.writer.replace(self.draft, descriptor, np.array([[start * 4096, end * 4096]]))

    def commit(self) -> None:
        generation = self.writer.commit("import")  # a prune is never a reason for it to fail
        self.world.expected[generation.name] = self.data
        self.writer.close()


class Reader:
    """An export of a generation, a page at a time."""

    def __init__(self, world, repository, generation) -> None:
        self.data = world.expected[generation.name]
        self.reader = world.stack.enter_context(GenerationReader(repository, generation))
        self.at = 0

    def step(self) -> bool:
        region = self.reader.region("ram")
        end = min(self.at + 11, PAGES) * 4096
        assert self.reader.read(region, self.at * 4096, end) == self.data[self.at * 4096 : end]
        self.at = end // 4096
        if self.at == PAGES:
            self.reader.__exit__()
        return self.at < PAGES


def memory_of(world, generation):
    return None if generation is None else world.expected[generation.name]


class World:
    """Two hosts and all that they do."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.where = stack.enter_context(place(TINY))
        self.hosts = [stack.enter_context(self.where.open()), stack.enter_context(self.where.elsewhere())]
        self.expected: dict[str, bytes] = {}
        self.actors: list = []
        self.pruning = None

    def known(self, repository) -> list:
        """Generations that a host has seen; others may have forgotten them."""
        with repository.environment.read() as txn:
            return [each for vm in repository.catalog.vms(txn) for each in repository.catalog.generations(txn, vm)]

    def do(self, what: str, rng: random.Random) -> None:
        for each in self.hosts:
            each.storage.close()  # else a host would go on reading files that are gone
        repository = rng.choice(self.hosts)
        known = self.known(repository)
        if what == "write":
            parent = rng.choice([*known, None])
            vm = parent.vm if parent else rng.choice(["a", "b"])
            with suppress(NotFoundError):  # forgotten by the other host
                self.actors.append(Writer(self, repository, vm, parent, rng.randrange(40)))
        elif what == "read" and known:
            with suppress(NotFoundError, KeyError):
                self.actors.append(Reader(self, repository, rng.choice(known)))
        elif what == "step" and self.actors:
            actor = rng.choice(self.actors)
            if not actor.step():
                self.actors.remove(actor)
        elif what == "give up" and self.actors:
            actor = self.actors.pop(rng.randrange(len(self.actors)))
            (actor.writer if isinstance(actor, Writer) else actor.reader).__exit__()
        elif what == "forget" and known:
            gone = rng.choice(known)
            repository.forget(gone)
        elif what == "prune":
            if self.pruning is None:
                self.pruning = Prune(repository, EVERYTHING).steps()
            if next(self.pruning, None) is None:
                self.pruning = None
                self.check(self.hosts)
        elif what == "kill" and self.pruning is not None:
            self.pruning.close()
            self.pruning = None
        elif what == "refresh":
            repository.refresh()

    def finish(self) -> None:
        """All end what they do; then a prune with nobody else there; then everything, also from nothing."""
        while self.actors:
            self.do("step", random.Random(1))
        while self.pruning is not None:
            self.do("prune", random.Random(1))
        prune(self.hosts[0], EVERYTHING)
        self.check([*self.hosts, self.stack.enter_context(self.where.elsewhere())])
        uses = prune(self.hosts[0], EVERYTHING, dry_run=True)[0]
        assert uses.unused_bytes == 0

    def check(self, hosts) -> None:
        for repository in hosts:
            repository.refresh()
            for generation in self.known(repository):
                with GenerationReader(repository, generation) as reader:
                    region = reader.region("ram")
                    assert reader.read(region, 0, PAGES * 4096) == self.expected[generation.name], generation.name


DEEDS = ["write"] * 3 + ["read"] * 2 + ["step"] * 8 + ["forget"] * 3 + ["prune"] * 8 + ["kill", "refresh", "give up"]


@settings(
    max_examples=int(os.environ.get("PERDURE_MODEL_EXAMPLES", "25")),
    suppress_health_check=list(HealthCheck),
    derandomize="PERDURE_MODEL_EXAMPLES" not in os.environ,
)
@given(st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 1 << 16)), min_size=30, max_size=90))
def test_others_do_anything_between_any_two_steps(deeds):
    with ExitStack() as stack:
        world = World(stack)
        for seed in (1, 2):
            generation = add(world.hosts[0], "a", {"ram": memory(seed)})
            world.expected[generation.name] = memory(seed)
        for what, seed in deeds:
            world.do(what, random.Random(seed))
        world.finish()


def steps_of_a_prune() -> int:
    with ExitStack() as stack:
        return sum(1 for _ in Prune(prepared(stack).hosts[0], EVERYTHING).steps())


def prepared(stack: ExitStack) -> World:
    """A world in which a prune has something to remove and something to rewrite, and the second host is behind."""
    world = World(stack)
    here = world.hosts[0]
    for seed in range(1, 7):
        generation = add(here, "a", {"ram": memory(seed)})
        world.expected[generation.name] = memory(seed)
    world.hosts[1].refresh()
    for number in (1, 2, 4):
        here.forget(here.resolve(f"a@{number}"))
    return world


def test_a_writer_that_begins_and_ends_between_any_two_steps():
    """On either host, with the content of what was forgotten: for each pair of steps and each place of its lookups."""
    count = steps_of_a_prune()
    assert count >= 10
    for host, (begin, middle, end) in itertools.product(
        (0, 1), itertools.combinations_with_replacement(range(0, count + 1, 3), 3)
    ):
        with ExitStack() as stack:
            world = prepared(stack)
            pruning = Prune(world.hosts[0], EVERYTHING).steps()
            writer = None
            for step in range(count + 2):
                if step == begin:
                    parent = world.known(world.hosts[host])[-1]
                    writer = Writer(world, world.hosts[host], "a", parent, 2)
                    writer.step()
                    world.hosts[0].forget(parent)
                if step == middle and writer:
                    writer.step()
                if step == end and writer:
                    writer.step()
                next(pruning, None)
            while writer.todo:
                writer.step()
            for _ in pruning:
                pass
            world.finish()
