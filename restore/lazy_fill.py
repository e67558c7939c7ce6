"""What a lazy restore had not placed when QEMU ended, written into the backing files: they are whole then.

For memory that nobody uses any more and that is to be captured. Blocking; nobody else may touch the files.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from base.errors import StorageError
from base.progress import Progress, silent
from base.units import PAGE
from restore.claims import Claims
from restore.plan import MovedError, RegionPlan, Window
from store.locating import Locator
from store.reader import GenerationReader
from store.repository import Repository

_BATCH = 16


def fill(repository: Repository, memory: Path, regions: Collection[str], progress: Progress = silent) -> None:
    """Complete these regions of a memory folder, if a lazy restore of it had not come to its end.

    Raises IntegrityError (what is missing was pruned after its generation was forgotten, say), StorageError,
    ConflictError, NotFoundError.
    """
    claims = Claims.find(memory)
    if claims is None:
        return
    with claims, ExitStack() as stack:
        claims.lock()
        generation = claims.generation(repository)
        reader = stack.enter_context(GenerationReader(repository, generation, kept=True))
        backing = {}
        for name, file, _ in claims.facts.regions:
            try:
                backing[name] = os.open(memory / file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise StorageError.from_os(error, str(memory / file), "open") from error
            stack.callback(os.close, backing[name])
        claims.take_over(backing)
        locator = Locator(repository.nodes, repository.frames)
        for at, (name, _, size) in enumerate(claims.facts.regions):
            if name in regions:
                plan = RegionPlan(repository.nodes, locator, repository.frames, reader.region(name))
                for first, last in plan.occupied(_BATCH):
                    for low in range(first, last, _BATCH):
                        high = min(low + _BATCH, last)
                        plan.plan(low, high)
                        for number in range(low, high):
                            _fill_window(claims, at, plan, plan.windows[number], backing[name])
                            plan.finish(number)
                        progress(f"completing {name}", min(high * 1024 * PAGE, size), size)
        claims.remove()


def _fill_window(claims: Claims, at: int, plan: RegionPlan, window: Window, descriptor: int) -> None:
    name = claims.facts.regions[at][0]
    while len(left := np.flatnonzero(claims.pages[name][window.numbers] == 0)):
        members = left[window.frames[left] == window.frames[left[0]]]
        try:
            chunks = plan.chunks(window, members)
        except MovedError:
            continue
        for page, content in zip(window.numbers[members].tolist(), chunks, strict=True):
            claims.intend(at, page, 1)  # whoever is killed before the claim is followed by one that knows the page
            try:
                os.pwrite(descriptor, content, page * PAGE)
            except OSError as error:
                raise StorageError.from_os(error, f"region {name}", "write") from error
            claims.claim(name, page, 1)
