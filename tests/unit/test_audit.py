"""Audits with nothing but a public key: of damaged, forged and reordered histories, and of keys that were put back."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import CHEAP, PASSPHRASE, Place, add, image, place

from base.errors import IntegrityError, UsageError
from store import format as layout
from store.history import History
from store.keyring.files import read_key_files
from store.keyring.keychain import Keychain
from store.keyring.slots import NewSlot, new_keyring, unlock
from store.records import GenerationBody, TombstoneBody, encode_record
from store.repository import Repository
from store.storage import LocalStorage
from store.upkeep.audit import audit, public_from_pem, public_pem


class Story:
    """A repository with a rotation in the middle: records 2 and 3, a new epoch, records 4 to 6."""

    def __init__(self, where: Place) -> None:
        self.where = where
        self.old = unlock(read_key_files(where.path), PASSPHRASE)
        with where.open() as repository:
            first = add(repository, "vm", {"ram": image(1, 20)})
            add(repository, "vm", {"ram": image(2, 20)}, first)
        self.new = rotate(where)
        with where.open() as repository:
            add(repository, "vm", {"ram": image(3, 20)}, repository.resolve("vm@2"))
            add(repository, "other", {"ram": image(3, 20)})
            repository.forget(repository.resolve("vm@1"))


def rotate(where: Place):
    with Keychain(where.path, where_id(where), PASSPHRASE, where.state) as chain:
        return chain.change(add=NewSlot(PASSPHRASE, "", CHEAP), remove=[chain.keys.slot_id], rotate=True)


def where_id(where: Place) -> bytes:
    return layout.decode_config((where.path / "config").read_bytes(), "config")


@pytest.fixture(scope="module")
def told():
    with place() as where:
        yield Story(where)


@pytest.fixture
def story(told, tmp_path):
    """A copy to be harmed: path, old keys, new keys."""
    return Copy(told, tmp_path / "repository")


class Copy:
    def __init__(self, told: Story, path: Path) -> None:
        shutil.copytree(told.where.path, path)
        self.path, self.old, self.new = path, told.old, told.new

    def audit(self, trusted: bytes | None = None, memory: Path | None = None):
        storage = LocalStorage(self.path)
        try:
            return audit(storage, trusted or self.new.public_key, (lambda _: History(memory)) if memory else None)
        finally:
            storage.close()

    def found(self, **options):
        """(kind, object, problem) of each finding."""
        return [(each.kind, each.object, each.problem) for each in self.audit(**options).findings]

    def record(self, sequence: int) -> Path:
        return self.path / layout.record_name(sequence)

    def data(self, sequence: int) -> bytes:
        return self.record(sequence).read_bytes()

    def append(self, keys, kind=layout.RECORD_TOMBSTONE, previous=None, **more) -> str:
        """A record at the end, right in every way that is not asked to be wrong."""
        last = max(int(each.name) for each in (self.path / "records").iterdir())
        body = TombstoneBody(time="", host="")
        if kind == layout.RECORD_GENERATION:
            facts = dict.fromkeys(("vm", "time", "cause", "host"), "")
            body = GenerationBody(
                **facts, tags=(), regions=(), packs=(), dirty_bytes=0, stored_bytes=0, pause_ms=None, metadata={}
            )
        link = layout.record_id(self.data(last)) if previous is None else previous
        self.record(last + 1).write_bytes(encode_record(keys, kind, last + 1, link, body, **more))
        return layout.record_name(last + 1)


def test_a_whole_history_is_clean_by_either_public_key(story, tmp_path):
    before = {each: each.read_bytes() for each in story.path.rglob("*") if each.is_file()}
    for trusted in (story.old.public_key, story.new.public_key):
        report = story.audit(trusted, tmp_path / "history.json")
        assert report.findings == []
        assert (report.records, report.generations, report.keyring, report.epoch, report.slots) == (6, 4, 2, 2, 1)
        assert report.signing_keys == (story.old.public_key.hex(), story.new.public_key.hex())
        assert report.repository_id == story.new.repository_id.hex()
        assert report.last == layout.record_id(story.data(6)).hex()
    assert {each: each.read_bytes() for each in story.path.rglob("*") if each.is_file()} == before


def test_damage_to_a_record_is_found_there_and_nowhere_else(story):
    for sequence in (1, 3, 6):
        whole = story.data(sequence)
        wrong = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
        wrong += [whole[:length] for length in range(0, len(whole), 29)] + [whole + b"\0"]
        for data in wrong:
            story.record(sequence).write_bytes(data)
            assert [each[:2] for each in story.found()] == [("record", layout.record_name(sequence))]
        story.record(sequence).write_bytes(whole)
    assert story.found() == []


def test_missing_records(story, tmp_path):
    memory = tmp_path / "history.json"
    assert story.found(memory=memory) == []
    whole = {sequence: story.data(sequence) for sequence in range(1, 7)}
    for gone, problem in (
        ((1,), "is missing, though records/000000000002 is there"),
        ((3,), "is missing, though records/000000000004 is there"),
        ((3, 4, 5), "and 2 after it are missing, though records/000000000006 is there"),
    ):
        for sequence in gone:
            story.record(sequence).unlink()
        assert story.found() == [("record", layout.record_name(gone[0]), problem)]
        for sequence in gone:
            story.record(sequence).write_bytes(whole[sequence])
    story.record(6).unlink()
    assert story.found() == [], "nobody can know, who has not seen it"
    ((kind, name, problem),) = story.found(memory=memory)
    assert (kind, name) == ("record", "records/000000000006")
    assert "gone though this host has seen it" in problem
    for sequence in range(1, 6):
        story.record(sequence).unlink()
    assert story.found()[0] == ("record", "records/000000000001", "is missing: there is no history")


def test_reordered_records(story):
    three, four = story.data(3), story.data(4)
    story.record(3).write_bytes(four)
    story.record(4).write_bytes(three)
    assert story.found() == [
        ("record", "records/000000000003", "holds record 4: history was reordered"),
        ("record", "records/000000000004", "holds record 3: history was reordered"),
    ]


def test_a_history_that_leaves_something_out_does_not_fit_together(story):
    """By somebody with all keys of the old epoch: a record signed anew, in another place."""
    name = story.append(story.new, previous=layout.record_id(story.data(5)))
    assert story.found() == [("record", name, "does not follow the record before it: history was changed")]


def test_records_of_keys_that_were_replaced(story):
    name = story.append(story.old)
    assert story.found() == [
        ("record", name, "is of epoch 1 after records of epoch 2: written with keys that were replaced before")
    ]
    with pytest.raises(IntegrityError, match=f"{name}: is of epoch 1 after records of epoch 2"):
        Repository(story.path, story.new, story.path.parent / "state").close()


def test_records_of_nobody(story):
    name = story.append(new_keyring(PASSPHRASE, CHEAP).keys)
    assert story.found() == [("record", name, "its signature is wrong: damaged, or written by somebody else")]
    story.record(7).unlink()
    (story.path / "records" / "000000000007x").write_bytes(b"")
    assert story.found() == [("record", "records/000000000007x", "is no name of a record")]


def test_generations_that_contradict_those_before(story):
    vm_id = layout.decode_record(story.data(4), layout.record_name(4))[0].vm_id
    for more, problem in (
        ({"vm_id": vm_id, "number": 3}, "uses generation number 3 again"),
        ({"vm_id": vm_id, "number": 9, "parent": b"p" * 32}, "its parent generation does not stand before it"),
    ):
        name = story.append(story.new, layout.RECORD_GENERATION, **more)
        assert story.found() == [("record", name, problem)]
        story.record(7).unlink()
    name = story.append(story.new, layout.RECORD_GENESIS)
    assert story.found() == [("record", name, "begins a history in the middle of one")]


def test_a_damaged_parent_is_blamed_and_not_its_child(story):
    story.record(3).write_bytes(story.data(3)[:-1])
    assert [each[1] for each in story.found()] == ["records/000000000003"]


def test_a_public_key_of_another_repository_proves_nothing(story):
    report = story.audit(bytes(range(32)))
    assert [(each.kind, each.object) for each in report.findings] == [("keyring", "keyring/00000002")]
    assert "not signed by a key that is trusted" in report.findings[0].problem
    assert (report.repository_id, report.signing_keys, report.keyring) == (None, (), None)


def test_keyrings_that_are_damaged_missing_or_put_back(story, tmp_path):
    memory = tmp_path / "history.json"
    assert story.found(memory=memory) == []
    first, second = story.path / "keyring/00000001", story.path / "keyring/00000002"
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    assert [each[:2] for each in story.found()] == [("keyring", "keyring/00000001")]
    first.unlink()
    assert [each[:2] for each in story.found()] == [("keyring", "keyring/00000001")]
    first.write_bytes(new_keyring(PASSPHRASE, CHEAP).files["keyring/00000001"])
    ((kind, name, problem),) = story.found()
    assert (kind, name, problem.split(":")[0]) == (
        "keyring", "keyring/00000001", "is not the keyring that the next one follows",
    )  # fmt: skip
    first.write_bytes(whole)
    newest = second.read_bytes()
    second.write_bytes(newest[:200] + bytes([newest[200] ^ 1]) + newest[201:])
    assert [each[:2] for each in story.found()] == [("keyring", "keyring/00000002")]
    second.unlink()  # the old keyring is whole, but there are records that it does not know
    found = story.found(trusted=story.old.public_key)
    assert [name for kind, name, _ in found if kind == "record"] == [layout.record_name(each) for each in (4, 5, 6)]
    assert {kind for kind, _, _ in found} == {"record", "slot"}  # its slot was deleted when keyring 2 was made
    found = story.found(trusted=story.old.public_key, memory=memory)
    assert any(kind == "keyring" and "which this host has seen" in problem for kind, _, problem in found)
    second.write_bytes(newest)
    assert story.found(memory=memory) == []


def test_slots_that_are_not_those_of_the_keyring(story):
    (path,) = (story.path / "keys").iterdir()
    name, whole = f"keys/{path.name}", path.read_bytes()
    for data in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], None):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        assert [each[:2] for each in story.found()] == [("slot", name)]
    path.write_bytes(whole)
    (story.path / "keys" / ("0" * 16)).write_bytes(whole)
    report = story.audit()
    assert report.findings == []
    assert report.left_over == (f"keys/{'0' * 16}",)


def test_the_mark_of_another_repository(story):
    mark = story.path / "config"
    whole = mark.read_bytes()
    for data in (whole[:16] + bytes(16), whole[:12] + b"\1" + whole[13:], whole[:-1], b""):
        mark.write_bytes(data)
        assert [each[:2] for each in story.found()] == [("repository", "config")]
    mark.unlink()
    assert [each[:2] for each in story.found()] == [("repository", "config")]


def test_what_is_put_there_to_keep_an_auditor_busy(story):
    with story.record(999_999_999_999).open("wb") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    found = story.found()
    assert time.monotonic() - began < 5
    assert [each[1] for each in found] == ["records/000000000007", "records/999999999999"]
    assert found[1][2] == "is longer than any record"
    for folder in ("keys", "keyring"):
        with (story.path / folder / ("0" * 16)).open("wb") as file:
            file.truncate(1 << 40)
    assert [each[1] for each in story.found()] == [each[1] for each in found]


def test_an_audit_needs_no_lmdb_and_no_state(story):
    program = (
        "import sys; sys.modules['lmdb'] = None\n"
        "from pathlib import Path; from store.upkeep.audit import audit; from store.storage import LocalStorage\n"
        "print(audit(LocalStorage(Path(sys.argv[1])), bytes.fromhex(sys.argv[2])).findings)"
    )
    words = [sys.executable, "-c", program, str(story.path), story.new.public_key.hex()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("[]\n", "")


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_change_goes_unnoticed_and_none_is_an_error(told, data):
    """Any bytes of any file that the audit covers; it never raises."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Copy(told, Path(folder) / "repository")
        files = sorted(each for each in copy.path.rglob("*") if each.is_file() and each.parent.name != "packs")
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        content = bytearray(whole)
        for at, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
        ):
            content[at] = value
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        path.write_bytes(content)
        name = str(path.relative_to(copy.path))
        found = copy.audit().findings
        assert bool(found) == (content != whole), name
        assert all(each.object == name for each in found)


def test_public_keys_in_files(story):
    pem = public_pem(story.new.public_key)
    assert public_from_pem(f"Perdure repository x\n{pem}".encode(), "file") == story.new.public_key
    other = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA" + "A" * 43 + "=\n-----END PUBLIC KEY-----\n"  # X25519
    for wrong in (b"", b"\xff" * 100, pem.encode()[:60], other.encode(), os.urandom(3000)):
        with pytest.raises(UsageError, match="file holds"):
            public_from_pem(wrong, "file")
