"""Everything that is done to a repository, in any order, against a dict: two hosts, crashes, keys that rotate, prune.

A crash records an operation, takes one of the states that a power loss may leave of it, and goes on from there; see
crash_images. The other host has not crashed, and keeps what it knew. PERDURE_MODEL_EXAMPLES makes it look for longer.
"""

import os
import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from crash_images import Blobs, Recorder, some_image
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from operations import SMALL, slot
from store_fixtures import PASSPHRASE, Place, add
from test_crash_states import history, listed, opened, read

from base import extents as ranges
from base.disk import Disk
from base.errors import ConflictError
from store.creation import read_mark
from store.keyring.keychain import Keychain
from store.repository import Repository
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings

PAGE = 4096
POOL = [random.Random(each).randbytes(PAGE) for each in range(16)] + [bytes(PAGE)] * 4
"""Few pages: what is forgotten and pruned is soon wanted again."""
EVERYTHING = PruneSettings(max_unused_percent=0, scattered_least=1)
HOSTS = st.sampled_from(["state", "other"])
SEEDS = st.integers(0, 1 << 16)


class Model(RuleBasedStateMachine):
    """`expected`: what every generation that is not forgotten holds; `known`: that of forgotten ones too."""

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.at = 0
        self.where = Place(self.next_root(), SMALL)
        self.known: dict[str, bytes] = {}
        self.expected: dict[str, bytes] = {}
        self.protected: set[str] = set()

    def teardown(self):
        if hasattr(self, "folder"):
            self.everything_is_there("nowhere")
            self.folder.cleanup()

    def next_root(self) -> Path:
        self.at += 1
        return Path(self.folder.name) / f"disk-{self.at}"

    def repository(self, host: str, disk: Disk | None = None) -> Repository:
        where = self.where
        return Repository(
            where.path, opened(where), where.root / host, disk=disk or Disk(), unlock=lambda: opened(where)
        )

    # What is done; each takes the disk through which it is done.

    def do_import(self, host: str, rng: random.Random, disk: Disk | None) -> None:
        """A whole image, or some pages of the latest generation changed."""
        vm = rng.choice("ab")
        with self.repository(host, disk) as repository:
            parent, dirty = repository.latest(vm), None
            data = bytearray(b"".join(rng.choices(POOL, k=rng.randrange(30))))
            if parent is not None and rng.random() < 0.6:
                data = bytearray(self.expected[parent.name])
                rows = [(at * PAGE, (at + rng.randrange(1, 5)) * PAGE) for at in rng.sample(range(30), 2)]
                rows = [(min(start, len(data)), min(end, len(data))) for start, end in rows]
                for start, end in rows:
                    data[start:end] = b"".join(rng.choices(POOL, k=(end - start) // PAGE))
                dirty = {"ram": ranges.normalise(rows)}
            with repository.environment.read() as txn:
                number = (repository.catalog.vm(txn, vm) or (b"", 0))[1] + 1
            self.known[f"{vm}@{number}"] = bytes(data)
            generation = add(repository, vm, {"ram": bytes(data)}, parent, dirty)
            assert generation.name == f"{vm}@{number}"
        self.expected[generation.name] = bytes(data)

    def do_forget(self, host: str, rng: random.Random, disk: Disk | None) -> None:
        free = sorted(set(self.expected) - self.protected)
        if free:
            name = rng.choice(free)
            with self.repository(host, disk) as repository:
                repository.forget(repository.resolve(name))
            del self.expected[name]

    def do_protect(self, host: str, rng: random.Random, disk: Disk | None) -> None:
        if self.expected:
            name = rng.choice(sorted(self.expected))
            protected = rng.random() < 0.4
            with self.repository(host, disk) as repository:
                repository.protect(repository.resolve(name), protected=protected)
            self.protected = self.protected | {name} if protected else self.protected - {name}

    def do_prune(self, host: str, rng: random.Random, disk: Disk | None) -> None:
        with self.repository(host, disk) as repository:
            epoch = repository.keys.current_epoch if rng.random() < 0.3 else None
            chosen = EVERYTHING if epoch is None else PruneSettings(epoch=epoch, max_rewrite_bytes=None)
            _, done = prune(repository, chosen)
            assert not done.waiting and not done.unreadable

    def do_rotate(self, host: str, rng: random.Random, disk: Disk | None) -> None:  # noqa: ARG002  # as the others
        path = self.where.path
        with Keychain(path, read_mark(path), PASSPHRASE, self.where.root / host, disk=disk) as chain:
            chain.change(add=slot(PASSPHRASE), remove=[chain.keys.slot_id], rotate=True)

    DEEDS = ("import", "import", "import", "forget", "forget", "protect", "prune", "prune", "rotate")

    @rule(what=st.sampled_from(DEEDS), host=HOSTS, seed=SEEDS)
    def does(self, what, host, seed):
        getattr(self, f"do_{what}")(host, random.Random(seed), None)

    @rule(what=st.sampled_from(DEEDS), seed=SEEDS)
    def crashes(self, what, seed):
        """Host `state` does it, and loses power at some time."""
        rng = random.Random(seed)
        before = dict(self.expected)
        recorder = Recorder(self.where.root, Blobs(self.where.root.with_suffix(".blobs")))
        getattr(self, f"do_{what}")("state", rng, recorder)
        recorder.acknowledge()
        after, protected = self.expected, self.protected
        image = some_image(recorder, rng)
        crashed = Place.at(self.next_root())
        crashed.root.mkdir()
        image.build(crashed.root, recorder.blobs)
        with suppress(FileNotFoundError):
            shutil.rmtree(crashed.root / "other", ignore_errors=True)
            shutil.copytree(self.where.root / "other", crashed.root / "other")
        self.where = crashed
        found = history(crashed, opened(crashed), image.names("records"))
        assert set(found) in ([set(after)] if image.acknowledged else [set(before), set(after)])
        self.expected = {name: self.known[name] for name in found}
        self.protected = {name for name, (_, kept) in found.items() if kept}
        assert not image.acknowledged or self.protected == protected & set(found)

    # What is looked at.

    @precondition(lambda self: self.expected)
    @rule(host=HOSTS, seed=SEEDS)
    def exports(self, host, seed):
        name = random.Random(seed).choice(sorted(self.expected))
        with self.repository(host) as repository:
            assert read(repository, name) == self.expected[name]

    @precondition(lambda self: self.protected)
    @rule(host=HOSTS)
    def a_protected_one_is_kept(self, host):
        with self.repository(host) as repository, pytest.raises(ConflictError):
            repository.forget(repository.resolve(min(self.protected)))

    @rule(host=HOSTS)
    def everything_is_there(self, host):
        with self.repository(host) as repository:
            found = listed(repository)
            assert set(found) == set(self.expected)
            assert {name for name, (_, protected) in found.items() if protected} == self.protected
            for name, content in self.expected.items():
                assert read(repository, name) == content
            assert check_repository(repository, read_data=True).findings == []


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=int(os.environ.get("PERDURE_MODEL_EXAMPLES", "30")),
    stateful_step_count=20,
    suppress_health_check=list(HealthCheck),
    derandomize="PERDURE_MODEL_EXAMPLES" not in os.environ,
)
