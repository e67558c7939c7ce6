"""A second reader, which shares no code with the store: what docs/FORMAT.md says is what repositories are.

`tests/minimal_reader.py` was written from the document alone. Here Perdure writes and the other reads, bit for bit; and
no byte that it reads can be changed without its noticing.
"""

import ast
import getpass
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import minimal_reader
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from minimal_reader import Generation, Reader, Refused, read_keyring, verify_history
from store_fixtures import CHEAP, PASSPHRASE, Place, add, image, memory_file, place, read_key_files

from base import extents as ranges
from store.chunker import PackingSettings
from store.creation import create
from store.keyring.keys import Keys
from store.keyring.slots import KeyFile, NewSlot, change, list_slots, new_keyring, unlock
from store.packs import PackWriter
from store.records import Body, GenerationBody, HurtGeneration, RegionBody, TombstoneBody, encode_record
from store.retention.policy import Policy
from store.storage import LocalStorage

SMALL_PACKS = PackingSettings(pack_bytes=1 << 16, frame_bytes=1 << 14)
OTHER = b"another passphrase"


def exported(reader: Reader, generation: Generation, name: str) -> bytes:
    with tempfile.TemporaryFile("w+b", dir="/dev/shm") as file:
        reader.export(generation, name, file)
        file.seek(0)
        return file.read()


def regions(generation: Generation) -> list[dict]:
    return generation.body["regions"]


def everything(path: Path, passphrase: bytes = PASSPHRASE) -> dict[tuple[str, int, str], bytes]:
    """All that the reader finds: content by VM, number and region."""
    reader = Reader(path, passphrase)
    return {
        (generation.vm, generation.number, region["name"]): exported(reader, generation, region["name"])
        for generation in reader.generations
        for region in regions(generation)
    }


def rotate(where: Place, passphrase: bytes = PASSPHRASE, **wanted) -> None:
    """The next keyring, its files put and deleted as `change` says."""
    files = read_key_files(where.path)
    changed = change(files, unlock(files, passphrase), **wanted)
    for name, data in changed.put.items():
        (where.path / name).write_bytes(data)
    for name in changed.delete:
        (where.path / name).unlink()


