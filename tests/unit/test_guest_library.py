"""The guest's library and command: lines, gaps, areas on a file in place of a device, namespaces on a copy of sysfs."""

import json
import re
import threading
from pathlib import Path

import pytest
from guest_fixtures import Rig, guest, serving
from hypothesis import given
from hypothesis import strategies as st

from vm import protocol

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path, monkeypatch):
    made = Rig(tmp_path / "run" / "agent.sock", monkeypatch)
    yield made
    made.close()


@pytest.fixture
def served(rig, tmp_path, monkeypatch):
    with serving(rig, tmp_path, monkeypatch) as state:
        yield state


# Pure parts


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=6),
    st.integers(0, 12),
    st.integers(10, 48),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_first_gap_is_the_lowest_that_fits(ranges, start, end, size, align):
    taken = [(low, low + length) for low, length in ranges]
    fits = [
        at
        for at in range(start, end)
        if at % align == 0 and at + size <= end and all(high <= at or low >= at + size for low, high in taken)
    ]
    assert guest.first_gap(start, end, taken, size, align) == (fits[0] if fits else None)


@given(st.binary(max_size=200).map(lambda data: data.replace(b"\x00", b"\n")), st.lists(st.integers(1, 20)))
def test_lines_do_not_depend_on_how_they_are_cut(data, cuts):
    limit, lines, rest = 12, [], data
    reader = guest.LineReader(limit)
    for cut in [*cuts, len(data)]:
        lines += reader.feed(rest[:cut])
        rest = rest[cut:]
    assert lines == [line if len(line) < limit else b"" for line in data.split(b"\n")[:-1]]


def test_a_line_without_end_is_not_kept():
    reader = guest.LineReader(100)
    for _ in range(1000):
        assert reader.feed(b"x" * 99) == []
        assert len(reader._rest) < 100
    assert reader.feed(b"\nok\n") == [b"", b"ok"]


@pytest.mark.parametrize(
    "line", [b"\x00\xff", b"[1]", b"", b"{", b"[" * 60000, b"1" * 60000, b"\xff\xfe{\x00}\x00", b'"a"']
)
def test_decode_takes_anything(line):
    assert guest.decode(line) is None


def test_numbers_on_the_command_line():
    texts = {"4096": 4096, "0x1000": 4096, "2MiB": 2 * MIB, "64M": 64 * MIB, "1GiB": 1 << 30, "0x10M": None, "x": None}
    for text, value in texts.items():
        if value is None:
            with pytest.raises(ValueError, match="invalid literal"):
                guest.parse_number(text)
        else:
            assert guest.parse_number(text) == value


def test_the_host_agrees_on_limits():
    assert (guest._LINE_MAX, guest.NAME_CHARACTERS_MAX) == (protocol.LINE_BYTES_MAX, protocol.NAME_CHARACTERS_MAX)
    assert (guest.PROTOCOL_VERSION, guest.PORT_NAME) == (protocol.VERSION, protocol.PORT_NAME)
    ports = re.findall(r"name=(org\.perdure[\w.]*\w)", (Path(__file__).parents[2] / "README.md").read_text())
    assert set(ports) == {protocol.PORT_NAME}


# The library, through an agent, to the host's own region table


def test_tags_are_made_listed_and_removed(served):
    guest.mark_persistent(served.start, 8192, "one")
    guest.mark_persistent(served.start, 8192, "one")
    listed = guest.query_persistent_regions()
    assert [(each.class_, each.address, each.name) for each in listed] == [
        ("reserved", 1 << 32, None),
        ("persistent", served.start, "one"),
    ]
    guest.unmark_persistent(served.start, 8192)
    assert len(guest.query_persistent_regions()) == 1
    assert guest.checkpoint("now") == guest.Checkpoint(3, "c0ffee")


