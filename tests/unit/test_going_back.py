"""Going back with disks: at every step disks and history are those of one QEMU, the one that runs or the next. Real
images and servers, without a guest.
"""

import random
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import pytest
from store_fixtures import index_made_anew, memory_file, place

from base.disk import Disk as HostDisk
from base.errors import PerdureError, StorageError, WorkerError
from perdure.disks.images import Disks
from perdure.disks.server import find
from perdure.disks.state import TOKEN
from perdure.supervision import heads
from perdure.supervision.local import Local
from perdure.supervision.preparing import Preparation, Prepared
from store import needs
from store.records import UncertainCommitError
from vm.config import Description, Disk
from vm.folder import RuntimeFolder
from vm.identity import ended
from vm.memory import Memory


class Host:
    """A VM with one disk, and a full generation of it, "demo@1"; no QEMU."""

    def __init__(self, where, repository, folder):
        self.place, self.repository, self.folder = where, repository, folder
        content = random.Random(1).randbytes(64 * 4096)
        self.first = folder / "one"
        self.first.write_bytes(content)
        for name in ("run", "state"):
            (folder / name).mkdir()
        with repository.writer("demo", None) as writer, memory_file(content) as file:
            writer.replace(writer.region("disk:one", "disk", len(content), chunk_size=65536), file)
            writer.replace(writer.region("devices", "device", 4096), file)
            self.generation = writer.commit("snapshot")
        description = Description(name="demo", memory=64 << 20, disks=(Disk("one", self.first),))
        self.local = Local(description, RuntimeFolder("demo", folder / "run"), folder / "state")
        self.said = []

    @property
    def disks(self) -> Disks:
        return self.local.disks

    def again(self) -> Disks:
        """As the next supervisor finds them."""
        self.disks.let_go()
        self.local = Local(self.local.description, self.local.folder, self.local.state)
        return self.disks

    def go_on_from(self, generation, **more):
        memory = Memory("demo", self.folder / "memory", {})
        prepared = Prepared(memory, None, "", generation, None, (), b"state")
        made = Preparation(self.local).go_on_from(
            self.repository, replace(prepared, **more), self.said.append, drop_disks=True
        )
        return made.parent

    def launched(self):
        """A guest that runs on an image which is filled."""
        head = self.go_on_from(self.generation)
        self.disks.promote()
        self.disks.begun()
        self.filled()
        return head

    def filled(self):
        for name, token in self.disks.unfilled().items():
            self.disks.note_filled(name, token)
        self.disks.watch()

    def disk(self):
        """What QEMU is given as disk one, and whether that is there."""
        path = self.disks.description.disks[0].file
        return path, path.exists()

    @property
    def images(self):
        return sorted((self.folder / "perdure-overlays").glob("*"))

    @property
    def needed(self):
        return len(needs.listed(self.repository.leases))


@contextmanager
def hosted(**options):
    with place() as where, where.open(**options) as repository:
        (where.root / "vm").mkdir()
        made = Host(where, repository, where.root / "vm")
        yield made
        made.disks.end_servers()


@pytest.fixture
def host():
    with hosted() as made:
        yield made


def test_disks_are_another_qemu_s_until_it_is_about_to_be_launched(host):
    head = host.go_on_from(host.generation)
    [image] = host.images
    server = find(host.local.folder.images(head.metadata[TOKEN]))
    assert host.disk() == (host.first, True)
    assert host.disks.superseded(head) and not host.disks.pristine(head)
    host.disks.watch()  # beside the guest that still runs
    assert server.alive and host.needed == 1
    host.disks.promote()
    assert host.disk() == (image, True)
    assert host.disks.superseded(head) and host.disks.pristine(head)
    host.disks.begun()
    assert not host.disks.superseded(head)
    server.close()


def test_a_server_whose_index_was_made_anew_ends_and_another_is_started(host):
    """By a supervisor whose own index it was, too."""
    head = host.go_on_from(host.generation)
    path = host.local.folder.images(head.metadata[TOKEN])
    server = find(path)
    index_made_anew(host.place)
    assert ended(server._pidfd, 60), "it goes on with an index that is gone"
    assert host.disks.watch() == ["the server of disk one had ended, and is started again"]
    server.close()
    server = find(path)
    assert server.alive
    uri = f"nbd+unix:///one?socket={path}"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, host.first], check=True)
    server.close()