def test_it_shares_no_code():
    found = set()
    for node in ast.walk(ast.parse(Path(minimal_reader.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"cryptography", "blake3", "zstandard"}


def test_generations_of_several_vms():
    """Deduplicated within and between VMs, in many packs; changed, forgotten, protected, forgotten twice."""
    with place(SMALL_PACKS) as where:
        first, small = image(1, 400), image(2, 37)
        changed = bytearray(first)
        changed[50 * 4096 : 90 * 4096] = image(3, 41)[: 40 * 4096]
        dirty = {"ram": ranges.normalise([(50 * 4096, 90 * 4096)])}
        with where.open() as repository, where.elsewhere() as elsewhere:
            one = add(repository, "one", {"ram": first, "pm0": small})
            add(repository, "two", {"ram": small + first, "none": b"", "zero": bytes(40000)})
            two = add(repository, "one", {"ram": bytes(changed)}, parent=one, dirty=dirty)
            elsewhere.refresh()
            again = add(elsewhere, "one", {"ram": first[:-5000]}, parent=one)  # what only one@1 has goes on to be used
            repository.refresh()
            assert again.parent == one.id
            repository.protect(two, protected=True)
            repository.forget(one)
            repository.forget(one)  # as two hosts may at the same time
            repository.protect(one, protected=True)
            repository.set_policy("one", Policy(last=3))
            for which in (two, again):  # the last such record counts
                repository.mark_hurt([HurtGeneration(vm_id=which.vm_id, number=which.number, regions={"ram": 4096})])
            known = {each.id: each for vm in ("one", "two") for each in repository.generations(vm)}
        assert len(os.listdir(where.path / "packs")) > 8

        reader = Reader(where.path, PASSPHRASE)
        assert [(each.vm, each.number, each.protected) for each in reader.generations] == [
            ("two", 1, False),
            ("one", 2, True),
            ("one", 3, False),
        ]
        assert [each.hurt for each in reader.generations] == [(), (), ("ram",)]
        for each in reader.generations:
            written = known[each.id.hex()]
            assert (each.vm, each.number, each.body["time"]) == (written.vm, written.number, written.time)
            assert [region["name"] for region in regions(each)] == list(written.regions)
            assert tuple(each.body["packs"]) == written.packs
        records = [record for record in reader.records if record.kind == minimal_reader.GENERATION]
        assert [record.parent.hex() for record in records] == ["0" * 64, "0" * 64, one.id, one.id]
        assert everything(where.path) == {
            ("two", 1, "ram"): small + first,
            ("two", 1, "none"): b"",
            ("two", 1, "zero"): bytes(40000),
            ("one", 2, "ram"): bytes(changed),
            ("one", 3, "ram"): first[:-5000],
        }


@pytest.mark.parametrize("chunk", [512, 1000, 4096, 65536, 1 << 20])
@pytest.mark.parametrize("pages", [1, 100, 700])
def test_chunk_sizes_and_lengths(chunk, pages):
    """Lengths that are no multiple of the chunk size, of one chunk, and of one chunk and a byte."""
    data = image(chunk + pages, pages) + b"tail"
    contents = {"odd": data, "one": data[:chunk], "more": data[: chunk + 1], "last": bytes(len(data)) + b"!"}
    with place(SMALL_PACKS) as where:
        with where.open() as repository, repository.writer("vm") as writer:
            for name, content in contents.items():
                draft = writer.region(name, "image", len(content), chunk_size=chunk)
                with memory_file(content) as descriptor:
                    writer.replace(draft, descriptor)
            writer.commit("import")
        assert everything(where.path) == {("vm", 1, name): content for name, content in contents.items()}


def test_a_sparse_terabyte():
    """Costs what is in it; what is zero is a hole in the export too."""
    length = (1 << 40) + 4711
    pieces = {5 * 4096: b"first" * 1000, 1 << 39: b"middle", length - 4: b"last"}
    with (
        place() as where,
        tempfile.TemporaryFile(dir="/dev/shm") as file,
        tempfile.TemporaryFile("w+b", dir="/dev/shm") as out,
    ):
        os.ftruncate(file.fileno(), length)
        for at, piece in pieces.items():
            os.pwrite(file.fileno(), piece, at)
        with where.open() as repository, repository.writer("vm") as writer:
            writer.replace(writer.region("ram", "image", length), file.fileno())
            writer.commit("import")
        reader = Reader(where.path, PASSPHRASE)
        reader.export(reader.generations[0], "ram", out)
        out.flush()
        assert os.fstat(out.fileno()).st_size == length
        resident = ranges.resident(out.fileno(), length)
        assert ranges.total(resident) <= 5 * 4096
        assert {(start, os.pread(out.fileno(), end - start, start)) for start, end in resident.tolist()} == {
            (start, os.pread(file.fileno(), end - start, start))
            for start, end in ranges.resident(file.fileno(), length).tolist()
        }
        for at, piece in pieces.items():
            assert os.pread(out.fileno(), len(piece), at) == piece


def test_the_same_chunks_in_two_packs():
    """Two hosts that do not know of each other's packs yet write the same: either copy will do."""
    data = image(4, 60)
    with place() as where:
        with where.open() as one, where.elsewhere() as two, one.writer("one") as writing:
            draft = writing.region("ram", "image", len(data))
            with memory_file(data) as descriptor:
                writing.replace(draft, descriptor)
            add(two, "two", {"ram": data})
            writing.commit("import")
        sizes = [path.stat().st_size for path in (where.path / "packs").iterdir()]
        assert len(sizes) == 4
        assert everything(where.path) == {("two", 1, "ram"): data, ("one", 1, "ram"): data}


def test_packs_without_a_record_do_not_matter():
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(5, 9)})
        (where.path / "packs" / ("ab" * 16)).write_bytes(b"left by a commit that never was")
        (where.path / "packs" / ".writing-1").write_bytes(b"being written")
        (where.path / "records" / ".writing-2").write_bytes(b"being written")
        assert everything(where.path) == {("vm", 1, "ram"): image(5, 9)}


