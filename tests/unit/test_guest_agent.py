"""The guest's agent on real sockets: greeting, asking again, and clients and hosts that send anything."""

import contextlib
import os
import socket

import pytest
from guest_fixtures import Rig, ask, guest

from vm import protocol

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path, monkeypatch):
    made = Rig(tmp_path / "run" / "agent.sock", monkeypatch)
    yield made
    made.close()


def test_devices_are_prepared_before_clients_are_served(rig):
    client = rig.client()
    ask(client, 5, "query")
    host = rig.host()
    rig.until(host.receive)
    assert [type(each) for each in host.asked] == [protocol.Hello]
    assert len(host.asked[0].boot_id) == 36
    for _ in range(3):
        rig.agent.step(0.01)
    assert host.receive() == []
    host.answer(host.asked[0])
    rig.until(host.receive)
    assert [[each.device for each in regions] for regions in rig.prepared] == [["pm0"]]
    host.answer(host.asked[1])
    assert rig.reply(client)["id"] == 5


def test_a_greeting_that_is_too_long_for_a_line_is_read_to_its_end(rig):
    for number in range(600):
        rig.regions = rig.regions.mark((1 << 32) + 2 * MIB + 8192 * number, 4096, "n" * 100, "me", 1.0)
    host = rig.host()
    while not rig.prepared:
        for request in rig.until(lambda: host.receive() or (rig.prepared and [None])):
            if request is not None:
                host.answer(request)
    assert len(host.asked) > 1
    assert len(rig.prepared[0]) == 601


def test_answers_find_their_clients_and_owners_are_the_kernels(rig):
    host = rig.greeted()
    first, second = rig.client(), rig.client()
    ask(first, 11, "mark", address=(1 << 32) + 2 * MIB, size=4096, name="a", owner="somebody else")
    rig.until(host.receive)
    ask(second, 12, "query")
    rig.until(host.receive)
    for request in reversed(host.asked[1:]):
        host.answer(request)
    assert "regions" in rig.reply(second)
    assert rig.reply(first) == {"v": 1, "id": 11, "ok": True}
    assert host.asked[1].owner.startswith(f"pid {os.getpid()} ")


def test_a_lost_answer_is_asked_for_again(rig):
    host, client = rig.greeted(), rig.client()
    ask(client, 1, "query")
    ask(client, 2, "checkpoint")
    rig.until(lambda: host.receive() and len(host.asked) == 3)
    rig.now += 4.9
    rig.agent.step(0)
    assert host.receive() == []
    rig.now += 0.2
    rig.until(host.receive)
    rig.now += 55.1
    rig.until(lambda: host.receive() and len(host.asked) == 6)
    assert sorted(each.id for each in host.asked[3:]) == [1, 1, 2]


def test_a_new_host_is_greeted_and_asked_again(rig):
    host, client = rig.greeted(), rig.client()
    ask(client, 9, "query")
    rig.until(host.receive)
    host.connection.close()
    rig.until(lambda: rig.agent._port is None)
    other = rig.host()
    rig.until(other.receive)
    assert [type(each) for each in other.asked] == [protocol.Hello]
    other.answer(other.asked[0])
    rig.until(other.receive)
    assert other.asked[1].id == 9
    other.answer(other.asked[1])
    assert rig.reply(client)["ok"]


def test_half_a_line_of_a_predecessor_ends_where_the_agent_starts(rig):
    host = rig.host()
    assert (
        rig.until(lambda: host.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if rig.ports == [] else b"")
        == b"\n"
    )


def test_a_resumed_guest_asks_again_at_once(rig):
    host, client = rig.greeted(), rig.client()
    ask(client, 9, "checkpoint", name="x")
    rig.until(host.receive)
    host.connection.sendall(protocol.encode_resumed(4))
    rig.until(host.receive)
    assert host.asked[1] == host.asked[2]
    host.answer(host.asked[2])
    assert rig.reply(client)["generation"] == 3


