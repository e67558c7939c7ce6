"""VM.toml: what is accepted, and for what is not, the file, line and key that the error names."""

from pathlib import Path

import pytest

from base.errors import ConfigurationError
from vm.config import Description, FirmwareFiles, load

GIB = 1 << 30
FULL = """\
# a comment
name = "demo-1"
memory = "512MiB"
cpus = 2
kernel = "files/vmlinuz"
initrd = "files/initrd"
append = "console=ttyS0"
extra = ["-device", "virtio-rng-pci"]
repository = "repo"

[[region]]
name = "pm0"
size = "64M"

[[region]]
name = "pm1"
size = 0x2000000
mode = "fsdax"

[[disk]]
name = "root"
file = "files/root.img"
cache = "none"

[policy]
capture_on_shutdown = false
tracker = "scan"

[hooks]
before_boot = ["./hook", "--now"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    for name in ("vmlinuz", "initrd", "root.img", "code.fd", "vars.fd"):
        (tmp_path / "files" / name).touch()
    return tmp_path


def read(folder: Path, text: str) -> Description:
    path = folder / "vm.toml"
    path.write_bytes(text.encode())
    return load(path, host_memory=8 * GIB)


def test_everything_is_decoded_with_sizes_in_bytes_and_absolute_paths(folder):
    vm = read(folder, FULL)
    assert vm.backing_sizes == {"ram": 512 << 20, "pm0": 64 << 20, "pm1": 32 << 20}
    assert (vm.regions[0].mode, vm.regions[1].mode) == ("devdax", "fsdax")
    assert vm.kernel == folder / "files/vmlinuz"
    assert vm.disks[0].file == folder / "files/root.img"
    assert (vm.disks[0].format, vm.disks[0].cache, vm.disks[0].readonly) == ("raw", "none", False)
    assert vm.repository == str(folder / "repo")
    assert vm.hooks.before_boot == (str(folder / "hook"), "--now")
    assert not vm.policy.capture_on_shutdown and vm.policy.capture_on_reboot
    assert (vm.qemu, vm.machine, vm.accelerator, vm.firmware) == ("qemu-system-x86_64", "q35", "auto", "seabios")


def test_defaults_of_the_smallest_description(folder):
    vm = read(folder, 'name = "a"\nmemory = "64MiB"\n')
    assert vm.regions == vm.disks == vm.extra == vm.hooks.before_boot == ()
    assert (vm.policy.tracker, vm.policy.measurements, vm.policy.capture_on_terminate) == ("auto", "warn", True)


def test_firmware_files_of_the_users_own(folder):
    vm = read(folder, 'name = "a"\nmemory = "64MiB"\n[firmware]\ncode = "files/code.fd"\nvars = "files/vars.fd"\n')
    assert vm.firmware == FirmwareFiles(folder / "files/code.fd", folder / "files/vars.fd")


def swap(old: str, new: str) -> str:
    assert old in FULL
    return FULL.replace(old, new)


WRONG = {
    "unknown key": (swap("cpus = 2", "sockets = 2"), 4, "sockets", "unknown key: known are name, memory"),
    "unknown key, close": (swap("kernel =", "kernal ="), 5, "kernal", "did you mean kernel?"),
    "unknown key in a region": (swap('mode = "fsdax"', 'mod = "fsdax"'), 18, "region[1].mod", "did you mean mode?"),
    "unknown key in policy": (FULL.replace("tracker", "trucker"), 27, "policy.trucker", "did you mean tracker?"),
    "unknown table": (swap("[policy]", "[polizy]"), 25, "polizy", "did you mean policy?"),
    "network": (FULL + '[[network]]\nname = "n"\n', 31, "network", "extra"),
    "wrong type": (swap("cpus = 2", 'cpus = "2"'), 4, "cpus", "must be a whole number, not text"),
    "bool for a number": (swap("cpus = 2", "cpus = true"), 4, "cpus", "must be a whole number, not true or false"),
    "wrong type in a list": (swap('"virtio-rng-pci"', "3"), 8, "extra[1]", "must be text, not a whole number"),
    "table for a list": (swap("[[disk]]", "[disk]"), 20, "disk", "must be a list, not a table"),
    "not a choice": (
        swap('"scan"', '"ptrace"'),
        27,
        "policy.tracker",
        "'ptrace' is not one of auto, scan, userfaultfd",
    ),
    "not a firmware": (swap("cpus = 2", 'firmware = "bios"'), 4, "firmware", "'bios' is not one of seabios, ovmf"),
    "firmware without vars": (FULL + '[firmware]\ncode = "files/code.fd"\n', 31, "firmware.vars", "is missing"),
    "missing": (swap('memory = "512MiB"\n', ""), None, "memory", "is missing"),
    "missing in a region": (swap("size = 0x2000000\n", ""), 15, "region[1].size", "is missing"),
    "not a size": (swap('"64M"', '"64 potatoes"'), 13, "region[0].size", "'64 potatoes' is not a size"),
    "a size that is a list": (swap('"64M"', "[64]"), 13, "region[0].size", "is not a size"),
    "a fraction": (swap('"64M"', "64.5"), 13, "region[0].size", "is not a size"),
    "negative": (swap('"64M"', "-1"), 13, "region[0].size", "-1 is not a size"),
    "unaligned": (swap('"64M"', '"65M"'), 13, "region[0].size", "not a multiple of 2.0 MiB"),
    "too small a region": (swap('"64M"', '"8M"'), 13, "region[0].size", "at least 16.0 MiB"),
    "too large a region": (swap('"64M"', '"64G"'), 13, "region[0].size", "this machine has 8.0 GiB"),
    "too much memory": (swap('"512MiB"', '"9G"'), 3, "memory", "this machine has 8.0 GiB"),
    "same name twice": (swap('"pm1"', '"pm0"'), 16, "region[1].name", "two regions are named pm0"),
    "reserved name": (swap('"pm1"', '"ram"'), 16, "region[1].name", "main memory"),
    "a region's name that is a path": (swap('"pm1"', '"../pm"'), 16, "region[1].name", "not a region's name"),
    "a VM's name that is a path": (swap('"demo-1"', '".."'), 2, "name", "not a VM's name"),
    "too long a name": (swap('"demo-1"', f'"{"n" * 65}"'), 2, "name", "up to 64"),
    "no such file": (swap("files/vmlinuz", "files/nothing"), 5, "kernel", "there is no file"),
    "a disk that is not written": (
        swap('cache = "none"', "capture = true\nreadonly = true"),
        23,
        "disk[0].capture",
        "a disk that the guest cannot write to is not captured",
    ),
    "no such disk": (swap("files/root.img", "root.img"), 22, "disk[0].file", "there is no file"),
    "a folder for a file": (swap("files/initrd", "files"), 6, "initrd", "is a folder"),
    "initrd without a kernel": (swap('kernel = "files/vmlinuz"\n', ""), 5, "initrd", "together with kernel"),
    "no CPUs": (swap("cpus = 2", "cpus = 0"), 4, "cpus", "from 1 to 255"),
    "options in the machine": (swap("cpus = 2", 'machine = "q35,smm=on"'), 4, "machine", "-machine"),
    "an option of ours": (swap('"-device"', '"-daemonize"'), 8, "extra[0]", "set by Perdure itself"),
    "syntax": (swap("cpus = 2", "cpus = "), 4, None, "invalid value"),
    "syntax at the end": (FULL + "[policies", 31, None, "expected ']'"),
    "twice": (swap("cpus = 2", "cpus = 2\ncpus = 3"), 5, None, "cannot overwrite a value"),
}


@pytest.mark.parametrize(("text", "line", "key", "problem"), WRONG.values(), ids=WRONG.keys())
def test_errors_name_file_line_and_key(folder, text, line, key, problem):
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text)
    error = caught.value
    assert (error.file, error.line, error.key) == (str(folder / "vm.toml"), line, key)
    assert problem in error.problem
    assert "\n" not in str(error) and error.exit_code == 2


def test_lines_are_found_in_other_ways_to_write_the_same(folder):
    inline = 'name = "a"\nmemory = "64M"\npolicy.measurements = "what"\n'
    with pytest.raises(ConfigurationError, match=r"line 3: policy\.measurements: 'what' is not one of"):
        read(folder, inline)
    within = 'name = "a"\nmemory = "64M"\nregion = [\n  { name = "pm0", size = "1M" },\n]\n'
    with pytest.raises(ConfigurationError, match=r"line 3: region\[0\]\.size: 1\.0 MiB is too small"):
        read(folder, within)
    quoted = 'name = "a"\nmemory = "64M"\nkernel = "files/vmlinuz"\nappend = """\ncpus = 3\n"""\n"cpus" = 0\n'
    with pytest.raises(ConfigurationError, match="line 7: cpus: must be from 1"):
        read(folder, quoted)


def test_a_file_that_cannot_be_read_or_is_no_text(folder):
    with pytest.raises(ConfigurationError, match=r"missing\.toml: cannot be read: No such file"):
        load(folder / "missing.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(folder)
    (folder / "vm.toml").write_bytes(b'name = "a"\nmemory = "\xff"\n')
    with pytest.raises(ConfigurationError, match="line 2: is not UTF-8 text"):
        load(folder / "vm.toml")


@pytest.mark.parametrize(
    ("lines", "line", "key", "problem"),
    [
        ("[policy]\nrounds_max = 0\n", 4, "policy.rounds_max", "from 1 to"),
        ("[policy]\npause_ms_max = 0\n", 4, "policy.pause_ms_max", "at least 1"),
        ('[policy]\nover_limit = "give-up"\n', 4, "policy.over_limit", "set pause_ms_max"),
        ('[policy]\nover_limit = "stop"\n', 4, "policy.over_limit", "exceed, give-up"),
        ('[policy]\nbackground_bandwidth = "1K"\n', 4, "policy.background_bandwidth", "at least 64.0 KiB"),
        ("[policy]\nbackground_cpu_percent = 0\n", 4, "policy.background_cpu_percent", "from 1 to 100"),
        ("[[schedule]]\nfull = true\n", 3, "schedule[0]", "either `every` or `at`"),
        ('[[schedule]]\nevery = "1h"\nat = "02:00"\n', 3, "schedule[0]", "either `every` or `at`"),
        ('[[schedule]]\nevery = "fortnight"\n', 4, "schedule[0].every", "15m"),
        ('[[schedule]]\nat = "25:00"\n', 4, "schedule[0].at", "hour must be in 0..23"),
        ('[[schedule]]\nat = ["02:00", "Moon 02:00"]\n', 4, "schedule[0].at[1]", "day of the week"),
        ('[[schedule]]\nat = "02:00"\nzone = "Mars/Base"\n', 5, "schedule[0].zone", "Europe/Berlin"),
        ('[[schedule]]\nevery = "1h"\nzone = "UTC"\n', 5, "schedule[0].zone", "at, which is not set"),
        ('[[schedule]]\nevery = "1h"\nfulll = true\n', 5, "schedule[0].fulll", "did you mean full"),
    ],
)
def test_mistakes_in_policy_and_schedules_are_named_with_their_place(folder, lines, line, key, problem):
    with pytest.raises(ConfigurationError, match=problem) as caught:
        read(folder, f'name = "a"\nmemory = "64MiB"\n{lines}')
    assert (caught.value.line, caught.value.key) == (line, key)