def test_disks_that_cannot_be_served_change_neither_history_nor_the_disks(host):
    latest = host.launched()
    disk, images = host.disk(), host.images
    shutil.rmtree(host.folder / "run")
    with pytest.raises(WorkerError, match="the server of its disks did not start"):
        host.go_on_from(host.generation)
    assert host.repository.latest("demo") == latest and not host.said
    assert (host.disk(), host.images, host.needed) == (disk, images, 0)
    host.again().settle(host.repository)
    assert (host.disk(), host.images, host.needed) == (disk, images, 0)


def test_what_fails_behind_the_head_forgets_it(host):
    latest = host.launched()
    disk, images = host.disk(), host.images
    with pytest.raises(PerdureError):  # there are no files that could be filled lazily
        host.go_on_from(host.generation, served=True)
    assert host.repository.latest("demo") == latest
    assert [text.partition(" after all")[0] for text in host.said] == ["demo does not go on from demo@3"]
    assert (host.disk(), host.images, host.needed) == (disk, images, 0)
    assert not list(host.local.folder.path.glob("then-*.sock"))


class Reluctant(HostDisk):
    """Does not make the name of the next record durable, once armed."""

    armed = False

    def step(self, operation, path):
        if self.armed and operation == "fsync directory" and path.endswith("/records"):
            self.armed = False
            raise StorageError(path, "is not made durable")


def test_a_head_that_may_be_committed_is_looked_for_and_forgotten():
    disk = Reluctant()
    with hosted(disk=disk) as host:
        latest = host.launched()
        found, images = host.disk(), host.images
        disk.armed = True
        with pytest.raises(UncertainCommitError):
            host.go_on_from(host.generation)
        assert host.repository.latest("demo") == latest
        assert len(host.said) == 1 and "demo@3 after all" in host.said[0]
        assert (host.disk(), host.images, host.needed) == (found, images, 0)


def test_a_head_that_cannot_be_forgotten_is_named(host):
    latest = host.launched()
    head = heads.again(host.repository, "demo", host.generation)
    needs.record(host.local.disk, host.repository.leases, needs.new_name(), "a copy", [head.sequence])
    heads.take_back(host.repository, "demo", head, host.said.append)
    assert not host.said
    heads.take_back(host.repository, "demo", latest, host.said.append)
    [said] = host.said
    assert said.startswith("demo does not go on from demo@3, which cannot be forgotten: demo@3 is needed by a copy")


def test_who_takes_the_old_qemu_over_finds_its_disks(host):
    latest = host.launched()
    disk, images = host.disk(), host.images
    host.go_on_from(host.generation)
    disks = host.again()
    heads.take_back(host.repository, "demo", latest, host.said.append)
    disks.taken_over(host.repository)
    assert host.repository.latest("demo") == latest
    assert (host.disk(), host.images, host.needed) == (disk, images, 0)
    assert not list(host.local.folder.path.glob("then-*.sock"))


def test_when_the_old_qemu_is_gone_the_next_run_goes_on_from_the_head(host):
    host.launched()
    [old] = host.images
    head = host.go_on_from(host.generation)
    disks = host.again()
    assert disks.superseded(host.repository.latest("demo"))
    disks.settle(host.repository)
    assert disks.pristine(head)
    [image] = host.images  # what the old one wrote was captured
    assert host.disk() == (image, True) and image != old
    disks.promote()
    assert disks.unfilled() == {"one": head.metadata[TOKEN]} and host.needed == 1


def test_an_image_is_not_noted_as_filled_for_the_one_before(host):
    host.go_on_from(host.generation)
    host.disks.promote()
    before = host.disks.unfilled()
    host.disks.begun()
    head = host.go_on_from(host.generation)
    host.disks.note_filled("one", before["one"])
    assert host.disks.unfilled() == {} and host.needed == 1
    host.disks.promote()
    host.disks.note_filled("one", before["one"])
    assert host.disks.unfilled() == {"one": head.metadata[TOKEN]} and host.needed == 1


@pytest.mark.parametrize("before", [True, False])
def test_whoever_waited_for_the_vm_sees_the_disks_that_it_has_by_now(host, before):
    """`perdure run` reads what disks there are, and asks for a passphrase; meanwhile another one goes back and ends."""
    if not before:
        host.go_on_from(host.generation)
    later = Disks(host.local.description, host.local.folder, host.local.state)
    if before:
        host.go_on_from(host.generation)
    host.disks.promote()
    host.disks.begun()
    host.disks.let_go()
    later.look_again()
    later.taken_over(host.repository)
    [image] = host.images
    assert later.description.disks[0].file == image and image.exists()
