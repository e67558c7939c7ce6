"""Which tracker follows a VM's memory, and why. The reason is shown to the user.

`probe_facts` looks at the machine, at the QEMU process, and at what QEMU said of itself (plain data: this module
speaks no QMP); `choose` is a pure decision from those facts. The asynchronous write protection of userfaultfd sees
what QEMU's process writes into guest memory, by processor or by system call. It is not chosen where anything else
writes there: another process that maps the memory, a device that masters the bus, or a driver that keeps pages pinned.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.errors import ConflictError
from capture.trackers import Kind
from vm.injection import open_files
from vm.pagemap import has_pagemap_scan

Wanted = Literal["auto", "userfaultfd", "scan"]

# Prefixes of QOM types and of network back ends whose devices write to guest memory behind the page tables of QEMU.
_FOREIGN_DEVICES = ("vfio-", "vhost-user-", "vhost-vdpa-", "vhost-scsi", "pvrdma", "x-pci-proxy-dev")
_FOREIGN_NETWORKS = ("vhost-user", "vhost-vdpa")
# nvme:// and the libblkio drivers keep guest memory mapped for DMA. Source: QEMU, qapi/block-core.json, BlockdevDriver.
_FOREIGN_BLOCK_DRIVERS = (
    *("nvme", "io_uring", "nvme-io_uring"),
    *("virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"),
)
_FOREIGN_FILES = ("/dev/vfio/", "/dev/iommu", "/dev/vhost-vdpa", "/dev/vhost-scsi", "/dev/udmabuf", "/dev/infiniband/")
_DISCARDING_DEVICES = ("virtio-balloon", "virtio-mem", "hv-balloon")

_FIRST_KERNEL = (6, 7)
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What matters of the host's kernel; `probe` it, or make one up."""

    release: str
    machine: str
    pagemap_scan: bool

    @classmethod
    def probe(cls) -> Kernel:
        """This machine's: PAGEMAP_SCAN by trying it, since distributions port features back."""
        return cls(platform.release(), platform.machine(), has_pagemap_scan())


@dataclass(frozen=True, slots=True)
class Facts:
    """What a choice depends on."""

    kernel: Kernel
    devices: tuple[str, ...] = ()
    """QOM types of QEMU's devices."""
    networks: tuple[str, ...] = ()
    """Types of its network back ends."""
    block_drivers: tuple[str, ...] = ()
    """Drivers of its block nodes."""
    direct_io: bool = False
    """Some block node has cache.direct=on."""
    files: tuple[str, ...] = ()
    """What its descriptors are, as in /proc/PID/fd."""
    access: str | None = None
    """Why we may not trace QEMU; None if we may."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A tracker and how it has to be used. `reason` is one sentence without a final stop."""

    kind: Kind
    reason: str
    direct_io: bool
    discards: bool


def probe_facts(
    pid: int,
    *,
    devices: Iterable[str],
    block_nodes: Iterable[Mapping[str, Any]],
    networks: str,
    kernel: Kernel | None = None,
) -> Facts:
    """Gather the facts about the QEMU process `pid`. Raises OSError if it is gone.

    `devices`: the `type` of each entry of `qom-list` of /machine/peripheral, /machine/peripheral-anon and
    /machine/unattached, with or without `child<...>` around it. `block_nodes`: the answer of `query-named-block-nodes`.
    `networks`: the text of HMP's `info network` (QMP does not tell the back ends' types).
    """
    nodes = list(block_nodes)
    return Facts(
        kernel=kernel or Kernel.probe(),
        devices=tuple(sorted({each.removeprefix("child<").removesuffix(">") for each in devices})),
        networks=tuple(sorted(set(re.findall(r"\btype=([\w-]+)", networks)))),
        block_drivers=tuple(sorted({str(node.get("drv", "")) for node in nodes})),
        direct_io=any(bool(node.get("cache", {}).get("direct")) for node in nodes),
        files=_open_files(pid),
        access=access_problem(pid),
    )


