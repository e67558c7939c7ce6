"""--lock-wait: exit code 11 with who holds it, and readers that never wait."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_fixtures import image

from base import locks
from store.catalog import INDEX_FOLDER


@pytest.fixture
def index(shell):
    shell.write("a", image(1, 5))
    shell("import", "vm", "ram=a")
    (found,) = (shell.root / "state" / "repositories").glob(f"*/{INDEX_FOLDER}")
    return found


def test_waiting_is_bounded_and_readers_do_not_wait(shell, index):
    with locks.held(index / "writing", "holding on", 0):
        message = shell.error("--lock-wait", 0.1, "import", "vm", "ram=a", code=11)
        assert all(each in message for each in (f"process {os.getpid()}", "holding on since", "--lock-wait"))
        assert "holding on" in shell.error("forget", "vm@1", code=11, PERDURE_LOCK_WAIT="0")
        assert [each["generation"] for each in shell.json("log", "--lock-wait", 0)["generations"]] == [1]
        assert shell("export", "vm@1", "ram", "-", "--lock-wait", 0).stdout == image(1, 5)
    with locks.held(index / "gate", "examining", 0):
        assert "examining since" in shell.error("log", "--lock-wait", 0, code=11)
    assert "number of seconds" in shell.error("log", "--lock-wait", "soon", code=2)
    assert shell.json("import", "vm", "ram=a", "--lock-wait", 0)["generation"] == 2


def test_imports_of_one_vm_at_once(shell):
    shell.write("a", image(1, 5))
    shell.write("b", image(2, 50))
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda name: shell.json("import", "vm", f"ram={name}"), "abab"))
    assert sorted(each["generation"] for each in made) == [1, 2, 3, 4]
    for name, each in zip("abab", made, strict=True):
        found = shell("export", f"vm@{each['generation']}", "ram", "-").stdout
        assert found == (shell.root / name).read_bytes()