@pytest.fixture(scope="module")
def rotated() -> Iterator[Place]:
    """Written under three epochs and two signing keys; three slots, one of a key file, and one that was removed."""
    with place(SMALL_PACKS) as where:
        for seed, wanted in enumerate(
            (
                {"new_epoch": True},
                {"add": NewSlot(OTHER, "another", CHEAP), "new_signing_key": True},
                {"add": NewSlot(KeyFile(b"k" * 40), "host", CHEAP)},
                {"add": NewSlot(b"gone", "gone", CHEAP)},
            )
        ):
            with where.open() as repository:
                add(repository, f"vm{seed % 2}", {"ram": image(seed, 40), "pm0": image(0, 30)})
            rotate(where, **wanted)
        gone = next(each for each in list_slots(read_key_files(where.path)) if each.header.label == "gone")
        rotate(where, remove=[gone.slot_id])
        with where.open() as repository:
            add(repository, "vm0", {"ram": image(9, 40)})
        yield where


@contextmanager
def copied(where: Place) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(where.path, Path(folder) / "copy"))


def test_rotated_keyrings(rotated):
    wanted = {(f"vm{seed % 2}", seed // 2 + 1, "ram"): image(seed, 40) for seed in range(4)}
    wanted |= {(f"vm{seed % 2}", seed // 2 + 1, "pm0"): image(0, 30) for seed in range(4)}
    wanted["vm0", 3, "ram"] = image(9, 40)
    for credential in (PASSPHRASE, OTHER, b"k" * 40):
        assert everything(rotated.path, credential) == wanted
    reader = Reader(rotated.path, PASSPHRASE)
    assert len({record.epoch for record in reader.records}) == 3
    assert len(read_keyring(rotated.path).signers) == 2
    with copied(rotated) as path:
        for number in range(1, 6):  # those before the last are not needed to read
            (path / f"keyring/{number:08}").unlink()
        for slot in list_slots(read_key_files(path)):  # and no slot but one's own is
            if slot.header.label == "another":
                (path / "keys" / slot.slot_id.hex()).unlink()
        assert everything(path) == wanted


@pytest.mark.parametrize("passphrase", [b"wrong", b"gone", b""])
def test_wrong_passphrases(rotated, passphrase):
    with pytest.raises(Refused, match="no key slot opens"):
        Reader(rotated.path, passphrase)


def test_history_needs_one_public_key_only(rotated):
    with copied(rotated) as path:
        for folder in ("keys", "packs"):
            shutil.rmtree(path / folder)
        signers = [key for _, key in read_keyring(path).signers]
        for trusted in signers:
            assert [record.sequence for record in verify_history(path, trusted)] == list(range(1, 7))
        with pytest.raises(Refused, match="trusted key"):
            verify_history(path, bytes(32))
        record = path / "records/000000000004"
        data = bytearray(record.read_bytes())
        data[200] ^= 1
        record.write_bytes(data)
        with pytest.raises(Refused, match="000000000004: its signature"):
            verify_history(path, signers[0])


def flips(size: int) -> Iterator[int]:
    """Offsets: every one in the first 64 and the last 16 bytes of a file, of the rest some eighty."""
    yield from range(min(64, size))
    yield from range(64, size - 16, max(5, size // 80))
    yield from range(max(64, size - 16), size)


@pytest.mark.parametrize("folder", [".", "keys", "keyring", "records", "packs"])
def test_a_flipped_bit_is_refused(folder):
    """In any file and anywhere in it, since all of this repository is in use."""
    with place(SMALL_PACKS) as where:
        rotate(where, new_signing_key=True)
        with where.open() as repository:
            parent = add(repository, "vm", {"ram": image(1, 40)})
            add(repository, "vm", {"ram": image(1, 40) + b"more"}, parent=parent)
        whole = everything(where.path)
        assert len(whole) == 2
        files = [path for path in (where.path / folder).iterdir() if path.is_file()]
        assert files
        for path in files:
            data = path.read_bytes()
            for at in flips(len(data)):
                path.unlink()
                path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
                with pytest.raises(Refused):
                    pytest.fail(f"{path.name}: {at} of {len(data)}: {everything(where.path).keys()}")
            for shorter in (0, 5, 15, len(data) // 2, len(data) - 1):
                path.write_bytes(data[:shorter])
                with pytest.raises(Refused):
                    pytest.fail(f"{path.name}: cut to {shorter}: {everything(where.path).keys()}")
            path.write_bytes(data)
        assert everything(where.path) == whole


def append(path: Path, keys: Keys, body: Body | None = None, kind: int = 2, previous: bytes | None = None, **header):
    """One more record, sealed and signed by who holds the keys."""
    files = sorted((path / "records").iterdir())
    body = body or TombstoneBody(time="", host="")
    previous = previous or blake3(files[-1].read_bytes()).digest()
    data = encode_record(keys, kind, len(files) + 1, previous, body, **header)
    (path / f"records/{len(files) + 1:012}").write_bytes(data)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"vm_id": b"v" * 16, "number": 1, "parent": b"p" * 32}, "its parent does not come before it"),
        ({"number": 2}, "uses generation number 2 again"),
        ({"number": 1}, "uses generation number 1 again"),
        ({"number": 3, "previous": b"p" * 32}, "does not follow the one before"),
        ({"kind": 1}, "of kind 1"),
        ({"kind": 9}, "of kind 9"),
    ],
)
def test_records_out_of_order_are_refused(record, why):
    """Signed as they should be all the same."""
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 4)})
            add(repository, "vm", {"ram": image(2, 4)})
        vm = Reader(where.path, PASSPHRASE).records[-1].vm
        append(where.path, unlock(read_key_files(where.path), PASSPHRASE), **{"vm_id": vm, **record})
        with pytest.raises(Refused, match=why):
            everything(where.path)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"content": b"B" * 4096 + bytes(4096)}, "is something else"),
        ({"chunk_size": 8192}, "is something else"),
        ({"length": 4095}, "beyond its end"),
        ({"length": 0}, "beyond its end"),
        ({"height": 14}, "too high"),
        ({"height": 1}, "is something else"),
        ({"root": "ab" * 32}, "is in no pack"),
        ({"codec": 1}, "frame 0: "),
        ({"codec": 2}, "makes no sense"),
        ({"content": b"A" * 4096}, "holds 4096 bytes"),
    ],
)
def test_what_is_sealed_and_wrong_is_refused(changed, why):
    """Whatever a writer did wrong: a pack of two chunks, of which a region has the first."""
    with place() as where:
        keys = unlock(read_key_files(where.path), PASSPHRASE)
        ids = [blake3(each * 4096, key=keys.id_key("chunk")).digest() for each in (b"A", b"C")]
        facts = {"codec": 0, "content": b"A" * 4096 + b"C" * 4096, "length": 4096, "chunk_size": 4096, "height": 0}
        facts |= {"root": ids[0].hex(), **changed}
        pack = PackWriter(LocalStorage(where.path), keys, 1)
        pack.add(facts.pop("codec"), 4096, b"".join(ids), facts.pop("content"))
        listed = pack.close().header.pack_id.hex()
        told = {"time": "", "cause": "", "host": "", "tags": [], "dirty_bytes": 0, "stored_bytes": 0, "pause_ms": None}
        region = RegionBody(**{"name": "ram", "kind": "image", "kept_bytes": 0, **facts})
        body = GenerationBody(**told, vm="vm", regions=(region,), packs=(listed,), metadata={})  # not checked
        append(where.path, keys, body, vm_id=b"v" * 16, number=1)
        if why is None:
            assert everything(where.path) == {("vm", 1, "ram"): b"A" * 4096}
        else:
            with pytest.raises(Refused, match=why):
                everything(where.path)


