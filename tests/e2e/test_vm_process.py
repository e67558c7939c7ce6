"""QEMU as a process: what it inherits, who finds it again, what is said when it does not start."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import pytest

from base.disk import Disk
from base.errors import ConflictError, VirtualMachineError
from vm import qemu
from vm.hold import hold_on_reset
from vm.memory import Memory
from vm.monitor import Monitor
from vm.qemu import Qemu, Record

pytestmark = pytest.mark.qemu

TICKS = "i=0; while true; do i=$((i + 1)); echo tick $i; sleep 0.1; done\n"


def until(condition, seconds=60):
    """Wait for a condition; gives its result."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
    return found


def ticks(place):
    return place.console().count("tick")


def test_a_guest_boots_in_a_process_that_inherits_nothing(place):
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)

    async def run():
        async with await Monitor.connect(process) as monitor:
            assert await monitor.query_status() == "prelaunch"
            await monitor.cont()
            await place.said("tick 1")
            assert await monitor.query_status() == "running"
            await monitor.stop()
            assert await monitor.query_status() == "paused"

    try:
        with place.launch(place.describe(TICKS)) as process:
            asyncio.run(run())
            assert os.getsid(process.pid) == process.pid
            opened = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
            assert f"pipe:[{os.fstat(read_end).st_ino}]" not in opened
            assert os.readlink(f"/proc/{process.pid}/fd/0") == "/dev/null"
            assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
            assert str(place.memory.files["ram"].path) in Path(f"/proc/{process.pid}/maps").read_text()
            assert b"perdure-demo" in Path(f"/proc/{process.pid}/comm").read_bytes()
    finally:
        os.close(read_end)
        os.close(write_end)
    assert stat.S_IMODE(place.folder.path.stat().st_mode) == 0o700
    for path in place.folder.path.iterdir():
        if not path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_journal_hears_events_from_the_first_on(place):
    async def run():
        async with await Monitor.connect(process) as monitor:
            await monitor.cont()
            await monitor.stop()

    with place.launch(place.describe(TICKS)) as process:
        asyncio.run(run())
        text = until(lambda: place.folder.journal_output.read_text().partition('"STOP"')[0])
        assert text.index('"return"') < text.index('"RESUME"')
        end = qemu.journal_end(place.folder)
        asyncio.run(run())
        later = until(lambda: place.folder.journal_output.read_bytes()[end:].partition(b'"STOP"')[0])
        qemu.trim_journal(place.folder, end)
        assert place.folder.journal_output.read_bytes().startswith(bytes(end) + later)


SUPERVISOR = textwrap.dedent("""
    import asyncio, sys
    from pathlib import Path
    import conftest
    from vm.monitor import Monitor

    async def run():
        monitor = await Monitor.connect(process)
        await monitor.cont()
        print("launched", process.pid, flush=True)
        await asyncio.sleep(600)

    image = conftest.GuestImage(*map(Path, sys.argv[1:5]))
    place = conftest.Place("demo", image, Path(sys.argv[5]))
    process = place.launch(place.describe(sys.argv[6]))
    asyncio.run(run())
""")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_guest_survives_its_supervisor(place, number):
    image = place.image
    arguments = [str(each) for each in (image.kernel, image.initrd, image.busybox, image.packed, place.root, TICKS)]
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    with supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline().split()[1])
        until(lambda: ticks(place))
        os.killpg(supervisor.pid, number)  # as a terminal does for Ctrl-C
        assert supervisor.wait(30) != 0
    before = ticks(place)
    until(lambda: ticks(place) > before + 2)
    found = Qemu.find(place.folder)
    assert found is not None and found.pid == pid and found.alive()
    assert found.record.argv[1:3] == ("-name", "guest=demo,process=perdure-demo")

    async def take_over():
        async with await Monitor.connect(found) as monitor:
            await hold_on_reset(monitor)
            assert await monitor.query_status() == "running"

    with found:
        asyncio.run(take_over())
        memory = Memory.existing("demo", place.folder.memory, {"ram": 256 << 20})
        assert memory.files["ram"].path.stat().st_blocks > 0
        with pytest.raises(ConflictError, match=f"VM demo runs already, in process {pid}"):
            Qemu.launch(place.folder, ["/bin/true"], Disk())
        found.kill()
        assert not found.alive()
    assert Qemu.find(place.folder) is None


