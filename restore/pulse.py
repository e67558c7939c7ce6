"""Whether a page server that is there still does something: one that hangs is no better than one that has ended.

A server counts its turns in the claim record (`BEAT`), of which it does one a second where there is nothing to do, and
this looks at them from outside. It is believed to hang where it was stopped (SIGSTOP, a debugger) for `STOPPED_S` while
somebody waits for memory, as the kernel says of QEMU's userfaultfd; and where it has done no turn for `SILENT_S`,
whatever it does instead, which a machine under load does not make of any process; but for one that waits for a disk
(state D): the next one would wait for it too. Only time counts in which somebody looked: what stopped the supervisor
too is no sign. Belongs to one thread.
"""

from __future__ import annotations

import time

from restore import claims as record
from restore.claims import Claims
from vm.identity import state_of
from vm.userfaultfd import waiting_faults

STOPPED_S, SILENT_S = 2.0, 20.0
"""A QEMU that does not answer is given up after 30 s: a server that hangs is replaced before."""
_LOOK_MOST_S = 0.5


class Pulse:
    """Of one page server after the other."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._seen = (0, 0)
        self._looked = self._silent_s = 0.0

    def hangs(self, qemu: int) -> str:
        """What is the matter with the server that serves the QEMU process `qemu`, in words; empty if nothing is. To be
        asked again and again."""
        now = time.monotonic()
        since, self._looked = now - self._looked, now
        seen = self._claims.word(record.SERVER), self._claims.word(record.BEAT)
        if seen != self._seen or self._claims.word(record.PHASE) != record.SERVING:
            self._seen, self._silent_s = seen, 0.0
            return ""
        self._silent_s += min(since, _LOOK_MOST_S)
        if self._silent_s < STOPPED_S:
            return ""
        pid, state = seen[0], state_of(seen[0])
        if self._silent_s >= SILENT_S and state != "D":
            return f"(process {pid}) has done nothing for {SILENT_S:g} s"
        if state in ("T", "t") and waiting_faults(qemu):
            return f"(process {pid}) was stopped, and memory is waited for"
        return ""