def choose(facts: Facts, wanted: Wanted = "auto") -> Choice:
    """The tracker for a VM. Raises ConflictError if `wanted` cannot be had here."""
    direct_io = facts.direct_io
    discards = any(each.startswith(_DISCARDING_DEVICES) for each in facts.devices)
    if wanted == "scan":
        return Choice("scan", "the configuration asks for it", direct_io, discards)
    problem = obstacle(facts)
    if problem is None:
        kernel = facts.kernel.release
        reason = "the configuration asks for it" if wanted == "userfaultfd" else f"Linux {kernel} has PAGEMAP_SCAN"
        return Choice("userfaultfd", reason, direct_io, discards)
    if wanted == "userfaultfd":
        raise ConflictError(f"the userfaultfd tracker cannot be used: {problem}; choose tracker auto or scan")
    return Choice("scan", problem, direct_io, discards)


def difference(before: Choice, now: Choice) -> str | None:
    """What is other by now in how a VM has to be followed, in words; None if nothing is."""
    found = []
    if now.kind != before.kind:
        found.append(f"it is followed by {now.kind} now: {now.reason}")
    if now.direct_io != before.direct_io:
        found.append(f"{'a' if now.direct_io else 'no'} disk has cache.direct=on by now")
    if now.discards != before.discards:
        found.append(f"{'a' if now.discards else 'no'} device takes memory from the guest by now")
    return ", ".join(found) or None


def obstacle(facts: Facts) -> str | None:
    """Why QEMU's accesses to memory cannot be governed, the most lasting reason first; None if they can."""
    problem = kernel_obstacle(facts.kernel)
    if problem is not None:
        return problem
    for device in facts.devices:
        if device.startswith(_FOREIGN_DEVICES):
            return f"device {device} writes to guest memory by itself"
    for network in facts.networks:
        if network in _FOREIGN_NETWORKS:
            return f"network back end {network} writes to guest memory from another process"
    for driver in facts.block_drivers:
        if driver in _FOREIGN_BLOCK_DRIVERS:
            return f"block driver {driver} writes to guest memory by DMA"
    for file in facts.files:
        if file.startswith(_FOREIGN_FILES):
            return f"QEMU has {file} open, through which devices write to guest memory"
    return facts.access


def kernel_obstacle(kernel: Kernel) -> str | None:
    """The same as far as it depends on this machine alone."""
    if kernel.machine != "x86_64":
        return f"userfaultfd is used on x86-64 only, this machine is {kernel.machine}"
    return None if kernel.pagemap_scan else _no_pagemap_scan(kernel.release)


def _no_pagemap_scan(release: str) -> str:
    version = re.match(r"(\d+)\.(\d+)", release)
    if version is not None and (int(version[1]), int(version[2])) >= _FIRST_KERNEL:
        return f"PAGEMAP_SCAN does not work here, though Linux {release} should have it"
    short = version[0] if version is not None else release
    return f"Linux {short} has no PAGEMAP_SCAN ({_FIRST_KERNEL[0]}.{_FIRST_KERNEL[1]} does)"


def _open_files(pid: int) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(open_files(pid).values())))
    except PermissionError:  # then `access` is a problem, too
        return ()


def access_problem(pid: int) -> str | None:
    """Why ptrace is not allowed, and with it reading QEMU's memory; None if it is. Asked without touching QEMU: opening
    its memory takes the same permission. Raises OSError if it is gone.

    Source: ptrace(2), "Ptrace access mode checking"; proc_pid_mem(5).
    """
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        return f"QEMU (pid {pid}) may not be traced ({error.strerror}): {tracing_remedy(_yama_scope())}"
    return None


def tracing_remedy(scope: int) -> str:
    """What lets a process trace another one of its user. `scope`: kernel.yama.ptrace_scope, 0 where there is no Yama.

    Source: Linux, Documentation/admin-guide/LSM/Yama.rst.
    """
    if scope == 0:
        return "run perdure as root (CAP_SYS_PTRACE) or as QEMU's user"
    if scope == 1:
        return "kernel.yama.ptrace_scope is 1: run perdure as root (CAP_SYS_PTRACE), or set it to 0 with sysctl"
    if scope == 2:
        return "kernel.yama.ptrace_scope is 2: run perdure as root (CAP_SYS_PTRACE)"
    return f"kernel.yama.ptrace_scope is {scope}: until the host boots without that, nobody may"


def _yama_scope() -> int:
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):
        return 0
