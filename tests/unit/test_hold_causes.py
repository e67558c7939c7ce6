"""What a SHUTDOWN event means, heard live or found in the event journal by a later supervisor."""

import json

import pytest

from vm.hold import Cause, Hold, classify, pending
from vm.monitor import Event


def line(name: str, **data: object) -> bytes:
    message = {"timestamp": {"seconds": 1795463782, "microseconds": 653627}, "event": name}
    return json.dumps(message | ({"data": data} if data else {})).encode() + b"\r\n"


REBOOT = line("SHUTDOWN", guest=True, reason="guest-reset") + line("STOP")
POWEROFF = line("SHUTDOWN", guest=True, reason="guest-shutdown") + line("STOP")


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("guest-reset", Cause.REBOOT),
        ("host-qmp-system-reset", Cause.REBOOT),
        ("guest-shutdown", Cause.POWEROFF),
        ("guest-panic", Cause.PANIC),
        ("host-qmp-quit", Cause.TERMINATION),
        ("host-signal", Cause.TERMINATION),
        ("something-new", Cause.TERMINATION),
    ],
)
def test_causes(reason, cause):
    assert classify(Event("SHUTDOWN", {"guest": True, "reason": reason}, 0.0)) == Hold(cause, reason)


def test_a_panic_is_an_event_of_its_own():
    panicked = Event("GUEST_PANICKED", {"action": "pause"}, 0.0)
    assert classify(panicked) == pending("guest-panicked", line("GUEST_PANICKED", action="pause") + line("STOP"))
    assert classify(panicked) == Hold(Cause.PANIC, "guest-panic")


def test_the_last_shutdown_in_the_journal_counts():
    greeting = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n{"return": {}}\r\n'
    journal = greeting + line("RESUME") + REBOOT + line("RESET", guest=False) + line("RESUME") + POWEROFF
    assert pending("shutdown", journal) == Hold(Cause.POWEROFF, "guest-shutdown")
    assert pending("running", journal) is None
    assert pending("paused", journal) is None


def test_a_hold_whose_supervisor_died_after_the_reset_is_still_one():
    reset = line("RESET", guest=False, reason="host-qmp-system-reset")
    assert pending("prelaunch", REBOOT + reset) == Hold(Cause.REBOOT, "guest-reset")
    assert pending("prelaunch", REBOOT + reset + line("RESUME")) is None
    assert pending("prelaunch", b"") is None  # never ran


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, b'e": "SHUTDOWN"}\r\n', b"[1]\n\xff\xfe{}\n"])
def test_what_is_not_an_event_is_passed_over(damage):
    assert pending("shutdown", damage + REBOOT + b'{"error": {"class": "x"}}\n{"timestamp"') == Hold(
        Cause.REBOOT, "guest-reset"
    )
    assert pending("shutdown", damage) is None
