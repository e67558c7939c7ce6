"""The region table against a plain dict of pages, its refusals one by one, and its file under faults."""

import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from base.disk import Disk
from base.errors import (
    ConflictError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UsageError,
)
from base.extents import normalise, union
from base.units import PAGE
from vm import regions
from vm.protocol import TAGS_MAX
from vm.regions import INFO_BLOCK, Device, Regions, RegionTable, Tag, TagRefusedError

BASE = 0x1_4000_0000
DATA = BASE + INFO_BLOCK
DEVICES = (
    Device("pm0", BASE, INFO_BLOCK + 8 * PAGE),
    Device("pm1", BASE + INFO_BLOCK + 8 * PAGE, 8 * PAGE, "raw"),  # begins where pm0 ends
    Device("pm2", BASE + (1 << 30), INFO_BLOCK + 4 * PAGE, "fsdax"),
)


@pytest.fixture
def table(tmp_path):
    return RegionTable.create(tmp_path / "regions.json", "demo", DEVICES, clock=lambda: 100.0)


def refusal(table, operation, *arguments) -> TagRefusedError:
    before = table.file.read_bytes(), table.regions
    with pytest.raises(TagRefusedError) as caught:
        getattr(table, operation)(*arguments)
    assert (table.file.read_bytes(), table.regions) == before
    assert "VM demo" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("operation", ["mark", "unmark"])
@pytest.mark.parametrize(
    ("address", "size", "kind"),
    [
        (DATA + 1, PAGE, "alignment"),
        (DATA, PAGE - 1, "alignment"),
        (DATA, 0, "bounds"),
        (DATA, -PAGE, "bounds"),
        (-PAGE, 2 * PAGE, "bounds"),
        (0, PAGE, "bounds"),
        (BASE, PAGE, "bounds"),  # the info block
        (DATA - PAGE, 2 * PAGE, "bounds"),  # half of it in the info block
        (DATA + 7 * PAGE, 2 * PAGE, "bounds"),  # reaches into the next device
        (DATA, 1 << 63, "bounds"),
        (1 << 64, PAGE, "bounds"),
        ((1 << 64) - PAGE, PAGE, "bounds"),
        (1 << 10_000, 1 << 10_000, "bounds"),
        (BASE + (1 << 30) + PAGE, PAGE, "bounds"),  # the info block of fsdax
    ],
)
def test_ranges_that_are_refused(table, operation, address, size, kind):
    error = refusal(table, operation, address, size)
    assert error.kind == kind
    assert isinstance(error, UsageError)
    assert error.exit_code == 2


