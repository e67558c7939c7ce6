"""prune, and key rotate --rewrite, from the command line."""

import fcntl

import pytest
from perdure_shell import Shell
from store_fixtures import PASSPHRASE, SETTINGS, Place, add, image

from store import leases
from store.upkeep import reserve


@pytest.fixture
def pruned(tmp_path):
    """Two generations with little in common, of which the first is forgotten; unlocking takes no time."""
    shell = Shell(tmp_path, PASSPHRASE.decode())
    where = Place(shell.root, SETTINGS)
    assert where.path == shell.repository
    a = image(1, 400)
    b = image(2, 300) + a[300 * 4096 :]
    shell.write("b", b)
    with where.open() as repository:
        first = add(repository, "vm", {"ram": a})
        add(repository, "vm", {"ram": b}, first)
        repository.forget(first)
    return shell


def packs(shell) -> set[str]:
    return {each.name for each in (shell.repository / "packs").iterdir()}


def whole(shell) -> None:
    assert shell.json("check", "--read-data")["clean"]
    assert (
        shell("export", "vm@2", "ram", "-", PERDURE_STATE_DIR=str(shell.root / "fresh")).stdout
        == (shell.root / "b").read_bytes()
    )


def test_prune_gives_back_and_says_what(pruned):
    before = packs(pruned)
    dry = pruned.json("prune", "--dry-run", "--max-unused", 0)
    assert packs(pruned) == before == set(dry["remove"]) | {each["pack"] for each in dry["rewrite"]} | before
    assert dry["rewrite"] and dry["unused_bytes"] > 0 and "removed_packs" not in dry
    assert "would rewrite" in pruned("prune", "--dry-run", "--max-unused", 0).stdout.decode()
    with (pruned.repository / "leases" / "prune.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process holds" in pruned.error("prune", "--max-unused", 0, code=11)
    done = pruned.json("prune", "--max-unused", 0)
    assert done["rewritten_packs"] and done["freed_bytes"] > 0 and not done["waiting"]
    assert not packs(pruned) & {each["pack"] for each in dry["rewrite"]}
    whole(pruned)
    assert pruned.json("prune", "--max-unused", 0)["removed_packs"] == 0
    assert "0 B freed" in pruned("prune").stdout.decode()
    pruned("key", "export-public", "public.pem")
    assert pruned.json("check", "--public-key", "public.pem")["clean"]


def test_what_is_waited_for_is_said_with_exit_code_11(pruned):
    held = leases.take(pruned.repository / "leases", 1, "writer of VM slow", role=leases.WRITER)
    with held:
        done = pruned.json("prune", "--max-unused", 0, code=11)
        assert done["waiting"][0]["purpose"] == "writer of VM slow" and done["waiting_packs"]
        text = pruned("prune", "--max-unused", 0, "--lock-wait", 0.1, code=11).stdout.decode()
        assert "writer of VM slow, process" in text and "since" in text
    assert pruned.json("prune", "--max-unused", 0)["removed_packs"] == done["waiting_packs"]
    whole(pruned)


def test_mistakes(pruned):
    for wrong in ("101", "-1", "a lot"):
        assert "--max-unused" in pruned.error("prune", f"--max-unused={wrong}", code=2)
    assert pruned.json("prune", "--dry-run", "--max-unused", "unlimited")["rewrite"] == []
    assert pruned.json("prune", "--dry-run", "--max-unused", "0%")["rewrite"]
    assert "--max-rewrite" in pruned.error("prune", "--max-rewrite", "much", code=2)
    assert "--lock-wait" in pruned.error("prune", "--lock-wait", -1, code=2)
    assert pruned.json("prune", "--max-rewrite", 0, "--max-unused", 0)["rewrite"] == []
    assert pruned.json("prune", "--max-rewrite", "unlimited", "--max-unused", 0)["rewritten_packs"]


def test_the_emergency_file_is_there_and_made_again(shell):
    path = shell.repository / reserve.NAME
    assert path.stat().st_size == path.stat().st_blocks * 512 == reserve.BYTES
    path.unlink()
    shell("prune")
    assert path.stat().st_size == reserve.BYTES


def test_rotation_seals_anew_what_was_written_before(pruned):
    before = packs(pruned)
    done = pruned.json("key", "rotate", "--rewrite")
    assert done["epoch"] == 2 and done["rewrite"]["left_packs"] == 0 and done["rewrite"]["rewritten_packs"]
    assert not before & packs(pruned)
    assert all((pruned.repository / "packs" / each).read_bytes()[12:16] == b"\2\0\0\0" for each in packs(pruned))
    whole(pruned)
    assert pruned.json("key", "rotate", "--resume")["rewrite"]["rewritten_packs"] == 0


def test_sealing_anew_goes_on_where_it_was_cut_off(pruned):
    before = packs(pruned)
    with leases.take(pruned.repository / "leases", 1, "writer of VM slow", role=leases.WRITER):
        done = pruned.json("key", "rotate", "--rewrite", code=11)
        assert done["epoch"] == 2 and done["rewrite"]["left_packs"] == len(before)
        text = pruned("key", "rotate", "--resume", code=11).stdout.decode()
        assert "still of earlier epochs" in text and "writer of VM slow" in text
    done = pruned.json("key", "rotate", "--resume")
    assert done["rewrite"]["left_packs"] == 0 and not before & packs(pruned)
    assert pruned.json("key", "list")["epoch"] == 2
    whole(pruned)