def test_a_guest_that_went_on_from_an_instant_gets_random_bytes_and_the_time(rig):
    host = rig.greeted()
    host.connection.sendall(protocol.encode_resumed(4))  # its persistent memory only
    host.connection.sendall(b'{"v":1,"event":"resumed","generation":5,"seed":"no hex","time":1}\n')
    host.connection.sendall(b'{"v":1,"event":"resumed","generation":5,"seed":"00","time":1,"addresses":[7]}\n')
    host.connection.sendall(protocol.encode_resumed(6, bytes(range(64)), 1.5e9, "copy", [("old", "new")]))
    rig.until(lambda: rig.renewed)
    assert rig.renewed == [(bytes(range(64)), 1.5e9, 6, "copy", [("old", "new")])]


def test_garbage_from_the_host_stops_nothing(rig):
    host, client = rig.greeted(), rig.client()
    ask(client, 9, "query")
    rig.until(host.receive)
    for garbage in (
        b"\x00\xff\n",
        b"[]\n",
        b"x" * 200_000 + b"\n",
        b"[" * 60_000 + b"\n",
        b'{"id":[]}\n',
        b'{"id":true}\n',
    ):
        rig.push(host.connection, garbage)
    host.connection.sendall(b'{"v":1,"id":77,"ok":true}\n{"event":{}}\n')
    host.answer(host.asked[1])
    assert rig.reply(client)["ok"]


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"nonsense\n", "malformed"),
        (b'{"id":0}\n', "malformed"),
        (b'{"id":true,"do":"query"}\n', "malformed"),
        (b'{"id":3,"do":"mark","size":NaN}\n', "malformed"),
        (b'{"id":3,"do":"mark","size":1e999}\n', "malformed"),
        (b"y" * 100_000 + b"\n", "malformed"),
    ],
)
def test_garbage_from_a_client_is_answered(rig, sent, kind):
    host, client, other = rig.greeted(), rig.client(), rig.client()
    client.sendall(sent)
    assert rig.reply(client)["kind"] == kind
    ask(other, 4, "query")
    rig.until(host.receive)
    assert [each.id for each in host.asked[1:]] == [4]


def test_a_request_that_grows_beyond_a_line_is_refused(rig):
    rig.greeted()
    client = rig.client()
    ask(client, 3, "mark", name="\u00e9" * 10)
    client.sendall(b'{"id":4,"do":"mark","name":"' + "\u00e9".encode() * 20_000 + b'"}\n')
    assert rig.reply(client)["kind"] == "limit"


def test_one_client_cannot_fill_the_agent(rig):
    host, client = rig.greeted(), rig.client()
    for number in range(1, 18):
        ask(client, number, "query")
    assert rig.reply(client)["kind"] == "limit"
    rig.until(lambda: host.receive() or len(host.asked) == 17)
    client.setblocking(False)
    with pytest.raises(OSError, match=r"reset|Broken pipe"):  # it never reads: the agent lets go of it
        rig.until(lambda: _send_much(client))


def _send_much(client):
    with contextlib.suppress(BlockingIOError):
        client.send(b"x\n" * 10_000)
    return False


def test_an_id_is_one_clients(rig):
    host, client, other = rig.greeted(), rig.client(), rig.client()
    ask(client, 8, "query")
    rig.until(host.receive)
    ask(client, 8, "query")  # asked again: it is on its way
    ask(other, 8, "query")
    assert rig.reply(other)["kind"] == "malformed"
    assert host.receive() == []
    host.answer(host.asked[1])
    assert rig.reply(client)["ok"]


def test_a_client_that_left_is_forgotten(rig):
    host, client = rig.greeted(), rig.client()
    ask(client, 8, "query")
    rig.until(host.receive)
    client.close()
    rig.until(lambda: not rig.agent._clients)
    rig.now += 100
    rig.agent.step(0.01)
    assert host.receive() == []
    host.answer(host.asked[1])  # late
    other = rig.client()
    ask(other, 8, "query")
    rig.until(host.receive)
    assert len(host.asked) == 3


def test_only_one_agent_and_only_for_root(rig):
    assert rig.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(guest.PersistenceError, match="running already"):
        guest.listen(str(rig.path))
    rig.listener.close()
    guest.listen(str(rig.path)).close()  # what a dead one left is in nobody's way
