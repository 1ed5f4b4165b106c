"""Where an element is tried again, and what a worker gets on which all fails."""

import itertools
import os
import time

import pytest

import shmdist as sd
from tests.integration.helpers import within

SIZES = [None, 1, 5]


@pytest.mark.parametrize("batch_size", SIZES)
@pytest.mark.parametrize("count", [2, 3])
def test_on_another_worker(cluster, batch_size, count):
    pids = cluster[:count]

    def picky(x):
        if sd.myid() == pids[0]:
            raise RuntimeError("not here")
        return x

    errors = []
    got = sd.pmap(
        picky,
        range(60),
        pool=pids,
        batch_size=batch_size,
        retry_delays=[0],
        retry_check=lambda _, e: not errors.append(e),
    )
    assert got == list(range(60)) and all(error.pid == pids[0] for error in errors)


@pytest.mark.parametrize("batch_size", SIZES)
def test_on_each_worker_before_any_gets_it_again(cluster, batch_size):
    """Each try is on a worker that has not had it, and then on another one than last time."""
    tries = {}

    def note(state, error):
        tries.setdefault(error.captured.ex.args[0], []).append(error.pid)
        return True

    def fails(x):
        raise RuntimeError(x)

    options = {
        "retry_delays": [0] * 5,
        "retry_check": note,
        "on_error": lambda e: None,
        "batch_size": batch_size,
    }
    sd.pmap(fails, range(12), pool=cluster, **options)
    for pids in tries.values():
        assert len(pids) == 5 and set(pids[:3]) == set(cluster), tries
        assert all(a != b for a, b in itertools.pairwise(pids)), tries


@pytest.mark.parametrize("batch_size", SIZES)
def test_one_worker_gets_it_again(cluster, batch_size):
    tried = sd.shared.zeros(8, dtype=int)

    def second_time(x):
        tried[x] += 1
        if tried[x] < 3:
            raise RuntimeError
        return sd.myid()

    got = sd.pmap(second_time, range(8), pool=cluster[:1], retry_delays=[0, 0], batch_size=batch_size)
    assert got == cluster[:1] * 8


@pytest.mark.parametrize("batch_size", SIZES)
def test_after_a_death(fresh, batch_size):
    pids = fresh(3)
    last = pids[-1]

    def deadly(x):
        if x == 3 and sd.myid() != last:
            os._exit(3)
        return x

    with within(20):
        assert sd.pmap(deadly, range(20), pool=pids, retry_delays=[0] * 2, batch_size=batch_size) == list(
            range(20)
        )


def test_with_no_worker_left(fresh):
    pids = fresh(2)
    got = sd.pmap(
        lambda x: os._exit(3), range(3), pool=pids, retry_delays=[0] * 5, batch_size=1, on_error=lambda e: e
    )
    texts = [str(error) for error in got]
    assert any("no workers left (2 died: " in text for text in texts), texts
    assert all("process 0" not in text for text in texts)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_worker_that_fails_all_does_not_attract_what_is_left(cluster, batch_size):
    broken = cluster[0]

    def work(x):
        if sd.myid() == broken:
            raise RuntimeError("no such module")
        time.sleep(0.004)  # it works
        return x

    got = sd.pmap(work, range(80), pool=cluster[:2], batch_size=batch_size, on_error=lambda e: None)
    assert got.count(None) < 40, got.count(None)


def test_a_worker_that_recovers_takes_part_again(cluster):
    first = cluster[0]
    failures = sd.shared.zeros(1, dtype=int)

    def work(x):
        time.sleep(0.002)  # it works
        if sd.myid() == first and failures[0] < 6:
            failures[0] += 1
            raise RuntimeError
        return sd.myid()

    got = sd.pmap(work, range(120), pool=cluster[:2], batch_size=1, on_error=lambda e: None)
    assert got.count(None) == 6 and got.count(first) > 20, got


def test_where_everything_fails_all_take_part(cluster):
    with within(20):
        got = sd.pmap(lambda x: {}[x], range(3000), pool=cluster, on_error=lambda e: e.pid)
    assert set(got) == set(cluster)
