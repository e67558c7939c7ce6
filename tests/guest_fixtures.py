"""What the tests of the guest's file share: the file as a module, and a real agent between real sockets.

The host's side is vm.protocol and vm.regions, so that the two ends are tested against each other.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from vm import protocol
from vm.regions import Device, Regions, TagRefusedError

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def load(path):
    """A module from its file, as the guest has it: by the file's name alone."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


guest = load(ROOT / "guest" / "perdure_guest.py")


class Host:
    """The host's end of the port: a region table that requests change, and what it was asked."""

    def __init__(self, connection, regions):
        self.connection, self.regions = connection, regions
        self.asked = []
        self._lines = guest.LineReader(protocol.LINE_BYTES_MAX)

    def receive(self):
        """The requests that have arrived by now."""
        new = []
        with contextlib.suppress(BlockingIOError):
            while data := self.connection.recv(65536, socket.MSG_DONTWAIT):
                new += [protocol.decode_request(line) for line in self._lines.feed(data) if line]
        self.asked += new
        return new

    def answer(self, request):
        try:
            self.connection.sendall(self._reply(request))
        except TagRefusedError as error:
            self.connection.sendall(protocol.encode_refused(request.id, error.kind, str(error)))

    def _reply(self, request):
        match request:
            case protocol.Hello():
                return protocol.encode_welcome(request.id, protocol.Welcome("vm", None, self.regions.entries()))
            case protocol.Query():
                return protocol.encode_regions(request.id, self.regions.entries(), request.start)
            case protocol.Mark():
                self.regions = self.regions.mark(request.address, request.size, request.name, request.owner, 1.0)
            case protocol.Unmark():
                self.regions = self.regions.unmark(request.address, request.size)
            case protocol.Checkpoint():
                return protocol.encode_committed(request.id, protocol.Committed(3, "c0ffee"))
        return protocol.encode_done(request.id)


class Rig:
    """An agent, its socket, and hosts that come and go. Time is a number that tests set."""

    def __init__(self, path, monkeypatch):
        self.path = path
        monkeypatch.setattr(guest, "SOCKET_PATH", str(path))
        self.listener = guest.listen(str(path))
        self.now, self.ports, self.prepared = 100.0, [], []
        self.renewed = []
        self.agent = guest.Agent(self.listener, self._open, self.prepared.append, lambda: self.now, self.renewed.append)
        self.regions = Regions.of("vm", [Device("pm0", 1 << 32, 64 * MIB)])
        self.clients = []

    def _open(self):
        if not self.ports:
            raise FileNotFoundError("no port")
        return self.ports.pop(0)

    def host(self):
        ours, theirs = socket.socketpair()
        self.ports.append(ours.detach())
        self.now += 10  # the agent looks again
        return Host(theirs, self.regions)

    def greeted(self):
        """A host that has answered the greeting."""
        host = self.host()
        self.until(host.receive)
        host.answer(host.asked[0])
        prepared = len(self.prepared)
        self.until(lambda: len(self.prepared) > prepared)
        return host

    def client(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        self.clients.append(connection)
        return connection

    def until(self, condition):
        """Let the agent work until something holds."""
        deadline = time.monotonic() + 20
        while not (result := condition()):
            assert time.monotonic() < deadline, "it never came"
            self.agent.step(0.01)
        return result

    def push(self, connection, data):
        """Send more than a socket holds, while the agent reads."""
        view = memoryview(data)
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[connection.send(view, socket.MSG_DONTWAIT) :]
            self.agent.step(0)

    def reply(self, client):
        """The next line that a client gets."""
        return json.loads(self.until(lambda: _line(client)))

    def close(self):
        self.agent.close()
        self.listener.close()
        for client in self.clients:
            client.close()


def _line(connection):
    with contextlib.suppress(BlockingIOError):
        data = connection.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if b"\n" in data:
            return connection.recv(data.index(b"\n") + 1)
    return None


def ask(client, request_id, do, **fields):
    client.sendall(guest.encode({"v": 1, "id": request_id, "do": do, **fields}))


@contextlib.contextmanager
def serving(rig, tmp_path, monkeypatch):
    """An agent and a host that work in a thread, and a file in place of the device DAX device."""
    stop = threading.Event()
    host = rig.greeted()
    file = tmp_path / "dax0.0"
    file.touch()
    os.truncate(file, 62 * MIB)
    start = (1 << 32) + 2 * MIB
    monkeypatch.setattr(guest, "dax_devices", lambda: [guest.DaxDevice(str(file), start, start + 62 * MIB, 2 * MIB)])
    state = SimpleNamespace(rig=rig, host=host, file=file, start=start, before_answer=lambda _: None)

    def serve():
        while not stop.is_set():
            rig.agent.step(0.01)
            for request in host.receive():
                state.before_answer(request)
                host.answer(request)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield state
    finally:
        stop.set()
        thread.join()