def test_a_long_list_comes_in_pieces(served):
    regions = served.host.regions
    for number in range(600):
        regions = regions.mark(served.start + 8192 * number, 4096, "n" * 100, "me", 1.0)
    served.host.regions = regions
    assert [each.address for each in guest.query_persistent_regions()[1:]] == [
        served.start + 8192 * number for number in range(600)
    ]


@pytest.mark.parametrize(
    ("address", "size", "name", "kind"),
    [
        (5, 4096, None, "alignment"),
        (4096, 0, None, "bounds"),
        (-4096, 4096, None, "bounds"),
        (0, 4096, None, "bounds"),
        (1 << 32, 4096, None, "bounds"),
        ((1 << 32) + 2 * MIB, 4096, "n" * 129, "malformed"),
        ((1 << 32) + 2 * MIB, 4096, "a\nb", "malformed"),
        ((1 << 32) + 4 * MIB, 8192, "other", "overlap"),
    ],
)
def test_what_is_refused_says_why_in_one_line(served, address, size, name, kind):
    served.host.regions = served.host.regions.mark((1 << 32) + 4 * MIB, 4096, None, "host", 1.0)
    with pytest.raises(guest.PersistenceError, match=r"^[^\n]+$") as caught:
        guest.mark_persistent(address, size, name)
    assert caught.value.kind == kind


def test_an_area_is_found_again_with_its_bytes(served):
    with guest.persistent_area("a", 5000) as memory:
        assert (len(memory), memory.readonly) == (5000, False)
        memory[:5] = b"hello"
    with guest.persistent_area("b", 3 * MIB) as memory:
        memory[-1] = 7
    with guest.persistent_area("c", 4096):
        pass
    tags = [(each.offset, each.size, each.name) for each in served.host.regions.tags]
    assert tags == [(2 * MIB, 8192, "a"), (4 * MIB, 3 * MIB, "b"), (8 * MIB, 4096, "c")]
    with guest.persistent_area("a", 8000) as memory:  # the same number of pages
        assert bytes(memory[:5]) == b"hello"
    with guest.persistent_area("b", 3 * MIB) as memory:
        assert memory[-1] == 7
    with served.file.open("rb") as file:
        assert file.read(5) == b"hello"
        file.seek(5 * MIB - 1)
        assert file.read(1) == b"\x07"


def test_an_area_tagged_by_other_means_is_mapped_where_it_is(served, monkeypatch):
    def map_as_device_dax_does(path, offset, length, mapping=guest._map_device):
        assert offset % (2 * MIB) == length % (2 * MIB) == 0
        return mapping(path, offset, length)

    monkeypatch.setattr(guest, "_map_device", map_as_device_dax_does)
    guest.mark_persistent(served.start + 3 * 4096, 4096, "odd")
    with guest.persistent_area("odd", 4096) as memory:
        memory[0] = 9
    with served.file.open("rb") as file:
        file.seek(3 * 4096)
        assert file.read(1) == b"\x09"
    with guest.persistent_area("next", 4096):
        assert served.host.regions.tags[-1].offset == 4 * MIB


def test_areas_that_cannot_be(served):
    with guest.persistent_area("a", 4096):
        pass
    for name, size, kind in (
        ("a", 8192, "overlap"),
        ("big", 62 * MIB, "bounds"),
        ("z", 0, "bounds"),
        ("", 1, "malformed"),
    ):
        with pytest.raises(guest.PersistenceError) as caught, guest.persistent_area(name, size):
            pass
        assert caught.value.kind == kind
    assert [each.name for each in served.host.regions.tags] == ["a"]


def test_an_area_whose_room_was_taken_looks_again(served):
    def rival(request):
        if isinstance(request, protocol.Mark) and not served.host.regions.tags:
            served.host.regions = served.host.regions.mark(served.start, 4096, "rival", "host", 1.0)

    served.before_answer = rival
    with guest.persistent_area("mine", 4096):
        pass
    assert [(each.name, each.offset) for each in served.host.regions.tags] == [("rival", 2 * MIB), ("mine", 4 * MIB)]


