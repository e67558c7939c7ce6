"""The held reboot on real guests: SeaBIOS and OVMF, several in a row, scrubbed, and by a second supervisor."""

import asyncio
import json
import os
import shutil
import subprocess

import pytest

from base import extents
from restore.scrub import scrub
from vm.config import Disk, FirmwareFiles
from vm.firmware import find, variables
from vm.hold import (
    HELD_STATES,
    HOLD_EVENTS,
    Cause,
    Hold,
    classify,
    hold_on_reset,
    pending,
    resume_after_hold,
)
from vm.monitor import DeadlineError, Monitor
from vm.qemu import Qemu

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SECRET = b"secret-7f3a9c-secret-7f3a9c-secret-7f3a9c\n"
REBOOTS = (
    "echo booted\nsecret=secret-7f3a9c; yes $secret-$secret-$secret | head -n 10000 > /file\necho ready; reboot -f\n"
)
OUT_AND_REBOOT = b"\xba\xf8\x03%b\xba\xf9\x0c\xb0\x06\xee\xf4\xeb\xfd" % b"".join(
    b"\xb0%c\xee" % each for each in b"booted\n"
)
"""A boot sector: mov dx, 0x3F8; for each letter: mov al, letter; out dx, al; then 6 to port 0xCF9, and hlt."""
REBOOT_ROUNDS = int(os.environ.get("PERDURE_TEST_REBOOTS", "20"))
BOOT_SECONDS = 120


async def next_hold(monitor, act):
    """What the guest is held for after `act`."""
    with monitor.events(*HOLD_EVENTS) as events:
        await act
        hold = classify(await events.next(BOOT_SECONDS))
    assert await monitor.query_status() in HELD_STATES
    return hold


def content(file):
    """All of a backing file's pages that are there."""
    return file.path.read_bytes()


def resets_by_the_guest(place):
    """How many QEMU has carried out, by its event journal."""
    events = map(json.loads, place.folder.journal_output.read_text().splitlines())
    return sum(each.get("event") == "RESET" and each["data"]["guest"] for each in events)


@pytest.mark.parametrize(
    ("firmware", "machine", "rounds"), [("seabios", "q35", 3), ("seabios", "pc", 2), ("ovmf", "q35", 2)]
)
def test_a_guest_that_reboots_itself_is_held_scrubbed_and_goes_on(place, judge, firmware, machine, rounds):
    async def run():
        async with await Monitor.connect(process) as monitor:
            act = monitor.cont()
            for booted in range(1, rounds + 1):
                assert await next_hold(monitor, act) == Hold(Cause.REBOOT, "guest-reset")
                assert resets_by_the_guest(place) == 0
                assert place.console().count("ready") == booted
                ram = place.memory.files["ram"]
                assert SECRET in content(ram)
                descriptor = ram.open()
                try:
                    assert scrub(descriptor, str(ram.path), extents.normalise([(0, ram.size)])) > 10 * MIB
                finally:
                    os.close(descriptor)
                assert content(ram).count(0) == ram.size
                assert SECRET[:-1] not in await judge(monitor, 0, 256 * MIB)
                act = resume_after_hold(monitor)
            await act
            await place.said("booted", rounds + 1)

    with place.launch(place.describe(REBOOTS, firmware=firmware, machine=machine)) as process:
        asyncio.run(run())


def test_every_reboot_that_is_held_is_the_guests_own(place):
    """Firmware's would be held before the guest had booted again. PERDURE_TEST_REBOOTS says how many rounds."""
    boot = place.root / "boot"
    boot.write_bytes((OUT_AND_REBOOT.ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))
    description = place.describe(disks=(Disk("boot", boot, format="raw", readonly=True),))

    async def run():
        async with await Monitor.connect(process) as monitor:
            act = monitor.cont()
            for booted in range(1, REBOOT_ROUNDS + 1):
                assert await next_hold(monitor, act) == Hold(Cause.REBOOT, "guest-reset")
                assert (place.console().count("booted"), resets_by_the_guest(place)) == (booted, 0)
                act = resume_after_hold(monitor)
            await act

    with place.launch(description) as process:
        asyncio.run(run())


def test_with_its_shadow_left_seabios_resets_once_more(place):
    """Why resume_after_hold removes it; if this fails, SeaBIOS or QEMU have changed, and that may go."""

    async def reset(monitor):
        await monitor.execute("set-action", reboot="reset")
        with monitor.events("RESET") as resets:
            await monitor.execute("system_reset")
            await resets.next(BOOT_SECONDS)
        await hold_on_reset(monitor)
        await monitor.cont()

    async def run():
        async with await Monitor.connect(process) as monitor:
            await next_hold(monitor, monitor.cont())
            assert (await next_hold(monitor, reset(monitor))).cause is Cause.REBOOT
            assert place.console().count("booted") == 1

    with place.launch(place.describe(REBOOTS)) as process:
        asyncio.run(run())


