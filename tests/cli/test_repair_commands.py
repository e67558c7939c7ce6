"""Check and repair as other programs use them: documents, exit codes, one-line errors."""

import asyncio
import os
import random
import shutil
import subprocess
import threading
from contextlib import contextmanager, suppress

import numpy as np
from perdure_shell import KEY
from store_fixtures import image

from base import locks
from base.units import format_size
from perdure.control import serve
from store.chunker import PackingSettings
from store.index.chunks import LOCATION
from store.keyring.files import read_key_files
from store.keyring.slots import KeyFile, unlock
from store.repository import Repository

PAGE = 4096
FRAME = PackingSettings().frame_bytes  # of all that is in these tests, in a pack of its own


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_check_reads_parts_of_the_data(shell):
    for number in range(4):
        shell.write("a", image(number, 100))
        shell("import", "vm", "ram=a")
    total = shell.json("check")["packs"]
    parts = [shell.json("check", "--read-data-subset", f"{part}/3") for part in (1, 2, 3)]
    assert sum(each["read_packs"] for each in parts) == total
    assert all(each["clean"] and each["packs"] == total for each in parts)
    some = shell.json("check", "--read-data-subset", "30%")
    assert 0 < some["read_packs"] < total
    assert 0 < some["read_bytes"] < some["bytes"]
    assert f"{some['read_packs']} of the packs" in shell("check", "--read-data-subset", "30%").stdout.decode()
    assert "no part" in shell.error("check", "--read-data-subset", "4/3", code=2)
    assert "exclude" in shell.error("check", "--read-data-subset", "1/3", "--read-data", code=2)
    assert "exclude" in shell.error("check", "--read-data-subset", "1/3", "--public-key", "x", code=2)


def test_a_missing_pack_is_a_finding_on_any_host_and_hurts_only_who_needs_it(shell):
    shell.write("a", image(1, 100))
    shell.write("b", image(2, 100))
    first = shell.json("import", "vm", "ram=a")["id"]
    shell("import", "vm", "ram=b", "--parent", "vm@1")
    packs = shell.json("show", "vm@2")["packs"]
    assert first
    (shell.repository / "packs" / packs[0]).unlink()
    for state in ("state", "elsewhere"):
        elsewhere = {"PERDURE_STATE_DIR": str(shell.root / state)}
        document = shell.json("check", code=3, **elsewhere)
        (finding,) = document["findings"]
        assert (finding["kind"], finding["object"]) == ("pack", f"packs/{packs[0]}")
        assert (finding["generations"], finding["regions"]) == (["vm@2"], ["ram"])
        assert shell("export", "vm@1", "ram", "-", **elsewhere).stdout == image(1, 100)
        shell.error("export", "vm@2", "ram", "out", code=1, **elsewhere)


def damaged(shell) -> bytes:
    """Two generations of four frames, of which the first has lost its second frame; gives its content."""
    data = random.Random(1).randbytes(4 * FRAME)
    shell.write("a", data)
    shell.write("b", random.Random(2).randbytes(4 * FRAME))
    shell("import", "vm", "ram=a")
    shell("import", "vm", "ram=b")
    path = max((shell.repository / "packs" / each for each in shell.json("show", "vm@1")["packs"]), key=size)
    flip(path, 64 + 4 + int.from_bytes(path.read_bytes()[64:68], "little") + 100)
    return data


def size(path) -> int:
    return path.stat().st_size