def test_a_replaced_signing_key_signs_no_more():
    """Who still has it cannot go on after a record of the next epoch, nor make the next keyring."""
    with place() as where:
        stolen, first = unlock(read_key_files(where.path), PASSPHRASE), where.path / "keyring/00000001"
        rotate(where, new_signing_key=True)
        second = (where.path / "keyring/00000002").read_bytes()
        forged = bytearray(first.read_bytes())
        forged[16:24], forged[40:72] = (3).to_bytes(8, "little"), blake3(second).digest()
        forged[-64:] = stolen.sign(bytes(forged[:-64]))
        third = where.path / "keyring/00000003"
        third.write_bytes(forged)
        with pytest.raises(Refused, match="keyring 3: does not go on"):
            verify_history(where.path, stolen.public_key)
        third.unlink()
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 4)})
        append(where.path, stolen, vm_id=b"v" * 16, number=1)
        with pytest.raises(Refused, match="of epoch 1, which is past"):
            everything(where.path)


def test_keyrings_follow_each_other():
    """Another second keyring, as good as the first but not the one that the third follows."""
    with place() as where:
        files = read_key_files(where.path)
        other = change(files, unlock(files, PASSPHRASE), new_epoch=True).put["keyring/00000002"]
        rotate(where, new_epoch=True)
        rotate(where, new_epoch=True)
        (where.path / "keyring/00000002").unlink()
        (where.path / "keyring/00000002").write_bytes(other)
        with pytest.raises(Refused, match="keyring 00000002: not the one that the next follows"):
            everything(where.path)


