"""A VM whose supervisor is gone: what commands say of it, and that they tell it from one that does not run."""

import os
import socket

import msgspec
import pytest

from vm.identity import Identity
from vm.qemu import Record


@pytest.fixture
def left(bare):
    """What a supervisor that was killed leaves in a VM's folder, its QEMU being this process."""
    folder = bare.root / "state" / "run" / "vm"
    folder.mkdir(mode=0o700, parents=True)
    here = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{here}/control.sock")
    os.close(here)
    me = Identity.of(os.getpid())
    record = Record(me.pid, me.start_ticks, me.boot, ("qemu",))
    (folder / "qemu.json").write_bytes(msgspec.json.encode(record))
    return folder


@pytest.mark.parametrize("words", [("status",), ("stop",), ("snapshot",), ("regions",)])
def test_a_vm_that_runs_on_is_not_said_not_to_run(bare, left, words):
    assert left.exists()
    problem = bare.error(*words, "vm", code=1)
    assert f"runs unsupervised (process {os.getpid()}): take it over with perdure run" in problem


def test_it_is_listed_as_long_as_its_process_runs(bare, left):
    [listed] = bare.json("status")["vms"]
    assert (listed["vm"], listed["state"], listed["pid"]) == ("vm", "unsupervised", os.getpid())
    (left / "qemu.json").write_bytes(msgspec.json.encode(Record(os.getpid(), 0, "another boot", ("qemu",))))
    assert bare.json("status") == {"vms": []}
    assert "is not running" in bare.error("status", "vm", code=1)
