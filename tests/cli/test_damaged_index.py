"""The index of this host is damaged in every way that a disk can do it: commands answer right, or say so in one line.

Each is a process of its own: a damaged LMDB file can kill its reader.
"""

import json
import os
import random
import shutil

import pytest
from perdure_shell import Shell
from store_fixtures import image

CONTENTS = {1: image(1, 300), 2: image(2, 200)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two repositories with the same VM, made once: the second one's index is put in the place of the first one's."""
    roots = []
    for name in ("one", "two"):
        shell = Shell(tmp_path_factory.mktemp(name))
        shell("init")
        for number, content in CONTENTS.items():
            file = shell.write(f"image-{number}", content if name == "one" else content[::-1])
            shell("import", "vm", f"ram={file}")
        roots.append(shell.root)
    return roots


@pytest.fixture
def shell(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    shell = Shell(tmp_path / "copy")
    shell("log")  # the copy is another inode: this examines it, and marks it as left in order
    return shell


def index(root):
    return next((root / "state").rglob("index.lmdb"))


def unnoticed(path, change):
    """Size, time and inode stay as the index was left: nothing makes a reader suspicious."""
    times = path.stat()
    with path.open("r+b") as file:
        data = bytearray(file.read())
        change(data)
        file.seek(0)
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def truncate(path, _):
    os.truncate(path, path.stat().st_size // 2)


def cut_in_a_page(path, _):
    os.truncate(path, path.stat().st_size - 1000)


def empty(path, _):
    os.truncate(path, 0)


def zero(path, _):
    path.write_bytes(bytes(path.stat().st_size))


def zero_a_page(path, _):
    path.write_bytes(path.read_bytes()[: 5 * 4096] + bytes(4096) + path.read_bytes()[6 * 4096 :])


def another_repository_s(path, other):
    for name in ("index.lmdb", "lock"):
        shutil.copy(index(other).with_name(name), path.with_name(name))


def another_repository_s_entries(path, other):
    """With a marker that fits."""
    shutil.copy(index(other), path)
    facts = json.loads((path.parent / "lock").read_bytes())
    stat = path.stat()
    theirs = json.loads(index(other).with_name("lock").read_bytes())["file"]
    facts["file"] = theirs | {"inode": stat.st_ino, "size": stat.st_size, "modified": stat.st_mtime_ns}
    (path.parent / "lock").write_bytes(json.dumps(facts).encode().ljust(512))


def rubbish_behind_the_head(path, _):
    def change(data):
        data[8192:] = random.Random(1).randbytes(len(data) - 8192)

    unnoticed(path, change)


def bits(path, _):
    def change(data):
        rng = random.Random(2)
        for _ in range(40):
            data[rng.randrange(8192, len(data))] ^= 1 << rng.randrange(8)

    unnoticed(path, change)


@pytest.mark.parametrize(
    "damage",
    [truncate, cut_in_a_page, empty, zero, zero_a_page, another_repository_s, another_repository_s_entries,
     rubbish_behind_the_head, bits],
    ids=lambda each: each.__name__,
)  # fmt: skip
def test_a_damaged_index(shell, made, damage):
    damage(index(shell.root), made[1])
    for number, content in CONTENTS.items():
        target = shell.root / f"out-{number}"
        done = shell.run("export", f"vm@{number}", "ram", target)
        assert done.returncode in (0, 1), done
        if done.returncode:
            assert len(done.stderr.splitlines()) == 1
            assert not target.exists()
        else:
            assert target.read_bytes() == content