def test_a_view_that_is_kept_hides_no_error(served):
    kept = []
    with pytest.raises(KeyError), guest.persistent_area("a", 4096) as memory:
        kept.append(memory[:10])
        raise KeyError
    kept[0][:2] = b"ok"  # still mapped
    assert served.file.open("rb").read(2) == b"ok"


@pytest.mark.usefixtures("served")
def test_a_device_without_namespace_is_named(monkeypatch):
    monkeypatch.setattr(guest, "dax_devices", list)
    with pytest.raises(guest.PersistenceError, match="pm0 has no device DAX namespace"), guest.persistent_area("a", 1):
        pass


def test_the_command_line(served, capsys):
    assert guest.main(["mark", hex(served.start), "8KiB".replace("KiB", "K"), "--name", "n"]) == 0
    assert guest.main(["query", "--json"]) == 0
    regions = json.loads(capsys.readouterr().out)["regions"]
    assert [(each["class"], each["name"]) for each in regions] == [("reserved", None), ("persistent", "n")]
    assert guest.main(["query"]) == 0
    assert "persistent pm0 n (pid" in capsys.readouterr().out
    assert guest.main(["checkpoint"]) == 0
    assert capsys.readouterr().out == "generation 3 c0ffee\n"
    assert guest.main(["unmark", hex(served.start), "1"]) == 1
    assert "multiples of the page" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        guest.main(["mark"])
    assert caught.value.code == 2


def test_a_call_survives_the_end_of_the_agent(tmp_path, monkeypatch):
    """The first agent takes the request and dies; the next one gets it again under the same id."""
    path = tmp_path / "agent.sock"
    monkeypatch.setattr(guest, "SOCKET_PATH", str(path))
    listener = guest.listen(str(path))
    result = []
    call = threading.Thread(target=lambda: result.append(guest.query_persistent_regions()))
    call.start()
    ids = []
    for answered in (False, True):
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            ids.append(json.loads(file.readline())["id"])
            if answered:
                connection.sendall(guest.encode({"v": 1, "id": ids[-1], "ok": True, "regions": []}))
                call.join()
    listener.close()
    assert ids[0] == ids[1]
    assert result == [[]]


def test_no_agent_and_no_host_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "SOCKET_PATH", str(tmp_path / "agent.sock"))
    monkeypatch.setattr(guest, "_AGENT_SECONDS", 0.05)
    with pytest.raises(guest.PersistenceError, match="start `perdure-guest agent`") as caught:
        guest.query_persistent_regions()
    assert caught.value.kind == "unreachable"
    with guest.listen(str(tmp_path / "agent.sock")), pytest.raises(guest.PersistenceError, match=r"within 0\.05 s"):
        guest.query_persistent_regions(timeout=0.05)


# Namespaces, on a copy of what sysfs has


class Sysfs:
    """One NVDIMM in a directory, and what is written to its attributes."""

    def __init__(self, path, monkeypatch, *, holder="", content=b"", bound=True):
        self.root, self.dev, self.written = path / "sys", path / "dev", []
        region = self.root / "devices" / "region0"
        devices, drivers = self.root / "bus/nd/devices", self.root / "bus/nd/drivers"
        for folder in (region / "namespace0.0/block/pmem0", devices / "dax0.0", drivers, self.dev):
            folder.mkdir(parents=True)
        (devices / "namespace0.0").symlink_to(region / "namespace0.0")
        for name, value in {
            "namespace0.0/resource": "0x100000000",
            "namespace0.0/holder": holder,
            "dax_seed": "dax0.0",
            "pfn_seed": "pfn0.0",
        }.items():
            (region / name).write_text(f"{value}\n")
        if bound:
            (region / "namespace0.0" / "driver").mkdir()
        self.holder_driver = devices / "dax0.0" / "driver"
        (self.dev / "pmem0").write_bytes(content.ljust(4 * MIB, b"\0"))
        monkeypatch.setattr(guest, "_write", self._write)

    def _write(self, path, value):
        self.written.append((str(Path(path).relative_to(self.root / "bus/nd")), value))

    def prepare(self, mode):
        guest.prepare_namespaces(lambda address: mode if address == 1 << 32 else None, str(self.root), str(self.dev))
        return [(path, "UUID" if path.endswith("uuid") and len(value) == 36 else value) for path, value in self.written]


