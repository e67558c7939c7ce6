"""The command line as other programs use it: documents, exit codes, one-line errors."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from store_fixtures import image

from base import locks
from store.catalog import INDEX_FOLDER

PAGE = 4096


def test_import_log_show_diff_export_check(shell):
    data = bytearray(image(1, 60))
    data += bytes(-len(data) % PAGE)
    shell.write("a", data)
    made = shell.json("import", "web", "ram=a", "--tag", "nightly")
    assert set(made) == {
        *(
            "vm",
            "generation",
            "id",
            "region_bytes",
            "dirty_bytes",
            "stored_bytes",
            "pause_ms",
            "seconds",
            "forgotten",
            "full",
            "disks",
            "quiesced",
        ),
    }
    assert (made["vm"], made["generation"], made["region_bytes"], made["pause_ms"]) == ("web", 1, len(data), None)
    assert made["stored_bytes"] > 0
    data[7 * PAGE : 8 * PAGE] = random.Random(1).randbytes(PAGE)
    shell.write("b", data)
    shell.write("ranges.json", json.dumps([[7 * PAGE + 5, 10]]).encode())
    second = shell.json("import", "web", "ram=b", "--parent", "web@1", "--dirty", "ram=ranges.json")
    assert second["dirty_bytes"] == PAGE
    log = shell.json("log", "web")["generations"]
    assert [(each["generation"], each["tags"], each["parent"]) for each in log] == [
        (1, ["nightly"], None),
        (2, [], made["id"]),
    ]
    assert shell.json("log")["generations"] == log
    assert shell.json("show", second["id"][:8])["packs"]
    assert shell.json("diff", "web@1", "web@latest")["regions"] == {
        "ram": {"changed_bytes": PAGE, "ranges": [[7 * PAGE, PAGE]]}
    }
    assert shell("export", "web@-1", "ram", "-").stdout == (shell.root / "a").read_bytes()
    assert shell.json("export", "web@2", "ram", "out")["bytes"] == len(data)
    assert (shell.root / "out").read_bytes() == data
    clean = shell.json("check", "--read-data")
    assert (clean["clean"], clean["findings"], clean["generations"]) == (True, [], 2)


def test_a_repository_has_the_level_and_the_frames_that_it_was_made_with(shell):
    """Packed in one frame with its neighbours or alone, fast or small: what comes out is the same."""
    data = image(2, 200)
    shell.write("a", data)
    sizes = {}
    for name, options in (("small", ["--compression-level", "9", "--frame-size", "256"]), ("fast", ["--frame-size=4"])):
        shell("-r", name, "init", *options)
        sizes[name] = shell.json("-r", name, "import", "vm", "ram=a")["stored_bytes"]
        shell("-r", name, "export", "vm@1", "ram", f"{name}.out", "--sync")
        assert (shell.root / f"{name}.out").read_bytes() == data
    assert sizes["small"] < sizes["fast"]
    for wrong in (["--compression-level", "0"], ["--compression-level=-8"], ["--frame-size", "5000"]):
        shell.error("-r", "other", "init", *wrong, code=2)


def test_exported_holes_stay_holes(shell):
    path = shell.root / "sparse"
    with path.open("wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"x" * PAGE, 32 << 20)
    shell("import", "vm", f"ram={path}")
    shell("export", "vm@1", "ram", "out")
    facts = (shell.root / "out").stat()
    assert facts.st_size == 64 << 20
    assert facts.st_blocks * 512 <= 64 << 10
    assert (shell.root / "out").read_bytes() == path.read_bytes()


@pytest.mark.skipif(not os.access("/dev/loop-control", os.W_OK), reason="no block device can be made here")
@pytest.mark.parametrize("pages", [300, 5000])  # with and without worker processes
def test_a_block_device_is_imported_whole(shell, pages):
    content = random.Random(pages).randbytes(pages * PAGE)
    made = ["losetup", "--find", "--show", shell.write("a", content)]
    device = subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()
    try:
        shell("import", "vm", f"disk={device}")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert shell("export", "vm@1", "disk", "-").stdout == content


def test_only_what_has_a_size_is_imported(shell):
    os.mkfifo(shell.root / "fifo")
    for path in ("/dev/zero", shell.root / "fifo", shell.root):
        said = shell.error("import", "vm", f"disk={path}", code=2)
        assert f"cannot read {path}: it is neither a regular file nor a block device" in said
    assert shell.json("log")["generations"] == []


def test_quiet_says_nothing_and_text_is_for_people(shell):
    shell.write("a", image(2, 9))
    assert shell("import", "vm", "ram=a", "--quiet").stdout == b""
    assert re.match(rb"GENERATION +ID +TIME", shell("log").stdout)
    assert b"vm@1" in shell("show", "vm@latest").stdout


def test_a_lost_index_is_made_again(shell):
    shell.write("a", image(3, 40))
    shell("import", "vm", "ram=a")
    shutil.rmtree(shell.root / "state" / "repositories")
    assert shell("export", "vm@1", "ram", "-").stdout == image(3, 40)
    assert shell("export", "vm@1", "ram", "-", PERDURE_STATE_DIR=str(shell.root / "other host")).stdout == image(3, 40)


def test_wrong_passphrase_and_where_it_comes_from(worded):
    assert "wrong passphrase" in worded.error("log", code=12, PERDURE_PASSWORD="wrong")
    worded.write("file", b"correct horse\n")
    for environment in (
        {"PERDURE_PASSWORD_FILE": str(worded.root / "file")},
        {"PERDURE_PASSWORD_COMMAND": f"cat {worded.root / 'file'}"},
    ):
        assert worded.json("log", PERDURE_PASSWORD=None, **environment) == {"generations": []}
    assert "no passphrase" in worded.error("log", code=12, PERDURE_PASSWORD=None)
    assert "nowhere" in worded.error("log", code=2, PERDURE_PASSWORD=None, PERDURE_PASSWORD_FILE="/nowhere")


def test_no_repository_or_a_foreign_one(bare):
    assert str(bare.repository) in bare.error("log", code=10)
    assert "-r" in bare.error("log", code=10, PERDURE_REPOSITORY=None)
    assert "no repository at /nowhere" in bare.error("-r", "/nowhere", "log", code=10)
    bare.write("file", b"x")
    assert "not an empty folder" in bare.error("init", code=1, PERDURE_REPOSITORY=str(bare.root))
    bare("init")
    assert "already" in bare.error("init", code=1)
    mark = bare.repository / "config"
    whole = mark.read_bytes()
    mark.write_bytes(whole[:8] + b"\x02\x00" + whole[10:])
    assert "upgrade Perdure" in bare.error("log", code=1)
    mark.write_bytes(b"something else altogether........")
    assert "PERDREPO" in bare.error("log", code=1)
    mark.write_bytes(whole[:16] + bytes(16))
    assert "another repository" in bare.error("log", code=1)


def test_mistakes_are_said_in_one_line(shell):
    shell.write("a", image(1, 20))
    shell("import", "vm", "ram=a")
    shell("import", "other", "ram=a")
    shell.write("bad.json", b"[[1,2,3]]")
    shell.write("far.json", b"[[1000000, 1]]")
    shell.write("ranges.json", b"[]")
    for words, code, said in (
        (("import", "vm", "ram"), 2, "REGION=FILE"),
        (("import", "vm", "ram=a", "ram=a"), 2, "twice"),
        (("import", "../vm", "ram=a"), 2, "VM name"),
        (("import", "vm", "ram=nowhere"), 2, "nowhere"),
        (("import", "vm", "ram=a", "--dirty", "ram=ranges.json"), 2, "--parent"),
        (("import", "vm", "ram=a", "--parent", "vm@1", "--dirty", "ram=bad.json"), 2, "bad.json"),
        (("import", "vm", "ram=a", "--parent", "vm@1", "--dirty", "ram=far.json"), 2, "past"),
        (("import", "vm", "ram=a", "--parent", "vm@1", "--dirty", "disk=ranges.json"), 2, "disk"),
        (("import", "vm", "ram=a", "--parent", "other@1"), 2, "VM other"),
        (("import", "vm", "ram=a", "--parent", "vm@9"), 1, "vm@9"),
        (("export", "vm@1", "disk", "out"), 1, "ram"),
        (("export", "vm@1", "ram", "a"), 1, "exists"),
        (("export", "vm@1", "ram", "/nowhere/out"), 1, "/nowhere/out"),
        (("log", "nobody"), 1, "nobody"),
        (("show", "vm@7"), 1, "newest is vm@1"),
        (("show", "vm@x"), 2, "VM@7"),
        (("status", "vm"), 1, "not running"),
        (("snapshot", "vm"), 1, "perdure run"),
        (("rollback", "abcdef"), 2, "VM@N"),
        (("run", "nowhere.toml"), 2, "nowhere.toml"),
    ):
        assert said in shell.error(*words, code=code), words
    assert [each["generation"] for each in shell.json("log", "vm")["generations"]] == [1]


def test_usage_errors_have_exit_code_2(shell):
    for words in ((), ("nonsense",), ("import",), ("log", "--nonsense")):
        done = shell(*words, code=2)
        assert b"usage" in done.stderr


def test_check_finds_damage_with_exit_code_3(shell):
    shell.write("a", image(5, 80))
    pack = shell.json("show", shell.json("import", "vm", "ram=a")["id"])["packs"][0]
    path = shell.repository / "packs" / pack
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    assert shell.json("check")["clean"]
    (finding,) = shell.json("check", "--read-data", code=3)["findings"]
    assert finding["object"] == f"packs/{pack}"
    assert finding["offset"] == 64
    assert finding["generations"] == ["vm@1"]
    text = shell("check", "--read-data", code=3).stdout.decode()
    assert f"packs/{pack} at offset 64" in text and "vm@1" in text
    assert pack in shell.error("export", "vm@1", "ram", "out", code=1)
    assert not (shell.root / "out").exists()
    record = shell.repository / "records" / "000000000002"
    record.write_bytes(b"PERDRECD" + bytes(300))
    assert shell.json("check", code=3)["findings"]


def test_a_full_disk_leaves_nothing_half_made(bare):
    """A small tmpfs as the repository's file system."""
    bare.repository.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", bare.repository], check=True)
    try:
        bare("init", PERDURE_REPOSITORY=str(bare.repository / "r"))
        where = {"PERDURE_REPOSITORY": str(bare.repository / "r")}
        bare.write("small", image(1, 50))
        bare("import", "vm", "ram=small", **where)
        bare.write("large", random.Random(1).randbytes(8 << 20))
        assert "o space left" in bare.error("import", "vm", "ram=large", code=1, **where)
        assert [each["generation"] for each in bare.json("log", **where)["generations"]] == [1]
        assert bare.json("check", "--read-data", **where)["clean"]
        bare("import", "vm", "ram=small", **where)
        assert bare("export", "vm@2", "ram", "-", **where).stdout == image(1, 50)
    finally:
        subprocess.run(["umount", bare.repository], check=True)


def test_an_interrupted_import_exits_130(shell):
    """SIGINT when packs are there and nothing is committed, since somebody else writes: nothing is left of it."""
    shell.json("log")  # makes the index
    (index,) = (shell.root / "state" / "repositories").glob(f"*/{INDEX_FOLDER}")
    shell.write("big", os.urandom(96 << 20))
    packs = shell.repository / "packs"
    with locks.held(index / "writing", "holding on", 0):
        process = subprocess.Popen(
            [sys.executable, "-m", "perdure", "import", "vm", "ram=big", "--lock-wait", "600"],
            cwd=shell.root,
            env=shell.environment,
            stderr=subprocess.PIPE,
        )
        while not any(packs.iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert process.stderr is not None
    assert process.stderr.read().decode().splitlines() == ["perdure: interrupted"]
    assert shell.json("log") == {"generations": []}
    assert not list(packs.iterdir())