def test_another_process_with_the_pid_is_not_taken_for_qemu(place):
    with place.launch(place.describe()) as process:
        record = msgspec.json.decode(place.folder.process.read_bytes(), type=Record)
        for wrong in (
            msgspec.structs.replace(record, start_ticks=record.start_ticks + 1),
            msgspec.structs.replace(record, boot="00000000-0000-0000-0000-000000000000"),
            msgspec.structs.replace(record, pid=4194304 + 1),
        ):
            place.folder.process.write_bytes(msgspec.json.encode(wrong))
            assert Qemu.find(place.folder) is None
        place.folder.process.write_bytes(msgspec.json.encode(record))
        with Qemu.find(place.folder) as found:
            assert found.pid == process.pid


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_without_a_record_the_process_is_found_before_it_listens(place, content):
    async def connect():
        await (await Monitor.connect(process)).disconnect()

    with place.launch(place.describe()) as process:
        place.folder.process.unlink()
        if content is not None:
            place.folder.process.write_bytes(content)
        # The kernel closes what is not inherited, which is what a launch waits for, before it shows the new arguments.
        with until(lambda: Qemu.find(place.folder)) as found:
            assert found.record.identity == process.record.identity
            asyncio.run(connect())


def failure(process):
    async def run():
        with pytest.raises(VirtualMachineError) as caught:
            await Monitor.connect(process)
        return str(caught.value)

    return asyncio.run(run())


def test_a_bad_argument_is_reported_in_qemus_own_words(place):
    with place.launch(place.describe(extra=("-device", "no-such-device"))) as process:
        message = failure(process)
    assert message.startswith("VM demo: QEMU ended with status 1: ")
    assert "'no-such-device' is not a valid device model name" in message
    assert "\n" not in message


def test_a_program_that_is_not_there_or_not_qemu(place):
    with pytest.raises(VirtualMachineError, match="VM demo: there is no program no-such-qemu: install QEMU"):
        place.launch(place.describe(qemu="no-such-qemu"))
    place.memory.release()
    place.folder.create()
    with pytest.raises(VirtualMachineError, match="VM demo: cannot start /nowhere/qemu: No such file"):
        Qemu.launch(place.folder, ["/nowhere/qemu"], Disk())
    assert not place.folder.process.exists()
    with Qemu.launch(
        place.folder, ["/bin/sh", "-c", "echo first; echo second; echo third; echo last; exit 3"], Disk()
    ) as process:
        assert failure(process) == "VM demo: QEMU ended with status 3: second; third; last"
    with pytest.raises(VirtualMachineError, match="has no machine type q34"):
        qemu.resolve_machine("demo", qemu.find_binary("demo", "qemu-system-x86_64"), "q34")


def test_a_launch_that_cannot_be_recorded_leaves_no_process(place):
    class Full(Disk):
        pid = 0

        def step(self, operation, _path):
            if operation == "rename":
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                self.pid = int(children[-1])
                raise OSError(28, "No space left on device")

    disk = Full()
    with pytest.raises(OSError, match="No space"):
        Qemu.launch(place.folder, ["/bin/sleep", "1000"], disk)
    assert disk.pid and not Path(f"/proc/{disk.pid}").exists()
    assert not place.folder.process.exists()


def test_every_command_ends_when_qemu_dies_or_refuses(place):
    async def run():
        monitor = await Monitor.connect(process)
        with pytest.raises(VirtualMachineError, match=r"VM demo: QEMU refused `no-such-command`: .*has not been found"):
            await monitor.execute("no-such-command")
        with monitor.events("SHUTDOWN") as events:
            waiting = asyncio.create_task(events.next())
            await asyncio.sleep(0)
            process.kill()
            with pytest.raises(VirtualMachineError, match=r"VM demo: QEMU was killed by SIGKILL.*waiting for an event"):
                await asyncio.wait_for(waiting, 30)
        await asyncio.wait_for(monitor.wait_lost(), 30)
        with pytest.raises(VirtualMachineError, match=r"VM demo: .*waiting for the answer to `stop`"):
            await monitor.stop()
        await monitor.disconnect()
        await monitor.disconnect()

    with place.launch(place.describe()) as process:
        asyncio.run(run())


