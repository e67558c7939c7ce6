"""VMs to measure: the tests' way to have one, its repository on a disk and not in tmpfs."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("tests", "tests/e2e", "tests/guest")]

from supervised import Supervised  # noqa: E402  the tests' way to have a VM
from test_survival import IN_GUEST  # noqa: E402

MIB = 1 << 20


class Guest:
    """The test guest's image, which scripts/build-guest has made."""

    kernel = ROOT / ".cache" / "guest" / "vmlinuz"
    initrd = ROOT / ".cache" / "guest" / "initrd.img"


@contextlib.contextmanager
def supervised(memory: int, *, qemu: str | None = None, settings: str = "", policy: str = "") -> Iterator[Supervised]:
    """A VM of `memory` MiB that has booted; in_guest.py is in its guest. `qemu` is a program other than that in PATH;
    `settings` are more lines of VM.toml, `policy` more of its policy."""
    if qemu:
        settings = f'qemu = "{qemu}"\n{settings}'
    with tempfile.TemporaryDirectory(prefix="perdure-capture-") as folder:
        repository = Path(folder, "repository")
        vm = Supervised(Guest(), settings=settings, policy=policy, repository=repository, memory=memory * MIB)
        with contextlib.closing(vm):
            vm.tell_hook("nothing")
            vm.boot()
            vm.guest.run(IN_GUEST)
            yield vm
