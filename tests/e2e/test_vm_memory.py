"""Backing files: where they may be, that they are private and sparse, and that the address map is QEMU's."""

import asyncio
import os
import stat
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest

from base.errors import ConflictError, NotFoundError, StorageError, VirtualMachineError
from vm.config import Region, Size
from vm.memory import Memory, unencrypted_swaps
from vm.monitor import Monitor

MIB = 1 << 20
SIZES = {"ram": 64 * MIB, "pm0": 16 * MIB}
NOBODY = 65534


def as_nobody(work):
    """Run `work` in a child process without privileges; gives what it returns, or raises AssertionError."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_end, str(work()).encode())
            os._exit(0)
        except BaseException:
            os.write(write_end, traceback.format_exc().encode())
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        text = answer.read()
    assert os.waitpid(pid, 0)[1] == 0, text
    return text


@pytest.fixture
def memory(tmp_path):
    made = Memory.prepare("demo", tmp_path / "memory", SIZES)
    yield made
    made.release()
    assert not made.folder.exists()


def test_files_are_private_sparse_and_in_a_tmpfs_of_their_own(memory, tmp_path):
    assert stat.S_IMODE(memory.folder.stat().st_mode) == 0o700
    assert memory.folder.stat().st_dev != tmp_path.stat().st_dev
    for name, size in SIZES.items():
        facts = memory.files[name].path.stat()
        assert (facts.st_size, facts.st_blocks, stat.S_IMODE(facts.st_mode)) == (size, 0, 0o600)
    [line] = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {memory.folder} " in line]
    options = line.split()[3].split(",")
    assert line.split()[2] == "tmpfs" and {"nosuid", "nodev", "noexec", "mode=700"} <= set(options)
    assert not any(option.startswith("huge=") and option != "huge=never" for option in options)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert ("noswap" in options) == (release >= (6, 4))
    facts = os.statvfs(memory.folder)
    assert facts.f_blocks * facts.f_frsize >= sum(SIZES.values())


def test_memory_that_is_there_is_not_overwritten(memory):
    descriptor = memory.files["pm0"].open()
    os.pwrite(descriptor, b"precious", 4096)
    os.close(descriptor)
    assert Memory.exists(memory.folder)
    with pytest.raises(ConflictError, match="VM demo: the memory of an earlier run is still in"):
        Memory.prepare("demo", memory.folder, SIZES)
    again = Memory.existing("demo", memory.folder, SIZES)
    assert again.files == memory.files
    assert again.files["pm0"].path.read_bytes()[4096:4104] == b"precious"
    with pytest.raises(ConflictError, match=r"region pm0 has 16\.0 MiB of memory from its launch"):
        Memory.existing("demo", memory.folder, SIZES | {"pm0": 32 * MIB})
    with pytest.raises(NotFoundError, match="VM demo has no memory for region pm1"):
        Memory.existing("demo", memory.folder, SIZES | {"pm1": 32 * MIB})


def test_more_than_the_host_has_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(VirtualMachineError, match=r"VM demo needs 8\.0 TiB of memory, and .* available"):
        Memory.prepare("demo", tmp_path / "memory", {"ram": 8 << 40})
    assert not (tmp_path / "memory").exists()


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.ftruncate", fail)
    with pytest.raises(StorageError, match=r"ram\.memory: cannot make: No space left"):
        Memory.prepare("demo", tmp_path / "memory", SIZES)
    assert not (tmp_path / "memory").exists()


def test_what_a_launch_that_was_cut_short_left_is_no_obstacle(tmp_path):
    first = Memory.prepare("demo", tmp_path / "memory", SIZES)
    for file in first.files.values():
        file.path.unlink()
    (first.folder / "regions.json").write_text("{}")
    second = Memory.prepare("demo", tmp_path / "memory", {"ram": 128 * MIB})
    assert sorted(path.name for path in second.folder.iterdir()) == ["ram.memory", "spare"]
    second.release()
    mounts = Path("/proc/mounts").read_text()
    assert str(tmp_path) not in mounts


def test_memory_is_spare_but_while_a_guest_uses_it(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(16, "Device or resource busy")

    made = Memory.prepare("demo", tmp_path / "memory", SIZES)
    assert Memory.is_spare(made.folder)
    made.set_used()
    assert not Memory.is_spare(made.folder)
    with monkeypatch.context() as patch:
        patch.setattr("vm.memory._unmount", fail)
        with pytest.raises(StorageError, match="release the memory of VM demo: Device or resource busy"):
            made.release()
    assert Memory.is_spare(made.folder)
    made.release()
    assert not made.folder.exists()


def test_memory_is_spare_until_the_last_of_it_is_removed(short_folder, monkeypatch):
    os.chown(short_folder, NOBODY, NOBODY)
    unlink, at_each = Path.unlink, []

    def work():
        made = Memory.prepare("demo", short_folder / "memory", SIZES)
        made.set_used()
        (made.folder / "regions.json").write_text("{}")

        def look(path, *words, **options):
            at_each.append(Memory.is_spare(made.folder))
            unlink(path, *words, **options)

        monkeypatch.setattr(Path, "unlink", look)
        made.release()
        return at_each

    assert as_nobody(work) == str([True] * 4)


def test_without_privileges_a_folder_on_tmpfs_will_do(short_folder):
    os.chown(short_folder, NOBODY, NOBODY)

    def work():
        made = Memory.prepare("demo", short_folder / "memory", SIZES)
        assert made.folder.stat().st_dev == short_folder.stat().st_dev
        assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
        assert made.files["ram"].path.stat().st_size == 64 * MIB
        made.release()
        return sorted(short_folder.iterdir())

    assert as_nobody(work) == "[]"


def test_without_privileges_a_folder_on_a_disk_is_refused():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # unlike /tmp, on a disk everywhere
        folder = Path(name)
        os.chown(folder, NOBODY, NOBODY)

        def work():
            with pytest.raises(StorageError, match=r"must be in tmpfs and not on (?!tmpfs)"):
                Memory.prepare("demo", folder / "memory", SIZES)
            return sorted(folder.iterdir())

        assert as_nobody(work) == "[]"


def test_memory_that_replaces_other_needs_room_only_for_what_is_there_at_the_same_time(short_folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=128M,uid={NOBODY}", "none", short_folder], check=True)

    def work():
        old = Memory.prepare("demo", short_folder / "memory", SIZES)
        old.files["ram"].path.write_bytes(bytes([1]) * (60 * MIB))
        for refused in ({}, {"replaces": old, "beside": 70 * MIB}):
            with pytest.raises(VirtualMachineError, match="there is room for"):
                Memory.prepare("demo", short_folder / "memory-2", SIZES, **refused)
        new = Memory.prepare("demo", short_folder / "memory-2", SIZES, replaces=old, beside=50 * MIB)
        return sorted(new.files)

    try:
        assert as_nobody(work) == "['pm0', 'ram']"
    finally:
        subprocess.run(["umount", short_folder], check=True)


def swap(path, kind):
    return f"Filename\tType\tSize\tUsed\tPriority\n{path}\t{kind}\t1000\t0\t-2\n"


def test_which_swap_areas_put_memory_on_a_disk_in_the_clear(tmp_path):
    area = tmp_path / "swapfile"
    area.touch()
    device = area.stat().st_dev
    block = tmp_path / "block" / f"{os.major(device)}:{os.minor(device)}"
    (block / "dm").mkdir(parents=True)
    uuid = block / "dm" / "uuid"
    uuid.write_text("LVM-abc\n")
    assert unencrypted_swaps(swap(area, "file"), tmp_path / "block") == [str(area)]
    (block / "slaves" / "dm-0" / "dm").mkdir(parents=True)
    (block / "slaves" / "dm-0" / "dm" / "uuid").write_text("CRYPT-LUKS2-abc\n")
    assert unencrypted_swaps(swap(area, "file"), tmp_path / "block") == []
    (block / "slaves" / "sda").mkdir()
    assert unencrypted_swaps(swap(area, "file"), tmp_path / "block") == [str(area)]
    uuid.write_text("CRYPT-PLAIN-abc\n")
    assert unencrypted_swaps(swap(area, "file"), tmp_path / "block") == []
    assert unencrypted_swaps(swap(tmp_path / "gone", "file"), tmp_path / "block") == [str(tmp_path / "gone")]
    assert unencrypted_swaps("Filename\tType\n", tmp_path / "block") == []


@pytest.mark.qemu
def test_the_address_map_is_what_qemu_does(place, judge):
    """Enough memory to be split around the hole; QEMU's own dump of an address is the file's content there."""
    regions = (Region("pm0", Size(64 * MIB)), Region("pm1", Size(32 * MIB), "raw"))
    description = place.describe(memory=Size(3072 * MIB), regions=regions)
    places = [("ram", 0x5000), ("ram", 2048 * MIB - 4096), ("ram", 2048 * MIB), ("ram", 3072 * MIB - 4096)]
    places += [("pm0", 0), ("pm0", 64 * MIB - 4096), ("pm1", 0), ("pm1", 32 * MIB - 4096)]

    async def run():
        async with await Monitor.connect(process) as monitor:
            found = await monitor.address_map(3072 * MIB)
            assert len(found.of("ram")) == 2
            assert sorted({span.region for span in found.spans}) == ["pm0", "pm1", "ram"]
            for number, (region, offset) in enumerate(places):
                content = bytes([number + 1]) * 4096
                descriptor = process_memory[region].open()
                os.pwrite(descriptor, content, offset)
                os.close(descriptor)
                address = found.address_of(region, offset)
                assert found.locate(address, 4096) == (region, offset)
                assert await judge(monitor, address, 4096) == content, (region, offset)

    with place.launch(description) as process:
        process_memory = place.memory.files
        asyncio.run(run())
