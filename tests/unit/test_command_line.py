"""QEMU's arguments from a description, machine types from its own listing, firmware from descriptors, socket paths."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from base.disk import Disk
from base.errors import StorageError, UsageError, VirtualMachineError
from vm import firmware
from vm.command_line import Platform, command_line
from vm.config import Description, Region, Size
from vm.config import Disk as DiskEntry
from vm.firmware import Firmware
from vm.folder import RuntimeFolder
from vm.memory import BackingFile
from vm.qemu import machine_of

MIB = 1 << 20
LISTING = """\
Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
none                 empty machine
"""


def build(vm: Description, firm: Firmware | None = None, folder: str = "/run/demo") -> list[str]:
    files = {name: BackingFile(name, Path(f"/m,1/{name}"), size) for name, size in vm.backing_sizes.items()}
    platform = Platform(
        binary=Path("/usr/bin/qemu"),
        version="7.2",
        machine="pc-q35-7.2",
        accelerator="tcg",
        cpu="max",
        firmware=firm or Firmware("seabios"),
        variables=Path("/state/vars.fd") if firm else None,
        uuid="u",
    )
    return command_line(vm, platform, RuntimeFolder("demo", Path(folder)), files)


def after(argv: list[str], option: str) -> list[str]:
    return [value for at, value in pairwise(argv) if at == option]


def objects(argv: list[str], option: str) -> list[dict[str, object]]:
    return [json.loads(value) for value in after(argv, option) if value.startswith("{")]


def test_the_guest_starts_paused_and_its_resets_are_held():
    argv = build(Description(name="demo", memory=Size(256 * MIB), cpus=2))
    assert argv[0] == "/usr/bin/qemu" and "-S" in argv and "-nodefaults" in argv and "-no-user-config" in argv
    assert after(argv, "-action") == ["reboot=shutdown,shutdown=pause,panic=pause"]
    assert after(argv, "-machine") == ["pc-q35-7.2,memory-backend=ram,dump-guest-core=off"]
    assert after(argv, "-m") == ["size=268435456b"]
    assert after(argv, "-smp") == ["2"]


def test_memory_is_shared_files_and_regions_are_nvdimms():
    regions = (Region("pm0", Size(64 * MIB)), Region("pm1", Size(32 * MIB)))
    argv = build(Description(name="demo", memory=Size(256 * MIB), regions=regions))
    backends = objects(argv, "-object")
    assert [(each["id"], each["mem-path"], each["size"]) for each in backends] == [
        ("ram", "/m,1/ram", 256 * MIB),
        ("pm0", "/m,1/pm0", 64 * MIB),
        ("pm1", "/m,1/pm1", 32 * MIB),
    ]
    assert all(each["qom-type"] == "memory-backend-file" and each["share"] is True for each in backends)
    nvdimms = [each["memdev"] for each in objects(argv, "-device") if each["driver"] == "nvdimm"]
    assert nvdimms == ["pm0", "pm1"]
    assert after(argv, "-machine")[0].endswith(",nvdimm=on")
    assert after(argv, "-m") == [f"size={256 * MIB}b,slots=2,maxmem={352 * MIB}b"]


def test_disks_kernel_firmware_and_what_the_user_adds():
    disks = (
        DiskEntry("a", Path("/d/a,b"), cache="none"),
        DiskEntry("a-name-of-24-characters-", Path("/d/c"), "qcow2", readonly=True),
    )
    vm = Description(name="demo", memory=Size(256 * MIB), disks=disks, extra=("-nic", "user"))
    argv = build(vm, Firmware("ovmf", Path("/f/code.fd"), Path("/f/vars.fd")))
    assert argv[-2:] == ["-nic", "user"]
    nodes = {each["node-name"]: each for each in objects(argv, "-blockdev")}
    assert all(len(name) <= 31 for name in nodes)
    assert nodes["file-a"]["filename"] == "/d/a,b"
    assert nodes["disk-a"]["cache"] == {"direct": True, "no-flush": False}
    assert nodes["disk-a-name-of-24-characters-"]["driver"] == "qcow2"
    assert nodes["disk-a-name-of-24-characters-"]["read-only"] is True
    assert nodes["firmware-code"]["read-only"] is True and nodes["firmware-variables"]["read-only"] is False
    assert nodes["firmware-variables"]["file"]["filename"] == "/state/vars.fd"
    assert "pflash0=firmware-code,pflash1=firmware-variables" in after(argv, "-machine")[0]
    drives = [each for each in objects(argv, "-device") if each["driver"] == "virtio-blk-pci"]
    assert [each["bootindex"] for each in drives] == [1, 2]
    with_kernel = build(Description(name="demo", memory=vm.memory, disks=disks, kernel=Path("/k"), append="a b"))
    assert after(with_kernel, "-kernel") == ["/k"] and after(with_kernel, "-append") == ["a b"]
    assert not any("bootindex" in each for each in objects(with_kernel, "-device"))


def test_commas_in_paths_are_escaped_where_qemu_splits_at_them():
    argv = build(Description(name="demo", memory=Size(256 * MIB)), folder="/run/a,b")
    chardevs = dict(value.split(",", 2)[1:] for value in after(argv, "-chardev"))
    assert chardevs["id=monitor"] == "path=/run/a,,b/qmp.sock,server=on,wait=off"
    assert chardevs["id=journal"] == "path=/run/a,,b/events"


def test_an_alias_is_resolved_to_the_machine_it_stands_for_now():
    assert machine_of(LISTING, "q35") == "pc-q35-7.2"
    assert machine_of(LISTING, "pc-q35-7.2") == "pc-q35-7.2"
    assert machine_of(LISTING, "pc-i440fx-7.2") == "pc-i440fx-7.2"
    assert machine_of(LISTING, "q34") is None
    assert machine_of(LISTING, "Supported") is None


def test_socket_paths_that_are_too_long_are_named(tmp_path):
    fitting = RuntimeFolder("demo", tmp_path / "f")
    fitting.create()
    assert fitting.path.stat().st_mode & 0o777 == 0o700
    long = RuntimeFolder("demo", tmp_path / ("x" * 107))
    with pytest.raises(UsageError, match=r"VM demo: a socket in .* no more than 107 .* PERDURE_STATE_DIR"):
        long.create()
    assert not long.path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot make the folder"):
        RuntimeFolder("demo", tmp_path / "file" / "x").create()


def descriptor(folder: Path, name: str, features: list[str], machine: str = "pc-q35-*") -> Path:
    code, template = folder / f"{name}.code", folder / f"{name}.vars"
    code.touch()
    template.write_bytes(name.encode())
    content = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(template), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": [machine]}],
        "features": features,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def descriptors(tmp_path, monkeypatch):
    etc, share = tmp_path / "etc", tmp_path / "share"
    etc.mkdir()
    share.mkdir()
    monkeypatch.setattr(firmware, "DESCRIPTOR_FOLDERS", (etc, share))
    return etc, share


def test_the_first_plain_uefi_of_the_descriptors_is_taken(descriptors):
    etc, share = descriptors
    descriptor(share, "10-secure", ["secure-boot", "requires-smm"])
    descriptor(share, "20-other", [], machine="virt-*")
    (share / "30-broken.json").write_text("{")
    descriptor(share, "40-plain", ["acpi-s3"])
    descriptor(share, "50-later", [])
    assert firmware.find("demo", "ovmf").code == share / "40-plain.code"
    (etc / "40-plain.json").write_text("")  # an empty file hides the one of its name
    assert firmware.find("demo", "ovmf").code == share / "50-later.code"
    (share / "50-later.vars").unlink()
    with pytest.raises(VirtualMachineError, match="VM demo: no UEFI firmware is installed"):
        firmware.find("demo", "ovmf")


def test_the_vms_copy_of_the_variables_is_made_once(descriptors, tmp_path):
    _, share = descriptors
    descriptor(share, "60", [])
    firm = firmware.find("demo", "ovmf")
    copy = firmware.variables("demo", firm, tmp_path, Disk())
    assert copy is not None and copy.read_bytes() == b"60"
    copy.write_bytes(b"what the guest has set")
    assert firmware.variables("demo", firm, tmp_path, Disk()) == copy
    assert copy.read_bytes() == b"what the guest has set"
    assert firmware.variables("demo", Firmware("seabios"), tmp_path, Disk()) is None
    assert firm.template is not None
    firm.template.unlink()
    copy.unlink()
    with pytest.raises(StorageError, match=r"60\.vars: cannot read the template for VM demo"):
        firmware.variables("demo", firm, tmp_path, Disk())
