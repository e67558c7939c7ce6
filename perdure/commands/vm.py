"""Commands about running VMs: `run` is the supervisor, the others talk to one over its control socket."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from base.errors import NotFoundError, UsageError
from base.units import format_size, parse_size
from perdure import places
from perdure.commands.rollback_text import preview_text
from perdure.control import call
from perdure.disks.texts import followed_text, reads_text
from perdure.output import Output, moment, table

CONTROL = "control.sock"


def run(options: Namespace) -> int:
    """`perdure run`"""
    from perdure.supervision.running import run_vm

    return run_vm(options, _output(options))


def status(options: Namespace) -> None:
    """`perdure status`"""
    output = _output(options)
    if options.vm:
        found = call_supervisor(options.vm, "status", {}, output)
        output.result(found, lambda: _status_text(found))
        return
    all_of_them = list(_running())
    output.result({"vms": all_of_them}, lambda: _list_text(all_of_them))


def _running() -> Iterator[dict[str, Any]]:
    """What is known of each running VM: its supervisor's status, or that it has none. Raises what `call` raises."""
    for path in sorted(places.runtime_folder().glob(f"*/{CONTROL}")):
        try:
            yield call(path, "status", {})
        except NotFoundError:
            name = path.parent.name
            pid = _unsupervised(name)
            if pid is not None:
                hint = f"take it over with {takes_over(name)}"
                yield {"vm": name, "state": "unsupervised", "pid": pid, "hint": hint}


def stop(options: Namespace) -> None:
    """`perdure stop`"""
    output = _output(options)
    done = call_supervisor(options.vm, "stop", {"capture": options.capture}, output)
    made = f", captured as {options.vm}@{done['generation']}" if done.get("generation") else ""
    output.result(done, lambda: [f"{options.vm} stopped{made}"])


def reboot(options: Namespace) -> None:
    """`perdure reboot`"""
    output = _output(options)
    done = call_supervisor(options.vm, "reboot", {}, output)
    output.result(done, lambda: [f"{options.vm} rebooted; {_kept_as(done)}"])


def snapshot(options: Namespace) -> None:
    """`perdure snapshot`"""
    output = _output(options)
    wanted = {"tags": options.tag, "full": options.full, "memory": options.memory, "quiesce": options.quiesce}
    done = call_supervisor(options.vm, "snapshot", wanted, output)
    output.result(done, lambda: [_snapshot_text(done), *reads_text(done["disks"])])


def rollback(options: Namespace) -> None:
    """`perdure rollback`"""
    output = _output(options)
    vm, at, _ = options.point.rpartition("@")
    if not at:
        raise UsageError(f"{options.point!r}: write VM@N, so that it is clear which VM is rolled back")
    names = ("point", "discard", "boot", "lazy", "memory_only", "force", "dry_run")
    arguments = {**{name: getattr(options, name) for name in names}, "disks": options.disk}
    done = call_supervisor(vm, "rollback", arguments, output)
    output.result(done, lambda: preview_text(done) if options.dry_run else [_rollback_text(done)])


def regions(options: Namespace) -> None:
    """`perdure regions VM`, `regions mark VM ADDRESS SIZE`, `regions unmark VM ADDRESS SIZE`"""
    output = _output(options)
    words = options.words
    if len(words) == 4 and words[0] in ("mark", "unmark"):
        verb, vm, *numbers = words
        try:
            address, count = (parse_size(each) for each in numbers)
        except ValueError as error:
            raise UsageError(str(error)) from error
        arguments: dict[str, Any] = {"address": address, "size": count}
        if verb == "mark":
            arguments["name"] = options.name
        found = call_supervisor(vm, verb, arguments, output)
    elif len(words) == 1:
        found = call_supervisor(words[0], "regions", {}, output)
    else:
        raise UsageError("write `regions VM`, `regions mark VM ADDRESS SIZE` or `regions unmark VM ADDRESS SIZE`")
    output.result(found, lambda: _regions_text(found["regions"]))


def call_supervisor(vm: str, command: str, arguments: dict[str, Any], output: Output) -> dict[str, Any]:
    if not vm or "/" in vm or vm.startswith("."):
        raise UsageError(f"{vm!r} is no VM name")
    folder = places.vm_runtime(vm)
    if not folder.exists():
        raise NotFoundError(f"VM {vm} is not running: start it with perdure run")
    try:
        return call(folder / CONTROL, command, arguments, output.progress(), output.note)
    except NotFoundError as error:
        pid = _unsupervised(vm) if isinstance(error.__cause__, OSError) else None  # else the supervisor has said it
        if pid is None:
            raise
        raise NotFoundError(f"VM {vm} runs unsupervised (process {pid}): take it over with {takes_over(vm)}") from error


def takes_over(vm: str) -> str:
    """The command that takes a running VM over."""
    return "perdure attach" if (places.vm_runtime(vm) / "attached").exists() else "perdure run"