def test_an_exchanged_slot_is_refused():
    """Whole, as far as its own hash goes."""
    with place() as where:
        (path,) = (where.path / "keys").iterdir()
        data = bytearray(path.read_bytes())
        data[120:124] = b"mine"
        data[276:] = blake3(data[:276]).digest()
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(Refused, match="not the slot that the keyring means"):
            everything(where.path)


def _swap(one: Path, two: Path) -> None:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def _packs(path: Path) -> list[Path]:
    return sorted((path / "packs").iterdir(), key=lambda each: each.stat().st_size)


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (lambda path: (path / "records/000000000003").unlink(), "record 000000000004: 3 is missing"),
        (lambda path: (path / "records/000000000001").unlink(), "1 is missing"),
        (lambda path: _swap(path / "records/000000000002", path / "records/000000000003"), "2 is missing"),
        (lambda path: _swap(*_packs(path)[:2]), "another pack"),
        (lambda path: _packs(path)[-1].unlink(), "is in no pack"),
        (lambda path: _swap(path / "keyring/00000006", path / "keyring/00000005"), "in the place of another"),
        (lambda path: (path / "keyring/00000003").write_bytes(b"PERDKEYS\1\0"), "cut short"),
        (lambda path: [each.unlink() for each in (path / "keys").iterdir()], "no key slot opens"),
        (lambda path: [each.unlink() for each in (path / "records").iterdir()], "no record"),
        (lambda path: [each.unlink() for each in (path / "keyring").iterdir()], "no keyring"),
    ],
)
def test_a_changed_folder_is_refused(rotated, tamper: Callable[[Path], object], why):
    with copied(rotated) as path:
        tamper(path)
        with pytest.raises(Refused, match=why):
            everything(path)


def test_another_repository_is_not_taken_for_this_one(rotated):
    """Not even one that opens with the same passphrase."""
    made = new_keyring(PASSPHRASE, CHEAP)
    with copied(rotated) as path, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        other = Path(folder) / "other"
        create(other, made.files, made.keys, SMALL_PACKS)
        shutil.copy(other / "config", path)
        with pytest.raises(Refused, match="in the place of another"):
            everything(path)
        for name in ("keys", "keyring"):
            shutil.rmtree(path / name)
            shutil.copytree(other / name, path / name)
        with pytest.raises(Refused, match="record 000000000001: its signature is wrong"):
            everything(path)


@pytest.mark.parametrize(
    ("signers", "why"), [(1, "does not follow from a trusted key"), (2, "link: its signature is wrong")]
)
def test_somebody_elses_signing_key_is_not_believed(signers, why):
    """A keyring that is signed rightly, by a key that nobody who is trusted has named."""
    theirs = Ed25519PrivateKey.generate()
    with place() as where:
        if signers == 2:
            rotate(where, new_signing_key=True)
        path = where.path / f"keyring/{signers:08}"
        data = bytearray(path.read_bytes())
        at = 112 + 100 * (signers - 1) + 4
        data[at : at + 32] = theirs.public_key().public_bytes_raw()
        data[-64:] = theirs.sign(bytes(data[:-64]))
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(Refused, match=why):
            everything(where.path)


def test_it_is_a_program(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(getpass, "getpass", lambda _: PASSPHRASE.decode())
    with place() as where:
        with where.open() as repository:
            made = add(repository, "vm", {"ram": image(6, 20)})
        minimal_reader.main(str(where.path))
        assert f"vm@1  {made.time}  {made.id}  ram ({len(image(6, 20))} bytes)" in capsys.readouterr().out
        minimal_reader.main(str(where.path), "vm", "1", "ram", str(tmp_path / "ram"))
        assert (tmp_path / "ram").read_bytes() == image(6, 20)
        for wanted in (("vm", "2", "ram"), ("vm", "1", "rom")):
            with pytest.raises(Refused, match="no "):
                minimal_reader.main(str(where.path), *wanted, str(tmp_path / "none"))
