"""Whatever is raised at whatever call inside the runtime: calls go on, tables are whole, and nothing is left.

Here a part of the calls is tried; all of them are in tests/stress.
"""

import pytest

import shmdist as sd
from tests.integration import storms
from tests.integration.injection import Interrupt, Raise
from tests.integration.sweeping import World, sweep_here

ERRORS = [Raise(MemoryError), Raise(RecursionError), Raise(OSError)]
FEW = 120  # calls


def sweep(workers, side, acts, *args, **options):
    world = World(*workers)
    try:
        return world.sweep(side, acts, *args, **options)
    finally:
        world.close()


@pytest.mark.parametrize("side", ["home", "worker"])
def test_an_error(fresh, side):
    wrong, tried = sweep(fresh(2), side, ERRORS, FEW)
    assert wrong == [], "\n".join(map(repr, wrong))
    assert tried > FEW


@pytest.mark.parametrize("side", ["home", "worker"])
def test_an_interrupt(fresh, side):
    wrong, tried = sweep(fresh(2), side, [Interrupt()], FEW)
    assert wrong == [], "\n".join(map(repr, wrong))
    assert tried


def test_an_interrupt_of_a_call_that_calls(fresh):
    caller, *workers = fresh(3)
    wrong, tried = sd.remotecall_fetch(sweep_here, caller, *workers, "home", [Interrupt()], FEW)
    assert wrong == [], "\n".join(map(repr, wrong))
    assert tried


def test_ctrl_c_at_random_moments():
    storms.of_ctrl_c(200)


def test_interrupts_of_a_worker_at_random_moments():
    storms.of_interrupts(200)
