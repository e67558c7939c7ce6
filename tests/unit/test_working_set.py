"""What a VM touched first in earlier resumes: what is remembered of it, for which generations, and how much."""

import itertools
import os
from pathlib import Path

import pytest
from store_fixtures import add, place

from restore.working_set import WorkingSet

PAGE = 4096
NAMES = ["ram", "pm0"]


@pytest.fixture(scope="module")
def generations():
    """Twenty of one VM, none like another, and one that equals the last of them; two of another VM, like the last two
    of these."""
    with place() as folder, folder.open() as repository:
        contents = [("vm", number) for number in [*range(1, 21), 20]] + [("copy", 19), ("copy", 20)]
        yield [add(repository, vm, {"ram": bytes([each]) * PAGE, "pm0": bytes(PAGE)}) for vm, each in contents]


class Resumes:
    """One after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._times = folder, itertools.count(1)

    def of(self, generation, *pages: int, names=NAMES) -> None:
        """One in which these pages of main memory are waited for."""
        found = WorkingSet.of(self.folder, generation, names)
        for page in pages:
            found.touched("ram", page)
        found.save()
        now = next(self._times)
        os.utime(found.path, ns=(now, now))  # the clock of files is a coarse one

    def known(self, generation, names=NAMES) -> list[int]:
        """What one would fetch ahead."""
        return WorkingSet.of(self.folder, generation, names).pages("ram").tolist()


@pytest.fixture
def resumes(tmp_path) -> Resumes:
    return Resumes(tmp_path / "working-sets")


def test_content_knows_its_own_pages_and_other_content_guesses_those_of_the_last_resume(resumes, generations):
    first, second, third = generations[:3]
    assert resumes.known(first) == []
    resumes.of(first, 7, 5, 7)
    assert resumes.known(first) == resumes.known(second) == [7, 5]
    resumes.of(second, 9)
    assert resumes.known(second) == resumes.known(third) == [9, 7, 5]
    assert resumes.known(first) == [7, 5]
    resumes.of(first, 4)
    assert resumes.known(third) == resumes.known(first) == [4, 7, 5]
    resumes.of(generations[19], 1)
    assert resumes.known(generations[20]) == [1, 4, 7, 5]


def test_a_copy_knows_the_pages_of_what_it_is_a_copy_of_and_guesses_its_own(resumes, generations):
    *_, of_vm, of_copy, newer_of_copy = generations
    resumes.of(of_vm, 7)
    assert resumes.known(of_copy) == []
    assert resumes.known(newer_of_copy) == [7]
    resumes.of(newer_of_copy, 9)
    assert resumes.known(of_copy) == [9, 7]
    assert resumes.known(of_vm) == resumes.known(newer_of_copy) == [9, 7]
    resumes.of(of_vm, 4)
    assert resumes.known(newer_of_copy) == [4, 9, 7]


def test_a_boot_guesses_nothing_by_what_a_resume_has_touched(resumes, generations):
    resumes.of(generations[0], 7)
    assert resumes.known(generations[0], ["ram"]) == []
    resumes.of(generations[0], 8, names=["ram"])
    assert resumes.known(generations[1], ["ram"]) == [8]
    assert resumes.known(generations[1]) == [7]


def test_a_guess_is_bounded_and_what_was_of_use_longest_ago_falls_out_of_it(resumes, generations):
    resumes.of(generations[0], *range(3000))
    assert resumes.known(generations[0]) == [*range(3000)]
    assert resumes.known(generations[1]) == [*range(2048)]
    resumes.of(generations[1], 2999, 5000)
    assert resumes.known(generations[1]) == [2999, 5000, *range(2048)]
    assert resumes.known(generations[2]) == [2999, 5000, *range(2046)]


def test_the_newest_sixteen_contents_are_remembered_and_private(resumes, generations):
    resumes.of(generations[-2], 100)
    for number, generation in enumerate(generations[:20]):
        resumes.of(generation, number)
    assert len(list(resumes.folder.iterdir())) == 16 + 1
    assert resumes.known(generations[-2])[0] == 18
    assert resumes.folder.stat().st_mode & 0o077 == 0
    assert all(each.stat().st_mode & 0o077 == 0 for each in resumes.folder.iterdir())
    assert resumes.known(generations[4])[0] == 4
    assert resumes.known(generations[3])[0] == 19  # gone: a guess


def test_a_damaged_file_is_no_error(resumes, generations):
    resumes.of(generations[0], 7)
    [path] = resumes.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert resumes.known(generations[0]) == resumes.known(generations[1]) == []
    resumes.of(generations[1], 8)
    assert resumes.known(generations[1]) == [8]
