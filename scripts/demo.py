"""The demo: what a guest tags survives its reboots, power loss and rollback; what it does not tag survives nothing.

Started by scripts/demo. Everything is done with the command `perdure`, as a user would, and everything that is shown
is checked by others than Perdure: by the guest's own program (tests/guest/demo_program.py says what it writes to the
console and when), and by a judge that reads all of the guest's memory (demo_judge.py).

Ends with 0 if everything held, 1 at the first thing that did not, 130 or 143 if it is interrupted; in each case
nothing of it is left running or lying about.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from demo_judge import REGION, Seen, program
from demo_stage import NAME, SIGNALS, NotHeldError, Stage, set_up

SECRET_COPIES = program.SECRET_SIZE // len(program.secret_text("00"))
FRAME_MAX = 1 << 20
"""No frame of a pack is as long: so far at most lies a damaged byte from the offset that check names."""


def holds(condition: object, otherwise: str) -> None:
    """Raises NotHeldError."""
    if not condition:
        raise NotHeldError(otherwise)


def holds_verified(said: dict[str, dict[str, Any]], counter: int) -> dict[str, Any]:
    """The guest itself has verified its data; that event."""
    event = said.get("verified", {})
    holds(event.get("counter") == counter, f"the guest verified counter {event.get('counter')}, not {counter}")
    return event


def holds_before_boot(seen: Seen, counter: int) -> None:
    """The data is there, whole, in the state that the guest takes to the next counter, and the secret is not."""
    state = f"data of counter {seen.counter} (first damaged page: {seen.damaged})"
    holds(
        (seen.counter, seen.damaged) == (counter - 1, None), f"before the boot to counter {counter}, there was {state}"
    )
    for found in (seen.secrets_by_qemu, seen.secrets_in_files):
        holds(found == 0, f"before the boot to counter {counter}, the secret was in memory {found} times")


def shown(step: str, text: str) -> None:
    """One thing that held."""
    print(f"({step}) {text}", flush=True)


class Demo:
    """The steps, in order, and the times that they took."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.times: dict[str, float] = {}

    def run(self) -> None:
        """All of it. Raises NotHeldError."""
        began = time.monotonic()
        self.reboot_from_inside()
        self.reboot_from_outside()
        self.lose_power()
        self.roll_back()
        self.check()
        self.damage()
        self.times["the demo"] = time.monotonic() - began
        self.print_table()

    def reboot_from_inside(self) -> None:
        """(a): the guest's program tags, fills, and reboots the guest."""
        stage, began = self.stage, time.monotonic()
        stage.perdure("init")
        stage.start()
        said = stage.guest()
        holds("filled" in said and "rebooting" in said, f"the guest did not fill and reboot, but {', '.join(said)}")
        verified = holds_verified(said, 1)
        holds_before_boot(stage.seen_before_boot(), 1)
        tags = [each["size"] for each in stage.perdure("regions", NAME)["regions"] if each["class"] == "persistent"]
        holds(tags == [program.AREA_SIZE], f"not one range of 32 MiB is tagged, but {tags}")
        status = stage.perdure("status", NAME)
        self.times["power on, until the data is written"] = said["filled"]["at"] - began
        self.times["reboot from inside, until the data is verified"] = verified["at"] - said["rebooting"]["at"]
        print(f"    accelerator {status['accelerator']}\n    tracker {status['tracker']}")
        shown("a", f"after its reboot the guest has verified the {size(program.AREA_SIZE)} that it tagged: counter 1")

    def reboot_from_outside(self) -> None:
        """(b) and (c): the secret is there while the guest runs and gone before it boots; little is captured."""
        stage = self.stage
        running, written = stage.seen_now(), self._pages_written()
        for found in (running.secrets_by_qemu, running.secrets_in_files):
            holds(found >= SECRET_COPIES, f"the judge is blind: in a running guest, it found the secret {found} times")
        began = time.monotonic()
        captured = stage.perdure("reboot", NAME)["captured"]
        verified = holds_verified(stage.guest(), 2)
        seen = stage.seen_before_boot()
        holds_before_boot(seen, 2)
        self.times["reboot from outside, until the data is verified"] = verified["at"] - began
        self.times["the judge's look at all memory, at each boot"] = seen.seconds
        shown(
            "b",
            f"the secret was found {running.secrets_by_qemu} times in {size(running.searched)} of the running guest, "
            "and nowhere before its reboots, when the data was there",
        )
        first, second = (stage.perdure("show", f"{NAME}@{number}") for number in (1, 2))
        holds(
            captured == 2 and second["cause"] == "host reboot",
            f"the second reboot was captured as generation {captured}",
        )
        dirty, stored = second["dirty_bytes"], second["stored_bytes"]
        holds(dirty == written * program.PAGE, f"the guest wrote {written} pages, and {dirty} bytes count as changed")
        holds(stored < first["stored_bytes"] / 20, f"the second capture stored {stored} bytes")
        shown(
            "c",
            f"after a second reboot: counter 2; captured were the {written} pages that the guest had changed, "
            f"{size(stored)} were stored (the first time {size(first['stored_bytes'])})",
        )

    def lose_power(self) -> None:
        """(d)"""
        stage = self.stage
        lost = stage.lose_power()
        holds(lost == 2, f"{lost} backing files were lost, not those of main memory and of {REGION}")
        began = time.monotonic()
        stage.start()
        verified = holds_verified(stage.guest(), 2)
        holds_before_boot(stage.seen_before_boot(), 2)
        restored = stage.perdure("status", NAME)["restored"]
        holds(restored == 2, f"generation {restored} was restored")
        [took] = stage.run_said(rf"{NAME}@2 restored, .* in ([\d.]+) s, .* verified in ([\d.]+) s")
        self.times["perdure run after power loss, until the data is verified"] = verified["at"] - began
        shown(
            "d",
            f"SIGKILL to everything, all memory lost: perdure run has restored {NAME}@2 before boot ({took[0]} s, "
            f"and {took[1]} s to verify it): counter 2",
        )

    def roll_back(self) -> None:
        """(e)"""
        stage, began = self.stage, time.monotonic()
        done = stage.perdure("rollback", f"{NAME}@1")
        self.times["perdure rollback"] = time.monotonic() - began
        verified = holds_verified(stage.guest(), 1)
        holds_before_boot(stage.seen_before_boot(), 1)
        causes = [each["cause"] for each in stage.perdure("log", NAME)["generations"]]
        holds(causes == ["reboot", "host reboot", "before rollback", "rollback"], f"history is {', '.join(causes)}")
        self.times["rollback, until the data is verified"] = verified["at"] - began
        shown("e", f"perdure rollback {NAME}@1: counter 1; what there was before is {NAME}@{done['captured']}")

    def check(self) -> None:
        """(f): the VM is stopped, and its repository is whole."""
        stage = self.stage
        stage.perdure("stop", NAME, "--capture")
        code = stage.ended()
        holds(code == 0, f"perdure run ended with {code}")
        began = time.monotonic()
        report = stage.perdure("check", "--read-data")
        self.times["perdure check --read-data"] = time.monotonic() - began
        holds(report["clean"] and report["generations"] == 5, f"check says {report}")
        counts = ", ".join(f"{report[what]} {what}" for what in ("generations", "packs", "chunks"))
        shown("f", f"perdure check --read-data: {counts}, {size(report['bytes'])}: clean")

    def damage(self) -> None:
        """(f): a byte of what the second generation added is flipped, in a copy."""
        stage = self.stage
        copy = stage.folder / "copy"
        shutil.copytree(stage.repository, copy)
        packs = [next(copy.rglob(f"*{each}*")) for each in stage.perdure("show", f"{NAME}@2")["packs"]]
        pack = max(packs, key=lambda path: path.stat().st_size)
        offset = _flip_a_byte(pack)
        findings = stage.perdure("check", "--read-data", code=3, repository=copy)["findings"]
        holds(len(findings) == 1, f"one byte was flipped, and check has found {findings}")
        [found] = findings
        near = found["offset"] is not None and 0 <= offset - found["offset"] < FRAME_MAX
        holds(
            pack.name in found["object"] and near, f"byte {offset} of {pack.name} was flipped, and check says {found}"
        )
        lost, whole = self._exported(copy)
        holds(lost and whole, f"of the damaged copy, {lost} cannot be exported and {whole} can")
        holds(found["generations"] == lost, f"{lost} cannot be exported, and check says {found}")
        shown(
            "f",
            f"byte {offset} of a copy's pack flipped: check ends with 3 and names pack {pack.name[:12]}, offset "
            f"{found['offset']} and {', '.join(lost)}; {', '.join(whole)} can be exported from it, the others cannot",
        )

    def print_table(self) -> None:
        """Sizes and times."""
        took = dict(self.stage.run_said(rf"^({NAME}@\d+) .* in ([\d.]+) s"))
        rows = [("generation", "cause", "kept", "changed", "stored", "seconds", "pause ms")]
        for each in self.stage.perdure("log", NAME)["generations"]:
            name, pause = f"{NAME}@{each['generation']}", each["pause_ms"]
            sizes = (size(each[key]) for key in ("region_bytes", "dirty_bytes", "stored_bytes"))
            rows.append((name, each["cause"], *sizes, took.get(name, "-"), "-" if pause is None else f"{pause:.1f}"))
        print()
        for row in rows:
            print(f"{row[0]:<12}{row[1]:<16}" + "".join(f"{cell:>11}" for cell in row[2:]))
        print()
        for what, seconds in self.times.items():
            print(f"{what:<64}{seconds:>7.1f} s")

    def _pages_written(self) -> int:
        """By the guest since its last boot, as it says itself; and the header."""
        console = (self.stage.runtime / "console.log").read_text()
        return int(console.rpartition('"pages":')[2].partition("}")[0]) + 1

    def _exported(self, copy: Path) -> tuple[list[str], list[str]]:
        """Generations that cannot be exported from a damaged copy, and those that can, with the right bytes."""
        lost, whole = [], []
        for generation in self.stage.perdure("log", NAME)["generations"]:
            point = f"{NAME}@{generation['generation']}"
            found = self.stage.command("export", point, REGION, "-", repository=copy)
            if found.returncode:
                lost.append(point)
                continue
            wanted = self.stage.command("export", point, REGION, "-")
            same = hashlib.sha256(found.stdout).digest() == hashlib.sha256(wanted.stdout).digest()
            holds(wanted.returncode == 0 and same, f"{point} was exported from a damaged copy, with other bytes")
            whole.append(point)
        return lost, whole


def _flip_a_byte(path: Path) -> int:
    """In the middle; gives the offset."""
    offset = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return offset


def size(count: int) -> str:
    """A byte count for people."""
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB" if count else "0"


def _interrupted(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    """The demo; gives the exit code."""
    for number in SIGNALS:
        signal.signal(number, _interrupted)
    with set_up() as stage:
        print("A guest with 512 MiB and 64 MiB of persistent memory is booted five times: about a minute.", flush=True)
        try:
            Demo(stage).run()
        except (NotHeldError, subprocess.TimeoutExpired) as error:
            print(f"\n{stage.last_words()}\n\nDOES NOT HOLD: {error}", file=sys.stderr)
            return 1
    print("\nEverything held.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
