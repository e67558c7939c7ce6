"""Whether a VM's memory can still be followed in the way that was chosen: disks and devices come and go.

QEMU tells of what is unplugged, and not of what is plugged in, so it is asked: before each capture, before each stop of
one, and now and then where dirty pages are stored ahead. After the last of these looks bits are cleared in a stop only.
What a device that is plugged in between the two writes past QEMU's page tables is in the next generation, not in this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from base.errors import VirtualMachineError
from capture.choice import Facts, probe_facts
from vm.monitor import COMMAND_SECONDS, Monitor
from vm.qemu import Qemu

if TYPE_CHECKING:
    from perdure.supervision.machine import Machine
    from perdure.supervision.supervisor import Supervisor


async def facts_of(qemu: Qemu, monitor: Monitor, timeout_s: float = COMMAND_SECONDS) -> Facts:
    """What it depends on whether this QEMU's memory can be followed, and served. Raises VirtualMachineError."""
    paths = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
    nodes, networks, *lists = await asyncio.gather(  # one after the other they are a millisecond each
        monitor.execute("query-named-block-nodes", timeout_s=timeout_s, flat=True),
        monitor.human("info network", timeout_s=timeout_s),
        *(monitor.execute("qom-list", timeout_s=timeout_s, path=path) for path in paths),
    )
    listed = [each["type"] for some in lists for each in some]
    try:
        return probe_facts(qemu.pid, devices=listed, block_nodes=nodes, networks=networks)
    except OSError as error:
        raise VirtualMachineError(
            f"VM {qemu.vm}: cannot look at QEMU (process {qemu.pid}): {error.strerror}"
        ) from error


async def look(machine: Machine, timeout_s: float = COMMAND_SECONDS) -> Facts | None:
    """The same where something depends on it: None if all is looked at anyway."""
    return None if machine.tracking.choice.kind == "scan" else await facts_of(machine.qemu, machine.monitor, timeout_s)


def go_by(machine: Machine, facts: Facts | None) -> str | None:
    """Blocking: follow memory by what was seen; what has changed, for the user, None if nothing has. Raises
    StorageError."""
    return None if facts is None else machine.tracking.go_by(facts, machine.journal)


async def renew(supervisor: Supervisor, machine: Machine, timeout_s: float = COMMAND_SECONDS) -> None:
    """Look, and say what has changed: what was stored ahead is of no use then. Under the supervisor's lock.

    Raises VirtualMachineError, StorageError.
    """
    facts = await look(machine, timeout_s)
    changed = await supervisor.in_store(lambda: go_by(machine, facts))
    if changed is not None:
        await supervisor.draining.drop()
        supervisor.say(f"{supervisor.vm}: {changed}: the next capture looks at everything")
