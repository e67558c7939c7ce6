"""Captures with the guest's file systems frozen, on real QEMU; judged by e2fsprogs on the host."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator

import pytest
from supervised import NAME, Image, Supervised
from test_survival import boot

pytestmark = pytest.mark.qemu

SETTINGS = """\
[[disk]]
name = "files"
file = "files"
capture = true
"""
POLICY = """\
quiesce = "try"
quiesce_seconds = 4
"""
WRITER = """
import glob, signal, subprocess, time
os.makedirs("/files")
subprocess.run(["/bin/busybox", "mount", "-t", "ext4", "/dev/vda", "/files"], check=True)
written = [0]

def write_file():
    name = f"/files/{written[0] % 50}"
    with open(name + "~", "wb") as file:
        file.write(os.urandom(3000))
        os.fsync(file.fileno())
    os.rename(name + "~", name)
    written[0] += 1
    time.sleep(0.002)

work(write_file)

def agent():
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with open(path, "rb") as file:
            words = file.read().split(b"\\0")
        if b"agent" in words and int(path.split("/")[2]) != os.getpid():
            return int(path.split("/")[2])

def frozen_for(seconds, kill=False, leave=False):
    # how long a program waits that writes to a frozen file system, and what is said of that
    freezer = perdure_guest.Freezer(seconds)
    report = os.read(freezer.report, 1000).decode()
    began = time.monotonic()
    if kill:
        os.kill(freezer._pid, signal.SIGKILL)
    if kill or leave:
        freezer.close()
    os.close(os.open("/files/waits", os.O_CREAT | os.O_WRONLY))
    waited = time.monotonic() - began
    if not kill and not leave:
        freezer.close()
    return report, waited
""".replace("\\\\0", "\\0")


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    with contextlib.closing(Supervised(guest_image, settings=SETTINGS, policy=POLICY)) as made:
        subprocess.run(["mkfs.ext4", "-q", made.folder / "files", "32M"], check=True)
        yield made
        print(made.report())


def is_clean(vm: Supervised, number: int) -> bool:
    """Whether the disk of a generation needs no replay of its journal; it is sound then."""
    path = vm.folder / "captured"
    vm.perdure("export", f"{NAME}@{number}", "disk:files", path)
    try:
        facts = subprocess.run(["dumpe2fs", "-h", path], check=True, capture_output=True, text=True).stdout
        if "needs_recovery" in facts:
            return False
        subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
        return True
    finally:
        path.unlink()


def goes_on(vm: Supervised) -> None:
    began = vm.guest.run("written[0]")
    vm.until(lambda: vm.guest.run("written[0]") > began + 3, "the guest writes files")


def test_file_systems_are_frozen_for_the_instant_and_never_stay_so(vm: Supervised) -> None:
    boot(vm)
    vm.guest.run(WRITER)
    goes_on(vm)

    for words in (["--quiesce"], ["--quiesce", "--full"], []):
        made = vm.perdure("snapshot", NAME, *words)
        assert made["quiesced"] == 1
        assert is_clean(vm, made["generation"])
        goes_on(vm)
    assert any(line.startswith("quiesced ") for line in vm.lines("show", f"{NAME}@{made['generation']}"))

    # An agent that hangs: nothing is captured that was to be quiesced, and what the policy wants if that can be is.
    vm.guest.run("os.kill(agent(), signal.SIGSTOP)")
    said = vm.refused("snapshot", NAME, "--quiesce")
    assert f"VM {NAME}: file systems could not be frozen, its agent did not do it within 2 s" in said
    made = vm.perdure("snapshot", NAME)
    vm.run.expect("could not be frozen.*captured without")
    assert made["quiesced"] is None
    assert not is_clean(vm, made["generation"])  # as it is without: the guest had files open and a journal to replay
    goes_on(vm)
    vm.guest.run("os.kill(agent(), signal.SIGCONT)")
    goes_on(vm)  # though it was told twice to freeze
    assert vm.perdure("snapshot", NAME, "--quiesce")["quiesced"] == 1

    # By itself: when time is up, and when nobody is there any more to thaw it.
    report, waited = vm.guest.run("frozen_for(2.0)")
    assert json.loads(report) == {"count": 1, "error": None}
    assert waited > 1.0
    _, waited = vm.guest.run("frozen_for(60.0, leave=True)")
    assert waited < 30.0
    _, waited = vm.guest.run("frozen_for(60.0, kill=True)")
    assert waited < 30.0
    goes_on(vm)
