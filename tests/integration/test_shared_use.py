"""Shared arrays as programs use them: results written in place, parts given to loops."""

import operator

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import until


def test_a_function_writes_its_result_into_one(cluster):
    out = sd.shared.zeros(1000)
    back = sd.remotecall_fetch(np.multiply, cluster[0], np.arange(1000.0), 2, out=out)
    assert (out == 2 * np.arange(1000.0)).all()
    assert sd.shared.is_shared(back)
    back[0] = 7
    assert out[0] == 7


def test_a_loop_is_given_parts_of_one(cluster):
    data, seen = sd.shared.array(np.arange(10_000.0)), sd.shared.zeros(10_000, int)

    @sd.distributed(operator.add, vectorized=True)
    def total(part):
        assert sd.shared.is_shared(part)
        return part.sum()

    assert total(data) == np.arange(10_000.0).sum()

    @sd.distributed(vectorized=True)
    def mark(part):
        seen[part.start : part.stop] += sd.myid()

    mark(range(10_000)).wait()
    assert set(seen) == set(cluster)


def test_a_loop_writes_to_the_part_it_is_given(cluster):
    data = sd.shared.ones((100, 20))

    @sd.distributed(vectorized=True, schedule="dynamic", chunk=7)
    def double(part):
        part *= 2

    double(data).wait()
    assert (data == 2).all()


def test_rows_of_one_in_a_map(cluster):
    data = sd.shared.zeros((30, 5))

    def number(row, i):
        row[:] = i
        return row

    rows = sd.pmap(number, data, range(30))
    assert (data[:, 0] == np.arange(30)).all()
    assert all(sd.shared.is_shared(row) for row in rows)


@pytest.mark.parametrize("make", [sd.shared.empty, sd.shared.zeros, sd.shared.ones])
@pytest.mark.parametrize("shape", [0, 5, (), (2, 3), (0, 4), [2, 2], np.int64(3), (np.int8(2), 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes(make, shape, order):
    array = make(shape, "f4", order)
    like = np.empty(shape, "f4", order)
    assert (array.shape, array.dtype) == (like.shape, like.dtype)
    assert array.strides == like.strides or not array.size
    assert sd.shared.is_shared(array) and array.flags.writeable
    if make is not sd.shared.empty:
        assert (array == (make is sd.shared.ones)).all()


def test_zeros_are_zeros_in_memory_that_was_used():
    for _ in range(3):
        array = sd.shared.full(100_000, 7.0)
        del array
        array = sd.shared.zeros(100_000)
        assert not array.any()
        array += 3
        del array


def test_full_and_array_are_as_numpys():
    assert sd.shared.full((2, 2), 3).dtype == np.full((2, 2), 3).dtype
    assert (sd.shared.full((2, 3), [1, 2, 3]) == np.full((2, 3), [1, 2, 3])).all()
    assert sd.shared.full(2, 1, dtype="f2").dtype == np.float16
    assert sd.shared.full(2, True).dtype == bool
    source = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert (
        sd.shared.array(source).flags.f_contiguous and sd.shared.array(source, order="C").flags.c_contiguous
    )
    assert sd.shared.array([[1, 2], [3, 4]], "f8").tolist() == [[1, 2], [3, 4]]
    assert sd.shared.array(source[:, ::2]).tolist() == source[:, ::2].tolist()
    assert sd.shared.array("text").dtype == np.array("text").dtype
    assert sd.shared.array(5).shape == ()


def test_what_cannot_be_shared():
    with pytest.raises(TypeError, match="holds Python objects"):
        sd.shared.zeros(3, object)
    with pytest.raises(TypeError, match="holds Python objects"):
        sd.shared.array([1, None])
    with pytest.raises(ValueError, match="negative"):
        sd.shared.zeros((2, -1))
    with pytest.raises(ValueError, match="order"):
        sd.shared.zeros(3, order="X")
    with pytest.raises(TypeError):
        sd.shared.zeros("ab")
    with pytest.raises(MemoryError, match="shared memory"):
        sd.shared.zeros(1 << 50)


def test_is_shared_of_what_is_no_array():
    sd.shared.zeros(3)
    for thing in (None, 5, "text", [1], np.float64(1), object()):
        assert not sd.shared.is_shared(thing)


def test_a_call_without_an_answer_gets_the_array_itself(cluster):
    shared = sd.shared.zeros(100)
    sd.remote_do(operator.setitem, cluster[0], shared, 3, 7.0)
    until(lambda: shared[3] == 7)
