"""Lists whose objects are pickled each on its own, and batches that are divided while they run."""

import pickle
import threading

import numpy as np
import pytest

from shmdist.scheduling.batch import BatchRunner, divide
from shmdist.scheduling.batch_sizing import BatchSizer, positive_integer
from shmdist.serialization import codec
from shmdist.serialization.isolated_items import IsolatedItems, LoadFailure, PartialList, pack


def there_and_back(items):
    payload = codec.dumps(pack(items))
    return pickle.loads(b"".join(payload.parts), buffers=[bytearray(buffer) for buffer in payload.buffers])


@pytest.mark.parametrize(
    "items",
    [
        [1, 2.5, None, "a", b"b", True, 1j],
        [(1, "a"), (2, "b")],
        [{"a": 1}, {"a": 2}],
        [[1], [], (3,), {}],
        list(np.arange(3)),
        range(7),
    ],
)
def test_what_cannot_be_shared_goes_as_it_is(items):
    assert pack(items) is items
    assert there_and_back(items) == items


def test_objects_arrive_apart_and_whole():
    inner = [1]
    items = [inner, {"a": inner, "b": inner}, (inner,), 7, "text"]
    got = there_and_back(items)
    assert got == items and type(got) is list
    got[0].append(2)
    got[1]["a"].append(3)
    assert got == [[1, 2], {"a": [1, 3], "b": [1, 3]}, ([1],), 7, "text"]


def test_large_buffers_stay_out_of_the_stream():
    items = [np.full(5000, i) for i in range(3)] + [np.arange(3)]
    payload = codec.dumps(pack(items))
    assert len(payload.buffers) == 3 and payload.nbytes() < 3 * items[0].nbytes + 2000
    got = there_and_back(items)
    assert all((a == b).all() and a.flags.writeable for a, b in zip(items, got, strict=True))


def test_classes_by_value_are_sent_once_and_stay_one_class():
    space = {"__name__": "__main__"}
    exec("class Point:\n    def __init__(self, x): self.x = x\n    text = 'x' * 5000", space)
    point = space["Point"]
    payload = codec.dumps(pack([point(i) for i in range(100)]))
    assert payload.nbytes() < 20_000
    got = pickle.loads(b"".join(payload.parts))
    assert [each.x for each in got] == list(range(100)) and len(set(map(type, got))) == 1


def test_closures_have_values_of_their_own():
    def counter():
        count = 0

        def step():
            nonlocal count
            count += 1
            return count

        return step

    step = counter()
    assert [each() for each in there_and_back([step, step, 5][:2])] == [1, 1]


class Broken:
    def __reduce__(self):
        return int, ("not a number",)


def test_what_cannot_be_read_costs_itself_alone():
    got = there_and_back([1, Broken(), [2]])
    assert type(got) is PartialList and got[0] == 1 and got[2] == [2]
    assert type(got[1]) is LoadFailure and isinstance(got[1].error, ValueError)


def test_what_cannot_be_sent_is_an_error_as_ever():
    assert type(pack([threading.Lock()])) is IsolatedItems
    with pytest.raises(codec.SerializationError):
        codec.dumps(pack([1, threading.Lock()]))


@pytest.mark.parametrize("probe", [False, True])
def test_a_batch_is_divided_while_it_runs(probe):
    key = (0, 1)
    kept = []

    def f(i):
        if i == 2:
            kept.append(divide(key))
            kept.append(divide(key))
        return i

    seconds, values, errors = BatchRunner(f).run(list(range(103)), probe, key)
    assert kept == [53, 28] and values == list(range(28)) and errors is None and seconds > 0
    assert divide(key) is None


def test_the_last_element_is_not_divided():
    key = (0, 2)
    _, values, _ = BatchRunner(lambda i: divide(key) if i == 1 else i).run([0, 1], False, key)
    assert values == [0, None]


def test_errors_end_an_element_and_others_the_batch():
    def f(i):
        if i == 1:
            raise ValueError(i)
        if i == 3:
            raise KeyboardInterrupt
        return i

    _, values, errors = BatchRunner(f).run(range(9), False, (0, 3))
    assert values == [0, None, 2, None] and errors is not None and sorted(errors) == [1, 3]


def test_the_rest_goes_out_in_equal_parts():
    sizes = BatchSizer(10_000, None, cheap=True)
    assert sizes.next(0, 2) == 2500
    sizes.learn(1e-4, 2500)
    first = sizes.next(2500, 3)
    assert first == 2500 and sizes.next(2500 + first, 3) == first


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "1", None, float("nan")])
def test_positive_integers(number):
    with pytest.raises(ValueError, match="chunk"):
        positive_integer("chunk", number)
    assert positive_integer("chunk", np.int64(3)) == 3
