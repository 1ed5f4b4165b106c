"""How large batches are, by what elements cost and weigh."""

import pickle

import shmdist as sd
from shmdist.scheduling.batch_sizing import WINDOW, BatchSizer
from shmdist.serialization.codec import dumps, dumps_value

MIB = 1 << 20


def of_no_cost(total=None, fixed=None):
    sizes = BatchSizer(total, fixed, cheap=False)
    sizes.learn(1e-7, 1)
    sizes.learn(1e-4, 1000)
    return sizes


def weigh(sizes, *nbytes):
    for number in nbytes:
        sizes.weigh(dumps(pickle.PickleBuffer(bytearray(number))), 1)


def test_light_elements_go_out_in_thousands():
    sizes = of_no_cost()
    weigh(sizes, 100)
    assert sizes.next(0, 2) > 1000
    sizes.weigh(dumps_value(5, abs), 1)
    assert sizes.next(0, 2) > 1000


def test_heavy_elements_go_out_in_small_batches():
    sizes = of_no_cost()
    weigh(sizes, 100_000)
    assert 10 <= sizes.next(0, 2) <= 50
    weigh(sizes, 8 * MIB)
    assert sizes.next(0, 2) == 1
    assert sizes.window(0, 2) == WINDOW


def test_one_heavy_element_counts_at_once_and_is_forgotten_in_time():
    sizes = of_no_cost()
    weigh(sizes, 8 * MIB, 10)
    assert sizes.next(0, 2) == 1
    weigh(sizes, *[10] * 30)
    assert sizes.next(0, 2) > 1000


def test_bytes_that_are_copied_once_weigh_nothing():
    sizes, payload = of_no_cost(), dumps(pickle.PickleBuffer(bytearray(8 * MIB)))
    payload.known = object()
    sizes.weigh(payload, 1)
    assert sizes.next(0, 2) > 1000


def test_a_fixed_size_stays():
    sizes = of_no_cost(fixed=100)
    weigh(sizes, 8 * MIB)
    assert sizes.next(0, 2) == 100


def test_views_of_shared_arrays_weigh_nothing():
    sizes, array = of_no_cost(), sd.shared.zeros((4, MIB))
    sizes.weigh(dumps(list(array)), 4)
    assert sizes.next(0, 2) > 1000
    sizes.weigh(dumps(list(array + 1)), 4)
    assert sizes.next(0, 2) == 1
