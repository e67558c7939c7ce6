"""VMs of one host that share a repository; and what their policies say is not to be captured."""

from __future__ import annotations

import contextlib

import pytest
from supervised import MIB, NAME, SECONDS, GuestGoneError, GuestShell, Image, Run, Supervised
from test_survival import IN_GUEST, boot, content, go_down

pytestmark = pytest.mark.qemu

SIZE = 16 * MIB
POLICY = """\
write_back = "on"
capture_on_panic = false
capture_on_shutdown = false
"""


def test_what_two_vms_hold_alike_is_stored_once_and_one_that_ends_is_captured_only_if_that_is_wanted(
    guest_image: Image,
) -> None:
    """Two supervisors of one host, at the same time, with one repository and one budget."""
    with contextlib.closing(Supervised(guest_image, policy=POLICY)) as vm:
        described = (vm.folder / "VM.toml").read_text().partition("[hooks]")[0]
        for old, new in ((f'"{NAME}"', '"other"'), ("judge.sock", "judge2.sock"), ("test.sock", "test2.sock")):
            assert old in described
            described = described.replace(old, new)
        (vm.folder / "other.toml").write_text(described)
        boot(vm)
        other = Run([*command(vm), str(vm.folder / "other.toml")], vm.environment, vm.folder)
        vm.runs.insert(0, other)
        with GuestShell(vm.folder / "test2.sock") as second:
            second.wait_ready(SECONDS)
            for guest in (vm.guest, second):
                guest.run(IN_GUEST)
                guest.run(f"write('kept', {SIZE}, 1)")
            made = [vm.perdure("snapshot", name) for name in (NAME, "other")]
            assert made[0]["stored_bytes"] > SIZE > 16 * made[1]["stored_bytes"]
            full = [vm.perdure("snapshot", name, "--full") for name in (NAME, "other")]
            assert full[1]["stored_bytes"] < full[0]["stored_bytes"]  # the same kernel and programs
            assert (vm.state / "run" / ".background").exists()
            for name in (NAME, "other"):
                vm.perdure("export", f"{name}@latest", "pm0", vm.folder / name)
                assert content(1, SIZE) in (vm.folder / name).read_bytes()
            before = vm.perdure("log")
            for guest in (vm.guest, second):
                guest.run(f"write('kept', {SIZE}, 2)")
            with contextlib.suppress(GuestGoneError):
                second.start("poweroff()")
            go_down(vm, "panic()")
            assert (vm.run.ended(), other.ended()) == (0, 0)
            assert vm.perdure("log") == before


def command(vm: Supervised) -> list[str]:
    """`perdure run`, as the VM's own."""
    return list(map(str, vm.run.process.args[:-1]))  # type: ignore[index]  # it was given as a list