def test_a_guest_that_is_paused_by_the_user_is_not_reset(place):
    """system_reset of a running guest is held like its own reboot."""

    async def run():
        async with await Monitor.connect(process) as monitor:
            await monitor.cont()
            await place.said("booted")
            with monitor.events("SHUTDOWN") as events:
                await monitor.execute("system_reset")
                assert classify(await events.next(BOOT_SECONDS)) == Hold(Cause.REBOOT, "host-qmp-system-reset")
            await resume_after_hold(monitor)
            await place.said("booted", 2)

    with place.launch(place.describe("echo booted; while true; do sleep 1; done\n")) as process:
        asyncio.run(run())


POWEROFF = "poweroff -f\n"
PANIC = """\
for device in /sys/bus/pci/devices/*; do
  [ "$(cat $device/vendor) $(cat $device/device)" = "0x1b36 0x0011" ] || continue
  echo 1 > $device/enable
  set -- $(cat $device/resource)
  devmem $1 8 1 # what the driver does when the kernel panics
done
"""


@pytest.mark.parametrize(
    ("script", "extra", "hold"),
    [
        (POWEROFF, (), Hold(Cause.POWEROFF, "guest-shutdown")),
        (PANIC, ("-device", "pvpanic-pci"), Hold(Cause.PANIC, "guest-panic")),
    ],
    ids=["poweroff", "panic"],
)
def test_poweroff_and_panic_are_held_too_and_can_go_on(place, script, extra, hold):
    async def run():
        async with await Monitor.connect(process) as monitor:
            assert await next_hold(monitor, monitor.cont()) == hold
            assert pending(await monitor.query_status(), place.folder.journal_output.read_bytes()) == hold
            await resume_after_hold(monitor)
            await place.said("booted", 2)

    with place.launch(place.describe("echo booted\n" + script, extra=extra)) as process:
        asyncio.run(run())


def test_a_hold_that_nobody_heard_is_found_by_the_next_supervisor(place):
    async def begin():
        async with await Monitor.connect(process) as monitor:
            await monitor.cont()

    async def heard():
        async with asyncio.timeout(BOOT_SECONDS):
            while b'"SHUTDOWN"' not in place.folder.journal_output.read_bytes():
                await asyncio.sleep(0.02)

    async def take_over(found):
        async with await Monitor.connect(found) as monitor:
            await hold_on_reset(monitor)
            journal = place.folder.journal_output.read_bytes
            assert pending(await monitor.query_status(), journal()) == Hold(Cause.REBOOT, "guest-reset")
            # And again, as if this supervisor had died after its reset and before it let the guest go on.
            await monitor.execute("set-action", reboot="reset")
            with monitor.events("RESET") as resets:
                await monitor.execute("system_reset")
                await resets.next(BOOT_SECONDS)
            assert pending(await monitor.query_status(), journal()) == Hold(Cause.REBOOT, "guest-reset")
            assert await next_hold(monitor, resume_after_hold(monitor)) == Hold(Cause.REBOOT, "guest-reset")
            assert place.console().count("ready") == 2
            await resume_after_hold(monitor)
            assert pending(await monitor.query_status(), journal()) is None

    with place.launch(place.describe(REBOOTS)) as process:
        asyncio.run(begin())
        asyncio.run(heard())
    with Qemu.find(place.folder) as found:
        asyncio.run(take_over(found))


def test_resets_are_held_again_after_a_resume_that_failed(place):
    async def run():
        async with await Monitor.connect(process) as monitor:
            await next_hold(monitor, monitor.cont())
            refused = monitor.execute

            async def execute(command, /, **arguments):
                if command == "system_reset":
                    raise DeadlineError("VM demo: it takes too long")
                return await refused(command, **arguments)

            monitor.execute = execute
            with pytest.raises(DeadlineError, match="takes too long"):
                await resume_after_hold(monitor)
            monitor.execute = refused
            # With reboot=reset QEMU would reset the guest here, instead of asking for a shutdown once more.
            with monitor.events("SHUTDOWN", "RESET") as events:
                await monitor.execute("system_reset")
                assert (await events.next(BOOT_SECONDS)).name == "SHUTDOWN"

    with place.launch(place.describe(REBOOTS)) as process:
        asyncio.run(run())


def test_uefi_variables_are_the_vms_own_copy(place):
    firm = find("demo", "ovmf")
    assert firm.code is not None and firm.template is not None
    code, template = place.root / "code.fd", place.root / "vars.fd"
    shutil.copy(firm.code, code)
    shutil.copy(firm.template, template)
    before = template.read_bytes()
    description = place.describe("echo booted\npoweroff -f\n", firmware=FirmwareFiles(code, template))

    async def run():
        async with await Monitor.connect(process) as monitor:
            assert (await next_hold(monitor, monitor.cont())).cause is Cause.POWEROFF

    with place.launch(description) as process:
        asyncio.run(run())
        process.kill()
    from base.disk import Disk

    own = variables("demo", find("demo", description.firmware), place.root, Disk())
    assert own is not None and own.read_bytes() != before
    assert template.read_bytes() == before
    listed = subprocess.run(["stat", "-c", "%a", str(own)], capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "600"
