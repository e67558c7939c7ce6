"""A bit that flips between memory and disk, at any write of any operation.

What is read back before it is published is found there and then, and nothing comes of the operation. What is changed on
the disk later is found when it is read (test_damage.py).
"""

import pytest
from operations import OPERATIONS, Run, prepared
from test_crash_states import history, listed, opened, whole

from base.disk import Disk
from base.errors import IntegrityError, StorageError
from store.repository import Repository
from store.upkeep.check import check_repository


class Flipping(Disk):
    """Flips a bit in what its write number `at` writes: so far in, as a part of it."""

    def __init__(self, at: int, part: float) -> None:
        self.at, self.part, self.count = at, part, 0

    def write(self, descriptor, buffers, path):
        self.count += 1
        if self.count == self.at:
            data = bytearray(b"".join(buffers))
            data[int(self.part * (len(data) - 1))] ^= 1
            buffers = [bytes(data)]
        return super().write(descriptor, buffers, path)


@pytest.mark.parametrize("part", [0.0006, 0.5, 0.9998])  # in a pack's header, in its frames, in its trailer
@pytest.mark.parametrize("name", [each for each in OPERATIONS if each != "init"])
def test_a_bit_flips_at_every_write(name, part):
    at = 1
    while True:
        with prepared() as where:
            disk = Flipping(at, part)
            try:
                OPERATIONS[name](Run(where, disk))
                said = ""
            except (IntegrityError, StorageError) as error:
                said = str(error)
                assert len(said.splitlines()) == 1
            if disk.count < at:
                break
            if name == "repair":  # what it is to repair is still there, then
                OPERATIONS[name](Run(where))
            records = sorted(each.name for each in (where.path / "records").iterdir() if each.name.isdigit())
            keys = opened(where)
            expected = history(where, keys, records)
            with Repository(where.path, keys, where.root / "elsewhere") as repository:
                assert listed(repository) == expected
                whole(repository)
                assert check_repository(repository, read_data=True).findings == []
            at += 1
    assert at > 1