def test_a_hanging_qemu_is_noticed_in_time(place):
    async def run():
        monitor = await Monitor.connect(process)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(
                VirtualMachineError, match=r"VM demo: QEMU did not give the answer to `stop` within 0\.2 s"
            ):
                await monitor.execute("stop", timeout_s=0.2)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert await monitor.query_status() == "prelaunch"  # the late answer disturbs nothing
        await monitor.disconnect()

    with place.launch(place.describe()) as process:
        asyncio.run(run())


def test_a_second_session_is_told_that_there_is_one(place):
    async def run():
        async with await Monitor.connect(process):
            with pytest.raises(VirtualMachineError, match=r"VM demo: .* another program is connected to it"):
                await Monitor.connect(process, timeout_s=0.5)
        async with await Monitor.connect(process) as monitor:
            assert await monitor.query_status() == "prelaunch"

    with place.launch(place.describe()) as process:
        asyncio.run(run())


def test_a_guest_that_was_stopped_in_a_session_that_is_lost_goes_on_without_one(place):
    async def run():
        async with await Monitor.connect(process) as monitor:
            await monitor.cont()
            await monitor.stop()
            assert monitor.stopped
        process.let_go_on()
        async with await Monitor.connect(process) as monitor:
            while await monitor.query_status() != "running":
                assert process.alive()

    with place.launch(place.describe()) as process:
        asyncio.run(asyncio.wait_for(run(), 60))


def test_a_monitor_whose_socket_is_gone_is_named(place):
    async def run():
        async with await Monitor.connect(process):
            process.folder.monitor.unlink()
        with pytest.raises(
            VirtualMachineError, match=rf"process {process.pid}\) does not listen at .*; end it, and the"
        ):
            await Monitor.connect(process, timeout_s=0.1)

    with place.launch(place.describe()) as process:
        asyncio.run(run())


def test_a_qemu_that_has_let_go_listens_nowhere_also_where_it_leaves_that_to_its_end(place):
    """VNC's socket is open until the last thread has taken down the memory."""
    path = place.root / "vnc"
    much = '{"qom-type":"memory-backend-ram","id":"much","size":805306368,"prealloc":true}'

    async def run():
        async with await Monitor.connect(process) as monitor:
            with socket.socket(socket.AF_UNIX) as viewer:
                viewer.connect(str(path))
            await monitor.execute("quit")
            await monitor.wait_lost()
            assert process.let_go(60)
            with socket.socket(socket.AF_UNIX) as viewer, pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                viewer.connect(str(path))
            assert not process.folder.monitor.exists() and not process.folder.agent.exists()

    with place.launch(place.describe(extra=("-vnc", f"unix:{path}", "-object", much))) as process:
        asyncio.run(run())


def test_the_guest_channel_and_disks_are_there(place, tmp_path):
    raw, qcow2 = tmp_path / "a,b.raw", tmp_path / "c.qcow2"
    raw.write_bytes(b"content of the raw disk".ljust(1 << 20, b"\0"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "2M"], check=True)
    from vm.config import Disk as DiskEntry

    disks = (DiskEntry("one", raw, cache="none", readonly=True), DiskEntry("two", qcow2, format="qcow2"))

    async def run():
        async with await Monitor.connect(process) as monitor:
            listed = {each["node-name"]: each for each in await monitor.execute("query-named-block-nodes", flat=True)}
            assert listed["disk-one"]["cache"]["direct"] and listed["disk-one"]["ro"]
            assert not listed["disk-two"]["cache"]["direct"] and not listed["disk-two"]["ro"]
            assert listed["disk-two"]["image"]["virtual-size"] == 2 << 20
            [port] = [each for each in await monitor.execute("query-chardev") if each["label"] == "agent"]
            assert not port["frontend-open"]
            with socket.socket(socket.AF_UNIX) as agent:
                agent.connect(str(place.folder.agent))

    with place.launch(place.describe(disks=disks)) as process:
        asyncio.run(run())


def test_a_log_is_cut_to_its_last_half(tmp_path):
    log = tmp_path / "console.log"
    log.write_bytes(bytes(range(100)))
    qemu.trim_log(log, 100)
    assert len(log.read_bytes()) == 100
    qemu.trim_log(log, 50)
    assert log.read_bytes() == bytes(range(75, 100))
    qemu.trim_log(tmp_path / "none", 50)
