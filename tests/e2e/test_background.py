"""What a supervisor does without being asked, by the policy of VM.toml."""

import signal

import pytest
from supervised import SECONDS, Supervised

POLICY = """\
forget_after_capture = true
capture_on_terminate = "full"
"""
SCHEDULE = """\
[[schedule]]
every = "2s"
tags = ["regular"]
"""


@pytest.fixture
def vm(guest_image):
    made = Supervised(guest_image, policy=POLICY, settings=SCHEDULE)
    yield made
    made.close()


def test_captures_by_schedule_are_followed_by_forgetting_and_sigterm_makes_a_full_one(vm):
    vm.perdure("policy", "set", "demo", "--keep-last", "2")
    run = vm.boot()
    due = vm.status()["next_capture"]
    assert due.pop("at") and due == {"full": False, "tags": ["regular"]}
    run.expect(r"demo@1 .*\(schedule\)")
    run.expect(r"demo@4 .*\(schedule\)")
    run.expect(r"forgotten by policy: demo@2")
    assert all(each["cause"] == "schedule" and each["tags"] == ["regular"] for each in vm.log())
    run.process.send_signal(signal.SIGTERM)
    made = run.expect(r"demo@(\d+) .*\(terminate\)")
    assert run.ended() == 130
    newest = vm.log()[-1]
    assert newest["full"] and newest["generation"] == int(made[1])
    assert vm.guest.run("6 * 7") == 42

    described = vm.folder / "VM.toml"
    described.write_text(described.read_text().replace(SCHEDULE, ""))
    vm.boot()
    vm.perdure("snapshot", "demo")
    done = vm.perdure("rollback", f"demo@{newest['generation']}")  # no rule keeps it once there is one more
    assert done["resumed"]
    vm.guest.wait_ready(SECONDS)
    assert vm.guest.run("6 * 7") == 42
    vm.until(lambda: len(vm.log()) == 2, "the rule has its way then")
    assert [each["cause"] for each in vm.log()] == ["before rollback", "rollback"]
