"""What is read out of a QEMU that somebody else launched: its actions, who listens to it, its devices, its mappings."""

import os
import socket
import threading

import pytest

from base.errors import ConflictError, NotFoundError
from perdure.supervision.resuming import as_made
from vm import actions, foreign
from vm.mappings import place_at
from vm.naming import Names, device_path


@pytest.mark.parametrize(
    ("arguments", "reboot", "shutdown", "panic"),
    [
        ([], "reset", "poweroff", "shutdown"),
        (["-no-shutdown"], "reset", "pause", "shutdown"),
        (["-no-reboot", "--no-shutdown"], "shutdown", "pause", "shutdown"),
        (["-no-shutdown", "-action", "shutdown=poweroff,panic=none"], "reset", "poweroff", "none"),
        (["-name", "-no-reboot", "-action"], "shutdown", "poweroff", "shutdown"),
    ],
)
def test_what_qemu_does_by_itself(arguments, reboot, shutdown, panic):
    assert actions.of(["qemu", *arguments]) == {"reboot": reboot, "shutdown": shutdown, "panic": panic}


def test_who_hears_events_is_who_is_connected_to_a_monitor_of_the_control_mode():
    words = ["qemu", "-monitor", "unix:a", "-qmp", "unix:b", "-chardev", "socket,id=charmonitor,path=c"]
    words += ["-mon", "chardev=charmonitor,id=monitor,mode=control", "-mon", "chardev=plain"]
    there = {"compat_monitor0": "unix:a", "compat_monitor1": "unix:b,server=on", "charmonitor": "unix:c", "plain": "vc"}
    chardevs = [{"label": label, "filename": name} for label, name in there.items()]
    assert actions.listeners(words, chardevs) == 2
    chardevs[2]["filename"] = "disconnected:unix:c,server=on"
    assert actions.listeners(words, chardevs) == 1


def test_devices_are_the_same_however_they_are_written_and_in_the_order_in_which_qemu_makes_them():
    ours = ['-device {"driver":"nvdimm","id":"n","memdev":"m"}', "-device pvpanic-pci"]
    theirs = ["-device pvpanic-pci", "-device nvdimm,memdev=m,id=n", "-drive file=x,if=none,id=d"]
    assert as_made(ours) == as_made(theirs) == ["-device pvpanic-pci", "-device nvdimm,id=n,memdev=m"]
    disk = ['-device {"driver":"virtio-blk-pci","drive":"disk-a","share-rw":true}']
    assert as_made(disk) == as_made(["-device driver=virtio-blk-pci,share-rw=on,drive=other"])
    assert as_made(["-device nvdimm,id=n", "-device a"]) != as_made(["-device a", "-device nvdimm,id=n"])
    assert as_made(["-device {broken", "-vga std"]) == ["-vga std", "-device {broken"]


def test_names_are_ours_unless_qemu_has_others():
    names = Names({"pc.ram": "ram"}, {"root": "#block12"}, {"root": "/machine/unattached/device[3]"})
    assert (names.region("pc.ram"), names.region("pm0")) == ("ram", "pm0")
    assert (names.node("root"), names.node("data")) == ("#block12", "disk-data")
    assert names.device("data") == "/machine/peripheral/drive-data"
    assert names.disk_at("/machine/unattached/device[3]") == "root"
    assert names.disk_at("/machine/peripheral/drive-data") == "data"
    assert names.disk_at("/machine/peripheral/net0") is None
    assert device_path({"qdev": "/machine/peripheral/drive-data/virtio-backend"}) == "/machine/peripheral/drive-data"
    assert device_path({"qdev": "scsi0"}) == "/machine/peripheral/scsi0"
    assert device_path({}) == ""


def test_what_is_mapped_at_an_address():
    maps = (
        b"7f00000000-7f00200000 rw-s 00001000 00:1b 77                         /dev/shm/a b (deleted)\n"
        b"7f00200000-7f00400000 rw-p 00000000 00:00 0 \n"
    )
    shared, private = place_at(maps, 0x7F00100000), place_at(maps, 0x7F00200000)
    assert shared is not None
    assert (shared.shared, shared.inode, shared.mapping.offset) == (True, 77, 0x1000)
    assert (shared.device, shared.name) == (os.makedev(0, 0x1B), "/dev/shm/a b (deleted)")
    assert private is not None
    assert (private.shared, private.inode, private.mapping.size) == (False, 0, 2 << 20)
    assert place_at(maps, 0x7F00400000) is None


@pytest.fixture
def listener(tmp_path):
    """A socket at which somebody says what he is told to, to one client."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        connected = []

        def begin(greeting):
            def answer():
                connected.append(server.accept()[0])
                connected[0].sendall(greeting)

            thread = threading.Thread(target=answer)
            thread.start()
            return path, thread

        yield begin
        for each in connected:
            each.close()


def test_what_greets_like_qemu_and_then_speaks_otherwise_is_refused_too(listener):
    path, thread = listener(b'{"QMP": {}}\r\nwelcome\r\n')
    with pytest.raises(ConflictError, match="does not speak QMP"):
        foreign.find("web", path)
    thread.join()


def test_a_socket_that_is_not_of_a_qemu_that_is_free_is_refused_in_one_line(tmp_path, listener):
    with pytest.raises(NotFoundError, match="nobody listens"):
        foreign.find("web", tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ConflictError, match="is no socket"):
        foreign.find("web", tmp_path / "file")
    path, thread = listener(b"SSH-2.0-x\r\n")
    with pytest.raises(ConflictError, match="does not speak QMP"):
        foreign.find("web", path)
    thread.join()
    with pytest.raises(ConflictError, match="one client at a time"):  # nobody takes the connection
        foreign.find("web", path, timeout_s=0.05)