def test_repair_marks_what_is_hurt_and_the_rest_can_be_exported(shell):
    data = damaged(shell)
    assert shell.json("check")["clean"]
    (finding,) = shell.json("check", "--read-data", code=3)["findings"]
    assert (finding["kind"], finding["generations"]) == ("frame", ["vm@1"])
    packs = sorted(each.name for each in (shell.repository / "packs").iterdir())
    dry = shell.json("repair", "--dry-run", code=3)
    assert dry["dry_run"]
    assert "would be replaced" in shell("repair", "--dry-run", code=3).stdout.decode()
    assert sorted(each.name for each in (shell.repository / "packs").iterdir()) == packs
    done = shell.json("repair")
    assert set(done) == {
        *("dry_run", "index", "restart", "files", "packs", "hurt", "healed", "impossible"),
        *("put_back_packs", "taken_chunks", "replaced_packs", "copied_bytes"),
    }
    for key in ("packs", "hurt", "healed", "impossible", "index"):
        assert done[key] == dry[key]
    (pack,) = done["packs"]
    assert (pack["action"], pack["lost_frames"], pack["chunks"]) == ("replace", 1, 3 * FRAME // PAGE)
    assert finding["object"] == f"packs/{pack['pack']}"
    assert done["hurt"] == [{"generation": "vm@1", "regions": {"ram": FRAME}}]
    for state in ("state", "elsewhere"):
        here = {"PERDURE_STATE_DIR": str(shell.root / state)}
        checked = shell.json("check", "--read-data", **here)
        assert checked["clean"]
        assert checked["hurt"] == done["hurt"]
        assert [each["hurt"] for each in shell.json("log", **here)["generations"]] == [{"ram": FRAME}, {}]
        assert f"{format_size(FRAME)} lost" in shell("log", **here).stdout.decode()
        assert f"ram: {format_size(FRAME)} were lost" in shell("show", "vm@1", **here).stdout.decode()
        assert "export --partial vm@1 ram" in shell.error("export", "vm@1", "ram", "out", code=1, **here)
        assert not (shell.root / "out").exists()
        assert shell("export", "vm@2", "ram", "-", **here).stdout == (shell.root / "b").read_bytes()
    exported = shell.json("export", "--partial", "vm@1", "ram", "out")
    assert exported["holes"] == [[FRAME, FRAME]]
    assert exported["lost_bytes"] == FRAME
    assert exported["written_bytes"] == 3 * FRAME
    wanted = data[:FRAME] + bytes(FRAME) + data[2 * FRAME :]
    assert (shell.root / "out").read_bytes() == wanted
    streamed = shell("export", "--partial", "vm@1", "ram", "-")
    assert streamed.stdout == wanted
    assert streamed.stderr.decode().splitlines() == [
        f"lost: {format_size(FRAME)} in 1 ranges, which are zeros:",
        f"  {FRAME:#014x}  {format_size(FRAME)}",
    ]
    assert shell.json("export", "--partial", "vm@2", "ram", "out", "--force")["holes"] == []
    assert shell("repair").stdout.decode().splitlines() == [
        f"vm@1 is hurt (ram: {format_size(FRAME)} lost); `perdure export --partial` writes the rest",
        "nothing more can be repaired",
    ]


def test_an_import_with_ranges_of_a_hurt_parent_reads_everything(shell):
    data = bytearray(damaged(shell))
    shell("repair")
    data[:PAGE] = bytes(range(256)) * 16
    shell.write("c", data)
    shell.write("ranges.json", b"[[0, 4096]]")
    done = shell("import", "vm", "ram=c", "--parent", "vm@1", "--dirty", "ram=ranges.json")
    assert "vm@1 has lost something of ram: all of c is read" in done.stderr.decode()
    assert shell("export", "vm@3", "ram", "-").stdout == data
    assert shell("export", "vm@1", "ram", "-").stdout == (shell.root / "a").read_bytes()  # healed by the way
    text = shell("repair").stdout.decode()
    assert "vm@1 is whole again" in text
    assert [each["hurt"] for each in shell.json("log")["generations"]] == [{}, {}, {}]
    assert shell("repair").stdout.decode() == "nothing is damaged\n"


def test_repair_takes_what_is_missing_from_other_repositories(shell):
    data = damaged(shell)
    opens = {"PERDURE_KEY_FILE": None, "PERDURE_PASSWORD": "another one"}
    other = {"PERDURE_REPOSITORY": str(shell.root / "other"), **opens}
    shell("init", **other)
    shell.write("z", bytes(5 * PAGE) + data)
    shell("import", "strange", f"memory={shell.root / 'z'}", **other)
    shell("repair")
    assert shell.error("repair", "--from", "other", code=12)
    assert shell.error("repair", "--from", "nowhere", code=10)
    assert "is the repository itself" in shell.error("repair", "--from", "repository", code=2)
    done = shell.json("repair", "--from", "other", PERDURE_FROM_PASSWORD="another one")
    assert (done["taken_chunks"], done["hurt"], done["healed"]) == (FRAME // PAGE, [], ["vm@1"])
    assert shell("export", "vm@1", "ram", "-").stdout == data
    shutil.copytree(shell.repository, shell.root / "copy")
    for path in (shell.repository / "packs").iterdir():
        flip(path, 100)
    done = shell.json("repair", "--from", "copy")
    assert {each["action"] for each in done["packs"]} == {"put back"}
    assert done["put_back_packs"] == len(done["packs"])
    assert shell.json("check", "--read-data")["clean"]
    assert shell("export", "vm@1", "ram", "-").stdout == data


def test_what_cannot_be_repaired_is_said_with_what_can_be_done(shell):
    shell.write("a", image(1, 10))
    shell("import", "vm", "ram=a")
    shell("import", "vm", "ram=a")
    added = shell.json("key", "add", "--label", "other", "--key-file", shell.write("other key", os.urandom(64)))
    assert added
    slots = sorted((shell.repository / "keys").iterdir(), key=lambda each: each.stat().st_mtime_ns)
    slots[-1].write_bytes(bytes(308))
    record = shell.repository / "records" / "000000000002"
    record.write_bytes(record.read_bytes()[:300] + bytes(20))
    done = shell.json("repair", code=3)
    assert [each["object"] for each in done["impossible"]] == [f"keys/{slots[-1].name}", "records/000000000002"]
    assert "key add" in done["impossible"][0]["advice"]
    assert "--from COPY" in done["impossible"][1]["advice"]
    assert "cannot be repaired: records/" in shell("repair", code=3).stdout.decode()


@contextmanager
def supervising(shell, vm, repository):
    """The control socket of a supervisor."""

    async def status(_arguments, _reporter):
        return {"vm": vm, "repository": str(repository)}

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def inside(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    folder = shell.root / "state" / "run" / vm
    folder.mkdir(mode=0o700, parents=True)
    server = inside(serve(folder / "control.sock", {"status": status}, print))
    try:
        yield
    finally:
        inside(server.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_an_index_that_is_wrong_is_made_anew(shell):
    shell.write("a", image(1, 40))
    identity = shell.json("init", PERDURE_REPOSITORY=str(shell.root / "r"))["id"]
    here = {"PERDURE_REPOSITORY": str(shell.root / "r")}
    shell("import", "vm", "ram=a", **here)
    path, state = shell.root / "r", shell.root / "state" / "repositories" / identity
    keys = unlock(read_key_files(path), KeyFile(KEY))
    with Repository(path, keys, state) as repository, repository.environment.write() as txn:
        wrong = np.zeros(1, LOCATION)
        wrong["pack"] = 1
        repository.index.add(txn, np.ones((1, 32), np.uint8), wrong)
    (finding,) = shell.json("check", code=3, **here)["findings"]
    assert finding["kind"] == "index"
    assert len(shell.json("repair", "--dry-run", code=3, **here)["index"]) == 1
    assert shell.json("check", code=3, **here)["findings"] == [finding]
    with supervising(shell, "mine", path), supervising(shell, "other", shell.repository):
        assert shell.json("repair", "--dry-run", code=3, **here)["restart"] == ["mine"]
        said = shell("repair", **here).stdout.decode()
    assert "made anew" in said
    assert "supervisor of VM mine again, which has the old one: interrupt it, then perdure run" in said
    assert "VM other" not in said
    assert shell.json("check", **here)["clean"]
    assert shell("repair", **here).stdout.decode() == "nothing is damaged\n"


def test_repair_waits_for_a_prune_or_another_repair_and_says_for_whom(shell):
    damaged(shell)
    lock = shell.repository / "leases" / "prune.lock"
    with locks.held(lock, "pruning", 0):
        assert "pruning" in shell.error("repair", code=11)
    shell("repair")


def test_small_files_with_a_flipped_bit_or_from_a_copy_are_made_again_what_they_were(shell):
    for name in "ab":
        shell.write(name, image(ord(name), 10))
        shell("import", "vm", f"ram={name}")
    shell("key", "add", "--label", "other", "--key-file", shell.write("other key", os.urandom(64)))
    small = [
        path
        for folder in ("keys", "keyring", "records")
        for path in sorted((shell.repository / folder).iterdir())
        if not path.name.startswith(".")
    ]
    small.append(shell.repository / "config")
    before = {path: path.read_bytes() for path in small}
    for path in small:
        flip(path, len(before[path]) // 2)
    damaged = {path: path.read_bytes() for path in small}
    dry = shell.json("repair", "--dry-run", code=3)
    assert {path: path.read_bytes() for path in small} == damaged
    done = shell.json("repair")
    assert done["files"] == dry["files"]
    assert {each["object"] for each in done["files"]} == {str(path.relative_to(shell.repository)) for path in small}
    assert {each["how"] for each in done["files"]} == {"one flipped bit", "its content is known"}
    assert {path: path.read_bytes() for path in small} == before
    shutil.copytree(shell.repository, shell.root / "copy")
    for path in small:
        path.write_bytes(bytes(20))
    done = shell.json("repair", "--from", "copy")
    assert len(done["files"]) == len(small)
    assert {path: path.read_bytes() for path in small} == before
    small[-3].unlink()  # a record in the middle
    assert shell.json("repair", "--from", "copy", PERDURE_STATE_DIR=str(shell.root / "new"))["files"] == [
        {"object": "records/000000000002", "problem": "is missing", "how": "from the copy"}
    ]
    assert shell.json("check", "--read-data")["clean"]


def test_repair_works_on_a_full_disk(bare):
    """On a small file system of its own, by the room that was set aside."""
    bare.repository.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", bare.repository], check=True)
    try:
        bare.environment["PERDURE_REPOSITORY"] = str(bare.repository / "r")
        bare("init")
        bare.write("a", random.Random(1).randbytes(4 * FRAME))
        bare("import", "vm", "ram=a")
        path = max((bare.repository / "r" / "packs").iterdir(), key=size)
        flip(path, 200)
        junk = bare.repository / "junk"
        with suppress(OSError), junk.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        done = bare.json("repair")
        assert [each["action"] for each in done["packs"]] == ["replace"]
        assert done["hurt"] == [{"generation": "vm@1", "regions": {"ram": FRAME}}]
        assert bare.json("check", "--read-data")["clean"]
        assert (bare.repository / "r" / "reserve").stat().st_size == 64 << 20
    finally:
        subprocess.run(["umount", bare.repository], check=True)