def test_overlap_is_a_conflict_that_names_the_other_tag(table):
    table.mark(DATA + PAGE, 2 * PAGE, "cache", "pid 7 redis")
    for address, size, name in (
        (DATA, 2 * PAGE, None),
        (DATA + PAGE, PAGE, "cache"),
        (DATA + 2 * PAGE, 2 * PAGE, "cache"),
        (DATA + PAGE, 2 * PAGE, "other"),
        (DATA + PAGE, 2 * PAGE, None),
    ):
        error = refusal(table, "mark", address, size, name)
        assert error.kind == "overlap"
        assert isinstance(error, ConflictError)
        assert error.exit_code == 1
        assert "'cache'" in str(error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x" * 129, "limit"), ("", "malformed"), ("a\nb", "malformed"), ("\x1b[2J", "malformed"), ("a\0", "malformed")],
)
def test_names_that_are_refused(table, name, kind):
    assert refusal(table, "mark", DATA, PAGE, name).kind == kind


def test_the_longest_name_and_a_dirty_owner(table):
    table.mark(DATA, PAGE, "ü" * 128, "pid 4 \x1b[2J\n" + "x" * 1000)
    [tag] = table.regions.tags
    assert tag.owner.startswith("pid 4 ?[2J?xxx")
    assert len(tag.owner) == 128


def test_marking_again_renews_the_owner_and_nothing_else(table):
    table.mark(DATA, PAGE, "heap", "pid 3 app")
    first = table.file.stat().st_ino
    table.mark(DATA, PAGE, "heap", "pid 3 app")
    assert table.file.stat().st_ino == first  # the very same table is not written again
    table._clock = lambda: 200.0
    table.mark(DATA, PAGE, "heap", "pid 9 app")
    assert table.regions.tags == (Tag("pm0", INFO_BLOCK, PAGE, "heap", "pid 9 app", created=100.0, modified=100.0),)


def test_no_more_tags_than_the_limit(tmp_path):
    device = Device("pm0", BASE, 2 * (TAGS_MAX + 2) * PAGE, "raw")
    tags = [Tag("pm0", 2 * each * PAGE, PAGE) for each in range(TAGS_MAX - 1)]
    wide = Tag("pm0", 2 * TAGS_MAX * PAGE, 3 * PAGE)
    table = RegionTable.create(tmp_path / "t", "demo", [device], [*tags, wide])
    for operation, page in (("mark", 1), ("unmark", 2 * TAGS_MAX + 1)):  # splitting a tag makes one more
        error = refusal(table, operation, BASE + page * PAGE, PAGE)
        assert error.kind == "limit"
        assert isinstance(error, ConflictError)
    table.unmark(BASE, PAGE)
    table.mark(BASE + PAGE, PAGE)
    assert len(table.regions.tags) == TAGS_MAX
    with pytest.raises(ConflictError):
        Regions.of("demo", [device], [*tags, wide, Tag("pm0", PAGE, PAGE), Tag("pm0", 3 * PAGE, PAGE)])


def test_what_is_kept(table):
    assert table.regions.kept("pm0").tolist() == [[0, INFO_BLOCK]]
    table.mark(DATA + PAGE, PAGE)
    table.mark(DATA + 2 * PAGE, PAGE)
    table.mark(DATA + 8 * PAGE, PAGE)
    assert table.regions.kept("pm0").tolist() == [[0, INFO_BLOCK], [INFO_BLOCK + PAGE, INFO_BLOCK + 3 * PAGE]]
    assert table.scrubbable("pm0").tolist() == [
        [INFO_BLOCK, INFO_BLOCK + PAGE],
        [INFO_BLOCK + 3 * PAGE, INFO_BLOCK + 8 * PAGE],
    ]
    for device in DEVICES[1:]:
        assert table.regions.kept(device.name).tolist() == [[0, device.size]]
        assert table.scrubbable(device.name).tolist() == []
    with pytest.raises(NotFoundError, match="VM demo has no region pm9"):
        table.regions.kept("pm9")


def test_a_device_that_is_all_info_block():
    tiny = Regions.of("demo", [Device("pm0", BASE, PAGE)])
    assert tiny.kept("pm0").tolist() == [[0, PAGE]]
    with pytest.raises(TagRefusedError):
        tiny.mark(BASE, PAGE, None, "host", 0.0)


def test_what_a_capture_found_changed(table):
    for page in (0, 2, 4):
        table.mark(DATA + page * PAGE, PAGE, f"p{page}")
    table.mark(DATA + 8 * PAGE, PAGE, "raw")
    table._clock = lambda: 500.0
    # ends where p0 begins; covers p2; nothing of p4; the same offsets of another device mean nothing
    dirty = normalise([(0, INFO_BLOCK), (INFO_BLOCK + PAGE, INFO_BLOCK + 4 * PAGE), (INFO_BLOCK + 5 * PAGE, 1 << 40)])
    table.changed({"pm0": dirty}, 7)
    found = {tag.name: (tag.created, tag.modified, tag.generation) for tag in table.regions.tags}
    untouched = (100.0, 100.0, None)
    assert found == {"p0": untouched, "p2": (100.0, 500.0, 7), "p4": untouched, "raw": untouched}
    assert RegionTable.load(table.file, "demo").regions == table.regions


def test_tags_move_with_their_device_into_another_launch(table, tmp_path):
    table.mark(DATA + PAGE, 2 * PAGE, "heap", "pid 3 app")
    plain = msgspec.json.decode(msgspec.json.encode(table.regions.to_tags()))
    moved = [msgspec.structs.replace(each, address=each.address + (1 << 40)) for each in DEVICES]
    restored = RegionTable.from_tags(tmp_path / "new", "demo", moved, plain)
    [entry] = [each for each in restored.query() if each.class_ == "persistent"]
    assert (entry.address, entry.size, entry.name) == (DATA + PAGE + (1 << 40), 2 * PAGE, "heap")
    assert restored.regions.kept("pm0").tolist() == table.regions.kept("pm0").tolist()
    assert RegionTable.load(tmp_path / "new", "demo").regions == restored.regions


def test_loading_with_devices_elsewhere_is_stored_at_once(table):
    table.mark(DATA, PAGE)
    moved = [msgspec.structs.replace(each, address=each.address + (1 << 40)) for each in DEVICES]
    RegionTable.load(table.file, "demo", moved)
    assert RegionTable.load(table.file, "demo").query()[0].address == BASE + (1 << 40)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (DEVICES[1:], "region pm0, which it does not have"),
        ([msgspec.structs.replace(DEVICES[0], size=INFO_BLOCK)], "not inside its data"),
        ([DEVICES[0], msgspec.structs.replace(DEVICES[1], address=BASE)], "overlap in guest-physical memory"),
        ([DEVICES[0], msgspec.structs.replace(DEVICES[1], name="pm0")], "the same name"),
        ([msgspec.structs.replace(DEVICES[0], address=BASE + 1)], "not aligned"),
    ],
)
def test_devices_that_do_not_fit_are_a_conflict(table, devices, message):
    table.mark(DATA, PAGE)
    with pytest.raises(ConflictError, match=message):
        RegionTable.load(table.file, "demo", devices)
    with pytest.raises(ConflictError, match=message):
        RegionTable.from_tags(table.file.with_name("new"), "demo", devices, table.regions.to_tags())
    assert not table.file.with_name("new").exists()


