"""Errors of elements tell their place and their element, on every road and wherever they ran."""

import operator
import os
import traceback

import pytest

import shmdist as sd
from tests.integration.helpers import run_script


def inverse(x):
    return 1 / x


INPUT = [3, 2, 0, 1, 5]
ROADS = {
    "map": lambda pool: sd.pmap(inverse, INPUT, pool=pool),
    "map 1": lambda pool: sd.pmap(inverse, INPUT, pool=pool, batch_size=1),
    "map 5": lambda pool: sd.pmap(inverse, INPUT, pool=pool, batch_size=5),
    "map of a generator": lambda pool: sd.pmap(inverse, (x for x in INPUT), pool=pool),
    "threads": lambda pool: sd.pmap(inverse, INPUT, distributed=False),
    "generator": lambda pool: list(sd.pgenerate(inverse, INPUT, pool=pool)),
    "as ready": lambda pool: list(sd.pgenerate(inverse, INPUT, pool=pool, ordered=False)),
    "loop": lambda pool: sd.distributed(operator.add, pool=pool)(inverse)(INPUT),
    "loop with another reducer": lambda pool: sd.distributed(min, pool=pool)(inverse)(INPUT),
    "loop dynamic": lambda pool: sd.distributed(operator.add, pool=pool, schedule="dynamic", chunk=2)(
        inverse
    )(INPUT),
    "loop in chunks": lambda pool: sd.distributed(operator.add, pool=pool, chunk=2)(inverse)(INPUT),
    "loop without reducer": lambda pool: sd.distributed(pool=pool)(inverse)(INPUT).fetch(),
}


@pytest.mark.parametrize("pids", [[1], [0], [1, 0], [0, 1]], ids=["here", "a worker", "both", "workers"])
@pytest.mark.parametrize("road", ROADS)
def test_index_and_note(cluster, road, pids):
    pool = [pid or cluster[0] for pid in pids] if pids != [0, 1] else cluster[:2]
    with pytest.raises(ZeroDivisionError) as caught:
        ROADS[road](pool)
    error = caught.value
    assert error.index == 2 and error.__notes__ == ["element 2: 0"] and isinstance(error, sd.RemoteException)
    text = "".join(traceback.format_exception(error))
    assert "element 2: 0" in text and "in inverse" in text and "batches.py" not in text, text
    if pids == [1]:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert frames[-1] == "inverse", frames


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_handlers_see_it(cluster, batch_size):
    seen = []

    def check(state, error):
        seen.append((error.index, error.__notes__))
        return True

    got = sd.pmap(
        inverse,
        INPUT,
        retry_delays=[0],
        retry_check=check,
        on_error=lambda e: (e.index, e.__notes__),
        batch_size=batch_size,
    )
    assert got == [1 / 3, 0.5, (2, ["element 2: 0"]), 1, 0.2] and seen == [(2, ["element 2: 0"])]


def test_several_iterables(cluster):
    with pytest.raises(ZeroDivisionError) as caught:
        sd.pmap(operator.truediv, [1, 2], [3, 0])
    assert caught.value.index == 1 and caught.value.__notes__ == ["element 1: (2, 0)"]


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("pids", [[1], [0, 1]])
def test_chunks_of_vectorized_loops(cluster, schedule, pids):
    pool = [1] if pids == [1] else cluster[:2]

    def part(chunk):
        if 7 in chunk:
            raise ValueError("seven")
        return len(chunk)

    loop = sd.distributed(operator.add, vectorized=True, schedule=schedule, chunk=5, pool=pool)(part)
    with pytest.raises(ValueError, match="seven") as caught:
        loop(range(20))
    assert caught.value.index == range(5, 10) and caught.value.__notes__ == ["elements 5 to 9: range(5, 10)"]


class Refusing(Exception):
    __slots__ = ("index",)

    def __setattr__(self, name, value):
        raise TypeError(name)


def refuse(x):
    raise Refusing("as it is")


def test_errors_that_refuse_attributes_arrive(cluster):
    for pool in (cluster[:2], [1]):
        for run in (
            lambda pool: sd.pmap(refuse, range(3), pool=pool),
            lambda pool: sd.distributed(min, pool=pool)(refuse)(range(3)),
        ):
            with pytest.raises(Refusing, match="as it is") as caught:
                run(pool)
            assert (
                "element 0: 0" in caught.value.__notes__
                or "element 1: 1" in caught.value.__notes__
                or "element 2: 2" in caught.value.__notes__
            )


def test_of_what_cannot_be_sent_or_is_lost(fresh, cluster):
    with pytest.raises(sd.SerializationError) as caught:
        sd.pmap(abs, [1, (x for x in "ab")], pool=cluster)
    assert caught.value.index == 1
    with pytest.raises(sd.SerializationError) as caught:
        sd.pmap(lambda x: (y for y in "ab") if x == 2 else x, range(4), pool=cluster, batch_size=4)
    assert caught.value.index == 2 and caught.value.__notes__[-1] == "element 2: 2"
    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.pmap(lambda x: os._exit(1) if x == 1 else x, range(3), pool=fresh(2))
    assert caught.value.index == 1 and caught.value.__notes__ == ["element 1: 1"]
    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.distributed(max, pool=fresh(1))(lambda x: os._exit(1))(range(3))
    assert caught.value.index == range(3)


def test_maps_in_maps_and_over_processes(cluster):
    def inner(x):
        return sd.pmap(inverse, [1, x], pool=cluster[:2])

    with pytest.raises(ZeroDivisionError) as caught:
        sd.pmap(inner, [4, 5, 0], pool=cluster)
    assert caught.value.index == 2 and caught.value.__notes__ == ["element 1: 0", "element 2: 0"]
    with pytest.raises(ZeroDivisionError) as caught:
        sd.remotecall_fetch(inner, cluster[0], 0)
    assert caught.value.index == 1 and caught.value.__notes__ == ["element 1: 0"]


def test_post_mortem_lands_in_the_users_frame():
    script = """
import sys, traceback
import shmdist as sd
def f(x):
    mine = x * 2
    return 1 / x
for run in (
    lambda: sd.pmap(f, [1, 0]),
    lambda: sd.pmap(f, [1, 0], distributed=False),
    lambda: list(sd.pgenerate(f, [1, 0])),
    lambda: sd.distributed(max)(f)([1, 0]),
    lambda: sd.distributed()(f)([1, 0]).fetch(),
    lambda: sd.remotecall_fetch(f, 1, 0),
):
    try:
        run()
    except ZeroDivisionError as error:
        tb = error.__traceback__
        while tb.tb_next:
            tb = tb.tb_next
        assert tb.tb_frame.f_code.co_name == "f" and tb.tb_frame.f_locals["mine"] == 0, tb.tb_frame
print("fine")
"""
    assert run_script(script).clean() == "fine\n"
