"""A process that dies, or is refused, at any step of a change of keys: the repository opens with the old or the new."""

import os
import tempfile
from pathlib import Path

import pytest
from store_fixtures import CHEAP, PASSPHRASE, add, content, image, place
from test_crash import CountingDisk, die, fail, in_child

from base.errors import StorageError, WrongPassphraseError
from store.creation import read_mark
from store.keyring.files import read_key_files
from store.keyring.keychain import Keychain
from store.keyring.slots import NewSlot, unlock

OTHER, NEW = b"another slot", b"the new one"


def keychain(where, credential=PASSPHRASE, **options):
    state = Path(tempfile.mkdtemp(dir=where.root))  # what this host remembers is another test's concern
    return Keychain(where.path, read_mark(where.path), credential, state, **options)


def opens(where, credential) -> bool:
    try:
        unlock(read_key_files(where.path), credential)
    except WrongPassphraseError:
        return False
    return True


def slot(credential):
    return NewSlot(credential, "", CHEAP)


CHANGES = {
    "add": lambda chain: chain.change(add=slot(NEW)),
    "remove": lambda chain: chain.change(remove=[chain.keys.slot_id]),
    "change-passphrase": lambda chain: chain.change(add=slot(NEW), remove=[chain.keys.slot_id]),
    "rotate": lambda chain: chain.change(add=slot(PASSPHRASE), remove=[chain.keys.slot_id], rotate=True),
}
OPENS = {  # (the passphrase, the new one) before and after; the slot of somebody else always
    "add": ((True, False), (True, True)),
    "remove": ((True, False), (False, False)),
    "change-passphrase": ((True, False), (False, True)),
    "rotate": ((True, False), (True, False)),
}


def prepared(where):
    with keychain(where) as chain:
        chain.change(add=slot(OTHER))
    with where.open() as repository:
        add(repository, "vm", {"ram": image(1, 20)})


def steps_of(name) -> int:
    with place() as where:
        prepared(where)
        disk = CountingDisk(-1, die)
        with keychain(where, disk=disk) as chain:
            CHANGES[name](chain)
        assert {"fsync", "link", "fsync directory", "unlink"} <= set(disk.seen)
        return len(disk.seen)


def check_everything(where, name) -> bool:
    """Who can open it, that it can be read and written, and that the next change leaves no trace of this one.

    Gives whether the change was made.
    """
    assert opens(where, OTHER)
    who = opens(where, PASSPHRASE), opens(where, NEW)
    assert who in OPENS[name]
    files = read_key_files(where.path)
    keys = unlock(files, OTHER)
    named = {f"keys/{each.slot_id.hex()}" for each in keys.header.slots}
    assert named <= files.keys(), "a slot that the keyring names is missing"
    with keychain(where, OTHER) as chain:
        chain.change(add=slot(b"next"))
    files = read_key_files(where.path)
    named = {f"keys/{each.slot_id.hex()}" for each in unlock(files, b"next").header.slots}
    assert {f"{each.parent.name}/{each.name}" for each in (where.path / "keys").iterdir()} == named
    assert all(each.name.isdigit() for each in (where.path / "keyring").iterdir())
    return keys.header.number == 3


def check_content(where):
    from store.repository import Repository

    state = Path(tempfile.mkdtemp(dir=where.root))
    with Repository(where.path, unlock(read_key_files(where.path), OTHER), state) as repository:
        second = add(repository, "vm", {"ram": image(2, 20)}, repository.resolve("vm@latest"))
        assert second.number == 2
        assert content(repository, repository.resolve("vm@1"), "ram") == image(1, 20)
        assert content(repository, second, "ram") == image(2, 20)


@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_every_step(name):
    outcomes = []
    for step in range(1, steps_of(name) + 1):
        with place() as where:
            prepared(where)

            def work(step=step, where=where):
                with keychain(where, disk=CountingDisk(step, die)) as chain:
                    CHANGES[name](chain)

            assert os.WIFSIGNALED(in_child(work)), step
            outcomes.append(check_everything(where, name))
            check_content(where)
    assert outcomes == sorted(outcomes), "once it is made, it stays made"
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("name", CHANGES)
def test_an_error_at_every_step(name):
    for step in range(1, steps_of(name) + 1):
        with place() as where:
            prepared(where)
            disk = CountingDisk(step, fail)
            with pytest.raises(StorageError) as caught, keychain(where, disk=disk) as chain:
                CHANGES[name](chain)
            assert len(str(caught.value).splitlines()) == 1
            files = read_key_files(where.path)
            keys = unlock(files, OTHER)
            slots = {each for each in files if each.startswith("keys/")}
            if keys.header.number == 2:  # it was not made: nothing of it is left
                assert slots == {f"keys/{each.slot_id.hex()}" for each in keys.header.slots}
            else:
                assert "keys were changed" in str(caught.value)
            check_everything(where, name)
            check_content(where)
