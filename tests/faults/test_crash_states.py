"""Every state that a power loss may leave of every operation: what was acknowledged is there, and all of it is whole.

See crash_images for the model. Each distinct image is opened as another host would and as this one with what it
remembers, both with an index that it believes; every generation that is listed is read bit for bit; another generation
is made, what was interrupted (prune, repair) is done again, everything is checked with its data, and nothing half-made
is left lying. Where an operation has very many images, that which comes after reading is done for some of them.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash_images import Blobs, Image, Recorder, crash_images, distinct
from operations import NEW, OPERATIONS, OTHER, Run, contents, prepared
from store_fixtures import PASSPHRASE, Place, add, image

from base.errors import RepositoryMissingError, WrongPassphraseError
from store import format as layout
from store.creation import read_mark
from store.keyring.files import read_key_files
from store.keyring.keys import Keys
from store.keyring.slots import unlock
from store.reader import GenerationReader
from store.records import AttributesBody, GenerationBody, TombstoneBody, decode_record
from store.repository import Repository
from store.upkeep.check import check_repository


def recorded(where: Place, name: str) -> Recorder:
    """The log of one operation, from a repository at rest."""
    recorder = Recorder(where.root, Blobs(where.root.parent / "blobs"))
    OPERATIONS[name](Run(where, recorder))
    recorder.acknowledge((newest(where, "records"), newest(where, "keyring")))
    return recorder


def newest(where: Place, folder: str) -> str:
    return max(each.name for each in (where.path / folder).iterdir() if each.name.isdigit())


@contextmanager
def built(picture: Image, where: Place, blobs: Blobs):
    """The image as a place of its own."""
    with tempfile.TemporaryDirectory(dir=where.root.parent) as root:
        picture.build(Path(root), blobs)
        yield Place.at(Path(root))


def opened(where: Place) -> Keys:
    """By whichever of the credentials that were valid at some time."""
    files = read_key_files(where.path)
    for credential in (OTHER, PASSPHRASE, NEW):
        try:
            return unlock(files, credential)
        except WrongPassphraseError:
            continue
    raise AssertionError("nobody can open it")


def history(where: Place, keys: Keys, records: list[str]) -> dict[str, tuple[str, bool]]:
    """What must be listed, from the records that are visible: (id, protected) by name."""
    found: dict[tuple[bytes, int], tuple[str, str]] = {}
    protected: dict[tuple[bytes, int], bool] = {}
    previous = layout.ZERO_ID
    for sequence, name in enumerate(records, 1):
        record = decode_record(keys, (where.path / "records" / name).read_bytes(), sequence, previous)
        previous, which = record.id, (record.header.vm_id, record.header.number)
        if isinstance(record.body, GenerationBody):
            found[which] = f"{record.body.vm}@{record.header.number}", record.id.hex()
        elif isinstance(record.body, TombstoneBody):
            found.pop(which, None)
        elif isinstance(record.body, AttributesBody):
            protected[which] = record.body.protected
    return {name: (id_, protected.get(which, False)) for which, (name, id_) in found.items()}


def listed(repository: Repository) -> dict[str, tuple[str, bool]]:
    every = [each for vm in repository.vms() for each in repository.generations(vm)]
    return {each.name: (each.id, each.protected) for each in every}


def whole(repository: Repository) -> None:
    """Every generation holds what it must."""
    for name in listed(repository):
        assert read(repository, name) == contents()[name], name


def read(repository: Repository, name: str) -> bytes:
    with GenerationReader(repository, repository.resolve(name)) as reader:
        region = reader.region("ram")
        return reader.read(region, 0, region.root.length)


GO_ON = ("prune", "repair", "key-rotate-rewrite")
"""What is done again after it was interrupted."""
GONE_ON_FROM_MOST = 60
"""Images of one operation from which it goes on; the others are read only."""


def survives(picture: Image, where: Place, blobs: Blobs, name: str, *, goes_on: bool) -> None:
    """`name` of the operation that was interrupted."""
    with built(picture, where, blobs) as crashed:
        keys = opened(crashed)
        records = picture.names("records")
        for acknowledged, _ in picture.acknowledged:
            assert records[-1] >= acknowledged, "a record that was acknowledged is lost"
        expected = history(crashed, keys, records)
        with Repository(crashed.path, keys, crashed.root / "elsewhere") as repository:  # another host
            assert listed(repository) == expected
            whole(repository)
        if not goes_on:
            return
        with Repository(crashed.path, keys, crashed.state) as repository:  # this one, with what it remembers
            assert listed(repository) == expected
            whole(repository)
            data = image(9, 30) + contents()["vm@3"][30 * 4096 :]
            after = add(repository, "vm", {"ram": data}, repository.resolve("vm@latest"))
        if name in GO_ON:
            OPERATIONS[name](Run(crashed))
        with Repository(crashed.path, opened(crashed), crashed.state) as repository:
            assert check_repository(repository, read_data=True).findings == []
        with Repository(crashed.path, opened(crashed), crashed.root / "elsewhere") as repository:
            assert listed(repository) == expected | {after.name: (after.id, False)}
            assert read(repository, after.name) == data
        assert not [each for each in (crashed.path / "packs").iterdir() if each.name.startswith(".")]


def test_a_power_loss_while_a_repository_is_made():
    with prepared() as where:
        recorder = Recorder(where.root, Blobs(where.root.parent / "blobs"))
        OPERATIONS["init"](Run(where, recorder))
        recorder.acknowledge()
        _, pictures = distinct(crash_images(recorder))
        made = set()
        for picture in pictures:
            with built(picture, where, recorder.blobs) as crashed:
                crashed.path, crashed.state = crashed.root / "deeper" / "repository", crashed.root / "fresh"
                try:
                    read_mark(crashed.path)
                except RepositoryMissingError:
                    assert not picture.acknowledged
                    made.add(False)
                    continue
                made.add(True)
                with crashed.open() as repository:
                    assert repository.vms() == []
                    add(repository, "vm", {"ram": contents()["vm@1"]})
                    whole(repository)
                    assert check_repository(repository, read_data=True).findings == []
        assert made == {False, True}


@pytest.mark.parametrize("name", [each for each in OPERATIONS if each != "init"])
def test_a_power_loss_at_any_time(name, record_property):
    with prepared() as where:
        recorder = recorded(where, name)
        total, pictures = distinct(crash_images(recorder))
        record_property("crash_states", total)
        record_property("distinct_images", len(pictures))
        newest_ones = {max(each.names(folder)) for each in pictures for folder in ("records", "keyring")}
        assert len(newest_ones) > 2, "with and without what was done"
        every = -(-len(pictures) // GONE_ON_FROM_MOST)
        for at, picture in enumerate(pictures):
            survives(picture, where, recorder.blobs, name, goes_on=at % every == 0)
        print(name, len(recorder.log), total, len(pictures))


class Onlooker(Recorder):
    """Has somebody look, with a memory of his own, whenever a record is visible and not durable yet."""

    def __init__(self, where: Place) -> None:
        super().__init__(where.root, Blobs(where.root.parent / "blobs"))
        self._where, self._looking = where, False
        self.seen: set[tuple[int, int]] = set()

    def fsync_directory(self, path: Path) -> None:
        if path.name in ("records", "keyring") and not self._looking:
            self._looking = True
            with Repository(self._where.path, opened(self._where), self.root / "onlooker", disk=self) as repository:
                self.seen.add((repository.sequence, repository.keys.header.number))
            self._looking = False
        super().fsync_directory(path)


def test_what_somebody_has_seen_is_not_lost_to_a_power_loss():
    """Else his host would say for ever after that history went back, when nobody has changed it."""
    with prepared() as where:
        Repository(where.path, opened(where), where.root / "onlooker").close()
        recorder = Onlooker(where)
        OPERATIONS["key-rotate"](Run(where, recorder))
        assert recorder.seen == {(7, 3), (8, 3)}
        _, pictures = distinct(crash_images(recorder))
        for picture in pictures:
            with built(picture, where, recorder.blobs) as crashed:
                keys = opened(crashed)
                with Repository(crashed.path, keys, crashed.root / "onlooker") as repository:
                    assert listed(repository) == history(crashed, keys, picture.names("records"))
