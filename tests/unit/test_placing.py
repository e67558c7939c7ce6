"""Restoring through worker processes: the same bytes, and errors that leave the workers usable."""

import os
import signal
import tempfile

import pytest
from store_fixtures import CHEAP, PASSPHRASE, add, content, image, memory_file, place

from base.errors import IntegrityError, StorageError, WorkerError
from base.workers import WorkerPool
from store.chunker import PackingSettings
from store.creation import read_mark
from store.holes import Holes
from store.keyring.files import read_key_files
from store.keyring.keychain import Keychain
from store.keyring.slots import NewSlot, unlock
from store.reader import GenerationReader
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.workers import serve

PAGE = 4096
PAGES = 6000
"""Enough that workers do it."""


@pytest.fixture
def stored():
    """A repository with one generation, and the pool that it has."""
    with place() as where, WorkerPool(2, serve) as pool, where.open(pool=pool) as repository:
        repository.folder = where.path
        yield repository, add(repository, "vm", {"ram": image(1, PAGES)}), pool


@pytest.fixture
def empty():
    with memory_file(bytes(PAGES * PAGE)) as descriptor:
        yield descriptor


def restored(repository, generation, descriptor, holes=None, progress=lambda *_: None, at=0):
    with GenerationReader(repository, generation) as reader:
        region = reader.region("ram")
        return reader.restore(region, descriptor, "target", progress, None if holes is None else holes(region), at=at)


def damage(repository, generation):
    """Flip a bit in the first frame of a pack, whose name this gives."""
    name = f"packs/{generation.packs[0]}"
    path = repository.folder / name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    return name


def test_workers_restore_the_same_bytes_at_an_offset(stored, monkeypatch):
    repository, generation, pool = stored
    expected = content(repository, generation, "ram")
    assert expected == image(1, PAGES)
    sent = []
    send = pool.send
    monkeypatch.setattr(pool, "send", lambda worker, message: (sent.append(message[:2]), send(worker, message)))
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        written = restored(repository, generation, file.fileno(), at=3 * PAGE)
        assert os.pread(file.fileno(), len(expected) + PAGE, 3 * PAGE) == expected
        assert not any(os.pread(file.fileno(), 3 * PAGE, 0))
    assert written == sum(any(expected[at : at + PAGE]) for at in range(0, len(expected), PAGE)) * PAGE
    assert sent.count(("placing", "job")) > 3  # it was them


def test_workers_keep_no_descriptor_of_what_they_have_restored(stored, empty):
    repository, generation, pool = stored

    def open_files():
        return [sorted(os.listdir(f"/proc/{process.pid}/fd")) for process in pool._processes]

    before = open_files()
    restored(repository, generation, empty)
    assert open_files() == before
    os.ftruncate(empty, 0)
    os.ftruncate(empty, PAGES * PAGE)
    damage(repository, generation)
    with pytest.raises(IntegrityError):
        restored(repository, generation, empty)
    assert open_files() == before


def test_a_damaged_frame_is_named_and_with_holes_left_out(stored, empty):
    repository, generation, _ = stored
    name = damage(repository, generation)
    with pytest.raises(IntegrityError, match=name):
        restored(repository, generation, empty)
    found = []
    restored(repository, generation, empty, lambda region: found.append(Holes(region.root)) or found[0])
    lost = found[0].extents
    assert len(lost)
    whole = image(1, PAGES)
    got = os.pread(empty, len(whole), 0)
    for at in range(0, len(whole), PAGE):
        inside = any(start <= at < end for start, end in lost.tolist())
        assert got[at : at + PAGE] == (bytes(PAGE) if inside else whole[at : at + PAGE])


def test_a_target_that_cannot_be_written_is_named_and_the_workers_go_on(stored, empty):
    repository, generation, _ = stored
    reading = os.open(f"/proc/self/fd/{empty}", os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match="target"):
            restored(repository, generation, reading)
    finally:
        os.close(reading)
    assert content(repository, generation, "ram") == image(1, PAGES)


def test_a_worker_that_dies_ends_the_restore_and_the_next_one_works(stored, empty):
    repository, generation, pool = stored
    victim = pool._processes[0].pid

    def kill(*_):  # after the first frames
        os.kill(victim, signal.SIGKILL)

    with pytest.raises(WorkerError, match=f"worker process {victim} was killed by signal 9"):
        restored(repository, generation, empty, progress=kill)
    assert content(repository, generation, "ram") == image(1, PAGES)


def test_whoever_gives_up_in_the_middle_leaves_no_worker_that_writes_on(stored, empty):
    repository, generation, pool = stored
    with pytest.raises(KeyboardInterrupt):
        restored(repository, generation, empty, progress=interrupt)
    assert not any(process.is_alive() for process in pool._processes)
    assert content(repository, generation, "ram") == image(1, PAGES)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("partial", [False, True])
def test_packs_that_are_sealed_anew_meanwhile_are_read_with_the_new_keys(empty, partial):
    """Beside `key rotate --rewrite` nothing is lost, and nothing is said to be."""
    with place(PackingSettings(pack_bytes=200_000)) as where, WorkerPool(2, serve) as pool:

        def unlocked():
            return unlock(read_key_files(where.path), PASSPHRASE)

        rewritten = []

        def rotate(*_):  # after the first frames
            if not rewritten:
                with Keychain(where.path, read_mark(where.path), PASSPHRASE, where.state) as chain:
                    new = NewSlot(PASSPHRASE, "", CHEAP)
                    chain.change(add=new, remove=[chain.keys.slot_id], rotate=True)
                with where.elsewhere() as other:
                    settings = PruneSettings(epoch=other.keys.current_epoch, max_rewrite_bytes=None)
                    rewritten.append(prune(other, settings)[1].rewritten_packs)

        with where.open(pool=pool, unlock=unlocked) as repository:
            generation, found = add(repository, "vm", {"ram": image(1, PAGES)}), []
            holes = (lambda region: found.append(Holes(region.root)) or found[0]) if partial else None
            restored(repository, generation, empty, holes, rotate)
            assert rewritten[0] > 20
            assert not any(len(each.extents) for each in found)
            assert os.pread(empty, PAGES * PAGE, 0) == image(1, PAGES).ljust(PAGES * PAGE, b"\0")


def test_a_place_that_holds_another_chunk_is_noticed_by_its_id(stored, empty, monkeypatch):
    """As an index would lead to that is wrong: what is wanted is looked up once more, and never taken for it."""
    repository, generation, _ = stored
    locate, misled = repository.nodes.locate, []

    def mislead(ids):
        found = locate(ids).copy()
        together = found["frame"][1:] == found["frame"][:-1]
        if together.any():
            at = int(together.argmax())
            found["slot"][[at, at + 1]] = found["slot"][[at + 1, at]]
            misled.append(at)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(repository.nodes, "locate", mislead)
        restored(repository, generation, empty)
    assert misled
    assert os.pread(empty, PAGES * PAGE, 0) == image(1, PAGES)
