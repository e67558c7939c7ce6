"""Changes of keys in a repository's folder, and what they mean for processes that were started before."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_fixtures import CHEAP, PASSPHRASE, add, content, image, place

from base.disk import Disk
from base.errors import ConflictError, IntegrityError, StorageError, WrongPassphraseError
from store import format as layout
from store.creation import read_mark
from store.history import History
from store.keyring import keychain as keychains
from store.keyring.files import key_files, read_key_files
from store.keyring.keychain import Keychain, left_over
from store.keyring.slots import NewSlot, unlock
from store.repository import Repository
from store.storage import LocalStorage

SECOND, THIRD = b"second", b"third"


def keychain(where, credential=PASSPHRASE, state=None, **options):
    return Keychain(where.path, read_mark(where.path), credential, state or where.state, **options)


def change(where, credential=PASSPHRASE, **what):
    with keychain(where, credential) as chain:
        return chain.change(**what)


def new(credential):
    return NewSlot(credential, "", CHEAP)


def rotate(where, credential=PASSPHRASE):
    with keychain(where, credential) as chain:
        return chain.change(add=new(credential), remove=[chain.keys.slot_id], rotate=True)


def slot_files(where):
    return sorted(each.name for each in (where.path / "keys").iterdir())


def named(where, credential=PASSPHRASE):
    """Slots of the newest keyring, which this credential must open."""
    return sorted(each.slot_id.hex() for each in unlock(read_key_files(where.path), credential).header.slots)


def epoch_of(where, sequence):
    return layout.decode_record((where.path / layout.record_name(sequence)).read_bytes(), "")[0].epoch


@contextmanager
def started(where, credential=PASSPHRASE, state=None, later=None):
    """A process that was started with a credential, and reads it again (`later`) when keys have changed."""
    keys = unlock(read_key_files(where.path), credential)

    def again():
        return unlock(read_key_files(where.path), later or credential)

    with Repository(where.path, keys, state or where.state, unlock=again) as repository:
        yield repository


# Changes.


def test_add_remove_and_rotate():
    with place() as where:
        first = slot_files(where)
        change(where, add=new(SECOND))
        assert slot_files(where) == named(where) == named(where, SECOND)
        change(where, SECOND, remove=[bytes.fromhex(first[0])])
        assert slot_files(where) == named(where, SECOND)
        with pytest.raises(WrongPassphraseError):
            keychain(where)
        with pytest.raises(ConflictError, match="no usable key slot would be left"):
            change(where, SECOND, remove=[bytes.fromhex(slot_files(where)[0])])
        keys = rotate(where, SECOND)
        assert (keys.current_epoch, keys.header.number) == (2, 4)
        assert slot_files(where) == named(where, SECOND)


def test_who_comes_second_leaves_nothing():
    with place() as where, keychain(where) as one, keychain(where) as two, keychain(where) as three:
        one.change(add=new(SECOND))
        for loser, what in ((two, {"add": new(THIRD)}), (three, {"rotate": True})):
            with pytest.raises(ConflictError, match=r"keyring/00000002: keys were changed by somebody else"):
                loser.change(**what)
            assert slot_files(where) == named(where) == named(where, SECOND)
        change(where, add=new(THIRD))
        assert named(where) == named(where, THIRD)


def test_a_change_deletes_what_interrupted_ones_have_left():
    with place() as where:
        change(where, add=new(SECOND))
        (second,) = {*slot_files(where)} - {unlock(read_key_files(where.path), PASSPHRASE).slot_id.hex()}
        whole = (where.path / "keys" / second).read_bytes()
        change(where, remove=[bytes.fromhex(second)])
        for name in (second, ".writing-0", "0" * 16):  # removed; its second name; of an add that was killed
            (where.path / "keys" / name).write_bytes(whole)
        assert left_over(read_key_files(where.path)) == sorted([f"keys/{second}", f"keys/{'0' * 16}"])
        with pytest.raises(WrongPassphraseError):
            keychain(where, SECOND)
        change(where, add=new(THIRD))
        assert slot_files(where) == named(where)


class SweepingDisk(Disk):
    """Somebody sweeps up just after the first file was made, and before it was locked."""

    def __init__(self):
        self.swept = 0

    def create(self, path, mode=0o600):
        descriptor = super().create(path, mode)
        if not self.swept:
            self.swept = LocalStorage(path.parents[1]).remove_leftovers(path.parent.name)
        return descriptor


def test_a_file_that_is_being_made_is_not_swept_up():
    with place() as where:
        disk = SweepingDisk()
        with keychain(where, disk=disk) as chain:
            chain.change(add=new(SECOND))
        assert disk.swept == 1
        assert slot_files(where) == named(where, SECOND)


class FailingDisk(Disk):
    def __init__(self, operation, folder):
        self.failing, self.folder = operation, folder

    def step(self, operation, path):
        if operation == self.failing and f"/{self.folder}" in path and ".writing" not in path:
            raise StorageError(path, f"cannot {operation}: no space left on device", errno=28)


def test_a_failed_change_says_what_became_of_it():
    """Where the keyring is there, but its folder could not be synced, its slots must stay."""
    with place() as where:
        for operation, folder, said in (
            ("link", "keyring/", "no space left"),
            ("fsync directory", "keys", "no space left"),
            ("fsync directory", "keyring", "keys were changed, but a power loss may undo it"),
        ):
            with keychain(where, disk=FailingDisk(operation, folder)) as chain, pytest.raises(StorageError, match=said):
                chain.change(add=new(SECOND))
            assert slot_files(where) == named(where)
        assert named(where) == named(where, SECOND)
        said = "keys were changed, but a removed slot's file is still there"
        failing = FailingDisk("unlink", "keys/")
        with keychain(where, SECOND, disk=failing) as chain, pytest.raises(StorageError, match=said):
            chain.change(remove=[chain.keys.slot_id])
        with pytest.raises(WrongPassphraseError):
            keychain(where, SECOND)
        assert len(slot_files(where)) == 2
        rotate(where)
        assert slot_files(where) == named(where)


def test_where_a_failed_change_cannot_be_looked_at_its_slots_stay():
    """A disk that fails a sync may fail the next read too: that does not say that the keyring is not there."""

    class Sick(FailingDisk):
        def step(self, operation, path):
            try:
                super().step(operation, path)
            except StorageError:
                keyring.rename(aside)
                os.mkfifo(keyring)
                raise

    with place() as where:
        change(where, add=new(THIRD))
        keyring, aside = where.path / "keyring/00000003", where.root / "aside"
        with keychain(where, disk=Sick("fsync directory", "keyring")) as chain, pytest.raises(StorageError):
            chain.change(add=new(SECOND))
        aside.rename(keyring)
        assert slot_files(where) == named(where, SECOND)


def test_outdated_slots_are_those_made_before_the_rotation():
    with place() as where:
        change(where, add=new(SECOND))
        with keychain(where) as chain:
            assert chain.outdated() == ()
            others = [each.slot_id for each in chain.slots() if each.slot_id != chain.keys.slot_id]
            chain.change(add=new(PASSPHRASE), remove=[chain.keys.slot_id], rotate=True)
            assert list(chain.outdated()) == others
        change(where, add=new(THIRD))
        with keychain(where, SECOND) as chain:
            assert list(chain.outdated()) == others
            chain.change(add=new(SECOND), remove=others)
            assert chain.outdated() == ()


def test_keys_that_were_put_back_are_not_carried_on(tmp_path):
    with place() as where:
        keyring = where.path / "keyring/00000002"
        change(where, add=new(SECOND))
        seen = keyring.read_bytes()
        keyring.unlink()
        with pytest.raises(IntegrityError, match="which this host has seen"):
            keychain(where)
        with keychain(where, state=tmp_path) as chain:  # a host that has not seen it goes on without knowing
            chain.change(add=new(THIRD))
        with keychain(where, state=tmp_path) as chain:
            chain.change(add=new(b"fourth"))
        with pytest.raises(IntegrityError, match="keyring/00000002"):
            keychain(where)
        with pytest.raises(IntegrityError, match="keyring/00000002"):
            where.open()
        keyring.write_bytes(seen)
        with pytest.raises(IntegrityError, match="keyring/00000002"):
            where.open()


def test_a_change_by_somebody_else_while_a_command_starts_is_no_step_back(monkeypatch):
    """This host remembers it before the command has looked at its memory."""
    with place() as where:

        def read_and_be_overtaken(storage):
            files = key_files(storage)
            monkeypatch.undo()
            change(where, add=new(SECOND))
            return files

        monkeypatch.setattr(keychains, "key_files", read_and_be_overtaken)
        with keychain(where) as chain, pytest.raises(ConflictError, match="keyring/00000002"):
            chain.change(add=new(THIRD))
        assert slot_files(where) == named(where) == named(where, SECOND)


def test_keys_that_change_while_they_are_read():
    """A rotation between the two listings: the newest keyring names a slot that was not there in the first."""
    with place() as where:

        class Overtaken(LocalStorage):
            def list(self, folder):
                if folder == "keyring":
                    rotate(where)
                return super().list(folder)

        assert unlock(key_files(Overtaken(where.path)), PASSPHRASE).current_epoch == 2


def test_two_processes_share_a_memory(tmp_path):
    """The one that has not seen the newer keyring does not make the host forget it, nor a newer record."""
    path = tmp_path / "history.json"
    one, two = History(path), History(path)
    one.check_keyring(1, b"1" * 32, None)
    one.advance(5, b"5" * 32)
    two.check_keyring(2, b"2" * 32, None)
    two.remember()
    one.advance(6, b"6" * 32)
    three = History(path)
    assert three.check({6: b"6" * 32}.get) is None
    with pytest.raises(IntegrityError):
        three.check_keyring(1, b"1" * 32, None)
    two.advance(5, b"x" * 32)
    assert History(path).check({6: b"6" * 32}.get) is None


# Processes that run while keys change.

_OTHER = """
import sys
from pathlib import Path
from store_fixtures import add, image
from store.keyring.files import read_key_files
from store.repository import Repository
from store.keyring.slots import unlock

