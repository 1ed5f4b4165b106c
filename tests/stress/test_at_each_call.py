"""Whatever is raised at whatever call inside the runtime: calls drawn anew in each round.

All of them, one after the other, take an hour::

    SHMDIST_EVERY_CALL=1 python -m pytest -s tests/stress/test_at_each_call.py
"""

import os
import random

import pytest

import shmdist as sd
from tests.integration import storms
from tests.integration.injection import Interrupt
from tests.integration.sweeping import World, sweep_here
from tests.integration.test_at_each_call import ERRORS, sweep

PARTS = 10
EVERY = os.environ.get("SHMDIST_EVERY_CALL", "") not in ("", "0")
CHOSEN = range(PARTS) if EVERY else [random.randrange(PARTS)]
COUNT = None if EVERY else 40  # calls of a part


def _names(part):
    return list(World.names)[part::PARTS]


@pytest.mark.parametrize("part", CHOSEN)
@pytest.mark.parametrize("act", [*ERRORS, Interrupt()], ids=repr)
@pytest.mark.parametrize("side", ["home", "worker"])
def test_all(fresh, side, act, part):
    wrong, tried = sweep(fresh(2), side, [act], COUNT, names=_names(part), seed=random.random())
    print(f"{side}, {act!r}, {_names(part)}: {tried} calls")
    assert wrong == []


@pytest.mark.parametrize("part", CHOSEN)
def test_all_of_a_call_that_calls(fresh, part):
    caller, *workers = fresh(3)
    wrong, tried = sd.remotecall_fetch(
        sweep_here, caller, *workers, "home", [Interrupt()], COUNT, names=_names(part)
    )
    print(f"a call, {_names(part)}: {tried} calls")
    assert wrong == []


def test_ctrl_c_1000_times():
    storms.of_ctrl_c(1000, 240)


def test_interrupts_of_a_worker_1000_times():
    storms.of_interrupts(1000, 240)
