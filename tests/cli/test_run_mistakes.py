"""Mistakes that `perdure run` finds before a guest begins: one line, the right exit code, and nothing left behind."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from perdure_shell import Shell
from store_fixtures import image

GOOD = """\
name = "vm"
memory = "32MiB"
accelerator = "tcg"
[[region]]
name = "pm0"
size = "16MiB"
"""
MIB = 1 << 20


class Host(Shell):
    """A shell in a folder with a short name in tmpfs, since sockets have short names; knows what a run leaves."""

    def describe(self, text=GOOD, name="vm.toml"):
        return self.write(name, text.encode())

    @property
    def left(self):
        """Memory, mounts and processes of VMs."""
        found = [str(path) for path in self.root.glob("state/run/*/memory*")]
        found += [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
                  if line.split()[4].startswith(f"{self.root}/state")]  # fmt: skip
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{self.root}/state" in words:
                found.append(words.replace("\0", " "))
        return found


@pytest.fixture(scope="module")
def made():
    """With a repository; what tests change, they put back."""
    host = Host(Path(tempfile.mkdtemp(prefix="p-", dir="/dev/shm")))
    host("init")
    yield host
    assert not host.left
    shutil.rmtree(host.root)


@pytest.fixture
def host(made):
    yield made
    assert not made.left


# The description


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('name = "vm"\nmemory = \n', "line 2", "invalid value"),
        ('name = "vm\n', "line 1", "illegal character"),
        ('name = "vm"\nname = "vm"\n', "line 2", "overwrite"),
        ("[[region]\n", "line 1", "]]"),
        (GOOD.replace('"32MiB"', "true"), "line 2: memory", "not a size"),
        (GOOD.replace('"32MiB"', '"32 lightyears"'), "line 2: memory", "not a size"),
        (GOOD.replace('"vm"', "7", 1), "line 1: name", "must be text, not a whole number"),
        (GOOD.replace('"vm"', '"../vm"', 1), "line 1: name", "not a VM's name"),
        ("cpus = 0\n" + GOOD, "line 1: cpus", "from 1 to"),
        (GOOD.replace('"tcg"', '"warp"'), "line 3: accelerator", "not one of auto, kvm, tcg"),
        (GOOD.replace("memory", "memroy"), "line 2: memroy", "did you mean memory?"),
        (GOOD + 'mod = "raw"\n', "line 7: region[0].mod", "did you mean mode?"),
        (GOOD + '[policy]\nmeasurement = "warn"\n', "line 8: policy.measurement", "did you mean measurements?"),
        (GOOD.replace("16MiB", "8MiB"), "line 6: region[0].size", "too small: at least 16.0 MiB"),
        (GOOD.replace("16MiB", "17MiB"), "line 6: region[0].size", "not a multiple of 2.0 MiB"),
        (GOOD + GOOD[GOOD.index("[[") :], "line 8: region[1].name", "two regions are named pm0"),
        (GOOD.replace("pm0", "ram"), "line 5: region[0].name", "main memory"),
        ('kernel = "nowhere"\n' + GOOD, "line 1: kernel", "there is no file"),
        ('kernel = "."\n' + GOOD, "line 1: kernel", "is a folder"),
        ('append = "quiet"\n' + GOOD, "line 1: append", "only used together with kernel"),
        ('extra = ["-m", "1G"]\n' + GOOD, "line 1: extra[0]", "-m is set by Perdure itself"),
        (GOOD.replace("32MiB", "999999GiB"), "line 2: memory", "this machine has"),
        (GOOD.replace("16MiB", "999999GiB"), "line 6: region[0].size", "this machine has"),
        (GOOD.replace('memory = "32MiB"\n', ""), ": memory", "is missing"),
        ("", ": ", "is missing"),
    ],
)
def test_a_wrong_description_is_told_with_file_line_and_key(host, text, place, problem):
    said = host.error("run", host.describe(text), code=2)
    assert f"{host.root}/vm.toml" in said
    assert f"{place}: " in said or (place.startswith(":") and place in said)
    assert problem in said


def test_a_description_that_is_not_text_or_not_there(host):
    host.write("vm.toml", b'name = "vm"\n# \xff\n')
    assert "vm.toml, line 2: is not UTF-8 text" in host.error("run", "vm.toml", code=2)
    assert "nowhere.toml: cannot be read" in host.error("run", "nowhere.toml", code=2)
    assert "Is a directory" in host.error("run", ".", code=2)


def test_memory_that_is_not_free_is_refused_before_anything_is_made(host):
    """More than is free, and less than the machine has."""
    facts = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    most = (facts["MemTotal"] >> 11) * 2 - 64
    host.describe(GOOD.replace("32MiB", f"{most}MiB"))
    assert "are available" in host.error("run", "vm.toml", code=1)


# The repository


def test_no_repository_and_wrong_passphrase(host):
    other = GOOD.replace('"vm"', '"other"')
    host.describe(other)
    there = {"PERDURE_REPOSITORY": None}
    said = host.error("run", "vm.toml", code=10, **there)
    assert "no repository was named for VM other" in said and "-r" in said
    assert "no repository at /nowhere" in host.error("-r", "/nowhere", "run", "vm.toml", code=10, **there)
    host.describe('repository = "missing"\n' + other)
    assert f"no repository at {host.root}/missing" in host.error("run", "vm.toml", code=10, **there)
    host.describe(other)
    assert "wrong passphrase" in host.error("run", "vm.toml", code=12, PERDURE_KEY_FILE=None, PERDURE_PASSWORD="wrong")
    assert not (host.root / "state" / "run" / "other").exists()


def test_an_unknown_point_to_begin_from(host):
    host.write("image", bytes(16 * MIB))
    host("import", "first", "pm0=image")
    host("import", "second", "pm0=image")
    host.describe(GOOD.replace('"vm"', '"first"'))
    for words, code, said in (
        (("--from", "first@9"), 1, "first@9"),
        (("--from", "nobody@1"), 1, "nobody"),
        (("--from", "first@x"), 2, "VM@7"),
        (("--from", "second@1"), 2, "second@1 is a generation of VM second"),
        (("--from", "first@1", "--without-restore"), 2, "exclude each other"),
        (("--from", "first@1"), 1, "first@1 was made by import"),
        ((), 1, "first@1 was made by import"),
    ):
        assert said in host.error("run", "vm.toml", *words, code=code), words
        assert not host.left


# QEMU

FAKE = """\
#!/bin/sh
case "$1" in
-version) echo "QEMU emulator version 99.0"; exit ;;
-machine) echo "Supported machines are:"; echo "q35 Standard PC (alias of pc-q35-99.0)"; exit ;;
esac
{}
"""


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('qemu = "qemu-system-nothing"\n', "there is no program qemu-system-nothing: install QEMU"),
        ('qemu = "./missing"\n', "missing: install QEMU"),
        ('qemu = "/bin/false"\n', "/bin/false -version failed"),
        ('machine = "steam-engine"\n', "has no machine type steam-engine"),
        ('cpu = "abacus"\n', "unable to find CPU model 'abacus'"),
        ('extra = ["-nonsense"]\n', "-nonsense: invalid option"),
        ('extra = ["-device", "nonsense"]\n', "'nonsense' is not a valid device model name"),
        ('extra = ["-drive", "file=/nowhere/disk.img"]\n', "Could not open '/nowhere/disk.img'"),
    ],
)
def test_what_qemu_says_is_shown(host, settings, said):
    host.describe(settings + GOOD)
    assert said in host.error("run", "vm.toml", code=1)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("echo 'fake: no luck' >&2; exit 3", "QEMU ended with status 3: fake: no luck"),
        ("exit 0", "QEMU ended with status 0, and its log"),
        ("kill -SEGV $$", "QEMU was killed by SIGSEGV"),
    ],
)
def test_a_qemu_that_dies_at_start(host, end, said):
    host.write("fake-qemu", FAKE.format(end).encode()).chmod(0o755)
    host.describe('qemu = "./fake-qemu"\n' + GOOD)
    told = host.error("run", "vm.toml", code=1)
    assert said in told
    assert "VM vm: " in told


# The host


@pytest.fixture
def alone():
    """A host of its own, since what it has on the disk is damaged."""
    host = Host(Path(tempfile.mkdtemp(prefix="p-", dir="/dev/shm")))
    yield host
    shutil.rmtree(host.root)


@contextlib.contextmanager
def mounted(folder, options):
    """A tmpfs there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _truncate(index):
    os.truncate(index, index.stat().st_size // 2)


def _overwrite(index):
    index.write_bytes(b"\xff" * index.stat().st_size)


@pytest.mark.parametrize("harm", [_truncate, _overwrite, Path.unlink, lambda index: shutil.rmtree(index.parent)])
def test_an_index_that_is_damaged_or_gone_is_made_again(alone, harm):
    alone("init")
    alone.write("a", image(1, 300))
    alone("import", "vm", "ram=a")
    [index] = alone.root.glob("state/repositories/**/index.lmdb")
    harm(index)
    assert alone("export", "vm@1", "ram", "-").stdout == image(1, 300)
    alone.write("a", image(2, 300))
    assert alone.json("import", "vm", "ram=a", "--parent", "vm@1")["generation"] == 2
    assert alone.json("check", "--read-data")["clean"]


def test_a_state_folder_that_cannot_be_written(alone):
    alone("init")
    alone.describe()
    alone.write("file", b"")
    for state, said in (("/proc/nothing", "cannot make the folder"), (alone.root / "file", "cannot make the folder")):
        for words in (("log",), ("run", "vm.toml"), ("status",)):
            told = alone.error(*words, code=1, PERDURE_STATE_DIR=str(state))
            assert str(state) in told and said in told
    state = alone.root / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(0o700)
    with mounted(state, "ro"):
        for words in (("log",), ("run", "vm.toml"), ("status",)):
            told = alone.error(*words, code=1)
            assert str(state) in told and "Read-only file system" in told


@pytest.mark.parametrize("size", ["8k", "24k"])
def test_a_state_folder_that_is_full(alone, size):
    alone("init")
    alone.write("a", os.urandom(16 * MIB))
    state = alone.root / "state"
    state.mkdir(0o700, exist_ok=True)
    with mounted(state, f"size={size},mode=0700"):
        for words in (("import", "vm", "ram=a"), ("log",)):
            told = alone.error(*words, code=1)
            assert str(state) in told and "disk is full" in told
    assert alone.json("log") == {"generations": []}
    alone("import", "vm", "ram=a")
    assert alone.json("check", "--read-data")["clean"]


def test_a_state_folder_whose_path_is_too_long_for_sockets(alone):
    alone("init")
    alone.describe()
    state = alone.root / ("long" * 25)
    told = alone.error("run", "vm.toml", code=2, PERDURE_STATE_DIR=str(state))
    assert "107" in told and "set PERDURE_STATE_DIR to a shorter path" in told
    assert not list(state.glob("run/*"))
    assert "not running" in alone.error("status", "vm", code=1, PERDURE_STATE_DIR=str(state))


def test_a_repository_on_a_state_folder_of_another_user(alone):
    alone("init")
    state = alone.root / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    os.chown(state, 65534, 65534)
    assert "belongs to another user" in alone.error("log", code=1)
