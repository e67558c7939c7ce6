"""No page is missed, whatever a guest, its disks and its supervisor do: a round of chance with each tracker.

Each run has a seed of its own, which is in its output; PERDURE_CHANCE_ROUNDS is how many, and `scripts/bench missed
--minutes 60` is an hour of it.
"""

from __future__ import annotations

import os
import random

import pytest
from chance import KINDS, chance
from supervised import Image

from vm.pagemap import has_pagemap_scan

pytestmark = pytest.mark.qemu

ROUNDS = int(os.environ.get("PERDURE_CHANCE_ROUNDS", "1"))


@pytest.mark.parametrize("kind", list(KINDS) if has_pagemap_scan() else ["scan"])
def test_no_page_is_missed(guest_image: Image, kind: str) -> None:
    with chance(guest_image, kind, random.randrange(1 << 32)) as made:
        for _ in range(ROUNDS):
            made.round()
        assert made.seen.instants == ROUNDS
        assert set(made.seen.missed) == {"ram", "pm0", "disk:raw", "disk:qcow"}
        assert not any(made.seen.missed.values())
