"""Somebody who can write the repository, but has no key: what he does is found, named and contained.

Each attack is met by three who know different things: a host that has never seen the repository, the host that wrote
it, and that host without its index. All use the command line. A command may refuse, in one line, or answer; what it
answers is right. tests/faults/test_damage.py does the same to every byte of every file, through the store.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from operations import OTHER, slot
from store_fixtures import PASSPHRASE, Place, add

from perdure import cli, places
from store import format as layout
from store.chunker import PackingSettings
from store.creation import read_mark
from store.keyring.keychain import Keychain

FRESH, AUTHOR, WITHOUT_INDEX = "a host that has never seen it", "the host that wrote it", "that host, without its index"
CODES = {0, 1, 3, 10, 12}
SETTINGS = PackingSettings(pack_bytes=100_000, frame_bytes=16_384)
"""Several frames in a pack, four pages in a frame."""


def pages(seed: int, count: int) -> bytes:
    """Pages that do not compress: frames of them are raw, and all of one length."""
    return random.Random(seed).randbytes(count * 4096)


CONTENTS = {1: pages(1, 40), 2: pages(2, 8) + pages(1, 40)[8 * 4096 :]}
CONTENTS[3] = CONTENTS[2][: 20 * 4096] + pages(3, 20)


class Victim:
    """A repository, the state of the host that wrote it, and the command line."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "repository"
        self.count = itertools.count()

    def perdure(self, state: Path, *words: object) -> tuple[int, str, str]:
        """(exit code, output, errors) of a command in this process."""
        out, err = io.StringIO(), io.StringIO()
        before, terminated = dict(os.environ), signal.getsignal(signal.SIGTERM)
        os.environ |= {
            "PERDURE_REPOSITORY": str(self.path),
            "PERDURE_PASSWORD": PASSPHRASE.decode(),
            "PERDURE_STATE_DIR": str(state),
        }
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main([str(each) for each in words])
        finally:
            os.environ.clear()
            os.environ |= before
            signal.signal(signal.SIGTERM, terminated)
        return code, out.getvalue(), err.getvalue()

    def states(self) -> dict[str, Path]:
        """Copies of what the three know."""
        at = self.root / f"states-{next(self.count)}"
        for name in (FRESH, AUTHOR, WITHOUT_INDEX):
            (at / name).mkdir(parents=True)
        for name in (AUTHOR, WITHOUT_INDEX):
            shutil.copytree(self.root / "state", at / name, dirs_exist_ok=True)
        for index in at.joinpath(WITHOUT_INDEX).rglob("index-*"):
            shutil.rmtree(index)
        return {name: at / name for name in (FRESH, AUTHOR, WITHOUT_INDEX)}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever is done to the repository is undone."""
        kept = self.root / "kept"
        shutil.copytree(self.path, kept)
        yield
        shutil.rmtree(self.path)
        kept.rename(self.path)

    def packs(self, kind: int) -> list[Path]:
        found = sorted((self.path / "packs").iterdir())
        return [each for each in found if layout.decode_pack_header(each.read_bytes()[:64], each.name).kind == kind]

    def record(self, sequence: int) -> Path:
        return self.path / layout.record_name(sequence)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """Records: 1 genesis, 2 to 4 generations, 5 a protection, and before it two keyrings."""
    victim = Victim(tmp_path)
    where = Place(tmp_path, SETTINGS)
    os.environ["PERDURE_STATE_DIR"], before = str(tmp_path / "state"), os.environ.get("PERDURE_STATE_DIR")
    where.state = places.repository_state(read_mark(where.path))
    if before is None:
        del os.environ["PERDURE_STATE_DIR"]
    else:
        os.environ["PERDURE_STATE_DIR"] = before
    with Keychain(where.path, read_mark(where.path), PASSPHRASE, where.state) as chain:
        chain.change(add=slot(OTHER))
    with where.open() as repository:
        parent = None
        for number in CONTENTS:
            parent = add(repository, "vm", {"ram": CONTENTS[number]}, parent)
        repository.protect(parent, protected=True)
    assert victim.perdure(tmp_path / "state", "key", "export-public", tmp_path / "public.pem")[0] == 0
    yield victim


def answers(victim: Victim, state: Path) -> list[str]:
    """What is said about it; all that is given out is right."""
    said = []
    for number, content in CONTENTS.items():
        target = victim.root / f"out-{next(victim.count)}"
        code, _, err = victim.perdure(state, "export", f"vm@{number}", "ram", target)
        assert code in CODES
        assert (code == 0) == target.exists()
        if code == 0:
            assert target.read_bytes() == content
        else:
            said.append(err)
    for words in (("log", "vm", "--json"), ("check", "--read-data", "--json"), ("key", "list", "--json")):
        code, out, err = victim.perdure(state, *words)
        assert code in CODES
        if code == 3:
            said += [str(each) for each in msgspec.json.decode(out)["findings"]]
        elif code:
            said.append(err)
        elif words[0] == "log":
            assert {each["generation"] for each in msgspec.json.decode(out)["generations"]} <= set(CONTENTS)
    public = victim.root / "public.pem"
    code, _, err = victim.perdure(state, "check", "--public-key", public, "--json")
    assert code in CODES
    said += [err] if code not in (0, 3) else []
    for each in said:
        assert len(each.splitlines()) == 1, each
    return said


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def frames(pack: Path) -> list[tuple[int, int]]:
    """Where frames begin and end, by their lengths."""
    data, at, found = pack.read_bytes(), 64, []
    while at + 4 < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) - 16 or end <= at + 4:
            break
        found.append((at, end))
        at = end
    return found


def replace_bytes(path: Path, start: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


def swap_packs(victim: Victim) -> None:
    swap(*victim.packs(layout.PACK_DATA)[:2])


def swap_a_pack_of_nodes_with_one_of_data(victim: Victim) -> None:
    swap(victim.packs(layout.PACK_DATA)[0], victim.packs(layout.PACK_NODES)[0])


def frame_of_another_pack(victim: Victim) -> None:
    one, two = victim.packs(layout.PACK_DATA)[:2]
    start, end = frames(one)[0]
    assert frames(two)[0] == (start, end)
    replace_bytes(two, start, one.read_bytes()[start:end])


def frames_of_one_pack_exchanged(victim: Victim) -> None:
    for pack in victim.packs(layout.PACK_DATA):
        (a, b), (c, d) = frames(pack)[:2]
        assert b - a == d - c
        data = pack.read_bytes()
        replace_bytes(pack, a, data[c:d])
        replace_bytes(pack, c, data[a:b])


def footer_of_another_pack(victim: Victim) -> None:
    one, two = victim.packs(layout.PACK_DATA)[:2]
    end = frames(one)[-1][1]
    one.write_bytes(one.read_bytes()[:end] + two.read_bytes()[frames(two)[-1][1] :])


def salt_of_another_pack(victim: Victim) -> None:
    one, two = victim.packs(layout.PACK_DATA)[:2]
    replace_bytes(one, 32, two.read_bytes()[32:64])


def newest_record_replayed(victim: Victim) -> None:
    shutil.copy(victim.record(5), victim.record(6))


def generation_replayed(victim: Victim) -> None:
    shutil.copy(victim.record(3), victim.record(6))


def record_in_the_place_of_another(victim: Victim) -> None:
    shutil.copy(victim.record(2), victim.record(3))


def records_reordered(victim: Victim) -> None:
    swap(victim.record(3), victim.record(4))


def record_dropped(victim: Victim) -> None:
    victim.record(3).unlink()


def history_closed_over_a_dropped_record(victim: Victim) -> None:
    victim.record(4).rename(victim.record(3))
    victim.record(5).rename(victim.record(4))


def history_from_the_middle_on_dropped(victim: Victim) -> None:
    for sequence in (3, 4, 5):
        victim.record(sequence).unlink()


def genesis_dropped(victim: Victim) -> None:
    victim.record(1).unlink()


def record_of_a_far_sequence(victim: Victim) -> None:
    shutil.copy(victim.record(5), victim.record(999_999_999_999))


def keyring_put_back(victim: Victim) -> None:
    (victim.path / "keyring" / "00000002").unlink()


def keyring_replayed_under_the_next_number(victim: Victim) -> None:
    shutil.copy(victim.path / "keyring" / "00000002", victim.path / "keyring" / "00000003")


def slots_exchanged(victim: Victim) -> None:
    swap(*sorted((victim.path / "keys").iterdir()))


def slot_removed(victim: Victim) -> None:
    for each in (victim.path / "keys").iterdir():
        each.unlink()


def config_of_another(victim: Victim) -> None:
    (victim.path / "config").write_bytes(layout.encode_config(bytes(range(16))))


def pipes_in_the_place_of_files(victim: Victim) -> None:
    """Whoever opens one to read it waits until somebody writes."""
    for path in (victim.packs(layout.PACK_DATA)[0], victim.record(4), next((victim.path / "keys").iterdir())):
        path.unlink()
        os.mkfifo(path)


def folders_in_the_place_of_files(victim: Victim) -> None:
    for path in (victim.packs(layout.PACK_DATA)[0], victim.record(4)):
        path.unlink()
        path.mkdir()


def links_to_devices(victim: Victim) -> None:
    for path in (victim.packs(layout.PACK_DATA)[0], victim.record(4)):
        path.unlink()
        path.symlink_to("/dev/zero")


def links_to_themselves(victim: Victim) -> None:
    for path in (victim.packs(layout.PACK_DATA)[0], victim.record(4)):
        path.unlink()
        path.symlink_to(path)


def huge_files(victim: Victim) -> None:
    """A TiB of holes behind what was there: nobody may try to hold that in memory."""
    for path in (
        victim.packs(layout.PACK_DATA)[0],
        victim.packs(layout.PACK_NODES)[0],
        victim.record(4),
        next((victim.path / "keys").iterdir()),
        victim.path / "keyring" / "00000001",
        victim.path / "config",
    ):
        os.truncate(path, 1 << 40)


def huge_footer(victim: Victim) -> None:
    pack = victim.packs(layout.PACK_DATA)[0]
    with pack.open("r+b") as file:
        file.seek(1 << 33)
        file.write(layout.encode_pack_trailer(0xFFFFFFFF, 3))


FOUND_BY_ALL: list[Callable[[Victim], None]] = [
    swap_packs,
    swap_a_pack_of_nodes_with_one_of_data,
    frame_of_another_pack,
    frames_of_one_pack_exchanged,
    footer_of_another_pack,
    salt_of_another_pack,
    newest_record_replayed,
    generation_replayed,
    record_in_the_place_of_another,
    records_reordered,
    record_dropped,
    history_closed_over_a_dropped_record,
    genesis_dropped,
    record_of_a_far_sequence,
    keyring_replayed_under_the_next_number,
    slots_exchanged,
    slot_removed,
    config_of_another,
    pipes_in_the_place_of_files,
    folders_in_the_place_of_files,
    links_to_devices,
    links_to_themselves,
    huge_files,
    huge_footer,
]
FOUND_BY_WHO_HAS_SEEN: list[Callable[[Victim], None]] = [
    history_from_the_middle_on_dropped,
    keyring_put_back,
]
"""A fresh host cannot know of what is gone: docs/THREATS.md says so."""


def test_nothing_is_wrong_before(victim):
    for state in victim.states().values():
        assert answers(victim, state) == []


def test_an_attack_on_the_history_is_found_with_the_public_key_alone(victim):
    for attack in (record_in_the_place_of_another, records_reordered, record_dropped, newest_record_replayed):
        with victim.restored():
            attack(victim)
            code, out, _ = victim.perdure(
                victim.root / "nothing", "check", "--public-key", victim.root / "public.pem", "--json"
            )
            assert code == 3
            assert {each["kind"] for each in msgspec.json.decode(out)["findings"]} == {"record"}


@pytest.mark.parametrize("attack", FOUND_BY_ALL + FOUND_BY_WHO_HAS_SEEN, ids=lambda each: each.__name__)
def test_an_attack_is_found_and_contained(victim, attack):
    attack(victim)
    for who, state in victim.states().items():
        said = answers(victim, state)
        assert said or (who == FRESH and attack in FOUND_BY_WHO_HAS_SEEN), who


def exported(victim: Victim, state: Path) -> set[int]:
    """Numbers of generations that are given out, each as it was."""
    found = set()
    for number, content in CONTENTS.items():
        target = victim.root / f"out-{next(victim.count)}"
        if victim.perdure(state, "export", f"vm@{number}", "ram", target)[0] == 0:
            assert target.read_bytes() == content
            found.add(number)
    return found


@pytest.mark.parametrize("attack", FOUND_BY_ALL, ids=lambda each: each.__name__)
def test_prune_and_repair_make_nothing_worse(victim, attack):
    attack(victim)
    states = victim.states()
    for state in (states[AUTHOR], *([states[FRESH]] if attack in FOUND_BY_ALL[:6] else [])):  # these are on packs
        before = exported(victim, state)
        for words in (("prune", "--max-unused", "0"), ("repair",)):
            code, _, err = victim.perdure(state, *words)
            assert code in CODES | {11}
            assert len(err.splitlines()) <= 1 or words[0] == "repair", err
            assert exported(victim, state) >= before, words


@pytest.mark.parametrize(
    "folder", ["packs", "records", "keys", "keyring", "leases", "."], ids=lambda each: each.replace(".", "root")
)
def test_files_of_others_do_no_harm(victim, folder):
    """What a desktop, a synchronisation or a person leaves in a folder."""
    for name in ("zzz", "Thumbs.db", ".hidden", "0" * 12 + ".bak", "lost+found", "ÿ", "0"):
        (victim.path / folder / name).write_bytes(b"rubbish")
    (victim.path / folder / "folder").mkdir()
    for state in victim.states().values():
        assert answers(victim, state) == []