@pytest.mark.parametrize(("mode", "seed", "driver"), [("devdax", "dax0.0", "dax_pmem"), ("fsdax", "pfn0.0", "nd_pmem")])
def test_an_empty_device_gets_its_namespace(tmp_path, monkeypatch, mode, seed, driver):
    assert Sysfs(tmp_path, monkeypatch).prepare(mode) == [
        ("drivers/nd_pmem/unbind", "namespace0.0"),
        (f"devices/{seed}/align", "2097152"),
        (f"devices/{seed}/uuid", "UUID"),
        (f"devices/{seed}/mode", "ram"),
        (f"devices/{seed}/namespace", "namespace0.0"),
        (f"drivers/{driver}/bind", seed),
    ]


@pytest.mark.parametrize("content", [b"x", b"\0" * 1080 + b"\x53\xef", b"\0" * (2 * MIB - 1) + b"x"])
def test_a_device_that_holds_data_is_left_alone(tmp_path, monkeypatch, capsys, content):
    assert Sysfs(tmp_path, monkeypatch, content=content).prepare("devdax") == []
    assert "left alone" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["raw", None])
def test_nothing_is_made_that_the_host_does_not_want(tmp_path, monkeypatch, mode):
    assert Sysfs(tmp_path, monkeypatch).prepare(mode) == []


def test_a_namespace_of_an_earlier_boot_stays(tmp_path, monkeypatch, capsys):
    sysfs = Sysfs(tmp_path, monkeypatch, holder="dax0.0", content=b"info block")
    sysfs.holder_driver.mkdir()
    assert sysfs.prepare("devdax") == []
    sysfs.holder_driver.rmdir()
    assert sysfs.prepare("devdax") == [("drivers/dax_pmem/bind", "dax0.0")]
    sysfs.written.clear()
    assert sysfs.prepare("fsdax") == []
    assert "stays so" in capsys.readouterr().err


def test_a_failure_is_undone_and_said(tmp_path, monkeypatch, capsys):
    sysfs = Sysfs(tmp_path, monkeypatch)

    def failing(path, value):
        sysfs._write(path, value)
        if path.endswith("dax_pmem/bind"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(guest, "_write", failing)
    assert sysfs.prepare("devdax")[-2:] == [("devices/dax0.0/namespace", ""), ("drivers/nd_pmem/bind", "namespace0.0")]
    assert "namespace0.0: cannot be made usable: [Errno 28]" in capsys.readouterr().err


def test_the_port_is_found_without_udev(tmp_path):
    port = tmp_path / "sys/class/virtio-ports/vport1p2"
    port.mkdir(parents=True)
    (port / "name").write_text("org.perdure.agent.0\n")
    found = guest.find_port(guest.PORT_NAME, str(tmp_path / "sys"), str(tmp_path / "dev"))
    assert found == str(tmp_path / "dev/vport1p2")
    with pytest.raises(FileNotFoundError):
        guest.find_port("org.perdure.other.0", str(tmp_path / "sys"), str(tmp_path / "dev"))


MOUNTS = """\
20 1 0:5 / /proc rw,nosuid - proc proc rw
21 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw,errors=remount-ro
22 21 254:2 / /with\\040space rw - ext4 /dev/vdb rw
23 21 254:3 / /cd ro - iso9660 /dev/sr0 ro
24 22 254:1 /srv /with\\040space/bound rw - ext4 /dev/vda1 rw,errors=remount-ro
25 21 0:40 / /net rw - nfs host:/export rw
26
"""


def test_file_systems_on_disks_are_found_once_the_last_one_first():
    assert guest.on_disks(MOUNTS) == [("/cd", False), ("/with space", True), ("/", True)]