@pytest.mark.parametrize(
    "tags",
    [
        [{"device": "pm0"}],
        [{"device": "pm0", "offset": "x", "size": 1}],
        [3],
    ],
)
def test_metadata_that_is_no_tags(tmp_path, tags):
    with pytest.raises(IntegrityError, match="VM demo"):
        RegionTable.from_tags(tmp_path / "t", "demo", DEVICES, tags)


def test_tags_that_overlap_are_not_restored(tmp_path):
    tags = [{"device": "pm1", "offset": 0, "size": 2 * PAGE}, {"device": "pm1", "offset": PAGE, "size": PAGE}]
    with pytest.raises(ConflictError, match="two tags overlap"):
        RegionTable.from_tags(tmp_path / "t", "demo", DEVICES, tags)


def test_files_that_are_no_table(table, tmp_path):
    with pytest.raises(NotFoundError, match="missing"):
        RegionTable.load(tmp_path / "nothing", "demo")
    with pytest.raises(ConflictError, match="of VM demo, not of other"):
        RegionTable.load(table.file, "other")
    with pytest.raises(StorageError):
        RegionTable.load(tmp_path, "demo")
    whole = table.file.read_bytes()
    for damaged in (b"", whole[:-1], b"[]", b"\xff", b"[" * 50_000, whole.replace(b'"devdax"', b'"what"')):
        table.file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"regions\.json"):
            RegionTable.load(table.file, "demo")
    table.file.write_bytes(b'{"format":2,"regions":"in a form of the future"}')
    with pytest.raises(FormatVersionError):
        RegionTable.load(table.file, "demo")


def test_what_a_killed_supervisor_left_is_removed(table):
    left = table.file.with_name(f".{table.file.name}.4711.tmp")
    left.write_bytes(b"half")
    RegionTable.load(table.file, "demo")
    assert not left.exists()


class FailingDisk(Disk):
    """Fails the operation named in `fails`."""

    def __init__(self) -> None:
        self.fails = ""

    def step(self, operation: str, path: str) -> None:
        if operation == self.fails:
            raise StorageError(path, "cannot go on: no space left on device")


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename", "fsync directory"])
def test_what_cannot_be_stored_does_not_happen(tmp_path, operation):
    disk = FailingDisk()
    table = RegionTable.create(tmp_path / "t", "demo", DEVICES, disk=disk)
    table.mark(DATA, PAGE, "old")
    disk.fails = operation
    before = table.regions
    with pytest.raises(StorageError):
        table.mark(DATA + PAGE, PAGE, "new")
    assert table.regions == before
    disk.fails = ""
    table.unmark(DATA + PAGE, PAGE)  # changes nothing in memory, but the file may have had it
    assert RegionTable.load(tmp_path / "t", "demo").regions == table.regions == before
    assert [each.name for each in tmp_path.iterdir()] == ["t"]


def test_a_change_is_in_the_file_when_the_call_returns(table):
    table.mark(DATA, 3 * PAGE, "a")
    assert RegionTable.load(table.file, "demo").regions.tags[0].name == "a"
    table.unmark(DATA + PAGE, PAGE)
    assert [each.offset for each in RegionTable.load(table.file, "demo").regions.tags] == [
        INFO_BLOCK,
        INFO_BLOCK + 2 * PAGE,
    ]