path = Path(sys.argv[1])
with Repository(path, unlock(read_key_files(path), sys.argv[3].encode()), Path(sys.argv[2])) as repository:
    add(repository, "vm", {"ram": image(2, 30)}, repository.latest("vm"))
"""


def another_process_writes(where, state, credential=PASSPHRASE):
    """A generation of image(2, 30), as a command makes it: here (the same state, and index) or elsewhere."""
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", _OTHER, where.path, state, credential.decode()]
    subprocess.run(words, check=True, env={"PYTHONPATH": f"{root}:{root / 'tests'}"})


@pytest.mark.parametrize("where_the_other_is", ["here", "elsewhere"])
def test_a_running_process_goes_on_after_a_rotation(where_the_other_is, tmp_path):
    """With the keys that it was started with it can neither read nor follow what others write: it takes the new."""
    with place() as where, started(where) as running:
        first = add(running, "vm", {"ram": image(1, 30)})
        rotate(where)
        another_process_writes(where, where.state if where_the_other_is == "here" else tmp_path)
        third = add(running, "vm", {"ram": image(3, 30)}, first)
        assert (third.number, running.keys.current_epoch) == (3, 2)
        assert [epoch_of(where, sequence) for sequence in (2, 3, 4)] == [1, 2, 2]
        assert content(running, running.resolve("vm@2"), "ram") == image(2, 30)
        with where.elsewhere() as other:
            found = [content(other, each, "ram") for each in other.generations("vm")]
            assert found == [image(seed, 30) for seed in (1, 2, 3)]


@pytest.mark.parametrize("where_the_other_is", ["here", "elsewhere"])
def test_a_running_process_reads_what_others_wrote_after_a_rotation(where_the_other_is, tmp_path):
    with place() as where, started(where) as running:
        rotate(where)
        another_process_writes(where, where.state if where_the_other_is == "here" else tmp_path)
        running.refresh()
        assert content(running, running.latest("vm"), "ram") == image(2, 30)


def test_a_rotation_is_for_what_a_running_process_writes_next():
    with place() as where, started(where) as running:
        rotate(where)
        made = add(running, "vm", {"ram": image(1, 30)})
        assert epoch_of(where, made.sequence) == 2
        for each in made.packs:
            header = layout.decode_pack_header((where.path / "packs" / each).read_bytes()[:64], each)
            assert header.epoch == 2


@pytest.mark.parametrize("where_the_other_is", ["here", "elsewhere"])
def test_a_process_whose_slot_is_gone_writes_until_somebody_has_used_newer_keys(where_the_other_is, tmp_path):
    """It must never write a record that others refuse, not even where the index has nothing left to replay."""
    with place() as where, started(where) as running:
        change(where, add=new(SECOND), remove=[running.keys.slot_id])
        rotate(where, SECOND)
        first = add(running, "vm", {"ram": image(1, 30)})
        assert epoch_of(where, first.sequence) == 1
        another_process_writes(where, where.state if where_the_other_is == "here" else tmp_path, SECOND)
        for _ in range(2):
            with pytest.raises(WrongPassphraseError, match="start it again"):
                add(running, "vm", {"ram": image(3, 30)}, first)
        with started(where, SECOND, tmp_path) as other:
            assert [each.number for each in other.generations("vm")] == [1, 2]
            assert content(other, other.latest("vm"), "ram") == image(2, 30)


def test_a_process_without_a_way_to_unlock_again_writes_nothing_that_others_refuse():
    with place() as where, where.open() as running:
        rotate(where)
        another_process_writes(where, where.state)
        with pytest.raises(IntegrityError, match="is of epoch 2, and the keyring knows none after 1"):
            add(running, "vm", {"ram": image(1, 30)})
        with where.elsewhere() as other:
            assert [each.number for each in other.generations("vm")] == [1]


def test_a_process_whose_passphrase_was_changed_where_it_comes_from():
    with place() as where, started(where, later=SECOND) as running:
        change(where, add=new(SECOND), remove=[running.keys.slot_id])
        rotate(where, SECOND)
        made = add(running, "vm", {"ram": image(1, 30)})
        assert epoch_of(where, made.sequence) == 2


def test_keys_that_change_while_a_process_starts():
    """Unlocked before, opened after: this host has seen a newer keyring than the one that was unlocked."""
    with place() as where:
        keys = unlock(read_key_files(where.path), PASSPHRASE)
        rotate(where)
        with Repository(
            where.path, keys, where.state, unlock=lambda: unlock(read_key_files(where.path), PASSPHRASE)
        ) as repository:
            assert repository.keys.current_epoch == 2
