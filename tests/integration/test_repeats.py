"""Arrays that go out many times in one map are copied once, and are values all the same."""

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.runtime.sharing import LINE
from shmdist.scheduling.repeated_arrays import find_repeated

N = LINE // 8  # items of 8 bytes of an array that goes through a block


def blocks_taken():
    return current_node().sharing.arena._serial


def first_and_last(array):
    return float(array[0]), float(array[-1])


def write(array):
    array += 1
    return float(array[0])


def test_one_array_many_times(cluster):
    array = np.arange(4.0 * N)
    for batch_size in (1, 3):
        before = blocks_taken()
        got = sd.pmap(first_and_last, [array] * 12, batch_size=batch_size)
        assert got == [first_and_last(array)] * 12
        assert blocks_taken() == before + 1


def test_windows_of_one_array(cluster):
    array = np.arange(4.0 * N)
    windows = [array[start : start + 2 * N] for start in range(0, 2 * N, N // 4)]
    before = blocks_taken()
    assert sd.pmap(first_and_last, windows, batch_size=1) == [first_and_last(w) for w in windows]
    assert blocks_taken() == before + 1


def test_each_may_write_his_own(cluster):
    array = np.zeros(2 * N)
    assert sd.pmap(write, [array] * 12, batch_size=1) == [1.0] * 12
    assert sd.pmap(write, [array] * 12, batch_size=4) == [1.0] * 12
    assert not array.any()


def test_of_several_iterables(cluster):
    array = np.arange(2.0 * N)
    before = blocks_taken()
    assert sd.pmap(lambda a, i: float(a[i]), [array] * 8, range(8), batch_size=1) == list(
        map(float, range(8))
    )
    assert blocks_taken() == before + 1


class TestFinding:
    def test_only_what_is_sent_more_than_once(self):
        array, other = np.zeros(2 * N), np.zeros(2 * N)
        assert find_repeated(([array, other],)) is None
        assert find_repeated((list(array.reshape(2, -1)),)) is None
        found = find_repeated(([array, other, array],))
        assert found._bases == [array] or found._bases[0] is array

    @pytest.mark.parametrize(
        "elements",
        [
            [np.zeros(10)] * 9,  # small ones stay in the stream
            [np.zeros((N, 4))[:, 1]] * 9,  # bytes that do not lie side by side
            [np.full(N, None)] * 9,  # objects are no bytes
            iter([np.zeros(N)] * 9),  # it may write in between
            range(9),
            [],
            [1, 2, 2],
        ],
    )
    def test_not_these(self, elements):
        assert find_repeated((elements,)) is None

    def test_nor_shared_ones(self):
        assert find_repeated(([sd.shared.zeros(N)] * 9,)) is None
