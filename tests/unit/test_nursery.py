"""A nursery of page servers: each Standby has the pidfd of its own server, whoever asks when."""

import os
import select
import signal
import threading

import pytest

from restore import nursery as module
from restore.nursery import Nursery

SECONDS = 60


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.1)


def ended(standbys) -> list:
    """Those whose process ends now, as soon as there is one."""
    poll = select.poll()
    for each in standbys:
        poll.register(each.pidfd, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(SECONDS * 1000)}
    return [each for each in standbys if each.pidfd in ready]


def stop(nursery) -> None:
    signal.pidfd_send_signal(nursery._pidfd, signal.SIGSTOP)
    os.waitid(os.P_PIDFD, nursery._pidfd, os.WSTOPPED | os.WNOWAIT)


def test_each_of_many_threads_gets_the_server_that_it_was_made():
    with Nursery.fork() as nursery:
        born, together = [], threading.Barrier(8)

        def ask():
            together.wait()
            born.append(nursery.bear())

        for _ in range(10):
            threads = [threading.Thread(target=ask) for _ in range(8)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        while born:
            each = born[-1]
            each.pipe.close()  # its server ends with that, and no other
            assert ended(born) == [each]
            born.pop()
            os.close(each.pidfd)


@pytest.mark.usefixtures("impatient")
def test_one_that_has_not_answered_in_time_is_not_asked_again():
    """Its answer would come, and be taken for the next one's."""
    with Nursery.fork() as nursery:
        stop(nursery)
        assert nursery.bear() is None
        signal.pidfd_send_signal(nursery._pidfd, signal.SIGCONT)
        assert nursery.bear() is None


@pytest.mark.usefixtures("impatient")
def test_one_that_never_answers_keeps_nobody_from_ending():
    with Nursery.fork() as nursery:
        stop(nursery)
        assert nursery.bear() is None