def _unsupervised(vm: str) -> int | None:
    """The QEMU that a dead supervisor has left running."""
    from vm.folder import RuntimeFolder
    from vm.qemu import Qemu

    qemu = Qemu.find(RuntimeFolder(vm, places.vm_runtime(vm)))
    if qemu is None:
        return None
    with qemu:
        return qemu.pid


def _kept_as(done: dict[str, Any]) -> str:
    return f"what it had is {done['vm']}@{done['captured']}" if done.get("captured") else "what it had was not captured"


def _rollback_text(done: dict[str, Any]) -> str:
    vm = done["vm"]
    from_there = f"{vm}@{done['generation']}"
    how = f"resumed at {from_there}" if done["resumed"] else f"boots with the persistent memory of {from_there}"
    return f"{vm} {how}, and goes on as {vm}@{done['goes_on_as']}; {_kept_as(done)}"


def _snapshot_text(done: dict[str, Any]) -> str:
    return (
        f"{done['vm']}@{done['generation']} {done['id'][:12]}: {format_size(done['region_bytes'])} kept, "
        f"{format_size(done['dirty_bytes'])} changed, {format_size(done['stored_bytes'])} stored "
        f"in {done['seconds']:.2f} s, paused {done['pause_ms']:.1f} ms"
    )


def _list_text(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        (each["vm"], each["state"], each.get("pid", "-"), each.get("generation") or "-", each.get("tracker", "-"))
        for each in found
    ]
    return table(("VM", "STATE", "PID", "GENERATION", "TRACKER"), rows)


def _status_text(found: dict[str, Any]) -> Iterator[str]:
    if found.get("attached"):
        attached = found["attached"]
        reboots = {"hold": "held", "pass": "not held"}[attached["reboots"]]
        yield f"attached     {attached['socket']}, reboots {reboots}"
    for key in ("vm", "state", "pid", "generation", "repository", "accelerator", "tracker", "full", "agent"):
        if found.get(key) is not None:
            yield f"{key:<12} {found[key]}"
    if found.get("next_capture"):
        due = found["next_capture"]
        yield f"next capture {moment(due['at'])}{' (full)' if due['full'] else ''}"
    if found.get("write_back"):
        yield from _dirty_text(found["write_back"])
    for name, region in found.get("regions", {}).items():
        yield (
            f"region       {name}: {format_size(region['kept_bytes'])} kept of {format_size(region['size'])}, "
            f"{region['mode']}"
        )
    for disk in found.get("disks", []):
        from perdure.commands.disks import state_text

        yield f"disk         {disk['disk']}: {disk['path']}, {state_text(disk)}"
        yield from followed_text(disk)
    if found.get("lazy"):
        yield from _lazy_text(found["lazy"])
    for warning in found.get("warnings", []):
        yield f"warning      {warning}"


def _lazy_text(lazy: dict[str, Any]) -> Iterator[str]:
    known = "" if lazy["planned_all"] else " so far"
    yield (
        f"restoring    {lazy['percent']} % resident, {format_size(lazy['resident_bytes'])} of "
        f"{format_size(lazy['planned_bytes'])}{known}, {format_size(lazy['prefetched_bytes'])} fetched ahead"
    )
    yield (
        f"faults       {lazy['faults']}, half within {lazy['fault_us_p50']} us, 99 % within {lazy['fault_us_p99']} us, "
        f"the slowest {lazy['fault_us_max']} us"
    )
    if lazy["problem"]:
        yield f"waiting      {lazy['problem']}"


def _dirty_text(found: dict[str, Any]) -> Iterator[str]:
    """How much is dirty, and what is done about it, for people."""
    yield (
        f"dirty        {format_size(found['dirty_bytes'])}, a capture now would pause the guest for about "
        f"{found['expected_pause_ms']:.0f} ms"
    )
    if found["state"] != "on":
        yield f"write-back   {found['state']}"
        return
    yield (
        f"write-back   {format_size(found['drain_rate'])}/s of {format_size(found['dirty_rate'])}/s written, "
        f"{format_size(found['stored_ahead_bytes'])} stored ahead"
    )


def _regions_text(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            f"{each['address']:#x}-{each['address'] + each['size'] - 1:#x}",
            each["class"],
            format_size(each["size"]),
            "-" if not each.get("modified") else _local(each["modified"]),
            each["permissions"],
            each.get("owner") or "-",
            each.get("name") or each["device"],
        )
        for each in found
    ]
    return table(("RANGE", "CLASS", "SIZE", "LAST MODIFIED", "PERM", "OWNER", "NAME"), rows, right="SIZE")


def _local(seconds: float) -> str:
    return moment(datetime.fromtimestamp(seconds, UTC).isoformat())


def _output(options: Namespace) -> Output:
    return Output(options.json, options.quiet)
