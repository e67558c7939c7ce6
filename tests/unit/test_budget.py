"""The budget that supervisors of one host share."""

import pytest

from perdure.supervision.budget import HostBudget


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def budgets(tmp_path, clock):
    made = [HostBudget(tmp_path / "background", 0.25, clock) for _ in range(3)]
    yield made
    for each in made:
        each.close()


def test_one_at_a_time(budgets):
    one, two, _ = budgets
    assert one.begin() == 0
    assert two.begin() > 0
    one.end(0.0)
    assert two.begin() == 0


def test_together_they_use_no_more_than_the_share(budgets, clock):
    used, began = 0.0, clock.now
    while clock.now < began + 100:
        waits = []
        for each in budgets:
            wait = each.begin()
            waits.append(wait)
            if wait == 0:
                clock.now += 0.1
                used += 0.1
                each.end(0.1)
        clock.now += min(wait for wait in waits if wait) if any(waits) else 0.0
    assert 15 < used <= 0.25 * (clock.now - began) + 0.1


def test_what_was_noted_before_the_host_was_booted_holds_nobody_up(budgets, clock):
    budgets[0].begin()
    budgets[0].end(1.0)
    assert budgets[1].begin() > 0
    clock.now = 5.0
    assert budgets[1].begin() == 0


def test_who_died_leaves_no_lock(budgets):
    assert budgets[0].begin() == 0
    budgets[0].close()
    assert budgets[1].begin() == 0


def test_without_the_file_each_keeps_to_its_own(tmp_path, clock):
    budget = HostBudget(tmp_path / "no" / "background", 0.25, clock)
    assert budget.begin() == 0
    budget.end(1.0)
    assert budget.begin() == 0
