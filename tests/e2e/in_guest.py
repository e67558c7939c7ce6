"""What the tests of survival have in the guest: sent to its runner after every boot, and run in its namespace.

May be run again in the same boot. Programs that write without end are workers, which `finish` ends. They pause for a
moment in each step, except where never doing so is the point: a guest that never idles takes half of the machine from
everything else that a test does.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable

import perdure_guest
from runner import area

PAGE = 4096

if "workers" not in globals():
    workers: list[threading.Thread] = []


def content(seed: int, size: int) -> bytes:
    """What the host's function of that name gives."""
    return random.Random(seed).randbytes(size)


def write(name: str, size: int, seed: int) -> None:
    """Tag an area and fill it; it is `memory` from then on."""
    use(name, size)
    memory[:] = content(seed, size)


def use(name: str, size: int) -> None:
    """Make an area `memory`."""
    global memory
    memory = area(name, size)


def holds(name: str, size: int, seed: int) -> bool:
    """Whether an area is as it was written."""
    return bytes(area(name, size)) == content(seed, size)


def change(pages: list[int], seed: int) -> None:
    """Write pages of `memory`, each as its number and the seed say."""
    for page in pages:
        memory[page * PAGE : (page + 1) * PAGE] = content(seed + page, PAGE)


def untagged(size: int) -> tuple[int, mmap.mmap]:
    """The end of the device, where no area is: guest-physical address, memory."""
    device = perdure_guest.dax_devices()[0]
    offset = device.end - device.start - size
    descriptor = os.open(device.path, os.O_RDWR)
    try:
        return device.start + offset, mmap.mmap(descriptor, size, offset=offset)
    finally:
        os.close(descriptor)


def work(step: Callable[[], None]) -> None:
    """Call `step` again and again in a thread, until `finish`."""

    def loop() -> None:
        while workers:
            step()

    workers.append(threading.Thread(target=loop, daemon=True))
    workers[-1].start()


def finish() -> None:
    """End all workers."""
    ending = list(workers)
    workers.clear()
    for each in ending:
        each.join()


def count(name: str, pause: float = 0.001) -> memoryview:
    """A worker that counts in an area, on from what is there; `pause`: seconds after each step."""
    numbers = area(name, PAGE).cast("Q")

    def step() -> None:
        numbers[0] += 1
        time.sleep(pause)

    work(step)
    return numbers


def stamp(name: str, pages: int, stride: int) -> None:
    """A worker that in step n writes n into page (stride n mod pages) of an area; returns when every page has one."""
    numbers, done = area(name, pages * PAGE).cast("Q"), 0

    def lap() -> None:
        nonlocal done
        for step in range(done + 1, done + 1 + pages):
            numbers[step * stride % pages * (PAGE // 8)] = step
        done += pages

    lap()
    work(lap)


def refusal(call: Callable[[], object]) -> str:
    """The error that a call ends with; empty if there is none."""
    try:
        call()
    except perdure_guest.PersistenceError as error:
        return str(error)
    return ""


def forget_tags() -> None:
    """As after the first boot, but for content."""
    finish()
    for each in perdure_guest.query_persistent_regions():
        if each.class_ == "persistent":
            perdure_guest.unmark_persistent(each.address, each.size)