ADDRESSES = st.one_of(
    st.integers(-1, 17).map(lambda page: DATA + page * PAGE),
    st.integers(-1, 5).map(lambda page: BASE + (1 << 30) + INFO_BLOCK + page * PAGE),
)
SIZES = st.integers(0, 6).map(lambda count: count * PAGE)
NAMES = st.sampled_from([None, "a", "b"])


class AgainstPages(RuleBasedStateMachine):
    """The model: a dict from page address to (identity of the mark that it belongs to, name)."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.table = RegionTable.create(self.folder / "t", "demo", DEVICES)
        self.pages: dict[int, tuple[int, str | None]] = {}
        self.marks = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @staticmethod
    def data(device: Device) -> range:
        return range(device.address + (0 if device.mode == "raw" else INFO_BLOCK), device.address + device.size, PAGE)

    def fits(self, address: int, size: int) -> bool:
        wanted = range(address, address + size, PAGE)
        return size > 0 and any(all(page in self.data(device) for page in wanted) for device in DEVICES)

    def runs(self) -> list[tuple[int, int, str | None]]:
        """(address, size, name) of each maximal run of pages of one mark."""
        found: list[tuple[int, int, str | None]] = []
        for page in sorted(self.pages):
            if page - PAGE in self.pages and self.pages[page - PAGE] == self.pages[page]:
                found[-1] = (found[-1][0], found[-1][1] + PAGE, found[-1][2])
            else:
                found.append((page, PAGE, self.pages[page][1]))
        return found

    @rule(address=ADDRESSES, size=SIZES, name=NAMES)
    def mark(self, address, size, name) -> None:
        wanted = range(address, address + size, PAGE)
        if not self.fits(address, size):
            kind = "bounds"
        elif (address, size, name) in self.runs():
            kind = None
        elif any(page in self.pages for page in wanted):
            kind = "overlap"
        else:
            kind = None
            self.marks += 1
            self.pages.update(dict.fromkeys(wanted, (self.marks, name)))
        self.expect(kind, lambda: self.table.mark(address, size, name))

    @rule(address=ADDRESSES, size=SIZES)
    def unmark(self, address, size) -> None:
        fits = self.fits(address, size)
        self.expect(None if fits else "bounds", lambda: self.table.unmark(address, size))
        if fits:
            for page in range(address, address + size, PAGE):
                self.pages.pop(page, None)

    @rule()
    def supervisor_restarts(self) -> None:
        self.table = RegionTable.load(self.folder / "t", "demo", DEVICES)

    @rule()
    def generation_is_restored(self) -> None:
        self.table = RegionTable.from_tags(self.folder / "t", "demo", DEVICES, self.table.regions.to_tags())

    def expect(self, kind, call) -> None:
        if kind is None:
            call()
            return
        with pytest.raises(TagRefusedError) as caught:
            call()
        assert caught.value.kind == kind

    @invariant()
    def listing_is_the_model(self) -> None:
        listed = self.table.query()
        assert [(e.address, e.size, e.name) for e in listed if e.class_ == "persistent"] == self.runs()
        assert [e.device for e in listed if e.class_ == "reserved"] == [device.name for device in DEVICES]
        assert regions.Regions.of("demo", DEVICES, self.table.regions.tags) == self.table.regions

    @invariant()
    def kept_is_the_model(self) -> None:
        for device in DEVICES:
            kept = self.table.regions.kept(device.name)
            pages = {page - device.address for page in self.pages if page in self.data(device)}
            wanted = [(0, INFO_BLOCK), *((page, page + PAGE) for page in pages)]
            if device.mode != "devdax":
                wanted = [(0, device.size)]
            assert kept.tolist() == normalise(wanted).tolist()
            rest = self.table.scrubbable(device.name)
            assert union(kept, rest).tolist() == [[0, device.size]]
            assert (
                not len(rest)
                or not len(kept)
                or (rest[:, 1] - rest[:, 0]).sum() == device.size - (kept[:, 1] - kept[:, 0]).sum()
            )


TestAgainstPages = AgainstPages.TestCase
TestAgainstPages.settings = settings(max_examples=60, stateful_step_count=30)
